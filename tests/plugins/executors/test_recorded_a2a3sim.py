"""The emulation against PyPTO's simulator, as ``record_a2a3sim`` recorded it.

Both sum products in FP32, in different orders, and round what a task stores: nearly all values are
identical, and the others differ by one unit in the last place.
"""

import json

import pytest
import torch
from pypto_oracle import simulated
from qwen3_layers import Run, relative_rms
from record_a2a3sim import RECORDED
from safetensors import safe_open
from torch import Tensor

from tilewright_kernels import source
from tilewright_kernels.qwen3_14b.plugin import KERNELS, kernels_of
from tilewright_kernels.qwen3_14b.shape import LayerShape
from tilewright_pypto.emulated import language

CASES = (0, 1)

LIMITS = {"out": 1e-3, "k_cache": 1e-4, "v_cache": 1e-4, "logits": 1e-6}
"""Relative RMS of each output; at recording, out was within 3.4e-4 and all others were 0."""


def recorded(kernel: str) -> tuple[LayerShape, dict[str, Tensor]]:
    with safe_open(RECORDED / f"{kernel}.safetensors", "pt") as file:
        assert file.metadata()["kernel"] == kernel
        shape = LayerShape(**json.loads(file.metadata()["shape"]))
        return shape, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def check_as_recorded(run: Run, kept: dict[str, Tensor], case: int) -> None:
    def of(prefix: str) -> dict[str, Tensor]:
        return {n.removeprefix(prefix): t for n, t in kept.items() if n.startswith(prefix)}

    tensors = of("given.") | of(f"{case}.given.")
    expected = of(f"{case}.found.")
    assert expected
    run(tensors)
    for name, value in expected.items():
        found = tensors[name]
        assert torch.equal(found.isnan(), value.isnan()), name  # slots without a token
        found, value = found.nan_to_num(), value.nan_to_num()
        assert relative_rms(found, value) <= LIMITS[name], name
        if name.endswith("_cache"):
            assert (found != value).float().mean() <= 1e-3, name


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_emulation_matches_the_recorded_simulator(kernel, case):
    shape, kept = recorded(kernel)
    made = source.load(kernel, kernels_of(shape), language)
    check_as_recorded(lambda tensors: made(**tensors), kept, case)


@pytest.mark.pypto
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_simulator_matches_its_recording(kernel):
    shape, kept = recorded(kernel)
    run = simulated(kernel, kernels_of(shape))
    for case in CASES:
        check_as_recorded(run, kept, case)
