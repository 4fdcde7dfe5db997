"""The parser of the command line: argparse, with errors that suggest the nearest valid word."""

import argparse
import re
from collections.abc import Sequence
from functools import partial
from typing import Any, NoReturn, Protocol

from tilewright.errors import ConfigError, nearest

WIDE = partial(argparse.HelpFormatter, max_help_position=1_000, width=10_000)
"""A formatter that puts each argument and its help on one line."""

_CHOICE = re.compile(r"invalid choice: (.+) \(choose from (.+)\)$")
"""argparse's message for a word that is not among the choices."""


class TakesArguments(Protocol):
    """A parser, or a group of its arguments."""

    def add_argument(self, *names: str, **settings: Any) -> argparse.Action: ...


class Parser(argparse.ArgumentParser):
    """Raises ConfigError for wrong usage, where argparse would print it and exit."""

    def __init__(self, **settings: Any):
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        if found := _CHOICE.search(message):
            word, known = found[1].strip("'"), [name.strip("'") for name in found[2].split(", ")]
            hint = f"unknown {word!r}{nearest(word, known)} ({', '.join(known)})"
            raise ConfigError(f"{message[: found.start()]}{hint} (see {self.prog} --help)")
        raise ConfigError(f"{message} (see {self.prog} --help)")

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        # argparse calls this for the parser of an action too, which knows its own options.
        found, extra = super().parse_known_args(args, namespace)
        if extra:
            raise ConfigError(self._unexpected(extra[0]))
        return found, extra

    def _unexpected(self, word: str) -> str:
        if not word.startswith("-"):
            if not self._get_positional_actions():
                return f"unexpected argument {word!r}: {self.prog} takes options alone"
            return f"unexpected argument {word!r}: quote text that has spaces"
        option = word.partition("=")[0]
        hint = nearest(option, option_strings(self))
        return f"unknown option {option!r}{hint} (see {self.prog} --help)"


def option_strings(parser: argparse.ArgumentParser) -> list[str]:
    """The options of a parser, such as ``-o`` and ``--option``, as its help shows them."""
    return [
        option
        for _, entries in sections(parser)
        for names, _ in entries
        for option in re.findall(r"(?<![\w-])--?[a-z][\w-]*", names)
    ]


def sections(parser: argparse.ArgumentParser) -> list[tuple[str, list[tuple[str, str]]]]:
    """The groups of arguments in a parser's help: the title, and each argument with its help.

    The arguments of an action are not in the help of its command.
    """
    usual, parser.formatter_class = parser.formatter_class, WIDE
    lines = parser.format_help().splitlines()
    parser.formatter_class = usual
    found: list[tuple[str, list[tuple[str, str]]]] = []
    for line in lines:
        if re.fullmatch(r"\S.*:", line):
            found.append((line[:-1], []))
        elif found and line.startswith("  "):
            names, _, text = line.strip().partition("  ")
            found[-1][1].append((names, text.strip()))
    return found
