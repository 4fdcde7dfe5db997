"""Command-line reference, from the parsers: ``python -m tilewright_tools.reference``.

Reads them from argparse's help, one line per argument, since argparse has no public interface that
lists them.
"""

import re
import sys
from collections.abc import Iterator

from tilewright import plugins
from tilewright.cli import add_arguments
from tilewright.cli.parser import Parser, sections

_HEAD = """\
# The command line

<!-- Made by `python -m tilewright_tools.reference > docs/cli.md`; do not edit. -->

`python -m tilewright` is the same as `tilewright`. Results go to standard output, everything else
to standard error. Exit codes:

- 0: success
- 1: `plugins check` or `doctor` found something broken, `plugins verify` a test that fails, or
  `compare` a difference
- 2: a mistake, reported in one line (`--debug` shows the traceback)
- 3: no test of `plugins verify` failed, but some could not be run
- 130: interrupted by Ctrl-C
- 141: the reader of a pipe went away

A setting is taken from its flag, else from the environment as `TILEWRIGHT_<SECTION>_<KEY>`
(`TILEWRIGHT_RUNTIME_PAGE_SIZE`, `TILEWRIGHT_MODEL_PATH`, `TILEWRIGHT_OPTIONS_EXECUTOR_<OPTION>`),
else from the [run file](run-files.md), else from the [models file](models.md) that defines the
model's name, else it is the default.
"""


def reference() -> str:
    """Markdown."""
    lines = [_HEAD]
    for plugin in plugins.installed("command"):
        if plugin.distribution == "tilewright":
            description = f"{plugins.summary(plugin)}."
            parser = _Parser(prog=f"tilewright {plugin.name}", description=description)
            add_arguments(parser, plugins.load(plugin))
            lines += _command(parser)
    return "\n".join(lines)


class _HelpCalledError(Exception):
    """Carries the parser whose help was asked for."""


class _Parser(Parser):
    def print_help(self, file: object = None) -> None:
        raise _HelpCalledError(self)


def _command(parser: _Parser) -> Iterator[str]:
    yield f"## {parser.prog}\n"
    yield f"{parser.description}\n"
    groups = dict(sections(parser))
    words = [names for names, _ in groups.get("positional arguments", ())]
    actions = words[1:] if words[:1] == ["ACTION"] else []
    if not actions:
        usage = parser.usage or " ".join([parser.prog, "[options]", *words])
        yield f"    {usage}\n"
    for title, entries in groups.items():
        shown = [entry for entry in entries if entry[0] not in ("-h, --help", "--debug")]
        if shown and not actions:
            yield f"{title.capitalize()}:\n"
            for names, text in shown:
                # As Python 3.13 shows them; before, the value is there after each name.
                names = re.sub(r"^(-\w) (\S+)(, --\S+ \2)$", r"\1\3", names)
                yield f"- `{names}`: {text}"
            yield ""
    for action in actions:
        try:
            parser.parse_args([action, "--help"])
        except _HelpCalledError as asked:
            yield from _command(asked.args[0])


if __name__ == "__main__":
    sys.stdout.write(reference())
