"""The settings of both sides: read from the command line, and written as one."""

import argparse
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import evolve

from tilewright.cli import flags
from tilewright.config import ENVIRONMENT_PREFIX, Resolved, resolve
from tilewright.errors import ConfigError, nearest
from tilewright.settings import Given, Place, RunConfig

if TYPE_CHECKING:
    from tilewright_compare import Choice, Comparison

SIDES = ("candidate", "reference")
_OURS = ("max_seq_len", "max_batch_size", "max_batch_tokens")
"""Runtime settings that follow from the prompts, --new-tokens and --chunk."""
_TWO_DTYPES = ("weight_dtype", "kv_dtype")
"""Settings in which the reference runs twice: in float32, and in the candidate's dtype."""
READERS = ("loader", "weight_format")
"""Kinds of plugins that read the model for both sides."""


def resolved_sides(args: argparse.Namespace) -> tuple[Resolved, Resolved]:
    """Settings of the candidate, with model and prompts, and of the reference.

    A run file and the environment apply to the candidate only.
    """
    shared: dict[Place, Given] = dict(flags.layer(args))
    layers: dict[str, dict[Place, Given]] = {side: {} for side in SIDES}
    for item in args.side_options or ():
        key, value = flags.split(item, "-o", "SIDE.KEY=VALUE")
        side, _, rest = key.partition(".")
        if side in SIDES and rest:
            layers[side][_place(side, rest)] = Given(value, f"-o {key}")
            continue
        if side not in READERS:
            raise ConfigError(
                f"-o {key}: expected candidate.KEY=VALUE or reference.KEY=VALUE, an option of that "
                f"side's executor{nearest(side, SIDES)}"
            )
        shared[flags.option_place(key)] = Given(value, f"-o {key}")
    if args.candidate is not None:
        shared["plugins", "executor"] = Given(args.candidate, "--candidate")
    layers["reference"]["plugins", "executor"] = Given(args.reference, "--reference")
    file = Path(args.config) if args.config else None
    return (
        resolve(file, shared | layers["candidate"]),
        resolve(flags=layers["reference"], environ={}),
    )


def _place(side: str, key: str) -> Place:
    """The place of a runtime setting (``runtime.page_size``) or of an executor's option."""
    section, dot, name = key.partition(".")
    if not dot:
        return ("options", "executor", key)
    if section != "runtime":
        raise ConfigError(
            f"-o {side}.{key}: expected {side}.KEY=VALUE, an executor option, or "
            f"{side}.runtime.KEY=VALUE"
        )
    if name in _OURS:
        raise ConfigError(
            f"-o {side}.{key}: it follows from the prompts, --new-tokens and --chunk: set those"
        )
    if side == "reference" and name in _TWO_DTYPES:
        raise ConfigError(
            f"-o {side}.{key}: the reference runs in float32 and in the candidate's dtype: set "
            f"candidate.{key}"
        )
    return ("runtime", name)


def choices(config: RunConfig, reference: RunConfig) -> "tuple[Choice, Choice]":
    """Candidate and reference. Raises ConfigError when they are identical."""
    from tilewright_compare import Choice

    trusted = Choice(
        executor=reference.plugins.executor,
        options=reference.options.get("executor", {}),
        runtime=reference.runtime,
        loader=config.plugins.loader,
        model_format=config.model.format,
        other_options=reader_options(config),
    )
    others = {k: v for k, v in config.options.items() if k != "executor"}
    tried = evolve(
        trusted,
        executor=config.plugins.executor,
        options=config.options.get("executor", {}),
        runtime=config.runtime,
        kv_allocator=config.plugins.kv_allocator,
        other_options=others,
    )
    if tried == trusted:
        raise ConfigError(
            f"candidate and reference are identical: executor {tried.executor!r} with the same "
            "settings; name another with --candidate, or set one with -o candidate.KEY=VALUE"
        )
    return evolve(tried, observers=config.plugins.observers), trusted


def reader_options(config: RunConfig) -> dict[str, Mapping[str, Any]]:
    return {kind: given for kind, given in config.options.items() if kind in READERS}


def wider(
    comparison: "Comparison", candidate: Resolved, reference: Resolved, args: argparse.Namespace
) -> str:
    """The command that reaches more: without the user's prompts and steps, and without the page
    size, unless only that tells the two sides apart; or in smaller pages where the candidate does
    not declare any. Empty if there is none."""
    from tilewright_compare.coverage import CROSSED, THIRD_PAGE
    from tilewright_compare.default_run import PAGE_SIZE

    if not (comparison.finished and comparison.unreached):
        return ""
    given = args.against or any(("prompts", k) in candidate.origins for k in ("text", "file"))
    paged = any(i.name in (CROSSED, THIRD_PAGE) and not i.reached for i in comparison.coverage)
    small = not comparison.tiles_declared and paged
    small = small and candidate.config.runtime.page_size != PAGE_SIZE
    tried, trusted = choices(candidate.config, reference.config)
    runtime = evolve(trusted.runtime, page_size=tried.runtime.page_size)
    differ = evolve(trusted, runtime=runtime) != evolve(tried, observers=())
    dropped = [*_OURS, "page_size"] if small or differ else list(_OURS)
    page = differ and tried.runtime.page_size
    if not (given or page or args.new_tokens or args.chunk or small):
        return ""
    words = ["tilewright", "compare"]
    for side, resolved in zip(SIDES, (candidate, reference), strict=True):
        words += _flags_of(side, resolved, dropped)
    if small:
        words += ["-o", f"candidate.runtime.page_size={PAGE_SIZE}"]
    if args.isolate:
        words.append("--isolate")
    for text in args.tolerances:
        words += ["--tolerance", text]
    return shlex.join([*words, "--strict"])


def _flags_of(side: str, resolved: Resolved, dropped: Sequence[str]) -> Iterator[str]:
    """The flags that repeat a side's settings, without prompts, the dropped runtime settings and
    what the environment gives."""
    config = resolved.config
    for place, origin in resolved.origins.items():
        if origin.startswith(ENVIRONMENT_PREFIX):
            continue
        match place:
            case ("plugins", "executor") if (
                side != "reference" or config.plugins.executor != "torch"
            ):
                yield from (f"--{side}", config.plugins.executor)
            case ("plugins", "loader") if config.plugins.loader:
                yield from ("--loader", config.plugins.loader)
            case ("model", "path"):
                yield from ("--model", config.model.path)
            case ("model", "format") if config.model.format:
                yield from ("--format", config.model.format)
            case ("options", kind, *names) if kind in ("executor", *READERS):
                value: Any = config.options[kind]
                for name in names:
                    value = value[name]
                key = ".".join([side if kind == "executor" else kind, *names])
                yield from ("-o", f"{key}={_as_flag(value)}")
            case ("runtime", name) if name not in dropped:
                value = getattr(config.runtime, name)
                yield from ("-o", f"{side}.runtime.{name}={_as_flag(value)}")


def _as_flag(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
