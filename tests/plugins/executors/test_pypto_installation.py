"""PyPTO is found by its files, told apart from CANN's pypto, and its requirements are checked."""

import re
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
from attrs import asdict
from fake_pypto import BINARY, COMMIT, PTOAS, cards, checkout, program, unimported

from tilewright.errors import ExecutorError
from tilewright_pypto import installation
from tilewright_pypto.installation import checks, find, identity, needs, require


@pytest.fixture(autouse=True)
def dev(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The device directory of a machine without cards, in place of that of the test machine."""
    monkeypatch.setattr(installation, "DEV", cards(tmp_path / "dev"))
    return tmp_path / "dev"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The folder that packages are imported from, on a machine without PyPTO."""
    site = tmp_path / "site"
    site.mkdir()
    with unimported():
        monkeypatch.setattr(sys, "path", [str(site)])
        yield site


def one_line(error: pytest.ExceptionInfo[ExecutorError]) -> str:
    (line,) = str(error.value).splitlines()
    return line


def failed(platform: str, root: Path, card: int | None = None) -> dict[str, str]:
    found = needs(platform, find(str(root)), card)
    return {c.name: c.found for c in found if c.status == "failed"}


# --- the package ----------------------------------------------------------------------------------


def test_a_checkout_is_found_with_its_version_and_commit(pypto_root):
    found = find(str(pypto_root))
    assert found.folders == (pypto_root / "python" / "pypto",)
    assert found.version == "0.1.0"
    assert found.commit == COMMIT
    assert str(found) == f"PyPTO 0.1.0 ({COMMIT[:7]}) in {pypto_root}/python/pypto"
    assert [p.relative_to(pypto_root).as_posix() for p in found.search_path] == [
        "python",
        "runtime",
        "runtime/python",
    ]


def test_finding_pypto_does_not_import_it(pypto_root):
    before = set(sys.modules)
    require("a2a3sim", find(str(pypto_root)), None)
    assert not {m for m in set(sys.modules) - before if "pypto" in m or "simpler" in m}


def test_the_folder_that_holds_the_package_is_accepted_as_root(pypto_root):
    assert find(str(pypto_root / "python")).folders == (pypto_root / "python" / "pypto",)


@pytest.mark.parametrize("head", [None, b"", b"\xff\xfe", b"ref: refs/heads/none\n"])
def test_an_unreadable_commit_is_none(pypto_root, head):
    file = pypto_root / ".git" / "HEAD"
    file.unlink() if head is None else file.write_bytes(head)
    assert find(str(pypto_root)).commit is None


def test_the_commit_of_a_linked_worktree_matches_git(tmp_path):
    def git(*arguments: str) -> str:
        command = ["git", "-c", "user.name=t", "-c", "user.email=t@t", *arguments]
        return subprocess.run(
            command, cwd=tmp_path / "clone", check=True, capture_output=True, text=True
        ).stdout.strip()

    (tmp_path / "clone").mkdir()
    git("init", "-q", "-b", "main")
    git("commit", "-q", "--allow-empty", "-m", "x")
    git("worktree", "add", "-q", "-b", "other", str(tmp_path / "tree"))
    checkout(tmp_path / "built")
    (tmp_path / "built" / "python").rename(tmp_path / "tree" / "python")
    assert find(str(tmp_path / "tree")).commit == git("rev-parse", "HEAD")


def test_an_installed_package_is_found(site, tmp_path):
    (checkout(tmp_path / "c") / "python" / "pypto").rename(site / "pypto")
    found = find(None)
    assert found.folders == (site / "pypto",)
    assert found.search_path == ()
    assert found.commit is None


def test_without_pypto_the_error_warns_of_the_pypto_on_pypi(site):
    with pytest.raises(ExecutorError) as error:
        find(None)
    line = one_line(error)
    assert "PyPTO is not installed" in line
    assert "`pip install pypto` installs another product" in line
    assert "pypto_root" in line
    assert "platform=emulated" in line


def cann_product(package: Path) -> None:
    for file in ("__init__.py", "frontend/__init__.py", f"pypto_impl{EXTENSION_SUFFIXES[0]}"):
        (package / file).parent.mkdir(parents=True, exist_ok=True)
        (package / file).write_text('__version__ = "0.1.0"\n')


def test_canns_pypto_is_recognised_by_its_files(site):
    cann_product(site / "pypto")
    with pytest.raises(ExecutorError, match=r"CANN's product of that name: uninstall it") as error:
        find(None)
    assert str(site / "pypto") in one_line(error)


def test_canns_pypto_is_not_accepted_as_a_checkout(tmp_path):
    cann_product(tmp_path / "root" / "python" / "pypto")
    with pytest.raises(ExecutorError, match="CANN's product"):
        find(str(tmp_path / "root"))


def test_a_checkout_in_the_working_folder_is_not_a_package(site, tmp_path):
    # A clone is a folder named pypto, which Python takes for a namespace package.
    checkout(site / "pypto")
    with pytest.raises(ExecutorError, match=f"is not a package: .*pypto_root={site / 'pypto'}"):
        find(None)


def test_a_package_wins_over_a_namespace_folder(site, tmp_path):
    (tmp_path / "first" / "pypto").mkdir(parents=True)
    (checkout(tmp_path / "c") / "python" / "pypto").rename(site / "pypto")
    sys.path.insert(0, str(tmp_path / "first"))
    assert find(None).folders == (site / "pypto",)


def test_a_checkout_that_was_never_built_is_refused(pypto_root):
    (pypto_root / "python" / "pypto" / BINARY).unlink()
    with pytest.raises(ExecutorError, match="is not built") as error:
        find(str(pypto_root))
    assert f"pip install -e {pypto_root}" in one_line(error)


def test_a_checkout_built_for_another_python_is_refused(pypto_root):
    package = pypto_root / "python" / "pypto"
    (package / BINARY).rename(package / "pypto_core.cpython-37m-x86_64-linux-gnu.so")
    with pytest.raises(ExecutorError, match=r"another Python \(pypto_core.cpython-37m"):
        find(str(pypto_root))


def test_an_editable_install_may_have_its_binary_in_site_packages(pypto_root, monkeypatch):
    # scikit-build-core installs an editable package as a finder that joins two folders.
    package, site = pypto_root / "python" / "pypto", pypto_root / "site" / "pypto"
    site.mkdir(parents=True)
    (package / BINARY).rename(site / BINARY)

    class Finder:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name != "pypto":
                return None
            from importlib.util import spec_from_file_location

            return spec_from_file_location(
                name,
                package / "__init__.py",
                submodule_search_locations=[str(site), str(package)],
            )

    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    assert find(None).folders == (package, site)
    assert find(str(pypto_root)).folders == (package, site)


@pytest.mark.parametrize("root", ["nowhere", "dev"])
def test_a_root_that_is_not_a_checkout_is_refused(tmp_path, root):
    with pytest.raises(ExecutorError, match=f"pypto_root must be a checkout .*{tmp_path / root}"):
        find(str(tmp_path / root))


# --- requirements of a platform -------------------------------------------------------------------


@pytest.mark.parametrize("platform", ["a2a3", "a5", "a2a3sim", "a5sim"])
def test_a_complete_machine_meets_all_requirements(pypto_root, dev, platform):
    (dev / "davinci3").touch()
    require(platform, find(str(pypto_root)), 3)
    assert {c.status for c in needs(platform, find(str(pypto_root)), 3)} == {"ok"}


def test_all_missing_requirements_are_listed_in_one_line(pypto_root, monkeypatch, tmp_path):
    monkeypatch.setenv("PTOAS_ROOT", str(tmp_path / "empty"))
    monkeypatch.delenv("ASCEND_HOME_PATH")
    (pypto_root / "runtime" / "python" / "simpler" / "__init__.py").unlink()
    with pytest.raises(ExecutorError) as error:
        require("a2a3", find(str(pypto_root)), 3)
    line = one_line(error)
    for part in ("lacks 4", "no simpler", str(tmp_path / "empty"), "ASCEND_HOME_PATH", "davinci"):
        assert part in line
    assert "g++" not in line


def test_a_runtime_built_for_another_platform_is_an_error(pypto_root):
    built = pypto_root / "runtime" / "build" / "lib" / "a2a3" / "sim"
    built.rename(built.with_name("elsewhere"))
    assert "a2a3/sim" in failed("a2a3sim", pypto_root)["PyPTO's runtime"]
    assert not failed("a5sim", pypto_root)
    named = next(c for c in needs(None, find(str(pypto_root)), None) if c.name == "PyPTO's runtime")
    assert named.found.endswith("for a2a3, a5, a5sim")


@pytest.mark.parametrize("place", ["ptoas", "ptoas.sh", "bin/ptoas"])
def test_ptoas_is_searched_in_the_same_places_as_by_pypto(pypto_root, monkeypatch, tmp_path, place):
    monkeypatch.setenv("PTOAS_ROOT", str(tmp_path / "release"))
    assert "ptoas" in failed("a5sim", pypto_root)
    program(tmp_path / "release" / place, PTOAS)
    assert not failed("a5sim", pypto_root)


def test_ptoas_on_the_path_is_used_only_without_ptoas_root(pypto_root, monkeypatch, tmp_path):
    program(tmp_path / "machine" / "bin" / "ptoas", PTOAS)
    monkeypatch.setenv("PTOAS_ROOT", str(tmp_path / "empty"))
    assert "ptoas" in failed("a5sim", pypto_root)
    monkeypatch.delenv("PTOAS_ROOT")
    assert not failed("a5sim", pypto_root)


def test_a_ptoas_that_is_not_executable_is_an_error(pypto_root, tmp_path):
    (tmp_path / "machine" / "ptoas" / "ptoas").chmod(0o644)
    assert "not executable" in failed("a5sim", pypto_root)["ptoas"]


LEAST = 'PTOAS_RELATIVE_PATHS = ()\nPTOAS_MIN_VERSION = "v0.61"\n'


@pytest.mark.parametrize(
    ("least", "version", "wanted"),
    [
        (None, "0.57", None),
        (None, "0.56", "0.57"),
        (
            None,
            "0.60",
            "0.57",
        ),  # assembles the code of e2d0f78 to kernels that compute wrong numbers
        (None, "0.57.1", "0.57"),
        (None, "0.57.0", None),
        (LEAST, "0.57", "0.61 or newer"),
        (LEAST, "0.9", "0.61 or newer"),
        (LEAST, "0.61", None),
        (LEAST, "0.100", None),
        (LEAST, "1.0", None),
        (LEAST, "0.61.0", None),
    ],
)
def test_ptoas_must_have_the_version_that_pypto_requires(
    pypto_root, tmp_path, least, version, wanted
):
    if least:  # the layout of PyPTO since September 2026
        file = pypto_root / "python" / "pypto" / "backend" / "_ptoas_locate.py"
        file.parent.mkdir()
        file.write_text(least)
    launcher = tmp_path / "machine" / "ptoas" / "ptoas"
    program(launcher, f"#!/bin/sh\necho 'ptoas {version}'\n")
    if wanted is None:
        assert not failed("a5sim", pypto_root)
        return
    with pytest.raises(ExecutorError) as error:
        require("a5sim", find(str(pypto_root)), None)
    line = one_line(error)
    assert f"{launcher} is version {version}, but " in line
    assert f"needs {wanted} (PTOAS_" in line
    assert f"set PTOAS_ROOT to a release of ptoas {wanted}" in line


@pytest.mark.parametrize(
    "said", ["ptoas 0.57", "ptoas version v0.57", "ptoas vmi 0.57 (dev)", "ptoas 0.57' >&2; echo '"]
)
def test_the_version_of_ptoas_is_read_from_its_output(pypto_root, tmp_path, said):
    program(tmp_path / "machine" / "ptoas" / "ptoas", f"#!/bin/sh\necho '{said}'\n")
    assert not failed("a5sim", pypto_root)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("#!/bin/sh\necho LLVM\n", "--version printed no version: 'LLVM'"),
        ("#!/bin/sh\necho ptoas\necho LLVM 21.1\n", "--version printed no version: 'ptoas"),
        ("#!/bin/sh\nexit 3\n", "--version failed: .*exit status 3"),
        ("\x7fELF", "--version failed: .*Exec format error"),
    ],
)
def test_a_ptoas_of_unknown_version_is_refused(pypto_root, tmp_path, text, told):
    program(tmp_path / "machine" / "ptoas" / "ptoas", text)
    assert re.search(told, failed("a5sim", pypto_root)["ptoas"])


def test_a_pypto_without_a_required_version_accepts_any_ptoas(pypto_root, tmp_path):
    (pypto_root / "toolchain" / "versions.env").unlink()
    program(tmp_path / "machine" / "ptoas" / "ptoas", "#!/bin/sh\necho ptoas 0.1\n")
    (found,) = (c for c in needs("a5sim", find(str(pypto_root)), None) if c.name == "ptoas")
    assert (found.status, found.found.rpartition(", ")[2]) == ("ok", "version 0.1")


def test_a_compiler_without_bf16_fails_only_the_simulators(pypto_root, tmp_path, dev):
    program(tmp_path / "machine" / "bin" / "g++-15")
    (dev / "davinci0").touch()
    found = failed("a2a3sim", pypto_root)
    assert "would compute in FP16" in found["g++-15 for the simulators"]
    assert not failed("a2a3", pypto_root, 0)


def test_a_compiler_that_does_not_run_is_an_error(pypto_root, tmp_path):
    program(tmp_path / "machine" / "bin" / "g++-15", "#!/bin/sh\nexit 3\n")
    found = failed("a2a3sim", pypto_root)
    assert "does not work" in found["g++-15 for the simulators"]


def test_a_missing_compiler_is_an_error(pypto_root, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    found = failed("a2a3sim", pypto_root)
    assert "none on PATH" in found["g++-15 for the simulators"]


def test_a_toolkit_without_its_compiler_is_an_error(pypto_root, tmp_path, dev):
    (dev / "davinci0").touch()
    (tmp_path / "machine" / "cann" / "bin" / "ccec").unlink()
    assert "bin/ccec" in failed("a2a3", pypto_root, 0)["CANN toolkit"]


def test_a_missing_card_is_an_error_that_lists_the_present_cards(pypto_root, dev):
    (dev / "davinci0").touch()
    (dev / "davinci12").touch()
    found = failed("a2a3", pypto_root, 3)
    assert found == {"NPU": f"no {dev}/davinci3 (cards here: 0, 12)"}


@pytest.mark.parametrize("change", ["gone", "another commit", "no pin"])
def test_headers_that_pypto_will_clone_are_a_warning(pypto_root, change):
    runtime = pypto_root / "runtime"
    match change:
        case "gone":
            (runtime / "build" / "pto-isa").rename(runtime / "elsewhere")
        case "another commit":
            (runtime / "pto_isa.pin").write_text("f" * 40)
        case "no pin":
            (runtime / "pto_isa.pin").unlink()
    (told,) = (c for c in needs("a2a3sim", find(str(pypto_root)), None) if c.status != "ok")
    assert (told.name, told.status) == ("PTO-ISA", "warning")
    assert f"{runtime}/build/pto-isa" in told.found
    require("a2a3sim", find(str(pypto_root)), None)


# --- for the doctor -------------------------------------------------------------------------------


def test_doctor_passes_without_pypto_on_a_machine_without_cards(site):
    (found,) = checks()
    assert found.status == "ok"
    assert "platform=emulated" in found.found


def test_doctor_warns_of_a_missing_pypto_on_a_host_with_cards(site, dev):
    (dev / "davinci0").touch()
    (found,) = checks()
    assert found.status == "warning"
    assert "build it from source" in found.advice


def test_doctor_warns_of_missing_tools_beside_pypto(pypto_root, monkeypatch):
    monkeypatch.setattr(sys, "path", [*map(str, find(str(pypto_root)).search_path), *sys.path])
    for name in ("PTOAS_ROOT", "ASCEND_HOME_PATH"):
        monkeypatch.delenv(name)
    found = {c.name: asdict(c) for c in checks()}
    assert found["PyPTO"]["status"] == "ok"
    assert found["ptoas"]["status"] == "warning"
    assert found["NPU"]["status"] == "ok"
    assert not any(c["status"] == "failed" for c in found.values())
    assert all(c["advice"] for c in found.values() if c["status"] == "warning")


# --- what compiled code depends on ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("platform", "compiler"), [("a2a3", "cann/bin/ccec"), ("a5sim", "bin/g++-15")]
)
def test_the_identity_changes_with_the_package_and_its_tools(
    pypto_root, tmp_path, platform, compiler
):
    machine = tmp_path / "machine"
    seen = [identity(find(str(pypto_root)), platform)]
    for file, text in (
        (pypto_root / "python" / "pypto" / "new.py", ""),
        (machine / "ptoas" / "bin" / "ptoas", "behind the launcher"),
        (pypto_root / ".git" / "HEAD", "f" * 40),
        (machine / compiler, "another release"),
    ):
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        seen.append(identity(find(str(pypto_root)), platform))
    assert len({str(s) for s in seen}) == len(seen)


def test_the_identity_does_not_change_with_compiled_python_files(pypto_root):
    before = identity(find(str(pypto_root)), "a2a3sim")
    cache = pypto_root / "python" / "pypto" / "__pycache__"
    cache.mkdir()
    (cache / "x.pyc").write_text("")
    assert identity(find(str(pypto_root)), "a2a3sim") == before
