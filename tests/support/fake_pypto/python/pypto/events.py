"""Logs events where tests can read them, and fails where tests request it."""

import json
import os
import signal
import time

SIGNALS = ("SIGSEGV", "SIGABRT", "SIGKILL")


def note(what):
    file = os.environ.get("FAKE_PYPTO_LOG")
    if file:
        with open(file, "a") as log:
            log.write(f"{what}\n")


def at(place):
    """Log an event, then fail or wait as the test has set."""
    note(place)
    plan = json.loads(os.environ.get("FAKE_PYPTO", "{}")).get(place)
    if plan in SIGNALS:
        signal.raise_signal(getattr(signal, plan))
    if isinstance(plan, str):
        raise RuntimeError(plan)
    if plan is not None:
        time.sleep(plan)
