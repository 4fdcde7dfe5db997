"""Device memory and on-chip tiles, with a record of the places that each task reads and writes.

``Memory`` is a tensor in device memory or a window of one; ``Tile`` is a tensor on chip in a task.
A tile has two boxes, both from its first row and column: ``valid`` is the part that PyPTO regards
as the tile's contents and that a store writes; ``defined`` is the part with computed values. They
differ where PyPTO declares a result fully valid although its operands were not.
"""

import contextlib
import random
import sys
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeAlias

import torch
from attrs import define, field
from torch import Tensor

from tilewright.errors import ExecutorError

Place: TypeAlias = tuple[int, tuple[int, ...], tuple[int, ...]]
"""Position of a window in its buffer: offset, extents and strides, in elements."""


class KernelError(ExecutorError):
    """A kernel broke a rule of the language, or would have misused a device's memory."""


def fail(message: str) -> NoReturn:
    """Raise KernelError with the line of the kernel that is running."""
    frame = sys._getframe(1)
    while frame.f_back and _is_ours(frame.f_code.co_filename):
        frame = frame.f_back
    where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
    run = _run.get()
    raise KernelError(f"{f'kernel {run.kernel}, ' if run else ''}{where}: {message}")


def _is_ours(file: str) -> bool:
    return Path(file).parent == Path(__file__).parent or file == contextlib.__file__


@define(eq=False)
class Buffer:
    """A whole tensor in device memory."""

    name: str
    direction: Literal["in", "out", "inout", "scratch"]
    data: Tensor
    """Contiguous storage."""
    written: Tensor | None
    """Mask of the elements that have been written; None: all of them."""
    born: int
    """Number of parallel loops running at creation: it is private to one iteration of each."""
    after: int = 0
    """Tasks that a reader waits for: bit i is task i."""
    readers: list[tuple[int, Place]] = field(factory=list)


@define
class Task:
    """A running ``pl.at``. A device runs tasks concurrently unless one waits for the other.

    A task waits for the tasks that wrote what it reads, and for those that they waited for. It does
    not wait for a task that only reads what it writes: PyPTO leaves that order to the kernel.
    """

    number: int
    reads: dict[Buffer, list[Place]] = field(factory=dict)
    writes: dict[Buffer, list[Place]] = field(factory=dict)

    def end(self) -> None:
        after = 0
        for buffer in self.reads:
            after |= buffer.after
        for buffer, places in self.writes.items():
            early = [(t, place) for t, place in buffer.readers if not after >> t & 1]
            if early:
                written = torch.zeros(buffer.data.numel(), dtype=torch.bool)
                for offset, extents, strides in places:
                    written.as_strided(extents, strides, offset).fill_(True)
                if any(written.as_strided(e, s, o).any() for _, (o, e, s) in early):
                    fail(
                        f"a task writes to a place of {buffer.name} that an earlier task reads, "
                        "and does not wait for that task: give one of them its own memory"
                    )
            buffer.after |= after | 1 << self.number
        for buffer, places in self.reads.items():
            buffer.readers += [(self.number, place) for place in places]


@define
class Loop:
    """A running ``pl.parallel``, with its iterations' accesses to shared memory."""

    iteration: int = 0
    writes: dict[Buffer, list[tuple[int, Place]]] = field(factory=dict)
    reads: dict[Buffer, list[tuple[int, Place]]] = field(factory=dict)

    def check(self) -> None:
        for buffer, writes in self.writes.items():
            owner = torch.full((buffer.data.numel(),), -1, dtype=torch.int32)
            for iteration, (offset, extents, strides) in writes:
                window = owner.as_strided(extents, strides, offset)
                others = (window != -1) & (window != iteration)
                if others.any():
                    other = int(window[others][0])
                    fail(
                        f"iterations {other} and {iteration} of a pl.parallel write to the same "
                        f"place of {buffer.name}"
                    )
                window.fill_(iteration)
            for iteration, (offset, extents, strides) in self.reads.get(buffer, ()):
                window = owner.as_strided(extents, strides, offset)
                others = (window != -1) & (window != iteration)
                if others.any():
                    other = int(window[others][0])
                    fail(
                        f"iteration {iteration} of a pl.parallel reads a place of {buffer.name} "
                        f"that iteration {other} writes"
                    )


@define
class Run:
    """One call of a kernel."""

    kernel: str
    random: random.Random
    task: Task | None = None
    tasks: int = 0
    loops: list[Loop] = field(factory=list)


_run: ContextVar[Run | None] = ContextVar("run", default=None)


def running() -> Run:
    run = _run.get()
    if run is None:
        fail("this part of the language can only be used inside a kernel")
    return run


def in_task(what: str) -> Run:
    run = running()
    if run.task is None:
        fail(f"{what} must be inside a pl.at: only control flow is allowed outside")
    return run


def outside_task(what: str) -> Run:
    run = running()
    if run.task is not None:
        fail(f"{what} must be outside a pl.at")
    return run


@contextlib.contextmanager
def call(run: Run) -> Iterator[None]:
    if _run.get() is not None:
        fail("a kernel cannot call another kernel: make it a pl.jit.inline")
    token = _run.set(run)
    try:
        yield
    finally:
        _run.reset(token)


def poison(dtype: torch.dtype) -> float | int:
    return float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max // 3


def allocate(name: str, shape: Sequence[int], dtype: torch.dtype, run: Run) -> "Memory":
    data = torch.full(tuple(shape), poison(dtype), dtype=dtype)
    written = torch.zeros(tuple(shape), dtype=torch.bool)
    return Memory(Buffer(name, "scratch", data, written, len(run.loops)), data, written)


@define(eq=False)
class Tile:
    """An immutable tensor on chip."""

    data: Tensor
    valid: tuple[int, ...]
    defined: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.data.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    def __setitem__(self, key: object, value: object) -> None:
        fail("writing into a tile on chip is not emulated: store it in device memory")

    def __getitem__(self, key: object) -> NoReturn:
        fail("a slice of a tile on chip is not emulated: slice the tensor that it was loaded from")

    def _operator(self, other: object) -> NoReturn:
        fail("operators on tiles are not emulated: write pl.add, pl.mul and so on")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _operator
    __truediv__ = __rtruediv__ = __iadd__ = __isub__ = __imul__ = __itruediv__ = _operator


def whole(data: Tensor) -> Tile:
    shape = tuple(data.shape)
    return Tile(data, shape, shape)


@define(eq=False)
class Memory:
    """A tensor in device memory, or a view of one."""

    buffer: Buffer
    data: Tensor
    written: Tensor | None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.data.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    def bind_dynamic(self, axis: int, symbol: object) -> None:
        """Does nothing: in PyPTO it declares a dynamic extent, as the annotation already does."""

    def __getitem__(self, key: Any) -> "Memory | Tile":
        offsets, extents = self._window(key)
        return self.take(extents, offsets, None)

    def __setitem__(self, key: Any, value: object) -> None:
        in_task("a store")
        offsets, extents = self._window(key)
        if not isinstance(value, Tile):
            fail(f"only a tile can be stored, found {type(value).__name__}")
        if value.shape != extents:
            fail(
                f"expected a tile of {list(extents)} to store to this window, found "
                f"{list(value.shape)}"
            )
        self.store(value, offsets)

    def take(
        self,
        extents: tuple[int, ...],
        offsets: tuple[int, ...],
        valid: tuple[int, ...] | None,
    ) -> "Memory | Tile":
        """A window: a view outside tasks, a tile inside a task."""
        if valid is not None and any(v < 1 or v > e for v, e in zip(valid, extents, strict=True)):
            fail(f"valid_shape {list(valid)} must be between 1 and the window's {list(extents)}")
        read = extents if valid is None else valid
        place = self._inside(offsets, read)
        if running().task is None:
            if valid is not None:
                fail("valid_shape outside a pl.at is not emulated")
            written = None if self.written is None else self.written[place]
            return Memory(self.buffer, self.data[place], written)
        if self.written is not None and not self.written[place].all():
            fail(
                f"{self.buffer.name}[{_shown(offsets, read)}] is read, but not all of it was "
                "written"
            )
        found = self.data[place]
        if self.buffer.direction != "in":
            self._log(found, "reads")
            found = found.clone()
        if read == extents:
            return Tile(found, extents, extents)
        tile = torch.full(extents, poison(self.dtype), dtype=self.dtype)
        tile[tuple(slice(v) for v in read)] = found
        return Tile(tile, read, read)

    def store(self, tile: Tile, offsets: tuple[int, ...]) -> None:
        """Write a tile's valid part."""
        buffer = self.buffer
        if buffer.direction == "in":
            fail(f"{buffer.name} is an input and cannot be written: declare it pl.InOut or pl.Out")
        if tile.dtype != self.dtype:
            fail(f"a tile of {tile.dtype} is stored to {buffer.name}, which is {self.dtype}: cast")
        place = self._inside(offsets, tile.valid)
        part = tuple(slice(v) for v in tile.valid)
        target = self.data[place]
        target.copy_(tile.data[part])
        self._log(target, "writes")
        defined = tuple(map(min, tile.defined, tile.valid))
        if defined == tile.valid:
            if self.written is not None:
                self.written[place] = True
        elif buffer.direction == "scratch":
            assert self.written is not None
            written = self.written[place]
            written.fill_(False)
            written[tuple(slice(d) for d in defined)] = True
        else:
            fail(
                f"a tile of {list(tile.valid)} is stored to {buffer.name}, but only "
                f"{list(defined)} of it was computed: pass valid_shape or use pl.fillpad"
            )

    def _log(self, window: Tensor, what: Literal["reads", "writes"]) -> None:
        run = running()
        place = (
            window.storage_offset() - self.buffer.data.storage_offset(),
            tuple(window.shape),
            window.stride(),
        )
        getattr(run.task, what).setdefault(self.buffer, []).append(place)
        for loop in run.loops[self.buffer.born :]:
            getattr(loop, what).setdefault(self.buffer, []).append((loop.iteration, place))

    def _inside(self, offsets: Sequence[int], extents: Sequence[int]) -> tuple[slice, ...]:
        place = []
        for offset, extent, size in zip(offsets, extents, self.data.shape, strict=True):
            if offset < 0 or offset + extent > size:
                fail(
                    f"{self.buffer.name}[{_shown(offsets, extents)}] reaches outside its shape "
                    f"{list(self.shape)}"
                )
            place.append(slice(offset, offset + extent))
        return tuple(place)

    def _window(self, key: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Offsets and extents of a subscript."""
        keys = key if isinstance(key, tuple) else (key,)
        shape = self.data.shape
        if len(keys) != len(shape):
            if keys == (slice(None),):
                return (0,) * len(shape), tuple(shape)
            fail(f"{self.buffer.name} has {len(shape)} dimensions, found {len(keys)} indices")
        offsets, extents = [], []
        for part, size in zip(keys, shape, strict=True):
            if not isinstance(part, slice):
                fail("a subscript must consist of slices: read an element with pl.read")
            if part.step is not None:
                fail("a slice with a step is not part of the language")
            start = 0 if part.start is None else part.start
            stop = size if part.stop is None else part.stop
            if stop <= start:
                fail(f"a slice must not be empty, found {start}:{stop}")
            offsets.append(start)
            extents.append(stop - start)
        return tuple(offsets), tuple(extents)


def _shown(offsets: Sequence[int], extents: Sequence[int]) -> str:
    return ", ".join(f"{o}:{o + e}" for o, e in zip(offsets, extents, strict=True))
