"""Weights of 8 and 4 bits: what they store, how they are made, and the products with them.

``int8``: one scale for each row, symmetric. ``int4``: a scale and a zero point for each ``GROUP``
weights of a row. The embedding and the head are int8 in both, as is a projection whose rows are not
a multiple of ``GROUP``. Scales and zero points are in the model's dtype and are chosen among its
numbers, so that a weight is exactly what they say and no product rounds them.

On every path, products are accumulated in float32 and rounded once to the model's dtype; a bias is
added after that. The paths differ in what they multiply:

=====  ========  ==================================================  ============================
dtype  rows      path                                                operands
=====  ========  ==================================================  ============================
int8   up to 8   ``torch._weight_int8pack_mm``, bfloat16 with AVX    as stored
int8   others    block by block, a native product or one in float32  as stored
int4   up to 16  ``torch._weight_int4pack_mm_for_cpu``, the same     as stored
int4   others    block by block, as above                            weights rounded to the dtype
=====  ========  ==================================================  ============================

The two operations of torch were measured to take 50 to 100 times as long in other dtypes and
without vector instructions, and more than twice as long as blocks for many rows.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Protocol, TypeAlias

import torch
import torch.nn.functional as F
from attrs import field, frozen
from torch import Tensor

from tilewright.kv_storage import zeros
from tilewright.types import QuantisedTensor
from tilewright.weights import EMBEDDING, HEAD
from tilewright_torch.linear import BLOCK_BYTES, has_native, onednn

GROUP = 32
"""Weights of a row that share a scale and a zero point in int4."""
TILE = 64
"""Rows of an int4 tile, as it is stored in files."""

_FEW_INT8, _FEW_INT4 = 8, 16
"""Most rows for which torch's operation is faster than block by block."""

_SLAB_INT8, _SLAB_INT4 = 2**16, 2**17
"""Weights that are quantised at a time, so that what is tried stays in the CPU's cache."""

_SHRUNK = (0.92, 0.84)
"""Parts of a group's range that are tried as the range of its 16 values, beside the whole."""


def _aligned(tensor: Tensor) -> Tensor:
    """A contiguous tensor at an address that vector instructions can load: a copy if need be."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 64 else tensor


@frozen(kw_only=True, eq=False)
class Int8:
    """A weight [out, in] in 8 bits: values * scales."""

    values: Tensor = field(converter=_aligned)
    """[out, in] int8, -127 to 127. A file may hold them at any address."""
    scales: Tensor
    """[out] in the model's dtype."""
    bias: Tensor | None = None
    """[out] in the model's dtype."""

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """x: [rows, in] in the model's dtype; returns [rows, out] in it."""
        # With other sizes and addresses, the operation reads beyond a row's end, or crashes.
        if _fast(x, _FEW_INT8) and self.values.shape[1] % 32 == 0:
            product = torch._weight_int8pack_mm(_aligned(x), self.values, self.scales)
        else:
            product = self._in_blocks(x)
        return product if self.bias is None else product + self.bias

    def _in_blocks(self, x: Tensor) -> Tensor:
        wide = _product_dtype(x.dtype)
        rows, columns = self.values.shape
        step = min(rows, max(16, BLOCK_BYTES // (4 * columns)))
        block = torch.empty(step, columns, dtype=wide)
        product = torch.empty(x.shape[0], rows, dtype=x.dtype)
        x = x.to(wide)
        for start in range(0, rows, step):
            part = self.values[start : start + step]
            weight = block[: part.shape[0]].copy_(part)
            scales = self.scales[start : start + step]
            product[:, start : start + step] = _scaled(x, weight, scales)
        return product

    def rows(self, ids: Tensor) -> Tensor:
        """Some rows, [len(ids), in] in the model's dtype."""
        return self.values[ids].to(self.scales.dtype) * self.scales[ids].unsqueeze(1)

    def dequantised(self) -> Tensor:
        """[out, in] float32, exactly the weight that the products use."""
        return self.values.float() * self.scales.float().unsqueeze(1)


@frozen(kw_only=True, eq=False)
class Int4:
    """A weight [out, in] in 4 bits: (value - 8) * scale + zero, values from 0 to 15."""

    values: Tensor
    """[ceil(out / tile), in, tile / 2] uint8. Byte [t, k, j] holds column k of two rows: row
    t * tile + j in its low half, and row t * tile + tile / 2 + j in its high half. The tile is
    ``TILE`` in files; in memory it is what this CPU multiplies fastest, 64 or 32."""
    scales: Tensor
    """[in / GROUP, ceil(out / TILE) * TILE, 2] in the model's dtype: the scale and the zero point
    of each group of each row; zero in rows beyond out, as are the values' weights."""
    out: int
    """Rows of the weight."""
    bias: Tensor | None = None
    """[out] in the model's dtype."""

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes

    @property
    def tile(self) -> int:
        return 2 * self.values.shape[2]

    def __call__(self, x: Tensor) -> Tensor:
        """x: [rows, in] in the model's dtype; returns [rows, out] in it."""
        if _fast(x, _FEW_INT4) and self.tile == _native_tile():
            stored = self.values.view(-1, self.values.shape[1] // 2)
            padded = torch._weight_int4pack_mm_for_cpu(x.contiguous(), stored, GROUP, self.scales)
            product = padded[:, : self.out]
        else:
            product = self._in_blocks(x)
        return product if self.bias is None else product + self.bias

    def _in_blocks(self, x: Tensor) -> Tensor:
        product = torch.empty(x.shape[0], self.out, dtype=x.dtype)
        wide = x.to(_product_dtype(x.dtype))
        for start, block in self._blocks(wide.dtype):
            part = torch.bmm(wide.expand(block.shape[0], -1, -1), block)
            part = part.transpose(0, 1).flatten(1)[:, : self.out - start]
            product[:, start : start + part.shape[1]] = part
        return product

    def _blocks(self, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        """The first row of each block of tiles, and the block, [tiles, in, tile] in a dtype. The
        next block overwrites its memory."""
        tiles, columns, half = self.values.shape
        groups, tile = columns // GROUP, self.tile
        step = min(tiles, max(1, BLOCK_BYTES // (4 * columns * tile)))
        buffer = torch.empty(step, columns, tile, dtype=dtype)
        for first in range(0, tiles, step):
            packed = self.values[first : first + step]
            block = buffer[: packed.shape[0]]
            block[..., :half] = packed & 15
            block[..., half:] = packed >> 4
            block -= 8
            of = self.scales[:, first * tile : (first + step) * tile].to(dtype)
            scale, zero = of.view(groups, -1, tile, 2).permute(3, 1, 0, 2).unsqueeze(3).contiguous()
            grouped = block.view(-1, groups, GROUP, tile)
            torch.addcmul(zero, grouped, scale, out=grouped)
            yield first * tile, block

    def dequantised(self) -> Tensor:
        """[out, in] float32: the weight that the products use, before any rounding of it."""
        weight = torch.empty(self.out, self.values.shape[1])
        for start, block in self._blocks(torch.float32):
            rows = block.transpose(1, 2).flatten(0, 1)[: self.out - start]
            weight[start : start + len(rows)] = rows
        return weight


Quantised: TypeAlias = Int8 | Int4


def kind(name: str, shape: tuple[int, ...], weight_dtype: str) -> str | None:
    """How a tensor of a model is stored in a quantised weight dtype: ``int8``, ``int4``, or
    None for one that stays in the model's dtype (norms and biases)."""
    if name in (EMBEDDING, HEAD):
        return "int8"
    if not name.endswith("_proj.weight"):
        return None
    return weight_dtype if shape[1] % GROUP == 0 else "int8"


def stored_shapes(kind: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the values and of the scales of a weight, as they are stored in files."""
    rows, columns = shape
    if kind == "int8":
        return (rows, columns), (rows,)
    tiles = -(-rows // TILE)
    return (tiles, columns, TILE // 2), (columns // GROUP, tiles * TILE, 2)


# --- quantising -----------------------------------------------------------------------------------

# Results are mapped (``zeros``): those that malloc puts between temporaries keep it from using the
# memory of these again.


class Rows(Protocol):
    """A weight [out, in] of any float dtype: a tensor, or a matrix whose rows are read when they
    are sliced."""

    @property
    def shape(self) -> Sequence[int]: ...

    def __getitem__(self, rows: slice) -> Tensor: ...


def int8(weight: Rows, dtype: torch.dtype) -> Int8:
    """Quantise a weight for a model of a dtype.

    The scale is a row's largest magnitude over 127, as a number of the dtype.
    """
    rows, columns = weight.shape
    values = zeros((rows, columns), torch.int8)
    scales = zeros((rows,), dtype)
    step = max(1, _SLAB_INT8 // columns)
    wide, scaled = torch.empty(2, step, columns)
    for start in range(0, rows, step):
        count = min(step, rows - start)
        part = wide[:count].copy_(weight[start : start + count])
        largest = torch.abs(part, out=scaled[:count]).amax(1)
        scale = _not_zero((largest / 127).to(dtype))
        scales[start : start + count] = scale
        torch.div(part, scale.float().unsqueeze(1), out=scaled[:count])
        values[start : start + count] = scaled[:count].round_().clamp_(-127, 127)
    return Int8(values=values, scales=scales)


def int4(weight: Rows, dtype: torch.dtype, tile: int = TILE) -> Int4:
    """Quantise a weight, in a multiple of GROUP, for a model of a dtype.

    The scale and zero point of a group are those of a few that leave the least squared error, of
    numbers of the dtype.
    """
    rows, columns = weight.shape

    def parts() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        step = TILE * max(1, _SLAB_INT4 // (TILE * columns))
        memory = torch.empty(3, columns * step)
        for start in range(0, rows, step):
            count = min(step, rows - start)
            part, exact, rounded = memory[:, : columns * count].view(3, -1, GROUP, count)
            part.view(columns, count).copy_(weight[start : start + count].t().contiguous())
            values, scale, zero = _grouped(part, exact, rounded, dtype)
            yield values.view(columns, count), scale, zero

    return _tiled(parts, rows, columns, dtype, tile)


def kept(stored: QuantisedTensor, dtype: torch.dtype, tile: int = TILE) -> Int4 | None:
    """A weight that its file stores in 4 bits, with the file's values; None where scales in the
    dtype would change it."""
    if stored.group != GROUP or dtype != torch.float32:
        return None
    rows, columns = stored.values.shape
    # float64, so that the zero point of a symmetric group is exactly 0.
    zeros = (stored.offsets.double() + 8 * stored.scales.double()).float()
    parts = lambda: iter([(stored.values.t(), stored.scales.t(), zeros.t())])  # noqa: E731
    return _tiled(parts, rows, columns, dtype, tile)


def retiled(weight: Int4, tile: int) -> Int4:
    """The same weight in tiles of another size, which divides TILE or is a multiple of it."""
    if weight.tile == tile:
        return weight
    values = torch.cat((weight.values & 15, weight.values >> 4), 2)  # [tiles, in, rows]
    by_column = values.transpose(0, 1).flatten(1)
    return Int4(
        values=_packed(by_column, tile), scales=weight.scales, out=weight.out, bias=weight.bias
    )


def memory_tile() -> int:
    """Rows of the tiles that this CPU multiplies fastest."""
    return _native_tile() or TILE


Parts: TypeAlias = Callable[[], Iterator[tuple[Tensor, Tensor, Tensor]]]
"""Values [in, rows], and scales and zero points [in / GROUP, rows], of some rows at a time."""


def _tiled(parts: Parts, rows: int, columns: int, dtype: torch.dtype, tile: int) -> Int4:
    padded = -(-rows // TILE) * TILE
    packed = zeros((padded // tile, columns, tile // 2), torch.uint8)
    scales = zeros((columns // GROUP, padded, 2), dtype)
    start = 0
    for values, scale, zero in parts():
        count = values.shape[1]
        scales[:, start : start + count, 0], scales[:, start : start + count, 1] = scale, zero
        values = F.pad(values, (0, -count % TILE), value=8)
        packed[start // tile : (start + values.shape[1]) // tile] = _packed(values, tile)
        start += count
    return Int4(values=packed, scales=scales, out=rows)


def _packed(values: Tensor, tile: int) -> Tensor:
    """Values [in, rows] from 0 to 15, rows a multiple of tile, as ``Int4.values``."""
    low, high = values.to(torch.uint8).reshape(len(values), -1, 2, tile // 2).unbind(2)
    return (low | (high << 4)).transpose(0, 1).contiguous()


def _grouped(
    weights: Tensor, exact: Tensor, rounded: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Values, as weights, and scales and zero points [groups, rows] as numbers of the dtype, of
    weights [groups, GROUP, rows] in float32.

    exact, rounded: memory of the same shape, to overwrite.
    """
    low, high = weights.amin(1), weights.amax(1)
    middle, span = (low + high) / 2, (high - low) / 15

    def quantise(scale: Tensor, zero: Tensor) -> Tensor:
        """Values from -8 to 7, which the next call overwrites."""
        torch.sub(weights, zero.unsqueeze(1), out=exact).div_(scale.unsqueeze(1))
        return torch.round(exact, out=rounded).clamp_(-8, 7)

    def tried(scale: Tensor, zero: Tensor) -> Tried:
        scale, zero = _not_zero(scale.to(dtype)).float(), zero.to(dtype).float()
        off = exact.sub_(quantise(scale, zero))
        return off.square_().sum(1).mul_(scale.square()), scale, zero

    best = tried(span, middle + span / 2)
    for part in _SHRUNK:
        best = _better(best, tried(part * span, middle + part * span / 2))
    fitted = _fitted(weights, quantise(*best[1:]), exact)
    _, scale, zero = _better(best, tried(*fitted))
    return quantise(scale, zero).add_(8).to(torch.int8), scale, zero


Tried: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""The squared error of each group, its scale and its zero point."""


def _better(best: Tried, other: Tried) -> Tried:
    """For each group, the one of the two with less error."""
    less = other[0] < best[0]
    error, scale, zero = (
        torch.where(less, theirs, ours) for theirs, ours in zip(other, best, strict=True)
    )
    return error, scale, zero


def _fitted(weights: Tensor, values: Tensor, products: Tensor) -> tuple[Tensor, Tensor]:
    """The scale and zero point of each group that suit its values best: a linear regression.

    products: memory of the same shape, to overwrite.
    """
    mean, level = values.sum(1) / GROUP, weights.sum(1) / GROUP
    covariance = torch.mul(values, weights, out=products).sum(1) / GROUP - mean * level
    variance = torch.square(values, out=products).sum(1) / GROUP - mean.square()
    scale = covariance / variance.clamp(min=1e-6)
    return scale, level - scale * mean


def _not_zero(scale: Tensor) -> Tensor:
    """1 in place of the scale 0 of weights that are all equal, or too small for the dtype."""
    return scale.masked_fill(scale == 0, 1.0)


# --- products -------------------------------------------------------------------------------------


def has_native_products() -> bool:
    """Whether torch multiplies few rows of bfloat16 with quantised weights natively here."""
    return _native_tile() is not None


def _fast(x: Tensor, most: int) -> bool:
    return x.dtype == torch.bfloat16 and 0 < x.shape[0] <= most and _native_tile() is not None


@cache
def _native_tile() -> int | None:
    """Rows of the tiles that ``_weight_int4pack_mm_for_cpu`` reads on this CPU; None where it and
    its 8-bit counterpart have no vector instructions, or where it reads another layout."""
    tile = {"AVX512": 64, "AVX2": 32}.get(torch.backends.cpu.get_cpu_capability())
    if tile is None:
        return None
    values = torch.arange(TILE * GROUP, dtype=torch.int32).mul_(7).remainder_(16).view(TILE, GROUP)
    theirs = torch._convert_weight_to_int4pack_for_cpu(values, 1)
    return tile if torch.equal(theirs.flatten(), _packed(values.t(), tile).flatten()) else None


def _product_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which blocks are multiplied."""
    return dtype if has_native(dtype) else torch.float32


def _scaled(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """(x @ weight.T) * scales, with 16-bit operands rounded only once, after both."""
    if x.dtype != torch.float32:
        product: Tensor = torch.ops.mkldnn._linear_pointwise.binary(
            x, scales.unsqueeze(0), weight, None, "mul"
        )
        return product
    multiply = onednn if has_native(torch.float32) else F.linear
    return multiply(x, weight, None) * scales.float()
