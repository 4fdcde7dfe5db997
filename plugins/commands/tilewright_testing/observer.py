"""The conformance suite of observers."""

import gc
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest

from tilewright import plugins
from tilewright.engine import LLMEngine
from tilewright.errors import PluginWarning, TilewrightError
from tilewright.hookspecs import ObserverEvents
from tilewright.types import (
    GenerateConfig,
    GenerateResult,
    Phase,
    RuntimeConfig,
    StepEvent,
    Timings,
    TokenLogprobs,
)
from tilewright_testing.files import open_files, still_open
from tilewright_testing.models import Model, make_model, same_bits, write_hf_directory
from tilewright_testing.state import left_alone
from tilewright_testing.suite import Implementation, PluginSuite

Make = Callable[[], object]
Call = Callable[[str, Mapping[str, Any]], None]

_EVENTS = frozenset(name for name in vars(ObserverEvents) if name.startswith("on_"))

_PROMPTS = ([3, 4, 5, 6, 7, 8, 9], [10, 11], [20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30])


class ObserverSuite(PluginSuite):
    """Checks one observer against ``ObserverHooks`` and ``ObserverEvents``.

    Fixtures to give: ``plugin``, and ``options`` where needed. Tests run in an empty working
    directory, so that files with a relative path go there.
    """

    kind: ClassVar[str] = "observer"

    @pytest.fixture(autouse=True)
    def _in_a_folder_of_its_own(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = tmp_path / "work"
        folder.mkdir()
        monkeypatch.chdir(folder)

    @pytest.fixture
    def make(self, implementation: Implementation) -> Make:
        """Makes an observer as an engine does."""
        return lambda: implementation.call("create_observer", options=implementation.options)

    @pytest.fixture
    def model(self) -> Model:
        """The model that the engines run, with three small layers."""
        return make_model("grouped")

    @pytest.fixture
    def model_directory(self, model: Model, tmp_path: Path) -> Path:
        return write_hf_directory(model, tmp_path / "model")

    # --- the observer ----------------------------------------------------------------------------

    def test_its_hooks_match_the_specs_of_the_events(self, make: Make) -> None:
        observer = make()
        try:
            hooks = plugins.check_hooks(observer, "the observer")
        except TilewrightError as error:
            pytest.fail(str(error), pytrace=False)
        assert hooks & _EVENTS, (
            f"an observer must implement at least one of {', '.join(sorted(_EVENTS))}, marked with "
            "@hookimpl"
        )

    def test_each_engine_gets_its_own_observer(
        self, implementation: Implementation, make: Make, model_directory: Path
    ) -> None:
        one, other = make(), make()
        assert one is not other, "create_observer() must return a new object for each engine"
        before = _plain_state(implementation.plugin, other)
        _generate(model_directory, one)
        after = _plain_state(implementation.plugin, other)
        changed = [name for name in after if before.get(name) != after[name]]
        assert not changed, (
            "observers must not share state, but the events of one engine changed "
            f"{', '.join(changed)}, which another engine's observer sees"
        )

    def test_creating_one_leaves_the_process_unchanged(self, make: Make) -> None:
        with left_alone("create_observer()"):
            make()

    # --- effects on the engine -------------------------------------------------------------------

    def test_results_are_the_same_with_and_without_it(
        self, make: Make, model_directory: Path
    ) -> None:
        expected = _generate(model_directory)
        found = _generate(model_directory, make())
        assert found == expected, (
            "tokens and log-probabilities must be the same with and without an observer"
        )

    def test_tensors_are_not_changed(self, make: Make) -> None:
        call = _caller(make())
        for name, tensor in _tensors().items():
            before = tensor.clone()
            arguments = {"model_id": "m", "name": name, "tensor": tensor}
            _calmly(call, f"a tensor ({name})", "on_tensor", arguments)
            assert same_bits(tensor, before), (
                "on_tensor() must not write to the tensor, which the executor still uses; it "
                f"changed a tensor ({name})"
            )

    def test_tensors_are_not_kept_after_the_event(self, make: Make) -> None:
        import numpy
        import torch

        observer = make()
        array = numpy.ones((7, 48), dtype=numpy.float32)
        memory = weakref.ref(array)
        tensor = torch.from_numpy(array)
        arguments = {"model_id": "m", "name": "norm", "tensor": tensor}
        _calmly(_caller(observer), "a tensor", "on_tensor", arguments)
        del array, tensor, arguments
        gc.collect()
        assert memory() is None, (
            "on_tensor() must copy the values that it keeps, and not keep the tensor: the executor "
            "reuses the memory"
        )

    def test_generating_with_it_leaves_the_process_unchanged(
        self, make: Make, model_directory: Path
    ) -> None:
        _generate(model_directory)  # changes made by an engine do not count
        with left_alone("an observer"):
            _generate(model_directory, make())

    # --- events ----------------------------------------------------------------------------------

    def test_it_handles_events_of_two_models_at_once(
        self, make: Make, model_directory: Path
    ) -> None:
        names = ("one", "another/model with spaces")
        with _engine(make()) as engine:
            for name in names:
                engine.init_model(name, model_directory, _RUNTIME)
            for name in names:
                engine.generate_batch(name, _PROMPTS, _SETTINGS)

    def test_it_handles_tensors_of_every_dtype_and_shape(self, make: Make) -> None:
        call = _caller(make())
        for name, tensor in _tensors().items():
            arguments = {"model_id": "m", "name": name, "tensor": tensor}
            _calmly(call, f"a tensor ({name})", "on_tensor", arguments)
        _calmly(call, "the closing of the engine", "on_close", {})

    def test_it_handles_events_with_extreme_values(self, make: Make) -> None:
        call = _caller(make())
        config = make_model().config
        for what, event, arguments in (
            ("a weight that was read", "on_load_progress", _progress("a.weight", 10, 20)),
            ("an empty checkpoint", "on_load_progress", _progress("none", 0, 0)),
            ("the start of an executor's preparation", "on_prepare", _prepare(0, 3)),
            ("the end of an executor's preparation", "on_prepare", _prepare(3, 3)),
            ("preparation of an unknown size", "on_prepare", _prepare(0, 0)),
            (
                "a model that loaded in 0 seconds",
                "on_model_loaded",
                {"model_id": "m", "model_config": config, "seconds": 0.0},
            ),
            ("a prefill step", "on_step", {"event": _step("prefill", 0, ("m-1", "m-2"), 700)}),
            ("a step that took 0 seconds", "on_step", {"event": _step("decode", 1, ("m-1",), 1)}),
            ("a result", "on_request_finished", {"result": _result("text", (3, 4))}),
            ("an empty text", "on_request_finished", {"result": _result("", (2,))}),
            ("text beyond ASCII", "on_request_finished", {"result": _result("東京 🙂\n\0", (5,))}),
        ):
            _calmly(call, what, event, arguments)
        _calmly(call, "the closing of the engine", "on_close", {})

    def test_an_engine_that_did_nothing_may_close(self, make: Make) -> None:
        _calmly(_caller(make()), "a closing with no event before it", "on_close", {})

    def test_an_engine_whose_model_did_not_load_may_close(self, make: Make) -> None:
        call = _caller(make())
        _calmly(call, "a weight that was read", "on_load_progress", _progress("a.weight", 10, 20))
        _calmly(call, "a closing while a model loads", "on_close", {})

    def test_two_engines_may_take_turns(self, make: Make, model_directory: Path) -> None:
        with _engine(make()) as one, _engine(make()) as other:
            for engine in (one, other):
                engine.init_model("m", model_directory, _RUNTIME)
            one.generate_batch("m", _PROMPTS, _SETTINGS)
            other.generate_batch("m", _PROMPTS, _SETTINGS)
            one.close()
            other.generate_batch("m", _PROMPTS, _SETTINGS)

    def test_it_leaves_no_file_open_when_the_engine_closes(
        self, make: Make, model_directory: Path
    ) -> None:
        _generate(model_directory)
        before = open_files()
        observer = make()
        _generate(model_directory, observer)
        left = still_open(before)
        assert not left, (
            f"on_close() must close the observer's files, but {', '.join(left)} stayed open"
        )


_RUNTIME = RuntimeConfig(page_size=8, total_pages=32, max_batch_size=4, max_batch_tokens=16)

_SETTINGS = GenerateConfig(max_new_tokens=5, temperature=0.8, seed=7, ignore_eos=True, logprobs=3)


@contextmanager
def _engine(*observers: object) -> Iterator[LLMEngine]:
    """An engine with observers. An observer that raises fails the test."""
    usual = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *at: Any, **more: Any) -> None:
        if issubclass(category, PluginWarning):
            pytest.fail(f"an observer must not raise: {message}", pytrace=False)
        usual(message, category, *at, **more)

    with warnings.catch_warnings():
        # The engine warns of an observer that has raised, and goes on without it.
        warnings.simplefilter("always", PluginWarning)
        warnings.showwarning = show
        try:
            with LLMEngine.from_plugins(loader="hf-local", observers=observers) as engine:
                yield engine
        except Exception as error:
            pytest.fail(
                f"an observer must not make the engine fail: {plugins.cause(error)}", pytrace=False
            )


def _generate(directory: Path, *observers: object) -> list[tuple[object, ...]]:
    """An engine's results for three prompts: token ids, text and log-probabilities of each."""
    with _engine(*observers) as engine:
        engine.init_model("m", directory, _RUNTIME)
        results = engine.generate_batch("m", _PROMPTS, _SETTINGS)
        return [(r.token_ids, r.text, r.logprobs, r.finish_reason) for r in results]


def _caller(observer: object) -> Call:
    """Calls an observer's hooks by name, as an engine does; missing hooks are skipped."""
    manager = plugins.new_manager()
    manager.register(observer)

    def call(event: str, arguments: Mapping[str, Any]) -> None:
        getattr(manager.hook, event)(**arguments)

    return call


def _calmly(call: Call, what: str, event: str, arguments: Mapping[str, Any]) -> None:
    """Fail when an observer raises at an event, for which an engine would detach it."""
    try:
        call(event, arguments)
    except Exception as error:
        pytest.fail(
            f"an observer must handle {what}, but {event}() raised {type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}",
            pytrace=False,
        )


def _tensors() -> "Mapping[str, Any]":
    """Tensors as executors tap them: dtypes, shapes and values that numpy or JSON may lack."""
    import torch

    values = torch.randn(7, 48, generator=torch.Generator().manual_seed(0))
    odd = values.clone()
    odd[0, :3] = torch.tensor([float("nan"), float("inf"), float("-inf")])
    return {
        "float32": values,
        "float16": values.half(),
        "bfloat16": values.bfloat16(),
        "int64": torch.arange(7),
        "int32": torch.arange(7, dtype=torch.int32),
        "bool": values > 0,
        "one element": torch.tensor([3.0]),
        "no elements": torch.zeros(0, 48),
        "not contiguous": values.t(),
        "three axes": values.reshape(7, 6, 8),
        "not finite": odd,
    }


def _progress(tensor: str, done: int, total: int) -> dict[str, Any]:
    return {"model_id": "m", "tensor": tensor, "bytes_read": done, "bytes_total": total}


def _prepare(done: int, total: int) -> dict[str, Any]:
    return {"model_id": "m", "what": "compiling kernels", "done": done, "total": total}


def _step(phase: Phase, step: int, request_ids: tuple[str, ...], num_tokens: int) -> StepEvent:
    decoded = {"prefill": 0, "decode": num_tokens, "mixed": num_tokens // 2}[phase]
    return StepEvent(
        model_id="m",
        step=step,
        request_ids=request_ids,
        num_prompt_tokens=num_tokens - decoded,
        num_decode_tokens=decoded,
        seconds=0.0,
    )


def _result(text: str, token_ids: tuple[int, ...]) -> GenerateResult:
    return GenerateResult(
        model_id="m",
        request_id="m-1",
        text=text,
        token_ids=token_ids,
        finish_reason="length",
        prompt_token_ids=(3, 4, 5),
        seed=2**63 - 1,
        logprobs=tuple(TokenLogprobs(token_id=i, logprob=float("-inf")) for i in token_ids),
        timings=Timings(
            load_seconds=0.0, prefill_seconds=0.0, decode_seconds=0.0, prompt_tokens=3, new_tokens=1
        ),
        device="cpu",
    )


def _plain_state(plugin: object, observer: object) -> dict[str, Any]:
    """An observer's data and the data that observers of its plugin share, keyed by name: values in
    the namespaces of the plugin, its class and their modules."""
    found: dict[str, Any] = {}
    module = sys.modules.get(type(observer).__module__)
    for owner in (plugin, module, *type(observer).__mro__[:-1]):
        if owner is None:
            continue
        where = owner.__name__ if isinstance(owner, (type, ModuleType)) else type(owner).__name__
        _add_plain(found, where, vars(owner))
    _add_plain(found, "the other observer", vars(observer) if hasattr(observer, "__dict__") else {})
    return found


def _add_plain(found: dict[str, Any], where: str, namespace: Mapping[str, Any]) -> None:
    for name, value in namespace.items():
        if not name.startswith("__") and isinstance(value, (list, dict, set, int, float, str)):
            found[f"{where}.{name}"] = _plain(value)


def _plain(value: Any) -> Any:
    """A snapshot of a value, to be compared later; objects that are not plain data by identity."""
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(_plain(item) for item in value)
    if isinstance(value, (set, frozenset)):
        return frozenset(_plain(item) for item in value)
    return value if isinstance(value, (int, float, str, bytes, type(None))) else id(value)
