"""Tokens that are guessed and checked many at a time."""

import random

import pytest
from contract_executors import (
    Device,
    Hashing,
    all_free,
    demo_model,
    make_runner,
    outcome,
    outcomes,
    requests,
    run,
)

PASSAGE = (
    "We hold these truths to be self-evident, that all men are created equal, that they are "
    "endowed by their Creator with certain unalienable Rights, that among these are Life, Liberty "
    "and the pursuit of Happiness."
)
START = "We hold these truths to be self-evident,"
AGAIN = f"{PASSAGE} {START}"
"""A prompt whose likely continuation is in the prompt."""
WHEN = "When in the Course of human events,"
LAST = "And for the support of this Declaration,"


@pytest.fixture(scope="module")
def demo():
    yield from demo_model()


def ngram(request, most):
    """What followed the last two tokens when they occurred before, at most 4 tokens."""
    tokens = [*request.prompt_token_ids, *request.output_token_ids]
    for at in range(len(tokens) - 3, -1, -1):
        if tokens[at : at + 2] == tokens[-2:]:
            return tokens[at + 2 : at + 2 + min(most, 4)]
    return ()


def drafted(model, prompts, draft=ngram, executor=None, runtime=None, **settings):
    """Outcomes with drafts, and the number of steps."""
    runner = make_runner(model, executor or model.executor, draft=draft, **(runtime or {}))
    made = requests(model, prompts, **settings)
    run(runner, made)
    assert all_free(runner)
    return [outcome(request) for request in made], runner.num_steps


@pytest.mark.parametrize("settings", [{}, {"logprobs": 2}, {"temperature": 1.0, "seed": 11}])
def test_drafts_change_the_number_of_steps_and_nothing_else(demo, settings):
    settings = {"max_new_tokens": 40, "ignore_eos": True} | settings
    plain = outcomes(demo, demo.executor, [AGAIN], **settings)
    found, steps = drafted(demo, [AGAIN], **settings)
    assert found == plain
    chunks = 3  # the prompt is longer than two steps
    assert steps < 40 + chunks - 1 - 8, "no draft was accepted"


@pytest.mark.parametrize(
    ("prompt", "settings"),
    [
        (AGAIN, {"stop": ("endowed by",)}),
        (AGAIN, {"stop": ("l",)}),
        (f"{LAST} our sacred Honor.<|endoftext|>{LAST}", {}),
        *[(AGAIN, {"max_new_tokens": n}) for n in (1, 2, 3, 4, 5, 6, 7)],
    ],
)
def test_a_text_that_ends_within_accepted_drafts_is_cut_there(demo, prompt, settings):
    settings = {"max_new_tokens": 60} | settings
    found, _ = drafted(demo, [prompt], **settings)
    assert found == outcomes(demo, demo.executor, [prompt], **settings)


def test_an_end_of_sequence_token_within_accepted_drafts_ends_the_text(demo):
    plain = outcomes(demo, demo.executor, [LAST], max_new_tokens=100)
    whole = plain[0][1]
    assert plain[0][2] == "eos"

    def draft(request, most):
        """What follows, and tokens after the last one."""
        at = len(request.output_token_ids)
        return [*whole[at : at + 3], 5, 6][:most]

    found, steps = drafted(demo, [LAST], draft, max_new_tokens=100)
    assert found == plain
    assert steps <= len(whole) // 4 + 2


@pytest.mark.parametrize("least", [5, 14, 15, 16, 40])
def test_drafts_of_tokens_that_end_a_text_are_not_accepted_before_min_new_tokens(demo, least):
    free = outcomes(demo, demo.executor, [LAST], max_new_tokens=60, ignore_eos=True)[0][1]
    settings = {"max_new_tokens": 60, "min_new_tokens": least}

    def draft(request, most):
        """The tokens of a text that goes on after its eos token."""
        at = len(request.output_token_ids)
        return list(free[at : at + 4])[:most]

    found, steps = drafted(demo, [LAST], draft, **settings)
    assert found == outcomes(demo, demo.executor, [LAST], **settings)
    assert steps < len(found[0][1])


def test_pages_of_drafts_that_were_wrong_are_given_back(demo):
    wrong = [5, 6, 7, 8]
    runner = make_runner(demo, demo.executor, draft=lambda request, most: wrong[:most])
    (request,) = requests(demo, [START], max_new_tokens=20)
    runner.add(request)
    allocator, held = runner.model.allocator, set()
    while runner.requests:
        runner.step()
        if runner.requests:
            pages = len(allocator.pages("r0"))
            assert pages == -(-request.num_computed // allocator.page_size)
            held.add(pages)
    assert len(held) > 2
    assert outcome(request) == outcomes(demo, demo.executor, [START], max_new_tokens=20)[0]


def test_requests_with_and_without_drafts_share_steps(demo):
    prompts = [
        AGAIN,
        WHEN,
        (AGAIN, {"temperature": 1.0, "seed": 3}),
        (AGAIN, {"repetition_penalty": 1.2, "presence_penalty": 0.3}),
        (AGAIN, {"prompt_logprobs": 1, "logprobs": 1}),
    ]
    found, _ = drafted(demo, prompts, max_new_tokens=25)
    assert found == outcomes(demo, demo.executor, prompts, max_new_tokens=25)


@pytest.mark.parametrize("max_batch_tokens", [1, 2, 3, 4])
def test_a_step_may_be_smaller_than_a_token_and_its_drafts(demo, max_batch_tokens):
    executor = Hashing(demo.loaded.config.vocab_size)
    prompts = [[5, 6, 7], [8, 9], [4, 5, 6, 7]]
    plain = outcomes(demo, executor, prompts)
    right = {f"r{i}": whole[1] for i, whole in enumerate(plain)}

    def draft(request, most):
        at = len(request.output_token_ids)
        return right[request.request_id][at : at + most]

    executor.batches.clear()
    runtime = {"max_batch_tokens": max_batch_tokens}
    found, steps = drafted(demo, prompts, draft, executor, runtime)
    assert found == plain
    assert steps == len(executor.batches)
    assert max(len(batch.token_ids) for batch in executor.batches) == max_batch_tokens


def test_drafts_leave_prompts_their_room(demo):
    executor = Hashing(demo.loaded.config.vocab_size)
    runner = make_runner(demo, executor, draft=lambda request, most: [5] * most, max_batch_tokens=4)
    one, other = requests(demo, [[5], [6] * 9], max_new_tokens=30)
    runner.add(one)
    for _ in range(3):
        runner.step()
    assert executor.batches[-1].num_drafts.tolist() == [3]
    runner.add(other)
    for _ in range(3):
        runner.step()
    assert len(other.output_token_ids) == 1
    assert [batch.num_drafts.tolist() for batch in executor.batches[-3:]] == [[0, 0]] * 3
    runner.step()
    assert executor.batches[-1].num_drafts.tolist() == [2, 0]


def test_a_device_that_samples_checks_drafts_too(demo):
    settings = {"max_new_tokens": 40}
    device = Device(demo.executor)
    found, steps = drafted(demo, [AGAIN], executor=device, **settings)
    assert found == outcomes(demo, demo.executor, [AGAIN], **settings)
    assert steps == len(device.steps) < 40
    assert any(step.batch.num_drafts.any() for step in device.steps)
    assert all(step.output.logits is None for step in device.steps)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("in_flight", [False, True])
def test_random_drafts_change_no_token(demo, seed, in_flight):
    rng = random.Random(seed)
    vocab_size = demo.loaded.config.vocab_size
    prompts = []
    for _ in range(rng.randint(1, 7)):
        settings = {
            "max_new_tokens": rng.randint(1, 20),
            "temperature": rng.choice([0.0, 1.0]),
            "seed": rng.randrange(99),
            "stop_token_ids": tuple(range(0, vocab_size, 40)),
            "logprobs": rng.choice([None, 1]),
        }
        prompts.append(([rng.randrange(vocab_size) for _ in range(rng.randint(1, 15))], settings))
    plain = outcomes(demo, Hashing(vocab_size), prompts)
    right = {f"r{i}": whole[1] for i, whole in enumerate(plain)}

    def draft(request, most):
        """Up to 4 tokens: right ones, and then a wrong one."""
        at = len(request.output_token_ids)
        guesses = list(right[request.request_id][at : at + rng.randint(0, 4)])
        if rng.random() < 0.5:
            guesses.append(rng.randrange(vocab_size))
        return guesses[:4]

    runtime = {
        "max_batch_size": rng.randint(1, 5),
        "max_batch_tokens": rng.randint(1, 20),
        "total_pages": rng.randint(9, 30),
    }
    executor = Hashing(vocab_size, mixed=rng.random() < 0.7)
    found, _ = drafted(demo, prompts, draft, Device(executor) if in_flight else executor, runtime)
    assert found == plain
