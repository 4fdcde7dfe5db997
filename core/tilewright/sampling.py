"""Random numbers for samplers: a hash of a request's seed and a token's position.

The hash is the counter-based generator Philox4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel
random numbers: as easy as 1, 2, 3" (SC'11). It has no state, so any device can compute any number
of a request in any order.
"""

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def philox4x32(
    counter: tuple[int, int, int, int], key: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Philox4x32 with 10 rounds: four random words for a counter and a key of words.

    A word is an integer of 32 bits, 0 to 2**32 - 1.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _WORD, (p0 >> 32) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits that depends only on seed and position.

    With ``w = philox4x32((position, 0, 0, 0), (seed % 2**32, seed // 2**32))`` it is
    ``((w[0] * 2**32 + w[1]) >> 11) / 2**53``.

    seed: that of ``SamplingParams``, 0 to 2**64 - 1. position: that of ``SamplerRow``, 0 to
    2**32 - 1. Raises ValueError for others.
    """
    for name, value, bits in (("seed", seed, 64), ("position", position, 32)):
        if not 0 <= value < 1 << bits:
            raise ValueError(f"{name} must be from 0 to 2**{bits} - 1, found {value}")
    high, low, _, _ = philox4x32((position, 0, 0, 0), (seed & _WORD, seed >> 32))
    return ((high << 32 | low) >> 11) * 2.0**-53
