"""Reads TOML that users write, with the lines of its keys; edits and writes TOML with tomlkit."""

import json
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tilewright.errors import ConfigError

if TYPE_CHECKING:
    from tomlkit.items import Item, Key

Place = tuple[str, ...]
"""The names of the enclosing tables, then the key."""


def parse(path: Path, text: str) -> tuple[dict[str, Any], Callable[[Place], str]]:
    """Parse a file's text. Returns the document and a function from a place to ``run.toml:12``.

    Raises ConfigError, which begins with file and line, if the TOML is invalid.
    """
    try:
        document = _loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(_syntax_error(path, text, error)) from error
    lines = key_lines(text)

    def origin(place: Place) -> str:
        return f"{path}:{lines[place]}" if place in lines else str(path)

    return document, origin


def _loads(text: str) -> dict[str, Any]:
    """Raises ValueError also for integers that Python reads, as hexadecimal, and cannot write."""
    document = tomllib.loads(text)
    repr(document)
    return document


def _syntax_error(path: Path, text: str, error: Exception) -> str:
    if isinstance(error, RecursionError):
        return f"{path}: arrays or tables are nested too deeply"
    message, _, position = str(error).rpartition(" (at ")
    number = position.removeprefix("line ").partition(",")[0]
    if not number.isdecimal():  # "end of document": point to the statement that does not end
        statements = list(_statements(text))
        # If all end, the last one contradicts the others, such as a key that is given twice.
        begins = [start for start, _, parsed in statements if parsed is None]
        begins += [start for start, _, _ in statements[-1:]]
        number = str(next(iter(begins), 1))
    return f"{path}:{number}: invalid TOML: {message or error}"


def key_lines(text: str) -> dict[Place, int]:
    """The line, counted from 1, on which each table and key of a valid document is first set."""
    found: dict[Place, int] = {}
    table: Place = ()
    for start, statement, parsed in _statements(text):
        is_header = bool(parsed) and statement.lstrip().startswith("[")
        places = [place if is_header else (*table, *place) for place in _places(parsed)]
        if is_header:
            table = places[-1]
        for place in places:
            found.setdefault(place, start)
    return found


def _statements(text: str) -> Iterator[tuple[int, str, dict[str, Any] | None]]:
    """Split a document into headers and settings. Yields line number, text and parsed text.

    tomllib reports no positions. However, each statement of a document is itself a valid document,
    so a statement is the shortest run of lines that parses. If the last one does not parse, its
    parsed text is None.
    """
    statement, start = "", 1
    tries = _MOST_TRIED
    for number, line in enumerate(text.split("\n"), 1):
        if not statement:
            start = number
        elif not any(end in line for end in ("]", "}", '"""', "'''")):
            statement += line + "\n"  # cannot end a statement that began earlier
            continue
        statement += line + "\n"
        tries -= len(statement) if start != number else 0
        if tries < 0:
            break
        try:
            parsed = _loads(statement)
        except ValueError:
            continue
        yield start, statement, parsed
        statement = ""
    if statement:
        yield start, statement, None


_MOST_TRIED = 2**20
"""Limit on the characters parsed in search of the ends of multi-line statements. Lines after that
point are not reported."""


def _places(parsed: Any) -> Iterator[Place]:
    if isinstance(parsed, dict):
        for key, value in parsed.items():
            yield (key,)
            yield from ((key, *place) for place in _places(value))


def without(text: str, name: str) -> str:
    """Remove a top-level key or table, with the comments directly above it. Returns the new text.

    Raises ValueError if tomlkit cannot parse the text or would change anything else.
    """
    import tomlkit
    from tomlkit.exceptions import TOMLKitError
    from tomlkit.items import Comment, Whitespace

    try:
        document = tomlkit.parse(text)
        if document.as_string() != text:
            raise ValueError("tomlkit would change the layout")
    except (TOMLKitError, RecursionError) as error:
        raise ValueError(f"tomlkit cannot parse it: {error}") from error
    pieces = [piece for pair in document.body for piece in (pair, *_take_tail(pair[1]))]
    kept: list[tuple[Key | None, Item]] = []
    removed = False
    for key, item in pieces:
        after_gap = not kept or isinstance(kept[-1][1], Whitespace)
        if key is not None and key.key == name:
            while kept and isinstance(kept[-1][1], Comment):
                kept.pop()
            removed = True
        elif not (removed and after_gap and isinstance(item, Whitespace)):
            kept.append((key, item))
            removed = False
    while removed and kept and isinstance(kept[-1][1], Whitespace):
        kept.pop()
    document.body[:] = kept
    left = document.as_string()
    expected = {key: value for key, value in tomllib.loads(text).items() if key != name}
    if tomllib.loads(left) != expected:
        raise ValueError(f"tomlkit cannot remove {name!r} alone")
    return left


def _take_tail(item: "Item") -> "list[tuple[Key | None, Item]]":
    """Remove and return the comments and blank lines that end a table; they precede the next."""
    from tomlkit.items import AoT, Table

    tables: list[Any] = item.body if isinstance(item, AoT) else [item]
    if not tables or not isinstance(tables[-1], Table):
        return []
    body = tables[-1].value.body
    tail: list[tuple[Key | None, Item]] = []
    while body and body[-1][0] is None:
        tail.insert(0, body.pop())
    return (_take_tail(body[-1][1]) if body else []) + tail


def setting(key: str, value: Any) -> str:
    """``key = value``."""
    return f"{written_key(key)} = {written(value)}"


def written(value: Any) -> str:
    """A value in TOML, on one line. Raises ConfigError for a type that TOML lacks."""
    import tomlkit

    # tomlkit takes quadratic time to write a string, an array or a table.
    if isinstance(value, Mapping):
        return f"{{{', '.join(setting(str(k), v) for k, v in value.items())}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(written, value))}]"
    if isinstance(value, str):
        # TOML and JSON escape the same characters, except DEL, which only TOML escapes.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    try:
        scalar: str = tomlkit.item(value).as_string()
    except ValueError as error:
        raise ConfigError(
            f"{value!r:.60} cannot be written in TOML: expected a string, a number, a boolean, "
            "a date, a list or a table"
        ) from error
    return scalar


def written_key(key: str) -> str:
    """A key in TOML, quoted if necessary."""
    import tomlkit

    return tomlkit.key(key).as_string()
