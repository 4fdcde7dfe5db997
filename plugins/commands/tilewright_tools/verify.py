"""Check the files of a converted model."""

import argparse

from attrs import asdict

from tilewright.cli.tables import print_columns, print_json
from tilewright.errors import ConfigError, ModelError
from tilewright.paths import path_of
from tilewright_tools.convert import progress

tilewright_api = 2


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "directory", metavar="DIR", help="directory that `tilewright convert` wrote"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.epilog = "The exit code is 0 when all files are intact, and 1 when one is not."


def run(args: argparse.Namespace) -> int:
    from tilewright_packed.format import MANIFEST, Finding, is_packed, read_manifest, verify

    directory = path_of(args.directory)
    if not directory.is_dir():
        found = "it is a file" if directory.exists() else "no such directory"
        raise ConfigError(
            f"{args.directory!r}: {found}: expected a directory that `tilewright convert` wrote"
        )
    if not is_packed(directory):
        raise ConfigError(
            f"{args.directory!r} is not a packed model: expected a directory with {MANIFEST}, "
            "which `tilewright convert` writes"
        )
    try:
        with progress("verifying", read_manifest(directory).bytes) as on_bytes:
            findings = verify(directory, on_bytes)
    except ModelError as error:
        findings = [Finding(name=MANIFEST, problem=str(error))]
    wrong = sum(1 for finding in findings if finding.problem)
    if args.json:
        print_json(asdict(finding) for finding in findings)
    else:
        rows = [(finding.name, finding.problem or "ok") for finding in findings]
        print_columns(("FILE", "STATE"), rows)
        print(
            f"{wrong} of {len(findings)} files are damaged"
            if wrong
            else f"all {len(findings)} files are intact"
        )
    return 1 if wrong else 0
