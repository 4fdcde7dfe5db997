"""Line numbers of keys in TOML, and TOML that is written."""

import datetime
import math
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilewright import toml
from tilewright.errors import ConfigError
from tilewright.toml import key_lines

# --- line numbers ---------------------------------------------------------------------------------


def test_lines_of_keys_however_they_are_written():
    text = """\
top = 1

# [comment]
[a."b.c"]  # header
x = '''
[not.a.header]
y = 1
'''
list = [
  "]",  # not the end
  [1,
   2],
]
d.e.f = 2
inline = { g = 1, h.i = 2 }
[[arrays]]
z = 3
"""
    table = ("a", "b.c")
    expected = {
        ("top",): 1,
        ("a",): 4,
        table: 4,
        (*table, "x"): 5,
        (*table, "list"): 9,
        (*table, "d"): 14,
        (*table, "d", "e"): 14,
        (*table, "d", "e", "f"): 14,
        (*table, "inline"): 15,
        (*table, "inline", "g"): 15,
        (*table, "inline", "h"): 15,
        (*table, "inline", "h", "i"): 15,
        ("arrays",): 16,
        ("arrays", "z"): 17,
    }
    tomllib.loads(text)
    assert key_lines(text) == expected


@pytest.mark.parametrize("end", ["", "\n"])
@pytest.mark.parametrize(
    ("last", "line"),
    [
        ("[table", 3),
        ("[[tables", 3),
        ("[a]", 3),
        ("x = 1", 3),
        ("y", 3),
        ("y =", 3),
        ("y = tru", 3),
        ("y = 'text", 3),
        ('y = "text', 3),
        ('y = """text\n\n[table]', 3),
        ("y = [1,\n2,\n# comment", 3),
        ("y = { z = 1", 3),
        ("y = [\n1]\n\ny = 2", 6),
    ],
)
def test_an_error_at_the_end_of_a_file_is_on_the_line_where_its_statement_begins(last, line, end):
    with pytest.raises(ConfigError, match=rf"^run\.toml:{line}: invalid TOML: "):
        toml.parse(Path("run.toml"), f"a = {{ b = 1 }}\nx = 0\n{last}{end}")


def test_finding_lines_ends_early_in_a_huge_statement():
    text = "a = 1\nx = [\n" + "[1],\n" * 50_000 + "]\nb = 1\n"
    assert key_lines(text) == {("a",): 1}


VALUES = ["1", '"s"', '[\n "]",\n 2 ]', '"""\n[x]\nk = 1\n"""', "'''a\n]\n}'''", "{ a = 1 }"]


@given(st.lists(st.tuples(st.sampled_from(VALUES), st.sampled_from(["", "\n", "# c ]\n"]))))
def test_a_key_is_on_the_line_where_it_is_written(statements):
    text = "".join(f"{between}k{i} = {v}\n" for i, (v, between) in enumerate(statements))
    tomllib.loads(text)
    lines = key_lines(text)
    for i in range(len(statements)):
        assert text.split("\n")[lines[f"k{i}",] - 1].startswith(f"k{i} = ")


# --- writing --------------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
SCALARS = (
    TEXT
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.dates()
    | st.datetimes()
)


@given(TEXT, st.recursive(SCALARS, lambda v: st.lists(v) | st.dictionaries(TEXT, v)))
def test_what_is_written_is_read_back(key: str, value: Any) -> None:
    line = toml.setting(key, value)
    assert "\n" not in line
    assert tomllib.loads(line) == {key: value}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ('a"b\\\n\x7f\x1bé', r'"a\"b\\\n\u007f\u001bé"'),
        (True, "true"),
        (1e16, "1e+16"),
        (-math.inf, "-inf"),
        (math.nan, "nan"),
        (datetime.date(1979, 5, 27), "1979-05-27"),
        ((1, [2.5, "x"]), '[1, [2.5, "x"]]'),
        ({"a.b": 1, 3: {}, "": []}, '{"a.b" = 1, 3 = {}, "" = []}'),
    ],
)
def test_a_value_is_written_on_one_line(value: Any, text: str) -> None:
    assert toml.written(value) == text


@pytest.mark.parametrize("value", [None, Path("x"), [1, None], {"a": {1}}])
def test_a_type_that_toml_lacks(value: Any) -> None:
    with pytest.raises(ConfigError, match="cannot be written in TOML"):
        toml.written(value)


def test_writing_takes_time_in_proportion_to_the_length() -> None:
    start = time.monotonic()
    table = {str(i): 1.5 for i in range(20_000)}
    toml.written({"text": "ab\n" * 10**6, "array": [1.5] * 20_000, "table": table})
    assert time.monotonic() - start < 10  # minutes, if tomlkit writes them
