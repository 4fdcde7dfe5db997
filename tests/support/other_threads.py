"""What tests need beside threads that they do not run themselves."""

import signal
import threading
import time
from collections.abc import Callable


def press_ctrl_c() -> None:
    """What a terminal does: Python raises KeyboardInterrupt in the main thread."""
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)


def eventually(condition: Callable[[], object], seconds: float = 30.0) -> None:
    """Wait for what another thread does. Fails when it takes longer than it ever should."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "another thread hangs"
        time.sleep(0.001)
