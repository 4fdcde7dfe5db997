"""Epsilon sampling (Hewitt et al. 2022, arXiv:2210.15191).

Tokens less likely than epsilon are dropped, and one of the others is sampled. The most likely token
is always kept.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from attrs import field, frozen, validators

from tilewright import hookimpl
from tilewright.errors import NonFiniteLogitsError
from tilewright.sampling import uniform
from tilewright.types import PluginInfo, SampledToken, Sampler, SamplerRow

if TYPE_CHECKING:
    from torch import Tensor

tilewright_api = 2


@frozen
class Options:
    epsilon: float = field(
        default=3e-4,
        validator=[validators.ge(0.0), validators.lt(1.0)],
        metadata={"help": "drop tokens less likely than this, at the request's temperature"},
    )


@hookimpl
def plugin_info() -> PluginInfo:
    return PluginInfo(
        summary="epsilon sampling: drops unlikely tokens and samples from the rest",
        options=Options,
        ignores=(
            "top_k",
            "top_p",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
            "logit_bias",
            "logprobs",
        ),
        distribution="the softmax at the temperature, over tokens of at least epsilon",
    )


@hookimpl
def create_sampler(options: Options) -> Sampler:
    return EpsilonSampler(options.epsilon)


class EpsilonSampler:
    """A ``Sampler`` (see tilewright.types) that keeps nothing between its steps."""

    def __init__(self, epsilon: float):
        self.epsilon = epsilon

    def sample(self, logits: "Tensor", rows: Sequence[SamplerRow]) -> list[SampledToken]:
        chosen = (self.choose(scores, row) for scores, row in zip(logits, rows, strict=True))
        return [SampledToken(token_id=token) for token in chosen]

    def choose(self, logits: "Tensor", row: SamplerRow) -> int:
        """The token for one row of logits, [vocab_size] float32."""
        temperature = row.params.temperature
        if not logits.isfinite().all():
            bad = (~logits.isfinite()).nonzero().flatten().tolist()
            raise NonFiniteLogitsError(row.request_id, row.position, bad, len(logits))
        best = int(logits.argmax())
        if temperature == 0:
            return best
        # In float64, since float32 would round the smallest temperatures to 0.
        scaled = (logits.double() - logits[best].double()) / max(temperature, 1e-30)
        p = scaled.softmax(0)
        p[p < min(self.epsilon, p[best].item())] = 0
        # The draw depends on the request's seed and on the token's position, and on nothing else.
        u = uniform(row.params.seed, row.position)
        cumulative = p.cumsum(0)
        return int((cumulative > u * cumulative[-1]).nonzero()[0])
