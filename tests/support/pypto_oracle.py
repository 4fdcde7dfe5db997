"""PyPTO itself as an oracle, without a device.

``simulator_or_skip`` opens PyPTO's simulator of an Ascend 910B, a2a3sim, through the adapter that
users run. It decides whether a kernel is right: kernels are compiled as for a card, and run.

``lowered`` is fast and incomplete, and needs PyPTO's front end only: a kernel is lowered for a2a3
with all passes, and ``pypto.debug.torch_codegen`` turns the result into PyTorch. It leaves out the
C++ that PyPTO generates for what a kernel does outside its tasks; ``orchestration_complaints`` has
g++ check that C++. torch_codegen is a lenient debugging aid; here it follows the IR strictly:

- A value's valid region is that of its type in the IR, which torch_codegen loses at an operator.
- Products of BF16 are accumulated in FP32; torch_codegen rounds each to BF16.
- Scratch begins as NaN, the part of a tile that a load did not fill is NaN, and a window that
  reaches outside of its tensor is an error; torch_codegen has zeros for all three.
"""

import atexit
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from qwen3_layers import Run

from tilewright.types import KernelSet
from tilewright_pypto.adapter import PyptoDevice, open_device
from tilewright_pypto.installation import find, needs
from tilewright_pypto.options import Options

REASON = "PyPTO (hw-native-sys/pypto, its front end) is not importable"


def pypto_or_skip() -> Any:
    """PyPTO's ``pypto.language``; skips the test if PyPTO is not installed."""
    try:
        import pypto.debug
        import pypto.language
        from pypto.runtime import RunConfig  # noqa: F401
    except ImportError as error:
        pytest.skip(f"{REASON}: {error}")
    pypto.set_log_level(pypto.LogLevel.ERROR)
    return pypto.language


@cache
def simulator_or_skip() -> PyptoDevice:
    """a2a3sim, opened; skips the test if PyPTO or a requirement of the simulator is missing."""
    pypto_or_skip()
    installation = find(None)
    lacking = [c for c in needs("a2a3sim", installation, None) if c.status == "failed"]
    if lacking:
        pytest.skip("; ".join(f"a2a3sim needs {c.name}: {c.found}" for c in lacking))
    # A slow machine must not count as stuck.
    os.environ.setdefault("SIMPLER_SCHEDULER_TIMEOUT_MS", "3600000")
    builds = TemporaryDirectory()
    options = Options(platform="a2a3sim", build_dir=builds.name)
    device = open_device(options, None, lambda *_: None)
    atexit.register(builds.cleanup)
    atexit.register(device.close)
    return device


def simulated(kernel: str, kernels: KernelSet) -> Run:
    """The kernel on a2a3sim, through the adapter; it works in place on tensors by name."""
    call = simulator_or_skip().load([kernel], kernels)[kernel]
    return lambda tensors: call(**tensors)


def orchestration_complaints(kernel: Any, folder: Path) -> list[str]:
    """The complaints of g++ about the C++ that PyPTO generates for a kernel outside its tasks.

    Errors, and warnings of variables that shadow another or are read uninitialised; PyPTO's own
    message if it refuses the kernel. Skips the test without the headers of PyPTO's runtime.
    """
    from pypto.runtime import RunConfig

    try:
        from simpler_setup.kernel_compiler import KernelCompiler
    except ImportError as error:
        pytest.skip(f"PyPTO's runtime, whose headers are needed, is not importable: {error}")
    runtime = "tensormap_and_ringbuffer"
    headers, _ = KernelCompiler(platform="a2a3sim").get_orchestration_cache_inputs(runtime)
    home = folder / "generated"
    home.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PTOAS_ROOT", str(folder))  # no assembler: slow and not needed
        try:
            kernel.compile(config=RunConfig(platform="a2a3", save_kernels_dir=str(home)))
        except ValueError as error:
            return [str(error)]
    (file,) = home.glob("orchestration/*.cpp")
    warnings = ("shadow", "init-self", "uninitialized", "tautological-compare")
    command = ["g++", "-std=c++17", "-O1", "-S", "-o", os.devnull]
    command += [f"-W{warning}" for warning in warnings]
    command += [f"-isystem{header}" for header in headers]
    said = subprocess.run([*command, str(file)], capture_output=True, text=True)
    return [
        line for line in said.stderr.splitlines() if ": warning: " in line or ": error: " in line
    ]


SUPPORT = """
def _region(value, valid, full):
    if not isinstance(value, torch.Tensor):
        return value
    value = value.view(value.shape) if value.is_contiguous() else value.as_strided(
        value.size(), value.stride(), value.storage_offset())
    value._pypto_valid_shape = tuple(map(int, valid))
    value._pypto_full_shape = tuple(map(int, full))
    return value

def _product(a, b):
    return torch.matmul(a.float(), b.float())

def _poisoned(shape, dtype):
    value = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max // 3
    return torch.full(tuple(map(int, shape)), value, dtype=dtype)

def _place(tensor, offsets, extents):
    for offset, extent, size in zip(offsets, extents, tensor.shape):
        if offset < 0 or offset + extent > size:
            raise IndexError(f"{tuple(offsets)} + {tuple(extents)} outside {tuple(tensor.shape)}")
    return tuple(slice(int(o), int(o) + int(e)) for o, e in zip(offsets, extents))

def _tile_load(tensor, offsets, shapes, valid_shape=None):
    shapes = tuple(map(int, shapes))
    valid = shapes if valid_shape is None else tuple(map(int, valid_shape))
    found = tensor[_place(tensor, offsets, valid)]
    if valid == shapes:
        return found.clone()
    tile = _poisoned(shapes, tensor.dtype)
    tile[tuple(slice(v) for v in valid)] = found
    return _region(tile, valid, shapes)

def _tile_store(tile, offsets, out, atomic=0):
    assert not atomic
    valid = getattr(tile, "_pypto_valid_shape", tuple(tile.shape))
    target = out[_place(out, offsets, valid)]
    target.copy_(tile[tuple(slice(v) for v in valid)].reshape(target.shape))
    return out
"""


def lowered(kernel: Any) -> Callable[..., None]:
    """The kernel's IR after all passes, as a function of its tensors in the kernel's order."""
    from pypto import ir
    from pypto.runtime import RunConfig

    codegen = sys.modules["pypto.debug.torch_codegen"]

    class Generator(codegen.TorchCodegen):
        def visit_assign_stmt(self, op: Any) -> None:
            super().visit_assign_stmt(op)
            kind = op.var.type
            view = getattr(kind, "tile_view", None) or getattr(kind, "tensor_view", None)
            if view is not None and view.valid_shape:
                valid = ", ".join(self._visit_expr_str(e) for e in view.valid_shape)
                full = ", ".join(self._visit_expr_str(e) for e in kind.shape)
                name = self._name_of(op.var)
                self._emit(f"{name} = _region({name}, ({valid},), ({full},))")

    program = kernel.lower(config=RunConfig(platform="a2a3"))
    original = dict(codegen._OP_MAP)
    try:
        for name, emit in original.items():
            if "matmul" in name:
                codegen._OP_MAP[name] = lambda args, kwargs, emit=emit: emit(args, kwargs).replace(
                    "torch.matmul(", "_product("
                )
        for kind in ("tensor", "tile"):
            codegen._OP_MAP[f"{kind}.create"] = lambda args, kwargs: (
                f"_poisoned({args[0]}, {codegen._kw_dtype(kwargs)})"
            )
            codegen._OP_MAP[f"{kind}.set_validshape"] = lambda args, kwargs: f"{args[0]}.clone()"
        codegen._OP_MAP["tile.alloc"] = lambda args, kwargs: "None"
        groups = codegen._build_group_meta(program)
        generator = Generator(group_meta=groups)
        generator.visit_program(program)
    finally:
        codegen._OP_MAP.clear()
        codegen._OP_MAP.update(original)
    parts = [codegen._PREAMBLE, SUPPORT, f"_GROUP_META.update({groups!r})", generator.get_output()]
    namespace: dict[str, Any] = {}
    exec(compile("\n".join(parts), "<lowered>", "exec"), namespace)
    (entry,) = (
        f.name for f in program.functions.values() if f.func_type == ir.FunctionType.Orchestration
    )
    return namespace[entry]
