"""Perplexity of a text in each weight dtype, and in llama.cpp's files of the same weights.

The text is the one that `tilewright compare` runs, or that of --text; each token but the first is
scored after all tokens before it. llama.cpp scores token by token (its server has no
log-probabilities of prompts), and with activations of 8 bits where weights are quantised. Its
quantised files are also read by Tilewright in float32: what the weights alone lose.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from math import exp
from pathlib import Path
from typing import Any

import peers
import torch
from peers import LLAMA_CPP, TILEWRIGHT, LlamaCpp

from tilewright import GenerateConfig, RuntimeConfig
from tilewright.text import Text
from tilewright_compare.default_run import TEXT

QUANTISED = {"int8": ["Q8_0"], "int4": ["Q4_0", "Q4_1"]}
"""llama.cpp's kinds for each; Q4_1 has a minimum for each block of 32, as int4 has."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    peers.add_flags(parser, ["float32", "bfloat16", "int8", "int4"], [LLAMA_CPP])
    parser.add_argument("--text", type=Path, help="text file; default: the text of compare")
    args = parser.parse_args()
    text = args.text.read_text() if args.text else TEXT
    rows: list[dict[str, Any]] = []
    with peers.model_of(args) as model:
        ids = token_ids(model, text)
        for name, dtype, loss in losses(args, model, ids):
            rows.append({"side": name, "dtype": dtype, "loss": loss, "tokens": len(ids) - 1})
    base = next((row for row in rows if row["dtype"] == "bfloat16"), rows[0])
    for row in rows:
        row["perplexity"] = exp(row["loss"])
        row["to_base"] = exp(row["loss"] - base["loss"]) - 1
    peers.print_table(
        [f"{len(ids) - 1} tokens", "perplexity", f"more than {base['side']} {base['dtype']}"],
        [
            [
                f"{row['side']} {row['dtype']}",
                f"{row['perplexity']:.3f}",
                f"{row['to_base'] * 100:+.2f}%",
            ]
            for row in rows
        ],
    )
    peers.report(args, rows, [])


def losses(
    args: argparse.Namespace, model: Path, ids: Sequence[int]
) -> Iterator[tuple[str, str, float]]:
    """Side, dtype, and the mean of the tokens' negative log-probabilities."""
    for dtype in args.dtype:
        for option in (None, *args.option):
            yield peers.side_name(option), dtype, our_loss(model, dtype, option, ids)
    if not peers.is_present(LLAMA_CPP, args):
        return
    from gguf_file import KINDS, write_gguf

    quantised = [kind for dtype in args.dtype for kind in QUANTISED.get(dtype, [])]
    for kind in [KINDS[dtype] for dtype in args.dtype if dtype not in QUANTISED] + quantised:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "model.gguf")
            write_gguf(model, path, kind)
            server = LlamaCpp(path, len(ids) + 1, torch.get_num_threads())
            scored = [server.logprob(ids[:at], ids[at]) for at in range(1, len(ids))]
            yield LLAMA_CPP, kind, -sum(scored) / len(scored)
            if kind in quantised:
                yield f"{TILEWRIGHT} float32, from", kind, our_loss(path, "float32", None, ids)


def token_ids(model: Path, text: str) -> list[int]:
    """The text's tokens with those that begin a prompt, as an engine encodes it."""
    with peers.engine(None) as engine:
        loaded = engine.load(model)
        loaded.weights.close()
    return list(Text(loaded.text).encode(text))


def our_loss(model: Path, dtype: str, option: str | None, ids: Sequence[int]) -> float:
    runtime = RuntimeConfig(weight_dtype=dtype, max_seq_len=len(ids) + 1, max_batch_size=1)
    config = GenerateConfig(max_new_tokens=1, temperature=0.0, prompt_logprobs=0)
    with peers.engine(option) as engine:
        engine.init_model("model", model, runtime)
        scored = engine.generate_result("model", ids, config).prompt_logprobs
    assert scored is not None
    found = [token.logprob for token in scored if token is not None]
    return -sum(found) / len(found)


if __name__ == "__main__":
    main()
