"""Time and memory of comparing pypto-npu with torch at Qwen3-14B's width, in two layers.

The candidate runs on platform emulated; the reference streams its weights. Memory is RssAnon of
/proc/self/status, sampled every 5 ms, minus its value at the start, relative to the bytes of the
weights: pages of the checkpoint, which the system can drop, do not count. The vocabulary is small,
so that the layers dominate.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from load_memory import QWEN3_0_6B, checkpoint_bytes, watched, write_random_model

QWEN3_14B_LAYERS = QWEN3_0_6B | {
    "vocab_size": 4096,
    "hidden_size": 5120,
    "intermediate_size": 17408,
    "num_hidden_layers": 2,
    "num_attention_heads": 40,
    "tie_word_embeddings": False,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt-tokens", type=int, default=40)
    parser.add_argument("--new-tokens", type=int, default=3)
    parser.add_argument("--in-memory", action="store_true", help="do not stream the reference")
    args = parser.parse_args()

    import torch

    from tilewright_compare import Choice, compare

    torch.mm(torch.ones(64, 64), torch.ones(64, 64))
    with tempfile.TemporaryDirectory() as folder:
        model = write_random_model(Path(folder, "model"), QWEN3_14B_LAYERS)
        started = time.perf_counter()
        with watched() as seen:
            found = compare(
                model,
                Choice(executor="torch", options={"stream_weights": not args.in_memory}),
                Choice(executor="pypto-npu", options={"platform": "emulated"}),
                [[7 + i for i in range(args.prompt_tokens)]],
                new_tokens=args.new_tokens,
            )
        weights, peak = checkpoint_bytes(model), max(seen) - seen[0]
    print(
        json.dumps(
            {
                "sentence": found.sentence,
                "seconds": round(time.perf_counter() - started, 1),
                "weights_bytes": weights,
                "peak_bytes": peak,
                "ratio": round(peak / weights, 2),
            }
        )
    )
    sys.exit(0 if found.equal else 1)


if __name__ == "__main__":
    main()
