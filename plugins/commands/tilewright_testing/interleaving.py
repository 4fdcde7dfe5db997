"""Code that another thread interrupts at every step, so that a race does not depend on luck."""

import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable
from threading import Thread
from types import FrameType
from typing import Any, Generic, NamedTuple, TypeVar, cast

T = TypeVar("T")


class Step(NamedTuple):
    """Where a thread is."""

    event: str
    """As for ``sys.setprofile`` and ``sys.settrace``."""
    place: tuple[tuple[int, int], ...]
    """The id of the code and the instruction of each frame, from the innermost."""


_STDLIB = re.compile(
    rf"{re.escape(sysconfig.get_path('stdlib'))}/(?!(site|dist)-packages/)|<frozen "
)

_VISITS = 2
"""A step in a loop is interrupted this often, since further rounds run the same code."""

_PATIENCE = 0.02
"""Seconds that an interrupted thread waits for the other one. One that is still not done by then
is taken to wait for a lock, and gets half of that at each further step, down to _LEAST."""

_LEAST = 0.001

_STUCK = 60.0
"""Seconds after which two threads that wait for each other are given up."""


def steps_of(work: Callable[[], object]) -> list[Step]:
    """The steps that a call takes in a thread of its own: see ``interrupted``."""
    steps: list[Step] = []
    _traced(work, steps.append)
    return steps


def interrupted(work: Callable[[], T], other: Callable[[], object], only: Step | None = None) -> T:
    """Run ``work`` in a thread, and ``other`` in a further one at each step of it.

    A step starts with each line outside the standard library, and ends with each call of a function
    in C and each return from one in Python. There the thread waits until ``other`` is done. If
    ``other`` waits for a lock that ``work`` holds, both go on together until the lock is free. So
    whatever another thread can do between two steps, it has done, each time this runs. What happens
    within a function in C is out of reach.

    only: the one step to be interrupted, at its first visit; None: all.

    Returns the result of ``work``. Raises what either raises, and TimeoutError when they wait for
    each other for ever.
    """
    visits: Counter[Step] = Counter()
    runs: list[_Run[object]] = []
    patience = _PATIENCE

    def interrupt(step: Step) -> None:
        nonlocal patience
        if runs and runs[-1].is_alive():
            runs[-1].join(patience)
        elif visits[step] < (_VISITS if only is None else int(step == only)):
            visits[step] += 1
            runs.append(_Run(other))
            runs[-1].start()
            patience = _PATIENCE
            runs[-1].join(patience)
        else:
            return
        patience = max(patience / 2, _LEAST)

    result = _traced(work, interrupt)
    for run in runs:
        run.finish()
    return result


def _traced(work: Callable[[], T], at_step: Callable[[Step], None]) -> T:
    def profile(frame: FrameType, event: str, _: Any) -> None:
        if event in ("c_return", "c_exception", "return"):
            at_step(Step(event, _place(frame)))

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if event == "call" and _STDLIB.match(frame.f_code.co_filename):
            return None
        if event == "line":
            at_step(Step(event, _place(frame)))
        return trace

    def traced() -> T:
        sys.settrace(trace)
        sys.setprofile(profile)
        try:
            return work()
        finally:
            sys.setprofile(None)
            sys.settrace(None)

    run = _Run(traced)
    run.start()
    return run.finish()


def _place(frame: FrameType | None) -> tuple[tuple[int, int], ...]:
    place = []
    while frame is not None:
        place.append((id(frame.f_code), frame.f_lasti))
        frame = frame.f_back
    return tuple(place)


class _Run(Thread, Generic[T]):
    """A call in a thread, with its result. A daemon, since two of them may wait for each other."""

    def __init__(self, work: Callable[[], T]):
        super().__init__(daemon=True)
        self._work = work
        self._result: T | None = None
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self._result = self._work()
        except BaseException as error:
            self._error = error

    def finish(self) -> T:
        self.join(_STUCK)
        if self.is_alive():
            raise TimeoutError(f"two threads waited for each other for {_STUCK:.0f} s")
        if self._error is not None:
            raise self._error
        return cast(T, self._result)
