"""The steps from one row of logits to a token, one function each.

Rows are [V] float32, on any device; results are on the same device. Each function works on a
single row, so a result cannot depend on the rest of the batch. Among equal values, the smaller id
comes first.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from tilewright.errors import RequestError
from tilewright.types import SamplerRow, SamplingParams, TokenLogprobs

_LARGEST = torch.finfo(torch.float32).max
TEMPERATURES = (1e-30, 1e30)  # float32 would round values far outside to 0 or infinity


def sanitise(logits: Tensor) -> Tensor:
    """A copy with NaN and -inf replaced by the row's lowest finite logit, +inf by its highest.

    A row with no finite logit becomes 0 everywhere.
    """
    finite = logits[logits.isfinite()]
    low, high = (finite.min().item(), finite.max().item()) if len(finite) else (0.0, 0.0)
    return logits.nan_to_num(nan=low, posinf=high, neginf=low)


def changes_logits(params: SamplingParams) -> bool:
    """Whether ``penalise`` changes anything for these settings."""
    return bool(
        params.repetition_penalty != 1.0
        or params.presence_penalty
        or params.frequency_penalty
        or params.logit_bias
    )


def penalise(logits: Tensor, row: SamplerRow) -> Tensor:
    """A copy of the row with repetition, presence and frequency penalties and logit bias applied.

    In this order:

    1. repetition penalty, over prompt and output: positive logits are divided by it, others
       multiplied (CTRL, Keskar et al. 2019; as in transformers);
    2. presence and frequency penalties, over the output only: ``presence + frequency * count`` is
       subtracted (as in OpenAI's API and vLLM);
    3. logit bias, added. -inf forbids a token.

    Raises RequestError for a bias of an id outside the vocabulary, of NaN or +inf, or of -inf on
    every token.
    """
    params, scores = row.params, logits.clone()
    if params.repetition_penalty != 1.0:
        ids = _ids({*row.prompt_token_ids, *row.output_token_ids}, scores)
        seen = scores[ids].double()
        penalty = params.repetition_penalty
        _put(scores, ids, torch.where(seen > 0, seen / penalty, seen * penalty))
    if (params.presence_penalty or params.frequency_penalty) and row.output_token_ids:
        counts = Counter(row.output_token_ids)
        ids = _ids(counts, scores)
        amounts = params.frequency_penalty * _values(counts, scores) + params.presence_penalty
        _put(scores, ids, scores[ids].double() - amounts)
    if params.logit_bias:
        _check_bias(row, len(scores))
        ids = _ids(params.logit_bias, scores)
        bias = _values(params.logit_bias, scores)
        _put(scores, ids, scores[ids].double() + bias)
        scores[ids[bias == -math.inf]] = -math.inf
        if scores.max() == -math.inf:
            raise RequestError(
                f"request {row.request_id!r}: logit_bias forbids every token: allow at least one"
            )
    return scores


def _ids(ids: Iterable[int], scores: Tensor) -> Tensor:
    return torch.tensor(list(ids), dtype=torch.int64, device=scores.device)


def _values(by_id: Mapping[int, float], scores: Tensor) -> Tensor:
    return torch.tensor(list(by_id.values()), dtype=torch.float64, device=scores.device)


def _put(scores: Tensor, ids: Tensor, values: Tensor) -> None:
    # Extreme settings must not produce infinities, which later turn into NaN.
    scores[ids] = values.clamp(-_LARGEST, _LARGEST).float()


def _check_bias(row: SamplerRow, vocab_size: int) -> None:
    for token_id, value in row.params.logit_bias.items():
        if not 0 <= token_id < vocab_size:
            raise RequestError(
                f"request {row.request_id!r}: logit_bias has token id {token_id}: expected an id "
                f"of the model's vocabulary, 0 to {vocab_size - 1}"
            )
        if math.isnan(value) or value == math.inf:
            raise RequestError(
                f"request {row.request_id!r}: logit_bias of token id {token_id} is {value}: "
                "expected a finite number, or -inf to forbid the token"
            )


def largest(values: Tensor, k: int) -> Tensor:
    """The ids of the k largest values, [k] int64, largest first."""
    ids = (values >= values.topk(k, sorted=False).values.min()).nonzero().squeeze(1)
    return ids[_descending(values[ids])][:k]


def _descending(values: Tensor) -> Tensor:
    return values.sort(descending=True, stable=True).indices


def shortlist(scores: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """The tokens to draw from and their probabilities, for a temperature above 0.

    temperature is applied first, then top_k, top_p and min_p, each to the tokens that the previous
    one left. As in transformers, the token that crosses top_p stays, and min_p is relative to the
    most likely token. Among equally likely tokens at a cutoff, the smaller ids stay.

    Returns ids [n] int64, from the most likely to the least with top_k or top_p and else ascending,
    and weights [n] float32, the probabilities times a constant.
    """
    vocab_size = len(scores)
    top = scores.max()
    ids = None
    if 0 < params.top_k < vocab_size:
        ids = largest(scores, params.top_k)
        scores = scores[ids]
    low, high = TEMPERATURES
    weights = ((scores - top) / min(max(params.temperature, low), high)).exp()
    if params.top_p < 1.0:
        total = weights.sum(dtype=torch.float64).item()
        if ids is None:
            # All weights below this sum to less than 1 - top_p, so only the rest needs sorting.
            floor = (1.0 - params.top_p) * total / vocab_size
            ids = (weights >= floor).nonzero().squeeze(1)
            ids = ids[_descending(scores[ids])]
            weights = weights[ids]
        reached = torch.searchsorted(weights.cumsum(0, dtype=torch.float64), params.top_p * total)
        ids, weights = ids[: reached + 1], weights[: reached + 1]
    if params.min_p > 0.0:
        likely = (weights >= params.min_p).nonzero().squeeze(1)
        ids = likely if ids is None else ids[likely]
        weights = weights[likely]
    if ids is None:
        ids = torch.arange(vocab_size, device=scores.device)
    return ids, weights


def draw(ids: Tensor, weights: Tensor, u: float) -> int:
    """The token at u, 0 <= u <= 1, of the cumulative distribution. Weights of 0 are never drawn."""
    cumulative = weights.cumsum(0, dtype=torch.float64)
    total = cumulative[-1].item()
    # Strictly below the total, the first sum above it belongs to a token that adds to the sum.
    below = min(u * total, math.nextafter(total, 0.0))
    return int(ids[torch.searchsorted(cumulative, below, right=True)])


def logprobs(logits: Tensor, token_id: int, count: int) -> TokenLogprobs:
    """Log-probabilities, from the raw logits, of the chosen and of the ``count`` most likely."""
    values = logits.log_softmax(0)
    top = largest(logits, min(count, len(logits))) if count else logits.new_empty(0).long()
    return TokenLogprobs(
        token_id=token_id,
        logprob=values[token_id].item(),
        top=tuple(zip(top.tolist(), values[top].tolist(), strict=True)),
    )
