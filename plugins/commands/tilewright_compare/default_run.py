"""The run of a comparison to which no prompts are given: as short as it can be to reach every path
of the candidate's code, as far as that declares them (``Tiles``)."""

from collections.abc import Sequence
from itertools import count
from math import lcm

from attrs import frozen

from tilewright.types import Tiles

NEW_TOKENS = 5
"""The first prompts to be done decode while the last ones run, and one more step has them all."""
PAGE_SIZE = 16
"""Page size to expect of an executor that declares none."""
LONGEST = 512
"""Largest number of tokens in a prompt: longer ones take long in a model of real size."""

TEXT = (
    "When in the Course of human events, it becomes necessary for one people to dissolve the "
    "political bands which have connected them with another, and to assume among the powers of the "
    "earth, the separate and equal station to which the Laws of Nature and of Nature's God entitle "
    "them, a decent respect to the opinions of mankind requires that they should declare the "
    "causes which impel them to the separation.\n\n"
    "We hold these truths to be self-evident, that all men are created equal, that they are "
    "endowed by their Creator with certain unalienable Rights, that among these are Life, Liberty, "
    "and the pursuit of Happiness. That to secure these rights, Governments are instituted among "
    "Men, deriving their just powers from the consent of the governed. That whenever any Form of "
    "Government becomes destructive of these ends, it is the Right of the People to alter or to "
    "abolish it, and to institute new Government, laying its foundation on such principles and "
    "organizing its powers in such form, as to them shall seem most likely to effect their Safety "
    "and Happiness."
)
"""What the bundled model has memorised, so that its perplexity on it is low."""


@frozen(kw_only=True)
class Plan:
    """What a comparison runs."""

    prompts: list[list[int]]
    """Token ids."""
    new_tokens: int
    chunk: int
    page_size: int | None
    """Page size of the candidate; None: the executor's choice."""


def default_run(
    tiles: Tiles | None,
    tokens: Sequence[int],
    positions: int,
    new_tokens: int | None = None,
    chunk: int | None = None,
) -> Plan:
    """Prompts that reach what a step can reach; shorter ones where the model has few positions.

    tokens: those of TEXT, at least one. new_tokens, chunk: the user's; None: chosen here.
    """
    declared = tiles or Tiles()
    page = declared.page_size or PAGE_SIZE
    keys, rows, batch = (
        size or 1 for size in (declared.kv_rows, declared.prefill_rows, declared.decode_rows)
    )
    new_tokens = new_tokens or NEW_TOKENS
    most = max(1, min(LONGEST, positions - new_tokens))
    others = _others(page, keys, batch, most)
    # Those that decode meanwhile must not be done before the last prompt is.
    least = max(page, rows, len(others) + 1, -(-sum(others) // max(1, new_tokens - 2)))
    wanted = chunk or _no_multiple(least + 3, (page, keys, rows))
    longest = min(max(2 * lcm(page, keys) + page // 2 + 1, wanted + 3), most)
    if not chunk:
        chunk = wanted if wanted < longest else max(len(others) + 1, longest // 2 + 1)
    lengths = [longest, *others]
    prompts, first = [], 0
    for length in lengths:
        prompts.append([tokens[i % len(tokens)] for i in range(first, first + length)])
        first += length
    return Plan(prompts=prompts, new_tokens=new_tokens, chunk=chunk, page_size=declared.page_size)


def _others(page: int, keys: int, batch: int, most: int) -> list[int]:
    """Lengths of the prompts after the longest one, of at most so many tokens each: one that fills
    a page when it decodes, and goes on to the next; one that ends with a page and a tile of keys;
    and short ones, for one sequence more than a batch."""
    unit = lcm(page, keys)
    fills = next((n - 1 for n in range(2 * unit, 0, -page) if 1 < n <= most), most)
    short = [min(1 + i % 4, most) for i in range(max(2, batch - 2))]
    return [fills, min(unit, most), *short]


def _no_multiple(least: int, sizes: Sequence[int]) -> int:
    """A number of tokens that is not a multiple of a page or a tile, so that what follows begins
    inside one."""
    sizes = [size for size in sizes if size > 1]
    return next(n for n in count(least) if all(n % size for size in sizes))
