"""A stand-in for a model that shows whether the engine kept its cache in order.

``ContextHash`` is an executor whose cache holds, at each position, a hash of the token there and of
everything that the cache holds before it, as the block table names it. Its logits depend on that
hash, so a page that is stale, freed or of other tokens changes all tokens that follow.
``WatchedPages`` is the allocator of such an executor: it overwrites pages when they are given back,
and compares pages with the tokens that they are known by.
"""

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import torch
from contract_executors import Device

from tilewright.kv_cache import KvCacheManager
from tilewright.types import ExecutorLimits, KvCacheSpec

_LOGITS = 4099
"""Different rows of logits; a prime, so that all bits of a hash count."""


def _held_after(before: Sequence[int], token_id: int) -> int:
    """What the cache holds for a token: a hash of it and of what is held before it, 0 or more."""
    return hash((*before, token_id)) & (2**60 - 1)


@lru_cache(maxsize=50_000)
def contents(token_ids: tuple[int, ...]) -> tuple[int, ...]:
    """What the cache must hold at the positions of some tokens."""
    if not token_ids:
        return ()
    before = contents(token_ids[:-1])
    return (*before, _held_after(before, token_ids[-1]))


@lru_cache
def _rows(vocab_size: int) -> torch.Tensor:
    """[_LOGITS, vocab_size] float32, 0 to 10."""
    return 10 * torch.rand(_LOGITS, vocab_size, generator=torch.Generator().manual_seed(0))


class ContextHash:
    """An ``Executor`` without weights. It checks each step against the allocator.

    ``wrong`` lists what it found: an exception would only fail the step's requests.
    ``fault``: what goes wrong in the next step; None: nothing. It is called with where the step is
    (``"submit"``, ``"before"`` or ``"after"`` it runs), its batch and, after it, its logits. It
    raises, or changes the logits.
    """

    device = "hash"

    def __init__(self, vocab_size, page_size, **limits):
        self.vocab_size = vocab_size
        self.limits = ExecutorLimits(**limits)
        self.kv_cache_spec = KvCacheSpec(
            num_layers=1, num_kv_heads=1, head_dim=1, page_size=page_size, dtype="float32"
        )
        self.wrong: list[str] = []
        self.fault = None
        self.void = False
        """Whether the step's results are void, since the one before it failed in flight."""
        self.pages: WatchedPages | None = None
        self._poison = -1

    def allocate_kv(self, num_pages):
        self.slots = [-1] * (num_pages * self.kv_cache_spec.page_size)
        for page in range(num_pages):
            self.overwrite(page)

    def overwrite(self, page):
        """Fill a page with numbers that no token gives, and that no page has had before."""
        size = self.kv_cache_spec.page_size
        for slot in range(page * size, (page + 1) * size):
            self._poison -= 1
            self.slots[slot] = self._poison

    def forward(self, batch, tap=None):
        if self.fault:
            self.fault("before", batch, None)
        tokens, slots = batch.token_ids.tolist(), batch.slot_mapping.tolist()
        positions, starts = batch.positions.tolist(), batch.query_starts.tolist()
        values: list[int] = []
        for i, (name, table) in enumerate(
            zip(batch.request_ids, batch.block_table.tolist(), strict=True)
        ):
            rows = range(starts[i], starts[i + 1])
            start, stop = int(batch.context_lens[i]) - len(rows), int(batch.context_lens[i])
            self._check(name, table, range(start, stop), positions, slots, rows, again=bool(tap))
            context = [self.slots[self._slot(table, at)] for at in range(start)]
            if min(context, default=0) < 0 and not self.void and not tap:
                self.wrong.append(f"{name} reads before {start} what nobody has written")
            for row in rows:
                values.append(_held_after(context, tokens[row]))
                context.append(values[-1])
                self.slots[slots[row]] = values[-1]
        wanted = [values[row] % _LOGITS for row in batch.logits_rows.tolist()]
        logits = _rows(self.vocab_size)[wanted]
        if self.fault:
            self.fault("after", batch, logits)
        if tap:
            tap("logits", logits)
        return logits

    def _slot(self, table, position):
        size = self.kv_cache_spec.page_size
        return table[position // size] * size + position % size

    def _check(self, name, table, span, positions, slots, rows, again):
        """again: the step has failed and is run once more, to find where. Pages of requests that
        have ended since may be free, as long as nobody else has them."""
        pages, size = self.pages, self.kv_cache_spec.page_size
        if pages is None:
            return
        named = [page for page in table if page >= 0]
        held = list(pages.pages(name)) if name in pages.names else []
        if named != held[: len(named)] and not (again and not held):
            self.wrong.append(f"the table of {name} has the pages {named}, it holds {held}")
        for row, position in zip(rows, span, strict=True):
            if positions[row] != position:
                self.wrong.append(f"{name}: position {positions[row]}, expected {position}")
            if slots[row] != self._slot(table, position):
                self.wrong.append(f"{name}: slot {slots[row]} for position {position} of {table}")
            page = slots[row] // size
            if page in pages.known:
                self.wrong.append(f"{name} writes to page {page}, which is known by its content")
            if pages.holders[page] != (1 if held else 0):
                self.wrong.append(f"{name} writes to page {page}: {pages.holders[page]} holders")

    def read_kv(self, layer, pages):
        raise NotImplementedError

    def write_kv(self, layer, pages, cache):
        raise NotImplementedError

    def close(self):
        self.slots = []


class InFlight(Device):
    """A ``Device`` that says which of its steps are void."""

    def submit(self, batch, sampling):
        if self.inner.fault:
            self.inner.fault("submit", batch, None)
        before = self.in_flight[-1] if self.in_flight else None
        step = super().submit(batch, sampling)
        step.before = before
        return step

    def _run(self, step):
        self.inner.void = step.before is not None and step.before.output is None
        try:
            return super()._run(step)
        finally:
            self.inner.void = False


class WatchedPages(KvCacheManager):
    """The pages of a ``ContextHash``. It reports what is wrong with them in the executor's list."""

    def __init__(self, total_pages: int, executor: ContextHash):
        super().__init__(total_pages, executor.kv_cache_spec.page_size)
        self.executor = executor
        self.names: set[str] = set()
        """The requests that hold pages."""
        self.holders: Counter[int] = Counter()
        self.known: set[int] = set()
        """Pages that were committed and not taken since."""
        self.hits = 0
        executor.pages = self

    def allocate(self, request_id, token_ids, **arguments):
        found = super().allocate(request_id, token_ids, **arguments)
        pages = list(self.pages(request_id))
        self.names.add(request_id)
        self.holders.update(pages)
        self.hits += found
        if not set(pages) <= self.known:
            self.executor.wrong.append(f"{request_id} found pages {pages}, not all are known")
        self._compare(request_id, token_ids[:found], pages)
        return found

    def extend(self, request_id, to_tokens):
        before = len(self.pages(request_id))
        super().extend(request_id, to_tokens)
        for page in self.pages(request_id)[before:]:
            if self.holders[page]:
                self.executor.wrong.append(f"{request_id} got page {page}, which is held")
            self.holders[page] += 1
            self.known.discard(page)
            self.executor.overwrite(page)

    def truncate(self, request_id, to_tokens):
        before = list(self.pages(request_id))
        super().truncate(request_id, to_tokens)
        self._given_back(before[len(self.pages(request_id)) :])

    def commit(self, request_id, token_ids):
        super().commit(request_id, token_ids)
        pages = self.pages(request_id)[: len(token_ids) // self.page_size]
        self._compare(request_id, token_ids, pages)
        self.known.update(pages)

    def free(self, request_id):
        pages = list(self.pages(request_id))
        super().free(request_id)
        self.names.remove(request_id)
        self._given_back(pages)

    def _given_back(self, pages):
        for page in pages:
            self.holders[page] -= 1
            if not self.holders[page] and page not in self.known:
                self.executor.overwrite(page)

    def _compare(self, request_id, token_ids, pages):
        size, stored = self.page_size, self.executor.slots
        held = [value for page in pages for value in stored[page * size : (page + 1) * size]]
        if held != list(contents(tuple(token_ids)))[: len(held)]:
            self.executor.wrong.append(
                f"the pages {list(pages)} of {request_id} do not hold {list(token_ids)}"
            )
