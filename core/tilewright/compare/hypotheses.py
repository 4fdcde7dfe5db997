"""Why a layer is wrong: it is computed anew under each known mistake, and the one is named that
gives what the candidate gave.

A hypothesis is a function that yields mistakes which a case may have: what to call each, and the
operations that make it. An executor's plugin adds its own through the hook ``hypotheses``.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, TypeAlias

from attrs import frozen
from torch import Tensor

from tilewright import registry
from tilewright.compare.judge import row_error
from tilewright.compare.layer import Case, Operations, compute
from tilewright.compare.metrics import difference

Hypothesis: TypeAlias = Callable[[Case], Iterable[tuple[str, Operations]]]

EXPLAINED = 5.0
"""Over its limit, what may be left of an error that a mistake explains, if it was larger: a mistake
may make the rounding that comes after it weigh more."""
AS_GOOD = 1.5
"""How many times the best mistake's rest may be that of another which cannot be told from it."""


Sureness = Literal["sure", "likely", "perhaps", "either", "none"]


@frozen(kw_only=True)
class Explanation:
    """A mistake, and how well it explains what a candidate gave."""

    mistake: str
    excess: float
    """Of the candidate over a layer with that mistake: at 1 or less, rounding explains the rest."""


@frozen(kw_only=True)
class Reason:
    """What explains a layer's errors."""

    unexplained: float
    """The excess over the layer without a mistake."""
    tried: int
    broken: tuple[str, ...] = ()
    """Hypotheses that failed, and why."""
    best: tuple[Explanation, ...]
    """From the one that explains most; none that explains nothing."""

    @property
    def named(self) -> tuple[Explanation, ...]:
        """The best one, and those that are as good; none if rounding does not explain the rest."""
        if not self.best or self.best[0].excess > max(1.0, min(EXPLAINED, self.unexplained / 2)):
            return ()
        return tuple(e for e in self.best if e.excess <= AS_GOOD * self.best[0].excess)

    @property
    def next_best(self) -> float:
        """What is left by the best one that is not named, or without any."""
        others = self.best[len(self.named) :]
        return others[0].excess if others else self.unexplained

    @property
    def sureness(self) -> Sureness:
        """From how much farther the next best guess is, and no mistake at all."""
        if not self.named:
            return "none"
        if len(self.named) > 1:
            return "either"
        times = self.next_best / max(self.named[0].excess, 1.0)
        return "sure" if times >= 5 else "likely" if times >= 1.5 else "perhaps"


def explain(case: Case, hypotheses: Sequence[Hypothesis]) -> Reason:
    """Try all of them. One that raises is left out, and named."""
    nothing = _excess(case, Operations(), math.inf)
    found, broken = [], []
    tried = 0
    for hypothesis in hypotheses:
        try:
            for mistake, how in hypothesis(case):
                tried += 1
                excess = _excess(case, how, nothing)
                if excess < nothing:
                    found.append(Explanation(mistake=mistake, excess=excess))
        except Exception as error:
            name = getattr(hypothesis, "__name__", str(hypothesis))
            broken.append(f"{name}: {registry.cause(error)}")
    best = sorted(found, key=lambda e: e.excess)
    return Reason(unexplained=nothing, tried=tried, broken=tuple(broken), best=tuple(best))


def _excess(case: Case, how: Operations, enough: float) -> float:
    """The largest of all stages that the candidate taps; infinity once it is as large as enough."""
    most = 0.0
    for stage, expected in compute(case, how):
        found = case.found.get(stage)
        if found is None:
            continue
        if found.shape != expected.shape:
            return math.inf
        if stage == "logits" and expected.isnan().any():
            known = ~expected.isnan().any(0)
            found, expected = found[:, known], expected[:, known]
        most = max(most, stage_excess(case, stage, found, expected))
        if most >= enough:
            return math.inf
    return most


def stage_excess(case: Case, stage: str, found: Tensor, expected: Tensor) -> float:
    """Of two tensors of one shape, over the stage's limits."""
    if not found.numel():
        return 0.0
    if stage not in case.limits or not expected.isfinite().all():
        return math.inf
    return case.limits[stage].excess(difference(found, expected), row_error(found, expected))
