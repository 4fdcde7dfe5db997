"""Matrix products with a model's weights: the path is chosen by dtype, rows and CPU.

Whatever the path, operands have the weights' dtype, sums are taken in float32, the bias is added to
the sum, and the result is rounded once, to the weights' dtype. Weights stay as they are stored:
[out, in], neither copied nor repacked.

=========  =================  ====================================================
rows       dtype              path
=========  =================  ====================================================
1          float32            ``split_matrix_vector``
1          16 bits            ``matrix_vector``
more       native on the CPU  ``onednn``
more       16 bits otherwise  ``widened``
=========  =================  ====================================================
"""

from collections.abc import Callable
from functools import cache
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

Linear: TypeAlias = Callable[[Tensor], Tensor]
"""From [rows, in] to [rows, out]. A packed or quantised weight is another function of this type."""

BLOCK_BYTES = 2**22
"""Of a weight widened to float32 at a time. More is no faster, and takes memory."""

MOST_PARTS = 16
"""Into which a weight is split among threads for one row; memory is the limit before this is."""


def linear(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """The product with a weight [out, in]."""
    many: Callable[[Tensor, Tensor, Tensor | None], Tensor] = widened
    if has_native(weight.dtype):
        many = onednn
    elif weight.dtype == torch.float32:
        many = F.linear
    if weight.dtype == torch.float32:
        one = split_matrix_vector(weight, bias)
        return lambda x: many(x, weight, bias) if x.shape[0] > 1 else one(x)
    return lambda x: (many if x.shape[0] > 1 else matrix_vector)(x, weight, bias)


def converted(weight: Tensor, dtype: torch.dtype) -> Linear:
    """The product in another dtype than the weight [out, in] is stored in, block by block."""
    rows = max(16, BLOCK_BYTES // (4 * weight.shape[1]))

    def product(x: Tensor) -> Tensor:
        return torch.cat([F.linear(x, part.to(dtype)) for part in torch.split(weight, rows)], -1)

    return product


@cache
def has_native(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies matrices of this dtype with this CPU's own instructions.

    Where it does not, torch multiplies 16-bit matrices element by element: 0.3 GFLOP/s were seen on
    a pair of cores that does 167 in float32.
    """
    if not torch._C._has_mkldnn or not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return True


def onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Many rows, by oneDNN: as F.linear in 16 bits; in float32 F.linear would ask MKL.

    MKL was seen to be slower on an AMD CPU: half as fast for some rows, by a fifth for many.
    """
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


def split_matrix_vector(weight: Tensor, bias: Tensor | None) -> Linear:
    """One row, in float32: the weight as a batch of matrices, which go to threads in parallel.

    MKL's matrix-vector product, which F.linear takes, was seen to use one thread and a third of the
    memory's speed. A weight whose rows cannot be split (their number is prime) is left to it.
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


def matrix_vector(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """One row, in 16 bits: a dot product a weight row, at the speed of memory.

    torch has a kernel for that, but prefers oneDNN where it can; which takes two to four times as
    long. The switch is the process's: another thread that multiplies meanwhile may get the other
    kernel.
    """
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        return F.linear(x, weight, bias)
    finally:
        torch._C._set_mkldnn_enabled(enabled)


def widened(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Many rows, in 16 bits, on a CPU without instructions for it: block by block in float32."""
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
