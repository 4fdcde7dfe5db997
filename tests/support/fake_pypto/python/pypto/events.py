"""What happens, written down where tests see it, and going wrong where they want it to."""

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
    """Note that it came to this, then fail or dawdle as the test has it."""
    note(place)
    plan = json.loads(os.environ.get("FAKE_PYPTO", "{}")).get(place)
    if plan in SIGNALS:
        os.kill(os.getpid(), getattr(signal, plan))
    if isinstance(plan, str):
        raise RuntimeError(plan)
    if plan is not None:
        time.sleep(plan)
