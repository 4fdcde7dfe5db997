"""The result of a comparison."""

from attrs import define, field

from tilewright_compare.hypotheses import Reason
from tilewright_compare.judge import Finding, LogitsAgreement, Mode
from tilewright_compare.packing import WeightFinding


@define(kw_only=True)
class Comparison:
    """Differences between two executors' runs of one model."""

    model: str
    reference: str
    candidate: str
    dtype: str
    """The candidate's dtype; the baseline is the reference in it, the truth is in float32."""
    weights: list[WeightFinding] = field(factory=list)
    findings: list[Finding] = field(factory=list)
    """In the order in which the tensors were computed: step by step, chained, then untapped; at the
    end isolated."""
    reason: Reason | None = None
    """Diagnosis of the first layer that is wrong by itself."""
    logits: list[LogitsAgreement] = field(factory=list)
    not_compared: list[str] = field(factory=list)
    """Stages that the reference taps and the candidate does not."""
    unreached: list[str] = field(factory=list)
    """What an engine runs on the candidate and the comparison could not, in words."""
    perplexity: tuple[float, float] | None = None
    """Perplexity of the prompts, by the truth and by the candidate."""
    finished: bool = False
    failure: str = ""
    """Why an executor could not continue; else empty."""

    @property
    def equal(self) -> bool:
        return self.finished and self.divergence is None and not self.wrong_weights

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
        if first is None and not self.finished:
            so_far = f"no difference in {len(self.findings)} tensors so far"
            return f"{self.failure}; {so_far}" if self.failure else f"not finished: {so_far}"
        if first is None:
            left = f"; not compared: {', '.join(self.unreached)}" if self.unreached else ""
            return f"equal: every tensor is as near to the truth as rounding allows{left}"
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
