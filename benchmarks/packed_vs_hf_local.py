"""Time to the first token, and memory, of a packed model against the directory it was made from.

Executor pypto-npu on platform emulated, which computes slowly: its step for the first token counts
for both sides, and is the same work for both. Each measurement is a process of its own, hf-local
and packed in turns; it has run the bundled model before, so that nothing is left to import. Time is
until the model is ready ("load"), and until the first token of a prompt of one token ("first
token"), in wall-clock time and in the thread's CPU time, which other load on the machine disturbs
less: set OMP_NUM_THREADS=1. Memory is the increase over what the process had before: RssAnon,
sampled every 5 ms, and the peak of all resident memory (VmHWM), mapped pages of files included.
Ratios are per pair; their median is printed, with the minimum and the maximum.

By default files are in the system's cache. With --cold each process first drops its own model's
files from it, so that both sides read the disk.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from load_memory import QWEN3_0_6B, resident_bytes, watched, write_random_model

QWEN3_1_7B_LAYERS = QWEN3_0_6B | {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 9,
    "tie_word_embeddings": False,
}
"""1.1 GB: nine layers as Qwen3-1.7B has them, and a vocabulary of 32000."""

SHAPES = {"1.7b-layers": QWEN3_1_7B_LAYERS, "0.6b": QWEN3_0_6B}
MEASURES = (
    "load_seconds",
    "first_token_seconds",
    "load_cpu_seconds",
    "first_token_cpu_seconds",
    "anonymous_bytes",
    "resident_bytes",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="1.7b-layers")
    parser.add_argument("--pairs", type=int, default=5, metavar="N")
    parser.add_argument(
        "--cold", action="store_true", help="read from disk, not from the page cache"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--folder", type=Path, help="folder for 2.3 GB of models; default: that of tempfile"
    )
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.cold)))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        source = write_random_model(Path(folder, "model"), SHAPES[args.shape])
        packed = Path(folder, "packed")
        seconds = convert(source, packed)
        os.sync()
        weights = sum(file.stat().st_size for file in source.glob("*.safetensors"))
        pairs = [
            {"hf-local": apart(source, args.cold), "packed": apart(packed, args.cold)}
            for _ in range(args.pairs)
        ]
    assert all(pair["hf-local"]["token"] == pair["packed"]["token"] for pair in pairs)
    report = {"shape": args.shape, "cold": args.cold, "weights_bytes": weights, "pairs": pairs}
    if args.json:
        print(json.dumps(report | {"convert_seconds": seconds}, indent=2))
        return
    print(
        f"weights {weights / 1e9:.2f} GB, {args.pairs} pairs, {'cold' if args.cold else 'cached'}"
    )
    for name in MEASURES:
        rows = {loader: [pair[loader][name] for pair in pairs] for loader in ("hf-local", "packed")}
        in_bytes = name.endswith("bytes")
        unit, scale = ("x the weights", weights) if in_bytes else ("s", 1)
        said = [f"{loader} {median(row) / scale:.3f} {unit}" for loader, row in rows.items()]
        if not in_bytes:
            ratios = [h / p for h, p in zip(rows["hf-local"], rows["packed"], strict=True)]
            said.append(f"ratio {median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})")
        print(f"{name:<24} {'  '.join(said)}")


def convert(source: Path, out: Path) -> float:
    command = ["tilewright", "convert", "--executor", "pypto-npu", "-o", "platform=emulated"]
    started = time.perf_counter()
    subprocess.run([*command, "--model", str(source), "--out", str(out)], check=True, stdout=2)
    return time.perf_counter() - started


def apart(model: Path, cold: bool) -> dict[str, Any]:
    command = [sys.executable, __file__, "--measure", str(model), *(["--cold"] if cold else [])]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    row: dict[str, Any] = json.loads(done.stdout)
    return row


def measure(model: Path, cold: bool) -> dict[str, Any]:
    """Load and make one token, in a process that has done nothing else."""
    from tilewright import GenerateConfig, LLMEngine, RuntimeConfig
    from tilewright.settings import DEMO_MODEL

    runtime = RuntimeConfig(
        weight_dtype="bfloat16", max_seq_len=64, max_batch_size=1, max_batch_tokens=16
    )
    one_token = GenerateConfig(max_new_tokens=1, temperature=0, ignore_eos=True)
    with LLMEngine.from_plugins(
        executor="pypto-npu", options={"executor": {"platform": "emulated"}}
    ) as engine:
        # The bundled model first: what is imported late is not to be counted.
        engine.init_model("demo", DEMO_MODEL, runtime)
        engine.generate_result("demo", [5], one_token)
        if cold:
            drop_cached(model)
        before = resident_bytes("RssAnon"), resident_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        with watched() as seen:
            started, started_cpu = time.perf_counter(), time.thread_time()
            engine.init_model("model", model, runtime)
            loaded, loaded_cpu = time.perf_counter(), time.thread_time()
            token = engine.generate_result("model", [5], one_token).token_ids
            ended, ended_cpu = time.perf_counter(), time.thread_time()
    return {
        "load_seconds": loaded - started,
        "first_token_seconds": ended - started,
        "load_cpu_seconds": loaded_cpu - started_cpu,
        "first_token_cpu_seconds": ended_cpu - started_cpu,
        "anonymous_bytes": max(seen) - before[0],
        "resident_bytes": resident_bytes("VmHWM") - before[1],
        "token": token,
    }


def drop_cached(model: Path) -> None:
    for file in model.iterdir():
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()
