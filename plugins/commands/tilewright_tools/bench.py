"""Measure how fast a model is served.

Times of batches are those that the engine reports. Requests that arrive over time are measured by
their callers (bench_serving.py).
"""

import argparse
import json
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from math import nan
from statistics import median
from typing import TYPE_CHECKING, Any

from attrs import asdict, evolve, frozen

from tilewright import __version__
from tilewright.cli import flags
from tilewright.cli.session import open_engine
from tilewright.config import resolve
from tilewright.errors import ConfigError
from tilewright.types import GenerateConfig, ResolvedRuntime
from tilewright_tools import bench_serving
from tilewright_tools.bench_serving import ServingFigure, random_tokens, table

if TYPE_CHECKING:
    from tilewright.engine import LLMEngine

tilewright_api = 2

_SEED = 0


def configure(parser: argparse.ArgumentParser) -> None:
    parser.usage = "tilewright bench [options]"
    parser.description = (
        "Measure prefill and decode in tokens per second: the median of several rounds, for every "
        "combination of batch size and prompt length, without reuse of the KV cache. With "
        "--request-rate or --concurrency, measure instead what the callers of requests that "
        "arrive over time see: the time to the first token and between tokens, and the "
        "throughput. Prompts are random tokens."
    )
    group = parser.add_argument_group("measurement")
    lists: dict[str, Any] = {"nargs": "+", "metavar": "N"}
    group.add_argument(
        "--prompt-tokens",
        type=flags.positive,
        default=[128],
        help="tokens per prompt (128)",
        **lists,
    )
    group.add_argument(
        "--new-tokens",
        type=flags.positive,
        default=64,
        metavar="N",
        help="tokens to generate per prompt (64)",
    )
    group.add_argument(
        "--warmup",
        type=flags.natural,
        default=1,
        metavar="N",
        help="rounds, or requests, before the measured ones (1)",
    )
    group.add_argument("--json", action="store_true", help="print one JSON object")
    group = parser.add_argument_group("batches")
    group.add_argument("--batch", type=flags.positive, help="prompts per batch (1)", **lists)
    group.add_argument("--repeat", type=flags.positive, metavar="N", help="measured rounds (5)")
    group = parser.add_argument_group("requests over time")
    group.add_argument(
        "--request-rate",
        type=_rate,
        nargs="+",
        metavar="X",
        help="requests per second, as a Poisson process; inf: all at once",
    )
    group.add_argument(
        "--concurrency",
        type=flags.positive,
        help="callers, each of which sends a request when its last one has ended",
        **lists,
    )
    group.add_argument(
        "--num-requests", type=flags.positive, metavar="N", help="measured requests (64)"
    )
    group.add_argument(
        "--shared-prefix-tokens",
        type=flags.natural,
        metavar="N",
        help="tokens at the beginning of each prompt that all prompts share (0)",
    )
    flags.add_engine_flags(parser)


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = nan
    if not rate > 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, or inf, found {text!r}")
    return rate


def run(args: argparse.Namespace) -> int:
    serving = bool(args.request_rate or args.concurrency)
    (_complete_serving if serving else _complete_batches)(args)
    resolved = resolve(flags=flags.layer(args))
    if not serving:  # a page that is found is not computed
        runtime = evolve(resolved.config.runtime, prefix_cache=False)
        resolved = evolve(resolved, config=evolve(resolved.config, runtime=runtime))
    config = resolved.config
    out = sys.stdout
    # What plugins print is not part of the report.
    with redirect_stdout(sys.stderr), open_engine(resolved) as engine:
        model = engine.model(config.model.id)
        _check_lengths(args, model.runtime)
        figures: list[Figure | ServingFigure] = []
        if not (serving or args.json):
            print(_ROW.format("batch", "prompt", "new", "prefill", "decode"), file=out)
        measure = _measure_serving if serving else _measure
        for figure in measure(engine, config.model.id, args):
            figures.append(figure)
            if not args.json:
                shown = _row(figure) if isinstance(figure, Figure) else table(figure)
                print(shown, file=out, flush=True)
        if args.json:
            report = {
                "tilewright": __version__,
                "model": config.model.path,
                "plugins": asdict(config.plugins),
                "options": config.options,
                "runtime": asdict(model.runtime),
                "device": model.runtime.device,
                "load_seconds": model.load_seconds,
                "results": [asdict(figure) for figure in figures],
            }
            print(json.dumps(report, default=str), file=out)
        elif not serving:
            print("prefill and decode in tokens/s, medians", file=out)
    return 0


def _complete_batches(args: argparse.Namespace) -> None:
    """Check the flags of a measurement of batches, and set those that were not given."""
    for flag in ("--num-requests", "--shared-prefix-tokens"):
        if _given(args, flag):
            raise ConfigError(
                f"{flag} is for requests that arrive over time: give --request-rate or "
                "--concurrency too, or leave it out"
            )
    if getattr(args, "runtime.prefix_cache"):
        raise ConfigError(
            "--prefix-cache: batches are measured without reuse of the KV cache: leave it out, or "
            "measure requests over time with --request-rate or --concurrency"
        )
    args.batch = args.batch or [1]
    args.repeat = args.repeat or 5


def _complete_serving(args: argparse.Namespace) -> None:
    """Check the flags of a measurement of requests, and set those that were not given."""
    if args.request_rate and args.concurrency:
        raise ConfigError(
            "expected either --request-rate or --concurrency, found both: give one, since the "
            "callers of --concurrency decide when a request is sent"
        )
    for flag in ("--batch", "--repeat"):
        if _given(args, flag):
            raise ConfigError(
                f"{flag} is for batches: leave it out, or measure batches without --request-rate "
                "and --concurrency (how many requests run at once: --max-batch-size)"
            )
    args.num_requests = args.num_requests or 64
    args.shared_prefix_tokens = args.shared_prefix_tokens or 0
    callers = max(args.concurrency or [1])
    if callers > args.num_requests:
        raise ConfigError(
            f"--concurrency {callers} is above --num-requests {args.num_requests}, so some callers "
            "would send nothing: lower it, or raise --num-requests"
        )
    if args.shared_prefix_tokens > min(args.prompt_tokens):
        raise ConfigError(
            f"--shared-prefix-tokens {args.shared_prefix_tokens} is above --prompt-tokens "
            f"{min(args.prompt_tokens)}, which counts these too: lower it, or raise --prompt-tokens"
        )


def _given(args: argparse.Namespace, flag: str) -> bool:
    return getattr(args, flag.strip("-").replace("-", "_")) is not None


@frozen(kw_only=True)
class Figure:
    """Tokens per second of a whole batch: the median, and each round."""

    batch: int
    prompt_tokens: int
    new_tokens: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    prefill_rounds: list[float]
    decode_rounds: list[float]


_ROW = "{:>5} {:>6} {:>5} {:>10} {:>10}"


def _row(figure: Figure) -> str:
    return _ROW.format(
        figure.batch,
        figure.prompt_tokens,
        figure.new_tokens,
        f"{figure.prefill_tokens_per_second:.1f}",
        f"{figure.decode_tokens_per_second:.1f}",
    )


def _measure_serving(
    engine: "LLMEngine", model_id: str, args: argparse.Namespace
) -> Iterator[ServingFigure]:
    return bench_serving.measure(
        engine,
        model_id,
        _generation(args.new_tokens),
        request_rates=args.request_rate or (),
        concurrencies=args.concurrency or (),
        num_requests=args.num_requests,
        prompt_tokens=args.prompt_tokens,
        shared_prefix_tokens=args.shared_prefix_tokens,
        warmup=args.warmup,
    )


def _measure(engine: "LLMEngine", model_id: str, args: argparse.Namespace) -> Iterator[Figure]:
    chance = random.Random(_SEED)
    vocab_size = engine.model(model_id).loaded.config.vocab_size
    for batch in args.batch:
        for length in args.prompt_tokens:
            rounds = [
                _round(
                    engine,
                    model_id,
                    [random_tokens(chance, vocab_size, length) for _ in range(batch)],
                    args.new_tokens,
                )
                for _ in range(args.warmup + args.repeat)
            ][args.warmup :]
            prefill, decode = [r[0] for r in rounds], [r[1] for r in rounds]
            yield Figure(
                batch=batch,
                prompt_tokens=length,
                new_tokens=args.new_tokens,
                prefill_tokens_per_second=median(prefill),
                decode_tokens_per_second=median(decode),
                prefill_rounds=prefill,
                decode_rounds=decode,
            )


def _round(
    engine: "LLMEngine", model_id: str, prompts: Sequence[Sequence[int]], new_tokens: int
) -> tuple[float, float]:
    """Prefill and decode speed. A phase of a batch lasts as long as its slowest request."""
    results = engine.generate_batch(model_id, prompts, _generation(new_tokens))
    for result in results:
        if result.error:
            raise result.error
    timings = [result.timings for result in results]
    prefill, decode = (
        max(t.prefill_seconds for t in timings),
        max(t.decode_seconds for t in timings),
    )
    decoded = sum(t.new_tokens - 1 for t in timings)
    return (
        sum(t.prompt_tokens for t in timings) / prefill,
        decoded / decode if decoded else 0.0,
    )


def _generation(new_tokens: int) -> GenerateConfig:
    return GenerateConfig(max_new_tokens=new_tokens, temperature=0.0, ignore_eos=True, seed=_SEED)


def _check_lengths(args: argparse.Namespace, runtime: ResolvedRuntime) -> None:
    batch = max(args.batch or [1])
    if batch > runtime.max_batch_size:
        raise ConfigError(
            f"--batch {batch} is above max_batch_size = {runtime.max_batch_size}, so the batch "
            "would run in parts: lower it, or raise --max-batch-size if the executor allows it"
        )
    longest = max(args.prompt_tokens) + args.new_tokens
    pages = batch * -(-(longest - 1) // runtime.page_size)
    if args.batch and batch > 1 and pages > runtime.total_pages:
        raise ConfigError(
            f"--batch {batch} needs {pages} KV cache pages, above total_pages = "
            f"{runtime.total_pages}, so the batch would run in parts: lower it, or raise "
            "--total-pages"
        )
    if longest > runtime.max_seq_len:
        raise ConfigError(
            f"--prompt-tokens {max(args.prompt_tokens)} and --new-tokens {args.new_tokens} make "
            f"{longest} tokens, above max_seq_len = {runtime.max_seq_len}: lower them"
        )
