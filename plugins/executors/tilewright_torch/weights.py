"""A model's weights as the forward pass uses them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from math import prod
from typing import overload

import torch
from attrs import evolve, frozen
from torch import Tensor

from tilewright.kv_storage import zeros
from tilewright.types import ModelConfig, PackedTensor, TensorSource
from tilewright.weights import (
    EMBEDDING,
    HEAD,
    StoredRows,
    expected_tensors,
    get_quantised,
    torch_dtype,
)
from tilewright_torch import quantised
from tilewright_torch.linear import Dense, Linear, converted
from tilewright_torch.quantised import Int4, Int8, Quantised

PACKED_VERSION = 1
"""Version of the layout of ``packed_tensors``."""

_SCALES = ".scales"
"""What follows a packed weight's name in that of its scales."""

_SLAB = 2**20
"""Weights that are converted at a time."""


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
    """A model's weights, in one dtype or quantised."""

    config: ModelConfig
    dtype: torch.dtype
    """Dtype of hidden states, norms and biases, and of weights that are not quantised."""
    embedding: Tensor | Int8 | None
    """[vocab_size, hidden_size], in the dtype of the source when layers are streamed; None in a
    part without layer 0."""
    layers: Sequence[Layer]
    """The layers of this part, the first of them first."""
    final_norm: Tensor | None
    """None in a part without the last layer, as is the head."""
    head: Linear | None
    weights: Mapping[str, Tensor | Quantised]
    """The source of all of the above, with the checkpoint's names and shapes."""

    def weight(self, name: str) -> Tensor:
        """A weight in the dtype, or a quantised one in float32, which holds it exactly.

        Raises KeyError for an unknown name.
        """
        found = self.weights[name]
        return found.to(self.dtype) if isinstance(found, Tensor) else found.dequantised()


def load(
    config: ModelConfig,
    layers: range,
    weights: TensorSource,
    dtype: torch.dtype,
    stream: bool = False,
    weight_dtype: str | None = None,
) -> Model:
    """Read the weights of some layers one by one; those of this dtype are used without a copy.

    stream: keep the weights in the dtype of the source, and convert a layer each time it runs.
    weight_dtype: ``int8`` or ``int4`` to quantise them (see ``quantised``); dtype is then the
        model's. Weights of ``packed_tensors`` are used as they are.
    """
    read: Mapping[str, Tensor | Quantised]
    if weight_dtype:
        read = _read_quantised(config, layers, weights, dtype, weight_dtype)
    else:
        read = {
            name: (weights.get(name) if stream else _plain(weights, name, dtype)).contiguous()
            for name in expected_tensors(config, layers)
        }

    def get(name: str) -> Tensor:
        found = read[name]
        assert isinstance(found, Tensor)
        return found.to(dtype)

    def projection(name: str, bias: bool) -> Linear:
        weight = read[f"{name}.weight"]
        added = get(f"{name}.bias") if bias else None
        if isinstance(weight, Tensor):
            return Dense(weight.to(dtype), added)
        return evolve(weight, bias=added)

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

    def embedding() -> Tensor | Int8:
        table = read[EMBEDDING]
        assert not isinstance(table, Int4)
        return table

    def head() -> Linear:
        tied = config.tie_word_embeddings
        weight = read[EMBEDDING if tied else HEAD]
        if not isinstance(weight, Tensor):
            return weight
        return Dense(weight) if weight.dtype == dtype else converted(weight, dtype)

    names = [f"model.layers.{i}" for i in layers]
    last = config.num_layers - 1 in layers
    return Model(
        config=config,
        dtype=dtype,
        embedding=embedding() if 0 in layers else None,
        layers=_Streamed(names, layer) if stream else [layer(name) for name in names],
        final_norm=get("model.norm.weight") if last else None,
        head=head() if last else None,
        weights=read,
    )


def quantised_bytes(config: ModelConfig, layers: range, weight_dtype: str) -> int:
    """Size of the weights of some layers in a quantised dtype."""
    tensors = packed_tensors(config, None, weight_dtype, layers)
    return sum(prod(t.shape) * torch_dtype(t.dtype).itemsize for t in tensors)


def packed_tensors(
    config: ModelConfig,
    weights: TensorSource | None,
    weight_dtype: str,
    layers: range | None = None,
) -> Iterator[PackedTensor]:
    """The weights in a quantised dtype, for files: a quantised weight's values have its name, and
    its scales (of int4 also zero points) that name and ``.scales``; other tensors are in the
    model's dtype. See ``tilewright_torch.quantised`` for the layout.

    weights: None if nothing is read.
    """
    dtype = config.dtype
    for name, shape in expected_tensors(config, layers).items():
        kind = quantised.kind(name, shape, weight_dtype)
        if kind is None:
            read = partial(_plain, weights, name, torch_dtype(dtype))
            yield PackedTensor(name=name, shape=shape, dtype=dtype, read=read)
            continue
        values, scales = quantised.stored_shapes(kind, shape)
        integers = "int8" if kind == "int8" else "uint8"
        read = partial(_part, weights, name, kind, torch_dtype(dtype), "values")
        yield PackedTensor(name=name, shape=values, dtype=integers, read=read)
        read = partial(_part, weights, name, kind, torch_dtype(dtype), "scales")
        yield PackedTensor(name=f"{name}{_SCALES}", shape=scales, dtype=dtype, read=read)


def _plain(weights: TensorSource | None, name: str, dtype: torch.dtype) -> Tensor:
    """A tensor in the dtype. A matrix of another is converted some rows at a time, so that it is
    not held beside its source; vectors are copied, since a file's pages hold more than them."""
    assert weights is not None
    info = weights.info(name)
    if len(info.shape) == 2 and torch_dtype(info.dtype) == dtype:
        return weights.get(name)
    tensor = zeros(info.shape, dtype)
    if len(info.shape) == 1:
        return tensor.copy_(weights.get(name))
    stored, step = StoredRows(weights, name), max(1, _SLAB // info.shape[1])
    for start in range(0, info.shape[0], step):
        tensor[start : start + step] = stored[start : start + step]
    return tensor


def _part(
    weights: TensorSource | None, name: str, kind: str, dtype: torch.dtype, part: str
) -> Tensor:
    assert weights is not None
    tensor: Tensor = getattr(_quantised(weights, name, kind, dtype, quantised.TILE), part)
    return tensor


def _quantised(
    weights: TensorSource, name: str, kind: str, dtype: torch.dtype, tile: int
) -> Quantised:
    """A weight, quantised; int4 with the values of its file where that stores 4 bits."""
    rows = StoredRows(weights, name)
    if kind == "int8":
        return quantised.int8(rows, dtype)
    stored = get_quantised(weights, name)
    found = quantised.kept(stored, dtype, tile) if stored else None
    return found or quantised.int4(rows, dtype, tile)


def _read_quantised(
    config: ModelConfig,
    layers: range,
    weights: TensorSource,
    dtype: torch.dtype,
    weight_dtype: str,
) -> Mapping[str, Tensor | Quantised]:
    """One weight at a time, the largest first: a source that cannot read some rows of it holds it
    in its own dtype, which may take as much memory as all that are quantised."""
    expected, tile = expected_tensors(config, layers), quantised.memory_tile()
    packed = any(name.endswith(_SCALES) for name in weights.names())
    kinds = {name: quantised.kind(name, expected[name], weight_dtype) for name in expected}

    def read(name: str) -> Tensor | Quantised:
        kind = kinds[name]
        if kind is None:
            return _plain(weights, name, dtype)
        if not packed:
            return _quantised(weights, name, kind, dtype, tile)
        values, scales = weights.get(name), weights.get(f"{name}{_SCALES}")
        if kind == "int8":
            return Int8(values=values, scales=scales)
        stored = Int4(values=values, scales=scales, out=expected[name][0])
        return quantised.retiled(stored, tile)

    order = expected if packed else sorted(expected, key=lambda n: -prod(expected[n]))
    return {name: read(name) for name in order}


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
