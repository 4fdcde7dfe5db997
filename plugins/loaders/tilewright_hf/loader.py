"""Loader ``hf-local``: a directory in the layout of Hugging Face checkpoints."""

import os
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import evolve

from tilewright.errors import ModelError
from tilewright.hookspecs import hookimpl
from tilewright.paths import expanded
from tilewright.types import (
    DTYPES,
    DType,
    GenerateConfig,
    LoadedModel,
    ModelConfig,
    PluginInfo,
    TensorInfo,
    TensorSource,
    WeightFormats,
)
from tilewright_hf.architecture import FAMILIES, declared_dtype, model_config
from tilewright_hf.files import is_there, local_path, read_json
from tilewright_hf.generation import Recommended, recommended
from tilewright_hf.tokenizer import load_text

if TYPE_CHECKING:
    from torch import Tensor

tilewright_api = 2

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


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
    directory = expanded(source)
    return os.path.isdir(directory) and os.path.isfile(os.path.join(directory, "config.json"))


@hookimpl
def load_model(source: str, weight_format: str | None, formats: WeightFormats) -> LoadedModel:
    """Read configuration, tokenizer and weight headers of a directory."""
    directory = _directory(source)
    config_file = read_json(directory / "config.json")
    config, warnings = model_config(config_file)
    generation = _generation(directory, config.vocab_size)
    if generation.eos_token_ids is not None:
        config = evolve(config, eos_token_ids=generation.eos_token_ids)
    text, text_warnings = load_text(directory, config)
    weights = _needed(formats.open(directory, weight_format), config)
    warnings += generation.warnings + text_warnings
    if config.tie_word_embeddings and HEAD in weights.names():
        config = evolve(config, tie_word_embeddings=False)
        warnings += (
            f"{config_file.where}: tie_word_embeddings is true, but the weights have a "
            "separate lm_head.weight, which is used",
        )
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


def _directory(source: str) -> Path:
    """The directory that a source names. Raises ModelError with what was found instead."""
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
    try:
        names = sorted(os.listdir(path))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    if "config.json" not in names:
        found = f"found {', '.join(ascii(n) for n in names[:5])}" if names else "it is empty"
        more = " and more" if len(names) > 5 else ""
        raise ModelError(f"{path}: expected a directory that holds config.json; {found}{more}")
    return path


def _generation(directory: Path, vocab_size: int) -> Recommended:
    path = directory / "generation_config.json"
    if not is_there(path):
        return Recommended(defaults=GenerateConfig())
    return recommended(read_json(path), vocab_size)


def _stored_dtype(weights: TensorSource) -> DType:
    """The dtype of the embedding, for a config.json that names none."""
    stored = weights.info(EMBEDDING).dtype if EMBEDDING in weights.names() else None
    return stored if stored in DTYPES else "float32"


class _Subset:
    """A subset of a source's tensors."""

    def __init__(self, source: TensorSource, names: Collection[str]):
        self._source = source
        self._names = names

    def names(self) -> Collection[str]:
        return self._names

    def info(self, name: str) -> TensorInfo:
        return self._source.info(name)

    def get(self, name: str) -> "Tensor":
        return self._source.get(name)

    def close(self) -> None:
        self._source.close()


def _needed(source: TensorSource, config: ModelConfig) -> TensorSource:
    """Leave out ``rotary_emb.inv_freq``, which older checkpoints contain (config.json defines it),
    and a tied head that is the embedding under a second name, if the format can tell."""
    names = source.names()
    kept = [name for name in names if not name.endswith("rotary_emb.inv_freq")]
    same = getattr(source, "same", None)
    if config.tie_word_embeddings and HEAD in names and same is not None and same(HEAD, EMBEDDING):
        kept.remove(HEAD)
    return source if len(kept) == len(names) else _Subset(source, frozenset(kept))
