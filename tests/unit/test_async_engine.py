"""AsyncLLMEngine: generations of many tasks, in one event loop or several."""

import asyncio
import random
import threading
from contextlib import aclosing

import pytest
from other_threads import eventually

from tilewright import AsyncLLMEngine, GenerateConfig, LLMEngine, RuntimeConfig
from tilewright.errors import ConfigError, ExecutorError, OutOfPagesError, RequestError
from tilewright.settings import DEMO_MODEL

TRUTHS = "We hold these truths to be self-evident,"
WHEN = "When in the Course of human events,"
RUNTIME = RuntimeConfig(
    weight_dtype="float32", page_size=8, total_pages=64, max_batch_size=4, max_batch_tokens=32
)


def config(max_new_tokens=12, **settings):
    return GenerateConfig(max_new_tokens=max_new_tokens, **settings)


def run(test, runtime=RUNTIME):
    """Run a coroutine function with an engine. No page may be held afterwards."""

    async def main():
        async with AsyncLLMEngine.from_plugins() as engine:
            await engine.init_model("demo", DEMO_MODEL, runtime)
            allocator = engine.engine.model("demo").allocator
            await asyncio.wait_for(test(engine), 120)
            while engine.stats("demo").num_running:
                await asyncio.sleep(0.001)
            allocator.check_integrity()
            assert engine.stats("demo").used_pages == 0

    asyncio.run(main())


async def collected(generation):
    return [delta async for delta in generation]


def joined(deltas):
    """What the deltas say, taken together."""
    logprobs = None
    if deltas[0].logprobs is not None:
        logprobs = tuple(entry for delta in deltas for entry in delta.logprobs)
    return (
        "".join(delta.text for delta in deltas),
        tuple(token for delta in deltas for token in delta.token_ids),
        logprobs,
    )


@pytest.mark.parametrize("settings", [{}, {"logprobs": 2}, {"stop": ("created",)}])
def test_deltas_join_to_the_result(settings):
    async def test(engine):
        alone = await asyncio.to_thread(
            engine.engine.generate_result, "demo", TRUTHS, config(**settings)
        )
        deltas = await collected(engine.generate("demo", TRUTHS, config(**settings)))
        result = deltas[-1].result
        assert [delta.result for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
        assert joined(deltas) == (result.text, result.token_ids, result.logprobs)
        assert (result.text, result.token_ids) == (alone.text, alone.token_ids)
        assert {delta.request_id for delta in deltas} == {result.request_id}
        assert await engine.generate_result("demo", TRUTHS, config(**settings))

    run(test)


def test_a_slow_reader_gets_one_delta_of_all_that_it_has_missed():
    async def test(engine):
        generation = engine.generate("demo", TRUTHS, config(40))
        first = await anext(generation)
        while engine.stats("demo").num_running:
            await asyncio.sleep(0.001)
        rest = await collected(generation)
        assert len(rest) <= 2
        assert joined([first, *rest])[0] == rest[-1].result.text

    run(test)


def test_many_tasks_with_random_cancellation_get_the_texts_of_each_alone():
    rng = random.Random(5)
    prompts = [TRUTHS, WHEN, "We the People", f"{TRUTHS} that all men are created", [5, 6, 7]]
    asked = [
        (
            rng.choice(prompts),
            config(rng.randint(1, 24), temperature=rng.choice([0.0, 1.0]), seed=rng.randint(0, 3)),
        )
        for _ in range(200)
    ]

    async def test(engine):
        alone = {}
        for prompt, settings in asked:
            key = str((prompt, settings))
            if key not in alone:
                alone[key] = await engine.generate_result("demo", prompt, settings)

        async def call(prompt, settings, patience):
            whole = alone[str((prompt, settings))]
            deltas = []
            try:
                async for delta in engine.generate("demo", prompt, settings):
                    deltas.append(delta)
                    if patience is not None:
                        await asyncio.sleep(patience)
            finally:
                text, tokens, _ = joined(deltas) if deltas else ("", (), None)
                assert whole.text.startswith(text)
                assert whole.token_ids[: len(tokens)] == tokens
            assert (text, tokens) == (whole.text, whole.token_ids)

        tasks = [asyncio.create_task(call(*one, rng.choice([None, 0, 0.002]))) for one in asked]
        cancelled = rng.sample(tasks, 60)
        for task in cancelled:
            await asyncio.sleep(rng.choice([0, 0.001, 0.01]))
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        wrong = [r for r in results if r is not None and not isinstance(r, asyncio.CancelledError)]
        assert not wrong
        assert sum(r is None for r in results) >= 140

    run(test, RuntimeConfig(weight_dtype="float32", page_size=4, total_pages=30))


def test_handlers_whose_clients_disconnect_leave_nothing_behind():
    """As starlette streams a response: one task sends and another waits for the disconnect; the
    first of them that ends cancels the other."""
    anyio = pytest.importorskip("anyio")
    rng = random.Random(6)

    async def test(engine):
        whole = (await engine.generate_result("demo", TRUTHS, config(20))).text
        sent = []

        async def handler(patience):
            text = ""

            async def respond(group):
                nonlocal text
                async for delta in engine.generate("demo", TRUTHS, config(20)):
                    await anyio.sleep(0)
                    text += delta.text
                group.cancel_scope.cancel()

            async def wait_for_disconnect(group):
                await anyio.sleep(patience)
                group.cancel_scope.cancel()

            async with anyio.create_task_group() as group:
                group.start_soon(respond, group)
                group.start_soon(wait_for_disconnect, group)
            sent.append(text)

        async with anyio.create_task_group() as clients:
            for _ in range(60):
                clients.start_soon(handler, rng.choice([0.0, 0.005, 0.05, 100.0]))
        assert all(whole.startswith(text) for text in sent)
        assert whole in sent
        assert not engine._open

    run(test)


def test_a_generation_that_is_not_read_to_its_end_is_aborted():
    async def test(engine):
        async with aclosing(engine.generate("demo", TRUTHS, config(100))) as generation:
            await anext(generation)
        while engine.stats("demo").num_running:
            await asyncio.sleep(0.001)
        assert engine.stats("demo").num_new_tokens < 100

    run(test)


def test_abort_ends_a_generation_with_what_it_has():
    async def test(engine):
        generation = engine.generate("demo", TRUTHS, config(100), request_id="mine")
        deltas = [await anext(generation)]
        engine.abort("mine")
        deltas += await collected(generation)
        result = deltas[-1].result
        assert (result.request_id, result.finish_reason) == ("mine", "aborted")
        assert joined(deltas)[1] == result.token_ids
        engine.abort("mine")
        engine.abort("never heard of")

    run(test)


def test_abort_counts_also_while_the_prompt_is_tokenised(monkeypatch):
    async def test(engine):
        new_request = engine.engine._new_request
        tokenising, go_on = threading.Event(), threading.Event()

        def slow(*arguments):
            tokenising.set()
            go_on.wait()
            return new_request(*arguments)

        monkeypatch.setattr(engine.engine, "_new_request", slow)
        task = asyncio.create_task(
            engine.generate_result("demo", TRUTHS, config(100), request_id="mine")
        )
        await asyncio.to_thread(tokenising.wait)
        engine.abort("mine")
        go_on.set()
        assert (await task).finish_reason == "aborted"

    run(test)


def test_a_request_id_is_used_once_at_a_time():
    async def test(engine):
        async with aclosing(
            engine.generate("demo", TRUTHS, config(50), request_id="mine")
        ) as generation:
            first = await anext(generation)
            with pytest.raises(RequestError, match="'mine' is in use"):
                await engine.generate_result("demo", WHEN, config(), request_id="mine")
            rest = await collected(generation)
        assert joined([first, *rest])[1] == rest[-1].result.token_ids
        again = await engine.generate_result("demo", WHEN, config(), request_id="mine")
        assert again.request_id == "mine"

    run(test)


def test_a_request_id_of_two_event_loops_is_used_once(monkeypatch):
    with LLMEngine.from_plugins() as inner:
        inner.init_model("demo", DEMO_MODEL, RUNTIME)
        engine, found, together = AsyncLLMEngine(inner), [], threading.Barrier(6)

        async def one():
            together.wait()
            try:
                result = await engine.generate_result("demo", TRUTHS, config(), request_id="x")
                found.append(result.text)
            except RequestError as error:
                found.append(type(error))

        threads = [threading.Thread(target=lambda: asyncio.run(one())) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        text = inner.generate("demo", TRUTHS, config())
        assert text in found
        assert set(found) <= {RequestError, text}
        assert len(found) == 6
        assert not engine._open


def test_errors_reach_the_task_and_no_other(monkeypatch):
    async def test(engine):
        other = asyncio.create_task(engine.generate_result("demo", WHEN, config(60)))
        for prompt, settings, error in (
            ("", config(), RequestError),
            ([10**9], config(), RequestError),
            (TRUTHS, config(100_000), OutOfPagesError),
            (TRUTHS, config(n=2), RequestError),
            (TRUTHS, 5, ConfigError),
        ):
            with pytest.raises(error):
                await engine.generate_result("demo", prompt, settings)
        with pytest.raises(RequestError, match="no model is named 'demi'"):
            await engine.generate_result("demi", WHEN)
        assert len((await other).token_ids) == 60

        def broken(batch, tap=None):
            raise ExecutorError("the card is hot")

        with monkeypatch.context() as patch:
            patch.setattr(engine.engine.model("demo").executor, "forward", broken)
            with pytest.raises(ExecutorError, match="the card is hot"):
                await engine.generate_result("demo", WHEN)
        assert (await engine.generate_result("demo", WHEN, config())).text

    run(test, RuntimeConfig(weight_dtype="float32", max_seq_len=2048, total_pages=20))


def test_closing_ends_generations_with_an_error_and_leaves_no_thread():
    async def main():
        engine = AsyncLLMEngine.from_plugins()
        await engine.init_model("demo", DEMO_MODEL, RUNTIME)
        generation = engine.generate("demo", TRUTHS, config(200))
        await anext(generation)
        await engine.close()
        with pytest.raises(RequestError, match="engine was closed"):
            await collected(generation)
        with pytest.raises(RequestError, match="closed"):
            await engine.generate_result("demo", TRUTHS)
        await engine.close()
        assert not [t for t in threading.enumerate() if t.name == "tilewright demo"]

    asyncio.run(main())


def test_a_generation_of_an_event_loop_that_is_closed_is_aborted():
    with LLMEngine.from_plugins() as inner:
        inner.init_model("demo", DEMO_MODEL, RUNTIME)
        engine = AsyncLLMEngine(inner)
        loop = asyncio.new_event_loop()
        generations = [engine.generate("demo", p, config(200)) for p in (TRUTHS, WHEN)]
        for generation in generations:
            loop.run_until_complete(anext(generation))
        loop.close()
        eventually(lambda: not engine.stats("demo").num_running)
        assert engine.stats("demo").num_new_tokens < 400
        other = asyncio.run(engine.generate_result("demo", TRUTHS, config(5)))
        assert len(other.token_ids) == 5
        assert len(engine._wakers) == 1


def test_event_loops_of_several_threads_and_plain_calls_share_an_engine():
    with LLMEngine.from_plugins() as inner:
        inner.init_model("demo", DEMO_MODEL, RUNTIME)
        engine, found = AsyncLLMEngine(inner), []
        expected = inner.generate("demo", TRUTHS, config())

        async def several():
            asked = [engine.generate_result("demo", TRUTHS, config()) for _ in range(5)]
            return [result.text for result in await asyncio.gather(*asked)]

        threads = [
            threading.Thread(target=lambda: found.extend(asyncio.run(several()))) for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        found.append(inner.generate("demo", TRUTHS, config()))
        for thread in threads:
            thread.join()
    assert found == [expected] * 16
