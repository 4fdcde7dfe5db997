"""Causal attention over the paged KV cache.

Keys and values, including those of the current step, are read from the cache through the block
table, so a token sees the same keys whether its prompt came in one step or in several. Only slots
of the sequence itself are read: values in other pages, NaN included, cannot affect a result.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from tilewright.types import StepBatch

Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Maps queries [T, num_heads, head_dim] and the keys and values of a layer, [slots, num_kv_heads,
head_dim] each, to [T, num_heads * head_dim]. Query head h reads KV head h // (num_heads //
num_kv_heads). Softmax is computed in float32."""

Read: TypeAlias = Callable[[Tensor], Tensor]
"""Selects some slots of a layer's keys or values: [n, num_kv_heads, head_dim]."""

LONG = 512
"""Keys from which on a decoding sequence is processed in parts, and a batch with it one by one."""

PART = 256
"""Keys in a part."""

WIDE_BYTES = 2**22
"""Bytes of a long sequence's keys, and of its values, that are widened to float32 at a time."""

QUERY_BLOCK = 256
"""Queries per block in prefill. A mask is at most QUERY_BLOCK by the context length."""


def paged_attention(
    batch: StepBatch, page_size: int, window: int | None, dtype: torch.dtype
) -> Attend:
    """Attention for one step, for the layers that have the same sliding window.

    dtype: in which queries, keys and values are multiplied; a single query is in float32.
    """
    if batch.token_ids.shape[0] == batch.context_lens.shape[0]:
        return _decode(batch, page_size, window, dtype)
    return _prefill(batch, page_size, window, dtype)


def _decode(batch: StepBatch, page_size: int, window: int | None, dtype: torch.dtype) -> Attend:
    """One query per sequence: short sequences all at once, long ones one by one."""
    lengths = batch.context_lens.tolist()
    firsts = [0 if window is None else max(0, length - window) for length in lengths]
    counts = [length - first for length, first in zip(lengths, firsts, strict=True)]
    if len(counts) > 1 and max(counts) < LONG:
        return _padded(batch.block_table, firsts, counts, page_size, dtype)
    reads = [
        _reader(batch.block_table[i], first, length, page_size)
        for i, (first, length) in enumerate(zip(firsts, lengths, strict=True))
    ]

    @cache  # for all layers: to map fresh memory takes as long as to fill it
    def space(kv_heads: int, head_dim: int) -> Tensor:
        block = min(max(counts), _block(kv_heads, head_dim))
        return torch.empty(2, block, kv_heads, head_dim)

    def attend(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        kv_heads, head_dim = keys.shape[1:]
        wide = None if keys.dtype == torch.float32 else space(kv_heads, head_dim)
        grouped = q.float().view(len(reads), kv_heads, -1, head_dim)
        outs = [
            _attend_one(one, read(keys), read(values), wide)
            for one, read in zip(torch.split(grouped, 1), reads, strict=True)
        ]
        out = torch.cat(outs) if len(outs) > 1 else outs[0]
        return out.reshape(q.shape[0], -1).to(q.dtype)

    return attend


def _padded(
    block_table: Tensor,
    firsts: Sequence[int],
    counts: Sequence[int],
    page_size: int,
    dtype: torch.dtype,
) -> Attend:
    """One query per sequence, all sequences at once, over copies of their keys and values.

    Shorter sequences are padded with their own last slot, which is masked.
    """
    starts, number = torch.tensor(firsts).unsqueeze(1), torch.tensor(counts).unsqueeze(1)
    width = max(counts)
    offsets = torch.arange(width)
    positions = starts + torch.minimum(offsets, number - 1)
    slots = _slots(block_table, positions, page_size).flatten()
    mask = None
    if min(counts) < width:
        mask = _additive(offsets >= number, dtype)[:, None, None, :]

    def attend(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        kv_heads, head_dim = keys.shape[1:]
        shape = (len(counts), width, kv_heads, head_dim)
        k = keys.index_select(0, slots).to(dtype).view(shape).transpose(1, 2)
        v = values.index_select(0, slots).to(dtype).view(shape).transpose(1, 2)
        # The query heads of a KV head are treated as several queries, so no keys are repeated.
        grouped = q.to(dtype).view(len(counts), kv_heads, -1, head_dim)
        out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask)
        return out.reshape(len(counts), -1).to(q.dtype)

    return attend


def _attend_one(q: Tensor, keys: Tensor, values: Tensor, space: Tensor | None) -> Tensor:
    """Attention of one query: q [1, num_kv_heads, group, head_dim] float32, keys and values
    [n, num_kv_heads, head_dim] of any dtype, to [1, num_kv_heads, group, head_dim] float32.

    16-bit keys and values are widened: torch's attention of one query takes longer in 16 bits.
    space: [2, block, num_kv_heads, head_dim] float32, for the widened keys and values of a block;
    None for those in float32.

    torch's attention gives each KV head to one thread, so many keys are split into parts. The parts
    are merged by the logarithms of their sums of exponentials (arXiv:2112.05682).
    """
    count, kv_heads, head_dim = keys.shape
    block = _block(kv_heads, head_dim)
    if count < min(LONG, block):
        k, v = _widened(keys, values, space)
        return F.scaled_dot_product_attention(q, k.transpose(0, 1)[None], v.transpose(0, 1)[None])
    outs, log_sums = [], []
    for start in range(0, count, block):
        stop = min(start + block, count)
        k, v = _widened(keys[start:stop], values[start:stop], space)
        whole = (stop - start) // PART * PART
        for begin, end, part in ((0, whole, PART), (whole, stop - start, stop - start - whole)):
            if begin < end:
                shape = (-1, part, kv_heads, head_dim)
                out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                    q.expand((end - begin) // part, -1, -1, -1),
                    k[begin:end].view(shape).transpose(1, 2),
                    v[begin:end].view(shape).transpose(1, 2),
                )
                outs.append(out)
                log_sums.append(log_sum)
    share = torch.cat(log_sums).softmax(0).unsqueeze(-1)
    return torch.cat(outs).mul_(share).sum(0, keepdim=True)


def _block(kv_heads: int, head_dim: int) -> int:
    """Keys that are widened at a time: a multiple of PART."""
    return max(1, WIDE_BYTES // (4 * PART * kv_heads * head_dim)) * PART


def _widened(keys: Tensor, values: Tensor, space: Tensor | None) -> tuple[Tensor, Tensor]:
    """Keys and values in float32, copied into the space if there is one."""
    if space is None:
        return keys, values
    number = keys.shape[0]
    return space[0, :number].copy_(keys), space[1, :number].copy_(values)


class _Sequence(NamedTuple):
    """One sequence of a prefill step."""

    rows: slice
    read: Read
    """Reads the positions that the queries see, in order."""
    blocks: list["_Block"]


class _Block(NamedTuple):
    """Queries that are processed in one attention call."""

    queries: slice
    """Range within the sequence's rows."""
    keys: slice
    """Range within the positions read."""
    masked: bool
    """Whether these keys need a mask; otherwise each query sees the keys up to its own position."""


def _prefill(batch: StepBatch, page_size: int, window: int | None, dtype: torch.dtype) -> Attend:
    """Any number of queries per sequence, one sequence after another."""
    sequences = list(_sequences(batch, page_size, window))
    masked = [b for s in sequences for b in s.blocks if b.masked]
    mask = _additive(_hidden(masked, window), dtype) if masked else None

    def attend(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        heads, head_dim = q.shape[1:]
        kv_heads = keys.shape[1]
        group = heads // kv_heads
        attended = torch.empty(q.shape[0], kv_heads, group, head_dim, dtype=q.dtype)
        for sequence in sequences:
            # [kv_heads, group, tokens, head_dim]; the heads of a group share their KV head's keys.
            k = _by_head(sequence.read(keys).to(dtype), group)
            v = _by_head(sequence.read(values).to(dtype), group)
            grouped = q[sequence.rows].view(-1, kv_heads, group, head_dim).permute(1, 2, 0, 3)
            result = attended[sequence.rows].permute(1, 2, 0, 3)
            for queries, seen, is_masked in sequence.blocks:
                rows, columns = queries.stop - queries.start, seen.stop - seen.start
                result[:, :, queries] = F.scaled_dot_product_attention(
                    grouped[:, :, queries].to(dtype),
                    k[:, :, seen],
                    v[:, :, seen],
                    attn_mask=mask[-rows:, -columns:] if mask is not None and is_masked else None,
                    is_causal=not is_masked,
                )
        return attended.view(-1, heads * head_dim)

    return attend


def _sequences(batch: StepBatch, page_size: int, window: int | None) -> Iterator[_Sequence]:
    starts = batch.query_starts.tolist()
    for i, length in enumerate(batch.context_lens.tolist()):
        new = starts[i + 1] - starts[i]
        first = 0 if window is None else max(0, length - new - window + 1)
        yield _Sequence(
            rows=slice(starts[i], starts[i + 1]),
            read=_reader(batch.block_table[i], first, length, page_size),
            blocks=_blocks(new, length, first, window),
        )


def _blocks(new: int, length: int, first: int, window: int | None) -> list[_Block]:
    """Blocks of the last ``new`` of ``length`` tokens, over keys from position ``first`` on."""
    if new == length and (window is None or window >= length):
        return [_Block(slice(0, new), slice(0, new), masked=False)]
    blocks = []
    for start in range(0, new, QUERY_BLOCK):
        stop = min(new, start + QUERY_BLOCK)
        position = length - new + start
        seen_from = first if window is None else max(first, position - window + 1)
        keys = slice(seen_from - first, length - new + stop - first)
        blocks.append(_Block(slice(start, stop), keys, masked=True))
    return blocks


def _hidden(blocks: list[_Block], window: int | None) -> Tensor:
    """Mask of the keys that each query does not see, [queries, keys] bool.

    The last query and the last key of each block are the same token, so the mask of a block is the
    lower right part of this one.
    """
    rows = max(b.queries.stop - b.queries.start for b in blocks)
    columns = max(b.keys.stop - b.keys.start for b in blocks)
    back = torch.arange(rows - 1, -1, -1).unsqueeze(1)
    key_back = torch.arange(columns - 1, -1, -1)
    hidden = key_back < back
    return hidden if window is None else hidden | (key_back >= back + window)


def _by_head(states: Tensor, group: int) -> Tensor:
    """[tokens, kv_heads, head_dim] as [kv_heads, group, tokens, head_dim], repeated by stride."""
    tokens, kv_heads, head_dim = states.shape
    return states.transpose(0, 1).unsqueeze(1).expand(kv_heads, group, tokens, head_dim)


def _reader(pages: Tensor, start: int, stop: int, page_size: int) -> Read:
    """Reads positions start to stop of a sequence: in place if its pages follow each other.

    pages: a row of the block table.
    """
    skipped = start // page_size
    held = pages[skipped : -(-stop // page_size)].tolist()
    if held == list(range(held[0], held[0] + len(held))):
        first = (held[0] - skipped) * page_size
        return lambda layer: layer[first + start : first + stop]
    slots = _slots(pages[None], torch.arange(start, stop)[None], page_size)[0]
    return lambda layer: layer.index_select(0, slots)


def _slots(block_table: Tensor, positions: Tensor, page_size: int) -> Tensor:
    """Slots [B, n] int64 of positions [B, n] int64, which must lie within the sequences."""
    pages = block_table.gather(1, positions // page_size).long()
    return pages * page_size + positions % page_size


def _additive(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))
