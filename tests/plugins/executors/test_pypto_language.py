"""The emulation of ``pypto.language``: errors, each with a kernel that causes it, and computed
values."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from attrs import evolve
from pypto_oracle import pypto_or_skip, simulator_or_skip

from tilewright.errors import ExecutorError
from tilewright_kernels import source
from tilewright_kernels.qwen3_14b.plugin import KERNELS, kernels_of
from tilewright_kernels.qwen3_14b.shape import DEMO
from tilewright_pypto.emulated import KernelError, language, missing
from tilewright_pypto.emulated import language as pl
from tilewright_pypto.emulated.language import NAMES
from tilewright_pypto.emulated.reference import reference

N = 32
ROWS = pl.dynamic("ROWS")
CORE = pl.Level.CORE_GROUP


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


def fails(message: str):
    return pytest.raises(KernelError, match=message)


# --- windows --------------------------------------------------------------------------------------


@pl.jit
def copy_rows(
    x: pl.Tensor[[ROWS, N], pl.FP32],
    start: pl.Tensor[[2], pl.INT32],
    y: pl.InOut[pl.Tensor[[16, N], pl.FP32]],
):
    first = pl.read(start, [0])
    to = pl.read(start, [1])
    with pl.at(level=CORE):
        y[to : to + 8, 0:N] = x[first : first + 8, 0:N]


@pytest.mark.parametrize(("first", "to"), [(0, 0), (8, 8), (3, 5)])
def test_a_window_inside_its_tensor_is_copied(first, to):
    x, y = torch.randn(16, N), torch.zeros(16, N)
    expected = y.clone()
    expected[to : to + 8] = x[first : first + 8]
    copy_rows(x=x, start=torch.tensor([first, to], dtype=torch.int32), y=y)
    assert torch.equal(y, expected)


@pytest.mark.parametrize(("first", "to", "tensor"), [(9, 0, "x"), (-1, 0, "x"), (0, 9, "y")])
def test_a_window_that_reaches_outside_is_an_error(first, to, tensor):
    start = torch.tensor([first, to], dtype=torch.int32)
    with fails(rf"{tensor}\[.*\] reaches outside its shape \[16, 32\]"):
        copy_rows(x=ones(16, N), start=start, y=ones(16, N))


def test_an_error_names_the_kernel_and_its_line():
    start = torch.tensor([9, 0], dtype=torch.int32)
    with pytest.raises(KernelError) as error:
        copy_rows(x=ones(16, N), start=start, y=ones(16, N))
    found = re.match(r"kernel copy_rows, test_pypto_language.py:(\d+): ", str(error.value))
    assert found
    line = Path(__file__).read_text().splitlines()[int(found[1]) - 1]
    assert line.strip().startswith("y[to : to + 8")


def test_an_element_outside_its_tensor_is_an_error():
    @pl.jit
    def kernel(x: pl.Tensor[[2], pl.INT32], y: pl.InOut[pl.Tensor[[1, N], pl.FP32]]):
        pl.read(x, [2])

    with fails(r"x\[2\] is outside its shape \[2\]"):
        kernel(x=ones(2, dtype=torch.int32), y=ones(1, N))


@pl.jit
def tail(
    x: pl.Tensor[[ROWS, N], pl.FP32],
    count: pl.Tensor[[1], pl.INT32],
    y: pl.InOut[pl.Tensor[[16, N], pl.FP32]],
):
    n = pl.read(count, [0])
    with pl.at(level=CORE):
        part = pl.slice(x, [16, N], [0, 0], valid_shape=[n, N])
        y = pl.assemble(y, pl.add(part, part), [0, 0])


def test_only_the_valid_part_of_a_window_is_read_and_stored():
    x, y = torch.randn(5, N), torch.full((16, N), 7.0)
    tail(x=x, count=torch.tensor([5], dtype=torch.int32), y=y)
    assert torch.equal(y[:5], 2 * x)
    assert (y[5:] == 7).all()


def test_a_valid_part_that_reaches_outside_its_tensor_is_an_error():
    with fails(r"x\[0:6, 0:32\] reaches outside its shape \[5, 32\]"):
        tail(x=ones(5, N), count=torch.tensor([6], dtype=torch.int32), y=ones(16, N))


@pytest.mark.parametrize("count", [0, 17])
def test_a_valid_part_must_fit_its_window_and_not_be_empty(count):
    with fails(r"valid_shape \[.*\] must be between 1"):
        tail(x=ones(32, N), count=torch.tensor([count], dtype=torch.int32), y=ones(16, N))


# --- uninitialised memory -------------------------------------------------------------------------


def test_reading_unwritten_scratch_is_an_error():
    @pl.jit
    def kernel(x: pl.Tensor[[16, N], pl.FP32], y: pl.Out[pl.Tensor[[16, N], pl.FP32]]):
        scratch = pl.create_tensor([16, N], dtype=pl.FP32)
        with pl.at(level=CORE):
            scratch[0:8, 0:N] = x[0:8, 0:N]
        with pl.at(level=CORE):
            y[0:16, 0:N] = scratch[0:16, 0:N]

    with fails(r"scratch\[0:16, 0:32\] is read, but not all of it was written"):
        kernel(x=ones(16, N), y=ones(16, N))


def test_reading_an_output_before_it_is_written_is_an_error():
    @pl.jit
    def kernel(y: pl.Out[pl.Tensor[[8, N], pl.FP32]]):
        with pl.at(level=CORE):
            y[:] = pl.add(y[0:8, 0:N], 1.0)

    with fails("y.* is read, but not all of it was written"):
        kernel(y=ones(8, N))


def test_written_nan_values_can_be_read():
    @pl.jit
    def kernel(x: pl.Tensor[[8, N], pl.FP32], y: pl.Out[pl.Tensor[[8, N], pl.FP32]]):
        scratch = pl.create_tensor([8, N], dtype=pl.FP32)
        with pl.at(level=CORE):
            scratch[:] = x[0:8, 0:N]
        with pl.at(level=CORE):
            y[:] = scratch[0:8, 0:N]

    y = ones(8, N)
    kernel(x=torch.full((8, N), float("nan")), y=y)
    assert y.isnan().all()


def test_an_output_must_be_written_completely():
    @pl.jit
    def kernel(x: pl.Tensor[[8, N], pl.FP32], y: pl.Out[pl.Tensor[[16, N], pl.FP32]]):
        with pl.at(level=CORE):
            y[0:8, 0:N] = x[0:8, 0:N]

    with fails("256 of 512 elements of output y were never written"):
        kernel(x=ones(8, N), y=ones(16, N))


def test_rebinding_the_name_of_an_output_does_not_write_it():
    @pl.jit
    def kernel(x: pl.Tensor[[8, N], pl.FP32], y: pl.Out[pl.Tensor[[8, N], pl.FP32]]):
        with pl.at(level=CORE):
            y = pl.add(x, x)  # noqa: F841

    with fails("output y were never written"):
        kernel(x=ones(8, N), y=ones(8, N))


def test_an_inout_parameter_keeps_the_elements_that_are_not_written():
    y = torch.arange(16 * N).float().view(16, N)
    expected = y.clone()
    expected[2:10] = 1
    copy_rows(x=ones(8, N), start=torch.tensor([0, 2], dtype=torch.int32), y=y)
    assert torch.equal(y, expected)


def test_an_input_cannot_be_written():
    @pl.jit
    def kernel(x: pl.Tensor[[8, N], pl.FP32], y: pl.Out[pl.Tensor[[8, N], pl.FP32]]):
        with pl.at(level=CORE):
            y[:] = pl.add(x, x)
            x[:] = pl.add(x, x)

    with fails("x is an input and cannot be written"):
        kernel(x=ones(8, N), y=ones(8, N))


def test_an_input_cannot_be_written_through_a_view():
    @pl.jit
    def kernel(x: pl.Tensor[[8, N], pl.FP32], y: pl.Out[pl.Tensor[[8, N], pl.FP32]]):
        view = x[0:4, 0:N]
        with pl.at(level=CORE):
            view[:] = x[4:8, 0:N]

    with fails("x is an input and cannot be written"):
        kernel(x=ones(8, N), y=ones(8, N))


# --- padding --------------------------------------------------------------------------------------


def test_a_reduction_over_padding_is_an_error_without_fillpad():
    @pl.jit
    def kernel(x: pl.Tensor[[8, 20], pl.FP32], y: pl.Out[pl.Tensor[[8, 1], pl.FP32]]):
        with pl.at(level=CORE):
            part = pl.slice(x, [8, N], [0, 0], valid_shape=[8, 20])
            y[:] = pl.row_max(part)

    @pl.jit
    def mended(x: pl.Tensor[[8, 20], pl.FP32], y: pl.Out[pl.Tensor[[8, 1], pl.FP32]]):
        with pl.at(level=CORE):
            part = pl.slice(x, [8, N], [0, 0], valid_shape=[8, 20])
            y[:] = pl.row_max(pl.fillpad(part, pad_value=pl.PadValue.min))

    x, y = torch.full((8, 20), -3.0), ones(8, 1)
    with fails(r"pl.row_max of \[8, 32\], of which only \[8, 20\] is valid"):
        kernel(x=x, y=y)
    mended(x=x, y=y)
    assert (y == -3).all()


def test_padding_cannot_reach_an_output_through_an_operator():
    @pl.jit
    def kernel(
        a: pl.Tensor[[5, N], pl.FP32],
        b: pl.Tensor[[8, N], pl.FP32],
        y: pl.InOut[pl.Tensor[[8, N], pl.FP32]],
    ):
        with pl.at(level=CORE):
            part = pl.slice(a, [8, N], [0, 0], valid_shape=[5, N])
            y[:] = pl.add(part, b[0:8, 0:N])

    with fails(r"a tile of \[8, 32\] is stored to y, but only \[5, 32\] of it was computed"):
        kernel(a=ones(5, N), b=ones(8, N), y=ones(8, N))


@pl.jit
def ragged_product(
    a: pl.Tensor[[ROWS, N], pl.BF16],
    b: pl.Tensor[[N, 16], pl.BF16],
    used: pl.Tensor[[1], pl.INT32],
    y: pl.InOut[pl.Tensor[[16, 16], pl.FP32]],
):
    rows = pl.tensor.dim(a, 0)
    scratch = pl.create_tensor([16, 16], dtype=pl.FP32)
    with pl.at(level=CORE):
        part = pl.slice(a, [16, N], [0, 0], valid_shape=[rows, N])
        scratch[:] = pl.matmul(part, b[0:N, 0:16], out_dtype=pl.FP32)
    n = pl.read(used, [0])
    with pl.at(level=CORE):
        y = pl.assemble(y, pl.slice(scratch, [16, 16], [0, 0], valid_shape=[n, 16]), [0, 0])


def test_padding_rows_of_a_product_may_be_stored_in_scratch_but_not_read():
    a, b = torch.randn(5, N).bfloat16(), torch.randn(N, 16).bfloat16()
    y = torch.full((16, 16), 7.0)
    ragged_product(a=a, b=b, used=torch.tensor([5], dtype=torch.int32), y=y)
    torch.testing.assert_close(y[:5], a.float() @ b.float())
    assert (y[5:] == 7).all()
    with fails("scratch.* is read, but not all of it was written"):
        ragged_product(a=a, b=b, used=torch.tensor([6], dtype=torch.int32), y=y)


def test_a_product_cannot_sum_over_padding():
    @pl.jit
    def kernel(
        a: pl.Tensor[[16, N], pl.BF16],
        b: pl.Tensor[[20, 16], pl.BF16],
        y: pl.Out[pl.Tensor[[16, 16], pl.FP32]],
    ):
        with pl.at(level=CORE):
            part = pl.slice(b, [N, 16], [0, 0], valid_shape=[20, 16])
            y[:] = pl.matmul(a, part, out_dtype=pl.FP32)

    half = torch.bfloat16
    with fails("sums 32 products, but an operand of some of them was not computed"):
        kernel(a=ones(16, N, dtype=half), b=ones(20, 16, dtype=half), y=ones(16, 16))


# --- tasks ----------------------------------------------------------------------------------------


@pl.jit
def hand_over(
    at: pl.Tensor[[1], pl.INT32],
    x: pl.Tensor[[8, N], pl.FP32],
    y: pl.Out[pl.Tensor[[8, N], pl.FP32]],
    z: pl.Out[pl.Tensor[[8, N], pl.FP32]],
):
    row = pl.read(at, [0])
    shared = pl.create_tensor([16, N], dtype=pl.FP32)
    with pl.at(level=CORE):
        shared[0:8, 0:N] = pl.mul(x[0:8, 0:N], 1.0)
    with pl.at(level=CORE):
        y[0:8, 0:N] = pl.mul(shared[0:8, 0:N], 2.0)
    with pl.at(level=CORE):
        shared[row : row + 8, 0:N] = pl.mul(x[0:8, 0:N], 3.0)
    with pl.at(level=CORE):
        z[0:8, 0:N] = pl.mul(shared[row : row + 8, 0:N], 1.0)


def test_a_task_that_writes_what_an_earlier_task_may_still_read_is_an_error():
    given = {"x": ones(8, N), "y": ones(8, N), "z": ones(8, N)}
    with fails(
        "a task writes to a place of scratch that an earlier task reads, and does not wait for"
    ):
        hand_over(at=torch.tensor([7], dtype=torch.int32), **given)
    hand_over(at=torch.tensor([8], dtype=torch.int32), **given)
    assert (given["z"] == 3).all()


def test_a_task_that_uses_the_output_of_a_reader_waits_for_it():
    @pl.jit
    def kernel(x: pl.Tensor[[8, N], pl.FP32], y: pl.Out[pl.Tensor[[8, N], pl.FP32]]):
        shared = pl.create_tensor([8, N], dtype=pl.FP32)
        made = pl.create_tensor([8, N], dtype=pl.FP32)
        with pl.at(level=CORE):
            shared[0:8, 0:N] = pl.mul(x[0:8, 0:N], 1.0)
        with pl.at(level=CORE):
            made[0:8, 0:N] = pl.mul(shared[0:8, 0:N], 2.0)
        with pl.at(level=CORE):
            shared[0:8, 0:N] = pl.mul(made[0:8, 0:N], 3.0)
        with pl.at(level=CORE):
            y[0:8, 0:N] = pl.mul(shared[0:8, 0:N], 1.0)

    y = ones(8, N)
    kernel(x=ones(8, N), y=y)
    assert (y == 6).all()


# --- parallel -------------------------------------------------------------------------------------


@pl.jit
def overlapping(
    x: pl.Tensor[[8, N], pl.FP32],
    step: pl.Tensor[[1], pl.INT32],
    y: pl.InOut[pl.Tensor[[64, N], pl.FP32]],
):
    by = pl.read(step, [0])
    for i in pl.parallel(4):
        with pl.at(level=CORE):
            y[i * by : i * by + 8, 0:N] = x[0:8, 0:N]


def test_iterations_may_write_disjoint_places():
    y = torch.zeros(64, N)
    overlapping(x=ones(8, N), step=torch.tensor([8], dtype=torch.int32), y=y)
    assert (y[:32] == 1).all()
    assert (y[32:] == 0).all()


@pytest.mark.parametrize("step", [0, 7])
def test_two_iterations_that_write_one_place_are_an_error(step):
    with fails(r"iterations \d and \d of a pl.parallel write to the same place of y"):
        overlapping(x=ones(8, N), step=torch.tensor([step], dtype=torch.int32), y=ones(64, N))


def test_a_place_is_tracked_through_a_reshaped_view():
    @pl.jit
    def kernel(x: pl.Tensor[[1, N], pl.FP32], y: pl.InOut[pl.Tensor[[4, 64], pl.FP32]]):
        flat = pl.reshape(y, [8, N])
        for i in pl.parallel(2):
            with pl.at(level=CORE):
                if i == 0:
                    y[1:2, 0:N] = x[0:1, 0:N]
                else:
                    flat[2:3, 0:N] = x[0:1, 0:N]

    with fails("write to the same place of y"):
        kernel(x=ones(1, N), y=ones(4, 64))


@pytest.mark.parametrize("seed", range(4))
def test_reading_what_another_iteration_writes_is_an_error_in_every_order(seed):
    @pl.jit
    def kernel(y: pl.InOut[pl.Tensor[[5, N], pl.FP32]]):
        for i in pl.parallel(4):
            with pl.at(level=CORE):
                y[i : i + 1, 0:N] = y[i + 1 : i + 2, 0:N]

    with fails(r"iteration \d of a pl.parallel reads a place of y that iteration \d writes"):
        evolve(kernel, seed=seed)(y=ones(5, N))


def test_an_outer_iteration_is_checked_for_the_writes_of_its_inner_loop():
    @pl.jit
    def kernel(x: pl.Tensor[[1, N], pl.FP32], y: pl.InOut[pl.Tensor[[4, N], pl.FP32]]):
        for _i in pl.parallel(2):
            for j in pl.parallel(4):
                with pl.at(level=CORE):
                    y[j : j + 1, 0:N] = x[0:1, 0:N]

    with fails("iterations . and . of a pl.parallel write to the same place of y"):
        kernel(x=ones(1, N), y=ones(4, N))


def test_scratch_created_in_an_iteration_is_private_to_it():
    @pl.jit
    def kernel(x: pl.Tensor[[4, N], pl.FP32], y: pl.Out[pl.Tensor[[4, N], pl.FP32]]):
        for i in pl.parallel(4):
            scratch = pl.create_tensor([1, N], dtype=pl.FP32)
            with pl.at(level=CORE):
                scratch[:] = x[i : i + 1, 0:N]
            with pl.at(level=CORE):
                y[i : i + 1, 0:N] = scratch[0:1, 0:N]

    x, y = torch.randn(4, N), ones(4, N)
    kernel(x=x, y=y)
    assert torch.equal(x, y)


def test_the_seed_determines_the_order_of_iterations():
    orders = []

    @pl.jit
    def kernel(y: pl.InOut[pl.Tensor[[1, N], pl.FP32]]):
        for i in pl.parallel(2, 34, 2):
            orders.append(i)

    for seed in (0, 0, 1):
        evolve(kernel, seed=seed)(y=ones(1, N))
    first, again, other = orders[:16], orders[16:32], orders[32:]
    assert first == again != other
    assert sorted(first) == sorted(other) == list(range(2, 34, 2)) != first


# --- inside and outside a task --------------------------------------------------------------------


def test_an_operator_outside_of_a_task_is_an_error():
    @pl.jit
    def kernel(x: pl.Tensor[[8, N], pl.FP32], y: pl.Out[pl.Tensor[[8, N], pl.FP32]]):
        y[:] = pl.add(x, x)

    with fails("pl.add must be inside a pl.at"):
        kernel(x=ones(8, N), y=ones(8, N))


def test_a_store_outside_of_a_task_is_an_error():
    @pl.jit
    def kernel(x: pl.Tensor[[8, N], pl.FP32], y: pl.Out[pl.Tensor[[8, N], pl.FP32]]):
        with pl.at(level=CORE):
            t = pl.add(x, x)
        y[:] = t

    with fails("a store must be inside a pl.at"):
        kernel(x=ones(8, N), y=ones(8, N))


@pytest.mark.parametrize("what", ["create_tensor", "parallel", "at"])
def test_operations_of_the_outer_program_are_refused_inside_a_task(what):
    @pl.jit
    def create_tensor(y: pl.InOut[pl.Tensor[[8, N], pl.FP32]]):
        with pl.at(level=CORE):
            pl.create_tensor([8, N], dtype=pl.FP32)

    @pl.jit
    def parallel(y: pl.InOut[pl.Tensor[[8, N], pl.FP32]]):
        with pl.at(level=CORE):
            for _i in pl.parallel(2):
                pass

    @pl.jit
    def at(y: pl.InOut[pl.Tensor[[8, N], pl.FP32]]):
        with pl.at(level=CORE), pl.at(level=CORE):
            pass

    kernels = {"create_tensor": create_tensor, "parallel": parallel, "at": at}
    with fails(f"pl.{what} must be outside a pl.at"):
        kernels[what](y=ones(8, N))


# --- syntax that is refused -----------------------------------------------------------------------


def test_augmented_assignment_is_refused_when_the_kernel_is_defined():
    with fails("augmented assignment"):

        @pl.jit
        def kernel(x: pl.Tensor[[8, N], pl.FP32]):
            n = 1
            n += 1


def test_a_python_range_loop_is_refused():
    with fails(r"a loop over range\(4\): use pl.range or pl.parallel"):

        @pl.jit
        def kernel(x: pl.Tensor[[8, N], pl.FP32]):
            for _i in range(4):
                pass


def test_a_comprehension_is_refused():
    with fails("a comprehension"):

        @pl.jit.inline
        def function(x: pl.Tensor[[8, N], pl.FP32]):
            return [i for i in x]  # noqa: C416


def test_short_circuiting_conditions_are_refused():
    with fails("and / or"):

        @pl.jit
        def kernel(x: pl.Tensor[[8, N], pl.FP32]):
            if N > 1 and N < 9:
                pass


def test_a_name_that_is_not_emulated_is_refused_before_anything_runs():
    with fails(
        r"kernel has pl.spmd, which PyPTO has but the emulation does not: use pl.parallel or "
        r"pl.range \(docs/kernel-language.md\)"
    ):

        @pl.jit
        def kernel(x: pl.Tensor[[8, N], pl.FP32]):
            pl.spmd(4)

    with fails("pl.NZ, which PyPTO has but the emulation does not"):
        pl.NZ  # noqa: B018
    with fails("pl.jit.incore is not emulated"):
        pl.jit.incore  # noqa: B018


def test_a_name_that_pypto_does_not_have_is_refused_with_the_nearest():
    with fails(r"pl.row_summ, which PyPTO e2d0f78 does not have; did you mean 'row_sum'"):

        @pl.jit
        def kernel(x: pl.Tensor[[8, N], pl.FP32]):
            pl.row_summ(x)


def test_a_full_name_that_is_not_emulated_is_refused():
    with fails("kernel has pl.tensor.view, which is not emulated"):

        @pl.jit
        def kernel(x: pl.Tensor[[8, N], pl.FP32]):
            pl.tensor.view(x, [N, 8])


def test_an_argument_that_an_operator_does_not_take_is_an_error_that_names_it():
    with fails(r"pl.matmul\(lhs, rhs, out_dtype, b_trans\) got an unexpected .* 'a_trans'"):
        run_one(lambda a, b: pl.matmul(a, b, a_trans=True, out_dtype=pl.FP32), ones(16, 16))


def test_the_page_on_the_language_matches_the_code():
    page = Path(__file__).parents[3] / missing.TABLE
    assert page.read_text() == reference(), (
        f"run: python -m tilewright_pypto.emulated.reference > {missing.TABLE}"
    )


@pytest.mark.pypto
def test_the_names_are_those_of_pypto():
    theirs = {name for name in dir(pypto_or_skip()) if not name.startswith("_")}
    submodules = {"dsl_api", "op", "parser", "typing"}
    assert {*NAMES, *missing.NOT_EMULATED} == theirs - submodules
    assert not NAMES.keys() & missing.NOT_EMULATED


# --- dtypes and shapes ----------------------------------------------------------------------------


def run_one(operate, *tensors: torch.Tensor) -> torch.Tensor:
    """Run an operator on whole tensors in a kernel of its own, and return its result."""
    names = {torch.float32: pl.FP32, torch.bfloat16: pl.BF16, torch.int32: pl.INT32}
    a, b = (*tensors, tensors[0])[:2]
    a_type = pl.Tensor[list(a.shape), names[a.dtype]]
    b_type = pl.Tensor[list(b.shape), names[b.dtype]]
    found = []

    @pl.jit
    def kernel(a: a_type, b: b_type):
        with pl.at(level=CORE):
            found.append(operate(a, b))

    kernel(a=a, b=b.clone())
    return found[0].data


HALF = torch.bfloat16


@pytest.mark.parametrize(
    ("operate", "tensors", "message"),
    [
        (lambda a, b: pl.exp(a), [ones(8, N, dtype=HALF)], "vector operators need FP32"),
        (lambda a, b: pl.mul(a, 2.0), [ones(8, N, dtype=HALF)], "vector operators need FP32"),
        (
            lambda a, b: pl.add(a, b),
            [ones(8, N), ones(8, N, dtype=HALF)],
            "vector operators need FP32",
        ),
        (lambda a, b: pl.add(a, b), [ones(8, N), ones(1, N)], "tiles of the same shape"),
        (lambda a, b: pl.exp(a), [ones(8, 5)], "multiples of 32 bytes"),
        (lambda a, b: pl.row_expand_mul(a, b), [ones(8, N), ones(1, N)], r"expects \[8, 1\]"),
        (lambda a, b: pl.col_expand_mul(a, b), [ones(8, N), ones(8, 1)], r"expects \[1, 32\]"),
        (lambda a, b: pl.cast(a, pl.FP32), [ones(8, N)], "from torch.float32 to itself"),
        (
            lambda a, b: pl.cast(a, pl.BF16, mode="odd"),
            [ones(8, N)],
            "cast mode 'odd' is not emulated",
        ),
        (
            lambda a, b: pl.matmul(a, b, out_dtype=pl.FP32),
            [ones(16, N), ones(N, 16, dtype=HALF)],
            "operands of the same dtype",
        ),
        (lambda a, b: pl.matmul(a, b), [ones(16, N), ones(N, 16)], "needs out_dtype=pl.FP32"),
        (
            lambda a, b: pl.matmul(a, b, out_dtype=pl.FP32),
            [ones(5, N), ones(N, 16)],
            "5 x 32 x 16: the cube needs multiples of 16",
        ),
        (
            lambda a, b: pl.matmul(a, b, out_dtype=pl.FP32),
            [ones(16, N), ones(16, N)],
            "inner dimensions differ",
        ),
        (
            lambda a, b: pl.matmul_acc(pl.full([16, 32], dtype=pl.FP32, value=0.0), a, b),
            [ones(16, N), ones(N, 16)],
            r"adds \[16, 16\] to \[16, 32\]",
        ),
        (
            lambda a, b: pl.matmul_acc(pl.full([16, 16], dtype=pl.BF16, value=0.0), a, b),
            [ones(16, N), ones(N, 16)],
            "expects an FP32 accumulator",
        ),
        (lambda a, b: pl.exp(a) + 1, [ones(8, N)], "write pl.add"),
        (lambda a, b: pl.exp(a)[0:4, 0:N], [ones(8, N)], "a slice of a tile on chip"),
    ],
)
def test_operands_of_wrong_dtypes_or_shapes_are_errors(operate, tensors, message):
    with fails(message):
        run_one(operate, *tensors)


def test_a_store_does_not_cast():
    @pl.jit
    def kernel(x: pl.Tensor[[8, N], pl.FP32], y: pl.Out[pl.Tensor[[8, N], pl.BF16]]):
        with pl.at(level=CORE):
            y[:] = pl.add(x, x)

    with fails("a tile of torch.float32 is stored to y, which is torch.bfloat16: cast"):
        kernel(x=ones(8, N), y=ones(8, N, dtype=HALF))


def test_a_tile_must_have_the_shape_of_its_window():
    @pl.jit
    def kernel(x: pl.Tensor[[8, N], pl.FP32], y: pl.InOut[pl.Tensor[[8, N], pl.FP32]]):
        with pl.at(level=CORE):
            y[0:4, 0:N] = pl.add(x, x)

    with fails(r"expected a tile of \[4, 32\] to store to this window, found \[8, 32\]"):
        kernel(x=ones(8, N), y=ones(8, N))


# --- values ---------------------------------------------------------------------------------------

# Adjacent bfloat16 values near 1 are 2**-7 apart: TIES lie half-way between two of them.
STEP = 2.0**-7
TIES = [1 + STEP / 2, 1 + 1.5 * STEP, -1 - STEP / 2, -1 - 1.5 * STEP]
AWAY = [1 + STEP, 1 + 2 * STEP, -1 - STEP, -1 - 2 * STEP]
EVEN = [1.0, 1 + 2 * STEP, -1.0, -1 - 2 * STEP]


@pytest.mark.parametrize(("mode", "expected"), [({}, AWAY), ({"mode": "rint"}, EVEN)])
def test_a_cast_rounds_ties_away_from_zero_unless_told_to_round_to_even(mode, expected):
    found = run_one(lambda a, b: pl.cast(a, pl.BF16, **mode), torch.tensor([TIES * 8]))
    assert found.dtype == torch.bfloat16
    assert found.float()[0, :4].tolist() == expected


@pytest.mark.parametrize("mode", [{}, {"mode": "rint"}])
def test_a_cast_rounds_to_nearest_and_keeps_non_finite_values(mode):
    x = torch.randn(64, N) * 10.0 ** torch.randint(-30, 30, (64, N))
    x[0, :3] = torch.tensor([float("inf"), float("-inf"), float("nan")])
    found = run_one(lambda a, b: pl.cast(a, pl.BF16, **mode), x)
    ties = (x.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(found[~ties].nan_to_num(), x.bfloat16()[~ties].nan_to_num())
    assert found[0, 2].isnan()


def test_a_cast_to_integers_rounds_by_its_mode():
    x = torch.tensor([[2.5, 3.5, -2.5, 0.49999997, 1.2, -1.7, 0.0, 7.0]])
    expected = {
        "round": [3, 4, -3, 0, 1, -2, 0, 7],
        "rint": [2, 4, -2, 0, 1, -2, 0, 7],
        "floor": [2, 3, -3, 0, 1, -2, 0, 7],
        "ceil": [3, 4, -2, 1, 2, -1, 0, 7],
        "trunc": [2, 3, -2, 0, 1, -1, 0, 7],
    }
    for mode, values in expected.items():
        found = run_one(lambda a, b, mode=mode: pl.cast(a, pl.INT32, mode=mode), x)
        assert found.tolist() == [values], mode


@pytest.mark.parametrize("b_trans", [False, True])
def test_products_of_bf16_are_accumulated_in_fp32(b_trans):
    a, b = torch.randn(16, 256).bfloat16(), torch.randn(256, 32).bfloat16()
    stored = b.t().contiguous() if b_trans else b
    expected = a.double() @ b.double()
    found = run_one(lambda a, b: pl.matmul(a, b, b_trans=b_trans, out_dtype=pl.FP32), a, stored)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)

    def twice(a, b):
        acc = pl.matmul(a, b, b_trans=b_trans, out_dtype=pl.FP32)
        return pl.matmul_acc(acc, a, b, b_trans=b_trans)

    torch.testing.assert_close(
        run_one(twice, a, stored).double(), 2 * expected, rtol=1e-5, atol=2e-4
    )


@pytest.mark.parametrize(
    ("operate", "expected"),
    [
        (lambda a, b: pl.sub(a, b), lambda a, b: a - b),
        (lambda a, b: pl.div(a, b), lambda a, b: a / b),
        (lambda a, b: pl.maximum(a, b), torch.maximum),
        (lambda a, b: pl.neg(a), lambda a, b: -a),
        (lambda a, b: pl.sqrt(pl.mul(a, a)), lambda a, b: a.abs()),
        (lambda a, b: pl.exp(a), lambda a, b: a.exp()),
        (lambda a, b: pl.row_sum(a), lambda a, b: a.sum(1, keepdim=True)),
        (lambda a, b: pl.row_expand_sub(a, pl.row_max(a)), lambda a, b: a - a.amax(1, True)),
        (lambda a, b: pl.row_expand_mul(a, pl.row_max(a)), lambda a, b: a * a.amax(1, True)),
        (lambda a, b: pl.row_expand_div(a, pl.row_max(a)), lambda a, b: a / a.amax(1, True)),
        (lambda a, b: pl.reshape(a, [N, 8]), lambda a, b: a.reshape(N, 8)),
        (lambda a, b: pl.transpose(a, 0, 1), lambda a, b: a.t()),
        (lambda a, b: pl.transpose(a, -1, 0), lambda a, b: a.t()),
        (lambda a, b: pl.concat(a, b), lambda a, b: torch.cat((a, b), 1)),
    ],
)
def test_operators_match_their_torch_equivalents(operate, expected):
    a, b = torch.randn(8, N), torch.randn(8, N)
    torch.testing.assert_close(run_one(operate, a, b), expected(a, b))


KERNEL_FILE = Path(__file__).with_name("operators_kernel.py")


def operators_kernel(language: ModuleType, monkeypatch) -> Any:
    """The kernel of operators_kernel.py in a language: PyPTO's or the emulated."""
    monkeypatch.setitem(sys.modules, "pypto", SimpleNamespace(language=language))
    monkeypatch.setitem(sys.modules, "pypto.language", language)
    spec = importlib.util.spec_from_file_location("operators_kernel", KERNEL_FILE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "operators_kernel", module)
    spec.loader.exec_module(module)
    monkeypatch.undo()
    return module.operators


def check_operators(run) -> None:
    """What operators_kernel.py computes, by PyTorch; y's blocks are in the order of its tasks."""
    random = torch.Generator().manual_seed(0)
    a, b = (torch.rand(16, 64, generator=random) + 0.5 for _ in range(2))
    y = torch.full((12 * 16, 64), float("nan"))
    run(a, b, y)
    column, row = b.sum(1, keepdim=True), b.sum(0, keepdim=True)
    expected = (
        torch.minimum(a, b).clamp(max=1.0).abs(),
        (b - 1.25).abs().clamp(min=0.25),
        a.log() * a.rsqrt() + b.reciprocal(),
        torch.maximum(a + column, b.amin(1, keepdim=True)),
        torch.minimum(a, b.amax(1, keepdim=True)),
        (a - a.amax(1, keepdim=True)).exp(),
        (a + row - b.amax(0, keepdim=True)) / b.amin(0, keepdim=True),
        torch.minimum(torch.maximum(a, b[:1]), b[1:2]),
        torch.cat((a[:, :32], b[:, 32:]), 1),
        a.t().reshape(16, 64),
        a + column,
        a + b,
    )
    for block, (found, wanted) in enumerate(zip(y.split(16), expected, strict=True)):
        torch.testing.assert_close(
            found, wanted, rtol=2e-6, atol=2e-6, msg=lambda m, n=block: f"{n}: {m}"
        )


def test_a_kernel_of_all_further_operators_computes_what_torch_does(monkeypatch):
    kernel = operators_kernel(language, monkeypatch)
    check_operators(lambda a, b, y: kernel(a=a, b=b, y=y))


@pytest.mark.pypto
def test_the_simulator_computes_the_further_operators_as_the_emulation_does(monkeypatch, tmp_path):
    simulator_or_skip()
    from pypto.runtime import RunConfig

    kernel = operators_kernel(pypto_or_skip(), monkeypatch)
    monkeypatch.setenv("PYPTO_PROG_BUILD_DIR", str(tmp_path))
    check_operators(lambda a, b, y: kernel(a, b, y, config=RunConfig(platform="a2a3sim")))


def test_a_pipelined_loop_must_be_in_a_task():
    @pl.jit
    def kernel(y: pl.InOut[pl.Tensor[[8, N], pl.FP32]]):
        for _i in pl.pipeline(4, stage=2):
            pass

    with fails("pl.pipeline must be inside a pl.at"):
        kernel(y=ones(8, N))


def test_the_bounds_of_an_unrolled_loop_must_be_constants():
    with fails("pl.unroll with n: its bounds must be constants"):

        @pl.jit
        def kernel(x: pl.Tensor[[8, N], pl.FP32], count: pl.Tensor[[1], pl.INT32]):
            n = pl.read(count, [0])
            for _i in pl.unroll(0, n):
                pass


@pytest.mark.parametrize(
    ("operate", "message"),
    [
        (lambda part, y: pl.concat(part, y), "needs whole tiles"),
        (lambda part, y: pl.transpose(part, 0, 1), "needs a whole tile"),
        (lambda part, y: pl.col_sum(part), r"of which only \[5, 32\] is valid"),
    ],
)
def test_padding_is_an_error_where_its_effect_is_undefined(operate, message):
    @pl.jit
    def kernel(x: pl.Tensor[[5, N], pl.FP32], y: pl.InOut[pl.Tensor[[8, N], pl.FP32]]):
        with pl.at(level=CORE):
            operate(pl.slice(x, [8, N], [0, 0], valid_shape=[5, N]), y)

    with fails(message):
        kernel(x=ones(5, N), y=ones(8, N))


# --- functions and arguments ----------------------------------------------------------------------


@pl.jit.inline
def double(x: pl.Tensor[[8, N], pl.FP32], y: pl.Tensor[[ROWS, N], pl.FP32]):
    with pl.at(level=CORE):
        y[0:8, 0:N] = pl.add(x, x)
    return y


@pl.jit.inline
def forgetful(x: pl.Tensor[[8, N], pl.FP32]):
    with pl.at(level=CORE):
        pl.add(x, x)


def test_an_inline_function_must_match_its_annotations_and_return_a_tensor():
    @pl.jit
    def kernel(x: pl.Tensor[[8, N], pl.FP32], y: pl.Out[pl.Tensor[[8, N], pl.FP32]]):
        y = double(x, y)

    @pl.jit
    def too_long(x: pl.Tensor[[16, N], pl.FP32], y: pl.Out[pl.Tensor[[8, N], pl.FP32]]):
        y = double(x, y)

    @pl.jit
    def no_result(x: pl.Tensor[[8, N], pl.FP32], y: pl.Out[pl.Tensor[[8, N], pl.FP32]]):
        forgetful(x)

    y = ones(8, N)
    kernel(x=ones(8, N), y=y)
    assert (y == 2).all()
    with fails(r"double expects x as torch.float32 \[8, 32\], found torch.float32 \[16, 32\]"):
        too_long(x=ones(16, N), y=y)
    with fails("forgetful must return the tensor that it wrote"):
        no_result(x=ones(8, N), y=y)
    with fails("can only be used inside a kernel"):
        double(None, None)


@pl.jit
def symmetric(
    x: pl.Tensor[[ROWS, N], pl.FP32],
    lengths: pl.Tensor[[ROWS], pl.INT32],
    y: pl.InOut[pl.Tensor[[ROWS, N], pl.FP32]],
):
    pass


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": None}, "kernel symmetric was not given y"),
        ({"length": ones(3)}, "no parameter 'length'; did you mean 'lengths'"),
        ({"x": ones(3, N, dtype=HALF)}, r"x as float32 \[ROWS, 32\], found bfloat16 \[3, 32\]"),
        ({"x": ones(3, N + 1)}, r"x as float32 \[ROWS, 32\], found \[3, 33\]"),
        ({"x": ones(3 * N)}, r"x as float32 \[ROWS, 32\], found float32 \[96\]"),
        ({"y": ones(4, N)}, r"y as .*, found \[4, 32\]: ROWS is 3 in x"),
        ({"y": ones(N, 3).t()}, r"y as .*, contiguous, found strides"),
    ],
)
def test_tensors_are_bound_by_name_and_must_match_the_signature(change, message):
    tensors = {"x": ones(3, N), "lengths": ones(3, dtype=torch.int32), "y": ones(3, N)} | change
    with pytest.raises(ExecutorError, match=message):
        symmetric(**{n: t for n, t in tensors.items() if t is not None})


def test_a_written_parameter_must_not_share_memory_with_another():
    both = ones(4, N)
    with fails("x and y share memory, and one is written"):
        symmetric(x=both[:3], lengths=ones(3, dtype=torch.int32), y=both[1:])


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_contract_read_from_source_equals_that_of_the_loaded_kernel(kernel):
    read = source.contract(kernel, kernels_of(DEMO))
    assert read == source.load(kernel, kernels_of(DEMO), pl).contract
    directions = {p.name: p.direction for p in read.parameters}
    assert set(directions.values()) == {"in", "out"} | ({"inout"} if kernel != "head" else set())
