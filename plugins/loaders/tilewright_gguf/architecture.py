"""A GGUF header -> ModelConfig, for the families that share one dense decoder architecture.

Absent keys have the defaults of llama.cpp.
"""

from collections.abc import Mapping, Sequence
from typing import NoReturn, TypeVar

from attrs import evolve, frozen

from tilewright.errors import ModelError
from tilewright.types import DType, ModelConfig, RopeConfig
from tilewright.weights import EMBEDDING, HEAD
from tilewright_gguf.header import GgufFile, StoredTensor
from tilewright_gguf.rope import from_factors
from tilewright_gguf.weights import ROPE_FACTORS, hf_name, read
from tilewright_hf.architecture import FAMILIES, MAX_LAYERS, head_size
from tilewright_hf.files import MAX_INT, JsonObject, shown

_T = TypeVar("_T")

ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""Values of ``general.architecture``; Mistral's models have ``llama``."""

INTERLEAVED = ("llama",)
"""Architectures where query and key rows alternate between the two halves of a head."""

_OTHER_FILES = {
    "adapter": "merge this adapter into its model, and load the file of the whole model",
    "mmproj": "this file only holds a model's encoder of images or sound; load the file of its "
    "language model",
    "vocab": "this file only holds a vocabulary; load the file of the whole model",
    "imatrix": "this file only holds statistics for quantisation; load the file of the model",
}

_REFUSED = {
    "expert_count": "mixtures of experts",
    "attention.sliding_window_pattern": "sliding windows that differ by layer",
    "attention.clamp_kqv": "clamped queries and keys",
    "attention.scale": "custom attention scales",
    "attention.max_alibi_bias": "ALiBi",
    "attention.temperature_scale": "position-dependent attention temperatures",
    "rope.dimension_sections": "positions with several axes",
    "rope.scaling.alpha": "alpha values of NTK scaling",
    "rope.scaling.yarn_log_multiplier": "custom YaRN magnitudes",
    "embedding_scale": "scaled embeddings",
    "residual_scale": "scaled residuals",
    "logit_scale": "scaled logits",
    "attn_logit_softcapping": "soft-capped attention scores",
    "final_logit_softcapping": "soft-capped logits",
}
"""Keys that would change the computation; 0 and false count as absent."""


@frozen
class Keys:
    """The keys of one architecture, named without it: ``block_count`` is ``llama.block_count``."""

    header: JsonObject
    architecture: str

    def integer(self, key: str, default: _T, maximum: int = MAX_INT) -> int | _T:
        return self._one_for_all_layers(key).integer(self._name(key), default, maximum=maximum)

    def required(self, key: str, maximum: int = MAX_INT) -> int:
        value = self.integer(key, None, maximum)
        if value is None:
            raise ModelError(
                f"{self.header.where}: required key {self._name(key)} is missing; convert the "
                "model again"
            )
        return value

    def number(self, key: str, default: _T, **bounds: float) -> float | _T:
        return self.header.number(self._name(key), default, **bounds)

    def string(self, key: str, default: str) -> str:
        return self.header.string(self._name(key), default)

    def has(self, key: str) -> bool:
        """Whether the key is present and neither 0, false nor empty."""
        return bool(self.header.values.get(self._name(key)))

    def note(self, key: str, what: str) -> None:
        self.header.note(self._name(key), what)

    def fail(self, key: str, expected: str) -> NoReturn:
        self.header.fail(self._name(key), expected)

    def refuse(self, key: str, what: str) -> NoReturn:
        raise ModelError(
            f"{self.header.where}: {self._name(key)} is set, but {what} are not supported by gguf; "
            "use another model, or a loader plugin that reads this one"
        )

    def _name(self, key: str) -> str:
        return f"{self.architecture}.{key}"

    def _one_for_all_layers(self, key: str) -> JsonObject:
        """The header, with a per-layer list of one repeated value replaced by that value."""
        name = self._name(key)
        value = self.header.values.get(name)
        if not isinstance(value, list) or not value:
            return self.header
        if any(item != value[0] for item in value):
            raise ModelError(
                f"{self.header.where}: {name} differs by layer, which is not supported by gguf"
            )
        return JsonObject(self.header.where, {name: value[0]}, self.header.notes, typed=True)


def model_config(header: JsonObject, files: Sequence[GgufFile], dtype: DType) -> ModelConfig:
    """The model that a header describes.

    bos_token_id and eos_token_ids are left to the tokenizer.

    The tensors decide the vocabulary's size, which biases exist, and whether the head is separate.
    Raises ModelError for missing, out-of-range or unsupported values.
    """
    architecture = _architecture(header)
    keys = Keys(header, architecture)
    _check_supported(keys)
    tensors = {hf_name(name): tensor for f in files for name, tensor in f.tensors.items()}
    vocab_size = _vocab_size(keys, tensors)
    hidden_size = keys.required("embedding_length")
    num_layers = keys.required("block_count", MAX_LAYERS)
    num_heads = keys.required("attention.head_count")
    num_kv_heads = keys.integer("attention.head_count_kv", num_heads, maximum=num_heads)
    head_dim = head_size(
        header.where,
        hidden=(f"{architecture}.embedding_length", hidden_size),
        heads=(f"{architecture}.attention.head_count", num_heads),
        kv_heads=(f"{architecture}.attention.head_count_kv", num_kv_heads),
        given=(
            f"{architecture}.attention.key_length",
            keys.integer("attention.key_length", None),
        ),
    )
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.integer(key, head_dim) != head_dim:
            keys.fail(key, f"{head_dim}, the head size of the queries")
    max_positions = keys.required("context_length")
    window = None
    if keys.has("attention.sliding_window"):
        window = keys.integer("attention.sliding_window", None)
    family = FAMILIES[architecture]
    config = ModelConfig(
        architecture=family.architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=keys.required("feed_forward_length"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        norm_eps=_norm_eps(keys),
        rope=_rope(keys, max_positions),
        max_position_embeddings=max_positions,
        dtype=dtype,
        qkv_bias=family.qkv_bias or _biased(tensors, "q_proj", "k_proj", "v_proj"),
        output_bias=_biased(tensors, "o_proj"),
        mlp_bias=_biased(tensors, "gate_proj", "up_proj", "down_proj"),
        qk_norm=family.qk_norm,
        tie_word_embeddings=not {EMBEDDING, HEAD} <= tensors.keys(),
        sliding_windows=(window,) * num_layers if window else (),
    )
    return _with_factors(config, files)


def _check_supported(keys: Keys) -> None:
    for key, what in _REFUSED.items():
        if keys.has(key):
            keys.refuse(key, what)


def _norm_eps(keys: Keys) -> float:
    key = "attention.layer_norm_rms_epsilon"
    eps = keys.number(key, None, least=0.0, most=1.0)
    if eps is None:
        keys.fail(key, "a number from 0 to 1")
    return eps


def _architecture(header: JsonObject) -> str:
    kind = header.string("general.type", "model")
    if kind != "model":
        what = _OTHER_FILES.get(kind, "load the file of the whole model")
        raise ModelError(f'{header.where}: general.type is {shown(kind)}, expected "model": {what}')
    architecture = header.string("general.architecture", None)
    if architecture not in ARCHITECTURES:
        found = "is missing" if architecture is None else f"{shown(architecture)} is not supported"
        raise ModelError(
            f"{header.where}: general.architecture {found}; gguf supports "
            f"{', '.join(ARCHITECTURES)}; an installed plugin of kind loader can add more"
        )
    return architecture


def _biased(tensors: Mapping[str, StoredTensor], *parts: str) -> bool:
    """Whether one layer has a bias there. All need it then, so that none is left out."""
    return any(name.endswith(tuple(f".{part}.bias" for part in parts)) for name in tensors)


def _vocab_size(keys: Keys, tensors: Mapping[str, StoredTensor]) -> int:
    """Number of rows of the embedding, with a note if the header has another number, or if the
    matrix is stored as the head alone. tensors: by their Hugging Face names."""
    tokens = keys.header.strings("tokenizer.ggml.tokens")
    if not tokens:
        raise ModelError(
            f"{keys.header.where}: tokenizer.ggml.tokens is missing: expected the model's "
            "vocabulary; use a file that was converted together with its tokenizer"
        )
    embedding = tensors.get(EMBEDDING) or tensors.get(HEAD)
    if embedding is None:
        raise ModelError(
            f"{keys.header.where}: has no token_embd.weight; a file of the vocabulary alone cannot "
            "be run: use the file of the whole model"
        )
    if EMBEDDING not in tensors:
        keys.header.notes.append(
            f"{keys.header.where}: has no token_embd.weight; output.weight is used for both the "
            "embedding and the head"
        )
    rows = embedding.shape[0]
    if keys.integer("vocab_size", rows) != rows:
        keys.note("vocab_size", f"{rows} is used, the rows of {embedding.name}")
    return rows


def _rope(keys: Keys, max_positions: int) -> RopeConfig:
    theta = keys.number("rope.freq_base", 10000.0, over=1.0)
    factor = keys.number(
        "rope.scaling.factor", keys.number("rope.scale_linear", 1.0, over=0.0), over=0.0
    )
    kind = keys.string("rope.scaling.type", "linear")
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(theta=theta, kind="linear", factor=factor)
    if kind != "yarn":
        keys.fail("rope.scaling.type", "none, linear or yarn")
    for key in ("rope.scaling.yarn_ext_factor", "rope.scaling.attn_factor"):
        if keys.number(key, 1.0) != 1.0:
            keys.fail(key, "1 or absent")
    return RopeConfig(
        theta=theta,
        kind="yarn",
        factor=factor,
        original_max_position=keys.integer("rope.scaling.original_context_length", max_positions),
        beta_fast=keys.number("rope.scaling.yarn_beta_fast", 32.0, over=0.0),
        beta_slow=keys.number("rope.scaling.yarn_beta_slow", 1.0, over=0.0),
        attention_factor=keys.number("rope.scaling.yarn_attn_factor", None, least=0.0),
    )


def _with_factors(config: ModelConfig, files: Sequence[GgufFile]) -> ModelConfig:
    """Add the scaling in ``rope_freqs.weight``, if that tensor exists. Reads the tensor."""
    import torch

    for file in files:
        stored = file.tensors.get(ROPE_FACTORS)
        if stored is None:
            continue
        where = f"{file.path}: {ROPE_FACTORS}"
        if stored.shape != (config.head_dim // 2,):
            raise ModelError(
                f"{where}: expected shape [{config.head_dim // 2}], one factor for each pair of "
                f"a head, found {list(stored.shape)}"
            )
        factors = read(file, stored).to(torch.float64)
        return evolve(config, rope=from_factors(config, factors.tolist(), where))
    return config
