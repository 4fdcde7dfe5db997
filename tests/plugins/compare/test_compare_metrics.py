"""How far a tensor is from another, held to numpy and to closed forms."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tilewright_compare.judge import logits_agreement
from tilewright_compare.metrics import difference


def randoms(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    reference = randoms(5, 7, 3)
    return reference + 0.01 * randoms(5, 7, 3, seed=1), reference


def test_norms_and_angles_are_numpys(pair):
    a, b = (x.double().numpy() for x in pair)
    d = difference(*pair)
    assert d.elements == 105
    assert d.max_abs == pytest.approx(np.abs(a - b).max())
    assert d.max_rel == pytest.approx((np.abs(a - b) / np.abs(b)).max())
    assert d.relative_rms == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(b))
    assert d.nmse == pytest.approx(np.mean((a - b) ** 2) / np.mean(b**2))
    cosine = np.corrcoef(np.stack([np.r_[a.ravel(), -a.ravel()], np.r_[b.ravel(), -b.ravel()]]))
    assert d.cosine == pytest.approx(cosine[0, 1], abs=1e-12)


def test_the_gain_is_that_of_a_least_squares_fit(pair):
    a, b = (x.double().numpy().ravel() for x in pair)
    assert difference(*pair).gain == pytest.approx(np.linalg.lstsq(b[:, None], a, rcond=None)[0][0])
    assert difference(-0.75 * pair[1], pair[1]).gain == pytest.approx(-0.75)


def test_the_share_beyond_tolerance_is_what_numpy_does_not_call_close(pair):
    for rtol, atol in ((1e-2, 1e-5), (0.0, 0.01), (0.1, 0.0), (1.0, 1.0)):
        close = np.isclose(*(x.double().numpy() for x in pair), rtol=rtol, atol=atol)
        assert difference(*pair, rtol=rtol, atol=atol).beyond == pytest.approx(1 - close.mean())


def test_worst_is_where_the_largest_difference_is():
    reference = randoms(4, 6, 8)
    candidate = reference.clone()
    candidate[2, 5, 1] += 3
    candidate[0, 0, 0] -= 2
    d = difference(candidate, reference)
    assert d.worst == (2, 5, 1)
    assert (d.candidate_at_worst, d.reference_at_worst) == (
        float(candidate[2, 5, 1]),
        float(reference[2, 5, 1]),
    )


def test_views_are_compared_by_coordinates():
    reference = randoms(6, 4)
    assert difference(reference.T.contiguous().T, reference).max_ulps == 0
    assert difference(reference[:, ::2], reference[:, ::2].clone()).max_abs == 0
    assert difference(reference.T, reference.reshape(4, 6)).relative_rms > 0.5


@pytest.mark.parametrize("steps", [1, 2, 1000])
@pytest.mark.parametrize("start", [0.0, 1.0, -1.0, 1e-45, 3.1e-39, -7.7e33, 0.99999994])
def test_float32_ulps_are_the_steps_that_numpy_takes(start, steps):
    value = np.float32(start)
    for _ in range(steps):
        value = np.nextafter(value, np.float32(np.inf))
    assert difference(torch.tensor([float(value)]), torch.tensor([start])).max_ulps == steps


def test_float32_ulps_cross_zero():
    least = float(np.nextafter(np.float32(0), np.float32(1)))
    assert difference(torch.tensor([least]), torch.tensor([-least])).max_ulps == 2
    assert difference(torch.tensor([-0.0]), torch.tensor([0.0])).max_ulps == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_ulps_are_steps_through_all_numbers(dtype):
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    ordered = every[every.isfinite()].sort().values.unique()  # one zero
    for start, steps in ((0, 1), (100, 7), (len(ordered) // 2 - 3, 6), (len(ordered) - 9, 8)):
        a, b = ordered[start : start + 1], ordered[start + steps : start + steps + 1]
        assert difference(b, a).max_ulps == difference(a, b).max_ulps == steps


def test_ulps_are_of_the_lower_dtype():
    wide = torch.tensor([1.0, 1.0 + 2**-7, 1.0 + 2**-20])
    assert difference(torch.ones(3, dtype=torch.bfloat16), wide).max_ulps == 1
    assert difference(wide, torch.ones(3)).max_ulps == 2**16


def test_rounding_is_an_ulp_at_most_and_costs_what_theory_says():
    exact = torch.rand(20000, generator=torch.Generator().manual_seed(0)) + 1
    d = difference(exact.bfloat16(), exact)
    step = 2**-7  # between 1 and 2
    assert d.max_ulps == 0  # both are rounded to the lower dtype
    assert d.max_abs <= step / 2
    mean_square = (2**3 - 1) / 3
    assert d.relative_rms == pytest.approx(step / math.sqrt(12 * mean_square), rel=0.02)
    assert d.gain == pytest.approx(1, abs=1e-4)


def test_what_is_not_finite_is_counted_on_each_side_and_left_out_of_the_figures():
    reference = torch.tensor([1.0, 2.0, math.inf, math.nan, 5.0])
    candidate = torch.tensor([1.0, math.nan, math.inf, 4.0, 5.5])
    d = difference(candidate, reference)
    assert (d.candidate_nonfinite, d.reference_nonfinite) == (2, 2)
    assert d.worst == (1,)
    assert math.isnan(d.candidate_at_worst)
    assert d.reference_at_worst == 2.0
    assert d.max_abs == 0.5
    assert d.relative_rms == pytest.approx(0.5 / math.sqrt(26))
    assert d.beyond == pytest.approx(4 / 5)


def test_nothing_finite_is_no_crash():
    d = difference(torch.full((3,), math.nan), torch.ones(3))
    assert (d.candidate_nonfinite, d.max_abs, d.max_ulps, d.beyond) == (3, 0.0, 0, 1.0)


def test_a_reference_of_zeros_has_no_relative_error_to_speak_of():
    zeros = torch.zeros(4)
    same = difference(zeros, zeros)
    assert (same.relative_rms, same.max_rel, same.cosine, same.gain) == (0.0, 0.0, 1.0, 1.0)
    other = difference(torch.tensor([0.0, 0.0, 1e-9, 0.0]), zeros)
    assert (other.relative_rms, other.gain, other.cosine) == (math.inf, math.inf, 0.0)
    assert other.worst == (2,)


def test_direction_is_told_from_size():
    reference = randoms(50)
    assert difference(3 * reference, reference).cosine == pytest.approx(1)
    assert difference(-reference, reference).cosine == pytest.approx(-1)
    assert difference(torch.zeros(50), reference).cosine == 0.0


@pytest.mark.parametrize("shapes", [((2, 3), (3, 2)), ((3,), (3, 1)), ((0,), (0,))])
def test_other_shapes_and_nothing_at_all_are_refused(shapes):
    with pytest.raises(ValueError, match="one shape with elements, found"):
        difference(*(torch.zeros(shape) for shape in shapes))


def test_a_near_tie_is_one_that_rounding_could_swap_however_wrong_the_candidate_is():
    truth = torch.tensor([[1.0, 3.0, 2.9], [1.0, 3.0, 0.0]])
    baseline = truth + torch.tensor([[0.0, -0.06, 0.0], [0.0, -0.06, 0.0]])
    candidate = torch.zeros(2, 3)
    tie, clear = logits_agreement(0, [0, 1], candidate, baseline, truth)
    assert (tie.near_tie, clear.near_tie) == (True, False)
    assert tie.noise == pytest.approx(0.06)
    assert tie.error == pytest.approx(3.0)
