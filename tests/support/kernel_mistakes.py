"""Mistakes made in copies of the kernels' source, for tests of whether a comparison finds them.

``python tests/support/kernel_mistakes.py`` makes every mistake, or those named, and prints what the
default run of ``tilewright compare`` says of each.
"""

import io
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from shutil import copyfile
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

from attrs import Factory, field, frozen
from reference_models import prompts
from transformers import Qwen3Config

from tilewright.cli import main
from tilewright.types import RuntimeConfig
from tilewright_compare import Choice, Comparison, compare
from tilewright_kernels.qwen3_14b.plugin import SOURCES

CONFIG = Qwen3Config(
    hidden_size=96,
    intermediate_size=160,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    vocab_size=131,
    max_position_embeddings=128,
    tie_word_embeddings=False,
)


@frozen
class Run:
    """What is run to find a mistake."""

    lengths: tuple[int, ...]
    """Tokens of each prompt."""
    chunk: int
    new_tokens: int
    page_size: int = 48
    """Three tiles of keys."""


PREFILL = Run((16, 3, 80), chunk=67, new_tokens=2)
"""A prompt over two chunks, two pages and several tiles, and one beside it."""
DECODE = Run((20, *(1, 2) * 8), chunk=64, new_tokens=3)
"""More sequences than decode has rows in a tile."""


@frozen
class KernelMistake:
    """A piece of a kernel's source that is replaced, and what a comparison must say of it."""

    right: str
    """Text that stands in one of the source files, once."""
    wrong: str
    phase: str
    stages: tuple[str, ...]
    """Stages that may be the first wrong one."""
    cause: str
    """The bug that must be named."""
    occurrences: int = 1
    """How often the text stands in the files; the last one of each is replaced."""
    same: tuple[str, ...] = ()
    """Bugs with the same effect, which are named beside the cause."""
    where: str = ""
    """The part that must be said to be wrong; empty: anything may be said."""
    check: str = ""
    """What the hint must begin with; empty: anything."""
    run: Run = field(
        default=Factory(lambda m: DECODE if m.phase == "decode" else PREFILL, takes_self=True)
    )
    """A small run that shows it."""


POSITION = "position = pl.cast(pl.read(context_lens, [row + token]), pl.INDEX) - 1"

MISTAKES = {
    # attention in tiles
    "values not rescaled": KernelMistake(
        "pl.row_expand_mul(o[0:Q_ROWS, 0:HEAD_DIM], column)", "o[0:Q_ROWS, 0:HEAD_DIM]",
        "prefill", ("output",),
        "weighted values are not rescaled when a tile of 16 keys raises the maximum",
    ),
    "sum not rescaled": KernelMistake(
        "pl.mul(decay, stats[1:2, 0:Q_ROWS])", "stats[1:2, 0:Q_ROWS]",
        "prefill", ("output",),
        "the sum of weights is not rescaled when a tile of 16 keys raises the maximum",
    ),
    "sum of the last tile only": KernelMistake(
        "total = pl.add(pl.mul(decay, stats[1:2, 0:Q_ROWS]), total)", "",
        "prefill", ("output",),
        "the sum of weights is that of the last tile of 16 keys only",
    ),
    "only the last tile attended": KernelMistake(
        "for tile in pl.range(last):", "for tile in pl.range(last, last):",
        "prefill", ("output",),
        "all tiles of 16 keys but the last are left out",
    ),
    "first tile skipped": KernelMistake(
        "for tile in pl.range(last):", "for tile in pl.range(1, last):",
        "prefill", ("output",),
        "the first tile of 16 keys is left out",
        where="only positions from 16 on",
    ),
    "last whole tile skipped": KernelMistake(
        "for tile in pl.range(last):", "for tile in pl.range(last - 1):",
        "prefill", ("output",),
        "the tile of 16 keys before the last is left out",
    ),
    "pages of another size": KernelMistake(
        "[table_row + first // PAGE]", "[table_row + first // 64]",
        "prefill", ("output",),
        "the page of a key is looked up as if pages had 64 slots",
        same=tuple(f"the page of a key is looked up as if pages had {n} slots" for n in (128, 256)),
    ),
    "tile's place in its page ignored": KernelMistake(
        "* PAGE + first % PAGE", "* PAGE",
        "prefill", ("output",),
        "tiles of 16 keys before the last are read from the start of their page",
    ),
    "values of whole tiles read from keys": KernelMistake(
        "k_cache, v_cache, kv_row, band", "k_cache, k_cache, kv_row, band",
        "prefill", ("output",),
        "values are read from the keys, in all tiles but the last of 16 keys",
    ),
    "values of the last tile read from keys": KernelMistake(
        "q_column, k_tail, v_tail, tail_row", "q_column, k_tail, k_tail, tail_row",
        "prefill", ("output",),
        "values are read from the keys, in the last tile of 16 keys",
    ),
    "last tile not masked": KernelMistake(
        "tail_column = pl.max(0, last * KV_TILE - position + KV_TILE)",
        "tail_column = 0", "prefill", ("output",),
        "the last tile of 16 keys is not masked",
    ),
    "next token seen": KernelMistake(
        "visible = i + KV_TILE + 1", "visible = i + KV_TILE + 2",
        "prefill", ("output",),
        "the causal mask shows the next token",
    ),
    "padding not masked in decode": KernelMistake(
        "VISIBLE = KV_TILE + 1", "VISIBLE = 2 * KV_TILE",
        "decode", ("output",),
        "what is past the context in the last tile of 16 keys counts, as zeros",
    ),
    "unwritten slots copied": KernelMistake(
        "count = context - last * KV_TILE", "count = KV_TILE", "prefill", ("output",),
        "slots past the context are read with the last tile of 16 keys, and only masked",
    ),
    "a token beyond the context read": KernelMistake(
        "context = pl.cast(pl.read(context_lens, [row + token]), pl.INDEX)",
        "context = pl.cast(pl.read(context_lens, [row + token]), pl.INDEX) + 1",
        "decode", ("output",),
        "the causal mask shows the next token, written or not",
    ),
    "scale of twice the dimensions": KernelMistake(
        "0:KV_TILE], SCALE)", "0:KV_TILE], SCALE * 0.70711)", "prefill", ("output",),
        "the attention scale is that of twice as many dimensions",
        same=("q_norm divides the sum of squares by half its size",),
    ),
    "last KV head's group left out": KernelMistake(
        "pl.row_expand_div(o[0:Q_ROWS, 0:HEAD_DIM], total)",
        "pl.mul(pl.row_expand_div(o[0:Q_ROWS, 0:HEAD_DIM], total), "
        "1.0 * pl.min(1, KV_HEADS - 1 - kv_head))",
        "prefill", ("output",),
        "query heads 2 to 3 are left out of attention",
        same=("the last 64 columns of o_proj are left out of the sum",),
    ),
    # sequences, chunks and pages
    "chunk start ignored for RoPE": KernelMistake(
        "position = before + i\n            x =", "position = i\n            x =",
        "prefill", ("k_cache",),
        "RoPE's positions start at 0 in each step",
    ),
    "chunk start ignored in attention": KernelMistake(
        "position = before + i\n            context",
        "position = i\n            context", "prefill", ("output",),
        "attention takes a step's first token of a sequence to be at position 0",
    ),
    "pages of sequence 0 for all": KernelMistake(
        "table_row = b * table_stride", "table_row = 0", "prefill", ("output",),
        "the pages of the first sequence are read for all",
        where="only sequences from prompt-1 on",
    ),
    "pages of the first batch tile": KernelMistake(
        "table_row = (row + token)", "table_row = token", "decode", ("output",),
        "each tile of 16 rows has the pages of the first one",
        where="only token 2 of prompt-16",
    ),
    "contexts of the first batch tile": KernelMistake(
        "context = pl.cast(pl.read(context_lens, [row + token])",
        "context = pl.cast(pl.read(context_lens, [token])", "decode", ("output",),
        "each tile of 16 rows has the context of the first one",
    ),
    "positions of the first batch tile": KernelMistake(
        POSITION, POSITION.replace("row + token", "token"),
        "decode", ("k_cache",),
        "each tile of 16 rows has the RoPE positions of the first one",
    ),
    "position of the tile's first token": KernelMistake(
        POSITION, POSITION.replace("row + token", "row"), "decode", ("k_cache",),
        "all rows of a tile of 16 have the RoPE positions of its first row",
    ),
    "last slot of a page not written": KernelMistake(
        "for g in pl.range(KV_HEADS):\n                at = (page * KV_HEADS + g) * PAGE"
        " + offset\n                cache",
        "for g in pl.range(KV_HEADS * pl.min(1, PAGE - 1 - offset)):\n                at = (page * "
        "KV_HEADS + g) * PAGE + offset\n                cache",
        "prefill", ("k_cache",),
        "the last slot of each page is not written",
    ),
    "slots of the first tile": KernelMistake(
        "pl.read(slot_mapping, [row + token])", "pl.read(slot_mapping, [token])",
        "prefill", ("k_cache",),
        "each tile of 16 rows has the slots of the step's first rows",
    ),
    "first KV head cached for all": KernelMistake(
        "token : token + 1, g * HEAD_DIM : g * HEAD_DIM + HEAD_DIM",
        "token : token + 1, 0:HEAD_DIM",
        "prefill", ("k_cache",),
        "the first KV head's keys and values are cached for all KV heads",
        where="only KV head 1", check="check how keys are stored",
    ),
    "residual of the first tile": KernelMistake(
        "x = widen_rows(hidden, row, count, x)\n            ",
        "x = widen_rows(hidden, start, count, x)\n            ",
        "prefill", ("output",),
        "each tile of 16 rows has the residual of the first one", 2,
    ),
    "rows of the first tile in the head": KernelMistake(
        "row, count, x)\n        logits = score_rows(",
        "0, count, x)\n        logits = score_rows(",
        "prefill", ("logits",),
        "each tile of 16 rows of the head has the input of the first one",
        run=DECODE,
    ),
    # norms and RoPE
    "first half's squares twice": KernelMistake(
        "pl.add(low_squares, high_squares)", "pl.add(low_squares, low_squares)",
        "prefill", ("k_cache",),
        "each of q_norm and k_norm takes the mean over the first half only",
    ),
    "squares of half a head": KernelMistake(
        "pl.add(low_squares, high_squares), INV_HEAD_DIM", "low_squares, INV_HEAD_DIM",
        "prefill", ("k_cache",),
        "each of q_norm and k_norm leaves the second half's squares out of the mean",
    ),
    "half a head normed": KernelMistake(
        "pl.row_expand_div(high, root), weight", "high, weight",
        "prefill", ("k_cache",),
        "each of q_norm and k_norm norms the first half only",
    ),
    "mean over half a head": KernelMistake(
        "INV_HEAD_DIM = 1.0 / HEAD_DIM", "INV_HEAD_DIM = 1.0 / HALF",
        "prefill", ("k_cache",),
        "each of q_norm and k_norm divides the sum of squares by half its size",
    ),
    "norm without the last columns": KernelMistake(
        "for c in pl.range(0, HIDDEN, VEC_TILE):\n            part = x[0:ROWS, c : c + "
        "VEC_TILE]\n            squares",
        "for c in pl.range(0, HIDDEN - VEC_TILE, VEC_TILE):\n            part = x[0:ROWS, c : c + "
        "VEC_TILE]\n            squares",
        "prefill", ("v_cache",),
        "each of attn_norm and mlp_norm leaves the last 32 columns out of the mean",
    ),
    "cosine and sine swapped": KernelMistake(
        "            keys = rotate_heads(k, k_norm, cos, sin,",
        "            keys = rotate_heads(k, k_norm, sin, cos,",
        "prefill", ("k_cache",),
        "RoPE of keys has cosine and sine in each other's place",
        check="check the key projection, its norm and RoPE",
    ),
    "rotated in place": KernelMistake(
        "pl.mul(low_n, sin[0:ROWS, HALF:HEAD_DIM])",
        "pl.mul(low_r, sin[0:ROWS, HALF:HEAD_DIM])", "prefill", ("k_cache",),
        "RoPE rotates the first half in place, and the second half with the result",
    ),
    "weight of the second half's norm": KernelMistake(
        "pl.row_expand_div(high, root), weight[0:1, HALF:HEAD_DIM]",
        "pl.row_expand_div(high, root), weight[0:1, 0:HALF]", "prefill", ("k_cache",),
        "each of q_norm and k_norm has the first half's weight in both halves",
    ),
    # products and the MLP
    "last tile of every sum left out": KernelMistake(
        "pl.range(K_TILE, depth, K_TILE)", "pl.range(K_TILE, depth - K_TILE, K_TILE)",
        "prefill", ("k_cache",),
        "the last 32 columns of every projection are left out of the sum",
    ),
    "SiLU's sign": KernelMistake(
        "pl.exp(pl.neg(g))", "pl.exp(g)", "prefill", ("output",),
        "the activation's sigmoid is of -gate",
    ),
    "up left out": KernelMistake(
        "pl.mul(silu, up[0:ROWS, c : c + VEC_TILE])", "silu", "prefill", ("output",),
        "gate is not multiplied by up",
    ),
    "last columns of the MLP's sum left out": KernelMistake(
        "project(activation, w_down, down, INTERMEDIATE,",
        "project(activation, w_down, down, INTERMEDIATE - K_TILE,", "prefill", ("output",),
        "the last 32 columns of down_proj are left out of the sum",
    ),
    # rows of a step
    "residual of the step's first rows": KernelMistake(
        "x = widen_rows(hidden, row, count, x)\n            out",
        "x = widen_rows(hidden, i, count, x)\n            out", "prefill", ("output",),
        "each sequence has the residual of the step's first rows",
    ),
    "values in the slots of the step's first rows": KernelMistake(
        "write_cache(values, slot_mapping, row, count, v_cache)\n\n    for b",
        "write_cache(values, slot_mapping, i, count, v_cache)\n\n    for b",
        "prefill", ("v_cache",),
        "each sequence has the slots of values of the step's first rows",
        check="check which tokens are written",
    ),
    "values of the last row not written": KernelMistake(
        "write_cache(values, slot_mapping, row, count, v_cache)\n\n        query_heads",
        "write_cache(values, slot_mapping, row, count - 1, v_cache)\n\n        query_heads",
        "decode", ("v_cache",),
        "the last row of each tile of rows is not written, in the cache of values",
        check="check which tokens are written",
    ),
}  # fmt: skip


WIDE = Qwen3Config(
    **CONFIG.to_diff_dict()
    | {"hidden_size": 4096, "intermediate_size": 128, "num_hidden_layers": 1, "layer_types": None}
)
"""Narrow but for the hidden size, over which products are summed."""
SUMS_IN_BF16 = KernelMistake(
    "weight[k : k + K_TILE, c : c + N_TILE]\n                )\n",
    "weight[k : k + K_TILE, c : c + N_TILE]\n                )\n"
    '                acc = pl.cast(pl.cast(acc, pl.BF16, mode="rint"), pl.FP32, mode="rint")\n',
    "prefill",
    ("k_cache", "v_cache"),
    "products are added up in bfloat16, after blocks of 128",
)
"""Planted in wide models: each tile of a sum is rounded."""


@contextmanager
def made(mistake: KernelMistake, folder: Path) -> Iterator[None]:
    """A context in which the kernels are loaded from a copy in folder that has the mistake."""
    copies = {name: Path(copyfile(file, folder / file.name)) for name, file in SOURCES.items()}
    texts = {file: file.read_text() for file in folder.glob("*.py")}
    found = sum(text.count(mistake.right) for text in texts.values())
    if found != mistake.occurrences:
        raise ValueError(f"expected {mistake.occurrences} times {mistake.right!r}, found {found}")
    for file, text in texts.items():
        before, right, after = text.rpartition(mistake.right)
        if right:
            file.write_text(before + mistake.wrong + after)
    with mock.patch.dict(SOURCES, copies):
        yield


def compared(model: Path, run: Run) -> Comparison:
    """A comparison of the kernels, which are loaded for it, with PyTorch."""
    candidate = Choice(
        executor="pypto-npu",
        options={"platform": "emulated"},
        runtime=RuntimeConfig(page_size=run.page_size),
    )
    ids = list(prompts(CONFIG, run.lengths))
    return compare(
        model,
        Choice(executor="torch"),
        candidate,
        ids,
        new_tokens=run.new_tokens,
        chunk=run.chunk,
    )


def line(name: str, mistake: KernelMistake, report: dict[str, Any], seconds: float) -> str:
    """A row of the table: mistake, found, layer, phase, stage, cause named, seconds."""
    first, reason = report["divergence"], report["reason"]
    bugs = reason["bugs"] if reason else []
    place = [first[k] for k in ("layer", "phase", "stage")] if first else [None] * 3
    columns = [
        name,
        report["verdict"],
        *("" if x is None else str(x) for x in place),
        " or ".join(bugs) or "none",
        "as expected" if set(bugs) == {mistake.cause, *mistake.same} else "UNEXPECTED",
        first["pattern"] if first else "",
        f"{seconds:.1f}",
    ]
    return " | ".join(columns)


def run_by_default(report: Path) -> dict[str, Any]:
    """The JSON report of ``tilewright compare`` with no prompt: the bundled model, default run."""
    argv = ["compare", "--candidate", "pypto-npu", "-o", "candidate.platform=emulated", "--json"]
    with redirect_stderr(io.StringIO()):
        main([*argv, "--output", str(report)])
    return json.loads(report.read_text())


def table(names: Sequence[str]) -> None:
    """names: parts of the names of mistakes; all if there are none."""
    with TemporaryDirectory() as folder:
        print("mistake | verdict | layer | phase | stage | cause named |  | where | seconds")
        chosen = {n: m for n, m in MISTAKES.items() if not names or any(x in n for x in names)}
        for number, (name, mistake) in enumerate(chosen.items()):
            copies = Path(folder, str(number))
            copies.mkdir()
            start = time.perf_counter()
            with made(mistake, copies):
                report = run_by_default(copies / "report.json")
            print(line(name, mistake, report, time.perf_counter() - start), flush=True)


if __name__ == "__main__":
    table(sys.argv[1:])
