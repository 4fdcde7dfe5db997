"""Diagnoses the first layer that is wrong by itself."""

from collections.abc import Iterator, Sequence

from attrs import define, evolve

from tilewright import plugins
from tilewright.types import Hypothesis
from tilewright_compare.bugs import HYPOTHESES
from tilewright_compare.hypotheses import Reason, explain, retest
from tilewright_compare.layer import Case

RETESTS = 2
"""Number of later steps in which the reason is tested again."""


@define(eq=False)
class Diagnosis:
    """Explains one layer, or the head, over several steps."""

    hypotheses: Sequence[Hypothesis]
    broken: tuple[str, ...]
    """Plugins whose hypotheses could not be loaded, and why."""
    reason: Reason | None = None
    layer: int | None = None
    """The layer that ``reason`` explains; None: the head."""
    steps: int = 0
    """Number of steps examined."""

    @classmethod
    def of_plugins(cls, *executors: str) -> "Diagnosis":
        """With the known bugs, and those that the executors' plugins add."""
        found, broken = list(HYPOTHESES), []
        for name in dict.fromkeys(executors):
            plugin = plugins.find("executor", name)
            try:
                found += plugins.call(plugins.load(plugin), "hypotheses") or ()
            except Exception as error:
                broken.append(f"hypotheses of {plugin} failed: {plugins.cause(error)}")
        return cls(found, tuple(broken))

    def wants(self, layer: int | None) -> bool:
        """Whether to examine the layer if it is wrong. None: the head."""
        return self.reason is None or (layer == self.layer and self.steps <= RETESTS)

    def examine(self, case: Case) -> Iterator[int]:
        """Explain the case, or retest the reason on it; yields how many bugs were tried."""
        self.steps += 1
        if self.reason is not None:
            self.reason = retest(self.reason, case, self.hypotheses)
            return
        self.layer = case.layer
        reason = yield from explain(case, self.hypotheses)
        self.reason = evolve(reason, broken=(*self.broken, *reason.broken))
