"""Decides which tokens run in the next step.

Requests wait in a queue. A request starts when the batch has a free place and the KV cache is
guaranteed to hold its last token, whatever else is running, so a running request never runs out of
pages. Prompts go first, in chunks when they are long; when no prompt is left, every running request
decodes one token.
"""

from collections import deque
from collections.abc import Sequence

import torch
from attrs import frozen

from tilewright.errors import OutOfPagesError
from tilewright.request import Request
from tilewright.types import KvAllocator, Phase, StepBatch


@frozen(eq=False)
class Step:
    """A batch to run, and its requests."""

    phase: Phase
    batch: StepBatch
    requests: tuple[Request, ...]
    computed: tuple[int, ...]
    """Per request: num_computed once the step has run."""
    sampled: tuple[Request, ...]
    """The requests that get their next token from this step, in order of the logits' rows."""


class Scheduler:
    """Holds one model's unfinished requests."""

    def __init__(self, allocator: KvAllocator, max_batch_size: int, max_batch_tokens: int):
        self._allocator = allocator
        self._max_batch_tokens = max_batch_tokens
        # A decode step holds one token of each running request.
        self._max_running = min(max_batch_size, max_batch_tokens)
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []

    def add(self, request: Request) -> None:
        """Queue a request. Raises OutOfPagesError if the whole cache is too small for it."""
        pages = self._allocator.pages_for(request.max_cached_tokens)
        if pages > self._allocator.total_pages:
            raise OutOfPagesError(
                f"request {request.request_id!r} needs {pages} KV cache pages for its "
                f"{len(request.prompt_token_ids)} prompt tokens and {request.max_new_tokens} new "
                f"ones; the cache has {self._allocator.total_pages} "
                f"({self._allocator.free_pages} free): raise total_pages or lower max_new_tokens"
            )
        self._waiting.append(request)

    def remove(self, request: Request) -> None:
        """Remove a request, finished or not, and free its pages. Removing it again does nothing."""
        if request in self._running:
            self._running.remove(request)
            self._allocator.free(request.request_id)
        elif request in self._waiting:
            self._waiting.remove(request)

    def schedule(self) -> Step | None:
        """The next step, or None when nothing is left to do.

        Nothing counts as computed until ``done`` commits the step: a failed step is scheduled
        again.
        """
        self._admit()
        prompts = [r for r in self._running if r.num_computed < len(r.prompt_token_ids)]
        if not prompts:
            return self._step("decode", self._running, [1] * len(self._running))
        chosen, lengths, room = [], [], self._max_batch_tokens
        for request in prompts:
            length = min(len(request.prompt_token_ids) - request.num_computed, room)
            if length == 0:
                break
            chosen.append(request)
            lengths.append(length)
            room -= length
        return self._step("prefill", chosen, lengths)

    @staticmethod
    def done(step: Step) -> None:
        """Commit a step: its keys and values are in the KV cache."""
        for request, computed in zip(step.requests, step.computed, strict=True):
            request.num_computed = computed

    def _admit(self) -> None:
        pages_for = self._allocator.pages_for
        promised = sum(pages_for(r.max_cached_tokens) for r in self._running)
        while self._waiting and len(self._running) < self._max_running:
            request = self._waiting[0]
            promised += pages_for(request.max_cached_tokens)
            if promised > self._allocator.total_pages:
                break
            self._allocator.allocate(request.request_id, len(request.prompt_token_ids))
            self._running.append(self._waiting.popleft())

    def _step(
        self, phase: Phase, requests: Sequence[Request], lengths: Sequence[int]
    ) -> Step | None:
        if not requests:
            return None
        token_ids: list[int] = []
        positions: list[int] = []
        slots, starts, computed, rows, sampled = [], [0], [], [], []
        for request, length in zip(requests, lengths, strict=True):
            start, stop = request.num_computed, request.num_computed + length
            missing = stop - self._allocator.num_tokens(request.request_id)
            if missing > 0:
                self._allocator.extend(request.request_id, missing)
            token_ids += request.tokens(start, stop)
            positions += range(start, stop)
            slots.append(self._allocator.slots(request.request_id, start, stop))
            starts.append(len(token_ids))
            computed.append(stop)
            if stop == len(request.prompt_token_ids) + len(request.output_token_ids):
                rows.append(len(token_ids) - 1)
                sampled.append(request)
        batch = StepBatch(
            token_ids=torch.tensor(token_ids, dtype=torch.int64),
            positions=torch.tensor(positions, dtype=torch.int32),
            slot_mapping=torch.cat(slots),
            block_table=self._allocator.block_table([r.request_id for r in requests]),
            context_lens=torch.tensor(computed, dtype=torch.int32),
            query_starts=torch.tensor(starts, dtype=torch.int32),
            logits_rows=torch.tensor(rows, dtype=torch.int64),
        )
        return Step(phase, batch, tuple(requests), tuple(computed), tuple(sampled))
