"""Checks of a kernel set that need no torch and no model, for ``tilewright plugins``."""

from collections.abc import Iterator
from typing import Any

from tilewright.errors import ExecutorError
from tilewright.types import KernelSet, ModelConfig, RopeConfig, RuntimeConfig, ServedModels
from tilewright_kernels import source
from tilewright_kernels.contract import parsed
from tilewright_kernels.names import check_file
from tilewright_pypto.binding import contracts
from tilewright_pypto.kernels import made, stated

_RUNTIME = RuntimeConfig(
    weight_dtype="bfloat16",
    kv_dtype="bfloat16",
    max_seq_len=256,
    max_batch_size=16,
    max_batch_tokens=128,
)
_SIZES: tuple[dict[str, Any], ...] = (
    {"num_heads": 4, "num_kv_heads": 2, "hidden_size": 256, "intermediate_size": 512},
    {"num_heads": 40, "num_kv_heads": 8, "hidden_size": 5120, "intermediate_size": 17408},
)
"""Sizes of models that a set may serve, all with heads of 128."""


def inspected(plugin: Any, who: str) -> tuple[KernelSet | None, str]:
    """The kernels that a set makes for one of a few models, or None and why it refuses them all.

    plugin: the module or object with the set's hooks. who: the set in words. Raises PluginError for
    hooks that fail, and ExecutorError for a source that cannot be read or parsed or is missing, for
    a name that PyPTO would confuse, and for a kernel that the executor cannot bind.
    """
    why = ""
    for config in _models(stated(plugin, who)):
        try:
            kernels = made(plugin, who, config, _RUNTIME)
        except ExecutorError as refused:
            why = why or str(refused)
            continue
        _check_sources(kernels, who)
        contracts(kernels, config, who)
        return kernels, ""
    return None, why


def _check_sources(kernels: KernelSet, who: str) -> None:
    try:
        for file in kernels.sources.values():
            parsed(file)
            check_file(file)
        for kernel in kernels.sources.keys() & kernels.constants.keys():
            source.modules(kernel, kernels)
    except ExecutorError as error:
        raise ExecutorError(f"{who}: {error}") from error


def _models(served: ServedModels) -> Iterator[ModelConfig]:
    """Models of two layers, of the first family that a set states."""
    rope = served.rope_kinds[0]
    scaled: dict[str, Any] = (
        {} if rope == "default" else {"factor": 4.0, "original_max_position": 64}
    )
    for sizes in _SIZES:
        yield ModelConfig(
            architecture="AnyForCausalLM",
            vocab_size=512,
            num_layers=2,
            head_dim=128,
            norm_eps=1e-6,
            rope=RopeConfig(kind=rope, **scaled),
            max_position_embeddings=256,
            dtype="bfloat16",
            qk_norm=served.qk_norm[0],
            qkv_bias=served.qkv_bias[0],
            output_bias=served.output_bias[0],
            mlp_bias=served.mlp_bias[0],
            sliding_windows=(64, None) if served.sliding_windows[0] else (),
            **sizes,
        )
