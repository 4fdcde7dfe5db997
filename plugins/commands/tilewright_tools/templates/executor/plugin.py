"""A forward pass in plain float32 code: slow, and short enough to read and replace."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tilewright import hookimpl, kv_storage
from tilewright.errors import ExecutorError
from tilewright.rope import frequencies
from tilewright.types import (
    Executor,
    ExecutorLimits,
    KvCacheSpec,
    KvLayer,
    ModelConfig,
    PluginInfo,
    RuntimeConfig,
    StepBatch,
    Tap,
    TensorSource,
)
from tilewright.weights import expected_tensors

tilewright_api = 2

PAGE_SIZE = 16
"""Default number of tokens per KV cache page."""


@hookimpl
def plugin_info() -> PluginInfo:
    return PluginInfo(
        summary="the forward pass in float32, one sequence after another",
        weight_dtypes=("float32",),
        kv_dtypes=("float32",),
        serves=lambda config: config.rope.kind != "dynamic",
        limits={
            "device": "cpu",
            "RoPE": "default, linear, llama3, yarn",
            "taps": "embed, layers.N.output, logits",
        },
    )


@hookimpl
def create_executor(
    model_config: ModelConfig, runtime_config: RuntimeConfig, weights: TensorSource
) -> Executor:
    """Raises ExecutorError for a device, a dtype or a model that it cannot run."""
    config, runtime = model_config, runtime_config
    for what, found, accepted in (
        ("device", runtime.device, (None, "cpu")),
        ("weight_dtype", runtime.weight_dtype, ("float32",)),
        ("kv_dtype", runtime.kv_dtype, ("float32",)),
        ("RoPE of kind", config.rope.kind, ("default", "linear", "llama3", "yarn")),
        ("num_heads modulo num_kv_heads", config.num_heads % config.num_kv_heads, (0,)),
        ("head_dim modulo 2", config.head_dim % 2, (0,)),
    ):
        if found not in accepted:
            raise ExecutorError(
                f"executor my-plugin needs {what} {accepted[-1]!r}, found {found!r}: change it, or "
                "choose another executor (`tilewright plugins list`)"
            )
    read = {name: weights.get(name).float() for name in expected_tensors(config)}
    spec = KvCacheSpec(
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        page_size=runtime.page_size or PAGE_SIZE,
        dtype="float32",
    )
    return PlainExecutor(config, read, spec)


class PlainExecutor:
    """An ``Executor`` (see tilewright.types)."""

    device = "cpu"
    limits = ExecutorLimits()

    def __init__(self, config: ModelConfig, weights: dict[str, Tensor], spec: KvCacheSpec):
        self.config = config
        self.weights = weights
        self.kv_cache_spec = spec
        self.cache: list[KvLayer] = []
        self.frequencies, self.rope_scale = frequencies(config)

    def allocate_kv(self, num_pages: int) -> None:
        self.cache = kv_storage.allocate(self.kv_cache_spec, num_pages)

    def forward(self, batch: StepBatch, tap: "Tap | None" = None) -> Tensor:
        if not self.weights:
            raise ExecutorError("executor my-plugin is closed: load the model again")
        config = self.config
        x = self.weights["model.embed_tokens.weight"][batch.token_ids]
        if tap:
            tap("embed", x)
        angles = batch.positions[:, None, None] * self.frequencies
        turn = angles.cos() * self.rope_scale, angles.sin() * self.rope_scale
        for layer in range(config.num_layers):
            name = f"model.layers.{layer}"
            h = self.norm(x, f"{name}.input_layernorm")
            x = x + self.attention(layer, f"{name}.self_attn", h, turn, batch)
            h = self.norm(x, f"{name}.post_attention_layernorm")
            gate, up = (self.linear(h, f"{name}.mlp.{part}_proj") for part in ("gate", "up"))
            x = x + self.linear(gate * gate.sigmoid() * up, f"{name}.mlp.down_proj")
            if tap:
                tap(f"layers.{layer}.output", x)
        x = self.norm(x[batch.logits_rows], "model.norm")
        tied = config.tie_word_embeddings
        logits = self.linear(x, "model.embed_tokens" if tied else "lm_head")
        if tap:
            tap("logits", logits)
        return logits

    def read_kv(self, layer: int, pages: Sequence[int]) -> KvLayer:
        cache = self.cache[layer]
        return KvLayer(cache.key[list(pages)], cache.value[list(pages)])

    def write_kv(self, layer: int, pages: Sequence[int], cache: KvLayer) -> None:
        own = self.cache[layer]
        own.key[list(pages)], own.value[list(pages)] = cache.key, cache.value

    def close(self) -> None:
        self.weights, self.cache = {}, []

    def linear(self, x: Tensor, name: str) -> Tensor:
        """[rows, in] to [rows, out]."""
        product = x @ self.weights[f"{name}.weight"].T
        bias = self.weights.get(f"{name}.bias")
        return product if bias is None else product + bias

    def norm(self, x: Tensor, name: str) -> Tensor:
        """RMSNorm (arXiv:1910.07467) over the last dimension."""
        mean = x.square().mean(-1, keepdim=True)
        return x * (mean + self.config.norm_eps).rsqrt() * self.weights[f"{name}.weight"]

    def attention(
        self, layer: int, name: str, h: Tensor, turn: tuple[Tensor, Tensor], batch: StepBatch
    ) -> Tensor:
        """Writes the tokens' keys and values to their slots, then attends, [T, hidden_size]."""
        config, size = self.config, self.kv_cache_spec.page_size
        q, k, v = (
            self.linear(h, f"{name}.{part}_proj").view(h.shape[0], -1, config.head_dim)
            for part in "qkv"
        )
        if config.qk_norm:
            q, k = self.norm(q, f"{name}.q_norm"), self.norm(k, f"{name}.k_norm")
        q, k = _rotated(q, turn), _rotated(k, turn)
        # A view, so that what is written is in the cache: [slots, num_kv_heads, head_dim].
        keys, values = (t.flatten(0, 1) for t in (self.cache[layer].key, self.cache[layer].value))
        slots = batch.slot_mapping.long()
        keys[slots], values[slots] = k, v

        attended = torch.empty_like(q)
        starts = batch.query_starts.tolist()
        for i, length in enumerate(batch.context_lens.tolist()):
            rows = slice(starts[i], starts[i + 1])
            positions = torch.arange(length)
            pages = batch.block_table[i].long()[positions // size]
            seen = pages * size + positions % size
            attended[rows] = _attend(
                q[rows], keys[seen], values[seen], batch.positions[rows], config.window(layer)
            )
        return self.linear(attended.flatten(1), f"{name}.o_proj")


def _rotated(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """RoFormer (arXiv:2104.09864): dimension i turns together with i + head_dim / 2."""
    (cos, sin), (a, b) = turn, x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def _attend(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, window: int | None) -> Tensor:
    """Queries [n, num_heads, head_dim] at some positions, over a sequence's keys and values from
    its start, [length, num_kv_heads, head_dim] each. A KV head serves a group of query heads."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
    back = positions[:, None] - torch.arange(k.shape[0])
    hidden = (back < 0) if window is None else (back < 0) | (back >= window)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -math.inf).softmax(-1), v)
