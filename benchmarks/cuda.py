"""The torch executor on a CUDA device: decode and prefill of Qwen3-14B's shape, and checks.

Run it from a checkout; nothing needs to be installed but the packages that tilewright depends on,
and transformers. Weights are random and made on the device. Each figure is through LLMEngine, with
paging, sampling (temperature, top_k, top_p) and detokenisation. In the same run: transformers
without compilation on the same weights, the device's copy bandwidth and its rate of BF16 products.

With --check it then runs small random models against transformers on the device, compares the
device with the CPU, and runs the tests that are marked cuda if pytest is installed.
`--device cpu --tiny` runs this script itself without a device; its figures mean nothing.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BATCHES = (1, 8, 32, 128)
SAMPLING: dict[str, Any] = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "seed": 1}


def importable(folder: Path, wheels: Path | None, stand_in: bool) -> None:
    """Make the checkout importable here and in processes that this one starts, with its plugins.

    Plugins are found by entry points, so a folder gets a ``.dist-info`` with those of
    pyproject.toml, and with this benchmark's own.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    info = folder / "tilewright-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tilewright\nVersion: 0\n")
    points: dict[str, dict[str, str]] = project["project"]["entry-points"]
    points["tilewright.loaders"]["random-on-device"] = "card_models"
    if stand_in:
        points["tilewright.executors"]["card-on-cpu"] = "card_on_cpu:PLUGIN"
    lines = []
    for group, named in points.items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in named.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    sources = [ROOT / name for name in project["tool"]["hatch"]["build"]["dev-mode-dirs"]]
    extra = sorted(wheels.glob("*.whl")) if wheels else []
    paths = [str(p) for p in (folder, *sources, ROOT / "benchmarks", ROOT / "tests/support")]
    sys.path[:0] = [*paths, *map(str, extra)]
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [*paths, *map(str, extra), *filter(None, [os.environ.get("PYTHONPATH")])]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu (cuda)")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, and few tokens")
    parser.add_argument("--check", action="store_true", help="run the checks as well")
    parser.add_argument("--only-check", action="store_true", help="run the checks and nothing else")
    parser.add_argument("--wheels", type=Path, help="folder of pure-Python wheels to import from")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, help="decode batches")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens of each text (64)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        importable(Path(folder), args.wheels, args.device == "cpu")
        if args.device != "cpu":
            from tilewright.errors import ExecutorError
            from tilewright_torch.card import card_number

            try:
                card_number(args.device)
            except ExecutorError as error:
                sys.exit(f"cuda.py: {error}")
        if not args.only_check:
            figures = measure(args)
            if args.json:
                args.json.write_text(json.dumps(figures, indent=2))
        failed = check(args.device) if args.check or args.only_check else []
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


# --- figures --------------------------------------------------------------------------------------


def measure(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from tilewright import GenerateConfig, LLMEngine, RuntimeConfig, hookimpl

    context, prefill = (24, 64) if args.tiny else (512, 2048)
    shape = "tiny" if args.tiny else "qwen3-14b"
    device = torch.device(args.device)
    limits = {} if device.type == "cpu" else card_limits(device)
    for name, value in limits.items():
        print(f"{name}: {value:,.2f}", flush=True)

    class Steps:
        """The steps of a run."""

        events: list[Any]

        @hookimpl
        def on_step(self, event: Any) -> None:
            self.events.append(event)

    steps = Steps()
    steps.events = []
    most = max(args.batches)
    pages = most * -(-(context + args.new_tokens) // 16) + -(-prefill // 16) + 8
    engine = LLMEngine.from_plugins(
        executor="torch" if device.type == "cuda" else "card-on-cpu",
        loader="random-on-device",
        observers=[steps],
        options={"loader": {"device": args.device}},
    )
    runtime = RuntimeConfig(
        device=args.device if device.type == "cuda" else None,
        total_pages=pages,
        page_size=16,
        max_seq_len=prefill + args.new_tokens,
        max_batch_size=most,
        max_batch_tokens=prefill,
        prefix_cache=False,
    )
    began = time.perf_counter()
    engine.init_model("m", shape, runtime)
    print(f"loaded in {time.perf_counter() - began:.1f} s", flush=True)
    executor: Any = engine.model("m").executor
    config = engine.model("m").loaded.config
    weight_bytes = sum(
        w.numel() * w.element_size()
        for name, w in executor._opened().weights.items()
        if "embed_tokens" not in name
    )
    token_bytes = executor.kv_cache_spec.page_bytes / 16
    chance = random.Random(0)

    def prompt(length: int) -> list[int]:
        return [chance.randrange(3, config.vocab_size) for _ in range(length)]

    figures: dict[str, Any] = {"shape": shape, "limits": limits, "decode": {}, "prefill": {}}
    ending = GenerateConfig(max_new_tokens=1, **SAMPLING)
    times = []
    for _ in range(4):  # the first one compiles kernels
        steps.events.clear()
        engine.generate_batch("m", [prompt(prefill)], ending)
        times += [e.seconds for e in steps.events if e.num_prompt_tokens == prefill]
    seconds = min(times)
    figures["prefill"]["tilewright"] = prefill / seconds
    print(f"prefill of {prefill} tokens: {prefill / seconds:,.0f} tokens/s", flush=True)

    settings = GenerateConfig(max_new_tokens=args.new_tokens, ignore_eos=True, **SAMPLING)
    for batch in args.batches:
        for _ in range(2):  # the first one captures the graph
            steps.events.clear()
            engine.generate_batch("m", [prompt(context) for _ in range(batch)], settings)
        whole = [
            e.seconds
            for e in steps.events
            if e.num_decode_tokens == batch and not e.num_prompt_tokens
        ]
        step = statistics.median(whole)
        size = next(n for n in executor._sizes if n >= batch)
        with torch.inference_mode():
            bare = timed(executor._graphs[size], 10, device)
        read = weight_bytes + batch * (context + args.new_tokens / 2) * token_bytes
        row = {
            "tokens_per_second": batch / step,
            "step_ms": 1e3 * step,
            "graph_ms": 1e3 * bare,
            "outside_graph": 1 - bare / step,
            "read_gb_per_second": read / step / 1e9,
        }
        if limits:
            row["of_copy_bandwidth"] = read / step / 1e9 / limits["copy GB/s"]
        figures["decode"][batch] = row
        of_copy = f", {row['of_copy_bandwidth']:.0%} of the copy bandwidth" if limits else ""
        print(
            f"decode at batch {batch}, context {context}: {batch / step:,.1f} tokens/s, "
            f"{1e3 * step:.2f} ms a step ({1e3 * bare:.2f} ms of it the graph), reads "
            f"{read / step / 1e9:,.0f} GB/s{of_copy}",
            flush=True,
        )
    weights = dict(executor._opened().weights)
    theirs = transformers_model(config, weights, device)
    with torch.inference_mode():
        figures["prefill"]["transformers"] = prefill / timed(
            lambda: theirs(tensor([prompt(prefill)], device), logits_to_keep=1), 2, device
        )
        print(f"transformers: prefill {figures['prefill']['transformers']:,.0f} tokens/s")
        for batch in [b for b in args.batches if b in (1, 32)]:
            prompts = tensor([prompt(context) for _ in range(batch)], device)
            speed = batch / their_step(theirs, prompts, 12, device)
            figures["decode"][batch]["transformers"] = speed
            print(f"transformers: decode at batch {batch}: {speed:,.1f} tokens/s", flush=True)
    engine.close()
    return figures


def tensor(rows: Sequence[Sequence[int]], device: Any) -> Any:
    import torch

    return torch.tensor(rows, device=device)


def timed(run: Callable[[], object], times: int, device: Any) -> float:
    """Seconds of one run, of several in a row, after one that is not counted."""
    import torch

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    run()
    wait()
    began = time.perf_counter()
    for _ in range(times):
        run()
    wait()
    return (time.perf_counter() - began) / times


def card_limits(device: Any) -> dict[str, float]:
    """What the device copies (bytes read and written), and multiplies in BF16."""
    import torch

    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}")
    source, target = (torch.empty(2**31, dtype=torch.uint8, device=device) for _ in range(2))
    copied = 2 * len(source) / timed(lambda: target.copy_(source), 20, device) / 1e9
    size = 8192
    a = torch.randn(size, size, dtype=torch.bfloat16, device=device)
    b = torch.randn(size, size, dtype=torch.bfloat16, device=device)
    rate = 2 * size**3 / timed(lambda: a @ b, 20, device) / 1e12
    return {"copy GB/s": copied, "BF16 TFLOP/s": rate}


def transformers_model(config: Any, weights: dict[str, Any], device: Any) -> Any:
    """transformers' model over the executor's own weights: a second copy would not fit."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

    theirs = Qwen3Config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.norm_eps,
        max_position_embeddings=config.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope.theta},
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(theirs, dtype=torch.bfloat16)
    model.load_state_dict(weights, assign=True)
    model.model.rotary_emb = Qwen3RotaryEmbedding(theirs).to(device)
    return model.eval()


def their_step(model: Any, prompts: Any, steps: int, device: Any) -> float:
    """Seconds of a decode step of transformers, greedily."""
    made = model(prompts, use_cache=True, logits_to_keep=1)
    state = {"cache": made.past_key_values, "next": made.logits[:, -1:].argmax(-1)}

    def step() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # past_key_values has another name in newer releases
            out = model(state["next"], past_key_values=state["cache"], use_cache=True)
        state["cache"], state["next"] = out.past_key_values, out.logits[:, -1:].argmax(-1)

    return timed(step, steps, device)


# --- checks ---------------------------------------------------------------------------------------

CHECKED = (
    "qwen3-gqa-5",
    "qwen3-some-layers-slide",
    "llama-biases",
    "llama-dynamic-within",
    "mistral-gqa-8",
)
"""Configurations of tests/support/reference_models.py."""

FLOAT32_ERROR = 2e-4
"""Largest difference of a logit from transformers' in float32."""

ROUNDING = 1.25
"""Largest error in bfloat16, as a multiple of that of transformers in bfloat16; both are root mean
squares of the differences from transformers in float32."""


def check(device: str) -> list[str]:
    """Run the checks, and return what failed."""
    failed = []

    def report(what: str, passed: bool, found: str) -> None:
        print(f"{'ok' if passed else 'FAILED'}: {what}: {found}", flush=True)
        if not passed:
            failed.append(what)

    with tempfile.TemporaryDirectory() as folder:
        others = [(words, started(words, folder)) for words in other_checks(device)]
        for name in CHECKED:
            largest, ours, theirs, same = against_transformers(name, Path(folder, name), device)
            what = f"{name}: float32 logits within {FLOAT32_ERROR:g} of transformers"
            report(what, largest <= FLOAT32_ERROR, f"{largest:.2g}")
            what = f"{name}: bfloat16 error within {ROUNDING:g} times that of transformers"
            report(what, ours <= ROUNDING * theirs, f"{ours:.3g} and {theirs:.3g}")
            report(f"{name}: equal tokens with and without graphs", same, str(same))
        for words, process in others:
            lines = process.communicate()[0].strip().splitlines()
            passed = process.returncode in (0, NOT_PROVED)
            report(" ".join(words), passed, lines[-1] if lines else "no output")
            if not passed:
                print("\n".join(lines[-40:]), flush=True)
    return failed


NOT_PROVED = 3
"""Exit code of `plugins verify` when tests did not apply."""


def other_checks(device: str) -> list[list[str]]:
    """Modules to run beside the comparison with transformers, with their arguments."""
    candidate = ["torch", "-o", f"candidate.runtime.device={device}"]
    if device == "cpu":
        candidate = ["card-on-cpu"]
    checks = [["tilewright", "compare", "--reference", "torch", "--candidate", *candidate]]
    if find_spec("pytest") is None or find_spec("hypothesis") is None:
        print("pytest or hypothesis is not installed: the tests on the device are left out")
        return checks
    tests = ROOT / "tests/plugins/executors"
    quiet = ["pytest", "-q", "-p", "no:cacheprovider"]
    checks.append([*quiet, str(tests / "test_card_kernels.py")])
    checks.append([*quiet, "-m", "cuda", str(tests / "test_card_executor.py")])
    if device != "cpu":
        checks.append(["tilewright", "plugins", "verify", "torch", "-o", f"device={device}"])
    return checks


def started(words: list[str], folder: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", *words],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def against_transformers(name: str, folder: Path, device: str) -> tuple[float, float, float, bool]:
    """The largest float32 difference; the bfloat16 errors of ours and theirs; and whether steps
    that are captured give the tokens of steps that are not."""
    import torch
    from reference_models import (  # type: ignore[import-not-found]
        CONFIGS,
        prompts,
        write_model,
    )

    config = CONFIGS[name]
    sequences = list(prompts(config, [40, 7, 25]))
    # Weights that bfloat16 holds exactly, so that both dtypes have the same ones.
    write_model(config, folder, "bfloat16")
    wide, same = our_logits(folder, "float32", sequences, device)
    narrow, _ = our_logits(folder, "bfloat16", sequences, device)
    true = their_logits(folder, torch.float32, sequences, device)
    near = their_logits(folder, torch.bfloat16, sequences, device)

    def error(found: Any) -> float:
        return float((found - true).square().mean().sqrt())

    return float((wide - true).abs().max()), error(narrow), error(near), same


def our_logits(
    folder: Path, dtype: str, sequences: list[list[int]], device: str
) -> tuple[Any, bool]:
    """Logits of all rows: the first part of each sequence in one step, the rest one by one."""
    import torch

    from tilewright import GenerateConfig, LLMEngine, RuntimeConfig
    from tilewright_testing.paged import Sequences

    cuda = device != "cpu"
    runtime = RuntimeConfig(
        device=device if cuda else None,
        weight_dtype=dtype,
        page_size=16,
        total_pages=40,
        max_seq_len=64,
    )
    decoded = 5
    plugin = "torch" if cuda else "card-on-cpu"
    with LLMEngine.from_plugins(executor=plugin, loader="hf-local") as engine:
        engine.init_model("m", folder, runtime)
        greedy = GenerateConfig(max_new_tokens=8, ignore_eos=True, temperature=0.0)
        executor: Any = engine.model("m").executor
        texts = []
        for graphs in (True, False):
            executor.use_graphs = graphs
            texts.append([r.token_ids for r in engine.generate_batch("m", sequences, greedy)])
        paged = Sequences(page_size=16, total_pages=40)
        names = [f"s{i}" for i in range(len(sequences))]
        parts: list[list[Any]] = [[] for _ in names]
        begun = dict(zip(names, (s[:-decoded] for s in sequences), strict=True))
        steps = [begun]
        steps += [
            {n: [s[at]] for n, s in zip(names, sequences, strict=True)} for at in range(-decoded, 0)
        ]
        for tokens in steps:
            logits = executor.forward(paged.batch(tokens)).cpu()
            for part, rows in zip(
                parts, logits.split([len(t) for t in tokens.values()]), strict=True
            ):
                part.append(rows)
    return torch.cat([torch.cat(part) for part in parts]), texts[0] == texts[1]


def their_logits(folder: Path, dtype: Any, sequences: list[list[int]], device: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    model = model.to(device).eval()
    with torch.inference_mode():
        rows = [model(torch.tensor([s], device=device)).logits[0] for s in sequences]
    return torch.cat(rows).float().cpu()


if __name__ == "__main__":
    main()
