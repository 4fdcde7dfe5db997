"""Compares weights as a candidate packed them with the checkpoint's."""

from collections.abc import Iterable, Iterator

import torch
from attrs import frozen
from torch import Tensor

from tilewright import plugins
from tilewright.weights import expected_tensors, torch_dtype
from tilewright_compare.metrics import difference
from tilewright_compare.sides import Side


@frozen(kw_only=True)
class WeightFinding:
    """A weight of the candidate, against the checkpoint's in the candidate's dtype."""

    name: str
    passed: bool
    why: str
    error: float = 0.0
    """What quantisation costs: the error's norm over the weight's; 0 for other weights."""


QUANTISED_ERROR = 0.5
"""Largest distance of a row of a quantised weight from the checkpoint's, over the row's norm. Four
bits reach 0.15; a row of another weight, or in another order, is about 1.4 away."""


def worst_row_error(found: Tensor, stored: Tensor) -> float:
    """The largest distance of a row from the stored one, over that one's norm.

    A vector is one row, whose norm is that of its differences from its mean: weights of norms are
    all near 1.
    """
    error, of = found.double() - stored.double(), stored.double()
    if stored.ndim == 1:
        error, of = error.unsqueeze(0), (of - of.mean()).unsqueeze(0)
    return float((error.norm(dim=1) / of.norm(dim=1).clamp(min=1e-30)).max())


def compared_weights(candidate: Side, baseline: Side) -> Iterator[WeightFinding]:
    """Each weight, if both executors can return weights.

    Quantised ones are judged by ``QUANTISED_ERROR``, against a baseline that is not quantised.
    """
    if not all(hasattr(side.executor, "weight") for side in (candidate, baseline)):
        return
    shapes = expected_tensors(candidate.model.loaded.config)
    for name, shape in shapes.items():
        source = baseline.executor.weight(name)
        try:
            packed = candidate.executor.weight(name)
        except Exception as error:
            why = f"weight() failed: {plugins.cause(error)}"
            yield WeightFinding(name=name, passed=False, why=why)
            continue
        why, cost = "", 0.0
        if candidate.quantised and packed.shape == source.shape:
            cost = difference(packed, source).relative_rms
        if tuple(packed.shape) != shape:
            why = f"its shape is {list(packed.shape)}, expected {list(shape)}"
        elif _differs(candidate, packed, source):
            d = difference(packed, source)
            others = (
                (other, baseline.executor.weight(other))
                for other in shapes
                if other != name and shapes[other] == shape
            )
            why = how_packed(packed.to(source.dtype), source, others) or (
                f"relative error {d.relative_rms:.2g}, worst at {list(d.worst)}: "
                f"{d.candidate_at_worst:.6g}, expected {d.reference_at_worst:.6g}"
            )
        yield WeightFinding(name=name, passed=not why, why=why, error=cost)


def _differs(candidate: Side, packed: Tensor, source: Tensor) -> bool:
    if candidate.quantised:
        return not worst_row_error(packed, source) <= QUANTISED_ERROR
    return not torch.equal(packed.to(torch_dtype(candidate.weight_dtype)), source)


def how_packed(packed: Tensor, source: Tensor, others: Iterable[tuple[str, Tensor]]) -> str:
    """How packed was made from source (same shape and dtype); empty when no known bug fits.

    others: the model's other weights of that shape, by name; they are read only if needed.
    """
    if not packed.any():
        return "it is all zero"
    if packed.dim() == 2 and torch.equal(packed, source.T.reshape(source.shape)):
        square = source.shape[0] == source.shape[1]
        return "it is transposed" if square else "its transpose is read with the original shape"
    if torch.equal(packed, -source):
        return "its sign is flipped"
    if torch.equal(packed, source + 1):
        return "1 is added to it"
    for name, other in others:
        if torch.equal(packed, other):
            return f"it is {name}"
    if packed.dim() == 1:
        return _order("element", packed.unsqueeze(1), source.unsqueeze(1))
    return _order("row", packed, source) or _order("column", packed.T, source.T)


def _order(what: str, packed: Tensor, source: Tensor) -> str:
    """Describes how source's rows are reordered in packed; empty if they are other rows.

    Both are sorted by a random projection of their rows, and then compared in full.
    """
    chance = torch.Generator().manual_seed(0)
    onto = torch.randn(source.shape[1], generator=chance, dtype=torch.float64)
    ours, theirs = (torch.argsort(t.double() @ onto, stable=True) for t in (packed, source))
    if not torch.equal(packed[ours], source[theirs]):
        return ""
    origin = torch.empty_like(theirs)
    origin[ours] = theirs
    moved = int((origin != torch.arange(len(origin))).nonzero()[0])
    return (
        f"its {what}s are in another order: {what} {moved} is the checkpoint's {int(origin[moved])}"
    )
