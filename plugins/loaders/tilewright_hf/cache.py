"""Folders of the Hugging Face hub's cache, which a user may give in place of a snapshot."""

import os
import re
from pathlib import Path

from tilewright.errors import ModelError, listed
from tilewright_hf.files import read_text

_FOLDER = re.compile(r"models--(?P<organisation>[\w.-]+?)--(?P<name>[\w.-]+)", re.ASCII)

_COMMIT = re.compile(r"\w[\w.-]*", re.ASCII)


def is_folder(directory: Path) -> bool:
    """Whether this is a repository's folder ``models--ORGANISATION--NAME`` in a cache."""
    try:
        parts = ("snapshots", "refs", "blobs")
        named = _FOLDER.fullmatch(directory.name)
        return bool(named) and any((directory / part).is_dir() for part in parts)
    except (OSError, ValueError):
        return False


def snapshot(folder: Path) -> Path:
    """The snapshot that ``refs/main`` names, else the only one.

    Raises ModelError when there is none, or more than one.
    """
    try:
        named = read_text(folder / "refs" / "main").strip()
        main = folder / "snapshots" / named
        if _COMMIT.fullmatch(named) and main.is_dir():
            return main
    except (ModelError, OSError):
        pass  # the name of no folder
    found = sorted(path for path in folder.glob("snapshots/*") if path.is_dir())
    if len(found) == 1:
        return found[0]
    if found:
        raise ModelError(
            f"{folder}: a folder of the hub's cache with {len(found)} snapshots, none of which is "
            f"that of refs/main: give one of {listed([str(path) for path in found])}"
        )
    raise incomplete(folder)


def incomplete(folder: Path) -> ModelError:
    """The error for a folder without a snapshot that can be loaded."""
    named = _FOLDER.fullmatch(folder.name)
    name = f"{named['organisation']}/{named['name']}" if named else folder.name
    return ModelError(
        f"{folder}: a folder of the hub's cache without a complete snapshot: expected "
        f"{os.path.join('snapshots', 'COMMIT', 'config.json')}; download it with "
        f"`hf download {name}`"
    )
