"""OpenAI's own client works with the server as it does with OpenAI's."""

import asyncio
import json
import shutil
from collections.abc import Iterator
from typing import Any, Literal

import pytest
from other_threads import eventually
from pydantic import BaseModel
from serving import serving

from tilewright import LLMEngine, RuntimeConfig
from tilewright.settings import DEMO_MODEL
from tilewright_serve import ServeSettings, create_app

openai = pytest.importorskip("openai")

KEY = "a-key"
PROMPT = "We hold these truths to be"
TEXT = " self-evident, that all men are created equal"
QUESTION: list[Any] = [{"role": "user", "content": PROMPT}]


@pytest.fixture(scope="module")
def served() -> Iterator[Any]:
    with LLMEngine.from_plugins() as engine:
        runtime = RuntimeConfig(weight_dtype="float32", max_seq_len=128, max_batch_size=4)
        engine.init_model("demo", DEMO_MODEL, runtime)
        app = create_app(engine, settings=ServeSettings(api_key=KEY))
        with serving(app) as url:
            app.state.url = url
            yield app.state
        eventually(lambda: not engine.stats("demo").used_pages)


@pytest.fixture(scope="module")
def client(served: Any) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def test_a_completion(client: Any) -> None:
    made = client.completions.create(model="demo", prompt=PROMPT, max_tokens=8, temperature=0)
    assert made.object == "text_completion"
    assert TEXT.startswith(made.choices[0].text)
    assert made.choices[0].finish_reason == "length"
    assert made.usage.completion_tokens == 8
    assert made.usage.total_tokens == made.usage.prompt_tokens + 8


def test_a_streamed_completion_is_the_whole_one(client: Any) -> None:
    asked = {"model": "demo", "prompt": [PROMPT, "When in the"], "max_tokens": 9, "temperature": 0}
    whole = client.completions.create(**asked)
    texts = ["", ""]
    with client.completions.create(**asked, stream=True) as stream:
        for chunk in stream:
            for choice in chunk.choices:
                texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]


def test_log_probabilities_of_both_endpoints(client: Any) -> None:
    made = client.completions.create(
        model="demo", prompt=PROMPT, max_tokens=3, temperature=0, logprobs=2, echo=True
    )
    found = made.choices[0].logprobs
    assert "".join(found.tokens) == made.choices[0].text
    assert found.text_offset[0] == 0
    assert found.token_logprobs[0] is None
    assert all(value <= 0 for value in found.token_logprobs[1:])
    chat = client.chat.completions.create(
        model="demo", messages=QUESTION, max_tokens=3, temperature=0, logprobs=True, top_logprobs=2
    )
    tokens = chat.choices[0].logprobs.content
    assert bytes(b for one in tokens for b in one.bytes).decode() == chat.choices[0].message.content
    assert all(one.top_logprobs[0].logprob == one.logprob for one in tokens)
    assert all(len(one.top_logprobs) == 2 for one in tokens)


def test_several_choices_with_a_seed(client: Any) -> None:
    asked = {"model": "demo", "messages": QUESTION, "n": 3, "seed": 5, "max_tokens": 4}
    first, again = (client.chat.completions.create(**asked, temperature=2) for _ in range(2))
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert len(set(texts)) > 1


def test_a_streamed_chat_with_usage(client: Any) -> None:
    asked = {"model": "demo", "messages": QUESTION, "max_tokens": 6, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    assert len({chunk.id for chunk in chunks}) == 1
    *told, last = chunks
    assert last.choices == []
    assert last.usage.prompt_tokens == whole.usage.prompt_tokens
    assert last.usage.completion_tokens == whole.usage.completion_tokens == 6
    assert told[0].choices[0].delta.role == "assistant"
    assert all(chunk.usage is None for chunk in told)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in told)
    assert text == whole.choices[0].message.content


def test_the_client_s_stream_helper(client: Any) -> None:
    with client.chat.completions.stream(
        model="demo",
        messages=QUESTION,
        stop="e",  # a text that ends by its limit raises LengthFinishReasonError
        temperature=0,
        logprobs=True,
        stream_options={"include_usage": True},
    ) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    kinds = {event.type for event in events}
    assert {"chunk", "content.delta", "content.done", "logprobs.content.delta"} <= kinds
    deltas = [event for event in events if event.type == "content.delta"]
    (done,) = [event for event in events if event.type == "content.done"]
    assert "".join(event.delta for event in deltas) == deltas[-1].snapshot == done.content
    assert final.choices[0].message.content == done.content
    assert len(final.choices[0].logprobs.content) == final.usage.completion_tokens


def test_many_at_once_from_asyncio(served: Any) -> None:
    async def ask() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key=KEY) as client:

            async def whole(prompt: str) -> str:
                made = await client.completions.create(
                    model="demo", prompt=prompt, max_tokens=5, temperature=0
                )
                return str(made.choices[0].text)

            async def streamed(prompt: str) -> str:
                stream = await client.completions.create(
                    model="demo", prompt=prompt, max_tokens=5, temperature=0, stream=True
                )
                return "".join([chunk.choices[0].text async for chunk in stream])

            prompts = [PROMPT, "When in the Course", "The unanimous"] * 2
            return await asyncio.gather(*map(whole, prompts), *map(streamed, prompts))

    texts = asyncio.run(ask())
    assert texts[:3] == texts[3:6] == texts[6:9] == texts[9:]
    assert len(set(texts)) == 3


def test_a_stream_that_is_closed_early_frees_its_pages(client: Any, served: Any) -> None:
    stream = client.completions.create(model="demo", prompt=PROMPT, max_tokens=100, stream=True)
    next(iter(stream))
    stream.close()
    models = served.server.models
    eventually(lambda: models["demo"].num_open == 0)
    eventually(lambda: models["demo"].engine.stats("demo").used_pages == 0)


def test_models(client: Any) -> None:
    (model,) = client.models.list()
    assert client.models.retrieve("demo") == model
    assert (model.id, model.object) == ("demo", "model")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another/one")


def test_raw_and_streamed_responses(client: Any) -> None:
    raw = client.completions.with_raw_response.create(model="demo", prompt=PROMPT, max_tokens=1)
    made = raw.parse()
    assert raw.headers["content-type"] == "application/json"
    assert raw.request_id == raw.headers["x-request-id"] == made._request_id == made.id
    with client.chat.completions.with_streaming_response.create(
        model="demo", messages=QUESTION, max_tokens=2, stream=True
    ) as response:
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert json.loads(lines[0].removeprefix("data: "))["choices"][0]["delta"]["role"] == "assistant"


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("BadRequestError", {"temperature": -1}, "temperature"),
    ("BadRequestError", {"suffix": "end"}, "suffix"),
    ("BadRequestError", {"max_tokens": 1000}, "max_tokens"),
    ("BadRequestError", {"prompt": [1, "two"]}, "prompt"),
    ("BadRequestError", {"stream": True, "max_tokens": 1000}, "max_tokens"),
    ("NotFoundError", {"model": "another"}, "model"),
]


@pytest.mark.parametrize(("kind", "wrong", "param"), BAD, ids=lambda v: str(v)[:30])
def test_errors_are_of_the_client_s_kinds(
    kind: str, wrong: dict[str, Any], param: str, client: Any
) -> None:
    with pytest.raises(getattr(openai, kind)) as caught:
        client.completions.create(**{"model": "demo", "prompt": PROMPT} | wrong)
    assert caught.value.param == param
    assert caught.value.body["message"] in caught.value.message
    assert param in caught.value.body["message"]


SHARED: dict[str, Any] = {
    "model": "demo",
    "frequency_penalty": -2,
    "logit_bias": {"5": 0},
    "n": 1,
    "presence_penalty": 2,
    "seed": -9007199254740991,
    "stop": "\n",
    "stream": True,
    "stream_options": {"include_obfuscation": True, "include_usage": True},
    "temperature": 1,
    "top_p": 1,
    "user": "user-1234",
}


def test_all_parameters_at_once(client: Any) -> None:
    stream = client.completions.create(
        **SHARED, prompt=PROMPT, best_of=1, echo=True, logprobs=0, max_tokens=2
    )
    assert list(stream)[-1].usage.completion_tokens <= 2
    stream = client.chat.completions.create(
        **SHARED,
        messages=[{"role": "developer", "content": "Be brief", "name": "a"}, *QUESTION],
        function_call="none",
        logprobs=True,
        max_completion_tokens=2,
        metadata={"key": "value"},
        modalities=["text"],
        parallel_tool_calls=True,
        prediction={"type": "content", "content": "so"},
        prompt_cache_key="key",
        reasoning_effort="none",
        response_format={"type": "text"},
        safety_identifier="a",
        service_tier="auto",
        store=True,
        tool_choice="none",
        top_logprobs=0,
        verbosity="medium",
    )
    assert list(stream)[-1].usage.completion_tokens <= 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("audio", {"format": "wav", "voice": "alloy"}),
        ("function_call", {"name": "f"}),
        ("functions", [{"name": "f"}]),
        ("modalities", ["text", "audio"]),
        ("verbosity", "low"),
        ("web_search_options", {"search_context_size": "low"}),
    ],
)
def test_what_would_mislead_is_refused(name: str, value: Any, client: Any) -> None:
    with pytest.raises(openai.BadRequestError, match=f"'{name}' is not served") as caught:
        client.chat.completions.create(model="demo", messages=QUESTION, **{name: value})
    assert caught.value.param == name


def test_a_wrong_key(client: Any) -> None:
    with pytest.raises(openai.AuthenticationError) as caught:
        client.with_options(api_key="another").models.list()
    assert caught.value.code == "invalid_api_key"


def test_a_timeout_of_the_client(client: Any, served: Any) -> None:
    impatient = client.with_options(timeout=0.001)
    with pytest.raises(openai.APITimeoutError):
        impatient.completions.create(model="demo", prompt=PROMPT, max_tokens=100)
    eventually(lambda: served.server.models["demo"].num_open == 0)


def test_a_full_queue_is_tried_again(client: Any, served: Any) -> None:
    model = served.server.models["demo"]
    waits = []

    def note(response: Any) -> None:
        if response.status_code == 503:
            waits.append(response.headers["retry-after"])
            model.num_submitted -= 10_000  # the others have ended

    model.num_submitted += 10_000
    asked = {"model": "demo", "prompt": PROMPT, "max_tokens": 2}
    with pytest.raises(openai.InternalServerError) as caught:
        client.completions.create(**asked)
    assert (caught.value.status_code, caught.value.code) == (503, "queue_full")
    patient = client.with_options(max_retries=1)
    patient._client.event_hooks = {"response": [note]}
    try:
        assert patient.completions.create(**asked).choices[0].finish_reason == "length"
    finally:
        patient._client.event_hooks = {}
    assert waits == ["1"]


# --- structured output and tools ------------------------------------------------------------------


class Verdict(BaseModel):
    sound: bool
    kind: Literal["text", "speech"]


def test_an_answer_parsed_as_a_pydantic_model(client: Any) -> None:
    asked = {"model": "demo", "messages": QUESTION, "temperature": 0, "response_format": Verdict}
    made = client.chat.completions.parse(**asked)
    parsed = made.choices[0].message.parsed
    assert isinstance(parsed, Verdict)
    assert Verdict.model_validate_json(made.choices[0].message.content) == parsed
    with client.chat.completions.stream(**asked) as stream:
        (done,) = [event for event in stream if event.type == "content.done"]
    assert done.parsed == parsed


TEMPLATE = """\
{%- for tool in tools or [] %}{{ tool | tojson }}{% endfor %}
{%- for message in messages %}
{{- message.content or '' }}
{%- for call in message.tool_calls or [] %}
{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson + '}\\n</tool_call>' }}
{%- endfor %}
{%- endfor %}
"""


@pytest.fixture(scope="module")
def caller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A client of the bundled model with a template that writes calls as Qwen's does."""
    directory = tmp_path_factory.mktemp("caller") / "model"
    shutil.copytree(DEMO_MODEL, directory)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    with LLMEngine.from_plugins() as engine:
        engine.init_model("caller", directory, RuntimeConfig(max_seq_len=512))
        with (
            serving(create_app(engine)) as url,
            openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
        ):
            yield client


def test_a_forced_call(caller: Any) -> None:
    tools = [openai.pydantic_function_tool(Verdict)]
    asked = {"model": "caller", "messages": QUESTION, "tools": tools, "temperature": 0}
    made = caller.chat.completions.parse(**asked, tool_choice="required", parallel_tool_calls=False)
    (call, *_) = made.choices[0].message.tool_calls
    assert made.choices[0].finish_reason == "tool_calls"
    assert call.function.name == "Verdict"
    assert isinstance(call.function.parsed_arguments, Verdict)
    named = {"type": "function", "function": {"name": "Verdict"}}
    with caller.chat.completions.stream(**asked, tool_choice=named) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    deltas = [e for e in events if e.type == "tool_calls.function.arguments.delta"]
    (done,) = [e for e in events if e.type == "tool_calls.function.arguments.done"]
    assert "".join(event.arguments_delta for event in deltas) == done.arguments
    (streamed,) = final.choices[0].message.tool_calls
    assert streamed.id.startswith("call_")
    assert streamed.function.parsed_arguments == call.function.parsed_arguments
    history = [*QUESTION, final.choices[0].message.to_dict()]
    result = {"role": "tool", "tool_call_id": streamed.id, "content": "done"}
    again = caller.chat.completions.create(
        model="caller", messages=[*history, result], tools=tools, max_tokens=2
    )
    assert again.choices[0].message.role == "assistant"
