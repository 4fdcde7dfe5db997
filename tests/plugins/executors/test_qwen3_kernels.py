"""Qwen3's kernels, emulated and by PyPTO itself, against the torch executor.

A kernel must agree with the torch executor in BF16 up to rounding, and its error against FP32 must
be close to that of the torch executor in BF16. ``compare_layer`` also checks the KV cache and the
memory around every buffer.
"""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from attrs import evolve, fields
from pypto_oracle import lowered, orchestration_complaints, pypto_or_skip, simulated
from qwen3_layers import (
    Cache,
    Guarded,
    Run,
    compare_layer,
    config_of,
    kernel_weights,
    layer_inputs,
    pages_of,
    random_weights,
    relative_rms,
)
from reference_models import write_model
from torch import Tensor
from transformers import Qwen3Config

from tilewright import plugins
from tilewright.loading import InstalledFormats
from tilewright.settings import DEMO_MODEL
from tilewright.types import LoadedModel, ModelConfig, RuntimeConfig
from tilewright_hf.loader import load_model
from tilewright_kernels import source
from tilewright_kernels.qwen3_14b.plugin import KERNELS, kernels_of
from tilewright_kernels.qwen3_14b.shape import DEMO, QWEN3_14B, LayerShape, layer_shape
from tilewright_pypto.emulated import KernelError, language
from tilewright_pypto.rings import STANDARD, needed
from tilewright_torch.model import rms_norm
from tilewright_torch.weights import load


def shaped(**changes: int) -> LayerShape:
    sizes = {"hidden": 128, "intermediate": 256, "heads": 4, "kv_heads": 2, "head_dim": 64}
    return LayerShape(**sizes | {"page_size": 32, "max_batch": 17} | changes)


SMALL = shaped()
SHAPES = {
    "small": SMALL,
    "demo": evolve(DEMO, max_batch=17, max_tokens=256),
    "mha": shaped(heads=2, page_size=16),
    "mqa-8": shaped(heads=8, kv_heads=1, head_dim=32, page_size=128, kv_tile=32),
    "gqa-5": shaped(hidden=96, intermediate=160, heads=10, head_dim=32, page_size=48),
    "tiles": shaped(prefill_rows=32, n_tile=16, k_tile=32, vec_tile=16),
    "group-of-20": shaped(heads=20, kv_heads=1, head_dim=32, page_size=64),
}


@cache
def emulated(kernel: str, shape: LayerShape, seed: int = 0) -> Run:
    made = evolve(source.load(kernel, kernels_of(shape), language), seed=seed)
    return lambda tensors: made(**tensors)


@cache
def by_pypto(kernel: str, shape: LayerShape) -> Run:
    contract = source.contract(kernel, kernels_of(shape))
    run = lowered(source.load(kernel, kernels_of(shape), pypto_or_skip()))
    return lambda tensors: run(*contract.bind(tensors))


@cache
def by_simulator(kernel: str, shape: LayerShape) -> Run:
    return simulated(kernel, kernels_of(shape))


everywhere = pytest.mark.parametrize(
    "make",
    [
        emulated,
        pytest.param(by_pypto, marks=pytest.mark.pypto, id="pypto"),
        pytest.param(by_simulator, marks=pytest.mark.pypto, id="a2a3sim"),
    ],
)


def hidden_rows(shape: LayerShape, rows: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(rows, shape.hidden, generator=random).bfloat16()


# --- decode ---------------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("batch_size", [1, 3, 16, 17])
def test_decode_agrees_with_the_torch_executor(make, name, batch_size):
    shape = SHAPES[name]
    config, weights = config_of(shape), random_weights(config_of(shape))
    tile, page = shape.kv_tile, shape.page_size
    histories = [0, tile - 1, tile, page - 1, page, page + 1, 2 * page + 3, 5, 1, 2, 30, 31, 32]
    cache = Cache(shape, 64)
    cache.add(*(histories * 2)[-batch_size:])
    for step in range(3):
        batch = cache.step([1] * batch_size)
        hidden = hidden_rows(shape, batch_size, step)
        run = make("decode_layer", shape)
        compare_layer(run, "decode_layer", config, weights, 0, hidden, batch, cache).check()


def test_twenty_decode_steps_write_twenty_consecutive_slots():
    config, weights = config_of(SMALL), random_weights(config_of(SMALL))
    cache = Cache(SMALL, 8)
    cache.add(20, 31)
    run = emulated("decode_layer", SMALL)
    for step in range(20):
        hidden = hidden_rows(SMALL, 2, step)
        batch = cache.step([1, 1])
        compare_layer(run, "decode_layer", config, weights, 0, hidden, batch, cache).check()
    assert int((~cache.key.isnan()).sum()) == (40 + 51) * SMALL.kv_heads * SMALL.head_dim


# --- prefill --------------------------------------------------------------------------------------

PREFILLS = {
    "one token": ([0], [1]),
    "within a tile": ([0], [7]),
    "a tile": ([0], [16]),
    "past a tile": ([0], [17]),
    "past a page": ([0], [70]),
    "three sequences": ([0, 0, 0], [5, 33, 16]),
    "chunks with a context": ([40, 0, 31, 64], [23, 9, 1, 32]),
    "seventeen sequences": ([0, 3] * 8 + [50], [1, 2, 3, 4, 5, 6, 7, 8] * 2 + [18]),
}


@everywhere
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("what", PREFILLS)
def test_prefill_agrees_with_the_torch_executor(make, name, what):
    histories, new = PREFILLS[what]
    shape = SHAPES[name]
    config, weights = config_of(shape), random_weights(config_of(shape))
    cache = Cache(shape, 64)
    cache.add(*histories)
    batch = cache.step(new)
    hidden = hidden_rows(shape, sum(new))
    run = make("prefill_layer", shape)
    compare_layer(run, "prefill_layer", config, weights, 0, hidden, batch, cache).check()


@pytest.mark.parametrize("sizes", [[50], [16, 34], [1, 31, 18], [33, 17]])
def test_chunked_prefill_gives_the_outputs_of_the_whole_prompt(sizes):
    config, weights = config_of(SMALL), random_weights(config_of(SMALL))
    hidden = hidden_rows(SMALL, 50)
    whole = Cache(SMALL, 8)
    whole.add(0)
    run = emulated("prefill_layer", SMALL)
    given = ("prefill_layer", config, weights, 0)
    expected = compare_layer(run, *given, hidden, whole.step([50]), whole).out
    chunked = Cache(SMALL, 8)
    chunked.add(0)
    found = []
    for size, rows in zip(sizes, hidden.split(sizes), strict=True):
        found.append(compare_layer(run, *given, rows, chunked.step([size]), chunked).out)
    assert relative_rms(torch.cat(found), expected) < 2e-3


@pytest.mark.parametrize("kernel", ["prefill_layer", "decode_layer"])
def test_outputs_do_not_depend_on_the_order_of_iterations_or_pages(kernel):
    config, weights = config_of(SMALL), random_weights(config_of(SMALL))
    outputs = []
    for seed, pages in [(0, 30), (1, 30), (2, 41)]:
        cache = Cache(SMALL, pages)
        cache.add(70, 3, 31)
        new = [1, 1, 1] if kernel == "decode_layer" else [40, 1, 2]
        run = emulated(kernel, SMALL, seed)
        hidden = hidden_rows(SMALL, sum(new))
        outputs.append(
            compare_layer(run, kernel, config, weights, 0, hidden, cache.step(new), cache).out
        )
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


@pytest.mark.pypto
def test_a_context_that_overflows_pyptos_default_rings_agrees_with_torch():
    """About 20,000 tasks in one ring, which end the process with PyPTO's default ring sizes."""
    shape = shaped(
        hidden=64, intermediate=64, heads=32, head_dim=32, page_size=16, max_tokens=64, max_batch=1
    )
    run = by_simulator("prefill_layer", shape)
    sizes = needed("prefill_layer", kernels_of(shape), 2000)
    assert sizes["ring_task_window"] > STANDARD["ring_task_window"]
    config, weights = config_of(shape), random_weights(config_of(shape))
    cache = Cache(shape, 140)
    cache.add(1984)
    batch, hidden = cache.step([16]), hidden_rows(shape, 16)
    compare_layer(run, "prefill_layer", config, weights, 0, hidden, batch, cache).check()


# --- models ---------------------------------------------------------------------------------------


def loaded_from(directory: Path) -> LoadedModel:
    formats = InstalledFormats(plugins.new_manager(), {})
    return load_model(str(directory), weight_format=None, formats=formats)


def shape_of(config: ModelConfig) -> LayerShape:
    dtypes = {"weight_dtype": "bfloat16", "kv_dtype": "bfloat16"}
    return layer_shape(config, RuntimeConfig(page_size=32, **dtypes))


@pytest.mark.parametrize("which", ["demo", "gqa-5", "gqa-8"])
def test_every_layer_of_a_model_agrees_with_the_torch_executor(which, tmp_path):
    if which == "demo":
        loaded = loaded_from(DEMO_MODEL)
    else:
        heads, kv_heads = {"gqa-5": (10, 2), "gqa-8": (8, 1)}[which]
        settings = {
            "hidden_size": 96,
            "intermediate_size": 160,
            "num_hidden_layers": 4,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": 32,
            "vocab_size": 131,
        }
        write_model(Qwen3Config(**settings, tie_word_embeddings=False), tmp_path, "bfloat16")
        loaded = loaded_from(tmp_path)
    config, weights = loaded.config, loaded.weights
    shape = shape_of(config)
    random = torch.Generator().manual_seed(5)
    ids = torch.randint(3, config.vocab_size, (45 + 3,), generator=random)
    caches = []
    for _ in range(config.num_layers):
        caches.append(Cache(shape, 9))
        caches[-1].add(0, 0)
    x = weights.get("model.embed_tokens.weight")[ids].bfloat16()
    for new, kernel in (([40, 5], "prefill_layer"), ([1, 1], "decode_layer")):
        rows = x[: sum(new)]
        for layer, kv in enumerate(caches):
            run = emulated(kernel, shape)
            found = compare_layer(run, kernel, config, weights, layer, rows, kv.step(new), kv)
            found.check()
            rows = found.out
        x = x[sum(new) :]


# --- head -----------------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("name", ["small", "demo"])
@pytest.mark.parametrize("rows", [1, 3, 16, 17])
@pytest.mark.parametrize("vocab", [67, 128, 300])
def test_the_head_agrees_with_the_torch_executor(make, name, rows, vocab):
    shape = SHAPES[name]
    config = config_of(shape, vocab)
    weights = random_weights(config)
    hidden = hidden_rows(shape, rows)
    guarded = Guarded()
    guarded.add("hidden", hidden)
    guarded.add("final_norm", weights.get("model.norm.weight").float().unsqueeze(0))
    guarded.add("lm_head", weights.get("lm_head.weight"))
    guarded.add("logits", torch.full((rows, vocab), float("nan")))
    make("head", shape)(guarded.tensors)
    assert guarded.changed() == {"logits"}
    assert not guarded.broken()

    def by_torch(dtype: torch.dtype) -> Tensor:
        model = load(config, range(1), weights, dtype)
        normed = rms_norm(hidden.to(dtype), model.final_norm, config.norm_eps)
        return model.head(normed).float()

    found, truth, near = (
        guarded.tensors["logits"],
        by_torch(torch.float32),
        by_torch(torch.bfloat16),
    )
    assert relative_rms(found, near) <= 1e-2
    assert relative_rms(found, truth) <= 1.5 * relative_rms(near, truth)


# --- limits ---------------------------------------------------------------------------------------


def test_more_tokens_than_the_shape_allows_are_an_error():
    shape = shaped(max_tokens=16, max_batch=1)
    config, weights = config_of(shape), kernel_weights(random_weights(config_of(shape)))
    cache = Cache(shape, 8)
    cache.add(0)
    batch = cache.step([33])
    inputs = layer_inputs("prefill_layer", config, weights, hidden_rows(shape, 33), batch, cache)
    with pytest.raises(KernelError, match=r"scratch\[.*\] reaches outside"):
        emulated("prefill_layer", shape)(inputs)


@pytest.mark.parametrize("broken", ["slot_mapping", "block_table", "context_lens"])
def test_an_index_outside_the_cache_is_an_error(broken):
    config, weights = config_of(SMALL), kernel_weights(random_weights(config_of(SMALL)))
    cache = Cache(SMALL, 8)
    cache.add(40)
    inputs = layer_inputs(
        "decode_layer", config, weights, hidden_rows(SMALL, 1), cache.step([1]), cache
    )
    wrong = {"slot_mapping": 8 * 32, "block_table": 8, "context_lens": 1000}
    inputs[broken] = torch.full_like(inputs[broken], wrong[broken])
    with pytest.raises(KernelError, match="outside its shape"):
        emulated("decode_layer", SMALL)(inputs)


def test_the_kernels_declare_the_cache_row_order_that_they_use():
    for kernel in ("prefill_layer", "decode_layer"):
        assert source.contract(kernel, kernels_of(DEMO)).kv_row_order == ("HND")
    rows = torch.arange(2 * 3 * 4).view(-1, 1)  # 2 pages, 3 KV heads, 4 slots per page
    of_pages = pages_of(rows, torch.empty(2, 4, 3, 1))
    page, head, offset = 1, 2, 3
    assert of_pages[page, offset, head] == (page * 3 + head) * 4 + offset


@pytest.mark.parametrize(
    ("change", "constraint"),
    [
        ({"hidden": 0}, "hidden must be above zero, found 0"),
        ({"kv_heads": 3}, "heads 4 must be a multiple of kv_heads 3"),
        ({"head_dim": 80}, "head_dim 80 must be a multiple of 32"),
        ({"hidden": 130}, "hidden 130 must be a multiple of"),
        ({"intermediate": 250}, "intermediate 250 must be a multiple of"),
        ({"page_size": 40}, "page_size 40 must be a multiple of kv_tile"),
        ({"kv_tile": 24}, "kv_tile 24 must be a multiple of 16"),
        ({"prefill_rows": 8}, "prefill_rows 8 must be a multiple of 16"),
        ({"prefill_rows": 512}, "must fit in 131072 bytes"),
        ({"hidden": 512, "intermediate": 512, "head_dim": 128, "k_tile": 256}, "fit in 65536 byt"),
    ],
)
def test_a_shape_that_the_tiles_do_not_support_is_refused_with_the_constraint(change, constraint):
    with pytest.raises(
        ValueError, match=f"the kernels cannot serve this layer shape: .*{constraint}"
    ):
        shaped(**change)


def test_the_shipped_shapes_match_the_models():
    demo = shape_of(loaded_from(DEMO_MODEL).config)
    names = {"hidden", "intermediate", "heads", "kv_heads", "head_dim", "norm_eps"}
    assert names < {f.name for f in fields(LayerShape)}
    assert all(getattr(demo, n) == getattr(DEMO, n) for n in names)
    assert QWEN3_14B.heads * QWEN3_14B.head_dim == QWEN3_14B.hidden == 5120
    assert QWEN3_14B.heads // QWEN3_14B.kv_heads == 5


def test_loops_over_columns_run_twice_in_the_bundled_model():
    shape = shape_of(loaded_from(DEMO_MODEL).config)
    for size in (shape.hidden, shape.intermediate, shape.kv_heads * shape.head_dim):
        assert all(size >= 2 * tile for tile in (shape.vec_tile, shape.n_tile, shape.k_tile))


# --- at full width --------------------------------------------------------------------------------


@everywhere
@pytest.mark.slow
def test_a_layer_of_qwen3_14b_agrees_with_the_torch_executor(make):
    shape = QWEN3_14B
    config, weights = config_of(shape), random_weights(config_of(shape))
    prefill, decode = make("prefill_layer", shape), make("decode_layer", shape)
    cache = Cache(shape, 12)
    cache.add(0, 200, 17)
    for chunk in (170, 130):
        batch = cache.step([chunk], [0])
        hidden = hidden_rows(shape, chunk)
        compare_layer(prefill, "prefill_layer", config, weights, 0, hidden, batch, cache).check()
    for step in range(5):
        batch = cache.step([1, 1, 1])
        hidden = hidden_rows(shape, 3, step)
        compare_layer(decode, "decode_layer", config, weights, 0, hidden, batch, cache).check()


# --- PyPTO ----------------------------------------------------------------------------------------


@pytest.mark.pypto
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", [SMALL, DEMO, QWEN3_14B], ids=["small", "demo", "qwen3-14b"])
def test_pypto_compiles_a_kernel_to_assembler_input(kernel, shape, tmp_path, monkeypatch):
    pl = pypto_or_skip()
    from pypto.runtime import RunConfig

    monkeypatch.setenv("PYPTO_PROG_BUILD_DIR", str(tmp_path))
    compiled = source.load(kernel, kernels_of(shape), pl).compile(config=RunConfig(platform="a2a3"))
    read = json.loads((Path(compiled.output_dir) / "compiled_meta.json").read_text())["params"]
    contract = source.contract(kernel, kernels_of(shape))
    assert [(p["name"], p["direction"].lower(), p["shape"]) for p in read] == [
        (p.name, p.direction, [e if isinstance(e, int) else -1 for e in p.shape])
        for p in contract.parameters
    ]
    tasks = {p.stem for p in Path(compiled.output_dir).rglob("*.pto")}
    assert tasks >= {"widen", "rms_norm"}


@pytest.mark.pypto
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", [*SHAPES, "qwen3-14b"])
def test_no_variable_of_the_generated_code_shadows_another(kernel, name, tmp_path):
    pl = pypto_or_skip()
    shape = SHAPES.get(name, QWEN3_14B)
    assert orchestration_complaints(source.load(kernel, kernels_of(shape), pl), tmp_path) == []


@pytest.mark.pypto
@pytest.mark.parametrize("kernel", ["prefill_layer", "decode_layer"])
def test_the_emulation_computes_what_pypto_computes(kernel):
    config, weights = config_of(SMALL), random_weights(config_of(SMALL))
    outputs = []
    for make in (emulated, by_pypto):
        cache = Cache(SMALL, 30)
        cache.add(70, 3, 31)
        new = [1, 1, 1] if kernel == "decode_layer" else [40, 1, 2]
        hidden = hidden_rows(SMALL, sum(new))
        run = make(kernel, SMALL)
        found = compare_layer(run, kernel, config, weights, 0, hidden, cache.step(new), cache)
        outputs.append((found.out, cache.key.nan_to_num(), cache.value.nan_to_num()))
    for ours, theirs in zip(*outputs, strict=True):
        assert relative_rms(ours, theirs) < 1e-3
