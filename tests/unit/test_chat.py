"""Conversations become the prompts that transformers makes of them; answers are split."""

import asyncio
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
from attrs import evolve
from small_tokenizers import byte_level, no_decoder
from transformers import PreTrainedTokenizerFast

from tilewright import AsyncLLMEngine, Chat, GenerateConfig, LLMEngine, RuntimeConfig
from tilewright import chat_template as chat_template_module
from tilewright.chat import ThinkingSplitter, split_thinking
from tilewright.errors import ModelError, RequestError
from tilewright.settings import DEMO_MODEL
from tilewright.text import Text
from tilewright.types import TextAssets

CHATML = """\
{%- if messages[0].role != 'system' %}
<|im_start|>system
You answer briefly.<|im_end|>
{% endif %}
{% for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>\\n' -}}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""

LLAMA_3 = """\
{{- bos_token }}
{%- set today = strftime_now("%Y") if strftime_now is defined else "1970" %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Year: " + today + "\\n\\n" + system + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if message.role == 'skip' %}{% continue %}{% endif %}
    {%- if message.role == 'end' %}{% break %}{% endif %}
    {{- '<|start_header_id|>' ~ message.role ~ '<|end_header_id|>\\n\\n' }}
    {%- if message.content is string %}
        {{- message.content | trim + '<|eot_id|>' }}
    {%- else %}
        {%- for part in message.content if part.type == 'text' %}{{ part.text }}{% endfor %}
        {{- '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt and not tools %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

MISTRAL = """\
{{ bos_token }}
{%- for message in messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{- raise_exception('Roles must alternate user/assistant/user/assistant/...') }}
    {%- endif -%}
    {%- if message['role'] == 'user' -%}
        {{ ' [INST] ' + message['content'] + ' [/INST]' }}
    {%- else -%}
        {% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}
    {%- endif -%}
{%- endfor -%}
"""

QWEN_3 = """\
{%- set ns = namespace(last_query=messages|length - 1, searching=true) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == "user" and message.content is string
           and not message.content.startswith('<tool_response>') %}
        {%- set ns.searching = false %}
        {%- set ns.last_query = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "assistant" %}
        {%- set thought = '' %}
        {%- if message.reasoning_content is string %}
            {%- set thought = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1] %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last_query or loop.last %}
            {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- content }}
        {%- for call in message.tool_calls or [] %}
            {%- if call.function %}{% set call = call.function %}{% endif %}
            {{- '<tool_call>\\n{"name": "' ~ call.name ~ '", "arguments": ' }}
            {{- call.arguments if call.arguments is string else call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

GEMMA = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first = messages[0]['content'] + '\\n\\n' -%}
    {%- set rest = messages[1:] -%}
{%- else -%}
    {%- set first = '' -%}
    {%- set rest = messages -%}
{%- endif -%}
{%- for message in rest -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('roles must alternate') }}
    {%- endif -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\\n' + (first if loop.first else '') }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- else -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] == 'text' -%}{{ part['text'] | trim }}{%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}
"""

TOOLS = """\
{%- macro described(tool) %}
    {{- tool.function.name }}({{ tool.function.parameters | tojson }});
{%- endmacro %}
{%- if not date_string is defined %}{% set date_string = "1 Jan" %}{% endif %}
{%- for tool in tools or [] %}{{ described(tool) }}{% endfor %}
{%- for message in messages %}
    {%- if message.tool_calls is defined and message.tool_calls is not none %}
        {%- for call in message.tool_calls %}
            {{- '[CALL ' + call.id + ']' + call.function.name }}
            {%- for key, value in call.function.arguments | items -%}
                <{{ key }}={{ value }}>
            {%- endfor %}
        {%- endfor %}
    {%- elif message.role == 'tool' %}[RESULT {{ message.tool_call_id }}]{{ message.content }}
    {%- else %}[{{ message.role }} {{ date_string }}]{{ message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}
"""

JSON = """\
{% for m in messages %}{{ [m.role, m.content, m.tool_calls or 0] | tojson }}{% endfor %}
{{ messages[0] | tojson(indent=2) }}
{% set box = namespace(n=0) %}{% for m in messages %}{% set box.n = box.n + 1 %}{% endfor %}
{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}
   {% if documents is none and tools is none %}
  {{ box.n }} {{ undefined_name }} {{ dict(a=1) | tojson }} {{ "<&>'" | tojson }}
  {% endif %}
"""


def weather(arguments: Any) -> dict[str, Any]:
    function = {"name": "weather", "arguments": arguments}
    return {"id": "c1", "type": "function", "function": function}


CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hi"}],
    [
        {"role": "system", "content": ' Be <b>kind</b> & "short". '},
        {"role": "user", "content": "数学 👍"},
    ],
    [
        {"role": "user", "content": "2+2?\n"},
        {"role": "assistant", "content": "<think>\nEasy.\n</think>\n\n4"},
        {"role": "user", "content": "And 3+3?"},
    ],
    [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "Ask the tool.",
            "tool_calls": [weather({"town": "Zürich"})],
        },
        {"role": "tool", "content": "sunny"},
        {"role": "assistant", "content": "Sun."},
    ],
    [
        {"role": "skip", "content": "no"},
        {"role": "user", "content": "kept"},
        {"role": "end", "content": "no"},
        {"role": "user", "content": "never seen"},
    ],
    [
        {"role": "user", "content": "2+2?", "name": None},
        {"role": "assistant", "content": "4 ", "tool_calls": None, "refusal": None},
        {"role": "user", "content": " so?", "weight": 1},
        {"role": "assistant", "content": "So\n ", "reasoning": "easy", "tool_calls": None},
    ],
    [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [weather({"town": "Zürich"})]},
        {"role": "tool", "content": "sunny", "tool_call_id": "c1"},
        {"role": "assistant", "content": "Sun", "thinking": "as it said"},
    ],
]
TEMPLATES = {
    "chatml": CHATML,
    "llama-3": LLAMA_3,
    "mistral": MISTRAL,
    "qwen-3": QWEN_3,
    "gemma": GEMMA,
    "tools": TOOLS,
    "json": JSON,
}
NAMED = {"bos_token": "<s>", "eos_token": "</s>"}


def chat(template: str | None, tool_template: str | None = None) -> Text:
    return Text(
        TextAssets(
            tokenizer=no_decoder(),
            chat_template=template,
            tool_chat_template=tool_template,
            special_tokens=NAMED,
        )
    )


ORACLE = PreTrainedTokenizerFast(tokenizer_object=no_decoder(), **NAMED)

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": None,
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}},
    },
}
USER = {"role": "user", "content": "Hi"}

WAYS: dict[str, dict[str, Any]] = {
    "to answer": {},
    "as history": {"add_generation_prompt": False},
    "to continue": {"continue_last": True},
    "with tools": {"tools": [TOOL]},
    "without thinking": {"template_options": {"enable_thinking": False}},
    "on a date": {"template_options": {"date_string": "2 Feb"}},
}


def wanted(template: str, messages: Any, way: dict[str, Any]) -> str | None:
    """What transformers renders, or None if it raises."""
    continued = way.get("continue_last", False)
    try:
        return ORACLE.apply_chat_template(  # type: ignore[no-any-return]
            messages,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=way.get("add_generation_prompt", not continued),
            continue_final_message=continued,
            tools=way.get("tools"),
            **way.get("template_options", {}),
        )
    except Exception:
        return None


def rendered(text: Text, messages: Any, way: dict[str, Any]) -> str:
    given = {name: value for name, value in way.items() if name != "add_generation_prompt"}
    return text.render_chat(Chat(messages, **given), way.get("add_generation_prompt", True))


READ = {"with tools": "tools", "without thinking": "enable_thinking", "on a date": "date_string"}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_rendered_chats_match_transformers(template: str, way: str) -> None:
    source, text = TEMPLATES[template], chat(TEMPLATES[template])
    if READ.get(way, "") not in source:
        with pytest.raises(RequestError, match=f"read.*{READ[way]}"):
            rendered(text, [USER], WAYS[way])
        return
    done = 0
    for messages in CONVERSATIONS:
        expected = wanted(source, messages, WAYS[way])
        answers = messages[-1]["role"] == "assistant"
        if expected is None or (way == "to continue" and not answers):
            with pytest.raises(RequestError):
                rendered(text, messages, WAYS[way])
        else:
            assert rendered(text, messages, WAYS[way]) == expected
            done += 1
    assert done >= (1 if way == "to continue" else 2)


def test_the_token_ids_of_a_chat_match_transformers() -> None:
    named = {"bos_token": "<s>", "eos_token": "</s>"}
    text = Text(TextAssets(tokenizer=byte_level(), chat_template=MISTRAL, special_tokens=named))
    theirs = PreTrainedTokenizerFast(tokenizer_object=byte_level(), **named)
    expected = theirs.apply_chat_template(CONVERSATIONS[2][:1], chat_template=MISTRAL)
    assert text.encode_chat(Chat(CONVERSATIONS[2][:1])) == expected["input_ids"]


@pytest.mark.parametrize("content", ["So  ", "So\n", " a So", "", "So </s>", "<think>\nSo"])
@pytest.mark.parametrize("template", ["mistral", "gemma", "qwen-3", "llama-3"])
def test_a_continued_message_ends_where_it_ends_with_transformers(
    template: str, content: str
) -> None:
    messages = [USER, {"role": "assistant", "content": content}]
    expected = wanted(TEMPLATES[template], messages, {"continue_last": True})
    assert expected is not None
    assert rendered(chat(TEMPLATES[template]), messages, {"continue_last": True}) == expected


def test_continued_parts_end_with_the_last_text() -> None:
    parts = [{"type": "text", "text": "One. "}, {"type": "text", "text": "Two "}]
    messages = [USER, {"role": "assistant", "content": parts}]
    expected = wanted(LLAMA_3, messages, {"continue_last": True})
    assert rendered(chat(LLAMA_3), messages, {"continue_last": True}) == expected
    assert rendered(chat(MISTRAL), messages, {"continue_last": True}).endswith(" One. \nTwo ")


@pytest.mark.parametrize(
    ("messages", "found"),
    [
        ([USER], r"message 0: expected the assistant's message.*'user'"),
        ([USER, {"role": "assistant", "content": None}], r"message 1: has no content"),
        ([USER, {"role": "assistant", "content": []}], r"message 1: has no content"),
        ([USER, {"role": "assistant", "content": "x"}, USER], r"message 2: expected the assis"),
    ],
)
def test_only_an_assistants_content_is_continued(messages: Any, found: str) -> None:
    with pytest.raises(RequestError, match=found):
        rendered(chat(LLAMA_3), messages, {"continue_last": True})


def test_a_message_that_the_template_leaves_out_is_not_continued() -> None:
    text = chat("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}")
    with pytest.raises(RequestError, match="message 1: cannot be continued"):
        rendered(text, [USER, {"role": "assistant", "content": "x"}], {"continue_last": True})


PARTS = [{"type": "text", "text": "One."}, {"type": "text", "text": "Two."}]


@pytest.mark.parametrize(
    ("template", "as_parts"),
    [("chatml", False), ("mistral", False), ("qwen-3", False), ("llama-3", True), ("gemma", True)],
)
def test_parts_are_joined_for_a_template_that_reads_only_text(
    template: str, as_parts: bool
) -> None:
    text, source = chat(TEMPLATES[template]), TEMPLATES[template]
    messages = [USER, {"role": "assistant", "content": "x"}, {"role": "user", "content": PARTS}]
    like = messages if as_parts else [*messages[:2], {"role": "user", "content": "One.\nTwo."}]
    assert rendered(text, messages, {}) == wanted(source, like, {})


def test_each_message_gets_the_form_that_is_read_for_its_role() -> None:
    source = """{% for m in messages %}{{ m.role }}:
    {%- if m.role == 'user' %}{% for p in m.content %}{{ p.text }}{% endfor %}
    {%- else %}{{ m.content }}{% endif %};{% endfor %}"""
    messages = [{"role": role, "content": PARTS} for role in ("system", "user")]
    assert rendered(chat(source), messages, {}) == "system:One.\nTwo.;user:One.Two.;"


@pytest.mark.parametrize("given", ["text", "an object"])
@pytest.mark.parametrize(
    ("reads", "arguments", "made"),
    [
        ("an object", "arguments | tojson", '{"town": "Z"}'),
        ("an object", "| tojson", '{"name": "weather", "arguments": {"town": "Z"}}'),
        ("an object", "arguments | items | map('join', '=') | join", "town=Z"),
        ("text", "arguments + ''", '{"town": "Z"}'),
    ],
)
def test_arguments_of_tool_calls_come_in_the_form_that_the_template_reads(
    given: str, reads: str, arguments: str, made: str
) -> None:
    dot = "" if arguments.startswith("|") else "."
    source = (
        "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function"
        + f"{dot}{arguments}"
        + " }}{% endfor %}{% endfor %}"
    )
    call = weather('{"town": "Z"}' if given == "text" else {"town": "Z"})
    messages = [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]
    assert rendered(chat(source), messages, {}) == made
    if given == reads:
        assert wanted(source, messages, {}) == made


@pytest.mark.parametrize("arguments", ['{"a":1}', "", "{broken", "[1]"])
def test_arguments_stay_as_they_are_where_the_template_reads_them_so(arguments: str) -> None:
    messages = [USER, {"role": "assistant", "tool_calls": [weather(arguments)]}]
    assert rendered(chat(QWEN_3), messages, {}) == wanted(QWEN_3, messages, {})


def test_empty_arguments_are_an_empty_object_for_a_template_that_reads_objects() -> None:
    messages = [USER, {"role": "assistant", "tool_calls": [weather("")]}]
    assert rendered(chat(TOOLS), messages, {}).endswith("[CALL c1]weather")


def test_parts_and_arguments_are_both_brought_into_the_forms_that_are_read() -> None:
    def messages(content: Any, arguments: Any) -> Any:
        call = {"role": "assistant", "content": None, "tool_calls": [weather(arguments)]}
        return [{"role": "user", "content": content}, call]

    like = messages("One.\nTwo.", {"town": "Z"})
    assert rendered(chat(TOOLS), messages(PARTS, '{"town": "Z"}'), {}) == wanted(TOOLS, like, {})


def test_a_result_of_a_tool_may_be_data() -> None:
    source = "{% for m in messages %}{{ m.content | tojson }}{% endfor %}"
    for content in ({"degrees": 3}, [{"degrees": 3}]):
        messages = [USER, {"role": "tool", "content": content}]
        assert rendered(chat(source), messages, {}) == wanted(source, messages, {})


@pytest.mark.parametrize(
    ("messages", "found"),
    [
        ([], "the conversation is empty"),
        ({"role": "user"}, "expected a list of chat messages .* found dict"),
        ("Hi", "expected a list of chat messages .* found str"),
        (None, "expected a list of chat messages .* found NoneType"),
        ([USER, "Hello"], r"message 1: expected a mapping .* found str"),
        ([USER, {"content": "x"}], "message 1: 'role' must be text .* found none"),
        ([{"role": 1, "content": "x"}], "message 0: 'role' must be text .* found 1"),
        ([{"role": "user", "content": 4}], "message 0: 'content' must be text .* found 4"),
        ([{"role": "user", "content": {"a": 1}}], "message 0: 'content' must be text"),
        ([{"role": "user", "content": ["x"]}], "message 0, part 0 of its content: expected"),
        (
            [{"role": "user", "content": [*PARTS, {"type": "image_url", "image_url": {}}]}],
            "message 0, part 2 of its content: .* of type 'image_url'.*text alone",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], "'text' must be text, found None"),
        ([{"role": "user", "content": "x", "o": object()}], "message 0: .* found object"),
    ],
)  # fmt: skip
def test_messages_of_a_wrong_form_are_refused(messages: Any, found: str) -> None:
    with pytest.raises(RequestError, match=found):
        chat(JSON).render_chat(messages)


def test_messages_nested_without_end_are_refused() -> None:
    message: dict[str, Any] = {"role": "user", "content": "x"}
    message["self"] = message
    with pytest.raises(RequestError, match="message 0: expected at most 100 levels"):
        chat(JSON).render_chat([message])


@dataclass
class Part:
    type: str
    text: str


class OfAClient:
    """As the client libraries of servers return messages."""

    def model_dump(self) -> dict[str, Any]:
        return {"role": "user", "content": [Part("text", "Hi")], "name": None}


def test_objects_of_client_libraries_are_messages() -> None:
    assert rendered(chat(LLAMA_3), [OfAClient()], {}) == wanted(LLAMA_3, [OfAClient()], {})


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"enable_thnking": False}, "reads no variable 'enable_thnking'; did you mean 'enable_th"),
        ({"messages": []}, "'messages': set from the call's own arguments"),
        ({"tools": []}, "'tools': set from"),
        ({"add_generation_prompt": False}, "'add_generation_prompt': set from"),
        ({"enable_thinking": object()}, "option 'enable_thinking': .* found object"),
        ([("enable_thinking", False)], "template_options: expected a mapping .* found list"),
    ],
)
def test_options_that_the_template_cannot_take_are_refused(options: Any, found: str) -> None:
    with pytest.raises(RequestError, match=found):
        chat(QWEN_3).render_chat(Chat([USER], template_options=options))


@pytest.mark.parametrize(
    "reading",
    [
        "{% set x = x | default(1) %}{{ x }}",
        "{% if x is not defined %}{% set x = 1 %}{% endif %}{{ x }}",
        "{% macro f() %}{{ x }}{% endmacro %}{{ f() }}",
        "{% for m in messages if x %}{{ x }}{% endfor %}",
    ],
)
def test_an_option_with_a_default_in_the_template_is_one_that_it_reads(reading: str) -> None:
    way = {"template_options": {"x": 7}}
    assert rendered(chat(reading), [USER], way) == wanted(reading, [USER], way) == "7"


def test_an_option_may_replace_a_special_token_and_give_documents() -> None:
    source = "{{ bos_token }}{% for d in documents %}{{ d.title }}{% endfor %}"
    way = {"template_options": {"bos_token": "B", "documents": [{"title": "T"}]}}
    assert rendered(chat(source), [USER], way) == wanted(source, [USER], way) == "BT"


def test_tools_take_the_template_for_tools() -> None:
    text = chat("default", "{{ tools | length }}")
    assert text.render_chat([USER]) == "default"
    assert text.render_chat(Chat([USER], tools=[TOOL])) == "1"
    assert text.render_chat(Chat([USER], tools=[])) == "0"
    only = chat(None, "{{ tools | length }}")
    assert only.render_chat(Chat([USER], tools=[TOOL])) == "1"
    with pytest.raises(RequestError, match="no chat template for chats without tools"):
        only.render_chat([USER])


def a_function(town: str) -> str:
    """The weather of a town."""
    return town


@pytest.mark.parametrize(
    ("tools", "found"),
    [([a_function], "tool 0: .* found function"), (TOOL, "tools: .* found dict"),
     ([TOOL, 3], "tool 1: .* found int")],
)  # fmt: skip
def test_tools_of_a_wrong_form_are_refused(tools: Any, found: str) -> None:
    with pytest.raises(RequestError, match=found):
        chat(TOOLS).render_chat(Chat([USER], tools=tools))


def failure(template: str, messages: Any = None) -> Exception:
    with pytest.raises((RequestError, ModelError)) as caught:
        chat(template).render_chat(messages or [{"role": "user", "content": "Hi"}])
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("template", "error", "line", "what"),
    [
        ("\n{% if %}", ModelError, 2, "Expected an expression"),
        ("a\nb\n{% for m in messages %}", ModelError, 3, "endfor"),
        ("{% generation %}\nnever closed", ModelError, 2, "generation"),
        ("\n\n{{ messages | no_such_filter }}", ModelError, 3, "no_such_filter"),
        ("\n{{ raise_exception('Only\n two roles') }}", RequestError, 2, "Only two roles"),
        ("{% macro f() %}\n{{ no.such }}\n{% endmacro %}\n{{ f() }}", RequestError, 2, "no"),
        ("\n{{ messages[7].role }}", RequestError, 2, "no element 7"),
        ("\n\n\n{{ messages[0].content + 1 }}", RequestError, 4, "str"),
        ("\n{{ messages[0].content.__class__.mro() }}", ModelError, 2, "unsafe"),
        ("\n{{ messages.append(1) }}", ModelError, 2, "append"),
        ("\n{{ messages[0].update(role='x') }}", ModelError, 2, "update"),
        ("\n{{ 1 // 0 }}", RequestError, 2, "zero"),
        ("{{ range }}\n{{ strftime_now | tojson }}", RequestError, 2, "not JSON serializable"),
        ("\n{% include 'other' %}", RequestError, 2, "no loader"),
    ],
)  # fmt: skip
def test_a_failing_chat_template_is_a_one_line_error_with_the_template_line(
    template: str, error: type[Exception], line: int, what: str
) -> None:
    found = failure(template)
    assert type(found) is error
    assert f"chat template, line {line}: " in str(found)
    assert what in str(found)


def test_what_a_template_says_is_a_short_line_without_control_characters() -> None:
    said = str(failure("{{ raise_exception('a\\x1b[31m\\ud800' ~ 'x' * 5000) }}"))
    assert said.isprintable()
    assert r"a\x1b[31m\ud800xxx" in said
    assert len(said) < 500


def test_keys_that_are_no_text_are_refused() -> None:
    message = {"role": "user", "content": "Hi", "data": {(1, 2): 3}}
    with pytest.raises(RequestError, match=r"message 0: expected text as key .* found \(1, 2\)"):
        chat("{{ messages }}").render_chat([message])


def test_a_chat_without_a_template_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(RequestError, match=r"no chat template.*generate.*chat_template\.jinja"):
        chat(None).render_chat([{"role": "user", "content": "Hi"}])


def test_rendering_does_not_change_the_messages() -> None:
    messages = [{"role": "user", "content": "Hi"}]
    chat(LLAMA_3).render_chat(messages)
    assert messages == [{"role": "user", "content": "Hi"}]


# --- templates without end ------------------------------------------------------------------------

GROWING = "{% set ns = namespace(x='ab', l=['ab'], n=7) %}{% for i in range(99) %}%s{% endfor %}"
ENDLESS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "filtered loops": "{% for a in range(99999) %}{% for b in range(99999) if a < 0 %}"
    "{% endfor %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(99) }}",
    "a macro without end": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a block": "{% block b %}{{ self.b() }}{{ self.b() }}{% endblock %}",
    "a loop that calls itself": "{% for x in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
    "~": GROWING.replace("%s", "{% set ns.x = ns.x ~ ns.x %}"),
    "+": GROWING.replace("%s", "{% set ns.x = ns.x + ns.x %}"),
    "*": GROWING.replace("%s", "{% set ns.l = ns.l * 9 %}"),
    "replace": GROWING.replace("%s", "{% set ns.x = ns.x.replace('a', 'aaaa') %}"),
    "join": GROWING.replace("%s", "{% set ns.x = [ns.x, ns.x] | join %}"),
    "set": GROWING.replace("%s", "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}"),
    "numbers": GROWING.replace("%s", "{% set ns.n = ns.n * ns.n %}"),
    "lists of one list": GROWING.replace("%s", "{% set ns.l = [ns.l, ns.l] %}") + "{{ ns.l }}",
    "lists as JSON": GROWING.replace("%s", "{% set ns.l = [ns.l, ns.l] %}")
    + "{{ ns.l | tojson }}",
    "lists as text": GROWING.replace("%s", "{% set ns.l = [ns.l, ns.l] %}")
    + "{{ ns.l | replace('a', 'b') }}",
    "text in a loop": "{% for i in range(99999) %}" + "y" * 99999 + "{% endfor %}",
    "slices that are kept": "{% set ns = namespace(l=[]) %}{% set x = 'x' * 10**7 %}"
    "{% for i in range(99999) %}{% set ns.l = ns.l + [x[1:]] %}{% endfor %}",
    "a power": "{{ 10 ** (10 ** 10) }}",
    "a long text": "{{ 'a' * 10 ** 10 }}",
    "a wide filter": "{{ 'a' | center(10000000000) }}",
    "a wide method": "{{ 'a'.center(10000000000) }}",
    "wide tabs": "{{ '\t'.expandtabs(10000000000) }}",
    "a wide indent": "{{ 'a\nb' | indent(10000000000, true) }}",
    "a text as indent": "{{ ('\n' * 99999) | indent('a' * 99999) }}",
    "a long separator": "{{ ('a' * 99999).join('b' * 99999) }}",
    "a long separator of a filter": "{{ ('b' * 99999) | join('a' * 99999) }}",
    "a long replacement": "{{ ('b' * 99999) | replace('b', 'a' * 99999) }}",
    "a wide format": "{{ '%10000000000d' % 1 }}",
    "a width that is given": "{{ '%*d' % (10000000000, 1) }}",
    "a format method": "{{ '{:10000000000}'.format(1) }}",
    "a format method of a width": "{{ '{:{}}'.format(1, 10000000000) }}",
    "wide JSON": "{{ [1] | tojson(indent=10000000000) }}",
    "a wide batch": "{{ [1] | batch(10000000000, 'x') | list }}",
    "a long list": "{{ [1] * 10 ** 7 }}",
    "a list of characters": "{{ ('a ' * 10 ** 6) | list }}",
    "a slow filter": "{{ ('a-' * 10 ** 6) | wordwrap(1) }}",
    "a filter of each": "{{ range(99999) | map('center', 9999) | list | length }}",
    "a translation": "{{ ('a' * 99999).translate({97: 'b' * 99999}) }}",
}  # fmt: skip


@pytest.mark.parametrize("template", ENDLESS)
def test_a_template_without_end_is_stopped(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, limit in {
        "RENDER_SECONDS": 0.1,
        "_MOST_AT_ONCE": 10**7,
        "_MOST_CHARACTERS": 10**8,
    }.items():
        monkeypatch.setattr(chat_template_module, name, limit)
    found = failure(ENDLESS[template])
    assert type(found) is ModelError
    assert re.search("still running|more than|at most|width|recursion", str(found))
    assert re.search(r"^chat template, line \d: ", str(found))


def test_a_template_without_end_is_stopped_in_its_own_thread_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(chat_template_module, "RENDER_SECONDS", 0.3)
    with ThreadPoolExecutor(2) as pool:
        endless = pool.submit(failure, ENDLESS["loops"])
        texts = [pool.submit(chat(QWEN_3).render_chat, [USER]) for _ in range(50)]
        assert {text.result() for text in texts} == {wanted(QWEN_3, [USER], {})}
        assert "still running" in str(endless.result())


def test_a_long_conversation_is_far_from_the_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        chat_template_module, "RENDER_SECONDS", chat_template_module.RENDER_SECONDS / 3
    )
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": "word " * 200} for i in range(1001)]
    for template in TEMPLATES.values():
        assert len(chat(template).render_chat(messages)) > 1_000_000


def test_a_template_may_compute_and_format() -> None:
    source = (
        "{{ 3 * 4 }} {{ 'ab' * 2 }} {{ [1] + [2] }} {{ 2 ** 8 }} {{ 7 % 4 }} {{ 'a' ~ 1 ~ none }} "
        "{{ '%s-%3d' % ('a', 2) }} {{ '{}{:>3}'.format(1, 2) }} {{ 'a b'.split(' ') | join('-') }} "
        "{{ '' | default('x', true) | indent(2, true) }} {{ 'a,b'.replace(',', ';') }} "
        "{{ messages[:1] | tojson(indent=1) }} {{ messages | map(attribute='role') | list }} "
        "{{ 'x' | center(5) }} {{ ', '.join(['a', 'b']) }} {{ '%s' | format(3) }} "
        "{{ [3, 1] | sort | first }} {{ 'a-b' | upper | replace('-', '+') }} {{ {'a': 1} | items "
        "| list }} {% filter trim %} f {% endfilter %}"
    )
    assert rendered(chat(source), [USER], {}) == wanted(source, [USER], {})


# --- thinking -------------------------------------------------------------------------------------

SPLIT = [
    ("<think>\nHm.\n</think>\n\nYes.", False, "Hm.", "Yes."),
    (" \n<think>Hm.</think>Yes. </think>", False, "Hm.", "Yes. </think>"),
    ("Hm.\n</think>\n\nYes.\n", True, "Hm.", "Yes.\n"),
    ("<think>\nHm. </think> Yes.", True, "Hm.", "Yes."),
    ("\n\n</think>\n\nYes.", True, "", "Yes."),
    ("  Yes, <think> is a tag.", False, "", "  Yes, <think> is a tag."),
    ("<thin", False, "", "<thin"),
    ("<thinker>", False, "", "<thinker>"),
    ("<think>a < b </thin ", False, "a < b </thin ", ""),
    ("a </th", True, "a </th", ""),
    ("<think>", False, "", ""),
    ("", False, "", ""),
    ("", True, "", ""),
    ("</think>", False, "", "</think>"),
]


@pytest.mark.parametrize(("text", "opened", "thinking", "answer"), SPLIT)
def test_thinking_is_split_off_however_the_text_is_cut(
    text: str, opened: bool, thinking: str, answer: str
) -> None:
    assert split_thinking(text, opened) == (thinking, answer)
    for size in (1, 2, 3, 5):
        splitter = ThinkingSplitter(opened)
        pieces = [splitter.push(text[i : i + size]) for i in range(0, len(text), size)]
        pieces.append(splitter.finish())
        assert "".join(piece for piece, _ in pieces) == thinking
        assert "".join(piece for _, piece in pieces) == answer


def test_text_that_cannot_be_a_tag_is_not_held_back() -> None:
    splitter = ThinkingSplitter()
    assert [splitter.push(piece) for piece in ("<th", "ink>a", " b", " <", "/thin", "x")] == [
        ("", ""), ("a", ""), (" b", ""), ("", ""), ("", ""), (" </thinx", ""),
    ]  # fmt: skip
    assert [splitter.push(piece) for piece in ("</think>", "\n", "c", " ")] == [
        ("", ""), ("", ""), ("", "c"), ("", " "),
    ]  # fmt: skip


OPENING = "{% if add_generation_prompt %}<think>\n{% endif %}"


@pytest.mark.parametrize(
    ("template", "last", "given", "opened"),
    [
        (QWEN_3, None, {}, False),
        (QWEN_3, None, {"template_options": {"enable_thinking": False}}, False),
        (QWEN_3 + OPENING, None, {}, True),
        (CHATML, "<think>\nHm", {"continue_last": True}, True),
        (CHATML, "<think>\nHm</think>", {"continue_last": True}, False),
        (LLAMA_3, [{"type": "text", "text": "<think>Hm"}], {"continue_last": True}, True),
        (CHATML, [], {"continue_last": True}, False),
    ],
)
def test_a_prompt_may_open_the_thinking(
    template: str, last: Any, given: dict[str, Any], opened: bool
) -> None:
    messages = [USER, *([] if last is None else [{"role": "assistant", "content": last}])]
    text = Text(TextAssets(tokenizer=byte_level(), chat_template=template, special_tokens=NAMED))
    assert text.opens_thinking(Chat(messages, **given)) is opened


def test_thinking_whose_end_no_text_shows_is_not_split_off() -> None:
    tokenizer = byte_level()
    tokenizer.add_special_tokens(["<think>", "</think>"])
    text = Text(TextAssets(tokenizer=tokenizer, chat_template=QWEN_3 + OPENING))
    assert not text.opens_thinking(Chat([USER]))


# --- the engine -----------------------------------------------------------------------------------

QUESTION = [{"role": "user", "content": "How does the Declaration begin?"}]


@pytest.fixture(scope="module")
def engine() -> Iterator[LLMEngine]:
    with LLMEngine.from_plugins() as engine:
        engine.init_model("demo", DEMO_MODEL, RuntimeConfig(weight_dtype="float32"))
        yield engine


@pytest.fixture
def turn_end(engine: LLMEngine) -> Iterator[int]:
    """A token that ends an answer in a chat: the sixth of the answer to QUESTION."""
    text = engine.model("demo").text
    assets = text.assets
    config = GenerateConfig(max_new_tokens=6)
    answer = engine.generate_result("demo", Chat(QUESTION), config).token_ids
    assert answer[5] not in answer[:5]
    text.assets = evolve(assets, turn_end_ids=(answer[5],))
    yield answer[5]
    text.assets = assets


async def of_tasks(engine: LLMEngine, chat: Chat, config: GenerateConfig) -> Any:
    return await AsyncLLMEngine(engine).generate_result("demo", chat, config)


def results(engine: LLMEngine, messages: Any, config: GenerateConfig, **given: Any) -> list[Any]:
    """Those of each way to answer a conversation, in which all must agree."""
    prompt = Chat(messages, **given)
    with engine.stream("demo", prompt, config) as stream:
        pieces = "".join(stream)
    found = [
        stream.result,
        engine.generate_result("demo", prompt, config),
        *engine.generate_batch("demo", [prompt, prompt], config),
        asyncio.run(of_tasks(engine, prompt, config)),
    ]
    text = engine.chat("demo", messages, config, **given)
    assert text == pieces
    assert [result.text for result in found] == [text] * len(found)
    return found


@pytest.mark.parametrize("stop", [None, (5,)])
def test_each_way_to_answer_ends_at_the_turns_end(
    engine: LLMEngine, turn_end: int, stop: tuple[int, ...] | None
) -> None:
    for result in results(engine, QUESTION, GenerateConfig(max_new_tokens=9, stop_token_ids=stop)):
        assert (result.finish_reason, result.stop_reason) == ("stop", turn_end)
        assert len(result.token_ids) == 6


def test_ignore_eos_goes_on_after_the_turns_end(engine: LLMEngine, turn_end: int) -> None:
    config = GenerateConfig(max_new_tokens=9, ignore_eos=True)
    result = engine.generate_result("demo", Chat(QUESTION), config)
    assert turn_end in result.token_ids[:-1]
    assert len(result.token_ids) == 9


def test_a_prompt_of_token_ids_does_not_end_at_the_turns_end(
    engine: LLMEngine, turn_end: int
) -> None:
    ids = engine.chat_tokens("demo", QUESTION)
    result = engine.generate_result("demo", ids, GenerateConfig(max_new_tokens=9))
    assert turn_end in result.token_ids[:-1]


def test_a_continued_answer_goes_on_as_it_would_have(engine: LLMEngine) -> None:
    whole = engine.chat("demo", QUESTION, GenerateConfig(max_new_tokens=12))
    assert isinstance(whole, str)
    begun = engine.chat("demo", QUESTION, GenerateConfig(max_new_tokens=6))
    messages = [*QUESTION, {"role": "assistant", "content": begun}]
    config = GenerateConfig(max_new_tokens=6)
    for result in results(engine, messages, config, continue_last=True):
        assert f"{begun}{result.text}" == whole


def test_a_chat_that_cannot_be_rendered_fails_alone_in_a_batch(engine: LLMEngine) -> None:
    config = GenerateConfig(max_new_tokens=4)
    good, bad = engine.generate_batch("demo", [Chat(QUESTION), Chat([])], config)
    assert good.text
    assert "the conversation is empty" in str(bad.error)
    for wrong in (Chat([]), Chat(QUESTION, tools=[TOOL]), Chat(QUESTION, {"x": 1})):
        with pytest.raises(RequestError):
            asyncio.run(of_tasks(engine, wrong, config))


def test_one_chat_in_place_of_a_batch_is_refused(engine: LLMEngine) -> None:
    with pytest.raises(RequestError, match=r"found a Chat: use generate\(\)"):
        engine.generate_batch("demo", Chat(QUESTION))  # type: ignore[arg-type]
