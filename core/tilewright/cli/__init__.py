"""The ``tilewright`` command. Each command is a module, imported when it is called.

It has ``configure(parser)`` and ``run(args) -> int``, the exit code.
"""

import argparse
import os
import sys
from collections.abc import Collection, Iterator, Sequence
from importlib import import_module
from io import TextIOWrapper
from typing import Any, NoReturn

from tilewright import __version__
from tilewright.errors import ConfigError, TilewrightError, nearest

COMMANDS = {
    "generate": ("tilewright.cli.generate", "continue a prompt"),
    "chat": ("tilewright.cli.chat", "talk with a model"),
    "run": ("tilewright.cli.run", "do what a run file says"),
    "bench": ("tilewright_tools.bench", "measure prefill and decode"),
    "convert": ("tilewright_tools.convert", "write a model as an executor wants it"),
    "verify": ("tilewright_tools.verify", "check the files of a converted model"),
    "compare": ("tilewright_compare.command", "find where two executors differ"),
    "models": ("tilewright.cli.models", "give models names, and list them"),
    "plugins": ("tilewright_tools.plugins", "list, show and check plugins"),
    "doctor": ("tilewright_tools.doctor", "check this machine"),
}
"""Each command's module, and its summary; kept here so that ``--help`` does not
import the modules."""

USER_ERROR, INTERRUPTED, BROKEN_PIPE = 2, 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line (``sys.argv`` by default). Returns the exit code.

    A user's mistake is one line on stderr and code 2; with ``--debug`` its traceback comes first.
    """
    is_process, argv = argv is None, sys.argv[1:] if argv is None else list(argv)
    try:
        _prepare_streams()
        code = _run(argv)
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:
        code = BROKEN_PIPE
    except (TilewrightError, OSError, MemoryError) as error:
        if "--debug" in argv:
            import traceback

            traceback.print_exc()
        message = " ".join(str(error).split()) or "out of memory"
        print(f"tilewright: error: {message}", file=sys.stderr)
        code = USER_ERROR
    _give_up_unwritten()
    if code == INTERRUPTED and is_process:
        _leave_threads(code)
    return code


def _run(argv: Sequence[str]) -> int:
    called = next((word for word in argv if not word.startswith("-")), None)
    parser = build_parser([called] if called in COMMANDS else [])
    try:
        args, extra = parser.parse_known_args(argv)
    except SystemExit as end:  # --help and --version
        return int(end.code or 0)
    if extra:
        raise ConfigError(_unexpected(extra[0], _chosen(parser, args)))
    if args.command is None:
        raise ConfigError(f"a command is missing: {', '.join(COMMANDS)} (tilewright --help)")
    module = import_module(COMMANDS[args.command][0])
    return int(module.run(args))


def build_parser(configured: Collection[str]) -> "Parser":
    """The parser, with the arguments of some commands only: the others are not imported."""
    parser = Parser(prog="tilewright", description="A plugin-based LLM inference framework.")
    parser.add_argument("--version", action="version", version=f"tilewright {__version__}")
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=f"{summary.capitalize()}.")
        if name in configured:
            import_module(module).configure(command)
        command.add_argument(
            "--debug",
            action="store_true",
            default=argparse.SUPPRESS,
            help="show tracebacks of errors",
        )
    return parser


class Parser(argparse.ArgumentParser):
    """Raises ConfigError for wrong usage, and suggests the nearest valid word."""

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = [str(choice) for choice in action.choices]
            raise argparse.ArgumentError(
                action, f"unknown {value!r}{nearest(str(value), known)} ({', '.join(known)})"
            )


def subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """A parser's commands by name."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def _chosen(parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.ArgumentParser:
    """The parser of the command that is called, or of its action, if it has actions."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            chosen = subparsers(parser).get(getattr(args, action.dest))
            return parser if chosen is None else _chosen(chosen, args)
    return parser


def _unexpected(word: str, parser: argparse.ArgumentParser) -> str:
    if not word.startswith("-"):
        return f"unexpected argument {word!r}: quote text that has spaces"
    flag = word.partition("=")[0]
    return f"unknown option {flag!r}{nearest(flag, _flags(parser))} (see {parser.prog} --help)"


def _flags(parser: argparse.ArgumentParser) -> Iterator[str]:
    yield from parser._option_string_actions
    for nested in subparsers(parser).values():
        yield from _flags(nested)


def _prepare_streams() -> None:
    """Make printing safe where the locale cannot encode Unicode, or a stream is closed."""
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if sys.stdout is None:
        raise ConfigError("standard output is closed: redirect it to a file or to /dev/null")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _leave_threads(code: int) -> None:
    """End the process without waiting for a library's threads, such as a stalled download."""
    from threading import active_count

    if active_count() > 1:
        import atexit

        atexit._run_exitfuncs()  # cleanup registered by libraries
        sys.stderr.flush()
        os._exit(code)


def _give_up_unwritten() -> None:
    """Drop output that cannot be written, about which Python would complain at exit."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
