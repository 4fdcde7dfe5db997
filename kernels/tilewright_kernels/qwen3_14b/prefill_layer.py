"""One decoder layer for prefill: chunks of several sequences' prompts."""

import pypto.language as pl

from .blocks import (
    attend_rows,
    causal_band,
    finish_layer,
    project_heads,
    rope_rows,
    rotate_heads,
    round_rows,
    widen_rows,
    write_cache,
)
from .constants import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    INTERMEDIATE,
    KV_HEADS,
    KV_TILE,
    Q_ROWS,
    ROWS,
    SCRATCH_ROWS,
)

Q_DIM = HEADS * HEAD_DIM
KV_DIM = KV_HEADS * HEAD_DIM
BAND = Q_ROWS + 2 * KV_TILE

T = pl.dynamic("T")
B = pl.dynamic("B")
ENTRIES = pl.dynamic("ENTRIES")
POSITIONS = pl.dynamic("POSITIONS")
CACHE_ROWS = pl.dynamic("CACHE_ROWS")

KV_ROW_ORDER = "HND"


@pl.jit.inline
def prefill_tokens(
    hidden: pl.Tensor[[T, HIDDEN], pl.BF16],
    context_lens: pl.Tensor[[B], pl.INT32],
    query_starts: pl.Tensor[[B], pl.INT32],
    query_lens: pl.Tensor[[B], pl.INT32],
    block_table: pl.Tensor[[ENTRIES], pl.INT32],
    slot_mapping: pl.Tensor[[T], pl.INT32],
    rope_cos: pl.Tensor[[POSITIONS, HEAD_DIM], pl.FP32],
    rope_sin: pl.Tensor[[POSITIONS, HEAD_DIM], pl.FP32],
    input_norm: pl.Tensor[[1, HIDDEN], pl.FP32],
    wq: pl.Tensor[[HIDDEN, Q_DIM], pl.BF16],
    wk: pl.Tensor[[HIDDEN, KV_DIM], pl.BF16],
    wv: pl.Tensor[[HIDDEN, KV_DIM], pl.BF16],
    q_norm: pl.Tensor[[1, HEAD_DIM], pl.FP32],
    k_norm: pl.Tensor[[1, HEAD_DIM], pl.FP32],
    wo: pl.Tensor[[Q_DIM, HIDDEN], pl.BF16],
    post_norm: pl.Tensor[[1, HIDDEN], pl.FP32],
    w_gate: pl.Tensor[[HIDDEN, INTERMEDIATE], pl.BF16],
    w_up: pl.Tensor[[HIDDEN, INTERMEDIATE], pl.BF16],
    w_down: pl.Tensor[[INTERMEDIATE, HIDDEN], pl.BF16],
    k_cache: pl.Tensor[[CACHE_ROWS, HEAD_DIM], pl.BF16],
    v_cache: pl.Tensor[[CACHE_ROWS, HEAD_DIM], pl.BF16],
    out: pl.Tensor[[T, HIDDEN], pl.BF16],
):
    """A layer: out = f(hidden), both [T, HIDDEN] BF16; kernels of whole models share it."""
    batch = pl.tensor.dim(context_lens, 0)
    table_stride = pl.tensor.dim(block_table, 0) // batch

    band = pl.create_tensor([Q_ROWS, BAND], dtype=pl.FP32)
    band = causal_band(band)

    # Sequence b's queries start at row query_starts[b] + b * ROWS, with space for a last tile.
    queries = pl.create_tensor([SCRATCH_ROWS, Q_DIM], dtype=pl.BF16)
    for b in pl.range(batch):
        start = pl.cast(pl.read(query_starts, [b]), pl.INDEX)
        length = pl.cast(pl.read(query_lens, [b]), pl.INDEX)
        before = pl.cast(pl.read(context_lens, [b]), pl.INDEX) - length
        for i in pl.range(0, length, ROWS):
            count = pl.min(ROWS, length - i)
            row = start + i
            position = before + i
            x = pl.create_tensor([ROWS, HIDDEN], dtype=pl.FP32)
            x = widen_rows(hidden, row, count, x)
            q = pl.create_tensor([ROWS, Q_DIM], dtype=pl.FP32)
            k = pl.create_tensor([ROWS, KV_DIM], dtype=pl.FP32)
            v = pl.create_tensor([ROWS, KV_DIM], dtype=pl.FP32)
            q, k, v = project_heads(x, input_norm, wq, wk, wv, q, k, v)
            cos = pl.create_tensor([ROWS, HEAD_DIM], dtype=pl.FP32)
            sin = pl.create_tensor([ROWS, HEAD_DIM], dtype=pl.FP32)
            cos, sin = rope_rows(rope_cos, rope_sin, position, count, cos, sin)
            scratch_row = row + b * ROWS
            queries = rotate_heads(q, q_norm, cos, sin, queries, scratch_row)
            keys = pl.create_tensor([ROWS, KV_DIM], dtype=pl.BF16)
            keys = rotate_heads(k, k_norm, cos, sin, keys, 0)
            values = pl.create_tensor([ROWS, KV_DIM], dtype=pl.BF16)
            values = round_rows(v, values)
            k_cache = write_cache(keys, slot_mapping, row, count, k_cache)
            v_cache = write_cache(values, slot_mapping, row, count, v_cache)

    for b in pl.range(batch):
        start = pl.cast(pl.read(query_starts, [b]), pl.INDEX)
        length = pl.cast(pl.read(query_lens, [b]), pl.INDEX)
        before = pl.cast(pl.read(context_lens, [b]), pl.INDEX) - length
        table_row = b * table_stride
        for i in pl.range(0, length, ROWS):
            count = pl.min(ROWS, length - i)
            row = start + i
            position = before + i
            context = position + count
            scratch_row = row + b * ROWS
            attended = pl.create_tensor([ROWS, Q_DIM], dtype=pl.BF16)
            attended = attend_rows(
                queries, scratch_row, position, context,
                block_table, table_row, k_cache, v_cache, band, attended,
            )  # fmt: skip
            x = pl.create_tensor([ROWS, HIDDEN], dtype=pl.FP32)
            x = widen_rows(hidden, row, count, x)
            out = finish_layer(
                x, attended, wo, post_norm, w_gate, w_up, w_down, out, row, count
            )  # fmt: skip
    return out


@pl.jit
def prefill_layer(
    hidden: pl.Tensor[[T, HIDDEN], pl.BF16],
    context_lens: pl.Tensor[[B], pl.INT32],
    query_starts: pl.Tensor[[B], pl.INT32],
    query_lens: pl.Tensor[[B], pl.INT32],
    block_table: pl.Tensor[[ENTRIES], pl.INT32],
    slot_mapping: pl.Tensor[[T], pl.INT32],
    rope_cos: pl.Tensor[[POSITIONS, HEAD_DIM], pl.FP32],
    rope_sin: pl.Tensor[[POSITIONS, HEAD_DIM], pl.FP32],
    input_norm: pl.Tensor[[1, HIDDEN], pl.FP32],
    wq: pl.Tensor[[HIDDEN, Q_DIM], pl.BF16],
    wk: pl.Tensor[[HIDDEN, KV_DIM], pl.BF16],
    wv: pl.Tensor[[HIDDEN, KV_DIM], pl.BF16],
    q_norm: pl.Tensor[[1, HEAD_DIM], pl.FP32],
    k_norm: pl.Tensor[[1, HEAD_DIM], pl.FP32],
    wo: pl.Tensor[[Q_DIM, HIDDEN], pl.BF16],
    post_norm: pl.Tensor[[1, HIDDEN], pl.FP32],
    w_gate: pl.Tensor[[HIDDEN, INTERMEDIATE], pl.BF16],
    w_up: pl.Tensor[[HIDDEN, INTERMEDIATE], pl.BF16],
    w_down: pl.Tensor[[INTERMEDIATE, HIDDEN], pl.BF16],
    k_cache: pl.InOut[pl.Tensor[[CACHE_ROWS, HEAD_DIM], pl.BF16]],
    v_cache: pl.InOut[pl.Tensor[[CACHE_ROWS, HEAD_DIM], pl.BF16]],
    out: pl.Out[pl.Tensor[[T, HIDDEN], pl.BF16]],
):
    out = prefill_tokens(
        hidden, context_lens, query_starts, query_lens, block_table, slot_mapping, rope_cos,
        rope_sin, input_norm, wq, wk, wv, q_norm, k_norm, wo, post_norm, w_gate, w_up,
        w_down, k_cache, v_cache, out,
    )  # fmt: skip
    return out
