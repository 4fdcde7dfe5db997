"""Users without a home directory, and home directories that cannot be used."""

import os
import re
import stat
from pathlib import Path

import pytest

from tilewright import models, paths
from tilewright.cli import main
from tilewright.errors import ConfigError
from tilewright.settings import DEMO_MODEL
from tilewright_hf import hub

ROOT = Path(paths.__file__).parents[2]


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A user as a container may have one: no HOME and no passwd entry. Returns the folder."""

    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv(models.VARIABLE, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


COMMANDS = [
    ["verify", "{}/x"],
    ["convert", "--executor", "torch", "--out", "{}/x"],
    ["plugins", "new", "sampler", "abc", "--out", "{}/x"],
    ["run", "{}/x.toml"],
    ["generate", "--model", "{}/x", "hi"],
    ["generate", "--loader", "packed", "--model", "{}/x", "hi"],
    ["generate", "--loader", "gguf", "--model", "{}/x", "hi"],
    ["generate", "--prompt-file", "{}/x"],
    ["generate", "--output={}/x", "hi"],
]


@pytest.mark.parametrize("home", ["~", "~nobody-of-this-name"])
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_path_in_an_unknown_home_is_an_error_of_one_line(homeless, capsys, command, home) -> None:
    assert main([word.format(home) for word in command]) == 2
    said = capsys.readouterr().err
    what = "home directory is not known, since HOME is not set" if home == "~" else "no user 'nob"
    assert what in said
    assert said.count("\n") == 1
    assert os.listdir(homeless) == []


def test_a_file_whose_name_begins_with_a_tilde_needs_no_home(homeless, capsys) -> None:
    Path("~notes.txt").write_text("hi", encoding="utf-8")
    assert main(["generate", "--prompt-file", "~notes.txt", "--max-new-tokens", "1"]) == 0


def test_without_a_home_the_users_models_file_counts_as_absent(homeless, capsys) -> None:
    assert models.files() == [models.PROJECT_FILE]
    assert main(["models", "list"]) == 0
    assert "looked in tilewright-models.toml)" in capsys.readouterr().out
    assert main(["generate", "--model", "nosuchname", "hi"]) == 2
    assert "no model directory or file 'nosuchname'" in capsys.readouterr().err
    assert main(["generate", "--max-new-tokens", "1"]) == 0


def test_without_a_home_a_models_file_is_written_where_a_variable_says(
    homeless, capsys, monkeypatch
) -> None:
    add = ["models", "add", "mine", "--source", str(DEMO_MODEL)]
    assert main(add) == 2
    said = capsys.readouterr().err
    assert all(name in said for name in ("HOME", "XDG_CONFIG_HOME", models.VARIABLE, "--project"))
    monkeypatch.setenv(models.VARIABLE, str(homeless / "mine.toml"))
    assert main(add) == 0
    assert main(["generate", "--model", "mine", "--max-new-tokens", "1"]) == 0


@pytest.mark.parametrize("home", ["a file", "/proc/none"])
def test_a_home_that_cannot_be_written_is_read_as_empty(
    homeless, capsys, monkeypatch, home
) -> None:
    Path("a file").touch()
    monkeypatch.setenv("HOME", str(Path(home).absolute()))
    assert main(["models", "list"]) == 0
    assert main(["models", "add", "mine", "--source", str(DEMO_MODEL)]) == 2
    assert "set HOME or XDG_CONFIG_HOME" in capsys.readouterr().err


@pytest.mark.parametrize("home", ["a file", "read-only"])
def test_caches_are_not_in_a_home_that_cannot_be_written(homeless, monkeypatch, home) -> None:
    Path("a file").touch()
    Path("read-only").mkdir()
    monkeypatch.setenv("HOME", str(homeless / home))
    if home == "read-only":  # root may write anywhere
        monkeypatch.setattr("os.access", lambda path, mode: False)
    folder, note = paths.cache_folder("x")
    assert folder == homeless / f"tilewright-{os.getuid()}" / "x"
    assert note == f"{homeless / home}/.cache/x cannot be written: {folder} is used instead"


def test_without_a_home_caches_are_in_a_temporary_folder_of_this_user(homeless, monkeypatch):
    folder, note = paths.cache_folder("tilewright", "pypto")
    assert folder == homeless / f"tilewright-{os.getuid()}" / "tilewright" / "pypto"
    assert note == f"the home directory is not known: {folder} is used instead"
    assert stat.S_IMODE(folder.parents[1].stat().st_mode) == 0o700
    assert paths.cache_folder("tilewright", "pypto")[0] == folder
    folder.parents[1].chmod(0o777)  # as another user might have made it
    assert paths.cache_folder("tilewright", "pypto")[0].parents[1] != folder.parents[1]
    monkeypatch.setenv("HOME", str(homeless / "new"))
    assert paths.cache_folder("x") == (homeless / "new" / ".cache" / "x", "")


def test_without_a_home_models_of_the_hub_are_not_kept_in_a_folder_called_tilde(
    homeless, monkeypatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "~/.cache/huggingface/hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["generate", "--model", "org/name", "hi"]) == 2
    assert hub.cache() == homeless / f"tilewright-{os.getuid()}" / "huggingface" / "hub"
    assert not Path("~").exists()


def test_a_path_of_another_folder_is_relative_to_it(homeless, monkeypatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert paths.path_of("~/x", homeless) == Path("/home/me/x")
    assert paths.path_of("x", homeless) == homeless / "x"
    with pytest.raises(ConfigError, match=re.escape("'~nobody-of-this-name/x': there is no user")):
        paths.path_of("~nobody-of-this-name/x", homeless)


def test_every_home_directory_is_found_in_one_module() -> None:
    """Path.home and Path.expanduser raise where there is none."""
    other = re.compile(r"\.home\(\)|(?<!os\.path)\.expanduser\(")
    folders = [ROOT / name for name in ("core", "plugins", "kernels")]
    sources = [file for folder in folders for file in folder.rglob("*.py")]
    assert [str(f) for f in sources if other.search(f.read_text(encoding="utf-8"))] == []
