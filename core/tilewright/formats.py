"""The installed weight formats, as a loader sees them."""

from pathlib import Path

from pluggy import PluginManager

from tilewright import plugins
from tilewright.errors import ModelError
from tilewright.plugins import Options, claimants, select
from tilewright.types import TensorSource

PREFERRED = "safetensors"
"""Asked first when no format is named: many directories hold a second copy in another format."""


class InstalledFormats:
    """A ``WeightFormats`` (see tilewright.types) over the installed plugins.

    A named format is the only one imported. With none named, the preferred one is asked first, and
    the others only when it finds nothing.
    """

    def __init__(self, manager: PluginManager, options: Options):
        """options: the engine's options; only its ``weight_format`` entry is used here."""
        self._manager = manager
        self._options = options

    def open(self, directory: Path, name: str | None = None) -> TensorSource:
        chosen = select(self._manager, "weight_format", name or self._detect(directory))
        source: TensorSource = chosen.call(
            "open_weights", directory=directory, options=chosen.read_options(self._options)
        )
        return source

    def _detect(self, directory: Path) -> str:
        installed = plugins.installed("weight_format")
        preferred = [p for p in installed if p.name == PREFERRED]
        others = [p for p in installed if p.name != PREFERRED]
        unusable: dict[plugins.Plugin, str] = {}
        for group in (preferred, others):
            claims, broken = claimants(group, "can_open", directory=directory)
            unusable |= broken
            if len(claims) == 1:
                return claims[0].qualified
            if claims:
                names = ", ".join(p.qualified for p in claims)
                raise ModelError(
                    f"{directory}: more than one weight format finds files: {names}; "
                    "name one as model_format"
                )
        tried = ", ".join(p.name for p in installed) or "none installed"
        also = f"; not asked: {'; '.join(unusable.values())}" if unusable else ""
        raise ModelError(
            f"{directory}: no weights found in any known format ({tried}){also}; is the download "
            "complete?"
        )
