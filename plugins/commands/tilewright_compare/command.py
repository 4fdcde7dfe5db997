"""Find where two executors differ."""

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stdout
from math import isnan, nan
from pathlib import Path
from shutil import get_terminal_size
from typing import IO, TYPE_CHECKING

from attrs import define, evolve

from tilewright.cli import INTERRUPTED, flags
from tilewright.cli.output import note, opened, opened_binary, write_json
from tilewright.cli.prompts import read_prompts
from tilewright.cli.session import LoadingBar, counting, with_origin
from tilewright.config import DEFAULT, Resolved
from tilewright.errors import ConfigError, ExecutorError, RequestError
from tilewright.settings import RunConfig
from tilewright_compare.side_settings import choices, reader_options, resolved_sides, wider

if TYPE_CHECKING:
    from rich.progress import Progress

    from tilewright_compare import Choice, Comparison, Tolerance
    from tilewright_compare.against import Earlier
    from tilewright_compare.default_run import Plan
    from tilewright_compare.provenance import Made

tilewright_api = 2

NOT_ALL_REACHED = 3
"""Exit code with --strict where the sides are equal, but not every path was reached."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.usage = "tilewright compare [options] [CONFIG]"
    parser.description = (
        "Find where a candidate executor first differs from a reference on a model, tensor by "
        "tensor. Without a prompt, it chooses prompts, page size, chunk and new tokens that reach "
        "every path that the candidate declares. Exit code 0: equal; 1: they diverge; 2: they "
        "could not be compared; 3, with --strict: equal, but not every path of the candidate was "
        "reached. docs/numerics.md explains the report."
    )
    parser.add_argument(
        "config",
        nargs="?",
        metavar="CONFIG",
        help="a run file: it gives the model and the prompts, and the candidate's executor and "
        "settings",
    )
    _add_sides(parser)
    _add_runs(parser)
    report = parser.add_argument_group("report")
    report.add_argument(
        "--strict",
        action="store_true",
        help="exit with code 3 if they are equal, but not every path of the candidate was reached",
    )
    report.add_argument("--json", action="store_true", help="print all figures as a JSON object")
    report.add_argument(
        "--against",
        metavar="REPORT",
        help="a report of an earlier comparison (--json --output); errors that grew are wrong",
    )
    report.add_argument("--html", metavar="FILE", help="also write a page with pictures")
    report.add_argument("--png", metavar="FILE", help="also write the heat map as a picture")
    report.add_argument(
        "--output",
        metavar="FILE",
        help="file to write, complete or not at all; default: standard output",
    )
    flags.add(parser.add_argument_group("model"), "model", {"path", "format"})
    flags.add(parser.add_argument_group("plugins"), "plugins", {"loader"})


def _add_sides(parser: argparse.ArgumentParser) -> None:
    sides = parser.add_argument_group("sides")
    sides.add_argument("--candidate", metavar="NAME", help="the executor under test (torch)")
    sides.add_argument(
        "--reference", metavar="NAME", default="torch", help="the trusted executor (torch)"
    )
    sides.add_argument(
        "-o",
        "--option",
        dest="side_options",
        action="append",
        metavar="KEY=VALUE",
        help="candidate.KEY or reference.KEY: an option of that side's executor; "
        "candidate.runtime.KEY or reference.runtime.KEY: a runtime setting of that side, such as "
        "page_size; loader.KEY or weight_format.NAME.KEY: an option of a plugin that reads the "
        "model for both sides",
    )
    flags.add(sides, "runtime", {"device"})


def _add_runs(parser: argparse.ArgumentParser) -> None:
    prompts = parser.add_argument_group("what is run")
    flags.add(prompts, "prompts", {"text", "file"})
    prompts.add_argument(
        "--new-tokens",
        type=flags.positive,
        metavar="N",
        help="tokens after each prompt; both sides get the reference's; default: 8, or chosen with "
        "the prompts",
    )
    prompts.add_argument(
        "--chunk",
        type=flags.positive,
        metavar="N",
        help="largest number of tokens in a prefill step; default: 512, or chosen with the prompts",
    )
    prompts.add_argument(
        "--isolate",
        action="store_true",
        help="run each layer alone even if the whole runs agree",
    )
    prompts.add_argument(
        "--tolerance",
        dest="tolerances",
        action="append",
        default=[],
        metavar="PATTERN:METRIC=BOUND",
        help="a limit for tensors whose names match, instead of what rounding explains: "
        "'layers.*.attention:relative_rms=0.03'; the first that matches a name applies",
    )


def run(args: argparse.Namespace) -> int:
    tolerances = [tolerance(text) for text in args.tolerances]
    earlier = None
    if args.against is not None:
        from tilewright_compare.against import read_report

        earlier = read_report(args.against)
    outputs = [Path(name).absolute() for name in (args.output, args.html, args.png) if name]
    if len(set(outputs)) < len(outputs):
        raise ConfigError("--output, --html and --png name the same file: give each its own")
    candidate, reference = resolved_sides(args)
    given = candidate.origin("prompts", "text") != DEFAULT or candidate.config.prompts.file
    prompts = read_prompts(candidate) if given else None
    with ExitStack() as files:
        file = files.enter_context(opened(args.output))
        page = files.enter_context(opened(args.html)) if args.html else None
        picture = files.enter_context(opened_binary(args.png)) if args.png else None
        with redirect_stdout(sys.stderr):  # what plugins print is not part of the report
            comparison = compared(candidate, reference, prompts, tolerances, args, earlier)
        write(comparison, file, as_json=args.json)
        if page:
            from tilewright_compare.page import html

            page.write(html(comparison))
        if picture:
            from tilewright_compare.picture import png

            picture.write(png(comparison))
    if comparison.failure:
        raise ExecutorError(comparison.failure)
    if not comparison.finished:
        return INTERRUPTED
    if not comparison.equal:
        return 1
    return NOT_ALL_REACHED if args.strict and comparison.unreached else 0


def compared(
    candidate: Resolved,
    reference: Resolved,
    prompts: Sequence[str] | None,
    tolerances: "Sequence[Tolerance]",
    args: argparse.Namespace,
    earlier: "Earlier | None",
) -> "Comparison":
    """The comparison; unfinished if Ctrl-C ended it. prompts: None where none is given."""
    from tilewright_compare import compare
    from tilewright_compare.against import check_made
    from tilewright_compare.provenance import made

    config = candidate.config
    tried, trusted = sides = choices(config, reference.config)
    bar = LoadingBar() if sys.stderr.isatty() else None
    if bar:
        tried, trusted = (evolve(c, observers=(*c.observers, bar)) for c in (tried, trusted))
    watch = Watch(loading=bar)
    try:
        plan, model = planned(config, tried, prompts, earlier, args)
        runtime = evolve(tried.runtime, page_size=plan.page_size)
        ours, near = sides
        watch.made = made(args.argv, evolve(ours, runtime=runtime), near, model, plan)
        if earlier:
            check_made(earlier, watch.made)
        if prompts is None:
            lengths = [len(ids) for ids in plan.prompts]
            note(
                f"{len(lengths)} prompts of {min(lengths)} to {max(lengths)} tokens, chunks of "
                f"{plan.chunk} and {plan.new_tokens} new tokens, "
                f"{f'as in {earlier.path}' if earlier else f'chosen for executor {tried.executor}'}"
            )
        comparison = compare(
            config.model.path,
            trusted,
            evolve(tried, runtime=runtime),
            plan.prompts,
            new_tokens=plan.new_tokens,
            chunk=plan.chunk,
            isolate=args.isolate,
            tolerances=tolerances,
            against=earlier,
            progress=watch,
        )
        comparison.wider = wider(comparison, candidate, reference, args)
        return comparison
    except ConfigError as error:
        message = with_origin(str(error), candidate)
        raise ConfigError(with_origin(message, reference)) from error
    except KeyboardInterrupt:
        if watch.comparison is None:
            raise
        return watch.comparison
    finally:
        watch.stop()


def tolerance(text: str) -> "Tolerance":
    """Parse ``PATTERN:METRIC=BOUND``. Raises ConfigError."""
    from tilewright_compare import Tolerance

    rule, bound = flags.split(text, "--tolerance", "PATTERN:METRIC=BOUND")
    pattern, colon, metric = rule.rpartition(":")
    try:
        limit = float(bound)
    except ValueError:
        limit = nan
    if not colon or isnan(limit):
        raise ConfigError(
            f"--tolerance {text}: expected PATTERN:METRIC=BOUND, such as "
            "'layers.*.output:relative_rms=0.03'"
        )
    return Tolerance(pattern, metric, limit)


def planned(
    config: RunConfig,
    tried: "Choice",
    prompts: Sequence[str] | None,
    earlier: "Earlier | None",
    args: argparse.Namespace,
) -> "tuple[Plan, str]":
    """What to run, and the model's fingerprint.

    prompts: None: those of the earlier report, if there is one; else they are chosen for the
    candidate.

    Raises RequestError for prompts that do not fit.
    """
    from tilewright.engine import LLMEngine
    from tilewright.text import Text
    from tilewright.types import Tiles
    from tilewright_compare.coverage import declared_tiles
    from tilewright_compare.default_run import TEXT, Plan, default_run
    from tilewright_packed.writer import fingerprint

    loader, options = config.plugins.loader, reader_options(config)
    with LLMEngine.from_plugins(loader=loader, options=options) as engine:
        loaded = engine.load(config.model.path, config.model.format)
        model = fingerprint(loaded)
        loaded.weights.close()
    text, limit = Text(loaded.text), loaded.config.context_length
    page_size = tried.runtime.page_size
    if prompts is None and earlier:
        plan = evolve(
            earlier.plan,
            new_tokens=args.new_tokens or earlier.plan.new_tokens,
            chunk=args.chunk or earlier.plan.chunk,
            page_size=page_size or earlier.plan.page_size,
        )
    elif prompts is None:
        tiles = declared_tiles(tried, loaded.config, tried.runtime) or Tiles(page_size=page_size)
        tokens = text.encode(TEXT) or range(loaded.config.vocab_size)
        plan = default_run(tiles, tokens, limit, args.new_tokens, args.chunk)
    else:
        plan = Plan(
            prompts=[text.encode(prompt) for prompt in prompts],
            new_tokens=args.new_tokens or 8,
            chunk=args.chunk or 512,
            page_size=page_size,
        )
    for number, prompt in enumerate(plan.prompts, 1):
        if not prompt or len(prompt) + plan.new_tokens > limit:
            raise RequestError(
                f"prompt {number} of {len(plan.prompts)} has {len(prompt)} tokens and --new-tokens "
                f"is {plan.new_tokens}: expected at least one token, and together at most the "
                f"{limit} positions of {loaded.source}"
            )
    return plan, model


@define(eq=False)
class Watch:
    """Keeps the comparison so far; on a terminal, shows the current layer."""

    loading: LoadingBar | None
    comparison: "Comparison | None" = None
    made: "Made | None" = None
    bar: "Progress | None" = None

    def __call__(self, comparison: "Comparison", what: str, done: int, total: int) -> None:
        comparison.made = self.made
        self.comparison = comparison
        if self.loading and self.bar is None:
            self.loading.stop()
            self.bar = counting(total)
        if self.bar:
            self.bar.update(self.bar.task_ids[0], description=what, completed=done)

    def stop(self) -> None:
        for bar in (self.loading, self.bar):
            if bar:
                bar.stop()


def write(comparison: "Comparison", file: IO[str], as_json: bool) -> None:
    """Write the report, as JSON or as text that fits the terminal."""
    if as_json:
        from tilewright_compare.record import record

        write_json(record(comparison), file)
        return
    from tilewright_compare.report import text

    on_terminal = file.isatty()
    lines = text(comparison, get_terminal_size().columns, wrapped=on_terminal)
    if not on_terminal:
        file.write("\n".join(lines) + "\n")
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(file=file, highlight=False, soft_wrap=True)
    for line in lines:
        shown = Text(line)
        shown.highlight_regex(r"\S+!(?= |$)", "bold red")
        console.print(shown)
