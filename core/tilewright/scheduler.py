"""Decides which tokens run in the next step.

Requests wait in a queue. A request starts when the batch has a free place and the KV cache is
guaranteed to hold its last token, whatever else is running, so a running request never runs out of
pages. A step has a budget of tokens: requests that decode come first, with one token each, then the
prompts in what is left, in chunks when they are long.
"""

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import torch
from attrs import frozen

from tilewright.errors import OutOfPagesError
from tilewright.request import Request
from tilewright.types import ExecutorLimits, KvAllocator, StepBatch

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
    ):
        """draft: guesses tokens for decoding requests, which their next step checks. A request's
        next step then waits for the last token, which the guesses follow."""
        limits = limits or ExecutorLimits()
        self._allocator = allocator
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
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._in_flight: list[Step] = []
        self._leaving: list[Request] = []
        """Requests that were removed while a step with them is in flight."""
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
        self._waiting.append(request)

    def remove(self, request: Request) -> None:
        """Remove a request, finished or not; removing it again does nothing.

        Its pages are free at once, or when the steps in flight that it is in have ended.
        """
        if request in self._running:
            self._running.remove(request)
            self._leaving.append(request)
            self._free_left()
        elif request in self._waiting:
            self._waiting.remove(request)

    def admit(self) -> list[Request]:
        """Start the requests at the head of the queue for which there is room; returns them."""
        promised = sum(self._pages_for(r.max_cached_tokens) for r in self._running + self._leaving)
        admitted = []
        while self._waiting and len(self._running) < self._max_running:
            request = self._waiting[0]
            promised += self._pages_for(request.max_cached_tokens)
            if promised > self._allocator.total_pages:
                break
            request.cached_tokens = request.num_computed = self._allocator.allocate(
                request.request_id, request.prompt_token_ids, max_cached=0
            )
            admitted.append(self._waiting.popleft())
            self._running.append(request)
        return admitted

    def schedule(self) -> Step | None:
        """The next step of the requests that were admitted, or None when nothing can run now.

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
        if decoding and prompts and not self.mixed:
            decoded = any(part.decoding for part in before) if before else self._decoded_last
            decoding, prompts = ([], prompts) if decoded else (decoding, [])
        chunks = self._chunks(prompts, self._max_batch_tokens - len(decoding))
        room = self._max_batch_tokens - len(decoding) - sum(length for _, length, _ in chunks)
        chosen: list[_Chosen] = []
        for ready in decoding:
            drafts = self._drafts(ready.request, room)
            room -= len(drafts)
            chosen.append((ready, 1, drafts))
        chosen += chunks
        return self._step(chosen, len(decoding)) if chosen else None

    def launched(self, step: Step) -> None:
        """Count a step as in flight: the next one continues where it ends."""
        self._in_flight.append(step)
        self._told(step)

    def done(self, step: Step) -> None:
        """Commit a step: its keys and values are in the KV cache. The tokens that it sampled must
        have been added to their requests. Doing it again changes nothing."""
        for part in step.parts:
            request = part.request
            # The last token of the output has not run; drafts that were wrong do not count.
            request.num_computed = min(part.stop, request.num_known - 1)
            if request.num_computed < part.stop and request in self._running:
                self._allocator.truncate(request.request_id, request.num_computed)
        self._told(step)
        self._decoded_last = any(part.decoding for part in step.parts)
        self._landed(step)

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

    def _drafts(self, request: Request, room: int) -> Sequence[int]:
        if self._draft is None:
            return ()
        most = min(room, request.max_new_tokens - len(request.output_token_ids) - 1)
        return tuple(self._draft(request, most))[:most] if most > 0 else ()

    def _step(self, chosen: Sequence[_Chosen], num_decoding: int) -> Step:
        token_ids: list[int] = []
        sources: list[tuple[int, int]] = []
        rows: list[int] = []
        parts = []
        for number, (ready, length, drafts) in enumerate(chosen):
            request, start, row = ready.request, ready.start, len(token_ids)
            stop = start + length + len(drafts)
            self._allocator.extend(request.request_id, stop)
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
            request_ids=tuple(part.request.request_id for part in parts),
            ended_request_ids=tuple(self._ended),
        )

    def _free_left(self) -> None:
        """Free the pages of the removed requests that are in no step in flight."""
        for request in tuple(self._leaving):
            if not any(request in step.requests for step in self._in_flight):
                self._leaving.remove(request)
                self._allocator.free(request.request_id)
                self._ended.append(request.request_id)

    def _pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._allocator.page_size)


def _num_scored(ready: _Ready, length: int) -> int:
    """How many of the next tokens give a log-probability of the prompt token after them."""
    if ready.request.num_prompt_logprobs is None:
        return 0
    return max(0, min(length, len(ready.request.prompt_token_ids) - 1 - ready.start))
