"""How an executor that runs layer by layer runs a step: embed, each layer in turn, head."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

from tilewright.errors import ExecutorError
from tilewright.types import KvCacheSpec, StepBatch, Tap

if TYPE_CHECKING:
    from torch import Tensor

ModelT = TypeVar("ModelT")
StepT = TypeVar("StepT")


class LayerwiseBase(ABC, Generic[ModelT, StepT]):
    """``prefill`` and ``decode`` of a ``LayerwiseExecutor``, made of its embed, layers and head.

    ModelT: the loaded weights, which ``close`` lets go of.
    StepT: what all layers of a step share, which ``_begin`` prepares.
    """

    plugin: ClassVar[str]
    """Name of the executor's plugin, for errors."""

    def __init__(self, model: ModelT, kv_cache_spec: KvCacheSpec):
        self.kv_cache_spec = kv_cache_spec
        self._model: ModelT | None = model
        self._begun: tuple[StepBatch, StepT] | None = None

    @abstractmethod
    def _begin(self, batch: StepBatch) -> StepT:
        """Prepare a step. Called once for all of its layers."""

    @abstractmethod
    def embed(self, batch: StepBatch, tap: "Tap | None" = None) -> "Tensor": ...

    @abstractmethod
    def run_layer(
        self, layer: int, hidden: "Tensor", batch: StepBatch, tap: "Tap | None" = None
    ) -> "Tensor": ...

    @abstractmethod
    def run_head(self, hidden: "Tensor", tap: "Tap | None" = None) -> "Tensor": ...

    def prefill(self, batch: StepBatch, tap: "Tap | None" = None) -> "Tensor":
        return self._run(batch, tap)

    def decode(self, batch: StepBatch, tap: "Tap | None" = None) -> "Tensor":
        return self._run(batch, tap)

    def close(self) -> None:
        self._model = None
        self._begun = None

    def _run(self, batch: StepBatch, tap: "Tap | None") -> "Tensor":
        hidden = self.embed(batch, tap)
        for layer in range(self.kv_cache_spec.num_layers):
            hidden = self.run_layer(layer, hidden, batch, tap)
        return self.run_head(hidden[batch.logits_rows], tap)

    def _opened(self) -> ModelT:
        """Raises ExecutorError for a closed executor."""
        if self._model is None:
            raise ExecutorError(f"executor {self.plugin} is closed: load the model again")
        return self._model

    def _step(self, batch: StepBatch) -> StepT:
        """The step of a batch, begun when its first layer runs.

        ``run_layer`` takes the batch and not the step, so the last step is kept for the layers that
        follow, with its batch: only the same object continues it.
        """
        if self._begun is None or self._begun[0] is not batch:
            self._begun = batch, self._begin(batch)
        return self._begun[1]
