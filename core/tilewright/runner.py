"""One loaded model and its requests: runs their steps and ends them with a result or an error."""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from math import inf
from typing import TYPE_CHECKING, Any

from attrs import evolve, field, frozen

from tilewright.errors import (
    ExecutorLostError,
    NonFiniteLogitsError,
    PluginError,
    RequestError,
    TilewrightError,
    copied,
)
from tilewright.loading import ServedModel
from tilewright.logits_processing import (
    LogitsProcessorError,
    Place,
    Processing,
    edited,
)
from tilewright.plugins import Observers, cause, warn
from tilewright.request import Request
from tilewright.scheduler import Draft, Part, Scheduler, Step
from tilewright.types import (
    Executor,
    ModelStats,
    PendingStep,
    PreparingProcessor,
    ReplaceableSampler,
    SampledToken,
    Sampler,
    SamplerRow,
    SamplingExecutor,
    StepBatch,
    StepEvent,
    StepOutput,
    Tap,
    TokenLogprobs,
)

if TYPE_CHECKING:
    from torch import Tensor


@frozen(eq=False)
class _Forwarded:
    """A ``PendingStep`` of an executor that does not sample: runs when it is waited for."""

    executor: Executor
    batch: StepBatch
    tap: "Tap | None"

    def wait(self) -> StepOutput:
        logits = self.executor.forward(self.batch, self.tap)
        return StepOutput(tokens=[None] * len(self.batch.logits_rows), logits=logits)


@frozen(eq=False)
class _Refused:
    """A ``PendingStep`` that could not be submitted."""

    error: Exception

    def wait(self) -> StepOutput:
        raise self.error


@frozen(eq=False)
class _InFlight:
    """A step that is running, or about to run."""

    step: Step
    pending: PendingStep
    by_executor: Sequence[SamplerRow | None]
    """For each row of logits, how the executor samples it; None: it returns the logits."""
    started: float = field(factory=time.perf_counter)


class Runner:
    """Runs a model's steps: ``add`` requests, ``step`` while there are ``requests``, and ``poll``
    for those that have something new. A request leaves ``requests`` when it is over or aborted.

    One thread at a time may use it. Up to two steps are in flight when the executor samples and no
    observer listens to tensors; a step counts once it is done. A step that ends the last
    request also waits for all steps in flight.
    """

    def __init__(
        self,
        model: ServedModel,
        sampler: Sampler,
        observers: Observers,
        executor_name: str,
        sampler_name: str,
        processors: Callable[[str], Processing] | None = None,
        draft: Draft | None = None,
    ):
        """The names are those of the plugins, for error messages.

        processors: the logits processor of a name, without a state yet.
        draft: guesses the next tokens of a request, which are checked many at a time.
        """
        self._processors = processors
        self._failed_to_end: set[str] = set()
        """Names of the logits processors whose ``end`` has raised."""
        self.model = model
        self.requests: dict[str, Request] = {}
        self.num_steps = 0
        self._num_requests = self._num_preemptions = 0
        self._num_prompt_tokens = self._num_cached_tokens = 0
        self._num_new_tokens = 0
        self._num_drafted_tokens = self._num_accepted_tokens = 0
        self._closed: RequestError | None = None
        """Why no request is accepted any more."""
        self._news: dict[Request, None] = {}
        self._lost: ExecutorLostError | None = None
        self._depth = 0
        """Steps that are running: an observer may run one in a step's events."""
        self._sampler = sampler
        self._executor_name = executor_name
        self._sampler_name = sampler_name
        self._observers = observers
        executor = model.executor
        self._submits = executor if isinstance(executor, SamplingExecutor) else None
        self._in_flight: deque[_InFlight] = deque()
        self._computing = False
        """Whether the executor is in a step."""
        self._void = False
        """Whether the results of the steps in flight are void, since one before them failed."""
        self._last_done = 0.0
        """When the last step was done, on time.perf_counter's clock."""
        runtime, config = model.runtime, model.loaded.config
        self._scheduler = Scheduler(
            model.allocator,
            runtime.max_batch_size,
            runtime.max_batch_tokens,
            model.executor.limits,
            draft,
            runtime.admission,
            runtime.prefix_cache,
            config.max_position_embeddings if config.rope.kind == "dynamic" else None,
        )

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises OutOfPagesError if the whole cache is too small for it, ExecutorLostError when the
        device of the executor is gone, and RequestError for a request id that is in use, for an
        argument that a logits processor cannot take, and after ``close``.
        """
        if self._closed:
            raise copied(self._closed)
        if self._lost:
            raise copied(self._lost)
        if request.arrival >= 0:
            raise RequestError(
                f"request {request.request_id!r} was added before: make a new one for each use"
            )
        if request.request_id in self.requests:
            raise RequestError(
                f"a request of model {self.model.model_id!r} has the id {request.request_id!r} "
                "already: choose another, or wait until that request has ended"
            )
        sampler = self._sampler
        if (
            self._submits
            and isinstance(sampler, ReplaceableSampler)
            and not request.logits_processors
        ):
            request.sampled_by_executor = all(
                sampler.replaceable(params) and self._submits.serves(params)
                for params in (request.params, request.early_params)
            )
        self._begin_processing(request)
        try:
            self._scheduler.add(request)
        except BaseException:
            self._end_processing(request)
            raise
        self.requests[request.request_id] = request
        self._num_requests += 1
        self._notify(
            "on_request_submitted",
            request,
            num_prompt_tokens=len(request.prompt_token_ids),
            max_new_tokens=request.max_new_tokens,
        )

    def prepare_processors(self, arguments: Mapping[str, Any]) -> None:
        """Make the logits processors of these names, which may read a vocabulary for seconds, and
        have them prepare their arguments.

        Any thread may call this. Otherwise ``add`` makes those that a request is the first to name.
        Raises PluginError for a name that means no plugin, and for a plugin that fails, and
        RequestError for an argument that a processor cannot take.
        """
        assert self._processors or not arguments
        for name, argument in arguments.items():
            one = self._processors(name)  # type: ignore[misc]
            if isinstance(one.processor, PreparingProcessor):
                one.call("prepare", argument)

    def _begin_processing(self, request: Request) -> None:
        assert self._processors or not request.logits_processors
        try:
            for name, argument in request.logits_processors.items():
                one = self._processors(name)  # type: ignore[misc]
                prompt = request.prompt_token_ids
                state = one.call("begin", request.request_id, argument, prompt)
                request.processing.append(evolve(one, state=state))
        except BaseException:
            self._end_processing(request)
            raise

    def _end_processing(self, request: Request) -> None:
        """Tell the logits processors that a request has ended, which nothing can change any more.

        Warns of the first failure of each.
        """
        for one in request.processing:
            try:
                one.call("end", one.state)
            except Exception as error:
                if one.name not in self._failed_to_end:
                    self._failed_to_end.add(one.name)
                    warn(str(error))
        request.processing.clear()

    def abort(self, request: Request) -> None:
        """End a request with what it has generated; does nothing if it has ended.

        Its pages are free when the steps in flight that it is in have ended; if no request is left,
        they are waited for. A finaliser may call this anywhere in a step, so the request leaves at
        the step's end.
        """
        if self.requests.get(request.request_id) is request and request.result is None:
            request.finish_reason = request.finish_reason or "aborted"
            request.finish(self.model)
            if not self._depth:
                self._tell_preempted()
                self._finish(request)
                self._settle()

    def poll(self) -> list[Request]:
        """The requests that have new tokens, or have ended, since the last call."""
        news, self._news = self._news, {}
        return list(news)

    def stats(self) -> ModelStats:
        """May be called from any thread."""
        return ModelStats(
            model_id=self.model.model_id,
            **self._counts(),
            num_steps=self.num_steps,
            num_requests=self._num_requests,
            num_preemptions=self._num_preemptions,
            num_prompt_tokens=self._num_prompt_tokens,
            num_cached_tokens=self._num_cached_tokens,
            num_new_tokens=self._num_new_tokens,
            num_drafted_tokens=self._num_drafted_tokens,
            num_accepted_tokens=self._num_accepted_tokens,
        )

    def _counts(self) -> dict[str, int]:
        """What is in the queue, in the batch and in the KV cache now."""
        allocator, evictable = self.model.allocator, self.model.allocator.evictable_pages
        return {
            "num_waiting": self._scheduler.num_waiting,
            "num_running": self._scheduler.num_running,
            "used_pages": allocator.total_pages - allocator.free_pages - evictable,
            "cached_pages": evictable,
            "total_pages": allocator.total_pages,
        }

    def fail(self, error: BaseException) -> None:
        """End all requests with an error."""
        for request in list(self.requests.values()):
            self._fail(request, error)
        self._settle()

    def _settle(self) -> None:
        """Wait for what is in flight if no request is left, so that its pages are free."""
        if not self.requests and not self._depth:
            self._discard_in_flight()

    def close(self, reason: RequestError) -> None:
        """End all requests with an error, and free the model: at once, or when a step has ended.

        Closing again does nothing.
        """
        if self._closed:
            return
        self._closed = reason
        try:
            self.fail(reason)
        finally:
            if not self._depth:
                self._close_executor()

    def step(self) -> None:
        """Run until the oldest step is done, for every request that is in it.

        Raises RequestError in an ``on_tensor`` event, in which the executor is computing a step.
        """
        self.check_not_computing()
        self._depth += 1
        try:
            self._step()
            while self._in_flight and not self.requests and not self._closed:
                self._step()
        finally:
            self._depth -= 1
            if self._closed and not self._depth:
                self._close_executor()

    def check_not_computing(self) -> None:
        if self._computing:
            raise RequestError(
                f"an observer of model {self.model.model_id!r} generates with that model in an "
                "on_tensor event, while the executor computes a step: do it in on_step"
            )

    def _close_executor(self) -> None:
        try:
            self._discard_in_flight()
        finally:
            self.model.executor.close()

    def _step(self) -> None:
        # Left over if Ctrl-C or an observer interrupted a step.
        if self._void:
            self._discard_in_flight()
        self._finish_ended()
        running = self._next()
        if running is None:
            if self.requests:
                raise PluginError(
                    f"no request of model {self.model.model_id!r} can run, though the KV cache is "
                    "large enough for each: its kv_allocator does not give the pages that it "
                    "counts as free or evictable"
                )
            return
        step, plugin = running.step, self._executor_name
        try:
            output = self._output(running)
            plugin = self._sampler_name
            tokens = self._sampled(step, output)
            _score(step, output)
        except Exception as error:
            self._failed(running, plugin, error)
            return
        # Accept tokens, then commit: if Ctrl-C falls between the two, a token is computed twice.
        accepted = 0
        for part in step.parts:
            request, before = part.request, len(part.request.output_token_ids)
            try:
                _accept(part, tokens)
            except LogitsProcessorError as error:
                self._fail(request, error)
            added = len(request.output_token_ids) - before
            self._num_new_tokens += added
            request.drafted_tokens += len(part.drafts)
            request.accepted_tokens += max(added - 1, 0)
            accepted += max(added - 1, 0)
            if added:
                self._news[request] = None
        self._scheduler.done(step)
        if running in self._in_flight:
            self._in_flight.remove(running)
        started, self._last_done = max(running.started, self._last_done), time.perf_counter()
        self._report(step, accepted, self._last_done - started)
        self._finish_ended()

    def _next(self) -> _InFlight | None:
        """The oldest step: the one to wait for. Starts all that may be in flight."""
        executor, tap = self._submits, self._observers.tap(self.model.model_id)
        if executor is None or tap:
            if self._in_flight or not (step := self._schedule()):
                return self._in_flight[0] if self._in_flight else None
            forwarded = _Forwarded(self.model.executor, step.batch, tap)
            return _InFlight(step, forwarded, [None] * len(step.batch.logits_rows))
        while len(self._in_flight) < 2:
            # The step after one that was refused would follow tokens that nobody samples.
            if self._in_flight and isinstance(self._in_flight[-1].pending, _Refused):
                break
            step = self._schedule()
            if step is None:
                break
            by_executor, started = _by_executor(step), time.perf_counter()
            try:
                pending = executor.submit(step.batch, by_executor)
            except Exception as error:
                pending = _Refused(error)
            self._in_flight.append(_InFlight(step, pending, by_executor, started))
            self._scheduler.launched(step)
        return self._in_flight[0] if self._in_flight else None

    def _schedule(self) -> Step | None:
        self._tell_preempted()
        for request in self._scheduler.admit():
            self._num_prompt_tokens += len(request.prompt_token_ids)
            self._num_cached_tokens += request.cached_tokens
            self._notify("on_request_admitted", request, cached_tokens=request.cached_tokens)
        return self._scheduler.schedule()

    def _tell_preempted(self) -> None:
        for request in self._scheduler.preempted():
            self._num_preemptions += 1
            if self.requests.get(request.request_id) is request:
                self._notify("on_request_preempted", request)

    def _output(self, running: _InFlight) -> StepOutput:
        self._computing = True
        try:
            output = running.pending.wait()
        finally:
            self._computing = False
        return self._checked(running, output)

    def _checked(self, running: _InFlight, output: StepOutput) -> StepOutput:
        """Raises PluginError for an output that does not answer what the executor was asked."""
        asked = running.by_executor
        open_rows = sum(row is None for row in asked)
        found = 0 if output.logits is None else len(output.logits)
        if found != open_rows and (found or open_rows):
            raise PluginError(
                f"{self._executor_name} must return {open_rows} rows of logits, found {found}"
            )
        vocab_size = self.model.loaded.config.vocab_size
        if len(output.tokens) != len(asked) or not all(
            token is None if row is None else _is_token(token, vocab_size)
            for row, token in zip(asked, output.tokens, strict=True)
        ):
            wanted = [i for i, row in enumerate(asked) if row]
            raise PluginError(
                f"{self._executor_name} must return one token from 0 to {vocab_size - 1}, as a "
                f"SampledToken, for the rows {wanted!r:.60} of {len(asked)} and None for the "
                f"others, found {output.tokens!r:.100}"
            )
        return output

    def _sampled(self, step: Step, output: StepOutput) -> Sequence[SampledToken | None]:
        """A token for each row of logits that is sampled."""
        rows, tokens = _sampling(step), list(output.tokens)
        open_rows = [i for i, token in enumerate(tokens) if token is None]
        ours = [(at, i) for at, i in enumerate(open_rows) if rows[i] is not None]
        if ours:
            logits = output.logits
            assert logits is not None
            if len(ours) != len(logits):
                logits = logits[[at for at, _ in ours]]
            places = _processed(step, rows, {i: row for row, (_, i) in enumerate(ours)})
            if places:
                logits = edited(logits, places)
            chosen = self._sample(logits, [rows[i] for _, i in ours])  # type: ignore[misc]
            for (_, i), token in zip(ours, chosen, strict=True):
                tokens[i] = token
        return tokens

    def _sample(self, logits: "Tensor", rows: Sequence[SamplerRow]) -> Sequence[SampledToken]:
        tokens = self._sampler.sample(logits, rows)
        vocab_size = logits.shape[1]
        if len(tokens) != len(rows) or not all(_is_token(token, vocab_size) for token in tokens):
            raise PluginError(
                f"{self._sampler_name} must return one token from 0 to {vocab_size - 1}, as a "
                f"SampledToken, for each of {len(rows)} rows, found {tokens!r:.100}"
            )
        return tokens

    def _failed(self, running: _InFlight, plugin: str, error: Exception) -> None:
        """End the requests that a failed step concerns; the others are scheduled again."""
        step = running.step
        if isinstance(error, ExecutorLostError):
            self._lost = error
        self._void = True
        self._scheduler.undone(step)
        if running in self._in_flight:
            self._in_flight.remove(running)
        self._discard_in_flight()
        concerned: Sequence[Request] = step.requests
        if isinstance(error, LogitsProcessorError):
            concerned = [
                request
                for request in step.requests
                if request.processing and error.processing in (None, request.processing)
            ]
        part = None
        if isinstance(error, NonFiniteLogitsError) and error.request_id in step.batch.request_ids:
            part = step.parts[step.batch.request_ids.index(error.request_id)]
            concerned = (part.request,)
        if part or isinstance(error, LogitsProcessorError):
            # The row that failed may follow a wrong draft: the step is scheduled again without.
            drafted = [p.request for p in step.parts if p.drafts and p.request in concerned]
            for request in drafted:
                request.takes_drafts = False
            if drafted:
                return
        if part and isinstance(error, NonFiniteLogitsError):
            # The others lose nothing: the step is not committed, and is scheduled again without it.
            if part.request.request_id in self.requests:
                self._fail(part.request, _traced(error, step, part, self.model.executor))
            return
        failure = _failure_of(plugin, error)
        if isinstance(error, ExecutorLostError):
            self.fail(failure)
        for request in concerned:
            self._fail(request, failure)

    def _discard_in_flight(self) -> None:
        """Wait for the steps in flight, and forget them."""
        while self._in_flight:
            running = self._in_flight[0]
            with suppress(Exception):
                running.pending.wait()
            self._scheduler.undone(running.step)
            self._in_flight.popleft()
        self._void = False

    def _report(self, step: Step, accepted: int, seconds: float) -> None:
        drafted = sum(len(part.drafts) for part in step.parts)
        self._num_drafted_tokens += drafted
        self._num_accepted_tokens += accepted

        def event() -> StepEvent:
            lengths = [(part.stop - part.start, part.decoding) for part in step.parts]
            return StepEvent(
                model_id=self.model.model_id,
                step=self.num_steps,
                request_ids=step.batch.request_ids,
                num_prompt_tokens=sum(n for n, decoding in lengths if not decoding),
                num_decode_tokens=sum(n for n, decoding in lengths if decoding),
                **self._counts(),
                num_drafted_tokens=drafted,
                num_accepted_tokens=accepted,
                seconds=seconds,
            )

        self._observers.notify("on_step", lambda: {"event": event()})
        self.num_steps += 1

    def _notify(self, event: str, request: Request, **arguments: object) -> None:
        ids = {"model_id": self.model.model_id, "request_id": request.request_id}
        self._observers.notify(event, lambda: {**ids, **arguments})

    def _finish_ended(self) -> None:
        self._tell_preempted()
        for request in list(self.requests.values()):
            if request.finish_reason:
                self._finish(request)

    def _finish(self, request: Request) -> None:
        result = request.result or request.finish(self.model)
        if self.requests.get(request.request_id) is not request:  # a finaliser aborted it just now
            return
        self._drop(request)
        aborted = result.finish_reason == "aborted"
        event = "on_request_aborted" if aborted else "on_request_finished"
        self._observers.notify(event, lambda: {"result": result})

    def _fail(self, request: Request, error: BaseException) -> None:
        self._tell_preempted()
        if request.result:
            self._finish(request)
        elif self.requests.get(request.request_id) is request:  # an observer may have ended it
            request.error = error
            self._drop(request)
            self._notify("on_request_failed", request, error=error)

    def _drop(self, request: Request) -> None:
        del self.requests[request.request_id]
        self._news[request] = None
        self._scheduler.remove(request)
        self._end_processing(request)
        request.ngrams.clear()  # the caller may keep the request


def _is_token(token: object, vocab_size: int) -> bool:
    return isinstance(token, SampledToken) and 0 <= token.token_id < vocab_size


def _sampling(step: Step) -> list[SamplerRow | None]:
    """How each row of a step's logits is sampled; None for a row that is only scored."""
    rows: list[SamplerRow | None] = []
    for part in step.parts:
        rows += [None] * len(part.scored)
        rows += [
            part.request.sampler_row(part.position + i, part.drafts[:i])
            for i in range(len(part.sampled))
        ]
    return rows


def _by_executor(step: Step) -> list[SamplerRow | None]:
    """As ``_sampling``; None also for the rows of requests that the executor does not sample."""
    asked = {part.request.request_id for part in step.parts if part.request.sampled_by_executor}
    return [
        # With a copy of the output, which grows while the step runs.
        evolve(row, output_token_ids=tuple(row.output_token_ids))
        if row and row.request_id in asked
        else None
        for row in _sampling(step)
    ]


def _processed(step: Step, rows: Sequence[SamplerRow | None], at: Mapping[int, int]) -> list[Place]:
    """The sampled rows of requests with logits processors. at: their places in the logits."""
    return [
        Place(at[row], part.request.processing, part.drafts[:number], _forbidden(rows[row]))
        for part in step.parts
        if part.request.processing
        for number, row in enumerate(part.sampled)
    ]


def _forbidden(row: SamplerRow | None) -> list[int]:
    bias = row.params.logit_bias if row else {}
    return [token_id for token_id, value in bias.items() if value == -inf]


def _accept(part: Part, tokens: Sequence[SampledToken | None]) -> None:
    """Add a request's tokens, up to the first draft that was wrong.

    A token is in the output already when the step was interrupted after it had been added.
    """
    request = part.request
    for number, row in enumerate(part.sampled):
        token = tokens[row]
        assert token is not None
        if part.position + number == len(request.output_token_ids):
            request.accept(token)
        if number < len(part.drafts) and token.token_id != part.drafts[number]:
            break


def _score(step: Step, output: StepOutput) -> None:
    """Add the log-probabilities of prompt tokens."""
    if not any(part.scored for part in step.parts):
        return
    open_rows = [i for i, token in enumerate(output.tokens) if token is None]
    for part in step.parts:
        request, logits = part.request, output.logits
        if not part.scored:
            continue
        assert logits is not None
        assert request.num_prompt_logprobs is not None
        first = open_rows.index(part.scored.start)
        following = request.prompt_token_ids[part.start + 1 :][: len(part.scored)]
        rows = logits[first : first + len(part.scored)]
        _check_finite(request, part, rows)
        scored = _logprobs(rows, following, request.num_prompt_logprobs)
        request.prompt_logprobs[part.start :] = scored


def _check_finite(request: Request, part: Part, rows: "Tensor") -> None:
    """Raise NonFiniteLogitsError for rows that score a request's prompt."""
    finite = rows.isfinite()
    if finite.all():
        return
    row = int((~finite.all(-1)).nonzero()[0])
    raise NonFiniteLogitsError(
        request.request_id,
        part.start + row + 1 - len(request.prompt_token_ids),
        (~finite[row]).nonzero().flatten().tolist(),
        rows.shape[1],
    )


def _logprobs(logits: "Tensor", token_ids: Sequence[int], count: int) -> list[TokenLogprobs]:
    """For each row, the log-probability of a token and of the count most likely ones."""
    values = logits.log_softmax(-1)
    top = values.topk(min(count, values.shape[1]))
    pairs = [
        sorted(zip(ids, likely, strict=True), key=lambda pair: (-pair[1], pair[0]))
        for ids, likely in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]
    logprobs = [values[row, token_id].item() for row, token_id in enumerate(token_ids)]
    return [
        TokenLogprobs(token_id=token_id, logprob=logprob, top=tuple(likely))
        for token_id, logprob, likely in zip(token_ids, logprobs, pairs, strict=True)
    ]


def _failure_of(plugin: str, error: Exception) -> Exception:
    """The error that requests get: a plugin's own bug is named as such, with its cause."""
    if isinstance(error, (TilewrightError, MemoryError)):
        return error
    failure = PluginError(f"{plugin} failed in a step: {cause(error)}")
    failure.__cause__ = error
    return failure


def _traced(
    error: NonFiniteLogitsError, step: Step, part: Part, executor: Executor
) -> NonFiniteLogitsError:
    """The error with the name of the first non-finite tensor, found by running the step again.

    That is safe until the step is committed: it writes the same values to the same slots.
    """
    batch, at = step.batch, step.parts.index(part)
    if (batch.token_source >= 0).any():
        return error  # its tokens are known to the device only
    tokens = slice(*batch.query_starts[at : at + 2].tolist())
    wanted = [*part.scored, *part.sampled]
    rows = slice(wanted[0], wanted[-1] + 1)
    found: list[str] = []

    def tap(name: str, tensor: "Tensor") -> None:
        own = tensor[tokens if len(tensor) == len(batch.token_ids) else rows]
        if not found and not own.isfinite().all():
            found.append(name)

    name = None
    with suppress(Exception):  # the request has failed anyway
        executor.forward(batch, tap)
        name = ""
    return NonFiniteLogitsError(
        error.request_id, error.step, error.token_ids, error.vocab_size, found[0] if found else name
    )
