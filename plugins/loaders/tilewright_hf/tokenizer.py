"""tokenizer.json and the files around it -> TextAssets.

tokenizer.json alone defines how text becomes ids, including special tokens at the start:
``add_bos_token`` and ``add_eos_token`` of tokenizer_config.json have no effect in a directory that
has a tokenizer.json, as in transformers 5.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from tilewright.errors import ModelError, listed
from tilewright.types import ModelConfig, TextAssets
from tilewright_hf.files import JsonObject, is_there, one_line, read_json, read_text, shown

_OTHER_FORMATS = ("tokenizer.model", "tekken.json", "vocab.json", "vocab.txt")

_SUBWORD_PREFIX = re.compile(r'"continuing_subword_prefix"\s*:\s*"[^"]')

_UNLIKELY = "zqxj \U0010fffd Ω漢7"
"""Text in several scripts, with words that no vocabulary has."""


def load_text(directory: Path, config: ModelConfig) -> tuple[TextAssets, tuple[str, ...]]:
    """Tokenizer, chat template and special tokens of a directory, and warnings.

    Raises ModelError for damaged files and for ids outside the model's vocabulary.
    """
    path = directory / "tokenizer.json"
    tokenizer = _read_tokenizer(path)
    settings = _optional_json(directory / "tokenizer_config.json")
    named, nameless = _special_tokens(directory, settings)
    _add_declared(tokenizer, settings, config.vocab_size)
    warnings = _add_special(
        tokenizer, [*named.values(), *nameless], config.vocab_size, settings.where
    )
    # Saved settings of a training run would truncate or pad every prompt.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    _check_ids(tokenizer, config.vocab_size, path)
    template, tool_template, template_warnings = _chat_templates(directory, settings)
    assets = TextAssets(
        tokenizer=tokenizer,
        chat_template=template,
        tool_chat_template=tool_template,
        special_tokens={key: token.content for key, token in named.items()},
    )
    return assets, warnings + template_warnings


def _read_tokenizer(path: Path) -> Tokenizer:
    if not is_there(path):
        others = [name for name in _OTHER_FORMATS if is_there(path.parent / name)]
        if others:
            raise ModelError(
                f"{path}: no such file; {listed(others)} can be converted to it with transformers: "
                f"AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR), DIR = {path.parent}"
            )
        raise ModelError(f"{path}: no such file; expected the tokenizer of the model")
    text = read_text(path)
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


def _optional_json(path: Path) -> JsonObject:
    return read_json(path) if is_there(path) else JsonObject(str(path), {})


def _special_tokens(
    directory: Path, settings: JsonObject
) -> tuple[dict[str, AddedToken], list[AddedToken]]:
    """The special tokens with a name (``bos_token``, ...), and those without one."""
    sources = [settings]
    if "added_tokens_decoder" not in settings.values:
        sources.append(_optional_json(directory / "special_tokens_map.json"))
    named: dict[str, AddedToken] = {}
    nameless: list[AddedToken] = []
    for source in sources:
        for key, value in source.values.items():
            if key in ("additional_special_tokens", "extra_special_tokens"):
                if isinstance(value, dict):
                    named |= {k: _special_token(source, k, v) for k, v in value.items()}
                elif isinstance(value, list):
                    nameless += [_special_token(source, key, v) for v in value]
            elif key.endswith("_token") and not key.startswith("add_") and value is not None:
                named[key] = _special_token(source, key, value)
    return named, nameless


def _special_token(where: JsonObject, key: str, value: Any) -> AddedToken:
    if isinstance(value, str):
        return AddedToken(value, special=True, normalized=False)
    return _added_token(where, key, value)


def _added_token(where: JsonObject, key: str, value: Any) -> AddedToken:
    flags = ("lstrip", "rstrip", "normalized", "single_word", "special")
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise where.wrong(key, "a token, an object with a 'content'", value)
    declared = JsonObject(f"{where.where}: {key[:60]}", value)
    given = {flag: declared.boolean(flag, False) for flag in flags if flag in value}
    return AddedToken(value["content"], **given)


def _add_declared(tokenizer: Tokenizer, settings: JsonObject, vocab_size: int) -> None:
    """Add the tokens of ``added_tokens_decoder``, and check that their ids match."""
    declared = settings.object("added_tokens_decoder")
    if declared is None:
        return
    tokens: dict[int, AddedToken] = {}
    for key, value in declared.values.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < vocab_size):
            raise ModelError(
                f"{declared.where}: expected token ids below {vocab_size} (vocab_size of "
                f"config.json) as keys, found {shown(key)}"
            )
        tokens[int(key)] = _added_token(declared, key, value)
    tokenizer.add_tokens([token for _, token in sorted(tokens.items())])
    for token_id, token in tokens.items():
        found = tokenizer.token_to_id(token.content)
        if found != token_id:
            raise ModelError(
                f"{declared.where}: {shown(token.content)} is declared with id {token_id}, but "
                f"tokenizer.json gives it id {found}"
            )


def _add_special(
    tokenizer: Tokenizer, tokens: list[AddedToken], vocab_size: int, where: str
) -> tuple[str, ...]:
    """Ensure that special tokens are never split. A new one without a free id is left out."""
    warnings = []
    declared = {t.content: t for t in tokenizer.get_added_tokens_decoder().values()}
    for token in tokens:
        known = declared.get(token.content, token)
        if tokenizer.token_to_id(token.content) is None and _next_id(tokenizer) >= vocab_size:
            warnings.append(
                f"{where}: special token {shown(token.content)} is left out: tokenizer.json does "
                f"not have it, and all {vocab_size} ids of the vocabulary are taken"
            )
        elif not (known.special and token.content in declared):
            known.special = True
            tokenizer.add_special_tokens([known])
    return tuple(warnings)


def _next_id(tokenizer: Tokenizer) -> int:
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def _check_ids(tokenizer: Tokenizer, vocab_size: int, path: Path) -> None:
    with refusing(f"{path}: cannot encode and decode words that are not in its vocabulary"):
        probe = tokenizer.encode(_UNLIKELY).ids
        tokenizer.decode(probe)
    highest = max([_next_id(tokenizer) - 1, *probe])
    if highest >= vocab_size:
        raise ModelError(
            f"{path}: has token ids up to {highest}, but vocab_size in config.json is "
            f"{vocab_size}: the tokenizer belongs to another model"
        )


def _chat_templates(
    directory: Path, settings: JsonObject
) -> tuple[str | None, str | None, tuple[str, ...]]:
    """The templates named ``default`` and ``tool_use``, and warnings."""
    extra = directory / "additional_chat_templates" / "tool_use.jinja"
    tool_use = read_text(extra) if is_there(extra) else None
    path = directory / "chat_template.jinja"
    if is_there(path):
        return read_text(path), tool_use, ()
    path = directory / "chat_template.json"
    source = read_json(path) if is_there(path) else settings
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
