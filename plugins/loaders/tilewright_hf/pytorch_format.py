"""Weight format ``pytorch-bin``: pytorch_model.bin, or shards with pytorch_model.bin.index.json."""

import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tilewright.errors import ModelError
from tilewright.hookspecs import hookimpl
from tilewright.types import PluginInfo, TensorInfo, TensorSource
from tilewright.weights import printable
from tilewright_hf.files import check_file, one_line
from tilewright_hf.shards import ShardedSource, no_weights, open_shards, other_sets

if TYPE_CHECKING:
    from torch import Tensor

tilewright_api = 2

SINGLE = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"

_ZIP, _OLD = b"PK\x03\x04", b"\x80\x02"
"""First bytes of files by torch.save: since PyTorch 1.6, and before."""

_REFUSED = re.compile(r"GLOBAL (\S+)|Unsupported (?:global|operand|class) (\S+)")


@hookimpl
def plugin_info() -> PluginInfo:
    return PluginInfo(
        summary=f"{SINGLE}, or shards with {INDEX}",
        limits={
            "pickles": "only those that contain nothing but tensors; no code from a file is run",
            "reading": "tensors share the file's pages; files from before PyTorch 1.6 are "
            "read completely when they are opened",
        },
    )


@hookimpl
def can_open(directory: Path) -> bool:
    try:
        names = os.listdir(directory)
        return INDEX in names or bool(other_sets(names, SINGLE))
    except OSError:
        return False


@hookimpl
def open_weights(directory: Path) -> TensorSource:
    """Open a directory's tensors. Pickles are read with PyTorch's weights-only unpickler.

    Raises ModelError for a file that is absent or damaged, for a pickle that holds anything but
    named tensors, and for an index that does not agree with its shards.
    """
    return PytorchSource(open_shards(directory, SINGLE, INDEX, _Shard))


@hookimpl
def write_weights(directory: Path, tensors: "Mapping[str, Tensor]") -> float:
    import torch

    torch.save(dict(tensors), directory / SINGLE)
    return 0.0


class _Shard:
    """One file, unpickled: its tensors lie in the mapped file."""

    def __init__(self, path: Path):
        check_file(path)
        self.path = path
        self._loaded = _unpickled(path)
        self.tensors = {name: _info(path, name, t) for name, t in self._loaded.items()}

    def read(self, name: str) -> "Tensor":
        return self._loaded[name].detach().contiguous()

    def read_rows(self, name: str, start: int, stop: int) -> "Tensor":
        return self._loaded[name].detach()[start:stop].contiguous()


class PytorchSource(ShardedSource):
    """Tensors of pickles, where two names may refer to the same tensor."""

    def same(self, name: str, other: str) -> bool:
        """Whether both names exist and refer to the same elements of the same storage."""
        if not {name, other} <= set(self.names()):
            return False
        one, two = self.get(name), self.get(other)
        return one.data_ptr() == two.data_ptr() and one.shape == two.shape


def _unpickled(path: Path) -> "dict[str, Tensor]":
    """The file's tensors by name. Raises ModelError for any other content."""
    import torch

    zipped = False
    try:
        if why := no_weights(path):
            raise ModelError(f"{path}: {why}")
        with path.open("rb") as file:
            start = file.read(4)
        zipped = start == _ZIP
        if not zipped and not start.startswith(_OLD):
            raise ModelError(
                f"{path}: not a file that torch.save wrote: expected a zip file or a pickle of "
                f"protocol 2, found bytes {start.hex(' ')}"
            )
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except ModelError:
        raise
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {one_line(error)}") from error
    except pickle.UnpicklingError as error:
        raise ModelError(f"{path}: {_refusal(error)}") from error
    except Exception as error:
        # Messages of PyTorch's zip reader end with advice, which is cut off.
        why = "it ends too early" if isinstance(error, EOFError) else one_line(error)
        raise ModelError(
            f"{path}: not a file that torch.save wrote, or a damaged one: "
            f"{why.partition('. ')[0]}; download it again"
        ) from error
    if not isinstance(loaded, Mapping):
        raise ModelError(
            f"{path}: expected tensors by name, as torch.save(model.state_dict(), ...) writes them,"
            f" found {type(loaded).__name__}"
        )
    tensors = dict(_tensors(path, loaded))
    if zipped:
        _check_records(path, tensors)
    return tensors


def _refusal(error: pickle.UnpicklingError) -> str:
    """Why PyTorch's weights-only unpickler refused the file."""
    text = " ".join(str(error).split())
    if named := _REFUSED.search(text):
        return (
            f"refused: it contains {named[1] or named[2]}, which may run code; "
            "expected a state_dict, or better a safetensors file"
        )
    _, _, why = text.rpartition("WeightsUnpickler error: ")
    return f"not a pickle of tensors, or a damaged one: {one_line(ValueError(why))}"


def _tensors(path: Path, loaded: Mapping[Any, Any]) -> "Iterator[tuple[str, Tensor]]":
    import torch

    for name, value in loaded.items():
        if not isinstance(name, str):
            raise ModelError(f"{path}: expected tensors by name, found a key {name!r:.60}")
        if not isinstance(value, torch.Tensor):
            raise ModelError(
                f"{path}: expected a tensor under {printable(name)}, found "
                f"{type(value).__name__}; expected a state_dict, not a training checkpoint"
            )
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
            raise ModelError(
                f"{path}: expected a dense tensor under {printable(name)}, found "
                f"{value.layout}, {value.dtype} on {value.device}"
            )
        yield name, value


def _info(path: Path, name: str, tensor: "Tensor") -> TensorInfo:
    return TensorInfo(
        shape=tuple(tensor.shape),
        dtype=str(tensor.dtype).removeprefix("torch."),
        nbytes=tensor.numel() * tensor.element_size(),
        location=str(path),
    )


def _check_records(path: Path, tensors: "Mapping[str, Tensor]") -> None:
    """Check that the tensors' storages match the archive's records one to one.

    A mapped storage has the size that the pickle states, regardless of the record's own size and
    of compression.
    """
    storages = {}
    for tensor in tensors.values():
        storage = tensor.untyped_storage()
        if storage.nbytes():
            storages[storage.data_ptr()] = storage.nbytes()
    try:
        with zipfile.ZipFile(path) as archive:
            records = [r for r in archive.infolist() if "/data/" in r.filename and r.file_size]
    except Exception as error:
        raise ModelError(f"{path}: a damaged zip file: {one_line(error)}") from error
    if any(r.compress_type != zipfile.ZIP_STORED for r in records):
        raise ModelError(f"{path}: its records are compressed: expected what torch.save writes")
    sizes = sorted(r.file_size for r in records)
    if sorted(storages.values()) != sizes:
        raise ModelError(
            f"{path}: damaged: its tensors take {sum(storages.values())} bytes in "
            f"{len(storages)} storages, but {sum(sizes)} bytes are stored in {len(sizes)} records; "
            "download it again"
        )
