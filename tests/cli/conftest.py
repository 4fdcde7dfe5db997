"""What tests of the command line share."""

from typing import Any

import pytest

from tilewright.cli import main


@pytest.fixture
def tilewright(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command; returns its exit code, standard output and standard error."""

    def call(*arguments: str) -> tuple[int, str, str]:
        code = main(arguments)
        out, err = capsys.readouterr()
        return code, out, err

    return call
