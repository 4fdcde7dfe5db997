"""A kernel's parameters, read from its signature without an import. Arguments are passed by name.

PyPTO erases directions when a signature is evaluated (``pl.Out[X]`` is ``X``), so they are read
from the source, as PyPTO itself does.
"""

import ast
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from attrs import frozen

from tilewright.errors import ExecutorError, listed, nearest

if TYPE_CHECKING:
    from torch import Tensor

Direction: TypeAlias = Literal["in", "out", "inout"]
DIRECTIONS: dict[str, Direction] = {"Out": "out", "InOut": "inout"}

DTYPES = {
    "BF16": "bfloat16",
    "FP16": "float16",
    "FP32": "float32",
    "INT32": "int32",
}
"""Maps PyPTO's names of dtypes to torch's."""


@frozen
class Parameter:
    """One tensor that a kernel takes."""

    name: str
    dtype: str
    """Name of the dtype in torch, without ``torch.``"""
    shape: tuple[int | str, ...]
    """Extents. A string is a symbol: any extent, but the same wherever the symbol occurs."""
    direction: Direction

    def __str__(self) -> str:
        return f"{self.dtype} [{', '.join(map(str, self.shape))}]"


@frozen
class Contract:
    kernel: str
    parameters: tuple[Parameter, ...]
    kv_row_order: str | None
    """``KV_ROW_ORDER`` of the kernel's module: how rows of the KV cache are ordered."""

    def bind(self, tensors: "Mapping[str, Tensor]") -> "list[Tensor]":
        """The tensors in the kernel's order. Raises ExecutorError for one that does not fit."""
        names = [p.name for p in self.parameters]
        missing = [n for n in names if n not in tensors]
        if missing:
            raise ExecutorError(f"kernel {self.kernel} was not given {listed(missing)}")
        for name in tensors:
            if name not in names:
                raise ExecutorError(
                    f"kernel {self.kernel} has no parameter {name!r}{nearest(name, names)}"
                )
        extents: dict[str, tuple[int, str]] = {}
        for parameter in self.parameters:
            self._check(parameter, tensors[parameter.name], extents)
        return [tensors[n] for n in names]

    def _check(
        self, parameter: Parameter, tensor: "Tensor", extents: dict[str, tuple[int, str]]
    ) -> None:
        wanted = f"kernel {self.kernel} wants {parameter.name} as {parameter}"
        dtype, shape = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
        if dtype != parameter.dtype or len(shape) != len(parameter.shape):
            raise ExecutorError(f"{wanted}, found {dtype} {list(shape)}")
        for extent, found in zip(parameter.shape, shape, strict=True):
            if isinstance(extent, int):
                if extent != found:
                    raise ExecutorError(f"{wanted}, found {list(shape)}")
                continue
            known, where = extents.setdefault(extent, (found, parameter.name))
            if known != found:
                raise ExecutorError(
                    f"{wanted}, found {list(shape)}: {extent} is {known} in {where}"
                )
        # A handle to device memory has no strides: it is contiguous.
        if hasattr(tensor, "is_contiguous") and not tensor.is_contiguous():
            raise ExecutorError(f"{wanted}, contiguous, found strides {list(tensor.stride())}")


def parsed(file: Path) -> ast.Module:
    """A source file's syntax tree. Raises ExecutorError if it cannot be read or parsed."""
    try:
        return ast.parse(file.read_text(encoding="utf-8"), str(file))
    except OSError as error:
        raise ExecutorError(f"{file}: {error.strerror or error}: expected kernel source") from error
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None) or 1
        raise ExecutorError(f"{file}:{line}: {getattr(error, 'msg', error)}") from error


def read_contract(file: Path, kernel: str, constants: Mapping[str, int | float]) -> Contract:
    """The contract of the function ``kernel`` in a source file.

    constants: the values of names that the file imports. Names that it computes from them, and
    symbols that it makes with ``pl.dynamic``, are read from the file itself.

    Raises ExecutorError, with file and line, for a file that cannot be parsed or lacks the kernel,
    and for a name or a parameter that cannot be read.
    """
    names: dict[str, int | float | str] = dict(constants)
    parameters, order = None, None
    for node in parsed(file).body:
        match node:
            case (
                ast.Assign(targets=[ast.Name(id=name)], value=value)
                | ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value)
            ):
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    order = value.value if name == "KV_ROW_ORDER" else order
                # What has no value matters only where a parameter's shape uses it.
                with suppress(ExecutorError, ArithmeticError):
                    names[name] = _value(value, names)
        if isinstance(node, ast.FunctionDef) and node.name == kernel:
            _check_decorated(node, file)
            parameters = tuple(_parameters(node, names, file))
    if parameters is None:
        raise ExecutorError(f"{file} has no function {kernel}: name the kernel like its module")
    return Contract(kernel, parameters, order)


def _check_decorated(kernel: ast.FunctionDef, file: Path) -> None:
    """``@pl.jit``, or a call of it."""
    decorators = (d.func if isinstance(d, ast.Call) else d for d in kernel.decorator_list)
    if not any(isinstance(d, ast.Attribute) and d.attr == "jit" for d in decorators):
        found = " ".join(f"@{ast.unparse(d)}" for d in kernel.decorator_list) or "no decorator"
        raise ExecutorError(
            f"{file}:{kernel.lineno}: kernel {kernel.name} has {found}: expected @pl.jit"
        )


def _parameters(
    kernel: ast.FunctionDef, names: Mapping[str, int | float | str], file: Path
) -> Iterator[Parameter]:
    found = kernel.args
    if found.posonlyargs or found.kwonlyargs or found.vararg or found.kwarg:
        raise ExecutorError(
            f"{file}:{kernel.lineno}: kernel {kernel.name} must have plain parameters, found "
            f"({ast.unparse(found)})"
        )
    for argument in found.args:
        try:
            yield _parameter(argument, names)
        except (ExecutorError, ArithmeticError) as error:
            raise ExecutorError(
                f"{file}:{argument.lineno}: kernel {kernel.name}, parameter {argument.arg}: {error}"
            ) from error


def _parameter(argument: ast.arg, names: Mapping[str, int | float | str]) -> Parameter:
    match argument.annotation:
        case ast.Subscript(value=ast.Attribute(attr="Out" | "InOut" as directed), slice=annotation):
            direction = DIRECTIONS[directed]
        case annotation:
            direction = "in"
    match annotation:
        case ast.Subscript(
            value=ast.Attribute(attr="Tensor"),
            slice=ast.Tuple(elts=[ast.List(elts=extents), ast.Attribute(attr=dtype)]),
        ) if dtype in DTYPES:
            shape = tuple(_extent(e, names) for e in extents)
            return Parameter(argument.arg, DTYPES[dtype], shape, direction)
    shown = ast.unparse(annotation) if annotation else "nothing"
    raise ExecutorError(
        f"expected pl.Tensor[[...], dtype], maybe in pl.Out or pl.InOut, found {shown} (dtypes: "
        f"{', '.join(DTYPES)})"
    )


def _extent(node: ast.expr, names: Mapping[str, int | float | str]) -> int | str:
    value = _value(node, names)
    if isinstance(value, float):
        raise ExecutorError(f"an extent must be a whole number, found {ast.unparse(node)}")
    return value


def _value(node: ast.expr, names: Mapping[str, int | float | str]) -> int | float | str:
    """A constant expression, or the name of a symbol."""
    match node:
        case ast.Constant(value=int() | float() as value):
            return value
        case ast.Name(id=name) if name in names:
            return names[name]
        case ast.Call(func=ast.Attribute(attr="dynamic"), args=[ast.Constant(value=str() as name)]):
            return name
        case ast.BinOp(left=left, op=op, right=right):
            a, b = _value(left, names), _value(right, names)
            if not isinstance(a, str) and not isinstance(b, str):
                match op:
                    case ast.Add():
                        return a + b
                    case ast.Sub():
                        return a - b
                    case ast.Mult():
                        return a * b
                    case ast.FloorDiv():
                        return a // b
                    case ast.Div():
                        return a / b
    raise ExecutorError(
        f"{ast.unparse(node)} has no value: expected a number, pl.dynamic(...), or a name that the "
        "file computes or the kernel's constants hold"
    )
