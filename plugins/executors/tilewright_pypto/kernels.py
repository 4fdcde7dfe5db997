"""Finds the kernel set that the user names, and has it made for a model."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar, get_args

from attrs import evolve, fields

from tilewright import plugins
from tilewright.errors import ExecutorError, PluginError, TilewrightError
from tilewright.types import (
    KernelSet,
    ModelConfig,
    RopeKind,
    RuntimeConfig,
    ServedModels,
    Tiles,
)
from tilewright.values import shown

T = TypeVar("T")

DEFAULT = "qwen3"
"""Name of the kernel set that is used if none is named."""

SMALL_PAGES = (48, 32, 16, 64, 128)
"""Page sizes for short prompts that reach all of a set's code, best first: a page of 48 tokens has
three tiles of 16 keys."""
ROPE_KINDS = tuple(kind for kind in get_args(RopeKind) if kind != "dynamic")
"""The kinds of RoPE whose tables the executor can make when it loads a model."""

TORCH = "choose executor torch for this model"
_ADVICE = (
    ("page_size", "set another page_size, or none: the set then chooses one"),
    ("scratch", "lower max_batch_tokens or max_batch_size"),
)


def served(name: str) -> ServedModels:
    """The models that an installed set serves. Raises PluginError."""
    plugin = plugins.find("kernels", name)
    return stated(plugins.load(plugin), str(plugin))


def kernel_set(name: str, config: ModelConfig, runtime: RuntimeConfig) -> KernelSet:
    """The kernels of an installed set for a model, before any weight is read. Raises as ``made``,
    and PluginError for a set that is not installed."""
    plugin = plugins.find("kernels", name)
    return made(plugins.load(plugin), str(plugin), config, runtime)


def tiles(name: str, config: ModelConfig, runtime: RuntimeConfig) -> Tiles:
    """The tiles of an installed set's kernels, with a small page size where none is set.

    Raises what ``kernel_set`` raises.
    """
    runtime = evolve(runtime, weight_dtype="bfloat16", kv_dtype="bfloat16")
    for size in SMALL_PAGES if runtime.page_size is None else ():
        with suppress(ExecutorError):
            kernels = kernel_set(name, config, evolve(runtime, page_size=size))
            break
    else:
        kernels = kernel_set(name, config, runtime)
    return evolve(kernels.tiles, page_size=kernels.page_size)


def described(name: str) -> str:
    """An installed set in words."""
    return str(plugins.find("kernels", name))


def stated(plugin: Any, who: str) -> ServedModels:
    """The models that a set serves.

    plugin: the module or object with the set's hooks. who: the set in words. Raises PluginError for
    a hook that fails, and for an answer that is not what the hook specifies.
    """
    models = _called(plugin, who, "served_models", ServedModels)
    for field in fields(ServedModels):
        allowed = ROPE_KINDS if field.name == "rope_kinds" else (False, True)
        values = getattr(models, field.name)
        if not isinstance(values, tuple) or not values or not set(values) <= set(allowed):
            raise PluginError(
                f"{who}: served_models() must give {field.name} as a tuple of some of "
                f"{', '.join(map(str, allowed))}, found {shown(values)}"
            )
    return models


def made(plugin: Any, who: str, config: ModelConfig, runtime: RuntimeConfig) -> KernelSet:
    """The kernels of a set for a model.

    plugin, who: as for ``stated``. Raises PluginError as ``stated`` does, and ExecutorError for a
    model or settings that the set does not serve, with what it expects, what was found, and what to
    do.
    """
    for expected, found, advice in misfits(stated(plugin, who), config, runtime):
        raise ExecutorError(f"{who} {expected}, found {found}: {advice}")
    arguments = {"model_config": config, "runtime_config": runtime}
    try:
        kernels = _called(plugin, who, "kernel_set", KernelSet, ValueError, **arguments)
    except ValueError as error:
        why = " ".join(str(error).split())
        advice = next((a for words, a in _ADVICE if words in why), TORCH)
        raise ExecutorError(f"{who}: {why} ({config.architecture}): {advice}") from error
    for field, expected, right in _requirements(kernels, runtime):
        if not right:
            raise PluginError(
                f"{who}: kernel_set() must give {field} as {expected}, found "
                f"{shown(getattr(kernels, field))}"
            )
    return kernels


def _requirements(kernels: KernelSet, runtime: RuntimeConfig) -> Iterator[tuple[str, str, bool]]:
    """Each field of a set, what it must be, and whether it is."""
    sources, constants = kernels.sources, kernels.constants
    yield (
        "sources",
        "a mapping of module names to paths",
        isinstance(sources, Mapping) and all(isinstance(p, Path) for p in sources.values()),
    )
    yield (
        "constants",
        "a mapping of kernels to mappings of names to numbers",
        isinstance(constants, Mapping)
        and all(
            isinstance(values, Mapping) and all(isinstance(v, int | float) for v in values.values())
            for values in constants.values()
        ),
    )
    for name in ("page_size", "max_batch_size", "max_batch_tokens"):
        size = getattr(kernels, name)
        yield name, "a whole number of at least 1", type(size) is int and size >= 1
    asked = runtime.page_size
    yield (
        "page_size",
        f"the {asked} that was asked for, or raise ValueError",
        asked in (None, kernels.page_size),
    )
    yield "tiles", "Tiles", isinstance(kernels.tiles, Tiles)


def serves(models: ServedModels, config: ModelConfig) -> bool:
    """Whether a set serves a model's family. Sizes are not considered."""
    return next(_family_misfits(models, config), None) is None


def misfits(
    models: ServedModels, config: ModelConfig, runtime: RuntimeConfig
) -> Iterator[tuple[str, str, str]]:
    """Each mismatch: expected, found, advice."""
    for expected, found in _family_misfits(models, config):
        yield expected, found, _other_sets(config)
    for field in ("weight_dtype", "kv_dtype"):
        dtype = getattr(runtime, field)
        if dtype not in (None, "bfloat16"):
            yield "has kernels in bfloat16", f"{field} = {dtype}", f"set {field} = 'bfloat16'"


def _family_misfits(models: ServedModels, config: ModelConfig) -> Iterator[tuple[str, str]]:
    name = config.architecture
    if config.qk_norm not in models.qk_norm:
        expected = "with" if True in models.qk_norm else "without"
        found = "with" if config.qk_norm else "without"
        yield (
            f"serves models {expected} a norm for each query and key head",
            f"{name} {found} such norms",
        )
    for field in ("qkv_bias", "output_bias", "mlp_bias"):
        if (found_bias := getattr(config, field)) not in getattr(models, field):
            expected = "without" if found_bias else "with"
            yield f"serves models {expected} {field}", f"{field} = {found_bias} in {name}"
    windows = any(window is not None for window in config.sliding_windows)
    if windows not in models.sliding_windows:
        yield (
            f"serves models {'without' if windows else 'with'} sliding windows",
            f"{'' if windows else 'no '}sliding windows in {name}",
        )
    if config.rope.kind not in models.rope_kinds:
        yield f"serves RoPE {', '.join(models.rope_kinds)}", f"{config.rope.kind} RoPE in {name}"


def _other_sets(config: ModelConfig) -> str:
    """What to do with a model of a family that a set does not serve."""
    fitting = []
    for plugin in plugins.installed("kernels"):
        with suppress(TilewrightError):
            if serves(stated(plugins.load(plugin), str(plugin)), config):
                fitting.append(f"kernels={plugin.qualified}")
    return f"choose {' or '.join(fitting)}" if fitting else TORCH


def _called(
    plugin: Any,
    who: str,
    hook: str,
    kind: type[T],
    refusal: type[Exception] = TilewrightError,
    **arguments: object,
) -> T:
    """A set's answer to a hook.

    refusal: the error by which the set may refuse, which is passed on. Raises PluginError for any
    other error, and for an answer that is not a ``kind``.
    """
    try:
        answer = plugins.call(plugin, hook, **arguments)
    except PluginError as error:
        raise PluginError(f"{who}: {error}") from error
    except (TilewrightError, MemoryError, refusal):
        raise
    except Exception as error:
        raise PluginError(f"{who}: {hook}() failed: {plugins.cause(error)}") from error
    if not isinstance(answer, kind):
        raise PluginError(f"{who}: {hook}() must return a {kind.__name__}, found {shown(answer)}")
    return answer
