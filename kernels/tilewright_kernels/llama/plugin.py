"""Kernel set ``llama``: dense decoder layers without q and k norm, on the blocks of ``qwen3``."""

from pathlib import Path

from attrs import evolve

from tilewright import hookimpl
from tilewright.types import KernelSet, ModelConfig, PluginInfo, RuntimeConfig, ServedModels
from tilewright_kernels.qwen3_14b import plugin as qwen3
from tilewright_kernels.qwen3_14b.shape import LayerShape, layer_shape

tilewright_api = 2

SOURCES = qwen3.SOURCES | {
    name: Path(__file__).with_name(f"{name}.py") for name in ("prefill_layer", "decode_layer")
}


@hookimpl
def plugin_info() -> PluginInfo:
    return PluginInfo(
        summary="Llama and other dense models without q and k norm: one kernel per layer, in BF16 "
        "with sums in FP32",
        limits=qwen3.plugin_info().limits,
    )


@hookimpl
def served_models() -> ServedModels:
    return ServedModels(qk_norm=(False,))


@hookimpl
def kernel_set(model_config: ModelConfig, runtime_config: RuntimeConfig) -> KernelSet:
    return kernels_of(layer_shape(model_config, runtime_config))


def kernels_of(shape: LayerShape) -> KernelSet:
    return evolve(qwen3.kernels_of(shape), sources=SOURCES)
