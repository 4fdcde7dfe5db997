"""Loader ``gguf``: a .gguf file, or the first shard of one."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import evolve

from tilewright.errors import ModelError, listed
from tilewright.hookspecs import hookimpl
from tilewright.paths import expanded
from tilewright.types import GenerateConfig, LoadedModel, PluginInfo

if TYPE_CHECKING:
    from tilewright_gguf.header import GgufFile
    from tilewright_hf.files import JsonObject

tilewright_api = 2

MAGICS = (b"GGUF", b"lmgg", b"fmgg", b"tjgg")
"""First bytes of GGUF files, and of the formats before it, which are refused by name."""

_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)

_SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
"""Maps keys of ``general.sampling.*`` to names in a generation_config.json."""


_NO_SAMPLING = {"xtc_probability": 0.0, "mirostat": 0, "sequence": ""}
"""Keys of ``general.sampling.*`` that would change the text, with the values that have no effect;
other unsupported keys only refine these."""


@hookimpl
def plugin_info() -> PluginInfo:
    from tilewright_gguf.architecture import ARCHITECTURES
    from tilewright_gguf.tokenizer import SPLITTINGS
    from tilewright_gguf.weights import SUPPORTED

    return PluginInfo(
        summary="a GGUF file with its tokenizer; dequantised tensor by tensor",
        limits={
            "models": f"general.architecture {', '.join(ARCHITECTURES)}",
            "tensor types": ", ".join(kind.name for kind in SUPPORTED),
            "RoPE": "default, linear, yarn, llama3 (rope_freqs.weight)",
            "tokenizer": f"llama (SentencePiece); gpt2 with pre-tokenizer {', '.join(SPLITTINGS)}",
        },
    )


@hookimpl
def can_load(source: str) -> bool:
    path = expanded(source)
    try:
        if os.path.isdir(path):
            from tilewright_hf.shards import only_gguf

            directory = _directory(path)
            names = _models(directory)
            if os.path.lexists(directory / "config.json"):  # of the model in its GGUF files
                return bool(names) and only_gguf(os.listdir(directory))
            return len(names) == 1 and (directory / names[0]).is_file()
        if not os.path.isfile(path):
            return False
        if path.endswith(".gguf"):
            return True
        with open(path, "rb") as file:
            return file.read(4) in MAGICS
    except (OSError, ValueError, ModelError):
        return False


@hookimpl
def load_model(source: str, weight_format: str | None) -> LoadedModel:
    """Read the header of a file and, for Llama 3's scaling, the small ``rope_freqs.weight``."""
    from tilewright_gguf.architecture import INTERLEAVED, model_config
    from tilewright_gguf.header import open_file
    from tilewright_gguf.tokenizer import load_text, special_ids
    from tilewright_gguf.weights import check_kinds, compute_dtype, gguf_source
    from tilewright_hf.files import JsonObject

    path = _file(source)
    if weight_format is not None:
        raise ModelError(
            f"{path}: gguf reads the weights from this file and takes no weight format, found "
            f"{weight_format!r}; leave it out"
        )
    files = [open_file(shard) for shard in _shards(path)]
    _check_shards(files)
    check_kinds(files)
    header = JsonObject(str(path), dict(files[0].values), typed=True)
    config = model_config(header, files, compute_dtype(files))
    special = special_ids(header)
    text, end_ids, warnings = load_text(header, config.vocab_size, special)
    return LoadedModel(
        config=evolve(config, bos_token_id=special.get("bos"), eos_token_ids=end_ids),
        weights=gguf_source(
            files, config, interleaved=header.values["general.architecture"] in INTERLEAVED
        ),
        text=text,
        generation_defaults=_generation(header, config.vocab_size),
        source=str(path),
        warnings=(*warnings, *header.notes),
    )


def _file(source: str) -> Path:
    """The file that a source names. Raises ModelError with what was found instead."""
    from tilewright_hf.files import local_path

    path = local_path(source, "model file", "gguf loads a local .gguf file")
    if path.is_dir():
        path = _directory(path)
        try:
            names = _models(path)
        except OSError as error:
            raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
        if len(names) == 1:
            return path / names[0]
        held = f"give one of the files in it: {listed([ascii(n) for n in names])}"
        raise ModelError(
            f"{path}: expected a .gguf file, or a directory with that of one model; "
            f"{held if names else 'found none in it'}"
        )
    return path


def _directory(path: str | Path) -> Path:
    """The directory itself, or the snapshot of a folder of the hub's cache."""
    from tilewright_hf import cache

    directory = Path(path)
    return cache.snapshot(directory) if cache.is_folder(directory) else directory


def _models(directory: Path) -> list[str]:
    """The .gguf files in a directory, without further shards and the image projectors of others."""
    files = [name for name in os.listdir(directory) if name.endswith(".gguf")]
    shards = {name: found for name in files if (found := _SHARD.fullmatch(name))}
    return sorted(
        name
        for name in files
        if not name.startswith("mmproj")
        and (name not in shards or int(shards[name]["number"]) == 1)
    )


def _shards(path: Path) -> list[Path]:
    """All files of a model, given the path of the first one."""
    found = _SHARD.fullmatch(path.name)
    if not found or int(found["count"]) < 2:
        return [path]
    count = int(found["count"])
    names = [f"{found['stem']}-{i:05}-of-{count:05}.gguf" for i in range(1, count + 1)]
    if int(found["number"]) != 1:
        raise ModelError(
            f"{path}: this is shard {int(found['number'])} of {count}; load the first one, "
            f"{names[0]}"
        )
    missing = [name for name in names if not os.path.lexists(path.parent / name)]
    if missing:
        raise ModelError(
            f"{path}: {len(missing)} of its {count} shards are missing in its directory: "
            f"{listed([ascii(name) for name in missing])}; download them"
        )
    return [path.parent / name for name in names]


def _check_shards(files: Sequence["GgufFile"]) -> None:
    """Check that the headers agree on the number and the order of the shards."""
    for number, file in enumerate(files):
        count = file.values.get("split.count", 1)
        found = file.values.get("split.no", 0)
        if (found, count) != (number, len(files)):
            raise ModelError(
                f"{file.path}: expected shard {number + 1} of {len(files)} by its name, but its "
                f"header says split.no {found!r:.30}, split.count {count!r:.30}; give the "
                "shards the names that they were created with (-00001-of-00003.gguf)"
            )
    expected = files[0].values.get("split.tensors.count")
    tensors = sum(len(file.tensors) for file in files)
    if expected is not None and expected != tensors:
        raise ModelError(
            f"{files[0].path}: split.tensors.count is {expected!r:.30}, but its shards "
            f"hold {tensors} tensors; download them again"
        )


def _generation(header: "JsonObject", vocab_size: int) -> GenerateConfig:
    """The settings that a header recommends."""
    from tilewright_hf.files import JsonObject
    from tilewright_hf.generation import recommended

    prefix = "general.sampling."
    for key, neutral in _NO_SAMPLING.items():
        if header.values.get(f"{prefix}{key}", neutral) != neutral:
            header.note(f"{prefix}{key}", "it is not supported and has no effect")
    given = {
        ours: header.values[f"{prefix}{theirs}"]
        for theirs, ours in _SAMPLING.items()
        if f"{prefix}{theirs}" in header.values
    }
    if not given:
        return GenerateConfig()
    given["do_sample"] = True
    settings = JsonObject(f"{header.where}: {prefix}*", given, header.notes, typed=True)
    return recommended(settings, vocab_size).defaults
