"""Prompts of a run: from flags and run files, from files, or from standard input."""

import json
import os
import select
import stat
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from attrs import evolve, field, frozen

from tilewright import plugins
from tilewright.chat import Chat, plain_tools
from tilewright.cli.output import note
from tilewright.config import DEFAULT, ENVIRONMENT_PREFIX, Resolved
from tilewright.errors import ConfigError, PluginError, RequestError, nearest, quoted
from tilewright.paths import path_of
from tilewright.settings import TOOLS, keys, not_utf8, read_text
from tilewright.types import GenerateConfig
from tilewright.values import shown, structure

STDIN = "-"

_SECONDS_WITH_A_PROMPT = 2.0
"""How long a run waits for the first byte on standard input if the bundled model has a prompt."""
_SECONDS_WITHOUT = 60.0
"""How long a run waits for it otherwise."""
_CHAT_KEYS = ("tools", "template_options", "continue_last")
_PROMPT_KEYS = ("prompt", "messages", *_CHAT_KEYS, "id")


@frozen
class PromptEntry:
    """One prompt of a run, and what it sets for itself."""

    prompt: str | Chat
    origin: str
    """``PROMPT``, ``prompts.jsonl:3``."""
    settings: GenerateConfig = field(factory=GenerateConfig)
    """Settings that replace those of the run."""
    record: Mapping[str, Any] = field(factory=dict)
    """What the record of each of its results begins with: the ``id``, if it has one."""


def read_prompts(resolved: Resolved) -> list[str]:
    """At least one prompt, none of them empty, for a command that takes only texts."""
    entries = _entries(resolved)
    if resolved.config.prompts.chat:
        raise ConfigError(
            f"{resolved.origin('prompts', 'chat')}: expected prompts to continue, found chat = "
            "true: this command has no conversations"
        )
    for entry in entries:
        if isinstance(entry.prompt, Chat) or entry.settings != GenerateConfig():
            raise ConfigError(
                f"{entry.origin}: expected a prompt alone, found messages or settings: this "
                "command takes neither"
            )
    return [entry.prompt for entry in entries if isinstance(entry.prompt, str)]


def read_entries(resolved: Resolved) -> list[PromptEntry]:
    """At least one prompt, none of them empty, with its settings over those of the run.

    If none is given, it is read from standard input where that is a pipe, a file or a socket, and
    something comes; otherwise the bundled model has one of its own.
    """
    entries = _entries(resolved, piped=True)
    if resolved.config.prompts.chat:
        entries = [
            evolve(entry, prompt=Chat([{"role": "user", "content": entry.prompt}]))
            if isinstance(entry.prompt, str)
            else entry
            for entry in entries
        ]
    if not any(isinstance(entry.prompt, Chat) for entry in entries):
        _check_no_chat_settings(resolved)
        return entries
    common = common_chat(resolved)
    return [
        evolve(entry, prompt=_over(entry.prompt, common))
        if isinstance(entry.prompt, Chat)
        else entry
        for entry in entries
    ]


def _check_no_chat_settings(resolved: Resolved) -> None:
    """Raise ConfigError for a setting of ``[chat]`` that the environment does not give."""
    for (section, *key), origin in resolved.origins.items():
        if section != "chat" or origin.startswith(ENVIRONMENT_PREFIX):
            continue
        if getattr(resolved.config.chat, key[0]):
            raise ConfigError(
                f"{origin}: {key[0]} is for conversations, and every prompt is text to continue: "
                "add --chat, or chat = true in [prompts]"
            )


def _over(chat: Chat, common: Chat) -> Chat:
    """A conversation, with what all have in common where it has nothing of its own."""
    begun = chat.messages and chat.messages[0].get("role") in ("system", "developer")
    return evolve(
        chat,
        messages=chat.messages if begun else [*common.messages, *chat.messages],
        template_options={**common.template_options, **chat.template_options},
        tools=common.tools if chat.tools is None else chat.tools,
    )


def common_chat(resolved: Resolved) -> Chat:
    """What ``[chat]`` says of all conversations. Raises ConfigError for a wrong tools file."""
    chat = resolved.config.chat
    system = [{"role": "system", "content": chat.system}] if chat.system else []
    return Chat(system, chat.template_options or {}, _read_tools(resolved))


def _read_tools(resolved: Resolved) -> list[dict[str, Any]] | None:
    """The tools of ``[chat]``; None: it names no file. Raises ConfigError for a wrong file."""
    if resolved.config.chat.tools is None:
        return None
    path, origin = resolved.config.chat.tools, resolved.origin(*TOOLS)
    value = parsed_json(read_text(path_of(path), f"{origin}: tools file"), path)
    return _tools(value, path)


def _tools(value: Any, origin: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise ConfigError(
            f"{origin}: expected a JSON list of tools, such as "
            f'[{{"type": "function", "function": {{...}}}}], found {shown(value)}'
        )
    try:
        plain_tools(value)
    except RequestError as error:
        raise ConfigError(f"{origin}: {error}") from error
    return value


def _entries(resolved: Resolved, piped: bool = False) -> list[PromptEntry]:
    """piped: without a prompt, standard input may have one."""
    config, origin = resolved.config.prompts, resolved.origin("prompts", "text")
    entries = [PromptEntry(prompt, origin) for prompt in config.text]
    if config.file:
        origin = resolved.origin("prompts", "file")
        entries = [entry for file in config.file for entry in _entries_of(file, origin)]
    elif origin == DEFAULT and piped:
        text = _piped_text(_SECONDS_WITH_A_PROMPT if entries else _SECONDS_WITHOUT)
        entries = [PromptEntry(text, "standard input")] if text is not None else entries
    if not entries:
        raise ConfigError(
            "no prompt is given: expected a prompt, --prompt-file FILE, - for standard input, "
            "or [prompts] in a run file"
        )
    for number, entry in enumerate(entries, 1):
        which = "the prompt" if len(entries) == 1 else f"prompt {number} of {len(entries)}"
        if not entry.prompt:
            raise ConfigError(f"{entry.origin}: {which} is empty: expected text")
        try:
            if isinstance(entry.prompt, str):
                entry = entries[number - 1] = evolve(entry, prompt=_as_utf8(entry.prompt))
            json.dumps([_as_json(entry.prompt), entry.record], ensure_ascii=False).encode()
        except UnicodeError as error:
            raise ConfigError(f"{entry.origin}: {which} is not valid UTF-8") from error
    return entries


def _as_json(prompt: str | Chat) -> Any:
    return prompt if isinstance(prompt, str) else [prompt.messages, prompt.tools]


def _as_utf8(text: str) -> str:
    """The text; that of its bytes if it is an argument in a locale that is not UTF-8.

    Raises UnicodeError if the bytes are not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return os.fsencode(text).decode()
    return text


def _entries_of(file: str, origin: str) -> Iterator[PromptEntry]:
    if file == STDIN:
        yield PromptEntry(_without_last_newline(_read_stdin()), origin)
        return
    text = read_text(path_of(file), f"{origin}: prompt file")
    kind = Path(file).suffix
    if kind == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                where = f"{file}:{number}"
                yield _entry(parsed_json(line, where), where)
    elif kind == ".json":
        value = parsed_json(text, file)
        if not isinstance(value, list):
            raise ConfigError(
                f"{file}: expected a JSON list of prompts, found {shown(value)}: to continue the "
                f"file's own text, write --prompt-file - < {file}"
            )
        for number, item in enumerate(value, 1):
            yield _entry(item, f"{file}: item {number}")
    else:
        yield PromptEntry(_without_last_newline(text), origin)


def parsed_json(text: str, where: str) -> Any:
    """The value of JSON text. Raises ConfigError, which begins with where."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: invalid JSON: {error}") from error


def _entry(value: Any, origin: str) -> PromptEntry:
    """A prompt as a JSON value of a file gives it."""
    if isinstance(value, str):
        return PromptEntry(value, origin)
    if not isinstance(value, dict):
        raise ConfigError(
            f'{origin}: expected a string or {{"prompt": "..."}}, found {shown(value)}'
        )
    known = (*_PROMPT_KEYS, *keys("generate"))
    if "custom_id" in value and "body" in value:
        raise ConfigError(
            f"{origin}: expected a prompt, found a line of an OpenAI batch: write the messages of "
            'its "body" beside its "custom_id" as "id"'
        )
    for key in value:
        if key not in known:
            raise ConfigError(
                f"{origin}: unknown key {quoted(key)}{nearest(key, known)} "
                f"(keys: {', '.join(known)})"
            )
    values = {key: value[key] for key in value if key not in _PROMPT_KEYS}
    if isinstance(values.get("stop"), str):
        values["stop"] = [values["stop"]]  # never parsed as a JSON list
    settings = structure(GenerateConfig, values, origin)
    for name in settings.logits_processors or ():
        try:
            plugins.find("logits_processor", name)
        except PluginError as error:
            raise PluginError(f"{origin}: {error}") from error
    record = {"id": value["id"]} if "id" in value else {}
    return PromptEntry(_prompt(value, origin), origin, settings, record)


def _prompt(value: Mapping[str, Any], origin: str) -> str | Chat:
    """The prompt or the conversation of a JSON object."""
    if ("prompt" in value) == ("messages" in value):
        found = "both" if "prompt" in value else "neither"
        raise ConfigError(f'{origin}: expected either "prompt" or "messages", found {found}')
    if "prompt" in value:
        if not isinstance(value["prompt"], str):
            raise ConfigError(
                f'{origin}: expected a string as "prompt", found {shown(value["prompt"])}'
            )
        for key in _CHAT_KEYS:
            if key in value:
                raise ConfigError(
                    f'{origin}: {key!r} is for conversations: give "messages" in place of "prompt"'
                )
        return str(value["prompt"])
    options, tools = value.get("template_options"), value.get("tools")
    if options is not None and not isinstance(options, dict):
        raise ConfigError(
            f'{origin}: expected an object as "template_options", found {shown(options)}'
        )
    continue_last = value.get("continue_last", False)
    if not isinstance(continue_last, bool):
        raise ConfigError(
            f'{origin}: expected true or false as "continue_last", found {shown(continue_last)}'
        )
    return Chat(
        checked_messages(value["messages"], origin),
        options or {},
        None if tools is None else _tools(tools, origin),
        continue_last,
    )


def checked_messages(value: Any, origin: str, at_least: int = 1) -> list[dict[str, Any]]:
    """A JSON value that is a conversation: a list of so many messages, each with its role.

    Raises ConfigError, which begins with origin, for another value.
    """
    if not isinstance(value, list) or len(value) < at_least:
        raise ConfigError(
            f'{origin}: expected a list of messages such as {{"role": "user", "content": "Hi"}}, '
            f"found {shown(value)}"
        )
    for number, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ConfigError(
                f"{origin}: chat message {number}: expected an object with a role such as "
                f'{{"role": "user", "content": "Hi"}}, found {shown(message)}'
            )
    return value


def _piped_text(seconds: float) -> str | None:
    """The text on standard input if that is a pipe, a file or a socket; None: nothing is on it.

    Something must come within these seconds: a pipe that a parent process left open, and to which
    nobody writes, may never end. What has begun is read to its end.
    """
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):  # closed, or not a file of the system
        return None
    if not (stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)):
        return None
    soon = min(seconds, _SECONDS_WITH_A_PROMPT)
    if not _stdin_has_data(soon):
        if seconds > soon:
            note(
                f"note: waiting up to {seconds:.0f} s for a prompt on standard input "
                "(- waits without a limit)"
            )
        if not _stdin_has_data(seconds - soon):
            return None
    return _without_last_newline(text) if (text := _read_stdin()) else None


def _stdin_has_data(seconds: float) -> bool:
    """Whether standard input has a byte, or its end, within these seconds."""
    return bool(select.select([sys.stdin], [], [], seconds)[0])


def _read_stdin() -> str:
    if sys.stdin is None:
        raise ConfigError("standard input is closed: expected the prompt there")
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"standard input: {not_utf8(error)}") from error


def _without_last_newline(text: str) -> str:
    return text.removesuffix("\n").removesuffix("\r")
