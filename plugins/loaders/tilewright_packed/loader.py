"""Loader ``packed``: a directory that ``tilewright convert`` wrote (see ``format``)."""

import os

from attrs import field, frozen

from tilewright import hookimpl
from tilewright.errors import ModelError
from tilewright.paths import expanded, path_of
from tilewright.types import (
    LoadedModel,
    PluginInfo,
    WeightFormats,
)
from tilewright_packed.format import MANIFEST, is_packed, load

tilewright_api = 2


@frozen
class Options:
    verify: bool = field(
        default=False,
        metadata={
            "help": "read all weights and verify their checksums, as `tilewright verify` does; "
            "by default everything except the tensors' data is verified"
        },
    )


@hookimpl
def plugin_info() -> PluginInfo:
    return PluginInfo(
        summary="a model that `tilewright convert` wrote for one executor",
        options=Options,
        limits={
            "executor": "only the one that it was converted for, with the same layout version",
            "weight dtype": "only the one that it was converted to",
        },
    )


@hookimpl
def can_load(source: str) -> bool:
    return is_packed(expanded(source))


@hookimpl
def load_model(
    source: str, options: "Options | None", weight_format: str | None, formats: WeightFormats
) -> LoadedModel:
    """Check the files and map the weights."""
    directory = path_of(source)
    if not is_packed(directory):
        found = " is not a packed model" if os.path.lexists(directory) else ": no such directory"
        raise ModelError(
            f"{source[:200]!r}{found}: expected a directory with {MANIFEST}, which `tilewright "
            "convert` writes"
        )
    return load(directory, formats, weight_format, (options or Options()).verify)
