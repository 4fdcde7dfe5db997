"""Tool calls in the text of an answer."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from attrs import frozen


@frozen
class Content:
    text: str


@frozen
class CallBegun:
    index: int
    name: str


@frozen
class CallArguments:
    index: int
    text: str


class ToolFormat:
    def grammar(
        self, tools: Sequence[Mapping[str, Any]], names: Sequence[str], parallel: bool
    ) -> str:
        raise NotImplementedError


def tool_format(template: str) -> ToolFormat | None:
    return None


class ToolCallSplitter:
    def __init__(self, format: ToolFormat, tools: Sequence[Mapping[str, Any]]):
        raise NotImplementedError

    def push(self, piece: str) -> Iterator[Content | CallBegun | CallArguments]:
        raise NotImplementedError

    def finish(self) -> Iterator[Content | CallBegun | CallArguments]:
        raise NotImplementedError
