"""What ``tilewright doctor`` says about CUDA devices."""

from importlib.util import find_spec
from pathlib import Path
from platform import python_version
from shutil import which
from sysconfig import get_path

import torch

from tilewright.types import Check
from tilewright_torch.card import LEAST_CAPABILITY, dotted, first_line


def checks() -> list[Check]:
    """One check for CUDA as a whole, and one for each card."""
    if not torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]
        found = f"torch {torch.__version__} was built without CUDA: device cpu only"
        return [Check(name="CUDA", status="ok", found=found)]
    built = f"torch {torch.__version__} with CUDA {torch.version.cuda}"
    if not torch.cuda.is_available():
        found = f"{built}, and no card or driver that it can use"
        advice = (
            "for device = 'cuda', check `nvidia-smi`; the driver must be as new as torch's CUDA"
        )
        return [Check(name="CUDA", status="ok", found=found, advice=advice)]
    return [_kernels(built), *(_card(i) for i in range(torch.cuda.device_count()))]


def _kernels(built: str) -> Check:
    """Triton compiles the kernels, and builds its launchers in C."""
    missing = []
    if find_spec("triton") is None:
        missing.append("Triton (`pip install triton`)")
    if not any(map(which, ("cc", "gcc", "clang"))):
        missing.append("a C compiler such as gcc")
    if not Path(get_path("include"), "Python.h").is_file():
        missing.append(f"the header Python.h of Python {python_version()} (python3-dev)")
    if not missing:
        return Check(name="CUDA", status="ok", found=f"{built}, with Triton")
    lacking = " and ".join(missing)
    return Check(
        name="CUDA",
        status="warning",
        found=f"{built}, without {lacking}",
        advice=f"device = 'cuda' needs {lacking}: install it",
    )


def _card(index: int) -> Check:
    name = f"cuda:{index}"
    try:
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
    except RuntimeError as error:
        advice = "check `nvidia-smi`: another process may hold the card, or the driver has failed"
        return Check(name=name, status="failed", found=first_line(error), advice=advice)
    capability = properties.major, properties.minor
    found = (
        f"{properties.name}, compute capability {dotted(capability)}, "
        f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    )
    if capability < LEAST_CAPABILITY:
        advice = f"executor torch needs compute capability {dotted(LEAST_CAPABILITY)} or later"
        return Check(name=name, status="warning", found=found, advice=advice)
    return Check(name=name, status="ok", found=found)
