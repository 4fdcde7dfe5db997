"""External settings become attrs instances, or an error that names the option."""

from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Optional

import attrs
import numpy as np
import pytest
import torch
from attrs import field, frozen, validators

from tilewright.errors import ConfigError, PluginError
from tilewright.plugins import read_options
from tilewright.types import GenerateConfig, PluginInfo, RuntimeConfig
from tilewright.values import expected, options_of, structure


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


@frozen
class Inner:
    x: int = 0


@frozen(kw_only=True)
class Everything:
    count: int = 1
    ratio: float = 0.5
    flag: bool = False
    name: str = "a"
    folder: Path = Path()
    maybe: int | None = None
    old: "Optional[str]" = None  # noqa: UP045
    word: Literal["fast", "exact"] | None = None
    level: Literal[1, 2] = 1
    colour: Colour = Colour.RED
    strings: tuple[str, ...] = ()
    integers: list[int] = field(factory=list)
    unique: frozenset[int] = frozenset()
    sequence: Sequence[float] | None = None
    table: Mapping[int, float] | None = None
    bare: list = field(factory=list)
    inner: Inner = field(factory=Inner)
    many: tuple[Inner, ...] = ()
    anything: Any = None
    device: torch.device | None = None
    either: int | str = 0


ACCEPTED = [
    ("count", 3, 3),
    ("count", "3", 3),
    ("count", "-1_000", -1000),
    ("count", np.int64(3), 3),
    ("ratio", 2, 2.0),
    ("ratio", "1e-3", 0.001),
    ("ratio", np.float32(0.5), 0.5),
    ("flag", True, True),
    ("flag", "true", True),
    ("flag", "Off", False),
    ("flag", "1", True),
    ("name", "none", "none"),
    ("name", "2", "2"),
    ("folder", "/x/y", Path("/x/y")),
    ("folder", "~", Path.home()),
    ("maybe", None, None),
    ("maybe", "none", None),
    ("maybe", "None", None),
    ("maybe", "4", 4),
    ("old", "none", None),
    ("old", "text", "text"),
    ("word", "fast", "fast"),
    ("word", "none", None),
    ("level", "2", 2),
    ("level", 2, 2),
    ("colour", "blue", Colour.BLUE),
    ("strings", ["a", "b"], ("a", "b")),
    ("strings", "a, b", ("a, b",)),
    ("strings", '["a", "b"]', ("a", "b")),
    ("strings", "[INST]", ("[INST]",)),
    ("integers", "1, 2", [1, 2]),
    ("integers", "[1, 2]", [1, 2]),
    ("integers", (1, "2"), [1, 2]),
    ("integers", "", []),
    ("unique", {1, 2}, frozenset({1, 2})),
    ("sequence", "1", (1.0,)),
    ("table", {"5": 1}, {5: 1.0}),
    ("table", '{"5": "1.5"}', {5: 1.5}),
    ("table", "none", None),
    ("bare", [1, "a"], [1, "a"]),
    ("inner", {"x": "7"}, Inner(7)),
    ("inner", Inner(7), Inner(7)),
    ("many", [{"x": 1}, {}], (Inner(1), Inner(0))),
    ("anything", "none", "none"),
    ("device", torch.device("cpu"), torch.device("cpu")),
    ("device", None, None),
    ("either", "2", 2),
    ("either", "two", "two"),
]


@pytest.mark.parametrize(("name", "given", "value"), ACCEPTED)
def test_values_and_their_text_form_are_accepted(name: str, given: Any, value: Any) -> None:
    made = getattr(structure(Everything, {name: given}, "here"), name)
    assert made == value
    assert type(made) is type(value)


REFUSED = [
    ("count", "2.5", "an integer, found '2.5'"),
    ("count", 2.0, "an integer, found 2.0"),
    ("count", True, "an integer, found True"),
    ("count", None, "an integer, found None"),
    ("count", "none", "an integer, found 'none'"),
    ("ratio", "half", "a number, found 'half'"),
    ("ratio", False, "a number, found False"),
    ("flag", 1, "true or false, found 1"),
    ("flag", "maybe", "true or false, found 'maybe'"),
    ("name", 3, "a string, found 3"),
    ("folder", 3, "a path, found 3"),
    ("maybe", "x", "an integer or none, found 'x'"),
    ("old", 3, "a string or none, found 3"),
    ("word", "quick", "fast, exact or none, found 'quick'"),
    ("level", True, "1 or 2, found True"),
    ("level", "3", "1 or 2, found '3'"),
    ("colour", "green", "red or blue, found 'green'"),
    ("strings", [1], "a list of strings, found [1]"),
    ("strings", {"a": 1}, "a list of strings, found {'a': 1}"),
    ("integers", "1,x", "a list of integers, found '1,x'"),
    ("integers", 5, "a list of integers, found 5"),
    ("integers", "[1", "a list of integers, found '[1'"),
    ("table", [1], "a table from integers to numbers or none, found [1]"),
    ("table", "5=1", "a table from integers to numbers or none, found '5=1'"),
    ("inner", 3, "a table of x, found 3"),
    ("device", "cpu", "device or none, found 'cpu'"),
]


@pytest.mark.parametrize(("name", "given", "message"), REFUSED)
def test_a_wrong_value_is_an_error_with_option_expected_type_and_value(
    name: str, given: Any, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        structure(Everything, {name: given}, "run.toml, [x]")
    assert str(caught.value) == f"run.toml, [x]: {name!r} must be {message}"


def test_a_long_value_is_shortened_to_one_line() -> None:
    with pytest.raises(ConfigError) as caught:
        structure(Everything, {"count": torch.zeros(1000)}, "here")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 120


def test_an_unknown_option_is_an_error_that_suggests_the_nearest_or_lists_all() -> None:
    with pytest.raises(ConfigError) as caught:
        structure(Inner, {"y": 1}, "here")
    assert str(caught.value) == "here: unknown option 'y' (options: x)"
    with pytest.raises(ConfigError, match="unknown option 'ratoi'; did you mean 'ratio'"):
        structure(Everything, {"ratoi": 1}, "here")


def test_an_option_without_a_default_must_be_given() -> None:
    @frozen
    class Needs:
        size: int

    with pytest.raises(ConfigError, match=r"^here: option 'size' is missing: expected an integer$"):
        structure(Needs, {}, "here")


def test_a_validator_error_is_shortened_to_one_line() -> None:
    @frozen
    class Checked:
        size: int = field(default=1, validator=validators.ge(1))
        word: str = field(default="a", validator=validators.in_(("a", "b")))
        name: str = field(default="a", validator=validators.matches_re("a+"))

        def __attrs_post_init__(self) -> None:
            if self.size == 13:
                raise ValueError("thirteen is\nunlucky")

    for given, message in [
        ({"size": "0"}, "here: 'size' must be >= 1: 0"),
        ({"word": "c"}, "here: 'word' must be in ('a', 'b') (got 'c')"),
        ({"name": "b"}, "here: 'name' must match regex 'a+' ('b' doesn't)"),
        ({"size": 13}, "here: thirteen is unlucky"),
    ]:
        with pytest.raises(ConfigError) as caught:
            structure(Checked, given, "here")
        assert str(caught.value) == message


def test_an_error_in_an_inner_table_names_the_table_and_the_key() -> None:
    with pytest.raises(ConfigError) as caught:
        structure(Everything, {"inner": {"x": "a"}}, "here")
    assert str(caught.value) == "here: in 'inner': Inner: 'x' must be an integer, found 'a'"


def test_options_are_named_by_init_argument_and_exclude_computed_fields() -> None:
    @frozen
    class Odd:
        _hidden: int = 1
        named: int = field(default=2, alias="other")
        made: int = field(init=False, default=3)

    assert [option.name for option in options_of(Odd)] == ["hidden", "other"]
    made = structure(Odd, {"hidden": 5, "other": 6}, "here")
    assert (made._hidden, made.named) == (5, 6)


@pytest.mark.parametrize("cls", [RuntimeConfig, GenerateConfig])
def test_every_engine_setting_is_an_option_with_help(cls: type) -> None:
    options = options_of(cls)
    assert {option.name for option in options} == {f.name for f in attrs.fields(cls)}
    assert all(option.help and option.expected for option in options)
    assert structure(cls, {}, "here") == cls()


def test_expected_types_are_described_in_words() -> None:
    assert expected(Literal["a"]) == "a"
    assert expected(tuple[int | str, ...]) == "a list of integers or strings"
    assert expected(dict[str, list[int]]) == "a table from strings to lists of integers"


def test_top_k_minus_1_is_all_tokens_and_top_p_0_needs_temperature_0() -> None:
    written = structure(GenerateConfig, {"top_k": "-1", "top_p": "0", "temperature": "0"}, "x")
    assert written == GenerateConfig(top_k=0, top_p=0.0, temperature=0.0)
    wrong = "'top_p' must be > 0 unless temperature is 0: 0.0; for the most likely token, set"
    with pytest.raises(ConfigError, match=wrong):
        structure(GenerateConfig, {"top_p": "0", "temperature": "0.7"}, "x")
    with pytest.raises(ConfigError, match=wrong):
        GenerateConfig(top_p=0.0).over(GenerateConfig(temperature=0.7))
    with pytest.raises(ConfigError, match="'top_k' must be >= 0: -2"):
        GenerateConfig(top_k=-2)


def test_a_plugin_without_options_refuses_every_option() -> None:
    info = PluginInfo(summary="x")
    assert read_options("sampler 'x'", info, {}) is None
    with pytest.raises(ConfigError, match=r"^sampler 'x' has no options, found 'seed', 'size'$"):
        read_options("sampler 'x'", info, {"seed": 1, "size": 2})


def test_a_plugins_options_are_an_instance_of_its_class() -> None:
    assert read_options("x", PluginInfo(summary="", options=Inner), {"x": "2"}) == Inner(2)
    with pytest.raises(ConfigError, match=r"^sampler 'x': unknown option 'z' "):
        read_options("sampler 'x'", PluginInfo(summary="", options=Inner), {"z": "2"})
    with pytest.raises(PluginError, match="must be an attrs class, found <class 'int'>"):
        read_options("sampler 'x'", PluginInfo(summary="", options=int), {})
