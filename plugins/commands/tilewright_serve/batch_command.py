"""Answer a file of requests in OpenAI's batch form.

Results go to a file, one line each; everything else goes to standard error.
"""

import argparse
import asyncio
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from time import monotonic
from typing import TYPE_CHECKING, Any

from attrs import asdict

from tilewright.cli import flags
from tilewright.cli.output import note
from tilewright.cli.session import LoadingBar, counting, naming_origins, open_engine
from tilewright.config import Resolved, resolve
from tilewright.paths import path_of

if TYPE_CHECKING:
    from tilewright.engine import LLMEngine
    from tilewright_serve.batch import Answer, Tally

tilewright_api = 2

_SECONDS_BETWEEN_LINES = 30.0
"""Time between two lines about the progress, where there is no bar."""

_UNBOUNDED = 2**31
"""The server's queue is bounded for many clients; a batch bounds what is in flight itself."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.usage = "tilewright batch [options] INPUT --output FILE"
    parser.description = (
        "Answer a file of requests in OpenAI's batch form: a JSON object with custom_id, method, "
        "url and body in each line. Results are added to the output as they come. A run that was "
        "interrupted or killed is continued by the same command, which answers the requests that "
        "have no result yet. The exit code is 1 if requests have failed."
    )
    parser.add_argument("input", metavar="INPUT", help="the requests, in a file of JSON lines")
    parser.add_argument(
        "--output",
        required=True,
        metavar="FILE",
        help="file to add a line to for each result; FILE.batch.json keeps what was asked",
    )
    parser.add_argument(
        "--max-in-flight",
        type=flags.positive,
        metavar="N",
        help="how many requests run or wait in the engine at once (2 * max_batch_size)",
    )
    parser.add_argument(
        "-m",
        "--model",
        metavar="[NAME=]MODEL",
        dest="named_model",
        help="registered name or directory of the model, and the name that requests call it by "
        "(the bundled demo model)",
    )
    flags.add_engine_flags(parser, model=False)


def run(args: argparse.Namespace) -> int:
    from tilewright_serve import batch
    from tilewright_serve.command import named_model, needing_extra, processors

    with needing_extra("serve"):
        import tilewright_serve.batch_answers  # noqa: F401
    chosen = named_model(args.named_model, "--model") if args.named_model else {}
    resolved = resolve(flags={**flags.layer(args), **chosen})
    model_id = resolved.config.model.id
    source, output = path_of(args.input), path_of(args.output)
    found = batch.survey(source, [model_id])
    asked = _asked(resolved)
    with batch.locked(output, source) as file:
        tally = batch.begin(file, found, asked)
        if tally.skipped:
            note(f"{output} has {tally.skipped} of {tally.total} results{_kept(tally)}")
        if tally.left:
            with open_engine(resolved, processors=processors()) as engine:
                # More than a step takes, so that one is ready when another one ends.
                usual = 2 * engine.model(model_id).runtime.max_batch_size
                in_flight = args.max_in_flight or usual
                answer = _answering(engine)
                try:
                    with redirect_stdout(sys.stderr), _reporting(tally) as report:
                        asyncio.run(batch.run(answer, found, file, tally, in_flight, report))
                finally:
                    note(_summary(tally))
        else:
            note(_summary(tally))
    return 1 if tally.failed or tally.skipped_failed else 0


def _answering(engine: "LLMEngine") -> "Answer":
    """What a server of this engine answers."""
    from tilewright_serve.batch_answers import answering
    from tilewright_serve.server import Server
    from tilewright_serve.settings import ServeSettings

    return answering(Server([engine], ServeSettings(max_queue=_UNBOUNDED)))


def _asked(resolved: Resolved) -> dict[str, Any]:
    """What results depend on, but for rounding.

    Sizes of batches and of the cache are not part of it, nor is the device, which a queue of jobs
    may choose: a run may be continued with others.
    """
    from tilewright.engine import LLMEngine
    from tilewright_packed.writer import fingerprint

    config = resolved.config
    readers = {
        kind: given for kind, given in config.options.items() if kind in ("loader", "weight_format")
    }
    bar = LoadingBar()  # a loader may have to download the model
    try:
        with (
            naming_origins(resolved),
            redirect_stdout(sys.stderr),
            LLMEngine.from_plugins(
                loader=config.plugins.loader,
                options=readers,
                observers=(bar,) if sys.stderr.isatty() else (),
            ) as engine,
        ):
            loaded = engine.load(config.model.path, config.model.format)
            model = fingerprint(loaded)
            loaded.weights.close()
    finally:
        bar.stop()
    templates = [loaded.text.chat_template, loaded.text.tool_chat_template]
    defaults = asdict(loaded.generation_defaults)
    text = json.dumps([model, templates, defaults], default=str)
    asked = {
        "model": hashlib.sha256(text.encode()).hexdigest(),
        "name of the model": config.model.id,
        "executor": config.plugins.executor,
        "sampler": config.plugins.sampler,
        "options": config.options,
        **{
            name: getattr(config.runtime, name)
            for name in ("weight_dtype", "kv_dtype", "max_seq_len")
        },
    }
    return dict(json.loads(json.dumps(asked, default=str)))


@contextmanager
def _reporting(tally: "Tally") -> "Iterator[Callable[[Tally], None]]":
    """What shows how far a run is: a bar on a terminal, a line now and then elsewhere."""
    started = told = monotonic()

    def speed(tally: "Tally") -> tuple[float, str]:
        seconds = max(monotonic() - started, 1e-9)
        rate = (tally.completed + tally.failed) / seconds
        return rate, f"{rate:.1f} requests/s, {tally.new_tokens / seconds:.1f} tokens/s"

    def tell(tally: "Tally") -> None:
        nonlocal told
        if monotonic() - told < _SECONDS_BETWEEN_LINES:
            return
        told = monotonic()
        rate, shown = speed(tally)
        left = timedelta(seconds=round(tally.left / rate))
        note(f"{tally.results} of {tally.total} results; {shown}; {left} left")

    if not sys.stderr.isatty():
        yield tell
        return
    from rich.progress import TimeRemainingColumn

    bar = counting(tally.left, TimeRemainingColumn())
    try:
        yield lambda tally: bar.update(
            bar.task_ids[0],
            description=speed(tally)[1],
            completed=tally.completed + tally.failed,
        )
    finally:
        bar.stop()


def _kept(tally: "Tally") -> str:
    if not tally.skipped_failed:
        return ""
    return (
        f", {tally.skipped_failed} of them failures, which stay: delete their lines to have these "
        "requests answered again"
    )


def _summary(tally: "Tally") -> str:
    failed = f", {tally.skipped_failed} of them failures" if tally.skipped_failed else ""
    skipped = f"{tally.skipped} skipped that an earlier run has done{failed}"
    left = f"; {tally.left} left, which the same command answers" if tally.left else ""
    return f"{tally.completed} completed, {tally.failed} failed, {skipped}{left}"
