"""Compiled chat templates: transformers' dialect of Jinja, within limits of time and memory.

A template is a program from whoever published the model. It runs in the thread that renders it, and
there it may neither run for ever nor fill the memory. So each loop and macro is compiled with a
check of the time, and the length of a long value is counted before the value is made.
"""

import json
import re
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import datetime
from functools import lru_cache
from string import Formatter
from types import BuiltinMethodType, CodeType
from typing import Any

from attrs import define, field
from jinja2 import TemplateError, TemplateSyntaxError, meta, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import _PassArg
from jinja2.visitor import NodeTransformer

from tilewright.errors import (
    ModelError,
    RequestError,
    TilewrightError,
    on_one_line,
    shortened,
)

RENDER_SECONDS = 3.0
"""How long a template may run, in seconds of its thread's time on the CPU. A conversation of 1,000
messages of 1,000 characters takes a few hundredths of a second."""

_MOST_CHARACTERS = 2 * 10**9
"""How many characters a template may make, all its values and output together. An element of a
list counts as eight."""

_MOST_AT_ONCE = 10**8
"""How many characters one text may have."""

_MOST_ELEMENTS = 10**6
"""How many elements one list may have, and characters a text that is taken apart."""

_WIDEST = 10_000
"""The largest width of padding, indentation and the like."""

_MOST_BITS = 10**5
"""The largest integer, in bits."""


class TemplateLimitError(Exception):
    """A template ran for too long, or made too much."""


@define
class _Allowance:
    """What is left for the renderings of a conversation."""

    until: float = field(factory=lambda: time.thread_time() + RENDER_SECONDS)
    characters: int = field(factory=lambda: _MOST_CHARACTERS)

    def check_time(self) -> None:
        if time.thread_time() > self.until:
            raise TemplateLimitError(f"still running after {RENDER_SECONDS:g} seconds")

    def spend(self, characters: int) -> None:
        self.characters -= characters
        if characters > _MOST_AT_ONCE or self.characters < 0:
            raise TemplateLimitError(
                f"makes a text of more than {_MOST_AT_ONCE:,} characters, or more than "
                f"{_MOST_CHARACTERS:,} in all"
            )

    def spend_elements(self, elements: int) -> None:
        if elements > _MOST_ELEMENTS:
            raise TemplateLimitError(f"makes a list of more than {_MOST_ELEMENTS:,} elements")
        self.spend(8 * elements)

    def spend_value(self, value: Any) -> None:
        """For a value that has been made."""
        if isinstance(value, str):
            self.spend(len(value))
        elif isinstance(value, (list, tuple)):
            self.spend_elements(len(value))


_allowance: ContextVar[_Allowance] = ContextVar("_allowance")


@contextmanager
def rendering() -> Iterator[None]:
    """What is rendered within, in this thread, shares one allowance of time and memory.

    Raises a template's failure as an error that names the line: ModelError where the template is
    at fault, and RequestError where it does not accept what it was given.
    """
    token = _allowance.set(_Allowance())
    try:
        yield
    except Exception as error:
        raise _template_error(error) from error
    finally:
        _allowance.reset(token)


@lru_cache(maxsize=64)
def compiled(source: str) -> "CompiledTemplate":
    """A chat template, compiled. Raises ModelError for one that is not valid."""
    try:
        return CompiledTemplate(source)
    except Exception as error:
        raise _template_error(error) from error


class CompiledTemplate:
    """A chat template, compiled. Any number of threads may render it."""

    def __init__(self, source: str):
        """Raises jinja2.TemplateSyntaxError."""
        environment = _Environment()
        tree = environment.parse(source)
        self.variables = frozenset(meta.find_undeclared_variables(tree))
        """Names that the template reads from outside."""
        _Checks().visit(tree)
        code: CodeType = environment.compile(tree)
        self._template = environment.template_class.from_code(
            environment, code, environment.make_globals(None)
        )

    def render(self, variables: Mapping[str, Any]) -> str:
        """The template's text. Called within a ``rendering`` block, which converts what it raises.

        Raises TemplateLimitError, and whatever the template raises.
        """
        return self._template.render(variables)


class _Generation(Extension):
    """``{% generation %}`` marks the assistant's part for training; here it has no effect."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Checks(NodeTransformer):
    """Adds to a template's syntax tree the checks that filters and operators cannot make."""

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        node = self.generic_visit(node)
        if isinstance(node, (nodes.For, nodes.Macro, nodes.CallBlock, nodes.Block)):
            literal = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
            node.body.insert(0, nodes.ExprStmt(_tick(literal, node), lineno=node.lineno))
        if isinstance(node, nodes.For) and node.test:
            node.test = nodes.And(_tick(0, node), node.test, lineno=node.lineno)
        if isinstance(node, nodes.Concat):
            return _call("concatenated", node.nodes, node)
        if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
            return _call("counted", [node], node)
        return node


def _tick(literal: int, at: nodes.Node) -> nodes.Call:
    return _call("tick", [nodes.Const(literal, lineno=at.lineno)], at)


def _call(name: str, arguments: list[nodes.Expr], at: nodes.Node) -> nodes.Call:
    function = nodes.EnvironmentAttribute(name, lineno=at.lineno)
    return nodes.Call(function, arguments, [], None, None, lineno=at.lineno)


class _Environment(ImmutableSandboxedEnvironment):
    """As transformers makes it: the same sandbox, white space, and functions."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
            finalize=pass_context(lambda context, value: self.output(value)),
        )
        self.filters["tojson"] = _tojson
        self.filters = {name: _limited(name, filter) for name, filter in self.filters.items()}
        self.globals |= {"raise_exception": _raise, "strftime_now": _strftime_now}
        del self.globals["lipsum"]

    def tick(self, literal: int) -> bool:
        """Called each time a body begins, with the number of characters of text in it."""
        allowance = _allowance.get()
        allowance.check_time()
        allowance.spend(literal)
        return True

    def counted(self, value: Any) -> Any:
        """The value of an operator, a slice or a call."""
        _allowance.get().spend_value(value)
        return value

    def output(self, value: Any) -> Any:
        """A value that is written as text."""
        _allowance.get().spend(_text_length(value))
        return value

    def concatenated(self, *values: Any) -> str:
        """``a ~ b``"""
        for value in values:
            self.output(value)
        return "".join(map(str, values))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _check_operands(operator, left, right)
        return self.counted(super().call_binop(context, operator, left, right))

    # As jinja2 names its own parameters, since a template's keywords may have any other name.
    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        method = getattr(__obj, "__wrapped__", __obj) if callable(__obj) else None
        if isinstance(method, BuiltinMethodType) and isinstance(method.__self__, str):
            text, name = method.__self__, method.__name__
            if name == "join" and args:
                args = (list(args[0]), *args[1:])
            __self._check_method(text, name, args, kwargs)
        return __self.counted(super().call(__context, __obj, *args, **kwargs))

    def _check_method(
        self, text: str, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        allowance = _allowance.get()
        allowance.check_time()
        allowance.spend(len(text))
        _check_widths(name, [*args, *kwargs.values()])
        if name == "join" and args:
            _check_join(args[0], text)
        elif name == "replace" and len(args) > 1:
            _check_replace(text, args[0], args[1])
        elif name in ("format", "format_map"):
            _check_format(text)
            allowance.spend(_text_length([*args, *kwargs.values()]) * (1 + text.count("{")))
        elif name == "translate" and args:
            allowance.spend(len(text) * _text_length(args[0]))
        elif name == "expandtabs":
            allowance.spend(len(text) * max([8, *(i for i in args if isinstance(i, int))]))


def _limited(name: str, filter: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that checks before it makes something, and counts what it made."""
    wants = _PassArg.from_obj(filter)

    @pass_context
    def limited(context: Context, value: Any = "", *args: Any, **kwargs: Any) -> Any:
        allowance = _allowance.get()
        allowance.check_time()
        given = [*args, *kwargs.values()]
        _check_widths(name, given)
        if name in ("replace", "format", "indent"):
            allowance.spend(_text_length(value))
        if name == "join":
            value = list(value)
            _check_join(value, given[0] if given else "")
        elif name == "replace" and len(given) > 1:
            _check_replace(str(value), given[0], given[1])
        elif name == "format":
            _check_operands("%", str(value), kwargs or args)
        elif name == "indent":
            width = given[0] if given else 4
            width = len(width) if isinstance(width, str) else width
            allowance.spend((str(value).count("\n") + 1) * max(width, 0))
        elif name == "tojson":
            breadth = sum(i if isinstance(i, int) else _text_length(i) for i in given)
            allowance.spend(_text_length(value) * (1 + breadth))
        elif name in _TAKING_APART and isinstance(value, str):
            allowance.spend_elements(len(value))
        elif name in _SLOW:
            allowance.spend_elements(_text_length(value))
        elif name not in _KEEPING and name not in _TAKING_APART:
            allowance.spend(_text_length(value))
        extra = {
            _PassArg.context: (context,),
            _PassArg.eval_context: (context.eval_ctx,),
            _PassArg.environment: (context.environment,),
        }.get(wants, ())  # type: ignore[arg-type]
        made = filter(*extra, value, *args, **kwargs)
        allowance.spend_value(made)
        return made

    return limited


def _text_length(value: Any) -> int:
    """About how many characters a value has as text. Raises TemplateLimitError for too many.

    A value that another holds several times counts each time: lists of lists of the same list are
    small in memory, and their text is not.
    """
    if isinstance(value, str):
        return len(value)
    most = min(_allowance.get().characters, _MOST_AT_ONCE)
    length, left, taken = 0, [value], 0
    while left and length <= most:
        one, taken = left.pop(), taken + 1
        if not taken % 1000:
            _allowance.get().check_time()
        if isinstance(one, str):
            length += len(one) + 2
        elif isinstance(one, Mapping):
            left += [*one.keys(), *one.values()]
            length += 2
        elif isinstance(one, (list, tuple)):
            left += one
            length += 2
        elif isinstance(one, int):
            length += one.bit_length() // 3 + 2
        elif not isinstance(one, Undefined):
            length += 20
    return length


def _check_operands(operator: str, left: Any, right: Any) -> None:
    allowance = _allowance.get()
    numbers = [i for i in (left, right) if isinstance(i, int)]
    held = [i for i in (left, right) if isinstance(i, (str, list, tuple))]
    if operator in "+*" and held:
        spend = allowance.spend if isinstance(held[0], str) else allowance.spend_elements
        factor = max(*numbers, 0) if operator == "*" and numbers else 1
        spend(sum(map(len, held)) * factor)
    elif operator == "%" and isinstance(left, str):
        if re.search(r"%[^a-zA-Z%]*(\*|\d{5})", left):
            raise TemplateLimitError(f"formats with a width above {_WIDEST}, or one that varies")
        allowance.spend(len(left) + _text_length(right))
    elif len(numbers) == 2 and operator in ("*", "**"):
        bits = numbers[0].bit_length()
        bits = bits * max(numbers[1], 0) if operator == "**" else bits + numbers[1].bit_length()
        if bits > _MOST_BITS:
            raise TemplateLimitError(f"computes an integer of more than {_MOST_BITS} bits")


_WITH_WIDTH = frozenset(
    {"batch", "center", "expandtabs", "indent", "ljust", "rjust", "round", "slice", "tojson"}
    | {"zfill"}
)
"""Filters and methods with a number of characters or elements among their arguments."""

_TAKING_APART = frozenset(
    {"batch", "groupby", "list", "map", "max", "min", "random", "reject", "rejectattr"}
    | {"reverse", "select", "selectattr", "slice", "sort", "sum", "unique"}
)
"""Filters that read one element after the other."""

_SLOW = frozenset({"pprint", "striptags", "title", "urlize", "wordcount", "wordwrap"})
"""Filters of texts that take a while for each character."""

_KEEPING = frozenset(
    {"attr", "count", "d", "default", "dictsort", "first", "items", "last"} | {"length"}
)
"""Filters that do not write a list as text."""


def _check_widths(name: str, arguments: Iterable[Any]) -> None:
    if name in _WITH_WIDTH and any(isinstance(i, int) and i > _WIDEST for i in arguments):
        raise TemplateLimitError(f"{name}: expected a number of at most {_WIDEST}")


def _check_join(parts: list[Any], separator: Any) -> None:
    allowance = _allowance.get()
    allowance.spend(sum(map(_text_length, parts)) + len(parts) * _text_length(separator))


def _check_replace(text: str, old: Any, new: Any) -> None:
    allowance = _allowance.get()
    allowance.spend(len(text) + text.count(str(old)) * _text_length(new))


def _check_format(text: str) -> None:
    with suppress(ValueError):  # the template's own error follows
        for _, _, spec, _ in Formatter().parse(text):
            if spec and ("{" in spec or re.search(r"\d{5}", spec)):
                raise TemplateLimitError(
                    f"formats with a width above {_WIDEST}, or one that varies"
                )


def _raise(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _template_error(error: Exception) -> TilewrightError:
    """The error for a failing chat template, with the line that failed."""
    if isinstance(error, TilewrightError):
        return error
    if isinstance(error, TemplateSyntaxError):
        line = error.lineno
    else:
        frames = traceback.extract_tb(error.__traceback__)
        line = next((f.lineno or 0 for f in reversed(frames) if f.filename == "<template>"), 0)
    where = f"chat template, line {line}: " if line else "chat template: "
    what = shortened(on_one_line(str(error)), 300).removesuffix(".") or type(error).__name__
    if isinstance(error, TemplateSyntaxError):
        return ModelError(f"{where}{what}; correct the template, or use another one")
    if isinstance(error, (TemplateLimitError, RecursionError)):
        return ModelError(
            f"{where}{what}, which no conversation needs: correct the template, or use another one"
        )
    if isinstance(error, SecurityError):
        return ModelError(
            f"{where}{what}; templates may not do this: use a template that you trust"
        )
    return RequestError(f"{where}{what}; the template does not accept these messages")
