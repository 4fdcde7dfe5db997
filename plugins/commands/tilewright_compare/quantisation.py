"""What quantised weights cost: the distance of a model with them from the model without.

A candidate with quantised weights computes right if it computes what its own weights say; that is
judged, with these weights on the reference's side. How far they take the model is not a mistake: it
is measured here, both in float32, and is not judged.
"""

import math
from collections.abc import Collection, Mapping

from attrs import define, field
from torch import Tensor

from tilewright.errors import ExecutorError
from tilewright.types import ModelConfig, TensorInfo
from tilewright.weights import expected_tensors
from tilewright_compare.judge import LogitsAgreement, logits_agreement
from tilewright_compare.metrics import difference
from tilewright_compare.sides import Side, Tensors


class ExecutorWeights:
    """A ``TensorSource`` of an executor's own weights, in float32 and with the checkpoint's names.

    Raises ExecutorError for an executor that cannot return them.
    """

    def __init__(self, side: Side):
        if not hasattr(side.executor, "weight"):
            raise ExecutorError(
                f"the {side.name} has weights in {side.weight_dtype}, and is judged with its own: "
                "expected a LayerwiseExecutor, whose weight(name) shows them; compare it in one of "
                "the dtypes that torch computes in"
            )
        self._side = side
        self._shapes = expected_tensors(config_of(side))

    def names(self) -> Collection[str]:
        return self._shapes.keys()

    def info(self, name: str) -> TensorInfo:
        shape = self._shapes[name]
        return TensorInfo(
            shape=shape,
            dtype="float32",
            nbytes=4 * math.prod(shape),
            location=f"the {self._side.name}'s weights",
        )

    def get(self, name: str) -> Tensor:
        weight: Tensor = self._side.executor.weight(name)
        return weight.float().cpu()

    def close(self) -> None:
        """The executor keeps its weights."""


def config_of(side: Side) -> ModelConfig:
    return side.model.loaded.config


@define(kw_only=True)
class Quantisation:
    """Distance of the truth, which has the candidate's weights, from the unquantised model; both in
    float32, and each on its own outputs."""

    layers: dict[int, float] = field(factory=dict)
    """Relative RMS of each layer's output, over all steps."""
    logits: list[LogitsAgreement] = field(factory=list)
    """The truth (as ``candidate``) against the unquantised model (as ``truth``)."""
    perplexity: float | None = None
    """The unquantised model's, of the prompts; None where the prompts were not scored."""
    _squares: dict[int, tuple[float, int]] = field(factory=dict)

    def add_layer(self, layer: int, quantised: Tensors, plain: Tensors) -> None:
        name = f"layers.{layer}.output"
        if name not in plain or not len(plain[name]):
            return
        error, rows = difference(quantised[name], plain[name]).relative_rms, len(plain[name])
        squares, before = self._squares.get(layer, (0.0, 0))
        squares, rows = squares + rows * error**2, before + rows
        self._squares[layer] = squares, rows
        self.layers[layer] = math.sqrt(squares / rows)

    def add_logits(self, step: int, ids: list[int], quantised: Tensor, plain: Tensor) -> None:
        self.logits += logits_agreement(step, ids, quantised, plain, plain)

    @property
    def kl(self) -> float:
        """Mean Kullback-Leibler divergence from the unquantised model, in nats."""
        return sum(row.kl for row in self.logits) / len(self.logits) if self.logits else 0.0

    def record(self) -> Mapping[str, object]:
        return {
            "layers": [{"layer": n, "relative_rms": error} for n, error in self.layers.items()],
            "rows": len(self.logits),
            "same_argmax": sum(row.same_argmax for row in self.logits),
            "kl": self.kl,
            "perplexity": self.perplexity,
        }
