"""The PyPTO adapter on a fake PyPTO, and the fake checked against the real one."""

import inspect
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from attrs import evolve
from fake_pypto import cards, failing
from pypto_oracle import pypto_or_skip
from qwen3_layers import Cache, compare_layer, config_of, random_weights

from tilewright import GenerateConfig, LLMEngine, RuntimeConfig, hookimpl
from tilewright.cli import main
from tilewright.errors import ExecutorError, OutOfPagesError, TilewrightError
from tilewright.settings import DEMO_MODEL
from tilewright_kernels import source
from tilewright_kernels.qwen3_14b.plugin import KERNELS, SOURCES, kernels_of
from tilewright_kernels.qwen3_14b.shape import LayerShape
from tilewright_pypto import adapter, installation, rings
from tilewright_pypto.adapter import SURFACE, PyptoDevice, open_device
from tilewright_pypto.crash import CrashNote
from tilewright_pypto.options import Options

SHAPE = LayerShape(
    hidden=64, intermediate=64, heads=4, kv_heads=2, head_dim=32, page_size=16, max_tokens=64
)
SET = kernels_of(SHAPE)


@pytest.fixture
def log(tmp_path):
    """The calls that the fake received, one per line."""

    def lines(beginning: str = "") -> list[str]:
        file = tmp_path / "machine" / "log"
        text = file.read_text() if file.exists() else ""
        return [line for line in text.splitlines() if line.startswith(beginning)]

    return lines


@pytest.fixture
def opened(pypto_root, monkeypatch, tmp_path):
    """Opens devices of the fake, and closes them after the test."""
    monkeypatch.setattr(installation, "DEV", cards(tmp_path / "dev", 0, 3))
    devices = []

    def opened(
        platform: str = "a2a3sim", card: int | None = None, report: Any = ignore, **options: Any
    ) -> PyptoDevice:
        options = {"pypto_root": str(pypto_root)} | options
        devices.append(open_device(Options(platform=platform, **options), card, report))
        return devices[-1]

    yield opened
    for device in devices:
        device.close()


def ignore(*what: Any) -> None:
    pass


def head_tensors(device: PyptoDevice, rows: int = 3) -> dict[str, Any]:
    """The head's parameters: weights kept on the device, the rest on the host."""
    random = torch.Generator().manual_seed(0)
    weights = {
        "final_norm": torch.ones(1, SHAPE.hidden),
        "lm_head": torch.randn(40, SHAPE.hidden, generator=random).bfloat16(),
    }
    return {
        "hidden": torch.randn(rows, SHAPE.hidden, generator=random).bfloat16(),
        **{name: device.keep(tensor) for name, tensor in weights.items()},
        "logits": torch.full((rows, 40), float("nan")),
    }


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    (line,) = str(error.value).splitlines()
    return line


# --- kernels on a device --------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["prefill_layer", "decode_layer"])
def test_a_layer_on_the_device_agrees_with_the_torch_executor(opened, kernel):
    device = opened()
    run = device.load([kernel], SET)[kernel]
    config = config_of(SHAPE)
    cache = Cache(SHAPE, 12)
    cache.add(17, 0, 5)
    news = [1, 1, 1] if kernel == "decode_layer" else [9, 20, 1]

    def on_device(tensors: dict[str, torch.Tensor]) -> None:
        """Weights and caches stay on the device; the other tensors are passed from the host."""
        stays = [n for n in tensors if n[:1] == "w" or "norm" in n or "cache" in n]
        kept = {n: device.keep(tensors[n]) for n in stays}
        run(**tensors | kept)
        for name in ("k_cache", "v_cache"):
            tensors[name].copy_(device.read(kept[name]))

    batch = cache.step(news)
    hidden = torch.randn(sum(news), SHAPE.hidden, generator=torch.Generator().manual_seed(0))
    weights = random_weights(config)
    compared = compare_layer(on_device, kernel, config, weights, 0, hidden.bfloat16(), batch, cache)
    compared.check()


def test_only_outputs_come_back_to_the_host(opened):
    device = opened()
    tensors = head_tensors(device)
    before = tensors["hidden"].clone()
    device.load(["head"], SET)["head"](**tensors)
    assert tensors["logits"].isfinite().all()
    assert torch.equal(tensors["hidden"], before)


def test_cache_storage_is_allocated_as_rows(opened):
    device = opened()
    rows = device.allocate((5, 2, 16, 32), torch.bfloat16)
    assert tuple(rows.shape) == (5 * 2 * 16, 32)
    assert rows.dtype == torch.bfloat16
    assert not isinstance(rows, torch.Tensor)
    assert device.read(rows).shape == (160, 32)


def test_tensors_written_to_the_device_are_read_back(opened):
    device = opened()
    kept = device.keep(torch.zeros(3, 4))
    new = torch.arange(12.0).view(4, 3).T  # not contiguous
    device.write(kept, new)
    assert torch.equal(device.read(kept), new)
    rows = device.allocate((2, 2, 16, 32), torch.bfloat16)
    device.write(rows, torch.ones(64, 32).bfloat16())
    assert device.read(rows).eq(1).all()


def test_a_tensor_of_a_wrong_name_dtype_or_layout_is_refused(opened):
    device = opened()
    tensors = head_tensors(device)
    head = device.load(["head"], SET)["head"]
    with pytest.raises(ExecutorError, match="wants lm_head as bfloat16"):
        head(**tensors | {"lm_head": device.keep(torch.zeros(40, SHAPE.hidden))})
    with pytest.raises(ExecutorError, match="no parameter 'lm_heads'; did you mean 'lm_head'"):
        head(**tensors, lm_heads=tensors["lm_head"])
    with pytest.raises(ExecutorError, match="contiguous"):
        head(**tensors | {"hidden": torch.zeros(SHAPE.hidden, 3).bfloat16().T})


@pytest.mark.parametrize(
    ("platform", "card", "name", "number"),
    [("a2a3", 3, "a2a3 card 3", 3), ("a5", 0, "a5 card 0", 0), ("a5sim", None, "a5sim", 0)],
)
def test_a_call_uses_the_selected_card_and_ring_sizes(opened, log, platform, card, name, number):
    device = opened(platform, card, ring_task_window=131072, ring_dep_pool=5)
    assert device.name == name
    device.load(["head"], SET)["head"](**head_tensors(device))
    (called,) = log("call")
    with_rings = json.loads(called.removeprefix(f"call head on {number} with "))
    assert with_rings == {"ring_task_window": 131072, "ring_heap": None, "ring_dep_pool": 5}


def test_a_call_gets_rings_large_enough_for_its_kernel(opened, log, monkeypatch):
    monkeypatch.setitem(rings.STANDARD, "ring_heap", 1024)
    device = opened("a2a3sim", ring_task_window=131072)
    device.load(["head"], SET)["head"](**head_tensors(device))
    (called,) = log("call")
    heap = rings.needed("head", SET, 1)["ring_heap"]
    assert json.loads(called.removeprefix("call head on 0 with ")) == {
        "ring_task_window": 131072,
        "ring_heap": heap,
        "ring_dep_pool": None,
    }
    assert heap > 1024


@pytest.mark.parametrize(
    ("ring", "wrong", "right"),
    [
        ("ring_task_window", [0, 2, 6, -4], [4, 131072]),
        ("ring_heap", [512, 1025], [1024, 1 << 32]),
        ("ring_dep_pool", [3, 1 << 31], [4, 5, (1 << 31) - 1]),
    ],
)
def test_ring_sizes_that_pypto_does_not_accept_are_refused(ring, wrong, right):
    for size in wrong:
        with pytest.raises(ValueError, match=ring):
            Options(**{ring: size})
    assert [getattr(Options(**{ring: size}), ring) for size in right] == right


def test_the_memory_limit_follows_the_card_or_the_machine(opened):
    assert opened("a2a3", 0).memory_limit == 16 << 30
    from tilewright.machine import total_memory

    assert 0 < opened("a2a3sim").memory_limit <= total_memory() // 2


# --- compiling ------------------------------------------------------------------------------------


def test_kernels_are_compiled_once_and_loaded_by_the_next_device(opened, log):
    said = []
    report = lambda *what: said.append(what)  # noqa: E731
    kernels = ["prefill_layer", "decode_layer", "head"]
    opened(report=report).load(kernels, SET)
    assert [s[1:] for s in said] == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert [s[0] for s in said[:3]] == [f"compiling {k} for a2a3sim" for k in kernels]
    assert said[3][0].startswith("3 kernels compiled in ")
    assert len(log("compile")) == 3

    said.clear()
    device = opened(report=report)
    run = device.load(kernels, SET)
    assert len(log("compile")) == 3
    assert said[0] == ("loading prefill_layer for a2a3sim", 0, 3)
    assert said[3][0].startswith("3 kernels from the cache, ")
    assert said[3][0].endswith(" s saved")
    tensors = head_tensors(device)
    run["head"](**tensors)
    assert tensors["logits"].isfinite().all()


def test_only_changes_that_affect_the_code_compile_it_again(opened, log, pypto_root, tmp_path):
    def compiles(shape: LayerShape = SHAPE, **how: Any) -> bool:
        before = len(log("compile"))
        opened(**how).load(["head"], kernels_of(shape))
        return len(log("compile")) > before

    assert compiles()
    assert not compiles(ring_heap=1024, compile_jobs=1)
    assert compiles(platform="a2a3", card=3)
    assert compiles(build_dir=str(tmp_path / "elsewhere"))
    assert compiles(evolve(SHAPE, norm_eps=1e-5))
    assert not compiles()
    (pypto_root / "python" / "pypto" / "changed.py").touch()
    assert compiles()
    (tmp_path / "machine" / "ptoas" / "ptoas").write_text("#!/bin/sh\necho ptoas 0.57 \n")
    assert compiles()
    with (tmp_path / "machine" / "bin" / "g++-15").open("a") as compiler:
        compiler.write("# another release\n")
    assert compiles()
    assert not compiles()


@pytest.mark.parametrize("changed", ["head.py", "blocks.py"])
def test_a_kernel_whose_source_changed_is_compiled_again(
    opened, log, tmp_path, monkeypatch, changed
):
    opened().load(["head"], SET)
    copies = tmp_path / "kernels"
    shutil.copytree(SOURCES["head"].parent, copies)
    for name in SOURCES:
        monkeypatch.setitem(SOURCES, name, copies / f"{name}.py")
    opened().load(["head"], SET)
    assert len(log("compile")) == 1
    (copies / changed).write_text((copies / changed).read_text() + "# changed\n")
    opened().load(["head"], SET)
    assert len(log("compile")) == 2


def test_a_build_that_pypto_cannot_load_is_compiled_again(opened, log):
    device = opened()
    device.load(["head"], SET)
    (device.artifacts["head"] / "compiled_meta.json").write_text("{")
    opened().load(["head"], SET)
    assert len(log("compile")) == 2


def test_the_device_reports_where_its_artifacts_are(opened, tmp_path):
    device = opened(build_dir=str(tmp_path / "builds"))
    assert device.artifacts == {}
    device.load(["head"], SET)
    home = device.artifacts["head"]
    assert home.parent == tmp_path / "builds"
    assert (home / "compiled_meta.json").is_file()


@pytest.mark.parametrize("before", [None, "7"])
@pytest.mark.parametrize("jobs", [1, 3, None])
def test_compile_jobs_limits_assemblers_and_compilers(opened, monkeypatch, log, before, jobs):
    name, most = "PYPTO_CODEGEN_MAX_WORKERS", jobs or len(os.sched_getaffinity(0))
    monkeypatch.delenv(name, raising=False)
    if before:
        monkeypatch.setenv(name, before)
    seen = []
    monkeypatch.setattr(source, "load", spying(source.load, lambda: seen.append(os.environ[name])))
    opened(compile_jobs=jobs).load(["head"], SET)
    assert seen[0] == str(most)
    assert os.environ.get(name) == before
    opened(compile_jobs=jobs).load(["head"], SET)  # from the cache; PyPTO may compile again
    assert log(f"{min(most, 8)} compilers") == 2 * [f"{min(most, 8)} compilers for head"]
    pool = sys.modules["pypto.runtime.device_runner"].ThreadPoolExecutor
    assert pool is ThreadPoolExecutor


def spying(function, then):
    def spied(*args, **kwargs):
        then()
        return function(*args, **kwargs)

    return spied


def test_parameters_that_are_not_in_the_source_are_refused(opened, monkeypatch):
    device = opened()
    program = sys.modules["pypto.ir"].CompiledProgram
    monkeypatch.setattr(program, "param_names", ["hidden", "final_norm", "lm_head", "logits_v1"])
    with pytest.raises(ExecutorError, match="logits_v1, but the source has hidden") as error:
        device.load(["head"], SET)
    assert str(device.artifacts["head"]) in one_line(error)


def test_pypto_output_does_not_reach_stdout(opened, capfd):
    device = opened()
    device.load(["head"], SET)["head"](**head_tensors(device))
    opened().load(["head"], SET)
    out, err = capfd.readouterr()
    assert out == ""
    assert "fake pypto says hello" in err
    assert "fake pypto loads head" in err


def test_pypto_logs_errors_only(opened, log, monkeypatch):
    opened()
    assert log("log level") == ["log level ERROR"]
    assert log("runtime log") == ["runtime log error"]
    monkeypatch.setenv("PYPTO_RUNTIME_LOG", "debug")
    opened()
    assert len(log("runtime log")) == 1


# --- two processes --------------------------------------------------------------------------------

PROCESS = textwrap.dedent("""
    import sys
    from tilewright_kernels.qwen3_14b.plugin import kernels_of
    from tilewright_kernels.qwen3_14b.shape import LayerShape
    from tilewright_pypto.adapter import open_device
    from tilewright_pypto.options import Options

    def report(what, *_):
        print(what, flush=True)

    shape = LayerShape(hidden=64, intermediate=64, heads=4, kv_heads=2, head_dim=32, page_size=16)
    device = open_device(Options(platform="a2a3sim", pypto_root=sys.argv[1]), None, report)
    device.load(["head"], kernels_of(shape))
    device.close()
""")


def start(root: Path, **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", PROCESS, str(root)],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_of_two_processes_one_compiles(pypto_root, log):
    processes = [start(pypto_root, FAKE_PYPTO=failing(compile_head=1.0)) for _ in range(2)]
    said = [p.communicate()[0].splitlines() for p in processes]
    assert [p.returncode for p in processes] == [0, 0]
    assert log("compile") == ["compile head"]
    assert sorted(lines[-1].split(" in ")[0].split(",")[0] for lines in said) == [
        "1 kernel compiled",
        "1 kernel from the cache",
    ]


# --- failures -------------------------------------------------------------------------------------

RINGS = "raise options ring_task_window, ring_dep_pool and ring_heap (131072, 131072 and 4294967296"
NATIVE = "finalize_native_run failed with code {} run_id=4 dispatch=9\n\nC++ Traceback (most recent"


@pytest.mark.parametrize(
    ("place", "said", "advice"),
    [
        ("compile_head", "Unknown operation 'pl.nosuch'", "platform=emulated"),
        ("compile_head", "ptoas compilation failed: error: bad tile", "toolchain/versions.env"),
        ("compile_head", "[Errno 28] No space left on device", "build_dir"),
        ("compile_head", "ptoas compilation timed out after 60s", "compile_jobs"),
        ("load_head", "No module named 'simpler_setup'", "`tilewright doctor`"),
        ("load_head", "PTO-ISA not available.\n\n  The managed checkout must", "pto_isa.pin"),
        ("load_head", "SimKernel compilation failed with exit code 1:\nx.cpp: error", "emulated"),
        ("register_head", "register_callable failed with code -1", "emulated"),
        ("run_head", NATIVE.format(-1), RINGS),
        ("run_head", NATIVE.format(-4), RINGS),
        ("run_head", "FATAL: Dependency Pool Deadlock Detected!", RINGS),
        ("run_head", "Task Allocator Deadlock - Heap Exhausted! ring=0", RINGS),
        ("run_head", "prepare_native_run failed with code -1 run_id=4", "platform=emulated"),
        ("run_head", "ring_heap must be a power of 2 >= 1024", "platform=emulated"),
        ("run_head", NATIVE.format(-100), "SIMPLER_SCHEDULER_TIMEOUT_MS"),
        ("run_head", "waiting for tensor data timed out", "made no progress"),
        ("run_head", NATIVE.format(507899), "`npu-smi info` that card 3 is present"),
        ("run_head", "device 3 was lost", "`npu-smi info` that card 3 is present"),
        ("run_head", NATIVE.format(-77), "platform=emulated"),
        ("run_head", "malloc failed", "max_batch_tokens"),
    ],
)
def test_a_failure_names_kernel_device_cause_artifacts_and_advice(
    opened, monkeypatch, place, said, advice
):
    device = opened("a2a3", 3)
    tensors = head_tensors(device)
    monkeypatch.setenv("FAKE_PYPTO", failing(**{place: said}))
    with pytest.raises(ExecutorError) as error:
        device.load(["head"], SET)["head"](**tensors)
    line = one_line(error)
    assert line.startswith("kernel head on a2a3 card 3")
    assert " ".join(said.split("\n\n")[0].split()) in line
    assert f"artifacts in {device.artifacts['head']}" in line
    assert advice in line
    assert "Traceback" not in line


def test_errors_of_a_simulator_do_not_suggest_npu_smi(opened, monkeypatch):
    device = opened("a2a3sim")
    monkeypatch.setenv("FAKE_PYPTO", failing(run_head="the device was lost"))
    with pytest.raises(ExecutorError) as error:
        device.load(["head"], SET)["head"](**head_tensors(device))
    assert "npu-smi" not in one_line(error)


def test_a_device_can_be_closed_and_reopened_after_a_failure(opened, monkeypatch, caplog):
    device = opened("a2a3", 3)
    head = device.load(["head"], SET)["head"]
    lost = failing(run_head="device 3 was lost", free="device lost", close="device lost")
    monkeypatch.setenv("FAKE_PYPTO", lost)
    with pytest.raises(ExecutorError, match="lost"):
        head(**head_tensors(device))
    device.close()
    device.close()
    assert caplog.records == []
    monkeypatch.delenv("FAKE_PYPTO")
    again = opened("a2a3", 3)
    tensors = head_tensors(again)
    again.load(["head"], SET)["head"](**tensors)
    assert tensors["logits"].isfinite().all()


def test_a_closed_device_refuses_every_use(opened):
    device = opened()
    head, tensors = device.load(["head"], SET)["head"], head_tensors(device)
    device.close()
    for use in (
        lambda: head(**tensors),
        lambda: device.keep(torch.zeros(2, 2)),
        lambda: device.allocate((2, 2), torch.bfloat16),
        lambda: device.read(tensors["lm_head"]),
        lambda: device.write(tensors["lm_head"], torch.zeros(40, SHAPE.hidden).bfloat16()),
        lambda: device.load(["head"], SET),
    ):
        with pytest.raises(ExecutorError, match="a2a3sim is closed: load the model again"):
            use()


def test_ctrl_c_while_compiling_is_not_caught(opened, monkeypatch):
    device = opened()
    monkeypatch.setattr(source, "load", spying(source.load, interrupt))
    with pytest.raises(KeyboardInterrupt):
        device.load(["head"], SET)


def interrupt() -> None:
    raise KeyboardInterrupt


def test_a_card_that_does_not_open_is_an_error_with_advice(opened, monkeypatch):
    monkeypatch.setenv("FAKE_PYPTO", failing(open="simpler_init failed with code 507033"))
    with pytest.raises(ExecutorError, match="a2a3 card 3 cannot be opened: simpler_init") as error:
        opened("a2a3", 3)
    assert "`npu-smi info` that card 3" in one_line(error)


def test_weights_that_do_not_fit_are_an_error_with_the_memory_in_use(opened, monkeypatch):
    device = opened("a2a3", 3)
    monkeypatch.setenv("FAKE_PYPTO_MEMORY", str(3 << 20))
    device.keep(torch.zeros(1 << 19))
    with pytest.raises(ExecutorError) as error:
        device.keep(torch.zeros(1 << 19))
    line = one_line(error)
    assert "cannot upload a tensor of 2.0 MiB (2.0 MiB are in use): malloc failed" in line
    assert "free memory of card 3" in line
    assert "weights_on_device=false" in line


def test_a_cache_that_does_not_fit_is_an_out_of_pages_error(opened, monkeypatch):
    device = opened("a2a3", 3)
    monkeypatch.setenv("FAKE_PYPTO_MEMORY", "1000")
    with pytest.raises(OutOfPagesError, match="lower total_pages"):
        device.allocate((4, 2, 16, 32), torch.bfloat16)
    monkeypatch.setenv("FAKE_PYPTO", failing(malloc="device 3 was lost"))
    with pytest.raises(ExecutorError, match="npu-smi"):
        device.allocate((4, 2, 16, 32), torch.bfloat16)


# --- which pypto ----------------------------------------------------------------------------------


def test_a_second_pypto_in_one_process_is_refused(opened, pypto_root, tmp_path):
    opened()
    other = tmp_path / "other"
    pypto_root.rename(other)
    with pytest.raises(ExecutorError, match="this process has imported the pypto of") as error:
        opened(pypto_root=str(other))
    line = one_line(error)
    assert str(pypto_root) in line
    assert str(other) in line


def test_modules_of_a_partly_imported_pypto_are_not_mixed_with_another(opened, monkeypatch):
    left = ModuleType("pypto.events")
    left.__file__ = "/elsewhere/pypto/events.py"
    monkeypatch.setitem(sys.modules, "pypto.events", left)
    with pytest.raises(ExecutorError, match=r"has imported the pypto of /elsewhere/pypto, but"):
        opened()


def test_a_second_architecture_in_one_process_is_refused(opened, monkeypatch):
    opened("a2a3sim").load(["head"], SET)
    opened("a2a3", 3)
    with pytest.raises(ExecutorError, match="used PyPTO for a2a3, but a5sim is requested") as error:
        opened("a5sim")
    assert "in a process of its own" in one_line(error)
    # PyPTO itself refuses if other code in the process has used it.
    monkeypatch.setattr(adapter, "_architecture", None)
    with pytest.raises(ExecutorError, match="already set to Ascend910B") as error:
        opened("a5sim").load(["head"], SET)
    assert "in a process of its own" in one_line(error)


@pytest.mark.parametrize(
    ("file", "name", "lacks"),
    [
        ("__init__", "set_log_level", "set_log_level"),
        ("__init__", "ERROR", "LogLevel.ERROR"),
        ("language/__init__", "compile", "language.JITFunction.compile"),
        ("ir/__init__", "from_dir", "ir.CompiledProgram.from_dir"),
        ("runtime/__init__", "ChipWorker", "runtime.ChipWorker"),
        ("runtime/__init__", "RunConfig", "runtime.RunConfig"),
        ("runtime/__init__", "configure_log", "runtime.configure_log"),
        ("runtime/__init__", "ring_heap", "runtime.RunConfig(ring_heap)"),
        ("runtime/__init__", "init", "runtime.ChipWorker.alloc_tensor(init)"),
    ],
)
def test_an_incompatible_pypto_is_refused_with_both_versions(opened, pypto_root, file, name, lacks):
    module = pypto_root / "python" / "pypto" / f"{file}.py"
    text = module.read_text()
    renamed = re.sub(rf"\b{name}\b", f"old_{name}", text)
    assert renamed != text
    module.write_text(renamed)
    path = list(sys.path)
    with pytest.raises(ExecutorError) as error:
        opened()
    line = one_line(error)
    for part in (lacks, "PyPTO 0.1.0 (0123456)", str(pypto_root), "2026-08-21 (e2d0f78) or newer"):
        assert part in line
    assert sys.path == path


def test_a_failure_to_configure_the_log_is_ignored(opened, pypto_root):
    module = pypto_root / "python" / "pypto" / "runtime" / "__init__.py"
    text = module.read_text()
    told = 'events.note(f"runtime log {level}")'
    assert told in text
    module.write_text(text.replace(told, "raise ValueError(level)"))
    opened()


def test_a_pypto_that_cannot_be_imported_is_an_error_with_the_cause(opened, pypto_root):
    (pypto_root / "python" / "pypto" / "ir" / "__init__.py").write_text("import no_such_module")
    with pytest.raises(ExecutorError, match=r"cannot be imported \(ModuleNotFoundError: .*no_such"):
        opened()


def test_missing_tools_are_reported_before_the_device_opens(opened, pypto_root, monkeypatch, log):
    monkeypatch.delenv("PTOAS_ROOT")
    monkeypatch.setenv("PATH", str(pypto_root))
    with pytest.raises(ExecutorError, match=r"lacks 2 .*ptoas.*g\+\+-15"):
        opened()
    assert not log("open")


# --- whole models ---------------------------------------------------------------------------------

RUNTIME = RuntimeConfig(max_seq_len=64, max_batch_size=1, max_batch_tokens=64)


class Watching:
    """An observer that records preparation and tensors."""

    def __init__(self) -> None:
        self.prepared: list[tuple[str, int, int]] = []
        self.tensors: dict[str, tuple[int, ...]] = {}

    @hookimpl
    def on_prepare(self, what: str, done: int, total: int) -> None:
        self.prepared.append((what, done, total))

    @hookimpl
    def on_tensor(self, name: str, tensor: torch.Tensor) -> None:
        self.tensors[name] = tuple(tensor.shape)


def generated(
    executor: str,
    options: dict[str, Any],
    observers: Sequence[object] = (),
    runtime: RuntimeConfig = RUNTIME,
) -> str:
    with LLMEngine.from_plugins(
        executor=executor, options={"executor": options}, observers=observers
    ) as engine:
        engine.init_model("demo", DEMO_MODEL, runtime)
        config = GenerateConfig(max_new_tokens=2, temperature=0)
        return engine.generate("demo", "When in the Course", config)


def test_a_model_generates_the_text_of_torch_and_notifies_observers(pypto_root, tmp_path, log):
    watching = Watching()
    options = {
        "platform": "a2a3sim",
        "pypto_root": str(pypto_root),
        "build_dir": str(tmp_path / "builds"),
    }
    text = generated("pypto-npu", options, [watching])
    assert text
    assert text == generated("torch", {})
    assert watching.prepared[0] == ("compiling prefill_layer for a2a3sim", 0, 3)
    assert watching.prepared[-1][1:] == (3, 3)
    for name in ("embed", "layers.0.output", "logits"):
        assert len(watching.tensors[name]) > 1
    assert len(log("open")) == len(log("close")) == 1
    assert len(list((tmp_path / "builds").glob("*/tilewright.json"))) == 3


@pytest.mark.parametrize(
    ("memory", "pages", "what"), [(1 << 21, None, "a tensor of"), (6 << 20, 4096, "KV cache")]
)
def test_a_device_too_small_for_the_model_is_closed(
    pypto_root, monkeypatch, log, memory, pages, what
):
    monkeypatch.setenv("FAKE_PYPTO_MEMORY", str(memory))
    options = {"platform": "a2a3sim", "pypto_root": str(pypto_root)}
    with pytest.raises(TilewrightError, match=f"{what}.*malloc failed; free memory of "):
        generated("pypto-npu", options, runtime=evolve(RUNTIME, total_pages=pages))
    assert len(log("open")) == len(log("close")) == 1


@pytest.mark.parametrize(
    ("problem", "said"),
    [
        ("no PyPTO", "PyPTO is not installed: build it from source"),
        ("no checkout", "pypto_root must be a checkout of PyPTO"),
        ("namesake", "CANN's product of that name"),
        ("build folder", "cannot be written to"),
    ],
)
def test_an_unusable_pypto_is_a_one_line_error_on_the_command_line(
    pypto_root, tmp_path, monkeypatch, capsys, problem, said
):
    options = {"platform": "a2a3sim", "pypto_root": pypto_root, "build_dir": tmp_path / "builds"}
    match problem:
        case "no PyPTO":
            monkeypatch.setitem(sys.modules, "pypto", None)
            del options["pypto_root"]
        case "no checkout":
            options["pypto_root"] = tmp_path
        case "namesake":
            (pypto_root / "python" / "pypto" / "pypto_impl.so").touch()
        case "build folder":
            options["build_dir"].touch()
    argv = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    assert main(["generate", "--executor", "pypto-npu", *argv, "x"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = (x for x in err.splitlines() if not x.startswith("fake pypto"))
    assert line.startswith("tilewright: error: ")
    assert said in line


@pytest.mark.parametrize(
    ("place", "end", "said"),
    [
        ("run_head", "SIGSEGV", "step 0, the head: the process died running kernel head"),
        ("run_decode_layer", "SIGABRT", "step 1, layer 0: the process died running kernel decode_"),
        ("run_prefill_layer", "SIGKILL", "step 0, layer 0: the process died running kernel prefi"),
        ("compile_head", "SIGSEGV", "the process died compiling kernel head"),
    ],
)
def test_a_crash_prints_a_line_with_kernel_step_and_artifacts(
    pypto_root, tmp_path, place, end, said
):
    argv = ["generate", "--executor", "pypto-npu", "-o", "platform=a2a3sim", "--max-seq-len", "64"]
    for name, value in {"pypto_root": pypto_root, "build_dir": tmp_path / "builds"}.items():
        argv += ["-o", f"{name}={value}"]
    done = subprocess.run(
        [sys.executable, "-m", "tilewright", *argv, "When in the Course"],
        env=os.environ | {"FAKE_PYPTO": failing(**{place: end})},
        capture_output=True,
        text=True,
    )
    assert done.returncode == -getattr(signal, end)
    (line,) = (x for x in done.stderr.splitlines() if "died" in x)
    kernel = place.partition("_")[2]
    assert line.startswith(f"tilewright: {said}")
    assert f"kernel {kernel} on a2a3sim; artifacts in {tmp_path / 'builds' / kernel}-" in line
    assert "platform=emulated" in line


@pytest.mark.parametrize(
    ("place", "said"),
    [("open", "opening a2a3sim"), ("malloc", r"copying \d+.\d MiB to a2a3sim")],
)
def test_a_crash_outside_a_kernel_prints_a_line(pypto_root, place, said):
    argv = ["--executor", "pypto-npu", "-o", "platform=a2a3sim", "-o", f"pypto_root={pypto_root}"]
    done = subprocess.run(
        [sys.executable, "-m", "tilewright", "generate", *argv, "We"],
        env=os.environ | {"FAKE_PYPTO": failing(**{place: "SIGKILL"})},
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL
    assert re.search(rf"^tilewright: the process died {said}$", done.stderr, re.MULTILINE)


def test_a_device_closes_while_a_child_process_is_running():
    """A forked child keeps the pipe open whose closing reports that the process ended."""
    note = CrashNote()
    with subprocess.Popen(["sleep", "60"], pass_fds=[note._shell.stdin.fileno()]) as child:
        note.close()
        assert child.poll() is None
        child.kill()


def test_no_crash_line_is_printed_without_a_crash(pypto_root, tmp_path):
    argv = ["--executor", "pypto-npu", "-o", "platform=a2a3sim", "-o", f"pypto_root={pypto_root}"]
    for failure, code in (({}, 0), ({"run_head": "no luck"}, 2)):
        done = subprocess.run(
            [sys.executable, "-m", "tilewright", "generate", *argv, "--max-new-tokens", "1", "We"],
            env=os.environ | {"FAKE_PYPTO": failing(**failure)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == code, done.stderr
        assert "died" not in done.stderr


# --- the fake and the real one --------------------------------------------------------------------


def check_surface(pypto: Any) -> None:
    for path, wanted in SURFACE.items():
        thing = pypto
        for name in path.split("."):
            thing = getattr(thing, name)
        if wanted:
            parameters = inspect.signature(thing).parameters
            assert tuple(name for name in parameters if name in wanted) == wanted, path
            needed = {n for n, p in parameters.items() if p.default is p.empty}
            assert needed <= {*wanted, "self", "args", "kwargs"}, path


def test_the_fake_has_what_the_adapter_uses(opened):
    opened()
    check_surface(sys.modules["pypto"])


@pytest.mark.pypto
def test_pypto_has_what_the_adapter_uses():
    pypto_or_skip()
    check_surface(sys.modules["pypto"])


@pytest.mark.pypto
@pytest.mark.parametrize("ring", ["ring_task_window", "ring_heap", "ring_dep_pool"])
def test_pypto_accepts_the_same_ring_sizes_as_the_options(ring):
    pypto_or_skip()
    config = sys.modules["pypto.runtime"].RunConfig
    for size in (1, 2, 3, 4, 5, 6, 8, 512, 1023, 1024, 1025, 131072, 1 << 30, 1 << 32):

        def takes(what: Any, size: int = size) -> bool:
            try:
                what(**{ring: size})
            except ValueError:
                return False
            return True

        assert takes(Options) == takes(config), size


@pytest.fixture
def real() -> installation.Installation:
    pypto_or_skip()
    return installation.find(None)


@pytest.mark.pypto
def test_pypto_is_found_where_python_imports_it(real):
    assert real.folders[0] == Path(sys.modules["pypto"].__file__).parent
    assert real.version == sys.modules["pypto"].__version__


@pytest.mark.pypto
def test_the_installed_pypto_is_accepted_and_logs_nothing(real, monkeypatch):
    monkeypatch.delenv("PYPTO_RUNTIME_LOG", raising=False)
    assert adapter._import(real) is sys.modules["pypto"]
    for module in ("pypto.runtime.runtime_base", "pypto.backend.pto_backend"):
        assert module in sys.modules
        assert not logging.getLogger(module).isEnabledFor(logging.ERROR)


@pytest.mark.pypto
@pytest.mark.parametrize("kernel", KERNELS)
def test_pypto_compiles_the_kernels_up_to_the_assembler(real, tmp_path, kernel, monkeypatch):
    """Without its assembler PyPTO stops before device code: one error, and artifacts."""
    monkeypatch.setenv("PTOAS_ROOT", str(tmp_path))
    with (
        without_worker(real, tmp_path, monkeypatch) as device,
        pytest.raises(ExecutorError) as error,
    ):
        device.load([kernel], SET)
    line = one_line(error)
    home = device.artifacts[kernel]
    assert line.startswith(f"kernel {kernel} on a2a3 card 0 did not compile: ")
    assert f"artifacts in {home}" in line
    assert list(home.rglob("*.pto"))
    program = sys.modules["pypto.ir"].CompiledProgram.from_dir(str(home), platform="a2a3")
    parameters = SOURCES[kernel].read_text()
    assert program.param_names
    assert all(f"{name}:" in parameters for name in program.param_names)


def without_worker(
    real: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> "closing[PyptoDevice]":
    """A device that compiles without a card."""
    pypto = adapter._import(real)
    monkeypatch.setattr(pypto.runtime, "ChipWorker", lambda config: object())
    options = Options(platform="a2a3", compile_jobs=2, build_dir=str(folder))
    return closing(PyptoDevice(pypto, options, 0, {}, ignore))


@pytest.mark.pypto
def test_pypto_reports_the_line_of_an_error_in_a_kernel(real, tmp_path, monkeypatch):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in SOURCES["head"].parent.glob("*.py"):
        text = file.read_text().replace("pl.matmul_acc(", "pl.no_such_thing(")
        (broken / file.name).write_text(text)
    for name in SOURCES:
        monkeypatch.setitem(SOURCES, name, broken / f"{name}.py")
    with (
        without_worker(real, tmp_path, monkeypatch) as device,
        pytest.raises(ExecutorError) as error,
    ):
        device.load(["head"], SET)
    assert "Unknown operation 'pl.no_such_thing'" in one_line(error)
    assert f"{broken / 'head.py'}, line " in one_line(error)
