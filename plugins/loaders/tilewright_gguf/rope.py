"""``rope_freqs.weight`` -> the settings of Llama 3.1's RoPE scaling that it was made from.

GGUF stores the divisor of each pair's frequency, not the settings. Low frequencies f (radians per
position) are divided by the largest factor F, high ones by 1, and between them 1 / factor =
(1 - k) / F + k with k = (L f / 2 pi - low) / (high - low). Only L / (high - low) and
low / (high - low) have an effect, so L can be chosen freely.
"""

import math
from collections.abc import Iterator, Sequence

from attrs import evolve

from tilewright.errors import ModelError
from tilewright.types import ModelConfig, RopeConfig

_USUAL = (8192, 1.0, 4.0)
"""L, low and high in all of Meta's models."""

_TOLERANCE = 1e-5
"""Relative tolerance of factors: they are float32 and computed from float32 frequencies."""


def from_factors(config: ModelConfig, factors: Sequence[float], where: str) -> RopeConfig:
    """config.rope with the scaling that the factors [head_dim / 2] were made from.

    Raises ModelError for factors of any other scaling.
    """
    from tilewright.rope import frequencies

    if config.rope.kind != "default":
        raise ModelError(
            f"{where}: factors together with {config.rope.kind} RoPE scaling are not supported"
        )
    odd = [f for f in factors if not (math.isfinite(f) and f > 0)]
    if odd:
        raise ModelError(f"{where}: expected finite factors above 0, found {odd[0]:g}")
    plain = frequencies(config)[0].tolist()
    if all(abs(f - 1) <= _TOLERANCE for f in factors):
        return config.rope
    for rope in _candidates(config.rope, plain, factors):
        scaled = frequencies(evolve(config, rope=rope))[0].tolist()
        if all(
            math.isclose(p, s * f, rel_tol=_TOLERANCE)
            for p, s, f in zip(plain, scaled, factors, strict=True)
        ):
            return rope
    raise ModelError(
        f"{where}: expected the factors of Llama 3.1's RoPE scaling, found other factors, which "
        "are not supported"
    )


def _candidates(
    rope: RopeConfig, frequency: Sequence[float], factors: Sequence[float]
) -> Iterator[RopeConfig]:
    factor = max(factors)
    if all(math.isclose(f, factor, rel_tol=_TOLERANCE) for f in factors):
        yield evolve(rope, kind="linear", factor=factor)
        return

    def llama3(length: int, low: float, high: float) -> RopeConfig:
        return evolve(
            rope,
            kind="llama3",
            factor=factor,
            original_max_position=length,
            low_freq_factor=low,
            high_freq_factor=high,
        )

    yield llama3(*_USUAL)
    # Rotations per position and k of each pair; k is linear in them where it is not 0 or 1.
    points = [
        (f / (2 * math.pi), (1 / d - 1 / factor) / (1 - 1 / factor))
        for f, d in zip(frequency, factors, strict=True)
    ]
    slow = max((x for x, k in points if k <= _TOLERANCE), default=0.0)
    fast = min((x for x, k in points if k >= 1 - _TOLERANCE), default=math.inf)
    between = [(x, k) for x, k in points if slow < x < fast]
    if len(between) > 1:
        (x0, k0), (x1, k1) = between[-1], between[0]
        slope = (k1 - k0) / (x1 - x0)
    else:
        # Any line that does not change the pairs on both sides has the same effect.
        x0, k0 = between[0] if between else (slow, 0.0)
        slope = max((1 - k0) / (fast - x0), k0 / (x0 - slow) if between else 0.0)
    if slope > 0:
        low, width = slope * x0 - k0, _USUAL[0] / slope  # width is high - low
        yield llama3(_USUAL[0], low * width, (1 + low) * width)
