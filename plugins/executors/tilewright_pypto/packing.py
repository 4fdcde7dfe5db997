"""Packs a checkpoint's weights in the layout of the kernels."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from tilewright.errors import ModelError
from tilewright.types import ModelConfig, PackedTensor, TensorSource
from tilewright.weights import expected_tensors
from tilewright_pypto.weight_names import packed_name

VERSION = 1
"""Version of the output of ``packed_tensors``, raised whenever that changes."""


_PART = 2**20
"""Elements that are checked at a time."""


def packed_tensors(config: ModelConfig, weights: TensorSource) -> Iterator[PackedTensor]:
    """``embedding``, ``layers.<i>.<parameter>``, ``final_norm``, and ``lm_head`` if it is not tied.

    Norms and biases are FP32 [1, size], projections BF16 [in, out], embedding and head BF16
    [vocab_size, hidden_size]; all are contiguous.
    """
    for name, shape in expected_tensors(config).items():
        row = _is_row(name)
        yield PackedTensor(
            name=packed_name(name),
            shape=(1, *shape) if row else shape[::-1] if _is_transposed(name) else shape,
            dtype="float32" if row else "bfloat16",
            read=partial(pack, weights, name),
        )


def pack(weights: TensorSource, name: str) -> Tensor:
    """A weight of the checkpoint in the layout of the kernels."""
    if _is_row(name):
        return _read(weights, name, torch.float32).unsqueeze(0)
    tensor = _read(weights, name)
    return (tensor.t() if _is_transposed(name) else tensor).contiguous()


def _is_row(name: str) -> bool:
    return name.endswith(("norm.weight", ".bias"))


def _is_transposed(name: str) -> bool:
    return name.endswith("_proj.weight")


def unpack(name: str, packed: Tensor) -> Tensor:
    """A packed weight in its checkpoint shape; name: that of the checkpoint."""
    if _is_transposed(name):
        return packed.t()
    return packed[0] if _is_row(name) else packed


def _read(weights: TensorSource, name: str, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    tensor = weights.get(name).to(dtype)
    # In parts: isfinite and sum take more than four times the memory of their input.
    parts = torch.split(tensor.flatten(), _PART)
    bad = sum(part.numel() - int(part.isfinite().count_nonzero()) for part in parts)
    if bad:
        raise ModelError(
            f"{name} in {weights.info(name).location}: {bad} of {tensor.numel()} values are not "
            f"finite in {str(dtype).removeprefix('torch.')}: the checkpoint is damaged, or its "
            "values are too large for this dtype"
        )
    return tensor
