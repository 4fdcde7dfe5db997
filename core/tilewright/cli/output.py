"""What a command prints: results on standard output or in a file, notes on standard error."""

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from typing import IO, Any, BinaryIO

from tilewright.chat import Chat
from tilewright.cli import naming_unwritable
from tilewright.errors import ConfigError, quoted
from tilewright.paths import path_of
from tilewright.types import GenerateResult, TokenLogprobs


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def warn_sanitized(results: Sequence[GenerateResult]) -> None:
    """Print a warning if logits were sanitised for these results."""
    sanitized = sum(result.sanitized_steps for result in results)
    if sanitized:
        note(f"warning: logits were sanitized in {sanitized} steps: do not rely on this text")


_STDOUT = (None, "-", "/dev/stdout")
# Resolving /dev/stdout as a link would replace the file that a shell redirected it to.


@contextmanager
def opened(path: str | None) -> Iterator[IO[str]]:
    """Standard output (None, ``-``, /dev/stdout), or a file that appears when the block succeeds.

    Raises ConfigError at once when the file cannot be created, and when it cannot be written.
    """
    if path in _STDOUT:
        with naming_unwritable("standard output"):
            yield sys.stdout
        return
    assert path is not None
    with _replaced(path) as raw, TextIOWrapper(raw, "utf-8", line_buffering=raw.isatty()) as file:
        yield file


@contextmanager
def opened_binary(path: str) -> Iterator[IO[bytes]]:
    """A binary file, as ``opened``. Raises ConfigError for standard output, which is for text."""
    if path in _STDOUT:
        raise ConfigError(
            f"output file {quoted(path, 300)}: expected a file name, since the output is binary"
        )
    with _replaced(path) as file:
        yield file


@contextmanager
def _replaced(path: str) -> Iterator[BinaryIO]:
    """A file that appears, replacing any existing one, when the block succeeds."""
    try:
        # The file that a link names is replaced, not the link.
        target = os.path.realpath(path_of(path))
        if os.path.isdir(target):
            raise IsADirectoryError(None, "it is a directory")
        regular = os.path.isfile(target) or not os.path.exists(target)
        unfinished = f"{target}.{os.getpid()}.unfinished" if regular else target
        file = open(unfinished, "xb" if regular else "wb")  # noqa: SIM115
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"output file {quoted(path, 300)} cannot be written: {why}") from error
    try:
        with naming_unwritable(f"output file {quoted(path, 300)}"), file:
            yield file
        if regular:
            os.replace(unfinished, target)
    except BaseException:
        if regular:
            os.unlink(unfinished)
        raise


def write_text(results: Sequence[GenerateResult], file: IO[str]) -> None:
    """The texts, each followed by a newline, with an empty line between two."""
    file.write("\n".join(f"{result.text}\n" for result in results))


_LINE_ENDS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}
"""Ends of lines that JSON does not escape."""


def write_json(value: Any, file: IO[str]) -> None:
    """JSON in one line, as ``json_line``, in ASCII where the stream cannot encode Unicode."""
    unicode = (getattr(file, "encoding", None) or "").lower().startswith("utf")
    file.write(json_line(value, unicode) + "\n")
    file.flush()


def json_line(value: Any, unicode: bool = True) -> str:
    """JSON in one line, without the line's end.

    unicode: False to escape all that is not ASCII. Characters at which ``str.splitlines`` ends a
    line are escaped in any case.
    """
    return json.dumps(value, ensure_ascii=not unicode).translate(_LINE_ENDS)


def result_record(
    result: GenerateResult, prompt: str | Chat, source: str, given: Mapping[str, Any]
) -> dict[str, Any]:
    """A result as ``--json`` prints it. source: the model's, from its loader; given: what the
    prompt's own line passes through."""
    timings = result.timings
    record: dict[str, Any] = {
        **given,
        "model": result.model_id,
        "source": source,
        **({"prompt": prompt} if isinstance(prompt, str) else {"messages": prompt.messages}),
        "text": result.text,
        "token_ids": result.token_ids,
        "finish_reason": result.finish_reason,
        "stop_reason": result.stop_reason,
        "prompt_token_ids": result.prompt_token_ids,
        "cached_tokens": result.cached_tokens,
        "preemptions": result.preemptions,
        "seed": result.seed,
        "device": result.device,
        "timings": {
            "load_seconds": timings.load_seconds,
            "prefill_seconds": timings.prefill_seconds,
            "decode_seconds": timings.decode_seconds,
            "prompt_tokens": timings.prompt_tokens,
            "new_tokens": timings.new_tokens,
            "prefill_tokens_per_second": timings.prefill_tokens_per_second,
            "decode_tokens_per_second": timings.decode_tokens_per_second,
        },
    }
    if result.error is not None:
        record["error"] = str(result.error)
    if result.logprobs is not None:
        record["logprobs"] = [_logprobs_record(token) for token in result.logprobs]
    if result.prompt_logprobs is not None:
        record["prompt_logprobs"] = [t and _logprobs_record(t) for t in result.prompt_logprobs]
    if result.drafted_tokens:
        record["drafted_tokens"] = result.drafted_tokens
        record["accepted_tokens"] = result.accepted_tokens
    if result.sanitized_steps:
        record["sanitized_steps"] = result.sanitized_steps
    return record


def _logprobs_record(token: TokenLogprobs) -> dict[str, Any]:
    return {"token_id": token.token_id, "logprob": token.logprob, "top": token.top}


def stats_line(results: Sequence[GenerateResult]) -> str:
    """Tokens and speeds, for one result or for a batch."""
    timings = [result.timings for result in results]
    prompt_tokens = sum(t.prompt_tokens for t in timings)
    new_tokens = sum(t.new_tokens for t in timings)
    drafted = sum(result.drafted_tokens for result in results)
    accepted = sum(result.accepted_tokens for result in results)
    drafts = f"{accepted} of {drafted} drafted tokens accepted, " if drafted else ""
    loading = f"the model loaded in {timings[0].load_seconds:.2f} s on {results[0].device}"
    if len(results) > 1:
        seconds = max(t.prefill_seconds + t.decode_seconds for t in timings)
        return (
            f"{len(results)} results: {prompt_tokens} prompt tokens and {new_tokens} new tokens "
            f"in {seconds:.2f} s; {drafts}{loading}"
        )
    return (
        f"{prompt_tokens} prompt tokens ({timings[0].prefill_tokens_per_second:.1f} tokens/s), "
        f"{new_tokens} new tokens ({timings[0].decode_tokens_per_second:.1f} tokens/s), "
        f"{drafts}ended by {results[0].finish_reason}; {loading}"
    )
