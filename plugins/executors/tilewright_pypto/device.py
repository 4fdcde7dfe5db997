"""Where kernels run: what the executor asks of PyPTO, or of the stand-in for it."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from tilewright_kernels.qwen3_14b.shape import LayerShape

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Kernel: TypeAlias = Callable[..., None]
"""Called with a kernel's parameters by name: CPU tensors, or what ``keep`` and ``allocate`` gave.

Works on them in place. Raises ExecutorError, in one line, for what went wrong.
"""


class Device(Protocol):
    @property
    def name(self) -> str:
        """For results and errors: ``a2a3 card 3``, ``a2a3sim``, ``emulated``."""
        ...

    place: str
    """Where in the model the next kernel call is: ``step 3, layer 12``. A crash says so."""

    @property
    def memory_limit(self) -> int | None:
        """Bytes that the KV cache may take when nobody says how many pages it shall have."""
        ...

    @property
    def allocate(self) -> "Callable[[tuple[int, ...], torch.dtype], Any] | None":
        """As ``KvCacheSpec.allocate``; what it gives are rows, all but the last extent in one.

        None where the KV allocator's own storage will do.
        """
        ...

    def keep(self, tensor: "Tensor") -> Any:
        """A contiguous tensor's values on the device, until it is closed."""
        ...

    def read(self, kept: Any) -> "Tensor":
        """What ``keep`` or ``allocate`` gave, as a CPU tensor of the same shape."""
        ...

    def write(self, kept: Any, tensor: "Tensor") -> None:
        """Replace the values of what ``keep`` or ``allocate`` gave."""
        ...

    def load(self, kernels: Sequence[str], shape: LayerShape) -> Mapping[str, Kernel]:
        """Kernels of tilewright_kernels.qwen3_14b, compiled for a layer shape, by name."""
        ...

    def close(self) -> None:
        """Give the device back, with all that was kept. Closing twice is fine."""
        ...
