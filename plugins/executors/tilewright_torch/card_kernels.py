"""Triton kernels of a step on a CUDA device, and the functions that launch them.

Each function allocates its result with torch, launches on the current stream and never waits for
the device. All sizes that change from step to step are read on the device, so that a captured step
can be replayed with other sequences. Results are rounded where ``tilewright_torch.model`` rounds
them. Float32 products are computed in float32, not in TF32.

The tests run these kernels on the CPU with Triton's interpreter.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from attrs import frozen
from torch import Tensor

MOST_SPLITS = 32
"""Most parts that a decoding sequence's context is divided into."""

LOG2_E = 1.4426950408889634

_TRITON_TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


@frozen(kw_only=True, eq=False)
class Context:
    """What attention reads of a step's B sequences. Tensors are int32 on the device."""

    table: Tensor
    """Pages of each sequence, the first B * width of these numbers; width is what ``width`` holds
    on the device."""
    width: Tensor
    """[1]"""
    lengths: Tensor
    """[B] tokens in the cache once the step has run"""
    starts: Tensor
    """[B + 1] first row of each sequence among the step's rows"""
    blocks: Tensor | None
    """[N, 2] sequence and first query of each block of ``QUERY_BLOCK`` queries of the dtype that
    attention computes in, for sequences with several queries; None in a step without them."""
    page_size: int
    splits: int
    """Parts that the context of a sequence with one query is divided into; 0: no such sequence."""


QUERY_BLOCK = {2: 64, 4: 16}
"""Queries of one program of prefill attention, by bytes of a number. More in float32 would not fit
registers."""

DECODE_STAGES = {2: 5, 4: 2}
PREFILL_STAGES = {2: 3, 4: 2}
"""Stages of the loop over keys, by bytes of a number. With these, Triton loads the keys and values
of one iteration while it multiplies another's, and needs no more shared memory than compute
capability 8.6 has."""


# --- attention ------------------------------------------------------------------------------------


@triton.jit
def _attention_block(
    q,
    acc,
    top,
    total,
    first,
    positions,
    length,
    keys,
    values,
    table,
    kv_head,
    scale,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Online softmax (arXiv:2205.14135) over the keys at positions first to first + BLOCK."""
    at = first + tl.arange(0, BLOCK)
    dims = tl.arange(0, PADDED_DIM)
    inside = at < length
    page = tl.load(table + at // PAGE_SIZE, mask=inside, other=0)
    slot = page.to(tl.int64) * PAGE_SIZE + at % PAGE_SIZE
    offset = (slot * KV_HEADS + kv_head)[:, None] * HEAD_DIM + dims[None, :]
    readable = inside[:, None] & (dims < HEAD_DIM)[None, :]
    k = tl.load(keys + offset, mask=readable, other=0.0).to(COMPUTE)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    seen = inside[None, :] & (at[None, :] <= positions[:, None])
    if WINDOW > 0:
        seen = seen & (at[None, :] > positions[:, None] - WINDOW)
    scores = tl.where(seen, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    # A row that has seen no key yet has no maximum: its weights are 0, not NaN.
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(scores - base[:, None])
    kept = tl.exp2(top - base)
    v = tl.load(values + offset, mask=readable, other=0.0).to(COMPUTE)
    acc = acc * kept[:, None] + tl.dot(weights.to(COMPUTE), v, input_precision="ieee")
    total = total * kept + tl.sum(weights, 1)
    return acc, new_top, total


@triton.jit
def decode_attention_kernel(
    q,
    keys,
    values,
    table,
    width,
    lengths,
    starts,
    out,
    parts,
    sums,
    scale,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """One query per sequence: program (sequence, KV head, part of the context)."""
    sequence, kv_head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tl.load(starts + sequence)
    if tl.load(starts + sequence + 1) - row != 1:
        return
    length = tl.load(lengths + sequence)
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(length - WINDOW, 0) // BLOCK * BLOCK
    blocks = tl.cdiv(tl.cdiv(length - begin, BLOCK), SPLITS)
    first = begin + part * blocks * BLOCK
    last = tl.minimum(first + blocks * BLOCK, length)

    heads, dims = tl.arange(0, ROWS), tl.arange(0, PADDED_DIM)
    head = kv_head * GROUP + heads
    valid = (heads < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    of_query = (row * GROUP * KV_HEADS + head)[:, None] * HEAD_DIM + dims[None, :]
    query = tl.load(q + of_query, mask=valid, other=0.0).to(COMPUTE)
    acc = tl.zeros([ROWS, PADDED_DIM], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    position = tl.zeros([ROWS], tl.int32) + length - 1
    pages = table + sequence * tl.load(width)
    for at in range(first, last, BLOCK):
        acc, top, total = _attention_block(
            query,
            acc,
            top,
            total,
            at,
            position,
            length,
            keys,
            values,
            pages,
            kv_head,
            scale,
            KV_HEADS,
            HEAD_DIM,
            PADDED_DIM,
            PAGE_SIZE,
            WINDOW,
            BLOCK,
            COMPUTE,
        )
    if SPLITS == 1:
        tl.store(out + of_query, (acc / total[:, None]).to(out.dtype.element_ty), mask=valid)
    else:
        of_part = (sequence * GROUP * KV_HEADS + head) * SPLITS + part
        tl.store(parts + of_part[:, None] * HEAD_DIM + dims[None, :], acc, mask=valid)
        tl.store(sums + 2 * of_part, top, mask=heads < GROUP)
        tl.store(sums + 2 * of_part + 1, total, mask=heads < GROUP)


@triton.jit
def join_parts_kernel(
    parts,
    sums,
    starts,
    out,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """The second pass of decode attention: program (sequence, head) joins the parts."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    row = tl.load(starts + sequence)
    if tl.load(starts + sequence + 1) - row != 1:
        return
    part, dims = tl.arange(0, SPLITS), tl.arange(0, PADDED_DIM)
    of_part = (sequence * HEADS + head) * SPLITS + part
    top = tl.load(sums + 2 * of_part)
    weight = tl.exp2(top - tl.max(top, 0))
    total = tl.sum(weight * tl.load(sums + 2 * of_part + 1), 0)
    inside = dims < HEAD_DIM
    acc = tl.load(
        parts + of_part[:, None] * HEAD_DIM + dims[None, :], mask=inside[None, :], other=0.0
    )
    joined = tl.sum(acc * weight[:, None], 0) / total
    to = out + (row * HEADS + head) * HEAD_DIM + dims
    tl.store(to, joined.to(out.dtype.element_ty), mask=inside)


@triton.jit
def prefill_attention_kernel(
    q,
    keys,
    values,
    table,
    width,
    lengths,
    starts,
    query_blocks,
    out,
    scale,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Several queries per sequence: program (block of queries, head)."""
    which, head = tl.program_id(0), tl.program_id(1)
    sequence = tl.load(query_blocks + 2 * which)
    first_query = tl.load(query_blocks + 2 * which + 1)
    row = tl.load(starts + sequence)
    queries = tl.load(starts + sequence + 1) - row
    length = tl.load(lengths + sequence)
    query, dims = first_query + tl.arange(0, ROWS), tl.arange(0, PADDED_DIM)
    position = length - queries + query
    valid = (query < queries)[:, None] & (dims < HEAD_DIM)[None, :]
    of_row = (row + query).to(tl.int64) * (GROUP * KV_HEADS) + head
    of_query = of_row[:, None] * HEAD_DIM + dims[None, :]
    block = tl.load(q + of_query, mask=valid, other=0.0).to(COMPUTE)
    acc = tl.zeros([ROWS, PADDED_DIM], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    earliest = length - queries + first_query
    last = tl.minimum(earliest + ROWS, length)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(earliest - WINDOW + 1, 0) // BLOCK * BLOCK
    pages = table + sequence * tl.load(width)
    for at in range(first, last, BLOCK):
        acc, top, total = _attention_block(
            block,
            acc,
            top,
            total,
            at,
            position,
            length,
            keys,
            values,
            pages,
            head // GROUP,
            scale,
            KV_HEADS,
            HEAD_DIM,
            PADDED_DIM,
            PAGE_SIZE,
            WINDOW,
            BLOCK,
            COMPUTE,
        )
    # The total of a row is at least 1, the weight of its maximum, unless the row is padding.
    total = tl.maximum(total, 1.0)
    tl.store(out + of_query, (acc / total[:, None]).to(out.dtype.element_ty), mask=valid)


def attention(q: Tensor, keys: Tensor, values: Tensor, at: Context, window: int | None) -> Tensor:
    """Causal attention over the paged cache, which is read in place.

    q: [T, num_heads, head_dim]. keys, values: [slots, num_kv_heads, head_dim]. Query head h reads
    KV head h // (num_heads // num_kv_heads). Returns [T, num_heads * head_dim] in the dtype of q;
    scores and softmax are float32.
    """
    rows, heads, head_dim = q.shape
    kv_heads = keys.shape[1]
    sequences = at.lengths.shape[0]
    compute = torch.promote_types(q.dtype, keys.dtype)
    padded = max(16, triton.next_power_of_2(head_dim))
    same: dict[str, Any] = {
        "GROUP": heads // kv_heads,
        "KV_HEADS": kv_heads,
        "HEAD_DIM": head_dim,
        "PADDED_DIM": padded,
        "PAGE_SIZE": at.page_size,
        "WINDOW": window or 0,
        "BLOCK": key_block(padded, compute.itemsize),
        "COMPUTE": _TRITON_TYPES[compute],
    }
    scale = head_dim**-0.5 * LOG2_E
    out = torch.empty_like(q)
    step = (at.table, at.width, at.lengths, at.starts)
    if at.blocks is not None:
        prefill_attention_kernel[len(at.blocks), heads](
            q,
            keys,
            values,
            *step,
            at.blocks,
            out,
            scale,
            ROWS=QUERY_BLOCK[compute.itemsize],
            num_warps=4,
            num_stages=PREFILL_STAGES[compute.itemsize],
            **same,
        )
    if at.splits:
        parts = sums = out
        if at.splits > 1:
            parts = q.new_empty((sequences, heads, at.splits, head_dim), dtype=torch.float32)
            sums = q.new_empty((sequences, heads, at.splits, 2), dtype=torch.float32)
        decode_attention_kernel[sequences, kv_heads, at.splits](
            q,
            keys,
            values,
            *step,
            out,
            parts,
            sums,
            scale,
            SPLITS=at.splits,
            ROWS=max(16, triton.next_power_of_2(heads // kv_heads)),
            num_warps=4,
            num_stages=DECODE_STAGES[compute.itemsize],
            **same,
        )
        if at.splits > 1:
            join_parts_kernel[sequences, heads](
                parts,
                sums,
                at.starts,
                out,
                HEADS=heads,
                HEAD_DIM=head_dim,
                PADDED_DIM=padded,
                SPLITS=at.splits,
                num_warps=4,
            )
    return out.view(rows, heads * head_dim)


def key_block(padded_dim: int, itemsize: int) -> int:
    """Keys of one iteration: tiles of keys and values of at most 16 KiB each."""
    return max(16, min(64, 2**14 // (padded_dim * itemsize)))


def splits(sequences: int, kv_heads: int, processors: int) -> int:
    """Parts to divide each context into, so that the programs fill a device about twice: a power
    of two up to MOST_SPLITS."""
    wanted = 2 * processors // max(1, sequences * kv_heads)
    return min(MOST_SPLITS, 1 << max(0, wanted.bit_length() - 1))


# --- norms, rotary embedding, activation ----------------------------------------------------------


@triton.jit
def norm_kernel(
    x, delta, weight, total, out, eps, SIZE: tl.constexpr, PADDED: tl.constexpr, ADDS: tl.constexpr
):
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, PADDED)
    inside = at < SIZE
    dtype = out.dtype.element_ty
    value = tl.load(x + row * SIZE + at, mask=inside, other=0.0)
    if ADDS:
        added = tl.load(delta + row * SIZE + at, mask=inside, other=0.0)
        value = (value.to(tl.float32) + added.to(tl.float32)).to(dtype)
        tl.store(total + row * SIZE + at, value, mask=inside)
    wide = value.to(tl.float32)
    scaled = (wide * tl.rsqrt(tl.sum(wide * wide, 0) / SIZE + eps)).to(dtype)
    factor = tl.load(weight + at, mask=inside, other=0.0)
    normed = (scaled.to(tl.float32) * factor.to(tl.float32)).to(dtype)
    tl.store(out + row * SIZE + at, normed, mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm (arXiv:1910.07467) of [T, n]: rounded, then times the weight."""
    return _normed(x, None, weight, eps)[1]


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + delta, and its RMSNorm."""
    return _normed(x, delta, weight, eps)


def _normed(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rows, size = x.shape
    out = torch.empty_like(x)
    total = x if delta is None else torch.empty_like(x)
    padded = triton.next_power_of_2(size)
    norm_kernel[rows,](
        x,
        x if delta is None else delta,
        weight,
        total,
        out,
        eps,
        SIZE=size,
        PADDED=padded,
        ADDS=delta is not None,
        num_warps=max(1, min(16, padded // 512)),
    )
    return total, out


@triton.jit
def rotate_kernel(
    qkv,
    q_norm,
    k_norm,
    cos,
    sin,
    rope_rows,
    slots,
    q_out,
    keys,
    values,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    NORMS: tl.constexpr,
):
    """Program (token, head): a query head, then the key heads, then the value heads."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    half: tl.constexpr = HEAD_DIM // 2
    at = tl.arange(0, PADDED_HALF)
    inside = at < half
    source = qkv + (token * (HEADS + 2 * KV_HEADS) + head) * HEAD_DIM + at
    low = tl.load(source, mask=inside, other=0.0)
    high = tl.load(source + half, mask=inside, other=0.0)
    slot = tl.load(slots + token).to(tl.int64) * KV_HEADS * HEAD_DIM
    if head >= HEADS + KV_HEADS:
        to = values + slot + (head - HEADS - KV_HEADS) * HEAD_DIM + at
        tl.store(to, low.to(values.dtype.element_ty), mask=inside)
        tl.store(to + half, high.to(values.dtype.element_ty), mask=inside)
    else:
        dtype = q_out.dtype.element_ty
        x, y = low.to(tl.float32), high.to(tl.float32)
        if NORMS:
            weight = q_norm + at
            if head >= HEADS:
                weight = k_norm + at
            square = tl.sum(x * x, 0) + tl.sum(y * y, 0)
            factor = tl.rsqrt(square / HEAD_DIM + eps)
            x = (x * factor).to(dtype).to(tl.float32)
            y = (y * factor).to(dtype).to(tl.float32)
            x = x * tl.load(weight, mask=inside, other=0.0).to(tl.float32)
            y = y * tl.load(weight + half, mask=inside, other=0.0).to(tl.float32)
            x, y = x.to(dtype).to(tl.float32), y.to(dtype).to(tl.float32)
        table = tl.load(rope_rows + token) * half + at
        c = tl.load(cos + table, mask=inside, other=0.0)
        s = tl.load(sin + table, mask=inside, other=0.0)
        turned = (x * c - y * s).to(dtype)
        turned_high = (y * c + x * s).to(dtype)
        if head < HEADS:
            to_q = q_out + (token * HEADS + head) * HEAD_DIM + at
            tl.store(to_q, turned, mask=inside)
            tl.store(to_q + half, turned_high, mask=inside)
        else:
            to_k = keys + slot + (head - HEADS) * HEAD_DIM + at
            tl.store(to_k, turned.to(keys.dtype.element_ty), mask=inside)
            tl.store(to_k + half, turned_high.to(keys.dtype.element_ty), mask=inside)


def rotate_and_cache(
    qkv: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    rope_rows: Tensor,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """Norm and rotary embedding of queries and keys; writes keys and values to their slots.

    qkv: [T, (num_heads + 2 * num_kv_heads) * head_dim], queries first. norms: the weights
    [head_dim] of query and key norm. cos, sin: [n, head_dim / 2] float32, of which token t uses row
    rope_rows[t]. keys, values: [slots, num_kv_heads, head_dim]. Returns the queries
    [T, num_heads, head_dim].
    """
    rows, kv_heads, head_dim = qkv.shape[0], keys.shape[1], keys.shape[2]
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    q = qkv.new_empty(rows, heads, head_dim)
    q_norm, k_norm = norms or (qkv, qkv)
    rotate_kernel[rows, heads + 2 * kv_heads](
        qkv,
        q_norm,
        k_norm,
        cos,
        sin,
        rope_rows,
        slots,
        q,
        keys,
        values,
        eps,
        HEADS=heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        PADDED_HALF=triton.next_power_of_2(head_dim // 2),
        NORMS=norms is not None,
        num_warps=1,
    )
    return q


@triton.jit
def silu_kernel(gate_up, out, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < SIZE
    dtype = out.dtype.element_ty
    gate = tl.load(gate_up + row * 2 * SIZE + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * SIZE + SIZE + at, mask=inside, other=0.0).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(dtype)
    tl.store(out + row * SIZE + at, (silu.to(tl.float32) * up).to(dtype), mask=inside)


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, [T, n], of [T, 2 * n] with the gates first; silu is rounded."""
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, size)
    silu_kernel[rows, triton.cdiv(size, 1024)](gate_up, out, SIZE=size, BLOCK=1024, num_warps=4)
    return out


# --- products -------------------------------------------------------------------------------------


@triton.jit
def one_row_kernel(
    x,
    weight,
    bias,
    out,
    columns,
    count,
    BIASED: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Program i: weight rows i * ROWS to (i + 1) * ROWS, times x. Sums are float32."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = rows < count
    start = weight + rows.to(tl.int64)[:, None] * columns
    acc = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in tl.range(0, columns, BLOCK, num_stages=STAGES):
        at = first + tl.arange(0, BLOCK)
        if EVEN:
            w = tl.load(start + at[None, :])
            value = tl.load(x + at)
        else:
            inside = at < columns
            w = tl.load(start + at[None, :], mask=valid[:, None] & inside[None, :], other=0.0)
            value = tl.load(x + at, mask=inside, other=0.0)
        acc += w.to(tl.float32) * value.to(tl.float32)[None, :]
    total = tl.sum(acc, 1)
    if BIASED:
        total += tl.load(bias + rows, mask=valid, other=0.0).to(tl.float32)
    tl.store(out + rows, total.to(out.dtype.element_ty), mask=valid)


OneRowConfig = tuple[int, int, int, int]
"""Weight rows of a program, columns of one iteration, warps, and iterations in flight."""

ONE_ROW_CONFIGS: tuple[OneRowConfig, ...] = (
    (1, 1024, 4, 1),
    (2, 1024, 4, 1),
    (4, 512, 4, 1),
    (2, 2048, 8, 1),
    (4, 1024, 8, 1),
    (8, 512, 8, 1),
    (2, 1024, 4, 3),
    (4, 512, 4, 4),
)
"""What ``tune`` chooses from."""

_chosen: dict[tuple[object, ...], OneRowConfig] = {}
"""The fastest of them by device, dtype and shape of the weight."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """x [T, in] times weight [out, in], plus the bias, rounded once.

    One row takes a kernel of its own, which reads weights faster than cuBLAS does; more rows take
    cuBLAS. out: where the result goes.
    """
    if x.shape[0] != 1:
        made = F.linear(x, weight, bias)
        return made if out is None else out.copy_(made)
    to = x.new_empty(1, weight.shape[0]) if out is None else out
    one_row(x, weight, bias, to, _chosen.get(_key(weight), ONE_ROW_CONFIGS[1]))
    return to


def one_row(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, config: OneRowConfig
) -> None:
    rows, block, warps, stages = config
    count, columns = weight.shape
    one_row_kernel[triton.cdiv(count, rows),](
        x,
        weight,
        weight if bias is None else bias,
        out,
        columns,
        count,
        BIASED=bias is not None,
        EVEN=columns % block == 0 and count % rows == 0,
        ROWS=rows,
        BLOCK=block,
        STAGES=stages,
        num_warps=warps,
    )


def tune(
    weights: list[Tensor], capture: Callable[[Callable[[], None]], Callable[[], None]]
) -> None:
    """Choose how one row is multiplied with weights of this shape, by trying it on all of them.

    weights: of one shape, on a CUDA device; together they should exceed its cache. capture: as in
    ``tilewright_torch.card.Card``; launches one by one would take longer than the kernels.
    """
    if not weights or _key(weights[0]) in _chosen:
        return
    count, columns = weights[0].shape
    x, out = weights[0].new_zeros(1, columns), weights[0].new_empty(1, count)
    seconds = {}
    for config in ONE_ROW_CONFIGS:
        one_row(x, weights[0], None, out, config)  # compiles

        def all_of_them(config: OneRowConfig = config) -> None:
            for weight in weights:
                one_row(x, weight, None, out, config)

        replay = capture(all_of_them)
        replay()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        replay()
        end.record()
        end.synchronize()
        seconds[config] = begin.elapsed_time(end)
    _chosen[_key(weights[0])] = min(seconds, key=seconds.__getitem__)


def _key(weight: Tensor) -> tuple[object, ...]:
    return weight.device, weight.dtype, *weight.shape
