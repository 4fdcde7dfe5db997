"""The page that lists the kernels and parameters that executor pypto-npu binds."""

from checkout import ROOT

from tilewright_pypto.binding import KERNELS, RESULTS, passed
from tilewright_pypto.reference import reference


def test_the_page_is_current() -> None:
    page = (ROOT / "docs/kernel-parameters.md").read_text()
    assert page == reference(), (
        "run: python -m tilewright_pypto.reference > docs/kernel-parameters.md"
    )


def test_the_page_has_every_kernel_and_parameter() -> None:
    rows = [line.split("`")[1] for line in reference().splitlines() if line.startswith("| `")]
    known = {name for kernel in KERNELS for name in passed(kernel)}
    assert sorted(rows) == sorted(known | set(KERNELS))


def test_a_kernel_may_take_what_it_writes() -> None:
    for kernel, results in RESULTS.items():
        assert results.keys() <= set(passed(kernel))
