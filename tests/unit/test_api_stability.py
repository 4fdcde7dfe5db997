"""The plugin API does not change within one API version, and the documentation matches it."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path

import api_record
import pytest
from api_record import Record
from checkout import ROOT

from tilewright import plugins
from tilewright_tools import hook_reference

FIND, TORCH_DTYPE = "tilewright.plugins.find", "tilewright.weights.torch_dtype"
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def recorded() -> Record:
    found: Record = json.loads(api_record.path().read_text())
    return found


@pytest.fixture(scope="module")
def now() -> Record:
    return api_record.record()


def test_the_api_has_no_breaking_change_within_its_version(recorded: Record, now: Record) -> None:
    broken = api_record.breaks(recorded, now)
    assert not broken, (
        "plugins written before would break, so API_VERSION in plugins.py must be raised (and "
        f"`python tests/support/api_record.py` run): {'; '.join(broken)}"
    )


def test_additions_to_the_api_are_recorded(recorded: Record, now: Record) -> None:
    assert recorded == json.loads(json.dumps(now)), (
        "the API has grown: record it with `python tests/support/api_record.py`"
    )


def test_each_api_version_has_a_record() -> None:
    found = {p.name for p in api_record.DATA.glob("api_*.json")}
    assert found == {f"api_{n}.json" for n in range(1, plugins.API_VERSION + 1)}


def test_the_hook_reference_matches_the_code() -> None:
    assert (DOCS / "hooks.md").read_text() == hook_reference.reference(), (
        "python -m tilewright_tools.hook_reference > docs/hooks.md"
    )


def test_the_tests_that_the_page_on_odd_files_names_exist() -> None:
    rows = re.findall(r"`([\w/]+\.py)::(\w+)` \|$", (DOCS / "odd-files.md").read_text(), re.M)
    assert len(rows) > 100
    tests = {path: (ROOT / "tests" / path).read_text() for path, _ in rows}
    assert [f"{p}::{name}" for p, name in rows if f"def {name}(" not in tests[p]] == []


def test_the_documentation_names_the_version() -> None:
    page = (DOCS / "writing-plugins.md").read_text()
    assert f"`tilewright_api = {plugins.API_VERSION}`" in page


# --- comparing records ----------------------------------------------------------------------------

Change = Callable[[Record], object]
OPTIONAL = {"type": "int", "optional": True, "by position": False}
METHOD = {"arguments": [], "returns": "None"}

BREAKING: dict[str, tuple[Change, str]] = {
    "a hook is gone": (lambda r: r["hooks"].pop("can_load"), "can_load is gone"),
    "an event is gone": (lambda r: r["hooks"].pop("on_step"), "on_step is gone"),
    "an argument is gone": (
        lambda r: r["hooks"]["open_weights"]["arguments"].pop("options"),
        "open_weights: argument options is gone",
    ),
    "an argument is renamed": (
        lambda r: r["hooks"]["can_load"].update(arguments={"path": "str"}),
        "can_load: argument source is gone",
    ),
    "an argument has another type": (
        lambda r: r["hooks"]["can_load"]["arguments"].update(source="Path"),
        "argument source was str, and is Path",
    ),
    "a hook returns something else": (
        lambda r: r["hooks"]["write_sample"].update(returns="Path"),
        "write_sample: returns was 'Sample'",
    ),
    "all answers to a hook are taken": (
        lambda r: r["hooks"]["can_load"].update({"first result": False}),
        "can_load: first result",
    ),
    "a hook is of another kind": (
        lambda r: r["hooks"]["pack_weights"].update(of="LoaderHooks"),
        "pack_weights: of was",
    ),
    "a hook is required": (
        lambda r: r["kinds"]["loader"]["required"].append("write_sample"),
        "loader: write_sample is required now",
    ),
    "a kind is gone": (lambda r: r["kinds"].pop("observer"), "observer is gone"),
    "a group is renamed": (
        lambda r: r["kinds"]["loader"].update(group="tw.loaders"),
        "loader: group was",
    ),
    "a protocol is gone": (lambda r: r["protocols"].pop("Sampler"), "Sampler is gone"),
    "a protocol has another method": (
        lambda r: r["protocols"]["Sampler"].update(reset=METHOD),
        "Sampler: reset is new, and plugins do not have it",
    ),
    "a protocol's method is gone": (
        lambda r: r["protocols"]["TensorSource"].pop("close"),
        "TensorSource: close is gone",
    ),
    "a method takes another argument": (
        lambda r: r["protocols"]["Executor"]["forward"]["arguments"].append(["x", "int", False]),
        "Executor: forward was",
    ),
    "what plugins use has lost a method": (
        lambda r: r["protocols"]["WeightFormats"].pop("open"),
        "WeightFormats: open is gone",
    ),
    "a field is gone": (
        lambda r: r["classes"]["StepBatch"].pop("slot_mapping"),
        "StepBatch: field slot_mapping is gone",
    ),
    "a field is required": (
        lambda r: r["classes"]["ModelConfig"]["qk_norm"].update(optional=False),
        "ModelConfig: field qk_norm is required now",
    ),
    "a field has another type": (
        lambda r: r["classes"]["StepEvent"]["seconds"].update(type="int"),
        "StepEvent: field seconds was float, and is int",
    ),
    "a new field is required": (
        lambda r: r["classes"]["SampledToken"].update(score=OPTIONAL | {"optional": False}),
        "SampledToken: field score is new and required",
    ),
    "a field is not by position any more": (
        lambda r: r["classes"]["KvLayer"]["value"].update({"by position": False}),
        "KvLayer: field value is not given by position any more",
    ),
    "fields by position change places": (
        lambda r: r["classes"].update(KvLayer=dict(reversed(r["classes"]["KvLayer"].items()))),
        "KvLayer: fields that are given by position come in another order",
    ),
    "a method of data is gone": (
        lambda r: r["methods"].pop("ModelConfig.window"),
        "ModelConfig.window is gone",
    ),
    "a value is gone": (lambda r: r["values"]["DType"].remove("float16"), "DType: value 'float16'"),
    "an error is gone": (lambda r: r["errors"].pop("ModelError"), "ModelError is gone"),
    "an error has another base": (
        lambda r: r["errors"]["ModelError"].update(base="Exception"),
        "ModelError: was",
    ),
    "a function takes more": (
        lambda r: r["functions"][TORCH_DTYPE]["arguments"].append(["x", "int", True]),
        f"{TORCH_DTYPE}: takes more arguments",
    ),
    "a function is gone": (
        lambda r: r["functions"].pop("tilewright.plugins.find"),
        "tilewright.plugins.find is gone",
    ),
    "a suite is gone": (lambda r: r["suites"].remove("LoaderSuite"), "LoaderSuite is gone"),
}


@pytest.mark.parametrize("change", BREAKING)
def test_breaking_changes_are_reported(now: Record, change: str) -> None:
    changed = copy.deepcopy(now)
    make, said = BREAKING[change]
    make(changed)
    assert said in "; ".join(api_record.breaks(now, changed))


HARMLESS: dict[str, Change] = {
    "a new optional hook": lambda r: r["hooks"].update(on_swap=r["hooks"]["on_close"]),
    "a new argument of a hook": lambda r: r["hooks"]["can_load"]["arguments"].update(deep="bool"),
    "a new field with a default": lambda r: r["classes"]["ModelConfig"].update(scale=OPTIONAL),
    "a field becomes optional": lambda r: r["classes"]["StepBatch"]["slot_mapping"].update(
        optional=True
    ),
    "a new class": lambda r: r["classes"].update(Swap={"a": OPTIONAL}),
    "a new protocol": lambda r: r["protocols"].update(Swapper={"swap": METHOD, "(bases)": []}),
    "a new method for loaders": lambda r: r["protocols"]["WeightFormats"].update(names=METHOD),
    "a new value": lambda r: r["values"]["RopeKind"].append("longrope"),
    "a new error": lambda r: r["errors"].update(SwapError=r["errors"]["ModelError"]),
    "a new kind": lambda r: r["kinds"].update(tracer=r["kinds"]["observer"]),
    "an argument that may be left out": lambda r: r["functions"][TORCH_DTYPE]["arguments"].append(
        ["x", "int", False]
    ),
    "a new method of data": lambda r: r["methods"].update({"ModelConfig.heads": METHOD}),
    "a new suite": lambda r: r["suites"].append("TracerSuite"),
}


@pytest.mark.parametrize("change", HARMLESS)
def test_compatible_changes_are_accepted(now: Record, change: str) -> None:
    changed = copy.deepcopy(now)
    HARMLESS[change](changed)
    assert changed != now
    assert not api_record.breaks(now, changed)


def test_a_breaking_change_is_not_recorded_under_the_same_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(api_record, "DATA", tmp_path)
    assert api_record.main() == 0
    written = api_record.path().read_text()
    changed = json.loads(written)
    changed["hooks"]["can_guess"] = changed["hooks"]["can_load"]
    api_record.path().write_text(json.dumps(changed))
    assert api_record.main() == 1
    assert "hooks: can_guess is gone" in capsys.readouterr().err
    assert json.loads(api_record.path().read_text()) == changed
