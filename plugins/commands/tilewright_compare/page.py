"""A comparison as an HTML page with pictures: one file, without scripts or network access.

The page is ``page.html.jinja``; this module prepares its values.
"""

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from attrs import frozen
from jinja2 import Environment, PackageLoader, StrictUndefined

from tilewright import __version__
from tilewright_compare.advice import advice
from tilewright_compare.comparison import Comparison
from tilewright_compare.hypotheses import RULED_OUT, Reason
from tilewright_compare.judge import Finding, LogitsAgreement, Mode
from tilewright_compare.metrics import Difference
from tilewright_compare.report import (
    MODES,
    axes,
    cell,
    facts,
    made_lines,
    missing_lines,
    quantisation_lines,
    ratio_lines,
    reason_line,
    shown_modes,
    untapped_line,
    weights_line,
    worst,
)
from tilewright_compare.shades import DARK, LIGHT, PASSING, Palette, ends, level

_MOST_STEPS = 12
"""Largest number of steps with pictures: the first one and the worst ones."""
_MOST_WEIGHTS = 50
_MOST_GUESSES = 5


def html(comparison: Comparison) -> str:
    """The page. Everything is also in words; the colours suit any colour vision."""
    environment = Environment(
        loader=PackageLoader("tilewright_compare", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    first = comparison.divergence
    return environment.get_template("page.html.jinja").render(
        comparison=comparison,
        verdict=comparison.verdict,
        facts=facts(comparison),
        why=reason_line(comparison.reason) if comparison.reason else "",
        missing=missing_lines(comparison),
        against=comparison.against.lines() if comparison.against else [],
        ratios=[*ratio_lines(comparison), *quantisation_lines(comparison)],
        made=[line.partition(": ")[::2] for line in made_lines(comparison)],
        without_taps=untapped_line(comparison),
        coverage=[
            (f"{'✓' if i.reached else '✕ never'} {i}", i.detail) for i in comparison.coverage
        ],
        advice=advice(comparison),
        modes=MODES,
        first=first,
        figures=_figures(first) if first else [],
        guesses=_guesses(comparison.reason) if first and comparison.reason else [],
        heat_maps=[_heat_maps(comparison, mode) for mode in shown_modes(comparison)],
        depth=_depth(comparison),
        logits=_logits(comparison.logits) if comparison.logits else None,
        weights=weights_line(comparison),
        wrong_weights=[(f"✕ {w.name}", w.why) for w in comparison.wrong_weights],
        most_weights=_MOST_WEIGHTS,
        shades=ends(),
        passing=PASSING,
        light=_variables(LIGHT),
        dark=_variables(DARK),
        version=__version__,
    )


def _variables(palette: Palette) -> dict[str, str]:
    """The palette as CSS variables."""
    names = ("paper", "ink", "faint", "rule", "candidate", "baseline")
    colours = {name: getattr(palette, name) for name in names}
    colours |= {f"l{i}": shade for i, shade in enumerate(palette.shades)}
    colours |= {f"on{i}": cross for i, cross in enumerate(palette.crosses, PASSING + 1)}
    return colours


# --- tables ---------------------------------------------------------------------------------------


def _guesses(reason: Reason) -> list[tuple[str, str]]:
    if not reason.best:
        return []
    rows = [
        (e.bug, _number(e.excess) + " or more" * (e.excess > RULED_OUT))
        for e in reason.best[:_MOST_GUESSES]
    ]
    return [*rows, ("no bug", _number(reason.unexplained))]


def _figures(finding: Finding) -> list[tuple[object, ...]]:
    """Rows of the candidate's figures and, if there are any, of the baseline's."""
    ours, near = finding.candidate, finding.baseline
    if ours is None:
        return []
    figures: dict[str, Callable[[Difference], object]] = {
        "relative RMS": lambda d: _number(d.relative_rms),
        "largest absolute error": lambda d: _number(d.max_abs),
        "largest relative error": lambda d: _number(d.max_rel),
        "times as large": lambda d: f"{d.gain:.5f}",
        "cosine": lambda d: f"{d.cosine:.6f}",
        "NMSE": lambda d: _number(d.nmse),
        "elements beyond tolerance": lambda d: f"{d.beyond:.1%}",
        "largest distance in ULPs": lambda d: d.max_ulps,
        "not finite": lambda d: d.candidate_nonfinite,
        "worst element": lambda d: list(d.worst),
        "its value": lambda d: _number(d.candidate_at_worst),
        "expected": lambda d: _number(d.reference_at_worst),
    }
    if near is None:
        return [(name, of(ours)) for name, of in figures.items()]
    rows: list[tuple[object, ...]] = [(name, of(ours), of(near)) for name, of in figures.items()]
    rows.insert(1, ("worst row", *map(_number, finding.worst_row)))
    return rows


def _number(x: float) -> str:
    return f"{x:.3g}"


# --- heat maps ------------------------------------------------------------------------------------

_CELL, _LEFT, _TOP, _RIGHT = 15, 22, 70, 38
_FLAT = 8
"""Height of a cell where there are many layers."""


@frozen
class Cell:
    """A tensor: its colour, and a cross if it failed."""

    x: int
    shade: int
    failed: bool
    title: str


@frozen
class Row:
    """A layer, or a tensor outside the layers with its name beside it."""

    y: int
    height: int
    cells: Sequence[Cell]
    number: int | None = None
    """The layer's number, where it is shown."""
    name: str = ""


@frozen
class HeatMap:
    """Sizes and places in units of the picture."""

    width: int
    height: int
    stages: Sequence[tuple[float, str]]
    """Names of columns and where they start."""
    rows: Sequence[Row]
    tensors: int
    cell: int = _CELL
    left: int = _LEFT
    top: int = _TOP


def _heat_maps(comparison: Comparison, mode: Mode) -> tuple[str, list[tuple[str, HeatMap]], int]:
    """Title of a mode that ran, heat maps with captions, and the number of steps without one."""
    by_step: dict[int, list[Finding]] = {}
    for finding in comparison.findings:
        if finding.place.mode == mode:
            by_step.setdefault(finding.place.step, []).append(finding)

    def trouble(step: int) -> tuple[int, float, int]:
        found = by_step[step]
        return sum(not f.passed for f in found), max(f.excess for f in found), -step

    first = min(by_step)
    others = sorted((s for s in by_step if s != first), key=trouble)[-(_MOST_STEPS - 1) :]
    shown = {step: by_step[step] for step in (first, *sorted(others))}
    maps = [(_caption(found[0]), _heat_map(found)) for found in shown.values()]
    return MODES[mode], maps, len(by_step) - len(shown)


def _caption(finding: Finding) -> str:
    return f"step {finding.place.step}, {finding.place.phase}"


def _heat_map(findings: Iterable[Finding]) -> HeatMap:
    cells = worst(findings)
    layers, stages, outside = axes(cells)
    height = _CELL if len(layers) <= 16 else _FLAT
    numbered = 1 if height == _CELL else 4
    rows: list[Row] = []
    y = _TOP
    for stage in (s for s in outside if s == "embed"):
        rows.append(Row(y, _CELL, [_cell(cells[None, stage], 0)], name=stage))
        y += _CELL + 3
    for layer in layers:
        found = [_cell(cells[layer, s], i) for i, s in enumerate(stages) if (layer, s) in cells]
        rows.append(Row(y, height, found, number=None if layer % numbered else layer))
        y += height
    y += 3
    for stage in (s for s in outside if s != "embed"):
        rows.append(Row(y, _CELL, [_cell(cells[None, stage], 0)], name=stage))
        y += _CELL + 1
    return HeatMap(
        width=max(_LEFT + len(stages) * _CELL + _RIGHT, 110),
        height=y + 1,
        stages=[(_LEFT + (i + 0.6) * _CELL, stage) for i, stage in enumerate(stages)],
        rows=rows,
        tensors=len(cells),
    )


def _cell(finding: Finding, column: int) -> Cell:
    title = f"{finding.place.tensor}: {cell(finding)} {finding.why}".strip()
    return Cell(_LEFT + column * _CELL, level(finding), not finding.passed, title)


# --- charts ---------------------------------------------------------------------------------------

_WIDE, _HIGH = 340, 190
_X, _Y = (42, _WIDE - 12), (_HIGH - 34, 8)
"""Both ends of the axes."""


@frozen
class Series:
    """Values over integers, in the style of a CSS class."""

    name: str
    style: str
    points: Sequence[tuple[int, float]]
    crossed: Collection[int] = ()
    """Where a point gets a cross."""


@frozen
class Line:
    style: str
    points: Sequence[tuple[float, float, bool]]
    """Place of each point, and whether it gets a cross."""


@frozen
class Chart:
    """Sizes and places in units of the picture."""

    label: str
    x_name: str
    x_ticks: Sequence[tuple[float, int]]
    """Places of integers."""
    y_ticks: Sequence[tuple[float, int]]
    """Places of powers of ten, and their exponents."""
    lines: Sequence[Line]
    width: int = _WIDE
    height: int = _HIGH
    left: int = _X[0]
    right: int = _X[1]
    bottom: int = _Y[0]


def _chart(x_name: str, series: Sequence[Series]) -> Chart:
    """Lines over integers, on a logarithmic scale; zero is drawn at the bottom."""
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for _, y in s.points if 0 < y < math.inf]
    low = math.floor(math.log10(min(ys, default=1e-3)))
    high = max(math.ceil(math.log10(max(ys, default=1.0))), low + 1)
    first, last = min(xs), max(xs)
    left, right, bottom, top = _X[0] + 6, _X[1], *_Y

    def at_x(x: float) -> float:
        if last == first:
            return (left + right) / 2
        return left + (x - first) / (last - first) * (right - left)

    def at_y(y: float) -> float:
        exponent = math.log10(y) if 0 < y < math.inf else (low if y <= 0 else high)
        return bottom - (exponent - low) / (high - low) * (bottom - top)

    return Chart(
        label=f"{' and '.join(s.name for s in series)} by {x_name}",
        x_name=x_name,
        x_ticks=[
            (at_x(x), x) for x in range(first, last + 1, max(1, math.ceil((last - first + 1) / 10)))
        ],
        y_ticks=[
            (at_y(10.0**exponent), exponent)
            for exponent in range(low, high + 1, max(1, (high - low) // 5))
        ],
        lines=[
            Line(s.style, [(at_x(x), at_y(y), x in s.crossed) for x, y in s.points]) for s in series
        ],
    )


def _depth(comparison: Comparison) -> list[tuple[str, Chart]]:
    """Error of each layer's output, where each side runs on its own outputs, in the first and in
    the last step; with captions."""
    by_step: dict[int, list[tuple[int, Finding, Difference, Difference]]] = {}
    for f in comparison.findings:
        layer, ours, near = f.place.layer, f.candidate, f.baseline
        chained = f.place.mode == "chained" and f.place.stage == "output"
        if chained and layer is not None and ours and near:
            by_step.setdefault(f.place.step, []).append((layer, f, ours, near))
    charts = []
    for step in sorted({min(by_step), max(by_step)}) if by_step else ():
        found = by_step[step]
        series = [
            Series("limit", "limit", [(n, f.limit) for n, f, _, _ in found]),
            Series("baseline", "baseline", [(n, d.relative_rms) for n, _, _, d in found]),
            Series(
                "candidate",
                "candidate",
                [(n, d.relative_rms) for n, _, d, _ in found],
                {n for n, f, _, _ in found if not f.passed},
            ),
        ]
        charts.append((_caption(found[0][1]), _chart("layer", series)))
    return charts


def _logits(rows: Sequence[LogitsAgreement]) -> dict[str, Any]:
    """Chart and table."""
    error: dict[int, float] = {}
    margin: dict[int, float] = {}
    for row in rows:
        error[row.step] = max(row.error, error.get(row.step, 0.0))
        margin[row.step] = min(row.margin, margin.get(row.step, math.inf))
    other = {row.step for row in rows if not row.same_argmax}
    series = [
        Series("margin", "baseline", sorted(margin.items())),
        Series("error", "candidate", sorted(error.items()), other),
    ]
    several = len({row.request for row in rows}) > 1
    heads = ["step", *(["prompt"] if several else []), "likeliest token", "top-5", "top-50"]
    return {
        "chart": _chart("step", series),
        "heads": [*heads, "KL", "margin", "error"],
        "rows": [
            [
                row.step,
                *([row.request] if several else []),
                "same" if row.same_argmax else "near-tie" if row.near_tie else "✕ another",
                f"{row.top_5:.0%}",
                f"{row.top_50:.0%}",
                f"{row.kl:.1e}",
                _number(row.margin),
                _number(row.error),
            ]
            for row in rows
        ],
    }
