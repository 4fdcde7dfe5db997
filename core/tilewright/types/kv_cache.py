"""The KV cache: its shape, and which requests hold which pages."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Protocol

from attrs import field, frozen

from tilewright.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

RowOrder = Literal["NHD", "HND"]

_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@frozen(kw_only=True)
class KvCacheSpec:
    """The KV cache of an executor, which allocates and owns its storage.

    row_order: ``NHD`` has pages of shape [page_size, num_kv_heads, head_dim]; ``HND`` has
        [num_kv_heads, page_size, head_dim]. The two cannot be told apart by shape when
        page_size == num_kv_heads, so the order is declared and never inferred. A slot is
        page * page_size + offset in both.
    page_bytes: bytes that one page takes, keys and values of all num_layers layers together;
        default: computed from the shape.
    memory_limit: maximum bytes of the cache when the user gives no number of pages.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    dtype: str
    row_order: RowOrder = "NHD"
    memory_limit: int | None = None
    page_bytes: int = field()

    @page_bytes.default
    def _default_page_bytes(self) -> int:
        if self.dtype not in _ITEM_BYTES:
            raise ConfigError(
                f"KvCacheSpec.page_bytes must be given for a cache of dtype {self.dtype!r}: it is "
                f"computed only for {', '.join(_ITEM_BYTES)}"
            )
        vectors = 2 * self.num_layers * self.page_size * self.num_kv_heads
        return vectors * self.head_dim * _ITEM_BYTES[self.dtype]


@frozen
class KvLayer:
    """Keys and values of some pages of one layer, [pages, *page] in the spec's row order."""

    key: "Tensor"
    value: "Tensor"


class KvAllocator(Protocol):
    """Which request holds which pages of the KV cache. It has no storage and no tensors.

    Position p of a request is in its page number p // page_size. Requests may hold a page together
    only if it is full and committed. A full page that was committed is known by its content: its
    tokens and all tokens before it, within one salt. It stays known after the last request has
    freed it, until its memory is needed; the page that was freed first goes first, and of one
    request's pages the last.

    An allocator need not share pages. It then knows none: commit has no effect, allocate returns 0.

    Neither the time of a call nor the memory for a page may grow with the number of other pages.
    """

    @property
    def page_size(self) -> int:
        """Tokens per page."""
        ...

    @property
    def total_pages(self) -> int:
        """Number of pages; they are numbered from 0."""
        ...

    @property
    def free_pages(self) -> int:
        """Pages that no request holds and that are not known."""
        ...

    @property
    def evictable_pages(self) -> int:
        """Pages that no request holds and that are known; taken when none is free."""
        ...

    def allocate(
        self, request_id: str, token_ids: Sequence[int], *, max_cached: int, salt: bytes = b""
    ) -> int:
        """Begin a request that holds only the known pages at the start of its tokens.

        token_ids: the request's tokens so far. A page is found by comparing tokens, never by a hash
        alone. Of known pages with one content, the one that was committed first is found. salt:
        requests share pages only with requests of the same salt.

        Returns the number of tokens in these pages: at most min(max_cached, len(token_ids) - 1), so
        that one token at least is left to compute. Takes no new page. Raises ValueError when the
        request exists, or without tokens.
        """
        ...

    def extend(self, request_id: str, to_tokens: int) -> None:
        """Give a request pages for its first to_tokens tokens; it keeps what it has beyond.

        Raises OutOfPagesError and changes nothing when too few pages are free or evictable;
        KeyError for an unknown request.
        """
        ...

    def truncate(self, request_id: str, to_tokens: int) -> None:
        """Release the pages behind a request's first to_tokens tokens.

        Raises ValueError and changes nothing for fewer tokens than are in pages that were found or
        committed; KeyError for an unknown request.
        """
        ...

    def commit(self, request_id: str, token_ids: Sequence[int]) -> None:
        """Make a request's full pages known by their content.

        token_ids: the request's first tokens, whose keys and values are all in the cache. Tokens in
        pages that were found or committed before are not read again, and fewer tokens than these
        change nothing.

        Raises ValueError and changes nothing for more tokens than the request has pages for;
        KeyError for an unknown request.
        """
        ...

    def pages(self, request_id: str) -> Sequence[int]:
        """A request's pages, in order of position. Raises KeyError for an unknown request."""
        ...

    def free(self, request_id: str) -> None:
        """End a request: release all of its pages. Raises KeyError for an unknown request."""
        ...

    def check_integrity(self) -> None:
        """Raise AssertionError unless each page is counted exactly once: free, evictable or held,
        and held by as many requests as are counted."""
        ...
