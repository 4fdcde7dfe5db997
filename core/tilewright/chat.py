"""Conversations as prompts, and the thinking in their answers."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

from attrs import field, frozen

from tilewright.errors import RequestError, listed, nearest, quoted
from tilewright.values import shown

if TYPE_CHECKING:
    from tilewright.chat_template import CompiledTemplate

Message = Mapping[str, Any]

BEGIN_THINKING = "<think>"
END_THINKING = "</think>"

_GIVEN = ("messages", "tools", "add_generation_prompt")
"""Variables of a template that a call sets by itself, so that options may not set them."""

_TOOL_ROLES = ("tool", "ipython")
"""Roles whose content may be data: the result of a tool."""

_DEEPEST = 100
"""How many levels of lists and mappings a message may have."""

_MARK = "tilewrightlooksforthis"
"""Text that stands for the content of messages when a template is tried out."""

_END_MARK = "tilewrightgoesonhere "
"""Text at the end of a message that is continued. Whether its space survives tells whether the
template trims the message."""


@frozen
class Chat:
    """A conversation, which a model's chat template makes a prompt of.

    A template gets it as transformers' ``apply_chat_template`` passes it. A key whose value is None
    counts as absent. Content that is a list of text parts is joined by line breaks for a template
    that reads only text, and a tool call's ``arguments`` are passed as JSON text or as an object,
    whichever of the two the template can render.
    """

    messages: Sequence[Message]
    """Mappings with ``role``, ``content`` and whatever else the template reads. Dataclasses and
    objects with ``model_dump()``, such as an OpenAI client returns, are taken as mappings."""
    template_options: Mapping[str, Any] = field(factory=dict)
    """Variables of the template, such as ``{"enable_thinking": False}``. A name that the template
    does not read is an error."""
    tools: Sequence[Mapping[str, Any]] | None = None
    """Descriptions of functions that the model may call, as JSON schemas in OpenAI's form. They are
    an error for a template that does not read ``tools``."""
    continue_last: bool = False
    """Continue the last message, which is the assistant's, in place of answering it."""


Render = Callable[[list[dict[str, Any]]], str]


def render(
    chat: Chat,
    template: "CompiledTemplate",
    special_tokens: Mapping[str, str],
    add_generation_prompt: bool,
) -> str:
    """The prompt that a template makes of a conversation.

    special_tokens: variables of the template, such as ``bos_token``. add_generation_prompt: end
    with the beginning of an answer, unless the last message is continued.

    Raises RequestError for messages, tools or options that are not as ``Chat`` describes them or
    that the template does not accept, and ModelError when the template itself is wrong.
    """
    from tilewright.chat_template import rendering

    _check_read(template, chat)
    options = {
        n: _plain(v, f"template option {quoted(n)}") for n, v in chat.template_options.items()
    }
    messages = plain_messages(chat.messages)
    variables = {
        **special_tokens,
        "documents": None,
        **options,
        "tools": plain_tools(chat.tools),
        "add_generation_prompt": add_generation_prompt and not chat.continue_last,
    }

    def rendered(messages: list[dict[str, Any]]) -> str:
        return template.render({**variables, "messages": messages})

    with rendering():
        messages = _with_content_as_read(messages, rendered)
        messages = _with_arguments_as_read(messages, rendered)
        return _continued(messages, rendered) if chat.continue_last else rendered(messages)


def last_text(chat: Chat) -> str:
    """The text of the last message, or of its last part."""
    content = plain_messages(chat.messages)[-1].get("content", "")
    if isinstance(content, str):
        return content
    return str(content[-1]["text"]) if content else ""


# --- what a template gets ------------------------------------------------------------------------


def plain_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages as a template gets them. Raises RequestError for what ``Chat`` does not take."""
    if isinstance(messages, (str, bytes, Mapping)) or not hasattr(messages, "__iter__"):
        raise RequestError(
            'expected a list of chat messages such as {"role": "user", "content": "Hi"}, found '
            f"{type(messages).__name__}"
        )
    made = [_plain_message(index, message) for index, message in enumerate(messages)]
    if not made:
        raise RequestError("the conversation is empty: expected at least one message")
    return made


def _plain_message(index: int, message: Any) -> dict[str, Any]:
    where = f"chat message {index}"
    plain = _plain(message, where)
    if not isinstance(plain, dict):
        raise RequestError(
            f'{where}: expected a mapping such as {{"role": "user", "content": "Hi"}}, found '
            f"{type(message).__name__}"
        )
    plain = {key: value for key, value in plain.items() if value is not None}
    role, content = plain.get("role"), plain.get("content", "")
    if not isinstance(role, str):
        raise RequestError(
            f"{where}: 'role' must be text such as 'user', found "
            f"{'none' if role is None else shown(role)}"
        )
    if isinstance(content, list):
        if role not in _TOOL_ROLES or all(_is_part(part) for part in content):
            for number, part in enumerate(content):
                _check_part(part, f"{where}, part {number} of its content")
    elif not isinstance(content, str) and not (isinstance(content, dict) and role in _TOOL_ROLES):
        raise RequestError(
            f"{where}: 'content' must be text or a list of text parts, found {shown(content)}"
        )
    # Names of reasoning that other servers and templates use, as transformers passes them.
    names = ("reasoning_content", "thinking", "reasoning")
    reasoning = next((plain[name] for name in names if name in plain), None)
    if reasoning is not None:
        plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    return plain


def _is_part(part: Any) -> bool:
    return isinstance(part, dict) and "type" in part


def _check_part(part: Any, where: str) -> None:
    wanted = '{"type": "text", "text": ...}'
    if not _is_part(part):
        raise RequestError(f"{where}: expected {wanted}, found {shown(part)}")
    if part["type"] != "text":
        raise RequestError(
            f"{where}: expected {wanted}, found one of type {shown(part['type'])}: models are "
            "served with text alone, so leave it out"
        )
    if not isinstance(part.get("text"), str):
        raise RequestError(f"{where}: 'text' must be text, found {shown(part.get('text'))}")


def plain_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[Any] | None:
    """The tools as a template gets them. Raises RequestError for what ``Chat`` does not take."""
    if tools is None:
        return None
    wanted = 'JSON schemas of functions such as {"type": "function", "function": {"name": ...}}'
    if isinstance(tools, (str, bytes, Mapping)) or not hasattr(tools, "__iter__"):
        raise RequestError(f"tools: expected a list of {wanted}, found {type(tools).__name__}")
    made = []
    for index, tool in enumerate(tools):
        if isinstance(tool, type) or callable(tool) or not isinstance(tool, Mapping):
            raise RequestError(f"tool {index}: expected {wanted}, found {type(tool).__name__}")
        made.append(_plain(tool, f"tool {index}"))
    return made


def _check_read(template: "CompiledTemplate", chat: Chat) -> None:
    """Check that the template reads what it is given."""
    if not isinstance(chat.template_options, Mapping):
        raise RequestError(
            'template_options: expected a mapping such as {"enable_thinking": False}, found '
            f"{type(chat.template_options).__name__}"
        )
    for name in chat.template_options:
        if name in _GIVEN:
            raise RequestError(
                f"template option {quoted(name)}: set from the call's own arguments, so it "
                "cannot be an option: leave it out"
            )
        if name not in template.variables:
            others = sorted(template.variables - set(_GIVEN))
            raise RequestError(
                f"the chat template reads no variable {quoted(name)}"
                f"{nearest(str(name), others)} (it reads {listed(others) or 'no option'})"
            )
    if chat.tools and "tools" not in template.variables:
        raise RequestError(
            "the chat template does not read 'tools', so the model would not learn of them: leave "
            "them out, describe them in a message, or use a template for tools"
        )


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """A copy of plain JSON types, so that no method of an object is in a template's reach."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if depth > _DEEPEST:
        raise RequestError(f"{where}: expected at most {_DEEPEST} levels of lists and mappings")
    if isinstance(value, Mapping):
        wrong = next((key for key in value if isinstance(key, (tuple, Mapping))), None)
        if wrong is not None:
            raise RequestError(f"{where}: expected text as key of a mapping, found {shown(wrong)}")
        return {_plain(key, where): _plain(item, where, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, where, depth + 1) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name), where, depth + 1) for f in fields(value)}
    if callable(dump := getattr(value, "model_dump", None)) and not isinstance(value, type):
        return _plain(dump(), where, depth + 1)
    raise RequestError(
        f"{where}: expected text, numbers, lists and mappings, found {type(value).__name__}"
    )


# --- the forms that a template reads -------------------------------------------------------------


def _tried(render: Render, messages: list[dict[str, Any]]) -> str | None:
    """What a template makes of messages, or None if it fails."""
    from tilewright.chat_template import TemplateLimitError

    try:
        return render(messages)
    except TemplateLimitError:
        raise
    except Exception:
        return None


def _with_content_as_read(messages: list[dict[str, Any]], render: Render) -> list[dict[str, Any]]:
    """Join the text parts of each message whose content the template reads only as text.

    To find out, the conversation is rendered twice with marks in place of these contents: as parts,
    and as text. A template reads the parts of a message if its mark appears at least as often as in
    the text form, and not within a list that was written out.
    """
    marks = {
        i: f"{_MARK}{i}x"
        for i, message in enumerate(messages)
        if isinstance(content := message.get("content"), list) and all(map(_is_part, content))
    }
    if not marks:
        return messages

    def tried(content: Callable[[str], Any]) -> str | None:
        marked = [
            m | {"content": content(marks[i])} if i in marks else m for i, m in enumerate(messages)
        ]
        tries = (_tried(render, _with_calls(marked, form)) for form in (_as_given, *_FORMS))
        return next((text for text in tries if text is not None), None)

    in_parts = tried(lambda mark: [{"type": "text", "text": mark}])
    in_text = tried(lambda mark: mark)
    made = []
    for i, message in enumerate(messages):
        if i in marks and in_text is not None:
            mark = marks[i]
            written_out = re.search(rf"""text['"]: ?['"]{mark}""", in_parts or "")
            if in_parts is None or written_out or in_parts.count(mark) < in_text.count(mark):
                texts = [part["text"] for part in message["content"]]
                message = message | {"content": "\n".join(texts)}
        made.append(message)
    return made


def _with_arguments_as_read(messages: list[dict[str, Any]], render: Render) -> list[dict[str, Any]]:
    """Convert the arguments of tool calls from JSON text to objects, or back, where the template
    reads only the other form."""
    if not any(_calls(message) for message in messages):
        return messages

    text = f'{{"{_MARK}": "{_MARK}"}}'
    in_text = _tried(render, _with_calls(messages, lambda _: text))
    in_object = _tried(render, _with_calls(messages, lambda _: {_MARK: _MARK}))
    reads_text = in_text is not None and text in in_text
    reads_objects = in_object is not None and _MARK in in_object and f"'{_MARK}'" not in in_object
    if reads_text == reads_objects:
        return messages
    return _with_calls(messages, _as_object if reads_objects else _as_text)


def _calls(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    calls = message.get("tool_calls")
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        return []
    return calls


def _with_calls(messages: list[dict[str, Any]], form: Callable[[Any], Any]) -> list[dict[str, Any]]:
    """Messages with the arguments of their tool calls in a form."""
    return [
        m | {"tool_calls": [_with_arguments(call, form) for call in _calls(m)]} if _calls(m) else m
        for m in messages
    ]


def _with_arguments(call: dict[str, Any], form: Callable[[Any], Any]) -> dict[str, Any]:
    if isinstance(function := call.get("function"), dict):
        return call | {"function": _with_arguments(function, form)}
    return call | {"arguments": form(call["arguments"])} if "arguments" in call else call


def _as_given(arguments: Any) -> Any:
    return arguments


def _as_object(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return arguments
    try:
        value = json.loads(arguments) if arguments.strip() else {}
    except ValueError:  # a model wrote it
        return arguments
    return value if isinstance(value, dict) else arguments


def _as_text(arguments: Any) -> Any:
    if not isinstance(arguments, dict):
        return arguments
    return json.dumps(arguments, ensure_ascii=False)


_FORMS = (_as_object, _as_text)


def _continued(messages: list[dict[str, Any]], render: Render) -> str:
    """The rendered conversation up to the end of its last message's text."""
    last, where = messages[-1], f"chat message {len(messages) - 1}"
    if last["role"] != "assistant":
        raise RequestError(
            f"{where}: expected the assistant's message, which is to be continued, found one of "
            f"{last['role']!r}: add it, or answer the conversation in place of continuing it"
        )
    content = last.get("content")
    if not content and content != "":
        raise RequestError(f"{where}: has no content that could be continued")
    marked: str | list[dict[str, Any]]
    if isinstance(content, str):
        text, marked = content, content + _END_MARK
    else:
        text = content[-1]["text"]
        marked = [*content[:-1], content[-1] | {"text": text + _END_MARK}]
    rendered = render([*messages[:-1], last | {"content": marked}])
    end = rendered.rfind(_END_MARK.strip())
    if end < 0 or text.strip() not in rendered:
        raise RequestError(
            f"{where}: cannot be continued, since the chat template leaves out or changes its "
            "content: answer the conversation in place of continuing it"
        )
    kept = rendered[:end]
    return kept if rendered.startswith(_END_MARK, end) else kept.rstrip()


# --- thinking ------------------------------------------------------------------------------------


class ThinkingSplitter:
    """Splits the text of an answer, as it comes, into the model's thinking and the answer proper.

    The thinking is what ``<think>`` and ``</think>`` enclose at the beginning of the text. The tags
    are part of neither, nor is white space beside them. A text that ends within the thinking has
    no answer.
    """

    def __init__(self, opened: bool = False):
        """opened: the text begins within the thinking (``Text.opens_thinking``)."""
        self._state = "opened" if opened else "beginning"
        self._held = ""

    def push(self, piece: str) -> tuple[str, str]:
        """Add a piece of text. Returns the thinking and the answer that are now certain."""
        return self._take(piece, final=False)

    def finish(self) -> tuple[str, str]:
        """The rest of the thinking and of the answer; nothing follows."""
        return self._take("", final=True)

    def _take(self, piece: str, final: bool) -> tuple[str, str]:
        text, self._held = self._held + piece, ""
        thinking = ""
        if self._state in ("beginning", "opened"):
            stripped = text.lstrip()
            if not final and BEGIN_THINKING.startswith(stripped):
                self._held = text
                return "", ""
            if stripped.startswith(BEGIN_THINKING):
                self._state, text = "thinking", stripped.removeprefix(BEGIN_THINKING).lstrip()
            elif self._state == "opened":
                self._state, text = "thinking", stripped
            else:
                self._state = "answer"
        if self._state == "thinking":
            thinking, tag, text = text.partition(END_THINKING)
            if tag:
                thinking, self._state = thinking.rstrip(), "answer begins"
            else:
                certain = thinking if final else _before_a_tag(thinking)
                self._held = thinking[len(certain) :]
                return certain, ""
        if self._state == "answer begins":
            text = text.lstrip()
            self._state = "answer" if text else self._state
        return thinking, text


def _before_a_tag(text: str) -> str:
    """Text without what may be white space before the tag that ends the thinking, or the tag."""
    lengths = range(min(len(END_THINKING) - 1, len(text)), 0, -1)
    begun = next((n for n in lengths if text.endswith(END_THINKING[:n])), 0)
    return text[: len(text) - begun].rstrip()


def split_thinking(text: str, opened: bool = False) -> tuple[str, str]:
    """The thinking and the answer of a whole text; see ``ThinkingSplitter``."""
    splitter = ThinkingSplitter(opened)
    thinking, answer = splitter.push(text)
    more, rest = splitter.finish()
    return thinking + more, answer + rest
