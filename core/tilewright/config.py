"""The settings of a run, from flags, environment, a run file, a models file and defaults, in order.

A layer maps a setting's place, such as ``("runtime", "page_size")``, to its value and to where it
was given. ``resolve`` lays the layers over each other and reads the values into attrs classes.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from attrs import evolve, fields, frozen

from tilewright import registry, toml
from tilewright.errors import ConfigError, PluginError, nearest
from tilewright.options import structure
from tilewright.registry import OPTIONS_BY_NAME
from tilewright.types import GenerateConfig, RuntimeConfig, described

DEMO_MODEL = Path(__file__).parent / "demo_model"
DEMO_PROMPT = "We hold these truths to be self-evident,"

ENVIRONMENT_PREFIX = "TILEWRIGHT_"
DEFAULT = "default"

GRANTED_DEVICE = "TASK_DEVICE"
"""The variable in which a queue of a shared host says which device this process was given."""

_MOST_BYTES = 64 * 2**20
"""Of a file with settings or prompts, so that a device file ends in an error."""


@frozen
class Given:
    """A value as a user wrote it, and where."""

    value: Any
    origin: str
    """``--page-size``, ``TILEWRIGHT_RUNTIME_PAGE_SIZE``, ``run.toml:12``."""


Place = tuple[str, ...]
"""Section and key, or ``options``, kind (, name of a plugin) and option."""

Layer = Mapping[Place, Given]


@frozen
class PluginSelection:
    """Which plugins make the engine: ``name`` or ``distribution:name`` of each kind."""

    loader: str | None = described(
        "reads the model's configuration and tokenizer; default: the one that takes the model"
    )
    executor: str = described("runs the forward pass", "torch")
    kv_allocator: str = described("owns the KV cache", "paged")
    sampler: str = described("chooses tokens", "top-p")
    observers: tuple[str, ...] = described("are told of what happens", ())


@frozen
class ModelChoice:
    """The model, and what it is called in results."""

    id: str = described("the model's name in results; default: the last part of path", "")
    path: str = described(
        "a registered name, the model's directory, or what else a loader takes; default: the "
        "bundled demo model",
        str(DEMO_MODEL),
    )
    format: str | None = described("weight format; default: the one that finds its files")


@frozen
class Prompts:
    """The prompts, in text or in files, one or a list; the file ``-`` is standard input."""

    text: tuple[str, ...] = described("text to continue", ())
    file: tuple[str, ...] = described(
        "a file that holds a prompt, or with a name in .jsonl a prompt a line, as JSON", ()
    )


@frozen
class Output:
    """Where results go, and how."""

    format: Literal["text", "jsonl"] = described("text, or jsonl: a JSON object a result", "text")
    file: str | None = described("file to write, complete or not at all; default: standard output")


@frozen(kw_only=True)
class RunConfig:
    """All settings of a run."""

    plugins: PluginSelection
    options: Mapping[str, Mapping[str, Any]]
    """As ``LLMEngine.from_plugins`` takes them; the plugins read and check them."""
    model: ModelChoice
    runtime: RuntimeConfig
    generate: GenerateConfig
    prompts: Prompts
    output: Output

    def selection(self) -> dict[str, Any]:
        """The arguments of ``LLMEngine.from_plugins``."""
        return {
            "loader": self.plugins.loader,
            "executor": self.plugins.executor,
            "kv_allocator": self.plugins.kv_allocator,
            "sampler": self.plugins.sampler,
            "observers": self.plugins.observers,
            "options": self.options,
        }


SECTIONS: dict[str, type] = {
    "plugins": PluginSelection,
    "model": ModelChoice,
    "runtime": RuntimeConfig,
    "generate": GenerateConfig,
    "prompts": Prompts,
    "output": Output,
}
"""The tables of a run file but ``[options.<kind>]``."""


@frozen
class Resolved:
    """The settings, and where each was given."""

    config: RunConfig
    origins: Mapping[Place, str]
    """Of those that were given; the others are defaults."""

    def origin(self, *place: str) -> str:
        return self.origins.get(place, DEFAULT)


def resolve(
    file: str | Path | None = None,
    flags: Layer | None = None,
    environ: Mapping[str, str] | None = None,
) -> Resolved:
    """Lay flags over the environment over a run file over a models file over the defaults.

    A model that is named rather than given as a path is one of a models file (tilewright.models),
    if that has the name; then it is not a path, even where there is one.

    Reads these files and the metadata of installed plugins, and imports no plugin. Raises
    ConfigError, or PluginError for a plugin that is not installed; both begin with the place of
    the mistake.
    """
    environ = os.environ if environ is None else environ
    given: dict[Place, Given] = {}
    from_file = _file_layer(Path(file)) if file is not None else {}
    for layer in (
        from_file,
        _environment_layer(environ),
        _granted_device(environ),
        flags or {},
    ):
        _lay_over(given, layer)
    if (path := given.get(_PATH)) and (model := _named_model(path.value, environ)):
        del given[_PATH]
        over, given = given, dict(model)
        _lay_over(given, over)
    elif path and path is from_file.get(_PATH):
        given[_PATH] = located(_PATH, path, Path(file or "").parent)
    values: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    options: dict[str, dict[str, Any]] = {}
    for (section, *rest), setting in given.items():
        if section == "options":
            *tables, key = rest
            table = options
            for name in tables:
                table = table.setdefault(name, {})
            table[key] = setting.value
        else:
            values[section][rest[0]] = read_setting((section, rest[0]), setting)
    config = RunConfig(
        options=options, **{section: cls(**values[section]) for section, cls in SECTIONS.items()}
    )
    _check_plugins(config, given)
    if _TEXT not in given and _FILE not in given and config.model.path == str(DEMO_MODEL):
        config = evolve(config, prompts=Prompts(text=(DEMO_PROMPT,)))
    if not config.model.id:
        name = Path(config.model.path).absolute().name or "model"
        config = evolve(config, model=evolve(config.model, id=name))
    return Resolved(config, {place: setting.origin for place, setting in given.items()})


def keys(section: str) -> list[str]:
    """The keys of a section. Streaming is the command line's own choice, not a setting of a run."""
    return [a.name for a in fields(SECTIONS[section]) if (section, a.name) != _STREAM]


_STREAM = ("generate", "stream")
_PATH = ("model", "path")
_DEVICES = {("runtime", "device"), ("options", "executor", "device")}
_TEXT, _FILE = ("prompts", "text"), ("prompts", "file")


def _named_model(path: Any, environ: Mapping[str, str]) -> Layer | None:
    """What a models file says of a model, if it is one of its names."""
    from tilewright import models

    model = models.find(path, environ) if models.is_name(path) else None
    return model.settings if model else None


def _lay_over(given: dict[Place, Given], layer: Layer) -> None:
    if _TEXT in layer and _FILE in layer:
        raise ConfigError(
            f"{layer[_FILE].origin}: prompts are given in text already "
            f"({layer[_TEXT].origin}): give text or files, not both"
        )
    if _TEXT in layer or _FILE in layer:
        given.pop(_TEXT, None)
        given.pop(_FILE, None)
    if any(place in layer for place in _DEVICES):
        for place in _DEVICES:
            given.pop(place, None)
    given.update(layer)


def read_setting(place: Place, setting: Given) -> Any:
    """A value with the type of its setting. Raises ConfigError, which begins with its origin."""
    (section, key), value = place, setting.value
    if section == "prompts" and isinstance(value, str):
        value = [value]  # never text of a JSON list
    return getattr(structure(SECTIONS[section], {key: value}, setting.origin), key)


def _check_plugins(config: RunConfig, given: Layer) -> None:
    chosen: list[tuple[Place, str, str | None]] = [
        (("plugins", kind), kind, getattr(config.plugins, kind)) for kind in _SINGLE_KINDS
    ]
    chosen += [(("plugins", "observers"), "observer", name) for name in config.plugins.observers]
    if config.model.format is not None:
        chosen.append((("model", "format"), "weight_format", config.model.format))
    chosen += [
        (place, place[1], place[2])
        for place in given
        if place[0] == "options" and place[1] in OPTIONS_BY_NAME
    ]
    for place, kind, name in chosen:
        if place in given and name is not None:
            try:
                registry.find(kind, name)
            except PluginError as error:
                raise PluginError(f"{given[place].origin}: {error}") from error


_SINGLE_KINDS = tuple(kind for kind in registry.KINDS if kind not in OPTIONS_BY_NAME)


def _granted_device(environ: Mapping[str, str]) -> Layer:
    """Leaves the device open: the executor reads which one was granted.

    What a file or the environment says of it was written before, and to take another device than
    the granted one is to take somebody else's.
    """
    granted = environ.get(GRANTED_DEVICE)
    return {("runtime", "device"): Given(None, f"{GRANTED_DEVICE} = {granted}")} if granted else {}


# --- the environment ------------------------------------------------------------------------------


def _environment_layer(environ: Mapping[str, str]) -> Layer:
    """``TILEWRIGHT_<SECTION>_<KEY>``; an empty variable is as good as none."""
    layer: dict[Place, Given] = {}
    for name in sorted(environ):
        section, _, key = name.removeprefix(ENVIRONMENT_PREFIX).lower().partition("_")
        if not name.startswith(ENVIRONMENT_PREFIX) or not environ[name]:
            continue
        if section == "options":
            kind = next((k for k in registry.KINDS if key.startswith(f"{k}_")), None)
            if kind is None or kind in OPTIONS_BY_NAME:
                raise ConfigError(
                    f"{name}: the environment sets options of {', '.join(_SINGLE_KINDS)}, as "
                    f"{ENVIRONMENT_PREFIX}OPTIONS_EXECUTOR_<OPTION>; set others in a run file"
                )
            layer["options", kind, key.removeprefix(f"{kind}_")] = Given(environ[name], name)
        elif section in SECTIONS:
            if key not in keys(section):
                names = [f"{ENVIRONMENT_PREFIX}{section}_{k}".upper() for k in keys(section)]
                raise ConfigError(
                    f"{name}: no such setting{nearest(name, names)} "
                    f"(settings of [{section}]: {', '.join(keys(section))})"
                )
            layer[section, key] = located((section, key), Given(environ[name], name), Path())
    return layer


# --- run files ------------------------------------------------------------------------------------


def read_text(path: Path, what: str) -> str:
    """A UTF-8 file. Raises ConfigError, beginning with what, when it cannot be read as one."""
    try:
        with path.open("rb") as f:
            data = f.read(_MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{what} {str(path)!r} cannot be read: {why}") from error
    if len(data) > _MOST_BYTES:
        raise ConfigError(f"{what} {str(path)!r} is larger than {_MOST_BYTES >> 20} MiB")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{what} {str(path)!r}, line {line}: expected UTF-8, found byte "
            f"0x{data[error.start]:02x}"
        ) from error


def _file_layer(path: Path) -> Layer:
    text = read_text(path, "run file")
    document, origin = toml.parse(path, text)
    return dict(_settings(document, origin, path.parent))


def _settings(
    document: Mapping[str, Any], origin: Callable[[Place], str], folder: Path
) -> Iterator[tuple[Place, Given]]:
    for section, table in document.items():
        where = origin((section,))
        if section not in SECTIONS and section != "options":
            raise ConfigError(f"{where}: unknown section {_hint(section, None)}")
        if not isinstance(table, dict):
            raise ConfigError(f"{where}: [{section}] must be a table, found {table!r:.60}")
        if section == "options":
            yield from _options(table, origin)
            continue
        for key, value in table.items():
            place = (section, key)
            if key not in keys(section):
                raise ConfigError(f"{origin(place)}: unknown key {_hint(key, section)}")
            setting = Given(value, origin(place))
            # A model's path may be a name, so that it is seen to when all layers are there.
            yield place, setting if place == _PATH else located(place, setting, folder)


def _options(
    tables: Mapping[str, Any], origin: Callable[[Place], str]
) -> Iterator[tuple[Place, Given]]:
    for kind, table in tables.items():
        place: Place = ("options", kind)
        if kind not in registry.KINDS:
            raise ConfigError(
                f"{origin(place)}: unknown kind of plugin {kind!r}{nearest(kind, registry.KINDS)} "
                f"(kinds: {', '.join(registry.KINDS)})"
            )
        plugins: dict[Place, Any] = {place: table}
        if kind in OPTIONS_BY_NAME and isinstance(table, dict):
            plugins = {(*place, name): options for name, options in table.items()}
        for place, options in plugins.items():
            if not isinstance(options, dict):
                what = f"[{'.'.join(place)}]"
                by_name = " by plugin name" if kind in OPTIONS_BY_NAME and len(place) == 2 else ""
                raise ConfigError(
                    f"{origin(place)}: {what} must be a table{by_name}, found {options!r:.60}"
                )
            for key, value in options.items():
                yield (*place, key), Given(value, origin((*place, key)))


def _hint(name: str, section: str | None) -> str:
    """A wrong name, with the nearest right one, or the section that it belongs to."""
    home = next((s for s in SECTIONS if s != section and name in keys(s)), None)
    known = [*SECTIONS, "options"] if section is None else keys(section)
    guess = f"; it is a key of [{home}]" if home else nearest(name, known)
    within = "sections" if section is None else f"keys of [{section}]"
    return f"{name!r}{guess} ({within}: {', '.join(known)})"


def located(place: Place, setting: Given, folder: Path) -> Given:
    """With paths of this folder as paths of the working folder.

    A model's path may also be no path: a hub id, say.
    """
    value = setting.value
    if isinstance(value, list) and place == _FILE:
        value = [_in_folder(folder, item) for item in value]
    elif place in (_FILE, ("output", "file")) or (place == _PATH and _is_path(folder, value)):
        value = _in_folder(folder, value)
    return Given(value, setting.origin)


def _is_path(folder: Path, value: Any) -> bool:
    return isinstance(value, str) and (
        value.startswith((".", "/", "~")) or os.path.exists(folder / value)
    )


def _in_folder(folder: Path, value: Any) -> Any:
    if not isinstance(value, str) or value in ("", "-"):
        return value
    return str(folder / os.path.expanduser(value))
