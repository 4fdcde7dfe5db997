"""Writes packed models (see ``format``) tensor by tensor; an interrupted run can be resumed.

Files are written to ``OUT.partial``, which is renamed to ``OUT`` when it is complete. Next to the
finished shards it holds ``unfinished.json``: a key of the conversion, and these shards' checksums.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

from attrs import asdict, frozen

from tilewright.errors import ConfigError, PluginError, TilewrightError
from tilewright.paths import path_of
from tilewright.types import LoadedModel, PackedTensor, Packing
from tilewright.weights import SAFETENSORS_DTYPES
from tilewright_packed.format import (
    CHUNK,
    INDEX,
    MANIFEST,
    MODEL,
    TOKENIZER,
    Description,
    File,
    Manifest,
    OnBytes,
    json_bytes,
    manifest_bytes,
    sha256,
)

UNFINISHED = "unfinished.json"
WRITING = ".writing"
"""Suffix of a file that is not complete."""

_CODES = {name: code for code, name in SAFETENSORS_DTYPES.items()}

_ALIGNMENT = 64
"""Alignment of a shard's first tensor, in bytes. Larger elements come first, so all are aligned."""

_SAMPLES, _SAMPLE = 64, 4096
"""The fingerprint covers this many blocks, of this many bytes, of each source file."""


@frozen(kw_only=True)
class Shard:
    """A safetensors file to be written."""

    name: str
    header: bytes
    tensors: Sequence[PackedTensor]
    """The tensors, in file order."""
    bytes: int


@frozen(kw_only=True)
class Plan:
    """What will be written, before any tensor is read."""

    loaded: LoadedModel
    packing: Packing
    fingerprint: str
    shards: Sequence[Shard]
    texts: Mapping[str, bytes]
    """All other files except the manifest, keyed by name."""

    @property
    def bytes(self) -> int:
        return sum(s.bytes for s in self.shards) + sum(map(len, self.texts.values()))


def plan(
    loaded: LoadedModel, packing: Packing, tensors: Sequence[PackedTensor], shard_bytes: int
) -> Plan:
    """Divide packed weights into shards of at most shard_bytes, or of one tensor if it is larger.

    Raises PluginError for weights that cannot be stored.
    """
    _check_tensors(tensors, packing)
    groups: list[list[PackedTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + _nbytes(tensor) > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += _nbytes(tensor)
    shards = [
        _shard(f"model-{i:05}-of-{len(groups):05}.safetensors", group)
        for i, group in enumerate(groups, 1)
    ]
    index = {
        "metadata": {"total_size": sum(map(_nbytes, tensors))},
        "weight_map": {t.name: shard.name for shard in shards for t in shard.tensors},
    }
    text = loaded.text
    described = Description(
        config=loaded.config,
        generation_defaults=loaded.generation_defaults,
        chat_template=text.chat_template,
        tool_chat_template=text.tool_chat_template,
        special_tokens=text.special_tokens,
        turn_end_ids=text.turn_end_ids,
    )
    return Plan(
        loaded=loaded,
        packing=packing,
        fingerprint=fingerprint(loaded),
        shards=shards,
        texts={
            MODEL: json_bytes(asdict(described)),
            TOKENIZER: text.tokenizer.to_str().encode(),
            INDEX: json_bytes(index),
        },
    )


def convert(plan: Plan, out: Path, on_bytes: OnBytes = lambda name, count: None) -> Manifest:
    """Write a packed model to a directory that does not exist yet.

    on_bytes is called for each shard's bytes, whether written now or found complete from an
    earlier run. After an interruption, the same call resumes with the next shard.

    Raises ConfigError when the directory exists or cannot be written, its disk has too little
    space, or an earlier run left another conversion behind; ModelError for a source that cannot be
    read, in which case a directory that this run began is removed.
    """
    out = Path(os.path.abspath(path_of(out)))
    _check_free(out)
    partial = out.with_name(f"{out.name}.partial")
    key = _key(plan)
    begun = not os.path.lexists(partial)
    if begun:
        _check_room(plan.bytes, out.parent)
        try:
            partial.mkdir()
        except FileExistsError:
            begun = False
    with _locked(partial):
        try:
            finished = _finished(partial, key, plan, on_bytes)
            _check_room(plan.bytes - sum(f.bytes for f in finished.values()), out.parent)
            _write(partial / UNFINISHED, _progress(key, finished))
            for shard in plan.shards:
                if shard.name not in finished:
                    finished[shard.name] = _write_shard(partial / shard.name, shard, on_bytes)
                    _write(partial / UNFINISHED, _progress(key, finished))
            manifest = _write_texts(partial, plan, finished)
            _check_free(out)
            partial.rename(out)
        except TilewrightError:
            # A repaired source is a different source: there is nothing to resume.
            if begun:
                shutil.rmtree(partial)
            raise
        except OSError as error:
            raise ConfigError(
                f"{partial} cannot be written: {error.strerror or error}; shards that are complete "
                "are kept: the same call continues with the next one"
            ) from error
        (out / UNFINISHED).unlink()
        _sync_directory(out.parent)
    return manifest


def fingerprint(loaded: LoadedModel) -> str:
    """SHA-256 that identifies a model without reading all of it.

    It covers configuration, tokenizer, all tensors' names, shapes and dtypes, and the size and 64
    blocks of 4 KiB of each file that holds weights.
    """
    digest = hashlib.sha256(json_bytes(asdict(loaded.config)))
    digest.update(loaded.text.tokenizer.to_str().encode())
    infos = {name: loaded.weights.info(name) for name in sorted(loaded.weights.names())}
    headers = {name: [*i.shape, i.dtype, i.nbytes] for name, i in infos.items()}
    digest.update(json_bytes(headers))
    for path in _files(loaded):
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(f"{path.name} {size}".encode())
            for i in range(_SAMPLES):
                file.seek(i * max(0, size - _SAMPLE) // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE))
    return digest.hexdigest()


def _files(loaded: LoadedModel) -> list[Path]:
    """The files that hold a model's weights, as reported by its loader."""
    names = {loaded.weights.info(name).location for name in loaded.weights.names()}
    return sorted(path for path in map(Path, names) if path.is_file())


# --- the plan -------------------------------------------------------------------------------------


def _check_tensors(tensors: Sequence[PackedTensor], packing: Packing) -> None:
    counts = Counter(t.name for t in tensors)
    twice = next((name for name, count in counts.items() if count > 1), None)
    odd = next((t for t in tensors if t.dtype not in _CODES), None)
    if not tensors or twice or odd:
        what = f"{twice!r} twice" if twice else f"{odd.name!r} in {odd.dtype}" if odd else "none"
        raise PluginError(
            f"pack_weights of executor {packing.executor} must return tensors with unique "
            f"names, in one of {', '.join(_CODES)}, found {what}"
        )


def _nbytes(tensor: PackedTensor) -> int:
    return prod(tensor.shape) * _itemsize(tensor)


def _itemsize(tensor: PackedTensor) -> int:
    import torch

    dtype: torch.dtype = getattr(torch, tensor.dtype)
    return dtype.itemsize


def _shard(name: str, tensors: Sequence[PackedTensor]) -> Shard:
    ordered = sorted(tensors, key=_itemsize, reverse=True)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in ordered:
        start, end = end, end + _nbytes(tensor)
        header[tensor.name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    encoded = len(text).to_bytes(8, "little") + text
    return Shard(name=name, header=encoded, tensors=ordered, bytes=len(encoded) + end)


def _key(plan: Plan) -> str:
    """A key that differs whenever the output may differ."""
    parts = {
        "packing": asdict(plan.packing),
        "fingerprint": plan.fingerprint,
        "modified": [path.stat().st_mtime_ns for path in _files(plan.loaded)],
        "headers": [sha256(shard.header) for shard in plan.shards],
        "texts": [sha256(text) for text in plan.texts.values()],
    }
    return sha256(json_bytes(parts))


# --- what an earlier run left ---------------------------------------------------------------------


def _check_free(out: Path) -> None:
    if os.path.lexists(out):
        raise ConfigError(f"{out} already exists: choose another --out, or remove it")
    if not out.parent.is_dir():
        raise ConfigError(f"{out}: the directory {out.parent} does not exist: create it first")


def _check_room(needed: int, directory: Path) -> None:
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise ConfigError(
            f"{directory} has {free} bytes free and {needed} are needed: free space there, or "
            "choose an --out on another disk"
        )


@contextmanager
def _locked(partial: Path) -> Iterator[None]:
    busy = ConfigError(f"{partial} is being written by another process")
    try:
        descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        raise busy from None
    except NotADirectoryError:
        raise ConfigError(
            f"{partial} is not a directory: remove it, or choose another --out"
        ) from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The previous holder of the lock may have renamed or removed the directory.
            same = os.path.samestat(os.fstat(descriptor), os.stat(partial))
        except (BlockingIOError, FileNotFoundError):
            same = False
        if not same:
            raise busy
        yield
    finally:
        os.close(descriptor)


def _finished(partial: Path, key: str, plan: Plan, on_bytes: OnBytes) -> dict[str, File]:
    """The complete, intact shards. Raises ConfigError if they belong to another conversion."""
    names = os.listdir(partial)
    for name in names:
        if name.endswith(WRITING):
            (partial / name).unlink()
    if all(name.endswith(WRITING) for name in names):
        return {}
    try:
        progress = json.loads((partial / UNFINISHED).read_bytes())
        same = progress["key"] == key
        sums = {str(name): str(sum) for name, sum in progress["shards"].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        same = False
    if not same:
        raise ConfigError(
            f"{partial} holds an unfinished conversion of another source, or with other options: "
            "remove it, or choose another --out"
        )
    finished = {}
    for shard in plan.shards:
        path = partial / shard.name
        if shard.name in sums and path.is_file() and path.stat().st_size == shard.bytes:
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while chunk := file.read(CHUNK):
                    digest.update(chunk)
            if digest.hexdigest() == sums[shard.name]:
                finished[shard.name] = _file(shard, sums[shard.name])
                on_bytes(shard.name, shard.bytes)
    return finished


def _progress(key: str, finished: Mapping[str, File]) -> bytes:
    return json_bytes({"key": key, "shards": {name: f.sha256 for name, f in finished.items()}})


# --- writing --------------------------------------------------------------------------------------


def _file(shard: Shard, digest: str) -> File:
    return File(bytes=shard.bytes, sha256=digest, header_sha256=sha256(shard.header))


def _write_shard(path: Path, shard: Shard, on_bytes: OnBytes) -> File:
    digest = hashlib.sha256()
    with open(f"{path}{WRITING}", "wb") as file:

        def put(data: Any) -> None:
            file.write(data)
            digest.update(data)
            on_bytes(shard.name, len(data))

        put(shard.header)
        for tensor in shard.tensors:
            data = _bytes_of(tensor)
            for start in range(0, len(data), CHUNK):
                put(data[start : start + CHUNK])
            del data  # before the next one is made
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)
    return _file(shard, digest.hexdigest())


def _bytes_of(tensor: PackedTensor) -> memoryview:
    import torch

    read = tensor.read()
    found = (tuple(read.shape), str(read.dtype).removeprefix("torch."))
    if found != (tensor.shape, tensor.dtype):
        raise PluginError(
            f"packed tensor {tensor.name!r} must be {list(tensor.shape)} {tensor.dtype}, as its "
            f"executor declared it, found {list(found[0])} {found[1]}"
        )
    return read.contiguous().flatten().view(torch.uint8).numpy().data


def _write_texts(partial: Path, plan: Plan, shards: Mapping[str, File]) -> Manifest:
    for name, text in plan.texts.items():
        _write(partial / name, text)
    texts = {n: File(bytes=len(text), sha256=sha256(text)) for n, text in plan.texts.items()}
    manifest = Manifest(
        packing=plan.packing,
        source=Path(plan.loaded.source).name,
        fingerprint=plan.fingerprint,
        files={**shards, **texts},
    )
    _write(partial / MANIFEST, manifest_bytes(manifest))
    _sync_directory(partial)
    return manifest


def _write(path: Path, data: bytes) -> None:
    with open(f"{path}{WRITING}", "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
