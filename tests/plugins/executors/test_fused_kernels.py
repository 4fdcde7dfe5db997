"""Qwen3 as one program a step: its logits and caches are those of the kernels of single layers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attrs import evolve
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


@pytest.mark.parametrize(
    "make", [emulated, pytest.param(simulated, marks=pytest.mark.pypto, id="a2a3sim")]
)
@pytest.mark.parametrize("phase", STEPS)
def test_a_fused_step_computes_what_the_layer_kernels_do(make, phase):
    shape = layer_shape(CONFIG, RUNTIME)
    weights, (histories, new) = random_weights(CONFIG), STEPS[phase]
    cache = Cache(shape, 64)
    cache.add(*histories)
    batch = cache.step(new)
    hidden = torch.randn(sum(new), shape.hidden, generator=torch.Generator().manual_seed(1))
    hidden = hidden.bfloat16()
    wanted = batch.query_starts[1:] - 1
    of_layers = [kernel_weights(weights, layer) for layer in range(LAYERS)]
    of_head = {
        "final_norm": weights.get("model.norm.weight").float().unsqueeze(0),
        "lm_head": weights.get("lm_head.weight"),
    }
    logits = torch.full((len(new), CONFIG.vocab_size), float("nan"))

    x, caches = hidden, []
    layer_kernel = emulated(f"{phase}_layer", qwen3.kernels_of(shape))
    for of_layer in of_layers:
        given = layer_inputs(f"{phase}_layer", CONFIG, of_layer, x, batch, cache)
        layer_kernel(given)
        x = given["out"]
        caches.append((given["k_cache"], given["v_cache"]))
    expected = logits.clone()
    rows = x[wanted.long()]
    emulated("head", qwen3.kernels_of(shape))({"hidden": rows, "logits": expected, **of_head})

    stacked = {name: torch.cat([w[name] for w in of_layers]) for name in of_layers[0]}
    given = layer_inputs(f"{phase}_layer", CONFIG, stacked, hidden, batch, cache)
    del given["out"]
    given["k_cache"] = torch.cat([rows_of(cache.key)] * LAYERS)
    given["v_cache"] = torch.cat([rows_of(cache.value)] * LAYERS)
    given |= {"logits_rows": wanted, "logits": logits, **of_head}
    make(f"{phase}_model", fused.kernel_set(CONFIG, RUNTIME))(given)

    # The simulator sums products in another order.
    limit = 0 if make is emulated else 2e-3
    assert relative_rms(given["logits"], expected) <= limit
    for name, written in zip(("k_cache", "v_cache"), zip(*caches, strict=True), strict=True):
        found, kept = given[name], torch.cat(written)
        assert torch.equal(found.isnan(), kept.isnan())
        assert relative_rms(found.nan_to_num(), kept.nan_to_num()) <= limit


@pytest.mark.pypto
@pytest.mark.parametrize("kernel", fused.KERNELS)
def test_no_variable_of_the_generated_code_shadows_another(kernel, tmp_path):
    loaded = source.load(kernel, fused.kernel_set(CONFIG, RUNTIME), pypto_or_skip())
    assert orchestration_complaints(loaded, tmp_path) == []
