"""Judges whether a tensor is right: its distance from the truth against what rounding costs."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from attrs import define, field, frozen
from torch import Tensor

from tilewright.errors import ConfigError, nearest
from tilewright.types import Phase as Phase
from tilewright_compare.metrics import METRICS, Difference, difference

Mode = Literal["chained", "isolated", "untapped"]
"""Each side on its own outputs, each layer by itself, or a step as an engine runs it, without taps.
"""

FACTOR = 1.5
"""Largest ratio of a candidate's error to the baseline's, over many rows. See ``slack``."""
ROW_FACTOR = 2.5
"""The same for the worst row: the largest of many errors scatters more than their mean."""
FLOOR = {torch.float32: 2e-5, torch.bfloat16: 2e-3, torch.float16: 2.5e-4}
"""Relative RMS that always passes in a candidate's dtype, even where the baseline happens to be
exact: the order of summation in FP32, half a rounding step in 16 bits."""


@frozen(kw_only=True)
class Place:
    """Where in a run a tensor belongs."""

    mode: Mode
    phase: Phase
    step: int
    """From 0, in the order in which they run."""
    tensor: str
    """As docs/tensors.md names it, or ``layers.N.k_cache`` and ``layers.N.v_cache``."""

    @property
    def layer(self) -> int | None:
        head, _, rest = self.tensor.partition(".")
        return int(rest.partition(".")[0]) if head == "layers" else None

    @property
    def stage(self) -> str:
        return self.tensor.rpartition(".")[2]


@frozen(kw_only=True)
class Limits:
    """What the errors of one tensor may be."""

    relative_rms: float
    worst_row: float
    """Relative error of the worst row."""
    gain: float
    """How far the gain may be from 1."""

    def excess(self, found: Difference, worst_row: float) -> float:
        """The error over its limit: above 1 it is too large."""
        if found.more_nonfinite:
            return math.inf
        errors = (found.relative_rms, worst_row, abs(found.gain - 1))
        limits = (self.relative_rms, self.worst_row, self.gain)
        return max(e / at_most if e > 0 else 0.0 for e, at_most in zip(errors, limits, strict=True))

    def why(self, found: Difference, worst_row: float) -> str:
        """What is wrong with an error that is too large, in words."""
        if found.more_nonfinite:
            return _not_finite(found)
        if found.relative_rms > self.relative_rms:
            return (
                f"its error is {found.relative_rms:.2g}, where rounding explains "
                f"{self.relative_rms:.2g}"
            )
        if abs(found.gain - 1) > self.gain:
            return f"it is {found.gain:.5f} times as large as it should be"
        return f"a row's error is {worst_row:.2g}, where rounding explains {self.worst_row:.2g}"


_OF_NAN = {
    **dict.fromkeys(("k_cache", "v_cache"), ": slots hold NaN until they are written"),
    **dict.fromkeys(
        ("attention", "o_proj", "output"),
        ", such as NaN, which slots of the cache hold until they are written",
    ),
}
"""What NaN may come from, keyed by stage."""


def _not_finite(found: Difference) -> str:
    return f"{found.candidate_nonfinite} of {found.elements} elements are not finite"


HIGHER_IS_BETTER = ("cosine",)


@frozen
class Tolerance:
    """A limit set by the user, in place of what rounding explains."""

    pattern: str
    """Pattern of tensor names, with * and ?: ``layers.*.attention``."""
    metric: str = field()
    """A figure of ``Difference``."""
    bound: float = field()
    """Largest value; for ``cosine``, the smallest."""

    @metric.validator
    def _known(self, attribute: object, value: str) -> None:
        if value not in METRICS:
            raise ConfigError(
                f"tolerance {self.pattern!r}: no figure is named {value!r}"
                f"{nearest(value, METRICS)} (figures: {', '.join(METRICS)})"
            )

    @bound.validator
    def _in_range(self, attribute: object, value: float) -> None:
        most = 1.0 if self.metric in HIGHER_IS_BETTER else math.inf
        if not 0 <= value <= most:
            raise ConfigError(
                f"tolerance {self.pattern!r}: expected a bound from 0 to {most:g} on "
                f"{self.metric}, found {value:g}"
            )

    def __str__(self) -> str:
        sign = ">=" if self.metric in HIGHER_IS_BETTER else "<="
        return f"{self.pattern}: {self.metric} {sign} {self.bound:g}"

    def excess(self, found: Difference) -> float:
        """The figure over its bound (for ``cosine``, of the distances from 1): above 1 it fails."""
        if found.more_nonfinite:
            return math.inf
        value, bound = getattr(found, self.metric), self.bound
        if self.metric in HIGHER_IS_BETTER:
            value, bound = 1 - value, 1 - bound
        return float(value / bound if bound > 0 else math.inf if value > bound else 0.0)

    def why(self, found: Difference) -> str:
        if found.more_nonfinite:
            return _not_finite(found)
        least = "at least" if self.metric in HIGHER_IS_BETTER else "at most"
        value = getattr(found, self.metric)
        return f"its {self.metric} is {value:.6g}, where {least} {self.bound:g} is tolerated"


@frozen(kw_only=True)
class Finding:
    """One tensor of one step, judged."""

    place: Place
    passed: bool
    why: str
    """Reason in words if it did not pass; else empty."""
    candidate: Difference | None = None
    """Difference from the truth, or what ``judge_bits`` measures. None: there was nothing to
    measure."""
    baseline: Difference | None = None
    rows: int = 0
    """Rows of the tensor; 0 where there was nothing to measure."""
    worst_row: tuple[float, float] = field(default=(0.0, 0.0))
    """Relative error of the worst row, of the candidate and of the baseline."""
    limits: Limits | None = None
    """What rounding explains."""
    tolerance: Tolerance | None = None
    """The user's limit, which applies instead."""
    excess: float = math.inf
    """The candidate's error over its limit: above 1 it is too large."""
    pattern: str = ""
    """Which part of the tensor is wrong, in words; empty if no part is clear-cut."""
    where: str = ""
    """The worst element's place in the KV cache, in words; empty for other tensors."""

    @property
    def limit(self) -> float:
        """The largest candidate.relative_rms that rounding explains."""
        return self.limits.relative_rms if self.limits else 0.0


@define(kw_only=True)
class Noise:
    """Error of the baseline at one tensor, over the steps so far.

    Errors are correlated within a row, and hardly between rows: in a decode step of few rows the
    baseline may be near the truth by luck.
    """

    squares: float = 0.0
    rows: int = 0
    worst_row: float = 0.0

    def add(self, relative_rms: float, worst_row: float, rows: int) -> None:
        self.squares += rows * relative_rms**2
        self.rows += rows
        self.worst_row = max(self.worst_row, worst_row)

    @property
    def relative_rms(self) -> float:
        return math.sqrt(self.squares / self.rows) if self.rows else 0.0


SCATTER: dict[Mode, float] = {"isolated": 1.0, "chained": 2.0, "untapped": 2.0}
"""Spread of one row's error over its mean: larger where layers have amplified the error."""


ELEMENT_SCATTER = 2.0
"""The same of one element's error. It is one number: with FACTOR, an element that has all of a
tensor's norm may have 4.5 standard deviations."""


def slack(mode: Mode, rows: float, elements: float = math.inf) -> float:
    """Factor by which a limit is widened where an error is measured on few rows, or where few
    elements have nearly all of the tensor's norm."""
    return 1 + max(SCATTER[mode] / math.sqrt(rows), ELEMENT_SCATTER / math.sqrt(elements))


def judge(
    place: Place,
    candidate: "Tensor | None",
    baseline: Tensor,
    truth: Tensor,
    noise: Noise,
    tolerance: Tolerance | None = None,
) -> Finding:
    """A candidate passes when it is hardly farther from the truth than the baseline is.

    noise: the tensor's noise in the earlier steps of the same mode; this step's is added.
    tolerance: decides instead, if given.
    """
    if candidate is None:
        return Finding(place=place, passed=False, why="the candidate has no such tensor")
    floor = FLOOR.get(candidate.dtype, FLOOR[torch.float32])
    if place.stage == "logits":  # float32 by contract, computed in the weights' dtype
        floor = FLOOR.get(baseline.dtype, floor)
    near, worst_row = difference(baseline, truth), row_error(baseline, truth)
    squares = _finite_squares(truth)
    even = participation(squares.sum(1))
    usual = usual_error(baseline, truth)
    rounding = _expected(near.relative_rms, usual[0], even)
    noise.add(rounding, _expected(worst_row, usual[1], even), len(truth))
    wider = slack(place.mode, even, participation(squares))
    limit = max(FACTOR * wider * max(rounding, noise.relative_rms), floor)
    limits = Limits(
        relative_rms=limit,
        worst_row=max(ROW_FACTOR * wider * noise.worst_row, 4 * floor),
        # Rounding errors point in random directions, so they hardly change the tensor's norm.
        gain=max(2 * limit / math.sqrt(even), FACTOR * abs(near.gain - 1)),
    )
    if candidate.shape != truth.shape:
        why = f"its shape is {list(candidate.shape)}, expected {list(truth.shape)}"
        return Finding(place=place, passed=False, why=why, limits=limits)
    found = difference(candidate, truth)
    rows = row_error(candidate, truth), worst_row
    excess = tolerance.excess(found) if tolerance else limits.excess(found, rows[0])
    why = ""
    if excess > 1:
        why = tolerance.why(found) if tolerance else limits.why(found, rows[0])
        if found.more_nonfinite and math.isnan(found.candidate_at_worst):
            why += _OF_NAN.get(place.stage, "")
    return Finding(
        place=place,
        passed=not why,
        why=why,
        candidate=found,
        baseline=near,
        rows=len(truth),
        worst_row=rows,
        limits=limits,
        tolerance=tolerance,
        excess=excess,
    )


def judge_bits(place: Place, untapped: Tensor, tapped: Tensor) -> Finding:
    """A tensor of a run without taps passes when it has the bits of the run with taps.

    ``candidate`` is its difference from the run with taps; there is no baseline.
    """
    if (untapped.shape, untapped.dtype) != (tapped.shape, tapped.dtype):
        why = (
            f"its shape is {list(untapped.shape)} in {untapped.dtype}, and with taps "
            f"{list(tapped.shape)} in {tapped.dtype}"
        )
        return Finding(place=place, passed=False, why=why)
    ours, theirs = (
        t.contiguous().view(torch.uint8).view(*t.shape, t.itemsize) for t in (untapped, tapped)
    )
    wrong = int((ours != theirs).any(-1).sum())
    return Finding(
        place=place,
        passed=not wrong,
        why=f"{wrong} of {tapped.numel()} elements differ from the run with taps, though the "
        "executor's limits.tap_exact says that a tap changes no bit"
        if wrong
        else "",
        candidate=difference(untapped, tapped),
        rows=len(tapped),
        excess=math.inf if wrong else 0.0,
    )


def row_error(tensor: Tensor, truth: Tensor) -> float:
    """The largest of the rows' error norms, over the root mean square of the truth's row norms."""
    error = (tensor.double() - truth.double()).flatten(1).norm(dim=1)
    norm = truth.double().flatten(1).norm(dim=1).pow(2).mean().sqrt()
    return float(error.nan_to_num(nan=float("inf")).max() / norm) if norm else 0.0


def participation(squares: Tensor) -> float:
    """How many equal squares would scatter as much as these: the participation ratio, the square
    of their sum over the sum of their squares. From 1, if one has nearly all of the sum, to their
    number, if they are equal or all 0."""
    if not squares.any():
        return float(squares.numel())
    parts = squares / squares.max()
    return float(parts.sum().square() / parts.square().sum())


def usual_error(baseline: Tensor, truth: Tensor) -> tuple[float, float]:
    """The relative error, of the whole and of the worst row as ``row_error`` has it, if each row's
    error over its norm were the median of its elements' relative errors.

    For normally distributed elements and errors, that median is the ratio of their standard
    deviations, so the two are the same. Where one element has a row's norm, the row's error is that
    element's, which may be small by luck; the median is not.
    """
    squares = _finite_squares(truth)
    norms = squares.sum(1)
    if not norms.any():
        return 0.0, 0.0
    errors = _finite_squares(baseline.double() - truth.double())
    ratios = (errors / squares.where(squares > 0, 1.0)).median(1).values
    shares = ratios * norms / norms.mean()
    return float(shares.mean().sqrt()), float(shares.max().sqrt())


def _finite_squares(tensor: Tensor) -> Tensor:
    """[rows, elements of a row], float64; 0 for elements that are not finite."""
    return tensor.double().flatten(1).square().nan_to_num(nan=0.0, posinf=0.0)


def _expected(error: float, usual: float, rows: float) -> float:
    """The error of another run that rounds as the baseline does: the baseline's, or more if that is
    less than usual. The mean of n squares of normal numbers has a relative variance of 2 / n; that
    is the share of the usual error, in squares. On one or two rows it is all of it."""
    return math.sqrt(error**2 + min(2 / rows, 1.0) * max(usual**2 - error**2, 0.0))


@frozen(kw_only=True)
class Perplexity:
    """Perplexity of all prompts together."""

    truth: float
    baseline: float
    candidate: float
    limit: float | None = None
    """The largest |ln(candidate / truth)| that rounding explains; None: it is not judged, because a
    tolerance decides about the logits."""

    @property
    def passed(self) -> bool:
        if self.limit is None:
            return True
        return self.candidate > 0 and abs(math.log(self.candidate / self.truth)) <= self.limit

    @property
    def why(self) -> str:
        if self.passed or self.limit is None:
            return ""
        low, high = (self.truth * math.exp(sign * self.limit) for sign in (-1, 1))
        return (
            f"the candidate's perplexity of the prompts is {self.candidate:.6g}, where the truth's "
            f"is {self.truth:.6g} and rounding explains {low:.6g} to {high:.6g}"
        )


def judge_perplexity(
    candidate: Tensor,
    baseline: Tensor,
    truth: Tensor,
    noise: Sequence[float],
    floor: float,
    judged: bool = True,
) -> Perplexity | None:
    """candidate, baseline, truth: [2] float64, negative log-likelihood of the same prompt tokens in
    nats, and their number. noise: the baseline's largest error in a logit, of each compared row.
    floor: as in FLOOR. judged: whether the result has a limit. None if there is no token to score.

    Errors of logits up to e change a token's log-likelihood by at most 2 e. If the errors of n
    tokens are independent, as those of rounding are, the standard deviation of their mean is at
    most 2 e / sqrt(n). The limit is FACTOR times the largest of that, the baseline's own error, and
    floor, relative to the truth's loss where that is above 1.
    """
    tokens = float(truth[1])
    if not tokens or not candidate[1]:
        return None
    ours, near, true = (float(nll[0]) / tokens for nll in (candidate, baseline, truth))
    error = math.sqrt(sum(e * e for e in noise) / len(noise)) if noise else 0.0
    scatter = 2 * error / math.sqrt(tokens)
    limit = FACTOR * max(abs(near - true), scatter, floor * max(true, 1.0))
    return Perplexity(
        truth=_exp(true),
        baseline=_exp(near),
        candidate=_exp(ours),
        limit=limit if judged else None,
    )


def perplexity(nll: Tensor) -> float | None:
    """nll: [2] float64, negative log-likelihood in nats, and the tokens. None without tokens."""
    return _exp(float(nll[0]) / float(nll[1])) if nll[1] else None


def _exp(nats: float) -> float:
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


@frozen(kw_only=True)
class LogitsAgreement:
    """One row of logits of a step, candidate against truth."""

    step: int
    request: int
    same_argmax: bool
    top_5: float
    """Share of the truth's five likeliest tokens that are among the candidate's."""
    top_50: float
    kl: float
    """Kullback-Leibler divergence of the candidate's distribution from the truth's, in nats."""
    margin: float
    """Gap between the truth's two largest logits."""
    error: float
    """The candidate's largest error in a logit."""
    noise: float
    """The baseline's largest error in a logit: what rounding costs."""

    @property
    def near_tie(self) -> bool:
        """Whether rounding could swap the truth's two likeliest tokens."""
        return self.margin < 2 * self.noise


def logits_agreement(
    step: int, requests: Sequence[int], candidate: Tensor, baseline: Tensor, truth: Tensor
) -> list[LogitsAgreement]:
    """candidate, baseline and truth: [L, vocab_size], one row per request."""
    found = []
    rows = (candidate.double(), baseline.double(), truth.double())
    for request, ours, near, theirs in zip(requests, *rows, strict=True):
        top = theirs.topk(min(2, len(theirs))).values
        p, q = theirs.log_softmax(-1), ours.log_softmax(-1)
        found.append(
            LogitsAgreement(
                step=step,
                request=request,
                same_argmax=bool(ours.argmax() == theirs.argmax()),
                top_5=_shared(ours, theirs, 5),
                top_50=_shared(ours, theirs, 50),
                kl=float((p.exp() * (p - q)).sum()),
                margin=float(top[0] - top[-1]),
                error=float((ours - theirs).abs().max()),
                noise=float((near - theirs).abs().max()),
            )
        )
    return found


def _shared(a: Tensor, b: Tensor, k: int) -> float:
    k = min(k, len(a))
    return len(set(a.topk(k).indices.tolist()) & set(b.topk(k).indices.tolist())) / k
