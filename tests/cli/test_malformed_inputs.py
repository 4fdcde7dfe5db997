"""Wrong run files, flags and environment variables: one line on stderr, exit code 2, no traceback.

The cases are derived from valid input: every setting with a wrong value and with a misspelt name,
in each place where it can be given, and a valid file damaged in many ways.
"""

import io
import os
import random
import subprocess
import sys
from contextlib import suppress

import pytest

from tilewright.cli import main
from tilewright.cli.flags import flag_name
from tilewright.settings import SECTIONS, keys
from tilewright.values import options_of

GOOD = """\
# A run file that says something in every section.
[plugins]
loader = "hf-local"
executor = "torch"
observers = []

[options.weight_format.safetensors]
backend = "mmap"

[model]
id = "demo"

[runtime]
weight_dtype = "float32"
page_size = 8
max_batch_size = 4

[generate]
max_new_tokens = 4
temperature = 0.5
stop = ["\\n", "."]
logit_bias = { 1 = -1.5 }
ignore_eos = true

[prompts]
text = [
  "one",
  "two",
]

[output]
format = "jsonl"
"""

SETTINGS = [(section, key) for section in SECTIONS for key in keys(section)]
NUMBERS_AND_TEXT = {
    key: "text"
    for section in ("runtime", "generate")
    for option in options_of(SECTIONS[section])
    if "number" in option.expected or "integer" in option.expected
    if "string" not in option.expected
    for key in [(section, option.name)]
}
CHOSEN = {
    ("runtime", "weight_dtype"): "float31",
    ("runtime", "kv_dtype"): "int8",
    ("generate", "ignore_eos"): "perhaps",
    ("output", "format"): "jsonlines",
    ("plugins", "loader"): "hf-locale",
    ("plugins", "executor"): "toch",
    ("plugins", "kv_allocator"): "pages",
    ("plugins", "sampler"): "top-k",
    ("plugins", "observers"): "nobody",
    ("model", "format"): "safetensor",
}
BAD_TEXT = NUMBERS_AND_TEXT | CHOSEN
OUT_OF_RANGE = {
    ("runtime", "page_size"): "0",
    ("runtime", "total_pages"): "-1",
    ("runtime", "max_seq_len"): "1",
    ("runtime", "max_batch_size"): "2.5",
    ("runtime", "max_batch_tokens"): "1e3",
    ("generate", "max_new_tokens"): "0",
    ("generate", "temperature"): "nan",
    ("generate", "top_k"): "-2",
    ("generate", "top_p"): "1.5",
    ("generate", "min_p"): "1.5",
    ("generate", "repetition_penalty"): "0",
    ("generate", "presence_penalty"): "inf",
    ("generate", "frequency_penalty"): "nan",
    ("generate", "seed"): str(2**63),
    ("generate", "logprobs"): "-1",
    ("generate", "stop_token_ids"): "1,x",
}


@pytest.fixture(autouse=True)
def _in_an_empty_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def told(capsys, *argv: str) -> str:
    """The error line for wrong input, checked to be the only output."""
    code = main(argv)
    out, err = capsys.readouterr()
    assert code == 2, (code, out, err)
    assert out == ""
    assert err.count("\n") == 1, err
    assert err.startswith("tilewright: error: ")
    assert "Traceback" not in err
    return err


def run_file(text: str | bytes) -> str:
    with open("run.toml", "wb") as f:
        f.write(text.encode() if isinstance(text, str) else text)
    return "run.toml"


def misspelt(name: str) -> str:
    return name + name[-1]


def test_the_undamaged_run_file_is_valid(capsys):
    assert main(["run", run_file(GOOD), "--show"]) == 0
    assert "page_size = 8  # run.toml:15" in capsys.readouterr().out


# --- run files ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("section", "key"), SETTINGS)
def test_a_value_of_a_wrong_type_in_a_file_is_an_error_with_its_line(capsys, section, key):
    line = told(capsys, "run", run_file(f"\n[{section}]\n{key} = 1979-05-27\n"))
    assert f"run.toml:3: {key!r} must be " in line
    assert "1979" in line


@pytest.mark.parametrize(("section", "key"), SETTINGS)
def test_a_misspelt_key_in_a_file_is_an_error_with_a_suggestion(capsys, section, key):
    line = told(capsys, "run", run_file(f"[{section}]\n# \n{misspelt(key)} = 1\n"))
    assert f"run.toml:3: unknown key {misspelt(key)!r}" in line
    assert f"did you mean {key!r}" in line


@pytest.mark.parametrize("section", [*SECTIONS, "options"])
def test_a_misspelt_section_in_a_file_is_an_error_with_a_suggestion(capsys, section):
    line = told(capsys, "run", run_file(f"\n[{misspelt(section)}]\n"))
    assert f"run.toml:2: unknown section {misspelt(section)!r}; did you mean {section!r}" in line


@pytest.mark.parametrize("section", [*SECTIONS, "options"])
@pytest.mark.parametrize("text", ["{} = 1\n", "[[{}]]\n", "{} = []\n", "{} = 'x'\n"])
def test_a_section_that_is_not_a_table_is_refused(capsys, section, text):
    line = told(capsys, "run", run_file(text.format(section)))
    assert f"run.toml:1: [{section}] must be a table" in line


@pytest.mark.parametrize(("place", "value"), OUT_OF_RANGE.items(), ids=str)
def test_a_value_out_of_range_in_a_file_is_an_error_with_its_line(capsys, place, value):
    section, key = place
    line = told(capsys, "run", run_file(f'[{section}]\n{key} = "{value}"\n'))
    assert f"run.toml:2: {key!r} must be " in line


@pytest.mark.parametrize("bad", ["\x00", "\ufeff", "= 1", "[", "]", '"', "x", "x = 'a", "é = 1"])
@pytest.mark.parametrize("after", [0, 11, len(GOOD.splitlines())])
def test_invalid_toml_is_an_error_with_its_line(capsys, bad, after):
    lines = GOOD.splitlines(keepends=True)
    lines.insert(after, f"{bad}\n")
    if bad == "\ufeff" and after == 0:
        lines[0] = "\ufeff\ufeff\n"
    line = told(capsys, "run", run_file("".join(lines)))
    assert f"run.toml:{after + 1}: invalid TOML: " in line


def test_an_integer_that_cannot_be_written_is_an_error_with_its_line(capsys):
    line = told(capsys, "run", run_file(f"[runtime]\npage_size = 0x{'f' * 5000}\n[output]\n"))
    assert "run.toml:2: invalid TOML: Exceeds the limit (4300 digits)" in line


LONG = "x" * 50_000


@pytest.mark.parametrize(
    "text",
    [
        f"[{LONG}]\n",
        f"[model]\n{LONG} = 1\n",
        f"[model]\npath = '{LONG}'\n",
        f"[model]\npath = 'a/{LONG}'\n",
        f"[runtime]\ndevice = '{LONG}'\n",
        f"[runtime]\nweight_dtype = '{LONG}'\n",
        f"[plugins]\nloader = '{LONG}'\n",
        f"[output]\nfile = '{LONG}'\n",
        f"[prompts]\nfile = ['{LONG}']\n",
        f"[prompts]\nchat = true\n[chat]\ntools = '{LONG}'\n",
        f"[prompts]\nchat = true\n[chat.template_options]\n{LONG} = 1\n",
        f"[options.{LONG}]\n",
        f"[options.observer.{LONG}]\na = 1\n",
    ],
    ids=lambda text: text.replace(LONG, "x").replace("\n", " "),
)
def test_a_long_name_or_path_is_shortened(capsys, text):
    assert main(["run", run_file(text)]) == 2
    err = capsys.readouterr().err.split("\n")
    assert err[-2].startswith("tilewright: error: ")
    assert max(map(len, err)) < 700


def test_more_results_than_anybody_asks_for_are_refused(capsys):
    assert "'n' must be " in told(capsys, "generate", "Hi", "--n", str(10**12))


@pytest.mark.parametrize("key", ["page_size", "total_pages", "max_seq_len"])
@pytest.mark.parametrize("value", [10**12, 10**400], ids=["10**12", "10**400"])
def test_a_size_that_no_memory_holds_is_refused(capsys, key, value):
    line = told(capsys, "generate", "Hi", f"{flag_name('runtime', key)}={value}")
    assert f"{key!r} must be " in line
    assert len(line) < 600


@pytest.mark.parametrize("byte", [b"\xff", b"\xc3", b"\xed\xa0\x80"])
def test_a_run_file_that_is_not_utf8_is_an_error_with_its_line(capsys, byte):
    data = GOOD.encode()
    line = told(capsys, "run", run_file(data.replace(b"one", byte)))
    assert "'run.toml', line 27: expected UTF-8" in line


@pytest.mark.parametrize("path", ["nothing.toml", ".", "run.toml/x", "x" * 5000, "\0"])
def test_an_unreadable_run_file_is_a_one_line_error(capsys, path):
    run_file(GOOD)
    assert "run file" in told(capsys, "run", path)


def test_a_damaged_run_file_is_valid_or_a_one_line_error(capsys):
    """Each file is the valid one with a few bytes deleted, duplicated, changed or swapped."""
    chance = random.Random(0)
    codes = []
    for _ in range(300):
        data = bytearray(GOOD.encode())
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(data))
            match chance.randrange(5):
                case 0:
                    del data[at : at + chance.randint(1, 30)]
                case 1:
                    data[at:at] = data[at : at + chance.randint(1, 30)]
                case 2:
                    data[at] = chance.randrange(256)
                case 3:
                    data[at:at] = chance.choice([b"[", b"]", b'"', b"'", b"=", b"\n", b".", b"{"])
                case 4:
                    other = chance.randrange(len(data))
                    data[at], data[other] = data[other], data[at]
        code = main(["run", run_file(bytes(data)), "--show"])
        out, err = capsys.readouterr()
        assert code in (0, 2), bytes(data)
        if code == 2:
            assert (out, err.count("\n")) == ("", 1), (bytes(data), err)
            assert err.startswith("tilewright: error: "), err
        codes.append(code)
    assert codes.count(2) > 200


# --- flags ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("place", "value"), (BAD_TEXT | OUT_OF_RANGE).items(), ids=str)
def test_a_wrong_value_of_a_flag_is_an_error_that_names_the_flag(capsys, place, value):
    flag = flag_name(*place)
    assert flag in told(capsys, "generate", f"{flag}={value}")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "expected a command, found none: batch, bench, chat"),
        (["generat"], "no command is named 'generat'; did you mean 'generate'"),
        (["--versio"], "unknown option '--versio'; did you mean '--version'"),
        (["generate", "--temprature=1"], "did you mean '--temperature'"),
        (["generate", "--temp", "1"], "unknown option '--temp'"),
        (["generate", "-x"], "unknown option '-x'"),
        (["chat", "a"], "unexpected argument 'a': tilewright chat takes options alone"),
        (["generate", "a", "b"], "unexpected argument 'b': quote text that has spaces"),
        (["generate", "--seed"], "--seed: expected one argument"),
        (["generate", "--seed", "--json"], "--seed: expected one argument"),
        (["generate", ""], "PROMPT: the prompt is empty"),
        (["generate", "\udcff"], "PROMPT: the prompt is not valid UTF-8"),
        (["generate", "x", "--prompt-file", "f"], "prompts are already given as text (PROMPT)"),
        (["generate", "-", "--prompt-file", "f"], "found both: give one"),
        (["generate", "--prompt-file", "f"], "prompt file 'f' cannot be read: No such file"),
        (["generate", "--prompt-file", "."], "prompt file '.' cannot be read: Is a directory"),
        (["generate", "--model", "x"], "no prompt is given"),
        (["generate", "--logit-bias", "3"], "--logit-bias: expected ID=VALUE, found '3'"),
        (["generate", "--logit-bias", "a=1"], "'logit_bias' must be a table from integers"),
        (["generate", "--logit-bias", "=1"], "--logit-bias: expected ID=VALUE"),
        (["generate", *["--logit-bias", "3=1"] * 2], "--logit-bias: '3' is given twice"),
        (["generate", "-o", "x"], "-o: expected KEY=VALUE, found 'x'"),
        (["generate", "-o", "=1"], "-o: expected KEY=VALUE"),
        (["generate", "-o", "samplr.x=1"], "unknown kind of plugin 'samplr'; did you mean 'sampl"),
        (["generate", "-o", "observer.x=1"], "expected observer.NAME.KEY=VALUE"),
        (["generate", "-o", "observer.y.x=1"], "-o observer.y.x: no observer is named 'y'"),
        (["generate", "-o", "weight_format.x.y=1"], "no weight format is named 'x'"),
        (["generate", "--output", "no/where"], "'no/where' cannot be written: No such file"),
        (["generate", "--output", "."], "cannot be written: it is a directory"),
        (["generate", "--output", "\0"], "cannot be written: embedded null byte"),
        (["generate", "--output", ""], "cannot be written"),
        (["generate", "--output", "x" * 300], "cannot be written: File name too long"),
        (["run"], "arguments are required: CONFIG"),
        (["run", "a.toml", "b.toml"], "unexpected argument 'b.toml'"),
        (["chat", "hello"], "unexpected argument 'hello'"),
        (["bench", "--batch", "0"], "--batch: expected an integer of at least 1, found '0'"),
        (["bench", "--batch", "1", "x"], "--batch: expected an integer"),
        (["bench", "--batch"], "--batch: expected at least one argument"),
        (["bench", "--prompt-tokens", "1.5"], "--prompt-tokens: expected an integer"),
        (["bench", "--warmup", "-1"], "--warmup: expected"),
        (["bench", "--temperature", "0"], "unknown option '--temperature'"),
        (["plugins", "list", "--jsn"], "did you mean '--json'? (see tilewright plugins list --h"),
        (
            ["plugins", "new", "loader", "x", "--json"],
            "'--json' (see tilewright plugins new --help)",
        ),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_wrong_usage_is_a_one_line_error(capsys, argv, message):
    assert message in told(capsys, *argv)


@pytest.mark.parametrize("flag", ["--temperature", "--page-size", "--executor", "--model"])
@pytest.mark.parametrize("command", ["generate", "run", "chat"])
def test_a_misspelt_flag_of_any_command_is_an_error_with_a_suggestion(capsys, command, flag):
    argv = [command, f"{misspelt(flag)}=1"] + ["run.toml"] * (command == "run")
    assert f"unknown option {misspelt(flag)!r}; did you mean {flag!r}" in told(capsys, *argv)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("{", "invalid JSON"),
        ("3", "expected a string"),
        ('{"text": "x"}', "unknown key 'text'"),
        ('{"prompt": ["x"]}', "expected a string"),
        ("null", "expected a string"),
        ("[" * 100_000, "invalid JSON"),
    ],
    ids=range(6),
)
def test_a_malformed_line_of_a_prompt_file_is_an_error_with_its_line(capsys, tmp_path, line, found):
    (tmp_path / "p.jsonl").write_text(f'"good"\n\n{line}\n')
    assert f"p.jsonl:3: {found}" in told(capsys, "generate", "--prompt-file", "p.jsonl")


@pytest.mark.parametrize(
    ("data", "found"),
    [(b"", "empty"), (b"\n", "empty"), (b"a\n\xff", "line 2: expected UTF-8, found byte 0xff")],
)
def test_an_empty_or_undecodable_prompt_file_is_refused(capsys, tmp_path, data, found):
    (tmp_path / "p.txt").write_bytes(data)
    assert found in told(capsys, "generate", "--prompt-file", "p.txt")


# --- the environment ------------------------------------------------------------------------------


@pytest.mark.parametrize(("place", "value"), (BAD_TEXT | OUT_OF_RANGE).items(), ids=str)
def test_a_wrong_value_of_a_variable_is_an_error_that_names_the_variable(
    capsys, monkeypatch, place, value
):
    name = "_".join(("TILEWRIGHT", *place)).upper()
    monkeypatch.setenv(name, value)
    assert f"error: {name}: " in told(capsys, "generate")


@pytest.mark.parametrize(("section", "key"), SETTINGS)
def test_a_misspelt_variable_is_an_error_with_a_suggestion(capsys, monkeypatch, section, key):
    name = f"TILEWRIGHT_{section}_{key}".upper()
    wrong = misspelt(name)
    monkeypatch.setenv(wrong, "1")
    assert f"error: {wrong}: no such setting; did you mean {name!r}" in told(capsys, "generate")


# --- in a new process -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "stdin", "message"),
    [
        (["generate", "-"], b"\xff", "standard input: expected UTF-8, found byte 0xff"),
        (["generate", "-"], b"", "the prompt is empty"),
        (["generate", "--prompt-file", "-"], b"\n", "the prompt is empty"),
        (["generate", b"\xff"], b"", "PROMPT: the prompt is not valid UTF-8"),
        (["run", "/dev/zero"], b"", "larger than 64 MiB"),
    ],
    ids=range(5),
)
def test_wrong_input_of_a_process_is_a_one_line_error(argv, stdin, message):
    command = [sys.executable, "-m", "tilewright", *argv]
    done = subprocess.run(command, input=stdin, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr.count(b"\n")) == (2, b"", 1), done.stderr
    assert message in done.stderr.decode()


@pytest.mark.parametrize(
    ("redirection", "message"),
    [
        (">&-", "standard output is closed"),
        ("<&-", "standard input is closed"),
    ],
)
def test_a_closed_standard_stream_is_a_one_line_error(redirection, message):
    command = f"exec '{sys.executable}' -m tilewright generate - {redirection}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, timeout=60)
    assert (done.returncode, done.stderr.count(b"\n")) == (2, 1), done.stderr
    assert message in done.stderr.decode()


@pytest.mark.parametrize(
    ("flags", "unbuffered", "output"),
    [
        ([], "", "standard output"),
        (["--json"], "1", "standard output"),
        (["--output", "/dev/full"], "", "output file '/dev/full'"),
    ],
)
def test_output_for_which_there_is_no_space_is_a_one_line_error(flags, unbuffered, output):
    command = [sys.executable, "-m", "tilewright", "generate", "We", "--max-new-tokens", "2"]
    environ = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*command, *flags], stdout=full, stderr=subprocess.PIPE, env=environ, timeout=60
        )
    assert done.returncode == 2
    assert done.stderr.decode() == (
        f"tilewright: error: {output} cannot be written: No space left on device\n"
    )


@pytest.mark.parametrize("argv", [("chat", "-n", "2"), ("plugins", "list")])
def test_each_command_names_an_output_without_space(argv, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"We\n")))
    with open("/dev/full", "w", 1) as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main([*argv]) == 2
        monkeypatch.undo()
        with suppress(OSError):
            full.close()
    said = "tilewright: error: standard output cannot be written: No space left on device\n"
    assert capsys.readouterr().err.endswith(said)


def test_debug_prints_the_traceback_of_an_error(capsys):
    assert main(["generate", "--page-size", "x", "--debug"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert err.endswith(
        "tilewright: error: --page-size: 'page_size' must be an integer or none, found 'x'\n"
    )
