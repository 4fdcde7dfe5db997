"""The forward pass of a dense decoder-only transformer, and the executor that runs it.

Results are rounded to the weights' dtype where transformers' eager code rounds them: after each
matrix product, after a norm and again after its weight, after attention, after each sum. Norms,
rotary embedding and softmax are computed in float32. With a 16-bit dtype, rotary tables and
attention scores stay in float32; transformers rounds them too.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import overload

import torch
import torch.nn.functional as F
from attrs import frozen
from torch import Tensor

from tilewright import kv_storage
from tilewright.errors import ExecutorError
from tilewright.layerwise import LayerwiseBase
from tilewright.types import (
    ExecutorLimits,
    KvCacheSpec,
    KvLayer,
    ModelConfig,
    StepBatch,
    Tap,
    TensorSource,
)
from tilewright.weights import EMBEDDING, HEAD, expected_tensors, torch_dtype
from tilewright_torch.attention import Attend, paged_attention
from tilewright_torch.linear import Linear, converted, linear
from tilewright_torch.rope import rotary, rotate


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
        name: weights.get(name) if stream else weights.get(name).to(dtype)
        for name in expected_tensors(config, layers)
    }

    def get(name: str) -> Tensor:
        return read[name].to(dtype)

    def projection(name: str, bias: bool) -> Linear:
        return linear(get(f"{name}.weight"), get(f"{name}.bias") if bias else None)

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
        return linear(weight) if weight.dtype == dtype else converted(weight, dtype)

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


@frozen(kw_only=True, eq=False)
class _Step:
    """What all layers of a step share."""

    token_ids: Tensor
    cos: Tensor
    sin: Tensor
    slots: Tensor
    attention: dict[int | None, Attend]
    """Attention functions, keyed by sliding window."""


class TorchExecutor(LayerwiseBase[Model, _Step]):
    """A ``LayerwiseExecutor`` (see tilewright.types) on the CPU."""

    plugin = "torch"
    device = "cpu"
    limits = ExecutorLimits()

    def __init__(self, model: Model, kv_cache_spec: KvCacheSpec, layers: range | None = None):
        """layers: None for all of the model's."""
        num_layers = model.config.num_layers
        super().__init__(model, kv_cache_spec, layers or range(num_layers), num_layers)
        self._rotary = rotary(model.config)
        self._cache: list[KvLayer] = []
        self._kv: list[tuple[Tensor, Tensor]] = []
        """The cache's keys and values by slot, [slots, num_kv_heads, head_dim]."""

    def allocate_kv(self, num_pages: int) -> None:
        self._cache = kv_storage.allocate(self.kv_cache_spec, num_pages)
        self._kv = [(layer.key.flatten(0, 1), layer.value.flatten(0, 1)) for layer in self._cache]

    def close(self) -> None:
        super().close()
        self._cache, self._kv = [], []

    @torch.inference_mode()
    def begin(self, batch: StepBatch) -> _Step:
        model, page_size = self._opened(), self.kv_cache_spec.page_size
        compute = torch.promote_types(model.dtype, torch_dtype(self.kv_cache_spec.dtype))
        windows = {model.config.window(i) for i in self.layers}
        cos, sin = self._rotary(batch)
        return _Step(
            token_ids=batch.token_ids,
            cos=cos,
            sin=sin,
            slots=batch.slot_mapping.long(),
            attention={w: paged_attention(batch, page_size, w, compute) for w in windows},
        )

    @torch.no_grad()
    def embed(self, step: _Step, tap: "Tap | None" = None) -> Tensor:
        model = self._opened()
        if model.embedding is None:
            raise ExecutorError("executor torch has no embedding: layer 0 is in another part")
        x = F.embedding(step.token_ids, model.embedding).to(model.dtype)
        if tap:
            tap("embed", x)
        return x

    @torch.inference_mode()
    def run_layer(
        self, step: _Step, layer: int, hidden: Tensor, tap: "Tap | None" = None
    ) -> Tensor:
        model, at = self._opened(), self.layers.index(layer)
        config, weights = model.config, model.layers[at]
        layer_tap = _of_layer(tap, layer) if tap else None
        x = hidden + _attention(
            weights,
            config,
            hidden,
            step.cos,
            step.sin,
            self._kv[at],
            step.slots,
            step.attention[config.window(layer)],
            layer_tap,
        )
        if layer_tap:
            layer_tap("attn_residual", x)
        x = x + _mlp(weights, config, x, layer_tap)
        if layer_tap:
            layer_tap("output", x)
        return x

    @torch.inference_mode()
    def run_head(self, step: _Step, hidden: Tensor, tap: "Tap | None" = None) -> Tensor:
        model = self._opened()
        if model.final_norm is None or model.head is None:
            raise ExecutorError("executor torch has no head: the last layer is in another part")
        x = rms_norm(hidden, model.final_norm, model.config.norm_eps)
        if tap:
            tap("final_norm", x)
        logits = model.head(x).float()
        if tap:
            tap("logits", logits)
        return logits

    def read_kv(self, layer: int, pages: Sequence[int]) -> KvLayer:
        cache = self._cache[self.layers.index(layer)]
        return KvLayer(cache.key[list(pages)], cache.value[list(pages)])

    def write_kv(self, layer: int, pages: Sequence[int], cache: KvLayer) -> None:
        own = self._cache[self.layers.index(layer)]
        own.key[list(pages)], own.value[list(pages)] = cache.key, cache.value

    def weight(self, name: str) -> Tensor:
        model = self._opened()
        return model.weights[name].to(model.dtype)


def _of_layer(tap: Tap, layer: int) -> Tap:
    return lambda stage, tensor: tap(f"layers.{layer}.{stage}", tensor)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm (arXiv:1910.07467) over the last dimension: rounded, then times the weight."""
    return F.rms_norm(x, x.shape[-1:], None, eps) * weight


def _attention(
    layer: Layer,
    config: ModelConfig,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    kv: tuple[Tensor, Tensor],
    slots: Tensor,
    attend: Attend,
    tap: "Tap | None",
) -> Tensor:
    """The attention block's output [T, hidden_size]; writes the tokens' keys and values."""
    heads, head_dim = config.num_heads, config.head_dim
    h = rms_norm(x, layer.attn_norm, config.norm_eps)
    q, k, v = layer.q(h), layer.k(h), layer.v(h)
    qk = torch.cat((q, k), -1).view(x.shape[0], -1, head_dim)
    v = v.view(x.shape[0], -1, head_dim)
    if tap:
        tap("attn_norm", h)
        tap("q_proj", qk[:, :heads])
        tap("k_proj", qk[:, heads:])
        tap("v_proj", v)
    if layer.qk_norm is not None:
        qk = rms_norm(qk, layer.qk_norm, config.norm_eps)
        if tap:
            tap("q_norm", qk[:, :heads])
            tap("k_norm", qk[:, heads:])
    qk = rotate(qk, cos, sin)
    q, k = qk[:, :heads], qk[:, heads:]
    keys, values = kv
    keys.index_copy_(0, slots, k.to(keys.dtype))
    values.index_copy_(0, slots, v.to(values.dtype))
    attended = attend(q, keys, values)
    out = layer.o(attended)
    if tap:
        tap("q_rope", q)
        tap("k_rope", k)
        tap("attention", attended)
        tap("o_proj", out)
    return out


def _mlp(layer: Layer, config: ModelConfig, x: Tensor, tap: "Tap | None") -> Tensor:
    h = rms_norm(x, layer.mlp_norm, config.norm_eps)
    gate, up = layer.gate(h), layer.up(h)
    activation = F.silu(gate) * up
    out = layer.down(activation)
    if tap:
        tap("mlp_norm", h)
        tap("gate_proj", gate)
        tap("up_proj", up)
        tap("activation", activation)
        tap("down_proj", out)
    return out
