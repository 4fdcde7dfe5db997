"""A comparison as a record for programs: the JSON report."""

import math
from typing import Any

from attrs import asdict

from tilewright import __version__
from tilewright_compare.advice import advice
from tilewright_compare.against import Against, Change, ratios
from tilewright_compare.comparison import Comparison
from tilewright_compare.hypotheses import Reason
from tilewright_compare.judge import Finding
from tilewright_compare.metrics import Difference

_MOST_GUESSES = 10


def record(comparison: Comparison) -> dict[str, Any]:
    """The whole comparison, as docs/numerics.md documents it. Non-finite numbers become None."""
    c = comparison
    record = {
        "tilewright": __version__,
        "verdict": c.verdict,
        "sentence": c.sentence,
        "next": advice(c),
        "model": c.model,
        "reference": c.reference,
        "candidate": c.candidate,
        "dtype": c.dtype,
        "runtime": asdict(c.runtime) if c.runtime else None,
        "made": asdict(c.made) if c.made else None,
        "finished": c.finished,
        "failure": c.failure,
        "divergence": _finding_record(c.divergence) if c.divergence else None,
        "reason": _reason_record(c.reason) if c.reason else None,
        "weights": [asdict(w) for w in c.weights],
        "perplexity": asdict(c.perplexity) | {"passed": c.perplexity.passed}
        if c.perplexity
        else None,
        "quantisation": c.quantisation.record() if c.quantisation else None,
        "logits": [asdict(row) | {"near_tie": row.near_tie} for row in c.logits],
        "drift": asdict(c.drift) if c.drift else None,
        "against": _against_record(c.against) if c.against else None,
        "ratios": [asdict(r) | {"ratio": r.ratio} for r in ratios(c.findings)],
        "not_compared": c.not_compared,
        "coverage": [
            {"name": str(i), "reached": i.reached, "detail": i.detail} for i in c.coverage
        ],
        "tiles_declared": c.tiles_declared,
        "over": c.over,
        "fused": c.fused,
        "findings": [_finding_record(f) for f in c.findings],
    }
    return {key: _finite(value) for key, value in record.items()}


def _finding_record(finding: Finding) -> dict[str, Any]:
    place = finding.place
    return {
        "mode": place.mode,
        "phase": place.phase,
        "step": place.step,
        "tensor": place.tensor,
        "layer": place.layer,
        "stage": place.stage,
        "passed": finding.passed,
        "why": finding.why,
        "excess": finding.excess,
        "limit": finding.limit,
        "tolerance": str(finding.tolerance) if finding.tolerance else None,
        "pattern": finding.pattern,
        "where": finding.where,
        "rows": finding.rows,
        "candidate": _difference_record(finding.candidate),
        "baseline": _difference_record(finding.baseline),
        "worst_row": {
            "candidate": finding.worst_row[0],
            "baseline": finding.worst_row[1],
        },
    }


def _against_record(against: Against) -> dict[str, Any]:
    def grown(change: Change) -> dict[str, Any]:
        now = change.now
        place = {name: getattr(now, name) for name in ("mode", "phase", "layer", "stage")}
        return {
            **place,
            "factor": change.factor,
            "limit": change.scatter,
            "then": change.then.ratio,
            "now": now.ratio,
        }

    return {
        "report": against.report,
        "date": against.date,
        "passed": against.passed,
        "compared": len(against.changes),
        "grown": [grown(c) for c in against.grown],
        "shrunk": [grown(c) for c in against.changes if c.shrank],
        "differences": list(against.differences),
    }


def _reason_record(reason: Reason) -> dict[str, Any]:
    return {
        "confidence": reason.confidence,
        "bugs": [e.bug for e in reason.named],
        "unexplained": reason.unexplained,
        "tried": reason.tried,
        "broken": list(reason.broken),
        "refuted": list(reason.refuted),
        "guesses": [asdict(e) for e in reason.best[:_MOST_GUESSES]],
    }


def _difference_record(difference: Difference | None) -> dict[str, Any] | None:
    if difference is None:
        return None
    return asdict(difference) | {"nmse": difference.nmse}


def _finite(value: Any) -> Any:
    """The value, with None in place of each number in it that is not finite."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
