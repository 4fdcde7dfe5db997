"""The layer kernels of the Llama family, on the blocks of Qwen3's, against the torch executor.

``compare_layer`` holds them to the limits of Qwen3's kernels (test_qwen3_kernels.py).
"""

from copy import deepcopy
from functools import cache

import pytest
import torch
from pypto_oracle import orchestration_complaints, pypto_or_skip, simulated
from qwen3_layers import Cache, Run, compare_layer, config_of, random_weights, relative_rms
from reference_models import prompts, write_model
from torch import Tensor
from transformers import LlamaConfig

from tilewright import GenerateConfig, LLMEngine, RuntimeConfig, plugins
from tilewright.loading import InstalledFormats
from tilewright_compare import Choice, compare
from tilewright_hf.loader import load_model
from tilewright_kernels import source
from tilewright_kernels.llama.plugin import kernels_of
from tilewright_kernels.qwen3_14b import plugin as qwen3
from tilewright_kernels.qwen3_14b.shape import LayerShape
from tilewright_pypto.emulated import language

KERNELS = ("prefill_layer", "decode_layer")


def shaped(heads: int, kv_heads: int, **changes: int) -> LayerShape:
    sizes = {"hidden": 96, "intermediate": 160, "head_dim": 32, "page_size": 32, "max_batch": 17}
    return LayerShape(**sizes | {"heads": heads, "kv_heads": kv_heads} | changes)


GROUPS = {1: shaped(2, 2), 2: shaped(4, 2), 4: shaped(8, 2), 8: shaped(8, 1)}
"""Shapes, keyed by query heads for each KV head."""


@cache
def emulated(kernel: str, shape: LayerShape) -> Run:
    made = source.load(kernel, kernels_of(shape), language)
    return lambda tensors: made(**tensors)


@cache
def by_simulator(kernel: str, shape: LayerShape) -> Run:
    return simulated(kernel, kernels_of(shape))


everywhere = pytest.mark.parametrize(
    "make", [emulated, pytest.param(by_simulator, marks=pytest.mark.pypto, id="a2a3sim")]
)
groups = pytest.mark.parametrize("group", GROUPS)


def hidden_rows(shape: LayerShape, rows: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(rows, shape.hidden, generator=random).bfloat16()


@everywhere
@groups
def test_decode_agrees_with_the_torch_executor(make, group):
    shape, batch_size = GROUPS[group], 17
    config = config_of(shape, qk_norm=False)
    weights = random_weights(config)
    cache = Cache(shape, 64)
    cache.add(*([0, 31, 32, 33, 67, 5, 1, 30] * 2), 2)
    run = make("decode_layer", shape)
    for step in range(3):
        batch, hidden = cache.step([1] * batch_size), hidden_rows(shape, batch_size, step)
        compare_layer(run, "decode_layer", config, weights, 0, hidden, batch, cache).check()


@everywhere
@groups
@pytest.mark.parametrize(
    ("histories", "new"),
    [([0, 0, 0], [1, 33, 16]), ([40, 0, 31, 64], [23, 9, 1, 32])],
    ids=["whole prompts", "chunks with a context"],
)
def test_prefill_agrees_with_the_torch_executor(make, group, histories, new):
    shape = GROUPS[group]
    config = config_of(shape, qk_norm=False)
    weights = random_weights(config)
    cache = Cache(shape, 32)
    cache.add(*histories)
    batch, hidden = cache.step(new), hidden_rows(shape, sum(new))
    run = make("prefill_layer", shape)
    compare_layer(run, "prefill_layer", config, weights, 0, hidden, batch, cache).check()


def test_chunked_prefill_gives_the_outputs_of_the_whole_prompt():
    shape = GROUPS[2]
    config = config_of(shape, qk_norm=False)
    hidden, given = hidden_rows(shape, 50), ("prefill_layer", config, random_weights(config), 0)
    run = emulated("prefill_layer", shape)
    outputs = []
    for sizes in ([50], [1, 31, 18]):
        cache = Cache(shape, 8)
        cache.add(0)
        chunks = zip(sizes, hidden.split(sizes), strict=True)
        found = [compare_layer(run, *given, r, cache.step([n]), cache).out for n, r in chunks]
        outputs.append(torch.cat(found))
    assert relative_rms(outputs[1], outputs[0]) < 2e-3


def test_every_layer_of_a_llama_model_agrees_with_the_torch_executor(tmp_path):
    settings = {
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 131,
    }
    write_model(LlamaConfig(**settings, tie_word_embeddings=False), tmp_path, "bfloat16")
    formats = InstalledFormats(plugins.new_manager(), {})
    loaded = load_model(str(tmp_path), weight_format=None, formats=formats)
    config, weights = loaded.config, loaded.weights
    shape = shaped(config.num_heads, config.num_kv_heads)
    random = torch.Generator().manual_seed(5)
    ids = torch.randint(3, config.vocab_size, (45 + 2,), generator=random)
    caches = []
    for _ in range(config.num_layers):
        caches.append(Cache(shape, 9))
        caches[-1].add(0, 0)
    x = weights.get("model.embed_tokens.weight")[ids].bfloat16()
    for new, kernel in (([40, 5], "prefill_layer"), ([1, 1], "decode_layer")):
        rows, x = x[: sum(new)], x[sum(new) :]
        for layer, kv in enumerate(caches):
            run = emulated(kernel, shape)
            found = compare_layer(run, kernel, config, weights, layer, rows, kv.step(new), kv)
            # Without norms the scores spread, and torch's own rounding alone comes near 1e-2.
            assert found.to_fp32 <= 1.5 * found.bf16_to_fp32
            rows = found.out


SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "head_dim": 32,
    "vocab_size": 131,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
MODELS = {
    "gqa-1": LlamaConfig(
        **SIZES, num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=False
    ),
    "gqa-2, tied": LlamaConfig(
        **SIZES, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True
    ),
    "gqa-4, llama3 RoPE": LlamaConfig(
        **SIZES,
        num_attention_heads=4,
        num_key_value_heads=1,
        tie_word_embeddings=False,
        rope_parameters=LLAMA3,
    ),
}
OPTIONS = {"platform": "emulated", "kernels": "llama"}


@pytest.mark.parametrize("name", MODELS)
def test_a_whole_model_generates_the_tokens_of_transformers(name, tmp_path):
    rounded = write_model(MODELS[name], tmp_path, "bfloat16")
    exact = deepcopy(rounded).float()
    ids, new = list(prompts(MODELS[name], [37, 5, 16])), 6
    with LLMEngine.from_plugins(executor="pypto-npu", options={"executor": OPTIONS}) as engine:
        engine.init_model("llama", str(tmp_path), RuntimeConfig(page_size=16, max_batch_tokens=32))
        greedy = GenerateConfig(max_new_tokens=new, temperature=0.0)
        generated = engine.generate_batch("llama", ids, greedy)
    for prompt, result in zip(ids, generated, strict=True):
        said = result.token_ids
        assert len(said) == new
        tokens = torch.tensor([[*prompt, *said]])
        with torch.inference_mode():
            logits, near = (m(tokens).logits[0, len(prompt) - 1 : -1] for m in (exact, rounded))
        chosen = logits.gather(-1, torch.tensor(said).unsqueeze(-1)).squeeze(-1)
        # Rounding may swap two tokens whose logits are as near as it moves them.
        assert (logits.amax(-1) - chosen <= 2 * (near - logits).abs().amax(-1)).all()


@pytest.mark.parametrize("name", MODELS)
def test_a_whole_model_compares_equal(name, tmp_path):
    write_model(MODELS[name], tmp_path, "bfloat16")
    candidate = Choice(executor="pypto-npu", options=OPTIONS, runtime=RuntimeConfig(page_size=16))
    ids = list(prompts(MODELS[name], [37, 5, 16]))
    found = compare(tmp_path, Choice(executor="torch"), candidate, ids, new_tokens=3, chunk=32)
    assert found.equal, found.sentence


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_parameters_are_those_of_qwen3_without_the_norms_of_heads(kernel):
    shape = GROUPS[2]
    ours, theirs = (
        source.contract(kernel, kernels) for kernels in (kernels_of(shape), qwen3.kernels_of(shape))
    )
    assert ours.kv_row_order == theirs.kv_row_order == "HND"
    norms = ("q_norm", "k_norm")
    assert ours.parameters == tuple(p for p in theirs.parameters if p.name not in norms)


@pytest.mark.pypto
@pytest.mark.parametrize("kernel", KERNELS)
@groups
def test_no_variable_of_the_generated_code_shadows_another(kernel, group, tmp_path):
    loaded = source.load(kernel, kernels_of(GROUPS[group]), pypto_or_skip())
    assert orchestration_complaints(loaded, tmp_path) == []
