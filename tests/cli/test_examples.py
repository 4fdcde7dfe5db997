"""The files of examples/, run with the bundled model and without an NPU."""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import task_submit
from checkout import ROOT

from tilewright import plugins
from tilewright.cli import add_arguments, main
from tilewright.cli.parser import Parser
from tilewright.config import resolve
from tilewright.settings import DEMO_MODEL, DEMO_PROMPT
from tilewright.values import options_of
from tilewright_pypto.options import Options

SCRIPT = ROOT / "examples/qwen3_14b_local_generate.py"
RUN_FILE = ROOT / "examples/qwen3-14b.toml"


def example(*argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--model-dir", str(DEMO_MODEL), *argv]
    # One thread: tests that run at the same time need the other cores.
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environ)


def test_the_help_of_the_script_lists_its_flags():
    done = example("--help")
    assert (done.returncode, done.stderr) == (0, "")
    for flag in ("--prompt-file", "--executor", "--device", "--platform", "--pypto-root"):
        assert flag in done.stdout


def test_the_script_runs_on_the_torch_and_the_emulated_executor():
    argv = ["--prompt", DEMO_PROMPT, "--max-new-tokens=8"]
    done = example("--executor=torch", *argv)
    assert done.stderr == ""
    text, token_ids, finish_reason, device = done.stdout.splitlines()
    assert text.startswith("text:  that all men are created equal")
    assert len(ast.literal_eval(token_ids.removeprefix("token_ids: "))) == 8
    assert finish_reason == "finish_reason: length"
    assert device == "device: cpu"
    emulated = example("--platform=emulated", *argv)
    assert emulated.stderr == ""
    assert emulated.stdout == done.stdout.replace("device: cpu", "device: emulated")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "platform a2a3 needs a card, but none was given: give --device N"),
        (["--platform=a6"], "'a6'"),
        (["--executor=torch", "--platform=a5"], "'platform'"),
    ],
)
def test_an_error_of_the_script_is_printed_in_one_line(argv, message):
    done = example("--prompt", "x", *argv)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr


def test_the_run_file_sizes_the_kv_cache_for_its_longest_sequences():
    config = resolve(RUN_FILE, environ={}).config
    assert config.plugins.executor == "pypto-npu"
    assert config.options["executor"] == {"platform": "a2a3"}
    runtime = config.runtime
    assert runtime.page_size * runtime.total_pages == runtime.max_seq_len * runtime.max_batch_size
    assert [Path(file).name for file in config.prompts.file] == ["prompts.jsonl"]


def test_the_run_file_runs_with_another_model_and_without_a_card(capsys):
    argv = ["--model", str(DEMO_MODEL), "--max-seq-len=2048", "--max-new-tokens=6"]
    assert main(["run", str(RUN_FILE), *argv, "-o", "platform=emulated"]) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["prompt"] for record in printed] == ["Huawei is", "The capital of France is"]
    assert {record["device"] for record in printed} == {"emulated"}
    assert all(record["text"] and record["token_ids"] for record in printed)


PAGES = [
    "README.md",
    "docs/npu.md",
    "examples/qwen3-14b.toml",
    "examples/qwen3_14b_local_generate.py",
]


def submitted() -> list[str]:
    """The commands that the pages pass to task-submit, which may span several lines."""
    text = "\n".join((ROOT / page).read_text() for page in PAGES)
    return [
        " ".join(command.replace("\\", "").split())
        for command in re.findall(r'task-submit .*?--run "(.+?)"', text, re.S)
    ]


def test_documented_commands_are_accepted_by_task_submit_and_get_its_card():
    commands = submitted()
    assert len(commands) > 3
    for command in commands:
        assert task_submit.rejection(command) is None
        runs = task_submit.with_card(command, "5")
        # task-submit does not change a list of commands; its last one reads TASK_DEVICE.
        words = shlex.split(runs.rstrip(";").rpartition("&&")[2])
        assert runs.endswith(" --device 5") != ("&&" in command or ";" in command), command
        if words[0].endswith("tilewright"):
            parser = Parser()
            add_arguments(parser, plugins.load(plugins.find("command", words[1])))
            parser.parse_args(words[2:])
        else:
            assert words[:2] == ["python", "examples/qwen3_14b_local_generate.py"]


def test_the_examples_of_the_engine_page_generate(capsys):
    page = (ROOT / "docs/engine.md").read_text()
    chats, asynchronous, own = [
        block for block in re.findall(r"```python\n(.*?)```", page, re.S) if "MODEL" in block
    ]
    exec(chats, {"MODEL": DEMO_MODEL})
    assert re.match(r" Course of human events.*\n(length|eos)\n", capsys.readouterr().out)
    exec(asynchronous, {"MODEL": DEMO_MODEL})
    assert capsys.readouterr().out.startswith(" to be self-evident")
    exec(own, {"MODEL": DEMO_MODEL})
    printed = capsys.readouterr().out
    assert re.findall(r"(r\d) ended by (\w+)", printed) == [(f"r{i}", "length") for i in range(3)]
    assert "r0 ' to'" in printed


def test_the_npu_page_lists_every_option():
    page = (ROOT / "docs/npu.md").read_text()
    listed = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    assert listed == [option.name for option in options_of(Options)]
