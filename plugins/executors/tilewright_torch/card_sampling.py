"""Sampling on the device that computed the logits, without waiting for it.

The tokens are those of the samplers in ``tilewright_sampling``, from the same number
``tilewright.sampling.uniform(seed, position)``; only exponentials and sums may round otherwise on
another device, which matters when the number falls between two tokens' cumulative weights.
"""

from collections.abc import Callable, Sequence
from math import inf

import torch
import torch.nn.functional as F
from torch import Tensor

from tilewright.sampling import uniform
from tilewright.types import SamplerRow, SamplingParams
from tilewright_sampling.logits import TEMPERATURES, changes_logits

Send = Callable[[Tensor], Tensor]
"""Copies a CPU tensor to the device, without waiting."""

CHUNK = 128
"""Neighbouring ids whose scores are compared first by their maximum."""


def serves(params: SamplingParams) -> bool:
    """Whether ``choose`` samples with these parameters: no penalties, bias or log-probabilities."""
    return params.logprobs is None and not changes_logits(params)


def choose(logits: Tensor, rows: Sequence[SamplerRow | None], send: Send) -> Tensor:
    """The tokens [L] int64 of logits [L, vocab_size] float32; of a row that is None, any token.

    Logits that are not finite give tokens of the vocabulary, but no certain ones.
    """
    vocab_size = logits.shape[1]
    lowest, highest = TEMPERATURES
    groups = _grouped(rows, vocab_size)
    chosen = None
    for draw, group in groups:
        settings = [
            (
                i,
                uniform(row.params.seed, row.position),
                min(max(row.params.temperature, lowest), highest),
                _most(row.params, vocab_size),
                row.params.top_p if row.params.top_p < 1.0 else inf,
                row.params.min_p,
            )
            for i, row in group
        ]
        numbers = send(torch.tensor(settings, dtype=torch.float64).t().contiguous())
        most = max(_most(row.params, vocab_size) for _, row in group)
        if len(group) == len(rows):
            return draw(logits, numbers[1:].unsqueeze(2), most)
        places = numbers[0].long()
        tokens = draw(logits.index_select(0, places), numbers[1:].unsqueeze(2), most)
        chosen = logits.argmax(1) if chosen is None else chosen
        chosen.index_copy_(0, places, tokens)
    return logits.argmax(1) if chosen is None else chosen


Draw = Callable[[Tensor, Tensor, int], Tensor]


def _most(params: SamplingParams, vocab_size: int) -> int:
    """How many of the most likely tokens top_k leaves."""
    return params.top_k if 0 < params.top_k < vocab_size else vocab_size


def _grouped(
    rows: Sequence[SamplerRow | None], vocab_size: int
) -> list[tuple[Draw, list[tuple[int, SamplerRow]]]]:
    """The rows that draw, by what must be sorted: nothing, what top_k leaves, all for top_p."""
    groups: dict[str, list[tuple[int, SamplerRow]]] = {}
    for i, row in enumerate(rows):
        if row and row.params.temperature > 0:
            kind = "top_k" if _most(row.params, vocab_size) < vocab_size else "top_p"
            if kind == "top_p" and row.params.top_p >= 1.0:
                kind = "neither"
            groups.setdefault(kind, []).append((i, row))
    return [
        (_from_all if kind == "neither" else _from_most_likely, group)
        for kind, group in groups.items()
    ]


def _from_all(scores: Tensor, numbers: Tensor, most: int) -> Tensor:
    """Draw a token [R] from each row of scores [R, V], in the order of ids.

    numbers: [5, R, 1] float64: uniform number, temperature, top_k, top_p and min_p of each row.
    most: the largest top_k, which is V where one is not set.
    """
    u, temperature, _, _, min_p = numbers
    weights = _weights(scores, scores.amax(1, keepdim=True), temperature)
    return _place(torch.where(weights >= min_p.float(), weights, 0.0), u).squeeze(1)


def _from_most_likely(scores: Tensor, numbers: Tensor, most: int) -> Tensor:
    """The same among the ``most`` most likely tokens, from the most likely to the least."""
    u, temperature, top_k, top_p, min_p = numbers
    values, ids = _largest(scores, most)
    weights = _weights(values, values[:, :1], temperature)
    rank = torch.arange(most, device=scores.device)
    weights = torch.where(rank < top_k, weights, 0.0)
    cumulative = weights.cumsum(1, dtype=torch.float64)
    total = weights.sum(1, keepdim=True, dtype=torch.float64)
    crossing = torch.searchsorted(cumulative, top_p * total)
    kept = (rank <= crossing) & (weights >= min_p.float())
    place = _place(torch.where(kept, weights, 0.0), u)
    return ids.gather(1, place).squeeze(1)


def _largest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest scores of each row and their ids, [R, k], largest first, of equal ones the
    smaller id first.

    The k largest are in the k chunks of ids that have the largest maxima: only those are sorted,
    where that is much less than all.
    """
    size = scores.shape[1]
    if 2 * k * CHUNK > size:
        values, ids = _sorted(scores)
        return values[:, :k], ids[:, :k]
    chunks = F.pad(scores, (0, -size % CHUNK), value=-inf) if size % CHUNK else scores
    chunks = chunks.view(len(scores), -1, CHUNK)
    best = _sorted(chunks.amax(2))[1][:, :k].sort(1).values
    values, order = _sorted(chunks.gather(1, best.unsqueeze(2).expand(-1, -1, CHUNK)).flatten(1))
    order = order[:, :k]
    ids = best.gather(1, order // CHUNK) * CHUNK + order % CHUNK
    return values[:, :k], ids.clamp(max=size - 1)  # of logits that are not finite


def _sorted(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Scores [R, n], largest first, and their places; 0.0 and -0.0 are equal."""
    values, places = (scores + 0.0).sort(dim=1, descending=True, stable=True)
    return values, places


def _weights(scores: Tensor, top: Tensor, temperature: Tensor) -> Tensor:
    return ((scores - top) / temperature.float()).exp()


def _place(weights: Tensor, u: Tensor) -> Tensor:
    """Where u [R, 1] falls in each row's cumulative weights, [R, 1]; never at a weight of 0."""
    cumulative = weights.cumsum(1, dtype=torch.float64)
    total = cumulative[:, -1:]
    below = torch.minimum(u * total, torch.nextafter(total, torch.zeros_like(total)))
    place = torch.searchsorted(cumulative, below, right=True)
    return place.clamp(max=weights.shape[1] - 1)  # of logits that are not finite
