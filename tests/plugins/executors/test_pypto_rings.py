"""The ring sizes that kernels need: computed from their source, checked before a run."""

import pytest
from attrs import evolve

from tilewright import LLMEngine, RuntimeConfig
from tilewright.cli import main
from tilewright.errors import ExecutorError
from tilewright.settings import DEMO_MODEL
from tilewright_kernels.qwen3_14b.plugin import kernels_of
from tilewright_kernels.qwen3_14b.shape import DEMO, QWEN3_14B
from tilewright_pypto.options import Options
from tilewright_pypto.rings import check, counted, larger, needed

MIB = 1 << 20


def test_the_heap_holds_the_tensors_of_the_outermost_scope_of_prefill():
    # band [16, 16 + 2 * 64] and zeros [1, ...] FP32, and queries [2048 + 16 * 16, 512] BF16.
    size = 16 * 144 * 4 + 1024 + (2048 + 16 * 16) * 512 * 2
    assert 2 * MIB < size < 4 * MIB
    assert needed("prefill_layer", kernels_of(DEMO), 256)["ring_heap"] == 4 * MIB


def test_heap_and_window_hold_attention_of_all_heads_over_a_long_sequence():
    """The deepest scopes share a ring, which frees all of their tensors at once."""
    tiles = 8192 // QWEN3_14B.kv_tile - 1
    # scores and weighted [64, 128] FP32, probabilities [64, 128] BF16, and scale [1, 64].
    size = QWEN3_14B.heads * tiles * (2 * 64 * 128 * 4 + 64 * 128 * 2 + 1024)
    found = needed("prefill_layer", kernels_of(QWEN3_14B), 8192)
    assert size < found["ring_heap"] <= 2 * size
    # Each tile takes an allocation and four tasks.
    tasks = QWEN3_14B.heads * tiles * 5
    assert tasks < found["ring_task_window"] <= 2 * tasks


def test_the_head_needs_small_rings():
    # x [16, 256] in FP32 and normed in BF16, in each iteration over rows.
    least = {"ring_heap": 32 << 10, "ring_task_window": 4, "ring_dep_pool": 16}
    assert needed("head", kernels_of(DEMO), 256) == least


def test_the_computed_use_matches_what_the_runtime_reported():
    """A run on a2a3sim with room for 63 tasks ended with 63 of them and 495616 bytes in ring 3."""
    shape = evolve(DEMO, page_size=128, kv_tile=128, vec_tile=256, n_tile=256)
    taken = counted("prefill_layer", kernels_of(shape), 256)
    assert taken.most_bytes[3] == 495616
    assert taken.most_tasks[3] == 67
    # Per head: o, scores and weighted [16, 128] FP32, probabilities in BF16, stats and scale.
    assert taken.most_unused == [0, 0, 0, 3 * 8192 + 4096 + 2 * 1024]


def test_space_at_the_end_of_a_ring_may_stay_unused():
    """The row scope of decode has 17 tensors: a piece of 16, and one of [16, 256] FP32."""
    taken = counted("decode_layer", kernels_of(DEMO), 256)
    assert taken.most_unused[2] == 16 * 256 * 4


def test_a_call_gets_rings_above_pyptos_defaults_only_if_it_needs_them():
    options = Options(platform="a2a3sim")
    assert larger(options, "prefill_layer", kernels_of(QWEN3_14B), 2048) == {}
    assert larger(options, "decode_layer", kernels_of(QWEN3_14B), 8192) == {}
    assert larger(options, "head", kernels_of(QWEN3_14B), 1) == {}
    # 13105 tasks in one ring, 4 dependencies each.
    assert larger(options, "prefill_layer", kernels_of(QWEN3_14B), 8000) == {
        "ring_dep_pool": 1 << 16
    }
    long = {"ring_heap": 1 << 31, "ring_task_window": 1 << 17, "ring_dep_pool": 1 << 19}
    assert larger(options, "prefill_layer", kernels_of(QWEN3_14B), 40960) == long
    many = evolve(DEMO, max_tokens=1 << 19, max_batch=1)
    assert larger(options, "prefill_layer", kernels_of(many), 2048) == {"ring_heap": 1 << 30}


def test_a_ring_size_set_by_the_user_is_kept():
    asked = Options(platform="a2a3sim", ring_dep_pool=7, ring_heap=1 << 32)
    found = larger(asked, "prefill_layer", kernels_of(QWEN3_14B), 40960)
    assert found == {"ring_task_window": 1 << 17}


@pytest.mark.parametrize(
    ("option", "size", "least", "kernel"),
    [
        ("ring_heap", 65536, 4 * MIB, "prefill_layer"),
        ("ring_task_window", 64, 128, "prefill_layer"),
    ],
)
def test_a_ring_size_that_is_too_small_is_refused_with_the_minimum(option, size, least, kernel):
    asked = Options(platform="a2a3sim", **{option: size})
    with pytest.raises(ExecutorError) as error:
        check(asked, kernels_of(DEMO), 256)
    (line,) = str(error.value).splitlines()
    assert f"{option} must be at least {least} for kernel {kernel} and sequences of 256" in line
    assert f"found {size}" in line
    check(evolve(asked, **{option: least}), kernels_of(DEMO), 256)


def test_ring_sizes_are_checked_before_pypto_is_searched(capsys, tmp_path):
    argv = ["generate", "--executor", "pypto-npu", "-o", "platform=a2a3sim", "-o"]
    argv += [f"pypto_root={tmp_path / 'nowhere'}", "-o", "ring_heap=65536", "x"]
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("tilewright: error: ")
    assert "ring_heap must be at least" in line


def test_the_emulation_ignores_ring_sizes():
    options = {"executor": {"platform": "emulated", "ring_heap": 1024}}
    with LLMEngine.from_plugins(executor="pypto-npu", options=options) as engine:
        engine.init_model("demo", DEMO_MODEL, RuntimeConfig(max_seq_len=64))
