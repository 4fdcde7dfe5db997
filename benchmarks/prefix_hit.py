"""Time to the first token of a prompt whose beginning is in the KV cache, and of one that is new.

Both prompts have --prefix-tokens and --tail-tokens, and one new token is made. In each round a new
prefix comes first, and then the same one with another tail. Whole pages of the prefix are found.
"""

import argparse
import random
from statistics import median
from typing import Any

import peers

from tilewright import GenerateConfig, LLMEngine, RuntimeConfig
from tilewright.types import Timings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    peers.add_flags(parser, ["bfloat16", "float32"], [], rounds=7)
    parser.add_argument("--prefix-tokens", type=int, default=1000, help="shared tokens (1000)")
    parser.add_argument("--tail-tokens", type=int, default=32, help="new tokens (32)")
    args = parser.parse_args()
    rows = []
    with peers.model_of(args) as model:
        length = args.prefix_tokens + args.tail_tokens + 2
        for dtype in args.dtype:
            for option in (None, *args.option):
                runtime = RuntimeConfig(weight_dtype=dtype, max_seq_len=length, max_batch_size=1)
                with peers.engine(option) as engine:
                    engine.init_model("model", model, runtime)
                    rows.append(measure(engine, args, peers.side_name(option), dtype))
    peers.print_table(
        ["time to first token, ms", "new prompt", "prefix known", "ratio", "tokens found"],
        [
            [
                f"{row['side']} {row['dtype']}",
                f"{row['new_seconds'] * 1e3:.0f}",
                f"{row['known_seconds'] * 1e3:.0f}",
                f"{row['ratio']:.3f}",
                f"{row['cached_tokens']}",
            ]
            for row in rows
        ],
    )
    peers.report(args, rows, [])


def measure(engine: LLMEngine, args: argparse.Namespace, name: str, dtype: str) -> dict[str, Any]:
    chance = random.Random(0)
    most = min(engine.model("model").loaded.config.vocab_size, 1000)

    def tokens(count: int) -> list[int]:
        return [chance.randrange(3, most) for _ in range(count)]

    def first_token(prompt: list[int]) -> Timings:
        config = GenerateConfig(max_new_tokens=1, temperature=0.0)
        return engine.generate_result("model", prompt, config).timings

    pairs = []
    for _ in range(args.rounds + 1):  # the first to warm up
        prefix = tokens(args.prefix_tokens)
        pairs.append([first_token(prefix + tokens(args.tail_tokens)) for _ in range(2)])
    new, known = zip(*pairs[1:], strict=True)
    new_seconds = [t.prefill_seconds for t in new]
    known_seconds = [t.prefill_seconds for t in known]
    return {
        "side": name,
        "dtype": dtype,
        "new_seconds": median(new_seconds),
        "known_seconds": median(known_seconds),
        "ratio": peers.ratio(known_seconds, new_seconds),
        "cached_tokens": known[-1].cached_tokens,
        "new_rounds": new_seconds,
        "known_rounds": known_seconds,
    }


if __name__ == "__main__":
    main()
