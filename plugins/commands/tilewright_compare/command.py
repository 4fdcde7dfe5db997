"""Find where two executors differ."""

import argparse
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, redirect_stdout
from math import isnan, nan
from pathlib import Path
from shutil import get_terminal_size
from typing import IO, TYPE_CHECKING, Any

from attrs import define, evolve

from tilewright.cli import INTERRUPTED, flags
from tilewright.cli.output import note, opened, opened_binary, write_json
from tilewright.cli.prompts import read_prompts
from tilewright.cli.session import LoadingBar, counting, with_origin
from tilewright.config import DEFAULT, ENVIRONMENT_PREFIX, Resolved, resolve
from tilewright.errors import ConfigError, ExecutorError, RequestError, nearest
from tilewright.settings import Given, Place, RunConfig

if TYPE_CHECKING:
    from rich.progress import Progress

    from tilewright_compare import Choice, Comparison, Tolerance
    from tilewright_compare.against import Earlier
    from tilewright_compare.default_run import Plan
    from tilewright_compare.provenance import Made

tilewright_api = 2

SIDES = ("candidate", "reference")
DEFAULT_REFERENCE = ("reference", "torch")
THIN = 3
"""Exit code with --strict for sides that are equal in what was reached, which is not all."""
_OURS = ("max_seq_len", "max_batch_size", "max_batch_tokens")
"""Runtime settings that follow from the prompts, --new-tokens and --chunk."""
_TWO_DTYPES = ("weight_dtype", "kv_dtype")
"""Settings in which the reference runs twice: in float32, and in the candidate's dtype."""
_READERS = ("loader", "weight_format")
"""Kinds of plugins that read the model for both sides."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.usage = "tilewright compare [options] [CONFIG]"
    parser.description = (
        "Find where a candidate executor first differs from a reference on a model, tensor by "
        "tensor. Exit code 0: equal; 1: they diverge; 2: they could not be compared; 3, with "
        "--strict: equal, but not every path of the candidate was reached. "
        "docs/numerics.md explains the report."
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
    prompts = parser.add_argument_group(
        "what is run",
        "Without a prompt, short ones are chosen, and page size, chunk and new tokens with them, "
        "so that they reach every path that the candidate declares.",
    )
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
    return THIN if args.strict and comparison.unreached else 0


def resolved_sides(args: argparse.Namespace) -> tuple[Resolved, Resolved]:
    """Settings of the candidate, with model and prompts, and of the reference.

    A run file and the environment apply to the candidate only.
    """
    shared: dict[Place, Given] = dict(flags.layer(args))
    layers: dict[str, dict[Place, Given]] = {side: {} for side in SIDES}
    for item in args.side_options or ():
        key, value = flags.split(item, "-o", "SIDE.KEY=VALUE")
        side, _, rest = key.partition(".")
        if side in SIDES and rest:
            layers[side][_place(side, rest)] = Given(value, f"-o {key}")
            continue
        if side not in _READERS:
            raise ConfigError(
                f"-o {key}: expected candidate.KEY=VALUE or reference.KEY=VALUE, an option of that "
                f"side's executor{nearest(side, SIDES)}"
            )
        shared[flags.option_place(key)] = Given(value, f"-o {key}")
    if args.candidate is not None:
        shared["plugins", "executor"] = Given(args.candidate, "--candidate")
    layers["reference"]["plugins", "executor"] = Given(args.reference, "--reference")
    file = Path(args.config) if args.config else None
    return (
        resolve(file, shared | layers["candidate"]),
        resolve(flags=layers["reference"], environ={}),
    )


def _place(side: str, key: str) -> Place:
    """The place of a runtime setting (``runtime.page_size``) or of an executor's option."""
    section, dot, name = key.partition(".")
    if not dot:
        return ("options", "executor", key)
    if section != "runtime":
        raise ConfigError(
            f"-o {side}.{key}: expected {side}.KEY=VALUE, an executor option, or "
            f"{side}.runtime.KEY=VALUE"
        )
    if name in _OURS:
        raise ConfigError(
            f"-o {side}.{key}: it follows from the prompts, --new-tokens and --chunk: set those"
        )
    if side == "reference" and name in _TWO_DTYPES:
        raise ConfigError(
            f"-o {side}.{key}: the reference runs in float32 and in the candidate's dtype: set "
            f"candidate.{key}"
        )
    return ("runtime", name)


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


def choices(config: RunConfig, reference: RunConfig) -> "tuple[Choice, Choice]":
    """Candidate and reference. Raises ConfigError when they are identical."""
    from tilewright_compare import Choice

    trusted = Choice(
        executor=reference.plugins.executor,
        options=reference.options.get("executor", {}),
        runtime=reference.runtime,
        loader=config.plugins.loader,
        model_format=config.model.format,
        other_options=_reader_options(config),
    )
    others = {k: v for k, v in config.options.items() if k != "executor"}
    tried = evolve(
        trusted,
        executor=config.plugins.executor,
        options=config.options.get("executor", {}),
        runtime=config.runtime,
        kv_allocator=config.plugins.kv_allocator,
        other_options=others,
    )
    if tried == trusted:
        raise ConfigError(
            f"candidate and reference are identical: executor {tried.executor!r} with the same "
            "settings; name another with --candidate, or set one with -o candidate.KEY=VALUE"
        )
    return evolve(tried, observers=config.plugins.observers), trusted


def _reader_options(config: RunConfig) -> dict[str, Mapping[str, Any]]:
    return {kind: given for kind, given in config.options.items() if kind in _READERS}


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

    loader, options = config.plugins.loader, _reader_options(config)
    with LLMEngine.from_plugins(loader=loader, options=options) as engine:
        loaded = engine.load(config.model.path, config.model.format)
        model = fingerprint(loaded)
        loaded.weights.close()
    text, limit, page_size = (
        Text(loaded.text),
        loaded.config.context_length,
        tried.runtime.page_size,
    )
    if prompts is None and earlier:
        plan = Plan(
            prompts=[list(ids) for ids in earlier.made["prompts"]],
            new_tokens=args.new_tokens or earlier.made["new_tokens"],
            chunk=args.chunk or earlier.made["chunk"],
            page_size=page_size or earlier.runtime["page_size"],
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


def wider(
    comparison: "Comparison", candidate: Resolved, reference: Resolved, args: argparse.Namespace
) -> str:
    """The command that reaches more: without the user's prompts and steps, and without the page
    size, unless only that tells the two sides apart; or in smaller pages where the candidate does
    not declare any. Empty if there is none."""
    from tilewright_compare.coverage import CROSSED, THIRD_PAGE
    from tilewright_compare.default_run import PAGE_SIZE

    if not (comparison.finished and comparison.unreached):
        return ""
    given = args.against or any(("prompts", k) in candidate.origins for k in ("text", "file"))
    paged = any(i.name in (CROSSED, THIRD_PAGE) and not i.reached for i in comparison.coverage)
    small = not comparison.tiles_declared and paged
    small = small and candidate.config.runtime.page_size != PAGE_SIZE
    tried, trusted = choices(candidate.config, reference.config)
    runtime = evolve(trusted.runtime, page_size=tried.runtime.page_size)
    differ = evolve(trusted, runtime=runtime) != evolve(tried, observers=())
    dropped = [*_OURS, "page_size"] if small or differ else list(_OURS)
    page = differ and tried.runtime.page_size
    if not (given or page or args.new_tokens or args.chunk or small):
        return ""
    words = ["tilewright", "compare"]
    for side, resolved in zip(SIDES, (candidate, reference), strict=True):
        words += _settings(side, resolved, dropped)
    if small:
        words += ["-o", f"candidate.runtime.page_size={PAGE_SIZE}"]
    if args.isolate:
        words.append("--isolate")
    for text in args.tolerances:
        words += ["--tolerance", text]
    return shlex.join([*words, "--strict"])


def _settings(side: str, resolved: Resolved, dropped: Sequence[str]) -> Iterator[str]:
    """The flags that repeat a side's settings, without prompts, the dropped runtime settings and
    what the environment gives."""
    config = resolved.config
    for place, origin in resolved.origins.items():
        if origin.startswith(ENVIRONMENT_PREFIX):
            continue
        match place:
            case ("plugins", "executor") if (
                side != "reference" or config.plugins.executor != "torch"
            ):
                yield from (f"--{side}", config.plugins.executor)
            case ("plugins", "loader") if config.plugins.loader:
                yield from ("--loader", config.plugins.loader)
            case ("model", "path"):
                yield from ("--model", config.model.path)
            case ("model", "format") if config.model.format:
                yield from ("--format", config.model.format)
            case ("options", kind, *names) if kind in ("executor", *_READERS):
                value: Any = config.options[kind]
                for name in names:
                    value = value[name]
                key = ".".join([side if kind == "executor" else kind, *names])
                yield from ("-o", f"{key}={_as_flag(value)}")
            case ("runtime", name) if name not in dropped:
                value = getattr(config.runtime, name)
                yield from ("-o", f"{side}.runtime.{name}={_as_flag(value)}")


def _as_flag(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


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
    from tilewright_compare.report import record, text

    if as_json:
        write_json(record(comparison), file)
        return
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
