"""The settings of a run: their sections, keys and types, and how a value that a user wrote is read.

A setting has a place, such as ``("runtime", "page_size")``: section and key.
"""

import os
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from attrs import asdict, fields, frozen

from tilewright.errors import ConfigError, quoted
from tilewright.paths import expanded, path_of
from tilewright.types import GenerateConfig, RuntimeConfig, described
from tilewright.values import structure

DEMO_MODEL = Path(__file__).parent / "demo_model"
DEMO_PROMPT = "We hold these truths to be self-evident,"

_MOST_BYTES = 64 * 2**20
"""Size limit of a file with settings or prompts, so that a device file ends in an error."""


@frozen
class Given:
    """A value as a user wrote it, and where."""

    value: Any
    origin: str
    """``--page-size``, ``TILEWRIGHT_RUNTIME_PAGE_SIZE``, ``run.toml:12``."""


Place = tuple[str, ...]
"""Section and key, or ``options``, kind (, name of a plugin) and option."""

Layer = Mapping[Place, Given]


@frozen
class PluginSelection:
    """Which plugins make the engine: ``name`` or ``distribution:name`` of each kind."""

    loader: str | None = described(
        "plugin that reads the model's configuration and tokenizer; default: the loader that "
        "recognises the model"
    )
    executor: str = described("plugin that runs the forward pass", "torch")
    kv_allocator: str = described("plugin that assigns pages of the KV cache to requests", "paged")
    sampler: str = described("plugin that chooses tokens", "top-p")
    observers: tuple[str, ...] = described("plugins that receive events", ())


@frozen
class ModelChoice:
    """The model, and its name in results."""

    id: str = described("name of the model in results; default: the last part of path", "")
    path: str = described(
        "registered name or directory of the model, or another source that a loader accepts; "
        "default: the bundled demo model",
        str(DEMO_MODEL),
    )
    format: str | None = described("weight format; default: the format whose files are found")


@frozen
class Prompts:
    """The prompts, in text or in files, one or a list; the file ``-`` is standard input."""

    text: tuple[str, ...] = described("text to continue", ())
    file: tuple[str, ...] = described(
        "file that holds one prompt; if its name ends in .jsonl, one JSON prompt or conversation "
        "per line, and if it ends in .json, a list of these",
        (),
    )
    chat: bool = described(
        "make each prompt a user's message, and ask for the answer through the chat template",
        False,
    )


@frozen
class ChatSettings:
    """What conversations have in common."""

    system: str | None = described(
        "system message of conversations that do not begin with one of their own"
    )
    template_options: Mapping[str, Any] | None = described(
        "set a variable of the chat template, such as enable_thinking=false; the value is JSON, "
        "else text"
    )
    tools: str | None = described(
        "file with a JSON list of tools that the model may call, in OpenAI's form"
    )
    hide_thinking: bool = described(
        "leave out of an answer what the model thinks between <think> and </think>", False
    )


@frozen
class Output:
    """Where results go, and their format."""

    format: Literal["text", "jsonl"] = described(
        "text, or jsonl: one JSON object per result", "text"
    )
    file: str | None = described(
        "file to write, which appears once it is complete; default: standard output"
    )


@frozen(kw_only=True)
class RunConfig:
    """All settings of a run."""

    plugins: PluginSelection
    options: Mapping[str, Mapping[str, Any]]
    """Options as ``LLMEngine.from_plugins`` takes them; the plugins read and check them."""
    model: ModelChoice
    runtime: RuntimeConfig
    generate: GenerateConfig
    prompts: Prompts
    chat: ChatSettings
    output: Output

    def selection(self) -> dict[str, Any]:
        """The arguments of ``LLMEngine.from_plugins``."""
        return {**asdict(self.plugins, recurse=False), "options": self.options}


SECTIONS: dict[str, type] = {
    "plugins": PluginSelection,
    "model": ModelChoice,
    "runtime": RuntimeConfig,
    "generate": GenerateConfig,
    "prompts": Prompts,
    "chat": ChatSettings,
    "output": Output,
}
"""The tables of a run file except ``[options.<kind>]``."""
PATH = ("model", "path")
TEXT, FILE = ("prompts", "text"), ("prompts", "file")
TOOLS = ("chat", "tools")
FILES = (FILE, TOOLS, ("output", "file"))
"""Settings that name a file."""
_STREAM = ("generate", "stream")


def keys(section: str, sections: Mapping[str, type] = SECTIONS) -> list[str]:
    """The keys of a section. Streaming is the command line's own choice, not a setting of a run."""
    return [a.name for a in fields(sections[section]) if (section, a.name) != _STREAM]


def read_setting(place: Place, setting: Given, sections: Mapping[str, type] = SECTIONS) -> Any:
    """A value with the type of its setting. Raises ConfigError, which begins with its origin."""
    (section, key), value = place, setting.value
    if place in (TEXT, FILE) and isinstance(value, str):
        value = [value]  # never parsed as a JSON list
    return getattr(structure(sections[section], {key: value}, setting.origin), key)


def located(place: Place, setting: Given, folder: Path) -> Given:
    """The setting, with paths of this folder as paths of the working folder.

    A model's path may also be something else, such as a hub id, which stays as it is.
    """
    value = setting.value
    if isinstance(value, list) and place == FILE:
        value = [_in_folder(folder, item, setting.origin) for item in value]
    elif place in FILES or (place == PATH and _is_path(folder, value)):
        value = _in_folder(folder, value, setting.origin)
    return Given(value, setting.origin)


def _is_path(folder: Path, value: Any) -> bool:
    return isinstance(value, str) and (
        value.startswith((".", "/")) or expanded(value) != value or os.path.exists(folder / value)
    )


def _in_folder(folder: Path, value: Any, origin: str) -> Any:
    if not isinstance(value, str) or value in ("", "-"):
        return value
    try:
        return str(path_of(value, folder))
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}") from error


def read_text(path: Path, what: str) -> str:
    """The text of a UTF-8 file. Raises ConfigError, beginning with what, if it cannot be read."""
    try:
        with path.open("rb") as f:
            data = f.read(_MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{what} {quoted(str(path), 300)} cannot be read: {why}") from error
    if len(data) > _MOST_BYTES:
        limit = f"{_MOST_BYTES >> 20} MiB"
        raise ConfigError(
            f"{what} {quoted(str(path), 300)} is larger than {limit}: expected at most {limit}"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{what} {quoted(str(path), 300)}, line {line}: {not_utf8(error)}"
        ) from error


def not_utf8(error: UnicodeDecodeError) -> str:
    """What to say of bytes that are not UTF-8: the first wrong one, or that they are UTF-16."""
    if error.start == 0 and error.object[:2] in (BOM_UTF16_LE, BOM_UTF16_BE):
        return "expected UTF-8, found UTF-16, as PowerShell writes it: save it as UTF-8"
    return f"expected UTF-8, found byte 0x{error.object[error.start]:02x}"
