"""tokenizer.json and the files around it -> TextAssets.

tokenizer.json alone defines how text becomes ids, including special tokens at the start:
``add_bos_token`` and ``add_eos_token`` of tokenizer_config.json have no effect in a directory that
has a tokenizer.json, as in transformers 5. Some classes of transformers 5 replace the rules that
split a text by their own. Those of tokenizer.json are followed nevertheless, since the model was
trained with them and llama.cpp has the same; where the ids differ, there is a warning.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attrs import frozen
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from tilewright.errors import ModelError, listed
from tilewright.types import ModelConfig, TextAssets
from tilewright_hf.files import JsonObject, is_there, one_line, read_json, read_text, shown

_OTHER_FORMATS = ("tokenizer.model", "tekken.json", "vocab.json", "vocab.txt")

_SUBWORD_PREFIX = re.compile(r'"continuing_subword_prefix"\s*:\s*"[^"]')

_SPLIT = "the  way it's 12\n\n x_y, Größe e\u0301"
"""Text that the rules of tokenizers split in different ways."""

_UNLIKELY = "zqxj \U0010fffd Ω漢7"
"""Text in several scripts, with words that no vocabulary has."""


def load_text(directory: Path, config: ModelConfig) -> tuple[TextAssets, tuple[str, ...]]:
    """Tokenizer, chat template and special tokens of a directory, and warnings.

    Added tokens may have ids beyond the model's vocabulary: then they are a warning, and no special
    token is taken from them. Raises ModelError for damaged files, and for a tokenizer whose own
    vocabulary is larger than the model's.
    """
    path = directory / "tokenizer.json"
    notes: list[str] = []
    settings = _optional_json(directory / "tokenizer_config.json", notes)
    tokenizer = _read_tokenizer(path, notes)
    rules = _class_rules(tokenizer, settings, config)
    special = _special_tokens(directory, tokenizer, settings, rules)
    where, declared = _declared_tokens(directory, tokenizer, settings, special)
    warnings = _add(tokenizer, where, declared, special)
    if rules is not None:
        warnings += _follow(tokenizer, rules, special, settings)
    if settings.values.get("split_special_tokens"):
        warnings += (
            f"{settings.where}: split_special_tokens is ignored: a special token in a text is "
            "always one token",
        )
    # Saved settings of a training run would truncate or pad every prompt.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    beyond = _beyond(tokenizer, config.vocab_size, path)
    warnings += _beyond_warnings(beyond, config.vocab_size, path)
    names = {key: t.content for key, t in special.named.items() if t.content not in beyond}
    template, tool_template, template_warnings = _chat_templates(directory, settings)
    assets = TextAssets(
        tokenizer=tokenizer,
        chat_template=template,
        tool_chat_template=tool_template,
        special_tokens=names,
        turn_end_ids=_turn_ends(tokenizer, names, config),
    )
    return assets, (*notes, *warnings, *template_warnings)


def _read_tokenizer(path: Path, notes: list[str]) -> Tokenizer:
    if not is_there(path):
        others = [name for name in _OTHER_FORMATS if is_there(path.parent / name)]
        if others:
            raise ModelError(
                f"{path}: no such file; {listed(others)} can be converted to it with transformers: "
                f"AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR), DIR = {path.parent}"
            )
        raise ModelError(f"{path}: no such file; expected the tokenizer of the model")
    text = read_text(path, notes)
    if _SUBWORD_PREFIX.search(text) and '"BPE"' in text:
        # tokenizers 0.23 slices merges that are shorter than the prefix out of bounds, which
        # kills the process.
        raise ModelError(
            f"{path}: a BPE model with a 'continuing_subword_prefix' is not supported; expected "
            "null or an empty string, as in the tokenizers of the supported models"
        )
    with refusing(f"{path}: the tokenizers library cannot read it"):
        tokenizer = Tokenizer.from_str(text)
    if not tokenizer.get_vocab_size(with_added_tokens=False):
        raise ModelError(f"{path}: its vocabulary is empty")
    return tokenizer


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turn errors of tokenizers into ModelError. Its panics do not derive from Exception."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise ModelError(f"{what}: {one_line(error)}") from error


def _optional_json(path: Path, notes: list[str]) -> JsonObject:
    """The object of a file, or an empty one; what is odd in it is added to the notes."""
    return read_json(path, notes) if is_there(path) else JsonObject(str(path), {}, notes)


@frozen
class _Rules:
    """What a tokenizer class of transformers 5 does, whatever tokenizer.json says."""

    name: str
    tokens: Mapping[str, str]
    """Special tokens that are declared by default."""
    normalizer: normalizers.Normalizer | None
    pre_tokenizer: pre_tokenizers.PreTokenizer


QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _class_rules(tokenizer: Tokenizer, settings: JsonObject, config: ModelConfig) -> _Rules | None:
    """The rules of the class that AutoTokenizer of transformers 5 chooses, if it has any."""
    if not isinstance(tokenizer.model, models.BPE):
        return None
    named = settings.values.get("tokenizer_class")
    name = named.removesuffix("Fast") if isinstance(named, str) else None
    if config.architecture == "Qwen2ForCausalLM":
        name = "Qwen2Tokenizer"
    elif config.architecture == "Qwen3ForCausalLM":
        name = name or "Qwen2Tokenizer"
    elif config.architecture == "MistralForCausalLM":
        return None
    prefix = settings.values.get("add_prefix_space")
    if name == "LlamaTokenizer" and not _is_byte_level(tokenizer):
        scheme = "always" if settings.values.get("legacy") else "first"
        return _Rules(
            name,
            {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
            None,
            pre_tokenizers.Metaspace(
                prepend_scheme="never" if prefix is False else scheme, split=False
            ),
        )
    if name == "GPT2Tokenizer":
        end = dict.fromkeys(("unk_token", "bos_token", "eos_token"), "<|endoftext|>")
        return _Rules(name, end, None, pre_tokenizers.ByteLevel(add_prefix_space=bool(prefix)))
    if name == "Qwen2Tokenizer":
        end = dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>")
        words = pre_tokenizers.Split(Regex(QWEN2_WORDS), behavior="isolated")
        characters = pre_tokenizers.ByteLevel(add_prefix_space=bool(prefix), use_regex=False)
        return _Rules(name, end, normalizers.NFC(), pre_tokenizers.Sequence([words, characters]))
    return None


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    return any("ByteLevel" in repr(part) for part in (tokenizer.pre_tokenizer, tokenizer.decoder))


@frozen
class _Special:
    """The special tokens that the files beside tokenizer.json declare."""

    named: Mapping[str, AddedToken]
    """By name, in the order in which new ones get their ids."""
    nameless: Sequence[AddedToken]


_STANDARD = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token",
             "mask_token")  # fmt: skip
_LISTS = ("additional_special_tokens", "extra_special_tokens")


def _special_tokens(
    directory: Path, tokenizer: Tokenizer, settings: JsonObject, rules: _Rules | None
) -> _Special:
    """The special tokens, of which special_tokens_map.json redefines some in an older directory.

    An older directory has no ``added_tokens_decoder`` in its tokenizer_config.json.
    """
    values = dict(settings.values)
    old = _LISTS[0] if not values.get(_LISTS[1]) else _LISTS[1]
    extra = [(settings, old, values.get(old))]
    origin = dict.fromkeys(values, settings)
    if "added_tokens_decoder" not in values:
        older = _optional_json(directory / "special_tokens_map.json", settings.notes)
        for key, value in older.values.items():
            values[key] = value | {"special": True} if isinstance(value, dict) else value
        origin |= dict.fromkeys(older.values, older)
        key = _LISTS[1] if _LISTS[1] in older.values or extra[0][2] else _LISTS[0]
        extra.append((older, key, older.values.get(key)))
    for key, content in rules.tokens.items() if rules else ():
        if tokenizer.token_to_id(content) is not None:
            origin.setdefault(key, settings)
            values.setdefault(key, content)
    named = {
        key: _special_token(origin[key], key, value, named=True)
        for key, value in values.items()
        if key.endswith("_token") and not key.startswith("add_") and value is not None
    }
    nameless: list[AddedToken] = []
    for source, key, value in extra:
        if isinstance(value, dict):
            named |= {k: _special_token(source, k, v, named=True) for k, v in value.items()}
        elif isinstance(value, list):
            nameless += [_special_token(source, key, v) for v in value]
    standard = {key: named[key] for key in _STANDARD if key in named}
    return _Special(standard | named, nameless)


def _special_token(where: JsonObject, key: str, value: Any, named: bool = False) -> AddedToken:
    if isinstance(value, str):
        return AddedToken(value, special=True)
    token = _added_token(where, key, value)
    token.special |= named
    return token


def _added_token(where: JsonObject, key: str, value: Any) -> AddedToken:
    flags = ("lstrip", "rstrip", "normalized", "single_word", "special")
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise where.wrong(key, "a token, an object with a 'content'", value)
    declared = JsonObject(f"{where.where}: {key[:60]}", value, where.notes)
    given = {flag: declared.boolean(flag, False) for flag in flags if flag in value}
    return AddedToken(value["content"], **given)


def _declared_tokens(
    directory: Path, tokenizer: Tokenizer, settings: JsonObject, special: _Special
) -> tuple[str, dict[int, AddedToken]]:
    """The added tokens by the ids that a file declares, and the file.

    They are those of ``added_tokens_decoder``; without it, those of added_tokens.json, and those of
    tokenizer.json, which win where both have an id.
    """
    if "added_tokens_decoder" in settings.values:
        found = settings.object("added_tokens_decoder")
        if found is None:
            return settings.where, {}
        wrong = next((k for k in found.values if not re.fullmatch("[0-9]{1,9}", k)), None)
        if wrong is not None:
            raise ModelError(f"{found.where}: expected token ids as keys, found {shown(wrong)}")
        tokens = {int(key): _added_token(found, key, value) for key, value in found.values.items()}
        return found.where, tokens
    added = _optional_json(directory / "added_tokens.json", settings.notes)
    specials = {token.content for token in (*special.named.values(), *special.nameless)}
    tokens = {
        added.integer(content, 0, minimum=0): AddedToken(
            content, special=content in specials, normalized=content not in specials
        )
        for content in added.values
    }
    return added.where, tokens | tokenizer.get_added_tokens_decoder()


def _add(
    tokenizer: Tokenizer, where: str, declared: Mapping[int, AddedToken], special: _Special
) -> tuple[str, ...]:
    """Add declared and special tokens, so that they are never split, in transformers' order.

    A new token gets the next free id: another one than where declares is a warning.
    """
    own = tokenizer.get_added_tokens_decoder()
    tokens = [token for _, token in sorted(declared.items())]
    names = {token.content for token in special.named.values()}
    for token in tokens:
        token.special |= token.content in names
    known = {token.content for token in (*own.values(), *tokens)}
    for token in (*special.named.values(), *special.nameless):
        if token.content not in known:
            known.add(token.content)
            tokens.append(token)
    tokenizer.add_tokens(tokens)
    found = {i: tokenizer.token_to_id(token.content) for i, token in declared.items()}
    others = [
        f"{shown(declared[i].content)} has id {other}, not {i}"
        for i, other in found.items()
        if other is not None and other != i
    ]
    if not others:
        return ()
    return (f"{where}: its ids are not those of the tokenizer, which are used: {listed(others)}",)


def _follow(
    tokenizer: Tokenizer, rules: _Rules, special: _Special, settings: JsonObject
) -> tuple[str, ...]:
    """Do what a class adds to tokenizer.json, and warn where it would give other ids."""
    if rules.name == "Qwen2Tokenizer":
        tokens = (*special.named.values(), *special.nameless)
        tokenizer.add_tokens([AddedToken(token.content, special=True) for token in tokens])
    kept = tokenizer.normalizer, tokenizer.pre_tokenizer
    added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    probes = [_SPLIT, f" {_SPLIT}", *(f"{token}{_SPLIT}" for token in added[:1])]
    own = [tokenizer.encode(text).ids for text in probes]
    tokenizer.normalizer, tokenizer.pre_tokenizer = rules.normalizer, rules.pre_tokenizer
    if rules.name == "LlamaTokenizer" and settings.values.get("add_prefix_space") is False:
        # Every reader of the file follows this setting, llama.cpp's converter too.
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        return ()
    same = [tokenizer.encode(text).ids for text in probes] == own
    tokenizer.normalizer, tokenizer.pre_tokenizer = kept
    if same:
        return ()
    return (
        f"{settings.where}: texts are split as tokenizer.json says; transformers 5 splits some "
        f"texts by the rules of its class {rules.name}, and gives them other token ids",
    )


def _turn_ends(
    tokenizer: Tokenizer, names: Mapping[str, str], config: ModelConfig
) -> tuple[int, ...]:
    """Ids of the tokens that end a turn in the tokenizer's settings, but not in config."""
    ends = [names[key] for key in ("eos_token", "eot_token") if key in names]
    ids = dict.fromkeys(tokenizer.token_to_id(token) for token in ends)
    return tuple(i for i in ids if i is not None and i not in config.eos_token_ids)


def _beyond(tokenizer: Tokenizer, vocab_size: int, path: Path) -> dict[str, int]:
    """The added tokens whose ids are beyond the model's vocabulary, in the order of these."""
    with refusing(f"{path}: cannot encode and decode words that are not in its vocabulary"):
        probe = tokenizer.encode(_UNLIKELY).ids
        tokenizer.decode(probe)
    added = tokenizer.get_added_tokens_decoder()
    contents = {token.content for token in added.values()}
    own = [i for t, i in tokenizer.get_vocab(False).items() if t not in contents]
    highest = max([*own, *(i for i in probe if i not in added)], default=0)
    if highest >= vocab_size:
        raise ModelError(
            f"{path}: has token ids up to {highest}, but vocab_size in config.json is "
            f"{vocab_size}: the tokenizer belongs to another model"
        )
    return {token.content: i for i, token in sorted(added.items()) if i >= vocab_size}


def _beyond_warnings(beyond: Mapping[str, int], vocab_size: int, path: Path) -> tuple[str, ...]:
    if not beyond:
        return ()
    count = f"{len(beyond)} added token{'s' if len(beyond) > 1 else ''}"
    some = listed([f"{shown(token)} ({i})" for token, i in beyond.items()])
    return (
        f"{path}: the model has no embedding for {count} with ids from {vocab_size} (vocab_size in "
        f"config.json): {some}; a prompt with such a token is refused",
    )


def _chat_templates(
    directory: Path, settings: JsonObject
) -> tuple[str | None, str | None, tuple[str, ...]]:
    """The templates named ``default`` and ``tool_use``, and warnings."""
    extra = directory / "additional_chat_templates" / "tool_use.jinja"
    tool_use = read_text(extra, settings.notes) if is_there(extra) else None
    path = directory / "chat_template.jinja"
    if is_there(path):
        return read_text(path, settings.notes), tool_use, ()
    path = directory / "chat_template.json"
    source = read_json(path, settings.notes) if is_there(path) else settings
    value = source.values.get("chat_template")
    if value is None or isinstance(value, str):
        return value, tool_use, ()
    named: dict[str, str] = {}
    entries = value if isinstance(value, list) else [value]
    for entry in entries:
        match entry:
            case {"name": str(name), "template": str(template)}:
                named[name] = template
            case _:
                source.fail("chat_template", "a string or a list of {'name', 'template'} objects")
    warnings: tuple[str, ...] = ()
    if named and "default" not in named:
        names = listed([shown(name) for name in named])
        warnings = (f"{source.where}: no chat template is named 'default', only {names}",)
    return named.get("default"), tool_use or named.get("tool_use"), warnings
