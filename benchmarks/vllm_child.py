"""vLLM's side of a benchmark, run by vLLM's own interpreter (``peers.Vllm`` starts it).

Reads one JSON object a line on standard input, and answers each with one on standard output. The
first has ``model``, ``dtype``, ``length`` (tokens of a sequence) and ``batch`` (sequences), and is
answered with ``version``. Each later one has ``prompts`` (token ids) and ``new_tokens``; its answer
has ``tokens`` (those of each prompt), ``first`` and ``last`` (seconds from the start until every
prompt has its first token, and its last).
"""

import json
import os
import sys
import time
from typing import Any


def main() -> None:
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # vLLM and its processes print to standard output

    import vllm

    settings = json.loads(sys.stdin.readline())
    model = vllm.LLM(
        settings["model"],
        dtype=settings["dtype"],
        max_model_len=settings["length"],
        max_num_seqs=settings["batch"],
        max_num_batched_tokens=settings["batch"] * settings["length"],
        enable_prefix_caching=False,
        disable_log_stats=False,  # without it, requests have no times
    )
    print(json.dumps({"version": vllm.__version__}), file=out)
    for line in sys.stdin:
        print(json.dumps(answer(model, **json.loads(line))), file=out)


def answer(model: Any, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=True)
    started = time.monotonic()  # the clock of vLLM's own times
    results = model.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False
    )
    return {
        "tokens": [list(result.outputs[0].token_ids) for result in results],
        "first": max(result.metrics.first_token_ts for result in results) - started,
        "last": max(result.metrics.last_token_ts for result in results) - started,
    }


if __name__ == "__main__":
    main()
