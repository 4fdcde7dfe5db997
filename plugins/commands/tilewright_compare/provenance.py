"""How a report was made: the command, both executors, the prompts, versions and the machine."""

import platform
import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from attrs import asdict, fields, frozen

from tilewright import __version__, plugins
from tilewright.errors import listed
from tilewright.types import RuntimeConfig
from tilewright_compare.default_run import Plan
from tilewright_compare.sides import Choice


@frozen(kw_only=True)
class MadeSide:
    """An executor, and what was set for it."""

    executor: str
    distribution: str
    """The distribution that has the executor's plugin, and its version."""
    options: Mapping[str, Any]
    runtime: Mapping[str, Any]
    """The runtime settings that are not the default."""

    def __str__(self) -> str:
        given = [f"{k}={v}" for k, v in self.options.items()]
        given += [f"runtime.{k}={v}" for k, v in self.runtime.items()]
        return f"{self.executor} of {self.distribution}, {', '.join(given) or 'default settings'}"


@frozen(kw_only=True)
class Made:
    """How a comparison was made."""

    command: str
    """As it was typed, quoted for a shell."""
    date: str
    """When it began, ISO 8601 in UTC."""
    candidate: MadeSide
    reference: MadeSide
    fingerprint: str
    """Identifies the model, as ``tilewright convert`` does."""
    prompts: tuple[tuple[int, ...], ...]
    """Token ids."""
    new_tokens: int
    chunk: int
    versions: Mapping[str, str]
    """Versions of Python, torch, and each distribution that has plugins."""
    platform: str
    cpu: str

    def lines(self, device: str) -> list[str]:
        """For a reader. device: the candidate's."""
        lengths = [str(len(ids)) for ids in self.prompts]
        versions = (f"{name} {version}" for name, version in self.versions.items())
        return [
            f"command: {self.command}",
            f"date: {self.date}",
            f"candidate: {self.candidate}",
            f"reference: {self.reference}",
            f"prompts: {len(lengths)}, of {listed(lengths)} tokens; {self.new_tokens} new tokens; "
            f"chunks of at most {self.chunk}",
            f"versions: {', '.join(versions)}",
            f"machine: {self.platform}, {self.cpu}; the candidate runs on {device or 'no device'}",
        ]


def made(
    argv: Sequence[str],
    candidate: Choice,
    reference: Choice,
    fingerprint: str,
    plan: Plan,
) -> Made:
    """For a comparison that begins now."""
    import torch

    distributions = {p.distribution: p.version for p in plugins.installed()}
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return Made(
        command=shlex.join(["tilewright", *argv]),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        candidate=_side(candidate),
        reference=_side(reference),
        fingerprint=fingerprint,
        prompts=tuple(map(tuple, plan.prompts)),
        new_tokens=plan.new_tokens,
        chunk=plan.chunk,
        versions={"tilewright": __version__} | versions | distributions,
        platform=platform.platform(),
        cpu=_cpu(),
    )


def _side(choice: Choice) -> MadeSide:
    plugin = plugins.find("executor", choice.executor)
    runtime = asdict(choice.runtime)
    defaults = {f.name: f.default for f in fields(RuntimeConfig)}
    return MadeSide(
        executor=choice.executor,
        distribution=f"{plugin.distribution} {plugin.version}",
        options=_plain(choice.options),
        runtime=_plain({k: v for k, v in runtime.items() if v != defaults[k]}),
    )


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as JSON has them; others as text."""
    return {k: v if isinstance(v, str | int | float | None) else str(v) for k, v in values.items()}


def _cpu() -> str:
    """The CPU's name, or its architecture where the system does not name it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
