"""The server answers as vLLM 0.32 did: tests/data/openai_vllm_0.32_smollm2_fp32.jsonl.

vLLM served the weights, dequantised to bfloat16, in float32 on a CPU, with 1,024 tokens of context.
"""

import json
from collections.abc import Iterator
from math import isclose
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import events, serving
from smollm2 import convert, download

from tilewright import LLMEngine, RuntimeConfig
from tilewright_serve import create_app

pytestmark = pytest.mark.slow

CASES = [
    json.loads(line)
    for line in (Path(__file__).parents[2] / "data/openai_vllm_0.32_smollm2_fp32.jsonl")
    .read_text()
    .splitlines()
]

DIFFERENT = {
    "null fields": (200, "a field that is null counts as absent, also n"),
    "model": (200, "vLLM serves no GET /v1/models/{id}; OpenAI's API does"),
}
"""Cases whose status differs on purpose: ours, and why."""

SAMPLED = {"completion n 2", "chat n 2", "completion best_of"}
"""Cases whose text depends on random numbers, which only the form can be compared of."""

OWN_GRAMMAR = {"chat json object", "chat json schema"}
"""Cases whose text depends on how much white space a grammar allows."""

RAW = {
    "error not JSON": (b'{"prompt": ', "application/json"),
    "error no body": (b"", "application/json"),
    "error content type": (b"prompt=x", "text/plain"),
    "tokenize": (b'{"prompt": "1 2 3 4 5 6 7"}', "application/json"),
    "detokenize": (b'{"tokens": [33, 216, 34]}', "application/json"),
}
"""What was sent where the file does not say it."""


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    directory = tmp_path_factory.mktemp("smollm2") / "model"
    convert(download(directory.parent), directory, "bfloat16")
    with LLMEngine.from_plugins() as engine:
        runtime = RuntimeConfig(weight_dtype="float32", max_seq_len=1024)
        engine.init_model("smol", directory, runtime)
        with serving(create_app(engine)) as url, httpx.Client(base_url=url, timeout=60) as client:
            yield client


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["case"].replace(" ", "-"))
def test_the_answer_is_as_recorded(case: dict[str, Any], client: httpx.Client) -> None:
    name, expected = case["case"], case["answer"]
    content, kind = RAW.get(name, (None, "application/json"))
    if content is None and case["body"] is not None:
        content = json.dumps(case["body"]).encode()
    headers = {} if content is None else {"content-type": kind}
    found = client.request(case["method"], case["path"], content=content, headers=headers)
    assert found.status_code == DIFFERENT.get(name, (case["status"],))[0], found.text
    if name in DIFFERENT or case["path"] == "/metrics" or name in ("health", "version", "models"):
        return
    if case["status"] != 200:
        error = found.json()["error"]
        assert error.keys() >= {"message", "type", "param", "code"}
        assert error["message"]
        if "error" in expected and expected["error"]["type"] != "Bad Request":
            # vLLM names the field after body. where pydantic found the error.
            assert error["param"] in (expected["error"]["param"], PARAMS.get(name))
        return
    if case["type"].startswith("text/event-stream"):
        assert found.headers["content-type"] == case["type"]
        check_stream(expected, events(found.text))
    elif case["path"].startswith("/v1/"):
        check_whole(name, expected, found.json())
    else:
        assert found.json() == expected


PARAMS = {
    "error no prompt": "prompt",
    "error empty messages": "messages",
    "error too long": "prompt",
    "error token id outside": "prompt",
    "chat tools forced": "messages",
}
"""The field that we name where vLLM names another one or none."""


def check_whole(name: str, expected: dict[str, Any], found: dict[str, Any]) -> None:
    assert found["object"] == expected["object"]
    assert found["id"].partition("-")[0] == expected["id"].partition("-")[0]
    assert len(found["choices"]) == len(expected["choices"])
    usage = {key: expected["usage"][key] for key in USAGE}
    if name in OWN_GRAMMAR:
        assert found["usage"]["prompt_tokens"] == usage["prompt_tokens"]
        json_is_begun(found["choices"][0])
        return
    if name == "completion best_of":  # vLLM ignores best_of; each text costs
        usage["completion_tokens"] = 4
        usage["total_tokens"] = usage["prompt_tokens"] + 4
    assert {key: found["usage"][key] for key in USAGE} == usage
    for ours, theirs in zip(found["choices"], expected["choices"], strict=True):
        assert ours["index"] == theirs["index"]
        assert ours["finish_reason"] == theirs["finish_reason"]
        assert ours["stop_reason"] == theirs["stop_reason"]
        if name in SAMPLED:
            continue
        if "text" in theirs:
            assert ours["text"] == theirs["text"]
        else:
            for key in ("role", "content", "refusal"):
                assert ours["message"][key] == theirs["message"][key]
        same_numbers(ours["logprobs"], theirs["logprobs"])


USAGE = ("prompt_tokens", "completion_tokens", "total_tokens")


def json_is_begun(choice: dict[str, Any]) -> None:
    content = choice["message"]["content"]
    assert content.lstrip().startswith("{")
    if choice["finish_reason"] == "stop":
        json.loads(content)


def check_stream(expected: list[Any], found: list[Any]) -> None:
    """Chunks may be cut otherwise: all that they say, joined, is the same."""
    assert found[-1] == "[DONE]" == expected[-1]
    ours, theirs = joined(found[:-1]), joined(expected[:-1])
    same_numbers(ours.pop("logprobs"), theirs.pop("logprobs"))
    assert ours == theirs


def joined(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    assert len({chunk["id"] for chunk in chunks}) == 1
    text, ends, usage, logprobs, roles = "", [], None, [], []
    for chunk in chunks:
        if not chunk["choices"]:
            usage = {key: chunk["usage"][key] for key in USAGE}
            continue
        (choice,) = chunk["choices"]
        delta = choice.get("delta") or {}
        roles += [delta["role"]] if delta.get("role") else []
        text += choice.get("text") or delta.get("content") or ""
        ends += [choice["finish_reason"]] if choice["finish_reason"] else []
        logprobs += [choice["logprobs"]] if choice["logprobs"] else []
    return {
        "object": chunks[0]["object"],
        "text": text,
        "ends": ends,
        "usage": usage,
        "logprobs": logprobs,
        "roles": roles,
    }


def same_numbers(found: Any, expected: Any) -> None:
    """Equal, but for numbers that differ by less than 0.001, and for null of absent keys."""
    if isinstance(expected, float):
        assert isclose(found, expected, abs_tol=1e-3)
    elif isinstance(expected, dict):
        assert {k for k, v in found.items() if v is not None} == {
            k for k, v in expected.items() if v is not None
        }
        for key, value in expected.items():
            same_numbers(found.get(key), value)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            same_numbers(one, other)
    else:
        assert found == expected
