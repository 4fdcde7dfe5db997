"""An executor with one planted mistake, for tests of whether a comparison finds it.

``planted`` computes each layer in plain float32 arithmetic of its own, rounding where fused kernels
round and summing in blocks as they do; with the mistake ``none`` it is correct. Installed through
``DISTRIBUTION``, it is chosen by name like any executor. ``python tests/support/planted.py`` plants
every mistake in several models, and prints what a comparison reports for each.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from attrs import asdict, evolve, field, frozen, validators
from plugin_distributions import Distribution, on_path
from reference_models import CONFIGS, prompts, write_model
from torch import Tensor
from transformers import PreTrainedConfig, Qwen3Config

from tilewright import hookimpl
from tilewright.rope import dynamic_frequencies, dynamic_lengths, frequencies
from tilewright.settings import DEMO_MODEL
from tilewright.types import (
    ExecutorLimits,
    KvCacheSpec,
    ModelConfig,
    PluginInfo,
    RopeConfig,
    RuntimeConfig,
    StepBatch,
    Tap,
    TensorSource,
)
from tilewright_compare import Choice, Comparison, compare
from tilewright_hf.architecture import model_config
from tilewright_hf.files import JsonObject
from tilewright_torch import plugin as torch_plugin
from tilewright_torch.model import TorchExecutor, _Step
from tilewright_torch.weights import Model

tilewright_api = 2

DISTRIBUTION = Distribution("acme-planted", {}, {"executor": {"planted": "planted"}})

Weights = Mapping[str, Tensor]
"""Keyed by the last parts of checkpoint names, without ``.weight``: ``q_proj``, ``q_proj.bias``."""


def product(x: Tensor, weight: Tensor, block: int = 16) -> Tensor:
    """x weight^T in float32, summed block by block."""
    x, weight = x.float(), weight.float()
    parts = (x[:, i : i + block] @ weight[:, i : i + block].T for i in range(0, x.shape[1], block))
    return sum(parts, torch.zeros(x.shape[0], weight.shape[0]))


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.float() * (x.float().pow(2).mean(-1, keepdim=True) + eps).rsqrt() * weight.float()


def rotation(config: ModelConfig, batch: StepBatch) -> Tensor:
    """RoPE angles [T, head_dim / 2]."""
    if config.rope.kind == "dynamic":
        frequency = dynamic_frequencies(config, dynamic_lengths(batch))
        return batch.positions.float().unsqueeze(1) * frequency
    return batch.positions.float().unsqueeze(1) * frequencies(config)[0]


def halves(x: Tensor, angle: Tensor) -> Tensor:
    """Rotates dimension i with i + head_dim / 2."""
    a, b = x.float().chunk(2, -1)
    cos, sin = angle.cos().unsqueeze(1), angle.sin().unsqueeze(1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def causal(query: Tensor, key: Tensor) -> Tensor:
    return key <= query


@frozen(kw_only=True)
class Way:
    """The operations of a layer and of the head: correct unless a mistake changes them."""

    weights: Callable[[Weights, ModelConfig], Weights] = lambda w, config: w
    cast: Callable[[Tensor, torch.dtype], Tensor] = lambda x, dtype: x.to(dtype)
    product: Callable[[Tensor, Tensor], Tensor] = product
    attn_norm: Callable[[Tensor, Tensor, float], Tensor] = norm
    mlp_norm: Callable[[Tensor, Tensor, float], Tensor] = norm
    q_norm: Callable[[Tensor, Tensor, float], Tensor] = norm
    k_norm: Callable[[Tensor, Tensor, float], Tensor] = norm
    norm_after_rope: bool = False
    angles: Callable[[ModelConfig, StepBatch], Tensor] = rotation
    rotate: Callable[[Tensor, Tensor], Tensor] = halves
    cached_key: Callable[[Tensor, Tensor], Tensor] = lambda before, rotated: rotated
    slots: Callable[[StepBatch, KvCacheSpec], Tensor] = lambda batch, spec: batch.slot_mapping
    written_late: bool = False
    table: Callable[[Tensor], Tensor] = lambda table: table
    visible: Callable[[Tensor, Tensor], Tensor] = causal
    windowed: bool = True
    whole_pages: bool = False
    spread: Callable[[Tensor, int], Tensor] = lambda kv, group: kv.repeat_interleave(group, 1)
    scale: Callable[[int], float] = lambda head_dim: head_dim**-0.5
    attn_residual: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda x, h, o: x.float() + o
    """Takes the layer's input, its norm, and the output of o_proj."""
    mlp_residual: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda x, middle, down: (
        middle.float() + down
    )
    """Takes the layer's input, attn_residual, and the output of down_proj."""
    activation: Callable[[Tensor, Tensor], Tensor] = lambda gate, up: F.silu(gate) * up
    final_norm: Callable[[Tensor, Tensor, float], Tensor] = norm
    head: Callable[[Model], Tensor] = lambda model: model.weights[
        "model.embed_tokens.weight" if model.config.tie_word_embeddings else "lm_head.weight"
    ]
    logits: Callable[[Tensor], Tensor] = lambda logits: logits


@frozen(kw_only=True)
class Mistake:
    way: Way
    stage: tuple[str, ...]
    """The stages where it may appear first."""
    cause: str | None = None
    """The cause that a comparison must name, as a regular expression; None if it does not know the
    mistake."""
    phases: tuple[str, ...] = ("prefill", "decode", "both")
    """The phases in which it can appear."""
    shows: Callable[[ModelConfig, str], bool] = lambda config, dtype: True
    """Whether it changes the results of a model with that configuration and dtype."""
    weight: str | None = None
    """The tensor that is packed wrongly, by the last part of its name."""
    faint: bool = False
    """Close to the rounding of earlier layers, so it is found only where layers run alone."""
    head: bool = False
    """Whether it is made after the last layer."""


def swapped(a: str, b: str) -> Callable[[Weights, ModelConfig], Weights]:
    return lambda w, config: {**w, a: w[b], b: w[a]}


def changed(name: str, change: Callable[[Tensor], Tensor]) -> Any:
    return lambda w, config: {**w, name: change(w[name])}


def interleaved_rows(w: Weights, config: ModelConfig) -> Weights:
    """Reorders rows of k_proj as for a rotation of adjacent dimensions."""
    k = w["k_proj"]
    split = k.view(config.num_kv_heads, 2, config.head_dim // 2, -1)
    return {**w, "k_proj": split.transpose(1, 2).reshape(k.shape)}


def neighbours(x: Tensor, angle: Tensor) -> Tensor:
    """Rotates dimension 2 i with 2 i + 1."""
    a, b = x.float()[..., ::2], x.float()[..., 1::2]
    cos, sin = angle.cos().unsqueeze(1), angle.sin().unsqueeze(1)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)


def over_tokens(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return wide * (wide.pow(2).mean(0, keepdim=True) + eps).rsqrt() * weight.float()


def at(change: Callable[[Tensor], Tensor]) -> Callable[[ModelConfig, StepBatch], Tensor]:
    """Angles at changed positions."""
    return lambda config, batch: rotation(config, evolve(batch, positions=change(batch.positions)))


def with_rope(**changes: Any) -> Callable[[ModelConfig, StepBatch], Tensor]:
    return lambda config, batch: rotation(
        evolve(config, rope=evolve(config.rope, **changes) if changes else RopeConfig()), batch
    )


def truncated(x: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype is not torch.bfloat16:
        return x.to(dtype)
    return (x.contiguous().view(torch.int32) & ~0xFFFF).view(torch.float32).to(dtype)


def added_in_bfloat16(x: Tensor, weight: Tensor) -> Tensor:
    total = torch.zeros(x.shape[0], weight.shape[0], dtype=torch.bfloat16)
    for i in range(x.shape[1]):
        total = total + (x[:, i, None].float() * weight[:, i].float()).bfloat16()
    return total.float()


def slots_turned(batch: StepBatch, spec: KvCacheSpec) -> Tensor:
    page = spec.page_size
    return batch.slot_mapping // page * page + page - 1 - batch.slot_mapping % page


def slots_of_the_token_before(batch: StepBatch, spec: KvCacheSpec) -> Tensor:
    before = (batch.positions - 1).clamp(min=0).unsqueeze(1).long()
    pages = batch.block_table.gather(1, before // spec.page_size)
    return (pages * spec.page_size + before % spec.page_size).flatten()


def with_qk_norm(config: ModelConfig, dtype: str) -> bool:
    return config.qk_norm


def in_16_bits(config: ModelConfig, dtype: str) -> bool:
    return dtype == "bfloat16"


def grouped(config: ModelConfig, dtype: str) -> bool:
    return 1 < config.num_kv_heads < config.num_heads


def own_head(config: ModelConfig, dtype: str) -> bool:
    return not config.tie_word_embeddings


MISTAKES: dict[str, Mistake] = {
    # Weights
    "q transposed": Mistake(
        way=Way(weights=changed("q_proj", lambda w: w.T)),
        cause="q_proj's weight is transposed",
        stage=("q_proj",),
        shows=lambda c, dtype: c.num_heads * c.head_dim == c.hidden_size,
        weight="q_proj.weight",
    ),
    "o transposed": Mistake(
        way=Way(weights=changed("o_proj", lambda w: w.T)),
        cause="o_proj's weight is transposed",
        stage=("o_proj",),
        shows=lambda c, dtype: c.num_heads * c.head_dim == c.hidden_size,
        weight="o_proj.weight",
    ),
    "o reshaped, not transposed": Mistake(
        way=Way(weights=changed("o_proj", lambda w: w.T.reshape(w.shape))),
        cause="o_proj's (transposed weight is read as if it were not|weight is transposed)",
        stage=("o_proj",),
        weight="o_proj.weight",
    ),
    "k in interleaved order": Mistake(
        way=Way(weights=interleaved_rows),
        cause="rows of k_proj are reordered for RoPE that rotates neighbours",
        stage=("k_proj",),
        weight="k_proj.weight",
    ),
    "k and v swapped": Mistake(
        way=Way(weights=swapped("k_proj", "v_proj")),
        cause="k_proj and v_proj are swapped",
        stage=("k_proj",),
        weight="k_proj.weight",
    ),
    "down in another order": Mistake(
        way=Way(weights=changed("down_proj", lambda w: w.roll(1, 1))),
        cause="down_proj's columns are shifted by one",
        stage=("down_proj",),
        weight="down_proj.weight",
    ),
    "gate and up swapped": Mistake(
        way=Way(weights=swapped("gate_proj", "up_proj")),
        cause="gate_proj and up_proj are swapped",
        stage=("gate_proj",),
        weight="gate_proj.weight",
    ),
    "bias missing": Mistake(
        way=Way(weights=changed("q_proj.bias", torch.zeros_like)),
        cause="q_proj's bias is missing",
        stage=("q_proj",),
        shows=lambda c, dtype: c.qkv_bias,
        weight="q_proj.bias",
    ),
    # Norms
    "q-norm missing": Mistake(
        way=Way(q_norm=lambda x, w, eps: x.float()),
        cause="q_norm is missing",
        stage=("q_norm",),
        shows=with_qk_norm,
    ),
    "k-norm missing": Mistake(
        way=Way(k_norm=lambda x, w, eps: x.float()),
        cause="k_norm is missing",
        stage=("k_norm",),
        shows=with_qk_norm,
    ),
    "q-norm and k-norm swapped": Mistake(
        way=Way(weights=swapped("q_norm", "k_norm")),
        cause="q_norm and k_norm are swapped",
        stage=("q_norm",),
        shows=with_qk_norm,
        weight="q_norm.weight",
    ),
    "q-norm and k-norm after RoPE": Mistake(
        way=Way(norm_after_rope=True),
        cause="q_norm and k_norm come after RoPE",
        stage=("q_norm",),
        shows=with_qk_norm,
    ),
    "eps too large": Mistake(
        way=Way(attn_norm=lambda x, w, eps: norm(x, w, 0.1)),
        cause=r"attn_norm has an eps of about 0\.1,",
        stage=("attn_norm",),
    ),
    "norm without weight": Mistake(
        way=Way(attn_norm=lambda x, w, eps: norm(x, torch.ones_like(w), eps)),
        cause="attn_norm is without its weight",
        stage=("attn_norm",),
    ),
    "norm with weight + 1": Mistake(
        way=Way(mlp_norm=lambda x, w, eps: norm(x, w + 1, eps)),
        cause="mlp_norm has 1 added to its weight",
        stage=("mlp_norm",),
    ),
    "norm over tokens": Mistake(
        way=Way(mlp_norm=over_tokens), cause="mlp_norm is taken over tokens", stage=("mlp_norm",)
    ),
    # RoPE
    "RoPE interleaved": Mistake(
        way=Way(rotate=neighbours), cause="RoPE rotates neighbouring dimensions", stage=("q_rope",)
    ),
    "RoPE with another theta": Mistake(
        way=Way(angles=with_rope(theta=2e4)),
        cause=r"RoPE's theta is about (1\.9\d?|2|2\.0\d?)e\+04",
        stage=("q_rope",),
    ),
    "RoPE unscaled": Mistake(
        way=Way(angles=lambda c, b: with_rope(kind="default")(c, b)),
        cause="RoPE is not scaled",
        stage=("q_rope",),
        shows=lambda c, dtype: c.rope.kind in ("linear", "llama3"),
    ),
    "positions off by one": Mistake(
        way=Way(angles=at(lambda p: p + 1)),
        cause="RoPE's positions are ahead by one",
        stage=("q_rope",),
    ),
    "RoPE table too short": Mistake(
        way=Way(angles=at(lambda p: p.clamp(max=8))),
        cause="RoPE's table ends at position 8",
        stage=("q_rope",),
    ),
    "RoPE missing": Mistake(
        way=Way(rotate=lambda x, angle: x.float()), cause="RoPE is missing", stage=("q_rope",)
    ),
    # Attention
    "heads tiled": Mistake(
        way=Way(spread=lambda kv, group: kv.repeat(1, group, 1)),
        cause="KV heads are tiled",
        stage=("attention",),
        shows=grouped,
    ),
    "scale missing": Mistake(
        way=Way(scale=lambda d: 1.0), cause="attention scale is missing", stage=("attention",)
    ),
    "scale applied twice": Mistake(
        way=Way(scale=lambda d: 1.0 / d),
        cause="attention scale is applied twice",
        stage=("attention",),
    ),
    "mask hides the token itself": Mistake(
        way=Way(visible=lambda q, k: (k < q) | ((q == 0) & (k == 0))),
        cause="causal mask hides the token itself",
        stage=("attention",),
    ),
    "mask shows the next token": Mistake(
        way=Way(visible=lambda q, k: k <= q + 1),
        cause="causal mask shows the next token",
        stage=("attention",),
        phases=("prefill", "both"),
    ),
    "mask missing": Mistake(
        way=Way(visible=lambda q, k: k >= 0),
        cause="causal mask is missing",
        stage=("attention",),
        phases=("prefill", "both"),
    ),
    "padding attended to": Mistake(
        way=Way(visible=lambda q, k: (k <= q) | (k > q.max()), whole_pages=True),
        cause="padding up to the end of the page is attended to",
        stage=("attention",),
    ),
    "window ignored": Mistake(
        way=Way(windowed=False),
        cause="sliding window is ignored",
        stage=("attention",),
        shows=lambda c, dtype: any(c.sliding_windows),
    ),
    # KV cache
    "slot not advanced": Mistake(
        way=Way(slots=slots_of_the_token_before),
        cause="the slot is not advanced",
        stage=("k_cache",),
        phases=("decode",),
    ),
    "rows of a page turned round": Mistake(
        way=Way(slots=slots_turned), cause="the slots of a page are in reverse", stage=("k_cache",)
    ),
    "written after attention": Mistake(
        way=Way(written_late=True),
        cause="keys and values are written after attention",
        stage=("attention",),
    ),
    "keys cached before RoPE": Mistake(
        way=Way(cached_key=lambda before, rotated: before),
        cause="keys are cached before RoPE",
        stage=("k_cache",),
    ),
    "another sequence's pages": Mistake(
        way=Way(table=lambda table: table.roll(1, 0)),
        cause="the pages of the sequence before are read",
        stage=("attention",),
    ),
    # Accumulation, rounding, activation
    "residual missing": Mistake(
        way=Way(attn_residual=lambda x, h, o: o),
        cause="the first residual is missing",
        stage=("attn_residual",),
    ),
    "residual of the norm": Mistake(
        way=Way(attn_residual=lambda x, h, o: h.float() + o),
        cause="the first residual is attn_norm",
        stage=("attn_residual",),
    ),
    "residual from before attention": Mistake(
        way=Way(mlp_residual=lambda x, middle, down: x.float() + down),
        cause="the second residual is the layer's input",
        stage=("output",),
    ),
    "casts truncate": Mistake(
        way=Way(cast=truncated),
        cause="casts truncate instead of rounding",
        stage=("attn_norm", "q_proj"),
        phases=("prefill", "both"),  # a decode step of three rows has too few errors to tell
        shows=in_16_bits,
        faint=True,
    ),
    "added up in bfloat16": Mistake(
        way=Way(product=added_in_bfloat16),
        cause="products are added up in bfloat16",
        stage=("q_proj",),
        faint=True,
    ),
    "gelu for silu": Mistake(
        way=Way(activation=lambda gate, up: F.gelu(gate) * up),
        cause="the activation is GELU",
        stage=("activation",),
        faint=True,
    ),
    "activation overflows": Mistake(
        way=Way(activation=lambda g, u: (F.silu(g) * u * 1e38).mul(1e38).div(1e38).div(1e38)),
        stage=("activation",),
    ),
    # After the last layer
    "final norm without weight": Mistake(
        way=Way(final_norm=lambda x, w, eps: norm(x, torch.ones_like(w), eps)),
        cause="final_norm is without its weight",
        stage=("final_norm",),
        head=True,
    ),
    "head tied by mistake": Mistake(
        way=Way(head=lambda model: model.embedding),
        cause="the head is tied to the embedding",
        stage=("logits",),
        shows=own_head,
        head=True,
    ),
    "padded vocabulary wins": Mistake(
        way=Way(logits=lambda logits: F.pad(logits, (0, 13), value=99.0)),
        cause="13 rows of padding",
        stage=("logits",),
        head=True,
    ),
}

RIGHT = Way()
LIMITS: ExecutorLimits | None = None
"""The executor's limits; None: those of the torch executor."""


@frozen(kw_only=True, eq=False)
class PlantedStep(_Step):
    batch: StepBatch

    @property
    def phase(self) -> str:
        return "decode" if self.batch.max_query_len == 1 else "prefill"


class PlantedExecutor(TorchExecutor):
    """Correct except for one mistake, in one layer and phase."""

    def __init__(self, model: Model, spec: KvCacheSpec, layers: range, options: "Options"):
        super().__init__(model, spec, layers)
        self.limits = LIMITS or self.limits
        self._options = options
        self._mistake = MISTAKES.get(options.mistake)

    def begin(self, batch: StepBatch) -> PlantedStep:
        return PlantedStep(batch=batch, **asdict(super().begin(batch), recurse=False))

    def _way(self, phase: str, layer: int | None) -> Way:
        """The operations of a layer; None: of the head."""
        options, mistake = self._options, self._mistake
        if mistake is None or options.phase not in (phase, "both"):
            return RIGHT
        here = layer is None if mistake.head else layer == options.layer
        return mistake.way if here else RIGHT

    def weight(self, name: str) -> Tensor:
        """The weight as packed: a wrongly packed weight affects both phases."""
        prefix = f"model.layers.{self._options.layer}."
        mistake = self._mistake
        if mistake and mistake.weight and self._options.phase == "both" and name.startswith(prefix):
            packed = mistake.way.weights(self._named(self._options.layer), self._opened().config)
            return packed[_short(name)]
        return super().weight(name)

    def _named(self, layer: int) -> Weights:
        prefix = f"model.layers.{layer}."
        found = self._opened().weights.items()
        return {_short(name): tensor for name, tensor in found if name.startswith(prefix)}

    @torch.inference_mode()
    def run_layer(
        self, step: _Step, layer: int, hidden: Tensor, tap: "Tap | None" = None
    ) -> Tensor:
        assert isinstance(step, PlantedStep)
        config, dtype, page = self._opened().config, self._opened().dtype, self.kv_cache_spec
        batch, way = step.batch, self._way(step.phase, layer)
        w = way.weights(self._named(layer), config)
        eps, tokens = config.norm_eps, hidden.shape[0]

        def out(stage: str, x: Tensor) -> Tensor:
            x = way.cast(x, dtype)
            if tap:
                tap(f"layers.{layer}.{stage}", x)
            return x

        def project(x: Tensor, name: str) -> Tensor:
            y = way.product(x, w[name])
            return y + w[f"{name}.bias"].float() if f"{name}.bias" in w else y

        def heads(x: Tensor) -> Tensor:
            return x.view(tokens, -1, config.head_dim)

        h = out("attn_norm", way.attn_norm(hidden, w["input_layernorm"], eps))
        q = out("q_proj", heads(project(h, "q_proj")))
        k = out("k_proj", heads(project(h, "k_proj")))
        v = out("v_proj", heads(project(h, "v_proj")))
        angle, scale = way.angles(config, batch), rope_scale(config)

        def rotate(name: str, x: Tensor) -> Tensor:
            return out(name, way.rotate(x, angle) * scale)

        def qk_norm(name: str, x: Tensor, normed: Callable[..., Tensor]) -> Tensor:
            return out(name, normed(x, w[name], eps)) if config.qk_norm else x

        if way.norm_after_rope:
            q_before, k_before = rotate("q_rope", q), rotate("k_rope", k)
            q = qk_norm("q_norm", q_before, way.q_norm)
            k = qk_norm("k_norm", k_before, way.k_norm)
        else:
            q = rotate("q_rope", qk_norm("q_norm", q, way.q_norm))
            k_before = qk_norm("k_norm", k, way.k_norm)
            k = rotate("k_rope", k_before)

        keys, values = self._kv[self.layers.index(layer)]
        slots = way.slots(batch, page).long()

        def write() -> None:
            keys[slots] = way.cached_key(k_before, k).to(keys.dtype)
            values[slots] = v.to(values.dtype)

        if not way.written_late:
            write()
        attended = out("attention", self._attend(way, config.window(layer), q, keys, values, batch))
        if way.written_late:
            write()
        o = out("o_proj", project(attended, "o_proj"))
        middle = out("attn_residual", way.attn_residual(hidden, h, o))
        h = out("mlp_norm", way.mlp_norm(middle, w["post_attention_layernorm"], eps))
        gate, up = out("gate_proj", project(h, "gate_proj")), out("up_proj", project(h, "up_proj"))
        activation = out("activation", way.activation(gate.float(), up.float()))
        down = out("down_proj", project(activation, "down_proj"))
        return out("output", way.mlp_residual(hidden, middle, down))

    def _attend(
        self,
        way: Way,
        window: int | None,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        batch: StepBatch,
    ) -> Tensor:
        page = self.kv_cache_spec.page_size
        starts, table = batch.query_starts.tolist(), way.table(batch.block_table)
        attended = []
        for i, length in enumerate(batch.context_lens.tolist()):
            mine = q[starts[i] : starts[i + 1]].float()
            read = -(-length // page) * page if way.whole_pages else length
            key = torch.arange(read)
            pages = table[i][(key // page).clamp(max=int((table[i] >= 0).sum()) - 1)].long()
            slots = pages * page + key % page
            group = q.shape[1] // keys.shape[1]
            k, v = (way.spread(cache[slots].float(), group) for cache in (keys, values))
            query = torch.arange(length - len(mine), length).unsqueeze(1)
            seen = way.visible(query, key)
            if window is not None and way.windowed:
                seen = seen & (key > query - window)
            scores = torch.einsum("qhd,khd->hqk", mine, k) * way.scale(q.shape[2])
            weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
            # Kernels use probabilities in the dtype of the weights.
            weights = weights.to(q.dtype).float()
            attended.append(torch.einsum("hqk,khd->qhd", weights, v).flatten(1))
        return torch.cat(attended)

    @torch.inference_mode()
    def run_head(self, step: _Step, hidden: Tensor, tap: "Tap | None" = None) -> Tensor:
        assert isinstance(step, PlantedStep)
        model, way = self._opened(), self._way(step.phase, None)
        if model.final_norm is None:
            return super().run_head(step, hidden, tap)  # refuses
        x = way.final_norm(hidden, model.final_norm, model.config.norm_eps).to(model.dtype)
        logits = way.logits(way.product(x, way.head(model)).to(model.dtype).float())
        if tap:
            tap("final_norm", x)
            tap("logits", logits)
        return logits


def rope_scale(config: ModelConfig) -> float:
    return 1.0 if config.rope.kind == "dynamic" else frequencies(config)[1]


def _short(name: str) -> str:
    """Shortens model.layers.0.self_attn.q_proj.bias to q_proj.bias, and its weight to q_proj."""
    return (
        ".".join(name.split(".")[3:])
        .replace("self_attn.", "")
        .replace("mlp.", "")
        .removesuffix(".weight")
    )


@frozen
class Options:
    mistake: str = field(default="none", validator=validators.in_(["none", *MISTAKES]))
    layer: int = 0
    phase: str = field(default="both", validator=validators.in_(["prefill", "decode", "both"]))


@hookimpl
def plugin_info() -> PluginInfo:
    return PluginInfo(summary="the torch executor with a mistake", options=Options)


@hookimpl
def create_executor(
    model_config: ModelConfig,
    runtime_config: RuntimeConfig,
    weights: TensorSource,
    layers: range,
    options: Options | None,
) -> PlantedExecutor:
    made = torch_plugin.create_executor(model_config, runtime_config, weights, layers, None)
    assert isinstance(made, TorchExecutor)
    return PlantedExecutor(made._opened(), made.kv_cache_spec, layers, options or Options())


MODELS: dict[str, PreTrainedConfig | None] = {
    "demo": None,
    "qwen3-square": Qwen3Config(
        vocab_size=131,
        hidden_size=64,
        intermediate_size=83,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
    ),
    **{
        name: CONFIGS[name]
        for name in (
            "qwen3-six-layers",
            "qwen3-tied",
            "qwen2-tied",
            "llama-llama3",
            "llama-head-dim",
            "mistral-slides",
        )
    },
}
"""Configurations by name; None stands for the bundled model."""


@frozen(kw_only=True)
class Plant:
    """A mistake and the place where it is made."""

    mistake: str
    model: str
    dtype: str
    phase: str
    layer: int

    def __str__(self) -> str:
        return f"{self.mistake}, {self.model}, {self.dtype}, {self.phase}, layer {self.layer}"

    def directory(self, models: Path) -> Path:
        """The model's directory, which is written to ``models`` the first time."""
        config = MODELS[self.model]
        directory = models / self.model if config else DEMO_MODEL
        if config and not directory.exists():
            write_model(config, directory)
        return directory

    def compare(self, models: Path) -> Comparison:
        """Compare the planted executor with torch; models are written to ``models`` and reused."""
        options = {"mistake": self.mistake, "layer": self.layer, "phase": self.phase}
        runtime = RuntimeConfig(weight_dtype=self.dtype, page_size=4)
        vocab = MODELS[self.model] or Qwen3Config(vocab_size=1999)
        return compare(
            self.directory(models),
            Choice(executor="torch"),
            Choice(executor="planted", options=options, runtime=runtime),
            list(prompts(vocab, [21, 9, 5])),
            new_tokens=3,
            chunk=16,
            isolate=self.mistake in MISTAKES and MISTAKES[self.mistake].faint,
        )

    def located(self, found: Comparison) -> bool:
        """Whether the comparison names the layer and the phase."""
        first = found.divergence
        phase = "decode" if self.phase == "decode" else "prefill"
        layer = None if MISTAKES[self.mistake].head else self.layer
        return first is not None and (first.place.phase, first.place.layer) == (phase, layer)

    def staged(self, found: Comparison) -> bool:
        """Whether it names the stage."""
        first = found.divergence
        return first is not None and first.place.stage in MISTAKES[self.mistake].stage

    def explained(self, found: Comparison) -> bool:
        """Whether it names the mistake, alone or with others that look the same."""
        cause = MISTAKES[self.mistake].cause
        named = found.reason.named if found.reason else ()
        return cause is not None and any(re.search(cause, e.bug) for e in named)


def plants(model: str) -> Iterator[Plant]:
    """Each mistake that can appear in a model, with alternating phases, layers and dtypes."""
    config = _shape(model)
    for turn, (name, mistake) in enumerate(MISTAKES.items(), start=list(MODELS).index(model)):
        shown = [d for d in ("float32", "bfloat16") if mistake.shows(config, d)]
        if shown:
            yield Plant(
                mistake=name,
                model=model,
                dtype=shown[turn // 3 % len(shown)],
                phase=mistake.phases[turn % len(mistake.phases)],
                layer=turn % config.num_layers,
            )


@cache
def _shape(model: str) -> ModelConfig:
    config = MODELS[model]
    raw = config.to_dict() if config else json.loads((DEMO_MODEL / "config.json").read_text())
    return model_config(JsonObject("config.json", raw))[0]


@contextmanager
def installed(folder: Path) -> Iterator[None]:
    """Installs the executor ``planted`` as an installer would."""
    with on_path(folder / "site") as install:
        install(DISTRIBUTION)
        yield


def main() -> None:
    count: Counter[str] = Counter()
    with TemporaryDirectory() as name, installed(Path(name)):
        for model in MODELS:
            for plant in plants(model):
                found = plant.compare(Path(name))
                first = found.divergence
                place = first.place if first else None
                where = f"{place.mode} {place.phase}, {place.tensor}" if place else "nothing"
                packed = next((w.name for w in found.weights if not w.passed), "")
                right = {
                    "located": plant.located(found),
                    "staged": plant.staged(found),
                    "explained": plant.explained(found),
                }
                count.update(planted=1, **right)
                marks = "".join(" !"[not ok] for ok in right.values())
                why = " or ".join(e.bug for e in found.reason.named) if found.reason else ""
                print(f"{marks} {plant!s:75} {where:40} {why:60} {packed}", flush=True)
    print(dict(count))


if __name__ == "__main__":
    main()
