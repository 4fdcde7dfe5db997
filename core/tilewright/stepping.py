"""The thread that runs a model's steps, for callers in any other thread."""

import atexit
import os
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from threading import Lock, Thread, current_thread
from typing import TypeVar

from tilewright.errors import RequestError
from tilewright.request import Request
from tilewright.runner import Runner

T = TypeVar("T")

_started: "set[SteppingThread]" = set()
"""Those whose thread has not ended."""


class SteppingThread:
    """Runs the steps of one runner. Other threads post what they want done between two steps.

    The thread starts when it is first needed, and waits while there is no request. It calls the
    executor, the sampler, logits processors and observers; what these call of the engine's model is
    done at once, in the middle of a step.
    """

    def __init__(self, runner: Runner):
        self.runner = runner
        # SimpleQueue.put may be interrupted by a finaliser that calls it, as close of a stream.
        self._posted: SimpleQueue[Callable[[], object]] = SimpleQueue()
        self._lock = Lock()
        self._thread: Thread | None = None
        self._process = os.getpid()
        self._released = False
        self._reason: RequestError | None = None
        """Why it closes."""
        self._ended = False
        self._close_error: BaseException | None = None

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
        self._post(call)
        return future

    def abort(self, request: Request) -> None:
        """End a request, which was submitted, before the next step; does not wait for it."""
        self._post(lambda: self.runner.abort(request))

    def receive(self, mailbox: "SimpleQueue[T]") -> T:
        """The next item of a mailbox that a request's ``on_news`` fills."""
        while self._is_current() and mailbox.empty():
            self._step()
        return mailbox.get()

    def release(self) -> Runner:
        """Hand the runner to a caller that runs its steps itself, from now on.

        Raises RequestError once a request was submitted.
        """
        with self._lock:
            if self._thread:
                raise RequestError(
                    f"the engine runs the steps of model {self.runner.model.model_id!r} already: "
                    "take its runner before the first request"
                )
            self._released = True
        return self.runner

    def stop(self, reason: RequestError) -> None:
        """End all requests with an error and free the model, when the step that is running has
        ended; does not wait for it."""
        self._reason = self._reason or reason
        with self._lock:
            thread = self._thread
        if thread is None or self._is_current():
            self.runner.close(reason)
        else:
            self._post(lambda: None)  # wakes it

    def close(self, reason: RequestError) -> None:
        """``stop``, and wait until the model is free. Raises what the executor's close raises."""
        self.stop(reason)
        if self._thread and not self._is_current():
            self._thread.join()
            if self._close_error:
                raise self._close_error

    def _is_current(self) -> bool:
        return current_thread() is self._thread

    def _start(self) -> None:
        with self._lock:
            model_id = self.runner.model.model_id
            if self._released:
                raise RequestError(
                    f"the steps of model {model_id!r} are run by the caller that took its runner: "
                    "add the request to that runner"
                )
            if os.getpid() != self._process:
                raise RequestError(
                    f"model {model_id!r} was loaded in process {self._process}, and its thread "
                    f"does not run in process {os.getpid()}: make the engine after the fork"
                )
            if self._thread is None:
                name = f"tilewright {model_id}"
                self._thread = Thread(target=self._run, name=name, daemon=True)
                _started.add(self)
                self._thread.start()

    def _post(self, function: Callable[[], object]) -> None:
        if self._is_current():
            function()
            return
        self._posted.put(function)
        if self._ended:  # nobody else will; the runner is closed
            self._call_posted()

    def _run(self) -> None:
        while not self._reason:
            if not self.runner.requests:
                self._posted.get()()
            self._call_posted()
            if self.runner.requests and not self._reason:
                self._step()
            else:
                self._tell()
        try:
            self.runner.close(self._reason)
        except BaseException as error:
            self._close_error = error
            self._fail(error)
        self._tell()
        self._ended = True
        self._call_posted()
        _started.discard(self)

    def _call_posted(self) -> None:
        while True:
            try:
                function = self._posted.get_nowait()
            except Empty:
                return
            function()

    def _step(self) -> None:
        try:
            self.runner.step()
        except BaseException as error:
            self._fail(error)
        self._tell()

    def _fail(self, error: BaseException) -> None:
        while self.runner.requests:
            try:
                self.runner.fail(error)
            except BaseException as another:  # of an observer
                error = another

    def _tell(self) -> None:
        for request in self.runner.poll():
            if request.on_news:
                request.on_news(request)


@atexit.register
def _close_started() -> None:
    """Free devices before the interpreter ends; daemon threads would be stopped anywhere."""
    for thread in tuple(_started):
        # One that is stopping was waited for already, and the wait was interrupted.
        if thread._reason is None:
            thread.close(RequestError("the process ended before this request had finished"))
