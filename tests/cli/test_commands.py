"""Commands are plugins: listed without an import, and imported only when called."""

import json
from pathlib import Path

import plugin_distributions as dists
import pytest

SHOUT = '''
    # A comment before it.
    """Print a word in capitals."""

    from tilewright.errors import ConfigError

    tilewright_api = 2

    def configure(parser):
        parser.add_argument("word", help="the word to print")

    def run(args):
        if not args.word.isalpha():
            raise ConfigError(f"expected letters, found {args.word!r}")
        print(args.word.upper())
        return 3
'''
CASES = {
    "shout": SHOUT,
    "broken": '"""Never runs."""\nimport a_library_that_is_not_installed\n',
    "wordless": "tilewright_api = 2\n",
    "doctor": SHOUT,
    "half": '"""Use 50% (of it)s."""\n' + dists.dedent(SHOUT).partition("capitals.")[2][4:],
    "stale": None,
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with commands of another distribution; one has the name of a shipped command."""
    made = dists.Distribution(
        name="acme-commands",
        files={f"acme_{n}.py": dists.dedent(s) for n, s in CASES.items() if s is not None},
        plugins={"command": {name: f"acme_{name}" for name in CASES}},
    )
    return dists.install(tmp_path_factory.mktemp("site"), made)


def tilewright(site: Path, *arguments: str) -> dists.Completed:
    return dists.run("-m", "tilewright", *arguments, site=site)


def test_a_command_of_another_distribution_runs_like_a_shipped_one(site: Path) -> None:
    done = tilewright(site, "shout", "hello")
    assert (done.code, done.out, done.err) == (3, "HELLO\n", "")


def test_an_error_of_an_installed_command_is_one_line_with_exit_code_2(site: Path) -> None:
    done = tilewright(site, "shout", "h3")
    assert (done.code, done.out) == (2, "")
    assert done.err == "tilewright: error: expected letters, found 'h3'\n"


def test_an_unknown_option_of_an_installed_command_is_refused(site: Path) -> None:
    done = tilewright(site, "shout", "hello", "--loud")
    assert (done.code, done.out) == (2, "")
    assert "unknown option '--loud'" in done.err


def test_the_overview_lists_all_commands_and_imports_none(site: Path) -> None:
    code = (
        "import sys; from tilewright.cli import main; main(['--help']);"
        "print([m for m in sys.modules if m.startswith(('acme', 'tilewright_'))])"
    )
    done = dists.run("-c", code, site=site)
    assert done.code == 0, done.err
    *overview, imported = done.out.splitlines()
    listed = dict([*line.split(maxsplit=1), ""][:2] for line in overview if line[:4] == "    ")
    assert listed["shout"] == "Print a word in capitals"
    assert listed["broken"] == "Never runs"
    assert listed["half"] == "Use 50% (of it)s"
    assert listed["wordless"] == listed["stale"] == ""
    # Both distributions claim the unqualified name.
    assert {"acme-commands:doctor", "tilewright:doctor"} <= set(listed)
    assert "doctor" not in listed
    assert imported == "[]"


def test_a_command_name_claimed_by_two_distributions_must_be_qualified(site: Path) -> None:
    done = tilewright(site, "doctor", "hello")
    assert done.code == 2
    assert "choose 'acme-commands:doctor' or 'tilewright:doctor'" in done.err
    assert tilewright(site, "acme-commands:doctor", "hello").out == "HELLO\n"
    assert (
        "usage: tilewright tilewright:doctor" in tilewright(site, "tilewright:doctor", "--help").out
    )


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("broken", "cannot be imported from acme_broken: ModuleNotFoundError"),
        ("stale", "no module 'acme_stale': its files are gone"),
        ("wordless", "must have functions configure and run"),
    ],
)
def test_a_broken_command_is_an_error_with_the_cause_and_other_commands_work(
    site: Path, name: str, why: str
) -> None:
    done = tilewright(site, name)
    assert (done.code, done.out) == (2, "")
    assert f"command '{name}' of acme-commands 1.0" in done.err
    assert why in done.err
    assert done.err.count("\n") == 1
    assert tilewright(site, "shout", "hello").out == "HELLO\n"


def test_plugins_list_and_check_include_commands(site: Path) -> None:
    listed = json.loads(tilewright(site, "plugins", "list", "--kind", "command", "--json").out)
    states = {p["name"]: p["state"] for p in listed if p["distribution"] == "acme-commands"}
    assert states == {
        "half": "ok",
        "shout": "ok",
        "broken": "ok",
        "wordless": "ok",
        "doctor": "clash",
        "stale": "missing",
    }
    checked = json.loads(tilewright(site, "plugins", "check", "--json").out)
    states = {p["name"]: p["state"] for p in checked if p["distribution"] == "acme-commands"}
    assert states == {
        "half": "ok",
        "shout": "ok",
        "broken": "broken",
        "wordless": "broken",
        "doctor": "clash",
        "stale": "broken",
    }


def test_plugins_show_prints_the_summary_of_a_command(site: Path) -> None:
    done = tilewright(site, "plugins", "show", "shout")
    assert done.code == 0, done.err
    assert "  Print a word in capitals\n" in done.out
