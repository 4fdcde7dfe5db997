"""Continue a prompt.

Text goes to standard output, everything else to standard error.
"""

import argparse
import sys
from contextlib import ExitStack, redirect_stdout
from typing import IO, TYPE_CHECKING

from tilewright.cli import USER_ERROR, flags
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

if TYPE_CHECKING:
    from tilewright.engine import GenerationStream

tilewright_api = 2


def configure(parser: argparse.ArgumentParser) -> None:
    parser.usage = "tilewright generate [options] [PROMPT]"
    parser.add_argument(
        flags.PROMPT,
        nargs="?",
        metavar="PROMPT",
        help="text to continue, or - to read it from standard input; optional for the demo model",
    )
    flags.add_output_flags(parser)
    flags.add_generate_flags(parser)
    flags.add_engine_flags(parser)


def run(args: argparse.Namespace) -> int:
    return produce(resolve(flags=flags.layer(args)), args)


def produce(resolved: Resolved, args: argparse.Namespace) -> int:
    """Generate and write as the settings say. args: those of ``add_output_flags``.

    Returns the exit code: 2 if one of several prompts was refused; the others have their results.
    """
    config = resolved.config
    prompts = read_prompts(resolved)
    trace = NonFiniteTrace() if args.trace_nonfinite else None
    with ExitStack() as stack:
        file = stack.enter_context(opened(config.output.file))
        to_stdout = file is sys.stdout
        # What plugins print is not part of the results.
        stack.enter_context(redirect_stdout(sys.stderr))
        engine = stack.enter_context(open_engine(resolved, [trace] if trace else []))
        if trace:
            stack.enter_context(trace.ending(engine))
        model_id = config.model.id
        n = config.generate.over(engine.default_config(model_id)).n or 1
        single = len(prompts) * n == 1
        if resolved.origin("prompts", "text") == DEFAULT and not config.prompts.file:
            note(f"prompt: {prompts[0]}")
        elif single and file.isatty() and sys.stderr.isatty():
            print(prompts[0], end="", file=sys.stderr, flush=True)
        if config.output.format == "text":
            for key in ("logprobs", "prompt_logprobs"):
                if getattr(config.generate, key) is not None:
                    origin = resolved.origin("generate", key)
                    note(f"warning: {origin}: text has no log-probabilities: add --json for them")
        if config.output.format == "jsonl":
            results = engine.generate_batch(model_id, prompts, config.generate)
            source = engine.model(model_id).loaded.source
            for i, result in enumerate(results):
                write_json(result_record(result, prompts[i // n], source), file)
        elif single and to_stdout:
            stream = engine.stream(model_id, prompts[0], config.generate)
            print_stream(stream, [], file)
            assert stream.result is not None
            results = [stream.result]
        else:
            results = engine.generate_batch(model_id, prompts, config.generate)
            write_text(results, file)
        warn_sanitized(results)
        refused = {i // n + 1: result.error for i, result in enumerate(results) if result.error}
        for number, error in refused.items():
            note(f"tilewright: error: prompt {number} of {len(prompts)}: {error}")
        if (args.stats or sys.stderr.isatty()) and len(refused) < len(prompts):
            note(stats_line([result for result in results if not result.error]))
    return USER_ERROR if refused else 0


def print_stream(stream: "GenerationStream", printed: list[str], file: IO[str]) -> None:
    """Write the pieces as they come, adding them to printed, and end with a newline.

    What plugins print meanwhile goes to standard error.
    """
    with stream, redirect_stdout(sys.stderr):
        try:
            for piece in stream:
                file.write(piece)
                file.flush()
                printed.append(piece)
        finally:
            if printed or stream.result:
                file.write("\n")
                file.flush()
