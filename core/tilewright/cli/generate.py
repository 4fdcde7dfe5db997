"""Continue a prompt.

Text goes to standard output, everything else to standard error.
"""

import argparse
import sys
from typing import TYPE_CHECKING, cast

from attrs import evolve

from tilewright.cli import flags
from tilewright.cli.output import (
    note,
    opened,
    result_record,
    stats_line,
    warn_sanitized,
    write_json,
    write_text,
)
from tilewright.cli.prompts import read_prompts
from tilewright.cli.session import NonFiniteTrace, open_engine
from tilewright.config import DEFAULT, Resolved, resolve
from tilewright.types import GenerateConfig, GenerateResult

if TYPE_CHECKING:
    from tilewright.engine import GenerationStream, LLMEngine

tilewright_api = 1


def configure(parser: argparse.ArgumentParser) -> None:
    parser.usage = "tilewright generate [options] [PROMPT]"
    parser.add_argument(
        flags.PROMPT,
        nargs="?",
        metavar="PROMPT",
        help="text to continue; - reads it from standard input; the demo model has one of its own",
    )
    flags.add_output_flags(parser)
    flags.add_generate_flags(parser)
    flags.add_engine_flags(parser)


def run(args: argparse.Namespace) -> int:
    produce(resolve(flags=flags.layer(args)), args)
    return 0


def produce(resolved: Resolved, args: argparse.Namespace) -> None:
    """Generate and write as the settings say. args: those of ``add_output_flags``."""
    config = resolved.config
    prompts = read_prompts(resolved)
    observers = [NonFiniteTrace()] if args.trace_nonfinite else []
    with opened(config.output.file) as file, open_engine(resolved, observers) as engine:
        if resolved.origin("prompts", "text") == DEFAULT and not config.prompts.file:
            note(f"prompt: {prompts[0]}")
        elif len(prompts) == 1 and file.isatty() and sys.stderr.isatty():
            print(prompts[0], end="", file=sys.stderr, flush=True)
        model_id = config.model.id
        if config.output.format == "jsonl":
            results = engine.generate_batch(model_id, prompts, config.generate)
            source = engine.model(model_id).loaded.source
            for result, prompt in zip(results, prompts, strict=True):
                write_json(result_record(result, prompt, source), file)
        elif len(prompts) == 1 and file is sys.stdout:
            results = [_stream(engine, model_id, prompts[0], config.generate)]
        else:
            results = engine.generate_batch(model_id, prompts, config.generate)
            write_text(results, file)
        warn_sanitized(results)
        if args.stats or sys.stderr.isatty():
            note(stats_line(results))


def print_stream(stream: "GenerationStream", printed: list[str]) -> None:
    """Print the pieces as they come, adding them to printed, and end with a newline."""
    with stream:
        try:
            for piece in stream:
                sys.stdout.write(piece)
                sys.stdout.flush()
                printed.append(piece)
        finally:
            if printed or stream.result:
                sys.stdout.write("\n")
                sys.stdout.flush()


def _stream(
    engine: "LLMEngine", model_id: str, prompt: str, config: GenerateConfig
) -> GenerateResult:
    stream = cast(
        "GenerationStream", engine.generate(model_id, prompt, evolve(config, stream=True))
    )
    print_stream(stream, [])
    assert stream.result is not None
    return stream.result
