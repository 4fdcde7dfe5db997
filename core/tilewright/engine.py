"""The engine: models under names, and generation with them."""

import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from threading import RLock
from typing import Any, NoReturn

from attrs import evolve

from tilewright import loading
from tilewright.chat import Chat, Message
from tilewright.drafting import ngram_drafts
from tilewright.errors import (
    ConfigError,
    NonFiniteLogitsError,
    OutOfPagesError,
    RequestError,
    TilewrightError,
    copied,
    nearest,
)
from tilewright.loading import ServedModel
from tilewright.logits_processing import LogitsProcessorError
from tilewright.plugins import Observers, Selection, select_all
from tilewright.request import (
    Request,
    check_settings,
    drawn_seed,
    later_seed,
    new_request,
    refused,
)
from tilewright.runner import Runner
from tilewright.stepping import SteppingThread
from tilewright.types import (
    GenerateConfig,
    GenerateDelta,
    GenerateResult,
    LoadedModel,
    ModelStats,
    PackedTensor,
    Packing,
    RuntimeConfig,
    Sampler,
)
from tilewright.values import shown

Prompt = str | Sequence[int] | Chat


class GenerationStream(Iterator[str]):
    """The text of one generation, in pieces. Read to the end, they join to exactly ``result.text``.

    The text is generated whether it is read or not; any thread may read it. ``result`` is None
    until the generation has ended. Closing the stream, leaving its ``with`` block, or an exception
    in it ends the request and frees its pages; nothing is left to read then. After Ctrl-C,
    or when an enclosing generator is closed, the block does not wait: the request ends before the
    next step. A generation that did not end by itself, because its engine was closed or its model
    unloaded, raises RequestError.
    """

    def __init__(self, engine: "LLMEngine", thread: SteppingThread, request: Request):
        self._engine = engine  # which closes when nobody holds it
        self._thread = thread
        self._request = request
        self._deltas: SimpleQueue[GenerateDelta] = SimpleQueue()
        deltas = self._deltas  # the request must not keep the stream alive
        self._last: GenerateDelta | None = None
        request.on_news = lambda request: deltas.put(request.take())

    @property
    def result(self) -> GenerateResult | None:
        return self._request.result

    def __next__(self) -> str:
        try:
            while self._last is None:
                delta = self._thread.receive(self._deltas)
                if delta.result or delta.error:
                    self._last = delta
                    self._deltas.put(evolve(delta, text=""))  # for another thread that reads
                if delta.text:
                    return delta.text
        except BaseException as error:
            self.__exit__(type(error))
            raise
        if self._last.error:
            raise copied(self._last.error)
        raise StopIteration

    def close(self) -> None:
        """End the request if it is not finished: its result has what was generated until now."""
        if not self._request.over:
            self._thread.call(lambda: self._thread.runner.abort(self._request))
        self._end()

    def _end(self) -> None:
        """Let nothing be left to read."""
        if self._last is None:
            request = self._request
            self._last = GenerateDelta(
                request_id=request.request_id,
                text="",
                token_ids=(),
                logprobs=None,
                result=request.result,
                error=request.error,
            )

    def __enter__(self) -> "GenerationStream":
        return self

    def __exit__(self, kind: type[BaseException] | None = None, *exc: object) -> None:
        if kind is None or issubclass(kind, Exception):
            self.close()
        else:  # Ctrl-C does not wait for the step that is running
            self.__del__()
            self._end()

    def __del__(self) -> None:
        if not self._request.over:
            self._thread.abort(self._request)


class LLMEngine:
    """Runs models with a fixed set of plugins.

    Any thread may call any method. Each loaded model has a thread that runs its steps, in which all
    requests of that model take part, whoever made them.
    """

    def __init__(self, selection: Selection):
        """Use ``from_plugins`` or ``from_config``."""
        self._selection = selection
        self._observers = Observers(selection.manager)
        self._models: dict[str, SteppingThread] = {}
        self._loading: set[str] = set()
        self._lock = RLock()
        """Held while the names of models change; a finaliser may then close the engine."""
        self._numbers = count(1)
        self._closed = False
        weakref.finalize(self, _stop_all, self._models).atexit = False

    @property
    def selection(self) -> dict[str, Any]:
        """Arguments of ``from_plugins`` that rebuild the same engine, also in another process."""
        return self._selection.arguments

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
        names = {
            "loader": loader,
            "executor": executor,
            "kv_allocator": kv_allocator,
            "sampler": sampler,
        }
        return cls(select_all(names, observers, options or {}))

    @classmethod
    def from_config(cls, path: str | Path) -> "LLMEngine":
        """Make an engine from a run file, with the file's model loaded (see docs/run-files.md).

        ``[generate]``, ``[prompts]``, ``[chat]`` and ``[output]`` affect only ``tilewright run``.
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
        """End all requests with a RequestError, and free all models.

        A closed engine cannot be used again. Steps that are running end first. Raises what the
        ``close`` of an executor raises, when all are closed.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            threads = list(self._models.values())
            self._models.clear()
        for thread in threads:
            thread.stop(_engine_closed())
        errors = []
        for thread in threads:
            try:
                thread.close(_engine_closed())
            except Exception as error:
                errors.append(error)
        self._observers.notify("on_close")
        if errors:
            raise errors[0]

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an engine cannot be pickled, since its models have threads: make it in the process "
            "that uses it"
        )

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
        the weight format; by default the one whose files are found. ``loader_options`` are added to
        the loader's options for this model. The returned model's weights are closed.

        Raises ConfigError when the name is taken or a setting does not suit the model, ModelError
        for faulty files, ExecutorError for a model that the executor cannot run, OutOfPagesError
        for a KV cache that is too small, and PluginError for a plugin that fails.
        """
        _check_type(runtime_config, RuntimeConfig, "runtime_config")
        with self._lock:
            self._check_open()
            if model_id in self._models or model_id in self._loading:
                raise ConfigError(
                    f"a model named {model_id!r} is already loaded; choose another model_id"
                )
            self._loading.add(model_id)
        try:
            started = time.perf_counter()
            loaded = self._load(model_id, model_dir, model_format, loader_options)
            runner = self._make_runner(model_id, loaded, runtime_config or RuntimeConfig(), started)
            with self._lock:
                if not self._closed:
                    self._models[model_id] = SteppingThread(runner)
            if self._closed:
                runner.close(_engine_closed())
                self._check_open()
        finally:
            self._loading.remove(model_id)
        event = {"model_config": loaded.config, "seconds": runner.model.load_seconds}
        self._observers.notify("on_model_loaded", lambda: {"model_id": model_id, **event})
        return runner.model.loaded

    def _make_runner(
        self, model_id: str, loaded: LoadedModel, asked: RuntimeConfig, started: float
    ) -> Runner:
        model = loading.make_ready(
            self._selection, self._observers, model_id, loaded, asked, started
        )
        try:
            sampler = _make_sampler(self._selection, loaded)
        except BaseException:
            model.executor.close()
            raise
        names = [str(self._selection.plugins[kind].plugin) for kind in ("executor", "sampler")]
        processors = loading.Processors(self._selection, loaded)
        draft = ngram_drafts if model.runtime.speculation else None
        return Runner(model, sampler, self._observers, names[0], names[1], processors.get, draft)

    def unload(self, model_id: str) -> None:
        """End a model's requests with a RequestError, free it, and make its name free to be used.

        Raises RequestError for an unknown name.
        """
        with self._lock:
            thread = self._thread(model_id)
            del self._models[model_id]
        thread.close(
            RequestError(f"model {model_id!r} was unloaded before this request had finished")
        )

    def model(self, model_id: str) -> ServedModel:
        """A loaded model. Raises RequestError, listing the known ones, for an unknown name."""
        return self._thread(model_id).runner.model

    @property
    def model_ids(self) -> tuple[str, ...]:
        """The names of the loaded models."""
        return tuple(self._models)

    def stats(self, model_id: str) -> ModelStats:
        """What a model is doing, and has done since it was loaded."""
        return self._thread(model_id).runner.stats()

    def runner(self, model_id: str) -> Runner:
        """A model's runner, for a caller that runs the model's steps in a loop of its own.

        The engine then refuses requests for the model, but closes it. Raises RequestError when the
        model has had a request of the engine.
        """
        return self._thread(model_id).release()

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

    def pack(
        self, loaded: LoadedModel, runtime_config: RuntimeConfig | None = None
    ) -> tuple[Packing, list[PackedTensor]]:
        """A loaded model's weights in the executor's layout; none is read yet.

        Raises what ``init_model`` raises for a model that the executor cannot run, and ConfigError
        for one that is packed already.
        """
        self._check_open()
        _check_type(runtime_config, RuntimeConfig, "runtime_config")
        return loading.pack(self._selection, loaded, runtime_config or RuntimeConfig())

    def _load(
        self,
        model_id: str,
        model_dir: str | Path,
        model_format: str | None,
        loader_options: Mapping[str, Any],
    ) -> LoadedModel:
        return loading.load(
            self._selection,
            self._observers,
            model_id,
            str(model_dir),
            model_format,
            loader_options,
        )

    def _thread(self, model_id: str) -> SteppingThread:
        self._check_open()
        thread = self._models.get(model_id)
        if thread is None:
            names = list(self._models)
            known = ", ".join(map(repr, names)) or "none; call init_model first"
            raise RequestError(
                f"no model is named {model_id!r}{nearest(model_id, names)} (loaded: {known})"
            )
        return thread

    def _check_open(self) -> None:
        if self._closed:
            raise RequestError("this engine is closed; make a new one")

    # --- generation ------------------------------------------------------------------------------

    def generate(
        self, model_id: str, prompt: Prompt, config: GenerateConfig | None = None
    ) -> "str | GenerationStream":
        """Continue a prompt: text, token ids or a ``Chat``.

        Returns text, or a stream if ``config.stream``.

        Raises RequestError for a prompt or settings that cannot be served, such as ``n`` above 1,
        OutOfPagesError when the KV cache is too small for them, NonFiniteLogitsError, and
        ExecutorError.
        """
        thread = self._thread(model_id)
        settings = _settings(thread.runner, config, single=True)
        if settings.stream:
            return self._stream(thread, prompt, settings)
        return self._generate_one(thread, prompt, settings).text

    def stream(
        self, model_id: str, prompt: Prompt, config: GenerateConfig | None = None
    ) -> GenerationStream:
        """Like ``generate`` with ``config.stream`` set: the text in pieces, as it is generated."""
        thread = self._thread(model_id)
        return self._stream(thread, prompt, _settings(thread.runner, config, single=True))

    def _stream(
        self, thread: SteppingThread, prompt: Prompt, settings: GenerateConfig
    ) -> GenerationStream:
        model = thread.runner.model
        request = new_request(self._next_id(model), model, prompt, settings)
        stream = GenerationStream(self, thread, request)
        try:
            thread.call(lambda: thread.runner.add(request))
        except BaseException:
            thread.abort(request)
            raise
        return stream

    def new_request(
        self,
        model_id: str,
        prompt: Prompt,
        config: GenerateConfig | None = None,
        request_id: str | None = None,
    ) -> Request:
        """A request for ``add`` of the model's ``runner``. Raises what ``generate`` raises for it.

        request_id: default: chosen by the engine.
        """
        return self._new_request(self._thread(model_id), prompt, config, request_id)

    def _new_request(
        self,
        thread: SteppingThread,
        prompt: Prompt,
        config: GenerateConfig | None,
        request_id: str | None = None,
    ) -> Request:
        model = thread.runner.model
        settings = _settings(thread.runner, config, single=True)
        return new_request(request_id or self._next_id(model), model, prompt, settings)

    def generate_result(
        self, model_id: str, prompt: Prompt, config: GenerateConfig | None = None
    ) -> GenerateResult:
        """Like ``generate``; the result has tokens, finish reason, logprobs and timings too."""
        thread = self._thread(model_id)
        return self._generate_one(thread, prompt, _settings(thread.runner, config, single=True))

    def _generate_one(
        self, thread: SteppingThread, prompt: Prompt, settings: GenerateConfig
    ) -> GenerateResult:
        (result,) = self._generate(thread, [(prompt, settings, None)])
        if result.error:
            raise result.error
        return result

    def generate_batch(
        self,
        model_id: str,
        prompts: Iterable[Prompt],
        config: GenerateConfig | Sequence[GenerateConfig] | None = None,
    ) -> list[GenerateResult]:
        """Like ``generate_result`` for many prompts at once, with ``config.n`` results for each.

        Results are in prompt order, those of a prompt next to each other. With a seed, result j of
        prompt i is sampled with seed + i * n + j, so equal prompts may give different texts. A
        prompt that cannot be served, for example since it is too long, has the reason in its
        results' ``error``; so has a generation whose logits are not finite or whose logits
        processor fails. When a step fails, all are ended and the error is raised.

        config: of all prompts, or a sequence with one for each. Then result j of prompt i is
        sampled with ``config[i].seed + j``, and settings that the model cannot serve are errors of
        that prompt's results.
        """
        if isinstance(prompts, (str, Chat)):
            found = "a string" if isinstance(prompts, str) else "a Chat"
            raise RequestError(f"expected a list of prompts, found {found}: use generate() for one")
        prompts = list(prompts)
        thread = self._thread(model_id)
        each: list[tuple[GenerateConfig, TilewrightError | None]]
        if isinstance(config, Sequence) and not isinstance(config, str):
            if len(config) != len(prompts):
                raise RequestError(
                    f"expected a configuration for each of {len(prompts)} prompts, found "
                    f"{len(config)}"
                )
            for i, one in enumerate(config):
                _check_type(one, GenerateConfig, f"config[{i}]")
            each = [_settings_or_error(thread.runner, one or GenerateConfig()) for one in config]
        else:
            settings = _settings(thread.runner, config)
            n = settings.n or 1
            each = [
                (evolve(settings, seed=later_seed(settings.seed, i * n)), None)
                for i in range(len(prompts))
            ]
        usual_n = thread.runner.model.generation_defaults.n or 1
        choices = [
            (prompt, evolve(settings, seed=later_seed(settings.seed, j)), error)
            for prompt, (settings, error) in zip(prompts, each, strict=True)
            for j in range(settings.n or usual_n)
        ]
        return self._generate(thread, choices)

    def _generate(
        self,
        thread: SteppingThread,
        choices: Sequence[tuple[Prompt, GenerateConfig, TilewrightError | None]],
    ) -> list[GenerateResult]:
        """A result for each prompt with its settings, or with the reason why they are refused."""
        model = thread.runner.model
        errors = {i: error for i, (_, _, error) in enumerate(choices) if error}
        asked = [
            settings if settings.seed is not None else evolve(settings, seed=drawn_seed())
            for _, settings, _ in choices
        ]
        names = [self._next_id(model) for _ in choices]
        requests: dict[int, Request] = {}
        for i, (prompt, _, error) in enumerate(choices):
            if error:
                continue
            try:
                requests[i] = new_request(names[i], model, prompt, asked[i])
            except RequestError as error:
                errors[i] = error
        errors |= _run(thread, requests)
        return [
            refused(names[i], model, asked[i], errors[i]) if i in errors else requests[i].result  # type: ignore[misc]
            for i in range(len(choices))
        ]

    def chat(
        self,
        model_id: str,
        messages: Sequence[Message],
        config: GenerateConfig | None = None,
        *,
        template_options: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        continue_last: bool = False,
    ) -> "str | GenerationStream":
        """Answer a conversation, by the model's chat template: ``generate`` of a ``Chat``.

        ``generate_result``, ``stream`` and ``generate_batch`` take a ``Chat`` too. Its fields
        explain the arguments. Raises RequestError when the model has no template or the template
        refuses the messages, and ModelError for a faulty template.
        """
        prompt = Chat(messages, template_options or {}, tools, continue_last)
        return self.generate(model_id, prompt, config)

    def chat_tokens(
        self,
        model_id: str,
        messages: Sequence[Message],
        *,
        template_options: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        continue_last: bool = False,
    ) -> list[int]:
        """The prompt that ``chat`` makes from a conversation, as token ids.

        A generation from these ids does not end at the tokens that end an answer in a chat alone;
        one from a ``Chat`` does.
        """
        prompt = Chat(messages, template_options or {}, tools, continue_last)
        return self.model(model_id).text.encode_chat(prompt)

    def _next_id(self, model: ServedModel) -> str:
        return f"{model.model_id}-{next(self._numbers)}"


def _make_sampler(selection: Selection, loaded: LoadedModel) -> Sampler:
    sampler: Sampler = selection.plugins["sampler"].create(
        "create_sampler", Sampler, model_config=loaded.config, options=selection.options["sampler"]
    )
    return sampler


def _settings(
    runner: Runner, config: GenerateConfig | None, single: bool = False
) -> GenerateConfig:
    """A request's settings, with the model's defaults for what is not set. Makes the logits
    processors that they name, and has them prepare their arguments.

    single: one result is wanted. Raises RequestError for settings that the model cannot serve.
    """
    _check_type(config, GenerateConfig, "config")
    settings = (config or GenerateConfig()).over(runner.model.generation_defaults)
    if single and settings.n != 1:
        raise RequestError(
            f"expected n = 1 for a single result, found n = {settings.n}: use generate_batch of "
            "LLMEngine, which returns a list of results, or one call for each"
        )
    check_settings(runner.model, settings)
    runner.prepare_processors(settings.logits_processors or {})
    return settings


def _settings_or_error(
    runner: Runner, config: GenerateConfig
) -> tuple[GenerateConfig, TilewrightError | None]:
    """``_settings``; or the configuration as it is, with the error that it raises."""
    try:
        return _settings(runner, config), None
    except (RequestError, ConfigError) as error:
        return config, error


def _run(thread: SteppingThread, requests: Mapping[int, Request]) -> dict[int, TilewrightError]:
    """Run requests until all have ended. Returns the errors that concern one request alone: those
    of refused ones, of logits that are not finite, and of logits processors. Raises any other."""
    ended: SimpleQueue[Request] = SimpleQueue()
    runner = thread.runner

    def add() -> dict[int, TilewrightError]:
        errors: dict[int, TilewrightError] = {}
        for i, request in requests.items():
            try:
                runner.add(request)
            except (RequestError, OutOfPagesError) as error:
                errors[i] = error
        return errors

    def abort() -> None:
        for request in requests.values():
            runner.abort(request)

    for request in requests.values():
        request.on_news = lambda request: ended.put(request) if request.over else None
    try:
        errors = thread.call(add)
        numbers = {request: i for i, request in requests.items()}
        for _ in range(len(requests) - len(errors)):
            request = thread.receive(ended)
            if isinstance(request.error, (NonFiniteLogitsError, LogitsProcessorError)):
                errors[numbers[request]] = copied(request.error)
            elif request.error:
                raise copied(request.error)
    except Exception:
        with suppress(RequestError):  # such as in a process that has no thread of the model
            thread.call(abort)
        raise
    except BaseException:  # Ctrl-C does not wait for the step that is running
        for request in requests.values():
            thread.abort(request)
        raise
    return errors


def _engine_closed() -> RequestError:
    return RequestError("the engine was closed before this request had finished")


def _stop_all(models: Mapping[str, SteppingThread]) -> None:
    for thread in list(models.values()):
        thread.stop(_engine_closed())


def _check_type(value: object, type_: type, name: str) -> None:
    if value is not None and not isinstance(value, type_):
        raise ConfigError(f"{name} must be a {type_.__name__} or None, found {shown(value)}")
