"""The sampler behind both plugins."""

import math
import warnings
from collections.abc import Sequence
from typing import Literal

from attrs import field, frozen, validators
from torch import Tensor

from tilewright.errors import NonFiniteLogitsError
from tilewright.types import SampledToken, SamplerRow
from tilewright_sampling.logits import (
    changes_logits,
    draw,
    logprobs,
    penalise,
    sanitise,
    shortlist,
    uniform,
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

    A step checks for non-finite logits; applies the penalties and the bias (``logits.penalise``);
    then either takes the most likely token, at temperature 0 or with ``greedy``, or applies
    temperature, top_k, top_p and min_p (``logits.shortlist``) and draws. The draw depends on the
    request's seed and on the number of tokens it has generated.
    """

    def __init__(self, options: Options, greedy: bool):
        self.options = options
        self.greedy = greedy
        self._warned = False

    def sample(self, logits: Tensor, rows: Sequence[SamplerRow]) -> list[SampledToken]:
        """Sample B tokens from logits [B, vocab_size] float32 on the CPU.

        With ``on_nonfinite="sanitize"`` non-finite logits are replaced (``logits.sanitise``), with
        a RuntimeWarning the first time.

        Raises NonFiniteLogitsError for the first row with such logits, and RequestError for an
        invalid logit_bias (``logits.penalise``).
        """
        # A sum with a non-finite term is not finite, so one pass shows that all logits are finite.
        suspicious = not math.isfinite(logits.sum().item())
        return [
            self._sample(row_logits, row, suspicious)
            for row_logits, row in zip(logits, rows, strict=True)
        ]

    def _sample(self, logits: Tensor, row: SamplerRow, suspicious: bool) -> SampledToken:
        params, step = row.params, len(row.output_token_ids)
        replaced = 0
        if suspicious and (bad := (~logits.isfinite()).nonzero().squeeze(1).tolist()):
            if self.options.on_nonfinite == "error":
                raise NonFiniteLogitsError(row.request_id, step, bad, len(logits))
            self._warn(row.request_id, step, len(bad))
            logits, replaced = sanitise(logits), len(bad)
        scores = penalise(logits, row) if changes_logits(params) else logits
        if params.temperature > 0.0 and not self.greedy:
            token_id = draw(*shortlist(scores, params), uniform(params.seed, step))
        else:
            token_id = int(scores.argmax())
        wanted = params.logprobs
        return SampledToken(
            token_id=token_id,
            logprobs=None if wanted is None else logprobs(logits, token_id, wanted),
            sanitized=replaced,
        )

    def _warn(self, request_id: str, step: int, count: int) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"request {request_id!r}, step {step}: replaced {count} logits that are not "
                "finite; do not rely on the text; later replacements are not reported",
                RuntimeWarning,
                stacklevel=4,
            )
