"""A paged KV cache that hands out the lowest free page first.

The pages in use thus lie close together, and the cache's end is touched only when it fills.
"""

from collections import Counter
from collections.abc import Sequence
from heapq import heappop, heappush
from typing import TYPE_CHECKING

import torch

from tilewright import hookimpl
from tilewright.errors import OutOfPagesError
from tilewright.types import KvAllocator, KvAllocatorRequest, KvCacheSpec, KvLayer, PluginInfo
from tilewright.weights import torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

tilewright_api = 1


@hookimpl
def plugin_info() -> PluginInfo:
    return PluginInfo(
        summary="pages with reference counts, the lowest free one first",
        limits={"page size": "any", "row orders": "NHD, HND", "sharing": "full pages, by fork"},
    )


@hookimpl
def create_kv_allocator(request: KvAllocatorRequest) -> KvAllocator:
    spec, pages = request.spec, request.total_pages
    if pages is None:
        pages = request.max_sequences * -(-request.max_seq_len // spec.page_size)
        if spec.memory_limit is not None:
            pages = min(pages, spec.memory_limit // spec.page_bytes)
    if pages < 1:
        raise OutOfPagesError(
            f"the KV cache may take {spec.memory_limit} bytes, but one page of {spec.page_size} "
            f"tokens takes {spec.page_bytes}: free memory or set a smaller page_size"
        )
    return LowestFirst(spec, pages)


class LowestFirst:
    """A ``KvAllocator`` (see tilewright.types)."""

    def __init__(self, spec: KvCacheSpec, total_pages: int):
        self.spec = spec
        self.storage = _storage(spec, total_pages)
        self.total_pages = total_pages
        self.free_list = list(range(total_pages))  # a heap
        self.holders: Counter[int] = Counter()
        """How many requests hold a page."""
        self.pages: dict[str, list[int]] = {}
        self.lengths: dict[str, int] = {}

    @property
    def free_pages(self) -> int:
        return len(self.free_list)

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.spec.page_size)

    def allocate(self, request_id: str, num_tokens: int) -> None:
        self._check_new(request_id)
        if num_tokens < 1:
            raise ValueError(
                f"request {request_id!r}: num_tokens must be at least 1, found {num_tokens}"
            )
        self._hold(request_id, [], num_tokens)

    def extend(self, request_id: str, num_tokens: int = 1) -> None:
        if num_tokens < 0:
            raise ValueError(
                f"request {request_id!r}: num_tokens must be at least 0, found {num_tokens}"
            )
        pages, length = self.pages[request_id], self.lengths[request_id]
        self._hold(request_id, pages, length + num_tokens)

    def num_tokens(self, request_id: str) -> int:
        return self.lengths[request_id]

    def slots(self, request_id: str, start: int, stop: int) -> "Tensor":
        pages, size = self.pages[request_id], self.spec.page_size
        if not 0 <= start <= stop <= self.lengths[request_id]:
            raise IndexError(
                f"request {request_id!r} has {self.lengths[request_id]} tokens; asked for {start} "
                f"to {stop}"
            )
        slots = [pages[p // size] * size + p % size for p in range(start, stop)]
        return torch.tensor(slots, dtype=torch.int32)

    def block_table(self, request_ids: Sequence[str]) -> "Tensor":
        rows = [self.pages[r] for r in request_ids]
        width = max(map(len, rows), default=0)
        padded = [row + [-1] * (width - len(row)) for row in rows]
        return torch.tensor(padded, dtype=torch.int32).reshape(len(rows), width)

    def fork(self, parent_id: str, child_id: str) -> None:
        pages, length = self.pages[parent_id], self.lengths[parent_id]
        self._check_new(child_id)
        full = length // self.spec.page_size
        if full < len(pages) and self.spec.allocate:
            raise ValueError(
                f"request {parent_id!r}: its last page is not full, and is in the executor's own "
                "storage, which the allocator cannot copy"
            )
        self._hold(child_id, pages[:full], length)
        for source, target in zip(pages[full:], self.pages[child_id][full:], strict=True):
            for layer in self.storage:
                layer.key[target] = layer.key[source]
                layer.value[target] = layer.value[source]
        self.holders.update(pages[:full])

    def free(self, request_id: str) -> None:
        pages = self.pages.pop(request_id)
        del self.lengths[request_id]
        self.holders.subtract(pages)
        for page in pages:
            if self.holders[page] == 0:
                heappush(self.free_list, page)

    def layers(self) -> Sequence[KvLayer]:
        return self.storage

    def check_integrity(self) -> None:
        held = Counter(page for pages in self.pages.values() for page in pages)
        assert held == +self.holders, "reference counts differ from the pages that are held"
        free = {p for p in range(self.total_pages) if p not in held}
        assert sorted(self.free_list) == sorted(free), "a page is neither free nor held, or both"

    def _check_new(self, request_id: str) -> None:
        if request_id in self.pages:
            raise ValueError(f"request {request_id!r} already has pages: extend or free it")

    def _hold(self, request_id: str, pages: list[int], num_tokens: int) -> None:
        """Give a request these pages, and as many more as its tokens need."""
        wanted = self.pages_for(num_tokens) - len(pages)
        if wanted > self.free_pages:
            raise OutOfPagesError(
                f"request {request_id!r} needs {wanted} more pages for {num_tokens} tokens; "
                f"{self.free_pages} of {self.total_pages} are free: raise total_pages, or run "
                "fewer or shorter requests at once"
            )
        taken = [heappop(self.free_list) for _ in range(wanted)]
        self.holders.update(taken)
        self.pages[request_id] = pages + taken
        self.lengths[request_id] = num_tokens


def _storage(spec: KvCacheSpec, total_pages: int) -> list[KvLayer]:
    rows = (spec.page_size, spec.num_kv_heads)
    shape = (total_pages, *(rows if spec.row_order == "NHD" else rows[::-1]), spec.head_dim)
    dtype = torch_dtype(spec.dtype)

    def make() -> "Tensor":
        if spec.allocate:
            made: Tensor = spec.allocate(shape, dtype)
            return made
        return torch.zeros(shape, dtype=dtype, device=spec.device)

    try:
        return [KvLayer(make(), make()) for _ in range(spec.num_layers)]
    except (RuntimeError, MemoryError) as error:
        raise OutOfPagesError(
            f"a KV cache of {total_pages} pages takes {total_pages * spec.page_bytes} bytes, which "
            f"could not be allocated ({error}): lower total_pages, max_seq_len or max_batch_size"
        ) from error
