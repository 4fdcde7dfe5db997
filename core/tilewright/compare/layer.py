"""A layer, and what follows the last one, in plain float32 arithmetic.

Each operation can be replaced: so a layer is computed as it would be under some mistake, from the
same input and the same KV cache that a candidate had.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from attrs import define, field, frozen
from torch import Tensor

from tilewright.compare.judge import Limits
from tilewright.compare.sides import Slots, Tensors
from tilewright.rope import dynamic_frequencies, frequencies
from tilewright.types import KvCacheSpec, KvLayer, ModelConfig, RowOrder, StepBatch
from tilewright.weights import expected_tensors

Weights: TypeAlias = Mapping[str, Tensor]
"""A layer's, in float32, by the part of the checkpoint's name that tells them apart: ``q_proj``,
``q_proj.bias``, ``q_norm``, ``input_layernorm``."""

Norm: TypeAlias = Callable[[Tensor, Tensor, float], Tensor]
"""Of input [..., size], weight [size] and eps."""

NORM_WEIGHTS = {
    "attn_norm": "input_layernorm",
    "q_norm": "q_norm",
    "k_norm": "k_norm",
    "mlp_norm": "post_attention_layernorm",
    "final_norm": "norm",
}
"""By stage."""


@define(kw_only=True, eq=False, slots=False)
class Case:
    """What a candidate made of one layer, or of the head, that it ran alone; and from what."""

    config: ModelConfig
    layer: int | None
    """None: what follows the last layer."""
    dtype: torch.dtype
    """The candidate's weights'."""
    hidden: Tensor
    """The input, [T, hidden_size] or, after the last layer, [L, hidden_size]."""
    batch: StepBatch
    """With the candidate's pages."""
    spec: KvCacheSpec
    """The candidate's."""
    before: KvLayer | None
    """The layer's cache before the step, as the candidate had it; None after the last layer."""
    cached: Tensor
    """Slots of what is compared of the cache, in the order of the tensors found; int64."""
    found: Tensors
    """By stage."""
    limits: Mapping[str, Limits]
    """By stage."""
    weight: Callable[[str], Tensor]
    """The checkpoint's, by its full name, in float32."""

    @cached_property
    def weights(self) -> Weights:
        return self.weights_of(self.layer)

    def weights_of(self, layer: int | None) -> Weights:
        """Of that layer, or of what follows the last one."""
        names = expected_tensors(self.config)
        if layer is None:
            tied = self.config.tie_word_embeddings
            head = "model.embed_tokens.weight" if tied else "lm_head.weight"
            return {"norm": self.weight("model.norm.weight"), "lm_head": self.weight(head)}
        prefix = f"model.layers.{layer}."
        return {
            name.removeprefix(prefix)
            .removeprefix("self_attn.")
            .removeprefix("mlp.")
            .removesuffix(".weight"): self.weight(name)
            for name in names
            if name.startswith(prefix)
        }

    @cached_property
    def right(self) -> Tensors:
        """Every stage, without a mistake."""
        return dict(compute(self, Operations()))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * weight


def angles(case: Case) -> Tensor:
    """How far each pair of dimensions turns, [T, head_dim / 2]."""
    config, batch = case.config, case.batch
    if config.rope.kind == "dynamic":
        of_sequence = dynamic_frequencies(config, batch.context_lens)
        return batch.positions.float().unsqueeze(1) * of_sequence.repeat_interleave(
            batch.query_starts.diff(), dim=0
        )
    return batch.positions.float().unsqueeze(1) * frequencies(config)[0]


def rotate_halves(x: Tensor, angle: Tensor) -> Tensor:
    """Dimension i of x [T, heads, head_dim] turns with i + head_dim / 2."""
    a, b = x.chunk(2, -1)
    cos, sin = angle.cos().unsqueeze(1), angle.sin().unsqueeze(1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


def read_slots(case: Case, sequence: int, positions: Tensor) -> Tensor:
    """The slots [n] int64 of a sequence's positions, of its last page where it has no more."""
    table = case.batch.block_table[sequence].long()
    page = (positions // case.spec.page_size).clamp(max=int((table >= 0).sum()) - 1)
    return table[page] * case.spec.page_size + positions % case.spec.page_size


@frozen(kw_only=True, eq=False)
class Operations:
    """How a layer is computed: right, unless told otherwise."""

    weights: Callable[[Weights], Weights] = lambda weights: weights
    cast: Callable[[Tensor], Tensor] = lambda x: x
    """Of what each stage gives."""
    product: Callable[[Tensor, Tensor], Tensor] = F.linear
    norms: Mapping[str, Norm] = field(factory=dict)
    """By stage; ``rms_norm`` where nothing is said."""
    norm_after_rope: bool = False
    angles: Callable[[Case], Tensor] = angles
    rotate: Callable[[Tensor, Tensor], Tensor] = rotate_halves
    turned: Sequence[str] = ("q_rope", "k_rope")
    rope_scale: float | None = None
    """On cosine and sine; None: the model's."""
    cached: Callable[[Tensor, Tensor], Tensor] = lambda before, rotated: rotated
    """The key that is cached, of those before and after RoPE."""
    write_slots: Callable[[Case], Tensor] = lambda case: case.batch.slot_mapping.long()
    write_order: RowOrder | None = None
    """None: the one that the candidate declares."""
    written: Literal["before attention", "after attention", "never"] = "before attention"
    read_slots: Callable[[Case, int, Tensor], Tensor] = read_slots
    read_to: Callable[[Case, int], int] = lambda case, length: length
    """How many positions of a sequence are attended to, mask aside."""
    visible: Callable[[Tensor, Tensor], Tensor] = lambda query, key: key <= query
    """Of positions [queries, 1] and [keys]."""
    window: Callable[[int | None], int | None] = lambda window: window
    spread: Callable[[Tensor, int], Tensor] = lambda kv, group: kv.repeat_interleave(group, 1)
    """Keys or values [n, KV heads, head_dim] to one for each query head of the groups."""
    scale: Callable[[ModelConfig], float] = lambda config: config.head_dim**-0.5
    attn_residual: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda x, normed, out: x + out
    """Of the layer's input, attn_norm, and o_proj."""
    activation: Callable[[Tensor, Tensor], Tensor] = lambda gate, up: F.silu(gate) * up
    mlp_residual: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = (
        lambda x, middle, normed, out: middle + out
    )
    """Of the layer's input, attn_residual, mlp_norm, and down_proj."""
    logits: Callable[[Tensor], Tensor] = lambda logits: logits
    """NaN is anything."""


def compute(case: Case, how: Operations) -> Iterator[tuple[str, Tensor]]:
    """Stages as docs/tensors.md names them, and ``k_cache`` and ``v_cache``, in order, float32."""
    return _head(case, how) if case.layer is None else _layer(case, how)


def _norm(case: Case, how: Operations, weights: Weights, stage: str, x: Tensor) -> Tensor:
    norm = how.norms.get(stage, rms_norm)
    return how.cast(norm(x, weights[NORM_WEIGHTS[stage]], case.config.norm_eps))


def _head(case: Case, how: Operations) -> Iterator[tuple[str, Tensor]]:
    weights = how.weights(case.weights)
    x = _norm(case, how, weights, "final_norm", case.hidden.float())
    yield "final_norm", x
    yield "logits", how.logits(how.cast(how.product(x, weights["lm_head"])))


def _layer(case: Case, how: Operations) -> Iterator[tuple[str, Tensor]]:
    assert case.layer is not None
    assert case.before is not None
    config, weights = case.config, how.weights(case.weights)

    def project(x: Tensor, name: str) -> Tensor:
        out = how.product(x, weights[name])
        bias = weights.get(f"{name}.bias")
        return how.cast(out if bias is None else out + bias)

    x = case.hidden.float()
    normed = _norm(case, how, weights, "attn_norm", x)
    yield "attn_norm", normed
    of_heads = {}
    for name in ("q_proj", "k_proj", "v_proj"):
        of_heads[name] = project(normed, name).view(len(x), -1, config.head_dim)
        yield name, of_heads[name]
    angle = how.angles(case)
    rope_scale = how.rope_scale
    if rope_scale is None:
        rope_scale = 1.0 if config.rope.kind == "dynamic" else frequencies(config)[1]
    turned = {}
    unturned = {}
    for head in "qk":
        y = of_heads[f"{head}_proj"]
        if config.qk_norm and not how.norm_after_rope:
            y = _norm(case, how, weights, f"{head}_norm", y)
            yield f"{head}_norm", y
        unturned[head] = y
        if f"{head}_rope" in how.turned:
            y = how.cast(how.rotate(y, angle) * rope_scale)
        if config.qk_norm and how.norm_after_rope:
            yield f"{head}_rope", y
            y = _norm(case, how, weights, f"{head}_norm", y)
            yield f"{head}_norm", y
        else:
            yield f"{head}_rope", y
        turned[head] = y

    cache = _Cache.of(case, how)
    key, value = how.cached(unturned["k"], turned["k"]), of_heads["v_proj"]
    if how.written == "before attention":
        cache.write(how.write_slots(case), key, value)
    attended = how.cast(_attend(case, how, turned["q"], cache))
    if how.written == "after attention":
        cache.write(how.write_slots(case), key, value)
    yield "k_cache", cache.key[case.cached]
    yield "v_cache", cache.value[case.cached]
    yield "attention", attended
    out = project(attended, "o_proj")
    yield "o_proj", out
    middle = how.cast(how.attn_residual(x, normed, out))
    yield "attn_residual", middle
    normed = _norm(case, how, weights, "mlp_norm", middle)
    yield "mlp_norm", normed
    gate, up = project(normed, "gate_proj"), project(normed, "up_proj")
    yield "gate_proj", gate
    yield "up_proj", up
    activation = how.cast(how.activation(gate, up))
    yield "activation", activation
    out = project(activation, "down_proj")
    yield "down_proj", out
    yield "output", how.cast(how.mlp_residual(x, middle, normed, out))


@frozen(eq=False)
class _Cache:
    """Keys and values by slot, read in the order that the candidate declares."""

    key: Slots
    value: Slots
    writes: tuple[Slots, Slots]

    @classmethod
    def of(cls, case: Case, how: Operations) -> "_Cache":
        assert case.before is not None
        order = case.spec.row_order
        tensors = [t.float().clone() for t in (case.before.key, case.before.value)]
        reads = [Slots(t, order) for t in tensors]
        writes = [
            Slots(_seen_as(t, case.spec, how.write_order or order), how.write_order or order)
            for t in tensors
        ]
        return cls(reads[0], reads[1], (writes[0], writes[1]))

    def write(self, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Slots beyond the last stand for memory that is nobody's: these come round again."""
        slots = slots % self.key.count
        self.writes[0][slots], self.writes[1][slots] = key, value


def _seen_as(cache: Tensor, spec: KvCacheSpec, order: RowOrder) -> Tensor:
    """The same memory, in pages of that row order."""
    rows = (spec.page_size, spec.num_kv_heads)
    return cache.view(len(cache), *(rows if order == "NHD" else rows[::-1]), spec.head_dim)


def _attend(case: Case, how: Operations, q: Tensor, cache: _Cache) -> Tensor:
    """[T, num_heads * head_dim]"""
    assert case.layer is not None
    config, starts = case.config, case.batch.query_starts.tolist()
    window = how.window(config.window(case.layer))
    attended = []
    for i, length in enumerate(case.batch.context_lens.tolist()):
        mine = q[starts[i] : starts[i + 1]]
        positions = torch.arange(how.read_to(case, length))
        slots = how.read_slots(case, i, positions) % cache.key.count
        group = config.num_heads // config.num_kv_heads
        k, v = (how.spread(t[slots], group) for t in (cache.key, cache.value))
        query = torch.arange(length - len(mine), length).unsqueeze(1)
        seen = how.visible(query, positions)
        if window is not None:
            seen = seen & (positions > query - window)
        scores = torch.einsum("qhd,khd->hqk", mine, k) * how.scale(config)
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        attended.append(torch.einsum("hqk,khd->qhd", weights, v).flatten(1))
    return torch.cat(attended)
