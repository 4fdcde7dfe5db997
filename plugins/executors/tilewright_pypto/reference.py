"""Reference of the kernels and parameters that are bound, from ``binding``.

``python -m tilewright_pypto.reference > docs/kernel-parameters.md``
"""

import sys
from collections.abc import Iterator, Mapping

from tilewright_pypto.binding import KERNELS, RESULTS, STEP, WEIGHTS, passed

_HEAD = """\
# Kernels and their parameters

<!-- Made by `python -m tilewright_pypto.reference > docs/kernel-parameters.md`; do not edit. -->

The kernels of a set that executor `pypto-npu` runs, and the parameters that it gives them, by name
and in any order. [Writing kernels](writing-kernels.md) explains how to use this page. A set has
`prefill_layer` and `head`, or `prefill_model`, or all three; kernels for decode may be left out.

A kernel takes what it names of the parameters that it may take. It must take all that it writes,
and all weights of the model that belong to it.

- T: tokens of the step, in order of their sequences; B: sequences of the step; L: tokens whose
  logits are wanted; max_pages: the largest number of pages of a sequence in the step. Sizes of the
  model are fields of `ModelConfig`: heads is `num_heads`, kv_heads `num_kv_heads`.
- A program for the whole model, and a layer kernel that takes `layer`, gets the weights of all
  layers, stacked along the first dimension: `wq` as [layers * hidden_size, heads * head_dim]. The
  caches are stacked likewise: all pages of layer 0, then those of layer 1.
- A parameter is an input unless the table says out or inout. Its size in a dimension may be written
  as a number, a constant or a symbol of `pl.dynamic`.
- "Taken by" says which kernels may name it: layer is `prefill_layer` and `decode_layer`, model is
  `prefill_model` and `decode_model`.
"""

_WEIGHTS = """\
Matrices are the checkpoint's, transposed to [in, out], except `embedding` and `lm_head`; norms and
biases are rows in FP32.
"""


def reference() -> str:
    """Markdown."""
    lines = [_HEAD, "## Kernels\n", "| kernel | runs | writes |", "|---|---|---|"]
    for kernel, what in KERNELS.items():
        written = ", ".join(f"`{name}` ({how})" for name, how in RESULTS[kernel].items())
        lines.append(f"| `{kernel}` | {what} | {written} |")
    lines += ["\n## Parameters of a step\n", *_table(STEP)]
    lines += [f"\n## Weights\n\n{_WEIGHTS}", *_table(WEIGHTS)]
    return "\n".join(lines) + "\n"


def _table(described: Mapping[str, str]) -> Iterator[str]:
    yield "| name | shape and dtype | taken by |"
    yield "|---|---|---|"
    for name, text in described.items():
        yield f"| `{name}` | {text} | {_takers(name)} |"


def _takers(name: str) -> str:
    """The kernels that may take a parameter, by the last part of their names."""
    kernels = (kernel for kernel in KERNELS if name in passed(kernel))
    return ", ".join(dict.fromkeys(kernel.rpartition("_")[2] for kernel in kernels))


if __name__ == "__main__":
    sys.stdout.write(reference())
