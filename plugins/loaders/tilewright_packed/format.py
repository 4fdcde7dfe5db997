"""Packed models: directories that hold a model in one executor's layout, to be mapped and checked.

======================================  ============================================================
``tilewright-packed.json``              a ``Manifest``: executor, source and all files' checksums
``model.json``                          a ``Description``
``tokenizer.json``                      as the tokenizers library writes it
``model.safetensors.index.json``        which shard has which tensor
``model-<number>-of-<all>.safetensors`` the tensors of ``ExecutorHooks.pack_weights``
======================================  ============================================================

``tilewright_packed.writer`` writes it. There is no config.json, so that it is not taken for a
checkpoint.
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from attrs import asdict, fields, frozen

from tilewright.errors import ConfigError, ModelError
from tilewright.types import (
    GenerateConfig,
    LoadedModel,
    ModelConfig,
    Packing,
    TensorSource,
    TextAssets,
    WeightFormats,
)
from tilewright.values import structure
from tilewright.weights import printable

T = TypeVar("T")

_REPAIR = "copy it again, or convert the model again"

FORMAT = 1
"""Raised when a reader of an older format would misread a newer directory."""

MANIFEST = "tilewright-packed.json"
MODEL = "model.json"
TOKENIZER = "tokenizer.json"
INDEX = "model.safetensors.index.json"

CHUNK = 2**24
"""Bytes that are read or written at a time."""

_SHARD = re.compile(r"model-\d{5,9}-of-\d{5,9}\.safetensors")
_MOST_TEXT = 2**28
"""Size limit, in bytes, of a file that is read into memory as a whole."""
_MOST_LAYERS = 2**14
"""A larger number is damaged: each layer would be looked up by name."""

OnBytes = Callable[[str, int], None]
"""Called with a file's name and the number of its bytes just processed."""


@frozen(kw_only=True)
class File:
    bytes: int
    sha256: str
    header_sha256: str | None = None
    """Checksum of what precedes the tensors, for a shard."""


@frozen(kw_only=True)
class Manifest:
    packing: Packing
    source: str
    """The last part of the source's path or name."""
    fingerprint: str
    """``tilewright_packed.writer.fingerprint`` of the source."""
    files: Mapping[str, File]
    """All files except the manifest, keyed by name."""

    @property
    def shards(self) -> list[str]:
        return sorted(name for name in self.files if _SHARD.fullmatch(name))

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files.values())


@frozen(kw_only=True)
class Description:
    """A ``LoadedModel`` without weights and tokenizer."""

    config: ModelConfig
    generation_defaults: GenerateConfig
    chat_template: str | None
    tool_chat_template: str | None = None
    special_tokens: Mapping[str, str]
    turn_end_ids: tuple[int, ...] = ()


@frozen(kw_only=True)
class Finding:
    """The result of ``verify`` for a file."""

    name: str
    problem: str
    """Empty when the file is as it was written."""


def is_packed(directory: str | Path) -> bool:
    return os.path.isfile(os.path.join(directory, MANIFEST))


def load(
    directory: Path, formats: WeightFormats, weight_format: str | None = None, verify: bool = False
) -> LoadedModel:
    """Load a packed model; its weights are mapped, not read.

    All bytes except the tensors' are checked; verify reads and checks those too. Raises ModelError
    for a directory that is not as it was written.
    """
    manifest = read_manifest(directory)
    for name, file in manifest.files.items():
        tensors_too = verify or file.header_sha256 is None
        if problem := _problem(directory / name, file, tensors_too):
            raise ModelError(f"{directory / name}: {problem}: {_REPAIR}")
    described = _description(directory / MODEL)
    weights = formats.open(directory, weight_format)
    try:
        _check_places(weights, manifest, directory)
        return LoadedModel(
            config=described.config,
            weights=weights,
            text=TextAssets(
                tokenizer=_tokenizer(directory / TOKENIZER),
                chat_template=described.chat_template,
                tool_chat_template=described.tool_chat_template,
                special_tokens=described.special_tokens,
                turn_end_ids=described.turn_end_ids,
            ),
            generation_defaults=described.generation_defaults,
            source=str(directory),
            packing=manifest.packing,
        )
    except BaseException:
        weights.close()
        raise


def verify(directory: Path, on_bytes: OnBytes = lambda name, count: None) -> list[Finding]:
    """Read a whole packed model and compare it with its checksums, file by file.

    Raises ModelError when the manifest cannot be read.
    """
    manifest = read_manifest(directory)
    return [Finding(name=MANIFEST, problem="")] + [
        Finding(name=name, problem=_problem(directory / name, file, True, on_bytes))
        for name, file in sorted(manifest.files.items())
    ]


# --- the manifest ---------------------------------------------------------------------------------


def manifest_bytes(manifest: Manifest) -> bytes:
    """The manifest's only valid encoding, which includes its own digest."""
    values = {"format": FORMAT, **asdict(manifest)}
    return json_bytes({"digest": sha256(json_bytes(values)), **values})


def read_manifest(directory: Path) -> Manifest:
    """Raises ModelError for a manifest that is absent, changed, or of another format."""
    path = directory / MANIFEST
    data = _read(path)
    values = _json_object(path, data)
    found = values.get("format")
    if type(found) is int and found != FORMAT:
        cure = "upgrade tilewright, or convert" if found > FORMAT else "convert"
        raise ModelError(
            f"{path}: packed in format {found}, but this version of tilewright reads format "
            f"{FORMAT}: {cure} the model again"
        )
    digest = values.pop("digest", None)
    if digest != sha256(json_bytes(values)) or data != json_bytes({"digest": digest, **values}):
        raise ModelError(f"{path}: changed since it was written: {_REPAIR}")
    del values["format"]
    if type(found) is not int:
        raise ModelError(f"{path}: 'format' must be {FORMAT}, found {found!r:.60}: {_REPAIR}")
    manifest = _structured(Manifest, values, path)
    _check_names(manifest, path)
    return manifest


def _check_names(manifest: Manifest, path: Path) -> None:
    """Check that each name is one that tilewright writes, so none leads out of the directory."""
    known = {MODEL, TOKENIZER, INDEX, *manifest.shards}
    odd = sorted(manifest.files.keys() - known)
    absent = sorted(known - manifest.files.keys())
    if odd or absent or not manifest.shards:
        what = f"found {printable(odd[0])}" if odd else f"{(absent or ['shards'])[0]} is not among"
        raise ModelError(
            f"{path}: the files of a packed model are {MODEL}, {TOKENIZER}, {INDEX} and "
            f"model-*-of-*.safetensors, but {what}{'' if odd else ' its files'}: {_REPAIR}"
        )
    for name, file in manifest.files.items():
        if (file.header_sha256 is None) == (name in manifest.shards) or file.bytes < 0:
            raise ModelError(
                f"{path}: the entry of {name} is not one that tilewright writes: {_REPAIR}"
            )


# --- files ----------------------------------------------------------------------------------------


def _problem(
    path: Path, file: File, whole: bool, on_bytes: OnBytes = lambda name, count: None
) -> str:
    """How a file differs from what was written; empty if it does not."""
    try:
        found = os.lstat(path)
        if not stat.S_ISREG(found.st_mode):
            folder = "a directory" if stat.S_ISDIR(found.st_mode) else "a device"
            what = "a link" if stat.S_ISLNK(found.st_mode) else folder
            return f"expected a file of {file.bytes} bytes, found {what}"
        if found.st_size != file.bytes:
            return f"expected {file.bytes} bytes, found {found.st_size}"
        changed = _changed(path, file, whole, on_bytes)
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return "changed since it was written" if changed else ""


def _changed(path: Path, file: File, whole: bool, on_bytes: OnBytes) -> bool:
    with path.open("rb", buffering=0) as opened:  # read no more than requested
        if not whole:
            start = opened.read(8)
            length = int.from_bytes(start, "little")
            if 8 + length > file.bytes:
                return True
            return sha256(start + opened.read(length)) != file.header_sha256
        digest = hashlib.sha256()
        while chunk := opened.read(CHUNK):
            digest.update(chunk)
            on_bytes(path.name, len(chunk))
        return digest.hexdigest() != file.sha256


def _check_places(weights: TensorSource, manifest: Manifest, directory: Path) -> None:
    """Raise ModelError when a tensor comes from a file that is not a shard."""
    shards = {str(directory / name) for name in manifest.shards}
    for name in weights.names():
        location = weights.info(name).location
        if location not in shards:
            raise ModelError(
                f"{directory}: tensor {printable(name)} is read from {location}, which does not "
                "belong to this packed model: remove that file"
            )


def _description(path: Path) -> Description:
    described = _structured(Description, _json_object(path, _read(path)), path)
    config = described.config
    sizes = [a.name for a in fields(ModelConfig) if a.type is int]
    bad = [f"{name} = {getattr(config, name)}" for name in sizes if getattr(config, name) < 1]
    if config.num_layers > _MOST_LAYERS:
        bad.append(f"num_layers = {config.num_layers}")
    if len(config.sliding_windows) not in (0, config.num_layers):
        bad.append(f"len(sliding_windows) = {len(config.sliding_windows)}")
    if bad:
        raise ModelError(f"{path}: invalid {bad[0]}: convert the model again")
    return described


def _tokenizer(path: Path) -> Any:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(_read(path).decode())
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # panics in tokenizers are not an Exception
        why = " ".join(str(error).split())[:300]
        raise ModelError(
            f"{path}: the tokenizers library cannot read it ({why}): {_REPAIR}"
        ) from error


def _read(path: Path) -> bytes:
    try:
        found = os.lstat(path)
        if not stat.S_ISREG(found.st_mode) or found.st_size > _MOST_TEXT:
            raise ModelError(
                f"{path}: expected a file of at most {_MOST_TEXT} bytes, not a link: {_REPAIR}"
            )
        return path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error


def _json_object(path: Path, data: bytes) -> dict[str, Any]:
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        why = str(error) if isinstance(error, ValueError) else "nested too deeply"
        raise ModelError(f"{path}: not valid JSON ({why}): {_REPAIR}") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path}: expected a JSON object, found {str(values)[:60]!r}: {_REPAIR}")
    return values


def _structured(cls: type[T], values: Mapping[str, Any], path: Path) -> T:
    try:
        return structure(cls, values, str(path))
    except ConfigError as error:
        raise ModelError(f"{error}: convert the model again") from error


def json_bytes(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=1, sort_keys=True) + "\n").encode()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
