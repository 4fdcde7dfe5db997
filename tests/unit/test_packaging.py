"""What is published: a wheel that works outside the checkout, and sources that compile."""

import compileall
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from checkout import ROOT


def test_the_wheel_runs_the_bundled_model_outside_the_checkout(tmp_path):
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("tilewright-*.whl")
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    (site,) = environment.glob("lib/python*/site-packages")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", str(wheel)]
    subprocess.run(pip, check=True, capture_output=True)
    # The dependencies, torch among them, are those of this environment; its .pth files, such as
    # that of an editable tilewright, are not read there.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    command = [environment / "bin" / "tilewright", "generate", "--max-new-tokens", "6"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == " that all men are created equal\n"
    where = [python, "-c", "import tilewright, tilewright_torch; print(tilewright.__file__)"]
    done = subprocess.run(where, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert Path(done.stdout).is_relative_to(site)


def test_all_sources_compile():
    for folder in ("core", "plugins", "kernels", "examples"):
        assert compileall.compile_dir(ROOT / folder, quiet=1, force=True)


def test_the_readme_gives_the_test_command_that_ci_runs():
    readme = (ROOT / "README.md").read_text()
    assert "\n    bash tests/run.sh\n" in readme
    assert re.search(r"^VENV=\S+ bash tests/run.sh$", (ROOT / ".ci/run").read_text(), re.M)
