"""Chat with a model.

A conversation on a terminal, or one message per line from a pipe.
"""

import argparse
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

from attrs import define, field

from tilewright.cli import INTERRUPTED, flags
from tilewright.cli.generate import print_stream
from tilewright.cli.output import note, warn_sanitized
from tilewright.cli.session import open_engine
from tilewright.config import resolve
from tilewright.errors import ConfigError, RequestError, TilewrightError, nearest
from tilewright.settings import RunConfig

if TYPE_CHECKING:
    from tilewright.engine import LLMEngine

tilewright_api = 2

_WORDS = {
    "/reset": "forget the conversation",
    "/system TEXT": "start a new conversation with this system message",
    "/quit": "end the chat, like Ctrl-D",
    "/help": "show this list",
}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.usage = "tilewright chat [options]"
    parser.description = (
        "Chat with a model. Ctrl-C stops an answer. Without a terminal, each line of standard "
        f"input is a message. A line may also be {', '.join(_WORDS)}."
    )
    parser.add_argument("--system", metavar="TEXT", help="system message")
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
    with open_engine(resolved) as engine:
        conversation = Conversation(engine, resolved.config)
        conversation.begin(args.system)
        if sys.stdin.isatty() and sys.stdout.isatty():
            return _talk(conversation)
        _read_messages(conversation)
    return 0


@define
class Conversation:
    """The messages so far, and the engine that answers them."""

    engine: "LLMEngine"
    config: RunConfig
    messages: list[dict[str, str]] = field(factory=list)

    def begin(self, system: str | None) -> None:
        self.messages = [{"role": "system", "content": system}] if system else []

    def answer(self, text: str) -> None:
        """Print the answer to a message. The text of an interrupted answer is kept."""
        messages = [*self.messages, {"role": "user", "content": text}]
        model_id = self.config.model.id
        prompt = self.engine.chat_tokens(model_id, messages)
        stream = self.engine.stream(model_id, prompt, self.config.generate)
        said: list[str] = []
        try:
            print_stream(stream, said, sys.stdout)
        finally:
            if said:
                self.messages = [*messages, {"role": "assistant", "content": "".join(said)}]
        if stream.result is None:
            return
        warn_sanitized([stream.result])
        if stream.result.finish_reason == "length":
            tokens = len(stream.result.token_ids)
            note(f"note: stopped after {tokens} tokens; --max-new-tokens N allows more")


def _talk(conversation: Conversation) -> int:
    with suppress(ImportError):
        import readline  # noqa: F401  gives input() line editing and history

    note(
        f"{conversation.config.model.id}: Ctrl-C stops an answer, Ctrl-D ends the chat, /help "
        "lists the commands"
    )
    interrupted = False
    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return 0
        except KeyboardInterrupt:
            if interrupted:
                print()
                return INTERRUPTED
            interrupted = True
            note("\nCtrl-C again or Ctrl-D ends the chat")
            continue
        interrupted = False
        try:
            if not _take(conversation, line):
                return 0
        except KeyboardInterrupt:
            continue
        except TilewrightError as error:
            note(f"error: {error}")


def _read_messages(conversation: Conversation) -> None:
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            text = line.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise RequestError(
                f"standard input, line {number}: expected UTF-8, found byte "
                f"0x{line[error.start]:02x}"
            ) from error
        if not _take(conversation, text):
            return


def _take(conversation: Conversation, line: str) -> bool:
    """Handle a line of input. False when it ends the conversation."""
    word, _, rest = line.strip().partition(" ")
    if word == "/quit":
        return False
    if word == "/reset":
        conversation.begin(None)
    elif word == "/system":
        conversation.begin(rest)
    elif word == "/help":
        for usage, meaning in _WORDS.items():
            note(f"{usage}: {meaning}")
    elif word.startswith("/"):
        known = [usage.partition(" ")[0] for usage in _WORDS]
        raise RequestError(f"no command is named {word!r}{nearest(word, known)} (see /help)")
    elif word:
        conversation.answer(line.strip())
    return True
