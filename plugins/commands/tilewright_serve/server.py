"""The models of a server: which requests they take, and whether they work."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager

from attrs import define, field

from tilewright import AsyncLLMEngine
from tilewright.async_engine import AsyncGeneration
from tilewright.engine import LLMEngine
from tilewright.errors import (
    ConfigError,
    ExecutorLostError,
    NonFiniteLogitsError,
    OutOfPagesError,
    RequestError,
    listed,
    on_one_line,
)
from tilewright.loading import ServedModel
from tilewright.logits_processing import LogitsProcessorError, NoTokenLeftError
from tilewright.types import GenerateConfig, GenerateDelta
from tilewright_serve.errors import ApiError, failure, refusal, unknown_model
from tilewright_serve.metrics import Metrics
from tilewright_serve.settings import ServeSettings

log = logging.getLogger(__name__)

Reload = Callable[[LLMEngine, str], None]
"""Loads a model of an engine again, under the name it had; may block."""

TextRequest = tuple[Sequence[int], GenerateConfig]
"""A text to generate: the token ids of its prompt, and its settings."""

RELOAD_PAUSE = 5.0
"""Seconds before a model that could not be loaded again is loaded once more, times the tries."""

OF_ONE_REQUEST = (RequestError, OutOfPagesError, NonFiniteLogitsError, LogitsProcessorError)
"""Errors that say nothing about whether the model works for other requests."""


@define(eq=False)
class Model:
    """A model that is served."""

    name: str
    engine: AsyncLLMEngine
    created: int = field(factory=lambda: int(time.time()))
    num_submitted: int = 0
    """Texts that the engine is about to accept."""
    generations: set[AsyncGeneration] = field(factory=set)
    """Those that it has accepted, and whose answers have not ended."""
    failure: str | None = None
    """Why its executor failed, until it works again."""
    restarting: bool = False
    num_restarts: int = 0

    @property
    def num_open(self) -> int:
        """Texts that are generated or wait for their turn; not those that wait for a reader."""
        return self.num_submitted + sum(not one.ended for one in self.generations)

    @property
    def loaded(self) -> ServedModel:
        """Raises ApiError while it is not loaded."""
        try:
            return self.engine.engine.model(self.name)
        except RequestError as error:
            raise ApiError(503, self.failure or str(error)) from error

    def has(self, loaded: ServedModel) -> bool:
        """Whether it is still loaded, and was not loaded again since."""
        try:
            return not self.restarting and self.loaded is loaded
        except ApiError:
            return False


@define(eq=False)
class Server:
    """The models of some engines, by name. All its methods are for one event loop."""

    engines: Sequence[LLMEngine]
    settings: ServeSettings
    reload: Reload | None = None
    models: dict[str, Model] = field(init=False)
    metrics: Metrics = field(init=False)
    _restarts: set[asyncio.Task[None]] = field(init=False, factory=set)

    def __attrs_post_init__(self) -> None:
        """Raises ConfigError unless there are models, and each has a name of its own."""
        names = [name for engine in self.engines for name in engine.model_ids]
        if not names or len(names) > len(set(names)):
            found = listed([repr(name) for name in names]) or "none"
            raise ConfigError(f"expected loaded models with different names, found {found}")
        self.models = {
            name: Model(name, AsyncLLMEngine(engine))
            for engine in self.engines
            for name in engine.model_ids
        }
        self.metrics = Metrics(lambda: [m.engine.stats(m.name) for m in self.working])

    @property
    def working(self) -> list[Model]:
        """The models that are loaded."""
        return [
            model
            for model in self.models.values()
            if not model.restarting and model.name in model.engine.engine.model_ids
        ]

    def model(self, name: str | None) -> Model:
        """The model of a name, or the only one. Raises ApiError."""
        names = list(self.models)
        if name is None and len(names) == 1:
            return self.models[names[0]]
        if name is None:
            raise ApiError(400, f"'model' is missing: expected one of {', '.join(names)}", "model")
        if name not in self.models:
            raise unknown_model(name, names)
        return self.models[name]

    @asynccontextmanager
    async def generating(
        self, model: Model, texts: Sequence[TextRequest]
    ) -> AsyncIterator[list[AsyncGeneration]]:
        """Generations that the model has accepted. They end with the block.

        Raises ApiError for texts that the model does not accept, and for a full queue.
        """
        self.admit(model, len(texts))
        accepted: dict[int, AsyncGeneration] = {}

        async def submit(number: int) -> None:
            accepted[number] = await self._submitted(model, *texts[number])

        tasks: list[asyncio.Task[None]] = []
        try:
            model.num_submitted += len(texts)
            try:
                rest = range(len(texts))
                if texts[0][1].logits_processors:
                    await submit(0)  # prepares the argument, which is the same for all
                    rest = rest[1:]
                # At once: a model accepts between two steps; one by one, each would take a step.
                tasks += [asyncio.create_task(submit(number)) for number in rest]
                await asyncio.gather(*tasks)
            finally:
                model.num_submitted -= len(texts)
            model.generations.update(accepted.values())
            yield [accepted[number] for number in range(len(texts))]
        finally:
            for task in tasks:
                task.cancel()
            model.generations.difference_update(accepted.values())
            for generation in accepted.values():
                await generation.aclose()

    async def deltas(
        self, model: Model, generations: Sequence[AsyncGeneration]
    ) -> AsyncGenerator[tuple[int, GenerateDelta], None]:
        """The number of a generation and what it has added, as they come.

        Raises ApiError for the first that fails.
        """
        loaded = model.loaded
        started = time.perf_counter()
        last: dict[int, float] = {}
        try:
            async with aclosing(_merged(generations)) as merged:
                async for number, delta in merged:
                    now = time.perf_counter()
                    since = now - last.get(number, started)
                    self.metrics.tokens(model.name, len(delta.token_ids), since, number not in last)
                    last[number] = now
                    yield number, delta
        except OF_ONE_REQUEST as error:
            own = isinstance(error, RequestError) and model.has(loaded)
            if own or isinstance(error, NoTokenLeftError):
                raise ApiError(400, str(error)) from error
            raise failure(error) from error
        except Exception as error:
            self._failed(model, loaded, error)
            raise failure(error) from error
        if model.has(loaded):
            model.failure = None
        self.metrics.durations.labels(model.name).observe(time.perf_counter() - started)

    async def _submitted(
        self, model: Model, ids: Sequence[int], config: GenerateConfig
    ) -> AsyncGeneration:
        loaded = model.loaded
        try:
            return await model.engine.submit(model.name, ids, config)
        except Exception as error:
            if not model.has(loaded):
                raise failure(error) from error
            if isinstance(error, ExecutorLostError):
                self._failed(model, loaded, error)
            raise refusal(error, bool(config.logits_processors)) from error

    def admit(self, model: Model, count: int) -> None:
        """Raise ApiError if the model takes no texts now, or not so many."""
        if model.restarting:
            raise ApiError(503, f"model {model.name!r} has failed and is loaded again: try later")
        if count > self.settings.max_choices:
            raise ApiError(
                400,
                f"expected at most {self.settings.max_choices} texts of one request (prompts "
                f"times n), found {count}: send several requests",
                "n",
            )
        most = model.loaded.runtime.max_batch_size + self.settings.max_queue
        num_open = model.num_open
        if num_open and num_open + count > most:
            raise ApiError(
                503,
                f"model {model.name!r} has {num_open} texts to generate, and takes at most "
                f"{most}: try again later",
                code="queue_full",
            )

    def _failed(self, model: Model, loaded: ServedModel, error: Exception) -> None:
        """Note that an executor has failed, and load its model again if that is asked for."""
        reason = on_one_line(f"{type(error).__name__}: {error}")
        if not model.has(loaded):  # a slow reader's news of the one before
            return
        if model.failure == reason:  # told by another request of the step
            return
        model.failure = reason
        self.metrics.failures.labels(model.name).inc()
        log.error("model %r failed: %s", model.name, reason)
        if self.reload and model.num_restarts < self.settings.restarts:
            model.restarting = True
            task = asyncio.create_task(self._load_again(model, self.reload))
            self._restarts.add(task)
            task.add_done_callback(self._restarts.discard)

    async def _load_again(self, model: Model, reload: Reload) -> None:
        """Load a model again; if that fails, once more after a while, as often as is asked for."""
        try:
            while True:
                model.num_restarts += 1
                which = f"{model.num_restarts} of {self.settings.restarts} times"
                log.warning("model %r is loaded again (%s)", model.name, which)
                try:
                    await asyncio.to_thread(reload, model.engine.engine, model.name)
                    model.failure = None
                    return
                except Exception as error:
                    model.failure = on_one_line(f"it could not be loaded again: {error}")
                    log.error("model %r: %s", model.name, model.failure)
                if model.num_restarts >= self.settings.restarts:
                    return
                await asyncio.sleep(RELOAD_PAUSE * model.num_restarts)
        finally:
            model.restarting = False


async def _merged(
    generations: Sequence[AsyncGeneration],
) -> AsyncGenerator[tuple[int, GenerateDelta], None]:
    """The deltas of all generations with their numbers, as they come."""
    if len(generations) == 1:
        async for delta in generations[0]:
            yield 0, delta
        return
    waiting = {asyncio.ensure_future(anext(g)): i for i, g in enumerate(generations)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                number = waiting.pop(task)
                try:
                    delta = task.result()
                except StopAsyncIteration:
                    continue
                yield number, delta
                waiting[asyncio.ensure_future(anext(generations[number]))] = number
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
