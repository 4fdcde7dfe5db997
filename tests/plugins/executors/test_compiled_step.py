"""Executor torch with option compile: step.cpp against transformers and against the plain path."""

import os
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import test_torch_executor as plain
import torch
from reference_models import CONFIGS, prompts, write_model
from test_torch_executor import (  # noqa: F401  collected here too, with option compile
    Served,
    load,
    request,
    serve,
    test_a_step_can_mix_new_prompts_chunks_and_single_tokens,
    test_a_step_can_request_no_logits,
    test_a_step_writes_only_to_its_own_slots,
    test_freed_pages_are_reused_by_another_sequence,
    test_logits_are_bitwise_equal_when_repeated_or_with_other_pages,
    test_logits_of_a_chunked_prompt_match_transformers,
    test_logits_of_ragged_batches_match_transformers,
    test_weights_and_kv_cache_can_have_different_dtypes,
)
from torch import Tensor

from tilewright.errors import ExecutorError
from tilewright.types import Check, DType
from tilewright_torch import native, plugin
from tilewright_torch.plugin import Options

COMPILER = next(filter(None, map(shutil.which, native.COMPILERS)), None)

pytestmark = pytest.mark.skipif(not COMPILER, reason="no C++ compiler is on the PATH")

DTYPES: list[DType] = ["float32", "bfloat16", "float16"]
LIMITS = {"float32": 1e-5, "float16": 0.02, "bfloat16": 0.1}
"""Largest difference of a logit, of their spread: other orders of sums, then other roundings."""


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "OPTIONS", Options(compile=True))


@pytest.fixture
def no_library() -> Any:
    """Libraries that are loaded already are looked for again."""
    native.library.cache_clear()
    yield
    native.library.cache_clear()


def both(directory: Path, monkeypatch: pytest.MonkeyPatch, **runtime: Any) -> tuple[Served, Served]:
    """The same model without and with the option."""
    with monkeypatch.context() as context:
        context.setattr(plain, "OPTIONS", Options())
        without = serve(directory, **runtime)
    return without, serve(directory, **runtime)


# --- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["qwen3-gqa-5", "llama-biases", "mistral-window-of-three"])
def test_long_contexts_give_what_the_plain_path_gives(
    name: str, dtype: DType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # More keys than one thread attends to at a time, in pages that are not in order.
    write_model(name, tmp_path, dtype)
    config = CONFIGS[name]
    served = both(tmp_path, monkeypatch)
    long, short = prompts(config, [300, 20])
    logits = []
    for one in served:
        one.sequences.shuffled = True
        one.step({"a": long[:200], "b": short[:7]})
        one.step({"a": long[200:], "b": short[7:9]})
        logits.append(torch.cat([one.step({"a": [t], "b": [t + 1]}) for t in range(3, 6)]))
    assert (logits[1] - logits[0]).abs().max() < LIMITS[dtype] * logits[0].std()


@pytest.mark.parametrize("without", ["", "avx512vbmi", "avx512f"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", ["int8", "int4"])
def test_quantised_weights_give_what_the_plain_path_gives(
    weight_dtype: str,
    dtype: DType,
    without: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_library: None,
) -> None:
    # Rows that fill no tile of 4 bits, inner sizes of whole groups and of none, biases, one head.
    monkeypatch.setenv("CXX", f"{COMPILER} -mno-{without}" if without else str(COMPILER))
    config = deepcopy(CONFIGS["llama-biases"])
    config.hidden_size, config.intermediate_size = 96, 160
    for inner in (160, 83):
        config.intermediate_size = inner
        write_model(config, tmp_path / str(inner), dtype)
        served = both(tmp_path / str(inner), monkeypatch, weight_dtype=weight_dtype, kv_dtype=dtype)
        prompt, more = prompts(config, [19, 6])
        logits = []
        for one in served:
            steps = [{"a": prompt}, {"a": more[:1], "b": more}, {"a": [9], "b": [8]}]
            logits.append(torch.cat([one.step(tokens) for tokens in steps]))
        assert (logits[1] - logits[0]).abs().max() < LIMITS[dtype] * logits[0].std()


@pytest.mark.parametrize("weight_dtype", ["", "int8", "int4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_the_same_bits_alone_and_in_any_batch(
    dtype: DType, weight_dtype: str, tmp_path: Path
) -> None:
    config = deepcopy(CONFIGS["qwen3-gqa-8"])
    config.hidden_size, config.intermediate_size = 96, 160  # whole groups of 4 bits
    write_model(config, tmp_path, dtype)
    served = serve(tmp_path, weight_dtype=weight_dtype or dtype, kv_dtype=dtype)
    ragged = list(prompts(config, [3 + i for i in range(20)]))
    alone = [served.step({f"alone{i}": prompt[:3]})[0] for i, prompt in enumerate(ragged)]
    for size in (1, 3, 4, 5, 8, 10):
        names = [f"of{size}-{i}" for i in range(size)]
        together = served.step(dict(zip(names, (prompt[:3] for prompt in ragged), strict=False)))
        assert torch.equal(together, torch.stack(alone[:size]))
        for name in names:
            served.free(name)


def test_the_number_of_threads_does_not_change_a_bit(tmp_path: Path) -> None:
    write_model("qwen3-tied", tmp_path, "bfloat16")
    (prompt,) = prompts(CONFIGS["qwen3-tied"], [21])
    before = torch.get_num_threads()
    logits = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            served = serve(tmp_path)
            logits.append(torch.cat([served.step({"a": prompt}), served.step({"a": [5]})]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_reaches_the_logits(
    dtype: DType, value: float, tmp_path: Path
) -> None:
    write_model("llama-mha", tmp_path, dtype)
    served = serve(tmp_path)
    served.step({"a": [3, 4, 5]})
    page = served.pages("a")[:1]
    cache = served.executor.read_kv(0, page)
    cache.value[0, 1, 0, 0] = value
    served.executor.write_kv(0, page, cache)
    logits = served.step({"a": [6], "b": [7]})
    assert not logits[0].isfinite().any()
    assert logits[1].isfinite().all()


@pytest.mark.parametrize("without", ["avx512bf16", "avx512f", "avx512f -mno-avx2 -mno-f16c"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cpus_with_fewer_instructions_compute_the_same(
    without: str, dtype: DType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_library: None
) -> None:
    write_model("qwen3-gqa-5", tmp_path, dtype)
    prompt, more = prompts(CONFIGS["qwen3-gqa-5"], [19, 6])
    steps = [{"a": prompt}, {"a": more[:1], "b": more}, {"a": [9], "b": [8]}]
    logits = []
    for options in ("", f"-mno-{without}"):
        native.library.cache_clear()
        monkeypatch.setenv("CXX", f"{COMPILER} {options}")
        served = serve(tmp_path)
        logits.append(torch.cat([served.step(tokens) for tokens in steps]))
    assert (logits[1] - logits[0]).abs().max() < LIMITS[dtype] * logits[0].std()


# --- which steps ----------------------------------------------------------------------------------


def test_steps_of_few_tokens_without_a_tap_are_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model("qwen3-tied", tmp_path)
    served = serve(tmp_path)
    assert served.executor._native
    ran: list[int] = []
    run = served.executor._native.run_layers

    def noted(step: native.Step, first: int, count: int, hidden: Tensor) -> Tensor:
        ran.append(len(hidden))
        return run(step, first, count, hidden)

    monkeypatch.setattr(served.executor._native, "run_layers", noted)
    most = served.executor._native.max_tokens
    served.step({"a": [3] * most})
    served.step({"a": [3] * (most + 1)})
    served.step({"a": [3], "b": [4]})
    served.step({"a": [3]}, tap=lambda name, tensor: None)
    assert ran == [most, 2]
    assert not served.executor.limits.tap_exact


def test_a_layer_alone_is_compiled_too_and_leaves_its_input(tmp_path: Path) -> None:
    write_model("qwen3-tied", tmp_path)
    served = serve(tmp_path)
    batch = served.batch({"a": [3, 4, 5]})
    step = served.executor.begin(batch)
    hidden = served.executor.embed(step)
    for layer in served.executor.layers:
        before = hidden.clone()
        after = served.executor.run_layer(step, layer, hidden)
        assert torch.equal(hidden, before)
        hidden = after
    logits = served.executor.run_head(step, hidden[batch.logits_rows])
    assert torch.equal(logits, served.executor.forward(batch))


# --- compiling ------------------------------------------------------------------------------------


def test_a_second_load_needs_no_compiler_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_library: None
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    native.library(torch.float32, torch.bfloat16)
    (built,) = (tmp_path / "cache" / "tilewright" / "torch").iterdir()
    native.library.cache_clear()
    monkeypatch.setattr(native, "_build", lambda *_: pytest.fail("compiled again"))
    native.library(torch.float32, torch.bfloat16)
    assert built.suffix == ".so"


@pytest.mark.parametrize("kept", [0, 20, 400])
def test_a_library_that_was_cut_off_is_compiled_again(
    kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_library: None
) -> None:
    # The loader ends the process with SIGBUS where a library is shorter than it says.
    compiled: list[Path] = []

    def build(compiler: Any, flags: Any, libraries: Any, built: Path) -> None:
        compiled.append(built)
        content = bytes(500)
        built.write_bytes(content + native._digest(content))

    monkeypatch.setattr(native, "cache_folder", lambda *_: (tmp_path, ""))
    monkeypatch.setattr(native, "_build", build)
    monkeypatch.setattr("ctypes.CDLL", lambda path: Mock())
    for cut in (False, True, False):
        native.library.cache_clear()
        native.library(torch.float32, torch.float32)
        if cut:
            with compiled[0].open("r+b") as file:
                file.truncate(kept)
    assert compiled == [tmp_path / compiled[0].name] * 2


def test_without_a_compiler_the_option_is_refused_before_a_weight_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_library: None
) -> None:
    write_model("qwen3-tied", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("tilewright_torch.weights.load", lambda *_: pytest.fail("weights read"))
    with pytest.raises(ExecutorError, match=r"needs a C\+\+ compiler, and one of g\+\+, c\+\+"):
        serve(tmp_path)


def test_doctor_names_the_compiler_or_says_what_it_would_serve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found() -> Check:
        (check,) = (c for c in plugin.doctor_checks() if c.name == "C++ compiler")
        return check

    fake = tmp_path / "c++"
    fake.write_text("#!/bin/sh\necho c++ 14.1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    assert found().found.startswith(f"{fake}, c++ 14.1: option compile")
    fake.unlink()
    assert (found().status, found().found) == ("ok", "none")
    assert "apt install g++" in found().advice


def test_what_a_compiler_says_is_in_the_error_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_library: None
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", f"{COMPILER} -include missing.h")
    with pytest.raises(ExecutorError, match=r"missing\.h.*set CXX to another") as raised:
        native.library(torch.float32, torch.float32)
    assert "\n" not in str(raised.value)
    assert list((tmp_path / "tilewright" / "torch").iterdir()) == []


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("false", r"\(no message, exit status 1\)"),
        ("true", r"\(it wrote no file\)"),
        (f"{COMPILER} -lnosuch", "cannot find -lnosuch"),
        ("'g++", "CXX must be the command"),
        ("nosuch++", r"CXX = nosuch\+\+ is not on the PATH"),
    ],
)
def test_a_wrong_command_in_cxx_is_an_error_that_says_why(
    command: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_library: None
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", command)
    with pytest.raises(ExecutorError, match=why) as raised:
        native.library(torch.float32, torch.float32)
    assert "\n" not in str(raised.value)
    assert list(tmp_path.glob("**/*.so")) == []


def test_a_library_that_cannot_be_loaded_is_an_error_of_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_library: None
) -> None:
    def refuse(path: str) -> None:
        raise OSError(f"{path}: failed to map segment from shared object")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "_build", lambda *_: None)
    monkeypatch.setattr("ctypes.CDLL", refuse)
    with pytest.raises(ExecutorError, match=r"failed to map segment.*not mounted noexec"):
        native.library(torch.float32, torch.float32)


@pytest.mark.skipif(os.getuid() == 0, reason="root writes everywhere")
def test_a_cache_that_cannot_be_written_is_an_error_of_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_library: None
) -> None:
    tmp_path.chmod(0o500)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ExecutorError, match="cannot be written"):
        native.library(torch.float32, torch.float32)


def test_streamed_weights_cannot_be_compiled() -> None:
    with pytest.raises(ValueError, match="stream_weights keeps none"):
        Options(compile=True, stream_weights=True)
