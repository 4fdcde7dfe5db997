"""The suite of weight formats finds each of these broken ones, by the test that is meant for it."""

import io
import json
import mmap
import os
import tarfile
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from threading import Lock, RLock, local
from typing import Any

import pytest
import torch
from attrs import evolve
from conformance import Fault, full_name, missed, own_tests, run
from torch import Tensor

from tilewright import hookimpl
from tilewright.errors import ModelError
from tilewright.types import DTYPES, PluginInfo, TensorInfo
from tilewright_testing import WeightFormatSuite
from tilewright_testing.models import dtype_name

NAME = "weights.raw"


class RawSource:
    """A header in JSON, its length before it in eight bytes, and then the tensors."""

    def __init__(self, path: Path):
        self.path = path
        self.open_file()
        try:
            self.read_header()
        except BaseException:
            self.close()
            raise

    def open_file(self) -> None:
        try:
            self.file = self.path.open("rb", buffering=0)
        except OSError as error:
            raise ModelError(f"{self.path}: cannot be read: {error.strerror}") from error

    def read_header(self) -> None:
        size = self.size()
        length = int.from_bytes(self.pread(8, 0), "little")
        if not 0 < length <= size - 8:
            raise ModelError(f"{self.path}: not a file of raw weights, or a part of one")
        try:
            header = json.loads(self.pread(length, 8))
            self.start = 8 + length
            self.where = {name: offset for name, (_, _, offset) in header.items()}
            self.infos = {
                name: TensorInfo(
                    shape=tuple(shape),
                    dtype=dtype,
                    nbytes=torch.Size(shape).numel() * self.dtype(dtype).itemsize,
                    location=str(self.path),
                )
                for name, (dtype, shape, _) in header.items()
            }
            for name, info in self.infos.items():
                if not 0 <= self.where[name] <= size - self.start - info.nbytes:
                    raise ValueError(f"{name!r} is not within the file")
        except Exception as error:
            raise ModelError(f"{self.path}: its header is damaged: {error}") from error

    def size(self) -> int:
        return os.fstat(self.file.fileno()).st_size

    @staticmethod
    def dtype(name: str) -> torch.dtype:
        if name not in DTYPES:
            raise ValueError(f"{name!r} is no dtype")
        return getattr(torch, name)  # type: ignore[no-any-return]

    def pread(self, count: int, offset: int) -> bytes:
        return os.pread(self.file.fileno(), count, offset)

    def names(self) -> Collection[str]:
        return self.infos.keys()

    def info(self, name: str) -> TensorInfo:
        return self.infos[name]

    def get(self, name: str) -> Tensor:
        info = self.infos[name]
        return self.made(info, self.pread(info.nbytes, self.start + self.where[name]))

    def made(self, info: TensorInfo, data: bytes) -> Tensor:
        if len(data) != info.nbytes:
            raise ModelError(f"{self.path}: ends within a tensor")
        if not data:
            return torch.empty(info.shape, dtype=self.dtype(info.dtype))
        return torch.frombuffer(bytearray(data), dtype=self.dtype(info.dtype)).reshape(info.shape)

    def close(self) -> None:
        self.file.close()


class Raw:
    """The format's plugin."""

    tilewright_api = 2

    def __init__(self, source: type[RawSource] = RawSource):
        self.source = source

    @hookimpl
    def plugin_info(self) -> PluginInfo:
        return PluginInfo(summary="raw tensors behind a header")

    @hookimpl
    def can_open(self, directory: Path) -> Any:
        return (directory / NAME).is_file()

    @hookimpl
    def open_weights(self, directory: Path) -> RawSource:
        return self.source(directory / NAME)

    @hookimpl
    def write_weights(self, directory: Path, tensors: Mapping[str, Tensor]) -> float:
        header: dict[str, Any] = {}
        data = b""
        for name, tensor in tensors.items():
            header[name] = (dtype_name(tensor), list(tensor.shape), len(data))
            data += tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        text = json.dumps(header).encode()
        (directory / NAME).write_bytes(len(text).to_bytes(8, "little") + text + data)
        return 0.0


# --- broken sources -------------------------------------------------------------------------------


class Eager(RawSource):
    def __init__(self, path: Path):
        super().__init__(path)
        self.read = {name: super(Eager, self).get(name) for name in self.infos}

    def get(self, name: str) -> Tensor:
        return self.read[name]


class EagerForOne(RawSource):
    """Looks at a small tensor while it opens, and keeps it."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.read = {"c": super().get("c")} if "c" in self.infos else {}

    def get(self, name: str) -> Tensor:
        return self.read[name] if name in self.read else super().get(name)


class ReadsTheFileToCheckIt(RawSource):
    def open_file(self) -> None:
        self.path.read_bytes()
        super().open_file()


class SharesAPosition(RawSource):
    def pread(self, count: int, offset: int) -> bytes:
        self.file.seek(offset)
        return self.file.read(count)


class LocksTheSeek(RawSource):
    def __init__(self, path: Path):
        self.lock = Lock()
        super().__init__(path)

    def pread(self, count: int, offset: int) -> bytes:
        with self.lock:
            self.file.seek(offset)
        return self.file.read(count)


class LocksEachTensor(RawSource):
    def __init__(self, path: Path):
        self.locks: dict[int, Lock] = {}
        super().__init__(path)

    def pread(self, count: int, offset: int) -> bytes:
        with self.locks.setdefault(offset, Lock()):
            self.file.seek(offset)
            return self.file.read(count)


class ReadsIntoOneBuffer(RawSource):
    """The lock is released before the content is copied."""

    def __init__(self, path: Path):
        self.lock, self.buffer = Lock(), bytearray(2**20)
        super().__init__(path)

    def pread(self, count: int, offset: int) -> bytes:
        with self.lock:
            self.buffer[:count] = super().pread(count, offset)
        return bytes(self.buffer[:count])


class KeepsTheOffset(RawSource):
    """The offset is an attribute from one method to the next, and no function in C is called
    between them."""

    def pread(self, count: int, offset: int) -> bytes:
        self.offset = offset
        return self.read(count)

    def read(self, count: int) -> bytes:
        return super().pread(count, self.offset)


class SharesATar(RawSource):
    """A tar file's members share its position, within the library."""

    def open_file(self) -> None:
        super().open_file()
        self.memory = io.BytesIO()
        with tarfile.open(fileobj=self.memory, mode="w") as archive:
            archive.add(self.path, NAME)
        self.memory.seek(0)
        self.archive = tarfile.open(fileobj=self.memory)  # noqa: SIM115 -- closed with the source

    def pread(self, count: int, offset: int) -> bytes:
        with self.archive.extractfile(NAME) as member:
            member.seek(offset)
            return member.read(count)


class OpensLate(RawSource):
    """Opens the file for reading at the first read."""

    later: Any = None

    def get(self, name: str) -> Tensor:
        self.prepare()
        return super().get(name)

    def prepare(self) -> None:
        if self.later is None:
            self.later = self.path.open("rb", buffering=0)
            self.offsets = dict(self.where)

    def close(self) -> None:
        super().close()
        if self.later is not None:
            self.later.close()


class UsesWhatIsHalfOpen(OpensLate):
    def made(self, info: TensorInfo, data: bytes) -> Tensor:
        assert self.offsets
        return super().made(info, data)


class OpensTwice(RawSource):
    """Two threads may both find that the file is not open."""

    descriptor: int | None = None

    def get(self, name: str) -> Tensor:
        if self.descriptor is None:
            self.descriptor = os.open(self.path, os.O_RDONLY)
        return super().get(name)

    def close(self) -> None:
        super().close()
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None


class FillsAnIndex(RawSource):
    """The index is seen before it is complete."""

    index: dict[str, int] | None = None

    def get(self, name: str) -> Tensor:
        if self.index is None:
            self.index = {}
            for known, offset in self.where.items():
                self.index[known] = offset
        self.index[name]
        return super().get(name)


# --- correct sources, each safe in its own way ----------------------------------------------------


class Locked(RawSource):
    def __init__(self, path: Path):
        self.lock = Lock()
        super().__init__(path)

    def pread(self, count: int, offset: int) -> bytes:
        with self.lock:
            self.file.seek(offset)
            return self.file.read(count)


class LockedWhole(RawSource):
    """One reentrant lock for each method."""

    def __init__(self, path: Path):
        self.lock, self.buffer = RLock(), bytearray(2**20)
        super().__init__(path)

    def pread(self, count: int, offset: int) -> bytes:
        with self.lock:
            self.file.seek(offset)
            self.buffer[:count] = self.file.read(count).ljust(count, b"\0")
            return bytes(self.buffer[:count])

    def get(self, name: str) -> Tensor:
        with self.lock:
            return super().get(name)


class Mapped(RawSource):
    def open_file(self) -> None:
        super().open_file()
        if not self.size():
            raise ModelError(f"{self.path}: empty")
        self.map = mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_READ)

    def pread(self, count: int, offset: int) -> bytes:
        return self.map[offset : offset + count]

    def close(self) -> None:
        super().close()
        if hasattr(self, "map"):
            self.map.close()


class OpensForEachRead(RawSource):
    def pread(self, count: int, offset: int) -> bytes:
        with self.path.open("rb", buffering=0) as file:
            file.seek(offset)
            return file.read(count)


class OneFilePerThread(RawSource):
    def __init__(self, path: Path):
        self.own = local()
        super().__init__(path)

    def pread(self, count: int, offset: int) -> bytes:
        if not hasattr(self.own, "file"):
            self.own.file = self.path.open("rb", buffering=0)
        self.own.file.seek(offset)
        return self.own.file.read(count)  # type: ignore[no-any-return]

    def close(self) -> None:
        super().close()
        if hasattr(self.own, "file"):
            self.own.file.close()


class SharesAZip(RawSource):
    """Members of one zip file may be read at once: the library locks its position."""

    def open_file(self) -> None:
        super().open_file()
        self.memory = io.BytesIO()
        with zipfile.ZipFile(self.memory, "w") as archive:
            archive.write(self.path, NAME)
        self.archive = zipfile.ZipFile(self.memory)

    def get(self, name: str) -> Tensor:
        info = self.infos[name]
        with self.archive.open(NAME) as member:
            member.seek(self.start + self.where[name])
            return self.made(info, member.read(info.nbytes))


class OpensLateOnce(OpensLate):
    def __init__(self, path: Path):
        self.lock = Lock()
        super().__init__(path)

    def prepare(self) -> None:
        with self.lock:
            super().prepare()


class StaysOpen(RawSource):
    def close(self) -> None:
        KEPT.append(self.file)


KEPT: list[Any] = []


class WipesWhatItGave(RawSource):
    def get(self, name: str) -> Tensor:
        tensor = super().get(name)
        self.given = [*getattr(self, "given", []), tensor]
        return tensor

    def close(self) -> None:
        super().close()
        for tensor in getattr(self, "given", []):
            tensor.zero_()


class OneBuffer(RawSource):
    """Hands out the same memory again and again."""

    def made(self, info: TensorInfo, data: bytes) -> Tensor:
        if not hasattr(self, "buffer"):
            self.buffer = bytearray(2**20)
        self.buffer[: len(data)] = data
        of = self.dtype(info.dtype)
        count = len(data) // of.itemsize
        return torch.frombuffer(self.buffer, dtype=of, count=count).reshape(info.shape)


class ReadsInTurn(RawSource):
    """Reads on where it read last, as a stream does."""

    def pread(self, count: int, offset: int) -> bytes:
        data = self.file.read(count)
        return data if len(data) == count else super().pread(count, offset)


class NoSuchTensorIsAModelError(RawSource):
    def info(self, name: str) -> TensorInfo:
        if name not in self.infos:
            raise ModelError(f"{self.path}: no tensor {name!r}")
        return super().info(name)


class NoSuchTensorIsEmpty(RawSource):
    def get(self, name: str) -> Tensor:
        return super().get(name) if name in self.infos else torch.empty(0)


class CountsElements(RawSource):
    def info(self, name: str) -> TensorInfo:
        return evolve(super().info(name), nbytes=torch.Size(super().info(name).shape).numel())


class SaysTorch(RawSource):
    def info(self, name: str) -> TensorInfo:
        return evolve(super().info(name), dtype=f"torch.{super().info(name).dtype}")


class ShapesAreLists(RawSource):
    def info(self, name: str) -> TensorInfo:
        return evolve(super().info(name), shape=list(super().info(name).shape))


class SaysNoPlace(RawSource):
    def info(self, name: str) -> TensorInfo:
        return evolve(super().info(name), location=NAME)


class Widens(RawSource):
    """Gives float32, whatever is stored, and says so."""

    def info(self, name: str) -> TensorInfo:
        info = super().info(name)
        return evolve(info, dtype="float32", nbytes=torch.Size(info.shape).numel() * 4)

    def get(self, name: str) -> Tensor:
        info = super().info(name)
        data = self.pread(info.nbytes, self.start + self.where[name])
        return self.made(info, data).float()


class RepairsNaN(RawSource):
    def get(self, name: str) -> Tensor:
        return super().get(name).nan_to_num(nan=0.0, posinf=float("inf"), neginf=float("-inf"))


class LosesMinusZero(RawSource):
    def get(self, name: str) -> Tensor:
        return super().get(name) + 0.0


class ScalarsGetAnAxis(RawSource):
    def info(self, name: str) -> TensorInfo:
        info = super().info(name)
        return evolve(info, shape=info.shape or (1,))


class RefusesNothing(RawSource):
    """An empty tensor has no bytes to make it from."""

    def made(self, info: TensorInfo, data: bytes) -> Tensor:
        return torch.frombuffer(bytearray(data), dtype=self.dtype(info.dtype)).reshape(info.shape)


class PadsWithZeros(RawSource):
    def size(self) -> int:
        return 2**30

    def pread(self, count: int, offset: int) -> bytes:
        return super().pread(count, offset).ljust(count, b"\0")


class FailsAsPythonDoes(RawSource):
    def read_header(self) -> None:
        length = int.from_bytes(self.pread(8, 0), "little")
        json.loads(self.pread(min(length, 2**20), 8))
        super().read_header()


class FailsAtLength(RawSource):
    def read_header(self) -> None:
        try:
            super().read_header()
        except ModelError as error:
            raise ModelError(f"{error}\nsee the manual") from error


class BelievesItsHeader(RawSource):
    @staticmethod
    def dtype(name: str) -> torch.dtype:
        return getattr(torch, name)  # type: ignore[no-any-return]

    def read_header(self) -> None:
        length = int.from_bytes(self.pread(8, 0), "little")
        if not 0 < length <= self.size() - 8:
            raise ModelError(f"{self.path}: not a file of raw weights, or a part of one")
        try:
            header = json.loads(self.pread(length, 8))
        except ValueError as error:
            raise ModelError(f"{self.path}: its header is damaged: {error}") from error
        for _, (dtype, _, _) in header.items():
            self.dtype(dtype)
        super().read_header()


class WritesAnIndex(RawSource):
    def __init__(self, path: Path):
        super().__init__(path)
        path.with_suffix(".index").write_text(",".join(self.infos))


class SetsTheDefaultDtype(RawSource):
    def get(self, name: str) -> Tensor:
        torch.set_default_dtype(torch.float64)
        return super().get(name)


class SeedsTorch(RawSource):
    def made(self, info: TensorInfo, data: bytes) -> Tensor:
        torch.rand(1)
        return super().made(info, data)


FILES: dict[Path, Any] = {}


class OneFileForAll(RawSource):
    def open_file(self) -> None:
        if self.path not in FILES or FILES[self.path].closed:
            FILES[self.path] = self.path.open("rb", buffering=0)
        self.file = FILES[self.path]


class NamesRunOut(RawSource):
    def names(self) -> Any:
        return iter(super().names())


# --- formats that quantise ------------------------------------------------------------------------


class Int8Source(RawSource):
    """Matrices of integers from -127 to 127, with a scale for each row."""

    @staticmethod
    def dtype(name: str) -> torch.dtype:
        return torch.int8 if name == "int8" else RawSource.dtype(name)

    def get(self, name: str) -> Tensor:
        stored = super().get(name)
        scale = self.where.get(f"{name}.scale")
        return stored if scale is None else self.scaled(stored, super().get(f"{name}.scale"))

    def names(self) -> Collection[str]:
        return [name for name in super().names() if not name.endswith(".scale")]

    def info(self, name: str) -> TensorInfo:
        info = super().info(name)
        if info.dtype != "int8":
            return info
        return evolve(info, dtype="float32", nbytes=4 * info.nbytes)

    def scaled(self, stored: Tensor, scale: Tensor) -> Tensor:
        return stored.float() * scale[:, None]


class ScalesColumnsWhereTheyFit(Int8Source):
    def scaled(self, stored: Tensor, scale: Tensor) -> Tensor:
        fits = len(scale) == stored.shape[1]
        return stored.float() * scale if fits else super().scaled(stored, scale)


class ForgetsTheScale(Int8Source):
    def scaled(self, stored: Tensor, scale: Tensor) -> Tensor:
        return stored.float()


class Int8(Raw):
    error: Any = 0.5 / 127 * 1.001

    @hookimpl
    def write_weights(self, directory: Path, tensors: Mapping[str, Tensor]) -> float:
        stored: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            if tensor.dtype != torch.float32:
                raise TypeError("float32 only")
            if tensor.ndim == 2 and tensor.numel():
                scale = tensor.abs().amax(dim=1) / 127
                stored[f"{name}.scale"] = scale
                stored[name] = (tensor / scale[:, None]).round().to(torch.int8)
            else:
                stored[name] = tensor
        super().write_weights(directory, stored)
        return self.error  # type: ignore[no-any-return]


class StatesALargeError(Int8):
    error = 0.9


class StatesNoError(Int8):
    error = 0.0


class ReturnsNothing(Raw):
    @hookimpl
    def write_weights(self, directory: Path, tensors: Mapping[str, Tensor]) -> Any:
        super().write_weights(directory, tensors)


# --- broken plugins -------------------------------------------------------------------------------


class LooksInside(Raw):
    @hookimpl
    def can_open(self, directory: Path) -> bool:
        path = directory / NAME
        return path.is_file() and path.read_bytes()[8:9] == b"{"


class OpensAnything(Raw):
    @hookimpl
    def can_open(self, directory: Path) -> bool:
        return directory.is_dir()


class OpensNothingElse(Raw):
    @hookimpl
    def can_open(self, directory: Path) -> bool:
        return directory.is_dir() and os.listdir(directory) == [NAME]


class NeedsADirectory(Raw):
    @hookimpl
    def can_open(self, directory: Path) -> bool:
        return NAME in os.listdir(directory)


class AnswersWithFiles(Raw):
    @hookimpl
    def can_open(self, directory: Path) -> list[Path]:
        return list(directory.glob(NAME))


class FailsWithoutFiles(Raw):
    @hookimpl
    def open_weights(self, directory: Path) -> RawSource:
        os.stat(directory / NAME)
        return self.source(directory / NAME)


# name, plugin or the class of its sources, test that fails, words of the failure
_FAULTS: list[tuple[str, Any, str, str]] = [
    ("reads all while it opens", Eager, "weights_are_not_read_before_get", "4 of 4 tensors"),
    ("reads one while it opens", EagerForOne, "weights_are_not_read_before_get", "1 of 4 tensors"),
    ("reads the file to check it", ReadsTheFileToCheckIt, "opening_reads_headers", "headers only"),
    ("stays open", StaysOpen, "closing_closes_the_files", "stayed open"),
    ("wipes what it gave", WipesWhatItGave, "tensors_stay_valid", "must stay valid after close"),
    ("hands out one buffer", OneBuffer, "tensors_stay_valid", "must stay valid after close"),
    ("reads in turn", ReadsInTurn, "reading_a_tensor_twice_gives_the_same_values", "in any order"),
    (
        "answers an unknown name with ModelError",
        NoSuchTensorIsAModelError,
        "an_unknown_name_raises_key_error",
        "must raise KeyError",
    ),
    (
        "answers an unknown name with nothing",
        NoSuchTensorIsEmpty,
        "an_unknown_name_raises_key_error",
        "must raise KeyError",
    ),
    (
        "counts elements for bytes",
        CountsElements,
        "info_matches_the_tensors_that_get_returns",
        "nbytes",
    ),
    (
        "names dtypes as torch does",
        SaysTorch,
        "info_matches_the_tensors_that_get_returns",
        r"torch\.float32",
    ),
    (
        "gives shapes that are no tuples",
        ShapesAreLists,
        "info_matches_the_tensors_that_get_returns",
        "must give the shape",
    ),
    ("gives its names once", NamesRunOut, "info_matches_the_tensors_that_get_returns", "len()"),
    ("names no place", SaysNoPlace, "the_location_names_the_file", "must be the path"),
    ("widens to float32", Widens, "tensors_are_read_as_written[bfloat16]", "bfloat16"),
    ("repairs NaN", RepairsNaN, "special_values_are_read_bit_for_bit[float32]", "bit for bit"),
    ("loses -0", LosesMinusZero, "special_values_are_read_bit_for_bit[float16]", "bit for bit"),
    ("gives scalars an axis", ScalarsGetAnAxis, "tensors_of_any_shape[scalars]", r"\(1,\)"),
    ("has no empty tensors", RefusesNothing, "tensors_of_any_shape[empty tensors]", "ValueError"),
    (
        "pads with zeros",
        PadsWithZeros,
        "a_truncated_file_raises_model_error[to half its size]",
        "different tensors",
    ),
    (
        "fails as Python does",
        FailsAsPythonDoes,
        "a_truncated_file_raises_model_error[to 0 bytes]",
        "JSONDecode",
    ),
    (
        "says it at length",
        FailsAtLength,
        "a_truncated_file_raises_model_error[to half its size]",
        "one line",
    ),
    (
        "takes text for weights",
        FailsAsPythonDoes,
        "a_file_with_other_content_raises_model_error",
        "UnicodeDecode|JSON",
    ),
    (
        "believes its header",
        BelievesItsHeader,
        "a_changed_byte_raises_only_model_error",
        "AttributeError|TypeError",
    ),
    (
        "fails where no file is",
        FailsWithoutFiles(),
        "a_missing_file_raises_model_error",
        "FileNotFound",
    ),
    (
        "fails where no directory is",
        FailsWithoutFiles(),
        "a_directory_without_weights_raises_model",
        "FileNotFound",
    ),
    ("writes an index", WritesAnIndex, "opening_and_reading_do_not_change_files", "weights.index"),
    (
        "sets the default dtype",
        SetsTheDefaultDtype,
        "opening_and_reading_leave_the_process",
        "default dtype",
    ),
    ("draws from torch", SeedsTorch, "opening_and_reading_leave_the_process", "random state"),
    ("has one file for all", OneFileForAll, "closing_one_source_leaves_another", "closed file"),
    ("looks inside", LooksInside(), "can_open_looks_at_names_only", "names only"),
    (
        "opens anything",
        OpensAnything(),
        "can_open_is_false_for_other_directories",
        "an empty directory",
    ),
    ("opens nothing that has more", OpensNothingElse(), "can_open_finds_its_own", "other files"),
    (
        "asks only directories",
        NeedsADirectory(),
        "can_open_is_false_for_other_directories",
        "FileNotFound",
    ),
    (
        "scales square matrices along the other axis",
        Int8(ScalesColumnsWhereTheyFit),
        "tensors_are_read_as_written[float32]",
        "d must have .* within 0.0039.*: it looks scaled along the other axis",
    ),
    ("forgets the scale", Int8(ForgetsTheScale), "tensors_are_read_as_written[float32]", "a must"),
    (
        "states a large error",
        StatesALargeError(Int8Source),
        "tensors_are_read_as_written[float32]",
        "0.9, must be small enough",
    ),
    (
        "states no error",
        StatesNoError(Int8Source),
        "tensors_are_read_as_written[float32]",
        "bit for bit",
    ),
    ("returns nothing", ReturnsNothing(), "tensors_are_read_as_written[float32]", "found None"),
    ("answers with files", AnswersWithFiles(), "can_open_finds_its_own", "True or False"),
]

_RACES: list[tuple[str, type[RawSource], str, str]] = [
    ("shares a file position", SharesAPosition, "a_read_that", "share a file position"),
    ("locks the seek only", LocksTheSeek, "a_read_that", "share a file position"),
    ("locks each tensor by itself", LocksEachTensor, "a_read_that", "share a file position"),
    ("reads into one buffer", ReadsIntoOneBuffer, "a_read_that", "returned other values"),
    ("keeps the offset", KeepsTheOffset, "a_read_that", "returned other values"),
    ("shares a tar file", SharesATar, "a_read_that", "another must be able to call"),
    ("uses what is half open", UsesWhatIsHalfOpen, "a_first_read_that", "'offsets'"),
    ("opens twice", OpensTwice, "a_first_read_that", "stayed open"),
    ("fills an index", FillsAnIndex, "a_first_read_that", "KeyError"),
]
_FAULTS += _RACES

FAULTS = [
    Fault(
        name,
        Raw(plugin) if isinstance(plugin, type) else plugin,
        full_name(WeightFormatSuite, test),
        why=why,
    )
    for name, plugin, test, why in _FAULTS
]
SUITE = WeightFormatSuite


def test_each_broken_format_is_found() -> None:
    assert missed(SUITE, FAULTS) == []


def test_a_right_format_passes() -> None:
    found = run(SUITE, Raw()).found
    # It is of no module that a fresh process could import.
    assert [name for name, outcome in found.items() if outcome != "passed"] == [
        "test_importing_it_leaves_the_process_unchanged"
    ]


@pytest.mark.parametrize(
    "source",
    [
        Locked,
        LockedWhole,
        Mapped,
        OpensForEachRead,
        OneFilePerThread,
        SharesAZip,
        OpensLateOnce,
    ],
)
def test_a_source_that_any_thread_may_read_passes(
    source: type[RawSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Only two of the pairs that are tried for as long as that: the faults need more, this does not.
    monkeypatch.setattr("tilewright_testing.tensor_source._SECONDS", 0.0)
    tests = [name for name in own_tests(SUITE) if "thread" in name]
    assert len(tests) == 3
    assert set(run(SUITE, Raw(source), tests).found.values()) == {"passed"}


def test_a_right_format_that_quantises_passes() -> None:
    found = run(SUITE, Int8(Int8Source)).found
    assert [name for name, outcome in found.items() if outcome == "failed"] == []
    assert found["test_tensors_of_any_shape_are_read"] == "passed"


def test_what_a_format_does_not_have_is_left_out() -> None:
    """Formats of other tools lack bfloat16, or scalars."""

    class Old(Raw):
        @hookimpl
        def write_weights(self, directory: Path, tensors: Mapping[str, Tensor]) -> float:
            if any(t.dtype == torch.bfloat16 for t in tensors.values()):
                raise TypeError("no bfloat16")
            if any(t.ndim == 0 for t in tensors.values()):
                raise ValueError("no scalars")
            return super().write_weights(directory, tensors)

    tests = [
        full_name(SUITE, name)
        for name in (
            "tensors_are_read_as_written[bfloat16]",
            "tensors_of_any_shape[scalars]",
            "can_open_finds_its_own",
        )
    ]
    assert list(run(SUITE, Old(), tests).found.values()) == ["skipped", "skipped", "passed"]


def test_a_format_that_writes_nothing_is_not_tested() -> None:
    class ReadOnly(Raw):
        write_weights = None

    found = run(SUITE, ReadOnly(), ["test_can_open_finds_its_own_files"]).found
    assert found == {"test_can_open_finds_its_own_files": "skipped"}
