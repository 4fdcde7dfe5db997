"""The paged KV cache: which request holds which of the fixed-size pages.

Pages are reference-counted. A full page whose tokens were committed is known by its content, so
that a later request with the same tokens can hold it too; a partly full page has one holder, so no
slot is ever written for two requests. Known pages that nobody holds are taken last, least recently
used first.
"""

from array import array
from collections import OrderedDict
from collections.abc import Sequence

from attrs import define, field

from tilewright.errors import OutOfPagesError
from tilewright.hookspecs import hookimpl
from tilewright.types import PluginInfo

tilewright_api = 2


@hookimpl
def plugin_info() -> PluginInfo:
    return PluginInfo(
        summary="fixed-size pages with reference counts, found again by their tokens",
        limits={"page size": "any", "sharing": "full pages"},
    )


@hookimpl
def create_kv_allocator(num_pages: int, page_size: int) -> "KvCacheManager":
    return KvCacheManager(num_pages, page_size)


@define(eq=False)
class _Content:
    """What a full page holds: its tokens, behind the content of the page before it."""

    key: "_Key"
    pages: list[int] = field(factory=list)
    """The pages that hold it, in the order in which they were committed."""


_Key = tuple[_Content | bytes, bytes]
"""The content before (the salt, for a first page), and the page's tokens as 32-bit integers.

A content is kept as long as one that follows it, so equal keys mean equal tokens from the start."""


@define
class _Holding:
    """The pages of one request."""

    before: _Content | bytes
    """What a content that follows the committed pages starts with: see ``_Key``."""
    pages: "array[int]" = field(factory=lambda: array("i"))
    """In order of position; 32-bit, as block tables are, so that a row is one copy."""
    committed: int = 0
    """Number of full pages, from the first, whose content was made known."""


class KvCacheManager:
    """A ``KvAllocator`` (see tilewright.types)."""

    def __init__(self, total_pages: int, page_size: int):
        if total_pages < 1 or page_size < 1:
            raise ValueError(
                f"total_pages and page_size must be at least 1, found {total_pages} and {page_size}"
            )
        self.page_size = page_size
        self._references = array("i", [0]) * total_pages
        # A stack, so that pages freed last are used first while they are warm in the caches.
        self._free = array("i", range(total_pages - 1, -1, -1))
        self._held: dict[str, _Holding] = {}
        self._known: dict[_Key, _Content] = {}
        self._content: dict[int, _Content] = {}
        """The content of each known page."""
        self._evictable: OrderedDict[int, None] = OrderedDict()
        """Known pages that nobody holds, in the order in which they are taken."""

    @property
    def total_pages(self) -> int:
        return len(self._references)

    @property
    def free_pages(self) -> int:
        return len(self._free)

    @property
    def evictable_pages(self) -> int:
        return len(self._evictable)

    def allocate(
        self, request_id: str, token_ids: Sequence[int], *, max_cached: int, salt: bytes = b""
    ) -> int:
        if request_id in self._held:
            raise ValueError(f"request {request_id!r} exists already: free it first")
        if not len(token_ids):
            raise ValueError(f"request {request_id!r} needs at least one token, found none")
        held = _Holding(before=salt)
        for index in range(min(max_cached, len(token_ids) - 1) // self.page_size):
            found = self._known.get((held.before, self._tokens(token_ids, index)))
            if found is None:
                break
            held.before = found
            held.pages.append(found.pages[0])
        held.committed = len(held.pages)
        for page in held.pages:
            self._references[page] += 1
            self._evictable.pop(page, None)
        self._held[request_id] = held
        return len(held.pages) * self.page_size

    def extend(self, request_id: str, to_tokens: int) -> None:
        held = self._held[request_id]
        missing = -(-to_tokens // self.page_size) - len(held.pages)
        if missing <= 0:
            return
        if missing > len(self._free) + len(self._evictable):
            raise OutOfPagesError(
                f"request {request_id!r} needs {missing} more KV cache pages of {self.page_size} "
                f"tokens to hold {to_tokens} tokens; {len(self._free) + len(self._evictable)} of "
                f"{self.total_pages} can be taken and {len(self._held)} requests hold the rest: "
                "raise total_pages, or run fewer or shorter requests at once"
            )
        for _ in range(missing):
            page = self._free.pop() if self._free else self._evict()
            self._references[page] = 1
            held.pages.append(page)

    def truncate(self, request_id: str, to_tokens: int) -> None:
        held = self._held[request_id]
        if to_tokens < held.committed * self.page_size:
            raise ValueError(
                f"request {request_id!r} has committed {held.committed * self.page_size} tokens "
                f"and cannot be truncated to {to_tokens}"
            )
        keep = -(-to_tokens // self.page_size)
        self._release(held.pages[keep:])
        del held.pages[keep:]

    def commit(self, request_id: str, token_ids: Sequence[int]) -> None:
        held = self._held[request_id]
        if len(token_ids) > len(held.pages) * self.page_size:
            raise ValueError(
                f"request {request_id!r} has pages for {len(held.pages) * self.page_size} tokens "
                f"and cannot commit {len(token_ids)}: extend it first"
            )
        for index in range(held.committed, len(token_ids) // self.page_size):
            key = held.before, self._tokens(token_ids, index)
            content = self._known.get(key)
            if content is None:
                content = self._known[key] = _Content(key)
            content.pages.append(held.pages[index])
            self._content[held.pages[index]] = held.before = content
            held.committed = index + 1

    def pages(self, request_id: str) -> Sequence[int]:
        return self._held[request_id].pages

    def free(self, request_id: str) -> None:
        self._release(self._held.pop(request_id).pages)

    def check_integrity(self) -> None:
        counted = array("i", [0]) * self.total_pages
        for held in self._held.values():
            assert held.committed <= len(held.pages), "a page is committed that no request holds"
            assert len(set(held.pages)) == len(held.pages), "a request holds a page twice"
            for index, page in enumerate(held.pages):
                counted[page] += 1
                assert index < held.committed or self._references[page] == 1, (
                    f"page {page} is not committed, and is held by more than one request"
                )
        assert counted == self._references, "reference counts differ from the pages that are held"
        spare = [*self._free, *self._evictable]
        assert len(set(spare)) == len(spare), "a page is free or evictable twice"
        assert set(spare) == {p for p, n in enumerate(counted) if n == 0}, (
            "the free and evictable pages differ from the pages that no request holds"
        )
        assert self._evictable.keys() <= self._content.keys(), "an evictable page is not known"
        assert not self._content.keys() & set(self._free), "a free page is known by a content"
        known = {page: content for content in self._known.values() for page in content.pages}
        assert known == self._content, "a page is known by a content that it does not have"
        for (before, _), content in self._known.items():
            assert content.pages, "a content is known that no page has"
            assert isinstance(before, bytes) or before.pages, (
                f"pages {content.pages} are known, but no page with the tokens before theirs is"
            )

    def _tokens(self, token_ids: Sequence[int], index: int) -> bytes:
        """The tokens of a full page."""
        return array(
            "i", token_ids[index * self.page_size : (index + 1) * self.page_size]
        ).tobytes()

    def _evict(self) -> int:
        page, _ = self._evictable.popitem(last=False)
        content = self._content.pop(page)
        content.pages.remove(page)
        if not content.pages:
            del self._known[content.key]
        return page

    def _release(self, pages: Sequence[int]) -> None:
        for page in reversed(pages):
            self._references[page] -= 1
            if self._references[page]:
                continue
            if page in self._content:
                self._evictable[page] = None
            else:
                self._free.append(page)
