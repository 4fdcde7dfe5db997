import pytest

from tilewright import GenerateConfig, LLMEngine, RuntimeConfig
from tilewright.settings import DEMO_MODEL
from tilewright_testing import ExecutorSuite

NAME = "tilewright-my-plugin:my-plugin"


class TestConformance(ExecutorSuite):
    @pytest.fixture
    def plugin(self) -> str:
        return NAME


def test_it_says_what_the_reference_says() -> None:
    said = []
    for executor in ("torch", NAME):
        with LLMEngine.from_plugins(executor=executor) as engine:
            engine.init_model("m", DEMO_MODEL, RuntimeConfig(weight_dtype="float32"))
            said.append(engine.generate("m", "We the People", GenerateConfig(max_new_tokens=12)))
    assert said[0] == said[1]
