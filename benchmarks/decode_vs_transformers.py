"""Prefill and decode of one prompt, against transformers' own generate on the same weights.

Both run in this process, one after the other in every round, so that other load on the machine
affects both alike; the ratio is the median over the rounds. Prefill lasts until the first new
token, decode is all tokens after it; both sides choose tokens greedily.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from load_memory import write_random_model

from tilewright import GenerateConfig, LLMEngine, RuntimeConfig
from tilewright.types import DType

SIDES = ("tilewright", "transformers")
PHASES = ("prefill", "decode")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", type=Path, help="model directory; default: random weights of Qwen3-0.6B's shape"
    )
    parser.add_argument(
        "--dtype",
        nargs="+",
        default=["float32", "bfloat16"],
        choices=["float32", "bfloat16", "float16"],
    )
    parser.add_argument("--prompt-tokens", type=int, default=256, help="prompt length (256)")
    parser.add_argument("--new-tokens", type=int, default=33, help="tokens to generate (33)")
    parser.add_argument(
        "--rounds", type=int, default=9, help="measured rounds, after a warm-up (9)"
    )
    parser.add_argument("--threads", type=int, help="threads of torch; default: torch's choice")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or write_random_model(Path(folder, "model"))
        for dtype in args.dtype:
            rows.append(compared(model, dtype, args.prompt_tokens, args.new_tokens, args.rounds))
            if not args.json:
                print_row(rows[-1])
    if args.json:
        report = {
            "model": str(args.model or "Qwen3-0.6B shape"),
            "threads": torch.get_num_threads(),
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "native_bfloat16": torch.ops.mkldnn._is_mkldnn_bf16_supported(),
            "rows": rows,
        }
        print(json.dumps(report, indent=2))


def compared(
    model: Path, dtype: DType, prompt_tokens: int, new_tokens: int, rounds: int
) -> dict[str, Any]:
    """Median tokens a second of both sides, and the median of the rounds' ratios."""
    speeds: dict[str, dict[str, list[float]]] = {p: {s: [] for s in SIDES} for p in PHASES}
    tokens: dict[str, list[int]] = {}
    chance = random.Random(0)
    with ours(model, dtype, prompt_tokens + new_tokens) as run_ours:
        run = {"tilewright": run_ours, "transformers": theirs(model, dtype)}
        for number in range(rounds + 1):
            prompt = [chance.randrange(3, 1000) for _ in range(prompt_tokens)]
            for side in SIDES if number % 2 else reversed(SIDES):
                tokens[side], prefill, decode = run[side](prompt, new_tokens)
                if number > 0:
                    speeds["prefill"][side].append(prompt_tokens / prefill)
                    speeds["decode"][side].append((new_tokens - 1) / decode)
    row: dict[str, Any] = {
        "dtype": dtype,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "same_tokens": tokens["tilewright"] == tokens["transformers"],
    }
    for phase, of_side in speeds.items():
        ratios = [a / b for a, b in zip(*of_side.values(), strict=True)]
        row[phase] = {side: statistics.median(of_side[side]) for side in SIDES} | {
            "ratio": statistics.median(ratios),
            "ratios": sorted(ratios),
        }
    return row


@contextmanager
def ours(model: Path, dtype: DType, length: int) -> Iterator[Any]:
    with LLMEngine.from_plugins() as engine:
        runtime = RuntimeConfig(weight_dtype=dtype, max_seq_len=length + 1, max_batch_size=1)
        engine.init_model("model", model, runtime)

        def run(prompt: list[int], new_tokens: int) -> tuple[list[int], float, float]:
            config = GenerateConfig(max_new_tokens=new_tokens, temperature=0.0, ignore_eos=True)
            result = engine.generate_result("model", prompt, config)
            timings = result.timings
            return list(result.token_ids), timings.prefill_seconds, timings.decode_seconds

        yield run


def theirs(directory: Path, dtype: DType) -> Any:
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.generation.streamers import BaseStreamer
    from transformers.utils import logging

    logging.disable_progress_bar()
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype))
    model: Any = loaded.eval()  # its own types do not let generate() be called

    class Clock(BaseStreamer):  # type: ignore[misc]
        """Notes when each token comes; the prompt comes first."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: torch.Tensor) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    def run(prompt: list[int], new_tokens: int) -> tuple[list[int], float, float]:
        config = GenerationConfig(
            max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        clock = Clock()
        started = time.perf_counter()
        ids = model.generate(torch.tensor([prompt]), generation_config=config, streamer=clock)
        first, last = clock.times[1], clock.times[-1]
        return ids[0, len(prompt) :].tolist(), first - started, last - first

    return run


def print_row(row: dict[str, Any]) -> None:
    for phase in PHASES:
        tilewright, transformers = (row[phase][side] for side in SIDES)
        print(
            f"{row['dtype']:<9} {phase:<8} {tilewright:8.1f} tokens/s  transformers "
            f"{transformers:8.1f}  ratio {row[phase]['ratio']:.2f}",
            flush=True,
        )
    print(f"{row['dtype']:<9} the same tokens in the last round: {row['same_tokens']}")


if __name__ == "__main__":
    main()
