"""Loader ``hf-local``: a directory in the layout of Hugging Face checkpoints."""

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from attrs import evolve

from tilewright.directories import ADAPTER, adapter, other_layout
from tilewright.errors import ModelError, listed, shortened
from tilewright.hookspecs import hookimpl
from tilewright.paths import expanded
from tilewright.types import (
    DTYPES,
    DType,
    GenerateConfig,
    LoadedModel,
    ModelConfig,
    PluginInfo,
    TensorSource,
    WeightFormats,
)
from tilewright.weights import EMBEDDING, HEAD, NamedSource, expected_tensors, printable
from tilewright_hf import cache
from tilewright_hf.architecture import FAMILIES, declared_dtype, model_config
from tilewright_hf.files import JsonObject, is_there, local_path, read_json
from tilewright_hf.generation import Recommended, recommended
from tilewright_hf.shards import only_gguf, weights_among
from tilewright_hf.tokenizer import load_text

tilewright_api = 2

FIRST = "layers.0.input_layernorm.weight"
"""The name of a tensor of every model, without the model's prefix."""


@hookimpl
def plugin_info() -> PluginInfo:
    return PluginInfo(
        summary="a local directory in the layout of Hugging Face checkpoints",
        limits={
            "models": ", ".join(family.architecture for family in FAMILIES.values()),
            "RoPE": "default, linear, dynamic, llama3, yarn",
            "tokenizer": "tokenizer.json",
        },
    )


@hookimpl
def can_load(source: str) -> bool:
    if not source:
        return False
    directory = Path(expanded(source))
    cached = cache.is_folder(directory)
    try:
        if cached:
            directory = cache.snapshot(directory)
        has_config = os.path.isfile(directory / "config.json")
        return (cached or has_config) and not only_gguf(os.listdir(directory))
    except (ModelError, OSError, ValueError):
        return cached  # to say what its snapshots lack


@hookimpl
def load_model(source: str, weight_format: str | None, formats: WeightFormats) -> LoadedModel:
    """Read configuration, tokenizer and weight headers of a directory."""
    directory, notes = _directory(source)
    config_file = read_json(directory / "config.json")
    _check_plain(config_file)
    config, warnings = model_config(config_file)
    generation = _generation(directory, config.vocab_size)
    if generation.eos_token_ids is not None:
        config = evolve(config, eos_token_ids=generation.eos_token_ids)
    text, text_warnings = load_text(directory, config)
    opened = formats.open(directory, weight_format)
    weights, config, weight_warnings = _weights(opened, config, str(directory))
    warnings = notes + warnings + generation.warnings + text_warnings + weight_warnings
    if declared_dtype(config_file) is None:
        config = evolve(config, dtype=_stored_dtype(weights))
    return LoadedModel(
        config=config,
        weights=weights,
        text=text,
        generation_defaults=generation.defaults,
        source=str(directory),
        warnings=warnings,
    )


def _directory(source: str) -> tuple[Path, tuple[str, ...]]:
    """The directory that a source names, and warnings.

    Raises ModelError with what was found instead.
    """
    takes = "hf-local loads a local directory that holds config.json"
    path = local_path(source, "model directory", takes)
    if path.suffix == ".gguf":
        raise ModelError(
            f"{path}: a GGUF file, which the loader gguf reads (--loader gguf); hf-local loads a "
            "directory that holds config.json"
        )
    if not path.is_dir():
        raise ModelError(
            f"{path}: expected a directory that holds config.json, found a file; "
            f"give its directory, {path.parent}"
        )
    warnings: tuple[str, ...] = ()
    folder = path
    if cache.is_folder(path):
        path = cache.snapshot(path)
        warnings = (f"{folder}: a folder of the hub's cache; its snapshot {path} is loaded",)
    try:
        names = sorted(os.listdir(path))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    weights = weights_among(names)
    held = other_layout(path, names)
    if held and ("config.json" not in names or not weights):
        raise ModelError(f"{path}: holds {held}")
    if "config.json" not in names:
        if folder is not path:
            raise cache.incomplete(folder)
        found = f"found {', '.join(ascii(n) for n in names[:5])}" if names else "it is empty"
        more = " and more" if len(names) > 5 else ""
        raise ModelError(f"{path}: expected a directory that holds config.json; {found}{more}")
    if only_gguf(names):
        raise ModelError(
            f"{path}: its weights are in GGUF files, which the loader gguf reads (--loader gguf): "
            f"{listed([ascii(name) for name in weights])}"
        )
    if ADAPTER in names:
        warnings += (f"{path}: {adapter(path)} beside the model is not applied",)
    return path, warnings


def _check_plain(config: JsonObject) -> None:
    """Raise ModelError for a config.json of a known family that says that weights are quantised."""
    for key in ("quantization_config", "compression_config"):
        values = config.values.get(key)
        if values and config.values.get("model_type") in FAMILIES:
            raise ModelError(
                f"{config.where}: {key!r}: the weights are quantised{_scheme(values)}, which "
                "hf-local does not read; take the model's checkpoint in bfloat16 or float16, or a "
                "GGUF file of it"
            )


def _scheme(quantisation: Any) -> str:
    """``" (gptq, 4 bits)"``, of a quantisation's settings; empty if they do not say."""
    if not isinstance(quantisation, dict):
        return ""
    method, bits = quantisation.get("quant_method"), quantisation.get("bits")
    if method is None and {"group_size", "bits"} <= quantisation.keys():
        method = "MLX"  # which names no method
    known = [shortened(method)] if isinstance(method, str) and method.isprintable() else []
    known += [f"{bits} bits"] if type(bits) is int else []
    return f" ({', '.join(known)})" if known else ""


def _generation(directory: Path, vocab_size: int) -> Recommended:
    path = directory / "generation_config.json"
    if not is_there(path):
        return Recommended(defaults=GenerateConfig())
    return recommended(read_json(path), vocab_size)


def _stored_dtype(weights: TensorSource) -> DType:
    """The dtype of the embedding, for a config.json that names none."""
    stored = weights.info(EMBEDDING).dtype if EMBEDDING in weights.names() else None
    return stored if stored in DTYPES else "float32"


def _weights(
    source: TensorSource, config: ModelConfig, where: str
) -> tuple[TensorSource, ModelConfig, tuple[str, ...]]:
    """A checkpoint's weights under the names that the configuration needs, that configuration, and
    warnings.

    Leaves out ``rotary_emb.inv_freq``, which older checkpoints contain (config.json defines it),
    and a tied head that is the embedding under a second name, if the format can tell.
    """
    stored = {name: name for name in source.names() if not name.endswith("rotary_emb.inv_freq")}
    present = stored.keys() - getattr(source, "absent", {}).keys()
    renamed, warnings = _without_prefix(present, config, where)
    taken = set(renamed.values())
    stored = {name: found for name, found in stored.items() if found not in taken} | renamed
    if config.tie_word_embeddings and stored.get(HEAD) in present:
        same = getattr(source, "same", None)
        if EMBEDDING not in stored:
            stored[EMBEDDING] = stored.pop(HEAD)
        elif same is not None and same(stored[HEAD], stored[EMBEDDING]):
            del stored[HEAD]
        else:
            config = evolve(config, tie_word_embeddings=False)
            warnings += (
                f"{where}: tie_word_embeddings in config.json is true, but the weights have a "
                "separate lm_head.weight, which is used",
            )
    whole = len(stored) == len(source.names()) and all(k == v for k, v in stored.items())
    return source if whole else NamedSource(source, stored), config, warnings


def _without_prefix(
    names: Collection[str], config: ModelConfig, where: str
) -> tuple[dict[str, str], tuple[str, ...]]:
    """The stored name of each tensor of a model whose names have another prefix than ``model.``.

    Empty unless there is one prefix under which a whole model is stored; a warning states it.
    """
    prefixes = [name.removesuffix(FIRST) for name in names if name.endswith(FIRST)]
    if "model." in prefixes:
        return {}, ()
    whole = [(p, stored) for p in prefixes if (stored := _prefixed(p, names, config))]
    if len(whole) != 1:
        return {}, ()
    ((prefix, stored),) = whole
    found = f"begin with {printable(prefix)!r}" if prefix else "have no prefix"
    return stored, (
        f"{where}: the tensors' names {found} where 'model.' was expected; they are read as if "
        "they had it",
    )


def _prefixed(prefix: str, names: Collection[str], config: ModelConfig) -> dict[str, str]:
    """The stored names of a model's tensors; empty unless all but the head are among names."""
    heads = {f"{p}{HEAD}" for p in ("", prefix, prefix.removesuffix("model."))} & set(names)
    stored = {n: f"{prefix}{n.removeprefix('model.')}" for n in expected_tensors(config)}
    stored.pop(HEAD, None)
    if len(heads) == 1:
        (stored[HEAD],) = heads
    if config.tie_word_embeddings and HEAD in stored and stored[EMBEDDING] not in names:
        del stored[EMBEDDING]
    return stored if len(heads) < 2 and set(stored.values()) <= set(names) else {}
