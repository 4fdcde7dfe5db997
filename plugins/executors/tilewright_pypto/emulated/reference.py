"""Reference of the emulated language, from its code: ``docs/kernel-language.md``.

``python -m tilewright_pypto.emulated.reference > docs/kernel-language.md``
"""

import inspect
import re
import sys
from collections.abc import Iterator
from typing import Any

import torch

from tilewright_pypto.emulated import missing, operators
from tilewright_pypto.emulated.language import NAMES, REFUSED

_HEAD = """\
# The emulated subset of PyPTO's language

<!-- Made by `python -m tilewright_pypto.emulated.reference > {table}`; do not edit. -->

What a kernel may use with `-o platform=emulated`, and what of PyPTO's own form is missing. `pl` is
`pypto.language`; the names are those of PyPTO {version} (2026-08-21). A kernel that keeps to this
page runs on PyTorch and is compiled by PyPTO from the same source; PyPTO has more, which the last
section lists. [npu.md](npu.md#the-kernels) describes the kernels.

A *tensor* is in device memory: a parameter, or made by `pl.create_tensor`. A *tile* is on chip, in
one task: a window of a tensor that the task reads, or the result of an operator. Part of a tile may
be *valid*, from its first row and column on; a store writes that part only.

    x[r : r + 16, c : c + 64]            a window: as pl.slice(x, [16, 64], [r, c])
    y[r : r + 16, c : c + 64] = tile     a store: as pl.assemble(y, tile, [r, c])
    y[:] = tile                          a store to all of y

A subscript has one slice without a step for each dimension. Tiles have no subscripts and no Python
operators; numbers have `+`, `-`, `*`, `//`, `%` and comparisons.

An error names the kernel and its line. It is an error to read or write outside a tensor, to read
what was not written, to write an input, to leave part of an output unwritten, to let two iterations
of a `pl.parallel` use a place that one of them writes, and to write what an earlier task may still
be reading.
"""

_SECTIONS = {
    "Kernels and types": (
        "",
        "jit jit.inline Tensor Out InOut Scalar dynamic BF16 FP16 FP32 INT32 INDEX",
    ),
    "Tasks and loops": (
        "`if` and `else` may be used on numbers.",
        "at Level range parallel pipeline unroll",
    ),
    "Tensors and tiles": ("", "create_tensor slice assemble reshape full fillpad PadValue cast"),
    "Numbers": ("", "read dim tensor.dim min max"),
    "Operators on vectors": (
        "In a task. Tiles must be FP32 where nothing else is said, operands of one dtype, and a "
        "row of a tile\na multiple of 32 bytes, or one element. A tensor or a window stands for "
        "its tile. Values are as\nPyTorch computes them in FP32; a device may approximate "
        "`pl.exp`, `pl.log`, `pl.recip` and `pl.rsqrt`.",
        "add sub mul div maximum minimum neg abs exp log sqrt rsqrt recip row_sum row_max row_min "
        "col_sum col_max col_min row_expand_add row_expand_sub row_expand_mul row_expand_div "
        "row_expand_max row_expand_min row_expand_expdif col_expand_add col_expand_sub "
        "col_expand_mul col_expand_div col_expand_max col_expand_min transpose concat",
    ),
    "Products of matrices": (
        "In a task. All of what is summed must be valid.",
        "matmul matmul_acc",
    ),
}
"""What is said of a section, and its names."""


def reference() -> str:
    """Markdown. Raises ValueError for a name of the language that no section lists."""
    listed = [name for _, names in _SECTIONS.values() for name in names.split()]
    if left := NAMES.keys() - {name.split(".")[0] for name in listed}:
        raise ValueError(f"no section lists {', '.join(sorted(left))}")
    lines = [_HEAD.format(version=missing.PYPTO, table=missing.TABLE)]
    for title, (said, names) in _SECTIONS.items():
        lines += [f"## {title}\n", *([f"{said}\n"] if said else [])]
        lines += ["| name | what it is or computes | not emulated |", "|---|---|---|"]
        lines += [_row(name) for name in names.split()]
        lines.append("")
    lines += ["## Python that is refused\n", *_refused(), "", *_missing()]
    return "\n".join(lines) + "\n"


def _row(name: str) -> str:
    what = NAMES[name.split(".")[0]]
    for part in name.split(".")[1:]:
        what = getattr(what, part)
    said, _, left = _documentation(what).partition("\n\nNot emulated: ")
    cells = (_signature(name, what), said, left)
    return "| " + " | ".join(re.sub(r"\s+", " ", cell).replace("|", "\\|") for cell in cells) + " |"


def _documentation(what: Any) -> str:
    if isinstance(what, torch.dtype):
        return f"The dtype {str(what).removeprefix('torch.')}."
    if what == operators.INDEX:
        return "The type of offsets, counts and loop variables."
    return inspect.cleandoc(what.__doc__).replace("``", "`")


def _signature(name: str, what: Any) -> str:
    if not inspect.isfunction(what):
        return f"`pl.{name}`"
    shown = [
        f"*{p.name}"
        if p.kind is p.VAR_POSITIONAL
        else p.name + ("" if p.default is p.empty else f"={p.default!r}")
        for p in inspect.signature(what).parameters.values()
    ]
    return f"`pl.{name}({', '.join(shown)})`"


def _refused() -> Iterator[str]:
    yield "The error is `FILE:LINE: KERNEL has an unsupported construct`, and then one of these.\n"
    yield from (
        f"- {what}" if re.search(r"\w", what) else f"- `{what}`"
        for what in dict.fromkeys(REFUSED.values())
    )
    yield "- a loop over anything but pl.range, pl.parallel, pl.pipeline and pl.unroll"


def _missing() -> Iterator[str]:
    yield "## Names that PyPTO has and the emulation does not\n"
    yield (
        "The error is `FILE:LINE: KERNEL has pl.NAME, which PyPTO has but the emulation does not`, "
        "and what\nto use instead. For a name that PyPTO does not have, it says so, with the "
        "nearest name.\n"
    )
    yield "| names | instead |"
    yield "|---|---|"
    for use, names in missing.INSTEAD.items():
        shown = ", ".join(f"`pl.{name}`" for name in sorted(names.split()))
        yield f"| {shown} | {use} |"
    rest = ", ".join(f"`{name}`" for name in sorted(missing.OTHERS.split()))
    yield f"\nNothing emulated stands in for these: {rest}."


if __name__ == "__main__":
    sys.stdout.write(reference())
