"""Prefill and decode of one prompt on one side alone, as the only one in its process.

For sides that share a library's threads: see README.md.
"""

import argparse
import random
import statistics
from pathlib import Path

import peers
import torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--side", choices=("plain", "compiled", "llama.cpp"), required=True)
    parser.add_argument("--model", type=Path, required=True, help="model directory")
    parser.add_argument("--dtype", default="bfloat16", help="dtype of the weights (bfloat16)")
    parser.add_argument("--prompt-tokens", type=int, default=256, help="prompt length (256)")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens to generate (64)")
    parser.add_argument("--rounds", type=int, default=4, help="measured prompts, after one (4)")
    parser.add_argument("--threads", type=int, default=2, help="threads (2)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    length = args.prompt_tokens + args.new_tokens + 1
    prompts = peers.random_prompts(peers.config_of(args.model), 1, args.prompt_tokens)
    chance = random.Random(0)
    if args.side == "llama.cpp":
        opened = peers.llama_cpp(args.model, args.dtype, length, args.threads)
    else:
        option = "compile=true" if args.side == "compiled" else None
        opened = peers.tilewright(args.model, args.dtype, 1, length, option)
    with opened as side:
        runs = [side.run(prompts(chance), args.new_tokens) for _ in range(args.rounds + 1)][1:]
    decode = statistics.median((args.new_tokens - 1) / run.decode_seconds for run in runs)
    prefill = statistics.median(args.prompt_tokens / run.prefill_seconds for run in runs)
    print(f"{side.label}: decode {decode:.1f}, prefill {prefill:.0f} tokens/s")


if __name__ == "__main__":
    main()
