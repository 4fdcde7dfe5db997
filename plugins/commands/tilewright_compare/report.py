"""A comparison as text for a terminal, and the sentences that all reports have."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from textwrap import wrap

from tilewright_compare.advice import advice
from tilewright_compare.against import ratios
from tilewright_compare.comparison import Comparison
from tilewright_compare.hypotheses import RULED_OUT, Reason
from tilewright_compare.judge import Finding, LogitsAgreement, Mode, Phase

_SCREEN = 30
"""Lines of a report after which the verdict is repeated at the end."""
_MOST_ROWS = 16
_MOST_STEPS = 12


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
    lines += prose(*quantisation_lines(comparison))
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
    if not comparison.weights and comparison.quantised:
        return "weights: not compared, because the model's files hold only the quantised ones"
    if not comparison.weights:
        return "weights: not compared, because one of the executors does not return them"
    if not wrong and comparison.quantised:
        worst = max(comparison.weights, key=lambda w: w.error)
        return (
            f"weights: all {len(comparison.weights)} are the checkpoint's, as {comparison.dtype} "
            f"holds them; farthest is {worst.name}, by {worst.error:.2g} of its norm"
        )
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
    over = "" if comparison.over in comparison.sentence else f", over {comparison.over}"
    undeclared = "" if comparison.tiles_declared else f"; {comparison.candidate} declares no tiles"
    lines = [f"reached {reached} of {len(items)} paths{over}{undeclared}"]
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
    return [f"perplexity of the prompts: {told}"]


def quantisation_lines(comparison: Comparison) -> list[str]:
    """What quantised weights cost; empty for others."""
    if not comparison.quantised:
        return []
    judged = (
        f"judged: whether the candidate computes what its own {comparison.dtype} weights say, "
        "which the reference was given too"
    )
    found = comparison.quantisation
    if found is None:
        return [judged]
    groups = grouped(list(found.layers), None)
    errors = []
    for group in groups:
        name = f"{group[0]}" if len(group) == 1 else f"{group[0]}-{group[-1]}"
        errors.append(f"{name} {max(found.layers[n] for n in group):.2g}")
    lines = [
        judged,
        f"not judged: how far {comparison.dtype} weights take the model from the unquantised one, "
        "both in float32, by layer, each on the outputs of those before: "
        f"{', '.join(errors) or 'no output is tapped'}",
    ]
    if found.logits:
        same = sum(row.same_argmax for row in found.logits)
        lines.append(
            f"quantisation in the logits: mean KL divergence {found.kl:.2g} nats, the same "
            f"likeliest token in {same} of {len(found.logits)} rows"
        )
    if found.perplexity is not None and comparison.perplexity:
        change = comparison.perplexity.candidate / found.perplexity - 1
        lines.append(
            f"perplexity of the prompts without quantisation: {found.perplexity:.6g}, so that the "
            f"candidate's is {change:+.2%} from it"
        )
    return lines


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
