"""The options of executor ``pypto-npu``, and its platforms."""

from collections.abc import Callable
from typing import Any, Literal, get_args

from attrs import field, frozen, validators

from tilewright_pypto.kernels import DEFAULT

Platform = Literal["a2a3", "a5", "a2a3sim", "a5sim", "emulated"]
HARDWARE: tuple[Platform, ...] = ("a2a3", "a5")

GRANTED_DEVICE = "TASK_DEVICE"
"""The variable in which task-submit names the card that it granted. An entry point in the group
``tilewright.device_variables`` declares it, so that it overrides run files."""


def power_of_two(least: int) -> Callable[[Any, Any, int], None]:
    """An attrs validator for powers of two of at least ``least``."""

    def check(instance: Any, attribute: Any, value: int) -> None:
        if value < least or value & (value - 1):
            raise ValueError(
                f"{attribute.name!r} must be a power of two of at least {least}, found {value}"
            )

    return check


def _size(help: str, check: Any) -> int | None:
    """An option that is a number, or None for PyPTO's default, or more if the kernels need it."""
    optional: int | None = field(
        default=None,
        validator=validators.optional(check),
        metadata={"help": f"{help}; default: PyPTO's default, or more if a call needs it"},
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
    kernels: str = field(
        default=DEFAULT,
        metadata={
            "help": "kernel set: NAME or DISTRIBUTION:NAME, as `tilewright plugins list --kind "
            "kernels` lists them"
        },
    )
    device: int | None = field(
        default=None,
        validator=validators.optional(validators.ge(0)),
        metadata={
            "help": "number of the card, like --device; default: TASK_DEVICE, which overrides the "
            "number in a run file"
        },
    )
    pypto_root: str | None = field(
        default=None,
        metadata={"help": "built checkout of PyPTO; default: the installed package"},
    )
    build_dir: str | None = field(
        default=None,
        metadata={"help": "folder for compiled kernels; default: ~/.cache/tilewright/pypto"},
    )
    compile_jobs: int | None = field(
        default=None,
        validator=validators.optional(validators.ge(1)),
        metadata={
            "help": "maximum number of concurrent assemblers and compilers; default: one per CPU"
        },
    )
    ring_task_window: int | None = _size("tasks per ring of the runtime", power_of_two(4))
    ring_heap: int | None = _size("bytes per ring's heap", power_of_two(1024))
    ring_dep_pool: int | None = _size(
        "dependencies per ring", [validators.ge(4), validators.le((1 << 31) - 1)]
    )
    weights_on_device: bool = field(
        default=True,
        metadata={
            "help": "keep the weights on the device; false: copy them to the device for each call"
        },
    )
