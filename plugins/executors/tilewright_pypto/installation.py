"""Finds PyPTO and its dependencies on this machine by inspecting files, without importing them.

Two products are called ``pypto``. The kernels need the one of hw-native-sys, which is built from
source; the one on PyPI is CANN's. They differ in their files, not in their version numbers.
"""

import hashlib
import importlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.machinery import EXTENSION_SUFFIXES, ModuleSpec, PathFinder
from importlib.util import find_spec
from pathlib import Path

from attrs import evolve, frozen

from tilewright.errors import ExecutorError
from tilewright.paths import path_of
from tilewright.types import Check
from tilewright_pypto.options import HARDWARE

SIMULATORS = ("a2a3sim", "a5sim")

PTO_ISA = "https://github.com/hw-native-sys/pto-isa"
BUILD = "build it from source: https://github.com/hw-native-sys/pypto"
EMULATED = "platform=emulated does not need PyPTO"
RUNTIME = "tensormap_and_ringbuffer"
"""The runtime of simpler that PyPTO's compiler targets."""
PTOAS = ("ptoas", "ptoas.sh", "bin/ptoas")
"""Where PyPTO looks for the assembler in $PTOAS_ROOT, in this order."""
GXX = "g++-15"
"""PyPTO compiles simulated kernels with a program of exactly this name."""
DEV = Path("/dev")


@frozen(kw_only=True)
class Installation:
    """A PyPTO that can be imported: hw-native-sys/pypto, with its compiled part."""

    folders: tuple[Path, ...]
    """Folders of the package. The first has its source; an editable installation has a second."""
    search_path: tuple[Path, ...]
    """Entries for sys.path to import it and its runtime; empty for an installed package."""
    version: str
    """Version from its source, or ``unknown``."""
    commit: str | None
    """Commit of a checkout, if known."""

    def __str__(self) -> str:
        commit = f" ({self.commit[:7]})" if self.commit else ""
        return f"PyPTO {self.version}{commit} in {self.folders[0]}"


class _AbsentError(ExecutorError):
    """No usable PyPTO was found."""

    def __init__(self, found: str, advice: str):
        super().__init__(f"{found}: {advice}")
        self.found, self.advice = found, advice


def find(pypto_root: str | None) -> Installation:
    """The PyPTO of a checkout, or the installed package if pypto_root is None.

    Raises ExecutorError when none is found, when it is CANN's product of that name, was never built
    or was built for another Python, or when the root is not a checkout.
    """
    importlib.invalidate_caches()
    folders, search_path = (_installed(), ()) if pypto_root is None else _checkout(pypto_root)
    _check_usable(folders)
    text = (folders[0] / "__init__.py").read_text(errors="replace")
    version = re.search(r"""^__version__\s*=\s*["']([^"']+)""", text, re.MULTILINE)
    return Installation(
        folders=folders,
        search_path=search_path,
        version=version[1] if version else "unknown",
        commit=_commit(_root(folders[0])),
    )


def checks() -> list[Check]:
    """Checks for ``tilewright doctor``. A missing part is at most a warning."""
    try:
        found = find(None)
    except _AbsentError as absent:
        if _spec("pypto") is None and not _cards():
            return [Check(name="PyPTO", status="ok", found=f"{absent.found}; {EMULATED}")]
        return [Check(name="PyPTO", status="warning", found=absent.found, advice=absent.advice)]
    besides = needs(None, found, None)
    return [
        Check(name="PyPTO", status="ok", found=str(found)),
        *(evolve(c, status="warning") if c.status == "failed" else c for c in besides),
    ]


def require(platform: str, installation: Installation, card: int | None) -> None:
    """Raises ExecutorError that lists everything the platform needs and this machine lacks."""
    lacking = [c for c in needs(platform, installation, card) if c.status == "failed"]
    if lacking:
        each = "; ".join(f"{c.name}: {c.found} ({c.advice})" for c in lacking)
        raise ExecutorError(
            f"platform {platform} with {installation} lacks {len(lacking)} requirement"
            f"{'s' if len(lacking) > 1 else ''}: {each}"
        )


def identity(installation: Installation, platform: str) -> dict[str, str]:
    """The inputs of compiled code: PyPTO's version and files, ptoas, the platform's compiler.

    Files are compared by path, size and modification time, not by content.
    """
    digest = hashlib.sha256()
    for folder in installation.folders:
        for file in sorted(folder.rglob("*")):
            if file.is_file() and "__pycache__" not in file.parts:
                digest.update(_stamp(file).encode())
    compiler = shutil.which(GXX) if platform in SIMULATORS else _ccec()
    return {
        "platform": platform,
        "pypto": f"{installation.version} {installation.commit or ''}".strip(),
        "pypto files": digest.hexdigest(),
        "ptoas": "; ".join(map(_stamp, _ptoas_files())) or "none",
        "compiler": _stamp(Path(compiler)) if compiler else "none",
    }


def _stamp(file: Path) -> str:
    stat = file.stat()
    return f"{file} {stat.st_size} {stat.st_mtime_ns}"


# --- the package ----------------------------------------------------------------------------------


def _checkout(pypto_root: str) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """The folders of a checkout's package, and its search path."""
    root = path_of(pypto_root).absolute()
    homes = [root / "python", root]
    home = next((h for h in homes if (h / "pypto" / "__init__.py").is_file()), None)
    if home is None:
        there = f"{root} has neither" if root.is_dir() else f"folder {root} does not exist"
        raise _AbsentError(
            f"pypto_root must be a checkout of PyPTO, with python/pypto or pypto, but {there}",
            "set it to the root of the checkout",
        )
    folders: tuple[Path, ...] = (home / "pypto",)
    if not _binaries(folders):  # an editable installation may keep them elsewhere
        with suppress(_AbsentError):
            installed = _installed()
            if installed[0].resolve() == folders[0].resolve():
                folders = installed
    parts = (home, root / "runtime", root / "runtime" / "python")
    return folders, tuple(p for p in parts if p.is_dir())


def _installed() -> tuple[Path, ...]:
    """The folders of the installed package; the first one has its __init__.py."""
    spec = _spec("pypto")
    if spec is None:
        raise _AbsentError(
            "PyPTO is not installed",
            f"{BUILD} (`pip install pypto` installs another product), or set pypto_root to a built "
            f"checkout; {EMULATED}",
        )
    folders = [Path(f) for f in spec.submodule_search_locations or ()]
    if spec.origin is None:
        checkout = next((f for f in folders if (f / "python" / "pypto").is_dir()), None)
        raise _AbsentError(
            f"PyPTO is not installed: {', '.join(map(str, folders))} is not a package",
            f"it looks like a checkout, so set pypto_root={checkout}"
            if checkout
            else f"{BUILD}; {EMULATED}",
        )
    source = Path(spec.origin).parent
    return (source, *(f for f in folders if f != source))


def _check_usable(folders: Sequence[Path]) -> None:
    def holds(pattern: str) -> bool:
        return any(next(f.glob(pattern), None) for f in folders)

    where, binaries = folders[0], _binaries(folders)
    if holds("pypto_impl*") or (holds("frontend") and not holds("language")):
        raise _AbsentError(
            f"the kernels need hw-native-sys/pypto, but {where} is CANN's product of that name",
            f"uninstall it (they cannot share an environment) and {BUILD}; or set pypto_root to a "
            "built checkout",
        )
    if not holds("language"):
        raise _AbsentError(
            f"{where} is not PyPTO: it has no pypto.language", f"{BUILD}; {EMULATED}"
        )
    if not binaries:
        raise _AbsentError(
            f"the PyPTO in {where} is not built: it has no pypto_core binary",
            f"run `pip install -e {_root(where)}`; {EMULATED}",
        )
    if not any(b.name.removeprefix("pypto_core") in EXTENSION_SUFFIXES for b in binaries):
        raise _AbsentError(
            f"the PyPTO in {where} was built for another Python ({binaries[0].name})",
            f"build it again with this Python, whose modules end in {EXTENSION_SUFFIXES[0]}",
        )


def _binaries(folders: Sequence[Path]) -> list[Path]:
    native = (".so", ".pyd", ".dylib")
    return [b for f in folders for b in sorted(f.glob("pypto_core*.*")) if b.suffix in native]


def _spec(name: str, search_path: Sequence[Path] = ()) -> ModuleSpec | None:
    """Where a top-level module would be imported from. The module is not executed."""
    spec = PathFinder.find_spec(name, [*map(str, search_path)]) if search_path else None
    if spec is not None and spec.origin is not None:
        return spec
    try:
        return find_spec(name)
    except (ImportError, ValueError):  # a broken import hook, or a module without a spec
        return None


def _root(package: Path) -> Path:
    """The root of the checkout that holds a package."""
    return package.parent.parent if package.parent.name == "python" else package.parent


def _commit(root: Path) -> str | None:
    """The commit of a checkout's HEAD; None where git cannot tell."""
    if not (root / ".git").exists():
        return None
    # On a shared host, a checkout of another user is allowed.
    command = ["git", "-c", f"safe.directory={root.resolve()}", "-C", str(root), "rev-parse"]
    try:
        said = subprocess.run([*command, "HEAD"], capture_output=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return said.stdout.decode(errors="replace").strip()


# --- other requirements of a platform -------------------------------------------------------------


def needs(platform: str | None, installation: Installation, card: int | None) -> Iterator[Check]:
    """What a platform needs besides PyPTO's package. None: all platforms that may apply here."""
    yield from _runtime(installation, platform)
    yield _ptoas(installation)
    if platform is None or platform in SIMULATORS:
        yield _simulators_compiler()
    if platform is None and not _cards() and not os.environ.get("ASCEND_HOME_PATH"):
        yield Check(name="NPU", status="ok", found="none here")
    elif platform is None or platform in HARDWARE:
        yield _cann()
        yield _npu(card)


def _failed(name: str, found: str, advice: str) -> Check:
    return Check(name=name, status="failed", found=found, advice=advice)


def _runtime(installation: Installation, platform: str | None) -> Iterator[Check]:
    """simpler: its Python part, its extension, the binaries for the platform, its PTO-ISA."""
    name, install = "PyPTO's runtime", "`pip install --no-build-isolation -e"
    places = {}
    for module in ("simpler", "simpler_setup", "_task_interface"):
        spec = _spec(module, installation.search_path)
        places[module] = spec.origin if spec else None
    if not all(places.values()):
        missing = " and no ".join(module for module, place in places.items() if not place)
        runtime = next((p for p in installation.search_path if p.name == "runtime"), None)
        yield _failed(name, f"no {missing}", f"run {install} {runtime or '<checkout>/runtime'}`")
        return
    home = Path(places["simpler_setup"] or "").parent
    # A wheel includes its binaries; a checkout has them where they were built.
    root = home / "_assets" if (home / "_assets" / "src").is_dir() else home.parent
    built = [p for p in (*HARDWARE, *SIMULATORS) if _runtime_binary(root, p).is_file()]
    if platform in built or (platform is None and built):
        yield Check(name=name, status="ok", found=f"in {root}, for {', '.join(built)}")
    else:
        yield _failed(
            name,
            f"no {_runtime_binary(root, platform)}" if platform else f"no binaries in {root}",
            f"build the runtime for that platform: {install} {root}` where its compilers are",
        )
    yield _pto_isa(root)


def _runtime_binary(root: Path, platform: str) -> Path:
    variant = "sim" if platform in SIMULATORS else "onboard"
    arch = platform.removesuffix("sim")
    return root / "build" / "lib" / arch / variant / RUNTIME / "libhost_runtime.so"


def _pto_isa(runtime: Path) -> Check:
    """The kernel headers, at the commit that the runtime names; PyPTO clones them if needed."""
    place, pin = runtime / "build" / "pto-isa", runtime / "pto_isa.pin"
    wanted = pin.read_text(errors="replace").strip() if pin.is_file() else None
    if wanted and _commit(place) == wanted.lower():
        return Check(name="PTO-ISA", status="ok", found=str(place))
    return Check(
        name="PTO-ISA",
        status="warning",
        found=f"{place} is not at the commit in {pin}: PyPTO will clone it",
        advice=f"without a network, copy a clone of {PTO_ISA} there, and check out that commit",
    )


def _ptoas_files() -> list[Path]:
    """Existing files among the places of ptoas; PyPTO runs the first executable one."""
    root = os.environ.get("PTOAS_ROOT")
    if root:
        return [f for f in (Path(root) / p for p in PTOAS) if f.is_file()]
    found = shutil.which("ptoas")
    return [Path(found)] if found else []


def _ptoas(installation: Installation) -> Check:
    """Check the assembler, and that this PyPTO generates code for its version."""
    files = _ptoas_files()
    usable = next((f for f in files if os.access(f, os.X_OK)), None)
    pin = _ptoas_pin(installation)
    wanted = f"a release of ptoas {pin}" if pin else "a release of the version that PyPTO requires"
    advice = f"set PTOAS_ROOT to {wanted}"
    if usable is None:
        root = os.environ.get("PTOAS_ROOT")
        place = (
            f"PTOAS_ROOT={root} (in {', '.join(PTOAS)})" if root else "PATH; PTOAS_ROOT is not set"
        )
        found = f"{files[0]} is not executable" if files else f"none in {place}"
        return _failed("ptoas", found, advice)
    try:
        said = subprocess.run(
            [str(usable), "--version"], capture_output=True, text=True, check=True, timeout=60
        )
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        found = f"{usable} --version failed: {' '.join(str(error).split())}"
        return _failed("ptoas", found, advice)
    printed = f"{said.stdout}{said.stderr}".strip()
    match = re.search(r"\bptoas[^\d\n]*?(\d+(?:\.\d+)+)", printed)
    if match is None:
        found = f"{usable} --version printed no version: {printed!r:.200}"
        return _failed("ptoas", found, advice)
    version = match[1]
    if pin and not pin.admits(version):
        return _failed(
            "ptoas",
            f"{usable} is version {version}, but {installation.folders[0]} needs {pin} "
            f"({pin.where}): with another version, kernels give wrong results or do not compile",
            advice,
        )
    return Check(name="ptoas", status="ok", found=f"{usable}, version {version}")


@frozen
class _Pin:
    """The version of ptoas that a PyPTO generates code for."""

    version: str
    or_newer: bool
    where: str
    """The name of the setting and the file that it was read from."""

    def __str__(self) -> str:
        return f"{self.version} or newer" if self.or_newer else self.version

    def admits(self, version: str) -> bool:
        found, wanted = _numbers(version), _numbers(self.version)
        return found >= wanted if self.or_newer else found == wanted


def _numbers(version: str) -> list[int]:
    """A version as comparable numbers: 0.57.0 equals 0.57."""
    numbers = [int(part) for part in version.split(".")]
    while numbers and not numbers[-1]:
        numbers.pop()
    return numbers


def _ptoas_pin(installation: Installation) -> _Pin | None:
    """The required version; None where PyPTO's files name none: a wheel before September 2026.

    Since then PyPTO has a minimum version, which it checks when it compiles. An older checkout
    names the version that it is tested with, the only one known to work: e2d0f78 names 0.57, and
    with 0.60 its matrix products were wrong.
    """
    package = installation.folders[0]
    for file, name, or_newer in (
        (package / "backend" / "_ptoas_locate.py", "PTOAS_MIN_VERSION", True),
        (_root(package) / "toolchain" / "versions.env", "PTOAS_VERSION", False),
    ):
        if file.is_file():
            text = file.read_text(errors="replace")
            found = re.search(rf"^{name}\s*=\s*[\"']?v?(\d+(?:\.\d+)+)", text, re.MULTILINE)
            if found:
                return _Pin(found[1], or_newer, f"{name} in {file}")
    return None


def _simulators_compiler() -> Check:
    name, compiler = f"{GXX} for the simulators", shutil.which(GXX)
    if compiler is None:
        other = shutil.which("g++")
        return _failed(
            name,
            "none on PATH" + (f", only {other}" if other else ""),
            f"install {GXX}, or link g++ 13 or newer as {GXX}",
        )
    # PyPTO's headers silently treat BF16 as FP16 where the compiler lacks BF16.
    command = [compiler, "-std=c++23", "-x", "c++", "-dM", "-E", os.devnull]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        found = f"{compiler} does not work: {' '.join(str(error).split())}"
        return _failed(name, found, "repair or reinstall it")
    if "__STDCPP_BFLOAT16_T__" not in said.stdout:
        return _failed(
            name,
            f"{compiler} has no BF16 type, so simulators would compute in FP16",
            "install g++ 13 or newer under that name",
        )
    return Check(name=name, status="ok", found=f"{compiler}, with BF16")


def _ccec() -> Path | None:
    """CANN's compiler."""
    home = os.environ.get("ASCEND_HOME_PATH")
    file = Path(home) / "bin" / "ccec" if home else None
    return file if file and file.is_file() else None


def _cann() -> Check:
    name, home = "CANN toolkit", os.environ.get("ASCEND_HOME_PATH")
    advice = "install it, and source its set_env.sh in the shell that runs tilewright"
    if not home:
        toolkit = os.environ.get("ASCEND_TOOLKIT_HOME")
        advice = f"export ASCEND_HOME_PATH={toolkit}" if toolkit else advice
        return _failed(name, "ASCEND_HOME_PATH is not set", advice)
    if _ccec() is None:
        return _failed(name, f"ASCEND_HOME_PATH={home} has no bin/ccec", advice)
    return Check(name=name, status="ok", found=home)


def _npu(card: int | None) -> Check:
    name, cards, see = "NPU", _cards(), "see `npu-smi info`"
    here = f"cards here: {', '.join(map(str, cards))}" if cards else "no cards here"
    for node in ("davinci_manager", *([f"davinci{card}"] if card is not None else [])):
        file = DEV / node
        if not file.exists():
            advice = f"{see}; a container needs the devices of its cards and of the manager"
            return _failed(name, f"no {file} ({here})", advice)
        if not os.access(file, os.R_OK | os.W_OK):
            return _failed(
                name, f"{file} is not accessible to this user", "join the group that owns it"
            )
    return Check(name=name, status="ok", found=here) if cards else _failed(name, here, see)


def _cards() -> list[int]:
    """Numbers of the Ascend cards that are visible on this machine or in this container."""
    numbers = (n.name.removeprefix("davinci") for n in DEV.glob("davinci[0-9]*"))
    return sorted(int(n) for n in numbers if n.isdigit())
