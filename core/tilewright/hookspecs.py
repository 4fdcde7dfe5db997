"""What a plugin may implement: one class of hook specs per kind.

A plugin is a module or an object named by an entry point. It defines ``tilewright_api``, the
API version that it was written for, and functions marked with ``hookimpl``::

    from tilewright import hookimpl

    tilewright_api = 2

    @hookimpl
    def create_sampler(options):
        return MySampler(options)

An implementation may take fewer arguments than its spec names, but no others. Hooks create objects;
these follow the protocols in ``tilewright.types`` and are called directly.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

from tilewright.types import (
    Check,
    Executor,
    GenerateResult,
    Hypothesis,
    KernelSet,
    KvAllocator,
    LoadedModel,
    LogitsProcessor,
    ModelConfig,
    PackedWeights,
    PluginInfo,
    Report,
    RuntimeConfig,
    Sample,
    Sampler,
    ServedModels,
    StepEvent,
    TensorSource,
    TextAssets,
    Tiles,
    WeightFormats,
)

if TYPE_CHECKING:
    from torch import Tensor

hookimpl = pluggy.HookimplMarker("tilewright")
"""Marks a plugin's function as the implementation of the hook of the same name."""

_every = pluggy.HookspecMarker("tilewright")
_first = _every(firstresult=True)


class AnyPlugin:
    """Hooks for plugins of every kind; all optional."""

    @_first
    def plugin_info(self) -> PluginInfo:  # type: ignore[empty-body]
        """A summary, the options class, and the limits in words."""

    @_first
    def doctor_checks(self) -> Sequence[Check]:  # type: ignore[empty-body]
        """Findings about this machine that matter to the plugin. Loads no model; raises nothing."""


class LoaderHooks:
    """Kind ``loader``: turns a source, as the user names it, into a model described by data."""

    @_first
    def can_load(self, source: str) -> bool:  # type: ignore[empty-body]
        """Whether this loader recognises the source.

        Must be cheap, since every installed loader may be asked: it reads no weights, imports no
        torch, has no side effect, and raises nothing whatever the source.
        """

    @_first
    def load_model(  # type: ignore[empty-body]
        self,
        source: str,
        options: Any,
        weight_format: str | None,
        formats: WeightFormats,
        report: Report,
    ) -> LoadedModel:
        """Read headers and configuration. Raises ModelError for what is missing or unsupported.

        source: as the user wrote it: a directory, a file, a hub id.
        options: an instance of the plugin's options class; None if it has none. So in all hooks.
        weight_format: the format that the user named, to be passed to ``formats.open``.
        report: notifies observers of what is being prepared (on_prepare), such as a download.
        """

    @_first
    def write_sample(self, directory: Path) -> Sample:  # type: ignore[empty-body]
        """Optional: write a small model that this loader can load into an empty directory.

        Returns its source and its tensors. Their values must differ so that mistakes show: random
        ones, such as those of ``tilewright_testing.models.make_model``, with a square matrix among
        them. ``tilewright plugins verify`` loads the model; nothing else does.
        """


class WeightFormatHooks:
    """Kind ``weight_format``: opens files of one format as named tensors."""

    @_first
    def can_open(self, directory: Path) -> bool:  # type: ignore[empty-body]
        """Whether the directory holds weights in this format. Looks at file names only."""

    @_first
    def open_weights(self, directory: Path, options: Any) -> TensorSource:  # type: ignore[empty-body]
        """Open the weights, reading headers only. Raises ModelError for damaged or absent files.

        The source may have an attribute ``warnings``, a tuple of lines, which the user sees.
        """

    @_first
    def write_weights(self, directory: Path, tensors: "Mapping[str, Tensor]") -> float:  # type: ignore[empty-body]
        """Optional: write tensors in this format into an empty directory.

        Returns the largest error of a value that is read back, as a fraction of the largest
        magnitude in its tensor: 0.0 for a format that keeps every bit.

        Raises TypeError for a dtype and ValueError for a shape that the format does not support.
        ``tilewright plugins verify`` opens what it writes; nothing else does.
        """


class ExecutorHooks:
    """Kind ``executor``: runs the forward pass."""

    @_first
    def create_executor(  # type: ignore[empty-body]
        self,
        model_config: ModelConfig,
        runtime_config: RuntimeConfig,
        weights: TensorSource,
        packed: bool,
        layers: range,
        options: Any,
        report: Report,
    ) -> Executor:
        """Validate the model against what the executor can do, then load its weights.

        runtime_config: its dtypes and max_seq_len are filled in; where device and page_size are
            None, the executor chooses.
        weights: checked: every expected tensor is there, with its expected shape.
        packed: whether the weights are those of the executor's own ``pack_weights``.
        layers: the layers to run: all of the model's, or a part of them for an executor that can
            run layer by layer. A part reads only the weights of ``expected_tensors(model_config,
            layers)``, and its KV cache has only these layers.
        """

    @_first
    def hypotheses(self) -> "Sequence[Hypothesis]":  # type: ignore[empty-body]
        """Optional: further hypotheses for a comparison to try when a layer of this executor is
        wrong (see tilewright_compare.hypotheses)."""

    @_first
    def tiles(  # type: ignore[empty-body]
        self, model_config: ModelConfig, runtime_config: RuntimeConfig, options: Any
    ) -> Tiles:
        """Optional: the sizes at which the executor's code takes another path.

        ``tilewright compare`` asks before it creates the executor. It chooses its prompts by them,
        and reports the paths that a comparison did not reach. Without the hook it knows of pages
        and steps only.

        runtime_config: as the user gave it; its dtypes may be None. Raises ExecutorError for a
        model that the executor cannot run.
        """

    @_first
    def pack_weights(  # type: ignore[empty-body]
        self,
        model_config: ModelConfig,
        runtime_config: RuntimeConfig,
        weights: TensorSource,
        options: Any,
    ) -> PackedWeights:
        """Optional: the weights in the executor's own layout, for ``tilewright convert``.

        Names, shapes, dtypes and version depend only on configuration and settings, and weights are
        read only by the tensors' ``read``: the hook is also called to check packed weights when
        they are loaded. create_executor then finds them under these names, with
        ``packed`` set. Without the hook, and where it returns None, weights are only converted to
        the weight dtype.
        """


class KernelsHooks:
    """Kind ``kernels``: device kernels, as source, for an executor that binds them by name.

    Executor ``pypto-npu`` takes such a set by its option ``kernels``; docs/writing-kernels.md says
    which kernels and parameters it binds.
    """

    @_first
    def served_models(self) -> ServedModels:  # type: ignore[empty-body]
        """The models that the set serves, in the terms of ModelConfig."""

    @_first
    def kernel_set(  # type: ignore[empty-body]
        self, model_config: ModelConfig, runtime_config: RuntimeConfig
    ) -> KernelSet:
        """The kernels for a model and for how this machine runs it. Reads no weights.

        model_config: one of the models served.
        runtime_config: its dtypes and max_seq_len are filled in; page_size None: the set chooses.

        Raises ValueError for sizes that the kernels do not support, naming the constraint and the
        sizes found.
        """


class KvAllocatorHooks:
    """Kind ``kv_allocator``: decides which request holds which pages of the KV cache."""

    @_first
    def create_kv_allocator(  # type: ignore[empty-body]
        self, num_pages: int, page_size: int, options: Any
    ) -> KvAllocator:
        """Make an allocator of num_pages pages, all free, of page_size tokens each."""


class SamplerHooks:
    """Kind ``sampler``: chooses tokens."""

    @_first
    def create_sampler(self, model_config: ModelConfig, options: Any) -> Sampler:  # type: ignore[empty-body]
        """Make a sampler for a loaded model. The model is ready; if this fails, it is closed."""


class LogitsProcessorHooks:
    """Kind ``logits_processor``: changes the logits of the requests that name it."""

    @_first
    def create_logits_processor(  # type: ignore[empty-body]
        self, model_config: ModelConfig, text: TextAssets, options: Any
    ) -> LogitsProcessor:
        """Make a processor for one model, when a request first names it."""

    @_first
    def sample_argument(self) -> Any:
        """Optional: an argument that the processor takes, and with which it changes logits.

        ``tilewright plugins verify`` begins requests with it; nothing else does.
        """


class ObserverHooks:
    """Kind ``observer``: is notified of events and cannot change them; any number of observers."""

    @_first
    def create_observer(self, options: Any) -> object:
        """Make an object that implements any of the hooks of ObserverEvents; one per engine."""


class ObserverEvents:
    """Events for observers. All observers are called, those named last first.

    The thread that calls ``init_model`` makes the events of loading: ``on_load_progress``,
    ``on_prepare`` and ``on_model_loaded``. ``on_close`` comes in the thread that closes the engine,
    after the last event of each model, unless an observer closes it. Each model has a thread of its
    own that makes all its other events, one after another. So an observer of an engine with several
    models is called by several threads, perhaps at once, and must guard what it shares between
    models; a first request may be submitted before ``on_model_loaded`` is called.

    An observer may call the engine in an event. Its model runs no step for other callers until the
    event is over. Where the observers of two models wait for each other's model, one of them gets a
    RequestError.

    An event without a listener costs nothing: it is not created. An observer that raises an
    Exception other than MemoryError ends nobody's generation: a PluginWarning names it, the event
    and the cause, and it gets no further events.
    """

    @_every
    def on_load_progress(
        self, model_id: str, tensor: str, bytes_read: int, bytes_total: int
    ) -> None:
        """A weight was read: its name, the bytes read so far, and the checkpoint's total bytes."""

    @_every
    def on_prepare(self, model_id: str, what: str, done: int, total: int) -> None:
        """The loader or the executor prepares something: what, how much is done, and the total.

        A loader that downloads counts megabytes; an executor that compiles kernels counts kernels.
        """

    @_every
    def on_model_loaded(self, model_id: str, model_config: ModelConfig, seconds: float) -> None:
        """A model is ready."""

    @_every
    def on_step(self, event: StepEvent) -> None:
        """An executor step has run."""

    @_every
    def on_tensor(self, model_id: str, name: str, tensor: "Tensor") -> None:
        """An intermediate tensor, as a tap gets it. Copy what you keep: the memory is reused."""

    @_every
    def on_request_submitted(
        self, model_id: str, request_id: str, num_prompt_tokens: int, max_new_tokens: int
    ) -> None:
        """A request waits to be started."""

    @_every
    def on_request_admitted(self, model_id: str, request_id: str, cached_tokens: int) -> None:
        """A request is started; the first cached_tokens of its prompt need not be computed."""

    @_every
    def on_request_preempted(self, model_id: str, request_id: str) -> None:
        """A request gave its pages to others. It is computed again later; no event says when."""

    @_every
    def on_request_finished(self, result: GenerateResult) -> None:
        """A request is complete; its pages are free again."""

    @_every
    def on_request_aborted(self, result: GenerateResult) -> None:
        """The caller ended a request; its pages are free when no step in flight uses them."""

    @_every
    def on_request_failed(self, model_id: str, request_id: str, error: Exception) -> None:
        """A request ended with an error."""

    @_every
    def on_close(self) -> None:
        """The engine closes: write out buffered data."""
