"""A set of device kernels, as data: the models that it serves, its sources, and its sizes."""

from collections.abc import Mapping
from pathlib import Path

from attrs import frozen

from tilewright.types.executor import Tiles
from tilewright.types.model import RopeKind


@frozen(kw_only=True)
class ServedModels:
    """The models that a kernel set serves, in the terms of ModelConfig.

    Each field lists the values that are served; all others are refused before the set is asked for
    its kernels. The set itself refuses sizes that its tiles do not support.
    """

    qk_norm: tuple[bool, ...] = (False,)
    qkv_bias: tuple[bool, ...] = (False,)
    output_bias: tuple[bool, ...] = (False,)
    mlp_bias: tuple[bool, ...] = (False,)
    sliding_windows: tuple[bool, ...] = (False,)
    """Whether some layers have a window: (False, True) serves models with and without."""
    rope_kinds: tuple[RopeKind, ...] = ("default", "linear", "llama3", "yarn")


@frozen(kw_only=True, eq=False)
class KernelSet:
    """The kernels of a set, made for one model and for how this machine runs it."""

    sources: Mapping[str, Path]
    """Source files by module name. A kernel is a function with the name of its module; modules
    import names from each other, and constants from ``.constants``."""
    constants: Mapping[str, Mapping[str, int | float]]
    """For each kernel, by name, what ``.constants`` holds for it and what it imports."""
    page_size: int
    """Tokens per page of the KV cache."""
    max_batch_size: int
    """Maximum sequences per step that the kernels are compiled for."""
    max_batch_tokens: int
    """Maximum tokens per step that the kernels are compiled for."""
    tiles: Tiles
    mixed: bool = False
    """Whether prompts and decoding sequences may be in one step."""
    fused_exact: bool = False
    """Whether whole-model programs compute the same bits as the layer kernels of the set."""
