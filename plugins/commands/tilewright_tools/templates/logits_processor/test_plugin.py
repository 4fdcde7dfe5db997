from collections.abc import Sequence
from typing import Any

import pytest

from tilewright import GenerateConfig, LLMEngine
from tilewright.errors import RequestError
from tilewright.settings import DEMO_MODEL
from tilewright_testing import LogitsProcessorSuite

NAME = "tilewright-my-plugin:my-plugin"


class TestConformance(LogitsProcessorSuite):
    @pytest.fixture
    def plugin(self) -> str:
        return NAME

    @pytest.fixture
    def wrong_arguments(self) -> Sequence[Any]:
        return [[], "", "yes,", ["yes", ""], ["yes", 1], {"yes": "no"}, 3, None]


def generate(choices: Any, **settings: Any) -> str:
    config = GenerateConfig(max_new_tokens=20, logits_processors={NAME: choices}, **settings)
    with LLMEngine.from_plugins() as engine:
        engine.init_model("m", DEMO_MODEL)
        return engine.generate_result("m", "Congress shall", config).text


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("choices", [[" make no law", " make", " never sleep"], " yes, no"])
def test_a_text_is_one_of_the_choices(choices: Any, seed: int) -> None:
    text = generate(choices, temperature=1.5, seed=seed)
    assert text in (choices.split(",") if isinstance(choices, str) else choices)


def test_choices_must_be_texts() -> None:
    with pytest.raises(RequestError, match="expected texts to choose from, found 3"):
        generate(3)
