"""The installed weight formats, as a loader sees them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pluggy import PluginManager

from tilewright import registry
from tilewright.errors import ModelError, PluginError
from tilewright.options import read_options
from tilewright.types import TensorSource

PREFERRED = "safetensors"
"""Asked first when no format is named: many directories hold a second copy in another format."""


class InstalledFormats:
    """A ``WeightFormats`` (see tilewright.types) over the registry.

    A named format is the only one imported. With none named, the preferred one is asked first, and
    the others only when it finds nothing.
    """

    def __init__(self, manager: PluginManager, options: Mapping[str, Mapping[str, Any]]):
        """options: those of the formats, by name."""
        self._manager = manager
        self._options = options

    def open(self, directory: Path, name: str | None = None) -> TensorSource:
        return self._open(name or self._detect(directory), directory)

    def _open(self, name: str, directory: Path) -> TensorSource:
        plugin = registry.register(self._manager, "weight_format", name)
        options = read_options(
            f"weight format {name!r}", registry.info(plugin), self._options.get(name, {})
        )
        source: TensorSource = registry.call(
            plugin, "open_weights", directory=directory, options=options
        )
        return source

    def _detect(self, directory: Path) -> str:
        installed = registry.installed("weight_format")
        preferred = [p for p in installed if p.name == PREFERRED]
        others = [p for p in installed if p.name != PREFERRED]
        unusable = []
        for group in (preferred, others):
            claims = []
            for plugin in group:
                try:
                    if registry.call(registry.load(plugin), "can_open", directory=directory):
                        claims.append(plugin.qualified)
                except PluginError as error:
                    unusable.append(str(error))
            if len(claims) == 1:
                return claims[0]
            if claims:
                raise ModelError(
                    f"{directory}: more than one weight format finds files: {', '.join(claims)}; "
                    "name one as model_format"
                )
        tried = ", ".join(p.name for p in installed) or "none installed"
        also = f"; not asked: {'; '.join(unusable)}" if unusable else ""
        raise ModelError(
            f"{directory}: no weights found in any known format ({tried}){also}; is the download "
            "complete?"
        )
