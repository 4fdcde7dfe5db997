"""A kernel's parameters, read from its signature without an import. Arguments are passed by name.

PyPTO erases directions when a signature is evaluated (``pl.Out[X]`` is ``X``), so they are read
from the source, as PyPTO itself does.
"""

import ast
from collections.abc import Mapping
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
        wanted = f"kernel {self.kernel} wants {parameter.name} as {parameter.dtype} [" + (
            ", ".join(map(str, parameter.shape)) + "]"
        )
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
    """
    names: dict[str, int | float | str] = dict(constants)
    order = None
    for node in parsed(file).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
                order = node.value.value if name == "KV_ROW_ORDER" else order
            else:
                names[name] = _value(node.value, names)
        if isinstance(node, ast.FunctionDef) and node.name == kernel:
            parameters = tuple(_parameter(a, names) for a in node.args.args)
            return Contract(kernel, parameters, order)
    raise ExecutorError(f"{file} holds no kernel {kernel}")


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
        f"parameter {argument.arg} must be a pl.Tensor[[...], dtype], maybe in pl.Out or pl.InOut, "
        f"found {shown}"
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
    raise ExecutorError(f"not a constant: {ast.unparse(node)}")
