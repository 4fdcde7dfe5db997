"""The result of a comparison."""

from typing import Literal

from attrs import define, field

from tilewright.types import ResolvedRuntime
from tilewright_compare.against import Against
from tilewright_compare.coverage import Item, missing, shortened
from tilewright_compare.drift import Drift
from tilewright_compare.hypotheses import Reason
from tilewright_compare.judge import Finding, LogitsAgreement, Mode, Perplexity
from tilewright_compare.packing import WeightFinding
from tilewright_compare.provenance import Made
from tilewright_compare.quantisation import Quantisation

Verdict = Literal["equal", "diverged", "unfinished"]


@define(kw_only=True)
class Comparison:
    """Differences between two executors' runs of one model."""

    model: str
    reference: str
    candidate: str
    dtype: str
    """The candidate's weight dtype; the baseline is the reference in it, the truth in float32."""
    quantised: bool = False
    """Whether that is a dtype that torch does not compute in. Baseline and truth then have the
    candidate's weights; the baseline is in the dtype of its hidden states."""
    quantisation: Quantisation | None = None
    """What such weights cost; None for others, and where the model's own are not at hand."""
    weights: list[WeightFinding] = field(factory=list)
    findings: list[Finding] = field(factory=list)
    """In the order in which the tensors were computed: step by step, chained, then untapped; at the
    end isolated."""
    reason: Reason | None = None
    """Diagnosis of the first layer that is wrong by itself."""
    logits: list[LogitsAgreement] = field(factory=list)
    not_compared: list[str] = field(factory=list)
    """Stages that the reference taps and the candidate does not."""
    coverage: list[Item] = field(factory=list)
    """The paths of the candidate's code, and whether the steps so far took them."""
    over: str = ""
    """What was run so far, in words."""
    tiles_declared: bool = True
    """Whether the candidate declares its tiles. If not, paths that only it knows are not told."""
    wider: str = ""
    """The command that reaches more; empty if none is known."""
    perplexity: Perplexity | None = None
    runtime: ResolvedRuntime | None = None
    """How the candidate ran."""
    drift: Drift | None = None
    """A projection of layer 0 whose sums are kept in 16 bits."""
    made: Made | None = None
    against: Against | None = None
    """The errors against those of an earlier report, if one was given."""
    finished: bool = False
    failure: str = ""
    """Why an executor could not continue; else empty."""

    @property
    def equal(self) -> bool:
        return self.finished and not self.differs

    @property
    def verdict(self) -> Verdict:
        if self.equal:
            return "equal"
        return "diverged" if self.differs else "unfinished"

    @property
    def differs(self) -> bool:
        """Whether anything that was judged is wrong."""
        wrong_loss = self.perplexity is not None and not self.perplexity.passed
        drifts = self.drift is not None
        grew = self.against is not None and not self.against.passed
        return (
            self.divergence is not None or bool(self.wrong_weights) or wrong_loss or drifts or grew
        )

    @property
    def fused(self) -> bool:
        """Whether the candidate taps no layer's output, so that the verdict rests on the KV cache,
        the logits and the perplexity."""
        return "output" in self.not_compared

    @property
    def unreached(self) -> list[Item]:
        """What no step reached."""
        return missing(self.coverage)

    @property
    def wrong_weights(self) -> list[WeightFinding]:
        return [w for w in self.weights if not w.passed]

    @property
    def divergence(self) -> Finding | None:
        """The first tensor that is wrong by itself, else the first that is wrong with taps, else
        the first that is wrong without."""
        return (
            self.first_wrong("isolated")
            or self.first_wrong("chained")
            or self.first_wrong("untapped")
        )

    def first_wrong(self, mode: Mode) -> Finding | None:
        wrong = (f for f in self.findings if f.place.mode == mode and not f.passed)
        return next(wrong, None)

    @property
    def sentence(self) -> str:
        if wrong := self.wrong_weights:
            more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            return f"weight {wrong[0].name} is packed wrongly: {wrong[0].why}{more}"
        first = self.divergence
        if first is None and self.drift:
            return f"{self.drift.sentence}, though its error is within its limit"
        if first is None and not self.finished:
            so_far = f"no difference in {len(self.findings)} tensors so far"
            return f"{self.failure}; {so_far}" if self.failure else f"not finished: {so_far}"
        if first is None and self.perplexity and not self.perplexity.passed:
            return f"diverges in what no compared tensor shows: {self.perplexity.why}"
        if first is None and self.against and not self.against.passed:
            return f"less accurate than before: {self.against.sentence}"
        if first is None:
            if self.unreached:
                told = f"equal, but never {shortened(self.unreached)}"
            else:
                told = f"equal over {self.over}" if self.over else "equal"
            undeclared = f"; {self.candidate} declares no tiles"
            return told if self.tiles_declared else told + undeclared
        place = first.place
        where = f"{place.phase} step {place.step}, {place.tensor}"
        alone = " (given the reference's own input)" if place.mode == "isolated" else ""
        diverges = "diverges first in"
        if place.mode == "untapped":
            so_far = "" if self.finished else " so far"
            diverges = f"right with taps{so_far}, wrong without: {diverges}"
        worst = ""
        if first.candidate is not None:
            d = first.candidate
            at = f"{list(d.worst)} ({first.where})" if first.where else f"{list(d.worst)}"
            worst = (
                f"; worst at {at}: {d.candidate_at_worst:.6g}, expected {d.reference_at_worst:.6g}"
            )
        part = f", {first.pattern}" if first.pattern else ""
        return f"{diverges} {where}{alone}: {first.why}{part}{worst}"
