"""The command line: help, output, settings, shells and terminals."""

import io
import json
import math
import os
import re
import resource
import runpy
import signal
import stat
import subprocess
import sys
import time

import plugin_distributions as dists
import pytest
import torch
from checkout import ROOT
from terminal import TILEWRIGHT, Terminal

from tilewright import GenerateConfig, LLMEngine, __version__, plugins
from tilewright.cli import add_arguments, main
from tilewright.cli.flags import flag_name
from tilewright.cli.parser import Parser, option_strings
from tilewright.settings import DEMO_MODEL, DEMO_PROMPT, keys
from tilewright_tools.reference import reference
from tilewright_torch.model import TorchExecutor

COMMANDS = [plugin.name for plugin in plugins.installed("command")]
GREEDY = ["--temperature", "0", "--max-new-tokens", "8"]
SIXTEEN = ["--max-new-tokens", "16"]


@pytest.fixture(scope="module")
def continuation() -> str:
    """The 16 tokens that the engine generates after the demo prompt."""
    with LLMEngine.from_plugins() as engine:
        engine.init_model("demo", DEMO_MODEL)
        return engine.generate_result("demo", DEMO_PROMPT, GenerateConfig(max_new_tokens=16)).text


def printed(capsys, *argv: str) -> tuple[str, str]:
    """Standard output and standard error of a command that succeeds."""
    code = main(argv)
    out, err = capsys.readouterr()
    assert code == 0, err
    return out, err


# --- help -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["generat"], []])
def test_the_overview_imports_no_command_and_no_heavy_library(argv):
    code = (
        f"import sys; from tilewright.cli import main; main({argv});"
        "heavy = {'torch', 'rich', 'attr', 'attrs', 'cattrs', 'pluggy', 'importlib.metadata'};"
        "print(); print([m for m in sys.modules if m in heavy or m.startswith("
        "('tilewright_', 'tilewright.cli.', 'tilewright.types')) and m != 'tilewright.cli.parser'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_does_not_import_torch(command):
    code = (
        "import sys; from tilewright.cli import main; main([sys.argv[1], '--help']);"
        "others = 'tilewright_torch tilewright_pypto tilewright_hf tilewright_testing'.split();"
        "sys.exit(any(m.startswith(('torch', 'rich', *others)) for m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, command], capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


def test_the_overview_has_a_line_for_each_command(capsys):
    out, _ = printed(capsys, "--help")
    lines = [line.split(maxsplit=1) for line in out.partition("  COMMAND\n")[2].splitlines()]
    assert [name for name, _ in lines] == COMMANDS
    assert dict(lines)["generate"] == "Continue a prompt, or answer a question"


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_in_40_columns(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "40")
    out, _ = printed(capsys, *command.split(), "--help")
    body = [line for line in out.splitlines() if not line.startswith("usage:")]
    assert max(map(len, body)) <= 40


@pytest.mark.parametrize("command", ["generate", "run", "chat"])
def test_every_generate_and_runtime_setting_has_a_flag(command):
    parser = Parser()
    add_arguments(parser, plugins.load(plugins.find("command", command)))
    flags = set(option_strings(parser))
    for section in ("runtime", "generate"):
        assert {flag_name(section, key) for key in keys(section)} <= flags


def test_the_cli_reference_is_up_to_date():
    page = (ROOT / "docs/cli.md").read_text()
    assert page == reference(), "run: python -m tilewright_tools.reference > docs/cli.md"


def test_version_prints_the_name_and_version(capsys):
    assert printed(capsys, "--version") == (f"tilewright {__version__}\n", "")


# --- generate -------------------------------------------------------------------------------------


def test_generate_prints_only_the_text_to_stdout(capsys, continuation):
    out, err = printed(capsys, "generate", *SIXTEEN)
    assert out == continuation + "\n"
    assert err == f"prompt: {DEMO_PROMPT}\n"
    assert continuation.startswith(" that all men are created equal")


def test_stats_are_printed_to_stderr_on_request(capsys):
    out, err = printed(capsys, "generate", "Congress shall make", *GREEDY, "--stats")
    assert err.count("\n") == 1
    assert "8 new tokens (" in err
    assert "ended by length" in err
    assert out.startswith(" no law")


def test_json_and_stats_count_the_tokens_that_were_drafted(capsys):
    law = "Congress shall make no law respecting an establishment of religion. Congress shall make"
    argv = ["generate", law, "--temperature", "0", "--max-new-tokens", "12", "--json", "--stats"]
    argv += ["--weight-dtype", "float32"]  # in bfloat16 two tokens are equally likely
    out, err = printed(capsys, *argv, "--speculation", "ngram")
    record = json.loads(out)
    drafted, accepted = record["drafted_tokens"], record["accepted_tokens"]
    assert drafted >= accepted > 0
    assert f" {accepted} of {drafted} drafted tokens accepted, " in err
    out, err = printed(capsys, *argv)
    plain = json.loads(out)
    assert plain["token_ids"] == record["token_ids"]
    assert "drafted_tokens" not in plain
    assert "drafted" not in err


def test_json_output_is_one_object_per_result(capsys, continuation):
    argv = [
        DEMO_PROMPT,
        "--json",
        "--logprobs",
        "2",
        "--prompt-logprobs",
        "0",
        "--seed",
        "5",
        *SIXTEEN,
    ]
    out, _ = printed(capsys, "generate", *argv)
    assert out.count("\n") == 1
    record = json.loads(out)
    timings = record.pop("timings")
    assert record["text"] == continuation
    assert record["prompt"] == DEMO_PROMPT
    assert record["seed"] == 5
    assert record["finish_reason"] == "length"
    assert timings["new_tokens"] == len(record["token_ids"]) == len(record["logprobs"])
    assert timings["prompt_tokens"] == len(record["prompt_token_ids"])
    assert all(len(token["top"]) == 2 for token in record["logprobs"])
    assert [token["token_id"] for token in record["logprobs"]] == record["token_ids"]
    first, *rest = record["prompt_logprobs"]
    assert first is None
    assert [token["token_id"] for token in rest] == record["prompt_token_ids"][1:]
    assert "sanitized_steps" not in record


def test_json_output_says_what_ended_the_text(capsys):
    out, _ = printed(capsys, "generate", DEMO_PROMPT, "--json", "--stop", " men", *SIXTEEN)
    assert (json.loads(out)["finish_reason"], json.loads(out)["stop_reason"]) == ("stop", " men")
    token = json.loads(out)["token_ids"][0]
    argv = [DEMO_PROMPT, "--json", "--stop-token-ids", str(token), *SIXTEEN]
    out, _ = printed(capsys, "generate", *argv)
    assert (json.loads(out)["finish_reason"], json.loads(out)["stop_reason"]) == ("stop", token)
    out, _ = printed(capsys, "generate", DEMO_PROMPT, "--json", *SIXTEEN)
    assert json.loads(out)["stop_reason"] is None


def test_the_end_of_the_text_is_chosen_by_flags(capsys, continuation):
    argv = [DEMO_PROMPT, *SIXTEEN, "--stop", "e", "--min-new-tokens", "3", "--include-stop"]
    out, _ = printed(capsys, "generate", *argv)
    assert out == continuation[: continuation.index("e", len(" that all men")) + 1] + "\n"
    assert main(["generate", *GREEDY, "--min-new-tokens", "200"]) == 2
    assert "'min_new_tokens' must be <= max_new_tokens = 8: 200" in capsys.readouterr().err


def test_the_results_of_a_prompt_are_printed_next_to_each_other(capsys, tmp_path):
    hot = ["--temperature", "3", "--seed", "5", "--max-new-tokens", "6"]
    out, _ = printed(capsys, "generate", DEMO_PROMPT, *hot, "--n", "3", "--json")
    records = [json.loads(line) for line in out.splitlines()]
    assert [record["seed"] for record in records] == [5, 6, 7]
    assert {record["prompt"] for record in records} == {DEMO_PROMPT}
    out, err = printed(capsys, "generate", DEMO_PROMPT, *hot, "--n", "3", "--stats")
    assert out == "\n".join(f"{record['text']}\n" for record in records)
    assert err.startswith("3 results: ")
    path = tmp_path / "run.toml"
    path.write_text('[generate]\nn = 2\nmax_new_tokens = 2\n[prompts]\ntext = ["We", "No"]\n')
    out, _ = printed(capsys, "run", str(path), "--json")
    assert [json.loads(line)["prompt"] for line in out.splitlines()] == ["We", "We", "No", "No"]


def test_a_refused_prompt_with_several_results_is_told_of_once(capsys, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('"We"\n' + json.dumps("a " * 3000) + "\n")
    argv = ["generate", "--prompt-file", str(prompts), *GREEDY, "--max-new-tokens", "2"]
    assert main([*argv, "--n", "2", "--json"]) == 2
    out, err = capsys.readouterr()
    reasons = [json.loads(line)["finish_reason"] for line in out.splitlines()]
    assert reasons == ["length", "length", "error", "error"]
    assert err.startswith("tilewright: error: prompt 2 of 2: ")
    assert err.count("prompt 2 of 2") == 1


def test_an_error_of_several_prompts_is_told_of_once(capsys, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(p) + "\n" for p in ("We", "a " * 3000, "a " * 3000)))
    argv = ["generate", "--prompt-file", str(prompts), *GREEDY, "--max-new-tokens", "2"]
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith("tilewright: error: prompt 2 of 3, and 1 after it: the prompt has ")


def test_a_chat_refuses_several_results(capsys, monkeypatch):
    monkeypatch.setenv("TILEWRIGHT_GENERATE_N", "2")
    assert main(["chat"]) == 2
    said = "TILEWRIGHT_GENERATE_N: expected n = 1, since a chat has one answer to each message"
    assert said in capsys.readouterr().err


def test_prompts_are_read_from_files_in_order(capsys, tmp_path):
    (tmp_path / "a.txt").write_text("We the People of the United States,\n")
    (tmp_path / "b.jsonl").write_text('"Congress shall make no law"\n\n{"prompt": "No person"}\n')
    files = [f"--prompt-file={tmp_path / name}" for name in ("a.txt", "b.jsonl")]
    out, _ = printed(capsys, "generate", *GREEDY, *files, "--json")
    records = [json.loads(line) for line in out.splitlines()]
    assert [record["prompt"] for record in records] == [
        "We the People of the United States,",
        "Congress shall make no law",
        "No person",
    ]
    out, _ = printed(capsys, "generate", *GREEDY, *files)
    assert out == "\n".join(record["text"] + "\n" for record in records)


def test_an_output_file_is_replaced_only_when_complete(capsys, tmp_path):
    path = tmp_path / "out.txt"
    path.write_text("old")
    out, _ = printed(capsys, "generate", "Congress shall make", *GREEDY, "--output", str(path))
    assert out == ""
    assert path.read_text().startswith(" no law")
    assert os.listdir(tmp_path) == ["out.txt"]
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


def test_a_failed_run_keeps_the_old_output_file(capsys, tmp_path):
    path = tmp_path / "out.txt"
    path.write_text("old")
    argv = ["generate", "x", "--output", str(path), "--model", str(tmp_path)]
    assert main(argv) == 2
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["out.txt"]


def test_writing_output_through_a_symlink_keeps_the_link(capsys, tmp_path):
    (tmp_path / "link").symlink_to("target")
    printed(capsys, "generate", "No person", *GREEDY, "--output", str(tmp_path / "link"))
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text()


def test_an_output_device_is_written_to_and_not_replaced(capsys):
    printed(capsys, "generate", "No person", *GREEDY, "--output", "/dev/null")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_a_full_disk_leaves_no_output_file_and_is_named(capsys, tmp_path, form):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    path = tmp_path / "out.txt"
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        assert main(["generate", "No person", *GREEDY, *form, "--output", str(path)]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"output file {str(path)!r} cannot be written: File too large" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert main(["generate", "No person", *GREEDY, *form, "--output", "/dev/full"]) == 2
    said = "output file '/dev/full' cannot be written: No space left on device"
    assert said in capsys.readouterr().err


def test_an_output_file_that_cannot_be_created_is_refused_before_the_model_is_loaded(
    capsys, tmp_path
):
    path = str(tmp_path / "none" / "out.txt")
    assert main(["generate", "x", "--model", "no/such/folder", "--output", path]) == 2
    said = f"error: output file {path!r} cannot be written: No such file or directory\n"
    assert capsys.readouterr().err.endswith(said)


@pytest.mark.parametrize("name", ["-", "/dev/stdout"])
def test_standard_output_can_be_the_output_file(capsys, name):
    out, _ = printed(capsys, "generate", "Congress shall make", *GREEDY, "--output", name)
    assert out.startswith(" no law")


def test_settings_are_read_from_the_environment(capsys, monkeypatch):
    monkeypatch.setenv("TILEWRIGHT_GENERATE_MAX_NEW_TOKENS", "3")
    out, _ = printed(capsys, "generate", "--json")
    assert len(json.loads(out)["token_ids"]) == 3


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["-o", "sampler.no_such_option=1"], "error: -o sampler.no_such_option: sampler 'top-p'"),
        (["--max-seq-len", "4"], "max_seq_len = 4"),
        (["--model", "no/such/folder", "x"], "no/such/folder"),
    ],
)
def test_an_error_of_the_engine_is_printed_in_one_line(capsys, argv, message):
    assert main(["generate", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err


@pytest.mark.parametrize("logits", ["finite", "not finite"])
@pytest.mark.parametrize("output", [[], ["--json"], ["--output", "texts.txt"]])
def test_trace_nonfinite_ends_the_run_and_names_a_tensor(
    capsys, tmp_path, monkeypatch, logits, output
):
    run_layer, steps = TorchExecutor.run_layer, []

    def wrong(self, step, layer, hidden, tap=None):
        steps.extend([step] if layer == 1 else [])
        if tap and layer == 1 and len(steps) >= 3:
            bad = torch.zeros(2, 3)
            bad[1, 2] = -math.inf
            tap("layers.1.attn_norm", bad)
            tap("layers.1.q_proj", bad)
        found = run_layer(self, step, layer, hidden, tap)
        return found * math.nan if logits == "not finite" and len(steps) >= 3 else found

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(TorchExecutor, "run_layer", wrong)
    assert main(["generate", *SIXTEEN, *output, "--trace-nonfinite"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == (
        "tilewright: error: step 2, layers.1.attn_norm [2, 3]: 1 of 6 elements are not finite, the "
        "first at [1, 2]: -inf; all tensors tapped before it are finite"
    )
    assert len(steps) == 3
    assert not list(tmp_path.iterdir())


def test_trace_nonfinite_does_not_change_a_finite_run(capsys, continuation):
    out, _ = printed(capsys, "generate", *SIXTEEN, "--trace-nonfinite")
    assert out == continuation + "\n"


# --- run ------------------------------------------------------------------------------------------


def test_the_demo_run_file_generates_each_prompt(capsys):
    out, _ = printed(capsys, "run", str(ROOT / "examples/demo.toml"), "--max-new-tokens", "8")
    records = [json.loads(line) for line in out.splitlines()]
    assert [record["prompt"].split()[0] for record in records] == ["When", "We", "Congress"]
    assert records[2]["text"].startswith(" respecting an establishment")
    assert all(len(record["token_ids"]) == 8 for record in records)


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.toml")), ids=lambda p: p.name)
def test_example_run_files_are_valid(capsys, path):
    out, err = printed(capsys, "run", str(path), "--show")
    assert "[generate]" in out
    assert err == ""


@pytest.mark.parametrize(
    ("options", "argv", "message"),
    [
        ("[options.executor]\nthreads = 0", [], ":2: executor 'torch': 'threads' must be >= 1: 0"),
        ("[options.sampler]\nnone = 1", [], ":2: sampler 'top-p': unknown option 'none'"),
        ("", ["-o", "kv_allocator.x=1"], "-o kv_allocator.x: kv allocator 'paged'"),
        ("[options.loader]\nx = 1\n[plugins]\nloader = 'hf-hub'", [], ":2: loader 'hf-hub'"),
        ("[options.weight_format.safetensors]\nx = 1", [], ":2: weight format 'safetensors'"),
        ("[options.observer.none]\nx = 1", [], "no observer is named 'none'"),
        ("[options.logits_processor.choice]\nx = 1", [], "no request uses logits processor"),
    ],
)
def test_show_refuses_the_options_that_a_run_refuses(capsys, tmp_path, options, argv, message):
    path = tmp_path / "run.toml"
    path.write_text(options)
    assert main(["run", str(path), "--show", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err


def test_show_says_that_options_of_an_open_loader_are_not_checked(capsys, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("[options.loader]\nrevision = 'main'")
    out, _ = printed(capsys, "run", str(path), "--show")
    assert "[options.loader]\n# not checked: the loader is chosen when the model is loaded\n" in out


def test_run_streams_a_single_prompt_like_generate(capsys, tmp_path, continuation):
    (tmp_path / "run.toml").write_text("")
    out, _ = printed(capsys, "run", str(tmp_path / "run.toml"), *SIXTEEN)
    assert out == continuation + "\n"


def test_flags_override_the_run_file(capsys, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('[prompts]\ntext = "x"\n[generate]\nmax_new_tokens = 4\n')
    out, _ = printed(
        capsys, "run", str(path), "--prompt", "No person", "--max-new-tokens", "2", "--json"
    )
    record = json.loads(out)
    assert record["prompt"] == "No person"
    assert len(record["token_ids"]) == 2


def test_from_config_reads_a_run_file(tmp_path, continuation):
    path = tmp_path / "run.toml"
    path.write_text('[model]\nid = "it"\n[runtime]\npage_size = 4\n')
    with LLMEngine.from_config(path) as engine:
        assert engine.model("it").runtime.page_size == 4
        assert engine.generate("it", DEMO_PROMPT, GenerateConfig(max_new_tokens=16)) == continuation


# --- chat -----------------------------------------------------------------------------------------


def chat(text: str, *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*TILEWRIGHT, "chat", *argv], input=text, capture_output=True, text=True, timeout=120
    )


def test_chat_answers_each_line_as_one_message():
    question = "How does the Declaration begin?"
    done = chat(f"{question}\n\n/reset\n{question}\n/quit\n{question}\n", *GREEDY)
    assert done.returncode == 0, done.stderr
    with LLMEngine.from_plugins() as engine:
        engine.init_model("demo", DEMO_MODEL)
        message = {"role": "user", "content": question}
        answer = engine.chat("demo", [message], GenerateConfig(max_new_tokens=8))
    assert isinstance(answer, str)
    first, second = done.stdout.splitlines()
    assert first
    assert first == second
    assert first == answer


# --- bench ----------------------------------------------------------------------------------------

BENCH = ["bench", "--new-tokens", "3", "--repeat", "2", "--warmup", "0"]


def test_bench_measures_every_combination(capsys):
    out, _ = printed(capsys, *BENCH, "--batch", "1", "3", "--prompt-tokens", "4", "20", "--json")
    report = json.loads(out)
    assert [(r["batch"], r["prompt_tokens"]) for r in report["results"]] == [
        (1, 4),
        (1, 20),
        (3, 4),
        (3, 20),
    ]
    for result in report["results"]:
        for phase in ("prefill", "decode"):
            rounds = result[f"{phase}_rounds"]
            assert len(rounds) == 2
            assert min(rounds) > 0
            assert min(rounds) <= result[f"{phase}_tokens_per_second"] <= max(rounds)


def test_bench_prints_a_table(capsys):
    out, _ = printed(capsys, *BENCH, "--batch", "2", "--prompt-tokens", "5")
    title, row, _ = out.splitlines()
    assert title.split() == ["batch", "prompt", "new", "prefill", "decode"]
    assert row.split()[:3] == ["2", "5", "3"]
    assert max(map(len, out.splitlines())) <= 40


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--batch", "17"], "--batch 17 is above max_batch_size = 16"),
        (["--prompt-tokens", "9999999"], "above max_seq_len"),
    ],
)
def test_bench_refuses_sizes_above_the_runtime_limits(capsys, argv, message):
    assert main([*BENCH, *argv]) == 2
    assert message in capsys.readouterr().err


# --- shells and terminals -------------------------------------------------------------------------


def test_a_closed_pipe_ends_the_command_without_a_message():
    command = f"{' '.join(TILEWRIGHT)} run examples/demo.toml --show; echo code $? >&2"
    done = subprocess.run(
        ["bash", "-c", f"({command}) | true"], capture_output=True, text=True, cwd=ROOT
    )
    # `true` may end before or after the settings are written.
    assert done.stderr in ("code 141\n", "code 0\n")


@pytest.mark.parametrize("milliseconds", [60, 120, 180, 240])
def test_ctrl_c_at_the_start_prints_no_traceback_of_tilewright(milliseconds):
    child = subprocess.Popen([*TILEWRIGHT, "--help"], stdout=-1, stderr=-1, text=True)
    time.sleep(milliseconds / 1000)
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=60)
    assert "tilewright/cli" not in said
    # Python itself, which prints a traceback, may not have reached the command yet.
    assert child.returncode in (0, 130) or "__main__.py" not in said


def test_ctrl_c_during_the_imports_is_code_130(monkeypatch):
    class Interrupted:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == "tilewright.cli":
                raise KeyboardInterrupt

    for name in ("tilewright.cli", "tilewright.__main__"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "meta_path", [Interrupted, *sys.meta_path])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("tilewright", run_name="__main__")
    assert ended.value.code == 130


def test_a_prompt_in_a_locale_without_unicode_is_read_as_utf_8(capsys):
    as_ascii = "Ünï 😀".encode().decode("ascii", "surrogateescape")
    out, _ = printed(capsys, "generate", as_ascii, *GREEDY, "--json")
    assert json.loads(out)["prompt"] == "Ünï 😀"
    assert main(["generate", "\udcff"]) == 2
    assert "PROMPT: the prompt is not valid UTF-8" in capsys.readouterr().err


def test_a_working_folder_that_was_deleted_is_an_error(capsys, tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert main(["generate", "x"]) == 2
    assert "the working folder was deleted" in capsys.readouterr().err
    os.chdir(tmp_path)


@pytest.mark.parametrize("argv", [["generate", "Ü"], ["generate", "Ü", "--json"]])
def test_output_works_in_a_locale_without_unicode(argv):
    environ = os.environ | {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    # The next token is not ASCII and must be printed in some form.
    done = subprocess.run(
        [*TILEWRIGHT, *argv, "--max-new-tokens", "2"], capture_output=True, env=environ
    )
    assert (done.returncode, done.stderr) == (0, b"")
    out = done.stdout.decode("ascii")
    if "--json" in argv:
        assert json.loads(out)["prompt"] == "Ü"


def test_ctrl_c_ends_a_generation_without_a_traceback():
    terminal = Terminal("generate", "--ignore-eos", "--max-new-tokens", "100000")
    terminal.wait_for(b"created equal")
    terminal.interrupt()
    assert terminal.end() == 130
    assert b"Traceback" not in terminal.screen


def test_ctrl_c_in_a_chat_stops_only_the_answer():
    terminal = Terminal("chat", "--ignore-eos", "--max-new-tokens", "100000")
    terminal.wait_for(b"> ")
    terminal.type(b"How does the Declaration begin?\n")
    terminal.wait_for(b"When in the")
    terminal.interrupt()
    terminal.wait_for(b"> ")
    terminal.type(b"/hepl\n")
    terminal.wait_for(b"did you mean '/help'")
    terminal.wait_for(b"> ")
    terminal.type(b"\x04")
    assert terminal.end() == 0
    assert b"Traceback" not in terminal.screen


def test_a_bug_in_a_plugin_is_a_one_line_error_with_exit_code_2(capsys, monkeypatch):
    def broken(*arguments):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(TorchExecutor, "forward", broken)
    assert main(["generate", "We", *GREEDY]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("tilewright: error: executor 'torch' of tilewright")
    assert "ZeroDivisionError: a bug" in err
    assert err.count("\n") == 1


CHATTY = f"""
    print("sampler at import")
    {dists.LIKELIEST.replace("return [", 'print("in a step"); return [')}
"""
CHATTY_OBSERVER = """
    print("observer at import")
    from tilewright import hookimpl

    tilewright_api = 2

    class Chatty:
        @hookimpl
        def on_model_loaded(self): print("a model is loaded")

        @hookimpl
        def on_close(self): print("the engine is closed")

    @hookimpl
    def create_observer(): return Chatty()
"""
CHATTY_LOADER = """
    print("loader at import")
    from tilewright import hookimpl
    from tilewright_hf import loader

    tilewright_api = 2

    @hookimpl
    def can_load(source):
        print("asked")
        return False

    load_model = loader.load_model
"""


@pytest.fixture
def chatty(tmp_path):
    """A sampler, an observer and a loader that print, installed for the test."""
    with dists.on_path(tmp_path / "site") as install:
        install(
            dists.sampler("acme-chatty", "chatty", CHATTY),
            dists.Distribution(
                name="acme-more",
                files={
                    "acme_watch.py": dists.dedent(CHATTY_OBSERVER),
                    "acme_load.py": dists.dedent(CHATTY_LOADER),
                },
                plugins={"observer": {"watch": "acme_watch"}, "loader": {"load": "acme_load"}},
            ),
        )
        yield


RUNS = {
    "generate": ["We", "--max-new-tokens", "3"],
    "chat": ["--max-new-tokens", "3"],
    "bench": ["--prompt-tokens", "4", "--new-tokens", "2", "--repeat", "1", "--warmup", "0"],
}


@pytest.mark.parametrize("command", RUNS)
def test_output_printed_by_plugins_goes_to_stderr(chatty, capsys, monkeypatch, command):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Hi\n")))
    json_flag = [] if command == "chat" else ["--json"]
    argv = [command, *RUNS[command], *json_flag, "--sampler", "chatty", "--observer", "watch"]
    assert main(argv) == 0
    out, err = capsys.readouterr()
    if json_flag:
        assert isinstance(json.loads(out), dict)
    else:
        assert not re.search("import|step|a model|asked", out)
    said = ("sampler at import", "observer at import", "loader at import", "asked", "in a step")
    for line in (*said, "a model is loaded", "the engine is closed"):
        assert f"{line}\n" in err
    assert err.count("sampler at import\n") == 1
    if command == "generate":
        assert main([word for word in argv if word != "--json"]) == 0
        assert capsys.readouterr().out == json.loads(out)["text"] + "\n"


@pytest.mark.parametrize(
    "argv", [["plugins", "check", "--json"], ["plugins", "list", "--json"], ["doctor", "--json"]]
)
def test_reports_on_plugins_that_print_are_valid_json(chatty, capsys, argv):
    assert main(argv) == 0
    assert isinstance(json.loads(capsys.readouterr().out), list)


def test_a_conversion_prints_one_line_whatever_its_loader_prints(chatty, capsys, tmp_path):
    out = str(tmp_path / "out")
    assert main(["convert", "--executor", "torch", "--loader", "load", "--out", out]) == 0
    assert re.fullmatch(f"{out}: .*\n", capsys.readouterr().out)


SHAKY = """
    from tilewright import hookimpl

    tilewright_api = 2

    class Shaky:
        @hookimpl
        def {event}(self):
            raise OSError("the disk is full")

    @hookimpl
    def create_observer():
        return Shaky()
"""


@pytest.mark.parametrize(
    ("event", "filters"),
    [
        ("on_step", "error::RuntimeWarning"),
        ("on_close", ""),
    ],
)
def test_an_observer_that_raises_is_one_line_on_stderr_and_changes_no_result(
    capsys, tmp_path, event, filters
):
    argv = ["generate", "--json", "We", *GREEDY, "--max-new-tokens", "3"]
    assert main(argv) == 0
    plain = json.loads(capsys.readouterr().out)
    files = {"acme_shaky.py": dists.dedent(SHAKY.format(event=event))}
    shaky = dists.Distribution("acme-shaky", files, {"observer": {"shaky": "acme_shaky"}})
    site = dists.install(tmp_path / "site", shaky)
    observed = ["-m", "tilewright", *argv, "--observer", "shaky"]
    done = dists.run(*observed, site=site, PYTHONWARNINGS=filters)
    assert done.code == 0, done.err
    assert json.loads(done.out)["text"] == plain["text"]
    said = f"observer 'shaky' of acme-shaky 1.0 failed in {event}: OSError: the disk is full ("
    (line,) = done.err.splitlines()
    assert line.startswith(f"warning: {said}")


def test_a_refused_prompt_leaves_the_others_their_results(capsys, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps("We the People") + "\n" + json.dumps("a " * 3000) + "\n")
    argv = ["generate", "--prompt-file", str(prompts), *GREEDY]
    assert main([*argv, "--json"]) == 2
    out, err = capsys.readouterr()
    first, second = map(json.loads, out.splitlines())
    assert first["finish_reason"] == "length"
    assert "error" not in first
    assert (second["text"], second["finish_reason"]) == ("", "error")
    assert "tokens, which leaves no room" in second["error"]
    assert err == f"tilewright: error: prompt 2 of 2: {second['error']}\n"
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == f"{first['text']}\n\n\n"
    assert err.startswith("tilewright: error: prompt 2 of 2: ")
