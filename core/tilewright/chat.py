"""Conversations as prompts, and the thinking in their answers."""

from collections.abc import Mapping, Sequence
from typing import Any

from attrs import field, frozen

Message = Mapping[str, Any]


@frozen
class Chat:
    """A conversation, which a model's chat template makes a prompt of."""

    messages: Sequence[Message]
    """Mappings with ``role``, ``content`` and whatever else the template reads."""
    template_options: Mapping[str, Any] = field(factory=dict)
    """Variables of the template, such as ``{"enable_thinking": False}``."""
    tools: Sequence[Mapping[str, Any]] | None = None
    """Descriptions of functions that the model may call, as JSON schemas in OpenAI's form."""
    continue_last: bool = False
    """Continue the last message, which is the assistant's, in place of answering it."""


class ThinkingSplitter:
    """Splits the text of an answer, as it comes, into the model's thinking and the answer proper.

    The thinking is what ``<think>`` and ``</think>`` enclose at the beginning of the text. The tags
    are part of neither, nor are line breaks and spaces beside them.
    """

    def __init__(self, opened: bool = False):
        """opened: the text begins within the thinking (``Text.opens_thinking``)."""
        self._opened = opened

    def push(self, piece: str) -> tuple[str, str]:
        """Add a piece of text. Returns the thinking and the answer that are now certain."""
        raise NotImplementedError

    def finish(self) -> tuple[str, str]:
        """The rest of the thinking and of the answer; nothing follows."""
        raise NotImplementedError
