"""Each request of a batch gets what it gets alone, for every size of chunks, with hits and without,
and when requests give way to each other.

On an executor whose logits are a hash of the context the results are equal. On ``torch`` in float32
a product of other rows may add in another order: log-probabilities are equal within TOLERANCE, and
tokens up to the first near-tie of the request alone, two tokens whose log-probabilities differ by
less than NEAR_TIE. Where only the content of the neighbours differs, not their number or their
lengths, the results of ``torch`` are equal bit for bit.
"""

import random

import pytest
import torch
from alone import alone, processors_of, result_of
from attrs import evolve
from context_hash import ContextHash, InFlight, WatchedPages
from contract_executors import all_free, demo_model, make_runner, requests, run
from reference_models import CONFIGS, write_model

from tilewright import LLMEngine, RuntimeConfig
from tilewright.types import KvLayer
from tilewright_guidance.choice import ChoiceProcessor

TOLERANCE = 2e-4
"""As for the executor against transformers."""
NEAR_TIE = 10 * TOLERANCE

NEW = 9
"""New tokens of each request, at most."""
KINDS = (
    {},
    {"temperature": 1.0, "seed": 11},
    {"temperature": 0.8, "top_k": 5, "seed": 12, "prompt_logprobs": 1},
    {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.5},
    {"temperature": 1.0, "min_new_tokens": 4, "seed": 13},
    {"logits_processors": {"choice": ["CHOICES"]}, "temperature": 1.0, "seed": 14},
)
"""Settings of the rows of a batch; CHOICES stands for texts of the model."""


def kinds(choices, **settings):
    """The settings of each row of a batch."""
    constrained = {"logits_processors": {"choice": choices}}
    return [
        {"seed": 1, "max_new_tokens": NEW, "logprobs": 2}
        | kind
        | (constrained if "logits_processors" in kind else {})
        | settings
        for kind in KINDS
    ]


def mixed_rows(vocab_size, page_size, num_pages, choices, turn):
    """Prompts of some pages, and of one token less and more, that begin alike in part, each with
    the settings of a kind, in an order that depends on the turn."""
    random_of = random.Random(turn)
    base = random_of.choices(range(3, vocab_size - 1), k=num_pages * page_size + 1)
    rows = []
    for i, settings in enumerate(kinds(choices)):
        length = max(1, num_pages * page_size + (-1, 0, 1)[(i + turn) % 3])
        own = random_of.choices(range(3, vocab_size - 1), k=length)
        # A part of them begins with pages of others, up to the middle of a page.
        common = (length, length - 1, length // 2, 0)[(i + turn) % 4]
        rows.append((base[:common] + own[common:length], settings))
    random_of.shuffle(rows)
    return base, rows


def most_pages(rows, page_size):
    """Pages of the longest of some requests."""
    return max(-(-(len(prompt) + NEW - 1) // page_size) for prompt, _ in rows)


CASES = {"no hits": (False, False), "hits": (True, False), "hits and few pages": (True, True)}
"""Whether pages are reused, and whether there are too few for the requests that run."""


def run_together(model, executor, base, rows, chunk, case, processors, watch=False):
    """The requests after a run of all rows, in a cache that may hold the beginning of some."""
    reuse, few = CASES[case]
    size = executor.kv_cache_spec.page_size
    total_pages = most_pages(rows, size) + 2 if few else 200
    inner = executor.inner if isinstance(executor, InFlight) else executor
    runner = make_runner(
        model,
        executor,
        total_pages=total_pages,
        allocator=WatchedPages(total_pages, inner) if watch else None,
        processors=processors,
        max_batch_size=4,
        max_batch_tokens=chunk,
        prefix_cache=reuse,
    )
    if reuse:
        (warm,) = requests(model, [base], max_new_tokens=1, seed=1)
        warm.request_id = "warm"
        run(runner, [warm])
    made = requests(model, rows)
    run(runner, made)
    assert all_free(runner)
    return made


# --- exactly, where the logits do not depend on shapes --------------------------------------------

VOCAB_SIZE = 64
HASHED_CHOICES = ["A0", "A01", "B+", "9"]


@pytest.fixture(scope="module")
def hashed():
    """The bundled model's text, with the first 64 of its tokens; the last one ends a text."""
    for demo in demo_model():
        config = evolve(demo.loaded.config, vocab_size=VOCAB_SIZE, eos_token_ids=(63,))
        yield evolve(demo, loaded=evolve(demo.loaded, config=config))


def check_hashed(model, page_size, num_pages, turns, in_flight):
    """For every size of chunks and each of CASES. Returns the number of preemptions and of tokens
    that were found in the cache."""
    processors = processors_of(choice=ChoiceProcessor(model.text, model.loaded.config))
    preempted = hits = 0
    for turn in turns:
        base, rows = mixed_rows(VOCAB_SIZE, page_size, num_pages, HASHED_CHOICES, turn)
        wanted = [alone(model, ContextHash(VOCAB_SIZE, 16), row, processors) for row in rows]
        for case in CASES:
            for chunk in range(1, num_pages * page_size + 2):
                inner = ContextHash(VOCAB_SIZE, page_size)
                executor = InFlight(inner) if in_flight else inner
                made = run_together(model, executor, base, rows, chunk, case, processors, True)
                assert not inner.wrong, inner.wrong
                for request, result in zip(made, wanted, strict=True):
                    assert result_of(request) == result, f"{case}, chunks of {chunk}, turn {turn}"
                preempted += sum(request.preemptions for request in made)
                hits += sum(request.cached_tokens for request in made)
    return preempted, hits


@pytest.mark.parametrize("in_flight", [False, True])
@pytest.mark.parametrize(("page_size", "num_pages"), [(1, 3), (4, 1), (4, 2), (3, 3)])
def test_results_are_those_of_the_requests_alone(hashed, page_size, num_pages, in_flight):
    preempted, hits = check_hashed(hashed, page_size, num_pages, range(2), in_flight)
    assert preempted
    assert hits


@pytest.mark.slow
@pytest.mark.parametrize("in_flight", [False, True])
@pytest.mark.parametrize("num_pages", [1, 2, 3, 4])
@pytest.mark.parametrize("page_size", [1, 2, 3, 4, 5, 8])
def test_results_are_those_of_the_requests_alone_in_many_batches(
    hashed, page_size, num_pages, in_flight
):
    check_hashed(hashed, page_size, num_pages, range(100, 112), in_flight)


# --- on the torch executor ------------------------------------------------------------------------

TORCH_CHOICES = ["t5 t6 t7", "t5 t9", "t30"]
MODELS = {
    "qwen3-odd-heads": 4,  # 3 heads of 32 numbers, hidden states of 40; not tied
    "qwen2-tied": 3,
    "qwen3-some-layers-slide": 5,
    "llama-biases": 2,  # tied, 6 heads, 2 of keys and values
}
"""Page sizes of random-weight models."""


@pytest.fixture
def served(request, tmp_path):
    """A model on the torch executor in float32. Its parameter: its name and page size."""
    name, page_size = request.param
    write_model(name, tmp_path)
    with LLMEngine.from_plugins() as engine:
        runtime = RuntimeConfig(weight_dtype="float32", page_size=page_size)
        engine.init_model("m", tmp_path, runtime)
        yield engine.model("m")


class Spoilt:
    """The torch executor with NaN in every slot that was not written."""

    def __init__(self, inner, num_layers):
        self.inner, self.num_layers = inner, num_layers

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def allocate_kv(self, num_pages):
        self.inner.allocate_kv(num_pages)
        for layer in range(self.num_layers):
            stored = self.inner.read_kv(layer, range(num_pages))
            spoilt = (torch.full_like(t, float("nan")) for t in (stored.key, stored.value))
            self.inner.write_kv(layer, range(num_pages), KvLayer(*spoilt))


def spoilt(model):
    return Spoilt(model.executor, model.loaded.config.num_layers)


def check_close(found, wanted, where):
    """Two results of one request, of which the second one ran alone."""
    of_prompts = (result["prompt_logprobs"] or () for result in (found, wanted))
    for ours, theirs in zip(*of_prompts, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or abs(ours.logprob - theirs.logprob) < TOLERANCE, where
    for at, theirs in enumerate(wanted["logprobs"]):
        ours = found["logprobs"][at]
        for (_, mine), (_, other) in zip(ours.top, theirs.top, strict=True):
            assert abs(mine - other) < TOLERANCE, f"{where}, token {at}"
        if ours.token_id != theirs.token_id:
            gap = theirs.top[0][1] - theirs.top[1][1]
            assert gap < NEAR_TIE, f"{where}, token {at}: {ours.token_id}, not {theirs.token_id}"
            return
        assert abs(ours.logprob - theirs.logprob) < TOLERANCE, f"{where}, token {at}"
    assert {**found, "logprobs": None, "prompt_logprobs": None} == {
        **wanted,
        "logprobs": None,
        "prompt_logprobs": None,
    }, where


def check_torch(model, num_pages, turns):
    """For every size of chunks and each of CASES. Returns the number of preemptions and of tokens
    that were found in the cache."""
    config, size = model.loaded.config, model.executor.kv_cache_spec.page_size
    processors = processors_of(choice=ChoiceProcessor(model.text, config))
    preempted = hits = 0
    for turn in turns:
        base, rows = mixed_rows(config.vocab_size, size, num_pages, TORCH_CHOICES, turn)
        wanted = [alone(model, spoilt(model), row, processors) for row in rows]
        for case in CASES:
            for chunk in range(1, num_pages * size + 2):
                made = run_together(model, spoilt(model), base, rows, chunk, case, processors)
                for request, result in zip(made, wanted, strict=True):
                    where = f"{case}, chunks of {chunk}, turn {turn}, {request.request_id}"
                    check_close(result_of(request), result, where)
                preempted += sum(request.preemptions for request in made)
                hits += sum(request.cached_tokens for request in made)
    return preempted, hits


@pytest.mark.parametrize("served", MODELS.items(), indirect=True, ids=MODELS)
def test_torch_gives_the_results_of_the_requests_alone_up_to_near_ties(served):
    preempted, hits = check_torch(served, num_pages=2, turns=[0])
    assert preempted
    assert hits


@pytest.mark.slow
@pytest.mark.parametrize("num_pages", [1, 2, 3])
@pytest.mark.parametrize(
    "served", [(name, size) for name in CONFIGS for size in (1, 4, 5)], indirect=True, ids=str
)
def test_torch_gives_the_results_of_the_requests_alone_up_to_near_ties_for_all_models(
    served, num_pages
):
    check_torch(served, num_pages, turns=range(3))


def strangers(vocab_size, lengths, settings, seed):
    """Requests of some lengths; their first tokens differ, so that they share no page."""
    random_of = random.Random(seed)
    firsts = random_of.sample(range(3, vocab_size), len(lengths))
    for first, length, own in zip(firsts, lengths, settings, strict=True):
        rest = random_of.choices(range(3, vocab_size), k=length - 1)
        yield [first, *rest], own | {"seed": random_of.randrange(2**31)}


@pytest.mark.parametrize("few_pages", [False, True])
@pytest.mark.parametrize("served", MODELS.items(), indirect=True, ids=MODELS)
def test_torch_gives_the_same_bits_whatever_the_tokens_of_the_neighbours_are(served, few_pages):
    """Each row in turn stays, while the others have other tokens and other seeds."""
    config, size = served.loaded.config, served.executor.kv_cache_spec.page_size
    settings = kinds(TORCH_CHOICES, ignore_eos=True)
    lengths = [2 * size + (i % 3) - 1 for i in range(len(settings))]
    processors = processors_of(choice=ChoiceProcessor(served.text, config))
    first = list(strangers(config.vocab_size, lengths, settings, seed=0))
    total_pages = most_pages(first, size) + 2 if few_pages else 200

    def results(rows, chunk):
        runner = make_runner(
            served,
            spoilt(served),
            total_pages=total_pages,
            processors=processors,
            max_batch_size=4,
            max_batch_tokens=chunk,
        )
        made = requests(served, rows)
        run(runner, made)
        return [result_of(r) for r in made], sum(r.preemptions for r in made)

    preempted = 0
    for chunk in (3, 2 * size, 64):
        before, preemptions = results(first, chunk)
        preempted += preemptions
        for stays in range(len(first)):
            taken = first[stays][0][0]
            seeds = (seed for seed in range(1 + stays, 1000, 7))
            others = next(
                rows
                for rows in (
                    list(strangers(config.vocab_size, lengths, settings, s)) for s in seeds
                )
                if taken not in [prompt[0] for prompt, _ in rows]
            )
            after, _ = results([*others[:stays], first[stays], *others[stays + 1 :]], chunk)
            assert after[stays] == before[stays], f"row {stays}, chunks of {chunk}"
            assert [r["token_ids"] for r in after] != [r["token_ids"] for r in before]
    assert bool(preempted) == few_pages
