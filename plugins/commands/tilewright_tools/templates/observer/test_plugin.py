import json
from pathlib import Path

import pytest

from tilewright import GenerateConfig, LLMEngine
from tilewright.settings import DEMO_MODEL
from tilewright_testing import ObserverSuite

NAME = "tilewright-my-plugin:my-plugin"


class TestConformance(ObserverSuite):
    @pytest.fixture
    def plugin(self) -> str:
        return NAME


def test_the_file_holds_what_was_generated(tmp_path: Path) -> None:
    path = tmp_path / "counted.json"
    options = {"observer": {NAME: {"path": str(path)}}}
    with LLMEngine.from_plugins(observers=[NAME], options=options) as engine:
        engine.init_model("m", DEMO_MODEL)
        engine.generate("m", "We the People", GenerateConfig(max_new_tokens=4))
        assert not path.exists()
    counted = json.loads(path.read_text())["m"]
    assert counted["prefill"]["steps"] == 1
    assert counted["decode"]["tokens"] == 3
    assert list(tmp_path.iterdir()) == [path]
