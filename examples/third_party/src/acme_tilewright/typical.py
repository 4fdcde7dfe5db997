"""Sampler ``typical``: locally typical sampling (Meister et al. 2023, arXiv:2202.00666).

Those tokens stay whose information content, -log p, is nearest to the distribution's entropy: as
many as it takes to reach a given mass. So very likely tokens may go as well as very unlikely ones.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from attrs import field, frozen, validators

from tilewright import hookimpl
from tilewright.errors import NonFiniteLogitsError
from tilewright.sampling import uniform
from tilewright.types import (
    PluginInfo,
    SampledToken,
    Sampler,
    SamplerRow,
    TokenLogprobs,
)

if TYPE_CHECKING:
    from torch import Tensor

tilewright_api = 2


@frozen
class Options:
    mass: float = field(
        default=0.9,
        validator=[validators.gt(0.0), validators.le(1.0)],
        metadata={"help": "total probability of the tokens that are kept"},
    )


@hookimpl
def plugin_info() -> PluginInfo:
    return PluginInfo(
        summary="locally typical sampling",
        options=Options,
        ignores=(
            "top_k",
            "top_p",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
            "logit_bias",
        ),
        distribution="the softmax at the temperature, over the locally typical tokens",
    )


@hookimpl
def create_sampler(options: Options) -> Sampler:
    return TypicalSampler(options.mass)


class TypicalSampler:
    """A ``Sampler`` (see tilewright.types) that keeps nothing between its steps."""

    def __init__(self, mass: float):
        self.mass = mass

    def sample(self, logits: "Tensor", rows: Sequence[SamplerRow]) -> list[SampledToken]:
        return [self._token(scores, row) for scores, row in zip(logits, rows, strict=True)]

    def _token(self, logits: "Tensor", row: SamplerRow) -> SampledToken:
        params = row.params
        if not logits.isfinite().all():
            bad = (~logits.isfinite()).nonzero().flatten().tolist()
            raise NonFiniteLogitsError(row.request_id, row.position, bad, len(logits))
        if params.temperature == 0:
            token = int(logits.argmax())
        else:
            # The draw depends on the request's seed and the token's position, and on nothing else.
            u = uniform(params.seed, row.position)
            cumulative = typical(logits, params.temperature, self.mass).cumsum(0)
            token = int((cumulative > u * cumulative[-1]).nonzero()[0])
        return SampledToken(token_id=token, logprobs=_logprobs(logits, token, params.logprobs))


def typical(logits: "Tensor", temperature: float, mass: float) -> "Tensor":
    """Probabilities [vocab_size] float64 of the locally typical tokens, 0 for all others."""
    # In float64, since float32 would round the smallest temperatures to 0.
    scaled = (logits.double() - logits.max().double()) / max(temperature, 1e-30)
    log_p = scaled.log_softmax(0)
    p = log_p.exp()
    entropy = -(p * log_p).nansum()
    order = (-log_p - entropy).abs().argsort(stable=True)
    before = p[order].cumsum(0) - p[order]
    p[order[before >= mass]] = 0
    return p


def _logprobs(logits: "Tensor", token: int, count: int | None) -> TokenLogprobs | None:
    if count is None:
        return None
    values = logits.log_softmax(0)
    likeliest = values.argsort(descending=True, stable=True)[:count].tolist()
    return TokenLogprobs(
        token_id=token,
        logprob=float(values[token]),
        top=tuple((i, float(values[i])) for i in likeliest),
    )
