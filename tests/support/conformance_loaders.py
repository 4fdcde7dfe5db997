"""A loader of a small layout of its own, and broken variants. Does not import torch itself."""

import json
import math
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
    Sample,
    TensorInfo,
    TensorSource,
    TextAssets,
    WeightFormats,
)

NAME = "acme.json"


class Loader:
    """Loads acme.json with the configuration, tokenizer.json, and weights in any format."""

    tilewright_api = 2

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
    def write_sample(self, directory: Path) -> Any:
        from tilewright_testing.models import make_model

        # Its q_proj, k_proj, v_proj and o_proj are square and of one size.
        model = make_model("plain")
        write(model, directory)
        return Sample(source=str(directory), tensors=model.tensors)

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


class KeepsTheName(Wrapped):
    """The requested name is an attribute while a tensor is read."""

    def get(self, name: str) -> Any:
        self.name = name
        return self.read()

    def read(self) -> Any:
        return super().get(self.name)


class TransposesSquares(Wrapped):
    def get(self, name: str) -> Any:
        return super().get(name).T if name.endswith("o_proj.weight") else super().get(name)


class SwapsQAndK(Wrapped):
    def get(self, name: str) -> Any:
        kinds = {"q_proj": "k_proj", "k_proj": "q_proj"}
        kind = next((kind for kind in kinds if kind in name), "")
        return super().get(name.replace(kind, kinds[kind]) if kind else name)


class Scaled(Wrapped):
    """Matrices of integers from -127 to 127, with a scale for each row: one for each output."""

    def names(self) -> Collection[str]:
        return [name for name in self.source.names() if not name.endswith(".scale")]

    def info(self, name: str) -> TensorInfo:
        shape = super().info(name).shape
        nbytes = 4 * math.prod(shape)
        return evolve(super().info(name), dtype="float32", nbytes=nbytes)

    def get(self, name: str) -> Any:
        if name not in self.names():
            raise KeyError(name)
        stored = super().get(name).float()
        if f"{name}.scale" not in self.source.names():
            return stored
        return self.scaled(stored, super().get(f"{name}.scale"))

    def scaled(self, stored: Any, scale: Any) -> Any:
        return stored * scale[:, None]


class ScalesColumnsWhereTheyFit(Scaled):
    def scaled(self, stored: Any, scale: Any) -> Any:
        fits = len(scale) == stored.shape[1]
        return stored * scale if fits else super().scaled(stored, scale)


class ForgetsTheScale(Scaled):
    def scaled(self, stored: Any, scale: Any) -> Any:
        return stored


class ScalesEachMatrixAlike(Scaled):
    """Takes the first row's scale for the whole matrix."""

    def scaled(self, stored: Any, scale: Any) -> Any:
        return stored * scale[0]


class Quantised(Through):
    """Its sample states the weights before they were quantised, and the error of that: half a step,
    and a step is at most 1/127 of the largest magnitude."""

    tolerance = 0.5 / 127 * 1.001

    def __init__(self, wrapper: type[Scaled] = Scaled):
        super().__init__(wrapper)

    @hookimpl
    def write_sample(self, directory: Path) -> Any:
        from tilewright_testing.models import make_model

        model = make_model("plain")
        stored = {}
        for name, tensor in model.tensors.items():
            if tensor.ndim == 2:
                scale = tensor.abs().amax(dim=1) / 127
                stored[f"{name}.scale"] = scale
                stored[name] = (tensor / scale[:, None]).round().char()
            else:
                stored[name] = tensor
        write(evolve(model, tensors=stored), directory)
        source = str(directory)
        return Sample(source=source, tensors=model.tensors, tolerance=self.tolerance)


QUANTISED = Quantised()


class StatesALargeError(Quantised):
    tolerance = 0.9


class Stating(Loader):
    """Changes its sample's statement."""

    def __init__(self, changed: Any):
        self.changed = changed

    @hookimpl
    def write_sample(self, directory: Path) -> Any:
        return self.changed(super().write_sample(directory))


class WritesOnes(Loader):
    @hookimpl
    def write_sample(self, directory: Path) -> Any:
        from tilewright_testing.models import make_model

        model = make_model("plain")
        model = evolve(model, tensors={n: t.fill_(1.0) for n, t in model.tensors.items()})
        write(model, directory)
        return Sample(source=str(directory), tensors=model.tensors)


class WritesWithoutSquares(Loader):
    @hookimpl
    def write_sample(self, directory: Path) -> Any:
        from tilewright_testing.models import make_model

        model = make_model("qk-norm")
        write(model, directory)
        return Sample(source=str(directory), tensors=model.tensors)


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


class EndsATurnPastTheEnd(Loader):
    def text(self, tokenizer: Tokenizer) -> TextAssets:
        return TextAssets(tokenizer=tokenizer, turn_end_ids=(131,))


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
