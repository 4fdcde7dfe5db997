from collections import Counter

import pytest
import torch

from acme_tilewright.typical import TypicalSampler, typical
from tilewright.types import SamplerRow, SamplingParams
from tilewright_testing import SamplerSuite


class TestConformance(SamplerSuite):
    @pytest.fixture
    def plugin(self) -> str:
        return "acme-tilewright:typical"


@pytest.mark.parametrize("mass", [0.2, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_tokens_that_stay_are_those_of_transformers(mass: float, temperature: float) -> None:
    transformers = pytest.importorskip("transformers")
    warper = transformers.TypicalLogitsWarper(mass=mass)
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        logits = 3 * torch.randn(200, generator=generator)
        scores = warper(torch.zeros(1, 1, dtype=torch.long), logits[None] / temperature)[0]
        found = typical(logits, temperature, mass)
        assert torch.equal(found > 0, scores.isfinite())
        torch.testing.assert_close(
            found / found.sum(), scores.double().softmax(0), atol=1e-6, rtol=1e-4
        )


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, 2.5, -1.0])
    rows = [
        SamplerRow(
            request_id="r",
            params=SamplingParams(temperature=1.0, seed=seed),
            prompt_token_ids=(),
            output_token_ids=(),
            position=0,
        )
        for seed in range(4000)
    ]
    found = Counter(t.token_id for t in TypicalSampler(0.8).sample(logits.expand(4000, -1), rows))
    p = typical(logits, 1.0, 0.8)
    for token, expected in enumerate((p / p.sum()).tolist()):
        assert found[token] / 4000 == pytest.approx(expected, abs=0.04)
