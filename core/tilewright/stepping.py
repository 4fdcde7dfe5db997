"""The thread that runs a model's steps, for callers in any other thread."""

import atexit
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from threading import RLock, Thread, local
from typing import TypeVar

from tilewright.errors import RequestError, copied
from tilewright.request import Request
from tilewright.runner import Runner

T = TypeVar("T")

_started: "set[SteppingThread]" = set()
"""Threads that are joined when the process ends."""


class _Local(local):
    runs: "SteppingThread | None" = None
    """The SteppingThread that runs in this thread."""


_local = _Local()
_waiting = RLock()
"""Held while a stepping thread begins to wait for another one."""


class SteppingThread:
    """Runs the steps of one runner. Other threads post what they want done between two steps.

    The thread starts when it is first needed, and waits while there is no request. It calls the
    executor, the sampler, logits processors and observers; if these call the engine for the same
    model, the call runs at once, in the middle of a step.
    """

    def __init__(self, runner: Runner):
        self.runner = runner
        # SimpleQueue.put may be interrupted by a finaliser that calls it, as close of a stream.
        self._posted: SimpleQueue[Callable[[], object]] = SimpleQueue()
        # A finaliser may close the engine while this thread holds the lock.
        self._lock = RLock()
        self._thread: Thread | None = None
        self._process = os.getpid()
        self._released = False
        self._reason: RequestError | None = None
        """Why it closes."""
        self._ended = False
        self._close_error: BaseException | None = None
        self._awaits: SteppingThread | None = None
        """The one that this thread waits for, in an event."""

    def submit(self, function: Callable[[], T]) -> "Future[T]":
        """Have a function called before the next step, unless the future is cancelled before. The
        future has what it returns or raises."""
        future: Future[T] = Future()

        def call() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        self._start()
        if self._is_current():
            call()
        else:
            self._post(call)
        return future

    def call(self, function: Callable[[], T]) -> T:
        """``submit``, and wait for what the function returns or raises."""
        future = self.submit(function)
        with self._awaited():
            return future.result()

    def abort(self, request: Request) -> None:
        """End a request, which was submitted, before the next step; does not wait for it."""
        if self._thread:
            self._post(lambda: self._abort(request))

    def receive(self, mailbox: "SimpleQueue[T]") -> T:
        """The next item of a mailbox that a request's ``on_news`` fills."""
        while self._is_current():
            try:
                return mailbox.get_nowait()
            except Empty:
                self.runner.check_not_computing()
                self._step()
        self._check_process()
        with self._awaited():
            return mailbox.get()

    def release(self) -> Runner:
        """Hand the runner to a caller that runs its steps itself, from now on.

        Raises RequestError once a request was submitted.
        """
        with self._lock:
            if self._thread:
                raise RequestError(
                    f"the engine runs the steps of model {self._model_id!r} already: "
                    "take its runner before the first request"
                )
            self._released = True
        return self.runner

    def stop(self, reason: RequestError) -> None:
        """End all requests with an error and free the model, when the step that is running has
        ended; does not wait for it."""
        if os.getpid() != self._process:
            return  # the model is the other process's
        with self._lock:
            first = self._reason is None
            self._reason = self._reason or reason
            never_started = self._thread is None
        if not never_started:
            self._post(lambda: None)  # wakes it
        elif first:
            self.runner.close(reason)

    def close(self, reason: RequestError) -> None:
        """``stop``, and wait until the model is free. Raises what the executor's close raises."""
        self.stop(reason)
        if self._is_current():
            self.runner.close(reason)
        elif self._thread:
            with self._awaited():
                try:
                    self._thread.join()
                except KeyboardInterrupt:
                    _started.discard(self)  # the end of the process does not wait again
                    raise
            if self._close_error:
                raise copied(self._close_error)

    @property
    def _model_id(self) -> str:
        return self.runner.model.model_id

    def _is_current(self) -> bool:
        return _local.runs is self

    @contextmanager
    def _awaited(self) -> Iterator[None]:
        """For the time in which the calling thread waits for this one.

        Raises RequestError if this one waits for the caller, in an event: neither would go on.
        """
        caller = _local.runs
        if caller is None or caller is self:
            yield
            return
        with _waiting:
            before, last = caller._awaits, self
            while last is not caller and last._awaits:
                last = last._awaits
            if last is caller:
                raise RequestError(
                    f"an observer of model {caller._model_id!r} waits for model "
                    f"{self._model_id!r}, which waits for an event of model {caller._model_id!r}: "
                    "let observers of one of them call the engine in another thread"
                )
            caller._awaits = self
        try:
            yield
        finally:
            caller._awaits = before

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise RequestError(
                f"model {self._model_id!r} was loaded in process {self._process}, and its thread "
                f"does not run in process {os.getpid()}: make the engine after the fork"
            )

    def _start(self) -> None:
        self._check_process()
        with self._lock:
            if self._released:
                raise RequestError(
                    f"the steps of model {self._model_id!r} are run by the caller that took its "
                    "runner: add the request to that runner"
                )
            if self._thread:
                return
            if self._reason:
                raise copied(self._reason)
            name = f"tilewright {self._model_id}"
            self._thread = Thread(target=self._run, name=name, daemon=True)
            _started.add(self)
            try:
                self._thread.start()
            except RuntimeError:  # no thread can be started
                self._thread = None
                _started.discard(self)
                raise
            # Last registered, first called: before what the executor's libraries have registered.
            atexit.unregister(_close_started)
            atexit.register(_close_started)

    def _post(self, function: Callable[[], object]) -> None:
        self._posted.put(function)
        if self._ended:  # nobody else will; the runner is closed
            self._call_posted()

    def _run(self) -> None:
        _local.runs = self
        while not self._reason:
            self._guarded(self._turn)
            self._tell()
        self._close()
        self._tell()
        self._ended = True
        self._call_posted()
        _started.discard(self)

    def _turn(self) -> None:
        if not self.runner.requests:
            self._posted.get()()
        self._call_posted()
        if self.runner.requests and not self._reason:
            self.runner.step()

    def _call_posted(self) -> None:
        while True:
            try:
                function = self._posted.get_nowait()
            except Empty:
                return
            function()

    def _step(self) -> None:
        """In an event, whose observer waits."""
        if self._reason:
            self._close()
        self._guarded(self.runner.step)
        self._tell()

    def _abort(self, request: Request) -> None:
        self._guarded(lambda: self.runner.abort(request))

    def _close(self) -> None:
        assert self._reason
        try:
            self.runner.close(self._reason)
        except BaseException as error:
            self._close_error = error
            self._fail(error)

    def _guarded(self, function: Callable[[], object]) -> None:
        """Call a function; if it raises, all requests end with the error."""
        try:
            function()
        except BaseException as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """End all requests; those that an observer adds meanwhile may go on."""
        failed = self.runner.requests.keys() | set()
        while failed & self.runner.requests.keys():
            try:
                self.runner.fail(error)
            except BaseException as another:  # of an observer
                error = another

    def _tell(self) -> None:
        for request in self.runner.poll():
            if request.on_news:
                try:
                    request.on_news(request)
                except BaseException:  # nobody can be told, so nobody wants it
                    request.on_news = None
                    self._abort(request)


def _close_started() -> None:
    """Free devices before the interpreter ends; daemon threads would be stopped anywhere."""
    for thread in tuple(_started):
        thread.close(RequestError("the process ended before this request had finished"))


if hasattr(os, "register_at_fork"):  # the threads do not run in the child
    os.register_at_fork(after_in_child=_started.clear)
