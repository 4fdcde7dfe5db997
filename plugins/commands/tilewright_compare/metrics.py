"""Distance between two tensors, in the metrics that are usual for checking kernels."""

import torch
from attrs import frozen
from torch import Tensor

_BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


@frozen(kw_only=True)
class Difference:
    """A candidate's distance from a reference of the same shape.

    Figures are over the elements that are finite on both sides, in float64. If the reference is all
    zero, the relative ones are infinite unless the candidate is zero too.
    """

    elements: int
    max_abs: float
    max_rel: float
    """Largest |candidate - reference| / |reference|, where the reference is not zero."""
    relative_rms: float
    """Frobenius norm of the difference over that of the reference."""
    cosine: float
    """Cosine of the angle between the two as vectors; 1 is the same direction."""
    gain: float
    """The factor on the reference that best fits the candidate. Rounding leaves it at 1;
    truncation, or a scale that is slightly off, does not."""
    beyond: float
    """Share of elements with |candidate - reference| > atol + rtol * |reference|."""
    max_ulps: int
    """Largest distance in representable numbers, in the lower of the two dtypes."""
    worst: tuple[int, ...]
    """Coordinates of the largest difference; or of the first element that is finite on one side
    only, if there is one."""
    candidate_at_worst: float
    reference_at_worst: float
    candidate_nonfinite: int
    reference_nonfinite: int

    @property
    def nmse(self) -> float:
        """Mean squared error over the reference's mean square."""
        return self.relative_rms**2

    @property
    def more_nonfinite(self) -> bool:
        """Whether the candidate has more non-finite elements than the reference."""
        return self.candidate_nonfinite > self.reference_nonfinite


METRICS = ("max_abs", "max_rel", "relative_rms", "nmse", "cosine", "beyond", "max_ulps")
"""Figures of a Difference that a tolerance can limit."""


def difference(
    candidate: Tensor, reference: Tensor, *, rtol: float = 1e-2, atol: float = 1e-5
) -> Difference:
    """Raises ValueError for tensors of different shapes, and for empty ones."""
    if candidate.shape != reference.shape or not candidate.numel():
        raise ValueError(
            f"expected two tensors of one shape with elements, found {list(candidate.shape)} and "
            f"{list(reference.shape)}"
        )
    found, expected = candidate.double().flatten(), reference.double().flatten()
    found_finite, expected_finite = found.isfinite(), expected.isfinite()
    both = found_finite & expected_finite
    gap = (found - expected).abs()
    size = expected.abs()
    one_sided = (found_finite != expected_finite).nonzero()
    worst = int(one_sided[0]) if len(one_sided) else int(gap.where(both, -1.0).argmax())
    f, e, g, ours, theirs = found, expected, gap, candidate.flatten(), reference.flatten()
    if not both.all():
        f, e, g, ours, theirs = (t[both] for t in (f, e, g, ours, theirs))
    coordinates = torch.unravel_index(torch.tensor(worst), candidate.shape)
    return Difference(
        elements=candidate.numel(),
        max_abs=_max(g),
        max_rel=_max((g / e.abs()).where(e != 0, 0.0)),
        relative_rms=_ratio(float(g.norm()), float(e.norm())),
        cosine=_cosine(f, e),
        gain=_gain(f, e),
        beyond=float((gap > atol + rtol * size).logical_or(~both).double().mean()),
        max_ulps=_ulps(ours, theirs),
        worst=tuple(int(i) for i in coordinates),
        candidate_at_worst=float(found[worst]),
        reference_at_worst=float(expected[worst]),
        candidate_nonfinite=int((~found_finite).sum()),
        reference_nonfinite=int((~expected_finite).sum()),
    )


def _max(values: Tensor) -> float:
    return float(values.max()) if len(values) else 0.0


def _ratio(above: float, below: float) -> float:
    if below:
        return above / below
    return float("inf") if above else 0.0


def _cosine(a: Tensor, b: Tensor) -> float:
    norms = float(a.norm() * b.norm())
    if norms:
        return min(1.0, float(a @ b) / norms)
    return 1.0 if torch.equal(a, b) else 0.0


def _gain(a: Tensor, b: Tensor) -> float:
    square = float(b @ b)
    if square:
        return float(a @ b) / square
    return 1.0 if torch.equal(a, b) else float("inf")


def _ulps(a: Tensor, b: Tensor) -> int:
    """Largest distance in representable numbers. Bit patterns of numbers of one sign, read as
    integers, are in the order of the numbers."""
    if not len(a):
        return 0
    lower = a.dtype if a.dtype.itemsize <= b.dtype.itemsize else b.dtype
    steps = []
    for tensor in (a, b):
        bits = tensor.to(lower).contiguous().view(_BITS[lower]).long()
        least = torch.iinfo(_BITS[lower]).min
        steps.append(torch.where(bits < 0, least - bits, bits))
    return int((steps[0] - steps[1]).abs().max())
