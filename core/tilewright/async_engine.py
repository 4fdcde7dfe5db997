"""AsyncLLMEngine: an LLMEngine for asyncio, on the same stepping threads."""

import asyncio
from collections.abc import AsyncIterator
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
)


class AsyncLLMEngine:
    """Generates from any number of tasks, in one event loop or several.

    ``engine`` is the engine behind it, for calls that do not block, such as ``default_config``;
    other threads may use it too. Methods that wait for a model do so in another thread, never in
    the event loop.
    """

    def __init__(self, engine: LLMEngine):
        self.engine = engine
        self._open: dict[str, _Generation] = {}
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
        thread = self.engine._thread(model_id)
        name = request_id or self.engine._next_id(thread.runner.model)
        generation = _Generation(self._waker(), thread)
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
            request.on_news = generation.receive
            generation.request = request
            await asyncio.wrap_future(thread.submit(lambda: thread.runner.add(request)))
            if generation.aborted:
                thread.abort(request)
            while True:
                delta = await generation.next()
                if delta.token_ids or delta.result:
                    yield delta
                if delta.error:
                    raise copied(delta.error)
                if delta.result:
                    return
        finally:
            del self._open[name]
            generation.abort()

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
        self._readers: list[_Generation] = []

    def wake(self, reader: "_Generation") -> None:
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
            reader.arrived.set()

    def _take(self) -> "list[_Generation]":
        with self._lock:
            readers, self._readers = self._readers, []
        return readers


class _Generation:
    """A generation that has not ended, and what it has made and its task has not taken."""

    def __init__(self, waker: _Waker, thread: SteppingThread):
        self._waker = waker
        self._thread = thread
        self.request: Request | None = None
        """None while its prompt is tokenised."""
        self.aborted = False
        self._lock = Lock()
        self._deltas: list[GenerateDelta] = []
        self.arrived = asyncio.Event()

    def receive(self, request: Request) -> None:
        """Called in the stepping thread."""
        with self._lock:
            self._deltas.append(request.take())
            if len(self._deltas) > 1:
                return
        self._waker.wake(self)

    def abort(self) -> None:
        self.aborted = True
        if self.request:
            self._thread.abort(self.request)

    async def next(self) -> GenerateDelta:
        await self.arrived.wait()
        self.arrived.clear()
        with self._lock:
            deltas, self._deltas = self._deltas, []
        return reduce(GenerateDelta.joined, deltas)
