"""Mistakes in whole-model programs, with layer kernels beside them and without."""

from collections.abc import Iterator
from pathlib import Path
from shutil import copyfile
from unittest import mock

import kernel_mistakes
import plugin_distributions as dists
import pytest
from plugin_distributions import Distribution
from reference_models import prompts, write_model
from transformers import Qwen3Config

from tilewright.cli import main
from tilewright.types import RuntimeConfig
from tilewright_compare import Choice, Comparison, compare
from tilewright_kernels.qwen3_fused import plugin as fused

CONFIG = Qwen3Config(
    **kernel_mistakes.CONFIG.to_diff_dict() | {"num_hidden_layers": 3, "layer_types": None}
)

PROGRAMS = """
from attrs import evolve
from tilewright import hookimpl
from tilewright_kernels.qwen3_fused import plugin as fused

tilewright_api = 2
served_models = fused.served_models

@hookimpl
def kernel_set(model_config, runtime_config):
    kernels = fused.kernel_set(model_config, runtime_config)
    return evolve(kernels, constants={name: kernels.constants[name] for name in fused.PROGRAMS})
"""
"""The shipped set without its layer kernels."""

BOTH, ALONE = "qwen3-fused", "programs"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model; the kernel set ``programs`` is installed meanwhile."""
    folder = tmp_path_factory.mktemp("fused")
    write_model(CONFIG, folder / "model", "bfloat16")
    with dists.on_path(folder / "site") as install:
        plugins = {"kernels": {ALONE: "acme_programs"}}
        install(Distribution("acme-programs", {"acme_programs.py": PROGRAMS}, plugins))
        yield folder / "model"


def compared(model: Path, kernels: str, file: str, right: str, wrong: str, at: Path) -> Comparison:
    """A comparison of a set whose file was changed."""
    copies = {n: Path(copyfile(f, at / f"{n}.py")) for n, f in fused.SOURCES.items()}
    text = copies[file].read_text()
    assert text.count(right) == 1
    copies[file].write_text(text.replace(right, wrong))
    candidate = Choice(
        executor="pypto-npu",
        options={"platform": "emulated", "kernels": kernels},
        runtime=RuntimeConfig(page_size=16),
    )
    ids = list(prompts(CONFIG, [20, 3]))
    with mock.patch.dict(fused.SOURCES, copies):
        return compare(model, Choice(executor="torch"), candidate, ids, new_tokens=3)


LAST = "pl.min(layer, LAYERS - 2)"
MISTAKES = {
    # file, what stands there, what is put there; phase, and the tensor that must be named
    "the layer before the last, run twice": (
        "prefill_model", "layer, x,", f"{LAST}, x,", "prefill", "layers.1.k_cache",
    ),
    "caches swapped": (
        "decode_model", "k_cache, v_cache, y", "v_cache, k_cache, y", "decode", "layers.0.k_cache",
    ),
    "the head reads the layer before": (
        "decode_model", "last = LAYERS % 2", "last = (LAYERS + 1) % 2", "decode", "logits",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kernels", [BOTH, ALONE])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_program_is_found(mistake, kernels, model, tmp_path):
    file, right, wrong, phase, tensor = MISTAKES[mistake]
    found = compared(model, kernels, file, right, wrong, tmp_path)
    first = found.divergence
    assert first is not None
    assert not found.equal
    mode = "untapped" if kernels == BOTH else "chained"
    assert (first.place.mode, first.place.phase, first.place.tensor) == (mode, phase, tensor)
    if kernels == BOTH:
        assert found.sentence.startswith(
            f"right with taps, wrong without: diverges first in {phase}"
        )
        assert "limits.tap_exact says" in first.why


IN_LAYERS = {
    # what stands there, what is put there; the tensor that must be named with layer kernels and
    # without: the program overwrites what it had cached for the layer before
    "weights of the layer before the last": (
        "    first = layer * HIDDEN", f"    first = {LAST} * HIDDEN",
        "layers.2.k_cache", "layers.2.k_cache",
    ),
    "cache of the layer before the last": (
        "    cache_row = layer * layer_rows", f"    cache_row = {LAST} * layer_rows",
        "layers.2.k_cache", "layers.1.k_cache",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kernels", [BOTH, ALONE])
@pytest.mark.parametrize("mistake", IN_LAYERS)
def test_a_mistake_in_what_programs_and_layer_kernels_share_is_found_in_its_layer(
    mistake, kernels, model, tmp_path
):
    right, wrong, *tensors = IN_LAYERS[mistake]
    found = compared(model, kernels, "decode_layer", right, wrong, tmp_path)
    assert found.divergence is not None
    place = found.divergence.place
    mode, tensor = ("isolated", tensors[0]) if kernels == BOTH else ("chained", tensors[1])
    assert (place.mode, place.phase, place.tensor) == (mode, "decode", tensor), found.sentence


@pytest.mark.parametrize("kernels", [BOTH, ALONE])
def test_right_programs_are_equal_and_what_is_not_tapped_is_said(kernels, model, capsys):
    argv = ["compare", "--model", str(model), "--candidate", "pypto-npu", "--new-tokens", "3"]
    argv += ["-o", "candidate.platform=emulated", "-o", f"candidate.kernels={kernels}"]
    assert main([*argv, "-o", "candidate.runtime.page_size=16", "--prompt", "We the People"]) == 0
    said = capsys.readouterr().out
    (untapped,) = (line for line in said.splitlines() if line.startswith("not compared"))
    assert ("output" in untapped.split(": ")[1].split(", ")) == (kernels == ALONE)
    assert "perplexity of the prompt" in said
