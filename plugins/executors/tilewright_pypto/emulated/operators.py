"""Operators on tiles and device memory, as PyPTO's documentation and passes define them."""

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
    tensor: object,
    shape: Sequence[int],
    offset: Sequence[int],
    valid_shape: "Sequence[int] | None" = None,
) -> "Memory | Tile":
    if not isinstance(tensor, Memory):
        fail("pl.slice of anything but device memory is not emulated")
    valid = None if valid_shape is None else tuple(valid_shape)
    return tensor.take(tuple(shape), tuple(offset), valid)


def assemble(target: object, source: object, offset: Sequence[int]) -> Memory:
    in_task("pl.assemble")
    if not isinstance(target, Memory):
        fail("pl.assemble into anything but device memory is not emulated")
    target.store(_tile(source, "pl.assemble"), tuple(offset))
    return target


def create_tensor(shape: Sequence[int], *, dtype: torch.dtype) -> Memory:
    run = outside_task("pl.create_tensor")
    return allocate("scratch", shape, dtype, run)


def full(shape: Sequence[int], *, dtype: torch.dtype, value: float) -> Tile:
    in_task("pl.full")
    return whole(torch.full(tuple(shape), value, dtype=dtype))


def read(tensor: object, index: Sequence[int]) -> int | float:
    running()
    if not isinstance(tensor, Memory):
        fail("pl.read of anything but device memory is not emulated")
    for i, size in zip(index, tensor.shape, strict=True):
        if not 0 <= i < size:
            fail(f"{tensor.buffer.name}{list(index)} is outside its shape {list(tensor.shape)}")
    if tensor.written is not None and not tensor.written[tuple(index)]:
        fail(f"{tensor.buffer.name}{list(index)} is read, but was not written")
    return tensor.data[tuple(index)].item()


def dim(tensor: object, axis: int) -> int:
    if not isinstance(tensor, Memory):
        fail("pl.tensor.dim of anything but device memory is not emulated")
    return tensor.shape[axis]


def reshape(source: object, shape: Sequence[int]) -> "Memory | Tile":
    size = tuple(shape)
    if isinstance(source, Memory):
        if not source.data.is_contiguous():
            fail("pl.reshape of a window of device memory is not emulated")
        written = None if source.written is None else source.written.view(size)
        return Memory(source.buffer, source.data.view(size), written)
    tile = _tile(source, "pl.reshape")
    if tile.defined != tile.shape or tile.valid != tile.shape:
        fail(f"pl.reshape needs a whole tile of {list(tile.shape)}, found valid {list(tile.valid)}")
    return whole(tile.data.reshape(size))


# --- vectors --------------------------------------------------------------------------------------


def binary(name: str, compute: Callable[..., Tensor]) -> Callable[[Operand, Operand], Tile]:
    """An operator on two tiles of the same shape, or on a tile and a number."""

    def operator(a: Operand, b: Operand) -> Tile:
        left = _vector(a, name)
        if isinstance(b, (int, float)):
            return Tile(compute(left.data, b), left.valid, left.defined)
        right = _vector(b, name)
        _same_dtype(left, right, name)
        if left.shape != right.shape:
            fail(
                f"{name} expects tiles of the same shape, found {list(left.shape)} and "
                f"{list(right.shape)}: use its row_expand or col_expand variant"
            )
        return _of_two(compute(left.data, right.data), left, right)

    return operator


def unary(name: str, compute: Callable[[Tensor], Tensor]) -> Callable[[Operand], Tile]:
    def operator(a: Operand) -> Tile:
        tile = _vector(a, name)
        return Tile(compute(tile.data), tile.valid, tile.defined)

    return operator


def expand(
    name: str, compute: Callable[[Tensor, Tensor], Tensor], axis: int
) -> Callable[[Operand, Operand], Tile]:
    """An operator on a tile and a column (axis 1) or row (axis 0) that is broadcast over it."""

    def operator(a: Operand, b: Operand) -> Tile:
        tile, line = _vector(a, name), _vector(b, name)
        _same_dtype(tile, line, name)
        rows, columns = tile.shape
        wanted = (rows, 1) if axis == 1 else (1, columns)
        if line.shape != wanted:
            fail(f"{name} of {list(tile.shape)} expects {list(wanted)}, found {list(line.shape)}")
        along = 1 - axis
        if line.defined[along] < tile.defined[along]:
            fail(f"{name} reads more of its second operand than was computed")
        return Tile(compute(tile.data, line.data), tile.valid, tile.defined)

    return operator


def reduce_rows(name: str, compute: Callable[[Tensor], Tensor]) -> Callable[[Operand], Tile]:
    def operator(a: Operand) -> Tile:
        tile = _vector(a, name)
        if tile.valid[1] != tile.shape[1] or tile.defined[1] != tile.shape[1]:
            fail(
                f"{name} of {list(tile.shape)}, of which only {list(tile.valid)} is valid: the "
                "effect of padding is undefined, use pl.fillpad first"
            )
        return Tile(compute(tile.data), (tile.valid[0], 1), (tile.defined[0], 1))

    return operator


def fillpad(source: Operand, *, pad_value: float) -> Tile:
    """Fill the invalid part. The value is zero, or an infinity for PadValue.min and max."""
    tile = _vector(source, "pl.fillpad", torch.bfloat16)
    if any(d < v for d, v in zip(tile.defined, tile.valid, strict=True)):
        fail("pl.fillpad of a tile whose valid part was not computed completely")
    filled = torch.full(tile.shape, pad_value, dtype=tile.dtype)
    part = tuple(slice(v) for v in tile.valid)
    filled[part] = tile.data[part]
    return whole(filled)


def cast(source: Operand, target: "torch.dtype | str", mode: str = "round") -> "Tile | int":
    """mode: round rounds ties away from zero, rint to even; floor, ceil, trunc: as their names."""
    if isinstance(source, (int, float)):
        if target != INDEX:
            fail("a scalar can only be cast to pl.INDEX: other targets are not emulated")
        return int(source)
    in_task("pl.cast")
    tile = _tile(source, "pl.cast")
    if not isinstance(target, torch.dtype):
        fail("a tile must be cast to a dtype, found pl.INDEX")
    if tile.dtype == target:
        fail(f"pl.cast from {target} to itself is refused by PyPTO")
    return Tile(_rounded(tile.data, target, mode), tile.valid, tile.defined)


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
    a: Operand, b: Operand, *, out_dtype: "torch.dtype | None" = None, b_trans: bool = False
) -> Tile:
    """Operands have the same dtype; products are accumulated in FP32."""
    if out_dtype is None:
        fail("pl.matmul needs out_dtype=pl.FP32: without it the product has the operands' dtype")
    if out_dtype != torch.float32:
        fail(f"pl.matmul with out_dtype {out_dtype} is not emulated: use pl.FP32")
    left, right, rows, columns = _matrices(a, b, b_trans, "pl.matmul")
    product = left @ right
    return Tile(product, tuple(product.shape), (rows, columns))


def matmul_acc(acc: Operand, a: Operand, b: Operand, *, b_trans: bool = False) -> Tile:
    left, right, rows, columns = _matrices(a, b, b_trans, "pl.matmul_acc")
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
