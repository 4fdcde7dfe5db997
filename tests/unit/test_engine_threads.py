"""LLMEngine called from several threads: whose thread runs what, how calls end, and what is left.

Most run on an executor whose logits are a hash of its cache, so that a wrong page is a wrong token.
"""

import faulthandler
import gc
import os
import random
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from textwrap import dedent

import pytest
from contract_executors import Hashing
from other_threads import eventually, press_ctrl_c

import tilewright_torch.plugin as torch_plugin
from tilewright import GenerateConfig, LLMEngine, RuntimeConfig, hookimpl
from tilewright.errors import (
    ConfigError,
    ExecutorError,
    ExecutorLostError,
    PluginError,
    RequestError,
)
from tilewright.settings import DEMO_MODEL
from tilewright_guidance import choice

TRUTHS = "We hold these truths to be self-evident,"
WHEN = "When in the Course of human events,"
FOR_EVER = 30.0
"""Seconds within which everything here is done, unless it hangs."""


@pytest.fixture(autouse=True)
def _watchdog():
    """End the process, with the stack of each thread, if a test hangs."""
    faulthandler.dump_traceback_later(4 * FOR_EVER, exit=True, file=sys.__stderr__)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    yield
    gc.collect()
    eventually(lambda: not stepping_threads())


def stepping_threads():
    return [t for t in threading.enumerate() if t.name.startswith("tilewright ")]


class Gated(Hashing):
    """A hash of the cache, with steps that call a function first."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.before = lambda: None
        self.closed = threading.Event()
        self.callers = set()

    def forward(self, batch, tap=None):
        self.callers.add(threading.current_thread().name)
        self.before()
        return super().forward(batch, tap)

    def close(self):
        assert not self.closed.is_set(), "closed twice"
        super().close()
        self.closed.set()


class Blocked:
    """A step that waits until it is let go."""

    def __init__(self, executor):
        self.executor = executor
        self.reached, self.go_on = threading.Event(), threading.Event()

    def __enter__(self):
        self.executor.before = self._wait
        return self

    def _wait(self):
        self.reached.set()
        assert self.go_on.wait(FOR_EVER)

    def __exit__(self, *exc):
        self.executor.before = lambda: None
        self.go_on.set()


@pytest.fixture
def executors(monkeypatch):
    """The executors of the models that are loaded, in the order of loading."""
    made = []

    @hookimpl
    def create_executor(model_config, runtime_config):
        made.append(Gated(model_config.vocab_size))
        return made[-1]

    monkeypatch.setattr(torch_plugin, "create_executor", create_executor)
    return made


@pytest.fixture
def engine(executors):
    with new_engine() as engine:
        yield engine


def new_engine(*names, observers=(), **runtime):
    engine = LLMEngine.from_plugins(observers=observers)
    for name in names or ("demo",):
        load(engine, name, **runtime)
    return engine


def load(engine, name, **runtime):
    settings = {"total_pages": 64, "max_batch_size": 6, "max_batch_tokens": 24, "max_seq_len": 96}
    engine.init_model(name, DEMO_MODEL, RuntimeConfig(**settings | runtime))


def config(max_new_tokens=12, **settings):
    return GenerateConfig(**{"max_new_tokens": max_new_tokens, "ignore_eos": True} | settings)


def in_threads(*functions):
    """What functions return that run at once, each in a thread of its own."""
    with ThreadPoolExecutor(len(functions)) as pool:
        futures = [pool.submit(function) for function in functions]
        return [future.result(timeout=FOR_EVER) for future in futures]


def started(function):
    """A thread that runs a function, and where it puts the exception that it ends with."""
    ended = []

    def run():
        try:
            ended.append(function())
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, ended


def finished(thread, ended):
    thread.join(FOR_EVER)
    assert not thread.is_alive(), "it hangs"
    return ended[0]


@contextmanager
def in_one_step(engine, executor, *calls):
    """Threads that make calls, whose requests wait for the step of another request to end."""
    with Blocked(executor) as blocked:
        before = engine.stream("demo", [3], config(1))
        assert blocked.reached.wait(FOR_EVER)
        callers = [started(lambda call=call: call(engine)) for call in calls]
        eventually(lambda: engine._thread("demo")._posted.qsize() == len(calls))
        yield callers
    del before


def all_free(engine, name="demo"):
    allocator = engine.model(name).allocator
    eventually(lambda: not engine.stats(name).used_pages)
    allocator.check_integrity()


# --- many callers ---------------------------------------------------------------------------------


def calls(count):
    """So many calls: a way to make it, a prompt and settings."""
    rng = random.Random(5)
    shared = [[rng.randrange(1999) for _ in range(24)] for _ in range(3)]
    made = []
    for _ in range(count):
        prompt = rng.choice(shared)[: rng.randint(1, 24)]
        prompt = prompt + [rng.randrange(1999) for _ in range(rng.randint(0, 12))]
        settings = {"max_new_tokens": rng.randint(1, 16), "temperature": 0.0}
        if rng.random() < 0.5:
            settings |= {"temperature": 0.8, "seed": rng.randrange(100)}
        if rng.random() < 0.3:
            settings["logprobs"] = 2
        if rng.random() < 0.3:
            settings["stop"] = ("e", "th")
        way = rng.choice(["result", "result", "batch", "stream", "dropped", "closed", "too long"])
        if way == "batch":
            settings["n"] = 2
        made.append((way, prompt, settings))
    return made


def outcome_of(engine, way, prompt, settings):
    """What a caller gets, as far as it does not depend on when it reads."""
    asked = config(**settings)
    if way == "too long":
        with pytest.raises(RequestError, match="leaves no room"):
            engine.generate("demo", prompt * 97, asked)
        return None
    if way == "batch":
        results = engine.generate_batch("demo", [prompt, prompt * 97], asked)
        assert [bool(result.error) for result in results] == [False, False, True, True]
        return [(r.text, r.token_ids, r.logprobs) for r in results[:2]]
    if way == "result":
        result = engine.generate_result("demo", prompt, asked)
        return result.text, result.token_ids, result.logprobs
    stream = engine.stream("demo", prompt, asked)
    if way == "stream":
        text = "".join(stream)
        assert text == stream.result.text
        return text, stream.result.token_ids
    next(stream, None)
    if way == "closed":
        stream.close()
        assert stream.result.finish_reason in ("aborted", "length", "stop")
        assert list(stream) == []
    return None


def test_hundreds_of_calls_from_eight_threads_get_what_each_gets_alone(engine, executors):
    todo = calls(400)
    known = [outcome_of(engine, *call) for call in todo]
    engine.unload("demo")
    load(engine, "demo", total_pages=26)
    executor = executors[-1]
    found = in_threads(
        *(lambda i=i: [outcome_of(engine, *call) for call in todo[i::8]] for i in range(8))
    )
    for i in range(8):
        assert found[i] == known[i::8]
    all_free(engine)
    stats = engine.stats("demo")
    assert stats.num_preemptions > 0
    assert stats.num_cached_tokens > 0
    assert max(len(batch.request_ids) for batch in executor.batches) > 2
    assert executor.callers == {"tilewright demo"}


def test_calls_of_several_threads_share_steps(engine, executors):
    steps = []
    for prompt in (TRUTHS, WHEN, TRUTHS[3:]):
        before = engine.stats("demo").num_steps
        engine.generate("demo", prompt, config(20))
        steps.append(engine.stats("demo").num_steps - before)
    before = engine.stats("demo").num_steps
    calls = [
        lambda engine, prompt=prompt: engine.generate("demo", prompt, config(20))
        for prompt in (TRUTHS, WHEN, TRUTHS[3:])
    ]
    with in_one_step(engine, executors[0], *calls) as callers:
        pass
    for caller in callers:
        assert isinstance(finished(*caller), str)
    assert engine.stats("demo").num_steps - before < sum(steps) / 2


def test_a_reader_that_does_not_read_stops_nobody(engine):
    unread = engine.stream("demo", TRUTHS, config(60))
    text = engine.generate("demo", WHEN, config(10))
    eventually(lambda: unread.result)
    assert text == engine.generate("demo", WHEN, config(10))
    assert "".join(unread) == engine.generate("demo", TRUTHS, config(60))


def test_streams_that_are_read_in_any_order_progress_alike(engine):
    streams = [engine.stream("demo", prompt, config(30)) for prompt in (TRUTHS, WHEN)]
    text = "".join(streams[1])
    eventually(lambda: streams[0].result)
    assert [len(stream.result.token_ids) for stream in streams] == [30, 30]
    assert text == streams[1].result.text
    assert "".join(streams[0]) == streams[0].result.text


def test_several_threads_that_read_one_stream_all_come_to_its_end(engine, executors):
    for seed in range(20):
        stream = engine.stream("demo", TRUTHS, config(6, temperature=1.0, seed=seed))
        pieces = in_threads(*[lambda stream=stream: list(stream)] * 4)
        read = sorted(piece for some in pieces for piece in some)
        again = engine.stream("demo", TRUTHS, config(6, temperature=1.0, seed=seed))
        assert read == sorted(again)


def test_a_stream_may_be_closed_while_another_thread_reads_it(engine, executors):
    with Blocked(executors[0]) as blocked:
        stream = engine.stream("demo", TRUTHS, config(50))
        reader = started(lambda: list(stream))
        assert blocked.reached.wait(FOR_EVER)
        closer = started(stream.close)
    assert finished(*closer) is None
    assert isinstance(finished(*reader), list)
    assert stream.result.finish_reason == "aborted"


def test_a_model_in_a_long_step_does_not_stop_another_one(executors):
    with new_engine("slow", "quick") as engine, Blocked(executors[0]) as blocked:
        stream = engine.stream("slow", TRUTHS, config(4))
        assert blocked.reached.wait(FOR_EVER)
        assert engine.generate("quick", WHEN, config(5))
        load(engine, "third")
        engine.unload("quick")
        assert engine.stats("slow").num_running == 1
        assert stream.result is None
        blocked.__exit__()
        assert "".join(stream) == stream.result.text


def test_a_logits_processor_is_made_once_and_by_a_caller(engine, executors, monkeypatch):
    makers, original = [], choice.create_logits_processor

    @hookimpl
    def create_logits_processor(model_config, text):
        makers.append(threading.current_thread().name)
        time.sleep(0.05)
        return original(model_config, text)

    monkeypatch.setattr(choice, "create_logits_processor", create_logits_processor)
    asked = config(8, ignore_eos=False, logits_processors={"choice": ["yes", "no"]})
    found = in_threads(
        lambda: "".join(engine.stream("demo", TRUTHS, asked)),
        lambda: engine.generate("demo", TRUTHS, asked),
        lambda: engine.generate_batch("demo", [TRUTHS], asked)[0].text,
    )
    assert found[0] in ("yes", "no")
    assert len(set(found)) == 1
    assert len(makers) == 1
    assert makers[0] != "tilewright demo"


# --- the end --------------------------------------------------------------------------------------


CALLS = {
    "generate": lambda engine: engine.generate("demo", TRUTHS, config(80)),
    "stream": lambda engine: list(engine.stream("demo", TRUTHS, config(80))),
    "batch": lambda engine: engine.generate_batch("demo", [TRUTHS, WHEN], config(50)),
}


@pytest.mark.parametrize("way", ["close", "unload"])
def test_waiting_callers_are_told_that_the_model_was_closed_after_its_step(executors, way):
    engine = new_engine()
    (executor,) = executors
    with Blocked(executor) as blocked:
        callers = [started(lambda call=call: call(engine)) for call in CALLS.values()]
        assert blocked.reached.wait(FOR_EVER)
        end = engine.close if way == "close" else lambda: engine.unload("demo")
        closers = [started(end) for _ in range(3)]
        steps = len(executor.batches)
        eventually(lambda: "demo" not in engine._models)
        time.sleep(0.02)
        assert not executor.closed.is_set()
    errors = [finished(*closer) for closer in closers]
    unknown = [error for error in errors if error is not None]
    assert all("no model is named 'demo'" in str(error) for error in unknown)
    assert len(unknown) == (2 if way == "unload" else 0)
    for caller in callers:
        assert "before this request had finished" in str(finished(*caller)) or way == "unload"
    assert len(executor.batches) <= steps + 1, "a step began after the call of close"
    executor.closed.wait(FOR_EVER)
    with pytest.raises(RequestError, match=r"is closed|no model is named"):
        engine.generate("demo", WHEN, config(1))
    engine.close()
    engine.close()


def test_each_caller_gets_an_error_of_its_own(executors):
    engine = new_engine()
    with in_one_step(engine, executors[0], *[CALLS["generate"]] * 4) as callers:
        closer = started(engine.close)
        eventually(lambda: engine._closed)
    finished(*closer)
    errors = [finished(*caller) for caller in callers]
    assert len({id(error) for error in errors}) == 4
    assert {str(e) for e in errors} == {"the engine was closed before this request had finished"}
    depths = []
    for error in errors:
        depth, at = 0, error.__traceback__
        while at:
            depth, at = depth + 1, at.tb_next
        depths.append(depth)
    assert max(depths) < 12, "tracebacks hold the frames of other callers"


def test_closing_while_a_model_is_loaded_ends_both(monkeypatch, executors):
    reached, go_on = threading.Event(), threading.Event()
    original = Gated.allocate_kv

    def allocate_kv(self, num_pages):
        reached.set()
        assert go_on.wait(FOR_EVER)
        original(self, num_pages)

    engine = LLMEngine.from_plugins()
    monkeypatch.setattr(Gated, "allocate_kv", allocate_kv)
    loading = started(lambda: load(engine, "demo"))
    assert reached.wait(FOR_EVER)
    engine.close()
    go_on.set()
    assert "this engine is closed" in str(finished(*loading))
    assert executors[0].closed.is_set()


def test_a_name_that_two_threads_load_at_once_is_refused_to_one(executors):
    engine = LLMEngine.from_plugins()
    for number in range(5):
        found = [
            started(lambda number=number: load(engine, f"demo{number}", total_pages=4))
            for _ in range(4)
        ]
        errors = [error for one in found if (error := finished(*one))]
        assert [type(error) for error in errors] == [ConfigError] * 3
        assert engine.generate(f"demo{number}", [5], config(2))
    assert len(executors) == 5
    engine.close()
    assert all(executor.closed.is_set() for executor in executors)


def test_models_may_be_loaded_used_and_unloaded_by_all_threads_at_once(executors):
    engine = new_engine()
    expected = engine.generate("demo", TRUTHS, config(6))
    known = (RequestError, ConfigError)

    def hammer(number):
        rng, count = random.Random(number), 0
        for _ in range(25):
            name = rng.choice(["a", "b"])
            try:
                what = rng.randrange(4)
                if what == 0:
                    load(engine, name, total_pages=16)
                elif what == 1:
                    engine.unload(name)
                else:
                    count += 1
                    assert engine.generate(name, TRUTHS, config(6)) == expected
            except known as error:
                assert any(  # noqa: PT017 - which of them is a matter of chance
                    said in str(error)
                    for said in ("no model is named", "already loaded", "was unloaded")
                )
        return count

    assert sum(in_threads(*(lambda i=i: hammer(i) for i in range(6)))) > 30
    assert engine.generate("demo", TRUTHS, config(6)) == expected
    engine.close()
    assert all(executor.closed.is_set() for executor in executors)


@pytest.mark.parametrize("used", [False, True])
def test_an_engine_that_is_dropped_ends_its_thread_and_frees_its_model(executors, used):
    engine = new_engine()
    if used:
        engine.generate("demo", TRUTHS, config(2))
        engine.stream("demo", TRUTHS, config(90))
        assert stepping_threads()
    dropped = weakref.ref(engine)
    del engine
    gc.collect()
    assert dropped() is None
    assert executors[0].closed.wait(FOR_EVER)


def test_an_engine_whose_device_was_lost_can_be_dropped(executors):
    engine = new_engine()
    lost = ExecutorLostError("gone")

    def fail():
        raise lost

    executors[0].before = fail
    for _ in range(2):
        with pytest.raises(ExecutorLostError, match="gone"):
            engine.generate("demo", TRUTHS, config(2))
    dropped = weakref.ref(engine)
    del engine
    gc.collect()
    assert dropped() is None
    assert executors[0].closed.wait(FOR_EVER)


def test_a_stream_keeps_its_engine_until_it_is_dropped(executors):
    stream = new_engine().stream("demo", TRUTHS, config(40))
    gc.collect()
    assert len("".join(stream)) > 0
    assert not executors[0].closed.is_set()
    del stream
    gc.collect()
    assert executors[0].closed.wait(FOR_EVER)


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (ValueError("a bug"), PluginError),
        (ExecutorLostError("gone"), ExecutorLostError),
        (SystemExit(3), SystemExit),
        (MemoryError("full"), MemoryError),
    ],
)
def test_an_error_of_a_step_reaches_every_caller_in_it(engine, executors, error, raised):
    def fail():
        raise error

    with in_one_step(engine, executors[0], *CALLS.values()) as callers:
        pass
    executors[0].before = fail
    for caller in callers:
        assert isinstance(finished(*caller), raised)
    executors[0].before = lambda: None
    all_free(engine)
    if raised is ExecutorLostError:
        with pytest.raises(ExecutorLostError, match="gone"):
            engine.generate("demo", WHEN, config(2))
    else:
        assert engine.generate("demo", WHEN, config(2))


EVENTS = ["on_request_submitted", "on_request_admitted", "on_step", "on_request_finished"]


@pytest.mark.parametrize("event", [*EVENTS, "on_request_aborted", "on_request_failed"])
def test_an_observer_that_exits_hangs_nobody(executors, event):
    @hookimpl
    def leave():
        raise SystemExit(4)

    observer = type("Leaving", (), {event: staticmethod(leave)})()
    with new_engine(observers=[observer]) as engine:
        if event == "on_request_failed":
            executors[0].before = lambda: 1 // 0
        calls = [*CALLS.values(), closed_stream]
        for caller in [started(lambda call=call: call(engine)) for call in calls]:
            found = finished(*caller)
            assert not isinstance(found, Exception) or "ZeroDivisionError" in str(found), found
        executors[0].before = lambda: None
        all_free(engine)
    assert executors[0].closed.is_set()


def test_an_observer_that_makes_requests_when_others_fail_does_not_keep_them_failing(executors):
    class Again:
        asked = 0

        @hookimpl
        def on_request_failed(self):
            self.asked += 1
            executors[0].before = lambda: None
            self.engine.stream("demo", [5, 6], config(3))

    again = Again()
    with new_engine(observers=[again]) as engine:
        again.engine = engine

        def leave():
            raise SystemExit(4)

        executors[0].before = leave
        with pytest.raises(SystemExit):
            engine.generate("demo", TRUTHS, config(3))
        all_free(engine)
    assert again.asked == 1


def test_an_observer_may_not_generate_while_the_executor_computes(executors):
    """A step inside a step would write to the pages that the outer one uses."""

    class Generating:
        error = None

        @hookimpl
        def on_tensor(self):
            if self.error is None:
                with pytest.raises(RequestError, match=r"on_tensor event.* do it in on_step") as e:
                    self.engine.generate("demo", WHEN, config(3))
                self.error = e.value

    generating = Generating()
    with new_engine() as engine:
        alone = engine.generate("demo", TRUTHS, config(6))
    with new_engine(observers=[generating]) as engine:
        generating.engine = engine
        assert engine.generate("demo", TRUTHS, config(6)) == alone
        assert generating.error
        all_free(engine)


def test_all_models_are_closed_though_the_executor_of_one_fails(executors):
    engine = new_engine("one", "two")
    for name in ("one", "two"):
        engine.generate(name, TRUTHS, config(1))

    def fail():
        raise ExecutorError("stuck")

    executors[0].close = fail
    with pytest.raises(ExecutorError, match="stuck"):
        engine.close()
    assert executors[1].closed.is_set()


class Acting:
    """An observer that does something, once, in one event of one model."""

    def __init__(self, event, act, model="demo"):
        self.event, self.act, self.model = event, act, model
        self.found = []

    def _seen(self, event, model_id):
        if self.act and (event, model_id) == (self.event, self.model):
            act, self.act = self.act, None
            try:
                self.found.append(act(self.engine))
            except Exception as error:
                self.found.append(error)

    @hookimpl
    def on_request_submitted(self, model_id):
        self._seen("on_request_submitted", model_id)

    @hookimpl
    def on_request_admitted(self, model_id):
        self._seen("on_request_admitted", model_id)

    @hookimpl
    def on_step(self, event):
        self._seen("on_step", event.model_id)

    @hookimpl
    def on_request_finished(self, result):
        self._seen("on_request_finished", result.model_id)


def closed_stream(engine, name="demo"):
    stream = engine.stream(name, WHEN, config(20))
    next(stream)
    stream.close()
    return stream.result


ACTS = {
    "generate": lambda engine: engine.generate("demo", WHEN, config(3)),
    "generate other": lambda engine: engine.generate("other", WHEN, config(3)),
    "stream": lambda engine: list(engine.stream("demo", WHEN, config(3))),
    "close stream": closed_stream,
    "close stream of other": lambda engine: closed_stream(engine, "other"),
    "unload": lambda engine: engine.unload("demo"),
    "unload other": lambda engine: engine.unload("other"),
    "close": lambda engine: engine.close(),
    "load": lambda engine: load(engine, "third"),
}


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("act", ACTS)
def test_an_observer_may_call_the_engine_in_an_event(executors, event, act):
    observer = Acting(event, ACTS[act])
    with new_engine("demo", "other", observers=[observer]) as engine:
        observer.engine = engine
        caller = started(lambda: engine.generate("demo", TRUTHS, config(8)))
        found = finished(*caller)
        eventually(lambda: observer.found)
        (done,) = observer.found
        assert not isinstance(done, Exception), done
        if act in ("close", "unload"):
            assert isinstance(found, (RequestError, str))
        else:
            assert found == engine.generate("demo", TRUTHS, config(8))
            all_free(engine)
    assert all(executor.closed.is_set() for executor in executors)


def test_observers_of_two_models_that_wait_for_each_other_get_an_error(executors):
    both = threading.Barrier(2)

    def to(name):
        def act(engine):
            both.wait(FOR_EVER)
            return engine.generate(name, WHEN, config(3))

        return act

    observers = [Acting("on_step", to("b"), "a"), Acting("on_step", to("a"), "b")]
    with new_engine("a", "b", observers=observers) as engine:
        for observer in observers:
            observer.engine = engine
        texts = in_threads(*(lambda n=n: engine.generate(n, TRUTHS, config(5)) for n in "ab"))
        assert texts[0] == texts[1]
        refused = [found for o in observers for found in o.found if not isinstance(found, str)]
        assert len(refused) == 1
        assert isinstance(refused[0], RequestError)
        assert "waits for an event of model" in str(refused[0])
        all_free(engine, "a")
        all_free(engine, "b")


def test_a_closed_engine_ends_what_an_observer_waits_for(executors):
    observer = Acting("on_step", lambda engine: engine.generate("demo", WHEN, config(90)))
    engine = observer.engine = new_engine(observers=[observer])
    executor = executors[0]
    ran = []

    def close_later():
        ran.append(None)
        if len(ran) == 5:
            closing.append(started(engine.close))
            eventually(lambda: engine._closed)
            eventually(lambda: thread._reason)

    closing, executor.before, thread = [], close_later, engine._thread("demo")
    with pytest.raises(RequestError, match="was closed"):
        engine.generate("demo", TRUTHS, config(20))
    finished(*closing[0])
    assert isinstance(observer.found[0], RequestError)
    assert len(ran) == 5, "a step began after the call of close"


# --- Ctrl-C ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", CALLS)
def test_ctrl_c_does_not_wait_for_the_step_and_ends_the_requests(engine, executors, way):
    with Blocked(executors[0]) as blocked:

        def press():
            assert blocked.reached.wait(FOR_EVER)
            time.sleep(0.05)
            press_ctrl_c()

        pressing = started(press)
        with pytest.raises(KeyboardInterrupt):
            CALLS[way](engine)
        assert not blocked.go_on.is_set()
        finished(*pressing)
    all_free(engine)
    assert engine.generate("demo", WHEN, config(4))
    assert engine.stats("demo").num_steps < 20, "the requests went on"


def test_ctrl_c_in_a_with_block_of_a_stream_does_not_wait_for_the_step(engine, executors):
    stream = engine.stream("demo", TRUTHS, config(80))
    with Blocked(executors[0]) as blocked:
        assert blocked.reached.wait(FOR_EVER)
        with pytest.raises(KeyboardInterrupt), stream:
            raise KeyboardInterrupt
        assert not blocked.go_on.is_set()
        assert list(stream) == []
    eventually(lambda: stream.result)
    assert stream.result.finish_reason == "aborted"


def test_ctrl_c_while_an_engine_closes_leaves_the_rest_to_its_thread(executors):
    engine = new_engine()
    with Blocked(executors[0]) as blocked:
        stream = engine.stream("demo", TRUTHS, config(80))
        assert blocked.reached.wait(FOR_EVER)

        def press():
            eventually(lambda: engine._closed)
            time.sleep(0.1)
            press_ctrl_c()

        pressing = started(press)
        with pytest.raises(KeyboardInterrupt):
            engine.close()
        finished(*pressing)
        assert not executors[0].closed.is_set()
    assert executors[0].closed.wait(FOR_EVER)
    with pytest.raises(RequestError, match="was closed"):
        list(stream)


# --- finalisers -----------------------------------------------------------------------------------


def test_streams_that_are_collected_anywhere_in_a_step_harm_nobody(engine, executors):
    prompts = [[seed, *range(10 + seed)] for seed in range(6)]
    expected = [engine.generate("demo", prompt, config(20)) for prompt in prompts]

    def drop():
        """Leave streams to the collector, which runs in the thread that makes most objects."""
        for number in range(8):
            dropped = engine.stream("demo", [7, 8, number], config(60))
            closing = closed_at_the_end(engine.stream("demo", [9, number], config(60)))
            next(closing, None)
            for stream in (dropped, closing):
                cycle = [stream]
                cycle.append(cycle)
            del dropped, closing, stream, cycle

    threshold = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(7, 2, 1000)
    try:
        found = in_threads(
            drop, drop, *(lambda p=p: engine.generate("demo", p, config(20)) for p in prompts)
        )
    finally:
        gc.set_threshold(*threshold)
        gc.unfreeze()
    assert found[2:] == expected
    gc.collect()
    all_free(engine)
    eventually(lambda: not engine.stats("demo").num_running)


def closed_at_the_end(stream):
    try:
        yield from stream
    finally:
        stream.close()


@pytest.mark.parametrize(
    "where", ["admit", "schedule", "_step", "_batch", "_ready", "_free_left", "done"]
)
@pytest.mark.parametrize("how", ["deleted", "closed"])
def test_a_stream_that_ends_inside_the_scheduler_harms_nobody(
    engine, executors, monkeypatch, where, how
):
    expected = [engine.generate("demo", prompt, config(10)) for prompt in (TRUTHS, WHEN)]
    streams, called = [], [0]
    scheduler = engine._thread("demo").runner._scheduler
    original = getattr(scheduler, where)

    def collecting(*arguments):
        called[0] += 1
        if streams and called[0] % 3 == 0:
            stream = streams.pop()
            if how == "closed":
                stream.close()
            del stream
        return original(*arguments)

    with Blocked(executors[0]) as blocked:
        first = started(lambda: engine.generate("demo", TRUTHS, config(10)))
        assert blocked.reached.wait(FOR_EVER)
        for number in range(4):
            made = started(lambda n=number: engine.stream("demo", [n] * 9, config(60)))
            streams.append(made)
        second = started(lambda: engine.generate("demo", WHEN, config(10)))
        eventually(lambda: engine._thread("demo")._posted.qsize() == 5)
    made, streams = [finished(*one) for one in streams], []
    monkeypatch.setattr(scheduler, where, collecting)
    streams += made
    del made
    assert [finished(*first), finished(*second)] == expected
    eventually(lambda: not streams or not engine.stats("demo").num_running)
    streams.clear()
    all_free(engine)


def test_an_engine_dropped_by_its_own_thread_in_a_step_is_closed_after_it(executors):
    engine = new_engine()
    dropped, (executor,) = weakref.ref(engine), executors
    held, found, go_on = [engine], [], threading.Event()

    def drop():
        assert go_on.wait(FOR_EVER)
        held.clear()
        gc.collect()
        found.append((dropped(), executor.closed.is_set()))

    executor.before = drop
    stream = engine.stream("demo", TRUTHS, config(90))
    del engine, stream
    go_on.set()
    assert executor.closed.wait(FOR_EVER)
    assert found == [(None, False)]


# --- processes ------------------------------------------------------------------------------------


PRELUDE = """
import atexit, gc, os, sys, threading, time
import tilewright_torch.plugin as torch_plugin
from contract_executors import Hashing
from tilewright import GenerateConfig, LLMEngine, RuntimeConfig, hookimpl
from tilewright.settings import DEMO_MODEL

class Executor(Hashing):
    def forward(self, batch, tap=None):
        started.set()
        time.sleep(step)
        return super().forward(batch, tap)
    def close(self):
        print("closed", flush=True)

@hookimpl
def create_executor(model_config, runtime_config):
    atexit.register(print, "library ends", flush=True)
    return Executor(model_config.vocab_size)

torch_plugin.create_executor = create_executor
started, step = threading.Event(), 0.0
engine = LLMEngine.from_plugins()
engine.init_model("demo", DEMO_MODEL, RuntimeConfig(total_pages=64, max_seq_len=96))
config = GenerateConfig(max_new_tokens=80, ignore_eos=True)
"""


def run(source):
    """What a process prints, to both streams, and its exit code."""
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + dedent(source)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=4 * FOR_EVER,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        check=False,
    )
    return done.stdout.splitlines(), done.returncode


@pytest.mark.parametrize(
    "source",
    [
        "engine.generate('demo', [5], config)",
        "step = 0.3; stream = engine.stream('demo', [5], config); started.wait()",
        "step = 0.3; engine.stream('demo', [5], config); started.wait(); del engine",
    ],
    ids=["idle", "long step", "dropped"],
)
def test_a_process_that_closes_nothing_frees_the_device_before_it_ends(source):
    lines, code = run(source)
    assert (lines, code) == (["closed", "library ends"], 0)


def test_a_forked_child_is_told_to_make_its_own_engine():
    lines, code = run(
        """
        stream = engine.stream('demo', [5], config)
        next(stream)
        child = os.fork()
        if child == 0:
            calls = [lambda: engine.generate('demo', [5], config), lambda: list(stream)]
            for call in calls:
                try:
                    call()
                except Exception as error:
                    print(type(error).__name__, 'make the engine after the fork' in str(error))
            engine.close()
            del stream, engine
            gc.collect()
            print('child ends', flush=True)
            sys.exit()
        assert os.waitpid(child, 0)[1] == 0
        engine.close()
        """
    )
    told = ["RequestError True"] * 2 + ["child ends", "library ends"]
    assert (lines, code) == ([*told, "closed", "library ends"], 0)
