"""Steps over pages of a KV cache, as an engine gives them to an executor."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from attrs import define, evolve, field
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tilewright.kv_cache import KvCacheManager
from tilewright.types import ExecutorLimits, StepBatch

Tokens = Mapping[str, Sequence[int]]
"""New tokens, keyed by the name of their sequence."""


def by_slot(storage: Tensor, row_order: str) -> Tensor:
    """A view [pages, page_size, num_kv_heads, head_dim] of a cache tensor in either order."""
    return storage if row_order == "NHD" else storage.transpose(1, 2)


@define
class Sequences:
    """Sequences that grow, and the pages that they hold. They do not hold the storage."""

    page_size: int
    total_pages: int
    shuffled: bool = False
    """Hand out pages in random order."""
    lengths: dict[str, int] = field(factory=dict)
    prompts: dict[str, int] = field(factory=dict)
    """Tokens of each sequence's whole prompt: by default, those that begin it."""
    _pages: KvCacheManager = field(init=False)
    _ended: list[str] = field(factory=list, init=False)
    """Sequences that were freed since the last batch."""

    def __attrs_post_init__(self) -> None:
        self._pages = KvCacheManager(self.total_pages, self.page_size)
        if self.shuffled:
            for page in range(self.total_pages):
                self._pages.allocate(str(page), [0], max_cached=0)
                self._pages.extend(str(page), 1)
            random = torch.Generator().manual_seed(3)
            for page in torch.randperm(self.total_pages, generator=random).tolist():
                self._pages.free(str(page))

    def begin(self, name: str, tokens: Sequence[int]) -> Sequence[int]:
        """Begin a sequence with the known pages of its tokens; returns the tokens left to run."""
        self.lengths[name] = self._pages.allocate(name, tokens, max_cached=len(tokens))
        self.prompts[name] = len(tokens)
        return tokens[self.lengths[name] :]

    def commit(self, name: str, tokens: Sequence[int]) -> None:
        """Make the full pages of a sequence's first tokens known, so that others can hold them."""
        self._pages.commit(name, tokens)

    def truncate(self, name: str, length: int) -> None:
        """Take a sequence back to its first tokens."""
        self._pages.truncate(name, length)
        self.lengths[name] = length

    def batch(self, tokens: Tokens, drafting: bool = False) -> StepBatch:
        """The step that runs new tokens, with the logits of all of them.

        drafting: each sequence's tokens behind its first are guesses, which the step checks.
        """
        ids: list[int] = []
        positions: list[int] = []
        slots, tables, starts = [], [], [0]
        for name, new in tokens.items():
            if name not in self.lengths:
                self.lengths[name] = self._pages.allocate(name, new, max_cached=0)
            start = self.lengths[name]
            self.lengths[name] = stop = start + len(new)
            self.prompts.setdefault(name, stop)
            self._pages.extend(name, stop)
            ids += new
            positions += range(start, stop)
            slots.append(self._slots(name, start, stop))
            tables.append(torch.tensor(self._pages.pages(name), dtype=torch.int32))
            starts.append(len(ids))
        ended, self._ended = tuple(self._ended), []
        starts_at = torch.tensor(starts, dtype=torch.int32)
        return StepBatch(
            token_ids=torch.tensor(ids, dtype=torch.int64),
            positions=torch.tensor(positions, dtype=torch.int32),
            slot_mapping=torch.cat(slots),
            block_table=pad_sequence(tables, batch_first=True, padding_value=-1),
            context_lens=torch.tensor([self.lengths[n] for n in tokens], dtype=torch.int32),
            query_starts=starts_at,
            prompt_lens=torch.tensor([self.prompts[n] for n in tokens], dtype=torch.int32),
            num_drafts=starts_at.diff() - 1 if drafting else torch.zeros_like(starts_at[1:]),
            logits_rows=torch.arange(len(ids)),
            request_ids=tuple(tokens),
            ended_request_ids=ended,
        )

    def _slots(self, name: str, start: int, stop: int) -> Tensor:
        """Slots of positions start to stop, [stop - start] int32."""
        positions = torch.arange(start, stop)
        pages = torch.tensor(self._pages.pages(name))[positions // self.page_size]
        return (pages * self.page_size + positions % self.page_size).int()

    def within(self, tokens: Tokens, limits: ExecutorLimits) -> Iterator[Tokens]:
        """The new tokens in as many steps as an executor's limits require.

        A sequence with context and one new token counts as decoding.
        """
        for name, new in tokens.items():
            self.prompts.setdefault(name, self.lengths.get(name, 0) + len(new))
        if not limits.mixed:
            decoding = [n for n, new in tokens.items() if len(new) == 1 and self.lengths.get(n)]
            prompts = {name: new for name, new in tokens.items() if name not in decoding}
            if decoding and prompts:
                yield from self.within({name: tokens[name] for name in decoding}, limits)
                tokens = prompts
        most = limits.max_batch_size or len(tokens)
        left = {name: list(new) for name, new in tokens.items()}
        while left:
            room = limits.max_batch_tokens or sum(map(len, left.values()))
            step: dict[str, list[int]] = {}
            for name in list(left)[:most]:
                if room:
                    step[name], rest = left[name][:room], left[name][room:]
                    room -= len(step[name])
                    left[name] = rest
            left = {name: new for name, new in left.items() if new}
            yield step

    def slots(self, names: Sequence[str]) -> Tensor:
        """All slots of some sequences, one sequence after the other, int64."""
        of = [self._slots(n, 0, self.lengths[n]) for n in names]
        return torch.cat(of).long() if of else torch.zeros(0, dtype=torch.int64)

    def free(self, name: str) -> None:
        self._pages.free(name)
        del self.lengths[name], self.prompts[name]
        self._ended.append(name)


def copied(batch: StepBatch) -> StepBatch:
    """A batch with copied tensors."""
    copies: dict[str, Any] = {name: tensor.clone() for name, tensor in tensors(batch).items()}
    return evolve(batch, **copies)


def tensors(batch: StepBatch) -> dict[str, Tensor]:
    """The tensors of a batch, by name."""
    return {
        name: getattr(batch, name)
        for name in (
            "token_ids",
            "positions",
            "slot_mapping",
            "block_table",
            "context_lens",
            "query_starts",
            "logits_rows",
            "num_drafts",
            "token_source",
            "prompt_lens",
        )
    }
