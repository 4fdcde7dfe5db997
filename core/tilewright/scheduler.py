"""Decides which tokens run in the next step.

Requests wait in a queue, and start in the order of their arrival, when the batch has a free place
and the KV cache has room. A step has a budget of tokens: requests that decode come first, with one
token each, then the prompts in what is left, in chunks when they are long.

A request starts with the pages at the beginning of its tokens that are in the cache already. When
the cache is full, the youngest request gives its pages back, waits, and is computed again; or, if
the policy is to reserve pages, requests start only if there is room for the last token of each.
"""

from bisect import insort
from collections.abc import Callable, Sequence
from itertools import islice

import numpy as np
import torch
from attrs import frozen

from tilewright.errors import OutOfPagesError
from tilewright.request import Request
from tilewright.types import Admission, ExecutorLimits, KvAllocator, StepBatch

Draft = Callable[[Request, int], Sequence[int]]
"""Called with a decoding request and a maximum; guesses the tokens that follow its last one."""


@frozen
class _Ready:
    """A request's tokens that can run next."""

    request: Request
    start: int
    """Position of the first one."""
    left: int
    source: int
    """Row of logits of the step in flight whose sampled token is the last one; -1: it is known."""


_Chosen = tuple[_Ready, int, Sequence[int]]
"""A request, how many of its tokens run next without drafts, and the drafts that follow them."""


@frozen
class Part:
    """A request's part of a step."""

    request: Request
    start: int
    stop: int
    """Positions of its tokens; drafts included."""
    drafts: Sequence[int]
    decoding: bool
    scored: range
    """Rows of the step's logits that score tokens of the prompt."""
    sampled: range
    """Rows of the step's logits that are sampled: one, and one per draft; else empty."""

    @property
    def position(self) -> int:
        """Index in the request's output of the first token that is sampled."""
        return self.stop - len(self.drafts) - len(self.request.prompt_token_ids)


@frozen(eq=False)
class Step:
    """A batch to run, and its requests."""

    batch: StepBatch
    parts: tuple[Part, ...]

    @property
    def requests(self) -> tuple[Request, ...]:
        return tuple(part.request for part in self.parts)

    @property
    def sampled(self) -> tuple[Request, ...]:
        """The requests that get their next token from this step, in order of the logits' rows."""
        return tuple(part.request for part in self.parts if part.sampled)


class Scheduler:
    """Holds one model's unfinished requests."""

    def __init__(
        self,
        allocator: KvAllocator,
        max_batch_size: int,
        max_batch_tokens: int,
        limits: ExecutorLimits | None = None,
        draft: Draft | None = None,
        admission: Admission = "preempt",
        prefix_cache: bool = True,
        alike_up_to: int | None = None,
    ):
        """draft: guesses tokens for decoding requests, which their next step checks. A request's
        next step then waits for the last token, which the guesses follow: it is never in flight
        together with the one before it.

        alike_up_to: tokens of a prompt up to which its keys do not depend on its length; a longer
        prompt shares pages only with prompts of its length. That is max_position_embeddings with
        dynamic RoPE; None: keys never depend on it."""
        limits = limits or ExecutorLimits()
        self._allocator = allocator
        self._reserve = admission == "reserve"
        self._prefix_cache = prefix_cache and limits.shares_pages
        self._alike_up_to = alike_up_to
        self._max_batch_tokens = max_batch_tokens
        # A decode step holds one token of each running request.
        self._max_running = min(max_batch_size, max_batch_tokens)
        self.mixed = limits.mixed
        """Whether prompts and decoding requests may be in one step; may be set between steps."""
        self._max_scored = max_batch_tokens
        if limits.max_logits_rows is not None:
            self._max_scored = limits.max_logits_rows
        self._draft = draft
        self._decoded_last = False
        """Whether the last step done decoded; an executor that does not mix takes prompts next."""
        self._num_added = 0
        self._waiting: list[Request] = []
        self._running: list[Request] = []
        """Both in order of arrival."""
        self._in_flight: list[Step] = []
        self._leaving: dict[Request, bool] = {}
        """Requests whose pages are free once no step with them is in flight, and whether they were
        preempted: they wait again then."""
        self._preempted: list[Request] = []
        """Requests that were preempted and that nobody was told of."""
        self._finds_pages: bool | None = None
        """Whether the allocator finds pages that were committed; None: not known yet."""
        self._refused: tuple[int, int] | None = None
        """The arrival of the last request for which there was no room, and how much there was, in
        pages."""
        self._ended: list[str] = []
        """Ids of requests that the executor has not been told of."""

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def add(self, request: Request) -> None:
        """Queue a request. Raises OutOfPagesError if the whole cache is too small for it."""
        pages = self._pages_for(request.max_cached_tokens)
        if pages > self._allocator.total_pages:
            raise OutOfPagesError(
                f"request {request.request_id!r} needs {pages} KV cache pages for its "
                f"{len(request.prompt_token_ids)} prompt tokens and {request.max_new_tokens} new "
                f"ones; the cache has {self._allocator.total_pages} "
                f"({self._allocator.free_pages} free): raise total_pages or lower max_new_tokens"
            )
        request.arrival = self._num_added
        self._num_added += 1
        self._waiting.append(request)

    def remove(self, request: Request) -> None:
        """Remove a request, finished or not; removing it again does nothing.

        Its pages are free at once, or when the steps in flight that it is in have ended.
        """
        if request in self._running:
            self._running.remove(request)
            self._leaving[request] = False
            self._free_left()
        elif request in self._leaving:
            self._leaving[request] = False
        elif request in self._waiting:
            self._waiting.remove(request)
            self._refused = None

    def admit(self) -> list[Request]:
        """Start the requests at the head of the queue for which there is room. Returns those that
        start for the first time.

        A request waits while an older one computes a page that both can hold; younger ones may
        start before it.
        """
        admitted = []
        leaving = {request.request_id for request in self._leaving}
        for request in tuple(islice(self._waiting, self._max_running)):
            if len(self._running) == self._max_running:
                break
            # A request may have the id of one that was aborted and is still in a step in flight.
            if request.request_id in leaving or self._awaits_page(request):
                continue
            if not self._start(request):
                break
            self._waiting.remove(request)
            insort(self._running, request, key=_arrival)
            if not request.preemptions:
                admitted.append(request)
        return admitted

    def preempted(self) -> list[Request]:
        """The requests that were preempted since the last call."""
        told, self._preempted = self._preempted, []
        return told

    def _awaits_page(self, request: Request) -> bool:
        """Whether an older request is about to compute a page that this one can hold too."""
        if not self._prefix_cache or request.num_prompt_logprobs is not None:
            return False
        size, mine = self._allocator.page_size, request.prompt_token_ids
        for older in self._running:
            if older.arrival > request.arrival:
                break
            start = older.num_computed // size * size
            stop = start + size
            if stop > len(older.prompt_token_ids) or stop >= len(mine):
                continue
            theirs = older.prompt_token_ids
            same = mine[start:stop] == theirs[start:stop] and mine[:start] == theirs[:start]
            if same and self._salt(older) == self._salt(request):
                return self._finds_pages is not False
        return False

    def _start(self, request: Request) -> bool:
        """Give a waiting request pages for its tokens so far, or nothing if there is no room."""
        allocator, name = self._allocator, request.request_id
        available = allocator.free_pages + allocator.evictable_pages
        room = available - sum(map(self._may_grow, self._running))
        if self._reserve:
            held = [*self._running, *self._leaving]
            promised = sum(self._pages_for(r.max_cached_tokens) for r in held)
            if promised + self._pages_for(request.max_cached_tokens) > allocator.total_pages:
                return False
        elif self._refused and self._refused[0] == request.arrival and room <= self._refused[1]:
            return False
        tokens = request.tokens(0, request.num_known)
        cached = allocator.allocate(
            name, tokens, max_cached=self._max_cached(request), salt=self._salt(request)
        )
        if not self._reserve:
            found = available - allocator.free_pages - allocator.evictable_pages
            missing = self._pages_for(request.num_known) - cached // allocator.page_size
            if missing + found > room:
                allocator.free(name)
                self._refused = request.arrival, room
                return False
        self._refused = None
        allocator.extend(name, request.num_known)
        request.num_computed = cached
        if not request.preemptions:
            request.cached_tokens = cached
        return True

    def _salt(self, request: Request) -> bytes:
        """What requests must have in common to share pages (``KvAllocator.allocate``)."""
        length = len(request.prompt_token_ids)
        if self._alike_up_to is None or length <= self._alike_up_to:
            return b""
        return length.to_bytes(8, "little")

    def _may_grow(self, request: Request) -> bool:
        """Whether a running request may soon need one more page."""
        held = len(self._allocator.pages(request.request_id))
        return held < self._pages_for(request.max_cached_tokens)

    def _max_cached(self, request: Request) -> int:
        """How many tokens may be found in the cache; those of the prompt that are still to be
        scored must be computed."""
        if not self._prefix_cache:
            return 0
        return len(request.prompt_logprobs) if request.is_scoring else request.num_known - 1

    def schedule(self) -> Step | None:
        """The next step of the requests that were admitted, or None when nothing can run now. May
        preempt the youngest of them, so that older ones get a page.

        Called with one step in flight at most. Nothing counts as computed until ``done`` commits
        the step: one that failed, or was interrupted, is scheduled again.
        """
        before = self._in_flight[-1].parts if self._in_flight else ()
        in_flight = {part.request.request_id: part for part in before}
        decoding: list[_Ready] = []
        prompts: list[_Ready] = []
        for request in self._running:
            ready = self._ready(request, in_flight.get(request.request_id))
            if ready:
                decodes = ready.left == 1 and ready.start >= len(request.prompt_token_ids)
                (decoding if decodes else prompts).append(ready)
        if self.mixed or not (decoding and prompts):
            return self._next(decoding, prompts)
        decoded = any(part.decoding for part in before) if before else self._decoded_last
        if decoded:
            return self._next([], prompts) or self._next(decoding, [])
        return self._next(decoding, []) or self._next([], prompts)

    def _next(self, decoding: Sequence[_Ready], prompts: Sequence[_Ready]) -> Step | None:
        # The oldest come first, so that nobody who is in the step gives way to one behind it.
        decoding = [ready for ready in decoding if self._hold(ready)]
        prompts = [ready for ready in prompts if ready.request in self._running]
        chunks = self._chunks(prompts, self._max_batch_tokens - len(decoding))
        room = self._max_batch_tokens - len(decoding) - sum(length for _, length, _ in chunks)
        chosen: list[_Chosen] = []
        for ready in decoding:
            drafts = self._drafts(ready, room)
            room -= len(drafts)
            chosen.append((ready, 1, drafts))
        chosen += chunks
        return self._step(chosen, len(decoding)) if chosen else None

    def _hold(self, ready: _Ready) -> bool:
        """Give a decoding request a page for its next token, if need be one of a younger request.

        Returns False for a request that gave way, or that must wait for a page.
        """
        request = ready.request
        while request in self._running:
            try:
                self._allocator.extend(request.request_id, ready.start + 1)
                return True
            except OutOfPagesError:
                if self._running == [request] and not self._leaving:
                    raise  # there was room for it when it was added
                if self._leaving or self._running[-1] is request:
                    return False
                self._preempt(self._running[-1])
        return False

    def _preempt(self, request: Request) -> None:
        request.preemptions += 1
        self._running.remove(request)
        self._preempted.append(request)
        self._leaving[request] = True
        self._free_left()

    def launched(self, step: Step) -> None:
        """Count a step as in flight: the next one continues where it ends."""
        self._in_flight.append(step)
        self._told(step)

    def done(self, step: Step) -> None:
        """Commit a step: its keys and values are in the KV cache. The tokens that it sampled must
        have been added to their requests. Doing it again changes nothing."""
        for part in step.parts:
            request, before = part.request, part.request.num_computed
            # The last token of the output has not run; drafts that were wrong do not count.
            computed = request.num_computed = min(part.stop, request.num_known - 1)
            size = self._allocator.page_size
            fills_page = self._prefix_cache and computed // size > before // size
            if not (fills_page or computed < part.stop):
                continue
            if request in self._running or self._leaving.get(request):
                # The pages of one that has ended may be in the step that follows in flight.
                if computed < part.stop and not request.finish_reason:
                    self._allocator.truncate(request.request_id, computed)
                if fills_page:
                    self._commit(request)
        self._told(step)
        self._decoded_last = any(part.decoding for part in step.parts)
        self._landed(step)

    def _commit(self, request: Request) -> None:
        tokens = request.tokens(0, request.num_computed)
        self._allocator.commit(request.request_id, tokens)
        if self._finds_pages is None:
            another = "\0"
            found = self._allocator.allocate(
                another, [*tokens, 0], max_cached=len(tokens), salt=self._salt(request)
            )
            self._allocator.free(another)
            self._finds_pages = found > 0

    def undone(self, step: Step) -> None:
        """Forget a step that failed, or whose results are void. Doing it again changes nothing."""
        ended = step.batch.ended_request_ids
        self._ended += [name for name in ended if name not in self._ended]
        self._landed(step)

    def _landed(self, step: Step) -> None:
        if step in self._in_flight:
            self._in_flight.remove(step)
        self._free_left()

    def _told(self, step: Step) -> None:
        if told := step.batch.ended_request_ids:
            self._ended = [name for name in self._ended if name not in told]

    def _ready(self, request: Request, before: Part | None) -> _Ready | None:
        """before: the request's part of the step in flight."""
        start, known, source = request.num_computed, request.num_known, -1
        if before:
            start = before.stop
            in_flight = before.sampled and request.sampled_by_executor and self._draft is None
            if in_flight and known == start:
                known, source = known + 1, before.sampled.start
                if known - len(request.prompt_token_ids) == request.max_new_tokens:
                    return None
        if request.finish_reason or known <= start:
            return None
        return _Ready(request, start, known - start, source)

    def _chunks(self, prompts: Sequence[_Ready], room: int) -> list[_Chosen]:
        chunks: list[_Chosen] = []
        rows = self._max_scored
        for ready in prompts:
            length = min(ready.left, room)
            if _num_scored(ready, length) > rows:
                length = rows
            if length:
                chunks.append((ready, length, ()))
                room -= length
                rows -= _num_scored(ready, length)
        return chunks

    def _drafts(self, ready: _Ready, room: int) -> Sequence[int]:
        request = ready.request
        if self._draft is None or not request.takes_drafts:
            return ()
        most = min(room, request.max_new_tokens - len(request.output_token_ids) - 1)
        drafts = tuple(self._draft(request, most))[:most] if most > 0 else ()
        try:
            self._allocator.extend(request.request_id, ready.start + 1 + len(drafts))
        except OutOfPagesError:
            return ()
        return drafts

    def _step(self, chosen: Sequence[_Chosen], num_decoding: int) -> Step:
        token_ids: list[int] = []
        sources: list[tuple[int, int]] = []
        rows: list[int] = []
        parts = []
        for number, (ready, length, drafts) in enumerate(chosen):
            request, start, row = ready.request, ready.start, len(token_ids)
            stop = start + length + len(drafts)
            token_ids += request.tokens(start, start + length)
            if len(token_ids) < row + length:
                sources.append((len(token_ids), ready.source))
                token_ids.append(0)
            token_ids += drafts
            scored = range(len(rows), len(rows) + _num_scored(ready, length))
            rows += range(row, row + len(scored))
            sampled = range(0)
            if length == ready.left:
                sampled = range(len(rows), len(rows) + 1 + len(drafts))
                rows += range(len(token_ids) - len(sampled), len(token_ids))
            decoding = number < num_decoding
            parts.append(Part(request, start, stop, drafts, decoding, scored, sampled))
        batch = self._batch(parts, token_ids, rows)
        for at, source in sources:
            batch.token_source[at] = source
        return Step(batch, tuple(parts))

    def _batch(self, parts: Sequence[Part], token_ids: list[int], rows: list[int]) -> StepBatch:
        size, held = self._allocator.page_size, []
        for part in parts:
            held.append(self._allocator.pages(part.request.request_id))
        table = np.full((len(parts), max(map(len, held))), -1, dtype=np.int32)
        for i, pages in enumerate(held):
            table[i, : len(pages)] = pages
        starts = np.array([part.start for part in parts], dtype=np.int32)
        stops = np.array([part.stop for part in parts], dtype=np.int32)
        lengths = stops - starts
        query_starts = np.zeros(len(parts) + 1, dtype=np.int32)
        np.cumsum(lengths, out=query_starts[1:])
        sequence = np.repeat(np.arange(len(parts)), lengths)
        positions = np.arange(len(token_ids), dtype=np.int32)
        positions += np.repeat(starts - query_starts[:-1], lengths)
        slots = table[sequence, positions // size] * np.int32(size) + positions % size
        return StepBatch(
            token_ids=torch.tensor(token_ids, dtype=torch.int64),
            positions=torch.from_numpy(positions),
            slot_mapping=torch.from_numpy(slots),
            block_table=torch.from_numpy(table),
            context_lens=torch.from_numpy(stops),
            query_starts=torch.from_numpy(query_starts),
            max_query_len=int(lengths.max()),
            num_drafts=torch.tensor([len(part.drafts) for part in parts], dtype=torch.int32),
            logits_rows=torch.tensor(rows, dtype=torch.int64),
            prompt_lens=torch.tensor(
                [len(part.request.prompt_token_ids) for part in parts], dtype=torch.int32
            ),
            request_ids=tuple(part.request.request_id for part in parts),
            ended_request_ids=tuple(self._ended),
        )

    def _free_left(self) -> None:
        """Free the pages of the leaving requests that are in no step in flight."""
        for request, waits_again in tuple(self._leaving.items()):
            if any(request in step.requests for step in self._in_flight):
                continue
            del self._leaving[request]
            self._allocator.free(request.request_id)
            self._ended.append(request.request_id)
            if waits_again:
                request.num_computed = 0
                insort(self._waiting, request, key=_arrival)

    def _pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._allocator.page_size)


def _arrival(request: Request) -> int:
    return request.arrival


def _num_scored(ready: _Ready, length: int) -> int:
    """How many of the next tokens give a log-probability of the prompt token after them."""
    if not ready.request.is_scoring:
        return 0
    return max(0, min(length, len(ready.request.prompt_token_ids) - 1 - ready.start))
