"""Qwen3 as one program a step: it and its layer kernels compute what the kernels of qwen3 do."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attrs import evolve, frozen
from pypto_oracle import orchestration_complaints, pypto_or_skip, simulated
from qwen3_layers import (
    Cache,
    config_of,
    kernel_weights,
    layer_inputs,
    random_weights,
    relative_rms,
    rows_of,
)
from torch import Tensor

from tilewright.types import KernelSet, RuntimeConfig
from tilewright_kernels import source
from tilewright_kernels.qwen3_14b import plugin as qwen3
from tilewright_kernels.qwen3_14b.shape import LayerShape, layer_shape
from tilewright_kernels.qwen3_fused import plugin as fused
from tilewright_pypto.emulated import language

LAYERS = 3
SHAPE = LayerShape(hidden=96, intermediate=160, heads=4, kv_heads=2, head_dim=32, page_size=16)
CONFIG = evolve(config_of(SHAPE), num_layers=LAYERS)
RUNTIME = RuntimeConfig(page_size=16, max_batch_tokens=64, max_batch_size=18)
STEPS = {"prefill": ([0, 20, 5], [17, 9, 1]), "decode": ([16, 3, 33] * 6, [1] * 18)}
"""Tokens in the cache, and new ones, of each sequence."""


def emulated(kernel: str, kernels: KernelSet) -> Callable[[dict[str, Tensor]], Any]:
    made = source.load(kernel, kernels, language)
    return lambda tensors: made(**tensors)


everywhere = pytest.mark.parametrize(
    "make", [emulated, pytest.param(simulated, marks=pytest.mark.pypto, id="a2a3sim")]
)
# The simulator sums products in another order.
LIMIT = {emulated: 0, simulated: 2e-3}


@frozen
class Step:
    """A step of all layers, and what the kernels of qwen3 compute in it."""

    given: dict[str, Tensor]
    """Parameters of the kernels by name, with the weights and caches of all layers."""
    hidden: list[Tensor]
    """[T, hidden_size] BF16: the input of each layer, then the output of the last."""
    k_cache: Tensor
    v_cache: Tensor
    """The caches of all layers after the step."""
    logits: Tensor
    """[L, vocab_size] FP32."""


def step_of(phase: str) -> Step:
    shape = layer_shape(CONFIG, RUNTIME)
    weights, (histories, new) = random_weights(CONFIG), STEPS[phase]
    cache = Cache(shape, 64)
    cache.add(*histories)
    batch = cache.step(new)
    hidden = torch.randn(sum(new), shape.hidden, generator=torch.Generator().manual_seed(1))
    hidden = [hidden.bfloat16()]
    wanted = batch.query_starts[1:] - 1
    of_layers = [kernel_weights(weights, layer) for layer in range(LAYERS)]
    of_head = {
        "final_norm": weights.get("model.norm.weight").float().unsqueeze(0),
        "lm_head": weights.get("lm_head.weight"),
    }
    logits = torch.full((len(new), CONFIG.vocab_size), float("nan"))

    caches = []
    layer_kernel = emulated(f"{phase}_layer", qwen3.kernels_of(shape))
    for of_layer in of_layers:
        given = layer_inputs(f"{phase}_layer", CONFIG, of_layer, hidden[-1], batch, cache)
        layer_kernel(given)
        hidden.append(given["out"])
        caches.append((given["k_cache"], given["v_cache"]))
    expected = logits.clone()
    rows = hidden[-1][wanted.long()]
    emulated("head", qwen3.kernels_of(shape))({"hidden": rows, "logits": expected, **of_head})

    stacked = {name: torch.cat([w[name] for w in of_layers]) for name in of_layers[0]}
    given = layer_inputs(f"{phase}_layer", CONFIG, stacked, hidden[0], batch, cache)
    given["k_cache"] = torch.cat([rows_of(cache.key)] * LAYERS)
    given["v_cache"] = torch.cat([rows_of(cache.value)] * LAYERS)
    given |= {"logits_rows": wanted, "logits": logits, **of_head}
    keys, values = (torch.cat(written) for written in zip(*caches, strict=True))
    return Step(given, hidden, keys, values, expected)


def agrees(found: Tensor, expected: Tensor, limit: float) -> bool:
    same_slots = torch.equal(found.isnan(), expected.isnan())
    return same_slots and relative_rms(found.nan_to_num(), expected.nan_to_num()) <= limit


def run(make: Any, kernel: str, given: dict[str, Tensor]) -> None:
    kernels = fused.kernel_set(CONFIG, RUNTIME)
    names = [p.name for p in source.contract(kernel, kernels).parameters]
    make(kernel, kernels)({name: given[name] for name in names})


@everywhere
@pytest.mark.parametrize("phase", STEPS)
def test_a_program_computes_what_the_kernels_of_qwen3_do(make, phase):
    step, limit = step_of(phase), LIMIT[make]
    run(make, f"{phase}_model", step.given)
    assert agrees(step.given["logits"], step.logits, limit)
    assert agrees(step.given["k_cache"], step.k_cache, limit)
    assert agrees(step.given["v_cache"], step.v_cache, limit)


@everywhere
@pytest.mark.parametrize("phase", STEPS)
def test_a_layer_kernel_runs_the_layer_that_it_is_given(make, phase):
    step, limit = step_of(phase), LIMIT[make]
    rows = len(step.k_cache) // LAYERS
    for layer in (LAYERS - 1, 0):
        given = {
            name: tensor.clone() if name.endswith("_cache") else tensor
            for name, tensor in step.given.items()
        }
        given["layer"] = torch.tensor([layer], dtype=torch.int32)
        given["hidden"], given["out"] = step.hidden[layer], torch.empty_like(step.hidden[0])
        run(make, f"{phase}_layer", given)
        assert agrees(given["out"], step.hidden[layer + 1], limit)
        own = slice(layer * rows, layer * rows + rows)
        for name, written in (("k_cache", step.k_cache), ("v_cache", step.v_cache)):
            expected = step.given[name].clone()
            expected[own] = written[own]
            assert agrees(given[name], expected, limit)


@pytest.mark.pypto
@pytest.mark.parametrize("kernel", [*fused.LAYER_KERNELS, *fused.PROGRAMS])
def test_no_variable_of_the_generated_code_shadows_another(kernel, tmp_path):
    loaded = source.load(kernel, fused.kernel_set(CONFIG, RUNTIME), pypto_or_skip())
    assert orchestration_complaints(loaded, tmp_path) == []
