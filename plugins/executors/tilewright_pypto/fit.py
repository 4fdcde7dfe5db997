"""Checks whether the kernels can run a model as configured, before any weight is read."""

from collections.abc import Iterator

from attrs import evolve

from tilewright.errors import ExecutorError
from tilewright.types import ModelConfig, RuntimeConfig, Tiles
from tilewright_kernels.qwen3_14b.shape import LayerShape

PAGE_SIZE = 128
"""Default number of tokens per page of the KV cache: the keys of attention's widest tile."""

SMALL_PAGE = 48
"""A page of three of attention's tiles, which are 16 keys in pages of this size."""

OTHERWISE = "choose executor torch for this model"
_ADVICE = (
    ("page_size", f"set page_size to a multiple of 16, such as {PAGE_SIZE}"),
    ("scratch", "lower max_batch_tokens or max_batch_size"),
)


def layer_shape(config: ModelConfig, runtime: RuntimeConfig) -> LayerShape:
    """The shape to compile the kernels for.

    Raises ExecutorError with what the kernels expect, what was found, and what to do.
    """
    for expected, found, advice in _misfits(config, runtime):
        raise ExecutorError(f"executor pypto-npu {expected}, found {found}: {advice}")
    try:
        return LayerShape(
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            heads=config.num_heads,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            norm_eps=config.norm_eps,
            page_size=runtime.page_size or PAGE_SIZE,
            max_batch=runtime.max_batch_size,
            max_tokens=max(runtime.max_batch_tokens, runtime.max_batch_size),
        )
    except ValueError as error:
        advice = next((a for words, a in _ADVICE if words in str(error)), OTHERWISE)
        raise ExecutorError(
            f"executor pypto-npu: {error} ({config.architecture}): {advice}"
        ) from error


def tiles(config: ModelConfig, runtime: RuntimeConfig) -> Tiles:
    """The tiles that the kernels are compiled with. Raises ExecutorError as ``layer_shape``."""
    page_size = runtime.page_size or SMALL_PAGE
    compiled = evolve(runtime, page_size=page_size, weight_dtype="bfloat16", kv_dtype="bfloat16")
    shape = layer_shape(config, compiled)
    return Tiles(
        page_size=page_size,
        prefill_rows=shape.prefill_rows,
        decode_rows=shape.decode_rows,
        kv_rows=shape.kv_tile,
    )


def _misfits(config: ModelConfig, runtime: RuntimeConfig) -> Iterator[tuple[str, str, str]]:
    """Each mismatch: expected, found, advice."""
    name = config.architecture
    if not config.qk_norm:
        yield (
            "runs dense Qwen3 models, which have a norm for each query and key head",
            f"{name} without such norms",
            OTHERWISE,
        )
    for field in ("qkv_bias", "output_bias", "mlp_bias"):
        if getattr(config, field):
            yield "has kernels without biases", f"{field} in {name}", OTHERWISE
    if any(window is not None for window in config.sliding_windows):
        yield "has kernels for full attention", f"sliding windows in {name}", OTHERWISE
    if config.rope.kind == "dynamic":
        yield "reads RoPE from a table", f"dynamic RoPE in {name}", OTHERWISE
    for field in ("weight_dtype", "kv_dtype"):
        dtype = getattr(runtime, field)
        if dtype != "bfloat16":
            yield "has kernels in bfloat16", f"{field} = {dtype}", f"set {field} = 'bfloat16'"
