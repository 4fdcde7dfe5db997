"""Flags shared by several commands, derived from the settings that they set."""

import argparse
import json
from collections.abc import Collection, Mapping
from types import UnionType
from typing import Any, Union, get_args, get_origin

from tilewright import plugins
from tilewright.cli.parser import TakesArguments
from tilewright.errors import ConfigError, nearest
from tilewright.settings import FILES, SECTIONS, Given, Layer, Place, keys
from tilewright.values import Option, options_of

_TABLES = {
    ("generate", "logit_bias"): "ID=VALUE",
    ("generate", "logits_processors"): "NAME=ARGUMENT",
    ("chat", "template_options"): "KEY=VALUE",
}
"""Settings whose flag is given once for each entry of a table."""
_NAMES = {
    ("generate", "include_stop_str"): "--include-stop",
    ("generate", "logits_processors"): "--logits-processor",
    ("chat", "template_options"): "--template-option",
    ("model", "path"): "--model",
    ("plugins", "observers"): "--observer",
    ("prompts", "text"): "--prompt",
    ("prompts", "file"): "--prompt-file",
    ("output", "file"): "--output",
}
"""Flags that are not just the key with dashes."""
_SHORT = {
    ("generate", "max_new_tokens"): "-n",
    ("model", "path"): "-m",
    ("prompts", "text"): "-p",
}
"""Short forms of flags."""

_OPTIONS = "options"
_PROMPT = "prompt"


def add_engine_flags(parser: argparse.ArgumentParser, model: bool = True) -> None:
    """Flags that choose model and plugins, and set how the model runs.

    model: with ``--model``, which a command that takes several has of its own.
    """
    group = parser.add_argument_group("model")
    add(group, "model", {"path", "format"} if model else {"format"})
    add(parser.add_argument_group("runtime"), "runtime")
    group = parser.add_argument_group("plugins")
    add(group, "plugins")
    add_option_flag(group)
    parser.epilog = (
        "Environment variables also set these, such as TILEWRIGHT_RUNTIME_PAGE_SIZE=32 or "
        "TILEWRIGHT_MODEL_PATH=DIR. They override a run file, and flags override them."
    )


def add_option_flag(group: TakesArguments) -> None:
    """Adds -o, for options of plugins."""
    kinds = plugins.ENGINE_KINDS.values()
    single = ", ".join(k.name for k in kinds if not k.several and k.name != "executor")
    several = ", ".join(k.name for k in kinds if k.several)
    group.add_argument(
        "-o",
        "--option",
        dest=_OPTIONS,
        action="append",
        metavar="KEY=VALUE",
        help=f"set an executor option; for other plugins, KIND.KEY=VALUE ({single}) or "
        f"KIND.NAME.KEY=VALUE ({several})",
    )


def add_generate_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for each setting of a generation."""
    add(parser.add_argument_group("generation"), "generate")


def add_chat_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for each setting of a conversation."""
    add(parser.add_argument_group("chat"), "chat")


def add_prompt_argument(parser: argparse.ArgumentParser, help: str) -> None:
    """The argument PROMPT, which may also be given as a flag."""
    parser.add_argument(_PROMPT, nargs="?", metavar="PROMPT", help=help)


def add_output_flags(parser: argparse.ArgumentParser) -> None:
    """Flags for prompts, and for where results go."""
    add(parser.add_argument_group("prompts"), "prompts")
    output = parser.add_argument_group("output")
    output.add_argument(
        "--json",
        dest="output.format",
        action="store_const",
        const="jsonl",
        help="print one JSON object per result",
    )
    add(output, "output", {"file"})
    output.add_argument(
        "--stats",
        action="store_true",
        help="print speeds on standard error (default on a terminal)",
    )
    output.add_argument(
        "--trace-nonfinite",
        action="store_true",
        help="stop at the first tensor that holds NaN or infinity, and name it; slower",
    )


def layer(args: argparse.Namespace) -> Layer:
    """The settings that were given as flags."""
    given: dict[Place, Given] = {}
    for dest, value in vars(args).items():
        section, dot, key = dest.partition(".")
        if dot and value is not None:
            given[section, key] = Given(value, flag_name(section, key))
    if (text := getattr(args, _PROMPT, None)) is not None:
        place = ("prompts", "file" if text == "-" else "text")
        if place in given:
            raise ConfigError(
                f"expected one of PROMPT and {flag_name(*place)}, found both: give one"
            )
        given[place] = Given([text], "PROMPT")
    for place, form in _TABLES.items():
        flag = flag_name(*place)
        if isinstance(items := getattr(args, ".".join(place), None), list):
            table: dict[str, Any] = {}
            for name, value in (split(item, flag, form) for item in items):
                if name in table:
                    raise ConfigError(f"{flag}: {name!r} is given twice: give it once")
                table[name] = _json_or_text(value) if place[0] == "chat" else value
            given[place] = Given(table, flag)
    for item in getattr(args, _OPTIONS, None) or ():
        key, value = split(item, "-o", "KEY=VALUE")
        given[option_place(key)] = Given(value, f"-o {key}")
    return given


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def option_place(key: str) -> Place:
    """``threads`` is the executor's; ``sampler.x`` and ``weight_format.gguf.x`` name a plugin."""
    kind, dot, rest = key.partition(".")
    if not dot:
        return (_OPTIONS, "executor", key)
    if kind not in plugins.ENGINE_KINDS:
        raise ConfigError(
            f"-o {key}: unknown kind of plugin {kind!r}{nearest(kind, plugins.ENGINE_KINDS)} "
            f"(kinds: {', '.join(plugins.ENGINE_KINDS)})"
        )
    if not plugins.ENGINE_KINDS[kind].several:
        return (_OPTIONS, kind, rest)
    name, dot, option = rest.rpartition(".")
    if not dot:
        raise ConfigError(f"-o {key}: expected {kind}.NAME.KEY=VALUE, with the plugin's name")
    return (_OPTIONS, kind, name, option)


def flag_name(section: str, key: str) -> str:
    """The flag of a setting."""
    if (section, key) == ("output", "format"):
        return "--json"
    return _NAMES.get((section, key), f"--{key.replace('_', '-')}")


def add(
    group: TakesArguments,
    section: str,
    chosen: Collection[str] | None = None,
    sections: Mapping[str, type] = SECTIONS,
) -> None:
    """Flags for the settings of a section, or for some of them.

    sections: also those of the command's own (``config.resolve``).
    """
    for option in options_of(sections[section]):
        if option.name in (chosen or keys(section, sections)):
            short = _SHORT.get((section, option.name))
            group.add_argument(
                *([short] if short else []),
                flag_name(section, option.name),
                dest=f"{section}.{option.name}",
                help=_help(section, option).replace("%", "%%"),
                **_action(section, option),
            )


def _action(section: str, option: Option) -> dict[str, Any]:
    """How argparse reads the flag. Values stay strings: the settings convert them."""
    type_ = option.type
    if get_origin(type_) in (Union, UnionType):
        type_ = next(t for t in get_args(type_) if t is not type(None))
    if type_ is bool:
        return {"action": argparse.BooleanOptionalAction}
    words = {int: "N", float: "X"}
    metavar = words.get(type_, option.name.rpartition("_")[2].upper())
    if section == "plugins":
        metavar = "NAME"
    if type_ == tuple[str, ...]:
        return {"action": "append", "metavar": metavar}
    if type_ == tuple[int, ...]:
        return {"metavar": "ID,ID"}
    if (section, option.name) in _TABLES:
        return {"action": "append", "metavar": _TABLES[section, option.name]}
    if (section, option.name) in FILES:
        return {"metavar": "FILE"}
    if section == "chat" and type_ is str:
        return {"metavar": "TEXT"}
    return {"metavar": metavar}


def _help(section: str, option: Option) -> str:
    text = option.help
    repeated = " (repeatable)" if _action(section, option).get("action") == "append" else ""
    if option.default in (None, "", (), False) or section in ("model", "output"):
        return text + repeated
    return f"{text} ({option.default})"


def positive(text: str) -> int:
    return _at_least(1, text)


def natural(text: str) -> int:
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 9 or int(text) < least:
        raise argparse.ArgumentTypeError(f"expected an integer of at least {least}, found {text!r}")
    return int(text)


def split(item: str, flag: str, form: str) -> tuple[str, str]:
    """Key and value of a flag's item. Raises ConfigError unless it has the form."""
    key, equals, value = item.partition("=")
    if not equals or not key:
        raise ConfigError(f"{flag}: expected {form}, found {item!r}")
    return key, value
