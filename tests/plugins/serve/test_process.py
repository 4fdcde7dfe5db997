"""``tilewright serve`` as a process: its settings, its signals, and its end."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tilewright.cli import main
from tilewright.settings import DEMO_MODEL

STREAM = {"prompt": "We hold", "stream": True, "ignore_eos": True}


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("TILEWRIGHT_") or name == "TASK_DEVICE":
            monkeypatch.delenv(name)


@contextmanager
def serving(*flags: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server's process, and its URL once it serves."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tilewright", "serve", *flags],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )
    try:
        assert process.stderr
        for line in process.stderr:
            if line.startswith("serving "):
                yield process, line.split(" at ")[1].strip()
                return
        raise AssertionError(f"it did not start: exit code {process.wait()}")
    finally:
        process.kill()
        process.communicate()


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code, and what it said since it serves."""
    _, said = process.communicate(timeout=60)
    return process.returncode, said


def refuses(url: str) -> bool:
    try:
        httpx.get(f"{url}/health")
    except httpx.ConnectError:
        return True
    return False


def test_a_run_file_with_two_models_and_a_key_and_what_runs_at_sigterm_finishes(
    tmp_path: Path,
) -> None:
    (tmp_path / "run.toml").write_text(
        f'[model]\nid = "one"\npath = "{DEMO_MODEL}"\n'
        f'[serve]\nport = 1\napi_key = "secret"\nmodels = ["two={DEMO_MODEL}"]\n'
        '[runtime]\nweight_dtype = "float32"\n'
    )
    file = str(tmp_path / "run.toml")
    with (
        serving(file, TILEWRIGHT_SERVE_PORT="0") as (process, url),
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        assert client.get("/v1/models").status_code == 401
        client.headers["Authorization"] = "Bearer secret"
        models = [model["id"] for model in client.get("/v1/models").json()["data"]]
        assert models == ["one", "two"]
        body = STREAM | {"model": "two", "max_tokens": 200}
        with client.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            while not refuses(url):
                time.sleep(0.01)
            events = [line.removeprefix("data: ") for line in lines if line]
        assert events[-1] == "[DONE]"
        assert json.loads(events[-2])["choices"][0]["finish_reason"] == "length"
        assert ended(process) == (0, "")

    assert main(["run", file, "--show"]) == 0  # other commands leave the server's settings alone


SLOW = ["--port", "0", "--max-batch-size", "1"]
"""One text after the other: hundreds do not end by themselves while a test runs."""


def test_what_takes_longer_than_the_shutdown_timeout_ends_with_an_error() -> None:
    with (
        serving(*SLOW, "--shutdown-timeout", "0.1") as (process, url),
        httpx.Client(base_url=url, timeout=60) as client,
        socket.create_connection((client.base_url.host, client.base_url.port or 0)) as half,
    ):
        half.sendall(b"POST /v1/completions HTTP/1.1\r\ncontent-length: 9\r\n\r\n{")
        body = STREAM | {"n": 100, "max_tokens": 200}
        with client.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGINT)
            events = [line.removeprefix("data: ") for line in lines if line]
        assert events[-1] == "[DONE]"
        assert json.loads(events[-2])["error"]["type"] == "overloaded_error"
        code, said = ended(process)
        assert code == 0
        assert len(said.splitlines()) == 1, said
        assert "0.1 seconds" in said


def test_a_second_signal_ends_it_at_once() -> None:
    with serving(*SLOW, "--host", "0.0.0.0") as (process, url):
        body = STREAM | {"n": 100, "max_tokens": 200}
        address = url.replace("0.0.0.0", "127.0.0.1")
        with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()  # which closes the connection when nobody holds it
            next(lines)
            process.send_signal(signal.SIGTERM)
            while not refuses(address):
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            assert ended(process) == (128 + signal.SIGINT, "")


def call(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """What a call says that must not serve."""
    assert main(["serve", *flags]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err


def test_a_port_in_use_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    def load(*arguments: object) -> None:
        raise AssertionError("a model is loaded for nothing")

    monkeypatch.setattr("tilewright.engine.LLMEngine.init_model", load)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        (line,) = call(capsys, "--port", str(port)).splitlines()
    assert "Address already in use" in line
    assert str(port) in line


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--model", "/nowhere"], "/nowhere"),
        (["--model", "a=/nowhere"], "/nowhere"),
        (["--model", f"a={DEMO_MODEL}", "--model", f"a={DEMO_MODEL}"], "two models are named 'a'"),
        (["--model", "a="], "expected [NAME=]MODEL"),
        (["--port", "65536"], "--port"),
        (["--max-queue", "-1"], "--max-queue"),
    ],
)
def test_what_cannot_be_served_is_one_line(
    capsys: pytest.CaptureFixture[str], flags: list[str], expected: str
) -> None:
    (line,) = call(capsys, "--port", "0", *flags).splitlines()
    assert expected in line


def test_a_key_that_the_table_does_not_have_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "run.toml").write_text("[serve]\nprot = 1\n")
    error = call(capsys, str(tmp_path / "run.toml"))
    assert "prot" in error
    assert "port" in error


def test_other_machines_without_a_key_are_warned_of(
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["--host", "0.0.0.0", "--port", "0", "--model", "/nowhere"]
    assert "--api-key" in call(capsys, *flags)
    assert "--api-key" not in call(capsys, *flags, "--api-key", "secret")
    assert "--api-key" not in call(capsys, "--port", "0", "--model", "/nowhere")
