"""A layer, or the head, in plain float32 arithmetic.

Each operation can be replaced, to compute a layer with a bug, from the same input and KV cache that
a candidate had.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from attrs import define, field, frozen
from torch import Tensor

from tilewright.rope import dynamic_frequencies, dynamic_lengths, frequencies
from tilewright.types import KvCacheSpec, KvLayer, ModelConfig, RowOrder, StepBatch
from tilewright.weights import expected_tensors
from tilewright_compare.judge import Limits, Tolerance
from tilewright_compare.sides import Tensors
from tilewright_compare.slots import Slots

Weights: TypeAlias = Mapping[str, Tensor]
"""A layer's weights, in float32, keyed by the distinctive part of the checkpoint's name:
``q_proj``, ``q_proj.bias``, ``q_norm``, ``input_layernorm``."""

Norm: TypeAlias = Callable[[Tensor, Tensor, float], Tensor]
"""Called with input [..., size], weight [size] and eps."""

NORM_WEIGHTS = {
    "attn_norm": "input_layernorm",
    "q_norm": "q_norm",
    "k_norm": "k_norm",
    "mlp_norm": "post_attention_layernorm",
    "final_norm": "norm",
}
"""Name in ``Weights``, keyed by stage."""

PRODUCTS = {
    "q_proj": ("attn_norm", "q_proj"),
    "k_proj": ("attn_norm", "k_proj"),
    "v_proj": ("attn_norm", "v_proj"),
    "o_proj": ("attention", "o_proj"),
    "gate_proj": ("mlp_norm", "gate_proj"),
    "up_proj": ("mlp_norm", "up_proj"),
    "down_proj": ("activation", "down_proj"),
    "lm_head": ("final_norm", "logits"),
}
"""Keyed by weight: the stage that is multiplied by it, and the stage that results."""


@define(kw_only=True, eq=False, slots=False)
class Case:
    """A candidate's inputs and results of one layer, or of the head, that it ran alone."""

    config: ModelConfig
    layer: int | None
    """None: the head."""
    dtype: torch.dtype
    """Dtype of the candidate's hidden states, and of weights that are not quantised."""
    hidden: Tensor
    """The input, [T, hidden_size] or, for the head, [L, hidden_size]."""
    batch: StepBatch
    """The step, with the candidate's pages."""
    spec: KvCacheSpec
    """Spec of the candidate's KV cache."""
    before: KvLayer | None
    """The layer's cache before the step, as the candidate had it; None for the head."""
    cached: Tensor
    """Cache slots that are compared, in the order of the tensors in ``found``; int64."""
    found: Tensors
    """The candidate's tensors, keyed by stage."""
    limits: Mapping[str, Limits]
    """Limits, keyed by stage."""
    tolerances: Mapping[str, Tolerance]
    """The user's tolerances, keyed by stage."""
    weight: Callable[[str], Tensor]
    """Returns a weight of the checkpoint by its full name, in float32; a quantised candidate's own.
    """
    quantised: bool = False
    """Whether the candidate's weights are quantised."""
    kept: dict[str, float] = field(factory=dict, init=False)
    """Cache of ``right_excess``, keyed by stage."""

    @cached_property
    def weights(self) -> Weights:
        return self.weights_of(self.layer)

    def weights_of(self, layer: int | None) -> Weights:
        """Weights of that layer, or of the head."""
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
        """Every stage, without a bug."""
        return dict(compute(self, RIGHT))

    @property
    def finite(self) -> bool:
        """Whether all of the candidate's results are finite."""
        return all(bool(t.isfinite().all()) for t in self.found.values())

    @property
    def lost(self) -> bool:
        """Whether no row of some result is finite, so that nothing can be told from it."""
        return any(not t.flatten(1).isfinite().all(1).any() for t in self.found.values() if len(t))

    def comparable(self, stage: str) -> bool:
        """Whether the candidate taps the stage, and in the right shape."""
        right, found = self.right.get(stage), self.found.get(stage)
        return right is not None and found is not None and found.shape == right.shape


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * weight


def angles(case: Case) -> Tensor:
    """Rotation angle of each pair of dimensions, [T, head_dim / 2]."""
    config, batch = case.config, case.batch
    if config.rope.kind == "dynamic":
        of_token = dynamic_frequencies(config, dynamic_lengths(batch))
        return batch.positions.float().unsqueeze(1) * of_token
    return batch.positions.float().unsqueeze(1) * frequencies(config)[0]


def rope_scale(config: ModelConfig) -> float:
    """Factor on cosine and sine."""
    return 1.0 if config.rope.kind == "dynamic" else frequencies(config)[1]


def rotate_halves(x: Tensor, angle: Tensor) -> Tensor:
    """Rotates dimension i of x [T, heads, head_dim] with i + head_dim / 2."""
    a, b = x.chunk(2, -1)
    cos, sin = angle.cos().unsqueeze(1), angle.sin().unsqueeze(1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


def read_slots(case: Case, sequence: int, positions: Tensor) -> Tensor:
    """The slots [n] int64 of a sequence's positions; beyond its pages, in the last one."""
    table = case.batch.block_table[sequence].long()
    page = (positions // case.spec.page_size).clamp(max=int((table >= 0).sum()) - 1)
    return table[page] * case.spec.page_size + positions % case.spec.page_size


def attend(scores: Tensor, values: Tensor) -> Tensor:
    """Weighted values, [queries, heads, head_dim].

    scores: [heads, queries, keys], scaled, and -inf where hidden; values: [keys, heads, head_dim].
    """
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)


@frozen(kw_only=True, eq=False)
class Operations:
    """How a layer is computed: correctly, by default."""

    weights: Callable[[Weights], Weights] = lambda weights: weights
    cast: Callable[[Tensor], Tensor] = lambda x: x
    """Applied to the result of each stage."""
    product: Callable[[Tensor, Tensor], Tensor] = F.linear
    norms: Mapping[str, Norm] = field(factory=dict)
    """Norms, keyed by stage; ``rms_norm`` by default."""
    norm_after_rope: bool = False
    angles: Callable[[Case], Tensor] = angles
    rotate: Callable[[Tensor, Tensor], Tensor] = rotate_halves
    rotated: Sequence[str] = ("q_rope", "k_rope")
    """Stages that are rotated."""
    rope_scale: float | None = None
    """Factor on cosine and sine; None: the model's."""
    cached: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = (
        lambda before, rotated, value: (rotated, value)
    )
    """Returns the cached key and value, from the key before and after RoPE and the value."""
    write_slots: Callable[[Case], Tensor] = lambda case: case.batch.slot_mapping.long()
    """The slot of each token of the step; -1: the token is not written."""
    misplaced: Sequence[str] = ("k_cache", "v_cache")
    """The caches that are written at ``write_slots``; the others are written at the right slots."""
    write_order: RowOrder | None = None
    """None: the order that the candidate declares."""
    written: Literal["before attention", "after attention", "never"] = "before attention"
    read_slots: Callable[[Case, int, Tensor], Tensor] = read_slots
    contexts: Callable[[Case], Sequence[int]] = lambda case: case.batch.context_lens.tolist()
    """How long each sequence is taken to be, by attention only: its last token comes last."""
    query_tile: int | None = None
    """Queries of a sequence that attend together, to the positions up to the last of them; None:
    all of the step. It matters where ``read_to`` or ``attend`` go beyond what the mask shows."""
    read_to: Callable[[Case, int], int] = lambda case, length: length
    """Number of positions of a sequence that attention reads, before masking."""
    read: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]] = lambda k, v, length: (k, v)
    """Returns the keys and values that attention uses, from those read, [n, KV heads, head_dim],
    and the number of positions that hold tokens."""
    visible: Callable[[Tensor, Tensor], Tensor] = lambda query, key: key <= query
    """The mask, from positions [queries, 1] and [keys]."""
    window: Callable[[int | None], int | None] = lambda window: window
    spread: Callable[[Tensor, int], Tensor] = lambda kv, group: kv.repeat_interleave(group, 1)
    """Expands keys or values [n, KV heads, head_dim] to one per query head."""
    scale: Callable[[ModelConfig], float] = lambda config: config.head_dim**-0.5
    attend: Callable[[Tensor, Tensor], Tensor] = attend
    heads: Callable[[Tensor], Tensor] = lambda heads: heads
    """Applied to attention's result, [T, num_heads, head_dim]."""
    attn_residual: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda x, normed, out: x + out
    """Called with the layer's input, attn_norm, and o_proj."""
    activation: Callable[[Tensor, Tensor], Tensor] = lambda gate, up: F.silu(gate) * up
    mlp_residual: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = (
        lambda x, middle, normed, out: middle + out
    )
    """Called with the layer's input, attn_residual, mlp_norm, and down_proj."""
    logits: Callable[[Tensor], Tensor] = lambda logits: logits
    """NaN in the result matches any value."""


RIGHT = Operations()


def compute(
    case: Case, how: Operations, right: "Tensors | None" = None
) -> Iterator[tuple[str, Tensor]]:
    """Stages as docs/tensors.md names them, and ``k_cache`` and ``v_cache``, in order, float32.

    right: the stages without a bug; stages that how does not change are taken from it.
    """
    run = _Run(case, how, how.weights(case.weights), right or {})
    return run.head() if case.layer is None else run.layer()


@define(eq=False)
class _Run:
    case: Case
    how: Operations
    weights: Weights
    right: Tensors
    made: Tensors = field(factory=dict)

    def stage(
        self,
        name: str,
        make: Callable[[], Tensor],
        after: Sequence[str] = (),
        weights: Sequence[str] = (),
        by: Sequence[str] = (),
    ) -> tuple[str, Tensor]:
        """Compute a stage from other stages, weights and operations; or take the right one."""
        self.made[name] = self.right[name] if self.same(name, after, weights, by) else make()
        return name, self.made[name]

    def same(
        self, name: str, after: Sequence[str], weights: Sequence[str], by: Sequence[str]
    ) -> bool:
        """Whether all inputs of a stage are the right layer's."""
        return (
            name in self.right
            and name not in self.how.norms
            and all(self.made[s] is self.right[s] for s in after)
            and all(self.weights.get(w) is self.case.weights.get(w) for w in weights)
            and all(getattr(self.how, o) is getattr(RIGHT, o) for o in (*by, "cast"))
        )

    def norm(self, name: str, before: str | None = None) -> tuple[str, Tensor]:
        """Norm of the stage before it, or of the input."""
        weight = NORM_WEIGHTS[name]

        def make() -> Tensor:
            x = self.made[before] if before else self.case.hidden.float()
            norm = self.how.norms.get(name, rms_norm)
            return self.how.cast(norm(x, self.weights[weight], self.case.config.norm_eps))

        return self.stage(name, make, [before] if before else [], [weight])

    def project(self, name: str, before: str, weight: str) -> tuple[str, Tensor]:
        def make() -> Tensor:
            out = self.how.product(self.made[before], self.weights[weight])
            bias = self.weights.get(f"{weight}.bias")
            out = self.how.cast(out if bias is None else out + bias)
            of_heads = name in ("q_proj", "k_proj", "v_proj")
            return out.view(len(out), -1, self.case.config.head_dim) if of_heads else out

        return self.stage(name, make, [before], [weight, f"{weight}.bias"], ["product"])

    def head(self) -> Iterator[tuple[str, Tensor]]:
        yield self.norm("final_norm")
        name, logits = self.project("logits", "final_norm", "lm_head")
        yield name, self.how.logits(logits)

    def layer(self) -> Iterator[tuple[str, Tensor]]:
        case, how, made = self.case, self.how, self.made
        x = case.hidden.float()
        yield self.norm("attn_norm")
        for name in ("q_proj", "k_proj", "v_proj"):
            yield self.project(name, "attn_norm", name)
        before_rope, rotated = {}, {}
        for head in "qk":
            before_rope[head], rotated[head] = yield from self.norm_and_rope(head)
        yield from self.cached(before_rope["k"], rotated)
        yield self.project("o_proj", "attention", "o_proj")
        yield self.stage(
            "attn_residual",
            lambda: how.cast(how.attn_residual(x, made["attn_norm"], made["o_proj"])),
            ["attn_norm", "o_proj"],
            by=["attn_residual"],
        )
        yield self.norm("mlp_norm", "attn_residual")
        for name in ("gate_proj", "up_proj"):
            yield self.project(name, "mlp_norm", name)
        yield self.stage(
            "activation",
            lambda: how.cast(how.activation(made["gate_proj"], made["up_proj"])),
            ["gate_proj", "up_proj"],
            by=["activation"],
        )
        yield self.project("down_proj", "activation", "down_proj")
        parts = ("attn_residual", "mlp_norm", "down_proj")
        yield self.stage(
            "output",
            lambda: how.cast(how.mlp_residual(x, *(made[p] for p in parts))),
            parts,
            by=["mlp_residual"],
        )

    def norm_and_rope(self, head: str) -> Generator[tuple[str, Tensor], None, tuple[str, str]]:
        """Norm and RoPE of queries or keys; returns the names of the stages before RoPE and
        of the last one."""
        projected, normed, rotated = f"{head}_proj", f"{head}_norm", f"{head}_rope"
        if not self.case.config.qk_norm:
            yield self.rope(rotated, projected)
            return projected, rotated
        if self.how.norm_after_rope:
            yield self.rope(rotated, projected)
            yield self.norm(normed, rotated)
            return rotated, normed
        yield self.norm(normed, projected)
        yield self.rope(rotated, normed)
        return normed, rotated

    def rope(self, name: str, before: str) -> tuple[str, Tensor]:
        case, how = self.case, self.how

        def make() -> Tensor:
            if name not in how.rotated:
                return self.made[before]
            scale = rope_scale(case.config) if how.rope_scale is None else how.rope_scale
            return how.cast(how.rotate(self.made[before], how.angles(case)) * scale)

        by = ["angles", "rotate", "rotated", "rope_scale", "norm_after_rope"]
        return self.stage(name, make, [before], by=by)

    def cached(self, before_rope: str, rotated: Mapping[str, str]) -> Iterator[tuple[str, Tensor]]:
        """The cache after keys and values are written, and attention."""
        case, how, made = self.case, self.how, self.made
        stages = ("k_cache", "v_cache", "attention")
        inputs = [before_rope, *rotated.values(), "v_proj"]
        if self.same("attention", inputs, [], CACHE_OPERATIONS):
            made |= {stage: self.right[stage] for stage in stages}
            yield from ((stage, made[stage]) for stage in stages)
            return
        cache = _Cache.of(case, how)
        read = _Cache.of(case, how) if how.written == "after attention" else cache
        key, value = how.cached(made[before_rope], made[rotated["k"]], made["v_proj"])
        if how.written != "never":
            cache.write(case, how, key, value)
        made["k_cache"], made["v_cache"] = cache.key[case.cached], cache.value[case.cached]
        yield "k_cache", made["k_cache"]
        yield "v_cache", made["v_cache"]
        attention = how.cast(_attend(case, how, made[rotated["q"]], read))
        right = self.right.get("attention")
        changes_nothing = right is not None and torch.allclose(attention, right, rtol=0, atol=1e-6)
        made["attention"] = right if right is not None and changes_nothing else attention
        yield "attention", made["attention"]


CACHE_OPERATIONS = (
    "cached",
    "write_slots",
    "misplaced",
    "write_order",
    "written",
    "norm_after_rope",
    "read_slots",
    "contexts",
    "query_tile",
    "read_to",
    "read",
    "visible",
    "window",
    "spread",
    "scale",
    "attend",
    "heads",
)


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
        tensors = [t.to(torch.float32, copy=True) for t in (case.before.key, case.before.value)]
        reads = [Slots(t, order) for t in tensors]
        writes = [
            Slots(_seen_as(t, case.spec, how.write_order or order), how.write_order or order)
            for t in tensors
        ]
        return cls(reads[0], reads[1], (writes[0], writes[1]))

    def write(self, case: Case, how: Operations, key: Tensor, value: Tensor) -> None:
        """Slots beyond the last wrap around; they stand for memory outside the cache."""
        for name, cache, new in zip(("k_cache", "v_cache"), self.writes, (key, value), strict=True):
            slots = (how if name in how.misplaced else RIGHT).write_slots(case)
            kept = slots >= 0
            cache[slots[kept] % cache.count] = new[kept]


def _seen_as(cache: Tensor, spec: KvCacheSpec, order: RowOrder) -> Tensor:
    """A view of the same memory, in pages of that row order."""
    rows = (spec.page_size, spec.num_kv_heads)
    return cache.view(len(cache), *(rows if order == "NHD" else rows[::-1]), spec.head_dim)


def _attend(case: Case, how: Operations, q: Tensor, cache: _Cache) -> Tensor:
    """[T, num_heads * head_dim]"""
    starts = case.batch.query_starts.tolist()
    attended = []
    for i, length in enumerate(how.contexts(case)):
        mine = q[starts[i] : starts[i + 1]]
        size = how.query_tile or len(mine)
        for first in range(0, len(mine), size):
            tile = mine[first : first + size]
            before = length - len(mine) + first
            attended.append(_attend_tile(case, how, tile, cache, i, before))
    return how.heads(torch.cat(attended)).flatten(1)


def _attend_tile(
    case: Case, how: Operations, q: Tensor, cache: _Cache, sequence: int, before: int
) -> Tensor:
    """Attention of queries of one sequence that follow each other, [n, num_heads, head_dim].

    before: the position of the first of them.
    """
    assert case.layer is not None
    config = case.config
    window = how.window(config.window(case.layer))
    length = before + len(q)
    positions = torch.arange(how.read_to(case, length))
    slots = how.read_slots(case, sequence, positions) % cache.key.count
    group = config.num_heads // config.num_kv_heads
    read = how.read(cache.key[slots], cache.value[slots], length)
    k, v = (how.spread(t, group) for t in read)
    query = torch.arange(before, length).unsqueeze(1)
    seen = how.visible(query, positions)
    if window is not None:
        seen = seen & (positions > query - window)
    scores = torch.einsum("qhd,khd->hqk", q, k) * how.scale(config)
    return how.attend(scores.masked_fill(~seen, float("-inf")), v)
