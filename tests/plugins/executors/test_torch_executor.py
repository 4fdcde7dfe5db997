"""The ``torch`` executor against transformers, with NaN in every unwritten slot of the cache."""

import re
import subprocess
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from asked import Asked
from attrs import define, evolve, field
from checkout import ROOT
from reference_models import CONFIGS, prompts, write_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, PreTrainedModel

import tilewright_torch.attention
import tilewright_torch.linear
from tilewright import plugins
from tilewright.errors import ExecutorError
from tilewright.loading import InstalledFormats
from tilewright.types import (
    DType,
    KvLayer,
    LoadedModel,
    ModelConfig,
    RuntimeConfig,
    StepBatch,
    Tap,
)
from tilewright_hf.loader import load_model
from tilewright_testing.paged import Sequences
from tilewright_torch import plugin
from tilewright_torch.model import TorchExecutor
from tilewright_torch.plugin import Options

PAGE_SIZE = 5
TOTAL_PAGES = 64
DECODE_STEPS = 20
PROMPT_LENGTH = 41
RAGGED_LENGTHS = [1, 23, 5, 6, 12]
TOLERANCE = 2e-4

BF16_CONFIGS = ["qwen3-gqa-5", "qwen2-yarn-factor", "llama-biases", "mistral-gqa-8"]
DTYPES: list[DType] = ["float32", "bfloat16", "float16"]
OPTIONS = Options()


# --- driving the executor -------------------------------------------------------------------------


@define
class Served:
    """An executor with its cache, initially all NaN, and the sequences in it."""

    config: ModelConfig
    executor: TorchExecutor
    sequences: Sequences = field(factory=lambda: Sequences(PAGE_SIZE, TOTAL_PAGES))

    def __attrs_post_init__(self) -> None:
        self.executor.allocate_kv(TOTAL_PAGES)
        self._spoil(range(TOTAL_PAGES))

    def step(
        self,
        tokens: Mapping[str, Sequence[int]],
        every_row: bool = False,
        tap: "Tap | None" = None,
    ) -> Tensor:
        """Run new tokens of some sequences; logits of each sequence's last row, or of all rows."""
        return self.executor.forward(self.batch(tokens, every_row), tap)

    def batch(self, tokens: Mapping[str, Sequence[int]], every_row: bool = False) -> StepBatch:
        batch = self.sequences.batch(tokens)
        return batch if every_row else evolve(batch, logits_rows=batch.query_starts[1:].long() - 1)

    def pages(self, name: str) -> list[int]:
        slots = self.sequences.slots([name])
        return sorted(set((slots // PAGE_SIZE).tolist()))

    def cached(self) -> list[Tensor]:
        """Copies of keys and values of all layers, [pages, page_size, KV heads, head_dim]."""
        pages = range(TOTAL_PAGES)
        layers = [self.executor.read_kv(i, pages) for i in range(self.config.num_layers)]
        return [t for layer in layers for t in (layer.key, layer.value)]

    def free(self, name: str) -> None:
        """Free a sequence's pages and put NaN into them."""
        pages = self.pages(name)
        self.sequences.free(name)
        self._spoil(pages)

    def _spoil(self, pages: Sequence[int]) -> None:
        for i in range(self.config.num_layers):
            cache = self.executor.read_kv(i, pages)
            spoilt = (torch.full_like(t, float("nan")) for t in (cache.key, cache.value))
            self.executor.write_kv(i, pages, KvLayer(*spoilt))


def load(directory: Path) -> LoadedModel:
    formats = InstalledFormats(plugins.new_manager(), {})
    return load_model(str(directory), weight_format=None, formats=formats)


def request(loaded: LoadedModel, **runtime: Any) -> Asked:
    settings = {
        "weight_dtype": loaded.config.dtype,
        "kv_dtype": runtime.get("weight_dtype", loaded.config.dtype),
        "max_seq_len": 256,
        "page_size": PAGE_SIZE,
    }
    return Asked(
        model_config=loaded.config,
        runtime_config=RuntimeConfig(**settings | runtime),
        weights=loaded.weights,
        options=OPTIONS,
    )


def serve(directory: Path, **runtime: Any) -> Served:
    loaded = load(directory)
    return Served(loaded.config, request(loaded, **runtime).of(plugin))


@torch.inference_mode()
def oracle(
    model: PreTrainedModel, chunks: Sequence[Sequence[int]], steps: int = 0
) -> tuple[list[Tensor], list[int], Tensor]:
    """The logits of transformers for a prompt given in chunks and its greedy continuation.

    Returns each chunk's logits, the new tokens, and the logits of the step that each was fed to.
    """
    model(torch.tensor([[5]]), use_cache=False)  # a short sequence resets dynamic RoPE
    cache = DynamicCache(config=model.config)

    def run(tokens: Sequence[int]) -> Tensor:
        return model(torch.tensor([list(tokens)]), past_key_values=cache).logits[0].float()

    of_chunks = [run(chunk) for chunk in chunks]
    new, of_steps, last = [], [], of_chunks[-1][-1]
    for _ in range(steps):
        new.append(int(last.argmax()))
        last = run(new[-1:])[-1]
        of_steps.append(last)
    return of_chunks, new, torch.stack(of_steps) if of_steps else torch.empty(0)


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Within the tolerance, and the same greedy tokens."""
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


def in_chunks(tokens: list[int], sizes: Sequence[int]) -> Iterator[list[int]]:
    for size in sizes:
        yield tokens[:size]
        tokens = tokens[size:]


# --- float32 against transformers -----------------------------------------------------------------


def test_the_test_configurations_cover_all_model_variants() -> None:
    configs = CONFIGS.values()
    assert len(CONFIGS) >= 24
    assert {c.model_type for c in configs} == {"qwen3", "qwen2", "llama", "mistral"}
    ratios = {c.num_attention_heads // c.num_key_value_heads for c in configs}
    assert ratios >= {1, 5, 8}
    assert any(c.num_key_value_heads == 1 < c.num_attention_heads for c in configs)
    kinds = {c.rope_parameters["rope_type"] for c in configs}
    assert kinds == {"default", "linear", "dynamic", "llama3", "yarn"}
    assert {c.tie_word_embeddings for c in configs} == {True, False}
    assert {c.num_hidden_layers for c in configs} >= {1, 6}
    assert any((c.sliding_window or 999) < PROMPT_LENGTH for c in configs if "sliding_window" in c)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_of_prompt_and_continuation_match_transformers(name: str, tmp_path: Path) -> None:
    model = write_model(name, tmp_path)
    served = serve(tmp_path)
    (prompt,) = prompts(CONFIGS[name], [PROMPT_LENGTH])
    (of_prompt,), new, of_steps = oracle(model, [prompt], DECODE_STEPS)

    assert_same(served.step({"a": prompt}, every_row=True), of_prompt)
    for token, expected in zip(new, of_steps, strict=True):
        assert_same(served.step({"a": [token]})[0], expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_of_ragged_batches_match_transformers(name: str, tmp_path: Path) -> None:
    model = write_model(name, tmp_path)
    served = serve(tmp_path)
    served.sequences = Sequences(PAGE_SIZE, TOTAL_PAGES, shuffled=True)
    ragged = list(prompts(CONFIGS[name], RAGGED_LENGTHS))
    expected = [oracle(model, [prompt], 6) for prompt in ragged]

    logits = served.step({f"r{i}": prompt for i, prompt in enumerate(ragged)})
    assert_same(logits, torch.stack([of_prompt[-1] for (of_prompt,), _, _ in expected]))
    for step in range(6):
        tokens = {f"r{i}": [new[step]] for i, (_, new, _) in enumerate(expected)}
        assert_same(served.step(tokens), torch.stack([steps[step] for _, _, steps in expected]))


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_of_a_chunked_prompt_match_transformers(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A chunk then spans several blocks of queries.
    monkeypatch.setattr(tilewright_torch.attention, "QUERY_BLOCK", 4)
    model = write_model(name, tmp_path)
    served = serve(tmp_path)
    (prompt,) = prompts(CONFIGS[name], [PROMPT_LENGTH])
    sizes = [7, 1, 13, 20]
    (of_prompt,), (token,), (of_step,) = oracle(model, [prompt], 1)

    served.sequences.prompts["a"] = PROMPT_LENGTH
    for chunk, expected in zip(in_chunks(prompt, sizes), of_prompt.split(sizes), strict=True):
        assert_same(served.step({"a": chunk}, every_row=True), expected)
    assert_same(served.step({"a": [token]})[0], of_step)


def test_a_step_can_mix_new_prompts_chunks_and_single_tokens(tmp_path: Path) -> None:
    name = "mistral-slides"
    model = write_model(name, tmp_path)
    served = serve(tmp_path)
    first, second, third = prompts(CONFIGS[name], [18, 11, 9])
    served.step({"a": first[:17], "b": second[:4]})
    logits = served.step({"a": first[17:], "b": second[4:], "c": third})
    assert_same(logits, torch.stack([oracle(model, [p])[0][0][-1] for p in (first, second, third)]))


# --- 16 bits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("native", [True, False], ids=["native", "widened"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", BF16_CONFIGS)
def test_the_16_bit_error_is_close_to_that_of_transformers(
    name: str, dtype: str, native: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native:
        monkeypatch.setattr(tilewright_torch.linear, "has_native", lambda dtype: False)
    model = write_model(name, tmp_path, dtype)
    served = serve(tmp_path)
    prompt, continuation = in_chunks(next(prompts(CONFIGS[name], [61])), [41, 20])
    steps = [[token] for token in continuation]
    truth = torch.cat(oracle(deepcopy(model).float(), [prompt, *steps])[0])
    theirs = torch.cat(oracle(model, [prompt, *steps])[0])
    ours = torch.cat([served.step({"a": tokens}, every_row=True) for tokens in (prompt, *steps)])

    def error(logits: Tensor) -> float:
        return float((logits - truth).square().mean().sqrt())

    assert error(ours) <= 1.25 * error(theirs)


@pytest.mark.parametrize("kv_dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", DTYPES)
def test_weights_and_kv_cache_can_have_different_dtypes(
    weight_dtype: DType, kv_dtype: DType, tmp_path: Path
) -> None:
    name = "qwen3-odd-heads"
    model = write_model(name, tmp_path)
    served = serve(tmp_path, weight_dtype=weight_dtype, kv_dtype=kv_dtype)
    assert {t.dtype for t in served.cached()} == {getattr(torch, kv_dtype)}
    ragged = list(prompts(CONFIGS[name], [9, 14]))
    expected = [oracle(model, [prompt], 1) for prompt in ragged]

    logits = served.step({"a": ragged[0], "b": ragged[1]})
    logits = torch.cat((logits, served.step({"a": expected[0][1], "b": expected[1][1]})))
    truth = torch.stack(
        [of_prompt[-1] for (of_prompt,), _, _ in expected] + [steps[0] for _, _, steps in expected]
    )
    coarsest = max(torch.finfo(getattr(torch, d)).eps for d in (weight_dtype, kv_dtype))
    assert float((logits - truth).abs().max()) < 64 * coarsest


# --- the KV cache ---------------------------------------------------------------------------------


def test_freed_pages_are_reused_by_another_sequence(tmp_path: Path) -> None:
    name = "llama-gqa-5"
    model = write_model(name, tmp_path)
    served = serve(tmp_path)
    stays, goes, comes = prompts(CONFIGS[name], [13, 29, 24])
    _, (token,), (of_step,) = oracle(model, [stays], 1)
    served.step({"stays": stays, "goes": goes})
    freed = set(served.pages("goes"))
    served.free("goes")

    assert_same(served.step({"stays": [token]})[0], of_step)
    assert_same(served.step({"comes": comes})[0], oracle(model, [comes])[0][0][-1])
    assert freed & set(served.pages("comes"))


@pytest.mark.parametrize("name", ["qwen3-some-layers-slide", "llama-dynamic-within"])
def test_a_step_writes_only_to_its_own_slots(name: str, tmp_path: Path) -> None:
    write_model(name, tmp_path)
    served = serve(tmp_path)
    first, second = prompts(CONFIGS[name], [12, 7])
    served.step({"a": first, "b": second})
    for tokens in ({"a": [5], "b": [6]}, {"a": second, "b": [7]}):
        before = served.cached()
        batch = served.batch(tokens)
        served.executor.forward(batch)
        own = torch.zeros(TOTAL_PAGES * PAGE_SIZE, dtype=torch.bool)
        own[batch.slot_mapping.long()] = True
        for old, new in zip(before, served.cached(), strict=True):
            changed = (old.view(torch.int32) != new.view(torch.int32)).flatten(0, 1).any(-1).any(-1)
            assert torch.equal(changed, own)


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_are_bitwise_equal_when_repeated_or_with_other_pages(
    dtype: DType, tmp_path: Path
) -> None:
    name = "qwen3-some-layers-slide"
    write_model(name, tmp_path)
    ragged = list(prompts(CONFIGS[name], [14, 31]))

    def run(shuffled: bool) -> list[Tensor]:
        served = serve(tmp_path, weight_dtype=dtype)
        served.sequences = Sequences(PAGE_SIZE, TOTAL_PAGES, shuffled)
        return [
            served.step({"a": ragged[0], "b": ragged[1]}),
            served.step({"a": [3], "b": [4]}),
            served.step({"b": [5]}),
        ]

    for first, again, elsewhere in zip(run(False), run(False), run(True), strict=True):
        assert torch.equal(first, again)
        assert torch.equal(first, elsewhere)


def test_a_step_can_request_no_logits(tmp_path: Path) -> None:
    write_model("qwen3-tied", tmp_path)
    for dtype in DTYPES:
        served = serve(tmp_path, weight_dtype=dtype)
        batch = evolve(served.batch({"a": [3, 4, 5]}), logits_rows=torch.tensor([]).long())
        assert served.executor.forward(batch).shape == (0, served.config.vocab_size)


# --- the work of a decode step --------------------------------------------------------------------


@pytest.mark.parametrize("shuffled", [False, True], ids=["in-place", "scattered"])
@pytest.mark.parametrize("name", ["qwen3-gqa-5", "mistral-slides"])
def test_a_long_context_is_attended_in_parts(
    name: str, shuffled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention = tilewright_torch.attention
    monkeypatch.setattr(attention, "LONG", 6)
    monkeypatch.setattr(attention, "PART", 4)
    monkeypatch.setattr(attention, "WIDE_BYTES", 0)  # one part at a time
    model = write_model(name, tmp_path)
    served = serve(tmp_path)
    served.sequences = Sequences(PAGE_SIZE, TOTAL_PAGES, shuffled)
    long, short = prompts(CONFIGS[name], [PROMPT_LENGTH, 2])
    expected = {n: oracle(model, [p], 5) for n, p in (("long", long), ("short", short))}
    served.step({"long": long, "short": short})

    for i in range(5):
        names = ["long", "short"] if i % 2 else ["long"]
        at = {n: i // 2 if n == "short" else i for n in names}
        found = served.step({n: [expected[n][1][at[n]]] for n in names})
        assert_same(found, torch.stack([expected[n][2][at[n]] for n in names]))


@pytest.mark.parametrize(
    ("name", "dtype", "most"),
    [
        ("llama-gqa-5", "float32", 168),
        ("llama-gqa-5", "bfloat16", 160),
        ("qwen3-gqa-5", "bfloat16", 180),
    ],
)
def test_a_layer_of_a_decode_step_takes_few_operations(
    name: str, dtype: str, most: int, tmp_path: Path
) -> None:
    write_model(name, tmp_path, dtype)
    served = serve(tmp_path)
    served.step({"a": list(range(3, 20))})
    executor = served.executor
    step = executor.begin(served.batch({"a": [5]}))
    hidden = executor.run_layer(step, 0, executor.embed(step))  # makes what all layers share
    with torch.autograd.profiler.profile() as profile:
        executor.run_layer(step, 1, hidden)
    # Views and the operations that others call are counted too: each takes time to dispatch.
    assert len(profile.function_events) <= most


class Results(TorchDispatchMode):
    """Adds up the bytes of the results of operations, views excepted."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not func.is_view:
            self.nbytes += result.nbytes
        return result


@pytest.mark.parametrize("length", [100, 1100])
def test_keys_of_one_sequence_are_read_in_place(length: int) -> None:
    kv_heads, head_dim = 2, 16
    keys = torch.full((2000, kv_heads, head_dim), float("nan"))
    sequences = Sequences(PAGE_SIZE, 400)
    sequences.batch({"other": [1] * 7, "a": [1] * (length - 1)})
    batch = sequences.batch({"a": [1]})
    keys[sequences.slots(["a"])] = torch.randn(length, kv_heads, head_dim)
    attend = tilewright_torch.attention.paged_attention(batch, PAGE_SIZE, None, torch.float32)
    with Results() as results:
        out = attend(torch.randn(1, 4, head_dim), keys, keys)
    assert out.isfinite().all()
    assert results.nbytes < length * kv_heads * head_dim * 4 / 4


# --- matrix products ------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("native", [True, False], ids=["native", "widened"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(37, 100), (300, 83), (65, 2111)], ids=str)
def test_every_matrix_product_path_sums_in_float32_and_rounds_once(
    shape: tuple[int, int],
    dtype: DType,
    native: bool,
    bias: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tilewright_torch.linear, "BLOCK_BYTES", 64 * 1024)
    if not native:
        monkeypatch.setattr(tilewright_torch.linear, "has_native", lambda dtype: False)
    of = getattr(torch, dtype)
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=random).to(of)
    offset = torch.randn(shape[0], generator=random).to(of) if bias else None
    product = tilewright_torch.linear.Dense(weight, offset)
    for rows in (0, 1, 2, 5, 70):
        x = torch.randn(rows, shape[1], generator=random).to(of)
        exact = F.linear(x.double(), weight.double(), None if offset is None else offset.double())
        found = product(x)
        assert found.dtype == of
        assert found.is_contiguous()
        # Half a unit in the last place, and the error of a float32 sum of this length.
        rtol = torch.finfo(of).eps / 2 * 1.01
        torch.testing.assert_close(found.double(), exact, rtol=rtol, atol=3e-4)


@pytest.mark.parametrize("enabled", [True, False])
def test_a_matrix_product_restores_the_onednn_setting(enabled: bool) -> None:
    before = torch._C._get_mkldnn_enabled()
    product = tilewright_torch.linear.Dense(torch.ones(300, 300).bfloat16())
    try:
        torch._C._set_mkldnn_enabled(enabled)
        product(torch.ones(1, 300).bfloat16())
        assert torch._C._get_mkldnn_enabled() == enabled
        with pytest.raises(RuntimeError):
            product(torch.ones(1, 7).bfloat16())
        assert torch._C._get_mkldnn_enabled() == enabled
    finally:
        torch._C._set_mkldnn_enabled(before)


# --- taps -----------------------------------------------------------------------------------------

_SHAPE_ROW = re.compile(r"^\| `(\S+)` \| \[(.+?)\] \| (\w+) \| (.*) \|$", re.MULTILINE)


def documented(served: Served, tokens: int, rows: int) -> dict[str, tuple[list[int], torch.dtype]]:
    """Shape and dtype of each tap of a step, in order, as listed in docs/tensors.md."""
    table = _SHAPE_ROW.findall((ROOT / "docs/tensors.md").read_text())
    config = served.config
    sizes = {name: getattr(config, name) for name in config.__slots__ if name != "__weakref__"}
    weights = getattr(torch, served.executor.kv_cache_spec.dtype)

    def entry(shape: str, dtype: str) -> tuple[list[int], torch.dtype]:
        of = [eval(size, {}, sizes | {"T": tokens, "L": rows}) for size in shape.split(",")]
        return of, {"weights": weights, "float32": torch.float32}[dtype]

    entries = {}
    in_layers = [row for row in table if ".N." in row[0]]
    for row in table:
        if row[0] == in_layers[0][0]:
            for layer in range(config.num_layers):
                for name, shape, dtype, what in in_layers:
                    if config.qk_norm or "only with `qk_norm`" not in what:
                        entries[name.replace(".N.", f".{layer}.")] = entry(shape, dtype)
        elif row not in in_layers:
            entries[row[0]] = entry(row[1], row[2])
    return entries


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["qwen3-gqa-5", "llama-head-dim"])
def test_taps_match_the_documented_list(name: str, dtype: DType, tmp_path: Path) -> None:
    write_model(name, tmp_path)
    served = serve(tmp_path, weight_dtype=dtype)
    first, second = prompts(CONFIGS[name], [6, 9])
    for tokens, total in (({"a": first, "b": second}, 15), ({"a": [3], "b": [4]}, 2)):
        seen: dict[str, tuple[list[int], torch.dtype]] = {}

        def tap(
            name: str, tensor: Tensor, seen: dict[str, tuple[list[int], torch.dtype]] = seen
        ) -> None:
            assert name not in seen
            seen[name] = (list(tensor.shape), tensor.dtype)

        served.step(tokens, tap=tap)
        expected = documented(served, total, 2)
        assert len(expected) >= 3 + 15 * served.config.num_layers
        assert list(seen.items()) == list(expected.items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_taps_do_not_change_the_logits(dtype: DType, tmp_path: Path) -> None:
    write_model("qwen3-tied", tmp_path)
    (prompt,) = prompts(CONFIGS["qwen3-tied"], [9])
    plain, tapped = serve(tmp_path, weight_dtype=dtype), serve(tmp_path, weight_dtype=dtype)
    for tokens in (prompt, [7]):
        seen: dict[str, Tensor] = {}
        with_tap = tapped.step({"a": tokens}, tap=seen.__setitem__)
        assert torch.equal(plain.step({"a": tokens}), with_tap)
        assert torch.equal(seen["logits"], with_tap)


@pytest.mark.parametrize("name", ["qwen3-mqa-biases", "llama-biases", "mistral-slides"])
def test_tapped_tensors_match_those_of_transformers(name: str, tmp_path: Path) -> None:
    model = write_model(name, tmp_path)
    (prompt,) = prompts(CONFIGS[name], [11])
    expected: dict[str, Tensor] = {}

    def keep(name: str, module: torch.nn.Module, of_input: bool = False) -> None:
        def hook(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            expected[name] = (inputs[0] if of_input else output)[0]

        module.register_forward_hook(hook)

    body: Any = model.model
    keep("embed", body.embed_tokens)
    for i, layer in enumerate(body.layers):
        attention, mlp = layer.self_attn, layer.mlp
        keep(f"layers.{i}.attn_norm", layer.input_layernorm)
        for stage in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"):
            if hasattr(attention, stage):
                keep(f"layers.{i}.{stage}", getattr(attention, stage))
        keep(f"layers.{i}.attention", attention.o_proj, of_input=True)
        keep(f"layers.{i}.attn_residual", layer.post_attention_layernorm, of_input=True)
        keep(f"layers.{i}.mlp_norm", layer.post_attention_layernorm)
        for stage in ("gate_proj", "up_proj", "down_proj"):
            keep(f"layers.{i}.{stage}", getattr(mlp, stage))
        keep(f"layers.{i}.activation", mlp.down_proj, of_input=True)
        keep(f"layers.{i}.output", layer)
    keep("final_norm", body.norm)
    keep("logits", model.lm_head)
    cache = DynamicCache()
    with torch.inference_mode():
        model(torch.tensor([prompt]), past_key_values=cache)
    for i, kept in enumerate(cache.layers):
        expected[f"layers.{i}.k_rope"] = kept.keys[0].transpose(0, 1)

    seen: dict[str, Tensor] = {}
    served = serve(tmp_path)
    served.step({"a": prompt}, every_row=True, tap=seen.__setitem__)
    unchecked = {f"layers.{i}.q_rope" for i in range(served.config.num_layers)}
    assert expected.keys() == seen.keys() - unchecked
    for stage, tensor in expected.items():
        found = seen[stage].reshape(tensor.shape)
        torch.testing.assert_close(
            found, tensor, rtol=1e-4, atol=1e-5, msg=lambda m, s=stage: s + m
        )


# --- loading, limits, closing ---------------------------------------------------------------------


def test_loading_and_running_take_little_more_memory_than_the_weights(tmp_path: Path) -> None:
    config = deepcopy(CONFIGS["llama-biases"])
    config.hidden_size, config.intermediate_size, config.vocab_size = 1020, 4096, 8000
    config.num_hidden_layers = 8
    write_model(config, tmp_path, "bfloat16")
    script = f"""
import sys
import weakref
sys.path[:0] = {[str(Path(__file__).parent), str(ROOT / "tests/support")]!r}
from pathlib import Path
from test_torch_executor import *

def memory(what):
    status = Path("/proc/self/status").read_text()
    return int(status.split(what + ":")[1].split()[0]) * 1024

torch.set_num_threads(1)
F.linear(torch.ones(4, 512).bfloat16(), torch.ones(512, 512).bfloat16())
loaded = load(Path({str(tmp_path)!r}))
stored = sum(loaded.weights.info(n).nbytes for n in loaded.weights.names())
Path("/proc/self/clear_refs").write_text("5")
before = memory("VmRSS")
served = serve(Path({str(tmp_path)!r}))
served.step({{"a": [3, 4, 5, 6]}})
served.step({{"a": [7]}})
print(stored, memory("VmHWM") - before)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    stored, grown = map(int, result.stdout.split())
    assert stored > 200e6
    assert grown < 1.1 * stored


@pytest.mark.parametrize("name", ["qwen3-gqa-5", "qwen3-tied"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_streamed_weights_give_the_same_logits_with_one_converted_layer_at_a_time(
    name: str, dtype: DType, tmp_path: Path
) -> None:
    write_model(name, tmp_path, "bfloat16")
    asked = request(load(tmp_path), weight_dtype=dtype)
    logits = []
    for options in (Options(), Options(stream_weights=True)):
        executor = evolve(asked, options=options).of(plugin)
        served = Served(asked.model_config, executor)
        steps = [served.step({"a": list(range(3, 40))}), served.step({"a": [7]})]
        logits.append(torch.cat(steps))
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-5)
    assert executor._model is not None
    layers = executor._model.layers
    kept = weakref.ref(layers[0].attn_norm) if dtype == "float32" else None
    assert layers[1] is layers[1]
    assert kept is None or kept() is None


def test_the_kv_cache_spec_is_nhd_and_limited_to_half_of_the_memory(tmp_path: Path) -> None:
    write_model("qwen3-gqa-8", tmp_path)
    spec = request(load(tmp_path), kv_dtype="float16").of(plugin).kv_cache_spec
    assert (spec.num_layers, spec.num_kv_heads, spec.head_dim) == (2, 2, 8)
    assert (spec.page_size, spec.dtype) == (PAGE_SIZE, "float16")
    assert spec.page_bytes == 2 * 2 * 2 * 8 * PAGE_SIZE * 2
    assert spec.row_order == "NHD"
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert spec.memory_limit is not None
    assert 0 < spec.memory_limit <= total // 2


@pytest.mark.parametrize(
    ("model", "runtime", "message"),
    [
        ({}, {"device": "npu:0"}, "runs on device cpu, cuda or cuda:N, found device = 'npu:0'"),
        ({"head_dim": 15}, {}, "even head_dim of 2 or more .* found 15"),
        ({"num_kv_heads": 3}, {}, "multiple of num_kv_heads, found 4 and 3"),
    ],
    ids=["device", "odd-head", "heads"],
)
def test_an_unsupported_model_or_device_is_refused_before_a_weight_is_read(
    model: dict[str, int], runtime: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_model("qwen3-tied", tmp_path)
    loaded = load(tmp_path)
    loaded = evolve(loaded, config=evolve(loaded.config, **model), weights=None)
    with pytest.raises(ExecutorError, match=message) as error:
        request(loaded, **runtime).of(plugin)
    assert "\n" not in str(error.value)


def test_the_number_of_threads_is_an_option(tmp_path: Path) -> None:
    write_model("qwen3-tied", tmp_path)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        evolve(request(load(tmp_path)), options=Options(threads=1)).of(plugin)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    for threads in (0, 99999):  # starting that many threads would end the process
        with pytest.raises(ValueError, match="'threads' must be"):
            Options(threads=threads)


def test_a_closed_executor_refuses_a_step(tmp_path: Path) -> None:
    write_model("qwen3-tied", tmp_path)
    served = serve(tmp_path)
    served.step({"a": [3, 4]})
    served.executor.close()
    served.executor.close()
    with pytest.raises(ExecutorError, match="closed"):
        served.step({"a": [5]})
