"""The CPU benchmarks run without their peers, and take the right figures."""

import json
import math
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import gguf_files
import numpy as np
import pytest
import torch
from checkout import ROOT
from gguf.quants import dequantize

from tilewright import LLMEngine
from tilewright.errors import ExecutorError
from tilewright.settings import DEMO_MODEL
from tilewright.weights import EMBEDDING

FOLDER = ROOT / "benchmarks"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    found = import_module("peers")
    monkeypatch.setattr(found, "READ_BYTES", 1 << 20)
    monkeypatch.setattr(found, "settle", lambda sides: None)
    return found


def run_main(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, flags: str
) -> list[dict[str, Any]]:
    """Run a script with the bundled model; the rows that --json writes."""
    path = tmp_path / "figures.json"
    arguments = [script, "--model", str(DEMO_MODEL), "--json", str(path), *flags.split()]
    monkeypatch.setattr(sys, "argv", arguments)
    import_module(script).main()
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    return rows


TINY = "--dtype float32 --rounds 1"
OPTION = "--option stream_weights=true"


@pytest.mark.parametrize(
    ("script", "flags", "figures"),
    [
        (
            "batch1",
            f"{TINY} {OPTION} --prompt-tokens 5 9 --new-tokens 3 --without llama.cpp transformers",
            ["decode", "prefill", "read_fraction"],
        ),
        ("batches", f"{TINY} {OPTION} --batch 1 2 --prompt-tokens 5 --new-tokens 3", ["decode"]),
        (
            "prefix_hit",
            f"{TINY} {OPTION} --prefix-tokens 32 --tail-tokens 3",
            ["new_seconds", "known_seconds", "ratio"],
        ),
        ("perplexity", f"--dtype float32 {OPTION} --without llama.cpp", ["perplexity"]),
    ],
)
def test_a_benchmark_prints_a_line_and_writes_figures_for_each_side(
    script: str,
    flags: str,
    figures: list[str],
    peers: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = run_main(monkeypatch, tmp_path, script, flags)
    assert len({row["side"] for row in rows}) == 2
    assert all(math.isfinite(row[name]) and row[name] > 0 for row in rows for name in figures)
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 2
    assert sum("stream_weights=true" in line for line in table) == 1


def test_a_side_that_the_executor_refuses_is_left_out(
    peers: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tilewright = peers.tilewright

    @contextmanager
    def refusing(*settings: Any) -> Iterator[Any]:
        if settings[-1]:
            raise ExecutorError("no such thing here")
        with tilewright(*settings) as side:
            yield side

    monkeypatch.setattr(peers, "tilewright", refusing)
    flags = f"{TINY} {OPTION} --batch 1 --prompt-tokens 5 --new-tokens 3"
    (row,) = run_main(monkeypatch, tmp_path, "batches", flags)
    assert row["side"] == "Tilewright float32"
    said = capsys.readouterr().err
    assert "a side with float32 is left out: no such thing here" in said


def test_the_rows_of_a_prefix_hit_say_how_many_tokens_were_found(
    peers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = f"{TINY} --prefix-tokens 40 --tail-tokens 3"
    (row,) = run_main(monkeypatch, tmp_path, "prefix_hit", flags)
    assert row["cached_tokens"] == 32  # whole pages of 16


def test_the_perplexity_of_the_text_that_the_bundled_model_has_memorised_is_low(
    peers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = "--dtype float32 --without llama.cpp"
    (row,) = run_main(monkeypatch, tmp_path, "perplexity", flags)
    assert 1 < row["perplexity"] < 3


def test_each_start_is_measured_until_the_model_is_loaded_and_until_its_tokens(
    peers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = import_module("compile_start")

    def here(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked = json.loads(command[command.index("--measure") + 1])
        return subprocess.CompletedProcess(command, 0, json.dumps(script.measure(**asked)))

    monkeypatch.setattr(script.subprocess, "run", here)
    rows = run_main(monkeypatch, tmp_path, "compile_start", f"{TINY} {OPTION} --prompt-tokens 5")
    assert [row["start"] for row in rows] == ["every start", "first start", "later starts"]
    for row in rows:
        (load,), (first,), (last,) = row["load"], row["first token"], row["last token"]
        assert 0 < load < first < last


def test_each_command_of_all_tables_is_one_that_its_script_accepts(
    peers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    all_tables = import_module("all_tables")
    commands: list[list[str]] = []

    def note(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command[1:])
        return subprocess.CompletedProcess(command, 0, "a table\n")

    class AcceptedError(Exception):
        pass

    def accepted(args: Any) -> None:
        raise AcceptedError

    flags = ["--smollm2", "model", "--vllm-python", "python", "--threads", "2"]
    monkeypatch.setattr(sys, "argv", ["all_tables", *flags, "--out", str(tmp_path)])
    monkeypatch.setattr(all_tables.subprocess, "run", note)
    all_tables.main()
    assert len(commands) == len(all_tables.COMMANDS)
    assert (tmp_path / "batches.md").read_text() == "a table\n"
    monkeypatch.setattr(peers, "model_of", accepted)
    for script, *arguments in commands:
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        with pytest.raises(AcceptedError):
            import_module(Path(script).stem).main()


def test_sides_run_in_another_order_in_each_round_and_the_first_round_does_not_count(
    peers: ModuleType,
) -> None:
    ran: list[str] = []

    def side(name: str) -> Any:
        def run(prompts: Any, new_tokens: int) -> Any:
            ran.append(name)
            return peers.Run([[len(ran)] * new_tokens], 1.0, 1.0)

        return peers.Side(name, "float32", run, 8.0)

    a, b = side("a"), side("b")
    rounds = peers.alternate([a, b], 2, 3, lambda chance: [[chance.random()]])
    assert ran == ["a", "b", "b", "a", "a", "b"]
    assert [run.tokens for run in rounds.runs[a]] == [[[4] * 3], [[5] * 3]]
    assert len(rounds.read_rates) == 2


def test_runs_are_compared_by_rounds(peers: ModuleType) -> None:
    assert peers.ratio([1, 10, 9], [2, 2, 3]) == 3
    mine, theirs = peers.Run([[1, 2], [3, 4]], 1, 1), peers.Run([[1, 2], [3, 5]], 1, 1)
    assert peers.agreeing(mine, theirs) == 1
    assert peers.agreeing(mine, mine) == 2


def test_a_side_that_computes_between_runs_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    peers = import_module("peers")
    monkeypatch.setattr(peers, "PATIENCE_SECONDS", 0.0)
    side = peers.Side("spinning", "float32", None, 8.0)
    over = threading.Event()

    def spin() -> None:
        while not over.is_set():
            pass

    thread = threading.Thread(target=spin)
    thread.start()
    try:
        with pytest.raises(RuntimeError, match=r"to be idle between runs, found .* by spinning"):
            peers.settle([side])
    finally:
        over.set()
        thread.join()
    monkeypatch.setattr(peers, "PATIENCE_SECONDS", 30.0)
    peers.settle([side])


def test_the_cpu_time_of_a_process_includes_its_children(peers: ModuleType) -> None:
    spin = "import time\nwhile time.process_time() < 0.3: pass\nprint(flush=True)\ninput()"
    command = ["sh", "-c", '"$0" -c "$1"; true', sys.executable, spin]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin
    assert process.stdout
    process.stdout.readline()
    assert peers.cpu_seconds(process.pid) >= 0.25
    process.communicate(b"\n")


# --- GGUF files for llama.cpp ---------------------------------------------------------------------


def test_a_gguf_file_in_f32_has_the_weights_of_the_model(tmp_path: Path) -> None:
    written = import_module("gguf_file")
    path = tmp_path / "model.gguf"
    size = written.write_gguf(DEMO_MODEL, path, "F32")
    with LLMEngine.from_plugins() as engine:
        source = engine.load(DEMO_MODEL)
    found = gguf_files.load_checked(path)
    assert set(found.weights.names()) == set(source.weights.names())
    for name in source.weights.names():
        torch.testing.assert_close(
            found.weights.get(name).float(), source.weights.get(name).float(), rtol=0, atol=0
        )
    assert found.config.rope == source.config.rope
    assert found.config.norm_eps == pytest.approx(source.config.norm_eps)
    read = [name for name in found.weights.names() if name != EMBEDDING]  # it is not the head too
    assert size == sum(found.weights.info(name).nbytes for name in read)


def test_the_matrix_of_the_logits_of_a_4_bit_file_has_6_bits(tmp_path: Path) -> None:
    written = import_module("gguf_file")
    path = tmp_path / "model.gguf"
    written.write_gguf(DEMO_MODEL, path, "Q4_0")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    logits = "output.weight" if "output.weight" in kinds else "token_embd.weight"
    assert kinds[logits] == "Q6_K"
    assert kinds["blk.0.ffn_up.weight"] == "Q4_0"
    assert kinds["blk.0.attn_norm.weight"] == "F32"


def test_q6_k_is_within_half_a_step_of_the_values() -> None:
    written = import_module("gguf_file")
    values = np.random.default_rng(0).normal(size=(3, 512)).astype(np.float32)
    values[0, :256] = 0
    found = dequantize(written.q6_k(values), gguf.GGMLQuantizationType.Q6_K)
    parts = np.abs(values).reshape(-1, 16).max(axis=1)
    errors = np.abs(found - values).reshape(-1, 16).max(axis=1)
    # Half a step of 1/31 of the largest value, and what rounding the step itself takes.
    assert (errors <= parts / 31 * 0.5 + np.abs(values).max() / 127 * 0.6).all()
    assert (found[0, :256] == 0).all()


def test_prompts_differ_between_rounds_and_stay_in_the_vocabulary(peers: ModuleType) -> None:
    config = peers.config_of(DEMO_MODEL)
    prompts = peers.random_prompts(config, 2, 50)
    chance = random.Random(0)
    first, second = prompts(chance), prompts(chance)
    assert first != second
    assert all(len(prompt) == 50 and max(prompt) < config.vocab_size for prompt in first)
