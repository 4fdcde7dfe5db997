"""Models by name: files that define where a model comes from and how it is run.

A file has one table per model::

    [qwen3-14b]
    source = "Qwen/Qwen3-14B"
    revision = "40c0698"

    [qwen3-14b.runtime]
    weight_dtype = "bfloat16"

``tilewright.config.resolve`` looks up models here that are given by name, not as a path.
"""

import fcntl
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from attrs import frozen

from tilewright import toml
from tilewright.errors import ConfigError, nearest, quoted, shortened
from tilewright.paths import home, no_home, path_of
from tilewright.settings import Given, Place, keys, located, read_setting, read_text
from tilewright.types import GenerateConfig, RuntimeConfig
from tilewright.values import shown

VARIABLE = "TILEWRIGHT_MODELS"
"""Environment variable with the path of a models file. If set, no other models file is read."""

PROJECT_FILE = Path("tilewright-models.toml")
"""The models file of the working folder. Its entries override those of the user's file."""

_NAME = re.compile(r"\w[\w.:+-]*", re.ASCII)
_EXPECTED_NAME = (
    "expected a letter, a digit or '_', then letters, digits, '_', '-', '.', ':' or '+' "
    "(a path or a hub id with a '/' is not a name)"
)

_PLACES: dict[str, Place] = {
    "source": ("model", "path"),
    "format": ("model", "format"),
    "loader": ("plugins", "loader"),
    "revision": ("options", "loader", "revision"),
}
_KEYS_OF = {place: key for key, place in _PLACES.items()}
_TABLES: dict[str, Place] = {
    "options": ("options", "loader"),
    "runtime": ("runtime",),
    "generate": ("generate",),
}
KEYS = (*_PLACES, *_TABLES)
"""Keys of a model's table. The last three are tables: options of the loader, and settings of the
sections ``[runtime]`` and ``[generate]``."""


@frozen
class RegisteredModel:
    """A model as defined in a models file."""

    name: str
    origin: str
    """File and line, such as ``models.toml:12``."""
    settings: Mapping[Place, Given]
    """Settings by place. A source that is a path is relative to the working folder."""

    def entry(self) -> Iterator[tuple[str, str, Any, str]]:
        """Yield subtable (or ""), key, value and origin of each setting."""
        for place, given in self.settings.items():
            if place in _KEYS_OF:
                yield "", _KEYS_OF[place], given.value, given.origin
            elif place[0] in _TABLES:
                yield place[0], place[-1], given.value, given.origin

    @property
    def source(self) -> str:
        return str(self.settings["model", "path"].value)

    @property
    def loader(self) -> str | None:
        return self._value("plugins", "loader")

    @property
    def format(self) -> str | None:
        return self._value("model", "format")

    @property
    def options(self) -> dict[str, Any]:
        """The loader's options, including the revision."""
        return {place[-1]: given.value for place, given in self._under("options")}

    @property
    def runtime(self) -> RuntimeConfig:
        return RuntimeConfig(**self._section("runtime"))

    @property
    def generate(self) -> GenerateConfig:
        return GenerateConfig(**self._section("generate"))

    def _value(self, *place: str) -> str | None:
        given = self.settings.get(place)
        return None if given is None else read_setting(place, given)

    def _under(self, section: str) -> Iterator[tuple[Place, Given]]:
        return ((place, given) for place, given in self.settings.items() if place[0] == section)

    def _section(self, section: str) -> dict[str, Any]:
        return {place[1]: read_setting(place, given) for place, given in self._under(section)}


def is_name(text: object) -> bool:
    """Whether text is a valid model name: a single word, not a path with a folder or a hub id."""
    return isinstance(text, str) and _NAME.fullmatch(text) is not None


def find(name: str, environ: Mapping[str, str] | None = None) -> RegisteredModel | None:
    """Look up a model by name. Raises ConfigError, which begins with file and line."""
    return registered(environ).get(name)


def registered(environ: Mapping[str, str] | None = None) -> dict[str, RegisteredModel]:
    """All defined models by name, sorted. Raises ConfigError, which begins with file and line."""
    models: dict[str, RegisteredModel] = {}
    if only := _only_file(environ):
        return dict(sorted(_parsed(only, read_text(only, f"{VARIABLE}: models file")).items()))
    for file in reversed(files(environ)):
        if os.path.exists(file):  # False too where the folder cannot be read
            models |= read(file)
    return dict(sorted(models.items()))


def files(environ: Mapping[str, str] | None = None) -> list[Path]:
    """The models files that are read if they exist, highest precedence first."""
    if only := _only_file(environ):
        return [only]
    own = _user_file(environ)
    return [PROJECT_FILE, own] if own else [PROJECT_FILE]


def user_file(environ: Mapping[str, str] | None = None) -> Path:
    """The user's models file, in the XDG configuration folder.

    Raises ConfigError where there is no such folder, since the home directory is not known.
    """
    if file := _user_file(environ):
        return file
    raise ConfigError(
        f"you have no models file of your own: {no_home()}: set HOME or XDG_CONFIG_HOME, set "
        f"{VARIABLE} to a file, or use --project"
    )


def _user_file(environ: Mapping[str, str] | None) -> Path | None:
    folder = (os.environ if environ is None else environ).get("XDG_CONFIG_HOME", "")
    if os.path.isabs(folder):
        return Path(folder) / "tilewright" / "models.toml"
    at = home()
    return at and at / ".config" / "tilewright" / "models.toml"


def _only_file(environ: Mapping[str, str] | None) -> Path | None:
    named = (os.environ if environ is None else environ).get(VARIABLE)
    return path_of(named) if named else None


def read(file: Path) -> dict[str, RegisteredModel]:
    """Read the models of a file. Raises ConfigError, which begins with file and line."""
    return _parsed(file, read_text(file, "models file"))


def add(name: str, entry: Mapping[str, Any], file: Path) -> RegisteredModel:
    """Append a model to a file, which is created if needed. entry: the model's table, see KEYS.

    A source that is a path is relative to the working folder; it is converted to a path that is
    valid from the file's folder. Raises ConfigError if the file defines the name or the entry is
    invalid.
    """
    if not is_name(name):
        raise ConfigError(f"invalid model name {quoted(name)}: {_EXPECTED_NAME}")
    values = {key: value for key, value in entry.items() if value not in (None, {})}
    if isinstance(source := values.get("source"), str):
        values["source"] = _from_folder(source, file.parent)
    _parsed(file, block := _block(name, values))
    with _alone(file, make_folder=True):
        text = read_text(file, "models file") if file.exists() else ""
        if name in (known := _parsed(file, text)):
            raise ConfigError(
                f"{known[name].origin}: model {quoted(name)} is already defined; run "
                f"`tilewright models remove {name}` first"
            )
        lead = "" if not text else "\n" if text.endswith("\n") else "\n\n"
        made = _parsed(file, text + lead + block)[name]
        _write(file, text + lead + block)
    return made


def remove(name: str, file: Path) -> None:
    """Remove a model from a file, with the comments directly above it.

    Raises ConfigError if the file does not define the name, or cannot be read or written.
    """
    with _alone(file):
        text = read_text(file, "models file")
        document, origin = toml.parse(file, text)
        if name not in document:
            raise ConfigError(
                f"{file}: no model is named {quoted(name)}{nearest(name, document)} "
                f"(defined: {shortened(', '.join(document) or 'none', 300)})"
            )
        try:
            left = toml.without(text, name)
        except ValueError as error:
            raise ConfigError(
                f"{origin((name,))}: {quoted(name)} cannot be removed without changing the rest of "
                "the file: edit it by hand"
            ) from error
        _write(file, left)


# --- reading --------------------------------------------------------------------------------------


def _parsed(file: Path, text: str) -> dict[str, RegisteredModel]:
    document, origin = toml.parse(file, text)
    models = {}
    for name, table in document.items():
        where = origin((name,))
        if not is_name(name):
            raise ConfigError(f"{where}: invalid model name {quoted(name)}: {_EXPECTED_NAME}")
        if not isinstance(table, dict):
            raise ConfigError(f"{where}: [{shortened(name)}] must be a table, found {shown(table)}")
        if not isinstance(table.get("source"), str) or not table["source"]:
            raise ConfigError(
                f"{where}: model {quoted(name)} needs a source: a directory, a file or a hub id, "
                "as a string"
            )
        settings: dict[Place, Given] = {("model", "id"): Given(name, where)}
        for place, given in _settings(name, table, origin):
            if place in settings:
                raise ConfigError(
                    f"{given.origin}: revision is given twice, also in {settings[place].origin}"
                )
            if place[0] != "options":
                read_setting(place, given)
            settings[place] = located(place, given, file.parent)
        models[name] = RegisteredModel(name, where, settings)
    return models


def _settings(
    name: str, table: Mapping[str, Any], origin: Callable[[Place], str]
) -> Iterator[tuple[Place, Given]]:
    for key, value in table.items():
        where = origin((name, key))
        if key in _PLACES:
            yield _PLACES[key], Given(value, where)
            continue
        if key not in _TABLES:
            raise ConfigError(
                f"{where}: unknown key {quoted(key)}{nearest(key, KEYS)} (keys of a model: "
                f"{', '.join(KEYS)})"
            )
        if not isinstance(value, dict):
            raise ConfigError(f"{where}: {key} must be a table, found {shown(value)}")
        for inner, setting in value.items():
            where = origin((name, key, inner))
            if key != "options" and inner not in keys(key):
                raise ConfigError(
                    f"{where}: unknown key {quoted(inner)}{nearest(inner, keys(key))} "
                    f"(keys of {key}: {', '.join(keys(key))})"
                )
            yield (*_TABLES[key], inner), Given(setting, where)


# --- writing --------------------------------------------------------------------------------------


def _from_folder(source: str, folder: Path) -> str:
    """Make a path of the working folder valid from another folder; keep hub ids and ``~``."""
    if source.startswith("~") or not (source.startswith(".") or os.path.exists(source)):
        return source
    path, home = os.path.abspath(source), os.path.abspath(folder)
    inside = os.path.commonpath([path, home]) == home
    return f"./{os.path.relpath(path, home)}" if inside else path


def _block(name: str, entry: Mapping[str, Any]) -> str:
    tables = {key: value for key, value in entry.items() if isinstance(value, Mapping)}
    lines = [f"[{toml.written_key(name)}]"]
    lines += [toml.setting(key, value) for key, value in entry.items() if key not in tables]
    for key, table in tables.items():
        lines += ["", f"[{toml.written_key(name)}.{toml.written_key(key)}]"]
        lines += [toml.setting(inner, value) for inner, value in table.items()]
    return "\n".join(lines) + "\n"


@contextmanager
def _alone(file: Path, make_folder: bool = False) -> Iterator[None]:
    """Hold a lock on the file's folder, so that no other process writes the file meanwhile."""
    target = Path(os.path.realpath(file))
    if target.exists() and not (target.is_file() or target.is_dir()):
        raise ConfigError(f"models file {str(file)!r}: expected a file, found a device or a pipe")
    try:
        if make_folder:
            target.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(target.parent, os.O_RDONLY)
    except OSError as error:
        raise _unwritable(file, error) from error
    try:
        with suppress(OSError):  # a file system may not support locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _write(file: Path, text: str) -> None:
    """Replace a file atomically: write a temporary file beside it, then rename. Follows links."""
    target = Path(os.path.realpath(file))
    beside = target.with_name(f"{target.name}.{os.getpid()}.unfinished")
    try:
        try:
            beside.write_text(text, encoding="utf-8")
            if target.exists():
                beside.chmod(target.stat().st_mode & 0o777)
            beside.replace(target)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(file, error) from error


def _unwritable(file: Path, error: OSError) -> ConfigError:
    own = (
        f": set HOME or XDG_CONFIG_HOME to a folder that can be written, set {VARIABLE} to a file, "
        "or use --project"
    )
    return ConfigError(
        f"models file {str(file)!r} cannot be written: {error.strerror}"
        f"{own if file == _user_file(None) else ''}"
    )
