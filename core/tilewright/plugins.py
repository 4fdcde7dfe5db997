"""Finds the installed plugins, loads and checks them, selects them by name, and calls their hooks.

Listing reads the metadata that installers leave in ``*.dist-info`` folders and imports nothing, not
even importlib.metadata, whose import alone takes three times as long as starting Python. Loading a
name imports that plugin and no other.
"""

import os
import sys
from _thread import allocate_lock  # threading takes longer to import
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from tilewright.errors import (
    ConfigError,
    PluginError,
    PluginWarning,
    TilewrightError,
    nearest,
    quoted,
)

if TYPE_CHECKING:
    from pluggy import HookImpl, PluginManager
    from torch import Tensor

    from tilewright.types import PluginInfo, Report, Tap
    from tilewright.values import Option

Options = Mapping[str, Mapping[str, Any]]
"""An engine's options, by kind of plugin."""


API_VERSION = 2
"""Raised when a change to a spec or a protocol would break existing plugins."""

FROM_VERSION_1 = {
    "loader": "load_model takes source, options, weight_format, formats and report instead of a "
    "request, and write_sample returns a Sample",
    "weight_format": "write_weights returns the tolerance of what it wrote",
    "executor": "create_executor takes model_config, runtime_config, weights and others instead of "
    "a request, forward replaces prefill and decode, and allocate_kv, read_kv and write_kv replace "
    "bind_kv_cache",
    "kv_allocator": "create_kv_allocator takes num_pages and page_size, and an allocator has pages "
    "only: no storage, slots or block tables",
    "sampler": "create_sampler takes model_config and options instead of a request, and draws "
    "depend on SamplerRow.position",
    "observer": "StepEvent has num_prompt_tokens and num_decode_tokens, and an event that raises "
    "ends no generation",
    "command": "configure and run are as before, but an engine's results and runtime have other "
    "fields",
}
"""What a plugin of each kind has to change since version 1, for the error of an old one."""


class Kind(NamedTuple):
    """A kind of plugin."""

    name: str
    required: tuple[str, ...]
    """Hooks that every plugin of the kind implements; for commands, functions that it has."""
    several: bool = False
    """Whether one engine may use several of them: their options are given by plugin name."""

    @property
    def group(self) -> str:
        """The entry-point group."""
        return f"tilewright.{self.name.removesuffix('s')}s"

    @property
    def specs(self) -> str:
        """The class of its hook specs in tilewright.hookspecs."""
        return f"{self._camel}Hooks"

    @property
    def suite(self) -> str:
        """The class of its conformance suite in tilewright_testing."""
        return f"{self._camel}Suite"

    @property
    def _camel(self) -> str:
        return self.name.title().replace("_", "")


ENGINE_KINDS = {
    kind.name: kind
    for kind in (
        Kind("loader", ("can_load", "load_model")),
        Kind("weight_format", ("can_open", "open_weights"), several=True),
        Kind("executor", ("create_executor",)),
        Kind("kv_allocator", ("create_kv_allocator",)),
        Kind("sampler", ("create_sampler",)),
        Kind("logits_processor", ("create_logits_processor",), several=True),
        Kind("observer", ("create_observer",), several=True),
    )
}
"""The kinds of plugins that an engine runs with, by name; they have hooks and options."""

KERNELS = Kind("kernels", ("served_models", "kernel_set"))
"""Sets of device kernels. An executor finds its set by name: see tilewright.types.KernelSet."""

COMMAND = Kind("command", ("configure", "run"))
"""Commands of the command line. They have no hooks: see tilewright.types.Command."""

WITH_HOOKS = {**ENGINE_KINDS, KERNELS.name: KERNELS}
KINDS = {**WITH_HOOKS, COMMAND.name: COMMAND}

DEVICE_VARIABLES = "tilewright.device_variables"
"""A group of entry points whose names are environment variables: in one of them, the queue of a
shared host names the device that it granted to this process. Only the names are read."""

# --- installed plugins ----------------------------------------------------------------------------


class Plugin(NamedTuple):
    """An installed plugin, as its distribution's metadata states it."""

    kind: str
    name: str
    distribution: str
    """The distribution's name, normalised by PEP 503."""
    version: str
    target: str
    """``module`` or ``module:attribute``."""
    where: str
    """The folder or zip file on sys.path that holds the distribution's metadata."""

    @property
    def qualified(self) -> str:
        return f"{self.distribution}:{self.name}"

    def __str__(self) -> str:
        return f"{noun(self.kind)} {self.name!r} of {self.distribution} {self.version}"


def installed(kind: str | None = None) -> list[Plugin]:
    """All installed plugins, or those of one kind, by kind and name. Imports nothing."""
    groups = {k.group: name for name, k in KINDS.items() if kind in (None, name)}
    # A set, since one distribution may list the same line twice.
    found = {
        Plugin(groups[e.group], e.name, e.distribution, e.version, e.target, e.where)
        for e in entry_points(groups)
    }
    order = list(KINDS)
    return sorted(found, key=lambda p: (order.index(p.kind), *p[1:]))


def find(kind: str, name: str) -> Plugin:
    """The installed plugin that a name means: ``name``, or ``distribution:name``.

    Raises PluginError when there is none, or more than one.
    """
    of_kind = installed(kind)
    matches = matching(name, of_kind)
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise PluginError(clash(name, matches))
    raise unknown(name, of_kind, noun(kind))


def matching(name: str, plugins: Iterable[Plugin]) -> list[Plugin]:
    """The plugins that ``name`` or ``distribution:name`` means. Names compare exactly."""
    distribution, colon, plain = name.partition(":")
    if not colon:
        return [p for p in plugins if p.name == name]
    distribution = normalized(distribution)
    return [p for p in plugins if p.name == plain and p.distribution == distribution]


def clash(name: str, rivals: Sequence[Plugin]) -> str:
    """The message for plugins that share a kind and a name, with how to choose one of them."""
    sources = [
        f"{p.distribution} {p.version}{f' ({why})' if (why := missing_code(p)) else ''}"
        for p in rivals
    ]
    who = f"{noun(rivals[0].kind)} {name!r}"
    choices = list(dict.fromkeys(repr(p.qualified) for p in rivals))
    if len(choices) == 1:
        targets = " and ".join(p.target for p in rivals)
        return f"{who} is listed twice by {sources[0]} ({targets}): reinstall or uninstall it"
    return f"{who} is claimed by {' and by '.join(sources)}; choose {' or '.join(choices)}"


def unknown(name: str, plugins: Iterable[Plugin], what: str) -> PluginError:
    """The error for a name that none of the plugins has."""
    qualified = ":" in name
    usable, broken = [], []
    for plugin in plugins:
        shown = plugin.qualified if qualified else plugin.name
        if why := missing_code(plugin):
            broken.append(f"{shown} ({why})")
        elif shown not in usable:
            usable.append(shown)
    here = f"installed: {', '.join(usable)}" if usable else "none is installed"
    also = f"; broken: {', '.join(broken)}" if broken else ""
    return PluginError(f"no {what} is named {quoted(name)}{nearest(name, usable)} ({here}{also})")


def state(plugin: Plugin, among: Iterable[Plugin]) -> tuple[str, str]:
    """``ok``, ``clash`` or ``missing``, and what is wrong in words. Imports nothing."""
    if why := missing_code(plugin):
        return "missing", f"{plugin}: {why}"
    rivals = [p for p in among if (p.kind, p.name) == (plugin.kind, plugin.name)]
    return ("clash", clash(plugin.name, rivals)) if len(rivals) > 1 else ("ok", "")


def missing_code(plugin: Plugin) -> str | None:
    """Why a plugin's module cannot be found; None if it can, or if only an import can tell."""
    try:
        name, spec = _spec(plugin)
    except Exception:  # raised by a finder that others have installed
        return None
    if spec is not None:
        return None
    cure = f"reinstall or uninstall {plugin.distribution}"
    return f"no module {name!r}: its files are gone, {cure}"


def summary(plugin: Plugin) -> str:
    """The first line of the docstring of a plugin's module, read without importing it.

    Without its full stop; empty if there is none, or if the source cannot be read.
    """
    import re

    try:
        name, spec = _spec(plugin)
        source = spec.loader.get_source(name) or ""
    except Exception:  # no source, or a finder of others that fails
        return ""
    docstring = re.match(r"(?:\s*#.*\n)*\s*(\"\"\"|'''|\"|')(.*)", source)
    return docstring[2].partition(docstring[1])[0].strip().removesuffix(".") if docstring else ""


def _spec(plugin: Plugin) -> tuple[str, Any]:
    """The spec of a plugin's module, and its name; or None, and the part of it that is missing.

    Imports neither the module nor the packages that hold it.
    """
    path: Sequence[str] | None = None
    name, spec = "", None
    for part in plugin.target.partition(":")[0].split("."):
        name = f"{name}.{part}" if name else part
        if name in sys.modules:
            spec = sys.modules[name].__spec__
            path = list(getattr(sys.modules[name], "__path__", ()))
            continue
        specs = (finder.find_spec(name, path) for finder in sys.meta_path)
        spec = next(filter(None, specs), None)
        if spec is None:
            return name, None
        path = list(spec.submodule_search_locations or ())
    return name, spec


def noun(kind: str) -> str:
    """A kind as messages name it: ``kv allocator``, ``kernel set``."""
    return "kernel set" if kind == KERNELS.name else kind.replace("_", " ")


# --- loading and checking a plugin ----------------------------------------------------------------


def load(plugin: Plugin) -> Any:
    """Import a plugin and check its API version and its hooks.

    Raises PluginError, which names the plugin, its distribution and the cause; SystemExit in the
    plugin counts as a cause, KeyboardInterrupt is passed on.
    """
    try:
        obj = imported(plugin.target)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        why = missing_code(plugin) or cause(error)
        raise PluginError(f"{plugin} cannot be imported from {plugin.target}: {why}") from error
    try:
        check(obj, plugin.kind, str(plugin))
    except PluginError:
        raise
    except Exception as error:  # from attributes that the plugin computes
        raise PluginError(f"{plugin} cannot be checked: {cause(error)}") from error
    return obj


def imported(target: str) -> Any:
    """What an entry point names. Raises what importing it raises."""
    from importlib import import_module

    module, _, attribute = target.partition(":")
    obj: Any = import_module(module)
    for part in attribute.split(".") if attribute else ():
        obj = getattr(obj, part)
    return obj


def check(obj: Any, kind: str, who: str) -> None:
    """Raise PluginError unless obj is written for this API and its hooks fit their specs."""
    from inspect import isroutine

    if isinstance(obj, type) or isroutine(obj):
        raise PluginError(
            f"{who} must be a module or an object with hooks, found {_described(obj)}: plugins are "
            "not created by a call, so name a module or an instance in the entry point"
        )
    declared = getattr(obj, "tilewright_api", None)
    if type(declared) is not int:
        found = "nothing" if declared is None else repr(declared)
        raise PluginError(
            f"{who} does not declare its API version: expected tilewright_api = "
            f"{API_VERSION} in {_described(obj)}, found {found}"
        )
    if declared != API_VERSION:
        cure = "upgrade tilewright" if declared > API_VERSION else "install a newer version of it"
        if declared == 1 and kind in FROM_VERSION_1:
            cure += (
                f", or change it ({FROM_VERSION_1[kind]}; see docs/writing-plugins.md) and set "
                f"tilewright_api = {API_VERSION}"
            )
        raise PluginError(
            f"{who} is written for API version {declared}; this tilewright has API version "
            f"{API_VERSION}: {cure}"
        )
    if kind == COMMAND.name:
        check_command(obj, who)
        return
    implemented = check_hooks(obj, who)
    for hook in KINDS[kind].required:
        if hook not in implemented:
            unmarked = " (it has a function of that name: mark it with @hookimpl)"
            raise PluginError(
                f"{who} does not implement {hook!r}, which every {noun(kind)} must"
                f"{unmarked if callable(getattr(obj, hook, None)) else ''}"
            )


def check_command(obj: Any, who: str) -> None:
    """Raise PluginError unless obj has the functions of a command (tilewright.types.Command)."""
    from inspect import signature

    for name in COMMAND.required:
        function = getattr(obj, name, None)
        if not callable(function):
            raise PluginError(
                f"{who} must have functions {' and '.join(COMMAND.required)}, as "
                f"tilewright.types.Command describes them; {name!r} is missing"
            )
        try:
            signature(function).bind(None)
        except (TypeError, ValueError) as error:
            raise PluginError(f"{who}: {name}() must take one argument: {error}") from error


def check_hooks(obj: Any, who: str) -> set[str]:
    """The names of the hooks that obj implements; PluginError unless each fits its spec."""
    from inspect import Parameter, signature

    manager = new_manager()
    known = known_hooks()
    implemented = set()
    for attribute in dir(obj):
        marks = manager.parse_hookimpl_opts(obj, attribute)
        if marks is None:
            continue
        hook = marks.get("specname") or attribute
        implemented.add(hook)
        if hook not in known:
            raise PluginError(
                f"{who} implements {hook!r}, which is not a hook of tilewright"
                f"{nearest(hook, known)}"
            )
        if hook.startswith("on_") and (marks.get("wrapper") or marks.get("hookwrapper")):
            raise PluginError(
                f"{who}: {hook}() is marked as a wrapper, which an event cannot be: mark it with "
                "@hookimpl alone"
            )
        for parameter in signature(getattr(obj, attribute)).parameters.values():
            if parameter.name not in known[hook]:
                raise PluginError(
                    f"{who}: {hook}() takes an argument {parameter.name!r}"
                    f"{nearest(parameter.name, known[hook])} "
                    f"(the hook has: {', '.join(known[hook]) or 'none'})"
                )
            # pluggy passes only such arguments, and leaves all others at their defaults.
            if parameter.default is not Parameter.empty or parameter.kind not in (
                Parameter.POSITIONAL_ONLY,
                Parameter.POSITIONAL_OR_KEYWORD,
            ):
                raise PluginError(
                    f"{who}: {hook}() must take {parameter.name!r} without a default and not by "
                    f"keyword only, found '{parameter}'"
                )
    try:
        manager.register(obj)
    except Exception as error:
        why = " ".join(str(error).split())
        raise PluginError(f"{who} does not fit its hook spec: {why}") from error
    return implemented


def unmarked_events(obj: Any) -> list[str]:
    """Methods in an observer plugin's module that are named like events and lack ``@hookimpl``."""
    module = obj if isinstance(obj, ModuleType) else sys.modules[type(obj).__module__]
    manager = new_manager()
    events = [hook for hook in known_hooks() if hook.startswith("on_")]
    return [
        f"{cls.__name__}.{event}"
        for cls in vars(module).values()
        if isinstance(cls, type) and cls.__module__ == module.__name__
        for event in events
        if callable(vars(cls).get(event)) and manager.parse_hookimpl_opts(cls, event) is None
    ]


_registering = allocate_lock()
"""Held while a plugin is registered: threads may load models that need the same one."""


def register(manager: "PluginManager", plugin: Plugin) -> Any:
    """Load a plugin and register it with a manager; returns it.

    It is registered as ``kind:distribution:name``; an object of two kinds only once.
    """
    obj = load(plugin)
    with _registering:
        if not manager.is_registered(obj):
            manager.register(obj, f"{plugin.kind}:{plugin.qualified}")
    return obj


def new_manager() -> "PluginManager":
    """A plugin manager that knows every hook spec and no plugin."""
    import pluggy

    from tilewright import hookspecs

    manager = pluggy.PluginManager("tilewright")
    for specs in ("AnyPlugin", *(kind.specs for kind in WITH_HOOKS.values()), "ObserverEvents"):
        manager.add_hookspecs(getattr(hookspecs, specs))
    return manager


def known_hooks() -> dict[str, tuple[str, ...]]:
    """Every hook's name and the arguments that its spec names."""
    hooks = new_manager().hook
    return {
        name: tuple(caller.spec.argnames)
        for name, caller in vars(hooks).items()
        if getattr(caller, "spec", None) is not None
    }


def cause(error: BaseException) -> str:
    """An exception in one line, with the place in the plugin's code where it was raised."""
    from traceback import extract_tb

    said = " ".join(str(error).split())
    # The first frame is the caller's, and others of this module only import the plugin.
    frames = [
        f
        for f in extract_tb(error.__traceback__)[1:]
        if "importlib" not in f.filename and f.filename != __file__
    ]
    at = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}{': ' if said else ''}{said}{at}"


def warn(message: str) -> None:
    """Show a PluginWarning, also if it was shown before. Where warnings are errors, it is shown
    and not raised, since a generation must not end."""
    import warnings

    try:
        # An empty registry, since Python shows a text only once for each registry.
        warnings.warn_explicit(message, PluginWarning, __file__, 0, __name__, registry={})
    except PluginWarning as raised:
        warnings.showwarning(raised, PluginWarning, __file__, 0)


def _described(obj: Any) -> str:
    """What an object is, for messages: ``module x``, ``class X``, ``function f``."""
    name = getattr(obj, "__name__", None)
    kind = type(obj).__name__
    return f"{'class' if isinstance(obj, type) else kind} {name}" if name else f"a {kind} object"


# --- calling its hooks ----------------------------------------------------------------------------


def call(obj: Any, hook: str, **kwargs: Any) -> Any:
    """One plugin's answer to a hook, None if it does not implement it.

    Takes a millisecond or two: use it to create objects, not in the token loop. Raises PluginError
    when a hook that is required of a kind returns None.
    """
    manager = new_manager()
    manager.register(obj)
    answer = getattr(manager.hook, hook)(**kwargs)
    if answer is None and any(hook in kind.required for kind in WITH_HOOKS.values()):
        raise PluginError(f"{hook}() of {_described(obj)} returned nothing")
    return answer


def info(obj: Any) -> "PluginInfo":
    """A loaded plugin's info; with an empty summary if it does not implement the hook."""
    from tilewright.types import PluginInfo

    said = call(obj, "plugin_info")
    if said is None:
        return PluginInfo(summary="")
    if not isinstance(said, PluginInfo):
        raise PluginError(
            f"plugin_info() of {_described(obj)} must return a PluginInfo, found {said!r}"
        )
    return said


def read_options(who: str, info: "PluginInfo", given: Mapping[str, Any]) -> Any:
    """An instance of a plugin's options class, or None when it has none.

    who is the plugin in words, such as ``sampler 'top-p'``. Raises ConfigError as
    ``values.structure`` does, also when options are given to a plugin that has none; PluginError
    as plugin_options does.
    """
    from tilewright.values import structure

    plugin_options(who, info)
    if info.options is not None:
        return structure(info.options, given, who)
    if given:
        raise ConfigError(f"{who} has no options, found {', '.join(map(repr, given))}")
    return None


def plugin_options(who: str, info: "PluginInfo") -> "list[Option]":
    """The options that a plugin takes. Raises PluginError when they are not in an attrs class."""
    import attrs

    from tilewright.values import options_of

    if info.options is None:
        return []
    if not attrs.has(info.options):
        raise PluginError(
            f"{who}: the options in its plugin_info must be an attrs class, found {info.options!r}"
        )
    try:
        return options_of(info.options)
    except NameError as error:
        raise PluginError(
            f"{who}: a type in {info.options.__name__} cannot be resolved: {error}"
        ) from error


def check_ignores(who: str, info: "PluginInfo") -> None:
    """Raise PluginError unless what a sampler ignores are fields of SamplingParams."""
    from attrs import fields

    from tilewright.types import SamplingParams

    known = [field.name for field in fields(SamplingParams)]
    for name in info.ignores:
        if name not in known:
            raise PluginError(
                f"{who}: 'ignores' in its plugin_info must name settings of sampling, found "
                f"{name!r}{nearest(name, known)} (settings: {', '.join(known)})"
            )


def claimants(
    plugins: Sequence[Plugin], hook: str, **arguments: Any
) -> tuple[list[Plugin], dict[Plugin, str]]:
    """Plugins that answer yes to a probe such as ``can_load``, and why others cannot be asked."""
    claims, unusable = [], {}
    for plugin in plugins:
        try:
            if call(load(plugin), hook, **arguments):
                claims.append(plugin)
        except PluginError as error:
            unusable[plugin] = str(error)
        except (Exception, SystemExit) as error:  # a probe must not raise: this one is broken
            unusable[plugin] = f"{plugin}: {hook}() failed: {cause(error)}"
    return claims, unusable


# --- the plugins of an engine ---------------------------------------------------------------------


class Selected(NamedTuple):
    """A plugin, imported, checked, and registered with its engine's manager."""

    plugin: Plugin
    implementation: Any

    @property
    def info(self) -> "PluginInfo":
        return info(self.implementation)

    def call(self, hook: str, **arguments: Any) -> Any:
        """This plugin's answer to a hook. Raises PluginError for unexpected exceptions."""
        try:
            return call(self.implementation, hook, **arguments)
        except (TilewrightError, MemoryError):
            raise
        except Exception as error:
            raise PluginError(f"{self.plugin}: {hook}() failed: {cause(error)}") from error

    def create(self, hook: str, protocol: type, **arguments: Any) -> Any:
        """The object that a hook creates. Raises PluginError if it lacks names of its protocol."""
        made = self.call(hook, **arguments)
        names = [n for cls in protocol.__mro__ for n in vars(cls) if not n.startswith("_")]
        # Without isinstance, which would not say what is missing.
        if missing := [name for name in names if not hasattr(made, name)]:
            raise PluginError(
                f"{self.plugin}: {hook}() must return an object with all of "
                f"{protocol.__name__}, but {_described(made)} lacks {', '.join(missing)} "
                "(see docs/hooks.md)"
            )
        return made

    def read_options(self, options: Options, **more: Any) -> Any:
        """This plugin's part of an engine's options, overridden by more, as its options class."""
        given = options.get(self.plugin.kind, {})
        if KINDS[self.plugin.kind].several:
            given = given.get(self.plugin.qualified, given.get(self.plugin.name, {}))
        who = f"{noun(self.plugin.kind)} {self.plugin.name!r}"
        return read_options(who, self.info, {**given, **more})


def select(manager: "PluginManager", kind: str, name: str) -> Selected:
    """The plugin that a name means. Raises PluginError as ``find`` and ``load`` do."""
    plugin = find(kind, name)
    return Selected(plugin, register(manager, plugin))


def check_options(options: Options, observers: Sequence[Plugin]) -> None:
    """Raise ConfigError for options of an unknown kind, or of a plugin that is not in use."""
    for kind in options:
        if kind not in ENGINE_KINDS:
            raise ConfigError(
                f"options are given for {kind!r}, which is not a kind of plugin"
                f"{nearest(kind, ENGINE_KINDS)} (kinds: {', '.join(ENGINE_KINDS)})"
            )
    in_use = {
        "observer": observers,
        **{kind: installed(kind) for kind in ("weight_format", "logits_processor")},
    }
    for kind, plugins in in_use.items():
        names = [n for p in plugins for n in (p.name, p.qualified)]
        for name in options.get(kind, {}):
            if name not in names:
                state = "selected" if kind == "observer" else "installed"
                known = ", ".join(p.name for p in plugins) or "none"
                raise ConfigError(
                    f"options are given for {noun(kind)} {quoted(name)}, which is not {state}"
                    f"{nearest(name, names)} ({state}: {known})"
                )


class Selection(NamedTuple):
    """The plugins and options of an engine."""

    manager: "PluginManager"
    """Has these plugins and the observers, and no others."""
    plugins: Mapping[str, Selected]
    """By kind; without a loader if the loader is chosen for each model."""
    options: Mapping[str, Any]
    """By kind: an instance of the plugin's options class."""
    arguments: dict[str, Any]
    """The arguments of ``LLMEngine.from_plugins`` that select the same, also in another process."""


def select_all(
    names: Mapping[str, str | None], observers: Sequence[str | object], options: Options
) -> Selection:
    """Select an engine's plugins by kind and name, and its observers by name or as objects.

    Raises PluginError as ``find`` and ``load`` do, and ConfigError for options that a plugin does
    not have or cannot take.
    """
    given = {kind: dict(values) for kind, values in options.items()}
    manager = new_manager()
    chosen = {kind: select(manager, kind, name) for kind, name in names.items() if name is not None}
    watching = [select(manager, "observer", o) if isinstance(o, str) else o for o in observers]
    check_options(given, [o.plugin for o in watching if isinstance(o, Selected)])
    read = {kind: plugin.read_options(given) for kind, plugin in chosen.items()}
    for observer in watching:
        if isinstance(observer, Selected):
            who = str(observer.plugin)
            made = observer.read_options(given)
            observer = observer.call("create_observer", options=made)
        else:
            who = f"observer {getattr(observer, '__name__', type(observer).__name__)}"
        check_hooks(observer, f"observer {observer!r}")
        # Two may be of one class or plugin; pluggy takes each name once.
        unique = (who, *(f"{who} ({i})" for i in range(2, len(watching) + 1)))
        manager.register(observer, next(n for n in unique if not manager.has_plugin(n)))
    arguments: dict[str, Any] = {
        kind: chosen[kind].plugin.qualified if kind in chosen else None for kind in names
    }
    arguments["observers"] = tuple(
        o.plugin.qualified if isinstance(o, Selected) else o for o in watching
    )
    arguments["options"] = given
    return Selection(manager, chosen, read, arguments)


def check_selection(
    names: Mapping[str, str | None], named: Sequence[Plugin], options: Options
) -> None:
    """Raise what ``select_all`` and loading a model raise for plugins and their options.

    names: by kind, as for ``select_all``. named: the plugins of kinds with several, whose options
    are read too. Makes none of them. Options of a loader that is not named are not read.
    """
    manager = new_manager()
    chosen = [select(manager, kind, name) for kind, name in names.items() if name is not None]
    chosen += [select(manager, plugin.kind, plugin.qualified) for plugin in named]
    check_options(options, [plugin for plugin in named if plugin.kind == "observer"])
    for plugin in chosen:
        plugin.read_options(options)


class Observers:
    """The observers of an engine. An event that none of them listens to is not created.

    One that raises an Exception other than MemoryError is named in a PluginWarning, with the event
    and the cause, and gets no further events.
    """

    def __init__(self, manager: "PluginManager"):
        self._hooks = manager.hook
        self._failed: set[str] = set()
        """Names of those that have raised."""

    def listen(self, event: str) -> bool:
        """Whether any of them listens to an event."""
        return bool(self._listeners(event))

    def notify(self, event: str, arguments: Callable[[], Mapping[str, Any]] = dict) -> None:
        """Call all that listen; arguments makes the event's arguments if any does."""
        if self.listen(event):
            self._call(event, arguments())

    def reporter(self, model_id: str) -> "Report":
        """The ``report`` of requests to loaders and executors: makes on_prepare events."""

        def report(what: str, done: int, total: int) -> None:
            given = {"model_id": model_id, "what": what, "done": done, "total": total}
            self.notify("on_prepare", lambda: given)

        return report

    def tap(self, model_id: str) -> "Tap | None":
        """A tap that makes on_tensor events; None if none listens, since a tap costs time."""
        if not self.listen("on_tensor"):
            return None

        def tap(name: str, tensor: "Tensor") -> None:
            self._call("on_tensor", {"model_id": model_id, "name": name, "tensor": tensor})

        return tap

    def _listeners(self, event: str) -> "list[HookImpl]":
        """In the order in which they are called."""
        found = getattr(self._hooks, event).get_hookimpls()
        if not found:  # the usual case, in the token loop
            return []
        return [each for each in reversed(found) if each.plugin_name not in self._failed]

    def _call(self, event: str, arguments: Mapping[str, Any]) -> None:
        for listener in self._listeners(event):
            # One of those before it may have run a step, in which this one failed.
            if listener.plugin_name in self._failed:
                continue
            try:
                listener.function(*(arguments[name] for name in listener.argnames))
            except MemoryError:
                raise
            except Exception as error:
                self._detach(listener.plugin_name, event, error)

    def _detach(self, name: str, event: str, error: Exception) -> None:
        if name not in self._failed:
            self._failed.add(name)
            warn(f"{name} failed in {event}: {cause(error)}; it gets no further events")


# --- metadata -------------------------------------------------------------------------------------


def normalized(distribution: str) -> str:
    """A distribution's name as PEP 503 compares them: ``Acme.Plugins_X`` is ``acme-plugins-x``."""
    parts = distribution.lower().replace("_", "-").replace(".", "-").split("-")
    return "-".join(part for part in parts if part)


class EntryPoint(NamedTuple):
    """One line of an installed distribution's ``entry_points.txt``."""

    group: str
    name: str
    target: str
    distribution: str
    version: str
    where: str


def entry_points(groups: Collection[str]) -> Iterator[EntryPoint]:
    """Entry points of the given groups, of every distribution on sys.path.

    The first of two copies of a distribution counts, as for imports. Only ``*.dist-info`` is read,
    which every installer writes, not the ``*.egg-info`` of older tools.
    """
    return (entry for entry in _all_entry_points() if entry.group in groups)


def in_unknown_groups() -> list[tuple[EntryPoint, str]]:
    """Entry points in groups of tilewright that do not exist, each with what is wrong."""
    known = [*(kind.group for kind in KINDS.values()), DEVICE_VARIABLES]
    return [
        (
            entry,
            f"{entry.distribution} {entry.version} has {entry.name!r} in the entry-point group "
            f"{entry.group!r}, which does not exist{nearest(entry.group, known)} "
            f"(groups: {', '.join(known)})",
        )
        for entry in _all_entry_points()
        if entry.group.startswith("tilewright.") and entry.group not in known
    ]


def _all_entry_points() -> Iterator[EntryPoint]:
    seen: set[str] = set()
    for where in dict.fromkeys(path for path in sys.path if isinstance(path, str)):
        for folder, text in _metadata(where or "."):
            distribution, _, version = folder.removesuffix(".dist-info").partition("-")
            distribution = normalized(distribution)
            if distribution in seen:
                continue
            seen.add(distribution)
            for group, name, target in _parsed(text):
                yield EntryPoint(group, name, target, distribution, version, where or ".")


def _metadata(where: str) -> Iterator[tuple[str, str]]:
    """The name and the entry_points.txt of each ``*.dist-info`` in a folder or zip file."""
    try:
        folders = [name for name in os.listdir(where) if name.endswith(".dist-info")]
    except NotADirectoryError:
        yield from _zipped_metadata(where)
        return
    except OSError:
        return
    for folder in sorted(folders):
        # pip renames what it is about to delete to ~NAME, and leaves that when it is interrupted.
        if folder.startswith("~"):
            continue
        try:
            path = os.path.join(where, folder, "entry_points.txt")
            with open(path, encoding="utf-8-sig", errors="replace") as file:
                yield folder, file.read()
        except OSError:
            yield folder, ""


def _zipped_metadata(where: str) -> Iterator[tuple[str, str]]:
    from zipfile import BadZipFile, ZipFile

    try:
        with ZipFile(where) as archive:
            for path in sorted(archive.namelist()):
                folder, _, file = path.partition("/")
                if folder.endswith(".dist-info") and file == "entry_points.txt":
                    yield folder, archive.read(path).decode("utf-8-sig", "replace")
    except (OSError, BadZipFile):
        return


def _parsed(text: str) -> Iterator[tuple[str, str, str]]:
    """(group, name, target) of each line, in the format of the Python packaging specification."""
    group = ""
    for line in map(str.strip, text.splitlines()):
        if line.startswith("[") and line.endswith("]"):
            group = line[1:-1]
        elif line and line[0] not in "#;" and "=" in line:
            name, _, value = line.partition("=")
            target = value.partition("[")[0].split(":")
            yield group, name.strip(), ":".join(part.strip() for part in target)
