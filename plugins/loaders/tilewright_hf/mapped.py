"""Files that are mapped into memory, and tensors that share their pages."""

import math
import mmap
import weakref
from pathlib import Path
from typing import TYPE_CHECKING

from tilewright.errors import ModelError
from tilewright_hf.files import one_line
from tilewright_hf.shards import no_weights

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_MAP_NORESERVE = 0x4000
"""Linux's value on the architectures that torch supports; Python defines it only since 3.13."""

_AROUND = 2**21
"""Bytes before and after a page that Linux may map with it: a huge page."""


def map_file(path: Path) -> mmap.mmap:
    """A whole file. Raises ModelError for one that cannot be read, or holds no weights."""
    try:
        with path.open("rb") as file:
            if why := no_weights(path):
                raise ModelError(f"{path}: {why}")
            # Private and writable, so that torch takes the tensors without a copy or a warning.
            # Writes never reach the file; a page costs memory only once it is written.
            return mmap.mmap(
                file.fileno(),
                0,
                flags=mmap.MAP_PRIVATE | _MAP_NORESERVE,
                prot=mmap.PROT_READ | mmap.PROT_WRITE,
            )
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read: {one_line(error)}") from error


def mapped_tensor(
    memory: mmap.mmap, dtype: "torch.dtype", shape: tuple[int, ...], start: int
) -> "Tensor":
    """A tensor that shares the pages of a mapped file, from a byte on.

    Its pages leave the process's memory with the last tensor that shares its storage, so that a
    model whose weights are converted one by one never holds the file beside them.
    """
    import torch

    if 0 in shape:
        return torch.empty(shape, dtype=dtype)
    nbytes = math.prod(shape) * dtype.itemsize
    view = memoryview(memory)[start : start + nbytes]  # what the storage holds a reference to
    drop = weakref.finalize(view, drop_pages, memory, start, nbytes)
    drop.atexit = False
    return torch.frombuffer(view, dtype=dtype).view(shape)


def drop_pages(memory: mmap.mmap, start: int, nbytes: int) -> None:
    """Take bytes of a mapped file out of the process's memory, and what lies around them.

    They stay in the file cache, and come back when they are read. Nothing may have written to them.
    """
    first = max(0, start - _AROUND) // mmap.PAGESIZE * mmap.PAGESIZE
    end = min(len(memory), start + nbytes + _AROUND)
    memory.madvise(mmap.MADV_DONTNEED, first, end - first)
