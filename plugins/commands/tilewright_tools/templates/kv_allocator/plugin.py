"""A paged KV cache that hands out the lowest free page first.

The pages in use thus lie close together, and the cache's end is touched only when it fills.
"""

from collections import Counter, OrderedDict
from collections.abc import Sequence
from heapq import heappop, heappush

from tilewright import hookimpl
from tilewright.errors import OutOfPagesError
from tilewright.types import KvAllocator, PluginInfo

tilewright_api = 2


@hookimpl
def plugin_info() -> PluginInfo:
    return PluginInfo(
        summary="shared pages found by their tokens, the lowest free one first",
        limits={"page size": "any", "sharing": "full pages"},
    )


@hookimpl
def create_kv_allocator(num_pages: int, page_size: int) -> KvAllocator:
    return LowestFirst(num_pages, page_size)


class Content:
    """What full pages hold: tokens, behind other content or, in a first page, behind a salt."""

    def __init__(self, before: "Content | bytes", tokens: tuple[int, ...]):
        self.key = before, tokens
        self.pages: list[int] = []
        """The known pages that hold it, the first committed one first."""


class Request:
    def __init__(self, salt: bytes):
        self.pages: list[int] = []
        self.committed = 0
        """How many of its pages, from the first, were found or committed."""
        self.last: Content | bytes = salt
        """The content of the last of these."""


class LowestFirst:
    """A ``KvAllocator`` (see tilewright.types)."""

    def __init__(self, num_pages: int, page_size: int):
        self.page_size = page_size
        self.total_pages = num_pages
        self.requests: dict[str, Request] = {}
        self.holders: Counter[int] = Counter()
        """How many requests hold a page."""
        self.free_list = list(range(num_pages))  # a heap
        self.unused: OrderedDict[int, Content] = OrderedDict()
        """Known pages that no request holds, in the order in which they are taken."""
        self.known: dict[tuple[Content | bytes, tuple[int, ...]], Content] = {}
        self.contents: dict[int, Content] = {}
        """The content of each known page."""

    @property
    def free_pages(self) -> int:
        return len(self.free_list)

    @property
    def evictable_pages(self) -> int:
        return len(self.unused)

    def allocate(
        self, request_id: str, token_ids: Sequence[int], *, max_cached: int, salt: bytes = b""
    ) -> int:
        if request_id in self.requests:
            raise ValueError(f"request {request_id!r} exists already: free it first")
        if not len(token_ids):
            raise ValueError(f"request {request_id!r} needs at least one token, found none")
        request = Request(salt)
        for number in range(min(max_cached, len(token_ids) - 1) // self.page_size):
            content = self.known.get((request.last, self._tokens(token_ids, number)))
            if content is None:
                break
            request.last = content
            request.pages.append(content.pages[0])
        request.committed = len(request.pages)
        for page in request.pages:
            self.holders[page] += 1
            self.unused.pop(page, None)
        self.requests[request_id] = request
        return request.committed * self.page_size

    def extend(self, request_id: str, to_tokens: int) -> None:
        request = self.requests[request_id]
        wanted = self._pages_for(to_tokens) - len(request.pages)
        if wanted > self.free_pages + self.evictable_pages:
            raise OutOfPagesError(
                f"request {request_id!r} needs {wanted} more pages for {to_tokens} tokens; "
                f"{self.free_pages + self.evictable_pages} of {self.total_pages} can be taken: "
                "raise total_pages, or run fewer or shorter requests at once"
            )
        for _ in range(wanted):
            page = heappop(self.free_list) if self.free_list else self._forget()
            self.holders[page] = 1
            request.pages.append(page)

    def truncate(self, request_id: str, to_tokens: int) -> None:
        request = self.requests[request_id]
        if to_tokens < request.committed * self.page_size:
            raise ValueError(
                f"request {request_id!r} cannot be truncated to {to_tokens} tokens: its first "
                f"{request.committed * self.page_size} are committed"
            )
        keep = self._pages_for(to_tokens)
        self._release(request.pages[keep:])
        del request.pages[keep:]

    def commit(self, request_id: str, token_ids: Sequence[int]) -> None:
        request = self.requests[request_id]
        if len(token_ids) > len(request.pages) * self.page_size:
            raise ValueError(
                f"request {request_id!r} has {len(request.pages)} pages of {self.page_size} tokens "
                f"and cannot commit {len(token_ids)}: extend it first"
            )
        for number in range(request.committed, len(token_ids) // self.page_size):
            new = Content(request.last, self._tokens(token_ids, number))
            content = self.known.setdefault(new.key, new)
            content.pages.append(request.pages[number])
            self.contents[request.pages[number]] = content
            request.last = content
            request.committed = number + 1

    def pages(self, request_id: str) -> Sequence[int]:
        return self.requests[request_id].pages

    def free(self, request_id: str) -> None:
        self._release(self.requests.pop(request_id).pages)

    def check_integrity(self) -> None:
        held = Counter(page for request in self.requests.values() for page in request.pages)
        assert held == self.holders, "the holders of pages differ from the pages that are held"
        counted = sorted([*self.free_list, *self.unused, *held])
        assert counted == list(range(self.total_pages)), "a page is not counted exactly once"
        known = {page: content for content in self.known.values() for page in content.pages}
        assert known == self.contents, "a known page has another content"
        assert self.unused.items() <= known.items(), "an evictable page has another content"
        assert not known.keys() & set(self.free_list), "a free page is known"

    def _pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def _tokens(self, token_ids: Sequence[int], number: int) -> tuple[int, ...]:
        """The tokens of a full page."""
        return tuple(token_ids[number * self.page_size : (number + 1) * self.page_size])

    def _forget(self) -> int:
        """The page that was freed first of those that are known but not held."""
        page, content = self.unused.popitem(last=False)
        del self.contents[page]
        content.pages.remove(page)
        if not content.pages:
            del self.known[content.key]
        return page

    def _release(self, pages: Sequence[int]) -> None:
        for page in reversed(pages):  # a request's last page is to be taken first
            self.holders[page] -= 1
            if self.holders[page]:
                continue
            del self.holders[page]
            if page in self.contents:
                self.unused[page] = self.contents[page]
            else:
                heappush(self.free_list, page)
