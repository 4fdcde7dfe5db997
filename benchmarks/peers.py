"""The sides that the benchmarks compare, and runs of them in turns.

A side holds its model ready and generates greedily from token ids. All sides of a table are loaded
in one process (vLLM in a child, by an interpreter of its own) and run one after the other in every
round, each round in another order, so that other load on the machine affects them alike. Before
each run the process and its children must have become idle: no side may wait by spinning.
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import torch
from attrs import frozen

from tilewright import GenerateConfig, LLMEngine, RuntimeConfig
from tilewright.errors import ExecutorError
from tilewright.types import ModelConfig
from tilewright.weights import EMBEDDING, HEAD, expected_tensors

Prompts = Sequence[Sequence[int]]

TILEWRIGHT, LLAMA_CPP, TRANSFORMERS, VLLM = "Tilewright", "llama.cpp", "transformers", "vLLM"

WEIGHT_BITS = {"float32": 32, "bfloat16": 16, "float16": 16, "int8": 8, "int4": 5}
"""Bits of a matrix's element in the torch executor; int4 has 32 for scale and zero point of 32."""
HEAD_BITS = WEIGHT_BITS | {"int4": 8}
FLOATS = ("float32", "bfloat16", "float16")
LLAMA_CPP_DTYPES = ("float32", "bfloat16", "int8", "int4")
READ_BYTES = 1 << 29
"""Size of the tensor whose sum measures how fast memory is read: far above any cache."""
PATIENCE_SECONDS = 10.0


@frozen
class Run:
    """One generation from a batch of prompts."""

    tokens: list[list[int]]
    """The new tokens of each prompt."""
    prefill_seconds: float
    """Until each prompt has its first new token."""
    decode_seconds: float
    """From then until each has its last."""


@frozen(eq=False)
class Side:
    name: str
    dtype: str
    run: Callable[[Prompts, int], Run]
    """Generates so many tokens after each prompt, all prompts at once."""
    weight_bytes: float
    """Bytes of weights that each decode step reads."""
    pid: int | None = None
    """The process that computes, where it is not this one."""
    stored: str = ""
    """What the side itself calls the dtype, where it has another name."""

    @property
    def label(self) -> str:
        return f"{self.name} {self.stored or self.dtype}"


# --- sides ----------------------------------------------------------------------------------------


@contextmanager
def tilewright(
    model: Path, dtype: str, batch: int, length: int, option: str | None = None
) -> Iterator[Side]:
    """The torch executor; ``option`` is KEY=VALUE of the executor, VALUE in JSON or a text."""
    with engine(option) as opened:
        runtime = RuntimeConfig(
            weight_dtype=dtype, max_seq_len=length, max_batch_size=batch, prefix_cache=False
        )
        opened.init_model("model", model, runtime)

        def run(prompts: Prompts, new_tokens: int) -> Run:
            config = GenerateConfig(max_new_tokens=new_tokens, temperature=0.0, ignore_eos=True)
            results = opened.generate_batch("model", prompts, config)
            for result in results:
                if result.error:
                    raise result.error
            timings = [result.timings for result in results]
            first = max(t.prefill_seconds for t in timings)
            last = max(t.prefill_seconds + t.decode_seconds for t in timings)
            return Run([list(result.token_ids) for result in results], first, last - first)

        yield Side(side_name(option), dtype, run, weight_bytes(model, dtype))


def side_name(option: str | None) -> str:
    return f"{TILEWRIGHT} {option}" if option else TILEWRIGHT


@contextmanager
def engine(option: str | None) -> Iterator[LLMEngine]:
    options: dict[str, Any] = {}
    if option:
        key, _, value = option.partition("=")
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    with LLMEngine.from_plugins(options={"executor": options}) as opened:
        yield opened


def config_of(model: Path) -> ModelConfig:
    with LLMEngine.from_plugins() as opened:
        loaded = opened.load(model)
    loaded.weights.close()
    return loaded.config


def weight_bytes(model: Path, dtype: str) -> float:
    """Bytes of the matrices that a decode step of the torch executor reads."""
    config = config_of(model)
    shapes = expected_tensors(config)
    embedding = prod(shapes.pop(EMBEDDING))
    head = embedding if config.tie_word_embeddings else prod(shapes.pop(HEAD))
    layers = sum(prod(shape) for shape in shapes.values() if len(shape) > 1)
    return (layers * WEIGHT_BITS[dtype] + head * HEAD_BITS[dtype]) / 8


@contextmanager
def llama_cpp(model: Path, dtype: str, length: int, threads: int) -> Iterator[Side]:
    """llama.cpp on a GGUF file written from the model: one sequence, its defaults otherwise."""
    from gguf_file import KINDS, write_gguf

    from tilewright_torch.openmp import end_threads

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.gguf")
        size = write_gguf(model, path, KINDS[dtype])
        end_threads()  # llama.cpp uses the same library, in a thread of its own
        server = LlamaCpp(path, length, threads)
        yield Side(LLAMA_CPP, dtype, server.run, size, stored=KINDS[dtype])


class LlamaCpp:
    """A llama.cpp server of one sequence, in this process, without its cache of prompts."""

    def __init__(self, path: Path, length: int, threads: int) -> None:
        import xllamacpp

        settings = xllamacpp.CommonParams()
        settings.model.path = str(path)
        settings.n_ctx = -(-length // 256) * 256
        settings.n_parallel = 1
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
        settings.cache_ram_mib = 0
        settings.warmup = False
        settings.verbosity = -1
        self._server = xllamacpp.Server(settings)

    def run(self, prompts: Prompts, new_tokens: int) -> Run:
        """Times are llama.cpp's own: those of requests, without HTTP."""
        (prompt,) = prompts
        answer = self.complete(prompt, n_predict=new_tokens, ignore_eos=True, return_tokens=True)
        timings = answer["timings"]
        assert timings["cache_n"] == 0
        return Run([answer["tokens"]], timings["prompt_ms"] / 1e3, timings["predicted_ms"] / 1e3)

    def logprob(self, prompt: Sequence[int], token: int) -> float:
        """Log-probability of a token after a prompt, whose beginning may be cached.

        A bias makes the token the one that is chosen; the log-probability is from before the bias.
        """
        answer = self.complete(
            prompt, n_predict=1, n_probs=1, logit_bias=[[token, 1e6]], cache_prompt=True
        )
        (found,) = answer["completion_probabilities"]
        assert found["id"] == token
        return float(found["logprob"])

    def complete(self, prompt: Sequence[int], **request: Any) -> dict[str, Any]:
        content = {"prompt": list(prompt), "temperature": 0, "cache_prompt": False} | request
        asked = urllib.request.Request(
            f"{self._server.listening_address}/completion",
            json.dumps(content).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(asked) as answer:
            found: dict[str, Any] = json.load(answer)
        return found


@contextmanager
def transformers(model: Path, dtype: str) -> Iterator[Side]:
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.generation.streamers import BaseStreamer
    from transformers.utils import logging

    logging.disable_progress_bar()
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()

    class Clock(BaseStreamer):  # type: ignore[misc]
        """Notes when each token comes; the prompt comes first."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: torch.Tensor) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    def run(prompts: Prompts, new_tokens: int) -> Run:
        (prompt,) = prompts  # generate() streams one sequence
        config = GenerationConfig(
            max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        clock = Clock()
        started = time.perf_counter()
        ids = loaded.generate(torch.tensor([prompt]), generation_config=config, streamer=clock)
        first, last = clock.times[1], clock.times[-1]
        return Run([ids[0, len(prompt) :].tolist()], first - started, last - first)

    yield Side(TRANSFORMERS, dtype, run, weight_bytes(model, dtype))


def vllm_environment(python: Path, threads: int) -> dict[str, str]:
    """Variables for a process of vLLM's CPU build, which binds its threads to CPUs."""
    cores = sorted(os.sched_getaffinity(0))[:threads]
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "KMP_BLOCKTIME": "1",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        # The worker in the child itself: between processes, the workers wait by spinning.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "HF_HUB_OFFLINE": "1",
    }
    environment.pop("PYTHONPATH", None)
    openmp = python.parent.parent / "lib" / "libiomp5.so"  # where pip puts it; vLLM asks for it
    if openmp.exists():
        environment["LD_PRELOAD"] = str(openmp)
    return environment


@contextmanager
def vllm(
    python: Path, model: Path, dtype: str, batch: int, length: int, threads: int
) -> Iterator[Side]:
    """vLLM's CPU build in a child process, run by its own interpreter (``vllm_child.py``)."""
    with tempfile.TemporaryFile("w+") as log:
        child = subprocess.Popen(
            [python, Path(__file__).with_name("vllm_child.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=vllm_environment(python, threads),
        )
        assert child.stdin
        assert child.stdout

        def ask(**request: Any) -> dict[str, Any]:
            assert child.stdin
            assert child.stdout
            print(json.dumps(request), file=child.stdin, flush=True)
            line = child.stdout.readline()
            if not line:
                log.seek(0)
                last = "\n".join(log.read().splitlines()[-15:])
                sys.exit(
                    f"vLLM's process {python} ended without an answer; its last lines:\n{last}"
                )
            answer: dict[str, Any] = json.loads(line)
            return answer

        def run(prompts: Prompts, new_tokens: int) -> Run:
            answer = ask(prompts=prompts, new_tokens=new_tokens)
            return Run(answer["tokens"], answer["first"], answer["last"] - answer["first"])

        try:
            ask(model=str(model), dtype=dtype, batch=batch, length=length)
            yield Side(VLLM, dtype, run, weight_bytes(model, dtype), child.pid)
        finally:
            child.stdin.close()
            child.stdout.close()
            child.wait()


# --- runs in turns --------------------------------------------------------------------------------


@frozen
class Rounds:
    runs: dict[Side, list[Run]]
    """The runs of each side, one a round."""
    read_rates: list[float]
    """Bytes per second at which torch's threads sum a large tensor, in each round."""


def alternate(
    sides: Sequence[Side],
    rounds: int,
    new_tokens: int,
    prompts: Callable[[random.Random], Prompts],
) -> Rounds:
    """Run all sides in every round, after a round to warm up; prompts differ between rounds."""
    chance = random.Random(0)
    found = Rounds({side: [] for side in sides}, [])
    for number in range(rounds + 1):
        asked = prompts(chance)
        first = number % len(sides)
        for side in [*sides[first:], *sides[:first]]:
            settle(sides)
            run = side.run(asked, new_tokens)
            if number:
                found.runs[side].append(run)
        if number:
            settle(sides)
            found.read_rates.append(read_rate())
    return found


def random_prompts(config: ModelConfig, batch: int, length: int) -> Callable[[random.Random], Any]:
    most = min(config.vocab_size, 1000)
    return lambda chance: [[chance.randrange(3, most) for _ in range(length)] for _ in range(batch)]


def settle(sides: Sequence[Side]) -> None:
    """Wait until no side computes. Raises RuntimeError where one does not stop."""
    children = [side.pid for side in sides if side.pid]
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        before = time.process_time() + sum(map(cpu_seconds, children))
        time.sleep(0.1)
        used = time.process_time() + sum(map(cpu_seconds, children)) - before
        if used < 0.02:
            return
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"expected all sides to be idle between runs, found {used * 10:.1f} cores in use "
                f"after {PATIENCE_SECONDS:.0f} s by {', '.join(side.label for side in sides)}: "
                "leave out the one that waits by spinning with --without"
            )


def cpu_seconds(pid: int) -> float:
    """CPU time of a process and its children, from /proc."""
    process = Path("/proc", str(pid))
    fields = (process / "stat").read_text().rpartition(")")[2].split()
    children = (process / "task" / str(pid) / "children").read_text().split()
    ticks = int(fields[11]) + int(fields[12])  # utime, stime
    return ticks / os.sysconf("SC_CLK_TCK") + sum(cpu_seconds(int(child)) for child in children)


def read_rate() -> float:
    """Bytes per second that torch's threads read, the best of three."""
    values = torch.ones(READ_BYTES // 4)
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        values.sum()
        seconds.append(time.perf_counter() - started)
    return READ_BYTES / min(seconds)


def ratio(rates: Sequence[float], others: Sequence[float]) -> float:
    """The median of the rounds' ratios."""
    return median(a / b for a, b in zip(rates, others, strict=True))


def agreeing(run: Run, other: Run) -> int:
    """How many tokens two runs have in common before they differ; the least of their prompts."""
    counts = []
    for mine, theirs in zip(run.tokens, other.tokens, strict=True):
        pairs = zip(mine, theirs, strict=True)
        counts.append(next((i for i, (a, b) in enumerate(pairs) if a != b), len(mine)))
    return min(counts)


# --- command line and report ----------------------------------------------------------------------


def add_flags(
    parser: argparse.ArgumentParser, dtypes: Sequence[str], peers: Sequence[str], rounds: int = 0
) -> None:
    parser.add_argument(
        "--model", type=Path, help="model directory; default: random weights of Qwen3-0.6B's shape"
    )
    parser.add_argument(
        "--dtype", nargs="+", default=list(dtypes), choices=WEIGHT_BITS, help="weights"
    )
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="run one more side of Tilewright, with this option of the torch executor",
    )
    if peers:
        parser.add_argument(
            "--without", nargs="+", default=[], choices=peers, help="sides to leave out"
        )
    if VLLM in peers:
        parser.add_argument("--vllm-python", type=Path, help="Python that imports vLLM")
    if rounds:
        parser.add_argument(
            "--rounds", type=int, default=rounds, help=f"measured rounds, after a first ({rounds})"
        )
    parser.add_argument(
        "--threads", type=int, help="threads of every side; default: torch's choice"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every round's figures")


@contextmanager
def model_of(args: argparse.Namespace) -> Iterator[Path]:
    """The model that was named, or one of random weights; sets the threads of torch."""
    from load_memory import write_random_model

    if args.threads:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        yield args.model or write_random_model(Path(folder, "model"))


@contextmanager
def sides_of(
    args: argparse.Namespace, model: Path, batch: int, length: int, peers: Sequence[str]
) -> Iterator[list[Side]]:
    """Tilewright's sides and those of the peers that are installed, for each dtype.

    A side that its executor refuses is left out, with a line on standard error.
    """
    present = [peer for peer in peers if is_present(peer, args)]
    with ExitStack() as stack:
        sides = []
        for dtype in args.dtype:
            for side in _of_dtype(args, model, dtype, batch, length, present):
                try:
                    sides.append(stack.enter_context(side))
                except ExecutorError as error:
                    print(f"a side with {dtype} is left out: {error}", file=sys.stderr)
        yield sides


def _of_dtype(
    args: argparse.Namespace, model: Path, dtype: str, batch: int, length: int, present: list[str]
) -> Iterator[AbstractContextManager[Side]]:
    """The sides that run a dtype, not opened yet; Tilewright without an option comes first."""
    threads = torch.get_num_threads()
    for option in (None, *args.option):
        yield tilewright(model, dtype, batch, length, option)
    if LLAMA_CPP in present and dtype in LLAMA_CPP_DTYPES:
        yield llama_cpp(model, dtype, length, threads)
    if TRANSFORMERS in present and dtype in FLOATS:
        yield transformers(model, dtype)
    if VLLM in present and dtype in FLOATS:
        yield vllm(args.vllm_python, model, dtype, batch, length, threads)


def is_present(peer: str, args: argparse.Namespace) -> bool:
    """Whether a peer is to run; says on standard error why one cannot."""
    if peer in args.without:
        return False
    why = ""
    if peer == VLLM and not args.vllm_python:
        why = "give --vllm-python PATH"
    elif peer == LLAMA_CPP and not (find_spec("xllamacpp") and find_spec("gguf")):
        why = "pip install xllamacpp gguf"
    elif peer == TRANSFORMERS and not find_spec("transformers"):
        why = "pip install transformers"
    if why:
        print(f"{peer} is left out: {why}", file=sys.stderr)
    return not why


def report(args: argparse.Namespace, rows: list[dict[str, Any]], read_rates: list[float]) -> None:
    """Print what the figures hold for, below the table, and write --json."""
    facts = machine()
    read = median(read_rates) / 1e9 if read_rates else None
    reads = f", memory read at {read:.1f} GB/s" if read else ""
    rounds = f"; medians of {args.rounds} rounds" if "rounds" in args else ""
    print(
        f"\n{args.model.name if args.model else 'Qwen3-0.6B shape'}; {facts['cpu']}, "
        f"{facts['threads']} threads{reads}; {facts['versions']}{rounds}",
        flush=True,
    )
    if args.json:
        record = {"command": sys.argv, "machine": facts, "read_gb_per_second": read, "rows": rows}
        args.json.write_text(json.dumps(record, indent=2) + "\n")


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    packages = ("torch", "transformers", "xllamacpp")
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "native_bfloat16": torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        "versions": ", ".join(f"{name} {version(name)}" for name in packages if find_spec(name)),
    }


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A Markdown table whose columns are aligned; those after the first are numbers."""
    cells = [headings, *rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    for row in (headings, rule, *rows):
        first, *others = zip(row, widths, strict=True)
        shown = [first[0].ljust(first[1]), *(text.rjust(width) for text, width in others)]
        print(f"| {' | '.join(shown)} |", flush=True)
