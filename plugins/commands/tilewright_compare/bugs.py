"""Known bugs of kernels and loaders, as hypotheses."""

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from attrs import evolve
from torch import Tensor

from tilewright.types import Hypothesis, RowOrder
from tilewright_compare.bugs_norms import Change, norms, norms_in_parts, without
from tilewright_compare.bugs_rope import rope, rope_of_halves
from tilewright_compare.bugs_tiles import TILE_BUGS, TILES
from tilewright_compare.hypotheses import right_excess
from tilewright_compare.layer import (
    PRODUCTS,
    Case,
    Operations,
    Weights,
    read_slots,
)

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


# --- weights --------------------------------------------------------------------------------------


def _with(changes: Mapping[str, Change]) -> Operations:
    """Operations with some weights changed, where the layer has them."""

    def weights(given: Weights) -> Weights:
        return {n: changes[n](w) if n in changes else w for n, w in given.items()}

    return Operations(weights=weights)


def _given(weight: Tensor) -> Change:
    """Replaces the right weight with another one."""
    return lambda right: weight


def _rolled(by: int, axis: int) -> Change:
    return lambda w: w.roll(by, axis)


def _of_columns(change: Change) -> Change:
    return lambda w: change(w.T).T


def _regrouped(outer: int, inner: int) -> Change:
    """Reorders rows from [outer, inner] to [inner, outer]."""
    return lambda w: w.reshape(outer, inner, -1, *w.shape[1:]).transpose(0, 1).reshape(w.shape)


def _regrouped_in_heads(outer: int, inner: int) -> Change:
    return lambda w: w.reshape(-1, outer, inner, *w.shape[1:]).transpose(1, 2).reshape(w.shape)


def transposed(case: Case) -> Iterator[tuple[str, Operations]]:
    for name in PROJECTIONS if case.layer is not None else ():
        rows, columns = case.weights[name].shape
        if rows == columns:
            yield f"{name}'s weight is transposed", _with({name: lambda w: w.T})
            continue
        yield (
            f"{name}'s transposed weight is read as if it were not",
            _with({name: lambda w: w.T.reshape(w.shape)}),
        )
        yield (
            f"{name}'s weight is read as if it were transposed",
            _with({name: lambda w: w.reshape(w.shape[::-1]).T}),
        )


def in_another_order(case: Case) -> Iterator[tuple[str, Operations]]:
    """Heads and their halves in the order of other layouts, and shifted rows or columns."""
    if case.layer is None:
        return
    config = case.config
    pairs, kv_heads = config.head_dim // 2, config.num_kv_heads
    group = config.num_heads // kv_heads
    for names in (("q_proj",), ("k_proj",), ("q_proj", "k_proj")):
        for what, change in (
            ("for RoPE that rotates neighbours", _regrouped_in_heads(2, pairs)),
            ("as if stored for RoPE that rotates neighbours", _regrouped_in_heads(pairs, 2)),
        ):
            changes = {n: change for name in names for n in (name, f"{name}.bias")}
            who = " and ".join(names)
            yield f"the rows of {who} are reordered {what}", _with(changes)
            if f"{names[0]}.bias" in case.weights:
                yield (
                    f"the rows of {who} are reordered {what}, and the bias is not",
                    _with(dict.fromkeys(names, change)),
                )
    if 1 < kv_heads < config.num_heads:
        for what, change in (
            ("member of the group first, then KV head", _regrouped(kv_heads, group)),
            ("KV head first, read as member of the group first", _regrouped(group, kv_heads)),
        ):
            yield (
                f"the heads of q_proj are in another order: {what}",
                _with({"q_proj": change, "q_proj.bias": change}),
            )
            yield (
                f"the heads of o_proj are in another order: {what}",
                _with({"o_proj": _of_columns(change)}),
            )
    for name in PROJECTIONS:
        for axis, what in enumerate(("rows", "columns")):
            half = case.weights[name].shape[axis] // 2
            yield f"{name}'s {what} are shifted by one", _with({name: _rolled(1, axis)})
            yield f"{name}'s {what} are shifted back by one", _with({name: _rolled(-1, axis)})
            yield f"{name}'s {what} are in swapped halves", _with({name: _rolled(half, axis)})


def another_weight(case: Case) -> Iterator[tuple[str, Operations]]:
    if case.layer is None:
        return
    weights = case.weights
    pairs = (("gate_proj", "up_proj"), ("k_proj", "v_proj"), ("q_norm", "k_norm"))
    for a, b in pairs:
        if a in weights:
            swapped = {a: _given(weights[b]), b: _given(weights[a])}
            yield f"{a} and {b} are swapped", _with(swapped)
            yield f"{b} has {a}'s weight", _with({b: swapped[b]})
            yield f"{a} has {b}'s weight", _with({a: swapped[a]})
    first, second = "input_layernorm", "post_attention_layernorm"
    yield (
        "attn_norm and mlp_norm are swapped",
        _with({first: _given(weights[second]), second: _given(weights[first])}),
    )
    yield "mlp_norm has attn_norm's weight", _with({second: _given(weights[first])})
    yield "attn_norm has mlp_norm's weight", _with({first: _given(weights[second])})
    for layer in (case.layer - 1, case.layer + 1):
        if 0 <= layer < case.config.num_layers:
            others = {name: _given(weight) for name, weight in case.weights_of(layer).items()}
            yield f"all weights are those of layer {layer}", _with(others)
            for name, other in others.items():
                yield f"{name} is that of layer {layer}", _with({name: other})


def without_bias(case: Case) -> Iterator[tuple[str, Operations]]:
    biases: dict[str, Change] = {n: torch.zeros_like for n in case.weights if n.endswith(".bias")}
    for name in biases:
        yield f"{name.removesuffix('.bias')}'s bias is missing", _with({name: torch.zeros_like})
    if len(biases) > 1:
        yield "all biases are missing", _with(biases)


BLOCKS = 64
"""Largest number of parts that a sum is split into, to see which of them are missing."""
PARTS_AT_ONCE = 2**24
"""Approximate number of elements of such parts that are in memory together."""


def parts_of_sums(case: Case) -> Iterator[tuple[str, Operations]]:
    """Sums over some columns of a weight that are not counted exactly once. Only the first wrong
    product is examined, since what follows it is wrong too."""
    for name, (before, after) in PRODUCTS.items():
        if not case.comparable(after) or right_excess(case, after) <= 1:
            continue
        right, found = case.right[after], case.found[after]
        if not found.isfinite().all():
            continue
        weight = case.weights[name]
        columns = weight.shape[1]
        size = max(16, -(-columns // BLOCKS))
        missing = (right - found.float()).flatten(1)
        wrong = _missing_parts(case.right[before], weight, missing, size).round()
        if not wrong.any():
            continue
        scale = (1 - wrong).repeat_interleave(size)[:columns]
        first = int(wrong.nonzero()[0]) * size
        last = min((int(wrong.nonzero()[-1]) + 1) * size, columns) - 1
        some = f"columns of {name} from {first} to {last} or some of them"
        if wrong.min() == wrong.max() != 1:
            what = f"sums over {name} are {float(scale[0]):g} times what they should be"
        elif wrong.min() >= 0 and wrong.max() == 1:
            what = f"{some} are left out"
        elif wrong.max() <= 0:
            what = f"{some} are added more than once"
        else:
            what = f"{some} are not added exactly once"
        yield what, _with({name: _scaled(scale)})
        return


def _missing_parts(x: Tensor, weight: Tensor, missing: Tensor, size: int) -> Tensor:
    """Least-squares fit of how many times the sum over each block of columns is missing.

    x: [T, columns], multiplied by weight [out, columns]; missing: [T, out]. Returns [blocks].
    """
    columns = [slice(i, i + size) for i in range(0, x.shape[1], size)]
    squares, along = torch.zeros(len(columns), len(columns)), torch.zeros(len(columns))
    some = max(1, PARTS_AT_ONCE // (len(columns) * len(x)))
    for first in range(0, len(weight), some):
        rows = weight[first : first + some]
        parts = torch.stack([(x[:, c] @ rows[:, c].T).flatten() for c in columns])
        squares += parts @ parts.T
        along += parts @ missing[:, first : first + some].flatten()
    solution: Tensor = torch.linalg.lstsq(squares, along.unsqueeze(1)).solution
    return solution.flatten()


def _scaled(columns: Tensor) -> Change:
    return lambda w: w * columns


def ends_of_sums(case: Case) -> Iterator[tuple[str, Operations]]:
    """The last tile of columns left out of products whose stage is not tapped."""
    if case.layer is None:
        return

    for columns in TILES:
        fits = [n for n in PROJECTIONS if columns < case.weights[n].shape[1]]
        for name in fits:
            if not case.comparable(PRODUCTS[name][1]):
                yield (
                    f"the last {columns} columns of {name} are left out of the sum",
                    _with({name: without(columns)}),
                )
        if len(fits) == len(PROJECTIONS):
            yield (
                f"the last {columns} columns of every projection are left out of the sum",
                _with(dict.fromkeys(fits, without(columns))),
            )


# --- attention ------------------------------------------------------------------------------------


def attention(case: Case) -> Iterator[tuple[str, Operations]]:
    if case.layer is None:
        return
    config = case.config
    if 1 < config.num_kv_heads < config.num_heads:
        yield (
            "KV heads are tiled over the query heads, not repeated",
            Operations(spread=lambda kv, group: kv.repeat(1, group, 1)),
        )
        yield (
            "all query heads read the first KV head",
            Operations(spread=lambda kv, group: kv[:, :1].expand(-1, group * kv.shape[1], -1)),
        )
    scales: dict[str, Callable[[Any], float]] = {
        "the attention scale is missing": lambda c: 1.0,
        "the attention scale is applied twice": lambda c: 1 / c.head_dim,
        "the attention scale is doubled": lambda c: 2 * c.head_dim**-0.5,
        "the attention scale is halved": lambda c: 0.5 * c.head_dim**-0.5,
        "the attention scale is that of half as many dimensions": lambda c: (
            (c.head_dim / 2) ** -0.5
        ),
        "the attention scale is that of twice as many dimensions": lambda c: (
            (2 * c.head_dim) ** -0.5
        ),
        "the attention scale is that of hidden_size / num_heads": lambda c: (
            (c.hidden_size / c.num_heads) ** -0.5
        ),
    }
    for what, scale in scales.items():
        yield what, Operations(scale=scale)
    yield (
        "the causal mask hides the token itself",
        Operations(visible=lambda q, k: (k < q) | ((q == 0) & (k == 0))),
    )
    yield "the causal mask shows the next token", Operations(visible=lambda q, k: k <= q + 1)
    yield (
        "the causal mask shows the next token, written or not",
        Operations(visible=lambda q, k: k <= q + 1, read_to=lambda case, length: length + 1),
    )
    yield "the causal mask is missing", Operations(visible=lambda q, k: k >= 0)
    yield "the causal mask is inverted", Operations(visible=lambda q, k: k >= q)

    def whole_pages(case: Case, length: int) -> int:
        return -(-length // case.spec.page_size) * case.spec.page_size

    yield (
        "padding up to the end of the page is attended to",
        Operations(read_to=whole_pages, visible=lambda q, k: (k <= q) | (k > q.max())),
    )
    yield (
        "a whole page is attended to, without a mask",
        Operations(read_to=whole_pages, visible=lambda q, k: k >= 0),
    )
    if config.window(case.layer) is not None:
        yield "the sliding window is ignored", Operations(window=lambda w: None)
        yield "the sliding window is one token too wide", Operations(window=lambda w: w and w + 1)
        yield "the sliding window is one token too narrow", Operations(window=lambda w: w and w - 1)


# --- the KV cache ---------------------------------------------------------------------------------


def _slots_of(case: Case, change: Change) -> Tensor:
    """Slots for changed positions of the step's tokens."""
    starts = case.batch.query_starts.tolist()
    positions = case.batch.positions.long()
    return torch.cat(
        [
            read_slots(case, i, change(positions[start:stop]).clamp(min=0))
            for i, (start, stop) in enumerate(pairwise(starts))
        ]
    )


CACHED: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "keys are cached before RoPE": lambda before, rotated, value: (before, value),
    "keys are cached as values": lambda before, rotated, value: (rotated, rotated),
    "values are cached as keys": lambda before, rotated, value: (value, value),
    "keys and values are cached in each other's place": (
        lambda before, rotated, value: (value, rotated)
    ),
}


def _first_head(x: Tensor) -> Tensor:
    return x[:, :1].expand_as(x)


def kv_cache(case: Case) -> Iterator[tuple[str, Operations]]:
    if case.layer is None:
        return
    spec = case.spec
    size = spec.page_size
    if size > 1 and spec.num_kv_heads > 1:
        other: RowOrder = "HND" if spec.row_order == "NHD" else "NHD"
        yield (
            f"keys and values are written in row order {other}, not {spec.row_order}",
            Operations(write_order=other),
        )
    writes: dict[str, Callable[[Case], Tensor]] = {
        "the slot is not advanced: a token is written where the one before it is": lambda c: (
            _slots_of(c, lambda p: p - 1)
        ),
        "the slot is advanced too early: a token is written where the next one goes": lambda c: (
            _slots_of(c, lambda p: p + 1)
        ),
        "slots are positions, as if there were no pages": lambda c: c.batch.positions.long(),
        "the slots of a page are in reverse": lambda c: (
            c.batch.slot_mapping.long() // size * size
            + size
            - 1
            - c.batch.slot_mapping.long() % size
        ),
    }
    for what, slots in writes.items():
        yield what, Operations(write_slots=slots)
    for what, cached in CACHED.items():
        yield what, Operations(cached=cached)
    if spec.num_kv_heads > 1:
        yield (
            "the first KV head's keys and values are cached for all KV heads",
            Operations(cached=lambda before, rotated, v: (_first_head(rotated), _first_head(v))),
        )
    yield "keys and values are written after attention", Operations(written="after attention")
    yield "keys and values are not written", Operations(written="never")
    sequences, width = case.batch.block_table.shape
    table = case.batch.block_table.long()
    for by in (1, -1) if sequences > 1 else ():

        def rolled(case: Case, i: int, positions: Tensor, by: int = by) -> Tensor:
            batch = evolve(case.batch, block_table=table.roll(by, 0))
            return read_slots(evolve(case, batch=batch), i, positions)

        yield (
            f"the pages of the sequence {'before' if by > 0 else 'after'} are read",
            Operations(read_slots=rolled),
        )
    for stride in {*range(1, width), width + 1, width + 2} if sequences > 1 else ():

        def strided(case: Case, i: int, positions: Tensor, stride: int = stride) -> Tensor:
            place = (i * stride + positions // size).clamp(max=table.numel() - 1)
            return table.flatten()[place].clamp(min=0) * size + positions % size

        yield (
            f"the block table is read with a stride of {stride}, not {width}",
            Operations(read_slots=strided),
        )
    if width > 1:

        def contiguous(case: Case, i: int, positions: Tensor) -> Tensor:
            return table[i, 0] * size + positions

        yield "pages are read as if they followed each other", Operations(read_slots=contiguous)


# --- sums, activation, rounding, and what follows the last layer ----------------------------------


def residuals(case: Case) -> Iterator[tuple[str, Operations]]:
    if case.layer is None:
        return
    first: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "the first residual is missing": lambda x, normed, out: out,
        "the first residual is attn_norm, not the layer's input": lambda x, normed, out: (
            normed + out
        ),
        "the first residual is added twice": lambda x, normed, out: x + x + out,
        "attention is left out of the first residual": lambda x, normed, out: x,
    }
    for what, residual in first.items():
        yield what, Operations(attn_residual=residual)
    second: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
        "the second residual is missing": lambda x, middle, normed, out: out,
        "the second residual is the layer's input, from before attention": (
            lambda x, middle, normed, out: x + out
        ),
        "the second residual is mlp_norm": lambda x, middle, normed, out: normed + out,
        "the layer's input is added in both residuals": lambda x, middle, normed, out: (
            x + middle + out
        ),
        "the MLP is left out of the second residual": lambda x, middle, normed, out: middle,
    }
    for what, second_residual in second.items():
        yield what, Operations(mlp_residual=second_residual)


def activation(case: Case) -> Iterator[tuple[str, Operations]]:
    if case.layer is None:
        return
    others: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "the activation is GELU, not SiLU": lambda gate, up: F.gelu(gate) * up,
        "the activation is GELU by tanh, not SiLU": (
            lambda gate, up: F.gelu(gate, approximate="tanh") * up
        ),
        "the activation is GELU by a sigmoid, not SiLU": (
            lambda gate, up: gate * torch.sigmoid(1.702 * gate) * up
        ),
        "the activation is ReLU, not SiLU": lambda gate, up: F.relu(gate) * up,
        "the activation is a sigmoid, not SiLU": lambda gate, up: gate.sigmoid() * up,
        "the activation is missing": lambda gate, up: gate * up,
        "the activation's sigmoid is of -gate": lambda gate, up: gate * torch.sigmoid(-gate) * up,
        "SiLU of the gate is missing: up alone is multiplied": lambda gate, up: up,
        "the activation is of up, not of gate": lambda gate, up: gate * F.silu(up),
        "gate is not multiplied by up": lambda gate, up: F.silu(gate),
    }
    for what, made in others.items():
        yield what, Operations(activation=made)


def truncated(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds towards zero to a dtype of 16 bits, and converts back to float32."""
    rounded = x.to(dtype)
    beyond = rounded.float().abs() > x.abs()
    return torch.where(beyond, _towards_zero(rounded), rounded).float()


def _towards_zero(x: Tensor) -> Tensor:
    """The next number towards zero: the bits, as an integer, minus one."""
    return (x.contiguous().view(torch.int16) - 1).view(x.dtype)


def rounding(case: Case) -> Iterator[tuple[str, Operations]]:
    dtype = case.dtype

    def cast(x: Tensor) -> Tensor:
        return x.to(dtype).float()

    def weights(given: Weights) -> Weights:
        return {name: cast(w) for name, w in given.items()}

    if dtype is not torch.float32:
        yield (
            "casts truncate instead of rounding",
            Operations(weights=weights, cast=lambda x: truncated(x, dtype)),
        )
    for low in dict.fromkeys((torch.bfloat16, dtype)):
        if low is torch.float32:
            continue
        name = str(low).removeprefix("torch.")
        for block in (1, 8, 16, 32, 64, 128, 256):

            def product(x: Tensor, w: Tensor, block: int = block, low: torch.dtype = low) -> Tensor:
                total = torch.zeros(len(x), len(w), dtype=low)
                for i in range(0, x.shape[1], block):
                    part = x[:, i : i + block] @ w[:, i : i + block].T
                    total = total + part.to(low)
                return total.float()

            def rounded_sum(
                x: Tensor, w: Tensor, block: int = block, low: torch.dtype = low
            ) -> Tensor:
                x, total = x.to(low).float(), torch.zeros(len(x), len(w))
                for i in range(0, x.shape[1], block):
                    total = (total + x[:, i : i + block] @ w[:, i : i + block].T).to(low).float()
                return total

            each = "each product" if block == 1 else f"blocks of {block}"
            what = f"products are added up in {name}, after {each}"
            yield what, Operations(weights=weights, cast=cast, product=product)
            if block > 1:
                yield what, Operations(weights=weights, product=rounded_sum)


def head(case: Case) -> Iterator[tuple[str, Operations]]:
    if case.layer is not None:
        return
    vocab_size = case.config.vocab_size
    if not case.config.tie_word_embeddings:
        yield (
            "the head is tied to the embedding, but the model has its own head",
            Operations(
                weights=lambda w: {**w, "lm_head": case.weight("model.embed_tokens.weight")}
            ),
        )
    found = case.found.get("logits")
    if found is not None and found.dim() == 2 and found.shape[1] > vocab_size:
        more = found.shape[1] - vocab_size
        yield (
            f"{more} rows of padding follow the vocabulary, and their logits are not cut off",
            Operations(logits=lambda logits: F.pad(logits, (0, more), value=math.nan)),
        )
    for by in (1, -1):
        yield (
            f"the head's rows are shifted by {by}",
            Operations(logits=_rolled(by, 1)),
        )


HYPOTHESES: tuple[Hypothesis, ...] = (
    transposed,
    in_another_order,
    another_weight,
    without_bias,
    parts_of_sums,
    ends_of_sums,
    norms,
    norms_in_parts,
    rope,
    rope_of_halves,
    attention,
    kv_cache,
    residuals,
    activation,
    rounding,
    head,
    *TILE_BUGS,
)
