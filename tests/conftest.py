"""Fixtures that many tests share."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fake_pypto import checkout, machine, unimported
from other_threads import eventually

from tilewright import LLMEngine, RuntimeConfig
from tilewright.settings import DEMO_MODEL

if not torch.cuda.is_available():
    # Triton reads it when it is imported: its kernels then run on the CPU, operation by operation.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c() -> None:
    # A job in the background of a shell ignores Ctrl-C, and so do the processes that it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    # With small tensors, more threads only wait for each other and for other workers.
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for processes that tests start


@pytest.fixture
def engine() -> Iterator[LLMEngine]:
    """The bundled model as ``demo``, in float32, with pages shorter than any prompt."""
    with LLMEngine.from_plugins() as engine:
        runtime = RuntimeConfig(
            weight_dtype="float32",
            page_size=8,
            total_pages=64,
            max_batch_size=4,
            max_batch_tokens=32,
            max_seq_len=256,
        )
        engine.init_model("demo", DEMO_MODEL, runtime)
        yield engine
        if not engine._closed:
            # No test leaves pages behind; a stream that was dropped ends after the step.
            eventually(lambda: not engine.stats("demo").used_pages)
            engine.model("demo").allocator.check_integrity()


@pytest.fixture
def pypto_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The root of a checkout of the fake PyPTO, on a machine that meets all its requirements."""
    for name, value in machine(tmp_path / "machine").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("FAKE_PYPTO", "FAKE_PYPTO_MEMORY", "PYPTO_RUNTIME_LOG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("tilewright_pypto.adapter._architecture", None)
    with unimported():
        yield checkout(tmp_path / "checkout")
