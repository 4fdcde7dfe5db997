"""Files and batches over HTTP, as openai's client uses them."""

import asyncio
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from serving import serving
from test_batch import line

from tilewright import GenerateConfig, LLMEngine, RuntimeConfig
from tilewright.errors import ConfigError
from tilewright.settings import DEMO_MODEL
from tilewright_serve import ServeSettings, create_app

openai = pytest.importorskip("openai")
pytest.importorskip("python_multipart")

WHEN = "When in the Course"


def asked(custom_id: str, **body) -> bytes:
    body = {"model": "demo", "prompt": WHEN, "max_tokens": 8, "temperature": 0, **body}
    return line(custom_id, body=body)


@contextmanager
def clients(engine: LLMEngine, folder: Path) -> "Iterator[openai.OpenAI]":
    """A client of a server that keeps batches in a folder."""
    app = create_app(engine, settings=ServeSettings(batch_dir=str(folder)))
    with (
        serving(app) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def engine() -> Iterator[LLMEngine]:
    with LLMEngine.from_plugins() as engine:
        engine.init_model("demo", DEMO_MODEL, RuntimeConfig(max_batch_size=4))
        yield engine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("served") / "batches"


@pytest.fixture(scope="module")
def client(engine, folder):
    with clients(engine, folder) as client:
        yield client


def started(client, *lines: bytes, **more):
    file = client.files.create(file=("in.jsonl", b"\n".join(lines)), purpose="batch")
    return client.batches.create(
        input_file_id=file.id,
        endpoint="/v1/completions",
        completion_window="24h",
        **more,
    )


def ended(client, batch):
    """The batch once it has ended."""
    for _ in range(1200):
        found = client.batches.retrieve(batch.id)
        if found.status in ("completed", "failed", "cancelled"):
            return found
        time.sleep(0.05)
    raise TimeoutError(found)


def test_a_batch_is_answered_and_its_files_can_be_read(client, engine):
    lines = [asked("a"), asked("b", max_tokens=-1), b"not JSON"]
    batch = started(client, *lines, metadata={"of": "tests"})
    assert (batch.status, batch.metadata) == ("validating", {"of": "tests"})
    source = client.files.retrieve(batch.input_file_id)
    assert (source.purpose, source.filename) == ("batch", "in.jsonl")
    assert source.bytes == len(b"\n".join(lines))
    assert client.files.content(source.id).content == b"\n".join(lines)
    batch = ended(client, batch)
    assert (batch.status, batch.errors) == ("completed", None)
    assert batch.request_counts.to_dict() == {"total": 3, "completed": 1, "failed": 2}
    assert batch.created_at <= batch.in_progress_at <= batch.completed_at
    results = {
        r["custom_id"]: r
        for r in map(json.loads, client.files.content(batch.output_file_id).iter_lines())
    }
    text = engine.generate("demo", WHEN, GenerateConfig(max_new_tokens=8, temperature=0))
    assert results["a"]["response"]["body"]["choices"][0]["text"] == text
    assert results["b"]["response"]["status_code"] == 400
    assert results[None]["error"]["code"] == "invalid_json_line"
    assert client.files.retrieve(batch.output_file_id).purpose == "batch_output"


def test_batches_are_listed_page_by_page(engine, tmp_path):
    with clients(engine, tmp_path) as client:
        batches = [started(client, asked("a")) for _ in range(3)]
        assert {ended(client, batch).status for batch in batches} == {"completed"}
        listed = [batch.id for batch in client.batches.list(limit=2)]  # asks for more pages
        assert sorted(listed) == sorted(batch.id for batch in batches)
        assert len(client.batches.list(limit=2).data) == 2


def test_a_cancelled_batch_keeps_what_has_ended(client, engine):
    long = [asked(str(i), max_tokens=200, ignore_eos=True) for i in range(50)]
    batch = started(client, asked("short"), *long)
    while not client.batches.retrieve(batch.id).request_counts.completed:
        time.sleep(0.02)
    assert client.batches.cancel(batch.id).status == "cancelling"
    batch = ended(client, batch)
    assert batch.status == "cancelled"
    assert 1 <= batch.request_counts.completed < 51
    results = client.files.content(batch.output_file_id).content.splitlines()
    assert len(results) == batch.request_counts.completed
    with pytest.raises(openai.BadRequestError, match="it is cancelled"):
        client.batches.cancel(batch.id)


def test_a_batch_goes_on_with_the_next_server(engine, tmp_path):
    with clients(engine, tmp_path) as client:
        batch = started(client, *(asked(str(i), max_tokens=12) for i in range(20)))
        while not client.batches.retrieve(batch.id).request_counts.completed:
            time.sleep(0.02)
    with clients(engine, tmp_path) as client:
        batch = ended(client, batch)
        assert batch.status == "completed"
        assert batch.request_counts.to_dict() == {"total": 20, "completed": 20, "failed": 0}
        results = client.files.content(batch.output_file_id).content.splitlines()
    assert sorted(int(json.loads(r)["custom_id"]) for r in results) == list(range(20))


def test_a_file_without_requests_fails_the_batch(client):
    batch = ended(client, started(client, b"a,b"))
    assert batch.status == "failed"
    (error,) = batch.errors.data
    assert "has no request that can be answered" in error.message


@pytest.mark.parametrize(
    ("endpoint", "file_id", "error"),
    [
        ("/v1/embeddings", None, openai.BadRequestError),
        ("/v1/completions", "file-000000000000000000000000", openai.NotFoundError),
        ("/v1/completions", "../x", openai.NotFoundError),
    ],
)
def test_a_wrong_batch_is_refused(client, endpoint, file_id, error):
    file_id = file_id or client.files.create(file=b"{}", purpose="batch").id
    with pytest.raises(error):
        client.batches.create(input_file_id=file_id, endpoint=endpoint, completion_window="24h")


def test_wrong_files_and_names_are_refused(client, folder):
    before = os.listdir(folder)
    with pytest.raises(openai.BadRequestError, match="'purpose' must be 'batch'"):
        client.files.create(file=b"{}", purpose="fine-tune")
    page = {"sec-fetch-site": "cross-site"}
    with pytest.raises(openai.BadRequestError, match="web pages of other origins"):
        client.files.create(file=b"{}", purpose="batch", extra_headers=page)
    for name in ("batch_x", "..%2f..%2fetc%2fpasswd"):
        with pytest.raises(openai.NotFoundError):
            client.files.retrieve(name)
    with pytest.raises(openai.NotFoundError):
        client.batches.retrieve("batch_000000000000000000000000")
    assert os.listdir(folder) == before


@pytest.mark.parametrize(
    ("path", "content", "kind", "status", "message"),
    [
        ("batches", b"{}", "text/plain", 400, "expected Content-Type application/json"),
        ("batches", b" " * (2**21 + 1), "application/json", 413, "larger than 2097152 bytes"),
        ("files", b"x", "multipart/form-data", 400, "Missing boundary"),
    ],
)
def test_a_body_that_cannot_be_read_is_refused(client, path, content, kind, status, message):
    headers = {"Content-Type": kind}
    answer = httpx.post(f"{client.base_url}{path}", content=content, headers=headers)
    assert answer.status_code == status
    assert message in answer.json()["error"]["message"]


def test_two_servers_cannot_have_one_folder(client, engine, folder):
    app = create_app(engine, settings=ServeSettings(batch_dir=str(folder)))

    async def begin() -> None:
        async with app.router.lifespan_context(app):
            pass

    with pytest.raises(ConfigError, match="another server has it"):
        asyncio.run(begin())


def test_without_a_folder_there_are_no_batches(engine):
    with (
        serving(create_app(engine)) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
        pytest.raises(openai.NotFoundError),
    ):
        client.batches.list()


def test_a_method_that_is_not_served_is_told_all_that_are(client):
    found = httpx.options(str(client.base_url).rstrip("/") + "/batches")
    assert found.status_code == 405
    assert found.headers["allow"] == "GET, HEAD, POST"
