"""What a plugin says about itself, and what its hooks are called with."""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

from attrs import field, frozen

from tilewright.types.model import DTYPES, ModelConfig, TensorSource

Report: TypeAlias = Callable[[str, int, int], None]
"""Called with what is being prepared, how much of it is done, and the total."""
Hypothesis: TypeAlias = Callable[..., Iterable[tuple[str, Any]]]
"""Yields hypotheses about a wrong layer: a name, and the operations that make that error.

Called with a ``tilewright_compare.layer.Case``; the operations are its module's ``Operations``.
"""


@frozen(kw_only=True)
class PluginInfo:
    """How a plugin presents itself to ``tilewright plugins show`` and to the options' reader."""

    summary: str
    options: type | None = None
    """An attrs class; each field's ``metadata["help"]`` is its line of help. None: no options."""
    weight_dtypes: tuple[str, ...] = DTYPES
    """Names of the weight dtypes that an executor supports."""
    kv_dtypes: tuple[str, ...] = DTYPES
    """Names of the KV cache dtypes that an executor supports."""
    serves: Callable[[ModelConfig], bool] | None = None
    """Whether an executor runs a model of that configuration, in each dtype that it declares. It
    may also run models for which this is false; None: it states nothing, and may refuse any model.
    The conformance suite fails an executor that refuses a model that it serves."""
    limits: Mapping[str, str] = field(factory=dict)
    """What it can and cannot do, by topic, in words."""
    ignores: tuple[str, ...] = ()
    """The fields of SamplingParams that have no effect on a sampler."""
    distribution: str = ""
    """What a sampler draws tokens from; empty: the softmax of what the settings leave."""


CheckStatus = Literal["ok", "warning", "failed"]


@frozen(kw_only=True)
class Check:
    """One finding of ``tilewright doctor``."""

    name: str
    status: CheckStatus
    found: str
    advice: str = ""
    """What to do about it; empty when there is nothing to do."""


class Command(Protocol):
    """A command of the command line: a module or an object, called directly and not by hooks.

    The first line of its module's docstring is its line in ``tilewright --help``, which reads it
    without importing the module. The module is imported when the command is called, also for the
    command's own ``--help``: it imports torch and the like where it uses them. tilewright.cli.flags
    has the flags that the shipped commands share.
    """

    def configure(self, parser: ArgumentParser) -> None:
        """Add the command's arguments."""
        ...

    def run(self, args: Namespace) -> int:
        """Run the command; returns the exit code. ``args.argv`` has the words as they were typed.

        Raises TilewrightError for a user's mistake, which is printed as one line, with code 2.
        """
        ...


class WeightFormats(Protocol):
    """The installed weight formats, as a loader sees them."""

    def open(self, directory: Path, name: str | None = None) -> TensorSource:
        """Open a directory's weights with the named format, or with the one that finds its files.

        Raises ModelError when none or more than one does; PluginError for an unknown name.
        """
        ...
