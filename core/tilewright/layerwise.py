"""How an executor that runs layer by layer runs a step: embed, each layer in turn, head."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

from tilewright.errors import ExecutorError
from tilewright.types import KvCacheSpec, StepBatch, Tap

if TYPE_CHECKING:
    from torch import Tensor


def of_layer(tap: Tap, layer: int) -> Tap:
    """A tap for the tensors of a layer, by the name that they have in it."""
    return lambda stage, tensor: tap(f"layers.{layer}.{stage}", tensor)


ModelT = TypeVar("ModelT")
StepT = TypeVar("StepT")


class LayerwiseBase(ABC, Generic[ModelT, StepT]):
    """``forward`` of a ``LayerwiseExecutor``, made of its embed, layers and head.

    ModelT: the loaded weights, which ``close`` lets go of.
    StepT: what all layers of a step share, which ``begin`` prepares.
    """

    plugin: ClassVar[str]
    """Name of the executor's plugin, for errors."""

    def __init__(self, model: ModelT, kv_cache_spec: KvCacheSpec, layers: range, num_layers: int):
        """layers: those of the model's num_layers that this executor runs."""
        self.kv_cache_spec = kv_cache_spec
        self.layers = layers
        self._num_layers = num_layers
        self._model: ModelT | None = model

    @abstractmethod
    def begin(self, batch: StepBatch) -> StepT: ...

    @abstractmethod
    def embed(self, step: StepT, tap: "Tap | None" = None) -> "Tensor": ...

    @abstractmethod
    def run_layer(
        self, step: StepT, layer: int, hidden: "Tensor", tap: "Tap | None" = None
    ) -> "Tensor": ...

    def run_layers(self, step: StepT, hidden: "Tensor", tap: "Tap | None" = None) -> "Tensor":
        """All layers in turn; for an executor that can run them together, with the same result."""
        for layer in self.layers:
            hidden = self.run_layer(step, layer, hidden, tap)
        return hidden

    @abstractmethod
    def run_head(self, step: StepT, hidden: "Tensor", tap: "Tap | None" = None) -> "Tensor": ...

    def forward(self, batch: StepBatch, tap: "Tap | None" = None) -> "Tensor":
        """Raises ExecutorError for an executor that has only a part of the model."""
        if self.layers != range(self._num_layers):
            raise ExecutorError(
                f"executor {self.plugin} has layers {self.layers.start} to {self.layers.stop - 1} "
                f"of {self._num_layers}: run it layer by layer, between the other parts"
            )
        step = self.begin(batch)
        hidden = self.run_layers(step, self.embed(step, tap), tap)
        if len(batch.logits_rows) < len(hidden):  # otherwise all rows, in order
            hidden = hidden[batch.logits_rows]
        return self.run_head(step, hidden, tap)

    def close(self) -> None:
        self._model = None

    def _opened(self) -> ModelT:
        """Raises ExecutorError for a closed executor."""
        if self._model is None:
            raise ExecutorError(f"executor {self.plugin} is closed: load the model again")
        return self._model
