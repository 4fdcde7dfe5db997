"""``tilewright plugins``: list, show and check."""

import importlib.metadata
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import plugin_distributions as dists
import pytest
from attrs import evolve
from plugin_distributions import Install


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Install]:
    with dists.on_path(tmp_path / "site") as install:
        yield install


def described(**parts: str) -> dists.Distribution:
    """A sampler that describes itself with the given source."""
    source = dists.LIKELIEST + "".join(parts.values())
    return dists.sampler("acme-x", "x", source)


# --- list -----------------------------------------------------------------------------------------


def test_list_prints_name_kind_distribution_state_and_place(
    tilewright: Any, site: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)  # no limit on the width
    folder = site(dists.GOOD, dists.STALE, *dists.RIVALS)
    code, out, err = tilewright("plugins", "list")
    assert (code, err) == (0, "")
    table, *problems = out.split("\n\n")
    header, *rows = table.splitlines()
    starts = [header.index(title) for title in ("KIND", "DISTRIBUTION", "STATE", "WHERE")]
    cells = [
        [row[a:b].strip() for a, b in zip([0, *starts], [*starts, None], strict=True)]
        for row in rows
    ]
    assert ["tally", "observer", "acme-bag 0.3", "ok", str(folder)] in cells
    assert ["stale", "sampler", "acme-stale 1.0", "missing", str(folder)] in cells
    assert ["rival", "sampler", "acme-two 2.0", "clash", str(folder)] in cells
    ours = importlib.metadata.version("tilewright")
    assert ["top-p", "sampler", f"tilewright {ours}", "ok"] in [row[:4] for row in cells]
    assert {
        "clash: sampler 'rival' is claimed by acme-one 1.5 and by acme-two 2.0; "
        "choose 'acme-one:rival' or 'acme-two:rival'",
        "missing: sampler 'stale' of acme-stale 1.0: no module 'acme_stale_package': its files "
        "are gone, reinstall or uninstall acme-stale",
    } <= {problem.strip() for problem in problems}


def test_list_as_json_can_be_limited_to_one_kind(tilewright: Any, site: Install) -> None:
    folder = site(dists.GOOD)
    code, out, _ = tilewright("plugins", "list", "--kind", "executor", "--json")
    assert code == 0
    records = json.loads(out)
    assert {record["kind"] for record in records} == {"executor"}
    assert {
        "name": "bag",
        "kind": "executor",
        "distribution": "acme-bag",
        "version": "0.3",
        "target": "acme_bag.executor:plugin",
        "where": str(folder),
        "state": "ok",
        "problem": None,
    } in records


def test_list_as_json_includes_the_problem_of_a_plugin(tilewright: Any, site: Install) -> None:
    site(dists.STALE)
    _, out, _ = tilewright("plugins", "list", "--json")
    (stale,) = [record for record in json.loads(out) if record["name"] == "stale"]
    assert stale["state"] == "missing"
    assert "its files are gone" in stale["problem"]


def test_list_on_a_terminal_prints_each_place_once(
    tilewright: Any, site: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = site(dists.GOOD)
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = tilewright("plugins", "list")
    rows = [line.split() for line in out.splitlines()]
    assert rows[0] == ["NAME", "KIND", "DISTRIBUTION", "STATE"]
    assert ["tally", "observer", "acme-bag", "0.3", "ok"] in rows
    assert out.count(f"acme-bag 0.3 is in {folder}\n") == 1


def test_list_on_a_narrow_terminal_prints_one_block_per_plugin(
    tilewright: Any, site: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = site(dists.GOOD)
    monkeypatch.setenv("COLUMNS", "40")
    _, out, _ = tilewright("plugins", "list")
    block = ["tally", "  kind: observer", "  distribution: acme-bag 0.3", "  state: ok"]
    assert "\n".join(block) in out
    blocks, places, *_ = out.split("\n\n")
    assert all(len(line) <= 40 for line in blocks.splitlines())
    assert f"acme-bag 0.3 is in {folder}\n" in places


def test_list_includes_plugins_on_the_path_of_a_child_process(tmp_path: Any) -> None:
    site = dists.install(tmp_path, dists.GOOD)
    done = dists.run("-m", "tilewright", "plugins", "list", "--json", site=site)
    assert (done.code, done.err) == (0, "")
    assert "tally" in {record["name"] for record in json.loads(done.out)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lst"], "'lst'; did you mean 'list'?"),
        ([], "required: ACTION"),
        (["list", "--kind", "samplers"], "'samplers'; did you mean 'sampler'?"),
        (["list", "--jsn"], "'--jsn'; did you mean '--json'?"),
        (["show"], "required: NAME"),
        (["show", "likliest"], "no plugin is named 'likliest'; did you mean 'likeliest'?"),
        (["show", "tally", "--kind", "sampler"], "no sampler is named 'tally' (installed:"),
        (["show", "rival"], "choose 'acme-one:rival' or 'acme-two:rival'"),
        (["show", "broken"], "No module named 'a_library_that_is_not_installed'"),
        (["show", "misspelt"], "did you mean 'create_sampler'?"),
    ],
)
def test_wrong_usage_is_a_one_line_error(
    tilewright: Any, site: Install, arguments: list[str], message: str
) -> None:
    site(dists.GOOD, dists.BROKEN_IMPORT, dists.MISSPELT_HOOK, *dists.RIVALS)
    code, out, err = tilewright("plugins", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("tilewright: error: ")
    assert err.count("\n") == 1
    assert message in err


# --- show -----------------------------------------------------------------------------------------

DESCRIPTION = """
    from pathlib import Path
    from typing import Literal, Optional

    import attrs

    from tilewright.types import PluginInfo

    @attrs.frozen
    class Options:
        path: Path
        mode: Literal["fast", "exact"] = attrs.field(default="fast", metadata={"help": "how"})
        count: "int | None" = None
        flag: bool = True
        one: int = 1
        names: tuple[str, ...] = ()
        made: list[int] = attrs.Factory(list)

    @hookimpl
    def plugin_info():
        return PluginInfo(summary="does it", options=Options, limits={"batch": "up to 8"})
"""


def test_show_prints_options_hooks_and_limits(tilewright: Any, site: Install) -> None:
    folder = site(described(more=DESCRIPTION))
    code, out, err = tilewright("plugins", "show", "x")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "sampler 'x' of acme-x 1.0",
        "  does it",
        f"  acme_x, installed in {folder}",
        "options:",
        "  path: a path (required)",
        "  mode: fast or exact (default fast)",
        "      how",
        "  count: an integer or none (default none)",
        "  flag: true or false (default true)",
        "  one: an integer (default 1)",
        "  names: a list of strings (default ())",
        "  made: a list of integers (default [])",
        "hooks: plugin_info, create_sampler",
        "limits:",
        "  batch: up to 8",
    ]


def test_show_prints_the_same_as_json(tilewright: Any, site: Install) -> None:
    site(described(more=DESCRIPTION))
    _, out, _ = tilewright("plugins", "show", "acme-x:x", "--json")
    (shown,) = json.loads(out)
    assert (shown["name"], shown["summary"]) == ("x", "does it")
    assert shown["hooks"] == ["plugin_info", "create_sampler"]
    assert shown["limits"] == {"batch": "up to 8"}
    assert shown["options"][:3] == [
        {"name": "path", "type": "a path", "required": True, "default": None, "help": ""},
        {
            "name": "mode",
            "type": "fast or exact",
            "required": False,
            "default": "fast",
            "help": "how",
        },
        {
            "name": "count",
            "type": "an integer or none",
            "required": False,
            "default": None,
            "help": "",
        },
    ]


def test_show_works_for_a_plugin_without_plugin_info(tilewright: Any, site: Install) -> None:
    site(dists.GOOD)
    code, out, _ = tilewright("plugins", "show", "likeliest")
    assert code == 0
    assert out.splitlines()[-3:] == [
        "options: none",
        "hooks: create_sampler",
        "limits: none stated",
    ]


DRAWS = """
    from tilewright.types import PluginInfo

    @hookimpl
    def plugin_info():
        return PluginInfo(
            summary="draws", ignores=("top_k", "seed"), distribution="all tokens alike"
        )
"""


def test_show_prints_what_a_sampler_ignores_and_draws_from(tilewright: Any, site: Install) -> None:
    site(described(more=DRAWS))
    _, out, _ = tilewright("plugins", "show", "x")
    assert out.splitlines()[-3:] == [
        "limits: none stated",
        "ignores: top_k, seed",
        "distribution: all tokens alike",
    ]
    _, out, _ = tilewright("plugins", "show", "x", "--json")
    (shown,) = json.loads(out)
    assert (shown["ignores"], shown["distribution"]) == (["top_k", "seed"], "all tokens alike")


TWINS = {"sampler": "likeliest", "observer": "tally"}


def test_show_prints_both_plugins_of_a_name_unless_kind_is_given(
    tilewright: Any, site: Install
) -> None:
    targets = {kind: {"twin": f"acme_bag.{m}"} for kind, m in TWINS.items()}
    site(evolve(dists.GOOD, plugins=targets))
    _, out, _ = tilewright("plugins", "show", "twin", "--json")
    assert [shown["kind"] for shown in json.loads(out)] == ["sampler", "observer"]
    _, out, _ = tilewright("plugins", "show", "twin", "--kind", "observer", "--json")
    assert [shown["kind"] for shown in json.loads(out)] == ["observer"]
    _, out, _ = tilewright("plugins", "show", "twin")
    assert "\n\nobserver 'twin' of acme-bag 0.3\n" in out


def test_output_printed_by_a_plugin_is_not_in_the_json(tilewright: Any, site: Install) -> None:
    site(described(more="\n    print('hello')\n"))
    _, out, err = tilewright("plugins", "show", "x", "--json")
    assert len(json.loads(out)) == 1
    assert err == "hello\n"


# --- check ----------------------------------------------------------------------------------------

BAD_INFO = """
    @hookimpl
    def plugin_info():
        raise RuntimeError("no idea")
"""
BAD_OPTIONS = """
    from tilewright.types import PluginInfo

    @hookimpl
    def plugin_info():
        return PluginInfo(summary="x", options=dict)
"""
BAD_TYPES = """
    import attrs
    from tilewright.types import PluginInfo

    @attrs.frozen
    class Options:
        path: "Nowhere"

    @hookimpl
    def plugin_info():
        return PluginInfo(summary="x", options=Options)
"""
BAD_IGNORES = """
    from tilewright.types import PluginInfo

    @hookimpl
    def plugin_info():
        return PluginInfo(summary="x", ignores=("top_q",))
"""


def test_check_reports_each_broken_plugin_and_fails(tilewright: Any, site: Install) -> None:
    broken = (
        dists.BROKEN_IMPORT,
        dists.EXITS,
        dists.MISSPELT_HOOK,
        dists.WRONG_ARGUMENT,
        dists.OTHER_API,
        dists.STALE,
    )
    site(dists.GOOD, *broken, *dists.RIVALS)
    code, out, err = tilewright("plugins", "check", "--json")
    assert (code, err) == (1, "")
    found = {(r["distribution"], r["name"]): r for r in json.loads(out)}
    for distribution in broken:
        ((name, _),) = distribution.plugins["sampler"].items()
        record = found.pop((distribution.name, name))
        assert record["state"] == "broken"
        assert f"of {distribution.name} 1.0" in record["problem"]
    assert {r["state"] for r in found.values() if r["name"] == "rival"} == {"clash"}
    good = [r for r in found.values() if r["distribution"] == "acme-bag"]
    assert len(good) == 5
    assert all(r["state"] == "ok" and r["problem"] is None and r["seconds"] > 0 for r in good)

    code, out, _ = tilewright("plugins", "check")
    assert code == 1
    assert "broken: sampler 'future' of acme-api 1.0 is written for API version 999" in out
    assert "clash: sampler 'rival' is claimed by" in out


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        (BAD_INFO, "plugin_info() failed: RuntimeError: no idea"),
        (BAD_OPTIONS, "must be an attrs class, found <class 'dict'>"),
        (BAD_TYPES, "a type in Options cannot be resolved: name 'Nowhere' is not defined"),
        (BAD_IGNORES, "must name settings of sampling, found 'top_q'; did you mean 'top_p'?"),
    ],
)
def test_check_reports_a_wrong_plugin_info(
    tilewright: Any, site: Install, source: str, problem: str
) -> None:
    site(described(more=source))
    code, out, _ = tilewright("plugins", "check", "--json")
    assert code == 1
    (record,) = [r for r in json.loads(out) if r["distribution"] == "acme-x"]
    assert record["state"] == "broken"
    assert problem in record["problem"]


def test_check_reports_a_misspelt_entry_point_group(tilewright: Any, site: Install) -> None:
    folder = site(dists.RIVALS[0])
    file = folder / "acme_one-1.5.dist-info" / "entry_points.txt"
    file.write_text(file.read_text().replace("[tilewright.samplers]", "[tilewright.sampler]"))
    code, out, _ = tilewright("plugins", "check", "--json")
    assert code == 1
    (record,) = [r for r in json.loads(out) if r["distribution"] == "acme-one"]
    assert (record["kind"], record["state"]) == ("tilewright.sampler", "broken")
    assert "group 'tilewright.sampler', which does not exist; did you mean" in record["problem"]
    code, out, _ = tilewright("plugins", "check")
    assert code == 1
    assert "broken: acme-one 1.5 has 'rival' in the entry-point group" in out


UNMARKED = """
    from tilewright import hookimpl

    tilewright_api = 2

    class Watch:
        @hookimpl
        def on_close(self):
            pass

        def on_step(self, event):
            pass

    @hookimpl
    def create_observer(options):
        return Watch()
"""


def test_check_reports_an_event_that_is_not_marked(tilewright: Any, site: Install) -> None:
    files = {"acme_watch.py": dists.dedent(UNMARKED)}
    site(dists.Distribution("acme-watch", files, {"observer": {"watch": "acme_watch"}}))
    code, out, _ = tilewright("plugins", "check", "--json")
    assert code == 1
    (record,) = [r for r in json.loads(out) if r["distribution"] == "acme-watch"]
    assert record["state"] == "broken"
    assert record["problem"].endswith(
        "Watch.on_step would never be called: mark each with @hookimpl"
    )


def test_the_shipped_plugins_are_in_order(tilewright: Any) -> None:
    _, out, _ = tilewright("plugins", "check", "--json")
    ours = [r for r in json.loads(out) if r["distribution"] == "tilewright"]
    assert {"hf-local", "torch", "paged", "top-p"} <= {r["name"] for r in ours}
    assert [r["problem"] for r in ours if r["state"] != "ok"] == []
