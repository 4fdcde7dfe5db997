"""A malformed model directory, made from a valid one, is a one-line error that names the file."""

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from model_directories import (
    change_json,
    change_weights,
    load_checked,
    split_weights,
    write_directory,
)

from tilewright.errors import TilewrightError

Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_directory(tmp_path_factory.mktemp("good") / "model")


@pytest.fixture(scope="module")
def sharded(good: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = Path(shutil.copytree(good, tmp_path_factory.mktemp("sharded") / "model"))
    split_weights(directory)
    return directory


@pytest.fixture
def directory(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "model"))


def refusal(directory: Path) -> str:
    """The message of the error that loading raises, checked to be one line."""
    with pytest.raises(TilewrightError) as error:
        load_checked(directory)
    message = str(error.value)
    assert message.isprintable()
    assert len(message) < 2000
    return message


def test_the_undamaged_directories_load(good: Path, sharded: Path) -> None:
    assert load_checked(good).config == load_checked(sharded).config


# --- whole files ----------------------------------------------------------------------------------

JSON_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model.safetensors.index.json",
)


def as_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def as_dangling_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("../../blobs/0123")


def as_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


WHOLE: dict[str, Damage] = {
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "prose": lambda path: path.write_text("see the model card"),
    "a list": lambda path: path.write_text("[]"),
    "a number": lambda path: path.write_text("7"),
    "UTF-16": lambda path: path.write_bytes(path.read_text().encode("utf-16")),
    "Latin-1": lambda path: path.write_bytes(b'{"a": "\xe9"}'),
    "zeros": lambda path: path.write_bytes(b"\0" * 100),
    "deep nesting": lambda path: path.write_text('{"a":' * 100_000 + "1" + "}" * 100_000),
    "half a character": lambda path: path.write_text('{"chat_template": "\\ud800"}'),
    "a directory": as_directory,
    "a dangling link": as_dangling_link,
    "a pipe": as_pipe,
}


@pytest.mark.parametrize("file", JSON_FILES)
@pytest.mark.parametrize("damage", WHOLE)
def test_a_file_with_wrong_content_is_named_in_the_error(
    file: str, damage: str, sharded: Path, tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(sharded, tmp_path / "model"))
    WHOLE[damage](directory / file)
    assert str(directory / file) in refusal(directory)


@pytest.mark.parametrize("damage", ["UTF-16", "Latin-1", "a directory", "a dangling link"])
def test_a_chat_template_that_is_not_text_is_refused(damage: str, directory: Path) -> None:
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    WHOLE[damage](directory / "chat_template.jinja")
    assert "chat_template.jinja" in refusal(directory)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file_is_an_error_that_names_the_directory(file: str, directory: Path) -> None:
    (directory / file).unlink()
    assert str(directory) in refusal(directory)


@pytest.mark.parametrize(
    "text", ['"rope_theta": ' + "9" * 5000, '"rope_theta": 1e'], ids=["5000 digits", "no number"]
)
def test_a_number_that_cannot_be_read_is_refused(text: str, directory: Path) -> None:
    path = directory / "config.json"
    path.write_text(path.read_text().rstrip().removesuffix("}") + ", " + text + "}")
    assert str(path) in refusal(directory)


# --- config.json ----------------------------------------------------------------------------------

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
NO_SIZES: list[Any] = ["six", "64.5", -1, 0, 2.5, True, 10**30, [4], {"a": 4}]


@pytest.mark.parametrize("key", SIZES)
@pytest.mark.parametrize("value", NO_SIZES, ids=repr)
def test_a_size_that_is_not_a_positive_integer_is_refused(
    key: str, value: Any, directory: Path
) -> None:
    change_json(directory / "config.json", **{key: value})
    message = refusal(directory)
    assert f"config.json: {key!r} must be an integer from 1 to" in message


ROPE = {"rope_theta": 10000.0, "factor": 2.0}
LLAMA3 = ROPE | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = ROPE | {"rope_type": "yarn", "original_max_position_embeddings": 32}

CONFIGS: list[dict[str, Any]] = [
    # sizes that are valid one by one
    {"num_attention_heads": 6, "num_key_value_heads": 4},
    {"num_attention_heads": 2, "num_key_value_heads": 4},
    {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": None},
    {"head_dim": 15},
    # more than any machine holds
    {"hidden_size": 2**31 - 1, "intermediate_size": 2**31 - 1},
    {"vocab_size": 2**31 - 1},
    {"num_hidden_layers": 10_000},
    {"num_hidden_layers": 10**9},
    {"num_attention_heads": 2**30, "num_key_value_heads": 1, "head_dim": 2**30},
    # other kinds of model
    {"model_type": "gemma3"},
    {"model_type": 7},
    {"model_type": "llama\n"},
    {"model_type": None, "architectures": None},
    {"architectures": "LlamaForCausalLM"},
    {"architectures": [3]},
    {"architectures": ["MistralModel"]},
    {"model_type": "qwen3"},
    {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    {"num_local_experts": 8, "num_experts_per_tok": 2},
    {"hidden_act": "gelu"},
    {"partial_rotary_factor": 0.5},
    {"partial_rotary_factor": "half"},
    {"is_encoder_decoder": True},
    # numbers, flags and names
    {"rms_norm_eps": -1e-6},
    {"rms_norm_eps": float("nan")},
    {"rms_norm_eps": float("inf")},
    {"rms_norm_eps": 10**400},
    {"attention_bias": "no"},
    {"attention_bias": True},
    {"mlp_bias": []},
    {"dtype": "float8_e4m3fn"},
    {"dtype": 16},
    {"dtype": {"text": "bfloat16"}},
    {"dtype": None, "torch_dtype": "bf16"},
    # tokens
    {"eos_token_id": "two"},
    {"eos_token_id": [2, None]},
    {"eos_token_id": [[2]]},
    {"eos_token_id": True},
    {"bos_token_id": [1, 2]},
    {"bos_token_id": []},
    {"bos_token_id": True},
    # RoPE
    {"rope_parameters": "default"},
    {"rope_parameters": [10000.0]},
    {"rope_parameters": {"rope_theta": -1.0}},
    {"rope_parameters": {"rope_theta": "10k"}},
    {"rope_parameters": {"rope_theta": 0}},
    {"rope_parameters": {"rope_theta": float("nan")}},
    {"rope_parameters": ROPE},
    {"rope_parameters": ROPE | {"rope_type": "longrope"}},
    {"rope_parameters": ROPE | {"rope_type": "Linear"}},
    {"rope_parameters": ROPE | {"rope_type": 1}},
    {"rope_parameters": ROPE | {"rope_type": ["linear"]}},
    {"rope_parameters": {"rope_type": "linear"}},
    {"rope_parameters": {"rope_type": "dynamic", "factor": None}},
    {"rope_parameters": {"rope_type": "linear", "factor": 0}},
    {"rope_parameters": {"rope_type": "linear", "factor": -2.0}},
    {"rope_parameters": {"rope_type": "linear", "factor": float("inf")}},
    {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    {"rope_parameters": LLAMA3 | {"low_freq_factor": 8.0}},
    {"rope_parameters": LLAMA3 | {"high_freq_factor": None}},
    {"rope_parameters": LLAMA3 | {"low_freq_factor": 0}},
    {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 32.5}},
    {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 0}},
    {"rope_parameters": YARN | {"attention_factor": -1}},
    {"rope_parameters": YARN | {"truncate": "yes"}},
    {"rope_parameters": YARN | {"mscale": [1]}},
    {"rope_parameters": {k: v for k, v in YARN.items() if k != "factor"}},
    {"rope_scaling": {"type": "su", "factor": 2.0}},
    {"rope_scaling": {"type": "linear"}},
    {"rope_scaling": 2.0},
]

MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
QWEN2 = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True}

WINDOWS: list[dict[str, Any]] = [
    MISTRAL | {"sliding_window": 0},
    MISTRAL | {"sliding_window": -5},
    QWEN2 | {"sliding_window": 0},
    QWEN2 | {"use_sliding_window": "yes"},
    QWEN2 | {"max_window_layers": -1},
    QWEN2 | {"max_window_layers": None},
    QWEN2 | {"layer_types": "full_attention"},
    QWEN2 | {"layer_types": ["full_attention"]},
    QWEN2 | {"layer_types": ["full_attention", "linear_attention"]},
    QWEN2 | {"layer_types": ["full_attention", 1]},
    QWEN2 | {"layer_types": ["sliding_attention"] * 2, "use_sliding_window": False},
    QWEN2 | {"layer_types": ["sliding_attention"] * 2, "sliding_window": None},
    QWEN2 | {"layer_types": ["sliding_attention"] * 10**5},
]


@pytest.mark.parametrize("values", CONFIGS + WINDOWS, ids=lambda values: repr(values)[:80])
def test_an_inconsistent_configuration_is_refused(values: dict[str, Any], directory: Path) -> None:
    change_json(directory / "config.json", **values)
    message = refusal(directory)
    assert str(directory) in message


# --- generation_config.json -----------------------------------------------------------------------

GENERATION: list[dict[str, Any]] = [
    {"eos_token_id": "</s>"},
    {"eos_token_id": {"id": 2}},
    {"do_sample": "yes"},
    {"do_sample": 2},
    {"top_p": "nucleus"},
    {"top_p": -0.1},
    {"temperature": -0.1},
    {"temperature": "cold"},
    {"temperature": float("nan")},
    {"temperature": float("inf")},
    {"temperature": True},
    {"top_k": 50.5},
    {"top_p": 1.01},
    {"top_p": [0.9]},
    {"min_p": -0.1},
    {"min_p": 2},
    {"repetition_penalty": 0},
    {"repetition_penalty": -1.5},
    {"repetition_penalty": {}},
    {"max_new_tokens": 0},
    {"max_new_tokens": -5},
    {"max_new_tokens": 10**20},
]


@pytest.mark.parametrize("values", GENERATION, ids=repr)
def test_a_recommended_setting_out_of_range_is_refused(
    values: dict[str, Any], directory: Path
) -> None:
    change_json(directory / "generation_config.json", **values)
    (key,) = values
    assert f"generation_config.json: {key!r} must be " in refusal(directory)


# --- tokenizer ------------------------------------------------------------------------------------


def bpe(**model: Any) -> dict[str, Any]:
    """A complete tokenizer.json with a small BPE model."""
    vocab = {"a": 0, "b": 1, "é": 2, "ab": 3, "aé": 4}
    base = {"type": "BPE", "vocab": vocab, "merges": [["a", "b"], ["a", "é"]], "unk_token": "a"}
    return {"version": "1.0", "added_tokens": [], "model": base | model}


def template(token_id: int) -> dict[str, Any]:
    """A post-processor that adds a token in front."""
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    special = {"SpecialToken": {"id": "a", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [special, sequence],
        "pair": [special, sequence],
        "special_tokens": {"a": {"id": "a", "ids": [token_id], "tokens": ["a"]}},
    }


TOKENIZERS: dict[str, Any] = {
    "no model": {"version": "1.0"},
    "a model of no kind": bpe(type="Markov"),
    "no vocabulary": bpe(vocab={}, merges=[], unk_token=None),
    "ids beyond the model": bpe(vocab={"a": 0, "b": 200}, merges=[]),
    "ids beyond 32 bits": bpe(vocab={"a": 0, "b": 2**32}, merges=[]),
    "negative ids": bpe(vocab={"a": -1}, merges=[]),
    "ids as text": bpe(vocab={"a": "0"}, merges=[]),
    "merges of unknown tokens": bpe(merges=[["a", "z"]]),
    "merges to unknown tokens": bpe(merges=[["b", "b"]]),
    "merges of three": bpe(merges=[["a", "b", "a"]]),
    "merges with no space": bpe(merges=["ab"]),
    "merges shorter than the prefix": bpe(continuing_subword_prefix="éé"),
    "dropout above one": bpe(dropout=7.5),
    "an unknown token that is unknown": bpe(unk_token="<unk>"),
    "an added token without content": bpe() | {"added_tokens": [{"id": 3}]},
    "an added token with flags of text": bpe()
    | {"added_tokens": [{"id": 5, "content": "x", "special": "yes"}]},
    "a normalizer of no kind": bpe() | {"normalizer": {"type": "Lower"}},
    "a pattern that is no pattern": bpe()
    | {
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": "(?<"},
            "behavior": "Isolated",
            "invert": False,
        }
    },
    "a decoder of no kind": bpe() | {"decoder": "fast"},
    "a decoder that strips an empty token": bpe()
    | {
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "a"}, "content": ""},
                {"type": "Strip", "content": " ", "start": 0, "stop": 1},
            ],
        }
    },
    "a vocabulary of control characters": bpe(vocab={"a": 0}, merges=[["a", "\0"]]),
    "a post-processor with ids beyond the model": bpe() | {"post_processor": template(999)},
    "a post-processor without its tokens": bpe()
    | {"post_processor": template(0) | {"special_tokens": {}}},
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_an_invalid_tokenizer_is_refused(kind: str, directory: Path) -> None:
    path = directory / "tokenizer.json"
    path.write_text(json.dumps(TOKENIZERS[kind]))
    assert str(path) in refusal(directory)


TOKENIZER_CONFIGS: list[dict[str, Any]] = [
    {"bos_token": 1},
    {"bos_token": ["t1"]},
    {"eos_token": {"lstrip": True}},
    {"eos_token": {"content": 2}},
    {"eos_token": {"content": "t2", "lstrip": "no"}},
    {"additional_special_tokens": [3]},
    {"chat_template": 1},
    {"chat_template": {"default": "x"}},
    {"chat_template": ["x"]},
    {"chat_template": [{"name": "default"}]},
    {"chat_template": [{"name": "default", "template": None}]},
    {"added_tokens_decoder": [{"content": "t1"}]},
    {"added_tokens_decoder": {"one": {"content": "t1"}}},
    {"added_tokens_decoder": {"-1": {"content": "t1"}}},
    {"added_tokens_decoder": {"²": {"content": "t1"}}},
    {"added_tokens_decoder": {str(10**30): {"content": "t1"}}},
    {"added_tokens_decoder": {"1": "t1"}},
    {"added_tokens_decoder": {"1": {"content": None}}},
    {"added_tokens_decoder": {"1": {"content": "t1", "special": 2}}},
]


@pytest.mark.parametrize("values", TOKENIZER_CONFIGS, ids=repr)
def test_an_invalid_tokenizer_configuration_is_refused(
    values: dict[str, Any], directory: Path
) -> None:
    change_json(directory / "tokenizer_config.json", **values)
    assert "tokenizer_config.json" in refusal(directory)


# --- weights --------------------------------------------------------------------------------------


def overwrite(offset: int, content: bytes) -> Damage:
    def damage(path: Path) -> None:
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(content)

    return damage


def cut(size: int) -> Damage:
    return lambda path: os.truncate(path, size if size >= 0 else path.stat().st_size + size)


WEIGHTS: dict[str, Damage] = {
    "empty": cut(0),
    "four bytes": cut(4),
    "half a header": cut(300),
    "one byte short": cut(-1),
    "half": cut(40_000),
    "one byte long": lambda path: os.truncate(path, path.stat().st_size + 1),
    "a sparse terabyte": lambda path: os.truncate(path, 2**40),
    "a pointer": lambda path: path.write_text(
        "version https://git-lfs.github.com/spec/v1\nsize 9\n"
    ),
    "a zip file": overwrite(0, b"PK\x03\x04"),
    "a longer header": overwrite(0, struct.pack("<Q", 10**6)),
    "a shorter header": overwrite(0, struct.pack("<Q", 100)),
    "a header of 2^64": overwrite(0, b"\xff" * 8),
    "a broken header": overwrite(8, b"}}}}"),
    "a header with zeros": overwrite(20, b"\0" * 40),
    "a directory": as_directory,
    "a dangling link": as_dangling_link,
    "a pipe": as_pipe,
}


@pytest.mark.parametrize("damage", WEIGHTS)
def test_a_damaged_weight_file_is_named_in_the_error(damage: str, directory: Path) -> None:
    path = directory / "model.safetensors"
    WEIGHTS[damage](path)
    assert str(path) in refusal(directory)


@pytest.mark.parametrize("damage", WEIGHTS)
def test_a_damaged_shard_is_named_in_the_error(damage: str, sharded: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(sharded, tmp_path / "model"))
    path = directory / "model-00002-of-00003.safetensors"
    WEIGHTS[damage](path)
    assert str(path) in refusal(directory)


TENSORS: dict[str, Damage] = {
    "no norm": lambda d: change_weights(d, "model.norm.weight"),
    "no layer": lambda d: change_weights(
        d, *[f"model.layers.1.mlp.{n}_proj.weight" for n in ("up", "gate", "down")]
    ),
    "a prefix": lambda d: change_weights(
        d, "model.norm.weight", base__model__norm__weight=torch.zeros(64)
    ),
    "a transposed head": lambda d: change_weights(d, lm_head__weight=torch.zeros(64, 131)),
    "a flat embedding": lambda d: change_weights(
        d, model__embed_tokens__weight=torch.zeros(131 * 64)
    ),
    "whole numbers": lambda d: change_weights(
        d, model__norm__weight=torch.zeros(64, dtype=torch.int8)
    ),
}


@pytest.mark.parametrize("damage", TENSORS)
def test_tensors_that_do_not_match_the_configuration_are_refused(
    damage: str, directory: Path
) -> None:
    TENSORS[damage](directory)
    assert "the weights do not fit" in refusal(directory)


NORM = "model.norm.weight"
INDEXES: dict[str, Callable[[dict[str, Any]], object]] = {
    "no map": lambda index: index.pop("weight_map"),
    "an empty map": lambda index: index["weight_map"].clear(),
    "a list of files": lambda index: index.update(weight_map=["model-00001-of-00003.safetensors"]),
    "missing files": lambda index: index.update(weight_map={NORM: "model-00009.safetensors"}),
    "a parent": lambda index: index["weight_map"].update({NORM: "../model.safetensors"}),
    "an absolute path": lambda index: index["weight_map"].update({NORM: "/dev/zero"}),
    "a number": lambda index: index["weight_map"].update({NORM: 1}),
    "null": lambda index: index["weight_map"].update({NORM: None}),
    "a directory": lambda index: index["weight_map"].update({NORM: "."}),
    "another file": lambda index: index["weight_map"].update({NORM: "config.json"}),
    "another shard": lambda index: index["weight_map"].update(
        dict.fromkeys(index["weight_map"], "model-00001-of-00003.safetensors")
    ),
}


@pytest.mark.parametrize("damage", INDEXES)
def test_an_invalid_index_is_refused(damage: str, sharded: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(sharded, tmp_path / "model"))
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    INDEXES[damage](index)
    path.write_text(json.dumps(index))
    assert str(directory) in refusal(directory)


# --- random changes -------------------------------------------------------------------------------

ODD: list[Any] = [
    None,
    True,
    0,
    -1,
    3,
    2**31,
    2**64,
    0.5,
    float("nan"),
    "",
    "12",
    "\n",
    [],
    [1],
    {},
]


def paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of the values inside a JSON value; for long containers, the first 40."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for key, inner in list(pairs)[:40]:
        found.append((*path, key))
        if isinstance(inner, dict | list):
            found += paths(inner, (*path, key))
    return found


def changed_by_chance(document: Any, draw: random.Random) -> Any:
    document = deepcopy(document)
    for _ in range(draw.choice([1, 1, 2, 3])):
        *parents, last = draw.choice(paths(document))
        inner = document
        for key in parents:
            inner = inner[key]
        match draw.choice(["replace", "remove", "repeat"]):
            case "replace":
                inner[last] = deepcopy(draw.choice(ODD))
            case "remove":
                del inner[last]
            case "repeat" if isinstance(inner, list):
                inner.append(deepcopy(inner[last]))
            case "repeat":
                inner[draw.choice(["type", "id", "content", "factor"])] = deepcopy(inner[last])
    return document


@pytest.mark.parametrize("file", JSON_FILES)
def test_randomly_changed_json_loads_or_is_a_one_line_error(
    file: str, sharded: Path, tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(sharded, tmp_path / "model"))
    document = json.loads((directory / file).read_text())
    draw = random.Random(file)
    messages = []
    for _ in range(60):
        (directory / file).write_text(json.dumps(changed_by_chance(document, draw)))
        try:
            load_checked(directory)
        except TilewrightError as error:
            messages.append(str(error))
    assert messages
    assert all(message.isprintable() for message in messages)
