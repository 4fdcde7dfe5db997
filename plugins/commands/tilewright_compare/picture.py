"""A comparison as one PNG image."""

import io
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from textwrap import wrap

from PIL import Image, ImageDraw, ImageFont

from tilewright import __version__
from tilewright_compare.comparison import Comparison
from tilewright_compare.judge import Finding, Mode
from tilewright_compare.report import (
    MODES,
    PHASES,
    Cells,
    axes,
    coverage_lines,
    facts,
    made_lines,
    missing_lines,
    reason_line,
    shown_modes,
    untapped_line,
    worst,
)
from tilewright_compare.shades import LIGHT, PASSING, ends, level

WIDTH = 1000
"""Width in pixels. Text stays legible at a phone's width, less than half of that."""

# Drawn at twice the size and halved at the end, to smooth slanted lines.
_MARGIN = 56
_INSIDE = 2 * (WIDTH - _MARGIN)
_LARGE, _MIDDLE, _SMALL = 60, 52, 46
"""Heights of text."""
_LEFT, _LEAN = 84, 60
"""Width of the layer numbers, and how far the last stage's name extends to the right."""
_SLANT = 60
"""Angle of the stage names, in degrees."""
_WIDEST = 150
"""Width of a cell where there are few stages."""
_LOWEST, _HIGHEST, _DEEPEST = 20, 76, 1400
"""Height of a cell where there are many or few layers; otherwise, of all layers' cells."""
_SWATCH = 80, 56
"""Size of the cell of a tensor outside the layers."""

Box = tuple[float, float, float, float]
"""Left, top, right and bottom."""


def png(comparison: Comparison) -> bytes:
    """The file: the verdict, then a heat map per mode; each cell is the worst of all steps.

    What failed has a cross, and what failed first a frame.
    """
    blocks = [
        _verdict(comparison.verdict),
        _text(comparison.sentence, _LARGE, LIGHT.ink),
        _text(facts(comparison), _SMALL, LIGHT.faint),
    ]
    if comparison.reason:
        blocks.insert(2, _text(f"why: {reason_line(comparison.reason)}", _MIDDLE, LIGHT.ink))
    if comparison.findings:
        blocks.append(_legend(framed=comparison.divergence is not None))
    blocks += [_panel(comparison, mode) for mode in shown_modes(comparison)]
    told = [untapped_line(comparison), *coverage_lines(comparison), *missing_lines(comparison)]
    if comparison.against:
        told += comparison.against.lines()
    model = f"model {Path(comparison.model).resolve().name}; tilewright compare {__version__}"
    for lines in (told, made_lines(comparison), [model]):
        if small := [_text(line, _SMALL, LIGHT.faint) for line in lines if line]:
            blocks.append(_stacked(small, gap=12))
    inside = _stacked(blocks, gap=40)
    height = inside.height + inside.height % 2 + 2 * _MARGIN
    picture = Image.new("RGB", (2 * WIDTH, height), LIGHT.paper)
    picture.paste(inside, (_MARGIN, _MARGIN))
    file = io.BytesIO()
    picture.reduce(2).save(file, "PNG", optimize=True)
    return file.getvalue()


def _blank(height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (_INSIDE, height), LIGHT.paper)
    return image, ImageDraw.Draw(image)


def _stacked(blocks: Sequence[Image.Image], gap: int) -> Image.Image:
    image, _ = _blank(sum(block.height + gap for block in blocks) - gap)
    y = 0
    for block in blocks:
        image.paste(block, (0, y))
        y += block.height + gap
    return image


# --- words ----------------------------------------------------------------------------------------


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's built-in font, which is the same on every machine."""
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


def _text(text: str, size: int, colour: str) -> Image.Image:
    """Text, in as many lines as it needs."""
    font = _font(size)
    columns = 4 * _INSIDE // size
    lines = wrap(text, columns)
    while max(map(font.getlength, lines)) > _INSIDE:
        columns -= 1
        lines = wrap(text, columns)
    height = size * 5 // 4
    image, draw = _blank(len(lines) * height)
    for i, line in enumerate(lines):
        draw.text((0, (i + 0.5) * height), line, fill=colour, font=font, anchor="lm")
    return image


def _verdict(found: str) -> Image.Image:
    colour = {"equal": LIGHT.baseline, "diverged": LIGHT.candidate}.get(found, LIGHT.ink)
    font = _font(_LARGE)
    width, height = font.getlength(found) + 60, _LARGE + 36
    image, draw = _blank(height)
    draw.rounded_rectangle((2, 2, width, height - 3), radius=12, outline=colour, width=5)
    draw.text((width / 2 + 1, height / 2 - 1), found, fill=colour, font=font, anchor="mm")
    return image


def _slanted(text: str) -> Image.Image:
    """Mask of a text that slants up to the right."""
    font = _font(_SMALL)
    mask = Image.new("L", (math.ceil(font.getlength(text)), _SMALL * 5 // 4))
    ImageDraw.Draw(mask).text((0, mask.height / 2), text, fill=255, font=font, anchor="lm")
    return mask.rotate(_SLANT, Image.Resampling.BICUBIC, expand=True)


# --- heat maps ------------------------------------------------------------------------------------


def _legend(framed: bool) -> Image.Image:
    """The shades and the meaning of marks. framed: there is a frame to explain."""
    names, font = ends(), _font(_SMALL)
    width, height = _INSIDE // len(names), 56
    image, draw = _blank(height + 132)
    for shade, name in enumerate(names):
        left = shade * width
        _shaded(draw, (left, 0, left + width - 6, height), shade)
        draw.text((left + width / 2, height + 8), name, fill=LIGHT.ink, font=font, anchor="ma")

    x, y = 0.0, height + 106

    def told(text: str) -> float:
        draw.text((x, y), text, fill=LIGHT.ink, font=font, anchor="lm")
        return x + font.getlength(text) + 56

    x = told("error over its limit, the worst of all steps")
    _cross(draw, (x, y - 20, x + 40, y + 20), LIGHT.ink)
    x += 52
    x = told("too large")
    if framed:
        _frame(draw, (x, y - 16, x + 32, y + 16))
        x += 56
        told("first to be wrong")
    return image


def _panel(comparison: Comparison, mode: Mode) -> Image.Image:
    """Title and heat map of a mode that ran."""
    found = [f for f in comparison.findings if f.place.mode == mode]
    first = comparison.divergence
    blocks = [
        _text(MODES[mode], _MIDDLE, LIGHT.ink),
        _text(_steps(found), _SMALL, LIGHT.faint),
        _heat_map(worst(found), first if first and first.place.mode == mode else None),
    ]
    return _stacked(blocks, gap=4)


def _steps(found: Sequence[Finding]) -> str:
    told = []
    for phase in PHASES:
        steps = {f.place.step for f in found if f.place.phase == phase}
        wrong = {f.place.step for f in found if f.place.phase == phase and not f.passed}
        if steps:
            told.append(f"{len(wrong)} of {len(steps)} {phase}")
    return f"steps with an error too large: {', '.join(told)}"


def _heat_map(cells: Cells, first: Finding | None) -> Image.Image:
    layers, stages, outside = axes(cells)
    font = _font(_SMALL)
    names = [_slanted(stage) for stage in stages]
    width = _even(min((_INSIDE - _LEFT - _LEAN) / max(len(stages), 1), _WIDEST))
    height = _even(max(_LOWEST, min(_DEEPEST / max(len(layers), 1), _HIGHEST)))
    top = max((name.height for name in names), default=0) + 8
    bottom = top + len(layers) * height
    image, draw = _blank(bottom + 24 + _SWATCH[1])

    # The middle of a name's left edge stands over the middle of its column.
    aside = _SMALL * 5 / 8 * math.sin(math.radians(_SLANT))
    for column, name in enumerate(names):
        left = _LEFT + (column + 0.5) * width - aside
        image.paste(LIGHT.ink, (round(left), top - 8 - name.height), name)
    numbered = 1
    while numbered * height < _SMALL * 1.2:
        numbered *= 2
    gap = 4 if height > 40 else 2
    boxes: dict[tuple[int | None, str], Box] = {}
    for row, layer in enumerate(layers):
        y = top + row * height
        if layer % numbered == 0:
            at = (_LEFT - 16, y + height / 2)
            draw.text(at, str(layer), fill=LIGHT.ink, font=font, anchor="rm")
        for column, stage in enumerate(stages):
            left = _LEFT + column * width
            boxes[layer, stage] = (left, y, left + width - gap, y + height - gap)
    x, y = float(_LEFT), bottom + 20
    for stage in outside:
        boxes[None, stage] = (x, y, x + _SWATCH[0], y + _SWATCH[1])
        x += _SWATCH[0] + 20
        draw.text((x, y + _SWATCH[1] / 2), stage, fill=LIGHT.ink, font=font, anchor="lm")
        x += font.getlength(stage) + 56

    for key, finding in cells.items():
        _shaded(draw, boxes[key], level(finding))
    if first:
        _frame(draw, boxes[first.place.layer, first.place.stage])
    return image


def _even(x: float) -> int:
    """The next smaller even number, so that cells stay sharp when halved."""
    return int(x) // 2 * 2


def _shaded(draw: ImageDraw.ImageDraw, box: Box, shade: int) -> None:
    left, top, right, bottom = box
    draw.rectangle((left, top, right - 1, bottom - 1), fill=LIGHT.shades[shade])
    if shade > PASSING:
        _cross(draw, box, LIGHT.crosses[shade - PASSING - 1])


def _cross(draw: ImageDraw.ImageDraw, box: Box, colour: str) -> None:
    left, top, right, bottom = box
    x, y = (left + right - 1) / 2, (top + bottom - 1) / 2
    r = min(right - left, bottom - top, 48) * 0.32
    width = 6 if r > 8 else 4
    draw.line((x - r, y - r, x + r, y + r), fill=colour, width=width)
    draw.line((x - r, y + r, x + r, y - r), fill=colour, width=width)


def _frame(draw: ImageDraw.ImageDraw, box: Box) -> None:
    """A frame around a cell, with a line of background between."""
    left, top, right, bottom = box
    for off, width, colour in ((10, 6, LIGHT.ink), (4, 4, LIGHT.paper)):
        outer = (left - off, top - off, right - 1 + off, bottom - 1 + off)
        draw.rectangle(outer, outline=colour, width=width)
