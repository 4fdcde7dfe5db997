"""Runs commands under the stand-in for task-submit."""

import os
import subprocess
import sys
from pathlib import Path

from checkout import ROOT

from tilewright.settings import DEMO_MODEL

STAND_IN = str(ROOT / "tests/support/task_submit.py")
EXAMPLE = f"{sys.executable} {ROOT}/examples/qwen3_14b_local_generate.py --model-dir {DEMO_MODEL}"
TILEWRIGHT = f"{sys.executable} -m tilewright"

# A text of core/tilewright/demo_model/README.md: the prompt and its continuation.
PLEDGE = "we mutually pledge to each other our Lives,"
PLEDGED = " our Fortunes, and our sacred Honor."


def submit(command: str, *argv: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, STAND_IN, *(argv or ("--device", "auto")), "--run", command],
        capture_output=True,
        text=True,
        cwd=cwd,
        # One thread: tests that run at the same time need the other cores.
        env=os.environ | {"ASCEND_RT_VISIBLE_DEVICES": "0,1", "OMP_NUM_THREADS": "1"},
    )
