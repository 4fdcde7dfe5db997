"""Faults that inference engines have had with batches, reused pages and preemption, each by name.

The executor's logits are a hash of what its cache holds, and pages are overwritten when they are
given back (``context_hash``): a request that reads anything else than its own tokens gets another
result than alone.
"""

import gc
import random
import weakref
from collections import Counter
from contextlib import suppress

import pytest
import torch
from alone import alone, processors_of, result_of
from attrs import evolve
from context_hash import _LOGITS, ContextHash, InFlight, WatchedPages, _rows, contents
from contract_executors import (
    Device,
    Hashing,
    OwnPages,
    all_free,
    demo_model,
    make_runner,
    requests,
    run,
)
from reference_models import CONFIGS, prompts, write_model

import tilewright.kv_cache
from tilewright import GenerateConfig, LLMEngine, RuntimeConfig, hookimpl
from tilewright.errors import RequestError
from tilewright.kv_cache import KvCacheManager
from tilewright.types import LogitsEdits, SamplingExecutor

VOCAB_SIZE = 64
SIZE = 4
"""Tokens in a page, unless a test says otherwise."""


@pytest.fixture(scope="module")
def model():
    """The bundled model's text, with the first 64 of its tokens; the last one ends a text."""
    for demo in demo_model():
        config = evolve(demo.loaded.config, vocab_size=VOCAB_SIZE, eos_token_ids=(63,))
        yield evolve(demo, loaded=evolve(demo.loaded, config=config))


class Recording(ContextHash):
    """Keeps its batches."""

    def __init__(self, page_size=SIZE, **limits):
        super().__init__(VOCAB_SIZE, page_size, **limits)
        self.batches = []

    def forward(self, batch, tap=None):
        self.batches.append(batch)
        return super().forward(batch, tap)


def spans(batch):
    """Start, stop and number of drafts of each request's part of a batch."""
    stops, lengths = batch.context_lens, batch.query_starts.diff()
    numbers = torch.stack([stops - lengths, stops, batch.num_drafts], dim=1).tolist()
    return dict(zip(batch.request_ids, map(tuple, numbers), strict=True))


class Listener:
    """An observer that keeps what it is told."""

    def __init__(self):
        self.events = []
        self.steps = []

    def of(self, name):
        """The events of a request, in order."""
        return [event for event, request_id, _ in self.events if request_id == name]

    @hookimpl
    def on_step(self, event):
        self.steps.append(event)

    @hookimpl
    def on_request_submitted(self, request_id):
        self.events.append(("submitted", request_id, None))

    @hookimpl
    def on_request_admitted(self, request_id, cached_tokens):
        self.events.append(("admitted", request_id, cached_tokens))

    @hookimpl
    def on_request_preempted(self, request_id):
        self.events.append(("preempted", request_id, None))

    @hookimpl
    def on_request_finished(self, result):
        self.events.append(("finished", result.request_id, result))

    @hookimpl
    def on_request_aborted(self, result):
        self.events.append(("aborted", result.request_id, result))


def watched(model, page_size=SIZE, total_pages=64, limits=None, in_flight=False, **more):
    """A runner on a ``ContextHash`` whose pages are watched, and that executor."""
    inner = Recording(page_size, **(limits or {}))
    pages = WatchedPages(total_pages, inner)
    executor = InFlight(inner) if in_flight else inner
    runner = make_runner(model, executor, total_pages=total_pages, allocator=pages, **more)
    return runner, inner


def expected(model, *made, processors=None, **settings):
    """The results of prompts that run alone. Arguments as those of ``requests``."""
    return [
        alone(model, ContextHash(VOCAB_SIZE, 16), prompt, processors, **settings) for prompt in made
    ]


def named(prefix, made):
    for i, request in enumerate(made):
        request.request_id = f"{prefix}{i}"
    return made


def tokens(length, seed=0):
    return random.Random(seed).choices(range(62), k=length)


def check(runner, inner):
    """Nothing was wrong, and no page is held."""
    assert not inner.wrong, inner.wrong
    assert all_free(runner)


def run_with_news(runner, made=()):
    """As ``run``, but takes the news of each step, as an engine's thread does."""
    for request in made:
        runner.add(request)
    while runner.requests:
        runner.step()
        runner.poll()


# --- pages that are found -------------------------------------------------------------------------


def test_a_hit_between_different_tokens_whose_hashes_are_equal(model, monkeypatch):
    class Colliding(bytes):
        def __hash__(self):
            return 0

    of_page = KvCacheManager._tokens
    monkeypatch.setattr(KvCacheManager, "_tokens", lambda *given: Colliding(of_page(*given)))
    monkeypatch.setattr(tilewright.kv_cache._Content, "__hash__", lambda content: 0)
    page = [tokens(SIZE, seed) for seed in range(4)]
    texts = [
        page[0] + page[1] + [7],
        page[1] + page[0] + [7],  # the same pages in another order
        page[2] + page[1] + [7],  # an equal page behind another one
        page[0] + page[2] + [7],
        page[0] + page[1] + page[3] + [7],
    ]
    runner, inner = watched(model, max_batch_tokens=64)
    found = []
    for i, text in enumerate(texts):
        made = named(f"{i} ", requests(model, [text], seed=1, max_new_tokens=3))
        run(runner, made)
        found += made
    assert [request.cached_tokens for request in found] == [0, 0, 0, SIZE, 2 * SIZE]
    assert len({hash(key) for key in runner.model.allocator._known if key[0] != b""}) == 1
    assert [result_of(r) for r in found] == expected(model, *texts, seed=1, max_new_tokens=3)
    check(runner, inner)


@pytest.mark.parametrize("length", [1, 8, 12])
@pytest.mark.parametrize("page_size", [1, SIZE])
@pytest.mark.parametrize("in_flight", [False, True])
def test_a_prompt_that_is_cached_up_to_its_last_token_leaves_no_query(
    model, page_size, length, in_flight
):
    """One token at least is computed, and it counts as one of the prompt."""
    prompt, settings = tokens(length), {"max_new_tokens": 5, "ignore_eos": True, "seed": 1}
    listener = Listener()
    runner, inner = watched(model, page_size, in_flight=in_flight, observers=[listener])
    first, again = (requests(model, [prompt], **settings) for _ in range(2))
    run(runner, named("first ", first))
    inner.batches.clear()
    listener.steps.clear()
    run(runner, named("again ", again))
    assert again[0].cached_tokens == (length - 1) // page_size * page_size
    assert spans(inner.batches[0])["again 0"] == (again[0].cached_tokens, length, 0)
    assert listener.steps[0].num_prompt_tokens == length - again[0].cached_tokens
    assert [result_of(*first), result_of(*again)] == 2 * expected(model, prompt, **settings)
    check(runner, inner)


@pytest.mark.parametrize("steps", range(1, 9))
@pytest.mark.parametrize("in_flight", [False, True])
def test_a_page_that_is_freed_while_a_step_reads_it(model, in_flight, steps):
    """One request ends at any step; its pages go to others, whose tables name the shared ones."""
    common = tokens(2 * SIZE)
    texts = [common + tokens(n, seed=n) for n in (1, 3, 6)]
    settings = {"max_new_tokens": 9, "ignore_eos": True, "seed": 1}
    runner, inner = watched(model, total_pages=12, in_flight=in_flight, max_batch_tokens=16)
    made = requests(model, texts, **settings)
    for request in made:
        runner.add(request)
    for _ in range(steps):
        runner.step()
    runner.abort(made[0])
    late = named("late ", requests(model, [tokens(11, seed=9), [*common, 5]], **settings))
    run(runner, late)
    wanted = expected(model, *texts[1:], tokens(11, seed=9), [*common, 5], **settings)
    assert [result_of(request) for request in made[1:] + late] == wanted
    check(runner, inner)


def test_a_count_of_cached_tokens_that_grows_after_the_request_has_started(model):
    """Not when an equal prompt is committed beside it, nor when its step fails, nor when it finds
    its own pages after it gave way."""
    prompt = tokens(2 * SIZE + 1)
    # One that is scored computes pages that another one computes too.
    texts = [prompt, (prompt, {"prompt_logprobs": 0}), prompt[:SIZE] + tokens(7, seed=3)]
    settings = {"max_new_tokens": 14, "ignore_eos": True, "seed": 1}
    listener = Listener()
    runner, inner = watched(
        model, total_pages=10, max_batch_tokens=6, max_batch_size=3, observers=[listener]
    )
    made = requests(model, texts, **settings)
    told = {}
    for request in made:
        runner.add(request)
    for number in range(500):
        if number in (2, 9):
            inner.fault = interrupt
        with suppress(KeyboardInterrupt):
            runner.step()
        inner.fault = None
        admitted = {name: cached for event, name, cached in listener.events if event == "admitted"}
        for request in made:
            if request.request_id in admitted:
                told.setdefault(request.request_id, request.cached_tokens)
                assert request.cached_tokens == told[request.request_id]
        if not runner.requests:
            break
    assert told == admitted
    assert told["r1"] == 0
    assert told["r2"] == SIZE
    assert any(request.preemptions for request in made)
    assert [request.result.cached_tokens for request in made] == list(told.values())
    assert runner.stats().num_cached_tokens == sum(told.values())
    assert runner.stats().num_prompt_tokens == sum(len(r.prompt_token_ids) for r in made)
    assert [result_of(r) for r in made] == expected(model, *texts, **settings)
    check(runner, inner)


def interrupt(at, batch, logits):
    """The step is scheduled again."""
    raise KeyboardInterrupt


SLIDING = ["qwen3-some-layers-slide", "mistral-window-of-three", "qwen2-slides", "mistral-slides"]


@pytest.mark.parametrize("name", SLIDING)
def test_a_sliding_window_that_is_shorter_than_the_hit(name, tmp_path):
    """With and without a hit the tokens are those of transformers."""
    oracle = write_model(name, tmp_path)
    prompt, warm = prompts(CONFIGS[name], [25, 30])
    warm[:24] = prompt[:24]
    config = GenerateConfig(max_new_tokens=12, temperature=0, ignore_eos=True, logprobs=0)
    found = {}
    for reuse in (True, False):
        with LLMEngine.from_plugins() as engine:
            runtime = RuntimeConfig(
                weight_dtype="float32", page_size=4, max_batch_tokens=16, prefix_cache=reuse
            )
            engine.init_model("m", tmp_path, runtime)
            engine.generate("m", warm, config)
            found[reuse] = engine.generate_result("m", prompt, config)
    assert (found[True].cached_tokens, found[False].cached_tokens) == (24, 0)
    with torch.inference_mode():
        theirs = oracle(torch.tensor([prompt + list(found[True].token_ids)])).logits[0].float()
    scores = theirs.log_softmax(-1)[len(prompt) - 1 : -1]
    for result in found.values():
        assert list(result.token_ids) == scores.argmax(-1).tolist()
        ours = torch.tensor([entry.logprob for entry in result.logprobs])
        torch.testing.assert_close(ours, scores.amax(-1), rtol=0, atol=2e-4)


@pytest.mark.parametrize("rows", [None, 2])
@pytest.mark.parametrize("chunk", range(1, 14))
def test_log_probabilities_across_chunks_and_hits(model, chunk, rows):
    """Those of a prompt, of an output, and of both, whatever was cached before."""
    prompt = tokens(3 * SIZE + 1)
    both = {"prompt_logprobs": 2, "logprobs": 3}
    texts = [
        (prompt, {"prompt_logprobs": 2}),
        (prompt, {"logprobs": 3}),
        (prompt[:-2], both),
        (prompt[: 2 * SIZE], both),
        prompt,
    ]
    settings = {"max_new_tokens": 6, "temperature": 1.0, "seed": 4}
    wanted = expected(model, *texts, **settings)
    limits = {"max_logits_rows": rows}
    runner, inner = watched(model, limits=limits, max_batch_tokens=chunk)
    for turn in range(2):
        made = named(f"{turn} ", requests(model, texts, **settings))
        run(runner, made)
        assert [result_of(request) for request in made] == wanted
    assert made[1].cached_tokens
    assert made[0].cached_tokens == 0, "a prompt that is scored is computed"
    check(runner, inner)


# --- who waits ------------------------------------------------------------------------------------


def test_an_abort_while_waiting(model):
    """A request that never started holds nothing; the one behind it starts in its turn."""
    listener = Listener()
    runner, inner = watched(model, max_batch_size=1, observers=[listener])
    made = requests(model, [tokens(5), tokens(6, 1), tokens(7, 2)], ignore_eos=True, seed=1)
    for request in made:
        runner.add(request)
    runner.step()
    first, waits, behind = made
    runner.abort(waits)
    runner.abort(waits)
    assert runner.model.allocator.names == {first.request_id}
    run(runner)
    assert listener.of("r1") == ["submitted", "aborted"]
    assert listener.of("r2") == ["submitted", "admitted", "finished"]
    assert (waits.result.finish_reason, waits.result.token_ids) == ("aborted", ())
    known = {name for batch in inner.batches for name in batch.request_ids}
    told = {name for batch in inner.batches for name in batch.ended_request_ids}
    assert known == {"r0", "r2"}
    assert told == {"r0"}, "an executor is told of requests that it has seen"
    settings = {"ignore_eos": True, "seed": 1}
    assert [result_of(behind)] == expected(model, tokens(7, 2), **settings)
    check(runner, inner)


def test_an_abort_while_waiting_after_it_gave_way(model):
    listener = Listener()
    settings = {"max_new_tokens": 20, "ignore_eos": True, "seed": 1}
    runner, inner = watched(model, total_pages=7, observers=[listener])
    made = requests(model, [tokens(5), tokens(6, 1), tokens(7, 2)], **settings)
    for request in made:
        runner.add(request)
    while not made[1].preemptions:
        runner.step()
    assert "r1" not in runner.model.allocator.names
    had = list(made[1].output_token_ids)
    runner.abort(made[1])
    run(runner)
    assert listener.of("r1") == ["submitted", "admitted", "preempted", "aborted"]
    wanted = expected(model, tokens(5), tokens(6, 1), tokens(7, 2), **settings)
    assert [result_of(made[0]), result_of(made[2])] == [wanted[0], wanted[2]]
    assert list(made[1].result.token_ids) == had
    assert wanted[1]["token_ids"][: len(had)] == tuple(had)
    check(runner, inner)


def step_until(condition, runner, most=300):
    for _ in range(most):
        if condition():
            return
        runner.step()
        runner.poll()
    raise AssertionError(f"not in {most} steps; these wait or run: {list(runner.requests)}")


@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("admission", ["preempt", "reserve"])
@pytest.mark.parametrize("equal", [False, True])
def test_a_waiting_request_that_is_never_admitted(model, admission, mixed, equal):
    """The head of the queue is too large for what is free, and small requests keep arriving.

    equal: its prompt begins with one that an older request computes, for which it is held back.
    """
    settings = {"ignore_eos": True, "seed": 1}
    large = tokens(8 * SIZE + 1)
    older = large[: 6 * SIZE] if equal else tokens(6 * SIZE, seed=1)
    runner, inner = watched(
        model,
        total_pages=12,
        limits={"mixed": mixed},
        admission=admission,
        max_batch_size=4,
        max_batch_tokens=5,
    )
    first, waits = requests(model, [older, large], max_new_tokens=8, **settings)
    runner.add(first)
    runner.step()
    runner.add(waits)
    for number in range(200):
        if waits.over:
            break
        small = requests(model, [tokens(3, seed=number)], max_new_tokens=4, **settings)
        run_started(runner, named(f"small {number} ", small))
    else:
        raise AssertionError("the large request has not ended")
    run(runner)
    wanted = expected(model, older, large, max_new_tokens=8, **settings)
    assert [result_of(first), result_of(waits)] == wanted
    check(runner, inner)


def run_started(runner, made):
    """Add requests, and run one step."""
    for request in made:
        runner.add(request)
    runner.step()
    runner.poll()


# --- ids ------------------------------------------------------------------------------------------


def test_a_request_id_that_is_in_use(model):
    runner, inner = watched(model, max_batch_size=1)
    running, waiting = requests(model, [tokens(5), tokens(6, 1)], seed=1)
    runner.add(running)
    runner.add(waiting)
    runner.step()
    for name in ("r0", "r1"):
        (again,) = requests(model, [tokens(3)])
        again.request_id = name
        with pytest.raises(RequestError, match=rf"has the id '{name}' already: choose another"):
            runner.add(again)
        assert not again.over
    run(runner)
    assert [result_of(running), result_of(waiting)] == expected(
        model, tokens(5), tokens(6, 1), seed=1
    )
    check(runner, inner)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("in_flight", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_a_request_id_that_is_used_again_after_an_abort(model, own, in_flight, steps):
    """The second request waits for the steps of the first; the executor forgets the first.

    own: the executor keeps keys and values for each request id.
    """
    inner = Hashing(VOCAB_SIZE, SIZE)
    kept = OwnPages(inner) if own else inner
    executor = Device(kept) if in_flight else kept
    assert isinstance(executor, SamplingExecutor) == in_flight
    runner = make_runner(model, executor, max_batch_tokens=8)
    settings = {"max_new_tokens": 8, "ignore_eos": True, "seed": 1}
    texts = [tokens(10), tokens(3, 1), tokens(10)[:8] + tokens(5, 2)]
    first, other, second = requests(model, texts, **settings)
    for request in (first, other):
        runner.add(request)
    for _ in range(steps):
        runner.step()
    runner.abort(first)
    second.request_id = first.request_id
    runner.add(second)
    run(runner)
    wanted = [alone(model, Hashing(VOCAB_SIZE, 16), text, **settings) for text in texts]
    assert [result_of(other), result_of(second)] == wanted[1:]
    said = [batch for batch in inner.batches if "r0" in batch.ended_request_ids]
    assert said, "the executor was not told that the first one has ended"
    assert "r1" in said[0].request_ids or "r0" in said[0].request_ids
    assert all_free(runner)


@pytest.mark.parametrize("late", ["aborted", "finished"])
def test_a_request_id_that_is_used_again_is_told_of_the_others_preemption(model, late):
    """A request gave way in the last step before it was aborted: observers are told of that before
    they are told of its end, and not of the next request with its id."""
    listener = Listener()
    settings = {"max_new_tokens": 20, "ignore_eos": True, "seed": 1}
    runner, inner = watched(model, total_pages=7, observers=[listener])
    made = requests(model, [tokens(5), tokens(6, 1)], **settings)
    for request in made:
        runner.add(request)
    step_until(lambda: made[1].preemptions, runner)
    runner.abort(made[1])
    (again,) = requests(model, [tokens(6, 1)], **settings)
    again.request_id = "r1"
    runner.add(again)
    if late == "aborted":
        runner.abort(again)
    run(runner)
    first = ["submitted", "admitted", "preempted", "aborted"]
    second = ["submitted", "aborted"] if late == "aborted" else ["submitted", "admitted"]
    assert listener.of("r1")[: len(first) + 2] == first + second
    assert runner.stats().num_preemptions == 1 + again.preemptions
    check(runner, inner)


def test_a_request_that_an_observer_aborts_in_the_step_in_which_it_ends(model):
    """It ends once, and as it would have ended."""

    class Aborts(Listener):
        @hookimpl
        def on_request_finished(self, result):
            super().on_request_finished(result)
            runner.abort(made[1])

    listener = Aborts()
    runner, inner = watched(model, observers=[listener])
    settings = {"max_new_tokens": 3, "ignore_eos": True, "seed": 1}
    made = requests(model, [tokens(5), tokens(6, 1), tokens(4, 2)], **settings)
    run(runner, made)
    assert [r.result.finish_reason for r in made] == ["length"] * 3
    assert listener.of("r1") == ["submitted", "admitted", "finished"]
    check(runner, inner)


# --- preemption -----------------------------------------------------------------------------------


@pytest.mark.parametrize("drafts", [False, True])
def test_a_preempted_request_that_is_taken_for_one_that_decodes(model, drafts):
    """What it had computed is computed as a prompt is: in a chunk without drafts, from 0 or from
    the pages that are found, and counted as tokens of a prompt."""
    settings = {"max_new_tokens": 17, "ignore_eos": True, "seed": 1}
    texts = [tokens(6), tokens(5, 1), tokens(7, 2)]
    wanted = expected(model, *texts, **settings)
    listener = Listener()

    def guess(request, most):
        at = len(request.output_token_ids)
        of = wanted[int(request.request_id[1:])]["token_ids"]
        return [*of[at : at + 2], 0][:most]

    runner, inner = watched(
        model,
        total_pages=9,
        max_batch_tokens=9,
        observers=[listener],
        draft=guess if drafts else None,
    )
    made = requests(model, texts, **settings)
    run(runner, made)
    assert [result_of(request) for request in made] == wanted
    assert runner.stats().num_preemptions == sum(request.preemptions for request in made) > 0
    assert len(listener.steps) == len(inner.batches)
    reached, resumed = Counter(), 0
    for batch, event in zip(inner.batches, listener.steps, strict=True):
        counted = Counter()
        for name, (start, stop, guessed) in spans(batch).items():
            decodes = start >= len(texts[int(name[1:])]) and stop - start == 1 + guessed
            counted[decodes] += stop - start
            assert decodes or not guessed
            if start < reached[name]:
                resumed += 1
                assert start % SIZE == 0
            reached[name] = stop - guessed
        assert (event.num_prompt_tokens, event.num_decode_tokens) == (counted[False], counted[True])
    assert resumed
    assert any(batch.num_drafts.any() for batch in inner.batches) == drafts
    check(runner, inner)


def test_recomputed_tokens_that_count_as_hits(model):
    """What a request finds of its own pages, when it starts again, is not in any count."""
    settings = {"max_new_tokens": 20, "ignore_eos": True, "seed": 1}
    texts = [tokens(9), tokens(9, 1), tokens(9, 2)]
    listener = Listener()
    runner, inner = watched(model, total_pages=12, observers=[listener])
    made = requests(model, texts, **settings)
    run(runner, made)
    assert sum(request.preemptions for request in made) > 0
    assert runner.model.allocator.hits > 0, "no request found pages of its own"
    assert [request.result.cached_tokens for request in made] == [0, 0, 0]
    admitted = [(name, n) for event, name, n in listener.events if event == "admitted"]
    assert admitted == [("r0", 0), ("r1", 0), ("r2", 0)]
    preempted = Counter(name for event, name, _ in listener.events if event == "preempted")
    assert all(preempted[r.request_id] == r.preemptions == r.result.preemptions for r in made)
    stats = runner.stats()
    assert (stats.num_cached_tokens, stats.num_prompt_tokens) == (0, 27)
    assert stats.num_new_tokens == 60
    assert [result_of(request) for request in made] == expected(model, *texts, **settings)
    check(runner, inner)


def by_hand(prompt, count, presence, frequency):
    """The most likely tokens under penalties of the output."""
    output = []
    for _ in range(count):
        scores = _rows(VOCAB_SIZE)[contents((*prompt, *output))[-1] % _LOGITS].clone()
        for token, times in Counter(output).items():
            scores[token] -= presence + frequency * times
        output.append(int(scores.argmax()))
    return tuple(output)


@pytest.mark.parametrize("penalties", [(9.0, 0.0), (0.0, 4.0), (1.5, 1.5)])
def test_penalties_that_count_the_prompt_after_it_was_computed_again(model, penalties):
    """Presence and frequency count the output only, and all of it."""
    presence, frequency = penalties
    texts = [tokens(62), tokens(58, 1), list(range(62))]
    settings = {
        "max_new_tokens": 30,
        "ignore_eos": True,
        "seed": 1,
        "presence_penalty": presence,
        "frequency_penalty": frequency,
        "temperature": 0.0,
    }
    runner, inner = watched(model, total_pages=40, max_batch_tokens=64)
    made = requests(model, texts, **settings)
    run(runner, made)
    assert sum(request.preemptions for request in made) > 0
    for text, request in zip(texts, made, strict=True):
        assert request.result.token_ids == by_hand(text, 30, presence, frequency)
    check(runner, inner)


# --- after a request has ended --------------------------------------------------------------------


@pytest.mark.parametrize("in_flight", [False, True])
@pytest.mark.parametrize("drafts", [False, True])
def test_output_that_changes_after_a_batch_that_ended_by_a_stop_string(model, in_flight, drafts):
    """Also when tokens behind the stop string were in flight, or were drafts."""
    texts = [tokens(7), [*tokens(7)[:5], 3], tokens(9, 1), tokens(4, 2)]
    settings = {"max_new_tokens": 16, "ignore_eos": True, "seed": 1}
    plain = expected(model, *texts, **settings)
    # Each text but the last stops in its middle.
    stops = [{"stop": (result["text"][3:6],)} for result in plain[:-1]]
    stopping = [*zip(texts, stops, strict=False), texts[-1]]
    wanted = expected(model, *stopping, **settings)
    assert [result["finish_reason"] for result in wanted] == ["stop", "stop", "stop", "length"]

    def guess(request, most):
        at = len(request.output_token_ids)
        number = int(request.request_id.split()[1])
        right = plain[number]["token_ids"][at : at + min(most, 4)]
        return [*right[:-1], (right[-1] + at % 2) % VOCAB_SIZE]  # the last one is wrong at times

    runner, inner = watched(
        model, in_flight=in_flight, draft=guess if drafts else None, max_batch_tokens=32
    )
    for turn, (prompts_of, results) in enumerate(
        [(texts, plain), (stopping, wanted), (texts, plain), (stopping, wanted)]
    ):
        made = named(f"{turn} ", requests(model, prompts_of, **settings))
        run(runner, made)
        assert [result_of(request) for request in made] == results
    check(runner, inner)


class Tracked(dict):
    """A state of a logits processor, to which a weak reference can be made."""


class Tracking:
    """A logits processor that keeps nothing of its states but weak references."""

    def __init__(self):
        self.states = []
        self.ended = []

    def begin(self, request_id, argument, prompt_token_ids):
        state = Tracked(request=request_id)
        self.states.append(weakref.ref(state))
        return state

    def edits(self, rows):
        return LogitsEdits()

    def accept(self, state, token_id):
        state["last"] = token_id

    def snapshot(self, state):
        return dict(state)

    def restore(self, state, snapshot):
        state.update(snapshot)

    def end(self, state):
        self.ended.append(state["request"])


@pytest.mark.parametrize("executor", ["plain", "in flight", "own pages"])
@pytest.mark.parametrize("steps", [0, 1, 3, 12, 30])
def test_state_of_a_request_that_outlives_an_abort(model, executor, steps):
    """Not in the engine, nor in a logits processor, nor in an executor that keeps something for
    each request: once the next step has run, only the counts are left.

    steps: when the requests are aborted; some wait then, or were preempted, or were refused room.
    """
    inner = Hashing(VOCAB_SIZE, SIZE)
    own = OwnPages(inner)
    made_of = {"plain": inner, "in flight": Device(inner), "own pages": own}
    tracking = Tracking()
    runner = make_runner(
        model,
        made_of[executor],
        total_pages=12,
        max_batch_size=4,
        max_batch_tokens=8,
        processors=processors_of(tracking=tracking),
        admission="preempt",
    )
    settings = {"max_new_tokens": 20, "ignore_eos": True, "seed": 1}
    penalised = {"frequency_penalty": 1.0, "presence_penalty": 1.0}
    texts = [
        (tokens(9), {"logprobs": 2}),
        (tokens(9), penalised),
        (tokens(8, 1), {"logits_processors": {"tracking": 1}}),
        (tokens(9, 2), {"prompt_logprobs": 1}),
        (tokens(11, 3), {"logits_processors": {"tracking": 2}, "stop": ("zz",)}),
        tokens(25, 4),
    ]
    made = requests(model, texts, **settings)
    for request in made:
        runner.add(request)
    for _ in range(steps):
        runner.step()
        runner.poll()
    counted = sum(len(request.output_token_ids) for request in made)
    open_ones = {request for request in made if not request.over}
    for request in made:
        runner.abort(request)
    assert set(runner.poll()) == open_ones
    assert runner.poll() == []
    one_more = named("one more ", requests(model, [tokens(3, 9)], max_new_tokens=3, seed=1))
    run_with_news(runner, one_more)
    alive = [weakref.ref(request) for request in made]
    streams = [weakref.ref(request.stream) for request in made]
    del made, request, texts, open_ones
    if executor == "in flight":
        made_of[executor].steps.clear()  # what this stand-in keeps, to be looked at
    inner.batches.clear()
    gc.collect()
    assert [ref() for ref in alive + streams + tracking.states if ref() is not None] == []
    assert len(tracking.states) == 2
    assert sorted(tracking.ended) == ["r2", "r4"]
    assert set(getattr(own, "kept", {})) <= {"one more 0"}
    assert all_free(runner)
    stats = runner.stats()
    assert (stats.num_waiting, stats.num_running, stats.used_pages) == (0, 0, 0)
    assert stats.num_requests == 7
    assert stats.num_new_tokens == counted + 3


def test_a_request_of_an_engine_that_outlives_its_stream(engine):
    config = GenerateConfig(max_new_tokens=40, ignore_eos=True, temperature=0.0)
    stream = engine.stream("demo", "We hold these truths", config)
    next(stream)
    request = weakref.ref(stream._request)
    stream.close()
    del stream
    engine.generate("demo", "He", GenerateConfig(max_new_tokens=2))
    gc.collect()
    assert request() is None
    stats = engine.stats("demo")
    assert (stats.num_waiting, stats.num_running, stats.used_pages) == (0, 0, 0)
