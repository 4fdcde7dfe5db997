"""Rotary embedding against transformers, at the sizes and positions of real models."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from tilewright.types import ModelConfig, RopeConfig, StepBatch
from tilewright_testing.paged import Sequences
from tilewright_torch.rope import rotary, rotate

SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0},
    "llama-3.1": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "qwen3-yarn": {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
    },
    "yarn-mscale": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 0.707,
        "truncate": False,
    },
    "yarn-short": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 2.0,
        "original_max_position_embeddings": 8,
    },
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0},
}
LIMIT = 4096
HEAD_DIM = 128


def config(scaling: dict[str, Any]) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=256,
        num_attention_heads=2,
        head_dim=HEAD_DIM,
        max_position_embeddings=LIMIT,
        rope_parameters=scaling,
    )


def ours(scaling: dict[str, Any]) -> ModelConfig:
    names = {
        "rope_type": "kind",
        "rope_theta": "theta",
        "original_max_position_embeddings": "original_max_position",
    }
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=1,
        hidden_size=256,
        intermediate_size=1,
        num_layers=1,
        num_heads=2,
        num_kv_heads=2,
        head_dim=HEAD_DIM,
        norm_eps=1e-6,
        rope=RopeConfig(**{names.get(key, key): value for key, value in scaling.items()}),
        max_position_embeddings=LIMIT,
        dtype="float32",
    )


def step(sequences: Sequence[range]) -> StepBatch:
    """The positions of some sequences' new tokens, each ending where its context ends."""
    prompts = {str(name): new.stop for name, new in enumerate(sequences)}
    held = Sequences(page_size=16, total_pages=16384, prompts=prompts)
    for name, new in enumerate(sequences):
        if new.start:
            held.batch({str(name): [0] * new.start})
    return held.batch({str(name): [0] * len(new) for name, new in enumerate(sequences)})


def rotated_by_transformers(hf: LlamaConfig, x: Tensor, positions: range) -> Tensor:
    cos, sin = LlamaRotaryEmbedding(hf)(x, torch.tensor([list(positions)]))
    return apply_rotary_pos_emb(x[None], x[None], cos, sin, unsqueeze_dim=2)[0][0]


@pytest.mark.parametrize("name", SCALINGS)
def test_rotated_heads_match_transformers(name: str) -> None:
    hf = config(SCALINGS[name])
    sequences = [range(5), range(LIMIT - 3, LIMIT), range(39_000, 39_002)]
    cos, sin = rotary(ours(SCALINGS[name]))(step(sequences))
    for start, positions in zip((0, 5, 8), sequences, strict=True):
        rows = slice(start, start + len(positions))
        x = torch.randn(len(positions), 3, HEAD_DIM, generator=torch.Generator().manual_seed(0))
        found = rotate(x, cos[rows], sin[rows])
        # 39000 radians in float32 are exact to 4e-3; both sides round the same product.
        torch.testing.assert_close(
            found, rotated_by_transformers(hf, x, positions), rtol=0, atol=1e-5
        )


def test_dynamic_scaling_of_a_sequence_is_independent_of_the_batch() -> None:
    embedding = rotary(ours(SCALINGS["dynamic"]))
    long, short = range(3 * LIMIT, 3 * LIMIT + 4), range(7)
    together = embedding(step([long, short]))
    for table, alone in zip(together, embedding(step([short])), strict=True):
        assert torch.equal(table[4:], alone)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_heads_are_rotated_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    cos, sin = rotary(ours(SCALINGS["qwen3-yarn"]))(step([range(1000, 1009)]))
    x = torch.randn(9, 3, HEAD_DIM, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(rotate(x, cos, sin), rotate(x.float(), cos, sin).to(dtype))
