"""Plugin ``torch``: the reference executor, on the CPU or a CUDA device with PyTorch."""

import re
from math import prod

from attrs import evolve, field, frozen, validators

from tilewright import hookimpl
from tilewright.errors import ExecutorError, quoted
from tilewright.machine import available_memory
from tilewright.types import (
    DTYPES,
    Check,
    KvCacheSpec,
    LayerwiseExecutor,
    ModelConfig,
    PackedWeights,
    PluginInfo,
    RuntimeConfig,
    TensorSource,
    Tiles,
)

tilewright_api = 2

PAGE_SIZE = 16
"""Default number of tokens per page of the KV cache."""
QUANTISED = ("int8", "int4")
"""Weight dtypes that are stored in fewer bits than the model computes in."""
SMALL_PAGE = 5
"""Tokens in a page with which short prompts fill several pages."""


@frozen
class Options:
    device: str | None = field(
        default=None,
        metadata={"help": "device to run on, like --device, which overrides it; default: cpu"},
    )
    threads: int | None = field(
        default=None,
        # OpenMP ends or crashes the process when it cannot start the requested number of threads.
        validator=validators.optional([validators.ge(1), validators.le(1024)]),
        metadata={"help": "threads that torch uses in the whole process; default: unchanged"},
    )
    stream_weights: bool = field(
        default=False,
        metadata={
            "help": "convert a layer's weights to weight_dtype each time it runs, and keep no "
            "other converted layer; takes less memory, is slower"
        },
    )
    compile: bool = field(
        default=False,
        metadata={
            "help": "run steps of few tokens in C++ that is compiled when the model is loaded "
            "(two or three seconds, the first time) and kept in the user's cache; faster, needs a "
            "C++ compiler"
        },
    )

    @compile.validator
    def _not_streamed(self, _: object, value: bool) -> None:
        if value and self.stream_weights:
            raise ValueError(
                "compile reads weights that stay in weight_dtype, and stream_weights keeps none: "
                "set one of the two"
            )


@hookimpl
def plugin_info() -> PluginInfo:
    return PluginInfo(
        summary="the reference executor: any supported model on the CPU or a CUDA device, with "
        "PyTorch",
        options=Options,
        weight_dtypes=(*DTYPES, *QUANTISED),
        serves=_serves,
        limits={
            "device": "cpu, cuda or cuda:N",
            "weights and KV cache": "float32, bfloat16, float16, also different from each other",
            "quantised weights": "int8 (a scale for each row), int4 (scale and zero point for 32 "
            "weights); embedding and head are int8 in both, all else is in the model's dtype",
            "RoPE": "default, linear, dynamic, llama3, yarn",
            "attention": "any head size, grouped queries, sliding windows by layer",
            "taps": "all of docs/tensors.md",
        },
    )


@hookimpl
def doctor_checks() -> list[Check]:
    from tilewright_torch import card_checks, cpu_checks

    return [*cpu_checks.checks(), *card_checks.checks()]


@hookimpl
def create_executor(
    model_config: ModelConfig,
    runtime_config: RuntimeConfig,
    weights: TensorSource,
    layers: range,
    options: Options | None,
) -> LayerwiseExecutor:
    """Raises ExecutorError for an unsupported device, shape or cache, and if compile fails."""
    options = options or Options()
    config = model_config
    runtime = evolve(runtime_config, device=runtime_config.device or options.device)
    _check(config, runtime, options)

    import torch

    from tilewright.weights import torch_dtype
    from tilewright_torch import openmp
    from tilewright_torch.model import TorchExecutor
    from tilewright_torch.weights import load, quantised_bytes

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if on_card(runtime):
        from tilewright_torch import card

        at = card.CudaCard(card.card_number(str(runtime.device)))
        page_size = runtime.page_size or PAGE_SIZE
        return card.create_on_card(at, config, runtime, weights, layers, page_size)
    assert runtime.weight_dtype is not None
    assert runtime.kv_dtype is not None
    quantised = runtime.weight_dtype if runtime.weight_dtype in QUANTISED else None
    dtype = torch_dtype(config.dtype if quantised else runtime.weight_dtype)
    if options.compile:  # before the weights: it may fail
        from tilewright_torch import native

        native.library(dtype, torch_dtype(runtime.kv_dtype), bool(quantised))
    free = available_memory()
    model = load(config, layers, weights, dtype, options.stream_weights, quantised)
    if quantised:
        size = quantised_bytes(config, layers, quantised)
    else:
        size = _weight_bytes(weights, runtime, options.stream_weights)
    spec = KvCacheSpec(
        num_layers=len(layers),
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        page_size=runtime.page_size or PAGE_SIZE,
        dtype=runtime.kv_dtype,
        # Half of the memory that is free once all weights are read.
        memory_limit=max(0, free - size) // 2,
    )
    openmp.end_threads()  # steps run in a thread of their own
    return TorchExecutor(model, spec, layers, options.compile)


@hookimpl
def pack_weights(
    model_config: ModelConfig,
    runtime_config: RuntimeConfig,
    weights: TensorSource,
    options: Options | None,
) -> PackedWeights | None:
    """None for weights that are not quantised: they have no layout of their own.

    Raises ExecutorError for a model that the executor cannot run.
    """
    if runtime_config.weight_dtype not in QUANTISED:
        return None
    _check(model_config, runtime_config, options or Options())

    from tilewright_torch.weights import PACKED_VERSION, packed_tensors

    tensors = packed_tensors(model_config, weights, runtime_config.weight_dtype)
    return PackedWeights(version=PACKED_VERSION, tensors=tensors)


@hookimpl
def tiles(runtime_config: RuntimeConfig) -> Tiles:
    return Tiles(page_size=runtime_config.page_size or SMALL_PAGE)


def _serves(config: ModelConfig) -> bool:
    evenly_shared = config.num_heads % config.num_kv_heads == 0
    return evenly_shared and config.head_dim % 2 == 0 and config.head_dim >= _least_head_dim(config)


def _least_head_dim(config: ModelConfig) -> int:
    return 4 if config.rope.kind == "dynamic" else 2


def on_card(runtime: RuntimeConfig) -> bool:
    """Whether the device is a CUDA device: ``cuda`` or ``cuda:N``."""
    return bool(re.fullmatch(r"cuda(:\d{1,3})?", str(runtime.device)))


def _check(config: ModelConfig, runtime: RuntimeConfig, options: Options) -> None:
    if options.stream_weights and runtime.weight_dtype in QUANTISED:
        raise ExecutorError(
            "executor torch cannot stream quantised weights: found stream_weights = true with "
            f"weight_dtype = {quoted(runtime.weight_dtype)}; leave one of the two out"
        )
    if runtime.device not in (None, "cpu") and not on_card(runtime):
        raise ExecutorError(
            f"executor torch runs on device cpu, cuda or cuda:N, found device = "
            f"{quoted(runtime.device)}: set one of them, or choose another executor "
            "(`tilewright plugins list`)"
        )
    if on_card(runtime) and runtime.weight_dtype not in DTYPES:
        raise ExecutorError(
            f"weight_dtype = {quoted(runtime.weight_dtype)} runs on device cpu only, found device "
            f"= {quoted(runtime.device)}: set weight_dtype to {' or '.join(map(repr, DTYPES))}, or "
            "device = 'cpu'"
        )
    for name in ("stream_weights", "compile"):
        if on_card(runtime) and getattr(options, name):
            raise ExecutorError(
                f"option {name} is for device cpu, found device = {quoted(runtime.device)}: "
                "leave it out"
            )
    if config.num_heads % config.num_kv_heads:
        raise ExecutorError(
            f"executor torch needs num_heads to be a multiple of num_kv_heads, found "
            f"{config.num_heads} and {config.num_kv_heads} in {config.architecture}: check the "
            "model's configuration"
        )
    least = _least_head_dim(config)
    if config.head_dim % 2 or config.head_dim < least:
        raise ExecutorError(
            f"executor torch needs an even head_dim of {least} or more for {config.rope.kind} "
            f"RoPE, found {config.head_dim} in {config.architecture}: check the model's "
            "configuration"
        )


def _weight_bytes(weights: TensorSource, runtime: RuntimeConfig, streamed: bool) -> int:
    """Size of the weights once all are read, mapped ones included."""
    infos = [weights.info(name) for name in weights.names()]
    if streamed:
        return sum(info.nbytes for info in infos)
    itemsize = 4 if runtime.weight_dtype == "float32" else 2
    return sum(prod(info.shape) * itemsize for info in infos)
