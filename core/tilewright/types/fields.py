"""How fields of settings are declared, and checked when an instance is made."""

from typing import Any

from attrs import Attribute, Converter, converters, field, validators

from tilewright.errors import ConfigError, must_be
from tilewright.values import converted, expected, shown


def described(help: str, default: Any = None, **kwargs: Any) -> Any:
    """A keyword field with a line of help, which the command line and the docs show."""
    return field(default=default, metadata={"help": help}, kw_only=True, **kwargs)


def if_set(*checks: Any) -> Any:
    """An attrs validator: all checks, for a value that is not None."""
    return validators.optional(list(checks))


def checked(cls: type, fields: "list[Attribute[Any]]") -> "list[Attribute[Any]]":
    """A field_transformer of attrs: values of a wrong type or out of range raise ConfigError."""
    return [
        f.evolve(
            converter=converters.pipe(
                Converter(_typed, takes_field=True), *([f.converter] if f.converter else [])
            ),
            validator=_in_range(f.validator) if f.validator else None,
        )
        for f in fields
    ]


def _typed(value: Any, of: "Attribute[Any]") -> Any:
    try:
        return converted(value, of.type)
    except Exception as error:
        raise ConfigError(must_be(of.name, expected(of.type), shown(value))) from error


def _in_range(validator: Any) -> Any:
    def check(instance: Any, of: "Attribute[Any]", value: Any) -> None:
        try:
            validator(instance, of, value)
        except (ValueError, TypeError) as error:
            raise ConfigError(" ".join(str(error.args[0]).split())) from error

    return check
