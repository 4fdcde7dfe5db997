"""Models files: how names are resolved, and how entries are added and removed."""

import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import plugin_distributions as dists
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilewright import LLMEngine, RuntimeConfig, models
from tilewright.cli import main
from tilewright.config import DEFAULT, resolve
from tilewright.errors import ConfigError
from tilewright.settings import DEMO_MODEL, Given

FULL = """\
# what we run
[qwen3-14b]
source = "Qwen/Qwen3-14B"
loader = "hf-hub"
revision = "40c0698"
format = "safetensors"

[qwen3-14b.options]
local_files_only = true

[qwen3-14b.runtime]
weight_dtype = "bfloat16"
page_size = 32

[qwen3-14b.generate]
temperature = 0.6
stop = ["END"]
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder, beside a home of one's own, with no models file in either."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv(models.VARIABLE, raising=False)
    return tmp_path / "work"


def written(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def user_wide(text: str) -> Path:
    return written(models.user_file(), text)


def project_wide(text: str) -> Path:
    return written(models.PROJECT_FILE, text)


def flag(name: str) -> dict[tuple[str, ...], Given]:
    return {("model", "path"): Given(name, "--model")}


# --- reading --------------------------------------------------------------------------------------


def test_a_name_sets_everything_in_its_table() -> None:
    file = user_wide(FULL)
    resolved = resolve(flags=flag("qwen3-14b"))
    config = resolved.config
    assert (config.model.id, config.model.path) == ("qwen3-14b", "Qwen/Qwen3-14B")
    assert (config.model.format, config.plugins.loader) == ("safetensors", "hf-hub")
    assert config.options == {"loader": {"revision": "40c0698", "local_files_only": True}}
    assert (config.runtime.weight_dtype, config.runtime.page_size) == ("bfloat16", 32)
    assert (config.generate.temperature, config.generate.stop) == (0.6, ("END",))
    for place, line in (
        (("model", "id"), 2),
        (("model", "path"), 3),
        (("options", "loader", "revision"), 5),
        (("options", "loader", "local_files_only"), 9),
        (("runtime", "page_size"), 13),
    ):
        assert resolved.origin(*place) == f"{file}:{line}"
    assert resolved.origin("runtime", "max_batch_size") == DEFAULT


def test_flags_environment_and_run_file_override_the_models_file(tmp_path: Path) -> None:
    file = user_wide(FULL)
    run = written(
        tmp_path / "run.toml",
        '[model]\npath = "qwen3-14b"\n[runtime]\npage_size = 64\n[generate]\ntemperature = 1\n'
        '[options.loader]\nrevision = "v2"\n',
    )
    resolved = resolve(
        run,
        {("runtime", "page_size"): Given("8", "--page-size"), ("model", "id"): Given("q", "--id")},
        os.environ | {"TILEWRIGHT_GENERATE_TEMPERATURE": "0"},
    )
    config = resolved.config
    assert (config.model.id, config.model.path) == ("q", "Qwen/Qwen3-14B")
    assert (config.runtime.page_size, config.generate.temperature) == (8, 0)
    assert config.options["loader"] == {"revision": "v2", "local_files_only": True}
    assert resolved.origin("options", "loader", "revision") == f"{run}:8"
    assert resolved.origin("runtime", "weight_dtype") == f"{file}:12"


@pytest.mark.parametrize("how", ["flag", "environment", "run file"])
def test_a_name_is_accepted_wherever_a_path_is(tmp_path: Path, how: str) -> None:
    user_wide(FULL)
    run = written(tmp_path / "run.toml", '[model]\npath = "qwen3-14b"\n')
    environ = dict(os.environ)
    if how == "environment":
        environ["TILEWRIGHT_MODEL_PATH"] = "qwen3-14b"
    resolved = resolve(
        run if how == "run file" else None, flag("qwen3-14b") if how == "flag" else None, environ
    )
    assert resolved.config.model.path == "Qwen/Qwen3-14B"


def test_the_project_file_takes_precedence_and_a_variable_selects_the_only_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    user_wide('[a]\nsource = "user/a"\n[b]\nsource = "user/b"\n')
    project_wide('[b]\nsource = "project/b"\n[c]\nsource = "project/c"\n')
    found = {name: model.source for name, model in models.registered().items()}
    assert found == {"a": "user/a", "b": "project/b", "c": "project/c"}
    only = written(tmp_path / "only.toml", '[c]\nsource = "only/c"\n')
    monkeypatch.setenv(models.VARIABLE, str(only))
    assert {name: m.source for name, m in models.registered().items()} == {"c": "only/c"}
    assert resolve(flags=flag("c")).config.model.path == "only/c"
    monkeypatch.setenv(models.VARIABLE, "")
    assert set(models.registered()) == {"a", "b", "c"}


def test_the_variable_is_not_read_as_a_setting() -> None:
    """TILEWRIGHT_MODELS looks like a setting of [model], such as TILEWRIGHT_MODEL_PATH."""
    environ = os.environ | {models.VARIABLE: "/none", "TILEWRIGHT_MODEL_ID": "x"}
    assert resolve(environ=environ).config.model.id == "x"
    assert resolve(flags=flag("./path"), environ=environ).config.model.path == "./path"
    with pytest.raises(
        ConfigError, match=r"^TILEWRIGHT_MODELS: models file '/none' cannot be read"
    ):
        resolve(flags=flag("name"), environ=environ)


def test_a_name_is_not_a_path_even_if_the_path_exists(folder: Path, tmp_path: Path) -> None:
    (folder / "qwen3-14b").mkdir()
    (folder / "other").mkdir()
    run = written(folder / "run.toml", '[model]\npath = "qwen3-14b"\n')
    elsewhere = written(tmp_path / "runs" / "run.toml", '[model]\npath = "other"\n')
    (tmp_path / "runs" / "other").mkdir()
    user_wide(FULL)
    assert resolve(flags=flag("qwen3-14b")).config.model.path == "Qwen/Qwen3-14B"
    assert resolve(run).config.model.path == "Qwen/Qwen3-14B"
    assert resolve(flags=flag("./qwen3-14b")).config.model.path == "./qwen3-14b"
    assert resolve(flags=flag("other")).config.model.path == "other"
    assert resolve(elsewhere).config.model.path == str(tmp_path / "runs" / "other")


def test_a_broken_file_does_not_affect_models_given_as_paths() -> None:
    user_wide("[")
    for path in (str(DEMO_MODEL), "./x", "org/name", "~/x", "x y"):
        assert resolve(flags=flag(path)).config.model.path == path
    with pytest.raises(ConfigError, match=r"models\.toml:1: invalid TOML"):
        resolve(flags=flag("x"))


def test_relative_sources_are_relative_to_their_file(tmp_path: Path) -> None:
    file = user_wide('[a]\nsource = "./a"\n[b]\nsource = "b"\n[c]\nsource = "org/c"\n')
    (file.parent / "b").mkdir()
    sources = [model.source for model in models.registered().values()]
    assert sources == [str(file.parent / "a"), str(file.parent / "b"), "org/c"]


def test_a_device_given_elsewhere_replaces_the_models_files_device() -> None:
    user_wide('[a]\nsource = "x/a"\nruntime = { device = "3" }\n')
    assert resolve(flags=flag("a")).config.runtime.device == "3"
    granted = resolve(flags=flag("a"), environ=os.environ | {"TASK_DEVICE": "5"})
    assert granted.config.runtime.device is None
    option = {("options", "executor", "device"): Given("1", "-o device")}
    assert resolve(flags=flag("a") | option).config.runtime.device is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[a\n", ":1: invalid TOML: "),
        ('x = 1\n[a]\nsource = "s"\n', ":1: [x] must be a table, found 1"),
        ('[a]\nloader = "hf-hub"\n', ":1: model 'a' needs a source: a directory, a file or a hub "),
        ("[a]\nsource = 3\n", ":1: model 'a' needs a source"),
        ('[a]\nsource = "s"\nsorce = "t"\n', ":3: unknown key 'sorce'; did you mean 'source'?"),
        ('[a]\nsource = "s"\nformat = 3\n', ":3: 'format' must be a string or none, found 3"),
        ('[a]\nsource = "s"\nruntime = 3\n', ":3: runtime must be a table, found 3"),
        ('[a]\nsource = "s"\n[a.runtime]\npage_sise = 3\n', ":4: unknown key 'page_sise'; did you"),
        ('[a]\nsource = "s"\n[a.runtime]\npage_size = 0\n', ":4: 'page_size' must be >= 1: 0"),
        ('[a]\nsource = "s"\n[a.generate]\nstream = true\n', ":4: unknown key 'stream'"),
        (
            '[a]\nsource = "s"\n\n[a.generate]\ntop_p = "x"\n',
            ":5: 'top_p' must be a number or none",
        ),
        ('["a/b"]\nsource = "s"\n', ":1: invalid model name 'a/b'"),
        ('[a]\nsource = "s"\nrevision = "1"\noptions = { revision = "2" }\n', "given twice"),
        ('[ok]\nsource = "s"\n\n[ok]\n', ":4: invalid TOML: "),
    ],
)
def test_an_error_names_file_and_line(text: str, message: str) -> None:
    file = user_wide(text)
    with pytest.raises(ConfigError) as raised:
        models.registered()
    assert str(raised.value).startswith(f"{file}:")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_loader_that_is_not_installed_is_reported_with_its_line() -> None:
    user_wide('[a]\nsource = "s"\nloader = "hf-hubb"\n')
    done = tilewright("generate", "--model", "a", "hi")
    assert done.code == 2
    assert "models.toml:3: no loader is named 'hf-hubb'; did you mean 'hf-hub'?" in done.err


# --- from Python ----------------------------------------------------------------------------------


def test_a_model_found_by_name_can_be_loaded() -> None:
    models.add(
        "demo",
        {"source": str(DEMO_MODEL), "runtime": {"page_size": 8}, "generate": {"max_new_tokens": 3}},
        models.PROJECT_FILE,
    )
    model = models.find("demo")
    assert model is not None
    assert models.find("another") is None
    assert model.runtime == RuntimeConfig(page_size=8)
    with LLMEngine.from_plugins(loader=model.loader) as engine:
        engine.init_model(model.name, model.source, model.runtime, model.format, **model.options)
        result = engine.generate_result("demo", "We", model.generate)
        assert (len(result.token_ids), engine.model("demo").runtime.page_size) == (3, 8)


def test_a_run_file_can_select_a_model_by_name(folder: Path) -> None:
    project_wide(f'[demo]\nsource = "{DEMO_MODEL}"\nruntime = {{ page_size = 8 }}\n')
    run = written(folder / "run.toml", '[model]\npath = "demo"\n')
    with LLMEngine.from_config(run) as engine:
        assert engine.model("demo").runtime.page_size == 8


# --- writing --------------------------------------------------------------------------------------


def test_an_added_model_is_found_with_its_settings(folder: Path) -> None:
    entry = {
        "source": "org/name",
        "loader": "hf-hub",
        "revision": "v1",
        "options": {"local_files_only": True},
        "runtime": {"page_size": 8, "weight_dtype": "bfloat16"},
        "generate": {"stop": ("a\n", 'b"'), "logit_bias": {3: -1.5}, "temperature": 0.5},
    }
    made = models.add("qwen2.5-7b", entry, models.user_file())
    assert models.find("qwen2.5-7b") == made
    assert made.runtime.page_size == 8
    assert made.generate.stop == ("a\n", 'b"')
    assert made.generate.logit_bias == {3: -1.5}
    assert made.options == {"revision": "v1", "local_files_only": True}


def test_adding_and_removing_leave_the_rest_unchanged() -> None:
    before = (
        "# my models\n\n# the first\n[a] # here\nsource = 's/a'  # there\n\n[a.runtime]\n"
        "# small\npage_size = 8\n\n# the last\n[z]\nsource = 's/z'\n"
        "[z.generate]\nstop = [\n  'x',\n]\n"
    )
    file = user_wide(before)
    models.add("m", {"source": "s/m", "runtime": {"page_size": 4}}, file)
    assert file.read_text().startswith(before)
    models.remove("m", file)
    assert file.read_text() == before
    models.remove("a", file)
    assert file.read_text() == "# my models\n\n# the last\n" + before.partition("# the last\n")[2]
    models.remove("z", file)
    assert file.read_text() == "# my models\n"


NAMES = st.sampled_from(["a", "b-1", "c.d", "e_f", "1"])


@given(st.lists(st.tuples(st.booleans(), NAMES), max_size=12))
def test_any_sequence_of_adding_and_removing_keeps_the_other_models(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[bool, str]]
) -> None:
    file = tmp_path_factory.mktemp("models") / "m.toml"
    expected: dict[str, str] = {}
    for number, (adding, name) in enumerate(steps):
        if adding == (name in expected):
            with pytest.raises(ConfigError):
                (models.add(name, {"source": "x/y"}, file) if adding else models.remove(name, file))
        elif adding:
            expected[name] = f"org/{number}"
            entry = {"source": expected[name], "runtime": {"page_size": number + 1}}
            models.add(name, entry, file)
        else:
            del expected[name]
            models.remove(name, file)
        found = {n: m.source for n, m in models.read(file).items()} if file.exists() else {}
        assert found == expected


@pytest.mark.parametrize(
    "text",
    [
        'a.source = "s"\nb.source = "t"\n',
        'a = { source = "s", options = { x = 1 } }\nb = { source = "t" }\n',
        '[a]\nsource = "s"\n[b]\nsource = "t"\n[a.options]\nx = 1\n',
        '[a]\nsource = """\ns"""\n[b]\nsource = "t"',
        '["a"]\r\nsource = "s"\r\n[b]\r\nsource = "t"\r\n',
    ],
)
def test_a_model_is_removed_however_it_is_written(text: str) -> None:
    file = user_wide(text)
    assert set(models.read(file)) == {"a", "b"}
    models.remove("a", file)
    assert {name: m.source for name, m in models.read(file).items()} == {"b": "t"}


ENTRIES = {
    "inline": """\
# inline, above
inline = { source = "s", runtime = { page_size = 8 } }  # beside
""",
    "dotted": """\
# dotted, above
dotted.source = "s"
# dotted, within
dotted.runtime.page_size = 8
""",
    "table": """\
# table, above
[table]  # beside
# table, within
source = "s"
runtime.page_size = 8
""",
    "quo.ted": """\
# quoted, above
['quo.ted']
"source" = '''
[not a header]
# not a comment'''
""",
    "sub-tables": """\
# sub-tables, above
[sub-tables.runtime]
page_size = 8

# sub-tables, within
[sub-tables]
source = "s"

[[sub-tables.options.arrays]]
x = 1

  [[sub-tables.options.arrays]]
  x = [
    1,  # within
    2,
  ]
""",
}


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("name", ENTRIES)
def test_removing_a_model_leaves_all_other_lines(folder: Path, name: str, newline: str) -> None:
    def text(entries: list[str]) -> bytes:
        return "\n".join(["# my models\n", *entries, "# the end\n"]).replace("\n", newline).encode()

    file = folder / "m.toml"
    file.write_bytes(text(list(ENTRIES.values())))
    assert list(models.read(file)) == list(ENTRIES)
    models.remove(name, file)
    assert file.read_bytes() == text([entry for n, entry in ENTRIES.items() if n != name])


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_removing_and_adding_a_model_replaces_it_at_the_end(folder: Path, newline: str) -> None:
    file = folder / "m.toml"
    for name in ENTRIES:
        entries = [entry for n, entry in ENTRIES.items() if n != name]
        file.write_bytes("\n".join(ENTRIES.values()).replace("\n", newline).encode())
        models.remove(name, file)
        models.add(name, {"source": "t"}, file)
        left = "\n".join(entries).replace("\n", newline).encode()
        assert file.read_bytes().startswith(left)
        assert list(models.read(file)) == [n for n in ENTRIES if n != name] + [name]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('a = { source = "s" }\nb = { source = "t" }', 'b = { source = "t" }'),
        ('b = { source = "t" }\n# a\na = { source = "s" }', 'b = { source = "t" }\n'),
        ('b = { source = "t" }\n\n# a\na.source = "s"', 'b = { source = "t" }\n'),
        ('[a]\nsource = "s"\n# b\n[b]\nsource = "t"', '# b\n[b]\nsource = "t"'),
        ('[b]\nsource = "t"\n\n[a]\nsource = "s"', '[b]\nsource = "t"\n'),
        ('[b]\nsource = "t"\n[a]\nsource = "s"\n# end', '[b]\nsource = "t"\n# end'),
        (
            'z = { source = "z" }\n\n# a\na = { source = "s" }\nb = { source = "t" }\n',
            'z = { source = "z" }\n\nb = { source = "t" }\n',
        ),
        (
            '# a\n[a]\nsource = "s"\n# b\n[b]\nsource = "t"\n\n# more\n[a.options]\nx = 1\n',
            '# b\n[b]\nsource = "t"\n',
        ),
        ('# a\n[a]\nsource = "s"', ""),
    ],
)
def test_removing_a_model_from_a_file_of_any_layout(before: str, after: str) -> None:
    file = user_wide(before)
    models.remove("a", file)
    assert file.read_text() == after


@pytest.mark.parametrize("text", ['a = { source = "s" }', '[a]\nsource = "s"', "# none"])
def test_adding_to_a_file_that_does_not_end_with_a_newline(text: str) -> None:
    file = user_wide(text)
    models.add("b", {"source": "t"}, file)
    assert file.read_text() == f'{text}\n\n[b]\nsource = "t"\n'


def test_a_model_that_cannot_be_removed_alone_leaves_the_file_unchanged() -> None:
    text = '[[x]]\n[a]\nsource = "s"\n[[x]]\n'
    file = user_wide(text)
    with pytest.raises(
        ConfigError, match=r"models.toml:2: 'a' cannot be removed without changing the"
    ):
        models.remove("a", file)
    assert file.read_text() == text


def test_an_invalid_entry_leaves_the_file_unchanged() -> None:
    file = user_wide(FULL)
    for name, entry in (
        ("a b", {"source": "s"}),
        ("a", {}),
        ("a", {"source": "s", "runtime": {"page_size": 0}}),
        ("a", {"source": "s", "nonsense": 1}),
        ("a", {"source": Path("s")}),
        ("a", {"source": "s", "runtime": {"page_size": None}}),
        ("qwen3-14b", {"source": "s"}),
    ):
        with pytest.raises(ConfigError):
            models.add(name, entry, file)
    assert file.read_text() == FULL
    assert os.listdir(file.parent) == [file.name]


def test_symbolic_link_and_mode_are_preserved(tmp_path: Path) -> None:
    real = written(tmp_path / "dotfiles" / "m.toml", "")
    real.chmod(0o600)
    models.user_file().parent.mkdir(parents=True)
    models.user_file().symlink_to(real)
    models.add("a", {"source": "x/y"}, models.user_file())
    assert models.user_file().is_symlink()
    assert set(models.read(real)) == {"a"}
    assert real.stat().st_mode & 0o777 == 0o600


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    blocked = written(tmp_path / "file", "") / "models.toml"
    with pytest.raises(ConfigError, match=r"models file '.*' cannot be written: File exists"):
        models.add("a", {"source": "x/y"}, blocked)


def test_a_pipe_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    pipe = tmp_path / "models.toml"
    os.mkfifo(pipe)
    for change in (
        lambda: models.add("a", {"source": "x/y"}, pipe),
        lambda: models.remove("a", pipe),
    ):
        with pytest.raises(ConfigError, match="expected a file, found a device or a pipe"):
            change()
    assert pipe.is_fifo()


def test_concurrent_writers_lose_nothing(tmp_path: Path) -> None:
    file = tmp_path / "new" / "models.toml"
    barrier = threading.Barrier(8)

    def add_five(writer: int) -> None:
        barrier.wait()
        for i in range(5):
            models.add(f"m{writer}-{i}", {"source": "x/y"}, file)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add_five, range(8)))
    assert len(models.read(file)) == 40
    assert os.listdir(file.parent) == [file.name]


def test_a_failed_change_creates_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file or directory"):
        models.remove("a", tmp_path / "new" / "models.toml")
    with pytest.raises(ConfigError, match="needs a source"):
        models.add("a", {}, tmp_path / "new" / "models.toml")
    assert not (tmp_path / "new").exists()


# --- the command ----------------------------------------------------------------------------------


def tilewright(*arguments: str, **environment: str) -> dists.Completed:
    return dists.run("-m", "tilewright", *arguments, **environment)


def test_the_command_adds_lists_shows_and_removes(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    def run(*arguments: str) -> tuple[str, str]:
        capsys.readouterr()
        assert main(["models", *arguments]) == 0
        told = capsys.readouterr()
        return told.out, told.err

    assert run("list")[0].startswith("no models are defined (looked in tilewright-models.toml and ")
    (folder / "weights").mkdir()
    added, _ = run(
        "add", "mine", "--source", "weights", "--page-size", "8", "--stop", "END", "--temperature",
        "0.5", "--project",
    )  # fmt: skip
    assert added == "mine: weights, in tilewright-models.toml:1\n"
    assert models.PROJECT_FILE.read_text() == (
        '[mine]\nsource = "./weights"\n\n[mine.runtime]\npage_size = 8\n\n[mine.generate]\n'
        'temperature = 0.5\nstop = ["END"]\n'
    )
    _, err = run(
        "add", "mine", "--source", "org/x", "--revision", "v1", "--loader", "hf-hub", "-o",
        "local_files_only=true",
    )  # fmt: skip
    assert err == ("note: in this folder mine is weights, defined in tilewright-models.toml:1\n")
    assert run("list")[0].splitlines()[1].split() == [
        "mine", "weights", "-", "tilewright-models.toml:1"
    ]  # fmt: skip
    out, err = run("remove", "mine")
    assert out == "mine is no longer in tilewright-models.toml\n"
    assert err == f"note: mine is now org/x@v1, defined in {models.user_file()}:1\n"
    (shown,) = json.loads(run("show", "mine", "--json")[0])
    assert shown == {
        "name": "mine",
        "origin": f"{models.user_file()}:1",
        "source": "org/x",
        "revision": "v1",
        "loader": "hf-hub",
        "options": {"local_files_only": "true"},
    }
    assert f'revision = "v1"  # {models.user_file()}:3' in run("show", "mine")[0].splitlines()
    assert json.loads(run("list", "--json")[0]) == [shown]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "mien"], "no model is named 'mien'; did you mean 'mine'? (defined: mine)"),
        (["remove", "mien"], "no model is named 'mien'; did you mean 'mine'?"),
        (
            ["add", "mine", "--source", "x"],
            "model 'mine' is already defined; run `tilewright models re",
        ),
        (["add", "a/b", "--source", "x"], "invalid model name 'a/b': expected a letter"),
        (["add", "a"], "the following arguments are required: --source"),
        (
            ["add", "a", "--source", "x", "--page-size", "0"],
            "--page-size: 'page_size' must be >= 1",
        ),
        (["add", "a", "--source", "x", "--loader", "hf-lokal"], "did you mean 'hf-local'?"),
        (["add", "a", "--source", "x", "-o", "y"], "-o: expected KEY=VALUE, found 'y'"),
        (["add", "a", "--source", "x", "-o", "executor.y=1"], "expected an option of the loader"),
        (["add", "a", "--source", ""], "needs a source"),
        (["lst"], "unknown 'lst'; did you mean 'list'?"),
    ],
)
def test_errors_on_the_command_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    before = user_wide('[mine]\nsource = "s"\n').read_text()
    assert main(["models", *arguments]) == 2
    told = capsys.readouterr()
    assert message in told.err
    assert (told.out, told.err.count("\n")) == ("", 1)
    assert models.user_file().read_text() == before


def test_an_error_in_the_other_file_is_noted_after_writing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    models.PROJECT_FILE.write_text("broken =\n")
    assert main(["models", "add", "mine", "--source", "x", "-o", "loader.revision=v1"]) == 0
    told = capsys.readouterr()
    assert told.out == f"mine: x@v1, in {models.user_file()}:1\n"
    assert told.err.startswith(f"note: {models.PROJECT_FILE}:1: invalid TOML")


def test_the_variable_selects_the_file_to_write(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "new" / "m.toml"
    monkeypatch.setenv(models.VARIABLE, str(file))
    assert main(["models", "add", "a", "--source", "x/y"]) == 0
    assert set(models.read(file)) == {"a"}
    assert main(["models", "add", "b", "--source", "x/y", "--project"]) == 2
    assert "TILEWRIGHT_MODELS selects the only models file" in capsys.readouterr().err
    assert main(["models", "remove", "a"]) == 0
    assert models.read(file) == {}


def test_every_command_accepts_a_name() -> None:
    models.add(
        "demo",
        {"source": str(DEMO_MODEL), "generate": {"max_new_tokens": 2}},
        models.user_file(),
    )
    config = str(models.user_file().parent.parent)
    done = tilewright("generate", "--model", "demo", "--json", "We", XDG_CONFIG_HOME=config)
    record = json.loads(done.out)
    assert (record["model"], record["source"]) == ("demo", str(DEMO_MODEL))
    assert len(record["token_ids"]) == 2
    done = tilewright("generate", "--model", "demmo", "We", XDG_CONFIG_HOME=config)
    assert "and no models file defines it; did you mean 'demo'?" in done.err
    shown = tilewright("doctor", "--json", XDG_CONFIG_HOME=config)
    (check,) = [c for c in json.loads(shown.out) if c["name"] == "models by name"]
    assert (check["status"], check["found"].split(",")[0]) == ("ok", "demo")


def test_a_missing_source_is_reported_with_its_line() -> None:
    file = user_wide('[a]\nsource = "./gone"\n')
    done = tilewright("generate", "--model", "a", "hi")
    assert done.err.startswith(f"tilewright: error: {file}:2: no model directory or file '")
