"""The memory of the machine, or of the container that this process runs in."""

import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
"""The container's own control group (version 2)."""


def available_memory() -> int:
    """Bytes that this process can still allocate.

    The kernel's file cache counts as available, since the kernel would reclaim it.
    """
    available = _counts(Path("/proc/meminfo")).get("MemAvailable:", total_memory() >> 10) << 10
    limit = _memory_limit()
    if limit is None:
        return available
    stat = _counts(CGROUP / "memory.stat")
    files = stat.get("inactive_file", 0) + stat.get("active_file", 0)
    used = int((CGROUP / "memory.current").read_text()) - files
    return max(0, min(available, limit - used))


def total_memory() -> int:
    """Bytes of memory, within the container's limit."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _memory_limit()
    return total if limit is None else min(total, limit)


def _memory_limit() -> int | None:
    try:
        return int((CGROUP / "memory.max").read_text())
    except (OSError, ValueError):  # no container, or no limit: "max"
        return None


def _counts(path: Path) -> dict[str, int]:
    """Parse a file with a name and a number per line; empty if it cannot be read."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    return {name: int(count) for name, count, *_ in map(str.split, lines)}
