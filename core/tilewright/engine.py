"""The engine: models, the requests on them, and the plugins that do the work."""

import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import define, evolve, field, fields
from pluggy import PluginManager

from tilewright import plugins
from tilewright.errors import ConfigError, NonFiniteLogitsError, PluginError, RequestError, nearest
from tilewright.formats import InstalledFormats
from tilewright.loaders import choose_loader
from tilewright.plugins import Selected, check_options, select
from tilewright.scheduler import Request, Scheduler, Step
from tilewright.text import Text, TextStream
from tilewright.types import (
    BUILTIN_GENERATE,
    Executor,
    ExecutorRequest,
    FinishReason,
    GenerateConfig,
    GenerateResult,
    KvAllocator,
    KvAllocatorRequest,
    LoadedModel,
    LoadRequest,
    PackedTensor,
    PackedWeights,
    Packing,
    Report,
    RuntimeConfig,
    SampledToken,
    Sampler,
    SamplerRequest,
    SamplerRow,
    SamplingParams,
    StepEvent,
    Tap,
    TensorSource,
    Timings,
    TokenLogprobs,
)
from tilewright.weights import (
    MeteredSource,
    check_packed,
    check_packing,
    check_tensors,
    typed_tensors,
)

if TYPE_CHECKING:
    from torch import Tensor

Prompt = str | Sequence[int]
Message = Mapping[str, Any]


@define(eq=False)
class ServedModel:
    """A model that is loaded and ready to run."""

    model_id: str
    loaded: LoadedModel
    runtime: RuntimeConfig
    """The effective settings, with dtypes, lengths and pages filled in."""
    max_seq_len: int
    executor: Executor
    device: str
    """The device that computes, as named by the executor."""
    allocator: KvAllocator
    scheduler: Scheduler
    text: Text
    load_seconds: float
    num_steps: int = 0
    generations: "dict[str, _Generation]" = field(factory=dict)

    @property
    def generation_defaults(self) -> GenerateConfig:
        """Settings for what a request leaves unset; every field but the optional ones is filled."""
        return self.loaded.generation_defaults.over(BUILTIN_GENERATE)


@define(eq=False)
class _Generation:
    """A request and its output so far."""

    request: Request
    eos_ids: frozenset[int]
    stop_ids: frozenset[int]
    stream: TextStream
    started: float
    pieces: list[str] = field(factory=list)
    unread: deque[str] = field(factory=deque)
    logprobs: list[TokenLogprobs] = field(factory=list)
    sanitized_steps: int = 0
    prefilled: float = 0.0
    """Time of the first token, on time.perf_counter's clock."""
    finish_reason: FinishReason | None = None
    result: GenerateResult | None = None
    error: Exception | None = None

    @property
    def over(self) -> bool:
        return self.result is not None or self.error is not None

    def accept(self, sampled: SampledToken) -> None:
        """Add the next token; sets finish_reason when it is the last one."""
        if self.finish_reason:
            return
        token, request = sampled.token_id, self.request
        if not request.output_token_ids:
            self.prefilled = time.perf_counter()
        request.output_token_ids.append(token)
        if sampled.logprobs is not None:
            self.logprobs.append(sampled.logprobs)
        self.sanitized_steps += sampled.sanitized > 0
        if token in self.eos_ids:
            self.finish_reason = "eos"
        elif token in self.stop_ids:
            self.finish_reason = "stop"
        else:
            self._emit(self.stream.push(token))
            if self.stream.stopped:
                self.finish_reason = "stop"
            elif len(request.output_token_ids) == request.max_new_tokens:
                self.finish_reason = "length"
        if self.finish_reason:
            self._emit(self.stream.finish())
            # Text that was held back may complete a stop string only now.
            if self.stream.stopped:
                self.finish_reason = "stop"

    def _emit(self, piece: str) -> None:
        if piece:
            self.pieces.append(piece)
            self.unread.append(piece)


class GenerationStream(Iterator[str]):
    """The text of one generation, in pieces. The pieces join to exactly ``result.text``.

    ``result`` is None until the stream is exhausted. Closing it, leaving its ``with`` block, or an
    exception in it (Ctrl-C included) ends the request and frees its pages.
    """

    def __init__(self, engine: "LLMEngine", model: ServedModel, generation: _Generation):
        self._engine = engine
        self._model = model
        self._generation = generation

    @property
    def result(self) -> GenerateResult | None:
        return self._generation.result

    def __next__(self) -> str:
        generation = self._generation
        while not generation.unread:
            if generation.over:
                if generation.error:
                    raise generation.error
                raise StopIteration
            if generation.request.request_id not in self._model.generations:
                raise StopIteration
            try:
                self._engine._step(self._model)
            except BaseException:
                self.close()
                raise
        return generation.unread.popleft()

    def close(self) -> None:
        """End the request if it is not finished; its result stays None."""
        self._engine._cancel(self._model, self._generation)

    def __enter__(self) -> "GenerationStream":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class LLMEngine:
    """Runs models with a fixed set of plugins.

    Use an engine from one thread at a time. Streams may be read in turns: a step run for one of
    them advances all requests of that model.
    """

    def __init__(
        self,
        manager: PluginManager,
        selected: Mapping[str, Selected],
        options: Mapping[str, Any],
        selection: dict[str, Any],
    ):
        """Use ``from_plugins`` or ``from_config``."""
        self._manager = manager
        self._events = manager.hook
        self._plugins = selected
        self._options = options
        self.selection = selection
        """Arguments of ``from_plugins`` that rebuild the same engine, also in another process."""
        self._sampler: Sampler = selected["sampler"].call(
            "create_sampler", request=SamplerRequest(options=options["sampler"])
        )
        self._models: dict[str, ServedModel] = {}
        self._num_requests = 0
        self._closed = False

    # --- making and closing ----------------------------------------------------------------------

    @classmethod
    def from_plugins(
        cls,
        *,
        loader: str | None = None,
        executor: str = "torch",
        kv_allocator: str = "paged",
        sampler: str = "top-p",
        observers: Sequence[str | object] = (),
        options: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> "LLMEngine":
        """Make an engine from installed plugins, by name (``name`` or ``distribution:name``).

        With no loader named, each model is loaded by the one installed loader that claims it.
        Observers may also be objects that implement hooks of ``ObserverEvents``. ``options`` maps
        a kind (``executor``, ``loader``, ``kv_allocator``, ``sampler``) to that plugin's options,
        and ``weight_format`` and ``observer`` to options by plugin name.

        Raises PluginError for a plugin that is unknown, ambiguous or broken, and ConfigError for
        options that a plugin does not have or cannot take.
        """
        options = {kind: dict(given) for kind, given in (options or {}).items()}
        manager = plugins.new_manager()
        names = {
            "loader": loader,
            "executor": executor,
            "kv_allocator": kv_allocator,
            "sampler": sampler,
        }
        selected = {
            kind: select(manager, kind, name) for kind, name in names.items() if name is not None
        }
        watching = [select(manager, "observer", o) if isinstance(o, str) else o for o in observers]
        check_options(options, [o.plugin for o in watching if isinstance(o, Selected)])
        read = {kind: plugin.read_options(options) for kind, plugin in selected.items()}
        for observer in watching:
            if isinstance(observer, Selected):
                made = observer.read_options(options)
                observer = observer.call("create_observer", options=made)
            plugins.check_hooks(observer, f"observer {observer!r}")
            manager.register(observer)
        selection: dict[str, Any] = {
            kind: selected[kind].plugin.qualified if kind in selected else None for kind in names
        }
        selection["observers"] = tuple(
            o.plugin.qualified if isinstance(o, Selected) else o for o in watching
        )
        selection["options"] = options
        return cls(manager, selected, read, selection)

    @classmethod
    def from_config(cls, path: str | Path) -> "LLMEngine":
        """Make an engine from a run file, with the file's model loaded (see docs/run-files.md).

        ``[generate]``, ``[prompts]`` and ``[output]`` are for ``tilewright run``; no effect here.
        The environment's TILEWRIGHT_ variables override the file. Raises ConfigError naming the
        file, line and key of an error, and what ``from_plugins`` and ``init_model`` raise.
        """
        from tilewright.config import resolve

        config = resolve(file=Path(path)).config
        engine = cls.from_plugins(**config.selection())
        try:
            engine.init_model(
                config.model.id, config.model.path, config.runtime, config.model.format
            )
        except BaseException:
            engine.close()
            raise
        return engine

    def close(self) -> None:
        """End all requests and free all models. A closed engine cannot be used again."""
        if self._closed:
            return
        self._closed = True
        for model in self._models.values():
            for generation in list(model.generations.values()):
                self._cancel(model, generation)
            model.executor.close()
        self._models.clear()
        self._events.on_close()

    def __enter__(self) -> "LLMEngine":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # --- models ----------------------------------------------------------------------------------

    def init_model(
        self,
        model_id: str,
        model_dir: str | Path,
        runtime_config: RuntimeConfig | None = None,
        model_format: str | None = None,
        **loader_options: Any,
    ) -> LoadedModel:
        """Load a model and make it ready under a name of your choice.

        ``model_dir`` is what a loader accepts: a directory for ``hf-local``. ``model_format`` names
        the weight format; by default the one that finds its files. ``loader_options`` are added to
        the loader's options for this model. The returned model's weights are closed.

        Raises ConfigError when the name is taken or a setting does not suit the model, ModelError
        for faulty files, ExecutorError for a model that the executor cannot run.
        """
        self._check_open()
        if model_id in self._models:
            raise ConfigError(
                f"a model named {model_id!r} is already loaded; choose another model_id"
            )
        started = time.perf_counter()
        loaded = self._load(model_id, model_dir, model_format, loader_options)
        try:
            runtime = _resolve_runtime(runtime_config or RuntimeConfig(), loaded)
            self._check_weights(loaded, runtime)
            executor = self._create_executor(model_id, loaded, runtime)
        finally:
            loaded.weights.close()
        try:
            model = self._serve(model_id, loaded, runtime, executor, started)
        except BaseException:
            executor.close()
            raise
        self._models[model_id] = model
        if self._listens("on_model_loaded"):
            self._events.on_model_loaded(
                model_id=model_id, model_config=loaded.config, seconds=model.load_seconds
            )
        return loaded

    def model(self, model_id: str) -> ServedModel:
        """A loaded model. Raises RequestError, listing the known ones, for an unknown name."""
        self._check_open()
        if model_id not in self._models:
            known = ", ".join(map(repr, self._models)) or "none; call init_model first"
            raise RequestError(
                f"no model is named {model_id!r}{nearest(model_id, self._models)} (loaded: {known})"
            )
        return self._models[model_id]

    def default_config(self, model_id: str) -> GenerateConfig:
        """Settings for what a request leaves unset: the model's, else the built-in defaults."""
        return self.model(model_id).generation_defaults

    def load(
        self, model_dir: str | Path, model_format: str | None = None, **loader_options: Any
    ) -> LoadedModel:
        """Load a model's configuration and tokenizer. Reads no weights.

        Like ``init_model`` without the executor; the caller closes the result's ``weights``.
        """
        self._check_open()
        return self._load(str(model_dir), model_dir, model_format, loader_options)

    def _load(
        self,
        model_id: str,
        model_dir: str | Path,
        model_format: str | None,
        loader_options: Mapping[str, Any],
    ) -> LoadedModel:
        given = self.selection["options"]
        loader = self._plugins.get("loader") or choose_loader(self._manager, str(model_dir))
        request = LoadRequest(
            source=str(model_dir),
            options=loader.read_options(given, **loader_options),
            weight_format=model_format,
            formats=InstalledFormats(self._manager, given),
            report=self._reporter(model_id),
        )
        loaded: LoadedModel = loader.call("load_model", request=request)
        if not isinstance(loaded, LoadedModel):
            raise PluginError(
                f"{loader.plugin}: load_model() must return a LoadedModel, found {loaded!r:.80}"
            )
        return loaded

    def _reporter(self, model_id: str) -> Report:
        def report(what: str, done: int, total: int) -> None:
            if self._listens("on_prepare"):
                self._events.on_prepare(model_id=model_id, what=what, done=done, total=total)

        return report

    def pack(
        self, loaded: LoadedModel, runtime_config: RuntimeConfig | None = None
    ) -> tuple[Packing, list[PackedTensor]]:
        """A loaded model's weights in the executor's layout; none is read yet.

        Raises what ``init_model`` raises for a model that the executor cannot run, and ConfigError
        for one that is packed already.
        """
        self._check_open()
        if loaded.packing:
            raise ConfigError(
                f"{loaded.source} is packed already, for executor {loaded.packing.executor}: "
                "expected the model that it was converted from"
            )
        runtime = _resolve_runtime(runtime_config or RuntimeConfig(), loaded)
        check_tensors(loaded.weights, loaded.config, loaded.source)
        return self._packed(self._executor_request(loaded, runtime))

    def _check_weights(self, loaded: LoadedModel, runtime: RuntimeConfig) -> None:
        if loaded.packing is None:
            check_tensors(loaded.weights, loaded.config, loaded.source)
            return
        executor = self._plugins["executor"].plugin.qualified
        if loaded.packing.executor == executor:  # others may not understand it
            expected, tensors = self._packed(self._executor_request(loaded, runtime))
        else:
            expected, tensors = evolve(loaded.packing, executor=executor), []
        check_packing(loaded.packing, expected, loaded.source)
        check_packed(loaded.weights, tensors, loaded.source)

    def _packed(self, request: ExecutorRequest) -> tuple[Packing, list[PackedTensor]]:
        executor = self._plugins["executor"]
        made: PackedWeights = executor.call("pack_weights", request=request)
        if made is None:
            made = PackedWeights(version=0, tensors=typed_tensors(request))
        assert request.runtime_config.weight_dtype is not None
        packing = Packing(
            executor=executor.plugin.qualified,
            version=made.version,
            weight_dtype=request.runtime_config.weight_dtype,
        )
        return packing, list(made.tensors)

    def _executor_request(self, loaded: LoadedModel, runtime: RuntimeConfig) -> ExecutorRequest:
        return ExecutorRequest(
            model_config=loaded.config,
            runtime_config=runtime,
            weights=loaded.weights,
            options=self._options["executor"],
            packed=loaded.packing is not None,
        )

    def _create_executor(
        self, model_id: str, loaded: LoadedModel, runtime: RuntimeConfig
    ) -> Executor:
        weights: TensorSource = loaded.weights
        if self._listens("on_load_progress"):

            def on_read(tensor: str, done: int, total: int) -> None:
                self._events.on_load_progress(
                    model_id=model_id, tensor=tensor, bytes_read=done, bytes_total=total
                )

            weights = MeteredSource(weights, on_read)

        request = evolve(
            self._executor_request(loaded, runtime),
            weights=weights,
            report=self._reporter(model_id),
        )
        executor: Executor = self._plugins["executor"].call("create_executor", request=request)
        return executor

    def _serve(
        self,
        model_id: str,
        loaded: LoadedModel,
        runtime: RuntimeConfig,
        executor: Executor,
        started: float,
    ) -> ServedModel:
        limits, spec = executor.limits, executor.kv_cache_spec
        if not spec.page_size or not getattr(executor, "device", ""):
            raise PluginError(
                f"{self._plugins['executor'].plugin} must choose a page size where the runtime's "
                "page_size is None, and name what computes as device: update it for this version"
            )
        assert runtime.max_seq_len is not None
        max_seq_len = _least(runtime.max_seq_len, limits.max_seq_len)
        max_batch_size = _least(runtime.max_batch_size, limits.max_batch_size)
        max_batch_tokens = _least(runtime.max_batch_tokens, limits.max_batch_tokens)
        allocator: KvAllocator = self._plugins["kv_allocator"].call(
            "create_kv_allocator",
            request=KvAllocatorRequest(
                spec=spec,
                total_pages=runtime.total_pages,
                max_sequences=max_batch_size,
                max_seq_len=max_seq_len,
                options=self._options["kv_allocator"],
            ),
        )
        executor.bind_kv_cache(allocator.layers())
        return ServedModel(
            model_id=model_id,
            loaded=loaded,
            runtime=evolve(
                runtime,
                max_seq_len=max_seq_len,
                max_batch_size=max_batch_size,
                max_batch_tokens=max_batch_tokens,
                page_size=spec.page_size,
                total_pages=allocator.total_pages,
            ),
            max_seq_len=max_seq_len,
            executor=executor,
            device=executor.device,
            allocator=allocator,
            scheduler=Scheduler(allocator, max_batch_size, max_batch_tokens),
            text=Text(loaded.text),
            load_seconds=time.perf_counter() - started,
        )

    # --- generation ------------------------------------------------------------------------------

    def generate(
        self, model_id: str, prompt: Prompt, config: GenerateConfig | None = None
    ) -> "str | GenerationStream":
        """Continue a prompt (text or token ids). Returns text, or a stream if ``config.stream``.

        Raises RequestError for a prompt or settings that cannot be served, OutOfPagesError when
        the KV cache is too small for them, NonFiniteLogitsError, and ExecutorError.
        """
        model = self.model(model_id)
        settings = (config or GenerateConfig()).over(model.generation_defaults)
        if settings.stream:
            return GenerationStream(self, model, self._submit(model, prompt, settings))
        return self.generate_result(model_id, prompt, config).text

    def generate_result(
        self, model_id: str, prompt: Prompt, config: GenerateConfig | None = None
    ) -> GenerateResult:
        """Like ``generate``; the result has tokens, finish reason, logprobs and timings too."""
        return self.generate_batch(model_id, [prompt], config)[0]

    def generate_batch(
        self, model_id: str, prompts: Sequence[Prompt], config: GenerateConfig | None = None
    ) -> list[GenerateResult]:
        """Like ``generate_result`` for many prompts at once; results are in prompt order.

        With a seed, prompt i is sampled with seed + i, so equal prompts may give different
        texts. When one fails, the others are ended too and its error is raised.
        """
        if isinstance(prompts, str):
            raise RequestError("expected a list of prompts, found a string: generate() takes one")
        model = self.model(model_id)
        settings = (config or GenerateConfig()).over(model.generation_defaults)
        generations: list[_Generation] = []
        try:
            for i, prompt in enumerate(prompts):
                seed = None if settings.seed is None else (settings.seed + i) % 2**63
                generations.append(self._submit(model, prompt, evolve(settings, seed=seed)))
            while not all(g.over for g in generations):
                self._step(model)
                for generation in generations:
                    if generation.error:
                        raise generation.error
        finally:
            for generation in generations:
                self._cancel(model, generation)
        return [g.result for g in generations if g.result]

    def chat(
        self, model_id: str, messages: Sequence[Message], config: GenerateConfig | None = None
    ) -> "str | GenerationStream":
        """Answer a conversation, as ``generate`` does, through the model's chat template.

        Messages are mappings with ``role`` and ``content``. Raises RequestError when the model has
        no template or the template refuses them.
        """
        return self.generate(model_id, self.chat_tokens(model_id, messages), config)

    def chat_tokens(self, model_id: str, messages: Sequence[Message]) -> list[int]:
        """The prompt that ``chat`` makes from a conversation, as token ids."""
        text = self.model(model_id).text
        # Templates write their own special tokens.
        return text.encode(text.render_chat(messages), add_special_tokens=False)

    def _submit(self, model: ServedModel, prompt: Prompt, settings: GenerateConfig) -> _Generation:
        ids = tuple(model.text.encode(prompt) if isinstance(prompt, str) else prompt)
        self._check_prompt(model, ids)
        self._check_bias(model, settings.logit_bias or {})
        self._check_ids(model, settings.stop_token_ids or (), "stop_token_ids")
        assert settings.max_new_tokens is not None
        self._num_requests += 1
        seed = secrets.randbits(63) if settings.seed is None else settings.seed
        request = Request(
            request_id=f"{model.model_id}-{self._num_requests}",
            prompt_token_ids=ids,
            params=_sampling_params(evolve(settings, seed=seed)),
            max_new_tokens=min(settings.max_new_tokens, model.max_seq_len - len(ids)),
        )
        eos_ids = () if settings.ignore_eos else model.loaded.config.eos_token_ids
        generation = _Generation(
            request=request,
            eos_ids=frozenset(eos_ids),
            stop_ids=frozenset(settings.stop_token_ids or ()),
            stream=TextStream(model.text, settings.stop or ()),
            started=time.perf_counter(),
        )
        model.scheduler.add(request)
        model.generations[request.request_id] = generation
        return generation

    def _step(self, model: ServedModel) -> None:
        """Run the model's next step for every request that is in it."""
        self._finish_ended(model)  # left over if Ctrl-C or an observer interrupted a step
        step = model.scheduler.schedule()
        if step is None:
            return
        started = time.perf_counter()
        try:
            run = model.executor.prefill if step.phase == "prefill" else model.executor.decode
            logits = run(step.batch, self._tap(model.model_id))
            rows = [r.sampler_row() for r in step.sampled]
            tokens = self._sample(logits, rows) if rows else []
        except NonFiniteLogitsError as error:
            # The others lose nothing: the step is not committed, and is scheduled again without it.
            generation = model.generations[error.request_id]
            self._fail(model, generation, _traced(error, step, generation.request, run))
            return
        except Exception as error:
            for request in step.requests:
                self._fail(model, model.generations[request.request_id], error)
            return
        # Accept tokens, then commit: if Ctrl-C falls between the two, a token is computed twice.
        for request, token in zip(step.sampled, tokens, strict=True):
            model.generations[request.request_id].accept(token)
        model.scheduler.done(step)
        self._report(model, step, time.perf_counter() - started)
        self._finish_ended(model)

    def _sample(self, logits: "Tensor", rows: Sequence[SamplerRow]) -> Sequence[SampledToken]:
        tokens = self._sampler.sample(logits, rows)
        vocab_size = logits.shape[1]
        if len(tokens) != len(rows) or not all(0 <= t.token_id < vocab_size for t in tokens):
            raise PluginError(
                f"{self._plugins['sampler'].plugin} must return one token from 0 to "
                f"{vocab_size - 1} for each of {len(rows)} rows, found {tokens!r:.100}"
            )
        return tokens

    def _tap(self, model_id: str) -> "Tap | None":
        if not self._listens("on_tensor"):
            return None

        def tap(name: str, tensor: "Tensor") -> None:
            self._events.on_tensor(model_id=model_id, name=name, tensor=tensor)

        return tap

    def _report(self, model: ServedModel, step: Step, seconds: float) -> None:
        if self._listens("on_step"):
            event = StepEvent(
                model_id=model.model_id,
                phase=step.phase,
                step=model.num_steps,
                request_ids=tuple(r.request_id for r in step.requests),
                num_tokens=len(step.batch.token_ids),
                seconds=seconds,
            )
            self._events.on_step(event=event)
        model.num_steps += 1

    def _finish_ended(self, model: ServedModel) -> None:
        for generation in list(model.generations.values()):
            if generation.finish_reason:
                self._finish(model, generation)

    def _finish(self, model: ServedModel, generation: _Generation) -> None:
        request = generation.request
        assert generation.finish_reason is not None
        generation.result = GenerateResult(
            model_id=model.model_id,
            request_id=request.request_id,
            text="".join(generation.pieces),
            token_ids=tuple(request.output_token_ids),
            finish_reason=generation.finish_reason,
            prompt_token_ids=request.prompt_token_ids,
            seed=request.params.seed,
            logprobs=tuple(generation.logprobs) if request.params.logprobs is not None else None,
            timings=Timings(
                load_seconds=model.load_seconds,
                prefill_seconds=generation.prefilled - generation.started,
                decode_seconds=time.perf_counter() - generation.prefilled,
                prompt_tokens=len(request.prompt_token_ids),
                new_tokens=len(request.output_token_ids),
            ),
            device=model.device,
            sanitized_steps=generation.sanitized_steps,
        )
        self._drop(model, generation)
        if self._listens("on_request_finished"):
            self._events.on_request_finished(result=generation.result)

    def _fail(self, model: ServedModel, generation: _Generation, error: Exception) -> None:
        generation.error = error
        self._drop(model, generation)

    def _cancel(self, model: ServedModel, generation: _Generation) -> None:
        if generation.request.request_id in model.generations:
            self._drop(model, generation)

    @staticmethod
    def _drop(model: ServedModel, generation: _Generation) -> None:
        del model.generations[generation.request.request_id]
        model.scheduler.remove(generation.request)

    def _listens(self, event: str) -> bool:
        return bool(getattr(self._events, event).get_hookimpls())

    def _check_open(self) -> None:
        if self._closed:
            raise RequestError("this engine is closed; make a new one")

    def _check_prompt(self, model: ServedModel, ids: tuple[int, ...]) -> None:
        limit = model.max_seq_len
        if not ids:
            raise RequestError("the prompt is empty: expected at least one token")
        if len(ids) >= limit:
            raise RequestError(
                f"the prompt has {len(ids)} tokens, which leaves no room for a new one within "
                f"max_seq_len = {limit} of model {model.model_id!r}: shorten it, or raise "
                f"max_seq_len if it is below {model.loaded.config.max_position_embeddings}"
            )
        self._check_ids(model, ids, "the prompt")

    def _check_bias(self, model: ServedModel, bias: Mapping[int, float]) -> None:
        self._check_ids(model, bias, "logit_bias")
        if list(bias.values()).count(-inf) == model.loaded.config.vocab_size:
            raise RequestError("logit_bias forbids every token: allow one")

    @staticmethod
    def _check_ids(model: ServedModel, ids: Iterable[int], where: str) -> None:
        vocab_size = model.loaded.config.vocab_size
        bad = next((i for i in ids if not 0 <= i < vocab_size), None)
        if bad is not None:
            raise RequestError(
                f"token id {bad} in {where} is outside of the vocabulary of model "
                f"{model.model_id!r} (0 to {vocab_size - 1})"
            )


def _traced(
    error: NonFiniteLogitsError, step: Step, request: Request, run: Callable[..., "Tensor"]
) -> NonFiniteLogitsError:
    """The error with the name of the first non-finite tensor, found by running the step again.

    That is safe until the step is committed: it writes the same values to the same slots.
    """
    batch, at = step.batch, step.requests.index(request)
    tokens = slice(*batch.query_starts[at : at + 2].tolist())
    row = step.sampled.index(request)
    found: list[str] = []

    def tap(name: str, tensor: "Tensor") -> None:
        rows = tokens if len(tensor) == len(batch.token_ids) else slice(row, row + 1)
        if not found and not tensor[rows].isfinite().all():
            found.append(name)

    with suppress(Exception):  # the request has failed anyway
        run(batch, tap)
    name = found[0] if found else None
    return NonFiniteLogitsError(
        error.request_id, error.step, error.token_ids, error.vocab_size, name
    )


def _resolve_runtime(runtime: RuntimeConfig, loaded: LoadedModel) -> RuntimeConfig:
    """The runtime with dtypes and max_seq_len filled in from the model."""
    config = loaded.config
    longest = config.max_position_embeddings
    if runtime.max_seq_len is not None and runtime.max_seq_len > longest:
        raise ConfigError(
            f"max_seq_len = {runtime.max_seq_len} is above the {longest} positions that "
            f"{loaded.source} was made for (max_position_embeddings): lower it"
        )
    stored = loaded.packing.weight_dtype if loaded.packing else config.dtype
    weight_dtype = runtime.weight_dtype or stored
    return evolve(
        runtime,
        weight_dtype=weight_dtype,
        kv_dtype=runtime.kv_dtype or weight_dtype,
        max_seq_len=runtime.max_seq_len or longest,
    )


def _least(wanted: int, limit: int | None) -> int:
    return wanted if limit is None else min(wanted, limit)


def _sampling_params(settings: GenerateConfig) -> SamplingParams:
    return SamplingParams(**{a.name: getattr(settings, a.name) for a in fields(SamplingParams)})
