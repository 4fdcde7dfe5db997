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


_Chosen = tuple[Request, int, Sequence[int]]
"""A request, how many of its tokens run next, drafts included, and the drafts."""


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
        """draft: guesses tokens for decoding requests, which their next step checks."""
        limits = limits or ExecutorLimits()
        self._allocator = allocator
        self._max_batch_tokens = max_batch_tokens
        # A decode step holds one token of each running request.
        self._max_running = min(max_batch_size, max_batch_tokens)
        self.mixed = limits.mixed
        """Whether prompts and decoding requests may be in one step; may be set between steps."""
        self._max_scored = limits.max_logits_rows or max_batch_tokens
        self._draft = draft
        self._decoded_last = False
        """Whether the last step decoded; an executor that does not mix takes prompts next."""
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
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
            if request.steps_in_flight:
                self._leaving.append(request)
            else:
                self._free(request)
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

        Nothing counts as computed until ``done`` commits the step: one that failed, or was
        interrupted, is scheduled again.
        """
        decoding: list[Request] = []
        prompts: list[Request] = []
        for request in self._running:
            left = request.num_known - request.num_scheduled
            if left < 1 or self._is_last(request):
                continue
            decodes = left == 1 and request.num_scheduled >= len(request.prompt_token_ids)
            (decoding if decodes else prompts).append(request)
        if decoding and prompts and not self.mixed:
            decoding, prompts = ([], prompts) if self._decoded_last else (decoding, [])
        room = self._max_batch_tokens - len(decoding)
        chosen: list[_Chosen] = []
        for request in decoding:
            drafts = self._drafts(request, room)
            room -= len(drafts)
            chosen.append((request, 1 + len(drafts), drafts))
        for request in prompts:
            if request.num_prompt_logprobs is not None:
                length = min(request.num_known - request.num_scheduled, room, self._max_scored)
            else:
                length = min(request.num_known - request.num_scheduled, room)
            if length == 0:
                break
            chosen.append((request, length, ()))
            room -= length
        return self._step(chosen, len(decoding)) if chosen else None

    def launched(self, step: Step) -> None:
        """Count a step as in flight: the next one continues where it ends."""
        for part in step.parts:
            request = part.request
            request.steps_in_flight += 1
            request.num_in_flight += part.stop - part.start
            if part.sampled and request.sampled_by_executor and not part.drafts:
                request.source_row = part.sampled.start

    def done(self, step: Step) -> None:
        """Commit a step: its keys and values are in the KV cache. The tokens that it sampled must
        have been added to their requests."""
        for part in step.parts:
            request = part.request
            known = len(request.prompt_token_ids) + len(request.output_token_ids)
            # The last token of the output has not run; drafts that were wrong do not count.
            request.num_computed = min(part.stop, known - 1)
            if request.num_computed < part.stop and request in self._running:
                self._allocator.truncate(request.request_id, request.num_computed)
        self._landed(step)
        self._decoded_last = any(part.decoding for part in step.parts)

    def undone(self, step: Step) -> None:
        """Forget a step in flight that failed, or whose results are void."""
        self._landed(step)
        self._ended += step.batch.ended_request_ids

    def _landed(self, step: Step) -> None:
        for part in step.parts:
            request = part.request
            if not request.steps_in_flight:
                continue  # the step was not in flight
            request.steps_in_flight -= 1
            request.num_in_flight -= part.stop - part.start
            if request.steps_in_flight:
                continue
            request.source_row = -1
            if request in self._leaving:
                self._leaving.remove(request)
                self._free(request)

    @staticmethod
    def _is_last(request: Request) -> bool:
        """Whether a request gets its last token from a step in flight, or has it."""
        in_flight = request.source_row >= 0
        count = len(request.output_token_ids) + in_flight
        return bool(request.finish_reason) or (in_flight and count >= request.max_new_tokens)

    def _drafts(self, request: Request, room: int) -> Sequence[int]:
        if self._draft is None or request.source_row >= 0:
            return ()
        most = min(room, request.max_new_tokens - len(request.output_token_ids) - 1)
        return tuple(self._draft(request, most))[:most] if most > 0 else ()

    def _step(
        self, chosen: Sequence[tuple[Request, int, Sequence[int]]], num_decoding: int
    ) -> Step:
        token_ids: list[int] = []
        sources: list[tuple[int, int]] = []
        rows: list[int] = []
        parts = []
        for number, (request, length, drafts) in enumerate(chosen):
            start, row = request.num_scheduled, len(token_ids)
            stop = start + length
            self._allocator.extend(request.request_id, stop)
            token_ids += request.tokens(start, stop - len(drafts))
            token_ids += drafts
            if len(token_ids) < row + length:
                sources.append((len(token_ids), request.source_row))
                token_ids.append(0)
            scored = range(0)
            if request.num_prompt_logprobs is not None:
                count = min(stop, len(request.prompt_token_ids) - 1) - start
                scored = range(len(rows), len(rows) + max(count, 0))
                rows += range(row, row + len(scored))
            sampled = range(0)
            if stop == request.num_known + len(drafts):
                sampled = range(len(rows), len(rows) + 1 + len(drafts))
                rows += range(row + length - len(sampled), row + length)
            decoding = number < num_decoding
            parts.append(Part(request, start, stop, drafts, decoding, scored, sampled))
        batch = self._batch(parts, token_ids, rows)
        for at, source in sources:
            batch.token_source[at] = source
        self._ended.clear()
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

    def _free(self, request: Request) -> None:
        self._allocator.free(request.request_id)
        self._ended.append(request.request_id)

    def _pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._allocator.page_size)
