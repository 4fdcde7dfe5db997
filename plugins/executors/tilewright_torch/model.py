"""The forward pass of a dense decoder-only transformer, and the executor that runs it.

Results are rounded to the weights' dtype where transformers' eager code rounds them: after each
matrix product, after a norm and again after its weight, after attention, after each sum. Norms,
rotary embedding and softmax are computed in float32. With a 16-bit dtype, rotary tables and
attention scores stay in float32; transformers rounds them too.
"""

from collections.abc import Callable, Sequence
from functools import cache
from math import inf

import torch
import torch.nn.functional as F
from attrs import evolve, frozen
from torch import Tensor

from tilewright import kv_storage
from tilewright.errors import ExecutorError
from tilewright.layerwise import LayerwiseBase, of_layer
from tilewright.types import (
    ExecutorLimits,
    KvCacheSpec,
    KvLayer,
    ModelConfig,
    StepBatch,
    Tap,
)
from tilewright.weights import torch_dtype
from tilewright_torch import native
from tilewright_torch.attention import Attend, paged_attention
from tilewright_torch.quantised import Int8
from tilewright_torch.rope import angles, rotate, tables
from tilewright_torch.weights import Layer, Model


@frozen(kw_only=True, eq=False)
class _Step:
    """What all layers of a step share."""

    token_ids: Tensor
    slots: Tensor
    rotary: Callable[[], tuple[Tensor, Tensor]]
    """The cosines and sines for ``rotate``."""
    attention: Callable[[int | None], Attend]
    """The attention function of a sliding window."""
    compiled: native.Step | None
    """For a step that the compiled path runs unless it has a tap."""


class TorchExecutor(LayerwiseBase[Model, _Step]):
    """A ``LayerwiseExecutor`` (see tilewright.types) on the CPU."""

    plugin = "torch"
    device = "cpu"
    limits = ExecutorLimits()

    def __init__(
        self,
        model: Model,
        kv_cache_spec: KvCacheSpec,
        layers: range | None = None,
        compile: bool = False,
    ):
        """layers: None for all of the model's.

        compile: run steps of few tokens, without a tap, in ``native``.
        """
        num_layers = model.config.num_layers
        super().__init__(model, kv_cache_spec, layers or range(num_layers), num_layers)
        if compile:
            self.limits = evolve(self.limits, tap_exact=False)
        self._compile = compile
        self._native: native.Native | None = None
        self._angles, self._rope_scale = angles(model.config)
        self._cache: list[KvLayer] = []
        self._kv: list[tuple[Tensor, Tensor]] = []
        """The cache's keys and values by slot, [slots, num_kv_heads, head_dim]."""

    def allocate_kv(self, num_pages: int) -> None:
        self._cache = kv_storage.allocate(self.kv_cache_spec, num_pages)
        self._kv = [(layer.key.flatten(0, 1), layer.value.flatten(0, 1)) for layer in self._cache]
        if self._compile:
            page_size = self.kv_cache_spec.page_size
            self._native = native.Native(self._opened(), self.layers, self._cache, page_size)

    def close(self) -> None:
        super().close()
        self._cache, self._kv, self._native = [], [], None

    @torch.inference_mode()
    def begin(self, batch: StepBatch) -> _Step:
        model, page_size = self._opened(), self.kv_cache_spec.page_size
        compute = torch.promote_types(model.dtype, torch_dtype(self.kv_cache_spec.dtype))
        of_tokens, scale = self._angles(batch), self._rope_scale
        slots = batch.slot_mapping.long()
        compiled = None
        if self._native and len(slots) <= self._native.max_tokens:
            compiled = self._native.step(batch, of_tokens, scale, slots)
        return _Step(
            token_ids=batch.token_ids,
            slots=slots,
            rotary=cache(lambda: tables(of_tokens, scale)),
            attention=cache(lambda window: paged_attention(batch, page_size, window, compute)),
            compiled=compiled,
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
    def run_layers(self, step: _Step, hidden: Tensor, tap: "Tap | None" = None) -> Tensor:
        if self._native and step.compiled and not tap:
            return self._native.run_layers(step.compiled, 0, len(self.layers), hidden)
        return super().run_layers(step, hidden, tap)

    @torch.inference_mode()
    def run_layer(
        self, step: _Step, layer: int, hidden: Tensor, tap: "Tap | None" = None
    ) -> Tensor:
        model, at = self._opened(), self.layers.index(layer)
        if self._native and step.compiled and not tap:
            return self._native.run_layers(step.compiled, at, 1, hidden)
        config, weights = model.config, model.layers[at]
        layer_tap = of_layer(tap, layer) if tap else None
        x = hidden + _attention(
            weights,
            config,
            hidden,
            *step.rotary(),
            self._kv[at],
            step.slots,
            step.attention(config.window(layer)),
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
        if self._native and not tap:
            logits = self._native.run_head(hidden, model.final_norm)
            if logits is not None:
                return logits
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


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm (arXiv:1910.07467) over the last dimension: rounded, then times the weight.

    The same as F.rms_norm, which is composed of twice as many operations.
    """
    size = x.shape[-1]
    if x.numel() == size:  # a number takes fewer operations
        mean = torch.linalg.vector_norm(x, dtype=torch.float32).item() ** 2 / size + eps
        return x * (mean**-0.5 if mean else inf) * weight
    norm = torch.linalg.vector_norm(x, 2, -1, True, dtype=torch.float32)
    scale = torch.addcmul(_scalar(eps), norm, norm, value=1 / size).rsqrt_()
    return (x * scale).to(x.dtype) * weight


@cache
def _scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)


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
