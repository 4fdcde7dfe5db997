"""Operators on tiles and device memory, as PyPTO's documentation and passes define them.

Their docstrings are the table of docs/kernel-language.md, and parameters have PyPTO's names. A
paragraph that begins with "Not emulated:" lists what PyPTO's own form has besides.
"""

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from tilewright_pypto.emulated.memory import (
    Memory,
    Tile,
    allocate,
    fail,
    in_task,
    outside_task,
    running,
    whole,
)

Operand: TypeAlias = "Tile | Memory | int | float"
INDEX = "INDEX"
"""The type of offsets and loop variables, not a tensor dtype."""

CUBE = 16
"""The cube works on blocks of 16 x 16."""
ROW_BYTES = 32
"""Rows of a tile are multiples of this many bytes."""


def slice_(
    input: object,
    shape: Sequence[int],
    offset: Sequence[int],
    valid_shape: "Sequence[int] | None" = None,
) -> "Memory | Tile":
    """The window of ``shape`` at ``offset`` in a tensor, as ``x[r : r + n, c : c + m]``.

    In a task it is loaded as a tile, outside it is a view. The window must lie in the tensor and
    have been written; with ``valid_shape``, from 1 to ``shape``, only that part of it.

    Not emulated: slices of tiles; ``drop_dims``, ``pad_value`` (use pl.fillpad), ``clamp``.
    """
    if not isinstance(input, Memory):
        fail("pl.slice of anything but device memory is not emulated")
    valid = None if valid_shape is None else tuple(valid_shape)
    return input.take(tuple(shape), tuple(offset), valid)


def assemble(target: object, source: object, offset: Sequence[int]) -> Memory:
    """Store the valid part of a tile in a tensor at ``offset``; returns the tensor.

    ``x[r : r + n, c : c + m] = tile`` is the same. The dtypes must be equal.

    Not emulated: targets that are tiles; ``atomic``.
    """
    in_task("pl.assemble")
    if not isinstance(target, Memory):
        fail("pl.assemble into anything but device memory is not emulated")
    target.store(_tile(source, "pl.assemble"), tuple(offset))
    return target


def create_tensor(shape: Sequence[int], dtype: torch.dtype) -> Memory:
    """Scratch in device memory, outside tasks. It must be written before it is read.

    Not emulated: ``layout``, ``manual_dep``, ``init_value``.
    """
    run = outside_task("pl.create_tensor")
    return allocate("scratch", shape, dtype, run)


def full(shape: Sequence[int], dtype: torch.dtype, value: float) -> Tile:
    """A tile that holds ``value`` in all elements."""
    in_task("pl.full")
    return whole(torch.full(tuple(shape), value, dtype=dtype))


def read(src: object, offset: Sequence[int]) -> int | float:
    """One element of a tensor: a scalar. ``offset`` has one index for each dimension.

    Not emulated: reads of tiles; ``x[i, j]``; a flat index.
    """
    running()
    if not isinstance(src, Memory):
        fail("pl.read of anything but device memory is not emulated")
    if not isinstance(offset, Sequence) or len(offset) != len(src.shape):
        fail(f"pl.read expects {len(src.shape)} indices in a list, found {offset}")
    for i, size in zip(offset, src.shape, strict=True):
        if not 0 <= i < size:
            fail(f"{src.buffer.name}{list(offset)} is outside its shape {list(src.shape)}")
    if src.written is not None and not src.written[tuple(offset)]:
        fail(f"{src.buffer.name}{list(offset)} is read, but was not written")
    return src.data[tuple(offset)].item()


def dim(tensor: object, axis: int) -> int:
    """The extent of a tensor's dimension: a scalar."""
    if not isinstance(tensor, Memory):
        fail("pl.tensor.dim of anything but device memory is not emulated")
    return tensor.shape[axis]


def reshape(input: object, shape: Sequence[int]) -> "Memory | Tile":
    """The same elements in row-major order in another shape: a tile, or a view of a tensor.

    A tile must be wholly valid.

    Not emulated: a window of a tensor whose rows are not contiguous.
    """
    size = tuple(shape)
    if isinstance(input, Memory):
        if not input.data.is_contiguous():
            fail("pl.reshape of a window of device memory is not emulated")
        written = None if input.written is None else input.written.view(size)
        return Memory(input.buffer, input.data.view(size), written)
    tile = _tile(input, "pl.reshape")
    if tile.defined != tile.shape or tile.valid != tile.shape:
        fail(f"pl.reshape needs a whole tile of {list(tile.shape)}, found valid {list(tile.valid)}")
    return whole(tile.data.reshape(size))


# --- vectors --------------------------------------------------------------------------------------


def binary(name: str, says: str, compute: Callable[..., Tensor]) -> Callable[..., Tile]:
    """An operator on two tiles of the same shape, or on a tile and a number.

    says: its docstring.
    """

    def operator(lhs: Operand, rhs: Operand) -> Tile:
        left = _vector(lhs, name)
        if isinstance(rhs, (int, float)):
            return Tile(compute(left.data, rhs), left.valid, left.defined)
        right = _vector(rhs, name)
        _same_dtype(left, right, name)
        if left.shape != right.shape:
            fail(
                f"{name} expects tiles of the same shape, found {list(left.shape)} and "
                f"{list(right.shape)}: use its row_expand or col_expand variant"
            )
        return _of_two(compute(left.data, right.data), left, right)

    operator.__doc__ = says
    return operator


def unary(name: str, says: str, compute: Callable[[Tensor], Tensor]) -> Callable[..., Tile]:
    """An operator on each element of a tile. says: its docstring."""

    def operator(input: Operand) -> Tile:
        tile = _vector(input, name)
        return Tile(compute(tile.data), tile.valid, tile.defined)

    operator.__doc__ = says
    return operator


def expand(
    name: str, says: str, compute: Callable[[Tensor, Tensor], Tensor], axis: int
) -> Callable[..., Tile]:
    """An operator on a tile and a column (axis 1) or row (axis 0) that is broadcast over it.

    says: its docstring.
    """

    def operator(lhs: Operand, rhs: Operand) -> Tile:
        tile, line = _vector(lhs, name), _vector(rhs, name)
        _same_dtype(tile, line, name)
        rows, columns = tile.shape
        wanted = (rows, 1) if axis == 1 else (1, columns)
        if line.shape != wanted:
            fail(f"{name} of {list(tile.shape)} expects {list(wanted)}, found {list(line.shape)}")
        along = 1 - axis
        if line.defined[along] < tile.defined[along]:
            fail(f"{name} reads more of its second operand than was computed")
        return Tile(compute(tile.data, line.data), tile.valid, tile.defined)

    operator.__doc__ = says
    return operator


def reduce(
    name: str, says: str, compute: Callable[[Tensor], Tensor], axis: int
) -> Callable[..., Tile]:
    """A reduction of a tile's rows to a column (axis 1), or of its columns to a row (axis 0).

    says: its docstring.
    """

    def operator(input: Operand) -> Tile:
        tile = _vector(input, name)
        if tile.valid[axis] != tile.shape[axis] or tile.defined[axis] != tile.shape[axis]:
            fail(
                f"{name} of {list(tile.shape)}, of which only {list(tile.valid)} is valid: the "
                "effect of padding is undefined, use pl.fillpad first"
            )
        reduced = (1 if axis == 0 else None, 1 if axis == 1 else None)
        valid, defined = (
            tuple(r or e for r, e in zip(reduced, extents, strict=True))
            for extents in (tile.valid, tile.defined)
        )
        return Tile(compute(tile.data), valid, defined)

    operator.__doc__ = says
    return operator


def transpose(input: Operand, axis1: int, axis2: int) -> Tile:
    """A tile [M, N] as [N, M]; the axes are 0 and 1. The tile must be wholly valid.

    Not emulated: outside tasks; other ranks. For a matrix product use ``b_trans``.
    """
    tile = _vector(input, "pl.transpose")
    if len(tile.shape) != 2 or {axis1 % 2, axis2 % 2} != {0, 1}:
        fail(f"pl.transpose of {list(tile.shape)} by axes {axis1} and {axis2} is not emulated")
    if tile.defined != tile.shape or tile.valid != tile.shape:
        fail(f"pl.transpose needs a whole tile of {list(tile.shape)}, found {list(tile.valid)}")
    turned = whole(tile.data.t().contiguous())
    return _vector(turned, "the result of pl.transpose")


def concat(src0: Operand, src1: Operand) -> Tile:
    """The columns of one tile followed by those of another with as many rows.

    Both must be wholly valid.
    """
    left, right = _vector(src0, "pl.concat"), _vector(src1, "pl.concat")
    if left.shape[0] != right.shape[0]:
        fail(
            f"pl.concat expects as many rows in both, found {list(left.shape)} and "
            f"{list(right.shape)}"
        )
    if any(t.valid != t.shape or t.defined != t.shape for t in (left, right)):
        fail("pl.concat needs whole tiles: use pl.fillpad first")
    return whole(torch.cat((left.data, right.data), 1))


def fillpad(value: Operand, pad_value: float = 0.0) -> Tile:
    """The tile, wholly valid, with a value of pl.PadValue in what was not; also BF16.

    The valid part must have been computed.
    """
    tile = _vector(value, "pl.fillpad", torch.bfloat16)
    if pad_value not in (0.0, -math.inf, math.inf):
        fail(f"pl.fillpad expects pad_value zero or an infinity, found {pad_value}")
    if any(d < v for d, v in zip(tile.defined, tile.valid, strict=True)):
        fail("pl.fillpad of a tile whose valid part was not computed completely")
    filled = torch.full(tile.shape, pad_value, dtype=tile.dtype)
    part = tuple(slice(v) for v in tile.valid)
    filled[part] = tile.data[part]
    return whole(filled)


def cast(input: Operand, target_type: "torch.dtype | str", mode: str = "round") -> "Tile | int":
    """The tile in another dtype, or a scalar as pl.INDEX.

    Mode "round" rounds ties away from zero, "rint" to even; "floor", "ceil" and "trunc" are for
    integers. A cast to the tile's own dtype is refused.

    Not emulated: modes "none" and "odd", and their numbers; "round" to FP16; scalars to dtypes.
    """
    if isinstance(input, (int, float)):
        if target_type != INDEX:
            fail("a scalar can only be cast to pl.INDEX: other targets are not emulated")
        return int(input)
    in_task("pl.cast")
    tile = _tile(input, "pl.cast")
    if not isinstance(target_type, torch.dtype):
        fail("a tile must be cast to a dtype, found pl.INDEX")
    if tile.dtype == target_type:
        fail(f"pl.cast from {target_type} to itself is refused by PyPTO")
    return Tile(_rounded(tile.data, target_type, mode), tile.valid, tile.defined)


WHOLE_NUMBERS: dict[str, Callable[[Tensor], Tensor]] = {
    "round": lambda x: torch.where(x < 0, (x - 0.5).ceil(), (x + 0.5).floor()),
    "rint": torch.round,
    "floor": torch.floor,
    "ceil": torch.ceil,
    "trunc": torch.trunc,
}
"""Rounding functions, keyed by cast mode."""


def _rounded(x: Tensor, target: torch.dtype, mode: str) -> Tensor:
    if mode not in WHOLE_NUMBERS:
        fail(f"cast mode {mode!r} is not emulated")
    if not x.is_floating_point():
        return x.to(target)
    if not target.is_floating_point:
        return WHOLE_NUMBERS[mode](x.double()).to(target)
    if torch.finfo(target).eps < torch.finfo(x.dtype).eps or mode == "rint":
        return x.to(target)
    if mode != "round" or (x.dtype, target) != (torch.float32, torch.bfloat16):
        fail(f"cast from {x.dtype} to {target} with mode {mode!r} is not emulated")
    # Truncating a float32 to its upper half gives the bfloat16 towards zero; half a step is 0x8000.
    bits = x.contiguous().view(torch.int32)
    away = ((bits + 0x8000) & ~0xFFFF).view(torch.float32)
    return torch.where(x.isfinite(), away, x).to(target)


# --- matrices -------------------------------------------------------------------------------------


def matmul(
    lhs: Operand, rhs: Operand, out_dtype: "torch.dtype | None" = None, *, b_trans: bool = False
) -> Tile:
    """lhs [M, K] times rhs [K, N], or with ``b_trans`` rhs [N, K] transposed: FP32 [M, N].

    Both are BF16, FP16 or FP32; sums are FP32. M, K and N are multiples of 16. ``out_dtype`` must
    be pl.FP32: PyPTO's default is the operands' dtype.

    Not emulated: ``a_trans``, ``c_matrix_nz``, integers, more than two dimensions.
    """
    if out_dtype is None:
        fail("pl.matmul needs out_dtype=pl.FP32: without it the product has the operands' dtype")
    if out_dtype != torch.float32:
        fail(f"pl.matmul with out_dtype {out_dtype} is not emulated: use pl.FP32")
    left, right, rows, columns = _matrices(lhs, rhs, b_trans, "pl.matmul")
    product = left @ right
    return Tile(product, tuple(product.shape), (rows, columns))


def matmul_acc(acc: Operand, lhs: Operand, rhs: Operand, *, b_trans: bool = False) -> Tile:
    """acc FP32 [M, N] plus the product of lhs and rhs, which are as in pl.matmul.

    Not emulated: ``a_trans``, ``init_cond``.
    """
    left, right, rows, columns = _matrices(lhs, rhs, b_trans, "pl.matmul_acc")
    total = _tile(acc, "pl.matmul_acc")
    if total.dtype != torch.float32:
        fail(f"pl.matmul_acc expects an FP32 accumulator, found {total.dtype}")
    if total.shape != (left.shape[0], right.shape[1]):
        fail(
            f"pl.matmul_acc adds {[left.shape[0], right.shape[1]]} to {list(total.shape)}: the "
            "shapes must be equal"
        )
    defined = (min(rows, total.defined[0]), min(columns, total.defined[1]))
    return Tile(torch.addmm(total.data, left, right), total.valid, defined)


def _matrices(a: Operand, b: Operand, b_trans: bool, name: str) -> tuple[Tensor, Tensor, int, int]:
    """Operands in FP32, b as [K, N]; the defined rows and columns of the product."""
    in_task(name)
    left, right = _tile(a, name), _tile(b, name)
    _same_dtype(left, right, name)
    if left.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        fail(f"{name} of {left.dtype} is not emulated")
    inner, columns = (1, 0) if b_trans else (0, 1)
    m, k, n = left.shape[0], left.shape[1], right.shape[columns]
    if right.shape[inner] != k:
        fail(f"{name} of {list(left.shape)} and {list(right.shape)}: inner dimensions differ")
    if m % CUBE or k % CUBE or n % CUBE:
        fail(f"{name} of {m} x {k} x {n}: the cube needs multiples of {CUBE}")
    if left.defined[1] < k or right.defined[inner] < k:
        fail(f"{name} sums {k} products, but an operand of some of them was not computed")
    wide = right.data.float()
    return left.data.float(), wide.t() if b_trans else wide, left.defined[0], right.defined[columns]


# --- operands -------------------------------------------------------------------------------------


def _tile(value: object, name: str) -> Tile:
    """A tile; a tensor in device memory is loaded whole."""
    if isinstance(value, Memory):
        loaded = value.take(value.shape, (0,) * len(value.shape), None)
        if isinstance(loaded, Tile):
            return loaded
        in_task(name)
    if not isinstance(value, Tile):
        fail(f"{name} expects tensors, found {type(value).__name__}")
    return value


def _vector(value: object, name: str, *moved: torch.dtype) -> Tile:
    """A tile of FP32, or of a dtype that the operator moves without computing."""
    in_task(name)
    tile = _tile(value, name)
    if tile.dtype not in (torch.float32, *moved):
        fail(f"{name} of {tile.dtype}: vector operators need FP32, so cast first")
    if tile.shape[-1] != 1 and tile.shape[-1] * tile.data.element_size() % ROW_BYTES:
        fail(f"{name} of {list(tile.shape)}: a tile's rows must be multiples of {ROW_BYTES} bytes")
    return tile


def _same_dtype(a: Tile, b: Tile, name: str) -> None:
    if a.dtype != b.dtype:
        fail(f"{name} expects operands of the same dtype, found {a.dtype} and {b.dtype}")


def _of_two(data: Tensor, a: Tile, b: Tile) -> Tile:
    valid = a.valid if a.valid == b.valid else tuple(data.shape)
    return Tile(data, valid, tuple(map(min, a.defined, b.defined)))
