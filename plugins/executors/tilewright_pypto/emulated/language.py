"""A stand-in for ``pypto.language``: runs a kernel's own source on PyTorch, and checks it.

It has a part of the language, which docs/kernel-language.md lists, and is strict where a device is
silent. What PyPTO refuses is refused. Faults that PyPTO accepts but that break on
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
from types import FunctionType, ModuleType
from typing import Any, NoReturn, TypeGuard

import torch
from attrs import frozen

from tilewright.errors import ExecutorError
from tilewright.plugins import cause
from tilewright_kernels.contract import Contract, Parameter
from tilewright_kernels.names import check_function
from tilewright_pypto.emulated import missing, operators
from tilewright_pypto.emulated.memory import (
    Buffer,
    KernelError,
    Loop,
    Memory,
    Run,
    Task,
    call,
    fail,
    in_task,
    outside_task,
    poison,
    running,
)

# --- types in signatures --------------------------------------------------------------------------


@frozen
class Dynamic:
    """An extent of a parameter that is known when the kernel runs; in a module, not in a kernel."""

    name: str


@frozen
class TensorType:
    shape: tuple["int | Dynamic", ...]
    dtype: torch.dtype
    direction: Any = "in"


class _TensorOf:
    """A parameter's type, ``pl.Tensor[[ROWS, COLUMNS], pl.BF16]``: an input, or any argument of an
    inline function, which also takes ``pl.Tensor`` alone for a tensor of any shape.
    """

    def __getitem__(self, of: tuple[Sequence["int | Dynamic"], torch.dtype]) -> TensorType:
        shape, dtype = of
        return TensorType(tuple(shape), dtype)


@frozen
class _Directed:
    direction: str
    __doc__: str

    def __getitem__(self, of: TensorType) -> TensorType:
        return TensorType(of.shape, of.dtype, self.direction)


class _ScalarOf:
    """The type of a number that an inline function takes: ``pl.Scalar[pl.INDEX]``."""

    def __getitem__(self, of: object) -> None:
        return None


class Level(Enum):
    """``pl.Level.CORE_GROUP``, the level of pl.at.

    Not emulated: other levels.
    """

    CORE_GROUP = "core group"


class PadValue:
    """What pl.fillpad fills with: ``pl.PadValue.zero``, ``min`` (-inf) or ``max`` (inf).

    Not emulated: ``null``.
    """

    zero = 0.0
    min = -math.inf
    max = math.inf


# --- control flow ---------------------------------------------------------------------------------


@contextmanager
def at(level: Level, *, name_hint: str = "") -> Iterator[None]:
    """``with pl.at(...):`` is a task, the only place for operators and stores. Tasks do not nest.

    A task waits for those that wrote what it reads, but not for those that read what it writes.

    Not emulated: ``role``, ``optimizations``, ``deps``, ``no_dep_args``, ``dumps``,
    ``allow_early_resolve``, ``windowize``.
    """
    run = outside_task("pl.at")
    run.task = Task(run.tasks)
    run.tasks += 1
    yield
    run.task.end()
    run.task = None


def range_(*bounds: int) -> Iterator[int]:
    """A loop in order, with bounds as in Python's range. A name bound again keeps its last value.

    Not emulated: ``init_values``.
    """
    running()
    return iter(range(*bounds))


def unroll(*bounds: int) -> Iterator[int]:
    """As pl.range, with bounds that are constants of the module: PyPTO repeats the body."""
    running()
    return iter(range(*bounds))


def pipeline(*bounds: int, stage: int) -> Iterator[int]:
    """As pl.range, in a task; on a device, ``stage`` iterations overlap.

    Not emulated: outside tasks; ``init_values``.
    """
    in_task("pl.pipeline")
    if stage < 1:
        fail(f"pl.pipeline expects a stage of at least 1, found {stage}")
    return iter(range(*bounds))


def parallel(*bounds: int) -> Iterator[int]:
    """A loop outside tasks, with iterations in any order: here random. Two of them must not use a
    place that one of them writes, which is checked.

    Not emulated: ``init_values``.
    """
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
    """``@pl.jit.inline`` marks a function of tensors and numbers that PyPTO splices into kernels.

    It is called by position and must return what it wrote. Arguments must match the annotations.
    """
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

    nodes = [n for statement in definition.body for n in ast.walk(statement)]
    variables = {a.arg for a in ast.walk(definition.args) if isinstance(a, ast.arg)}
    variables |= {n.id for n in nodes if _is_name(n) and isinstance(n.ctx, ast.Store)}
    for node in nodes:
        for kind, what in REFUSED.items():
            if isinstance(node, kind):
                refuse(node, f"an unsupported construct: {what}")
        if isinstance(node, ast.For) and not _is_loop(node.iter):
            refuse(node, f"a loop over {ast.unparse(node.iter)}: use pl.range or pl.parallel")
        match node:
            case ast.Attribute(value=ast.Name(id="pl"), attr=name) if name not in NAMES:
                refuse(node, missing.explained(name, NAMES))
            case ast.Attribute(
                value=ast.Attribute(value=ast.Name(id="pl"), attr=space), attr=name
            ) if space in NAMES and not hasattr(NAMES[space], name):
                refuse(node, f"pl.{space}.{name}, which is not emulated ({missing.TABLE})")
            case ast.Call(func=ast.Attribute(value=ast.Name(id="pl"), attr="unroll"), args=bounds):
                names = {n.id for bound in bounds for n in ast.walk(bound) if _is_name(n)}
                if local := sorted(names & variables):
                    refuse(node, f"pl.unroll with {local[0]}: its bounds must be constants")
    types = (t for t in function.__annotations__.values() if isinstance(t, TensorType))
    symbols = {extent.name for t in types for extent in t.shape if isinstance(extent, Dynamic)}
    check_function(definition, symbols, str(file), first)


def _is_loop(node: ast.expr) -> bool:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and ast.unparse(node.func) in ("pl.range", "pl.parallel", "pl.unroll", "pl.pipeline")
    )


def _is_name(node: ast.AST) -> TypeGuard[ast.Name]:
    return isinstance(node, ast.Name)


# --- the module -----------------------------------------------------------------------------------


def minimum_of_scalars(lhs: int, rhs: int) -> int:
    """The smaller of two numbers, not tiles."""
    return min(lhs, rhs)


def maximum_of_scalars(lhs: int, rhs: int) -> int:
    """The larger of two numbers, not tiles."""
    return max(lhs, rhs)


def _larger(x: torch.Tensor, other: "torch.Tensor | float") -> torch.Tensor:
    return torch.maximum(x, torch.as_tensor(other, dtype=x.dtype))


def _smaller(x: torch.Tensor, other: "torch.Tensor | float") -> torch.Tensor:
    return torch.minimum(x, torch.as_tensor(other, dtype=x.dtype))


def _exp_of_difference(x: torch.Tensor, line: torch.Tensor) -> torch.Tensor:
    return (x - line).exp()


class _Jit:
    """``@pl.jit`` marks a kernel. All parameters are pl.Tensor, in pl.Out or pl.InOut if written.

    Not emulated: ``auto_scope``; ``pl.jit.incore``, ``host``, ``opaque`` and ``extern``.
    """

    inline = staticmethod(inline)

    def __call__(self, function: Callable[..., Any]) -> Kernel:
        return jit(function)

    def __getattr__(self, name: str) -> NoReturn:
        fail(f"pl.jit.{name} is not emulated ({missing.TABLE})")


class _OfTensors:
    """Operators by their full names; the others are used as ``pl.NAME``."""

    dim = staticmethod(operators.dim)


def _bound(name: str, function: FunctionType) -> Callable[..., Any]:
    """The function, with a KernelError for arguments that it does not take."""
    signature = inspect.signature(function)

    @wraps(function)
    def called(*arguments: Any, **named: Any) -> Any:
        try:
            return function(*arguments, **named)
        except TypeError:
            try:
                signature.bind(*arguments, **named)
            except TypeError as error:
                shown = ", ".join(map(str, signature.replace(return_annotation=()).parameters))
                fail(f"pl.{name}({shown}) {error}: {missing.TABLE} lists what is emulated")
            raise

    return called


_BOTH = "Two tiles of one shape, or a tile and a number: "

_ALL: dict[str, Any] = {
    "BF16": torch.bfloat16,
    "FP16": torch.float16,
    "FP32": torch.float32,
    "INT32": torch.int32,
    "INDEX": operators.INDEX,
    "InOut": _Directed("inout", "``pl.InOut[pl.Tensor[...]]``: a parameter, read and written."),
    "Level": Level,
    "Out": _Directed("out", "``pl.Out[pl.Tensor[...]]``: a parameter, to be written completely."),
    "PadValue": PadValue,
    "Scalar": _ScalarOf(),
    "Tensor": _TensorOf(),
    "abs": operators.unary("pl.abs", "The absolute value of each element.", torch.abs),
    "add": operators.binary("pl.add", _BOTH + "the sum.", torch.add),
    "assemble": operators.assemble,
    "at": at,
    "cast": operators.cast,
    "col_expand_add": operators.expand(
        "pl.col_expand_add", "lhs [M, N] plus the row rhs [1, N].", torch.add, 0
    ),
    "col_expand_div": operators.expand(
        "pl.col_expand_div", "lhs [M, N] divided by the row rhs [1, N].", torch.div, 0
    ),
    "col_expand_max": operators.expand(
        "pl.col_expand_max", "The larger of lhs [M, N] and the row rhs [1, N].", torch.maximum, 0
    ),
    "col_expand_min": operators.expand(
        "pl.col_expand_min", "The smaller of lhs [M, N] and the row rhs [1, N].", torch.minimum, 0
    ),
    "col_expand_mul": operators.expand(
        "pl.col_expand_mul", "lhs [M, N] times the row rhs [1, N].", torch.mul, 0
    ),
    "col_expand_sub": operators.expand(
        "pl.col_expand_sub", "lhs [M, N] minus the row rhs [1, N].", torch.sub, 0
    ),
    "col_max": operators.reduce(
        "pl.col_max", "The largest element of each column: [1, N]. Rows must all be valid.",
        lambda x: x.amax(0, keepdim=True), 0,
    ),
    "col_min": operators.reduce(
        "pl.col_min", "The smallest element of each column: [1, N]. Rows must all be valid.",
        lambda x: x.amin(0, keepdim=True), 0,
    ),
    "col_sum": operators.reduce(
        "pl.col_sum", "The sum of each column: [1, N]. Rows must all be valid.",
        lambda x: x.sum(0, keepdim=True), 0,
    ),
    "concat": operators.concat,
    "create_tensor": operators.create_tensor,
    "dim": operators.dim,
    "div": operators.binary(
        "pl.div", _BOTH + "the quotient.\n\nNot emulated: ``high_precision``.", torch.div
    ),
    "dynamic": Dynamic,
    "exp": operators.unary("pl.exp", "e to the power of each element.", torch.exp),
    "fillpad": operators.fillpad,
    "full": operators.full,
    "jit": _Jit(),
    "log": operators.unary(
        "pl.log", "The natural logarithm of each element.\n\nNot emulated: ``high_precision``.",
        torch.log,
    ),
    "matmul": operators.matmul,
    "matmul_acc": operators.matmul_acc,
    "max": maximum_of_scalars,
    "maximum": operators.binary("pl.maximum", _BOTH + "the larger.", _larger),
    "min": minimum_of_scalars,
    "minimum": operators.binary("pl.minimum", _BOTH + "the smaller.", _smaller),
    "mul": operators.binary("pl.mul", _BOTH + "the product.", torch.mul),
    "neg": operators.unary("pl.neg", "Minus each element.", torch.neg),
    "parallel": parallel,
    "pipeline": pipeline,
    "range": range_,
    "read": operators.read,
    "recip": operators.unary(
        "pl.recip", "1 divided by each element.\n\nNot emulated: ``high_precision``.",
        torch.reciprocal,
    ),
    "reshape": operators.reshape,
    "row_expand_add": operators.expand(
        "pl.row_expand_add", "lhs [M, N] plus the column rhs [M, 1].", torch.add, 1
    ),
    "row_expand_div": operators.expand(
        "pl.row_expand_div", "lhs [M, N] divided by the column rhs [M, 1].", torch.div, 1
    ),
    "row_expand_expdif": operators.expand(
        "pl.row_expand_expdif", "e to the power of lhs [M, N] minus the column rhs [M, 1].",
        _exp_of_difference, 1,
    ),
    "row_expand_max": operators.expand(
        "pl.row_expand_max", "The larger of lhs [M, N] and the column rhs [M, 1].",
        torch.maximum, 1,
    ),
    "row_expand_min": operators.expand(
        "pl.row_expand_min", "The smaller of lhs [M, N] and the column rhs [M, 1].",
        torch.minimum, 1,
    ),
    "row_expand_mul": operators.expand(
        "pl.row_expand_mul", "lhs [M, N] times the column rhs [M, 1].", torch.mul, 1
    ),
    "row_expand_sub": operators.expand(
        "pl.row_expand_sub", "lhs [M, N] minus the column rhs [M, 1].", torch.sub, 1
    ),
    "row_max": operators.reduce(
        "pl.row_max", "The largest element of each row: [M, 1]. Columns must all be valid.",
        lambda x: x.amax(-1, keepdim=True), 1,
    ),
    "row_min": operators.reduce(
        "pl.row_min", "The smallest element of each row: [M, 1]. Columns must all be valid.",
        lambda x: x.amin(-1, keepdim=True), 1,
    ),
    "row_sum": operators.reduce(
        "pl.row_sum", "The sum of each row: [M, 1]. Columns must all be valid.",
        lambda x: x.sum(-1, keepdim=True), 1,
    ),
    "rsqrt": operators.unary(
        "pl.rsqrt",
        "1 divided by the square root of each element.\n\nNot emulated: ``high_precision``.",
        torch.rsqrt,
    ),
    "slice": operators.slice_,
    "sqrt": operators.unary("pl.sqrt", "The square root of each element.", torch.sqrt),
    "sub": operators.binary("pl.sub", _BOTH + "the difference.", torch.sub),
    "tensor": _OfTensors,
    "transpose": operators.transpose,
    "unroll": unroll,
}  # fmt: skip

NAMES: dict[str, Any] = {
    name: _bound(name, what) if isinstance(what, FunctionType) else what
    for name, what in _ALL.items()
}
"""Everything that ``pl`` has."""


class _Language(ModuleType):
    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        fail(missing.explained(name, NAMES))


language = _Language("pypto.language, emulated")
vars(language).update(NAMES)
