"""Which loader takes a model when none is named."""

import re
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import plugin_distributions as dists
import pytest
from checkout import DATA
from plugin_distributions import Distribution, Install

from tilewright import LLMEngine
from tilewright.config import resolve
from tilewright.errors import ConfigError, ModelError, PluginError
from tilewright.settings import DEMO_MODEL

CLAIMS = """
    from tilewright import hookimpl
    from tilewright.errors import ModelError

    tilewright_api = 2

    @hookimpl
    def can_load(source):
        return source.endswith(".acme")

    @hookimpl
    def load_model(source, options):
        raise ModelError(f"acme was asked for {source} with {options}")
"""


def loader(name: str, source: str) -> Distribution:
    module = name.replace("-", "_")
    return Distribution(name, {f"{module}.py": dedent(source)}, {"loader": {name: module}})


ACME = loader("acme-loader", CLAIMS)
RIVAL = loader("rival-loader", CLAIMS)
BROKEN = loader("broken-loader", "import a_library_that_is_not_installed")
RAISING = loader("raising-loader", CLAIMS.replace('source.endswith(".acme")', "source / 0"))
EXITING = loader("exiting-loader", CLAIMS.replace("return source", "raise SystemExit(3)\n"))


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Install]:
    with dists.on_path(tmp_path / "site") as install:
        yield install


def refusal(source: str | Path) -> str:
    with LLMEngine.from_plugins() as engine, pytest.raises(ModelError) as raised:
        engine.load(source)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_the_loader_that_claims_a_source_loads_it(site: Install) -> None:
    site(ACME, BROKEN, RAISING, EXITING)
    assert refusal("x.acme") == "acme was asked for x.acme with None"
    with LLMEngine.from_plugins() as engine:
        engine.load(DEMO_MODEL).weights.close()


def test_two_loaders_that_claim_a_source_are_an_error_unless_one_is_named(site: Install) -> None:
    site(ACME, RIVAL)
    assert refusal("x.acme") == (
        "'x.acme' is claimed by the loaders acme-loader:acme-loader and rival-loader:rival-loader; "
        "select one with --loader (in Python: loader=...)"
    )
    with (
        LLMEngine.from_plugins(loader="rival-loader:rival-loader") as engine,
        pytest.raises(ModelError, match="acme was asked"),
    ):
        engine.load("x.acme")


def test_a_loader_name_shared_by_two_distributions_does_not_prevent_a_claim(site: Install) -> None:
    site(ACME, Distribution("other", {"other_x.py": dedent(CLAIMS.replace(".acme", ".other"))},
                            {"loader": {"acme-loader": "other_x"}}))  # fmt: skip
    assert refusal("x.other").startswith("acme was asked for x.other")


def test_a_source_that_no_loader_claims_is_an_error_that_lists_the_loaders_that_failed(
    site: Install, tmp_path: Path
) -> None:
    site(ACME, BROKEN, RAISING)
    empty = tmp_path / "empty"
    empty.mkdir()
    said = refusal(empty)
    assert said.startswith(
        f"no loader recognises {str(empty)!r}, an empty directory; select a loader"
    )
    assert re.search(r"\(loaders asked: acme-loader, .*hf-local.*\)", said)
    assert "; not asked: loader 'broken-loader' of broken-loader 1.0 cannot be imported" in said
    assert "can_load() failed: TypeError" in said


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("no such model", "no model directory or file 'no such model': No such file or directory"),
        ("/dev/null/x", "no model directory or file '/dev/null/x': Not a directory"),
        ("a\0b", "no model directory or file 'a\\x00b': embedded null byte"),
        (__file__, f"no loader recognises {__file__!r}, a file; select a loader"),
        (str(DATA), "a directory with '"),
        ("", "expected a model's directory, file, id or name, found an empty text"),
    ],
)
def test_the_error_for_an_unclaimed_source_describes_what_was_found(
    source: str, found: str
) -> None:
    assert found in refusal(source)


@pytest.mark.parametrize(
    ("does", "why"),
    [
        ("raise RuntimeError('no\\nluck')", "load_model() failed: RuntimeError: no luck"),
        ("return 5", "load_model() must return a LoadedModel, found 5"),
    ],
)
def test_a_loader_that_breaks_its_contract_is_a_one_line_error(
    does: str, why: str, site: Install
) -> None:
    broken = CLAIMS[: CLAIMS.index("raise ModelError")] + does + "\n"
    site(loader("breaking-loader", broken))
    with LLMEngine.from_plugins() as engine, pytest.raises(PluginError) as raised:
        engine.load("x.acme")
    assert f"loader 'breaking-loader' of breaking-loader 1.0: {why}" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_named_loader_is_the_only_one_imported(tmp_path: Path) -> None:
    site = dists.install(tmp_path, ACME, BROKEN)
    source = (
        "import sys; from tilewright import LLMEngine\n"
        "e = LLMEngine.from_plugins(loader='acme-loader')\n"
        "try: e.load('x.acme')\n"
        "except Exception as error: print(error)\n"
        "print([m for m in sys.modules if m.startswith('tilewright_hf')])"
    )
    done = dists.run("-c", source, site=site)
    assert done.out.splitlines() == ["acme was asked for x.acme with None", "[]"]


def test_probing_imports_no_library_of_another_loader() -> None:
    source = (
        "import sys; from tilewright import LLMEngine; from tilewright.settings import DEMO_MODEL\n"
        "LLMEngine.from_plugins(sampler='greedy').load(DEMO_MODEL).weights.close()\n"
        "print({'gguf', 'huggingface_hub', 'transformers', 'rich'} & set(sys.modules))"
    )
    assert dists.run("-c", source).out == "set()\n"


def test_loader_options_are_checked_by_the_selected_loader() -> None:
    with LLMEngine.from_plugins(options={"loader": {"speed": 3}}) as engine:
        with pytest.raises(ConfigError, match="'hf-local' has no options, found 'speed'"):
            engine.load(DEMO_MODEL)
        with pytest.raises(ConfigError, match="'hf-local' has no options"):
            engine.init_model("m", DEMO_MODEL)
    done = dists.run("-m", "tilewright", "generate", "-o", "loader.speed=3", "hi")
    assert done.code == 2
    assert done.err.startswith("tilewright: error: -o loader.speed: loader 'hf-local' has no opt")


def test_an_engine_without_a_named_loader_can_be_recreated_from_its_selection() -> None:
    with LLMEngine.from_plugins() as engine:
        selection = engine.selection
    assert selection["loader"] is None
    with LLMEngine.from_plugins(**selection) as again:
        again.load(DEMO_MODEL).weights.close()
        assert again.selection == selection


def test_the_loader_can_be_set_to_none_in_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('[plugins]\nloader = "hf-local"\n')
    assert resolve(file, environ={}).config.plugins.loader == "hf-local"
    given = resolve(file, environ={"TILEWRIGHT_PLUGINS_LOADER": "none"})
    assert given.config.plugins.loader is None
    file.write_text('[plugins]\nloader = "hf-lokal"\n')
    with pytest.raises(PluginError, match=r"run\.toml:2: no loader is named"):
        resolve(file, environ={})
