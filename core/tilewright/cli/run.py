"""Run what a run file describes.

Flags and the environment override the file.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tilewright import toml
from tilewright.cli import flags
from tilewright.cli.generate import produce
from tilewright.cli.session import check_plugins
from tilewright.config import DEFAULT, Resolved, resolve
from tilewright.plugins import ENGINE_KINDS
from tilewright.settings import SECTIONS, Place, keys
from tilewright.types import BUILTIN_GENERATE

tilewright_api = 2


def configure(parser: argparse.ArgumentParser) -> None:
    parser.usage = "tilewright run [options] CONFIG"
    parser.add_argument("config", metavar="CONFIG", help="the run file, in TOML")
    parser.add_argument(
        "--show",
        action="store_true",
        help="check the settings, print them with their origins in the format of a run file, and "
        "exit",
    )
    flags.add_output_flags(parser)
    flags.add_chat_flags(parser)
    flags.add_generate_flags(parser)
    flags.add_engine_flags(parser)


def run(args: argparse.Namespace) -> int:
    resolved = resolve(Path(args.config), flags.layer(args))
    if args.show:
        check_plugins(resolved)
        sys.stdout.write(show(resolved))
        return 0
    return produce(resolved, args)


def show(resolved: Resolved) -> str:
    """A run file with all settings, each with its origin in a comment.

    Settings without a value are commented out, with what decides them.
    """
    lines: list[str] = []
    for section in SECTIONS:
        lines += ["", f"[{section}]", *_lines(resolved, section)]
        if section == "plugins":
            for place, table in _tables(resolved.config.options):
                lines += ["", f"[{'.'.join(map(toml.written_key, place))}]"]
                if place[1] == "loader" and resolved.config.plugins.loader is None:
                    lines.append("# not checked: the loader is chosen when the model is loaded")
                lines += [
                    f"{toml.setting(key, value)}  # {resolved.origin(*place, key)}"
                    for key, value in table.items()
                ]
    return "\n".join(lines[1:]) + "\n"


def _lines(resolved: Resolved, section: str) -> Iterator[str]:
    settings = getattr(resolved.config, section)
    for key in keys(section):
        value = getattr(settings, key)
        if value is not None and (section, value) != ("prompts", ()):
            yield f"{toml.setting(key, value)}  # {resolved.origin(section, key)}"
        elif section == "generate":
            builtin = getattr(BUILTIN_GENERATE, key)
            if builtin is None:  # models recommend none of these
                yield f"# {key}: {'random' if key == 'seed' else 'none'}"
            else:
                yield f"# {key}: as the model recommends, or else {toml.written(builtin)}"
        elif resolved.origin(section, key) != DEFAULT:
            yield f"# {key}: set by {resolved.origin(section, key)}"
        else:
            yield f"# {key}: {_WHEN_OPEN[section]}"


_WHEN_OPEN = {
    "plugins": "the loader that recognises the model",
    "model": "the format whose files are found",
    "runtime": "decided when the model is loaded",
    "prompts": "none",
    "chat": "none",
    "output": "standard output",
}


def _tables(options: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[Place, Mapping[str, Any]]]:
    for kind, table in options.items():
        if ENGINE_KINDS[kind].several:
            for name, named in table.items():
                yield ("options", kind, name), named
        else:
            yield ("options", kind), table
