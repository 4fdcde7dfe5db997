"""Checkpoints of one or more files, in any format that stores named tensors."""

import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from tilewright.errors import ModelError, listed
from tilewright.types import TensorInfo
from tilewright.weights import printable
from tilewright_hf.files import is_there, one_line, read_json, shown

if TYPE_CHECKING:
    from torch import Tensor


_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth")
"""Endings of files that hold weights, which an error lists."""

_LFS_POINTER = b"version https://git-lfs"


class Shard(Protocol):
    """One open file."""

    @property
    def path(self) -> Path: ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def read(self, name: str) -> "Tensor":
        """May raise any exception; the source adds the file and the tensor."""
        ...


S = TypeVar("S", bound=Shard)


class ShardedSource:
    """A ``TensorSource`` over open files. Any thread may call ``get``."""

    def __init__(self, shards: Collection[Shard]):
        self._shards: Mapping[str, Shard] | None = {
            name: shard for shard in shards for name in shard.tensors
        }

    def names(self) -> Collection[str]:
        return self._open().keys()

    def info(self, name: str) -> TensorInfo:
        return self._open()[name].tensors[name]

    def get(self, name: str) -> "Tensor":
        shard = self._open()[name]
        try:
            return shard.read(name)
        except Exception as error:
            raise ModelError(
                f"{shard.path}: tensor {printable(name)} cannot be read: {one_line(error)}"
            ) from error

    def close(self) -> None:
        """Tensors that were returned stay valid."""
        self._shards = None

    def _open(self) -> Mapping[str, Shard]:
        if self._shards is None:
            raise ModelError("these weights are closed; load the model again to read them")
        return self._shards


def shard_files(index: Path) -> dict[str, str]:
    """Maps tensors to files, from an index. Raises ModelError for a malformed index."""
    weight_map = read_json(index).object("weight_map")
    if weight_map is None:
        raise ModelError(f"{index}: 'weight_map' must map tensor names to files, found nothing")
    for name, file in weight_map.values.items():
        if not isinstance(file, str) or not _plain_name(file):
            raise ModelError(
                f"{index}: tensor {printable(name)} must be in a file of the same directory, "
                f"found {shown(file)}"
            )
    return weight_map.values


def open_shards(
    directory: Path, single: str, index: str, open_shard: Callable[[Path], S]
) -> list[S]:
    """Open the file named single, or else the files that an index names.

    Raises ModelError if there is neither, and for an index that does not match its files.
    """
    names = sorted(os.listdir(directory)) if directory.is_dir() else []
    if single in names:
        return [open_shard(directory / single)]
    if index in names:
        return _open_indexed(directory / index, open_shard)
    found = [printable(name) for name in names if name.endswith(_WEIGHTS)]
    raise ModelError(
        f"{directory}: expected {single}, or {index} and its shards; found "
        f"{listed(found) or 'no weights'}"
    )


def _open_indexed(index: Path, open_shard: Callable[[Path], S]) -> list[S]:
    """Open the files that an index names. Raises ModelError if they do not match it."""
    weight_map = shard_files(index)
    files = sorted(set(weight_map.values()))
    absent = [f for f in files if not is_there(index.parent / f)]
    if absent:
        raise ModelError(
            f"{index}: {len(absent)} of the {len(files)} files that it names are missing: "
            f"{listed([printable(f) for f in absent])}; download them"
        )
    shards = {file: open_shard(index.parent / file) for file in files}
    home: dict[str, str] = {}
    for file, shard in shards.items():
        for name in shard.tensors:
            if name in home:
                raise ModelError(
                    f"{index.parent}: tensor {printable(name)} is in two shards, {home[name]} "
                    f"and {file}; remove the files that do not belong to this checkpoint"
                )
            home[name] = file
    for name, file in weight_map.items():
        if home.get(name) != file:
            where = f"is in {home[name]}" if name in home else "is in none of the shards"
            raise ModelError(
                f"{index}: names {file} for tensor {printable(name)}, which {where}; index and "
                "shards are from different checkpoints"
            )
    return list(shards.values())


def not_downloaded(path: Path) -> str | None:
    """What a file holds in place of weights that were not downloaded; None for other files."""
    with path.open("rb") as file:
        start = file.read(len(_LFS_POINTER))
    if not start:
        return "an empty file; download it again"
    if start == _LFS_POINTER:
        return "a Git LFS pointer instead of the weights; run `git lfs pull` there"
    return None


def _plain_name(file: str) -> bool:
    return file.isprintable() and file not in ("", ".", "..") and not set(file) & set("/\\")
