"""Whole models on PyPTO's simulator, run by the engine, the commands and the example."""

import ast
import json
from collections.abc import Iterator
from threading import Lock
from typing import Any

import pytest
from pypto_oracle import simulator_or_skip
from submitted import EXAMPLE, PLEDGE, PLEDGED, TILEWRIGHT, submit

from tilewright import GenerateConfig, LLMEngine, RuntimeConfig
from tilewright.cli import main
from tilewright.settings import DEMO_MODEL

pytestmark = pytest.mark.pypto

CONTINUED = "When in the Course of human events,"


@pytest.fixture(scope="module", autouse=True)
def _simulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Requires PyPTO's simulator; the tests of this file share a cache of compiled kernels."""
    simulator_or_skip()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def generated(
    prompts: list[list[int]], runtime: RuntimeConfig, new_tokens: int, executor: str, **options: Any
) -> list[list[int]]:
    selected = {"executor": options} if options else {}
    with LLMEngine.from_plugins(executor=executor, options=selected) as engine:
        engine.init_model("demo", DEMO_MODEL, runtime)
        config = GenerateConfig(max_new_tokens=new_tokens, temperature=0.0)
        return [list(r.token_ids) for r in engine.generate_batch("demo", prompts, config)]


@pytest.fixture(scope="module")
def declaration() -> list[int]:
    """The first tokens of the memorised text, as the bundled model continues it."""
    with LLMEngine.from_plugins() as engine:
        engine.init_model("demo", DEMO_MODEL, RuntimeConfig(weight_dtype="float32"))
        prompt = engine.model("demo").text.encode(CONTINUED)
        config = GenerateConfig(max_new_tokens=300, temperature=0.0)
        return [*prompt, *engine.generate_result("demo", prompt, config).token_ids]


@pytest.mark.parametrize("weights_on_device", [True, False])
def test_ragged_prompts_generate_the_tokens_of_torch(declaration, weights_on_device):
    prompts = [declaration[:length] for length in (4, 231, 55, 1)]
    runtime = RuntimeConfig(max_seq_len=256)
    options = {"platform": "a2a3sim", "weights_on_device": weights_on_device}
    found = generated(prompts, runtime, 10, "pypto-npu", **options)
    assert [len(ids) for ids in found] == [10, 10, 10, 10]
    assert found == generated(prompts, runtime, 10, "torch")
    assert found == generated(prompts, runtime, 10, "pypto-npu", platform="emulated")


def test_seventeen_chunked_prompts_generate_the_tokens_of_torch(declaration):
    lengths = [1, 2, 3, 15, 16, 17, 31, 32, 33, 47, 48, 49, 64, 5, 80, 7, 35]
    prompts = [declaration[:length] for length in lengths]
    runtime = RuntimeConfig(
        page_size=16, max_batch_size=17, max_batch_tokens=48, max_seq_len=128, total_pages=120
    )
    found = generated(prompts, runtime, 6, "pypto-npu", platform="a2a3sim")
    true = RuntimeConfig(weight_dtype="float32", max_batch_size=17, max_seq_len=128)
    assert found == generated(prompts, true, 6, "torch")


def test_compare_finds_the_simulator_equal(tmp_path):
    argv = ["compare", "--candidate", "pypto-npu", "-o", "candidate.platform=a2a3sim", "--isolate"]
    argv += ["--prompt", CONTINUED, "--prompt", "We hold"]
    report = tmp_path / "report.json"
    assert main([*argv, "--new-tokens", "4", "--json", "--output", str(report)]) == 0
    found = json.loads(report.read_text())
    assert (found["verdict"], found["finished"], found["failure"]) == ("equal", True, "")


def test_the_example_runs_under_task_submit():
    """The simulator has no cards, so the granted number is not used."""
    done = submit(f'{EXAMPLE} --platform a2a3sim --max-new-tokens 9 --prompt "{PLEDGE}"')
    assert done.returncode == 0, done.stderr
    text, ids, _, device = done.stdout.splitlines()
    assert text == f"text: {PLEDGED}"
    assert len(ast.literal_eval(ids.removeprefix("token_ids: "))) == 9
    assert device == "device: a2a3sim"


def test_a_command_runs_under_task_submit():
    command = f"{TILEWRIGHT} generate --executor pypto-npu -o platform=a2a3sim"
    command += f" --max-seq-len 256 --max-new-tokens 6 '{CONTINUED}'"
    done = submit(command)
    assert done.returncode == 0, done.stderr
    assert "it becomes necessary" in done.stdout


def test_compile_jobs_limits_the_running_compilers(tmp_path, monkeypatch):
    """At most compile_jobs run at a time, of the 36 or so that a kernel needs."""
    from pypto.runtime import device_runner

    running, lock, most = 0, Lock(), []
    compile_one = device_runner.compile_single_kernel

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal running
        with lock:
            running += 1
            most.append(running)
        try:
            return compile_one(*args, **kwargs)
        finally:
            with lock:
                running -= 1

    monkeypatch.setattr(device_runner, "compile_single_kernel", counted)
    options = {"platform": "a2a3sim", "build_dir": str(tmp_path), "compile_jobs": 3}
    generated([[5, 6]], RuntimeConfig(max_seq_len=64, page_size=16), 1, "pypto-npu", **options)
    assert len(most) > 36
    assert max(most) == 3
