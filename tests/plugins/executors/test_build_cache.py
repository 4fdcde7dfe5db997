"""The build cache: kernels are compiled once and loaded again, by one process or several."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tilewright.errors import ExecutorError, PluginWarning
from tilewright_pypto.build_cache import STAMP, cached, default_folder

KEY = {"source": "def kernel(): ...", "platform": "a2a3sim"}


class Compiler:
    """Writes a file to the given folder and reads it again; records the messages."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def compile(self, home: Path) -> str:
        assert not list(home.iterdir())
        (home / "kernel.bin").write_text("compiled")
        return "compiled"

    def reload(self, home: Path) -> str:
        return (home / "kernel.bin").read_text() + " before"

    def cached(self, folder: Path, key: dict[str, str] = KEY) -> tuple[str, float | None]:
        return cached(folder, "kernel", key, self.compile, self.reload, self.said.append)


@pytest.fixture
def compiler() -> Compiler:
    return Compiler()


def home_in(folder: Path) -> Path:
    (home,) = (p for p in folder.iterdir() if p.is_dir())
    return home


def test_a_kernel_compiled_before_is_loaded_from_the_cache(tmp_path, compiler):
    assert compiler.cached(tmp_path) == ("compiled", None)
    made, seconds = compiler.cached(tmp_path)
    assert made == "compiled before"
    assert seconds is not None
    assert compiler.said == ["compiling kernel", "loading kernel"]


def test_the_stamp_records_the_key_and_the_time(tmp_path, compiler):
    compiler.cached(tmp_path)
    stamp = json.loads((home_in(tmp_path) / STAMP).read_text())
    assert stamp["key"] == KEY
    assert stamp["seconds"] >= 0
    assert stamp["date"].endswith("+00:00")


@pytest.mark.parametrize("part", KEY)
def test_a_change_in_any_part_of_the_key_compiles_again(tmp_path, compiler, part):
    compiler.cached(tmp_path)
    assert compiler.cached(tmp_path, KEY | {part: "another"}) == ("compiled", None)
    assert compiler.cached(tmp_path)[0] == "compiled before"


def test_the_order_of_the_key_does_not_matter(tmp_path, compiler):
    compiler.cached(tmp_path)
    assert compiler.cached(tmp_path, dict(reversed(KEY.items())))[0] == "compiled before"


def test_a_folder_that_was_moved_is_not_used(tmp_path, compiler):
    # The files that PyPTO writes contain absolute paths.
    (tmp_path / "here").mkdir()
    compiler.cached(tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    assert compiler.cached(tmp_path / "there") == ("compiled", None)


@pytest.mark.parametrize("stamp", [None, "", "{}", "[]", '{"seconds": "x"}'])
def test_a_folder_without_a_complete_stamp_is_compiled_again(tmp_path, compiler, stamp):
    compiler.cached(tmp_path)
    home = home_in(tmp_path)
    (home / "left behind").touch()
    (home / STAMP).unlink() if stamp is None else (home / STAMP).write_text(stamp)
    assert compiler.cached(tmp_path) == ("compiled", None)
    assert not (home / "left behind").exists()


def test_a_folder_that_does_not_load_is_compiled_again(tmp_path, compiler):
    compiler.cached(tmp_path)
    (home_in(tmp_path) / "kernel.bin").unlink()
    assert compiler.cached(tmp_path) == ("compiled", None)
    assert compiler.said[1:] == ["loading kernel", "kernel was damaged", "compiling kernel"]
    assert compiler.cached(tmp_path)[0] == "compiled before"


def failing(error: BaseException):
    def compile(home: Path) -> str:
        (home / "half").touch()
        raise error

    return compile


def test_a_failed_build_keeps_its_files_and_is_compiled_again(tmp_path, compiler, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(compiler, "compile", failing(ExecutorError("no such operator")))
        with pytest.raises(ExecutorError, match="no such operator"):
            compiler.cached(tmp_path)
    assert [f.name for f in home_in(tmp_path).iterdir()] == ["half"]
    assert compiler.cached(tmp_path) == ("compiled", None)


def test_ctrl_c_leaves_neither_stamp_nor_lock(tmp_path, compiler, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(compiler, "compile", failing(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            compiler.cached(tmp_path)
    assert not (home_in(tmp_path) / STAMP).exists()
    assert compiler.cached(tmp_path) == ("compiled", None)
    assert "waiting" not in " ".join(compiler.said)


# --- other processes ------------------------------------------------------------------------------

PROCESS = textwrap.dedent("""
    import signal, sys, time
    from pathlib import Path
    from tilewright_pypto.build_cache import cached

    # A shell's background job is started with this signal ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    folder, go = map(Path, sys.argv[1:])

    def compile(home):
        (home / "half").touch()
        while not go.exists():
            time.sleep(0.01)
        (home / "kernel.bin").write_text("compiled")
        return "compiled"

    def reload(home):
        return (home / "kernel.bin").read_text() + " before"

    def say(what):
        print(what, flush=True)

    print(cached(folder, "kernel", {"a": "b"}, compile, reload, say)[0])
""")


@pytest.fixture
def start(tmp_path):
    started = []

    def start(folder: Path) -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", PROCESS, str(folder), str(tmp_path / "go")]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
def two(tmp_path, start):
    """A process that compiles, and another that waits for it."""
    first = start(tmp_path / "cache")
    assert first.stdout.readline() == "compiling kernel\n"
    second = start(tmp_path / "cache")
    assert second.stdout.readline() == "waiting for another process that compiles kernel\n"
    return first, second


def test_of_two_processes_one_compiles_and_the_other_waits(tmp_path, two):
    first, second = two
    (tmp_path / "go").touch()
    assert first.communicate()[0] == "compiled\n"
    assert second.communicate()[0] == "loading kernel\ncompiled before\n"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_when_the_compiling_process_is_killed_the_waiting_one_compiles(tmp_path, two, how):
    first, second = two
    first.send_signal(how)
    assert second.stdout.readline() == "compiling kernel\n"
    (tmp_path / "go").touch()
    assert second.communicate()[0] == "compiled\n"
    assert (home_in(tmp_path / "cache") / STAMP).exists()


def test_a_waiting_process_can_be_interrupted(tmp_path, two):
    first, second = two
    second.send_signal(signal.SIGINT)
    assert second.wait(60) != 0
    (tmp_path / "go").touch()
    assert first.communicate()[0] == "compiled\n"


# --- folders that are not writable ----------------------------------------------------------------


def test_a_missing_cache_folder_is_created(tmp_path, compiler):
    assert compiler.cached(tmp_path / "a" / "b") == ("compiled", None)


@pytest.mark.parametrize("inside", ["", "below"])
def test_a_file_in_place_of_the_cache_folder_is_refused(tmp_path, compiler, inside):
    (tmp_path / "file").touch()
    with pytest.raises(ExecutorError) as error:
        compiler.cached(tmp_path / "file" / inside)
    (line,) = str(error.value).splitlines()
    assert str(tmp_path / "file") in line
    assert "build_dir" in line


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_write_permission_is_refused(tmp_path, compiler):
    tmp_path.chmod(0o500)
    with pytest.raises(ExecutorError, match=r"Permission denied.*make it a writable folder"):
        compiler.cached(tmp_path)


def test_a_full_disk_is_an_error_and_leaves_no_stamp(tmp_path):
    code = textwrap.dedent("""
        import resource, sys
        from pathlib import Path
        from tilewright.errors import ExecutorError
        from tilewright_pypto.build_cache import cached

        resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
        try:
            cached(Path(sys.argv[1]), "kernel", {}, lambda home: None, lambda home: None, print)
        except ExecutorError as error:
            print(error)
    """)
    command = [sys.executable, "-c", code, str(tmp_path)]
    said = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    assert said[0] == "compiling kernel"
    assert "cannot be written to" in said[1]
    assert "(File too large)" in said[1]
    assert not list(tmp_path.rglob(STAMP))


def test_the_default_folder_is_in_the_cache_directory_of_the_user(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "tilewright" / "pypto"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_folder() == tmp_path / "home" / ".cache" / "tilewright" / "pypto"


def test_the_default_folder_is_temporary_where_the_home_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "home").touch()
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.warns(PluginWarning, match="set build_dir or XDG_CACHE_HOME to a folder that is"):
        folder = default_folder()
    assert folder == tmp_path / f"tilewright-{os.getuid()}" / "tilewright" / "pypto"
