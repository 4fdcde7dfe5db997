"""Loads the kernels of a set for one language: PyPTO's, or a stand-in for it.

PyPTO reads a kernel's source and takes constants from the globals of its module. Therefore every
(kernel, set) gets its own package, made from the same files with other constants.
"""

import ast
import builtins
import importlib.util
import itertools
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from tilewright.errors import ExecutorError, nearest
from tilewright.plugins import cause
from tilewright.types import KernelSet
from tilewright_kernels.contract import Contract, parsed, read_contract
from tilewright_kernels.names import check_file

CONSTANTS = "constants"
"""The module that kernels import their constants from; no file of a set is loaded for it."""

_serial = itertools.count()


def contract(kernel: str, kernels: KernelSet) -> Contract:
    """The parameters of one of the set's kernels. Raises ExecutorError."""
    return read_contract(kernels.sources[kernel], kernel, kernels.constants[kernel])


def modules(kernel: str, kernels: KernelSet) -> list[str]:
    """The kernel's module and those that it imports, each after what it imports itself.

    Raises ExecutorError for a module that the set does not have, and for a file that cannot be read
    or parsed.
    """
    found: list[str] = []
    open_: list[str] = []

    def add(name: str, importer: str) -> None:
        if name in found or name == CONSTANTS:
            return
        if name not in kernels.sources:
            raise ExecutorError(
                f"{importer} imports .{name}, which is not a source of the kernel set"
                f"{nearest(name, kernels.sources)} (sources: {', '.join(kernels.sources)})"
            )
        if name in open_:
            raise ExecutorError(f"{importer} and .{name} import each other: join them")
        open_.append(name)
        for imported in _imports(kernels.sources[name]):
            add(imported, str(kernels.sources[name]))
        open_.pop()
        found.append(name)

    add(kernel, f"kernel {kernel}")
    return found


def _imports(file: Path) -> list[str]:
    """The modules that a source imports from its own set."""
    return [
        node.module
        for node in parsed(file).body
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module
    ]


def load(kernel: str, kernels: KernelSet, language: ModuleType) -> Any:
    """The result of ``language.jit`` for one of the set's kernels.

    language: the module that ``import pypto.language as pl`` yields in the kernel files.

    Raises ExecutorError as ``modules`` does, for a module that cannot be executed or lacks the
    kernel, for a file whose name does not end in .py, and for a name that PyPTO would confuse with
    another one (``names``).
    """
    package = f"{__package__}.loaded_{next(_serial)}"
    parent = ModuleType(package)
    parent.__path__ = []
    constants = ModuleType(f"{package}.{CONSTANTS}")
    vars(constants).update(kernels.constants[kernel])
    sys.modules |= {package: parent, constants.__name__: constants}
    for name in modules(kernel, kernels):
        module = _run(f"{package}.{name}", kernels.sources[name], language)
    found = getattr(module, kernel, None)
    if found is None:
        raise ExecutorError(f"{kernels.sources[kernel]} has no kernel {kernel}: name it so")
    return found


def _run(name: str, file: Path, language: ModuleType) -> ModuleType:
    check_file(file)
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ExecutorError(f"{file} must be Python source: expected a name that ends in .py")
    module = importlib.util.module_from_spec(spec)
    vars(module)["__builtins__"] = vars(builtins) | {"__import__": _importing(language)}
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except ExecutorError:
        raise
    except (ImportError, NameError) as error:
        raise ExecutorError(
            f"{file} cannot be loaded: {error} (constants come from .{CONSTANTS}, which the set's "
            "kernel_set() fills for each kernel)"
        ) from error
    except Exception as error:
        raise ExecutorError(f"{file} cannot be loaded: {cause(error)}") from error
    return module


def _importing(language: ModuleType) -> Any:
    """An ``__import__`` for one module that resolves pypto.language to ``language``."""

    def import_(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "pypto.language":
            return SimpleNamespace(language=language)
        return builtins.__import__(name, *args, **kwargs)

    return import_
