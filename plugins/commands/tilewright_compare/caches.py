"""The KV caches of a comparison's sides: what their requests hold, read and copied."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tilewright.request import Request
from tilewright.scheduler import Step
from tilewright.types import KvLayer
from tilewright_compare.patterns import Rows
from tilewright_compare.slots import Slots, paged

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
    pages, local = paged(spec, slots)
    cache = side.executor.read_kv(layer, pages)
    return KvLayer(*(Slots(t, spec.row_order)[local] for t in (cache.key, cache.value)))


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
