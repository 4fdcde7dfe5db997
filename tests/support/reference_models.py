"""Small random-weight models of every supported family, made by transformers: the tests' oracle.

``CONFIGS`` names the configurations; ``write_model`` makes a Hugging Face directory of one. The
weights are drawn so that errors are visible: logits spread over several units, norm weights differ
from one and biases from zero.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)


def _config(
    make: type[PreTrainedConfig],
    *,
    heads: int,
    kv_heads: int,
    hidden: int = 48,
    layers: int = 2,
    vocab: int = 131,
    rope: dict[str, Any] | None = None,
    **more: Any,
) -> PreTrainedConfig:
    return make(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=more.pop("intermediate", 83),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=more.pop("positions", 256),
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0} | (rope or {}),
        bos_token_id=1,
        eos_token_id=2,
        **more,
    )


def _qwen3(**settings: Any) -> PreTrainedConfig:
    return _config(Qwen3Config, **({"head_dim": 16} | settings))


def _qwen2(**settings: Any) -> PreTrainedConfig:
    return _config(Qwen2Config, **settings)


def _llama(**settings: Any) -> PreTrainedConfig:
    return _config(LlamaConfig, **settings)


def _mistral(**settings: Any) -> PreTrainedConfig:
    return _config(MistralConfig, **settings)


CONFIGS: dict[str, PreTrainedConfig] = {
    "qwen3-tied": _qwen3(heads=4, kv_heads=2, tie_word_embeddings=True),
    "qwen3-odd-heads": _qwen3(heads=3, kv_heads=3, head_dim=32, hidden=40),
    "qwen3-gqa-5": _qwen3(heads=10, kv_heads=2, head_dim=8, vocab=257),
    "qwen3-gqa-8": _qwen3(heads=16, kv_heads=2, head_dim=8),
    "qwen3-mqa-biases": _qwen3(heads=4, kv_heads=1, attention_bias=True),
    "qwen3-six-layers": _qwen3(heads=4, kv_heads=2, layers=6),
    "qwen3-one-layer": _qwen3(heads=4, kv_heads=4, layers=1),
    "qwen3-some-layers-slide": _qwen3(
        heads=4,
        kv_heads=2,
        layers=3,
        use_sliding_window=True,
        sliding_window=7,
        max_window_layers=1,
    ),
    "qwen3-yarn": _qwen3(
        heads=4,
        kv_heads=2,
        head_dim=20,
        rope={
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "qwen3-dynamic-past-the-end": _qwen3(
        heads=4, kv_heads=2, positions=24, rope={"rope_type": "dynamic", "factor": 3.0}
    ),
    "qwen2-tied": _qwen2(heads=4, kv_heads=2, tie_word_embeddings=True),
    "qwen2-odd-heads-mqa": _qwen2(heads=7, kv_heads=1, hidden=56),
    "qwen2-slides": _qwen2(
        heads=6, kv_heads=3, use_sliding_window=True, sliding_window=10, max_window_layers=0
    ),
    "qwen2-dynamic-past-the-end": _qwen2(
        heads=4, kv_heads=2, positions=32, rope={"rope_type": "dynamic", "factor": 2.0}
    ),
    "qwen2-yarn-factor": _qwen2(
        heads=3,
        kv_heads=1,
        rope={
            "rope_type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 32,
            "attention_factor": 0.7,
            "beta_fast": 24.0,
            "beta_slow": 2.0,
            "truncate": False,
        },
    ),
    "qwen2-six-layers": _qwen2(heads=4, kv_heads=4, layers=6, vocab=257),
    "llama-mha": _llama(heads=4, kv_heads=4, rms_norm_eps=1e-5),
    "llama-llama3": _llama(
        heads=4,
        kv_heads=2,
        hidden=64,
        rope={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "llama-linear": _llama(heads=4, kv_heads=2, rope={"rope_type": "linear", "factor": 4.0}),
    "llama-dynamic-within": _llama(
        heads=4, kv_heads=1, rope={"rope_type": "dynamic", "factor": 4.0}, layers=1
    ),
    "llama-biases": _llama(
        heads=6, kv_heads=2, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
    ),
    "llama-gqa-5": _llama(heads=15, kv_heads=3, hidden=120, tie_word_embeddings=True),
    "llama-head-dim": _llama(heads=4, kv_heads=2, head_dim=26, layers=6),
    "llama-yarn-mscale": _llama(
        heads=4,
        kv_heads=2,
        rope={
            "rope_type": "yarn",
            "factor": 16.0,
            "original_max_position_embeddings": 16,
            "mscale": 0.9,
            "mscale_all_dim": 0.6,
        },
    ),
    "mistral-slides": _mistral(heads=4, kv_heads=2, sliding_window=8),
    "mistral-gqa-8": _mistral(heads=8, kv_heads=1, head_dim=18, sliding_window=None),
    "mistral-window-of-three": _mistral(heads=5, kv_heads=5, hidden=40, sliding_window=3, layers=6),
    "mistral-wide-window": _mistral(
        heads=2,
        kv_heads=1,
        head_dim=64,
        sliding_window=64,
        vocab=67,
        layers=1,
        rope={"rope_type": "linear", "factor": 2.5},
    ),
}


def write_model(
    model: str | PreTrainedConfig, directory: Path | str, dtype: str = "float32", seed: int = 0
) -> PreTrainedModel:
    """Write a model with random weights as a Hugging Face directory, and return it.

    model: a name in CONFIGS or a configuration. Attention is transformers' eager one. The
    directory also gets a tokenizer whose token i is the word ``t<i>``.
    """
    config = CONFIGS[model] if isinstance(model, str) else model
    made = random_model(config, seed).to(getattr(torch, dtype))
    made.save_pretrained(directory)
    _write_tokenizer(Path(directory), config)
    return made


def random_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A float32 model in evaluation mode; the same configuration and seed give the same weights."""
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            mean, spread = _distribution(name, weight)
            weight.copy_(mean + spread * torch.randn(weight.shape, generator=random))
    return model.eval()


def _distribution(name: str, weight: torch.Tensor) -> tuple[float, float]:
    """Mean and standard deviation of a parameter's random values."""
    if "norm" in name:
        return 1.0, 0.3
    if name.endswith("bias"):
        return 0.0, 0.3
    if "embed_tokens" in name:
        return 0.0, 0.3
    gain = 2.0 if "lm_head" in name or "q_proj" in name or "k_proj" in name else 1.0
    return 0.0, gain * weight.shape[-1] ** -0.5


def words(token_ids: list[int]) -> str:
    """The text that the written tokenizer turns into token_ids."""
    return " ".join(f"t{i}" for i in token_ids)


def _write_tokenizer(directory: Path, config: PreTrainedConfig) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {f"t{i}": i for i in range(config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"bos_token": "t1", "eos_token": "t2", "tokenizer_class": "PreTrainedTokenizerFast"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def prompts(config: PreTrainedConfig, lengths: list[int], seed: int = 1) -> Iterator[list[int]]:
    """Random prompts of the given lengths, without the special ids 0 to 2."""
    random = torch.Generator().manual_seed(seed)
    for length in lengths:
        yield torch.randint(3, config.vocab_size, (length,), generator=random).tolist()
