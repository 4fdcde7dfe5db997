"""POST /v1/chat/completions: from a body to texts to generate, and from these to the answer."""

import asyncio
import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from attrs import define, evolve, frozen

from tilewright import Chat
from tilewright.async_engine import AsyncGeneration
from tilewright.chat import ThinkingSplitter, last_text
from tilewright.errors import ModelError, RequestError
from tilewright.text import Text
from tilewright.types import GenerateDelta, GenerateResult
from tilewright_serve.errors import ApiError
from tilewright_serve.fields import ChatCompletion, NamedTool, Tokenize
from tilewright_serve.generation import (
    STRUCTURED_OUTPUT,
    Usage,
    finish_reason,
    generate_config,
    later_seeds,
    stop_reason,
)
from tilewright_serve.logprobs import chat_logprobs
from tilewright_serve.server import Model, TextRequest
from tilewright_serve.tool_calls import (
    CallArguments,
    CallBegun,
    Content,
    ToolCallSplitter,
    ToolFormat,
    tool_format,
)


async def prepared(model: Model, body: ChatCompletion, separate: bool) -> "ChatAnswer":
    """What is to be generated. Raises ApiError for a body that cannot be served.

    separate: whether thinking is separated from the answer, if the body does not say it.
    """
    text = model.loaded.text
    tools = _tools(body)
    called = None if body.tool_choice == "none" or not tools else body.tool_choice or "auto"
    chat = _chat(text, body, tools if called else None)
    separate = separate if body.separate_reasoning is None else body.separate_reasoning
    ids, opened, echoed = await asyncio.to_thread(_encoded, text, chat, body, separate)
    most = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    config = generate_config(model, body, [ids], most, None, logprobs)
    if not body.ignore_eos:
        ends = (*(config.stop_token_ids or ()), *text.assets.turn_end_ids)
        config = evolve(config, stop_token_ids=ends)
    format = tool_format(_template(text, bool(tools))) if called else None
    if called and called != "auto":
        config = evolve(config, logits_processors=_forced(config.logits_processors, format, body))
    # What a grammar shapes begins with the answer.
    opened = opened and not config.logits_processors
    n = body.n or 1
    return ChatAnswer(
        model=model,
        body=body,
        texts=[(ids, one) for one in later_seeds(config, n)],
        echoed=echoed,
        parts=[
            _Parts(
                ThinkingSplitter(opened) if separate else None,
                ToolCallSplitter(format, tools) if format else None,
                body.parallel_tool_calls is not False,
            )
            for _ in range(n)
        ],
    )


def prompt_ids(text: Text, body: Tokenize) -> list[int]:
    """The prompt that a chat template makes of messages. Raises ApiError."""
    return _ids(text, _chat(text, body, _tools(body) or None), body)


def _tools(body: ChatCompletion | Tokenize) -> list[dict[str, Any]]:
    return [tool.model_dump(exclude_none=True) for tool in body.tools or ()]


def _chat(
    text: Text, body: ChatCompletion | Tokenize, tools: Sequence[Mapping[str, Any]] | None
) -> Chat:
    options = dict(body.chat_template_kwargs or {})
    effort = body.reasoning_effort if isinstance(body, ChatCompletion) else None
    template = _template(text, bool(tools))
    known = _variables(template)
    if effort is not None:
        if "reasoning_effort" in known:
            options.setdefault("reasoning_effort", effort)
        elif "enable_thinking" in known:
            options.setdefault("enable_thinking", effort != "none")
        elif effort != "none":
            raise ApiError(
                400,
                "'reasoning_effort' changes nothing for this model, whose chat template knows no "
                "thinking: leave it out",
                "reasoning_effort",
            )
    messages = body.messages or []
    if "developer" not in template:
        # OpenAI's newer name; templates that do not know it would leave the message out.
        messages = [m | {"role": "system"} if m.get("role") == "developer" else m for m in messages]
    return Chat(
        messages,
        # Clients switch thinking off for any model, also for those whose template knows none.
        {name: value for name, value in options.items() if name in known},
        tools,
        bool(body.continue_final_message),
    )


def _template(text: Text, tools: bool) -> str:
    assets = text.assets
    own = assets.tool_chat_template if tools else None
    return own or assets.chat_template or ""


def _variables(template: str) -> frozenset[str]:
    from tilewright.chat_template import compiled

    try:
        return frozenset(compiled(template).variables)
    except ModelError as error:
        raise ApiError(500, str(error)) from error


def _encoded(
    text: Text, chat: Chat, body: ChatCompletion, separate: bool
) -> tuple[list[int], bool, str]:
    """The prompt's token ids, whether the answer begins within thinking, and what it echoes."""
    try:
        opened = separate and text.opens_thinking(chat)
        last = chat.messages[-1]
        echoed = last_text(chat) if body.echo and last.get("role") == "assistant" else ""
    except RequestError as error:
        raise ApiError(400, str(error), "messages") from error
    return _ids(text, chat, body), opened, echoed


def _ids(text: Text, chat: Chat, body: ChatCompletion | Tokenize) -> list[int]:
    try:
        return text.encode_chat(chat, body.add_generation_prompt is not False)
    except RequestError as error:
        raise ApiError(400, str(error), "messages") from error
    except ModelError as error:
        raise ApiError(500, str(error)) from error


def _forced(
    processors: Mapping[str, Any] | None, format: ToolFormat | None, body: ChatCompletion
) -> dict[str, Any]:
    """The logits processor that makes the text a call."""
    if processors:
        raise ApiError(
            400, "a call that 'tool_choice' forces leaves no room for another format", "tool_choice"
        )
    if format is None:
        raise ApiError(
            400,
            "'tool_choice' cannot force a call: in which form this model writes calls is not known "
            'from its chat template; use "auto"',
            "tool_choice",
        )
    tools = _tools(body)
    names = [tool["function"]["name"] for tool in tools]
    several = body.parallel_tool_calls is not False
    if isinstance(body.tool_choice, NamedTool):
        names, several = [body.tool_choice.function.name], False
    return {STRUCTURED_OUTPUT: {"grammar": format.grammar(tools, names, several)}}


@define(eq=False)
class _Parts:
    """Splits one text, as it comes, into what the model thinks, its answer, and its calls."""

    thinking: ThinkingSplitter | None
    calls: ToolCallSplitter | None
    several_calls: bool
    num_calls: int = 0

    def push(self, piece: str) -> list[dict[str, Any]]:
        """The ``delta`` objects of a piece of text."""
        thought, answer = self.thinking.push(piece) if self.thinking else ("", piece)
        return [*_reasoning(thought), *self._answer(answer, final=False)]

    def finish(self) -> list[dict[str, Any]]:
        thought, answer = self.thinking.finish() if self.thinking else ("", "")
        return [*_reasoning(thought), *self._answer(answer, final=True)]

    def _answer(self, text: str, final: bool) -> Iterator[dict[str, Any]]:
        if self.calls is None:
            if text:
                yield {"content": text}
            return
        events = [*(self.calls.push(text) if text else ()), *(self.calls.finish() if final else ())]
        for event in events:
            if isinstance(event, Content):
                yield {"content": event.text}
            elif event.index == 0 or self.several_calls:
                yield {"tool_calls": [self._call(event)]}

    def _call(self, event: CallBegun | CallArguments) -> dict[str, Any]:
        if isinstance(event, CallArguments):
            return {"index": event.index, "function": {"arguments": event.text}}
        self.num_calls += 1
        return {
            "index": event.index,
            "id": f"call_{secrets.token_hex(12)}",
            "type": "function",
            "function": {"name": event.name, "arguments": ""},
        }


def _reasoning(text: str) -> Iterator[dict[str, Any]]:
    if text:
        yield {"reasoning_content": text}


@frozen(kw_only=True, eq=False)
class ChatAnswer:
    """An ``Answer`` (see generation)."""

    model: Model
    body: ChatCompletion
    texts: list[TextRequest]
    echoed: str
    parts: list[_Parts]

    kind = "chatcmpl"
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    @property
    def texts_per_prompt(self) -> int:
        return len(self.texts)

    def begun(self, number: int, generation: AsyncGeneration) -> dict[str, Any] | None:
        delta = {"role": "assistant", "content": self.echoed}
        choice = {"index": number, "delta": delta, "logprobs": None, "finish_reason": None}
        if self.body.return_token_ids:
            choice["prompt_token_ids"] = list(self.texts[number][0])
        return choice

    def added(self, number: int, delta: GenerateDelta) -> list[dict[str, Any]]:
        parts, result = self.parts[number], delta.result
        found = [*parts.push(delta.text), *(parts.finish() if result else ())]
        first: dict[str, Any] = {}
        if delta.token_ids and self.body.logprobs:
            first["logprobs"] = chat_logprobs(self.model.loaded.text, delta.logprobs or ())
        if delta.token_ids and self.body.return_token_ids:
            first["token_ids"] = list(delta.token_ids)
        if not found and (first or result):
            found = [{}]
        choices = [
            {"index": number, "delta": one, "logprobs": None, "finish_reason": None}
            for one in _joined(found)
        ]
        if choices:
            choices[0] |= first
        if result:
            choices[-1] |= self._end(number, result)
        return choices

    def whole(self, results: Sequence[GenerateResult]) -> list[dict[str, Any]]:
        return [self._whole(i, result) for i, result in enumerate(results)]

    def usage(self, results: Sequence[GenerateResult]) -> Usage:
        return Usage.of(results, self.texts_per_prompt)

    def _whole(self, number: int, result: GenerateResult) -> dict[str, Any]:
        parts = self.parts[number]
        message: dict[str, Any] = {"role": "assistant", "content": self.echoed, "refusal": None}
        calls: dict[int, dict[str, Any]] = {}
        for delta in (*parts.push(result.text), *parts.finish()):
            for call in delta.pop("tool_calls", ()):
                known = calls.setdefault(call.pop("index"), call)
                if known is not call:
                    known["function"]["arguments"] += call["function"]["arguments"]
            for name, text in delta.items():
                message[name] = message.get(name, "") + text
        if calls:
            message["tool_calls"] = list(calls.values())
            message["content"] = message["content"] or None
        choice: dict[str, Any] = {"index": number, "message": message, "logprobs": None}
        if self.body.logprobs:
            choice["logprobs"] = chat_logprobs(self.model.loaded.text, result.logprobs or ())
        if self.body.return_token_ids:
            choice["token_ids"] = list(result.token_ids)
            choice["prompt_token_ids"] = list(result.prompt_token_ids)
        return choice | self._end(number, result)

    def _end(self, number: int, result: GenerateResult) -> dict[str, Any]:
        reason = finish_reason(result)
        # OpenAI says stop where the client itself chose the function.
        if self.parts[number].num_calls and reason == "stop":
            named = isinstance(self.body.tool_choice, NamedTool)
            reason = "stop" if named else "tool_calls"
        return {"finish_reason": reason, "stop_reason": stop_reason(self.model, result)}


def _joined(deltas: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Deltas with neighbours of the same text field as one."""
    last: dict[str, Any] | None = None
    for delta in deltas:
        if last is not None and last.keys() == delta.keys() and "tool_calls" not in delta:
            for name, text in delta.items():
                last[name] += text
            continue
        if last is not None:
            yield last
        last = delta
    if last is not None:
        yield last
