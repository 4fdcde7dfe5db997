"""Mistakes made in copies of the kernels' source, for tests of whether a comparison finds them.

``python tests/support/kernel_mistakes.py`` makes every mistake, or those named, and prints what a
comparison says of each.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from shutil import copyfile
from tempfile import TemporaryDirectory
from unittest import mock

from attrs import frozen
from reference_models import prompts, write_model
from transformers import Qwen3Config

from tilewright.types import RuntimeConfig
from tilewright_compare import Choice, Comparison, compare
from tilewright_compare.report import advice
from tilewright_kernels.qwen3_14b import source

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
LENGTHS = (3, 20, 100, 50, *(2, 1) * 6, 2)
"""Tokens of the prompts: more than a page, chunk and tile of keys; more prompts than a tile of
decode has rows."""
CHUNK = 72
PAGE = 48
"""Three tiles of keys."""
NEW_TOKENS = 6


@frozen
class KernelMistake:
    """A piece of a kernel's source that is replaced, and what a comparison must say of it."""

    right: str
    """Text that stands in one of the source files, once."""
    wrong: str
    phase: str
    stages: tuple[str, ...]
    """Stages that may be the first wrong one."""
    cause: str | None = None
    """The bug that must be named; None if no bug may be named."""
    occurrences: int = 1
    """How often the text stands in the file; the last of them is replaced."""


POSITION = "position = pl.cast(pl.read(context_lens, [row + token]), pl.INDEX) - 1"

MISTAKES = {
    # attention in tiles
    "values not rescaled": KernelMistake(
        "pl.row_expand_mul(o[0:Q_ROWS, 0:HEAD_DIM], column)", "o[0:Q_ROWS, 0:HEAD_DIM]",
        "prefill", ("output",),
    ),
    "sum not rescaled": KernelMistake(
        "pl.mul(decay, stats[1:2, 0:Q_ROWS])", "stats[1:2, 0:Q_ROWS]",
        "prefill", ("output",),
    ),
    "sum of the last tile only": KernelMistake(
        "total = pl.add(pl.mul(decay, stats[1:2, 0:Q_ROWS]), total)", "",
        "prefill", ("output",),
    ),
    "only the last tile attended": KernelMistake(
        "for tile in pl.range(last):", "for tile in pl.range(last, last):",
        "prefill", ("output",),
    ),
    "first tile skipped": KernelMistake(
        "for tile in pl.range(last):", "for tile in pl.range(1, last):",
        "prefill", ("output",),
    ),
    "last whole tile skipped": KernelMistake(
        "for tile in pl.range(last):", "for tile in pl.range(last - 1):",
        "prefill", ("output",),
    ),
    "pages of another size": KernelMistake(
        "[table_row + first // PAGE]", "[table_row + first // 32]",
        "prefill", ("output",),
    ),
    "tile's place in its page ignored": KernelMistake(
        "* PAGE + first % PAGE", "* PAGE",
        "prefill", ("output",),
    ),
    "values of whole tiles read from keys": KernelMistake(
        "k_cache, v_cache, kv_row, band", "k_cache, k_cache, kv_row, band",
        "prefill", ("output",),
    ),
    "values of the last tile read from keys": KernelMistake(
        "q_column, k_tail, v_tail, tail_row", "q_column, k_tail, k_tail, tail_row",
        "prefill", ("output",),
    ),
    "last tile not masked": KernelMistake(
        "tail_column = pl.max(0, last * KV_TILE - position + KV_TILE)",
        "tail_column = 0", "prefill", ("output",),
    ),
    "next token seen": KernelMistake(
        "visible = i + KV_TILE + 1", "visible = i + KV_TILE + 2",
        "prefill", ("output",),
    ),
    "padding not masked in decode": KernelMistake(
        "VISIBLE = KV_TILE + 1", "VISIBLE = 2 * KV_TILE",
        "decode", ("output",),
    ),
    "unwritten slots copied": KernelMistake(
        "count = context - last * KV_TILE", "count = KV_TILE", "prefill", ("output",),
    ),
    "a token beyond the context read": KernelMistake(
        "context = pl.cast(pl.read(context_lens, [row + token]), pl.INDEX)",
        "context = pl.cast(pl.read(context_lens, [row + token]), pl.INDEX) + 1",
        "decode", ("output",),
    ),
    "scale of twice the dimensions": KernelMistake(
        "0:KV_TILE], SCALE)", "0:KV_TILE], SCALE * 0.70711)", "prefill", ("output",),
    ),
    "last KV head's group left out": KernelMistake(
        "pl.row_expand_div(o[0:Q_ROWS, 0:HEAD_DIM], total)",
        "pl.mul(pl.row_expand_div(o[0:Q_ROWS, 0:HEAD_DIM], total), "
        "1.0 * pl.min(1, KV_HEADS - 1 - kv_head))",
        "prefill", ("output",),
    ),
    # sequences, chunks and pages
    "chunk start ignored for RoPE": KernelMistake(
        "position = before + i\n            x =", "position = i\n            x =",
        "prefill", ("k_cache",),
    ),
    "chunk start ignored in attention": KernelMistake(
        "position = before + i\n            context",
        "position = i\n            context", "prefill", ("output",),
    ),
    "pages of sequence 0 for all": KernelMistake(
        "table_row = b * table_stride", "table_row = 0", "prefill", ("output",),
    ),
    "pages of the first batch tile": KernelMistake(
        "table_row = (row + token)", "table_row = token", "decode", ("output",),
    ),
    "contexts of the first batch tile": KernelMistake(
        "context = pl.cast(pl.read(context_lens, [row + token])",
        "context = pl.cast(pl.read(context_lens, [token])", "decode", ("output",),
    ),
    "positions of the first batch tile": KernelMistake(
        POSITION, POSITION.replace("row + token", "token"),
        "decode", ("k_cache",),
    ),
    "position of the tile's first token": KernelMistake(
        POSITION, POSITION.replace("row + token", "row"), "decode", ("k_cache",),
    ),
    "last slot of a page not written": KernelMistake(
        "for g in pl.range(KV_HEADS):\n                at = (page * KV_HEADS + g) * PAGE"
        " + offset\n                cache",
        "for g in pl.range(KV_HEADS * pl.min(1, PAGE - 1 - offset)):\n                at = (page * "
        "KV_HEADS + g) * PAGE + offset\n                cache",
        "prefill", ("k_cache",),
    ),
    "slots of the first tile": KernelMistake(
        "pl.read(slot_mapping, [row + token])", "pl.read(slot_mapping, [token])",
        "prefill", ("k_cache",),
    ),
    "second KV head not written": KernelMistake(
        "token : token + 1, g * HEAD_DIM : g * HEAD_DIM + HEAD_DIM",
        "token : token + 1, 0:HEAD_DIM",
        "prefill", ("k_cache",),
    ),
    "residual of the first tile": KernelMistake(
        "x = widen_rows(hidden, row, count, x)\n            ",
        "x = widen_rows(hidden, start, count, x)\n            ",
        "prefill", ("output",), None, 2,
    ),
    "rows of the first tile in the head": KernelMistake(
        "widen_rows(hidden, row, count, x)", "widen_rows(hidden, 0, count, x)",
        "decode", ("logits",),
    ),
    # norms and RoPE
    "first half's squares twice": KernelMistake(
        "pl.add(low_squares, high_squares)", "pl.add(low_squares, low_squares)",
        "prefill", ("k_cache",),
    ),
    "squares of half a head": KernelMistake(
        "pl.add(low_squares, high_squares), INV_HEAD_DIM", "low_squares, INV_HEAD_DIM",
        "prefill", ("k_cache",),
    ),
    "half a head normed": KernelMistake(
        "pl.row_expand_div(high, root), weight", "high, weight",
        "prefill", ("k_cache",),
    ),
    "mean over half a head": KernelMistake(
        "INV_HEAD_DIM = 1.0 / HEAD_DIM", "INV_HEAD_DIM = 1.0 / HALF",
        "prefill", ("k_cache",),
    ),
    "norm without the last columns": KernelMistake(
        "for c in pl.range(0, HIDDEN, VEC_TILE):\n            part = x[0:ROWS, c : c + "
        "VEC_TILE]\n            squares",
        "for c in pl.range(0, HIDDEN - VEC_TILE, VEC_TILE):\n            part = x[0:ROWS, c : c + "
        "VEC_TILE]\n            squares",
        "prefill", ("k_cache",),
    ),
    "cosine and sine swapped": KernelMistake(
        "k, k_norm, cos, sin,", "k, k_norm, sin, cos,", "prefill", ("k_cache",),
    ),
    "rotated in place": KernelMistake(
        "pl.mul(low_n, sin[0:ROWS, HALF:HEAD_DIM])",
        "pl.mul(low_r, sin[0:ROWS, HALF:HEAD_DIM])", "prefill", ("k_cache",),
    ),
    "weight of the second half's norm": KernelMistake(
        "pl.row_expand_div(high, root), weight[0:1, HALF:HEAD_DIM]",
        "pl.row_expand_div(high, root), weight[0:1, 0:HALF]", "prefill", ("k_cache",),
    ),
    # products and the MLP
    "last tile of every sum left out": KernelMistake(
        "pl.range(K_TILE, depth, K_TILE)", "pl.range(K_TILE, depth - K_TILE, K_TILE)",
        "prefill", ("k_cache",),
    ),
    "SiLU's sign": KernelMistake(
        "pl.exp(pl.neg(g))", "pl.exp(g)", "prefill", ("output",),
    ),
    "up left out": KernelMistake(
        "pl.mul(silu, up[0:ROWS, c : c + VEC_TILE])", "silu", "prefill", ("output",),
    ),
    "last columns of the MLP's sum left out": KernelMistake(
        "project(activation, w_down, down, INTERMEDIATE,",
        "project(activation, w_down, down, INTERMEDIATE - K_TILE,", "prefill", ("output",),
    ),
}  # fmt: skip


@contextmanager
def made(mistake: KernelMistake, folder: Path) -> Iterator[None]:
    """A context in which the kernels are loaded from a copy in folder that has the mistake."""
    for name in ("blocks", *source.KERNELS):
        copyfile(source.path(name), folder / f"{name}.py")
    texts = {file: file.read_text() for file in folder.glob("*.py")}
    found = sum(text.count(mistake.right) for text in texts.values())
    if found != mistake.occurrences:
        raise ValueError(f"expected {mistake.occurrences} times {mistake.right!r}, found {found}")
    for file, text in texts.items():
        before, right, after = text.rpartition(mistake.right)
        if right:
            file.write_text(before + mistake.wrong + after)
    with mock.patch.object(source, "path", lambda name: folder / f"{name}.py"):
        yield


def compared(model: Path, page: int = PAGE) -> Comparison:
    candidate = Choice(
        executor="pypto-npu",
        options={"platform": "emulated"},
        runtime=RuntimeConfig(page_size=page),
    )
    ids = list(prompts(CONFIG, LENGTHS))
    return compare(
        model, Choice(executor="torch"), candidate, ids, new_tokens=NEW_TOKENS, chunk=CHUNK
    )


def main(names: Sequence[str]) -> None:
    import tilewright_compare.sides as sides

    sides.UNWRITTEN = float("nan")
    with TemporaryDirectory() as folder:
        model = Path(folder, "model")
        write_model(CONFIG, model, "bfloat16")
        for name, mistake in MISTAKES.items():
            if names and not any(n in name for n in names):
                continue
            copies = Path(folder, name.replace("/", ""))
            copies.mkdir()
            start = time.perf_counter()
            try:
                with made(mistake, copies):
                    found = compared(model)
            except Exception as e:
                print(f"{name}: {type(e).__name__} {e}")
                continue
            seconds = time.perf_counter() - start
            place = found.divergence.place if found.divergence else None
            named = [e.bug for e in found.reason.named] if found.reason else None
            where = (place.mode, place.phase, place.layer, place.stage) if place else None
            ok = place and (place.phase == mistake.phase and place.stage in mistake.stages)
            print(f"{'ok ' if ok else 'BAD'} {name}: {where} {named} {seconds:.1f}s", flush=True)
            print("   ", found.sentence[:200])
            if found.failure:
                print("    FAIL", found.failure)
            if r := found.reason:
                print("   ", [(e.bug, round(e.excess, 2)) for e in r.best[:2]], r.unexplained)
                print("   ", r.refuted, r.broken, r.tried)
            print("   ", advice(found))


if __name__ == "__main__":
    main(sys.argv[1:])
