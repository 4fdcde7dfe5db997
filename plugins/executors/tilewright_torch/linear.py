"""Matrix products with a model's weights: the path is chosen by dtype, rows and CPU.

Whatever the path, operands have the weights' dtype, sums are taken in float32, the bias is added to
the sum, and the result is rounded once, to the weights' dtype.
"""

from collections.abc import Callable
from functools import cache
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

Linear: TypeAlias = Callable[[Tensor], Tensor]
"""From [rows, in] to [rows, out]. A packed or quantised weight is another function of this type."""

BLOCK_BYTES = 2**20
"""Of a weight widened to float32 at a time: stays in a core's L2 cache while it is multiplied."""


def linear(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """The product with a weight [out, in] as stored, which is neither copied nor written to."""
    if weight.dtype == torch.float32:
        return lambda x: F.linear(x, weight, bias)
    if has_native(weight.dtype):
        return lambda x: (
            F.linear(x, weight, bias) if x.shape[0] > 1 else matrix_vector(x, weight, bias)
        )
    return lambda x: widened(x, weight, bias) if x.shape[0] > 1 else matrix_vector(x, weight, bias)


@cache
def has_native(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies matrices of this 16-bit dtype with this CPU's own instructions.

    Where it does not, torch multiplies them element by element: 0.3 GFLOP/s were seen on a core
    pair that does 167 in float32.
    """
    if not torch._C._has_mkldnn:
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def matrix_vector(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """One row, in 16 bits: a dot product a weight row, at the speed of memory.

    torch has a kernel for that, but prefers oneDNN where it can; which repacks the weight first and
    takes up to four times as long. The switch is the process's: another thread that multiplies
    meanwhile may get the other kernel.
    """
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        return F.linear(x, weight, bias)
    finally:
        torch._C._set_mkldnn_enabled(enabled)


def widened(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Many rows, in 16 bits, on a CPU without instructions for it: block by block in float32."""
    rows, columns = weight.shape
    step = min(rows, max(16, BLOCK_BYTES // (4 * columns)))
    wide_x = x.float()
    block = torch.empty(step, columns)
    product = torch.empty(x.shape[0], rows, dtype=weight.dtype)
    for start in range(0, rows, step):
        part = weight[start : start + step]
        wide = block[: part.shape[0]].copy_(part)
        wide_bias = None if bias is None else bias[start : start + step].float()
        product[:, start : start + step] = F.linear(wide_x, wide, wide_bias)
    return product
