"""Plugin ``pypto-npu``: Qwen3 models on Ascend NPUs, through kernels in PyPTO."""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, get_args

from attrs import field, frozen, validators

from tilewright import hookimpl
from tilewright.config import GRANTED_DEVICE
from tilewright.errors import ConfigError, ExecutorError
from tilewright.types import (
    Check,
    ExecutorRequest,
    LayerwiseExecutor,
    PackedWeights,
    PluginInfo,
    RuntimeConfig,
)

if TYPE_CHECKING:
    from tilewright_pypto.device import Device

tilewright_api = 1

Platform = Literal["a2a3", "a5", "a2a3sim", "a5sim", "emulated"]
HARDWARE: tuple[Platform, ...] = ("a2a3", "a5")


def power_of_two(least: int) -> Callable[[Any, Any, int], None]:
    """An attrs validator."""

    def check(instance: Any, attribute: Any, value: int) -> None:
        if value < least or value & (value - 1):
            raise ValueError(
                f"{attribute.name!r} must be a power of two of at least {least}, found {value}"
            )

    return check


def _size(help: str, check: Any) -> int | None:
    """An option that is a number, or None for PyPTO's own choice."""
    optional: int | None = field(
        default=None,
        validator=validators.optional(check),
        metadata={"help": f"{help}; default: PyPTO's choice"},
    )
    return optional


@frozen
class Options:
    platform: Platform = field(
        default="a2a3",
        validator=validators.in_(get_args(Platform)),
        metadata={
            "help": "a2a3 (Ascend 910B, 910C), a5 (950), PyPTO's simulators a2a3sim and a5sim, or "
            "emulated: the kernels' source on the CPU, without PyPTO"
        },
    )
    device: int | None = field(
        default=None,
        validator=validators.optional(validators.ge(0)),
        metadata={
            "help": "number of the card, as --device; default: TASK_DEVICE. A run file's number "
            "gives way to TASK_DEVICE"
        },
    )
    pypto_root: str | None = field(
        default=None,
        metadata={"help": "a checkout of PyPTO, built; default: the installed package"},
    )
    build_dir: str | None = field(
        default=None,
        metadata={"help": "folder of compiled kernels; default: ~/.cache/tilewright/pypto"},
    )
    compile_jobs: int | None = field(
        default=None,
        validator=validators.optional(validators.ge(1)),
        metadata={"help": "assemblers and compilers at a time; default: one for each CPU"},
    )
    ring_task_window: int | None = _size("tasks in flight", power_of_two(4))
    ring_heap: int | None = _size("bytes of the runtime's heap", power_of_two(1024))
    ring_dep_pool: int | None = _size(
        "dependencies in flight", [validators.ge(4), validators.le((1 << 31) - 1)]
    )
    weights_on_device: bool = field(
        default=True,
        metadata={"help": "keep weights on the device; false: copy them there for each call"},
    )


@hookimpl
def plugin_info() -> PluginInfo:
    return PluginInfo(
        summary="Qwen3 models on Ascend NPUs, through one kernel a layer in PyPTO",
        options=Options,
        limits={
            "device": "a card of an Ascend host, a simulator of PyPTO, or emulated on the CPU",
            "models": "dense Qwen3: q/k norm, no biases, full attention",
            "weights and KV cache": "bfloat16",
            "RoPE": "default, linear, llama3, yarn",
            "shapes": "head_dim a multiple of 32; hidden and intermediate size, heads x head_dim "
            "and page size multiples of 16",
            "taps": "embed, output of each layer, logits",
        },
    )


@hookimpl
def doctor_checks() -> list[Check]:
    from tilewright_pypto import installation

    return installation.checks()


@hookimpl
def create_executor(request: ExecutorRequest) -> LayerwiseExecutor:
    """Raises ExecutorError for a model, a device or a PyPTO that it cannot work with."""
    from tilewright_pypto.fit import layer_shape

    config, runtime = request.model_config, request.runtime_config
    options = request.options or Options()
    shape = layer_shape(config, runtime)
    card = chosen_card(options, runtime)
    if options.platform != "emulated":
        from tilewright_pypto.rings import fitted

        assert runtime.max_seq_len is not None
        options = fitted(options, shape, runtime.max_seq_len)

    from tilewright_pypto.executor import load

    device = _open(options, card, request)
    try:
        return load(request, shape, device, options.weights_on_device)
    except BaseException:
        device.close()
        raise


@hookimpl
def pack_weights(request: ExecutorRequest) -> PackedWeights:
    """Raises ExecutorError for a model that the kernels cannot run."""
    from tilewright_pypto.fit import layer_shape

    layer_shape(request.model_config, request.runtime_config)

    from tilewright_pypto.packing import VERSION, packed_tensors

    tensors = packed_tensors(request.model_config, request.weights)
    return PackedWeights(version=VERSION, tensors=tensors)


def chosen_card(options: Options, runtime: RuntimeConfig) -> int | None:
    """The card's number: as asked for, or as a queue granted it.

    None for a platform that has no cards, whichever is named. Raises ExecutorError for a hardware
    platform without a number, since a default would be somebody else's card, for what is no number,
    and ConfigError for two numbers.
    """
    if options.platform not in HARDWARE:
        if runtime.device not in (None, "cpu") and not _is_number(str(runtime.device)):
            raise ExecutorError(
                f"platform {options.platform} has no cards: expected none, or a number that is "
                f"left unused, as device, found {runtime.device!r}: leave it out"
            )
        return None
    asked = {
        str(number).lstrip("0") or "0"
        for number in (runtime.device, options.device)
        if number is not None
    }
    if len(asked) > 1:
        raise ConfigError(
            f"device is {runtime.device} in the runtime's settings and {options.device} in the "
            "options of executor pypto-npu: give it once"
        )
    number = asked.pop() if asked else os.environ.get(GRANTED_DEVICE)
    if not number:
        raise ExecutorError(
            f"platform {options.platform} needs a card, and none was named: give --device N, run "
            f"under task-submit, which sets {GRANTED_DEVICE}, or set -o platform=emulated to run "
            "the kernels without a card"
        )
    if not _is_number(number):
        origin = GRANTED_DEVICE if runtime.device is None else "device"
        raise ExecutorError(
            f"executor pypto-npu takes the number of a card as {origin}, found {number!r}: see "
            "`npu-smi info` for the cards"
        )
    return int(number)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _open(options: Options, card: int | None, request: ExecutorRequest) -> "Device":
    if options.platform == "emulated":
        from tilewright_pypto.emulated.device import EmulatedDevice

        return EmulatedDevice()
    from tilewright_pypto.adapter import open_device

    return open_device(options, card, request.report)
