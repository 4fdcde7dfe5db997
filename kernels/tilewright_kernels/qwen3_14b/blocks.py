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
    HEADS,
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
    SCRATCH_ROWS,
    VEC_TILE,
)

HALF = HEAD_DIM // 2
BAND = Q_ROWS + 2 * KV_TILE
VISIBLE = KV_TILE + 1
Q_DIM = HEADS * HEAD_DIM
KV_DIM = KV_HEADS * HEAD_DIM
GROUP = HEADS // KV_HEADS
TAIL = KV_HEADS * KV_TILE
# In decode, the queries of one KV head are read as Q_ROWS rows. Rows past its own heads only fill
# the tile, so as many rows must follow those of the last token.
SPARE = (Q_ROWS + HEADS - 1) // HEADS
QUERY_ROWS = ROWS + SPARE
QUERY_HEADS = QUERY_ROWS * HEADS
ROW_HEADS = ROWS * HEADS
INV_HIDDEN = 1.0 / HIDDEN
INV_HEAD_DIM = 1.0 / HEAD_DIM

T = pl.dynamic("T")
L = pl.dynamic("L")
STATES = pl.dynamic("STATES")
DEPTH = pl.dynamic("DEPTH")
COLUMNS = pl.dynamic("COLUMNS")
ENTRIES = pl.dynamic("ENTRIES")
POSITIONS = pl.dynamic("POSITIONS")
CACHE_ROWS = pl.dynamic("CACHE_ROWS")


@pl.jit.inline
def causal_band(band: pl.Tensor[[Q_ROWS, BAND], pl.FP32]):
    """The mask of a tile of tokens: in row i, zeros up to column KV_TILE + i, then -inf."""
    zeros = pl.create_tensor([1, BAND], dtype=pl.FP32)
    with pl.at(level=pl.Level.CORE_GROUP, name_hint="zeros"):
        zeros[0:1, 0:BAND] = pl.full([1, BAND], dtype=pl.FP32, value=0.0)
    with pl.at(level=pl.Level.CORE_GROUP, name_hint="band"):
        for i in pl.range(Q_ROWS):
            visible = i + KV_TILE + 1
            part = pl.slice(zeros, [1, BAND], [0, 0], valid_shape=[1, visible])
            band[i : i + 1, 0:BAND] = pl.fillpad(part, pad_value=pl.PadValue.min)
    return band


@pl.jit.inline
def level_band(band: pl.Tensor[[Q_ROWS, BAND], pl.FP32]):
    """The mask of one token's heads: in every row, zeros up to column KV_TILE, then -inf."""
    zeros = pl.create_tensor([Q_ROWS, BAND], dtype=pl.FP32)
    with pl.at(level=pl.Level.CORE_GROUP, name_hint="zeros"):
        zeros[0:Q_ROWS, 0:BAND] = pl.full([Q_ROWS, BAND], dtype=pl.FP32, value=0.0)
    with pl.at(level=pl.Level.CORE_GROUP, name_hint="band"):
        part = pl.slice(zeros, [Q_ROWS, BAND], [0, 0], valid_shape=[Q_ROWS, VISIBLE])
        band[0:Q_ROWS, 0:BAND] = pl.fillpad(part, pad_value=pl.PadValue.min)
    return band


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
def copy_rows(
    source: pl.Tensor[[T, HIDDEN], pl.BF16],
    target: pl.Tensor[[STATES, HIDDEN], pl.BF16],
    row: pl.Scalar[pl.INDEX],
    count: pl.Scalar[pl.INDEX],
):
    """target's rows row to row + count = source's, both BF16; count is at most ROWS."""
    with pl.at(level=pl.Level.CORE_GROUP, name_hint="copy"):
        for c in pl.range(0, HIDDEN, VEC_TILE):
            part = pl.slice(source, [ROWS, VEC_TILE], [row, c], valid_shape=[count, VEC_TILE])
            target = pl.assemble(target, part, [row, c])
    return target


@pl.jit.inline
def gather_rows(
    source: pl.Tensor[[T, HIDDEN], pl.BF16],
    wanted: pl.Tensor[[L], pl.INT32],
    row: pl.Scalar[pl.INDEX],
    count: pl.Scalar[pl.INDEX],
    x: pl.Tensor[[ROWS, HIDDEN], pl.FP32],
):
    """x[ROWS, HIDDEN] FP32 = the rows of source BF16 that wanted names from row on, then zeros."""
    with pl.at(level=pl.Level.CORE_GROUP, name_hint="gather"):
        for token in pl.range(count):
            index = pl.cast(pl.read(wanted, [row + token]), pl.INDEX)
            for c in pl.range(0, HIDDEN, VEC_TILE):
                x[token : token + 1, c : c + VEC_TILE] = pl.cast(
                    source[index : index + 1, c : c + VEC_TILE], pl.FP32, mode="rint"
                )
        for token in pl.range(count, ROWS):
            for c in pl.range(0, HIDDEN, VEC_TILE):
                x[token : token + 1, c : c + VEC_TILE] = pl.full(
                    [1, VEC_TILE], dtype=pl.FP32, value=0.0
                )
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
def project_heads(
    x: pl.Tensor[[ROWS, HIDDEN], pl.FP32],
    norm: pl.Tensor[[1, HIDDEN], pl.FP32],
    wq: pl.Tensor[[HIDDEN, Q_DIM], pl.BF16],
    wk: pl.Tensor[[HIDDEN, KV_DIM], pl.BF16],
    wv: pl.Tensor[[HIDDEN, KV_DIM], pl.BF16],
    q: pl.Tensor[[ROWS, Q_DIM], pl.FP32],
    k: pl.Tensor[[ROWS, KV_DIM], pl.FP32],
    v: pl.Tensor[[ROWS, KV_DIM], pl.FP32],
):
    """q[ROWS, Q_DIM], k and v[ROWS, KV_DIM] FP32 = projections of the RMSNorm of x FP32."""
    normed = pl.create_tensor([ROWS, HIDDEN], dtype=pl.BF16)
    normed = rms_norm(x, norm, normed)
    q = project(normed, wq, q, HIDDEN, Q_DIM)
    k = project(normed, wk, k, HIDDEN, KV_DIM)
    v = project(normed, wv, v, HIDDEN, KV_DIM)
    return q, k, v


@pl.jit.inline
def rope_rows(
    rope_cos: pl.Tensor[[POSITIONS, HEAD_DIM], pl.FP32],
    rope_sin: pl.Tensor[[POSITIONS, HEAD_DIM], pl.FP32],
    position: pl.Scalar[pl.INDEX],
    count: pl.Scalar[pl.INDEX],
    cos: pl.Tensor[[ROWS, HEAD_DIM], pl.FP32],
    sin: pl.Tensor[[ROWS, HEAD_DIM], pl.FP32],
):
    """cos and sin[ROWS, HEAD_DIM] FP32 = the tables' rows from position on, then zeros."""
    with pl.at(level=pl.Level.CORE_GROUP, name_hint="positions"):
        cos_rows = pl.slice(
            rope_cos, [ROWS, HEAD_DIM], [position, 0], valid_shape=[count, HEAD_DIM]
        )
        cos[0:ROWS, 0:HEAD_DIM] = pl.fillpad(cos_rows, pad_value=pl.PadValue.zero)
        sin_rows = pl.slice(
            rope_sin, [ROWS, HEAD_DIM], [position, 0], valid_shape=[count, HEAD_DIM]
        )
        sin[0:ROWS, 0:HEAD_DIM] = pl.fillpad(sin_rows, pad_value=pl.PadValue.zero)
    return cos, sin


@pl.jit.inline
def pad_tile(
    count: pl.Scalar[pl.INDEX],
    cos: pl.Tensor[[ROWS, HEAD_DIM], pl.FP32],
    sin: pl.Tensor[[ROWS, HEAD_DIM], pl.FP32],
    attended_heads: pl.Tensor[[ROW_HEADS, HEAD_DIM], pl.BF16],
    queries: pl.Tensor[[QUERY_ROWS, Q_DIM], pl.BF16],
):
    """Zeros in what a decode tile's count tokens do not fill.

    These are the rows of cos, sin and attended_heads past count tokens, and the spare rows of
    queries past ROWS.
    """
    with pl.at(level=pl.Level.CORE_GROUP, name_hint="padding"):
        for token in pl.range(count, ROWS):
            none = pl.full([1, HEAD_DIM], dtype=pl.FP32, value=0.0)
            cos[token : token + 1, 0:HEAD_DIM] = none
            sin[token : token + 1, 0:HEAD_DIM] = none
            heads = pl.full([HEADS, HEAD_DIM], dtype=pl.FP32, value=0.0)
            attended_heads[token * HEADS : token * HEADS + HEADS, 0:HEAD_DIM] = pl.cast(
                heads, pl.BF16, mode="rint"
            )
        for c in pl.range(0, Q_DIM, HEAD_DIM):
            spare = pl.full([SPARE, HEAD_DIM], dtype=pl.FP32, value=0.0)
            queries[ROWS:QUERY_ROWS, c : c + HEAD_DIM] = pl.cast(spare, pl.BF16, mode="rint")
    return queries


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
def rotate_unnormed_heads(
    x: pl.Tensor[[ROWS, COLUMNS], pl.FP32],
    cos: pl.Tensor[[ROWS, HEAD_DIM], pl.FP32],
    sin: pl.Tensor[[ROWS, HEAD_DIM], pl.FP32],
    y: pl.Tensor[[T, COLUMNS], pl.BF16],
    row: pl.Scalar[pl.INDEX],
):
    """As ``rotate_heads``, without the RMSNorm: families that have no q and k norm."""
    columns = pl.tensor.dim(x, 1)
    for c in pl.parallel(0, columns, HEAD_DIM):
        with pl.at(level=pl.Level.CORE_GROUP, name_hint="rotate"):
            low = x[0:ROWS, c : c + HALF]
            high = x[0:ROWS, c + HALF : c + HEAD_DIM]
            turned_low = pl.sub(pl.mul(low, cos[0:ROWS, 0:HALF]), pl.mul(high, sin[0:ROWS, 0:HALF]))
            turned_high = pl.add(
                pl.mul(high, cos[0:ROWS, HALF:HEAD_DIM]), pl.mul(low, sin[0:ROWS, HALF:HEAD_DIM])
            )
            y[row : row + ROWS, c : c + HALF] = pl.cast(turned_low, pl.BF16, mode="rint")
            y[row : row + ROWS, c + HALF : c + HEAD_DIM] = pl.cast(
                turned_high, pl.BF16, mode="rint"
            )
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
def attend_rows(
    queries: pl.Tensor[[SCRATCH_ROWS, Q_DIM], pl.BF16],
    query_row: pl.Scalar[pl.INDEX],
    position: pl.Scalar[pl.INDEX],
    context: pl.Scalar[pl.INDEX],
    block_table: pl.Tensor[[ENTRIES], pl.INT32],
    table_row: pl.Scalar[pl.INDEX],
    k_cache: pl.Tensor[[CACHE_ROWS, HEAD_DIM], pl.BF16],
    v_cache: pl.Tensor[[CACHE_ROWS, HEAD_DIM], pl.BF16],
    band: pl.Tensor[[Q_ROWS, BAND], pl.FP32],
    attended: pl.Tensor[[ROWS, Q_DIM], pl.BF16],
):
    """attended[ROWS, Q_DIM] BF16 = attention of ROWS tokens of one sequence, all heads.

    Their queries are rows query_row on; position is that of the first, context the number of keys
    up to the last.
    """
    k_tail = pl.create_tensor([TAIL, HEAD_DIM], dtype=pl.BF16)
    k_tail = copy_last_tile(k_cache, block_table, table_row, context, k_tail)
    v_tail = pl.create_tensor([TAIL, HEAD_DIM], dtype=pl.BF16)
    v_tail = copy_last_tile(v_cache, block_table, table_row, context, v_tail)
    for h in pl.parallel(HEADS):
        kv_head = h // GROUP
        column = h * HEAD_DIM
        stats = pl.create_tensor([2, Q_ROWS], dtype=pl.FP32)
        o = pl.create_tensor([Q_ROWS, HEAD_DIM], dtype=pl.FP32)
        o = attend(
            queries, query_row, column, kv_head, position, context,
            block_table, table_row, k_cache, v_cache, k_tail, v_tail, band, stats, o,
        )  # fmt: skip
        with pl.at(level=pl.Level.CORE_GROUP, name_hint="attended"):
            attended[0:ROWS, column : column + HEAD_DIM] = pl.cast(
                o[0:ROWS, 0:HEAD_DIM], pl.BF16, mode="rint"
            )
    return attended


@pl.jit.inline
def attend_token(
    query_heads: pl.Tensor[[QUERY_HEADS, HEAD_DIM], pl.BF16],
    token: pl.Scalar[pl.INDEX],
    context: pl.Scalar[pl.INDEX],
    block_table: pl.Tensor[[ENTRIES], pl.INT32],
    table_row: pl.Scalar[pl.INDEX],
    k_cache: pl.Tensor[[CACHE_ROWS, HEAD_DIM], pl.BF16],
    v_cache: pl.Tensor[[CACHE_ROWS, HEAD_DIM], pl.BF16],
    band: pl.Tensor[[Q_ROWS, BAND], pl.FP32],
    attended_heads: pl.Tensor[[ROW_HEADS, HEAD_DIM], pl.BF16],
):
    """attended_heads' rows of a token BF16 = its attention over context keys, itself the last.

    Heads are rows, HEADS of them a token, in query_heads[QUERY_HEADS, HEAD_DIM] BF16 too.
    """
    position = context - 1
    k_tail = pl.create_tensor([TAIL, HEAD_DIM], dtype=pl.BF16)
    k_tail = copy_last_tile(k_cache, block_table, table_row, context, k_tail)
    v_tail = pl.create_tensor([TAIL, HEAD_DIM], dtype=pl.BF16)
    v_tail = copy_last_tile(v_cache, block_table, table_row, context, v_tail)
    for g in pl.parallel(KV_HEADS):
        first_head = token * HEADS + g * GROUP
        stats = pl.create_tensor([2, Q_ROWS], dtype=pl.FP32)
        o = pl.create_tensor([Q_ROWS, HEAD_DIM], dtype=pl.FP32)
        o = attend(
            query_heads, first_head, 0, g, position, context,
            block_table, table_row, k_cache, v_cache, k_tail, v_tail, band, stats, o,
        )  # fmt: skip
        with pl.at(level=pl.Level.CORE_GROUP, name_hint="attended"):
            own = pl.slice(o, [Q_ROWS, HEAD_DIM], [0, 0], valid_shape=[GROUP, HEAD_DIM])
            attended_heads = pl.assemble(
                attended_heads, pl.cast(own, pl.BF16, mode="rint"), [first_head, 0]
            )
    return attended_heads


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


@pl.jit.inline
def finish_layer(
    x: pl.Tensor[[ROWS, HIDDEN], pl.FP32],
    attended: pl.Tensor[[ROWS, Q_DIM], pl.BF16],
    wo: pl.Tensor[[Q_DIM, HIDDEN], pl.BF16],
    post_norm: pl.Tensor[[1, HIDDEN], pl.FP32],
    w_gate: pl.Tensor[[HIDDEN, INTERMEDIATE], pl.BF16],
    w_up: pl.Tensor[[HIDDEN, INTERMEDIATE], pl.BF16],
    w_down: pl.Tensor[[INTERMEDIATE, HIDDEN], pl.BF16],
    out: pl.Tensor[[T, HIDDEN], pl.BF16],
    row: pl.Scalar[pl.INDEX],
    count: pl.Scalar[pl.INDEX],
):
    """out's rows row to row + count, BF16 = the layer after attention; x is its input FP32."""
    projected = pl.create_tensor([ROWS, HIDDEN], dtype=pl.FP32)
    projected = project(attended, wo, projected, Q_DIM, HIDDEN)
    x = add_rows(x, projected)
    x = feed_forward(x, post_norm, w_gate, w_up, w_down)
    out = store_rows(x, out, row, count)
    return out
