"""Known bugs of RoPE, as hypotheses."""

import math
from collections.abc import Callable, Iterator

import torch
from attrs import evolve
from torch import Tensor

from tilewright.types import RopeConfig
from tilewright_compare.bugs_norms import Change, least
from tilewright_compare.layer import Case, Operations, angles, rope_scale, rotate_halves


def rotate_neighbours(x: Tensor, angle: Tensor) -> Tensor:
    """Rotates dimension 2 i of x [T, heads, head_dim] with 2 i + 1."""
    a, b = x[..., ::2], x[..., 1::2]
    cos, sin = angle.cos().unsqueeze(1), angle.sin().unsqueeze(1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)


def _at(change: Change) -> Callable[[Case], Tensor]:
    """Angles for changed positions."""

    def moved(case: Case) -> Tensor:
        positions = change(case.batch.positions.long()).to(case.batch.positions.dtype)
        return angles(evolve(case, batch=evolve(case.batch, positions=positions)))

    return moved


def _moved(by: int) -> Change:
    return lambda positions: (positions + by).clamp(min=0)


def _with_rope(rope: RopeConfig) -> Callable[[Case], Tensor]:
    return lambda case: angles(evolve(case, config=evolve(case.config, rope=rope)))


def rope(case: Case) -> Iterator[tuple[str, Operations]]:
    if case.layer is None:
        return
    yield "RoPE rotates neighbouring dimensions, not halves", Operations(rotate=rotate_neighbours)
    yield "RoPE is missing", Operations(rotated=())
    for stage in ("q_rope", "k_rope"):
        yield (
            f"RoPE of {'keys' if stage[0] == 'q' else 'queries'} is missing",
            Operations(rotated=(stage,)),
        )
    yield (
        "RoPE rotates the other way",
        Operations(rotate=lambda x, angle: rotate_halves(x, -angle)),
    )
    for whose, heads in (("queries", case.config.num_heads), ("keys", case.config.num_kv_heads)):
        if case.config.num_heads != case.config.num_kv_heads:

            def back(x: Tensor, angle: Tensor, heads: int = heads) -> Tensor:
                return rotate_halves(x, -angle if x.shape[1] == heads else angle)

            yield f"RoPE of {whose} rotates the other way", Operations(rotate=back)
    for by in (1, -1):
        yield (
            f"RoPE's positions are {'ahead' if by > 0 else 'behind'} by one",
            Operations(angles=_at(_moved(by))),
        )
    starts = case.batch.query_starts
    first = case.batch.positions[starts[:-1].long()].repeat_interleave(starts.diff())
    if bool(first.any()):
        yield (
            "RoPE's positions start at 0 in each step",
            Operations(angles=_at(lambda p: p - first)),
        )
    if len(starts) > 2:
        yield (
            "RoPE's positions are rows of the step, counted over all sequences",
            Operations(angles=_at(lambda p: torch.arange(len(p)))),
        )
    if case.config.rope.kind != "default":
        plain = RopeConfig(theta=case.config.rope.theta)
        yield "RoPE is not scaled", Operations(angles=_with_rope(plain), rope_scale=1.0)
        yield "RoPE's frequencies are not scaled", Operations(angles=_with_rope(plain))
        yield "RoPE's scale of cosine and sine is missing", Operations(rope_scale=1.0)
    if (theta := _theta(case)) is not None:
        yield (
            f"RoPE's theta is about {theta:.3g}, not {case.config.rope.theta:g}",
            Operations(angles=_with_rope(evolve(case.config.rope, theta=theta))),
        )
    if (end := _end_of_table(case)) is not None:
        yield (
            f"RoPE's table ends at position {end - 1}, which is used for all after it",
            Operations(angles=_at(lambda p: p.clamp(max=end - 1))),
        )
        yield (
            f"RoPE's table has {end} positions, and wraps around after them",
            Operations(angles=_at(lambda p: p % end)),
        )


def _in_place(first: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Rotates one half, and then the other one with the half that is rotated already."""

    def rotate(x: Tensor, angle: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        cos, sin = angle.cos().unsqueeze(1), angle.sin().unsqueeze(1)
        if first:
            b = b * cos + a * sin
            return torch.cat((a * cos - b * sin, b), -1)
        a = a * cos - b * sin
        return torch.cat((a, b * cos + a * sin), -1)

    return rotate


ROTATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "RoPE{} has cosine and sine in each other's place": lambda x, angle: rotate_halves(
        x, math.pi / 2 - angle
    ),
    "RoPE{} rotates the first half in place, and the second half with the result": _in_place(0),
    "RoPE{} rotates the second half in place, and the first half with the result": _in_place(1),
    "RoPE{} rotates the first half only": lambda x, angle: torch.cat(
        (rotate_halves(x, angle).chunk(2, -1)[0], x.chunk(2, -1)[1]), -1
    ),
    "RoPE{} rotates the second half only": lambda x, angle: torch.cat(
        (x.chunk(2, -1)[0], rotate_halves(x, angle).chunk(2, -1)[1]), -1
    ),
}


def rope_of_halves(case: Case) -> Iterator[tuple[str, Operations]]:
    """Mistakes in how the halves of a head are rotated."""
    if case.layer is None:
        return
    heads, kv_heads = case.config.num_heads, case.config.num_kv_heads
    for what, rotate in ROTATIONS.items():
        yield what.format(""), Operations(rotate=rotate)
        if heads == kv_heads:
            continue  # by their number, queries cannot be told from keys
        for whose, number in (("queries", heads), ("keys", kv_heads)):

            def some(
                x: Tensor,
                angle: Tensor,
                number: int = number,
                rotate: Callable[[Tensor, Tensor], Tensor] = rotate,
            ) -> Tensor:
                return (rotate if x.shape[1] == number else rotate_halves)(x, angle)

            yield what.format(f" of {whose}"), Operations(rotate=some)


def _theta(case: Case) -> float | None:
    """The best-fitting theta, if the candidate taps rotated queries or keys."""
    config = case.config
    stage = "q_rope" if "q_rope" in case.found else "k_rope"
    if not case.comparable(stage):
        return None
    before = case.right[f"{stage[0]}_{'norm' if config.qk_norm else 'proj'}"]
    scale = rope_scale(config)

    def error(log_theta: float) -> float:
        angle = _with_rope(evolve(config.rope, theta=math.exp(log_theta)))(case)
        made = rotate_halves(before, angle) * scale
        return float((case.found[stage].float() - made).norm())

    best = least(error, math.log(100.0), math.log(1e8))
    return math.exp(best) if error(best) < error(math.log(config.rope.theta)) else None


def _end_of_table(case: Case) -> int | None:
    """The first position with wrong rotated heads, if it is above 1."""
    stage = "q_rope" if "q_rope" in case.found else "k_rope"
    if not case.comparable(stage):
        return None
    found, right = case.found[stage].float().flatten(1), case.right[stage].flatten(1)
    limit = case.limits[stage].worst_row * right.norm(dim=1).pow(2).mean().sqrt()
    wrong = case.batch.positions[(found - right).norm(dim=1) > limit]
    return int(wrong.min()) if len(wrong) and int(wrong.min()) > 1 else None
