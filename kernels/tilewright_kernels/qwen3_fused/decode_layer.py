"""One decoder layer for decode: one new token of each of several sequences.

Weights and caches are those of all layers, one layer after another. ``decode_model`` runs the same
function for each layer in turn.
"""

import pypto.language as pl

from .constants import HEAD_DIM, HEADS, HIDDEN, INTERMEDIATE, KV_HEADS, LAYERS
from .qwen3_decode_layer import decode_tokens

Q_DIM = HEADS * HEAD_DIM
KV_DIM = KV_HEADS * HEAD_DIM
ALL_HIDDEN = LAYERS * HIDDEN
ALL_Q_DIM = LAYERS * Q_DIM
ALL_INTERMEDIATE = LAYERS * INTERMEDIATE

T = pl.dynamic("T")
B = pl.dynamic("B")
ENTRIES = pl.dynamic("ENTRIES")
POSITIONS = pl.dynamic("POSITIONS")
CACHE_ROWS = pl.dynamic("CACHE_ROWS")

KV_ROW_ORDER = "HND"


@pl.jit.inline
def decode_stacked(
    layer: pl.Scalar[pl.INDEX],
    hidden: pl.Tensor[[T, HIDDEN], pl.BF16],
    context_lens: pl.Tensor[[B], pl.INT32],
    block_table: pl.Tensor[[ENTRIES], pl.INT32],
    slot_mapping: pl.Tensor[[B], pl.INT32],
    rope_cos: pl.Tensor[[POSITIONS, HEAD_DIM], pl.FP32],
    rope_sin: pl.Tensor[[POSITIONS, HEAD_DIM], pl.FP32],
    input_norm: pl.Tensor[[LAYERS, HIDDEN], pl.FP32],
    wq: pl.Tensor[[ALL_HIDDEN, Q_DIM], pl.BF16],
    wk: pl.Tensor[[ALL_HIDDEN, KV_DIM], pl.BF16],
    wv: pl.Tensor[[ALL_HIDDEN, KV_DIM], pl.BF16],
    q_norm: pl.Tensor[[LAYERS, HEAD_DIM], pl.FP32],
    k_norm: pl.Tensor[[LAYERS, HEAD_DIM], pl.FP32],
    wo: pl.Tensor[[ALL_Q_DIM, HIDDEN], pl.BF16],
    post_norm: pl.Tensor[[LAYERS, HIDDEN], pl.FP32],
    w_gate: pl.Tensor[[ALL_HIDDEN, INTERMEDIATE], pl.BF16],
    w_up: pl.Tensor[[ALL_HIDDEN, INTERMEDIATE], pl.BF16],
    w_down: pl.Tensor[[ALL_INTERMEDIATE, HIDDEN], pl.BF16],
    k_cache: pl.Tensor[[CACHE_ROWS, HEAD_DIM], pl.BF16],
    v_cache: pl.Tensor[[CACHE_ROWS, HEAD_DIM], pl.BF16],
    out: pl.Tensor[[T, HIDDEN], pl.BF16],
):
    """Layer number layer: out = f(hidden), both [T, HIDDEN] BF16, and its part of the caches."""
    layer_rows = pl.tensor.dim(k_cache, 0) // LAYERS
    cache_row = layer * layer_rows
    keys = k_cache[cache_row : cache_row + layer_rows, 0:HEAD_DIM]
    values = v_cache[cache_row : cache_row + layer_rows, 0:HEAD_DIM]
    first = layer * HIDDEN
    norm = input_norm[layer : layer + 1, 0:HIDDEN]
    query = wq[first : first + HIDDEN, 0:Q_DIM]
    key = wk[first : first + HIDDEN, 0:KV_DIM]
    value = wv[first : first + HIDDEN, 0:KV_DIM]
    query_norm = q_norm[layer : layer + 1, 0:HEAD_DIM]
    key_norm = k_norm[layer : layer + 1, 0:HEAD_DIM]
    output = wo[layer * Q_DIM : layer * Q_DIM + Q_DIM, 0:HIDDEN]
    other_norm = post_norm[layer : layer + 1, 0:HIDDEN]
    gate = w_gate[first : first + HIDDEN, 0:INTERMEDIATE]
    up = w_up[first : first + HIDDEN, 0:INTERMEDIATE]
    down = w_down[layer * INTERMEDIATE : layer * INTERMEDIATE + INTERMEDIATE, 0:HIDDEN]
    out = decode_tokens(
        hidden, context_lens, block_table, slot_mapping, rope_cos, rope_sin, norm, query, key,
        value, query_norm, key_norm, output, other_norm, gate, up, down, keys, values, out,
    )  # fmt: skip
    return out


@pl.jit
def decode_layer(
    layer: pl.Tensor[[1], pl.INT32],
    hidden: pl.Tensor[[B, HIDDEN], pl.BF16],
    context_lens: pl.Tensor[[B], pl.INT32],
    block_table: pl.Tensor[[ENTRIES], pl.INT32],
    slot_mapping: pl.Tensor[[B], pl.INT32],
    rope_cos: pl.Tensor[[POSITIONS, HEAD_DIM], pl.FP32],
    rope_sin: pl.Tensor[[POSITIONS, HEAD_DIM], pl.FP32],
    input_norm: pl.Tensor[[LAYERS, HIDDEN], pl.FP32],
    wq: pl.Tensor[[ALL_HIDDEN, Q_DIM], pl.BF16],
    wk: pl.Tensor[[ALL_HIDDEN, KV_DIM], pl.BF16],
    wv: pl.Tensor[[ALL_HIDDEN, KV_DIM], pl.BF16],
    q_norm: pl.Tensor[[LAYERS, HEAD_DIM], pl.FP32],
    k_norm: pl.Tensor[[LAYERS, HEAD_DIM], pl.FP32],
    wo: pl.Tensor[[ALL_Q_DIM, HIDDEN], pl.BF16],
    post_norm: pl.Tensor[[LAYERS, HIDDEN], pl.FP32],
    w_gate: pl.Tensor[[ALL_HIDDEN, INTERMEDIATE], pl.BF16],
    w_up: pl.Tensor[[ALL_HIDDEN, INTERMEDIATE], pl.BF16],
    w_down: pl.Tensor[[ALL_INTERMEDIATE, HIDDEN], pl.BF16],
    k_cache: pl.InOut[pl.Tensor[[CACHE_ROWS, HEAD_DIM], pl.BF16]],
    v_cache: pl.InOut[pl.Tensor[[CACHE_ROWS, HEAD_DIM], pl.BF16]],
    out: pl.Out[pl.Tensor[[B, HIDDEN], pl.BF16]],
):
    number = pl.cast(pl.read(layer, [0]), pl.INDEX)
    out = decode_stacked(
        number, hidden, context_lens, block_table, slot_mapping, rope_cos, rope_sin, input_norm, wq,
        wk, wv, q_norm, k_norm, wo, post_norm, w_gate, w_up, w_down, k_cache, v_cache, out,
    )  # fmt: skip
    return out
