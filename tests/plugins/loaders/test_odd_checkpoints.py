"""Whole checkpoints with odd names, extra tensors or odd files load as with transformers, and a
directory that is no checkpoint is named as what it is."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gguf_files import write
from model_directories import change_json, load, split_weights
from reference_models import CONFIGS, random_model, write_model
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from tilewright import GenerateConfig, LLMEngine, RuntimeConfig
from tilewright.errors import ModelError
from tilewright.types import LoadedModel

PROMPT = list(range(3, 12))
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD, NORM = "lm_head.weight", "model.norm.weight"

Tensors = dict[str, Tensor]
Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("whole") / "model"
    write_model("llama-llama3", directory)
    return directory


@pytest.fixture
def directory(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "model"))


@pytest.fixture
def tied(tmp_path: Path) -> tuple[PreTrainedModel, Path]:
    return write_model("qwen3-tied", tmp_path / "tied"), tmp_path / "tied"


def greedy(model: PreTrainedModel) -> list[int]:
    ids = list(PROMPT)
    with torch.no_grad():
        for _ in range(6):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(PROMPT) :]


def of_transformers(directory: Path) -> list[int]:
    return greedy(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32))


def generated(source: Path | str) -> tuple[list[int], LoadedModel]:
    asked = GenerateConfig(max_new_tokens=6, temperature=0.0, ignore_eos=True)
    with LLMEngine.from_plugins() as engine:
        loaded = engine.init_model("m", source, RuntimeConfig(weight_dtype="float32"))
        return list(engine.generate_result("m", PROMPT, asked).token_ids), loaded


def warned(source: Path | str, expected: list[int]) -> str:
    """The only warning of a model that generates the expected tokens, checked to be one line."""
    tokens, loaded = generated(source)
    assert tokens == expected
    (warning,) = loaded.warnings
    assert warning.isprintable()
    assert len(warning) < 600
    return warning


def refusal(source: Path | str) -> str:
    with LLMEngine.from_plugins() as engine, pytest.raises(ModelError) as raised:
        engine.init_model("m", source, RuntimeConfig(weight_dtype="float32"))
    message = str(raised.value)
    assert message.isprintable()
    assert len(message) < 700
    return message


def stored(directory: Path) -> Tensors:
    return {name: tensor.clone() for name, tensor in load_file(directory / SINGLE).items()}


def store(directory: Path, tensors: Tensors) -> None:
    save_file({n: t.contiguous() for n, t in tensors.items()}, directory / SINGLE, {"format": "pt"})


# --- tied matrices --------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", ["both", HEAD, "model.embed_tokens.weight"])
@pytest.mark.parametrize("pickled", [False, True])
def test_either_name_of_a_tied_matrix_may_be_stored(
    tied: tuple[PreTrainedModel, Path], kept: str, pickled: bool
) -> None:
    model, directory = tied
    state = dict(model.state_dict())
    if kept != "both":
        matrix = state.pop(HEAD)
        state.pop("model.embed_tokens.weight")
        state[kept] = matrix
    (directory / SINGLE).unlink()
    if pickled:
        torch.save(state, directory / "pytorch_model.bin")
    elif kept == "both":
        save_model(model, str(directory / SINGLE), metadata={"format": "pt"})
    else:
        store(directory, state)
    assert of_transformers(directory) == greedy(model)
    tokens, loaded = generated(directory)
    assert tokens == greedy(model)
    assert loaded.config.tie_word_embeddings
    assert loaded.warnings == ()


def test_an_index_entry_for_the_head_of_a_tied_model_is_not_a_head(
    tied: tuple[PreTrainedModel, Path],
) -> None:
    model, directory = tied
    split_weights(directory)
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"][HEAD] = "model-00003-of-00003.safetensors"
    (directory / INDEX).write_text(json.dumps(index))
    assert of_transformers(directory) == greedy(model)
    assert HEAD in warned(directory, greedy(model))


# --- prefixes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("architectures", [["Qwen3Model"], ["Qwen3ForCausalLM"], None])
def test_a_tied_model_that_was_saved_without_its_head_loads(
    tied: tuple[PreTrainedModel, Path], architectures: list[str] | None
) -> None:
    model, directory = tied
    (directory / SINGLE).unlink()
    model.model.save_pretrained(directory)
    change_json(directory / "config.json", architectures=architectures)
    assert of_transformers(directory) == greedy(model)
    assert "the tensors' names have no prefix" in warned(directory, greedy(model))


def test_a_base_model_without_a_tied_head_is_refused_for_its_missing_head(directory: Path) -> None:
    tensors = stored(directory)
    del tensors[HEAD]
    store(directory, {n.removeprefix("model."): t for n, t in tensors.items()})
    change_json(directory / "config.json", architectures=["LlamaModel"])
    message = refusal(directory)
    assert "missing: lm_head.weight [131, 64]; without it, the configuration needs tie" in message


def body(prefix: str) -> Callable[[str], str]:
    """Renames all tensors but the head."""
    return lambda name: name.replace("model.", prefix, 1) if name.startswith("model.") else name


PREFIXES: dict[str, tuple[str, Callable[[str], str]]] = {
    "a wrapper of DistributedDataParallel": ("module.model.", lambda n: f"module.{n}"),
    "a compiled model": ("_orig_mod.model.", lambda n: f"_orig_mod.{n}"),
    "both": ("module._orig_mod.model.", lambda n: f"module._orig_mod.{n}"),
    "a merged adapter": ("base_model.model.model.", lambda n: f"base_model.model.{n}"),
    "the prefix twice": ("model.model.", lambda n: f"model.{n}"),
    "a text model of one with images": ("model.language_model.", body("model.language_model.")),
    "an older one": ("language_model.model.", lambda n: f"language_model.{n}"),
    "its body alone": ("language_model.model.", body("language_model.model.")),
}


@pytest.mark.parametrize("kind", PREFIXES)
def test_a_whole_model_under_another_prefix_loads(kind: str, directory: Path) -> None:
    prefix, renamed = PREFIXES[kind]
    expected = of_transformers(directory)
    store(directory, {renamed(name): tensor for name, tensor in stored(directory).items()})
    assert f"begin with '{prefix}'" in warned(directory, expected)


def test_a_prefix_is_read_only_where_one_whole_model_has_it(directory: Path) -> None:
    tensors = stored(directory)
    two = {f"{p}.{n}": t.clone() for p in ("ema", "module") for n, t in tensors.items()}
    store(directory, two)
    assert "missing: model.embed_tokens.weight" in refusal(directory)
    module = {f"module.{n}": t for n, t in tensors.items()}
    store(directory, {n: t for n, t in module.items() if n != f"module.{NORM}"})
    assert "missing: model.embed_tokens.weight" in refusal(directory)
    part = {n: t.clone() for n, t in module.items() if "layers.0" in n}
    store(directory, tensors | part)
    _, loaded = generated(directory)
    assert "ignored" in loaded.warnings[0]


# --- extra tensors --------------------------------------------------------------------------------


def more(**added: Tensor) -> Change:
    named = {name.replace("__", "."): tensor for name, tensor in added.items()}
    return lambda directory: store(directory, stored(directory) | named)


def multiplied(ending: str) -> Change:
    def add(directory: Path) -> None:
        tensors = stored(directory)
        copies = {n.replace("layers.0.", ending): t.clone() for n, t in tensors.items()}
        store(directory, copies | tensors)

    return add


EXTRA: dict[str, tuple[Change, list[str]]] = {
    "a value head": (
        more(v_head__summary__weight=torch.ones(1, 64), v_head__summary__bias=torch.ones(1)),
        ["(2 in all): v_head.summary.bias, v_head.summary.weight"],
    ),
    "a score head": (more(score__weight=torch.ones(2, 64)), ["(1 in all): score.weight"]),
    "a bias of the head": (
        more(lm_head__bias=torch.randn(131)),
        ["(1 in all): lm_head.bias", "transformers ignores lm_head.bias too"],
    ),
    "a bias that the configuration lacks": (
        more(model__layers__0__self_attn__q_proj__bias=torch.randn(64)),
        ["q_proj.bias"],
    ),
    "a buffer of old checkpoints": (
        more(model__layers__0__self_attn__masked_bias=torch.ones(1)),
        ["masked_bias"],
    ),
    "a scale of the KV cache": (
        more(model__layers__0__self_attn__k_proj__k_scale=torch.ones(1)),
        ["k_scale"],
    ),
    "more layers": (multiplied("layers.2."), ["(9 in all): model.layers.2.", "and 6 more"]),
    "a layer that predicts further tokens": (multiplied("mtp.0."), ["(9 in all): model.mtp.0."]),
    "fewer layers in the configuration": (
        lambda directory: change_json(directory / "config.json", num_hidden_layers=1),
        ["(9 in all): model.layers.1."],
    ),
}


@pytest.mark.parametrize("kind", EXTRA)
def test_tensors_that_the_configuration_does_not_need_are_a_warning(
    kind: str, directory: Path
) -> None:
    change, said = EXTRA[kind]
    change(directory)
    warning = warned(directory, of_transformers(directory))
    assert "tensors that the configuration does not need are ignored" in warning
    assert [text for text in said if text not in warning] == []


def shortened() -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model of two layers, and the one that its first layer makes."""
    whole, first = random_model(CONFIGS["llama-llama3"]), random_model(CONFIGS["llama-llama3"])
    first.model.layers = first.model.layers[:1]
    return whole, first


def test_more_layers_of_a_gguf_file_are_a_warning(tmp_path: Path) -> None:
    whole, first = shortened()
    path = write(whole, tmp_path / "model.gguf", changed={"llama.block_count": 1})
    tokens, loaded = generated(path)
    assert tokens == greedy(first)
    assert "are ignored (9 in all): model.layers.1." in loaded.warnings[-1]


def test_the_only_gguf_file_of_a_directory_is_loaded(tmp_path: Path) -> None:
    whole, _ = shortened()
    write(whole, tmp_path / "model.gguf")
    (tmp_path / "mmproj-model.gguf").write_bytes(b"GGUF")
    assert generated(tmp_path)[0] == greedy(whole)
    (tmp_path / "config.json").write_text("{}")
    assert generated(tmp_path)[0] == greedy(whole)
    shutil.copy(tmp_path / "model.gguf", tmp_path / "other.gguf")
    said = "give one of the files in it: 'model.gguf', 'other.gguf'"
    assert said in refusal(tmp_path)
    (tmp_path / "config.json").unlink()
    assert "models; give the path of one: 'mmproj-model.gguf', 'model.gguf'" in refusal(tmp_path)


@pytest.mark.parametrize("name", [SINGLE, "config.json", "tokenizer.json"])
def test_a_file_of_a_model_is_refused_with_its_directory(name: str, directory: Path) -> None:
    said = f"is one file of the model in its directory: give the directory, {str(directory)!r}"
    assert said in refusal(directory / name)


# --- files ----------------------------------------------------------------------------------------


def indexed(change: Callable[[Path, dict[str, str]], object]) -> Change:
    def made(directory: Path) -> None:
        weight_map = split_weights(directory)
        change(directory, weight_map)
        (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    return made


def into_second(directory: Path, weight_map: dict[str, str]) -> None:
    """Store the final norm in one more shard."""
    home = weight_map[NORM]
    other = directory / next(file for file in weight_map.values() if file != home)
    tensors = {n: t.clone() for n, t in load_file(other).items()}
    tensors[NORM] = load_file(directory / home)[NORM]
    save_file(tensors, other, {"format": "pt"})


def elsewhere(directory: Path, weight_map: dict[str, str]) -> None:
    weight_map[NORM] = next(file for file in weight_map.values() if file != weight_map[NORM])


INVERSE = "model.layers.0.self_attn.masked_bias"
FIRST_SHARD = "model-00001-of-00003.safetensors"

INDEXES: dict[str, tuple[Change, str]] = {
    "an entry that no shard has": (
        indexed(lambda _, m: m.update({INVERSE: FIRST_SHARD})),
        f"are ignored (1 in all): {INVERSE}",
    ),
    "a tensor in two shards": (indexed(into_second), f"{NORM} is in model-"),
    "a tensor that is not listed": (indexed(lambda _, m: m.pop(NORM)), "listed in none"),
    "a tensor of another shard": (indexed(elsewhere), f"{NORM} is in model-"),
}


@pytest.mark.parametrize("kind", INDEXES)
def test_an_index_may_differ_from_its_shards(kind: str, directory: Path) -> None:
    change, said = INDEXES[kind]
    change(directory)
    assert said in warned(directory, of_transformers(directory))


def test_an_index_with_a_byte_order_mark_is_read_with_a_warning(directory: Path) -> None:
    expected = of_transformers(directory)  # which refuses the mark
    indexed(lambda _, m: None)(directory)
    (directory / INDEX).write_text((directory / INDEX).read_text(), "utf-8-sig")
    assert f"{INDEX}: starts with a byte order mark" in warned(directory, expected)


@pytest.mark.parametrize("name", [INVERSE, NORM])
def test_an_index_may_name_an_absent_file_for_tensors_that_are_elsewhere_or_not_needed(
    name: str, directory: Path
) -> None:
    expected = of_transformers(directory)
    indexed(lambda _, m: m.update({name: "model-00004-of-00003.safetensors"}))(directory)
    assert name in warned(directory, expected)


def test_a_missing_shard_with_needed_tensors_is_named(directory: Path) -> None:
    split_weights(directory)
    (directory / "model-00002-of-00003.safetensors").unlink()
    assert (
        "1 of the 3 files that it names are missing: model-00002-of-00003.safetensors; download"
    ) in refusal(directory)


def test_the_index_decides_between_two_tensors_of_one_name(directory: Path) -> None:
    expected = of_transformers(directory)
    weight_map = split_weights(directory)
    home = weight_map[NORM]
    for file in set(weight_map.values()) - {home}:
        tensors = {n: t.clone() for n, t in load_file(directory / file).items()}
        save_file(tensors | {NORM: torch.zeros(64)}, directory / file)
    assert f"{NORM} is in " in warned(directory, expected)
    index = json.loads((directory / INDEX).read_text())
    del index["weight_map"][NORM]
    (directory / INDEX).write_text(json.dumps(index))
    assert f"tensor {NORM} is in two shards" in refusal(directory)


def renamed(name: str) -> Change:
    return lambda directory: (directory / SINGLE).rename(directory / name)


def without_index(directory: Path) -> None:
    split_weights(directory)
    (directory / INDEX).unlink()


def pickles_without_index(directory: Path) -> None:
    tensors = sorted(stored(directory).items())
    for i in range(2):
        part = dict(tensors[i::2])
        torch.save(part, directory / f"pytorch_model-{i + 1:05}-of-00002.bin")
    (directory / SINGLE).unlink()


def pickled_variant(directory: Path) -> None:
    torch.save(stored(directory), directory / "pytorch_model.fp16.bin")
    (directory / SINGLE).unlink()


FILES: dict[str, tuple[Change, str]] = {
    "one shard": (renamed("model-00001-of-00001.safetensors"), "model-00001-of-00001"),
    "shards": (without_index, "reading model-00001-of-00003.safetensors, model-00002-of-00003"),
    "a variant": (renamed("model.fp16.safetensors"), "reading model.fp16.safetensors"),
    "pickled shards": (pickles_without_index, "reading pytorch_model-00001-of-00002.bin"),
    "a pickled variant": (pickled_variant, "reading pytorch_model.fp16.bin"),
}


def test_other_safetensors_files_do_not_hide_pickled_weights(directory: Path) -> None:
    torch.save(stored(directory), directory / "pytorch_model.bin")
    (directory / SINGLE).rename(directory / "optimizer.safetensors")
    tokens, loaded = generated(directory)
    assert tokens == of_transformers(directory)
    assert loaded.warnings == ()


@pytest.mark.parametrize("kind", FILES)
def test_the_only_set_of_weights_may_have_other_names(kind: str, directory: Path) -> None:
    expected = of_transformers(directory)
    change, said = FILES[kind]
    change(directory)
    assert said in warned(directory, expected)


def test_shards_without_an_index_must_all_be_there(directory: Path) -> None:
    without_index(directory)
    (directory / "model-00002-of-00003.safetensors").unlink()
    assert "1 of the 3 shards are missing: model-00002-of-00003.safetensors" in refusal(directory)


def test_two_variants_are_refused(directory: Path) -> None:
    shutil.copy(directory / SINGLE, directory / "model.fp16.safetensors")
    (directory / SINGLE).rename(directory / "model.bf16.safetensors")
    assert "model.bf16.safetensors, model.fp16.safetensors" in refusal(directory)


# --- quantised weights ----------------------------------------------------------------------------


def replaced(make: Callable[[str, Tensor], Tensors]) -> Change:
    """Replace each projection, of a name without ``.weight``."""

    def change(directory: Path) -> None:
        tensors = stored(directory)
        projections = {n: tensors.pop(n) for n in list(tensors) if "_proj" in n}
        for name, tensor in projections.items():
            tensors |= make(name.removesuffix(".weight"), tensor)
        store(directory, tensors)

    return change


def whole_numbers(*endings: str) -> Change:
    return replaced(
        lambda name, _: {f"{name}.{e}": torch.ones(4, 4, dtype=torch.int32) for e in endings}
    )


def beside(dtype: torch.dtype, *endings: str) -> Change:
    return replaced(
        lambda name, t: (
            {f"{name}.weight": t.to(dtype)} | {f"{name}.{e}": torch.ones(1) for e in endings}
        )
    )


QUANTISED: dict[str, tuple[Change, str]] = {
    "GPTQ": (whole_numbers("g_idx", "qweight", "qzeros", "scales"), "GPTQ or AWQ"),
    "AWQ": (whole_numbers("qweight", "qzeros", "scales"), "GPTQ or AWQ"),
    "MLX": (beside(torch.int32, "scales", "biases"), "MLX"),
    "bitsandbytes": (beside(torch.uint8, "weight.absmax", "weight.quant_map"), "bitsandbytes"),
    "bitsandbytes in 8 bits": (beside(torch.int8, "SCB"), "bitsandbytes"),
    "compressed-tensors": (whole_numbers("weight_packed", "weight_shape"), "compressed-tensors"),
    "FP8": (beside(torch.float8_e4m3fn, "weight_scale_inv"), "FP8"),
    "FP8 without scales": (beside(torch.float8_e5m2), "FP8, float8_e5m2"),
    "scales of weights that were widened": (beside(torch.bfloat16, "weight_scale_inv"), "FP8"),
    "INT8": (beside(torch.int8, "weight_scale"), "FP8, INT8 or FP4"),
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_weights_are_refused_by_the_name_of_their_scheme(
    kind: str, directory: Path
) -> None:
    change, scheme = QUANTISED[kind]
    change(directory)
    message = refusal(directory)
    assert f"the weights are quantised ({scheme}" in message
    assert "take the model's checkpoint in bfloat16 or float16, or a GGUF file of it" in message


CONFIGURED = {
    "gptq, 4 bits": {"quant_method": "gptq", "bits": 4},
    "MLX, 4 bits": {"group_size": 64, "bits": 4},
    "compressed-tensors": {"quant_method": "compressed-tensors", "config_groups": {}},
}


@pytest.mark.parametrize("scheme", CONFIGURED)
def test_a_quantisation_in_the_configuration_is_named(scheme: str, directory: Path) -> None:
    change_json(directory / "config.json", quantization_config=CONFIGURED[scheme])
    assert f"the weights are quantised ({scheme}), which" in refusal(directory)


def test_an_adapter_that_is_not_merged_is_refused(directory: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.lora_A.weight"
    store(directory, stored(directory) | {name: torch.zeros(4, 64)})
    assert "a LoRA adapter that is not merged" in refusal(directory)


def test_weights_in_float64_load(directory: Path) -> None:
    store(directory, {name: tensor.double() for name, tensor in stored(directory).items()})
    tokens, loaded = generated(directory)
    assert tokens == of_transformers(directory)
    assert loaded.warnings == ()


# --- what is not a model --------------------------------------------------------------------------


def write_adapter(directory: Path, **settings: object) -> None:
    directory.mkdir(exist_ok=True)
    change_json(directory / "adapter_config.json", peft_type="LORA", **settings)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({name: torch.zeros(8, 64)}, directory / "adapter_model.safetensors")


@pytest.mark.parametrize("with_config", [False, True])
def test_an_adapter_is_refused_with_the_name_of_its_base_model(
    with_config: bool, directory: Path, tmp_path: Path
) -> None:
    write_adapter(tmp_path / "lora", base_model_name_or_path="org/base")
    if with_config:
        shutil.copy(directory / "config.json", tmp_path / "lora")
    message = refusal(tmp_path / "lora")
    assert "holds a LoRA adapter of the base model 'org/base', not a whole model: merge" in message


@pytest.mark.parametrize("content", ["", "[]", '{"base_model_name_or_path": "a\\nb"}'])
def test_a_damaged_adapter_is_named_too(content: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(content)
    assert "adapter of the base model" in refusal(tmp_path)


def test_an_adapter_beside_a_model_is_a_warning(directory: Path) -> None:
    expected = of_transformers(directory)
    write_adapter(directory, base_model_name_or_path="org/base")
    said = "a LoRA adapter of the base model 'org/base' beside the model is not applied"
    assert said in warned(directory, expected)
    (directory / "pytorch_model.bin").touch()
    torch.save(stored(directory), directory / "pytorch_model.bin")
    (directory / SINGLE).unlink()
    assert said in warned(directory, expected)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["consolidated.00.pth", "params.json", "tokenizer.model"], "Meta's own .*_llama_weights"),
        (["consolidated.safetensors", "params.json", "tekken.json"], "Mistral's own .*_mistral_"),
    ],
)
def test_other_layouts_are_named_with_what_converts_them(
    files: list[str], said: str, tmp_path: Path
) -> None:
    for name in files:
        (tmp_path / name).write_bytes(b"{}")
    assert re.search(said, refusal(tmp_path))


def test_weights_without_a_configuration_are_named(directory: Path) -> None:
    (directory / "config.json").unlink()
    assert f"holds weights ({SINGLE}) but no config.json" in refusal(directory)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a Git LFS pointer"),
        ("\n<!DOCTYPE html><html>Sign in</html>", "a web page"),
    ],
)
def test_a_file_that_was_not_downloaded_is_named(
    name: str, content: str, said: str, directory: Path
) -> None:
    (directory / name).write_text(content)
    assert f"{name}: {said} instead of the file; " in refusal(directory)


def test_an_empty_configuration_is_named(directory: Path) -> None:
    (directory / "generation_config.json").write_text("")
    assert "generation_config.json: an empty file, expected a JSON object" in refusal(directory)


def test_a_folder_of_models_lists_them(directory: Path) -> None:
    (directory.parent / "notes").mkdir()
    message = refusal(directory.parent)
    assert message.endswith("holds models; give the path of one: 'model'")


# --- the hub's cache ------------------------------------------------------------------------------


def cached(directory: Path, *commits: str, main: str | None) -> Path:
    folder = directory.parent / "models--org--tiny-1.5B"
    (folder / "refs").mkdir(parents=True)
    for commit in commits:
        shutil.copytree(directory, folder / "snapshots" / commit)
    if main is not None:
        (folder / "refs" / "main").write_text(main)
    return folder


def test_a_folder_of_the_cache_is_loaded_from_its_snapshot(directory: Path) -> None:
    expected = of_transformers(directory)
    folder = cached(directory, "aaa", "bbb", main="bbb")
    assert f"{folder / 'snapshots' / 'bbb'} is loaded" in warned(folder, expected)
    (folder / "refs" / "main").write_text("ccc")
    message = refusal(folder)
    assert "2 snapshots" in message
    assert str(folder / "snapshots" / "aaa") in message
    shutil.rmtree(folder / "snapshots" / "bbb")
    assert f"{folder / 'snapshots' / 'aaa'} is loaded" in warned(folder, expected)
    assert "models--org--tiny-1.5B" in refusal(folder.parent)


@pytest.mark.parametrize("main", ["a" * 5_000, "..", "/etc", "", "a\0b", "a pipe"])
def test_a_ref_of_the_cache_that_names_no_snapshot_is_as_none(main: str, directory: Path) -> None:
    folder = cached(directory, "aaa", main=main)
    if main == "a pipe":
        (folder / "refs" / "main").unlink()
        os.mkfifo(folder / "refs" / "main")
    assert load(folder).source == str(folder / "snapshots" / "aaa")


def test_a_folder_of_the_cache_without_a_complete_snapshot_is_refused(directory: Path) -> None:
    folder = cached(directory, main="aaa")
    said = "without a complete snapshot: expected snapshots/COMMIT/config.json; download it with "
    assert f"{said}`hf download org/tiny-1.5B`" in refusal(folder)
    (folder / "snapshots" / "aaa").mkdir(parents=True)
    (folder / "snapshots" / "aaa" / "README.md").touch()
    assert said in refusal(folder)
