"""tokenizer.json and the files around it -> TextAssets.

tokenizer.json alone says how text becomes ids, special tokens at the start included:
``add_bos_token`` and ``add_eos_token`` of tokenizer_config.json have no effect on a directory that
has a tokenizer.json, as in transformers 5.
"""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from tilewright.errors import ModelError, listed
from tilewright.types import ModelConfig, TextAssets
from tilewright_hf.json_file import JsonObject, one_line, read_json, read_text, shown

_OTHER_FORMATS = ("tokenizer.model", "tekken.json", "vocab.json", "vocab.txt")


def load_text(directory: Path, config: ModelConfig) -> tuple[TextAssets, tuple[str, ...]]:
    """Tokenizer, chat template and special tokens of a directory, and warnings.

    Raises ModelError for damaged files and for ids outside the model's vocabulary.
    """
    path = directory / "tokenizer.json"
    tokenizer = _read_tokenizer(path)
    settings = _optional_json(directory / "tokenizer_config.json")
    special_tokens = _special_tokens(directory, settings)
    _add_declared(tokenizer, settings, config.vocab_size)
    warnings = _add_special(tokenizer, special_tokens, config.vocab_size, settings.where)
    # Saved settings of a training run: they would cut or pad every prompt.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    _check_ids(tokenizer, config.vocab_size, path)
    template, template_warnings = _chat_template(directory, settings)
    assets = TextAssets(
        tokenizer=tokenizer,
        chat_template=template,
        special_tokens={key: token.content for key, token in special_tokens.items()},
    )
    return assets, warnings + template_warnings


def _read_tokenizer(path: Path) -> Tokenizer:
    if not path.exists():
        others = [name for name in _OTHER_FORMATS if (path.parent / name).exists()]
        if others:
            raise ModelError(
                f"{path}: no such file; {listed(others)} can be converted to it with transformers: "
                f"AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR), DIR = {path.parent}"
            )
        raise ModelError(f"{path}: no such file; expected the tokenizer of the model there")
    text = read_text(path)
    try:
        return Tokenizer.from_str(text)
    except Exception as error:
        raise ModelError(
            f"{path}: the tokenizers library cannot read it: {one_line(error)}"
        ) from error


def _optional_json(path: Path) -> JsonObject:
    return read_json(path) if path.exists() else JsonObject(str(path), {})


def _special_tokens(directory: Path, settings: JsonObject) -> dict[str, AddedToken]:
    """The tokens that have a name (``bos_token``, ...), with the flags they are declared with."""
    sources = [settings]
    if "added_tokens_decoder" not in settings.values:
        sources.append(_optional_json(directory / "special_tokens_map.json"))
    named: dict[str, AddedToken] = {}
    for source in sources:
        for key, value in source.values.items():
            if not key.endswith("_token") or isinstance(value, bool) or value is None:
                continue
            if isinstance(value, str):
                named[key] = AddedToken(value, special=True, normalized=False)
            elif isinstance(value, dict):
                named[key] = _added_token(source, key, value | {"special": True})
            else:
                source.fail(key, "a string or an object with 'content'")
    return named


def _added_token(where: JsonObject, key: str, value: Any) -> AddedToken:
    flags = ("lstrip", "rstrip", "normalized", "single_word", "special")
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise ModelError(
            f"{where.where}: {key[:60]!r} must be an object with a string 'content', found "
            f"{shown(value)}"
        )
    declared = JsonObject(f"{where.where}: {key[:60]}", value)
    given = {flag: declared.boolean(flag, False) for flag in flags if flag in value}
    return AddedToken(value["content"], **given)


def _add_declared(tokenizer: Tokenizer, settings: JsonObject, vocab_size: int) -> None:
    """Add the tokens of ``added_tokens_decoder``, and see that their ids are the declared ones."""
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
    for token_id, token in sorted(tokens.items()):
        tokenizer.add_tokens([token])
        found = tokenizer.token_to_id(token.content)
        if found != token_id:
            raise ModelError(
                f"{declared.where}: {shown(token.content)} is declared with id {token_id}, but "
                f"tokenizer.json gives it id {found}"
            )


def _add_special(
    tokenizer: Tokenizer, named: dict[str, AddedToken], vocab_size: int, where: str
) -> tuple[str, ...]:
    """See that named tokens are never split. One that is new and has no room is left out."""
    warnings = []
    for key, token in named.items():
        if tokenizer.token_to_id(token.content) is None and _next_id(tokenizer) >= vocab_size:
            warnings.append(
                f"{where}: {key!r} {shown(token.content)} is left out: tokenizer.json does not "
                f"have it and the vocabulary of {vocab_size} is full"
            )
        else:
            tokenizer.add_special_tokens([token])
    return tuple(warnings)


def _next_id(tokenizer: Tokenizer) -> int:
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def _check_ids(tokenizer: Tokenizer, vocab_size: int, path: Path) -> None:
    size = _next_id(tokenizer)
    if size == 0:
        raise ModelError(f"{path}: has no tokens")
    highest = max([size - 1, *tokenizer.encode("").ids])
    if highest >= vocab_size:
        raise ModelError(
            f"{path}: has token ids up to {highest}, but vocab_size in config.json is "
            f"{vocab_size}: the tokenizer belongs to another model"
        )


def _chat_template(directory: Path, settings: JsonObject) -> tuple[str | None, tuple[str, ...]]:
    path = directory / "chat_template.jinja"
    if path.exists():
        return read_text(path), ()
    path = directory / "chat_template.json"
    source = read_json(path) if path.exists() else settings
    value = source.values.get("chat_template")
    if value is None or isinstance(value, str):
        return value, ()
    named: dict[str, str] = {}
    entries = value if isinstance(value, list) else [value]
    for entry in entries:
        match entry:
            case {"name": str(name), "template": str(template)}:
                named[name] = template
            case _:
                source.fail("chat_template", "a string or a list of {'name', 'template'} objects")
    if named and "default" not in named:
        names = listed([shown(name) for name in named])
        return None, (f"{source.where}: no chat template is named 'default', only {names}",)
    return named.get("default"), ()
