"""Finds PyPTO and what it needs on this machine, by looking at files: nothing of it is imported.

Two products are called ``pypto``. The kernels are for that of hw-native-sys, which is built from
source; the one on PyPI is CANN's. Their version numbers do not tell them apart, their files do.
"""

import hashlib
import importlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from importlib.machinery import EXTENSION_SUFFIXES, ModuleSpec, PathFinder
from importlib.util import find_spec
from pathlib import Path

from attrs import evolve, frozen

from tilewright.errors import ExecutorError
from tilewright.types import Check

SIMULATORS = ("a2a3sim", "a5sim")
HARDWARE = ("a2a3", "a5")

BUILD = "build it from source: https://github.com/hw-native-sys/pypto"
EMULATED = "platform=emulated needs none"
RUNTIME = "tensormap_and_ringbuffer"
"""The runtime, of those that simpler comes with, that PyPTO's compiler makes programs for."""
PTOAS = ("ptoas", "ptoas.sh", "bin/ptoas")
"""Where PyPTO looks for the assembler in $PTOAS_ROOT, in this order."""
DEV = Path("/dev")


@frozen(kw_only=True)
class Installation:
    """A PyPTO that can be imported: hw-native-sys/pypto, with its compiled part."""

    folders: tuple[Path, ...]
    """Of the package; the first one has its source, and an editable installation a second one."""
    search_path: tuple[Path, ...]
    """What must be on sys.path to import it and its runtime; empty for an installed one."""
    version: str
    """``unknown`` where its source does not say."""
    commit: str | None
    """Of a checkout."""

    def __str__(self) -> str:
        commit = f" ({self.commit[:7]})" if self.commit else ""
        return f"PyPTO {self.version}{commit} in {self.folders[0]}"


@frozen
class _Lack:
    """Why there is no PyPTO to be used, and what to do."""

    found: str
    advice: str
    nothing: bool = False
    """Nothing is there at all, and nobody said that there is."""


def find(pypto_root: str | None) -> Installation:
    """The PyPTO of a checkout, or without one the installed package.

    Raises ExecutorError: none is there, it is CANN's product of that name, it was never built, it
    was built for another Python, the root is no checkout.
    """
    found = _locate(pypto_root)
    if isinstance(found, _Lack):
        raise ExecutorError(f"{found.found}: {found.advice}")
    return found


def checks(
    platform: str | None = None, pypto_root: str | None = None, card: int | None = None
) -> list[Check]:
    """What is there, for ``tilewright doctor``.

    platform: one of HARDWARE or SIMULATORS, and what it lacks is "failed". None: nobody said, and
    what is absent is at most a "warning".
    """
    found = _locate(pypto_root)
    if isinstance(found, _Lack):
        wanted = platform is not None
        if found.nothing and not wanted and not _cards():
            return [Check(name="PyPTO", status="ok", found=f"{found.found}; {EMULATED}")]
        return [
            Check(
                name="PyPTO",
                status="failed" if wanted else "warning",
                found=found.found,
                advice=found.advice,
            )
        ]
    needs = [Check(name="PyPTO", status="ok", found=str(found)), *_needs(platform, found, card)]
    if platform is not None:
        return needs
    return [evolve(c, status="warning") if c.status == "failed" else c for c in needs]


def require(platform: str, installation: Installation, card: int | None) -> None:
    """Raises ExecutorError that names all that the platform needs and this machine lacks."""
    lacking = [c for c in _needs(platform, installation, card) if c.status == "failed"]
    if lacking:
        each = "; ".join(f"{c.name}: {c.found} ({c.advice})" for c in lacking)
        raise ExecutorError(
            f"platform {platform} with {installation} lacks {len(lacking)} of what it needs: {each}"
        )


def identity(installation: Installation) -> dict[str, str]:
    """What compiled code depends on: PyPTO's version and files, and ptoas.

    Files count by path, size and time of change, not by content.
    """
    digest = hashlib.sha256()
    for folder in installation.folders:
        for file in sorted(folder.rglob("*")):
            if file.is_file() and "__pycache__" not in file.parts:
                digest.update(_stamp(file).encode())
    assembler = _ptoas_files()
    return {
        "pypto": f"{installation.version} {installation.commit or ''}".strip(),
        "pypto files": digest.hexdigest(),
        "ptoas": "; ".join(map(_stamp, assembler)) or "none",
    }


def _stamp(file: Path) -> str:
    stat = file.stat()
    return f"{file} {stat.st_size} {stat.st_mtime_ns}"


# --- the package ----------------------------------------------------------------------------------


def _locate(pypto_root: str | None) -> Installation | _Lack:
    importlib.invalidate_caches()
    if pypto_root is None:
        search_path: tuple[Path, ...] = ()
        folders = _installed()
        if isinstance(folders, _Lack):
            return folders
    else:
        root = Path(pypto_root).expanduser().absolute()
        homes = [root / "python", root]
        home = next((h for h in homes if (h / "pypto" / "__init__.py").is_file()), None)
        if home is None:
            there = f"{root} holds neither" if root.is_dir() else f"there is no folder {root}"
            return _Lack(
                f"pypto_root must be a checkout of PyPTO, with python/pypto or pypto, and {there}",
                "name the checkout's own folder",
            )
        parts = (home, root / "runtime", root / "runtime" / "python")
        search_path = tuple(p for p in parts if p.is_dir())
        folders = _with_binary((home / "pypto",))
    lack = _unusable(folders)
    if lack:
        return lack
    return Installation(
        folders=folders,
        search_path=search_path,
        version=_version(folders[0]),
        commit=_commit(folders[0]),
    )


def _installed() -> tuple[Path, ...] | _Lack:
    """The folders of the installed package, that with its __init__.py first."""
    spec = _spec("pypto")
    if spec is None:
        return _Lack(
            "no PyPTO is installed",
            f"{BUILD} (`pip install pypto` gets another product), or set pypto_root to a built "
            f"checkout; {EMULATED}",
            nothing=True,
        )
    folders = [Path(f) for f in spec.submodule_search_locations or ()]
    if spec.origin is None:
        checkout = next((f for f in folders if (f / "python" / "pypto").is_dir()), None)
        found = f"no PyPTO is installed: {', '.join(map(str, folders))} is a mere folder"
        if checkout:
            return _Lack(found, f"it looks like a checkout, then set pypto_root={checkout}")
        return _Lack(found, f"{BUILD}; {EMULATED}")
    source = Path(spec.origin).parent
    return (source, *(f for f in folders if f != source))


def _with_binary(folders: tuple[Path, ...]) -> tuple[Path, ...]:
    """A checkout's folder, with that where an editable installation of it keeps the binary."""
    if not _binaries(folders):
        installed = _installed()
        if not isinstance(installed, _Lack) and installed[0].resolve() == folders[0].resolve():
            return installed
    return folders


def _unusable(folders: Sequence[Path]) -> _Lack | None:
    def holds(pattern: str) -> bool:
        return any(next(f.glob(pattern), None) for f in folders)

    where = folders[0]
    if holds("pypto_impl*") or (holds("frontend") and not holds("language")):
        return _Lack(
            f"the kernels are for hw-native-sys/pypto, and {where} is CANN's product of that name",
            f"uninstall it (they cannot share an environment) and {BUILD}; or set pypto_root to a "
            "built checkout",
        )
    if not holds("language"):
        return _Lack(f"{where} is no PyPTO: it has no pypto.language", f"{BUILD}; {EMULATED}")
    binaries = _binaries(folders)
    if not binaries:
        checkout = where.parent.parent if where.parent.name == "python" else where.parent
        return _Lack(
            f"the PyPTO in {where} was never built: it has no pypto_core binary",
            f"run `pip install -e {checkout}`; {EMULATED}",
        )
    if not any(b.name.removeprefix("pypto_core") in EXTENSION_SUFFIXES for b in binaries):
        return _Lack(
            f"the PyPTO in {where} was built for another Python ({binaries[0].name})",
            f"build it again with this one, whose modules end in {EXTENSION_SUFFIXES[0]}",
        )
    return None


def _binaries(folders: Sequence[Path]) -> list[Path]:
    return [b for f in folders for b in sorted(f.glob("pypto_core*.*")) if b.suffix in _NATIVE]


_NATIVE = (".so", ".pyd", ".dylib")


def _spec(name: str, search_path: Sequence[Path] = ()) -> ModuleSpec | None:
    """Where a top-level module would come from. Such a one is not executed to find it."""
    spec = PathFinder.find_spec(name, [*map(str, search_path)]) if search_path else None
    if spec is not None and spec.origin is not None:
        return spec
    try:
        return find_spec(name)
    except (ImportError, ValueError):  # an installer's hook that is broken, or a module without one
        return None


def _version(package: Path) -> str:
    text = (package / "__init__.py").read_text(errors="replace")
    found = re.search(r"""^__version__\s*=\s*["']([^"']+)""", text, re.MULTILINE)
    return found[1] if found else "unknown"


def _commit(package: Path) -> str | None:
    """What a checkout's HEAD is, as git keeps it."""
    root = package.parent.parent if package.parent.name == "python" else package.parent
    git = root / ".git"
    try:
        if git.is_file():  # a work tree of another clone
            git = root / git.read_text().removeprefix("gitdir:").strip()
        head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref:"):
            return head
        ref = head.removeprefix("ref:").strip()
        shared = git / "commondir"
        stores = [git, git / shared.read_text().strip()] if shared.is_file() else [git]
        for store in stores:
            if (store / ref).is_file():
                return (store / ref).read_text().strip()
        packed = (stores[-1] / "packed-refs").read_text().splitlines()
    except OSError:
        return None
    return next((line.split()[0] for line in packed if line.endswith(f" {ref}")), None)


# --- what a platform needs besides ----------------------------------------------------------------


def _needs(platform: str | None, installation: Installation, card: int | None) -> Iterator[Check]:
    yield _runtime(installation, platform)
    yield _ptoas()
    if platform is None or platform in SIMULATORS:
        yield _simulators_compiler()
    if platform is None and not _cards() and not os.environ.get("ASCEND_HOME_PATH"):
        yield Check(name="NPU", status="ok", found="none here")
    elif platform is None or platform in HARDWARE:
        yield _cann()
        yield _npu(card)


def _runtime(installation: Installation, platform: str | None) -> Check:
    """simpler: its Python part, its extension, and the binaries for the platform."""
    name = "PyPTO's runtime"
    names = ("simpler", "simpler_setup", "_task_interface")
    specs = {n: _spec(n, installation.search_path) for n in names}
    missing = [n for n, spec in specs.items() if spec is None or spec.origin is None]
    if missing:
        runtime = next((p for p in installation.search_path if p.name == "runtime"), None)
        return Check(
            name=name,
            status="failed",
            found=f"no {' and no '.join(missing)}",
            advice=f"run `pip install --no-build-isolation -e {runtime or '<checkout>/runtime'}`",
        )
    setup = specs["simpler_setup"]
    assert setup is not None
    assert setup.origin is not None
    home = Path(setup.origin).parent
    # A wheel brings its binaries with it; a checkout has them where they were built.
    root = home / "_assets" if (home / "_assets" / "src").is_dir() else home.parent
    platforms = (*HARDWARE, *SIMULATORS)
    built = [p for p in platforms if _runtime_binary(root, p).is_file()]
    if platform in built or (platform is None and built):
        return Check(name=name, status="ok", found=f"in {root}, for {', '.join(built)}")
    return Check(
        name=name,
        status="failed",
        found=f"no {_runtime_binary(root, platform)}" if platform else f"no binaries in {root}",
        advice="build the runtime for that platform: `pip install --no-build-isolation -e "
        f"{root}` where its compilers are",
    )


def _runtime_binary(root: Path, platform: str) -> Path:
    variant = "sim" if platform in SIMULATORS else "onboard"
    arch = platform.removesuffix("sim")
    return root / "build" / "lib" / arch / variant / RUNTIME / "libhost_runtime.so"


def _ptoas_files() -> list[Path]:
    """Those that exist of the places where ptoas may be; PyPTO runs the first executable one."""
    root = os.environ.get("PTOAS_ROOT")
    if root:
        return [f for f in (Path(root) / p for p in PTOAS) if f.is_file()]
    found = shutil.which("ptoas")
    return [Path(found)] if found else []


def _ptoas() -> Check:
    files = _ptoas_files()
    usable = next((f for f in files if os.access(f, os.X_OK)), None)
    if usable:
        return Check(name="ptoas", status="ok", found=str(usable))
    root = os.environ.get("PTOAS_ROOT")
    place = f"PTOAS_ROOT={root} (in {', '.join(PTOAS)})" if root else "PATH, and no PTOAS_ROOT"
    return Check(
        name="ptoas",
        status="failed",
        found=f"{files[0]} is not executable" if files else f"none in {place}",
        advice="set PTOAS_ROOT to a release of the version that the checkout's "
        "toolchain/versions.env names",
    )


def _simulators_compiler() -> Check:
    """PyPTO compiles simulated kernels with a program of this very name."""
    name, compiler = "g++-15 for the simulators", shutil.which("g++-15")
    if compiler is None:
        other = shutil.which("g++")
        return Check(
            name=name,
            status="failed",
            found="none on PATH" + (f", though {other}" if other else ""),
            advice="install g++-15, or link a g++ of 13 or newer as g++-15",
        )
    # PyPTO's headers take BF16 for FP16, silently, where the compiler does not have it.
    command = [compiler, "-std=c++23", "-x", "c++", "-dM", "-E", os.devnull]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        return Check(
            name=name,
            status="failed",
            found=f"{compiler} does not work: {' '.join(str(error).split())}",
            advice="repair or reinstall it",
        )
    if "__STDCPP_BFLOAT16_T__" not in said.stdout:
        return Check(
            name=name,
            status="failed",
            found=f"{compiler} has no BF16 type, and simulators would compute in FP16 instead",
            advice="install a g++ of 13 or newer under that name",
        )
    return Check(name=name, status="ok", found=f"{compiler}, with BF16")


def _cann() -> Check:
    name, home = "CANN toolkit", os.environ.get("ASCEND_HOME_PATH")
    advice = "install it, and source its set_env.sh in the shell that runs tilewright"
    if not home:
        toolkit = os.environ.get("ASCEND_TOOLKIT_HOME")
        if toolkit:
            advice = f"export ASCEND_HOME_PATH={toolkit}"
        found = "ASCEND_HOME_PATH is not set"
        return Check(name=name, status="failed", found=found, advice=advice)
    if not (Path(home) / "bin" / "ccec").is_file():
        found = f"ASCEND_HOME_PATH={home} holds no bin/ccec"
        return Check(name=name, status="failed", found=found, advice=advice)
    return Check(name=name, status="ok", found=home)


def _npu(card: int | None) -> Check:
    name, cards = "NPU", _cards()
    manager = DEV / "davinci_manager"
    here = f"cards here: {', '.join(map(str, cards))}" if cards else "no cards here"
    nodes = [manager, *([DEV / f"davinci{card}"] if card is not None else [])]
    for node in nodes:
        if not node.exists():
            return Check(
                name=name,
                status="failed",
                found=f"no {node} ({here})",
                advice="see `npu-smi info`; a container must be given its cards and the manager",
            )
        if not os.access(node, os.R_OK | os.W_OK):
            return Check(
                name=name,
                status="failed",
                found=f"{node} is not for this user",
                advice="join the group that owns it",
            )
    return Check(name=name, status="ok" if cards else "failed", found=here)


def _cards() -> list[int]:
    """Numbers of the Ascend cards that this machine, or this container, shows."""
    numbers = (n.name.removeprefix("davinci") for n in DEV.glob("davinci[0-9]*"))
    return sorted(int(n) for n in numbers if n.isdigit())
