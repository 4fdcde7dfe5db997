"""Startup time of the commands that need no model, relative to ``python -c pass``.

Runs are interleaved, so that other load on the machine affects all of them alike.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "import tilewright": ["-c", "import tilewright"],
    "tilewright --help": ["-m", "tilewright", "--help"],
    "tilewright plugins list": ["-m", "tilewright", "plugins", "list"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=40, help="runs of each command (40)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(args.runs):
        for name, command in COMMANDS.items():
            seconds[name].append(timed([sys.executable, *command]))
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    (baseline, *_) = medians.values()
    if args.json:
        rows = [
            {"command": name, "median_seconds": median, "ratio": median / baseline}
            for name, median in medians.items()
        ]
        print(json.dumps({"runs": args.runs, "commands": rows}, indent=2))
        return
    for name, median in medians.items():
        print(f"{name:<24}  {median * 1e3:7.1f} ms  {median / baseline:5.2f}x")


def timed(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
