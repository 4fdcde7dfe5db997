"""A comparison as text for a terminal, and as a record for programs."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from textwrap import wrap
from typing import Any

from attrs import asdict, evolve

from tilewright import __version__
from tilewright_compare.against import Against, Change, ratios
from tilewright_compare.comparison import Comparison
from tilewright_compare.hypotheses import RULED_OUT, Reason
from tilewright_compare.judge import Finding, LogitsAgreement, Mode, Phase
from tilewright_compare.metrics import Difference

CHECKS = {
    "embed": "the embedding table, and the token ids that the step was given",
    "attn_norm": "the RMSNorm before attention: its weight, its eps, its axis",
    "q_proj": "the query projection: its weight's transposition and order of rows, its bias",
    "k_proj": "the key projection: its weight's transposition and order of rows, its bias",
    "v_proj": "the value projection: its weight's transposition and order of rows, its bias",
    "q_norm": "the RMSNorm of query heads: its weight, its eps, per head and before RoPE",
    "k_norm": "the RMSNorm of key heads: its weight, its eps, per head and before RoPE",
    "q_rope": "RoPE of queries: positions, theta, scaling, which dimensions rotate together",
    "k_rope": "RoPE of keys: positions, theta, scaling, which dimensions rotate together",
    "k_cache": "how keys are stored: slots, row order, page size, dtype",
    "v_cache": "how values are stored: slots, row order, page size, dtype",
    "attention": "attention: the scale, the causal mask, which KV head a query head reads, and "
    "which slots of the cache",
    "o_proj": "the output projection: its weight's transposition, the order of heads",
    "attn_residual": "the first residual: what is added to the layer's input",
    "mlp_norm": "the RMSNorm before the MLP: its weight, its eps, its input",
    "gate_proj": "the gate projection: its weight, and whether it is up's",
    "up_proj": "the up projection: its weight, and whether it is gate's",
    "activation": "SiLU of the gate, times up",
    "down_proj": "the down projection: its weight's transposition",
    "output": "the second residual: what is added to attn_residual",
    "final_norm": "the last RMSNorm: its weight, and which rows it gets",
    "logits": "the head: its weight, tied or not, and which rows it gets",
}
"""What to check, keyed by the first wrong stage, in the order of docs/tensors.md."""

_SCREEN = 30
"""Lines of a report after which the verdict is repeated at the end."""
_MOST_ROWS = 16
_MOST_STEPS = 12
_MOST_GUESSES = 10


def record(comparison: Comparison) -> dict[str, Any]:
    """The whole comparison, as docs/numerics.md documents it. Non-finite numbers become None."""
    divergence = comparison.divergence
    perplexity = comparison.perplexity
    return {
        "tilewright": __version__,
        "verdict": verdict(comparison),
        "sentence": comparison.sentence,
        "next": advice(comparison),
        "model": comparison.model,
        "reference": comparison.reference,
        "candidate": comparison.candidate,
        "dtype": comparison.dtype,
        "runtime": asdict(comparison.runtime) if comparison.runtime else None,
        "made": asdict(comparison.made) if comparison.made else None,
        "finished": comparison.finished,
        "failure": comparison.failure,
        "divergence": finding_record(divergence) if divergence else None,
        "reason": _reason_record(comparison.reason) if comparison.reason else None,
        "weights": [asdict(w) for w in comparison.weights],
        "perplexity": None
        if perplexity is None
        else {k: _finite(v) for k, v in asdict(perplexity).items()} | {"passed": perplexity.passed},
        "logits": [
            {k: _finite(v) for k, v in asdict(row).items()} | {"near_tie": row.near_tie}
            for row in comparison.logits
        ],
        "drift": asdict(comparison.drift) if comparison.drift else None,
        "against": _against_record(comparison.against) if comparison.against else None,
        "ratios": [
            {k: _finite(v) for k, v in asdict(r).items()} | {"ratio": _finite(r.ratio)}
            for r in ratios(comparison.findings)
        ],
        "not_compared": comparison.not_compared,
        "coverage": [
            {"name": str(i), "reached": i.reached, "detail": i.detail} for i in comparison.coverage
        ],
        "over": comparison.over,
        "fused": comparison.fused,
        "findings": [finding_record(f) for f in comparison.findings],
    }


def verdict(comparison: Comparison) -> str:
    if comparison.equal:
        return "equal"
    return "diverged" if comparison.differs else "unfinished"


def finding_record(finding: Finding) -> dict[str, Any]:
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
        "excess": _finite(finding.excess),
        "limit": finding.limit,
        "tolerance": str(finding.tolerance) if finding.tolerance else None,
        "pattern": finding.pattern,
        "where": finding.where,
        "rows": finding.rows,
        "candidate": _difference_record(finding.candidate),
        "baseline": _difference_record(finding.baseline),
        "worst_row": {
            "candidate": _finite(finding.worst_row[0]),
            "baseline": _finite(finding.worst_row[1]),
        },
    }


def _against_record(against: Against) -> dict[str, Any]:
    def grown(change: Change) -> dict[str, Any]:
        now = change.now
        place = {name: getattr(now, name) for name in ("mode", "phase", "layer", "stage")}
        return {
            **place,
            "factor": _finite(change.factor),
            "limit": change.scatter,
            "then": _finite(change.then.ratio),
            "now": _finite(now.ratio),
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
        "unexplained": _finite(reason.unexplained),
        "tried": reason.tried,
        "broken": list(reason.broken),
        "refuted": list(reason.refuted),
        "guesses": [asdict(e) for e in reason.best[:_MOST_GUESSES]],
    }


def _difference_record(difference: Difference | None) -> dict[str, Any] | None:
    if difference is None:
        return None
    figures = asdict(difference) | {"nmse": difference.nmse}
    return {name: _finite(value) for name, value in figures.items()}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- text -----------------------------------------------------------------------------------------


def text(comparison: Comparison, width: int, wrapped: bool) -> list[str]:
    """Lines. Tables are at most width columns wide (at least 40), sentences only when wrapped.

    Failures are marked with an exclamation mark.
    """
    width = max(width, 40)

    def prose(*sentences: str) -> Iterator[str]:
        for sentence in sentences:
            yield from wrap(sentence, width, subsequent_indent="  ") if wrapped else [sentence]

    lines = list(prose(comparison.sentence))
    if comparison.reason:
        lines += prose(f"why: {reason_line(comparison.reason)}")
    lines += prose(*(f"next: {hint}" for hint in advice(comparison)))
    lines += ["", *prose(facts(comparison))]
    for mode in shown_modes(comparison):
        lines += ["", *prose(MODES[mode]), *_table(comparison, mode, width)]
    if comparison.findings:
        lines += prose("(error over its limit, the worst of all steps; ! is too large)")
    if without := untapped_line(comparison):
        lines += prose(without)
    if comparison.logits:
        lines += ["", *prose("logits, candidate against truth"), *_logits(comparison)]
        if any(row.near_tie for row in comparison.logits):
            lines += prose("(~ near-tie: rounding could swap the truth's two likeliest tokens)")
    lines += ["", *prose(weights_line(comparison))]
    lines += prose(*coverage_lines(comparison), *missing_lines(comparison))
    lines += prose(*perplexity_lines(comparison), *ratio_lines(comparison))
    if comparison.against:
        lines += prose(*comparison.against.lines())
    if made := made_lines(comparison):
        lines += ["", *prose(*made)]
    if len(lines) > _SCREEN:
        lines += ["", *prose(comparison.sentence)]
    return lines


MODES: dict[Mode, str] = {
    "isolated": "each layer by itself, on the reference's input and cache",
    "chained": "each side on its own outputs",
    "untapped": "without taps, as an engine runs a step",
}


def shown_modes(comparison: Comparison) -> list[Mode]:
    """The modes that get a table: those that ran, and the run without taps only if it is wrong."""
    ran = {f.place.mode for f in comparison.findings}
    if not comparison.first_wrong("untapped"):
        ran.discard("untapped")
    return [mode for mode in MODES if mode in ran]


PHASES: tuple[Phase, ...] = ("prefill", "decode", "mixed")


def facts(comparison: Comparison) -> str:
    steps = {f.place.step: f.place.phase for f in comparison.findings}
    phases = list(steps.values())
    told = [f"{phases.count(p)} {p}" for p in PHASES if p != "mixed" or p in phases]
    failed = sum(not f.passed for f in comparison.findings)
    return (
        f"candidate {comparison.candidate} in {comparison.dtype}, reference "
        f"{comparison.reference}; steps: {', '.join(told)}; "
        f"{len(comparison.findings)} tensors, {failed} wrong"
        f"{'' if comparison.finished else '; not finished'}"
    )


def reason_line(reason: Reason) -> str:
    """The bug that explains the first divergence, and the confidence in it."""
    left, best = _times(reason.unexplained), reason.best[:1]
    broken = "".join(f"; {why}" for why in reason.broken)
    if reason.unexplained <= 1:
        return (
            "rounding explains what this layer computes: only a tolerance is not met, or a tensor "
            f"is missing or has another shape{broken}"
        )
    if not reason.named:
        said = f"none of {reason.tried} bug hypotheses explains it"
        if reason.refuted:
            said += f" (refuted by a later step: {', '.join(reason.refuted[:3])})"
        elif best and best[0].excess < min(reason.unexplained / 2, RULED_OUT):
            said += f"; the nearest, {best[0].bug}, leaves {_times(best[0].excess)} of {left}"
        return said + broken
    told = " or ".join(e.bug for e in reason.named[:3])
    if len(reason.named) > 3:
        told += f" or {len(reason.named) - 3} more with the same effect"
    return (
        f"{CONFIDENCE[reason.confidence]}{told} (error over its limit: "
        f"{_times(reason.named[0].excess)} against a layer with this bug, at least "
        f"{_times(reason.next_best)} with another of {reason.tried} hypotheses, {left} without "
        f"a bug){broken}"
    )


CONFIDENCE = {"sure": "", "likely": "probably ", "perhaps": "perhaps ", "either": "either "}


def _times(excess: float) -> str:
    return (
        f"{excess:.2f}" if excess < 9.995 else f"{excess:.0f}" if excess < 1e5 else f"{excess:.0e}"
    )


def weights_line(comparison: Comparison) -> str:
    wrong = comparison.wrong_weights
    if not comparison.weights:
        return "weights: not compared, because one of the executors does not return them"
    if not wrong:
        return f"weights: all {len(comparison.weights)} are the checkpoint's"
    shown = "; ".join(f"{w.name}! {w.why}" for w in wrong[:3])
    more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    return f"weights: {len(wrong)} of {len(comparison.weights)} are wrong: {shown}{more}"


def untapped_line(comparison: Comparison) -> str:
    """What the run without taps showed; empty if there was none."""
    found = [f for f in comparison.findings if f.place.mode == "untapped"]
    wrong = [f for f in found if not f.passed]
    if wrong:
        steps, all_steps = (len({f.place.step for f in some}) for some in (wrong, found))
        return (
            f"without taps, {len(wrong)} of {len(found)} tensors are wrong, in {steps} of "
            f"{all_steps} steps"
        )
    if any(f.baseline for f in found):
        return (
            "without taps, where the executor takes another path (limits.tap_exact is false), "
            "cache and logits are as near to the truth as rounding allows"
        )
    return "without taps, cache and logits have the same bits" if found else ""


def coverage_lines(comparison: Comparison) -> list[str]:
    """What was run, how many of the candidate's paths that reached, and which it did not."""
    items = comparison.coverage
    if not items:
        return []
    reached = sum(item.reached for item in items)
    undeclared = "" if comparison.tiles_declared else f"; {comparison.candidate} declares no tiles"
    lines = [f"reached {reached} of {len(items)} paths, over {comparison.over}{undeclared}"]
    if left := comparison.unreached:
        told = (f"{item} ({item.detail})" if item.detail else str(item) for item in left)
        lines.append(f"never {', '.join(told)}")
    return lines


def perplexity_lines(comparison: Comparison) -> list[str]:
    found = comparison.perplexity
    if found is None:
        return []
    mark = "" if found.passed else "!"
    told = f"truth {found.truth:.6g}, candidate {found.candidate:.6g}{mark}"
    return [f"perplexity of the prompt: {told}"]


def ratio_lines(comparison: Comparison) -> list[str]:
    """The candidate's error over the baseline's in each stage, pooled over layers and steps, and
    the drift where the verdict does not say it."""
    pooled: dict[str, list[float]] = {}
    for r in ratios(f for f in comparison.findings if f.place.mode == "chained"):
        squares = pooled.setdefault(r.stage, [0.0, 0.0])
        squares[0] += r.rows * r.candidate**2
        squares[1] += r.rows * r.baseline**2
    told = [f"{stage} {math.sqrt(c / b):.2f}" for stage, (c, b) in pooled.items() if b]
    lines = [f"error over the baseline's own: {', '.join(told)}"] if told else []
    if comparison.drift and comparison.drift.sentence not in comparison.sentence:
        lines.append(comparison.drift.sentence)
    return lines


def made_lines(comparison: Comparison) -> list[str]:
    """How the report was made; empty for one that Python code made."""
    runtime = comparison.runtime
    return comparison.made.lines(runtime.device if runtime else "") if comparison.made else []


def missing_lines(comparison: Comparison) -> list[str]:
    """What was not compared, and why."""
    lines = []
    if comparison.fused:
        rests = "the KV cache, logits and perplexity"
        if comparison.perplexity is None:
            rests = "the KV cache and logits"
        lines.append(f"no layer output is tapped: judged by {rests}")
    if stages := ", ".join(comparison.not_compared):
        lines.append(f"not compared, because {comparison.candidate} does not tap them: {stages}")
    return lines


def worst(findings: Iterable[Finding]) -> dict[tuple[int | None, str], Finding]:
    """The worst finding of each layer and stage, in the order of first appearance."""
    found: dict[tuple[int | None, str], Finding] = {}
    for finding in findings:
        key = (finding.place.layer, finding.place.stage)
        if key not in found or _badness(finding) > _badness(found[key]):
            found[key] = finding
    return found


def _badness(finding: Finding) -> tuple[bool, float]:
    return not finding.passed, finding.excess


Cells = Mapping[tuple[int | None, str], Finding]
"""Findings, keyed by layer and stage."""


def axes(cells: Cells) -> tuple[list[int], list[str], list[str]]:
    """Layers, their stages, and the stages outside layers, as rows and columns of a table."""
    layers = sorted({layer for layer, _ in cells if layer is not None})
    stages = list(dict.fromkeys(stage for layer, stage in cells if layer is not None))
    return layers, stages, [stage for layer, stage in cells if layer is None]


def _table(comparison: Comparison, mode: Mode, width: int) -> list[str]:
    cells = worst(f for f in comparison.findings if f.place.mode == mode)
    layers, stages, outside = axes(cells)
    groups = grouped(layers, comparison.divergence.place.layer if comparison.divergence else None)
    rows = []
    for group in groups:
        name = f"{group[0]}" if len(group) == 1 else f"{group[0]}-{group[-1]}"
        found = [[cells[n, s] for n in group if (n, s) in cells] for s in stages]
        rows.append([name, *(cell(max(f, key=_badness)) if f else "" for f in found)])
    lines = _blocks([["layer"], *([_short(s)] for s in stages)], rows, width) if rows else []
    alone = [f"{s} {cell(cells[None, s])}" for s in outside]
    return [*lines, "  ".join(alone)] if alone else lines


def grouped(layers: Sequence[int], special: int | None) -> list[Sequence[int]]:
    """Runs of layers; single layers where there are few. The special one is always alone."""
    size = 1 if len(layers) <= _MOST_ROWS else -(-len(layers) // (_MOST_ROWS - 2))
    groups: list[Sequence[int]] = []
    for start in range(0, len(layers), size):
        group = layers[start : start + size]
        at = group.index(special) if special in group else 0
        parts = [group[:at], group[at : at + 1], group[at + 1 :]] if special in group else [group]
        groups += [part for part in parts if part]
    return groups


def cell(finding: Finding) -> str:
    """``0.4``, ``12!``: the error over its limit, and a mark when it is too large. ``bits!``: other
    bits than with taps."""
    if finding.candidate is None:
        return "none!" if "no such" in finding.why else "shape!"
    if finding.baseline is None and not finding.passed:
        return "bits!"
    x = finding.excess
    shown = (
        f"{x:.1f}" if x < 9.95 else f"{x:.0f}" if x < 999.5 else ">999" if x < math.inf else "inf"
    )
    return shown if finding.passed else f"{shown}!"


def _short(stage: str) -> str:
    return {"attention": "attn", "attn_residual": "attn_resid", "activation": "act"}.get(
        stage, stage
    )


def _blocks(heads: list[list[str]], rows: list[list[str]], width: int) -> list[str]:
    """A table with stacked words as headings, in as many blocks as the width requires."""
    words = [head[0].split("_") for head in heads]
    wide = [max(map(len, (*words[i], *(row[i] for row in rows)))) for i in range(len(heads))]
    lines: list[str] = []
    start = 1
    while start < len(heads):
        stop, used = start, wide[0]
        while stop < len(heads) and used + 1 + wide[stop] <= width:
            used += 1 + wide[stop]
            stop += 1
        columns = [0, *range(start, max(stop, start + 1))]
        height = max(len(words[i]) for i in columns)
        head_lines = [
            [w[n - height + len(w)] if n >= height - len(w) else "" for w in words]
            for n in range(height)
        ]
        for line in [*head_lines, *rows]:
            lines.append(" ".join(f"{line[i]:>{wide[i]}}" for i in columns).rstrip())
        start = columns[-1] + 1
        if start < len(heads):
            lines.append("")
    return lines


def _logits(comparison: Comparison) -> Iterator[str]:
    """One line per step; if there are many, the steps that agree least."""
    by_step: dict[int, list[LogitsAgreement]] = {}
    for row in comparison.logits:
        by_step.setdefault(row.step, []).append(row)
    shown = sorted(by_step)
    if len(shown) > _MOST_STEPS:

        def trouble(step: int) -> tuple[int, float, int]:
            found = by_step[step]
            return sum(not r.same_argmax for r in found), max(r.kl for r in found), -step

        shown = sorted(sorted(shown, key=trouble)[-_MOST_STEPS:])
    yield f"{'step':>4} {'argmax':>6} {'top-5':>5} {'KL':>7} {'margin':>6} {'error':>7}"
    for step in shown:
        found = by_step[step]
        same = sum(row.same_argmax for row in found)
        ties = [row.near_tie for row in found]
        disagree = any(not row.same_argmax and not t for row, t in zip(found, ties, strict=True))
        mark = "!" if disagree else "~" if any(ties) else ""
        yield (
            f"{step:>4} {f'{same}/{len(found)}{mark}':>6} "
            f"{min(row.top_5 for row in found):>5.0%} {max(row.kl for row in found):>7.1e} "
            f"{min(row.margin for row in found):>6.2f} {max(row.error for row in found):>7.1e}"
        )
    if len(shown) < len(by_step):
        yield f"and {len(by_step) - len(shown)} more steps that agree better"


# --- what to try next -----------------------------------------------------------------------------


def advice(comparison: Comparison) -> list[str]:
    """What to check, and what to run, when the two differ."""
    if wrong := comparison.wrong_weights:
        return [f"look at how {comparison.candidate} loads and packs {wrong[0].name}"]
    first = comparison.divergence
    if first is None:
        return _advice_without_tensor(comparison)
    if first.place.mode == "untapped":
        return _advice_without_taps(first)
    if gap := _untapped_stages(comparison, first):
        hints = [
            f"look between {gap[0]}, which is right, and {gap[-1]}: to narrow it down, let the "
            f"candidate tap {', '.join(gap[1:-1])}"
        ]
    else:
        hints = [_check(comparison, first)]
    if comparison.fused and (before := _advice_fused(comparison, first)):
        hints.append(before)
    modes = {f.place.mode for f in comparison.findings}
    if first.place.mode == "chained" and comparison.finished:
        hints.append(
            "each layer is right by itself: look at what goes from layer to layer, or adds up"
            if "isolated" in modes
            else "to try each layer alone, both executors must be able to run layer by layer"
        )
    if first.place.mode == "chained" and (hint := _ABOUT_PHASES.get(first.place.phase)):
        hints.append(hint)
    if without := comparison.first_wrong("untapped"):
        place = without.place
        hints.append(
            f"without taps, it is wrong too, first in {place.phase} step {place.step}, "
            f"{place.tensor}: {without.why}"
        )
    return hints


def _check(comparison: Comparison, first: Finding) -> str:
    """What to check at the first wrong tensor. A cache of which only the keys or only the values
    are wrong is stored in the right slots."""
    check = CHECKS.get(first.place.stage, first.place.tensor)
    if first.place.stage not in COMPUTED:
        return f"check {check}"
    caches = {
        f.place.stage: f
        for f in comparison.findings
        if evolve(f.place, tensor=first.place.tensor) == first.place
    }
    other = caches.get("v_cache" if first.place.stage == "k_cache" else "k_cache")
    if other is None:
        return f"check {check}"
    what, others = COMPUTED[first.place.stage]
    if other.passed and first.candidate is not None and first.candidate.more_nonfinite:
        return f"check which tokens are written, and in which slots: the {others} are right"
    if other.passed:
        return f"check {what}: the {others} beside them are in their slots, and right"
    if first.pattern == other.pattern:
        return f"check {check}: keys and values are wrong in the same way"
    return f"check {check}; or what both are computed from, such as attn_norm"


COMPUTED = {
    "k_cache": ("the key projection, its norm and RoPE", "values"),
    "v_cache": (
        "the value projection, which tensor is stored as values, and the scale of attn_norm, which "
        "a norm of keys would hide",
        "keys",
    ),
}
"""What computes the keys or values of a cache, and what the other cache holds."""

_ABOUT_PHASES: dict[Phase, str] = {
    "decode": "prefill is right: look at positions, slots and the cache of decode steps",
    "mixed": "prefill and decode are right in steps of their own: look at what each sequence of a "
    "step takes from query_starts, context_lens and block_table",
}


def _advice_without_tensor(comparison: Comparison) -> list[str]:
    """What to check if every compared tensor is within its limits."""
    hints = [f"to reach more: {comparison.wider}"] if comparison.wider else []
    if comparison.perplexity and not comparison.perplexity.passed:
        hints.append("check rows of logits other than the last one of each sequence")
    if comparison.drift:
        hints.append(f"keep the sums of {comparison.drift.projection} in float32 to the last term")
    if comparison.against and not comparison.against.passed:
        stage = comparison.against.grown[0].now.stage
        hints.append(f"look at what changed in {stage} since {comparison.against.date}")
    return hints


def _advice_fused(comparison: Comparison, first: Finding) -> str:
    """Where else to look if no layer's output is tapped; empty if the tensor needs no layer."""
    layer = first.place.layer
    if first.place.stage == "logits":
        layer = max((f.place.layer or 0 for f in comparison.findings), default=0) + 1
    if not layer:
        return ""
    return f"layer {layer - 1} from its attention on may be wrong too: its output is not tapped"


def _advice_without_taps(first: Finding) -> list[str]:
    layer = first.place.layer
    where = f"the keys and values of layer {layer}"
    if layer is None:
        where = "the last layer and the head"
    elif layer:
        where += f", and what layer {layer - 1} puts out"
    hints = [f"look at what forward runs when it has no tap: {where}"]
    if hint := _ABOUT_PHASES.get(first.place.phase):
        hints.append(hint)
    if first.baseline is None and first.candidate is not None:
        hints.append(
            "if rounding explains the difference, set the executor's limits.tap_exact to False: "
            "the run without taps is then judged by its distance from the truth"
        )
    return hints


def _untapped_stages(comparison: Comparison, first: Finding) -> list[str]:
    """The last stage before the first wrong one, the untapped stages between, and the wrong one."""
    order = list(CHECKS)
    layer, stage = first.place.layer, first.place.stage
    tapped = {
        f.place.stage
        for f in comparison.findings
        if f.place.layer == layer and f.place.step == first.place.step and f.candidate is not None
    }
    if layer is None or stage not in order or stage.endswith("_cache"):
        return []
    gap = [stage]
    for before in reversed(order[: order.index(stage)]):
        gap.insert(0, before)
        if before in tapped:
            return gap if len(gap) > 2 else []
    return []
