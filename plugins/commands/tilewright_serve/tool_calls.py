"""Tool calls in the text of an answer, in the forms that models are trained to write.

- Hermes, Qwen: ``{"name": ..., "arguments": {...}}`` on a line between the lines ``<tool_call>``
  and ``</tool_call>``, any number of times, beside other text
  (https://github.com/NousResearch/Hermes-Function-Calling).
- Llama 3.1 and later: ``{"name": ..., "parameters": {...}}``, which is the whole answer
  (https://github.com/meta-llama/llama-models, models/llama3_1/prompt_format.md). ``<|python_tag|>``
  may be before it, and models write several calls with ``;`` between them.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from attrs import frozen

from tilewright_guidance.structured import json_rule

PYTHON_TAG = "<|python_tag|>"

_HEADER = re.compile(
    r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
"""What is before the arguments of a call, as nearly all are written."""

_KEYS = ("name", "arguments", "parameters", "type")
"""What an object that is a call can begin with."""

_NO_CALL = re.compile(r'\{\s*(?:"([^"\\]*)"|[^\s"])')
"""The first key of an object, or what cannot be one."""


@frozen
class Content:
    text: str


@frozen
class CallBegun:
    index: int
    name: str


@frozen
class CallArguments:
    index: int
    text: str


Event = Content | CallBegun | CallArguments


@frozen
class ToolFormat:
    begin: str
    """What is before a call; empty if a call is the whole answer."""
    end: str
    arguments: str
    """The key of a call's arguments."""

    def grammar(
        self, tools: Sequence[Mapping[str, Any]], names: Sequence[str], parallel: bool
    ) -> str:
        """A grammar (llguidance's dialect of Lark) of one call of one of the tools with these
        names, or, if parallel, of one or more where the format has several.

        tools: in OpenAI's form. Raises RequestError for parameters that are not JSON.
        """
        functions = {tool["function"]["name"]: tool["function"] for tool in tools}
        rules = []
        for i, name in enumerate(names):
            header = f'{{"name": {json.dumps(name, ensure_ascii=False)}, "{self.arguments}": '
            before, after = f"{self.begin}{header}", f"}}{self.end}"
            if self.begin:
                before, after = f"{self.begin}\n{header}", f"}}\n{self.end}"
            arguments = json_rule(_schema(functions[name].get("parameters")))
            rules.append(f"call{i}: {json.dumps(before)} {arguments} {json.dumps(after)}")
        rules.append(f"call: {' | '.join(f'call{i}' for i in range(len(names)))}")
        several = parallel and self.begin
        return "\n".join(
            [f"start: call{' (NEXT call)*' if several else ''}", 'NEXT: "\\n"', *rules]
        )


HERMES = ToolFormat("<tool_call>", "</tool_call>", "arguments")
LLAMA = ToolFormat("", "", "parameters")


def tool_format(template: str) -> ToolFormat | None:
    """The format in which a chat template writes the calls of earlier answers, if it is known.

    template: its Jinja source.
    """
    template = template.replace('\\"', '"')
    if "<tool_call>" in template and '"arguments"' in template and "<function=" not in template:
        return HERMES
    if '{"name": "' in template and '"parameters": ' in template and "ipython" in template:
        return LLAMA
    return None


def _schema(parameters: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The schema of a tool's arguments. Those that it does not name are not written."""
    schema = {"type": "object", **(parameters or {"properties": {}})}
    properties = schema.get("properties")
    if isinstance(properties, Mapping) and set(schema.get("required") or ()) <= set(properties):
        schema.setdefault("additionalProperties", False)
    return schema


class ToolCallSplitter:
    """Splits the text of an answer, as it comes, into content and calls of the given tools.

    Calls are told as they come: after its name, the text of a call's arguments follows as the model
    writes it, so it is not JSON if the model ends early or makes a mistake within the arguments.
    Text that is not a call of one of the tools is content. White space beside calls belongs to
    neither.
    """

    def __init__(self, format: ToolFormat, tools: Sequence[Mapping[str, Any]]):
        """tools: in OpenAI's form."""
        self._format = format
        self._names = {tool["function"]["name"] for tool in tools}
        self._held = ""
        self._gap = ""  # text before a call that is content if it turns out to be none
        self._index = 0
        self._after_call = False
        self._depth, self._in_string, self._escaped = 0, False, False
        self._events: list[Event] = []
        self._step = self._content if format.begin else self._beginning

    def push(self, piece: str) -> list[Event]:
        """Add a piece of text. Returns what is now certain."""
        return self._take(piece, final=False)

    def finish(self) -> list[Event]:
        """The rest of the answer; nothing follows."""
        return self._take("", final=True)

    def _take(self, piece: str, final: bool) -> list[Event]:
        self._held += piece
        while self._step(final):
            pass
        events, self._events = self._events, []
        return events

    # Each step takes what is certain from the held text. It returns whether another may go on.

    def _content(self, final: bool) -> bool:
        begin, text = self._format.begin, self._held
        if self._after_call:
            text = self._held = text.lstrip()
            self._after_call = not text
        at = text.find(begin) if begin else -1
        if at >= 0:
            self._tell(text[:at].rstrip())
            self._gap = text[len(text[:at].rstrip()) : at] + begin
            self._held, self._step = text[at + len(begin) :], self._call
            return True
        certain = text if final or not begin else _before_a_tag(text, begin)
        self._tell(certain)
        self._held = text[len(certain) :]
        return False

    def _beginning(self, final: bool) -> bool:
        """The beginning of an answer that either is a call or has none."""
        text = self._held.lstrip()
        begun = text.removeprefix(PYTHON_TAG).lstrip()
        if not final and (not begun or PYTHON_TAG.startswith(text)):
            return False
        if begun.startswith("{"):
            self._gap = self._held.removesuffix(begun)
            self._held, self._step = begun, self._call
        else:
            self._step = self._content
        return True

    def _call(self, final: bool) -> bool:
        end = self._format.end
        text, closed, rest = self._held.partition(end) if end else (self._held, "", "")
        header = _HEADER.match(text)
        name = _string(header[1]) if header else None
        if header and name in self._names:
            self._events.append(CallBegun(self._index, str(name)))
            self._held, self._step = text[header.end() :] + closed + rest, self._arguments
            return True
        first = None if end else _NO_CALL.match(text)
        never = bool(first and first[1] not in _KEYS)
        if not closed and not final and not never:
            return False
        call = None if never else _whole(text)
        if call and call[0] in self._names:
            self._events.append(CallBegun(self._index, call[0]))
            self._events.append(CallArguments(self._index, call[1]))
            self._ended(rest)
        else:
            self._tell(self._gap)
            self._step = self._content
        return True

    def _arguments(self, final: bool) -> bool:
        for at, character in enumerate(self._held, 1):
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped = character == "\\"
                self._in_string = character != '"'
            elif character == '"':
                self._in_string = True
            else:
                self._depth += (character in "{[") - (character in "}]")
                if not self._depth:
                    self._events.append(CallArguments(self._index, self._held[:at]))
                    self._held, self._step = self._held[at:], self._closing
                    return True
        if self._held:
            self._events.append(CallArguments(self._index, self._held))
        self._held = ""
        return False

    def _closing(self, final: bool) -> bool:
        """After the arguments: the object's end, which models forget, and that of the call."""
        text, end = re.sub(r"^\s*\}?\s*", "", self._held), self._format.end
        if not final and (not text or (end.startswith(text) and text != end)):
            return False
        self._ended(text.removeprefix(end))
        return True

    def _ended(self, rest: str) -> None:
        self._index += 1
        self._held, self._after_call, self._step = rest, True, self._content
        if not self._format.begin:
            self._step = self._between

    def _between(self, final: bool) -> bool:
        """Between calls of an answer that is calls or nothing."""
        text = re.sub(r"^\s*;?\s*", "", self._held)
        if not text:
            return False
        self._gap = self._held.removesuffix(text)
        self._held = text
        self._step = self._call if text.startswith("{") else self._content
        if self._step == self._content:
            self._after_call = False
            self._held = self._gap.lstrip() + text
        return True

    def _tell(self, text: str) -> None:
        if text:
            self._events.append(Content(text))


def _before_a_tag(text: str, tag: str) -> str:
    """Text without what may be white space before a tag, or the beginning of the tag."""
    lengths = range(min(len(tag) - 1, len(text)), 0, -1)
    begun = next((n for n in lengths if text.endswith(tag[:n])), 0)
    return text[: len(text) - begun].rstrip()


def _string(text: str) -> str | None:
    """A string in JSON, or None if it is not valid."""
    try:
        return str(json.loads(text))
    except ValueError:
        return None


def _whole(text: str) -> tuple[str, str] | None:
    """Name and arguments of a call that is complete, whatever the order of its keys."""
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    key = next((key for key in ("arguments", "parameters") if isinstance(call.get(key), dict)), "")
    return (call["name"], _value_of(text, key)) if key else None


def _value_of(text: str, key: str) -> str:
    """The text of the value that a key has in an object in JSON."""
    decoder, at, found = json.JSONDecoder(), text.index("{") + 1, ""
    space = re.compile(r"[\s,:]*")
    while text[(at := space.match(text, at).end())] != "}":  # type: ignore[union-attr]
        name, at = decoder.raw_decode(text, at)
        begin = space.match(text, at).end()  # type: ignore[union-attr]
        _, at = decoder.raw_decode(text, begin)
        found = text[begin:at] if name == key else found
    return found
