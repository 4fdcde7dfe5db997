from typing import Any

import pytest
import torch

from tilewright import plugins
from tilewright.types import SamplerRow, SamplingParams
from tilewright_testing import SamplerSuite

NAME = "tilewright-my-plugin:my-plugin"


class TestConformance(SamplerSuite):
    @pytest.fixture
    def plugin(self) -> str:
        return NAME


def test_tokens_below_epsilon_are_never_drawn() -> None:
    plugin: Any = plugins.load(plugins.find("sampler", NAME))
    sampler = plugin.create_sampler(options=plugin.Options(epsilon=0.15))
    logits = torch.tensor([0.1, 0.5, 0.2, 0.2]).log()
    rows = [
        SamplerRow(
            request_id="r",
            params=SamplingParams(temperature=1.0, seed=seed),
            prompt_token_ids=(),
            output_token_ids=(),
            position=0,
        )
        for seed in range(200)
    ]
    found = sampler.sample(logits.expand(200, -1), rows)
    assert {token.token_id for token in found} == {1, 2, 3}
