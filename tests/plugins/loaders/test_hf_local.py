"""hf-local reads a directory as transformers does."""

import json
import random
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve
from model_directories import (
    change_json,
    change_weights,
    load,
    load_checked,
    write_directory,
)
from reference_models import CONFIGS, write_model
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import ByteLevel, TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tilewright import plugins
from tilewright.chat import Chat
from tilewright.errors import ModelError
from tilewright.text import Text
from tilewright.types import GenerateConfig, ModelConfig, RopeConfig
from tilewright.weights import check_tensors, expected_tensors
from tilewright_hf.architecture import FAMILIES, model_config
from tilewright_hf.files import JsonObject

SMALL = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": 5,
    "bos_token_id": 4,
}

PUBLISHED: dict[str, dict[str, Any]] = {
    "Qwen3-14B": {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 5120,
        "intermediate_size": 17408,
        "max_position_embeddings": 40960,
        "max_window_layers": 40,
        "model_type": "qwen3",
        "num_attention_heads": 40,
        "num_hidden_layers": 40,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "Qwen2.5-0.5B": {
        "architectures": ["Qwen2ForCausalLM"],
        "bos_token_id": 151643,
        "eos_token_id": 151643,
        "hidden_act": "silu",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "max_position_embeddings": 32768,
        "max_window_layers": 24,
        "model_type": "qwen2",
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_mrope": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "Qwen2.5-7B-Instruct with YaRN": {
        "architectures": ["Qwen2ForCausalLM"],
        "eos_token_id": 151645,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "max_position_embeddings": 32768,
        "model_type": "qwen2",
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rope_scaling": {
            "factor": 4.0,
            "original_max_position_embeddings": 32768,
            "type": "yarn",
        },
        "rope_theta": 1000000.0,
        "torch_dtype": "bfloat16",
        "vocab_size": 152064,
    },
    "Llama-3.1-8B-Instruct": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009],
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 128256,
    },
    "Llama-2-7b": {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "rms_norm_eps": 1e-05,
        "torch_dtype": "float16",
        "vocab_size": 32000,
    },
    "Mistral-7B-v0.1": {
        "architectures": ["MistralForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "torch_dtype": "bfloat16",
        "vocab_size": 32000,
    },
    "Mistral-Nemo": {
        "architectures": ["MistralForCausalLM"],
        "head_dim": 128,
        "hidden_size": 5120,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "model_type": "mistral",
        "num_attention_heads": 32,
        "num_hidden_layers": 40,
        "num_key_value_heads": 8,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "torch_dtype": "bfloat16",
        "vocab_size": 131072,
    },
    "transformers 5 style": {
        "architectures": ["Qwen3ForCausalLM"],
        "dtype": "bfloat16",
        "head_dim": 128,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "layer_types": ["full_attention"] * 28,
        "max_position_embeddings": 40960,
        "model_type": "qwen3",
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
        "tie_word_embeddings": True,
        "vocab_size": 151936,
    },
}

ROPES: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 2},
    {"rope_type": "dynamic", "factor": 4.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 2, "high_freq_factor": 8},
    {"rope_type": "yarn", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 64},
    {
        "rope_type": "yarn",
        "factor": 16.0,
        "original_max_position_embeddings": 32,
        "attention_factor": 0.8,
        "beta_fast": 24,
        "beta_slow": 2,
        "mscale": 0.7,
        "mscale_all_dim": 0.9,
        "truncate": False,
    },
]


def ours(config: dict[str, Any]) -> ModelConfig:
    return model_config(JsonObject("config.json", config))[0]


def theirs(values: dict[str, Any]) -> Any:
    config = CONFIG_MAPPING[values["model_type"]].from_dict(json.loads(json.dumps(values)))
    config.standardize_rope_params()
    return config


def expect_same(values: dict[str, Any]) -> None:
    """Our reading of a config.json agrees with transformers' and with the model it builds."""
    config, oracle = ours(values), theirs(values)
    assert config.architecture == FAMILIES[values["model_type"]].architecture
    assert config.vocab_size == oracle.vocab_size, values
    assert config.norm_eps == oracle.rms_norm_eps, values
    assert config.max_position_embeddings == oracle.max_position_embeddings, values
    assert config.bos_token_id == oracle.bos_token_id, values
    eos = oracle.eos_token_id
    eos = [] if eos is None else eos if isinstance(eos, list) else [eos]
    assert list(config.eos_token_ids) == eos, values
    assert config.dtype == str(oracle.dtype or torch.float32).removeprefix("torch."), values
    assert [config.window(i) for i in range(config.num_layers)] == windows(oracle), values
    assert config.rope == rope(oracle), values
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(oracle)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    assert expected_tensors(config) == shapes, values


def windows(oracle: Any) -> list[int | None]:
    layers = oracle.num_hidden_layers
    if oracle.model_type == "llama":
        return [None] * layers
    if oracle.model_type == "mistral":
        return [oracle.sliding_window] * layers
    slides = [kind == "sliding_attention" for kind in oracle.layer_types]
    return [oracle.sliding_window if slide else None for slide in slides]


def rope(oracle: Any) -> RopeConfig:
    given = {k: v for k, v in oracle.rope_parameters.items() if v is not None}
    kind, theta = given["rope_type"], float(given["rope_theta"])
    if kind == "default":
        return RopeConfig(theta=theta)
    longest = oracle.max_position_embeddings
    original = {"linear": None, "dynamic": longest}.get(
        kind, given.get("original_max_position_embeddings")
    )
    known = ("low_freq_factor", "high_freq_factor", "attention_factor", "beta_fast", "beta_slow")
    known += ("mscale", "mscale_all_dim", "truncate")
    return RopeConfig(
        theta=theta,
        kind=kind,
        factor=given["factor"] if "factor" in given else longest / original,
        original_max_position=original,
        **{key: given[key] for key in known if key in given},
    )


# --- config.json ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_read_as_by_transformers(name: str) -> None:
    expect_same(PUBLISHED[name])


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_written_by_transformers_are_read_back(name: str) -> None:
    expect_same(json.loads(CONFIGS[name].to_json_string(use_diff=False)))
    expect_same(json.loads(CONFIGS[name].to_json_string()))


@pytest.mark.parametrize("family", FAMILIES)
def test_missing_keys_get_the_defaults_of_transformers(family: str) -> None:
    expect_same({"model_type": family, "num_hidden_layers": 2})
    assert (
        ours({"model_type": family}).num_layers == theirs({"model_type": family}).num_hidden_layers
    )
    for key in SMALL:
        values = {k: v for k, v in SMALL.items() if k != key}
        if key == "num_key_value_heads":
            values["num_attention_heads"] = (
                32  # a multiple of each family's default number of KV heads
            )
        if key == "num_hidden_layers":
            values["intermediate_size"] = 8
        expect_same({"model_type": family, **values})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("settings", ROPES, ids=lambda s: f"{s['rope_type']}-{len(s)}")
def test_rope_settings_are_read_in_the_old_and_the_new_style(
    family: str, settings: dict[str, Any]
) -> None:
    base = {"model_type": family, **SMALL}
    old_type = {"type" if k == "rope_type" else k: v for k, v in settings.items()}
    for theta in ({}, {"rope_theta": 50000}):
        expect_same(base | theta | {"rope_scaling": settings})
        expect_same(base | theta | {"rope_scaling": old_type})
        expect_same(base | {"rope_parameters": settings | theta})
        expect_same(base | theta | {"rope_parameters": settings, "rope_scaling": None})
    both = {"rope_parameters": {"rope_type": "default", "rope_theta": 7000.0}}
    expect_same(base | both | {"rope_scaling": settings})
    if "original_max_position_embeddings" in settings:
        expect_same(base | {"rope_scaling": settings, "original_max_position_embeddings": 96})


@pytest.mark.parametrize("family", FAMILIES)
def test_random_configurations_are_read_as_by_transformers(family: str) -> None:
    draw = random.Random(family)
    for _ in range(60):
        heads_per_kv = draw.choice([1, 2, 3, 5])
        kv_heads = draw.choice([1, 2, 3])
        heads = kv_heads * heads_per_kv
        layers = draw.randint(1, 4)
        values = {
            "model_type": family,
            "vocab_size": draw.randint(10, 300),
            "hidden_size": heads * draw.choice([4, 8, 14]),
            "intermediate_size": draw.randint(1, 99),
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": draw.choice([2, 8, 30]),
            "max_position_embeddings": draw.randint(1, 9999),
            "rms_norm_eps": draw.choice([1e-5, 1e-6, 0.001]),
            "tie_word_embeddings": draw.random() < 0.5,
            "attention_bias": draw.random() < 0.5,
            "mlp_bias": draw.random() < 0.5,
            "use_sliding_window": draw.random() < 0.5,
            "sliding_window": draw.choice([None, 3, 64]),
            "max_window_layers": draw.randint(0, 4),
            "rope_theta": draw.choice([1e4, 500000, 1e6]),
            "eos_token_id": draw.choice([None, 3, [3, 4]]),
            "bos_token_id": draw.choice([None, 1]),
            "dtype": draw.choice([None, "float32", "bfloat16", "float16"]),
            "torch_dtype": draw.choice([None, "float16"]),
        }
        if values["use_sliding_window"] and values["sliding_window"] and draw.random() < 0.5:
            kinds = ["full_attention", "sliding_attention"]
            values["layer_types"] = [draw.choice(kinds) for _ in range(layers)]
        if family == "llama" and values["hidden_size"] % heads == 0 and draw.random() < 0.3:
            values["num_key_value_heads"] = None
        # The default head_dim of qwen3 is 128.
        optional = ["rms_norm_eps", "head_dim", "attention_bias", "mlp_bias", "sliding_window"]
        optional += ["tie_word_embeddings", "use_sliding_window", "dtype", "torch_dtype"]
        for key in optional:
            if draw.random() < 0.2 and not (key.endswith("window") and "layer_types" in values):
                del values[key]
        expect_same(values)


def test_a_family_is_identified_by_model_type_or_architecture() -> None:
    for kind, family in FAMILIES.items():
        by_type = ours({"model_type": kind, **SMALL})
        assert by_type == ours({"architectures": [family.architecture], **SMALL})
        both = {"model_type": kind, "architectures": [family.architecture, "Other"]}
        assert by_type == ours(both | SMALL)


@pytest.mark.parametrize(
    "values",
    [
        {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"]},
        {"model_type": "qwen3_moe"},
        {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]},
        {"architectures": ["GPT2LMHeadModel"]},
        {},
    ],
    ids=str,
)
def test_an_unsupported_family_is_refused_with_the_supported_ones(values: dict[str, Any]) -> None:
    with pytest.raises(ModelError) as error:
        ours(values | SMALL)
    for name in (*FAMILIES, *(f.architecture for f in FAMILIES.values()), "kind loader"):
        assert name in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("quantization_config", {"quant_method": "awq"}),
        ("num_experts", 8),
        ("num_local_experts", 8),
        ("partial_rotary_factor", 0.5),
        ("rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.25}),
        ("rope_scaling", {"rope_type": "longrope", "short_factor": [1], "long_factor": [1]}),
        ("rope_parameters", {"full_attention": {"rope_type": "default"}}),
        ("hidden_act", "gelu"),
        ("vision_config", {"depth": 2}),
    ],
)
def test_settings_that_no_executor_supports_are_refused(key: str, value: Any) -> None:
    with pytest.raises(ModelError, match=list(value)[-1] if key == "rope_parameters" else key):
        ours({"model_type": "llama", **SMALL, key: value})


def test_settings_without_effect_are_a_warning() -> None:
    values = {"model_type": "mistral", **SMALL, "layer_types": ["full_attention"] * 3}
    values["rope_scaling"] = {"rope_type": "linear", "factor": 2.0, "finetuned": True}
    _, warnings = model_config(JsonObject("config.json", values))
    assert [next(k for k in ("layer_types", "finetuned") if k in w) for w in warnings] == [
        "finetuned",
        "layer_types",
    ]


# --- generation_config.json -----------------------------------------------------------------------

SAMPLING = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.01}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_directory(tmp_path_factory.mktemp("good") / "model")


@pytest.fixture
def directory(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "model"))


def write_generation(directory: Path, **values: Any) -> None:
    (directory / "generation_config.json").write_text(json.dumps(values))


@pytest.mark.parametrize("do_sample", [True, False, None])
@pytest.mark.parametrize("given", [(), ("temperature",), ("top_p", "top_k"), tuple(SAMPLING)])
def test_sampling_settings_apply_only_if_do_sample_is_set(
    directory: Path, do_sample: bool | None, given: tuple[str, ...]
) -> None:
    values: dict[str, Any] = {key: SAMPLING[key] for key in given}
    values |= {"repetition_penalty": 1.05, "max_new_tokens": 77}
    if do_sample is not None:
        values["do_sample"] = do_sample
    write_generation(directory, **values)
    oracle = GenerationConfig.from_pretrained(directory)
    oracle.update(**oracle._get_default_generation_params(), defaults_only=True)
    expected = GenerateConfig(
        temperature=oracle.temperature if oracle.do_sample else 0.0,
        repetition_penalty=oracle.repetition_penalty,
        max_new_tokens=oracle.max_new_tokens,
    )
    if oracle.do_sample:
        expected = evolve(
            expected, top_k=oracle.top_k, top_p=oracle.top_p, min_p=oracle.min_p or 0.0
        )
    assert load(directory).generation_defaults == expected


def test_without_a_generation_config_nothing_is_recommended(directory: Path) -> None:
    (directory / "generation_config.json").unlink()
    model = load(directory)
    assert model.generation_defaults == GenerateConfig()
    assert model.config.eos_token_ids == (2,)


@pytest.mark.parametrize(
    ("in_generation", "expected"),
    [(7, (7,)), ([9, 7, 9], (9, 7)), (None, (5, 6)), ("absent", (5, 6)), ([], ())],
)
def test_eos_tokens_of_the_generation_config_take_precedence(
    directory: Path, in_generation: Any, expected: tuple[int, ...]
) -> None:
    change_json(directory / "config.json", eos_token_id=[5, 6])
    values = {} if in_generation == "absent" else {"eos_token_id": in_generation}
    write_generation(directory, **values)
    assert load(directory).config.eos_token_ids == expected


def test_unsupported_generation_settings_are_a_warning(directory: Path) -> None:
    write_generation(directory, num_beams=4, no_repeat_ngram_size=0, bad_words_ids=[[3]])
    warnings = load(directory).warnings
    assert ["num_beams" in w or "bad_words_ids" in w for w in warnings] == [True, True]


# --- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen3-tied", "qwen2-odd-heads-mqa", "llama-biases"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_written_model_is_read_back(name: str, dtype: str, tmp_path: Path) -> None:
    written = write_model(name, tmp_path, dtype)
    model = load_checked(tmp_path)
    assert model.config.dtype == dtype
    assert model.warnings == ()
    weights = dict(written.named_parameters())
    assert set(model.weights.names()) == set(weights)
    for key, tensor in weights.items():
        assert torch.equal(model.weights.get(key), tensor)


def test_an_output_head_in_the_weights_overrides_tie_word_embeddings(tmp_path: Path) -> None:
    write_model("qwen3-tied", tmp_path)
    assert load_checked(tmp_path).config.tie_word_embeddings
    head = torch.randn(131, 48)
    change_weights(tmp_path, lm_head__weight=head)
    model = load_checked(tmp_path)
    assert not model.config.tie_word_embeddings
    assert torch.equal(model.weights.get("lm_head.weight"), head)
    (warning,) = model.warnings
    assert "lm_head.weight" in warning
    assert "tie_word_embeddings" in warning


def test_a_missing_output_head_is_named(directory: Path) -> None:
    change_weights(directory, "lm_head.weight")
    model = load(directory)
    with pytest.raises(ModelError, match=r"missing: lm_head\.weight \[131, 64\].*tie_word_emb"):
        check_tensors(model.weights, model.config, model.source)


def test_rotary_buffers_of_old_checkpoints_are_ignored(directory: Path) -> None:
    change_weights(
        directory,
        model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(8),
        model__rotary_emb__inv_freq=torch.ones(8),
    )
    model = load_checked(directory)
    assert not [name for name in model.weights.names() if "rotary" in name]
    assert model.warnings == ()


def test_without_a_declared_dtype_the_stored_dtype_is_used(tmp_path: Path) -> None:
    write_model("llama-mha", tmp_path, "bfloat16")
    change_json(tmp_path / "config.json", "dtype")
    assert load(tmp_path).config.dtype == "bfloat16"


# --- tokenizer ------------------------------------------------------------------------------------

TRAINING_TEXT = (
    "The quick brown fox jumps over the lazy dog. It was, it is, and it will be: 1 2 3 45 678.\n"
    "Größe, naïve café, 你好 世界, 🙂🙃 emoji;\tdef f(x):\n    return x + 1\n" * 3
)
SAMPLES = [
    "",
    "Hello world",
    " leading and trailing ",
    "two  spaces\n\n\tand tabs",
    "Größe 你好 🙂 \u0301",
    "<s>inside</s> <|start|>user<|end|>",
    "<extra> y<extra>  <mid>dle <mid> the",
    "<pad> <|sep|> q",
]


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=330,
        special_tokens=["<|end|>", "<|start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TRAINING_TEXT], trainer)
    return tokenizer


def sentencepiece_like() -> Tokenizer:
    """Like the converted tokenizers of Llama 2: spaces as ▁, unknown characters as bytes."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{i:02X}>": i + 3 for i in range(256)}
    for character in sorted(set(TRAINING_TEXT.replace(" ", "▁")) - set("世界🙃")):
        vocab[character] = len(vocab)
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("i", "t"), ("▁", "it"), ("▁", "▁")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in list(vocab)[:3]])
    return tokenizer


def random_tokenizer(draw: random.Random) -> tuple[Tokenizer, dict[str, dict[str, Any]]]:
    """A tokenizer and the JSON files beside it, with settings found in published checkpoints."""
    if draw.random() < 0.5:
        tokenizer, bos, eos = byte_level(), "<|start|>", "<|end|>"
        tokenizer.post_processor = ByteLevel(trim_offsets=False)
    else:
        tokenizer, bos, eos = sentencepiece_like(), "<s>", "</s>"
    if draw.random() < 0.5:
        special_tokens = [(bos, tokenizer.token_to_id(bos))]
        tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=special_tokens
        )
    if draw.random() < 0.3:
        tokenizer.enable_truncation(4)
    if draw.random() < 0.3:
        tokenizer.enable_padding(length=20, pad_token=eos)
    if draw.random() < 0.3:
        tokenizer.add_special_tokens([AddedToken("<extra>", lstrip=True, rstrip=True)])
    if draw.random() < 0.3:
        tokenizer.add_tokens([AddedToken("<mid>", single_word=draw.random() < 0.5)])
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    flags = {"lstrip": False, "rstrip": False, "normalized": True, "single_word": False}
    possible = {
        "bos_token": [bos, {"__type": "AddedToken", "content": bos, **flags}, None],
        "eos_token": [eos],
        "pad_token": ["<pad>", eos],
        "add_bos_token": [True, False],
        "add_eos_token": [True, False],
        "clean_up_tokenization_spaces": [True],
        "additional_special_tokens": [["<|sep|>"]],
        "image_token": ["<|sep|>"],
    }
    settings |= {k: draw.choice(v) for k, v in possible.items() if draw.random() < 0.5}
    files = {"tokenizer_config.json": settings}
    if draw.random() < 0.4:
        fields = ("content", "lstrip", "rstrip", "normalized", "single_word", "special")
        declared = {
            str(i): {field: getattr(token, field) for field in fields}
            for i, token in tokenizer.get_added_tokens_decoder().items()
        }
        if draw.random() < 0.5:
            new = max(tokenizer.get_vocab().values()) + 1
            declared[str(new)] = {"content": "<|sep|>", **flags, "special": draw.random() < 0.5}
        settings["added_tokens_decoder"] = declared
    elif draw.random() < 0.5:
        files["special_tokens_map.json"] = {"bos_token": {"content": bos, **flags}}
    return tokenizer, files


@pytest.mark.parametrize("seed", range(40))
def test_tokenizers_encode_and_decode_as_in_transformers(seed: int, directory: Path) -> None:
    tokenizer, files = random_tokenizer(random.Random(seed))
    tokenizer.save(str(directory / "tokenizer.json"))
    for name, values in files.items():
        (directory / name).write_text(json.dumps(values))
    change_json(directory / "config.json", vocab_size=400)
    text = load(directory).text
    oracle = AutoTokenizer.from_pretrained(directory)
    for sample in SAMPLES:
        for special in (True, False):
            ids = text.tokenizer.encode(sample, add_special_tokens=special).ids
            assert ids == oracle.encode(
                sample, add_special_tokens=special, truncation=False, padding=False
            ), (sample, special)
            assert text.tokenizer.decode(ids, skip_special_tokens=special) == oracle.decode(
                ids, skip_special_tokens=special
            )
    named = {k: v for k, v in oracle.special_tokens_map.items() if isinstance(v, str)}
    if tokenizer.padding and "pad_token" not in text.special_tokens:
        del named["pad_token"]  # transformers takes it from the saved padding
    assert text.special_tokens == named


def test_saved_truncation_and_padding_are_disabled(directory: Path) -> None:
    path = str(directory / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9, pad_token="t9")
    tokenizer.save(path)
    assert len(load(directory).text.tokenizer.encode("t3 t4 t5 t6").ids) == 4


def test_a_vocabulary_can_be_smaller_than_that_of_the_model_but_not_larger(directory: Path) -> None:
    small = Tokenizer(models.WordLevel({f"t{i}": i for i in range(100)}, unk_token="t0"))
    small.save(str(directory / "tokenizer.json"))
    assert load(directory).text.tokenizer.get_vocab_size() == 100
    large = Tokenizer(models.WordLevel({f"t{i}": i for i in range(132)}, unk_token="t0"))
    large.save(str(directory / "tokenizer.json"))
    with pytest.raises(ModelError, match=r"ids up to 131, but vocab_size in config\.json is 131"):
        load(directory)


def test_an_unsupported_tokenizer_file_is_an_error_that_says_how_to_convert_it(
    directory: Path,
) -> None:
    (directory / "tokenizer.json").rename(directory / "tokenizer.model")
    with pytest.raises(ModelError, match=r"tokenizer\.model can be converted.*save_pretrained"):
        load(directory)


def test_chat_templates_are_searched_in_order_of_precedence(directory: Path) -> None:
    config = directory / "tokenizer_config.json"
    assert load(directory).text.chat_template == "{{ messages }}"
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    change_json(config, chat_template=named)
    assert load(directory).text.chat_template == "D"
    assert load(directory).text.tool_chat_template == "T"
    (directory / "chat_template.json").write_text('{"chat_template": "J"}')
    assert load(directory).text.chat_template == "J"
    (directory / "chat_template.jinja").write_text("jinja {{ 'ä' }}\n", encoding="utf-8")
    assert load(directory).text.chat_template == "jinja {{ 'ä' }}\n"
    assert load(directory).text.tool_chat_template is None


@pytest.mark.parametrize("stored", ["in a list", "in files"])
def test_the_template_for_tools_is_the_one_that_transformers_takes(
    directory: Path, stored: str
) -> None:
    templates = {"default": "D{{ messages[0].content }}", "tool_use": "T{{ tools[0].type }}"}
    if stored == "in a list":
        named = [{"name": name, "template": text} for name, text in templates.items()]
        change_json(directory / "tokenizer_config.json", chat_template=named)
    else:
        (directory / "chat_template.jinja").write_text(templates["default"])
        extra = directory / "additional_chat_templates"
        extra.mkdir()
        (extra / "tool_use.jinja").write_text(templates["tool_use"])
    text, theirs = Text(load(directory).text), AutoTokenizer.from_pretrained(directory)
    messages = [{"role": "user", "content": "Hi"}]
    for tools in (None, [{"type": "function", "function": {"name": "f"}}]):
        wanted = theirs.apply_chat_template(messages, tools=tools, tokenize=False)
        assert text.render_chat(Chat(messages, tools=tools)) == wanted


def test_chat_templates_without_a_default_are_a_warning(directory: Path) -> None:
    named = [{"name": "tool_use", "template": "T"}, {"name": "rag", "template": "R"}]
    change_json(directory / "tokenizer_config.json", chat_template=named)
    model = load(directory)
    assert model.text.chat_template is None
    (warning,) = model.warnings
    assert "tool_use" in warning


def test_special_tokens_can_be_strings_or_objects(directory: Path) -> None:
    change_json(
        directory / "tokenizer_config.json",
        bos_token={"content": "t7", "lstrip": False},
        unk_token=None,
    )
    special = load(directory).text.special_tokens
    assert special == {"bos_token": "t7", "eos_token": "t2"}


@pytest.mark.parametrize(
    ("declared", "expected"),
    [
        ({}, ()),  # t2, which generation_config.json has too
        ({"eos_token": "t9"}, (9,)),
        ({"eos_token": {"content": "t9"}, "eot_token": "t8"}, (9, 8)),
        ({"eos_token": "t9", "extra_special_tokens": {"eot_token": "t9"}}, (9,)),
        ({"eos_token": None}, ()),
    ],
)
def test_a_turn_also_ends_at_the_end_tokens_of_the_tokenizer(
    declared: dict[str, Any], expected: tuple[int, ...], directory: Path
) -> None:
    change_json(directory / "tokenizer_config.json", **declared)
    model = load(directory)
    assert model.config.eos_token_ids == (2, 3)
    assert model.text.turn_end_ids == expected


# --- the source -----------------------------------------------------------------------------------


def can_load(source: Path | str) -> bool:
    loader = plugins.load(plugins.find("loader", "hf-local"))
    return bool(plugins.call(loader, "can_load", source=str(source)))


def test_a_home_directory_is_expanded(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(directory.parent))
    assert can_load("~/model")
    assert load("~/model").source == str(directory)


def test_sources_that_are_not_a_model_directory_are_refused(
    directory: Path, tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    other = tmp_path / "other"
    other.mkdir()
    (other / "params.json").write_text("{}")
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    sources = {
        str(tmp_path / "absent"): "No such file",
        "": "No such file",
        "Qwen/Qwen3-0.6B": "local directory",
        "nul\0byte": "null byte",
        "x" * 5000: "too long",
        str(directory / "model.safetensors"): f"give its directory, {directory}",
        str(gguf): "GGUF",
        str(empty): "empty",
        str(other): "params.json",
    }
    for source, why in sources.items():
        assert not can_load(source)
        with pytest.raises(ModelError) as error:
            load(source)
        assert why in str(error.value)
        assert "\n" not in str(error.value)


def test_can_load_changes_no_file(directory: Path) -> None:
    (directory / "config.json").write_text("not even JSON")
    before = sorted((p.name, p.stat().st_mtime_ns) for p in directory.iterdir())
    assert can_load(directory)
    assert not can_load(directory.parent)
    assert sorted((p.name, p.stat().st_mtime_ns) for p in directory.iterdir()) == before


def test_the_bundled_model_is_a_valid_directory() -> None:
    directory = files("tilewright") / "demo_model"
    model = load_checked(str(directory))
    expect_same(json.loads((directory / "config.json").read_text()))
    assert model.warnings == ()
    assert model.text.chat_template
    oracle = AutoTokenizer.from_pretrained(str(directory))
    for sample in SAMPLES:
        assert model.text.tokenizer.encode(sample).ids == oracle.encode(sample)
