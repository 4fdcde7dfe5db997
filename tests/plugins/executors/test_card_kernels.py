"""The Triton kernels of the torch executor, against the same operations in plain torch.

They run on a CUDA device where there is one, else on the CPU by Triton's interpreter, which
``conftest.py`` selects.
"""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from card_on_cpu import Card, Kernels, Plugin

from tilewright import RuntimeConfig
from tilewright_testing import paged
from tilewright_testing.models import make_model

pytest.importorskip("triton", reason="Triton is not installed")

from tilewright_torch import card_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN = float("nan")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MULTIPLIED = [d for d in DTYPES if DEVICE == "cuda" or d != torch.bfloat16]
"""Triton's interpreter multiplies the bits of bfloat16 matrices, not their values."""


def random(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def close(found, expected):
    """Equal but for the order of float32 sums, approximate functions of a device, and one rounding
    to the dtype; Triton's interpreter truncates to bfloat16 instead."""
    float32 = 1e-5 if DEVICE == "cuda" else 2e-6
    tolerance = {torch.float32: float32, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}[
        expected.dtype
    ]
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found.cpu(), expected, rtol=tolerance, atol=tolerance)


def on_device(*tensors):
    return [tensor.to(DEVICE) for tensor in tensors]


# --- attention ------------------------------------------------------------------------------------


class Sequences:
    """Sequences of (new tokens, tokens in all), whose pages are shuffled; other slots hold NaN."""

    def __init__(self, sequences, page_size, kv_heads, head_dim, dtype):
        generator = torch.Generator().manual_seed(1)
        counts = [-(-length // page_size) for _, length in sequences]
        pages = torch.randperm(sum(counts) + 3, generator=generator).split([*counts, 3])
        self.width = max(counts) + 1
        table = torch.full((len(sequences), self.width), -1)
        slots = (sum(counts) + 3) * page_size
        self.keys = torch.full((slots, kv_heads, head_dim), NAN, dtype=dtype)
        self.values = self.keys.clone()
        for i, (_, length) in enumerate(sequences):
            table[i, : counts[i]] = pages[i]
            at = torch.arange(length)
            own = pages[i][at // page_size] * page_size + at % page_size
            self.keys[own] = random(length, kv_heads, head_dim, dtype=dtype, seed=i)
            self.values[own] = random(length, kv_heads, head_dim, dtype=dtype, seed=i + 50)
        self.new = [new for new, _ in sequences]
        self.lengths = torch.tensor([length for _, length in sequences], dtype=torch.int32)
        self.table = table.int()
        self.page_size = page_size

    def context(self, kind, splits, block):
        starts = torch.tensor([0, *self.new]).cumsum(0).int()
        blocks = [
            (i, first)
            for i, new in enumerate(self.new)
            if new > 1
            for first in range(0, new, block)
        ]
        width = torch.tensor([self.width], dtype=torch.int32)
        tensors = [self.table.flatten(), width, self.lengths, starts]
        query_blocks = torch.tensor(blocks, dtype=torch.int32) if blocks else None
        if kind is card_kernels.Context:
            tensors = on_device(*tensors)
            query_blocks = None if query_blocks is None else query_blocks.to(DEVICE)
        names = ("table", "width", "lengths", "starts")
        return kind(
            **dict(zip(names, tensors, strict=True)),
            blocks=query_blocks,
            page_size=self.page_size,
            splits=splits if 1 in self.new else 0,
        )


STEPS = {
    "decode": [(1, 1), (1, 40), (1, 17), (1, 100)],
    "prefill": [(70, 70), (5, 5)],
    "chunks and decodes": [(1, 33), (66, 90), (1, 2), (3, 20)],
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(
    ("dtype", "window"), [*((dtype, None) for dtype in MULTIPLIED), (torch.float32, 7)]
)
def test_attention_reads_the_cache_through_the_block_table(step, window, dtype):
    heads, kv_heads, head_dim = 6, 2, 24
    sequences = Sequences(STEPS[step], 16, kv_heads, head_dim, dtype)
    q = random(sum(sequences.new), heads, head_dim, dtype=dtype)
    expected = Kernels.attention(
        q, sequences.keys, sequences.values, sequences.context(Kernels.Context, 1, 64), window
    )
    for splits in (1, 4) if step == "decode" else (4,):
        block = card_kernels.QUERY_BLOCK[dtype.itemsize]
        at = sequences.context(card_kernels.Context, splits, block)
        found = card_kernels.attention(*on_device(q, sequences.keys, sequences.values), at, window)
        close(found, expected)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "page_size"),
    [(5, 1, 16, 16), (4, 4, 80, 32), (20, 1, 2, 5), (2, 2, 128, 64)],
)
def test_attention_serves_any_heads_and_pages(heads, kv_heads, head_dim, page_size):
    steps = [(1, 70), (9, 30)]
    sequences = Sequences(steps, page_size, kv_heads, head_dim, torch.float32)
    q = random(sum(sequences.new), heads, head_dim)
    expected = Kernels.attention(
        q, sequences.keys, sequences.values, sequences.context(Kernels.Context, 1, 64), None
    )
    at = sequences.context(card_kernels.Context, 2, card_kernels.QUERY_BLOCK[4])
    found = card_kernels.attention(*on_device(q, sequences.keys, sequences.values), at, None)
    close(found, expected)


def test_attention_multiplies_in_the_wider_dtype_of_queries_and_cache():
    sequences = Sequences([(1, 20), (4, 20)], 16, 2, 16, torch.float32)
    q = random(5, 4, 16, dtype=torch.bfloat16)
    expected = Kernels.attention(
        q, sequences.keys, sequences.values, sequences.context(Kernels.Context, 1, 64), None
    )
    at = sequences.context(card_kernels.Context, 2, card_kernels.QUERY_BLOCK[4])
    found = card_kernels.attention(*on_device(q, sequences.keys, sequences.values), at, None)
    close(found, expected)


def test_contexts_are_divided_where_sequences_alone_would_not_fill_the_device():
    found = [card_kernels.splits(n, 8, 132) for n in (1, 2, 8, 32, 128, 4096)]
    assert found == [32, 16, 4, 1, 1, 1]


# --- other kernels --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_round_before_the_weight_and_sums_before_the_norm(dtype):
    x, delta, weight = random(3, 40, dtype=dtype), random(3, 40, dtype=dtype, seed=9), random(40)
    weight = weight.to(dtype)
    close(card_kernels.rms_norm(*on_device(x, weight), 1e-5), Kernels.rms_norm(x, weight, 1e-5))
    total, normed = card_kernels.add_rms_norm(*on_device(x, delta, weight), 1e-5)
    expected = Kernels.add_rms_norm(x, delta, weight, 1e-5)
    close(total, expected[0])
    close(normed, expected[1])


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16])
def test_queries_and_keys_are_rotated_and_keys_and_values_cached(normed, kv_dtype):
    heads, kv_heads, head_dim = 3, 2, 12
    qkv = random(4, (heads + 2 * kv_heads) * head_dim)
    norms = (random(head_dim, seed=1), random(head_dim, seed=2)) if normed else None
    angle = random(9, head_dim // 2)
    rope_rows = torch.tensor([8, 0, 3, 3], dtype=torch.int32)
    slots = torch.tensor([5, 0, 6, 2], dtype=torch.int32)
    made = []
    for kernels, to in ((Kernels, "cpu"), (card_kernels, DEVICE)):
        keys = torch.full((8, kv_heads, head_dim), NAN, dtype=kv_dtype, device=to)
        values = keys.clone()
        q = kernels.rotate_and_cache(
            qkv.to(to),
            norms and tuple(norm.to(to) for norm in norms),
            1e-5,
            angle.cos().to(to),
            angle.sin().to(to),
            rope_rows.to(to),
            slots.to(to),
            keys,
            values,
        )
        made.append((q, keys[slots.long()], values[slots.long()], keys.isnan().sum()))
    for expected, found in zip(*made, strict=True):
        if expected.is_floating_point():
            close(found, expected)
    assert int(made[0][3]) == int(made[1][3]), "other slots were written"


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_is_rounded_before_it_is_multiplied(dtype):
    gate_up = random(3, 2 * 1030, dtype=dtype)
    close(card_kernels.silu_mul(gate_up.to(DEVICE)), Kernels.silu_mul(gate_up))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns", "biased"), [(8, 2048, False), (7, 50, True)])
def test_one_row_times_a_weight(dtype, rows, columns, biased):
    x, weight = random(1, columns, dtype=dtype), random(rows, columns, dtype=dtype) / columns**0.5
    bias = random(rows, dtype=dtype) if biased else None
    expected = torch.nn.functional.linear(x.double(), weight.double())
    if biased:
        expected = expected + bias.double()
    for config in card_kernels.ONE_ROW_CONFIGS:
        out = torch.empty(1, rows, dtype=dtype, device=DEVICE)
        on = None if bias is None else bias.to(DEVICE)
        card_kernels.one_row(*on_device(x, weight), on, out, config)
        close(out, expected.to(dtype))


def test_the_fastest_product_of_one_row_is_chosen(monkeypatch):
    weights, launched = [random(8, 32, seed=i).to(DEVICE) for i in range(3)], []
    monkeypatch.setattr(card_kernels, "_chosen", {})
    monkeypatch.setattr(
        card_kernels, "one_row", lambda x, weight, bias, out, config: launched.append(config)
    )

    class Event:
        """A config takes the longer, the further it is from the third one."""

        def __init__(self, enable_timing):
            pass

        def record(self):
            self.config = launched[-1]

        synchronize = record

        def elapsed_time(self, other):
            return abs(card_kernels.ONE_ROW_CONFIGS.index(other.config) - 2)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    captured = []
    card_kernels.tune(weights, lambda run: captured.append(run) or run)
    assert len(captured) == len(card_kernels.ONE_ROW_CONFIGS)
    launched.clear()
    card_kernels.linear(weights[0][:1], weights[1], None)
    assert launched == [card_kernels.ONE_ROW_CONFIGS[2]]
    card_kernels.tune(weights, lambda run: pytest.fail("tuned again"))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("biased", [False, True])
def test_a_product_may_be_written_to_a_tensor_that_is_there(rows, biased):
    x, weight = random(rows, 40), random(12, 40)
    bias = random(12) if biased else None
    out = torch.full((rows, 12), NAN, device=DEVICE)
    on = None if bias is None else bias.to(DEVICE)
    made = card_kernels.linear(*on_device(x, weight), on, out)
    assert made.data_ptr() == out.data_ptr()
    expected = torch.nn.functional.linear(x, weight, bias)
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(DEVICE == "cuda", reason="test_card_device runs them on the device")
@pytest.mark.parametrize("name", ["qk-norm-tied-gqa-5", "all-biases"])
def test_the_executor_runs_on_these_kernels(name, monkeypatch):
    model, logits = make_model(name), []
    steps = [{"a": [1, 2, 3, 4, 5], "b": [6]}, {"a": [7], "b": [8]}, {"a": [9]}]
    for kernels in (Kernels, SimpleNamespace(**vars(card_kernels) | {"tune": Kernels.tune})):
        monkeypatch.setattr(Card, "kernels", kernels)
        executor = Plugin(use_graphs=False).create_executor(
            model_config=model.config,
            runtime_config=RuntimeConfig(
                weight_dtype="float32", kv_dtype="float32", max_seq_len=64
            ),
            weights=model.source(),
            layers=range(model.config.num_layers),
        )
        executor.allocate_kv(4)
        sequences = paged.Sequences(page_size=16, total_pages=4)
        logits.append(
            [
                executor.submit(b := sequences.batch(tokens), [None] * len(b.token_ids))
                .wait()
                .logits
                for tokens in steps
            ]
        )
    for expected, found in zip(*logits, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# --- without a device -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 86, 90])
def test_each_kernel_compiles_for_a_card(capability):
    """Types, layouts and shared memory, as far as the compiler sees; no device is needed."""
    script = Path(__file__).parents[2] / "support" / "compile_card_kernels.py"
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, script, str(capability)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
