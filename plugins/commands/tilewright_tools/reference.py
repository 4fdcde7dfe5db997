"""Command-line reference, from the parsers: ``python -m tilewright_tools.reference``.

Uses the arguments rather than argparse's help, since the layout of the help differs between
versions of Python.
"""

import argparse
import sys
from collections.abc import Iterator

from tilewright.cli import COMMANDS, build_parser, subparsers

_HEAD = """\
# The command line

<!-- Made by `python -m tilewright_tools.reference > docs/cli.md`; do not edit. -->

`python -m tilewright` is the same as `tilewright`. Results go to standard output, everything else
to standard error. Exit codes: 0; 1 when `plugins check` or `doctor` finds something broken, or
`compare` a difference; 2 for a mistake, told in one line (`--debug` shows the traceback); 130 after
Ctrl-C; 141 when the reader of a pipe went away.

A setting is taken from its flag, else from the environment as `TILEWRIGHT_<SECTION>_<KEY>`
(`TILEWRIGHT_RUNTIME_PAGE_SIZE`, `TILEWRIGHT_MODEL_PATH`, `TILEWRIGHT_OPTIONS_EXECUTOR_<OPTION>`),
else from the [run file](run-files.md), else from the [models file](models.md) that has the model's
name, else it is the default.
"""


def reference() -> str:
    """Markdown."""
    parser = build_parser(COMMANDS)
    lines = [_HEAD]
    for name, command in subparsers(parser).items():
        lines += _command(f"tilewright {name}", command)
    return "\n".join(lines)


def _command(name: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    yield f"## {name}\n"
    yield f"{parser.description}\n"
    nested = subparsers(parser)
    if not nested:
        words = [
            f"[{action.metavar}]" if action.nargs == "?" else f"{action.metavar}"
            for action in parser._actions
            if not action.option_strings
        ]
        yield f"    {' '.join([name, '[options]', *words])}\n"
    for group in parser._action_groups:
        entries = [line for action in group._group_actions for line in _entry(action, parser)]
        if entries:
            yield f"{str(group.title).capitalize()}:\n"
            yield from entries
            yield ""
    for word, command in nested.items():
        yield from _command(f"{name} {word}", command)


def _entry(action: argparse.Action, parser: argparse.ArgumentParser) -> Iterator[str]:
    if isinstance(action, (argparse._HelpAction, argparse._SubParsersAction)):
        return
    if "--debug" in action.option_strings:
        return
    value = "" if action.nargs == 0 else str(action.metavar or action.dest.upper())
    if action.choices and not action.metavar:
        value = "{" + ",".join(map(str, action.choices)) + "}"
    if action.nargs == "+":
        value = f"{value} ..."
    shown = ", ".join(f"{flag} {value}".strip() for flag in action.option_strings) or value
    yield f"- `{shown}`: {(action.help or '').replace('%%', '%')}"


if __name__ == "__main__":
    sys.stdout.write(reference())
