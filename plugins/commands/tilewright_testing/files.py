"""What a plugin does to files, as the process and the file system see it (Linux's /proc)."""

import gc
import os
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from attrs import field, frozen

_INVERTED = bytes(255 - byte for byte in range(256))


def files_of(place: Path) -> list[Path]:
    """The files of a folder and its subfolders, sorted; for a file, that file alone."""
    if place.is_file():
        return [place]
    return sorted(path for path in place.rglob("*") if path.is_file())


def contents(place: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in files_of(place)}


@frozen
class OpenFile:
    """An open file, which equals itself also after it or a folder above it got another path."""

    device: int
    inode: int
    path: str = field(eq=False)
    """With " (deleted)" at its end if the file was deleted."""


def open_files() -> Counter[OpenFile]:
    """The files that this process has open, and how often, after garbage collection."""
    gc.collect()
    found: Counter[OpenFile] = Counter()
    for number in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{number}")
            status = os.fstat(int(number))
        except OSError:  # the listing itself
            continue
        if target.startswith("/") and not target.startswith(("/proc/", "/dev/")):
            found[OpenFile(status.st_dev, status.st_ino, target)] += 1
    return found


def still_open(before: Counter[OpenFile]) -> list[str]:
    """The paths of the files that are open more often than ``before``."""
    return [file.path for file in open_files() - before]


def bytes_read() -> int:
    """How many bytes this process has read so far. Reading through a memory map does not count."""
    with open("/proc/self/io") as file:
        return int(next(line for line in file if line.startswith("rchar")).split()[1])


def invert(place: Path) -> None:
    """Invert every bit of all files, in place: sizes and open files stay as they are."""
    for path in files_of(place):
        with path.open("r+b") as file:
            data = file.read()
            file.seek(0)
            file.write(data.translate(_INVERTED))


def corruptions(place: Path, count: int, seed: int = 0) -> Iterator[tuple[str, Path, bytes]]:
    """Corruptions of single bytes, mostly near the beginning of files: a description, the file, and
    its corrupted content."""
    chosen = random.Random(seed)
    files = [path for path in files_of(place) if path.stat().st_size]
    for _ in range(count):
        path = chosen.choice(files)
        data = bytearray(path.read_bytes())
        at = chosen.randrange(min(len(data), chosen.choice((16, 512, len(data)))))
        data[at] = chosen.choice([v for v in (0, 1, 0x7F, 0xFF, data[at] ^ 1) if v != data[at]])
        yield f"byte {at} of {path.name} set to {data[at]}", path, bytes(data)
