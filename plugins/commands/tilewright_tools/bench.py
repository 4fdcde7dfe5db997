"""Measure the speed of prefill and decode.

The times are those that the engine reports.
"""

import argparse
import json
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from statistics import median
from typing import TYPE_CHECKING, Any

from attrs import asdict, frozen

from tilewright import __version__
from tilewright.cli import flags
from tilewright.cli.session import open_engine
from tilewright.config import resolve
from tilewright.errors import ConfigError
from tilewright.types import GenerateConfig

if TYPE_CHECKING:
    from tilewright.engine import LLMEngine

tilewright_api = 2

_SEED = 0


def configure(parser: argparse.ArgumentParser) -> None:
    parser.usage = "tilewright bench [options]"
    parser.description = (
        "Measure prefill and decode in tokens per second: the median of several rounds, for every "
        "combination of batch size and prompt length. Prompts are random tokens."
    )
    group = parser.add_argument_group("measurement")
    lists: dict[str, Any] = {"type": flags.positive, "nargs": "+", "metavar": "N"}
    group.add_argument("--batch", default=[1], help="prompts per batch (1)", **lists)
    group.add_argument("--prompt-tokens", default=[128], help="tokens per prompt (128)", **lists)
    group.add_argument(
        "--new-tokens",
        type=flags.positive,
        default=64,
        metavar="N",
        help="tokens to generate per prompt (64)",
    )
    group.add_argument(
        "--repeat", type=flags.positive, default=5, metavar="N", help="measured rounds (5)"
    )
    group.add_argument(
        "--warmup",
        type=flags.natural,
        default=1,
        metavar="N",
        help="rounds before the measured ones (1)",
    )
    group.add_argument("--json", action="store_true", help="print one JSON object")
    flags.add_engine_flags(parser)


def run(args: argparse.Namespace) -> int:
    resolved = resolve(flags=flags.layer(args))
    config = resolved.config
    out = sys.stdout
    # What plugins print is not part of the report.
    with redirect_stdout(sys.stderr), open_engine(resolved) as engine:
        model = engine.model(config.model.id)
        _check_lengths(args, model.runtime.max_batch_size, model.runtime.max_seq_len)
        figures = []
        if not args.json:
            print(_ROW.format("batch", "prompt", "new", "prefill", "decode"), file=out)
        for figure in _measure(engine, config.model.id, args):
            figures.append(figure)
            if not args.json:
                print(_row(figure), file=out, flush=True)
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
        else:
            print("prefill and decode in tokens/s, medians", file=out)
    return 0


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


def _measure(engine: "LLMEngine", model_id: str, args: argparse.Namespace) -> Iterator[Figure]:
    chance = random.Random(_SEED)
    vocab_size = engine.model(model_id).loaded.config.vocab_size
    for batch in args.batch:
        for length in args.prompt_tokens:
            rounds = [
                _round(
                    engine,
                    model_id,
                    [[chance.randrange(vocab_size) for _ in range(length)] for _ in range(batch)],
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
    config = GenerateConfig(max_new_tokens=new_tokens, temperature=0.0, ignore_eos=True, seed=_SEED)
    timings = [r.timings for r in engine.generate_batch(model_id, prompts, config)]
    prefill, decode = (
        max(t.prefill_seconds for t in timings),
        max(t.decode_seconds for t in timings),
    )
    decoded = sum(t.new_tokens - 1 for t in timings)
    return (
        sum(t.prompt_tokens for t in timings) / prefill,
        decoded / decode if decoded else 0.0,
    )


def _check_lengths(args: argparse.Namespace, max_batch_size: int, max_seq_len: int) -> None:
    if max(args.batch) > max_batch_size:
        raise ConfigError(
            f"--batch {max(args.batch)} is above max_batch_size = {max_batch_size}, so the batch "
            "would run in parts: lower it, or raise --max-batch-size if the executor allows it"
        )
    longest = max(args.prompt_tokens) + args.new_tokens
    if longest > max_seq_len:
        raise ConfigError(
            f"--prompt-tokens {max(args.prompt_tokens)} and --new-tokens {args.new_tokens} make "
            f"{longest} tokens, above max_seq_len = {max_seq_len}: lower them"
        )
