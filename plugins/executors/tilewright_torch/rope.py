"""Rotary position embedding and its scalings to long contexts.

RoFormer (arXiv:2104.09864), in the layout of Hugging Face checkpoints: dimension i of a head turns
together with dimension i + head_dim / 2.
"""

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from tilewright.types import ModelConfig, StepBatch

Rotary: TypeAlias = Callable[[StepBatch], tuple[Tensor, Tensor]]
"""From a step to its tokens' cosines and signed sines, as ``rotate`` takes them."""


def rotary(config: ModelConfig) -> Rotary:
    """The rotary embedding of a model.

    With dynamic scaling the frequencies of a step's tokens follow from their sequence's length once
    the step has run. Keys that are cached already keep the rotation they were written with, as in
    transformers when it decodes with a cache. A sequence's length is its own, whatever else is in
    the batch.
    """
    if config.rope.kind == "dynamic":

        def dynamic(batch: StepBatch) -> tuple[Tensor, Tensor]:
            of_sequence = dynamic_frequencies(config, batch.context_lens)
            of_token = of_sequence.repeat_interleave(batch.query_starts.diff(), dim=0)
            return _tables(batch.positions, of_token, 1.0)

        return dynamic
    fixed, scale = frequencies(config)
    return lambda batch: _tables(batch.positions, fixed, scale)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn heads [T, heads, head_dim] in float32; the result has the dtype of x.

    cos and sin are [T, 1, head_dim] float32, and the first half of sin is negated.
    """
    wide = x.float()
    halves_swapped = torch.roll(wide, wide.shape[-1] // 2, -1)
    return torch.addcmul(wide * cos, halves_swapped, sin).to(x.dtype)


def _tables(positions: Tensor, frequency: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    angle = positions.float().unsqueeze(1) * frequency
    cos, sin = angle.cos(), angle.sin()
    if scale != 1.0:
        cos, sin = cos * scale, sin * scale
    return torch.cat((cos, cos), -1).unsqueeze(1), torch.cat((-sin, sin), -1).unsqueeze(1)


def frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Radians a position, [head_dim / 2] float32, and the factor on cosine and sine.

    For all kinds but dynamic, which depends on the length.
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


def dynamic_frequencies(config: ModelConfig, lengths: Tensor) -> Tensor:
    """NTK-aware scaling that grows with the length: [B, head_dim / 2] float32 from lengths [B].

    The base grows once a sequence is longer than max_position_embeddings.
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
