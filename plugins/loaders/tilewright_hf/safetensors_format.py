"""Weight format ``safetensors``: model.safetensors, or shards with model.safetensors.index.json."""

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from attrs import field, frozen, validators

from tilewright.errors import ConfigError, ModelError, listed
from tilewright.hookspecs import hookimpl
from tilewright.types import PluginInfo, TensorInfo
from tilewright.weights import printable
from tilewright_hf.files import check_file, is_there, one_line, read_json, shown

if TYPE_CHECKING:
    from torch import Tensor

tilewright_api = 1

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_MAX_HEADER = 100_000_000
"""Bytes: what safetensors itself accepts at most."""

_LFS_POINTER = b"version https://git-lfs"

_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
}


@frozen
class Options:
    backend: Literal["mmap", "pread"] = field(
        default="mmap",
        validator=validators.in_(("mmap", "pread")),
        metadata={
            "help": "mmap: tensors share the file's pages, nothing is copied; pread: each tensor "
            "is read into memory of its own, which is faster on network disks"
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
        return any(n == INDEX or n.endswith(".safetensors") for n in os.listdir(directory))
    except OSError:
        return False


@hookimpl
def open_weights(directory: Path, options: Options) -> "SafetensorsSource":
    """Open a directory's tensors. Headers are read and checked against the files' sizes.

    Raises ModelError for a file that is absent, truncated or no safetensors file, and for an index
    that does not agree with its shards.
    """
    names = sorted(os.listdir(directory)) if directory.is_dir() else []
    if SINGLE in names:
        return SafetensorsSource([_Shard(directory / SINGLE, options.backend)])
    if INDEX in names:
        return SafetensorsSource(_indexed(directory / INDEX, options.backend))
    found = [name for name in names if name.endswith((".safetensors", ".bin", ".pth", ".gguf"))]
    raise ModelError(
        f"{directory}: expected {SINGLE}, or {INDEX} and its shards; found "
        f"{listed([printable(name) for name in found]) if found else 'no weights'}"
    )


@hookimpl
def write_weights(directory: Path, tensors: "Mapping[str, Tensor]") -> None:
    from safetensors.torch import save_file

    # Tensors that share memory are refused.
    save_file({name: t.contiguous().clone() for name, t in tensors.items()}, directory / SINGLE)


class _Shard:
    """One open safetensors file."""

    def __init__(self, path: Path, backend: str):
        from safetensors import safe_open

        check_file(path)
        try:
            self.handle: Any = safe_open(path, "pt", **_backend(backend))
            self.tensors = _infos(path)
        except Exception as error:
            if isinstance(error, TypeError) and backend != "mmap":
                raise ConfigError(
                    f"safetensors option backend {backend!r} needs safetensors 0.8 or newer: "
                    "upgrade it, or use mmap"
                ) from error
            raise ModelError(f"{path}: {_diagnosis(path, error)}") from error
        self.path = path


class SafetensorsSource:
    """A ``TensorSource`` over open safetensors files. Any thread may call ``get``."""

    def __init__(self, shards: Collection[_Shard]):
        self._shards: Mapping[str, _Shard] | None = {
            name: shard for shard in shards for name in shard.tensors
        }

    def names(self) -> Collection[str]:
        return self._open().keys()

    def info(self, name: str) -> TensorInfo:
        return self._open()[name].tensors[name]

    def get(self, name: str) -> "Tensor":
        shard = self._open()[name]
        try:
            tensor: Tensor = shard.handle.get_tensor(name)
        except Exception as error:
            raise ModelError(
                f"{shard.path}: tensor {printable(name)} cannot be read: {one_line(error)}"
            ) from error
        return tensor

    def close(self) -> None:
        """Tensors that were handed out stay valid."""
        self._shards = None

    def _open(self) -> Mapping[str, _Shard]:
        if self._shards is None:
            raise ModelError("these weights are closed; load the model again to read them")
        return self._shards


def _backend(backend: str) -> dict[str, str]:
    return {} if backend == "mmap" else {"backend": backend}


def _infos(path: Path) -> dict[str, TensorInfo]:
    """Shapes and sizes from the header of a file that safetensors has found to be valid."""
    with path.open("rb") as file:
        header: dict[str, Any] = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    return {
        name: TensorInfo(
            shape=tuple(entry["shape"]),
            dtype=_dtype(entry["dtype"]),
            nbytes=entry["data_offsets"][1] - entry["data_offsets"][0],
            location=str(path),
        )
        for name, entry in header.items()
    }


def _dtype(code: str) -> str:
    return _DTYPES.get(code, code.lower())


def _diagnosis(path: Path, error: Exception) -> str:
    """Why a file could not be opened, in terms of what may have happened to it."""
    if isinstance(error, OSError):
        return f"cannot be read: {one_line(error)}"
    size = path.stat().st_size
    if size == 0:
        return "an empty file; download it again"
    with path.open("rb") as file:
        start = file.read(len(_LFS_POINTER))
        if start == _LFS_POINTER:
            return "a Git LFS pointer instead of the weights; run `git lfs pull` there"
        file.seek(0)
        header_size = int.from_bytes(file.read(8), "little")
        if start[8:9] != b"{" or header_size > _MAX_HEADER:
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


def _indexed(index: Path, backend: str) -> list[_Shard]:
    weight_map = read_json(index).object("weight_map")
    if weight_map is None:
        raise ModelError(f"{index}: 'weight_map' must map tensor names to files, found nothing")
    for name, file in weight_map.values.items():
        if not isinstance(file, str) or not _plain_name(file):
            raise ModelError(
                f"{index}: tensor {printable(name)} must be in a file of the same directory, "
                f"found {shown(file)}"
            )
    files = sorted(set(weight_map.values.values()))
    absent = [f for f in files if not is_there(index.parent / f)]
    if absent:
        raise ModelError(
            f"{index}: {len(absent)} of the {len(files)} files that it names are not there: "
            f"{listed([printable(f) for f in absent])}; download them"
        )
    shards = {file: _Shard(index.parent / file, backend) for file in files}
    home: dict[str, str] = {}
    for file, shard in shards.items():
        for name in shard.tensors:
            if name in home:
                raise ModelError(
                    f"{index.parent}: tensor {printable(name)} is in two shards, {home[name]} "
                    f"and {file}; remove the files that do not belong to this checkpoint"
                )
            home[name] = file
    for name, file in weight_map.values.items():
        if home.get(name) != file:
            where = f"is in {home[name]}" if name in home else "is in none of the shards"
            raise ModelError(
                f"{index}: names {file} for tensor {printable(name)}, which {where}; index and "
                "shards are from different checkpoints"
            )
    return list(shards.values())


def _plain_name(file: str) -> bool:
    return file.isprintable() and file not in ("", ".", "..") and not set(file) & set("/\\")
