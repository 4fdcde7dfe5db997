"""Packs a checkpoint's weights in the layout of the kernels."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from tilewright.errors import ModelError
from tilewright.types import ModelConfig, PackedTensor, TensorSource
from tilewright.weights import expected_tensors

_PARAMETERS = {
    "input_layernorm.weight": "input_norm",
    "self_attn.q_proj.weight": "wq",
    "self_attn.q_proj.bias": "bq",
    "self_attn.k_proj.weight": "wk",
    "self_attn.k_proj.bias": "bk",
    "self_attn.v_proj.weight": "wv",
    "self_attn.v_proj.bias": "bv",
    "self_attn.q_norm.weight": "q_norm",
    "self_attn.k_norm.weight": "k_norm",
    "self_attn.o_proj.weight": "wo",
    "self_attn.o_proj.bias": "bo",
    "post_attention_layernorm.weight": "post_norm",
    "mlp.gate_proj.weight": "w_gate",
    "mlp.gate_proj.bias": "b_gate",
    "mlp.up_proj.weight": "w_up",
    "mlp.up_proj.bias": "b_up",
    "mlp.down_proj.weight": "w_down",
    "mlp.down_proj.bias": "b_down",
}
"""Maps a layer's weight names in Hugging Face checkpoints to the layer kernels' parameters."""
WHOLE = {
    "model.embed_tokens.weight": "embedding",
    "model.norm.weight": "final_norm",
    "lm_head.weight": "lm_head",
}

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


def packed_name(name: str) -> str:
    """The packed name of a weight of the checkpoint."""
    if name in WHOLE:
        return WHOLE[name]
    layer, _, tensor = name.removeprefix("model.layers.").partition(".")
    return f"layers.{layer}.{_PARAMETERS[tensor]}"


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
