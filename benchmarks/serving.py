"""What the clients of a server see: Tilewright's, vLLM's CPU build and llama.cpp's on the same
weights.

Each client sends the next request when its last answer has ended: /v1/completions, streamed, with
token ids as prompt, greedy. Servers are processes of their own and take turns; those that do not
have the turn are stopped (SIGSTOP). The clients are this process, which shares the CPUs with the
server, as all sides' do. ``engine`` is AsyncLLMEngine in this process without HTTP, with as many
callers. What the server's event loop costs is its thread's share of the server's CPU time.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median

import httpx
import peers
import torch
from attrs import asdict, frozen
from peers import LLAMA_CPP, TILEWRIGHT, VLLM

from tilewright import AsyncLLMEngine, GenerateConfig, LLMEngine, RuntimeConfig
from tilewright_tools.bench_serving import latency

ENGINE = "engine"
PATIENCE_SECONDS = 900.0
"""For a server to answer the first time."""


@frozen
class Seen:
    """One answer, as its client saw it: when it was sent, and when each piece of text came."""

    sent: float
    pieces: list[float]


Ask = Callable[[list[int], int], Awaitable[Seen]]
"""Generates so many tokens after a prompt."""


@frozen(eq=False)
class Side:
    name: str
    ask: Ask
    pid: int | None = None
    """The server's process group."""

    def signal(self, number: int) -> None:
        if self.pid:
            os.killpg(self.pid, number)


@frozen
class Figure:
    """One level of one round."""

    side: str
    clients: int
    requests_per_second: float
    first_ms: float
    first_p99_ms: float
    between_ms: float
    between_p99_ms: float
    loop_share: float | None
    """CPU time of the server's main thread, as a part of all its threads'."""


def main() -> None:
    if sys.argv[1:2] == ["--llama-cpp"]:
        serve_llama_cpp(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__)
    peers.add_flags(parser, ["bfloat16"], [VLLM, LLAMA_CPP], rounds=3)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32], help="(1 8 32)")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="prompt length (128)")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens to generate (32)")
    parser.add_argument(
        "--requests", type=int, default=4, help="requests of each client in a round (4)"
    )
    args = parser.parse_args()
    figures: list[Figure] = []
    with peers.model_of(args) as model, ExitStack() as opened:
        vocab_size = peers.config_of(model).vocab_size
        sides = list(opened.enter_context(sides_of(args, model)))
        chance = random.Random(0)
        for number in range(args.rounds + 1):
            for clients in args.clients:
                count = clients * (args.requests if number else 1)
                prompts = [
                    [chance.randrange(3, min(vocab_size, 1000)) for _ in range(args.prompt_tokens)]
                    for _ in range(count)
                ]
                first = number % len(sides)
                for side in [*sides[first:], *sides[:first]]:
                    figure = measure(side, prompts, clients, args.new_tokens)
                    if number:
                        figures.append(figure)
    rows = [
        line([f for f in figures if (f.side, f.clients) == (side.name, clients)], figures)
        for clients in args.clients
        for side in sides
    ]
    peers.print_table(
        [
            "clients",
            "server",
            "requests/s",
            "x Tilewright",
            "first token, ms (p99)",
            "between tokens, ms (p99)",
            "event loop's CPU",
        ],
        rows,
    )
    peers.report(args, [asdict(figure) for figure in figures], [])


def line(mine: Sequence[Figure], figures: Sequence[Figure]) -> list[str]:
    ours = [
        f.requests_per_second
        for f in figures
        if f.clients == mine[0].clients and f.side.startswith(TILEWRIGHT)
    ][: len(mine)]
    shares = [f.loop_share for f in mine if f.loop_share is not None]

    def mid(name: str) -> float:
        return float(median(getattr(f, name) for f in mine))

    return [
        f"{mine[0].clients}",
        mine[0].side,
        f"{mid('requests_per_second'):.2f}",
        f"{peers.ratio([f.requests_per_second for f in mine], ours):.2f}",
        f"{mid('first_ms'):.0f} ({mid('first_p99_ms'):.0f})",
        f"{mid('between_ms'):.1f} ({mid('between_p99_ms'):.1f})",
        f"{median(shares):.1%}" if shares else "",
    ]


def measure(side: Side, prompts: list[list[int]], clients: int, new_tokens: int) -> Figure:
    side.signal(signal.SIGCONT)
    before = cpu_of_threads(side.pid)
    started = time.perf_counter()
    seen = asyncio.run(answers(side.ask, prompts, clients, new_tokens))
    seconds = time.perf_counter() - started
    after = cpu_of_threads(side.pid)
    side.signal(signal.SIGSTOP)
    first = latency([one.pieces[0] - one.sent for one in seen])
    between = latency([b - a for one in seen for a, b in pairwise(one.pieces)])
    assert first
    assert between
    share = None
    if side.pid and side.name.startswith(TILEWRIGHT):
        used = {thread: after[thread] - before.get(thread, 0.0) for thread in after}
        share = used[side.pid] / sum(used.values())
    return Figure(
        side.name,
        clients,
        len(prompts) / seconds,
        first.median * 1e3,
        first.p99 * 1e3,
        between.median * 1e3,
        between.p99 * 1e3,
        share,
    )


async def answers(ask: Ask, prompts: list[list[int]], clients: int, new_tokens: int) -> list[Seen]:
    left, seen = iter(prompts), list[Seen]()

    async def client() -> None:
        for prompt in left:
            seen.append(await ask(prompt, new_tokens))

    await asyncio.gather(*(client() for _ in range(clients)))
    return seen


def cpu_of_threads(pid: int | None) -> dict[int, float]:
    """CPU seconds of each thread of a process, from /proc."""
    made = {}
    for task in Path(f"/proc/{pid}/task").iterdir() if pid else ():
        fields = (task / "stat").read_text().rpartition(")")[2].split()
        made[int(task.name)] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return made


# --- sides ----------------------------------------------------------------------------------------


@contextmanager
def sides_of(args: argparse.Namespace, model: Path) -> Iterator[Iterator[Side]]:
    batch, dtype = max(args.clients), args.dtype[0]
    length = args.prompt_tokens + args.new_tokens + 1
    threads = args.threads or torch.get_num_threads()
    with ExitStack() as opened:

        def sides() -> Iterator[Side]:
            for option in args.option or [""]:
                command = [
                    *(sys.executable, "-m", "tilewright", "serve", "--port", "0"),
                    *("--model", f"model={model}", "--weight-dtype", dtype),
                    *("--max-batch-size", str(batch), "--max-seq-len", str(length)),
                    *(("-o", option) if option else ()),
                    *("-o", f"threads={threads}"),
                ]
                name = f"{TILEWRIGHT} {option}".strip()
                yield opened.enter_context(server(name, command, {}))
                engine = opened.enter_context(peers.engine(option or None))
                runtime = RuntimeConfig(
                    weight_dtype=dtype, max_batch_size=batch, max_seq_len=length
                )
                engine.init_model("model", model, runtime)
                yield Side(f"{ENGINE} {option}".strip(), in_process(engine))
            if LLAMA_CPP not in args.without:
                yield opened.enter_context(llama_cpp(model, dtype, batch, length, threads))
            if VLLM not in args.without and args.vllm_python:
                yield opened.enter_context(
                    vllm(args.vllm_python, model, dtype, batch, length, threads)
                )

        yield sides()


def in_process(engine: LLMEngine) -> Ask:
    async def ask(prompt: list[int], new_tokens: int) -> Seen:
        sent, pieces = time.perf_counter(), []
        config = GenerateConfig(max_new_tokens=new_tokens, temperature=0.0, ignore_eos=True)
        async for delta in AsyncLLMEngine(engine).generate("model", prompt, config):
            if delta.token_ids:
                pieces.append(time.perf_counter())
        return Seen(sent, pieces)

    return ask


@contextmanager
def server(name: str, command: Sequence[str], environment: dict[str, str]) -> Iterator[Side]:
    """A server in a process group of its own, once it answers."""
    port = next((int(b) for a, b in pairwise(command) if a == "--port" and b != "0"), None)
    with tempfile.NamedTemporaryFile("w+") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            env=os.environ | environment,
            start_new_session=True,
        )
        try:
            url = started(process, Path(log.name), port)
            side = Side(name, over_http(url), process.pid)
            side.signal(signal.SIGSTOP)
            yield side
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGCONT)
                os.killpg(process.pid, signal.SIGTERM)
            process.wait()


def started(process: "subprocess.Popen[bytes]", log: Path, port: int | None) -> str:
    """The URL of a server, once it is ready. One with port 0 prints it."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.2)
        text = log.read_text()
        _, found, rest = text.partition(" at http://")
        url = f"http://127.0.0.1:{port}" if port else f"http://{rest.split()[0]}" if found else ""
        try:
            if url and urllib.request.urlopen(f"{url}/health").status == 200:
                return url
        except OSError:
            continue
    sys.exit(
        "a server did not start; its last lines:\n" + "\n".join(log.read_text().splitlines()[-15:])
    )


def over_http(url: str) -> Ask:
    async def ask(prompt: list[int], new_tokens: int) -> Seen:
        body = {
            "model": "model",
            "prompt": prompt,
            "max_tokens": new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        pieces = []
        async with httpx.AsyncClient(timeout=None, verify=False) as client:
            sent = time.perf_counter()
            async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
                rest = b""
                async for part in response.aiter_bytes():
                    *events, rest = (rest + part).split(b"\n\n")
                    for event in events:
                        if event.startswith(b"data: {"):
                            assert "error" not in json.loads(event[6:]), event
                            pieces.append(time.perf_counter())
        return Seen(sent, pieces)

    return ask


@contextmanager
def llama_cpp(model: Path, dtype: str, batch: int, length: int, threads: int) -> Iterator[Side]:
    from gguf_file import KINDS, write_gguf

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.gguf")
        write_gguf(model, path, KINDS[dtype])
        numbers = map(str, (batch, length, threads))
        command = [sys.executable, __file__, "--llama-cpp", str(path), *numbers]
        with server(LLAMA_CPP, command, {}) as side:
            yield side


def serve_llama_cpp(path: str, batch: str, length: str, threads: str) -> None:
    """llama.cpp's own server, until it is told to end."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = path
    settings.n_parallel = int(batch)
    settings.n_ctx = int(batch) * -(-int(length) // 256) * 256
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = int(threads)
    settings.cache_ram_mib = 0
    settings.verbosity = -1
    running = xllamacpp.Server(settings)
    print(f"serving at {running.listening_address}", flush=True)
    signal.pause()


@contextmanager
def vllm(
    python: Path, model: Path, dtype: str, batch: int, length: int, threads: int
) -> Iterator[Side]:
    environment = peers.vllm_environment(python, threads) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    command = [
        *(str(python), "-m", "vllm.entrypoints.openai.api_server", "--port", "8765"),
        *("--model", str(model), "--served-model-name", "model", "--dtype", dtype),
        *("--max-model-len", str(length), "--max-num-seqs", str(batch)),
        *("--no-enable-prefix-caching", "--disable-uvicorn-access-log"),
    ]
    with server(VLLM, command, environment) as side:
        yield side


if __name__ == "__main__":
    main()
