"""The plugins that an engine has selected, and their options."""

from collections.abc import Mapping, Sequence
from typing import Any

from attrs import frozen
from pluggy import PluginManager

from tilewright import registry
from tilewright.errors import ConfigError, PluginError, TilewrightError, nearest
from tilewright.options import read_options
from tilewright.types import PluginInfo

Options = Mapping[str, Mapping[str, Any]]


@frozen
class Selected:
    """A plugin, imported, checked, and registered with its engine's manager."""

    plugin: registry.Plugin
    implementation: Any

    @property
    def info(self) -> PluginInfo:
        return registry.info(self.implementation)

    def call(self, hook: str, **arguments: Any) -> Any:
        """This plugin's answer to a hook. Raises PluginError for unexpected exceptions."""
        try:
            return registry.call(self.implementation, hook, **arguments)
        except (TilewrightError, MemoryError):
            raise
        except Exception as error:
            raise PluginError(f"{self.plugin}: {hook}() failed: {registry.cause(error)}") from error

    def read_options(self, options: Options, **more: Any) -> Any:
        """This plugin's part of an engine's options, overridden by more, as its options class."""
        given = options.get(self.plugin.kind, {})
        if self.plugin.kind in registry.OPTIONS_BY_NAME:
            given = given.get(self.plugin.qualified, given.get(self.plugin.name, {}))
        who = f"{registry.noun(self.plugin.kind)} {self.plugin.name!r}"
        return read_options(who, self.info, {**given, **more})


def select(manager: PluginManager, kind: str, name: str) -> Selected:
    """The plugin that a name means. Raises PluginError as ``registry.find`` and ``load`` do."""
    plugin = registry.find(kind, name)
    return Selected(plugin, registry.register(manager, plugin))


def claimants(
    plugins: Sequence[registry.Plugin], hook: str, **arguments: Any
) -> tuple[list[registry.Plugin], dict[registry.Plugin, str]]:
    """Plugins that answer yes to a probe such as ``can_load``, and why others cannot be asked."""
    claims, unusable = [], {}
    for plugin in plugins:
        try:
            if registry.call(registry.load(plugin), hook, **arguments):
                claims.append(plugin)
        except PluginError as error:
            unusable[plugin] = str(error)
        except (Exception, SystemExit) as error:  # a probe must not raise: this one is broken
            unusable[plugin] = f"{plugin}: {hook}() failed: {registry.cause(error)}"
    return claims, unusable


def check_options(options: Options, observers: Sequence[registry.Plugin]) -> None:
    """Raise ConfigError for options of an unknown kind, or of a plugin that is not in use."""
    for kind in options:
        if kind not in registry.KINDS:
            raise ConfigError(
                f"options are given for {kind!r}, which is no kind of plugin"
                f"{nearest(kind, registry.KINDS)} (kinds: {', '.join(registry.KINDS)})"
            )
    in_use = {"observer": observers, "weight_format": registry.installed("weight_format")}
    for kind, plugins in in_use.items():
        names = [n for p in plugins for n in (p.name, p.qualified)]
        for name in options.get(kind, {}):
            if name not in names:
                state = "selected" if kind == "observer" else "installed"
                known = ", ".join(p.name for p in plugins) or "none"
                raise ConfigError(
                    f"options are given for {registry.noun(kind)} {name!r}, which is not {state}"
                    f"{nearest(name, names)} ({state}: {known})"
                )
