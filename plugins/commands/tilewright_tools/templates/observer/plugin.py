"""Counts the steps, tokens and seconds of each model, and writes them to a JSON file at the end."""

import json
import os
from pathlib import Path

from attrs import asdict, define, field, frozen, validators

from tilewright import hookimpl
from tilewright.types import Phase, PluginInfo, StepEvent

tilewright_api = 2


@frozen
class Options:
    path: str = field(
        default="my-plugin.json",
        validator=validators.min_len(1),
        metadata={"help": "file to write when the engine closes, replacing any existing one"},
    )


@hookimpl
def plugin_info() -> PluginInfo:
    return PluginInfo(summary="steps, tokens and seconds by model and phase", options=Options)


@hookimpl
def create_observer(options: Options) -> "Counter":
    return Counter(Path(options.path))


@define
class Total:
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0


class Counter:
    """Listens to the events that it needs; events without a listener are not created."""

    def __init__(self, path: Path):
        self.path = path
        self.totals: dict[str, dict[Phase, Total]] = {}

    @hookimpl
    def on_step(self, event: StepEvent) -> None:
        total = self.totals.setdefault(event.model_id, {}).setdefault(event.phase, Total())
        total.steps += 1
        total.tokens += event.num_tokens
        total.seconds += event.seconds

    @hookimpl
    def on_close(self) -> None:
        counted = {
            model: {phase: asdict(total) for phase, total in phases.items()}
            for model, phases in self.totals.items()
        }
        # Written to a temporary file and renamed, so that nobody ever sees half a file.
        beside = self.path.with_name(f"{self.path.name}.{os.getpid()}.partial")
        try:
            beside.write_text(json.dumps(counted, indent=2) + "\n", encoding="utf-8")
            beside.replace(self.path)
        finally:
            beside.unlink(missing_ok=True)
