"""A third party's kernel set: written, built as a wheel, selected by name, verified, compared."""

import json
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import plugin_distributions as dists
import pytest

from tilewright.cli import main

NAME, DISTRIBUTION = "acme-qwen3", "tilewright-acme-qwen3"
TEXT = [*("--prompt", "We hold these truths"), "--max-new-tokens", "3"]
COMPARE = [
    *("compare", "--candidate", "pypto-npu", "-o", "candidate.platform=emulated"),
    *("--prompt", "We hold these truths", "--new-tokens", "2", "--json"),
    *("-o", f"candidate.kernels={NAME}"),
]

MISTAKES = {
    # file, what stands there, what is put there; the phase, layer and stage that must be named
    "a position behind in decode": (
        "decode_layer", "[row + token]), pl.INDEX) - 1", "[row + token]), pl.INDEX) - 2",
        ("decode", 0, "k_cache"),
    ),
    "keys cached as values in prefill": (
        "prefill_layer", "write_cache(values,", "write_cache(keys,", ("prefill", 0, "v_cache"),
    ),
}  # fmt: skip

Tilewright = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set as ``plugins new`` writes it."""
    folder = tmp_path_factory.mktemp("acme") / "project"
    assert main(["plugins", "new", "kernels", NAME, "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def wheel(project: Path) -> Path:
    folder = project.parent
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "-w", str(folder), str(project)], check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture
def site(wheel: Path, tmp_path: Path) -> Iterator[Path]:
    """The folder that the wheel is installed in, on this process's path."""
    with dists.on_path(tmp_path / "site"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(tmp_path / "site")
        yield tmp_path / "site"


@pytest.fixture
def tilewright(
    site: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Tilewright:
    """Runs a command; returns its exit code and what it prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TASK_DEVICE", raising=False)

    def run(*words: str) -> tuple[int, str]:
        capsys.readouterr()
        return main(words), capsys.readouterr().out

    return run


def test_it_is_listed_shown_and_checked(tilewright: Tilewright, site: Path) -> None:
    code, listed = tilewright("plugins", "list", "--kind", "kernels", "--json")
    (ours,) = (p for p in json.loads(listed) if p["name"] == NAME)
    assert (code, ours["distribution"], ours["state"]) == (0, DISTRIBUTION, "ok")
    assert ours["where"] == str(site)

    code, shown = tilewright("plugins", "show", NAME)
    assert code == 0
    assert shown.startswith(f"kernel set '{NAME}' of {DISTRIBUTION} 0.1.0\n")

    _, checked = tilewright("plugins", "check", "--json")
    (ours,) = (p for p in json.loads(checked) if p["name"] == NAME)
    assert (ours["state"], ours["problem"]) == ("ok", None)


def test_it_is_selected_by_name_by_distribution_and_by_run_file(
    tilewright: Tilewright, site: Path, tmp_path: Path
) -> None:
    _, reference = tilewright("generate", *TEXT)
    file = tmp_path / "run.toml"
    chosen = f'platform = "emulated"\nkernels = "{NAME}"\n'
    file.write_text(f'[plugins]\nexecutor = "pypto-npu"\n[options.executor]\n{chosen}')
    emulated = ("--executor", "pypto-npu", "-o", "platform=emulated")
    for words in (
        ("generate", *emulated, "-o", f"kernels={NAME}", *TEXT),
        ("generate", *emulated, "-o", f"kernels={DISTRIBUTION}:{NAME}", *TEXT),
        ("run", str(file), *TEXT),
    ):
        assert tilewright(*words) == (0, reference)

    # The sources are those of the wheel: one that cannot be parsed ends the run.
    (site / "tilewright_acme_qwen3" / "head.py").write_text("def head(:\n")
    code, _ = tilewright("run", str(file), *TEXT)
    assert code == 2


def test_it_is_compared(tilewright: Tilewright) -> None:
    code, report = tilewright(*COMPARE)
    found = json.loads(report)
    assert code == 0
    assert found["sentence"].startswith("equal")


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_line_that_is_changed_in_it_is_found(
    mistake: str, tilewright: Tilewright, site: Path
) -> None:
    name, right, wrong, place = MISTAKES[mistake]
    file = site / "tilewright_acme_qwen3" / f"{name}.py"
    assert file.read_text().count(right) == 1
    file.write_text(file.read_text().replace(right, wrong))
    code, report = tilewright(*COMPARE)
    found = json.loads(report)
    assert (code, found["verdict"]) == (1, "diverged"), found["sentence"]
    divergence = found["divergence"]
    assert (divergence["phase"], divergence["layer"], divergence["stage"]) == place


@pytest.mark.slow
def test_it_is_verified(tilewright: Tilewright) -> None:
    code, verified = tilewright("plugins", "verify", NAME)
    assert code in (0, 3), verified  # 3: without PyPTO
    assert " 0 failed" in verified


@pytest.mark.slow
def test_its_own_tests_pass(project: Path, site: Path) -> None:
    # Those of the suite are run by `plugins verify`.
    tests = [str(project / "tests"), "--deselect", "tests/test_kernels.py::TestConformance"]
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", str(project)]
    done = dists.run("-m", "pytest", *options, *tests, site=site, OMP_NUM_THREADS="1")
    assert done.code == 0, done.out[-5000:]
    assert "1 passed" in done.out
