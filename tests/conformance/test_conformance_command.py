"""The suite of commands finds each of these broken ones, by the test that is meant for it."""

import argparse
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
from conformance import Fault, full_name, missed, own_tests, run

from tilewright_testing import CommandSuite

SUITE = CommandSuite


class Command:
    """A command that adds arguments in some way."""

    tilewright_api = 2

    def __init__(self, configure: Callable[[argparse.ArgumentParser], object]):
        self._configure = configure

    def configure(self, parser: argparse.ArgumentParser) -> None:
        self._configure(parser)

    def run(self, args: argparse.Namespace) -> int:
        return 0


def good(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("word", help="a word to print")
    parser.add_argument("--times", type=int, default=1, help="how often")


def nothing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--times")


def debug(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--debug", help="print more")


def long_name(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--" + "a-very-" * 6 + "long-option", help="an option")


class WithoutRun:
    tilewright_api = 2

    def configure(self, parser: argparse.ArgumentParser) -> None:
        pass


FAULTS = [
    Fault(
        "an argument without help",
        Command(nothing),
        full_name(SUITE, "each_argument_has_a_line_of_help"),
        why="--times",
    ),
    Fault(
        "an option that tilewright has",
        Command(debug),
        full_name(SUITE, "each_argument_has_a_line_of_help"),
        why="which tilewright adds",
    ),
    Fault(
        "a name that no narrow terminal can show",
        Command(long_name),
        full_name(SUITE, "its_help_fits_in_40_columns"),
        why="a-very-a-very",
    ),
    Fault(
        "no function that runs it",
        WithoutRun(),
        full_name(SUITE, "it_targets_this_api_version_and_its"),
        why="'run' is missing",
    ),
]

MODULES = {
    "a module without a docstring": (
        "it_describes_itself_in_one_line",
        "",
        "must begin with one line",
    ),
    "a module that imports torch": (
        "its_help_does_not_import_torch",
        '"""Say something."""\nimport torch\n',
        "imports torch",
    ),
}

REST = """
tilewright_api = 2
def configure(parser): pass
def run(args): return 0
"""


def faults_of_modules(folder: Path) -> list[Fault]:
    faults = []
    for i, (name, (test, source, why)) in enumerate(MODULES.items()):
        path = folder / f"acme_command_{i}.py"
        path.write_text(source + REST)
        faults.append(Fault(name, import_module(path.stem), full_name(SUITE, test), why=why))
    return faults


def test_each_broken_command_is_found() -> None:
    assert missed(SUITE, FAULTS) == []


def test_each_broken_module_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    faults = faults_of_modules(tmp_path)
    assert missed(SUITE, faults) == []
    tests = {fault.test for fault in (*FAULTS, *faults)}
    assert set(own_tests(SUITE)) <= tests


def test_a_right_command_passes() -> None:
    found = run(SUITE, Command(good)).found
    # It is of no module that a fresh process could import.
    assert [name for name, outcome in found.items() if outcome != "passed"] == [
        "test_importing_it_leaves_the_process_unchanged",
        "test_its_help_does_not_import_torch",
    ]
    assert sys.modules[__name__].__doc__
