"""Reads untrusted files: opens them with care, and checks JSON values for type and range.

Every error is a ModelError that names the file and the key.
"""

import json
import math
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

from attrs import frozen

from tilewright.errors import ModelError, must_be, shortened
from tilewright.paths import path_of
from tilewright.values import converted, expected

_T = TypeVar("_T")

MAX_BYTES = 256 * 2**20
"""A larger file is not a configuration; reading it would only waste memory."""

MAX_INT = 2**31 - 1


def local_path(source: str, what: str, takes: str) -> Path:
    """The path that a source names. Raises ModelError when nothing is there.

    what: the expected kind, such as a model file; takes: what the loader accepts, for the message.
    """
    path = path_of(source)
    try:
        os.stat(path)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise ModelError(f"no {what} {source[:200]!r}: {why}; {takes}") from error
    return path


def is_there(path: Path) -> bool:
    """Whether a directory lists the file. Its type and readability are checked later."""
    return os.path.lexists(path)


def check_file(path: Path) -> None:
    """Raise ModelError unless path is a regular file, or a link to one."""
    if path.is_file():
        return
    if path.is_symlink() and not path.exists():
        raise ModelError(f"{path}: a link to {os.readlink(path)!r}, which does not exist")
    found = "a directory" if path.is_dir() else "a device" if path.exists() else "nothing"
    raise ModelError(f"{path}: expected a file, found {found}")


def read_text(path: Path) -> str:
    """A text file's content. Raises ModelError for anything but a readable UTF-8 file."""
    check_file(path)
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ModelError(f"{path}: expected at most {MAX_BYTES} bytes of text, found {size}")
        raw = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {one_line(error)}") from error
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ModelError(
            f"{path}: expected UTF-8 text, but the byte at offset {error.start} is not; "
            "save the file as UTF-8"
        ) from error
    if text.startswith("\ufeff"):
        raise ModelError(
            f"{path}: starts with a byte order mark; save the file as UTF-8 without it"
        )
    return text


def read_json(path: Path) -> "JsonObject":
    """The JSON object that a file holds. Raises ModelError for anything else."""
    text = read_text(path)
    try:
        values = json.loads(text, object_pairs_hook=_unique)
        if "\\ud" in text.lower():
            json.dumps(values, ensure_ascii=False).encode()  # refuses lone surrogates
    except json.JSONDecodeError as error:
        raise ModelError(
            f"{path}: not valid JSON: {error.msg} (line {error.lineno}, column {error.colno})"
        ) from error
    except RecursionError as error:
        raise ModelError(f"{path}: not valid JSON: nested too deeply") from error
    except ValueError as error:
        raise ModelError(f"{path}: not valid JSON: {one_line(error)}") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path}: expected a JSON object, found {shown(values)}")
    return JsonObject(str(path), values)


def one_line(error: BaseException) -> str:
    """An error of a library or the system as one short line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return shortened("".join(c if c.isprintable() else ascii(c)[1:-1] for c in text), 300)


def shown(value: Any) -> str:
    """A JSON value, shortened for a one-line message. Strings are quoted, numbers are not."""
    if isinstance(value, dict):
        return f"an object of {len(value)} keys"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return shortened(json.dumps(value))


@frozen
class JsonObject:
    """A JSON object of a file, with its location for error messages.

    The plain accessors give ``default`` for an absent key and refuse null; the ``optional_`` ones
    give ``default`` for an absent key and None for null.
    """

    where: str
    values: dict[str, Any]

    def fail(self, key: str, what: str) -> NoReturn:
        raise self.wrong(key, what, self.values.get(key))

    def wrong(self, key: str, what: str, found: Any) -> ModelError:
        return ModelError(f"{self.where}: {must_be(key, what, shown(found))}")

    def integer(self, key: str, default: _T, minimum: int = 1, maximum: int = MAX_INT) -> int | _T:
        if key not in self.values:
            return default
        value = _typed(self.values[key], int)
        if value is None or not minimum <= value <= maximum:
            self.fail(key, f"an integer from {minimum} to {maximum}")
        return value

    def optional_integer(
        self, key: str, default: int | None, minimum: int = 1, maximum: int = MAX_INT
    ) -> int | None:
        if key in self.values and self.values[key] is None:
            return None
        return self.integer(key, default, minimum, maximum)

    def number(
        self, key: str, default: _T, *, over: float = -math.inf, least: float = -math.inf,
        most: float = math.inf,
    ) -> float | _T:  # fmt: skip
        """A finite number > over, >= least and <= most."""
        if key not in self.values:
            return default
        value = _typed(self.values[key], float)
        if value is None or not (math.isfinite(value) and value > over and least <= value <= most):
            bounds = [
                text
                for text, bound in (
                    (f"above {over:g}", over),
                    (f"at least {least:g}", least),
                    (f"at most {most:g}", most),
                )
                if math.isfinite(bound)
            ]
            self.fail(key, f"a finite number{' ' if bounds else ''}{' and '.join(bounds)}")
        return value

    def boolean(self, key: str, default: bool) -> bool:
        value = _typed(self.values.get(key, default), bool)
        if value is None:
            self.fail(key, expected(bool))
        return value

    def string(self, key: str, default: _T) -> str | _T:
        if key not in self.values:
            return default
        value = _typed(self.values[key], str)
        if value is None:
            self.fail(key, expected(str))
        return value

    def choice(self, key: str, default: _T, choices: Collection[str]) -> str | _T:
        if key not in self.values:
            return default
        value = self.values[key]
        if not isinstance(value, str) or value not in choices:
            self.fail(key, f"one of {', '.join(choices)}")
        return value

    def strings(self, key: str) -> tuple[str, ...] | None:
        """A list of strings; None when it is absent or null."""
        if self.values.get(key) is None:
            return None
        value = _typed(self.values[key], tuple[str, ...])
        if value is None:
            self.fail(key, expected(tuple[str, ...]))
        return value

    def token_ids(self, key: str, vocab_size: int) -> tuple[int, ...] | None:
        """A token id or a list of them, without repeats; None when it is absent or null."""
        value = self.values.get(key)
        if value is None:
            return None
        items = value if isinstance(value, list) else [value]
        for item in items:
            token_id = _typed(item, int)
            if token_id is None or not 0 <= token_id < vocab_size:
                ids = f"a token id from 0 to {vocab_size - 1} or a list of them"
                raise self.wrong(key, ids, item)
        return tuple(dict.fromkeys(items))

    def object(self, key: str) -> "JsonObject | None":
        """An object inside this one; None when it is absent, null or empty."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            self.fail(key, "an object")
        return JsonObject(f"{self.where}: {key}", value) if value else None

    def without_nulls(self) -> "JsonObject":
        return JsonObject(self.where, {k: v for k, v in self.values.items() if v is not None})


def _typed(value: Any, type_: type[_T]) -> _T | None:
    """The value, checked as settings are; None if it has another type."""
    try:
        return cast(_T, converted(value, type_))
    except Exception:
        return None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice[:60]!r} appears twice in one object")
    return values
