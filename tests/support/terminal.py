"""A command on a terminal of its own."""

import os
import pty
import select
import signal
import subprocess
import sys

TILEWRIGHT = [sys.executable, "-m", "tilewright"]


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, *argv: str):
        self.screen = b""
        self._master, slave = pty.openpty()
        self._process = subprocess.Popen(
            [*TILEWRIGHT, *argv],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            # Tests that run in a shell's background inherit an ignored Ctrl-C.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        os.close(slave)

    def wait_for(self, text: bytes) -> None:
        """Wait for text after that of the previous wait; fails after minutes."""
        start = len(self.screen)
        while text not in self.screen[start:]:
            if not select.select([self._master], [], [], 120)[0]:
                self._process.kill()
                raise TimeoutError(f"{text!r} does not come; the screen: {self.screen!r}")
            self.screen += os.read(self._master, 1)

    def type(self, text: bytes) -> None:
        os.write(self._master, text)

    def interrupt(self) -> None:
        self._process.send_signal(signal.SIGINT)

    def end(self) -> int:
        """Read all remaining output, and return the exit code."""
        try:
            while data := os.read(self._master, 4096):
                self.screen += data
        except OSError:  # Linux reports the end of a terminal as an error
            pass
        os.close(self._master)
        return self._process.wait(timeout=60)
