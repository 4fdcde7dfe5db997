"""Runs conformance suites on correct and broken plugins within a test."""

import os
import re
import signal
import sys
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import pytest
import torch
from attrs import define, field, frozen

from tilewright_testing import PluginSuite


@frozen
class Fault:
    """A plugin that breaks a contract."""

    name: str
    """What is wrong with it, in words."""
    plugin: Any
    test: str
    """The test of the suite that has to fail, whatever else does; with [id], one case of it."""
    fixtures: Mapping[str, Any] = field(factory=dict)
    """Values for the suite's fixtures, by name."""
    why: str = ""
    """The expected failure message, as a regular expression."""


@define
class Outcome:
    """The outcome of a suite or of some of its tests; a parametrised test fails as a whole."""

    found: dict[str, str] = field(factory=dict)
    """Each test's outcome: passed, failed, skipped."""
    why: dict[str, str] = field(factory=dict)
    """The failure message of each failed test."""

    @property
    def failed(self) -> list[str]:
        return [name for name, outcome in self.found.items() if outcome == "failed"]


def full_name(suite: type, start: str) -> str:
    """The suite's only test whose name, after test_, starts so; a case in brackets is kept."""
    words, bracket, case = start.partition("[")
    (name,) = (n for n in dir(suite) if n.startswith(f"test_{words}"))
    return f"{name}{bracket}{case}"


def run(suite: type, plugin: Any, only: Sequence[str] = (), /, **fixtures: Any) -> Outcome:
    """Run a suite, or only some of its tests, on a plugin, with values for its fixtures."""
    return run_all([(suite, plugin, only, fixtures)])[0]


def run_faults(suite: type, faults: Sequence[Fault], whole: bool = False) -> list[Outcome]:
    """Run the test that must fail, or the whole suite, on each broken plugin."""
    return run_all([(suite, f.plugin, () if whole else (f.test,), f.fixtures) for f in faults])


def missed(suite: type, faults: Sequence[Fault]) -> list[str]:
    """The faults that their test does not find, or for another reason, with its message."""
    found = []
    for fault, outcome in zip(faults, run_faults(suite, faults), strict=True):
        test = fault.test.partition("[")[0]
        right = re.search(fault.why, outcome.why.get(test, ""), re.DOTALL)
        if outcome.failed != [test] or not right:
            found.append(f"{fault.name}: {outcome.why or outcome.found}")
    return found


def own_tests(suite: type) -> list[str]:
    """The tests of a suite without those for plugins of every kind."""
    return [n for n in dir(suite) if n.startswith("test_") and not hasattr(PluginSuite, n)]


def run_all(
    subjects: Sequence[tuple[type, Any, Sequence[str], Mapping[str, Any]]],
) -> list[Outcome]:
    """Run several (suite, plugin, tests, fixtures) in one run of pytest, which starts slowly."""
    outcomes = [Outcome() for _ in subjects]
    module, targets = ModuleType("conformance_subject"), []
    for i, (suite, plugin, only, fixtures) in enumerate(subjects):
        given = {"plugin": plugin} | dict(fixtures)
        made = {name: _fixture(value) for name, value in given.items()}
        setattr(module, f"Test{i}", type(f"Test{i}", (suite,), made))
        targets += [f"::Test{i}::{name}" for name in only] or [f"::Test{i}"]
    # Other styles print all arguments, including tensors.
    quiet = ("-q", "--no-header", "--no-summary", "--tb=short")
    quiet += ("-p", "no:cacheprovider", "-p", "no:xdist")
    with TemporaryDirectory() as folder:
        file = Path(folder) / "test_subject.py"
        file.write_text("from conformance_subject import *\n")
        settings = file.with_name("pytest.ini")  # in place of this project's settings
        settings.write_text("[pytest]\n")
        sys.modules["conformance_subject"] = module
        before = os.environ.pop("PYTEST_ADDOPTS", None)
        try:
            pytest.main(
                [*quiet, "-c", str(settings), *(f"{file}{t}" for t in targets)],
                plugins=[_Recorder(outcomes)],
            )
        finally:
            if before is not None:
                os.environ["PYTEST_ADDOPTS"] = before
            for name in ("conformance_subject", "test_subject"):
                sys.modules.pop(name, None)
    return outcomes


@define
class _Recorder:
    """A pytest plugin that records the outcome of each test."""

    outcomes: Sequence[Outcome]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self) -> Generator[None, object, object]:
        """Restore the global state that a broken plugin may change."""
        dtype, gradients = torch.get_default_dtype(), torch.is_grad_enabled()
        threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGUSR2)
        environment, directory = dict(os.environ), os.getcwd()
        try:
            return (yield)
        finally:
            torch.set_default_dtype(dtype)
            torch.set_grad_enabled(gradients)
            torch.set_num_threads(threads)
            signal.signal(signal.SIGUSR2, handler)
            os.environ.clear()
            os.environ.update(environment)
            os.chdir(directory)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        _, subject, test = report.nodeid.rsplit("::", 2)
        of, name = self.outcomes[int(subject.removeprefix("Test"))], test.partition("[")[0]
        if of.found.get(name) == "failed":
            return
        of.found[name] = report.outcome
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            of.why[name] = crash.message if crash else str(report.longrepr)


def _fixture(value: Any) -> Any:
    return pytest.fixture(lambda self: value)
