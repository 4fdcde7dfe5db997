"""The parameters that executor pypto-npu gives to kernels, and the page that lists them."""

from pathlib import Path

import pytest
from attrs import evolve
from checkout import ROOT
from model_directories import load_checked

from tilewright.errors import ExecutorError
from tilewright.settings import DEMO_MODEL
from tilewright_kernels.qwen3_14b.plugin import SOURCES, kernels_of
from tilewright_kernels.qwen3_14b.shape import DEMO
from tilewright_pypto.binding import KERNELS, RESULTS, contracts, parameters
from tilewright_pypto.reference import reference


def test_the_page_is_current() -> None:
    page = (ROOT / "docs/kernel-parameters.md").read_text()
    assert page == reference(), (
        "run: python -m tilewright_pypto.reference > docs/kernel-parameters.md"
    )


def test_the_page_has_every_kernel_and_parameter() -> None:
    rows = [line.split("`")[1] for line in reference().splitlines() if line.startswith("| `")]
    known = {name for kernel in KERNELS for name in parameters(kernel)}
    assert sorted(rows) == sorted(known | set(KERNELS))


def test_a_kernel_may_take_what_it_writes() -> None:
    for kernel, results in RESULTS.items():
        assert results.keys() <= set(parameters(kernel))


@pytest.mark.parametrize(
    ("kernel", "parameter"),
    [("head", "positions"), ("head", "block_table"), ("decode_layer", "logits_rows")],
)
def test_a_parameter_of_another_kernel_is_refused(kernel: str, parameter: str, tmp_path: Path):
    changed = tmp_path / f"{kernel}.py"
    first = f"def {kernel}(\n"
    given = f"{first}    {parameter}: pl.Tensor[[7], pl.INT32],\n"
    changed.write_text(SOURCES[kernel].read_text().replace(first, given))
    kernels = evolve(kernels_of(DEMO), sources={**SOURCES, kernel: changed})
    message = f"the set: kernel {kernel} has a parameter '{parameter}'.* not bind there"
    with pytest.raises(ExecutorError, match=message):
        contracts(kernels, load_checked(DEMO_MODEL).config, "the set")
