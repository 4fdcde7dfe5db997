"""The OpenMP library that torch has loaded."""

import ctypes
from pathlib import Path

_SOFT = 1
"""``omp_pause_soft`` of OpenMP 5.0: what the program has set is kept."""


def openmp_libraries() -> list[str]:
    """The paths of GNU OpenMP libraries in this process; torch has one."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    files = {line.split(maxsplit=5)[-1] for line in maps.read_text().splitlines()}
    return sorted(file for file in files if "libgomp" in Path(file).name)


def end_threads() -> None:
    """End the calling thread's OpenMP threads; its next parallel region starts others.

    Each thread that has run one keeps threads of its own. With more of them than CPUs in a process,
    GNU OpenMP lets all sleep at the end of each parallel region, and waking up takes as long as a
    small operation. So a thread that has converted weights must not keep them while another one
    runs steps.
    """
    for path in openmp_libraries():
        pause = getattr(ctypes.CDLL(path), "omp_pause_resource_all", None)
        if pause:
            pause(_SOFT)
