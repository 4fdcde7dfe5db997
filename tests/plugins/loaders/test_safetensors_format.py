"""Weight format safetensors: tensors as the safetensors library reads them, and checked headers."""

import gc
import json
import re
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_directories import split_weights
from safetensors.torch import load_file, save_file

from tilewright import plugins
from tilewright.errors import ConfigError, ModelError
from tilewright.plugins import read_options
from tilewright.types import TensorSource

BACKENDS = ("mmap", "pread")


def plugin() -> Any:
    return plugins.load(plugins.find("weight_format", "safetensors"))


def open_weights(directory: Path, **options: Any) -> TensorSource:
    read = read_options("weight format 'safetensors'", plugins.info(plugin()), options)
    source: TensorSource = plugins.call(plugin(), "open_weights", directory=directory, options=read)
    return source


def refusal(directory: Path) -> str:
    with pytest.raises(ModelError) as error:
        open_weights(directory)
    message = str(error.value)
    assert "\n" not in message
    return message


def tensors() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    floats = torch.randn(40, 25, generator=random)
    return {
        "float32": floats,
        "bfloat16": floats.bfloat16(),
        "float16": floats[:3].half(),
        "float64": floats[:, 0].double().contiguous(),
        "float8_e4m3fn": floats.to(torch.float8_e4m3fn),
        "float8_e5m2": floats.to(torch.float8_e5m2),
        "int64": torch.arange(7),
        "uint8": torch.arange(9, dtype=torch.uint8),
        "bool": floats > 0,
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
    }


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    save_file(tensors(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


# --- reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sharded", [False, True])
def test_every_tensor_matches_the_safetensors_library(
    directory: Path, backend: str, sharded: bool
) -> None:
    expected = load_file(directory / "model.safetensors")
    if sharded:
        split_weights(directory)
    source = open_weights(directory, backend=backend)
    assert set(source.names()) == set(expected)
    for name, tensor in expected.items():
        read = source.get(name)
        assert read.dtype == tensor.dtype
        assert torch.equal(read.float(), tensor.float())
        info = source.info(name)
        assert info.shape == tuple(tensor.shape)
        assert info.dtype == str(tensor.dtype).removeprefix("torch.")
        assert info.nbytes == tensor.nbytes
        if tensor.dim() and len(tensor) > 1:
            assert torch.equal(source.get_rows(name, 1, 2).float(), tensor[1:2].float())
        assert Path(info.location).parent == directory
    with pytest.raises(KeyError):
        source.info("absent")


def private_kib() -> int:
    """Resident memory of this process that is mapped from no file, after garbage collection."""
    gc.collect()
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1])


def mappings_of(path: Path) -> list[tuple[range, int]]:
    """Where this process has mapped a file: addresses, and KiB that are resident."""
    found = []
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match("[0-9a-f]+-[0-9a-f]+ ", line):
            addresses, *_, name = line.split(maxsplit=5)
            start, end = (int(address, 16) for address in addresses.split("-"))
        elif line.startswith("Rss:") and name == str(path):
            found.append((range(start, end), int(line.split()[1])))
    return found


@pytest.mark.parametrize(("backend", "own"), [("mmap", False), ("pread", True)])
def test_mapped_tensors_take_no_private_memory(tmp_path: Path, backend: str, own: bool) -> None:
    kib = 64 * 1024
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(kib * 256)}, path)
    before = private_kib()
    source = open_weights(tmp_path, backend=backend)
    assert private_kib() - before < kib / 8  # nothing is read on opening
    first, second = source.get("a"), source.get("a")
    assert first.sum() == second.sum() == kib * 256
    mapped = [addresses for addresses, _ in mappings_of(path)]
    for tensor in (first, second):
        assert any(tensor.data_ptr() in addresses for addresses in mapped) is not own
    # Memory that was freed before may be taken again: the growth has no lower limit.
    assert own or private_kib() - before < kib / 8
    assert (first.data_ptr() == second.data_ptr()) is not own


def test_the_pages_of_a_tensor_are_dropped_with_it(tmp_path: Path) -> None:
    def resident() -> int:
        return sum(kib for _, kib in mappings_of(path))

    kib = 64 * 1024
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(64, kib * 4)}, path)
    source = open_weights(tmp_path)
    before = resident()
    rows = source.get("a")[:32]
    assert rows.sum() == rows.numel()
    assert resident() - before > kib / 3
    del rows
    assert resident() - before < kib / 8
    assert source.get("a")[40, 7] == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_can_read_concurrently(directory: Path, backend: str) -> None:
    expected = load_file(directory / "model.safetensors")
    source = open_weights(directory, backend=backend)
    wrong: list[object] = []

    def read() -> None:
        try:
            for _ in range(50):
                for name, tensor in expected.items():
                    if not torch.equal(source.get(name).float(), tensor.float()):
                        wrong.append(name)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_closed_source_refuses_reads_and_its_tensors_stay_valid(
    directory: Path, backend: str
) -> None:
    source = open_weights(directory, backend=backend)
    tensor = source.get("float32")
    source.close()
    source.close()
    uses: list[Callable[[], object]] = [
        lambda: source.get("float32"),
        lambda: source.info("float32"),
        lambda: source.names(),
    ]
    for use in uses:
        with pytest.raises(ModelError, match="closed"):
            use()
    assert torch.equal(tensor, tensors()["float32"])


def test_an_unknown_backend_is_refused(directory: Path) -> None:
    with pytest.raises(ConfigError, match="backend"):
        open_weights(directory, backend="mpread")


# --- file names -----------------------------------------------------------------------------------


def test_other_copies_of_the_weights_are_ignored(directory: Path) -> None:
    for name in (
        "consolidated.safetensors",
        "pytorch_model.bin",
        "model-00001-of-00002.safetensors",
    ):
        (directory / name).write_bytes(b"not looked at")
    assert set(open_weights(directory).names()) == set(tensors())
    split_weights(directory)
    assert set(open_weights(directory).names()) == set(tensors())


def test_links_are_followed(directory: Path, tmp_path: Path) -> None:
    """The hub's cache holds links to blobs."""
    blob = tmp_path / "blob"
    (directory / "model.safetensors").rename(blob)
    (directory / "model.safetensors").symlink_to("blob")
    assert set(open_weights(directory).names()) == set(tensors())
    blob.unlink()
    assert "a link to 'blob', which does not exist" in refusal(directory)


def test_can_open_checks_only_file_names(tmp_path: Path) -> None:
    def can_open() -> bool:
        return bool(plugins.call(plugin(), "can_open", directory=tmp_path))

    (tmp_path / "pytorch_model.bin").touch()
    assert not can_open()
    assert "pytorch_model.bin" in refusal(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert can_open()
    (tmp_path / "model.safetensors").rename(tmp_path / "model.safetensors.index.json")
    assert can_open()
    assert not plugins.call(plugin(), "can_open", directory=tmp_path / "absent")
    assert "no weights" in refusal(tmp_path / "absent")


def test_shards_without_an_index_must_all_be_there(directory: Path) -> None:
    split_weights(directory)
    (directory / "model.safetensors.index.json").unlink()
    assert set(open_weights(directory).names()) == set(tensors())
    (directory / "model-00001-of-00003.safetensors").unlink()
    assert "1 of the 3 shards are missing: model-00001-of-00003.saf" in refusal(directory)


# --- damaged files --------------------------------------------------------------------------------


def header(tensor: dict[str, Any]) -> bytes:
    text = json.dumps({"a": tensor}).encode()
    return struct.pack("<Q", len(text)) + text


ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 988097824\n"

DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "an empty file"),
    "a Git LFS pointer": (POINTER, "git lfs pull"),
    "a web page": (b"<!doctype html><html></html>", "a web page instead of the file"),
    "a pickle": (b"\x80\x02}q\x00(X\x05\x00\x00\x00layer", "not a safetensors file"),
    "shorter than a length": (b"\x08\x00", "not a safetensors file"),
    "a header that is cut": (header(ONE)[:30], "truncated"),
    "a header longer than any": (struct.pack("<Q", 2**63) + b"{}", "not a safetensors file"),
    "data that is cut": (
        header(ONE) + b"123",
        f"truncated: expected {len(header(ONE)) + 4} bytes, found {len(header(ONE)) + 3}",
    ),
    "no data": (header(ONE), "truncated"),
    "data after the end": (header(ONE) + b"12345", "not a valid safetensors file"),
    "no JSON": (struct.pack("<Q", 4) + b"{abc", "not a safetensors file"),
    "a list": (struct.pack("<Q", 2) + b"[]", "not a safetensors file"),
    "an unknown dtype": (header(ONE | {"dtype": "F99"}) + b"1234", "F99"),
    "a shape that does not fit": (header(ONE | {"shape": [2]}) + b"1234", "not a valid"),
    "a shape that overflows": (header(ONE | {"shape": [2**62, 8]}) + b"1234", "overflow"),
    "offsets backwards": (header(ONE | {"data_offsets": [4, 0]}) + b"1234", "invalid offset"),
    "offsets that are no numbers": (header(ONE | {"data_offsets": ["a"]}) + b"1234", "not a"),
    "a negative shape": (header(ONE | {"shape": [-1]}) + b"1234", "not a"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_an_error_that_says_what_is_wrong(kind: str, tmp_path: Path) -> None:
    content, why = DAMAGED[kind]
    (tmp_path / "model.safetensors").write_bytes(content)
    message = refusal(tmp_path)
    assert message.startswith(f"{tmp_path / 'model.safetensors'}: ")
    assert why in message


def test_a_directory_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    assert "found a directory" in refusal(tmp_path)


# --- the index ------------------------------------------------------------------------------------


@pytest.fixture
def weight_map(directory: Path) -> dict[str, str]:
    return split_weights(directory)


def write_index(directory: Path, weight_map: object) -> None:
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))


def test_all_missing_shards_are_named(directory: Path, weight_map: dict[str, str]) -> None:
    files = sorted(set(weight_map.values()))
    for file in files[1:]:
        (directory / file).unlink()
    source = open_weights(directory)
    lost = [name for name, file in weight_map.items() if file != files[0]]
    assert set(weight_map) == set(source.names())
    with pytest.raises(ModelError, match="2 of the 3 files") as error:
        source.info(lost[0])
    message = str(error.value)
    with pytest.raises(ModelError, match="2 of the 3 files"):
        source.get(lost[-1])
    assert files[1] in message
    assert files[2] in message
    assert files[0] not in message
    (directory / files[0]).unlink()
    assert "3 of the 3 files" in refusal(directory)


def test_a_truncated_shard_is_named(directory: Path, weight_map: dict[str, str]) -> None:
    shard = directory / weight_map["float32"]
    shard.write_bytes(shard.read_bytes()[:-1])
    message = refusal(directory)
    assert message.startswith(f"{shard}: truncated")


@pytest.mark.parametrize(
    "file",
    ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "", "a\0b", "a\nb", 3],
)
def test_an_index_cannot_name_a_file_outside_its_directory(
    directory: Path, weight_map: dict[str, str], file: object
) -> None:
    write_index(directory, weight_map | {"float32": file})
    assert "tensor float32 must be in a file of the same directory" in refusal(directory)


@pytest.mark.parametrize("value", [{}, None, [], "model.safetensors"])
def test_an_index_without_a_valid_weight_map_is_refused(
    directory: Path, weight_map: dict[str, str], value: object
) -> None:
    write_index(directory, value)
    assert "weight_map" in refusal(directory)


def test_an_index_may_list_a_tensor_in_another_shard_but_not_one_that_none_has(
    directory: Path, weight_map: dict[str, str]
) -> None:
    file, other = weight_map["float32"], weight_map["bfloat16"]
    assert file != other
    write_index(directory, weight_map | {"float32": other, "absent": file})
    source = open_weights(directory)
    assert torch.equal(source.get("float32"), tensors()["float32"])
    with pytest.raises(ModelError, match="for tensor absent, which is in none of the shards"):
        source.info("absent")


def test_a_tensor_in_two_shards_is_refused_unless_the_index_lists_it_in_one_of_them(
    directory: Path, weight_map: dict[str, str]
) -> None:
    file, other = weight_map["float32"], weight_map["bfloat16"]
    save_file(load_file(directory / other) | {"float32": torch.zeros(2)}, directory / other)
    assert torch.equal(open_weights(directory).get("float32"), tensors()["float32"])
    write_index(directory, {n: f for n, f in weight_map.items() if n != "float32"})
    message = refusal(directory)
    assert "tensor float32 is in two shards" in message
    assert file in message
    assert other in message
