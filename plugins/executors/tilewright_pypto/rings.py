"""What the kernels need of the rings of PyPTO's runtime: memory for scratch, and room for tasks.

A ring that is too small may end the process in the runtime's C++, so sizes are checked before a
device is opened. What is needed is counted by running the kernels' source on nothing: tensors are
shapes, tasks do nothing, and one iteration of a pl.parallel stands for all.

As PyPTO e2d0f78 and its runtime have it: the runtime opens a scope, in it the kernel opens one, and
in that each iteration of a loop. A scope of depth d takes from ring d, deeper ones from the last.
A ring is reclaimed in order: what a scope took comes back when it ends, but what the scopes that
share the last ring took comes back when the outermost of them ends. So attention to all heads of a
tile of tokens, over the whole context, is held at once. A scope's memory is taken when it begins,
by one task for each 16 tensors, in multiples of 1024 bytes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from math import prod
from operator import add
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from attrs import define, evolve, field, frozen

from tilewright.errors import ExecutorError
from tilewright_kernels.qwen3_14b import source
from tilewright_kernels.qwen3_14b.shape import LayerShape
from tilewright_pypto.emulated.language import NAMES, Dynamic

if TYPE_CHECKING:
    from tilewright_pypto.options import Options

RINGS = 4
UNIT = 1024
"""Bytes that an allocation is a multiple of."""
TOGETHER = 16
"""Tensors that one task allocates at most."""
STANDARD = {"ring_heap": 256 << 20, "ring_task_window": 16384}
"""PyPTO's own sizes, in bytes and in tasks: PTO2_HEAP_SIZE and PTO2_TASK_WINDOW_SIZE."""
DEPENDENCIES = 4
"""Dependencies of a task for which a larger window gets room; PyPTO's own sizes have it for one."""


def fitted(options: "Options", shape: LayerShape, positions: int) -> "Options":
    """The options, with rings large enough where PyPTO's own are not and no size was asked for.

    positions: tokens of the longest sequence. Raises ExecutorError for a size that is too small.
    """
    larger: dict[str, Any] = {}
    for name, standard in STANDARD.items():
        kernel, least = max(
            ((k, needed(k, shape, positions)[name]) for k in source.KERNELS), key=lambda n: n[1]
        )
        asked = getattr(options, name)
        if asked is None and least > standard:
            larger[name] = least
            if name == "ring_task_window" and options.ring_dep_pool is None:
                larger["ring_dep_pool"] = DEPENDENCIES * least
        if asked is not None and asked < least:
            raise ExecutorError(
                f"executor pypto-npu: kernel {kernel} needs a {name} of at least {least} for "
                f"sequences of {positions} tokens, found {asked}: set that, or leave it out"
            )
    return evolve(options, **larger)


@cache
def needed(kernel: str, shape: LayerShape, positions: int) -> dict[str, int]:
    """The least sizes of rings, by option, for a tile of tokens that ends the longest sequence.

    A kernel may run with half of that heap: memory that a task allocates is in one piece, and what
    is left over at the end of the ring depends on where the kernel before has ended.
    """
    rows = int(shape.constants(kernel)["ROWS"])
    taken: _Taken = source.load(kernel, shape, _language())(
        context_lens=positions, query_lens=min(rows, positions)
    )
    heap = max(map(add, taken.most_bytes, taken.most_left_over))
    return {
        # A ring that is full counts as empty.
        "ring_heap": max(UNIT, _power_above(heap)),
        "ring_task_window": _power_above(max(taken.most_tasks) + 1),
    }


def _power_above(size: int) -> int:
    return 1 << size.bit_length()


# --- a language that counts -----------------------------------------------------------------------


@define
class _Taken:
    """What the open scopes have taken from each ring, and the most that they ever had."""

    depth: int = 0
    in_task: bool = False
    tensors: int = 0
    """Tensors that the innermost scope has allocated."""
    piece: int = 0
    """Bytes that the current task allocates, in one piece."""
    bytes: list[int] = field(factory=lambda: [0] * RINGS)
    tasks: list[int] = field(factory=lambda: [0] * RINGS)
    most_bytes: list[int] = field(factory=lambda: [0] * RINGS)
    most_tasks: list[int] = field(factory=lambda: [0] * RINGS)
    most_left_over: list[int] = field(factory=lambda: [0] * RINGS)
    """Bytes that may stay unused at the ring's end, because the next piece did not fit there."""

    @property
    def ring(self) -> int:
        return min(self.depth, RINGS - 1)

    def task(self) -> None:
        self.tasks[self.ring] += 1
        self.most_tasks[self.ring] = max(self.most_tasks[self.ring], self.tasks[self.ring])

    def allocate(self, size: int) -> None:
        ring = self.ring
        if self.tensors % TOGETHER == 0:
            self.task()
            self.piece = 0
        self.tensors += 1
        units = -(-size // UNIT) * UNIT
        self.piece += units
        self.bytes[ring] += units
        self.most_bytes[ring] = max(self.most_bytes[ring], self.bytes[ring])
        if self.bytes[ring] > self.piece:
            self.most_left_over[ring] = max(self.most_left_over[ring], self.piece)

    def held(self) -> tuple[int, int]:
        """Bytes and tasks of the last ring."""
        return self.bytes[-1], self.tasks[-1]

    def repeat(self, before: tuple[int, int], times: int) -> None:
        """Take from the last ring, that many times, what has been taken since ``before``."""
        size, tasks = (now - then for now, then in zip(self.held(), before, strict=True))
        self.bytes[-1] += max(0, times) * size
        self.tasks[-1] += max(0, times) * tasks
        self.most_bytes[-1] = max(self.most_bytes[-1], self.bytes[-1])
        self.most_tasks[-1] = max(self.most_tasks[-1], self.tasks[-1])

    @contextmanager
    def scope(self) -> Iterator[None]:
        tensors, self.tensors = self.tensors, 0
        self.depth += 1
        ring = self.ring
        before = self.bytes[ring], self.tasks[ring]
        yield
        if self.depth < RINGS:
            self.bytes[ring], self.tasks[ring] = before
        self.depth -= 1
        self.tensors = tensors


@frozen
class _Shaped:
    """A tensor's shape; ``value`` is what each element of an integer parameter holds."""

    shape: tuple[int, ...] = ()
    value: int = 0

    def __getitem__(self, window: object) -> "_Shaped":
        return self

    def __setitem__(self, window: object, value: object) -> None:
        pass


class _Jit:
    """``pl.jit``: a kernel counts what it takes when it is called."""

    inline = staticmethod(lambda function: function)

    def __init__(self, taken: _Taken):
        self.taken = taken

    def __call__(self, function: Callable[..., Any]) -> Callable[..., _Taken]:
        def count(**scalars: int) -> _Taken:
            """scalars: values of integer parameters by name, 0 for those left out."""
            parameters = {
                name: _Shaped(
                    tuple(1 if isinstance(extent, Dynamic) else extent for extent in kind.shape),
                    scalars.get(name, 0),
                )
                for name, kind in function.__annotations__.items()
            }
            with self.taken.scope():
                function(**parameters)
            return self.taken

        return count


def _language() -> ModuleType:
    """A ``pypto.language`` whose kernels count; for one call of one kernel."""
    taken = _Taken()

    @contextmanager
    def at(**_: Any) -> Iterator[None]:
        taken.task()
        taken.in_task = True
        yield
        taken.in_task = False

    def iterations(values: range) -> Iterator[int]:
        if taken.in_task:
            yield from values[:1]
            return
        for value in values:
            with taken.scope():
                yield value

    def parallel(*bounds: int) -> Iterator[int]:
        values = range(*bounds)
        before = taken.held()
        yield from iterations(values[:1])
        taken.repeat(before, len(values) - 1)

    def create_tensor(shape: list[int], *, dtype: torch.dtype) -> _Shaped:
        taken.allocate(prod(shape) * dtype.itemsize)
        return _Shaped(tuple(shape))

    def nothing(*_: Any, **__: Any) -> _Shaped:
        return _Shaped()

    language = ModuleType("pypto.language, counting")
    vars(language).update(
        {name: nothing if callable(what) else what for name, what in NAMES.items()},
        Level=NAMES["Level"],
        at=at,
        cast=lambda x, *_, **__: x,
        create_tensor=create_tensor,
        dynamic=Dynamic,
        jit=_Jit(taken),
        max=max,
        min=min,
        parallel=parallel,
        range=lambda *bounds: iterations(range(*bounds)),
        read=lambda x, _: x.value,
        reshape=lambda _, shape: _Shaped(tuple(shape)),
        tensor=SimpleNamespace(dim=lambda x, axis: x.shape[axis]),
    )
    return language
