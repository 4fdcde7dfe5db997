"""Small models with random weights, in memory and as Hugging Face directories.

``CONFIGS`` names shapes that differ where implementations go wrong: heads that share keys and
values in uneven ratios, heads whose size is not hidden_size / num_heads, tied and untied heads,
biases, q and k norms. ``make_model`` gives one of them weights and a tokenizer.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import evolve, frozen

from tilewright.errors import ModelError
from tilewright.types import ModelConfig, RopeConfig, TensorInfo, TensorSource, TextAssets
from tilewright.weights import expected_tensors, torch_dtype

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor


def _config(*, heads: int, kv_heads: int, head_dim: int, **more: Any) -> ModelConfig:
    defaults: dict[str, Any] = {
        "architecture": "LlamaForCausalLM",
        "vocab_size": 131,
        "hidden_size": 48,
        "intermediate_size": 83,
        "num_layers": 2,
        "norm_eps": 1e-5,
        "rope": RopeConfig(),
        "max_position_embeddings": 256,
        "dtype": "float32",
        "bos_token_id": 1,
        "eos_token_ids": (2,),
    }
    shape = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": head_dim}
    return ModelConfig(**(defaults | shape | more))


def _qwen3(**settings: Any) -> ModelConfig:
    return _config(architecture="Qwen3ForCausalLM", qk_norm=True, norm_eps=1e-6, **settings)


CONFIGS: dict[str, ModelConfig] = {
    "plain": _config(heads=4, kv_heads=4, head_dim=12),
    "grouped": _config(heads=6, kv_heads=2, head_dim=8, num_layers=3),
    "one-kv-head": _config(heads=4, kv_heads=1, head_dim=12, vocab_size=257),
    "wide-heads": _config(heads=4, kv_heads=2, head_dim=26),
    "odd-heads": _config(heads=7, kv_heads=7, head_dim=8, hidden_size=56, num_layers=1),
    "tied": _config(heads=4, kv_heads=2, head_dim=12, tie_word_embeddings=True),
    "qkv-biases": _config(
        architecture="Qwen2ForCausalLM", heads=4, kv_heads=2, head_dim=12, qkv_bias=True
    ),
    "all-biases": _config(
        heads=6, kv_heads=2, head_dim=8, qkv_bias=True, output_bias=True, mlp_bias=True
    ),
    "qk-norm": _qwen3(heads=4, kv_heads=2, head_dim=16),
    "qk-norm-tied-gqa-5": _qwen3(
        heads=10, kv_heads=2, head_dim=8, hidden_size=40, tie_word_embeddings=True
    ),
}


@frozen(kw_only=True, eq=False)
class Model:
    """A whole model in memory: what a loader must find in the files written from it."""

    config: ModelConfig
    tensors: Mapping[str, "Tensor"]
    """Tensors, keyed by Hugging Face name, in the order of
    ``tilewright.weights.expected_tensors``."""
    text: TextAssets

    def source(self) -> "MemorySource":
        return MemorySource(self.tensors)


def make_model(config: ModelConfig | str = "grouped", *, seed: int = 0, **changed: Any) -> Model:
    """A model of a configuration, or of one of CONFIGS by name, with fields of it changed.

    Weights are in config.dtype; equal arguments give equal models. Token i is the word ``t<i>``.
    """
    config = evolve(CONFIGS[config] if isinstance(config, str) else config, **changed)
    return Model(
        config=config,
        tensors=random_tensors(config, seed),
        text=TextAssets(
            tokenizer=word_tokenizer(config.vocab_size),
            special_tokens={"bos_token": "t1", "eos_token": "t2"},
        ),
    )


def random_tensors(config: ModelConfig, seed: int = 0) -> dict[str, "Tensor"]:
    """Every tensor of a model, drawn so that errors show: logits that spread over several units,
    norm weights that differ from one and biases from zero. Torch's own generator is untouched."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in expected_tensors(config).items():
        mean, spread = _distribution(name, shape)
        values = mean + spread * torch.randn(shape, generator=generator)
        tensors[name] = values.to(torch_dtype(config.dtype))
    return tensors


def _distribution(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation of a weight's random values."""
    if "norm" in name:
        return 1.0, 0.3
    if name.endswith("bias") or "embed_tokens" in name:
        return 0.0, 0.3
    sharpens = any(part in name for part in ("lm_head", "q_proj", "k_proj"))
    gain = 2.0 if sharpens else 1.0
    return 0.0, gain * float(shape[-1]) ** -0.5


def word_tokenizer(vocab_size: int) -> "Tokenizer":
    """A tokenizer of words ``t0``, ``t1``, ... between spaces; anything else becomes t0."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"t{i}": i for i in range(vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


class MemorySource:
    """A ``TensorSource`` over tensors in memory, which are returned without a copy."""

    def __init__(self, tensors: Mapping[str, "Tensor"]):
        self._tensors: Mapping[str, Tensor] | None = tensors

    def names(self) -> Collection[str]:
        return self._open().keys()

    def info(self, name: str) -> TensorInfo:
        tensor = self._open()[name]
        return TensorInfo(
            shape=tuple(tensor.shape),
            dtype=dtype_name(tensor),
            nbytes=tensor.nbytes,
            location="memory",
        )

    def get(self, name: str) -> "Tensor":
        return self._open()[name]

    def close(self) -> None:
        self._tensors = None

    def _open(self) -> "Mapping[str, Tensor]":
        if self._tensors is None:
            raise ModelError("this tensor source is closed; create another one to read the weights")
        return self._tensors


def dtype_name(tensor: "Tensor") -> str:
    """A tensor's dtype as ``TensorInfo`` names it: ``bfloat16``."""
    return str(tensor.dtype).removeprefix("torch.")


def same_bits(a: "Tensor", b: "Tensor") -> bool:
    """Whether two tensors have the same dtype, shape and bytes, including those of NaN."""
    import torch

    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if not a.numel():
        return True
    left, right = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(left, right)


def read_some(source: TensorSource, most: int = 2**28) -> dict[str, "Tensor"]:
    """Copies of a source's tensors: of all, or of the smallest that fit into ``most`` bytes."""
    read: dict[str, Tensor] = {}
    for name in sorted(source.names(), key=lambda name: source.info(name).nbytes):
        most -= source.info(name).nbytes
        if most < 0:
            break
        read[name] = source.get(name).clone()
    return read


_MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}


def write_hf_directory(model: Model, directory: Path) -> Path:
    """Write a model as a Hugging Face checkpoint: config.json, generation_config.json,
    tokenizer.json, tokenizer_config.json and model.safetensors. Returns the directory.

    For models of ``CONFIGS``, and variants in sizes, dtype or RoPE base.
    """
    from safetensors.torch import save_file

    config = model.config
    directory.mkdir(parents=True, exist_ok=True)
    eos = list(config.eos_token_ids)
    _write_json(
        directory / "config.json",
        {
            "architectures": [config.architecture],
            "model_type": _MODEL_TYPES[config.architecture],
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "rms_norm_eps": config.norm_eps,
            "rope_theta": config.rope.theta,
            "max_position_embeddings": config.max_position_embeddings,
            "hidden_act": "silu",
            "attention_bias": config.output_bias,
            "mlp_bias": config.mlp_bias,
            "tie_word_embeddings": config.tie_word_embeddings,
            "bos_token_id": config.bos_token_id,
            "eos_token_id": eos,
            "torch_dtype": config.dtype,
        },
    )
    _write_json(directory / "generation_config.json", {"eos_token_id": eos})
    model.text.tokenizer.save(str(directory / "tokenizer.json"))
    _write_json(
        directory / "tokenizer_config.json",
        dict(model.text.special_tokens) | {"chat_template": model.text.chat_template},
    )
    save_file(
        {name: tensor.contiguous() for name, tensor in model.tensors.items()},
        directory / "model.safetensors",
        metadata={"format": "pt"},
    )
    return directory


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2), encoding="utf-8")
