"""Where kernels run: the interface that the executor needs from PyPTO, or from its stand-in."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from tilewright.types import KernelSet

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Kernel: TypeAlias = Callable[..., None]
"""Called with a kernel's parameters by name: CPU tensors, or results of ``keep`` and ``allocate``.

Works on them in place. Raises ExecutorError with a message of one line.
"""


class Device(Protocol):
    @property
    def name(self) -> str:
        """Name for results and errors: ``a2a3 card 3``, ``a2a3sim``, ``emulated``."""
        ...

    place: str
    """Position of the next kernel call in the model, for crash reports: ``step 3, layer 12``."""

    @property
    def memory_limit(self) -> int | None:
        """Bytes that the KV cache may take when the number of pages is not set."""
        ...

    def allocate(self, shape: "tuple[int, ...]", dtype: "torch.dtype") -> Any:
        """Uninitialised rows [prod(shape[:-1]), shape[-1]]. Raises OutOfPagesError when the device
        is out of memory."""
        ...

    def keep(self, tensor: "Tensor") -> Any:
        """Upload a contiguous tensor's values, which stay on the device until it is closed."""
        ...

    def read(self, kept: Any) -> "Tensor":
        """The values of a handle from ``keep`` or ``allocate``, as a CPU tensor of its shape."""
        ...

    def write(self, kept: Any, tensor: "Tensor") -> None:
        """Replace the values of a handle from ``keep`` or ``allocate``."""
        ...

    def load(self, names: Sequence[str], kernels: KernelSet) -> Mapping[str, Kernel]:
        """Kernels of a set, compiled and keyed by name."""
        ...

    def close(self) -> None:
        """Release the device and all uploads and allocations. Closing again does nothing."""
        ...
