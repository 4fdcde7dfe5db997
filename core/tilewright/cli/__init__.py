"""The ``tilewright`` command. Its commands are plugins; the one that is called is imported."""

import argparse
import errno
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from typing import TYPE_CHECKING, Any

from tilewright import __version__, plugins
from tilewright.cli.parser import Parser
from tilewright.errors import ConfigError, PluginWarning, TilewrightError, on_one_line

if TYPE_CHECKING:
    from tilewright.types import Command

USER_ERROR, INTERRUPTED, BROKEN_PIPE = 2, 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line (``sys.argv`` by default). Returns the exit code.

    A user's mistake is one line on stderr and code 2; with ``--debug`` its traceback comes first.
    """
    is_process, argv = argv is None, sys.argv[1:] if argv is None else list(argv)
    try:
        _prepare_streams()
        with _plain_warnings():
            code = _run(argv)
        with naming_unwritable("standard output"):
            sys.stdout.flush()
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:
        code = BROKEN_PIPE
    except (TilewrightError, OSError, MemoryError) as error:
        if "--debug" in argv:
            import traceback

            traceback.print_exc()
        message = on_one_line(str(error)) or "out of memory"
        if isinstance(error, OSError) and error.filename is None and error.errno == errno.ENOSPC:
            message = f"standard output cannot be written: {error.strerror}"
        print(f"tilewright: error: {message}", file=sys.stderr)
        code = USER_ERROR
    _give_up_unwritten()
    if code == INTERRUPTED and is_process:
        _leave_threads(code)
    return code


def _run(argv: Sequence[str]) -> int:
    try:
        os.getcwd()
    except FileNotFoundError as error:  # torch ends the process in such a folder
        raise ConfigError("the working folder was deleted: change to another folder") from error
    called = next((word for word in argv if not word.startswith("-")), None)
    commands = [plugins.find("command", called)] if called else plugins.installed("command")
    parser = Parser(prog="tilewright", description="A plugin-based LLM inference framework.")
    parser.add_argument("--version", action="version", version=f"tilewright {__version__}")
    _add_debug(parser, default=False)
    parsers = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for plugin in commands:
        unique = sum(other.name == plugin.name for other in commands) == 1
        name = called or (plugin.name if unique else plugin.qualified)
        summary = plugins.summary(plugin)
        command = parsers.add_parser(
            name, help=summary.replace("%", "%%"), description=f"{summary}."
        )
        if called:
            implementation: Command = plugins.load(plugin)
            add_arguments(command, implementation)
    try:
        args = parser.parse_args(argv)
    except SystemExit as end:  # --help and --version
        return int(end.code or 0)
    if not called:
        names = ", ".join(plugin.name for plugin in commands)
        raise ConfigError(f"expected a command, found none: {names} (see tilewright --help)")
    args.argv = tuple(argv)
    return int(implementation.run(args))


def add_arguments(parser: argparse.ArgumentParser, command: "Command") -> None:
    """Add a command's own arguments, and those that every command has."""
    command.configure(parser)
    _add_debug(parser, default=argparse.SUPPRESS)


def _add_debug(parser: argparse.ArgumentParser, default: Any) -> None:
    parser.add_argument(
        "--debug", action="store_true", default=default, help="show tracebacks of errors"
    )


def _prepare_streams() -> None:
    """Make printing safe where the locale cannot encode Unicode, or a stream is closed."""
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if sys.stdout is None:
        raise ConfigError("standard output is closed: redirect it to a file or to /dev/null")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """In this block, a PluginWarning is one line on stderr, and others are as Python shows them."""
    import warnings

    usual = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *at: Any, **more: Any) -> None:
        if issubclass(category, PluginWarning):
            print(f"warning: {message}", file=sys.stderr, flush=True)
        else:
            usual(message, category, *at, **more)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = usual


@contextmanager
def naming_unwritable(what: str) -> Iterator[None]:
    """Make an OSError of writing, which names no file, a ConfigError that names what is written."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.filename is not None:
            raise
        raise ConfigError(f"{what} cannot be written: {error.strerror or error}") from error


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
