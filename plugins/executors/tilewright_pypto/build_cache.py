"""Compiled kernels kept on disk: compiled once, by one process, and loaded again by all later.

A kernel has a folder for each key that it was compiled with, and is compiled right there, because
what PyPTO writes holds absolute paths. A stamp is written last: a folder without one is not used.
A lock file beside the folder lets one process at a time in; the system drops it with the process.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from tilewright.errors import ExecutorError

T = TypeVar("T")

STAMP = "tilewright.json"


def default_folder() -> Path:
    """``tilewright/pypto`` in $XDG_CACHE_HOME, or in ~/.cache."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "tilewright" / "pypto"


def _unusable(folder: Path, error: OSError) -> ExecutorError:
    why = error.strerror or str(error)
    advice = "free space there" if error.errno == errno.ENOSPC else "make it a writable folder"
    return ExecutorError(
        f"compiled kernels are kept in {folder}, and that takes no files ({why}): {advice}, or set "
        "build_dir to another"
    )


def cached(
    folder: Path,
    name: str,
    key: Mapping[str, str],
    compile: Callable[[Path], T],
    reload: Callable[[Path], T],
    say: Callable[[str], None],
) -> tuple[T, float | None]:
    """What ``reload`` makes of a folder that was compiled before, else what ``compile`` makes.

    name: begins the folder's name; the key and the place of ``folder`` make the rest.
    compile: given an empty folder. What it raises goes on to the caller; the folder stays, and is
        made anew by the next call.
    reload: where it raises, the folder is damaged, and compiled anew.
    say: told what goes on: compiling, loading, waiting for another process.

    Returns it with the seconds that compiling took, None if this call compiled.
    Raises ExecutorError when the folder takes no files.
    """
    # A folder that was moved has the paths of its old place in its files.
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
    """How long it took to compile what is there; None where nothing whole is."""
    try:
        return float(json.loads((home / STAMP).read_text())["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _empty(home: Path) -> None:
    # The stamp first: a folder that is half gone must not pass for whole.
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
