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

    file: str
    """Name of the source file, without ``.py``."""
    right: str
    """Text that stands there once."""
    wrong: str
    phase: str
    stages: tuple[str, ...]
    """Stages that may be the first wrong one."""
    cause: str | None = None
    """The bug that must be named; None if no bug may be named."""


POSITION = "position = pl.cast(pl.read(context_lens, [row + token]), pl.INDEX) - 1"
ZEROS = """\
with pl.at(level=pl.Level.CORE_GROUP, name_hint="nothing"):
                attended[0:ROWS, 0:Q_DIM] = pl.cast(
                    pl.full([ROWS, Q_DIM], dtype=pl.FP32, value=0.0), pl.BF16, mode="rint"
                )
            for h in pl.parallel(HEADS - GROUP):"""
BEFORE_ROWS = "for k in pl.range(K_TILE, depth, K_TILE):\n"

MISTAKES = {
    # attention in tiles
    "values not rescaled": KernelMistake(
        "blocks", "pl.row_expand_mul(o[0:Q_ROWS, 0:HEAD_DIM], column)", "o[0:Q_ROWS, 0:HEAD_DIM]",
        "prefill", ("output",),
    ),
    "sum not rescaled": KernelMistake(
        "blocks", "pl.mul(decay, stats[1:2, 0:Q_ROWS])", "stats[1:2, 0:Q_ROWS]",
        "prefill", ("output",),
    ),
    "sum of the last tile only": KernelMistake(
        "blocks", "total = pl.add(pl.mul(decay, stats[1:2, 0:Q_ROWS]), total)", "",
        "prefill", ("output",),
    ),
    "only the last tile attended": KernelMistake(
        "blocks", "for tile in pl.range(last):", "for tile in pl.range(last, last):",
        "prefill", ("output",),
    ),
    "first tile skipped": KernelMistake(
        "blocks", "for tile in pl.range(last):", "for tile in pl.range(1, last):",
        "prefill", ("output",),
    ),
    "last whole tile skipped": KernelMistake(
        "blocks", "for tile in pl.range(last):", "for tile in pl.range(last - 1):",
        "prefill", ("output",),
    ),
    "page of a tile's number": KernelMistake(
        "blocks", "[table_row + first // PAGE]", "[table_row + tile]",
        "prefill", ("output",),
    ),
    "tile's place in its page ignored": KernelMistake(
        "blocks", "* PAGE + first % PAGE", "* PAGE",
        "prefill", ("output",),
    ),
    "values of whole tiles read from keys": KernelMistake(
        "blocks", "k_cache, v_cache, kv_row, band", "k_cache, k_cache, kv_row, band",
        "prefill", ("output",),
    ),
    "values of the last tile read from keys": KernelMistake(
        "decode_layer", "copy_last_tile(v_cache,", "copy_last_tile(k_cache,",
        "decode", ("output",),
    ),
    "last tile not masked": KernelMistake(
        "blocks", "tail_column = pl.max(0, last * KV_TILE - position + KV_TILE)",
        "tail_column = 0", "prefill", ("output",),
    ),
    "next token seen": KernelMistake(
        "prefill_layer", "visible = i + KV_TILE + 1", "visible = i + KV_TILE + 2",
        "prefill", ("output",),
    ),
    "padding not masked in decode": KernelMistake(
        "decode_layer", "VISIBLE = KV_TILE + 1", "VISIBLE = 2 * KV_TILE",
        "decode", ("output",),
    ),
    "unwritten slots copied": KernelMistake(
        "blocks", "count = context - last * KV_TILE", "count = KV_TILE", "prefill", ("output",),
    ),
    "a token beyond the context read": KernelMistake(
        "decode_layer", "context = pl.cast(pl.read(context_lens, [row + token]), pl.INDEX)",
        "context = pl.cast(pl.read(context_lens, [row + token]), pl.INDEX) + 1",
        "decode", ("output",),
    ),
    "scale of twice the dimensions": KernelMistake(
        "blocks", "0:KV_TILE], SCALE)", "0:KV_TILE], SCALE * 0.70711)", "prefill", ("output",),
    ),
    "last KV head's group left out": KernelMistake(
        "prefill_layer", "for h in pl.parallel(HEADS):", ZEROS, "prefill", ("output",),
    ),
    "last KV head's group not computed": KernelMistake(
        "decode_layer", "for g in pl.parallel(KV_HEADS):", "for g in pl.parallel(KV_HEADS - 1):",
        "decode", ("output",),
    ),
    # sequences, chunks and pages
    "chunk start ignored for RoPE": KernelMistake(
        "prefill_layer", "position = before + i\n            x =", "position = i\n            x =",
        "prefill", ("k_cache",),
    ),
    "chunk start ignored in attention": KernelMistake(
        "prefill_layer", "position = before + i\n            context",
        "position = i\n            context", "prefill", ("output",),
    ),
    "pages of sequence 0 for all": KernelMistake(
        "prefill_layer", "table_row = b * table_stride", "table_row = 0", "prefill", ("output",),
    ),
    "pages of the first batch tile": KernelMistake(
        "decode_layer", "table_row = (row + token)", "table_row = token", "decode", ("output",),
    ),
    "contexts of the first batch tile": KernelMistake(
        "decode_layer", "context = pl.cast(pl.read(context_lens, [row + token])",
        "context = pl.cast(pl.read(context_lens, [token])", "decode", ("output",),
    ),
    "positions of the first batch tile": KernelMistake(
        "decode_layer", POSITION, POSITION.replace("row + token", "token"),
        "decode", ("k_cache",),
    ),
    "position of the tile's first token": KernelMistake(
        "decode_layer", POSITION, POSITION.replace("row + token", "row"), "decode", ("k_cache",),
    ),
    "last slot of a page not written": KernelMistake(
        "blocks", "for g in pl.range(KV_HEADS):\n                at = (page * KV_HEADS + g) * PAGE"
        " + offset\n                cache",
        "for g in pl.range(KV_HEADS * pl.min(1, PAGE - 1 - offset)):\n                at = (page * "
        "KV_HEADS + g) * PAGE + offset\n                cache",
        "prefill", ("k_cache",),
    ),
    "slots of the first tile": KernelMistake(
        "blocks", "pl.read(slot_mapping, [row + token])", "pl.read(slot_mapping, [token])",
        "prefill", ("k_cache",),
    ),
    "second KV head not written": KernelMistake(
        "blocks", "token : token + 1, g * HEAD_DIM : g * HEAD_DIM + HEAD_DIM",
        "token : token + 1, 0:HEAD_DIM",
        "prefill", ("k_cache",),
    ),
    "residual of the first tile": KernelMistake(
        "prefill_layer",
        "x = widen_rows(hidden, row, count, x)\n            projected",
        "x = widen_rows(hidden, start, count, x)\n            projected",
        "prefill", ("output",),
    ),
    "rows of the first tile in the head": KernelMistake(
        "head", "widen_rows(hidden, row, count, x)", "widen_rows(hidden, 0, count, x)",
        "decode", ("logits",),
    ),
    # norms and RoPE
    "first half's squares twice": KernelMistake(
        "blocks", "pl.add(low_squares, high_squares)", "pl.add(low_squares, low_squares)",
        "prefill", ("k_cache",),
    ),
    "squares of half a head": KernelMistake(
        "blocks", "pl.add(low_squares, high_squares), INV_HEAD_DIM", "low_squares, INV_HEAD_DIM",
        "prefill", ("k_cache",),
    ),
    "half a head normed": KernelMistake(
        "blocks", "pl.row_expand_div(high, root), weight", "high, weight",
        "prefill", ("k_cache",),
    ),
    "mean over half a head": KernelMistake(
        "blocks", "INV_HEAD_DIM = 1.0 / HEAD_DIM", "INV_HEAD_DIM = 1.0 / HALF",
        "prefill", ("k_cache",),
    ),
    "norm without the last columns": KernelMistake(
        "blocks", "for c in pl.range(0, HIDDEN, VEC_TILE):\n            part = x[0:ROWS, c : c + "
        "VEC_TILE]\n            squares",
        "for c in pl.range(0, HIDDEN - VEC_TILE, VEC_TILE):\n            part = x[0:ROWS, c : c + "
        "VEC_TILE]\n            squares",
        "prefill", ("k_cache",),
    ),
    "cosine and sine swapped": KernelMistake(
        "prefill_layer", "k, k_norm, cos, sin,", "k, k_norm, sin, cos,", "prefill", ("k_cache",),
    ),
    "rotated in place": KernelMistake(
        "blocks", "pl.mul(low_n, sin[0:ROWS, HALF:HEAD_DIM])",
        "pl.mul(low_r, sin[0:ROWS, HALF:HEAD_DIM])", "prefill", ("k_cache",),
    ),
    "weight of the second half's norm": KernelMistake(
        "blocks", "pl.row_expand_div(high, root), weight[0:1, HALF:HEAD_DIM]",
        "pl.row_expand_div(high, root), weight[0:1, 0:HALF]", "prefill", ("k_cache",),
    ),
    "attention's norm before the MLP": KernelMistake(
        "decode_layer", "feed_forward(x, post_norm,", "feed_forward(x, input_norm,",
        "decode", ("output",),
    ),
    # products and the MLP
    "last tile of every sum left out": KernelMistake(
        "blocks", "pl.range(K_TILE, depth, K_TILE)", "pl.range(K_TILE, depth - K_TILE, K_TILE)",
        "prefill", ("k_cache",),
    ),
    "SiLU's sign": KernelMistake(
        "blocks", "pl.exp(pl.neg(g))", "pl.exp(g)", "prefill", ("output",),
    ),
    "up left out": KernelMistake(
        "blocks", "pl.mul(silu, up[0:ROWS, c : c + VEC_TILE])", "silu", "prefill", ("output",),
    ),
    "last columns of the MLP's sum left out": KernelMistake(
        "blocks", "project(activation, w_down, down, INTERMEDIATE,",
        "project(activation, w_down, down, INTERMEDIATE - K_TILE,", "prefill", ("output",),
    ),
    "last part of the vocabulary left out": KernelMistake(
        "head", "pl.parallel(0, vocab, VOCAB_TILE)", "pl.parallel(0, vocab - 3, VOCAB_TILE)",
        "prefill", ("logits",),
    ),
}  # fmt: skip


@contextmanager
def made(mistake: KernelMistake, folder: Path) -> Iterator[None]:
    """A context in which the kernels are loaded from a copy in folder that has the mistake."""
    for name in ("blocks", *source.KERNELS):
        copyfile(source.path(name), folder / f"{name}.py")
    file = folder / f"{mistake.file}.py"
    text = file.read_text()
    if text.count(mistake.right) != 1:
        raise ValueError(f"expected {mistake.right!r} once in {file}")
    file.write_text(text.replace(mistake.right, mistake.wrong))
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
            ok = place is not None and (place.phase == mistake.phase and place.stage in mistake.stages)
            print(f"{'ok ' if ok else 'BAD'} {name}: {where} {named} {seconds:.1f}s", flush=True)
            print("   ", found.sentence[:200])
            if found.failure: print("    FAIL", found.failure)
            if found.reason and not named:
                print("   ", [(e.bug, round(e.excess, 2)) for e in found.reason.best[:2]], found.reason.unexplained, found.reason.refuted, found.reason.broken, found.reason.tried)


if __name__ == "__main__":
    main(sys.argv[1:])
