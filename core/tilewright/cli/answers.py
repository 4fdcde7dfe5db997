"""Answers as a command prints them: in pieces, without hidden thinking, with log-probabilities."""

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import redirect_stdout
from typing import IO, TYPE_CHECKING

from attrs import evolve

from tilewright.chat import Chat, ThinkingSplitter
from tilewright.cli.output import note
from tilewright.config import Resolved
from tilewright.types import GenerateResult

if TYPE_CHECKING:
    from tilewright.engine import GenerationStream, LLMEngine
    from tilewright.text import Text


def thinking_splitter(
    engine: "LLMEngine", resolved: Resolved, prompt: str | Chat
) -> ThinkingSplitter | None:
    """What splits the thinking off the answer to a prompt, if the run hides it; None: show all."""
    if not resolved.config.chat.hide_thinking or isinstance(prompt, str):
        return None
    return ThinkingSplitter(engine.model(resolved.config.model.id).text.opens_thinking(prompt))


def without_thinking(result: GenerateResult, splitter: ThinkingSplitter | None) -> GenerateResult:
    """A result, its text without the thinking that the splitter finds."""
    return evolve(result, text="".join(_shown([result.text], splitter)))


def note_all_hidden(result: GenerateResult, shown: str) -> None:
    """Say so if the tokens did not suffice for more than thinking, which is hidden.

    shown: the text that was written.
    """
    if result.finish_reason == "length" and result.text and not shown:
        note(
            f"note: all {len(result.token_ids)} tokens are thinking, which is hidden; "
            "--max-new-tokens N allows more"
        )


def print_stream(
    stream: "GenerationStream", splitter: ThinkingSplitter | None, printed: list[str], file: IO[str]
) -> None:
    """Write the pieces of a stream as they come, adding them to printed, and end with a newline.

    What plugins print meanwhile goes to standard error.
    """
    with stream, redirect_stdout(sys.stderr):
        try:
            for piece in _shown(stream, splitter):
                printed.append(piece)  # first, so that Ctrl-C loses nothing that is shown
                file.write(piece)
                file.flush()
        finally:
            if printed or stream.result:
                file.write("\n")
                file.flush()


def _shown(pieces: Iterable[str], splitter: ThinkingSplitter | None) -> Iterator[str]:
    """The pieces of a text without the thinking that the splitter finds."""
    if splitter is None:
        yield from pieces
        return
    for piece in pieces:
        yield splitter.push(piece)[1]
    yield splitter.finish()[1]


def note_logprobs(results: Sequence[GenerateResult], text: "Text") -> None:
    """Print the log-probabilities that results have. text: the model's."""
    for number, result in enumerate(results, 1):
        which = f"result {number} of {len(results)}: " if len(results) > 1 else ""
        for title, ids, logprobs in (
            ("the prompt", result.prompt_token_ids, result.prompt_logprobs),
            ("the text", result.token_ids, result.logprobs),
        ):
            if logprobs is None:
                continue
            of = f"the tokens of {title}, and of the likeliest tokens there"
            note(f"{which}log-probabilities of {of}:")
            for token_id, token in zip(ids, logprobs, strict=True):
                if token is None:
                    note(f"{_quoted(token_id, text)}: none, since it is the first")
                    continue
                others = [f"{_quoted(i, text)} {logprob:.4f}" for i, logprob in token.top]
                line = f"{_quoted(token_id, text)}: {token.logprob:.4f}"
                note(f"{line}; {', '.join(others)}" if others else line)


def _quoted(token_id: int, text: "Text") -> str:
    """A token's text in quotation marks, with what is special in it escaped."""
    # Decoders drop the space that begins a text, but not that of a second token.
    one, two = (text.decode([token_id] * times) for times in (1, 2))
    piece = two.removeprefix(one)
    if not piece or "\ufffd" in piece:  # a special token, or a part of a character
        piece = text.token(token_id) or f"<{token_id}>"
    return json.dumps(piece, ensure_ascii=False)
