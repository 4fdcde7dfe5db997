"""The plugin API as data: ``python tests/support/api_record.py`` records it for a test.

The record of API version N is ``tests/data/api_N.json``. A compatible change (an optional hook,
an argument that hooks may omit, a field with a default) is recorded by running this again; any
other change is refused until ``tilewright.plugins.API_VERSION`` is raised.
"""

import inspect
import json
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import attrs
from checkout import DATA

import tilewright_testing as testing
from tilewright import errors, hookspecs, plugins, types

FUNCTIONS = (
    "tilewright.kv_storage.allocate",
    "tilewright.kv_storage.page_shape",
    "tilewright.plugins.find",
    "tilewright.plugins.load",
    "tilewright.rope.dynamic_frequencies",
    "tilewright.rope.dynamic_lengths",
    "tilewright.rope.frequencies",
    "tilewright.sampling.philox4x32",
    "tilewright.sampling.uniform",
    "tilewright_testing.models.make_model",
    "tilewright.weights.expected_tensors",
    "tilewright.weights.torch_dtype",
)
"""What plugins and their tests may call besides what types and errors define."""

MADE_BY_THE_CORE = ("WeightFormats",)
"""Protocols that plugins use and do not implement: more methods break nobody."""

Record = dict[str, Any]


def record() -> Record:
    """The current API."""
    specs = ("AnyPlugin", *(kind.specs for kind in plugins.ENGINE_KINDS.values()), "ObserverEvents")
    return {
        "kinds": {
            name: {"group": kind.group, "specs": kind.specs, "required": list(kind.required)}
            for name, kind in plugins.KINDS.items()
        },
        "hooks": {
            name: {
                "of": spec,
                "arguments": {a: kind for a, kind, _ in _arguments(function)},
                "returns": _annotation(inspect.signature(function).return_annotation),
                "first result": bool(function.tilewright_spec["firstresult"]),
            }
            for spec in specs
            for name, function in vars(getattr(hookspecs, spec)).items()
            if inspect.isfunction(function)
        },
        "protocols": {
            name: _methods(cls)
            | {"(bases)": [b.__name__ for b in cls.__bases__ if b.__name__ != "Protocol"]}
            for name, cls in _own(types)
            if getattr(cls, "_is_protocol", False)
        },
        "classes": {
            name: {
                field.name: {
                    "type": _annotation(field.type),
                    "optional": field.default is not attrs.NOTHING,
                    "by position": not field.kw_only,
                }
                for field in attrs.fields(cls)
                if field.init
            }
            for name, cls in _own(types)
            if attrs.has(cls)
        },
        "methods": {
            f"{name}.{method}": signature
            for name, cls in _own(types)
            if attrs.has(cls)
            for method, signature in _methods(cls).items()
        },
        "values": {
            name: sorted(get_args(value))
            for name, value in vars(types).items()
            if get_origin(value) is Literal
        },
        "errors": {
            name: {"base": cls.__bases__[0].__name__, "arguments": _signature(cls.__init__)}
            for name, cls in _own(errors)
        },
        "functions": {name: _signature(_function(name)) for name in FUNCTIONS},
        "suites": testing.__all__,
    }


def breaks(before: Record, after: Record) -> list[str]:
    """The changes that break existing plugins, in words."""
    return list(_breaks(before, after))


def _breaks(before: Record, after: Record) -> Iterator[str]:
    for section, names in before.items():
        for name in names:
            if name not in after[section]:
                yield f"{section}: {name} is gone"
    for section, rule in (
        ("kinds", _kind),
        ("hooks", _hook),
        ("classes", _class),
        ("values", _values),
        ("errors", _same),
        ("methods", _calls),
        ("functions", _calls),
    ):
        for name, old in before[section].items():
            if name in after[section]:
                yield from (f"{name}: {what}" for what in rule(old, after[section][name]))
    for name, old in before["protocols"].items():
        new = after["protocols"].get(name, old)
        for method in old:
            if method not in new:
                yield f"{name}: {method} is gone"
            elif new[method] != old[method]:
                yield f"{name}: {method} was {old[method]}, and is {new[method]}"
        for method in new.keys() - old.keys() if name not in MADE_BY_THE_CORE else ():
            yield f"{name}: {method} is new, and plugins do not have it"


def _kind(old: Record, new: Record) -> Iterator[str]:
    for part in ("group", "specs"):
        if old[part] != new[part]:
            yield f"{part} was {old[part]!r}, and is {new[part]!r}"
    for hook in set(new["required"]) - set(old["required"]):
        yield f"{hook} is required now"


def _hook(old: Record, new: Record) -> Iterator[str]:
    for part in ("of", "returns", "first result"):
        if old[part] != new[part]:
            yield f"{part} was {old[part]!r}, and is {new[part]!r}"
    for argument, kind in old["arguments"].items():
        if argument not in new["arguments"]:
            yield f"argument {argument} is gone"
        elif new["arguments"][argument] != kind:
            yield f"argument {argument} was {kind}, and is {new['arguments'][argument]}"


def _class(old: Record, new: Record) -> Iterator[str]:
    for field, was in old.items():
        if field not in new:
            yield f"field {field} is gone"
            continue
        now = new[field]
        if now["type"] != was["type"]:
            yield f"field {field} was {was['type']}, and is {now['type']}"
        if was["optional"] and not now["optional"]:
            yield f"field {field} is required now"
        if was["by position"] and not now["by position"]:
            yield f"field {field} is not given by position any more"
    for field in new.keys() - old.keys():
        if not new[field]["optional"]:
            yield f"field {field} is new and required"
    placed = [f for f in old if old[f]["by position"]]
    if [f for f in new if new[f]["by position"]][: len(placed)] != placed:
        yield "fields that are given by position come in another order"


def _values(old: list[str], new: list[str]) -> Iterator[str]:
    for value in set(old) - set(new):
        yield f"value {value!r} is gone"


def _same(old: Any, new: Any) -> Iterator[str]:
    if old != new:
        yield f"was {old}, and is {new}"


def _calls(old: Record, new: Record) -> Iterator[str]:
    """Optional arguments may be added at the end."""
    known = len(old["arguments"])
    if old["returns"] != new["returns"] or new["arguments"][:known] != old["arguments"]:
        yield f"was {old}, and is {new}"
    elif any(required for _, _, required in new["arguments"][known:]):
        yield "takes more arguments"


def _methods(cls: type) -> Record:
    """Signatures of public methods and properties, by name."""
    return {
        name: _signature(value.fget if isinstance(value, property) else value)
        for name, value in vars(cls).items()
        if name[0] != "_" and (isinstance(value, property) or inspect.isfunction(value))
    }


def _signature(function: Any) -> Record:
    return {
        "arguments": [list(argument) for argument in _arguments(function)],
        "returns": _annotation(inspect.signature(function).return_annotation),
    }


def _arguments(function: Any) -> Iterator[tuple[str, str, bool]]:
    """Name, type, and whether it is required."""
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name != "self":
            required = parameter.default is inspect.Parameter.empty
            yield parameter.name, _annotation(parameter.annotation), required


def _annotation(annotation: Any) -> str:
    """A type as text, with the names that ``tilewright.types`` gives to sets of values."""
    if annotation is inspect.Signature.empty:
        return ""
    for name, value in vars(types).items():
        if annotation == value and get_origin(value) is Literal:
            return name
    if get_origin(annotation) in (Union, UnionType):
        return " | ".join(map(_annotation, get_args(annotation)))
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    # The modules of names differ between versions of Python.
    text = re.sub(r"\b\w+\.(?=\w)", "", text)
    return text.replace("ForwardRef", "").replace("'", "").replace("NoneType", "None")


def _own(module: ModuleType) -> list[tuple[str, Any]]:
    """The public classes of a module, or of a package's modules."""
    return [
        (name, value)
        for name, value in vars(module).items()
        if isinstance(value, type)
        and f"{value.__module__}.".startswith(f"{module.__name__}.")
        and name[0] != "_"
    ]


def _function(name: str) -> Any:
    module, _, function = name.rpartition(".")
    return getattr(import_module(module), function)


def path(version: int = plugins.API_VERSION) -> Path:
    return DATA / f"api_{version}.json"


def main() -> int:
    now, file = record(), path()
    broken = breaks(json.loads(file.read_text()), now) if file.exists() else []
    if broken:
        print("these changes break plugins; raise API_VERSION in plugins.py:", file=sys.stderr)
        print("\n".join(f"  {what}" for what in broken), file=sys.stderr)
        return 1
    file.write_text(json.dumps(now, indent=1) + "\n")
    print(f"recorded API {plugins.API_VERSION} in {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
