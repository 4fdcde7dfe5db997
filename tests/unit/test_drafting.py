"""``speculation = "ngram"``: which tokens are drafted, and that they change no text."""

import random

import pytest
from contract_executors import (
    Device,
    Hashing,
    demo_model,
    make_runner,
    outcome,
    outcomes,
    requests,
    run,
)

from tilewright import GenerateConfig, LLMEngine, RuntimeConfig, hookimpl
from tilewright.drafting import LONGEST, MOST_DRAFTS, SHORTEST, ngram_drafts
from tilewright.errors import ConfigError, NonFiniteLogitsError
from tilewright.request import Request
from tilewright.settings import DEMO_MODEL
from tilewright.types import SamplingParams

LAW = (
    "Congress shall make no law respecting an establishment of religion, or prohibiting the free "
    "exercise thereof; or abridging the freedom of speech. Congress shall make no law"
)
"""A prompt whose likely continuation is in the prompt."""
TRUTHS = "We hold these truths to be self-evident,"
LAST = "And for the support of this Declaration,"


def request(prompt, output=()):
    made = Request("r", tuple(prompt), SamplingParams(), max_new_tokens=10_000)
    made.output_token_ids.extend(output)
    return made


def brute_force(tokens, most):
    """The rule, by a search of the whole text."""
    for n in range(LONGEST, SHORTEST - 1, -1):
        for at in range(len(tokens) - n - 1, -1, -1):
            if tokens[at : at + n] == tokens[-n:]:
                found, drafts = at + n, list(tokens)
                for _ in range(min(most, MOST_DRAFTS)):
                    drafts.append(drafts[found])
                    found += 1
                return drafts[len(tokens) :]
    return []


# --- which tokens are drafted ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "output", "drafts"),
    [
        ([1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2], [3, 4, 5, 6, 7]),
        ([1, 2, 3], [4, 5, 6, 1, 2], [3, 4, 5, 6, 1]),  # a match across prompt and output
        ([1, 2, 3, 9, 1, 2, 4, 9], [1, 2], [4, 9, 1, 2, 4]),  # the most recent one
        ([7, 1, 2, 3, 9, 8, 1, 2, 4, 9], [7, 1, 2], [3, 9, 8, 1, 2]),  # the longest one
        ([8, 5, 5, 5], [], [5, 5, 5, 5, 5]),  # a copy that goes on from itself
        ([1, 2, 3, 4], [5], []),
        ([1, 2, 1], [], []),  # one token is too short a match
        ([1], [], []),
        ([1, 2], [], []),
    ],
)
def test_drafts_are_what_followed_the_last_tokens_before(prompt, output, drafts):
    assert (SHORTEST, LONGEST, MOST_DRAFTS) == (2, 3, 5)
    assert ngram_drafts(request(prompt, output), 100) == drafts
    for most in range(1, 5):
        assert ngram_drafts(request(prompt, output), most) == drafts[:most]


@pytest.mark.parametrize("seed", range(10))
def test_an_index_that_grows_finds_what_a_search_of_the_text_finds(seed):
    rng = random.Random(seed)
    made = request([rng.randrange(4) for _ in range(rng.randint(1, 20))])
    for _ in range(60):
        tokens = [*made.prompt_token_ids, *made.output_token_ids]
        most = rng.randint(1, 8)
        assert ngram_drafts(made, most) == brute_force(tokens, most)
        made.output_token_ids += [rng.randrange(4) for _ in range(rng.randint(0, 4))]


class Counting(dict):
    operations = 0

    def __setitem__(self, key, value):
        self.operations += 1
        super().__setitem__(key, value)

    def get(self, key):
        self.operations += 1
        return super().get(key)


@pytest.mark.parametrize("length", [10, 20_000])
def test_the_cost_of_drafts_does_not_grow_with_the_context(monkeypatch, length):
    made = request([i % 1_000 for i in range(length)])
    made.ngrams = Counting()
    ngram_drafts(made, 5)
    read, tokens = [], Request.tokens
    monkeypatch.setattr(Request, "tokens", lambda *a: read.append(tokens(*a)) or read[-1])
    made.ngrams.operations = 0
    for i in range(50):
        made.output_token_ids.append((length + i) % 1_000)
        ngram_drafts(made, 5)
    kinds = LONGEST - SHORTEST + 1
    assert made.ngrams.operations <= 50 * 2 * kinds
    assert sum(map(len, read)) <= 50 * (2 * LONGEST + 1 + MOST_DRAFTS)


def test_the_index_is_dropped_with_the_request(engines):
    engine = engines["ngram"]
    with engine.stream("demo", LAW, GenerateConfig(max_new_tokens=20)) as stream:
        assert "".join(stream)
    assert stream.result.accepted_tokens
    assert not stream._request.ngrams


# --- texts -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engines():
    """Engines with the bundled model, by the speculation that they use."""
    made = {}
    for speculation in (None, "ngram"):
        made[speculation] = LLMEngine.from_plugins()
        made[speculation].init_model("demo", DEMO_MODEL, settings(speculation))
    yield made
    for engine in made.values():
        engine.close()


def settings(speculation, **runtime):
    runtime = {"weight_dtype": "float32", "page_size": 8} | runtime
    return RuntimeConfig(speculation=speculation, **runtime)


def rounded(logprobs):
    return logprobs and [
        (t.token_id, round(t.logprob, 3), [i for i, _ in t.top]) if t else None for t in logprobs
    ]


def content(result):
    """What a caller sees, apart from times and counts."""
    return (
        result.text,
        result.token_ids,
        result.finish_reason,
        result.stop_reason,
        rounded(result.logprobs),
        rounded(result.prompt_logprobs),
    )


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"temperature": 1.0, "seed": 7},
        {"temperature": 0.7, "seed": 8, "top_p": 0.9, "top_k": 20},
        {"logprobs": 2},
        {"prompt_logprobs": 1, "logprobs": 0, "temperature": 1.0, "seed": 3},
        {"stop": ("free exercise",)},
        {"stop": ("i",), "include_stop_str": True},
        {"min_new_tokens": 30, "stop": ("o",)},
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.5, "frequency_penalty": 0.3},
        {"logit_bias": {5: 2.0}},
        {"logits_processors": {"choice": [" respecting an establishment of religion", " no"]}},
        *[{"max_new_tokens": n} for n in range(1, 8)],
    ],
)
def test_texts_are_those_of_plain_decoding(engines, config):
    config = GenerateConfig(**({"max_new_tokens": 50} | config))
    plain, found = (e.generate_result("demo", LAW, config) for e in engines.values())
    assert content(found) == content(plain)
    assert (plain.drafted_tokens, plain.accepted_tokens) == (0, 0)
    assert found.drafted_tokens >= found.accepted_tokens


def test_a_choice_that_is_in_the_prompt_is_drafted(engines):
    choice = " respecting an establishment of religion"
    config = GenerateConfig(max_new_tokens=50, logits_processors={"choice": [choice, " no"]})
    plain, found = (e.generate_result("demo", LAW, config) for e in engines.values())
    assert content(found) == content(plain)
    assert found.text == choice
    assert found.accepted_tokens


@pytest.mark.parametrize("least", [5, 14, 15, 16, 40])
def test_min_new_tokens_holds(engines, least):
    config = GenerateConfig(max_new_tokens=60, min_new_tokens=least)
    prompt = f"{LAST} our sacred Honor.<|endoftext|>{LAST}"
    plain, found = (e.generate_result("demo", prompt, config) for e in engines.values())
    assert content(found) == content(plain)


def test_a_batch_has_the_texts_of_plain_decoding(engines):
    prompts = [LAW, TRUTHS, LAST, f"{TRUTHS} {TRUTHS}"]
    config = GenerateConfig(max_new_tokens=40)
    plain, found = (e.generate_batch("demo", prompts, config) for e in engines.values())
    assert [content(r) for r in found] == [content(r) for r in plain]
    assert found[0].accepted_tokens


def test_a_prompt_that_is_in_the_cache_is_drafted_from_too(engines):
    config = GenerateConfig(max_new_tokens=40)
    first, again = (engines["ngram"].generate_result("demo", LAW, config) for _ in range(2))
    assert again.cached_tokens
    assert content(again) == content(first)
    assert again.accepted_tokens == first.accepted_tokens > 0


def test_requests_that_are_preempted_have_the_texts_of_plain_decoding(engines):
    prompts = [LAW, f"{LAW} respecting", TRUTHS]
    config = GenerateConfig(max_new_tokens=60, ignore_eos=True)
    plain = engines[None].generate_batch("demo", prompts, config)
    with LLMEngine.from_plugins() as engine:
        engine.init_model("demo", DEMO_MODEL, settings("ngram", total_pages=20))
        found = engine.generate_batch("demo", prompts, config)
        stats = engine.stats("demo")
    assert stats.num_preemptions
    assert [content(r) for r in found] == [content(r) for r in plain]
    assert sum(r.accepted_tokens for r in found) == stats.num_accepted_tokens > 0


@pytest.fixture(scope="module")
def demo():
    yield from demo_model()


@pytest.mark.parametrize("seed", range(20))
def test_random_requests_have_the_texts_of_plain_decoding(demo, seed):
    """The executor has 5 tokens, so n-grams recur, by chance often with what followed."""
    rng = random.Random(seed)
    prompts = []
    for _ in range(rng.randint(1, 6)):
        own = {
            "max_new_tokens": rng.randint(10, 40),
            "temperature": rng.choice([0.0, 1.0]),
            "seed": rng.randrange(99),
            "ignore_eos": True,
            "stop_token_ids": rng.choice([(), (4,)]),
            "min_new_tokens": rng.choice([0, 1, 10]),
            "logprobs": rng.choice([None, 1]),
            "repetition_penalty": rng.choice([1.0, 1.3]),
        }
        prompts.append(([rng.randrange(5) for _ in range(rng.randint(1, 15))], own))
    plain = outcomes(demo, Hashing(5), prompts)
    runtime = {
        "max_batch_size": rng.randint(1, 5),
        "max_batch_tokens": rng.randint(1, 30),
        "total_pages": rng.randint(14, 30),
    }
    executor = Hashing(5, mixed=rng.random() < 0.7)
    if rng.random() < 0.3:
        executor = Device(executor)
    runner = make_runner(demo, executor, draft=ngram_drafts, **runtime)
    made = requests(demo, prompts)
    run(runner, made)
    assert [outcome(r) for r in made] == plain
    for r in made:
        assert r.drafted_tokens >= r.accepted_tokens
    stats = runner.stats()
    assert stats.num_drafted_tokens == sum(r.drafted_tokens for r in made)
    assert stats.num_accepted_tokens == sum(r.accepted_tokens for r in made)


# --- counts ------------------------------------------------------------------------------------


class Steps:
    def __init__(self):
        self.events = []

    @hookimpl
    def on_step(self, event):
        self.events.append(event)


@pytest.mark.parametrize("config", [{}, {"stop": ("free exercise",)}, {"temperature": 1.0}])
def test_each_new_token_has_a_step_or_is_an_accepted_draft(config):
    steps = Steps()
    with LLMEngine.from_plugins(observers=[steps]) as engine:
        engine.init_model("demo", DEMO_MODEL, settings("ngram"))
        config = GenerateConfig(max_new_tokens=50, seed=1, **config)
        result = engine.generate_result("demo", LAW, config)
        stats = engine.stats("demo")
    events = steps.events
    assert len(result.token_ids) == len(events) + result.accepted_tokens
    assert result.drafted_tokens > result.accepted_tokens > 5
    for word in ("drafted", "accepted"):
        total = sum(getattr(event, f"num_{word}_tokens") for event in events)
        assert getattr(result, f"{word}_tokens") == total
        assert getattr(stats, f"num_{word}_tokens") == total
    for event in events:
        assert event.num_accepted_tokens <= event.num_drafted_tokens <= MOST_DRAFTS
        assert event.phase == "prefill" or event.num_decode_tokens == 1 + event.num_drafted_tokens


def test_speculation_is_off_unless_it_is_asked_for(engines):
    assert engines["ngram"].model("demo").runtime.speculation == "ngram"
    assert engines[None].model("demo").runtime.speculation is None
    assert RuntimeConfig().speculation is None
    with pytest.raises(ConfigError, match="speculation"):
        RuntimeConfig(speculation="eagle")


# --- errors that only a wrong draft leads to ---------------------------------------------------


def test_a_dead_end_behind_a_wrong_draft_ends_no_request(engines):
    """After " of gamma" only the end of the text is allowed, which min_new_tokens forbids."""
    prompt = "Alpha beta of gamma delta. Alpha beta"
    choice = [" of gamma", " of the United States, and of the People of the States, in order"]
    config = GenerateConfig(
        max_new_tokens=40, min_new_tokens=8, logits_processors={"choice": choice}
    )
    plain, found = (e.generate_result("demo", prompt, config) for e in engines.values())
    assert plain.text == choice[1]
    assert content(found) == content(plain)


class NotFiniteAfter(Hashing):
    """Whose logits are NaN in the rows of a token, from a position on."""

    def __init__(self, vocab_size, token, start):
        super().__init__(vocab_size)
        self.bad = token, start

    def forward(self, batch, tap=None):
        logits = super().forward(batch, tap)
        token, start = self.bad
        rows = batch.logits_rows
        bad = (batch.token_ids[rows] == token) & (batch.positions[rows] >= start)
        logits[bad] = float("nan")
        return logits


def test_logits_that_are_not_finite_behind_a_wrong_draft_end_no_request(demo):
    # Token 4 follows 0, 1 in the prompt, and is not sampled.
    prompts = [[0, 1, 4] * 4, [3, 2, 3, 2]]
    settings = {"max_new_tokens": 30, "ignore_eos": True, "logit_bias": {4: -20.0}}
    plain = outcomes(demo, Hashing(5), prompts, **settings)
    assert 4 not in plain[0][1]
    executor = NotFiniteAfter(5, token=4, start=12)
    runner = make_runner(demo, executor, draft=ngram_drafts)
    made = requests(demo, prompts, **settings)
    run(runner, made)
    assert [outcome(r) for r in made] == plain
    assert not made[0].takes_drafts
    assert made[1].takes_drafts


def test_logits_that_are_not_finite_end_a_request_that_drafts(demo):
    executor = NotFiniteAfter(5, token=2, start=20)
    runner = make_runner(demo, executor, draft=ngram_drafts)
    made = requests(demo, [[0, 1, 2] * 5], max_new_tokens=60, ignore_eos=True)
    run(runner, made)
    error = made[0].error
    assert isinstance(error, NonFiniteLogitsError)
    assert error.step == len(made[0].output_token_ids)
    assert made[0].output_token_ids[-1] == 2
