"""A model's weights on a CUDA device: the projections that read one input are merged."""

from collections.abc import Mapping

import torch
from attrs import frozen
from torch import Tensor

from tilewright.types import ModelConfig, TensorSource
from tilewright.weights import EMBEDDING, HEAD, expected_tensors

Projection = tuple[Tensor, Tensor | None]
"""A weight [out, in] and its bias [out]."""


@frozen(kw_only=True)
class CardLayer:
    attn_norm: Tensor
    qkv: Projection
    """Queries, keys and values, in this order."""
    qk_norm: tuple[Tensor, Tensor] | None
    """The norm weights of queries and keys, [head_dim] each."""
    o: Projection
    mlp_norm: Tensor
    gate_up: Projection
    """Gates first."""
    down: Projection


@frozen(kw_only=True)
class CardModel:
    config: ModelConfig
    dtype: torch.dtype
    embedding: Tensor | None
    """None in a part without layer 0."""
    layers: list[CardLayer]
    final_norm: Tensor | None
    """None in a part without the last layer, as is the head."""
    head: Tensor | None
    weights: Mapping[str, Tensor]
    """All of the above with the checkpoint's names and shapes: views, where they are merged."""


def load_on_card(
    config: ModelConfig,
    layers: range,
    weights: TensorSource,
    dtype: torch.dtype,
    device: torch.device,
) -> CardModel:
    """Copy the weights of some layers to a device, one tensor at a time.

    The host holds one tensor beside what the source maps. A tensor of another dtype is converted
    on the device.
    """
    shapes = expected_tensors(config, layers)
    placed: dict[str, Tensor] = {}

    def read(name: str, to: Tensor | None = None) -> Tensor:
        if to is None:
            to = torch.empty(shapes[name], dtype=dtype, device=device)
        placed[name] = to
        to.copy_(weights.get(name).to(device))
        return to

    def merged(*names: str) -> Tensor:
        sizes = [shapes[name][0] for name in names]
        whole = torch.empty(sum(sizes), *shapes[names[0]][1:], dtype=dtype, device=device)
        for name, part in zip(names, torch.split(whole, sizes), strict=True):
            read(name, part)
        return whole

    def projection(bias: bool, *names: str) -> Projection:
        weight = merged(*(f"{name}.weight" for name in names))
        return weight, merged(*(f"{name}.bias" for name in names)) if bias else None

    def layer(name: str) -> CardLayer:
        attention, mlp = f"{name}.self_attn", f"{name}.mlp"
        qk_norm = None
        if config.qk_norm:
            qk_norm = read(f"{attention}.q_norm.weight"), read(f"{attention}.k_norm.weight")
        return CardLayer(
            attn_norm=read(f"{name}.input_layernorm.weight"),
            qkv=projection(config.qkv_bias, *(f"{attention}.{x}_proj" for x in "qkv")),
            qk_norm=qk_norm,
            o=projection(config.output_bias, f"{attention}.o_proj"),
            mlp_norm=read(f"{name}.post_attention_layernorm.weight"),
            gate_up=projection(config.mlp_bias, f"{mlp}.gate_proj", f"{mlp}.up_proj"),
            down=projection(config.mlp_bias, f"{mlp}.down_proj"),
        )

    last = config.num_layers - 1 in layers
    head_name = EMBEDDING if config.tie_word_embeddings else HEAD
    embedding = read(EMBEDDING) if 0 in layers else None
    made = [layer(f"model.layers.{i}") for i in layers]
    final_norm = read("model.norm.weight") if last else None
    head = (placed.get(head_name) if head_name in placed else read(head_name)) if last else None
    return CardModel(
        config=config,
        dtype=dtype,
        embedding=embedding,
        layers=made,
        final_norm=final_norm,
        head=head,
        weights=placed,
    )


def projections(model: CardModel) -> list[list[Tensor]]:
    """The weights of products, in groups of one shape."""
    groups: dict[torch.Size, list[Tensor]] = {}
    for layer in model.layers:
        for weight, _ in (layer.qkv, layer.o, layer.gate_up, layer.down):
            groups.setdefault(weight.shape, []).append(weight)
    if model.head is not None:
        groups.setdefault(model.head.shape, []).append(model.head)
    return list(groups.values())
