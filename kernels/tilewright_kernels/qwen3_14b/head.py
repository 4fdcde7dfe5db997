"""The final RMSNorm and the LM head, over the rows whose logits are wanted."""

import pypto.language as pl

from .blocks import rms_norm, widen_rows
from .constants import HIDDEN, K_TILE, ROWS, VOCAB_TILE

L = pl.dynamic("L")
VOCAB = pl.dynamic("VOCAB")


@pl.jit.inline
def score_rows(
    x: pl.Tensor[[ROWS, HIDDEN], pl.FP32],
    final_norm: pl.Tensor[[1, HIDDEN], pl.FP32],
    lm_head: pl.Tensor[[VOCAB, HIDDEN], pl.BF16],
    logits: pl.Tensor[[L, VOCAB], pl.FP32],
    row: pl.Scalar[pl.INDEX],
    count: pl.Scalar[pl.INDEX],
):
    """logits' rows row to row + count, FP32 = those of the first rows of x[ROWS, HIDDEN] FP32."""
    vocab = pl.tensor.dim(lm_head, 0)
    normed = pl.create_tensor([ROWS, HIDDEN], dtype=pl.BF16)
    normed = rms_norm(x, final_norm, normed)
    for c in pl.parallel(0, vocab, VOCAB_TILE):
        width = pl.min(VOCAB_TILE, vocab - c)
        scores = pl.create_tensor([ROWS, VOCAB_TILE], dtype=pl.FP32)
        with pl.at(level=pl.Level.CORE_GROUP, name_hint="head"):
            acc = pl.matmul(
                normed[0:ROWS, 0:K_TILE],
                pl.slice(lm_head, [VOCAB_TILE, K_TILE], [c, 0], valid_shape=[width, K_TILE]),
                b_trans=True,
                out_dtype=pl.FP32,
            )
            for k in pl.range(K_TILE, HIDDEN, K_TILE):
                acc = pl.matmul_acc(
                    acc,
                    normed[0:ROWS, k : k + K_TILE],
                    pl.slice(lm_head, [VOCAB_TILE, K_TILE], [c, k], valid_shape=[width, K_TILE]),
                    b_trans=True,
                )
            scores[0:ROWS, 0:VOCAB_TILE] = acc
        with pl.at(level=pl.Level.CORE_GROUP, name_hint="logits"):
            part = pl.slice(scores, [ROWS, VOCAB_TILE], [0, 0], valid_shape=[count, width])
            logits = pl.assemble(logits, part, [row, c])
    return logits


@pl.jit
def head(
    hidden: pl.Tensor[[L, HIDDEN], pl.BF16],
    final_norm: pl.Tensor[[1, HIDDEN], pl.FP32],
    lm_head: pl.Tensor[[VOCAB, HIDDEN], pl.BF16],
    logits: pl.Out[pl.Tensor[[L, VOCAB], pl.FP32]],
):
    rows = pl.tensor.dim(hidden, 0)
    for row in pl.range(0, rows, ROWS):
        count = pl.min(ROWS, rows - row)
        x = pl.create_tensor([ROWS, HIDDEN], dtype=pl.FP32)
        x = widen_rows(hidden, row, count, x)
        logits = score_rows(x, final_norm, lm_head, logits, row, count)
    return logits
