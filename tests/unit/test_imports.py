"""Which module imports which: no circular imports, and a core that imports no plugin."""

import ast
import tomllib
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from checkout import ROOT

BUILD = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
SOURCES = tuple(BUILD["dev-mode-dirs"])


def modules(root: Path, sources: tuple[str, ...]) -> dict[str, Path]:
    """Every module of the source roots by its full name, without the templates."""
    found = {}
    for source in sources:
        for file in sorted((root / source).rglob("*.py")):
            path = file.relative_to(root / source)
            if "templates" not in path.parts:
                name = ".".join(path.with_suffix("").parts)
                found[name.removesuffix(".__init__")] = file
    return found


def imports(name: str, file: Path, known: dict[str, Path]) -> Iterator[str]:
    """The known modules that a module imports, in functions and for type checkers included."""
    package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(file.read_text())):
        wanted: list[str] = []
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            wanted = [
                f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base
                for alias in node.names
            ]
        yield from (module for module in wanted if module in known and module != name)


def graph(root: Path, sources: tuple[str, ...]) -> dict[str, set[str]]:
    known = modules(root, sources)
    return {name: set(imports(name, file, known)) for name, file in known.items()}


@cache
def ours() -> dict[str, set[str]]:
    return graph(ROOT, SOURCES)


@pytest.mark.parametrize("source", SOURCES)
def test_each_source_root_is_read(source):
    assert modules(ROOT, (source,)).keys() <= ours().keys()
    assert modules(ROOT, (source,))


def test_there_are_no_circular_imports():
    try:
        list(TopologicalSorter(ours()).static_order())
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}")


def test_the_core_imports_no_plugin():
    found = {
        f"{name} imports {other}"
        for name, others in ours().items()
        if name.partition(".")[0] == "tilewright"
        for other in others
        if other.partition(".")[0] != "tilewright"
    }
    assert found == set()


def test_what_runs_models_imports_neither_the_kit_nor_the_tools():
    tools = {"tilewright_testing", "tilewright_tools", "tilewright_compare"}
    runs = {name.partition(".")[0] for name in ours()} - tools
    assert {"tilewright", "tilewright_hf", "tilewright_torch", "tilewright_kernels"} <= runs
    found = {
        f"{name} imports {other}"
        for name, others in ours().items()
        if name.partition(".")[0] in runs
        for other in others
        if other.partition(".")[0] in tools
    }
    assert found == set()


@pytest.mark.parametrize(
    "line",
    [
        "from pack import b",
        "from . import b",
        "from .b import thing",
        "def function():\n    import pack.b",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from pack.b import thing",
    ],
)
def test_a_circular_import_is_found_in_every_form_of_import(tmp_path, line):
    package = tmp_path / "src" / "pack"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "a.py").write_text(f"{line}\n")
    (package / "b.py").write_text("import pack.a\n")
    with pytest.raises(CycleError):
        TopologicalSorter(graph(tmp_path, ("src",))).prepare()
