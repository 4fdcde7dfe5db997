"""Peak memory of loading a BF16 model, relative to the bytes of its weights.

Each measurement is a process of its own: it imports what the engine needs, notes its resident
memory, loads the model and generates a few tokens, so that every weight has been touched. The
peak since then is the kernel's (VmHWM in /proc/self/status), mapped file pages included.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

BACKENDS = ("mmap", "pread")

QWEN3_0_6B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", type=Path, help="model directory; default: random weights of Qwen3-0.6B's shape"
    )
    parser.add_argument("--limit", type=float, help="exit with code 1 if a ratio is above this")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--measure", choices=BACKENDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.model, args.measure)))
        return
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or write_random_model(Path(folder, "model"))
        rows = [measured_apart(model, backend) for backend in BACKENDS]
    if args.json:
        print(json.dumps({"model": str(args.model or "Qwen3-0.6B shape"), "rows": rows}, indent=2))
    else:
        for row in rows:
            print(
                f"{row['backend']:<6} weights {row['weights_bytes'] / 2**20:7.0f} MiB"
                f"  peak while loading {row['load_ratio']:.3f}x  and after generating "
                f"{row['ratio']:.3f}x  ({row['load_seconds']:.2f} s to load)"
            )
    if args.limit and any(row["ratio"] > args.limit for row in rows):
        sys.exit(1)


def measured_apart(model: Path, backend: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--model", str(model), "--measure", backend]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    row: dict[str, Any] = json.loads(done.stdout)
    return row


def measure(model: Path, backend: str) -> dict[str, Any]:
    """Load with a backend and generate; in a process that has done nothing else."""
    import torch

    from tilewright import GenerateConfig, LLMEngine, RuntimeConfig

    engine = LLMEngine.from_plugins(
        options={"weight_format": {"safetensors": {"backend": backend}}}
    )
    # What is imported late: code is not to be counted as the model's memory.
    for module in (
        "safetensors.torch",
        "tilewright_hf.safetensors_format",
        "tilewright_torch.model",
    ):
        import_module(module)
    torch.mm(torch.ones(64, 64), torch.ones(64, 64))
    baseline = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    started = time.perf_counter()
    runtime = RuntimeConfig(max_seq_len=64, max_batch_size=1)
    loaded = engine.init_model("model", model, runtime)
    seconds = time.perf_counter() - started
    load_peak = resident_bytes("VmHWM") - baseline
    engine.generate_result("model", "t7 t8 t9", GenerateConfig(max_new_tokens=4, ignore_eos=True))
    peak = resident_bytes("VmHWM") - baseline
    weights = checkpoint_bytes(model)
    return {
        "backend": backend,
        "dtype": loaded.config.dtype,
        "weights_bytes": weights,
        "load_peak_bytes": load_peak,
        "load_ratio": load_peak / weights,
        "peak_bytes": peak,
        "ratio": peak / weights,
        "load_seconds": seconds,
    }


def checkpoint_bytes(model: Path) -> int:
    return sum(file.stat().st_size for file in model.glob("model*.safetensors"))


def resident_bytes(kind: str) -> int:
    """VmRSS: resident now; RssAnon: without pages of files; VmHWM: the most so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{kind}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {kind}")


@contextmanager
def watched() -> Iterator[list[int]]:
    """RssAnon in bytes, every 5 ms from before the block to its end."""
    seen = [resident_bytes("RssAnon")]
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.005):
            seen.append(resident_bytes("RssAnon"))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def write_random_model(directory: Path, settings: dict[str, Any] = QWEN3_0_6B) -> Path:
    """A Hugging Face directory with BF16 weights, each RMSNorm's ones and the others small."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers

    from tilewright.weights import expected_tensors
    from tilewright_hf.architecture import model_config
    from tilewright_hf.files import JsonObject

    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(settings))
    config, _ = model_config(JsonObject("config.json", settings))
    random = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.ones(shape, dtype=torch.bfloat16)
        if name.endswith("norm.weight")
        else torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=random)
        for name, shape in expected_tensors(config).items()
    }
    save_file(tensors, directory / "model.safetensors")
    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(1000)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


if __name__ == "__main__":
    main()
