"""Finds projections whose sums are kept in 16 bits, while their errors are within the limits.

A ratio of errors does not show it: rounding after each stage, which is right, costs as much as sums
in 16 bits of some thousand terms. But the errors of such sums can be computed again, so a tensor
made of them is far nearer to the same sums than to sums in float32. A right tensor never is, since
it has nothing to do with those errors.
"""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from attrs import frozen
from torch import Tensor

from tilewright.weights import expected_tensors
from tilewright_compare.layer import PRODUCTS, Case, rms_norm

BLOCKS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
"""Numbers of terms after which a sum is rounded."""
NEARER = 1.5
"""How much nearer to sums in 16 bits a tensor must be. A right one is farther from them: its errors
and theirs are independent, so their squares add up. At 1.5, three quarters of the errors are in
common (a correlation of at least 0.74), over at least _LEAST elements."""
_ROWS, _COLUMNS = 32, 512
"""The most that are computed again."""
_LEAST = 32
"""Elements that must differ from sums in float32: of fewer, chance could decide."""


@frozen(kw_only=True)
class Drift:
    """A projection whose sums are kept in 16 bits."""

    tensor: str
    """Where it shows, such as ``layers.0.v_cache``."""
    projection: str
    dtype: str
    block: int
    """Number of terms after which its sums are rounded."""
    nearer: float
    """How many times nearer the tensor is to such sums than to sums in float32."""

    @property
    def sentence(self) -> str:
        shown = f"{self.tensor} is {self.nearer:.2g} times nearer to such sums than to"
        if math.isinf(self.nearer):
            shown = f"{self.tensor} has the bits of such sums, and not of"
        return (
            f"drift: {self.projection} is added up in {self.dtype}, rounded after every "
            f"{self.block} terms: {shown} sums in float32"
        )


def drift(case: Case) -> Drift | None:
    """The first projection of the case's layer whose sums are kept in 16 bits, as far as the
    candidate's input and output of it are known. case: ``before`` and ``limits`` are not used."""
    if case.dtype is torch.float32:
        return None
    for stage, projection, inputs in _projections(case):
        found = case.found[stage].flatten(1)[:_ROWS, :_COLUMNS]
        if not found.isfinite().all():
            continue
        weight = _weight(case, projection)[:_COLUMNS]
        weights = [weight.to(case.dtype).float()]
        if case.quantised:  # which may be multiplied as they are, too
            weights.append(weight.float())
        bias = torch.zeros(1)
        if _full_name(case, f"{projection}.bias") in expected_tensors(case.config):
            bias = _weight(case, f"{projection}.bias")[:_COLUMNS].to(case.dtype).float()
        products = [(x, w, F.linear(x, w)) for x in inputs for w in weights]
        right = min(_distance(found, y + bias, case.dtype) for *_, y in products)
        if min(_different(found, y + bias, case.dtype) for *_, y in products) < _LEAST:
            continue
        block, low = min(
            (
                (block, _distance(found, y + bias, case.dtype))
                for x, w, _ in products
                for block, y in _low_sums(x, w, case.dtype)
            ),
            key=lambda tried: tried[1],
            default=(0, right),
        )
        if right > NEARER * low:
            return Drift(
                tensor=f"layers.{case.layer}.{stage}",
                projection=projection,
                dtype=str(case.dtype).removeprefix("torch."),
                block=block,
                nearer=right / low if low else math.inf,
            )
    return None


def _projections(case: Case) -> Iterator[tuple[str, str, Sequence[Tensor]]]:
    """Stages that hold a projection, the projection's name, and what its input may be."""
    for before, stage in PRODUCTS.values():
        shown = stage if stage in case.found else "v_cache" if stage == "v_proj" else ""
        if not shown or shown in case.tolerances:
            continue
        if before in case.found:
            yield shown, stage, [case.found[before].float().flatten(1)[:_ROWS]]
        elif before == "attn_norm":
            yield shown, stage, _norms(case)


def _norms(case: Case) -> Sequence[Tensor]:
    """attn_norm as kernels round it: once, or before and after its weight; or not at all."""
    weight, eps = _weight(case, "input_layernorm"), case.config.norm_eps
    x = case.hidden.float()[:_ROWS]
    exact = rms_norm(x, weight, eps)
    before = rms_norm(x, torch.ones_like(weight), eps).to(case.dtype).float()
    return [exact.to(case.dtype).float(), (before * weight).to(case.dtype).float(), exact]


def _low_sums(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """Blocks' sizes, and x weight^T with sums in dtype: rounded with each block, with each but the
    first, and with each block's own sum rounded before it is added."""
    for block in BLOCKS:
        if block >= x.shape[1]:
            return
        first = x[:, :block] @ weight[:, :block].T
        total = rounded = first.to(dtype).float()
        late = first
        for i in range(block, x.shape[1], block):
            part = x[:, i : i + block] @ weight[:, i : i + block].T
            total, late = ((t + part).to(dtype).float() for t in (total, late))
            rounded = (rounded + part.to(dtype).float()).to(dtype).float()
        yield from ((block, y) for y in (total, rounded))
        if x.shape[1] > 2 * block:  # of two blocks, these are sums in float32
            yield block, late


def _different(found: Tensor, y: Tensor, dtype: torch.dtype) -> int:
    """Elements of y, rounded as the candidate stores it, that are not those found."""
    return int((found != y.to(dtype).to(found.dtype)).sum())


def _distance(found: Tensor, y: Tensor, dtype: torch.dtype) -> float:
    """Norm of the difference of what was found and of y, rounded as the candidate stores it."""
    return float((found.double() - y.to(dtype).to(found.dtype).double()).norm())


def _weight(case: Case, name: str) -> Tensor:
    """A weight of the layer, named as in ``Weights``; alone, since a layer may be large."""
    return case.weight(_full_name(case, name))


def _full_name(case: Case, name: str) -> str:
    part, _, kind = name.partition(".")
    parent = "" if part == "input_layernorm" else "mlp." if part in _MLP else "self_attn."
    return f"model.layers.{case.layer}.{parent}{part}.{kind or 'weight'}"


_MLP = ("gate_proj", "up_proj", "down_proj")
