"""The pypto-npu executor on platform emulated, against the torch executor step by step."""

import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from asked import Asked
from attrs import define, evolve, field
from model_directories import change_weights, load_checked
from qwen3_layers import relative_rms, rope_tables
from reference_models import prompts, write_model
from torch import Tensor
from transformers import LlamaConfig, Qwen3Config

from tilewright import GenerateConfig, LLMEngine, RuntimeConfig
from tilewright.errors import ConfigError, ExecutorError, ModelError, TilewrightError
from tilewright.kv_cache import KvCacheManager
from tilewright.request import Request
from tilewright.scheduler import Scheduler, Step
from tilewright.settings import DEMO_MODEL
from tilewright.types import (
    Executor,
    KvLayer,
    LayerwiseExecutor,
    LoadedModel,
    RopeConfig,
    SamplingParams,
    StepBatch,
)
from tilewright.weights import expected_tensors
from tilewright_kernels.qwen3_14b.plugin import SOURCES, kernels_of
from tilewright_kernels.qwen3_14b.shape import QWEN3_14B, layer_shape
from tilewright_pypto import executor as pypto_executor
from tilewright_pypto import plugin as pypto
from tilewright_pypto.emulated.device import EmulatedDevice
from tilewright_testing.paged import Sequences
from tilewright_torch import plugin as reference

EMULATED = pypto.Options(platform="emulated")
DEMO_CONTINUATION = (
    " it becomes necessary for one people to dissolve the political bands which have"
)


def qwen3(**changes: Any) -> Qwen3Config:
    sizes = {
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 199,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }
    return Qwen3Config(**sizes | changes)


def written(directory: Path, config: Any = None, dtype: str = "bfloat16") -> LoadedModel:
    """A random model whose embeddings are as large as the outputs that a few layers add."""
    write_model(config or qwen3(), directory, dtype)
    embedding = load_checked(directory).weights.get("model.embed_tokens.weight").clone()
    name = "model.embed_tokens.weight"
    change_weights(directory, name, **{name.replace(".", "__"): 4 * embedding})
    return load_checked(directory)


def asked(loaded: LoadedModel, options: Any = EMULATED, **runtime: Any) -> Asked:
    settings = {"weight_dtype": "bfloat16", "kv_dtype": "bfloat16", "max_seq_len": 256}
    return Asked(
        model_config=loaded.config,
        runtime_config=RuntimeConfig(**settings | runtime),
        weights=loaded.weights,
        options=options,
    )


# --- whole models, step by step -------------------------------------------------------------------


@define
class Running:
    """An executor with its own KV cache, and the tensors and logits of its last step."""

    executor: LayerwiseExecutor
    pages: int
    seen: dict[str, Tensor] = field(factory=dict)
    logits: Tensor = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.executor.allocate_kv(self.pages)

    def run(self, batch: StepBatch) -> None:
        self.seen = {}
        self.logits = self.executor.forward(
            batch, lambda name, tensor: self.seen.setdefault(name, tensor.clone())
        )

    def cached(self, layer: int) -> KvLayer:
        return self.executor.read_kv(layer, range(self.pages))

    def slots(self, layer: int) -> Iterator[Tensor]:
        """Keys, then values, as [slots, KV heads, head_dim] for either row order."""
        order = self.executor.kv_cache_spec.row_order
        cache = self.cached(layer)
        for storage in (cache.key, cache.value):
            pages = storage.transpose(1, 2) if order == "HND" else storage
            yield pages.flatten(0, 1)


def compare(
    loaded: LoadedModel, ids: Sequence[Sequence[int]], new_tokens: int, pages: int, **runtime: Any
) -> tuple[int, int]:
    """Generate greedily, with every step run by three executors.

    Checks each layer's output, each slot of the KV cache and the logits: the error against the
    torch executor in float32 is at most 1.5 times that of the torch executor in bfloat16, which
    grows with depth as rounding does. The first layer, where all have the same input, also stays
    within 1e-2. Returns the number of tokens that were checked, and of all tokens.
    """
    ours = Running(asked(loaded, **runtime).of(pypto), pages)
    near = Running(asked(loaded, None, **runtime).of(reference), pages)
    wide = {"weight_dtype": "float32", "kv_dtype": "float32"}
    true = Running(asked(loaded, None, **runtime | wide).of(reference), pages)
    limits = ours.executor.limits
    allocator = KvCacheManager(pages, ours.executor.kv_cache_spec.page_size)
    scheduler = Scheduler(allocator, limits.max_batch_size, limits.max_batch_tokens, limits)
    for i, prompt in enumerate(ids):
        scheduler.add(Request(str(i), tuple(prompt), SamplingParams(), new_tokens))
    filled = torch.zeros(pages * ours.executor.kv_cache_spec.page_size, dtype=torch.bool)
    checked = total = 0

    def next_step() -> Step | None:
        scheduler.admit()
        return scheduler.schedule()

    while step := next_step():
        for running in (ours, near, true):
            running.run(step.batch)
        filled[step.batch.slot_mapping.long()] = True
        first = [r.seen["layers.0.output"] for r in (ours, near)]
        assert relative_rms(*first) <= 1e-2
        for layer in range(loaded.config.num_layers):
            check_near(*(r.seen[f"layers.{layer}.output"] for r in (ours, near, true)))
            for mine, close, truth in zip(
                *(r.slots(layer) for r in (ours, near, true)), strict=True
            ):
                check_near(mine[filled], close[filled], truth[filled])
                assert not mine[~filled].any(), "a slot of no token was written"
        checked += check_logits(ours.logits, near.logits, true.logits)
        total += len(ours.logits)
        for request, row in zip(step.sampled, ours.logits, strict=True):
            request.output_token_ids.append(int(row.argmax()))
        scheduler.done(step)
        for request in step.sampled:
            if len(request.output_token_ids) == new_tokens:
                scheduler.remove(request)
    allocator.check_integrity()
    return checked, total


def check_near(ours: Tensor, near: Tensor, true: Tensor) -> None:
    assert relative_rms(ours, true) <= 1.5 * relative_rms(near, true)


def check_logits(ours: Tensor, near: Tensor, true: Tensor) -> int:
    """The number of rows whose margin is wide enough to require the same token; each has it."""
    if not len(ours):
        return 0
    check_near(ours, near, true)
    error = (near - true).abs().amax(-1)
    top = true.topk(2, -1).values
    clear = top[:, 0] - top[:, 1] > 3 * error
    assert torch.equal(ours.argmax(-1)[clear], true.argmax(-1)[clear])
    return int(clear.sum())


MODELS: dict[str, tuple[dict[str, Any], dict[str, Any], list[int]]] = {
    # changes to the model, changes to the runtime, and prompt lengths
    "one": ({}, {"page_size": 64}, [45]),
    "gqa-5": (
        {"num_attention_heads": 10, "head_dim": 64, "hidden_size": 128},
        {"page_size": 16, "max_batch_tokens": 48},
        [1, 31, 50],
    ),
    "mha-tied": (
        {"num_attention_heads": 2, "tie_word_embeddings": True, "rms_norm_eps": 1e-5},
        {"page_size": 32},
        [16, 15, 17, 32, 33, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11],
    ),
    "mqa-8": (
        {"num_attention_heads": 8, "num_key_value_heads": 1},
        {"page_size": 48, "max_batch_size": 17, "max_batch_tokens": 40},
        [47, 48, 49, 3, 1, 20, 2, 2, 2, 9, 5, 6, 7, 8, 11, 13, 31],
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_random_model_agrees_with_the_torch_executor(name, tmp_path):
    changes, runtime, lengths = MODELS[name]
    loaded = written(tmp_path, qwen3(**changes))
    ids = list(prompts(qwen3(**changes), lengths))
    checked, total = compare(loaded, ids, 21, 60, **runtime)
    assert total == 21 * len(lengths)
    assert checked > total / 2


def test_the_bundled_model_agrees_with_the_torch_executor():
    loaded = load_checked(DEMO_MODEL)
    with LLMEngine.from_plugins() as engine:
        engine.init_model("demo", DEMO_MODEL)
        texts = ["When in the Course of human events,", "Congress shall make no law", "We"]
        ids = [engine.model("demo").text.encode(text) for text in texts]
    checked, total = compare(loaded, ids, 20, 6, page_size=64, max_batch_tokens=16)
    assert total == 60
    assert checked > 40


# --- through the engine ---------------------------------------------------------------------------


@pytest.fixture
def emulated() -> Iterator[LLMEngine]:
    options = {"executor": {"platform": "emulated"}}
    with LLMEngine.from_plugins(executor="pypto-npu", options=options) as engine:
        yield engine


def test_the_bundled_model_gives_its_known_text_and_reports_the_emulated_device(emulated):
    emulated.init_model("demo", DEMO_MODEL, RuntimeConfig(max_seq_len=256))
    assert emulated.model("demo").runtime.device == "emulated"
    result = emulated.generate_result(
        "demo", "When in the Course of human events,", GenerateConfig(max_new_tokens=32)
    )
    assert result.text.startswith(DEMO_CONTINUATION)
    assert (len(result.token_ids), result.device) == (32, "emulated")


def test_drafts_are_checked_in_steps_of_decoding(emulated):
    prompt = (
        "Congress shall make no law respecting an establishment of religion. Congress shall make"
    )
    config = GenerateConfig(max_new_tokens=12)
    for model_id, speculation in (("plain", None), ("drafts", "ngram")):
        emulated.init_model(model_id, DEMO_MODEL, RuntimeConfig(speculation=speculation))
    plain = emulated.generate_result("plain", prompt, config)
    found = emulated.generate_result("drafts", prompt, config)
    assert found.token_ids == plain.token_ids
    assert found.accepted_tokens
    assert emulated.stats("drafts").num_steps == 12 - found.accepted_tokens


def test_a_closed_engine_can_be_recreated_from_its_selection(emulated):
    runtime = RuntimeConfig(max_seq_len=64)
    emulated.init_model("demo", DEMO_MODEL, runtime)
    executor = emulated.model("demo").executor
    emulated.close()
    with pytest.raises(ExecutorError, match="is closed: load the model again"):
        executor.forward(batch_of([1], 1))
    executor.close()
    with LLMEngine.from_plugins(**emulated.selection) as again:
        again.init_model("demo", DEMO_MODEL, runtime)
        assert again.generate("demo", "We hold", GenerateConfig(max_new_tokens=2))


def test_a_failing_kernel_is_named_with_step_and_layer_and_the_engine_stays_usable(
    emulated, monkeypatch
):
    emulated.init_model("demo", DEMO_MODEL, RuntimeConfig(max_seq_len=64))
    kernels = emulated.model("demo").executor._model.kernels
    working = kernels["decode_layer"]
    calls = iter(range(100))

    def failing(**tensors: Any) -> None:
        if next(calls) == 4:
            raise ExecutorError("kernel decode_layer on a2a3 card 3: out of tasks")
        working(**tensors)

    monkeypatch.setitem(kernels, "decode_layer", failing)
    config = GenerateConfig(max_new_tokens=4)
    with pytest.raises(ExecutorError, match=r"^step 2, layer 1: kernel decode_layer on"):
        emulated.generate("demo", "We hold", config)
    assert emulated.generate("demo", "We hold", config)
    allocator = emulated.model("demo").allocator
    allocator.check_integrity()
    assert allocator.free_pages + allocator.evictable_pages == allocator.total_pages


def test_a_tap_receives_the_embedding_the_layer_outputs_and_the_logits(tmp_path):
    loaded = written(tmp_path)
    config = loaded.config
    running = Running(asked(loaded, page_size=16).of(pypto), 8)
    first, second = prompts(qwen3(), [20, 3])
    whole = Sequences(16, 8).batch({"a": first, "b": second})
    running.run(evolve(whole, logits_rows=torch.tensor([19, 22])))
    hidden = (23, config.hidden_size)
    expected: dict[str, tuple[Any, ...]] = {"embed": (hidden, torch.bfloat16)}
    for i in range(config.num_layers):
        expected[f"layers.{i}.output"] = (hidden, torch.bfloat16)
    expected["logits"] = ((2, config.vocab_size), torch.float32)
    found = {name: (tuple(t.shape), t.dtype) for name, t in running.seen.items()}
    assert found == expected
    assert list(found) == list(expected)


@pytest.mark.parametrize("make", [pypto, reference], ids=["pypto", "torch"])
def test_embedding_layers_and_head_run_one_by_one_equal_a_whole_step(make, tmp_path):
    loaded = written(tmp_path)
    options = EMULATED if make is pypto else None
    whole, parts = (Running(asked(loaded, options, page_size=16).of(make), 8) for _ in range(2))
    first, second = prompts(qwen3(), [20, 3])
    batch = Sequences(16, 8).batch({"a": first, "b": second})
    whole.run(batch)
    executor = parts.executor
    step = executor.begin(batch)
    hidden = executor.embed(step)
    for layer in range(loaded.config.num_layers):
        hidden = executor.run_layer(step, layer, hidden)
        assert torch.equal(parts.cached(layer).key, whole.cached(layer).key)
    assert torch.equal(executor.run_head(step, hidden[batch.logits_rows]), whole.logits)


@pytest.mark.parametrize("make", [pypto, reference], ids=["pypto", "torch"])
def test_the_cache_of_a_layer_can_be_replaced(make, tmp_path):
    loaded = written(tmp_path)
    options = EMULATED if make is pypto else None
    running = Running(asked(loaded, options, page_size=16).of(make), 3)
    shape = tuple(running.cached(1).key.shape)[1:]
    new = KvLayer(torch.ones(2, *shape).bfloat16(), torch.full((2, *shape), 2.0).bfloat16())
    running.executor.write_kv(1, [2, 0], new)
    found = running.executor.read_kv(1, [0, 2])
    assert torch.equal(found.key, new.key)
    assert torch.equal(found.value, new.value)
    assert not running.cached(1).key[1].any()
    assert not running.cached(0).key.any()


# --- weights and tables ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rope",
    [
        RopeConfig(theta=1e6),
        RopeConfig(theta=1e4, kind="linear", factor=4.0),
        RopeConfig(theta=1e6, kind="yarn", factor=4.0, original_max_position=128),
    ],
    ids=lambda rope: rope.kind,
)
def test_the_rope_table_equals_that_of_the_torch_executor(rope, tmp_path):
    config = evolve(written(tmp_path).config, rope=rope)
    cos, sin = rope_tables(config, 300)
    tables = pypto_executor.rope_tables(config, 300)
    torch.testing.assert_close(tables["rope_cos"], cos, rtol=0, atol=0)
    torch.testing.assert_close(tables["rope_sin"], sin, rtol=0, atol=0)


class Elsewhere(EmulatedDevice):
    """A device with memory of its own: it copies kept tensors and counts originals still alive."""

    def __init__(self) -> None:
        self.waiting: set[int] = set()
        self.most = self.kept = 0

    def keep(self, tensor: Tensor) -> Tensor:
        self.kept += 1
        if id(tensor) not in self.waiting:
            self.waiting.add(id(tensor))
            weakref.finalize(tensor, self.waiting.discard, id(tensor))
        self.most = max(self.most, len(self.waiting))
        return tensor.clone()


def upload(asked: Asked, device: Elsewhere, weights_on_device: bool) -> Executor:
    config, runtime = asked.model_config, asked.runtime_config
    kernels = kernels_of(layer_shape(config, runtime))
    layers, positions = range(config.num_layers), runtime.max_seq_len
    return pypto_executor.load(
        config, layers, asked.weights, False, positions, kernels, device, weights_on_device
    )


def test_at_most_one_packed_layer_is_in_host_memory_at_a_time(tmp_path):
    loaded = written(tmp_path, qwen3(num_hidden_layers=8))
    device = Elsewhere()
    upload(asked(loaded), device, weights_on_device=True)
    assert 1 <= device.most <= 11


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("make", [pypto, reference], ids=["pypto", "torch"])
def test_every_weight_is_returned_as_in_the_checkpoint(make, tmp_path, tied):
    loaded = written(tmp_path, qwen3(tie_word_embeddings=tied))
    executor = asked(loaded, EMULATED if make is pypto else None).of(make)
    for name, shape in expected_tensors(loaded.config).items():
        weight = executor.weight(name)
        assert tuple(weight.shape) == shape
        assert torch.equal(weight.bfloat16(), loaded.weights.get(name)), name
    with pytest.raises(KeyError):
        executor.weight("model.layers.0.self_attn.r_proj.weight")


def test_weights_that_stay_on_the_host_are_not_kept_on_the_device(tmp_path):
    device = Elsewhere()
    kept = upload(asked(written(tmp_path)), device, weights_on_device=False)
    assert device.kept == 2  # the RoPE tables
    kept.close()


# --- unsupported models ---------------------------------------------------------------------------


def refused(request: Asked, kind: type[TilewrightError] = ExecutorError) -> str:
    """The error, checked to be one line. Only a ModelError may have read weights."""
    if kind is not ModelError:
        request = evolve(request, weights=Unread())
    with pytest.raises(kind) as error:
        request.of(pypto)
    message = str(error.value)
    assert "\n" not in message
    return message


class Unread:
    def get(self, name: str) -> Tensor:
        raise AssertionError(f"{name} was read")


BAD: dict[str, tuple[Any, Mapping[str, Any], str]] = {
    "hidden": (qwen3(hidden_size=100), {}, "hidden 100 must be a multiple of vec_tile 16"),
    "intermediate": (qwen3(intermediate_size=90), {}, "intermediate 90 must be a multiple of"),
    "head": (qwen3(head_dim=48), {}, "head_dim 48 must be a multiple of 32"),
    "page": (qwen3(), {"page_size": 24}, "page_size 24 must be a multiple of kv_tile 16"),
    "page-advice": (qwen3(), {"page_size": 8}, "set another page_size, or none: the set then ch"),
    "tokens": (
        qwen3(),
        {"max_batch_tokens": 10**20},
        "bytes of scratch, .* lower max_batch_tokens",
    ),
    "batch": (qwen3(), {"max_batch_size": 10**6}, "bytes of scratch, .* lower max_batch_tokens"),
    "kv-dtype": (qwen3(), {"kv_dtype": "float32"}, "found kv_dtype = float32: set kv_dtype = 'bf"),
    "dtype": (qwen3(), {"weight_dtype": "float16"}, "found weight_dtype = float16: set weight_dt"),
    "bias": (
        qwen3(attention_bias=True),
        {},
        "without qkv_bias, found qkv_bias = True in",
    ),
    "llama": (
        LlamaConfig(hidden_size=96, num_attention_heads=4, num_hidden_layers=1, vocab_size=99),
        {},
        "serves models with a norm for each query and key head, found .* without such norms",
    ),
    "dynamic": (
        qwen3(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e6, "factor": 2.0}),
        {},
        "llama3, yarn, found dynamic RoPE in .*: choose executor torch",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_unsupported_models_are_refused_before_a_weight_is_read(name, tmp_path):
    config, runtime, message = BAD[name]
    import re

    assert re.search(message, refused(asked(written(tmp_path, config), **runtime)))


def test_a_non_finite_weight_is_named_in_the_error(tmp_path):
    loaded = written(tmp_path)
    name = "model.layers.2.mlp.up_proj.weight"
    bad = loaded.weights.get(name).clone()
    bad[3, 5], bad[0, 1] = math.nan, math.inf
    loaded.weights.close()
    change_weights(tmp_path, name, **{name.replace(".", "__"): bad})
    message = refused(asked(load_checked(tmp_path)), ModelError)
    assert f"{name} in {tmp_path / 'model.safetensors'}: 2 of {bad.numel()} values are" in message


def test_a_float32_checkpoint_is_refused_unless_weight_dtype_is_bfloat16(emulated, tmp_path):
    written(tmp_path, dtype="float32")
    with pytest.raises(
        ConfigError, match=r"'float32', that of the checkpoint, .* set weight_dtype to 'bfloat16'"
    ):
        emulated.init_model("m", tmp_path)
    emulated.init_model("m", tmp_path, RuntimeConfig(weight_dtype="bfloat16", max_seq_len=64))
    assert emulated.generate("m", [5, 6, 7], GenerateConfig(max_new_tokens=2))


def test_a_step_above_the_compiled_limits_is_an_error(tmp_path):
    limits = {"max_seq_len": 32, "max_batch_size": 2, "max_batch_tokens": 20}
    executor = asked(written(tmp_path), page_size=16, **limits).of(pypto)
    executor.allocate_kv(8)
    for lengths, context, message in (
        ([21], 21, "at most 20 tokens, found 21"),
        ([1, 1, 1], 1, "at most 2 sequences, found 3"),
        ([1], 33, "at most 32 tokens of a sequence, found 33"),
    ):
        with pytest.raises(ExecutorError, match=message):
            executor.forward(batch_of(lengths, context))


def batch_of(lengths: Sequence[int], context: int) -> StepBatch:
    rows = sum(lengths)
    return StepBatch(
        token_ids=torch.zeros(rows, dtype=torch.int64),
        positions=torch.zeros(rows, dtype=torch.int32),
        slot_mapping=torch.arange(rows, dtype=torch.int32),
        block_table=torch.zeros(len(lengths), 3, dtype=torch.int32),
        context_lens=torch.full((len(lengths),), context, dtype=torch.int32),
        query_starts=torch.tensor([0, *lengths]).cumsum(0).int(),
        logits_rows=torch.tensor([0]),
    )


@pytest.mark.parametrize("kernel", ["prefill_layer", "decode_layer"])
def test_a_kernel_with_another_cache_row_order_is_refused(monkeypatch, tmp_path, kernel):
    request = asked(written(tmp_path))
    other = tmp_path / "other.py"
    text = SOURCES[kernel].read_text()
    other.write_text(text.replace('KV_ROW_ORDER = "HND"', 'KV_ROW_ORDER = "NHD"'))
    monkeypatch.setitem(SOURCES, kernel, other)
    assert f"kernel {kernel} declares KV_ROW_ORDER = 'NHD'" in refused(request)


def test_qwen3_14b_gets_the_layer_shape_that_the_kernel_tests_use():
    config = evolve(
        load_checked(DEMO_MODEL).config,
        hidden_size=5120,
        intermediate_size=17408,
        num_heads=40,
        num_kv_heads=8,
    )
    runtime = RuntimeConfig(weight_dtype="bfloat16", kv_dtype="bfloat16")
    assert layer_shape(config, runtime) == QWEN3_14B


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"platform": "a2a4"}, "'platform' must be .*a2a3.*, found 'a2a4'"),
        ({"ring_heap": 0}, "'ring_heap' must be"),
        ({"cards": 2}, "unknown option 'cards'"),
    ],
)
def test_a_wrong_option_is_an_error_that_names_it(option, message):
    with pytest.raises(ConfigError, match=message):
        LLMEngine.from_plugins(executor="pypto-npu", options={"executor": option})
