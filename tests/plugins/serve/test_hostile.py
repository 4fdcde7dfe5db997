"""Hostile requests get an error that says what is wrong, and delay or end nobody else's."""

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from serving import serving

from tilewright import LLMEngine, RuntimeConfig
from tilewright.settings import DEMO_MODEL
from tilewright_serve import create_app

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
TEXT = {"prompt": "We hold", "max_tokens": 1}


@pytest.fixture(scope="module")
def engine() -> Iterator[LLMEngine]:
    with LLMEngine.from_plugins() as engine:
        engine.init_model("demo", DEMO_MODEL, RuntimeConfig(max_seq_len=256))
        yield engine


@pytest.fixture(scope="module")
def client(engine: LLMEngine) -> Iterator[httpx.Client]:
    with serving(create_app(engine)) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("prompt", [1, "a"], "'prompt[1]' should be a valid integer, found 'a'"),
        ("prompt", ["a", 1], "'prompt[1]' should be a valid string, found 1"),
        ("prompt", [-1], "'prompt[0]' should be greater than or equal to 0, found -1"),
        ("stop", "", "'stop' should have at least 1 character, found ''"),
        ("stop", ["a", ""], "'stop[1]' should have at least 1 character, found ''"),
        ("stop", ["a"] * 5000, "'stop' should have at most 4096 items, found"),
        ("stop_token_ids", [1] * 5000, "'stop_token_ids' should have at most 4096 items, found"),
        ("logit_bias", {"1" * 5000: 1}, "'logit_bias' must have token ids as keys, found '1111"),
        ("guided_json", {}, "'guided_json' is not served: use structured_outputs"),
        ("structured_outputs", {"choice": ["a" * 200_000]}, "structured-output: expected a gra"),
    ],
)
def test_what_is_wrong_with_a_text(
    client: httpx.Client, field: str, value: Any, message: str
) -> None:
    found = client.post("/v1/completions", json={**TEXT, field: value})
    assert found.status_code == 400
    assert found.json()["error"]["message"].startswith(message)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("messages", [], "'messages' should have at least 1 item, found []"),
        ("messages", [{}] * 40_000, "'messages' should have at most 32768 items, found"),
        ("tool_choice", {"type": "function"}, "'tool_choice.function' is missing"),
        ("web_search_options", {}, "'web_search_options' is not served"),
    ],
)
def test_what_is_wrong_with_a_chat(
    client: httpx.Client, field: str, value: Any, message: str
) -> None:
    found = client.post("/v1/chat/completions", json={**CHAT, field: value})
    assert found.status_code == 400
    assert found.json()["error"]["message"].startswith(message)


def test_settings_that_contradict_each_other_are_the_clients_mistake(client: httpx.Client) -> None:
    body = {**TEXT, "max_tokens": 8, "min_tokens": 8, "structured_outputs": {"choice": ["a"]}}
    found = client.post("/v1/completions", json=body)
    assert found.status_code == 400
    assert "change these settings" in found.json()["error"]["message"]
    assert client.get("/health").status_code == 200


def test_no_alternatives_may_be_asked_for_without_logprobs(client: httpx.Client) -> None:
    found = client.post("/v1/chat/completions", json={**CHAT, "top_logprobs": 0})
    assert found.status_code == 200
    assert found.json()["choices"][0]["logprobs"] is None


@pytest.mark.parametrize("count", [2500])
def test_a_long_chain_of_references_is_served(client: httpx.Client, count: int) -> None:
    """llguidance follows one by recursion: on a usual stack, it would end the process."""
    schemas = {f"d{i}": {"items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(count)}
    schema = {"$defs": {**schemas, f"d{count}": {"type": "integer"}}, "$ref": "#/$defs/d0"}
    found = client.post("/v1/completions", json={**TEXT, "structured_outputs": {"json": schema}})
    assert found.status_code == 200


def test_a_grammar_that_takes_forever_is_refused(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tilewright_guidance.structured._MOST_SECONDS", 0.2)
    # 15: the thread that goes on ends soon after the test.
    patterns = [{"type": "string", "pattern": f".*a{i}.*"} for i in range(15)]
    body = {**TEXT, "structured_outputs": {"json": {"allOf": patterns}}}
    found = client.post("/v1/completions", json=body)
    assert found.status_code == 400
    assert "not compiled after 0.2 seconds" in found.json()["error"]["message"]
    assert client.post("/v1/completions", json=TEXT).status_code == 200


def test_others_are_answered_while_a_long_text_is_tokenized(engine: LLMEngine) -> None:
    text = engine.model("demo").text

    async def turns_meanwhile() -> int:
        turns = 0
        long = asyncio.ensure_future(asyncio.to_thread(text.encode, "hello world " * 20_000))
        while not long.done():
            turns += 1
            await asyncio.sleep(0.001)
        return turns

    assert asyncio.run(turns_meanwhile()) > 3
