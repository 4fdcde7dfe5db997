"""What the reports of a comparison show: text, JSON, page and picture."""

import io
import json
import math
import re
from html.parser import HTMLParser

import pytest
import torch
from attrs import asdict, evolve
from checkout import ROOT
from PIL import Image, ImageColor

from tilewright_compare import Comparison, picture
from tilewright_compare.drift import Drift
from tilewright_compare.hypotheses import Explanation, Reason
from tilewright_compare.judge import Finding, Limits, LogitsAgreement, Place, judge_bits
from tilewright_compare.metrics import difference
from tilewright_compare.packing import WeightFinding
from tilewright_compare.page import html
from tilewright_compare.record import record
from tilewright_compare.report import MODES, grouped, text
from tilewright_compare.shades import LIGHT, PASSING

PAGE = (ROOT / "docs/numerics.md").read_text()


def made(layers: int, steps: int, wrong: int | None = None) -> Comparison:
    """A comparison of a deep model, in which everything is wrong from a layer on."""
    near = torch.tensor([[1.0, 2.0]])
    truth = near + 0.001
    off = difference(near, truth)
    comparison = Comparison(
        model="m", reference="torch", candidate="mine", dtype="bfloat16", finished=True
    )
    for step in range(steps):
        for layer in range(layers):
            for stage in ("attn_norm", "attention", "attn_residual", "activation", "output"):
                passed = wrong is None or layer < wrong
                place = Place(
                    mode="chained",
                    phase="decode" if step else "prefill",
                    step=step,
                    tensor=f"layers.{layer}.{stage}",
                )
                most = off.relative_rms * (2 if passed else 1e-4)
                limits = Limits(relative_rms=most, worst_row=1.0, gain=1.0)
                comparison.findings.append(
                    Finding(
                        place=place,
                        passed=passed,
                        why="" if passed else "<too> large",
                        candidate=off,
                        baseline=off,
                        rows=1,
                        limits=limits,
                        excess=limits.excess(off, 0.0),
                    )
                )
        comparison.logits.append(
            LogitsAgreement(
                step=step,
                request=0,
                same_argmax=step != 3,
                top_5=1.0,
                top_50=1.0,
                kl=1e-9,
                margin=1.0,
                error=0.01,
                noise=0.01,
            )
        )
    return comparison


def without_taps(comparison: Comparison, wrong: int | None = None) -> Comparison:
    """The comparison with a run without taps, in which the values of a layer are wrong."""
    layers = {f.place.layer for f in comparison.findings}
    with_taps = torch.tensor([[[1.0, 2.0]]])
    for layer in layers:
        for name in ("k_cache", "v_cache"):
            off = layer == wrong and name == "v_cache"
            tensor = f"layers.{layer}.{name}"
            place = Place(mode="untapped", phase="decode", step=1, tensor=tensor)
            comparison.findings.append(judge_bits(place, with_taps + off, with_taps))
    return comparison


def test_a_run_without_taps_takes_one_line_where_it_is_right():
    right = without_taps(made(2, 2))
    lines = text(right, 80, wrapped=True)
    assert lines[0] == "equal"
    assert "without taps, cache and logits have the same bits" in lines
    assert len(lines) == len(text(made(2, 2), 80, wrapped=True)) + 1
    page = html(right)
    assert "without taps, cache and logits have the same bits" in page
    assert MODES["untapped"] not in page
    assert page.count("<figcaption>step") == html(made(2, 2)).count("<figcaption>step")


def test_a_run_without_taps_has_a_table_and_pictures_where_it_is_wrong():
    wrong = without_taps(made(40, 2), wrong=7)
    lines = text(wrong, 80, wrapped=True)
    assert MODES["untapped"] in lines
    assert [line.split() for line in lines if "bits!" in line] == [["7", "0.0", "bits!"]]
    assert "without taps, 1 of 80 tensors are wrong, in 1 of 1 steps" in lines
    page = html(wrong)
    assert f"Error over its limit: {MODES['untapped']}" in page
    assert "distance from the run with taps" in page
    assert "The bits must be the same" in page
    assert "layers.7.v_cache: bits! 2 of 2 elements differ" in page
    assert opened(wrong).height > opened(without_taps(made(40, 2))).height
    report = record(wrong)
    assert report["divergence"]["tensor"] == "layers.7.v_cache"
    assert (report["divergence"]["excess"], report["divergence"]["baseline"]) == (None, None)


@pytest.mark.parametrize("width", [40, 80])
@pytest.mark.parametrize("wrong", [None, 23])
def test_forty_layers_fit_a_screen_and_its_width(width, wrong):
    lines = text(made(40, 30, wrong), width, wrapped=True)
    assert max(map(len, lines)) <= width
    assert len(lines) < 90


def test_layers_are_grouped_around_the_one_that_matters():
    assert grouped([0, 1, 2], 1) == [[0], [1], [2]]
    groups = grouped(list(range(40)), 23)
    assert [23] in groups
    assert [layer for group in groups for layer in group] == list(range(40))
    assert len(groups) <= 18


def test_a_piped_sentence_is_one_line():
    comparison = made(2, 1, wrong=1)
    lines = text(comparison, 40, wrapped=False)
    assert lines[0] == comparison.sentence


def test_the_step_with_another_token_is_marked_even_among_many():
    lines = text(made(2, 30), 80, wrapped=True)
    assert any(re.match(r" *3 +0/1!", line) for line in lines)
    assert "and 18 more steps that agree better" in lines


def test_a_wrong_weight_comes_before_any_tensor():
    comparison = made(2, 1, wrong=1)
    comparison.weights = [WeightFinding(name="model.norm.weight", passed=False, why="flipped")]
    lines = text(comparison, 80, wrapped=False)
    assert lines[0] == "weight model.norm.weight is packed wrongly: flipped"
    assert record(comparison)["verdict"] == "diverged"


def test_numbers_that_json_has_no_word_for_are_null():
    comparison = made(1, 1)
    nan, zero = torch.tensor([[math.nan, 1.0]]), torch.tensor([[0.0, 0.0]])
    place = Place(mode="chained", phase="prefill", step=0, tensor="logits")
    comparison.findings += [
        Finding(place=place, passed=False, why="off", candidate=difference(nan, zero)),
        Finding(place=place, passed=False, why="the candidate has no such tensor"),
    ]
    comparison.drift = Drift(
        tensor="v_cache", projection="v_proj", dtype="bfloat16", block=8, nearer=math.inf
    )
    guesses = (Explanation(bug="RoPE is missing", excess=math.inf),)
    comparison.reason = Reason(unexplained=math.inf, tried=180, best=guesses)
    written = json.loads(json.dumps(record(comparison), allow_nan=False))
    assert written["findings"][-1]["excess"] is None
    assert written["drift"]["nearer"] is None
    assert written["reason"]["guesses"] == [{"bug": "RoPE is missing", "excess": None}]
    assert html(comparison)


def test_an_unfinished_comparison_is_not_called_equal():
    comparison = made(1, 1)
    comparison.finished = False
    assert record(comparison)["verdict"] == "unfinished"
    assert not comparison.sentence.startswith("equal")
    comparison.drift = Drift(
        tensor="v_cache", projection="v_proj", dtype="bfloat16", block=8, nearer=2.0
    )
    assert record(comparison)["verdict"] == "diverged"
    assert comparison.sentence.startswith("drift: v_proj is added up in bfloat16")


class _Page(HTMLParser):
    """Fails on what a well-formed page without a network does not have."""

    void = ("meta", "br", "hr")

    def __init__(self):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag, attrs):
        assert tag not in ("script", "link", "img", "iframe", "object", "use")
        assert not {"src", "href", "xlink:href", "srcset", "onload"} & dict(attrs).keys()
        self.tags.append(tag)
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize("wrong", [None, 23])
def test_the_page_is_well_formed_and_needs_no_network(wrong):
    page = html(made(40, 30, wrong))
    parser = _Page()
    parser.feed(page)
    assert parser.open == []
    assert "url(" not in page
    assert "://" not in page
    assert "@import" not in page
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page
    assert "<too>" not in page
    assert len(page) < 2_000_000
    # Nothing is told by colour alone: each cell that failed has a cross.
    failed = len(re.findall(r"<rect class='l[4-7]' [^>]*><title>", page))
    assert len(re.findall(r"</rect><path class='cross", page)) == failed
    assert bool(failed) == (wrong is not None)


def test_names_with_markup_are_text_in_the_page():
    name = "<script>alert(\"1\")</script> & 'x'"
    comparison = evolve(made(2, 1, wrong=1), candidate=name, reference=name, model=name)
    comparison.not_compared = [name]
    comparison.weights = [WeightFinding(name=name, passed=False, why=name)]
    first = comparison.findings[-1]
    odd = evolve(first, where=name, place=evolve(first.place, tensor=f"layers.1.{name}"))
    comparison.findings.insert(0, odd)
    page = html(comparison)
    parser = _Page()
    parser.feed(page)
    assert parser.open == []
    assert page.count("&lt;script&gt;") > 10


def test_every_step_has_a_picture_unless_there_are_many():
    assert html(made(2, 5)).count("<figcaption>step") == 5 + 2
    page = html(made(2, 30))
    assert page.count("<figcaption>step") == 12 + 2
    assert "18 more steps" in page


def opened(comparison: Comparison) -> Image.Image:
    with Image.open(io.BytesIO(picture.png(comparison))) as image:
        return image.convert("RGB")


def pixels(image: Image.Image, colour: str) -> int:
    counts = {c: n for n, c in image.getcolors(image.width * image.height)}
    return counts.get(ImageColor.getrgb(colour), 0)


@pytest.mark.parametrize(
    ("layers", "steps", "wrong"), [(2, 1, None), (2, 1, 1), (40, 30, 23), (94, 3, 60)]
)
def test_the_picture_is_as_wide_as_ever_and_small_enough_to_send(layers, steps, wrong):
    file = picture.png(made(layers, steps, wrong))
    with Image.open(io.BytesIO(file)) as image:
        assert (image.format, image.width) == ("PNG", picture.WIDTH)
        assert image.height < 2.5 * image.width
    assert len(file) < 500_000


def test_the_picture_is_in_the_colours_of_the_page():
    right, wrong = opened(made(40, 2)), opened(made(40, 2, wrong=23))
    page = html(made(40, 2))
    for shade, colour in enumerate(LIGHT.shades):
        assert f"--l{shade}: {colour};" in page
        assert pixels(right, colour) > 0, "each shade is in the legend"
    failed = LIGHT.shades[PASSING + 1 :]
    assert sum(pixels(wrong, c) for c in failed) > 3 * sum(pixels(right, c) for c in failed)


def test_each_cell_that_failed_has_a_cross_in_the_picture(monkeypatch):
    grey = evolve(LIGHT, shades=("#888888",) * 8, crosses=("#ff00ff",) * 4)
    monkeypatch.setattr(picture, "LIGHT", grey)
    legend = pixels(opened(made(40, 1)), "#ff00ff")
    one, two = (pixels(opened(made(40, 1, wrong)), "#ff00ff") for wrong in (39, 38))
    assert one - legend >= 5 * 8
    assert two - legend == 2 * (one - legend)


def test_the_picture_shows_what_is_there():
    comparison = made(1, 1)
    comparison.findings = []
    comparison.finished = False
    assert 0 < opened(comparison).height < opened(made(1, 1)).height
    comparison.model = "m" * 500
    comparison.weights = [WeightFinding(name="w" * 500, passed=False, why="flipped")]
    comparison.findings = [
        Finding(
            place=Place(mode="chained", phase="prefill", step=0, tensor=tensor),
            passed=False,
            why="the candidate has no such tensor",
        )
        for tensor in ("embed", "layers.7.output")
    ]
    assert opened(comparison).width == picture.WIDTH


def test_the_verdict_is_repeated_where_the_report_is_long():
    long, short = made(40, 30, wrong=23), made(2, 1)
    lines = text(long, 80, wrapped=False)
    assert len(lines) > 30
    assert lines[-2:] == ["", long.sentence]
    lines = text(short, 80, wrapped=False)
    assert len(lines) < 30
    assert lines.count(short.sentence) == 1


def test_the_documentation_names_every_key_of_the_report():
    comparison = made(1, 1, wrong=0)
    best = (Explanation(bug="RoPE is missing", excess=1.0),)
    comparison.reason = Reason(unexplained=9.0, tried=180, best=best)
    report = record(comparison)
    finding, reason = report["findings"][0], report["reason"]
    drift = Drift(tensor="v_cache", projection="v_proj", dtype="bfloat16", block=8, nearer=2.0)
    parts = (finding, finding["candidate"], report["logits"][0], reason, reason["guesses"][0])
    parts += (report["ratios"][0], asdict(drift))
    for keys in (report, *parts):
        for key in keys.keys() - {"elements"}:
            assert f"`{key}`" in PAGE, key
