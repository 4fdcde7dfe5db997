"""A pytest plugin that writes the result of each test of a suite, line by line in JSON.

``pytest -p tilewright_testing.reporting --tilewright-report FILE``. A line is written before a test
runs and another after it, so that a process that dies shows where.
"""

import json
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tilewright.plugins import cause

FOUND = "tilewright-found"
"""Name of the property (``record_property``) in which a test says what it found, passed or not."""
SUMMARY = "tilewright-summary"
"""Name of the property that is to be shown with the numbers of all tests."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--tilewright-report", type=Path, help="file to write the test results to")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--tilewright-report")
    if path is not None:
        config.pluginmanager.register(_Report(path))


class _Report:
    def __init__(self, path: Path):
        self.path = path

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._write("collected", [_statement(item) for item in session.items])

    def pytest_runtest_logstart(self) -> None:
        self._write("started", None)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if report.failed or report.skipped or report.when == "teardown":
            error = None if call.excinfo is None else call.excinfo.value
            said = dict(item.user_properties)
            if report.when == "teardown" and SUMMARY in said:
                self._write("summary", str(said[SUMMARY]))
            found = str(said[FOUND]) if FOUND in said else None
            self._write(report.outcome, found if error is None else _reason(error))
        return report

    def _write(self, event: str, value: str | Sequence[str] | None) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([event, value]) + "\n")


def _statement(item: pytest.Item) -> str:
    """A test's name as a statement: ``ties go to the smallest id``."""
    name: Any = getattr(item, "originalname", None) or item.name
    words = name.removeprefix("test_").replace("_", " ")
    callspec = getattr(item, "callspec", None)
    return f"{words} ({callspec.id})" if callspec is not None else words


def _reason(error: BaseException) -> str:
    """Why a test failed or was skipped, in one line."""
    if isinstance(error, (AssertionError, pytest.fail.Exception, pytest.skip.Exception)):
        said = str(error).strip().splitlines()
        return said[0] if said else "an assertion failed"
    return cause(error)
