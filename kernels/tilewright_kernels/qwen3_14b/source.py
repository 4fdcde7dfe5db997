"""Loads the kernel files for one layer shape and one language: PyPTO's, or a stand-in for it.

PyPTO reads a kernel's source and takes constants from the globals of its module. Therefore every
(kernel, shape) gets its own package, made from the same files with other constants.
"""

import builtins
import importlib.util
import itertools
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from tilewright_kernels.names import check_file
from tilewright_kernels.qwen3_14b.shape import LayerShape

KERNELS = ("prefill_layer", "decode_layer", "head")
"""Names of the kernels. Each is in a file of the same name in this folder."""

_serial = itertools.count()


def path(kernel: str) -> Path:
    return Path(__file__).with_name(f"{kernel}.py")


def load(kernel: str, shape: LayerShape, language: ModuleType) -> Any:
    """The result of ``language.jit`` for a kernel and a shape.

    language: the module that ``import pypto.language as pl`` yields in the kernel files.

    Raises ExecutorError for a name that PyPTO would confuse with another one (``names``).
    """
    package = f"{__package__}.loaded_{next(_serial)}"
    parent = ModuleType(package)
    parent.__path__ = []
    constants = ModuleType(f"{package}.constants")
    vars(constants).update(shape.constants(kernel))
    sys.modules |= {package: parent, constants.__name__: constants}
    for name in ("blocks", kernel):
        module = _run(f"{package}.{name}", path(name), language)
    return getattr(module, kernel)


def _run(name: str, file: Path, language: ModuleType) -> ModuleType:
    check_file(file)
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    vars(module)["__builtins__"] = vars(builtins) | {"__import__": _importing(language)}
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _importing(language: ModuleType) -> Any:
    """An ``__import__`` for one module that resolves pypto.language to ``language``."""

    def import_(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "pypto.language":
            return SimpleNamespace(language=language)
        return builtins.__import__(name, *args, **kwargs)

    return import_
