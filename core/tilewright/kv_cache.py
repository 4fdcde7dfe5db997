"""The paged KV cache: fixed-size pages, handed to requests as they grow.

Position p of a request is in its page number p // page_size at offset p % page_size; its slot is
page * page_size + offset in every layer. Pages are reference-counted, so that requests with a
common prefix can share full pages; a partly full page has one holder, so no slot is ever written
for two requests.
"""

from array import array
from collections.abc import Sequence
from functools import partial
from math import prod
from mmap import mmap

import numpy as np
import torch
from attrs import define
from torch import Tensor

from tilewright.errors import OutOfPagesError
from tilewright.hookspecs import hookimpl
from tilewright.types import KvAllocatorRequest, KvCacheSpec, KvLayer, PluginInfo
from tilewright.weights import torch_dtype

tilewright_api = 1


@hookimpl
def plugin_info() -> PluginInfo:
    return PluginInfo(
        summary="fixed-size pages with reference counts",
        limits={"page size": "any", "row orders": "NHD, HND", "sharing": "full pages, by fork"},
    )


@hookimpl
def create_kv_allocator(request: KvAllocatorRequest) -> "KvCacheManager":
    return KvCacheManager(request.spec, budget(request))


def budget(request: KvAllocatorRequest) -> int:
    """Number of pages in the cache: as set, or what the sequences need within the memory limit.

    Raises OutOfPagesError when the memory limit does not even hold one page.
    """
    if request.total_pages is not None:
        return request.total_pages
    spec = request.spec
    wanted = request.max_sequences * -(-request.max_seq_len // spec.page_size)
    if spec.memory_limit is None:
        return wanted
    affordable = spec.memory_limit // spec.page_bytes
    if affordable < 1:
        raise OutOfPagesError(
            f"the KV cache may take {spec.memory_limit} bytes, but one page of {spec.page_size} "
            f"tokens takes {spec.page_bytes}: free memory or set a smaller page_size"
        )
    return min(wanted, affordable)


@define
class _Holding:
    """The pages of one request, and how many of their slots are in use."""

    num_tokens: int
    pages: "array[int]"
    """In order of position; 32-bit, as block tables are, so that a row is one copy."""


class KvCacheManager:
    """A ``KvAllocator`` (see tilewright.types) over tensors of ``total_pages`` pages."""

    def __init__(self, spec: KvCacheSpec, total_pages: int):
        if total_pages < 1:
            raise ValueError(f"total_pages must be at least 1, found {total_pages}")
        self.spec = spec
        # Storage first: for too many pages it fails before the lists below take all memory.
        self._layers = _storage(spec, total_pages)
        self._references = [0] * total_pages
        # A stack, so that pages freed last are used first while they are warm in the caches.
        self._free = list(range(total_pages - 1, -1, -1))
        self._held: dict[str, _Holding] = {}

    @property
    def total_pages(self) -> int:
        return len(self._references)

    @property
    def free_pages(self) -> int:
        return len(self._free)

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.spec.page_size)

    def allocate(self, request_id: str, num_tokens: int) -> None:
        if request_id in self._held:
            raise ValueError(f"request {request_id!r} already has pages: extend or free it")
        if num_tokens < 1:
            raise ValueError(
                f"request {request_id!r}: num_tokens must be at least 1, found {num_tokens}"
            )
        pages = self._take(request_id, self.pages_for(num_tokens), num_tokens)
        self._held[request_id] = _Holding(num_tokens, pages)

    def extend(self, request_id: str, num_tokens: int = 1) -> None:
        held = self._held[request_id]
        if num_tokens < 0:
            raise ValueError(
                f"request {request_id!r}: num_tokens must be at least 0, found {num_tokens}"
            )
        total = held.num_tokens + num_tokens
        held.pages += self._take(request_id, self.pages_for(total) - len(held.pages), total)
        held.num_tokens = total

    def num_tokens(self, request_id: str) -> int:
        return self._held[request_id].num_tokens

    def slots(self, request_id: str, start: int, stop: int) -> Tensor:
        held = self._held[request_id]
        if not 0 <= start <= stop <= held.num_tokens:
            raise IndexError(
                f"request {request_id!r} has positions 0 to {held.num_tokens}; asked for "
                f"{start} to {stop}"
            )
        size = self.spec.page_size
        return torch.tensor(
            [held.pages[p // size] * size + p % size for p in range(start, stop)],
            dtype=torch.int32,
        )

    def block_table(self, request_ids: Sequence[str]) -> Tensor:
        rows = [self._held[r].pages for r in request_ids]
        table = np.full((len(rows), max(map(len, rows), default=0)), -1, dtype=np.int32)
        for i, pages in enumerate(rows):
            table[i, : len(pages)] = pages
        return torch.from_numpy(table)

    def fork(self, parent_id: str, child_id: str) -> None:
        if child_id in self._held:
            raise ValueError(f"request {child_id!r} already has pages: free it first")
        parent = self._held[parent_id]
        full = parent.num_tokens // self.spec.page_size
        if self.spec.allocate and full < len(parent.pages):
            raise ValueError(
                f"request {parent_id!r} cannot be forked at {parent.num_tokens} tokens: its partly "
                "full page is in the executor's own storage, which the allocator cannot copy"
            )
        tail = self._take(child_id, len(parent.pages) - full, parent.num_tokens)
        for page in parent.pages[:full]:
            self._references[page] += 1
        self._held[child_id] = _Holding(parent.num_tokens, parent.pages[:full] + tail)
        for source, target in zip(parent.pages[full:], tail, strict=True):
            for layer in self._layers:
                layer.key[target] = layer.key[source]
                layer.value[target] = layer.value[source]

    def free(self, request_id: str) -> None:
        for page in reversed(self._held.pop(request_id).pages):
            self._references[page] -= 1
            if self._references[page] == 0:
                self._free.append(page)

    def layers(self) -> Sequence[KvLayer]:
        return self._layers

    def check_integrity(self) -> None:
        counted = [0] * self.total_pages
        for request_id, held in self._held.items():
            assert len(held.pages) == self.pages_for(held.num_tokens), (
                f"request {request_id!r} holds {len(held.pages)} pages for {held.num_tokens} tokens"
            )
            for index, page in enumerate(held.pages):
                counted[page] += 1
                last_and_partial = (index + 1) * self.spec.page_size > held.num_tokens
                assert not (last_and_partial and self._references[page] > 1), (
                    f"page {page}, partly filled by request {request_id!r}, is held by another too"
                )
        assert counted == self._references, "reference counts differ from the pages that are held"
        assert len(set(self._free)) == len(self._free), "a page is on the free list twice"
        assert set(self._free) == {p for p, n in enumerate(counted) if n == 0}, (
            "the free list differs from the pages that no request holds"
        )

    def _take(self, request_id: str, count: int, num_tokens: int) -> "array[int]":
        if count > len(self._free):
            raise OutOfPagesError(
                f"request {request_id!r} needs {count} more KV cache pages of "
                f"{self.spec.page_size} tokens to hold {num_tokens} tokens; {len(self._free)} of "
                f"{self.total_pages} are free and {len(self._held)} requests hold the rest: "
                "raise total_pages, or run fewer or shorter requests at once"
            )
        taken = array("i", (self._free.pop() for _ in range(count)))
        for page in taken:
            self._references[page] = 1
        return taken


def _storage(spec: KvCacheSpec, total_pages: int) -> list[KvLayer]:
    rows = (
        (spec.page_size, spec.num_kv_heads)
        if spec.row_order == "NHD"
        else (spec.num_kv_heads, spec.page_size)
    )
    shape = (total_pages, *rows, spec.head_dim)
    dtype = torch_dtype(spec.dtype)
    allocate = spec.allocate or partial(_zeros, device=spec.device)
    try:
        return [
            KvLayer(allocate(shape, dtype), allocate(shape, dtype)) for _ in range(spec.num_layers)
        ]
    except (MemoryError, OSError, OverflowError) as error:
        raise OutOfPagesError(
            f"a KV cache of {total_pages} pages takes "
            f"{total_pages * spec.page_bytes / 2**30:.1f} GiB, which could not be "
            f"allocated ({error}): lower total_pages, max_seq_len or max_batch_size"
        ) from error


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    if device != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # torch.zeros would touch every page of memory now; a fresh mapping is zero when first touched.
    memory = mmap(-1, prod(shape) * dtype.itemsize)
    return torch.frombuffer(memory, dtype=dtype).reshape(shape)
