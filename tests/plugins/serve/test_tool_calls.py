"""Tool calls in answers: recognised from the template, forced by a grammar, split from the text."""

import json
from collections.abc import Sequence
from functools import cache
from random import Random
from typing import Any

import jsonschema_rs
import pytest
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import byte_level
from transformers import PreTrainedTokenizerFast

from tilewright.text import Text
from tilewright.types import TextAssets
from tilewright_guidance.structured import StructuredOutputProcessor
from tilewright_serve.tool_calls import (
    HERMES,
    LLAMA,
    CallArguments,
    CallBegun,
    Content,
    ToolCallSplitter,
    ToolFormat,
    tool_format,
)
from tilewright_testing.logits_processor import allowed_tokens, effects
from tilewright_testing.models import CONFIGS

# How the assistant's part of these templates writes calls, as Qwen's and Llama's do.
QWEN = """\
{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {{- '<|im_start|>assistant\\n' + (message.content or '') }}
        {%- for call in message.tool_calls or [] %}
            {%- if (loop.first and message.content) or not loop.first %}{{ '\\n' }}{% endif %}
            {%- set call = call.function %}
            {{- '<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
            {{- call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
"""
LLAMA_3 = """\
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
    {%- if message.tool_calls %}
        {%- if message.tool_calls | length != 1 %}{{ raise_exception('one call') }}{% endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '{"name": "' + call.name + '", ' + '"parameters": ' + (call.arguments | tojson) + "}" }}
    {%- elif message.role == 'tool' %}{{ 'ipython' }}
    {%- else %}{{ message.content }}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
"""
TEMPLATES = {QWEN: HERMES, LLAMA_3: LLAMA}


def tool(name: str, parameters: Any = None) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


WEATHER = {
    "type": "object",
    "properties": {
        "town": {"type": "string", "maxLength": 4},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["town"],
}
TOOLS = [
    tool("weather", WEATHER),
    tool("time"),
    tool('odd "name" é', {"properties": {"x": {"enum": ["</tool_call>", "\n}"]}}}),
]

Found = tuple[str, list[tuple[str, str]]]
"""Content and calls, each as name and arguments."""


def split(format: ToolFormat, pieces: Sequence[str], tools: Any = TOOLS) -> Found:
    splitter = ToolCallSplitter(format, tools)
    events = [event for piece in pieces for event in splitter.push(piece)] + list(splitter.finish())
    content, calls = "", list[tuple[str, str]]()
    for event in events:
        match event:
            case Content(text):
                content += text
            case CallBegun(index, name):
                assert index == len(calls)
                calls.append((name, ""))
            case CallArguments(index, text):
                assert index == len(calls) - 1
                calls[-1] = (calls[-1][0], calls[-1][1] + text)
    return content, calls


# --- formats --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("template", "format"), TEMPLATES.items(), ids=["qwen", "llama"])
def test_the_format_is_told_from_the_template(template: str, format: ToolFormat) -> None:
    assert tool_format(template) == format
    in_double_quotes = template.replace('\'<tool_call>\\n{"name": "\'', '"<tool_call>\\n"')
    assert tool_format(in_double_quotes) == format


@pytest.mark.parametrize(
    "template",
    [
        "",
        "{% for m in messages %}{{ m.content }}{% endfor %}",
        "<tool_call>\n<function=name>\n<parameter=x>",  # Qwen3-Coder's
        "[TOOL_CALLS] [{{ call | tojson }}]",
    ],
)
def test_other_formats_are_unknown(template: str) -> None:
    assert tool_format(template) is None


ARGUMENTS = st.dictionaries(
    st.text(max_size=5), st.recursive(st.none() | st.integers() | st.text(), st.lists), max_size=3
)
CALLS = st.lists(st.tuples(st.sampled_from(["weather", "time"]), ARGUMENTS), min_size=1, max_size=3)


@cache
def tokenizer_of(template: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=byte_level(), chat_template=template)


def rendered(template: str, message: dict[str, Any], before: str, after: str) -> str:
    """The text of an assistant's message, by transformers."""
    tokenizer = tokenizer_of(template)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", **message}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert isinstance(text, str)
    return text.partition(before)[2].removesuffix(after)


@settings(max_examples=40)
@given(CALLS, st.sampled_from(["", "Let me see.", "a\n\nb <tool"]), st.randoms())
def test_calls_of_qwens_template_are_found_and_give_its_text_again(
    calls: Any, content: str, random: Random
) -> None:
    told = [{"type": "function", "function": {"name": n, "arguments": a}} for n, a in calls]
    message = {"content": content, "tool_calls": told}
    text = rendered(QWEN, message, "assistant\n", "<|im_end|>")
    found = split(HERMES, pieces(text, random))
    assert found[0] == content
    assert [(name, json.loads(arguments)) for name, arguments in found[1]] == calls
    assert all(arguments in text for _, arguments in found[1])


@settings(max_examples=40)
@given(ARGUMENTS, st.booleans(), st.randoms())
def test_a_call_of_llamas_template_is_found(arguments: Any, tagged: bool, random: Random) -> None:
    told = [{"type": "function", "function": {"name": "weather", "arguments": arguments}}]
    text = rendered(LLAMA_3, {"tool_calls": told}, "assistant<|end_header_id|>\n\n", "<|eot_id|>")
    text = "<|python_tag|>" * tagged + text
    content, [(name, found)] = split(LLAMA, pieces(text, random))
    assert (content, name, json.loads(found)) == ("", "weather", arguments)


# --- split as it comes ----------------------------------------------------------------------------


def pieces(text: str, random: Random) -> list[str]:
    """A text in random pieces."""
    cuts = sorted(random.randrange(len(text) + 1) for _ in range(random.randrange(12)))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


TEXTS = [
    *(
        "",
        " ",
        "Hello.",
        " a <tool",
        "<tool_call>",
        "a <tool_call> b",
        "a\n\n<tool_call>{",
        "{",
        "{}",
    ),
    '<tool_call>\n{"name": "weather", "arguments": {"town": "Zü\\"}rich"}}\n</tool_call>',
    '<tool_call>{"name":"time","arguments":{}}</tool_call> <tool_call>{"name":"time","arguments":'
    "{}}</tool_call>\nDone.\n",
    '<tool_call>{"arguments": {"a": [{}]}, "name": "time"}</tool_call>',
    '<tool_call>\n{"name": "time", "arguments": {"a": "</tool_call>"}\n</tool_call>x',  # a } short
    '<tool_call>{"name": "time", "arguments": {"a": [1, 2',
    '<tool_call>{"name": "none", "arguments": {}}</tool_call>',
    '<tool_call>{"name": "time", "arguments": 3}</tool_call> <tool_call>{"name": "time", '
    '"arguments": {}}</tool_call>',
    '<tool_call> or <tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>',
    '<tool_call>{"name": "time", "arguments": {}}\n<tool_call>{"name": "time", "arguments": {}}',
    '{"name": "time", "parameters": {}}',
    ' <|python_tag|>{"name": "time", "parameters": {"a": "}"}}; '
    '{"name": "time", "parameters": {}}\n',
    '{"type": "function", "name": "time", "parameters": {"a": 1}}',
    '{"name": "time", "parameters": {}} and more',
    '{"name": "Ada", "age": 3}',
    '{"age": 3, "name": "time", "parameters": {}}',
    '{"name": "time", "parameters": {"a": ',
    '<|python_tag|>print("{}")',
]


@given(
    st.sampled_from(TEXTS) | st.text('<tool_call>/{}"name: time,argus\\ \n;', max_size=60),
    st.randoms(),
)
def test_what_is_found_does_not_depend_on_the_pieces(text: str, random: Random) -> None:
    for format in (HERMES, LLAMA):
        assert split(format, pieces(text, random)) == split(format, [text])


@given(st.text('<tool_call>/{}"name: time,argus\\ \n;', max_size=60))
def test_a_text_without_a_call_is_content_to_the_last_character(text: str) -> None:
    for format in (HERMES, LLAMA):
        content, calls = split(format, [text])
        if not calls:
            assert content == text


@pytest.mark.parametrize(
    ("format", "text", "content", "calls"),
    [
        (HERMES, "  Hello. \n", "  Hello. \n", []),
        (HERMES, TEXTS[10], "Done.\n", [("time", "{}"), ("time", "{}")]),
        (HERMES, TEXTS[11], "", [("time", '{"a": [{}]}')]),
        (HERMES, TEXTS[12], "x", [("time", '{"a": "</tool_call>"}')]),
        (HERMES, TEXTS[13], "", [("time", '{"a": [1, 2')]),
        (HERMES, TEXTS[14], TEXTS[14], []),
        (HERMES, TEXTS[15], TEXTS[15].partition(" <tool")[0], [("time", "{}")]),
        (HERMES, TEXTS[16], "<tool_call> or", [("time", "{}")]),
        (HERMES, TEXTS[17], "", [("time", "{}"), ("time", "{}")]),
        (HERMES, TEXTS[18], TEXTS[18], []),
        (LLAMA, TEXTS[18], "", [("time", "{}")]),
        (LLAMA, TEXTS[19], "", [("time", '{"a": "}"}'), ("time", "{}")]),
        (LLAMA, TEXTS[20], "", [("time", '{"a": 1}')]),
        (LLAMA, TEXTS[21], "and more", [("time", "{}")]),
        (LLAMA, TEXTS[22], TEXTS[22], []),
        (LLAMA, TEXTS[23], TEXTS[23], []),
        (LLAMA, TEXTS[24], "", [("time", '{"a": ')]),
        (LLAMA, TEXTS[25], TEXTS[25], []),
        (LLAMA, "I call " + TEXTS[18], "I call " + TEXTS[18], []),
    ],
)
def test_calls_and_content(
    format: ToolFormat, text: str, content: str, calls: list[tuple[str, str]]
) -> None:
    assert split(format, [text]) == (content, calls)


def test_arguments_and_content_come_as_soon_as_they_are_certain() -> None:
    splitter = ToolCallSplitter(HERMES, TOOLS)
    assert splitter.push("Well <") == [Content("Well")]
    assert splitter.push("b>\n<tool_call>\n{") == [Content(" <b>")]
    assert splitter.push('"name": "time", "arguments": ') == []
    assert splitter.push('{"a": ') == [CallBegun(0, "time"), CallArguments(0, '{"a": ')]
    assert splitter.push('"x"') == [CallArguments(0, '"x"')]
    assert splitter.push("}}\n</tool") == [CallArguments(0, "}")]
    splitter = ToolCallSplitter(LLAMA, TOOLS)
    assert splitter.push('{"na') == []
    assert splitter.push('sty": 1') == [Content('{"nasty": 1')]
    assert splitter.push("}") == [Content("}")]


# --- forced by a grammar --------------------------------------------------------------------------


@pytest.mark.parametrize("format", [HERMES, LLAMA], ids=["hermes", "llama"])
@pytest.mark.parametrize("names", [["weather"], ["time"], [t["function"]["name"] for t in TOOLS]])
@pytest.mark.parametrize("parallel", [False, True])
def test_any_text_of_the_grammar_is_calls_of_these_tools_with_valid_arguments(
    format: ToolFormat, names: list[str], parallel: bool
) -> None:
    tokenizer = byte_level()
    end = tokenizer.token_to_id("</s>")
    text = Text(TextAssets(tokenizer=tokenizer))
    size = tokenizer.get_vocab_size()
    model = evolve(CONFIGS["plain"], vocab_size=size, eos_token_ids=(end,))
    processor, most = StructuredOutputProcessor(text, model), 0
    schemas = {t["function"]["name"]: t["function"]["parameters"] or {} for t in TOOLS}
    for seed in range(6):
        random, ids = Random(seed), list[int]()
        state = processor.begin("a", {"grammar": format.grammar(TOOLS, names, parallel)}, [])
        while not state.ended:
            (effect,) = effects(processor, [(0, state)], size)
            allowed = allowed_tokens(effect)
            ids.append(end if end in allowed and random.random() < 0.5 else random.choice(allowed))
            processor.accept(state, ids[-1])
        written = text.decode(ids)
        content, calls = split(format, pieces(written, random))
        assert content == ""
        assert calls
        for name, arguments in calls:
            assert name in names
            assert isinstance(json.loads(arguments), dict)
            assert jsonschema_rs.is_valid(schemas[name], json.loads(arguments))
        most = max(most, len(calls))
        if "\n" not in "".join(arguments for _, arguments in calls):
            told = [
                {"type": "function", "function": {"name": n, "arguments": json.loads(a)}}
                for n, a in calls
            ]
            for template in (t for t, f in TEMPLATES.items() if f == format):
                if '"' not in "".join(names):  # templates do not escape names
                    assert shape(written) == shape(
                        rendered(template, {"tool_calls": told}, START[format], END[format])
                    )
    assert (most > 1) == (parallel and format == HERMES)


START = {HERMES: "assistant\n", LLAMA: "assistant<|end_header_id|>\n\n"}
END = {HERMES: "<|im_end|>", LLAMA: "<|eot_id|>"}


def shape(text: str) -> list[str]:
    """A text of calls without the arguments."""
    found, rest = [], text
    for _, arguments in split(HERMES if "<tool_call>" in text else LLAMA, [text])[1]:
        before, _, rest = rest.partition(arguments)
        found.append(before)
    return [*found, rest]
