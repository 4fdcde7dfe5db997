"""What a plugin may implement: one class of hook specs a kind.

A plugin is a module or an object named by an entry point. It carries ``tilewright_api``, the number
of the API that it was written for, and functions marked with ``hookimpl``::

    from tilewright import hookimpl

    tilewright_api = 1

    @hookimpl
    def create_sampler(request):
        return MySampler(request.options)

An implementation may take fewer arguments than its spec names, never others. Hooks make things; the
things they make follow the protocols in ``tilewright.types`` and are called directly.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

from tilewright.types import (
    Check,
    Executor,
    ExecutorRequest,
    GenerateResult,
    Hypothesis,
    KvAllocator,
    KvAllocatorRequest,
    LoadedModel,
    LoadRequest,
    ModelConfig,
    PackedWeights,
    PluginInfo,
    Sampler,
    SamplerRequest,
    StepEvent,
    TensorSource,
)

if TYPE_CHECKING:
    from torch import Tensor

API_VERSION = 1
"""Raised when a spec or a protocol changes so that a plugin written before would break."""

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
    """Kind ``loader``: from a source as the user names it to a model described by data."""

    @_first
    def can_load(self, source: str) -> bool:  # type: ignore[empty-body]
        """Whether source looks like this loader's.

        Cheap, since every installed loader may be asked: reads no weights, imports no torch, has
        no side effect, and raises nothing whatever the source.
        """

    @_first
    def load_model(self, request: LoadRequest) -> LoadedModel:  # type: ignore[empty-body]
        """Read headers and configuration. Raises ModelError for what is missing or unsupported."""

    @_first
    def write_sample(self, directory: Path) -> str:  # type: ignore[empty-body]
        """Optional: write a small model of the kind that this loads into an empty directory.

        Returns the source that loads it. ``tilewright plugins verify`` loads it; nothing else does.
        """


class WeightFormatHooks:
    """Kind ``weight_format``: opens files of one kind as named tensors."""

    @_first
    def can_open(self, directory: Path) -> bool:  # type: ignore[empty-body]
        """Whether the directory holds weights in this format. Looks at names only."""

    @_first
    def open_weights(self, directory: Path, options: Any) -> TensorSource:  # type: ignore[empty-body]
        """Open them, reading headers only. Raises ModelError for damaged or absent files."""

    @_first
    def write_weights(self, directory: Path, tensors: "Mapping[str, Tensor]") -> object:
        """Optional: write tensors in this format into an empty directory. The answer is not used.

        Raises TypeError for a dtype and ValueError for a shape that the format does not have.
        ``tilewright plugins verify`` opens what it writes; nothing else does.
        """


class ExecutorHooks:
    """Kind ``executor``: runs the forward pass."""

    @_first
    def create_executor(self, request: ExecutorRequest) -> Executor:  # type: ignore[empty-body]
        """Validate the model against what the executor can do, then load its weights."""

    @_first
    def hypotheses(self) -> "Sequence[Hypothesis]":  # type: ignore[empty-body]
        """Optional: mistakes that a comparison is to try, besides those that it knows, when a layer
        of this executor is wrong (see tilewright.compare.hypotheses)."""

    @_first
    def pack_weights(self, request: ExecutorRequest) -> PackedWeights:  # type: ignore[empty-body]
        """Optional: the weights as the executor wants them, for ``tilewright convert``.

        Names, shapes, dtypes and version follow from configuration and settings alone, and weights
        are read by the tensors' ``read`` only: the hook is also called to check packed weights when
        they are loaded. create_executor then finds them under these names in a request that is
        ``packed``. Without the hook weights are converted to the weight dtype and no more.
        """


class KvAllocatorHooks:
    """Kind ``kv_allocator``: owns the KV cache."""

    @_first
    def create_kv_allocator(self, request: KvAllocatorRequest) -> KvAllocator:  # type: ignore[empty-body]
        """Make the cache that the executor's spec describes."""


class SamplerHooks:
    """Kind ``sampler``: chooses tokens."""

    @_first
    def create_sampler(self, request: SamplerRequest) -> Sampler:  # type: ignore[empty-body]
        """Make a sampler; it serves every model of its engine."""


class ObserverHooks:
    """Kind ``observer``: is told of what happens; any number of them, and none can change it."""

    @_first
    def create_observer(self, options: Any) -> object:
        """Make an object that implements any of the hooks of ObserverEvents; one an engine."""


class ObserverEvents:
    """What an observer is told. All observers are called, in the order in which they were named.

    An event that nobody listens to costs nothing: it is not made.
    """

    @_every
    def on_load_progress(
        self, model_id: str, tensor: str, bytes_read: int, bytes_total: int
    ) -> None:
        """A weight was read: its name, the bytes handed out so far, and the checkpoint's bytes."""

    @_every
    def on_prepare(self, model_id: str, what: str, done: int, total: int) -> None:
        """The loader or the executor gets ready: with what, and how much of how much.

        A loader that downloads counts megabytes, an executor that compiles kernels counts them.
        """

    @_every
    def on_model_loaded(self, model_id: str, model_config: ModelConfig, seconds: float) -> None:
        """A model is ready."""

    @_every
    def on_step(self, event: StepEvent) -> None:
        """An executor step has run."""

    @_every
    def on_tensor(self, model_id: str, name: str, tensor: "Tensor") -> None:
        """An intermediate tensor, as a tap gets it. Copy what you keep: memory is used again."""

    @_every
    def on_request_finished(self, result: GenerateResult) -> None:
        """A request is complete; its pages are free again."""

    @_every
    def on_close(self) -> None:
        """The engine closes: write out what is held."""
