"""The forward pass of a dense decoder-only transformer, and the executor that runs it.

Results are rounded to the weights' dtype where transformers' eager code rounds them: after each
matrix product, after a norm and again after its weight, after attention, after each sum. Norms,
rotary embedding and softmax are computed in float32. With a 16-bit dtype, rotary tables and
attention scores stay in float32; transformers rounds them too.
"""

from collections.abc import Sequence

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
)
from tilewright.weights import torch_dtype
from tilewright_torch.attention import Attend, paged_attention
from tilewright_torch.quantised import Int8
from tilewright_torch.rope import rotary, rotate
from tilewright_torch.weights import Layer, Model


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
        if isinstance(model.embedding, Int8):
            x = model.embedding.rows(step.token_ids)
        else:
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
        return self._opened().weight(name)


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
