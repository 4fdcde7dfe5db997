"""Sizes that the kernels need of the rings of PyPTO's runtime: memory for scratch, and task slots.

A ring that is too small may end the process in the runtime's C++, so sizes are checked before a
device is opened. The sizes are counted by running the kernels' source with a language that only
counts: tensors are shapes, tasks do nothing, and one iteration of a pl.parallel stands for all.

In PyPTO e2d0f78 and its runtime, the runtime opens a scope, the kernel opens one within it, and
each iteration of a loop opens one within that. A scope of depth d allocates from ring d, deeper
ones from the last. A ring is reclaimed in order: a scope's memory is freed when it ends, but the
memory of scopes that share the last ring is freed when the outermost of them ends. Therefore
attention to all heads of a tile of tokens, over the whole context, is held at once. A scope's
memory is allocated when it begins, by one task per 16 tensors, in multiples of 1024 bytes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from inspect import isfunction
from math import prod
from operator import add
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from attrs import define, field, frozen

from tilewright.errors import ExecutorError
from tilewright.types import KernelSet
from tilewright_kernels import source
from tilewright_pypto.emulated.language import NAMES, Dynamic

if TYPE_CHECKING:
    from tilewright_pypto.options import Options

COUNT = 4
"""Rings of the runtime: PTO2_MAX_RING_DEPTH."""
UNIT = 1024
"""Each tensor takes a multiple of this many bytes."""
TOGETHER = 16
"""Maximum number of tensors that one task allocates, in one piece of memory."""
STANDARD = {"ring_heap": 256 << 20, "ring_task_window": 16384, "ring_dep_pool": 16384}
"""PyPTO's own sizes: PTO2_HEAP_SIZE, PTO2_TASK_WINDOW_SIZE and PTO2_DEP_LIST_POOL_SIZE."""
DEPENDENCIES = 4
"""Entries of ring_dep_pool per task. A task takes one for each unfinished task that it waits for,
so the number depends on timing: a run on a2a3sim took 1.6 per task, for 10448 tasks."""


def check(options: "Options", kernels: KernelSet, positions: int) -> None:
    """Raise ExecutorError for a size that is too small for sequences of that many tokens.

    Except for ring_dep_pool: how many dependencies are open at a time depends on timing.
    """
    for name in ("ring_heap", "ring_task_window"):
        kernel, least = max(
            ((k, needed(k, kernels, positions)[name]) for k in kernels.constants),
            key=lambda n: n[1],
        )
        asked = getattr(options, name)
        if asked is not None and asked < least:
            raise ExecutorError(
                f"executor pypto-npu: {name} must be at least {least} for kernel {kernel} and "
                f"sequences of {positions} tokens, found {asked}: raise it, or remove it"
            )


def larger(options: "Options", kernel: str, kernels: KernelSet, positions: int) -> dict[str, int]:
    """Sizes for a call of a kernel, by option, where PyPTO's own are too small and none was asked.

    positions: tokens of the longest sequence in the call. Rings cost memory and time, so a call
    gets large ones only if it needs them; the sizes are those for the next power of two.
    """
    found = needed(kernel, kernels, 1 << max(0, positions - 1).bit_length())
    return {
        name: found[name]
        for name, standard in STANDARD.items()
        if getattr(options, name) is None and found[name] > standard
    }


@cache
def needed(kernel: str, kernels: KernelSet, positions: int) -> dict[str, int]:
    """Sizes of rings, by option, that are enough for a tile of tokens ending the longest sequence.

    The heap allows for memory that stays unused because a piece did not fit before the ring's end;
    how much that is depends on where the previous kernel ended, so a kernel may run with less.

    The sizes are 0 for a kernel that uses more of the language than the counting knows: then
    PyPTO's own sizes apply, unless the user asks for others.
    """
    try:
        taken = counted(kernel, kernels, positions)
    except Exception:  # whatever the kernel does with what the counting gives it
        return dict.fromkeys(STANDARD, 0)
    return {
        "ring_heap": max(UNIT, _power_above(max(map(add, taken.most_bytes, taken.most_unused)))),
        "ring_task_window": _power_above(max(taken.most_tasks)),
        "ring_dep_pool": _power_above(DEPENDENCIES * max(taken.most_tasks)),
    }


def _power_above(size: int) -> int:
    """A power of two above size: the runtime cannot tell a ring that is full from an empty one."""
    return 1 << size.bit_length()


def counted(kernel: str, kernels: KernelSet, positions: int) -> "Taken":
    """What a kernel takes from each ring for a tile of tokens that ends the longest sequence."""
    rows = 1 if kernel.startswith("decode") else kernels.tiles.prefill_rows or positions
    count = source.load(kernel, kernels, _language())
    taken: Taken = count(context_lens=positions, query_lens=min(rows, positions))
    return taken


# --- a language that counts -----------------------------------------------------------------------


def _zeros() -> list[int]:
    return [0] * COUNT


@define
class Taken:
    """What the open scopes have taken, by ring, and the most that they have taken at once."""

    depth: int = 0
    in_task: bool = False
    tensors: list[int] = field(factory=list)
    """Bytes of each tensor of the innermost scope."""
    bytes: list[int] = field(factory=_zeros)
    tasks: list[int] = field(factory=_zeros)
    most_bytes: list[int] = field(factory=_zeros)
    most_tasks: list[int] = field(factory=_zeros)
    most_unused: list[int] = field(factory=_zeros)
    """The largest piece of memory that may have to move to the ring's beginning."""

    @property
    def ring(self) -> int:
        return min(self.depth, COUNT - 1)

    def take(self, size: int, tasks: int) -> None:
        ring = self.ring
        self.bytes[ring] += size
        self.tasks[ring] += tasks
        self.most_bytes[ring] = max(self.most_bytes[ring], self.bytes[ring])
        self.most_tasks[ring] = max(self.most_tasks[ring], self.tasks[ring])

    def allocate(self, size: int) -> None:
        rounded = -(-size // UNIT) * UNIT
        self.take(rounded, tasks=len(self.tensors) % TOGETHER == 0)
        self.tensors.append(rounded)

    def last_ring(self) -> tuple[int, int]:
        """Bytes and tasks taken from the last ring."""
        return self.bytes[-1], self.tasks[-1]

    def repeat(self, before: tuple[int, int], times: int) -> None:
        """Take from the last ring, ``times`` times, what was taken since ``before``."""
        size, tasks = (now - then for now, then in zip(self.last_ring(), before, strict=True))
        if self.ring == COUNT - 1:
            self.take(times * size, times * tasks)

    @contextmanager
    def scope(self) -> Iterator[None]:
        outer, self.tensors = self.tensors, []
        self.depth += 1
        ring = self.ring
        before = self.bytes[ring], self.tasks[ring]
        yield
        held = before[0]
        for start in range(0, len(self.tensors), TOGETHER):
            piece = sum(self.tensors[start : start + TOGETHER])
            if held:  # in an empty ring any piece goes to the beginning
                self.most_unused[ring] = max(self.most_unused[ring], piece)
            held += piece
        if self.depth < COUNT:
            self.bytes[ring], self.tasks[ring] = before
        self.depth -= 1
        self.tensors = outer


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

    def __init__(self, taken: Taken):
        self.taken = taken

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Taken]:
        def count(**scalars: int) -> Taken:
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
    taken = Taken()

    @contextmanager
    def at(**_: Any) -> Iterator[None]:
        taken.take(0, tasks=1)
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
        before = taken.last_ring()
        yield from iterations(values[:1])
        taken.repeat(before, max(0, len(values) - 1))

    def create_tensor(shape: list[int], dtype: torch.dtype) -> _Shaped:
        taken.allocate(prod(shape) * dtype.itemsize)
        return _Shaped(tuple(shape))

    def nothing(*_: Any, **__: Any) -> _Shaped:
        return _Shaped()

    language = ModuleType("pypto.language, counting")
    vars(language).update(
        {name: nothing if isfunction(what) else what for name, what in NAMES.items()},
        Level=NAMES["Level"],
        at=at,
        cast=lambda x, *_, **__: x,
        create_tensor=create_tensor,
        dim=lambda x, axis: x.shape[axis],
        dynamic=Dynamic,
        jit=_Jit(taken),
        max=max,
        min=min,
        parallel=parallel,
        pipeline=lambda *bounds, stage: range(*bounds)[:1],
        range=lambda *bounds: iterations(range(*bounds)),
        read=lambda x, _: x.value,
        reshape=lambda _, shape: _Shaped(tuple(shape)),
        tensor=SimpleNamespace(dim=lambda x, axis: x.shape[axis]),
        unroll=lambda *bounds: range(*bounds)[: 1 if taken.in_task else None],
    )
    return language
