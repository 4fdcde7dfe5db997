"""Prompts of a run: from flags and run files, from files, or from standard input."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from tilewright.config import Resolved
from tilewright.errors import ConfigError
from tilewright.paths import path_of
from tilewright.settings import read_text

STDIN = "-"


def read_prompts(resolved: Resolved) -> list[str]:
    """At least one prompt, none of them empty."""
    config = resolved.config.prompts
    prompts, origin = list(config.text), resolved.origin("prompts", "text")
    if config.file:
        origin = resolved.origin("prompts", "file")
        prompts = [prompt for file in config.file for prompt in _prompts_of(file, origin)]
    if not prompts:
        raise ConfigError(
            "no prompt is given: expected a prompt, --prompt-file FILE, - for standard input, "
            "or [prompts] in a run file"
        )
    for number, prompt in enumerate(prompts, 1):
        which = "the prompt" if len(prompts) == 1 else f"prompt {number} of {len(prompts)}"
        if not prompt:
            raise ConfigError(f"{origin}: {which} is empty: expected text")
        try:
            prompts[number - 1] = _as_utf8(prompt)
        except UnicodeError as error:
            raise ConfigError(f"{origin}: {which} is not valid UTF-8") from error
    return prompts


def _as_utf8(text: str) -> str:
    """The text; that of its bytes if it is an argument in a locale that is not UTF-8.

    Raises UnicodeError if the bytes are not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return os.fsencode(text).decode()
    return text


def _prompts_of(file: str, origin: str) -> Iterator[str]:
    if file == STDIN:
        yield _without_last_newline(_read_stdin())
        return
    text = read_text(path_of(file), f"{origin}: prompt file")
    if Path(file).suffix == ".jsonl":
        yield from _json_lines(file, text)
    else:
        yield _without_last_newline(text)


def _json_lines(file: str, text: str) -> Iterator[str]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{file}:{number}: invalid JSON: {error}") from error
        prompt = value.get("prompt") if isinstance(value, dict) else value
        if not isinstance(prompt, str):
            raise ConfigError(
                f'{file}:{number}: expected a string or {{"prompt": "..."}}, found {line!r:.60}'
            )
        yield prompt


def _read_stdin() -> str:
    if sys.stdin is None:
        raise ConfigError("standard input is closed: expected the prompt there")
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"standard input: expected UTF-8, found byte 0x{error.object[error.start]:02x}"
        ) from error


def _without_last_newline(text: str) -> str:
    return text.removesuffix("\n").removesuffix("\r")
