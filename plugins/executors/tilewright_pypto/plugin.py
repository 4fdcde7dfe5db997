"""Plugin ``pypto-npu``: dense models on Ascend NPUs, with kernels in PyPTO."""

import os
from typing import TYPE_CHECKING

from tilewright import hookimpl
from tilewright.errors import ConfigError, ExecutorError
from tilewright.types import (
    Check,
    Executor,
    KernelSet,
    ModelConfig,
    PackedWeights,
    PluginInfo,
    Report,
    RuntimeConfig,
    TensorSource,
    Tiles,
)
from tilewright_pypto.options import GRANTED_DEVICE, HARDWARE, Options

if TYPE_CHECKING:
    from tilewright_pypto.device import Device

tilewright_api = 2


@hookimpl
def plugin_info() -> PluginInfo:
    return PluginInfo(
        summary="Dense models on Ascend NPUs, with PyPTO kernels from a kernel set",
        options=Options,
        weight_dtypes=("bfloat16",),
        kv_dtypes=("bfloat16",),
        serves=_serves,
        limits={
            "device": "a card of an Ascend host, a simulator of PyPTO, or emulated on the CPU",
            "models": "those of the kernel set (option kernels); of the default one, dense Qwen3: "
            "q/k norm, no biases, full attention, RoPE default, linear, llama3 or yarn",
            "shapes": "those of the kernel set; of the default one, head_dim a multiple of 32; "
            "hidden and intermediate size, heads x head_dim and page size multiples of 16",
            "taps": "embed, output of each layer, logits; with a set of whole-model programs only, "
            "logits",
        },
    )


def _serves(config: ModelConfig) -> bool:
    """The default kernel set's models, in multiples of its tiles."""
    from tilewright_pypto.kernels import DEFAULT, served, serves

    tiled = config.head_dim % 32 == config.hidden_size % 16 == config.intermediate_size % 16 == 0
    grouped = config.num_heads % config.num_kv_heads == 0
    return tiled and grouped and serves(served(DEFAULT), config)


@hookimpl
def doctor_checks() -> list[Check]:
    from tilewright_pypto import installation

    return installation.checks()


@hookimpl
def create_executor(
    model_config: ModelConfig,
    runtime_config: RuntimeConfig,
    weights: TensorSource,
    packed: bool,
    layers: range,
    options: Options | None,
    report: Report,
) -> Executor:
    """Raises ExecutorError for an unsupported model, device or PyPTO, and PluginError for a kernel
    set that is not installed."""
    from tilewright_pypto.kernels import described, kernel_set

    options = options or Options()
    kernels = kernel_set(options.kernels, model_config, runtime_config)
    who = described(options.kernels)
    return create(
        kernels, who, model_config, runtime_config, weights, packed, layers, options, report
    )


def create(
    kernels: KernelSet,
    who: str,
    model_config: ModelConfig,
    runtime_config: RuntimeConfig,
    weights: TensorSource,
    packed: bool,
    layers: range,
    options: Options,
    report: Report,
) -> Executor:
    """An executor over a kernel set that was made for the model.

    who: the set in words. Other arguments, and errors, are those of the hook ``create_executor``.
    """
    card = chosen_card(options, runtime_config)
    positions = runtime_config.max_seq_len
    assert positions is not None
    if options.platform != "emulated":
        from tilewright_pypto.rings import check

        check(options, kernels, positions)

    from tilewright_pypto.executor import load

    device = _open(options, card, report)
    try:
        return load(
            model_config,
            layers,
            weights,
            packed,
            positions,
            kernels,
            device,
            options.weights_on_device,
            who,
        )
    except BaseException:
        device.close()
        raise


@hookimpl
def tiles(
    model_config: ModelConfig, runtime_config: RuntimeConfig, options: Options | None
) -> Tiles:
    from tilewright_pypto.kernels import tiles

    return tiles((options or Options()).kernels, model_config, runtime_config)


@hookimpl
def pack_weights(
    model_config: ModelConfig,
    runtime_config: RuntimeConfig,
    weights: TensorSource,
    options: Options | None,
) -> PackedWeights:
    """Raises ExecutorError for a model that the kernels cannot run."""
    from tilewright_pypto.kernels import kernel_set

    kernel_set((options or Options()).kernels, model_config, runtime_config)

    from tilewright_pypto.packing import VERSION, packed_tensors

    tensors = packed_tensors(model_config, weights)
    return PackedWeights(version=VERSION, tensors=tensors)


def chosen_card(options: Options, runtime: RuntimeConfig) -> int | None:
    """The number of the card that was requested, or that a queue granted.

    None for a platform without cards, even if one is named. Raises ExecutorError for a hardware
    platform without a number (a default could be a card in use by others) and for a value that is
    not a number, and ConfigError for two numbers.
    """
    if options.platform not in HARDWARE:
        if runtime.device not in (None, "cpu") and not _is_number(str(runtime.device)):
            raise ExecutorError(
                f"platform {options.platform} has no cards: expected no device, or a number, which "
                f"is ignored, found {runtime.device!r}: remove it"
            )
        return None
    asked = {
        str(number).lstrip("0") or "0"
        for number in (runtime.device, options.device)
        if number is not None
    }
    if len(asked) > 1:
        raise ConfigError(
            f"device is {runtime.device} in the runtime's settings but {options.device} in the "
            "options of executor pypto-npu: give it once"
        )
    number = asked.pop() if asked else os.environ.get(GRANTED_DEVICE)
    if not number:
        raise ExecutorError(
            f"platform {options.platform} needs a card, but none was given: give --device N, run "
            f"under task-submit, which sets {GRANTED_DEVICE}, or set -o platform=emulated to run "
            "the kernels without a card"
        )
    if not _is_number(number):
        origin = GRANTED_DEVICE if runtime.device is None else "device"
        raise ExecutorError(
            f"executor pypto-npu expects the number of a card as {origin}, found {number!r}: see "
            "`npu-smi info` for the cards"
        )
    return int(number)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _open(options: Options, card: int | None, report: Report) -> "Device":
    if options.platform == "emulated":
        from tilewright_pypto.emulated.device import EmulatedDevice

        return EmulatedDevice()
    from tilewright_pypto.adapter import open_device

    return open_device(options, card, report)
