"""Compares two executors on one model, tensor by tensor, to find where they first differ."""

from tilewright.compare.judge import Tolerance
from tilewright.compare.run import Comparison, compare
from tilewright.compare.sides import Choice

__all__ = ["Choice", "Comparison", "Tolerance", "compare"]
