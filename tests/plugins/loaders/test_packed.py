"""Packed models: conversion, loading, verification, interruption, damage, and wrong executors."""

import errno
import fcntl
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import weakref
from collections import namedtuple
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
from attrs import evolve
from gguf import GGMLQuantizationType
from gguf_files import write as write_gguf
from model_directories import change_json, change_weights
from plugin_distributions import Distribution, Install, on_path
from reference_models import CONFIGS, random_model, write_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3Config

from tilewright import GenerateConfig, LLMEngine, RuntimeConfig, hookimpl
from tilewright.cli import main
from tilewright.errors import ConfigError, ModelError, PluginError
from tilewright.types import LoadedModel
from tilewright_packed import format as packed
from tilewright_packed.writer import Plan, convert, plan
from tilewright_testing import LoaderSuite

EMULATED = {"executor": "pypto-npu", "options": {"executor": {"platform": "emulated"}}}
TORCH = {"executor": "torch"}
PROMPTS = [[5, 6, 7, 8, 9, 10], [11]]


def qwen3(**changes: Any) -> Qwen3Config:
    """A configuration that the kernels support; the heads are wider than the hidden state."""
    sizes = {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 131,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
    }
    return Qwen3Config(**sizes | changes)


class Logits:
    """An observer that records all logits."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    @hookimpl
    def on_tensor(self, name: str, tensor: torch.Tensor) -> None:
        if name == "logits":
            self.seen.append(tensor.clone())


def run(source: Path, selection: dict[str, Any], **runtime: Any) -> tuple[LoadedModel, Any, Any]:
    """The loaded model, and the tokens and logits of a generation."""
    logits = Logits()
    with LLMEngine.from_plugins(**selection, observers=[logits]) as engine:
        settings = {"max_seq_len": 64, "max_batch_size": 2, "max_batch_tokens": 32} | runtime
        loaded = engine.init_model("m", source, RuntimeConfig(**settings))
        config = GenerateConfig(max_new_tokens=3, temperature=0, ignore_eos=True)
        results = engine.generate_batch("m", PROMPTS, config)
    return loaded, [r.token_ids for r in results], logits.seen


def planned(
    source: Path, selection: dict[str, Any], shard_bytes: int = 2**30, **runtime: Any
) -> Plan:
    with LLMEngine.from_plugins(**selection) as engine:
        loaded = engine.load(source)
        return plan(loaded, *engine.pack(loaded, RuntimeConfig(**runtime)), shard_bytes)


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BF16 directory that both executors run, with every optional part of a directory."""
    directory = tmp_path_factory.mktemp("models") / "source"
    write_model(qwen3(), directory, "bfloat16")
    change_json(
        directory / "generation_config.json",
        eos_token_id=[2, 3],
        do_sample=True,
        top_k=7,
        temperature=0.5,
    )
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}\n{% endfor %}é"
    named = [{"name": "default", "template": template}, {"name": "tool_use", "template": "T"}]
    change_json(directory / "tokenizer_config.json", chat_template=named, eot_token="t7")
    return directory


@pytest.fixture(scope="module")
def converted(model: Path) -> Path:
    """The model packed for pypto-npu, in shards of at most 16000 bytes of weights."""
    out = model.parent / "packed"
    convert(planned(model, EMULATED, 16_000), out)
    return out


# --- conversion -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "stored", "selection", "dtype"),
    [
        (qwen3(), "bfloat16", EMULATED, None),
        (qwen3(tie_word_embeddings=True, num_hidden_layers=1), "float32", EMULATED, "bfloat16"),
        (qwen3(tie_word_embeddings=True), "bfloat16", TORCH, None),
        (qwen3(), "float32", TORCH, "bfloat16"),
        (CONFIGS["llama-biases"], "float32", TORCH, None),
        (CONFIGS["llama-head-dim"], "bfloat16", TORCH, "float32"),
        (CONFIGS["qwen2-yarn-factor"], "float32", TORCH, "float16"),
        (CONFIGS["mistral-window-of-three"], "float16", TORCH, None),
        (CONFIGS["qwen3-some-layers-slide"], "float32", TORCH, "bfloat16"),
    ],
)
def test_logits_are_bitwise_equal_to_those_of_the_source(
    config, stored, selection, dtype, tmp_path
):
    source, out = tmp_path / "source", tmp_path / "packed"
    write_model(config, source, stored)
    convert(planned(source, selection, 100_000, weight_dtype=dtype), out)
    _, tokens, logits = run(source, selection, weight_dtype=dtype)
    loaded, same_tokens, same_logits = run(out, selection)  # with the dtype that was packed
    assert loaded.packing.weight_dtype == (dtype or stored)
    assert same_tokens == tokens
    assert len(same_logits) == len(logits) >= 3
    assert all(map(torch.equal, same_logits, logits))


@pytest.mark.parametrize(("selection", "dtype"), [(EMULATED, "bfloat16"), (TORCH, "float32")])
def test_a_quantised_gguf_file_can_be_converted(selection, dtype, tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 64}
    model = random_model(qwen3(**sizes))
    source = write_gguf(model, tmp_path / "model.gguf", GGMLQuantizationType.Q8_0)
    out = tmp_path / "packed"
    convert(planned(source, selection, weight_dtype=dtype), out)
    source_model, tokens, logits = run(source, selection, weight_dtype=dtype)
    source.unlink()
    loaded, same_tokens, same_logits = run(out, selection)
    assert loaded.config == source_model.config
    assert same_tokens == tokens
    assert all(map(torch.equal, same_logits, logits))


def test_config_defaults_and_tokenizer_of_the_source_are_kept(model, converted):
    with LLMEngine.from_plugins() as engine:
        source, packed_model = engine.load(model), engine.load(converted)
    assert packed_model.config == source.config
    assert packed_model.generation_defaults == source.generation_defaults
    assert packed_model.text.chat_template == source.text.chat_template
    assert packed_model.text.tool_chat_template == source.text.tool_chat_template == "T"
    assert packed_model.text.special_tokens == source.text.special_tokens
    assert packed_model.text.turn_end_ids == source.text.turn_end_ids == (7,)
    assert packed_model.text.tokenizer.to_str() == source.text.tokenizer.to_str()


def test_the_shards_hold_the_weights_transposed_typed_and_aligned(model, converted):
    weights = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).state_dict()
    shards = sorted(converted.glob("*.safetensors"))
    assert len(shards) > 3
    index = json.loads((converted / packed.INDEX).read_text())["weight_map"]
    found = {}
    for shard in shards:
        tensors = load_file(shard)
        assert len(tensors) == 1 or shard.stat().st_size <= 17_000
        assert all(index[name] == shard.name for name in tensors)
        with shard.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        del header["__metadata__"]
        assert (8 + length) % 64 == 0
        for entry in header.values():
            assert entry["data_offsets"][0] % (4 if entry["dtype"] == "F32" else 2) == 0
        found |= tensors
    assert found.keys() == index.keys()
    assert torch.equal(found["embedding"], weights["model.embed_tokens.weight"])
    assert torch.equal(found["lm_head"], weights["lm_head.weight"])
    for i in range(2):
        layer = f"model.layers.{i}"
        for name, stored in (("wo", "self_attn.o_proj"), ("w_up", "mlp.up_proj")):
            assert torch.equal(found[f"layers.{i}.{name}"], weights[f"{layer}.{stored}.weight"].T)
        norm = weights[f"{layer}.self_attn.k_norm.weight"]
        assert torch.equal(found[f"layers.{i}.k_norm"], norm.float()[None])


def test_converting_twice_gives_the_same_bytes(model, converted, tmp_path):
    convert(planned(model, EMULATED, 16_000), tmp_path / "again")
    assert files(tmp_path / "again") == files(converted)


def test_the_fingerprint_differs_for_models_of_one_shape(model, tmp_path):
    other = shutil.copytree(model, tmp_path / "source")
    assert planned(other, TORCH).fingerprint == planned(model, TORCH).fingerprint
    change_weights(other, "model.norm.weight", model__norm__weight=torch.ones(48).bfloat16())
    assert planned(other, TORCH).fingerprint != planned(model, TORCH).fingerprint


def test_conversion_holds_one_tensor_in_memory_at_a_time(model, tmp_path):
    alive: list[weakref.ref[Any]] = []

    def watched(read: Callable[[], torch.Tensor]) -> torch.Tensor:
        assert not any(ref() is not None for ref in alive)
        tensor = read()
        memory = tensor.view(torch.uint8).numpy().copy()
        alive.append(weakref.ref(memory))
        return torch.from_numpy(memory).view(tensor.dtype)

    with LLMEngine.from_plugins(**EMULATED) as engine:
        loaded = engine.load(model)
        packing, tensors = engine.pack(loaded)
        lazy = [evolve(t, read=partial(watched, t.read)) for t in tensors]
        convert(plan(loaded, packing, lazy, 2**30), tmp_path / "out")
    assert len(alive) == len(tensors)


def test_only_the_packed_loader_loads_packed_models(model, converted):
    with LLMEngine.from_plugins() as engine:  # exactly one loader claims each
        assert engine.load(model).packing is None
        assert engine.load(converted).packing.executor == "tilewright:pypto-npu"
    with pytest.raises(ModelError, match=r"expected a directory that holds config\.json"):
        LLMEngine.from_plugins(loader="hf-local").load(converted)
    with pytest.raises(ModelError, match="is not a packed model: expected a directory with"):
        LLMEngine.from_plugins(loader="packed").load(model)
    with pytest.raises(ModelError, match="no such directory: expected a directory with"):
        LLMEngine.from_plugins(loader="packed").load(converted / "none")


class TestAsALoader(LoaderSuite):
    @pytest.fixture
    def plugin(self) -> str:
        return "packed"

    @pytest.fixture
    def source(self, converted: Path) -> Path:
        return converted


def test_a_converted_model_verifies_and_generates_the_same_text(model, tmp_path, capsys):
    out = str(tmp_path / "out")
    executor = ["--executor", "pypto-npu", "-o", "platform=emulated"]
    assert main(["convert", "--model", str(model), *executor, "--out", out]) == 0
    said, told = capsys.readouterr()
    assert said.endswith("in 1 shard for executor tilewright:pypto-npu (layout 1, bfloat16)\n")
    assert told == ""
    assert main(["verify", out]) == 0
    assert "all 5 files are intact" in capsys.readouterr().out
    generate = ["generate", *executor, "--temperature", "0", "--max-new-tokens", "4", "t5 t6"]
    assert main([*generate, "--model", str(model)]) == 0
    text = capsys.readouterr().out
    assert main([*generate, "--model", out]) == 0
    assert capsys.readouterr().out == text != ""


@pytest.mark.parametrize("words", [["--out", "x"], ["--executor", "torch"]])
def test_convert_names_missing_arguments(words, capsys):
    assert main(["convert", *words]) == 2
    assert " is required: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "found"), [("1", 1), ("500M", 500 << 20), ("2G", 2 << 30), ("3KiB", 3072)]
)
def test_shard_sizes_are_parsed_with_units(text, found):
    from tilewright_tools.convert import size

    assert size(text) == found
    for wrong in ("", "0", "-1", "1.5G", "G", "2 G", "1P"):
        with pytest.raises(Exception, match="expected bytes, such as 500M or 2G"):
            size(wrong)


# --- interruption ---------------------------------------------------------------------------------


def stop_after(shard: str) -> Callable[[str, int], None]:
    def on_bytes(name: str, count: int) -> None:
        if name > shard:
            raise KeyboardInterrupt

    return on_bytes


THIRD = "model-00003-of-"


def interrupted(model: Path, out: Path) -> Path:
    with pytest.raises(KeyboardInterrupt):
        convert(planned(model, EMULATED, 16_000), out, stop_after(f"{THIRD}99999"))
    assert not out.exists()
    return out.with_name(f"{out.name}.partial")


def test_an_interrupted_conversion_resumes_after_the_last_complete_shard(
    model, converted, tmp_path
):
    partial_folder = interrupted(model, tmp_path / "out")
    kept = {p.name: p.stat().st_mtime_ns for p in partial_folder.glob("model-*-of-?????.safe*")}
    kept = {name: time for name, time in kept.items() if not name.endswith(".writing")}
    assert len(kept) == 3
    convert(planned(model, EMULATED, 16_000), tmp_path / "out")
    assert {n: (tmp_path / "out" / n).stat().st_mtime_ns for n in kept} == kept
    assert files(tmp_path / "out") == files(converted)
    assert os.listdir(tmp_path) == ["out"]


def test_a_killed_conversion_resumes(model, converted, tmp_path):
    code = f"""
        import os, signal, sys
        from pathlib import Path
        from tilewright import LLMEngine
        from tilewright_packed.writer import convert, plan

        def on_bytes(name, count):
            if name > "{THIRD}99999":
                os.kill(os.getpid(), signal.SIGKILL)

        with LLMEngine.from_plugins(**{EMULATED!r}) as engine:
            loaded = engine.load({str(model)!r})
            convert(plan(loaded, *engine.pack(loaded), 16_000), Path("out"), on_bytes)
    """
    child = subprocess.run([sys.executable, "-c", dedent(code)], cwd=tmp_path)
    assert child.returncode == -signal.SIGKILL
    assert os.listdir(tmp_path) == ["out.partial"]
    convert(planned(model, EMULATED, 16_000), tmp_path / "out")
    assert files(tmp_path / "out") == files(converted)


def test_a_finished_shard_that_has_changed_is_written_again(model, converted, tmp_path):
    partial_folder = interrupted(model, tmp_path / "out")
    damaged = sorted(partial_folder.glob("*.safetensors"))[1]
    flip(damaged, -1)
    convert(planned(model, EMULATED, 16_000), tmp_path / "out")
    assert files(tmp_path / "out") == files(converted)


def test_shards_of_another_unfinished_conversion_are_not_reused(model, tmp_path):
    partial_folder = interrupted(model, tmp_path / "out")
    before = files(partial_folder)
    other = shutil.copytree(model, tmp_path / "other")
    change_weights(other, "lm_head.weight", lm_head__weight=torch.ones(131, 48).bfloat16())
    for another in (
        planned(model, EMULATED, 15_000),
        planned(model, TORCH, 16_000),
        planned(other, EMULATED, 16_000),
    ):
        with pytest.raises(ConfigError, match="an unfinished conversion of another source, or"):
            convert(another, tmp_path / "out")
    progress = partial_folder / "unfinished.json"
    for damage in (b"", b"[]", b"{}", b'{"key": 1, "shards": []}'):
        progress.write_bytes(damage)
        with pytest.raises(ConfigError, match=r"remove it, or choose another --out"):
            convert(planned(model, EMULATED, 16_000), tmp_path / "out")
    progress.write_bytes(before[progress.name])
    after = files(partial_folder)
    assert {k: v for k, v in before.items() if not k.endswith(".writing")} == after


def test_a_second_process_cannot_convert_to_the_same_directory(model, tmp_path):
    def on_bytes(name: str, count: int) -> None:
        with pytest.raises(ConfigError, match="is being written by another process"):
            convert(planned(model, TORCH), tmp_path / "out")

    convert(planned(model, TORCH), tmp_path / "out", on_bytes)
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("ending", ["rename", "rmdir"])
def test_a_conversion_that_another_process_just_finished_is_not_resumed(
    model, tmp_path, monkeypatch, ending
):
    flock = fcntl.flock

    def late(descriptor: int, operation: int) -> None:
        arguments = [tmp_path / "theirs"] if ending == "rename" else []
        getattr(tmp_path / "out.partial", ending)(*arguments)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(ConfigError, match="is being written by another process"):
        convert(planned(model, TORCH), tmp_path / "out")
    assert os.listdir(tmp_path) == (["theirs"] if ending == "rename" else [])


def test_complete_shards_are_kept_when_the_disk_fills_up(model, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("tilewright_packed.writer.os.replace", _full_at_third_shard)
        with pytest.raises(ConfigError, match=r"out\.partial cannot be written: No space left on"):
            convert(planned(model, EMULATED, 16_000), tmp_path / "out")
    assert {f"model-0000{i}" for i in (1, 2)} == {
        path.name[:11] for path in (tmp_path / "out.partial").glob("*.safetensors")
    }
    convert(planned(model, EMULATED, 16_000), tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]


def _full_at_third_shard(source: str, target: Path, rename: Any = os.replace) -> None:
    if Path(target).name.startswith(THIRD):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    rename(source, target)


def test_a_file_at_the_partial_path_is_not_overwritten(model, tmp_path):
    (tmp_path / "out.partial").write_text("mine")
    with pytest.raises(ConfigError, match=r"out\.partial is not a directory: remove it"):
        convert(planned(model, TORCH), tmp_path / "out")
    assert (tmp_path / "out.partial").read_text() == "mine"


def test_ctrl_c_prints_how_to_resume(model, tmp_path, capsys, monkeypatch):
    command = ["convert", "--model", str(model), "--executor", "torch", "--out"]
    command += [str(tmp_path / "out"), "--shard-size", "16K"]
    with monkeypatch.context() as patch:
        patch.setattr("tilewright_packed.writer.os.replace", _interrupt_at_third_shard)
        assert main(command) == 130
    assert "the same command continues after the last complete shard" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["out.partial"]
    assert main(command) == 0
    assert os.listdir(tmp_path) == ["out"]


def _interrupt_at_third_shard(source: str, target: Path, rename: Any = os.replace) -> None:
    if Path(target).name.startswith(THIRD):
        raise KeyboardInterrupt
    rename(source, target)


# --- refusals -------------------------------------------------------------------------------------


def test_existing_files_are_not_overwritten(model, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    before = sorted(os.listdir(tmp_path))
    for name in before:
        out = str(tmp_path / name)
        assert main(["convert", "--model", str(model), "--executor", "torch", "--out", out]) == 2
        assert "already exists: choose another --out, or remove it" in capsys.readouterr().err
    out = str(tmp_path / "no" / "where")
    assert main(["convert", "--model", str(model), "--executor", "torch", "--out", out]) == 2
    assert "does not exist: create it first" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == before


def test_too_little_disk_space_is_an_error_before_anything_is_written(model, tmp_path, monkeypatch):
    needed = planned(model, TORCH).bytes
    usage = namedtuple("usage", "free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(needed - 1))
    with pytest.raises(ConfigError, match=f"has {needed - 1} bytes free and {needed} are needed"):
        convert(planned(model, TORCH), tmp_path / "out")
    assert os.listdir(tmp_path) == []
    partial_folder = interrupted_with(monkeypatch, model, tmp_path / "out", usage(10**12))
    kept = sum(p.stat().st_size for p in partial_folder.glob("*.safetensors"))
    needed = planned(model, EMULATED, 16_000).bytes
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(needed - kept))
    convert(planned(model, EMULATED, 16_000), tmp_path / "out")  # only the rest needs space


def interrupted_with(monkeypatch: Any, model: Path, out: Path, usage: Any) -> Path:
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    return interrupted(model, out)


def test_a_damaged_source_leaves_no_files(model, tmp_path):
    source = shutil.copytree(model, tmp_path / "source")
    norm = torch.ones(48).bfloat16()
    norm[3] = float("nan")
    change_weights(source, "model.norm.weight", model__norm__weight=norm)
    with pytest.raises(ModelError, match="1 of 48 values are not finite"):
        convert(planned(source, EMULATED, 16_000), tmp_path / "out")
    assert os.listdir(tmp_path) == ["source"]


def test_a_model_that_the_executor_does_not_support_is_not_converted(tmp_path, capsys):
    write_model("llama-biases", tmp_path / "source")
    command = ["convert", "--model", str(tmp_path / "source"), "--executor", "pypto-npu"]
    command += ["--weight-dtype", "bfloat16"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 2
    assert "serves models with a norm for each query and key head" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["source"]


def test_a_packed_model_cannot_be_converted_again(converted, tmp_path, capsys):
    command = ["convert", "--model", str(converted), "--executor", "pypto-npu"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 2
    assert "is already packed, for executor tilewright:pypto-npu" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


# --- third-party executors ------------------------------------------------------------------------

BACKWARDS = """
    from attrs import evolve

    from tilewright import hookimpl
    from tilewright.types import PackedTensor, PackedWeights
    from tilewright.weights import expected_tensors
    from tilewright_torch import plugin as torch_plugin

    tilewright_api = 2
    VERSION = 1

    class Forwards:
        def __init__(self, weights, config):
            self.weights, self.expected = weights, expected_tensors(config)
        def names(self):
            return self.expected.keys()
        def info(self, name):
            return evolve(self.weights.info("b." + name), shape=self.expected[name])
        def get(self, name):
            return self.weights.get("b." + name).flip(0).reshape(self.expected[name])
        def close(self):
            self.weights.close()

    @hookimpl
    def pack_weights(model_config, weights):
        def packed(name, shape):
            def read():
                return weights.get(name).float().flatten().flip(0)[:, None]
            size = 1
            for extent in shape:
                size *= extent
            return PackedTensor(name="b." + name, shape=(size, 1), dtype="float32", read=read)
        shapes = expected_tensors(model_config)
        return PackedWeights(version=VERSION, tensors=(packed(*item) for item in shapes.items()))

    @hookimpl
    def create_executor(model_config, runtime_config, weights, packed, layers):
        if packed:
            weights = Forwards(weights, model_config)
        return torch_plugin.create_executor(model_config, runtime_config, weights, layers, None)
"""


def backwards(source: str, name: str = "acme-backwards") -> Distribution:
    module = name.replace("-", "_")
    return Distribution(
        name=name,
        files={f"{module}.py": dedent(source)},
        plugins={"executor": {"backwards": module}},
    )


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Install]:
    with on_path(tmp_path / "site") as installer:
        yield installer


def test_models_can_be_packed_for_a_third_party_executor(site, model, tmp_path):
    site(backwards(BACKWARDS))
    out = tmp_path / "out"
    selection = {"executor": "backwards"}
    convert(planned(model, selection, weight_dtype="float32"), out)
    _, tokens, logits = run(model, selection, weight_dtype="float32")
    loaded, same_tokens, same_logits = run(out, selection)
    assert loaded.packing.executor == "acme-backwards:backwards"
    assert same_tokens == tokens
    assert all(map(torch.equal, same_logits, logits))
    with pytest.raises(
        ModelError, match="packed in float32, found the setting weight_dtype = bfloat16"
    ):
        run(out, selection, weight_dtype="bfloat16")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("VERSION = 1", "VERSION = 2", "version 1 of the layout of acme-backwards:backwards"),
        ("(size, 1)", "(1, size)", "do not match the executor's layout: expected b.model"),
        ('"float32"', '"float16"', "embed_tokens.weight [6288, 1] float16, found [6288, 1] float3"),
        ('"b." + name, shape', '"c." + name, shape', "embed_tokens.weight [6288, 1] float32, fo"),
    ],
)
def test_a_layout_that_changed_since_packing_is_refused(site, model, tmp_path, old, new, said):
    site(backwards(BACKWARDS))
    out = tmp_path / "out"
    convert(planned(model, {"executor": "backwards"}, weight_dtype="float32"), out)
    del sys.modules["acme_backwards"]
    with on_path(tmp_path / "newer") as newer:
        newer(backwards(BACKWARDS.replace(old, new)))
        with pytest.raises(ModelError) as error:
            run(out, {"executor": "backwards"})
    assert said in str(error.value)
    assert "convert the model" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (".flip(0)[:, None]", "", r"'b.model.embed_tokens.weight' must be \[6288, 1\] float32, as"),
        (".float()", "", "as its executor declared it, found .* bfloat16"),
        ('"b." + name, shape', '"b", shape', "must return tensors with unique names"),
        ('dtype="float32"', 'dtype="complex128"', "found 'b.model.embed_.*' in complex128"),
        ("in shapes.items()", "in ()", "found none"),
    ],
)
def test_a_hook_that_packs_other_tensors_than_announced_is_an_error(
    site, model, tmp_path, old, new, said
):
    site(backwards(BACKWARDS.replace(old, new)))
    with pytest.raises(PluginError, match=said):
        convert(planned(model, {"executor": "backwards"}, weight_dtype="float32"), tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["site"]


def test_an_executor_of_the_same_name_in_another_distribution_is_refused(site, model, tmp_path):
    site(backwards(BACKWARDS))
    convert(planned(model, {"executor": "backwards"}), tmp_path / "out")
    site(backwards(BACKWARDS, "other-backwards"))
    with pytest.raises(ModelError, match="which other-backwards:backwards cannot read: choose"):
        run(tmp_path / "out", {"executor": "other-backwards:backwards"})


# --- damage ---------------------------------------------------------------------------------------

Damage = Callable[[Path], None]


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def signed(directory: Path, **changed: Any) -> None:
    """Change the manifest and its digest, as a deliberate change would."""
    path = directory / packed.MANIFEST
    values = json.loads(path.read_text()) | changed
    del values["digest"]
    digest = packed.sha256(packed.json_bytes(values))
    path.write_bytes(packed.json_bytes({"digest": digest, **values}))


def entries(directory: Path) -> dict[str, Any]:
    return json.loads((directory / packed.MANIFEST).read_text())["files"]


def entry(name: str, *removed: str, **changed: Any) -> Damage:
    def damage(directory: Path) -> None:
        old = {k: v for k, v in entries(directory)[name].items() if k not in removed}
        signed(directory, files=entries(directory) | {name: old | changed})

    return damage


def packing(**changed: Any) -> Damage:
    def damage(directory: Path) -> None:
        values = json.loads((directory / packed.MANIFEST).read_text())
        signed(directory, packing=values["packing"] | changed)

    return damage


def rewritten(name: str, change: Callable[[bytes], bytes]) -> Damage:
    """Replace the content of a file, and update its size and checksum."""

    def damage(directory: Path) -> None:
        data = change((directory / name).read_bytes())
        (directory / name).write_bytes(data)
        new = {"bytes": len(data), "sha256": packed.sha256(data)}
        if name.endswith(".safetensors"):
            length = 8 + int.from_bytes(data[:8], "little")
            new["header_sha256"] = packed.sha256(data[:length])
        entry(name, **new)(directory)

    return damage


def manifest(change: Callable[[bytes], bytes]) -> Damage:
    def damage(directory: Path) -> None:
        path = directory / packed.MANIFEST
        path.write_bytes(change(path.read_bytes()))

    return damage


def shard(change: Callable[[Path], object]) -> Damage:
    return lambda directory: change(directory / SHARD) and None


def renamed(old: str, new: str) -> Damage:
    def damage(directory: Path) -> None:
        files = entries(directory)
        signed(directory, files={(new if n == old else n): f for n, f in files.items()})

    return damage


def without(*names: str) -> Damage:
    def damage(directory: Path) -> None:
        files = {n: f for n, f in entries(directory).items() if not n.startswith(names)}
        signed(directory, files=files)

    return damage


def linked(path: Path) -> None:
    moved = path.rename(path.parent.parent / f"moved-{path.name}")
    path.symlink_to(moved)


def directory_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


def swapped(directory: Path) -> None:
    one, two = (directory / f"model-0000{i}-of-{COUNT}.safetensors" for i in (3, 8))
    one.rename(directory / "x")
    two.rename(one)
    (directory / "x").rename(two)


def stray(directory: Path) -> None:
    shutil.copy(directory / SHARD, directory / "model.safetensors")


def config(**changed: Any) -> Damage:
    def change(data: bytes) -> bytes:
        values = json.loads(data)
        values["config"] |= changed
        return packed.json_bytes(values)

    return rewritten(packed.MODEL, change)


def sub(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        assert old in data
        return data.replace(old, new)

    return change


COUNT = "00012"
SHARD = f"model-00002-of-{COUNT}.safetensors"
ADVICE = ("convert ", "copy ", "remove ", "choose ", "set ", "must be ", "different checkpoints")
AGAIN = "copy it again, or convert the model again"

DAMAGES: dict[str, tuple[Damage, str]] = {
    "manifest empty": (manifest(lambda data: b""), "not valid JSON"),
    "manifest truncated": (manifest(lambda data: data[:-300]), "not valid JSON"),
    "manifest one byte": (manifest(sub(b'"bytes": 1', b'"bytes": 2')), "changed since it was"),
    "manifest one space": (manifest(lambda data: data + b" "), "changed since it was written"),
    "manifest digest": (manifest(sub(b'digest": "', b'digest": "0')), "changed since it was"),
    "manifest no digest": (manifest(sub(b'"digest"', b'"tsegid"')), "changed since it was"),
    "manifest binary": (manifest(lambda data: bytes(range(256))), "not valid JSON"),
    "manifest is a list": (manifest(lambda data: b"[1]"), "expected a JSON object"),
    "manifest nested too deeply": (
        manifest(lambda data: b'{"a":' * 10**5),
        "not valid JSON (nested too",
    ),
    "manifest huge number": (manifest(lambda d: b'{"format": 1' + b"0" * 9999 + b"}"), "not valid"),
    "manifest is a link": (lambda d: linked(d / packed.MANIFEST), "bytes, not a link"),
    "newer format": (
        partial(signed, format=2),
        "packed in format 2, but this version of tilewright",
    ),
    "older format": (partial(signed, format=0), "reads format 1: convert the model again"),
    "format in words": (partial(signed, format="1"), "'format' must be 1"),
    "unknown key": (partial(signed, extra=1), "unknown option 'extra'"),
    "files is a list": (partial(signed, files=[]), "model.json is not among its files"),
    "files is empty": (partial(signed, files={}), "is not among its files"),
    "size in words": (entry(SHARD, bytes="many"), "'bytes' must be an integer"),
    "size negative": (entry(SHARD, bytes=-1), "is not one that tilewright writes"),
    "no sum": (entry(SHARD, "sha256"), "'sha256' is missing"),
    "no header sum": (entry(SHARD, "header_sha256"), "is not one that tilewright writes"),
    "header sum of text": (entry("model.json", header_sha256="0"), "is not one that tilewright"),
    "path above": (renamed(SHARD, "../x.safetensors"), "found ../x.safetensors"),
    "path above, as a shard": (renamed(SHARD, f"../{SHARD}"), f"found ../{SHARD}"),
    "path absolute": (renamed(SHARD, "/etc/passwd"), "found /etc/passwd"),
    "path below": (renamed(SHARD, f"a/{SHARD}"), f"found a/{SHARD}"),
    "path with a newline": (renamed(SHARD, f"{SHARD}\n"), f"found '{SHARD}\\n'"),
    "no tokenizer listed": (without("tokenizer.json"), "tokenizer.json is not among its files"),
    "no shard listed": (without("model-"), "shards is not among its files"),
    "a shard not listed": (without(SHARD), f"{SHARD}, which does not belong to this packed"),
    "packing is null": (partial(signed, packing=None), "'packing' must be a table"),
    "newer layout": (packing(version=2), "reads version 1: upgrade that plugin, or convert the"),
    "older layout": (packing(version=0), "reads version 1: convert the model for tilewright:p"),
    "other executor": (
        packing(executor="tilewright:torch"),
        "packed for executor tilewright:torch",
    ),
    "other dtype": (packing(weight_dtype="float32"), "set weight_dtype to 'bfloat16'"),
    "no dtype": (
        packing(weight_dtype="int8"),
        "'int8', that of the checkpoint, is not supported by",
    ),
    "shard truncated": (shard(lambda p: os.truncate(p, p.stat().st_size - 1)), "bytes, found"),
    "shard extended": (shard(lambda p: p.write_bytes(p.read_bytes() + b"\0")), "bytes, found"),
    "shard empty": (shard(lambda p: os.truncate(p, 0)), f"bytes, found 0: {AGAIN}"),
    "shard missing": (shard(lambda p: p.unlink()), f"missing: {AGAIN}"),
    "shard is a link": (shard(linked), "found a link"),
    "shard is a directory": (shard(directory_instead), "found a directory"),
    "header one byte": (shard(lambda p: flip(p, 40)), f"changed since it was written: {AGAIN}"),
    "header space": (shard(lambda p: p.write_bytes(sub(b"  ", b" \t")(p.read_bytes()))), "changed"),
    "header length": (shard(lambda p: flip(p, 0)), "changed since it was written"),
    "header far too long": (shard(lambda p: flip(p, 7)), "changed since it was written"),
    "shards swapped": (swapped, "changed since it was written"),
    "other tensor shape": (
        rewritten(SHARD, sub(b'"shape":[48,128]', b'"shape":[128,48]')),
        "[48, 128] bfloat16, found [128, 48] bfloat16",
    ),
    "other tensor dtype": (rewritten(SHARD, sub(b'"BF16"', b'"F16" ')), "found [48, 128] float16"),
    "other tensor name": (
        rewritten(SHARD, sub(b"layers.0.wq", b"layers.0.xq")),
        "in none of the shards",
    ),
    "config one byte": (lambda d: flip(d / "model.json", 30), "changed since it was written"),
    "config no layers": (config(num_layers=0), "invalid num_layers = 0"),
    "config layers in words": (config(num_layers="many"), "'num_layers' must be an integer"),
    "config many layers": (config(num_layers=10**9), "invalid num_layers = 1000000000"),
    "config one layer more": (config(num_layers=3), "do not match the executor's layout"),
    "config windows": (config(sliding_windows=[3]), "invalid len(sliding_windows) = 1"),
    "config unknown": (config(colour=1), "unknown option 'colour'"),
    "config no JSON": (rewritten("model.json", lambda data: b"\xff"), "not valid JSON"),
    "tokenizer one byte": (lambda d: flip(d / "tokenizer.json", 99), "changed since it was"),
    "tokenizer empty": (lambda d: os.truncate(d / "tokenizer.json", 0), "bytes, found 0"),
    "tokenizer nonsense": (rewritten("tokenizer.json", lambda data: b"{}"), "the tokenizers lib"),
    "index one byte": (lambda d: flip(d / packed.INDEX, 50), "changed since it was written"),
    "index missing": (lambda d: (d / packed.INDEX).unlink(), f"missing: {AGAIN}"),
    "index leads out": (
        rewritten(packed.INDEX, sub(SHARD.encode(), b"../x.safetensors")),
        "must be in a file of the same directory",
    ),
    "another model's weights": (stray, "which does not belong to this packed model: remove"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_a_one_line_error_and_leaves_no_files(name, converted, tmp_path, capsys):
    damage, said = DAMAGES[name]
    directory = shutil.copytree(converted, tmp_path / "there" / "packed")
    damage(directory)
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    for command in (
        ["generate", "--max-new-tokens", "1", "t5"],
        ["convert", "--out", str(tmp_path / "out")],
    ):
        flags = ["--executor", "pypto-npu", "-o", "platform=emulated", "--model", str(directory)]
        assert main([*command, *flags]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("tilewright: error: ")
        assert err.count("\n") == 1
        assert len(err) < 1000
        if command[0] == "generate":
            assert said in err
            assert any(word in err for word in ADVICE)
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_tensors_that_the_executors_layout_lacks_are_a_warning(converted, tmp_path):
    directory = shutil.copytree(converted, tmp_path / "packed")
    config(num_layers=1)(directory)
    loaded, _, _ = run(directory, EMULATED)
    (warning,) = loaded.warnings
    assert "tensors that the configuration does not need are ignored" in warning
    assert str(directory) in warning


def test_a_changed_weight_is_found_only_by_verification(converted, tmp_path, capsys):
    directory = shutil.copytree(converted, tmp_path / "packed")
    flip(directory / SHARD, -1)
    run(directory, EMULATED)  # loading maps the weights and does not read them
    careful = evolve_options(verify=True)
    with pytest.raises(ModelError, match=f"{SHARD}: changed since it was written: {AGAIN}"):
        run(directory, careful)
    run(converted, careful)
    assert main(["verify", str(directory)]) == 1
    out = capsys.readouterr().out
    assert f"{SHARD}  changed since it was written" in out
    assert out.count(" ok\n") == len(files(directory)) - 1
    assert "1 of 16 files are damaged" in out
    assert main(["verify", "--json", str(directory)]) == 1
    found = json.loads(capsys.readouterr().out)
    assert {row["name"]: row["problem"] for row in found if row["problem"]} == {
        SHARD: "changed since it was written"
    }


def evolve_options(**loader: Any) -> dict[str, Any]:
    return {**EMULATED, "options": {**EMULATED["options"], "loader": loader}}


def test_verify_finds_any_changed_byte(converted, tmp_path, capsys):
    for name, content in files(converted).items():
        for at in (0, len(content) // 2, len(content) - 1):
            directory = shutil.copytree(converted, tmp_path / "packed")
            flip(directory / name, at)
            assert main(["verify", str(directory)]) == 1
            out, err = capsys.readouterr()
            assert name in "".join(line for line in out.splitlines() if not line.endswith(" ok"))
            assert err == ""
            shutil.rmtree(directory)


def test_verify_accepts_only_packed_models(model, tmp_path, capsys):
    for directory, said in (
        (model, "is not a packed model"),
        (tmp_path / "nothing", "no such directory"),
        (model / "config.json", "it is a file"),
    ):
        assert main(["verify", str(directory)]) == 2
        assert said in capsys.readouterr().err
