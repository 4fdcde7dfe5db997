"""``tilewright compare``, its reports, and what its exit codes say."""

import json
import os
import re
from pathlib import Path

import plugin_distributions as dists
import pytest
import torch
from checkout import ROOT
from PIL import Image
from plugin_distributions import documented, on_path
from terminal import Terminal

from tilewright.cli import main
from tilewright_compare import picture
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("{", "found no JSON: Expecting"),
        ("[1]", "found JSON without the keys tilewright, verdict and findings"),
        ({"finished": False}, "that comparison did not finish: write it again with this version"),
        ({"made": None}, "the report does not say how it was made: write it again"),
        ({"ratios": [{"mode": "chained"}]}, "has another form (KeyError: 'phase')"),
        ({"ratios": 7}, "has another form (TypeError: "),
        ({"ratios": []}, "has another form (ValueError: ratios is empty)"),
        ({"ratios": [RATIO | {"candidate": None}]}, "error of the candidate in output, found null"),
        (
            {"ratios": [RATIO | {"baseline": float("nan")}]},
            "finite error of the baseline in output",
        ),
        ({"ratios": [RATIO | {"candidate": -1.0}]}, "found -1.0"),
        ({"ratios": [RATIO | {"candidate": "0.1"}]}, "found '0.1'"),
        ({"ratios": [RATIO | {"layer": [0]}]}, "a number or null as layer"),
        ({"ratios": [RATIO | {"rows": float("inf")}]}, "expected rows of at least 1, found inf"),
        ({"runtime": None}, "has another form (TypeError: "),
        ({"made": {}}, "has another form (KeyError: 'prompts')"),
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


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({"prompts": 5}, "(TypeError: 'int' object is not iterable)"),
        ({"prompts": [["We"]]}, "(ValueError: expected token ids of at least 0, found 'We')"),
        ({"prompts": [[]]}, "(ValueError: expected prompts of at least one token, found [[]])"),
        ({"chunk": "8"}, "(ValueError: expected chunk of at least 1, found '8')"),
        ({"new_tokens": -3}, "(ValueError: expected new_tokens of at least 1, found -3)"),
    ],
)
def test_a_report_that_does_not_say_what_it_ran_is_refused(
    capsys, earlier, first_report, made, message
):
    name = earlier(made=first_report["made"] | made)
    code, out, err = compared(capsys, *SEVEN, "--against", name)
    assert (code, out) == (2, "")
    assert f"has another form {message}: write it again" in err


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
    assert len(made["prompts"]) == 1
    assert made["prompts"][0]
    assert made["command"].startswith("tilewright compare --prompt 'We the People'")
    assert {"python", "torch", "tilewright"} <= made["versions"].keys()
    assert first_report["runtime"]["page_size"] == 7
    assert first_report["runtime"]["device"] == "cpu"


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
