"""A stand-in for task-submit, the queue of shared NPU hosts, by the rules of its documentation.

    python tests/support/task_submit.py --device auto --run "tilewright run qwen3-14b.toml"

There is no queue: ``auto`` grants the card ``--grants`` at once. That flag and the messages are
specific to the stand-in. The documentation names three of the refused words, and it does not say
what happens to a task when its client stops waiting; here it is killed.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence

REFUSED_WORDS = ("passwd", "shutdown", "reboot")
CLIENT_ERROR, REJECTED, STOPPED = 1, 126, 137

_KEEP_AS_IT_IS = ("$TASK_DEVICE", "--device", "|", "&&", ";")  # --devices and || match too
_SHORT_FLAG = re.compile(r"(?:^|\s)-d\s+\d+\b")


def rejection(command: str) -> str | None:
    """Why a command is rejected; None if it is accepted."""
    if len(command.splitlines()) != 1:
        return "a command is one line"
    word = next((w for w in REFUSED_WORDS if re.search(rf"\b{w}\b", command)), None)
    return word and f"the word {word} is refused"


def with_card(command: str, card: str) -> str:
    """The command that runs for a command submitted with ``--device auto``."""
    if "{}" in command:
        return command.replace("{}", card)
    if any(text in command for text in _KEEP_AS_IT_IS) or _SHORT_FLAG.search(command):
        return command
    return f"{command} --device {card}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="task-submit", allow_abbrev=False)
    parser.add_argument("--device", required=True, help="auto, or the number of a card")
    parser.add_argument("--run", required=True, help="the command, one line")
    parser.add_argument("--max-time", type=float, default=300, help="seconds to run; 0: no limit")
    parser.add_argument("--timeout", type=float, default=600, help="seconds to wait; 0: no limit")
    parser.add_argument("--grants", default="5", help="the card that auto means (5)")
    args = parser.parse_args(argv)
    if why := rejection(args.run):
        _say(f"rejected: {why}")
        return REJECTED
    card, command = args.device, args.run
    if card == "auto":
        card, command = args.grants, with_card(command, args.grants)
    environ = {k: v for k, v in os.environ.items() if k != "ASCEND_RT_VISIBLE_DEVICES"}
    _say(f"card {card}: {command}")
    task = subprocess.Popen(
        command, shell=True, env=environ | {"TASK_DEVICE": card}, start_new_session=True
    )
    limits = [(args.max_time, STOPPED), (args.timeout, CLIENT_ERROR)]
    seconds, code = min((limit for limit in limits if limit[0]), default=(None, 0))
    try:
        ended = task.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(task.pid, signal.SIGKILL)
        task.wait()
        return code
    return ended if ended >= 0 else 128 - ended


def _say(text: str) -> None:
    print(f"task-submit: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
