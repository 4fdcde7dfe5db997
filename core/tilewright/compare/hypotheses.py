"""Why a layer is wrong: it is computed anew under each known mistake, and the one is named that
gives what the candidate gave.

A hypothesis is a function that yields mistakes which a case may have: what to call each, and the
operations that make it. An executor's plugin adds its own through the hook ``hypotheses``.
"""

import math
from collections.abc import Container, Generator, Iterable, Sequence
from typing import Literal

from attrs import evolve, frozen
from torch import Tensor

from tilewright import registry
from tilewright.compare.judge import row_error
from tilewright.compare.layer import RIGHT, Case, Operations, compute
from tilewright.compare.metrics import difference
from tilewright.types import Hypothesis

EXPLAINED = 5.0
"""Over its limit, what may be left of an error that a mistake explains: it may make the rounding
that comes after it weigh more. Above 1, all other guesses must leave STANDS_OUT times as much."""
STANDS_OUT = 3.0
OUT_OF_QUESTION = EXPLAINED * STANDS_OUT
"""Excess of a mistake, at a stage which is right in the candidate, after which no more is tried."""
AS_GOOD = 1.5
"""How many times the best mistake's rest may be that of another which cannot be told from it."""

Sureness = Literal["sure", "likely", "perhaps", "either", "none"]


@frozen(kw_only=True)
class Explanation:
    """A mistake, and how well it explains what a candidate gave."""

    mistake: str
    excess: float
    """Of the candidate over a layer with that mistake: at 1 or less, rounding explains the rest.
    Or more than that, where it is out of question."""


@frozen(kw_only=True)
class Reason:
    """What explains a layer's errors in a step."""

    unexplained: float
    """The excess over the layer without a mistake."""
    tried: int
    broken: tuple[str, ...] = ()
    """Hypotheses that failed, and why."""
    best: tuple[Explanation, ...]
    """From the one that explains most; none that explains nothing."""
    refuted: tuple[str, ...] = ()
    """Mistakes that explain this step, and not a later one in which the layer is wrong."""

    @property
    def named(self) -> tuple[Explanation, ...]:
        """The best one, and those that are as good; none if it does not explain the errors."""
        left = [e for e in self.best if e.mistake not in self.refuted]
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
        """What is left by the best one that is not named, or without any."""
        named = [e.mistake for e in self.named]
        others = (e.excess for e in self.best if e.mistake not in named)
        return next(others, self.unexplained)

    @property
    def sureness(self) -> Sureness:
        """From how much farther the next best guess is, and no mistake at all."""
        if not self.named:
            return "none"
        if len(self.named) > 1:
            return "either"
        times = self.next_best / max(self.named[0].excess, 1.0)
        return "sure" if times >= 5 else "likely" if times >= 1.5 else "perhaps"


def explain(case: Case, hypotheses: Sequence[Hypothesis]) -> Generator[int, None, Reason]:
    """Try all of them; yields how many mistakes were tried so far.

    Of a hypothesis that raises, what it has not yielded yet is left out, and it is named.
    """
    nothing = _excess(case, RIGHT, math.inf)
    found, broken = [], []
    tried = 0
    for hypothesis in hypotheses:
        try:
            for mistake, how in hypothesis(case):
                yield tried
                tried += 1
                excess = _excess(case, how, nothing)
                if excess < nothing:
                    found.append(Explanation(mistake=mistake, excess=excess))
        except Exception as error:
            name = getattr(hypothesis, "__name__", str(hypothesis))
            broken.append(f"hypothesis {name} failed: {registry.cause(error)}")
    best = sorted(found, key=lambda e: e.excess)
    return Reason(unexplained=nothing, tried=tried, broken=tuple(broken), best=tuple(best))


def hold(reason: Reason, case: Case, hypotheses: Sequence[Hypothesis]) -> Reason:
    """Try what is named in another step in which the layer is wrong: it has to explain that too."""
    names = {e.mistake for e in reason.named}
    nothing = _excess(case, RIGHT, math.inf)
    if not names or nothing <= 1:
        return reason
    refuted = [
        mistake
        for mistake, how in _of(hypotheses, case, names)
        if _excess(case, how, nothing) > max(EXPLAINED, AS_GOOD * reason.named[0].excess)
    ]
    return evolve(reason, refuted=(*reason.refuted, *refuted))


def _of(
    hypotheses: Sequence[Hypothesis], case: Case, names: Container[str]
) -> Iterable[tuple[str, Operations]]:
    for hypothesis in hypotheses:
        try:
            yield from ((name, how) for name, how in hypothesis(case) if name in names)
        except Exception:  # named as broken where all were tried
            continue


def _excess(case: Case, how: Operations, enough: float) -> float:
    """The largest of all stages that the candidate taps; infinity once it is as large as enough,
    and that of the stages so far once it is out of question."""
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
            # A wrong shape says nothing of how the layer is computed; the head's is its size.
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
        if excess > OUT_OF_QUESTION and right_excess(case, stage) <= 1:
            return most
    return most


def right_excess(case: Case, stage: str) -> float:
    """Of what the candidate gave over the right stage; 0 for what it does not tap in that shape."""
    if stage not in case.kept:
        found, right = case.found.get(stage), case.right[stage]
        fits = found is not None and found.shape == right.shape
        case.kept[stage] = (
            stage_excess(case, stage, found, right) if found is not None and fits else 0.0
        )
    return case.kept[stage]


def stage_excess(case: Case, stage: str, found: Tensor, expected: Tensor) -> float:
    """Of two tensors of one shape, over the stage's limits, or over a wider tolerance."""
    if not found.numel():
        return 0.0
    if stage not in case.limits or not expected.isfinite().all():
        return math.inf
    off = difference(found, expected)
    excess = case.limits[stage].excess(off, row_error(found, expected))
    tolerance = case.tolerances.get(stage)
    return min(excess, tolerance.excess(off)) if tolerance else excess
