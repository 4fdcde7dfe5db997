"""The conformance suite of commands."""

import argparse
import sys
from types import ModuleType
from typing import Any, ClassVar

import pytest

from tilewright.cli import add_arguments
from tilewright.cli.parser import Parser, sections
from tilewright_testing.suite import Implementation, PluginSuite, in_fresh_process, target_of


class CommandSuite(PluginSuite):
    """Checks one command against ``tilewright.types.Command``. It is configured, and not run.

    Fixtures to give: ``plugin``.
    """

    kind: ClassVar[str] = "command"

    @pytest.fixture
    def parser(self, implementation: Implementation) -> Parser:
        """The command's parser, as ``tilewright`` makes it."""
        parser = Parser(prog="tilewright command")
        try:
            add_arguments(parser, implementation.plugin)
        except argparse.ArgumentError as error:
            pytest.fail(
                f"a command must not add --help or --debug, which tilewright adds: {error}",
                pytrace=False,
            )
        return parser

    def test_it_describes_itself_in_one_line(self, implementation: Implementation) -> None:
        plugin = implementation.plugin
        module = plugin if isinstance(plugin, ModuleType) else sys.modules[type(plugin).__module__]
        line = (module.__doc__ or "").split("\n")[0]
        assert line.strip(), (
            f"the docstring of {module.__name__} must begin with one line that says what the "
            "command does: `tilewright --help` prints it"
        )

    def test_each_argument_has_a_line_of_help(self, parser: Parser) -> None:
        bare = [names for _, entries in sections(parser) for names, text in entries if not text]
        bare = [names for names in bare if names != "ACTION"]
        assert not bare, f"each argument needs a help=... text; missing for {bare}"

    def test_its_help_fits_in_40_columns(
        self, parser: Parser, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("COLUMNS", "40")
        lines = parser.format_help().partition("\n\n")[2].splitlines()
        wide = [line for line in lines if len(line) > 40]
        assert not wide, f"lines of --help must fit in 40 columns, found {wide}"

    def test_its_help_does_not_import_torch(
        self, plugin: Any, implementation: Implementation
    ) -> None:
        target = target_of(plugin, implementation)
        found = in_fresh_process("imported_for_help", target)
        assert not found, (
            f"--help must not import slow packages, but {target} imports {', '.join(found)}: "
            "import them in the functions that use them"
        )
