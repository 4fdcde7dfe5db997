"""Observer ``chrome-trace``: a timeline of loading, steps and requests.

The file is in Chrome's trace event format, which chrome://tracing and https://ui.perfetto.dev show.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from time import perf_counter
from typing import Any

from attrs import field, frozen, validators

from tilewright import hookimpl
from tilewright.types import GenerateResult, PluginInfo, StepEvent

tilewright_api = 2

THREADS = ("load", "requests", "steps")
"""Threads of each process; a process is a model."""


@frozen
class Options:
    path: str = field(
        default="trace.json",
        validator=validators.min_len(1),
        metadata={"help": "file to write when the engine closes; an existing one is replaced"},
    )


@hookimpl
def plugin_info() -> PluginInfo:
    return PluginInfo(
        summary="a timeline of loading, steps and requests, for chrome://tracing",
        options=Options,
        limits={"memory": "about 300 bytes per step, until the engine closes"},
    )


@hookimpl
def create_observer(options: Options) -> "ChromeTrace":
    return ChromeTrace(Path(options.path))


class ChromeTrace:
    """An engine's timeline: a process of the trace is a model, a thread of it a kind of event.

    clock: seconds, counted from anywhere.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = perf_counter):
        self._path = path
        self._clock = clock
        self._start = clock()
        self._models: list[str] = []
        self._lock = Lock()
        """Held while a model is added: each has a thread that makes its events."""
        self._events: list[dict[str, Any]] = []

    @hookimpl
    def on_model_loaded(self, model_id: str, seconds: float) -> None:
        self._ended(model_id, "load", "load", seconds, {})

    @hookimpl
    def on_step(self, event: StepEvent) -> None:
        about = {
            "step": event.step,
            "tokens": event.num_tokens,
            "requests": list(event.request_ids),
        }
        self._ended(event.model_id, "steps", event.phase, event.seconds, about)

    @hookimpl
    def on_request_finished(self, result: GenerateResult) -> None:
        timings = result.timings
        about = {
            "request": result.request_id,
            "prompt tokens": timings.prompt_tokens,
            "new tokens": timings.new_tokens,
            "finish reason": result.finish_reason,
        }
        seconds = timings.prefill_seconds + timings.decode_seconds
        self._ended(result.model_id, "requests", result.request_id, seconds, about)

    @hookimpl
    def on_close(self) -> None:
        named = []
        for pid, model in enumerate(self._models):
            named.append(_name("process_name", model, pid, 0))
            named += [_name("thread_name", name, pid, tid) for tid, name in enumerate(THREADS)]
        trace = {"traceEvents": named + self._events, "displayTimeUnit": "ms"}
        # Written under another name and renamed, so that the file is never half-written.
        beside = self._path.with_name(f"{self._path.name}.{os.getpid()}.partial")
        try:
            beside.write_text(json.dumps(trace), encoding="utf-8")
            beside.replace(self._path)
        finally:
            beside.unlink(missing_ok=True)

    def _ended(
        self, model_id: str, thread: str, name: str, seconds: float, about: dict[str, Any]
    ) -> None:
        """Something that took some seconds has just ended. Times in the file are microseconds."""
        with self._lock:
            if model_id not in self._models:
                self._models.append(model_id)
        end = self._clock() - self._start
        self._events.append(
            {
                "ph": "X",
                "name": name,
                "cat": thread,
                "pid": self._models.index(model_id),
                "tid": THREADS.index(thread),
                "ts": round(1e6 * max(0.0, end - seconds), 3),
                "dur": round(1e6 * seconds, 3),
                "args": about,
            }
        )


def _name(what: str, name: str, pid: int, tid: int) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": {"name": name}}
