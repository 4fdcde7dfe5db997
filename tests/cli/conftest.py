"""What tests of the command line share."""

import os
from typing import Any

import pytest

from tilewright.cli import main


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("TILEWRIGHT_") or name == "TASK_DEVICE":
            monkeypatch.delenv(name)


@pytest.fixture
def tilewright(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command; returns its exit code, standard output and standard error."""

    def call(*arguments: str) -> tuple[int, str, str]:
        code = main(arguments)
        out, err = capsys.readouterr()
        return code, out, err

    return call
