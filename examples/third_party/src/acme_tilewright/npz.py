"""Weight format ``npz``: the file ``model.npz``, as ``numpy.savez`` writes it, compressed or not.

numpy has no bfloat16. A tensor of that dtype is stored as the 16-bit integers of its bits, in a
member whose name ends in ``.bfloat16``.
"""

import zipfile
from collections.abc import Collection, Mapping
from math import prod
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from attrs import frozen

from tilewright import hookimpl
from tilewright.errors import ModelError
from tilewright.types import PluginInfo, TensorInfo, TensorSource

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

tilewright_api = 2

FILE = "model.npz"

BFLOAT16 = ".bfloat16"

DTYPES = ("float32", "float16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool")


@hookimpl
def plugin_info() -> PluginInfo:
    return PluginInfo(
        summary=f"{FILE}, as numpy writes it, compressed or not",
        limits={
            "dtypes": f"bfloat16, {', '.join(DTYPES)}",
            "damage": "zip files have a checksum for each tensor, which is checked when it is read",
        },
    )


@hookimpl
def can_open(directory: Path) -> bool:
    return (directory / FILE).is_file()


@hookimpl
def open_weights(directory: Path) -> TensorSource:
    return NpzTensors(directory / FILE)


@hookimpl
def write_weights(directory: Path, tensors: "Mapping[str, Tensor]") -> float:
    import numpy as np
    import torch

    beside = directory / f"{FILE}.partial"
    with zipfile.ZipFile(beside, "w") as archive:
        for name, tensor in tensors.items():
            if tensor.dtype == torch.bfloat16:
                name, tensor = name + BFLOAT16, tensor.view(torch.int16)
            elif str(tensor.dtype).removeprefix("torch.") not in DTYPES:
                raise TypeError(f"{name} has dtype {tensor.dtype}, which {FILE} does not support")
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, tensor.numpy(), allow_pickle=False)
    beside.replace(directory / FILE)
    return 0.0  # every bit is kept


@frozen
class _Member:
    """A tensor in the zip file."""

    name: str
    info: TensorInfo


class NpzTensors:
    """A ``TensorSource`` (see tilewright.types).

    The file is opened again for each tensor, so that threads do not share a position in it.
    """

    def __init__(self, path: Path):
        """Reads the zip file's directory and the header of each array."""
        self._path = path
        self._members: dict[str, _Member] = {}
        try:
            # A small buffer, since only headers are read.
            with path.open("rb", buffering=512) as file, zipfile.ZipFile(file) as archive:
                for entry in archive.infolist():
                    self._add(archive, entry)
        except ModelError:
            raise
        except OSError as error:
            raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error
        except Exception as error:  # zipfile and numpy raise various exceptions for damaged files
            raise ModelError(f"{path}: not a readable npz file: {_line(error)}") from error

    def names(self) -> Collection[str]:
        return self._members.keys()

    def info(self, name: str) -> TensorInfo:
        return self._members[name].info

    def get(self, name: str) -> "Tensor":
        import numpy as np
        import torch

        member = self._members[name]
        try:
            with zipfile.ZipFile(self._path) as archive, archive.open(member.name) as file:
                array = np.lib.format.read_array(file, allow_pickle=False)
                file.read()  # to the end, where the checksum is checked
        except Exception as error:
            where = f"{self._path}: {name!a:.80}"
            raise ModelError(f"{where} cannot be read: {_line(error)}") from error
        tensor = torch.from_numpy(array)
        return tensor.view(torch.bfloat16) if member.name.endswith(f"{BFLOAT16}.npy") else tensor

    def close(self) -> None:
        pass

    def _add(self, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> None:
        where = f"{self._path}: {entry.filename!a:.80}"
        name = entry.filename.removesuffix(".npy")
        if name == entry.filename:
            raise ModelError(f"{where} is not an array: expected names that end in .npy")
        with archive.open(entry) as file:
            shape, found = _header(file)
            header_bytes = file.tell()
        dtype, plain = found.name, name.removesuffix(BFLOAT16)
        if plain != name and dtype == "int16":
            dtype = "bfloat16"
        elif plain != name or dtype not in DTYPES or not found.isnative:
            raise ModelError(f"{where} has dtype {found}, which {FILE} does not support here")
        nbytes = found.itemsize * prod(shape)
        if header_bytes + nbytes != entry.file_size:
            raise ModelError(
                f"{where} must take {header_bytes + nbytes} bytes, found {entry.file_size}"
            )
        if plain in self._members:
            raise ModelError(f"{where} occurs twice")
        info = TensorInfo(shape=shape, dtype=dtype, nbytes=nbytes, location=str(self._path))
        self._members[plain] = _Member(entry.filename, info)


def _header(file: IO[bytes]) -> "tuple[tuple[int, ...], np.dtype[Any]]":
    """Shape and dtype of an array. Raises ValueError for what is none."""
    import numpy as np

    version = np.lib.format.read_magic(file)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read is None:
        raise ValueError(f"unknown version {version} of the npy format")
    shape, _, dtype = read(file)
    return shape, dtype


def _line(error: Exception) -> str:
    return ascii(" ".join(str(error).split())[:200] or type(error).__name__)[1:-1]
