"""What is sent to an executor's part in another process, and what cannot be."""

import pickle

import pytest
import torch
from attrs import asdict, evolve

from tilewright import AsyncLLMEngine, LLMEngine
from tilewright.types import SampledToken, SamplerRow, SamplingParams, StepOutput, TokenLogprobs
from tilewright_testing.paged import Sequences, tensors

PARAMS = SamplingParams(temperature=0.5, logit_bias={3: -1.0}, seed=2**63 - 1, logprobs=2)


def copied(value):
    return pickle.loads(pickle.dumps(value))


def test_a_batch_keeps_its_tensors_names_and_numbers():
    sequences = Sequences(page_size=4, total_pages=8)
    sequences.batch({"a": [5, 6, 7, 8, 9]})
    whole = sequences.batch({"a": [1, 2], "b": [3, 4, 5]})
    batch = evolve(whole, logits_rows=torch.tensor([1, 2, 4]))
    batch.num_drafts[0] = 1
    batch.token_source[3] = 2
    copy = copied(batch)
    for name, tensor in tensors(batch).items():
        assert getattr(copy, name).dtype == tensor.dtype
        assert torch.equal(getattr(copy, name), tensor)
    assert copy.max_query_len == 3
    assert copy.request_ids == ("a", "b")
    assert copy.ended_request_ids == ()


def test_how_a_token_is_chosen_and_the_token_stay_what_they_are():
    row = SamplerRow(
        request_id="a", params=PARAMS, prompt_token_ids=(1, 2), output_token_ids=(3,), position=2
    )
    assert asdict(copied(row)) == asdict(row)
    assert copied(PARAMS) == PARAMS
    token = SampledToken(
        token_id=3, logprobs=TokenLogprobs(token_id=3, logprob=-0.5, top=((3, -0.5),)), sanitized=1
    )
    assert copied(token) == token
    output = copied(StepOutput(tokens=[token, None], logits=torch.tensor([[1.0, float("nan")]])))
    assert output.tokens == [token, None]
    assert output.logits[0, 0] == 1.0
    assert output.logits[0, 1].isnan()
    assert copied(StepOutput(tokens=[token])).logits is None


@pytest.mark.parametrize("kind", [LLMEngine, AsyncLLMEngine])
def test_an_engine_is_not_sent_and_says_what_to_do(kind):
    wanted = pytest.raises(TypeError, match="make it in the process that uses it")
    with LLMEngine.from_plugins() as engine, wanted:
        pickle.dumps(engine if kind is LLMEngine else AsyncLLMEngine(engine))
