"""Texts that are one of a request's choices.

A request gives its choices as a list of texts, on the command line separated by commas. In each
step only the tokens are allowed with which one of them goes on, or that end the text after one.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from attrs import define, field

from tilewright import hookimpl
from tilewright.errors import RequestError
from tilewright.types import LogitsEdits, LogitsProcessor, ModelConfig, PluginInfo, TextAssets

if TYPE_CHECKING:
    from tokenizers import Tokenizer

tilewright_api = 2


@hookimpl
def plugin_info() -> PluginInfo:
    return PluginInfo(
        summary="texts that are one of a list of choices",
        limits={"argument": "a list of texts, or one text in which commas separate them"},
    )


@hookimpl
def create_logits_processor(model_config: ModelConfig, text: TextAssets) -> LogitsProcessor:
    return Choices(text.tokenizer, model_config.vocab_size, model_config.eos_token_ids)


@hookimpl
def sample_argument() -> list[str]:
    return ["yes", "yesterday", "no"]


@define
class State:
    paths: list[list[int]]
    """Token ids of each choice."""
    accepted: list[int] = field(factory=list)


class Choices:
    """A ``LogitsProcessor`` (see tilewright.types)."""

    def __init__(self, tokenizer: "Tokenizer", vocab_size: int, eos_token_ids: Sequence[int]):
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.eos_token_ids = eos_token_ids

    def begin(self, request_id: str, argument: Any, prompt_token_ids: Sequence[int]) -> State:
        choices = argument.split(",") if isinstance(argument, str) else argument
        if not (
            isinstance(choices, Sequence)
            and choices
            and all(isinstance(choice, str) and choice for choice in choices)
        ):
            raise RequestError(
                f"my-plugin: expected texts to choose from, found {argument!r:.100}: give a list "
                'such as ["yes", "no"]'
            )
        if not self.eos_token_ids:
            raise RequestError(
                "my-plugin: the model has no token that ends a text, so a choice would not end"
            )
        encoded = self.tokenizer.encode_batch(list(choices), add_special_tokens=False)
        return State([encoding.ids for encoding in encoded])

    def edits(self, rows: Sequence[tuple[int, State]]) -> LogitsEdits:
        import torch

        allowed = torch.zeros(len(rows), -(-self.vocab_size // 32) * 32, dtype=torch.int64)
        for mask, (_, state) in zip(allowed, rows, strict=True):
            mask[self.allowed(state)] = 1
        bits = allowed.view(len(rows), -1, 32) << torch.arange(32)
        return LogitsEdits(
            mask_rows=torch.tensor([row for row, _ in rows]),
            masks=bits.sum(-1).to(torch.int32),  # bit 31 is the sign
        )

    def allowed(self, state: State) -> list[int]:
        """The tokens with which a choice goes on; those that end the text if there are none."""
        done = len(state.accepted)
        found: list[int] = []
        for path in state.paths:
            if path[:done] == state.accepted:
                found += path[done : done + 1] or self.eos_token_ids
        return found or list(self.eos_token_ids)

    def accept(self, state: State, token_id: int) -> None:
        state.accepted.append(token_id)

    def snapshot(self, state: State) -> int:
        return len(state.accepted)

    def restore(self, state: State, snapshot: int) -> None:
        del state.accepted[snapshot:]

    def end(self, state: State) -> None:
        """A state is freed with its request."""
