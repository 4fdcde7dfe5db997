"""The memory of the machine, or of the container that this process runs in."""

import os
from collections.abc import Iterator
from pathlib import Path

from attrs import frozen

CGROUP = Path("/sys/fs/cgroup")
"""Where control groups are mounted: version 2, or a folder for each controller of version 1."""

PROC = Path("/proc/self")


@frozen
class _Names:
    """The files of a version of control groups, and the file cache in their ``memory.stat``."""

    limit: str
    used: str
    files: tuple[str, str]


_V1 = _Names(
    "memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")
)
_V2 = _Names("memory.max", "memory.current", ("inactive_file", "active_file"))


def available_memory() -> int:
    """Bytes that this process can still allocate.

    That is the least of what the machine has left and of what each control group has: its limit
    less its use. The kernel's file cache counts as available, since the kernel would reclaim it.
    """
    left = [_counts(Path("/proc/meminfo")).get("MemAvailable:", total_memory() >> 10) << 10]
    for group, names, limit in _limits():
        stat = _counts(group / "memory.stat")
        files = sum(stat.get(name, 0) for name in names.files)
        left.append(limit - max(0, (_number(group / names.used) or 0) - files))
    return max(0, min(left))


def total_memory() -> int:
    """Bytes of memory, within the limits of the process's control groups."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([total, *(limit for _, _, limit in _limits())])


def _limits() -> Iterator[tuple[Path, _Names, int]]:
    """The control groups that limit this process, with the limit in bytes.

    Version 1 has a number near 2**63 for no limit, which is above any machine's memory.
    """
    for group, names in _groups():
        limit = _number(group / names.limit)
        if limit is not None:
            yield group, names, limit


def _groups() -> Iterator[tuple[Path, _Names]]:
    """The process's control groups that may limit memory, and all that contain them.

    A limit holds for the groups inside the group. ``/proc/self/cgroup`` names the process's group
    from the hierarchy's root; a container may see only a part of the hierarchy, whose own root is
    in ``/proc/self/mountinfo``. See cgroups(7), and proc(5) for both files.
    """
    own = {"": "/", "memory": "/"}
    for line in _lines(PROC / "cgroup"):
        _, controllers, path = line.split(":", 2)
        own |= dict.fromkeys(controllers.split(","), path)
    roots = {fields[4]: fields[3] for fields in map(str.split, _lines(PROC / "mountinfo"))}
    for controller, names, mount in (("", _V2, CGROUP), ("memory", _V1, CGROUP / "memory")):
        inside = Path(os.path.relpath(own[controller], roots.get(str(mount), "/")))
        if ".." in inside.parts:  # the process is not in the part that is mounted
            inside = Path()
        for folder in (inside, *inside.parents):
            yield mount / folder, names


def _lines(path: Path) -> list[str]:
    """The lines of a file; none if it cannot be read."""
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []


def _number(path: Path) -> int | None:
    """The number that a file holds; None if it cannot be read or holds a word, such as ``max``."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _counts(path: Path) -> dict[str, int]:
    """Parse a file with a name and a number per line; empty if it cannot be read."""
    return {name: int(count) for name, count, *_ in map(str.split, _lines(path))}
