"""The emulated device: runs the kernels' source on the CPU."""

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from tilewright import kv_storage
from tilewright.machine import available_memory
from tilewright.types import KernelSet
from tilewright_kernels import source
from tilewright_pypto.device import Kernel
from tilewright_pypto.emulated.language import language


class EmulatedDevice:
    """A ``Device`` (see tilewright_pypto.device) in host memory."""

    name = "emulated"
    place = ""

    @property
    def memory_limit(self) -> int:
        return available_memory() // 2

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return kv_storage.zeros((prod(shape[:-1]), shape[-1]), dtype)

    def keep(self, tensor: Tensor) -> Tensor:
        return tensor

    def read(self, kept: Tensor) -> Tensor:
        return kept

    def write(self, kept: Tensor, tensor: Tensor) -> None:
        kept.copy_(tensor)

    def load(self, names: Sequence[str], kernels: KernelSet) -> Mapping[str, Kernel]:
        return {name: source.load(name, kernels, language) for name in names}

    def close(self) -> None:
        pass
