"""What the engine itself costs per generated token, with an executor that computes nothing.

The executor returns ready logits of a vocabulary of 1,024. The scheduler, the paged allocator, the
greedy sampler and the requests are the product's own. One row per number of running requests and
length of their prompts, and one with detokenisation. Full pages are committed for reuse, as by
default.

    OMP_NUM_THREADS=1 python benchmarks/engine_cost.py
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence

import torch

from tilewright import plugins
from tilewright.kv_cache import KvCacheManager
from tilewright.loading import ServedModel
from tilewright.plugins import Observers
from tilewright.request import Request
from tilewright.runner import Runner
from tilewright.settings import DEMO_MODEL
from tilewright.text import Text, TextStream
from tilewright.types import (
    ExecutorLimits,
    KvCacheSpec,
    KvLayer,
    LoadedModel,
    ResolvedRuntime,
    SamplingParams,
    StepBatch,
    Tap,
)

VOCABULARY = 1_024
PAGE_SIZE = 16


class Ready:
    """An executor whose logits are ready: row i of a step prefers token i."""

    device = "none"
    limits = ExecutorLimits()
    kv_cache_spec = KvCacheSpec(
        num_layers=1, num_kv_heads=1, head_dim=1, page_size=PAGE_SIZE, dtype="float32"
    )

    def __init__(self) -> None:
        self._logits = torch.eye(VOCABULARY)

    def allocate_kv(self, num_pages: int) -> None:
        pass

    def forward(self, batch: StepBatch, tap: "Tap | None" = None) -> torch.Tensor:
        return self._logits[: len(batch.logits_rows)]

    def read_kv(self, layer: int, pages: Sequence[int]) -> KvLayer:
        raise NotImplementedError

    def write_kv(self, layer: int, pages: Sequence[int], cache: KvLayer) -> None:
        raise NotImplementedError

    def close(self) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=200, help="tokens per request (200)")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (5)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    loaded = demo_model()
    cases = [(n, length, False) for n in (1, 16, 64) for length in (100, 8_000)] + [(64, 100, True)]
    seconds: dict[tuple[int, int, bool], list[float]] = {case: [] for case in cases}
    for _ in range(args.rounds):
        for case in cases:
            seconds[case].append(per_token(loaded, *case, args.tokens))
    rows = [
        {
            "requests": n,
            "prompt_tokens": length,
            "detokenised": text,
            "microseconds_per_token": round(statistics.median(times) * 1e6, 1),
        }
        for (n, length, text), times in seconds.items()
    ]
    if args.json:
        print(json.dumps({"tokens": args.tokens, "rounds": args.rounds, "cases": rows}, indent=2))
        return
    for row in rows:
        words = "with text" if row["detokenised"] else ""
        print(
            f"{row['requests']:3} requests of {row['prompt_tokens']:5} prompt tokens: "
            f"{row['microseconds_per_token']:7.1f} us per token {words}".rstrip()
        )


def demo_model() -> LoadedModel:
    from tilewright import LLMEngine

    with LLMEngine.from_plugins() as engine:
        loaded = engine.load(DEMO_MODEL)
        loaded.weights.close()
    return loaded


def per_token(
    loaded: LoadedModel, num_requests: int, prompt_tokens: int, text: bool, new_tokens: int
) -> float:
    """Seconds of the engine per token, while all requests decode."""
    executor = Ready()
    length = prompt_tokens + new_tokens
    pages = num_requests * -(-length // PAGE_SIZE)
    model = ServedModel(
        model_id="m",
        loaded=loaded,
        runtime=ResolvedRuntime(
            device="none",
            weight_dtype="float32",
            kv_dtype="float32",
            page_size=PAGE_SIZE,
            total_pages=pages,
            max_seq_len=length,
            max_batch_size=num_requests,
            max_batch_tokens=1 << 20,
        ),
        executor=executor,
        allocator=KvCacheManager(pages, PAGE_SIZE),
        text=Text(loaded.text),
        load_seconds=0.0,
    )
    greedy = plugins.load(plugins.find("sampler", "greedy"))
    options = plugins.Selected(plugins.find("sampler", "greedy"), greedy).read_options({})
    sampler = plugins.call(greedy, "create_sampler", model_config=loaded.config, options=options)
    runner = Runner(model, sampler, Observers(plugins.new_manager()), "executor", "sampler")
    for i in range(num_requests):
        # Prompts that begin alike would wait for each other.
        prompt = tuple((i + at) % VOCABULARY for at in range(prompt_tokens))
        stream = TextStream(model.text, ()) if text else None
        runner.add(Request(f"m-{i}", prompt, SamplingParams(), new_tokens, stream=stream))
    runner.step()  # the prompts
    started = time.perf_counter()
    steps = 0
    while runner.requests:
        runner.step()
        steps += 1
    assert steps == new_tokens - 1
    return (time.perf_counter() - started) / (steps * num_requests)


if __name__ == "__main__":
    main()
