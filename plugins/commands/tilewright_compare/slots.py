"""An executor's KV cache, by slot."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from tilewright.types import Executor, KvCacheSpec, KvLayer, StepBatch


@frozen(eq=False)
class Slots:
    """A cache tensor indexed by slot: [slots, KV heads, head_dim]."""

    cache: Tensor
    row_order: str

    @property
    def count(self) -> int:
        return self.cache.shape[0] * self._page_size

    @property
    def _page_size(self) -> int:
        return self.cache.shape[1 if self.row_order == "NHD" else 2]

    def _index(self, slots: Tensor) -> tuple[Any, ...]:
        page, offset = slots // self._page_size, slots % self._page_size
        return (page, offset) if self.row_order == "NHD" else (page, slice(None), offset)

    def __getitem__(self, slots: Tensor) -> Tensor:
        return self.cache[self._index(slots)]

    def __setitem__(self, slots: Tensor, values: Tensor) -> None:
        self.cache[self._index(slots)] = values


def paged(spec: KvCacheSpec, slots: Tensor) -> tuple[list[int], Tensor]:
    """The slots' pages, each once, and the slots in a cache of only these pages; int64."""
    pages, page = torch.unique(slots // spec.page_size, return_inverse=True)
    return pages.tolist(), page * spec.page_size + slots % spec.page_size


@contextmanager
def cleared(executor: Executor, batch: StepBatch, unwritten: float) -> Iterator[None]:
    """In the block, the slots of the step's tokens hold ``unwritten``, so that what the block does
    not write does not pass for written; afterwards, they are as before."""
    spec = executor.kv_cache_spec
    pages, local = paged(spec, batch.slot_mapping.long())
    kept = [executor.read_kv(layer, pages) for layer in range(spec.num_layers)]
    for layer, cache in enumerate(kept):
        new = KvLayer(cache.key.clone(), cache.value.clone())
        for tensor in (new.key, new.value):
            Slots(tensor, spec.row_order)[local] = torch.tensor(unwritten, dtype=tensor.dtype)
        executor.write_kv(layer, pages, new)
    yield
    for layer, cache in enumerate(kept):
        executor.write_kv(layer, pages, cache)
