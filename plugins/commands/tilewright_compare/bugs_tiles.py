"""Known bugs of kernels that work in tiles: of keys, of queries, and of a step's rows."""

from collections.abc import Callable, Iterator
from itertools import pairwise, product

import torch
from attrs import evolve
from torch import Tensor

from tilewright_compare.hypotheses import right_excess
from tilewright_compare.layer import Case, Operations, angles, attend, read_slots, rms_norm

TILES = (16, 32, 64, 128, 256)
ROWS = (8, 16, 32, 64, 128)
"""Tokens or sequences in a tile of rows."""
QUERIES = (1, 16, 64)
"""Queries of a sequence in a tile."""
MOST_HEADS = 16
"""Largest number of KV heads that are left out one at a time."""

Attend = Callable[[Tensor, Tensor], Tensor]


def _key_tiles(case: Case) -> list[int]:
    """Numbers of keys in a tile, if the step has a sequence of more than one."""
    longest = int(case.batch.context_lens.max())
    return sorted(t for t in {*TILES, case.spec.page_size} if t < longest)


def _query_tiles(case: Case) -> list[int | None]:
    """Numbers of queries in a tile that differ in this step; None: all of a sequence's."""
    longest = int(case.batch.query_starts.diff().max())
    return [None, *(t for t in QUERIES if t < longest)]


def _lasts(length: int, tile: int) -> int:
    """The first position of the last tile."""
    return (length - 1) // tile * tile


# --- keys -----------------------------------------------------------------------------------------


def _online(tile: int, forgets: str) -> Attend:
    """Online softmax (arXiv:1805.02867) over tiles of keys, which forgets something."""

    def online(scores: Tensor, values: Tensor) -> Tensor:
        highest = torch.full(scores.shape[:2], -1e30)
        total = torch.zeros_like(highest)
        out = torch.zeros(*scores.shape[:2], values.shape[-1])
        for first in range(0, scores.shape[-1], tile):
            part = scores[..., first : first + tile]
            now = torch.maximum(highest, part.amax(-1))
            powers = (part - now.unsqueeze(-1)).exp()
            decay = (highest - now).exp()
            own = torch.einsum("hqk,khd->hqd", powers, values[first : first + tile])
            scales = {
                "values": (torch.ones_like(decay), decay),
                "sum": (decay, torch.ones_like(decay)),
                "both": (torch.ones_like(decay), torch.ones_like(decay)),
                "older values": (torch.zeros_like(decay), decay),
                "older sum": (decay, torch.zeros_like(decay)),
            }
            of_out, of_total = scales[forgets]
            out = out * of_out.unsqueeze(-1) + own
            total = total * of_total + powers.sum(-1)
            highest = now
        return (out / total.unsqueeze(-1)).transpose(0, 1)

    return online


FORGETS = {
    "values": "weighted values are not rescaled when a tile of {} keys raises the maximum",
    "sum": "the sum of weights is not rescaled when a tile of {} keys raises the maximum",
    "both": "neither sum nor values are rescaled when a tile of {} keys raises the maximum",
    "older values": "the weighted values are those of the last tile of {} keys only",
    "older sum": "the sum of weights is that of the last tile of {} keys only",
}


def _without(tile: int, part: str) -> Attend:
    """Attention without some of the tiles of keys."""

    def without(scores: Tensor, values: Tensor) -> Tensor:
        keys = scores.shape[-1]
        last = _lasts(keys, tile)
        hidden = {
            "all but the last": slice(last),
            "the first": slice(tile if last else 0),
            "the last": slice(last, keys),
            "the one before the last": slice(max(last - tile, 0), last),
        }
        scores = scores.clone()
        scores[..., hidden[part]] = float("-inf")
        return attend(scores, values)

    return without


PARTS = {
    "all but the last": "all tiles of {} keys but the last are left out",
    "the first": "the first tile of {} keys is left out",
    "the last": "the last tile of {} keys is left out",
    "the one before the last": "the tile of {} keys before the last is left out",
}


def softmax_in_tiles(case: Case) -> Iterator[tuple[str, Operations]]:
    """Mistakes of the loop over tiles of keys."""
    if case.layer is None:
        return
    for tile, queries in product(_key_tiles(case), _query_tiles(case)):
        for forgets, what in FORGETS.items():
            yield what.format(tile), Operations(attend=_online(tile, forgets), query_tile=queries)
        for part, what in PARTS.items():
            yield what.format(tile), Operations(attend=_without(tile, part), query_tile=queries)


def ends_of_tiles(case: Case) -> Iterator[tuple[str, Operations]]:
    """What the last tile of keys holds beyond the context, and whether it is masked."""
    if case.layer is None:
        return
    decodes = case.batch.max_query_len == 1

    def zeros_after(k: Tensor, v: Tensor, length: int) -> tuple[Tensor, Tensor]:
        kept = (torch.arange(len(k)) < length).view(-1, 1, 1)
        return k.where(kept, 0.0), v.where(kept, 0.0)

    for tile, queries in product(sorted({*TILES, case.spec.page_size}), _query_tiles(case)):

        def whole(case: Case, length: int, tile: int = tile) -> int:
            return -(-length // tile) * tile

        def one_more(case: Case, length: int, tile: int = tile) -> int:
            return min(length + 1, -(-length // tile) * tile)

        yield (
            "the causal mask shows the next token",
            Operations(
                visible=lambda q, k: k <= q + 1,
                read_to=one_more,
                read=zeros_after,
                query_tile=queries,
            ),
        )
        yield (
            f"what is past the context in the last tile of {tile} keys counts, as zeros",
            Operations(
                visible=lambda q, k: (k <= q) | (k > q.max()),
                read_to=whole,
                read=zeros_after,
                query_tile=queries,
            ),
        )
        yield (
            f"slots past the context are read with the last tile of {tile} keys, and only masked",
            Operations(read_to=whole, query_tile=queries),
        )
        if decodes:
            continue

        def all_of_last(q: Tensor, k: Tensor, tile: int = tile) -> Tensor:
            return (k <= q) | (k >= _lasts(int(q.max()) + 1, tile))

        for read in (zeros_after, Operations().read):
            yield (
                f"the last tile of {tile} keys is not masked",
                Operations(visible=all_of_last, read_to=whole, read=read, query_tile=queries),
            )


def reads_in_tiles(case: Case) -> Iterator[tuple[str, Operations]]:
    """Keys and values from the wrong place, in all tiles of keys or in some."""
    if case.layer is None:
        return
    size, table = case.spec.page_size, case.batch.block_table.long()
    yield "values are read from the keys", Operations(read=lambda k, v, length: (k, k))
    yield "keys are read from the values", Operations(read=lambda k, v, length: (v, v))
    for tile, queries in product(_key_tiles(case), _query_tiles(case)):
        for part in ("the last tile", "all tiles but the last"):

            def mine(n: int, length: int, tile: int = tile, part: str = part) -> Tensor:
                last = torch.arange(n) >= _lasts(length, tile)
                return (last if part == "the last tile" else ~last).view(-1, 1, 1)

            def values(
                k: Tensor, v: Tensor, length: int, mine: Callable[[int, int], Tensor] = mine
            ) -> tuple[Tensor, Tensor]:
                return k, torch.where(mine(len(k), length), k, v)

            def keys(
                k: Tensor, v: Tensor, length: int, mine: Callable[[int, int], Tensor] = mine
            ) -> tuple[Tensor, Tensor]:
                return torch.where(mine(len(k), length), v, k), v

            where = f"in {part} of {tile} keys"
            yield (
                f"values are read from the keys, {where}",
                Operations(read=values, query_tile=queries),
            )
            yield (
                f"keys are read from the values, {where}",
                Operations(read=keys, query_tile=queries),
            )
        for last_too in (True, False):

            def place(
                case: Case, i: int, positions: Tensor, tile: int = tile, last_too: bool = last_too
            ) -> Tensor:
                right = read_slots(case, i, positions)
                wrong = right // size * size + positions % tile
                wrongly = (positions < _lasts(len(positions), tile)) | last_too
                return torch.where(wrongly, wrong, right)

            some = f"tiles of {tile} keys" if last_too else f"tiles of {tile} keys before the last"
            if tile < size:
                yield (
                    f"{some} are read from the start of their page",
                    Operations(read_slots=place, query_tile=queries),
                )
            for entry in {*TILES} - {size}:

                def number(
                    case: Case,
                    i: int,
                    positions: Tensor,
                    tile: int = tile,
                    last_too: bool = last_too,
                    entry: int = entry,
                ) -> Tensor:
                    at = (i * table.shape[1] + positions // entry).clamp(max=table.numel() - 1)
                    page = table.flatten()[at].clamp(min=0)
                    wrong, right = page * size + positions % size, read_slots(case, i, positions)
                    wrongly = (positions < _lasts(len(positions), tile)) | last_too
                    return torch.where(wrongly, wrong, right)

                if not last_too or (tile, queries) == (entry, None):
                    yield (
                        f"the page of a key is looked up as if pages had {entry} slots",
                        Operations(read_slots=number, query_tile=queries),
                    )


def heads_left_out(case: Case) -> Iterator[tuple[str, Operations]]:
    """Attention of some heads is zero."""
    if case.layer is None:
        return
    heads, kv_heads = case.config.num_heads, case.config.num_kv_heads
    group = heads // kv_heads
    parts = [(heads - 1, heads)] if group > 1 else []
    parts += [(g * group, (g + 1) * group) for g in range(min(kv_heads, MOST_HEADS))]
    for start, stop in parts if heads > 1 else ():

        def without(x: Tensor, start: int = start, stop: int = stop) -> Tensor:
            return torch.cat((x[:, :start], torch.zeros_like(x[:, start:stop]), x[:, stop:]), 1)

        which = f"head {start} is" if stop == start + 1 else f"heads {start} to {stop - 1} are"
        yield f"query {which} left out of attention", Operations(heads=without)


# --- rows of a step -------------------------------------------------------------------------------


def _sources(case: Case) -> Iterator[tuple[str, Tensor]]:
    """Rows [T] int64 that a tile's rows may be mistaken for, in words with a {} for what is theirs.

    The rows of a tile are tokens of one sequence, or, where each sequence has one token, sequences.
    """
    starts = case.batch.query_starts.long()
    if case.batch.max_query_len == 1:
        starts = torch.tensor([0, len(case.hidden)])
    if len(starts) > 2:
        counted = [torch.arange(length) for length in starts.diff().tolist()]
        yield "each sequence has the {} of the step's first rows", torch.cat(counted)
    longest = int(starts.diff().max())
    for tile in (t for t in ROWS if t < longest):
        places = [torch.arange(stop - start) for start, stop in pairwise(starts.tolist())]
        begun = list(zip(starts[:-1].tolist(), places, strict=True))
        firsts = [start + place % tile for start, place in begun]
        counted = [place % tile for place in places]
        tops = [start + place - place % tile for start, place in begun]
        what = {
            f"each tile of {tile} rows has the {{}} of the first one": firsts,
            f"each tile of {tile} rows has the {{}} of the step's first rows": counted,
            f"all rows of a tile of {tile} have the {{}} of its first row": tops,
        }
        for name, rows in what.items():
            if name.endswith("step's first rows") and len(starts) == 2:
                continue  # the first one
            yield name, torch.cat(rows)


def rows_of_tiles(case: Case) -> Iterator[tuple[str, Operations]]:
    """Something of a token is taken from another row of the step."""
    if case.layer is None:
        rows_of_head = (t for t in ROWS if t < len(case.hidden))
        for tile in rows_of_head:
            rows = torch.arange(len(case.hidden)) % tile

            def norm(x: Tensor, w: Tensor, eps: float, rows: Tensor = rows) -> Tensor:
                return rms_norm(x[rows], w, eps)

            yield (
                f"each tile of {tile} rows of the head has the input of the first one",
                Operations(norms={"final_norm": norm}),
            )
        return
    for what, rows in _sources(case):
        for name, how in _with_rows(case, rows).items():
            yield what.format(name), how


def _with_rows(case: Case, rows: Tensor) -> dict[str, Operations]:
    """What each row of the step may take from another one, keyed by its name."""
    batch = case.batch
    slots = batch.slot_mapping.long()[rows]
    moved = evolve(batch, positions=batch.positions[rows])
    cache, misplaced = _written(case)
    found = {
        f"slots{cache}": Operations(write_slots=lambda case: slots, misplaced=misplaced),
        "RoPE positions": Operations(angles=lambda case: angles(evolve(case, batch=moved))),
        "residual": Operations(attn_residual=lambda x, normed, out: x[rows] + out),
        "attention": Operations(heads=lambda heads: heads[rows]),
    }
    if batch.max_query_len == 1:
        contexts = batch.context_lens[rows].tolist()
        pages = evolve(batch, block_table=batch.block_table[rows])
        found["context"] = Operations(contexts=lambda case: contexts)
        found["pages"] = Operations(
            read_slots=lambda case, i, at: read_slots(evolve(case, batch=pages), i, at)
        )
    return found


def _written(case: Case) -> tuple[str, tuple[str, ...]]:
    """The caches that are wrong, in words where only one of them is, and by name."""
    caches = {"k_cache": " of keys", "v_cache": " of values"}
    wrong = [cache for cache in caches if right_excess(case, cache) > 1]
    return (caches[wrong[0]], (wrong[0],)) if len(wrong) == 1 else ("", tuple(caches))


def sequences(case: Case) -> Iterator[tuple[str, Operations]]:
    """Something of a sequence is taken from another one, or from a chunk by itself."""
    if case.layer is None:
        return
    lengths = case.batch.query_starts.diff().tolist()
    if lengths != case.batch.context_lens.tolist():
        yield (
            "attention takes a step's first token of a sequence to be at position 0",
            Operations(contexts=lambda c: lengths),
        )
    if len(lengths) > 1:
        table = case.batch.block_table
        first = evolve(case.batch, block_table=table[:1].expand_as(table))
        yield (
            "the pages of the first sequence are read for all",
            Operations(read_slots=lambda c, i, at: read_slots(evolve(c, batch=first), i, at)),
        )
        shortest, longest = (f(case.batch.context_lens.tolist()) for f in (min, max))
        if shortest != longest and case.batch.max_query_len == 1:
            for which, length in (
                ("first sequence's", int(case.batch.context_lens[0])),
                ("longest", longest),
                ("shortest", shortest),
            ):
                same = [length] * len(lengths)

                def contexts(case: Case, same: list[int] = same) -> list[int]:
                    return same

                yield (
                    f"the {which} context is that of all sequences",
                    Operations(contexts=contexts),
                )


def slots_left_out(case: Case) -> Iterator[tuple[str, Operations]]:
    """Some slots of each page, or some tokens, are not written, in one cache or in both."""
    if case.layer is None:
        return
    size, slots = case.spec.page_size, case.batch.slot_mapping.long()
    starts = case.batch.query_starts.long()
    ends = torch.zeros(len(slots), dtype=torch.bool)
    ends[starts[1:] - 1] = True
    begins = torch.zeros_like(ends)
    begins[starts[:-1]] = True
    cache, misplaced = _written(case)
    parts = {
        "the last slot of each page": slots % size == size - 1,
        "the first slot of each page": slots % size == 0,
        "each sequence's last token of a step": ends,
        "each sequence's first token of a step": begins,
    }
    decodes = case.batch.max_query_len == 1
    bounds = [0, len(slots)] if decodes else starts.tolist()
    lasts = []
    for tile in ROWS:
        last = torch.zeros_like(ends)
        for start, stop in pairwise(bounds):
            last[start + tile - 1 : stop : tile] = True
            last[stop - 1] = True
        lasts.append(("the last row of each tile of rows", last))
    for part, left in (*parts.items(), *lasts):
        what = f"{part} is not written{cache and f', in the cache{cache}'}"
        kept = slots.where(~left, -1)

        def written(case: Case, kept: Tensor = kept) -> Tensor:
            return kept

        for queries in _query_tiles(case) if left.any() else ():
            yield what, Operations(write_slots=written, misplaced=misplaced, query_tile=queries)


TILE_BUGS = (
    softmax_in_tiles,
    ends_of_tiles,
    reads_in_tiles,
    heads_left_out,
    rows_of_tiles,
    sequences,
    slots_left_out,
)
