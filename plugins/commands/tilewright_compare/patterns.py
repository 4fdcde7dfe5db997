"""Where in a wrong tensor the errors are, in words: in some dimensions, heads, tokens or sequences.

A part is named only where it is clear-cut: errors inside it, in nearly all of it, and none outside.
"""

from collections.abc import Sequence

import torch
from attrs import frozen
from torch import Tensor

WRONG = 3.0
"""A slice of a tensor is wrong if its error is that many times the tensor's limit."""
RIGHT = 1.5
"""A slice is right up to that many times the limit; between the two, nothing is clear-cut."""
INSIDE = 0.9
"""Least share of a part's slices that are wrong."""
SAME_DIRECTION = 0.999
"""Least cosine of two tensors that differ by a factor."""


@frozen(kw_only=True)
class Rows:
    """What the rows of a tensor are: tokens of sequences."""

    names: Sequence[str]
    """Names of the sequences."""
    sequence: Tensor
    """Index of each row's sequence in ``names``, [rows] int64."""
    position: Tensor
    """Position of each row in its sequence, [rows] int64."""
    offset: Tensor
    """Slot of each row within its page, [rows] int64."""
    page_size: int


def pattern(
    found: Tensor, expected: Tensor, limit: float, rows: Rows | None = None, head: str = "head"
) -> str:
    """Where two tensors of one shape differ, and by which factor; empty if nothing is clear-cut.

    found, expected: [rows, columns] or [rows, heads, head_dim]. limit: the relative RMS error that
    rounding explains. rows: what the rows are; None: unknown. head: what the heads are.
    """
    a, b = found.double(), expected.double()
    broken = a.isfinite() != b.isfinite()
    gap = torch.where(broken, float("inf"), (a - b).nan_to_num(nan=0.0))
    size = float(b.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).pow(2).mean().sqrt())
    if not size or not limit:
        return ""
    errors = gap / (size * limit)
    parts = []
    if (of_rows := _wrong(errors, 0)) is not None:
        parts.append(_of_rows(of_rows, rows))
    if errors.dim() == 3 and (of_heads := _wrong(errors, 1)) is not None:
        parts.append(_span(of_heads, head, f"{head}s"))
    if (of_columns := _wrong(errors, errors.dim() - 1)) is not None:
        names = ("dimension", "dimensions") if errors.dim() == 3 else ("column", "columns")
        parts.append(_span(of_columns, *names))
    told = [f"only {part}" for part in parts if part]
    if factor := _factor(a, b, limit):
        told.append(factor)
    return ", ".join(told)


def _wrong(errors: Tensor, axis: int) -> Tensor | None:
    """Which slices along an axis are wrong, [slices] bool; None if all are, or if it is unclear."""
    others = [i for i in range(errors.dim()) if i != axis]
    each = errors.pow(2).mean(others).sqrt()
    wrong = each > WRONG
    if not wrong.any() or wrong.all():
        return None
    return wrong if bool((each[~wrong] <= RIGHT).all()) else None


def _span(wrong: Tensor, one: str, several: str) -> str:
    """The first and the last of the wrong slices, if nearly all between them are wrong too."""
    places = wrong.nonzero().flatten()
    first, last = int(places[0]), int(places[-1])
    if last - first + 1 == len(wrong) or len(places) < INSIDE * (last - first + 1):
        return ""
    return f"{one} {first}" if first == last else f"{several} {first}-{last}"


def _of_rows(wrong: Tensor, rows: Rows | None) -> str:
    if rows is None or len(rows.position) != len(wrong):
        return ""
    sequence, position = rows.sequence, rows.position
    if int(wrong.sum()) == 1:
        row = int(wrong.nonzero())
        return f"token {int(position[row])} of {rows.names[int(sequence[row])]}"
    start, end = int(position[wrong].min()), int(position[wrong].max())
    last = rows.page_size - 1
    parts = {
        "the last slot of each page": rows.offset == last,
        "the first slot of each page": rows.offset == 0,
    }
    touched = sorted(set(sequence[wrong].tolist()))
    for one in touched:
        parts[rows.names[one]] = sequence == one
    parts |= {
        f"positions from {start} on": position >= start,
        f"positions up to {end}": position <= end,
        f"positions {start}-{end}": (position >= start) & (position <= end),
    }
    parts[f"sequences from {rows.names[touched[0]]} on"] = sequence >= touched[0]
    for one in touched:
        mine = sequence == one
        begin = int(position[wrong & mine].min())
        parts[f"{rows.names[one]}, positions from {begin} on"] = mine & (position >= begin)
    for name, part in parts.items():
        if bool((wrong & ~part).any()) or bool(part.all()):
            continue
        if float(wrong[part].double().mean()) >= INSIDE:
            return name
    return ""


def _factor(found: Tensor, expected: Tensor, limit: float) -> str:
    """The factor between two tensors of one direction."""
    a, b = found.flatten(), expected.flatten()
    if not (a.isfinite().all() and b.isfinite().all()):
        return ""
    gain = float(a @ b / (b @ b))
    cosine = float(a @ b / (a.norm() * b.norm())) if float(a.norm()) else 0.0
    if cosine < SAME_DIRECTION or abs(gain - 1) <= WRONG * limit:
        return ""
    return f"{gain:.5f} times as large, same direction"
