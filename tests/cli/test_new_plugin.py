"""``tilewright plugins new``: writes distributions that install and pass their own checks."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import plugin_distributions as dists
import pytest
from checkout import ROOT

from tilewright import plugins
from tilewright.cli import main
from tilewright_kernels.qwen3_14b import plugin as qwen3
from tilewright_testing import KernelsSuite, LoaderSuite

KINDS = list(plugins.KINDS)
SET = "kernels"  # its tests are run in tests/plugins/third_party, as they take a minute


def name(kind: str) -> str:
    return f"acme-{kind.replace('_', '-')}"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a new distribution for each kind."""
    folder = tmp_path_factory.mktemp("new")
    for kind in KINDS:
        assert main(["plugins", "new", kind, name(kind), "--out", str(folder / kind)]) == 0
    return folder


@pytest.fixture(scope="module")
def site(written: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder where the new distributions are installed."""
    site = tmp_path_factory.mktemp("site") / "packages"
    folders = [str(written / kind) for kind in KINDS]
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*pip, "--target", str(site), *folders], check=True, capture_output=True)
    return site


def test_new_plugins_of_all_kinds_are_found_and_pass_check(site: Path) -> None:
    done = dists.run("-m", "tilewright", "plugins", "check", "--json", site=site)
    assert done.code == 0, done.err
    found = {p["name"]: p for p in json.loads(done.out) if p["name"].startswith("acme-")}
    for kind in KINDS:
        plugin = found.pop(name(kind))
        assert (plugin["kind"], plugin["state"]) == (kind, "ok")
        assert plugin["distribution"] == f"tilewright-{name(kind)}"
        assert plugin["where"] == str(site)
        assert (site / f"tilewright_{name(kind).replace('-', '_')}" / "py.typed").exists()
    assert not found


@pytest.mark.slow
def test_new_plugins_pass_their_tests(written: Path, site: Path) -> None:
    folders = [str(written / kind / "tests") for kind in KINDS if kind != SET]
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", str(written)]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = dists.run("-m", "pytest", *options, *folders, site=site, **environment)
    assert done.code == 0, done.out[-5000:]
    assert "passed" in done.out
    assert "failed" not in done.out


@pytest.mark.slow
def test_new_plugins_pass_their_type_check(written: Path, site: Path) -> None:
    # What a kernel set adds to the settings names its own modules.
    config = written / SET / "pyproject.toml"
    parts = [str(written / kind / part) for kind in KINDS for part in ("src", "tests")]
    options = ["--config-file", str(config), "--cache-dir", str(written / "mypy")]
    done = dists.run("-m", "mypy", *options, *parts, site=site)
    assert done.code == 0, done.out + done.err


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_plugin_asks_for_strict_type_checks(written: Path, kind: str) -> None:
    settings = tomllib.loads((written / kind / "pyproject.toml").read_text())
    assert settings["tool"]["mypy"]["strict"] is True


@pytest.mark.parametrize("kind", KINDS)
def test_no_placeholder_of_the_template_is_left(written: Path, kind: str) -> None:
    files = {p: p.read_text() for p in (written / kind).rglob("*") if p.is_file()}
    assert len(files) == (12 if kind == SET else 6)
    for path, text in files.items():
        for word in ("my-plugin", "my_plugin", "MY_", "0.0.0"):
            assert word not in text + str(path.relative_to(written)), path


def test_pyproject_declares_the_name_and_the_entry_point(written: Path) -> None:
    project = tomllib.loads((written / "sampler" / "pyproject.toml").read_text())["project"]
    assert project["name"] == "tilewright-acme-sampler"
    assert project["entry-points"] == {
        "tilewright.samplers": {"acme-sampler": "tilewright_acme_sampler.sampler"}
    }


def test_a_new_kernel_set_has_the_shipped_kernels(written: Path) -> None:
    package = written / SET / "src" / "tilewright_acme_kernels"
    for name, file in qwen3.SOURCES.items():
        assert (package / f"{name}.py").read_bytes() == file.read_bytes()
    for file in package.glob("*.py"):
        assert "tilewright_kernels" not in file.read_text(), file
    assert (package / "kernels.py").read_text().startswith('"""Kernel set ``acme-kernels``: ')


def test_a_new_kernel_set_is_compared_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plugins", "new", "kernels", "acme"]) == 0
    *_, verify, compare = capsys.readouterr().out.splitlines()
    assert verify == "  tilewright plugins verify acme"
    options = "-o candidate.platform=emulated -o candidate.kernels=acme"
    assert compare == f"  tilewright compare --candidate pypto-npu {options}"


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sampler", "My_Sampler"], "found 'My_Sampler'; 'my-sampler' would be valid"),
        (["sampler", "9lives"], "found '9lives'; 'lives' would be valid"),
        (["sampler", "a--b"], "found 'a--b'; 'a-b' would be valid"),
        (["sampler", "../evil"], "found '../evil'; 'evil' would be valid"),
        (["sampler", ""], "found ''"),
        (["sampler", "a" * 61], "at most 60"),
        (["sampler", "émile"], "'mile' would be valid"),
        (["sampler", "top-p"], "sampler 'top-p' of tilewright"),
        (["sampler", "hf"], "package tilewright_hf is already installed in "),
        (["samplr", "acme"], "unknown 'samplr'; did you mean 'sampler'?"),
        (["sampler", "acme", "--out", "no/such/acme"], "folder 'no/such' does not exist"),
    ],
)
def test_an_invalid_name_is_refused_and_nothing_is_written(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plugins", "new", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", ["folder", "file", "dangling link"])
def test_existing_files_are_not_overwritten(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    there = tmp_path / "tilewright-acme"
    if what == "folder":
        there.mkdir()
    elif what == "file":
        there.write_text("mine")
    else:
        there.symlink_to("nowhere")
    assert main(["plugins", "new", "observer", "acme"]) == 2
    assert "already exists: choose another folder" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [there]
    assert not there.is_dir() or not list(there.iterdir())


def test_a_failed_write_leaves_no_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_text = Path.write_text

    def full(path: Path, *arguments: object, **named: object) -> int:
        if path.name == "README.md":
            raise OSError(28, "No space left on device")
        return write_text(path, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "write_text", full)
    assert main(["plugins", "new", "observer", "acme", "--out", str(tmp_path / "acme")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not list(tmp_path.iterdir())


# --- documentation --------------------------------------------------------------------------------


def test_the_tutorial_matches_the_written_files_and_the_loader_suite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs/writing-plugins.md").read_text()
    monkeypatch.chdir(tmp_path)
    assert main(["plugins", "new", "loader", "acme"]) == 0
    said = capsys.readouterr().out
    shown = "".join(f"    {line}\n" for line in said.splitlines())
    assert f"    $ tilewright plugins new loader acme\n{shown}" in page

    found = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert found == set(re.findall(r"^    (tilewright-acme/\S+)", page, re.MULTILINE))

    tests = {name.removeprefix("test_").replace("_", " ") for name in dir(LoaderSuite)}
    lines = re.findall(r"^      (?:passed|failed|not run)  +(.*)$", page, re.MULTILINE)
    assert len(lines) > 10
    assert set(lines) <= tests


def test_the_page_on_kernels_matches_the_written_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs/writing-kernels.md").read_text()
    monkeypatch.chdir(tmp_path)
    assert main(["plugins", "new", "kernels", "acme-qwen3"]) == 0
    said = capsys.readouterr().out
    shown = "".join(f"    {line}\n" for line in said.splitlines())
    assert f"    $ tilewright plugins new kernels acme-qwen3\n{shown}" in page

    package = tmp_path / "tilewright-acme-qwen3" / "src" / "tilewright_acme_qwen3"
    table = page.partition("## The files\n")[2].partition("\n## ")[0]
    described = set(re.findall(r"`(\w+\.py)`", table))
    assert described == {file.name for file in package.glob("*.py")} - {"__init__.py"}

    tests = {name.removeprefix("test_").replace("_", " ") for name in dir(KernelsSuite)}
    lines = re.findall(r"^      (?:passed|not run)  +(.*)$", page, re.MULTILINE)
    assert lines
    assert set(lines) <= tests
