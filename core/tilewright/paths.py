"""The user's home directory, which a process may not have, and the paths that begin with it."""

import os
import stat
from pathlib import Path

from tilewright.errors import ConfigError


def expanded(path: str) -> str:
    """The path with a leading ``~`` or ``~user`` replaced by that home directory.

    The path as it is where the system knows no such home: a container may run as a user without
    HOME and without a passwd entry.
    """
    return os.path.expanduser(path)


def path_of(path: str | Path, folder: Path = Path()) -> Path:
    """The path that a user wrote, relative to a folder. Raises ConfigError for an unknown home.

    A file of that very name, such as ``~x`` in the folder, is taken as it is.
    """
    found = expanded(str(path))
    if found.startswith("~") and not os.path.lexists(folder / found):
        user = Path(found).parts[0][1:]
        why = (
            f"there is no user {user!r}: write the whole path"
            if user
            else f"{no_home()}: set HOME, or write the whole path"
        )
        raise ConfigError(f"{str(path)!r}: {why}")
    return folder / found


def home() -> Path | None:
    """The user's home directory, which may not exist or not be writable; None if not known."""
    found = expanded("~")
    return None if found == "~" else Path(found)


def no_home() -> str:
    """Why the home directory is not known, for a message."""
    return (
        f"the home directory is not known, since HOME is not set and user id {os.getuid()} has no "
        "passwd entry"
    )


def cache_folder(*parts: str) -> tuple[Path, str]:
    """A folder for files that can be made again, and a note for the user.

    It is below $XDG_CACHE_HOME or ``~/.cache``. Where the latter cannot be written, it is in the
    temporary directory, and only this user can write it; the note, otherwise empty, says so. The
    last folders may not exist yet.
    """
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given, *parts), ""
    at = home()
    if at is None:
        why = "the home directory is not known"
    else:
        folder = at.joinpath(".cache", *parts)
        existing = next(place for place in (folder, *folder.parents) if os.path.exists(place))
        if os.path.isdir(existing) and os.access(existing, os.W_OK | os.X_OK):
            return folder, ""
        why = f"{folder} cannot be written"
    folder = _own_temporary().joinpath(*parts)
    return folder, f"{why}: {folder} is used instead"


def _own_temporary() -> Path:
    """A folder for this user in the temporary directory; a new one if another user made it."""
    import tempfile

    folder = Path(tempfile.gettempdir()) / f"tilewright-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        found = folder.lstat()
        own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
        if not own or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return Path(tempfile.mkdtemp(prefix=f"{folder.name}-"))
    return folder
