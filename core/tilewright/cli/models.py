"""Define names for models, and list them.

The names are kept in the user's models file or in that of the working folder.
"""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tilewright import models, plugins, toml
from tilewright.cli import flags
from tilewright.cli.output import note
from tilewright.cli.tables import print_columns, print_json
from tilewright.errors import ConfigError, nearest, quoted, shortened
from tilewright.settings import read_setting

tilewright_api = 2


def configure(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for function, summary in (
        (list_models, "list the names, with the source, the loader and the file of each"),
        (show, "show the settings of a model, and where each is defined"),
        (add, "define a name for a model"),
        (remove, "remove a name; the model's files are kept"),
    ):
        name = function.__name__.removesuffix("_models")
        action = actions.add_parser(name, help=summary, description=f"{summary.capitalize()}.")
        action.set_defaults(function=function)
        if function is not list_models:
            action.add_argument("name", metavar="NAME", help="the model's name")
        if function in (list_models, show):
            action.add_argument("--json", action="store_true", help="print JSON")
        else:
            action.add_argument(
                "--project",
                action="store_true",
                help=f"write to {models.PROJECT_FILE} in the working folder, not to your own file",
            )
        if function is add:
            _configure_add(action)


def _configure_add(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model")
    model.add_argument(
        "--source", required=True, help="a directory, a file or a hub id that the loader accepts"
    )
    model.add_argument("--revision", help="branch, tag or commit, if the loader has revisions")
    flags.add(model, "plugins", {"loader"})
    flags.add(model, "model", {"format"})
    model.add_argument(
        "-o",
        "--option",
        dest="loader_options",
        action="append",
        metavar="KEY=VALUE",
        help="set an option of the loader",
    )
    flags.add(parser.add_argument_group("runtime defaults"), "runtime")
    flags.add(parser.add_argument_group("generation defaults"), "generate")


def run(args: argparse.Namespace) -> int:
    args.function(args)
    return 0


def list_models(args: argparse.Namespace) -> None:
    known = models.registered()
    if args.json:
        print_json(_record(model) for model in known.values())
        return
    if not known:
        looked = " and ".join(map(str, models.files()))
        print(
            f"no models are defined (looked in {looked}); "
            "run `tilewright models add NAME --source ...`"
        )
        return
    print_columns(
        ("NAME", "SOURCE", "LOADER", "WHERE"),
        [(m.name, _source(m), m.loader or "-", m.origin) for m in known.values()],
    )


def show(args: argparse.Namespace) -> None:
    model = _known(args.name)
    if args.json:
        print_json([_record(model)])
        return
    print("\n".join(_lines(model)))


def add(args: argparse.Namespace) -> None:
    entry: dict[str, Any] = {"source": args.source, "revision": args.revision}
    for (section, key), given in flags.layer(args).items():
        value = read_setting((section, key), given)
        if section in ("runtime", "generate"):
            if value is not None:
                entry.setdefault(section, {})[key] = value
        else:
            entry[key] = value
    entry["options"] = dict(_loader_option(item) for item in args.loader_options or ())
    if entry.get("loader"):
        plugins.find("loader", entry["loader"])
    if entry.get("format"):
        plugins.find("weight_format", entry["format"])
    made = models.add(args.name, entry, _file(args))
    print(f"{made.name}: {_source(made)}, in {made.origin}")
    other = _in_force(made.name)
    if other is not None and other.origin != made.origin:
        note(f"note: in this folder {made.name} is {_source(other)}, defined in {other.origin}")
    if os.path.lexists(made.name):
        note(
            f"note: {made.name} now selects this model; "
            f"write ./{made.name} for the path in this folder"
        )


def remove(args: argparse.Namespace) -> None:
    if args.project or os.environ.get(models.VARIABLE):
        file = _file(args)
    else:
        where = _known(args.name).origin
        file = next(f for f in models.files() if where.startswith(f"{f}:"))
    models.remove(args.name, file)
    print(f"{args.name} is no longer in {file}")
    if (other := _in_force(args.name)) is not None:
        note(f"note: {args.name} is now {_source(other)}, defined in {other.origin}")


def _loader_option(item: str) -> tuple[str, str]:
    """Key and value of a loader option; the prefix ``loader.`` is optional."""
    key, value = flags.split(item, "-o", "KEY=VALUE")
    key = key.removeprefix("loader.")
    if "." in key:
        raise ConfigError(
            f"-o {key}: expected an option of the loader; a models file holds no other options"
        )
    return key, value


def _in_force(name: str) -> models.RegisteredModel | None:
    """The model that a name selects after a write; an error in another file is only a note."""
    try:
        return models.find(name)
    except ConfigError as error:
        note(f"note: {error}")
        return None


def _file(args: argparse.Namespace) -> Path:
    """The models file to write to."""
    if not os.environ.get(models.VARIABLE):
        return models.PROJECT_FILE if args.project else models.user_file()
    if args.project:
        raise ConfigError(
            f"--project: {models.VARIABLE} selects the only models file: unset it or omit the flag"
        )
    return models.files()[0]


def _known(name: str) -> models.RegisteredModel:
    known = models.registered()
    if name not in known:
        raise ConfigError(
            f"no model is named {quoted(name)}{nearest(name, known)} "
            f"(defined: {shortened(', '.join(known) or 'none', 300)})"
        )
    return known[name]


def _source(model: models.RegisteredModel) -> str:
    revision = model.options.get("revision")
    return f"{model.source}@{revision}" if revision else model.source


def _record(model: models.RegisteredModel) -> dict[str, Any]:
    record: dict[str, Any] = {"name": model.name, "origin": model.origin}
    for table, key, value, _ in model.entry():
        (record.setdefault(table, {}) if table else record)[key] = value
    return record


def _lines(model: models.RegisteredModel) -> Iterator[str]:
    """Lines of a models file, with the origin of each setting in a comment."""
    name = toml.written_key(model.name)
    yield f"[{name}]  # {model.origin}"
    current = ""
    for table, key, value, origin in sorted(model.entry(), key=lambda entry: entry[0]):
        if table != current:
            yield from ("", f"[{name}.{table}]")
            current = table
        yield f"{toml.setting(key, value)}  # {origin}"
