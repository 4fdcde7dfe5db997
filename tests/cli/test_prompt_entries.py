"""Prompts as users write them: pipes, files with settings and conversations, and short flags."""

import io
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from tilewright import GenerateConfig, LLMEngine, RuntimeConfig, plugins
from tilewright.chat import Chat
from tilewright.cli import add_arguments, prompts
from tilewright.cli.parser import Parser, option_strings
from tilewright.settings import DEMO_MODEL, DEMO_PROMPT

TWO = ["--max-new-tokens", "2"]
BOM = b"\xef\xbb\xbf"
TEMPLATE = """\
{%- if tools -%}{{ '<|im_start|>tools\\n' + tools | tojson + '<|im_end|>\\n' }}{%- endif -%}
{%- for m in messages -%}
{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}
{%- if mood is defined -%}{{ mood }}{%- endif -%}
{%- endif -%}
"""
TOOLS = [{"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}]
HI = {"role": "user", "content": "When was the war?"}


@pytest.fixture(autouse=True)
def _in_an_empty_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The bundled model with a chat template that reads tools and a variable."""
    path = tmp_path_factory.mktemp("models") / "templated"
    shutil.copytree(DEMO_MODEL, path)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


@pytest.fixture(scope="module")
def engine(model):
    """In float32, in which a prompt alone draws the tokens that it draws in a batch."""
    with LLMEngine.from_plugins() as engine:
        engine.init_model("m", model, RuntimeConfig(weight_dtype="float32"))
        yield engine


@pytest.fixture
def records(tilewright):
    """Runs a command that succeeds with --json; returns its records."""

    def call(*argv: str) -> list[dict]:
        code, out, err = tilewright(*argv, "--json")
        assert code == 0, err
        return [json.loads(line) for line in out.splitlines()]

    return call


@pytest.fixture
def refused(tilewright):
    """Runs a command that is refused before a model is loaded; returns the line that says why."""

    def call(*argv: str) -> str:
        code, out, err = tilewright("generate", "--model", "no/such/model", *argv)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        return err.removeprefix("tilewright: error: ").rstrip("\n")

    return call


def stdin_from(monkeypatch, data: bytes) -> None:
    Path("stdin").write_bytes(data)
    monkeypatch.setattr(sys, "stdin", open("stdin"))  # noqa: SIM115


# --- standard input -------------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [[], ["-"], ["--prompt-file", "-"]])
@pytest.mark.parametrize("data", [b"We the", BOM + b"We the\r\n", BOM + b"We the\n"])
def test_a_prompt_is_read_from_standard_input_without_byte_order_mark(
    records, monkeypatch, data, argv
):
    stdin_from(monkeypatch, data)
    assert records("generate", *argv, *TWO)[0]["prompt"] == "We the"


def test_text_in_utf16_is_named(tilewright, monkeypatch):
    said = "expected UTF-8, found UTF-16, as PowerShell writes it: save it as UTF-8\n"
    for argv, where in (
        (["generate", "-"], "standard input"),
        (["chat"], "standard input, line 1"),
        (["generate", "--prompt-file", "stdin"], "--prompt-file: prompt file 'stdin', line 1"),
        (["run", "stdin"], "run file 'stdin', line 1"),
    ):
        stdin_from(monkeypatch, "We the".encode("utf-16"))
        assert tilewright(*argv) == (2, "", f"tilewright: error: {where}: {said}")


def test_a_prompt_that_is_given_leaves_standard_input_alone(records, monkeypatch):
    stdin_from(monkeypatch, b"from the pipe")
    Path("run.toml").write_text('[prompts]\ntext = "of the file"\n')
    for argv, prompt in (
        (["generate", "given"], "given"),
        (["generate", "-p", "given"], "given"),
        (["run", "run.toml"], "of the file"),
    ):
        assert [r["prompt"] for r in records(*argv, *TWO)] == [prompt]
    assert sys.stdin.read() == "from the pipe"
    Path("empty.toml").write_text("")
    sys.stdin.seek(0)
    assert records("run", "empty.toml", *TWO)[0]["prompt"] == "from the pipe"


@pytest.mark.parametrize("kind", ["empty file", "null device", "closed", "no file"])
def test_standard_input_without_text_leaves_the_demo_model_its_prompt(records, monkeypatch, kind):
    if kind == "empty file":
        stdin_from(monkeypatch, b"")
    elif kind == "null device":
        monkeypatch.setattr(sys, "stdin", open(os.devnull))  # noqa: SIM115
    else:
        monkeypatch.setattr(sys, "stdin", None if kind == "closed" else io.StringIO("x"))
    assert records("generate", *TWO)[0]["prompt"] == DEMO_PROMPT


def test_a_pipe_to_which_nobody_writes_is_not_waited_for(tilewright, monkeypatch, model):
    read, write = os.pipe()
    monkeypatch.setattr(sys, "stdin", open(read))  # noqa: SIM115
    monkeypatch.setattr(prompts, "_SECONDS_WITH_A_PROMPT", 0.01)
    monkeypatch.setattr(prompts, "_SECONDS_WITHOUT", 0.02)
    code, _, err = tilewright("generate", *TWO)
    assert (code, err) == (0, f"prompt: {DEMO_PROMPT}\n")
    code, _, err = tilewright("generate", "--model", str(model), *TWO)
    note, error = err.splitlines()
    assert code == 2
    assert note.startswith("note: waiting up to 0 s for a prompt on standard input")
    assert error.startswith("tilewright: error: no prompt is given: expected a prompt")
    os.write(write, b"We the")
    os.close(write)
    code, out, _ = tilewright("generate", *TWO, "--json")
    assert json.loads(out)["prompt"] == "We the"


# --- settings of one prompt -----------------------------------------------------------------------

LINES = [
    {"prompt": "We the", "max_new_tokens": 3, "id": 7},
    {"id": {"a": None}, "prompt": "No person", "temperature": 2.0, "seed": 5, "n": 2},
    "Congress\u2028shall",
    {"prompt": "We the", "stop": "[", "logit_bias": {"265": -1e9}, "seed": None, "id": "x"},
    {"prompt": "We the", "logits_processors": {"choice": ["yes", "no"]}},
]


def test_settings_of_a_line_replace_those_of_the_run(records, engine):
    Path("p.jsonl").write_bytes(BOM + "\r\n".join(map(json.dumps, LINES)).encode())
    run = GenerateConfig(max_new_tokens=4, temperature=3.0, seed=100)
    found = records(
        *["generate", "--prompt-file", "p.jsonl", "--max-new-tokens", "4"],
        *["--temperature", "3", "--seed", "100", "--weight-dtype", "float32"],
    )
    alone = [
        ("We the", GenerateConfig(max_new_tokens=3, seed=100)),
        ("No person", GenerateConfig(temperature=2.0, seed=5)),
        ("No person", GenerateConfig(temperature=2.0, seed=6)),
        ("Congress\u2028shall", GenerateConfig(seed=103)),
        ("We the", GenerateConfig(seed=104, stop=("[",), logit_bias={265: -1e9})),
        ("We the", GenerateConfig(seed=105, logits_processors={"choice": ["yes", "no"]})),
    ]
    for record, (prompt, config) in zip(found, alone, strict=True):
        expected = engine.generate_result("m", prompt, config.over(run))
        assert record["prompt"] == prompt
        assert record["token_ids"] == list(expected.token_ids)
        assert record["seed"] == config.seed
    assert [record.get("id", ...) for record in found] == [
        7,
        *[{"a": None}] * 2,
        ...,
        "x",
        ...,
    ]


def test_the_only_line_of_a_file_is_named_too(tilewright):
    Path("p.jsonl").write_text('{"prompt": "We", "stop_token_ids": [99999]}')
    _, _, err = tilewright("generate", "--prompt-file", "p.jsonl", "--stop-token-ids", "1")
    assert err.startswith("tilewright: error: p.jsonl:1: token id 99999 in stop_token_ids is")


def test_a_json_file_is_a_list_of_what_lines_may_be(records):
    lines = [json.dumps(line, ensure_ascii=False) for line in LINES]
    Path("p.jsonl").write_text("\n".join(lines))
    Path("p.json").write_text(json.dumps(LINES, indent=1))
    Path("run.toml").write_text('[prompts]\nfile = "p.json"\n[generate]\nseed = 1\n')
    one = records("generate", "--prompt-file", "p.jsonl", "--seed", "1", *TWO)
    other = records("run", "run.toml", *TWO)
    assert [(r["prompt"], r["token_ids"]) for r in one] == [
        (r["prompt"], r["token_ids"]) for r in other
    ]


def test_a_line_whose_settings_the_model_cannot_serve_fails_alone(tilewright):
    Path("p.jsonl").write_text('{"prompt": "We", "stop_token_ids": [99999], "n": 2}\n"No"\n')
    code, out, err = tilewright("generate", "--prompt-file", "p.jsonl", *TWO, "--json")
    *bad, good = map(json.loads, out.splitlines())
    assert code == 2
    assert [record["finish_reason"] for record in (*bad, good)] == ["error", "error", "length"]
    assert err.startswith("tilewright: error: prompt 1 of 2: p.jsonl:1: token id 99999 in stop_")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"prompt": "x", "max_tokens": 3}, "unknown key 'max_tokens'; did you mean 'max_new_"),
        ({"promt": "x"}, "unknown key 'promt'; did you mean 'prompt'?"),
        ({"prompt": "x", "stream": True}, "unknown key 'stream'"),
        (
            {"custom_id": "1", "body": {"messages": [HI]}},
            "expected a prompt, found a line of an OpenAI batch",
        ),
        ({"prompt": "x", "temperature": -1}, "'temperature' must be >= 0.0: -1.0"),
        ({"prompt": "x", "seed": [1]}, "'seed' must be an integer or none, found [1]"),
        ({"prompt": "x", "stop": ["a", ""]}, "'stop' must be a list of strings of at least one"),
        ({"prompt": "x", "min_new_tokens": 9}, "'min_new_tokens' must be <= max_new_tokens = 2"),
        ({"prompt": "x", "logits_processors": {"no": 1}}, "no logits processor is named 'no'"),
        ({}, 'expected either "prompt" or "messages", found neither'),
        ({"prompt": "x", "messages": [HI]}, 'expected either "prompt" or "messages", found both'),
        ({"prompt": 3}, 'expected a string as "prompt", found 3'),
        ({"prompt": "x", "tools": TOOLS}, "'tools' is for conversations: give \"messages\""),
        ({"messages": []}, "expected a list of messages such as"),
        ({"messages": HI}, "expected a list of messages such as"),
        ({"messages": [HI, {"content": "x"}]}, "chat message 1: expected an object with a role"),
        ({"messages": [HI], "tools": {}}, "expected a JSON list of tools"),
        ({"messages": [HI], "continue_last": 1}, 'expected true or false as "continue_last"'),
        ({"messages": [HI], "template_options": []}, 'expected an object as "template_options"'),
        ({"prompt": ""}, "prompt 2 of 2 is empty"),
        ({"prompt": "x", "id": "\ud800"}, "prompt 2 of 2 is not valid UTF-8"),
        ({"messages": [HI | {"content": "\ud800"}]}, "prompt 2 of 2 is not valid UTF-8"),
    ],
)
def test_a_wrong_line_is_refused_before_a_model_is_loaded(refused, line, said):
    Path("p.jsonl").write_text('"good"\n' + json.dumps(line) + "\n")
    assert refused("--prompt-file", "p.jsonl", *TWO).startswith(f"p.jsonl:2: {said}")
    Path("p.json").write_text(json.dumps(["good", line]))
    assert refused("--prompt-file", "p.json", *TWO).startswith(f"p.json: item 2: {said}")


def test_a_json_file_that_is_not_a_list_is_refused_with_what_to_write(refused):
    Path("p.json").write_text('{"prompt": "x"}')
    assert refused("--prompt-file", "p.json") == (
        "p.json: expected a JSON list of prompts, found {'prompt': 'x'}: to continue the file's "
        "own text, write --prompt-file - < p.json"
    )


@pytest.mark.parametrize("line", [{"messages": [HI]}, {"prompt": "x", "seed": 1}])
def test_a_command_that_takes_texts_alone_refuses_other_lines(tilewright, line):
    Path("p.jsonl").write_text(json.dumps(line))
    code, _, err = tilewright("compare", "--candidate", "torch", "--prompt-file", "p.jsonl")
    assert code == 2
    assert "p.jsonl:1: expected a prompt alone, found messages or settings" in err


# --- conversations --------------------------------------------------------------------------------


def test_conversations_have_the_tokens_that_transformers_makes(records, model, monkeypatch):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)

    def ids(messages, add_generation_prompt=True, **more):
        more["add_generation_prompt"] = add_generation_prompt
        made = tokenizer.apply_chat_template(messages, **more)
        return list(made["input_ids"])

    system, own = ({"role": "system", "content": text} for text in ("Be brief.", "Be long."))
    begun = {"role": "assistant", "content": "Well"}
    lines = [
        {"messages": [HI]},
        {"messages": [own, HI], "template_options": {"mood": "cross"}, "id": 1},
        {"messages": [HI], "tools": [TOOLS[0] | {"type": "other"}]},
        {"prompt": HI["content"]},
        {"messages": [own, HI, begun], "continue_last": True},
    ]
    Path("p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    Path("tools.json").write_text(json.dumps(TOOLS))
    monkeypatch.setenv("HOME", os.getcwd())
    Path("run.toml").write_text(
        f'[model]\npath = "{model}"\n[prompts]\nfile = "p.jsonl"\nchat = true\n[chat]\n'
        'system = "Be brief."\ntools = "tools.json"\ntemplate_options = { mood = "glad" }\n'
    )
    chat = ["--chat", "--system", "Be brief.", "--tools=~/tools.json"]
    flags = ["--model", str(model), *chat, "--template-option", "mood=glad"]
    expected = [
        ids([system, HI], tools=TOOLS, mood="glad"),
        ids([own, HI], tools=TOOLS, mood="cross"),
        ids([system, HI], tools=lines[2]["tools"], mood="glad"),
        ids([system, HI], tools=TOOLS, mood="glad"),
        ids([own, HI, begun], False, tools=TOOLS, mood="glad", continue_final_message=True),
    ]
    for argv in (["run", "run.toml"], ["generate", "--prompt-file", "p.jsonl", *flags]):
        found = records(*argv, *TWO)
        assert [record["prompt_token_ids"] for record in found] == expected
        assert [record["messages"] for record in found[:2]] == [[system, HI], [own, HI]]
        assert found[1]["id"] == 1
    (one,) = records("generate", HI["content"], *flags, *TWO)
    assert one["prompt_token_ids"] == expected[0]


def test_a_question_is_answered_and_streamed(tilewright, engine, model):
    settings = GenerateConfig(max_new_tokens=6)
    answer = engine.generate("m", Chat([HI], {"mood": 7}), settings)
    argv = ["--model", str(model), "-n", "6", "--chat", "--template-option", "mood=7"]
    assert tilewright("generate", *argv, HI["content"])[1] == f"{answer}\n"


THOUGHT = "<think>\nWell.\n</think>\n\nYes."


@pytest.mark.parametrize(
    ("command", "opened"), [("generate", False), ("generate", True), ("run", True), ("chat", False)]
)
def test_thinking_is_hidden_on_request(tilewright, monkeypatch, engine, model, command, opened):
    """The model's text is chosen: one that thinks, in a template that may open the thinking."""
    template = TEMPLATE.replace("{%- if mood", "{{ '<think>' }}{%- if mood") if opened else TEMPLATE
    shutil.copytree(model, "thinker")
    Path("thinker/chat_template.jinja").write_text(template)
    text = THOUGHT.removeprefix("<think>") if opened else THOUGHT
    ids = engine.model("m").text.encode(text)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hi\n")))
    bias = [f"--logits-processor=choice={json.dumps([text])}", "-n", str(len(ids) + 9)]
    Path("run.toml").write_text('[prompts]\ntext = "hi"\nchat = true\n')
    argv = {"generate": ["--chat", "hi"], "run": ["run.toml"], "chat": []}[command]
    argv = [command, *argv, "--model", "thinker", *bias]
    assert tilewright(*argv)[1] == f"{text}\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hi\n")))
    more = ["--session", "s.json"] if command == "chat" else []
    assert tilewright(*argv, "--hide-thinking", *more)[1] == "Yes.\n"
    if command == "chat":
        assert json.loads(Path("s.json").read_text())["messages"][-1]["content"] == "Yes."
    else:
        record = json.loads(tilewright(*argv, "--hide-thinking", "--json")[1])
        assert record["text"] == "Yes."
        assert engine.model("m").text.decode(record["token_ids"]) == text
        few = len(engine.model("m").text.encode(text.partition("</think>")[0]))
        code, out, err = tilewright(*argv, "--hide-thinking", "-n", str(few))
        assert (code, out) == (0, "\n")
        assert f"note: all {few} tokens are thinking, which is hidden; --max-new-tokens N" in err


def test_settings_of_conversations_come_from_the_environment(records, monkeypatch, model):
    monkeypatch.setenv("TILEWRIGHT_CHAT_SYSTEM", "Be brief.")
    monkeypatch.setenv("TILEWRIGHT_CHAT_TEMPLATE_OPTIONS", '{"mood": "glad"}')
    assert records("generate", "We the", *TWO)[0]["prompt"] == "We the"
    (one,) = records("generate", "--model", str(model), "--chat", "We the", *TWO)
    assert [message["content"] for message in one["messages"]] == ["Be brief.", "We the"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--system", "x", "We"], "--system: system is for conversations, and every prompt is"),
        (["--hide-thinking", "We"], "--hide-thinking: hide_thinking is for conversations"),
        (["--chat", "--template-option", "x", "We"], "--template-option: expected KEY=VALUE"),
        (["--chat", "--tools", "no.json", "We"], "--tools: tools file 'no.json' cannot be read"),
        (["--chat", "--tools", "t.json", "We"], "t.json: expected a JSON list of tools, such as"),
        (["--chat", ""], "PROMPT: the prompt is empty"),
    ],
)
def test_wrong_settings_of_conversations_are_refused(refused, argv, said):
    Path("t.json").write_text('["clock"]')
    assert refused(*argv).startswith(said)


# --- flags, messages and log-probabilities --------------------------------------------------------


def test_short_flags_mean_what_the_long_ones_mean(records):
    long = ["generate", "--model", str(DEMO_MODEL), "--max-new-tokens", "3", "--prompt", "We the"]
    short = ["generate", "-m", str(DEMO_MODEL), "-n", "3", "-p", "We the"]
    (one,), (other,), (third,) = records(*long), records(*short), records(*short[:-2], "We the")
    assert one["token_ids"] == other["token_ids"] == third["token_ids"]
    assert [r["prompt"] for r in records("generate", "-p", "a", "-p", "b", "-n1")] == ["a", "b"]


@pytest.mark.parametrize("command", [plugin.name for plugin in plugins.installed("command")])
def test_each_command_with_a_long_flag_has_its_short_form(command):
    parser = Parser()
    add_arguments(parser, plugins.load(plugins.find("command", command)))
    options = option_strings(parser)
    for long, short in (("--model", "-m"), ("--max-new-tokens", "-n"), ("--prompt", "-p")):
        assert (long in options) == (short in options), (command, long)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--stop", ""], "--stop: 'stop' must be a list of strings of at least one character"),
        (["--min-new-tokens", "9", "-n", "8"], "--min-new-tokens: 'min_new_tokens' must be <= max"),
        (["--min-new-tokens", "999"], "--min-new-tokens: 'min_new_tokens' must be <= max_new_"),
        (["--logits-processor", "choice=["], "--logits-processor: choice: expected a list of str"),
        (["--logit-bias", "99999=1"], "--logit-bias: token id 99999 in logit_bias is outside"),
        (["--stop-token-ids", "99999"], "--stop-token-ids: token id 99999 in stop_token_ids is"),
        (["--template-option", "thnk=1"], "--template-option: the chat template reads no variable"),
        (["--tools", "tools.json"], "--tools: the chat template does not read 'tools'"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "generate --json", "chat"])
def test_a_setting_that_is_refused_names_its_flag(tilewright, monkeypatch, command, argv, said):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hi")))
    Path("tools.json").write_text(json.dumps(TOOLS))
    prompt = [] if command == "chat" else ["hi", "--chat"]
    code, _, err = tilewright(*command.split(), *prompt, *argv)
    assert code == 2
    assert re.fullmatch(r"tilewright: error: (prompt 1 of 1: )?(.*)\n", err)[2].startswith(said)


def test_a_refused_prompt_has_the_seed_that_it_was_to_be_sampled_with(tilewright):
    argv = ["generate", "a " * 3000, "--json", *TWO]
    drawn = [json.loads(tilewright(*argv)[1])["seed"] for _ in range(2)]
    assert len({0, *drawn}) == 3
    assert json.loads(tilewright(*argv, "--seed", "7")[1])["seed"] == 7


@pytest.mark.parametrize("argv", [["We the"], ["-p", "We the", "-p", "No"]])
def test_log_probabilities_are_printed_after_the_text(tilewright, argv):
    flags = ["--logprobs", "2", "--prompt-logprobs", "0", "-n", "3"]
    _, out, err = tilewright("generate", *argv, *flags)
    assert out == tilewright("generate", *argv, "-n", "3")[1]
    records = map(json.loads, tilewright("generate", *argv, *flags, "--json")[1].splitlines())
    printed = re.findall(r'^(".*"): (-?\d+\.\d+|none)(?:; (.*))?', err, re.MULTILINE)
    expected, text = [], ""
    for record in records:
        text += record["prompt"] + record["text"]
        for token in (*record["prompt_logprobs"], *record["logprobs"]):
            expected.append(f"{token['logprob']:.4f}" if token else "none")
    assert [number for _, number, _ in printed] == expected
    assert "".join(json.loads(quoted) for quoted, _, _ in printed) == text
    assert all(len(top.split('", "')) <= 2 for _, _, top in printed)


def test_what_is_special_in_a_token_is_escaped(tilewright, monkeypatch):
    argv = ["generate", "--chat", "hi", "--logit-bias", "1996=1e9", "--logprobs", "0", "-n", "1"]
    assert '"<|endoftext|>": ' in tilewright(*argv)[2]
    assert '"\\n": ' in tilewright("generate", "a\nb", "--prompt-logprobs", "0", "-n1")[2]
