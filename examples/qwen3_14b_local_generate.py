"""Continue a prompt with Qwen3-14B from a local directory, on an Ascend NPU.

    python examples/qwen3_14b_local_generate.py --model-dir models/Qwen3-14B --device 0 \\
        --prompt "Huawei is"

On a host whose cards task-submit manages; it adds --device to the command:

    task-submit --device auto --max-time 0 --timeout 0 --run "python \\
        examples/qwen3_14b_local_generate.py --model-dir models/Qwen3-14B --prompt-file prompt.txt"

Without an NPU, the same kernels run slowly on the CPU, with the bundled model:

    python examples/qwen3_14b_local_generate.py --model-dir core/tilewright/demo_model \\
        --platform emulated --prompt "We the People of the United States,"

Greedy, through LLMEngine. Prints the text, the token ids, why the text ended, and the device.
"""

import argparse
import sys
from pathlib import Path

from tilewright import GenerateConfig, LLMEngine, RuntimeConfig, TilewrightError
from tilewright.settings import read_text

PAGE_SIZE, PAGES = 128, 32
"""A KV cache of 4096 tokens for the one sequence: 640 MiB of the card with Qwen3-14B."""


def main() -> int:
    args = parse_args()
    options = {
        name: value
        for name, value in (("platform", args.platform), ("pypto_root", args.pypto_root))
        if value is not None
    }
    runtime = RuntimeConfig(
        device=args.device, page_size=PAGE_SIZE, total_pages=PAGES, max_batch_size=1
    )
    try:
        prompt = args.prompt
        if args.prompt_file:
            prompt = read_text(args.prompt_file, "prompt file").removesuffix("\n")
        with LLMEngine.from_plugins(
            executor=args.executor, options={"executor": options}
        ) as engine:
            engine.init_model("qwen3-14b", args.model_dir, runtime)
            result = engine.generate_result(
                "qwen3-14b",
                prompt,
                GenerateConfig(max_new_tokens=args.max_new_tokens, temperature=0.0),
            )
    except TilewrightError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"text: {result.text}")
    print(f"token_ids: {list(result.token_ids)}")
    print(f"finish_reason: {result.finish_reason}")
    print(f"device: {result.device}")
    return 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model-dir", required=True, help="model in Hugging Face format")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="text to continue")
    prompt.add_argument("--prompt-file", type=Path, help="file with the prompt")
    parser.add_argument(
        "--max-new-tokens", type=int, default=32, help="maximum tokens to generate (32)"
    )
    parser.add_argument("--executor", default="pypto-npu", help="pypto-npu or torch (pypto-npu)")
    parser.add_argument("--device", help="number of the card; default: TASK_DEVICE")
    parser.add_argument(
        "--platform",
        help="option of pypto-npu: a2a3, a5, a2a3sim, a5sim, or emulated (a2a3)",
    )
    parser.add_argument("--pypto-root", help="option of pypto-npu: a built checkout of PyPTO")
    args = parser.parse_args()
    if args.max_new_tokens < 1:
        parser.error(f"--max-new-tokens must be at least 1, found {args.max_new_tokens}")
    return args


if __name__ == "__main__":
    sys.exit(main())
