"""Cache of compiled kernels on disk: one process compiles a kernel, later ones load it.

A kernel has a folder for each key that it was compiled with, and is compiled in place, because
PyPTO's output contains absolute paths. A stamp is written last: a folder without one is not used.
A lock file beside the folder admits one process at a time, and is released when the process ends.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from tilewright.errors import ExecutorError, PluginWarning
from tilewright.paths import cache_folder

T = TypeVar("T")

STAMP = "tilewright.json"


def default_folder() -> Path:
    """``tilewright/pypto`` in the user's cache, with a PluginWarning for a temporary folder."""
    folder, note = cache_folder("tilewright", "pypto")
    if note:
        warnings.warn(
            f"{note} for compiled kernels; set build_dir or XDG_CACHE_HOME to a folder that is "
            "kept",
            PluginWarning,
            stacklevel=2,
        )
    return folder


def _unusable(folder: Path, error: OSError) -> ExecutorError:
    why = error.strerror or str(error)
    advice = "free space there" if error.errno == errno.ENOSPC else "make it a writable folder"
    return ExecutorError(
        f"compiled kernels cannot be written to {folder} ({why}): {advice}, or set build_dir to "
        "another folder"
    )


def cached(
    folder: Path,
    name: str,
    key: Mapping[str, str],
    compile: Callable[[Path], T],
    reload: Callable[[Path], T],
    say: Callable[[str], None],
) -> tuple[T, float | None]:
    """The result of ``reload`` for a folder that was compiled before, otherwise of ``compile``.

    name: prefix of the folder's name; the rest depends on the key and the path of ``folder``.
    compile: called with an empty folder. Its exceptions are passed on; the folder stays, and the
        next call rebuilds it.
    reload: if it raises, the folder is damaged and is compiled again.
    say: called with the progress: compiling, loading, waiting for another process.

    Returns the result and the seconds that compiling took, None if this call compiled.
    Raises ExecutorError when the folder is not writable.
    """
    # The files of a folder that was moved contain its old path.
    place = {"folder": str(folder.resolve())}
    digest = hashlib.sha256(json.dumps(dict(key) | place, sort_keys=True).encode()).hexdigest()
    home = folder / f"{name}-{digest[:16]}"
    with _locked(folder / f"{home.name}.lock", name, say):
        seconds = _compiled_in(home)
        if seconds is not None:
            say(f"loading {name}")
            try:
                return reload(home), seconds
            except Exception:
                say(f"{name} was damaged")
        started = time.perf_counter()
        try:
            _empty(home)
        except OSError as error:
            raise _unusable(folder, error) from error
        say(f"compiling {name}")
        made = compile(home)
        try:
            _write_stamp(home, key, time.perf_counter() - started)
        except OSError as error:
            raise _unusable(folder, error) from error
        return made, None


@contextmanager
def _locked(file: Path, name: str, say: Callable[[str], None]) -> Iterator[None]:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise _unusable(file.parent, error) from error
    try:
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"waiting for another process that compiles {name}")
                fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:  # a file system without locks
            raise _unusable(file.parent, error) from error
        yield
    finally:
        os.close(lock)


def _compiled_in(home: Path) -> float | None:
    """How many seconds compiling took; None if the folder is not complete."""
    try:
        return float(json.loads((home / STAMP).read_text())["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _empty(home: Path) -> None:
    # The stamp goes first: a partly deleted folder must not pass for complete.
    (home / STAMP).unlink(missing_ok=True)
    if home.exists():
        shutil.rmtree(home)
    home.mkdir()


def _write_stamp(home: Path, key: Mapping[str, str], seconds: float) -> None:
    date = datetime.now(UTC).isoformat(timespec="seconds")
    stamp = {"seconds": round(seconds, 3), "date": date, "key": dict(key)}
    unfinished = home / f"{STAMP}.part"
    unfinished.write_text(json.dumps(stamp, indent=1) + "\n")
    unfinished.replace(home / STAMP)
