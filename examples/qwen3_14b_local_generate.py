"""Continue a prompt with Qwen3-14B, or any other supported model, from a local directory.

    python examples/qwen3_14b_local_generate.py --model-dir models/Qwen3-14B --prompt "Huawei is"

Greedy, through LLMEngine. Prints the text, the token ids and why the text ended.
"""

import argparse
import sys
from pathlib import Path

from tilewright import GenerateConfig, LLMEngine, RuntimeConfig, TilewrightError
from tilewright.config import read_text


def main() -> int:
    args = parse_args()
    options = {
        name: value
        for name, value in (("platform", args.platform), ("pypto_root", args.pypto_root))
        if value is not None
    }
    try:
        prompt = args.prompt
        if args.prompt_file:
            prompt = read_text(args.prompt_file, "prompt file").removesuffix("\n")
        with LLMEngine.from_plugins(
            executor=args.executor, options={"executor": options}
        ) as engine:
            engine.init_model("qwen3-14b", args.model_dir, RuntimeConfig(device=args.device))
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
    return 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model-dir", required=True, help="a Hugging Face directory")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="text to continue")
    prompt.add_argument("--prompt-file", type=Path, help="a file that holds the prompt")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="at most (32)")
    parser.add_argument(
        "--executor",
        default="torch",
        help="an installed executor (torch, until pypto-npu is shipped)",
    )
    parser.add_argument("--device", default="cpu", help="device of weights and KV cache (cpu)")
    parser.add_argument("--platform", help="option of the executor: a2a3, a5, a2a3sim, a5sim")
    parser.add_argument("--pypto-root", help="option of the executor: a PyPTO checkout")
    args = parser.parse_args()
    if args.max_new_tokens < 1:
        parser.error(f"--max-new-tokens must be at least 1, found {args.max_new_tokens}")
    return args


if __name__ == "__main__":
    sys.exit(main())
