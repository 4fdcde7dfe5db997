"""The engine: models under names, and generation with them."""

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import evolve

from tilewright import loading
from tilewright.errors import ConfigError, OutOfPagesError, RequestError, nearest
from tilewright.loading import ServedModel
from tilewright.plugins import Observers, Selection, select_all
from tilewright.request import Request, check_settings, new_request, refused
from tilewright.runner import Runner
from tilewright.types import (
    GenerateConfig,
    GenerateResult,
    LoadedModel,
    PackedTensor,
    Packing,
    RuntimeConfig,
    Sampler,
)
from tilewright.values import shown

Prompt = str | Sequence[int]
Message = Mapping[str, Any]


class GenerationStream(Iterator[str]):
    """The text of one generation, in pieces. The pieces join to exactly ``result.text``.

    ``result`` is None until the stream has ended. Closing it, leaving its ``with`` block, or an
    exception in it (Ctrl-C included) ends the request and frees its pages. A stream that did not
    end by itself, because its engine was closed or its model unloaded, raises RequestError.
    """

    def __init__(self, runner: Runner, request: Request):
        self._runner = runner
        self._request = request

    @property
    def result(self) -> GenerateResult | None:
        return self._request.result

    def __next__(self) -> str:
        request = self._request
        while not request.unread:
            if request.over:
                if request.error:
                    raise request.error
                raise StopIteration
            if request.request_id not in self._runner.requests:
                raise StopIteration
            try:
                self._runner.step()
            except BaseException:
                self.close()
                raise
        return request.unread.popleft()

    def close(self) -> None:
        """End the request if it is not finished: its result has what was generated until now."""
        self._runner.abort(self._request)

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

    def __init__(self, selection: Selection):
        """Use ``from_plugins`` or ``from_config``."""
        self._selection = selection
        self._observers = Observers(selection.manager)
        self._runners: dict[str, Runner] = {}
        self._num_requests = 0
        self._closed = False

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

        ``[generate]``, ``[prompts]`` and ``[output]`` affect only ``tilewright run``.
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

        A closed engine cannot be used again. Closing it in a step, as an observer may, lets the
        step end first.
        """
        if self._closed:
            return
        self._closed = True
        for runner in self._runners.values():
            runner.close(RequestError("the engine was closed before this request had finished"))
        self._runners.clear()
        self._observers.notify("on_close")

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
        self._check_open()
        _check_type(runtime_config, RuntimeConfig, "runtime_config")
        if model_id in self._runners:
            raise ConfigError(
                f"a model named {model_id!r} is already loaded; choose another model_id"
            )
        started = time.perf_counter()
        loaded = self._load(model_id, model_dir, model_format, loader_options)
        asked = runtime_config or RuntimeConfig()
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
        self._runners[model_id] = Runner(
            model, sampler, self._observers, names[0], names[1], processors.get
        )
        event = {"model_config": loaded.config, "seconds": model.load_seconds}
        self._observers.notify("on_model_loaded", lambda: {"model_id": model_id, **event})
        return loaded

    def unload(self, model_id: str) -> None:
        """End a model's requests with a RequestError, free it, and make its name free to be used.

        Raises RequestError for an unknown name.
        """
        runner = self._runner(model_id)
        del self._runners[model_id]
        runner.close(
            RequestError(f"model {model_id!r} was unloaded before this request had finished")
        )

    def model(self, model_id: str) -> ServedModel:
        """A loaded model. Raises RequestError, listing the known ones, for an unknown name."""
        return self._runner(model_id).model

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

    def _runner(self, model_id: str) -> Runner:
        self._check_open()
        if model_id not in self._runners:
            known = ", ".join(map(repr, self._runners)) or "none; call init_model first"
            raise RequestError(
                f"no model is named {model_id!r}{nearest(model_id, self._runners)} "
                f"(loaded: {known})"
            )
        return self._runners[model_id]

    def _check_open(self) -> None:
        if self._closed:
            raise RequestError("this engine is closed; make a new one")

    # --- generation ------------------------------------------------------------------------------

    def generate(
        self, model_id: str, prompt: Prompt, config: GenerateConfig | None = None
    ) -> "str | GenerationStream":
        """Continue a prompt (text or token ids). Returns text, or a stream if ``config.stream``.

        Raises RequestError for a prompt or settings that cannot be served, such as ``n`` above 1,
        OutOfPagesError when the KV cache is too small for them, NonFiniteLogitsError, and
        ExecutorError.
        """
        if _settings(self._runner(model_id), config).stream:
            return self.stream(model_id, prompt, config)
        return self.generate_result(model_id, prompt, config).text

    def stream(
        self, model_id: str, prompt: Prompt, config: GenerateConfig | None = None
    ) -> GenerationStream:
        """Like ``generate`` with ``config.stream`` set: the text in pieces, as it is generated."""
        runner = self._runner(model_id)
        settings = _settings(runner, config)
        _check_single(settings)
        check_settings(runner.model, settings)
        return GenerationStream(runner, self._submit(runner, prompt, settings))

    def generate_result(
        self, model_id: str, prompt: Prompt, config: GenerateConfig | None = None
    ) -> GenerateResult:
        """Like ``generate``; the result has tokens, finish reason, logprobs and timings too."""
        _check_single(_settings(self._runner(model_id), config))
        (result,) = self.generate_batch(model_id, [prompt], config)
        if result.error:
            raise result.error
        return result

    def generate_batch(
        self, model_id: str, prompts: Sequence[Prompt], config: GenerateConfig | None = None
    ) -> list[GenerateResult]:
        """Like ``generate_result`` for many prompts at once, with ``config.n`` results for each.

        Results are in prompt order, those of a prompt next to each other. With a seed, result j of
        prompt i is sampled with seed + i * n + j, so equal prompts may give different texts. A
        prompt that cannot be served, for example since it is too long, has the reason in its
        results' ``error``. When a step fails, all are ended and the error is raised.
        """
        if isinstance(prompts, str):
            raise RequestError("expected a list of prompts, found a string: use generate() for one")
        runner = self._runner(model_id)
        settings = _settings(runner, config)
        check_settings(runner.model, settings)
        requests: list[Request] = []
        results: list[GenerateResult | Request] = []
        try:
            choices = [prompt for prompt in prompts for _ in range(settings.n or 1)]
            for i, prompt in enumerate(choices):
                seed = None if settings.seed is None else (settings.seed + i) % 2**63
                mine = evolve(settings, seed=seed)
                try:
                    requests.append(self._submit(runner, prompt, mine))
                    results.append(requests[-1])
                except (RequestError, OutOfPagesError) as error:
                    results.append(refused(self._next_id(runner), runner.model, mine, error))
            while not all(request.over for request in requests):
                runner.step()
                for request in requests:
                    if request.error:
                        raise request.error
        finally:
            for request in requests:
                runner.abort(request)
        return [r.result if isinstance(r, Request) else r for r in results]  # type: ignore[misc]

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

    def _submit(self, runner: Runner, prompt: Prompt, settings: GenerateConfig) -> Request:
        request = new_request(self._next_id(runner), runner.model, prompt, settings)
        runner.add(request)
        return request

    def _next_id(self, runner: Runner) -> str:
        self._num_requests += 1
        return f"{runner.model.model_id}-{self._num_requests}"


def _make_sampler(selection: Selection, loaded: LoadedModel) -> Sampler:
    sampler: Sampler = selection.plugins["sampler"].call(
        "create_sampler", model_config=loaded.config, options=selection.options["sampler"]
    )
    return sampler


def _settings(runner: Runner, config: GenerateConfig | None) -> GenerateConfig:
    """A request's settings, with the model's defaults for what is not set."""
    _check_type(config, GenerateConfig, "config")
    return (config or GenerateConfig()).over(runner.model.generation_defaults)


def _check_single(settings: GenerateConfig) -> None:
    if settings.n != 1:
        raise RequestError(
            f"expected n = 1 for a single result, found n = {settings.n}: use generate_batch, "
            "which returns a list of results"
        )


def _check_type(value: object, type_: type, name: str) -> None:
    if value is not None and not isinstance(value, type_):
        raise ConfigError(f"{name} must be a {type_.__name__} or None, found {shown(value)}")
