"""Process state that a plugin must leave unchanged."""

import locale
import logging
import os
import random
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any


def global_state() -> dict[str, Any]:
    """Settings of this process, keyed by name, for comparison: Python's, and those of numpy and
    torch where they are imported."""
    state: dict[str, Any] = {
        "Python's random state": random.getstate(),
        "the working directory": os.getcwd(),
        "the environment": dict(os.environ),
        "signal handlers": {s: signal.getsignal(s) for s in signal.valid_signals()},
        "the locale": locale.setlocale(locale.LC_ALL),
        "the root logger": (logging.root.level, list(logging.root.handlers)),
        "the exception hook": sys.excepthook,
        "standard output": (sys.stdout, sys.stderr),
        "running threads": {t for t in threading.enumerate() if not t.daemon},
    }
    if "numpy" in sys.modules:
        import numpy

        state["numpy's random state"] = repr(numpy.random.get_state())
    if "torch" in sys.modules:
        import torch

        # A new thread shows what another thread has set: this one goes on as it was.
        with ThreadPoolExecutor(1) as pool:
            in_new_thread = pool.submit(torch.get_num_threads)
        state |= {
            "torch's default dtype": torch.get_default_dtype(),
            "torch's default device": str(torch.get_default_device()),
            "torch's number of threads": (torch.get_num_threads(), in_new_thread.result()),
            "torch's gradient mode": torch.is_grad_enabled(),
            "torch's deterministic mode": torch.are_deterministic_algorithms_enabled(),
            "torch's float32 matmul precision": torch.get_float32_matmul_precision(),
            "torch's random state": torch.get_rng_state().numpy().tobytes(),
        }
    return state


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What changed, in words; for environment variables, only the names."""
    changed = [name for name in before if before[name] != after[name]]
    if "the environment" in changed:
        old, new = before["the environment"], after["the environment"]
        names = sorted(n for n in {*old, *new} if old.get(n) != new.get(n))
        changed[changed.index("the environment")] = f"environment variables {', '.join(names)}"
    return changed


@contextmanager
def left_alone(what: str) -> Iterator[None]:
    """Fail the test if the block changes the process's state; what names the block in the
    message."""
    before = global_state()
    yield
    changed = differences(before, global_state())
    assert not changed, (
        f"{what} must not change the process's state, but changed {'; '.join(changed)}"
    )
