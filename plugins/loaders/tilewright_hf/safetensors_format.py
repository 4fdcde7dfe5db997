"""Weight format ``safetensors``: model.safetensors, or shards with model.safetensors.index.json."""

import json
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from attrs import field, frozen, validators

from tilewright.errors import ConfigError, ModelError
from tilewright.hookspecs import hookimpl
from tilewright.types import PluginInfo, TensorInfo, TensorSource
from tilewright.weights import SAFETENSORS_DTYPES, torch_dtype
from tilewright_hf.files import check_file, one_line
from tilewright_hf.mapped import map_file, mapped_tensor
from tilewright_hf.shards import ShardedSource, no_weights, open_shards, other_sets

if TYPE_CHECKING:
    from torch import Tensor

tilewright_api = 2

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_MAX_HEADER = 100_000_000
"""Largest header in bytes that safetensors itself accepts."""


@frozen
class Options:
    backend: Literal["mmap", "pread"] = field(
        default="mmap",
        validator=validators.in_(("mmap", "pread")),
        metadata={
            "help": "mmap: tensors share the file's pages, nothing is copied; pread: each tensor "
            "is read into its own memory, which is faster on network disks"
        },
    )


@hookimpl
def plugin_info() -> PluginInfo:
    return PluginInfo(
        summary=f"{SINGLE}, or shards with {INDEX}",
        options=Options,
        limits={"other files": "consolidated.safetensors and the like are ignored"},
    )


@hookimpl
def can_open(directory: Path) -> bool:
    try:
        names = os.listdir(directory)
        return INDEX in names or bool(other_sets(names, SINGLE))
    except OSError:
        return False


@hookimpl
def open_weights(directory: Path, options: Options) -> TensorSource:
    """Open a directory's tensors. Headers are read and checked against the files' sizes.

    Raises ModelError for a file that is absent, truncated or not safetensors, and for an index that
    does not agree with its shards.
    """
    open_shard = partial(_Shard, backend=options.backend)
    return ShardedSource(open_shards(directory, SINGLE, INDEX, open_shard))


@hookimpl
def write_weights(directory: Path, tensors: "Mapping[str, Tensor]") -> float:
    from safetensors.torch import save_file

    # save_file refuses tensors that share memory.
    save_file({name: t.contiguous().clone() for name, t in tensors.items()}, directory / SINGLE)
    return 0.0


class _Shard:
    """One open safetensors file."""

    def __init__(self, path: Path, backend: str):
        from safetensors import safe_open

        check_file(path)
        try:
            self.handle: Any = safe_open(path, "pt", **_backend(backend))
            self.tensors, self.starts = _header(path)
        except Exception as error:
            if isinstance(error, TypeError) and backend != "mmap":
                raise ConfigError(
                    f"safetensors option backend {backend!r} needs safetensors 0.8 or newer: "
                    "upgrade it, or use mmap"
                ) from error
            raise ModelError(f"{path}: {_diagnosis(path, error)}") from error
        self.path = path
        self.memory = map_file(path) if backend == "mmap" else None

    def read(self, name: str) -> "Tensor":
        stored = self.tensors[name]
        if self.memory is None or stored.dtype not in SAFETENSORS_DTYPES.values():
            tensor: Tensor = self.handle.get_tensor(name)
            return tensor
        dtype = torch_dtype(stored.dtype)
        return mapped_tensor(self.memory, dtype, stored.shape, self.starts[name])

    def read_rows(self, name: str, start: int, stop: int) -> "Tensor":
        if self.memory is not None:
            return self.read(name)[start:stop]
        rows: Tensor = self.handle.get_slice(name)[start:stop]
        return rows


def _backend(backend: str) -> dict[str, str]:
    return {} if backend == "mmap" else {"backend": backend}


def _header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, int]]:
    """The tensors of a file that safetensors has validated, and the offset of each in it."""
    with path.open("rb", buffering=0) as file:  # a buffer would also read tensors
        size = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(size))
    header.pop("__metadata__", None)
    infos, starts = {}, {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        infos[name] = TensorInfo(
            shape=tuple(entry["shape"]),
            dtype=_dtype(entry["dtype"]),
            nbytes=end - start,
            location=str(path),
        )
        starts[name] = 8 + size + start
    return infos, starts


def _dtype(code: str) -> str:
    return SAFETENSORS_DTYPES.get(code, code.lower())


def _diagnosis(path: Path, error: Exception) -> str:
    """The probable reason why a file could not be opened."""
    if isinstance(error, OSError):
        return f"cannot be read: {one_line(error)}"
    if why := no_weights(path):
        return why
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(9)
        header_size = int.from_bytes(start[:8], "little")
        file.seek(8)
        if start[8:] != b"{" or header_size > _MAX_HEADER:
            return f"not a safetensors file: {one_line(error)}"
        if 8 + header_size > size:
            return f"truncated: its header alone takes {8 + header_size} bytes, found {size}"
        try:
            header = json.loads(file.read(header_size))
            ends = [v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"]
            expected = 8 + header_size + max(ends, default=0)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            return f"not a safetensors file: {one_line(error)}"
    if isinstance(expected, int) and expected > size:
        return f"truncated: expected {expected} bytes, found {size}; download it again"
    return f"not a valid safetensors file: {one_line(error)}"
