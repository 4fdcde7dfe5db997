"""A model's weights as the forward pass uses them."""

from collections.abc import Callable, Mapping, Sequence
from typing import overload

import torch
from attrs import frozen
from torch import Tensor

from tilewright.types import ModelConfig, TensorSource
from tilewright.weights import EMBEDDING, HEAD, expected_tensors
from tilewright_torch.linear import Dense, Linear, converted


@frozen(kw_only=True)
class Layer:
    """One layer's weights, as the forward pass uses them."""

    attn_norm: Tensor
    q: Linear
    k: Linear
    v: Linear
    qk_norm: Tensor | None
    """[num_heads + num_kv_heads, head_dim]: the norm weight of each query and key head."""
    o: Linear
    mlp_norm: Tensor
    gate: Linear
    up: Linear
    down: Linear


@frozen(kw_only=True)
class Model:
    """A model's weights, in one dtype."""

    config: ModelConfig
    dtype: torch.dtype
    embedding: Tensor | None
    """[vocab_size, hidden_size], in the dtype of the source when layers are streamed; None in a
    part without layer 0."""
    layers: Sequence[Layer]
    """The layers of this part, the first of them first."""
    final_norm: Tensor | None
    """None in a part without the last layer, as is the head."""
    head: Linear | None
    weights: Mapping[str, Tensor]
    """The source of all of the above, with the checkpoint's names and shapes."""


def load(
    config: ModelConfig,
    layers: range,
    weights: TensorSource,
    dtype: torch.dtype,
    stream: bool = False,
) -> Model:
    """Read the weights of some layers one by one; those of this dtype are used without a copy.

    stream: keep the weights in the dtype of the source, and convert a layer each time it runs.
    """
    read = {
        name: (weights.get(name) if stream else weights.get(name).to(dtype)).contiguous()
        for name in expected_tensors(config, layers)
    }

    def get(name: str) -> Tensor:
        return read[name].to(dtype)

    def projection(name: str, bias: bool) -> Linear:
        return Dense(get(f"{name}.weight"), get(f"{name}.bias") if bias else None)

    def layer(name: str) -> Layer:
        attention, mlp = f"{name}.self_attn", f"{name}.mlp"
        qk_norm = None
        if config.qk_norm:
            q_norm = get(f"{attention}.q_norm.weight").expand(config.num_heads, -1)
            k_norm = get(f"{attention}.k_norm.weight").expand(config.num_kv_heads, -1)
            qk_norm = torch.cat((q_norm, k_norm))
        return Layer(
            attn_norm=get(f"{name}.input_layernorm.weight"),
            q=projection(f"{attention}.q_proj", config.qkv_bias),
            k=projection(f"{attention}.k_proj", config.qkv_bias),
            v=projection(f"{attention}.v_proj", config.qkv_bias),
            qk_norm=qk_norm,
            o=projection(f"{attention}.o_proj", config.output_bias),
            mlp_norm=get(f"{name}.post_attention_layernorm.weight"),
            gate=projection(f"{mlp}.gate_proj", config.mlp_bias),
            up=projection(f"{mlp}.up_proj", config.mlp_bias),
            down=projection(f"{mlp}.down_proj", config.mlp_bias),
        )

    def head() -> Linear:
        tied = config.tie_word_embeddings
        weight = read[EMBEDDING if tied else HEAD]
        return Dense(weight) if weight.dtype == dtype else converted(weight, dtype)

    names = [f"model.layers.{i}" for i in layers]
    last = config.num_layers - 1 in layers
    return Model(
        config=config,
        dtype=dtype,
        embedding=read[EMBEDDING] if 0 in layers else None,
        layers=_Streamed(names, layer) if stream else [layer(name) for name in names],
        final_norm=get("model.norm.weight") if last else None,
        head=head() if last else None,
        weights=read,
    )


class _Streamed(Sequence[Layer]):
    """Layers that are built on request. Only the last one is kept."""

    def __init__(self, names: Sequence[str], make: Callable[[str], Layer]):
        self._names = names
        self._make = make
        self._last: tuple[str, Layer] | None = None

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, index: int) -> Layer: ...
    @overload
    def __getitem__(self, index: slice) -> list[Layer]: ...
    def __getitem__(self, index: int | slice) -> Layer | list[Layer]:
        if isinstance(index, slice):
            return [self._make(name) for name in self._names[index]]
        name = self._names[index]
        if self._last is None or self._last[0] != name:
            self._last = None  # first, so that two are never held
            self._last = name, self._make(name)
        return self._last[1]
