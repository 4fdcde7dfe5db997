"""The KV cache: its layout, its storage, and which requests hold which pages."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

from attrs import frozen

from tilewright.types.model import DType

if TYPE_CHECKING:
    import torch
    from torch import Tensor

RowOrder = Literal["NHD", "HND"]


@frozen(kw_only=True)
class KvCacheSpec:
    """The KV cache that an executor needs. Declared by the executor, built by the allocator.

    row_order: ``NHD`` has layers of shape [pages, page_size, num_kv_heads, head_dim]; ``HND`` has
        [pages, num_kv_heads, page_size, head_dim]. The two cannot be told apart by shape when
        page_size == num_kv_heads, so the order is declared and never inferred. A slot is
        page * page_size + offset in both.
    memory_limit: maximum bytes of the cache when total_pages is not given.
    allocate: makes the storage of one tensor from (shape, dtype); None: ``torch.zeros`` on
        ``device``. An executor whose cache lives on a device that torch does not know returns its
        own handles here; the allocator passes them on and can neither read nor copy them.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    dtype: DType
    device: str = "cpu"
    row_order: RowOrder = "NHD"
    memory_limit: int | None = None
    allocate: "Callable[[tuple[int, ...], torch.dtype], Any] | None" = None

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all layers, keys and values."""
        itemsize = 4 if self.dtype == "float32" else 2
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.page_size * itemsize


@frozen
class KvLayer:
    """One layer's keys and values, each shaped as the spec's row order says."""

    key: "Tensor"
    value: "Tensor"


class KvAllocator(Protocol):
    """Owns the KV cache: which request holds which page, and the storage behind the pages.

    A page belongs to the requests that hold it and is free when none does. Except for the copy in
    fork, only the executor writes to the storage, and only to slots of a request's own unshared
    pages.
    """

    @property
    def total_pages(self) -> int: ...

    @property
    def free_pages(self) -> int: ...

    def pages_for(self, num_tokens: int) -> int:
        """How many pages hold num_tokens tokens."""
        ...

    def allocate(self, request_id: str, num_tokens: int) -> None:
        """Give a new request pages for its first num_tokens tokens.

        Raises OutOfPagesError and changes nothing when too few pages are free; ValueError when the
        request already has pages or num_tokens < 1.
        """
        ...

    def extend(self, request_id: str, num_tokens: int = 1) -> None:
        """Allocate num_tokens more. Raises KeyError, or OutOfPagesError and changes nothing."""
        ...

    def num_tokens(self, request_id: str) -> int:
        """Tokens that the request has slots for. Raises KeyError."""
        ...

    def slots(self, request_id: str, start: int, stop: int) -> "Tensor":
        """Slots of positions start to stop, [stop - start] int32. Raises KeyError, IndexError."""
        ...

    def block_table(self, request_ids: Sequence[str]) -> "Tensor":
        """[B, max_pages] int32: each request's pages in order of position, padded with -1.

        max_pages is the largest number of pages among them. Raises KeyError.
        """
        ...

    def fork(self, parent_id: str, child_id: str) -> None:
        """Give a new request the parent's tokens: full pages shared, the partly full one copied.

        Raises OutOfPagesError and changes nothing; KeyError for an unknown parent; ValueError when
        the child already has pages, and when a page of an executor's own storage
        (KvCacheSpec.allocate) would have to be copied.
        """
        ...

    def free(self, request_id: str) -> None:
        """Release all pages of a request. Raises KeyError."""
        ...

    def layers(self) -> Sequence[KvLayer]:
        """The storage, one entry per layer, in the spec's row order; the same objects each time."""
        ...

    def check_integrity(self) -> None:
        """Raise AssertionError unless each page is counted exactly once, as free or as held."""
        ...
