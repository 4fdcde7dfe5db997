"""The conformance suite of KV allocators, and the reference model that it compares with."""

import binascii
import builtins
import hashlib
import itertools
import math
import sys
import tracemalloc
import zlib
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import FrameType, ModuleType
from typing import Any, ClassVar, Protocol, overload

import pytest
from attrs import define, field
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from tilewright.errors import OutOfPagesError
from tilewright.types import KvAllocator
from tilewright_testing.random_calls import run_random_calls
from tilewright_testing.suite import Implementation, PluginSuite

PAGE_SIZE = 4


class Make(Protocol):
    """Makes an allocator."""

    def __call__(self, num_pages: int = 12, page_size: int = PAGE_SIZE) -> KvAllocator: ...


def text(num_tokens: int, first: int = 1) -> list[int]:
    """Token ids that count from the first."""
    return list(range(first, first + num_tokens))


def hold(cache: KvAllocator, request_id: str, token_ids: Sequence[int], salt: bytes = b"") -> int:
    """Begin a request with pages for all of its tokens; returns the number of tokens found."""
    found = cache.allocate(request_id, token_ids, max_cached=len(token_ids), salt=salt)
    cache.extend(request_id, len(token_ids))
    return found


def compute(
    cache: KvAllocator, request_id: str, token_ids: Sequence[int], salt: bytes = b""
) -> int:
    """Begin a request and commit all of its tokens; returns the number of tokens found."""
    found = hold(cache, request_id, token_ids, salt)
    cache.commit(request_id, token_ids)
    return found


def found_pages(cache: KvAllocator, token_ids: Sequence[int], salt: bytes = b"") -> list[int]:
    """The known pages at the start of some tokens, all of them if they are known."""
    more = [*token_ids, 0]
    found = cache.allocate("probe", more, max_cached=len(token_ids), salt=salt)
    pages = list(cache.pages("probe"))
    cache.free("probe")
    assert found == len(pages) * cache.page_size, (
        f"allocate must return the tokens of the pages that it found, {len(pages)} of "
        f"{cache.page_size} tokens, found {found}"
    )
    return pages


def shares(make: Make) -> bool:
    """Whether allocate finds a committed page, while it is held or after it was freed."""
    cache, tokens = make(), text(3 * PAGE_SIZE)
    compute(cache, "a", tokens)
    held = found_pages(cache, tokens)
    cache.free("a")
    return bool(held or found_pages(cache, tokens))


def state(cache: KvAllocator, request_ids: Iterable[str]) -> Any:
    """What an allocator reports about itself and some requests."""
    pages = {r: list(cache.pages(r)) for r in request_ids}
    return cache.total_pages, cache.free_pages, cache.evictable_pages, pages


def refused(
    cache: KvAllocator,
    error: type[Exception],
    what: str,
    call: Callable[[], object],
    request_ids: Iterable[str] = (),
) -> None:
    """Fail unless a call raises an error with a one-line message, and changes nothing."""
    before = state(cache, request_ids)
    try:
        call()
    except error as raised:
        said = str(raised)
        assert len(said.splitlines()) == 1, f"an error's message must be one line, found {said!r}"
    else:
        pytest.fail(f"{what} must raise {error.__name__}, but did not", pytrace=False)
    assert state(cache, request_ids) == before, f"{what} was refused, but changed the state"
    cache.check_integrity()


def counts(cache: KvAllocator, free: int, evictable: int, when: str) -> None:
    """Fail unless so many pages are free and evictable."""
    found = cache.free_pages, cache.evictable_pages
    assert found == (free, evictable), (
        f"{when}, free_pages and evictable_pages must be {free} and {evictable}, found {found[0]} "
        f"and {found[1]}"
    )


# --- the model ------------------------------------------------------------------------------------

Content = tuple[bytes, tuple[int, ...]]
"""A salt, and the tokens from the first to the last in question."""


@define
class Held:
    """A request of the model."""

    salt: bytes
    tokens: list[int]
    pages: list[int]
    written: int
    """Number of its first tokens that are in the storage."""
    committed: int
    """Number of its first pages that were found or committed."""
    size: int = field(repr=False)

    def content(self, page: int) -> Content:
        return self.salt, tuple(self.tokens[: (page + 1) * self.size])


class AllocatorMachine(RuleBasedStateMachine):
    """Random calls, compared with lists and dictionaries.

    Each request writes its tokens into a storage, each with its salt and all tokens before it, as
    keys and values depend on them. It must read them there as long as it lives.

    sharing: whether the allocator shares pages.
    """

    def __init__(self, make: Make, sharing: bool):
        super().__init__()
        self.make = make
        self.sharing = sharing
        self.requests: dict[str, Held] = {}
        self.known: dict[int, Content] = {}
        """Contents of the known pages, in the order in which they were committed."""
        self.evictable: list[int] = []
        """Known pages that nobody holds, in the order in which they have to be taken."""
        self.stored: dict[tuple[int, int], Content] = {}
        """What is stored in a page at an offset."""
        self.counter = 0

    @initialize(page_size=st.sampled_from([3, 1, 4]), total_pages=st.sampled_from([8, 12, 5, 2, 1]))
    def begin(self, page_size: int, total_pages: int) -> None:
        self.page_size, self.total_pages = page_size, total_pages
        self.cache = self.make(num_pages=total_pages, page_size=page_size)
        found = self.cache.total_pages, self.cache.page_size
        assert found == (total_pages, page_size), (
            f"total_pages and page_size must be {total_pages} and {page_size}, found {found}"
        )

    @rule(
        parts=st.sampled_from(["aaaaa", "aabaa", "aab", "abab", "bb", "a"]),
        less=st.integers(0, 3),
        salt=st.sampled_from([b"", b"", b"salt"]),
        max_cached=st.sampled_from([10**9, 10**9, 10**9, 0, 1, 4, 7]),
        compute=st.sampled_from([True, True, False]),
    )
    def allocate(self, parts: str, less: int, salt: bytes, max_cached: int, compute: bool) -> None:
        tokens = [token for part in parts for token in self._part(part)]
        tokens = tokens[: max(1, len(tokens) - less)]
        request_id = self._fresh("r")
        held = Held(salt, tokens, [], 0, 0, self.page_size)
        for number in range(min(max_cached, len(tokens) - 1) // self.page_size):
            same = [page for page, of in self.known.items() if of == held.content(number)]
            if not same:
                break
            held.pages.append(same[0])
        held.committed = len(held.pages)
        held.written = held.committed * self.page_size
        found = self.cache.allocate(request_id, tokens, max_cached=max_cached, salt=salt)
        assert found == held.written, (
            f"allocate must find {held.written} tokens of {tokens} with at most {max_cached} "
            f"cached, found {found}"
        )
        self.requests[request_id] = held
        self.evictable = [page for page in self.evictable if page not in held.pages]
        if compute:
            self._extend(request_id, held, len(tokens))
            self._write_and_commit(request_id, held, 0)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), less=st.sampled_from([0, 0, -2, 3, 7]))
    def extend(self, data: st.DataObject, less: int) -> None:
        request_id, held = self._any(data)
        self._extend(request_id, held, max(0, len(held.tokens) - less))

    def _extend(self, request_id: str, held: Held, to_tokens: int) -> None:
        missing = max(0, -(-to_tokens // self.page_size) - len(held.pages))
        free = self._free()
        if missing > free + len(self.evictable):
            what = f"extend({request_id!r}, {to_tokens})"
            self._refused(OutOfPagesError, what, lambda: self.cache.extend(request_id, to_tokens))
            return
        self.cache.extend(request_id, to_tokens)
        pages = list(self.cache.pages(request_id))
        assert pages[: len(held.pages)] == held.pages, (
            "extend must keep the pages that a request already has: they hold its keys and values"
        )
        new = pages[len(held.pages) :]
        assert len(new) == missing, (
            f"extend to {to_tokens} tokens must give {missing} pages, found {len(new)}"
        )
        taken = self.evictable[: max(0, missing - free)]
        assert set(new) & set(self.evictable) == set(taken), (
            f"of the evictable pages {self.evictable}, in the order in which they were freed, "
            f"{taken} must be taken when {missing} pages are needed and {free} are free, found "
            f"{new}"
        )
        for page in taken:
            self.evictable.remove(page)
            del self.known[page]
        held.pages = pages

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), part=st.sampled_from("ab"), num_tokens=st.integers(1, 4))
    def generate(self, data: st.DataObject, part: str, num_tokens: int) -> None:
        _, held = self._any(data)
        held.tokens += (self._part(part) * num_tokens)[:num_tokens]

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), less=st.sampled_from([0, 0, 0, 1, 5]))
    def write_and_commit(self, data: st.DataObject, less: int) -> None:
        request_id, held = self._any(data)
        self._write_and_commit(request_id, held, less)

    def _write_and_commit(self, request_id: str, held: Held, less: int) -> None:
        stop = min(len(held.tokens), len(held.pages) * self.page_size)
        for at in range(held.written, stop):
            where = held.pages[at // self.page_size], at % self.page_size
            self.stored[where] = held.salt, tuple(held.tokens[: at + 1])
        held.written = max(held.written, stop)
        stop = max(0, stop - less)
        self.cache.commit(request_id, held.tokens[:stop])
        if self.sharing:
            for number in range(held.committed, stop // self.page_size):
                self.known[held.pages[number]] = held.content(number)
                held.committed = number + 1

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), less=st.sampled_from([1, 3, 5, 9, 0, -1]))
    def truncate(self, data: st.DataObject, less: int) -> None:
        request_id, held = self._any(data)
        to_tokens = max(0, len(held.pages) * self.page_size - less)
        if to_tokens < held.committed * self.page_size:
            what = f"truncate({request_id!r}, {to_tokens})"
            self._refused(ValueError, what, lambda: self.cache.truncate(request_id, to_tokens))
            return
        self.cache.truncate(request_id, to_tokens)
        del held.pages[-(-to_tokens // self.page_size) :]
        held.written = min(held.written, to_tokens)
        del held.tokens[max(1, to_tokens) :]

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        request_id, held = self._any(data)
        self.cache.free(request_id)
        del self.requests[request_id]
        others = {page for other in self.requests.values() for page in other.pages}
        for page in reversed(held.pages):
            if page in self.known and page not in others:
                self.evictable.append(page)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def misuse(self, data: st.DataObject) -> None:
        cache, unknown = self.cache, self._fresh("unknown")
        request_id, held = self._any(data)
        beyond = [1] * (len(held.pages) * self.page_size + 1)
        for error, what, call in (
            (ValueError, "allocate", lambda: cache.allocate(request_id, [1], max_cached=0)),
            (ValueError, "allocate", lambda: cache.allocate(unknown, [], max_cached=0)),
            (ValueError, "commit", lambda: cache.commit(request_id, beyond)),
            (KeyError, "extend", lambda: cache.extend(unknown, 1)),
            (KeyError, "truncate", lambda: cache.truncate(unknown, 0)),
            (KeyError, "commit", lambda: cache.commit(unknown, [])),
            (KeyError, "pages", lambda: cache.pages(unknown)),
            (KeyError, "free", lambda: cache.free(unknown)),
        ):
            self._refused(error, what, call)

    @invariant()
    def requests_have_their_pages_and_read_what_they_wrote(self) -> None:
        self.cache.check_integrity()
        for request_id, held in self.requests.items():
            pages = list(self.cache.pages(request_id))
            assert pages == held.pages, (
                f"the pages of request {request_id!r} must be {held.pages}, found {pages}"
            )
            for at in range(held.written):
                where = held.pages[at // self.page_size], at % self.page_size
                assert self.stored.get(where) == (held.salt, tuple(held.tokens[: at + 1])), (
                    f"position {at} of request {request_id!r} must keep what was written to it"
                )

    @invariant()
    def only_full_committed_pages_have_two_holders(self) -> None:
        holders: dict[int, list[bool]] = {}
        for held in self.requests.values():
            for number, page in enumerate(held.pages):
                holders.setdefault(page, []).append(number < held.committed)
        for page, committed in holders.items():
            assert 0 <= page < self.total_pages, (
                f"pages must be 0 to {self.total_pages - 1}, found {page}"
            )
            assert len(committed) == 1 or all(committed), (
                f"page {page} has {len(committed)} holders, but is not full and committed in each"
            )

    @invariant()
    def each_page_is_free_evictable_or_held(self) -> None:
        counts(self.cache, self._free(), len(self.evictable), "after these calls")

    def _part(self, part: str) -> list[int]:
        """The tokens of one of two different pages."""
        return [10 * (part == "a") + offset for offset in range(self.page_size)]

    def _fresh(self, stem: str) -> str:
        self.counter += 1
        return f"{stem}-{self.counter}"

    def _any(self, data: st.DataObject) -> tuple[str, Held]:
        request_id = data.draw(st.sampled_from(list(self.requests)))
        return request_id, self.requests[request_id]

    def _free(self) -> int:
        held = {page for held in self.requests.values() for page in held.pages}
        return self.total_pages - len(held) - len(self.evictable)

    def _refused(self, error: type[Exception], what: str, call: Callable[[], object]) -> None:
        refused(self.cache, error, what, call, self.requests)


# --- tokens that are easily taken for others ------------------------------------------------------

A, B, C = text(4, 11), text(4, 21), text(4, 31)
"""Full pages."""

Known = tuple[bytes, Sequence[int]]
"""A salt, and tokens that were committed with it."""

MISTAKABLE: dict[str, tuple[Sequence[Known], Known, int]] = {
    "in another order": ([(b"", [1, 2, 3, 4])], (b"", [4, 3, 2, 1]), 0),
    "with another last token": ([(b"", A)], (b"", [*A[:3], 99]), 0),
    "with another first token": ([(b"", A)], (b"", [99, *A[1:]]), 0),
    "equal modulo 2**8": ([(b"", A)], (b"", [a + 2**8 for a in A]), 0),
    "equal modulo 2**16": ([(b"", A)], (b"", [a + 2**16 for a in A]), 0),
    "equal as float32": ([(b"", [2**24, *A[1:]])], (b"", [2**24 + 1, *A[1:]]), 0),
    "with equal digits": ([(b"", [1, 23, 4, 5])], (b"", [12, 3, 4, 5]), 0),
    "of zeros, but more": ([(b"", [0] * 4)], (b"", [0] * 8), 1),
    "at another position": ([(b"", A + B)], (b"", B), 0),
    "behind the same page again": ([(b"", A + B)], (b"", A + A + B), 1),
    "behind another page": ([(b"", A + B), (b"", C)], (b"", C + B), 1),
    "behind another page, two pages before": (
        [(b"", A + B + C), (b"", C + B)],
        (b"", C + B + C),
        2,
    ),
    "of another salt": ([(b"x", A)], (b"y", A), 0),
    "without a salt": ([(b"x", A)], (b"", A), 0),
    "of a longer salt": ([(b"x", A)], (b"x\0", A), 0),
    "behind a salt like their tokens": ([(b"", A + B)], (array("i", A).tobytes(), B), 0),
    "behind a salt like their tokens, in 64 bits": (
        [(b"", A + B)],
        (array("q", A).tobytes(), B),
        0,
    ),
    "behind another page of another salt": ([(b"x", A + B), (b"y", A)], (b"y", A + B), 1),
}
"""What is known, what is asked for, and how many pages of it are known."""


class SameDigest:
    """A hash object of hashlib that has the same digest for all data."""

    digest_size, block_size, name = 32, 64, "same"

    def __init__(self, *data: Any, **options: Any):
        pass

    def update(self, data: Any) -> None:
        pass

    def digest(self, length: int = 32) -> bytes:
        return bytes(length)

    def hexdigest(self, length: int = 32) -> str:
        return bytes(length).hex()

    def copy(self) -> "SameDigest":
        return self


@contextmanager
def equal_hashes(plugin: Any) -> Iterator[None]:
    """Python's hash functions return the same for all data, also where the plugin's package has
    imported them by name."""
    constants: dict[tuple[ModuleType, str], Callable[..., Any]] = {
        (builtins, "hash"): lambda value: 0,
        **{(hashlib, name): SameDigest for name in ("new", *hashlib.algorithms_guaranteed)},
        **{
            (module, name): lambda data, value=0: 0
            for module, name in ((zlib, "crc32"), (zlib, "adler32"), (binascii, "crc32"))
        },
    }
    replaced = [(getattr(*where), constant) for where, constant in constants.items()]
    package = getattr(plugin, "__name__", type(plugin).__module__).partition(".")[0]
    modules = [
        module
        for name, module in list(sys.modules.items())
        if module is not None and name.partition(".")[0] == package
    ]
    with pytest.MonkeyPatch.context() as patch:
        for module in modules:
            for name, value in list(vars(module).items()):
                for function, constant in replaced:
                    if value is function:
                        patch.setattr(module, name, constant)
        for (module, name), constant in constants.items():
            patch.setattr(module, name, constant)
        yield


class Unread(Sequence[int]):
    """Token ids of which the first must not be read."""

    def __init__(self, token_ids: Sequence[int], start: int):
        self.token_ids, self.start = token_ids, start

    def __len__(self) -> int:
        return len(self.token_ids)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[int]: ...
    def __getitem__(self, index: int | slice) -> int | Sequence[int]:
        read = range(len(self))[index]
        first = read if isinstance(read, int) else min(read, default=self.start)
        assert first >= self.start, f"token {first} was committed before and must not be read again"
        return self.token_ids[index]


# --- what calls cost ------------------------------------------------------------------------------


def instructions(call: Callable[[], object]) -> int:
    """Number of bytecode instructions that a call runs."""
    number = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal number
        frame.f_trace_opcodes = True
        number += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return number


def memory(call: Callable[[], object]) -> tuple[int, int]:
    """Bytes that a call leaves allocated, and that it has allocated at most."""
    traced = tracemalloc.is_tracing()
    if not traced:
        tracemalloc.start()
    try:
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        kept = call()  # what it returns is still there when the memory is read
        after, peak = tracemalloc.get_traced_memory()
        del kept
    finally:
        if not traced:
            tracemalloc.stop()
    return after - before, peak - before


def life(cache: KvAllocator, token_ids: Sequence[int]) -> None:
    """All calls of two requests with the same tokens, of three pages."""
    found = cache.allocate("x", token_ids, max_cached=0)
    for to_tokens in range(found, len(token_ids) + 1):
        cache.extend("x", to_tokens)
    cache.truncate("x", len(token_ids) - PAGE_SIZE)
    cache.extend("x", len(token_ids))
    cache.pages("x")
    cache.commit("x", token_ids)
    cache.allocate("y", token_ids, max_cached=len(token_ids))
    cache.extend("y", len(token_ids))
    cache.free("x")
    cache.free("y")


def cost(make: Make, num_pages: int, known: bool) -> tuple[int, int]:
    """Instructions, and bytes at most, of the calls of two requests.

    Half of the pages are held by other requests; the rest is free, or evictable if they are known.
    """
    cache = make(num_pages)
    for number in range(num_pages // 4):
        (compute if known else hold)(cache, str(number), text(4 * PAGE_SIZE, 100 * number))
    for number in range(0, num_pages // 4, 2):
        cache.free(str(number))
    fresh = itertools.count(10**6, 100)

    def calls() -> Callable[[], None]:
        return partial(life, cache, text(3 * PAGE_SIZE, next(fresh)))

    # The least of some, because a list or dictionary that grows is copied now and then.
    return (
        min(instructions(calls()) for _ in range(4)),
        min(memory(calls())[1] for _ in range(4)),
    )


# --- the suite ------------------------------------------------------------------------------------


class KvAllocatorSuite(PluginSuite):
    """Checks one KV allocator against ``create_kv_allocator`` and
    ``tilewright.types.KvAllocator``."""

    kind: ClassVar[str] = "kv_allocator"

    @pytest.fixture
    def make(self, implementation: Implementation) -> Make:
        def make(num_pages: int = 12, page_size: int = PAGE_SIZE) -> KvAllocator:
            made: KvAllocator = implementation.call(
                "create_kv_allocator",
                num_pages=num_pages,
                page_size=page_size,
                options=implementation.options,
            )
            return made

        return make

    @pytest.fixture
    def make_sharing(self, make: Make) -> Make:
        """The same, for the tests of what is shared."""
        if not shares(make):
            pytest.skip("it shares no pages: after a commit, allocate of the same tokens found 0")
        return make

    # --- pages -----------------------------------------------------------------------------------

    @pytest.mark.parametrize(("num_pages", "page_size"), [(1, 1), (7, 5), (12, 16)])
    def test_it_has_the_requested_pages_and_all_are_free(
        self, make: Make, num_pages: int, page_size: int
    ) -> None:
        cache = make(num_pages, page_size)
        found = cache.total_pages, cache.page_size
        assert found == (num_pages, page_size), (
            f"total_pages and page_size must be the requested {num_pages} and {page_size}, found "
            f"{found[0]} and {found[1]}"
        )
        counts(cache, num_pages, 0, "before the first request")
        hold(cache, "a", text(num_pages * page_size))
        counts(cache, 0, 0, "when one request holds all pages")
        pages = list(cache.pages("a"))
        assert sorted(pages) == list(range(num_pages)), (
            f"the pages must be 0 to {num_pages - 1}, each once, found {pages}"
        )
        cache.check_integrity()

    def test_allocate_takes_no_page(self, make: Make) -> None:
        cache = make()
        found = cache.allocate("a", text(3 * PAGE_SIZE), max_cached=3 * PAGE_SIZE)
        assert found == 0, f"nothing is known yet, but allocate found {found} tokens"
        assert not len(cache.pages("a")), (
            f"a request must begin with the known pages only, found {list(cache.pages('a'))}"
        )
        counts(cache, 12, 0, "after allocate")

    def test_a_refused_allocate_changes_nothing(self, make: Make) -> None:
        cache = make()
        cache.allocate("a", text(3), max_cached=0)
        hold(cache, "b", text(PAGE_SIZE + 1))
        for what, call in (
            ("allocate of a request that exists", partial(cache.allocate, "b", text(3))),
            ("allocate of a request without pages", partial(cache.allocate, "a", text(3))),
            ("allocate without tokens", partial(cache.allocate, "c", [])),
        ):
            refused(cache, ValueError, what, partial(call, max_cached=9), ["a", "b"])
        what = "pages of a request that was refused"
        refused(cache, KeyError, what, lambda: cache.pages("c"))

    def test_extend_gives_pages_for_a_requests_first_tokens(self, make: Make) -> None:
        cache = make()
        cache.allocate("other", [1], max_cached=0)
        cache.allocate("a", text(2), max_cached=0)
        pages: list[int] = []
        steps = (0, 1, 2, PAGE_SIZE, PAGE_SIZE + 1, 4 * PAGE_SIZE, 4 * PAGE_SIZE + 1)
        for others, to_tokens in enumerate(steps):
            cache.extend("a", to_tokens)
            found, expected = list(cache.pages("a")), math.ceil(to_tokens / PAGE_SIZE)
            assert len(found) == expected, (
                f"{to_tokens} tokens need {expected} pages of {PAGE_SIZE}, found {len(found)}"
            )
            assert found[: len(pages)] == pages, (
                f"extend must keep the pages {pages} in their order, found {found}"
            )
            pages = found
            counts(cache, 12 - others - len(pages), 0, f"with {others + len(pages)} pages held")
            cache.extend("other", (others + 1) * PAGE_SIZE)
        cache.check_integrity()

    def test_extend_to_what_is_there_or_less_changes_nothing(self, make: Make) -> None:
        cache = make()
        hold(cache, "a", text(2 * PAGE_SIZE + 1))
        before = state(cache, ["a"])
        for to_tokens in (3 * PAGE_SIZE, 2 * PAGE_SIZE + 1, PAGE_SIZE, 1, 0):
            cache.extend("a", to_tokens)
            assert state(cache, ["a"]) == before, (
                f"the request has pages for {3 * PAGE_SIZE} tokens, but extend to {to_tokens} "
                "changed the state"
            )
        cache.check_integrity()

    def test_a_refused_extend_changes_nothing(self, make: Make) -> None:
        cache = make()
        hold(cache, "a", text(2 * PAGE_SIZE))
        hold(cache, "b", text(8 * PAGE_SIZE, 100))
        for error, name, to_tokens in (
            (KeyError, "unknown", 1),
            (OutOfPagesError, "a", 4 * PAGE_SIZE + 1),
            (OutOfPagesError, "a", 10**9),
        ):
            what = f"extend({name!r}, {to_tokens})"
            refused(cache, error, what, partial(cache.extend, name, to_tokens), ["a", "b"])
        cache.extend("a", 4 * PAGE_SIZE)
        counts(cache, 0, 0, "when requests hold all pages")

    def test_requests_do_not_share_pages_that_they_write(self, make: Make) -> None:
        cache, same = make(), text(PAGE_SIZE + 1)
        for name in ("", "b", "c" * 500, "d\n\0"):
            hold(cache, name, same)
        cache.extend("b", 4 * PAGE_SIZE)
        pages = [p for name in ("", "b", "c" * 500, "d\n\0") for p in cache.pages(name)]
        assert len(set(pages)) == len(pages) == 10, f"two requests write to a page: {pages}"
        assert set(pages) <= set(range(12)), f"pages must be 0 to 11, found {sorted(pages)}"
        counts(cache, 2, 0, "when requests hold 10 of 12 pages")

    def test_truncate_releases_the_pages_behind_the_tokens(self, make: Make) -> None:
        cache = make()
        hold(cache, "a", text(4 * PAGE_SIZE))
        pages = list(cache.pages("a"))
        for to_tokens in (5 * PAGE_SIZE, 4 * PAGE_SIZE, 3 * PAGE_SIZE + 1, 3 * PAGE_SIZE, 1, 0):
            cache.truncate("a", to_tokens)
            keep, found = min(4, math.ceil(to_tokens / PAGE_SIZE)), list(cache.pages("a"))
            assert found == pages[:keep], (
                f"truncated to {to_tokens} tokens, a request with pages {pages} must keep the "
                f"first {keep}, found {found}"
            )
            counts(cache, 12 - keep, 0, f"with {keep} pages held")
            cache.check_integrity()
        what = "truncate of an unknown request"
        refused(cache, KeyError, what, lambda: cache.truncate("unknown", 0), ["a"])

    def test_a_truncated_request_can_be_extended_again(self, make: Make) -> None:
        cache = make(4)
        hold(cache, "a", text(3 * PAGE_SIZE))
        pages = list(cache.pages("a"))
        cache.truncate("a", PAGE_SIZE)
        hold(cache, "b", text(2 * PAGE_SIZE, 100))
        cache.extend("a", 2 * PAGE_SIZE)
        found, others = list(cache.pages("a")), list(cache.pages("b"))
        assert (found[:1], len(found)) == (pages[:1], 2), (
            f"truncated to 1 page and extended to 2, the request must have page {pages[0]} and "
            f"another, found {found}"
        )
        assert not set(found) & set(others), f"two requests write to a page: {found}, {others}"
        refused(
            cache,
            OutOfPagesError,
            "extend beyond all pages",
            lambda: cache.extend("a", 2 * PAGE_SIZE + 1),
            ["a", "b"],
        )

    def test_freed_pages_are_reused(self, make: Make) -> None:
        cache = make(6)
        for turn in range(20):
            for name, num_tokens in (("a", 12), ("b", 2), ("c", 7)):
                hold(cache, name, text(num_tokens))
            for name in ("b", "a", "c") if turn % 2 else ("a", "c", "b"):
                cache.free(name)
            counts(cache, 6, 0, "without requests and commits")
            cache.check_integrity()

    def test_unknown_and_freed_requests_are_refused(self, make: Make) -> None:
        cache = make()
        hold(cache, "held", text(5))
        hold(cache, "freed", text(5))
        cache.free("freed")
        for name in ("unknown", "freed"):
            for what, call in (
                ("free", lambda name=name: cache.free(name)),
                ("pages", lambda name=name: cache.pages(name)),
                ("extend", lambda name=name: cache.extend(name, 1)),
                ("truncate", lambda name=name: cache.truncate(name, 0)),
                ("commit", lambda name=name: cache.commit(name, [])),
            ):
                refused(cache, KeyError, f"{what} of {name!r}", call, ["held"])
        hold(cache, "freed", text(5))

    def test_two_allocators_are_independent(self, make: Make) -> None:
        one, other = make(), make()
        compute(one, "a", text(3 * PAGE_SIZE))
        counts(other, 12, 0, "for another allocator's request")
        refused(other, KeyError, "pages of another allocator's request", lambda: other.pages("a"))
        found = hold(other, "a", text(3 * PAGE_SIZE))
        assert found == 0, f"one allocator found {found} tokens that another one knows"
        other.free("a")
        assert len(one.pages("a")) == 3, "one allocator changed a request of another"

    def test_a_refused_commit_changes_nothing(self, make: Make) -> None:
        cache, tokens = make(), text(2 * PAGE_SIZE + 1)
        hold(cache, "a", tokens[:-1])
        what = f"commit of {len(tokens)} tokens to 2 pages"
        refused(cache, ValueError, what, lambda: cache.commit("a", tokens), ["a"])
        assert not found_pages(cache, tokens), f"{what} was refused, but made pages known"
        cache.free("a")
        counts(cache, 12, 0, "after a commit that was refused")

    def test_random_calls_agree_with_a_reference_model(self, make: Make) -> None:
        sharing = shares(make)
        run_random_calls(lambda: AllocatorMachine(make, sharing), max_examples=150, calls=40)

    # --- known pages -----------------------------------------------------------------------------

    @pytest.mark.parametrize("freed", [False, True], ids=["held", "freed"])
    def test_committed_pages_are_found(self, make_sharing: Make, freed: bool) -> None:
        cache, tokens = make_sharing(), text(2 * PAGE_SIZE)
        compute(cache, "a", tokens)
        pages = list(cache.pages("a"))
        if freed:
            cache.free("a")
        counts(cache, 10, 2 * freed, "with two known pages")
        found = cache.allocate("b", [*tokens, 1, 2], max_cached=100)
        assert (found, list(cache.pages("b"))) == (len(tokens), pages), (
            f"allocate must find {len(tokens)} tokens in pages {pages}, found {found} in "
            f"{list(cache.pages('b'))}"
        )
        counts(cache, 10, 0, "when a request holds the known pages")
        cache.extend("b", 3 * PAGE_SIZE)
        assert list(cache.pages("b"))[:2] == pages, "extend must keep the pages that were found"
        counts(cache, 9, 0, "when the request has one page more")
        cache.check_integrity()

    @pytest.mark.parametrize("max_cached", [0, 3, 4, 5, 8, 11, 12, 10**9])
    def test_at_most_max_cached_tokens_are_found(self, make_sharing: Make, max_cached: int) -> None:
        cache, tokens = make_sharing(), text(3 * PAGE_SIZE + 1)
        compute(cache, "a", tokens)
        found = cache.allocate("b", tokens, max_cached=max_cached)
        expected = min(3, max_cached // PAGE_SIZE)
        assert (found, len(cache.pages("b"))) == (expected * PAGE_SIZE, expected), (
            f"with max_cached = {max_cached}, {expected} of 3 known pages of {PAGE_SIZE} tokens "
            f"must be found, found {found} tokens in {len(cache.pages('b'))}"
        )
        cache.free("a")
        counts(cache, 8 + 1, 3 - expected, f"when a request holds {expected} of 3 known pages")

    @pytest.mark.parametrize("num_tokens", [1, 4, 5, 8, 9, 11, 12, 13])
    def test_one_token_at_least_is_left_to_compute(
        self, make_sharing: Make, num_tokens: int
    ) -> None:
        cache, tokens = make_sharing(), text(20)
        compute(cache, "a", tokens)
        found = cache.allocate("b", tokens[:num_tokens], max_cached=num_tokens)
        expected = (num_tokens - 1) // PAGE_SIZE * PAGE_SIZE
        assert found == expected, (
            f"of {num_tokens} tokens, all known in pages of {PAGE_SIZE}, {expected} must be found, "
            f"found {found}"
        )

    def test_only_full_pages_become_known(self, make_sharing: Make) -> None:
        cache, tokens = make_sharing(), text(2 * PAGE_SIZE)
        compute(cache, "a", tokens[:-1])
        first, found = list(cache.pages("a"))[:1], found_pages(cache, tokens)
        assert found == first, (
            f"after a commit of {len(tokens) - 1} tokens, only the page {first} must be found, "
            f"found {found}"
        )
        cache.free("a")
        counts(cache, 11, 1, "after one of two pages was full when it was committed")

    def test_pages_that_were_not_committed_are_not_known(self, make_sharing: Make) -> None:
        cache, tokens = make_sharing(), text(3 * PAGE_SIZE)
        hold(cache, "a", tokens)
        cache.commit("a", tokens[:PAGE_SIZE])
        found = found_pages(cache, tokens)
        assert len(found) == 1, (
            f"one of three full pages was committed, but {len(found)} were found"
        )
        cache.free("a")
        counts(cache, 11, 1, "after one of three full pages was committed")

    def test_commits_add_up_and_read_no_token_twice(self, make_sharing: Make) -> None:
        cache, tokens = make_sharing(), text(4 * PAGE_SIZE)
        hold(cache, "a", tokens)
        pages, known = list(cache.pages("a")), 0
        for length in (3, 4, 7, 8, 5, 0, 15, 16, 16):
            cache.commit("a", Unread(tokens[:length], known * PAGE_SIZE))
            known = max(known, length // PAGE_SIZE)
            found = found_pages(cache, tokens)
            assert found == pages[:known], (
                f"{known} pages were committed, {pages[:known]}, found {found}"
            )
        compute(cache, "b", [*tokens[:PAGE_SIZE], *text(4, 50)])
        cache.commit("b", Unread([*tokens[:PAGE_SIZE], *text(4, 50)], 2 * PAGE_SIZE))
        cache.check_integrity()

    def test_pages_committed_behind_pages_that_were_found_are_known(
        self, make_sharing: Make
    ) -> None:
        cache, tokens = make_sharing(), text(4 * PAGE_SIZE)
        compute(cache, "a", tokens[: 2 * PAGE_SIZE])
        hold(cache, "b", tokens)
        cache.commit("b", Unread(tokens, 2 * PAGE_SIZE))
        pages = list(cache.pages("b"))
        cache.free("a")
        found = found_pages(cache, tokens)
        assert found == pages, f"pages {pages} were found or committed, found {found}"
        cache.free("b")
        counts(cache, 8, 4, "after two requests with two pages in common")
        found = found_pages(cache, tokens)
        assert found == pages, f"freed pages must stay known: {pages}, found {found}"

    @pytest.mark.parametrize(
        "sequence", [list, tuple, partial(array, "q")], ids=["list", "tuple", "array"]
    )
    def test_any_sequence_of_token_ids_will_do(
        self, make_sharing: Make, sequence: Callable[[Sequence[int]], Sequence[int]]
    ) -> None:
        cache, tokens = make_sharing(), text(2 * PAGE_SIZE)
        given = [sequence(tokens) for _ in range(2)]
        hold(cache, "a", given[0])
        cache.commit("a", given[1])
        for of in (list, tuple, partial(array, "i")):
            found = found_pages(cache, of(tokens))
            assert len(found) == 2, f"two known pages must be found, found {len(found)}"

    def test_a_callers_list_can_change_afterwards(self, make_sharing: Make) -> None:
        cache, tokens = make_sharing(), text(2 * PAGE_SIZE)
        begun, committed = list(tokens), list(tokens)
        hold(cache, "a", begun)
        begun[:] = text(2 * PAGE_SIZE, 100)
        cache.commit("a", committed)
        committed[:] = begun
        assert not found_pages(cache, begun), (
            "allocate found tokens that were put into the caller's list after the commit"
        )
        assert len(found_pages(cache, tokens)) == 2, (
            "the committed tokens must be found, although the caller's list has changed"
        )

    @pytest.mark.parametrize("case", MISTAKABLE)
    def test_tokens_are_not_taken_for_others(self, make_sharing: Make, case: str) -> None:
        known, (salt, tokens), expected = MISTAKABLE[case]
        cache = make_sharing()
        for number, (other, committed) in enumerate(known):
            compute(cache, str(number), committed, other)
        found = found_pages(cache, tokens, salt)
        assert len(found) == expected, (
            f"of tokens {tokens} with salt {salt!r}, {expected} pages are known where {known} was "
            f"committed, found {len(found)}"
        )
        for number, (other, committed) in enumerate(known):
            pages, found = list(cache.pages(str(number))), found_pages(cache, committed, other)
            assert found == pages, f"the committed tokens {committed} are in {pages}, found {found}"

    def test_when_all_hashes_are_equal_tokens_are_not_taken_for_others(
        self, make_sharing: Make, implementation: Implementation
    ) -> None:
        for case, (known, (salt, tokens), expected) in MISTAKABLE.items():
            with equal_hashes(implementation.plugin):
                cache = make_sharing()
                for number, (other, committed) in enumerate(known):
                    compute(cache, str(number), committed, other)
                found = found_pages(cache, tokens, salt)
            # A page may be missed when all hashes are equal; a wrong one must not be found.
            assert len(found) <= expected, (
                f"when all hashes are equal, {len(found)} pages were found for tokens {case}, of "
                f"which {expected} are known: compare tokens, not only hashes"
            )

    def test_requests_with_one_salt_share_pages(self, make_sharing: Make) -> None:
        cache, tokens = make_sharing(), text(2 * PAGE_SIZE)
        pages = {}
        for name, salt in (("a", b""), ("b", b"one"), ("c", bytes(100))):
            assert not compute(cache, name, tokens, salt), "tokens of another salt were found"
            pages[salt] = list(cache.pages(name))
        for salt, expected in pages.items():
            found = found_pages(cache, tokens, salt)
            assert found == expected, (
                f"pages {expected} are known with salt {salt!r}, found {found}"
            )
        cache.allocate("d", [*tokens, 1], max_cached=100)
        assert list(cache.pages("d")) == pages[b""], "a request without a salt has the salt b''"

    # --- pages with several holders --------------------------------------------------------------

    def test_a_shared_page_outlives_each_of_its_holders(self, make_sharing: Make) -> None:
        cache, tokens = make_sharing(8), text(2 * PAGE_SIZE)
        compute(cache, "a", tokens)
        for name in ("b", "c"):
            hold(cache, name, [*tokens, 1])
        pages = list(cache.pages("a"))
        for name, holders in (("a", 2), ("c", 1)):
            cache.free(name)
            cache.check_integrity()
            counts(cache, 6 - holders, 0, f"while {holders} requests hold the shared pages")
        hold(cache, "rest", text(5 * PAGE_SIZE, 100))
        counts(cache, 0, 0, "when requests hold all pages")
        what = "extend when all pages are held"
        call = partial(cache.extend, "rest", 5 * PAGE_SIZE + 1)
        refused(cache, OutOfPagesError, what, call, ["b", "rest"])
        held = list(cache.pages("b"))
        assert held[:2] == pages, f"the pages {pages} of a request became {held[:2]}"
        assert not set(held) & set(cache.pages("rest")), "a page was taken that a request holds"
        found = found_pages(cache, tokens)
        assert found == pages, f"pages that are held must stay known: {pages}, found {found}"
        cache.free("b")
        counts(cache, 1, 2, "when the last request has freed the shared pages")

    def test_only_full_committed_pages_are_shared(self, make_sharing: Make) -> None:
        cache, tokens = make_sharing(), text(PAGE_SIZE + 2)
        compute(cache, "a", tokens)
        for name in ("b", "c"):
            found = hold(cache, name, [*tokens, 1])
            assert found == PAGE_SIZE, f"one full page must be found, found {found} tokens"
        first = {cache.pages(name)[0] for name in "abc"}
        rest = [page for name in "abc" for page in list(cache.pages(name))[1:]]
        assert len(first) == 1, f"the full page must be shared, found {first}"
        assert len(set(rest)) == 3, f"two requests write to a page: {rest}"
        assert not first & set(rest), "a request writes to a shared page"
        counts(cache, 8, 0, "with one shared page and three others")

    def test_truncate_keeps_what_was_found_or_committed(self, make_sharing: Make) -> None:
        cache, tokens = make_sharing(), text(5 * PAGE_SIZE)
        compute(cache, "a", tokens[: 2 * PAGE_SIZE])
        hold(cache, "b", tokens)
        for to_tokens in (2 * PAGE_SIZE - 1, 1, 0):
            what = f"truncate to {to_tokens} of {2 * PAGE_SIZE} tokens that were found"
            refused(cache, ValueError, what, partial(cache.truncate, "b", to_tokens), ["a", "b"])
        cache.commit("b", tokens[: 3 * PAGE_SIZE + 2])
        for to_tokens in (3 * PAGE_SIZE - 1, 2 * PAGE_SIZE):
            what = f"truncate to {to_tokens} of {3 * PAGE_SIZE} tokens in committed pages"
            refused(cache, ValueError, what, partial(cache.truncate, "b", to_tokens), ["a", "b"])
        pages = list(cache.pages("b"))
        for to_tokens, keep in ((3 * PAGE_SIZE + 1, 4), (3 * PAGE_SIZE, 3)):
            cache.truncate("b", to_tokens)
            assert list(cache.pages("b")) == pages[:keep], (
                f"truncated to {to_tokens} tokens, {pages} must become {pages[:keep]}, found "
                f"{list(cache.pages('b'))}"
            )
        counts(cache, 9, 0, "when truncate has released what was not committed")

    def test_truncated_pages_are_known_by_what_is_committed_later(self, make_sharing: Make) -> None:
        cache, rejected = make_sharing(), text(3 * PAGE_SIZE)
        hold(cache, "a", rejected)
        cache.commit("a", rejected[: PAGE_SIZE + 3])
        cache.truncate("a", PAGE_SIZE + 1)
        tokens = [*rejected[: PAGE_SIZE + 1], *text(2 * PAGE_SIZE - 1, 50)]
        cache.extend("a", len(tokens))
        cache.commit("a", tokens)
        found = found_pages(cache, tokens)
        assert found == list(cache.pages("a")), (
            f"the committed pages {list(cache.pages('a'))} must be found, found {found}"
        )
        found = found_pages(cache, rejected)
        assert len(found) == 1, f"{len(found)} pages of tokens that were not committed were found"

    @pytest.mark.parametrize("first", ["a", "b"])
    def test_of_pages_with_one_content_the_first_committed_is_found(
        self, make_sharing: Make, first: str
    ) -> None:
        cache, tokens = make_sharing(), text(2 * PAGE_SIZE)
        for name in ("a", "b"):
            hold(cache, name, tokens)
        second = "b" if first == "a" else "a"
        for name in (first, second):
            cache.commit(name, tokens)
        pages, others = list(cache.pages(first)), list(cache.pages(second))
        assert not set(pages) & set(others), "commit must not change a request's pages"
        found = found_pages(cache, tokens)
        assert found == pages, f"the pages {pages} were committed first, found {found}"
        cache.free(second)
        found = found_pages(cache, tokens)
        assert found == pages, f"the pages {pages} were committed first, found {found}"
        cache.check_integrity()

    def test_all_pages_with_one_content_stay_known(self, make_sharing: Make) -> None:
        cache, tokens = make_sharing(6), text(3 * PAGE_SIZE)
        for name in ("a", "b"):
            hold(cache, name, tokens)
        cache.commit("a", tokens[: 2 * PAGE_SIZE])
        cache.commit("b", tokens)
        first, second = list(cache.pages("a")), list(cache.pages("b"))
        cache.free("a")
        counts(cache, 1, 2, "when one of two requests with one content is freed")
        hold(cache, "c", text(3 * PAGE_SIZE, 100))
        found = found_pages(cache, tokens)
        assert found == second, (
            f"the pages {first[:2]} were taken, but {second} are known by the same content: found "
            f"{found}"
        )
        cache.free("b")
        cache.free("c")
        counts(cache, 3, 3, "when a request whose pages are known is freed")
        hold(cache, "d", text(6 * PAGE_SIZE, 200))
        assert not found_pages(cache, tokens), "pages were found that another request has taken"
        cache.check_integrity()

    # --- taking known pages ----------------------------------------------------------------------

    def test_known_pages_are_taken_only_when_none_is_free(self, make_sharing: Make) -> None:
        cache, tokens = make_sharing(8), text(3 * PAGE_SIZE)
        compute(cache, "a", tokens)
        cache.free("a")
        for extra in range(1, 6):
            hold(cache, str(extra), [extra])
            counts(cache, 5 - extra, 3, f"with {extra} requests of one page")
        assert len(found_pages(cache, tokens)) == 3, "a known page was taken while some were free"
        cache.allocate("b", [1], max_cached=0)
        refused(
            cache,
            OutOfPagesError,
            "extend to one page more than are evictable",
            lambda: cache.extend("b", 3 * PAGE_SIZE + 1),
            ["b"],
        )
        assert len(found_pages(cache, tokens)) == 3, "extend was refused, but forgot a known page"
        cache.extend("b", 3 * PAGE_SIZE)
        counts(cache, 0, 0, "when requests hold all pages")
        assert not found_pages(cache, tokens), "pages were found that another request has taken"
        cache.free("b")
        counts(cache, 3, 0, "when pages that were taken are freed without a commit")
        assert not found_pages(cache, tokens), "pages were found that another request has taken"

    @pytest.mark.parametrize("taken", range(5))
    def test_a_requests_last_pages_are_taken_before_its_first(
        self, make_sharing: Make, taken: int
    ) -> None:
        cache, tokens = make_sharing(4), text(4 * PAGE_SIZE)
        compute(cache, "a", tokens)
        pages = list(cache.pages("a"))
        cache.free("a")
        hold(cache, "b", text(taken * PAGE_SIZE or 1, 100))
        if not taken:
            return
        found = found_pages(cache, tokens)
        assert found == pages[: 4 - taken], (
            f"when {taken} pages of {pages} are taken, {pages[: 4 - taken]} must stay known, found "
            f"{found}"
        )

    @pytest.mark.parametrize("taken", range(1, 10))
    def test_pages_that_were_freed_first_are_taken_first(
        self, make_sharing: Make, taken: int
    ) -> None:
        cache = make_sharing(9)
        texts = {name: text(3 * PAGE_SIZE, 100 * i) for i, name in enumerate("abc")}
        for name, tokens in texts.items():
            compute(cache, name, tokens)
        for name in ("b", "a", "c"):
            cache.free(name)
        # A find puts pages to the end: the two of b that are found, while its last one stays.
        cache.allocate("d", texts["b"], max_cached=2 * PAGE_SIZE)
        cache.free("d")
        hold(cache, "e", text(taken * PAGE_SIZE, 1000))
        order = [("b", 2), ("a", 2), ("a", 1), ("a", 0), ("c", 2), ("c", 1), ("c", 0)]
        order += [("b", 1), ("b", 0)]
        for name, tokens in texts.items():
            gone = [number for of, number in order[:taken] if of == name]
            expected, found = min(gone, default=3), len(found_pages(cache, tokens))
            assert found == expected, (
                f"requests of three pages were freed in the order b, a, c, then b was found again "
                f"but for its last page: when {taken} of 9 pages are taken, {expected} of {name} "
                f"must stay known, found {found}"
            )

    # --- cost and integrity ----------------------------------------------------------------------

    @pytest.mark.parametrize("known", [False, True], ids=["free", "known"])
    def test_the_cost_of_a_call_does_not_grow_with_the_cache(self, make: Make, known: bool) -> None:
        few, many = 64, 8192
        small, large = cost(make, few, known), cost(make, many, known)
        assert large[0] <= 2 * small[0] + 100, (
            f"the same calls run {small[0]} bytecode instructions in a cache of {few} pages and "
            f"{large[0]} in one of {many}"
        )
        assert large[1] <= small[1] + many, (
            f"the same calls allocate {small[1]} bytes in a cache of {few} pages and {large[1]} in "
            f"one of {many}"
        )

    def test_the_memory_for_a_page_does_not_grow_with_the_request(self, make: Make) -> None:
        num_pages, page_size = 1024, 16
        tokens = text(num_pages * page_size)

        def filled() -> KvAllocator:
            cache = make(num_pages, page_size)
            compute(cache, "a", tokens)
            return cache

        taken = memory(filled)[0] // num_pages
        assert taken <= 4096, (
            f"the bookkeeping of a page of {page_size} tokens may take 4096 bytes, but takes "
            f"{taken} in a request of {num_pages} pages"
        )

    def test_check_integrity_detects_corruption(self, make: Make) -> None:
        cache = make()
        tokens = text(2 * PAGE_SIZE + 1)
        for name in ("a", "b", "c"):
            compute(cache, name, tokens)
        compute(cache, "freed", text(2 * PAGE_SIZE, 100))
        cache.free("freed")
        cache.check_integrity()
        tried = noticed = 0
        for undo in tamperings(cache):
            tried += 1
            wrong = miscounted(cache, ["a", "b", "c"])
            try:
                cache.check_integrity()
            except Exception as error:  # damaged state may raise anything
                noticed += isinstance(error, AssertionError)
            else:
                assert not wrong, f"check_integrity must raise AssertionError when {wrong}"
            undo()
        if not tried:
            pytest.skip("its page lists are not in attributes that the test can reach")
        cache.check_integrity()
        assert noticed, (
            "check_integrity must raise AssertionError when a page is lost or counted twice, but "
            f"did not for any of {tried} corruptions of the allocator's lists"
        )


def miscounted(cache: KvAllocator, request_ids: Iterable[str]) -> str:
    """What is wrong with a damaged allocator's numbers, in words; empty if they agree."""
    try:
        total, free, evictable, rows = state(cache, request_ids)
    except Exception:  # damaged state may raise anything
        return ""
    held = {page for row in rows.values() for page in row}
    if any(len(set(row)) < len(row) for row in rows.values()):
        return "a request holds a page twice"
    if free + evictable + len(held) != total:
        return f"{free} pages are free, {evictable} evictable and {len(held)} held, of {total}"
    return ""


def tamperings(cache: KvAllocator) -> Iterator[Callable[[], object]]:
    """Corrupt one container of integers after another; the caller undoes each before the next.

    Containers are searched in the allocator's attributes, and in what those hold.
    """
    for found in list(_containers(cache, set())):
        container: Any = found
        if isinstance(container, list | deque | array):
            last = container.pop()
            yield partial(container.append, last)
            container.append(last)
            yield container.pop
        elif isinstance(container, set):
            one = container.pop()
            yield partial(container.add, one)
        else:
            key, value = container.popitem()
            yield partial(container.__setitem__, key, value)


def _containers(thing: Any, seen: set[int], depth: int = 3) -> Iterator[Any]:
    """The lists, deques, arrays, sets and dictionaries of integers that an object holds."""
    passed_by = ModuleType | str | bytes | int | float | type
    if id(thing) in seen or depth < 0 or isinstance(thing, passed_by) or callable(thing):
        return
    seen.add(id(thing))
    if isinstance(thing, dict):
        values = list(thing.values())
    elif isinstance(thing, list | deque | set | tuple | array):
        values = list(thing)
    else:
        named = [n for c in type(thing).__mro__ for n in getattr(c, "__slots__", ())]
        values = [getattr(thing, n, None) for n in [*named, *getattr(thing, "__dict__", ())]]
    if not isinstance(thing, tuple) and (
        _numbers(values) or (isinstance(thing, dict) and _numbers(thing))
    ):
        yield thing
    for value in values:
        yield from _containers(value, seen, depth - 1)


def _numbers(values: Iterable[Any]) -> bool:
    some = list(values)
    return bool(some) and all(isinstance(value, int) for value in some)
