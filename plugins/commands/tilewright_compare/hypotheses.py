"""Explains a wrong layer: recomputes it with each known bug, and names the bug that reproduces the
candidate's result.

A hypothesis is a function that yields the bugs which a case may have: the name of each, and the
operations that reproduce it. A bug that is yielded more than once has variants, such as sizes of
tiles that change nothing else; the one that explains most counts. An executor's plugin adds its own
hypotheses through the hook ``hypotheses``.
"""

import math
from collections.abc import Container, Generator, Iterable, Sequence
from typing import Literal

import torch
from attrs import evolve, frozen
from torch import Tensor

from tilewright import plugins
from tilewright.types import Hypothesis
from tilewright_compare.judge import row_error
from tilewright_compare.layer import RIGHT, Case, Operations, compute
from tilewright_compare.metrics import difference

EXPLAINED = 5.0
"""Largest excess that a bug may leave and still explain an error, since it may amplify the rounding
that follows it. If it leaves more than 1, all other bugs must leave STANDS_OUT times as much."""
STANDS_OUT = 3.0
RULED_OUT = EXPLAINED * STANDS_OUT
"""A bug with a larger excess, at a stage which is right in the candidate, is ruled out."""
AS_GOOD = 1.5
"""Bugs within this factor of the best one's excess cannot be told from it."""

Confidence = Literal["sure", "likely", "perhaps", "either", "none"]


@frozen(kw_only=True)
class Explanation:
    """A bug, and how well it explains a candidate's result."""

    bug: str
    excess: float
    """Excess of the candidate over a layer with that bug: at 1 or less, rounding explains the rest.
    A lower bound if the bug was RULED_OUT."""


@frozen(kw_only=True)
class Reason:
    """What explains a layer's errors in a step."""

    unexplained: float
    """The excess over the layer without a bug."""
    tried: int
    broken: tuple[str, ...] = ()
    """Hypotheses that failed, and why."""
    best: tuple[Explanation, ...]
    """Best first, without those that explain nothing."""
    refuted: tuple[str, ...] = ()
    """Bugs that explain this step, but not a later one in which the layer is wrong."""

    @property
    def named(self) -> tuple[Explanation, ...]:
        """The best one, and those that are as good; none if it does not explain the errors."""
        left = [e for e in self.best if e.bug not in self.refuted]
        if not left or left[0].excess * AS_GOOD >= self.unexplained or self.unexplained <= 1:
            return ()
        named = [e for e in left if e.excess <= AS_GOOD * left[0].excess]
        others = [e.excess for e in left[len(named) :]] or [self.unexplained]
        if left[0].excess > 1 and not (
            left[0].excess <= EXPLAINED and others[0] >= STANDS_OUT * left[0].excess
        ):
            return ()
        return tuple(named)

    @property
    def next_best(self) -> float:
        """Excess of the best bug that is not named, or without any bug."""
        named = [e.bug for e in self.named]
        others = (e.excess for e in self.best if e.bug not in named)
        return next(others, self.unexplained)

    @property
    def confidence(self) -> Confidence:
        """How much larger ``next_best`` is, in words."""
        if not self.named:
            return "none"
        if len(self.named) > 1:
            return "either"
        times = self.next_best / max(self.named[0].excess, 1.0)
        return "sure" if times >= 5 else "likely" if times >= 1.5 else "perhaps"


def unexplained(case: Case) -> float:
    """Excess of a case over the layer without a bug."""
    return _excess(case, RIGHT, math.inf)


def explain(case: Case, hypotheses: Sequence[Hypothesis]) -> Generator[int, None, Reason]:
    """Try all hypotheses; yields how many bugs were tried so far.

    A hypothesis that raises is listed in ``broken``, and its remaining bugs are skipped.
    """
    nothing = unexplained(case)
    found: dict[str, float] = {}
    tried: set[str] = set()
    broken = []
    for hypothesis in hypotheses:
        try:
            for bug, how in hypothesis(case):
                yield len(tried)
                tried.add(bug)
                excess = _excess(case, how, nothing)
                if excess < min(nothing, found.get(bug, math.inf)):
                    found[bug] = excess
        except Exception as error:
            name = getattr(hypothesis, "__name__", str(hypothesis))
            broken.append(f"hypothesis {name} failed: {plugins.cause(error)}")
    best = sorted((Explanation(bug=b, excess=e) for b, e in found.items()), key=lambda e: e.excess)
    return Reason(unexplained=nothing, tried=len(tried), broken=tuple(broken), best=tuple(best))


def retest(reason: Reason, case: Case, hypotheses: Sequence[Hypothesis]) -> Reason:
    """Try the named bugs in another step in which the layer is wrong, and refute those that do not
    explain it."""
    names = {e.bug for e in reason.named}
    nothing = unexplained(case)
    if not names or nothing <= 1 or case.lost:
        return reason
    found: dict[str, float] = {}
    for bug, how in _named(hypotheses, case, names):
        found[bug] = min(_excess(case, how, nothing), found.get(bug, math.inf))
    most = max(EXPLAINED, AS_GOOD * reason.named[0].excess)
    refuted = [bug for bug, excess in found.items() if excess > most]
    return evolve(reason, refuted=(*reason.refuted, *refuted))


def _named(
    hypotheses: Sequence[Hypothesis], case: Case, names: Container[str]
) -> Iterable[tuple[str, Operations]]:
    for hypothesis in hypotheses:
        try:
            yield from ((name, how) for name, how in hypothesis(case) if name in names)
        except Exception:  # explain() lists it as broken
            continue


def _excess(case: Case, how: Operations, enough: float) -> float:
    """Largest excess of all stages that the candidate taps; infinity once it reaches enough, and
    the largest so far once the bug is ruled out."""
    most = 0.0
    for stage, expected in compute(case, how, case.right):
        found = case.found.get(stage)
        if found is None:
            continue
        if stage == "logits" and expected.isnan().any():
            known = ~expected.isnan().any(0)
            found = found[:, known] if found.shape == expected.shape else found
            expected = expected[:, known]
        if found.shape != expected.shape:
            # A wrong shape does not show how the layer is computed; the head's shows its size.
            if stage == "logits":
                return math.inf
            continue
        if expected is case.right.get(stage):
            excess = right_excess(case, stage)
        else:
            excess = stage_excess(case, stage, found, expected)
        most = max(most, excess)
        if most >= enough:
            return math.inf
        if excess > RULED_OUT and right_excess(case, stage) <= 1:
            return most
    return most


def right_excess(case: Case, stage: str) -> float:
    """Excess of the candidate over the right stage; 0 if the two are not comparable."""
    if stage not in case.kept:
        case.kept[stage] = (
            stage_excess(case, stage, case.found[stage], case.right[stage])
            if case.comparable(stage)
            else 0.0
        )
    return case.kept[stage]


def stage_excess(case: Case, stage: str, found: Tensor, expected: Tensor) -> float:
    """Excess of two tensors of one shape, over the stage's limits, or over a wider tolerance.

    Elements that are not finite must be so in both, and the rows without such elements are
    compared; if there is none, nothing is known.
    """
    if not found.numel():
        return 0.0
    unknown = ~expected.isfinite()
    if stage not in case.limits or not torch.equal(unknown, ~found.isfinite()):
        return math.inf
    if unknown.any():
        known = ~unknown.flatten(1).any(1)
        if not known.any():
            return math.inf
        found, expected = found[known], expected[known]
    off = difference(found, expected)
    excess = case.limits[stage].excess(off, row_error(found, expected))
    tolerance = case.tolerances.get(stage)
    return min(excess, tolerance.excess(off)) if tolerance else excess
