"""Runs each kernel on PyPTO's simulator and records its inputs and outputs.

    python tests/support/record_a2a3sim.py

writes tests/data/a2a3sim/<kernel>.safetensors, for test_recorded_a2a3sim, through the executor's
adapter. It needs PyPTO, its runtime and ptoas, of versions that match; it records the versions
too.
"""

import datetime
import json
import subprocess
from pathlib import Path

import torch
from attrs import asdict
from checkout import DATA
from pypto_oracle import simulated
from qwen3_layers import (
    Cache,
    Guarded,
    config_of,
    kernel_weights,
    layer_inputs,
    random_weights,
)
from safetensors.torch import save_file
from torch import Tensor

from tilewright_kernels import source
from tilewright_kernels.qwen3_14b.plugin import KERNELS, kernels_of
from tilewright_kernels.qwen3_14b.shape import LayerShape
from tilewright_pypto.installation import find, needs

RECORDED = DATA / "a2a3sim"

SHAPE = LayerShape(
    hidden=64, intermediate=96, heads=4, kv_heads=2, head_dim=32, page_size=32, kv_tile=16
)
STEPS = {
    "decode_layer": [([0, 31, 50], [1, 1, 1]), ([5] * 16 + [40], [1] * 17)],
    "prefill_layer": [([0], [70]), ([20, 0, 33], [1, 17, 40])],
}
"""Of each case, how many tokens the sequences have and how many are new."""
HEAD_ROWS = (3, 17)
VOCAB = 147


def cases(kernel: str) -> list[dict[str, Tensor]]:
    """The kernel's inputs for each case; all cases share the weight tensors."""
    config = config_of(SHAPE, VOCAB)
    source_of_weights = random_weights(config)
    random = torch.Generator().manual_seed(1)

    def hidden(rows: int) -> Tensor:
        return torch.randn(rows, SHAPE.hidden, generator=random).bfloat16()

    if kernel == "head":
        weights = {
            "final_norm": source_of_weights.get("model.norm.weight").float().unsqueeze(0),
            "lm_head": source_of_weights.get("lm_head.weight"),
        }
        logits = [torch.full((rows, VOCAB), float("nan")) for rows in HEAD_ROWS]
        return [{"hidden": hidden(len(x)), **weights, "logits": x} for x in logits]
    weights = kernel_weights(source_of_weights)
    given = []
    for histories, new in STEPS[kernel]:
        used = sum(-(-(h + n) // SHAPE.page_size) for h, n in zip(histories, new, strict=True))
        cache = Cache(SHAPE, used + 2)
        cache.add(*histories)
        batch = cache.step(new)
        given.append(layer_inputs(kernel, config, weights, hidden(sum(new)), batch, cache))
    return given


def revisions() -> dict[str, str]:
    """The commits of PyPTO, its runtime and PTO-ISA, and the version of ptoas."""
    found = find(None)
    assert found.commit is not None
    told = {c.name: c.found for c in needs("a2a3sim", found, None)}
    root = found.folders[0].parent.parent
    return {
        "pypto": found.commit,
        "simpler": commit(root / "runtime"),
        "pto-isa": commit(Path(told["PTO-ISA"])),
        "ptoas": told["ptoas"].rpartition(" ")[2],
    }


def commit(folder: Path) -> str:
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def record(kernel: str) -> None:
    contract = source.contract(kernel, kernels_of(SHAPE))
    written = {p.name for p in contract.parameters if p.direction != "in"}
    run = simulated(kernel, kernels_of(SHAPE))
    kept: dict[str, Tensor] = {}
    first, *_ = given = cases(kernel)
    for case, tensors in enumerate(given):
        guarded = Guarded()
        for name, tensor in tensors.items():
            guarded.add(name, tensor)
            shared = all(g[name] is first[name] for g in given)
            kept[f"given.{name}" if shared else f"{case}.given.{name}"] = tensor.clone()
        run(guarded.tensors)
        assert not guarded.broken()
        assert guarded.changed() == written
        kept |= {f"{case}.found.{name}": guarded.tensors[name].clone() for name in written}
    metadata = revisions() | {
        "platform": "a2a3sim",
        "kernel": kernel,
        "shape": json.dumps(asdict(SHAPE)),
        "date": datetime.date.today().isoformat(),
    }
    RECORDED.mkdir(parents=True, exist_ok=True)
    save_file(kept, RECORDED / f"{kernel}.safetensors", metadata)


if __name__ == "__main__":
    for name in KERNELS:
        record(name)
