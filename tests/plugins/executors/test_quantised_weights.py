"""Weights of 8 and 4 bits: the executor ``torch``, and what reads, writes and compares them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import gguf_files
import pytest
import torch
from attrs import evolve
from reference_models import prompts, write_model
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from tilewright import LLMEngine
from tilewright.cli import main
from tilewright.errors import ConfigError, ExecutorError, ModelError
from tilewright.types import RuntimeConfig
from tilewright.weights import expected_tensors
from tilewright_compare import Choice, compare
from tilewright_torch import quantised
from tilewright_torch.quantised import Int4, Int8, Quantised

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Largest rounding error of a result, and in float32 of a sum, over the result's norm."""

ODD = LlamaConfig(
    vocab_size=203,
    hidden_size=72,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=3,
    head_dim=12,
    tie_word_embeddings=False,
)
"""No size but the intermediate one is a multiple of a group."""
TIED = Qwen3Config(
    vocab_size=131,
    hidden_size=64,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=5,
    num_key_value_heads=1,
    head_dim=32,
    tie_word_embeddings=True,
)
BIASES = Qwen2Config(
    vocab_size=96,
    hidden_size=96,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=3,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)
CONFIGS = {"odd": ODD, "tied": TIED, "biases": BIASES}


def made(kind: str, rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> Quantised:
    weight = random(rows, columns, seed=seed)
    if kind == "int8":
        return quantised.int8(weight, dtype)
    return quantised.int4(weight, dtype, quantised.memory_tile())


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[True, False], ids=["native", "widened"])
def native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the CPU's own operations, and without any."""
    if not request.param:
        monkeypatch.setattr(quantised, "has_native", lambda dtype: False)
        monkeypatch.setattr(quantised, "_native_tile", lambda: None)


# --- products -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("int8", (37, 100)),
        ("int8", (5, 33)),
        ("int8", (130, 96)),
        ("int4", (37, 96)),
        ("int4", (64, 32)),
        ("int4", (200, 160)),
    ],
    ids=str,
)
def test_every_product_is_that_of_the_dequantised_weight(
    kind: str, shape: tuple[int, int], biased: bool, dtype: torch.dtype
) -> None:
    weight = made(kind, *shape, dtype)
    exact = weight.dequantised()
    assert exact.shape == shape
    assert exact.dtype == torch.float32
    bias = random(shape[0], seed=1).to(dtype) if biased else None
    weight = evolve(weight, bias=bias)
    for rows in (0, 1, 3, 8, 9, 16, 17, 33):
        x = random(rows, shape[1], seed=rows).to(dtype)
        expected = x.double() @ exact.double().T + (bias.double() if biased else 0)
        found = weight(x)
        assert found.shape == (rows, shape[0])
        assert found.dtype == dtype
        error = (found.double() - expected).norm()
        # A bias is added to a rounded product; int4 may round its weights for many rows.
        assert error <= 2 * ROUNDING[dtype] * expected.norm()


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("rows", [1, 4, 8])
def test_tensors_may_begin_at_any_address(kind: str, rows: int) -> None:
    weight = made(kind, 128, 64, torch.bfloat16)
    x = random(rows, 64).bfloat16()
    elsewhere = evolve(weight, values=moved(weight.values), scales=moved(weight.scales))
    assert torch.equal(elsewhere(moved(x)), weight(x))


def moved(tensor: Tensor) -> Tensor:
    """A copy that begins one element after an aligned address."""
    copy = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)
    return copy.copy_(tensor)


def test_blocks_of_a_large_weight_give_the_product_of_the_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = random(20, 96).bfloat16()
    weights = [made(kind, 300, 96, torch.bfloat16) for kind in ("int8", "int4")]
    whole = [weight(x) for weight in weights]
    exact = [weight.dequantised() for weight in weights]
    monkeypatch.setattr(quantised, "BLOCK_BYTES", 4 * 96 * 64)
    for weight, expected, stored in zip(weights, whole, exact, strict=True):
        torch.testing.assert_close(weight(x), expected)
        assert torch.equal(weight.dequantised(), stored)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_an_embedding_are_those_of_the_dequantised_one(dtype: torch.dtype) -> None:
    table = quantised.int8(random(50, 24), dtype)
    ids = torch.tensor([3, 49, 3, 0])
    found = table.rows(ids)
    assert found.dtype == dtype
    assert torch.equal(found, table.dequantised()[ids].to(dtype))


# --- what is stored -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_is_within_half_a_step_of_each_row(dtype: torch.dtype) -> None:
    weight = random(40, 50) * torch.logspace(-3, 2, 40).unsqueeze(1)
    kept = weight.clone()
    error = (quantised.int8(weight, dtype).dequantised() - weight).abs().amax(1)
    assert (error <= 0.55 * weight.abs().amax(1) / 127).all()
    assert torch.equal(weight, kept)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int4_loses_less_than_the_range_of_each_group_divided_evenly(dtype: torch.dtype) -> None:
    weight = random(70, 96) + random(70, 1, seed=1)
    kept = weight.clone()
    found = quantised.int4(weight, dtype).dequantised() - weight
    groups = weight.view(-1, 32)
    low, high = groups.aminmax(dim=1, keepdim=True)
    step = (high - low) / 15
    even = ((groups - low) / step).round() * step + low - groups
    assert found.norm() < 0.99 * even.norm()
    assert (found.view(-1, 32).abs() <= 1.7 * step).all()
    assert torch.equal(weight, kept)


@pytest.mark.parametrize("value", [0.0, 1.5, -3.0, 1e-30])
def test_weights_that_are_all_equal_are_kept(value: float) -> None:
    weight = torch.full((3, 64), value)
    for found in (quantised.int8(weight, torch.float32), quantised.int4(weight, torch.float32)):
        torch.testing.assert_close(found.dequantised(), weight)


@pytest.mark.parametrize("tile", [32, 64])
def test_int4_is_the_same_in_tiles_of_any_size(tile: int) -> None:
    weight = made("int4", 100, 64, torch.float32)
    assert isinstance(weight, Int4)
    other = quantised.retiled(weight, tile)
    assert other.tile == tile
    assert torch.equal(other.dequantised(), weight.dequantised())
    assert torch.equal(quantised.retiled(other, weight.tile).values, weight.values)


def test_the_layout_of_int4_is_the_documented_one() -> None:
    weight = quantised.int4(random(70, 64), torch.float32)
    tile, k, j = 1, 37, 5  # row 64 + 5
    assert weight.values.shape == (2, 64, 32)
    assert weight.scales.shape == (2, 128, 2)
    value = int(weight.values[tile, k, j]) & 15
    scale, zero = weight.scales[k // 32, 64 * tile + j]
    assert weight.dequantised()[69, 37] == torch.addcmul(zero, torch.tensor(value - 8.0), scale)


# --- models ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, config in CONFIGS.items():
        write_model(config, folder / name, "float32")
        write_model(config, folder / f"{name}-bfloat16", "bfloat16")
    return folder


def logits(engine: LLMEngine, model: Path, ids: list[int], runtime: RuntimeConfig) -> Tensor:
    """The logits of a prompt and of a decode step."""
    from tilewright_testing.paged import Sequences

    engine.init_model("m", model, evolve(runtime, max_seq_len=64))
    executor = engine.model("m").executor
    size = engine.model("m").runtime.page_size
    sequences = Sequences(size, engine.model("m").runtime.total_pages)
    return torch.cat(
        [executor.forward(sequences.batch({"a": part})) for part in (ids[:-1], ids[-1:])]
    )


@pytest.mark.parametrize("weight_dtype", ["int8", "int4"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_match_transformers_with_the_dequantised_weights(
    name: str, weight_dtype: str, models: Path
) -> None:
    (ids,) = prompts(CONFIGS[name], [21])
    with LLMEngine.from_plugins() as engine:
        found = logits(engine, models / name, ids, RuntimeConfig(weight_dtype=weight_dtype))
        served = engine.model("m")
        assert served.runtime.kv_dtype == "float32"
        own = {n: served.executor.weight(n) for n in expected_tensors(served.loaded.config)}
    model = AutoModelForCausalLM.from_pretrained(models / name, attn_implementation="eager")
    changed = 0
    for key, value in model.state_dict().items():
        if key in own:
            changed += not torch.equal(value, own[key])
            value.copy_(own[key])
    assert changed
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)


def test_what_is_wide_keeps_the_checkpoints_values(models: Path) -> None:
    with LLMEngine.from_plugins() as engine:
        engine.init_model("m", models / "odd-bfloat16", RuntimeConfig(weight_dtype="int4"))
        served = engine.model("m")
        assert served.runtime.kv_dtype == "bfloat16"
        held = served.executor._opened().weights
    kinds = {name.rpartition("layers.0.")[2]: type(held[name]) for name in held}
    assert kinds["input_layernorm.weight"] is Tensor
    assert kinds["mlp.down_proj.weight"] is Int4
    assert kinds["self_attn.q_proj.weight"] is Int8  # 72 is not a multiple of 32
    assert kinds["lm_head.weight"] is Int8
    assert kinds["model.embed_tokens.weight"] is Int8


@pytest.mark.parametrize("weight_dtype", ["int8", "int4"])
def test_a_converted_model_has_the_same_logits_and_is_not_quantised_again(
    weight_dtype: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "packed"
    source = models / "tied-bfloat16"
    command = ["convert", "--model", str(source), "--executor", "torch", "--out", str(out)]
    assert main([*command, "--weight-dtype", weight_dtype]) == 0
    (ids,) = prompts(CONFIGS["tied"], [9])
    found = []
    for model, asked in ((source, weight_dtype), (out, None)):
        with LLMEngine.from_plugins() as engine:
            found.append(logits(engine, model, ids, RuntimeConfig(weight_dtype=asked)))
            assert engine.model("m").runtime.weight_dtype == weight_dtype
            assert engine.model("m").runtime.kv_dtype == "bfloat16"
        for function in ("int8", "int4"):
            monkeypatch.setattr(quantised, function, None)
    assert torch.equal(*found)
    with LLMEngine.from_plugins() as engine, pytest.raises(ModelError, match="packed in int"):
        engine.init_model("m", out, RuntimeConfig(weight_dtype="bfloat16"))
    with (
        LLMEngine.from_plugins(executor="pypto-npu") as engine,
        pytest.raises(ModelError, match="packed for executor tilewright:torch"),
    ):
        engine.init_model("m", out, RuntimeConfig())


def test_an_unknown_dtype_is_refused_with_those_that_exist(models: Path) -> None:
    with LLMEngine.from_plugins() as engine, pytest.raises(ConfigError) as error:
        engine.init_model("m", models / "tied", RuntimeConfig(weight_dtype="int3"))
    assert "'int3'" in str(error.value)
    assert "'bfloat16' or 'float16' or 'int8' or 'int4'" in str(error.value)


def test_quantised_weights_are_not_streamed(models: Path) -> None:
    options = {"executor": {"stream_weights": True}}
    runtime = RuntimeConfig(weight_dtype="int8")
    with (
        LLMEngine.from_plugins(options=options) as engine,
        pytest.raises(ExecutorError, match="cannot stream quantised weights"),
    ):
        engine.init_model("m", models / "tied", runtime)


# --- memory ---------------------------------------------------------------------------------------

LARGE = Qwen3Config(
    vocab_size=32000,
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    tie_word_embeddings=True,
)
"""65 million weights, half of them in the embedding."""

LOADING = """
import os
import sys
from pathlib import Path

import torch

from tilewright import plugins
from tilewright.loading import InstalledFormats
from tilewright.types import RuntimeConfig
from tilewright_gguf import loader as gguf
from tilewright_hf import loader as hf
from tilewright_torch import plugin


def memory(what):
    status = Path("/proc/self/status").read_text()
    return int(status.split(what + ":")[1].split()[0]) * 1024


def opened(path):
    if path.endswith(".gguf"):
        return gguf.load_model(path, None)
    return hf.load_model(path, None, InstalledFormats(plugins.new_manager(), {}))


def measure(model, weight_dtype):
    loaded = opened(model)
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    runtime = RuntimeConfig(weight_dtype=weight_dtype, kv_dtype="float32", max_seq_len=16)
    layers = range(loaded.config.num_layers)
    made = plugin.create_executor(loaded.config, runtime, loaded.weights, layers, None)
    stored = sum(weight.nbytes for weight in made._opened().weights.values())
    return stored, memory("VmHWM") - before


torch.set_num_threads(1)
for case in sys.argv[1:]:
    small, model, weight_dtype = case.split("=")
    if os.fork() == 0:
        measure(small, weight_dtype)  # reads the code
        print(*measure(model, weight_dtype), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""


def test_loading_takes_little_more_memory_than_the_weights(tmp_path: Path) -> None:
    """From a checkpoint in another dtype, and from GGUF."""
    for name, config in (("small", TIED), ("large", LARGE)):
        folder = tmp_path / name
        model = write_model(config, folder / "float32", "float32")
        gguf_files.write(model, folder / "model.gguf", gguf_files.Kind.Q8_0)
        shutil.copytree(folder / "float32", folder / "bfloat16")
        model.bfloat16().save_pretrained(folder / "bfloat16")
    cases = [("float32", "bfloat16"), ("bfloat16", "int8"), ("bfloat16", "int4")]
    cases += [("model.gguf", "int8"), ("model.gguf", "int4")]
    arguments = [
        f"{tmp_path / 'small' / path}={tmp_path / 'large' / path}={dtype}" for path, dtype in cases
    ]
    result = subprocess.run(
        [sys.executable, "-c", LOADING, *arguments], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    measured = [tuple(map(int, line.split())) for line in result.stdout.splitlines()]
    assert len(measured) == len(cases)
    for case, (stored, grown) in zip(cases, measured, strict=True):
        assert stored > 40e6
        assert grown < 1.1 * stored, (case, stored, grown)


# --- GGUF -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_weights_of_four_bits_in_a_gguf_file_are_kept(
    kind: str, models: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(models / "odd")
    path = gguf_files.write(model, tmp_path / "model.gguf", gguf_files.Kind[kind])
    stored = gguf_files.load(path).weights
    with LLMEngine.from_plugins() as engine:
        engine.init_model("m", path, RuntimeConfig(weight_dtype="int4"))
        executor = engine.model("m").executor
        kept = [
            torch.equal(executor.weight(name), stored.get(name))
            for name in (f"model.layers.{i}.mlp.down_proj.weight" for i in range(2))
        ]
    assert all(kept) if kind != "Q8_0" else not any(kept)


# --- compare --------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_dtype", ["int8", "int4"])
def test_compare_judges_a_quantised_candidate_by_its_own_weights(
    weight_dtype: str, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compare", "--model", str(models / "tied-bfloat16"), "--candidate", "torch"]
    option = f"candidate.runtime.weight_dtype={weight_dtype}"
    main([*command, "-o", option, "--json", "--isolate"])
    report = json.loads(capsys.readouterr().out)
    assert report["verdict"] == "equal", report["sentence"]
    cost = report["quantisation"]
    least, most = {"int8": (1e-4, 0.03), "int4": (0.01, 0.4)}[weight_dtype]
    assert [layer["layer"] for layer in cost["layers"]] == [0, 1]
    assert all(least < layer["relative_rms"] < most for layer in cost["layers"])
    errors = {w["name"]: w["error"] for w in report["weights"]}
    assert errors["model.norm.weight"] == 0
    assert least < errors["model.layers.1.mlp.down_proj.weight"] < most
    assert main([*command, "-o", option]) == 0
    text = capsys.readouterr().out
    assert f"judged: whether the candidate computes what its own {weight_dtype} weights say" in text
    assert f"not judged: how far {weight_dtype} weights take the model" in text


def test_compare_finds_a_mistake_of_a_quantised_candidate(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    product = Int8.__call__

    def wrong(self: Int8, x: Tensor) -> Tensor:
        found = product(self, x)
        return found * 1.02 if self.values.shape == (192, 64) else found  # gate and up

    monkeypatch.setattr(Int8, "__call__", wrong)
    ids = list(prompts(CONFIGS["tied"], [12]))
    candidate = Choice(executor="torch", runtime=RuntimeConfig(weight_dtype="int8"))
    found = compare(models / "tied-bfloat16", Choice(executor="torch"), candidate, ids)
    assert found.divergence is not None
    assert found.divergence.place.tensor == "layers.0.gate_proj"


def test_compare_finds_a_weight_that_is_not_the_checkpoints(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantise = quantised.int8
    monkeypatch.setattr(quantised, "int8", lambda weight, dtype: quantise(weight[:].flip(0), dtype))
    ids = list(prompts(CONFIGS["tied"], [5]))
    candidate = Choice(executor="torch", runtime=RuntimeConfig(weight_dtype="int8"))
    found = compare(models / "tied-bfloat16", Choice(executor="torch"), candidate, ids)
    assert "model.layers.0.self_attn.q_proj.weight" in {w.name for w in found.wrong_weights}
