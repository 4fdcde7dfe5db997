import pytest

from tilewright.cli import main
from tilewright_testing import CommandSuite

NAME = "tilewright-my-plugin:my-plugin"


class TestConformance(CommandSuite):
    @pytest.fixture
    def plugin(self) -> str:
        return NAME


def test_the_tokens_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([NAME, "We the People", "--ids"]) == 0
    number, *ids = capsys.readouterr().out.split()
    assert len(ids) == int(number) > 0


def test_a_model_that_is_not_there_is_one_line_and_code_2(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([NAME, "We the People", "--model", "./no-such-model"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("tilewright: error: ")
    assert err.count("\n") == 1
