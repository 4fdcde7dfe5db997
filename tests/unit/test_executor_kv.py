"""Executors that keep keys and values of their own for each request."""

import pytest
from contract_executors import (
    Device,
    OwnPages,
    all_free,
    demo_model,
    make_runner,
    outcome,
    outcomes,
    requests,
    run,
)

from tilewright.errors import ExecutorError, NonFiniteLogitsError

PROMPTS = [
    "We hold these truths to be self-evident,",
    "When in the Course of human events,",
    ("We the People of the United States,", {"max_new_tokens": 4}),
    "He",
]


@pytest.fixture(scope="module")
def demo():
    yield from demo_model()


@pytest.fixture
def own(demo):
    return OwnPages(demo.executor)


def kept_after_one_more(runner, model):
    """What the executor keeps after the steps of one more request, the first of which may have
    been submitted before the last step of the others was done."""
    (request,) = requests(model, ["Congress shall make no law"], max_new_tokens=3)
    request.request_id = "one more"
    run(runner, [request])
    own = runner.model.executor
    own = own.inner if isinstance(own, Device) else own
    assert all_free(runner)
    return set(own.kept) - {"one more"}


@pytest.mark.parametrize("in_flight", [False, True])
def test_texts_are_those_of_the_engines_cache_and_nothing_is_kept_afterwards(demo, own, in_flight):
    executor = Device(own) if in_flight else own
    runner = make_runner(demo, executor, max_batch_size=2)
    made = requests(demo, PROMPTS)
    run(runner, made)
    assert [outcome(request) for request in made] == outcomes(demo, demo.executor, PROMPTS)
    assert len(own.kept) <= 2, "requests that ended are named in the next step"
    assert not kept_after_one_more(runner, demo)


@pytest.mark.parametrize("in_flight", [False, True])
def test_nothing_is_kept_of_requests_that_were_aborted(demo, own, in_flight):
    runner = make_runner(demo, Device(own) if in_flight else own)
    made = requests(demo, PROMPTS)
    for request in made:
        runner.add(request)
    for request in made:
        runner.step()
        runner.abort(request)
    runner.step()
    assert not kept_after_one_more(runner, demo)


@pytest.mark.parametrize("in_flight", [False, True])
@pytest.mark.parametrize(
    "error",
    [ExecutorError("a step failed"), NonFiniteLogitsError("r1", 2, [3], 1999), ValueError("a bug")],
)
def test_nothing_is_kept_after_a_step_that_failed(demo, own, in_flight, error):
    runner = make_runner(demo, Device(own) if in_flight else own)
    made = requests(demo, PROMPTS[:2])
    for request in made:
        runner.add(request)
    for _ in range(2):
        runner.step()
    own.fails = error
    runner.step()
    own.fails = None
    run(runner)
    assert made[1].error
    assert not kept_after_one_more(runner, demo)


@pytest.mark.parametrize("in_flight", [False, True])
@pytest.mark.parametrize("error", [ExecutorError("a step failed"), KeyboardInterrupt()])
def test_requests_that_ended_are_named_again_if_the_step_that_names_them_does_not_run(
    demo, own, in_flight, error
):
    runner = make_runner(demo, Device(own) if in_flight else own)
    run(runner, requests(demo, PROMPTS[:2]))
    assert set(own.kept) == {"r0", "r1"}
    forward = own.forward

    def fails(batch, tap=None):
        raise error

    own.forward = fails
    (request,) = requests(demo, PROMPTS[3:])
    request.request_id = "another"
    runner.add(request)
    if isinstance(error, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            runner.step()
        own.forward = forward
        runner.abort(request)  # waits for the step that was interrupted
    else:
        runner.step()
        assert request.error is error
    own.forward = forward
    assert not kept_after_one_more(runner, demo)
