"""From a source to a model that is ready to run: loader, weights, executor and KV cache."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from threading import RLock
from typing import Any

from attrs import define, evolve
from pluggy import PluginManager

from tilewright import plugins
from tilewright.errors import (
    ConfigError,
    ModelError,
    OutOfPagesError,
    PluginError,
    listed,
    quoted,
)
from tilewright.loader_choice import choose_loader
from tilewright.logits_processing import Processing
from tilewright.plugins import Observers, Options, Selection, claimants, select
from tilewright.text import Text
from tilewright.types import (
    BUILTIN_GENERATE,
    Executor,
    ExecutorLimits,
    GenerateConfig,
    KvAllocator,
    KvCacheSpec,
    LoadedModel,
    LogitsProcessor,
    ModelConfig,
    PackedTensor,
    PackedWeights,
    Packing,
    ResolvedRuntime,
    RuntimeConfig,
    TensorSource,
)
from tilewright.weights import (
    MeteredSource,
    check_packed,
    check_packing,
    check_tensors,
    needed_tensors,
    typed_tensors,
    without,
)


@define(eq=False)
class ServedModel:
    """A model that is loaded and ready to run."""

    model_id: str
    loaded: LoadedModel
    """What its loader returned; the weights are closed."""
    runtime: ResolvedRuntime
    executor: Executor
    allocator: KvAllocator
    text: Text
    load_seconds: float

    @property
    def generation_defaults(self) -> GenerateConfig:
        """Settings for what a request leaves unset; every field but the optional ones is filled."""
        return self.loaded.generation_defaults.over(BUILTIN_GENERATE)


def load(
    selection: Selection,
    observers: Observers,
    model_id: str,
    source: str,
    weight_format: str | None,
    loader_options: Mapping[str, Any],
) -> LoadedModel:
    """Load a model's configuration and tokenizer, and open its weights, which are not read."""
    if not source:
        raise ModelError("expected a model's directory, file, id or name, found an empty text")
    given = selection.arguments["options"]
    loader = selection.plugins.get("loader") or choose_loader(selection.manager, source)
    formats = InstalledFormats(selection.manager, given)
    loaded: LoadedModel = loader.call(
        "load_model",
        source=source,
        options=loader.read_options(given, **loader_options),
        weight_format=weight_format,
        formats=formats,
        report=observers.reporter(model_id),
    )
    if not isinstance(loaded, LoadedModel):
        raise PluginError(
            f"{loader.plugin}: load_model() must return a LoadedModel, found {loaded!r:.80}"
        )
    loaded = evolve(loaded, warnings=(*formats.warnings, *loaded.warnings))
    return needed_tensors(loaded)


def make_ready(
    selection: Selection,
    observers: Observers,
    model_id: str,
    loaded: LoadedModel,
    asked: RuntimeConfig,
    started: float,
) -> ServedModel:
    """Check a model's weights, create its executor and KV cache, and close the weights.

    started: when loading began, on time.perf_counter's clock.
    """
    try:
        runtime = _resolved(selection, asked, loaded)
        loaded = _checked(selection, loaded, runtime)
        executor = _create_executor(selection, observers, model_id, loaded, runtime)
    finally:
        loaded.weights.close()
    try:
        return _with_cache(selection, model_id, loaded, runtime, executor, started)
    except BaseException:
        executor.close()
        raise


def pack(
    selection: Selection, loaded: LoadedModel, asked: RuntimeConfig
) -> tuple[Packing, list[PackedTensor]]:
    """A loaded model's weights in the executor's layout; none is read yet."""
    if loaded.packing:
        raise ConfigError(
            f"{loaded.source} is already packed, for executor {loaded.packing.executor}: "
            "expected the model that it was converted from"
        )
    runtime = _resolved(selection, asked, loaded)
    check_tensors(loaded.weights, loaded.config, loaded.source)
    return _packed(selection, loaded, runtime)


def _resolved(selection: Selection, runtime: RuntimeConfig, loaded: LoadedModel) -> RuntimeConfig:
    """The runtime with dtypes and max_seq_len filled in from the model.

    Raises ConfigError for a dtype that the executor does not support.
    """
    config = loaded.config
    longest = config.context_length
    if runtime.max_seq_len is not None and runtime.max_seq_len > longest:
        raise ConfigError(
            f"max_seq_len = {runtime.max_seq_len} is above the limit of {loaded.source}, "
            f"{_length_in_words(config)}: lower it"
        )
    stored = loaded.packing.weight_dtype if loaded.packing else config.dtype
    weight_dtype = runtime.weight_dtype or stored
    executor = selection.plugins["executor"]
    # Keys and values are not stored in the dtype of quantised weights.
    in_weights = weight_dtype in executor.info.kv_dtypes
    kv_dtype = runtime.kv_dtype or (weight_dtype if in_weights else config.dtype)
    for name, dtype, supported, default in (
        ("weight_dtype", weight_dtype, executor.info.weight_dtypes, "that of the checkpoint"),
        ("kv_dtype", kv_dtype, executor.info.kv_dtypes, "that of the model"),
    ):
        if dtype not in supported:
            origin = "" if getattr(runtime, name) else f", {default},"
            raise ConfigError(
                f"{name} = {quoted(dtype)}{origin} is not supported by executor "
                f"{executor.plugin.name!r}: set {name} to {' or '.join(map(repr, supported))}, or "
                "choose another executor"
            )
    return evolve(
        runtime,
        weight_dtype=weight_dtype,
        kv_dtype=kv_dtype,
        max_seq_len=runtime.max_seq_len or longest,
    )


def _length_in_words(config: ModelConfig) -> str:
    """The context's length, and the settings of the model's files that it comes from."""
    rope, positions = config.rope, config.max_position_embeddings
    if config.context_length == positions:
        return f"max_position_embeddings = {positions}"
    of = f"max_position_embeddings = {positions}"
    if rope.kind == "yarn" and rope.original_max_position:
        of = f"original_max_position_embeddings = {rope.original_max_position}"
    scaling = f"{rope.kind} RoPE with factor {rope.factor:g}"
    return f"{config.context_length} tokens ({of}, and {scaling})"


# --- the executor and its weights -----------------------------------------------------------------


def _checked(selection: Selection, loaded: LoadedModel, runtime: RuntimeConfig) -> LoadedModel:
    """The model with the tensors that it needs. Raises ModelError where they do not fit."""
    if loaded.packing is None:
        check_tensors(loaded.weights, loaded.config, loaded.source)
        return loaded
    executor = selection.plugins["executor"].plugin.qualified
    if loaded.packing.executor == executor:  # others may not understand it
        expected, tensors = _packed(selection, loaded, runtime)
    else:
        expected, tensors = evolve(loaded.packing, executor=executor), []
    check_packing(loaded.packing, expected, loaded.source)
    return without(loaded, check_packed(loaded.weights, tensors, loaded.source))


def _packed(
    selection: Selection, loaded: LoadedModel, runtime: RuntimeConfig
) -> tuple[Packing, list[PackedTensor]]:
    executor, dtype = selection.plugins["executor"], runtime.weight_dtype
    assert dtype is not None
    made: PackedWeights = executor.call(
        "pack_weights",
        model_config=loaded.config,
        runtime_config=runtime,
        weights=loaded.weights,
        options=selection.options["executor"],
    )
    if made is None:
        tensors = typed_tensors(loaded.config, loaded.weights, dtype)
        made = PackedWeights(version=0, tensors=tensors)
    packing = Packing(executor=executor.plugin.qualified, version=made.version, weight_dtype=dtype)
    return packing, list(made.tensors)


def _create_executor(
    selection: Selection,
    observers: Observers,
    model_id: str,
    loaded: LoadedModel,
    runtime: RuntimeConfig,
) -> Executor:
    weights: TensorSource = loaded.weights
    if observers.listen("on_load_progress"):

        def on_read(tensor: str, done: int, total: int) -> None:
            read = {"tensor": tensor, "bytes_read": done, "bytes_total": total}
            observers.notify("on_load_progress", lambda: {"model_id": model_id, **read})

        weights = MeteredSource(weights, on_read)
    executor: Executor = selection.plugins["executor"].create(
        "create_executor",
        Executor,
        model_config=loaded.config,
        runtime_config=runtime,
        weights=weights,
        packed=loaded.packing is not None,
        layers=range(loaded.config.num_layers),
        options=selection.options["executor"],
        report=observers.reporter(model_id),
    )
    return executor


def _with_cache(
    selection: Selection,
    model_id: str,
    loaded: LoadedModel,
    runtime: RuntimeConfig,
    executor: Executor,
    started: float,
) -> ServedModel:
    limits, spec = executor.limits, executor.kv_cache_spec
    if not spec.page_size or not getattr(executor, "device", ""):
        raise PluginError(
            f"{selection.plugins['executor'].plugin} must choose a page size when the runtime's "
            "page_size is None, and name its device: update the plugin for this version"
        )
    assert runtime.weight_dtype
    assert runtime.kv_dtype
    assert runtime.max_seq_len
    max_seq_len = _least(runtime.max_seq_len, limits.max_seq_len)
    max_batch_size = _least(runtime.max_batch_size, limits.max_batch_size)
    total_pages = num_pages(spec, runtime.total_pages, max_batch_size, max_seq_len)
    allocator: KvAllocator = selection.plugins["kv_allocator"].create(
        "create_kv_allocator",
        KvAllocator,
        num_pages=total_pages,
        page_size=spec.page_size,
        options=selection.options["kv_allocator"],
    )
    executor.allocate_kv(allocator.total_pages)
    return ServedModel(
        model_id=model_id,
        loaded=loaded,
        runtime=ResolvedRuntime(
            device=executor.device,
            weight_dtype=runtime.weight_dtype,
            kv_dtype=runtime.kv_dtype,
            page_size=spec.page_size,
            total_pages=allocator.total_pages,
            max_seq_len=max_seq_len,
            max_batch_size=max_batch_size,
            max_batch_tokens=_least(runtime.max_batch_tokens, limits.max_batch_tokens),
            prefix_cache=_prefix_cache(selection, runtime, limits),
            admission=runtime.admission,
            speculation=runtime.speculation,
        ),
        executor=executor,
        allocator=allocator,
        text=Text(loaded.text),
        load_seconds=time.perf_counter() - started,
    )


def num_pages(spec: KvCacheSpec, asked: int | None, max_sequences: int, max_seq_len: int) -> int:
    """Number of pages in the cache: as asked, or what the sequences need within the memory limit.

    Raises OutOfPagesError when the memory limit does not even hold one page.
    """
    if asked is not None:
        return asked
    wanted = max_sequences * -(-max_seq_len // spec.page_size)
    if spec.memory_limit is None:
        return wanted
    affordable = spec.memory_limit // spec.page_bytes
    if affordable < 1:
        raise OutOfPagesError(
            f"the KV cache may take {spec.memory_limit} bytes, but one page of {spec.page_size} "
            f"tokens takes {spec.page_bytes}: free memory or set a smaller page_size"
        )
    return min(wanted, affordable)


def _prefix_cache(selection: Selection, runtime: RuntimeConfig, limits: ExecutorLimits) -> bool:
    if runtime.prefix_cache and not limits.shares_pages:
        raise ConfigError(
            f"prefix_cache = true needs an executor whose requests can share pages, which "
            f"{selection.plugins['executor'].plugin} does not support: leave it unset, or choose "
            "another executor"
        )
    return limits.shares_pages if runtime.prefix_cache is None else runtime.prefix_cache


def _least(wanted: int, limit: int | None) -> int:
    return wanted if limit is None else min(wanted, limit)


PREFERRED = "safetensors"
"""Asked first when no format is named: many directories hold a second copy in another format."""


class InstalledFormats:
    """A ``WeightFormats`` (see tilewright.types) over the installed plugins.

    A named format is the only one imported. With none named, the preferred one is asked first, and
    the others only when it finds nothing.
    """

    def __init__(self, manager: PluginManager, options: Options):
        """options: the engine's options; only its ``weight_format`` entry is used here."""
        self._manager = manager
        self._options = options
        self.warnings: tuple[str, ...] = ()
        """What the opened sources warn of."""

    def open(self, directory: Path, name: str | None = None) -> TensorSource:
        chosen = select(self._manager, "weight_format", name or self._detect(directory))
        source: TensorSource = chosen.create(
            "open_weights",
            TensorSource,
            directory=directory,
            options=chosen.read_options(self._options),
        )
        self.warnings += tuple(getattr(source, "warnings", ()))
        return source

    def _detect(self, directory: Path) -> str:
        installed = plugins.installed("weight_format")
        preferred = [p for p in installed if p.name == PREFERRED]
        others = [p for p in installed if p.name != PREFERRED]
        unusable: dict[plugins.Plugin, str] = {}
        for group in (preferred, others):
            claims, broken = claimants(group, "can_open", directory=directory)
            unusable |= broken
            if len(claims) == 1:
                return claims[0].qualified
            if claims:
                names = ", ".join(p.qualified for p in claims)
                raise ModelError(
                    f"{directory}: files of more than one weight format: {names}; "
                    "select one with --format (in Python: model_format=...)"
                )
        tried = ", ".join(p.name for p in installed) or "none installed"
        also = f"; not asked: {'; '.join(unusable.values())}" if unusable else ""
        raise ModelError(
            f"{directory}: expected weights in one of the formats {tried}{also}, found "
            f"{_listed_names(directory)}; download the model's weights, or give them names "
            "that a format has (`tilewright plugins list`)"
        )


def _listed_names(directory: Path) -> str:
    try:
        return listed([ascii(name) for name in sorted(os.listdir(directory))]) or "no files"
    except OSError as error:
        return f"a directory that cannot be read ({error.strerror})"


class Processors:
    """The logits processors of one model. Each is made once, when a request first names it.

    Any thread may call ``get``.
    """

    def __init__(self, selection: Selection, loaded: LoadedModel):
        self._selection = selection
        self._loaded = loaded
        self._made: dict[plugins.Plugin, Processing] = {}
        self._named: dict[str, Processing] = {}
        """By the names that requests give; finding a plugin takes milliseconds."""
        self._making = RLock()

    def get(self, name: str) -> Processing:
        """Raises PluginError as ``plugins.find`` and ``plugins.load`` do."""
        if name not in self._named:
            plugin = plugins.find("logits_processor", name)
            with self._making:
                if plugin not in self._made:
                    self._made[plugin] = self._make(plugin)
                self._named[name] = self._made[plugin]
        return self._named[name]

    def _make(self, plugin: plugins.Plugin) -> Processing:
        chosen = select(self._selection.manager, "logits_processor", plugin.qualified)
        processor = chosen.create(
            "create_logits_processor",
            LogitsProcessor,
            model_config=self._loaded.config,
            text=self._loaded.text,
            options=chosen.read_options(self._selection.arguments["options"]),
        )
        return Processing(str(plugin), processor, state=None)
