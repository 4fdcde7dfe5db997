"""The CUDA benchmark runs on a stand-in for a device."""

import json
import os
import subprocess
import sys
from pathlib import Path

from checkout import ROOT


def run(folder: Path, *flags: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, ROOT / "benchmarks/cuda.py", "--device", "cpu", "--tiny", *flags],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_part_runs_and_what_fails_does_not_stop_the_rest(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    # 64 tokens fit a step: no step decodes a batch of 65.
    done = run(tmp_path, "--batches", "65", "1", "3", "--new-tokens", "8", "--json", str(figures))
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    assert len(failed) == 1, done.stdout[-3000:]
    assert failed[0].startswith("FAILED: decode at batch 65")
    assert "raise --new-tokens" in done.stdout
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, "failed: decode at batch 65")
    found = json.loads(figures.read_text())
    assert found["decode"].keys() == {"1", "3"}
    assert {"tokens_per_second", "transformers", "graph_ms"} <= found["decode"]["1"].keys()
    assert found["prefill"].keys() == {"tilewright", "transformers"}
    assert {tuple(row["shape"]) for row in found["products"]} >= {(1, 64, 128), (3, 160, 64)}
    for line in ("logits of 64 tokens", "logits of 1 tokens"):
        assert f"ok: {line} within 10% of transformers'" in done.stdout
    assert "[profile of a decode step at batch 1:" in done.stdout
