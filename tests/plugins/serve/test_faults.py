"""What clients see of faults: of their own, of other clients, and of plugins."""

import asyncio
import json
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import httpx
import pytest
import torch
from attrs import define, field
from other_threads import eventually
from serving import events, request, serving

from tilewright import LLMEngine, RuntimeConfig, hookimpl
from tilewright.errors import ExecutorLostError
from tilewright.logits_processing import Processing
from tilewright.settings import DEMO_MODEL
from tilewright_serve import ServeSettings, answering, create_app
from tilewright_serve.server import Server

RUNTIME = RuntimeConfig(
    weight_dtype="float32",
    page_size=8,
    total_pages=64,
    max_batch_size=2,
    max_batch_tokens=32,
    max_seq_len=256,
)
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
JSON = {"content-type": "application/json"}


class Shaky:
    """An observer that fails when it is told to; the engine then listens to it no more."""

    fails = False

    @hookimpl
    def on_step(self, event: Any) -> None:
        if self.fails:
            raise ValueError("the observer fails")


@define
class Steps:
    """In the place of an executor's ``forward``: steps that wait, and fail, on command."""

    usual: Callable[..., torch.Tensor]
    fault: Callable[[Any, torch.Tensor], torch.Tensor] | None = None
    """What becomes of a step's logits."""
    count: int = 0
    permits: threading.Semaphore | None = None
    """One is taken by each step; None: steps do not wait."""
    waits: threading.Event = field(factory=threading.Event)
    """Set while a step waits."""

    def __call__(self, batch: Any, tap: Any = None) -> torch.Tensor:
        self.count += 1
        if self.permits is not None:
            permits = self.permits
            self.waits.set()
            assert permits.acquire(timeout=30)
        logits = self.usual(batch, tap)
        return self.fault(batch, logits) if self.fault else logits

    def hold(self, permits: int = 0) -> None:
        """Let so many steps run, and the one after them wait."""
        self.waits.clear()
        self.permits = threading.Semaphore(permits)

    def go_on(self) -> None:
        permits, self.permits = self.permits, None
        if permits is not None:
            permits.release(1000)


@define
class Served:
    url: str
    client: httpx.Client
    server: Server
    engine: LLMEngine

    @property
    def address(self) -> tuple[str, int]:
        return self.client.base_url.host, self.client.base_url.port or 0

    @property
    def num_open(self) -> int:
        return self.server.models["demo"].num_open

    def post(self, path: str = COMPLETIONS, **body: Any) -> httpx.Response:
        return self.client.post(path, json={"prompt": "We hold", **body})

    def in_thread(self, **body: Any) -> tuple[threading.Thread, list[httpx.Response]]:
        """The thread of a request, and its response once it has ended."""
        found: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: found.append(self.post(**body)), daemon=True)
        thread.start()
        return thread, found

    def connected(self, body: dict[str, Any], path: str = COMPLETIONS) -> socket.socket:
        """A connection with a request on its way."""
        made = socket.create_connection(self.address, timeout=30)
        made.sendall(request(path, json.dumps(body).encode()))
        return made

    def health(self) -> tuple[int, str]:
        found = self.client.get("/health")
        return found.status_code, found.json()["models"]["demo"]

    def is_idle(self) -> bool:
        stats = self.engine.stats("demo")
        return not (stats.used_pages or stats.num_running or stats.num_waiting or self.num_open)


@pytest.fixture(scope="module")
def observer() -> Shaky:
    return Shaky()


@pytest.fixture(scope="module")
def loaded(observer: Shaky) -> Iterator[LLMEngine]:
    with LLMEngine.from_plugins(observers=[observer]) as engine:
        engine.init_model("demo", DEMO_MODEL, RUNTIME)
        yield engine


@pytest.fixture
def steps(loaded: LLMEngine) -> Iterator[Steps]:
    executor: Any = loaded.model("demo").executor
    executor.forward = made = Steps(executor.forward)
    yield made
    made.go_on()
    del executor.forward


@contextmanager
def served(engine: LLMEngine, reload: Any = None, **settings: Any) -> Iterator[Served]:
    app = create_app(engine, settings=ServeSettings(**settings), reload=reload)
    with serving(app) as url, httpx.Client(base_url=url, timeout=30) as client:
        made = Served(url, client, app.state.server, engine)
        yield made
        eventually(made.is_idle)
        if engine.model_ids:
            engine.model("demo").allocator.check_integrity()


@pytest.fixture(scope="module")
def _shared(loaded: LLMEngine) -> Iterator[Served]:
    with served(loaded) as made:
        yield made


@pytest.fixture
def demo(_shared: Served) -> Iterator[Served]:
    """The server that tests share whose settings are the usual ones."""
    yield _shared
    assert _shared.post(max_tokens=1).status_code == 200
    eventually(_shared.is_idle)
    assert _shared.health() == (200, "ok")


def error_of(response: httpx.Response) -> dict[str, Any]:
    found: dict[str, Any] = response.json()["error"]
    assert found.keys() == {"message", "type", "param", "code"}
    assert found["message"]
    return found


# --- clients that go away ------------------------------------------------------------------------

LONG = {"prompt": "We hold", "max_tokens": 200, "ignore_eos": True}
CHATTING = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 200, "ignore_eos": True}


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("taken", [0, 1, 5], ids="after {} steps".format)
@pytest.mark.parametrize(
    ("path", "body"),
    [(COMPLETIONS, LONG), (COMPLETIONS, LONG | {"stream": True}), (CHAT, CHATTING)],
    ids=["whole", "stream", "chat"],
)
def test_a_client_that_goes_away_frees_its_pages_when_the_step_in_flight_ends(
    demo: Served, steps: Steps, path: str, body: dict[str, Any], taken: int, n: int
) -> None:
    steps.hold(taken)
    connection = demo.connected(body | {"n": n}, path)
    eventually(lambda: steps.count == taken + 1)
    connection.close()
    eventually(lambda: demo.num_open == 0)
    steps.go_on()
    eventually(demo.is_idle)
    assert steps.count == taken + 1


def test_a_client_that_goes_away_from_the_queue_leaves_the_others_alone(
    demo: Served, steps: Steps
) -> None:
    steps.hold()
    first = [demo.in_thread(max_tokens=5, temperature=0) for _ in range(2)]
    eventually(lambda: demo.num_open == 2 and steps.waits.is_set())
    connection = demo.connected(LONG)
    eventually(lambda: demo.num_open == 3)
    connection.close()
    eventually(lambda: demo.num_open == 2)
    steps.go_on()
    for thread, found in first:
        thread.join(30)
        assert found[0].json()["usage"]["completion_tokens"] == 5
    assert demo.engine.stats("demo").num_waiting == 0


def test_a_client_that_goes_away_while_it_sends_is_counted_as_499(demo: Served) -> None:
    def count() -> float:
        labels = {"method": "POST", "path": COMPLETIONS, "status": "499"}
        registry = demo.server.metrics.registry
        return registry.get_sample_value("tilewright_http_requests_total", labels) or 0.0

    before = count()
    with socket.create_connection(demo.address) as connection:
        connection.sendall(request(COMPLETIONS, b'{"prompt": ', length=100))
    eventually(lambda: count() == before + 1)


def test_half_a_request_hinders_nobody(demo: Served) -> None:
    with (
        socket.create_connection(demo.address) as headers,
        socket.create_connection(demo.address) as body,
    ):
        headers.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-")
        body.sendall(request(COMPLETIONS, b'{"prompt": ', length=100))
        assert demo.post(max_tokens=1).status_code == 200


# --- slow readers, and time limits ---------------------------------------------------------------


def test_a_reader_that_waits_longer_than_the_time_limit_still_gets_the_end(
    loaded: LLMEngine, steps: Steps
) -> None:
    """A time limit that falls due while an event is sent must not end the response there."""
    sent, _ = asyncio.run(asgi(loaded, LONG | {"stream": True}, slow_at=3, request_timeout=0.2))
    found = events(b"".join(message.get("body", b"") for message in sent).decode())
    assert found[-2]["error"]["code"] == "timeout"
    assert found[-1] == "[DONE]"
    assert sent[-1]["more_body"] is False


def test_a_reader_that_reads_nothing_is_given_up(
    loaded: LLMEngine, steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answering, "STALLED", 0.1)
    sent, server = asyncio.run(asgi(loaded, LONG | {"stream": True}, slow_at=3))
    assert len(sent) == 3
    assert not server.models["demo"].generations
    eventually(lambda: loaded.stats("demo").used_pages == 0)


def test_a_text_that_is_made_but_not_read_takes_no_place_in_the_queue(
    loaded: LLMEngine, steps: Steps
) -> None:
    async def while_it_is_sent(server: Server) -> None:
        while loaded.stats("demo").num_running:
            await asyncio.sleep(0.001)
        assert server.models["demo"].generations
        assert server.models["demo"].num_open == 0

    sent, _ = asyncio.run(asgi(loaded, LONG | {"stream": True}, 2, while_it_is_sent))
    assert json.loads(sent[-3]["body"][6:])["choices"][0]["finish_reason"] == "length"


async def asgi(
    engine: LLMEngine,
    body: dict[str, Any],
    slow_at: int,
    meanwhile: Callable[[Server], Any] | None = None,
    **settings: Any,
) -> tuple[list[Any], Server]:
    """What an application sends to a client whose reading of one message takes a while, at most
    half a second. Fails if it leaves a task behind."""
    app = create_app(engine, settings=ServeSettings(**settings))
    sent: list[Any] = []
    asked = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive() -> Any:
        return asked.pop() if asked else await asyncio.Event().wait()

    async def send(message: Any) -> None:
        if len(sent) == slow_at:
            await (meanwhile(app.state.server) if meanwhile else asyncio.sleep(0.5))
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "path": COMPLETIONS,
        "raw_path": COMPLETIONS.encode(),
        "root_path": "",
        "scheme": "http",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }
    await app(scope, receive, send)
    assert asyncio.all_tasks() == {asyncio.current_task()}
    return sent, app.state.server


@pytest.mark.parametrize("n", [1, 2])
def test_a_request_that_takes_too_long_ends_with_an_error(
    loaded: LLMEngine, steps: Steps, n: int
) -> None:
    with served(loaded, request_timeout=0.3) as demo:
        steps.hold(2)
        whole = demo.post(max_tokens=9, n=n)
        assert whole.status_code == 503
        assert error_of(whole)["code"] == "timeout"
        steps.permits.release(2)  # type: ignore[union-attr]
        found = events(demo.post(max_tokens=9, n=n, stream=True, ignore_eos=True).text)
        assert found[-2]["error"]["code"] == "timeout"
        assert found[-1] == "[DONE]"
        steps.go_on()
        assert demo.post(max_tokens=1).status_code == 200


# --- full queues ---------------------------------------------------------------------------------


def test_a_full_queue_is_told_at_once(loaded: LLMEngine, steps: Steps) -> None:
    with served(loaded, max_queue=1) as demo:
        steps.hold()
        running = [demo.in_thread(max_tokens=2) for _ in range(3)]
        eventually(lambda: demo.num_open == 3)
        for body in ({}, {"stream": True}, {"n": 2}):
            refused = demo.post(**body)
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) >= 1
            assert error_of(refused)["code"] == "queue_full"
        steps.go_on()
        for thread, found in running:
            thread.join(30)
            assert found[0].status_code == 200
        eventually(lambda: demo.num_open == 0)
        assert demo.post(n=4, max_tokens=1).status_code == 200  # more than fit, on its own


@pytest.mark.parametrize("body", [{"n": 10**9}, {"best_of": 10**9}, {"prompt": ["x"] * 129}])
def test_too_many_texts_are_refused_before_they_cost_anything(
    demo: Served, body: dict[str, Any]
) -> None:
    assert "expected at most 128 texts" in error_of(demo.post(**body))["message"]


# --- plugins that fail ---------------------------------------------------------------------------


def fault(error: Exception) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    def raised(batch: Any, logits: torch.Tensor) -> torch.Tensor:
        raise error

    return raised


def test_an_executor_that_raises_fails_the_requests_of_its_step_and_is_told_once(
    loaded: LLMEngine, steps: Steps, caplog: pytest.LogCaptureFixture
) -> None:
    with served(loaded) as demo:
        steps.hold()
        running = [demo.in_thread(max_tokens=9) for _ in range(2)]
        eventually(lambda: demo.num_open == 2 and steps.waits.is_set())
        steps.fault = fault(RuntimeError("the chip is on fire"))
        steps.go_on()
        for thread, found in running:
            thread.join(30)
            assert found[0].status_code == 500
            assert "the chip is on fire" in error_of(found[0])["message"]
        found = events(demo.post(stream=True).text)
        assert "the chip is on fire" in found[-2]["error"]["message"]
        assert found[-1] == "[DONE]"
        several = demo.post(n=3)
        assert several.status_code == 500
        status, reason = demo.health()
        assert status == 503
        assert "the chip is on fire" in reason
        errors = [record for record in caplog.records if record.levelno >= logging.ERROR]
        assert len(errors) == 1
        assert "the chip is on fire" in errors[0].message
        assert errors[0].exc_info is None
        steps.fault = None
        assert demo.post(max_tokens=3).status_code == 200
        assert demo.health() == (200, "ok")


def test_an_error_after_the_first_token_is_an_event(demo: Served, steps: Steps) -> None:
    steps.fault = lambda batch, logits: logits if steps.count < 4 else fault(OSError("gone"))(0, 0)  # type: ignore[arg-type]
    body = {"stream": True, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    found = events(demo.post(**body).text)
    assert sum(len(each["choices"][0]["token_ids"]) for each in found[:-2]) == 3
    assert "gone" in found[-2]["error"]["message"]
    assert found[-1] == "[DONE]"
    steps.fault = None


def test_a_lost_device_is_lost_until_the_model_is_loaded_again(
    loaded: LLMEngine, caplog: pytest.LogCaptureFixture
) -> None:
    reloads: list[str] = []

    def reload(engine: LLMEngine, name: str) -> None:
        reloads.append(name)
        engine.unload(name)
        engine.init_model(name, DEMO_MODEL, RUNTIME)

    def lose() -> None:
        executor: Any = loaded.model("demo").executor
        executor.forward = Steps(executor.forward, fault(ExecutorLostError("the device is gone")))

    with served(loaded, reload, restarts=1) as demo:
        lose()
        failed = [demo.in_thread() for _ in range(2)]
        for thread, found in failed:
            thread.join(30)
            assert found[0].status_code in (500, 503)
        assert 500 in [found[0].status_code for _, found in failed]
        eventually(lambda: demo.health() == (200, "ok"))
        assert demo.post(max_tokens=3).status_code == 200

        lose()  # and nothing loads it again
        caplog.clear()
        for _ in range(3):
            assert "the device is gone" in error_of(demo.post())["message"]
        assert demo.post(stream=True).status_code == 500  # it has not begun
        assert demo.health()[0] == 503
        assert len([r for r in caplog.records if r.levelno >= logging.ERROR]) == 1
        assert reloads == ["demo"]
    reload(loaded, "demo")


def test_a_model_that_cannot_be_loaded_again_says_why(loaded: LLMEngine, steps: Steps) -> None:
    def reload(engine: LLMEngine, name: str) -> None:
        raise OSError("the disk is gone")

    with served(loaded, reload, restarts=1) as demo:
        steps.fault = fault(RuntimeError("a fault"))
        assert demo.post().status_code == 500
        eventually(lambda: "the disk is gone" in demo.health()[1])
        steps.fault = None
        assert demo.post().status_code == 200
        assert demo.health() == (200, "ok")


def test_a_model_that_could_not_be_loaded_again_is_loaded_once_more(
    loaded: LLMEngine, steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tilewright_serve.server.RELOAD_PAUSE", 0.01)
    tries = 0

    def reload(engine: LLMEngine, name: str) -> None:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise OSError("the disk is away")

    with served(loaded, reload, restarts=5) as demo:
        steps.fault = fault(RuntimeError("a fault"))
        assert demo.post().status_code == 500
        steps.fault = None
        eventually(lambda: demo.health() == (200, "ok"))
        assert tries == 3


def test_while_a_model_is_loaded_again_its_requests_are_told_to_wait(
    loaded: LLMEngine, steps: Steps
) -> None:
    go_on = threading.Event()
    with served(loaded, lambda engine, name: go_on.wait(30), restarts=1) as demo:
        steps.fault = fault(RuntimeError("a fault"))
        assert demo.post().status_code == 500
        waiting = demo.post()
        assert waiting.status_code == 503
        assert "retry-after" in waiting.headers
        assert demo.health() == (503, "loading again")
        assert demo.client.get("/metrics").status_code == 200
        assert demo.client.get("/stats").json() == {"models": {}}
        assert demo.client.get("/v1/models").json()["data"] == []
        steps.fault = None
        go_on.set()
        eventually(lambda: demo.health() == (200, "ok"))
        assert demo.post().status_code == 200


def test_a_sampler_that_raises_is_a_failure_of_the_model(
    loaded: LLMEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        def sample(self, logits: object, rows: object) -> None:
            raise ZeroDivisionError("the sampler fails")

    with served(loaded) as demo:
        with monkeypatch.context() as patch:
            patch.setattr(loaded._thread("demo").runner, "_sampler", Broken())
            failed = demo.post()
            assert failed.status_code == 500
            assert "the sampler fails" in error_of(failed)["message"]
            assert demo.health()[0] == 503
        assert demo.post().status_code == 200
        assert demo.health()[0] == 200


@pytest.mark.parametrize("fails_in", ["begin", "edits", "accept"])
def test_a_logits_processor_that_raises_fails_only_the_requests_that_use_it(
    demo: Served, steps: Steps, monkeypatch: pytest.MonkeyPatch, fails_in: str
) -> None:
    class Broken:
        def __getattr__(self, name: str) -> Callable[..., None]:
            def method(*arguments: object) -> None:
                if name == fails_in:
                    raise ZeroDivisionError("the processor fails")

            return method

    runner = demo.engine._thread("demo").runner
    monkeypatch.setattr(runner, "_processors", lambda name: Processing(name, Broken(), None))
    steps.hold()
    other, found = demo.in_thread(max_tokens=5)
    eventually(lambda: demo.num_open == 1 and steps.waits.is_set())
    broken = demo.in_thread(structured_outputs={"regex": "a"}, max_tokens=5)
    if fails_in != "begin":
        eventually(lambda: demo.num_open == 2)
    steps.go_on()
    for thread in (other, broken[0]):
        thread.join(30)
    assert found[0].status_code == 200
    assert broken[1][0].status_code == 500
    assert "the processor fails" in error_of(broken[1][0])["message"]
    assert demo.health() == (200, "ok")


def test_logits_that_are_not_numbers_fail_that_request_alone(demo: Served, steps: Steps) -> None:
    def poisoned(batch: Any, logits: torch.Tensor) -> torch.Tensor:
        logits = logits.clone()
        for row, length in enumerate(batch.context_lens.tolist()):
            if length == 9:
                logits[row] = torch.nan
        return logits

    alone = demo.post(prompt=[5, 6, 7], max_tokens=5, temperature=0).json()["choices"]
    steps.fault = poisoned
    steps.hold()
    other, found = demo.in_thread(prompt=[5, 6, 7], max_tokens=5, temperature=0)
    eventually(lambda: steps.waits.is_set())
    bad, failed = demo.in_thread(prompt=[5] * 9)
    eventually(lambda: demo.num_open == 2)
    steps.go_on()
    for thread in (other, bad):
        thread.join(30)
    assert failed[0].status_code == 500
    assert "not finite" in error_of(failed[0])["message"]
    assert found[0].json()["choices"] == alone
    assert demo.health() == (200, "ok")


@pytest.mark.filterwarnings("ignore::tilewright.errors.PluginWarning")
def test_an_observer_that_raises_harms_no_request(demo: Served, observer: Shaky) -> None:
    observer.fails = True
    assert demo.post(max_tokens=3).status_code == 200
    assert demo.health() == (200, "ok")


def test_a_fault_of_the_server_itself_is_an_error_object_and_the_connection_goes_on(
    demo: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr("tilewright_serve.completions.generate_config", broken)
        failed = demo.post()
        assert failed.status_code == 500
        assert error_of(failed)["type"] == "server_error"
    with monkeypatch.context() as patch:
        patch.setattr("tilewright_serve.completions.CompletionAnswer.added", broken)
        found = events(demo.post(stream=True).text)
        assert found[-2]["error"]["type"] == "server_error"
        assert found[-1] == "[DONE]"
    assert demo.post().status_code == 200


# --- bad requests --------------------------------------------------------------------------------

BODIES = {
    "nothing": b"",
    "half": b'{"prompt": ',
    "null": b"null",
    "list": b"[]",
    "deep": b'{"prompt": ' + b"[" * 100_000,
    "deep and closed": b'{"messages": [{"a": ' + b"[" * 999 + b"]" * 999 + b"}]}",
    "NaN": b'{"prompt": "a", "messages": [{}], "temperature": NaN, "tokens": NaN}',
    "1e999": b'{"prompt": "a", "messages": [{}], "max_tokens": 1e999, "tokens": [1e999]}',
    "digits": b'{"prompt": [%b], "messages": [{}], "tokens": [%b]}' % ((b"9" * 5000,) * 2),
    "long": b'{"prompt": [%b], "messages": [{}], "tokens": [%b]}' % ((b"9" * 30,) * 2),
    "UTF-8": b'{"prompt": "a\xff", "messages": [{"role": "user", "content": "\xff"}]}',
    "BOM": b'\xef\xbb\xbf{"prompt": "a"}',
    "UTF-16": '{"prompt": "a"}'.encode("utf-16"),
    "surrogate": rb'{"prompt": "\ud800", "messages": [{"role": "user", "content": "\ud800"}]}',
    "twice": b'{"prompt": "a", "prompt": 5, "messages": 5, "tokens": 5}',
    "wrong types": b'{"prompt": {}, "messages": {}, "tokens": {}}',
    "millions": b'{"prompt": [%b 1], "messages": [%b 1], "tokens": [%b 1]}'
    % ((b"1.5," * 99999,) * 3),
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_a_body_that_cannot_be_read_is_400(demo: Served, body: bytes) -> None:
    for path in (COMPLETIONS, CHAT, "/tokenize", "/detokenize"):
        found = demo.client.post(path, content=body, headers=JSON)
        assert found.status_code == 400, path
        assert error_of(found)["type"] == "invalid_request_error"


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large_is_413_and_the_connection_goes_on(
    loaded: LLMEngine, chunked: bool
) -> None:
    with served(loaded, max_body_bytes=1000) as demo:
        body = json.dumps({"prompt": "x" * 100_000}).encode()
        content: Any = iter([body[i : i + 100] for i in range(0, len(body), 100)])
        found = demo.client.post(COMPLETIONS, content=content if chunked else body, headers=JSON)
        assert found.status_code == 413
        assert "1000 bytes" in error_of(found)["message"]
        assert demo.post(max_tokens=1).status_code == 200


def test_one_connection_takes_good_and_bad_requests(demo: Served) -> None:
    good = json.dumps({"prompt": "We hold", "max_tokens": 1}).encode()
    with socket.create_connection(demo.address, timeout=30) as connection:
        file = connection.makefile("rb")
        for body, expected in [(good, 200), (b"{", 400), (b'{"prompt": 5}', 400), (good, 200)]:
            connection.sendall(request(COMPLETIONS, body))
            assert read_response(file)[0] == expected
        both = request(COMPLETIONS, b"{") + request(COMPLETIONS, good)  # pipelined
        connection.sendall(both)
        assert [read_response(file)[0] for _ in range(2)] == [400, 200]


def read_response(file: Any) -> tuple[int, bytes]:
    status = int(file.readline().split()[1])
    length = 0
    while line := file.readline().strip():
        name, _, value = line.partition(b":")
        length = int(value) if name.lower() == b"content-length" else length
    return status, file.read(length)


@pytest.mark.parametrize(
    "sent",
    [
        request(COMPLETIONS, b'{"prompt": "a"}', length=5),
        b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\n",
        b"nonsense\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
    ],
    ids=["length too small", "negative length", "two lengths", "nonsense", "TLS"],
)
def test_what_is_not_http_is_refused_and_closed(demo: Served, sent: bytes) -> None:
    with socket.create_connection(demo.address, timeout=30) as connection:
        connection.sendall(sent)
        found = b""
        with suppress(ConnectionResetError):
            while part := connection.recv(1000):
                found += part
    assert found.startswith(b"HTTP/1.1 400 ")


def test_methods_and_paths_that_are_not_served(demo: Served) -> None:
    for method, path in [("OPTIONS", COMPLETIONS), ("GET", COMPLETIONS), ("PUT", "/health")]:
        found = demo.client.request(method, path)
        assert found.status_code == 405
        assert found.headers["allow"]
        error_of(found)
    assert error_of(demo.client.get("/v1/nothing"))["type"] == "not_found_error"
    head = demo.client.head("/health")
    assert (head.status_code, head.content) == (200, b"")
