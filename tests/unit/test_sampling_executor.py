"""Executors that sample: which rows they choose, and two steps in flight."""

import random
from contextlib import suppress

import pytest
import torch
from attrs import evolve
from contract_executors import (
    Device,
    Hashing,
    Once,
    all_free,
    arg_max_only,
    demo_model,
    make_runner,
    outcome,
    outcomes,
    requests,
    run,
)
from other_threads import press_ctrl_c

from tilewright import GenerateConfig, LLMEngine, RuntimeConfig, hookimpl
from tilewright.errors import (
    ExecutorError,
    ExecutorLostError,
    NonFiniteLogitsError,
    PluginError,
    RequestError,
)
from tilewright.settings import DEMO_MODEL
from tilewright.types import SampledToken, SamplingExecutor, StepOutput
from tilewright_torch import plugin as torch_plugin

TRUTHS = "We hold these truths to be self-evident,"
WHEN = "When in the Course of human events,"
PEOPLE = "We the People of the United States,"
LAST = "And for the support of this Declaration,"


@pytest.fixture(scope="module")
def demo():
    yield from demo_model()


_plain = {}


def plain(model, prompts, **settings):
    """The outcomes of the torch executor. Equal arguments are run once."""
    key = repr((prompts, settings))
    if key not in _plain:
        _plain[key] = outcomes(model, model.executor, prompts, **settings)
    return _plain[key]


def hashing(model):
    return Hashing(model.loaded.config.vocab_size, page_size=8)


def hashed(model, prompts, **settings):
    """The outcomes of an executor whose logits are a hash of the context."""
    return outcomes(model, hashing(model), prompts, **settings)


# --- who samples ----------------------------------------------------------------------------------


def test_a_device_that_takes_the_most_likely_token_gives_the_texts_of_the_plain_executor(demo):
    prompts = [TRUTHS, WHEN, PEOPLE, "He"]
    device = Device(demo.executor)
    assert isinstance(device, SamplingExecutor)
    assert not isinstance(demo.executor, SamplingExecutor)
    assert outcomes(demo, device, prompts) == plain(demo, prompts)
    assert all(step.output.logits is None for step in device.steps)


def test_requests_that_the_device_does_not_serve_are_sampled_by_the_engine_in_the_same_steps(demo):
    prompts = [
        TRUTHS,
        (WHEN, {"temperature": 1.0, "seed": 5}),
        (PEOPLE, {"repetition_penalty": 1.3, "frequency_penalty": 0.5}),
        (LAST, {"logprobs": 3}),
        (TRUTHS, {"prompt_logprobs": 2}),
        ("He", {"logit_bias": {50: 3.0}, "temperature": 2.0, "seed": 7}),
    ]
    device = Device(demo.executor)
    assert outcomes(demo, device, prompts) == plain(demo, prompts)
    own = [sum(row is not None for row in step.sampling) for step in device.steps]
    others = [sum(row is None for row in step.sampling) for step in device.steps]
    assert any(a and b for a, b in zip(own, others, strict=True)), "no step had both"
    assert {row.request_id for step in device.steps for row in step.sampling if row} == {"r0", "r4"}


def test_a_device_samples_with_min_new_tokens_only_if_it_serves_what_this_forbids(demo):
    least = {"min_new_tokens": 30, "max_new_tokens": 40}
    prompts = [(LAST, least), (LAST, least | {"ignore_eos": True}), LAST]
    device = Device(demo.executor)
    assert outcomes(demo, device, prompts) == plain(demo, prompts)
    assert {row.request_id for step in device.steps for row in step.sampling if row} == {"r1", "r2"}
    biased = Device(demo.executor, serves=lambda params: True)
    assert outcomes(demo, biased, prompts) == plain(demo, prompts)
    assert all(step.output.logits is None for step in biased.steps)


def test_a_step_with_a_tap_is_run_by_forward_and_sampled_by_the_engine(demo):
    class Tapping:
        names = ()

        @hookimpl
        def on_tensor(self, name):
            self.names += (name,)

    device, tapping = Device(demo.executor), Tapping()
    (request,) = requests(demo, [TRUTHS])
    run(make_runner(demo, device, observers=[tapping]), [request])
    assert not device.steps
    assert tapping.names.count("logits") == 12
    assert outcome(request) == plain(demo, [TRUTHS])[0]


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (StepOutput(tokens=[]), "must return one token from 0 to 1998, .* rows .0. of 1"),
        (StepOutput(tokens=[None]), "must return one token"),
        (StepOutput(tokens=[SampledToken(token_id=1999)]), "must return one token"),
        (StepOutput(tokens=[7]), r"must return one token .* found \[7\]"),
        (
            StepOutput(tokens=[SampledToken(token_id=1)], logits=torch.zeros(1, 1999)),
            "must return 0 rows of logits, found 1",
        ),
    ],
)
def test_an_output_that_does_not_answer_the_step_is_an_error_that_names_the_executor(
    demo, output, message
):
    device = Device(demo.executor)
    device._run = lambda step: output
    (request,) = requests(demo, [TRUTHS])
    run(make_runner(demo, device), [request])
    assert isinstance(request.error, PluginError)
    assert str(request.error).startswith("executor must return")
    with pytest.raises(PluginError, match=message):
        raise request.error


# --- two steps in flight --------------------------------------------------------------------------


def test_the_next_step_is_submitted_before_a_step_is_waited_for_and_takes_half_the_time(demo):
    device = Device(demo.executor)
    (request,) = requests(demo, [TRUTHS], max_new_tokens=40, ignore_eos=True)
    run(make_runner(demo, device), [request])
    assert len(device.steps) == 40
    for number in range(39):
        assert device.events.index(("submit", number + 1)) < device.events.index(("wait", number))
    serial = 2.0 * 40  # each step: a second of the device, then a second of the engine
    assert device.now == serial / 2 + 1


def test_a_token_that_is_sampled_in_flight_stands_in_the_next_step_by_its_row(demo):
    device = Device(demo.executor)
    prompts = [(TRUTHS, {"logprobs": 0}), WHEN, (PEOPLE, {"prompt_logprobs": 0})]
    run(make_runner(demo, device, max_batch_tokens=64), requests(demo, prompts, max_new_tokens=3))
    first, second, third = device.steps[:3]
    rows = first.batch.logits_rows.tolist()
    last = (first.batch.query_starts[1:] - 1).tolist()
    assert second.batch.request_ids == ("r1", "r2"), "r0 waits for the engine's sampler"
    assert second.batch.token_source.tolist() == [rows.index(last[1]), rows.index(last[2])]
    assert second.batch.token_ids.tolist() == [0, 0]
    assert [row.position for row in second.sampling] == [1, 1]
    assert [list(row.output_token_ids) for row in second.sampling] == [[], []]
    assert third.batch.request_ids == ("r0", "r1", "r2")
    assert third.batch.token_source.tolist() == [-1, 0, 1]
    assert third.sampling[0] is None
    assert [len(row.output_token_ids) for row in third.sampling[1:]] == [1, 1]


def test_no_step_is_run_for_a_token_after_the_last_one(demo):
    device = Device(demo.executor)
    run(make_runner(demo, device), requests(demo, [TRUTHS, WHEN], max_new_tokens=1))
    assert len(device.steps) == 1


@pytest.mark.parametrize(
    ("prompt", "settings", "reason"),
    [
        (LAST, {"max_new_tokens": 100}, "eos"),
        (TRUTHS, {"max_new_tokens": 100, "stop": ("equal",)}, "stop"),
        (TRUTHS, {"max_new_tokens": 5}, "length"),
    ],
)
def test_a_text_that_ends_while_its_next_step_is_in_flight_is_cut_there(
    demo, prompt, settings, reason
):
    prompts = [(prompt, settings), (WHEN, {"max_new_tokens": 60})]
    device = Device(demo.executor)
    made = outcomes(demo, device, prompts)
    assert made == plain(demo, prompts)
    assert made[0][2] == reason
    ended = len(made[0][1])
    in_steps = sum("r0" in step.batch.request_ids for step in device.steps)
    chunks = sum(
        not row.position for step in device.steps for row in step.sampling if row.request_id == "r0"
    )
    assert chunks == 1
    assert in_steps == ended + (reason != "length"), "one step is run in vain, unless it is known"


def test_a_step_after_which_no_request_is_left_leaves_none_in_flight(demo):
    device = Device(demo.executor)
    runner = make_runner(demo, device)
    run(runner, requests(demo, [LAST], max_new_tokens=100))
    assert device.steps[-1].batch.request_ids == ("r0",)
    assert not device.in_flight
    assert all_free(runner)


def test_pages_of_a_request_that_is_aborted_in_flight_return_when_its_steps_have_ended(demo):
    device = Device(demo.executor)
    runner = make_runner(demo, device)
    one, other = requests(demo, [TRUTHS, WHEN], max_new_tokens=20)
    for request in (one, other):
        runner.add(request)
    runner.step()
    allocator = runner.model.allocator
    (waiting,) = device.in_flight

    def takeable():
        return allocator.free_pages + allocator.evictable_pages

    held, free = len(allocator.pages("r0")), takeable()
    runner.abort(one)
    assert one.result.finish_reason == "aborted"
    assert takeable() == free
    runner.step()
    assert waiting.waited
    assert takeable() >= free + held - 1  # the other may have taken one
    with pytest.raises(KeyError):
        allocator.pages("r0")
    run(runner)
    assert len(one.output_token_ids) == 1
    assert outcome(other) == plain(demo, [WHEN], max_new_tokens=20)[0]
    told = [name for step in device.steps for name in step.batch.ended_request_ids]
    assert told == ["r0"]


def test_a_request_that_waits_for_pages_in_flight_starts_when_they_return(demo):
    device = Device(demo.executor)
    runner = make_runner(demo, device, total_pages=5)
    one, other = requests(demo, [TRUTHS, WHEN], max_new_tokens=20)
    for request in (one, other):
        runner.add(request)
    runner.step()
    runner.abort(one)
    run(runner)
    assert outcome(other) == plain(demo, [WHEN], max_new_tokens=20)[0]
    assert all_free(runner)


@pytest.mark.parametrize("mixed", [True, False])
def test_requests_that_arrive_and_long_prompts_leave_the_texts_as_they_are(demo, mixed):
    first, second = requests(demo, [TRUTHS, WHEN], max_new_tokens=25)
    chunked = TRUTHS + " that all men are created equal, that they are endowed by their Creator"
    (third,) = requests(demo, [chunked], max_new_tokens=25)
    third.request_id = "long"
    device = Device(demo.executor)
    device.limits = evolve(demo.executor.limits, mixed=mixed)
    runner = make_runner(demo, device, max_batch_tokens=7)
    arriving = {0: first, 5: second, 9: third}
    for number in range(200):
        if number in arriving:
            runner.add(arriving[number])
        runner.step()
    made = [outcome(request) for request in (first, second, third)]
    expected = plain(demo, [TRUTHS, WHEN, chunked], max_new_tokens=25)
    assert made == expected
    sizes = [(len(s.batch.token_ids), len(s.batch.request_ids)) for s in device.steps]
    assert max(size for size, _ in sizes) <= 7


def test_prompts_and_decoding_take_turns_in_flight_too(demo):
    device = Device(Hashing(demo.loaded.config.vocab_size, mixed=False))
    runner = make_runner(demo, device, max_batch_tokens=4)
    one, long = requests(demo, [[5], list(range(40))], max_new_tokens=8)
    runner.add(one)
    runner.step()
    runner.add(long)
    run(runner)
    names = [step.batch.request_ids for step in device.steps]
    assert names[:12] == [("r0",)] * 2 + [("r1",), ("r0",)] * 5


def test_an_observer_may_abort_a_request_in_a_step_while_the_next_is_in_flight(demo):
    class Aborting:
        @hookimpl
        def on_step(self, event):
            if event.step == 3:
                assert device.in_flight
                runner.abort(one)

    device = Device(demo.executor)
    runner = make_runner(demo, device, observers=[Aborting()])
    one, other = requests(demo, [TRUTHS, WHEN])
    run(runner, [one, other])
    assert one.result.finish_reason == "aborted"
    assert len(one.output_token_ids) == 4
    assert outcome(other) == plain(demo, [WHEN])[0]
    assert all_free(runner)


def test_seconds_of_steps_in_flight_add_up_to_no_more_than_the_time_that_has_passed(demo):
    from time import perf_counter, sleep

    class Timing:
        seconds = 0.0

        @hookimpl
        def on_step(self, event):
            self.seconds += event.seconds

    timing = Timing()
    device = Device(demo.executor, in_wait=lambda number: sleep(0.002))
    runner = make_runner(demo, device, observers=[timing])
    started = perf_counter()
    run(runner, requests(demo, [TRUTHS]))
    assert 12 * 0.002 < timing.seconds < perf_counter() - started


# --- failures -------------------------------------------------------------------------------------


def failing(model, error, where, prompts=(TRUTHS, WHEN), **runtime):
    """Requests that were run on a device where one step fails, and their runner."""
    device = Device(hashing(model), **{where: Once(4, error)})
    runner = make_runner(model, device, **runtime)
    made = requests(model, prompts, max_new_tokens=20)
    run(runner, made)
    assert not device.in_flight
    assert all_free(runner)
    return made, runner


@pytest.mark.parametrize("where", ["in_wait", "in_submit"])
def test_a_step_that_fails_ends_its_requests_and_no_others(demo, where):
    error = ExecutorError("a chip has failed")
    prompts = [TRUTHS, WHEN, PEOPLE, LAST]
    made, runner = failing(demo, error, where, prompts, max_batch_size=2)
    assert [request.error for request in made] == [error, error, None, None]
    expected = hashed(demo, prompts, max_new_tokens=20)
    assert [outcome(request) for request in made[2:]] == expected[2:]
    again = requests(demo, [TRUTHS], max_new_tokens=20)
    run(runner, again)
    assert outcome(again[0]) == expected[0]


def test_no_step_is_submitted_after_one_that_was_refused(demo):
    numbers = []
    refuses = Once(4, ExecutorError("no room in the queue"))

    def in_submit(number):
        numbers.append(number)
        refuses(number)

    made = requests(demo, [TRUTHS, WHEN])
    run(make_runner(demo, Device(hashing(demo), in_submit=in_submit)), made)
    assert numbers == [0, 1, 2, 3, 4]
    assert [request.error for request in made] == [refuses.error] * 2


def test_a_step_that_failed_is_not_waited_for_again(demo):
    device = Device(hashing(demo), in_wait=Once(4, ExecutorError("a chip has failed")))
    waited, wait = [], device.wait

    def waiting(step):
        waited.append(step.number)
        return wait(step)

    device.wait = waiting
    made = requests(demo, [TRUTHS, WHEN])
    run(make_runner(demo, device), made)
    assert waited == [0, 1, 2, 3, 4, 5]
    assert all(request.error for request in made)


def test_a_bug_in_an_executor_that_samples_is_named(demo):
    made, _ = failing(demo, ZeroDivisionError("a bug"), "in_submit")
    for request in made:
        assert isinstance(request.error, PluginError)
        assert "executor failed in a step: ZeroDivisionError: a bug" in str(request.error)


@pytest.mark.parametrize("where", ["in_wait", "in_submit"])
def test_a_lost_device_ends_all_requests_and_refuses_more(demo, where):
    error = ExecutorLostError("the card has fallen off the bus")
    made, runner = failing(demo, error, where, [TRUTHS, WHEN, PEOPLE], max_batch_size=2)
    assert [request.error for request in made] == [error] * 3
    (late,) = requests(demo, [LAST])
    with pytest.raises(ExecutorLostError) as caught:
        runner.add(late)
    assert str(caught.value) == str(error)
    runner.step()
    assert not runner.requests


def test_logits_that_are_not_finite_end_one_request_and_the_others_lose_nothing(demo):
    error = NonFiniteLogitsError("r1", 4, [3], 1999)
    made, _ = failing(demo, error, "in_wait", [TRUTHS, WHEN, PEOPLE])
    assert isinstance(made[1].error, NonFiniteLogitsError)
    assert made[1].error.token_ids == (3,)
    expected = hashed(demo, [TRUTHS, WHEN, PEOPLE], max_new_tokens=20)
    assert [outcome(made[i]) for i in (0, 2)] == [expected[0], expected[2]]


def test_logits_that_are_not_finite_after_a_text_has_ended_do_not_matter(demo):
    tokens = hashed(demo, [TRUTHS])[0][1]
    prompts = [(TRUTHS, {"stop_token_ids": (tokens[3],)}), WHEN]
    error = NonFiniteLogitsError("r0", 4, [3], 1999)
    device = Device(hashing(demo), in_wait=Once(4, error))
    made = requests(demo, prompts)
    run(make_runner(demo, device), made)
    assert device.in_wait.raised
    assert [outcome(request) for request in made] == hashed(demo, prompts)


def test_the_first_tensor_that_is_not_finite_is_looked_for_where_all_tokens_are_known(demo):
    error = NonFiniteLogitsError("r0", 0, [3], 1999)
    device = Device(hashing(demo), in_wait=Once(0, error))
    made = requests(demo, [TRUTHS])
    run(make_runner(demo, device), made)
    assert made[0].error.first_tensor == ""


def test_the_engines_sampler_may_fail_while_the_next_step_is_in_flight(demo):
    device = Device(hashing(demo))
    runner = make_runner(demo, device)

    def sample(logits, rows):
        assert device.in_flight
        raise NonFiniteLogitsError("r1", 0, [3], 1999)

    made = requests(demo, [TRUTHS, (WHEN, {"temperature": 1.0})])
    runner._sampler.sample = sample
    run(runner, made)
    assert isinstance(made[1].error, NonFiniteLogitsError)
    assert outcome(made[0]) == hashed(demo, [TRUTHS])[0]
    assert all_free(runner)


# --- Ctrl-C ---------------------------------------------------------------------------------------


def interrupted(runner, made):
    """Run to the end through interrupts; returns how many there were."""
    count = 0
    for request in made:
        runner.add(request)
    while runner.requests:
        try:
            runner.step()
        except KeyboardInterrupt:
            count += 1
        runner.model.allocator.check_integrity()
    return count


@pytest.mark.parametrize("where", ["in_wait", "in_submit"])
@pytest.mark.parametrize("number", [0, 1, 5])
def test_requests_go_on_after_ctrl_c_in_a_call_of_the_executor(demo, where, number):
    device = Device(hashing(demo), **{where: Once(number, KeyboardInterrupt())})
    runner = make_runner(demo, device)
    made = requests(demo, [TRUTHS, LAST], max_new_tokens=40)
    assert interrupted(runner, made) == 1
    expected = hashed(demo, [TRUTHS, LAST], max_new_tokens=40)
    assert [outcome(request) for request in made] == expected
    assert all_free(runner)


@pytest.mark.parametrize("method", ["done", "launched", "schedule"])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("number", [0, 1, 5])
def test_requests_go_on_after_ctrl_c_around_a_call_of_the_scheduler(demo, method, after, number):
    device = Device(hashing(demo))
    runner = make_runner(demo, device)
    original, once, calls = (
        getattr(runner._scheduler, method),
        Once(number, KeyboardInterrupt()),
        [],
    )

    def interrupting(*arguments):
        calls.append(1)
        if not after:
            once(len(calls) - 1)
        returned = original(*arguments)
        once(len(calls) - 1)
        return returned

    setattr(runner._scheduler, method, interrupting)
    made = requests(demo, [TRUTHS, LAST, (WHEN, {"temperature": 1.0, "seed": 3})])
    assert interrupted(runner, made) == 1
    expected = hashed(demo, [TRUTHS, LAST, (WHEN, {"temperature": 1.0, "seed": 3})])
    assert [outcome(request) for request in made] == expected
    assert all_free(runner)


def test_ctrl_c_while_void_steps_are_waited_for_leaves_them_void(demo):
    def in_wait(number):
        if number == 3:
            failing(number)
        interrupting(number)

    failing = Once(3, NonFiniteLogitsError("r1", 3, [3], 1999))
    interrupting = Once(4, KeyboardInterrupt())
    device = Device(hashing(demo), in_wait=in_wait)
    runner = make_runner(demo, device)
    made = requests(demo, [TRUTHS, WHEN])
    assert interrupted(runner, made) == 1
    expected = hashed(demo, [TRUTHS, WHEN])
    assert [outcome(request) for request in made] == expected, "the step that failed is run again"
    assert all_free(runner)


# --- through the engine ---------------------------------------------------------------------------


@pytest.fixture
def devices(monkeypatch):
    """The devices on which an engine's models run."""
    made = []
    original = torch_plugin.create_executor

    @hookimpl
    def create_executor(model_config, runtime_config, weights, layers, options):
        made.append(Device(original(model_config, runtime_config, weights, layers, options)))
        return made[-1]

    monkeypatch.setattr(torch_plugin, "create_executor", create_executor)
    return made


def engine_with(**plugins):
    engine = LLMEngine.from_plugins(**plugins)
    runtime = RuntimeConfig(weight_dtype="float32", page_size=8, total_pages=64)
    engine.init_model("demo", DEMO_MODEL, runtime)
    return engine


def config(max_new_tokens=12, **settings):
    return GenerateConfig(max_new_tokens=max_new_tokens, **settings)


@pytest.mark.parametrize("way", ["close", "unload"])
def test_closing_waits_for_the_steps_in_flight_and_ends_their_requests(devices, way):
    engine = engine_with()
    stream = engine.stream("demo", TRUTHS, config(200))
    next(stream)
    (device,) = devices
    assert device.in_flight
    engine.close() if way == "close" else engine.unload("demo")
    assert device.closed
    assert not device.in_flight
    with pytest.raises(RequestError, match="before this request had finished"):
        list(stream)
    engine.close()


def test_an_executor_is_closed_even_if_ctrl_c_interrupts_the_last_wait(devices):
    engine = engine_with()
    runner = engine.runner("demo")
    runner.add(*requests(runner.model, [TRUTHS]))
    runner.step()
    (device,) = devices
    device.in_wait = Once(device.in_flight[0].number, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        engine.close()
    assert device.closed


@pytest.mark.parametrize("step", [0, 3])
def test_an_observer_may_close_the_engine_while_a_step_is_in_flight(devices, step):
    class Closing:
        steps = ()

        @hookimpl
        def on_step(self, event):
            self.steps += (event.step,)
            if event.step == step:
                assert devices[0].in_flight
                self.engine.close()

    closing = Closing()
    closing.engine = engine = engine_with(observers=[closing])
    with pytest.raises(RequestError, match="engine was closed"):
        engine.generate_batch("demo", [TRUTHS, WHEN], config())
    assert devices[0].closed
    assert not devices[0].in_flight
    assert closing.steps == tuple(range(step + 1))


def test_a_request_that_ends_while_a_step_with_it_is_in_flight_is_told_of_once(devices):
    prompts = [TRUTHS, WHEN]
    with engine_with() as engine:
        whole = engine.generate_batch("demo", prompts, config(20))
        short = next(t for t in whole[1].token_ids[2:9] if t not in whole[0].token_ids)
        results = engine.generate_batch("demo", prompts, config(20, stop_token_ids=(short,)))
        assert results[0].token_ids == whole[0].token_ids
        assert results[1].token_ids == whole[1].token_ids[: len(results[1].token_ids)]
    with engine_with() as engine:
        runner = engine.runner("demo")
        made = requests(runner.model, prompts, max_new_tokens=20, stop_token_ids=(short,))
        for request in made:
            runner.add(request)
        ended = []
        while runner.requests:
            runner.step()
            ended += [request for request in runner.poll() if request.over]
        assert sorted(ended, key=made.index) == made


def test_ctrl_c_ends_a_stream_and_leaves_the_engine_as_it_was(devices):
    with engine_with() as engine:
        whole = engine.generate("demo", WHEN, config())
        (device,) = devices
        pressed = len(device.steps) + 3
        device.in_wait = lambda number: number == pressed and press_ctrl_c()
        with pytest.raises(KeyboardInterrupt):
            engine.generate("demo", TRUTHS, config(100))
        assert engine.generate("demo", WHEN, config()) == whole
        assert all_free(engine._thread("demo").runner)


def test_an_observer_may_generate_while_a_step_is_in_flight(devices):
    class Generating:
        text = None

        @hookimpl
        def on_step(self, event):
            if event.step == 2 and self.text is None:
                self.text = ""
                self.text = self.engine.generate("demo", WHEN, config())

    generating = Generating()
    with engine_with(observers=[generating]) as engine:
        generating.engine = engine
        text = engine.generate("demo", TRUTHS, config())
        assert text == engine.generate("demo", TRUTHS, config())
        assert generating.text == engine.generate("demo", WHEN, config())


# --- random requests ------------------------------------------------------------------------------


def random_prompts(rng, vocab_size):
    """Prompts with settings of their own, which together use all ways to end and to sample."""
    prompts = []
    for _ in range(rng.randint(3, 12)):
        prompt = [rng.randrange(vocab_size) for _ in range(rng.randint(1, 20))]
        settings = {
            "max_new_tokens": rng.randint(1, 14),
            "temperature": rng.choice([0.0, 0.0, 1.0]),
            "seed": rng.randrange(2**20),
            "stop_token_ids": tuple(range(0, vocab_size, rng.choice([12, 40]))),
        }
        if rng.random() < 0.2:
            settings["repetition_penalty"] = 1.5
        if rng.random() < 0.2:
            settings["logprobs"] = 2
        if rng.random() < 0.3:
            settings["prompt_logprobs"] = 1
        prompts.append((prompt, settings))
    return prompts


@pytest.mark.parametrize("seed", range(30))
def test_random_requests_in_flight_get_the_tokens_of_the_plain_runner(demo, seed):
    rng = random.Random(seed)
    vocab_size = demo.loaded.config.vocab_size
    prompts = random_prompts(rng, vocab_size)
    limits = {"mixed": rng.random() < 0.7, "max_logits_rows": rng.choice([None, 1, 4])}
    runtime = {
        "max_batch_size": rng.randint(1, 6),
        "max_batch_tokens": rng.randint(1, 25),
        "total_pages": rng.randint(9, 30),
    }

    def unpenalised(params):
        return params.repetition_penalty == 1.0

    interrupts, aborted = [rng.randrange(30) for _ in range(2)], rng.randrange(len(prompts))

    def in_wait(number):
        if number in interrupts:
            interrupts.remove(number)
            raise KeyboardInterrupt

    device = Device(
        Hashing(vocab_size, **limits), rng.choice([arg_max_only, unpenalised]), in_wait=in_wait
    )
    runner = make_runner(demo, device, **runtime)
    made = requests(demo, prompts)
    arriving = list(made)
    while arriving or runner.requests:
        if arriving and rng.random() < 0.4:
            runner.add(arriving.pop(0))
        with suppress(KeyboardInterrupt):
            runner.step()
        if rng.random() < 0.03:
            runner.abort(made[aborted])
        runner.model.allocator.check_integrity()
    runner.step()
    assert all_free(runner)
    expected = outcomes(demo, Hashing(vocab_size), prompts)
    for request, whole in zip(made, expected, strict=True):
        if request.result.finish_reason == "aborted":
            assert whole[1][: len(request.output_token_ids)] == tuple(request.output_token_ids)
        else:
            assert outcome(request) == whole
