"""Chooses an installed loader for a model's source when none is named."""

import os

from pluggy import PluginManager

from tilewright import plugins
from tilewright.errors import ConfigError, ModelError, nearest
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
            f"{_shown(source)} is claimed by the loaders {names}{also}; name one of them, "
            "with --loader or in Python as loader"
        )
    asked = ", ".join(p.name for p in installed if p not in unusable) or "none"
    raise ModelError(f"{_found(source)} (loaders asked: {asked}){also}")


def _found(source: str) -> str:
    """A message: what was found at a source that no loader accepts, and what to do."""
    path = os.path.expanduser(source)
    try:
        os.stat(path)
        names = sorted(os.listdir(path)) if os.path.isdir(path) else None
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        return (
            f"no model directory or file {_shown(source)}: {why}; no loader takes it as a name"
            f"{_nearest_name(source)}"
        )
    if names is None:
        found = "a file"
    else:
        some = ", ".join(ascii(name) for name in names[:5])
        more = " and more" if len(names) > 5 else ""
        found = f"a directory with {some}{more}" if names else "an empty directory"
    return (
        f"no loader takes {_shown(source)}, {found}; name a loader, with --loader or in Python as "
        "loader, and it says what it lacks"
    )


def _nearest_name(source: str) -> str:
    from tilewright.models import is_name, registered

    if not is_name(source):
        return ""
    try:
        return f", nor does a models file have it{nearest(source, registered())}"
    except ConfigError:  # it may concern another model
        return ""


def _shown(source: str) -> str:
    return repr(source if len(source) <= 200 else f"{source[:197]}...")
