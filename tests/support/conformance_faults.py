"""Print which test of which suite finds each planted fault.

``python tests/support/conformance_faults.py [KIND ...]``: all kinds by default.
"""

import contextlib
import io
import sys
from importlib import import_module

from checkout import ROOT
from conformance import missed

from tilewright.plugins import KINDS


def main(kinds: list[str]) -> int:
    sys.path.insert(0, str(ROOT / "tests/conformance"))
    not_found = []
    print("| kind | what is wrong | the test that finds it |")
    print("| --- | --- | --- |")
    for kind in kinds or KINDS:
        module = import_module(f"test_conformance_{kind}")
        # Hide the output of the inner run of pytest, whose failures are expected.
        with contextlib.redirect_stdout(io.StringIO()):
            found = missed(module.SUITE, module.FAULTS)
        not_found += found
        for fault in module.FAULTS:
            statement = fault.test.removeprefix("test_").replace("_", " ")
            if any(line.startswith(f"{fault.name}: ") for line in found):
                statement = "**not found**"
            print(f"| {kind.replace('_', ' ')} | {fault.name} | {statement} |", flush=True)
        print(f"{kind}: {len(module.FAULTS)} mistakes", file=sys.stderr)
    for line in not_found:
        print(f"NOT FOUND: {line}", file=sys.stderr)
    return len(not_found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
