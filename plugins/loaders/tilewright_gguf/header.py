"""A GGUF file's header: keys and values, and the list of tensors.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The file is mapped, and each
count, length and offset is checked against its size before use, so a damaged file cannot cause huge
allocations or loops. (The gguf library's own reader trusts them, and takes 20 times as long for a
large vocabulary.)
"""

import math
import mmap
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from attrs import evolve, field, frozen
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from tilewright.errors import ModelError
from tilewright.weights import printable
from tilewright_hf.files import check_file
from tilewright_hf.mapped import map_file

MAGIC = b"GGUF"
VERSIONS = (2, 3)

MAX_KEYS = 100_000
MAX_TENSORS = 1_000_000
MAX_ITEMS = 2**24
MAX_STRING = 2**28
"""Larger numbers indicate damage; reading on would only waste time and memory."""

MAX_DIMENSIONS = 4

_NUMBERS: dict[GGUFValueType, str] = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.FLOAT64: "<f8",
}


@frozen(kw_only=True)
class StoredTensor:
    """A tensor of a file: the place and the type of its bytes.

    shape: rows first, as in torch; GGUF writes the innermost dimension first.
    start: offset of its bytes in the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    start: int
    nbytes: int


@frozen(kw_only=True)
class GgufFile:
    """An open file. Its memory is released with the last tensor that shares it.

    values: header values as Python types; a float32 is the shortest decimal that rounds to it.
    """

    path: Path
    values: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    memory: mmap.mmap = field(repr=False)


def open_file(path: Path) -> GgufFile:
    """Map a file and read its header.

    Raises ModelError for a file that is not GGUF, is damaged, or is shorter than its header says.
    """
    check_file(path)
    memory = map_file(path)
    start = bytes(memory[:8])
    if start[:4] != MAGIC:
        found = f"a file that begins with {start!r}"
        if start[1:4] in (b"mgg", b"jgg"):
            found = "a GGML file, which is older: convert the model again, or download a GGUF of it"
        raise ModelError(f"{path}: expected a GGUF file, found {found}")
    return _Header(path, memory).read()


class _Header:
    """Reads a mapped file from the front."""

    def __init__(self, path: Path, memory: mmap.mmap):
        self._path = path
        self._memory = memory
        self._size = len(memory)
        self._at = len(MAGIC)

    def read(self) -> GgufFile:
        self._check_version()
        tensors = self._count("tensors", MAX_TENSORS)
        keys = self._count("keys", MAX_KEYS)
        values: dict[str, Any] = {}
        for _ in range(keys):
            key = self._string("a key")
            if not key or key in values:
                self._damaged(f"key {printable(key)} {'appears twice' if key else 'has no name'}")
            values[key] = self._value(key)
        infos = [self._tensor_info() for _ in range(tensors)]
        return GgufFile(
            path=self._path,
            values=values,
            tensors=self._placed(infos, values.get("general.alignment", 32)),
            memory=self._memory,
        )

    def _check_version(self) -> None:
        version = self._number("<I")
        if version in VERSIONS:
            return
        if version and not version & 0xFFFF:
            raise ModelError(
                f"{self._path}: a big-endian GGUF file, expected a little-endian one; convert it "
                "with gguf-convert-endian, or download a little-endian version of it"
            )
        raise ModelError(
            f"{self._path}: GGUF version {version}, expected "
            f"{' or '.join(map(str, VERSIONS))}; convert the model again, or download it again"
        )

    def _count(self, of: str, limit: int) -> int:
        count = self._number("<Q")
        if count > limit:
            self._damaged(f"claims {count} {of}, expected at most {limit}")
        return count

    def _value(self, key: str) -> Any:
        kind = self._value_type(key)
        if kind != GGUFValueType.ARRAY:
            return self._item(kind, key)
        kind = self._value_type(key)
        count = self._number("<Q")
        if count > MAX_ITEMS:
            self._damaged(f"{printable(key)} claims {count} items, expected at most {MAX_ITEMS}")
        if kind == GGUFValueType.STRING:
            return self._strings(key, count)
        if kind == GGUFValueType.BOOL:
            return [self._boolean(key) for _ in range(self._fits(count))]
        if kind == GGUFValueType.ARRAY:
            self._damaged(f"{printable(key)} is an array of arrays, which is not supported")
        dtype = np.dtype(_NUMBERS[kind])
        start = self._take(count * dtype.itemsize)
        return np.frombuffer(self._memory, dtype, count, start).tolist()

    def _value_type(self, key: str) -> GGUFValueType:
        number = self._number("<I")
        try:
            return GGUFValueType(number)
        except ValueError:
            self._damaged(f"{printable(key)} has type {number}, expected 0 to 12")

    def _item(self, kind: GGUFValueType, key: str) -> Any:
        if kind == GGUFValueType.STRING:
            return self._string(printable(key))
        if kind == GGUFValueType.BOOL:
            return self._boolean(key)
        dtype = np.dtype(_NUMBERS[kind])
        value = np.frombuffer(self._memory, dtype, 1, self._take(dtype.itemsize))[0]
        return float(str(value)) if kind == GGUFValueType.FLOAT32 else value.item()

    def _boolean(self, key: str) -> bool:
        value = self._memory[self._take(1)]
        if value > 1:
            self._damaged(f"{printable(key)} is a boolean with value {value}, expected 0 or 1")
        return bool(value)

    def _strings(self, key: str, count: int) -> list[str]:
        self._fits(count * 8)
        memory, size, at = self._memory, self._size, self._at
        length_at: Callable[[mmap.mmap, int], tuple[int]] = struct.Struct("<Q").unpack_from
        strings = []
        try:
            for _ in range(count):
                end = at + 8 + length_at(memory, at)[0]
                if end > size:
                    break
                strings.append(str(memory[at + 8 : end], "utf-8"))
                at = end
        except struct.error:
            pass  # the file ends inside a length
        except UnicodeDecodeError:
            self._at = at
            self._no_text(f"item {len(strings)} of {printable(key)}")
        self._at = at
        if len(strings) < count:
            self._truncated(f"item {len(strings)} of {printable(key)}")
        return strings

    def _string(self, what: str) -> str:
        length = self._number("<Q")
        if length > MAX_STRING:
            self._damaged(f"{what} claims {length} bytes of text, expected at most {MAX_STRING}")
        start = self._take(length)
        try:
            return str(self._memory[start : start + length], "utf-8")
        except UnicodeDecodeError:
            self._no_text(what)

    def _tensor_info(self) -> StoredTensor:
        """A tensor as in the header: ``start`` counts from the beginning of the data."""
        name = self._string("a tensor's name")
        shown = f"tensor {printable(name)}"
        count = self._number("<I")
        if not 1 <= count <= MAX_DIMENSIONS:
            self._damaged(f"{shown} claims {count} dimensions, expected 1 to {MAX_DIMENSIONS}")
        shape = tuple(reversed([self._number("<Q") for _ in range(count)]))
        number = self._number("<I")
        start = self._number("<Q")
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            self._damaged(f"{shown} has type {number}, which is not a ggml type")
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if 0 in shape or shape[-1] % block:
            of = f"a multiple of {block}" if block > 1 else "1 or more"
            self._damaged(f"{shown} has rows of {shape[-1]}, expected {of} for {kind.name}")
        nbytes = math.prod(shape) // block * block_bytes
        return StoredTensor(name=name, shape=shape, kind=kind, start=start, nbytes=nbytes)

    def _placed(self, infos: list[StoredTensor], alignment: Any) -> dict[str, StoredTensor]:
        """Tensors with offsets in the file, which have no gaps except for alignment."""
        if (
            not isinstance(alignment, int)
            or not 8 <= alignment <= 2**20
            or alignment & (alignment - 1)
        ):
            self._damaged(f"general.alignment is {alignment!r:.60}, expected a power of two from 8")
        data = -(-self._at // alignment) * alignment
        placed: dict[str, StoredTensor] = {}
        end = data
        for info in sorted(infos, key=lambda info: info.start):
            shown = printable(info.name)
            if info.name in placed:
                self._damaged(f"tensor {shown} appears twice")
            start = -(-end // alignment) * alignment
            if data + info.start != start:
                self._damaged(
                    f"tensor {shown} begins at offset {info.start}, expected {start - data}, the "
                    "end of the previous tensor"
                )
            end = start + info.nbytes
            if end > self._size:
                raise ModelError(
                    f"{self._path}: truncated: tensor {shown} ends at byte {end}, the file at "
                    f"{self._size}; download it again, or join its parts if it was cut into parts"
                )
            placed[info.name] = evolve(info, start=start)
        if self._size - end > alignment:
            self._damaged(f"its tensors end at byte {end}, but the file at {self._size}")
        return {info.name: placed[info.name] for info in infos}

    def _number(self, form: str) -> int:
        number: int = struct.unpack_from(form, self._memory, self._take(struct.calcsize(form)))[0]
        return number

    def _take(self, nbytes: int) -> int:
        """Skip the next nbytes bytes, which must exist, and return their offset."""
        self._fits(nbytes)
        start = self._at
        self._at += nbytes
        return start

    def _fits(self, nbytes: int) -> int:
        if self._at + nbytes > self._size:
            self._truncated(f"{nbytes} bytes at offset {self._at}")
        return nbytes

    def _truncated(self, what: str) -> NoReturn:
        raise ModelError(
            f"{self._path}: truncated: expected {what} of its header, the file ends at byte "
            f"{self._size}; download it again"
        )

    def _no_text(self, what: str) -> NoReturn:
        self._damaged(f"{what} is not UTF-8 text")

    def _damaged(self, what: str) -> NoReturn:
        raise ModelError(
            f"{self._path}: damaged GGUF header before byte {self._at}: {what}; download it again"
        )
