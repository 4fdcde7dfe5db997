"""Stands in for PyPTO in tests; see tests/support/fake_pypto/__init__.py."""

from enum import Enum

from . import events, ir, language, runtime

__all__ = ["LogLevel", "ir", "language", "runtime", "set_log_level"]

__version__ = "0.1.0"


class LogLevel(Enum):
    ERROR = 3


def set_log_level(level: LogLevel) -> None:
    events.note(f"log level {level.name}")


print("fake pypto says hello")
