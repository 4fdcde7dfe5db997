"""Storage of the KV cache for executors that keep it in tensors on the CPU."""

from math import prod
from mmap import mmap

import torch
from torch import Tensor

from tilewright.errors import OutOfPagesError
from tilewright.types import KvCacheSpec, KvLayer
from tilewright.weights import torch_dtype


def page_shape(spec: KvCacheSpec) -> tuple[int, int, int]:
    """Shape of one page of keys, or of values, in the spec's row order."""
    if spec.row_order == "NHD":
        return spec.page_size, spec.num_kv_heads, spec.head_dim
    return spec.num_kv_heads, spec.page_size, spec.head_dim


def allocate(spec: KvCacheSpec, num_pages: int) -> list[KvLayer]:
    """A cache of zeros, one entry per layer. Memory is taken when a page is first written.

    Raises OutOfPagesError when it does not fit into the address space.
    """
    shape, dtype = (num_pages, *page_shape(spec)), torch_dtype(spec.dtype)
    try:
        return [KvLayer(zeros(shape, dtype), zeros(shape, dtype)) for _ in range(spec.num_layers)]
    except (MemoryError, OSError, OverflowError) as error:
        size = f"{num_pages * spec.page_bytes / 2**30:.1f} GiB"
        raise OutOfPagesError(
            f"a KV cache of {num_pages} pages takes {size}, which could not be allocated "
            f"({error}): lower total_pages, max_seq_len or max_batch_size"
        ) from error


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Like ``torch.zeros``, which would touch every page of memory now."""
    memory = mmap(-1, prod(shape) * dtype.itemsize)
    return torch.frombuffer(memory, dtype=dtype).reshape(shape)
