"""The torch executor on a CUDA device: decode and prefill of Qwen3-14B's shape, and checks.

Run it from a checkout; nothing needs to be installed but the packages that tilewright depends on,
and transformers. Weights are random and made on the device. Each figure is through LLMEngine, with
paging, sampling (temperature, top_k, top_p) and detokenisation. In the same run: the device's copy
bandwidth and its rate of BF16 products, each product of a layer alone, a profile of steps by
kernel, and transformers without compilation on the same weights, whose logits must be the same.

With --check it then runs small random models against transformers on the device, compares the
device with the CPU, and runs tests if pytest is installed. What fails is printed, and the rest goes
on. `--device cpu --tiny` runs this script itself without a device; its figures mean nothing.
"""

import argparse
import faulthandler
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
import traceback
import warnings
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

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
    for wheel in sorted(wheels.glob("*.whl")) if wheels else []:
        zipfile.ZipFile(wheel).extractall(folder)
    paths = [str(p) for p in (folder, *sources, ROOT / "benchmarks", ROOT / "tests/support")]
    sys.path[:0] = paths
    inherited = filter(None, [os.environ.get("PYTHONPATH")])
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, *inherited])
    if stand_in:
        os.environ["TRITON_INTERPRET"] = "1"  # the kernels' tests then run them on the CPU


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
    faulthandler.enable()
    with tempfile.TemporaryDirectory() as folder:
        importable(Path(folder), args.wheels, args.device == "cpu")
        needed = ("torch", "transformers", "pluggy", "attrs", "cattrs", "safetensors", "tokenizers")
        if missing := [name for name in needed if find_spec(name) is None]:
            sys.exit(f"cuda.py: {', '.join(missing)} not found: install them, or see --wheels")
        if args.device != "cpu":
            from tilewright.errors import ExecutorError
            from tilewright_torch.card import card_number

            try:
                card_number(args.device)
            except ExecutorError as error:
                sys.exit(f"cuda.py: {error}")
        if args.only_check:
            check(args.device)
        else:
            describe(args.device)
            attempt("figures", lambda: measure(args))
        if args.json:
            args.json.write_text(json.dumps(FIGURES, indent=2))
        if args.check and not args.only_check:
            # In a process of its own: a device error would end all that follows it.
            words = [sys.executable, __file__, "--only-check", "--device", args.device]
            if subprocess.run(words, check=False).returncode:
                FAILED.append("checks")
    if FAILED:
        sys.exit(f"failed: {', '.join(FAILED)}")


FIGURES: dict[str, Any] = {}
FAILED: list[str] = []


def report(what: str, passed: bool, found: str) -> None:
    print(f"{'ok' if passed else 'FAILED'}: {what}: {found}", flush=True)
    if not passed:
        FAILED.append(what)


def attempt(what: str, run: Callable[[], T]) -> T | None:
    """What run returns; None if it fails, which is printed, and the rest goes on."""
    began = time.perf_counter()
    try:
        return run()
    except Exception as error:
        lines = traceback.format_exception(error)
        report(what, False, "".join(lines[-6:]).strip()[-3000:])
        return None
    finally:
        print(f"[{what}: {time.perf_counter() - began:.1f} s]", flush=True)


def describe(device: str) -> None:
    """Print what runs here."""
    import torch
    import transformers

    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    if find_spec("triton"):
        import triton

        versions["triton"] = triton.__version__
    if device != "cpu":
        found = torch.cuda.get_device_properties(device)
        free, total = torch.cuda.mem_get_info(torch.device(device))
        versions |= {
            "CUDA": str(torch.version.cuda),
            "device": f"{found.name}, compute capability {found.major}.{found.minor}, "
            f"{found.multi_processor_count} processors",
            "memory": f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free",
        }
    FIGURES["versions"] = {"python": sys.version.split()[0], **versions}
    print("\n".join(f"{name}: {value}" for name, value in FIGURES["versions"].items()), flush=True)


# --- figures --------------------------------------------------------------------------------------


class Steps:
    """The steps of a run: an observer."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def on_step(self, event: Any) -> None:
        self.events.append(event)


def measure(args: argparse.Namespace) -> None:
    import torch

    from tilewright import LLMEngine, RuntimeConfig, hookimpl

    context, prefill = (24, 64) if args.tiny else (512, 2048)
    device = torch.device(args.device)
    FIGURES["shape"] = shape = "tiny" if args.tiny else "qwen3-14b"
    limits: dict[str, float] = {}
    if device.type == "cuda":
        limits = attempt("limits", lambda: card_limits(device)) or {}
    FIGURES["limits"] = limits
    for name, value in limits.items():
        print(f"{name}: {value:,.2f}", flush=True)
    Steps.on_step = hookimpl(Steps.on_step)  # type: ignore[method-assign]
    steps = Steps()
    most = max(args.batches)
    pages = most * -(-(context + args.new_tokens) // 16) + -(-prefill // 16) + 8
    with LLMEngine.from_plugins(
        executor="torch" if device.type == "cuda" else "card-on-cpu",
        loader="random-on-device",
        observers=[steps],
        options={"loader": {"device": args.device}},
    ) as engine:
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
        vocab_size = engine.model("m").loaded.config.vocab_size
        chance = random.Random(0)

        def prompts(count: int, length: int) -> list[list[int]]:
            return [[chance.randrange(3, vocab_size) for _ in range(length)] for _ in range(count)]

        FIGURES["prefill"], FIGURES["decode"] = {}, {}
        with executor._card.active():
            attempt("products", lambda: products(executor, args.batches, device))
            attempt("prefill", lambda: our_prefill(engine, steps, prompts, prefill))
            for batch in args.batches:
                texts = prompts(batch, context)
                attempt(
                    f"decode at batch {batch}",
                    partial(our_decode, engine, steps, texts, args.new_tokens, limits, device),
                )
                if batch in (1, 32):
                    attempt(
                        f"profile of a decode step at batch {batch}",
                        lambda texts=texts: profiled(graph_of(executor, texts), device),  # type: ignore[misc]
                    )
            attempt(
                "profile of a prefill",
                lambda: profiled(lambda: forward(executor, prompts(1, prefill)), device),
            )
            attempt("transformers", lambda: compared(engine, args, prompts, context, prefill))


def our_prefill(engine: Any, steps: Steps, prompts: Any, length: int) -> None:
    from tilewright import GenerateConfig

    ending = GenerateConfig(max_new_tokens=1, **SAMPLING)
    times = []
    for _ in range(4):  # the first one compiles kernels
        steps.events.clear()
        engine.generate_batch("m", prompts(1, length), ending)
        times += [e.seconds for e in steps.events if e.num_prompt_tokens == length]
    FIGURES["prefill"]["tilewright"] = length / min(times)
    print(f"prefill of {length} tokens: {length / min(times):,.0f} tokens/s", flush=True)


def our_decode(
    engine: Any,
    steps: Steps,
    prompts: list[list[int]],
    new_tokens: int,
    limits: dict[str, float],
    device: Any,
) -> None:
    import torch

    from tilewright import GenerateConfig
    from tilewright.types import SamplerRow, SamplingParams
    from tilewright_torch import card_sampling

    executor, batch = engine.model("m").executor, len(prompts)
    context = len(prompts[0])
    settings = GenerateConfig(max_new_tokens=new_tokens, ignore_eos=True, **SAMPLING)
    waits = timed_waits(executor)
    for _ in range(2):  # the first one captures the graph
        steps.events.clear()
        waits.clear()
        engine.generate_batch("m", prompts, settings)
    steps_and_waits = [
        (e.seconds, wait)
        for e, wait in zip(steps.events, waits, strict=False)
        if e.num_decode_tokens == batch and not e.num_prompt_tokens
    ]
    if not steps_and_waits:
        raise ValueError("no step decoded the whole batch: raise --new-tokens")
    step = statistics.median(seconds for seconds, _ in steps_and_waits)
    waited = statistics.median(wait for _, wait in steps_and_waits)
    params = SamplingParams(**SAMPLING)
    row = SamplerRow(
        request_id="r", params=params, prompt_token_ids=(1,), output_token_ids=(), position=0
    )
    logits = torch.randn(batch, engine.model("m").loaded.config.vocab_size, device=device)
    with torch.inference_mode():
        bare = timed(graph_of(executor, prompts), 10, device)
        sampled = timed(
            lambda: card_sampling.choose(logits, [row] * batch, executor._send), 10, device
        )
    weight_bytes = sum(
        w.numel() * w.element_size()
        for name, w in executor._opened().weights.items()
        if "embed_tokens" not in name
    )
    token_bytes = executor.kv_cache_spec.page_bytes / 16
    read = (weight_bytes + batch * (context + new_tokens / 2) * token_bytes) / step / 1e9
    found = {
        "tokens_per_second": batch / step,
        "step_ms": 1e3 * step,
        "graph_ms": 1e3 * bare,
        "sampling_ms": 1e3 * sampled,
        "engine_ms": 1e3 * (step - waited),
        "outside_graph": 1 - bare / step,
        "read_gb_per_second": read,
    }
    if limits:
        found["of_copy_bandwidth"] = read / limits["copy GB/s"]
    FIGURES["decode"][batch] = found
    of_copy = f", {found['of_copy_bandwidth']:.0%} of the copy bandwidth" if limits else ""
    print(
        f"decode at batch {batch}, context {context}: {batch / step:,.1f} tokens/s, "
        f"{1e3 * step:.2f} ms a step: graph {1e3 * bare:.2f} ms, sampling alone "
        f"{1e3 * sampled:.2f} ms; the engine computed for {1e3 * (step - waited):.2f} ms and "
        f"waited for {1e3 * waited:.2f} ms; reads {read:,.0f} GB/s{of_copy}",
        flush=True,
    )


def timed_waits(executor: Any) -> list[float]:
    """Seconds for which the engine waited for each step, from now on. Where it waits, its own work
    is hidden behind the device's."""
    card, waits = executor._card, []
    record = type(card).record

    class Waited:
        def __init__(self) -> None:
            self._event = record(card)

        def synchronize(self) -> None:
            began = time.perf_counter()
            self._event.synchronize()
            waits.append(time.perf_counter() - began)

    card.record = Waited
    return waits


def graph_of(executor: Any, prompts: list[list[int]]) -> Callable[[], None]:
    """The graph of the decode step behind these prompts, with that step's inputs in place. The
    cache holds whatever ran before."""
    import torch

    from tilewright_testing.paged import Sequences

    sequences = Sequences(page_size=16, total_pages=executor._num_pages)
    names = [f"p{i}" for i in range(len(prompts))]
    sequences.batch(dict(zip(names, prompts, strict=True)))
    with torch.inference_mode():
        executor.submit(sequences.batch({name: [5] for name in names}), [None] * len(names)).wait()
    graph: Callable[[], None] = executor._graphs[
        next(size for size in executor._sizes if size >= len(prompts))
    ]
    return graph


def products(executor: Any, batches: Sequence[int], device: Any) -> None:
    """Time each product of a layer alone, with the weights of all layers in turn."""
    import torch
    import torch.nn.functional as F

    from tilewright_torch.card_weights import projections

    kernels, allowed = executor._kernels, torch.backends.cuda.matmul
    kept = allowed.allow_bf16_reduced_precision_reduction
    FIGURES["products"] = []
    for key, config in getattr(kernels, "_chosen", {}).items():
        print(f"one row times {key[1:]}: rows, columns, warps, stages {config}")
    for weights in projections(executor._opened()):
        count, columns = weights[0].shape
        for rows in batches:
            x = torch.randn(rows, columns, dtype=weights[0].dtype, device=device)
            variants = {"executor": kernels.linear, "cuBLAS with BF16 sums": F.linear}
            if rows == 1:  # else the executor calls it
                variants["cuBLAS"] = F.linear
            found = {}
            for name, product in variants.items():
                allowed.allow_bf16_reduced_precision_reduction = "sums" in name

                def run(product: Any = product, x: Any = x, weights: Any = weights) -> None:
                    for weight in weights:
                        product(x, weight, None)

                with torch.inference_mode():
                    run()
                    seconds = timed(executor._card.capture(run), 3, device) / len(weights)
                found[name] = count * columns * x.element_size() / seconds / 1e9
            allowed.allow_bf16_reduced_precision_reduction = kept
            FIGURES["products"].append({"shape": [rows, columns, count], **found})
            speeds = ", ".join(f"{name} {speed:,.0f}" for name, speed in found.items())
            print(f"{rows} x {columns} times {count}: weights read at GB/s: {speeds}", flush=True)


def profiled(run: Callable[[], object], device: Any) -> None:
    """Print which kernels a run spends the device's time in."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    cuda = device.type == "cuda"
    with torch.inference_mode():
        timed(run, 1, device)
        with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as made:
            timed(run, 1, device)  # runs twice
    rows = [
        ((e.self_device_time_total if cuda else e.self_cpu_time_total) / 2e3, e.count // 2, e.key)
        for e in made.key_averages()
    ]
    total = sum(milliseconds for milliseconds, _, _ in rows)
    print(f"{total:.3f} ms in {sum(count for _, count, _ in rows)} kernels")
    for milliseconds, count, name in sorted(rows, reverse=True)[:14]:
        print(f"{milliseconds:9.3f} ms {count:5} x {name[:80]}", flush=True)


def forward(executor: Any, prompts: list[list[int]]) -> Any:
    """The logits [L, vocab_size] of the last token of each prompt. The cache holds no requests."""
    from attrs import evolve

    from tilewright_testing.paged import Sequences

    sequences = Sequences(page_size=16, total_pages=executor._num_pages)
    batch = sequences.batch({f"p{i}": tokens for i, tokens in enumerate(prompts)})
    last = evolve(batch, logits_rows=batch.query_starts[1:].long() - 1)
    return executor.forward(last)


def compared(
    engine: Any, args: argparse.Namespace, prompts: Any, context: int, prefill: int
) -> None:
    """Speeds of transformers, and whether both compute the same logits from these weights."""
    import torch

    device, executor = torch.device(args.device), engine.model("m").executor
    weights = dict(executor._opened().weights)
    theirs = transformers_model(engine.model("m").loaded.config, weights, device)
    with torch.inference_mode():
        for length in (prefill, 1):
            tokens = prompts(1, length)
            expected = theirs(tensor(tokens, device), logits_to_keep=1).logits[:, -1].float()
            off = (forward(executor, tokens) - expected).square().mean().sqrt()
            error = float(off / expected.square().mean().sqrt())
            what = f"logits of {length} tokens within {SAME_MODEL:.0%} of transformers'"
            report(what, error <= SAME_MODEL, f"{error:.2%} (root mean square)")
        seconds = timed(
            lambda: theirs(tensor(prompts(1, prefill), device), logits_to_keep=1), 2, device
        )
        FIGURES["prefill"]["transformers"] = prefill / seconds
        print(f"transformers: prefill {prefill / seconds:,.0f} tokens/s", flush=True)
        for batch in [b for b in args.batches if b in (1, 32)]:
            inputs = tensor(prompts(batch, context), device)
            speed = batch / their_step(theirs, inputs, 12, device)
            FIGURES["decode"].setdefault(batch, {})["transformers"] = speed
            print(f"transformers: decode at batch {batch}: {speed:,.1f} tokens/s", flush=True)


SAME_MODEL = 0.1
"""Largest relative difference of logits in bfloat16 through many layers; a wrong kernel gives 1."""


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


def check(device: str) -> None:
    """Run the checks."""
    with tempfile.TemporaryDirectory() as folder:
        others = [(words, started(words, folder)) for words in other_checks(device)]
        for name in CHECKED:
            attempt(name, lambda name=name: check_one(name, Path(folder, name), device))  # type: ignore[misc]
        for words, process in others:
            try:
                lines = process.communicate(timeout=240)[0].strip().splitlines()
            except subprocess.TimeoutExpired:
                process.kill()
                lines = [*process.communicate()[0].strip().splitlines(), "240 s were not enough"]
            passed = process.returncode in (0, NOT_PROVED)
            report(" ".join(words), passed, lines[-1] if lines else "no output")
            if not passed:
                print("\n".join(lines[-40:]), flush=True)


def check_one(name: str, folder: Path, device: str) -> None:
    largest, ours, theirs, same = against_transformers(name, folder, device)
    what = f"{name}: float32 logits within {FLOAT32_ERROR:g} of transformers"
    report(what, largest <= FLOAT32_ERROR, f"{largest:.2g}")
    what = f"{name}: bfloat16 error within {ROUNDING:g} times that of transformers"
    report(what, ours <= ROUNDING * theirs, f"{ours:.3g} and {theirs:.3g}")
    report(f"{name}: equal tokens with and without graphs", same, str(same))


NOT_PROVED = 3
"""Exit code of `plugins verify` when tests did not apply."""


def other_checks(device: str) -> list[list[str]]:
    """Modules to run beside the comparison with transformers, with their arguments."""
    candidate = ["torch", "-o", f"candidate.runtime.device={device}"]
    if device == "cpu":
        candidate = ["card-on-cpu"]
    checks = [["tilewright", "compare", "--reference", "torch", "--candidate", *candidate]]
    if find_spec("pytest") is None:
        print("pytest is not installed: the tests are left out")
        return checks
    tests = ROOT / "tests/plugins/executors"
    quiet = ["pytest", "-q", "-p", "no:cacheprovider"]
    for name in ("test_card_kernels.py", "test_card_device.py"):
        checks.append([*quiet, "--noconftest", str(tests / name)])
    if device == "cpu":
        return checks
    if find_spec("hypothesis") is None:
        print("hypothesis is not installed: `plugins verify` is left out")
        return checks
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
