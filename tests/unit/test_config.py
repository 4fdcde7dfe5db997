"""Where the settings of a run come from, and the errors for invalid ones."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from tilewright.cli.run import show
from tilewright.config import DEFAULT, resolve
from tilewright.errors import ConfigError, PluginError
from tilewright.settings import DEMO_MODEL, DEMO_PROMPT, SECTIONS, Given, keys

FLAG = {("runtime", "page_size"): Given("8", "--page-size")}
ENVIRONMENT = {"TILEWRIGHT_RUNTIME_PAGE_SIZE": "32"}
FILE = "# pages\n[runtime]\npage_size = 64\n"


def written(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("flags", "environ", "text", "value", "origin"),
    [
        (FLAG, ENVIRONMENT, FILE, 8, "--page-size"),
        ({}, ENVIRONMENT, FILE, 32, "TILEWRIGHT_RUNTIME_PAGE_SIZE"),
        ({}, {}, FILE, 64, "run.toml:3"),
        ({}, {}, "", None, DEFAULT),
        (FLAG, {}, FILE, 8, "--page-size"),
        (FLAG, {}, "", 8, "--page-size"),
        ({}, {"TILEWRIGHT_RUNTIME_PAGE_SIZE": ""}, FILE, 64, "run.toml:3"),
    ],
)
def test_precedence_is_flags_environment_file_defaults(
    tmp_path, monkeypatch, flags, environ, text, value, origin
):
    written(tmp_path, text)
    monkeypatch.chdir(tmp_path)
    resolved = resolve("run.toml", flags, environ)
    assert resolved.config.runtime.page_size == value
    assert resolved.origin("runtime", "page_size") == origin


def test_the_environment_defaults_to_that_of_the_process(monkeypatch):
    monkeypatch.setenv("TILEWRIGHT_GENERATE_TEMPERATURE", "0.25")
    assert resolve().config.generate.temperature == 0.25


def test_without_settings_the_demo_model_runs_its_own_prompt():
    config = resolve(environ={}).config
    assert config.model.path == str(DEMO_MODEL)
    assert config.model.id == DEMO_MODEL.name
    assert config.prompts.text == (DEMO_PROMPT,)


def test_other_models_have_no_default_prompt(tmp_path):
    path = written(tmp_path, '[model]\npath = "../models/Qwen3-14B"\n')
    config = resolve(path, environ={}).config
    assert config.prompts.text == ()
    assert config.model.id == "Qwen3-14B"


def test_plugin_defaults_match_those_of_the_engine():
    from tilewright.engine import LLMEngine

    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(LLMEngine.from_plugins).parameters.items()
    }
    selection = resolve(environ={}).config.selection()
    assert selection.keys() == defaults.keys()
    assert selection == defaults | {"options": {}}


def test_paths_in_a_file_are_relative_to_it(tmp_path):
    (tmp_path / "weights").mkdir()
    path = written(
        tmp_path,
        '[model]\npath = "weights"\n[prompts]\nfile = ["a.txt", "-", "/b.txt"]\n'
        '[output]\nfile = "out.jsonl"\n',
    )
    config = resolve(path, environ={}).config
    assert config.model.path == str(tmp_path / "weights")
    assert config.prompts.file == (str(tmp_path / "a.txt"), "-", "/b.txt")
    assert config.output.file == str(tmp_path / "out.jsonl")


def test_a_model_that_is_not_a_path_is_passed_to_the_loader_unchanged(tmp_path):
    path = written(tmp_path, '[model]\npath = "Qwen/Qwen3-14B"\n')
    assert resolve(path, environ={}).config.model.path == "Qwen/Qwen3-14B"


def test_a_tilde_is_expanded_to_the_home_directory(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    config = resolve(environ={"TILEWRIGHT_MODEL_PATH": "~/m"}).config
    assert config.model.path == "/home/ada/m"


def test_options_are_merged_key_by_key(tmp_path):
    path = written(
        tmp_path,
        "[options.executor]\nthreads = 1\ncompile = false\n"
        '[options.weight_format.safetensors]\nbackend = "pread"\n',
    )
    flags = {("options", "executor", "threads"): Given("3", "-o threads")}
    environ = {"TILEWRIGHT_OPTIONS_KV_ALLOCATOR_SOME_KEY": "x"}
    resolved = resolve(path, flags, environ)
    assert resolved.config.options == {
        "executor": {"threads": "3", "compile": False},
        "weight_format": {"safetensors": {"backend": "pread"}},
        "kv_allocator": {"some_key": "x"},
    }
    assert resolved.origin("options", "executor", "threads") == "-o threads"
    assert resolved.origin("options", "executor", "compile").endswith("run.toml:3")


@pytest.mark.parametrize(
    ("layer", "text", "file"),
    [
        ({}, ("from the file",), ()),
        ({("prompts", "file"): Given(["p.txt"], "--prompt-file")}, (), ("p.txt",)),
        ({("prompts", "text"): Given(["a"], "PROMPT")}, ("a",), ()),
    ],
)
def test_prompts_of_a_higher_precedence_source_replace_the_others(tmp_path, layer, text, file):
    path = written(tmp_path, '[prompts]\ntext = "from the file"\n')
    prompts = resolve(path, layer, {}).config.prompts
    assert (prompts.text, prompts.file) == (text, file)


@pytest.mark.parametrize("prompt", ["[1, 2]", '["a", "b"]', "[", "none", "1"])
def test_a_prompt_that_looks_like_toml_stays_text(tmp_path, prompt):
    path = written(tmp_path, f"[prompts]\ntext = '{prompt}'\n")
    assert resolve(path, environ={}).config.prompts.text == (prompt,)
    environ = {"TILEWRIGHT_PROMPTS_TEXT": prompt}
    assert resolve(environ=environ).config.prompts.text == (prompt,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[runtime]\n\npage_sise = 3\n", "run.toml:3: unknown key 'page_sise'; did you mean 'page"),
        ("[runtim]\npage_size = 3\n", "run.toml:1: unknown section 'runtim'; did you mean 'runt"),
        ("temperature = 1\n", "unknown section 'temperature'; it is a key of [generate]"),
        ("[runtime]\ntemperature = 1\n", "unknown key 'temperature'; it is a key of [generate]"),
        ("[generate]\nstream = true\n", "run.toml:2: unknown key 'stream'"),
        ("runtime = 3\n", "run.toml:1: [runtime] must be a table, found 3"),
        ("[[runtime]]\npage_size = 3\n", "run.toml:1: [runtime] must be a table"),
        ("runtime.page_size = 0\n", "run.toml:1: 'page_size' must be >= 1"),
        ("runtime.device = 1.5\n", "run.toml:1: 'device' must be a string, an integer or none"),
        ("runtime = {device = 'cpu', page_size = 'x'}\n", "run.toml:1: 'page_size' must be an int"),
        ("[generate]\nstop = [\n'a',\n3]\n", "run.toml:2: 'stop' must be a list of strings"),
        ("[options.executer]\nx = 1\n", "run.toml:1: unknown kind of plugin 'executer'; did you"),
        ("[options]\nexecutor = 1\n", "run.toml:2: [options.executor] must be a table, found 1"),
        ("[options.weight_format]\nx = 1\n", "[options.weight_format.x] must be a table"),
        ("options.weight_format = 1\n", "must be a table by plugin name, found 1"),
        ("[options.weight_format.safetensor]\nx = 1\n", "did you mean 'safetensors'"),
        ("[prompts]\ntext = 'a'\nfile = 'b'\n", "run.toml:3: prompts are already given as text ("),
        ("[plugins]\nexecutor = 'toch'\n", "run.toml:2: no executor is named 'toch'"),
        ("[plugins]\nobservers = ['nobody']\n", "run.toml:2: no observer is named 'nobody'"),
        ("[model]\nformat = 'safetensor'\n", "run.toml:2: no weight format is named 'safetensor'"),
        ("[model\n", "run.toml:1: invalid TOML: Expected ']'"),
        ("[model]\npath = 'a'\npath = 'b'\n", "run.toml:3: invalid TOML: Cannot overwrite"),
        ("[model]\npath = 'a\n\n[runtime]\n", "run.toml:2: invalid TOML"),
        (f"x = {'[' * 5000}\n", "nested too deeply"),
        (f"\nx = {'9' * 5000}\n", "run.toml:2: invalid TOML"),
    ],
)
def test_an_error_in_a_run_file_names_its_line(tmp_path, text, message):
    with pytest.raises((ConfigError, PluginError)) as caught:
        resolve(written(tmp_path, text), environ={})
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path))


def test_a_run_file_that_is_not_utf8_is_refused_with_its_line(tmp_path):
    path = tmp_path / "run.toml"
    path.write_bytes(b"[model]\npath = '\xff'\n")
    with pytest.raises(ConfigError, match="line 2: expected UTF-8, found byte 0xff"):
        resolve(path, environ={})


def test_a_byte_order_mark_is_accepted(tmp_path):
    path = tmp_path / "run.toml"
    path.write_bytes(b"\xef\xbb\xbf[runtime]\r\npage_size = 4\r\n")
    assert resolve(path, environ={}).config.runtime.page_size == 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("TILEWRIGHT_RUNTIME_PAGESIZE", "did you mean 'TILEWRIGHT_RUNTIME_PAGE_SIZE'"),
        ("TILEWRIGHT_GENERATE_STREAM", "no such setting"),
        ("TILEWRIGHT_OPTIONS_OBSERVER_X", "set others in a run file"),
        ("TILEWRIGHT_OPTIONS_X", "option of loader, executor, kv_allocator, sampler"),
    ],
)
def test_an_unknown_environment_variable_of_a_section_is_an_error(name, message):
    with pytest.raises(ConfigError, match=f"^{name}: ") as caught:
        resolve(environ={name: "1"})
    assert message in str(caught.value)


def test_environment_variables_outside_the_sections_are_ignored():
    assert resolve(environ={"TILEWRIGHT": "1", "TILEWRIGHT_X": "1", "RUNTIME_X": "1"}).origins == {}


def test_resolving_settings_does_not_import_torch():
    code = (
        "import sys; from tilewright.config import resolve; resolve();"
        "others = 'tilewright_torch tilewright_pypto tilewright_hf tilewright_testing'.split();"
        "sys.exit(any(m.startswith(('torch', 'rich', *others)) for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


EVERYTHING = """\
[plugins]
executor = "torch"
[options.executor]
threads = 2
names = ["a", "b"]
when = 1979-05-27
table = { a = 1.5, "b c" = "d" }
[options.weight_format.safetensors]
backend = "pread"
[model]
id = "it"
path = "somewhere/else"
format = "safetensors"
[runtime]
weight_dtype = "float16"
page_size = 4
[generate]
temperature = 0.5
stop = ["\\u007f", "\\"", "\\n", "é"]
logit_bias = { 1 = -2.5 }
stop_token_ids = [1, 2]
seed = 7
ignore_eos = true
[prompts]
text = ["one", "two\\nlines"]
[output]
format = "jsonl"
file = "/tmp/out.jsonl"
"""


@pytest.mark.parametrize("text", ["", EVERYTHING])
def test_the_shown_settings_are_a_run_file_that_resolves_to_the_same_settings(tmp_path, text):
    resolved = resolve(written(tmp_path, text), environ={})
    shown = tmp_path / "shown.toml"
    shown.write_text(show(resolved))
    assert resolve(shown, environ={}).config == resolved.config


def test_every_setting_is_shown_with_its_origin(tmp_path):
    path = written(tmp_path, EVERYTHING)
    flags = {("generate", "seed"): Given("8", "--seed")}
    environ = {"TILEWRIGHT_RUNTIME_DEVICE": "cpu"}
    lines = show(resolve(path, flags, environ)).splitlines()
    assert "seed = 8  # --seed" in lines
    assert 'device = "cpu"  # TILEWRIGHT_RUNTIME_DEVICE' in lines
    assert f"page_size = 4  # {path}:16" in lines
    assert "max_batch_size = 16  # default" in lines
    assert "# top_k: as the model recommends, or else 0" in lines
    named = {line.removeprefix("# ").split(" ")[0].rstrip(":") for line in lines}
    assert {key for section in SECTIONS for key in keys(section)} <= named


def test_what_no_model_recommends_is_shown_as_what_it_is():
    lines = show(resolve(environ={})).splitlines()
    assert "# seed: random" in lines
    assert "# logprobs: none" in lines
    assert "# prompt_logprobs: none" in lines
    assert "# logits_processors: none" in lines


def test_an_installed_distribution_declares_the_variable_of_its_queue(tmp_path, monkeypatch):
    info = tmp_path / "acme_queue-1.dist-info"
    info.mkdir()
    (info / "entry_points.txt").write_text("[tilewright.device_variables]\nACME_CARD = no_module\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    file = {"TILEWRIGHT_RUNTIME_DEVICE": "1"}
    assert resolve(environ=file).config.runtime.device == "1"
    granted = resolve(environ=file | {"ACME_CARD": "7"})
    assert granted.config.runtime.device is None
    assert granted.origin("runtime", "device") == "ACME_CARD = 7"
    assert resolve(environ=file | {"ACME_CARD": ""}).config.runtime.device == "1"
