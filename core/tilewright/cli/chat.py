"""Chat with a model.

A conversation on a terminal, or one message per line from a pipe.
"""

import argparse
import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import define, evolve, field

from tilewright.chat import Chat, Message, plain_messages
from tilewright.cli import INTERRUPTED, flags
from tilewright.cli.answers import note_logprobs, print_stream, thinking_splitter
from tilewright.cli.output import note, opened, warn_sanitized
from tilewright.cli.prompts import checked_messages, common_chat, parsed_json
from tilewright.cli.session import naming_settings, note_turn_ends, open_engine
from tilewright.config import ENVIRONMENT_PREFIX, Resolved, resolve
from tilewright.errors import ConfigError, RequestError, TilewrightError, nearest
from tilewright.paths import path_of
from tilewright.settings import not_utf8, read_text

if TYPE_CHECKING:
    from tilewright.engine import LLMEngine

tilewright_api = 2

_WORDS = {
    "/reset": "forget the conversation",
    "/system TEXT": "start a new conversation with this system message",
    "/quit": "end the chat, like Ctrl-D",
    "/help": "show this list",
}
_KNOWN = [usage.partition(" ")[0] for usage in _WORDS]
_BLOCK = '"""'
_FORMS = {
    "//TEXT": "send a message that begins with one slash",
    _BLOCK: f"begin a message of several lines, which ends at the next {_BLOCK}",
}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.usage = "tilewright chat [options]"
    parser.description = (
        f"Chat with a model. Ctrl-C stops an answer. A line may also be {', '.join(_WORDS)}; "
        "//TEXT sends a message that begins with one slash, and on a terminal "
        f"{_BLOCK} begins and ends a message of several lines. Without a terminal, each line of "
        "standard input is a message, also one that begins with a slash, unless it is one of "
        "these commands."
    )
    parser.add_argument(
        "--session",
        metavar="FILE",
        help="keep the conversation in this file, in JSON, and go on with it if the file exists",
    )
    flags.add_chat_flags(parser)
    flags.add_generate_flags(parser)
    flags.add_engine_flags(parser)


def run(args: argparse.Namespace) -> int:
    if sys.stdin is None:
        raise RequestError("standard input is closed: expected messages there")
    resolved = resolve(flags=flags.layer(args))
    if (n := resolved.config.generate.n) not in (None, 1):
        raise ConfigError(
            f"{resolved.origin('generate', 'n')}: expected n = 1, since a chat has one answer to "
            f"each message, found n = {n}"
        )
    common = common_chat(resolved)
    messages = list(common.messages)
    session = None if args.session is None else str(path_of(args.session))
    if session is not None and (saved := _saved(session)):
        _check_system(saved, resolved)
        messages = saved
    with open_engine(resolved) as engine:
        note_turn_ends(engine, resolved)
        conversation = Conversation(engine, resolved, common, session, messages)
        if sys.stdin.isatty():
            return _talk(conversation)
        _read_messages(conversation)
    return 0


def _saved(path: str) -> list[Message]:
    """The messages of a session file; none if it does not exist.

    Raises ConfigError for a file that is not a session, and where none can be written.
    """
    folder = os.path.dirname(os.path.realpath(path))
    if path == "-" or not os.access(folder, os.W_OK):
        raise ConfigError(
            f"--session: session file {path!r} cannot be written: expected the name of a file in a "
            "folder in which you may write"
        )
    if not os.path.exists(path):
        return []
    if not os.path.isfile(path):
        raise ConfigError(
            f"--session: {path!r} is not a file: expected a session of tilewright chat"
        )
    text = read_text(Path(path), "--session: session file")
    wrong = f"--session: {path!r} is not a session of tilewright chat, and is left as it is"
    value = parsed_json(text, wrong)
    if not isinstance(value, dict) or set(value) != {"messages"}:
        raise ConfigError(f'{wrong}: expected a JSON object with "messages" and nothing else')
    messages = checked_messages(value["messages"], wrong, at_least=0)
    try:
        if messages:
            plain_messages(messages)
        json.dumps(messages, ensure_ascii=False).encode()  # as it will be written
    except RequestError as error:
        raise ConfigError(f"{wrong}: {error}") from error
    except (UnicodeError, RecursionError) as error:
        raise ConfigError(f"{wrong}: expected text that is valid Unicode: {error}") from error
    return [*messages]


def _check_system(saved: list[Message], resolved: Resolved) -> None:
    """Raise ConfigError if a flag sets another system message than the session has.

    That of the environment is for new conversations alone.
    """
    system, origin = resolved.config.chat.system, resolved.origin("chat", "system")
    if not system or origin.startswith(ENVIRONMENT_PREFIX):
        return
    if saved[0] != {"role": "system", "content": system}:
        raise ConfigError(
            f"{origin}: the session has begun with another system message, or with none: omit "
            "the flag, or name a new session file"
        )


@define
class Conversation:
    """The messages so far, and the engine that answers them."""

    engine: "LLMEngine"
    resolved: Resolved
    common: Chat
    """Tools and template options."""
    session: str | None = None
    """The file that keeps the messages."""
    messages: list[Message] = field(factory=list)

    def begin(self, system: str | None) -> None:
        self._keep([{"role": "system", "content": system}] if system else [])

    def answer(self, text: str) -> None:
        """Print the answer to a message, and keep both, also if the answer is empty.

        The text of an interrupted answer is kept.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        model_id, config = self.resolved.config.model.id, self.resolved.config.generate
        chat = evolve(self.common, messages=messages)
        said: list[str] = []
        complete = False
        try:
            with naming_settings(self.resolved):
                stream = self.engine.stream(model_id, chat, config)
                splitter = thinking_splitter(self.engine, self.resolved, chat)
                print_stream(stream, splitter, said, sys.stdout)
                complete = True
        except RequestError as error:
            if self.messages and "max_seq_len" in str(error):
                raise RequestError(f"{error}, or begin a new conversation with /reset") from error
            raise
        finally:
            if complete or "".join(said):
                self._keep([*messages, {"role": "assistant", "content": "".join(said)}])
        if stream.result is None:
            return
        note_logprobs([stream.result], self.engine.model(model_id).text)
        warn_sanitized([stream.result])
        if stream.result.finish_reason == "length":
            tokens = len(stream.result.token_ids)
            limit = self.engine.model(model_id).runtime.max_seq_len
            if len(stream.result.prompt_token_ids) + tokens >= limit:
                note(
                    f"note: stopped after {tokens} tokens, since the conversation has {limit}, all "
                    "that max_seq_len allows; /reset begins a new one"
                )
            else:
                note(f"note: stopped after {tokens} tokens; --max-new-tokens N allows more")

    def _keep(self, messages: list[Message]) -> None:
        self.messages = messages
        if self.session is not None:
            with opened(self.session) as file:
                json.dump({"messages": messages}, file, indent=2, ensure_ascii=False)
                file.write("\n")


def _talk(conversation: Conversation) -> int:
    with suppress(ImportError):
        import readline  # noqa: F401  gives input() line editing and history

    note(
        f"{conversation.resolved.config.model.id}: Ctrl-C stops an answer, Ctrl-D ends the chat, "
        "/help lists the commands"
    )
    if conversation.messages and conversation.session:
        note(f"{conversation.session}: the conversation has {len(conversation.messages)} messages")
    interrupted = False
    while True:
        try:
            line = _asked("> ")
            block = _block(line) if line.lstrip().startswith(_BLOCK) else None
        except EOFError:
            note("")
            return 0
        except KeyboardInterrupt:
            if interrupted:
                note("")
                return INTERRUPTED
            interrupted = True
            note("\nCtrl-C again or Ctrl-D ends the chat")
            continue
        interrupted = False
        try:
            if block is not None:
                _say(conversation, block)
            elif not _take(conversation, line, on_terminal=True):
                return 0
        except KeyboardInterrupt:
            continue
        except TilewrightError as error:
            note(f"error: {error}")


def _asked(prompt: str) -> str:
    """A line that is typed. Where the output goes to a file or a pipe, the prompt does not."""
    if sys.stdout.isatty():
        return input(prompt)
    print(prompt, end="", file=sys.stderr, flush=True)
    return input()


def _block(line: str) -> str:
    """A message of several lines, whose first line is given."""
    text = line.lstrip().removeprefix(_BLOCK)
    while not text.rstrip().endswith(_BLOCK):
        text += "\n" + _asked("... ")
    return text.rstrip().removesuffix(_BLOCK)


def _read_messages(conversation: Conversation) -> None:
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise RequestError(f"standard input, line {number}: {not_utf8(error)}") from error
        if not _take(conversation, text, on_terminal=False):
            return


def _take(conversation: Conversation, line: str, on_terminal: bool) -> bool:
    """Handle a line of input. False when it ends the conversation."""
    text = line.strip()
    word, _, rest = text.partition(" ")
    if text == "/quit":
        return False
    if text == "/reset":
        conversation.begin(None)
    elif word == "/system":
        conversation.begin(rest)
    elif text == "/help":
        for usage, meaning in (_WORDS | _FORMS).items():
            if on_terminal or usage != _BLOCK:
                note(f"{usage}: {meaning}")
    elif word.startswith("//"):
        _say(conversation, text[1:])
    elif word.startswith("/") and on_terminal:
        wrong = (
            f"expected {word} alone, found more after it"
            if word in _WORDS
            else f"no command is named {word!r}{nearest(word, _KNOWN)} (see /help)"
        )
        raise RequestError(f"{wrong}; /{word} sends it as a message")
    else:
        _say(conversation, line)
    return True


def _say(conversation: Conversation, text: str) -> None:
    if text.strip():
        conversation.answer(text.strip())
