"""From a body to an answer: in one piece, or as server-sent events."""

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, aclosing
from typing import Any, TypeVar

from attrs import define, field
from pydantic import ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from tilewright import __version__
from tilewright.async_engine import AsyncGeneration
from tilewright.types import GenerateResult
from tilewright_serve import chat_completions, completions
from tilewright_serve.errors import TIMEOUT, ApiError, failure, invalid
from tilewright_serve.fields import Body, ChatCompletion, Completion, Generation
from tilewright_serve.generation import Answer
from tilewright_serve.server import Server

log = logging.getLogger(__name__)

B = TypeVar("B", bound=Body)
T = TypeVar("T")

STALLED = 60.0
"""Seconds after which a client that reads nothing of a stream is given up."""

SYSTEM_FINGERPRINT = f"tilewright-{__version__}"

BODIES: dict[str, type[Generation]] = {
    "/v1/completions": Completion,
    "/v1/chat/completions": ChatCompletion,
}
"""The body of each endpoint that generates."""


Endpoint = Callable[[Server, Request, bytes], Awaitable[Response]]


def posted(endpoint: Endpoint) -> Callable[[Request], Awaitable[Response]]:
    """An endpoint that gets a body of JSON, within the limit."""

    async def handle(request: Request) -> Response:
        server: Server = request.app.state.server
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        body = await _body(request, server.settings.max_body_bytes)
        if kind != "application/json":
            # Also keeps web pages of other origins out: a browser asks before it sends this type.
            raise ApiError(400, f"expected Content-Type application/json, found {kind or 'none'!r}")
        return await endpoint(server, request, body)

    return handle


async def _body(request: Request, most: int) -> bytes:
    made = bytearray()
    async for part in request.stream():
        made += part
        if len(made) > most:
            raise ApiError(413, f"the body is larger than {most} bytes: send less")
    return bytes(made)


def read(kind: type[B], body: bytes) -> B:
    """A body as its fields. Raises ApiError."""
    if not body:
        raise ApiError(400, "the body is empty: expected a JSON object")
    try:
        made = kind.model_validate_json(body)
    except ValidationError as error:
        raise invalid(error) from error
    made.check_served()
    return made


async def prepared(server: Server, body: Generation) -> Answer:
    """What a body asks for. Raises ApiError, at once if it is more than the model takes."""
    model = server.model(body.model)
    server.admit(model, _num_texts(body))
    if isinstance(body, Completion):
        return await completions.prepared(model, body)
    assert isinstance(body, ChatCompletion)
    separate = server.settings.reasoning
    return await chat_completions.prepared(model, body, separate)


def _num_texts(body: Generation) -> int:
    if not isinstance(body, Completion):
        return body.n or 1
    several = not isinstance(body.prompt, str) and not isinstance(body.prompt[0], int)
    return (len(body.prompt) if several else 1) * max(body.n or 1, body.best_of or 1)


async def answer(server: Server, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
    """What POST of a path answers to a body that does not ask for a stream: status and object."""
    try:
        asked = read(BODIES[path], body)
        if asked.stream:
            raise ApiError(400, "'stream' must be false here", "stream")
        return 200, await in_time(server, whole(server, await prepared(server, asked)))
    except ApiError as error:
        return error.status, error.body


async def generate(server: Server, request: Request, body: bytes) -> Response:
    """The response to a request of an endpoint that generates. Raises ApiError."""
    asked = read(BODIES[request.url.path], body)
    if not asked.stream:
        work = in_time(server, _prepared_whole(server, asked))
        made = await while_connected(request, work)
        return JSONResponse(made, headers={"x-request-id": made["id"]})
    stream = Stream(server, await while_connected(request, prepared(server, asked)), asked)
    try:
        await while_connected(request, in_time(server, stream.begin()))
    except BaseException:
        await stream.aclose()
        raise
    return EventStream(stream)


async def _prepared_whole(server: Server, asked: Generation) -> dict[str, Any]:
    return await whole(server, await prepared(server, asked))


async def whole(server: Server, work: Answer) -> dict[str, Any]:
    """Generate all texts, and answer in one piece. Raises ApiError."""
    results: list[GenerateResult | None] = [None] * len(work.texts)
    async with (
        server.generating(work.model, work.texts) as generations,
        aclosing(server.deltas(work.model, generations)) as deltas,
    ):
        async for number, delta in deltas:
            results[number] = delta.result or results[number]
    found = [result for result in results if result]
    return {
        "id": f"{work.kind}-{secrets.token_hex(12)}",
        "object": work.object,
        "created": int(time.time()),
        "model": work.model.name,
        "choices": work.whole(found),
        "usage": work.usage(found).body,
        "system_fingerprint": SYSTEM_FINGERPRINT,
    }


async def in_time(server: Server, work: Awaitable[T]) -> T:
    """What work returns. Raises ApiError when it takes longer than a request may."""
    try:
        async with asyncio.timeout(server.settings.request_timeout):
            return await work
    except TimeoutError as error:
        raise _timed_out(server) from error


def _timed_out(server: Server) -> ApiError:
    seconds = server.settings.request_timeout
    return ApiError(
        503,
        f"the request took longer than {seconds:g} seconds: ask for fewer tokens",
        code=TIMEOUT,
    )


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """What work returns. It is cancelled when the client goes away: raises ClientDisconnect."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


@define(eq=False)
class Stream:
    """The events of a streamed answer. ``begin`` it, read it, and close it in any case."""

    server: Server
    work: Answer
    asked: Generation
    _open: AsyncExitStack = field(init=False, factory=AsyncExitStack)
    _generations: list[AsyncGeneration] = field(init=False, factory=list)
    _head: dict[str, Any] = field(init=False)
    _deadline: float | None = field(init=False, default=None)

    def __attrs_post_init__(self) -> None:
        self._head = {
            "id": f"{self.work.kind}-{secrets.token_hex(12)}",
            "object": self.work.chunk_object,
            "created": int(time.time()),
            "model": self.work.model.name,
            "system_fingerprint": SYSTEM_FINGERPRINT,
        }

    @property
    def id(self) -> str:
        return str(self._head["id"])

    async def begin(self) -> None:
        """Have the model accept all texts. Raises ApiError."""
        if seconds := self.server.settings.request_timeout:
            self._deadline = asyncio.get_running_loop().time() + seconds
        context = self.server.generating(self.work.model, self.work.texts)
        self._generations = await self._open.enter_async_context(context)

    async def aclose(self) -> None:
        await self._open.aclose()

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The lines of all events. An error is the last event before ``[DONE]``."""
        async with aclosing(self._chunks()) as chunks:
            while event := await self._next(chunks):
                yield _event(event)
                if "error" in event:
                    break
        yield b"data: [DONE]\n\n"

    async def _next(self, chunks: AsyncGenerator[dict[str, Any], None]) -> dict[str, Any] | None:
        """The next chunk, an error, or None at the end."""
        try:
            async with asyncio.timeout_at(self._deadline):
                return await anext(chunks, None)
        except TimeoutError:
            return _timed_out(self.server).body
        except ApiError as error:
            return error.body
        except Exception as error:  # the answer has begun: nobody else can tell its client
            log.exception("stream %s failed", self.id)
            return failure(error).body

    async def _chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        work, options = self.work, self.asked.stream_options
        with_usage = options is not None and bool(options.include_usage)
        running = options is not None and bool(options.continuous_usage_stats)
        results: list[GenerateResult | None] = [None] * len(work.texts)
        begun: set[int] = set()
        counts = [0] * len(work.texts)
        usage: dict[str, Any] = {"usage": None} if with_usage else {}
        deltas = self.server.deltas(work.model, self._generations)
        async with aclosing(deltas):
            async for number, delta in deltas:
                counts[number] += len(delta.token_ids)
                results[number] = delta.result
                choices = work.added(number, delta)
                if number not in begun:
                    begun.add(number)
                    first = work.begun(number, self._generations[number])
                    choices = [*([first] if first else []), *choices]
                if running:
                    usage = {"usage": self._usage_until_now(counts)}
                for choice in choices:
                    yield {**self._head, "choices": [choice], **usage}
        if with_usage:
            found = [result for result in results if result]
            yield {**self._head, "choices": [], "usage": work.usage(found).body}

    def _usage_until_now(self, counts: Sequence[int]) -> dict[str, int]:
        texts = self.work.texts[:: self.work.texts_per_prompt]
        prompt = sum(len(ids) for ids, _ in texts)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": sum(counts),
            "total_tokens": prompt + sum(counts),
        }


def _event(data: dict[str, Any]) -> bytes:
    # In ASCII, since some clients also end a line at U+2028 and the like.
    return b"data: %b\n\n" % json.dumps(data, separators=(",", ":")).encode()


class EventStream(StreamingResponse):
    """A stream as a response; it is closed when the response ends, however that is."""

    def __init__(self, stream: Stream):
        headers = {
            "Cache-Control": "no-cache",
            "X-Accel-Buffering": "no",
            "x-request-id": stream.id,
        }
        self._events = stream.events()
        super().__init__(self._events, media_type="text/event-stream", headers=headers)
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_in_time(message: Message) -> None:
            async with asyncio.timeout(STALLED):
                await send(message)

        try:
            await super().__call__(scope, receive, send_in_time)
        except TimeoutError:
            log.warning(
                "stream %s is given up: its client has read nothing for %g seconds",
                self._stream.id,
                STALLED,
            )
        finally:
            # A task that is cancelled while it sends leaves the iterator suspended.
            await self._events.aclose()
            await self._stream.aclose()
