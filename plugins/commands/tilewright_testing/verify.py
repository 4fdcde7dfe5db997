"""Run the conformance suite of an installed plugin, as ``tilewright plugins verify`` does."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

from tilewright.errors import TilewrightError
from tilewright.plugins import KINDS, Plugin

Result = Literal["passed", "failed", "not run"]


class Statement(NamedTuple):
    """One test of a suite: its statement, the result, and the reason unless it passed."""

    statement: str
    result: Result
    reason: str
    """For a test that passed: what it found, or empty."""


class Verified(NamedTuple):
    """The outcome of a suite."""

    statements: list[Statement]
    summary: str
    """What a suite says of itself as a whole, such as ``ran 3 of 16 models``; or empty."""


def verify(plugin: Plugin, options: Mapping[str, Any], source: str | None = None) -> Verified:
    """Run the suite of the plugin's kind in a separate process.

    options: the plugin's, as a user writes them. source: for a loader, a model to load instead of
    the sample that it writes. Raises TilewrightError when the suite cannot be run.
    """
    walks = plugin.kind in ("kv_allocator", "logits_processor")
    needed = ("pytest", "hypothesis") if walks else ("pytest",)
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise TilewrightError(
            f"verifying {plugin} needs {' and '.join(missing)}, which is not installed: "
            "pip install 'tilewright[testing]'"
        )
    with TemporaryDirectory(prefix="tilewright-verify-") as temporary:
        folder = Path(temporary)
        test, report = folder / "test_installed.py", folder / "report.jsonl"
        test.write_text(_test(plugin, options, source), encoding="utf-8")
        settings = folder / "pytest.ini"
        settings.write_text("[pytest]\n")
        ran = subprocess.run(
            [
                sys.executable,
                *("-P", "-m", "pytest", "-c", str(settings), "--rootdir", temporary),
                *("-p", "no:cacheprovider", "-p", "tilewright_testing.reporting"),
                *("--basetemp", str(folder / "tests"), "--tilewright-report", str(report)),
                *("-q", str(test)),
            ],
            env=_environment() | {"HYPOTHESIS_STORAGE_DIRECTORY": str(folder / "hypothesis")},
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        lines = report.read_text(encoding="utf-8").splitlines() if report.exists() else []
    if not lines:
        said = [line for line in (ran.stdout + ran.stderr).splitlines() if line.startswith("E ")]
        why = said[-1].removeprefix("E").strip() if said else _ending(ran.returncode)
        raise TilewrightError(f"the conformance suite of {plugin} could not be run: {why}")
    events = [json.loads(line) for line in lines]
    summary = ", ".join(value for event, value in events if event == "summary")
    tests = ((event, value) for event, value in events if event != "summary")
    return Verified(list(_statements(tests, ran.returncode)), summary)


def _test(plugin: Plugin, options: Mapping[str, Any], source: str | None) -> str:
    """The test file that an author would write for the plugin."""
    suite = KINDS[plugin.kind].suite
    values = {"plugin": plugin.qualified, "options": dict(options)}
    if source is not None:
        values["source"] = source
    fixtures = "".join(
        f"\n    @pytest.fixture\n    def {name}(self):\n        return {value!r}\n"
        for name, value in values.items()
    )
    return (
        f"import pytest\nfrom tilewright_testing import {suite}\n\n"
        f"class TestInstalled({suite}):{fixtures}"
    )


def _environment() -> dict[str, str]:
    """This process's environment, with its import path and without other settings for pytest."""
    environment = dict(os.environ)
    for name in ("PYTEST_ADDOPTS", "PYTEST_PLUGINS"):
        environment.pop(name, None)
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
    return environment


def _statements(events: Iterator[Any], returncode: int) -> Iterator[Statement]:
    """Statements from the report's lines; unfinished tests are failed or not run."""
    names: list[str] = []
    results: list[tuple[Result, str]] = []
    running = False
    for event, value in events:
        if event == "collected":
            names = value
        elif event == "started":
            running = True
        elif running:
            result: Result = "not run" if event == "skipped" else event
            results.append((result, value or ""))
            running = False
    if running:
        results.append(("failed", f"the process ended during this test: {_ending(returncode)}"))
    for name, (result, reason) in zip(names, results, strict=False):
        yield Statement(name, result, reason)
    for name in names[len(results) :]:
        yield Statement(name, "not run", "the process ended before this test")


def _ending(returncode: int) -> str:
    if returncode < 0:
        return f"killed by {signal.Signals(-returncode).name}"
    return f"pytest ended with code {returncode}"
