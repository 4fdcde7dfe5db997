"""Sums in 16 bits, whose errors are within the limits, and errors against those of an earlier
report."""

import json
from collections.abc import Iterator
from pathlib import Path

import planted
import pytest
import torch
from attrs import evolve
from kernel_mistakes import SUMS_IN_BF16, made
from planted import Way, installed
from reference_models import prompts, write_model
from transformers import Qwen3Config

from tilewright.types import RuntimeConfig
from tilewright_compare import Choice, Comparison, compare
from tilewright_compare.advice import advice
from tilewright_compare.against import GROWTH, Change, Earlier, Ratio, ratios
from tilewright_compare.default_run import Plan
from tilewright_compare.judge import Tolerance, slack
from tilewright_compare.record import record
from tilewright_compare.report import ratio_lines

CONFIG = Qwen3Config(
    hidden_size=1024,
    intermediate_size=256,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    vocab_size=96,
    max_position_embeddings=128,
)
IDS = list(prompts(CONFIG, [30]))
TORCH = Choice(executor="torch")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model of hidden size 1,024, while ``planted`` is installed."""
    folder = tmp_path_factory.mktemp("model")
    write_model(CONFIG, folder / "model", "bfloat16")
    with installed(folder):
        yield folder / "model"


def compared(
    model: Path, monkeypatch, product=planted.product, earlier=None, tolerances=()
) -> Comparison:
    """planted, whose products are computed that way, against torch."""
    monkeypatch.setattr(planted, "RIGHT", Way(product=product))
    candidate = Choice(executor="planted", runtime=RuntimeConfig(weight_dtype="bfloat16"))
    return compare(
        model, TORCH, candidate, IDS, new_tokens=2, against=earlier, tolerances=tolerances
    )


def sums_in_bfloat16(block: int, backwards: bool = False):
    def product(x, weight):
        total = torch.zeros(len(x), len(weight))
        starts = range(0, x.shape[1], block)
        for i in reversed(starts) if backwards else starts:
            part = x[:, i : i + block].float() @ weight[:, i : i + block].float().T
            total = (total + part).bfloat16().float()
        return total

    return product


@pytest.mark.parametrize("block", [128, 256, 512])
def test_sums_in_16_bits_are_found_though_their_error_is_within_the_limit(
    model, monkeypatch, block
):
    found = compared(model, monkeypatch, sums_in_bfloat16(block))
    assert all(f.passed for f in found.findings)
    assert not found.equal
    assert found.sentence == (
        f"drift: q_proj is added up in bfloat16, rounded after every {block} terms: "
        "layers.0.q_proj has the bits of such sums, and not of sums in float32, though its error "
        "is within its limit"
    )
    assert advice(found) == ["keep the sums of q_proj in float32 to the last term"]
    assert record(found)["verdict"] == "diverged"
    assert record(found)["drift"]["block"] == block


def test_sums_in_16_bits_are_told_where_the_limits_show_them_too(model, monkeypatch):
    found = compared(model, monkeypatch, sums_in_bfloat16(16))
    assert found.divergence is not None
    assert found.drift is not None
    assert ratio_lines(found)[-1] == found.drift.sentence


def test_a_tolerance_excuses_sums_in_16_bits(model, monkeypatch):
    wide = [Tolerance("*", "relative_rms", 0.1)]
    assert compared(model, monkeypatch, sums_in_bfloat16(256), tolerances=wide).equal


@pytest.mark.parametrize("wrong", [False, True])
def test_sums_in_16_bits_of_a_kernel_are_found_by_the_cache(model, tmp_path, wrong):
    mistake = SUMS_IN_BF16 if wrong else evolve(SUMS_IN_BF16, wrong=SUMS_IN_BF16.right)
    candidate = Choice(executor="pypto-npu", options={"platform": "emulated"})
    with made(mistake, tmp_path):
        found = compare(model, TORCH, candidate, IDS, new_tokens=2)
    assert all(f.passed for f in found.findings)
    assert found.equal != wrong
    if wrong:
        assert found.sentence.startswith("drift: v_proj is added up in bfloat16, rounded after ")


def earlier(found: Comparison) -> Earlier:
    """The report of a comparison, as it is read again."""
    report = json.loads(json.dumps(record(found)))
    return Earlier(
        path="last.json",
        dtype=report["dtype"],
        runtime=report["runtime"],
        made={"date": "2026-01-01"},
        plan=Plan(prompts=IDS, new_tokens=2, chunk=512, page_size=None),
        ratios=ratios(found.findings),
    )


def test_a_loss_that_the_limits_allow_is_found_against_an_earlier_report(model, monkeypatch):
    before = earlier(compared(model, monkeypatch))
    low = sums_in_bfloat16(128, backwards=True)
    assert compared(model, monkeypatch, low).equal, "no one report shows it"
    found = compared(model, monkeypatch, low, before)
    assert not found.equal
    assert found.against is not None
    assert found.sentence.startswith("less accurate than before: 1.")
    assert "times the error of last.json in prefill, layers.0.q_proj (ratio to the baseline" in (
        found.sentence
    )
    assert "layers.0.v_cache" in [c.now.tensor for c in found.against.grown]
    assert advice(found) == ["look at what changed in q_proj since 2026-01-01"]
    better = compared(model, monkeypatch, earlier=earlier(compared(model, monkeypatch, low)))
    assert better.equal
    assert better.against is not None
    assert any("least: 0." in line for line in better.against.lines())


@pytest.mark.parametrize("block", [32, 1024])
def test_another_order_of_sums_is_no_loss_against_an_earlier_report(model, monkeypatch, block):
    before = earlier(compared(model, monkeypatch))

    def product(x, weight):
        return planted.product(x, weight, block)

    found = compared(model, monkeypatch, product, before)
    assert found.against is not None
    assert [c.told("") for c in found.against.grown] == []
    assert found.equal
    assert len(found.against.changes) > 20


def change(rows: int, then: float, now: float, baseline: float = 0.01) -> Change:
    def at(error: float) -> Ratio:
        return Ratio(
            mode="chained",
            phase="prefill",
            layer=1,
            stage="output",
            rows=rows,
            candidate=error,
            baseline=baseline,
        )

    return Change(then=at(then), now=at(now))


def test_how_far_an_error_may_grow_follows_from_the_number_of_rows():
    many, few = change(10_000, 0.003, 0.004), change(4, 0.003, 0.004)
    assert many.factor == pytest.approx(4 / 3)
    assert many.scatter == pytest.approx(GROWTH * slack("chained", 10_000))
    assert many.grew
    assert not few.grew
    assert many.told("a.json") == (
        "1.3 times the error of a.json in prefill, layers.1.output (ratio to the baseline's own "
        "error 0.30 then, 0.40 now)"
    )


def test_errors_that_the_order_of_sums_explains_do_not_grow():
    assert not change(10_000, 1e-7, 1e-5, baseline=0.0).grew
    exact = change(10_000, 1e-5, 1e-3, baseline=0.0)
    assert exact.grew
    assert "(relative RMS 1e-05 then, 0.001 now)" in exact.told("a.json")
    assert change(10_000, 1e-3, 1e-5, baseline=0.0).shrank
