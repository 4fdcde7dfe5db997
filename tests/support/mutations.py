"""JSON values, texts and bytes with faults drawn at random; the same seed draws the same ones."""

import json
import random
from copy import deepcopy
from typing import Any


def nested(depth: int, kind: str = "list") -> Any:
    """A list or an object that holds one, and so on."""
    value: Any = 1
    for _ in range(depth):
        value = [value] if kind == "list" else {"a": value}
    return value


ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 3, 70_000),
    *(2**31, 2**32 - 1, 2**32, 2**63, 2**64, -(2**63), 10**30, 10**400),
    *(0.5, -0.0, 1e308, float("nan"), float("inf"), -float("inf")),
    *(
        "",
        " ",
        "a",
        "12",
        "-1",
        "null",
        "\n",
        "\0",
        "é▁数",
        "\ud800",
        "\udfff",
        "\u202e",
        "a\u0301",
    ),
    *("{}", "(?<", "(a*)*b", "\\", "(?i)", "$A", "[UNK]", "</s>"),
    *("x" * 5_000, "é\n" * 3_000, "y" * 200_000),
    *([], {}, [[]], [None], [1], {"": ""}, list(range(3_000)), {str(i): i for i in range(3_000)}),
    *(nested(60), nested(60, "object"), nested(300)),
]


def odd(draw: random.Random) -> Any:
    """A value that files seldom have."""
    return json.loads(json.dumps(draw.choice(ODD)))


class Repeated(dict[str, Any]):
    """An object that is written with its first key twice."""

    def items(self) -> Any:
        pairs = list(super().items())
        return [*pairs, *pairs[:1]]


def place(document: Any, draw: random.Random) -> tuple[Any, Any]:
    """A container inside a JSON value, and a key of it; each depth is about as likely."""
    container, key = None, None
    while isinstance(document, dict | list) and document:
        container, key = document, draw.choice(range(len(document)))
        if isinstance(document, dict):
            key = list(document)[key]
        document = container[key]
        if draw.random() < 0.25:
            break
    return container, key


def changed(document: Any, draw: random.Random) -> Any:
    """A copy of a JSON value with one to three changes at any depth."""
    document = deepcopy(document)
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        container, key = place(document, draw)
        if container is None:
            return odd(draw)
        value = container[key]
        match draw.choice(["odd", "odd", "remove", "repeat", "rename", "retype", "swap", "double"]):
            case "odd":
                container[key] = odd(draw)
            case "remove":
                del container[key]
            case "repeat" if isinstance(container, list):
                container[key:key] = [deepcopy(value) for _ in range(draw.choice([1, 50]))]
            case "repeat" | "rename" as how:
                other = draw.choice([*container, f"{key}", f"{key}_", "", "type", "\0", "x" * 999])
                container[other if isinstance(container, dict) else key] = deepcopy(value)
                if how == "rename" and isinstance(container, dict) and other != key:
                    del container[key]
            case "retype":
                container[key] = retyped(value, draw)
            case "swap":
                other, there = place(document, draw)
                if other is not None and not isinstance(value, dict | list):
                    container[key], other[there] = deepcopy(other[there]), value
            case "double" if isinstance(value, dict):
                container[key] = Repeated(value)
    return document


def retyped(value: Any, draw: random.Random) -> Any:
    """A value of another type that holds the same."""
    text = value if isinstance(value, str) else repr(value)[:1000]
    forms: list[Any] = [text, [value], {"value": value}, bool(value), None]
    if isinstance(value, bool | int):
        forms += [float(value), -value, int(value) + 1, value * 2**33]
    if isinstance(value, dict):
        forms += [list(value.values()), list(value), [list(pair) for pair in value.items()]]
    if isinstance(value, list):
        forms += [dict(enumerate(map(str, value))), value[::-1], value[:-1], value * 2]
    if isinstance(value, str):
        forms += [list(value[:200]), value.upper(), value[::-1], value[:-1], f"{value} "]
    return draw.choice(forms)


def damaged(data: bytes, draw: random.Random) -> bytes:
    """Bytes of a text file with one to three faults."""
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        at = draw.randrange(len(data) + 1)
        size = draw.choice([1, 1, 2, 10, 100])
        match draw.randrange(11):
            case 0:
                data = data[:at]
            case 1:
                data = data[:at] + data[at + size :]
            case 2:
                data = data[:at] + data[at : at + size] * 2 + data[at + size :]
            case 3 if at < len(data):
                data = data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]
            case 4:
                inserted = [b"\0", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\r", b"\x1b[2J"]
                data = data[:at] + draw.choice(inserted) + data[at:]
            case 5:
                data = (
                    data[:at] + draw.choice([b'"', b"{", b"[", b"}", b"]", b",", b":"]) + data[at:]
                )
            case 6:
                data = data[:at] + draw.choice([b"[", b'{"a":', b"x", b"\n"]) * 20_000 + data[at:]
            case 7:
                data = data.replace(b"\n", b"\r\n")
            case 8:
                data = data.decode("utf-8", "replace").encode(draw.choice(["utf-16", "utf-8-sig"]))
            case 9:
                data = data.decode("utf-8", "replace").encode("latin-1", "replace")
            case 10:
                other = draw.randrange(len(data) + 1)
                data = data[:at] + data[other : other + size] + data[at:]
    return data


def rewritten(document: dict[str, Any], draw: random.Random) -> bytes:
    """The same JSON object, written in another way: its keys in another order, for one."""
    document = dict(draw.sample(list(document.items()), len(document)))
    text = json.dumps(
        document, ensure_ascii=draw.random() < 0.5, indent=draw.choice([None, 0, 3, "\t"])
    )
    if draw.random() < 0.3:
        text = text.replace("\n", "\r\n")
    return text.encode(draw.choice(["utf-8", "utf-8-sig"]))


def json_file(document: Any, draw: random.Random) -> bytes:
    """A JSON file whose value, and sometimes whose text, is at fault."""
    if draw.random() < 0.2:
        return damaged(json.dumps(document, indent=2).encode(), draw)
    if draw.random() < 0.05:
        document = deepcopy(document)
        container, key = place(document, draw)
        container[key] = "deep"
        depth = draw.choice([100, 300, 900, 970, 5_000])
        return json.dumps(document).replace('"deep"', "[" * depth + "]" * depth).encode()
    return json.dumps(changed(document, draw)).encode()
