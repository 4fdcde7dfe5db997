"""Where does it first go wrong: two executors on one model, tensor by tensor."""

from tilewright.compare.judge import Tolerance
from tilewright.compare.run import Comparison, compare
from tilewright.compare.sides import Choice

__all__ = ["Choice", "Comparison", "Tolerance", "compare"]
