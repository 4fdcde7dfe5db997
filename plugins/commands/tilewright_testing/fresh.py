"""Checks that suites run in a fresh process, where nothing is imported yet.

``python -m tilewright_testing.fresh FUNCTION`` reads ``[sys.path, arguments]`` from standard input
and prints the answer as its last line, both in JSON.
"""

import json
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from typing import Any

from tilewright_testing.files import bytes_read

_EFFECTS = (
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.chdir",
    "os.system",
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.posix_spawn",
    "subprocess.Popen",
    "socket.connect",
    "socket.getaddrinfo",
    "socket.gethostbyname",
    "tempfile.mkstemp",
    "tempfile.mkdtemp",
)
"""Python's audit events that show side effects."""

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def imported_by(module: str, *names: str) -> list[str]:
    """Those of some modules that importing a module imports."""
    import_module(module)
    return [name for name in names if name in sys.modules]


def changed_by_import(module: str, *present: str) -> list[str] | None:
    """What importing a module changes in the process's state, in words.

    present: modules that are imported first, so that only the module's own effects show. Returns
    None when the module imports torch and present does not include it: call again with torch in
    present. Importing torch takes seconds, so the first call does not import it."""
    for needed in ("tilewright.hookspecs", "tilewright.types", *present):
        import_module(needed)
    from tilewright_testing.state import differences, global_state

    if "torch" not in sys.modules:
        sys.meta_path.insert(0, _NoTorch())
    before = global_state()
    try:
        import_module(module)
    except _TorchNeededError:
        return None
    return differences(before, global_state())


def imported_for_help(target: str) -> list[str]:
    """The slow packages that importing and configuring a command imports."""
    from tilewright import plugins
    from tilewright.cli.parser import Parser

    command = plugins.imported(target)
    command.configure(Parser(prog="tilewright command"))
    return [name for name in ("torch", "rich", "transformers") if name in sys.modules]


class _TorchNeededError(BaseException):
    """Not an Exception, so that modules with a fallback for a missing torch do not use it."""


class _NoTorch(MetaPathFinder):
    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        if fullname == "torch":
            raise _TorchNeededError


def probe_loader(target: str, sources: Sequence[str]) -> dict[str, Any]:
    """What can_load returns for each source, and the effects of the calls: whether torch was
    imported, side effects, and bytes read by a second call for the first source."""
    from tilewright import plugins

    loader = plugins.imported(target)
    effects: list[str] = []

    def listen(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _EFFECTS or (event == "open" and (arguments[2] or 0) & _WRITING):
            effects.append(f"{event} {arguments[0]!r:.100}")

    environment = dict(os.environ)
    sys.addaudithook(listen)
    answers = []
    for source in sources:
        try:
            answer = plugins.call(loader, "can_load", source=source)
            answers.append(answer if isinstance(answer, bool) else f"returned {answer!r:.100}")
        except BaseException as error:
            answers.append(f"raised {type(error).__name__}: {' '.join(str(error).split())[:200]}")
    if environment != dict(os.environ):
        effects.append("environment variables")
    before = bytes_read()
    plugins.call(loader, "can_load", source=sources[0])
    return {
        "answers": answers,
        "effects": list(dict.fromkeys(effects)),
        "torch": "torch" in sys.modules,
        "bytes": bytes_read() - before,
    }


if __name__ == "__main__":
    path, arguments = json.load(sys.stdin)
    sys.path[:] = path
    # Compiled files of imported modules would count as a side effect.
    sys.dont_write_bytecode = True
    answer = globals()[sys.argv[1]](*arguments)
    print()
    print(json.dumps(answer))
