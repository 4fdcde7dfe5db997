"""An installed logits processor: named by a flag, a variable or a run file, it directs the text."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import plugin_distributions as dists
import pytest
from plugin_distributions import Distribution

from tilewright import GenerateConfig, LLMEngine
from tilewright.settings import DEMO_MODEL

SPELLING = '''
"""Spells a text, one character at a time, over and over."""

import torch
from attrs import field, frozen

from tilewright import hookimpl
from tilewright.errors import RequestError
from tilewright.types import LogitsEdits, PluginInfo

tilewright_api = 2


@frozen
class Options:
    upper: bool = field(default=False, metadata={"help": "in capitals"})


@hookimpl
def plugin_info():
    return PluginInfo(summary="spells a text", options=Options)


@hookimpl
def create_logits_processor(model_config, text, options):
    return Spelling(text.tokenizer, model_config.vocab_size, options.upper)


@hookimpl
def sample_argument():
    return "spell"


class Spelling:
    def __init__(self, tokenizer, vocab_size, upper):
        self.tokenizer = tokenizer
        self.words = -(-vocab_size // 32)
        self.upper = upper

    def begin(self, request_id, argument, prompt_token_ids):
        if not isinstance(argument, str) or not argument.isascii() or not argument.isalpha():
            raise RequestError(f"spelling: expected a word, found {argument!r:.100}")
        word = argument.upper() if self.upper else argument
        return {"ids": [self.tokenizer.token_to_id(letter) for letter in word], "at": 0}

    def edits(self, rows):
        masks = torch.zeros(len(rows), self.words, dtype=torch.int32)
        for mask, (_, state) in zip(masks, rows, strict=True):
            token = state["ids"][state["at"] % len(state["ids"])]
            bit = token % 32
            mask[token // 32] = 1 << bit if bit < 31 else -(1 << 31)
        return LogitsEdits(mask_rows=torch.tensor([row for row, _ in rows]), masks=masks)

    def accept(self, state, token_id):
        state["at"] += 1

    def snapshot(self, state):
        return state["at"]

    def restore(self, state, snapshot):
        state["at"] = snapshot

    def end(self, state):
        pass
'''

UNPROVED = '''
"""A processor whose argument is not known."""

from tilewright import hookimpl
from tilewright.types import PluginInfo

tilewright_api = 2


@hookimpl
def plugin_info():
    return PluginInfo(summary="is not proved")


@hookimpl
def create_logits_processor(text):
    raise AssertionError("nothing asks for it")
'''

ACME = Distribution(
    "acme-spelling",
    {"acme_spelling.py": SPELLING, "acme_unproved.py": UNPROVED},
    {"logits_processor": {"spelling": "acme_spelling", "unproved": "acme_unproved"}},
)


@pytest.fixture(autouse=True)
def _installed(tmp_path: Path) -> Iterator[None]:
    with dists.on_path(tmp_path / "site") as install:
        install(ACME)
        yield


@pytest.mark.parametrize("name", ["spelling", "acme-spelling:spelling"])
def test_a_flag_names_the_processor_and_its_argument(tilewright: Any, name: str) -> None:
    flag = ["--logits-processor", f"{name}=tile"]
    code, out, err = tilewright("generate", *flag, "--max-new-tokens", "6", "We the People")
    assert (code, out, err) == (0, "tileti\n", "")


def test_an_option_is_given_by_the_processors_name(tilewright: Any) -> None:
    flags = ["--logits-processor", "spelling=tile", "-o", "logits_processor.spelling.upper=true"]
    code, out, _ = tilewright("generate", *flags, "--max-new-tokens", "6", "We the People")
    assert (code, out) == (0, "TILETI\n")


RUN_FILE = """
[generate]
max_new_tokens = 6
temperature = 1.5

[generate.logits_processors]
spelling = "tile"

[options.logits_processor.spelling]
upper = true

[prompts]
text = ["We the People", "When in the Course"]
"""


def test_a_run_file_has_a_table_of_processors(tilewright: Any, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(RUN_FILE)
    code, out, _ = tilewright("run", str(file), "--json")
    assert code == 0
    assert [json.loads(line)["text"] for line in out.splitlines()] == ["TILETI", "TILETI"]
    code, out, _ = tilewright("run", str(file), "--json", "--logits-processor", "spelling=a")
    assert [json.loads(line)["text"] for line in out.splitlines()] == ["AAAAAA", "AAAAAA"]


def test_show_prints_the_table_as_a_run_file_has_it(tilewright: Any, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(RUN_FILE)
    code, out, _ = tilewright("run", str(file), "--show")
    assert code == 0
    again = tmp_path / "again.toml"
    again.write_text(out)
    code, out, _ = tilewright("run", str(again), "--json")
    assert [json.loads(line)["text"] for line in out.splitlines()] == ["TILETI", "TILETI"]


def test_a_variable_holds_the_processors_as_json(
    tilewright: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TILEWRIGHT_GENERATE_LOGITS_PROCESSORS", '{"spelling": "tile"}')
    code, out, _ = tilewright("generate", "--max-new-tokens", "4", "We the People")
    assert (code, out) == (0, "tile\n")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["spelling=no word"], "spelling: expected a word, found 'no word'"),
        (
            ["speling=tile"],
            "--logits-processor: no logits processor is named 'speling'; did you mean 'spelling'?",
        ),
        (
            ["spelling=a", "--logits-processor", "spelling=b"],
            "--logits-processor: 'spelling' is given twice: give it once",
        ),
        (
            ["spelling=tile", "-o", "logits_processor.unproved.x=1"],
            "-o logits_processor.unproved.x: no request uses logits processor 'unproved'",
        ),
        (["spelling"], "--logits-processor: expected NAME=ARGUMENT, found 'spelling'"),
        (
            ["spelling=tile", "-o", "logits_processor.spelling.uper=true"],
            "'uper'; did you mean 'upper'?",
        ),
        (
            ["spelling=tile", "-o", "logits_processor.speling.upper=true"],
            "-o logits_processor.speling.upper: no logits processor is named 'speling'",
        ),
    ],
)
def test_a_mistake_is_an_error_of_one_line(tilewright: Any, flags: list[str], message: str) -> None:
    code, _, err = tilewright("generate", "We the People", "--logits-processor", *flags)
    assert code == 2
    (line,) = err.splitlines()
    assert message in line


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('spelling = "tile"', 'speling = "tile"', ":6: no logits processor is named 'speling'"),
        ('spelling = "tile"', "", ":10: no request uses logits processor 'spelling'"),
    ],
)
def test_a_mistake_in_a_run_file_is_named_with_its_line(
    tilewright: Any, tmp_path: Path, old: str, new: str, message: str
) -> None:
    file = tmp_path / "run.toml"
    assert old in RUN_FILE
    file.write_text(RUN_FILE.replace(old, new))
    code, _, err = tilewright("run", str(file))
    assert code == 2
    assert err.startswith(f"tilewright: error: {file}{message}")


def test_an_option_may_name_the_processors_distribution(tilewright: Any) -> None:
    flags = ["-o", "logits_processor.acme-spelling:spelling.upper=true", "--max-new-tokens", "4"]
    code, out, _ = tilewright("generate", "We", "--logits-processor", "spelling=tile", *flags)
    assert (code, out) == (0, "TILE\n")


def test_requests_with_and_without_a_processor_run_together() -> None:
    plain = GenerateConfig(max_new_tokens=8)
    spelled = GenerateConfig(max_new_tokens=8, logits_processors={"spelling": "tile"})
    with LLMEngine.from_plugins() as engine:
        engine.init_model("m", DEMO_MODEL)
        alone = engine.generate_result("m", "We the People", plain).text
        streams = [engine.stream("m", "We the People", each) for each in (plain, spelled, plain)]
        texts = ["".join(stream) for stream in streams]
    assert texts == [alone, "tiletile", alone]


# --- tilewright plugins ---------------------------------------------------------------------------


def test_list_show_and_check_know_the_kind(tilewright: Any) -> None:
    code, out, _ = tilewright("plugins", "list", "--kind", "logits_processor", "--json")
    assert code == 0
    names = ["choice", "spelling", "structured-output", "unproved"]
    assert [p["name"] for p in json.loads(out)] == names
    code, out, _ = tilewright("plugins", "show", "spelling")
    assert code == 0
    assert out.startswith("logits processor 'spelling' of acme-spelling 1.0\n  spells a text\n")
    assert "\n  upper: true or false (default false)\n      in capitals\n" in out
    assert "\nhooks: plugin_info, create_logits_processor, sample_argument\n" in out
    code, out, _ = tilewright("plugins", "check", "--json")
    found = {p["name"]: p["state"] for p in json.loads(out) if p["kind"] == "logits_processor"}
    assert found == dict.fromkeys(names, "ok")


def test_verify_runs_the_suite_with_the_plugins_own_argument(tilewright: Any) -> None:
    code, out, err = tilewright("plugins", "verify", "spelling")
    assert (code, err) == (0, ""), out
    assert "  passed   restore makes a state what it was\n" in out
    assert out.endswith(" passed, 0 failed, 0 not run\n")


def test_verify_says_what_it_could_not_run_without_an_argument(tilewright: Any) -> None:
    code, out, _ = tilewright("plugins", "verify", "unproved")
    assert code == 3
    assert (
        "no argument to begin a request with: give the suite a fixture 'argument', or implement "
        "sample_argument" in out
    )
