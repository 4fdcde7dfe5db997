"""The engine of a command, with its model loaded."""

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING

from attrs import asdict, fields

from tilewright import plugins
from tilewright.cli.output import note
from tilewright.config import DEFAULT, Resolved
from tilewright.errors import ConfigError, ExecutorError, ModelError, RequestError, TilewrightError
from tilewright.hookspecs import hookimpl
from tilewright.types import BUILTIN_GENERATE, GenerateConfig, LoadedModel

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn
    from torch import Tensor

    from tilewright.engine import LLMEngine


@contextmanager
def open_engine(
    resolved: Resolved, observers: Sequence[object] = (), processors: Iterable[str] = ()
) -> "Iterator[LLMEngine]":
    """An engine with the run's model under its id, with the run's observers and these.

    processors: logits processors that requests name beside those of the run's settings.
    Prints notes for the user on stderr, and what plugins print while the model is loaded and
    unloaded: standard output is for results.
    """
    from tilewright.engine import LLMEngine

    _check_options_of_processors(resolved, processors)
    config = resolved.config
    selection = config.selection()
    selection["observers"] = (*selection["observers"], *observers)
    bar = LoadingBar() if sys.stderr.isatty() else None
    if bar:
        selection["observers"] = (*selection["observers"], bar)
    with naming_origins(resolved), redirect_stdout(sys.stderr):
        engine = LLMEngine.from_plugins(**selection)
    try:
        try:
            # The loader may be chosen only here, and reads its options then.
            with naming_origins(resolved), redirect_stdout(sys.stderr):
                loaded = engine.init_model(
                    config.model.id, config.model.path, config.runtime, config.model.format
                )
        finally:
            if bar:
                bar.stop()
        if (device := engine.model(config.model.id).runtime.device) != "cpu":
            note(f"note: the model runs on: {device}")
        for warning in loaded.warnings:
            note(f"warning: {warning}")
        if text := recommended(loaded, config.generate):
            note(f"note: using the model's recommended settings: {text}")
        yield engine
    finally:
        with redirect_stdout(sys.stderr):
            engine.close()


def check_plugins(resolved: Resolved) -> None:
    """Raise what a run would raise for its plugins and their options; makes none of them."""
    config = resolved.config
    names = asdict(config.plugins, recurse=False)
    named = {"observer": names.pop("observers")}
    named["logits_processor"] = config.generate.logits_processors or ()
    formats = (config.options.get("weight_format") or {}).keys()
    named["weight_format"] = {*formats, *([config.model.format] if config.model.format else ())}
    with naming_origins(resolved), redirect_stdout(sys.stderr):
        _check_options_of_processors(resolved)
        plugins.check_selection(
            names,
            [plugins.find(kind, name) for kind, found in named.items() for name in found],
            config.options,
        )


def _check_options_of_processors(resolved: Resolved, more: Iterable[str] = ()) -> None:
    """Raise ConfigError for an option of a logits processor that no request of the run uses."""
    named = [*(resolved.config.generate.logits_processors or ()), *more]
    used = [plugins.find("logits_processor", name) for name in named]
    for place, origin in resolved.origins.items():
        if place[:2] == ("options", "logits_processor"):
            name = place[2]
            if plugins.find("logits_processor", name) not in used:
                raise ConfigError(
                    f"{origin}: no request uses logits processor {name!r}: name it with "
                    "--logits-processor or in [generate.logits_processors], or drop the option"
                )


def note_turn_ends(engine: "LLMEngine", resolved: Resolved) -> None:
    """Print which tokens end an answer in a chat, beside the model's end-of-sequence tokens."""
    assets = engine.model(resolved.config.model.id).text.assets
    if assets.turn_end_ids and not resolved.config.generate.ignore_eos:
        tokens = [assets.tokenizer.id_to_token(i) or str(i) for i in assets.turn_end_ids]
        verb = "ends" if len(tokens) == 1 else "end"
        note(f"note: in a chat, {' and '.join(tokens)} also {verb} an answer")


def recommended(loaded: LoadedModel, asked: GenerateConfig) -> str:
    """Settings that the model's files recommend and nobody overrode: ``top_k = 20, ...``."""
    return ", ".join(
        f"{name} = {value}"
        for name in (a.name for a in fields(GenerateConfig))
        if (value := getattr(loaded.generation_defaults, name)) is not None
        and getattr(asked, name) is None
        and value != getattr(BUILTIN_GENERATE, name)
    )


@contextmanager
def naming_origins(resolved: Resolved) -> Iterator[None]:
    """Make errors name where options were given, and a model that no flag chose."""
    chosen = resolved.origin("model", "path")
    try:
        yield
    except ModelError as error:
        if chosen in (DEFAULT, "--model"):
            raise
        raise ModelError(f"{chosen}: {error}") from error
    except ConfigError as error:
        raise ConfigError(with_origin(str(error), resolved)) from error


def with_origin(message: str, resolved: Resolved) -> str:
    """Add a setting's origin to an error message of a plugin or the engine, which do not know it.

    They name an option as ``'threads'``, and a runtime setting as ``weight_dtype = ...``.
    """
    named = [
        (message.index(repr(place[-1])), origin)
        for place, origin in resolved.origins.items()
        if place[0] == "options" and repr(place[-1]) in message
    ]
    named += [
        (0, origin)
        for place, origin in resolved.origins.items()
        if place[0] == "runtime" and message.startswith(f"{place[-1]} = ")
    ]
    # The first option named is the wrong one; another may be a suggestion.
    return f"{min(named)[1]}: {message}" if named else message


@contextmanager
def naming_settings(resolved: Resolved, line: Mapping[str, str] | None = None) -> Iterator[None]:
    """Make errors of a request name where the setting was given that they are about.

    line: as ``with_setting`` takes it.
    """
    try:
        yield
    except (ConfigError, RequestError) as error:
        raise type(error)(with_setting(str(error), resolved, line)) from error


def with_setting(message: str, resolved: Resolved, line: Mapping[str, str] | None = None) -> str:
    """Add the origin of a setting of a generation or of conversations to a message about it.

    Messages have the name of the setting, or of a template option, in quotation marks, before
    ``=``, after ``in``, or as the first word; those of a logits processor begin with the plugin's
    name. line: origins of the keys that a prompt sets for itself.
    """
    sections = ("generate", "chat")
    origins = {place[1]: at for place, at in resolved.origins.items() if place[0] in sections}
    options = origins.get("template_options", "")
    origins |= {re.escape(name): options for name in resolved.config.chat.template_options or ()}
    origins |= line or {}
    named = [
        (found.start(), origin)
        for key, origin in origins.items()
        if (found := re.search(rf"^{key}\b|'{key}'|\bin {key}\b|\b{key} =", message))
    ]
    name = message.partition(":")[0]
    if name in (resolved.config.generate.logits_processors or ()):
        named.append((0, origins["logits_processors"]))
    return f"{min(named)[1]}: {message}" if named else message


class NonFiniteTrace:
    """An observer that finds the first tensor that is not finite."""

    def __init__(self) -> None:
        self._steps = 0
        self._engine: LLMEngine | None = None
        self._found: ExecutorError | None = None

    @contextmanager
    def ending(self, engine: "LLMEngine") -> Iterator[None]:
        """In this block, such a tensor's step is the last one, and an ExecutorError names it."""
        self._engine = engine
        try:
            yield
        except TilewrightError:
            if self._found:
                raise self._found from None
            raise

    @hookimpl
    def on_step(self) -> None:
        self._steps += 1

    @hookimpl
    def on_tensor(self, model_id: str, name: str, tensor: "Tensor") -> None:
        if self._found or self._engine is None:
            return
        bad = ~tensor.isfinite()
        if bad.any():
            at = bad.nonzero()[0].tolist()
            self._found = ExecutorError(
                f"step {self._steps}, {name} {list(tensor.shape)}: {int(bad.sum())} of "
                f"{bad.numel()} elements are not finite, the first at {at}: {tensor[tuple(at)]}; "
                "all tensors tapped before it are finite"
            )
            self._engine.unload(model_id)  # ends its requests


class LoadingBar:
    """An observer that shows what the executor prepares, then how much of the model is read."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._tensors = 0

    @hookimpl
    def on_prepare(self, what: str, done: int, total: int) -> None:
        if self._progress is None:
            self._progress = counting(total)
        self._progress.update(self._progress.task_ids[0], description=what, completed=done)
        if done == total:
            self.stop()
            note(what)

    @hookimpl
    def on_load_progress(self, tensor: str, bytes_read: int, bytes_total: int) -> None:
        if self._tensors == 0:
            self.stop()
            self._progress = _loading(bytes_total)
        assert self._progress is not None
        self._tensors += 1
        self._progress.update(
            self._progress.task_ids[0], completed=bytes_read, tensors=self._tensors
        )

    @hookimpl
    def on_model_loaded(self) -> None:
        self.stop()
        self._tensors = 0

    def stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def counting(total: int, *more: "ProgressColumn") -> "Progress":
    """A started bar on standard error that counts items, with one task."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return _started("", total, *columns, TimeElapsedColumn(), *more)


def _loading(bytes_total: int) -> "Progress":
    from rich.progress import TextColumn

    return transferring("loading", bytes_total, TextColumn("{task.fields[tensors]} tensors"))


def transferring(what: str, bytes_total: int, *more: "ProgressColumn") -> "Progress":
    """A started bar on standard error that counts bytes, with one task."""
    from rich.progress import BarColumn, DownloadColumn, TextColumn
    from rich.progress import TransferSpeedColumn as SpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), SpeedColumn())
    return _started(what, bytes_total, *columns, *more)


def _started(description: str, total: int, *columns: "ProgressColumn") -> "Progress":
    from rich.console import Console
    from rich.progress import Progress

    progress = Progress(*columns, console=Console(stderr=True), transient=True)
    progress.add_task(description, total=total, tensors=0)
    progress.start()
    return progress
