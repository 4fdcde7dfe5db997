"""What every plugin must do, whatever its kind: the base of the conformance suites."""

import json
import subprocess
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any, ClassVar

import pytest
from attrs import frozen

from tilewright import registry
from tilewright.errors import ConfigError, TilewrightError
from tilewright.options import plugin_options, read_options
from tilewright.types import Check, PluginInfo


@frozen
class Implementation:
    """A plugin that fits its kind's hooks, and its options as its hooks get them."""

    kind: str
    plugin: Any
    """The module or object that carries the hooks."""
    options: Any
    who: str
    """The plugin in words, for messages."""

    def call(self, hook: str, **arguments: Any) -> Any:
        """The plugin's answer to a hook; None when it does not implement it."""
        return registry.call(self.plugin, hook, **arguments)

    def implements(self, hook: str) -> bool:
        return hook in registry.check_hooks(self.plugin, self.who)


def resolve(plugin: Any, kind: str) -> Any:
    """The module or object with the hooks: what was given, or what an installed name means.

    Raises PluginError for a name that is not installed or not one plugin's.
    """
    return registry.load(registry.find(kind, plugin)) if isinstance(plugin, str) else plugin


def described(plugin: Any, kind: str) -> str:
    """A plugin in words: ``sampler 'top-p'``."""
    name = plugin if isinstance(plugin, str) else getattr(plugin, "__name__", None)
    return f"{registry.noun(kind)} {name or type(plugin).__name__!r}"


class PluginSuite:
    """Tests for plugins of every kind. Subclass the suite of a kind, not this.

    Fixtures to give: ``plugin``, and where they are needed ``options``.
    """

    kind: ClassVar[str]

    @pytest.fixture
    def plugin(self) -> Any:
        """The plugin: a module or object as an entry point names it, or an installed name."""
        pytest.fail(
            f"{type(self).__name__} must have a fixture 'plugin' that returns the plugin's module "
            "or object, or its installed name",
            pytrace=False,
        )

    @pytest.fixture
    def options(self) -> Mapping[str, Any]:
        """The plugin's options as a user writes them; by default none, so its own defaults."""
        return {}

    @pytest.fixture
    def implementation(self, plugin: Any, options: Mapping[str, Any]) -> Implementation:
        """The plugin, found, checked as an engine checks it, and with its options read."""
        who = described(plugin, self.kind)
        try:
            found = resolve(plugin, self.kind)
            registry.check(found, self.kind, who)
            read = read_options(who, registry.info(found), options)
        except TilewrightError as error:
            pytest.fail(str(error), pytrace=False)
        return Implementation(self.kind, found, read, who)

    # --- tests -----------------------------------------------------------------------------------

    def test_it_is_written_for_this_api_and_its_hooks_fit_their_specs(self, plugin: Any) -> None:
        try:
            registry.check(resolve(plugin, self.kind), self.kind, described(plugin, self.kind))
        except TilewrightError as error:
            pytest.fail(str(error), pytrace=False)

    def test_it_says_in_a_line_what_it_is(self, implementation: Implementation) -> None:
        said = implementation.call("plugin_info")
        assert isinstance(said, PluginInfo), (
            f"plugin_info() must return a PluginInfo, which `plugins show` prints, found {said!r}"
        )
        assert len(said.summary.splitlines()) == 1, (
            f"PluginInfo.summary must be one line that says what this is, found {said.summary!r}"
        )

    def test_each_option_has_a_line_of_help(self, implementation: Implementation) -> None:
        info = registry.info(implementation.plugin)
        bare = [o.name for o in plugin_options(implementation.who, info) if not o.help.strip()]
        assert not bare, (
            f'options need a line of help in their field\'s metadata={{"help": ...}}: {bare}'
        )

    def test_an_unknown_option_is_refused(
        self, implementation: Implementation, options: Mapping[str, Any]
    ) -> None:
        unknown = {**options, "no_such_option": 1}
        with pytest.raises(ConfigError):
            read_options(implementation.who, registry.info(implementation.plugin), unknown)

    def test_importing_it_leaves_the_process_as_it_was(
        self, plugin: Any, implementation: Implementation
    ) -> None:
        module = _module_of(plugin, self.kind, implementation.plugin)
        if module is None:
            pytest.skip("an object of no module that a fresh process could import")
        ran = subprocess.run(
            [sys.executable, "-c", _IMPORT, module, json.dumps(sys.path)],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert ran.returncode == 0, f"importing {module} in a fresh process: {_last(ran.stderr)}"
        changed = json.loads(ran.stdout.splitlines()[-1])
        assert not changed, (
            f"importing {module} must leave the process as it was, but changed {'; '.join(changed)}"
        )

    def test_its_doctor_checks_raise_nothing(self, implementation: Implementation) -> None:
        found = implementation.call("doctor_checks")
        assert all(isinstance(check, Check) for check in found or ()), (
            f"doctor_checks() must return tilewright.types.Check objects, found {found!r}"
        )


_IMPORT = """
import importlib, json, sys
module, sys.path[:] = sys.argv[1], json.loads(sys.argv[2])
import numpy, torch, tilewright.hookspecs, tilewright.types
from tilewright.testing.state import differences, global_state
before = global_state()
importlib.import_module(module)
print()
print(json.dumps(differences(before, global_state())))
"""


def _module_of(plugin: Any, kind: str, found: Any) -> str | None:
    """The module whose import makes a plugin, None when a fresh process could not import it."""
    if isinstance(plugin, str):
        return registry.find(kind, plugin).target.partition(":")[0]
    module = found.__name__ if isinstance(found, ModuleType) else type(found).__module__
    given = sys.modules.get(module)
    return module if given is not None and getattr(given, "__file__", None) else None


def _last(stderr: str) -> str:
    return next((line for line in reversed(stderr.splitlines()) if line.strip()), "it died")
