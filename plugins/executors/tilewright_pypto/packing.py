"""Packs a checkpoint's weights in the layout of the kernels."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tilewright.errors import ModelError
from tilewright.types import ModelConfig, PackedTensor, TensorSource
from tilewright.weights import expected_tensors

NORMS = {
    "input_norm": "input_layernorm",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "post_norm": "post_attention_layernorm",
}
PROJECTIONS = {
    "wq": "self_attn.q_proj",
    "wk": "self_attn.k_proj",
    "wv": "self_attn.v_proj",
    "wo": "self_attn.o_proj",
    "w_gate": "mlp.gate_proj",
    "w_up": "mlp.up_proj",
    "w_down": "mlp.down_proj",
}
"""Maps the layer kernels' parameters to a layer's weight names in Hugging Face checkpoints."""
READ_ORDER = (
    *("input_norm", "wq", "wk", "wv", "q_norm", "k_norm", "wo"),
    *("post_norm", "w_gate", "w_up", "w_down"),
)
"""A layer's parameters in the order of ``packed_tensors``, to read packed files front to back."""


_PARAMETERS = {name: parameter for parameter, name in (NORMS | PROJECTIONS).items()}
_WHOLE = {
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

    Norms are FP32 [1, size], projections BF16 [in, out], embedding and head BF16
    [vocab_size, hidden_size]; all are contiguous.
    """
    for name, shape in expected_tensors(config).items():
        norm = name.endswith("norm.weight")
        yield PackedTensor(
            name=_packed_name(name),
            shape=(1, *shape) if norm else shape[::-1] if _is_transposed(name) else shape,
            dtype="float32" if norm else "bfloat16",
            read=partial(pack, weights, name),
        )


def pack(weights: TensorSource, name: str) -> Tensor:
    """A weight of the checkpoint in the layout of the kernels."""
    if name.endswith("norm.weight"):
        return _read(weights, name, torch.float32).unsqueeze(0)
    tensor = _read(weights, name)
    return (tensor.t() if _is_transposed(name) else tensor).contiguous()


def _is_transposed(name: str) -> bool:
    return name.endswith("_proj.weight")


def _packed_name(name: str) -> str:
    if name in _WHOLE:
        return _WHOLE[name]
    layer, _, tensor = name.removeprefix("model.layers.").partition(".")
    return f"layers.{layer}.{_PARAMETERS[tensor.removesuffix('.weight')]}"


def unpack(
    name: str,
    layers: Mapping[int, Mapping[str, Any]],
    head: Mapping[str, Any],
    read: Callable[[Any], Tensor],
) -> Tensor:
    """A packed weight, by its checkpoint name and in its checkpoint shape. Raises KeyError.

    layers: by their number in the model.
    """
    if name == "lm_head.weight":
        return read(head["lm_head"])
    if name == "model.norm.weight":
        return read(head["final_norm"])[0]
    layer, _, tensor = name.removeprefix("model.layers.").partition(".")
    parameter = _PARAMETERS[tensor.removesuffix(".weight")]
    packed = read(layers[int(layer)][parameter])
    return packed[0] if parameter in NORMS else packed.t()


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
