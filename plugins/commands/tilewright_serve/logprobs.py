"""Log-probabilities in the formats of OpenAI's two endpoints."""

from collections.abc import Iterable, Sequence
from typing import Any

from tilewright.text import Text
from tilewright.types import TokenLogprobs

LEAST = -9999.0
"""What is reported for less likely tokens, such as forbidden ones, as in vLLM's answers."""


def token_text(text: Text, token_id: int) -> str:
    """A token as it stands in a text; one with a part of a character as ``bytes:\\xe2\\x82``."""
    found = text.token_bytes(token_id)
    try:
        return found.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found)


class CompletionLogprobs:
    """Log-probabilities as completions have them; offsets go on from one call to the next."""

    def __init__(self, text: Text):
        self._text = text
        self._offset = 0

    def of(self, tokens: Iterable[tuple[int, TokenLogprobs | None]]) -> dict[str, Any]:
        """tokens: each id with its log-probabilities; None for a prompt's first token."""
        made: dict[str, list[Any]] = {
            "text_offset": [],
            "token_logprobs": [],
            "tokens": [],
            "top_logprobs": [],
        }
        for token_id, found in tokens:
            token = token_text(self._text, token_id)
            made["text_offset"].append(self._offset)
            made["tokens"].append(token)
            made["token_logprobs"].append(None if found is None else max(found.logprob, LEAST))
            made["top_logprobs"].append(None if found is None else self._top(token, found))
            self._offset += len(token)
        return made

    def _top(self, token: str, found: TokenLogprobs) -> dict[str, float]:
        """The token itself, then the most likely ones."""
        top = {token_text(self._text, i): max(logprob, LEAST) for i, logprob in found.top}
        return {token: max(found.logprob, LEAST), **top}


def chat_logprobs(text: Text, tokens: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """Log-probabilities as chat completions have them."""
    content = [
        {
            **_token(text, found.token_id, found.logprob),
            "top_logprobs": [_token(text, i, logprob) for i, logprob in found.top],
        }
        for found in tokens
    ]
    return {"content": content, "refusal": None}


def _token(text: Text, token_id: int, logprob: float) -> dict[str, Any]:
    return {
        "token": token_text(text, token_id),
        "logprob": max(logprob, LEAST),
        "bytes": list(text.token_bytes(token_id)),
    }
