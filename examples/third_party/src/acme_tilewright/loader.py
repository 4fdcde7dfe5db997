"""Loader ``acme-model``: a directory with ``acme.toml``, tokenizer.json, chat.jinja and weights.

``acme.toml``, in which only [generate] is optional::

    [model]
    vocabulary = 131            # sizes; the weights follow from them
    hidden = 48
    mlp = 83
    layers = 3
    heads = 6
    kv_heads = 2
    head = 8
    context = 256               # tokens
    dtype = "float32"           # the model's own dtype
    norm_eps = 1e-05
    rope_theta = 10000.0
    tied_head = false           # whether the output head is the embedding
    qk_norm = false
    begin = 1                   # token ids
    end = [2]

    [generate]                  # recommended settings: fields of tilewright.types.GenerateConfig
    temperature = 0.7

Weights have names of their own, see ``acme_name``.
"""

import os
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tilewright import hookimpl
from tilewright.errors import ModelError
from tilewright.types import (
    DTYPES,
    GenerateConfig,
    LoadedModel,
    ModelConfig,
    PluginInfo,
    RopeConfig,
    Sample,
    TensorInfo,
    TensorSource,
    TextAssets,
    WeightFormats,
)
from tilewright.weights import expected_tensors

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor

tilewright_api = 2

FILE = "acme.toml"

SIZES = {
    "vocabulary": "vocab_size",
    "hidden": "hidden_size",
    "mlp": "intermediate_size",
    "layers": "num_layers",
    "heads": "num_heads",
    "kv_heads": "num_kv_heads",
    "head": "head_dim",
    "context": "max_position_embeddings",
}
"""Keys of [model] that are whole numbers from 1, and the fields of ModelConfig that they fill."""


@hookimpl
def plugin_info() -> PluginInfo:
    return PluginInfo(
        summary=f"a directory with {FILE}",
        limits={"models": "RoPE without scaling, no biases", "tokenizer": "tokenizer.json"},
    )


@hookimpl
def can_load(source: str) -> bool:
    return os.path.isfile(os.path.join(os.path.expanduser(source), FILE))


@hookimpl
def load_model(source: str, weight_format: str | None, formats: WeightFormats) -> LoadedModel:
    if not can_load(source):
        raise ModelError(f"{source[:200]!a}: expected a directory with {FILE}")
    directory = Path(os.path.expanduser(source))
    path = directory / FILE
    document = _document(path)
    model = document.get("model")
    if not isinstance(model, dict):
        raise ModelError(f"{path}: expected a table [model]")
    config = _config(path, model)
    return LoadedModel(
        config=config,
        text=TextAssets(
            tokenizer=_tokenizer(directory / "tokenizer.json", config.vocab_size),
            chat_template=_chat_template(directory / "chat.jinja"),
        ),
        generation_defaults=_generation(path, document.get("generate", {})),
        # Last, so that nothing stays open when something else is wrong.
        weights=AcmeNames(formats.open(directory, weight_format), config),
        source=str(directory),
    )


@hookimpl
def write_sample(directory: Path) -> Sample:
    from acme_tilewright.npz import write_weights
    from tilewright_testing.models import make_model

    model = make_model()
    values = {key: getattr(model.config, name) for key, name in SIZES.items()} | {
        "dtype": model.config.dtype,
        "norm_eps": model.config.norm_eps,
        "rope_theta": model.config.rope.theta,
        "tied_head": model.config.tie_word_embeddings,
        "qk_norm": model.config.qk_norm,
        "begin": model.config.bos_token_id,
        "end": list(model.config.eos_token_ids),
    }
    lines = ["[model]", *(f"{key} = {_toml(value)}" for key, value in values.items())]
    (directory / FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    model.text.tokenizer.save(str(directory / "tokenizer.json"))
    write_weights(directory, {acme_name(name): t for name, t in model.tensors.items()})
    return Sample(source=str(directory), tensors=model.tensors)


# --- weights --------------------------------------------------------------------------------------


def acme_name(name: str) -> str:
    """The name in this format of a weight with a Hugging Face name.

    >>> acme_name("model.layers.0.self_attn.q_proj.weight")
    'block.0.attention.q'
    """
    for theirs, ours in (
        ("model.layers.", "block."),
        ("model.", ""),
        ("self_attn.", "attention."),
        ("input_layernorm", "attention.norm"),
        ("post_attention_layernorm", "mlp.norm"),
        ("_proj", ""),
        (".weight", ""),
    ):
        name = name.replace(theirs, ours)
    return name


class AcmeNames:
    """A ``TensorSource`` (see tilewright.types): another one's tensors under Hugging Face names.

    A tensor without such a name keeps its own, so that the engine warns that it is not needed.
    """

    def __init__(self, source: TensorSource, config: ModelConfig):
        self._source = source
        theirs = {acme_name(name): name for name in expected_tensors(config)}
        self._ours: Mapping[str, str] = {theirs.get(own, own): own for own in source.names()}

    def names(self) -> Collection[str]:
        return self._ours.keys()

    def info(self, name: str) -> TensorInfo:
        return self._source.info(self._ours[name])

    def get(self, name: str) -> "Tensor":
        return self._source.get(self._ours[name])

    def close(self) -> None:
        self._source.close()


# --- files ----------------------------------------------------------------------------------------


def _document(path: Path) -> dict[str, Any]:
    text = _text(path)
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: invalid TOML: {_line(error)}") from error


def _config(path: Path, model: Mapping[str, Any]) -> ModelConfig:
    sizes: dict[str, Any] = {name: _whole(path, model, key) for key, name in SIZES.items()}
    dtype, end = model.get("dtype"), model.get("end")
    if dtype not in DTYPES:
        raise ModelError(f"{path}: dtype must be one of {', '.join(DTYPES)}, found {dtype!a:.60}")
    if not isinstance(end, list):
        raise ModelError(f"{path}: end must be a list of token ids, found {end!a:.60}")
    ids = dict(enumerate(end)) | {"begin": model.get("begin")}
    begin, *ends = (
        _whole(path, ids, key, least=0, most=sizes["vocab_size"] - 1)
        for key in ("begin", *range(len(end)))
    )
    return ModelConfig(
        architecture="Acme",
        **sizes,
        norm_eps=_number(path, model, "norm_eps"),
        rope=RopeConfig(theta=_number(path, model, "rope_theta")),
        dtype=dtype,
        tie_word_embeddings=_flag(path, model, "tied_head"),
        qk_norm=_flag(path, model, "qk_norm"),
        bos_token_id=begin,
        eos_token_ids=tuple(ends),
    )


def _whole(
    path: Path, table: Mapping[Any, Any], key: Any, least: int = 1, most: int = 2**31 - 1
) -> int:
    value = table.get(key)
    if type(value) is not int or not least <= value <= most:
        what = key if isinstance(key, str) else "a token id"
        raise ModelError(
            f"{path}: {what} must be an integer from {least} to {most}, found {value!a:.60}"
        )
    return value


def _number(path: Path, table: Mapping[str, Any], key: str) -> float:
    value = table.get(key)
    if type(value) is not float or not 0 < value < float("inf"):
        raise ModelError(f"{path}: {key} must be a number above 0, found {value!a:.60}")
    return value


def _flag(path: Path, table: Mapping[str, Any], key: str) -> bool:
    value = table.get(key)
    if type(value) is not bool:
        raise ModelError(f"{path}: {key} must be true or false, found {value!a:.60}")
    return value


def _generation(path: Path, table: Any) -> GenerateConfig:
    try:
        return GenerateConfig(**table)
    except (TypeError, ValueError) as error:
        raise ModelError(f"{path}: [generate] cannot be used: {_line(error)}") from error


def _tokenizer(path: Path, vocab_size: int) -> "Tokenizer":
    from tokenizers import Tokenizer

    text = _text(path)
    try:
        tokenizer = Tokenizer.from_str(text)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of the library, which is in Rust, is not an Exception
        raise ModelError(f"{path}: not a tokenizer: {_line(error)}") from error
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
    if largest >= vocab_size:
        raise ModelError(f"{path}: has token {largest}, where {FILE} has vocabulary = {vocab_size}")
    return tokenizer


def _chat_template(path: Path) -> str | None:
    return _text(path) if path.exists() else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ModelError(f"{path}: expected UTF-8 text: {_line(error)}") from error


def _toml(value: object) -> str:
    """A value in TOML, which for these types is the same as JSON."""
    import json

    return json.dumps(value)


def _line(error: BaseException) -> str:
    return ascii(" ".join(str(error).split())[:200] or type(error).__name__)[1:-1]
