"""Logits processor ``structured-output``: texts by a schema, a regular expression or a grammar."""

import ast
import json
import re
import sys
import threading
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import jsonschema_rs
import pytest
from attrs import evolve
from small_tokenizers import byte_level, gemma, llama_2, metaspace
from tokenizers import Tokenizer, decoders, models

from tilewright import GenerateConfig, LLMEngine
from tilewright.cli import main
from tilewright.errors import RequestError
from tilewright.settings import DEMO_MODEL
from tilewright.text import Text, TextStream
from tilewright.types import TextAssets
from tilewright_guidance.choice import ChoiceProcessor
from tilewright_guidance.structured import StructuredOutputProcessor
from tilewright_testing.logits_processor import allowed_tokens, effects
from tilewright_testing.models import CONFIGS

PROMPT = "Congress shall make no law"

ANSWER = {
    "type": "object",
    "properties": {
        "answer": {"enum": ["yes", "no", 'a "é"\n']},
        "sure": {"type": "boolean"},
        "count": {"type": "integer", "minimum": 0, "maximum": 30},
    },
    "required": ["answer", "sure", "count"],
    "additionalProperties": False,
}
NODE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "pattern": "^[a-z]{1,3}$"},
                "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
            },
            "required": ["name", "next"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}
SCHEMAS = [
    ANSWER,
    NODE,
    {"type": "array", "items": {"minimum": -5, "maximum": 900, "type": "integer"}, "maxItems": 4},
    {"type": "array", "items": {"type": "string", "maxLength": 3}, "maxItems": 3},
    {"type": "string", "format": "date"},
    {"type": ["integer", "null"], "exclusiveMinimum": -20, "maximum": 7},
    {"const": {"a": [1, None, "<think> 数学"]}},
    {
        "type": "object",
        "patternProperties": {"^x[0-9]$": {"type": "boolean"}},
        "additionalProperties": False,
        "maxProperties": 1,
    },
]
NUMBERS = {
    "type": "array",
    "items": {"type": "number", "minimum": -5, "maximum": 7.5},
    "minItems": 2,
}
REGEXES = [
    r"(yes|no)",
    r"[0-9]{3}-[0-9]{4}",
    r"^a|bc$",
    r" two? words ?",
    r"\d+\.\d\s?(?:kg|m/s)",
    r"(a|ab|abc)(x\\y|\$)?",
    r"é+数学?👍🏽",
    r"[^a-z0-9]{2}!",
    r"(.|\n){1,4}",
    r"a{2,}b*?c",
    r"",
]
SUM = """
start: term (("+" | " - ") term)*
term: NUMBER | "(" start ")"
NUMBER: /[1-9][0-9]{0,2}/
"""


def config(argument: Any, **settings: Any) -> GenerateConfig:
    return GenerateConfig(
        **{
            "max_new_tokens": 200,
            "logits_processors": {"structured-output": argument},
            **settings,
        }
    )


def is_sum(text: str) -> bool:
    """Whether Python reads a text as a sum of integers from 1 to 999."""
    try:
        nodes = list(ast.walk(ast.parse(text, mode="eval")))
    except (SyntaxError, MemoryError):
        return False
    taken = (ast.Expression, ast.BinOp, ast.Constant, ast.Add, ast.Sub)
    values = [n.value for n in nodes if isinstance(n, ast.Constant)]
    return all(isinstance(n, taken) for n in nodes) and all(v in range(1, 1000) for v in values)


def is_valid(text: str, schema: Any) -> bool:
    return jsonschema_rs.is_valid(schema, json.loads(text), validate_formats=True)


@pytest.fixture(scope="module")
def engine() -> Iterator[LLMEngine]:
    with LLMEngine.from_plugins() as engine:
        engine.init_model("m", DEMO_MODEL)
        yield engine


# --- with a model ---------------------------------------------------------------------------------


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: str(schema)[:24])
def test_a_text_is_json_that_is_valid_against_the_schema(engine: LLMEngine, schema: Any) -> None:
    made = [config({"json": schema}, temperature=1.0, seed=seed) for seed in range(2)]
    for each in (config({"json": json.dumps(schema)}), *made):
        result = engine.generate_result("m", PROMPT, each)
        assert result.finish_reason == "eos"
        assert is_valid(result.text, schema), result.text


def test_requests_of_different_grammars_in_one_batch_have_the_texts_that_they_have_alone(
    engine: LLMEngine,
) -> None:
    arguments = [
        *({"json": ANSWER}, {"regex": "[a-z]{5} [0-9]{2,9}"}, {"choice": ["yes", "yesterday"]}),
        *({"grammar": SUM}, {"json": NODE}, {"regex": "é+!"}),
    ]
    made = [config(a, temperature=1.5, seed=n, max_new_tokens=30) for n, a in enumerate(arguments)]
    made.append(GenerateConfig(max_new_tokens=12, temperature=1.0, seed=3))
    alone = [engine.generate("m", PROMPT, each) for each in made]
    streams = [engine.stream("m", PROMPT, each) for each in made]
    assert ["".join(stream) for stream in streams] == alone


@pytest.mark.parametrize("settings", [{}, {"temperature": 2.0, "seed": 5}])
def test_drafts_do_not_change_a_text(settings: dict[str, Any]) -> None:
    with LLMEngine.from_plugins() as engine:
        engine.init_model("m", DEMO_MODEL)
        made = config({"json": ANSWER}, **settings)
        expected = engine.generate_result("m", PROMPT, made).token_ids
        runner = engine._thread("m").runner
        for wrong in ({}, {0: 7}, {1: 0, 2: 8}, {3: expected[-1]}, {5: 300, 7: 8}):
            drafts = [wrong.get(n, i) for n, i in enumerate(expected)]
            runner._scheduler._draft = lambda request, most, drafts=drafts: drafts[
                len(request.output_token_ids) :
            ][: min(most, 4)]
            steps = runner.num_steps
            assert engine.generate_result("m", PROMPT, made).token_ids == expected
            if not wrong:
                assert runner.num_steps - steps < len(expected)


def test_a_flag_gives_the_argument_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    flag = 'structured-output={"regex": "[0-9]{3}"}'
    assert main(["generate", "--logits-processor", flag, "--json", PROMPT]) == 0
    assert re.fullmatch("[0-9]{3}", json.loads(capsys.readouterr().out)["text"])


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        (3, "expected a mapping with one of the keys json, .*, found none"),
        ({}, "found none"),
        ({"regex": "a", "json": {}}, "found 'regex', 'json'"),
        ({"xml": "a"}, "found 'xml'"),
        ("{", "found none"),
        ({"json": '{"type"'}, "json: expected a schema in JSON: .* line 1"),
        ({"json": [1]}, r"json: expected a schema, a mapping, found \[1\]"),
        ({"json": {"const": object()}}, "json: expected a schema of JSON values"),
        ({"json": {"const": float("nan")}}, "json: expected a schema of JSON values"),
        ({"json": {"const": "\ud800"}}, "unexpected end of hex escape"),
        ({"json": '{"items":' * 200 + "{}" + "}" * 200}, "recursion limit"),
        ({"json": '{"items":' * 90000 + "{}" + "}" * 90000}, "recursion"),
        (
            {"json": {"type": "array", "uniqueItems": True}},
            r'Unimplemented keys: \["uniqueItems"\]',
        ),
        (
            {"json": {"type": "array", "uniqueItems": True, "x-guidance": {"lenient": True}}},
            r'Unimplemented keys: \["uniqueItems"\]',
        ),
        ({"json": {"type": "objekt"}}, "Invalid type: objekt"),
        ({"json": {"type": "string", "format": "colour"}}, "Unknown format: colour"),
        ({"json": {"type": "integer", "minimum": 3, "maximum": 1}}, "Unsatisfiable schema"),
        ({"json": {"$ref": "#"}}, "no text of the model's tokens is what it describes"),
        ({"json": {"$ref": "https://example.com/a"}}, "not fetch resources"),
        ({"json_object": False}, "json_object: expected true, found False"),
        ({"regex": None}, "regex: expected text, found None"),
        ({"regex": "a(?=b)"}, "look-around, .*, is not supported"),
        ({"regex": "(a"}, "unclosed group"),
        ({"regex": "a\\"}, "a character after the backslash"),
        ({"regex": r"[^\s\S]"}, "no text of the model's tokens is what it describes"),
        ({"regex": "(" * 9000 + ")" * 9000}, "maximum number of nested"),
        ({"regex": "\ud800"}, "expected valid Unicode"),
        ({"choice": []}, r"choice: expected a list of strings .*, found \[\]"),
        ({"choice": ["a", ""]}, "at least one character each"),
        ({"choice": ["a", "\ud800"]}, "error parsing string"),
        ({"grammar": ["a"]}, r"grammar: expected text, found \['a'\]"),
        ({"grammar": "start: other"}, 'unknown name: "other"'),
        ({"grammar": 'begin: "a"'}, "no start rule"),
        ({"grammar": 'start: start "a"'}, "no text of the model's tokens is what it describes"),
        ({"grammar": "start: " + "(" * 9000 + ")" * 9000}, "too deeply nested"),
        ({"grammar": "start: <|im_end|>"}, "unknown special token"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else "",
)
def test_what_cannot_be_served_is_refused_with_the_reason(
    engine: LLMEngine, argument: Any, said: str
) -> None:
    with pytest.raises(RequestError, match=f"^structured-output: .*{said}") as caught:
        engine.generate("m", PROMPT, config(argument, max_new_tokens=1))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_without_llguidance_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(RequestError, match=r"pip install 'tilewright\[guidance\]'"):
        processor_of(byte_level)


# --- with tokenizers of every kind ----------------------------------------------------------------


def processor_of(
    make: Callable[[], Tokenizer], turn_ends: tuple[int, ...] = (), **changed: Any
) -> tuple[StructuredOutputProcessor, Text]:
    tokenizer = make()
    ends = (tokenizer.token_to_id("</s>"), tokenizer.token_to_id("<|im_end|>"))
    values = {"vocab_size": tokenizer.get_vocab_size() + 5, "eos_token_ids": ends, **changed}
    text = Text(TextAssets(tokenizer=tokenizer, turn_end_ids=turn_ends))
    return StructuredOutputProcessor(text, evolve(CONFIGS["plain"], **values)), text


def allowed(processor: Any, state: Any) -> list[int]:
    (effect,) = effects(processor, [(0, state)], processor._vocab_size)
    return allowed_tokens(effect)


def walked(processor: Any, argument: Any, random: Random) -> list[int]:
    """The tokens of a text, each drawn from those that are allowed, until one ends it. An end is
    taken where it is allowed once the text is long."""
    state, ids = processor.begin("a", argument, []), list[int]()
    while not state.ended:
        found = allowed(processor, state)
        ends = [i for i in found if i in processor._ends]
        ids.append(random.choice(ends if ends and len(ids) > 20 else found))
        processor.accept(state, ids[-1])
    return ids


def texts(make: Callable[[], Tokenizer], argument: Any, count: int) -> list[str]:
    processor, text = processor_of(make)
    made = []
    for seed in range(count):
        ids = walked(processor, argument, Random(seed))
        stream = TextStream(text)
        made.append("".join([*map(stream.push, ids), stream.finish()]))
        assert made[-1] == text.decode(ids)
    return made


every_tokenizer = pytest.mark.parametrize(
    "make", [byte_level, llama_2, gemma, metaspace], ids=lambda make: make.__name__
)


@every_tokenizer
def test_any_allowed_tokens_make_a_text_that_the_regular_expression_matches(
    make: Callable[[], Tokenizer],
) -> None:
    for regex in REGEXES:
        found = texts(make, {"regex": regex}, 8)
        assert [text for text in found if not re.fullmatch(regex, text)] == [], regex


@every_tokenizer
def test_any_allowed_tokens_make_json_that_is_valid(make: Callable[[], Tokenizer]) -> None:
    for schema in (*SCHEMAS, NUMBERS):
        found = texts(make, {"json": schema}, 4)
        assert [text for text in found if not is_valid(text, schema)] == [], schema


def test_any_allowed_tokens_make_a_text_that_the_grammar_describes() -> None:
    found = texts(byte_level, {"grammar": SUM}, 40)
    assert [text for text in found if not is_sum(text)] == []
    assert any("(" in text for text in found)


CHOICES = [
    " yes",
    " no",
    " not",
    "é数👍🏽",
    "é数",
    "  two",
    " ",
    "the fox",
    " the",
    'a "\x7f\n',
    "▁",
]


@every_tokenizer
def test_a_choice_allows_the_tokens_that_the_processor_choice_allows(
    make: Callable[[], Tokenizer],
) -> None:
    processor, text = processor_of(make)
    model = evolve(
        CONFIGS["plain"], vocab_size=processor._vocab_size, eos_token_ids=tuple(processor._ends)
    )
    other, random = ChoiceProcessor(text, model), Random(1)
    choices = CHOICES[: -1 if make is metaspace else None]
    for _ in range(20):
        mine, its = processor.begin("a", {"choice": choices}, []), other.begin("a", choices, [])
        while not its.ended:
            found = allowed(processor, mine)
            (effect,) = effects(other, [(0, its)], processor._vocab_size)
            assert found == allowed_tokens(effect)
            token = random.choice(found)
            processor.accept(mine, token)
            other.accept(its, token)


def test_only_an_added_token_may_write_its_text_where_nothing_else_can_follow() -> None:
    processor, text = processor_of(byte_level)
    think = text.assets.tokenizer.token_to_id("<think>")
    assert allowed(processor, processor.begin("a", {"regex": "<think> ok"}, [])) == [think]
    several = allowed(processor, processor.begin("a", {"regex": "<think>|<thing>"}, []))
    assert sorted([think, text.assets.tokenizer.token_to_id("<")]) == several


def test_ids_without_a_token_are_never_allowed() -> None:
    processor, text = processor_of(byte_level)
    size = text.assets.tokenizer.get_vocab_size()
    for argument in ({"grammar": "start: <[*]>"}, {"regex": "(.|\n)*"}):
        found = allowed(processor, processor.begin("a", argument, []))
        assert max(found) < size
        assert len(found) > 300
    with pytest.raises(RequestError, match="no text of the model's tokens"):
        processor.begin("a", {"grammar": f"start: <[{size}]>"}, [])


def test_the_end_of_a_turn_ends_a_text_and_an_end_of_sequence_may_follow() -> None:
    tokenizer = byte_level()
    end, turn_end = (tokenizer.token_to_id(name) for name in ("</s>", "<|im_end|>"))
    processor, _ = processor_of(byte_level, turn_ends=(turn_end,), eos_token_ids=(end,))
    state = processor.begin("a", {"choice": ["a"]}, [])
    processor.accept(state, tokenizer.token_to_id("a"))
    assert allowed(processor, state) == sorted([end, turn_end])
    processor.accept(state, turn_end)
    assert allowed(processor, state) == [end]


def test_a_model_without_an_end_of_text_is_refused() -> None:
    processor, _ = processor_of(byte_level, eos_token_ids=())
    with pytest.raises(RequestError, match="no token that ends a text"):
        processor.begin("a", {"regex": "a"}, [])


def words() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "</s>": 2}))
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def test_a_text_that_no_token_can_go_on_with_is_an_error_and_no_end() -> None:
    processor, _ = processor_of(words, eos_token_ids=(2,))
    state = processor.begin("a", {"regex": "a(b|bc)c"}, [])
    other = processor.begin("b", {"regex": "ab?"}, [])
    snapshot = processor.snapshot(state)
    for token in (0, 1):  # drafts
        processor.accept(state, token)
    assert allowed(processor, state) == [2]
    processor.restore(state, snapshot)
    for token in (0, 1):
        assert allowed(processor, state) == [token]
        processor.accept(state, token)
        processor.accept(other, token)
    assert allowed(processor, state) == [2]
    with pytest.raises(RequestError, match="no token can go on with the text"):
        processor.accept(state, 2)
    processor.accept(other, 2)
    assert other.ended


def is_taken(text: str, argument: Any) -> bool:
    """Whether a text may be whole, by the tokens that the tokenizer makes of it."""
    processor, of = processor_of(byte_level)
    state = processor.begin("a", argument, [])
    for token in of.encode(text):
        processor.accept(state, token)
    processor.accept(state, processor._ends[0])
    return state.ended


@pytest.mark.parametrize("text", ['{"a":[1,null,{"é":-1.5e3}]}', "{}", '{"a": {"a": "\\n"}}'])
def test_a_json_object_is_any(text: str) -> None:
    assert is_taken(text, {"json_object": True})
    for wrong in (text[:-1], f"[{text}]", text.replace('"', "'") + " ", text + text):
        assert not is_taken(wrong, {"json_object": True})


@pytest.mark.parametrize(
    ("text", "taken"),
    [
        ('{"a":1,"b":[true,false]}', True),
        ('{"a": 1, "b": [true, false]}', True),
        ('{\n  "a": 1,\n  "b": [\n    true\n  ]\n}', True),
        ('{\n\t"a": 1,\n\t"b": []\n}', True),
        ('{"a":  1,"b":[]}', False),
        ('{\n\n"a":1,"b":[]}', False),
        (' {"a":1,"b":[]}', False),
        ('{"a":1,"b":[]}\n', False),
    ],
)
def test_white_space_in_json_is_a_space_or_a_line_break_with_an_indent(
    text: str, taken: bool
) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "array", "items": {}}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    assert is_taken(text, {"json": schema}) == taken


def test_a_grammar_is_compiled_once_for_many_requests() -> None:
    processor, _ = processor_of(byte_level)
    for _ in range(20):
        processor.begin("a", {"json": ANSWER}, [])
    assert processor._compiled.cache_info().misses == 1


def test_grammars_are_compiled_while_the_model_runs_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiling, compiled, done = threading.Event(), threading.Event(), threading.Event()
    matcher = StructuredOutputProcessor._matcher

    def slow(self: StructuredOutputProcessor, grammar: str) -> Any:
        compiling.set()
        assert compiled.wait(30)
        return matcher(self, grammar)

    with LLMEngine.from_plugins() as engine:
        engine.init_model("demo", DEMO_MODEL)
        # Makes the processor, which reads the vocabulary.
        engine.generate("demo", PROMPT, structured({"regex": "a"}))
        monkeypatch.setattr(StructuredOutputProcessor, "_matcher", slow)

        def ask() -> None:
            assert engine.generate("demo", PROMPT, structured({"regex": "b"})) == "b"
            done.set()

        thread = threading.Thread(target=ask)
        thread.start()
        assert compiling.wait(30)
        assert engine.generate("demo", PROMPT, GenerateConfig(max_new_tokens=3))
        assert not done.is_set()
        compiled.set()
        thread.join(30)
        assert done.is_set()


def structured(argument: dict[str, Any]) -> GenerateConfig:
    processors = {"structured-output": argument}
    return GenerateConfig(max_new_tokens=8, temperature=0.0, logits_processors=processors)
