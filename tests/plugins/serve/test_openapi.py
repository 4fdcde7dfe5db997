"""The server does what its OpenAPI document says. Requests are made up by schemathesis."""

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from serving import serving

from tilewright import LLMEngine, RuntimeConfig
from tilewright.settings import DEMO_MODEL
from tilewright_serve import ServeSettings, create_app
from tilewright_serve.openapi import document

schemathesis = pytest.importorskip("schemathesis")
jsonschema_rs = pytest.importorskip("jsonschema_rs")

from schemathesis.specs.openapi.checks import (  # noqa: E402
    negative_data_rejection,
    positive_data_acceptance,
)

KEY = "a-key"

NOT_IN_A_SCHEMA = (
    r"chat message \d+",  # what a role's content may be
    "chat template",  # what a model's template takes
    "'continue_final_message' continues",
    "'echo'",
    "'max_tokens' = 0 needs echo",
    r"'\w+' = \d+ and a prompt of",
    "the prompt has .* tokens",
    "the prompt is empty",
    "'min_tokens' must be at most",
    "'best_of'",
    "structured.output",  # a schema, expression or grammar that is wrong in itself
    "expected one of 'response_format' and 'structured_outputs'",
    "expected at most .* texts of one request",
    "'stream_options' need stream",
    "'top_logprobs' need logprobs",
    "'tool_choice'",
    "'reasoning_effort'",
    "token id",
    "'tokens' has",
    "logit_bias",
    "no model is named",
    r"no \w+ has the id",
)
"""Why a body that its schema allows may be refused."""

FEW = settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
MANY = settings(FEW, max_examples=100)

CHECKED = schemathesis.openapi.from_dict(document(keyed=True, batches=True))
OPERATIONS = [found.ok() for found in CHECKED.get_all_operations()]
POSITIVE, NEGATIVE = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with LLMEngine.from_plugins() as engine:
        runtime = RuntimeConfig(weight_dtype="float32", max_seq_len=64)
        engine.init_model("demo", DEMO_MODEL, runtime)
        kept = str(tmp_path_factory.mktemp("batches"))
        made = create_app(engine, settings=ServeSettings(api_key=KEY, batch_dir=kept))
        with serving(made) as url:
            yield url


def test_the_document_is_served(url: str) -> None:
    assert httpx.get(f"{url}/openapi.json").json() == document(keyed=True, batches=True)


STREAMED = {
    "/v1/completions": {"prompt": "We hold these truths", "logprobs": 1, "echo": True, "n": 2},
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": "Who are you?"}],
        "logprobs": True,
        "top_logprobs": 1,
        "n": 2,
    },
}
USAGE = {"include_usage": True, "continuous_usage_stats": True}
CHUNKS = {"/v1/completions": "CompletionChunk", "/v1/chat/completions": "ChatCompletionChunk"}


@pytest.mark.parametrize("path", STREAMED)
@pytest.mark.parametrize("further", [{}, {"return_token_ids": True, "stream_options": USAGE}])
def test_events_are_as_the_document_says(path: str, further: dict[str, Any], url: str) -> None:
    body = {**STREAMED[path], **further, "max_tokens": 3, "stream": True}
    headers = {"Authorization": f"Bearer {KEY}"}
    text = httpx.post(f"{url}{path}", json=body, headers=headers).text
    events = [block.removeprefix("data: ") for block in text.split("\n\n")[:-1]]
    assert events.pop() == "[DONE]"
    assert len(events) >= 2
    schema = document() | {"$ref": f"#/components/schemas/{CHUNKS[path]}"}
    validator = jsonschema_rs.validator_for(schema)
    for event in events:
        validator.validate(json.loads(event))
    with pytest.raises(jsonschema_rs.ValidationError):
        validator.validate(json.loads(events[0]) | {"another": 1})


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: o.label)
def test_what_the_document_allows(operation: Any, url: str) -> None:
    @FEW
    @given(case=operation.as_strategy(generation_mode=POSITIVE))
    def holds(case: Any) -> None:
        check(case, url)

    holds()


# A form says nothing of types: false is a file that holds "false".
OF_JSON = [o for o in OPERATIONS if "application/json" in [body.media_type for body in o.body]]


@pytest.mark.parametrize("operation", OF_JSON, ids=lambda o: o.label)
def test_what_the_document_does_not_allow(operation: Any, url: str) -> None:
    @FEW
    @given(case=operation.as_strategy(generation_mode=NEGATIVE))
    def holds(case: Any) -> None:
        check(case, url)

    holds()


CASES = schemathesis.openapi.from_dict(document(keyed=True, batches=True))
CASES.config.generation.update(modes=[POSITIVE, NEGATIVE])


@pytest.mark.slow
@CASES.exclude(path="/v1/files").parametrize()
@MANY
def test_each_value_of_each_field(case: Any, url: str) -> None:
    """schemathesis' coverage: the limits of each field, and what is beyond them; then random."""
    check(case, url)


def check(case: Any, url: str) -> None:
    positive = case.meta.generation.mode == POSITIVE
    if positive and isinstance(case.body, dict):
        case.body = ordinary(whole(case.body))
    headers = {"Authorization": f"Bearer {KEY}"}
    response = case.call(base_url=url, headers=headers)
    excluded = [positive_data_acceptance]
    if case.method == "GET":  # names that a query does not have are ignored
        excluded.append(negative_data_rejection)
    case.validate_response(response, headers=headers, excluded_checks=excluded)
    if positive and response.status_code != 200:
        assert response.status_code in (400, 404)
        message = response.json()["error"]["message"]
        assert any(re.search(reason, message) for reason in NOT_IN_A_SCHEMA), message


def whole(value: Any) -> Any:
    """A value with 2 in place of 2.0: both are integers in JSON Schema, but the server wants 2."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [whole(one) for one in value]
    if isinstance(value, dict):
        return {key: whole(one) for key, one in value.items()}
    return value


def ordinary(body: dict[str, Any]) -> dict[str, Any]:
    """A body that is served more often: with the model that there is, and small numbers."""
    made = dict(body)
    if isinstance(body.get("model"), str):
        made["model"] = "demo"
    for name in ("max_tokens", "max_completion_tokens", "n", "best_of"):
        if isinstance(body.get(name), int):
            made[name] = min(body[name], 4)
    if body.get("messages"):
        made["messages"] = [
            {**message, "role": "user", "content": "Who are you?"} for message in body["messages"]
        ]
    return made
