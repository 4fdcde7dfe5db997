"""Runs on a host whose cards task-submit allocates: which card they take, and what they return.

tests/support/task_submit.py stands in for it. The tests need no card: complete runs are on platform
``emulated``, and runs for a hardware platform end where they would open the card.
"""

import ast
import json
import os
import shlex

import pytest
from submitted import EXAMPLE, PLEDGE, PLEDGED, TILEWRIGHT, submit
from task_submit import with_card
from tokenizers import Tokenizer

from tilewright import LLMEngine, RuntimeConfig
from tilewright.cli import main
from tilewright.cli.run import show
from tilewright.config import resolve
from tilewright.errors import ConfigError, ExecutorError
from tilewright.settings import DEMO_MODEL, Given
from tilewright_pypto import plugin
from tilewright_pypto.options import Options
from tilewright_pypto.plugin import chosen_card

EMULATED = "--executor pypto-npu -o platform=emulated"

CLAUSE = (
    "Congress shall make no law respecting an establishment of religion, or prohibiting the free "
    "exercise thereof;"
)
NEXT_CLAUSE = " or abridging the freedom of speech, or of the press;"


def token_ids(text: str) -> list[int]:
    ids: list[int] = Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json")).encode(text).ids
    return ids


END_OF_TEXT = token_ids("<|endoftext|>")


# --- the stand-in follows the documented rules ----------------------------------------------------


@pytest.mark.parametrize(
    ("command", "runs"),
    [
        ("run a.toml", "run a.toml --device 5"),
        ("run -d a.toml", "run -d a.toml --device 5"),
        ("run --card={} --again {}", "run --card=5 --again 5"),
        ("run {} --device 2", "run 5 --device 2"),
        ("run --device 2", "run --device 2"),
        ("run --devices 1,2", "run --devices 1,2"),
        ("run -d 2", "run -d 2"),
        ("run --card=$TASK_DEVICE", "run --card=$TASK_DEVICE"),
        ("cd /work && run", "cd /work && run"),
        ("run || true", "run || true"),
        ("run | tail", "run | tail"),
        ("run 'Roses; violets'", "run 'Roses; violets'"),
    ],
)
def test_a_command_gets_a_device_flag_unless_it_seems_to_name_a_card(command, runs):
    assert with_card(command, "5") == runs


@pytest.mark.parametrize(
    ("argv", "command", "out"),
    [
        ((), "echo $TASK_DEVICE ${ASCEND_RT_VISIBLE_DEVICES-none}", "5 none"),
        (("--device", "auto", "--grants", "7"), "echo", "--device 7"),
        (("--device", "3"), "echo $TASK_DEVICE", "3"),
        (("--device", "3"), "echo", ""),
    ],
)
def test_a_task_gets_its_card_as_a_variable_or_a_flag(argv, command, out):
    done = submit(command, *argv)
    assert (done.returncode, done.stdout.strip()) == (0, out)


@pytest.mark.parametrize(
    ("argv", "command", "code"),
    [
        ((), "sh -c 'exit 3'", 3),
        (("--device", "auto", "--max-time", "0.2"), "sleep 60;", 137),
        (("--device", "auto", "--timeout", "0.2"), "sleep 60;", 1),
        (("--device", "auto", "--max-time", "0", "--timeout", "0"), "true", 0),
        ((), "sh -c 'kill -9 $$'", 137),
        ((), "echo how to reboot", 126),
        ((), "passwd", 126),
        ((), "echo 'shutdown'", 126),
        ((), "echo rebooted", 0),
        ((), "echo one\necho two", 126),
    ],
)
def test_the_exit_code_is_that_of_the_task_unless_it_was_rejected_or_timed_out(argv, command, code):
    done = submit(command, *argv)
    assert done.returncode == code
    assert code != 126 or done.stdout == ""


# --- whole runs, on platform emulated -------------------------------------------------------------


def test_the_example_prints_text_token_ids_and_finish_reason():
    done = submit(f'{EXAMPLE} --platform emulated --prompt "{PLEDGE}"')
    assert done.returncode == 0, done.stderr
    assert "--device 5" in done.stderr
    text, ids, finish_reason, device = done.stdout.splitlines()
    assert text == f"text: {PLEDGED}"
    assert ast.literal_eval(ids.removeprefix("token_ids: ")) == token_ids(PLEDGED) + END_OF_TEXT
    assert finish_reason == "finish_reason: eos"
    assert device == "device: emulated"


def test_a_run_file_gives_the_same_result_as_the_example(tmp_path):
    (tmp_path / "run.toml").write_text(
        f"""\
        [plugins]
        executor = "pypto-npu"
        [options.executor]
        platform = "emulated"
        [runtime]
        device = "0"
        [prompts]
        text = "{PLEDGE}"
        [output]
        format = "jsonl"
        file = "results.jsonl"
        """
    )
    done = submit(f"{TILEWRIGHT} run run.toml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[0].endswith("run run.toml --device 5")
    assert done.stdout == ""
    record = json.loads((tmp_path / "results.jsonl").read_text())
    assert record["text"] == PLEDGED
    assert record["token_ids"] == token_ids(PLEDGED) + END_OF_TEXT
    assert record["finish_reason"] == "eos"
    assert record["device"] == "emulated"


def test_prompts_with_shell_characters_can_be_read_from_files(tmp_path):
    prompts = [CLAUSE, "cat laws | grep press && echo found; reboot"]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts))
    argv = f"{EMULATED} --max-new-tokens {len(token_ids(NEXT_CLAUSE))} --json"
    done = submit(f"{TILEWRIGHT} generate --prompt-file prompts.jsonl {argv}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[0].endswith("--json --device 5")
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [record["prompt"] for record in records] == prompts
    assert records[0]["text"] == NEXT_CLAUSE

    # With a semicolon on the command line, task-submit does not add the flag.
    done = submit(f"{TILEWRIGHT} generate {shlex.quote(CLAUSE)} {argv}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[0].endswith("--json")
    assert json.loads(done.stdout)["text"] == NEXT_CLAUSE


def test_bench_takes_the_granted_card():
    argv = "--prompt-tokens 4 --new-tokens 2 --repeat 1 --warmup 0 --json"
    done = submit(f"{TILEWRIGHT} bench {EMULATED} {argv}")
    assert done.returncode == 0, done.stderr
    assert "--device 5" in done.stderr
    report = json.loads(done.stdout)
    assert report["device"] == "emulated"
    assert len(report["results"]) == 1


def test_a_killed_run_keeps_the_old_output_file(tmp_path):
    (tmp_path / "out.txt").write_text("old")
    command = f"{TILEWRIGHT} generate {EMULATED} --output out.txt --ignore-eos"
    done = submit(
        f"{command} --max-new-tokens 2000", "--device", "auto", "--max-time", "2", cwd=tmp_path
    )
    assert done.returncode == 137
    assert (tmp_path / "out.txt").read_text() == "old"
    assert [name for name in os.listdir(tmp_path) if not name.endswith(".unfinished")] == [
        "out.txt"
    ]


def test_a_failed_run_returns_its_error_and_its_exit_code(tmp_path):
    """The command gets no --device, so its card comes from TASK_DEVICE."""
    command = f"{TILEWRIGHT} generate 'a; b' --executor pypto-npu"
    done = submit(f"{command} -o pypto_root=nothing-here --output out.txt", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    told, error = done.stderr.splitlines()
    assert "--device" not in told
    assert error.startswith("tilewright: error: ")
    assert "nothing-here" in error
    assert os.listdir(tmp_path) == []


# --- which card is opened -------------------------------------------------------------------------


@pytest.fixture
def opened(monkeypatch):
    """The cards that a run tries to open; each attempt ends the run with exit code 2."""
    cards: list[int | None] = []

    def open_none(options, card, request):
        cards.append(card)
        raise ExecutorError("no card is here")

    monkeypatch.setattr(plugin, "_open", open_none)
    return cards


def run_under_task_submit(monkeypatch, command: str, card: str = "5") -> int:
    """Runs the command in this process, with the changes that task-submit makes to it."""
    monkeypatch.setenv("TASK_DEVICE", card)
    program, *argv = shlex.split(with_card(command, card))
    assert program == "tilewright"
    return main(argv)


GENERATE = "tilewright generate --executor pypto-npu"


@pytest.mark.parametrize(
    ("command", "card"),
    [
        (GENERATE, 5),
        (f"{GENERATE} 'Roses are red; violets'", 5),
        (f"{GENERATE} 'Roses | violets' -o platform=a5", 5),
        (f"{GENERATE} --device 3", 3),
        (f"{GENERATE} --device=3", 3),
        (f"{GENERATE} -o device=3 --device 3", 3),
        (f"{GENERATE} 'a; b' -o device=3", 3),
        (f"{GENERATE} -o device={{}}", 5),
        ("tilewright bench --executor pypto-npu", 5),
        ("tilewright chat --executor pypto-npu", 5),
    ],
)
def test_a_flag_wins_over_the_granted_card(monkeypatch, capsys, opened, command, card):
    assert run_under_task_submit(monkeypatch, command) == 2
    assert opened == [card], capsys.readouterr().err


@pytest.mark.parametrize("stale", ['[runtime]\ndevice = "1"', "[options.executor]\ndevice = 2"])
@pytest.mark.parametrize(
    ("flags", "card"),
    [("", 5), ("--prompt 'a; b'", 5), ("--device 3", 3), ("--prompt 'a; b' -o device=3", 3)],
)
def test_flags_and_the_granted_card_win_over_a_run_file(
    monkeypatch, capsys, tmp_path, opened, stale, flags, card
):
    path = tmp_path / "run.toml"
    path.write_text(f'{stale}\n[plugins]\nexecutor = "pypto-npu"\n')
    assert run_under_task_submit(monkeypatch, f"tilewright run {path} {flags}") == 2
    assert opened == [card], capsys.readouterr().err


def test_a_flag_overrides_the_card_of_a_run_file_in_either_section(
    monkeypatch, capsys, tmp_path, opened
):
    path = tmp_path / "run.toml"
    path.write_text('[runtime]\ndevice = "1"\n[plugins]\nexecutor = "pypto-npu"\n')
    assert main(["run", str(path), "-o", "device=3"]) == 2
    path.write_text('[options.executor]\ndevice = 1\n[plugins]\nexecutor = "pypto-npu"\n')
    assert main(["run", str(path), "--device", "4"]) == 2
    assert opened == [3, 4], capsys.readouterr().err


def test_an_option_that_differs_from_the_granted_card_is_an_error(monkeypatch, capsys, opened):
    assert run_under_task_submit(monkeypatch, f"{GENERATE} -o device=3") == 2
    assert opened == []
    assert "device is 5 in the runtime's settings but 3 in the options" in capsys.readouterr().err


def test_the_card_comes_from_the_run_file_unless_the_environment_names_one(
    monkeypatch, capsys, tmp_path, opened
):
    path = tmp_path / "run.toml"
    path.write_text('[runtime]\ndevice = "1"\n[plugins]\nexecutor = "pypto-npu"\n')
    assert main(["run", str(path)]) == 2
    monkeypatch.setenv("TILEWRIGHT_RUNTIME_DEVICE", "4")
    assert main(["run", str(path)]) == 2
    monkeypatch.setenv("TASK_DEVICE", "5")
    assert main(["run", str(path)]) == 2
    assert opened == [1, 4, 5], capsys.readouterr().err


def test_from_config_takes_the_granted_card(monkeypatch, tmp_path, opened):
    path = tmp_path / "run.toml"
    path.write_text('[runtime]\ndevice = "1"\n[plugins]\nexecutor = "pypto-npu"\n')
    monkeypatch.setenv("TASK_DEVICE", "5")
    with pytest.raises(ExecutorError, match="no card is here"):
        LLMEngine.from_config(path)
    assert opened == [5]


@pytest.mark.parametrize("platform", ["a2a3", "a5"])
def test_a_hardware_platform_without_a_card_is_refused(capsys, opened, platform):
    argv = ["generate", "--executor", "pypto-npu", "-o", f"platform={platform}"]
    assert main([*argv, "-o", "pypto_root=nothing-here"]) == 2
    out, err = capsys.readouterr()
    assert (out, opened) == ("", [])
    assert err.count("\n") == 1
    assert f"platform {platform} needs a card, but none was given: give --device N" in err


@pytest.mark.parametrize(
    ("asked", "option", "granted", "card"),
    [
        ("3", None, "5", 3),
        (None, 3, "5", 3),
        ("3", 3, "5", 3),
        (None, None, "5", 5),
        ("0", None, None, 0),
        (0, None, "5", 0),
        ("03", 3, "5", 3),
        (None, 0, "5", 0),
    ],
)
def test_in_python_the_card_follows_the_same_precedence(monkeypatch, asked, option, granted, card):
    if granted:
        monkeypatch.setenv("TASK_DEVICE", granted)
    runtime = RuntimeConfig(device=asked)
    assert chosen_card(Options(device=option), runtime) == card
    for platform in ("a2a3sim", "a5sim", "emulated"):
        assert chosen_card(Options(device=9, platform=platform), runtime) is None


@pytest.mark.parametrize(
    ("asked", "option", "granted", "message"),
    [
        (None, None, None, "needs a card"),
        (None, None, "", "needs a card"),
        ("cpu", None, "5", "the number of a card as device, found 'cpu'"),
        ("3", 4, "5", "device is 3 .* but 4"),
        ("npu:3", None, None, "the number of a card .* found 'npu:3'"),
        ("-1", None, None, "the number of a card .* found '-1'"),
        (None, None, "five", "the number of a card as TASK_DEVICE, found 'five'"),
        (None, None, "0,1", "the number of a card as TASK_DEVICE, found '0,1'"),
    ],
)
def test_a_device_that_does_not_name_one_card_is_refused(
    monkeypatch, asked, option, granted, message
):
    if granted is not None:
        monkeypatch.setenv("TASK_DEVICE", granted)
    with pytest.raises((ExecutorError, ConfigError), match=message):
        chosen_card(Options(device=option), RuntimeConfig(device=asked))


@pytest.mark.parametrize("platform", ["a2a3sim", "emulated"])
def test_a_platform_without_cards_refuses_other_device_names_than_cpu(platform):
    assert chosen_card(Options(platform=platform), RuntimeConfig(device="cpu")) is None
    with pytest.raises(ExecutorError, match=f"{platform} has no cards: .* found 'npu:3'"):
        chosen_card(Options(platform=platform), RuntimeConfig(device="npu:3"))


@pytest.mark.parametrize("granted", [None, "", "5"])
def test_a_granted_card_removes_the_run_files_card_from_the_settings(tmp_path, granted):
    path = tmp_path / "run.toml"
    path.write_text(
        '[plugins]\nexecutor = "pypto-npu"\n'
        '[runtime]\ndevice = "1"\npage_size = 64\n[options.executor]\ndevice = 1\nplatform = "a5"\n'
    )
    environ = {} if granted is None else {"TASK_DEVICE": granted}
    resolved = resolve(path, environ=environ)
    config = resolved.config
    written = {"platform": "a5"} if granted else {"platform": "a5", "device": 1}
    assert config.options["executor"] == written
    assert config.runtime.device == (None if granted else "1")
    assert config.runtime.page_size == 64
    shown = show(resolved)
    assert ("# device: set by TASK_DEVICE = 5" in shown) == bool(granted)
    flag = {("runtime", "device"): Given("3", "--device")}
    assert resolve(path, flag, environ).origin("runtime", "device") == "--device"
