"""Kernel set ``qwen3-fused``: dense Qwen3 models as one program a step."""

from pathlib import Path

from attrs import evolve

from tilewright import hookimpl
from tilewright.types import KernelSet, ModelConfig, PluginInfo, RuntimeConfig, ServedModels
from tilewright_kernels.qwen3_14b import plugin as qwen3
from tilewright_kernels.qwen3_14b.shape import layer_shape

tilewright_api = 2

LAYER_KERNELS = ("prefill_layer", "decode_layer")
PROGRAMS = ("prefill_model", "decode_model")
SOURCES = (
    {name: qwen3.SOURCES[name] for name in ("blocks", "head")}
    | {f"qwen3_{name}": qwen3.SOURCES[name] for name in LAYER_KERNELS}
    | {name: Path(__file__).with_name(f"{name}.py") for name in (*LAYER_KERNELS, *PROGRAMS)}
)
"""Those of qwen3 too: all kernels call the functions of its blocks and layer kernels."""


@hookimpl
def plugin_info() -> PluginInfo:
    return PluginInfo(
        summary="Dense Qwen3: one program per step, in BF16 with sums in FP32",
        limits={
            **qwen3.plugin_info().limits,
            "layers": "all of a model in one process",
            "taps": "run one kernel per layer",
        },
    )


@hookimpl
def served_models() -> ServedModels:
    return qwen3.served_models()


@hookimpl
def kernel_set(model_config: ModelConfig, runtime_config: RuntimeConfig) -> KernelSet:
    shape = layer_shape(model_config, runtime_config)
    layers = {"LAYERS": model_config.num_layers}
    rows = {"prefill_model": shape.max_tokens, "decode_model": shape.max_batch}
    constants = {"head": shape.constants("head")}
    constants |= {kernel: shape.constants(kernel) | layers for kernel in LAYER_KERNELS}
    constants |= {
        program: constants[program.replace("model", "layer")] | {"STATE_ROWS": rows[program]}
        for program in PROGRAMS
    }
    return evolve(qwen3.kernels_of(shape), sources=SOURCES, constants=constants, fused_exact=True)
