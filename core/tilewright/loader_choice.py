"""Which loader reads a source, and for a source that none reads, what it is and what to do."""

import os
from collections.abc import Sequence
from pathlib import Path

from pluggy import PluginManager

from tilewright import plugins
from tilewright.directories import other_layout, without_configuration
from tilewright.errors import ConfigError, ModelError, listed, nearest
from tilewright.paths import path_of
from tilewright.plugins import Selected, claimants, select


def choose_loader(manager: PluginManager, source: str) -> Selected:
    """The one installed loader whose ``can_load`` returns true.

    Imports all of them. Raises ModelError, which lists those that could not be asked, when none or
    more than one claims the source.
    """
    installed = plugins.installed("loader")
    claims, unusable = claimants(installed, "can_load", source=source)
    if len(claims) == 1:
        return select(manager, "loader", claims[0].qualified)
    also = f"; not asked: {'; '.join(unusable.values())}" if unusable else ""
    if claims:
        names = " and ".join(p.qualified for p in claims)
        raise ModelError(
            f"{_shown(source)} is claimed by the loaders {names}{also}; select one with --loader "
            "(in Python: loader=...)"
        )
    asked = ", ".join(p.name for p in installed if p not in unusable) or "none"
    path = path_of(source)
    if held := _held(installed, path):
        raise ModelError(f"{_shown(source)} holds {held}")
    if os.path.isfile(path) and claimants(installed, "can_load", source=str(path.parent))[0]:
        raise ModelError(
            f"{_shown(source)} is one file of the model in its directory: give the directory, "
            f"{_shown(str(path.parent))}"
        )
    raise ModelError(f"{_found(source)} (loaders asked: {asked}){also}")


def _held(installed: Sequence[plugins.Plugin], directory: Path) -> str | None:
    """What a directory that no loader accepts holds, and what to do, if that is known."""
    try:
        names = sorted(os.listdir(directory))
    except (OSError, ValueError):
        return None
    if held := other_layout(directory, names) or without_configuration(names):
        return held
    models = [
        name
        for name in names[:_MOST_NAMES]
        if claimants(installed, "can_load", source=str(directory / name))[0]
    ]
    if not models:
        return None
    return f"models; give the path of one: {listed([ascii(name) for name in models])}"


_MOST_NAMES = 200
"""Names in a directory of which it is asked whether they are models."""


def _found(source: str) -> str:
    """A message: what was found at a source that no loader accepts, and what to do."""
    scheme, slashes, rest = source.partition("://")
    if slashes:
        cure = (
            f"give the path, {_shown(rest)}"
            if scheme == "file"
            else ("copy the model to a directory, and give its path")
        )
        return f"{_shown(source)}: no loader reads addresses of {scheme}://: {cure}"
    path = path_of(source)
    try:
        os.stat(path)
        names = sorted(os.listdir(path)) if os.path.isdir(path) else None
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        return (
            f"no model directory or file {_shown(source)}: {why}; no loader recognises it as a name"
            f"{_nearest_name(source)}"
        )
    if names is None:
        found = "a file"
    else:
        some = ", ".join(ascii(name) for name in names[:5])
        more = " and more" if len(names) > 5 else ""
        found = f"a directory with {some}{more}" if names else "an empty directory"
    return (
        f"no loader recognises {_shown(source)}, {found}; select a loader with --loader (in "
        "Python: loader=...) to see what is missing"
    )


def _nearest_name(source: str) -> str:
    from tilewright.models import is_name, registered

    if not is_name(source):
        return ""
    try:
        return f", and no models file defines it{nearest(source, registered())}"
    except ConfigError:  # it may concern another model
        return ""


def _shown(source: str) -> str:
    return repr(source if len(source) <= 200 else f"{source[:197]}...")
