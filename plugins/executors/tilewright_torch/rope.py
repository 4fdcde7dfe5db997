"""Rotary position embedding (RoFormer, arXiv:2104.09864) of a step's tokens.

The layout is that of Hugging Face checkpoints: dimension i of a head is rotated together with
dimension i + head_dim / 2.
"""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from tilewright.rope import dynamic_frequencies, dynamic_lengths, frequencies
from tilewright.types import ModelConfig, StepBatch

Angles: TypeAlias = Callable[[StepBatch], Tensor]
"""Maps a step to the angles of its tokens, [T, head_dim / 2] float32, in radians."""

Rotary: TypeAlias = Callable[[StepBatch], tuple[Tensor, Tensor]]
"""Maps a step to the cosines and signed sines of its tokens, as ``rotate`` takes them."""


def angles(config: ModelConfig) -> tuple[Angles, float]:
    """The angles by which a model rotates, and the factor of their cosines and sines.

    With dynamic scaling, each token has frequencies of its own (``dynamic_lengths``). Keys that are
    already cached keep the rotation they were written with, as in transformers when it decodes with
    a cache. Other sequences in the batch have no effect.
    """
    if config.rope.kind == "dynamic":

        def dynamic(batch: StepBatch) -> Tensor:
            of_token = dynamic_frequencies(config, dynamic_lengths(batch))
            return batch.positions.float().unsqueeze(1) * of_token

        return dynamic, 1.0
    fixed, scale = frequencies(config)
    return lambda batch: batch.positions.float().unsqueeze(1) * fixed, scale


def rotary(config: ModelConfig) -> Rotary:
    """The rotary embedding of a model."""
    of_step, scale = angles(config)
    return lambda batch: tables(of_step(batch), scale)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads [T, heads, head_dim] in float32; the result has the dtype of x.

    cos and sin are [T, 1, head_dim] float32, and the first half of sin is negated.
    """
    wide = x.float()
    halves_swapped = torch.roll(wide, wide.shape[-1] // 2, -1)
    return torch.addcmul(wide * cos, halves_swapped, sin).to(x.dtype)


def tables(angle: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines of angles [T, head_dim / 2], times the scale."""
    cos, sin = angle.cos(), angle.sin()
    if scale != 1.0:
        cos, sin = cos * scale, sin * scale
    return torch.cat((cos, cos), -1).unsqueeze(1), torch.cat((-sin, sin), -1).unsqueeze(1)
