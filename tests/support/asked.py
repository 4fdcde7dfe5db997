"""What an engine asks of an executor's plugin."""

from typing import Any

from attrs import asdict, field, frozen

from tilewright import plugins
from tilewright.types import ModelConfig, Report, RuntimeConfig, TensorSource
from tilewright_testing.suite import no_report


@frozen(kw_only=True)
class Asked:
    """Arguments of the hook create_executor."""

    model_config: ModelConfig
    runtime_config: RuntimeConfig
    weights: TensorSource
    layers: range = field()
    packed: bool = False
    options: Any = None
    report: Report = no_report

    @layers.default
    def _all_layers(self) -> range:
        return range(self.model_config.num_layers)

    def of(self, module: Any) -> Any:
        """The executor that a plugin makes."""
        return plugins.call(module, "create_executor", **asdict(self, recurse=False))
