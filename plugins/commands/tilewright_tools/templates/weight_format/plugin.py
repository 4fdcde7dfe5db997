"""The file ``weights.my-plugin``: a JSON header, then the bytes of the tensors in its order.

8 bytes   length of the header in bytes, little-endian
header    {"<tensor's name>": {"dtype": "bfloat16", "shape": [2, 3]}, ...}
tensors   row by row, little-endian, with nothing between them
"""

import json
from collections.abc import Collection, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tilewright import hookimpl
from tilewright.errors import ModelError
from tilewright.types import PluginInfo, TensorInfo, TensorSource

if TYPE_CHECKING:
    from torch import Tensor

tilewright_api = 2

FILE = "weights.my-plugin"

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

MOST_HEADER_BYTES = 2**26


@hookimpl
def plugin_info() -> PluginInfo:
    return PluginInfo(
        summary=f"one file, {FILE}, of a JSON header and raw tensors",
        limits={"dtypes": ", ".join(ITEM_BYTES)},
    )


@hookimpl
def can_open(directory: Path) -> bool:
    return (directory / FILE).is_file()


@hookimpl
def open_weights(directory: Path) -> TensorSource:
    path = directory / FILE
    try:
        return MyTensors(path)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error


@hookimpl
def write_weights(directory: Path, tensors: "Mapping[str, Tensor]") -> float:
    import torch

    header = {}
    for name, tensor in tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in ITEM_BYTES:
            raise TypeError(f"{name}: expected {' or '.join(ITEM_BYTES)}, found {dtype}")
        header[name] = {"dtype": dtype, "shape": list(tensor.shape)}
    encoded = json.dumps(header).encode()
    beside = directory / f"{FILE}.partial"
    with beside.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors.values():
            # As bytes, since numpy has no bfloat16.
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    beside.replace(directory / FILE)
    return 0.0  # every bit is kept


class MyTensors:
    """A ``TensorSource`` (see tilewright.types). No file is open between two reads."""

    def __init__(self, path: Path):
        """Reads the header. Raises ModelError when file and header do not agree; OSError."""
        self.path = path
        self.infos: dict[str, TensorInfo] = {}
        self.starts: dict[str, int] = {}
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MOST_HEADER_BYTES):
                raise ModelError(
                    f"{path}: not a {FILE} file, or cut off: its header takes {length} of {size} "
                    "bytes"
                )
            raw = file.read(length)
        start = 8 + length
        for name, (dtype, shape) in self._parsed(raw).items():
            nbytes = ITEM_BYTES[dtype] * prod(shape)
            self.infos[name] = TensorInfo(
                shape=shape, dtype=dtype, nbytes=nbytes, location=str(path)
            )
            self.starts[name] = start
            start += nbytes
        if start != size:
            raise ModelError(f"{path}: expected {start} bytes, found {size}: write it again")

    def _parsed(self, raw: bytes) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Dtype and shape by name."""
        try:
            header: Any = json.loads(raw)
            found = {n: (e["dtype"], tuple(e["shape"])) for n, e in header.items()}
        except (ValueError, AttributeError, TypeError, KeyError, RecursionError) as error:
            raise ModelError(f"{self.path}: its header is damaged: write it again") from error
        for name, (dtype, shape) in found.items():
            if dtype not in ITEM_BYTES or not all(type(n) is int and n >= 0 for n in shape):
                raise ModelError(
                    f"{self.path}: {name!a:.80} must be {' or '.join(ITEM_BYTES)} with a shape, "
                    f"found {dtype!a:.40} {shape!a:.80}"
                )
        return found

    def names(self) -> Collection[str]:
        return self.infos.keys()

    def info(self, name: str) -> TensorInfo:
        return self.infos[name]

    def get(self, name: str) -> "Tensor":
        import torch

        info = self.infos[name]
        dtype = getattr(torch, info.dtype)
        if not info.nbytes:
            return torch.empty(info.shape, dtype=dtype)
        data = bytearray(info.nbytes)
        try:
            with self.path.open("rb") as file:
                file.seek(self.starts[name])
                read = file.readinto(data)
        except OSError as error:
            raise ModelError(f"{self.path}: cannot be read: {error.strerror}") from error
        if read < info.nbytes:
            raise ModelError(f"{self.path}: cut off in {name!a:.80} since it was opened")
        return torch.frombuffer(data, dtype=dtype).reshape(info.shape)

    def close(self) -> None:
        pass
