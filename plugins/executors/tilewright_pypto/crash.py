"""The line that says what was running when the process died outside of Python."""

import mmap
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryFile

SIZE = 4096
"""Bytes of the longest line."""
PRINTER = 'read -r _; read -r line <&1; [ -z "$line" ] || printf "%s\\n" "$line" >&2'


class CrashNote:
    """Prints a line to standard error if the process dies while ``noting`` it.

    A runtime that crashes (SIGSEGV, abort) or is killed leaves Python no chance to report where.
    Therefore a shell waits for the process to end, on a pipe that closes with it, and prints the
    first line of a file that both have open. The process maps the file: a note is a memory write.

    Raises OSError when no file or no process can be created.
    """

    def __init__(self) -> None:
        with TemporaryFile() as file:
            file.write(b"\n" * SIZE)
            file.seek(0)
            self._memory = mmap.mmap(file.fileno(), SIZE)
            self._shell = subprocess.Popen(
                ["/bin/sh", "-c", PRINTER],
                stdin=subprocess.PIPE,
                stdout=file,  # the shell reads the note from fd 1: sh redirects only fds 0 to 9
                start_new_session=True,  # a keypress that interrupts the process spares the shell
            )

    @contextmanager
    def noting(self, line: str) -> Iterator[None]:
        note = f"tilewright: {line}".encode(errors="replace")[: SIZE - 1] + b"\n"
        self._memory[: len(note)] = note
        try:
            yield
        finally:
            self._memory[0] = ord("\n")

    def close(self) -> None:
        # A newline ends the shell's wait, also where a forked child holds the pipe open.
        self._shell.communicate(b"\n")
        self._memory.close()
