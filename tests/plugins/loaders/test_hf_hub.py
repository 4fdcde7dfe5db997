"""hf-hub through huggingface_hub itself, against a local hub over HTTP."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import Files, Hub, files_of, serving
from huggingface_hub import constants
from huggingface_hub.utils import close_session
from model_directories import load as load_local
from model_directories import split_weights, write_directory
from safetensors.torch import load_file

from tilewright import LLMEngine, hookimpl, plugins
from tilewright.errors import ConfigError, ModelError
from tilewright.types import LoadedModel

NAME = "acme/tiny"
NEEDED = {
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model.safetensors",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_directory(tmp_path_factory.mktemp("model"))


@pytest.fixture
def hub(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that serves the model as NAME, and an empty cache."""
    with serving(Hub()) as hub:
        hub.add(NAME, files_of(model))
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + template)
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub


def load(source: str = NAME, format_: str | None = None, **options: Any) -> LoadedModel:
    with LLMEngine.from_plugins(loader="hf-hub") as engine:
        loaded = engine.load(source, format_, **options)
    loaded.weights.close()
    return loaded


def refusal(source: str = NAME, **options: Any) -> str:
    with pytest.raises((ModelError, ConfigError)) as raised:
        load(source, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def snapshot(commit: str, name: str = NAME) -> Path:
    cache = Path(constants.HF_HUB_CACHE)
    return cache / f"models--{name.replace('/', '--')}" / "snapshots" / commit


def cached(commit: str) -> set[str]:
    folder = snapshot(commit)
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


# --- downloaded files -----------------------------------------------------------------------------


def test_a_repository_loads_like_a_directory_of_its_files(hub: Hub, model: Path) -> None:
    local = load_local(model)
    with LLMEngine.from_plugins() as engine:
        loaded = engine.load(NAME)
    assert (loaded.config, loaded.generation_defaults) == (local.config, local.generation_defaults)
    assert loaded.text.chat_template == local.text.chat_template
    assert loaded.warnings == local.warnings
    commit = loaded.source.removeprefix(f"{NAME}@")
    assert commit in hub.repositories[NAME]
    for name, tensor in load_file(model / "model.safetensors").items():
        assert torch.equal(loaded.weights.get(name), tensor)


def test_only_the_needed_files_are_downloaded(hub: Hub, model: Path) -> None:
    more = {
        "README.md": b"read me",
        "pytorch_model.bin": b"the same weights again",
        "consolidated.safetensors": b"and again",
        "model.fp16.safetensors": b"and again",
        "original/model.safetensors": b"and again",
        "onnx/config.json": b"{}",
        "tokenizer.model": b"the tokenizer again",
        "[odd] name*.json": b"{}",
    }
    commit = hub.add(NAME, files_of(model) | more)
    load()
    assert cached(commit) == NEEDED
    assert set(hub.downloads()) == NEEDED


def test_cached_files_are_not_downloaded_again(hub: Hub) -> None:
    load()
    hub.requests.clear()
    load()
    assert hub.downloads() == []


def test_only_the_shards_in_the_index_are_downloaded(hub: Hub, tmp_path: Path) -> None:
    directory = write_directory(tmp_path / "sharded")
    home = split_weights(directory)
    stray = {"model-00009-of-00009.safetensors": b"of another checkpoint"}
    commit = hub.add(NAME, files_of(directory) | stray)
    load()
    weights = {"model.safetensors.index.json", *home.values()}
    assert len(weights) == 4
    assert cached(commit) == NEEDED - {"model.safetensors"} | weights


def test_pytorch_files_are_downloaded_if_selected_or_if_there_are_no_others(
    hub: Hub, model: Path
) -> None:
    files = files_of(model)
    stored = load_file(model / "model.safetensors")
    single = Path(constants.HF_HUB_CACHE).parent / "x.bin"
    torch.save(stored, single)
    files["pytorch_model.bin"] = single.read_bytes()
    commit = hub.add(NAME, files)
    load(NAME, "pytorch-bin")
    assert cached(commit) == NEEDED - {"model.safetensors"} | {"pytorch_model.bin"}
    del files["model.safetensors"]
    commit = hub.add(NAME, files)
    load()
    assert cached(commit) == NEEDED - {"model.safetensors"} | {"pytorch_model.bin"}


def test_the_only_set_of_weights_of_a_repository_may_have_other_names(
    hub: Hub, model: Path
) -> None:
    files: Files = files_of(model)
    content = files.pop("model.safetensors")
    commit = hub.add(NAME, files | {"model.fp16.safetensors": content})
    assert "reading model.fp16.safetensors" in load().warnings[0]
    assert cached(commit) == NEEDED - {"model.safetensors"} | {"model.fp16.safetensors"}


def test_a_repository_without_a_model_is_refused_before_any_download(hub: Hub, model: Path) -> None:
    hub.add("acme/both", {"a-Q4_0.gguf": b"", "config.json": b"{}"})
    assert "run `hf download acme/both --include '*.gguf'`, then give" in refusal("acme/both")
    hub.add("acme/gguf", {"a-Q4_0.gguf": b"", "README.md": b""})
    said = refusal("acme/gguf")
    assert said.startswith("acme/gguf has no config.json: expected a transformers model, found RE")
    assert "`hf download acme/gguf a-Q4_0.gguf`, then load it" in said
    hub.add("acme/lora", {"adapter_config.json": b"{}", "adapter_model.safetensors": b""})
    assert "it is an adapter: give the base model that its adapter_config" in refusal("acme/lora")
    hub.add("acme/own", {"consolidated.safetensors": b"", "params.json": b""})
    assert "it has weights in Mistral's own layout" in refusal("acme/own")
    files: Files = files_of(model)
    del files["model.safetensors"]
    hub.add("acme/bare", files | {"flax_model.msgpack": b""})
    said = refusal("acme/bare")
    assert "no weights that can be loaded: expected one of model.safetensors, model.safet" in said
    assert "flax_model.msgpack" in said
    assert hub.downloads() == []


# --- revisions ------------------------------------------------------------------------------------


def test_a_revision_is_selected_in_the_id_or_by_an_option(hub: Hub, model: Path) -> None:
    main = load().source
    other = hub.add(NAME, files_of(model) | {"README.md": b"other"}, "refs/pr/1")
    assert main != f"{NAME}@{other}"
    for source, options in (
        (f"{NAME}@refs/pr/1", {}),
        (NAME, {"revision": "refs/pr/1"}),
        (f"{NAME}@refs/pr/1", {"revision": "refs/pr/1"}),
        (f"{NAME}@{other}", {}),
    ):
        assert load(source, **options).source == f"{NAME}@{other}"
    with pytest.raises(ConfigError, match="'refs/pr/1' in its id and 'main' as option 'revision'"):
        load(f"{NAME}@refs/pr/1", revision="main")


def test_a_branch_is_resolved_again_at_each_load(hub: Hub, model: Path) -> None:
    before = load().source
    commit = hub.add(NAME, files_of(model) | {"README.md": b"a new commit"})
    assert before != load().source == f"{NAME}@{commit}"
    assert load(before).source == before


# --- without a connection -------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["HF_HUB_OFFLINE", "local_files_only"])
def test_offline_the_cache_is_used_without_any_request(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    options = {"local_files_only": True} if how == "local_files_only" else {}
    online = load().source

    def go_offline() -> None:
        hub.requests.clear()
        if not options:
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    go_offline()
    loaded = load(**options)
    assert loaded.source == online
    assert loaded.warnings[0] == f"{NAME} is loaded from the cache: {how} is set"
    assert load(online, **options).source == online
    said = refusal("acme/other", **options)
    assert said.startswith(f"acme/other is not in the cache, {constants.HF_HUB_CACHE}, and {how} ")
    assert "at revision 'v2' is not in the cache" in refusal(f"{NAME}@v2", **options)
    assert hub.requests == []


def test_offline_an_incomplete_download_is_an_error_that_mentions_the_cache(hub: Hub) -> None:
    source = load().source
    (snapshot(source.partition("@")[2]) / "model.safetensors").unlink()
    said = refusal(local_files_only=True)
    assert "expected weights in one of the formats" in said
    assert said.endswith("is loaded from the cache: local_files_only is set")


def test_an_unreachable_hub_falls_back_to_the_cache(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = load().source
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    loaded = load()
    assert loaded.source == source
    assert loaded.warnings[0].startswith(
        f"{NAME} is loaded from the cache: the hub cannot be reached (["
    )
    said = refusal("acme/other")
    assert said.startswith(
        "acme/other: no directory has this name, and the hub at http://127.0.0.1:9 cannot be "
        "reached"
    )
    assert "check the connection and HF_ENDPOINT" in said


def test_a_hub_with_server_errors_counts_as_unreachable(hub: Hub) -> None:
    hub.failing = 503
    assert "cannot be reached (" in refusal()
    hub.failing = 0
    source = load().source
    hub.failing = 503
    assert load().source == source


# --- errors of the hub ----------------------------------------------------------------------------


def test_gated_missing_and_private_repositories_are_errors_with_advice(
    hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("acme/gated", files_of(model))
    hub.gated.add("acme/gated")
    assert refusal("acme/gated") == (
        f"acme/gated is gated: accept its conditions on {hub.endpoint}/acme/gated, then log in "
        "with `hf auth login` or set HF_TOKEN"
    )
    hub.add("acme/private", files_of(model))
    hub.private.add("acme/private")
    for name in ("acme/missing", "acme/private"):
        assert refusal(name) == (
            f"no directory is named '{name}', and {hub.endpoint} has no such repository that "
            "you can access: check the name; for a private one log in with `hf auth login` or set "
            "HF_TOKEN"
        )
    hub.token = "hf_right"
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "the hub refuses the token" in refusal("acme/private")
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert load("acme/private").source.startswith("acme/private@")


def test_missing_revisions_and_invalid_names_are_errors(hub: Hub) -> None:
    assert refusal(f"{NAME}@v9") == (
        f"{NAME} has no revision 'v9': {hub.endpoint}/{NAME}/refs lists its branches and tags"
    )
    assert refusal("acme/a--b").startswith("'acme/a--b' is not a repository id: ")
    assert refusal("gpt2").startswith("'gpt2' is not a repository id: expected ORGANISATION/NAME")
    assert refusal("a/b/c").startswith("'a/b/c' is not a repository id")


def test_an_unwritable_cache_is_an_error(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "/proc/no/such")
    said = refusal()
    assert said.startswith(NAME)
    assert "/proc" in said


@pytest.mark.parametrize(
    ("source", "claims"),
    [
        ("Qwen/Qwen3-14B", True),
        ("Qwen/Qwen2.5-0.5B-Instruct", True),
        ("Qwen/Qwen3-14B@main", True),
        ("Qwen/Qwen3-14B@refs/pr/1", True),
        ("qwen", False),
        ("a/b/c", False),
        ("./models/x", False),
        ("/models/x", False),
        ("~/x", False),
        ("a/..", False),
        ("a/b c", False),
        ("a/b@", False),
        ("a/b@x@y", False),
        ("a/model.gguf", False),
        ("a/b\n", False),
        ("", False),
        ("\0/x", False),
        ("here/model", False),
        ("acme/tiny/", True),
        ("acme/tiny:main", True),
        ("acme/tiny:Q4_K_M", True),
        ("https://huggingface.co/acme/tiny", True),
        ("huggingface.co/acme/tiny", True),
        ("huggingface.co/tiny", True),
        ("hf://acme/tiny", True),
        ("https://example.org/acme/tiny", False),
        ("s3://acme/tiny", False),
        ("file:///acme/tiny", False),
    ],
)
def test_can_load_claims_repository_ids_and_not_paths(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, claims: bool
) -> None:
    (tmp_path / "here" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    loader = plugins.load(plugins.find("loader", "hf-hub"))
    assert plugins.call(loader, "can_load", source=source) is claims
    assert hub.requests == []


@pytest.mark.parametrize(
    "source",
    [
        "acme/tiny/",
        "acme/tiny@v1/",
        "hf://acme/tiny@v1",
        "https://huggingface.co/acme/tiny",
        "http://www.huggingface.co/acme/tiny/",
        "hf.co/acme/tiny/tree/v1",
        "https://huggingface.co/acme/tiny/tree/v1/",
        "https://huggingface.co/acme/tiny/blob/v1/config.json",
        "https://huggingface.co/acme/tiny/resolve/v1/model.safetensors?download=true",
        "{}/acme/tiny/tree/v1",
    ],
)
def test_an_address_of_the_hub_is_an_id_with_a_revision(
    hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    main = hub.add(NAME, files_of(model))
    tagged = hub.add(NAME, files_of(model) | {"README.md": b"of v1"}, "v1")
    commit = tagged if "v1" in source else main
    assert load(source.format(hub.endpoint)).source == f"{NAME}@{commit}"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("acme/tiny:main", "for the revision 'main' write acme/tiny@main"),
        ("hf.co/acme/tiny:Q4_K_M", "run `hf download acme/tiny --include '*Q4_K_M*.gguf'`, then"),
        (
            "https://huggingface.co/acme/tiny/blob/main/a/tiny.gguf",
            "run `hf download acme/tiny a/tiny.gguf`, then give the path of the file",
        ),
        (
            "https://huggingface.co/acme/tiny/tree/v1/sub/model",
            "run `hf download acme/tiny --revision v1 --include 'sub/model/*'`, then give the path",
        ),
        ("hf.co/acme/tiny/blob/main/sub/config.json", "names a folder of a repository"),
        ("https://huggingface.co/datasets", "is not a repository id"),
    ],
)
def test_what_the_hub_loader_does_not_take_is_told_with_what_to_write(
    hub: Hub, source: str, said: str
) -> None:
    assert said in refusal(source)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("HTTPS_PROXY", "foo://127.0.0.1:9", "HTTPS_PROXY is not the address of a proxy"),
        ("HTTPS_PROXY", "127.0.0.1:9", "check the connection, HTTPS_PROXY and HF_ENDPOINT"),
        ("SSL_CERT_FILE", "/none", "SSL_CERT_FILE names '/none', which does not exist"),
        ("HF_TOKEN", "hf_ü", "HF_TOKEN holds characters that no token has"),
        ("HF_ENDPOINT", "huggingface.co", "HF_ENDPOINT is 'huggingface.co': expected an address"),
        ("HF_ENDPOINT", "http://[x", "HF_ENDPOINT is 'http://[x': expected an address"),
    ],
)
def test_an_environment_variable_that_is_wrong_is_named(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, said: str
) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv(variable, value)
    if variable == "HF_ENDPOINT":
        monkeypatch.setattr(constants, "ENDPOINT", value)
    elif variable != "HF_TOKEN":
        monkeypatch.setattr(constants, "ENDPOINT", "https://127.0.0.1:9")
    close_session()  # the connection of the earlier environment
    try:
        assert said in refusal()
    finally:
        close_session()


def test_a_socks_proxy_without_the_library_for_it_is_named(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "socksio", None)
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    close_session()
    try:
        assert "ALL_PROXY names a SOCKS proxy: `pip install socksio`" in refusal()
    finally:
        close_session()


def test_a_cache_that_lies_below_a_file_is_named_with_its_variable(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HF_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    assert refusal().startswith(f"HF_HOME: the cache of the hub is {tmp_path}/file/hub, but ")


# --- long downloads -------------------------------------------------------------------------------


class Told:
    """An observer that records the progress of downloads."""

    def __init__(self) -> None:
        self.reports: list[tuple[str, int, int]] = []
        self.threads: set[int] = set()

    @hookimpl
    def on_prepare(self, what: str, done: int, total: int) -> None:
        self.reports.append((what, done, total))
        self.threads.add(threading.get_ident())


def big(model: Path) -> Files:
    """A model of 25 MB, mostly padding. huggingface_hub downloads in chunks of 10 MiB."""
    files = files_of(model)
    weights = files["model.safetensors"]
    size = int.from_bytes(weights[:8], "little")
    header = json.loads(weights[8 : 8 + size])
    end = max(v["data_offsets"][1] for k, v in header.items() if k != "__metadata__")
    # A frequency buffer, which a checkpoint may contain and hf-local ignores.
    header["model.layers.0.self_attn.rotary_emb.inv_freq"] = {
        "dtype": "U8", "shape": [25_000_000], "data_offsets": [end, end + 25_000_000]
    }  # fmt: skip
    text = json.dumps(header).encode()
    padding = bytes(range(250)) * 100_000
    new = len(text).to_bytes(8, "little") + text + weights[8 + size :] + padding
    return files | {"model.safetensors": new}


def test_observers_receive_the_progress_of_a_download(hub: Hub, model: Path) -> None:
    hub.add(NAME, big(model))
    hub.stall = "model.safetensors", 15_000_000
    threading.Timer(1.0, hub.stalled.set).start()
    told = Told()
    with LLMEngine.from_plugins(observers=[told]) as engine:
        commit = engine.load(NAME).source.partition("@")[2]
        reports, told.reports = told.reports, []
        engine.load(NAME)
    *running, last = reports
    assert {(what, total) for what, _, total in running} == {(f"downloading {NAME} (MB)", 26)}
    done = [done for _, done, _ in running]
    assert done == sorted(done)
    assert 0 < max(done) < 26
    assert last == (f"downloaded {NAME}@{commit[:12]}: 26 MB", 26, 26)
    assert told.threads == {threading.get_ident()}
    assert told.reports == [], "nothing was downloaded the second time"


def test_a_broken_download_resumes_where_it_stopped(hub: Hub, model: Path) -> None:
    commit = hub.add(NAME, big(model))
    hub.broken["model.safetensors"] = [15_000_000]
    load()
    ranges = [r for method, path, r in hub.requests if method == "GET" and "safetensors" in path]
    assert ranges == ["", f"bytes={10 * 2**20}-"]
    stored = (snapshot(commit) / "model.safetensors").read_bytes()
    assert stored == hub.repositories[NAME]["main"]["model.safetensors"]


def test_complete_files_are_kept_when_a_download_fails(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    hub.broken["model.safetensors"] = [0] * 10
    said = refusal()
    assert "load it again" in said
    assert "complete files are kept" in said
    hub.broken.clear()
    before = set(hub.downloads())
    hub.requests.clear()
    load()
    assert set(hub.downloads()) == {"model.safetensors"}
    assert before == NEEDED


def tilewright(
    hub: Hub, tmp_path: Path, *arguments: str, prefix: tuple[str, ...] = (), **environment: str
) -> "subprocess.Popen[str]":
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "COLUMNS"))}
    given = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_CACHE": str(tmp_path / "cache")}
    return subprocess.Popen(
        [*prefix, sys.executable, "-m", "tilewright", *arguments],
        env=kept | given | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_run_reports_the_commit_and_prints_no_progress_to_a_pipe(
    hub: Hub, tmp_path: Path
) -> None:
    process = tilewright(
        hub, tmp_path, "generate", "--json", "--max-new-tokens", "2", "--model", NAME, "hi"
    )
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    (commit,) = hub.repositories[NAME].keys() - {"main"}
    assert json.loads(out)["source"] == f"{NAME}@{commit}"
    assert "%" not in err
    assert "MB" not in err
    assert [line for line in err.splitlines() if not line.startswith(("note: ", "warning: "))] == []


def test_ctrl_c_stops_a_download_and_the_next_run_completes_it(
    hub: Hub, model: Path, tmp_path: Path
) -> None:
    hub.add(NAME, big(model))
    hub.stall = "model.safetensors", 1_000_000
    process = tilewright(hub, tmp_path, "generate", "--model", NAME, "hi")
    while "model.safetensors" not in hub.downloads():
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in err
    hub.stalled.set()
    hub.requests.clear()
    assert load().source.startswith(NAME)
    assert "model.safetensors" in hub.downloads()


def test_the_loader_passes_the_conformance_suite(hub: Hub, tmp_path: Path) -> None:
    process = tilewright(hub, tmp_path, "plugins", "verify", "hf-hub", "--source", NAME, "--json")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 3, err  # some tests cannot be run
    (report,) = json.loads(out)
    outcomes = [statement["result"] for statement in report["statements"]]
    assert "failed" not in outcomes
    assert outcomes.count("passed") > 25  # the tests that damage files need a directory


SMALL_DISK = ("unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=$0 none "$1"; shift; exec "$@"')


@pytest.mark.parametrize("told", [True, False], ids=["sizes known", "sizes wrong"])
def test_a_full_disk_is_an_error_that_names_the_cache(
    hub: Hub, model: Path, tmp_path: Path, told: bool
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    prefix = (*SMALL_DISK, "4m", str(cache))
    if subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("this machine does not let a user mount a small disk")
    hub.add(NAME, big(model))
    hub.tells_sizes = told
    process = tilewright(hub, tmp_path, "generate", "--model", NAME, "hi", prefix=prefix)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (2, "")
    *before, last = err.splitlines()
    assert [line for line in before if "Traceback" in line] == []
    if told:
        assert before == []
        assert f"{NAME} needs 0.03 GB more in {cache}, where 0.00 GB are free: free spa" in last
    else:
        assert (
            f"{NAME}: the disk that holds {cache} is full; complete files are kept: free spa"
            in last
        )
