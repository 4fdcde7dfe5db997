"""Mistakes planted in copies of the kernels' source, and what a comparison says of them."""

from pathlib import Path
from shutil import copyfile

import kernel_mistakes
import pytest
from kernel_mistakes import CONFIG, made
from reference_models import prompts, write_model

from tilewright_compare import Choice, compare
from tilewright_compare.advice import advice
from tilewright_kernels.qwen3_14b.plugin import SOURCES

CANDIDATE = Choice(executor="pypto-npu", options={"platform": "emulated"})
POSITION = "position = pl.cast(pl.read(context_lens, [row + token]), pl.INDEX) - 1"

MISTAKES = {
    # file, what stands there, what is put there; phase and stages that it must be found in; why
    "RoPE turned the other way": (
        "blocks", "low_r = pl.sub(", "low_r = pl.add(", "prefill", ("k_cache",),
        None,
    ),
    "keys stored as values": (
        "prefill_layer", "write_cache(values,", "write_cache(keys,", "prefill",
        ("v_cache",), "keys are cached as values",
    ),
    "attention scale missing": (
        "blocks", "0:KV_TILE], SCALE)", "0:KV_TILE], 1.0)", "prefill", ("output",),
        "the attention scale is missing",
    ),
    "gate and up swapped": (
        "blocks", "gate = project(normed, w_gate,", "gate = project(normed, w_up,", "prefill",
        ("output",), "gate_proj has up_proj's weight",
    ),
    "residual missing": (
        "blocks", "x = add_rows(x, down)", "x = down", "prefill", ("output",),
        "the second residual is missing",
    ),
    "positions one behind in decode": (
        "decode_layer", POSITION, POSITION.replace("- 1", "- 2"), "decode", ("k_cache",),
        "RoPE's positions are behind by one",
    ),
    "a sum that ends early": (
        "head", "pl.range(K_TILE, HIDDEN,", "pl.range(2 * K_TILE, HIDDEN,", "prefill", ("logits",),
        "columns of lm_head from 32 to 63 or some of them are left out",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_model(CONFIG, folder, "bfloat16")
    return folder


QUICK = (
    "values not rescaled",
    "first tile skipped",
    "last tile not masked",
    "chunk start ignored in attention",
    "pages of sequence 0 for all",
    "contexts of the first batch tile",
    "first KV head cached for all",
    "rows of the first tile in the head",
    "half a head normed",
    "cosine and sine swapped",
    "values in the slots of the step's first rows",
)
"""One of each kind; together, all take minutes."""


@pytest.mark.parametrize(
    "mistake",
    [
        pytest.param(m, marks=() if m in QUICK else pytest.mark.slow)
        for m in kernel_mistakes.MISTAKES
    ],
)
def test_a_mistake_in_tiles_is_found_and_named(mistake, model, tmp_path):
    planted = kernel_mistakes.MISTAKES[mistake]
    with made(planted, tmp_path):
        found = kernel_mistakes.compared(model, planted.run)
    assert found.divergence is not None
    place = found.divergence.place
    assert (place.mode, place.phase) == ("isolated", planted.phase), found.sentence
    assert place.stage in planted.stages, found.sentence
    assert place.layer == (None if planted.stages == ("logits",) else 0)
    assert found.reason is not None
    assert {e.bug for e in found.reason.named} == {planted.cause, *planted.same}
    assert planted.where in ("", found.divergence.pattern)
    assert advice(found)[0].startswith(planted.check)


def test_sums_in_bfloat16_are_found_and_named_in_a_wide_model(tmp_path):
    write_model(kernel_mistakes.WIDE, tmp_path / "model", "bfloat16")
    mistake = kernel_mistakes.SUMS_IN_BF16
    (tmp_path / "kernels").mkdir()
    with made(mistake, tmp_path / "kernels"):
        found = kernel_mistakes.compared(tmp_path / "model", mistake.run)
    assert found.divergence is not None
    place = found.divergence.place
    assert (place.phase, place.layer) == ("prefill", 0)
    assert place.stage in mistake.stages
    assert found.reason is not None
    assert [e.bug for e in found.reason.named] == [mistake.cause]


@pytest.mark.parametrize("run", [kernel_mistakes.PREFILL, kernel_mistakes.DECODE])
def test_kernels_without_a_mistake_are_right_in_the_same_runs(run, model):
    assert kernel_mistakes.compared(model, run).equal


@pytest.fixture
def kernels(tmp_path, monkeypatch) -> Path:
    """A copy of the kernels' source, which is loaded in place of it."""
    for name, file in dict(SOURCES).items():
        monkeypatch.setitem(SOURCES, name, Path(copyfile(file, tmp_path / file.name)))
    return tmp_path


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_kernel_is_found_and_named(mistake, model, kernels):
    name, right, wrong, phase, stages, why = MISTAKES[mistake]
    file = kernels / f"{name}.py"
    text = file.read_text()
    assert text.count(right) == 1
    file.write_text(text.replace(right, wrong))
    ids = list(prompts(CONFIG, [20, 3]))
    found = compare(model, Choice(executor="torch"), CANDIDATE, ids, new_tokens=3)
    assert found.divergence is not None
    place = found.divergence.place
    assert (place.mode, place.phase) == ("isolated", phase), found.sentence
    assert place.stage in stages, found.sentence
    assert place.layer == (None if stages == ("logits",) else 0)
    assert all(w.passed for w in found.weights)
    assert found.reason is not None
    assert [e.bug for e in found.reason.named] == ([why] if why else [])


def test_the_copies_themselves_are_right(model, kernels):
    ids = list(prompts(CONFIG, [20, 3]))
    assert compare(model, Choice(executor="torch"), CANDIDATE, ids, new_tokens=3).equal
