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

Rotary: TypeAlias = Callable[[StepBatch], tuple[Tensor, Tensor]]
"""Maps a step to the cosines and signed sines of its tokens, as ``rotate`` takes them."""


def rotary(config: ModelConfig) -> Rotary:
    """The rotary embedding of a model.

    With dynamic scaling, each token has frequencies of its own (``dynamic_lengths``). Keys that are
    already cached keep the rotation they were written with, as in transformers when it decodes with
    a cache. Other sequences in the batch have no effect.
    """
    if config.rope.kind == "dynamic":

        def dynamic(batch: StepBatch) -> tuple[Tensor, Tensor]:
            of_token = dynamic_frequencies(config, dynamic_lengths(batch))
            return _tables(batch.positions, of_token, 1.0)

        return dynamic
    fixed, scale = frequencies(config)
    return lambda batch: _tables(batch.positions, fixed, scale)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads [T, heads, head_dim] in float32; the result has the dtype of x.

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
