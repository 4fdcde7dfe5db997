"""A loader of a small layout of its own, and broken variants. Does not import torch itself."""

import json
import os
import socket
from collections.abc import Collection
from pathlib import Path
from typing import Any

from attrs import asdict, evolve
from tokenizers import Tokenizer

from tilewright import hookimpl
from tilewright.errors import ModelError
from tilewright.types import (
    GenerateConfig,
    LoadedModel,
    ModelConfig,
    PluginInfo,
    RopeConfig,
    TensorInfo,
    TensorSource,
    TextAssets,
    WeightFormats,
)

NAME = "acme.json"


class Loader:
    """Loads acme.json with the configuration, tokenizer.json, and weights in any format."""

    tilewright_api = 1

    @hookimpl
    def plugin_info(self) -> PluginInfo:
        return PluginInfo(summary="a directory with acme.json")

    @hookimpl
    def can_load(self, source: str) -> Any:
        return os.path.isdir(source) and os.path.isfile(os.path.join(source, NAME))

    @hookimpl
    def load_model(self, source: str, weight_format: str | None, formats: WeightFormats) -> Any:
        directory = Path(source)
        try:
            config = self.config(json.loads((directory / NAME).read_bytes()))
            tokenizer = Tokenizer.from_str((directory / "tokenizer.json").read_text())
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # tokenizers may panic
            said = " ".join(str(error).split())
            raise ModelError(f"{directory}: no such model, or a damaged one: {said}") from error
        weights = formats.open(directory, weight_format)
        return LoadedModel(
            config=config,
            weights=self.weights(weights, directory),
            text=self.text(tokenizer),
            generation_defaults=GenerateConfig(),
            source=source,
        )

    @hookimpl
    def write_sample(self, directory: Path) -> str:
        from tilewright_testing.models import make_model

        write(make_model(), directory)
        return str(directory)

    def config(self, values: dict[str, Any]) -> ModelConfig:
        values["rope"] = RopeConfig(**values["rope"])
        values["sliding_windows"] = tuple(values["sliding_windows"])
        values["eos_token_ids"] = tuple(values["eos_token_ids"])
        return ModelConfig(**values)

    def weights(self, source: TensorSource, directory: Path) -> TensorSource:
        return source

    def text(self, tokenizer: Tokenizer) -> TextAssets:
        return TextAssets(tokenizer=tokenizer)


def write(model: Any, directory: Path) -> None:
    """Write a tilewright_testing.models.Model in this layout."""
    from safetensors.torch import save_file

    (directory / NAME).write_text(json.dumps(asdict(model.config)))
    model.text.tokenizer.save(str(directory / "tokenizer.json"))
    save_file(dict(model.tensors), directory / "model.safetensors")


RIGHT = Loader()


# --- can_load with side effects -------------------------------------------------------------------


class LeavesAMark(Loader):
    @hookimpl
    def can_load(self, source: str) -> bool:
        if found := super().can_load(source):
            with open(os.path.join(source, ".seen"), "w"):
                pass
        return bool(found)


class ImportsTorch(Loader):
    @hookimpl
    def can_load(self, source: str) -> bool:
        import torch

        return bool(super().can_load(source)) and torch.get_num_threads() > 0


class ReadsTheWeights(Loader):
    @hookimpl
    def can_load(self, source: str) -> bool:
        path = os.path.join(source, "model.safetensors")
        if not super().can_load(source):
            return False
        with open(path, "rb") as file:
            return len(file.read()) > 8


class StumblesOverNames(Loader):
    @hookimpl
    def can_load(self, source: str) -> bool:
        return NAME in os.listdir(source) if os.path.exists(source) else False


class AsksTheNetwork(Loader):
    @hookimpl
    def can_load(self, source: str) -> bool:
        if "/" in source and not os.path.exists(source):
            with socket.socket() as asking:
                asking.settimeout(0.01)
                asking.connect_ex(("127.0.0.1", 9))
        return bool(super().can_load(source))


LEAVES_A_MARK = LeavesAMark()
IMPORTS_TORCH = ImportsTorch()
READS_THE_WEIGHTS = ReadsTheWeights()
STUMBLES_OVER_NAMES = StumblesOverNames()
ASKS_THE_NETWORK = AsksTheNetwork()


# --- wrong claims ---------------------------------------------------------------------------------


class LoadsAnyDirectory(Loader):
    @hookimpl
    def can_load(self, source: str) -> bool:
        return os.path.isdir(source)


class LoadsPlainNames(Loader):
    @hookimpl
    def can_load(self, source: str) -> bool:
        return source.isascii() and " " not in source and bool(super().can_load(source))


class AnswersWithAName(Loader):
    @hookimpl
    def can_load(self, source: str) -> str | None:
        return NAME if super().can_load(source) else None


# --- wrong results --------------------------------------------------------------------------------


class Wrapped:
    """A source that wraps another."""

    def __init__(self, source: TensorSource, directory: Path):
        self.source = source
        self.directory = directory

    def names(self) -> Collection[str]:
        return self.source.names()

    def info(self, name: str) -> TensorInfo:
        return self.source.info(name)

    def get(self, name: str) -> Any:
        return self.source.get(name)

    def close(self) -> None:
        self.source.close()


class Through(Loader):
    def __init__(self, wrapper: type[Wrapped]):
        self.wrapper = wrapper

    def weights(self, source: TensorSource, directory: Path) -> TensorSource:
        return self.wrapper(source, directory)


class ReadsAll(Wrapped):
    def __init__(self, source: TensorSource, directory: Path):
        super().__init__(source, directory)
        self.read = {name: source.get(name).clone() for name in source.names()}

    def get(self, name: str) -> Any:
        return self.read[name]


class ReadsTheEmbedding(Wrapped):
    """Reads a tensor early, for example to learn its dtype."""

    def __init__(self, source: TensorSource, directory: Path):
        super().__init__(source, directory)
        self.embedding = source.get("model.embed_tokens.weight").clone()

    def get(self, name: str) -> Any:
        return self.embedding if "embed_tokens" in name else super().get(name)


class StaysOpen(Wrapped):
    def __init__(self, source: TensorSource, directory: Path):
        super().__init__(source, directory)
        OPEN.append((directory / NAME).open())


OPEN: list[Any] = []


class ShortNames(Wrapped):
    def names(self) -> Collection[str]:
        return [name.removeprefix("model.") for name in self.source.names()]

    def info(self, name: str) -> TensorInfo:
        return self.source.info(name if name.startswith("lm_head") else f"model.{name}")


class Transposes(Wrapped):
    """Returns projections as [in, out]."""

    def info(self, name: str) -> TensorInfo:
        info = super().info(name)
        return evolve(info, shape=info.shape[::-1])

    def get(self, name: str) -> Any:
        return super().get(name).T


class Widens(Wrapped):
    def get(self, name: str) -> Any:
        return super().get(name).double()


class WritesAnIndex(Wrapped):
    def __init__(self, source: TensorSource, directory: Path):
        super().__init__(source, directory)
        (directory / "index.json").write_text(json.dumps(sorted(source.names())))


class AnswersWithNothing(Wrapped):
    def get(self, name: str) -> Any:
        return super().get(name) if name in self.names() else None


class Configured(Loader):
    """Changes some fields of the configuration."""

    def __init__(self, **changed: Any):
        self.changed = changed

    def config(self, values: dict[str, Any]) -> ModelConfig:
        return evolve(super().config(values), **self.changed)


class LosesTheRope(Loader):
    def config(self, values: dict[str, Any]) -> ModelConfig:
        return evolve(super().config(values), rope=RopeConfig())


class Cuts(Loader):
    def text(self, tokenizer: Tokenizer) -> TextAssets:
        tokenizer.enable_truncation(512)
        return super().text(tokenizer)


class HasABrokenTemplate(Loader):
    def text(self, tokenizer: Tokenizer) -> TextAssets:
        return TextAssets(tokenizer=tokenizer, chat_template="{% for m in messages %}{{ m }}")


class AddsATokenPastTheEnd(Loader):
    def text(self, tokenizer: Tokenizer) -> TextAssets:
        tokenizer.add_tokens(["<extra>"])
        return super().text(tokenizer)


class Loads(Loader):
    """Loads the right model, and does something else."""

    def also(self, model: LoadedModel, source: str) -> Any:
        return model

    @hookimpl
    def load_model(self, source: str, weight_format: str | None, formats: WeightFormats) -> Any:
        return self.also(super().load_model(source, weight_format, formats), source)


class GivesATable(Loads):
    def also(self, model: LoadedModel, source: str) -> Any:
        return asdict(model, recurse=False)


class WarnsAtLength(Loads):
    def also(self, model: LoadedModel, source: str) -> Any:
        return evolve(model, warnings=("this model is old:\nthe year is 2019",))


class SetsTheDefaultDtype(Loads):
    def also(self, model: LoadedModel, source: str) -> Any:
        import torch

        torch.set_default_dtype(torch.float64)
        return model


class GoesThere(Loads):
    def also(self, model: LoadedModel, source: str) -> Any:
        os.chdir(source)
        return model


class Remembers(Loads):
    loaded: dict[str, LoadedModel] = {}  # noqa: RUF012 -- the fault

    def also(self, model: LoadedModel, source: str) -> Any:
        return self.loaded.setdefault(source, model)


class FindsTheFormatItself(Loader):
    @hookimpl
    def load_model(self, source: str, formats: WeightFormats) -> Any:
        return super().load_model(source, None, formats)


class WantsOneFormat(Loader):
    @hookimpl
    def load_model(self, source: str, weight_format: str | None, formats: WeightFormats) -> Any:
        return super().load_model(source, weight_format or "safetensors", formats)


class FailsAsPythonDoes(Loader):
    @hookimpl
    def load_model(self, source: str, weight_format: str | None, formats: WeightFormats) -> Any:
        json.loads(Path(source, NAME).read_bytes())
        return super().load_model(source, weight_format, formats)


class SaysItAtLength(Loader):
    @hookimpl
    def load_model(self, source: str, weight_format: str | None, formats: WeightFormats) -> Any:
        try:
            return super().load_model(source, weight_format, formats)
        except ModelError as error:
            raise ModelError(f"cannot load:\n{error}") from error


class LoadsNothingToo(Loader):
    """Accepts an empty directory as an untrained model."""

    @hookimpl
    def load_model(self, source: str, weight_format: str | None, formats: WeightFormats) -> Any:
        directory = Path(source)
        if "\0" in source or not directory.is_dir() or any(directory.iterdir()):
            return super().load_model(source, weight_format, formats)
        return "untrained"
