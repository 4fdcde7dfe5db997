"""Colours shared by the pictures of a comparison."""

from attrs import frozen

from tilewright_compare.judge import Finding

LEVELS = (0.25, 0.5, 0.75, 1.0, 2.0, 10.0, 100.0)
"""Upper ends of the shades, as error over limit. The last shade has none."""
PASSING = LEVELS.index(1.0)
"""The last passing shade."""


def level(finding: Finding) -> int:
    """The shade, from 0; failed and passed findings never share one."""
    reached = next((i for i, end in enumerate(LEVELS) if finding.excess <= end), len(LEVELS))
    return min(reached, PASSING) if finding.passed else max(reached, PASSING + 1)


def ends() -> list[str]:
    """Where each shade ends, in words."""
    return [*(f"to {end:g}" for end in LEVELS), "more"]


@frozen(kw_only=True)
class Palette:
    """Blue passes, orange fails; the larger the error, the greater the contrast with the paper.

    The two suit any colour vision; failures also have a cross.
    """

    paper: str
    ink: str
    faint: str
    rule: str
    shades: tuple[str, ...]
    crosses: tuple[str, ...]
    """Colours of the crosses on the failing shades, in their order."""
    candidate: str
    baseline: str


LIGHT = Palette(
    paper="#fff",
    ink="#1b1f24",
    faint="#5c6570",
    rule="#d5dae0",
    shades=(
        *("#dfebf7", "#b5d2ec", "#7fb1dc", "#3f83bd"),
        *("#fbcf93", "#f39a3d", "#cf5f00", "#7d3200"),
    ),
    crosses=("#1b1f24", "#1b1f24", "#fff", "#fff"),
    candidate="#c44e00",
    baseline="#0067a8",
)
DARK = Palette(
    paper="#14181d",
    ink="#e6eaef",
    faint="#a2acb8",
    rule="#38414b",
    shades=(
        *("#1c2a38", "#21405c", "#2c6090", "#4b92d0"),
        *("#8f5310", "#c9741a", "#f79b3c", "#ffd39b"),
    ),
    crosses=("#fff", "#fff", "#14181d", "#14181d"),
    candidate="#ff9a4d",
    baseline="#62b4f5",
)
