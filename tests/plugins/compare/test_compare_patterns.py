"""What is said of where a wrong tensor is wrong."""

import pytest
import torch

from tilewright_compare.patterns import Rows, pattern

LIMIT = 0.01
NAMES = ("prompt-0", "prompt-1")
ROWS = Rows(
    names=NAMES,
    sequence=torch.tensor([0] * 20 + [1] * 12),
    position=torch.cat((torch.arange(20), torch.arange(12))),
    offset=torch.cat((torch.arange(20) % 8, torch.arange(12) % 8)),
    page_size=8,
)
PARTS = {
    # the wrong part of [32 rows, 4 heads, 16 dimensions], and what is said of it
    "half of each head": (slice(None), slice(None), slice(8, 16), "only dimensions 8-15"),
    "one dimension": (slice(None), slice(None), slice(3, 4), "only dimension 3"),
    "one head": (slice(None), slice(1, 2), slice(None), "only head 1"),
    "two heads": (slice(None), slice(2, 4), slice(None), "only heads 2-3"),
    "one sequence": (slice(20, 32), slice(None), slice(None), "only prompt-1"),
    "one token": (slice(25, 26), slice(None), slice(None), "only token 5 of prompt-1"),
    "late positions": (
        ROWS.position >= 9, slice(None), slice(None), "only positions from 9 on",
    ),
    "early positions": (ROWS.position <= 4, slice(None), slice(None), "only positions up to 4"),
    "end of a sequence": (
        slice(12, 20), slice(None), slice(None), "only positions from 12 on",
    ),
    "end of the short sequence": (
        slice(24, 32), slice(None), slice(None), "only prompt-1, positions from 4 on",
    ),
    "last slots": (ROWS.offset == 7, slice(None), slice(None), "only the last slot of each page"),
    "first slots": (
        ROWS.offset == 0, slice(None), slice(None), "only the first slot of each page",
    ),
    "a head's half in a sequence": (
        slice(20, 32), slice(0, 1), slice(0, 8), "only prompt-1, only head 0, only dimensions 0-7",
    ),
    "everywhere": (slice(None), slice(None), slice(None), ""),
    "all dimensions but one in the middle": (
        slice(None), slice(None), [*range(7), *range(8, 16)], "",
    ),
    "every third row": (slice(0, 32, 3), slice(None), slice(None), ""),
}  # fmt: skip


def right() -> torch.Tensor:
    return torch.randn(32, 4, 16, generator=torch.Generator().manual_seed(1))


def rounded(x: torch.Tensor) -> torch.Tensor:
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    return x + noise * LIMIT / 3


@pytest.mark.parametrize("error", ["another value", "NaN"])
@pytest.mark.parametrize("part", PARTS)
def test_a_part_is_named_where_it_is_clear_cut(part, error):
    rows, heads, dimensions, said = PARTS[part]
    wrong = torch.zeros(32, 4, 16, dtype=torch.bool)
    wrong[rows, heads, dimensions] = True
    other = torch.full_like(right(), torch.nan) if error == "NaN" else right().flip(0) + 3.0
    assert pattern(torch.where(wrong, other, rounded(right())), right(), LIMIT, ROWS) == said


def test_columns_of_rows_without_heads_are_named():
    found = rounded(right()).flatten(1)
    found[:, 48:] = 0.0
    assert pattern(found, right().flatten(1), LIMIT) == "only columns 48-63"


def test_rows_are_not_named_where_it_is_unknown_what_they_are():
    found = rounded(right())
    found[20:] = 0.0
    assert pattern(found, right(), LIMIT) == ""


@pytest.mark.parametrize("factor", [0.70711, 2.0, -1.0])
def test_a_factor_is_said_where_the_direction_is_the_same(factor):
    said = pattern(right() * factor, right(), LIMIT, ROWS)
    assert said == ("" if factor < 0 else f"{factor:.5f} times as large, same direction")


def test_rounding_has_no_pattern():
    assert pattern(rounded(right()), right(), LIMIT, ROWS) == ""


def test_errors_that_are_neither_clearly_wrong_nor_right_have_no_pattern():
    found = rounded(right())
    found[:, 0] += 2 * LIMIT
    found[:, 1] += 10 * LIMIT
    assert "head" not in pattern(found, right(), LIMIT, ROWS)
