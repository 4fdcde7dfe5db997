import pytest

from tilewright import GenerateConfig, LLMEngine, RuntimeConfig
from tilewright.settings import DEMO_MODEL
from tilewright_testing import KernelsSuite

NAME = "tilewright-my-plugin:my-plugin"


class TestConformance(KernelsSuite):
    @pytest.fixture
    def plugin(self) -> str:
        return NAME


def test_it_says_what_the_reference_says() -> None:
    said = []
    emulated = {"platform": "emulated", "kernels": NAME}
    for executor, options in (("torch", {}), ("pypto-npu", emulated)):
        with LLMEngine.from_plugins(executor=executor, options={"executor": options}) as engine:
            engine.init_model("m", DEMO_MODEL, RuntimeConfig(weight_dtype="bfloat16"))
            said.append(engine.generate("m", "We the People", GenerateConfig(max_new_tokens=4)))
    assert said[0] == said[1]
