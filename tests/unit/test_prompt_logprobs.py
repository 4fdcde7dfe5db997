"""Log-probabilities of prompts on executors that return few rows of logits."""

import pytest
from attrs import evolve
from contract_executors import Device, Hashing, demo_model, make_runner, outcome, requests, run

from tilewright.errors import RequestError
from tilewright.request import check_settings
from tilewright.types import GenerateConfig

PROMPTS = [
    (list(range(100, 120)), {"prompt_logprobs": 2}),
    (list(range(50, 57)), {"prompt_logprobs": 0}),
    list(range(60, 75)),
    ([7], {"prompt_logprobs": 1}),
    (list(range(200, 204)), {"prompt_logprobs": 1}),
]


@pytest.fixture(scope="module")
def demo():
    yield from demo_model()


class NotFinite(Hashing):
    """One whose logits after a token are not finite."""

    def forward(self, batch, tap=None):
        logits = super().forward(batch, tap)
        logits[batch.token_ids[batch.logits_rows] == 105, 9] = float("nan")
        return logits


@pytest.mark.parametrize("max_batch_tokens", [4, 64])
def test_a_prompt_whose_score_is_not_finite_fails_and_nothing_else_does(demo, max_batch_tokens):
    executor = NotFinite(demo.loaded.config.vocab_size)
    runner = make_runner(demo, executor, max_batch_tokens=max_batch_tokens)
    scored, other = made = requests(demo, [PROMPTS[0], list(range(60, 75))])
    run(runner, made)
    assert (scored.error.step, scored.error.token_ids) == (6 - 20, (9,))
    assert other.result.finish_reason == "length"


@pytest.mark.parametrize("max_batch_tokens", [1, 5, 64])
@pytest.mark.parametrize("in_flight", [False, True])
def test_steps_score_no_more_rows_than_the_executor_returns(demo, max_batch_tokens, in_flight):
    found = {}
    for most in (None, 3):
        executor = Hashing(demo.loaded.config.vocab_size, max_logits_rows=most)
        device = Device(executor) if in_flight else executor
        runner = make_runner(demo, device, max_batch_tokens=max_batch_tokens)
        made = requests(demo, PROMPTS, max_new_tokens=5)
        run(runner, made)
        found[most] = [outcome(request) for request in made]
        scored = [len(batch.logits_rows) - num_sampled(batch, made) for batch in executor.batches]
        assert sum(scored) == 19 + 6 + 0 + 3
        assert max(scored) <= (most or max_batch_tokens)
        assert all(batch.logits_rows.diff().gt(0).all() for batch in executor.batches)
    assert found[3] == found[None]


def num_sampled(batch, made):
    """Sequences whose last token in the step is the last one of their prompt or after it."""
    lengths = {request.request_id: len(request.prompt_token_ids) for request in made}
    stops = zip(batch.request_ids, batch.context_lens.tolist(), strict=True)
    return sum(stop >= lengths[name] for name, stop in stops)


def test_a_prompt_that_is_not_scored_does_not_wait_for_rows(demo):
    executor = Hashing(demo.loaded.config.vocab_size, max_logits_rows=3)
    runner = make_runner(demo, executor, max_batch_tokens=64)
    run(runner, requests(demo, PROMPTS[:3]))
    first = executor.batches[0]
    assert first.request_ids == ("r0", "r2")
    assert first.context_lens.tolist() == [3, 15]


def test_an_executor_without_logits_of_prompts_refuses_to_score_them(demo):
    model = evolve(demo, executor=Hashing(demo.loaded.config.vocab_size, max_logits_rows=0))
    config = GenerateConfig(prompt_logprobs=1)
    with pytest.raises(RequestError, match=r"prompt_logprobs = 1 needs logits of prompt tokens"):
        check_settings(model, config)
    check_settings(demo, config)
    run(make_runner(demo, model.executor), requests(demo, [[5, 6, 7]]))
