"""What ``tilewright doctor`` says about this machine's CPU and its C++ compiler."""

import subprocess

import torch

from tilewright.errors import ExecutorError
from tilewright.types import Check
from tilewright_torch.linear import has_native
from tilewright_torch.native import compiler
from tilewright_torch.quantised import has_native_products


def checks() -> list[Check]:
    return [_products(), _quantised_products(), _compiled_steps()]


def _products() -> Check:
    native = [d for d in ("bfloat16", "float16") if has_native(getattr(torch, d))]
    found = f"{' and '.join(native)} natively" if native else "float32 only"
    if len(native) < 2:
        found += (
            "; other 16-bit dtypes are widened to float32 block by block, which is as exact, "
            "slower in prefill and as fast in decode"
        )
    return Check(name="matrix products on this CPU", status="ok", found=found)


def _quantised_products() -> Check:
    if has_native_products():
        found = "natively in decode of bfloat16 models; widened block by block otherwise"
    else:
        found = "none natively: weights are widened block by block, which saves memory, not time"
    return Check(name="int8 and int4 products on this CPU", status="ok", found=found)


def _compiled_steps() -> Check:
    """The compiler for option compile. Nothing else needs one, so the check is ok without."""
    name = "C++ compiler"
    try:
        command = compiler()
        asked = [*command, "--version"]
        done = subprocess.run(asked, capture_output=True, text=True, errors="replace", timeout=10)
    except ExecutorError as error:
        return Check(name=name, status="ok", found="none", advice=str(error))
    except (OSError, subprocess.SubprocessError) as error:
        advice = f"set CXX to a C++ compiler that runs: {error}"
        return Check(name=name, status="warning", found=command[0], advice=advice)
    version = (done.stdout.splitlines() or ["unknown version"])[0]
    found = f"{command[0]}, {version}: option compile = true makes decoding faster"
    return Check(name=name, status="ok", found=found)
