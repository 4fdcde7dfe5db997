"""``tilewright plugins verify``: runs the suites on an installed plugin and prints the results."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import plugin_distributions as dists
import pytest
from plugin_distributions import Distribution, Install

from tilewright.cli import main
from tilewright_testing.models import make_model, write_hf_directory

FORMATS = '''
"""Formats over safetensors: one that reads all at once, one that dies, one that writes nothing."""

import os
import signal

from attrs import field, frozen, validators
from tilewright import hookimpl
from tilewright.types import PluginInfo
from tilewright_hf import safetensors_format as real


@frozen
class Options:
    level: int = field(default=1, validator=validators.le(9), metadata={"help": "how much"})


class Bare:
    tilewright_api = 2

    @hookimpl
    def plugin_info(self):
        return PluginInfo(summary="a format", options=Options)

    @hookimpl
    def can_open(self, directory):
        return real.can_open(directory)

    @hookimpl
    def open_weights(self, directory):
        return real.open_weights(directory, real.Options())


class Writes(Bare):
    @hookimpl
    def write_weights(self, directory, tensors):
        return real.write_weights(directory, tensors)


class Eager(Writes):
    @hookimpl
    def open_weights(self, directory):
        source = real.open_weights(directory, real.Options())
        read = {name: source.get(name).clone() for name in source.names()}
        source.get = read.__getitem__
        return source


class Dying(Writes):
    @hookimpl
    def open_weights(self, directory):
        os.kill(os.getpid(), signal.SIGKILL)


BARE, EAGER, DYING = Bare(), Eager(), Dying()
'''

LOADER = '''
"""A loader of Hugging Face directories that does not say what its sample holds."""

from tilewright import hookimpl
from tilewright.types import PluginInfo, Sample
from tilewright_hf import loader as real


class Silent:
    tilewright_api = 2

    @hookimpl
    def plugin_info(self):
        return PluginInfo(summary="a loader")

    @hookimpl
    def can_load(self, source):
        return real.can_load(source)

    @hookimpl
    def load_model(self, source, weight_format, formats):
        return real.load_model(source, weight_format, formats)

    @hookimpl
    def write_sample(self, directory):
        from tilewright_testing.models import make_model, write_hf_directory

        return Sample(source=str(write_hf_directory(make_model(), directory)))


SILENT = Silent()
'''

EXECUTORS = '''
"""The executor torch for models with biases only: one says so, one says that it runs all."""

from tilewright import hookimpl
from tilewright.errors import ExecutorError
from tilewright.types import PluginInfo
from tilewright_torch import plugin as real


class Biased:
    tilewright_api = 2
    serves = None

    @hookimpl
    def plugin_info(self):
        dtypes = ("float32",)
        return PluginInfo(
            summary="runs biases", weight_dtypes=dtypes, kv_dtypes=dtypes, serves=self.serves
        )

    @hookimpl
    def create_executor(self, model_config, runtime_config, weights, layers):
        if not model_config.qkv_bias:
            raise ExecutorError("models without biases are not run")
        return real.create_executor(model_config, runtime_config, weights, layers, None)


class Boasting(Biased):
    @staticmethod
    def serves(config):
        return True


BIASED, BOASTING = Biased(), Boasting()
'''

ACME = Distribution(
    "acme-formats",
    {
        "acme_formats.py": FORMATS,
        "acme_loaders.py": LOADER,
        "acme_executors.py": EXECUTORS,
    },
    {
        "loader": {"silent": "acme_loaders:SILENT"},
        "weight_format": {
            name: f"acme_formats:{name.upper()}" for name in ("bare", "eager", "dying")
        },
        "executor": {name: f"acme_executors:{name.upper()}" for name in ("biased", "boasting")},
    },
)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Install]:
    with dists.on_path(tmp_path / "site") as install:
        install(ACME)
        yield install


@pytest.fixture
def verify(capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*arguments: str) -> tuple[int, str, str]:
        code = main(("plugins", "verify", *arguments))
        out, err = capsys.readouterr()
        return code, out, err

    return call


def test_a_conforming_plugin_passes_every_statement(verify: Any) -> None:
    code, out, err = verify("safetensors")
    assert (code, err) == (0, "")
    title, *lines, numbers = out.splitlines()
    assert title.startswith("weight format 'safetensors' of tilewright ")
    assert "  passed   closing closes the files" in lines
    assert "  passed   a truncated file raises model error (by 1 byte)" in lines
    assert numbers == f"{len(lines)} passed, 0 failed, 0 not run"
    assert len(lines) > 30


def test_a_nonconforming_plugin_fails_with_the_statement_and_the_reason(
    verify: Any, site: Install
) -> None:
    code, out, _ = verify("acme-formats:eager", "--kind", "weight_format")
    assert code == 1
    lines = out.splitlines()
    at = lines.index("  failed   weights are not read before get")
    assert "4 of 4 tensors were in memory before get() requested them" in lines[at + 1]
    assert ", 1 failed, 0 not run" in lines[-1]


def test_a_plugin_that_kills_the_process_fails_the_statement_it_ran(
    verify: Any, site: Install
) -> None:
    code, out, _ = verify("dying", "--json")
    assert code == 1
    (record,) = json.loads(out)
    assert (record["name"], record["distribution"]) == ("dying", "acme-formats")
    results = [(s["result"], s["reason"]) for s in record["statements"]]
    at = [result for result, _ in results].index("failed")
    assert record["statements"][at]["statement"] == "info matches the tensors that get returns"
    assert results[at] == ("failed", "the process ended during this test: killed by SIGKILL")
    assert {result for result, _ in results[:at]} == {"passed"}
    assert set(results[at + 1 :]) == {("not run", "the process ended before this test")}


def test_statements_are_not_run_for_a_weight_format_that_cannot_write(
    verify: Any, site: Install
) -> None:
    code, out, _ = verify("bare", "-o", "level=2")
    assert code == 3
    lines = out.splitlines()
    assert lines[-1].endswith(" not run: what was not run is not proved")
    assert "  passed   each option has a line of help" in lines
    at = lines.index("  not run  info matches the tensors that get returns")
    assert "implement write_weights" in lines[at + 1]
    # A reason shared by successive statements is printed once.
    assert sum("implement write_weights" in line for line in lines) < 5


def test_the_report_says_when_the_values_of_a_sample_are_not_known(
    verify: Any, site: Install
) -> None:
    code, out, _ = verify("silent")
    assert code == 3
    lines = out.splitlines()
    assert lines[-1].endswith(" not run: what was not run is not proved")
    at = lines.index("  not run  the weights have the values that the sample states")
    assert "the values of the weights were not checked" in lines[at + 1]
    assert "  not run  the samples values would show a mistake" in lines


def test_the_report_of_an_executor_says_how_many_models_ran(verify: Any, site: Install) -> None:
    code, out, _ = verify("biased")
    assert code == 3
    lines = out.splitlines()
    assert ", 0 failed, " in lines[-1]
    assert lines[-1].endswith(" not run, ran 2 of 16 models: what was not run is not proved")
    at = lines.index("  passed   it runs the models that it states")
    assert lines[at + 1].strip().startswith("ran 2 of 16 models; it refused grouped, qk-norm, ")
    assert lines[at + 1].endswith("the first of these with: models without biases are not run")


def test_an_executor_that_refuses_a_model_that_it_states_fails(verify: Any, site: Install) -> None:
    code, out, _ = verify("boasting", "--json")
    assert code == 1
    (record,) = json.loads(out)
    assert record["summary"] == "ran 2 of 16 models"
    failed = {s["statement"]: s["reason"] for s in record["statements"] if s["result"] == "failed"}
    assert list(failed) == ["it runs the models that it states"]
    (reason,) = failed.values()
    assert "runs model 'grouped', but in float32 it refused it: models without biases" in reason


def test_a_loader_is_verified_on_the_given_source(verify: Any, tmp_path: Path) -> None:
    write_hf_directory(make_model("one-kv-head"), tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").unlink()
    code, out, _ = verify("hf-local", "--source", str(tmp_path / "model"), "--json")
    assert code == 1
    (record,) = json.loads(out)
    reasons = {s["reason"] for s in record["statements"] if s["result"] == "failed"}
    assert any("tokenizer.json: no such file" in reason for reason in reasons)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["safetensor"], "did you mean 'safetensors'?"),
        (["bare", "--kind", "loader"], "no loader is named 'bare'"),
        (["bare", "-o", "lvl=2"], "unknown option 'lvl'"),
        (["bare", "-o", "level=10"], "'level' must be <= 9"),
        (["top-p", "--source", "/model"], "--source is for loaders"),
    ],
)
def test_wrong_arguments_are_a_one_line_error(
    verify: Any, site: Install, arguments: list[str], message: str
) -> None:
    code, out, err = verify(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1


def test_without_pytest_the_error_says_what_to_install(
    verify: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tilewright_testing.verify.find_spec", lambda name: None)
    code, out, err = verify("top-p")
    assert (code, out) == (2, "")
    assert "needs pytest" in err
    assert "pip install 'tilewright[testing]'" in err
    assert len(err.splitlines()) == 1


def test_the_test_models_and_the_command_do_not_import_pytest() -> None:
    code = (
        "import sys, tilewright_testing.models, tilewright_testing.verify\n"
        "import tilewright_tools.plugins\n"
        "print(sorted({'pytest', 'hypothesis'} & set(sys.modules)))"
    )
    assert dists.run("-c", code).out.strip() == "[]"


def test_the_package_exports_each_suite_by_name() -> None:
    import tilewright_testing as testing

    for name in testing.__all__:
        assert getattr(testing, name).__name__ == name
    with pytest.raises(AttributeError, match="NoSuite"):
        testing.NoSuite  # noqa: B018 -- the attribute is looked up
