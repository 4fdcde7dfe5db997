"""Steps of executors that run layer by layer."""

import pytest
import torch
from attrs import evolve
from torch import Tensor

from tilewright.errors import ExecutorError
from tilewright.layerwise import LayerwiseBase
from tilewright.types import KvCacheSpec, StepBatch, Tap
from tilewright_testing.paged import Sequences

SPEC = KvCacheSpec(num_layers=2, num_kv_heads=1, head_dim=2, page_size=4, dtype="float32")
WHOLE = Sequences(page_size=4, total_pages=1).batch({"a": [5, 6, 7]})
BATCH = evolve(WHOLE, logits_rows=torch.tensor([0, 2]))


class Recording(LayerwiseBase[str, Tensor]):
    """Adds 10 in each layer, and records its calls."""

    plugin = "recording"

    def __init__(self, layers: range = range(2)) -> None:
        super().__init__("weights", SPEC, layers, num_layers=2)
        self.calls: list[str] = []

    def begin(self, batch: StepBatch) -> Tensor:
        self.calls.append(f"begin of {self._opened()}")
        return batch.token_ids

    def _called(self, what: str, tap: "Tap | None", x: Tensor) -> Tensor:
        self.calls.append(f"{what} of {self._opened()}")
        if tap:
            tap(what, x)
        return x

    def embed(self, step: Tensor, tap: "Tap | None" = None) -> Tensor:
        return self._called("embed", tap, step)

    def run_layer(
        self, step: Tensor, layer: int, hidden: Tensor, tap: "Tap | None" = None
    ) -> Tensor:
        assert step is BATCH.token_ids
        return self._called(f"layer {layer}", tap, hidden + 10)

    def run_head(self, step: Tensor, hidden: Tensor, tap: "Tap | None" = None) -> Tensor:
        return self._called("head", tap, hidden)


def test_a_step_begins_once_and_runs_the_embedding_each_layer_and_the_head_on_the_wanted_rows():
    executor, tapped = Recording(), []
    logits = executor.forward(BATCH, lambda name, x: tapped.append(name))
    assert logits.tolist() == [25, 27]
    assert tapped == ["embed", "layer 0", "layer 1", "head"]
    assert executor.calls == [f"{name} of weights" for name in ("begin", *tapped)]


def test_a_part_of_a_model_cannot_run_a_whole_step():
    for layers, shown in ((range(1), "0 to 0 of 2"), (range(1, 2), "1 to 1 of 2")):
        with pytest.raises(ExecutorError, match=f"executor recording has layers {shown}: run it"):
            Recording(layers).forward(BATCH)


def test_a_closed_executor_refuses_a_step():
    executor = Recording()
    executor.close()
    executor.close()
    with pytest.raises(
        ExecutorError, match=r"^executor recording is closed: load the model again$"
    ):
        executor.forward(BATCH)
