"""GGUF files of small models, written with the gguf library as llama.cpp's converter does."""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
from gguf.quants import quantize
from torch import Tensor
from transformers import PreTrainedModel

from tilewright import plugins
from tilewright.types import LoadedModel, RuntimeConfig
from tilewright.weights import check_tensors
from tilewright_testing.paged import Sequences
from tilewright_torch.plugin import create_executor

Kind = gguf.GGMLQuantizationType
Values = Mapping[str, Any]

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}


# --- loading --------------------------------------------------------------------------------------


def load(source: Path | str, weight_format: str | None = None) -> LoadedModel:
    model: LoadedModel = _loader().load_model(str(source), weight_format)
    return model


@cache
def _loader() -> Any:
    return plugins.load(plugins.find("loader", "gguf"))


def load_checked(source: Path | str) -> LoadedModel:
    """Load, and check the weights against the configuration, as an engine does."""
    model = load(source)
    check_tensors(model.weights, model.config, model.source)
    return model


def logits(loaded: LoadedModel, token_ids: Sequence[int]) -> Tensor:
    """Float32 logits [tokens, vocabulary] of the torch executor, in one prefill."""
    runtime = RuntimeConfig(weight_dtype="float32", kv_dtype="float32", page_size=8)
    layers = range(loaded.config.num_layers)
    executor = create_executor(loaded.config, runtime, loaded.weights, layers, None)
    pages = len(token_ids) // 8 + 1
    executor.allocate_kv(pages)
    return executor.forward(Sequences(8, pages).batch({"a": token_ids}))


# --- writing --------------------------------------------------------------------------------------


def write(
    model: PreTrainedModel,
    path: Path,
    kind: Kind = Kind.F32,
    text: Values | None = None,
    changed: Values | None = None,
    shards: int = 1,
) -> Path:
    """Write a model; matrices are of ``kind`` where their rows allow it, all other tensors are F32.

    text: the tokenizer's keys (``word_text`` by default). changed: header values that are set, or
    left out where they are None.
    """
    header = header_of(model) | (text or word_text(model.config.vocab_size)) | (changed or {})
    tensors = {name: stored(values, kind) for name, values in tensors_of(model).items()}
    if shards == 1:
        write_file(path, header, tensors)
        return path
    names = list(tensors)
    for number in range(shards):
        split = {
            "split.no": np.uint16(number),
            "split.count": np.uint16(shards),
            "split.tensors.count": np.int32(len(names)),
        }
        write_file(
            path.with_name(f"{path.stem}-{number + 1:05}-of-{shards:05}.gguf"),
            header | split if number == 0 else split,
            {name: tensors[name] for name in names[number::shards]},
        )
    return path.with_name(f"{path.stem}-00001-of-{shards:05}.gguf")


def write_file(
    path: Path, header: Values, tensors: Mapping[str, tuple[npt.NDArray[Any], Kind]]
) -> None:
    """Header values are stored by Python type, in 32 bits; numpy scalars keep their own width."""
    writer = gguf.GGUFWriter(path, "")
    writer.kv_data[0].clear()
    for key, value in header.items():
        if value is not None:
            writer.add_key_value(key, *_typed(value))
    for name, (values, kind) in tensors.items():
        writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _typed(value: Any) -> tuple[Any, gguf.GGUFValueType]:
    of = gguf.GGUFValueType
    match value:
        case bool():
            return value, of.BOOL
        case int():
            return value, of.UINT32 if value >= 0 else of.INT32
        case np.generic():
            return value.item(), of[value.dtype.name.upper()]
        case float():
            return value, of.FLOAT32
        case list() | np.ndarray():
            return list(value), of.ARRAY
        case _:
            return value, of.STRING


def header_of(model: PreTrainedModel) -> dict[str, Any]:
    """The header that the converter writes; settings without a GGUF key are lost."""
    config = model.config
    arch = gguf.MODEL_ARCH_NAMES[ARCHITECTURES[config.model_type]]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters
    values = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": rope["rope_theta"],
        "rope.dimension_count": head_dim,
        "vocab_size": config.vocab_size,
    }
    if rope["rope_type"] in ("linear", "yarn"):
        values["rope.scaling.type"] = rope["rope_type"]
        values["rope.scaling.factor"] = rope["factor"]
    if rope["rope_type"] == "yarn":
        original = rope["original_max_position_embeddings"]
        values["rope.scaling.original_context_length"] = original
        for key in ("beta_fast", "beta_slow"):
            values[f"rope.scaling.yarn_{key}"] = rope.get(key)
        values["rope.scaling.yarn_attn_factor"] = rope.get("attention_factor")
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "use_sliding_window", True):
        values["attention.sliding_window"] = window
    header: dict[str, Any] = {"general.architecture": arch, "general.name": "small"}
    return header | {f"{arch}.{key}": value for key, value in values.items()}


def tensors_of(model: PreTrainedModel) -> dict[str, npt.NDArray[np.float32]]:
    config = model.config
    arch = ARCHITECTURES[config.model_type]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    tensors = {}
    for hf_name, weight in model.state_dict().items():
        if hf_name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = weight.detach().float().numpy()
        if arch == gguf.MODEL_ARCH.LLAMA and (".q_proj." in hf_name or ".k_proj." in hf_name):
            of_q = ".q_proj." in hf_name
            heads = config.num_attention_heads if of_q else config.num_key_value_heads
            values = interleaved(values, heads)
        tensors[names.get_name(hf_name, try_suffixes=(".weight", ".bias"))] = values
    rope = config.rope_parameters
    if rope["rope_type"] == "llama3":
        tensors["rope_freqs.weight"] = llama3_factors(model)
    return tensors


def interleaved(values: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Reorder rows so that the two of each RoPE pair are adjacent."""
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))


def llama3_factors(model: PreTrainedModel) -> npt.NDArray[np.float32]:
    """The factor by which transformers divides the frequency of each pair."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    plain = 1.0 / config.rope_parameters["rope_theta"] ** exponents
    factors: npt.NDArray[np.float32] = (plain / model.model.rotary_emb.inv_freq).numpy()
    return factors


def stored(values: npt.NDArray[np.float32], kind: Kind = Kind.F32) -> tuple[npt.NDArray[Any], Kind]:
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    if values.ndim == 1 or values.shape[-1] % block:
        kind = Kind.F32
    return quantize(values, kind), kind


# --- tokenizers -----------------------------------------------------------------------------------


def word_text(vocab_size: int) -> dict[str, Any]:
    """A tokenizer with a single merge, since the gguf library cannot write an empty list."""
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": ["a", "b", "ab", *(f"t{i}" for i in range(3, vocab_size))],
        "tokenizer.ggml.token_type": [1] * vocab_size,
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def bpe_text(tokenizer_json: str, pre: str, **changed: Any) -> dict[str, Any]:
    """The keys of a byte-level BPE tokenizer; ``changed`` overrides some, without their prefix."""
    saved = json.loads(tokenizer_json)
    ids = dict(saved["model"]["vocab"])
    kinds = dict.fromkeys(ids, 1)
    for token in saved["added_tokens"]:
        ids[token["content"]] = token["id"]
        kinds[token["content"]] = 3 if token["special"] else 4
    tokens = sorted(ids, key=lambda token: ids[token])
    values = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [kinds[token] for token in tokens],
        "merges": [" ".join(merge) for merge in saved["model"]["merges"]],
    }
    return {f"tokenizer.ggml.{key}": value for key, value in (values | changed).items()}
