"""A kernel of the operators and loops that the kernels of tilewright_kernels do not use."""

import pypto.language as pl


@pl.jit
def operators(
    a: pl.Tensor[[16, 64], pl.FP32],
    b: pl.Tensor[[16, 64], pl.FP32],
    y: pl.Out[pl.Tensor[[192, 64], pl.FP32]],
):
    with pl.at(level=pl.Level.CORE_GROUP, name_hint="minimum"):
        y[0:16, 0:64] = pl.abs(pl.minimum(pl.minimum(a, b), 1.0))
    with pl.at(level=pl.Level.CORE_GROUP, name_hint="absolute"):
        y[16:32, 0:64] = pl.maximum(pl.abs(pl.sub(b, 1.25)), 0.25)
    with pl.at(level=pl.Level.CORE_GROUP, name_hint="logarithm"):
        y[32:48, 0:64] = pl.add(pl.mul(pl.log(a), pl.rsqrt(a)), pl.recip(b))
    with pl.at(level=pl.Level.CORE_GROUP, name_hint="row_add"):
        added = pl.row_expand_add(a, pl.row_sum(b))
        y[48:64, 0:64] = pl.row_expand_max(added, pl.row_min(b))
    with pl.at(level=pl.Level.CORE_GROUP, name_hint="row_min"):
        y[64:80, 0:64] = pl.row_expand_min(a, pl.row_max(b))
    with pl.at(level=pl.Level.CORE_GROUP, name_hint="difference"):
        y[80:96, 0:64] = pl.row_expand_expdif(a, pl.row_max(a))
    with pl.at(level=pl.Level.CORE_GROUP, name_hint="column"):
        less = pl.col_expand_sub(pl.col_expand_add(a, pl.col_sum(b)), pl.col_max(b))
        y[96:112, 0:64] = pl.col_expand_div(less, pl.col_min(b))
    with pl.at(level=pl.Level.CORE_GROUP, name_hint="column_min"):
        y[112:128, 0:64] = pl.col_expand_min(pl.col_expand_max(a, b[0:1, 0:64]), b[1:2, 0:64])
    with pl.at(level=pl.Level.CORE_GROUP, name_hint="concat"):
        y[128:144, 0:64] = pl.concat(a[0:16, 0:32], b[0:16, 32:64])
    with pl.at(level=pl.Level.CORE_GROUP, name_hint="transpose"):
        y[144:160, 0:64] = pl.reshape(pl.transpose(a[0:16, 0:64], 0, 1), [16, 64])
    with pl.at(level=pl.Level.CORE_GROUP, name_hint="pipeline"):
        total = pl.full([1, 16], dtype=pl.FP32, value=0.0)
        for c in pl.pipeline(0, 64, 16, stage=2):
            total = pl.add(total, pl.reshape(pl.row_sum(b[0:16, c : c + 16]), [1, 16]))
        column = pl.reshape(total, [16, 1])
        for c in pl.pipeline(0, 64, 16, stage=2):
            y[160:176, c : c + 16] = pl.row_expand_add(a[0:16, c : c + 16], column)
    for c in pl.unroll(0, 64, 32):
        with pl.at(level=pl.Level.CORE_GROUP, name_hint="unroll"):
            for d in pl.unroll(2):
                y[176:192, c + d * 16 : c + d * 16 + 16] = pl.add(
                    a[0:16, c + d * 16 : c + d * 16 + 16], b[0:16, c + d * 16 : c + d * 16 + 16]
                )
    return y
