"""Guesses the next tokens of a request from what followed the same tokens before.

This is prompt lookup decoding (Saxena, 2023, https://github.com/apoorvumang/prompt-lookup-decoding),
in transformers ``prompt_lookup_num_tokens``, in vLLM the speculator ``ngram``.
"""

from tilewright.request import Request

LONGEST, SHORTEST = 3, 2
"""How many of the last tokens are looked up; a longer match comes first."""
MOST_DRAFTS = 5
"""Drafts of one step. On text that repeats itself, more are accepted in a row; on other text, each
of them is a row of the step that is computed for nothing."""


def ngram_drafts(request: Request, most: int) -> list[int]:
    """What followed the last tokens of prompt and output when they occurred before, most recently.

    A copy that reaches the last token goes on from its own beginning, as text that repeats itself
    does. Returns at most ``most`` tokens and at most ``MOST_DRAFTS``; none if the last tokens are
    new. The work is proportional to the tokens that were added since the last call.
    """
    _index(request)
    known = request.num_known
    last = request.tokens(max(known - LONGEST, 0), known)
    for start in range(len(last) - SHORTEST + 1):
        found = request.ngrams.get(tuple(last[start:]))
        if found is not None:
            most = min(most, MOST_DRAFTS)
            copied = request.tokens(found, min(found + most, known))
            return [copied[i % len(copied)] for i in range(most)]
    return []


def _index(request: Request) -> None:
    """Note the position behind each n-gram that ends before the last token."""
    begin, known = max(request.num_indexed, SHORTEST), request.num_known
    first = max(begin - LONGEST, 0)
    tokens = request.tokens(first, known)
    for position in range(begin, known):
        at = position - first
        for n in range(SHORTEST, min(LONGEST, at) + 1):
            request.ngrams[tuple(tokens[at - n : at])] = position
    request.num_indexed = known
