"""The base of the conformance suites: requirements for plugins of every kind."""

import json
import subprocess
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any, ClassVar

import pytest
from attrs import frozen

from tilewright import plugins
from tilewright.errors import ConfigError, TilewrightError
from tilewright.plugins import plugin_options, read_options
from tilewright.types import Check, PluginInfo


@frozen
class Implementation:
    """A plugin that fits its kind's hooks, and its options as passed to the hooks."""

    kind: str
    plugin: Any
    """The module or object that carries the hooks."""
    options: Any
    who: str
    """The plugin in words, for messages."""

    def call(self, hook: str, **arguments: Any) -> Any:
        """The plugin's answer to a hook; None when it does not implement it."""
        return plugins.call(self.plugin, hook, **arguments)

    def implements(self, hook: str) -> bool:
        return hook in plugins.check_hooks(self.plugin, self.who)


def resolve(plugin: Any, kind: str) -> Any:
    """The module or object with the hooks: what was given, or what an installed name means.

    Raises PluginError for a name that is not installed or not unique.
    """
    return plugins.load(plugins.find(kind, plugin)) if isinstance(plugin, str) else plugin


def described(plugin: Any, kind: str) -> str:
    """A plugin in words: ``sampler 'top-p'``."""
    name = plugin if isinstance(plugin, str) else getattr(plugin, "__name__", None)
    return f"{plugins.noun(kind)} {name or type(plugin).__name__!r}"


def no_report(what: str, done: int, total: int) -> None:
    """A ``Report`` that nobody listens to."""


class PluginSuite:
    """Tests for plugins of every kind. Subclass the suite of a kind, not this.

    Fixtures to give: ``plugin``, and ``options`` where needed.
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
        """The plugin's options as a user writes them; by default none, so that its defaults
        apply."""
        return {}

    @pytest.fixture
    def implementation(self, plugin: Any, options: Mapping[str, Any]) -> Implementation:
        """The plugin, resolved, checked as in an engine, with its options read."""
        who = described(plugin, self.kind)
        try:
            found = resolve(plugin, self.kind)
            plugins.check(found, self.kind, who)
            read = read_options(who, plugins.info(found), options)
        except TilewrightError as error:
            pytest.fail(str(error), pytrace=False)
        return Implementation(self.kind, found, read, who)

    # --- tests -----------------------------------------------------------------------------------

    def test_it_targets_this_api_version_and_its_hooks_match_their_specs(self, plugin: Any) -> None:
        try:
            plugins.check(resolve(plugin, self.kind), self.kind, described(plugin, self.kind))
        except TilewrightError as error:
            pytest.fail(str(error), pytrace=False)

    def test_it_describes_itself_in_one_line(self, implementation: Implementation) -> None:
        said = implementation.call("plugin_info")
        assert isinstance(said, PluginInfo), (
            f"plugin_info() must return a PluginInfo, which `plugins show` prints, found {said!r}"
        )
        assert len(said.summary.splitlines()) == 1, (
            f"PluginInfo.summary must describe the plugin in one line, found {said.summary!r}"
        )

    def test_each_option_has_a_line_of_help(self, implementation: Implementation) -> None:
        info = plugins.info(implementation.plugin)
        bare = [o.name for o in plugin_options(implementation.who, info) if not o.help.strip()]
        assert not bare, (
            f'each option needs a help text, metadata={{"help": ...}} of its field; missing for '
            f"{bare}"
        )

    def test_an_unknown_option_is_refused(
        self, implementation: Implementation, options: Mapping[str, Any]
    ) -> None:
        unknown = {**options, "no_such_option": 1}
        with pytest.raises(ConfigError):
            read_options(implementation.who, plugins.info(implementation.plugin), unknown)

    def test_importing_it_leaves_the_process_unchanged(
        self, plugin: Any, implementation: Implementation
    ) -> None:
        target = target_of(plugin, implementation)
        module = target.partition(":")[0]
        changed = in_fresh_process("changed_by_import", module)
        if changed is None:
            changed = in_fresh_process("changed_by_import", module, "numpy", "torch")
        assert not changed, (
            f"importing {target} must not change the process's state, but changed "
            f"{'; '.join(changed)}"
        )

    def test_its_doctor_checks_do_not_raise(self, implementation: Implementation) -> None:
        found = implementation.call("doctor_checks")
        assert all(isinstance(check, Check) for check in found or ()), (
            f"doctor_checks() must return tilewright.types.Check objects, found {found!r}"
        )


def target_of(plugin: Any, implementation: Implementation) -> str:
    """The plugin's entry point, ``module`` or ``module:attribute``; skips the test if a fresh
    process could not import it."""
    if isinstance(plugin, str):
        return plugins.find(implementation.kind, plugin).target
    attribute: str | None = ""
    if isinstance(plugin, ModuleType):
        module = plugin
    else:
        module = sys.modules[type(plugin).__module__]
        names = [name for name, value in vars(module).items() if value is plugin]
        attribute = f":{names[0]}" if names else None
    if attribute is None or not getattr(module, "__file__", None):
        pytest.skip("a fresh process cannot import the plugin: it is not a module's attribute")
    return f"{module.__name__}{attribute}"


def in_fresh_process(function: str, *arguments: Any) -> Any:
    """Result of a function of tilewright_testing.fresh in a fresh process, passed as JSON."""
    ran = subprocess.run(
        [sys.executable, "-m", "tilewright_testing.fresh", function],
        input=json.dumps([sys.path, arguments]),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    if ran.returncode:
        said = [line for line in ran.stderr.splitlines() if line.strip()] or [
            f"exit code {ran.returncode}"
        ]
        pytest.fail(f"the check failed in a fresh process: {said[-1]}", pytrace=False)
    return json.loads(ran.stdout.splitlines()[-1])
