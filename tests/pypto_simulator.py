"""Our kernels on a2a3sim, PyPTO's simulator of an Ascend 910B, with the PyPTO of April 2026.

That generation is the last whose parts can all be built without its makers' own LLVM. Its language
is older than the kernels': no inline functions, no ``x[a:b] = y``. So a kernel's source is
rewritten before it is parsed: helpers are spliced in with names of their own, constants become
numbers, a store to a window becomes the ``pl.assemble`` that it means. Nothing else changes, except
that a tile that is cut to its valid rows is cast first, as this generation's ``pl.cast`` forgets
what is valid.
"""

import ast
import copy
import importlib.util
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tilewright_kernels.contract import read_contract
from tilewright_kernels.qwen3_14b import source
from tilewright_kernels.qwen3_14b.shape import LayerShape

CORES = 3
"""Of 24, in threes. Each is three threads, which wait by spinning."""


def simulator_or_skip() -> None:
    """Skips the test where PyPTO's simulator, of the generation above, is not to be had."""
    try:
        import pypto.language as pl
        import simpler.worker  # noqa: F401
        from pypto.jit.decorator import _ptoas_available
        from pypto.runtime import device_runner  # noqa: F401
    except ImportError as error:
        pytest.skip(f"a2a3sim of the PyPTO of April 2026 is not importable: {error}")
    if hasattr(pl.jit, "inline"):
        pytest.skip("a2a3sim is run with the PyPTO of April 2026, and this one is newer")
    if not _ptoas_available():
        pytest.skip("a2a3sim needs ptoas: set PTOAS_ROOT")


def simulated(kernel: str, shape: LayerShape, folder: Path) -> Callable[[dict[str, Tensor]], None]:
    """The kernel on a2a3sim, working in place on tensors by name. It is built in the folder."""
    import pypto
    from pypto import ir
    from pypto.runtime import device_runner, runner

    pypto.set_log_level(pypto.LogLevel.ERROR)
    contract = read_contract(source.path(kernel), kernel, shape.constants(kernel))
    ir.compile(_program(kernel, shape, folder), output_dir=str(folder), platform="a2a3sim")
    runner._patch_orchestration_headers(folder)
    # Else one compiler for each of some forty tasks, all at once.
    device_runner.ThreadPoolExecutor = lambda max_workers: ThreadPoolExecutor(2)
    chip, runtime = device_runner.compile_and_assemble(folder, "a2a3sim")

    def run(tensors: dict[str, Tensor]) -> None:
        arguments = device_runner.ChipStorageTaskArgs()
        for tensor in contract.bind(tensors):
            arguments.add_tensor(device_runner.make_tensor_arg(tensor))
        device_runner.execute_on_device(
            chip, arguments, "a2a3sim", runtime, 0, block_dim=CORES, aicpu_thread_num=4
        )

    return run


def _program(kernel: str, shape: LayerShape, folder: Path) -> Any:
    name = f"{kernel}_flattened"
    file = folder / f"{name}.py"
    file.write_text(flattened(kernel, shape))
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module.Program


# --- the rewriting --------------------------------------------------------------------------------


def flattened(kernel: str, shape: LayerShape) -> str:
    """The source of a module whose ``Program`` is the kernel, as one function."""
    constants: dict[str, Any] = dict(shape.constants(kernel))
    functions: dict[str, ast.FunctionDef] = {}
    symbols: dict[str, ast.stmt] = {}
    for file in (source.path("blocks"), source.path(kernel)):
        for node in ast.parse(file.read_text()).body:
            match node:
                case ast.FunctionDef(name=name):
                    functions[name] = node
                case ast.Assign(targets=[ast.Name(id=name)], value=ast.Call()):
                    symbols[name] = node
                case ast.Assign(targets=[ast.Name(id=name)], value=value):
                    constants[name] = eval(ast.unparse(value), {}, constants)
    entry = functions.pop(kernel)
    body = list(_Splicer(functions, constants).spliced(entry.body, {}))
    _cast_before_cut(body)
    arguments = _Rewriter({}, constants).visit(entry.args)
    *_, last = body
    assert isinstance(last, ast.Return)
    result = next(a.annotation for a in arguments.args if a.arg == _name(last.value))
    arguments.args.insert(0, ast.arg("self"))
    function = ast.FunctionDef(
        # A task may have the kernel's name.
        name=f"{kernel}_entry",
        args=arguments,
        body=body,
        decorator_list=[_expression("pl.function(type=pl.FunctionType.Opaque)")],
        returns=result.slice,
        type_params=[],
    )
    program = ast.ClassDef("Program", [], [], [function], [_expression("pl.program")])
    module = ast.Module([*symbols.values(), program], [])
    return f"import pypto.language as pl\n\n{ast.unparse(ast.fix_missing_locations(module))}\n"


class _Splicer:
    """Puts the bodies of functions in the place of their calls."""

    def __init__(self, functions: Mapping[str, ast.FunctionDef], constants: Mapping[str, Any]):
        self.functions, self.constants = functions, constants
        self.serial = itertools.count(1)

    def spliced(self, body: list[ast.stmt], names: Mapping[str, ast.expr]) -> Iterator[ast.stmt]:
        rewriter = _Rewriter(names, self.constants)
        for node in copy.deepcopy(body):
            match node:
                case ast.Expr(value=ast.Constant()):
                    continue
                case ast.For() | ast.With():
                    inner = list(self.spliced(node.body, names))
                    node.body = []
                    outer = rewriter.visit(node)
                    outer.body = inner
                    yield outer
                case ast.Assign(value=ast.Call(func=ast.Name(id=name))) if name in self.functions:
                    call = rewriter.visit(node)
                    yield from self._call(
                        self.functions[name], call.value.args, _name(call.targets[0])
                    )
                case _:
                    yield rewriter.visit(node)

    def _call(
        self, function: ast.FunctionDef, given: list[ast.expr], target: str
    ) -> Iterator[ast.stmt]:
        serial = next(self.serial)
        names: dict[str, ast.expr] = {}
        for parameter, argument in zip(function.args.args, given, strict=True):
            names[parameter.arg] = argument
            if not isinstance(argument, ast.Name | ast.Constant):
                names[parameter.arg] = ast.Name(f"{parameter.arg}_{serial}", ast.Load())
                yield ast.Assign([ast.Name(f"{parameter.arg}_{serial}", ast.Store())], argument)
        for node in (n for statement in function.body for n in ast.walk(statement)):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.setdefault(node.id, ast.Name(f"{node.id}_{serial}", ast.Load()))
        *body, last = function.body
        assert isinstance(last, ast.Return)
        # A function writes the tensor that it is given for the result.
        assert _name(names[_name(last.value)]) == target, function.name
        yield from self.spliced(body, names)


class _Rewriter(ast.NodeTransformer):
    """Names by what they stand for, constants by their values, windows by slice and assemble."""

    def __init__(self, names: Mapping[str, ast.expr], constants: Mapping[str, Any]) -> None:
        self.names, self.constants = names, constants

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if node.id in self.constants:
            return _expression(repr(self.constants[node.id]))
        if node.id in self.names:
            found = copy.deepcopy(self.names[node.id])
            if isinstance(node.ctx, ast.Store):
                return ast.Name(_name(found), ast.Store())
            return found
        return node

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        self.generic_visit(node)
        if isinstance(node.left, ast.Constant) and isinstance(node.right, ast.Constant):
            return _expression(repr(eval(ast.unparse(node))))
        return node

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        self.generic_visit(node)
        match node.slice:
            case ast.Tuple(elts=parts) if all(isinstance(p, ast.Slice) for p in parts):
                extents = ", ".join(str(_extent(p)) for p in parts)
                of, offsets = ast.unparse(node.value), _offsets(parts)
                return _expression(f"pl.slice({of}, [{extents}], [{offsets}])")
        return node

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        match node:
            case ast.Call(func=ast.Attribute(attr="cast"), args=[x, dtype], keywords=[mode]):
                node.args, node.keywords = [x], [ast.keyword("target_type", dtype), mode]
        return node

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        match node.targets:
            case [ast.Subscript(value=target, slice=ast.Tuple(elts=parts))]:
                of, value = ast.unparse(self.visit(target)), ast.unparse(self.visit(node.value))
                offsets = _offsets([self.visit(p) for p in parts])
                return _statement(f"{of} = pl.assemble({of}, {value}, [{offsets}])")
        return self.generic_visit(node)


def _offsets(parts: list[Any]) -> str:
    return ", ".join(ast.unparse(p.lower) for p in parts)


def _extent(part: Any) -> int:
    """Upper bound less lower bound, a number once the terms that both have are dropped."""
    plus, minus = _terms(part.upper), _terms(part.lower)
    for term in list(minus):
        if term in plus:
            plus.remove(term)
            minus.remove(term)
    return sum(map(int, plus)) - sum(map(int, minus))


def _terms(node: ast.expr) -> list[str]:
    match node:
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _terms(left) + _terms(right)
    return [ast.unparse(node)]


def _cast_before_cut(body: list[ast.stmt]) -> None:
    """Split each task that cuts a tile, casts it and stores it: one casts, the next cuts."""
    sizes: dict[str, str] = {}
    for node in list(body):
        match node:
            case ast.Assign(
                targets=[ast.Name(id=name)],
                value=ast.Call(func=ast.Attribute(attr="create_tensor"), args=[size]),
            ):
                sizes[name] = ast.unparse(size)
            case ast.For():
                _cast_before_cut(node.body)
            case ast.With():
                match _innermost(node):
                    case [
                        ast.Assign(
                            targets=[ast.Name(id=part)],
                            value=ast.Call(
                                args=[ast.Name(id=of), extents, offsets],
                                keywords=[ast.keyword("valid_shape")],
                            ) as cut,
                        ),
                        ast.Assign(
                            value=ast.Call(
                                func=ast.Attribute(attr="assemble"),
                                args=[
                                    _,
                                    ast.Call(
                                        func=ast.Attribute(attr="cast"),
                                        args=[ast.Name(id=cast_of)],
                                        keywords=[ast.keyword(value=dtype), _],
                                    ) as cast,
                                    _,
                                ],
                            ) as store
                        ),
                    ] if cast_of == part:
                        first, scratch = copy.deepcopy(node), f"{of}_{part}"
                        cast.args = [ast.Call(cut.func, [ast.Name(of), extents, offsets], [])]
                        _innermost(first)[:] = [
                            _statement(
                                f"{scratch} = pl.assemble({scratch}, {ast.unparse(cast)}, "
                                f"{ast.unparse(offsets)})"
                            )
                        ]
                        cut.args[0], store.args[1] = ast.Name(scratch), ast.Name(part)
                        made = _statement(
                            f"{scratch} = pl.create_tensor({sizes[of]}, dtype={ast.unparse(dtype)})"
                        )
                        body[body.index(node) : body.index(node)] = [made, first]


def _innermost(task: ast.With) -> list[ast.stmt]:
    (*_, last) = task.body
    return last.body if isinstance(last, ast.For) else task.body


def _name(node: ast.AST | None) -> str:
    assert isinstance(node, ast.Name)
    return node.id


def _expression(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body


def _statement(text: str) -> ast.stmt:
    return ast.parse(text).body[0]
