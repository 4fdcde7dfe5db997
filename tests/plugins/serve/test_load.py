"""Many requests at once, of all kinds, with clients that fail: none is lost, mixed up or leaked.

``-m slow`` sends ten thousand to a server in a process of its own. TILEWRIGHT_LOAD_SEED chooses
which requests are made.
"""

import asyncio
import json
import os
import random
import re
import socket
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from attrs import define, field, frozen
from other_threads import eventually
from serving import events, request, serving
from test_process import serving as serving_process

from tilewright import Chat, GenerateConfig, LLMEngine, RuntimeConfig
from tilewright.settings import DEMO_MODEL
from tilewright_serve import ServeSettings, create_app

SEED = int(os.environ.get("TILEWRIGHT_LOAD_SEED", "1"))
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
CLOSE = "connection: close\r\n"
LENGTHS = (1, 4, 12)
AT_ONCE = 100
SETTINGS = {"max_batch_size": 16, "max_batch_tokens": 32, "max_seq_len": 256, "total_pages": 256}
"""Of few shapes, and with a cache that is soon full: both take memory when first used."""

MOST_BYTES = 100_000


@frozen
class Case:
    """A prompt and what the engine itself says after it, by length and for texts and chats."""

    text: str
    ids: list[int]
    texts: dict[int, str]
    chats: dict[int, str]


@pytest.fixture(scope="module")
def engine() -> Iterator[LLMEngine]:
    with LLMEngine.from_plugins() as engine:
        runtime = RuntimeConfig(weight_dtype="float32", **SETTINGS)  # type: ignore[arg-type]
        engine.init_model("demo", DEMO_MODEL, runtime)
        yield engine


@pytest.fixture(scope="module")
def cases(engine: LLMEngine) -> list[Case]:
    words = (DEMO_MODEL / "README.md").read_text().split()
    rng = random.Random(SEED)
    texts = [
        f"{i} {' '.join(words[start : start + rng.randrange(1, 25)])}"
        for i in range(20)
        for start in (rng.randrange(len(words)),)
    ]
    prompts = [p for text in texts for p in (text, Chat([{"role": "user", "content": text}]))]
    configs = [GenerateConfig(max_new_tokens=n, temperature=0, ignore_eos=True) for n in LENGTHS]
    answers = [
        [result.text for result in engine.generate_batch("demo", prompts, config)]
        for config in configs
    ]
    encode = engine.model("demo").text.encode
    return [
        Case(
            text,
            encode(text),
            {n: found[2 * i] for n, found in zip(LENGTHS, answers, strict=True)},
            {n: found[2 * i + 1] for n, found in zip(LENGTHS, answers, strict=True)},
        )
        for i, text in enumerate(texts)
    ]


@define
class Load:
    """Clients of one server. Each request counts what became of it; a wrong answer raises."""

    address: tuple[str, int]
    cases: list[Case]
    statuses: Counter[tuple[str, int]] = field(factory=Counter)
    """Answers that were read to their end."""
    left: int = 0
    """Requests whose clients went away."""
    tokens: int = 0
    texts: int = 0
    tokens_left: int = 0
    """At most so many were made for clients that went away."""
    texts_left: int = 0
    held: list[asyncio.StreamWriter] = field(factory=list)
    """Connections that stay open to the end, and read nothing."""

    async def run(self, count: int, rng: random.Random, faults: bool) -> None:
        kinds = [self.good] * 6
        if faults:
            kinds += [self.bad, self.bad, self.gone, self.gone, self.slow]
        rare = [self.half_open, self.never_reads] if faults else []
        room = asyncio.Semaphore(AT_ONCE)

        async def one(kind: Callable[[random.Random], Awaitable[None]], seed: int) -> None:
            async with room, asyncio.timeout(120):
                await kind(random.Random(seed))

        async with asyncio.TaskGroup() as group:
            for i in range(count):
                kind = rng.choice(rare if rare and i % 50 == 49 else kinds)
                group.create_task(one(kind, rng.randrange(2**32)))

    async def good(self, rng: random.Random, pause: float = 0.0) -> None:
        path, body, expected = self.asked(rng)
        status, answer = await self.answered(path, json.dumps(body).encode(), pause)
        assert status == 200, answer
        chat = path == CHAT
        if body.get("stream"):
            texts, usage = streamed(answer, chat)
        else:
            texts, usage = whole(answer, body, chat)
        assert texts == [expected] * body["n"], (body, texts)
        assert usage["completion_tokens"] == body["max_tokens"] * body["n"]
        self.tokens += usage["completion_tokens"]
        self.texts += body["n"]

    async def slow(self, rng: random.Random) -> None:
        await self.good(rng, pause=rng.uniform(0.0, 0.05))

    async def bad(self, rng: random.Random) -> None:
        path, body, _ = self.asked(rng)
        content = json.dumps(body).encode()
        path, content, expected = rng.choice(
            [
                (path, content[: rng.randrange(len(content))], 400),
                (path, b"[" * rng.randrange(1, 9999), 400),
                (path, json.dumps(body | {"temperature": "hot"}).encode(), 400),
                (path, json.dumps(body | {"max_tokens": 9999}).encode(), 400),
                (path, json.dumps(body | {"n": 10**9}).encode(), 400),
                (path, json.dumps(body | {"model": "other"}).encode(), 404),
                (path, b" " * (MOST_BYTES + 1), 413),
                ("/v1/nothing", content, 404),
            ]
        )
        status, answer = await self.answered(path, content)
        assert status == expected, (content[:200], answer)
        assert json.loads(answer)["error"]["message"]

    async def gone(self, rng: random.Random) -> None:
        """Goes away at some time, or after some of the answer."""
        path, body, _ = self.asked(rng)
        reader, writer = await self.sent(path, json.dumps(body).encode())
        if rng.random() < 0.5:
            await asyncio.sleep(rng.uniform(0.0, 0.2))
        else:
            with suppress(asyncio.IncompleteReadError):
                await reader.readexactly(rng.randrange(1, 2000))
        writer.close()
        self.leaves(body)

    async def half_open(self, rng: random.Random) -> None:
        path, body, _ = self.asked(rng)
        content = request(path, json.dumps(body).encode(), headers=CLOSE)
        _, writer = await self.connected()
        writer.write(content[: rng.randrange(content.index(b"\r\n"))])
        self.held.append(writer)

    async def never_reads(self, rng: random.Random) -> None:
        body = {"prompt": rng.choice(self.cases).ids, "logprobs": 20, "stream": True, "n": 2}
        body |= {"max_tokens": 100, "ignore_eos": True}
        _, writer = await self.sent(COMPLETIONS, json.dumps(body).encode())
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        self.held.append(writer)
        self.leaves(body)

    def leaves(self, body: dict[str, Any]) -> None:
        self.left += 1
        self.texts_left += body["n"]
        self.tokens_left += body["n"] * body["max_tokens"]

    def asked(self, rng: random.Random) -> tuple[str, dict[str, Any], str]:
        """A path, a body, and the text of its answer."""
        case, length = rng.choice(self.cases), rng.choice(LENGTHS)
        body: dict[str, Any] = {"temperature": 0, "max_tokens": length, "ignore_eos": True}
        body["n"] = rng.choice([1, 1, 1, 2, 3])
        if rng.random() < 0.5:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        if rng.random() < 0.3:
            body["messages"] = [{"role": "user", "content": case.text}]
            if rng.random() < 0.3:
                body |= {"logprobs": True, "top_logprobs": 2}
            return CHAT, body, case.chats[length]
        body["prompt"] = rng.choice([case.text, case.ids])
        if rng.random() < 0.3:
            body["logprobs"] = rng.randrange(5)
        expected = case.texts[length]
        if rng.random() < 0.2:
            body["echo"] = True
            expected = case.text + expected
        return COMPLETIONS, body, expected

    async def connected(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connection, self.address)
        return await asyncio.open_connection(sock=connection, limit=4096)

    async def sent(
        self, path: str, body: bytes
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await self.connected()
        writer.write(request(path, body, headers=CLOSE))
        return reader, writer

    async def answered(self, path: str, body: bytes, pause: float = 0.0) -> tuple[int, bytes]:
        """Status and body of an answer, of which a part is read every ``pause`` seconds."""
        reader, writer = await self.sent(path, body)
        made = bytearray()
        while part := await reader.read(1000 if pause else 2**16):
            made += part
            if pause:
                await asyncio.sleep(pause)
        writer.close()
        head, _, content = bytes(made).partition(b"\r\n\r\n")
        status = int(head.split()[1])
        self.statuses[path, status] += 1
        if b"transfer-encoding: chunked" in head:
            return status, b"".join(chunks(content))
        assert len(content) == int(re.search(rb"content-length: (\d+)", head)[1])  # type: ignore[index]
        return status, content


def chunks(content: bytes) -> Iterator[bytes]:
    """The chunks of a body (RFC 9112, section 7.1), to the one that ends it."""
    while True:
        size, _, content = content.partition(b"\r\n")
        yield content[: int(size, 16)]
        assert content[int(size, 16) :][:2] == b"\r\n"
        content = content[int(size, 16) + 2 :]
        if size == b"0":
            assert content == b""
            return


def whole(answer: bytes, body: dict[str, Any], chat: bool) -> tuple[list[str], dict[str, Any]]:
    found = json.loads(answer)
    for choice in found["choices"]:
        assert choice["finish_reason"] == "length"
        if body.get("logprobs") is not None:
            logprobs = choice["logprobs"]
            tokens = [each["token"] for each in logprobs["content"]] if chat else logprobs["tokens"]
            assert len(tokens) >= body["max_tokens"]
    texts = [
        choice["message"]["content"] if chat else choice["text"] for choice in found["choices"]
    ]
    return texts, found["usage"]


def streamed(answer: bytes, chat: bool) -> tuple[list[str], dict[str, Any]]:
    *made, end = events(answer.decode())
    assert end == "[DONE]"
    assert len({each["id"] for each in made}) == 1
    texts: dict[int, str] = {}
    ends: list[int] = []
    for each in made[:-1]:
        (choice,) = each["choices"]
        text = choice["delta"].get("content") if chat else choice["text"]
        texts[choice["index"]] = texts.get(choice["index"], "") + (text or "")
        ends += [choice["index"]] if choice["finish_reason"] else []
    assert sorted(ends) == sorted(texts)
    return [texts[i] for i in sorted(texts)], made[-1]["usage"]


@define
class Metrics:
    """The samples of GET /metrics."""

    text: str

    def total(self, name: str, **labels: str) -> int:
        """The sum of the samples of a name that have these labels."""
        found = 0.0
        for line in self.text.splitlines():
            sample = re.match(rf"tilewright_{name}_total\{{(.*)\}} (.*)", line)
            if sample and all(f'{key}="{value}"' in sample[1] for key, value in labels.items()):
                found += float(sample[2])
        return int(found)


def check(client: httpx.Client, load: Load, faults: bool) -> None:
    """What the server has counted is what its clients saw, and it holds nothing any more."""

    def is_idle() -> bool:
        stats = client.get("/stats").json()["models"]["demo"]
        return not (stats["used_pages"] or stats["num_running"] or stats["num_waiting"])

    eventually(is_idle, 60)
    metrics = Metrics(client.get("/metrics").text)
    answered: Counter[int] = Counter()
    for (path, status), count in load.statuses.items():
        answered[status] += count
        route = path if path in (COMPLETIONS, CHAT) else "none"
        counted = metrics.total("http_requests", path=route, status=str(status), method="POST")
        assert counted == count if status != 200 else counted >= count, (path, status)
    total = metrics.total("http_requests", method="POST")
    assert total == sum(load.statuses.values()) + load.left
    assert metrics.total("http_requests", status="500") == 0
    tokens, texts = metrics.total("generated_tokens"), metrics.total("texts")
    assert load.tokens <= tokens <= load.tokens + load.tokens_left
    assert load.texts <= texts <= load.texts + load.texts_left
    assert faults or load.left == 0
    print(f"{dict(answered)}, {load.left} left, {tokens} tokens, {texts} texts")


async def ended(load: Load) -> None:
    for writer in load.held:
        writer.close()


def test_five_hundred_requests(engine: LLMEngine, cases: list[Case]) -> None:
    settings = ServeSettings(max_queue=10_000, max_body_bytes=MOST_BYTES)
    app = create_app(engine, settings=settings)
    server, loops = app.state.server, []
    before = engine.stats("demo")

    async def noting(scope: Any, receive: Any, send: Any) -> None:
        loops.append(asyncio.get_running_loop())
        await app(scope, receive, send)

    def sockets() -> int:
        return sum(
            link.startswith("socket:")
            for each in os.listdir("/proc/self/fd")
            for link in [os.path.realpath(f"/proc/self/fd/{each}").rpartition("/")[2]]
        )

    with serving(noting) as url, httpx.Client(base_url=url, timeout=60) as client:  # type: ignore[arg-type]
        client.get("/health")

        async def tasks() -> int:
            return len(asyncio.all_tasks())

        def num_tasks() -> int:
            return asyncio.run_coroutine_threadsafe(tasks(), loops[0]).result(30)

        num_before, sockets_before = num_tasks(), sockets()
        address = (client.base_url.host, client.base_url.port or 0)
        load, rng = Load(address, cases), random.Random(SEED)

        async def run() -> None:
            await load.run(100, rng, faults=False)
            counted = Metrics((await asyncio.to_thread(client.get, "/metrics")).text)
            assert counted.total("generated_tokens") == load.tokens + before.num_new_tokens
            assert counted.total("texts") == load.texts + before.num_requests
            await load.run(400, rng, faults=True)
            await ended(load)

        asyncio.run(run())
        load.tokens += before.num_new_tokens
        load.texts += before.num_requests
        check(client, load, faults=True)
        eventually(lambda: server.models["demo"].num_open == 0)
        eventually(lambda: not server.models["demo"].generations)
        eventually(lambda: num_tasks() == num_before)
        eventually(lambda: sockets() <= sockets_before)
    engine.model("demo").allocator.check_integrity()


@pytest.mark.slow
def test_ten_thousand_requests(cases: list[Case]) -> None:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]
    flags += ["--port=0", "--max-queue=100000", "--weight-dtype=float32"]
    flags += [f"--max-body-bytes={MOST_BYTES}", f"--model=demo={DEMO_MODEL}"]
    with (
        # torch keeps a kernel for each shape, up to 1,024 of them.
        serving_process(*flags, ONEDNN_PRIMITIVE_CACHE_CAPACITY="8") as (process, url),
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        own = Path("/proc") / str(process.pid)

        def resident() -> int:
            return int(re.search(r"VmRSS:\s+(\d+) kB", (own / "status").read_text())[1])  # type: ignore[index]

        client.get("/health")
        open_before = len(os.listdir(own / "fd"))
        load, rng = (
            Load((client.base_url.host, client.base_url.port or 0), cases),
            random.Random(SEED),
        )
        memory = []

        async def run() -> None:
            for count in (2_000, 3_000, 5_000):
                await load.run(count, rng, faults=True)
                await ended(load)
                load.held.clear()
                memory.append(resident())
                print(f"resident: {memory[-1] // 1024} MiB", file=sys.stderr)

        asyncio.run(run())
        check(client, load, faults=True)
        assert memory[-1] <= 1.05 * memory[0], memory
        eventually(lambda: len(os.listdir(own / "fd")) <= open_before)
        assert client.get("/health").status_code == 200
