"""Values against their types: settings of files, flags and the environment, and of Python code."""

import json
import operator
import types
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from contextlib import suppress
from enum import Enum
from functools import cache
from numbers import Real
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    NamedTuple,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
)

import attrs

from tilewright.errors import ConfigError, must_be, nearest, quoted, shortened
from tilewright.paths import path_of

if TYPE_CHECKING:
    import cattrs

T = TypeVar("T")


class Option(NamedTuple):
    """One setting of an attrs class, as ``plugins show`` and ``--help`` present it."""

    name: str
    type: Any
    expected: str
    """The type in words: ``an integer or none``."""
    default: Any
    """attrs.NOTHING when it must be given."""
    help: str


def options_of(cls: type) -> list[Option]:
    """The settings of an attrs class in order; a field's help is its ``metadata["help"]``."""
    return [
        Option(
            name=field.alias or field.name,
            type=field.type,
            expected=expected(field.type),
            default=_default(field.default),
            help=str(field.metadata.get("help", "")),
        )
        for field in attrs.fields(attrs.resolve_types(cls))
        if field.init
    ]


def structure(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """An instance of an attrs class from values as a user wrote them.

    Values have the types of the fields, or are text: ``"2"``, ``"true"``,
    ``"none"``, a list as ``"1,2"`` or as JSON, a table as JSON. Text for a list of strings is its
    only item, unless it is a JSON list; ``[INST]`` is not one.

    Raises ConfigError, which begins with where and names the option, for an unknown or absent
    option, for a value of a wrong type, and for one that a validator refuses.
    """
    options = {option.name: option for option in options_of(cls)}
    found = {}
    for name, value in values.items():
        if name not in options:
            known = f"options: {', '.join(options)}" if options else "it has no options"
            raise ConfigError(
                f"{where}: unknown option {quoted(name)}{nearest(str(name), options)} ({known})"
            )
        try:
            found[name] = converted(value, options[name].type or Any, text=True)
        except ConfigError as error:
            raise ConfigError(f"{where}: in {quoted(name)}: {error}") from error
        except Exception as error:
            wrong = must_be(name, options[name].expected, shown(value))
            raise ConfigError(f"{where}: {wrong}") from error
    for option in options.values():
        if option.default is attrs.NOTHING and option.name not in found:
            raise ConfigError(
                f"{where}: option {option.name!r} is missing: expected {option.expected}"
            )
    try:
        return cls(**found)
    except (ValueError, TypeError, ConfigError) as error:
        # attrs puts the sentence first and the field, the bounds and the value after it.
        sentence = str(error.args[0]) if error.args else type(error).__name__
        raise ConfigError(f"{where}: {' '.join(sentence.split())}") from error


def converted(value: Any, type_: Any, text: bool = False) -> Any:
    """A value as a value of its type: an integer of numpy or torch as int, a list as a tuple.

    text: strings are read too, as ``structure`` does. Raises an exception for another type.
    """
    return _converter(text).structure(value, type_)


def expected(type_: Any) -> str:
    """A type in words: ``an integer or none``, ``a list of strings``."""
    *others, last = _alternatives(type_, plural=False)
    return f"{', '.join(others)} or {last}" if others else last


def _alternatives(type_: Any, plural: bool) -> list[str]:
    """The allowed kinds of value, in words; plural for items of a list or table."""
    args = get_args(type_)
    if type_ in _WORDS:
        return [_WORDS[type_][plural]]
    if type_ is bool:
        return ["true", "false"]
    if _is_union(type_):
        return [word for arg in args for word in _alternatives(arg, plural)]
    if _is_literal(type_):
        return [str(arg) for arg in args]
    if isinstance(type_, type) and issubclass(type_, Enum):
        return [str(member.value) for member in type_]
    if isinstance(type_, type) and attrs.has(type_):
        return [f"a table of {', '.join(option.name for option in options_of(type_))}"]
    items = [" or ".join(_alternatives(arg, plural=True)) for arg in args if arg is not ...]
    if _is_sequence(type_):
        return [" of ".join(["lists" if plural else "a list", *items])]
    if _is_table(type_):
        between = f" from {items[0]} to {items[1]}" if items else ""
        return [f"{'tables' if plural else 'a table'}{between}"]
    return [getattr(type_, "__name__", str(type_))]


_WORDS: dict[Any, tuple[str, str]] = {
    int: ("an integer", "integers"),
    float: ("a number", "numbers"),
    str: ("a string", "strings"),
    Path: ("a path", "paths"),
    type(None): ("none", "none"),
    None: ("anything", "anything"),
    Any: ("anything", "anything"),
}


@cache
def _converter(text: bool) -> "cattrs.Converter":
    """cattrs' dispatch by type, with hooks that refuse what cattrs would coerce (2.5 to 2)."""
    import cattrs  # imported when a value is read: it takes as long as importing attrs

    converter = cattrs.Converter(
        detailed_validation=False, structure_fallback_factory=lambda _: _instance
    )
    read = converter.structure

    def union(value: Any, type_: Any) -> Any:
        for arg in sorted(get_args(type_), key=_order_in_union):
            with suppress(Exception):
                return read(value, arg)
        raise TypeError(value)

    def sequence(value: Any, type_: Any) -> Any:
        of = (get_args(type_) or (Any,))[0]
        if isinstance(value, str):
            value = _items(value, of)
        if not isinstance(value, (Sequence, Set)):
            raise TypeError(value)
        make = get_origin(type_) or type_
        return (make if make in (list, set, frozenset) else tuple)(read(v, of) for v in value)

    def table(value: Any, type_: Any) -> Any:
        key_type, value_type = get_args(type_) or (Any, Any)
        value = json.loads(value) if isinstance(value, str) else value
        return {read(k, key_type): read(v, value_type) for k, v in dict(value).items()}

    def unless_text(hook: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        return hook if text else lambda value, type_: hook(_no_text(value), type_)

    converter.register_structure_hook(bool, unless_text(_bool))
    converter.register_structure_hook(int, unless_text(_int))
    converter.register_structure_hook(float, unless_text(_float))
    converter.register_structure_hook(str, _instance)
    converter.register_structure_hook(Path, lambda value, _: path_of(Path(value)))
    converter.register_structure_hook_func(lambda t: t in (None, type(None)), unless_text(_none))
    converter.register_structure_hook_func(_is_union, union)
    converter.register_structure_hook_func(_is_literal, _literal)
    converter.register_structure_hook_func(_is_sequence, unless_text(sequence))
    converter.register_structure_hook_func(_is_table, unless_text(table))
    converter.register_structure_hook_func(
        lambda t: isinstance(t, type) and attrs.has(t),
        lambda value, t: value if isinstance(value, t) else structure(t, value, t.__name__),
    )
    return converter


def _no_text(value: Any) -> Any:
    if isinstance(value, str):
        raise TypeError(value)
    return value


def _bool(value: Any, _: Any) -> bool:
    if isinstance(value, bool):
        return value
    word = value.lower()
    if word in ("true", "yes", "on", "1"):
        return True
    if word in ("false", "no", "off", "0"):
        return False
    raise ValueError(value)


def _int(value: Any, _: Any) -> int:
    if isinstance(value, bool):
        raise TypeError(value)
    return int(value) if isinstance(value, str) else operator.index(value)


def _float(value: Any, _: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (str, Real)):
        raise TypeError(value)
    return float(value)


def _none(value: Any, _: Any) -> None:
    if not (value is None or (isinstance(value, str) and value.lower() == "none")):
        raise TypeError(value)


def _literal(value: Any, type_: Any) -> Any:
    for arg in get_args(type_):
        if value == arg and type(value) is type(arg):
            return arg
    for arg in get_args(type_):
        if value == str(arg):
            return arg
    raise ValueError(value)


def _instance(value: Any, type_: Any) -> Any:
    if not isinstance(value, type_):
        raise TypeError(value)
    return value


def _items(text: str, of: Any) -> list[Any]:
    if text.lstrip().startswith("["):
        try:
            return cast(list[Any], json.loads(text))
        except ValueError:
            if of is not str or '"' in text:
                raise
    if of is str:
        return [text]
    return [item.strip() for item in text.split(",") if item.strip()]


def _order_in_union(type_: Any) -> int:
    """Literals and none first, since they accept few words; str last, since it accepts any text."""
    if _is_literal(type_):
        return 0
    return {type(None): 1, bool: 2, int: 3, float: 4, Path: 6, str: 7}.get(type_, 5)


def _is_union(type_: Any) -> bool:
    return get_origin(type_) in (Union, types.UnionType)


def _is_literal(type_: Any) -> bool:
    return get_origin(type_) is Literal


def _is_sequence(type_: Any) -> bool:
    origin = get_origin(type_) or type_
    if origin is tuple:
        return get_args(type_)[1:] in ((), (...,))
    return origin in (list, set, frozenset, Sequence, Collection, Set)


def _is_table(type_: Any) -> bool:
    return (get_origin(type_) or type_) in (dict, Mapping)


def _default(default: Any) -> Any:
    takes_no_self = isinstance(default, attrs.Factory) and not default.takes_self  # type: ignore[arg-type]
    return default.factory() if takes_no_self else default


def shown(value: Any) -> str:
    """A value in one line, for messages."""
    try:
        return shortened(" ".join(repr(value).split()))
    except ValueError:  # Python writes no integer of more than 4,300 digits, nor what holds one
        return "an integer of too many digits"
