"""``tilewright compare``, its reports, and what its exit codes say."""

import io
import json
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import plugin_distributions as dists
import pytest
import torch
from attrs import asdict, evolve
from checkout import ROOT
from PIL import Image, ImageColor
from plugin_distributions import documented, on_path
from terminal import Terminal

from tilewright.cli import main
from tilewright_compare import Comparison, picture
from tilewright_compare.drift import Drift
from tilewright_compare.hypotheses import Explanation, Reason
from tilewright_compare.judge import Finding, Limits, LogitsAgreement, Place, judge_bits
from tilewright_compare.metrics import difference
from tilewright_compare.packing import WeightFinding
from tilewright_compare.page import html
from tilewright_compare.report import MODES, grouped, record, text
from tilewright_compare.shades import LIGHT, PASSING
from tilewright_torch.model import TorchExecutor

SHORT = ["--prompt", "We the People", "--new-tokens", "2"]
SEVEN = ["-o", "candidate.runtime.page_size=7"]
EMULATED = ["--candidate", "pypto-npu", "-o", "candidate.platform=emulated"]


@pytest.fixture
def wrong_layer(monkeypatch):
    """Layer 1 of the candidate, which is the side with pages of 7, puts out a tenth too much."""
    run_layer = TorchExecutor.run_layer

    def wrong(self, step, layer, hidden, tap=None):
        output = run_layer(self, step, layer, hidden, tap)
        if layer == 1 and self.kv_cache_spec.page_size == 7:
            output = output * 1.1
            if tap:
                tap("layers.1.output", output)
        return output

    monkeypatch.setattr(TorchExecutor, "run_layer", wrong)


def compared(capsys, *argv: str) -> tuple[int, str, str]:
    code = main(["compare", *argv])
    return code, *capsys.readouterr()


# --- verdicts -------------------------------------------------------------------------------------


def test_another_page_size_changes_nothing(capsys):
    code, out, _ = compared(capsys, *SEVEN)
    assert code == 0
    assert out.startswith("equal over 5 prompts, ")
    assert "!" not in out.replace("! is too large", "")


def test_the_npu_kernels_are_as_near_as_rounding_allows(capsys):
    code, out, _ = compared(capsys, *SHORT, *EMULATED, "--json")
    report = json.loads(out)
    assert (code, report["verdict"]) == (0, "equal")
    assert report["candidate"] == "pypto-npu"
    tensors = {f["tensor"] for f in report["findings"]}
    assert {"embed", "layers.2.output", "layers.0.k_cache", "logits"} <= tensors
    assert {f["phase"] for f in report["findings"]} == {"prefill", "decode"}
    assert {"q_proj", "attention", "down_proj"} <= set(report["not_compared"])
    assert {"output", "logits"}.isdisjoint(report["not_compared"])


def test_stages_that_the_candidate_does_not_tap_are_listed(capsys, tmp_path):
    page = str(tmp_path / "page.html")
    _, out, _ = compared(capsys, *SHORT, *EMULATED, "--html", page)
    told = "not compared, because pypto-npu does not tap them: attn_norm, q_proj, k_proj, v_proj"
    assert told in out
    assert told in Path(page).read_text()
    _, out, _ = compared(capsys, *SHORT, *SEVEN)
    assert "not compared" not in out


def test_layers_are_tried_alone_when_asked_for(capsys):
    code, out, _ = compared(capsys, *SHORT, *SEVEN, "--isolate", "--json")
    report = json.loads(out)
    assert (code, report["verdict"]) == (0, "equal")
    assert {f["mode"] for f in report["findings"]} == {"chained", "isolated", "untapped"}


def test_the_truth_is_in_float32(capsys):
    argv = [*SHORT, "-o", "candidate.runtime.weight_dtype=float32", "--json"]
    code, out, _ = compared(capsys, *argv)
    report = json.loads(out)
    assert (code, report["dtype"]) == (0, "float32")
    assert all(f["candidate"]["relative_rms"] == 0 for f in report["findings"])


def test_a_wrong_layer_is_named_and_ends_with_code_1(capsys, wrong_layer):
    code, out, _ = compared(capsys, *SHORT, *SEVEN)
    assert code == 1
    first = out.splitlines()[0]
    assert "layers.1.output" in first
    assert "prefill step 0" in first
    assert "next: check the second residual" in out


def test_the_reports_of_a_wrong_layer_agree(capsys, wrong_layer, tmp_path):
    page, file, heat = (tmp_path / f"report.{kind}" for kind in ("html", "json", "png"))
    argv = [*SHORT, *SEVEN, "--json", "--html", str(page), "--output", str(file)]
    code, out, _ = compared(capsys, *argv, "--png", str(heat))
    assert (code, out) == (1, "")
    report = json.loads(file.read_text())
    assert report["divergence"]["tensor"] == "layers.1.output"
    assert report["divergence"]["mode"] == "isolated"
    assert "layers.1.output" in report["sentence"]
    assert report["sentence"].split(";")[0] in page.read_text().replace("&#39;", "'")
    assert sorted(os.listdir(tmp_path)) == ["report.html", "report.json", "report.png"]
    with Image.open(heat) as image:
        assert (image.format, image.width) == ("PNG", picture.WIDTH)
    alone = [f for f in report["findings"] if f["mode"] == "isolated" and not f["passed"]]
    assert {f["tensor"] for f in alone} == {"layers.1.output"}


def test_a_path_that_is_wrong_without_taps_is_told_in_every_report(capsys, tmp_path, monkeypatch):
    forward = TorchExecutor.forward

    def wrong(self, batch, tap=None):
        logits = forward(self, batch, tap)
        return logits if tap or self.kv_cache_spec.page_size != 7 else logits + 1

    monkeypatch.setattr(TorchExecutor, "forward", wrong)
    page, heat = tmp_path / "page.html", tmp_path / "map.png"
    files = ["--html", str(page), "--png", str(heat)]
    code, out, _ = compared(capsys, *SHORT, *SEVEN, *files)
    assert code == 1
    told = "right with taps, wrong without: diverges first in prefill step 0, logits: 1999 of 1999"
    assert out.startswith(told)
    assert "next: look at what forward runs when it has no tap: the last layer and the head" in out
    assert told in page.read_text()
    assert Image.open(heat).width == picture.WIDTH
    _, out, _ = compared(capsys, *SHORT, *SEVEN, "--json")
    report = json.loads(out)
    assert report["verdict"] == "diverged"
    assert report["divergence"]["mode"] == "untapped"
    assert report["divergence"]["candidate"]["max_abs"] == pytest.approx(1, abs=1e-3)
    wrong_ones = [(f["mode"], f["tensor"]) for f in report["findings"] if not f["passed"]]
    assert set(wrong_ones) == {("untapped", "logits")}


def test_steps_that_mix_are_told_when_they_could_not_be_compared(capsys, tmp_path):
    page, heat = tmp_path / "page.html", tmp_path / "map.png"
    files = ["--html", str(page), "--png", str(heat)]
    code, out, _ = compared(capsys, *SHORT, *SEVEN, "--chunk", "2", *files)
    missed, why = "mixed prompts and decoding in a step", "a step of 2 tokens is too small"
    assert code == 0
    assert missed in out.splitlines()[0]
    assert f"{missed} ({why})" in out
    assert page.read_text().count(missed) == 2
    _, out, _ = compared(capsys, *SHORT, *SEVEN, "--chunk", "2", "--json")
    items = {item["name"]: item for item in json.loads(out)["coverage"]}
    assert items[missed] == {"name": missed, "reached": False, "detail": why}
    _, out, _ = compared(capsys, *SHORT, *SEVEN)
    assert "1 decode, 1 mixed;" in out
    assert missed not in out


def test_a_tolerance_of_the_user_decides(capsys, wrong_layer):
    wide = ["--tolerance", "*:relative_rms=0.3", "--tolerance", "*:max_abs=0"]
    assert compared(capsys, *SHORT, *SEVEN, *wide)[0] == 0
    code, out, _ = compared(
        capsys, *SHORT, *SEVEN, "--json", "--tolerance", "layers.1.output:cosine=0.9"
    )
    report = json.loads(out)
    assert code == 1, "what comes of the output has limits still"
    given = {f["tolerance"] for f in report["findings"] if f["tensor"] == "layers.1.output"}
    assert given == {"layers.1.output: cosine >= 0.9"}


def test_an_executor_that_fails_leaves_a_report_and_ends_with_code_2(capsys, tmp_path, monkeypatch):
    run_head = TorchExecutor.run_head

    def fails(self, step, hidden, tap=None):
        if self.kv_cache_spec.page_size == 7:
            raise RuntimeError("out of\nmemory")
        return run_head(self, step, hidden, tap)

    monkeypatch.setattr(TorchExecutor, "run_head", fails)
    page = tmp_path / "page.html"
    code, out, err = compared(capsys, *SHORT, *SEVEN, "--json", "--html", str(page))
    assert code == 2
    assert err.startswith("tilewright: error: candidate failed in prefill, head: RuntimeError: out")
    assert err.count("\n") == 1
    report = json.loads(out)
    assert (report["verdict"], report["finished"]) == ("unfinished", False)
    assert report["failure"] in err
    assert report["next"] == []  # more prompts would not help
    assert len(report["findings"]) > 40
    assert "out of memory" in page.read_text()


def test_a_run_file_is_the_candidate(capsys, tmp_path, wrong_layer):
    path = tmp_path / "run.toml"
    path.write_text(
        '[runtime]\npage_size = 7\n[prompts]\ntext = ["No person", "We"]\n'
        f'[output]\nfile = "{tmp_path / "results.jsonl"}"\n'
    )
    code, out, _ = compared(capsys, str(path), "--new-tokens", "1", "--json")
    report = json.loads(out)
    assert (code, report["divergence"]["layer"]) == (1, 1)
    assert {row["request"] for row in report["logits"] if row["step"] == 0} == {0, 1}
    assert {row["request"] for row in report["logits"]} == {0, 1, 2}, "one more in the mixed step"
    assert os.listdir(tmp_path) == ["run.toml"], "a run's results are no place for a report"


def test_a_run_without_prompts_tells_what_was_chosen(capsys):
    code, _, err = compared(capsys, *SEVEN, "--new-tokens", "1", "--chunk", "9")
    assert code == 0
    assert err.startswith("5 prompts of 1 to 18 tokens, chunks of 9 and 1 new tokens, chosen for ")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "candidate and reference are identical"),
        (["--candidate", "torhc"], "--candidate: no executor is named 'torhc'"),
        (["--reference", "torhc"], "--reference: no executor is named 'torhc'"),
        (["-o", "page_size=7"], "-o page_size: expected candidate.KEY=VALUE"),
        (["-o", "candidat.threads=1"], "did you mean 'candidate'?"),
        (["-o", "candidate.theads=1"], "-o candidate.theads: executor 'torch': unknown option"),
        (["-o", "reference.theads=1"], "-o reference.theads: executor 'torch': unknown option"),
        (["-o", "candidate.runtime.pagesize=7"], "did you mean 'page_size'?"),
        (["-o", "candidate.runtime.max_seq_len=7"], "--new-tokens and --chunk: set those"),
        (["-o", "reference.runtime.kv_dtype=float32"], "set candidate.runtime.kv_dtype"),
        (["-o", "candidate"], "-o: expected SIDE.KEY=VALUE"),
        (["--new-tokens", "0"], "expected an integer of at least 1"),
        ([*SEVEN, "--new-tokens", "5000"], "at most the 2048 positions"),
        ([*SEVEN, "--html", "no/such/page.html"], "no/such/page.html"),
        ([*SEVEN, "--png", "no/such/map.png"], "'no/such/map.png' cannot be written: No such file"),
        ([*SEVEN, "--png", "-"], "'-': expected a file name"),
        ([*SEVEN, "--model", "no/such/folder"], "no/such/folder"),
        ([*SEVEN, "--prompt", ""], "--prompt: the prompt is empty"),
        (["no/such/run.toml"], "no/such/run.toml"),
        ([*SEVEN, "--tolerance", "max_abs=1"], "expected PATTERN:METRIC=BOUND"),
        (["--tolerance", "nonsense"], "expected PATTERN:METRIC=BOUND, found 'nonsense'"),
        ([*SEVEN, "--tolerance", "*:max_abs=-1"], "expected a bound from 0 to inf on max_abs"),
        ([*SEVEN, "--tolerance", "*:cosine=1.5"], "expected a bound from 0 to 1 on cosine"),
        ([*SEVEN, "--html", "x", "--output", "./x"], "name the same file: give each its own"),
        ([*SEVEN, "--tolerance", "*:maxabs=1"], "did you mean 'max_abs'?"),
        ([*SEVEN, "--tolerance", "layer.*:nmse=1"], "'layer.*' matches no tensor that is compared"),
        (
            [*EMULATED, "-o", "candidate.runtime.weight_dtype=float32"],
            "weight_dtype = 'float32' is not supported by executor 'pypto-npu'",
        ),
    ],
)
def test_what_cannot_be_compared_is_told_in_one_line(capsys, argv, message):
    prompt = [] if "--prompt" in argv else SHORT[:2]
    code, out, err = compared(capsys, *prompt, *argv)
    assert (code, out) == (2, "")
    assert err.startswith("tilewright: error: ")
    assert message in err
    assert err.count("\n") == 1


# --- an earlier report ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def first_report(tmp_path_factory) -> dict:
    """The JSON report of SHORT on pages of seven."""
    file = tmp_path_factory.mktemp("first") / "first.json"
    assert main(["compare", *SHORT, *SEVEN, "--json", "--output", str(file)]) == 0
    return json.loads(file.read_text())


@pytest.fixture
def earlier(first_report, tmp_path):
    """Writes the report, with changes; returns the file's name."""

    def write(**changes) -> str:
        file = tmp_path / "earlier.json"
        file.write_text(json.dumps({**first_report, **changes}))
        return str(file)

    return write


def scaled(report: dict, stage: str, by: float) -> list[dict]:
    """Ratios, with the candidate's errors at a stage scaled."""
    return [
        r | {"candidate": r["candidate"] * (by if r["stage"] == stage else 1)}
        for r in report["ratios"]
    ]


def test_the_same_errors_as_in_an_earlier_report_are_equal(capsys, earlier, first_report, tmp_path):
    page = tmp_path / "page.html"
    name = earlier()
    code, out, _ = compared(capsys, *SHORT, *SEVEN, "--against", name, "--html", str(page))
    assert code == 0
    told = re.search(
        r"^against (.*) of 20.*: (\d+) errors in both, 0 grew .*, 0 shrank$", out, re.M
    )
    assert told
    assert told[1] == name
    assert int(told[2]) == len(first_report["ratios"])
    assert told[0] in page.read_text()
    _, out, _ = compared(capsys, *SHORT, *SEVEN, "--against", name, "--json")
    report = json.loads(out)["against"]
    assert (report["report"], report["passed"], report["grown"]) == (name, True, [])
    assert report["compared"] == len(first_report["ratios"])


def test_an_error_that_grew_since_an_earlier_report_ends_with_code_1(capsys, earlier, first_report):
    name = earlier(ratios=scaled(first_report, "o_proj", 0.2))
    code, out, _ = compared(capsys, *SHORT, *SEVEN, "--against", name)
    assert code == 1
    assert out.startswith(f"less accurate than before: 5 times the error of {name} in prefill, ")
    first = out.splitlines()[0]
    assert (
        "layers.0.o_proj (ratio to the baseline's own error 0.20 then, 1.00 now), and in" in first
    )
    _, out, _ = compared(capsys, *SHORT, *SEVEN, "--against", name, "--json")
    report = json.loads(out)
    assert report["verdict"] == "diverged"
    assert {c["stage"] for c in report["against"]["grown"]} == {"o_proj"}
    assert report["against"]["grown"][0]["factor"] == pytest.approx(5)


def test_an_error_that_shrank_is_no_fault(capsys, earlier, first_report):
    name = earlier(ratios=scaled(first_report, "o_proj", 5))
    code, out, _ = compared(capsys, *SHORT, *SEVEN, "--against", name)
    assert code == 0
    assert re.search(
        r"^least: 0\.2 times the error of .*o_proj \(ratio .* 5\.00 then, 1\.00", out, re.M
    )


def test_what_does_not_change_errors_may_differ_from_an_earlier_report(capsys, earlier):
    name = earlier()
    argv = ["-o", "candidate.runtime.page_size=8", "--against", name]
    code, out, _ = compared(capsys, *SHORT, *argv)
    assert code == 0
    assert f"against {name}: page_size was 7 then and is 8 now" in out.splitlines()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--prompt", "We the"], "the prompts must be the same, found 1 of"),
        (["--new-tokens", "3"], "--new-tokens must be the same, found 2 then and 3 now"),
        (["--chunk", "4"], "--chunk must be the same, found 512 then and 4 now"),
        (["-o", "reference.stream_weights=true"], "the reference must be the same, found torch"),
        (
            ["-o", "candidate.runtime.weight_dtype=float16"],
            "the candidate's weight_dtype must be the same, found bfloat16 then and float16 now",
        ),
        (
            ["-o", "candidate.runtime.kv_dtype=float32"],
            "the candidate's kv_dtype must be the same, found bfloat16 then and float32 now",
        ),
    ],
)
def test_an_earlier_report_of_something_else_is_refused(capsys, earlier, argv, message):
    given = SHORT[2:] if "--prompt" in argv else SHORT
    code, out, err = compared(capsys, *given, *SEVEN, *argv, "--against", earlier())
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_an_earlier_report_of_another_model_is_refused(capsys, earlier, first_report):
    name = earlier(made=first_report["made"] | {"fingerprint": "0" * 64})
    code, _, err = compared(capsys, *SHORT, *SEVEN, "--against", name)
    assert code == 2
    assert "the model must be the same, found 000000000000... then and " in err


RATIO = {"mode": "chained", "phase": "decode", "layer": 0, "stage": "output", "rows": 1}
RATIO |= {"candidate": 0.1, "baseline": 0.1}
MADE = {"prompts": [[5, 6]], "new_tokens": 2, "chunk": 8}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("{", "found no JSON: Expecting"),
        ("[1]", "found JSON without the keys tilewright, verdict and findings"),
        ({"finished": False}, "that comparison did not finish: write it again with this version"),
        ({"made": None}, "the report does not say how it was made: write it again"),
        ({"ratios": [{"mode": "chained"}]}, "has another form (KeyError: 'rows')"),
        ({"ratios": 7}, "has another form (TypeError: "),
        ({"ratios": []}, "has another form (ValueError: ratios is empty)"),
        ({"ratios": [RATIO | {"candidate": None}]}, "error of the candidate in output, found null"),
        ({"ratios": [RATIO | {"baseline": math.nan}]}, "finite error of the baseline in output"),
        ({"ratios": [RATIO | {"candidate": -1.0}]}, "found -1.0"),
        ({"ratios": [RATIO | {"candidate": "0.1"}]}, "found '0.1'"),
        ({"ratios": [RATIO | {"layer": [0]}]}, "a number or null as layer"),
        ({"ratios": [RATIO | {"rows": math.inf}]}, "has another form (OverflowError: "),
        ({"runtime": None}, "has another form (TypeError: "),
        ({"made": {}}, "has another form (KeyError: 'new_tokens')"),
        ({"made": MADE | {"prompts": [[]]}}, "chunk or page_size is not a positive number"),
        ({"made": MADE | {"chunk": "8"}}, "chunk or page_size is not a positive number"),
        ({"made": MADE | {"prompts": [["a"]]}}, "prompts are not lists of token ids"),
    ],
)
def test_a_file_that_is_no_report_is_refused_before_anything_is_loaded(
    capsys, earlier, tmp_path, changes, message
):
    name = earlier(**changes) if isinstance(changes, dict) else str(tmp_path / "a.json")
    if isinstance(changes, str):
        Path(name).write_text(changes)
    code, out, err = compared(capsys, "--model", "no/such/model", *SEVEN, "--against", name)
    assert (code, out) == (2, "")
    assert err.startswith(f"tilewright: error: --against {name!r}: ")
    assert message in err
    assert err.count("\n") == 1


def test_a_report_that_is_older_than_its_figures_is_refused(capsys, first_report, tmp_path):
    file = tmp_path / "old.json"
    file.write_text(json.dumps({k: v for k, v in first_report.items() if k != "ratios"}))
    code, _, err = compared(capsys, *SHORT, *SEVEN, "--against", str(file))
    assert code == 2
    assert "has no 'ratios', which --against needs: write it again" in err
    code, _, err = compared(capsys, *SHORT, *SEVEN, "--against", str(tmp_path / "none.json"))
    assert code == 2
    assert "none.json' cannot be read: No such file" in err


# --- how a report was made ------------------------------------------------------------------------


def test_every_report_says_how_it_was_made(capsys, tmp_path, monkeypatch):
    page, heat = tmp_path / "page.html", tmp_path / "map.png"
    drawn = []
    draw = picture._text

    def drawing(text, size, colour):
        drawn.append(text)
        return draw(text, size, colour)

    monkeypatch.setattr(picture, "_text", drawing)
    argv = [*SHORT, *SEVEN, "-o", "candidate.threads=1", "--html", str(page), "--png", str(heat)]
    _, out, _ = compared(capsys, *argv)
    lines = out.splitlines()
    for told in (
        "command: tilewright compare --prompt 'We the People' --new-tokens 2 -o ",
        "date: 20",
        "candidate: torch of tilewright ",
        "reference: torch of tilewright ",
        "prompts: 1, of ",
        "versions: tilewright ",
        "machine: ",
    ):
        (line,) = (line for line in lines if line.startswith(told))
        assert line in drawn
        assert line.partition(": ")[2].replace("'", "&#39;") in page.read_text()
    assert any(line.endswith(", threads=1, runtime.page_size=7") for line in lines)
    assert f"torch {torch.__version__}" in out
    assert "the candidate runs on cpu" in out


def test_the_documentation_names_what_says_how_a_report_was_made(first_report):
    parts = (first_report["made"], first_report["made"]["candidate"], first_report["perplexity"])
    for key in {key for part in parts for key in part}:
        assert f"`{key}`" in PAGE, key


def test_the_json_report_says_how_it_was_made(first_report):
    made = first_report["made"]
    assert made["candidate"]["runtime"] == {"page_size": 7}
    assert made["reference"]["executor"] == "torch"
    assert (made["new_tokens"], made["chunk"]) == (2, 512)
    assert [len(ids) for ids in made["prompts"]] == [len(ids) for ids in made["prompts"] if ids]
    assert made["command"].startswith("tilewright compare --prompt 'We the People'")
    assert {"python", "torch", "tilewright"} <= made["versions"].keys()
    assert first_report["runtime"]["page_size"] == 7
    assert first_report["runtime"]["device"] == "cpu"


def test_the_verdict_is_repeated_where_the_report_is_long():
    long, short = made(40, 30, wrong=23), made(2, 1)
    lines = text(long, 80, wrapped=False)
    assert len(lines) > 30
    assert lines[-2:] == ["", long.sentence]
    lines = text(short, 80, wrapped=False)
    assert len(lines) < 30
    assert lines.count(short.sentence) == 1


# --- reports --------------------------------------------------------------------------------------


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
        Finding(
            place=place,
            passed=False,
            why="the candidate has no such tensor",
            limits=Limits(relative_rms=math.inf, worst_row=math.inf, gain=math.inf),
        ),
    ]
    comparison.drift = Drift(
        tensor="v_cache", projection="v_proj", dtype="bfloat16", block=8, nearer=math.inf
    )
    comparison.reason = Reason(
        unexplained=math.inf, tried=1, best=(Explanation(bug="RoPE is missing", excess=math.inf),)
    )
    written = json.loads(json.dumps(record(comparison), allow_nan=False))
    assert written["findings"][-1]["excess"] is None
    assert written["findings"][-1]["limit"] is None
    assert written["drift"]["nearer"] is None
    assert written["reason"]["guesses"][0]["excess"] is None
    assert html(comparison)


def test_an_unfinished_comparison_is_not_called_equal():
    comparison = made(1, 1)
    comparison.finished = False
    assert record(comparison)["verdict"] == "unfinished"
    assert not comparison.sentence.startswith("equal")


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


# --- terminals ------------------------------------------------------------------------------------


def test_ctrl_c_leaves_what_was_compared_so_far(tmp_path):
    page, heat = tmp_path / "page.html", tmp_path / "map.png"
    argv = ["--new-tokens", "2000", "--prompt", "We", "--html", str(page), *SEVEN]
    terminal = Terminal("compare", *argv, "--png", str(heat))
    terminal.wait_for(b"chained, decode")
    terminal.interrupt()
    assert terminal.end() == 130
    assert b"Traceback" not in terminal.screen
    assert b"not finished" in terminal.screen
    assert "unfinished" in page.read_text()
    with Image.open(heat) as image:
        assert image.width == picture.WIDTH


# --- the documentation ----------------------------------------------------------------------------

PAGE = (ROOT / "docs/numerics.md").read_text()


def test_the_worked_case_of_the_documentation(capsys, tmp_path):
    with on_path(tmp_path / "site") as install:
        install(documented(PAGE))
        argv = ["--candidate", "acme-fast", "--new-tokens", "2"]
        code, out, _ = compared(capsys, *argv)
        assert code == 1
        assert out.splitlines()[0] in PAGE.splitlines()
        _, out, _ = compared(capsys, *argv, "--json")
    report = json.loads(out)
    assert [w["why"] for w in report["weights"] if not w["passed"]] == ["it is transposed"] * 3
    alone = [f for f in report["findings"] if f["mode"] == "isolated"]
    assert {f["passed"] for f in alone if f["stage"] == "v_proj"} == {False}
    before = ("attn_norm", "q_proj", "k_proj", "q_norm", "k_norm", "q_rope", "k_rope", "k_cache")
    assert {f["passed"] for f in alone if f["stage"] in before} == {True}


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
        for key in keys:
            assert f"`{key}`" in PAGE, key


CHATTY = """
    from tilewright import hookimpl

    tilewright_api = 2
    print("at import")

    class Watch:
        @hookimpl
        def on_step(self, event):
            print("in an event")

    @hookimpl
    def create_observer(options):
        return Watch()
"""


def test_what_plugins_print_is_no_part_of_the_report(tmp_path):
    files = {"acme_chatty.py": dists.dedent(CHATTY)}
    chatty = dists.Distribution("acme-chatty", files, {"observer": {"chatty": "acme_chatty"}})
    site = dists.install(tmp_path / "site", chatty)
    (tmp_path / "run.toml").write_text('[plugins]\nobservers = ["chatty"]\n')
    done = dists.run(
        *("-m", "tilewright", "compare", str(tmp_path / "run.toml"), "--json"),
        *("--new-tokens", "1", "-o", "candidate.stream_weights=true"),
        site=site,
    )
    assert done.code in (0, 1), done.err
    assert isinstance(json.loads(done.out), dict)
    assert "at import\n" in done.err
