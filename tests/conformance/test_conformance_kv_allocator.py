"""The suite of KV allocators finds each of these broken ones, by the test that is
meant for it."""

from array import array
from bisect import insort
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any
from zlib import crc32

import plugin_distributions as dists
import pytest
from attrs import field, frozen
from conformance import Fault, missed, own_tests, run
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from tilewright import hookimpl, plugins
from tilewright.errors import OutOfPagesError
from tilewright.kv_cache import KvCacheManager
from tilewright.types import KvAllocator, PluginInfo
from tilewright_testing import KvAllocatorSuite
from tilewright_testing.kv_allocator import AllocatorMachine
from tilewright_testing.verify import verify


class Allocators:
    """A plugin that makes allocators in some way."""

    tilewright_api = 2

    def __init__(self, make: Callable[[int, int], KvAllocator]):
        self.make = make

    @hookimpl
    def plugin_info(self) -> PluginInfo:
        return PluginInfo(summary="fixed-size pages")

    @hookimpl
    def create_kv_allocator(self, num_pages: int, page_size: int) -> KvAllocator:
        return self.make(num_pages, page_size)


# --- broken in what requests hold -----------------------------------------------------------------


class Unchecked(KvCacheManager):
    """The base of those that check_integrity would find."""

    def check_integrity(self) -> None:
        pass


class TakesAPageAtOnce(KvCacheManager):
    def allocate(self, request_id: str, token_ids: Sequence[int], **how: Any) -> int:
        found = super().allocate(request_id, token_ids, **how)
        self.extend(request_id, found + 1)
        return found


class ReplacesARequest(KvCacheManager):
    def allocate(self, request_id: str, token_ids: Sequence[int], **how: Any) -> int:
        if request_id in self._held:
            self.free(request_id)
        return super().allocate(request_id, token_ids, **how)


class OverlooksRequestsWithoutPages(KvCacheManager):
    def allocate(self, request_id: str, token_ids: Sequence[int], **how: Any) -> int:
        if request_id in self._held and not self._held[request_id].pages:
            self.free(request_id)
        return super().allocate(request_id, token_ids, **how)


class BeginsWithoutTokens(KvCacheManager):
    def allocate(self, request_id: str, token_ids: Sequence[int], **how: Any) -> int:
        return super().allocate(request_id, token_ids if len(token_ids) else [0], **how)


class ExtendsByTokens(KvCacheManager):
    def extend(self, request_id: str, to_tokens: int) -> None:
        held = len(self._held[request_id].pages) * self.page_size
        super().extend(request_id, held + to_tokens)


class MovesWhenExtended(KvCacheManager):
    def extend(self, request_id: str, to_tokens: int) -> None:
        super().extend(request_id, to_tokens)
        self._held[request_id].pages.reverse()


class ShrinksWhenExtendedToLess(KvCacheManager):
    def extend(self, request_id: str, to_tokens: int) -> None:
        super().extend(request_id, to_tokens)
        held = self._held[request_id]
        if to_tokens >= held.committed * self.page_size:
            self.truncate(request_id, to_tokens)


class TakesPagesBeforeItRefuses(KvCacheManager):
    def extend(self, request_id: str, to_tokens: int) -> None:
        try:
            super().extend(request_id, to_tokens)
        except OutOfPagesError:
            can = len(self._held[request_id].pages) + self.free_pages + self.evictable_pages
            super().extend(request_id, can * self.page_size)
            raise


class ExtendsUnknownRequests(KvCacheManager):
    def extend(self, request_id: str, to_tokens: int) -> None:
        if request_id not in self._held:
            self.allocate(request_id, [0], max_cached=0)
        super().extend(request_id, to_tokens)


class SaysItInALongText(KvCacheManager):
    def extend(self, request_id: str, to_tokens: int) -> None:
        try:
            super().extend(request_id, to_tokens)
        except OutOfPagesError as error:
            raise OutOfPagesError(f"out of pages:\n{error}") from error


class HandsOutAPageTwice(Unchecked):
    def extend(self, request_id: str, to_tokens: int) -> None:
        last = self._free[-1:]
        super().extend(request_id, to_tokens)
        self._free.extend(last)


class KeepsTruncatedPages(KvCacheManager):
    def truncate(self, request_id: str, to_tokens: int) -> None:
        pages = list(self._held[request_id].pages)
        super().truncate(request_id, to_tokens)
        self.extend(request_id, len(pages) * self.page_size)


class TruncatesToFullPages(KvCacheManager):
    def truncate(self, request_id: str, to_tokens: int) -> None:
        super().truncate(request_id, to_tokens // self.page_size * self.page_size)


class TruncatesTheFirst(Unchecked):
    def truncate(self, request_id: str, to_tokens: int) -> None:
        held = self._held[request_id]
        if not held.committed:
            held.pages.reverse()
        super().truncate(request_id, to_tokens)


class LosesTruncatedPages(Unchecked):
    def truncate(self, request_id: str, to_tokens: int) -> None:
        free = self._free[:]
        super().truncate(request_id, to_tokens)
        self._free = free


class GivesTruncatedPagesAgain(Unchecked):
    def truncate(self, request_id: str, to_tokens: int) -> None:
        self.before = list(self._held[request_id].pages)
        super().truncate(request_id, to_tokens)

    def extend(self, request_id: str, to_tokens: int) -> None:
        super().extend(request_id, to_tokens)
        pages, before = self._held[request_id].pages, getattr(self, "before", [])
        if pages and pages[0] in before[:1]:
            for number in range(min(len(pages), len(before))):
                pages[number] = before[number]


class ForgetsPages(Unchecked):
    def free(self, request_id: str) -> None:
        super().free(request_id)
        if self.free_pages > 2:
            self._references[self._free.pop()] = 1


class FreesTwice(KvCacheManager):
    def free(self, request_id: str) -> None:
        if request_id in self._held:
            super().free(request_id)


class CommitsToUnknownRequests(KvCacheManager):
    def commit(self, request_id: str, token_ids: Sequence[int]) -> None:
        if request_id in self._held:
            super().commit(request_id, token_ids)


SHARED: dict[str, Any] = {}


class GlobalRequests(Unchecked):
    """Its requests are those of all allocators."""

    def __init__(self, total_pages: int, page_size: int):
        super().__init__(total_pages, page_size)
        SHARED.clear()
        self._held = SHARED


KNOWN: dict[Any, Any] = {}


class GlobalContents(Unchecked):
    """It knows the pages of all allocators."""

    def __init__(self, total_pages: int, page_size: int):
        super().__init__(total_pages, page_size)
        KNOWN.clear()
        self._known = KNOWN


class CutsCommits(KvCacheManager):
    def commit(self, request_id: str, token_ids: Sequence[int]) -> None:
        room = len(self._held[request_id].pages) * self.page_size
        super().commit(request_id, token_ids[:room])


class CommitsBeforeItRefuses(KvCacheManager):
    def commit(self, request_id: str, token_ids: Sequence[int]) -> None:
        room = len(self._held[request_id].pages) * self.page_size
        super().commit(request_id, token_ids[:room])
        super().commit(request_id, token_ids)


# --- broken in what is known ----------------------------------------------------------------------


class FindsOnlyFreedPages(KvCacheManager):
    def allocate(
        self, request_id: str, token_ids: Sequence[int], *, max_cached: int, salt: bytes = b""
    ) -> int:
        super().allocate("try", token_ids, max_cached=max_cached, salt=salt)
        pages = list(self.pages("try"))
        self.free("try")
        free = [page in self._evictable for page in pages]
        found = (free.index(False) if False in free else len(free)) * self.page_size
        return super().allocate(request_id, token_ids, max_cached=found, salt=salt)


class FindsOnlyHeldPages(KvCacheManager):
    def free(self, request_id: str) -> None:
        super().free(request_id)
        while self._evictable:
            self._free.append(self._evict())


class LeavesFoundPagesEvictable(Unchecked):
    def allocate(self, request_id: str, token_ids: Sequence[int], **how: Any) -> int:
        before = self._evictable.copy()
        found = super().allocate(request_id, token_ids, **how)
        self._evictable = before
        return found


class IgnoresMaxCached(KvCacheManager):
    def allocate(
        self, request_id: str, token_ids: Sequence[int], *, max_cached: int, salt: bytes = b""
    ) -> int:
        return super().allocate(request_id, token_ids, max_cached=10**9, salt=salt)


class RoundsMaxCachedUp(KvCacheManager):
    def allocate(
        self, request_id: str, token_ids: Sequence[int], *, max_cached: int, salt: bytes = b""
    ) -> int:
        more = max_cached and max_cached + self.page_size - 1
        return super().allocate(request_id, token_ids, max_cached=more, salt=salt)


class ReturnsMaxCached(KvCacheManager):
    def allocate(
        self, request_id: str, token_ids: Sequence[int], *, max_cached: int, salt: bytes = b""
    ) -> int:
        found = super().allocate(request_id, token_ids, max_cached=10**9, salt=salt)
        return min(found, max_cached)


class FindsEveryToken(KvCacheManager):
    def allocate(
        self, request_id: str, token_ids: Sequence[int], *, max_cached: int, salt: bytes = b""
    ) -> int:
        if not len(token_ids):
            raise ValueError("no tokens")
        more = [*token_ids, 0]
        return super().allocate(
            request_id, more, max_cached=min(max_cached, len(token_ids)), salt=salt
        )


class CommitsPartlyFullPages(KvCacheManager):
    def commit(self, request_id: str, token_ids: Sequence[int]) -> None:
        more = [*token_ids, *[0] * (-len(token_ids) % self.page_size)]
        super().commit(request_id, more if len(token_ids) else token_ids)


class CommitsWhenExtended(KvCacheManager):
    def allocate(self, request_id: str, token_ids: Sequence[int], **how: Any) -> int:
        found = super().allocate(request_id, token_ids, **how)
        self.begun = request_id, token_ids
        return found

    def extend(self, request_id: str, to_tokens: int) -> None:
        super().extend(request_id, to_tokens)
        if request_id == self.begun[0] and to_tokens == len(self.begun[1]):
            self.commit(*self.begun)


class ReadsAllTokens(KvCacheManager):
    def commit(self, request_id: str, token_ids: Sequence[int]) -> None:
        super().commit(request_id, list(token_ids))


class CommitsOnce(KvCacheManager):
    def commit(self, request_id: str, token_ids: Sequence[int]) -> None:
        if not self._held[request_id].committed:
            super().commit(request_id, token_ids)


class CommitsNothingBehindFoundPages(KvCacheManager):
    def commit(self, request_id: str, token_ids: Sequence[int]) -> None:
        held = self._held[request_id]
        if all(self._references[page] == 1 for page in held.pages):
            super().commit(request_id, token_ids)


class KeepsTheCallersList(KvCacheManager):
    def allocate(self, request_id: str, token_ids: Sequence[int], **how: Any) -> int:
        found = super().allocate(request_id, token_ids, **how)
        self.begun = token_ids
        return found

    def commit(self, request_id: str, token_ids: Sequence[int]) -> None:
        same = len(token_ids) == len(self.begun)
        super().commit(request_id, self.begun if same else token_ids)


class KeepsPartlyFullPages(KvCacheManager):
    """Tokens of a partly full page are kept from the commit that brought them."""

    def __init__(self, total_pages: int, page_size: int):
        super().__init__(total_pages, page_size)
        self.committed: dict[str, list[int]] = {}

    def commit(self, request_id: str, token_ids: Sequence[int]) -> None:
        kept = self.committed.setdefault(request_id, [])
        kept += token_ids[len(kept) :]
        super().commit(request_id, kept[: len(token_ids)])


class HasASaltOfItsOwn(KvCacheManager):
    def allocate(
        self, request_id: str, token_ids: Sequence[int], *, max_cached: int, salt: bytes = b"own"
    ) -> int:
        return super().allocate(request_id, token_ids, max_cached=max_cached, salt=salt)


Key = tuple[bytes, tuple[bytes, ...]]
"""A salt, and the tokens of the pages up to the one in question."""


class Known(dict[Any, Any]):
    """Contents under another key, that may be the same for different ones."""

    def __init__(self, of: Callable[[Key], Any]):
        super().__init__()
        self.of = of

    def _changed(self, key: Any) -> Any:
        before, tokens = key
        pages = [tokens]
        while not isinstance(before, bytes):
            before, tokens = before.key
            pages.insert(0, tokens)
        return self.of((before, tuple(pages)))

    def get(self, key: Any, default: Any = None) -> Any:
        return super().get(self._changed(key), default)

    def __setitem__(self, key: Any, content: Any) -> None:
        super().__setitem__(self._changed(key), content)

    def __delitem__(self, key: Any) -> None:
        super().__delitem__(self._changed(key))


def known_by(of: Callable[[Key], Any]) -> type[KvCacheManager]:
    """One that finds a page by this of its content."""

    class Mistaken(Unchecked):
        def __init__(self, total_pages: int, page_size: int):
            super().__init__(total_pages, page_size)
            self._known = Known(of)

    return Mistaken


def known_by_page(of: Callable[[Sequence[int]], bytes]) -> type[KvCacheManager]:
    """One that finds a page by this of its tokens."""

    class Mistaken(KvCacheManager):
        def _tokens(self, token_ids: Sequence[int], index: int) -> bytes:
            start = index * self.page_size
            return of(token_ids[start : start + self.page_size])

    return Mistaken


def in_64_bits(key: Key) -> bytes:
    salt, pages = key
    tokens = memoryview(b"".join(pages)).cast("i")
    return salt + b"".join(int(token).to_bytes(8, "little") for token in tokens)


def digits(token_ids: Sequence[int]) -> bytes:
    return "".join(map(str, token_ids)).encode()


def float32(token_ids: Sequence[int]) -> bytes:
    return array("f", token_ids).tobytes()


def without_leading_zeros(key: Key) -> Any:
    salt, pages = key
    return salt, b"".join(pages).lstrip(b"\0") or pages[-1]


MISTAKEN: dict[str, type[KvCacheManager]] = {
    "in another order": known_by_page(lambda tokens: repr(sorted(tokens)).encode()),
    "with another last token": known_by_page(lambda tokens: repr(tokens[:-1]).encode()),
    "with another first token": known_by_page(lambda tokens: repr(tokens[1:]).encode()),
    "equal modulo 2**8": known_by_page(lambda tokens: bytes(t % 2**8 for t in tokens)),
    "equal modulo 2**16": known_by_page(lambda tokens: repr([t % 2**16 for t in tokens]).encode()),
    "equal as float32": known_by_page(float32),
    "with equal digits": known_by_page(digits),
    "of zeros, but more": known_by(without_leading_zeros),
    "at another position": known_by(lambda key: (key[0], key[1][-1])),
    "behind the same page again": known_by(lambda key: (key[0], frozenset(key[1]))),
    "behind another page": known_by(lambda key: (key[0], len(key[1]), key[1][-1])),
    "behind another page, two pages before": known_by(
        lambda key: (key[0], len(key[1]), key[1][-2:])
    ),
    "of another salt": known_by(lambda key: (bool(key[0]), key[1])),
    "without a salt": known_by(lambda key: key[1]),
    "of a longer salt": known_by(lambda key: (key[0].rstrip(b"\0"), key[1])),
    "behind a salt like their tokens": known_by(lambda key: key[0] + b"".join(key[1])),
    "behind a salt like their tokens, in 64 bits": known_by(in_64_bits),
    "behind another page of another salt": known_by(
        lambda key: (key[0] if len(key[1]) == 1 else b"", key[1])
    ),
}
"""What each of the suite's cases finds."""


# --- broken in shared pages -----------------------------------------------------------------------


class FreesSharedPages(Unchecked):
    def free(self, request_id: str) -> None:
        for page in self._held[request_id].pages:
            self._references[page] = 1
        super().free(request_id)


class TakesHeldPages(Unchecked):
    """Known pages can be taken as soon as one of their holders has freed them."""

    def free(self, request_id: str) -> None:
        pages = list(self._held[request_id].pages)
        super().free(request_id)
        self._evictable.update(dict.fromkeys(page for page in pages if page in self._content))


class ForgetsSharedPages(Unchecked):
    def free(self, request_id: str) -> None:
        for page in self._held[request_id].pages:
            if self._references[page] > 1 and page in self._content:
                del self._known[self._content.pop(page).key]
        super().free(request_id)


class SharesThePartlyFullPage(Unchecked):
    def allocate(self, request_id: str, token_ids: Sequence[int], **how: Any) -> int:
        found = super().allocate(request_id, token_ids, **how)
        held = self._held[request_id]
        for other in self._held.values():
            more = other.pages[other.committed : other.committed + 1]
            if found and other is not held and other.before is held.before and more:
                held.pages.extend(more)
                self._references[more[0]] += 1
                break
        return found


class TruncatesFoundPages(Unchecked):
    def truncate(self, request_id: str, to_tokens: int) -> None:
        held = self._held[request_id]
        if any(self._references[page] > 1 for page in held.pages):
            held.committed = min(held.committed, -(-to_tokens // self.page_size))
        super().truncate(request_id, to_tokens)


class TruncatesCommittedPages(Unchecked):
    def truncate(self, request_id: str, to_tokens: int) -> None:
        held = self._held[request_id]
        if to_tokens >= 2 * self.page_size:
            held.committed = min(held.committed, to_tokens // self.page_size)
        super().truncate(request_id, to_tokens)


class KeepsCommittedTokens(KvCacheManager):
    """It counts the tokens of a partly full page as committed, too."""

    def __init__(self, total_pages: int, page_size: int):
        super().__init__(total_pages, page_size)
        self.num_committed: dict[str, int] = {}

    def commit(self, request_id: str, token_ids: Sequence[int]) -> None:
        super().commit(request_id, token_ids)
        self.num_committed[request_id] = len(token_ids)

    def truncate(self, request_id: str, to_tokens: int) -> None:
        if to_tokens < self.num_committed.get(request_id, 0):
            raise ValueError(f"{to_tokens} tokens are fewer than are committed")
        super().truncate(request_id, to_tokens)


class FindsTheLastCommitted(KvCacheManager):
    def commit(self, request_id: str, token_ids: Sequence[int]) -> None:
        super().commit(request_id, token_ids)
        for page in self._held[request_id].pages:
            if page in self._content:
                self._content[page].pages.sort(key=lambda other: other != page)


class MergesPages(Unchecked):
    def commit(self, request_id: str, token_ids: Sequence[int]) -> None:
        super().commit(request_id, token_ids)
        held = self._held[request_id]
        for number in range(held.committed):
            held.pages[number] = self._content[held.pages[number]].pages[0]


class KnowsOnlyTheFirst(Unchecked):
    def commit(self, request_id: str, token_ids: Sequence[int]) -> None:
        super().commit(request_id, token_ids)
        for page in self._held[request_id].pages:
            if page in self._content and self._content[page].pages[0] != page:
                self._content.pop(page).pages.remove(page)


class ForgetsAllPagesOfAContent(Unchecked):
    def _evict(self) -> int:
        content = self._content[next(iter(self._evictable))]
        page = super()._evict()
        self._known.pop(content.key, None)
        return page


# --- broken in taking known pages -----------------------------------------------------------------


class TakesKnownPagesFirst(KvCacheManager):
    def extend(self, request_id: str, to_tokens: int) -> None:
        missing = -(-to_tokens // self.page_size) - len(self._held[request_id].pages)
        if missing <= self.free_pages:
            for _ in range(min(missing, self.evictable_pages)):
                self._free.append(self._evict())
        super().extend(request_id, to_tokens)


class TakesNoKnownPages(KvCacheManager):
    def extend(self, request_id: str, to_tokens: int) -> None:
        missing = -(-to_tokens // self.page_size) - len(self._held[request_id].pages)
        if missing > self.free_pages:
            raise OutOfPagesError(f"{missing} pages are needed, {self.free_pages} are free")
        super().extend(request_id, to_tokens)


class ForgetsPagesWhenItRefuses(Unchecked):
    def extend(self, request_id: str, to_tokens: int) -> None:
        try:
            super().extend(request_id, to_tokens)
        except OutOfPagesError:
            for page in list(self._evictable):
                content = self._content[page]
                del self._known[content.key]
                self._known[b"forgotten", bytes(page)] = content
            raise


class KnowsTakenPages(Unchecked):
    def _evict(self) -> int:
        page, _ = self._evictable.popitem(last=False)
        return page


class TakesTheFirstOfARequest(Unchecked):
    def _release(self, pages: Sequence[int]) -> None:
        super()._release(list(reversed(pages)))


class TakesTheLastFreed(Unchecked):
    def _evict(self) -> int:
        self._evictable.move_to_end(next(reversed(self._evictable)), last=False)
        return super()._evict()


class TakesTheFirstCommitted(Unchecked):
    """A page that was found again keeps its place."""

    def __init__(self, total_pages: int, page_size: int):
        super().__init__(total_pages, page_size)
        self.first_freed: dict[int, int] = {}

    def _release(self, pages: Sequence[int]) -> None:
        super()._release(pages)
        for page in self._evictable:
            self.first_freed.setdefault(page, len(self.first_freed))

    def _evict(self) -> int:
        oldest = min(self._evictable, key=lambda page: self.first_freed[page])
        self._evictable.move_to_end(oldest, last=False)
        return super()._evict()


# --- broken in cost and integrity -----------------------------------------------------------------


class LooksAtEveryPage(KvCacheManager):
    def extend(self, request_id: str, to_tokens: int) -> None:
        assert all(references >= 0 for references in self._references)
        super().extend(request_id, to_tokens)


class SortsItsPages(KvCacheManager):
    def extend(self, request_id: str, to_tokens: int) -> None:
        self._free = type(self._free)("i", sorted(self._free, reverse=True))
        super().extend(request_id, to_tokens)


class CopiesItsKnownPages(KvCacheManager):
    def allocate(self, request_id: str, token_ids: Sequence[int], **how: Any) -> int:
        self.seen = set(self._evictable)
        return super().allocate(request_id, token_ids, **how)


class ChecksNothing(KvCacheManager):
    def check_integrity(self) -> None:
        pass


class ChecksOnlyTheKnown(KvCacheManager):
    def check_integrity(self) -> None:
        known = {page for content in self._known.values() for page in content.pages}
        assert known == self._content.keys()


class DislikesSharing(KvCacheManager):
    def check_integrity(self) -> None:
        super().check_integrity()
        assert max(self._references) <= 1, "a page has two holders"


MODEL = "test_random_calls_agree_with_a_reference_model"
PAGES = "test_it_has_the_requested_pages_and_all_are_free"
BEGIN = "test_a_refused_allocate_changes_nothing"
EXTEND = "test_extend_gives_pages_for_a_requests_first_tokens"
NO_ROOM = "test_a_refused_extend_changes_nothing"
TRUNCATE = "test_truncate_releases_the_pages_behind_the_tokens"
UNKNOWN = "test_unknown_and_freed_requests_are_refused"
ALONE = "test_two_allocators_are_independent"
FOUND = "test_committed_pages_are_found"
MOST = "test_at_most_max_cached_tokens_are_found"
ADD_UP = "test_commits_add_up_and_read_no_token_twice"
EQUAL = "test_when_all_hashes_are_equal_tokens_are_not_taken_for_others"
OUTLIVES = "test_a_shared_page_outlives_each_of_its_holders"
KEEPS = "test_truncate_keeps_what_was_found_or_committed"
TWICE = "test_of_pages_with_one_content_the_first_committed_is_found"
ALL_KNOWN = "test_all_pages_with_one_content_stay_known"
TAKEN = "test_known_pages_are_taken_only_when_none_is_free"
OLDEST = "test_pages_that_were_freed_first_are_taken_first"
COST = "test_the_cost_of_a_call_does_not_grow_with_the_cache"
INTEGRITY = "test_check_integrity_detects_corruption"


def rounded_up(num_pages: int, page_size: int) -> KvCacheManager:
    return KvCacheManager(-(-num_pages // 8) * 8, page_size)


def of_sixteen(num_pages: int, page_size: int) -> KvCacheManager:
    return KvCacheManager(num_pages, 16)


BROKEN: list[tuple[str, Callable[[int, int], KvAllocator], str, str]] = [
    ("rounds the number of pages up", rounded_up, PAGES, "requested 1 and 1, found 8"),
    ("has its own page size", of_sixteen, PAGES, "requested 1 and 1, found 1 and 16"),
    ("takes a page at once", TakesAPageAtOnce, "test_allocate_takes_no_page", "known pages only"),
    ("replaces a request", ReplacesARequest, BEGIN, "that exists must raise ValueError"),
    (
        "overlooks requests without pages",
        OverlooksRequestsWithoutPages,
        BEGIN,
        "without pages must raise ValueError",
    ),
    ("begins without tokens", BeginsWithoutTokens, BEGIN, "without tokens must raise ValueError"),
    ("extends by tokens", ExtendsByTokens, EXTEND, "1 tokens need 1 pages of 4, found|2 tokens"),
    ("moves pages when it extends", MovesWhenExtended, EXTEND, "must keep the pages"),
    (
        "shrinks when it extends to less",
        ShrinksWhenExtendedToLess,
        "test_extend_to_what_is_there_or_less_changes_nothing",
        "extend to 4 changed the state",
    ),
    ("takes pages before it refuses", TakesPagesBeforeItRefuses, NO_ROOM, "changed the state"),
    ("extends unknown requests", ExtendsUnknownRequests, NO_ROOM, "must raise KeyError"),
    ("errors of two lines", SaysItInALongText, NO_ROOM, "must be one line"),
    (
        "hands out a page twice",
        HandsOutAPageTwice,
        "test_requests_do_not_share_pages_that_they_write",
        "two requests write to a page",
    ),
    ("keeps truncated pages", KeepsTruncatedPages, TRUNCATE, "must keep the first 3, found"),
    ("truncates to full pages", TruncatesToFullPages, TRUNCATE, "13 tokens.* the first 4, found"),
    ("truncates the first", TruncatesTheFirst, TRUNCATE, "must keep the first"),
    ("loses truncated pages", LosesTruncatedPages, TRUNCATE, "must be 9 and 0, found 8"),
    (
        "gives truncated pages again",
        GivesTruncatedPagesAgain,
        "test_a_truncated_request_can_be_extended_again",
        "two requests write to a page",
    ),
    ("forgets freed pages", ForgetsPages, "test_freed_pages_are_reused", "must be 6 and 0"),
    ("frees what is not there", FreesTwice, UNKNOWN, "free of 'unknown' must raise KeyError"),
    ("commits to unknown requests", CommitsToUnknownRequests, UNKNOWN, "commit of 'unknown'"),
    ("keeps requests in a global", GlobalRequests, ALONE, "another allocator's request"),
    ("keeps what it knows in a global", GlobalContents, ALONE, "another one knows"),
    (
        "cuts commits",
        CutsCommits,
        "test_a_refused_commit_changes_nothing",
        "must raise ValueError",
    ),
    (
        "commits before it refuses",
        CommitsBeforeItRefuses,
        "test_a_refused_commit_changes_nothing",
        "made pages known",
    ),
    ("finds only freed pages", FindsOnlyFreedPages, f"{FOUND}[held]", "must find 8 tokens"),
    ("finds only held pages", FindsOnlyHeldPages, f"{FOUND}[freed]", "must be 10 and 2, found 12"),
    (
        "leaves found pages evictable",
        LeavesFoundPagesEvictable,
        f"{FOUND}[freed]",
        "must be 10 and 0, found 10 and 2",
    ),
    ("ignores max_cached", IgnoresMaxCached, f"{MOST}[0]", "must be found, found 12"),
    ("rounds max_cached up", RoundsMaxCachedUp, f"{MOST}[5]", "must be found, found 8"),
    ("returns max_cached", ReturnsMaxCached, f"{MOST}[4]", "found 4 tokens in 3"),
    (
        "finds every token",
        FindsEveryToken,
        "test_one_token_at_least_is_left_to_compute[8]",
        "4 must be found, found 8",
    ),
    (
        "commits partly full pages",
        CommitsPartlyFullPages,
        "test_only_full_pages_become_known",
        "must be 11 and 1, found 10 and 2",
    ),
    (
        "commits when it extends",
        CommitsWhenExtended,
        "test_pages_that_were_not_committed_are_not_known",
        "but 3 were found",
    ),
    ("reads all tokens", ReadsAllTokens, ADD_UP, "must not be read again"),
    ("commits once", CommitsOnce, ADD_UP, "2 pages were committed"),
    (
        "commits nothing behind found pages",
        CommitsNothingBehindFoundPages,
        "test_pages_committed_behind_pages_that_were_found_are_known",
        "were found or committed, found",
    ),
    (
        "keys of the sequence's type",
        known_by_page(lambda tokens: repr(tokens).encode()),
        "test_any_sequence_of_token_ids_will_do",
        "must be found, found 0",
    ),
    (
        "keeps the caller's list",
        KeepsTheCallersList,
        "test_a_callers_list_can_change_afterwards",
        "put into the caller's list",
    ),
    *(
        (
            f"mistakes tokens {case}",
            broken,
            f"test_tokens_are_not_taken_for_others[{case}]",
            "pages are known where",
        )
        for case, broken in MISTAKEN.items()
    ),
    ("compares hashes", known_by(lambda key: hash(key)), EQUAL, "not only hashes"),
    (
        "compares digests",
        known_by(lambda key: sha256(repr(key).encode()).digest()),
        EQUAL,
        "not only hashes",
    ),
    (
        "compares checksums",
        known_by(lambda key: crc32(repr(key).encode())),
        EQUAL,
        "not only hashes",
    ),
    (
        "compares hashes of what is before",
        known_by(lambda key: (hash((key[0], key[1][:-1])), key[1][-1])),
        EQUAL,
        "not only hashes",
    ),
    (
        "has a salt of its own",
        HasASaltOfItsOwn,
        "test_requests_with_one_salt_share_pages",
        "a request without a salt has the salt b''",
    ),
    ("frees shared pages", FreesSharedPages, OUTLIVES, "must be 4 and 0, found"),
    ("takes held pages", TakesHeldPages, OUTLIVES, "must be 4 and 0, found 4 and 2"),
    ("forgets shared pages", ForgetsSharedPages, OUTLIVES, "must be|must stay known"),
    (
        "shares the partly full page",
        SharesThePartlyFullPage,
        "test_only_full_committed_pages_are_shared",
        "two requests write to a page",
    ),
    ("truncates found pages", TruncatesFoundPages, KEEPS, "that were found must raise ValueError"),
    (
        "truncates committed pages",
        TruncatesCommittedPages,
        KEEPS,
        "in committed pages must raise ValueError",
    ),
    ("keeps committed tokens", KeepsCommittedTokens, KEEPS, "fewer than are committed"),
    (
        "keeps the tokens of partly full pages",
        KeepsPartlyFullPages,
        "test_truncated_pages_are_known_by_what_is_committed_later",
        "must be found, found",
    ),
    ("finds the last committed", FindsTheLastCommitted, TWICE, "were committed first"),
    ("merges pages of one content", MergesPages, TWICE, "must not change a request's pages"),
    ("knows only the first", KnowsOnlyTheFirst, ALL_KNOWN, "known by the same content"),
    (
        "forgets all pages of a content",
        ForgetsAllPagesOfAContent,
        ALL_KNOWN,
        "known by the same content",
    ),
    ("takes known pages first", TakesKnownPagesFirst, TAKEN, "must be 4 and 3"),
    ("takes no known pages", TakesNoKnownPages, TAKEN, "are needed"),
    ("forgets pages when it refuses", ForgetsPagesWhenItRefuses, TAKEN, "forgot a known page"),
    ("knows taken pages", KnowsTakenPages, TAKEN, "another request has taken"),
    (
        "takes the first page of a request",
        TakesTheFirstOfARequest,
        "test_a_requests_last_pages_are_taken_before_its_first",
        "must stay known, found",
    ),
    ("takes the page freed last", TakesTheLastFreed, OLDEST, "must stay known, found"),
    ("takes the page freed first at all", TakesTheFirstCommitted, OLDEST, "must stay known, found"),
    ("looks at every page", LooksAtEveryPage, COST, "bytecode instructions"),
    ("sorts its free pages", SortsItsPages, f"{COST}[free]", "bytes in a cache"),
    ("copies its known pages", CopiesItsKnownPages, f"{COST}[known]", "bytes in a cache"),
    (
        "keeps all tokens before a page",
        known_by(lambda key: key),
        "test_the_memory_for_a_page_does_not_grow_with_the_request",
        "may take 4096 bytes",
    ),
    ("checks nothing", ChecksNothing, INTEGRITY, "must raise AssertionError when"),
    ("checks only what is known", ChecksOnlyTheKnown, INTEGRITY, "must raise AssertionError when"),
    ("takes sharing for damage", DislikesSharing, OUTLIVES, "two holders"),
    ("takes held pages, by the model", TakesHeldPages, MODEL, ""),
]

FAULTS = [Fault(name, Allocators(make), test, why=why) for name, make, test, why in BROKEN]

SUITE = KvAllocatorSuite


def test_the_suite_fails_each_broken_allocator() -> None:
    assert not missed(KvAllocatorSuite, FAULTS)


def test_each_test_finds_a_broken_allocator() -> None:
    found = {fault.test.partition("[")[0] for fault in FAULTS}
    assert found == set(own_tests(KvAllocatorSuite))


@pytest.mark.parametrize(
    "broken",
    [
        ForgetsPages,
        HandsOutAPageTwice,
        MovesWhenExtended,
        TruncatesToFullPages,
        SharesThePartlyFullPage,
        FreesSharedPages,
        ForgetsAllPagesOfAContent,
        KnowsTakenPages,
        KnowsOnlyTheFirst,
        FindsTheLastCommitted,
        TakesKnownPagesFirst,
        TakesTheFirstOfARequest,
        TakesTheLastFreed,
        TakesTheFirstCommitted,
        MISTAKEN["at another position"],
        MISTAKEN["without a salt"],
    ],
)
def test_the_model_finds_what_shows_in_random_calls(broken: type[KvCacheManager]) -> None:
    def make(num_pages: int = 12, page_size: int = 4) -> KvCacheManager:
        return broken(num_pages, page_size)

    with pytest.raises((AssertionError, ExceptionGroup, KeyError, pytest.fail.Exception)):
        run_state_machine_as_test(
            lambda: AllocatorMachine(make, sharing=True),
            settings=settings(
                max_examples=300,
                stateful_step_count=40,
                deadline=None,
                database=None,
                derandomize=True,
                phases=[Phase.generate],
            ),
        )


def test_options_are_passed_to_the_plugin() -> None:
    @frozen
    class Options:
        size: int = field(default=1, metadata={"help": "a number"})

    class WithOptions:
        tilewright_api = 2
        made: list[object] = []  # noqa: RUF012

        @hookimpl
        def plugin_info(self) -> PluginInfo:
            return PluginInfo(summary="fixed-size pages", options=Options)

        @hookimpl
        def create_kv_allocator(
            self, num_pages: int, page_size: int, options: Options
        ) -> KvAllocator:
            self.made.append(options)
            return KvCacheManager(num_pages, page_size)

    plugin = WithOptions()
    outcome = run(KvAllocatorSuite, plugin, ["test_allocate_takes_no_page"], options={"size": "3"})
    assert outcome.found == {"test_allocate_takes_no_page": "passed"}
    assert plugin.made == [Options(size=3)]


def test_an_allocator_need_not_share_and_the_report_says_what_was_not_run(tmp_path: Path) -> None:
    with dists.on_path(tmp_path / "site") as install:
        install(dists.GOOD)
        statements = verify(plugins.find("kv_allocator", "slab"), {}).statements
    results = {statement.statement.partition(" (")[0]: statement for statement in statements}
    assert {statement.result for statement in statements} == {"passed", "not run"}
    for test in (FOUND, EQUAL, OUTLIVES, OLDEST):
        result = results[test.removeprefix("test_").replace("_", " ")]
        assert result.result == "not run"
        assert result.reason.startswith("it shares no pages: after a commit, allocate of the same")
    for test in (MODEL, EXTEND, TRUNCATE, COST, INTEGRITY):
        assert results[test.removeprefix("test_").replace("_", " ")].result == "passed"


def test_the_suite_passes_what_is_right_though_it_is_another() -> None:
    outcome = run(KvAllocatorSuite, Allocators(Highest), own_tests(KvAllocatorSuite))
    assert set(outcome.found.values()) == {"passed"}, outcome.why
    assert len(outcome.found) > 35


class Highest:
    """The highest free page first; contents are found by a hash and compared, with numbers for
    those before; a queue has all pages that were freed, and those that were held again are passed
    over."""

    def __init__(self, num_pages: int, page_size: int):
        self.total_pages, self.page_size = num_pages, page_size
        self._unheld = list(range(num_pages))
        self._rows: dict[str, tuple[int, ...]] = {}
        self._ends: dict[str, tuple[int, Any]] = {}
        """How many pages of a request are committed, and the number of the last, or the salt."""
        self._times: dict[int, int] = {}
        """When a page was freed that can be found."""
        self._queue: deque[tuple[int, int]] = deque()
        self._clock = 0
        self._by_hash: dict[int, list[tuple[Any, tuple[int, ...], int]]] = {}
        self._copies: dict[int, list[int]] = {}
        self._numbers: dict[int, int] = {}
        self._keys: dict[int, tuple[Any, tuple[int, ...], int]] = {}
        self._holders = [0] * num_pages

    @property
    def free_pages(self) -> int:
        return len(self._unheld)

    @property
    def evictable_pages(self) -> int:
        return len(self._times)

    def allocate(
        self, request_id: str, token_ids: Sequence[int], *, max_cached: int, salt: bytes = b""
    ) -> int:
        if request_id in self._rows or not len(token_ids):
            raise ValueError(f"cannot begin {request_id!r} with {len(token_ids)} tokens")
        row: list[int] = []
        last: Any = salt
        for page in self._full(token_ids, 0, min(max_cached, len(token_ids) - 1)):
            number = self._find(last, page)
            if number is None:
                break
            last = number
            row.append(self._copies[number][0])
        for page_number in row:
            self._holders[page_number] += 1
            self._times.pop(page_number, None)
        self._rows[request_id] = tuple(row)
        self._ends[request_id] = len(row), last
        return len(row) * self.page_size

    def extend(self, request_id: str, to_tokens: int) -> None:
        row = self._rows[request_id]
        more = -(-to_tokens // self.page_size) - len(row)
        if more > self.free_pages + self.evictable_pages:
            raise OutOfPagesError(f"{more} pages are needed")
        for _ in range(more):
            page = self._unheld.pop() if self._unheld else self._oldest()
            self._holders[page] = 1
            row += (page,)
        self._rows[request_id] = row

    def truncate(self, request_id: str, to_tokens: int) -> None:
        row, keep = self._rows[request_id], -(-to_tokens // self.page_size)
        if to_tokens < self._ends[request_id][0] * self.page_size:
            raise ValueError(f"{to_tokens} tokens are too few")
        self._rows[request_id] = row[:keep]
        self._drop(row[keep:])

    def commit(self, request_id: str, token_ids: Sequence[int]) -> None:
        row, (done, last) = self._rows[request_id], self._ends[request_id]
        if len(token_ids) > len(row) * self.page_size:
            raise ValueError(f"{len(token_ids)} tokens are too many")
        for tokens in self._full(token_ids, done, len(token_ids)):
            number = self._find(last, tokens)
            if number is None:
                number = self._clock = self._clock + 1
                self._keys[number] = last, tokens, number
                self._by_hash.setdefault(hash((last, tokens)), []).append(self._keys[number])
            self._copies.setdefault(number, []).append(row[done])
            self._numbers[row[done]] = last = number
            done += 1
        self._ends[request_id] = done, last

    def pages(self, request_id: str) -> Sequence[int]:
        return self._rows[request_id]

    def free(self, request_id: str) -> None:
        row = self._rows.pop(request_id)
        del self._ends[request_id]
        self._drop(row)

    def check_integrity(self) -> None:
        held = {page for row in self._rows.values() for page in row}
        assert not held & {*self._unheld}
        assert not held & self._times.keys()
        assert len(held) + len(self._unheld) + len(self._times) == self.total_pages
        for page, holders in enumerate(self._holders):
            assert holders == sum(page in row for row in self._rows.values())

    def _full(self, token_ids: Sequence[int], first: int, end: int) -> Iterator[tuple[int, ...]]:
        for number in range(first, end // self.page_size):
            yield tuple(token_ids[number * self.page_size :][: self.page_size])

    def _find(self, last: Any, tokens: tuple[int, ...]) -> int | None:
        for before, same, number in self._by_hash.get(hash((last, tokens)), ()):
            if type(before) is type(last) and (before, same) == (last, tokens):
                return number
        return None

    def _oldest(self) -> int:
        time, page = self._queue.popleft()
        while self._times.get(page) != time:
            time, page = self._queue.popleft()
        del self._times[page]
        number = self._numbers.pop(page)
        self._copies[number].remove(page)
        if not self._copies[number]:
            del self._copies[number]
            key = self._keys.pop(number)
            self._by_hash[hash(key[:2])].remove(key)
        return page

    def _drop(self, pages: Sequence[int]) -> None:
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            if page in self._numbers:
                self._clock += 1
                self._times[page] = self._clock
                self._queue.append((self._clock, page))
            else:
                insort(self._unheld, page)
