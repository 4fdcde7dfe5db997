"""examples/third_party as its users get it: a wheel, in a virtual environment of its own."""

import io
import json
import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import plugin_distributions as dists
import pytest
from checkout import ROOT

from tilewright import GenerateConfig, LLMEngine, RuntimeConfig
from tilewright.cli import main
from tilewright_testing.models import make_model, write_hf_directory

EXAMPLE = ROOT / "examples" / "third_party"
PIP = [sys.executable, "-m", "pip"]
PARTS = {
    "loader": "acme-model",
    "weight_format": "npz",
    "sampler": "typical",
    "observer": "chrome-trace",
}
PROMPT = "t5 t6 t7"

Tilewright = Callable[..., str]


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The core's and the example's."""
    folder = tmp_path_factory.mktemp("wheels")
    build = [*PIP, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*build, str(ROOT), str(EXAMPLE)], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def environment(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh virtual environment with both; dependencies such as torch are this one's."""
    environment = tmp_path_factory.mktemp("environment") / "venv"
    venv.create(environment, with_pip=False)
    (site,) = environment.glob("lib/python*/site-packages")
    python = str(environment / "bin" / "python")
    install = [*PIP, "--python", python, "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*install, *map(str, wheels.glob("*.whl"))], check=True, capture_output=True)
    # Its .pth files, such as that of an editable tilewright, are not read there.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return environment


@pytest.fixture
def tilewright(environment: Path, tmp_path: Path) -> Tilewright:
    """Runs the command there, in an empty folder; returns what it prints."""

    def run(*words: str) -> str:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "TILEWRIGHT"))}
        command = [str(environment / "bin" / "tilewright"), *words]
        done = subprocess.run(command, cwd=tmp_path, env=kept, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture
def site(wheels: Path, tmp_path: Path) -> Iterator[Path]:
    """The example's wheel on this process's own path."""
    with dists.on_path(tmp_path / "site"):
        (wheel,) = wheels.glob("acme_tilewright-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(tmp_path / "site")
        yield tmp_path / "site"


@pytest.fixture
def sample(site: Path, tmp_path: Path) -> Path:
    """A model in the layout of the example's loader, in its own weight format."""
    from acme_tilewright.loader import write_sample

    folder = tmp_path / "sample"
    folder.mkdir()
    return Path(write_sample(folder).source)


def test_each_part_is_selected_by_name_and_by_run_file(
    tilewright: Tilewright, sample: Path, tmp_path: Path
) -> None:
    listed = json.loads(tilewright("plugins", "list", "--json"))
    ours = {p["kind"]: p for p in listed if p["distribution"] == "acme-tilewright"}
    assert {kind: p["name"] for kind, p in ours.items()} == PARTS
    assert {p["state"] for p in ours.values()} == {"ok"}

    shown = re.search(r"```toml\n(.*?)```", (EXAMPLE / "README.md").read_text(), re.DOTALL)
    assert shown
    run_file = tmp_path / "run.toml"
    run_file.write_text(shown[1].replace('"DIR"', f'"{sample}"').replace("trace.json", "file.json"))
    words = ["--seed", "3", "--max-new-tokens", "8"]
    by_file = tilewright("run", str(run_file), *words, "--prompt", PROMPT)
    by_name = tilewright(
        *("generate", "--model", str(sample), "--loader", "acme-model", "--format", "npz"),
        *("--sampler", "typical", "-o", "sampler.mass=0.9", "--observer", "chrome-trace"),
        *("-o", "observer.chrome-trace.path=name.json", "--temperature", "1", *words, PROMPT),
    )
    assert len(by_file.split()) == 8
    assert by_file == by_name
    for name in ("file.json", "name.json"):
        events = json.loads((tmp_path / name).read_text())["traceEvents"]
        steps = [e["name"] for e in events if e.get("cat") == "steps"]
        assert steps == ["prefill", *["decode"] * 7]
    assert not list(tmp_path.glob("*.partial"))


def test_another_mass_draws_other_tokens(sample: Path) -> None:
    config = GenerateConfig(temperature=1.5, seed=3, max_new_tokens=8)
    texts = []
    for mass in (0.05, 1.0):
        options = {"sampler": {"mass": mass}}
        with LLMEngine.from_plugins(sampler="typical", options=options) as engine:
            engine.init_model("m", sample)
            texts.append(engine.generate("m", PROMPT, config))
    assert texts[0] != texts[1]


def test_it_is_the_model_that_a_hugging_face_directory_holds(sample: Path, tmp_path: Path) -> None:
    directory = write_hf_directory(make_model(), tmp_path / "hf")
    found = []
    for source in (sample, directory):
        with LLMEngine.from_plugins() as engine:
            engine.init_model("m", source, RuntimeConfig(weight_dtype="float32"))
            config = GenerateConfig(max_new_tokens=12, ignore_eos=True, logprobs=0)
            (result,) = engine.generate_batch("m", [PROMPT], config)
            found.append((result.token_ids, result.logprobs))
    assert found[0] == found[1]


def test_its_own_tests_pass(site: Path) -> None:
    tests = [str(path) for path in (EXAMPLE / "tests").glob("test_*.py")]
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", str(EXAMPLE)]
    quiet = {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = dists.run("-m", "pytest", *options, *tests, site=site, **quiet)
    assert done.code == 0, done.out[-5000:]


# --- damaged npz files ----------------------------------------------------------------------------


def npz(path: Path, change: Callable[[dict[str, bytes]], object], compression: int = 0) -> None:
    """Write a file's members again, changed."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def patch(path: Path, at: int, data: bytes) -> None:
    raw = bytearray(path.read_bytes())
    raw[at : at + len(data) or None] = data
    path.write_bytes(raw)


def find(path: Path, what: bytes, last: bool = False) -> int:
    raw = path.read_bytes()
    return raw.rindex(what) if last else raw.index(what)


def array(*shape: int, dtype: str = "float32") -> bytes:
    out = io.BytesIO()
    np.save(out, np.zeros(shape, dtype))
    return out.getvalue()


def header(old: bytes, new: bytes) -> Callable[[Path], object]:
    """Change the first array's header, which keeps its length."""
    assert len(old) == len(new)
    return lambda p: npz(p, lambda m: m.update({HEAD: m[HEAD].replace(old, new, 1)}))


HEAD, NORM = "embed_tokens.npy", "norm.npy"

DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda p: p.write_bytes(b""),
    "a byte": lambda p: p.write_bytes(b"P"),
    "zeros": lambda p: p.write_bytes(bytes(5000)),
    "a web page": lambda p: p.write_text("<html>404</html>\n" * 99),
    "a pointer of git lfs": lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\n"),
    "cut in half": lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]),
    "cut by a byte": lambda p: p.write_bytes(p.read_bytes()[:-1]),
    "its beginning cut off": lambda p: p.write_bytes(p.read_bytes()[100:]),
    "a byte of a tensor": lambda p: patch(p, 1000, bytes([p.read_bytes()[1000] ^ 1])),
    "encrypted": lambda p: patch(p, find(p, b"PK\1\2") + 8, b"\1"),
    "of an unknown compression": lambda p: patch(p, find(p, b"PK\1\2") + 10, b"\x63"),
    "a wrong offset": lambda p: patch(p, find(p, b"PK\1\2") + 42, b"\xff\xff\xff\x7f"),
    "no array": lambda p: npz(p, lambda m: m.update({NORM: b"hello"})),
    "an empty array file": lambda p: npz(p, lambda m: m.update({NORM: b""})),
    "an array of a future version": header(b"NUMPY\1", b"NUMPY\7"),
    "a header that is no Python": header(b"{'descr'", b"{'descr("),
    "objects": header(b"'<f4'", b"'|O' "),
    "another byte order": header(b"'<f4'", b"'>f4'"),
    "a header that does not end": header(b"(131, 48)", b"(9999999,"),
    "a huge shape": header(b"(131, 48)", b"(9999999)"),
    "a negative shape": header(b"(131, 48)", b"(-13, 48)"),
    "another shape": lambda p: npz(p, lambda m: m.update({NORM: array(47)})),
    "integers": lambda p: npz(p, lambda m: m.update({NORM: array(48, dtype="int32")})),
    "a missing tensor": lambda p: npz(p, lambda m: m.pop(NORM)),
    "another file inside": lambda p: npz(p, lambda m: m.update({"README": b"hello"})),
    "no tensor at all": lambda p: npz(p, lambda m: m.clear()),
    "not there": lambda p: p.unlink(),
    "a directory": lambda p: (p.unlink(), p.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_npz_file_is_an_error_of_one_line(
    damage: str, sample: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    DAMAGES[damage](sample / "model.npz")
    before = sorted(sample.iterdir())
    words = ["generate", "--model", str(sample), "--format", "npz", "--max-new-tokens", "1", "t5"]
    assert main(words) == 2
    told = capsys.readouterr()
    (line,) = told.err.splitlines()
    assert line.startswith("tilewright: error: ")
    assert str(sample) in line
    assert not told.out
    assert sorted(sample.iterdir()) == before


def test_a_tensor_too_many_is_a_warning(sample: Path, capsys: pytest.CaptureFixture[str]) -> None:
    npz(sample / "model.npz", lambda m: m.update({"spare.npy": array(3)}))
    assert main(["generate", "--model", str(sample), "--max-new-tokens", "1", "t5"]) == 0
    told = capsys.readouterr()
    assert told.out
    assert "ignored (1 in all): spare" in told.err
