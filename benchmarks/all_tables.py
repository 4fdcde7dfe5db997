"""Run the CPU benchmarks of README.md one after the other, and keep their tables and figures.

Each is a command that also runs alone; it is printed above its table. --out gets one Markdown file
and one JSON file for each.
"""

import argparse
import shlex
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent

COMPILED = ["--option", "compile=true"]
SMALL = ["--model", "SMOLLM2"]

COMMANDS = {
    "batch1-smollm2": [
        "batch1.py",
        *SMALL,
        "--dtype",
        *("float32", "bfloat16", "int8", "int4"),
        *COMPILED,
    ],
    "batch1-0.6b": ["batch1.py", "--dtype", *("bfloat16", "int8", "int4"), *COMPILED],
    "batches": ["batches.py", *SMALL, *COMPILED],
    "context": [
        "batch1.py",
        *SMALL,
        "--dtype",
        *("float32", "bfloat16"),
        *COMPILED,
        "--prompt-tokens",
        *("100", "500", "1000", "2000"),
        "--new-tokens",
        "32",
        "--rounds",
        "3",
        "--without",
        "transformers",
    ],
    "prefix-hit": ["prefix_hit.py", *SMALL, *COMPILED],
    "perplexity": ["perplexity.py", *SMALL],
    "compile-start": ["compile_start.py", *SMALL],
}
"""Arguments of each; SMOLLM2 stands for the directory of --smollm2."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--smollm2",
        type=Path,
        required=True,
        help="SmolLM2-135M as a model directory: python tests/support/smollm2.py DIR makes it",
    )
    parser.add_argument("--vllm-python", type=Path, help="Python that imports vLLM")
    parser.add_argument("--threads", type=int, help="threads of every side")
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in args.only:
        script, *flags = [str(args.smollm2) if a == "SMOLLM2" else a for a in COMMANDS[name]]
        if args.threads:
            flags += ["--threads", str(args.threads)]
        if args.vllm_python and script == "batches.py":
            flags += ["--vllm-python", str(args.vllm_python)]
        print(f"\n    python benchmarks/{script} {shlex.join(flags)}\n", flush=True)
        flags += ["--json", str(args.out / f"{name}.json")]
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, HERE / script, *flags], stdout=subprocess.PIPE, text=True
        )
        print(f"{done.stdout}\n({time.monotonic() - started:.0f} s)", flush=True)
        (args.out / f"{name}.md").write_text(done.stdout)
        if done.returncode:
            failed.append(name)
    if failed:
        sys.exit(f"these failed: {', '.join(failed)}; why is on standard error, above")


if __name__ == "__main__":
    main()
