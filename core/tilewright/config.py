"""The settings of a run, from flags, environment, a run file, a models file and defaults, in order.

A layer maps a setting's place, such as ``("runtime", "page_size")``, to its value and to where it
was given. ``resolve`` merges the layers and reads the values into attrs classes.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from attrs import evolve, field, frozen

from tilewright import models, plugins, toml
from tilewright.errors import ConfigError, PluginError, nearest, quoted, shortened
from tilewright.paths import path_of
from tilewright.plugins import ENGINE_KINDS
from tilewright.settings import (
    DEMO_MODEL,
    DEMO_PROMPT,
    FILE,
    PATH,
    SECTIONS,
    TEXT,
    Given,
    Layer,
    Place,
    RunConfig,
    keys,
    located,
    read_setting,
    read_text,
)
from tilewright.values import shown

ENVIRONMENT_PREFIX = "TILEWRIGHT_"
DEFAULT = "default"


@frozen
class Resolved:
    """The settings, and where each was given."""

    config: RunConfig
    origins: Mapping[Place, str]
    """Origins of the settings that were given; the others are defaults."""
    own: Mapping[str, Any] = field(factory=dict)
    """Settings of the command's own sections, by section."""

    def origin(self, *place: str) -> str:
        return self.origins.get(place, DEFAULT)


def resolve(
    file: str | Path | None = None,
    flags: Layer | None = None,
    environ: Mapping[str, str] | None = None,
    own: Mapping[str, type] | None = None,
) -> Resolved:
    """Merge the layers. Precedence: flags, environment, run file, models file, defaults.

    own: sections that the calling command adds to ``SECTIONS``, each with its attrs class. A run
    file may also have sections with the names of other commands, which are not read.

    A model given by name is taken from a models file (tilewright.models) if that defines the
    name, even if a path of that name exists.

    Reads these files and the metadata of installed plugins; imports no plugin. Raises ConfigError,
    or PluginError for a plugin that is not installed; both begin with the location of the error.
    """
    environ = os.environ if environ is None else environ
    sections = {**SECTIONS, **(own or {})}
    given: dict[Place, Given] = {}
    from_file = _file_layer(Path(file), sections) if file is not None else {}
    for layer in (
        from_file,
        _environment_layer(environ, sections),
        _granted_device(environ),
        flags or {},
    ):
        _lay_over(given, layer)
    if (path := given.get(PATH)) and (model := _named_model(path.value, environ)):
        del given[PATH]
        over, given = given, dict(model)
        _lay_over(given, over)
    elif path and path is from_file.get(PATH):
        given[PATH] = located(PATH, path, Path(file or "").parent)
    values: dict[str, dict[str, Any]] = {section: {} for section in sections}
    options: dict[str, dict[str, Any]] = {}
    for (section, *rest), setting in given.items():
        if section == "options":
            *tables, key = rest
            table = options
            for name in tables:
                table = table.setdefault(name, {})
            table[key] = setting.value
        else:
            values[section][rest[0]] = read_setting((section, rest[0]), setting, sections)
    made = {name: _made(name, cls, values[name], given) for name, cls in sections.items()}
    config = RunConfig(options=options, **{section: made.pop(section) for section in SECTIONS})
    _check_plugins(config, given)
    if TEXT not in given and FILE not in given and config.model.path == str(DEMO_MODEL):
        config = evolve(config, prompts=evolve(config.prompts, text=(DEMO_PROMPT,)))
    if not config.model.id:
        name = Path(config.model.path).absolute().name or "model"
        config = evolve(config, model=evolve(config.model, id=name))
    return Resolved(config, {place: setting.origin for place, setting in given.items()}, made)


def _made(section: str, cls: type, values: Mapping[str, Any], given: Layer) -> Any:
    """The settings of a section, each of which is valid by itself.

    Raises ConfigError, which begins with an origin, for settings that contradict each other.
    """
    try:
        return cls(**values)
    except ConfigError as error:
        origins = {key: given[section, key].origin for key in values}
        named = [origin for key, origin in origins.items() if str(error).startswith(f"{key!r} ")]
        raise ConfigError(f"{', '.join(named)}: {error}" if named else str(error)) from error


_DEVICES = {("runtime", "device"), ("options", "executor", "device")}


def _named_model(path: Any, environ: Mapping[str, str]) -> Layer | None:
    """The settings that a models file has for a model; None if path is not one of its names."""
    model = models.find(path, environ) if models.is_name(path) else None
    return model.settings if model else None


def _lay_over(given: dict[Place, Given], layer: Layer) -> None:
    if TEXT in layer and FILE in layer:
        raise ConfigError(
            f"{layer[FILE].origin}: prompts are already given as text "
            f"({layer[TEXT].origin}): give text or files, not both"
        )
    if TEXT in layer or FILE in layer:
        given.pop(TEXT, None)
        given.pop(FILE, None)
    if any(place in layer for place in _DEVICES):
        for place in _DEVICES:
            given.pop(place, None)
    given.update(layer)


def _check_plugins(config: RunConfig, given: Layer) -> None:
    chosen: list[tuple[Place, str, str | None]] = [
        (("plugins", kind), kind, getattr(config.plugins, kind)) for kind in _SINGLE_KINDS
    ]
    chosen += [(("plugins", "observers"), "observer", name) for name in config.plugins.observers]
    chosen += [
        (("generate", "logits_processors"), "logits_processor", name)
        for name in config.generate.logits_processors or ()
    ]
    if config.model.format is not None:
        chosen.append((("model", "format"), "weight_format", config.model.format))
    chosen += [
        (place, place[1], place[2])
        for place in given
        if place[0] == "options" and ENGINE_KINDS[place[1]].several
    ]
    for place, kind, name in chosen:
        if place in given and name is not None:
            try:
                plugins.find(kind, name)
            except PluginError as error:
                raise PluginError(f"{given[place].origin}: {error}") from error


_SINGLE_KINDS = tuple(name for name, kind in ENGINE_KINDS.items() if not kind.several)


def _granted_device(environ: Mapping[str, str]) -> Layer:
    """Leave the device unset: the executor reads which one was granted.

    A device in a file or the environment was set before the grant, and any other device belongs to
    another process.
    """
    for variable in plugins.entry_points({plugins.DEVICE_VARIABLES}):
        if granted := environ.get(variable.name):
            return {("runtime", "device"): Given(None, f"{variable.name} = {granted}")}
    return {}


# --- the environment ------------------------------------------------------------------------------


def _environment_layer(environ: Mapping[str, str], sections: Mapping[str, type]) -> Layer:
    """Settings from ``TILEWRIGHT_<SECTION>_<KEY>``; empty variables are ignored."""
    layer: dict[Place, Given] = {}
    for name in sorted(environ):
        section, _, key = name.removeprefix(ENVIRONMENT_PREFIX).lower().partition("_")
        if not name.startswith(ENVIRONMENT_PREFIX) or not environ[name]:
            continue
        if section == "options":
            kind = next((k for k in ENGINE_KINDS if key.startswith(f"{k}_")), None)
            if kind not in _SINGLE_KINDS:
                raise ConfigError(
                    f"{name}: expected an option of {', '.join(_SINGLE_KINDS)}, such as "
                    f"{ENVIRONMENT_PREFIX}OPTIONS_EXECUTOR_<OPTION>; set others in a run file"
                )
            layer["options", kind, key.removeprefix(f"{kind}_")] = Given(environ[name], name)
        elif section in sections:
            known = keys(section, sections)
            if key not in known:
                names = [f"{ENVIRONMENT_PREFIX}{section}_{k}".upper() for k in known]
                raise ConfigError(
                    f"{name}: no such setting{nearest(name, names)} "
                    f"(settings of [{section}]: {', '.join(known)})"
                )
            layer[section, key] = located((section, key), Given(environ[name], name), Path())
    return layer


# --- run files ------------------------------------------------------------------------------------


def _file_layer(path: Path, sections: Mapping[str, type]) -> Layer:
    text = read_text(path_of(path), "run file")
    document, origin = toml.parse(path, text)
    return dict(_settings(document, origin, path.parent, sections))


def _settings(
    document: Mapping[str, Any],
    origin: Callable[[Place], str],
    folder: Path,
    sections: Mapping[str, type],
) -> Iterator[tuple[Place, Given]]:
    for section, table in document.items():
        where = origin((section,))
        if section not in sections and section != "options":
            if section in {plugin.name for plugin in plugins.installed("command")}:
                continue  # settings of that command
            raise ConfigError(f"{where}: unknown section {_hint(section, None, sections)}")
        if not isinstance(table, dict):
            raise ConfigError(f"{where}: [{section}] must be a table, found {shown(table)}")
        if section == "options":
            yield from _options(table, origin)
            continue
        for key, value in table.items():
            place = (section, key)
            if key not in keys(section, sections):
                raise ConfigError(f"{origin(place)}: unknown key {_hint(key, section, sections)}")
            setting = Given(value, origin(place))
            # A model's path may be a name, so it is resolved once all layers are known.
            yield place, setting if place == PATH else located(place, setting, folder)


def _options(
    by_kind: Mapping[str, Any], origin: Callable[[Place], str]
) -> Iterator[tuple[Place, Given]]:
    for kind, table in by_kind.items():
        place: Place = ("options", kind)
        if kind not in ENGINE_KINDS:
            raise ConfigError(
                f"{origin(place)}: unknown kind of plugin {quoted(kind)}"
                f"{nearest(kind, ENGINE_KINDS)} (kinds: {', '.join(ENGINE_KINDS)})"
            )
        tables: dict[Place, Any] = {place: table}
        if ENGINE_KINDS[kind].several and isinstance(table, dict):
            tables = {(*place, name): options for name, options in table.items()}
        for place, options in tables.items():
            if not isinstance(options, dict):
                what = f"[{shortened('.'.join(place))}]"
                by_name = (
                    " by plugin name" if ENGINE_KINDS[kind].several and len(place) == 2 else ""
                )
                raise ConfigError(
                    f"{origin(place)}: {what} must be a table{by_name}, found {shown(options)}"
                )
            for key, value in options.items():
                yield (*place, key), Given(value, origin((*place, key)))


def _hint(name: str, section: str | None, sections: Mapping[str, type]) -> str:
    """An unknown name with the nearest known one, or with the section that it belongs to."""
    others = (s for s in sections if s != section and name in keys(s, sections))
    home = next(others, None)
    known = [*sections, "options"] if section is None else keys(section, sections)
    guess = f"; it is a key of [{home}]" if home else nearest(name, known)
    within = "sections" if section is None else f"keys of [{section}]"
    return f"{quoted(name)}{guess} ({within}: {', '.join(known)})"
