"""Kernel set ``qwen3``: dense Qwen3 decoder layers, one kernel per layer."""

from pathlib import Path

from tilewright import hookimpl
from tilewright.types import (
    KernelSet,
    ModelConfig,
    PluginInfo,
    RuntimeConfig,
    ServedModels,
    Tiles,
)
from tilewright_kernels.qwen3_14b.shape import LayerShape, layer_shape

tilewright_api = 2

SOURCES = {
    name: Path(__file__).with_name(f"{name}.py")
    for name in ("blocks", "prefill_layer", "decode_layer", "head")
}
KERNELS = ("prefill_layer", "decode_layer", "head")


@hookimpl
def plugin_info() -> PluginInfo:
    return PluginInfo(
        summary="Dense Qwen3: one kernel per layer, in BF16 with sums in FP32",
        limits={
            "shapes": "head_dim a multiple of 32; hidden and intermediate size, heads x head_dim "
            "and page size multiples of 16",
            "steps": "prompts or decoding sequences, not both",
        },
    )


@hookimpl
def served_models() -> ServedModels:
    return ServedModels(qk_norm=(True,))


@hookimpl
def kernel_set(model_config: ModelConfig, runtime_config: RuntimeConfig) -> KernelSet:
    return kernels_of(layer_shape(model_config, runtime_config))


def kernels_of(shape: LayerShape) -> KernelSet:
    return KernelSet(
        sources=SOURCES,
        constants={kernel: shape.constants(kernel) for kernel in KERNELS},
        page_size=shape.page_size,
        max_batch_size=shape.max_batch,
        max_batch_tokens=shape.max_tokens,
        tiles=Tiles(
            prefill_rows=shape.prefill_rows,
            decode_rows=shape.decode_rows,
            kv_rows=shape.kv_tile,
            columns=max(shape.vec_tile, shape.n_tile, shape.k_tile),
        ),
    )
