"""Answers of the two generating endpoints are what the engine generates for the same prompt."""

import json
from collections.abc import Iterator
from math import isclose
from typing import Any

import httpx
import pytest
from serving import events, serving

from tilewright import Chat, GenerateConfig, LLMEngine, RuntimeConfig
from tilewright.settings import DEMO_MODEL
from tilewright_guidance.structured import StructuredOutputProcessor
from tilewright_serve import create_app

PROMPT = "We hold these truths to be self-evident,"
QUESTION = [{"role": "user", "content": "How does the Declaration begin?"}]
GREEDY = {"temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def engine() -> Iterator[LLMEngine]:
    with LLMEngine.from_plugins() as engine:
        runtime = RuntimeConfig(weight_dtype="float32", max_seq_len=256)
        engine.init_model("demo", DEMO_MODEL, runtime)
        yield engine


@pytest.fixture(scope="module")
def client(engine: LLMEngine) -> Iterator[httpx.Client]:
    app = create_app(engine)
    with serving(app) as url, httpx.Client(base_url=url, timeout=30) as client:
        yield client


def answer(client: httpx.Client, path: str, **body: Any) -> Any:
    found = client.post(f"/v1/{path}", json=body)
    assert found.status_code == 200, found.text
    return found.json()


def chunks(client: httpx.Client, path: str, **body: Any) -> list[dict[str, Any]]:
    found = client.post(f"/v1/{path}", json={**body, "stream": True})
    assert found.status_code == 200, found.text
    *made, end = events(found.text)
    assert end == "[DONE]"
    return made


def generated(engine: LLMEngine, prompt: Any, **settings: Any) -> Any:
    config = GenerateConfig(**{"max_new_tokens": 12, "temperature": 0.0, **settings})
    return engine.generate_result("demo", prompt, config)


def test_prompts_may_be_text_token_ids_and_lists_of_both(
    client: httpx.Client, engine: LLMEngine
) -> None:
    ids = engine.model("demo").text.encode(PROMPT)
    expected = generated(engine, PROMPT).text
    for prompt, count in ((PROMPT, 1), (ids, 1), ([PROMPT, PROMPT], 2), ([ids, ids], 2)):
        found = answer(client, "completions", prompt=prompt, **GREEDY)
        assert [choice["text"] for choice in found["choices"]] == [expected] * count
        assert found["usage"]["prompt_tokens"] == count * len(ids)


@pytest.mark.parametrize("temperature", [0, 1.5])
@pytest.mark.parametrize("stop", [None, [" of", "zzz"]])
def test_joined_chunks_are_the_whole_text(
    client: httpx.Client, engine: LLMEngine, temperature: float, stop: list[str] | None
) -> None:
    body = {"prompt": PROMPT, "max_tokens": 30, "temperature": temperature, "seed": 7, "stop": stop}
    body |= {"n": 3, "logprobs": 1}
    whole = answer(client, "completions", **body)
    texts, tokens = ["", "", ""], [[], [], []]
    ends: list[list[str]] = [[], [], []]
    for event in chunks(client, "completions", **body):
        (choice,) = event["choices"]
        texts[choice["index"]] += choice["text"]
        tokens[choice["index"]] += choice["logprobs"]["tokens"] if choice["logprobs"] else []
        ends[choice["index"]] += [choice["finish_reason"]] if choice["finish_reason"] else []
    for i, choice in enumerate(whole["choices"]):
        assert texts[i] == choice["text"]
        assert tokens[i] == choice["logprobs"]["tokens"]
        assert ends[i] == [choice["finish_reason"]]
        config = {"temperature": float(temperature), "seed": 7 + i, "stop": tuple(stop or ())}
        assert choice["text"] == generated(engine, PROMPT, max_new_tokens=30, **config).text


def test_texts_of_one_request_start_together(client: httpx.Client, engine: LLMEngine) -> None:
    count = engine.model("demo").runtime.max_batch_size
    before = engine.stats("demo").num_steps
    body = {"prompt": PROMPT, "n": count, "max_tokens": count, "ignore_eos": True}
    assert len(answer(client, "completions", **body)["choices"]) == count
    assert engine.stats("demo").num_steps - before < 1.75 * count  # one after the other: twice


def test_a_grammar_is_compiled_once_for_the_texts_of_a_request(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []
    matcher = StructuredOutputProcessor._matcher

    def counted(self: StructuredOutputProcessor, grammar: str) -> Any:
        compiled.append(grammar)
        return matcher(self, grammar)

    monkeypatch.setattr(StructuredOutputProcessor, "_matcher", counted)
    body = {"prompt": PROMPT, "n": 8, "structured_outputs": {"choice": ["once"]}}
    texts = [choice["text"] for choice in answer(client, "completions", **body)["choices"]]
    assert texts == ["once"] * 8
    assert len(compiled) == 1


def test_usage_while_a_stream_runs_counts_each_prompt_once(client: httpx.Client) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"prompt": [PROMPT, PROMPT + " of"], "n": 2, "stream_options": options, **GREEDY}
    *_, last, end = chunks(client, "completions", **body)
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert last["usage"][name] == end["usage"][name]


def test_characters_of_several_tokens_are_never_cut(client: httpx.Client) -> None:
    text = client.get("/v1/models").json()["data"][0]["id"]
    pieces = "é", "🙂", "漢字"
    for piece in pieces:
        ids = client.post("/tokenize", json={"prompt": piece}).json()["tokens"]
        bias = {str(i): 100 for i in ids}
        body = {"prompt": text, "max_tokens": 24, "temperature": 1, "logit_bias": bias, "seed": 1}
        whole = answer(client, "completions", **body)["choices"][0]["text"]
        joined = "".join(e["choices"][0]["text"] for e in chunks(client, "completions", **body))
        assert joined == whole


def test_echo_scores_the_prompt_as_the_engine_does(client: httpx.Client, engine: LLMEngine) -> None:
    result = generated(engine, PROMPT, max_new_tokens=1, prompt_logprobs=1, logprobs=1)
    expected = [one and one.logprob for one in result.prompt_logprobs]
    for most in (0, 1):
        body = {"prompt": PROMPT, "echo": True, "logprobs": 1, "max_tokens": most, "temperature": 0}
        whole = answer(client, "completions", **body)
        choice = whole["choices"][0]
        scores = choice["logprobs"]["token_logprobs"]
        assert len(scores) == len(expected) + most
        for found, wanted in zip(scores, expected, strict=False):
            assert found is wanted is None or isclose(found, wanted, abs_tol=1e-4)
        assert choice["text"] == PROMPT + (result.text if most else "")
        assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
        assert whole["usage"]["completion_tokens"] == most
        streamed = chunks(client, "completions", **body)
        assert "".join(e["choices"][0]["text"] for e in streamed) == choice["text"]
        told = [e["choices"][0]["logprobs"] for e in streamed]
        assert [t for one in told if one for t in one["tokens"]] == choice["logprobs"]["tokens"]


def test_max_tokens_0_without_echo_is_refused(client: httpx.Client) -> None:
    found = client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 0})
    assert found.status_code == 400
    assert found.json()["error"]["param"] == "max_tokens"


def test_best_of_returns_the_texts_with_the_best_mean_logprob(client: httpx.Client) -> None:
    body = {"prompt": PROMPT, "temperature": 1.5, "max_tokens": 5, "seed": 3, "logprobs": 0}
    all_texts = answer(client, "completions", **body, n=5)["choices"]

    def mean(choice: dict[str, Any]) -> float:
        found = choice["logprobs"]["token_logprobs"]
        return sum(found) / len(found)

    best = sorted(all_texts, key=mean, reverse=True)[:2]
    found = answer(client, "completions", **body, n=2, best_of=5)
    assert [c["text"] for c in found["choices"]] == [c["text"] for c in best]
    assert [c["index"] for c in found["choices"]] == [0, 1]


def test_a_chat_is_answered_as_the_engine_does(client: httpx.Client, engine: LLMEngine) -> None:
    result = generated(engine, Chat(QUESTION), logprobs=2)
    found = answer(
        client, "chat/completions", messages=QUESTION, logprobs=True, top_logprobs=2, **GREEDY
    )
    choice = found["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": result.text, "refusal": None}
    content = choice["logprobs"]["content"]
    assert b"".join(bytes(one["bytes"]) for one in content).decode() == result.text
    for one, expected in zip(content, result.logprobs, strict=True):
        assert isclose(one["logprob"], expected.logprob, abs_tol=1e-4)
        assert len(one["top_logprobs"]) == 2


def test_a_chat_stream_begins_with_the_role_and_ends_with_usage_if_asked(
    client: httpx.Client,
) -> None:
    for options in (None, {"include_usage": True}):
        body = {"messages": QUESTION, "stream_options": options, **GREEDY}
        found = chunks(client, "chat/completions", **body)
        assert len({event["id"] for event in found}) == 1
        assert found[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        if options:
            last = found.pop()
            assert last["choices"] == []
            assert last["usage"]["completion_tokens"] == 12
            assert all(event["usage"] is None for event in found)
        assert all(len(event["choices"]) == 1 for event in found)
        ends = [event["choices"][0]["finish_reason"] for event in found]
        assert [end for end in ends if end] == ["length"]


def test_a_chat_continues_its_last_message(client: httpx.Client, engine: LLMEngine) -> None:
    messages = [*QUESTION, {"role": "assistant", "content": "When in the"}]
    result = generated(engine, Chat(messages, continue_last=True))
    body = {"messages": messages, "continue_final_message": True, "add_generation_prompt": False}
    found = answer(client, "chat/completions", **body, echo=True, **GREEDY)
    assert found["choices"][0]["message"]["content"] == "When in the" + result.text


def test_token_ids_are_returned_if_asked(client: httpx.Client, engine: LLMEngine) -> None:
    result = generated(engine, PROMPT)
    body = {"prompt": PROMPT, "return_token_ids": True, **GREEDY}
    (choice,) = answer(client, "completions", **body)["choices"]
    assert choice["token_ids"] == list(result.token_ids)
    assert choice["prompt_token_ids"] == list(result.prompt_token_ids)
    streamed = [e["choices"][0] for e in chunks(client, "completions", **body)]
    assert [i for one in streamed for i in one["token_ids"]] == list(result.token_ids)
    assert streamed[0]["prompt_token_ids"] == list(result.prompt_token_ids)


def test_a_schema_shapes_the_answer_and_one_that_cannot_be_served_is_refused(
    client: httpx.Client,
) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Rome", "Oslo"]}, "old": {"type": "boolean"}},
        "required": ["city", "old"],
        "additionalProperties": False,
    }
    format = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema}}
    body = {"messages": QUESTION, "temperature": 1, "seed": 5, "max_tokens": 200}
    found = answer(client, "chat/completions", **body, response_format=format)
    made = json.loads(found["choices"][0]["message"]["content"])
    assert made["city"] in ("Rome", "Oslo")
    assert isinstance(made["old"], bool)
    for outputs in ({"regex": "[0-9]{3}-[ab]"}, {"choice": ["yes", "no"]}):
        text = answer(client, "completions", prompt="x", structured_outputs=outputs, **GREEDY)
        assert text["choices"][0]["finish_reason"] == "stop"
    schema["properties"]["old"] = {"type": "string", "format": "unheard-of"}
    refused = client.post("/v1/chat/completions", json={**body, "response_format": format})
    assert refused.status_code == 400
    assert "unheard-of" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("suffix", "x"),
        ("use_beam_search", True),
        ("functions", [{"name": "f"}]),
        ("audio", {"a": 1}),
    ],
)
def test_fields_that_would_mislead_are_refused(
    client: httpx.Client, field: str, value: Any
) -> None:
    found = client.post("/v1/completions", json={"prompt": "x", field: value})
    assert found.status_code == 400
    assert found.json()["error"]["param"] == field


def test_null_counts_as_absent(client: httpx.Client) -> None:
    plain = answer(client, "completions", prompt=PROMPT, **GREEDY)
    nulls = dict.fromkeys(("n", "stop", "seed", "logit_bias", "suffix", "top_p", "stream", "echo"))
    found = answer(client, "completions", prompt=PROMPT, **GREEDY, **nulls)
    assert found["choices"] == plain["choices"]


def test_a_request_that_names_no_model_gets_the_only_one() -> None:
    with LLMEngine.from_plugins() as engine:
        for name in ("one", "two"):
            engine.init_model(name, DEMO_MODEL, RuntimeConfig(total_pages=32))
        with serving(create_app(engine)) as url, httpx.Client(base_url=url) as client:
            assert [m["id"] for m in client.get("/v1/models").json()["data"]] == ["one", "two"]
            body = {"prompt": "x", "max_tokens": 1}
            found = client.post("/v1/completions", json=body)
            assert found.status_code == 400
            assert "one, two" in found.json()["error"]["message"]
            named = client.post("/v1/completions", json={**body, "model": "two"})
            assert named.json()["model"] == "two"


def test_the_emulated_npu_is_served_too() -> None:
    options = {"executor": {"platform": "emulated"}}
    with LLMEngine.from_plugins(executor="pypto-npu", options=options) as engine:
        engine.init_model("demo", DEMO_MODEL, RuntimeConfig(page_size=16, max_seq_len=64))
        expected = generated(engine, PROMPT, max_new_tokens=3).text
        with serving(create_app(engine)) as url, httpx.Client(base_url=url, timeout=60) as client:
            body = {"prompt": PROMPT, "max_tokens": 3, "temperature": 0, "n": 2}
            found = answer(client, "completions", **body)
            assert [choice["text"] for choice in found["choices"]] == [expected] * 2
            stats = client.get("/stats").json()["models"]["demo"]
            assert stats["device"] == "emulated"


def test_the_names_of_a_chat_are_in_its_errors(client: httpx.Client) -> None:
    long = [{"role": "user", "content": "word " * 600}]
    for body, param in (
        ({"messages": long}, "messages"),
        ({"messages": QUESTION, "max_completion_tokens": 10_000}, "max_completion_tokens"),
        ({"messages": QUESTION, "max_tokens": 10_000}, "max_tokens"),
    ):
        found = client.post("/v1/chat/completions", json=body)
        assert found.status_code == 400
        assert found.json()["error"]["param"] == param
        assert found.json()["error"]["code"] == "context_length_exceeded"


def test_token_ids_become_the_text_that_they_were_made_of(client: httpx.Client) -> None:
    text = "<|im_start|>user\nnaïve 🙂<|im_end|>\n"
    ids = client.post("/tokenize", json={"prompt": text}).json()["tokens"]
    assert client.post("/detokenize", json={"tokens": ids}).json() == {"prompt": text}


def test_events_are_ascii_so_that_every_client_ends_lines_at_the_same_places(
    client: httpx.Client,
) -> None:
    text = "a\u2028b\u0085c"
    body = {"prompt": text, "echo": True, "stream": True, "max_tokens": 1, "temperature": 0}
    with client.stream("POST", "/v1/completions", json=body) as response:
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert json.loads(lines[0].removeprefix("data: "))["choices"][0]["text"] == text
