"""Prefill and decode of one prompt: Tilewright, llama.cpp and transformers on the same weights.

Prefill lasts until the first new token, decode is all tokens after it; all sides choose greedily.
With several --prompt-tokens, the table shows decode by the length of the context instead. int8 and
int4 are Q8_0 and Q4_0 for llama.cpp, whose times are its own; transformers runs floats only.
"""

import argparse
from statistics import median
from typing import Any

import peers
from peers import LLAMA_CPP, TRANSFORMERS, Rounds, Run, Side, agreeing, ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    peers.add_flags(parser, ["bfloat16"], [LLAMA_CPP, TRANSFORMERS], rounds=5)
    parser.add_argument(
        "--prompt-tokens", type=int, nargs="+", default=[256], help="prompt length (256)"
    )
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens to generate (64)")
    args = parser.parse_args()
    rows, rates = [], []
    with peers.model_of(args) as model:
        config = peers.config_of(model)
        length = max(args.prompt_tokens) + args.new_tokens + 1
        with peers.sides_of(args, model, 1, length, [LLAMA_CPP, TRANSFORMERS]) as sides:
            for prompt_tokens in args.prompt_tokens:
                prompts = peers.random_prompts(config, 1, prompt_tokens)
                rounds = peers.alternate(sides, args.rounds, args.new_tokens, prompts)
                rows += [figures(side, rounds, prompt_tokens) for side in sides]
                rates += rounds.read_rates
    if len(args.prompt_tokens) > 1:
        print_by_context(rows, args.prompt_tokens)
    else:
        print_by_weights(rows)
    peers.report(args, rows, rates)


def figures(side: Side, rounds: Rounds, prompt_tokens: int) -> dict[str, Any]:
    """Tokens per second of a side, with its ratios to other sides in the same rounds."""
    runs = rounds.runs[side]
    decode, prefill = decode_rates(runs), prefill_rates(runs, prompt_tokens)
    row: dict[str, Any] = {
        "side": side.label,
        "dtype": side.dtype,
        "prompt_tokens": prompt_tokens,
        "new_tokens": len(runs[0].tokens[0]),
        "decode": median(decode),
        "prefill": median(prefill),
        "weight_bytes": side.weight_bytes,
        "read_fraction": ratio([rate * side.weight_bytes for rate in decode], rounds.read_rates),
        "decode_rounds": decode,
        "prefill_rounds": prefill,
    }
    for other, others in rounds.runs.items():
        if other.dtype == side.dtype and other.name == LLAMA_CPP:
            row["decode_to_llama_cpp"] = ratio(decode, decode_rates(others))
            row["prefill_to_llama_cpp"] = ratio(prefill, prefill_rates(others, prompt_tokens))
        if other.name == side.name and other.dtype == "bfloat16":
            row["decode_to_bfloat16"] = ratio(decode, decode_rates(others))
        if other.dtype == side.dtype and "same_tokens" not in row:  # Tilewright comes first
            row["same_tokens"] = agreeing(runs[-1], others[-1])
    return row


def decode_rates(runs: list[Run]) -> list[float]:
    return [(len(run.tokens[0]) - 1) / run.decode_seconds for run in runs]


def prefill_rates(runs: list[Run], prompt_tokens: int) -> list[float]:
    return [prompt_tokens / run.prefill_seconds for run in runs]


def print_by_weights(rows: list[dict[str, Any]]) -> None:
    headings = ["side", "decode", "x llama.cpp", "x its BF16", "of memory's rate", "prefill"]
    peers.print_table(
        [*headings, "x llama.cpp", "tokens in common"],
        [
            [
                row["side"],
                f"{row['decode']:.1f}",
                times(row, "decode_to_llama_cpp"),
                times(row, "decode_to_bfloat16"),
                f"{row['read_fraction']:.2f}",
                f"{row['prefill']:.0f}",
                times(row, "prefill_to_llama_cpp"),
                f"{row['same_tokens']} of {row['new_tokens']}",
            ]
            for row in rows
        ],
    )


def times(row: dict[str, Any], key: str) -> str:
    return f"{row[key]:.2f}" if key in row else "-"


def print_by_context(rows: list[dict[str, Any]], lengths: list[int]) -> None:
    """One line a side: decode at each length, and what is left at the last of that at the first."""
    by_side: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_side.setdefault(row["side"], []).append(row)
    peers.print_table(
        [
            "decode at a context of",
            *map(str, lengths),
            *(f"{n} / {lengths[0]}" for n in lengths[1:]),
        ],
        [
            [
                side,
                *(f"{row['decode']:.1f}" for row in found),
                *(
                    f"{ratio(row['decode_rounds'], found[0]['decode_rounds']):.2f}"
                    for row in found[1:]
                ),
            ]
            for side, found in by_side.items()
        ],
    )


if __name__ == "__main__":
    main()
