"""The suite of observers finds each of these broken ones, by the test that is meant for it."""

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from conformance import Fault, full_name, missed, run
from torch import Tensor

from tilewright import hookimpl
from tilewright.types import GenerateResult, ModelConfig, PluginInfo, StepEvent
from tilewright_testing import ObserverSuite


class Observers:
    """A plugin that makes observers in some way."""

    tilewright_api = 2

    def __init__(self, make: Callable[[], object]):
        self.make = make

    @hookimpl
    def plugin_info(self) -> PluginInfo:
        return PluginInfo(summary="watches")

    @hookimpl
    def create_observer(self) -> object:
        return self.make()


class Journal:
    """Writes what it is told of when the engine closes."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    @hookimpl
    def on_load_progress(self, tensor: str, bytes_read: int, bytes_total: int) -> None:
        self.lines.append(f"{tensor}: {bytes_read} of {bytes_total}")

    @hookimpl
    def on_model_loaded(self, model_id: str, seconds: float) -> None:
        self.lines.append(f"{model_id} in {seconds:.3f} s")

    @hookimpl
    def on_step(self, event: StepEvent) -> None:
        self.lines.append(f"{event.phase} {event.num_tokens}")

    @hookimpl
    def on_tensor(self, name: str, tensor: Tensor) -> None:
        self.lines.append(f"{name} {list(tensor.shape)}")

    @hookimpl
    def on_request_finished(self, result: GenerateResult) -> None:
        self.lines.append(json.dumps(result.text))

    @hookimpl
    def on_close(self) -> None:
        Path("journal.txt").write_text("\n".join(self.lines), encoding="utf-8")


class Deaf:
    pass


class Misspelt(Journal):
    @hookimpl
    def on_steps(self, event: StepEvent) -> None: ...


class Misnames(Journal):
    @hookimpl
    def on_step(self, step: StepEvent) -> None: ...


class OneListForAll(Journal):
    all_lines: list[str] = []  # noqa: RUF012 -- the fault

    @hookimpl
    def on_step(self, event: StepEvent) -> None:
        self.all_lines.append(event.phase)


STEPS: list[int] = []


class OneListForTheModule(Journal):
    @hookimpl
    def on_step(self, event: StepEvent) -> None:
        STEPS.append(event.step)


class Clamps(Journal):
    @hookimpl
    def on_tensor(self, tensor: Tensor) -> None:
        if tensor.dtype.is_floating_point:
            tensor.nan_to_num_()
            tensor.clamp_(-0.5, 0.5)


class Keeps(Journal):
    @hookimpl
    def on_tensor(self, tensor: Tensor) -> None:
        self.kept = [*getattr(self, "kept", []), tensor]


class KeepsRows(Keeps):
    @hookimpl
    def on_tensor(self, tensor: Tensor) -> None:
        super().on_tensor(tensor[:1].detach())


class KeepsArrays(Journal):
    @hookimpl
    def on_tensor(self, tensor: Tensor) -> None:
        if tensor.dtype == torch.float32:
            self.last = tensor.detach().numpy()


class Refuses(Journal):
    """Has no room for more than so many tensors."""

    @hookimpl
    def on_tensor(self, name: str, tensor: Tensor) -> None:
        super().on_tensor(name, tensor)
        if len(self.lines) > 50:
            raise RuntimeError("the journal is full")


class KnowsOneModel(Journal):
    @hookimpl
    def on_step(self, event: StepEvent) -> None:
        assert event.model_id == self.lines[-1].split()[0]


class NamesFilesAfterModels(Journal):
    @hookimpl
    def on_model_loaded(self, model_id: str) -> None:
        Path(f"{model_id}.txt").write_text("loaded")


class ToNumpy(Journal):
    @hookimpl
    def on_tensor(self, name: str, tensor: Tensor) -> None:
        self.lines.append(f"{name} {tensor.detach().numpy().mean()}")


class TakesTheLargest(Journal):
    @hookimpl
    def on_tensor(self, name: str, tensor: Tensor) -> None:
        self.lines.append(f"{name} {tensor.max()}")


class Rounds(Journal):
    @hookimpl
    def on_tensor(self, name: str, tensor: Tensor) -> None:
        self.lines.append(f"{name} {[round(v) for v in tensor.flatten()[:3].tolist()]}")


class Flattens(Journal):
    @hookimpl
    def on_tensor(self, name: str, tensor: Tensor) -> None:
        self.lines.append(f"{name} {tensor.view(-1)[:3].tolist()}")


class DividesByTime(Journal):
    @hookimpl
    def on_step(self, event: StepEvent) -> None:
        self.lines.append(f"{event.num_tokens / event.seconds:.1f} tokens/s")


class DividesByBytes(Journal):
    @hookimpl
    def on_load_progress(self, tensor: str, bytes_read: int, bytes_total: int) -> None:
        self.lines.append(f"{bytes_read / bytes_total:.0%}")


class WritesAscii(Journal):
    @hookimpl
    def on_request_finished(self, result: GenerateResult) -> None:
        self.lines.append(result.text.encode("ascii").decode())


class SumsUp(Journal):
    @hookimpl
    def on_close(self) -> None:
        steps = [line for line in self.lines if line.startswith(("prefill", "decode"))]
        Path("journal.txt").write_text(f"mean {len(self.lines) / len(steps):.2f} lines a step")


class ExpectsAModel(Journal):
    """After the first weight it wants to know whose it was."""

    model: ModelConfig

    @hookimpl
    def on_model_loaded(self, model_config: ModelConfig) -> None:
        self.model = model_config

    @hookimpl
    def on_close(self) -> None:
        if self.lines:
            Path("journal.txt").write_text(self.model.architecture)


class NeverCloses(Journal):
    def __init__(self) -> None:
        super().__init__()
        self.file = open("journal.txt", "w")  # noqa: SIM115 -- the fault

    @hookimpl
    def on_close(self) -> None:
        KEPT.append(self.file)


KEPT: list[IO[str]] = []


class OneFile(Journal):
    """A file that all share, and that the first to close closes."""

    file: Any = None

    @hookimpl
    def on_step(self, event: StepEvent) -> None:
        if OneFile.file is None:
            OneFile.file = open("journal.txt", "w")  # noqa: SIM115 -- the fault
        OneFile.file.write(event.phase)

    @hookimpl
    def on_close(self) -> None:
        if OneFile.file is not None:
            OneFile.file.close()


class Threads(Journal):
    @hookimpl
    def on_step(self, event: StepEvent) -> None:
        torch.set_num_threads(torch.get_num_threads() + 1)


class Samples(Journal):
    """Looks at a few elements, chosen at random."""

    @hookimpl
    def on_tensor(self, name: str, tensor: Tensor) -> None:
        at = torch.randint(max(1, tensor.numel()), (3,))
        self.lines.append(f"{name} {at.tolist()}")


class Works(Journal):
    """In a thread that outlives it."""

    def __init__(self) -> None:
        super().__init__()
        worker = threading.Thread(target=DONE.wait, args=[20])
        worker.start()
        WORKERS.append(worker)


DONE = threading.Event()
WORKERS: list[threading.Thread] = []


class CatchesSignals(Journal):
    def __init__(self) -> None:
        super().__init__()
        signal.signal(signal.SIGUSR2, lambda *_: self.on_close())


class SetsTheEnvironment(Journal):
    def __init__(self) -> None:
        super().__init__()
        os.environ["JOURNAL"] = "journal.txt"


class RaisesWhileLoading(Journal):
    @hookimpl
    def on_load_progress(self, bytes_read: int, bytes_total: int) -> None:
        if bytes_read == bytes_total:
            raise RuntimeError("a mistake")


class RaisesWhenLoaded(Journal):
    @hookimpl
    def on_model_loaded(self) -> None:
        raise RuntimeError("a mistake")


class RaisesWhilePreparing(Journal):
    @hookimpl
    def on_prepare(self) -> None:
        raise RuntimeError("a mistake")


class RaisesAtSteps(Journal):
    @hookimpl
    def on_step(self) -> None:
        raise RuntimeError("a mistake")


class RaisesAtTensors(Journal):
    @hookimpl
    def on_tensor(self) -> None:
        raise RuntimeError("a mistake")


class RaisesAtResults(Journal):
    @hookimpl
    def on_request_finished(self) -> None:
        raise RuntimeError("a mistake")


class RaisesAtTheEnd(Journal):
    @hookimpl
    def on_close(self) -> None:
        raise RuntimeError("a mistake")


THE_ONE = Journal()

# name, plugin or the class of its observers, test that fails, words of the failure
_FAULTS: list[tuple[str, Any, str, str]] = [
    (
        "listens to nothing",
        Deaf,
        "its_hooks_match_the_specs_of_the_events",
        "must implement at least one of",
    ),
    (
        "misspells an event",
        Misspelt,
        "its_hooks_match_the_specs_of_the_events",
        "did you mean 'on_step'",
    ),
    ("misnames an argument", Misnames, "its_hooks_match_the_specs_of_the_events", "'step'"),
    (
        "is one for all",
        Observers(lambda: THE_ONE),
        "each_engine_gets_its_own_observer",
        "a new object for each engine",
    ),
    (
        "has one list for all",
        OneListForAll,
        "each_engine_gets_its_own_observer",
        r"OneListForAll\.all_lines",
    ),
    ("has one list a module", OneListForTheModule, "each_engine_gets_its_own_observer", r"STEPS"),
    ("clamps tensors", Clamps, "tensors_are_not_changed", "must not write"),
    (
        "changes what is generated",
        Clamps,
        "results_are_the_same_with_and_without_it",
        "must be the same",
    ),
    ("keeps tensors", Keeps, "tensors_are_not_kept_after_the_event", "must copy"),
    ("keeps views of tensors", KeepsRows, "tensors_are_not_kept_after_the_event", "must copy"),
    ("keeps arrays of tensors", KeepsArrays, "tensors_are_not_kept_after_the_event", "must copy"),
    (
        "raises when it is full",
        Refuses,
        "results_are_the_same_with_and_without_it",
        "the journal is full",
    ),
    *(
        (
            f"raises in {event}",
            plugin,
            "results_are_the_same_with_and_without_it",
            rf"must not raise: observer \w+ failed in {event}: RuntimeError: a mistake \(",
        )
        for event, plugin in (
            ("on_load_progress", RaisesWhileLoading),
            ("on_model_loaded", RaisesWhenLoaded),
            ("on_step", RaisesAtSteps),
            ("on_tensor", RaisesAtTensors),
            ("on_request_finished", RaisesAtResults),
            ("on_close", RaisesAtTheEnd),
        )
    ),
    (
        "raises in on_prepare",
        RaisesWhilePreparing,
        "it_handles_events_with_extreme_values",
        r"on_prepare\(\) raised RuntimeError: a mistake",
    ),
    (
        "raises at tensors that are not kept",
        RaisesAtTensors,
        "tensors_are_not_kept_after_the_event",
        r"on_tensor\(\) raised RuntimeError",
    ),
    ("knows one model", KnowsOneModel, "it_handles_events_of_two_models_at_once", "AssertionError"),
    (
        "names files after models",
        NamesFilesAfterModels,
        "it_handles_events_of_two_models_at_once",
        "FileNotFoundError",
    ),
    ("cannot take bfloat16", ToNumpy, "it_handles_tensors_of_every_dtype_and_shape", "bfloat16"),
    (
        "cannot take what is empty",
        TakesTheLargest,
        "it_handles_tensors_of_every_dtype_and_shape",
        "no elements",
    ),
    ("cannot take infinity", Rounds, "it_handles_tensors_of_every_dtype_and_shape", "not finite"),
    (
        "wants contiguous memory",
        Flattens,
        "it_handles_tensors_of_every_dtype_and_shape",
        "not contiguous",
    ),
    (
        "divides by time",
        DividesByTime,
        "it_handles_events_with_extreme_values",
        "ZeroDivisionError",
    ),
    (
        "divides by bytes",
        DividesByBytes,
        "it_handles_events_with_extreme_values",
        "empty checkpoint",
    ),
    ("writes ASCII", WritesAscii, "it_handles_events_with_extreme_values", "text beyond ASCII"),
    ("sums up nothing", SumsUp, "an_engine_that_did_nothing", "ZeroDivisionError"),
    ("expects a model", ExpectsAModel, "an_engine_whose_model_did_not", "AttributeError"),
    ("never closes its file", NeverCloses, "it_leaves_no_file_open", "journal.txt stayed open"),
    ("has one file for all", OneFile, "two_engines_may_take_turns", "closed file"),
    ("sets torch's threads", Threads, "generating_with_it_leaves_the_process", "number of threads"),
    ("draws from torch", Samples, "generating_with_it_leaves_the_process", "torch's random state"),
    ("works on in a thread", Works, "creating_one_leaves_the_process_unchanged", "running threads"),
    (
        "catches signals",
        CatchesSignals,
        "creating_one_leaves_the_process_unchanged",
        "signal handlers",
    ),
    (
        "sets the environment",
        SetsTheEnvironment,
        "creating_one_leaves_the_process_unchanged",
        "variables JOURNAL",
    ),
]

FAULTS = [
    Fault(
        name,
        Observers(plugin) if isinstance(plugin, type) else plugin,
        full_name(ObserverSuite, test),
        why=why,
    )
    for name, plugin, test, why in _FAULTS
]
SUITE = ObserverSuite


@pytest.fixture(autouse=True)
def _threads_end_and_files_close() -> Iterator[None]:
    yield
    DONE.set()
    while WORKERS:
        WORKERS.pop().join()
    DONE.clear()
    while KEPT:
        KEPT.pop().close()


def test_each_broken_observer_is_found() -> None:
    assert missed(SUITE, FAULTS) == []


def test_a_right_observer_passes() -> None:
    found = run(SUITE, Observers(Journal)).found
    # It is of no module that a fresh process could import.
    assert [name for name, outcome in found.items() if outcome != "passed"] == [
        "test_importing_it_leaves_the_process_unchanged"
    ]


IMPORTING: dict[str, tuple[str, str]] = {
    "draws": ("import torch\ntorch.manual_seed(0)", "torch's random state"),
    "sets the default dtype": (
        "import torch\ntorch.set_default_dtype(torch.bfloat16)",
        "torch's default dtype",
    ),
    "sets the environment": ("import os\nos.environ['ACME'] = '1'", "variables ACME"),
    "configures logging": ("import logging\nlogging.basicConfig(level=10)", "root logger"),
    "cannot be imported": ("import no_such_module", "No module named 'no_such_module'"),
}

MODULE = """
from tilewright import hookimpl
from tilewright.types import PluginInfo
tilewright_api = 2
@hookimpl
def plugin_info():
    return PluginInfo(summary="nothing")
@hookimpl
def create_observer():
    return object()
"""


def test_modules_whose_import_does_something_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    test = full_name(SUITE, "importing_it_leaves_the_process_unchanged")
    faults = []
    for i, (what, (code, said)) in enumerate(IMPORTING.items()):
        path = tmp_path / f"acme_watcher_{i}.py"
        path.write_text(MODULE)
        faults.append(Fault(what, import_module(path.stem), test, why=said))
        path.write_text(MODULE + code)
    assert missed(SUITE, faults) == []
