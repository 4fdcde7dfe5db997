"""Small Hugging Face directories for the loader's tests, and the loader as an engine calls it."""

import json
from pathlib import Path
from typing import Any

import torch
from reference_models import write_model
from safetensors.torch import save_file

from tilewright import plugins
from tilewright.loading import InstalledFormats
from tilewright.types import LoadedModel
from tilewright.weights import check_tensors


def load(source: Path | str, **format_options: Any) -> LoadedModel:
    """Load with hf-local, whose options for the safetensors format are format_options."""
    formats = InstalledFormats(plugins.new_manager(), {"safetensors": format_options})
    loader = plugins.load(plugins.find("loader", "hf-local"))
    model: LoadedModel = loader.load_model(str(source), weight_format=None, formats=formats)
    return model


def load_checked(source: Path | str) -> LoadedModel:
    """Load, and check the weights against the configuration, as an engine does."""
    model = load(source)
    check_tensors(model.weights, model.config, model.source)
    return model


def write_directory(directory: Path, model: str = "llama-llama3") -> Path:
    """A complete directory: config, generation config, tokenizer, chat template, weights."""
    write_model(model, directory)
    change_json(directory / "generation_config.json", eos_token_id=[2, 3], do_sample=True)
    change_json(directory / "tokenizer_config.json", chat_template="{{ messages }}")
    return directory


def change_json(path: Path, *removed: str, **changed: Any) -> None:
    """Set and remove keys of a JSON file, which is created if missing."""
    values = json.loads(path.read_text()) if path.exists() else {}
    values |= changed
    for key in removed:
        del values[key]
    path.write_text(json.dumps(values))


def split_weights(directory: Path, shards: int = 3) -> dict[str, str]:
    """Replace model.safetensors by shards and an index; returns which file has which tensor."""
    single = directory / "model.safetensors"
    from safetensors.torch import load_file

    tensors = load_file(single)
    single.unlink()
    weight_map = {
        name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors"
        for i, name in enumerate(sorted(tensors))
    }
    for file in set(weight_map.values()):
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, directory / file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return weight_map


def change_weights(directory: Path, *removed: str, **added: torch.Tensor) -> None:
    """Remove tensors from model.safetensors and add others; __ in a keyword stands for a dot."""
    from safetensors.torch import load_file

    path = directory / "model.safetensors"
    tensors = {n: t.clone() for n, t in load_file(path).items() if n not in removed}
    tensors |= {name.replace("__", "."): tensor for name, tensor in added.items()}
    path.unlink()
    save_file(tensors, path)
