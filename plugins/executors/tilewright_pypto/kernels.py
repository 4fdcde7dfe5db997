"""Finds the kernel set that the user names, and has it made for a model."""

from collections.abc import Iterator
from contextlib import suppress
from typing import TypeVar

from tilewright import plugins
from tilewright.errors import ExecutorError, PluginError, TilewrightError
from tilewright.types import KernelSet, ModelConfig, RuntimeConfig, ServedModels

T = TypeVar("T")

DEFAULT = "qwen3"
"""Name of the kernel set that is used if none is named."""

TORCH = "choose executor torch for this model"
_ADVICE = (
    ("page_size", "set page_size to a multiple of 16, such as 128"),
    ("scratch", "lower max_batch_tokens or max_batch_size"),
)


def served(name: str) -> ServedModels:
    """The models that an installed set serves. Raises PluginError."""
    plugin = plugins.find("kernels", name)
    return _called(plugin, "served_models", ServedModels)


def kernel_set(name: str, config: ModelConfig, runtime: RuntimeConfig) -> KernelSet:
    """The kernels of an installed set for a model, before any weight is read.

    Raises PluginError for a set that is not installed or is broken, and ExecutorError for a model
    or settings that it does not serve, with what it expects, what was found, and what to do.
    """
    plugin = plugins.find("kernels", name)
    models = _called(plugin, "served_models", ServedModels)
    for expected, found, advice in misfits(models, config, runtime):
        raise ExecutorError(f"{plugin} {expected}, found {found}: {advice}")
    try:
        return _called(plugin, "kernel_set", KernelSet, model_config=config, runtime_config=runtime)
    except ValueError as error:
        advice = next((a for words, a in _ADVICE if words in str(error)), TORCH)
        raise ExecutorError(f"{plugin}: {error} ({config.architecture}): {advice}") from error


def described(name: str) -> str:
    """An installed set in words."""
    return str(plugins.find("kernels", name))


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
        with suppress(TilewrightError, ValueError):
            if serves(_called(plugin, "served_models", ServedModels), config):
                fitting.append(f"kernels={plugin.qualified}")
    return f"choose {' or '.join(fitting)}" if fitting else TORCH


def _called(plugin: plugins.Plugin, hook: str, kind: type[T], **arguments: object) -> T:
    """A plugin's answer to a hook. Raises PluginError for anything but a ``kind``, and passes on
    ValueError, with which the set refuses sizes."""
    loaded = plugins.load(plugin)
    try:
        made = plugins.call(loaded, hook, **arguments)
    except (TilewrightError, ValueError, MemoryError):
        raise
    except Exception as error:
        raise PluginError(f"{plugin}: {hook}() failed: {plugins.cause(error)}") from error
    if not isinstance(made, kind):
        raise PluginError(f"{plugin}: {hook}() must return a {kind.__name__}, found {made!r}")
    return made
