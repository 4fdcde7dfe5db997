"""A fake PyPTO for tests: the part of its API that tilewright_pypto.adapter uses.

``python/pypto`` stands in for the package. It "compiles" a kernel to a file that names it, and
runs it with the emulated language; memory of its device is opaque to the caller.
test_pypto_adapter checks its names and parameters against the real ones.

It fails as set in the environment variable FAKE_PYPTO, a JSON object from places (``compile
head``, ``load head``, ``register head``, ``run head``, ``open``, ``malloc``, ``free``, ``close``)
to the message of the exception raised there, the name of the signal that ends the process there, or
the seconds that it takes there. FAKE_PYPTO_LOG is a file that gets one line per event;
FAKE_PYPTO_MEMORY is the size of device memory in bytes.
"""

import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

BINARY = f"pypto_core{EXTENSION_SUFFIXES[0]}"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
PTOAS = "#!/bin/sh\necho ptoas 0.57\n"
PLATFORMS = {"a2a3": "onboard", "a5": "onboard", "a2a3sim": "sim", "a5sim": "sim"}


def checkout(root: Path) -> Path:
    """A built checkout, with the runtime for all platforms."""
    package = root / "python" / "pypto"
    source = Path(__file__).parent / "python" / "pypto"
    shutil.copytree(source, package, ignore=shutil.ignore_patterns("__pycache__"))
    files = {
        package / BINARY: "",
        root / "runtime" / "simpler_setup" / "__init__.py": "",
        root / "runtime" / "python" / "simpler" / "__init__.py": "",
        root / "runtime" / "python" / f"_task_interface{EXTENSION_SUFFIXES[0]}": "",
        root / "runtime" / "pto_isa.pin": f"{COMMIT}\n",
        root / "toolchain" / "versions.env": "# pinned\nPTOAS_VERSION=v0.57\n",
    }
    for git in (root / ".git", root / "runtime" / "build" / "pto-isa" / ".git"):
        files |= {
            git / "HEAD": f"{COMMIT}\n",
            git / "objects" / "none": "",
            git / "refs" / "none": "",
        }
    for platform, variant in PLATFORMS.items():
        built = root / "runtime" / "build" / "lib" / platform.removesuffix("sim") / variant
        files[built / "tensormap_and_ringbuffer" / "libhost_runtime.so"] = ""
    for file, text in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


def program(file: Path, text: str = "#!/bin/sh\n") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    file.chmod(0o755)
    return file


def machine(folder: Path) -> dict[str, str]:
    """The environment of a machine with all of PyPTO's requirements except cards."""
    program(folder / "bin" / "g++-15", "#!/bin/sh\necho '#define __STDCPP_BFLOAT16_T__ 1'\n")
    program(folder / "ptoas" / "ptoas", PTOAS)
    program(folder / "cann" / "bin" / "ccec")
    return {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "PTOAS_ROOT": str(folder / "ptoas"),
        "ASCEND_HOME_PATH": str(folder / "cann"),
        "FAKE_PYPTO_LOG": str(folder / "log"),
    }


def cards(folder: Path, *numbers: int) -> Path:
    """A folder that stands in for /dev, with the given Ascend cards."""
    folder.mkdir()
    for node in ("davinci_manager", *(f"davinci{n}" for n in numbers)):
        (folder / node).touch()
    return folder


def failing(**how: str | float) -> str:
    """A value for FAKE_PYPTO: ``compile_head="out of paper"``."""
    return json.dumps({place.replace("_", " ", 1): what for place, what in how.items()})


@contextmanager
def unimported() -> Iterator[None]:
    """Within the context, the process has not imported pypto; modules are restored afterwards."""
    path, modules = list(sys.path), _pyptos()
    for name in modules:
        del sys.modules[name]
    logger = logging.getLogger("pypto")
    level = logger.level
    logger.setLevel(logging.NOTSET)
    try:
        yield
    finally:
        logger.setLevel(level)
        for name in _pyptos():
            del sys.modules[name]
        sys.modules.update(modules)
        sys.path[:] = path


def _pyptos() -> dict[str, object]:
    return {n: m for n, m in sys.modules.items() if n == "pypto" or n.startswith("pypto.")}
