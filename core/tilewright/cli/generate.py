"""Continue a prompt, or answer a question.

Text goes to standard output, everything else to standard error.
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stdout
from typing import IO, TYPE_CHECKING

from attrs import evolve, fields

from tilewright.chat import Chat
from tilewright.cli import USER_ERROR, flags
from tilewright.cli.answers import (
    note_all_hidden,
    note_logprobs,
    print_stream,
    thinking_splitter,
    without_thinking,
)
from tilewright.cli.output import (
    note,
    opened,
    result_record,
    stats_line,
    warn_sanitized,
    write_json,
    write_text,
)
from tilewright.cli.prompts import PromptEntry, read_entries
from tilewright.cli.session import (
    NonFiniteTrace,
    naming_settings,
    note_turn_ends,
    open_engine,
    with_setting,
)
from tilewright.config import DEFAULT, Resolved, resolve
from tilewright.errors import ConfigError
from tilewright.types import GenerateConfig, GenerateResult

if TYPE_CHECKING:
    from tilewright.engine import LLMEngine

tilewright_api = 2


def configure(parser: argparse.ArgumentParser) -> None:
    parser.usage = "tilewright generate [options] [PROMPT]"
    flags.add_prompt_argument(
        parser,
        "text to continue, or - to read it from standard input; without it, a pipe or a file on "
        "standard input is read; optional for the demo model",
    )
    flags.add_output_flags(parser)
    flags.add_chat_flags(parser)
    flags.add_generate_flags(parser)
    flags.add_engine_flags(parser)


def run(args: argparse.Namespace) -> int:
    return produce(resolve(flags=flags.layer(args)), args)


def produce(resolved: Resolved, args: argparse.Namespace) -> int:
    """Generate and write as the settings say. args: those of ``add_output_flags``.

    Returns the exit code: 2 if one of several prompts was refused; the others have their results.
    """
    config = resolved.config
    entries = read_entries(resolved)
    settings = _settings_of(entries, config.generate)
    processors = [name for entry in entries for name in entry.settings.logits_processors or ()]
    trace = NonFiniteTrace() if args.trace_nonfinite else None
    with ExitStack() as stack:
        file = stack.enter_context(opened(config.output.file))
        to_stdout = file is sys.stdout
        # What plugins print is not part of the results.
        stack.enter_context(redirect_stdout(sys.stderr))
        engine = stack.enter_context(open_engine(resolved, [trace] if trace else [], processors))
        if trace:
            stack.enter_context(trace.ending(engine))
        if any(isinstance(entry.prompt, Chat) for entry in entries):
            note_turn_ends(engine, resolved)
        usual_n = engine.default_config(config.model.id).n or 1
        # For each result, its prompt's number.
        numbers = [i for i, each in enumerate(settings) for _ in range(each.n or usual_n)]
        single, first = len(numbers) == 1, entries[0].prompt
        if entries[0].origin == DEFAULT:
            note(f"prompt: {config.prompts.text[0]}")
        elif single and isinstance(first, str) and file.isatty() and sys.stderr.isatty():
            print(first, end="", file=sys.stderr, flush=True)
        if single and to_stdout and config.output.format == "text":
            result, text = _stream(engine, resolved, entries[0], settings[0], file)
            results, shown = [result], [evolve(result, text=text)]
        else:
            results = _batch(engine, resolved, entries, settings)
            shown = [
                result
                if result.error
                else without_thinking(
                    result, thinking_splitter(engine, resolved, entries[i].prompt)
                )
                for i, result in zip(numbers, results, strict=True)
            ]
            _write(shown, numbers, engine, resolved, entries, file)
        if config.output.format == "text":
            note_logprobs(results, engine.model(config.model.id).text)
            for result, one in zip(results, shown, strict=True):
                note_all_hidden(result, one.text)
        warn_sanitized(results)
        refused = {
            i: result.error for i, result in zip(numbers, results, strict=True) if result.error
        }
        messages: dict[str, list[int]] = {}
        for i, error in refused.items():
            message = with_setting(str(error), resolved, _origins(entries[i]))
            messages.setdefault(message, []).append(i + 1)
        for message, (i, *others) in messages.items():
            also = f", and {len(others)} after it" if others else ""
            note(f"tilewright: error: prompt {i} of {len(entries)}{also}: {message}")
        if (args.stats or sys.stderr.isatty()) and len(refused) < len(entries):
            note(stats_line([result for result in results if not result.error]))
    return USER_ERROR if refused else 0


def _stream(
    engine: "LLMEngine",
    resolved: Resolved,
    entry: PromptEntry,
    settings: GenerateConfig,
    file: IO[str],
) -> tuple[GenerateResult, str]:
    """Write the only result while it is generated. Returns it, and the text that was written."""
    printed: list[str] = []
    with naming_settings(resolved, _origins(entry)):
        stream = engine.stream(resolved.config.model.id, entry.prompt, settings)
        print_stream(stream, thinking_splitter(engine, resolved, entry.prompt), printed, file)
    assert stream.result is not None
    return stream.result, "".join(printed)


def _batch(
    engine: "LLMEngine",
    resolved: Resolved,
    entries: Sequence[PromptEntry],
    settings: Sequence[GenerateConfig],
) -> list[GenerateResult]:
    """The results of all prompts. Settings that are the run's alone are errors of the whole run."""
    config = resolved.config
    own = any(entry.settings != GenerateConfig() for entry in entries)
    with naming_settings(resolved):
        return engine.generate_batch(
            config.model.id,
            [entry.prompt for entry in entries],
            settings if own else config.generate,
        )


def _write(
    results: Sequence[GenerateResult],
    numbers: Sequence[int],
    engine: "LLMEngine",
    resolved: Resolved,
    entries: Sequence[PromptEntry],
    file: IO[str],
) -> None:
    """Write results in the run's format. numbers: each result's prompt, as its place in entries."""
    if resolved.config.output.format == "text":
        write_text(results, file)
        return
    source = engine.model(resolved.config.model.id).loaded.source
    for i, result in zip(numbers, results, strict=True):
        write_json(result_record(result, entries[i].prompt, source, entries[i].record), file)


def _settings_of(entries: Sequence[PromptEntry], common: GenerateConfig) -> list[GenerateConfig]:
    """The settings of each prompt: its own over those of the run.

    A prompt without a seed of its own has the run's, plus the number of results before its own.
    Raises ConfigError, which names the prompt, for settings that contradict each other.
    """
    found: list[GenerateConfig] = []
    results = 0
    for entry in entries:
        try:
            settings = entry.settings.over(common)
        except ConfigError as error:
            raise ConfigError(f"{entry.origin}: {error}") from error
        if entry.settings.seed is None and common.seed is not None:
            settings = evolve(settings, seed=(common.seed + results) % 2**63)
        results += settings.n or 1
        found.append(settings)
    return found


def _origins(entry: PromptEntry) -> dict[str, str]:
    """Where the settings are given that a prompt has of its own."""
    return {
        a.name: entry.origin
        for a in fields(GenerateConfig)
        if getattr(entry.settings, a.name) is not None
    }
