"""Reads untrusted files: opens them with care, and checks JSON values for type and range.

Every error is a ModelError that names the file and the key. What is odd, and can mean one thing
only, is read all the same, with a note that becomes one of the model's warnings.
"""

import json
import math
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

from attrs import field, frozen

from tilewright.errors import ModelError, must_be, shortened
from tilewright.paths import path_of
from tilewright.values import converted, expected

_T = TypeVar("_T")

MAX_BYTES = 256 * 2**20
"""A larger file is not a configuration; reading it would only waste memory."""

MAX_INT = 2**31 - 1

_LFS_POINTER = b"version https://git-lfs"

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_FLAGS = {"true": True, "True": True, "false": False, "False": False, 0: False, 1: True}


def local_path(source: str, what: str, takes: str) -> Path:
    """The path that a source names. Raises ModelError when nothing is there.

    what: the expected kind, such as a model file; takes: what the loader accepts, for the message.
    """
    path = path_of(source)
    try:
        os.stat(source and path)  # the path of "" is the working folder
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


def not_downloaded(start: bytes) -> str | None:
    """What stands in place of a file with these first bytes, and what to do; None: nothing."""
    if start.startswith(_LFS_POINTER):
        return "a Git LFS pointer instead of the file; run `git lfs pull` there"
    if re.match(rb"\s*<(!doctype|html)\b", start, re.IGNORECASE):
        return "a web page instead of the file; download it again"
    return None


def read_text(path: Path, notes: list[str] | None = None) -> str:
    """A text file's content, without a byte order mark, which is added to the notes.

    Raises ModelError for anything but a readable UTF-8 file.
    """
    check_file(path)
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ModelError(f"{path}: expected at most {MAX_BYTES} bytes of text, found {size}")
        raw = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {one_line(error)}") from error
    if why := not_downloaded(raw[:200]):
        raise ModelError(f"{path}: {why}")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ModelError(
            f"{path}: expected UTF-8 text, but the byte at offset {error.start} is not; "
            "save the file as UTF-8"
        ) from error
    if text.startswith("\ufeff") and notes is not None:
        notes.append(f"{path}: starts with a byte order mark, which is ignored")
    return text.removeprefix("\ufeff")


def read_json(path: Path) -> "JsonObject":
    """The JSON object that a file holds. Raises ModelError for anything else."""
    notes: list[str] = []
    text = read_text(path, notes)
    if not text.strip():
        raise ModelError(f"{path}: an empty file, expected a JSON object; download it again")

    def last_of_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            _add(notes, f"{path}: the key {shown(twice)} is repeated in one object; its last value "
                 f"is used, {shown(values[twice])}")  # fmt: skip
        return values

    try:
        values = json.loads(text, object_pairs_hook=last_of_each)
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
    return JsonObject(str(path), values, notes)


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

    The accessors give ``default`` for an absent key. For null the ``optional_`` ones give None, and
    the others ``default`` with a note, unless it is None: they refuse null then. A number or a flag
    as text, 32.0 for an integer, and 0 or 1 for a flag are read with a note, unless ``typed``.
    """

    where: str
    values: dict[str, Any]
    notes: list[str] = field(factory=list, eq=False)
    """What was odd, one line each; shared with the objects inside this one."""
    typed: bool = False
    """Whether the file states each value's type: one of another type is refused then."""

    def note(self, key: str, what: str) -> None:
        """what: what is done, such as ``4.0 is used``."""
        _add(self.notes, f"{self.where}: {key!r} is {shown(self.values.get(key))}; {what}")

    def fail(self, key: str, what: str) -> NoReturn:
        raise self.wrong(key, what, self.values.get(key))

    def wrong(self, key: str, what: str, found: Any) -> ModelError:
        return ModelError(f"{self.where}: {must_be(key, what, shown(found))}")

    def integer(self, key: str, default: _T, minimum: int = 1, maximum: int = MAX_INT) -> int | _T:
        if self._absent(key, default):
            return default
        value = self._read(key, int)
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
        if self._absent(key, default):
            return default
        value = self._read(key, float)
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
        if self._absent(key, default):
            return default
        value = self._read(key, bool)
        if value is None:
            self.fail(key, expected(bool))
        return value

    def string(self, key: str, default: _T) -> str | _T:
        if self._absent(key, default):
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
        """A token id or a list of them, without repeats; None when it is absent or null.

        Ids outside the vocabulary, which no text has, are left out with a note.
        """
        value = self.values.get(key)
        if value is None:
            return None
        found: dict[int, None] = {}
        for item in value if isinstance(value, list) else [value]:
            token_id = self._meaning(item, int)
            if token_id is None:
                ids = f"a token id from 0 to {vocab_size - 1} or a list of them"
                raise self.wrong(key, ids, item)
            if 0 <= token_id < vocab_size:
                found[token_id] = None
            else:
                self.note(
                    key,
                    f"token id {shown(token_id)} is outside the vocabulary (0 to {vocab_size - 1}) "
                    "and is ignored",
                )
        return tuple(found)

    def token_id(self, key: str, default: int | None, vocab_size: int) -> int | None:
        """A token id, or a list of one; None when it is null or, with a note, outside the
        vocabulary."""
        if key not in self.values:
            return default
        value = self.values[key]
        if isinstance(value, list) and len(value) != 1:
            self.fail(key, f"a token id from 0 to {vocab_size - 1}")
        ids = self.token_ids(key, vocab_size) or (None,)
        if isinstance(value, list):
            self.note(key, f"its only item is used, {shown(value[0])}")
        return ids[0]

    def object(self, key: str) -> "JsonObject | None":
        """An object inside this one; None when it is absent, null or empty."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            self.fail(key, "an object")
        return JsonObject(f"{self.where}: {key}", value, self.notes, self.typed) if value else None

    def without_nulls(self) -> "JsonObject":
        given = {k: v for k, v in self.values.items() if v is not None}
        return JsonObject(self.where, given, self.notes, self.typed)

    def _absent(self, key: str, default: Any) -> bool:
        if key not in self.values:
            return True
        if self.values[key] is None and default is not None:
            self.note(key, f"the default is used, {shown(default)}")
            return True
        return False

    def _read(self, key: str, type_: type[_T]) -> _T | None:
        """A number or flag; None if the value is neither one nor states one."""
        value = self.values[key]
        found = self._meaning(value, type_)
        if found is not None and _typed(value, type_) is None:
            self.note(key, f"{shown(found)} is used")
        return found

    def _meaning(self, value: Any, type_: type[_T]) -> _T | None:
        found = _typed(value, type_)
        return _meant(value, type_) if found is None and not self.typed else found


def _typed(value: Any, type_: type[_T]) -> _T | None:
    """The value, checked as settings are; None if it has another type."""
    try:
        return cast(_T, converted(value, type_))
    except Exception:
        return None


def _meant(value: Any, type_: type[_T]) -> _T | None:
    """The number or flag that a value of another type states; None if it states none."""
    meant: Any = None
    if type_ is bool:
        meant = _FLAGS.get(value) if isinstance(value, int | str) else None
    elif isinstance(value, float) or (isinstance(value, str) and _NUMBER.fullmatch(value)):
        meant = float(value)
        if type_ is int:
            meant = int(meant) if meant.is_integer() else None
    return cast(_T | None, meant)


def _add(notes: list[str], note: str) -> None:
    """Values are read more than once; each note is kept once."""
    if note not in notes:
        notes.append(note)
