"""A whole model for decode: one new token of each of several sequences, all layers and the head.

Weights and caches are those of all layers, one layer after another. Hidden states alternate between
the two halves of one tensor, since a task must not write what an earlier one may still be reading.
"""

import pypto.language as pl

from .blocks import copy_rows, gather_rows
from .constants import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    INTERMEDIATE,
    KV_HEADS,
    LAYERS,
    ROWS,
    STATE_ROWS,
)
from .decode_layer import decode_stacked
from .head import score_rows

Q_DIM = HEADS * HEAD_DIM
KV_DIM = KV_HEADS * HEAD_DIM
ALL_HIDDEN = LAYERS * HIDDEN
ALL_Q_DIM = LAYERS * Q_DIM
ALL_INTERMEDIATE = LAYERS * INTERMEDIATE
BOTH = 2 * STATE_ROWS

B = pl.dynamic("B")
L = pl.dynamic("L")
ENTRIES = pl.dynamic("ENTRIES")
POSITIONS = pl.dynamic("POSITIONS")
CACHE_ROWS = pl.dynamic("CACHE_ROWS")
VOCAB = pl.dynamic("VOCAB")

KV_ROW_ORDER = "HND"


@pl.jit
def decode_model(
    hidden: pl.Tensor[[B, HIDDEN], pl.BF16],
    context_lens: pl.Tensor[[B], pl.INT32],
    block_table: pl.Tensor[[ENTRIES], pl.INT32],
    slot_mapping: pl.Tensor[[B], pl.INT32],
    logits_rows: pl.Tensor[[L], pl.INT32],
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
    final_norm: pl.Tensor[[1, HIDDEN], pl.FP32],
    lm_head: pl.Tensor[[VOCAB, HIDDEN], pl.BF16],
    k_cache: pl.InOut[pl.Tensor[[CACHE_ROWS, HEAD_DIM], pl.BF16]],
    v_cache: pl.InOut[pl.Tensor[[CACHE_ROWS, HEAD_DIM], pl.BF16]],
    logits: pl.Out[pl.Tensor[[L, VOCAB], pl.FP32]],
):
    batch = pl.tensor.dim(context_lens, 0)
    states = pl.create_tensor([BOTH, HIDDEN], dtype=pl.BF16)
    for row in pl.range(0, batch, ROWS):
        rows = pl.min(ROWS, batch - row)
        states = copy_rows(hidden, states, row, rows)
    for layer in pl.range(LAYERS):
        source = layer % 2 * STATE_ROWS
        target = STATE_ROWS - source
        x = states[source : source + STATE_ROWS, 0:HIDDEN]
        y = states[target : target + STATE_ROWS, 0:HIDDEN]
        y = decode_stacked(
            layer, x, context_lens, block_table, slot_mapping, rope_cos, rope_sin, input_norm, wq,
            wk, wv, q_norm, k_norm, wo, post_norm, w_gate, w_up, w_down, k_cache, v_cache, y,
        )  # fmt: skip
    last = LAYERS % 2 * STATE_ROWS
    final = states[last : last + STATE_ROWS, 0:HIDDEN]
    count = pl.tensor.dim(logits_rows, 0)
    for row in pl.range(0, count, ROWS):
        rows = pl.min(ROWS, count - row)
        wanted = pl.create_tensor([ROWS, HIDDEN], dtype=pl.FP32)
        wanted = gather_rows(final, logits_rows, row, rows, wanted)
        logits = score_rows(wanted, final_norm, lm_head, logits, row, rows)
    return logits
