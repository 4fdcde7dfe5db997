"""Check this machine.

Reports its resources and its faults, with advice on how to fix them.
"""

import argparse
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path

import attrs

from tilewright import plugins
from tilewright.cli.tables import print_json
from tilewright.errors import ConfigError, PluginError, listed
from tilewright.machine import available_memory, total_memory
from tilewright.types import Check

tilewright_api = 2

GIB = 1 << 30
LOW_MEMORY = 2 * GIB
"""Below this, only the smallest models fit with their KV cache."""
LOW_DISK = 2 * GIB
REPAIR = "repair, update or uninstall its distribution; other plugins work without it"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.description = "Check this machine: exit code 1 if a check failed."


def run(args: argparse.Namespace) -> int:
    checks: list[tuple[str, Check]] = []
    for about, found in (*machine_checks(), *plugin_checks()):
        checks.append((about, found))
        if not args.json:
            show(about, found)
    failed = sum(check.status == "failed" for _, check in checks)
    warnings = sum(check.status == "warning" for _, check in checks)
    if args.json:
        print_json([{"about": about} | attrs.asdict(check) for about, check in checks])
    else:
        print(f"\n{len(checks)} checks, {warnings} warnings, {failed} failed")
    return int(failed > 0)


def show(about: str, check: Check) -> None:
    print(f"{check.status:<8} {about}: {check.name}: {check.found}")
    if check.advice:
        print(f"{'':<8} -> {check.advice}")


def machine_checks() -> Iterator[tuple[str, Check]]:
    checks: dict[str, Callable[[], Check]] = {
        "python": python,
        "torch": torch,
        "threads": threads,
        "cpu": cpu,
        "memory": memory,
        "model cache": lambda: disk("model cache", model_cache()),
        "working folder": lambda: disk("working folder", Path.cwd()),
        "models by name": models_by_name,
        "output encoding": output_encoding,
    }
    for name, check in checks.items():
        if check in (threads, cpu) and "torch" not in sys.modules:
            continue
        try:
            found = check()
        except Exception as error:
            found = Check(
                name=name,
                status="failed",
                found=plugins.cause(error),
                advice="this check could not run: fix the error that it reports",
            )
        yield "machine", found


def plugin_checks() -> Iterator[tuple[str, Check]]:
    """Whether each plugin loads, and its own checks. A plugin's failure is a failed check."""
    installed = plugins.installed()
    for plugin in installed:
        who = f"{plugins.noun(plugin.kind)} {plugin.qualified}"
        try:
            # Keep what plugins print out of the report.
            with redirect_stdout(sys.stderr):
                loaded = plugins.load(plugin)
        except PluginError as error:
            yield who, Check(name="loads", status="failed", found=str(error), advice=REPAIR)
            continue
        state, problem = plugins.state(plugin, installed)
        if state == "ok":
            yield who, Check(name="loads", status="ok", found=f"version {plugin.version}")
        else:
            advice = f"select it as {plugin.qualified}, or uninstall the other one"
            yield who, Check(name="loads", status="warning", found=problem, advice=advice)
        try:
            with redirect_stdout(sys.stderr):
                own = list(plugins.call(loaded, "doctor_checks") or ())
            if wrong := [check for check in own if not isinstance(check, Check)]:
                raise TypeError(f"doctor_checks() must return Check objects, found {wrong[0]!r}")
        except (Exception, SystemExit) as error:
            found = plugins.cause(error)
            yield who, Check(name="doctor_checks", status="failed", found=found, advice=REPAIR)
            continue
        for check in own:
            yield who, check


def python() -> Check:
    found = f"{platform.python_version()} ({sys.executable})"
    return Check(name="python", status="ok", found=found)


def torch() -> Check:
    try:
        import torch
    except (ImportError, OSError) as error:
        return Check(
            name="torch",
            status="failed",
            found=plugins.cause(error),
            advice="reinstall it: pip install --force-reinstall torch",
        )
    return Check(name="torch", status="ok", found=torch.__version__)


def threads() -> Check:
    import torch

    used, usable = torch.get_num_threads(), len(os.sched_getaffinity(0))
    found = f"torch uses {used}, this process may use {usable} CPUs"
    if used > usable:
        advice = f"set OMP_NUM_THREADS={usable}: threads that wait for a CPU slow each other down"
        return Check(name="threads", status="warning", found=found, advice=advice)
    return Check(name="threads", status="ok", found=found)


def cpu() -> Check:
    import torch

    flags = cpu_flags()
    wanted = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")
    have = ", ".join(flag for flag in wanted if flag in flags) or "no known vector extension"
    level = torch.backends.cpu.get_cpu_capability()
    found = f"{platform.machine()}: {have}; torch runs its {level} kernels"
    if "avx2" not in flags and platform.machine() in ("x86_64", "AMD64"):
        advice = "expect slow runs: torch's fast kernels need AVX2"
        return Check(name="cpu", status="warning", found=found, advice=advice)
    if flags.isdisjoint(("avx512_bf16", "amx_bf16", "bf16")):
        found += "; no BF16 arithmetic"
    return Check(name="cpu", status="ok", found=found)


def cpu_flags() -> set[str]:
    """Extensions of the first CPU in /proc/cpuinfo; empty if it cannot be read."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    named = (line.partition(":") for line in lines)
    return next((set(v.split()) for k, _, v in named if k.strip() in ("flags", "Features")), set())


def memory() -> Check:
    available, total = available_memory(), total_memory()
    found = f"{available / GIB:.1f} of {total / GIB:.1f} GiB available"
    if available < LOW_MEMORY:
        advice = "close other programs, or use a small model with weight_dtype bfloat16"
        return Check(name="memory", status="warning", found=found, advice=advice)
    return Check(name="memory", status="ok", found=found)


def model_cache() -> Path:
    """Where downloaded models go."""
    from tilewright_hf.hub import cache

    return cache()


def disk(name: str, folder: Path) -> Check:
    existing = next(p for p in (folder, *folder.parents) if os.path.exists(p))
    free = shutil.disk_usage(existing).free
    found = f"{free / GIB:.1f} GiB free in {folder}"
    if not os.access(existing, os.W_OK):
        advice = "make it writable, or set HF_HUB_CACHE to another folder"
        return Check(name=name, status="warning", found=f"{found}, not writable", advice=advice)
    if free < LOW_DISK:
        advice = "free space, or set HF_HUB_CACHE to a folder on another disk"
        return Check(name=name, status="warning", found=found, advice=advice)
    return Check(name=name, status="ok", found=found)


def models_by_name() -> Check:
    """Which models files exist, and whether they can be read."""
    from tilewright import models

    name = "models by name"
    files = [str(file) for file in models.files()]
    try:
        known = models.registered()
    except ConfigError as error:
        advice = "correct the file; until then no model can be selected by name"
        return Check(name=name, status="failed", found=str(error), advice=advice)
    where = dict.fromkeys(model.origin.rpartition(":")[0] for model in known.values())
    found = f"{listed(list(known))}, in {' and '.join(where)}" if known else "none"
    return Check(name=name, status="ok", found=f"{found} (looked in {' and '.join(files)})")


def output_encoding() -> Check:
    encoding = sys.stdout.encoding
    if encoding.lower().replace("-", "") != "utf8":
        return Check(
            name="output encoding",
            status="warning",
            found=f"{encoding}: other characters are printed as escapes",
            advice="set PYTHONUTF8=1, or a locale such as LC_ALL=C.UTF-8",
        )
    return Check(name="output encoding", status="ok", found=encoding)
