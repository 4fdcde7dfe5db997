"""Variable names that PyPTO's generated C++ confuses, refused before PyPTO sees the kernel.

PyPTO generates C++ for what a kernel does outside its tasks, and keeps the kernel's variable names.
It makes most names unique, but not those of loop variables and of ``pl.dynamic`` symbols: where two
variables have one name, the inner one hides the outer one, and the kernel computes with the wrong
value, without an error. The rules were found in PyPTO e2d0f78 (its orchestration_codegen.cpp and
tensor_op_codegen.cpp); pypto#2627 is of the same kind. Local names of inline functions get a serial
number, which makes them unique, but the rules hold for them too: the code may move into a kernel.

A task becomes a C++ function, called as its ``name_hint``, beside pto-isa's types and functions.
"""

import ast
import re
from collections.abc import Collection, Iterator
from keyword import iskeyword
from pathlib import Path
from typing import TypeGuard

from tilewright.errors import ExecutorError
from tilewright_kernels.contract import parsed

TEMPORARY = "t"
"""PyPTO's name for the result of a ``pl.read``, or of another call within an expression."""
NUMBERED = re.compile(
    r"(alloc|scope_guard)_\d+|params_t\d+(_.*)?|task_\d+_outs|(params_)?phase_fence_barrier_\d+_.*|"
    r"dynamic_compiler_dep_tids(_.*)?|\w+_inline\d+"
)
"""Names that PyPTO generates; the last form is that of an inline function's local variable."""
DERIVED = (
    (re.compile(r"ext_(\w+)"), "a parameter"),
    (re.compile(r"indices_(\w+)"), "a variable"),
    (
        re.compile(r"(\w+?)_(?:ci|ci_shapes|shapes|offsets|view|tid|logical_fp4_offset|v\d+)"),
        "a variable",
    ),
)
"""Forms of names that PyPTO generates from another name, and what that must be."""
KEYWORDS = frozenset(
    re.findall(
        r"\w+",
        """
    alignas alignof and_eq asm auto bitand bitor bool case catch char char8_t char16_t char32_t
    co_await co_return co_yield compl concept const const_cast consteval constexpr constinit
    decltype default delete do double dynamic_cast enum explicit export extern false float friend
    goto inline int long mutable namespace new noexcept not_eq nullptr operator or_eq private
    protected public register reinterpret_cast requires short signed sizeof static static_assert
    static_cast struct switch template this thread_local throw true typedef typeid typename union
    unsigned using virtual void volatile wchar_t xor xor_eq
    int8_t int16_t int32_t int64_t uint8_t uint16_t uint32_t uint64_t size_t
        """,
    )
)
"""C++ keywords that are not Python's, and integer types."""
CPLUSPLUS = KEYWORDS | frozenset(
    re.findall(
        r"\w+",
        """
    alloc_tensors from_u64 get_tensor_data orch_args rt_orch_profile_now rt_submit_aic_task
    rt_submit_aiv_task rt_submit_task set_tensor_data ChipTensor ChipTaskArgs CoreTaskArgs DataType
    PTO2TaskId PTO2_SCOPE TaskOutputTensors TensorCreateInfo
        """,
    )
)
"""What no variable may be called, with the types and functions that the generated code uses."""
TASK_CPLUSPLUS = KEYWORDS | frozenset(
    re.findall(
        r"\w+",
        """
    assert bfloat16_t cce comm cpu detail event_t float16_t float32_t half main mem_dsb_t pipe_t pto
    set_mask_norm set_vector_mask std stderr uint uintptr_t
    GlobalTensor Layout PadValue RoundMode SaturationMode Shape Stride Tile TileAcc TileLeft
    TileRight
        """,
    )
)
"""What no task may be called: g++ 12 refused each as a function, after pto-isa's headers."""


def check_file(file: Path) -> None:
    """Check all kernels and inline functions of a file.

    Raises ExecutorError for the first name that PyPTO or the C++ compiler would refuse or confuse,
    with file, line and reason.
    """
    tree = parsed(file)
    symbols = {
        str(node.args[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "pl.dynamic"
        and isinstance(node.args[0], ast.Constant)
    }
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.decorator_list:
            check_function(node, symbols, str(file))


def check_function(
    function: ast.FunctionDef, symbols: Collection[str], file: str, first_line: int = 1
) -> None:
    """As ``check_file``, for one function.

    symbols: names of ``pl.dynamic`` extents, of the file or of the function's parameters.
    first_line: line number in the file of line 1 of the syntax tree.
    """
    for node, name, why in _misnamed(function, frozenset(symbols)):
        raise ExecutorError(
            f"{file}:{first_line + node.lineno - 1}: {function.name}: rename {name}: {why}"
        )
    for part in ast.walk(function):
        match part:
            case ast.keyword(arg="name_hint", value=ast.Constant(value=str() as name)) if name and (
                not name.isidentifier() or iskeyword(name) or name in TASK_CPLUSPLUS
            ):
                raise ExecutorError(
                    f"{file}:{first_line + part.lineno - 1}: {function.name}: rename name_hint "
                    f"{name!r}: the generated C++ cannot have a function of that name"
                )


def _misnamed(
    function: ast.FunctionDef, symbols: frozenset[str]
) -> Iterator[tuple[ast.arg | ast.Name, str, str]]:
    """The node, the name and the reason of each name that PyPTO would confuse."""
    parameters = {a: a.arg for a in ast.walk(function.args) if isinstance(a, ast.arg)}
    variables = {n: n.id for n in ast.walk(function) if _is_stored(n)}
    loops = dict(_loops(function))
    places = parameters | variables
    names = {"a parameter": {*parameters.values()}, "a variable": {*places.values(), TEMPORARY}}
    others = {name for place, name in places.items() if place not in loops}
    for place in sorted(places, key=lambda p: (p.lineno, p.col_offset)):
        name = places[place]
        of = next((o for o, kind in _origins(name) if o in names[kind]), None)
        if name.endswith("_") or "__" in name:
            why = "PyPTO appends __ and more to every name, and cuts names at the first __"
        elif name in CPLUSPLUS:
            why = "the generated C++ cannot have a variable of that name"
        elif NUMBERED.fullmatch(name):
            why = "PyPTO generates names of that form"
        elif of is not None:
            why = f"PyPTO generates that name from {of}"
        elif name in symbols and place in variables:
            why = f'pl.dynamic("{name}") becomes a variable of that name'
        elif place in loops and name == TEMPORARY:
            why = f"PyPTO calls its temporaries {name}, and one would hide this loop's variable"
        elif place in loops and name in others:
            why = "this loop's variable would hide another variable of that name"
        elif place in loops and any(n.id == name for s in loops[place].body for n, _ in _loops(s)):
            why = "an inner loop has a variable of that name, which would hide this one"
        else:
            continue
        yield place, name, why


def _origins(name: str) -> Iterator[tuple[str, str]]:
    """The names that PyPTO might generate this one from, and what each must be."""
    for form, kind in DERIVED:
        if found := form.fullmatch(name):
            yield found[1], kind


def _loops(root: ast.AST) -> Iterator[tuple[ast.Name, ast.For]]:
    """Each loop variable, and its loop."""
    for loop in ast.walk(root):
        if isinstance(loop, ast.For):
            yield from ((n, loop) for n in ast.walk(loop.target) if _is_stored(n))


def _is_stored(node: ast.AST) -> TypeGuard[ast.Name]:
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
