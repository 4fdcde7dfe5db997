"""Logits processor ``choice``: a text is one of its choices, by any tokens that spell it."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import exp, sqrt
from random import Random
from typing import Any

import pytest
from attrs import evolve
from small_tokenizers import byte_level, gemma, llama_2, metaspace, no_decoder, word_piece
from tokenizers import Tokenizer, decoders, models

from tilewright import GenerateConfig, LLMEngine
from tilewright.cli import main
from tilewright.errors import RequestError
from tilewright.settings import DEMO_MODEL
from tilewright.text import Text, TextStream
from tilewright.types import TextAssets
from tilewright_guidance.choice import ChoiceProcessor
from tilewright_testing.logits_processor import allowed_tokens, effects
from tilewright_testing.models import CONFIGS

PROMPT = "Congress shall make no law"
CHOICES = [" yes", " no", " not", " nothing", " maybe later", " respecting", "é数👍🏽", "é数"]


def config(choices: Any, **settings: Any) -> GenerateConfig:
    return GenerateConfig(
        **{"max_new_tokens": 40, "logits_processors": {"choice": choices}, **settings}
    )


@pytest.fixture(scope="module")
def engine() -> Iterator[LLMEngine]:
    with LLMEngine.from_plugins() as engine:
        engine.init_model("m", DEMO_MODEL)
        yield engine


# --- with a model ---------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0}, {"temperature": 30.0}])
def test_a_text_is_one_of_the_choices_and_ends_with_it(
    engine: LLMEngine, settings: dict[str, Any]
) -> None:
    results = engine.generate_batch("m", [PROMPT] * 60, config(CHOICES, seed=1, **settings))
    assert {result.finish_reason for result in results} == {"eos"}
    found = {result.text for result in results}
    assert found <= set(CHOICES)
    if settings.get("temperature", 0) > 1:
        assert len(found) > 4
        assert len({result.token_ids for result in results}) > len(found)  # several spellings


def test_the_end_of_a_choice_that_begins_another_is_the_models_to_choose(
    engine: LLMEngine,
) -> None:
    choices = [" a", " ab", " abc"]
    results = engine.generate_batch("m", [PROMPT] * 100, config(choices, temperature=20.0, seed=1))
    assert {result.text for result in results} == set(choices)


def test_choices_are_drawn_by_the_models_own_probabilities_among_allowed_tokens(
    engine: LLMEngine,
) -> None:
    choices, temperature, count = [" no", " not", " note", " make"], 8.0, 300
    expected = probabilities(engine, choices, temperature)
    assert sum(expected.values()) == pytest.approx(1)
    made = config(choices, temperature=temperature, seed=7)
    found = Counter(r.text for r in engine.generate_batch("m", [PROMPT] * count, made))
    for choice, p in expected.items():
        assert found[choice] / count == pytest.approx(p, abs=4 * sqrt(p * (1 - p) / count))
    assert min(expected.values()) > 0.05


def probabilities(
    engine: LLMEngine, choices: Sequence[str], temperature: float
) -> Mapping[str, float]:
    """How likely each choice is, by every sequence of tokens that spells one."""
    model = engine.model("m")
    text, loaded = model.text, model.loaded.config
    one = GenerateConfig(max_new_tokens=1, logprobs=loaded.vocab_size)
    pieces = {i: text.decode([i]) for i in range(loaded.vocab_size)}
    found: Counter[str] = Counter()

    def follow(ids: list[int], written: str, p: float) -> None:
        result = engine.generate_result("m", [*text.encode(PROMPT), *ids], one)
        top = result.logprobs[0].top
        weights = {
            i: exp(value / temperature)
            for i, value in top
            if (i in loaded.eos_token_ids and written in choices)
            or (pieces[i] and any(c.startswith(written + pieces[i]) for c in choices))
        }
        for i, weight in weights.items():
            now = p * weight / sum(weights.values())
            if i in loaded.eos_token_ids:
                found[written] += now
            else:
                follow([*ids, i], written + pieces[i], now)

    follow([], "", 1.0)
    return found


def test_requests_without_choices_keep_their_texts(engine: LLMEngine) -> None:
    plain = GenerateConfig(max_new_tokens=12, temperature=1.0, seed=3)
    alone = engine.generate("m", PROMPT, plain)
    made = [plain, config([" yes", " no"]), config(CHOICES, temperature=9.0, seed=2), plain]
    streams = [engine.stream("m", PROMPT, each) for each in made]
    first, yes, other, last = ("".join(stream) for stream in streams)
    assert (first, last) == (alone, alone)
    assert yes in (" yes", " no")
    assert other in CHOICES


@pytest.mark.parametrize("settings", [{}, {"temperature": 9.0, "seed": 5}])
def test_drafts_do_not_change_a_text(settings: dict[str, Any]) -> None:
    with LLMEngine.from_plugins() as engine:
        engine.init_model("m", DEMO_MODEL)
        made = config([" maybe", " maybe later", " no law respecting"], **settings)
        expected = engine.generate_result("m", PROMPT, made).token_ids
        runner = engine._thread("m").runner
        for wrong in ({}, {0: 7}, {1: 0, 2: 8}, {3: expected[-1]}):
            drafts = [wrong.get(n, i) for n, i in enumerate(expected)]
            runner._scheduler._draft = lambda request, most, drafts=drafts: drafts[
                len(request.output_token_ids) :
            ][: min(most, 4)]
            steps = runner.num_steps
            assert engine.generate_result("m", PROMPT, made).token_ids == expected
            if not wrong:
                assert runner.num_steps - steps < len(expected)


def test_a_text_that_may_have_few_tokens_is_the_beginning_of_a_choice(engine: LLMEngine) -> None:
    result = engine.generate_result("m", PROMPT, config(["é数👍🏽é数👍🏽"], max_new_tokens=3))
    assert result.finish_reason == "length"
    assert "é数👍🏽é数👍🏽".startswith(result.text.rstrip("\ufffd"))


def test_after_the_end_nothing_but_ends_is_generated(engine: LLMEngine) -> None:
    made = config([" no", " not"], ignore_eos=True, temperature=20.0, seed=1, max_new_tokens=20)
    ends = set(engine.model("m").loaded.config.eos_token_ids)
    for result in engine.generate_batch("m", [PROMPT] * 10, made):
        assert result.finish_reason == "length"
        assert result.text in (" no", " not")
        first = next(n for n, i in enumerate(result.token_ids) if i in ends)
        assert set(result.token_ids[first:]) <= ends


@pytest.mark.parametrize(
    ("flag", "expected"),
    [(" yes, yes", {" yes"}), ('[" a, b"]', {" a, b"}), (" yes, no", {" yes", " no"})],
)
def test_a_flag_has_choices_between_commas_or_in_json(
    capsys: pytest.CaptureFixture[str], flag: str, expected: set[str]
) -> None:
    assert main(["generate", "--logits-processor", f"choice={flag}", "--json", PROMPT]) == 0
    assert json.loads(capsys.readouterr().out)["text"] in expected


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ([], r"expected a list of strings .*, found \[\]: give for example"),
        (["a", ""], r"at least one character each, found \['a', ''\]"),
        ([1], r"found \[1\]"),
        ({"a": 1}, r"found \{'a': 1\}"),
        ('["a"', "found '\\[\"a\"'"),
        (["a", "\ud800"], r"no tokens of the model spell '\\ud800'"),
    ],
)
def test_wrong_choices_are_refused(engine: LLMEngine, choices: Any, said: str) -> None:
    with pytest.raises(RequestError, match=f"^choice: .*{said}"):
        engine.generate("m", PROMPT, config(choices))


# --- with tokenizers of every kind ----------------------------------------------------------------


def processor_of(make: Callable[[], Tokenizer], **changed: Any) -> tuple[ChoiceProcessor, Text]:
    tokenizer = make()
    ends = (tokenizer.token_to_id("</s>"), tokenizer.token_to_id("<|im_end|>"))
    values = {"vocab_size": tokenizer.get_vocab_size() + 5, "eos_token_ids": ends, **changed}
    text = Text(TextAssets(tokenizer=tokenizer))
    return ChoiceProcessor(text, evolve(CONFIGS["plain"], **values)), text


SPELLED = {
    byte_level: [
        *CHOICES,
        "  two words ",
        "<think>",
        "</s>",
        "數",
        "\ufffd",
        "Ġ",
        "\x00\n",
        "a" * 99,
    ],
    llama_2: [
        *CHOICES,
        " the fox",
        "the fox",
        "  the",
        "   ",
        " ",
        "<0x41>",
        "▁",
        "\ufffd",
        "数学",
    ],
    gemma: [*CHOICES, " the fox", "the fox", "  the", "   ", " ", "<0x41>", "▁", "\ufffd", "数学"],
    metaspace: [*CHOICES, " the fox", "the fox", "  the", "   ", " ", "<0x41>", "\ufffd", "数学"],
    word_piece: ["the", "foxes", "the fox.", "the foxy fox a", "数学", "数 数学", "don ' t"],
    no_decoder: ["the", "fox", "the fox", "the fox fox", "<think> the"],
}
every_tokenizer = pytest.mark.parametrize("make", SPELLED, ids=lambda make: make.__name__)


def walked(processor: ChoiceProcessor, vocab_size: int, choices: Any, random: Random) -> list[int]:
    """The tokens of a text, each drawn from those that are allowed, until one ends it."""
    state, ids = processor.begin("a", choices, []), list[int]()
    while not state.ended:
        (effect,) = effects(processor, [(0, state)], vocab_size)
        ids.append(random.choice(allowed_tokens(effect)))
        processor.accept(state, ids[-1])
    return ids


@every_tokenizer
def test_any_allowed_tokens_make_exactly_a_choice(make: Callable[[], Tokenizer]) -> None:
    processor, text = processor_of(make)
    vocab_size = text.assets.tokenizer.get_vocab_size() + 5
    random, choices = Random(1), SPELLED[make]
    for chosen in (choices, *([choice] for choice in choices)):
        for _ in range(20):
            ids = walked(processor, vocab_size, chosen, random)
            stream = TextStream(text)
            assert "".join([*map(stream.push, ids), stream.finish()]) in chosen
            assert text.decode(ids) in chosen


@every_tokenizer
def test_exactly_the_tokens_with_which_a_text_still_begins_a_choice_are_allowed(
    make: Callable[[], Tokenizer],
) -> None:
    processor, text = processor_of(make)
    vocab_size, random = text.assets.tokenizer.get_vocab_size() + 5, Random(2)
    everything = make not in (word_piece, no_decoder)  # whatever is left can be spelled
    choices = [choice for choice in SPELLED[make] if "\ufffd" not in choice]
    for _ in range(30):
        state, ids = processor.begin("a", choices, []), list[int]()
        while not state.ended:
            (effect,) = effects(processor, [(0, state)], vocab_size)
            allowed = allowed_tokens(effect)
            before = text.decode(ids)
            for i in range(vocab_size):
                after = text.decode([*ids, i])
                if "\ufffd" in after or i in (*allowed, *processor._ends):
                    continue
                adds = after != before or (not ids and text.decode([i, i]))
                begins = adds and any(c.startswith(after) for c in choices)
                assert not (begins and everything), (before, text.assets.tokenizer.id_to_token(i))
            ends = set(processor._ends) & set(allowed)
            assert len(ends) == (2 if before in choices else 0)
            ids.append(random.choice(allowed))
            processor.accept(state, ids[-1])


def test_a_token_after_which_a_choice_cannot_be_spelled_is_not_allowed() -> None:
    def make() -> Tokenizer:
        tokenizer = Tokenizer(models.WordLevel({"a": 0, "ab": 1, "bc": 2, "d": 3, "</s>": 4}))
        tokenizer.decoder = decoders.Fuse()
        return tokenizer

    processor, _ = processor_of(make, eos_token_ids=(4,))
    state = processor.begin("a", ["abc", "ad"], [])
    assert allowed_tokens(effects(processor, [(0, state)], 10)[0]) == [0]
    with pytest.raises(RequestError, match="no tokens of the model spell 'ac'"):
        processor.begin("a", ["ad", "ac"], [])


def test_a_token_without_a_text_is_not_allowed() -> None:
    def make() -> Tokenizer:
        tokenizer = Tokenizer(models.WordLevel({"a": 0, "": 1, "b": 2, "</s>": 3}))
        tokenizer.decoder = decoders.Fuse()
        return tokenizer

    processor, _ = processor_of(make, eos_token_ids=(3,))
    state = processor.begin("a", ["ab"], [])
    for expected in ([0], [2], [3]):
        assert allowed_tokens(effects(processor, [(0, state)], 9)[0]) == expected
        processor.accept(state, expected[0])


def test_a_choice_that_would_be_decoded_to_another_text_is_refused() -> None:
    processor, _ = processor_of(metaspace)
    with pytest.raises(RequestError, match="no tokens of the model spell 'a▁b'"):
        processor.begin("a", ["a▁b"], [])


def test_a_model_without_an_end_of_text_is_refused() -> None:
    processor, _ = processor_of(byte_level, eos_token_ids=())
    with pytest.raises(RequestError, match="no token that ends a text"):
        processor.begin("a", ["yes"], [])


def test_a_tokenizer_whose_tokens_change_their_neighbours_is_refused() -> None:
    def make() -> Tokenizer:
        tokenizer = no_decoder()
        tokenizer.decoder = decoders.BPEDecoder(suffix="e")
        return tokenizer

    with pytest.raises(RequestError, match="depends on the tokens beside it"):
        processor_of(make)
