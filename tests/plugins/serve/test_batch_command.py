"""``tilewright batch`` with the bundled model: what it writes, says and refuses."""

import os
import subprocess
import time
from pathlib import Path

import pytest
from terminal import TILEWRIGHT, Terminal
from test_batch import by_id, line, records

from tilewright import GenerateConfig, LLMEngine
from tilewright.cli import main
from tilewright.errors import ExecutorLostError
from tilewright.layerwise import LayerwiseBase
from tilewright.settings import DEMO_MODEL

WHEN, HI = "When in the Course", [{"role": "user", "content": "How does the Declaration begin?"}]
CHAT = "/v1/chat/completions"


def asked(custom_id: str, prompt: str = WHEN, **body) -> bytes:
    body = {"model": "demo", "prompt": prompt, "max_tokens": 8, "temperature": 0, **body}
    return line(custom_id, body=body)


@pytest.fixture
def tilewright(capsys, monkeypatch, tmp_path):
    """Runs the command on in.jsonl; returns its exit code and standard error."""
    monkeypatch.chdir(tmp_path)
    for name in [n for n in os.environ if n.startswith("TILEWRIGHT_")]:
        monkeypatch.delenv(name)

    def call(*lines: bytes, flags: tuple[str, ...] = ()) -> tuple[int, list[str]]:
        if lines:
            Path("in.jsonl").write_bytes(b"\n".join(lines))
        model = f"demo={DEMO_MODEL}"
        code = main(["batch", "in.jsonl", "--output", "out.jsonl", "--model", model, *flags])
        out, err = capsys.readouterr()
        assert out == ""
        return code, [text for text in err.splitlines() if not text.startswith("note:")]

    return call


def test_results_are_those_of_the_engine_and_are_made_once(tilewright):
    chat = {"model": "demo", "messages": HI, "max_completion_tokens": 8, "temperature": 0}
    lines = [
        asked("when"),
        line("chat", url=CHAT, body=chat),
        asked("two", n=2, prompt=[WHEN, "We hold these truths"]),
        asked("wrong", max_tokens=-1),
        asked("other", model="gpt"),
        b"not JSON",
    ]
    code, said = tilewright(*lines)
    assert (code, said) == (
        1,
        ["3 completed, 3 failed, 0 skipped that an earlier run has done"],
    )
    found = {r["custom_id"]: r["response"] for r in records(Path("out.jsonl"))}
    codes = {custom_id: r and r["status_code"] for custom_id, r in found.items()}
    assert codes == {"when": 200, "chat": 200, "two": 200, "wrong": 400, "other": 404, None: None}
    config = GenerateConfig(max_new_tokens=8, temperature=0)
    with LLMEngine.from_plugins() as engine:
        engine.init_model("demo", DEMO_MODEL)
        texts = [engine.generate("demo", p, config) for p in (WHEN, "We hold these truths")]
        answer = engine.chat("demo", HI, config)
    assert [c["text"] for c in found["when"]["body"]["choices"]] == texts[:1]
    assert [c["text"] for c in found["two"]["body"]["choices"]] == [texts[i] for i in (0, 0, 1, 1)]
    assert found["chat"]["body"]["choices"][0]["message"]["content"] == answer

    before = Path("out.jsonl").read_bytes()
    code, said = tilewright()
    assert (code, said) == (
        1,
        [
            "out.jsonl has 6 of 6 results, 3 of them failures, which stay: delete their lines to "
            "have these requests answered again",
            "0 completed, 0 failed, 6 skipped that an earlier run has done, 3 of them failures",
        ],
    )
    assert Path("out.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--weight-dtype", "bfloat16"), "its weight_dtype was None, and now it is 'bfloat16'"),
        (("--max-seq-len", "64"), "its max_seq_len was None, and now it is 64"),
        (("--sampler", "greedy"), "its sampler was 'top-p', and now it is 'greedy'"),
        (("-o", "threads=1"), "its options was {}, and now it is {'executor': {'threads': '1'}}"),
    ],
)
def test_other_settings_are_refused_before_the_model_is_loaded(
    tilewright, monkeypatch, flags, words
):
    assert tilewright(asked("a"))[0] == 0
    monkeypatch.setattr(LLMEngine, "init_model", None)
    code, (said,) = tilewright(flags=flags)
    assert code == 2
    assert words in said


def test_sizes_and_the_number_in_flight_may_change(tilewright):
    tilewright(asked("a"), asked("b"))
    whole = Path("out.jsonl").read_bytes()
    Path("out.jsonl").write_bytes(whole.splitlines(keepends=True)[0])
    sizes = ("--max-batch-size", "1", "--total-pages", "99", "--max-in-flight", "3")
    code, said = tilewright(flags=sizes)
    assert (code, said) == (
        0,
        [
            "out.jsonl has 1 of 2 results",
            "1 completed, 0 failed, 1 skipped that an earlier run has done",
        ],
    )
    assert len(by_id(Path("out.jsonl"))) == 2


def test_a_changed_model_is_refused(tilewright, tmp_path, monkeypatch):
    model = tmp_path / "model"
    model.mkdir()
    for file in DEMO_MODEL.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    flags = ("--model", f"demo={model}")
    assert tilewright(asked("a"), flags=flags)[0] == 0
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-100:] = bytes(100)
    (model / "model.safetensors").write_bytes(weights)
    code, (said,) = tilewright(flags=flags)
    assert code == 2
    assert "has results of another batch: its model was" in said


@pytest.mark.parametrize("error", [ExecutorLostError("the card is gone"), ValueError("a bug")])
def test_a_model_that_fails_for_good_ends_the_run_and_fails_no_request(
    tilewright, monkeypatch, error
):
    usual, steps = LayerwiseBase.forward, 0

    def forward(self, *arguments, **more):
        nonlocal steps
        steps += 1
        if steps > 12:
            raise error
        return usual(self, *arguments, **more)

    lines = [asked(str(i)) for i in range(20)]
    with monkeypatch.context() as patched:
        patched.setattr(LayerwiseBase, "forward", forward)
        code, (counts, said) = tilewright(*lines, flags=("--max-batch-size", "4"))
    assert code == 2
    assert "model 'demo' has failed and generates nothing more" in said
    assert str(error) in said
    done = len(records(Path("out.jsonl")))
    assert 0 < done < 20
    assert counts.startswith(f"{done} completed, 0 failed, 0 skipped")
    assert tilewright()[0] == 0
    assert {r["response"]["status_code"] for r in by_id(Path("out.jsonl")).values()} == {200}


def test_a_step_that_fails_once_fails_its_requests_alone(tilewright, monkeypatch):
    usual, steps = LayerwiseBase.forward, 0

    def forward(self, *arguments, **more):
        nonlocal steps
        steps += 1
        if steps == 3:
            raise ValueError("a bug")
        return usual(self, *arguments, **more)

    monkeypatch.setattr(LayerwiseBase, "forward", forward)
    flags = ("--max-in-flight", "2")
    assert tilewright(*(asked(str(i)) for i in range(5)), flags=flags)[0] == 1
    statuses = [r["response"]["status_code"] for r in records(Path("out.jsonl"))]
    assert sorted(statuses) in ([200] * 4 + [500], [200] * 3 + [500] * 2)


def test_a_terminal_has_a_bar_and_ctrl_c_leaves_a_run_that_continues(tilewright):
    long = {"max_tokens": 400, "ignore_eos": True}
    lines = [asked("short"), *(asked(f"long {i}", **long) for i in range(3))]
    Path("in.jsonl").write_bytes(b"\n".join(lines))
    terminal = Terminal("batch", "in.jsonl", "--output", "out.jsonl", "-m", f"demo={DEMO_MODEL}")
    terminal.wait_for(b"requests/s")  # a result is there
    terminal.interrupt()
    terminal.wait_for(b"1 completed, 0 failed, 0 skipped that an earlier run has done; 3 left")
    assert terminal.end() == 130
    assert b"Traceback" not in terminal.screen
    assert [r["custom_id"] for r in records(Path("out.jsonl"))] == ["short"]
    code, said = tilewright()
    assert (code, said[-1]) == (0, "3 completed, 0 failed, 1 skipped that an earlier run has done")
    assert len(by_id(Path("out.jsonl"))) == 4


@pytest.mark.slow
def test_a_command_that_is_killed_and_run_again_gives_what_one_run_gives(tilewright):
    lines = [asked(f"{i}", max_tokens=1 + i % 40, ignore_eos=True) for i in range(200)]
    assert tilewright(*lines)[0] == 0
    whole = by_id(Path("out.jsonl"))
    Path("out.jsonl").unlink()
    argv = ["batch", "in.jsonl", "--output", "out.jsonl", "--model", f"demo={DEMO_MODEL}"]
    kills, before = 0, -1
    while (done := _killed_after_more_results(argv, before)) < 200:
        assert done > before
        kills, before = kills + 1, done
    assert kills > 1
    again = by_id(Path("out.jsonl"))
    texts = [
        {at: r["response"]["body"]["choices"] for at, r in found.items()}
        for found in (whole, again)
    ]
    assert texts[0] == texts[1]


def _killed_after_more_results(argv: list[str], before: int) -> int:
    """Runs the command and kills it once it has written results; how many are in the output."""
    output = Path("out.jsonl")
    process = subprocess.Popen([*TILEWRIGHT, *argv], stderr=subprocess.DEVNULL)
    count = 0
    while process.poll() is None:
        count = output.read_bytes().count(b"\n") if output.exists() else 0
        if count > before + 60:
            process.kill()
        time.sleep(0.001)
    return output.read_bytes().count(b"\n")


def test_a_wrong_file_or_name_of_a_model_is_an_error_before_the_model_is_loaded(
    tilewright, monkeypatch
):
    monkeypatch.setattr(LLMEngine, "init_model", None)
    code, (said,) = tilewright(b"a,b")
    assert code == 2
    assert said.startswith(
        "tilewright: error: batch file 'in.jsonl' has no request that can be answered; line 1: "
        "expected JSON: "
    )
    code, (said,) = tilewright(asked("a", model="gpt-4o-mini"))
    assert code == 2
    assert "line 1: model 'gpt-4o-mini' is asked for, and this run has demo: give the" in said
    assert sorted(os.listdir()) == ["in.jsonl"]
