"""A checkpoint's weights as the kernels take them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tilewright.errors import ModelError
from tilewright.types import TensorSource

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
"""The layer kernels' parameters, and the names of a layer's weights in Hugging Face checkpoints."""


def pack_layer(weights: TensorSource, layer: int) -> Iterator[tuple[str, Tensor]]:
    """A layer's weights by parameter, each read when its turn comes.

    Norms are FP32 [1, size], projections BF16 [in, out] and contiguous.
    """
    name = f"model.layers.{layer}"
    for parameter, norm in NORMS.items():
        yield parameter, _norm(weights, f"{name}.{norm}.weight")
    for parameter, projection in PROJECTIONS.items():
        yield parameter, _read(weights, f"{name}.{projection}.weight").t().contiguous()


def pack_head(weights: TensorSource, embedding: "Tensor | None") -> Iterator[tuple[str, Tensor]]:
    """Final norm FP32 [1, hidden_size] and LM head BF16 [vocab_size, hidden_size], as stored.

    embedding: what the head is tied to.
    """
    yield "final_norm", _norm(weights, "model.norm.weight")
    yield "lm_head", _read(weights, "lm_head.weight") if embedding is None else embedding


def unpack(
    name: str,
    layers: Sequence[Mapping[str, Any]],
    head: Mapping[str, Any],
    read: Callable[[Any], Tensor],
) -> Tensor:
    """A packed weight as the checkpoint names and shapes it. Raises KeyError."""
    if name == "lm_head.weight":
        return read(head["lm_head"])
    if name == "model.norm.weight":
        return read(head["final_norm"])[0]
    layer, _, tensor = name.removeprefix("model.layers.").partition(".")
    known = {n: parameter for parameter, n in (NORMS | PROJECTIONS).items()}
    parameter = known[tensor.removesuffix(".weight")]
    packed = read(layers[int(layer)][parameter])
    return packed[0] if parameter in NORMS else packed.t()


def read_embedding(weights: TensorSource) -> Tensor:
    """[vocab_size, hidden_size] BF16, for the host."""
    return _read(weights, "model.embed_tokens.weight").contiguous()


def _norm(weights: TensorSource, name: str) -> Tensor:
    return _read(weights, name, torch.float32).unsqueeze(0)


def _read(weights: TensorSource, name: str, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    tensor = weights.get(name).to(dtype)
    bad = int(tensor.numel() - tensor.isfinite().sum())
    if bad:
        raise ModelError(
            f"{name} in {weights.info(name).location}: {bad} of {tensor.numel()} values are not "
            f"finite in {str(dtype).removeprefix('torch.')}: the checkpoint is damaged, or its "
            "values are too large for this dtype"
        )
    return tensor
