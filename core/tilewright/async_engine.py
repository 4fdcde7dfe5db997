"""AsyncLLMEngine: an LLMEngine for asyncio, on the same stepping threads."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from functools import reduce
from pathlib import Path
from threading import Lock
from typing import Any

from tilewright.chat import Chat
from tilewright.engine import LLMEngine, Prompt
from tilewright.errors import RequestError, copied
from tilewright.request import Request
from tilewright.stepping import SteppingThread
from tilewright.types import (
    GenerateConfig,
    GenerateDelta,
    GenerateResult,
    LoadedModel,
    ModelStats,
    RuntimeConfig,
    TokenLogprobs,
)


class AsyncLLMEngine:
    """Generates from any number of tasks, in one event loop or several.

    ``engine`` is the engine behind it, for calls that do not block, such as ``default_config``;
    other threads may use it too. Methods that wait for a model do so in another thread, never in
    the event loop.
    """

    def __init__(self, engine: LLMEngine):
        self.engine = engine
        self._open: dict[str, AsyncGeneration] = {}
        self._wakers: dict[asyncio.AbstractEventLoop, _Waker] = {}

    @classmethod
    def from_plugins(cls, **arguments: Any) -> "AsyncLLMEngine":
        """See ``LLMEngine.from_plugins``."""
        return cls(LLMEngine.from_plugins(**arguments))

    @classmethod
    async def from_config(cls, path: str | Path) -> "AsyncLLMEngine":
        """See ``LLMEngine.from_config``."""
        return cls(await asyncio.to_thread(LLMEngine.from_config, path))

    async def init_model(
        self,
        model_id: str,
        model_dir: str | Path,
        runtime_config: RuntimeConfig | None = None,
        model_format: str | None = None,
        **loader_options: Any,
    ) -> LoadedModel:
        """See ``LLMEngine.init_model``."""
        return await asyncio.to_thread(
            self.engine.init_model,
            model_id,
            model_dir,
            runtime_config,
            model_format,
            **loader_options,
        )

    async def unload(self, model_id: str) -> None:
        """See ``LLMEngine.unload``."""
        await asyncio.to_thread(self.engine.unload, model_id)

    async def close(self) -> None:
        """End all generations with a RequestError, and free all models.

        Waits for the steps that are running. Closing again does nothing.
        """
        await asyncio.to_thread(self.engine.close)

    async def __aenter__(self) -> "AsyncLLMEngine":
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    def stats(self, model_id: str) -> ModelStats:
        """See ``LLMEngine.stats``."""
        return self.engine.stats(model_id)

    async def submit(
        self,
        model_id: str,
        prompt: Prompt,
        config: GenerateConfig | None = None,
        *,
        request_id: str | None = None,
    ) -> "AsyncGeneration":
        """Start a generation, and return once the model has accepted it.

        For callers that must know of a refusal before they read; ``generate`` explains the
        arguments, and what is raised. Read it to the end, or close it.
        """
        thread = self.engine._thread(model_id)
        name = request_id or self.engine._next_id(thread.runner.model)
        generation = AsyncGeneration(self._waker(), thread, self._open, name)
        if self._open.setdefault(name, generation) is not generation:
            raise RequestError(
                f"request id {name!r} is in use: choose another, or wait until that generation "
                "has ended"
            )
        try:
            arguments = thread, prompt, config, name
            if isinstance(prompt, (str, Chat)) or getattr(config, "logits_processors", None):
                # A long text takes a while, and so do a chat template and a vocabulary.
                request = await asyncio.to_thread(self.engine._new_request, *arguments)
            else:
                request = self.engine._new_request(*arguments)
            request.on_news = generation._receive
            generation._request = request
            await asyncio.wrap_future(thread.submit(lambda: thread.runner.add(request)))
            if generation._aborted:
                thread.abort(request)
        except BaseException:
            await generation.aclose()
            raise
        return generation

    async def generate(
        self,
        model_id: str,
        prompt: Prompt,
        config: GenerateConfig | None = None,
        *,
        request_id: str | None = None,
    ) -> AsyncIterator[GenerateDelta]:
        """Continue a prompt (text, token ids or a ``Chat``), in deltas as they are generated.

        The last delta has the result. If the generation fails, what it had made comes first and
        the error is raised then. What a slow reader has not taken arrives as one delta, so it
        delays no other request, and at most one text is buffered for it. A generation whose task is
        cancelled, or that is closed (``contextlib.aclosing``), is aborted.

        request_id: names the generation, for ``abort``; default: chosen by the engine.

        Raises, when it is first read, what ``LLMEngine.generate`` raises, and RequestError for a
        request id that is in use.
        """
        generation = await self.submit(model_id, prompt, config, request_id=request_id)
        async with aclosing(generation):
            async for delta in generation:
                yield delta

    async def generate_result(
        self,
        model_id: str,
        prompt: Prompt,
        config: GenerateConfig | None = None,
        *,
        request_id: str | None = None,
    ) -> GenerateResult:
        """Like ``generate``, but returns only the final result."""
        result = None
        async for delta in self.generate(model_id, prompt, config, request_id=request_id):
            result = delta.result
        assert result is not None
        return result

    def _waker(self) -> "_Waker":
        """That of the running event loop."""
        loop = asyncio.get_running_loop()
        if loop not in self._wakers:
            known = list(self._wakers.items())
            self._wakers = {one: waker for one, waker in known if not one.is_closed()}
        return self._wakers.setdefault(loop, _Waker(loop))

    def abort(self, request_id: str) -> None:
        """End a generation with what it has until now, after the step that is running.

        Does nothing for one that has ended.
        """
        generation = self._open.get(request_id)
        if generation:
            generation.abort()


class _Waker:
    """Wakes the readers of one event loop that have something new: all those of a step by one call
    from another thread, which costs more than a step's part of one reader."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self._lock = Lock()
        self._readers: list[AsyncGeneration] = []

    def wake(self, reader: "AsyncGeneration") -> None:
        """Called in a stepping thread."""
        with self._lock:
            self._readers.append(reader)
            if len(self._readers) > 1 and not self._loop.is_closed():
                return
        try:
            self._loop.call_soon_threadsafe(self._wake_all)
        except RuntimeError:  # the event loop is closed
            for nobody in self._take():
                nobody.abort()

    def _wake_all(self) -> None:
        for reader in self._take():
            reader._arrived.set()

    def _take(self) -> "list[AsyncGeneration]":
        with self._lock:
            readers, self._readers = self._readers, []
        return readers


class AsyncGeneration(AsyncIterator[GenerateDelta]):
    """A generation that a model has accepted: deltas as ``AsyncLLMEngine.generate`` has them."""

    def __init__(
        self,
        waker: _Waker,
        thread: SteppingThread,
        open_: "dict[str, AsyncGeneration]",
        name: str,
    ):
        """Use ``AsyncLLMEngine.submit``."""
        self._waker = waker
        self._thread = thread
        self._open = open_
        self._name = name
        self._request: Request | None = None
        """None while its prompt is tokenised."""
        self._aborted = False
        self._lock = Lock()
        self._deltas: list[GenerateDelta] = []
        """What it has made and its reader has not taken."""
        self._arrived = asyncio.Event()
        self._last: GenerateDelta | None = None

    async def __anext__(self) -> GenerateDelta:
        while self._last is None:
            delta = await self._next()
            if delta.result or delta.error:
                self._last = delta
                self._leave()
            if delta.token_ids or delta.result:
                return delta
        if self._last.error:
            raise copied(self._last.error)
        raise StopAsyncIteration

    @property
    def ended(self) -> bool:
        """Whether the model has ended it; its reader may not have got to the end yet."""
        return self._request is not None and self._request.over

    @property
    def prompt_logprobs(self) -> tuple[TokenLogprobs | None, ...]:
        """Log-probabilities of its prompt, if asked for; complete once it has made a token."""
        assert self._request
        return (None, *self._request.prompt_logprobs)

    def abort(self) -> None:
        """End it with what it has until now, after the step that is running."""
        self._aborted = True
        if self._request:
            self._thread.abort(self._request)

    async def aclose(self) -> None:
        """Abort it, if it has not ended; nothing more is read."""
        self._leave()
        self.abort()

    def _leave(self) -> None:
        if self._open.get(self._name) is self:
            del self._open[self._name]

    def _receive(self, request: Request) -> None:
        """Called in the stepping thread."""
        with self._lock:
            self._deltas.append(request.take())
            if len(self._deltas) > 1:
                return
        self._waker.wake(self)

    async def _next(self) -> GenerateDelta:
        await self._arrived.wait()
        self._arrived.clear()
        with self._lock:
            deltas, self._deltas = self._deltas, []
        return reduce(GenerateDelta.joined, deltas)
