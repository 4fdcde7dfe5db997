"""The random numbers of samplers are those of Philox4x32-10."""

import pytest

from tilewright.sampling import philox4x32, uniform

FULL = 2**32 - 1


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((FULL,) * 4, (FULL,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_the_known_answers_of_random123(
    counter: tuple[int, int, int, int], key: tuple[int, int], words: tuple[int, int, int, int]
) -> None:
    """The vectors of philox4x32 with 10 rounds in the file kat_vectors of Random123."""
    assert philox4x32(counter, key) == words


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, 0xA4093822_299F31D0, 2**63 - 1])
@pytest.mark.parametrize("position", [0, 1, 70_000, FULL])
def test_the_uniform_number_has_the_first_53_bits_for_seed_and_position(
    seed: int, position: int
) -> None:
    first, second, _, _ = philox4x32((position, 0, 0, 0), (seed % 2**32, seed // 2**32))
    bits = f"{first:032b}{second:032b}"[:53]
    assert uniform(seed, position) == int(bits, 2) / 2**53 < 1.0


@pytest.mark.parametrize(
    ("seed", "position", "message"),
    [
        (-1, 0, r"seed must be from 0 to 2\*\*64 - 1, found -1"),
        (2**64, 0, "seed must be"),
        (0, -1, r"position must be from 0 to 2\*\*32 - 1, found -1"),
        (0, 2**32, "position must be"),
    ],
)
def test_a_seed_or_a_position_out_of_range_is_refused(
    seed: int, position: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        uniform(seed, position)
