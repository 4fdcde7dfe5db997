"""List, show, check, verify and create plugins.

``list`` reads metadata only. ``show`` imports one plugin, ``check`` all of them. ``verify`` runs
the conformance suite of one. ``new`` writes the sources of a new one.
"""

import argparse
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from tilewright import plugins
from tilewright.cli.tables import print_columns, print_json, table_width, terminal_width
from tilewright.errors import ConfigError, ExecutorError, PluginError

if TYPE_CHECKING:
    from tilewright.types import PluginInfo
    from tilewright.values import Option

tilewright_api = 2

NOT_PROVED = 3
"""Exit code of ``verify`` when no test failed but some were not run."""


def configure(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for function, summary in (
        (list_plugins, "list installed plugins and their locations; imports nothing"),
        (show, "show a plugin's options, hooks and limits"),
        (check, "import all plugins and check their hooks; exit code 1 if one is broken"),
        (
            verify,
            "run a plugin's conformance suite; exit code 1 if a test fails, 3 if one was not run",
        ),
    ):
        name = function.__name__.removesuffix("_plugins")
        action = actions.add_parser(name, help=summary, description=f"{summary.capitalize()}.")
        action.set_defaults(function=function)
        if function in (show, verify):
            action.add_argument("name", metavar="NAME", help="NAME or DISTRIBUTION:NAME")
        if function is not check:
            action.add_argument(
                "--kind", choices=list(plugins.KINDS), help="only plugins of this kind"
            )
        if function is verify:
            action.add_argument(
                "-o",
                "--option",
                action="append",
                default=[],
                metavar="KEY=VALUE",
                help="set an option of the plugin (repeatable)",
            )
            action.add_argument(
                "--source",
                metavar="SOURCE",
                help="model that a loader loads; default: the sample that the loader writes",
            )
        action.add_argument("--json", action="store_true", help="print JSON")
    summary = "create a new plugin, with tests and packaging"
    action = actions.add_parser("new", help=summary, description=f"{summary.capitalize()}.")
    action.set_defaults(function=new)
    action.add_argument(
        "kind", metavar="KIND", choices=list(plugins.KINDS), help=", ".join(plugins.KINDS)
    )
    action.add_argument("name", metavar="NAME", help="name by which users select it")
    action.add_argument("--out", metavar="DIR", help="folder to write; default: tilewright-NAME")


def run(args: argparse.Namespace) -> int:
    code: int = args.function(args)
    return code


def list_plugins(args: argparse.Namespace) -> int:
    installed = plugins.installed()
    chosen = [p for p in installed if args.kind in (None, p.kind)]
    states = [plugins.state(p, installed) for p in chosen]
    if args.json:
        print_json(
            record(p) | {"state": state, "problem": why or None}
            for p, (state, why) in zip(chosen, states, strict=True)
        )
        return 0
    header = ("NAME", "KIND", "DISTRIBUTION", "STATE", "WHERE")
    rows = [
        (p.name, p.kind, f"{p.distribution} {p.version}", state, p.where)
        for p, (state, _) in zip(chosen, states, strict=True)
    ]
    if table_width(header, rows) <= terminal_width():
        print_columns(header, rows)
    else:
        print_columns(header[:-1], [row[:-1] for row in rows])
        print()
        for distribution, where in dict.fromkeys((row[2], row[4]) for row in rows):
            print(f"{distribution} is in {where}")
    _print_problems(states)
    return 0


def show(args: argparse.Namespace) -> int:
    presented = [(p, *examine(p)) for p in _named(args)]
    if args.json:
        print_json(
            record(plugin)
            | {
                "summary": info.summary,
                "options": [
                    {
                        "name": option.name,
                        "type": option.expected,
                        "required": not _has_default(option),
                        "default": option.default if _has_default(option) else None,
                        "help": option.help,
                    }
                    for option in options
                ],
                "hooks": hooks,
                "limits": dict(info.limits),
                "ignores": list(info.ignores),
                "distribution": info.distribution,
            }
            | _kernels(plugin)
            for plugin, hooks, info, options in presented
        )
        return 0
    for index, (plugin, hooks, info, options) in enumerate(presented):
        if index:
            print()
        print(plugin)
        print(f"  {info.summary or '(no summary)'}")
        print(f"  {plugin.target}, installed in {plugin.where}")
        print("options:" if options else "options: none")
        for option in options:
            given = f"default {_word(option.default)}" if _has_default(option) else "required"
            print(f"  {option.name}: {option.expected} ({given})")
            if option.help:
                print(f"      {option.help}")
        print(f"hooks: {', '.join(hooks)}")
        print("limits:" if info.limits else "limits: none stated")
        for topic, limit in info.limits.items():
            print(f"  {topic}: {limit}")
        if info.ignores:
            print(f"ignores: {', '.join(info.ignores)}")
        if info.distribution:
            print(f"distribution: {info.distribution}")
        for topic, value in _kernels(plugin).items():
            if isinstance(value, dict):
                print(f"{topic}:")
                for name, what in value.items():
                    print(f"  {name}: {_in_words(name, what) if topic == 'serves' else what}")
            elif value:
                print(f"{topic}: {', '.join(value) if isinstance(value, list) else value}")
    return 0


_FAMILIES = {
    "qk_norm": "a norm for each query and key head",
    "qkv_bias": "biases of queries, keys and values",
    "output_bias": "a bias of attention's output",
    "mlp_bias": "biases of the MLP",
    "sliding_windows": "sliding windows",
}
"""What a model has where a field of ServedModels says True."""


def _in_words(field: str, values: list[Any]) -> str:
    """A field of ServedModels: ``models without biases of the MLP``."""
    if field not in _FAMILIES:
        return f"RoPE {', '.join(values)}"
    with_or_without = " or ".join("with" if value else "without" for value in values)
    return f"models {with_or_without} {_FAMILIES[field]}"


def _kernels(plugin: plugins.Plugin) -> dict[str, Any]:
    """What a kernel set serves, its kernels and its sources; empty for plugins of other kinds.

    Raises PluginError or ExecutorError for a broken set.
    """
    if plugin.kind != plugins.KERNELS.name:
        return {}
    from attrs import asdict

    from tilewright_pypto.inspection import inspected
    from tilewright_pypto.kernels import stated

    loaded = plugins.load(plugin)
    serves = {name: list(values) for name, values in asdict(stated(loaded, str(plugin))).items()}
    kernels, why = inspected(loaded, str(plugin))
    if kernels is None:
        return {"serves": serves, "kernels": [], "sources": {}, "refuses": why}
    sources = {name: str(path) for name, path in kernels.sources.items()}
    return {"serves": serves, "kernels": list(kernels.constants), "sources": sources}


def check(args: argparse.Namespace) -> int:
    from time import perf_counter

    installed = plugins.installed()
    findings = []
    for plugin in installed:
        started = perf_counter()
        try:
            _, info, _ = examine(plugin)
            plugins.check_ignores(str(plugin), info)
            _check_events(plugin)
            _kernels(plugin)
        except (PluginError, ExecutorError) as broken:
            state, problem = "broken", str(broken)
        else:
            state, problem = plugins.state(plugin, installed)
        findings.append((plugin, state, perf_counter() - started, problem))
    for e, problem in plugins.in_unknown_groups():
        named = plugins.Plugin(e.group, e.name, e.distribution, e.version, e.target, e.where)
        findings.append((named, "broken", 0.0, problem))
    if args.json:
        print_json(
            record(plugin)
            | {"state": state, "seconds": round(seconds, 6), "problem": problem or None}
            for plugin, state, seconds, problem in findings
        )
    else:
        print_columns(
            ("NAME", "KIND", "DISTRIBUTION", "STATE", "SECONDS"),
            [
                (p.name, p.kind, f"{p.distribution} {p.version}", state, f"{seconds:.3f}")
                for p, state, seconds, _ in findings
            ],
        )
        _print_problems((state, problem) for _, state, _, problem in findings)
    return int(any(state == "broken" for _, state, _, _ in findings))


def _check_events(plugin: plugins.Plugin) -> None:
    unmarked = plugins.unmarked_events(plugins.load(plugin)) if plugin.kind == "observer" else ()
    if unmarked:
        raise PluginError(
            f"{plugin}: {', '.join(unmarked)} would never be called: mark each with @hookimpl"
        )


def verify(args: argparse.Namespace) -> int:
    from tilewright.cli.flags import split
    from tilewright.plugins import read_options
    from tilewright_testing import verify as suites

    chosen = _named(args)
    given = dict(split(item, "-o", "KEY=VALUE") for item in args.option)
    if args.source is not None and all(p.kind != "loader" for p in chosen):
        raise ConfigError(f"--source is for loaders only, found {chosen[0]}: remove it")
    found = []
    for plugin in chosen:
        _, info, _ = examine(plugin)
        read_options(str(plugin), info, given)  # an error here is the user's, not the plugin's
        source = args.source if plugin.kind == "loader" else None
        found.append((plugin, suites.verify(plugin, given, source)))
    if args.json:
        print_json(
            record(plugin)
            | {"statements": [s._asdict() for s in statements], "summary": summary or None}
            for plugin, (statements, summary) in found
        )
    else:
        for index, (plugin, (statements, summary)) in enumerate(found):
            if index:
                print()
            print(plugin)
            said = ""
            for statement, result, reason in statements:
                print(f"  {result:8} {statement}")
                if reason and reason != said:  # a repeated reason is printed once
                    print(f"  {'':8}   {reason}")
                said = reason
            results = [s.result for s in statements]
            numbers = [f"{results.count(r)} {r}" for r in ("passed", "failed", "not run")]
            unproved = ": what was not run is not proved" if "not run" in results else ""
            print(f"{', '.join([*numbers, summary] if summary else numbers)}{unproved}")
    all_results = {s.result for _, (statements, _) in found for s in statements}
    return 1 if "failed" in all_results else NOT_PROVED if "not run" in all_results else 0


def new(args: argparse.Namespace) -> int:
    from pathlib import Path
    from shlex import quote

    from tilewright_tools.new_plugin import write

    folder = write(args.kind, args.name, None if args.out is None else Path(args.out))
    print(f"wrote {folder}; next steps:")
    print(f"  pip install -e {quote(f'{folder}[test]')}")
    print(f"  tilewright plugins verify {args.name}")
    if args.kind == plugins.KERNELS.name:
        on = f"-o candidate.platform=emulated -o candidate.kernels={args.name}"
        print(f"  tilewright compare --candidate pypto-npu {on}")
    return 0


def _named(args: argparse.Namespace) -> list[plugins.Plugin]:
    """The plugins with one name, one per kind."""
    installed = plugins.installed(args.kind)
    found = plugins.matching(args.name, installed)
    if not found:
        what = plugins.noun(args.kind) if args.kind else "plugin"
        raise plugins.unknown(args.name, installed, what)
    # find() again, since a name must be unique within a kind.
    return [plugins.find(kind, args.name) for kind in dict.fromkeys(p.kind for p in found)]


def examine(plugin: plugins.Plugin) -> "tuple[list[str], PluginInfo, list[Option]]":
    """A plugin's hooks in the order of their specs, its PluginInfo, and its options.

    Raises PluginError when the plugin cannot be imported, does not match its specs, or fails to
    describe itself. What it prints goes to stderr.
    """
    from contextlib import redirect_stdout

    from attrs import evolve

    from tilewright.plugins import plugin_options

    with redirect_stdout(sys.stderr):
        obj = plugins.load(plugin)
        implemented = plugins.check_hooks(obj, str(plugin))
        try:
            info = plugins.info(obj)
            if plugin.kind == plugins.COMMAND.name and not info.summary:
                info = evolve(info, summary=plugins.summary(plugin))
            options = plugin_options(str(plugin), info)
        except PluginError:
            raise
        except Exception as error:
            why = plugins.cause(error)
            raise PluginError(f"{plugin}: plugin_info() failed: {why}") from error
    return [hook for hook in plugins.known_hooks() if hook in implemented], info, options


def record(plugin: plugins.Plugin) -> dict[str, Any]:
    """A plugin's fields as JSON output has them."""
    return plugin._asdict()


def _print_problems(states: Iterable[tuple[str, str]]) -> None:
    # Plugins with the same name share one problem.
    for state, problem in dict.fromkeys(states):
        if problem:
            print(f"\n{state}: {problem}")


def _has_default(option: "Option") -> bool:
    from attrs import NOTHING

    return option.default is not NOTHING


def _word(value: Any) -> str:
    """A default, as a user would write it."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return str(value) or "''"
