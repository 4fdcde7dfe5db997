"""Known bugs of norms, as hypotheses."""

import math
from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from tilewright_compare.bugs_tiles import TILES
from tilewright_compare.hypotheses import right_excess
from tilewright_compare.layer import NORM_WEIGHTS, Case, Norm, Operations, rms_norm

Change: TypeAlias = Callable[[Tensor], Tensor]


def _layer_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, None, eps)


def _over_tokens(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * (x.pow(2).mean(0, keepdim=True) + eps).rsqrt() * weight


def _over_heads(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * (x.pow(2).mean((-2, -1), keepdim=True) + eps).rsqrt() * weight


def _sum_for_mean(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * (x.pow(2).sum(-1, keepdim=True) + eps).rsqrt() * weight


def with_eps(eps: float) -> Callable[[Tensor, Tensor, float], Tensor]:
    return lambda x, weight, _: rms_norm(x, weight, eps)


def _of_squares(
    squares: Callable[[Tensor], Tensor], divisor: Callable[[int], float] = float
) -> Norm:
    """A norm whose mean is the sum of some squares, divided by a number that follows from size."""

    def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        mean = squares(x.pow(2)).sum(-1, keepdim=True) / divisor(x.shape[-1])
        return x * (mean + eps).rsqrt() * weight

    return norm


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    first, second = x.chunk(2, -1)
    return first, second


def without(columns: int) -> Change:
    """Zeros in place of the last columns."""
    return lambda x: torch.cat((x[..., :-columns], torch.zeros_like(x[..., -columns:])), -1)


def _only_half(which: int) -> Norm:
    """Norms one half of the dimensions; the other is multiplied by the weight only."""

    def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        halves = list(_halves(x * weight))
        halves[which] = _halves(rms_norm(x, weight, eps))[which]
        return torch.cat(halves, -1)

    return norm


def _weight_of_half(which: int) -> Norm:
    return lambda x, weight, eps: rms_norm(x, _halves(weight)[which].repeat(2), eps)


NORMS_IN_PARTS: dict[str, Norm] = {
    "{} divides the sum of squares by half its size": _of_squares(lambda s: s, lambda n: n / 2),
    "{} divides the sum of squares by twice its size": _of_squares(lambda s: s, lambda n: 2 * n),
    "{} takes the mean over the first half only": _of_squares(
        lambda s: _halves(s)[0], lambda n: n / 2
    ),
    "{} takes the mean over the second half only": _of_squares(
        lambda s: _halves(s)[1], lambda n: n / 2
    ),
    "{} leaves the second half's squares out of the mean": _of_squares(lambda s: _halves(s)[0]),
    "{} leaves the first half's squares out of the mean": _of_squares(lambda s: _halves(s)[1]),
    "{} norms the first half only": _only_half(0),
    "{} norms the second half only": _only_half(1),
    "{} has the first half's weight in both halves": _weight_of_half(0),
    "{} has the second half's weight in both halves": _weight_of_half(1),
}


def norms_in_parts(case: Case) -> Iterator[tuple[str, Operations]]:
    """Norms over a part of a head, and those of rows without a tile of columns."""
    stages = [s for s, name in NORM_WEIGHTS.items() if name in case.weights]
    heads = [s for s in stages if s in ("q_norm", "k_norm")]
    rows = [s for s in stages if s not in heads]
    size = case.hidden.shape[-1]
    for together, what in (
        *(([s], s) for s in stages),
        (heads, "each of q_norm and k_norm"),
        (rows, f"each of {' and '.join(rows)}"),
    ):
        if not together or (len(together) == 1 and what not in stages):
            continue
        for bug, norm in NORMS_IN_PARTS.items():
            yield bug.format(what), Operations(norms=dict.fromkeys(together, norm))
        for columns in TILES if together[0] in rows else ():
            if columns < size:
                yield (
                    f"{what} leaves the last {columns} columns out of the mean",
                    Operations(norms=dict.fromkeys(together, _of_squares(without(columns)))),
                )


NORMS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "{} is missing": lambda x, weight, eps: x,
    "{} is without its weight": lambda x, weight, eps: rms_norm(x, torch.ones_like(weight), eps),
    "{} has 1 added to its weight": lambda x, weight, eps: rms_norm(x, weight + 1, eps),
    "{} is taken over tokens, not over a token's values": _over_tokens,
    "{} subtracts the mean, as LayerNorm": _layer_norm,
    "{} divides by the root of the sum, not of the mean": _sum_for_mean,
}


def norms(case: Case) -> Iterator[tuple[str, Operations]]:
    stages = [s for s, name in NORM_WEIGHTS.items() if name in case.weights]
    per_head = [s for s in stages if s in ("q_norm", "k_norm")]
    for stage in stages:
        for what, norm in NORMS.items():
            yield what.format(stage), Operations(norms={stage: norm})
        for eps in _eps(case, stage):
            yield (
                f"{stage} has an eps of about {eps:.2g}, not {case.config.norm_eps:g}",
                Operations(norms={stage: with_eps(eps)}),
            )
    for stage in per_head:
        yield f"{stage} is taken over all heads together", Operations(norms={stage: _over_heads})
    if per_head:
        yield "q_norm and k_norm come after RoPE", Operations(norm_after_rope=True)
        for what, norm in NORMS.items():
            yield (
                what.format("each of q_norm and k_norm"),
                Operations(norms=dict.fromkeys(per_head, norm)),
            )


def _eps(case: Case, stage: str) -> list[float]:
    """The best-fitting eps where the stage is tapped, else those that models have."""
    config = case.config
    if not case.comparable(stage):
        return [eps for eps in (0.0, 1e-8, 1e-6, 1e-5, 1e-3) if eps != config.norm_eps]
    if right_excess(case, stage) <= 1:
        return []
    before = {"q_norm": "q_proj", "k_norm": "k_proj", "mlp_norm": "attn_residual"}
    x = case.right[before[stage]] if stage in before else case.hidden.float()

    def error(log_eps: float) -> float:
        made = rms_norm(x, case.weights[NORM_WEIGHTS[stage]], math.exp(log_eps))
        return float((case.found[stage].float() - made).norm())

    best = least(error, math.log(1e-9), math.log(10.0))
    return [math.exp(best)] if error(best) < error(math.log(config.norm_eps)) else []


def least(error: Callable[[float], float], low: float, high: float) -> float:
    """Minimum of error: a grid search, refined three times around the best point."""
    for _ in range(4):
        step = (high - low) / 40
        grid = [low + step * i for i in range(41)]
        best = min(grid, key=error)
        low, high = best - step, best + step
    return best
