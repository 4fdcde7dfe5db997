"""Continue a prompt, or answer a question.

Text goes to standard output, everything else to standard error.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, redirect_stdout
from typing import IO, TYPE_CHECKING

from attrs import evolve, fields

from tilewright.chat import Chat, ThinkingSplitter
from tilewright.cli import USER_ERROR, flags
from tilewright.cli.output import (
    logprobs_lines,
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
    from tilewright.engine import GenerationStream, LLMEngine

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
    settings = settings_of(entries, config.generate)
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
        model_id, prompts = config.model.id, [entry.prompt for entry in entries]
        usual_n = engine.default_config(model_id).n or 1
        # For each result, its prompt's number.
        numbers = [i for i, each in enumerate(settings) for _ in range(each.n or usual_n)]
        single, first = len(numbers) == 1, prompts[0]
        if entries[0].origin == DEFAULT:
            note(f"prompt: {config.prompts.text[0]}")
        elif single and isinstance(first, str) and file.isatty() and sys.stderr.isatty():
            print(first, end="", file=sys.stderr, flush=True)
        if single and to_stdout and config.output.format == "text":
            with naming_settings(resolved, _origins(entries[0])):
                stream = engine.stream(model_id, first, settings[0])
                pieces = answer_pieces(stream, hider(engine, model_id, resolved, first))
                printed: list[str] = []
                print_stream(stream, pieces, printed, file)
            assert stream.result is not None
            results = [stream.result]
            shown = [evolve(stream.result, text="".join(printed))]
        else:
            own = any(entry.settings != GenerateConfig() for entry in entries)
            with naming_settings(resolved):
                results = engine.generate_batch(
                    model_id, prompts, settings if own else config.generate
                )
            shown = [
                result
                if result.error
                else _without_thinking(result, hider(engine, model_id, resolved, prompts[i]))
                for i, result in zip(numbers, results, strict=True)
            ]
            if config.output.format == "jsonl":
                source = engine.model(model_id).loaded.source
                for i, result in zip(numbers, shown, strict=True):
                    write_json(result_record(result, prompts[i], source, entries[i].record), file)
            else:
                write_text(shown, file)
        if config.output.format == "text":
            note_logprobs(results, engine, model_id)
            for one, result in zip(shown, results, strict=True):
                if result.text and not one.text and result.finish_reason == "length":
                    tokens = len(result.token_ids)
                    note(
                        f"note: all {tokens} tokens are thinking, which is hidden; "
                        "--max-new-tokens N allows more"
                    )
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
            note(f"tilewright: error: prompt {i} of {len(prompts)}{also}: {message}")
        if (args.stats or sys.stderr.isatty()) and len(refused) < len(prompts):
            note(stats_line([result for result in results if not result.error]))
    return USER_ERROR if refused else 0


def settings_of(entries: Sequence[PromptEntry], common: GenerateConfig) -> list[GenerateConfig]:
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


def hider(
    engine: "LLMEngine", model_id: str, resolved: Resolved, prompt: str | Chat
) -> ThinkingSplitter | None:
    """What splits the thinking off an answer, if it is to be hidden; None: show all."""
    if not resolved.config.chat.hide_thinking or isinstance(prompt, str):
        return None
    return ThinkingSplitter(engine.model(model_id).text.opens_thinking(prompt))


def answer_pieces(pieces: Iterable[str], splitter: ThinkingSplitter | None) -> Iterator[str]:
    """The pieces of a text without the thinking that the splitter finds."""
    if splitter is None:
        yield from pieces
        return
    for piece in pieces:
        yield splitter.push(piece)[1]
    yield splitter.finish()[1]


def _without_thinking(result: GenerateResult, splitter: ThinkingSplitter | None) -> GenerateResult:
    return evolve(result, text="".join(answer_pieces([result.text], splitter)))


def print_stream(
    stream: "GenerationStream", pieces: Iterable[str], printed: list[str], file: IO[str]
) -> None:
    """Write the pieces of a stream as they come, adding them to printed, and end with a newline.

    What plugins print meanwhile goes to standard error.
    """
    with stream, redirect_stdout(sys.stderr):
        try:
            for piece in pieces:
                printed.append(piece)  # first, so that Ctrl-C loses nothing that is shown
                file.write(piece)
                file.flush()
        finally:
            if printed or stream.result:
                file.write("\n")
                file.flush()


def note_logprobs(results: Sequence[GenerateResult], engine: "LLMEngine", model_id: str) -> None:
    """Print the log-probabilities that results have."""
    text = engine.model(model_id).text
    for number, result in enumerate(results, 1):
        for line in logprobs_lines(result, text):
            heads = len(results) > 1 and line.startswith("log-probabilities")
            note(f"result {number} of {len(results)}: {line}" if heads else line)
