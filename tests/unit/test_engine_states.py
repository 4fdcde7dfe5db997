"""A request's result never depends on its neighbours, whatever happens to them and to the engine.

A state machine adds requests whose prompts begin alike, runs steps, aborts requests and lets steps
fail, on caches that are too small for all of them. What it checks is proved by planted faults.
"""

from collections import Counter
from math import inf

import pytest
import torch
from attrs import define, evolve, fields_dict
from context_hash import ContextHash, InFlight, WatchedPages
from contract_executors import arg_max_only, demo_model, make_runner
from hypothesis import HealthCheck, Phase, Verbosity, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tilewright import GenerateConfig
from tilewright.errors import ExecutorError, OutOfPagesError, PluginError
from tilewright.kv_cache import KvCacheManager
from tilewright.logits_processing import Processing
from tilewright.request import Request, new_request
from tilewright.runner import Runner
from tilewright.scheduler import Scheduler
from tilewright.types import LogitsEdits

VOCAB_SIZE = 64
EOS = 63
SEEDS = (1, 2)
SETTINGS = (
    {},
    {"ignore_eos": True},
    {"temperature": 1.0},
    {"temperature": 1.0, "top_k": 3, "ignore_eos": True},
    {"temperature": 0.7, "top_p": 0.9, "min_p": 0.01},
    {"repetition_penalty": 1.5, "presence_penalty": 0.5},
    {"temperature": 1.0, "frequency_penalty": 2.0},
    {"logit_bias": {3: 4.0, 5: -inf}},
    {"stop": ("A", "0", "=>", "'3")},
    {"stop_token_ids": tuple(range(0, VOCAB_SIZE, 7))},
    {"logprobs": 2},
    {"prompt_logprobs": 1},
    {"temperature": 1.0, "logprobs": 0, "prompt_logprobs": 0},
    {"logits_processors": {"memory": 3}},
    {"logits_processors": {"memory": 2}, "temperature": 1.0, "logprobs": 1},
)
FILLS = ((1,), (1, 2), (2,), (1, 1, 2))
"""What prompts repeat: few tokens, so that prompts begin alike."""

done: Counter[str] = Counter()
"""Calls of the runner under test, and what happened in them, since the process began."""


class Memory:
    """A logits processor that forbids a part of the tokens, which depends on the whole output."""

    def __init__(self):
        self.live = []

    def begin(self, request_id, argument, prompt_token_ids):
        self.live.append(state := {"request": request_id, "parts": argument, "output": []})
        return state

    def edits(self, rows):
        masks = []
        for _, state in rows:
            key, words = hash(tuple(state["output"])), [0, 0]
            for token in range(VOCAB_SIZE):
                if (token + key) % state["parts"]:
                    words[token // 32] |= 1 << token % 32
            masks.append([word - 2**32 if word >= 2**31 else word for word in words])
        at = torch.tensor([row for row, _ in rows])
        return LogitsEdits(mask_rows=at, masks=torch.tensor(masks, dtype=torch.int32))

    def accept(self, state, token_id):
        state["output"].append(token_id)

    def snapshot(self, state):
        return len(state["output"])

    def restore(self, state, snapshot):
        del state["output"][snapshot:]

    def end(self, state):
        self.live.remove(state)


@define
class Alone:
    """The result of a request on an engine of its own."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    logprobs: object
    prompt_logprobs: object

    @classmethod
    def of(cls, request: Request) -> "Alone":
        result = request.result
        assert result is not None, request.error
        return cls(*(getattr(result, name) for name in fields_dict(cls)))


@pytest.fixture(scope="module", autouse=True)
def model():
    """The bundled model's text, with the first 64 of its tokens."""
    for demo in demo_model():
        config = evolve(demo.loaded.config, vocab_size=VOCAB_SIZE, eos_token_ids=(EOS,))
        Machine.model = evolve(demo, loaded=evolve(demo.loaded, config=config))
        yield Machine.model


_alone: dict[object, Alone] = {}
_requests_alone: list[Request] = []
"""The request that runs alone now, if one does: planted faults leave it as it is."""


def alone(model, prompt, config) -> Alone:
    """The result of a request that has a large cache to itself. Equal arguments are run once."""
    key = prompt, repr(config)
    if key not in _alone:
        executor, memory = ContextHash(VOCAB_SIZE, page_size=16), Memory()
        knobs = {"admission": "reserve", "prefix_cache": False}
        request = new_request("alone", model, prompt, config)
        runner = make_runner(model, executor, processors=processing(memory), **knobs)
        _requests_alone.append(request)
        runner.add(request)
        while runner.requests:
            runner.step()
        _requests_alone.clear()
        _alone[key] = Alone.of(request)
    return _alone[key]


def processing(memory):
    return lambda name: Processing(f"logits_processor {name!r}", memory, None)


def unpenalised(params):
    """Whether a token's logits do not depend on the output before it, which a device that samples
    in flight is not told."""
    return (
        params.repetition_penalty == 1.0
        and not params.presence_penalty
        and not params.frequency_penalty
    )


# --- the machine ----------------------------------------------------------------------------------


class Machine(RuleBasedStateMachine):
    """A runner, its requests, and the results that they must have."""

    model = None
    running: "Machine"
    executors = ("plain", "most likely", "unpenalised")
    failures = ("error", "bug", "interrupt")

    def __init__(self):
        super().__init__()
        self.runner: Runner | None = None
        self.made: dict[str, Request] = {}
        self.open: list[str] = []
        """Requests whose result was not compared yet."""
        self.expected: dict[str, Alone] = {}
        self.doomed: set[str] = set()
        """Requests that were in a step that failed."""
        self.interrupted = False
        Machine.running = self

    @initialize(
        page_size=st.sampled_from([2, 1, 3, 4, 8]),
        total_pages=st.sampled_from([12, 16, 14, 8, 20, 4]),
        max_batch_size=st.sampled_from([4, 8, 5, 3, 6, 1]),
        max_batch_tokens=st.sampled_from([64, 16, 8, 5, 12, 3, 1]),
        max_logits_rows=st.sampled_from([None, 1, 4]),
        mixed=st.sampled_from([True, True, False]),
        executor=st.deferred(lambda: st.sampled_from(Machine.executors)),
        drafts=st.sampled_from([False, False, True]),
        admission=st.sampled_from(["preempt", "preempt", "reserve"]),
        prefix_cache=st.sampled_from([True, True, False]),
    )
    def begin(
        self,
        page_size,
        total_pages,
        max_batch_size,
        max_batch_tokens,
        max_logits_rows,
        mixed,
        executor,
        drafts,
        admission,
        prefix_cache,
    ):
        self.inner = ContextHash(
            VOCAB_SIZE, page_size, mixed=mixed, max_logits_rows=max_logits_rows
        )
        self.pages = WatchedPages(total_pages, self.inner)
        self.device = None
        if executor != "plain":
            serves = arg_max_only if executor == "most likely" else unpenalised
            self.device = InFlight(self.inner, serves)
        self.memory = Memory()
        self.runner = make_runner(
            self.model,
            self.device or self.inner,
            draft=self.draft if drafts else None,
            total_pages=total_pages,
            allocator=self.pages,
            processors=processing(self.memory),
            max_batch_size=max_batch_size,
            max_batch_tokens=max_batch_tokens,
            admission=admission,
            prefix_cache=prefix_cache,
        )

    def draft(self, request, most):
        """The tokens that follow, and after some of them wrong ones."""
        at = len(request.output_token_ids)
        right = self.expected[request.request_id].token_ids[at : at + min(most, 4)]
        wrong = (7 * at + len(request.prompt_token_ids)) % 6
        return [token if i != wrong else (token + 1) % EOS for i, token in enumerate(right)]

    @rule(
        earlier=st.integers(0, 40),
        turn=st.sampled_from(["prompt", "conversation", "prompt", "none"]),
        pages=st.sampled_from([1, 0, 2, 3, 5]),
        more=st.sampled_from([0, 1, -1]),
        fill=st.sampled_from(FILLS),
        settings=st.sampled_from(SETTINGS),
        seed=st.sampled_from(SEEDS),
        max_new_tokens=st.integers(1, 12),
    )
    def add(self, earlier, turn, pages, more, fill, settings, seed, max_new_tokens):
        """Add a request.

        turn: what its prompt begins with, of which earlier request. pages, more: how long it is, in
        pages and tokens; pages = 0: as long as what it begins with, nearly. fill: what follows.
        """
        before: list[int] = []
        if self.made and turn != "none":
            other = list(self.made.values())[-1 - earlier % len(self.made)]
            before = [*other.prompt_token_ids]
            if turn == "conversation":
                before += other.output_token_ids
        length = max(1, pages * self.pages.page_size + more)
        if pages == 0 and before:
            length = len(before) + more + 1  # one that is as long, or nearly
        prompt = (before + [fill[i % len(fill)] for i in range(length)])[: min(length, 40)]
        self._add(prompt, settings, seed, max_new_tokens)

    @rule(
        number=st.integers(2, 5),
        pages=st.sampled_from([1, 2, 3]),
        more=st.sampled_from([0, 1, -1]),
        fill=st.sampled_from(FILLS),
        settings=st.integers(0, len(SETTINGS) - 1),
        max_new_tokens=st.integers(0, 12),
    )
    def add_together(self, number, pages, more, fill, settings, max_new_tokens):
        """Add some requests whose prompts are equal but for their last token, or altogether."""
        length = max(1, pages * self.pages.page_size + more)
        for i in range(number):
            prompt = [fill[at % len(fill)] for at in range(length)]
            prompt[-1] += i // 2
            own = SETTINGS[(settings + i) % len(SETTINGS)]
            self._add(prompt, own, SEEDS[0], 12 - (max_new_tokens + 3 * i) % 12)

    @rule(
        number=st.integers(2, 4),
        length=st.sampled_from([1, 2, 3]),
        settings=st.integers(0, len(SETTINGS) - 1),
    )
    def crowd(self, number, length, settings):
        """Add requests that fill the cache, each alone: all but the oldest must give way."""
        room = min(self.pages.total_pages * self.pages.page_size, 40)
        for i in range(number):
            own = SETTINGS[(settings + i) % len(SETTINGS)] | {"ignore_eos": True}
            self._add([1 + i] * length, own, SEEDS[0], room - length)

    def _add(self, prompt, settings, seed, max_new_tokens):
        name = f"r{len(self.expected)}"
        config = GenerateConfig(max_new_tokens=max_new_tokens, seed=seed, **settings)
        config = config.over(self.model.generation_defaults)
        request = new_request(name, self.model, prompt, config)
        needed = -(-request.max_cached_tokens // self.pages.page_size)
        self.expected[name] = alone(self.model, tuple(prompt), config)
        done["add"] += 1
        try:
            self.runner.add(request)
        except OutOfPagesError:
            assert needed > self.pages.total_pages
            return
        assert needed <= self.pages.total_pages
        self.made[name] = request
        self.open.append(name)

    @rule(number=st.sampled_from([1, 1, 2, 3, 5, 0]))
    def step(self, number):
        """number: how many steps; 0: until all requests are over."""
        for _ in range(number):
            self._step()
        if not number:
            self._run()

    @precondition(lambda self: self.made)
    @rule(which=st.integers(0, 40), live=st.sampled_from([True, True, False]))
    def abort(self, which, live):
        among = list(self.runner.requests.values()) if live else list(self.made.values())
        if among:
            done["abort"] += 1
            self.runner.abort(among[which % len(among)])

    @precondition(lambda self: self.runner.requests)
    @rule(
        kind=st.deferred(lambda: st.sampled_from(Machine.failures)),
        where=st.sampled_from(["before", "after", "submit"]),
    )
    def fail(self, kind, where):
        """Let the next step fail before or after it has run, or when it is submitted."""
        self._fail(kind, "before" if where == "submit" and not self.device else where)

    @precondition(lambda self: self.runner.requests)
    @rule(which=st.integers(0, 5))
    def spoil(self, which):
        """Let the logits of one sequence of the next step be not finite."""
        self._fail("not finite", "after", which)

    def _fail(self, kind, where, which=0):
        must_fail: set[str] = set()

        def fault(at, batch, logits):
            if at != where:
                return
            self.inner.fault = None
            done[kind] += 1
            if kind == "interrupt":
                self.interrupted = True
                raise KeyboardInterrupt
            if kind == "not finite":
                self._spoil(batch, logits, which)
                return
            self.doomed.update(batch.request_ids)
            if where != "submit" and not self.inner.void:
                must_fail.update(batch.request_ids)
            raise ExecutorError("a chip has failed") if kind == "error" else ZeroDivisionError()

        self.inner.fault = fault
        before = self._live()
        self._step()
        self.inner.fault = None
        for request in before:
            assert request.request_id not in must_fail or request.error, "its step has failed"

    def _spoil(self, batch, logits, which):
        """Make logits of a sequence not finite."""
        which %= len(batch.request_ids)
        name = batch.request_ids[which]
        start, stop = batch.query_starts[which : which + 2].tolist()
        rows = (batch.logits_rows >= start) & (batch.logits_rows < stop)
        if rows.any():
            logits[rows] = float("nan")
            self.doomed.add(name)

    def _step(self):
        done["step"] += 1
        try:
            self.runner.step()
        except KeyboardInterrupt:
            assert self.interrupted
        self.interrupted = False

    def _run(self):
        """Run until all requests are over. The oldest one gets a token in every second step at
        least, so that they need no more steps than if they ran one after the other."""
        left = 20 + sum(2 * request.max_cached_tokens + 6 for request in self._live())
        while self.runner.requests:
            self._step()
            self.cache_is_in_order()
            left -= 1
            assert left, f"these requests do not end: {list(self.runner.requests)}"

    def _live(self):
        return list(self.runner.requests.values())

    @invariant()
    def cache_is_in_order(self):
        if self.runner is None:
            return
        self.pages.check_integrity()
        assert not self.inner.wrong, self.inner.wrong
        # A step that was refused is in flight too, until it has been waited for.
        in_flight = [running.step.batch.request_ids for running in self.runner._in_flight]
        allowed = {*self.runner.requests, *(name for names in in_flight for name in names)}
        assert self.pages.names <= allowed, "requests that ended hold pages"
        processed = {r.request_id for r in self._live() if r.logits_processors}
        assert {state["request"] for state in self.memory.live} == processed
        assert len(self.memory.live) == len(processed)

    @invariant()
    def results_are_those_of_requests_alone(self):
        """What has ended is compared once, what has not as far as it is."""
        for name in [name for name in self.open if self.made[name].over]:
            self.open.remove(name)
            request, expected = self.made[name], self.expected[name]
            if request.error is not None:
                assert name in self.doomed, f"{name} failed: {request.error!r}"
                self._compare_begin(request, "".join(request.pieces), request.prompt_logprobs)
            elif request.result.finish_reason == "aborted":
                self._compare_begin(request, request.result.text, request.prompt_logprobs)
            else:
                found = Alone.of(request)
                assert found == expected, f"{name} gave\n{found}, alone\n{expected}"
                done["compared"] += 1
            done["preempted"] += request.preemptions
            done["cached tokens"] += request.cached_tokens

    def _compare_begin(self, request, text, prompt_logprobs):
        expected = self.expected[request.request_id]
        made = tuple(request.output_token_ids)
        assert made == expected.token_ids[: len(made)]
        assert expected.text.startswith(text)
        if expected.logprobs is not None:
            assert tuple(request.logprobs) == expected.logprobs[: len(request.logprobs)]
        scored = tuple(prompt_logprobs)
        assert scored == (expected.prompt_logprobs or (None,))[1 : 1 + len(scored)]

    def teardown(self):
        if self.runner is None:
            return
        self._run()
        self.cache_is_in_order()
        self.results_are_those_of_requests_alone()
        assert not self.open
        assert not self.device or not self.device.in_flight
        assert not self.pages.names
        done["examples"] += 1


# --- the tests ------------------------------------------------------------------------------------


def run_machines(first_seed, calls, examples, **given):
    """Run random machines of a seed, and of the seeds after it until so many calls were made.

    calls: of Runner.add, abort and step; those of requests that run alone are not counted. Returns
    their number. examples: machines of one seed. given: settings of Hypothesis.
    """
    before, number = num_calls(), first_seed
    chosen = {
        "max_examples": examples,
        "stateful_step_count": 50,
        "deadline": None,
        "database": None,
        "suppress_health_check": list(HealthCheck),
    } | given
    while True:
        print(f"seed {number}")
        seed(number)(Machine)
        run_state_machine_as_test(Machine, settings=settings(**chosen))
        number += 1
        if num_calls() - before >= calls:
            return num_calls() - before


def num_calls():
    return sum(done[name] for name in ("add", "abort", "step"))


@pytest.mark.parametrize("number", range(4))
def test_results_do_not_depend_on_what_happens_to_the_engine(number):
    """In 20 000 calls at least, all numbers together."""
    made = run_machines(1000 * number, calls=5_000, examples=20)
    assert made >= 5_000
    print(f"{made} calls; in this process: {dict(done)}")


@pytest.mark.slow
@pytest.mark.parametrize("number", range(10))
def test_results_do_not_depend_on_what_happens_to_the_engine_in_many_calls(number):
    """In 1 000 000 calls at least, all numbers together."""
    made = run_machines(100_000 * (1 + number), calls=100_000, examples=200)
    assert made >= 100_000
    print(f"{made} calls; in this process: {dict(done)}")


# --- planted faults -------------------------------------------------------------------------------


def around(monkeypatch, owner, name, planted):
    """Replace a method by a function that is called with the method and its arguments, except for
    requests that run alone."""
    original = getattr(owner, name)

    def replaced(self, *arguments, **named):
        if _requests_alone:
            return original(self, *arguments, **named)
        return planted(original, self, *arguments, **named)

    monkeypatch.setattr(owner, name, replaced)


def free_a_page_that_is_in_a_table(monkeypatch):
    """The page that wrong drafts share with right tokens is given back with them."""

    def planted(truncate, self, name, to_tokens):
        full = to_tokens - to_tokens % self.page_size
        truncate(self, name, max(full, self._held[name].committed * self.page_size))
        self.extend(name, to_tokens)

    around(monkeypatch, KvCacheManager, "truncate", planted)


def free_pages_in_flight(monkeypatch):
    def planted(free_left, self):
        in_flight, self._in_flight = self._in_flight, []
        free_left(self)
        self._in_flight = in_flight

    around(monkeypatch, Scheduler, "_free_left", planted)


def commit_pages_too_early(monkeypatch):
    """All that a request holds tokens for, though not all of them have run."""

    def planted(commit, self, name, token_ids):
        request = Machine.running.made.get(name)
        if request:
            held = len(self.pages(name)) * self.page_size
            token_ids = request.tokens(0, min(request.num_known, held))
        commit(self, name, token_ids)

    around(monkeypatch, KvCacheManager, "commit", planted)


def find_pages_by_a_hash(monkeypatch):
    """Pages with equal numbers of odd tokens are taken for equal."""

    def planted(tokens, self, token_ids, index):
        page = tokens(self, token_ids, index)
        return bytes([sum(page) % 2])

    around(monkeypatch, KvCacheManager, "_tokens", planted)


def find_pages_whatever_is_before_them(monkeypatch):
    def planted(allocate, self, name, token_ids, *, max_cached, salt=b""):
        known = self._known
        self._known = _AnyBefore(known)
        try:
            return allocate(self, name, token_ids, max_cached=max_cached, salt=salt)
        finally:
            self._known = known

    around(monkeypatch, KvCacheManager, "allocate", planted)


class _AnyBefore(dict):
    def get(self, key):
        return next((content for (_, own), content in self.items() if own == key[1]), None)


def count_cached_tokens_that_were_not_computed(monkeypatch):
    def planted(allocate, self, name, token_ids, **arguments):
        found = allocate(self, name, token_ids, **arguments)
        return min(found + 1, len(token_ids) - 1)

    around(monkeypatch, KvCacheManager, "allocate", planted)


def reuse_pages_of_scored_prompts(monkeypatch):
    """Their log-probabilities are then missing."""

    def planted(allocate, self, name, token_ids, *, max_cached, salt=b""):
        return allocate(self, name, token_ids, max_cached=len(token_ids), salt=salt)

    around(monkeypatch, KvCacheManager, "allocate", planted)


def forget_the_state_of_a_logits_processor(monkeypatch):
    """It begins anew with each step that is scheduled after a request's pages were given back."""

    def planted(allocate, self, name, token_ids, **arguments):
        for state in Machine.running.memory.live:
            if state["request"] == name:
                state["output"].clear()
        return allocate(self, name, token_ids, **arguments)

    around(monkeypatch, KvCacheManager, "allocate", planted)


def keep_the_state_of_wrong_drafts(monkeypatch):
    monkeypatch.setattr(Memory, "restore", lambda self, state, snapshot: None)


def forget_the_output(monkeypatch):
    """The output begins anew when a request's pages are given back."""

    def planted(allocate, self, name, token_ids, **arguments):
        request = Machine.running.made.get(name)
        if request:
            request.output_token_ids.clear()
        return allocate(self, name, token_ids, **arguments)

    around(monkeypatch, KvCacheManager, "allocate", planted)


def use_results_that_are_void(monkeypatch):
    """Only an interrupted step leaves requests that go on, and only with another in flight."""
    monkeypatch.setattr(Machine, "executors", ("most likely", "unpenalised"))
    monkeypatch.setattr(Machine, "failures", ("interrupt",))
    monkeypatch.setattr(Runner, "_discard_in_flight", lambda self: setattr(self, "_void", False))


def fail_the_neighbours(monkeypatch):
    """A row that is not finite ends all requests of its step."""

    def planted(failed, self, running, plugin, error):
        failed(self, running, plugin, ExecutorError(str(error)))

    around(monkeypatch, Runner, "_failed", planted)


def let_requests_wait_for_ever(monkeypatch):
    """A request is admitted only while others wait too."""

    def planted(admit, self):
        return admit(self) if len(self._waiting) != 1 else []

    around(monkeypatch, Scheduler, "admit", planted)


def count_a_step_before_it_is_done(monkeypatch):
    """One that is interrupted has then not been computed."""

    def planted(build, self, *arguments):
        step = build(self, *arguments)
        for part in step.parts:
            part.request.num_computed = min(part.stop, part.request.num_known - 1)
        return step

    around(monkeypatch, Scheduler, "_step", planted)


def number_sampled_tokens_from_the_last_start(monkeypatch):
    """Draws depend on how often a request was computed again."""

    def planted(sampler_row, self, position, drafts=()):
        return sampler_row(self, position + self.preemptions, drafts)

    around(monkeypatch, Request, "sampler_row", planted)


@pytest.mark.parametrize(
    "plant",
    [
        free_a_page_that_is_in_a_table,
        free_pages_in_flight,
        commit_pages_too_early,
        find_pages_by_a_hash,
        find_pages_whatever_is_before_them,
        count_cached_tokens_that_were_not_computed,
        reuse_pages_of_scored_prompts,
        forget_the_state_of_a_logits_processor,
        keep_the_state_of_wrong_drafts,
        forget_the_output,
        use_results_that_are_void,
        fail_the_neighbours,
        let_requests_wait_for_ever,
        count_a_step_before_it_is_done,
        number_sampled_tokens_from_the_last_start,
    ],
)
def test_a_planted_fault_is_found(monkeypatch, plant):
    plant(monkeypatch)
    before = num_calls()
    with pytest.raises((AssertionError, PluginError, LookupError)):
        run_machines(11, 400_000, examples=40, phases=[Phase.generate], verbosity=Verbosity.quiet)
    print(f"found after {num_calls() - before} calls")
