"""Values of tensors that were converted on their way through files, such as quantised ones."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def error(found: "Tensor", stated: "Tensor") -> float:
    """Largest difference of two tensors in float32, as a fraction of the largest magnitude in
    ``stated``; infinite if the shapes differ, and for values that are not finite."""
    if found.shape != stated.shape:
        return float("inf")
    if not stated.numel():
        return 0.0
    difference = (found.float() - stated.float()).abs().max().item()
    largest = stated.float().abs().max().item() or 1.0
    return difference / largest if difference < float("inf") else float("inf")


def check_values(
    found: "Mapping[str, Tensor]", stated: "Mapping[str, Tensor]", tolerance: float
) -> None:
    """Raise AssertionError for the first tensor whose error is above the tolerance, with the
    mistake that would explain it if there is one."""
    for name, tensor in stated.items():
        off = error(found[name], tensor)
        if off <= tolerance:
            continue
        tried = ((error(found[name], wrong), what) for what, wrong in _mistakes(name, stated))
        least, what = min(tried, default=(off, ""))
        said = f": it looks {what}" if least < off / 10 else ""
        raise AssertionError(
            f"{name} must have the stated values within {tolerance:g} of their largest magnitude, "
            f"but differs by {off:.3g}{said}"
        )


def unseen(stated: "Mapping[str, Tensor]", tolerance: float) -> Iterator[str]:
    """Mistakes of a loader that these tensors would not show: each leaves a tensor as it is stated,
    within the tolerance."""
    for name, tensor in stated.items():
        for what, wrong in _mistakes(name, stated):
            if error(wrong, tensor) <= tolerance:
                yield f"{name} {what}"


def _mistakes(name: str, stated: "Mapping[str, Tensor]") -> "Iterator[tuple[str, Tensor]]":
    """What a loader that makes a mistake would return for a tensor, by the mistake in words."""
    tensor = stated[name]
    for other, another in stated.items():
        # Tied weights are one tensor under two names.
        if another is not tensor and another.shape == tensor.shape:
            yield f"taken from {other}", another
    if tensor.ndim != 2 or not tensor.numel():
        return
    scales = tensor.float().abs().amax(dim=1, keepdim=True).clamp(min=1e-30)
    unscaled = tensor.float() / scales
    yield "unscaled", unscaled
    if tensor.shape[0] == tensor.shape[1] > 1:
        yield "transposed", tensor.T
        yield "scaled along the other axis", unscaled * scales.T
