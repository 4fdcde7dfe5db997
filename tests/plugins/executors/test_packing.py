"""How a comparison describes a weight that differs from the checkpoint."""

import pytest
import torch

from tilewright_compare.packing import how_packed

GATE = torch.arange(24.0).reshape(4, 6) - 7
UP = GATE.flip(0) * 3
SQUARE = GATE[:, :4].contiguous()
NORM = torch.tensor([0.5, 2.0, 1.0])


@pytest.mark.parametrize(
    ("packed", "source", "told"),
    [
        (SQUARE.T, SQUARE, "it is transposed"),
        (GATE.T.reshape(4, 6), GATE, "its transpose is read with the original shape"),
        (-GATE, GATE, "its sign is flipped"),
        (torch.zeros(4, 6), GATE, "it is all zero"),
        (NORM + 1, NORM, "1 is added to it"),
        (UP, GATE, "it is up"),
        (GATE[[0, 2, 1, 3]], GATE, "its rows are in another order: row 1 is the checkpoint's 2"),
        (
            GATE[:, [0, 1, 5, 3, 4, 2]],
            GATE,
            "its columns are in another order: column 2 is the checkpoint's 5",
        ),
        (
            NORM[[1, 0, 2]],
            NORM,
            "its elements are in another order: element 0 is the checkpoint's 1",
        ),
        (GATE * 1.5, GATE, ""),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_common_packing_errors_are_described_in_words(packed, source, told, dtype):
    others = [("up", UP.to(dtype))]
    assert how_packed(packed.to(dtype).contiguous(), source.to(dtype), others) == told


def test_other_weights_are_read_only_if_needed():
    def others():
        raise AssertionError("read")
        yield

    assert how_packed(SQUARE.T, SQUARE, others()) == "it is transposed"
