"""Plugin ``choice``: a text is exactly one of the strings that its request gives.

Any tokens may spell a choice, not only those that the tokenizer would take: a token is allowed if
the text with it begins a choice, and the rest of the choice can be spelled too. A token that ends a
text is allowed where the text is a choice, and nothing else is after it, should a request ignore
it. So the model decides token by token, by its own probabilities among the tokens that are allowed.
"""

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from attrs import define, frozen

from tilewright import hookimpl
from tilewright.errors import RequestError
from tilewright.text import Text
from tilewright.types import LogitsEdits, LogitsProcessor, ModelConfig, PluginInfo, TextAssets
from tilewright_guidance.vocabulary import Tokens, read_vocabulary

tilewright_api = 2


@hookimpl
def plugin_info() -> PluginInfo:
    return PluginInfo(
        summary="a text that is exactly one of a list of choices",
        limits={"argument": "a list of strings; a flag gives it in JSON, or with commas: yes,no"},
    )


@hookimpl
def create_logits_processor(model_config: ModelConfig, text: TextAssets) -> LogitsProcessor:
    return ChoiceProcessor(Text(text), model_config)


@hookimpl
def sample_argument() -> list[str]:
    return ["yes", "yesterday", "no"]


@frozen(eq=False)
class Choice:
    text: bytes
    first: Sequence[int]
    """Ids of the tokens with which it can begin."""
    later: Sequence[Sequence[int]]
    """Ids of the tokens that can follow after each number of bytes, from 0 to all."""


@define(eq=False)
class State:
    choices: Sequence[Choice]
    text: bytes = b""
    begun: bool = False
    ended: bool = False


class ChoiceProcessor:
    """A ``LogitsProcessor`` (see tilewright.types)."""

    def __init__(self, text: Text, config: ModelConfig):
        """Raises RequestError as ``read_vocabulary`` does."""
        self._text = text
        self._ends = config.eos_token_ids
        self._num_words = -(-config.vocab_size // 32)
        self._vocabulary = read_vocabulary(text, config.vocab_size, self._ends)
        # Many requests give the same choices, for example to classify many texts.
        self._choices = lru_cache(16)(lambda strings: [self._choice(each) for each in strings])

    def begin(self, request_id: str, argument: Any, prompt_token_ids: Sequence[int]) -> State:
        if not self._ends:
            raise RequestError(
                "choice: the model's files name no token that ends a text, so a text would not end "
                "after a choice: set eos_token_id there"
            )
        return State(self._choices(_strings(argument)))

    def edits(self, rows: Sequence[tuple[int, State]]) -> LogitsEdits:
        allowed = np.zeros((len(rows), self._num_words * 32), dtype=bool)
        for mask, (_, state) in zip(allowed, rows, strict=True):
            mask[list(self._allowed(state))] = True
        words = np.packbits(allowed, axis=1, bitorder="little").view("<i4")
        numbers = torch.tensor([row for row, _ in rows], dtype=torch.int64)
        return LogitsEdits(mask_rows=numbers, masks=torch.from_numpy(words))

    def accept(self, state: State, token_id: int) -> None:
        if token_id in self._ends:
            state.ended = True
        else:
            tokens = self._vocabulary.later if state.begun else self._vocabulary.first
            state.text += tokens.bytes_of.get(token_id, b"")
            state.begun = True

    def snapshot(self, state: State) -> tuple[bytes, bool, bool]:
        return state.text, state.begun, state.ended

    def restore(self, state: State, snapshot: tuple[bytes, bool, bool]) -> None:
        state.text, state.begun, state.ended = snapshot

    def end(self, state: State) -> None:
        """A state is freed with its request."""

    def _allowed(self, state: State) -> set[int]:
        """The tokens that may be next; those that end a text after a draft that was not allowed."""
        found: set[int] = set()
        for choice in () if state.ended else state.choices:
            if choice.text.startswith(state.text):
                found.update(choice.later[len(state.text)] if state.begun else choice.first)
        return found or set(self._ends)

    def _choice(self, string: str) -> Choice:
        """Raises RequestError for a string that no tokens spell."""
        text = string.encode(errors="surrogatepass")
        later: list[Sequence[int]] = [()] * len(text) + [self._ends]

        def follow(tokens: Tokens, start: int) -> list[int]:
            stops = range(start, min(start + self._vocabulary.longest, len(text)) + 1)
            return [i for s in stops if later[s] for i in tokens.ids.get(text[start:s], ())]

        for start in reversed(range(len(text))):
            later[start] = follow(self._vocabulary.later, start)
        choice = Choice(text, follow(self._vocabulary.first, 0), later)
        state, ids = State([choice]), list[int]()
        while choice.first and state.text != text:
            ids.append(min(self._allowed(state)))
            self.accept(state, ids[-1])
        if self._text.decode(ids) != string:
            raise RequestError(
                f"choice: no tokens of the model spell {string!r:.100}: write it in other "
                "characters, or leave it out"
            )
        return choice


def _strings(argument: Any) -> tuple[str, ...]:
    """A request's choices. Raises RequestError unless each is a string of some length."""
    given = argument
    if isinstance(argument, str):
        try:
            given = json.loads(argument) if argument.startswith("[") else argument.split(",")
        except (ValueError, RecursionError):
            given = None
    if isinstance(given, list | tuple) and given and all(isinstance(s, str) and s for s in given):
        return tuple(given)
    raise RequestError(
        "choice: expected a list of strings of at least one character each, found "
        f'{argument!r:.100}: give for example ["yes", "no"]'
    )
