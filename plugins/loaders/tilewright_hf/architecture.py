"""config.json -> ModelConfig, for the families that share one dense decoder architecture.

Absent keys have the defaults of the configuration classes of transformers 5.
"""

from typing import Any, Literal, cast

from attrs import frozen

from tilewright.errors import ModelError
from tilewright.types import DTYPES, DType, ModelConfig, RopeConfig, RopeKind
from tilewright_hf.files import JsonObject, shown


@frozen(kw_only=True)
class Family:
    """Distinguishing features of a model type, and its defaults.

    window: which layers have the sliding window: none, all, or those that ``layer_types`` or
        ``max_window_layers`` selects while ``use_sliding_window`` is on.
    """

    architecture: str
    vocab_size: int
    intermediate_size: int
    num_kv_heads: int | None
    """Number of KV heads; None: as many as heads."""
    head_dim: int | None = None
    """Dimension of a head; None: hidden_size / num_heads."""
    max_position_embeddings: int
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    qkv_bias: bool = False
    attention_bias_key: bool = False
    """Whether ``attention_bias`` turns on the biases of the q, k, v and o projections."""
    mlp_bias_key: bool = False
    qk_norm: bool = False
    window: Literal["none", "all", "some"] = "none"


FAMILIES = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        vocab_size=32000,
        intermediate_size=11008,
        num_kv_heads=None,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_ids=(2,),
        attention_bias_key=True,
        mlp_bias_key=True,
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        vocab_size=32000,
        intermediate_size=14336,
        num_kv_heads=8,
        max_position_embeddings=131072,
        bos_token_id=1,
        eos_token_ids=(2,),
        window="all",
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        vocab_size=151936,
        intermediate_size=22016,
        num_kv_heads=32,
        max_position_embeddings=32768,
        qkv_bias=True,
        window="some",
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        vocab_size=151936,
        intermediate_size=22016,
        num_kv_heads=32,
        head_dim=128,
        max_position_embeddings=32768,
        attention_bias_key=True,
        qk_norm=True,
        window="some",
    ),
}

MAX_LAYERS = 10_000

_REFUSED = {
    "quantization_config": "quantised weights",
    "compression_config": "compressed weights",
    "num_experts": "mixtures of experts",
    "num_local_experts": "mixtures of experts",
    "n_routed_experts": "mixtures of experts",
    "per_layer_config": "layers that differ in shape",
    "is_encoder_decoder": "encoder-decoder models",
    "vision_config": "images",
    "audio_config": "audio",
}
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")

_DTYPE_ALIASES = {"half": "float16", "float": "float32"}
_WIDER = ("float64", "double")
"""Dtypes whose weights are read as float32."""

_ROPE_FIELDS: dict[RopeKind, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
}
_ROPE_COMMON = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


def model_config(config: JsonObject) -> tuple[ModelConfig, tuple[str, ...]]:
    """The model that a config.json describes, and warnings about settings that have no effect or
    that were read although they are odd.

    ModelConfig.dtype is float32 when config.json names none (see ``declared_dtype``).
    Raises ModelError for missing, out-of-range or unsupported values.
    """
    family = _family(config)
    _check_supported(config)
    vocab_size = config.integer("vocab_size", family.vocab_size)
    hidden_size = config.integer("hidden_size", 4096)
    num_layers = config.integer("num_hidden_layers", 32, maximum=MAX_LAYERS)
    num_heads = config.integer("num_attention_heads", 32)
    num_kv_heads = (
        config.optional_integer("num_key_value_heads", family.num_kv_heads, maximum=num_heads)
        or num_heads
    )
    head_dim = head_size(
        config.where,
        hidden=("'hidden_size'", hidden_size),
        heads=("'num_attention_heads'", num_heads),
        kv_heads=("'num_key_value_heads'", num_kv_heads),
        given=("'head_dim'", config.optional_integer("head_dim", family.head_dim)),
    )
    max_positions = config.integer("max_position_embeddings", family.max_position_embeddings)
    bias = family.attention_bias_key and config.boolean("attention_bias", False)
    rope, warnings = _rope(config, max_positions, head_dim)
    without_effect = {"none": ("sliding_window", "layer_types"), "all": ("layer_types",)}
    for key in without_effect.get(family.window, ()):
        if config.values.get(key) is not None:
            warnings += (f"{config.where}: {key!r} has no effect on {family.architecture}",)
    eos_token_ids = family.eos_token_ids
    if "eos_token_id" in config.values:
        eos_token_ids = config.token_ids("eos_token_id", vocab_size) or ()
    model = ModelConfig(
        architecture=family.architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=config.integer("intermediate_size", family.intermediate_size),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        norm_eps=config.number("rms_norm_eps", 1e-6, least=0.0, most=1.0),
        rope=rope,
        max_position_embeddings=max_positions,
        dtype=declared_dtype(config) or "float32",
        qkv_bias=family.qkv_bias or bias,
        output_bias=bias,
        mlp_bias=family.mlp_bias_key and config.boolean("mlp_bias", False),
        qk_norm=family.qk_norm,
        tie_word_embeddings=config.boolean("tie_word_embeddings", False),
        sliding_windows=_sliding_windows(config, family, num_layers),
        bos_token_id=config.token_id("bos_token_id", family.bos_token_id, vocab_size),
        eos_token_ids=eos_token_ids,
    )
    return model, (*config.notes, *warnings)


def _check_supported(config: JsonObject) -> None:
    for key, what in _REFUSED.items():
        value = config.values.get(key)
        if value and not (key in _EXPERTS and value == 1):
            raise ModelError(
                f"{config.where}: {key!r} is set, but {what} are not supported by hf-local; "
                "use another checkpoint of the model, or a loader plugin that reads this one"
            )
    for key in (*_EXPERTS, "moe_intermediate_size"):
        if config.values.get(key):
            config.note(key, "it has no effect on a model without experts")
    if config.string("hidden_act", "silu") not in ("silu", "swish"):
        config.fail("hidden_act", "silu, the activation of the supported families")


def head_size(
    where: str,
    hidden: tuple[str, int],
    heads: tuple[str, int],
    kv_heads: tuple[str, int],
    given: tuple[str, int | None],
) -> int:
    """The size of an attention head: as given, or hidden size / heads.

    Each argument is a key, as messages show it, and its value. Raises ModelError for sizes that do
    not fit each other.
    """
    if heads[1] % kv_heads[1]:
        raise ModelError(
            f"{where}: {heads[0]} must be a multiple of {kv_heads[0]}, found {heads[1]} and "
            f"{kv_heads[1]}"
        )
    size = given[1]
    if size is None:
        if hidden[1] % heads[1]:
            raise ModelError(
                f"{where}: {hidden[0]} must be a multiple of {heads[0]} when {given[0]} is not "
                f"given, found {hidden[1]} and {heads[1]}"
            )
        size = hidden[1] // heads[1]
    if size % 2:
        raise ModelError(f"{where}: the head size must be even, found {size}")
    return size


def declared_dtype(config: JsonObject) -> DType | None:
    """The dtype that config.json names (``dtype``, or ``torch_dtype`` of older files), if any.

    Names are those of torch, with or without ``torch.``; float64 becomes float32, with a note.
    """
    for key in ("dtype", "torch_dtype"):
        value = config.values.get(key)
        if value is None or value == "auto":
            continue
        name = value.removeprefix("torch.") if isinstance(value, str) else value
        if name in _WIDER:
            config.note(key, "float32 is used")
            return "float32"
        name = _DTYPE_ALIASES.get(name, name) if isinstance(name, str) else name
        if name not in DTYPES:
            config.fail(key, f"one of {', '.join(DTYPES)}")
        return cast(DType, name)
    return None


def _family(config: JsonObject) -> Family:
    model_type = config.values.get("model_type")
    if model_type is not None:
        model_type = config.string("model_type", None)
    architectures = config.strings("architectures") or ()
    supported = "; ".join(f"{kind}: {f.architecture}" for kind, f in FAMILIES.items())
    more = f"hf-local supports {supported}; an installed plugin of kind loader can add more"
    if model_type is None and not architectures:
        raise ModelError(
            f"{config.where}: has neither 'model_type' nor 'architectures', so the architecture "
            f"is unknown ({more})"
        )
    if model_type is None:
        families = [f for f in FAMILIES.values() if f.architecture in architectures]
    else:
        families = [f for kind, f in FAMILIES.items() if kind == model_type]
        if not families:
            raise ModelError(
                f"{config.where}: model_type {shown(model_type)} is not supported ({more})"
            )
    decoder = families[0].architecture.replace("ForCausalLM", "Model") if families else ""
    known = {families[0].architecture, decoder if model_type else ""} if families else set()
    named = {name.lower() for name in architectures}  # LLaMAForCausalLM in the first files
    if not families or (named and not {name.lower() for name in known} & named):
        of = f" for model_type {model_type!r}" if model_type else ""
        found = ", ".join(shown(name) for name in architectures[:3])
        raise ModelError(f"{config.where}: architecture {found} is not supported{of} ({more})")
    return families[0]


def _sliding_windows(config: JsonObject, family: Family, num_layers: int) -> tuple[int | None, ...]:
    if family.window == "none":
        return ()
    slides = family.window == "all" or config.boolean("use_sliding_window", False)
    window = config.optional_integer("sliding_window", 4096) if slides else None
    if family.window == "all":
        return (window,) * num_layers if window else ()
    types = config.strings("layer_types")
    if types is None:
        first = config.integer("max_window_layers", 28, minimum=0) if slides else 0
        return tuple(window if i >= first else None for i in range(num_layers)) if window else ()
    known = ("full_attention", "sliding_attention")
    if len(types) != num_layers or not set(types) <= set(known):
        odd = next((t for t in types if t not in known), None)
        found = f"{len(types)} entries" if odd is None else shown(odd)
        raise ModelError(
            f"{config.where}: 'layer_types' must have {num_layers} entries (num_hidden_layers), "
            f"each {' or '.join(known)}, found {found}"
        )
    if "sliding_attention" not in types:
        return ()
    if window is None:
        raise ModelError(
            f"{config.where}: 'layer_types' has sliding_attention, but the window is not set: "
            "expected 'use_sliding_window' true and 'sliding_window' a number of tokens"
        )
    return tuple(window if t == "sliding_attention" else None for t in types)


def _rope(
    config: JsonObject, max_positions: int, head_dim: int
) -> tuple[RopeConfig, tuple[str, ...]]:
    """``rope_scaling`` (older files) or ``rope_parameters``; the first wins where both are set."""
    flat = config.without_nulls()
    theta = flat.number("rope_theta", 10000.0, over=1.0)
    _whole_head(flat)
    found = config.object("rope_scaling") or config.object("rope_parameters")
    if found is None:
        return RopeConfig(theta=theta), ()
    rope = found.without_nulls()
    nested = [key for key, value in rope.values.items() if isinstance(value, dict)]
    if nested:
        raise ModelError(
            f"{rope.where}: settings for each layer type ({nested[0][:60]!r}) are not supported "
            "for this model; expected one set for all layers"
        )
    _whole_head(rope)
    theta = rope.number("rope_theta", theta, over=1.0)
    key = "rope_type" if "rope_type" in rope.values else "type"
    if key not in rope.values and "factor" in rope.values:
        raise ModelError(
            f"{rope.where}: has 'factor' but no 'rope_type'; expected one of "
            f"{', '.join(_ROPE_FIELDS)}"
        )
    kind = cast(RopeKind, rope.choice(key, "default", _ROPE_FIELDS))
    ignored = sorted(rope.values.keys() - set(_ROPE_COMMON) - set(_ROPE_FIELDS[kind]))
    warnings = tuple(f"{rope.where}: {k[:60]!r} has no effect on {kind} RoPE" for k in ignored)
    if kind == "default":
        return RopeConfig(theta=theta), warnings
    original = max_positions if kind == "dynamic" else None
    if kind in ("llama3", "yarn"):
        # Where both are set, transformers uses the outer one.
        outer = flat if "original_max_position_embeddings" in flat.values else rope
        original = outer.integer("original_max_position_embeddings", max_positions)
    factor = rope.number("factor", None, over=0.0)
    if kind == "yarn" and original and "factor" in found.values and factor is None:
        factor = max_positions / original  # the meaning of null, which some YaRN files have
    if factor is None:
        rope.fail("factor", f"a number, the scaling factor of {kind} RoPE")
    if kind == "dynamic" and head_dim == 2:
        raise ModelError(f"{rope.where}: dynamic RoPE needs a head size above 2")
    more = _llama3(rope) if kind == "llama3" else _yarn(rope) if kind == "yarn" else {}
    return RopeConfig(
        theta=theta, kind=kind, factor=factor, original_max_position=original, **more
    ), warnings


def _llama3(rope: JsonObject) -> dict[str, Any]:
    low = rope.number("low_freq_factor", None, over=0.0)
    high = rope.number("high_freq_factor", None, over=0.0)
    if low is None or high is None or high <= low:
        raise ModelError(
            f"{rope.where}: expected 'low_freq_factor' below 'high_freq_factor', found "
            f"{shown(low)} and {shown(high)}"
        )
    return {"low_freq_factor": low, "high_freq_factor": high}


def _yarn(rope: JsonObject) -> dict[str, Any]:
    """YaRN settings. As in transformers, 0 means not set, except for attention_factor."""
    return {
        "attention_factor": rope.number("attention_factor", None, least=0.0),
        "beta_fast": rope.number("beta_fast", 0.0, least=0.0) or 32.0,
        "beta_slow": rope.number("beta_slow", 0.0, least=0.0) or 1.0,
        "mscale": rope.number("mscale", 0.0, least=0.0) or None,
        "mscale_all_dim": rope.number("mscale_all_dim", 0.0, least=0.0) or None,
        "truncate": rope.boolean("truncate", True),
    }


def _whole_head(section: JsonObject) -> None:
    if section.number("partial_rotary_factor", 1.0) != 1.0:
        section.fail("partial_rotary_factor", "1: RoPE over part of a head is not supported")
