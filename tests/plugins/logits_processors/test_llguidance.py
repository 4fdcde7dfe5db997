"""A logits processor over llguidance, which is a library of grammars, keeps the contract.

Left out unless llguidance is installed.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import pytest
import torch
from attrs import define

from tilewright import GenerateConfig, LLMEngine, hookimpl
from tilewright.errors import RequestError
from tilewright.logits_processing import Processing
from tilewright.settings import DEMO_MODEL
from tilewright.types import LogitsEdits, ModelConfig, PluginInfo, TextAssets
from tilewright_testing import LogitsProcessorSuite

llguidance = pytest.importorskip("llguidance")
fill_next_token_bitmask = pytest.importorskip("llguidance.torch").fill_next_token_bitmask

SCHEMA = {
    "type": "object",
    "properties": {
        "answer": {"enum": ["yes", "no", "hello"]},
        "sure": {"type": "boolean"},
        "count": {"type": "integer", "minimum": 0, "maximum": 30},
    },
    "required": ["answer", "sure", "count"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}


@define(eq=False)
class State:
    matcher: Any
    """An llguidance.LLMatcher; in error after a token that it does not allow."""


class Grammar:
    """Texts in JSON that follow the schema which a request gives."""

    def __init__(self, config: ModelConfig, text: TextAssets):
        self.vocab_size = config.vocab_size
        self.tokenizer = llguidance.LLTokenizer(
            text.tokenizer.to_str(),
            n_vocab=config.vocab_size,
            eos_token=list(config.eos_token_ids),
        )

    def begin(self, request_id: str, argument: Any, prompt_token_ids: Sequence[int]) -> State:
        if not isinstance(argument, (str, dict)) or not argument:
            raise RequestError(f"json: expected a JSON schema, found {argument!r:.100}")
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(argument)
        except (TypeError, ValueError) as error:
            raise RequestError(f"json: expected a JSON schema: {error!s:.100}") from error
        matcher = llguidance.LLMatcher(self.tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise RequestError(f"json: {' '.join(matcher.get_error().split())}")
        return State(matcher)

    def edits(self, rows: Sequence[tuple[int, State]]) -> LogitsEdits | None:
        rows = [(row, state) for row, state in rows if not state.matcher.is_error()]
        masks = torch.zeros(len(rows), -(-self.vocab_size // 32), dtype=torch.int32)
        for i, (_, state) in enumerate(rows):
            fill_next_token_bitmask(state.matcher, masks, i)
        numbers = torch.tensor([row for row, _ in rows], dtype=torch.int64)
        return LogitsEdits(mask_rows=numbers, masks=masks)

    def accept(self, state: State, token_id: int) -> None:
        state.matcher.consume_token(token_id)

    def snapshot(self, state: State) -> Any:
        return state.matcher.deep_copy()

    def restore(self, state: State, snapshot: Any) -> None:
        state.matcher = snapshot

    def end(self, state: State) -> None: ...


class Plugin:
    tilewright_api = 2

    @hookimpl
    def plugin_info(self) -> PluginInfo:
        return PluginInfo(summary="JSON by a schema")

    @hookimpl
    def create_logits_processor(self, model_config: ModelConfig, text: TextAssets) -> Grammar:
        return Grammar(model_config, text)

    @hookimpl
    def sample_argument(self) -> Any:
        return SCHEMA


@pytest.mark.slow
class TestConformance(LogitsProcessorSuite):
    @pytest.fixture
    def plugin(self) -> Any:
        return Plugin()

    @pytest.fixture
    def wrong_arguments(self) -> Sequence[Any]:
        return ["{", 3, {"type": "objekt"}]


@pytest.fixture
def engine() -> Iterator[LLMEngine]:
    with LLMEngine.from_plugins() as engine:
        loaded = engine.init_model("m", DEMO_MODEL)
        made = Grammar(loaded.config, loaded.text)
        engine._thread("m").runner._processors = lambda name: Processing(name, made, None)
        yield engine


@pytest.mark.slow
class TestTexts:
    config: ClassVar = {"max_new_tokens": 80, "logits_processors": {"json": SCHEMA}}

    @pytest.mark.parametrize("seed", range(4))
    def test_a_text_follows_the_schema(self, engine: LLMEngine, seed: int) -> None:
        config = GenerateConfig(temperature=1.0, seed=seed, **self.config)
        result = engine.generate_result("m", "We the People", config)
        assert result.finish_reason == "eos"
        found = json.loads(result.text)
        assert sorted(found) == ["answer", "count", "sure"]
        assert found["answer"] in ("yes", "no", "hello")
        assert found["count"] in range(31)

    def test_drafts_do_not_change_a_text(self, engine: LLMEngine) -> None:
        config = GenerateConfig(temperature=1.0, seed=1, **self.config)
        expected = engine.generate_result("m", "We the People", config)
        draws = list(expected.token_ids)
        draws[5:7] = [0, 7]  # wrong ones, too
        scheduler = engine._thread("m").runner._scheduler
        scheduler._draft = lambda request, most: draws[len(request.output_token_ids) :][
            : min(most, 4)
        ]
        found = engine.generate_result("m", "We the People", config)
        assert found.token_ids == expected.token_ids
