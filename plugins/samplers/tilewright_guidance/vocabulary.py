"""The bytes that each token of a vocabulary adds to a text.

A token may hold a part of a character, so texts are compared as bytes. Decoders of the
SentencePiece kind drop the space before a text: there the first token adds other bytes than the
same token later.
"""

from collections.abc import Collection, Mapping, Sequence

from attrs import frozen

from tilewright.errors import RequestError
from tilewright.text import Text


@frozen(eq=False)
class Tokens:
    """Tokens and the bytes that they add to a text at some place."""

    bytes_of: Mapping[int, bytes]
    """By token id; without tokens that have no text, such as special ones."""
    ids: Mapping[bytes, Sequence[int]]
    """The tokens that add these bytes, ascending."""


@frozen(eq=False)
class Vocabulary:
    first: Tokens
    """At the beginning of a text. A token that is only a dropped space adds no bytes there."""
    later: Tokens
    """After another token; each adds at least one byte."""
    longest: int
    """The most bytes that a token adds."""


def read_vocabulary(text: Text, vocab_size: int, ends: Collection[int]) -> Vocabulary:
    """The tokens below vocab_size that have a text and are not among ends, which end a text.

    Raises RequestError if what a token adds depends on more than whether it is the first.
    """
    ids = [i for i in range(vocab_size) if i not in ends and text.has_text(i)]
    first = later = {i: text.token_bytes(i) for i in ids}
    parts: dict[int, bytes] = {}  # of characters, which decode only together
    if not text.is_byte_level:
        parts = {i: later[i] for i in ids if text.is_byte(i) and later[i] >= b"\x80"}
        first = {i: text.decode([i]).encode() for i in ids} | parts
    whole = [i for i in ids if i not in parts]
    expected = b"".join(later[i] if n else first[i] for n, i in enumerate(whole))
    if text.decode(whole) != expected.decode(errors="replace"):
        raise RequestError(
            "in this model's tokenizer the text of a token depends on the tokens beside it, so it "
            "is not known which tokens a text may consist of: use a model with another tokenizer"
        )
    ids = [i for i in ids if later[i]]
    longest = max((len(of[i]) for of in (first, later) for i in ids), default=0)
    return Vocabulary(_tokens(first, ids), _tokens(later, ids), longest)


def _tokens(bytes_of: Mapping[int, bytes], ids: Sequence[int]) -> Tokens:
    by_bytes: dict[bytes, list[int]] = {}
    for i in ids:
        by_bytes.setdefault(bytes_of[i], []).append(i)
    return Tokens({i: bytes_of[i] for i in ids}, by_bytes)
