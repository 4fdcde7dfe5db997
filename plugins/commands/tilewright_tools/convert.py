"""Write a model in an executor's own layout.

Weights are converted once, ahead of time; the packed loader maps them.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

from tilewright.cli import flags
from tilewright.cli.output import note
from tilewright.cli.session import naming_origins, transferring
from tilewright.config import DEFAULT, resolve
from tilewright.errors import ConfigError
from tilewright_packed.format import OnBytes

tilewright_api = 2

_SIZE = re.compile(r"(\d{1,12})([KMGT]?)(iB)?", re.ASCII)
_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.usage = "tilewright convert [options] --model DIR --executor NAME --out DIR"
    parser.add_argument(
        "--out", metavar="DIR", help="directory to write; required, and must not exist yet"
    )
    parser.add_argument(
        "--shard-size",
        type=size,
        default="2G",
        metavar="SIZE",
        help="maximum bytes per weight file, such as 500M or 2G (powers of 1024); an interrupted "
        "conversion continues after the last complete file (2G)",
    )
    flags.add(parser.add_argument_group("model"), "model", {"path", "format"})
    flags.add(parser.add_argument_group("runtime"), "runtime", {"weight_dtype"})
    plugins = parser.add_argument_group("plugins")
    flags.add(plugins, "plugins", {"loader"})
    plugins.add_argument(
        "--executor",
        dest="plugins.executor",
        metavar="NAME",
        help="plugin whose layout is written; required",
    )
    flags.add_option_flag(plugins)


def run(args: argparse.Namespace) -> int:
    from tilewright.engine import LLMEngine
    from tilewright_packed.writer import convert, plan

    resolved = resolve(flags=flags.layer(args))
    config = resolved.config
    if args.out is None:
        raise ConfigError("--out is required: the directory to write")
    if resolved.origin("plugins", "executor") == DEFAULT:
        raise ConfigError("--executor is required: the executor whose layout is written")
    with naming_origins(resolved), redirect_stdout(sys.stderr):
        engine = LLMEngine.from_plugins(**config.selection())
    with redirect_stdout(sys.stderr), engine:
        with naming_origins(resolved):
            loaded = engine.load(config.model.path, config.model.format)
        try:
            for warning in loaded.warnings:
                note(f"warning: {warning}")
            planned = plan(loaded, *engine.pack(loaded, config.runtime), args.shard_size)
            with progress("converting", sum(s.bytes for s in planned.shards)) as on_bytes:
                manifest = convert(planned, Path(args.out), on_bytes)
        except KeyboardInterrupt:
            note("interrupted; the same command continues after the last complete shard")
            raise
        finally:
            loaded.weights.close()
    packing, shards = manifest.packing, len(manifest.shards)
    print(
        f"{args.out}: {manifest.bytes} bytes in {shards} shard{'s' if shards > 1 else ''} for "
        f"executor {packing.executor} (layout {packing.version}, {packing.weight_dtype})"
    )
    return 0


@contextmanager
def progress(what: str, total: int) -> Iterator[OnBytes]:
    """A bar on a terminal; the callback takes a file's name and a number of bytes."""
    if not sys.stderr.isatty():
        yield lambda name, count: None
        return
    with transferring(what, total) as bar:
        task = bar.task_ids[0]

        def on_bytes(name: str, count: int) -> None:
            bar.update(task, description=f"{what} {name}", advance=count)

        yield on_bytes


def size(text: str) -> int:
    """Parse a size such as ``500M`` to bytes."""
    found = _SIZE.fullmatch(text)
    if not found or not int(found[1]):
        raise argparse.ArgumentTypeError(f"expected bytes, such as 500M or 2G, found {text!r}")
    return int(found[1]) << _UNITS[found[2]]
