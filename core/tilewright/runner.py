"""One loaded model and its requests: runs their steps and ends them with a result or an error."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from tilewright.errors import (
    NonFiniteLogitsError,
    PluginError,
    RequestError,
    TilewrightError,
)
from tilewright.loading import ServedModel
from tilewright.plugins import Observers, cause
from tilewright.request import Request
from tilewright.scheduler import Scheduler, Step
from tilewright.types import SampledToken, Sampler, SamplerRow, StepEvent

if TYPE_CHECKING:
    from torch import Tensor


class Runner:
    """Runs a model's steps. A request leaves ``requests`` when it is over or aborted."""

    def __init__(
        self,
        model: ServedModel,
        sampler: Sampler,
        observers: Observers,
        executor_name: str,
        sampler_name: str,
    ):
        """The names are those of the plugins, for error messages."""
        self.model = model
        self.requests: dict[str, Request] = {}
        self.num_steps = 0
        self._closed = False
        self._depth = 0
        """Steps that are running: an observer may run one in a step's events."""
        self._sampler = sampler
        self._executor_name = executor_name
        self._sampler_name = sampler_name
        self._observers = observers
        runtime = model.runtime
        self._scheduler = Scheduler(
            model.allocator, runtime.max_batch_size, runtime.max_batch_tokens
        )

    def add(self, request: Request) -> None:
        """Queue a request. Raises OutOfPagesError if the whole cache is too small for it."""
        self._scheduler.add(request)
        self.requests[request.request_id] = request

    def abort(self, request: Request) -> None:
        """End a request and free its pages; does nothing if it has ended."""
        if request.request_id in self.requests:
            self._drop(request)

    def close(self, reason: RequestError) -> None:
        """End all requests with an error, and free the model: at once, or when a step has ended."""
        for request in list(self.requests.values()):
            self._fail(request, reason)
        self._closed = True
        if not self._depth:
            self.model.executor.close()

    def step(self) -> None:
        """Run the next step for every request that is in it."""
        self._depth += 1
        try:
            self._step()
        finally:
            self._depth -= 1
            if self._closed and not self._depth:
                self.model.executor.close()

    def _step(self) -> None:
        self._finish_ended()  # left over if Ctrl-C or an observer interrupted a step
        step = self._scheduler.schedule()
        if step is None:
            return
        executor, started = self.model.executor, time.perf_counter()
        run = executor.prefill if step.phase == "prefill" else executor.decode
        plugin = self._executor_name
        try:
            logits = run(step.batch, self._observers.tap(self.model.model_id))
            plugin = self._sampler_name
            rows = [request.sampler_row() for request in step.sampled]
            tokens = self._sample(logits, rows) if rows else []
        except NonFiniteLogitsError as error:
            # The others lose nothing: the step is not committed, and is scheduled again without it.
            request = next(r for r in step.sampled if r.request_id == error.request_id)
            self._fail(request, _traced(error, step, request, run))
            return
        except Exception as error:
            failure = _failure_of(plugin, error)
            for request in step.requests:
                self._fail(request, failure)
            return
        # Accept tokens, then commit: if Ctrl-C falls between the two, a token is computed twice.
        for request, token in zip(step.sampled, tokens, strict=True):
            request.accept(token)
        self._scheduler.done(step)
        self._report(step, time.perf_counter() - started)
        self._finish_ended()

    def _sample(self, logits: "Tensor", rows: Sequence[SamplerRow]) -> Sequence[SampledToken]:
        tokens = self._sampler.sample(logits, rows)
        vocab_size = logits.shape[1]
        if len(tokens) != len(rows) or not all(
            isinstance(token, SampledToken) and 0 <= token.token_id < vocab_size for token in tokens
        ):
            raise PluginError(
                f"{self._sampler_name} must return one token from 0 to {vocab_size - 1}, as a "
                f"SampledToken, for each of {len(rows)} rows, found {tokens!r:.100}"
            )
        return tokens

    def _report(self, step: Step, seconds: float) -> None:
        self._observers.notify(
            "on_step",
            lambda: {
                "event": StepEvent(
                    model_id=self.model.model_id,
                    phase=step.phase,
                    step=self.num_steps,
                    request_ids=tuple(request.request_id for request in step.requests),
                    num_tokens=len(step.batch.token_ids),
                    seconds=seconds,
                )
            },
        )
        self.num_steps += 1

    def _finish_ended(self) -> None:
        for request in list(self.requests.values()):
            if request.finish_reason:
                self._finish(request)

    def _finish(self, request: Request) -> None:
        result = request.finish(self.model)
        self._drop(request)
        self._observers.notify("on_request_finished", lambda: {"result": result})

    def _fail(self, request: Request, error: Exception) -> None:
        if request.request_id in self.requests:  # an observer may have ended it
            request.error = error
            self._drop(request)

    def _drop(self, request: Request) -> None:
        del self.requests[request.request_id]
        self._scheduler.remove(request)


def _failure_of(plugin: str, error: Exception) -> Exception:
    """The error that requests get: a plugin's own bug is named as such, with its cause."""
    if isinstance(error, (TilewrightError, MemoryError)):
        return error
    failure = PluginError(f"{plugin} failed in a step: {cause(error)}")
    failure.__cause__ = error
    return failure


def _traced(
    error: NonFiniteLogitsError, step: Step, request: Request, run: Callable[..., "Tensor"]
) -> NonFiniteLogitsError:
    """The error with the name of the first non-finite tensor, found by running the step again.

    That is safe until the step is committed: it writes the same values to the same slots.
    """
    batch, at = step.batch, step.requests.index(request)
    tokens = slice(*batch.query_starts[at : at + 2].tolist())
    row = step.sampled.index(request)
    found: list[str] = []

    def tap(name: str, tensor: "Tensor") -> None:
        rows = tokens if len(tensor) == len(batch.token_ids) else slice(row, row + 1)
        if not found and not tensor[rows].isfinite().all():
            found.append(name)

    with suppress(Exception):  # the request has failed anyway
        run(batch, tap)
    name = found[0] if found else None
    return NonFiniteLogitsError(
        error.request_id, error.step, error.token_ids, error.vocab_size, name
    )
