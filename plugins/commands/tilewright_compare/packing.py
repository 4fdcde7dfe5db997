"""Describes in words how a packed weight differs from the checkpoint's."""

from collections.abc import Iterable

import torch
from torch import Tensor


def how_packed(packed: Tensor, source: Tensor, others: Iterable[tuple[str, Tensor]]) -> str:
    """How packed was made from source (same shape and dtype); empty when no known mistake fits.

    others: the model's other weights of that shape, by name; they are read only if needed.
    """
    if not packed.any():
        return "it is all zero"
    if packed.dim() == 2 and torch.equal(packed, source.T.reshape(source.shape)):
        square = source.shape[0] == source.shape[1]
        return "it is transposed" if square else "its transpose is read as if it had its shape"
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
    """Describes rows that are source's in another order; else empty. Both are sorted by a random
    projection of their rows, and then compared in full."""
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
