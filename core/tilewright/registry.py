"""Which plugins are installed, and the one that a name means.

Listing reads the metadata that installers leave in ``*.dist-info`` folders and imports nothing, not
even importlib.metadata, whose import alone takes three times as long as starting Python. Loading a
name imports that plugin and no other.
"""

import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from tilewright.errors import PluginError, nearest

if TYPE_CHECKING:
    from pluggy import PluginManager

    from tilewright.types import PluginInfo


class Kind(NamedTuple):
    """A kind of plugin."""

    group: str
    specs: str
    """The class in tilewright.hookspecs."""
    required: tuple[str, ...]
    """Hooks that every plugin of the kind implements."""


KINDS = {
    "loader": Kind("tilewright.loaders", "LoaderHooks", ("can_load", "load_model")),
    "weight_format": Kind(
        "tilewright.weight_formats", "WeightFormatHooks", ("can_open", "open_weights")
    ),
    "executor": Kind("tilewright.executors", "ExecutorHooks", ("create_executor",)),
    "kv_allocator": Kind("tilewright.kv_allocators", "KvAllocatorHooks", ("create_kv_allocator",)),
    "sampler": Kind("tilewright.samplers", "SamplerHooks", ("create_sampler",)),
    "observer": Kind("tilewright.observers", "ObserverHooks", ("create_observer",)),
}

_KIND_OF_GROUP = {kind.group: name for name, kind in KINDS.items()}


class Plugin(NamedTuple):
    """An installed plugin, as its distribution's metadata states it."""

    kind: str
    name: str
    distribution: str
    version: str
    target: str
    """``module`` or ``module:attribute``."""
    where: str
    """The folder on sys.path that holds the distribution's metadata."""

    @property
    def qualified(self) -> str:
        return f"{self.distribution}:{self.name}"


def installed(kind: str | None = None) -> list[Plugin]:
    """All installed plugins, or those of one kind, by kind and name. Imports nothing."""
    found = [p for p in _scan() if kind in (None, p.kind)]
    order = list(KINDS)
    return sorted(found, key=lambda p: (order.index(p.kind), p.name, p.distribution))


def find(kind: str, name: str) -> Plugin:
    """The installed plugin that a name means: ``name``, or ``distribution:name``.

    Raises PluginError when there is none, or more than one.
    """
    of_kind = installed(kind)
    distribution, _, plain = name.rpartition(":")
    matches = [
        p
        for p in of_kind
        if p.name == plain and (not distribution or normalized(distribution) == p.distribution)
    ]
    if len(matches) == 1:
        return matches[0]
    noun = kind.replace("_", " ")
    if matches:
        raise PluginError(
            f"{noun} {name!r} is claimed by {len(matches)} distributions; "
            f"choose one: {' or '.join(repr(p.qualified) for p in matches)}"
        )
    names = [p.name for p in of_kind]
    here = f"installed: {', '.join(dict.fromkeys(names))}" if names else "none is installed"
    broken = [f"{p.name} ({why})" for p in of_kind if (why := missing_code(p))]
    also = f"; broken: {', '.join(broken)}" if broken else ""
    raise PluginError(f"no {noun} is named {name!r}{nearest(plain, names)} ({here}{also})")


def load(plugin: Plugin) -> Any:
    """Import a plugin and check its API version and its hooks.

    Raises PluginError, which names the plugin, its distribution and the cause.
    """
    from importlib import import_module

    module, _, attribute = plugin.target.partition(":")
    who = _who(plugin)
    try:
        obj = import_module(module)
        for part in attribute.split(".") if attribute else ():
            obj = getattr(obj, part)
    except Exception as error:
        why = missing_code(plugin) or f"{type(error).__name__}: {error}"
        raise PluginError(f"{who} cannot be imported from {plugin.target}: {why}") from error
    check(obj, plugin.kind, who)
    return obj


def check(obj: Any, kind: str, who: str) -> None:
    """Raise PluginError unless obj is written for this API and its hooks fit their specs."""
    from tilewright.hookspecs import API_VERSION

    declared = getattr(obj, "tilewright_api", None)
    if declared is None:
        raise PluginError(
            f"{who} does not say which API it was written for; expected tilewright_api = "
            f"{API_VERSION} in it"
        )
    if declared != API_VERSION:
        newer = isinstance(declared, int) and declared > API_VERSION
        cure = "upgrade tilewright" if newer else "install a newer version of it"
        raise PluginError(
            f"{who} is written for API {declared}; this tilewright has API {API_VERSION}: {cure}"
        )
    implemented = check_hooks(obj, who)
    for hook in KINDS[kind].required:
        if hook not in implemented:
            unmarked = " (it has a function of that name: mark it with @hookimpl)"
            raise PluginError(
                f"{who} does not implement {hook!r}, which every {kind.replace('_', ' ')} must"
                f"{unmarked if callable(getattr(obj, hook, None)) else ''}"
            )


def check_hooks(obj: Any, who: str) -> set[str]:
    """The names of the hooks that obj implements; PluginError unless each fits its spec."""
    import pluggy

    manager = new_manager()
    try:
        manager.register(obj)
    except pluggy.PluginValidationError as error:
        raise PluginError(
            f"{who} does not fit its hook spec: {_argument_problem(manager, obj, error)}"
        ) from error
    implemented = {caller.name for caller in manager.get_hookcallers(obj) or ()}
    known = known_hooks()
    for hook in sorted(implemented - known.keys()):
        raise PluginError(
            f"{who} implements {hook!r}, which is no hook of tilewright{nearest(hook, known)}"
        )
    return implemented


def register(manager: "PluginManager", kind: str, name: str) -> Any:
    """Find, load and register the plugin that a name means; returns it.

    Registered under ``kind:name``; a plugin that serves two kinds is registered once.
    """
    plugin = find(kind, name)
    obj = load(plugin)
    if not manager.is_registered(obj):
        manager.register(obj, f"{kind}:{plugin.qualified}")
    return obj


def new_manager() -> "PluginManager":
    """A plugin manager that knows every hook spec and no plugin."""
    import pluggy

    from tilewright import hookspecs

    manager = pluggy.PluginManager("tilewright")
    for specs in ("AnyPlugin", *(kind.specs for kind in KINDS.values()), "ObserverEvents"):
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


def call(obj: Any, hook: str, **kwargs: Any) -> Any:
    """One plugin's answer to a hook (None if it does not implement it)."""
    manager = new_manager()
    manager.register(obj)
    return getattr(manager.hook, hook)(**kwargs)


def info(obj: Any) -> "PluginInfo":
    """What a loaded plugin says of itself; an empty summary if it says nothing."""
    from tilewright.types import PluginInfo

    return call(obj, "plugin_info") or PluginInfo(summary="")


def missing_code(plugin: Plugin) -> str | None:
    """Why a plugin's top-level module cannot even be found, or None if it can. Imports nothing."""
    from importlib.machinery import BuiltinImporter, PathFinder

    top = plugin.target.partition(":")[0].partition(".")[0]
    if top in sys.modules or BuiltinImporter.find_spec(top) or PathFinder.find_spec(top):
        return None
    return f"no module {top!r}: its files are gone, reinstall or uninstall {plugin.distribution}"


def normalized(distribution: str) -> str:
    """A distribution's name as PEP 503 compares them: ``Acme.Plugins_X`` is ``acme-plugins-x``."""
    parts = distribution.lower().replace("_", "-").replace(".", "-").split("-")
    return "-".join(part for part in parts if part)


def _who(plugin: Plugin) -> str:
    noun = plugin.kind.replace("_", " ")
    return f"{noun} {plugin.name!r} of {plugin.distribution} {plugin.version}"


def _argument_problem(manager: "PluginManager", obj: Any, error: Exception) -> str:
    known = known_hooks()
    for name in dir(obj):
        options = manager.parse_hookimpl_opts(obj, name)
        if options is None or name not in known:
            continue
        from pluggy._hooks import varnames

        for argument in varnames(getattr(obj, name))[0]:
            if argument not in known[name]:
                return (
                    f"{name}() takes an argument {argument!r}{nearest(argument, known[name])} "
                    f"(the hook has: {', '.join(known[name]) or 'none'})"
                )
    return " ".join(str(error).split())


def _scan() -> Iterator[Plugin]:
    """Plugins of every distribution on sys.path; of two copies of one, the first, as imports do."""
    seen: set[str] = set()
    for folder in dict.fromkeys(sys.path):
        try:
            entries = sorted(os.listdir(folder or "."))
        except OSError:
            continue
        for entry in entries:
            if not entry.endswith(".dist-info"):
                continue
            distribution, _, version = entry.removesuffix(".dist-info").partition("-")
            distribution = normalized(distribution)
            if distribution in seen:
                continue
            seen.add(distribution)
            try:
                with open(os.path.join(folder, entry, "entry_points.txt"), encoding="utf-8") as f:
                    text = f.read()
            except OSError:
                continue
            if "tilewright." not in text:
                continue
            for group, name, target in _entry_points(text):
                if kind := _KIND_OF_GROUP.get(group):
                    yield Plugin(kind, name, distribution, version, target, folder)


def _entry_points(text: str) -> Iterator[tuple[str, str, str]]:
    """(group, name, value) of each line, in the format of the Python packaging specification."""
    group = ""
    for line in text.splitlines():
        line = line.strip()
        if line.startswith("[") and line.endswith("]"):
            group = line[1:-1].strip()
        elif line and line[0] not in "#;" and "=" in line:
            name, _, value = line.partition("=")
            yield group, name.strip(), value.partition("[")[0].strip()
