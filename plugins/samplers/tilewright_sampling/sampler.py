"""The sampler behind both plugins."""

import math
import warnings
from collections.abc import Sequence
from typing import Literal

import torch
from attrs import field, frozen, validators
from torch import Tensor

from tilewright.errors import NonFiniteLogitsError
from tilewright.sampling import uniform
from tilewright.types import SampledToken, SamplerRow, SamplingParams
from tilewright_sampling.logits import (
    changes_logits,
    draw,
    logprobs,
    penalise,
    sanitise,
    shortlist,
)


@frozen(kw_only=True)
class Options:
    on_nonfinite: Literal["error", "sanitize"] = field(
        default="error",
        validator=validators.in_(("error", "sanitize")),
        metadata={
            "help": "what to do when logits are NaN or infinite: error, or sanitize to replace "
            "them, warn once and mark the result, for smoke tests only"
        },
    )


class LogitsSampler:
    """A ``Sampler`` (see tilewright.types) without per-request state between steps.

    A step checks for non-finite logits. Rows that take the most likely token, at temperature 0 or
    with ``greedy``, and have no penalties and no bias are then taken together. For every other row
    it applies the penalties and the bias (``logits.penalise``); then either takes the most likely
    token, or applies temperature, top_k, top_p and min_p (``logits.shortlist``) and draws with the
    number that ``tilewright.sampling.uniform`` gives for the request's seed and the row's position.
    """

    def __init__(self, options: Options, greedy: bool):
        self.options = options
        self.greedy = greedy
        self._warned = False

    def sample(self, logits: Tensor, rows: Sequence[SamplerRow]) -> list[SampledToken]:
        """Sample B tokens from logits [B, vocab_size] float32 on any device.

        With ``on_nonfinite="sanitize"`` non-finite logits are replaced (``logits.sanitise``), with
        a RuntimeWarning the first time.

        Raises NonFiniteLogitsError for the first row with such logits, and RequestError for an
        invalid logit_bias (``logits.penalise``).
        """
        replaced = [0] * len(rows)
        if suspicious := _suspicious(logits):
            logits = logits.clone()
            for i in suspicious:
                replaced[i] = self._make_finite(logits[i], rows[i])
        plain = [
            i
            for i, row in enumerate(rows)
            if self._takes_likeliest(row) and not changes_logits(row.params)
        ]
        likeliest = dict(zip(plain, _likeliest(logits, plain), strict=True))
        sampled = []
        for i, row in enumerate(rows):
            token_id = likeliest[i] if i in likeliest else self._choose(logits[i], row)
            wanted = row.params.logprobs
            sampled.append(
                SampledToken(
                    token_id=token_id,
                    logprobs=None if wanted is None else logprobs(logits[i], token_id, wanted),
                    sanitized=replaced[i],
                )
            )
        return sampled

    def replaceable(self, params: SamplingParams) -> bool:
        """Whether an executor may sample instead: not if it should ignore the temperature, or
        replace logits that are not finite."""
        greedy = self.greedy and params.temperature > 0
        return self.options.on_nonfinite == "error" and not greedy

    def _make_finite(self, logits: Tensor, row: SamplerRow) -> int:
        """Replace a row's non-finite logits in place; returns how many there were."""
        bad = (~logits.isfinite()).nonzero().squeeze(1).tolist()
        if bad:
            if self.options.on_nonfinite == "error":
                raise NonFiniteLogitsError(row.request_id, row.position, bad, len(logits))
            self._warn(row, len(bad))
            logits.copy_(sanitise(logits))
        return len(bad)

    def _takes_likeliest(self, row: SamplerRow) -> bool:
        return self.greedy or row.params.temperature <= 0.0

    def _choose(self, logits: Tensor, row: SamplerRow) -> int:
        """The token of one row of finite logits, [vocab_size]."""
        params = row.params
        scores = penalise(logits, row) if changes_logits(params) else logits
        if self._takes_likeliest(row):
            return int(scores.argmax())
        return draw(*shortlist(scores, params), uniform(params.seed, row.position))

    def _warn(self, row: SamplerRow, count: int) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"request {row.request_id!r}, step {row.position}: replaced {count} logits that "
                "are not finite; do not rely on the text; later replacements are not reported",
                RuntimeWarning,
                stacklevel=4,
            )


def _suspicious(logits: Tensor) -> list[int]:
    """The rows that may have non-finite logits.

    A sum with a non-finite term is not finite, so one pass finds them; a sum of large finite logits
    may overflow.
    """
    return [row for row, total in enumerate(logits.sum(1).tolist()) if not math.isfinite(total)]


def _likeliest(logits: Tensor, rows: list[int]) -> list[int]:
    """The most likely token of each of some rows; of equal ones the one with the smallest id."""
    if not rows:
        return []
    if len(rows) < len(logits):
        logits = logits[torch.tensor(rows, dtype=torch.int64, device=logits.device)]
    ids: list[int] = logits.argmax(1).tolist()
    return ids
