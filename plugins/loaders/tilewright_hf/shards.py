"""Checkpoints of one or more files, in any format that stores named tensors."""

import os
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from attrs import field, frozen

from tilewright.errors import ModelError, listed
from tilewright.types import TensorInfo
from tilewright.weights import printable
from tilewright_hf.files import is_there, not_downloaded, one_line, read_json, shown

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth")
"""Endings of files that hold weights, which an error lists."""


def weights_among(names: Collection[str]) -> list[str]:
    """The files that may hold a model's weights, which an adapter's do not."""
    return [n for n in names if n.endswith(WEIGHTS) and not n.startswith("adapter_")]


def only_gguf(names: Collection[str]) -> bool:
    """Whether the weights among a directory's files are all in GGUF files."""
    weights = weights_among(names)
    return bool(weights) and all(name.endswith(".gguf") for name in weights)


class Shard(Protocol):
    """One open file."""

    @property
    def path(self) -> Path: ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def read(self, name: str) -> "Tensor":
        """May raise any exception; the source adds the file and the tensor."""
        ...

    def read_rows(self, name: str, start: int, stop: int) -> "Tensor | None":
        """As ``read``, and from row ``start`` up to ``stop`` only; None: not for this tensor."""
        ...


S = TypeVar("S", bound=Shard)


@frozen(kw_only=True)
class Opened(Generic[S]):
    """The open files of a checkpoint."""

    shards: Collection[S]
    home: Mapping[str, S] | None = None
    """Which file to take a tensor from; None: no two files have the same tensor."""
    absent: Mapping[str, str] = field(factory=dict)
    """Tensors that the index names and no file has, and why, as a message."""
    warnings: tuple[str, ...] = ()


class ShardedSource:
    """A ``RowSource`` over open files. Any thread may call ``get``.

    Its names include the tensors that an index names and no file has, since a model may not need
    them; asking for one raises ModelError.
    """

    def __init__(self, opened: Opened[Any]):
        self._shards: Mapping[str, Shard] | None = opened.home or {
            name: shard for shard in opened.shards for name in shard.tensors
        }
        self.absent = opened.absent
        """Tensors without a file, and why, as a message."""
        self.warnings = opened.warnings

    def names(self) -> Collection[str]:
        return self._open().keys() | self.absent.keys()

    def info(self, name: str) -> TensorInfo:
        return self._shard(name).tensors[name]

    def get(self, name: str) -> "Tensor":
        tensor: Tensor = self._read(name, lambda shard: shard.read(name))
        return tensor

    def get_rows(self, name: str, start: int, stop: int) -> "Tensor | None":
        tensor: Tensor | None = self._read(name, lambda shard: shard.read_rows(name, start, stop))
        return tensor

    def _read(self, name: str, read: Callable[[Any], Any]) -> Any:
        """What read returns for the tensor's file. Raises ModelError for any of its errors."""
        shard = self._shard(name)
        try:
            return read(shard)
        except Exception as error:
            raise ModelError(
                f"{shard.path}: tensor {printable(name)} cannot be read: {one_line(error)}"
            ) from error

    def close(self) -> None:
        """Tensors that were returned stay valid."""
        self._shards = None

    def _shard(self, name: str) -> Shard:
        shards = self._open()
        if name in self.absent:
            raise ModelError(self.absent[name])
        return shards[name]

    def _open(self) -> Mapping[str, Shard]:
        if self._shards is None:
            raise ModelError("these weights are closed; load the model again to read them")
        return self._shards


def shard_files(index: Path, notes: list[str] | None = None) -> dict[str, str]:
    """Maps tensors to files, from an index. Raises ModelError for a malformed index.

    notes: a list to which is added what is odd in the index, a line each.
    """
    weight_map = read_json(index, notes).object("weight_map")
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
) -> Opened[S]:
    """Open the file named single, or else the files that an index names, or else the only complete
    set of files with similar names (see ``other_sets``).

    Raises ModelError if there is neither, and for an index that does not match its files.
    """
    names = sorted(os.listdir(directory)) if directory.is_dir() else []
    if single in names:
        return Opened(shards=[open_shard(directory / single)])
    if index in names:
        return _open_indexed(directory / index, open_shard)
    expected = f"expected {single}, or {index} and its shards"
    sets = other_sets(names, single)
    if len(sets) == 1:
        (files,) = sets.values()
        absent = [file for file in files if file not in names]
        if absent:
            raise ModelError(
                f"{directory}: {len(absent)} of the {len(files)} shards are missing: "
                f"{listed([printable(f) for f in absent])}; download them"
            )
        return _open_unindexed(directory, files, expected, open_shard)
    found = [printable(name) for name in names if name.endswith(WEIGHTS)]
    cure = f"; give the one to load the name {single}" if sets else ""
    raise ModelError(f"{directory}: {expected}; found {listed(found) or 'no weights'}{cure}")


def other_sets(names: Collection[str], single: str) -> dict[tuple[str, int], list[str]]:
    """Sets of weights whose names differ from the usual ones: a variant, such as
    ``model.fp16.safetensors``, and shards that no index lists.

    single: the usual name of the file with all weights. The keys are the variant, or an empty
    string, and the number of shards that the names state, 0 without one; the values are the files,
    those that are missing included.
    """
    stem, ending = os.path.splitext(single)
    pattern = re.compile(
        rf"{stem}(?:\.(?P<variant>\w+))?(?:-\d{{5}}-of-(?P<count>\d{{5}}))?{re.escape(ending)}",
        re.ASCII,
    )
    sets: dict[tuple[str, int], list[str]] = {}
    for found in filter(None, map(pattern.fullmatch, names)):
        variant, count = found["variant"] or "", int(found["count"] or 0)
        start = f"{stem}.{variant}" if variant else stem
        shards = [f"{start}-{i:05}-of-{count:05}{ending}" for i in range(1, count + 1)]
        sets[variant, count] = shards or [f"{start}{ending}"]
    return sets


def _open_unindexed(
    directory: Path, files: Collection[str], expected: str, open_shard: Callable[[Path], S]
) -> Opened[S]:
    shards = {file: open_shard(directory / file) for file in files}
    home: dict[str, str] = {}
    for file, shard in shards.items():
        for name in shard.tensors:
            if name in home:
                raise _in_two(directory, name, home[name], file)
            home[name] = file
    read = listed([printable(file) for file in files], 3)
    return Opened(
        shards=list(shards.values()), warnings=(f"{directory}: {expected}; reading {read}",)
    )


def _in_two(directory: Path, name: str, file: str, other: str) -> ModelError:
    return ModelError(
        f"{directory}: tensor {printable(name)} is in two shards, {printable(file)} and "
        f"{printable(other)}; remove the files that do not belong to this checkpoint"
    )


def _open_indexed(index: Path, open_shard: Callable[[Path], S]) -> Opened[S]:
    """Open the files that an index names, as far as they are there.

    Raises ModelError if none is, and for a tensor of two files where the index does not say which.
    """
    notes: list[str] = []
    directory, weight_map = index.parent, shard_files(index, notes)
    files = sorted(set(weight_map.values()))
    lost = [f for f in files if not is_there(directory / f)]
    missing = (
        f"{index}: {len(lost)} of the {len(files)} files that it names are missing: "
        f"{listed([printable(f) for f in lost])}; download them"
    )
    if len(lost) == len(files):
        raise ModelError(missing)
    shards = {file: open_shard(directory / file) for file in files if file not in lost}
    homes: dict[str, list[str]] = {}
    for file, shard in shards.items():
        for name in shard.tensors:
            homes.setdefault(name, []).append(file)
    chosen, odd = {}, []
    for name, found in homes.items():
        named = weight_map.get(name)
        if len(found) > 1 and named not in found:
            raise _in_two(directory, name, found[0], found[1])
        chosen[name] = shards[named if named in found else found[0]]
        if found != [named]:
            places = " and ".join(map(printable, found))
            listing = printable(named) if named else "none"
            odd.append(f"{printable(name)} is in {places}, listed in {listing}")
    absent = {
        name: missing
        if file in lost
        else f"{index}: names {printable(file)} for tensor {printable(name)}, which is in none of "
        "the shards; index and shards are from different checkpoints"
        for name, file in weight_map.items()
        if name not in homes
    }
    misfit = (
        f"{index}: does not fit the shards for {len(odd)} of {len(homes)} tensors, which are read "
        f"from the shard that it lists, or else from the one that has them: {listed(odd, 1)}"
    )
    return Opened(
        shards=list(shards.values()),
        home=chosen,
        absent=absent,
        warnings=(*notes, misfit) if odd else tuple(notes),
    )


def no_weights(path: Path) -> str | None:
    """What a file holds in place of weights that were not downloaded; None for other files."""
    with path.open("rb") as file:
        start = file.read(200)
    return not_downloaded(start) if start else "an empty file; download it again"


def _plain_name(file: str) -> bool:
    return file.isprintable() and file not in ("", ".", "..") and not set(file) & set("/\\")
