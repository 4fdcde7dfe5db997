"""A comparison as an HTML page with pictures: one file, without scripts or network access."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from html import escape

from attrs import frozen

from tilewright import __version__
from tilewright_compare.hypotheses import OUT_OF_QUESTION, Reason
from tilewright_compare.judge import Finding, Mode
from tilewright_compare.metrics import Difference
from tilewright_compare.report import (
    MODES,
    advice,
    cell,
    facts,
    missing_line,
    reason_line,
    verdict,
    weights_line,
    worst,
)
from tilewright_compare.run import Comparison
from tilewright_compare.shades import DARK, LIGHT, PASSING, Palette, ends, level

_MOST_STEPS = 12
"""Largest number of steps with pictures: the first one and the worst ones."""
_MOST_WEIGHTS = 50
_MOST_GUESSES = 5


def html(comparison: Comparison) -> str:
    """The page. Everything is also in words; the colours suit any colour vision."""
    sections = [
        _divergence(comparison),
        *(_heat_maps(comparison, mode) for mode in MODES),
        _depth(comparison),
        _logits(comparison),
        _weights(comparison),
    ]
    found = verdict(comparison)
    mark = {"equal": "✓", "diverged": "✕", "unfinished": "…"}[found]
    hints = "".join(f"<li>{escape(hint)}</li>" for hint in advice(comparison))
    why = f"<p>Why: {escape(reason_line(comparison.reason))}</p>" if comparison.reason else ""
    missing = f"<p>{escape(missing_line(comparison))}</p>" if comparison.not_compared else ""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(comparison.candidate)} against {escape(comparison.reference)}: {found}</title>
<style>{_STYLE}</style>
</head>
<body>
<header>
<p class="verdict {found}"><span aria-hidden="true">{mark}</span> {found}</p>
<h1>{escape(comparison.sentence)}</h1>{why}
<p>{escape(facts(comparison))}</p>{missing}
<p class="small">model {escape(comparison.model)}</p>
{f"<h2>What to try next</h2><ul>{hints}</ul>" if hints else ""}
</header>
{"".join(sections)}
<footer class="small">tilewright compare {escape(__version__)}</footer>
</body>
</html>
"""


# --- words and tables -----------------------------------------------------------------------------


def _divergence(comparison: Comparison) -> str:
    first = comparison.divergence
    if first is None:
        return ""
    place = first.place
    rows = [
        ("tensor", place.tensor),
        ("where", f"{place.phase} step {place.step}, {MODES[place.mode]}"),
        ("what", first.why + (f" ({first.where})" if first.where else "")),
    ]
    told = "".join(f"<tr><th>{k}</th><td>{escape(v)}</td></tr>" for k, v in rows)
    return (
        f"<section><h2>The first divergence</h2><table class='facts'>{told}</table>"
        f"{_figures(first)}{_guesses(comparison.reason)}</section>"
    )


def _guesses(reason: Reason | None) -> str:
    if reason is None or not reason.best:
        return ""
    rows = [
        [e.mistake, _number(e.excess) + " or more" * (e.excess > OUT_OF_QUESTION)]
        for e in reason.best[:_MOST_GUESSES]
    ]
    rows.append(["no mistake", _number(reason.unexplained)])
    told = f"The nearest of {reason.tried} known mistakes, under which the layer was computed anew:"
    return f"<p>{told}</p>" + _table(["mistake", "candidate's error over its limit"], rows)


def _figures(finding: Finding) -> str:
    ours, near = finding.candidate, finding.baseline
    if ours is None or near is None:
        return ""
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
        "in truth": lambda d: _number(d.reference_at_worst),
    }
    rows: list[list[object]] = [[name, of(ours), of(near)] for name, of in figures.items()]
    rows.insert(1, ["worst row", *map(_number, finding.worst_row)])
    allowed = f"The candidate's relative RMS may be {_number(finding.limit)}"
    if tolerance := finding.tolerance:
        allowed = f"A tolerance is given: {tolerance}"
    limit = f"<p>{escape(allowed)}.</p>"
    return _table(["distance from the truth", "candidate", "baseline"], rows) + limit


def _weights(comparison: Comparison) -> str:
    wrong = [w for w in comparison.weights if not w.passed]
    if not wrong:
        return f"<section><h2>Weights</h2><p>{escape(weights_line(comparison))}</p></section>"
    rows = ([f"✕ {w.name}", w.why] for w in wrong[:_MOST_WEIGHTS])
    return (
        f"<section><h2>Weights</h2><p>{len(wrong)} of {len(comparison.weights)} are not the "
        f"checkpoint's.</p>{_table(['weight', 'why'], rows)}</section>"
    )


def _table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    head = "".join(f"<th scope='col'>{escape(h)}</th>" for h in heads)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(str(value))}</td>' for value in row)}</tr>" for row in rows
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f"<div class='wide'>{table}</div>"


def _number(x: float) -> str:
    return f"{x:.3g}"


# --- heat maps ------------------------------------------------------------------------------------


def _heat_maps(comparison: Comparison, mode: Mode) -> str:
    by_step: dict[int, list[Finding]] = {}
    for finding in comparison.findings:
        if finding.place.mode == mode:
            by_step.setdefault(finding.place.step, []).append(finding)
    if not by_step:
        return ""

    def trouble(step: int) -> tuple[int, float, int]:
        found = by_step[step]
        return sum(not f.passed for f in found), max(f.excess for f in found), -step

    first = min(by_step)
    others = sorted((s for s in by_step if s != first), key=trouble)[-(_MOST_STEPS - 1) :]
    shown = [first, *sorted(others)]
    maps = "".join(
        f"<figure><figcaption>step {step}, {by_step[step][0].place.phase}</figcaption>"
        f"{_heat_map(by_step[step])}</figure>"
        for step in shown
    )
    left = len(by_step) - len(shown)
    more = f"<p>{left} more steps, none of which went worse, have no picture.</p>" if left else ""
    return (
        f"<section><h2>Error over its limit: {MODES[mode]}</h2>{_legend()}"
        f"<div class='maps'>{maps}</div>{more}</section>"
    )


_CELL, _LEFT, _TOP, _RIGHT = 15, 22, 70, 38
_FLAT = 8
"""Height of a cell where there are many layers."""


def _heat_map(findings: Iterable[Finding]) -> str:
    cells = worst(findings)
    layers = sorted({layer for layer, _ in cells if layer is not None})
    stages = list(dict.fromkeys(stage for layer, stage in cells if layer is not None))
    before = [s for layer, s in cells if layer is None and s == "embed"]
    after = [s for layer, s in cells if layer is None and s != "embed"]
    height = _CELL if len(layers) <= 16 else _FLAT
    drawn: list[str] = []
    for x, stage in enumerate(stages):
        at = f"{_LEFT + (x + 0.6) * _CELL:.1f} {_TOP - 4}"
        drawn.append(f"<text transform='translate({at}) rotate(-60)'>{escape(stage)}</text>")
    y: float = _TOP
    for stage in before:
        drawn.append(_alone(cells[None, stage], y))
        y += _CELL + 3
    every = 1 if height == _CELL else 4
    for layer in layers:
        if layer % every == 0:
            drawn.append(
                f"<text class='end' x='{_LEFT - 4}' y='{y + height / 2 + 3}'>{layer}</text>"
            )
        drawn += [
            _cell(cells[layer, stage], _LEFT + x * _CELL, y, height)
            for x, stage in enumerate(stages)
            if (layer, stage) in cells
        ]
        y += height
    y += 3
    for stage in after:
        drawn.append(_alone(cells[None, stage], y))
        y += _CELL + 1
    width = max(_LEFT + len(stages) * _CELL + _RIGHT, 110)
    return _svg(width, y + 1, "".join(drawn), f"Heat map of {len(cells)} tensors")


def _alone(finding: Finding, y: float) -> str:
    """A tensor outside the layers: its cell, and its name beside it."""
    name = f"<text x='{_LEFT + _CELL + 5}' y='{y + 11}'>{escape(finding.place.stage)}</text>"
    return _cell(finding, _LEFT, y, _CELL) + name


def _cell(finding: Finding, x: float, y: float, height: int) -> str:
    title = f"{finding.place.tensor}: {cell(finding)} {finding.why}".strip()
    box = (
        f"<rect class='l{level(finding)}' x='{x}' y='{y}' width='{_CELL - 1}' "
        f"height='{height - 1}'><title>{escape(title)}</title></rect>"
    )
    return (
        box
        if finding.passed
        else box + _cross(x + (_CELL - 1) / 2, y + (height - 1) / 2, level(finding))
    )


def _cross(x: float, y: float, shade: int | None = None) -> str:
    """A cross, on a shade or on the page."""
    style = "cross" if shade is None else f"cross on{shade}"
    return f"<path class='{style}' d='M{x - 2.5} {y - 2.5}l5 5m0-5l-5 5'/>"


def _legend() -> str:
    drawn: list[str] = []
    names = ends()
    for i, name in enumerate(names):
        x = 2 + i * 40
        drawn.append(f"<rect class='l{i}' x='{x}' y='2' width='39' height='13'/>")
        if i > PASSING:
            drawn.append(_cross(x + 19.5, 8.5, i))
        drawn.append(f"<text class='middle' x='{x + 19.5}' y='26'>{name}</text>")
    svg = _svg(4 + 40 * len(names), 30, "".join(drawn), "Legend")
    return f"<div class='legend'>{svg}<p class='small'>A cross: too large.</p></div>"


# --- charts ---------------------------------------------------------------------------------------


@frozen
class Series:
    name: str
    style: str
    """CSS class of its line and marks."""
    points: list[tuple[int, float]]
    crossed: frozenset[int] = frozenset()
    """Marks that get a cross."""


def _depth(comparison: Comparison) -> str:
    """Error of each layer's output, where each side runs on its own outputs."""
    by_step: dict[int, list[Finding]] = {}
    for f in comparison.findings:
        if f.place.mode == "chained" and f.place.stage == "output" and f.candidate and f.baseline:
            by_step.setdefault(f.place.step, []).append(f)
    if not by_step:
        return ""
    charts = ""
    for step in sorted({min(by_step), max(by_step)}):
        found = by_step[step]
        ours, near, limit = [], [], []
        for f in found:
            assert f.place.layer is not None
            assert f.candidate is not None
            assert f.baseline is not None
            ours.append((f.place.layer, f.candidate.relative_rms))
            near.append((f.place.layer, f.baseline.relative_rms))
            limit.append((f.place.layer, f.limit))
        failed = frozenset(f.place.layer or 0 for f in found if not f.passed)
        chart = _chart(
            "layer",
            [
                Series("limit", "limit", limit),
                Series("baseline", "baseline", near),
                Series("candidate", "candidate", ours, failed),
            ],
        )
        caption = f"step {step}, {found[0].place.phase}"
        charts += f"<figure><figcaption>{caption}</figcaption>{chart}</figure>"
    return (
        "<section><h2>Error over depth</h2><p>Relative RMS of each layer's output from the truth, "
        "each side on its own outputs.</p>"
        f"{_keys()}<div class='charts'>{charts}</div></section>"
    )


def _keys() -> str:
    marks = (("candidate", "candidate"), ("baseline", "baseline"), ("limit", "limit"))
    return _key_line(marks)


def _key_line(marks: Iterable[tuple[str, str]]) -> str:
    told = "".join(
        f"<span><svg viewBox='0 0 30 10' width='30' height='10' aria-hidden='true'>"
        f"<path class='line {style}' d='M0 5H30'/>{_mark(style, 15, 5)}</svg> {escape(name)}</span>"
        for name, style in marks
    )
    return f"<p class='keys'>{told}<span>✕ too large, or another token</span></p>"


def _logits(comparison: Comparison) -> str:
    rows = comparison.logits
    if not rows:
        return ""
    error: dict[int, float] = {}
    margin: dict[int, float] = {}
    other: set[int] = set()
    for row in rows:
        error[row.step] = max(row.error, error.get(row.step, 0.0))
        margin[row.step] = min(row.margin, margin.get(row.step, math.inf))
        if not row.same_argmax:
            other.add(row.step)
    chart = _chart(
        "step",
        [
            Series("margin", "baseline", sorted(margin.items())),
            Series(
                "error",
                "candidate",
                sorted(error.items()),
                frozenset(other),
            ),
        ],
    )
    several = len({row.request for row in rows}) > 1

    def told() -> Iterator[list[object]]:
        for row in rows:
            same = "same" if row.same_argmax else "near-tie" if row.near_tie else "✕ another"
            yield [
                row.step,
                *([row.request] if several else []),
                same,
                f"{row.top_5:.0%}",
                f"{row.top_50:.0%}",
                f"{row.kl:.1e}",
                _number(row.margin),
                _number(row.error),
            ]

    heads = ["step", *(["prompt"] if several else []), "likeliest token", "top-5", "top-50"]
    perplexity = ""
    if comparison.perplexity:
        true, ours = comparison.perplexity
        perplexity = f"<p>Perplexity of the prompt: truth {true:.6g}, candidate {ours:.6g}.</p>"
    return (
        "<section><h2>Logits</h2><p>The margin between the truth's two likeliest tokens, the "
        "smallest of a step, and the candidate's largest error in a logit. A margin well above the "
        "error leaves the token as it is.</p>"
        + _key_line((("margin", "baseline"), ("error", "candidate")))
        + f"<div class='charts'><figure>{chart}</figure></div>"
        + _table([*heads, "KL", "margin", "error"], told())
        + f"{perplexity}</section>"
    )


_WIDE, _HIGH, _EDGE = 340, 190, 42


def _chart(x_name: str, series: Sequence[Series]) -> str:
    """Lines over integers, on a logarithmic scale; zero is drawn at the bottom."""
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for _, y in s.points if 0 < y < math.inf]
    low = math.floor(math.log10(min(ys, default=1e-3)))
    high = max(math.ceil(math.log10(max(ys, default=1.0))), low + 1)
    first, last = min(xs), max(xs)
    right, top, bottom = _WIDE - 12, 8, _HIGH - 34

    def at_x(x: float) -> float:
        return (
            (_EDGE + 6 + right) / 2
            if last == first
            else _EDGE + 6 + (x - first) / (last - first) * (right - _EDGE - 6)
        )

    def at_y(y: float) -> float:
        exponent = math.log10(y) if 0 < y < math.inf else (low if y <= 0 else high)
        return bottom - (exponent - low) / (high - low) * (bottom - top)

    drawn: list[str] = []
    for exponent in range(low, high + 1, max(1, (high - low) // 5)):
        height = at_y(10.0**exponent)
        drawn.append(f"<path class='grid' d='M{_EDGE} {height:.1f}H{right + 6}'/>")
        drawn.append(f"<text class='end' x='{_EDGE - 4}' y='{height + 3:.1f}'>1e{exponent}</text>")
    step = max(1, math.ceil((last - first + 1) / 10))
    for x in range(first, last + 1, step):
        drawn.append(f"<text class='middle' x='{at_x(x):.1f}' y='{bottom + 13}'>{x}</text>")
    middle = (_EDGE + right) / 2
    drawn.append(f"<text class='middle' x='{middle}' y='{bottom + 27}'>{x_name}</text>")
    for s in series:
        line = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in s.points)
        drawn.append(f"<polyline class='line {s.style}' points='{line}'/>")
        for x, y in s.points:
            drawn.append(_mark(s.style, at_x(x), at_y(y)))
            if x in s.crossed:
                drawn.append(_cross(at_x(x), at_y(y) - 9))
    return _svg(_WIDE, _HIGH, "".join(drawn), f"{' and '.join(s.name for s in series)} by {x_name}")


def _mark(style: str, x: float, y: float) -> str:
    if style == "candidate":
        return f"<circle class='mark {style}' cx='{x:.1f}' cy='{y:.1f}' r='3'/>"
    if style == "baseline":
        return f"<rect class='mark {style}' x='{x - 3:.1f}' y='{y - 3:.1f}' width='6' height='6'/>"
    return ""


def _svg(width: float, height: float, drawn: str, label: str) -> str:
    return (
        f"<svg viewBox='0 0 {width:g} {height:g}' style='width:min(100%,{width * 1.35:.0f}px)' "
        f"role='img' aria-label='{escape(label)}'>{drawn}</svg>"
    )


def _variables(palette: Palette) -> str:
    """The palette as CSS variables."""
    names = ("paper", "ink", "faint", "rule", "candidate", "baseline")
    colours = {name: getattr(palette, name) for name in names}
    colours |= {f"l{i}": shade for i, shade in enumerate(palette.shades)}
    colours |= {f"on{i}": cross for i, cross in enumerate(palette.crosses, PASSING + 1)}
    return " ".join(f"--{name}: {colour};" for name, colour in colours.items())


_STYLE = (
    f"""
:root {{ color-scheme: light dark; {_variables(LIGHT)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_variables(DARK)} }} }}
"""
    + """\
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1040px; padding: 16px; background: var(--paper);
color: var(--ink); font: 16px/1.45 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.25rem; margin: 0 0 .5rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p { margin: .4rem 0; } ul { margin: .4rem 0; padding-left: 1.2rem; }
.small, figcaption { font-size: .85rem; color: var(--faint); }
.verdict { display: inline-block; margin: 0 0 .6rem; padding: .1rem .6rem; border-radius: 4px;
border: 2px solid var(--ink); font-weight: 600; }
.verdict.diverged { border-color: var(--candidate); color: var(--candidate); }
.verdict.equal { border-color: var(--baseline); color: var(--baseline); }
figure { margin: 0; } svg { display: block; max-width: 100%; height: auto; }
.maps, .charts { display: grid; gap: 16px;
grid-template-columns: repeat(auto-fit, minmax(min(100%, 310px), 1fr)); }
.charts { grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); }
.legend { margin: .5rem 0 1rem; }
svg text { font: 10px system-ui, sans-serif; fill: var(--ink); }
.end { text-anchor: end; } .middle { text-anchor: middle; }
.cross { stroke: var(--ink); stroke-width: 1.4; fill: none; }
.grid { stroke: var(--rule); } .line { fill: none; stroke-width: 1.8; }
.line.candidate { stroke: var(--candidate); }
.line.baseline { stroke: var(--baseline); stroke-dasharray: 6 3; }
.line.limit { stroke: var(--faint); stroke-width: 1.2; stroke-dasharray: 2 3; }
.mark.candidate { fill: var(--candidate); }
.mark.baseline { fill: var(--paper); stroke: var(--baseline); stroke-width: 1.6; }
.keys { display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .85rem; }
.keys svg { display: inline-block; vertical-align: middle; }
.wide { overflow-x: auto; } table { border-collapse: collapse; margin: .5rem 0;
font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .2rem .8rem .2rem 0;
border-bottom: 1px solid var(--rule); }
.wide td, .wide th { overflow-wrap: normal; } .facts th { white-space: nowrap; }
footer { margin-top: 2rem; }
"""
)
_STYLE += "".join(f".l{i} {{ fill: var(--l{i}); }}" for i in range(len(LIGHT.shades)))
_STYLE += "".join(
    f".on{i} {{ stroke: var(--on{i}); }}" for i in range(PASSING + 1, len(LIGHT.shades))
)
