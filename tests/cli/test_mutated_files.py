"""Files with faults drawn at random: each loads and generates, or is an error of one line.

The same seed draws the same faults. Many more of them, with other seeds, in processes of their own:

    PYTHONPATH=tests/support python tests/cli/test_mutated_files.py SECONDS [SEED] [KIND ...]
"""

import io
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import gguf_files
import numpy as np
import pytest
import torch
from model_directories import split_weights
from mutations import changed, damaged, json_file, odd, rewritten
from reference_models import random_model
from small_tokenizers import SAMPLE, add_tokens, byte_level, llama_2, metaspace, word_piece
from texts import CHOSEN
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import LlamaConfig

from tilewright import Chat, GenerateConfig, LLMEngine, RuntimeConfig, chat_template
from tilewright.__main__ import main
from tilewright.errors import TilewrightError
from tilewright.text import Text
from tilewright.types import TextAssets

Act = Callable[[], object]
"""What is done with a damaged file. Raises TilewrightError where it is refused."""
Case = tuple[Act, str | None]
"""And the name that the error must have; None: it is about a request."""

VOCABULARY = 460
MOST_SECONDS = 10
MOST_BYTES = 2**30
MOST_CHARACTERS = 600

CONFIG = LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=512,
    bos_token_id=1,
    eos_token_id=2,
)
RUNTIME = RuntimeConfig(page_size=16, total_pages=64, max_seq_len=512, max_batch_size=1)
TWO = GenerateConfig(max_new_tokens=2, temperature=0.0, ignore_eos=True)

TEMPLATES = [
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}",
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content "
    "| trim %}{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '[INST] ' ~ m.content ~ ' [/INST]' if m.role == 'user' else m.content ~ eos_token }}"
    "{% endfor %}",
    "{%- set ns = namespace(last=messages|length - 1, found=false) %}{%- if tools %}"
    "{{- '# Tools' }}{%- for tool in tools %}{{- '\n' ~ (tool | tojson(indent=2)) }}{%- endfor %}"
    "{%- endif %}{%- macro call(c) %}{{- c.function.name ~ c.function.arguments | tojson }}"
    "{%- endmacro %}{%- for m in messages[::-1] %}{%- if m.role == 'user' and not ns.found %}"
    "{%- set ns.found = true %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}{%- if m.content is string %}{{- m.content }}{%- else %}"
    "{%- for part in m.content %}{{- part.text }}{%- endfor %}{%- endif %}"
    "{%- if m.tool_calls is defined %}{%- for c in m.tool_calls %}{{- call(c) }}{%- endfor %}"
    "{%- endif %}{%- endfor %}{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\n\n</think>' }}{%- endif %}{{- strftime_now('%d %b %Y') }}",
]
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "the fox"}]},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": '{"a": [1, "x"]}'}}],
    },
    {"role": "tool", "content": "12", "name": "f", "tool_call_id": "1"},
    {"role": "user", "content": "And?"},
]
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "description": "Does it.",
            "parameters": {"type": "object", "properties": {"a": {"type": "number"}}},
        },
    }
]


# --- the undamaged files --------------------------------------------------------------------------


def unigram() -> Tokenizer:
    pieces = [("<unk>", 0.0), *((f"<0x{b:02X}>", -9.0) for b in range(256))]
    pieces += [(c, -5.0) for c in "▁abcdefghijklmnopqrstuvwxyz"] + [("▁the", -2.0), ("▁fox", -3.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 285)]
    )
    return add_tokens(tokenizer)


def with_all_parts() -> Tokenizer:
    """A byte-level BPE with parts of many kinds."""
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Lowercase(),
            normalizers.StripAccents(),
            normalizers.BertNormalizer(lowercase=False),
            normalizers.Prepend(" "),
            normalizers.Replace("“", '"'),
            normalizers.Nmt(),
        ]
    )
    words = Regex(r"\p{N}{1,3}|[^\r\n\p{L}\p{N}]?\p{L}+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.UnicodeScripts(),
            pre_tokenizers.CharDelimiterSplit("_"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(
                single="<s> $A", pair="<s> $A <s> $B:1", special_tokens=[("<s>", 0)]
            ),
        ]
    )
    tokenizer.enable_truncation(20, stride=2)
    tokenizer.enable_padding(length=4)
    return tokenizer


TOKENIZERS = {
    "byte-level": byte_level,
    "llama-2": llama_2,
    "metaspace": metaspace,
    "word-piece": word_piece,
    "unigram": unigram,
    "all-parts": with_all_parts,
}


def sentence_piece_text() -> dict[str, Any]:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    tokens += [*"▁abcdefghijklmnopqrstuvwxyz", "▁t", "he", "▁the", "fo", "fox", "▁fox", "<x>"]
    values = {
        "model": "llama",
        "tokens": tokens,
        "scores": [0.0 if i < 259 else -float(i) for i in range(len(tokens))],
        "token_type": [2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 260), 4],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        "add_bos_token": True,
        "add_eos_token": False,
        "add_space_prefix": True,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()}


def write_bases(folder: Path) -> Path:
    """A directory for each tokenizer, one in shards, and the undamaged headers of GGUF files."""
    model = random_model(CONFIG)
    for name, make in TOKENIZERS.items():
        directory = folder / name
        model.save_pretrained(directory)
        tokenizer = make()
        tokenizer.save(str(directory / "tokenizer.json"))
        ends = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}}
        settings = {
            **ends,
            "additional_special_tokens": ["<|im_end|>"],
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": 512,
            "add_bos_token": True,
            "chat_template": TEMPLATES[0],
        }
        if name in ("metaspace", "all-parts"):
            settings["added_tokens_decoder"] = {
                str(i): {"content": t.content, "special": t.special, "normalized": False}
                for i, t in tokenizer.get_added_tokens_decoder().items()
            }
            settings["chat_template"] = [
                {"name": "default", "template": TEMPLATES[0]},
                {"name": "tool_use", "template": TEMPLATES[2]},
            ]
        write_json(directory / "tokenizer_config.json", settings)
        write_json(directory / "special_tokens_map.json", ends)
        write_json(directory / "added_tokens.json", {"<|new|>": tokenizer.get_vocab_size()})
    split_weights(Path(shutil.copytree(folder / "llama-2", folder / "sharded")))
    return folder


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def copied(base: Path, folder: Path, *changed: str) -> Path:
    """A directory with links to the files of another one, apart from those that change."""
    folder.mkdir(parents=True)
    for path in base.iterdir():
        if path.name not in changed:
            (folder / path.name).symlink_to(path)
    return folder


# --- what is done with a file ---------------------------------------------------------------------


@cache
def engine() -> LLMEngine:
    return LLMEngine.from_plugins()


def generated(source: Path, prompts: tuple[str, ...] = ("the fox 12 é", SAMPLE[:60])) -> list[Any]:
    """Token ids of prompts and of two tokens after each. Raises TilewrightError."""
    loaded = engine().init_model("m", str(source), RUNTIME)
    try:
        for warning in loaded.warnings:
            check_line(f"warning: {warning}")
        text = engine().model("m").text
        made: list[Any] = []
        for prompt in prompts:
            made.append(of_request(lambda prompt=prompt: text.encode(prompt)))  # type: ignore[misc]
            made.append(of_request(lambda prompt=prompt: engine().generate("m", prompt, TWO)))  # type: ignore[misc]
        for prompt in CHOSEN:
            of_request(lambda prompt=prompt: text.decode(text.encode(prompt)))  # type: ignore[misc]
        for first in range(0, VOCABULARY, 20):
            of_request(lambda first=first: text.decode(range(first, first + 20)))  # type: ignore[misc]
        if text.assets.chat_template is not None:
            made.append(of_request(lambda: text.render_chat(MESSAGES[1:2])))
        return made
    finally:
        engine().unload("m")


def of_request(act: Act) -> object:
    """What a request makes, or the line that refuses it: not every prompt suits every tokenizer."""
    try:
        return act()
    except TilewrightError as error:
        check_line(str(error))
        return str(error)


def command(*argv: str, stdin: bytes = b"") -> str:
    """Standard output of a command. Raises its error line as a TilewrightError."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    given = io.TextIOWrapper(io.BytesIO(stdin), "utf-8")
    with redirect_stdout(out), redirect_stderr(err), patch("sys.stdin", given):
        code = main(argv)
    said = [stream.buffer.getvalue().decode() for stream in (out, err)]  # type: ignore[attr-defined]
    lines = said[1].split("\n")[:-1]
    for line in lines:
        check_line(line)
    if code == 0:
        return said[0]
    assert code == 2, (code, said)
    assert lines[-1].startswith("tilewright: error: "), said
    raise TilewrightError(lines[-1].removeprefix("tilewright: error: "))


def check_line(line: str) -> None:
    assert line.isprintable(), f"more than one line, or control characters: {line[:900]!r}"
    assert len(line) <= MOST_CHARACTERS, f"{len(line)} characters: {line[:900]}"
    assert not re.search(r"\w\(\) failed: ", line), f"unforeseen: {line}"


class TooSlow(BaseException):
    """A case took too long."""


@contextmanager
def limited() -> Iterator[None]:
    def late(*_: object) -> None:
        raise TooSlow(f"longer than {MOST_SECONDS} s")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MOST_BYTES, before[1]))
    handler = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, MOST_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


# --- tokenizers -----------------------------------------------------------------------------------


def a_tokenizer(draw: random.Random, bases: Path, folder: Path) -> Case:
    """tokenizer.json. Where the tokenizers library reads it, prompts have the ids that it gives."""
    base = bases / draw.choice(list(TOKENIZERS))
    files = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    directory = copied(base, folder / "model", *files, "added_tokens.json")
    path = directory / files[0]
    path.write_bytes(json_file(json.loads((base / files[0]).read_text()), draw))

    def act() -> None:
        ids, *_ = generated(directory)
        oracle = Tokenizer.from_str(path.read_text("utf-8-sig"))
        oracle.no_truncation()
        oracle.no_padding()
        if isinstance(ids, list):
            assert ids == oracle.encode("the fox 12 é").ids

    return act, str(path)


def settings_of_a_tokenizer(draw: random.Random, bases: Path, folder: Path) -> Case:
    base = bases / draw.choice(list(TOKENIZERS))
    files = ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]
    file = draw.choice([*files, files[0], "generation_config.json"])
    directory = copied(base, folder / "model", file)
    (directory / file).write_bytes(json_file(json.loads((base / file).read_text()), draw))
    return lambda: generated(directory), str(directory)


# --- chat templates -------------------------------------------------------------------------------

ODD_CODE = [
    "{% for i in range(10**9) %}{{ i }}{% endfor %}",
    "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "{% macro f() %}{{ caller() }}{{ f() }}{% endmacro %}{% call f() %}x{% endcall %}",
    "{% set ns = namespace() %}{% set ns.a = ns %}{{ ns }}",
    "{% set ns = namespace() %}{% set ns.a = [ns] %}{{ ns.a | tojson }}{{ ns.a ~ 1 }}",
    "{% set ns = namespace() %}{% set ns.a = ns %}{{ ns.a.a.a | string | length }}",
    "{{ self }}",
    "{{ self.__init__.__globals__ }}",
    "{{ ().__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{{ messages.__class__ }}{{ messages | attr('__class__') }}",
    "{{ '{0.__class__}'.format(messages) }}",
    "{{ '%(a)s' % messages }}",
    "{{ messages | map(attribute='__class__.__mro__') | list }}",
    "{{ lipsum() }}",
    "{{ dict(messages) }}",
    "{{ messages.append(messages) }}",
    "{{ messages | sort }}",
    "{{ messages | groupby('role') }}",
    "{{ messages | batch(0) | list }}",
    "{{ messages | slice(0) | list }}",
    "{{ messages | slice(-1) | list }}",
    "{{ range(3) | batch(-5, messages) | list }}",
    "{{ messages | xmlattr }}",
    "{{ messages[0] | xmlattr }}",
    "{{ {'a b': 1} | xmlattr }}",
    "{{ 'x' | wordwrap(0) }}",
    "{{ 'x y' | truncate(-1) }}",
    "{{ 'x' | round }}",
    "{{ 1e400 | int }}{{ 1e308 * 10 }}{{ (1e400 - 1e400) | int }}",
    "{{ 1.5 | round(99999999) }}",
    "{{ 2 ** -1 }}{{ 0 ** -1 }}",
    "{{ -1 ** 0.5 }}{{ (-1) ** 0.5 }}",
    "{{ 9 ** 9 ** 9 ** 9 }}",
    "{{ 7 // 0 }}",
    "{{ 10 ** 5000 }}",
    "{{ messages[10 ** 100] }}",
    "{{ messages['a' * 9] }}",
    "{{ messages[:none:0] }}",
    "{{ messages[::0] }}",
    "{{ 'a' * -1 }}{{ [1] * 1.5 }}",
    "{{ strftime_now(1) }}",
    "{{ strftime_now('%') }}{{ strftime_now('%99999999d') }}",
    "{{ strftime_now('%Y' * 100000) | length }}",
    "{{ strftime_now('\\ud800') }}",
    "{{ strftime_now('\\x00%Y') }}",
    "{{ strftime_now('%0999999999Y') }}",
    "{{ raise_exception() }}",
    "{{ raise_exception(messages) }}",
    "{{ raise_exception('x' * 100000) }}",
    "{{ raise_exception('a\\x00\\x1b[31m\\nb\\ud800') }}",
    "{{ nothing.at.all }}",
    "{{ nothing() }}",
    "{{ nothing | tojson }}",
    "{{ messages | tojson(indent=-1) }}{{ messages | tojson(indent='ab') }}",
    "{{ messages | tojson(separators=1) }}{{ messages | tojson(sort_keys=messages) }}",
    "{{ messages | tojson(nothing=1) }}",
    "{{ {messages: 1} }}",
    "{{ {1: 2, 'a': 3} | tojson(sort_keys=true) }}",
    "{{ {(1, 2): 2} | tojson }}",
    "{{ '\\ud800' }}",
    "{{ '\\ud800' | tojson }}",
    "{{ '\\ud800' | urlencode }}",
    "{{ 'x'.encode('utf-16') }}{{ 'x'.encode('no') }}",
    "{{ 'x'.join(1) }}{{ 'x'.split('') }}",
    "{{ 'x'.translate(1) }}{{ 'x'.maketrans('a') }}",
    "{{ '{'.format(1) }}{{ '{9}'.format(1) }}{{ '{a.b}'.format(a=1) }}",
    "{{ '%d' % 'x' }}{{ '%s %s' % 1 }}{{ '%' % 1 }}{{ '%q' % 1 }}",
    "{% include 'other' %}",
    "{% include messages %}",
    "{% import 'other' as o %}",
    "{% extends 'other' %}",
    "{% extends none %}",
    "{% block a %}{{ super() }}{% endblock %}",
    "{% block a %}{{ self.a() }}{% endblock %}",
    "{% block a %}{% endblock %}{% block a %}{% endblock %}",
    "{% break %}",
    "{% for m in messages %}{% break %}{% continue %}{% endfor %}",
    "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "{% for m in 1 %}{% endfor %}",
    "{% for m in nothing %}{% else %}none{% endfor %}",
    "{% for a, b in messages %}{{ a }}{% endfor %}",
    "{% for a, b, c, d in messages | items %}{% endfor %}",
    "{% for m in messages %}{{ loop.cycle() }}{% endfor %}",
    "{% for m in messages %}{{ loop.changed(m, m) }}{{ loop.length ** loop.index }}{% endfor %}",
    "{% set messages.role = 1 %}",
    "{% set a, b = 1 %}",
    "{% set loop = 1 %}",
    "{% set self = 1 %}{{ self }}",
    "{% with a = a %}{{ a }}{% endwith %}",
    "{% filter nothing %}x{% endfilter %}",
    "{% filter upper | indent(9) | center(10) %}x{% endfilter %}",
    "{% generation %}{% generation %}x{% endgeneration %}{% endgeneration %}",
    "{% endgeneration %}",
    "{% trans %}x{% endtrans %}",
    "{% do messages.append(1) %}",
    "{% autoescape true %}<{% endautoescape %}",
    "{% raw %}{{ x {% endraw %}",
    "{% raw %}",
    "{# never closed",
    "{{ 'never closed }}",
    "{{ }}",
    "{% %}",
    "{% if true %}" * 30,
    "{% if true %}" * 200 + "{% endif %}" * 200,
    "{% for a in messages %}" * 30 + "{% endfor %}" * 30,
    "{{ " + "(" * 300 + "1" + ")" * 300 + " }}",
    "{{ " + "(" * 80 + "1" + ")" * 80 + " }}",
    "{{ " + "[" * 150 + "]" * 150 + " }}",
    "{{ " + "not " * 900 + "true }}",
    "{{ " + "-" * 3000 + "1 }}",
    "{{ 1" + " + 1" * 3000 + " }}",
    "{{ 'a'" + " ~ 'a'" * 3000 + " }}",
    "{{ messages" + ".a" * 3000 + " }}",
    "{{ messages" + " | list" * 1500 + " }}",
    "{{ " + "9" * 5000 + " }}",
    "{{ 1 if 1 else " * 300 + "1" + " }}" * 300,
    "{{ a" + " if a else a" * 500 + " }}",
    "{% set " + "x" * 100_000 + " = 1 %}",
    "{{ " + "x" * 100_000 + "() }}",
    "{{ é }}{{ 数 }}{{ a\u0301 }}",
    "\0",
    "\x1b[31m",
    "{{ '\0' }}",
    "{{ messages\0 }}",
    "{{ messages | select('nothing') | list }}",
    "{{ messages | map('nothing') | list }}",
    "{{ messages | map() | list }}",
    "{{ messages | sum }}{{ messages | sum(attribute='role') }}",
    "{{ messages | min }}{{ [] | max }}{{ [] | random }}{{ [] | first }}{{ [] | last }}",
    "{{ messages is nothing }}",
    "{{ 1 is divisibleby 0 }}",
    "{{ messages is sameas }}",
    "{{ 'a' is in 1 }}{{ 1 in 'a' }}",
    "{{ 1 < 'a' }}{{ messages < none }}",
    "{{ cycler() }}{{ joiner(1)() }}",
    "{% set c = cycler(*range(10**7)) %}{{ c.next() }}",
    "{{ range(10**30) | list }}",
    "{{ range(10**8) | list | length }}",
    "{{ range(0, 10, 0) }}",
    "{{ range('a') }}",
    "{{ dict(a=1, **messages[0]) }}{{ dict(**{1: 2}) }}",
    "{{ namespace(1) }}{{ namespace([1]) }}",
    "{{ raise_exception(*range(10**6)) }}",
    "{{ (messages | tojson) * 100000 }}",
    "{{ messages[0].content.isalpha.__self__ }}",
    "{{ messages[0].keys() | list ~ messages[0].values() | list ~ messages[0].items() | list }}",
    "{{ messages[0].pop('role') }}{{ messages[0].clear() }}{{ messages[0].setdefault('z', 1) }}",
    "{{ messages[0].get }}{{ messages[0].get() }}{{ messages[0].fromkeys('ab') }}",
    "{{ (1).to_bytes(10**9, 'big') }}",
    "{{ (1).to_bytes(99999, 'big') | length }}",
    "{{ 1.5.hex() }}{{ (3).bit_length() }}{{ 1.5.as_integer_ratio() }}",
    "{{ 'a'.__add__('b') }}{{ 'a'.zfill(10**12) }}",
    "{{ '9' * 5000 | int }}{{ ('9' * 5000) | int }}{{ ('9' * 5000) | float }}",
    "{{ ('9' * 4000) | int ** 30 }}",
    "{{ ('a' * 10**5) | urlize }}{{ 'http://' * 3000 | urlize }}",
    "{{ ('(' * 5000) | striptags }}{{ ('<' * 20000) | striptags }}",
    "{{ ('&#' * 20000) | forceescape | e | safe | striptags }}",
    "{{ ('a@' * 5000) | urlize(trim_url_limit=-1) }}",
    "{{ ('a ' * 5000) | title | capitalize | wordcount }}",
    "{{ 'x' | filesizeformat }}{{ 10**400 | filesizeformat }}",
    "{{ 10 ** 400 * 1.5 }}",
    "{{ 10 ** 400 / 3 }}",
    "{{ messages | pprint }}",
    "{{ messages | dictsort }}{{ {'a': 1, 2: 3} | dictsort }}",
    "{{ messages | unique | list }}",
    "{{ debug() }}{% debug %}",
    "{{ get_flashed_messages() }}{{ config }}{{ request }}",
    "{{ messages.0.role }}{{ messages.0.content.0 }}{{ messages.-1 }}",
]


def a_template(draw: random.Random, bases: Path, folder: Path) -> Case:
    """A template with faults, and sometimes a conversation, tools and options with faults."""
    source = draw.choice(TEMPLATES)
    pieces = re.findall(r"\{%.*?%\}|\{\{.*?\}\}|.+?(?=\{[%{])|.+", source, re.DOTALL)
    for _ in range(draw.choice([0, 0, 1, 1, 2, 4])):
        at = draw.randrange(len(pieces) + 1)
        match draw.choice(["insert", "insert", "remove", "swap", "word", "damage"]):
            case "insert":
                pieces.insert(at, draw.choice(ODD_CODE))
            case "remove":
                del pieces[at : at + 1]
            case "swap" if len(pieces) > 1:
                first, second = draw.sample(range(len(pieces)), 2)
                pieces[first], pieces[second] = pieces[second], pieces[first]
            case "word":
                words = re.split(r"(\w+)", "".join(pieces))
                word = draw.randrange(len(words))
                words[word] = draw.choice([*words, "loop", "self", "none", "", "10**9", "|", "("])
                pieces = ["".join(words)]
            case "damage":
                data = damaged("".join(pieces).encode("utf-8", "surrogatepass"), draw)
                pieces = [data.decode("utf-8", "surrogateescape")]
    messages, tools, options = MESSAGES, None, {}
    if source == TEMPLATES[2]:
        tools, options = TOOLS, {"enable_thinking": False}
    else:
        messages = draw.choice([MESSAGES[1:2], [*MESSAGES[1:2], *MESSAGES[2:3], *MESSAGES[1:2]]])
    match draw.randrange(8):
        case 0 | 1:
            messages = changed(messages, draw)
        case 2:
            tools = changed(TOOLS, draw)
        case 3:
            options = changed({"enable_thinking": False}, draw)
    chat = Chat(messages, options, tools, draw.random() < 0.3)
    text = Text(TextAssets(tokenizer=shared_tokenizer(), chat_template="".join(pieces)))

    def act() -> None:
        with patch.object(chat_template, "RENDER_SECONDS", 0.3):
            text.encode_chat(chat)

    return act, None


@cache
def shared_tokenizer() -> Tokenizer:
    return byte_level()


# --- GGUF -----------------------------------------------------------------------------------------


@cache
def gguf_parts() -> tuple[Any, list[dict[str, Any]], dict[str, Any]]:
    model = random_model(CONFIG)
    more = {
        "tokenizer.chat_template": TEMPLATES[0],
        "general.alignment": 32,
        "general.sampling.temp": 0.7,
        "general.sampling.top_k": 4,
        "general.file_type": 0,
    }
    words = {
        **gguf_files.bpe_text(byte_level().to_str(), "qwen2"),
        "tokenizer.ggml.eos_token_id": 2,
    }
    headers = [gguf_files.header_of(model) | text | more for text in (words, sentence_piece_text())]
    return model, headers, gguf_files.tensors_of(model)


NUMBERS: list[Any] = [
    *(kind(7) for kind in (np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32)),
    *(kind(7) for kind in (np.int64, np.uint64, np.float32, np.float64)),
    *(np.int64(-1), np.uint64(2**64 - 1), np.float64("nan"), np.float32("inf"), np.int32(-(2**31))),
    *(np.float64(1e308), np.uint32(2**32 - 1), np.float32(2.5), np.int8(-1), np.uint8(0)),
]
ARRAYS: list[Any] = [
    [1],
    [-1] * 9,
    ["a"],
    [""],
    [True, False],
    [0.5],
    [float("nan")] * 3,
    [[1], [2]],
]


def a_gguf_file(draw: random.Random, bases: Path, folder: Path) -> Case:
    """Header values, and tensors of other shapes, types and names."""
    _, headers, tensors = gguf_parts()
    header = dict(draw.choice(headers))
    stored = {name: gguf_files.stored(values) for name, values in tensors.items()}
    for _ in range(draw.choice([1, 1, 2, 4])):
        key = draw.choice(list(header))
        if draw.random() < 0.5:
            key = draw.choice([k for k in header if k.startswith("tokenizer")] or [key])
        value = header[key]
        match draw.randrange(9):
            case 0:
                header[key] = draw.choice(NUMBERS)
            case 1:
                header[key] = draw.choice(ARRAYS)
            case 2:
                header[key] = draw.choice(
                    ["", "a", "llama", "\0", "x" * 50_000, "12", "{{ x", "\n"]
                )
            case 3:
                header[key] = draw.choice([header[other] for other in header])
            case 4:
                del header[key]
            case 5:
                header[draw.choice([f"{key}_", key.upper(), "x\n", "x" * 70_000, ""])] = value
            case 6 if isinstance(value, list):
                at = draw.randrange(len(value))
                others = [value[draw.randrange(len(value))], "", "\0", " ", "a b c", -1, 10**6, 7]
                same = [one for one in others if type(one) is type(value[0])]
                header[key] = [*value[:at], draw.choice(same or [value[0]]), *value[at + 1 :]]
            case 6 | 7 if isinstance(value, list):
                size = draw.choice([1, len(value) - 1, len(value) // 2, len(value) * 2])
                header[key] = (value * 2)[:size]
            case 8:
                name = draw.choice(list(stored))
                values, kind = stored.pop(name)
                flat = values.reshape(-1)
                forms = [
                    (flat, kind),
                    (values[..., :1].copy(), kind),
                    (values.astype(np.float16), gguf_files.Kind.F16),
                    (values.astype(np.int8), gguf_files.Kind.I8),
                    (flat.reshape(1, 1, -1), kind),
                ]
                new = draw.choice([name, name, f"{name}.x", "x" * 500, "blk.9.x", "a\nb"])
                stored[new] = draw.choice(forms)
    path = folder / "model.gguf"
    try:
        gguf_files.write_file(path, header, stored)
    except Exception:  # the gguf library does not write it
        return a_gguf_file(draw, bases, folder)
    return lambda: generated(path), str(path)


# --- what the command line reads ------------------------------------------------------------------

PROMPTS: list[Any] = [
    "the fox",
    {"prompt": "the fox", "id": "a", "temperature": 0.5, "stop": ["x"], "logit_bias": {"3": 1.5}},
    {"messages": MESSAGES[1:2], "template_options": {}, "top_k": 3, "seed": 7},
    {"messages": MESSAGES, "tools": TOOLS, "id": {"n": [1]}, "stop_token_ids": [5], "n": 2},
]


def flags(bases: Path) -> list[str]:
    model = str(bases / "all-parts")
    few = {"max-new-tokens": 2, "page-size": 16, "total-pages": 64, "max-seq-len": 512}
    return ["--model", model, *(f"--{key}={value}" for key, value in few.items())]


def prompts(draw: random.Random, bases: Path, folder: Path) -> Case:
    if draw.random() < 0.5:
        path, data = folder / "p.json", json_file(PROMPTS, draw)
    else:
        path = folder / "p.jsonl"
        lines = [json.dumps(changed(one, draw) if draw.random() < 0.3 else one) for one in PROMPTS]
        data = "\n".join(lines).encode()
        data = damaged(data, draw) if draw.random() < 0.4 else data
    path.write_bytes(data)
    form = draw.choice([[], ["--json"], ["--chat"]])
    return lambda: command("generate", "--prompt-file", str(path), *form, *flags(bases)), None


def a_tools_file(draw: random.Random, bases: Path, folder: Path) -> Case:
    path = folder / "tools.json"
    path.write_bytes(json_file(TOOLS, draw))
    argv = ["generate", "the fox", "--chat", "--tools", str(path), *flags(bases)]
    return lambda: command(*argv), None


def a_session(draw: random.Random, bases: Path, folder: Path) -> Case:
    path = folder / "session.json"
    path.write_bytes(json_file({"messages": MESSAGES[:4]}, draw))
    argv = ["chat", "--session", str(path), *flags(bases)]
    return lambda: command(*argv, stdin=b"the fox\n"), None


RUN_FILE = """\
[model]
path = "{model}"
format = "safetensors"

[plugins]
loader = "hf-local"
sampler = "greedy"
observers = []

[runtime]
device = "cpu"
weight_dtype = "float32"
page_size = 16
total_pages = 64
max_seq_len = 512

[output]
format = "jsonl"
file = "{folder}/out.jsonl"

[prompts]
text = ["the fox", "12"]
chat = true

[chat]
system = "Be brief."
tools = "{folder}/tools.json"
template_options = {{enable_thinking = [1, {{b = 2}}]}}

[generate]
max_new_tokens = 2
temperature = 0.0
stop = ["x"]
stop_token_ids = [5]
logit_bias = {{3 = 1.5}}
logits_processors = []
"""

ODD_TOML = [
    *("nan", "inf", "-1", "0", "1e400", "9" * 400, "9" * 5000, "0x" + "f" * 5000, "true", '""'),
    *('"\\u0000"', '"\\n"', "[]", "[[]]", "{}", "{a = {}}", "1979-05-27", "07:32:00", "'a'", '"é"'),
    *(
        '"' + "x" * 100_000 + '"',
        "[" * 400 + "]" * 400,
        "[" * 90 + "]" * 90,
        "{a = " * 99 + "}" * 99,
    ),
    *('["", 1, [2]]', '{"" = 1, "\\n" = 2}', "x", '"""', "0o7", "+1", "1_000", "-0.0", "[nan]"),
]


def changed_toml(text: str, draw: random.Random) -> bytes:
    lines = text.splitlines()
    for _ in range(draw.choice([1, 1, 2, 3])):
        at = draw.choice([i for i, line in enumerate(lines) if line])
        key, _, value = lines[at].partition(" = ")
        match draw.randrange(6):
            case 0 | 1 if value:
                lines[at] = f"{key} = {draw.choice(ODD_TOML)}"
            case 2:
                lines.insert(at, draw.choice(lines))
            case 3 if value:
                names = [f"{key}_", '""', '"\\n"', "a.b", f"{key}.x", "x" * 50_000, '"\\u202e"']
                lines[at] = f"{draw.choice(names)} = {value}"
            case 4:
                del lines[at]
                lines = lines or ["a = 1"]
            case 5:
                there = draw.randrange(len(lines))
                lines[at], lines[there] = lines[there], lines[at]
    data = "\n".join(lines).encode()
    return damaged(data, draw) if draw.random() < 0.15 else data


def a_run_file(draw: random.Random, bases: Path, folder: Path) -> Case:
    path = folder / "run.toml"
    write_json(folder / "tools.json", TOOLS)
    text = RUN_FILE.format(model=bases / "all-parts", folder=folder)
    path.write_bytes(changed_toml(text, draw))
    return lambda: command("run", str(path)), None


MODELS_FILE = """\
[small]
source = "{model}"
loader = "hf-local"
format = "safetensors"

[small.runtime]
page_size = 16
max_seq_len = 512
total_pages = 64

[small.generate]
temperature = 0.5
max_new_tokens = 2
stop = ["x"]

[other]
source = "who/what"
revision = "abc"

[other.options]
token = "x"
"""


def a_models_file(draw: random.Random, bases: Path, folder: Path) -> Case:
    path = folder / "tilewright-models.toml"
    path.write_bytes(changed_toml(MODELS_FILE.format(model=bases / "llama-2"), draw))
    argv = draw.choice(
        [
            ["generate", "the fox", "--model", "small"],
            ["models", "list"],
            ["models", "show", "small"],
            ["models", "remove", "other", "--project"],
            ["models", "add", "new", "--source", str(bases / "llama-2"), "--project"],
        ]
    )

    def act() -> None:
        with chdir(folder), patch.dict(os.environ, {"XDG_CONFIG_HOME": str(folder)}):
            command(*argv)

    return act, None if "generate" in argv else path.name


# --- folders --------------------------------------------------------------------------------------


def shards(draw: random.Random, bases: Path, folder: Path) -> Case:
    """An index, and its shards under other names."""
    index = "model.safetensors.index.json"
    directory = copied(bases / "sharded", folder / "model", index)
    text = (bases / "sharded" / index).read_text()
    (directory / index).write_bytes(json_file(json.loads(text), draw))
    files = sorted(directory.glob("*.safetensors"))
    if draw.random() < 0.4:
        draw.choice(files).rename(directory / draw.choice(["x.safetensors", "model.safetensors"]))
    return lambda: generated(directory), str(directory)


def a_folder_of_the_hub(draw: random.Random, bases: Path, folder: Path) -> Case:
    root = folder / "models--who--what"
    snapshots = [root / "snapshots" / name for name in draw.sample(["a" * 40, "b" * 40, "x"], 2)]
    for snapshot in snapshots[: draw.choice([0, 1, 1, 2])]:
        copied(bases / draw.choice(["llama-2", "sharded"]), snapshot)
        names = sorted(os.listdir(snapshot))
        for name in draw.sample(names, draw.choice([0, 0, 1, 2])):
            (snapshot / name).unlink()
            match draw.randrange(4):
                case 0:
                    (snapshot / name).symlink_to("../../blobs/0123")
                case 1:
                    (snapshot / name).symlink_to(name)
                case 2:
                    (snapshot / name).mkdir()
    (root / "refs").mkdir(parents=True)
    (root / "blobs").mkdir()
    named = [
        b"a" * 40,
        b"b" * 40,
        b"x\n",
        b"",
        b"../..",
        b"/etc",
        b"\xff",
        b"\0",
        b"a" * 9999,
        b".",
    ]
    match draw.randrange(8):
        case 0:
            (root / "refs" / "main").mkdir()
        case 1:
            (root / "refs" / "main").symlink_to("main")
        case 2:
            os.mkfifo(root / "refs" / "main")
        case _:
            (root / "refs" / "main").write_bytes(draw.choice(named))
    return lambda: generated(root), str(root)


# --- what does not matter -------------------------------------------------------------------------


def rewritten_json(draw: random.Random, bases: Path, folder: Path) -> Case:
    """A JSON file in another layout, and with keys that nobody reads: the tokens are the same."""
    base = bases / draw.choice(list(TOKENIZERS))
    file = draw.choice(sorted(path.name for path in base.glob("*.json")))
    document = json.loads((base / file).read_text())
    if file in ("config.json", "tokenizer_config.json", "generation_config.json"):
        value = odd(draw)
        if "\\ud" not in json.dumps(value):
            document[draw.choice(["", "x_y", "_name", "数", "\n", "x" * 999])] = value
    directory = copied(base, folder / "model", file)
    (directory / file).write_bytes(rewritten(document, draw))

    def act() -> None:
        assert generated(directory) == undamaged(base)

    return act, None


def rewritten_header(draw: random.Random, bases: Path, folder: Path) -> Case:
    """GGUF keys in another order, with more that nobody reads: the tokens are the same."""
    _, headers, tensors = gguf_parts()
    header = draw.choice(headers)
    stored = {name: gguf_files.stored(values) for name, values in tensors.items()}
    base, path = folder / "base.gguf", folder / "model.gguf"
    gguf_files.write_file(base, header, stored)
    more = {
        "general.x": draw.choice([*NUMBERS, "", "x" * 70_000, "\0"]),
        "tokenizer.x": draw.choice(ARRAYS[:-1]),
    }
    keys = draw.sample(list((header | more).items()), len(header) + 2)
    names = draw.sample(list(stored), len(stored))
    gguf_files.write_file(path, dict(keys), {name: stored[name] for name in names})

    def act() -> None:
        assert generated(path) == generated(base)

    return act, None


@cache
def undamaged(base: Path) -> list[Any]:
    return generated(base)


# --- all ------------------------------------------------------------------------------------------

Kind = Callable[[random.Random, Path, Path], Case]

KINDS: dict[str, tuple[Kind, int]] = {
    "tokenizer": (a_tokenizer, 40),
    "tokenizer-settings": (settings_of_a_tokenizer, 30),
    "template": (a_template, 120),
    "gguf": (a_gguf_file, 40),
    "prompts": (prompts, 25),
    "tools": (a_tools_file, 15),
    "session": (a_session, 20),
    "run-file": (a_run_file, 35),
    "models-file": (a_models_file, 50),
    "shards": (shards, 20),
    "hub-folder": (a_folder_of_the_hub, 20),
}
"""What draws a case, and how many cases a test draws."""
HARMLESS: dict[str, tuple[Kind, int]] = {
    "rewritten-json": (rewritten_json, 15),
    "rewritten-header": (rewritten_header, 15),
}


def outcome(kind: str, number: str, bases: Path, folder: Path) -> str:
    """``loaded`` or ``refused``, or what is wrong with the answer to a damaged file."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    act, name = (KINDS | HARMLESS)[kind][0](random.Random(f"{kind} {number}"), bases, folder)
    began = time.monotonic()
    try:
        with limited():
            act()
        return "loaded"
    except TilewrightError as error:
        message = str(error)
        try:
            check_line(message)
        except AssertionError as wrong:
            return f"{type(error).__name__}: {wrong}"
        if name is not None and name not in message:
            return f"{type(error).__name__}, which does not name the file: {message}"
        return f"refused: {error}" if kind in HARMLESS else "refused"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        took = time.monotonic() - began
        return f"after {took:.1f} s: {type(error).__name__}: {str(error)[:900]}"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith("TILEWRIGHT_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_load_and_generate_or_are_refused_in_a_line(
    kind: str, bases: Path, tmp_path: Path
) -> None:
    found = {n: outcome(kind, f"0 {n}", bases, tmp_path / "case") for n in range(KINDS[kind][1])}
    counts = Counter(found.values())
    print(f"{kind}: {counts['loaded']} loaded, {counts['refused']} refused")
    wrong = {n: what for n, what in found.items() if what not in ("loaded", "refused")}
    assert not wrong
    assert counts["loaded"]
    assert counts["refused"]


@pytest.mark.parametrize("kind", HARMLESS)
def test_files_that_are_written_in_another_way_have_the_same_tokens(
    kind: str, bases: Path, tmp_path: Path
) -> None:
    found = {n: outcome(kind, f"0 {n}", bases, tmp_path / "case") for n in range(HARMLESS[kind][1])}
    assert not {n: what for n, what in found.items() if what != "loaded"}


# --- many more ------------------------------------------------------------------------------------


def _many(seconds: float, seed: int, kinds: list[str]) -> None:
    """Draw cases until the time is over, and print the counts and each kind of fault once."""
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp())
    os.chdir(folder)
    os.environ["HOME"] = str(folder)
    made = write_bases(folder / "bases")
    until, block = time.monotonic() + seconds, 0
    counts: Counter[tuple[str, str]] = Counter()
    seen: Counter[str] = Counter()
    while time.monotonic() < until:
        kind = kinds[block % len(kinds)]
        numbers = [f"{seed} {block}-{i}" for i in range(40)]
        block += 1
        record = folder / "record"
        record.write_text("")
        child = os.fork()
        if not child:
            with record.open("a", buffering=1) as file:
                for number in numbers:
                    file.write(f"{number}\t")
                    found = outcome(kind, number, made, folder / "case")
                    file.write(f"{found!r}\n")
            os._exit(0)
        ended = False
        limit = time.monotonic() + 200
        while not ended and time.monotonic() < limit:
            ended = os.waitpid(child, os.WNOHANG)[0] == child
            time.sleep(0.02)
        if not ended:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        for line in record.read_text().splitlines():
            number, _, found = line.partition("\t")
            found = found.strip("'\"") or ("the process died" if ended else "hangs")
            short = found if found in ("loaded", "refused") else "fault"
            counts[kind, short] += 1
            if short == "fault":
                alike = re.sub(r"\d+|'[^']*'|/\S+", "", found)[:60]
                seen[alike] += 1
                if seen[alike] <= 2:
                    print(f"--- {kind} {number!r}: {found[:1100]}", flush=True)
    for (kind, short), count in sorted(counts.items()):
        print(f"{kind}: {count} {short}")
    for alike, count in seen.most_common():
        print(f"{count} x {alike}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    _many(float(sys.argv[1]), seed, sys.argv[3:] or [*KINDS, *HARMLESS])
