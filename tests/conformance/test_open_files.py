"""How suites find files that a plugin leaves open."""

from pathlib import Path
from shutil import rmtree

from tilewright_testing.files import open_files, still_open


def test_a_file_that_was_open_before_is_not_found_when_its_folder_is_moved_or_deleted(
    tmp_path: Path,
) -> None:
    """As pytest does with the folders of an earlier run, whose files this process may have open."""
    folder = tmp_path / "earlier"
    folder.mkdir()
    with (folder / "journal.txt").open("w"):
        before = open_files()
        folder = folder.rename(tmp_path / "garbage")
        assert still_open(before) == []
        rmtree(folder)
        assert still_open(before) == []


def test_files_that_were_opened_since_are_found(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    other.touch()
    with one.open("w"):
        before = open_files()
        with one.open(), other.open():
            other.unlink()
            assert sorted(still_open(before)) == [str(one), f"{other} (deleted)"]
        assert still_open(before) == []
