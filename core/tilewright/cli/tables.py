"""Tables and JSON records on standard output, for commands that list things."""

import json
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any


def print_columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print aligned columns, or one block per item on a terminal that is too narrow."""
    if table_width(header, rows) <= terminal_width():
        widths = _widths(header, rows)
        for row in (header, *rows):
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            print("  ".join(cells).rstrip())
        return
    for name, *others in rows:
        print(name)
        for title, cell in zip(header[1:], others, strict=True):
            print(f"  {title.lower()}: {cell}")


def _widths(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(header, *rows, strict=True)]


def table_width(header: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    """Terminal columns that the aligned columns take."""
    return sum(_widths(header, rows)) + 2 * (len(header) - 1)


def terminal_width() -> float:
    """Width of the output terminal in columns; infinite for files and pipes."""
    given = os.environ.get("COLUMNS", "")
    if given.isdecimal():
        return int(given)
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or float("inf")
    except (OSError, ValueError):
        return float("inf")


def print_json(records: Iterable[dict[str, Any]]) -> None:
    print(json.dumps(list(records), indent=2, default=str))
