"""Models in directories with a layout of their own.

my-plugin.json    {"config": {...}, "chat_template": "..." or null, "special_tokens": {...}};
                  the fields of config are those of tilewright.types.ModelConfig
tokenizer.json    as the tokenizers library writes it
weights/          in any installed weight format, with the names of tilewright.weights
"""

import json
import os
from pathlib import Path
from typing import Any

from attrs import asdict, define, field

from tilewright import hookimpl
from tilewright.errors import ModelError
from tilewright.types import (
    GenerateConfig,
    LoadedModel,
    ModelConfig,
    PluginInfo,
    Sample,
    TextAssets,
    WeightFormats,
)

tilewright_api = 2

FILE = "my-plugin.json"


@define
class Description:
    """The content of the file."""

    config: ModelConfig
    chat_template: str | None = None
    special_tokens: dict[str, str] = field(factory=dict)


@hookimpl
def plugin_info() -> PluginInfo:
    return PluginInfo(
        summary=f"a directory with {FILE}, tokenizer.json and weights/",
        limits={"models": "all that ModelConfig can describe", "tokenizer": "tokenizer.json"},
    )


@hookimpl
def can_load(source: str) -> bool:
    # Every installed loader may be asked about every source: check names only, and read nothing.
    return os.path.isfile(os.path.join(os.path.expanduser(source), FILE))


@hookimpl
def load_model(source: str, weight_format: str | None, formats: WeightFormats) -> LoadedModel:
    if not can_load(source):
        raise ModelError(f"{source[:200]!r}: expected a directory with {FILE}")
    directory = Path(os.path.expanduser(source))
    said = _described(directory / FILE)
    text = TextAssets(
        tokenizer=_tokenizer(directory / "tokenizer.json"),
        chat_template=said.chat_template,
        special_tokens=said.special_tokens,
    )
    # Any installed format will do, including formats unknown to this loader.
    weights = formats.open(directory / "weights", weight_format)
    return LoadedModel(
        config=said.config,
        weights=weights,
        text=text,
        generation_defaults=GenerateConfig(),
        source=str(directory),
    )


@hookimpl
def write_sample(directory: Path) -> Sample:
    from safetensors.torch import save_file

    from tilewright_testing.models import make_model

    model = make_model()
    said = Description(model.config, model.text.chat_template, dict(model.text.special_tokens))
    (directory / FILE).write_text(json.dumps(asdict(said), indent=2), encoding="utf-8")
    model.text.tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "weights").mkdir()
    save_file(dict(model.tensors), directory / "weights" / "model.safetensors")
    # What the files hold, so that `tilewright plugins verify` can check what is loaded from them.
    return Sample(source=str(directory), tensors=model.tensors)


def _described(path: Path) -> Description:
    from cattrs import Converter, transform_error

    converter = Converter(forbid_extra_keys=True)
    try:
        return converter.structure(json.loads(path.read_bytes()), Description)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ModelError(f"{path}: invalid JSON: {_line(error)}") from error
    except Exception as error:
        raise ModelError(f"{path}: {_line('; '.join(transform_error(error)))}") from error


def _tokenizer(path: Path) -> Any:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of the library, in Rust, is not an Exception
        raise ModelError(f"{path}: invalid tokenizer: {_line(error)}") from error


def _line(error: object) -> str:
    return " ".join(str(error).split())[:300]
