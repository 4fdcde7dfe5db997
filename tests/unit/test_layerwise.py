"""Steps of executors that run layer by layer."""

import pytest
import torch
from attrs import evolve
from torch import Tensor

from tilewright.errors import ExecutorError
from tilewright.layerwise import LayerwiseBase
from tilewright.types import KvCacheSpec, StepBatch, Tap

SPEC = KvCacheSpec(num_layers=2, num_kv_heads=1, head_dim=2, page_size=4, dtype="float32")
BATCH = StepBatch(
    token_ids=torch.tensor([5, 6, 7]),
    positions=torch.arange(3, dtype=torch.int32),
    slot_mapping=torch.arange(3, dtype=torch.int32),
    block_table=torch.zeros(1, 1, dtype=torch.int32),
    context_lens=torch.tensor([3], dtype=torch.int32),
    query_starts=torch.tensor([0, 3], dtype=torch.int32),
    logits_rows=torch.tensor([0, 2]),
)


class Recording(LayerwiseBase[str, str]):
    """Adds 10 in each layer, and records its calls."""

    plugin = "recording"

    def __init__(self) -> None:
        super().__init__("weights", SPEC)
        self.calls: list[str] = []
        self.num_begun = 0

    def _begin(self, batch: StepBatch) -> str:
        if len(batch.token_ids) > 3:
            raise ExecutorError("at most 3 tokens")
        self.num_begun += 1
        return f"step {self.num_begun}"

    def _called(self, what: str, tap: "Tap | None", x: Tensor) -> Tensor:
        self.calls.append(f"{what} of {self._opened()}")
        if tap:
            tap(what, x)
        return x

    def embed(self, batch: StepBatch, tap: "Tap | None" = None) -> Tensor:
        return self._called("embed", tap, batch.token_ids)

    def run_layer(
        self, layer: int, hidden: Tensor, batch: StepBatch, tap: "Tap | None" = None
    ) -> Tensor:
        return self._called(f"{self._step(batch)}, layer {layer}", tap, hidden + 10)

    def run_head(self, hidden: Tensor, tap: "Tap | None" = None) -> Tensor:
        return self._called("head", tap, hidden)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_step_runs_the_embedding_each_layer_and_the_head_on_the_requested_rows(phase):
    executor, tapped = Recording(), []
    logits = getattr(executor, phase)(BATCH, lambda name, x: tapped.append(name))
    assert logits.tolist() == [25, 27]
    assert tapped == ["embed", "step 1, layer 0", "step 1, layer 1", "head"]
    assert executor.calls == [f"{name} of weights" for name in tapped]


def test_a_step_begins_once_even_when_its_layers_are_run_one_by_one():
    executor = Recording()
    executor.prefill(BATCH)
    executor.run_layer(0, BATCH.token_ids, BATCH)
    assert executor.num_begun == 1
    equal = evolve(BATCH)
    for layer in (0, 1):
        executor.run_layer(layer, equal.token_ids, equal)
    assert executor.num_begun == 2
    executor.prefill(BATCH)
    assert executor.num_begun == 3


def test_a_step_that_fails_to_begin_keeps_the_previous_step():
    executor = Recording()
    executor.prefill(BATCH)
    with pytest.raises(ExecutorError, match="at most 3 tokens"):
        executor.prefill(evolve(BATCH, token_ids=torch.arange(4)))
    executor.run_layer(1, BATCH.token_ids, BATCH)
    assert executor.num_begun == 1


def test_a_closed_executor_refuses_a_step():
    executor = Recording()
    executor.close()
    executor.close()
    with pytest.raises(
        ExecutorError, match=r"^executor recording is closed: load the model again$"
    ):
        executor.decode(BATCH)
