"""Plugins are found, selected, checked and refused as docs/plugins.md says."""

import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from types import SimpleNamespace
from typing import Any

import plugin_distributions as dists
import pytest
from attrs import field, frozen
from plugin_distributions import Install

from tilewright import hookimpl, plugins
from tilewright.errors import PluginError
from tilewright.types import PluginInfo


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Install]:
    with dists.on_path(tmp_path / "site") as install:
        yield install


def refusal(kind: str, name: str) -> str:
    """The message that refuses a selection, checked to be one line."""
    with pytest.raises(PluginError) as caught:
        plugins.load(plugins.find(kind, name))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def module(source: str, name: str = "acme-x") -> dists.Distribution:
    return dists.sampler(name, "x", source)


# --- finding installed plugins --------------------------------------------------------------------


def as_importlib_sees(folders: list[str]) -> set[tuple[str, ...]]:
    found, seen = set(), set()
    for distribution in importlib.metadata.distributions(path=folders):
        name = plugins.normalized(distribution.name)
        if name in seen or str(distribution._path).endswith(".egg-info"):  # type: ignore[attr-defined]
            continue
        seen.add(name)
        for e in distribution.entry_points:
            # What importlib.metadata parses from value: the target as written, without extras.
            target = f"{e.module}:{e.attr}" if e.attr else e.module
            found.add((e.group, e.name, target, name, distribution.version))
    return found


def as_tilewright_sees(groups: set[str]) -> set[tuple[str, ...]]:
    return {tuple(e[:5]) for e in plugins.entry_points(groups)}


def test_the_entry_points_of_this_environment_match_importlib_metadata() -> None:
    expected = as_importlib_sees(sys.path)
    assert as_tilewright_sees({row[0] for row in expected}) == expected
    assert ("tilewright.samplers", "top-p") in {row[:2] for row in expected}


def test_unusual_entry_points_match_importlib_metadata(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    dists.install(first, dists.GOOD, dists.STALE, *dists.RIVALS)
    dists.install(second, dists.sampler("Acme_One", "shadowed", "", version="9"))
    texts = {
        "empty-1": "",
        "comments-1": "# [tilewright.samplers]\n[tilewright.samplers]\n\n# a = b\n  c = d  \n",
        "spaces-1.0.post1": "[tilewright.samplers]\nname with spaces=mod.ule : at.tr\n",
        "extras-2!1.0": "[tilewright.samplers]\nx = a.b:c [fast, slow]\ny=z [q]\n",
        "other-1": "[console_scripts]\nx = a:b\n[tilewright.executors]\nx = b\n[odd]\nx = c\n",
        "windows-1": "[tilewright.loaders]\r\nx = a.b\r\n",
        "local-1.0+cpu": "[tilewright.loaders]\ncolon:name = a\n",
        "many.dots_and__lines-1": "[tilewright.observers]\nx = y\n",
    }
    for folder, text in texts.items():
        name, _, version = folder.partition("-")
        info = second / f"{folder}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "entry_points.txt").write_bytes(text.encode())
    folders = [str(first), str(second), str(tmp_path / "gone"), str(first)]
    monkeypatch.setattr(sys, "path", folders)
    expected = as_importlib_sees(folders)
    groups = {kind.group for kind in plugins.KINDS.values()} | {"console_scripts", "odd"}
    assert as_tilewright_sees(groups) == expected
    assert len(expected) == 18
    assert "shadowed" not in {row[1] for row in expected}


def test_a_wheel_installed_by_pip_is_listed_like_one_the_tests_unpack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = dists.build_wheel(dists.GOOD, tmp_path)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    offline = ["--no-deps", "--no-index", "--target", tmp_path / "pip"]
    subprocess.run([*pip, "install", *offline, wheel], check=True)
    dists.install(tmp_path / "unpacked", dists.GOOD)
    listed = {}
    for folder in ("pip", "unpacked"):
        monkeypatch.setattr(sys, "path", [str(tmp_path / folder)])
        listed[folder] = [p._replace(where="") for p in plugins.installed()]
    assert listed["pip"] == listed["unpacked"]
    assert [p.name for p in listed["pip"]] == ["bag-random", "bag", "slab", "likeliest", "tally"]


def test_a_wheel_on_the_path_is_found_and_other_files_are_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = dists.build_wheel(dists.sampler("acme-zipped", "zipped", dists.LIKELIEST), tmp_path)
    text = tmp_path / "notes.txt"
    text.write_text("no zip file")
    strange: list[Any] = [tmp_path, b"bytes", str(text), str(tmp_path / "absent"), str(wheel)]
    monkeypatch.setattr(sys, "path", [*strange, *sys.path])
    plugin = plugins.find("sampler", "zipped")
    assert (plugin.where, plugin.version) == (str(wheel), "1.0")
    assert plugins.load(plugin).tilewright_api == 2
    sys.modules.pop("acme_zipped")


def test_remains_of_an_interrupted_uninstall_are_not_listed(site: Install) -> None:
    folder = site(dists.RIVALS[0])
    info = folder / "acme_one-1.5.dist-info"
    info.rename(folder / "~cme_one-1.5.dist-info")
    assert not [p for p in plugins.installed("sampler") if p.name == "rival"]


def test_metadata_with_a_byte_order_mark_is_read(site: Install) -> None:
    listing = site(dists.RIVALS[0]) / "acme_one-1.5.dist-info" / "entry_points.txt"
    before = plugins.installed()
    listing.write_bytes(b"\xef\xbb\xbf" + listing.read_bytes())
    assert plugins.installed() == before


def test_undecodable_metadata_does_not_hide_the_other_plugins(site: Install) -> None:
    folder = site(*dists.RIVALS)
    (folder / "acme_one-1.5.dist-info" / "entry_points.txt").write_bytes(b"\xff[\x00=")
    assert plugins.find("sampler", "rival").distribution == "acme-two"


def test_listing_imports_no_plugin_and_reports_missing_code(site: Install) -> None:
    site(dists.GOOD, dists.BROKEN_IMPORT, dists.STALE)
    installed = {p.name: p for p in plugins.installed()}
    states = {name: plugins.state(p, installed.values())[0] for name, p in installed.items()}
    assert (states["likeliest"], states["broken"], states["stale"]) == ("ok", "ok", "missing")
    assert not {"acme_bag", "acme_broken"} & sys.modules.keys()


def test_a_leftover_folder_without_code_counts_as_missing_code(site: Install) -> None:
    (site(dists.STALE) / "acme_stale_package" / "__pycache__").mkdir(parents=True)
    why = plugins.missing_code(plugins.find("sampler", "stale"))
    assert why is not None
    assert "no module 'acme_stale_package.plugin'" in why


def test_plugins_in_namespace_packages_are_found(site: Install) -> None:
    source = dedent(dists.LIKELIEST)
    dist = dists.Distribution(
        "acme-ns", {"acme_ns/deep/er.py": source}, {"sampler": {"ns": "acme_ns.deep.er"}}
    )
    site(dist)
    plugin = plugins.find("sampler", "ns")
    assert plugins.missing_code(plugin) is None
    plugins.load(plugin)


# --- selection by name ----------------------------------------------------------------------------


def test_a_name_selects_its_plugin_and_imports_no_other(site: Install) -> None:
    site(dists.GOOD, dists.BROKEN_IMPORT, *dists.RIVALS)
    plugin = plugins.find("sampler", "likeliest")
    assert str(plugin) == "sampler 'likeliest' of acme-bag 0.3"
    assert plugins.load(plugin) is sys.modules["acme_bag.likeliest"]
    assert not {"acme_bag.executor", "acme_broken", "acme_one"} & sys.modules.keys()


def test_an_unknown_name_is_an_error_that_lists_installed_and_broken_plugins(
    site: Install,
) -> None:
    site(dists.GOOD, dists.STALE)
    assert refusal("sampler", "likliest") == (
        "no sampler is named 'likliest'; did you mean 'likeliest'? (installed: greedy, likeliest, "
        "top-p; broken: stale (no module 'acme_stale_package': its files are gone, reinstall or "
        "uninstall acme-stale))"
    )
    assert refusal("observer", "x") == "no observer is named 'x' (installed: tally)"


def test_the_error_says_when_no_plugin_of_a_kind_is_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "path", [])
    assert refusal("loader", "hf-local") == "no loader is named 'hf-local' (none is installed)"


def test_plugin_names_are_case_sensitive_and_separate_for_each_kind(site: Install) -> None:
    site(dists.GOOD)
    assert "did you mean 'likeliest'?" in refusal("sampler", "Likeliest")
    assert "installed:" in refusal("executor", "likeliest")


def test_a_name_claimed_by_two_distributions_must_be_qualified(
    site: Install,
) -> None:
    site(*dists.RIVALS)
    assert refusal("sampler", "rival") == (
        "sampler 'rival' is claimed by acme-one 1.5 and by acme-two 2.0; "
        "choose 'acme-one:rival' or 'acme-two:rival'"
    )
    one = plugins.load(plugins.find("sampler", "acme-one:rival"))
    two = plugins.load(plugins.find("sampler", "acme-two:rival"))
    assert (one.__name__, two.__name__) == ("acme_one", "acme_two")


@pytest.mark.parametrize("spelling", ["acme-two", "Acme.Two", "ACME__two"])
def test_distribution_names_are_compared_in_normalized_form(site: Install, spelling: str) -> None:
    site(*dists.RIVALS)
    assert plugins.find("sampler", f"{spelling}:rival").distribution == "acme-two"


def test_an_unknown_distribution_is_an_error_that_lists_the_qualified_names(site: Install) -> None:
    site(*dists.RIVALS)
    message = refusal("sampler", "acme-tow:rival")
    assert "did you mean 'acme-two:rival'?" in message
    assert "tilewright:greedy, acme-one:rival, acme-two:rival, tilewright:top-p" in message


def test_a_name_conflict_says_which_plugin_has_missing_code(site: Install) -> None:
    (site(*dists.RIVALS) / "acme_one.py").unlink()
    assert "acme-one 1.5 (no module 'acme_one': its files are gone" in refusal("sampler", "rival")


def test_a_distribution_that_lists_a_name_with_two_targets_is_refused(site: Install) -> None:
    listing = site(dists.RIVALS[0]) / "acme_one-1.5.dist-info" / "entry_points.txt"
    line = "rival = acme_one\n"
    listing.write_text(listing.read_text() + line)
    assert plugins.find("sampler", "rival").target == "acme_one"
    listing.write_text(listing.read_text() + line.replace("acme_one", "other"))
    assert refusal("sampler", "acme-one:rival") == (
        "sampler 'acme-one:rival' is listed twice by acme-one 1.5 (acme_one and other): "
        "reinstall or uninstall it"
    )


# --- plugins that are refused ---------------------------------------------------------------------

REFUSED = {
    "import": (
        dists.BROKEN_IMPORT,
        "sampler 'broken' of acme-broken 1.0 cannot be imported from acme_broken: "
        "ModuleNotFoundError: No module named 'a_library_that_is_not_installed' "
        "(SITE/acme_broken.py, line 1)",
    ),
    "exit": (
        dists.EXITS,
        "sampler 'exits' of acme-exits 1.0 cannot be imported from acme_exits: SystemExit: 3 "
        "(SITE/acme_exits.py, line 1)",
    ),
    "panic": (
        module("class Panic(BaseException): pass\nraise Panic('two\\nlines')"),
        "sampler 'x' of acme-x 1.0 cannot be imported from acme_x: Panic: two lines "
        "(SITE/acme_x.py, line 2)",
    ),
    "syntax": (
        dists.SYNTAX,
        "sampler 'syntax' of acme-syntax 1.0 cannot be imported from acme_syntax: "
        "SyntaxError: invalid syntax (acme_syntax.py, line 1)",
    ),
    "gone": (
        dists.STALE,
        "sampler 'stale' of acme-stale 1.0 cannot be imported from acme_stale_package.plugin: "
        "no module 'acme_stale_package': its files are gone, reinstall or uninstall acme-stale",
    ),
    "attribute": (
        dists.Distribution("acme-x", {"acme_x.py": ""}, {"sampler": {"x": "acme_x:plugin"}}),
        "sampler 'x' of acme-x 1.0 cannot be imported from acme_x:plugin: "
        "AttributeError: module 'acme_x' has no attribute 'plugin'",
    ),
    "misspelt hook": (
        dists.MISSPELT_HOOK,
        "sampler 'misspelt' of acme-misspelt 1.0 implements 'create_samplr', which is not a hook "
        "of tilewright; did you mean 'create_sampler'?",
    ),
    "wrong argument": (
        dists.WRONG_ARGUMENT,
        "sampler 'argument' of acme-argument 1.0: create_sampler() takes an argument 'optons'; "
        "did you mean 'options'? (the hook has: model_config, options)",
    ),
    "argument with a default": (
        module(dists.LIKELIEST.replace("(options)", "(options=None)")),
        "sampler 'x' of acme-x 1.0: create_sampler() must take 'options' without a default and "
        "not by keyword only, found 'options=None'",
    ),
    "argument by keyword only": (
        module(dists.LIKELIEST.replace("(options)", "(*, options)")),
        "sampler 'x' of acme-x 1.0: create_sampler() must take 'options' without a default and "
        "not by keyword only, found 'options'",
    ),
    "argument of nothing": (
        module(dists.LIKELIEST + "\n    @hookimpl\n    def on_close(**kwargs): pass\n"),
        "sampler 'x' of acme-x 1.0: on_close() takes an argument 'kwargs' (the hook has: none)",
    ),
    "wrapper that is none": (
        module(dists.LIKELIEST.replace("@hookimpl", "@hookimpl(wrapper=True)")),
        "sampler 'x' of acme-x 1.0 does not fit its hook spec: Plugin 'acme_x' for hook "
        "'create_sampler' hookimpl definition: create_sampler(options) Declared as wrapper=True "
        "or hookwrapper=True but function is not a generator function",
    ),
    "newer API": (
        dists.OTHER_API,
        "sampler 'future' of acme-api 1.0 is written for API version 999; this tilewright has "
        "API version 2: "
        "upgrade tilewright",
    ),
    "older API": (
        dists.OLD_API,
        "sampler 'past' of acme-old 1.0 is written for API version 1; this tilewright has "
        "API version 2: install a newer version of it, or change it (create_sampler takes "
        "model_config and options instead of a request, and draws depend on SamplerRow.position; "
        "see docs/writing-plugins.md) and set tilewright_api = 2",
    ),
    "no API": (
        module(dists.LIKELIEST.replace("tilewright_api = 2", "")),
        "sampler 'x' of acme-x 1.0 does not declare its API version: expected "
        "tilewright_api = 2 in module acme_x, found nothing",
    ),
    "API in words": (
        module(dists.LIKELIEST.replace("tilewright_api = 2", "tilewright_api = '1.0'")),
        "sampler 'x' of acme-x 1.0 does not declare its API version: expected "
        "tilewright_api = 2 in module acme_x, found '1.0'",
    ),
    "unmarked hook": (
        dists.UNMARKED,
        "sampler 'unmarked' of acme-unmarked 1.0 does not implement 'create_sampler', which every "
        "sampler must (it has a function of that name: mark it with @hookimpl)",
    ),
    "no hook": (
        module("tilewright_api = 2"),
        "sampler 'x' of acme-x 1.0 does not implement 'create_sampler', which every sampler must",
    ),
    "another kind": (
        dists.Distribution(
            "acme-x", {"acme_x.py": dedent(dists.LIKELIEST)}, {"executor": {"x": "acme_x"}}
        ),
        "executor 'x' of acme-x 1.0 does not implement 'create_executor', which every executor "
        "must",
    ),
    "class": (
        dists.Distribution(
            "acme-x",
            {"acme_x.py": "class Plugin:\n    tilewright_api = 2\n"},
            {"sampler": {"x": "acme_x:Plugin"}},
        ),
        "sampler 'x' of acme-x 1.0 must be a module or an object with hooks, found class Plugin: "
        "plugins are not created by a call, so name a module or an instance in the entry point",
    ),
    "attribute that raises": (
        dists.Distribution(
            "acme-x",
            {
                "acme_x.py": "class X:\n    @property\n    def tilewright_api(self):\n"
                "        raise RuntimeError('no')\nplugin = X()\n"
            },
            {"sampler": {"x": "acme_x:plugin"}},
        ),
        "sampler 'x' of acme-x 1.0 cannot be checked: RuntimeError: no (SITE/acme_x.py, line 4)",
    ),
    "factory": (
        dists.Distribution(
            "acme-x", {"acme_x.py": "def make(): pass\n"}, {"sampler": {"x": "acme_x:make"}}
        ),
        "sampler 'x' of acme-x 1.0 must be a module or an object with hooks, found function make: "
        "plugins are not created by a call, so name a module or an instance in the entry point",
    ),
    "target that is no target": (
        dists.Distribution("acme-x", {}, {"sampler": {"x": ":"}}),
        "sampler 'x' of acme-x 1.0 cannot be imported from :: ValueError: Empty module name",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_an_unusable_plugin_is_refused_with_the_cause(site: Install, what: str) -> None:
    distribution, expected = REFUSED[what]
    folder = site(distribution)
    ((kind, names),) = distribution.plugins.items()
    (name,) = names
    assert refusal(kind, name) == expected.replace("SITE", str(folder))


def test_ctrl_c_during_an_import_is_not_caught(site: Install) -> None:
    site(module("raise KeyboardInterrupt"))
    with pytest.raises(KeyboardInterrupt):
        plugins.load(plugins.find("sampler", "x"))


def test_a_failed_import_is_kept_as_the_cause_of_the_error(site: Install) -> None:
    site(dists.BROKEN_IMPORT)
    with pytest.raises(PluginError) as caught:
        plugins.load(plugins.find("sampler", "broken"))
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


# --- plugins that are accepted --------------------------------------------------------------------


def test_an_object_that_serves_two_kinds_is_registered_once(site: Install) -> None:
    source = """
        from tilewright import hookimpl

        class Both:
            tilewright_api = 2

            @hookimpl
            def create_sampler(self):
                return "sampler"

            @hookimpl
            def create_executor(self, options):
                return "executor"

        class Namespace:
            both = Both()
    """
    targets = {"x": "acme_x : Namespace.both"}
    site(
        dists.Distribution(
            "acme-x", {"acme_x.py": dedent(source)}, {"sampler": targets, "executor": targets}
        )
    )
    manager = plugins.new_manager()
    sampler = plugins.register(manager, plugins.find("sampler", "x"))
    executor = plugins.register(manager, plugins.find("executor", "x"))
    assert sampler is executor
    assert manager.get_name(sampler) == "sampler:acme-x:x"
    given = dict.fromkeys(plugins.known_hooks()["create_sampler"])
    assert plugins.call(sampler, "create_sampler", **given) == "sampler"
    given = dict.fromkeys(plugins.known_hooks()["create_executor"])
    assert plugins.call(sampler, "create_executor", **given) == "executor"


def test_every_required_hook_is_known_and_documented() -> None:
    from tilewright import hookspecs

    known = plugins.known_hooks()
    for kind in plugins.ENGINE_KINDS.values():
        specs = vars(getattr(hookspecs, kind.specs))
        for hook in kind.required:
            assert specs[hook].__doc__
            assert hook in known


@frozen
class Options:
    size: int = field(default=1, metadata={"help": "how big"})


class Plugin:
    tilewright_api = 2

    def __init__(self, says: Any) -> None:
        self.says = says

    @hookimpl
    def plugin_info(self) -> Any:
        return self.says

    @hookimpl
    def create_sampler(self) -> Any:
        return self.says


def test_info_returns_what_the_plugin_reports_about_itself() -> None:
    says = PluginInfo(summary="a plugin", options=Options)
    assert plugins.info(Plugin(says)) is says
    assert plugins.info(Plugin(None)) == PluginInfo(summary="")
    with pytest.raises(PluginError, match="must return a PluginInfo, found 'a plugin'"):
        plugins.info(Plugin("a plugin"))


def test_what_a_sampler_ignores_must_be_settings_of_sampling() -> None:
    plugins.check_ignores("sampler 'x'", PluginInfo(summary="", ignores=("top_k", "seed")))
    with pytest.raises(PluginError) as caught:
        plugins.check_ignores("sampler 'x'", PluginInfo(summary="", ignores=("seed", "top_kk")))
    assert str(caught.value).startswith(
        "sampler 'x': 'ignores' in its plugin_info must name settings of sampling, found 'top_kk'; "
        "did you mean 'top_k'? (settings: temperature, top_k, "
    )


@pytest.mark.parametrize("kind", sorted(plugins.FROM_VERSION_1))
def test_the_error_of_a_plugin_for_version_1_says_what_to_change(kind: str) -> None:
    old = SimpleNamespace(tilewright_api=1)
    with pytest.raises(PluginError, match=r"or change it [(](?!nothing).+; see docs/writing-plug"):
        plugins.check(old, kind, "x")


def test_a_create_hook_that_returns_none_is_an_error_of_the_plugin() -> None:
    with pytest.raises(
        PluginError, match=r"create_sampler\(\) of a Plugin object returned nothing"
    ):
        plugins.call(Plugin(None), "create_sampler", model_config=None, options=None)
    assert plugins.call(Plugin(None), "doctor_checks") is None
