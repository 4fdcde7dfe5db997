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


def compared_weights(candidate: Side, baseline: Side) -> Iterator[WeightFinding]:
    """Each weight, if both executors can return weights."""
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
        why = ""
        if tuple(packed.shape) != shape:
            why = f"its shape is {list(packed.shape)}, expected {list(shape)}"
        elif not torch.equal(packed.to(torch_dtype(candidate.weight_dtype)), source):
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
        yield WeightFinding(name=name, passed=not why, why=why)


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
