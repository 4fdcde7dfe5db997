"""Matrix products with a model's weights. The path depends on dtype, rows and CPU.

On every path, operands have one dtype, the weights' or the one that ``converted`` is given;
products are accumulated in float32, the bias is added to the sum, and the result is rounded once,
to that dtype. Weights keep their stored layout, [out, in], and are not repacked. They are used
without a copy, except that ``widened`` and ``converted`` copy one block at a time.

====  =======================  =======================
rows  weight                   path
====  =======================  =======================
0, 1  float32                  ``split_matrix_vector``
0, 1  16 bits                  ``matrix_vector``
more  native on the CPU        ``onednn``
more  float32 otherwise        ``F.linear``
more  16 bits otherwise        ``widened``
any   stored in another dtype  ``converted``
====  =======================  =======================
"""

from collections.abc import Callable
from functools import cache
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

Linear: TypeAlias = Callable[[Tensor], Tensor]
"""Maps [rows, in] to [rows, out]. A packed or quantised weight is another function of this type."""

BLOCK_BYTES = 2**22
"""Bytes of a weight that are widened to float32 at a time. More costs memory and is no faster."""

MOST_PARTS = 16
"""Most parts that a weight is split into for one row. Memory speed is the limit before this."""


class Dense:
    """The product with a weight [out, in]."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        self.weight = weight
        self.bias = bias
        transposed = weight.t()
        self._one: Linear = lambda x: matrix_vector(x, transposed, bias)
        self._many: Linear = lambda x: widened(x, weight, bias)
        if has_native(weight.dtype):
            self._many = lambda x: onednn(x, weight, bias)
        elif weight.dtype == torch.float32:
            self._many = lambda x: F.linear(x, weight, bias)
        if weight.dtype == torch.float32:
            self._one = split_matrix_vector(weight, bias)

    def __call__(self, x: Tensor) -> Tensor:
        return self._many(x) if x.shape[0] > 1 else self._one(x)


def converted(weight: Tensor, dtype: torch.dtype) -> Linear:
    """The product with a weight [out, in] that is stored in another dtype, block by block."""
    rows = max(16, BLOCK_BYTES // (4 * weight.shape[1]))

    def product(x: Tensor) -> Tensor:
        return torch.cat([F.linear(x, part.to(dtype)) for part in torch.split(weight, rows)], -1)

    return product


@cache
def has_native(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies matrices of this dtype with native CPU instructions.

    Otherwise torch multiplies 16-bit matrices element by element: 0.3 GFLOP/s were measured on two
    cores that reach 167 in float32.
    """
    if not torch._C._has_mkldnn or not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return True


def onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Many rows, by oneDNN: the same as F.linear in 16 bits; in float32 F.linear would use MKL.

    MKL was measured to be slower on an AMD CPU: half as fast for some rows, by a fifth for many.
    """
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


def split_matrix_vector(weight: Tensor, bias: Tensor | None) -> Linear:
    """One row, in float32: the weight as a batch of matrices, which threads process in parallel.

    MKL's matrix-vector product, which F.linear uses, was measured to use one thread and a third of
    the memory bandwidth. It still serves weights that cannot be split (a prime number of rows).
    """
    rows, columns = weight.shape
    parts = next(n for n in range(MOST_PARTS, 0, -1) if rows % n == 0)
    if parts == 1:
        return lambda x: F.linear(x, weight, bias)
    split = weight.view(parts, rows // parts, columns)
    if bias is None:
        return lambda x: torch.bmm(split, x.t().expand(parts, -1, -1)).view(-1, rows)
    split_bias = bias.view(parts, -1, 1)
    return lambda x: torch.baddbmm(split_bias, split, x.t().expand(parts, -1, -1)).view(-1, rows)


def matrix_vector(x: Tensor, transposed: Tensor, bias: Tensor | None) -> Tensor:
    """One row, in 16 bits: a dot product per weight row, at the speed of memory.

    transposed: a weight [out, in], as a view [in, out].

    torch has a kernel for that, but prefers oneDNN where available, which takes two to four times
    as long. The switch is process-wide: a thread that multiplies at the same time may get the other
    kernel.
    """
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        return torch.mm(x, transposed) if bias is None else torch.addmm(bias, x, transposed)
    finally:
        torch._C._set_mkldnn_enabled(enabled)


def widened(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Many rows, in 16 bits, on a CPU without native instructions: block by block in float32."""
    multiply = onednn if has_native(torch.float32) else F.linear
    rows, columns = weight.shape
    step = min(rows, max(16, BLOCK_BYTES // (4 * columns)))
    wide_x = x.float()
    block = torch.empty(step, columns)
    product = torch.empty(x.shape[0], rows, dtype=weight.dtype)
    for start in range(0, rows, step):
        part = weight[start : start + step]
        wide = block[: part.shape[0]].copy_(part)
        wide_bias = None if bias is None else bias[start : start + step].float()
        product[:, start : start + step] = multiply(wide_x, wide, wide_bias)
    return product
