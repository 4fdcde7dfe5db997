"""Weight format pytorch-bin: files of torch.save are read, and code in them does not run."""

import io
import json
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from model_directories import change_json, load, load_checked, write_directory
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tilewright import LLMEngine, plugins
from tilewright.errors import ModelError
from tilewright.loading import InstalledFormats
from tilewright.types import TensorSource

SINGLE, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


def open_weights(directory: Path, name: str = "pytorch-bin") -> TensorSource:
    return InstalledFormats(plugins.new_manager(), {}).open(directory, name)


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
        "int64": torch.arange(7),
        "bool": floats > 0,
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
        "parameter": torch.nn.Parameter(floats + 1),
        "tied": floats,
        "transposed": floats.T,
        "slice": floats[10:20],
    }


@pytest.fixture(params=[True, False], ids=["zip", "old"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.save(tensors(), tmp_path / SINGLE, _use_new_zipfile_serialization=request.param)
    return tmp_path


# --- reading --------------------------------------------------------------------------------------


def test_every_tensor_is_read_as_it_was_saved(saved: Path) -> None:
    source = open_weights(saved)
    expected = tensors()
    assert set(source.names()) == set(expected)
    for name, tensor in expected.items():
        info, found = source.info(name), source.get(name)
        assert torch.equal(found, tensor)
        assert found.is_contiguous()
        assert not found.requires_grad
        assert (info.shape, f"torch.{info.dtype}") == (tuple(tensor.shape), str(tensor.dtype))
        assert info.nbytes == tensor.numel() * tensor.element_size()
        assert info.location == str(saved / SINGLE)


def test_a_closed_source_refuses_reads_and_its_tensors_stay_valid(saved: Path) -> None:
    source = open_weights(saved)
    tensor = source.get("float32")
    source.close()
    source.close()
    with pytest.raises(ModelError, match="closed"):
        source.get("float32")
    assert torch.equal(tensor, tensors()["float32"])


def test_opening_reads_no_tensor(tmp_path: Path) -> None:
    torch.save({"big": torch.zeros(2**26), "one": torch.ones(1)}, tmp_path / SINGLE)
    before = _resident()
    source = open_weights(tmp_path)
    assert source.get("one").item() == 1
    assert source.get("big").shape == (2**26,)
    assert _resident() - before < 2**26, "a quarter of the tensor's bytes"


def _resident() -> int:
    """Resident memory of this process in bytes, including pages of mapped files."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_changing_a_tensor_does_not_change_the_file(tmp_path: Path) -> None:
    torch.save(tensors(), tmp_path / SINGLE)
    before = (tmp_path / SINGLE).read_bytes()
    open_weights(tmp_path).get("float32").zero_()
    assert (tmp_path / SINGLE).read_bytes() == before


# --- models ---------------------------------------------------------------------------------------


def to_pytorch(directory: Path, shards: int = 1) -> dict[str, torch.Tensor]:
    """Replace a directory's model.safetensors; returns its tensors."""
    single = directory / "model.safetensors"
    stored = load_file(single)
    single.unlink()
    if shards == 1:
        torch.save(stored, directory / SINGLE)
        return stored
    weight_map = {}
    for i in range(shards):
        file = f"pytorch_model-{i + 1:05}-of-{shards:05}.bin"
        part = {name: stored[name] for name in sorted(stored)[i::shards]}
        torch.save(part, directory / file)
        weight_map |= dict.fromkeys(part, file)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return stored


@pytest.mark.parametrize("shards", [1, 3])
def test_logits_match_transformers(tmp_path: Path, shards: int) -> None:
    write_directory(tmp_path)
    to_pytorch(tmp_path, shards)
    ids = list(range(3, 20))
    oracle = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    expected = oracle(torch.tensor([ids])).logits[0, -1].detach().log_softmax(-1)
    with LLMEngine.from_plugins() as engine:
        from tilewright import GenerateConfig

        engine.init_model("m", tmp_path)
        asked = GenerateConfig(max_new_tokens=1, temperature=0.0, logprobs=5, ignore_eos=True)
        result = engine.generate_result("m", ids, asked)
    assert result.logprobs is not None
    for token, logprob in result.logprobs[0].top:
        assert logprob == pytest.approx(float(expected[token]), abs=1e-3)


def test_safetensors_are_preferred_unless_a_format_is_named(tmp_path: Path) -> None:
    write_directory(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    torch.save({"only": torch.ones(1)}, tmp_path / SINGLE)
    formats = InstalledFormats(plugins.new_manager(), {})
    assert set(formats.open(tmp_path).names()) == set(stored)
    assert set(formats.open(tmp_path, "pytorch-bin").names()) == {"only"}


@pytest.mark.parametrize("aliased", [True, False])
def test_a_tied_head_is_dropped_only_if_it_shares_the_embedding(
    tmp_path: Path, aliased: bool
) -> None:
    write_directory(tmp_path)
    change_json(tmp_path / "config.json", tie_word_embeddings=True)
    stored = to_pytorch(tmp_path)
    embedding = stored["model.embed_tokens.weight"]
    stored["lm_head.weight"] = embedding if aliased else embedding.clone()
    torch.save(stored, tmp_path / SINGLE)
    model = load_checked(tmp_path)
    assert model.config.tie_word_embeddings is aliased
    assert ("lm_head.weight" in model.weights.names()) is not aliased
    assert any("separate lm_head.weight" in w for w in model.warnings) is not aliased


def test_an_untied_model_keeps_a_head_that_shares_the_embedding(tmp_path: Path) -> None:
    write_directory(tmp_path)
    stored = to_pytorch(tmp_path)
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"]
    torch.save(stored, tmp_path / SINGLE)
    assert "lm_head.weight" in load(tmp_path).weights.names()


# --- refused files --------------------------------------------------------------------------------


class Runs:
    """An object that pickle restores by calling a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


@pytest.mark.parametrize("function", [os.system, eval, exec, io.open_code, os.remove])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: Any, zipped: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    victim = tmp_path / "victim"
    victim.touch()
    argument = {
        os.system: "rm victim",
        eval: "__import__('os').remove('victim')",
        exec: "import os; os.remove('victim')",
    }.get(function, "victim")
    evil = {"a": torch.ones(2), "x": Runs(function, argument)}
    torch.save(evil, SINGLE, _use_new_zipfile_serialization=zipped)
    said = refusal(tmp_path)
    assert victim.exists()
    assert "refused: it contains" in said
    assert f"{function.__name__}, which may run code" in said
    if function in (os.system, os.remove):  # pickle itself runs the call
        torch.load(SINGLE, weights_only=False)
        assert not victim.exists()


@pytest.mark.parametrize(
    ("saved_object", "expected"),
    [
        ({"model": tensors(), "step": 3}, "expected a tensor under model, found dict"),
        ({"a": torch.ones(1), "step": 3}, "expected a tensor under step, found int"),
        (
            [torch.ones(1)],
            "expected tensors by name, as torch.save(model.state_dict(), ...)",
        ),
        ({1: torch.ones(1)}, "expected tensors by name, found a key 1"),
        ({"a": torch.ones(2, 2).to_sparse()}, "expected a dense tensor under a, found torch.spars"),
        ({"a": torch.ones(2, device="meta")}, "expected a dense tensor under a"),
        (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear, which may run code"),
    ],
    ids=["nested", "number", "list", "key", "sparse", "meta", "module"],
)
def test_a_file_that_is_not_a_state_dict_is_refused(
    tmp_path: Path, saved_object: Any, expected: str
) -> None:
    torch.save(saved_object, tmp_path / SINGLE)
    assert expected in refusal(tmp_path)


def test_a_state_dict_with_version_metadata_is_read(tmp_path: Path) -> None:
    state = torch.nn.Linear(3, 2).state_dict()
    assert isinstance(state, OrderedDict)
    torch.save(state, tmp_path / SINGLE)
    assert set(open_weights(tmp_path).names()) == {"weight", "bias"}


def _rezipped(data: bytes, change: Callable[[str, bytes], bytes | None], **kind: Any) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(made, "w", **kind) as new:
        for name in old.namelist():
            content = change(name.partition("/")[2], old.read(name))
            if content is not None:
                new.writestr(name, content)
    return made.getvalue()


def _where(part: str, content: bytes | None) -> Callable[[bytes], bytes]:
    return lambda data: _rezipped(data, lambda name, old: content if name == part else old)


def _longer(data: bytes) -> bytes:
    return _rezipped(data, lambda name, old: old + bytes(64) if name == "data/0" else old)


def _in_pickle(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    def change(name: str, content: bytes) -> bytes:
        return content.replace(old, new) if name == "data.pkl" else content

    return lambda data: _rezipped(data, change)


DAMAGED: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "an empty file; download it again"),
    "lfs": (lambda data: b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    "text": (lambda data: b"not found", "expected a zip file or a pickle"),
    "a web page": (lambda data: b"<html>not found</html>", "a web page instead of the file"),
    "cut at 10": (lambda data: data[:10], "damaged"),
    "cut at 2000": (lambda data: data[:2000], "damaged"),
    "cut near the end": (lambda data: data[:-30], "damaged"),
    "no end": (lambda data: data + b"x" * 70000, "damaged"),
    "zeroed": (lambda data: data[:4] + bytes(len(data) - 4), "damaged"),
    "no pickle": (_where("data.pkl", None), "damaged"),
    "empty pickle": (_where("data.pkl", b""), "damaged"),
    "other pickle": (_where("data.pkl", b"\x80\x02junk."), "damaged"),
    "no storage": (_where("data/0", None), "damaged"),
    "empty storage": (_where("data/0", b""), "damaged"),
    "short storage": (_where("data/0", bytes(100)), "damaged"),
    "long storage": (_longer, "damaged: its tensors take"),
    "huge shape": (_in_pickle(b"K(K\x19", b"J\xff\xff\xff\x7fJ\xff\xff\xff\x7f"), "damaged"),
    "other shape": (_in_pickle(b"K(K\x19", b"K\xffK\xff"), "damaged"),
    "compressed": (
        lambda data: _rezipped(data, lambda _, old: old, compression=zipfile.ZIP_DEFLATED),
        "its records are compressed",
    ),
    "other zip": (lambda data: _rezipped(data, lambda _, old: None), "damaged"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_a_one_line_error(tmp_path: Path, kind: str) -> None:
    file = tmp_path / SINGLE
    torch.save(tensors(), file)
    damage, expected = DAMAGED[kind]
    changed = damage(file.read_bytes())
    assert changed != file.read_bytes()
    file.write_bytes(changed)
    said = refusal(tmp_path)
    assert said.startswith(f"{file}: ")
    assert expected in said
    assert len(said) < 600


def test_a_repacked_unchanged_file_is_read(tmp_path: Path) -> None:
    """Shows that the damage above, not the repacking, is what was refused."""
    file = tmp_path / SINGLE
    torch.save(tensors(), file)
    file.write_bytes(_rezipped(file.read_bytes(), lambda _, old: old))
    source = open_weights(tmp_path)
    assert all(torch.equal(source.get(name), t) for name, t in tensors().items())


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_random_changes_are_a_one_line_error_or_change_only_values(saved: Path) -> None:
    file, random = saved / SINGLE, Random(5)
    original = file.read_bytes()
    outcomes = set()
    for _ in range(150):
        changed = bytearray(original)
        for _ in range(random.randint(1, 4)):
            changed[random.randrange(len(changed))] = random.randrange(256)
        file.write_bytes(changed)
        try:
            source = open_weights(saved)
            for name in source.names():
                source.get(name).double().sum()
            outcomes.add("read")
        except ModelError as error:
            outcomes.add("refused" if "\n" not in str(error) else str(error))
    assert outcomes == {"read", "refused"}


def test_pickles_of_other_protocols_are_refused(tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_bytes(pickle.dumps({"a": 1}))
    assert "expected a zip file or a pickle of protocol 2, found bytes 80 04" in refusal(tmp_path)


def test_missing_weights_are_an_error_that_lists_what_was_found(tmp_path: Path) -> None:
    assert f"expected {SINGLE}, or {INDEX} and its shards; found no weights" in refusal(tmp_path)
    (tmp_path / "weights.pth").touch()
    assert "found weights.pth" in refusal(tmp_path)
    (tmp_path / SINGLE).mkdir()
    assert "expected a file, found a directory" in refusal(tmp_path)


def test_an_index_must_agree_with_its_shards(tmp_path: Path) -> None:
    write_directory(tmp_path)
    to_pytorch(tmp_path, 3)
    gone = tmp_path / "pytorch_model-00002-of-00003.bin"
    kept = gone.read_bytes()
    weight_map = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    name = next(name for name, file in weight_map.items() if file == gone.name)
    gone.unlink()
    with pytest.raises(ModelError, match="1 of the 3 files that it names are missing: pytorch_mo"):
        open_weights(tmp_path).info(name)
    torch.save({"another": torch.ones(1)}, gone)
    with pytest.raises(ModelError, match="index and shards are from different checkpoints"):
        open_weights(tmp_path).info(name)
    gone.write_bytes(kept)
    open_weights(tmp_path)
