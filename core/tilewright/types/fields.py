"""How fields of settings are declared."""

from typing import Any

from attrs import field, validators


def described(help: str, default: Any = None, **kwargs: Any) -> Any:
    """A keyword field with a line of help, which the command line and the docs show."""
    return field(default=default, metadata={"help": help}, kw_only=True, **kwargs)


def if_set(*checks: Any) -> Any:
    """An attrs validator: all checks, for a value that is not None."""
    return validators.optional(list(checks))
