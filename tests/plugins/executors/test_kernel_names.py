"""Names that collide in PyPTO's generated C++ are refused; PyPTO and g++ confirm the rules."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
from pypto_oracle import orchestration_complaints, pypto_or_skip

from tilewright.errors import ExecutorError
from tilewright_kernels import source
from tilewright_kernels.names import check_file
from tilewright_kernels.qwen3_14b.plugin import KERNELS, SOURCES, kernels_of
from tilewright_kernels.qwen3_14b.shape import DEMO
from tilewright_pypto.emulated import language

KERNEL = """
import pypto.language as pl

N = 32
B = pl.dynamic("B")
R = pl.dynamic("R")


@pl.jit.inline
def store(x: pl.Tensor[[16, N], pl.FP32], row: pl.Scalar[pl.INDEX], y: pl.Tensor[[R, N], pl.FP32]):
    with pl.at(level=pl.Level.CORE_GROUP, name_hint="store"):
        y[row : row + 16, 0:N] = pl.add(x[0:16, 0:N], 1.0)
    return y


@pl.jit
def kernel(
    lens: pl.Tensor[[B], pl.INT32],
    x: pl.Tensor[[16, N], pl.FP32],
    out: pl.Out[pl.Tensor[[R, N], pl.FP32]],
):
    batch = pl.tensor.dim(lens, 0)
{body}
    return out
"""
FIRST_LINE = 1 + KERNEL[: KERNEL.index("{body}")].count("\n")
"""The line of the file that the body begins in."""


def loop(variable: str, kind: str = "range") -> str:
    return f"""\
for {variable} in pl.{kind}(batch):
    row = pl.cast(pl.read(lens, [{variable}]), pl.INDEX) + {variable} * 16
    out = store(x, row, out)
"""


def local(name: str) -> str:
    return f"""\
for i in pl.range(batch):
    {name} = pl.cast(pl.read(lens, [i]), pl.INDEX) + i * 16
    out = store(x, {name}, out)
"""


def outer(name: str) -> str:
    """A local that is read in a loop whose generated code may define the same name again."""
    return f"""\
{name} = pl.cast(pl.read(lens, [0]), pl.INDEX)
for i in pl.range(batch):
    y = pl.create_tensor([16, N], dtype=pl.FP32)
    y = store(x, 0, y)
    row = pl.cast(pl.read(lens, [i]), pl.INDEX) + {name}
    out = store(y, row, out)
"""


CONFUSED = {
    # The body, the line in it, the name that is refused, and the reason in the error.
    "a parallel loop's temporary": (loop("t", "parallel"), 0, "t", "calls its temporaries t"),
    "a temporary": (loop("t"), 0, "t", "calls its temporaries t"),
    "a temporary before the loop": (
        """\
first = pl.cast(pl.read(lens, [0]), pl.INDEX)
for t in pl.range(batch):
    out = store(x, first + t * 16, out)
""",
        1,
        "t",
        "calls its temporaries t",
    ),
    "an underscore at the end": (loop("t_"), 0, "t_", "cuts names at the first __"),
    "two underscores": (loop("t__x"), 0, "t__x", "cuts names at the first __"),
    "an underscore, within another loop": (
        """\
for i in pl.range(batch):
    for _ in pl.range(2):
        row = pl.cast(pl.read(lens, [i]), pl.INDEX) + i * 16
        out = store(x, row, out)
""",
        1,
        "_",
        "cuts names at the first __",
    ),
    "a loop within a loop": (
        """\
for i in pl.range(batch):
    for i in pl.range(2):
        out = store(x, i * 16, out)
""",
        0,
        "i",
        "an inner loop has a variable",
    ),
    "an earlier local": (
        """\
i = pl.cast(pl.read(lens, [0]), pl.INDEX)
first = i + 1
for i in pl.range(batch):
    out = store(x, first + i * 16, out)
""",
        2,
        "i",
        "would hide another variable",
    ),
    "a loop's variable that gets another value": (
        """\
for i in pl.range(batch):
    i = i + 1
    out = store(x, i * 16, out)
""",
        0,
        "i",
        "would hide another variable",
    ),
    "an extent, by a loop": (loop("B"), 0, "B", 'pl.dynamic("B")'),
    "an extent, by a local": (local("B"), 1, "B", 'pl.dynamic("B")'),
    "the arguments": (loop("orch_args"), 0, "orch_args", "cannot have a variable"),
    "a parameter": (loop("ext_lens"), 0, "ext_lens", "generates that name from lens"),
    "a parameter, by a local": (outer("ext_lens"), 0, "ext_lens", "generates that name from lens"),
    "an index": (loop("indices_t"), 0, "indices_t", "generates that name from t"),
    "a task's arguments": (loop("params_t0"), 0, "params_t0", "generates names of that form"),
    "a task's arguments, by a local": (
        outer("params_t1"),
        0,
        "params_t1",
        "generates names of that form",
    ),
    "an allocation": (outer("alloc_0"), 0, "alloc_0", "generates names of that form"),
    "a scope": (loop("scope_guard_0"), 0, "scope_guard_0", "generates names of that form"),
    "a tensor's create info": (outer("y_ci"), 0, "y_ci", "generates that name from y"),
    "the shape in a tensor's create info": (
        outer("y_ci_shapes"),
        0,
        "y_ci_shapes",
        "generates that name from y",
    ),
    "the shape of a view": (
        """\
for i in pl.range(batch):
    view_shapes = i * 8
    for j in pl.range(2):
        view = pl.reshape(x, [8, 64])
        with pl.at(level=pl.Level.CORE_GROUP, name_hint="copy"):
            out[view_shapes + j : view_shapes + j + 8, 0:N] = pl.add(view[0:8, 0:N], 1.0)
""",
        1,
        "view_shapes",
        "generates that name from view",
    ),
    "the shape of a view whose name begins as a parameter's does": (
        """\
for i in pl.range(batch):
    ext_view_shapes = i * 8
    for j in pl.range(2):
        ext_view = pl.reshape(x, [8, 64])
        with pl.at(level=pl.Level.CORE_GROUP, name_hint="copy"):
            row = ext_view_shapes + j
            out[row : row + 8, 0:N] = pl.add(ext_view[0:8, 0:N], 1.0)
""",
        1,
        "ext_view_shapes",
        "generates that name from ext_view",
    ),
    "a keyword": (loop("new"), 0, "new", "cannot have a variable"),
    "a keyword, by a local": (local("template"), 1, "template", "cannot have a variable"),
    "a type": (loop("int32_t"), 0, "int32_t", "cannot have a variable"),
    "a function": (loop("get_tensor_data"), 0, "get_tensor_data", "cannot have a variable"),
}
KEPT_APART = {
    "a temporary, by a local": local("t"),
    "loops one after the other": loop("i") + loop("i"),
    "a local within a loop and after it": local("row") + "row = batch - 1\n",
    "a loop's variable and an inline function's parameter": loop("y"),
    "what only looks like a name of PyPTO's": loop("tail_shapes") + loop("ext_row"),
    "a value that a loop carries": """\
row = 0
for i in pl.range(batch):
    out = store(x, row, out)
    row = row + 16
""",
}


def written(folder: Path, body: str) -> Path:
    file = folder / "planted.py"
    indented = "".join(f"    {line}\n" for line in body.splitlines())
    file.write_text(KERNEL.replace("{body}\n", indented))
    return file


@pytest.mark.parametrize("what", CONFUSED)
def test_a_name_that_collides_in_generated_code_is_refused_with_its_line(what, tmp_path):
    body, line, name, why = CONFUSED[what]
    file = written(tmp_path, body)
    with pytest.raises(ExecutorError) as error:
        check_file(file)
    (said,) = str(error.value).splitlines()
    assert said.startswith(f"{file}:{FIRST_LINE + line}: kernel: rename {name}: ")
    assert why in said


@pytest.mark.parametrize("what", KEPT_APART)
def test_a_name_that_stays_distinct_in_generated_code_is_accepted(what, tmp_path):
    check_file(written(tmp_path, KEPT_APART[what]))


@pytest.mark.pypto
@pytest.mark.parametrize("what", CONFUSED)
def test_refused_names_collide_in_the_code_that_pypto_generates(what, tmp_path):
    body, *_ = CONFUSED[what]
    assert complaints_about(written(tmp_path, body), tmp_path)


@pytest.mark.pypto
@pytest.mark.parametrize("what", KEPT_APART)
def test_accepted_names_stay_distinct_in_the_code_that_pypto_generates(what, tmp_path):
    assert complaints_about(written(tmp_path, KEPT_APART[what]), tmp_path) == []


def complaints_about(file: Path, folder: Path) -> list[str]:
    pypto_or_skip()
    return orchestration_complaints(defined_in(file).kernel, folder)


def defined_in(file: Path) -> Any:
    spec = spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["half", "event_t", "cpu", "template", "class", "Tile", "a b"])
def test_a_task_that_cannot_be_a_function_in_the_generated_code_is_refused(name, tmp_path):
    text = KERNEL.format(body="").replace('name_hint="store"', f'name_hint="{name}"')
    (tmp_path / "kernel.py").write_text(text)
    with pytest.raises(ExecutorError) as error:
        check_file(tmp_path / "kernel.py")
    line = 1 + text[: text.index("name_hint")].count("\n")
    assert str(error.value) == (
        f"{tmp_path / 'kernel.py'}:{line}: store: rename name_hint {name!r}: the generated C++ "
        "cannot have a function of that name"
    )


# --- where names are refused ----------------------------------------------------------------------


def test_the_emulation_refuses_a_colliding_name_when_the_kernel_is_defined():
    pl = language

    with pytest.raises(ExecutorError, match=rf"{__file__}:\d+: kernel: rename t: "):

        @pl.jit
        def kernel(
            x: pl.Tensor[[4], pl.INT32],
            y: pl.Out[pl.Tensor[[4, 32], pl.FP32]],
        ):
            for t in pl.parallel(4):
                with pl.at(level=pl.Level.CORE_GROUP):
                    y[t : t + 1, 0:32] = pl.full([1, 32], dtype=pl.FP32, value=0.0)


def test_the_emulation_refuses_a_name_that_collides_with_a_dynamic_extent():
    pl = language
    rows = pl.dynamic("ROWS")

    with pytest.raises(ExecutorError, match=r'rename ROWS: pl.dynamic\("ROWS"\) becomes'):

        @pl.jit
        def kernel(y: pl.Out[pl.Tensor[[rows, 32], pl.FP32]]):
            ROWS = pl.tensor.dim(y, 0)  # noqa: N806
            pl.create_tensor([ROWS, 32], dtype=pl.FP32)


@pytest.mark.parametrize("file", ["decode_layer", "blocks"])
def test_a_kernel_with_a_colliding_name_is_refused_when_it_is_loaded(file, tmp_path, monkeypatch):
    """The check runs before PyPTO, or the language in its place, sees the kernel."""
    for name in ("blocks", "decode_layer"):
        text = SOURCES[name].read_text()
        if name == file:
            text = text.replace("for token in", "for t in")
        (tmp_path / f"{name}.py").write_text(text)
    for name in SOURCES:
        monkeypatch.setitem(SOURCES, name, tmp_path / f"{name}.py")
    emulated = sys.modules["tilewright_pypto.emulated.language"]
    monkeypatch.setattr(emulated, "check_function", lambda *_: None)
    with pytest.raises(ExecutorError, match=rf"{tmp_path / file}.py:\d+: \w+: rename t: "):
        source.load("decode_layer", kernels_of(DEMO), language)


@pytest.mark.parametrize("name", ["blocks", *KERNELS])
def test_the_shipped_kernels_have_no_colliding_names(name):
    check_file(SOURCES[name])
