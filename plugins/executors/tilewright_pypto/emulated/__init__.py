"""The kernels without PyPTO: their own source, run eagerly on PyTorch by a strict stand-in."""

from tilewright_pypto.emulated.language import Kernel, language
from tilewright_pypto.emulated.memory import KernelError

__all__ = ["Kernel", "KernelError", "language"]
