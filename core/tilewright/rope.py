"""Frequencies of rotary position embedding, and their scalings to long contexts.

RoFormer (arXiv:2104.09864). Pair i of a head's dimensions is rotated by frequency i times the
position; which two dimensions form a pair is the executor's choice of layout.
"""

import math

import torch
from torch import Tensor

from tilewright.types import ModelConfig, StepBatch


def frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Radians per position, [head_dim / 2] float32, and the factor on cosine and sine.

    For all kinds except dynamic, which depends on the length.
    """
    rope = config.rope
    frequency = 1.0 / _powers(rope.theta, config.head_dim)
    if rope.kind == "linear":
        return frequency / rope.factor, 1.0
    if rope.kind == "llama3":
        return _llama3(config, frequency), 1.0
    if rope.kind == "yarn":
        return _yarn(config, frequency), _yarn_attention_factor(config)
    return frequency, 1.0


def dynamic_lengths(batch: StepBatch) -> Tensor:
    """The length [T] int32 whose dynamic frequencies rotate each of a step's tokens.

    For a token of the prompt it is the prompt's length, and for a later one the length up to that
    token, as when transformers runs the prompt at once and decodes with a cache. It depends neither
    on other sequences, nor on how the tokens are divided into steps.
    """
    of_prompts = batch.prompt_lens.repeat_interleave(batch.query_starts.diff())
    return torch.maximum(of_prompts, batch.positions + 1)


def dynamic_frequencies(config: ModelConfig, lengths: Tensor) -> Tensor:
    """NTK-aware scaling that grows with the length: [N, head_dim / 2] float32 from lengths [N].

    The base grows once a length is above max_position_embeddings. ``dynamic_lengths`` has the
    lengths of a step's tokens.
    """
    rope, dim, limit = config.rope, config.head_dim, config.max_position_embeddings
    length = lengths.clamp(min=limit).unsqueeze(1)
    stretch = rope.factor * length / limit - (rope.factor - 1)
    return 1.0 / _powers(rope.theta * stretch ** (dim / (dim - 2)), dim)


def _powers(base: float | Tensor, dim: int) -> Tensor:
    """base ** (2 i / dim) for each pair i of dimensions."""
    exponents = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
    return torch.pow(base, exponents)


def _original_length(config: ModelConfig) -> int:
    return config.rope.original_max_position or config.max_position_embeddings


def _llama3(config: ModelConfig, frequency: Tensor) -> Tensor:
    """Llama 3.1: slow pairs are divided by factor, fast ones kept, those between blended."""
    rope, length = config.rope, _original_length(config)
    wavelength = 2 * math.pi / frequency
    low, high = rope.low_freq_factor, rope.high_freq_factor
    kept = ((length / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequency / rope.factor + kept * frequency


def _yarn(config: ModelConfig, frequency: Tensor) -> Tensor:
    """YaRN (arXiv:2309.00071), NTK by parts: blended over the pairs between two rotation counts."""
    rope, dim, length = config.rope, config.head_dim, _original_length(config)

    def pair_that_turns(times: float) -> float:
        return dim * math.log(length / (times * 2 * math.pi)) / (2 * math.log(rope.theta))

    first, last = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    width = last - first or 0.001
    stretched = ((torch.arange(dim // 2, dtype=torch.float32) - first) / width).clamp(0, 1)
    return frequency / rope.factor * stretched + frequency * (1 - stretched)


def _yarn_attention_factor(config: ModelConfig) -> float:
    rope = config.rope

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)
