"""A stand-in for ``pypto.language``: runs a kernel's own source on PyTorch, and checks it.

It has the part of the language that the kernels of tilewright_kernels use, and is strict where a
device is silent. What PyPTO refuses is refused. Faults that PyPTO accepts but that break on
hardware (a window outside its tensor, memory that was never written, iterations that are not
independent) are errors too. It computes values, not times, and models no particular device.
"""

import ast
import inspect
import math
import random
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from functools import wraps
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any, NoReturn

import torch
from attrs import frozen

from tilewright.errors import ExecutorError
from tilewright.plugins import cause
from tilewright_kernels.contract import Contract, Parameter
from tilewright_kernels.names import check_function
from tilewright_pypto.emulated import operators
from tilewright_pypto.emulated.memory import (
    Buffer,
    KernelError,
    Loop,
    Memory,
    Run,
    Task,
    call,
    fail,
    outside_task,
    poison,
    running,
)

# --- types in signatures --------------------------------------------------------------------------


@frozen
class Dynamic:
    name: str


@frozen
class TensorType:
    shape: tuple["int | Dynamic", ...]
    dtype: torch.dtype
    direction: Any = "in"


class _TensorOf:
    """``pl.Tensor[shape, dtype]``; without a subscript, in an inline function, any tensor."""

    def __getitem__(self, of: tuple[Sequence["int | Dynamic"], torch.dtype]) -> TensorType:
        shape, dtype = of
        return TensorType(tuple(shape), dtype)


@frozen
class _Directed:
    direction: str

    def __getitem__(self, of: TensorType) -> TensorType:
        return TensorType(of.shape, of.dtype, self.direction)


class _ScalarOf:
    def __getitem__(self, of: object) -> None:
        return None


class Level(Enum):
    CORE_GROUP = "core group"


# --- control flow ---------------------------------------------------------------------------------


@contextmanager
def at(*, level: Level, name_hint: str = "") -> Iterator[None]:
    run = outside_task("pl.at")
    run.task = Task(run.tasks)
    run.tasks += 1
    yield
    run.task.end()
    run.task = None


def range_(*bounds: int) -> Iterator[int]:
    running()
    return iter(range(*bounds))


def parallel(*bounds: int) -> Iterator[int]:
    """Iterations in random order, which are checked against each other afterwards."""
    run = outside_task("pl.parallel")
    order = list(range(*bounds))
    run.random.shuffle(order)
    loop = Loop()
    run.loops.append(loop)
    for iteration in order:
        loop.iteration = iteration
        yield iteration
    run.loops.pop()
    loop.check()


# --- functions ------------------------------------------------------------------------------------


@frozen
class Kernel:
    """The result of ``pl.jit``: called with all tensors by name, it works on them in place.

    Raises KernelError when the kernel breaks a rule, ExecutorError for tensors that do not fit.
    """

    function: Callable[..., Any]
    contract: Contract
    seed: int = 0

    def __call__(self, **tensors: torch.Tensor) -> None:
        bound = self.contract.bind(tensors)
        _check_apart(self.contract, bound)
        run = Run(self.contract.kernel, random.Random(self.seed))
        with call(run):
            memory = [_argument(p, t) for p, t in zip(self.contract.parameters, bound, strict=True)]
            try:
                self.function(*memory)
            except ExecutorError:
                raise
            except Exception as error:  # what the kernel does with Python itself
                raise KernelError(f"kernel {run.kernel}: {cause(error)}") from error
            for argument in memory:
                _check_written(argument)


def _argument(parameter: Parameter, tensor: torch.Tensor) -> Memory:
    written = None
    if parameter.direction == "out":
        tensor.fill_(poison(tensor.dtype))
        written = torch.zeros(tensor.shape, dtype=torch.bool)
    return Memory(Buffer(parameter.name, parameter.direction, tensor, written, 0), tensor, written)


def _check_written(argument: Memory) -> None:
    if argument.written is not None and not argument.written.all():
        missing = int(argument.written.numel() - argument.written.sum())
        fail(
            f"{missing} of {argument.written.numel()} elements of output {argument.buffer.name} "
            "were never written (assigning a new value to the name does not write it)"
        )


def _check_apart(contract: Contract, tensors: Sequence[torch.Tensor]) -> None:
    """Check that a written parameter shares no memory with another one."""
    spans = sorted(
        (t.data_ptr(), t.data_ptr() + t.numel() * t.element_size(), p.name, p.direction)
        for p, t in zip(contract.parameters, tensors, strict=True)
    )
    for (_, stop, name, direction), (start, _, other, its) in pairwise(spans):
        if start < stop and (direction, its) != ("in", "in"):
            raise KernelError(
                f"kernel {contract.kernel}: {name} and {other} share memory, and one is written"
            )


def jit(function: Callable[..., Any]) -> Kernel:
    check_source(function)
    parameters = []
    for name, parameter in inspect.signature(function).parameters.items():
        annotation = parameter.annotation
        if not isinstance(annotation, TensorType):
            fail(f"parameter {name} of a kernel must be a pl.Tensor")
        shape = tuple(e.name if isinstance(e, Dynamic) else e for e in annotation.shape)
        dtype = str(annotation.dtype).removeprefix("torch.")
        parameters.append(Parameter(name, dtype, shape, annotation.direction))
    order = function.__globals__.get("KV_ROW_ORDER")
    return Kernel(function, Contract(function.__name__, tuple(parameters), order))


def inline(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that PyPTO splices in. Its arguments must match its annotations."""
    check_source(function)
    signature = inspect.signature(function)
    wanted = [p.annotation for p in signature.parameters.values()]
    names = list(signature.parameters)

    @wraps(function)
    def spliced(*arguments: Any) -> Any:
        running()
        if len(arguments) != len(names):
            fail(f"{function.__name__} expects {len(names)} arguments, found {len(arguments)}")
        for name, annotation, argument in zip(names, wanted, arguments, strict=True):
            if isinstance(annotation, TensorType):
                _check_inline(function.__name__, name, annotation, argument)
        result = function(*arguments)
        if result is None:
            fail(f"{function.__name__} must return the tensor that it wrote")
        return result

    return spliced


def _check_inline(function: str, name: str, wanted: TensorType, found: object) -> None:
    if not isinstance(found, Memory):
        fail(f"{function} expects {name} in device memory, found {type(found).__name__}")
    fits = len(found.shape) == len(wanted.shape) and all(
        isinstance(w, Dynamic) or w == f for w, f in zip(wanted.shape, found.shape, strict=True)
    )
    if not fits or found.dtype != wanted.dtype:
        shape = [w.name if isinstance(w, Dynamic) else w for w in wanted.shape]
        fail(
            f"{function} expects {name} as {wanted.dtype} {shape}, found {found.dtype} "
            f"{list(found.shape)}"
        )


# --- code that PyPTO's parser refuses although Python would run it --------------------------------

REFUSED: dict[type[ast.AST], str] = {
    ast.AugAssign: "augmented assignment: write x = pl.add(x, y)",
    ast.FunctionDef: "a function inside a function",
    ast.Lambda: "lambda",
    ast.ListComp: "a comprehension",
    ast.SetComp: "a comprehension",
    ast.DictComp: "a comprehension",
    ast.GeneratorExp: "a comprehension",
    ast.Try: "try",
    ast.Raise: "raise",
    ast.Assert: "assert",
    ast.Global: "global",
    ast.Nonlocal: "nonlocal",
    ast.Import: "import",
    ast.ImportFrom: "import",
    ast.Delete: "del",
    ast.Starred: "*",
    ast.Pow: "**",
    ast.MatMult: "@",
    ast.IfExp: "a conditional expression",
    ast.BoolOp: "and / or (PyPTO evaluates both sides, Python may not): nest ifs",
    ast.While: "while: not emulated, use pl.range",
    ast.Break: "break: not emulated",
    ast.Continue: "continue: not emulated",
    ast.JoinedStr: "an f-string",
}


def check_source(function: Callable[..., Any]) -> None:
    """Check for code that the language does not support, before anything runs.

    Raises KernelError, or ExecutorError for a name (``tilewright_kernels.names``).
    """
    lines, first = inspect.getsourcelines(function)
    definition = ast.parse(textwrap.dedent("".join(lines))).body[0]
    assert isinstance(definition, ast.FunctionDef)
    file = inspect.getsourcefile(function)

    def refuse(node: ast.AST, what: str) -> NoReturn:
        line = first + getattr(node, "lineno", 1) - 1
        raise KernelError(f"{file}:{line}: {function.__name__} has {what}")

    for node in (n for statement in definition.body for n in ast.walk(statement)):
        for kind, what in REFUSED.items():
            if isinstance(node, kind):
                refuse(node, f"an unsupported construct: {what}")
        if isinstance(node, ast.For) and not _is_loop(node.iter):
            refuse(node, f"a loop over {ast.unparse(node.iter)}: use pl.range or pl.parallel")
        match node:
            case ast.Attribute(value=ast.Name(id="pl"), attr=name) if name not in NAMES:
                refuse(node, f"pl.{name}, which is not emulated")
    types = (t for t in function.__annotations__.values() if isinstance(t, TensorType))
    symbols = {extent.name for t in types for extent in t.shape if isinstance(extent, Dynamic)}
    check_function(definition, symbols, str(file), first)


def _is_loop(node: ast.expr) -> bool:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and ast.unparse(node.func) in ("pl.range", "pl.parallel")
    )


# --- the module -----------------------------------------------------------------------------------


def minimum_of_scalars(a: int, b: int) -> int:
    return min(a, b)


def maximum_of_scalars(a: int, b: int) -> int:
    return max(a, b)


def _row_sum(x: torch.Tensor) -> torch.Tensor:
    return x.sum(-1, keepdim=True)


def _row_max(x: torch.Tensor) -> torch.Tensor:
    return x.amax(-1, keepdim=True)


class _Jit:
    inline = staticmethod(inline)

    def __call__(self, function: Callable[..., Any]) -> Kernel:
        return jit(function)


NAMES: dict[str, Any] = {
    "BF16": torch.bfloat16,
    "FP16": torch.float16,
    "FP32": torch.float32,
    "INT32": torch.int32,
    "INDEX": operators.INDEX,
    "InOut": _Directed("inout"),
    "Level": Level,
    "Out": _Directed("out"),
    "PadValue": SimpleNamespace(zero=0.0, min=-math.inf, max=math.inf),
    "Scalar": _ScalarOf(),
    "Tensor": _TensorOf(),
    "add": operators.binary("pl.add", torch.add),
    "assemble": operators.assemble,
    "at": at,
    "cast": operators.cast,
    "col_expand_mul": operators.expand("pl.col_expand_mul", torch.mul, 0),
    "create_tensor": operators.create_tensor,
    "div": operators.binary("pl.div", torch.div),
    "dynamic": Dynamic,
    "exp": operators.unary("pl.exp", torch.exp),
    "fillpad": operators.fillpad,
    "full": operators.full,
    "jit": _Jit(),
    "matmul": operators.matmul,
    "matmul_acc": operators.matmul_acc,
    "max": maximum_of_scalars,
    "maximum": operators.binary("pl.maximum", torch.maximum),
    "min": minimum_of_scalars,
    "mul": operators.binary("pl.mul", torch.mul),
    "neg": operators.unary("pl.neg", torch.neg),
    "parallel": parallel,
    "range": range_,
    "read": operators.read,
    "reshape": operators.reshape,
    "row_expand_div": operators.expand("pl.row_expand_div", torch.div, 1),
    "row_expand_mul": operators.expand("pl.row_expand_mul", torch.mul, 1),
    "row_expand_sub": operators.expand("pl.row_expand_sub", torch.sub, 1),
    "row_max": operators.reduce_rows("pl.row_max", _row_max),
    "row_sum": operators.reduce_rows("pl.row_sum", _row_sum),
    "slice": operators.slice_,
    "sqrt": operators.unary("pl.sqrt", torch.sqrt),
    "sub": operators.binary("pl.sub", torch.sub),
    "tensor": SimpleNamespace(dim=operators.dim),
}


class _Language(ModuleType):
    def __getattr__(self, name: str) -> NoReturn:
        fail(f"pl.{name} is not emulated")


language = _Language("pypto.language, emulated")
vars(language).update(NAMES)
