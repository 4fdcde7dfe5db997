"""The KV caches of a comparison's sides, by slot: what is read, copied, or cleared in them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from attrs import frozen
from torch import Tensor

from tilewright.request import Request
from tilewright.scheduler import Step
from tilewright.types import KvCacheSpec, KvLayer
from tilewright_compare.patterns import Rows

if TYPE_CHECKING:
    from tilewright_compare.sides import Side


def written(side: "Side", step: Step) -> list[tuple[Request, int]]:
    """The step's requests, each with the number of its tokens in the cache after the step."""
    stops = {part.request.request_id: part.stop for part in step.parts}
    return [(r, stops[r.request_id]) for r in side.requests if r.request_id in stops]


def cached_slots(side: "Side", step: Step) -> Tensor:
    """Slots of all cached tokens of the step's requests, in order; int64."""
    return torch.cat([side.slots(request, stop) for request, stop in written(side, step)])


def rows_of(side: "Side", step: Step, stage: str) -> Rows:
    """What the rows of a stage's tensor are: the step's tokens, those whose logits are wanted, or
    the tokens in the cache."""
    batch, size = step.batch, side.model.runtime.page_size
    names = [part.request.request_id for part in step.parts]
    if stage.endswith("_cache"):
        held = written(side, step)
        slots = cached_slots(side, step)
        names = [request.request_id for request, _ in held]
        lengths = torch.tensor([stop for _, stop in held])
        position = torch.cat([torch.arange(stop) for _, stop in held])
    else:
        lengths, position, slots = batch.query_starts.diff(), batch.positions, batch.slot_mapping
    sequence = torch.arange(len(names)).repeat_interleave(lengths)
    if stage in ("final_norm", "logits"):
        rows = batch.logits_rows.long()
        sequence, position, slots = sequence[rows], position[rows], slots[rows]
    return Rows(
        names=names,
        sequence=sequence,
        position=position.long(),
        offset=slots.long() % size,
        page_size=size,
    )


def joined(side: "Side", layer: int, step: Step) -> KvLayer:
    """Keys and values at ``cached_slots``, [tokens, KV heads, head_dim], from any layout."""
    return _at(side, layer, cached_slots(side, step))


def _at(side: "Side", layer: int, slots: Tensor) -> KvLayer:
    spec = side.executor.kv_cache_spec
    pages, local = _paged(spec, slots)
    cache = side.executor.read_kv(layer, pages)
    return KvLayer(*(Slots(t, spec.row_order)[local] for t in (cache.key, cache.value)))


def _paged(spec: KvCacheSpec, slots: Tensor) -> tuple[list[int], Tensor]:
    """The slots' pages, each once, and the slots in a cache of only these pages; int64."""
    pages, page = torch.unique(slots // spec.page_size, return_inverse=True)
    return pages.tolist(), page * spec.page_size + slots % spec.page_size


@contextmanager
def cleared(side: "Side", step: Step) -> Iterator[None]:
    """In the block, the slots of the step's tokens are unwritten, so that what the block leaves
    unwritten does not pass for written; afterwards, they are as before."""
    executor, spec = side.executor, side.executor.kv_cache_spec
    pages, local = _paged(spec, step.batch.slot_mapping.long())
    kept = [executor.read_kv(layer, pages) for layer in range(spec.num_layers)]
    for layer, cache in enumerate(kept):
        new = KvLayer(cache.key.clone(), cache.value.clone())
        for tensor in (new.key, new.value):
            Slots(tensor, spec.row_order)[local] = torch.tensor(side.unwritten, dtype=tensor.dtype)
        executor.write_kv(layer, pages, new)
    yield
    for layer, cache in enumerate(kept):
        executor.write_kv(layer, pages, cache)


def copy_kv(source: "Side", target: "Side", layer: int, step: Step, random: bool = False) -> None:
    """Copy to target's layer what source's holds of the tokens before a step, and clear the rest.
    random: fill the rest with random numbers.

    Otherwise a slot that is read before it is written would hold the right key of an earlier run.
    """
    spec, cache = target.executor.kv_cache_spec, target.kv(layer)
    new = KvLayer(*(torch.full_like(t, target.unwritten) for t in (cache.key, cache.value)))
    if random:
        seeded = torch.Generator().manual_seed(layer)
        for tensor in (new.key, new.value):
            tensor.copy_(torch.randn(tensor.shape, generator=seeded))
    for theirs, ours in zip(source.requests, target.requests, strict=True):
        before = theirs.num_computed
        if not before or theirs.request_id not in {r.request_id for r in step.requests}:
            continue
        known, slots = _at(source, layer, source.slots(theirs, before)), target.slots(ours, before)
        for tensor, values in ((new.key, known.key), (new.value, known.value)):
            Slots(tensor, spec.row_order)[slots] = values.to(tensor.dtype)
    target.executor.write_kv(layer, range(target.model.runtime.total_pages), new)


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
