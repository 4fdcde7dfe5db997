"""What an option of the torch executor costs at the start of a process, compile=true by default.

Each measurement is a process of its own, timed from its start until the model is loaded, until the
first token of a prompt, and until the last of 16. The option's first start finds an empty cache
(HOME and XDG_CACHE_HOME are a new folder), its later ones what the first has left there;
they alternate with starts without the option.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import peers

MOMENTS = ("load", "first token", "last token")
NEW_TOKENS = 16


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(**json.loads(sys.argv[2]))))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    peers.add_flags(parser, ["bfloat16"], [], rounds=3)
    parser.add_argument("--prompt-tokens", type=int, default=128, help="prompt length (128)")
    args = parser.parse_args()
    rows = []
    with peers.model_of(args) as model:
        for dtype in args.dtype:
            for option in args.option or ["compile=true"]:
                rows += starts(args, model, dtype, option)
    peers.print_table(
        ["seconds until", *MOMENTS, "cache on disk, MB"],
        [
            [
                f"{row['side']} {row['dtype']}, {row['start']}",
                *(f"{median(row[moment]):.1f}" for moment in MOMENTS),
                f"{row['cache_bytes'] / 1e6:.1f}",
            ]
            for row in rows
        ],
    )
    peers.report(args, rows, [])


def starts(args: argparse.Namespace, model: Path, dtype: str, option: str) -> list[dict[str, Any]]:
    """Seconds of each start without the option, of the first one with it, and of later ones."""
    with tempfile.TemporaryDirectory() as cache:

        def start(option: str | None) -> dict[str, float]:
            asked = {
                "model": str(model),
                "dtype": dtype,
                "option": option,
                "threads": args.threads,
                "prompt_tokens": args.prompt_tokens,
            }
            began = time.monotonic()
            done = subprocess.run(
                [sys.executable, __file__, "--measure", json.dumps(asked)],
                env=os.environ | {"HOME": cache, "XDG_CACHE_HOME": f"{cache}/.cache"},
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            ended: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
            return {moment: at - began for moment, at in ended.items()}

        start(None)  # files into the system's cache
        first = start(option)
        size = sum(file.stat().st_size for file in Path(cache).rglob("*") if file.is_file())
        rounds = [(start(None), start(option)) for _ in range(args.rounds)]
    plain, later = zip(*rounds, strict=True)
    found = {
        (None, "every start"): plain,
        (option, "first start"): [first],
        (option, "later starts"): later,
    }
    return [
        {
            "side": peers.side_name(with_option),
            "dtype": dtype,
            "start": which,
            "cache_bytes": size if with_option else 0,
            **{moment: [times[moment] for times in runs] for moment in MOMENTS},
        }
        for (with_option, which), runs in found.items()
    ]


def measure(
    model: str, dtype: str, option: str | None, threads: int | None, prompt_tokens: int
) -> dict[str, float]:
    """When each moment was, on the clock that all processes share."""
    import torch

    from tilewright import GenerateConfig, RuntimeConfig

    if threads:
        torch.set_num_threads(threads)
    length = prompt_tokens + NEW_TOKENS + 1
    runtime = RuntimeConfig(weight_dtype=dtype, max_seq_len=length, max_batch_size=1)
    config = GenerateConfig(max_new_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
    with peers.engine(option) as engine:
        loaded = engine.init_model("model", model, runtime)
        load = time.monotonic()
        most = min(loaded.config.vocab_size, 1000)
        prompt = random.Random(0).choices(range(3, most), k=prompt_tokens)
        result = engine.generate_result("model", prompt, config)
    first = load + result.timings.prefill_seconds
    return dict(zip(MOMENTS, (load, first, first + result.timings.decode_seconds), strict=True))


if __name__ == "__main__":
    main()
