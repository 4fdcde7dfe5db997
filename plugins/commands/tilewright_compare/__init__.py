"""Compares two executors on one model, tensor by tensor, to find where they first differ.

Names are imported when they are first used, so that ``tilewright compare --help`` does not import
torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tilewright_compare.comparison import Comparison as Comparison
    from tilewright_compare.judge import Tolerance as Tolerance
    from tilewright_compare.run import compare as compare
    from tilewright_compare.sides import Choice as Choice

_HOMES = {
    "Choice": "tilewright_compare.sides",
    "Comparison": "tilewright_compare.comparison",
    "Tolerance": "tilewright_compare.judge",
    "compare": "tilewright_compare.run",
}

__all__ = ["Choice", "Comparison", "Tolerance", "compare"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tilewright_compare' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
