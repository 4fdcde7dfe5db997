"""A chat: commands and messages, sessions, and what it says beside the answers."""

import io
import json
import os
import re
import sys
from pathlib import Path

import pytest
from attrs import evolve
from terminal import Terminal

from tilewright import GenerateConfig, LLMEngine
from tilewright.settings import DEMO_MODEL
from tilewright.text import Text

FOUR = ["--max-new-tokens", "4"]
HI = {"role": "user", "content": "How does the Declaration begin?"}


@pytest.fixture(autouse=True)
def _in_an_empty_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def engine():
    with LLMEngine.from_plugins() as engine:
        engine.init_model("demo", DEMO_MODEL)
        yield engine


@pytest.fixture
def chat(tilewright, monkeypatch):
    """A chat with these lines on standard input; returns what ``tilewright`` does."""

    def call(text: str | bytes, *argv: str) -> tuple[int, str, str]:
        data = text.encode() if isinstance(text, str) else text
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        return tilewright("chat", *FOUR, *argv)

    return call


def said(path: str) -> list[str]:
    """What the user said in a session, which is held to be well formed."""
    messages = json.loads(Path(path).read_text())["messages"]
    rest = messages[1:] if messages and messages[0]["role"] == "system" else messages
    assert [m["role"] for m in rest] == ["user", "assistant"] * (len(rest) // 2)
    return [m["content"] for m in messages if m["role"] == "user"]


# --- messages and commands ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("/etc/hosts says what?\n", ["/etc/hosts says what?"]),
        ("/rest\n/quiet\n/\n", ["/rest", "/quiet", "/"]),
        ("//reset\n//etc is what?\n", ["/reset", "/etc is what?"]),
        ("one\n/reset\ntwo\n/quit\nthree", ["two"]),
        ("/reset what?\n/help me\n", ["/reset what?", "/help me"]),
        ("one\n/system Be brief.\ntwo\n", ["two"]),
        (b"\xef\xbb\xbfone\r\n\r\ntwo", ["one", "two"]),
        ('"""one\n', ['"""one']),
    ],
)
def test_a_line_of_a_pipe_is_a_message_unless_it_is_a_command(chat, text, messages):
    code, _, err = chat(text, "--session", "s.json")
    assert code == 0, err
    assert said("s.json") == messages


def test_a_terminal_has_blocks_hints_and_a_session_that_ctrl_c_keeps(tmp_path):
    session = tmp_path / "s.json"
    terminal = Terminal("chat", "--ignore-eos", "-n", "100000", "--session", str(session))
    terminal.wait_for(b"> ")
    terminal.type(b"/hepl\n")
    terminal.wait_for(b"did you mean '/help'? (see /help); //hepl sends it as a message")
    terminal.wait_for(b"> ")
    terminal.type(b"/reset it\n")
    terminal.wait_for(b"expected /reset alone, found more after it; //reset sends it as a message")
    terminal.wait_for(b"> ")
    terminal.type(b'"""How does\n')
    terminal.wait_for(b"... ")
    terminal.type(b"/quit\n")
    terminal.wait_for(b"... ")
    terminal.type(b'the Declaration begin?"""\n')
    terminal.wait_for(b"When in the")
    terminal.interrupt()
    terminal.wait_for(b"> ")
    terminal.type(b"/quit\n")
    assert terminal.end() == 0
    assert b"Traceback" not in terminal.screen
    assert said(session) == ["How does\n/quit\nthe Declaration begin?"]
    assert json.loads(session.read_text())["messages"][1]["content"].startswith("When in")


class Keyboard(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


def test_a_chat_that_is_typed_and_printed_to_a_pipe_goes_on_after_a_mistake(
    tilewright, monkeypatch, engine
):
    """As ``tilewright chat | tee FILE``: the prompts and hints are not part of the output."""
    typed = f"/hepl\n{HI['content']}\n".encode()
    monkeypatch.setattr(sys, "stdin", Keyboard(io.BytesIO(typed)))
    code, out, err = tilewright("chat", *FOUR)
    answer = engine.chat("demo", [HI], GenerateConfig(max_new_tokens=4))
    assert (code, out) == (0, f"{answer}\n")
    assert "> error: no command is named '/hepl'; did you mean '/help'?" in err


# --- sessions -------------------------------------------------------------------------------------


def test_a_session_is_resumed_where_it_ended(chat, engine):
    system = {"role": "system", "content": "Be brief."}
    question = {"role": "user", "content": "And then?"}
    flags = ["--session", "s.json", "--system", "Be brief."]
    code, first, _ = chat(f"{HI['content']}\n", *flags)
    code, second, _ = chat("And then?\n", *flags)
    assert code == 0
    assert os.listdir() == ["s.json"]
    messages, settings = [system, HI], GenerateConfig(max_new_tokens=4)
    for out in (first, second):
        answer = engine.chat("demo", messages, settings)
        assert out == f"{answer}\n"
        messages += [{"role": "assistant", "content": answer}, question]
    assert json.loads(Path("s.json").read_text()) == {"messages": messages[:-1]}
    assert chat("/reset\n", "--session", "s.json")[0] == 0
    assert json.loads(Path("s.json").read_text()) == {"messages": []}


def test_a_conversation_that_fills_the_context_says_how_to_begin_a_new_one(chat, engine):
    prompt = len(engine.chat_tokens("demo", [HI]))
    flags = ["--max-seq-len", str(prompt + 2), "--session", "s.json"]
    code, _, err = chat(f"{HI['content']}\nAnd then?\n", *flags)
    full, refused = err.splitlines()
    assert code == 2
    assert full == (
        f"note: stopped after 2 tokens, since the conversation has {prompt + 2}, all that "
        "max_seq_len allows; /reset begins a new one"
    )
    assert refused.endswith(", or begin a new conversation with /reset")
    assert said("s.json") == [HI["content"]]


def test_a_message_with_an_empty_answer_is_kept(chat, engine):
    answer = engine.chat("demo", [HI], GenerateConfig(max_new_tokens=4))
    code, out, _ = chat(f"{HI['content']}\n", "--session", "s.json", "--stop", answer[:3])
    assert (code, out) == (0, "\n")
    empty = {"role": "assistant", "content": ""}
    assert json.loads(Path("s.json").read_text()) == {"messages": [HI, empty]}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "invalid JSON"),
        ("[]", 'expected a JSON object with "messages" and nothing else'),
        ('{"messages": [], "model": "x"}', 'expected a JSON object with "messages" and nothing'),
        ('{"messages": {}}', "expected a list of messages"),
        ('{"messages": [{"content": "x"}]}', "chat message 0: expected an object with a role"),
        (
            '{"messages": [{"role": "user", "content": 7}]}',
            "chat message 0: 'content' must be text",
        ),
        (
            '{"messages": [{"role": "user", "content": "x", "name": "\\ud800"}]}',
            "expected text that is valid Unicode",
        ),
    ],
)
def test_a_file_that_is_not_a_session_is_refused_and_not_touched(chat, text, why):
    Path("s.json").write_text(text)
    code, out, err = chat("hi\n", "--session", "s.json", "--model", "no/such/model")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(
        "tilewright: error: --session: 's.json' is not a session of tilewright chat, and is left "
        f"as it is: {why}"
    )
    assert Path("s.json").read_text() == text


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("-", "'-' cannot be written: expected the name of a file"),
        ("no/where.json", "'no/where.json' cannot be written: expected the name of a file"),
        (".", "'.' is not a file"),
    ],
)
def test_a_session_that_cannot_be_kept_is_refused_before_a_model_is_loaded(chat, path, why):
    code, _, err = chat("hi\n", "--session", path, "--model", "no/such/model")
    assert (code, err.count("\n")) == (2, 1)
    assert why in err


def test_a_session_in_the_home_directory_may_be_named_by_a_flag_with_an_equals_sign(
    chat, monkeypatch, tmp_path
):
    monkeypatch.setenv("HOME", str(tmp_path))
    code, _, err = chat("hi\n", "--session=~/s.json")
    assert code == 0, err
    assert said(tmp_path / "s.json") == ["hi"]


def test_another_system_message_than_that_of_the_session_is_refused(chat, monkeypatch):
    chat("hi\n", "--session", "s.json", "--system", "Be brief.")
    before = Path("s.json").read_text()
    code, _, err = chat("hi\n", "--session", "s.json", "--system", "Be long.")
    assert code == 2
    assert "--system: the session has begun with another system message" in err
    assert Path("s.json").read_text() == before
    monkeypatch.setenv("TILEWRIGHT_CHAT_SYSTEM", "Be long.")
    assert chat("hi\n", "--session", "s.json")[0] == 0
    assert said("s.json") == ["hi", "hi"]


# --- beside the answers ---------------------------------------------------------------------------


def test_a_chat_prints_log_probabilities_after_each_answer(chat):
    _, out, err = chat("hi\nhi\n", "--logprobs", "1")
    tokens = re.findall(r'^(".*"): -?\d', err, re.MULTILINE)
    assert "".join(map(json.loads, tokens)) == out.replace("\n", "")


@pytest.mark.parametrize("argv", [["generate", "--chat", "hi"], ["chat"]])
def test_tokens_that_end_an_answer_in_a_chat_are_named_once(tilewright, monkeypatch, argv):
    made = Text.__init__

    def with_ends(self, assets):
        made(self, evolve(assets, turn_end_ids=(1997, 1996)))

    monkeypatch.setattr(Text, "__init__", with_ends)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hi\nhi\n")))
    note = "note: in a chat, <|im_start|> and <|endoftext|> also end an answer\n"
    code, _, err = tilewright(*argv, *FOUR)
    assert (code, err.count(note)) == (0, 1)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hi\n")))
    assert note not in tilewright(*argv, *FOUR, "--ignore-eos")[2]
    assert note not in tilewright("generate", "hi", *FOUR)[2]
