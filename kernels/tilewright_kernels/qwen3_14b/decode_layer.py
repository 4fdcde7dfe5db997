"""One decoder layer for decode: one new token of each of several sequences."""

import pypto.language as pl

from .blocks import (
    attend_token,
    finish_layer,
    level_band,
    pad_tile,
    project_heads,
    rotate_heads,
    round_rows,
    widen_rows,
    write_cache,
)
from .constants import HEAD_DIM, HEADS, HIDDEN, INTERMEDIATE, KV_HEADS, KV_TILE, Q_ROWS, ROWS

Q_DIM = HEADS * HEAD_DIM
KV_DIM = KV_HEADS * HEAD_DIM
BAND = Q_ROWS + 2 * KV_TILE
# The queries of one KV head are read as Q_ROWS rows. Rows past its own heads only fill the tile, so
# as many rows must follow those of the last token.
SPARE = (Q_ROWS + HEADS - 1) // HEADS
QUERY_ROWS = ROWS + SPARE
QUERY_HEADS = QUERY_ROWS * HEADS
ROW_HEADS = ROWS * HEADS

T = pl.dynamic("T")
B = pl.dynamic("B")
ENTRIES = pl.dynamic("ENTRIES")
POSITIONS = pl.dynamic("POSITIONS")
CACHE_ROWS = pl.dynamic("CACHE_ROWS")

KV_ROW_ORDER = "HND"


@pl.jit.inline
def decode_tokens(
    hidden: pl.Tensor[[T, HIDDEN], pl.BF16],
    context_lens: pl.Tensor[[B], pl.INT32],
    block_table: pl.Tensor[[ENTRIES], pl.INT32],
    slot_mapping: pl.Tensor[[B], pl.INT32],
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
    band = level_band(band)

    for row in pl.range(0, batch, ROWS):
        count = pl.min(ROWS, batch - row)
        x = pl.create_tensor([ROWS, HIDDEN], dtype=pl.FP32)
        x = widen_rows(hidden, row, count, x)
        q = pl.create_tensor([ROWS, Q_DIM], dtype=pl.FP32)
        k = pl.create_tensor([ROWS, KV_DIM], dtype=pl.FP32)
        v = pl.create_tensor([ROWS, KV_DIM], dtype=pl.FP32)
        q, k, v = project_heads(x, input_norm, wq, wk, wv, q, k, v)

        cos = pl.create_tensor([ROWS, HEAD_DIM], dtype=pl.FP32)
        sin = pl.create_tensor([ROWS, HEAD_DIM], dtype=pl.FP32)
        queries = pl.create_tensor([QUERY_ROWS, Q_DIM], dtype=pl.BF16)
        attended_heads = pl.create_tensor([ROW_HEADS, HEAD_DIM], dtype=pl.BF16)
        with pl.at(level=pl.Level.CORE_GROUP, name_hint="positions"):
            for token in pl.range(count):
                position = pl.cast(pl.read(context_lens, [row + token]), pl.INDEX) - 1
                cos[token : token + 1, 0:HEAD_DIM] = rope_cos[position : position + 1, 0:HEAD_DIM]
                sin[token : token + 1, 0:HEAD_DIM] = rope_sin[position : position + 1, 0:HEAD_DIM]
        queries = pad_tile(count, cos, sin, attended_heads, queries)
        queries = rotate_heads(q, q_norm, cos, sin, queries, 0)
        keys = pl.create_tensor([ROWS, KV_DIM], dtype=pl.BF16)
        keys = rotate_heads(k, k_norm, cos, sin, keys, 0)
        values = pl.create_tensor([ROWS, KV_DIM], dtype=pl.BF16)
        values = round_rows(v, values)
        k_cache = write_cache(keys, slot_mapping, row, count, k_cache)
        v_cache = write_cache(values, slot_mapping, row, count, v_cache)

        query_heads = pl.reshape(queries, [QUERY_HEADS, HEAD_DIM])
        for token in pl.parallel(count):
            context = pl.cast(pl.read(context_lens, [row + token]), pl.INDEX)
            table_row = (row + token) * table_stride
            attended_heads = attend_token(
                query_heads, token, context,
                block_table, table_row, k_cache, v_cache, band, attended_heads,
            )  # fmt: skip
        attended = pl.reshape(attended_heads, [ROWS, Q_DIM])
        out = finish_layer(x, attended, wo, post_norm, w_gate, w_up, w_down, out, row, count)
    return out


@pl.jit
def decode_layer(
    hidden: pl.Tensor[[B, HIDDEN], pl.BF16],
    context_lens: pl.Tensor[[B], pl.INT32],
    block_table: pl.Tensor[[ENTRIES], pl.INT32],
    slot_mapping: pl.Tensor[[B], pl.INT32],
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
    out: pl.Out[pl.Tensor[[B, HIDDEN], pl.BF16]],
):
    out = decode_tokens(
        hidden, context_lens, block_table, slot_mapping, rope_cos, rope_sin, input_norm, wq,
        wk, wv, q_norm, k_norm, wo, post_norm, w_gate, w_up, w_down, k_cache, v_cache, out,
    )  # fmt: skip
    return out
