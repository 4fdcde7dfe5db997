"""Total decode speed of batches: Tilewright and vLLM's CPU build on the same weights.

Both take the same prompts at once, choose greedily, and detokenise. Decode lasts from when the last
prompt has its first new token until all have their last one.
"""

import argparse
from statistics import median
from typing import Any

import peers
from peers import VLLM, Rounds, Run, Side, agreeing, ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    peers.add_flags(parser, ["bfloat16"], [VLLM], rounds=5)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16], help="(1 4 16)")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="prompt length (128)")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens to generate (32)")
    args = parser.parse_args()
    rows, rates = [], []
    with peers.model_of(args) as model:
        config = peers.config_of(model)
        length = args.prompt_tokens + args.new_tokens + 1
        with peers.sides_of(args, model, max(args.batch), length, [VLLM]) as sides:
            for batch in args.batch:
                prompts = peers.random_prompts(config, batch, args.prompt_tokens)
                rounds = peers.alternate(sides, args.rounds, args.new_tokens, prompts)
                rows += [figures(side, rounds) for side in sides]
                rates += rounds.read_rates
    peers.print_table(
        ["total decode at a batch of", *(f"{batch}" for batch in args.batch), "x vLLM at each"],
        [line(side, rows) for side in sides],
    )
    peers.report(args, rows, rates)


def figures(side: Side, rounds: Rounds) -> dict[str, Any]:
    """Total tokens per second of a side, with its ratio to vLLM in the same rounds."""
    runs = rounds.runs[side]
    decode = decode_rates(runs)
    row: dict[str, Any] = {
        "side": side.label,
        "dtype": side.dtype,
        "batch": len(runs[0].tokens),
        "decode": median(decode),
        "prefill_seconds": median(run.prefill_seconds for run in runs),
        "decode_rounds": decode,
    }
    for other, others in rounds.runs.items():
        if other.dtype == side.dtype and other.name == VLLM:
            row["decode_to_vllm"] = ratio(decode, decode_rates(others))
        if other.dtype == side.dtype and "same_tokens" not in row:  # Tilewright comes first
            row["same_tokens"] = agreeing(runs[-1], others[-1])
    return row


def decode_rates(runs: list[Run]) -> list[float]:
    return [sum(len(ids) - 1 for ids in run.tokens) / run.decode_seconds for run in runs]


def line(side: Side, rows: list[dict[str, Any]]) -> list[str]:
    found = [row for row in rows if row["side"] == side.label]
    ratios = [f"{row['decode_to_vllm']:.2f}" for row in found if "decode_to_vllm" in row]
    return [side.label, *(f"{row['decode']:.1f}" for row in found), " / ".join(ratios) or "-"]


if __name__ == "__main__":
    main()
