"""Commands that need no model import no heavy library and no plugin, so that they start fast.

benchmarks/startup.py measures the times.
"""

import json
from pathlib import Path

import plugin_distributions as dists
import pytest

from tilewright import plugins

HEAVY = {
    "attr",
    "attrs",
    "cattrs",
    "huggingface_hub",
    "importlib.metadata",
    "jinja2",
    "numpy",
    "pluggy",
    "rich",
    "safetensors",
    "tokenizers",
    "tomlkit",
    "tomllib",
    "torch",
    "transformers",
}
TOOLS = {"tilewright_tools", "tilewright_tools.plugins"}
RUN = """
import json, sys
from tilewright.cli import main
code = main(sys.argv[1:])
print(json.dumps(sorted(sys.modules)), file=sys.stderr)
sys.exit(code)
"""


def imported(*arguments: str, site: Path | None = None, **environment: str) -> set[str]:
    done = dists.run(*arguments, site=site, **environment)
    assert done.code == 0, done.err
    return set(json.loads(done.err))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["plugins", "--help"],
        ["plugins", "list"],
        ["plugins", "list", "--json", "--kind", "sampler"],
    ],
    ids=" ".join,
)
def test_a_command_without_a_model_imports_no_library_and_no_plugin(
    tmp_path: Path, arguments: list[str]
) -> None:
    site = dists.install(tmp_path, dists.GOOD, dists.BROKEN_IMPORT, dists.STALE, *dists.RIVALS)
    modules = imported("-c", RUN, *arguments, site=site)
    assert "tilewright.cli" in modules
    assert modules & HEAVY == set()
    targets = {plugin.target.partition(":")[0] for plugin in plugins.installed()}
    assert "tilewright.kv_cache" in targets
    assert modules & targets <= {"tilewright_tools.plugins"}, "the command that is called"
    assert {m for m in modules if m.startswith(("acme", "tilewright_"))} in (set(), TOOLS)


def test_importing_tilewright_imports_no_submodule_and_no_heavy_library() -> None:
    source = "import sys, json, tilewright; print(json.dumps(list(sys.modules)), file=sys.stderr)"
    modules = imported("-c", source)
    assert modules & HEAVY == set()
    assert {m for m in modules if m.startswith("tilewright")} == {"tilewright"}


def test_importing_a_public_name_imports_no_heavy_library() -> None:
    source = (
        "import sys, json; from tilewright import hookimpl, GenerateConfig; "
        "print(json.dumps(list(sys.modules)), file=sys.stderr)"
    )
    modules = imported("-c", source)
    assert modules & {"torch", "rich", "jinja2", "transformers", "tokenizers"} == set()


def test_tomlkit_is_imported_to_write_and_not_to_read(tmp_path: Path) -> None:
    (tmp_path / "models.toml").write_text('[m]\nsource = "x/y"\n')
    run = tmp_path / "run.toml"
    run.write_text('[model]\npath = "m"\n')
    resolve = "import sys; from tilewright.config import resolve; resolve(sys.argv[1])"
    tell = "import json; print(json.dumps(list(sys.modules)), file=sys.stderr)"
    known = {"TILEWRIGHT_MODELS": str(tmp_path / "models.toml")}
    assert "tomlkit" not in imported("-c", f"{resolve}; {tell}", str(run), **known)
    assert "tomlkit" not in imported("-c", RUN, "models", "list", **known)
    assert "tomlkit" in imported("-c", RUN, "run", str(run), "--show", **known)
    assert "tomlkit" in imported("-c", RUN, "models", "remove", "m", **known)


@pytest.mark.parametrize("kind", ["loader", "weight_format"])
def test_showing_a_shipped_loader_does_not_import_torch(kind: str) -> None:
    for plugin in plugins.installed(kind):
        if plugin.distribution == "tilewright":
            arguments = ["plugins", "show", plugin.qualified, "--kind", kind]
            assert "torch" not in imported("-c", RUN, *arguments), plugin
