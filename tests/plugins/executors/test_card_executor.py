"""The torch executor on a card: graphs, steps in flight, sampling and errors, on a stand-in."""

import random
import re

import pytest
import torch
from attrs import evolve
from card_on_cpu import Card, Plugin
from contract_executors import demo_model, make_runner, outcomes, requests, run

from tilewright import LLMEngine, RuntimeConfig
from tilewright.errors import (
    ExecutorError,
    ExecutorLostError,
    NonFiniteLogitsError,
    OutOfPagesError,
)
from tilewright.settings import DEMO_MODEL
from tilewright.types import SamplerRow, SamplingExecutor, SamplingParams
from tilewright_sampling.sampler import LogitsSampler, Options
from tilewright_testing.models import MemorySource, make_model
from tilewright_testing.paged import Sequences
from tilewright_torch import card, card_checks, card_sampling
from tilewright_torch import plugin as torch_plugin

TRUTHS = "We hold these truths to be self-evident,"
WHEN = "When in the Course of human events,"
PEOPLE = "We the People of the United States,"
PROMPTS = [
    TRUTHS,
    (WHEN, {"temperature": 1.0, "seed": 5, "top_p": 0.9}),
    (PEOPLE, {"temperature": 0.8, "seed": 6, "top_k": 20, "min_p": 0.02}),
    ("He", {"temperature": 1.5, "seed": 7}),
    (TRUTHS, {"logprobs": 2, "prompt_logprobs": 1}),
    (WHEN, {"repetition_penalty": 1.3}),
    (PEOPLE, {"min_new_tokens": 10}),
]


@pytest.fixture(scope="module")
def demo():
    yield from demo_model()


def executor_of(model, plugin=None, **runtime):
    """An executor on a stand-in of a card, and the card."""
    plugin = plugin or Plugin()
    settings = {"weight_dtype": "float32", "kv_dtype": "float32", "page_size": 8}
    made = plugin.create_executor(
        model_config=model.config,
        runtime_config=RuntimeConfig(**(settings | {"max_seq_len": 64} | runtime)),
        weights=model.weights,
        layers=range(model.config.num_layers),
    )
    return made, plugin.cards[-1]


@pytest.fixture(scope="module")
def small():
    """A random model, as a loader gives it."""
    model = make_model("qk-norm-tied-gqa-5")
    return Loaded(model.config, MemorySource(model.tensors))


class Loaded:
    def __init__(self, config, weights):
        self.config, self.weights = config, weights


def of_demo(demo, **runtime):
    with LLMEngine.from_plugins() as engine:
        loaded = engine.load(str(DEMO_MODEL))
        return executor_of(loaded, **runtime)


def greedy_row(name, position=0, **params):
    return SamplerRow(
        request_id=name,
        params=SamplingParams(**params),
        prompt_token_ids=(1,),
        output_token_ids=(),
        position=position,
    )


def decode(executor, lengths, steps, graphs=True):
    """The tokens of greedy steps with two in flight, from prompts of some lengths."""
    executor.use_graphs = graphs
    executor.allocate_kv(40)
    sequences = Sequences(total_pages=40, page_size=8)
    prompts = {f"r{i}": [(7 * i + j) % 50 for j in range(n)] for i, n in enumerate(lengths)}
    first = sequences.batch(prompts)
    first = evolve(first, logits_rows=first.query_starts[1:].long() - 1)
    pending = [executor.submit(first, [greedy_row(name) for name in prompts])]
    found = []
    for step in range(steps):
        batch = sequences.batch({name: [0] for name in prompts})
        batch.token_source.copy_(torch.arange(len(prompts)))
        pending.append(executor.submit(batch, [greedy_row(name, step + 1) for name in prompts]))
        found.append([token.token_id for token in pending.pop(0).wait().tokens])
    found.append([token.token_id for token in pending.pop(0).wait().tokens])
    return found


# --- graphs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3, 4, 9])
def test_replayed_steps_give_the_tokens_of_steps_that_are_not_captured(small, count):
    executor, card_used = executor_of(small)
    lengths = [3 + 5 * i % 11 for i in range(count)]
    plain = decode(executor, lengths, 12, graphs=False)
    assert not card_used.captured
    assert decode(executor, lengths, 12) == plain
    assert (card_used.captured, card_used.replayed) == (1, 12)


def test_a_graph_serves_other_sequences_pages_and_batches_up_to_its_size(small):
    executor, card_used = executor_of(small)
    cases = [[3, 4, 5, 6], [20, 1, 9], [2, 2, 2, 30]]
    plain = [decode(executor, lengths, 6, graphs=False) for lengths in cases]
    executor.allocate_kv(40)
    executor.allocate_kv = lambda pages: None  # which would drop the graphs
    assert [decode(executor, lengths, 6) for lengths in cases] == plain
    assert card_used.captured == 1
    assert len({tuple(map(tuple, tokens)) for tokens in plain}) == 3


def test_padding_writes_to_no_page_of_a_sequence(small):
    executor, _ = executor_of(small)
    executor.allocate_kv(6)
    sequences = Sequences(total_pages=6, page_size=8)
    executor.forward(sequences.batch({"a": [1, 2, 3], "b": [4], "c": [5]}))
    before = executor.read_kv(0, range(6)).key.clone()
    batch = sequences.batch({"a": [6], "b": [7], "c": [8]})
    executor.submit(batch, [greedy_row(name) for name in "abc"]).wait()
    after = executor.read_kv(0, range(6)).key
    changed = (before != after).flatten(2).any(2).flatten().nonzero().flatten().tolist()
    assert changed == sorted(batch.slot_mapping.tolist())


def test_batch_sizes_that_are_captured():
    assert card.batch_sizes(1) == [1]
    assert card.batch_sizes(3) == [1, 2, 4]
    assert card.batch_sizes(20) == [1, 2, 4, 8, 16, 24]


def test_a_token_of_a_prompt_in_chunks_of_one_has_no_logits(small):
    """A decode step in which one sequence's logits are not wanted is replayed all the same."""
    executor, card_used = executor_of(small)
    executor.allocate_kv(6)
    sequences = Sequences(total_pages=6, page_size=8)
    executor.forward(sequences.batch({"a": [1, 2], "b": [3]}))
    batch = sequences.batch({"a": [4], "b": [5]})
    expected = executor.forward(batch)[1:]
    one = evolve(batch, logits_rows=torch.tensor([1]))
    found = executor.submit(one, [None]).wait()
    assert card_used.captured == 1
    assert found.tokens == [None]
    torch.testing.assert_close(found.logits, expected)


def test_a_context_beyond_max_seq_len_grows_the_rotary_table(small):
    executor, _ = executor_of(small, max_seq_len=16)
    short = decode(executor, [3], 4)
    longer = decode(executor, [40], 4)
    executor, _ = executor_of(small, max_seq_len=64)
    assert [short, longer] == [decode(executor, [3], 4), decode(executor, [40], 4)]


# --- through the runner ---------------------------------------------------------------------------


def test_the_runner_gets_the_texts_of_the_cpu(demo):
    executor, card_used = of_demo(demo)
    assert isinstance(executor, SamplingExecutor)
    assert outcomes(demo, executor, PROMPTS) == outcomes(demo, demo.executor, PROMPTS)
    assert card_used.replayed > card_used.captured > 0


def test_chunks_preemption_and_small_batches_give_the_texts_of_the_cpu(demo):
    executor, _ = of_demo(demo)
    made = requests(demo, PROMPTS)
    run(make_runner(demo, executor, max_batch_tokens=5, max_batch_size=3, total_pages=14), made)
    expected = outcomes(demo, demo.executor, PROMPTS)
    assert [request.result.token_ids for request in made] == [found[1] for found in expected]


def test_submit_does_not_wait_for_the_card(small):
    executor, card_used = executor_of(small)
    executor.allocate_kv(6)
    batch = Sequences(total_pages=6, page_size=8).batch({"a": [1, 2, 3]})
    rows = [greedy_row("a", temperature=1.0, top_p=0.5)] * 3
    pending = executor.submit(batch, rows)
    assert card_used.waited == 0
    assert pending.wait() is pending.wait()
    assert card_used.waited == 1


@pytest.mark.parametrize(
    ("options", "greedy", "temperature", "expected"),
    [
        ({}, False, 1.0, True),
        ({}, True, 0.0, True),
        ({}, True, 1.0, False),
        ({"on_nonfinite": "sanitize"}, False, 0.0, False),
    ],
)
def test_a_sampler_is_replaced_only_by_what_chooses_the_same_tokens(
    options, greedy, temperature, expected
):
    sampler = LogitsSampler(Options(**options), greedy=greedy)
    assert sampler.replaceable(SamplingParams(temperature=temperature)) is expected


def test_a_sampler_that_says_nothing_is_called_for_each_token(demo):
    class Other:
        def sample(self, logits, rows):
            return LogitsSampler(Options(), greedy=True).sample(logits, rows)

    executor, _ = of_demo(demo)
    runner = make_runner(demo, executor)
    runner._sampler = Other()
    made = requests(demo, [(WHEN, {"temperature": 1.0, "seed": 5})])
    run(runner, made)
    assert made[0].result.token_ids == outcomes(demo, demo.executor, [WHEN])[0][1]


# --- sampling -------------------------------------------------------------------------------------


def random_params(rng):
    return SamplingParams(
        temperature=rng.choice([0.0, 0.3, 1.0, 1.0, 4.0, 1e-40, 1e35]),
        top_k=rng.choice([0, 0, 1, 5, 60, 1000]),
        top_p=rng.choice([1.0, 1.0, 0.9, 0.5, 0.01]),
        min_p=rng.choice([0.0, 0.0, 0.05, 1.0]),
        seed=rng.randrange(2**64),
    )


@pytest.mark.parametrize("seed", range(20))
def test_tokens_are_those_of_the_sampler_from_equal_logits(seed, monkeypatch):
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    count, vocab_size = rng.randint(1, 12), rng.choice([3, 64, 67, 500])
    monkeypatch.setattr(card_sampling, "CHUNK", rng.choice([2, 8]))
    logits = 3 * torch.randn(count, vocab_size, generator=generator)
    if seed % 2:
        logits = logits.round()  # many ties, and -0.0
    rows = [
        evolve(greedy_row(f"r{i}", rng.randrange(1000)), params=random_params(rng))
        for i in range(count)
    ]
    found = card_sampling.choose(logits, rows, lambda tensor: tensor).tolist()
    expected = LogitsSampler(Options(), greedy=False).sample(logits, rows)
    assert found == [token.token_id for token in expected]


@pytest.mark.parametrize(
    "params",
    [
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.1},
        {"frequency_penalty": -0.1},
        {"logit_bias": {1: 1.0}},
        {"logprobs": 0},
    ],
)
def test_rows_with_penalties_or_logprobs_are_left_to_the_engine(params):
    assert not card_sampling.serves(SamplingParams(**params))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_give_tokens_of_the_vocabulary(bad, monkeypatch):
    """Any other would be an error of the device, after which it does no more work."""
    monkeypatch.setattr(card_sampling, "CHUNK", 4)
    rows = [greedy_row("a", temperature=1.0, top_k=k, top_p=p) for k in (0, 3) for p in (0.5, 1.0)]
    for places in (slice(None), slice(60, None), slice(5, 6)):
        logits = torch.zeros(len(rows), 67)
        logits[:, places] = bad
        found = card_sampling.choose(logits, rows, lambda tensor: tensor)
        assert bool(((found >= 0) & (found < 67)).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("params", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 3}])
def test_logits_that_are_not_finite_raise_the_error_of_the_sampler(small, bad, params):
    executor, _ = executor_of(small)
    executor.allocate_kv(6)
    logits = torch.zeros(2, 300)
    logits[1, [7, 200]] = bad
    executor._logits = lambda batch: logits
    batch = Sequences(total_pages=6, page_size=8).batch({"a": [1], "b": [2]})
    rows = [greedy_row("a"), greedy_row("b", 4, **params)]
    pending = executor.submit(batch, rows)
    logits = torch.zeros(2, 300)  # as the next step would do
    for _ in range(2):
        with pytest.raises(NonFiniteLogitsError) as caught:
            pending.wait()
    found = caught.value
    assert (found.request_id, found.step, found.token_ids) == ("b", 4, (7, 200))


def test_logits_whose_sum_overflows_are_not_refused(small):
    executor, _ = executor_of(small)
    executor.allocate_kv(6)
    executor._logits = lambda batch: torch.full((1, 300), 3e38)
    batch = Sequences(total_pages=6, page_size=8).batch({"a": [1]})
    assert executor.submit(batch, [greedy_row("a")]).wait().tokens[0].token_id == 0


# --- errors ---------------------------------------------------------------------------------------


def created(small, device, options=None, **runtime):
    settings = {"weight_dtype": "float32", "kv_dtype": "float32", "device": device, **runtime}
    return torch_plugin.create_executor(
        small.config,
        RuntimeConfig(**settings),
        small.weights,
        range(small.config.num_layers),
        options,
    )


@pytest.fixture
def cards(monkeypatch):
    """Makes torch say that it was built with CUDA, and how many cards there are."""

    def set_count(count, capability=(9, 0)):
        monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
        monkeypatch.setattr(torch.cuda, "init", lambda: None)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some Card")

    return set_count


def test_a_torch_without_cuda_is_named(small, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    with pytest.raises(ExecutorError, match=r"found torch \S+, which was built without: install"):
        created(small, "cuda")


@pytest.mark.parametrize(
    ("device", "count", "message"),
    [
        ("cuda", 0, "found no card that torch can use"),
        ("cuda:1", 1, "found one card, cuda:0"),
        ("cuda:7", 4, "found 4 cards, cuda:0 to cuda:3"),
    ],
)
def test_a_card_that_is_not_there_is_refused(small, cards, device, count, message):
    cards(count)
    with pytest.raises(ExecutorError, match=message):
        created(small, device)


def test_a_driver_that_fails_is_named(small, cards, monkeypatch):
    def failing():
        raise RuntimeError("The NVIDIA driver on your system is too old\nmore lines")

    cards(1)
    monkeypatch.setattr(torch.cuda, "init", failing)
    with pytest.raises(ExecutorError, match=r"cannot be used \(The NVIDIA driver .* too old\): ch"):
        created(small, "cuda")


def test_a_card_that_is_too_old_is_refused(small, cards):
    cards(1, (7, 5))
    with pytest.raises(ExecutorError, match=r"capability 8\.0 or later, found 7\.5 .*Some Card"):
        created(small, "cuda")


@pytest.mark.parametrize("device", ["cuda:", "cuda:x", "cuda:-1", "CUDA", "gpu"])
def test_another_name_of_a_device_is_refused(small, device):
    with pytest.raises(ExecutorError, match="runs on device cpu, cuda or cuda:N"):
        created(small, device)


def test_settings_that_are_for_the_cpu_are_refused(small):
    with pytest.raises(ExecutorError, match="weight_dtype = 'int8' runs on device cpu only"):
        created(small, "cuda", weight_dtype="int8")
    with pytest.raises(ExecutorError, match="option stream_weights is for device cpu"):
        created(small, "cuda", torch_plugin.Options(stream_weights=True))


def out_of_memory(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore lines")


def test_memory_that_is_too_small_is_an_error_that_says_what_to_lower(small, monkeypatch):
    executor, _ = executor_of(small)
    executor.allocate_kv(6)
    batch = Sequences(total_pages=6, page_size=8).batch({"a": [1]})
    monkeypatch.setattr(Card.kernels, "silu_mul", out_of_memory)
    for call in (executor.forward, lambda batch: executor.submit(batch, [None])):
        with pytest.raises(ExecutorError, match="memory left for a step: lower total_pages"):
            call(batch)
    executor._zeros = out_of_memory
    with pytest.raises(OutOfPagesError, match=r"a KV cache of 9 pages takes .* GiB"):
        executor.allocate_kv(9)
    monkeypatch.setattr(card, "load_on_card", out_of_memory)
    with pytest.raises(ExecutorError, match=r"too little memory for weights of .* GiB in float32"):
        executor_of(small)


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        (ExecutorLostError, "CUDA error: an illegal memory access", "failed in a step (CUDA error"),
        (ExecutorLostError, "Triton Error [CUDA]: launch failure", "failed in a step (Triton Err"),
        (ExecutorError, "CUDA error: out of memory", "has no memory left for a step: lower"),
        (ExecutorError, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED", "has no memory left for a step"),
    ],
)
def test_what_a_device_reports_is_an_error_to_act_on(small, monkeypatch, kind, error, message):
    def failing(*args):
        raise RuntimeError(f"{error}\nmore lines")

    executor, _ = executor_of(small)
    executor.allocate_kv(6)
    batch = Sequences(total_pages=6, page_size=8).batch({"a": [1]})
    monkeypatch.setattr(Card, "synchronize", failing)
    pending = executor.submit(batch, [None])
    with pytest.raises(ExecutorError, match=re.escape(f"cuda:0 {message}")) as caught:
        pending.wait()
    assert type(caught.value) is kind


def test_closing_a_lost_device_does_not_fail_again(small, monkeypatch):
    def failing(*args):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    executor, _ = executor_of(small)
    monkeypatch.setattr(Card, "release", failing)
    executor.close()
    with pytest.raises(ExecutorError, match="is closed"):
        executor.weight("model.norm.weight")


def test_a_mistake_of_the_executor_is_not_taken_for_a_lost_device(small):
    executor, _ = executor_of(small)
    with pytest.raises(RuntimeError, match="the size"), executor.errors():
        raise RuntimeError("the size of a tensor does not match")


def test_cpu_settings_of_products_are_restored(small):
    executor, _ = executor_of(small)
    executor.allocate_kv(6)
    torch.set_float32_matmul_precision("high")
    seen = []
    try:
        batch = Sequences(total_pages=6, page_size=8).batch({"a": [1]})
        executor.forward(batch, lambda *_: seen.append(torch.get_float32_matmul_precision()))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(seen) == {"highest"}


def test_settings_of_products_stay_while_another_model_is_in_a_step():
    torch.set_float32_matmul_precision("high")
    try:
        card._precise.__enter__()
        card._precise.__enter__()
        card._precise.__exit__()
        assert torch.get_float32_matmul_precision() == "highest"
        card._precise.__exit__()
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_doctor_says_what_is_missing(cards, monkeypatch):
    (check,) = card_checks.checks() if not torch.backends.cuda.is_built() else (None,)
    assert check is None or "built without CUDA" in check.found
    cards(0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (check,) = card_checks.checks()
    assert check.advice.startswith("for device = 'cuda', check `nvidia-smi`")
    cards(2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(card_checks, "find_spec", lambda name: None)
    monkeypatch.setattr(card_checks, "which", lambda name: None)
    monkeypatch.setattr(card_checks, "get_path", lambda name: "nowhere")

    class Properties:
        name, major, minor = "Some Card", 7, 0

    def memory(index):
        if index:
            raise RuntimeError("CUDA error: out of memory\nmore")
        return 2**33, 2**34

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", memory)
    triton, old, broken = card_checks.checks()
    for missing in ("Triton (`pip install triton`)", "a C compiler", "the header Python.h"):
        assert missing in triton.found
    assert old.status == "warning"
    assert "8.0 of 16.0 GiB free" in old.found
    assert (broken.status, broken.found) == ("failed", "CUDA error: out of memory")
