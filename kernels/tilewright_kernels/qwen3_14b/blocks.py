"""Functions that the kernels of this package share. PyPTO inlines them into their callers.

Source for PyPTO's parser, loaded by ``source.load``. Matrix products and vector code run in
separate tasks and exchange data through scratch in device memory. A tile's rows past its tokens
hold zeros, never stale values.

PyPTO takes the sizes of a function's parameters from its first call, so sizes that differ between
calls are declared dynamic. Weights are not: PyPTO would make the kernel's own parameter dynamic
too, and the contract would lose its sizes.
"""

import pypto.language as pl

from .constants import (
    EPS,
    HEAD_DIM,
    HIDDEN,
    INTERMEDIATE,
    K_TILE,
    KV_HEADS,
    KV_TILE,
    N_TILE,
    PAGE,
    Q_ROWS,
    ROWS,
    SCALE,
    VEC_TILE,
)

HALF = HEAD_DIM // 2
BAND = Q_ROWS + 2 * KV_TILE
KV_DIM = KV_HEADS * HEAD_DIM
TAIL = KV_HEADS * KV_TILE
INV_HIDDEN = 1.0 / HIDDEN
INV_HEAD_DIM = 1.0 / HEAD_DIM

T = pl.dynamic("T")
DEPTH = pl.dynamic("DEPTH")
COLUMNS = pl.dynamic("COLUMNS")
ENTRIES = pl.dynamic("ENTRIES")
CACHE_ROWS = pl.dynamic("CACHE_ROWS")


@pl.jit.inline
def widen_rows(
    source: pl.Tensor[[T, HIDDEN], pl.BF16],
    row: pl.Scalar[pl.INDEX],
    count: pl.Scalar[pl.INDEX],
    x: pl.Tensor[[ROWS, HIDDEN], pl.FP32],
):
    """x[ROWS, HIDDEN] FP32 = source's rows row to row + count, BF16, then zeros."""
    with pl.at(level=pl.Level.CORE_GROUP, name_hint="widen"):
        for c in pl.range(0, HIDDEN, VEC_TILE):
            part = pl.slice(source, [ROWS, VEC_TILE], [row, c], valid_shape=[count, VEC_TILE])
            padded = pl.fillpad(part, pad_value=pl.PadValue.zero)
            x[0:ROWS, c : c + VEC_TILE] = pl.cast(padded, pl.FP32, mode="rint")
    return x


@pl.jit.inline
def rms_norm(
    x: pl.Tensor[[ROWS, HIDDEN], pl.FP32],
    weight: pl.Tensor[[1, HIDDEN], pl.FP32],
    y: pl.Tensor[[ROWS, HIDDEN], pl.BF16],
):
    """y[ROWS, HIDDEN] BF16 = RMSNorm of x FP32 (arXiv:1910.07467), rounded once."""
    with pl.at(level=pl.Level.CORE_GROUP, name_hint="rms_norm"):
        squares = pl.full([1, ROWS], dtype=pl.FP32, value=0.0)
        for c in pl.range(0, HIDDEN, VEC_TILE):
            part = x[0:ROWS, c : c + VEC_TILE]
            squares = pl.add(squares, pl.reshape(pl.row_sum(pl.mul(part, part)), [1, ROWS]))
        root = pl.reshape(pl.sqrt(pl.add(pl.mul(squares, INV_HIDDEN), EPS)), [ROWS, 1])
        for c in pl.range(0, HIDDEN, VEC_TILE):
            normed = pl.row_expand_div(x[0:ROWS, c : c + VEC_TILE], root)
            scaled = pl.col_expand_mul(normed, weight[0:1, c : c + VEC_TILE])
            y[0:ROWS, c : c + VEC_TILE] = pl.cast(scaled, pl.BF16, mode="rint")
    return y


@pl.jit.inline
def project(
    a: pl.Tensor[[ROWS, DEPTH], pl.BF16],
    weight: pl.Tensor,
    y: pl.Tensor[[ROWS, COLUMNS], pl.FP32],
    depth: pl.Scalar[pl.INDEX],
    columns: pl.Scalar[pl.INDEX],
):
    """y[ROWS, columns] FP32 = a[ROWS, depth] BF16 times weight[depth, columns] BF16."""
    for c in pl.parallel(0, columns, N_TILE):
        with pl.at(level=pl.Level.CORE_GROUP, name_hint="project"):
            acc = pl.matmul(
                a[0:ROWS, 0:K_TILE], weight[0:K_TILE, c : c + N_TILE], out_dtype=pl.FP32
            )
            for k in pl.range(K_TILE, depth, K_TILE):
                acc = pl.matmul_acc(
                    acc, a[0:ROWS, k : k + K_TILE], weight[k : k + K_TILE, c : c + N_TILE]
                )
            y[0:ROWS, c : c + N_TILE] = acc
    return y


@pl.jit.inline
def round_rows(x: pl.Tensor[[ROWS, KV_DIM], pl.FP32], y: pl.Tensor[[ROWS, KV_DIM], pl.BF16]):
    """y BF16 = x FP32."""
    with pl.at(level=pl.Level.CORE_GROUP, name_hint="round"):
        for c in pl.range(0, KV_DIM, VEC_TILE):
            y[0:ROWS, c : c + VEC_TILE] = pl.cast(x[0:ROWS, c : c + VEC_TILE], pl.BF16, mode="rint")
    return y


@pl.jit.inline
def add_rows(x: pl.Tensor[[ROWS, HIDDEN], pl.FP32], y: pl.Tensor[[ROWS, HIDDEN], pl.FP32]):
    """x = x + y, both [ROWS, HIDDEN] FP32."""
    with pl.at(level=pl.Level.CORE_GROUP, name_hint="residual"):
        for c in pl.range(0, HIDDEN, VEC_TILE):
            x[0:ROWS, c : c + VEC_TILE] = pl.add(
                x[0:ROWS, c : c + VEC_TILE], y[0:ROWS, c : c + VEC_TILE]
            )
    return x


@pl.jit.inline
def rotate_heads(
    x: pl.Tensor[[ROWS, COLUMNS], pl.FP32],
    weight: pl.Tensor[[1, HEAD_DIM], pl.FP32],
    cos: pl.Tensor[[ROWS, HEAD_DIM], pl.FP32],
    sin: pl.Tensor[[ROWS, HEAD_DIM], pl.FP32],
    y: pl.Tensor[[T, COLUMNS], pl.BF16],
    row: pl.Scalar[pl.INDEX],
):
    """RMSNorm of each head of x[ROWS, heads * HEAD_DIM] FP32, then RoPE (arXiv:2104.09864).

    The result goes to y's rows from row on, BF16. cos and sin are [ROWS, HEAD_DIM] FP32, one row
    per token. The two halves of a head are rotated together, as in Hugging Face checkpoints.
    """
    columns = pl.tensor.dim(x, 1)
    for c in pl.parallel(0, columns, HEAD_DIM):
        with pl.at(level=pl.Level.CORE_GROUP, name_hint="rotate"):
            low = x[0:ROWS, c : c + HALF]
            high = x[0:ROWS, c + HALF : c + HEAD_DIM]
            low_squares = pl.reshape(pl.row_sum(pl.mul(low, low)), [1, ROWS])
            high_squares = pl.reshape(pl.row_sum(pl.mul(high, high)), [1, ROWS])
            mean = pl.mul(pl.add(low_squares, high_squares), INV_HEAD_DIM)
            root = pl.reshape(pl.sqrt(pl.add(mean, EPS)), [ROWS, 1])
            low_n = pl.col_expand_mul(pl.row_expand_div(low, root), weight[0:1, 0:HALF])
            high_n = pl.col_expand_mul(pl.row_expand_div(high, root), weight[0:1, HALF:HEAD_DIM])
            low_r = pl.sub(pl.mul(low_n, cos[0:ROWS, 0:HALF]), pl.mul(high_n, sin[0:ROWS, 0:HALF]))
            high_r = pl.add(
                pl.mul(high_n, cos[0:ROWS, HALF:HEAD_DIM]),
                pl.mul(low_n, sin[0:ROWS, HALF:HEAD_DIM]),
            )
            y[row : row + ROWS, c : c + HALF] = pl.cast(low_r, pl.BF16, mode="rint")
            y[row : row + ROWS, c + HALF : c + HEAD_DIM] = pl.cast(high_r, pl.BF16, mode="rint")
    return y


@pl.jit.inline
def write_cache(
    x: pl.Tensor[[ROWS, KV_DIM], pl.BF16],
    slot_mapping: pl.Tensor[[T], pl.INT32],
    row: pl.Scalar[pl.INDEX],
    count: pl.Scalar[pl.INDEX],
    cache: pl.Tensor[[CACHE_ROWS, HEAD_DIM], pl.BF16],
):
    """Write the first count tokens of x[ROWS, KV_HEADS * HEAD_DIM] BF16 to their slots' rows."""
    with pl.at(level=pl.Level.CORE_GROUP, name_hint="write_cache"):
        for token in pl.range(count):
            slot = pl.cast(pl.read(slot_mapping, [row + token]), pl.INDEX)
            page = slot // PAGE
            offset = slot - page * PAGE
            for g in pl.range(KV_HEADS):
                at = (page * KV_HEADS + g) * PAGE + offset
                cache[at : at + 1, 0:HEAD_DIM] = x[
                    token : token + 1, g * HEAD_DIM : g * HEAD_DIM + HEAD_DIM
                ]
    return cache


@pl.jit.inline
def copy_last_tile(
    cache: pl.Tensor[[CACHE_ROWS, HEAD_DIM], pl.BF16],
    block_table: pl.Tensor[[ENTRIES], pl.INT32],
    table_row: pl.Scalar[pl.INDEX],
    context: pl.Scalar[pl.INDEX],
    tail: pl.Tensor[[TAIL, HEAD_DIM], pl.BF16],
):
    """tail[KV_HEADS * KV_TILE, HEAD_DIM] = the sequence's last tile of the cache, then zeros.

    Slots that the sequence has not reached may hold anything, NaN included, which a probability of
    zero would not cancel in a product; so the one tile that has such slots is read from tail.
    """
    last = (context - 1) // KV_TILE
    count = context - last * KV_TILE
    page = pl.cast(pl.read(block_table, [table_row + last * KV_TILE // PAGE]), pl.INDEX)
    offset = last * KV_TILE % PAGE
    with pl.at(level=pl.Level.CORE_GROUP, name_hint="last_tile"):
        for g in pl.range(KV_HEADS):
            at = (page * KV_HEADS + g) * PAGE + offset
            part = pl.slice(cache, [KV_TILE, HEAD_DIM], [at, 0], valid_shape=[count, HEAD_DIM])
            tail[g * KV_TILE : g * KV_TILE + KV_TILE, 0:HEAD_DIM] = pl.fillpad(
                part, pad_value=pl.PadValue.zero
            )
    return tail


@pl.jit.inline
def attend_tile(
    q: pl.Tensor[[T, COLUMNS], pl.BF16],
    q_row: pl.Scalar[pl.INDEX],
    q_column: pl.Scalar[pl.INDEX],
    keys: pl.Tensor[[CACHE_ROWS, HEAD_DIM], pl.BF16],
    values: pl.Tensor[[CACHE_ROWS, HEAD_DIM], pl.BF16],
    kv_row: pl.Scalar[pl.INDEX],
    band: pl.Tensor[[Q_ROWS, BAND], pl.FP32],
    band_column: pl.Scalar[pl.INDEX],
    stats: pl.Tensor[[2, Q_ROWS], pl.FP32],
    o: pl.Tensor[[Q_ROWS, HEAD_DIM], pl.FP32],
):
    """One step of the online softmax (arXiv:1805.02867): Q_ROWS queries over KV_TILE keys.

    stats[2, Q_ROWS] FP32 holds each query's maximum and its sum, o[Q_ROWS, HEAD_DIM] FP32 the
    weighted values so far. Probabilities are rounded to BF16 for the product, and the sum is taken
    of the rounded ones. The scale of o has its own memory: the next step may write to stats before
    this one has scaled o, because PyPTO orders no task after those that only read.
    """
    scores = pl.create_tensor([Q_ROWS, KV_TILE], dtype=pl.FP32)
    with pl.at(level=pl.Level.CORE_GROUP, name_hint="scores"):
        scores[0:Q_ROWS, 0:KV_TILE] = pl.matmul(
            q[q_row : q_row + Q_ROWS, q_column : q_column + HEAD_DIM],
            keys[kv_row : kv_row + KV_TILE, 0:HEAD_DIM],
            b_trans=True,
            out_dtype=pl.FP32,
        )
    probabilities = pl.create_tensor([Q_ROWS, KV_TILE], dtype=pl.BF16)
    scale = pl.create_tensor([1, Q_ROWS], dtype=pl.FP32)
    with pl.at(level=pl.Level.CORE_GROUP, name_hint="softmax"):
        masked = pl.add(
            pl.mul(scores[0:Q_ROWS, 0:KV_TILE], SCALE),
            band[0:Q_ROWS, band_column : band_column + KV_TILE],
        )
        before = stats[0:1, 0:Q_ROWS]
        highest = pl.maximum(before, pl.reshape(pl.row_max(masked), [1, Q_ROWS]))
        powers = pl.exp(pl.row_expand_sub(masked, pl.reshape(highest, [Q_ROWS, 1])))
        rounded = pl.cast(powers, pl.BF16, mode="rint")
        total = pl.reshape(pl.row_sum(pl.cast(rounded, pl.FP32, mode="rint")), [1, Q_ROWS])
        decay = pl.exp(pl.sub(before, highest))
        total = pl.add(pl.mul(decay, stats[1:2, 0:Q_ROWS]), total)
        probabilities[0:Q_ROWS, 0:KV_TILE] = rounded
        stats[0:1, 0:Q_ROWS] = highest
        stats[1:2, 0:Q_ROWS] = total
        scale[0:1, 0:Q_ROWS] = decay
    weighted = pl.create_tensor([Q_ROWS, HEAD_DIM], dtype=pl.FP32)
    with pl.at(level=pl.Level.CORE_GROUP, name_hint="weighted"):
        weighted[0:Q_ROWS, 0:HEAD_DIM] = pl.matmul(
            probabilities[0:Q_ROWS, 0:KV_TILE],
            values[kv_row : kv_row + KV_TILE, 0:HEAD_DIM],
            out_dtype=pl.FP32,
        )
    with pl.at(level=pl.Level.CORE_GROUP, name_hint="rescale"):
        column = pl.reshape(scale[0:1, 0:Q_ROWS], [Q_ROWS, 1])
        o[0:Q_ROWS, 0:HEAD_DIM] = pl.add(
            pl.row_expand_mul(o[0:Q_ROWS, 0:HEAD_DIM], column),
            weighted[0:Q_ROWS, 0:HEAD_DIM],
        )
    return o


@pl.jit.inline
def attend(
    q: pl.Tensor[[T, COLUMNS], pl.BF16],
    q_row: pl.Scalar[pl.INDEX],
    q_column: pl.Scalar[pl.INDEX],
    kv_head: pl.Scalar[pl.INDEX],
    position: pl.Scalar[pl.INDEX],
    context: pl.Scalar[pl.INDEX],
    block_table: pl.Tensor[[ENTRIES], pl.INT32],
    table_row: pl.Scalar[pl.INDEX],
    k_cache: pl.Tensor[[CACHE_ROWS, HEAD_DIM], pl.BF16],
    v_cache: pl.Tensor[[CACHE_ROWS, HEAD_DIM], pl.BF16],
    k_tail: pl.Tensor[[TAIL, HEAD_DIM], pl.BF16],
    v_tail: pl.Tensor[[TAIL, HEAD_DIM], pl.BF16],
    band: pl.Tensor[[Q_ROWS, BAND], pl.FP32],
    stats: pl.Tensor[[2, Q_ROWS], pl.FP32],
    o: pl.Tensor[[Q_ROWS, HEAD_DIM], pl.FP32],
):
    """o[Q_ROWS, HEAD_DIM] FP32 = attention of the queries over the sequence's first context keys.

    position: position of the first query, for the causal mask. In ``band``, zeros reach KV_TILE
    columns past the diagonal, so a tile's mask starts at a column that depends on positions only.
    """
    with pl.at(level=pl.Level.CORE_GROUP, name_hint="attend_init"):
        stats[0:1, 0:Q_ROWS] = pl.full([1, Q_ROWS], dtype=pl.FP32, value=-1e30)
        stats[1:2, 0:Q_ROWS] = pl.full([1, Q_ROWS], dtype=pl.FP32, value=0.0)
        o[0:Q_ROWS, 0:HEAD_DIM] = pl.full([Q_ROWS, HEAD_DIM], dtype=pl.FP32, value=0.0)
    last = (context - 1) // KV_TILE
    for tile in pl.range(last):
        first = tile * KV_TILE
        page = pl.cast(pl.read(block_table, [table_row + first // PAGE]), pl.INDEX)
        kv_row = (page * KV_HEADS + kv_head) * PAGE + first % PAGE
        column = pl.max(0, first - position + KV_TILE)
        o = attend_tile(q, q_row, q_column, k_cache, v_cache, kv_row, band, column, stats, o)
    tail_row = kv_head * KV_TILE
    tail_column = pl.max(0, last * KV_TILE - position + KV_TILE)
    o = attend_tile(q, q_row, q_column, k_tail, v_tail, tail_row, band, tail_column, stats, o)
    with pl.at(level=pl.Level.CORE_GROUP, name_hint="normalise"):
        total = pl.reshape(stats[1:2, 0:Q_ROWS], [Q_ROWS, 1])
        o[0:Q_ROWS, 0:HEAD_DIM] = pl.row_expand_div(o[0:Q_ROWS, 0:HEAD_DIM], total)
    return o


@pl.jit.inline
def feed_forward(
    x: pl.Tensor[[ROWS, HIDDEN], pl.FP32],
    norm: pl.Tensor[[1, HIDDEN], pl.FP32],
    w_gate: pl.Tensor[[HIDDEN, INTERMEDIATE], pl.BF16],
    w_up: pl.Tensor[[HIDDEN, INTERMEDIATE], pl.BF16],
    w_down: pl.Tensor[[INTERMEDIATE, HIDDEN], pl.BF16],
):
    """x[ROWS, HIDDEN] FP32 = x + the gated MLP (SwiGLU, arXiv:2002.05202) of its RMSNorm."""
    normed = pl.create_tensor([ROWS, HIDDEN], dtype=pl.BF16)
    normed = rms_norm(x, norm, normed)
    gate = pl.create_tensor([ROWS, INTERMEDIATE], dtype=pl.FP32)
    gate = project(normed, w_gate, gate, HIDDEN, INTERMEDIATE)
    up = pl.create_tensor([ROWS, INTERMEDIATE], dtype=pl.FP32)
    up = project(normed, w_up, up, HIDDEN, INTERMEDIATE)
    activation = pl.create_tensor([ROWS, INTERMEDIATE], dtype=pl.BF16)
    with pl.at(level=pl.Level.CORE_GROUP, name_hint="silu"):
        for c in pl.range(0, INTERMEDIATE, VEC_TILE):
            g = gate[0:ROWS, c : c + VEC_TILE]
            silu = pl.div(g, pl.add(pl.exp(pl.neg(g)), 1.0))
            activation[0:ROWS, c : c + VEC_TILE] = pl.cast(
                pl.mul(silu, up[0:ROWS, c : c + VEC_TILE]), pl.BF16, mode="rint"
            )
    down = pl.create_tensor([ROWS, HIDDEN], dtype=pl.FP32)
    down = project(activation, w_down, down, INTERMEDIATE, HIDDEN)
    x = add_rows(x, down)
    return x


@pl.jit.inline
def store_rows(
    x: pl.Tensor[[ROWS, HIDDEN], pl.FP32],
    out: pl.Tensor[[T, HIDDEN], pl.BF16],
    row: pl.Scalar[pl.INDEX],
    count: pl.Scalar[pl.INDEX],
):
    """out's rows row to row + count, BF16 = the first rows of x[ROWS, HIDDEN] FP32."""
    with pl.at(level=pl.Level.CORE_GROUP, name_hint="store"):
        for c in pl.range(0, HIDDEN, VEC_TILE):
            part = pl.slice(x, [ROWS, VEC_TILE], [0, c], valid_shape=[count, VEC_TILE])
            out = pl.assemble(out, pl.cast(part, pl.BF16, mode="rint"), [row, c])
    return out
