"""The conformance suite of KV allocators, and the reference model that it compares with."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import ModuleType
from typing import Any, ClassVar, Protocol

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor

from tilewright.errors import OutOfPagesError, TilewrightError
from tilewright.types import DTYPES, KvAllocator, KvAllocatorRequest, KvCacheSpec, KvLayer
from tilewright.weights import torch_dtype
from tilewright_testing.models import same_bits
from tilewright_testing.paged import by_slot
from tilewright_testing.suite import Implementation, PluginSuite

PAGE_SIZE = 5

ORDERS = ["NHD", "HND"]


class Make(Protocol):
    """Makes an allocator for a small cache; changed holds fields of its ``KvCacheSpec``."""

    def __call__(
        self,
        total_pages: int | None = 12,
        *,
        max_sequences: int = 4,
        max_seq_len: int = 40,
        **changed: Any,
    ) -> KvAllocator: ...


def small_spec(**changed: Any) -> KvCacheSpec:
    """Two layers of three heads of size 4, in pages of five tokens, in float32."""
    sizes: dict[str, Any] = {
        "num_layers": 2,
        "num_kv_heads": 3,
        "head_dim": 4,
        "page_size": PAGE_SIZE,
        "dtype": "float32",
    }
    return KvCacheSpec(**(sizes | changed))


# --- the model ------------------------------------------------------------------------------------


class AllocatorMachine(RuleBasedStateMachine):
    """Random allocate, extend, fork, write and free; a dictionary holds what each request wrote.

    make: makes an allocator from ``total_pages`` and the spec's ``page_size`` and ``row_order``.
    """

    def __init__(self, make: Callable[..., KvAllocator]):
        super().__init__()
        self.make = make
        self.wrote: dict[str, list[float]] = {}
        self.rows: dict[str, list[int]] = {}
        """Each request's pages."""
        self.counter = 0

    @initialize(
        page_size=st.sampled_from([5, 1, 3]),
        row_order=st.sampled_from(ORDERS),
        total_pages=st.integers(1, 14),
    )
    def begin(self, page_size: int, row_order: str, total_pages: int) -> None:
        self.page_size, self.row_order, self.total_pages = page_size, row_order, total_pages
        self.cache = self.make(total_pages=total_pages, page_size=page_size, row_order=row_order)
        assert self.cache.total_pages == total_pages, (
            f"total_pages must be the requested {total_pages}, found {self.cache.total_pages}"
        )
        assert self.cache.free_pages == total_pages, (
            f"all {total_pages} pages must be free before the first request, found "
            f"{self.cache.free_pages}"
        )

    @rule(n=st.integers(1, 40))
    def allocate(self, n: int) -> None:
        request_id = self._fresh("r")
        if self._pages(n) > self._free():
            self._refused(OutOfPagesError, lambda: self.cache.allocate(request_id, n))
        else:
            self.cache.allocate(request_id, n)
            self.wrote[request_id] = []
            self._write(request_id, n)

    @precondition(lambda self: self.wrote)
    @rule(data=st.data(), n=st.integers(0, 12))
    def extend(self, data: st.DataObject, n: int) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.wrote)))
        length = len(self.wrote[request_id])
        if self._pages(length + n) - self._pages(length) > self._free():
            self._refused(OutOfPagesError, lambda: self.cache.extend(request_id, n))
        else:
            before = self.rows[request_id]
            self.cache.extend(request_id, n)
            self._write(request_id, length + n)
            assert self.rows[request_id][: len(before)] == before, (
                "extend must keep the pages that a request already has: they hold its keys"
            )

    @precondition(lambda self: self.wrote)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        parent = data.draw(st.sampled_from(sorted(self.wrote)))
        child = self._fresh("fork")
        length = len(self.wrote[parent])
        if length % self.page_size and not self._free():
            self._refused(OutOfPagesError, lambda: self.cache.fork(parent, child))
            return
        self.cache.fork(parent, child)
        self.wrote[child] = list(self.wrote[parent])
        self.rows[child] = self._row(child)
        full = length // self.page_size
        assert self.rows[child][:full] == self.rows[parent][:full], "fork must share full pages"

    @precondition(lambda self: self.wrote)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.wrote)))
        self.cache.free(request_id)
        del self.wrote[request_id], self.rows[request_id]
        self._refused(KeyError, lambda: self.cache.num_tokens(request_id))

    @precondition(lambda self: self.wrote)
    @rule(data=st.data())
    def misuse(self, data: st.DataObject) -> None:
        known = data.draw(st.sampled_from(sorted(self.wrote)))
        unknown = self._fresh("unknown")
        length = len(self.wrote[known])
        self._refused(ValueError, lambda: self.cache.allocate(known, 1))
        self._refused(ValueError, lambda: self.cache.fork(known, known))
        self._refused(KeyError, lambda: self.cache.extend(unknown, 1))
        self._refused(KeyError, lambda: self.cache.fork(unknown, self._fresh("child")))
        self._refused(KeyError, lambda: self.cache.free(unknown))
        self._refused(IndexError, lambda: self.cache.slots(known, 0, length + 1))

    @invariant()
    def each_request_reads_what_it_wrote(self) -> None:
        self.cache.check_integrity()
        for request_id, values in self.wrote.items():
            assert self.cache.num_tokens(request_id) == len(values), (
                f"request {request_id!r} must have {len(values)} tokens, found "
                f"{self.cache.num_tokens(request_id)}"
            )
            slots = self.cache.slots(request_id, 0, len(values))
            assert slots.dtype == torch.int32, f"slots must be int32, found {slots.dtype}"
            for sign, tensor in self._storage():
                found = tensor[slots // self.page_size, slots % self.page_size]
                assert (found == found[:, :1, :1]).all(), (
                    "the heads of a slot must be written together"
                )
                assert (found[:, 0, 0] * sign).tolist() == values, (
                    f"the slots of request {request_id!r} must keep what was written to them"
                )

    @invariant()
    def pages_are_free_or_held(self) -> None:
        held = {page for row in self.rows.values() for page in row}
        assert held <= set(range(self.total_pages)), (
            f"pages must be 0 to {self.total_pages - 1}, found {sorted(held)}"
        )
        assert self.cache.free_pages == self._free(), (
            f"free_pages must count the pages that no request holds, {self._free()} of "
            f"{self.total_pages}, found {self.cache.free_pages}"
        )

    @invariant()
    def block_tables_and_slots_agree(self) -> None:
        ids = sorted(self.wrote)
        if not ids:
            return
        table = self.cache.block_table(ids)
        widest = max(self._pages(len(values)) for values in self.wrote.values())
        assert (table.dtype, tuple(table.shape)) == (torch.int32, (len(ids), widest)), (
            f"block_table must be int32 {[len(ids), widest]}, found {table.dtype} "
            f"{list(table.shape)}"
        )
        for row, request_id in zip(table.tolist(), ids, strict=True):
            n, size = len(self.wrote[request_id]), self.page_size
            pages = self._pages(n)
            assert row == self.rows[request_id] + [-1] * (len(row) - pages), (
                f"the row of {request_id!r} must not depend on the other requests of the table"
            )
            assert len(set(row[:pages])) == pages, f"request {request_id!r} has a page twice: {row}"
            expected = [row[p // size] * size + p % size for p in range(n)]
            assert self.cache.slots(request_id, 0, n).tolist() == expected

    def _fresh(self, stem: str) -> str:
        self.counter += 1
        return f"{stem}-{self.counter}"

    def _pages(self, num_tokens: int) -> int:
        return math.ceil(num_tokens / self.page_size)

    def _free(self) -> int:
        return self.total_pages - len({page for row in self.rows.values() for page in row})

    def _row(self, request_id: str) -> list[int]:
        row: list[int] = self.cache.block_table([request_id])[0].tolist()
        return row

    def _storage(self) -> Iterator[tuple[int, Tensor]]:
        """Each tensor as a view by slot, and the sign of the values written to it."""
        for layer in self.cache.layers():
            yield 1, by_slot(layer.key, self.row_order)
            yield -1, by_slot(layer.value, self.row_order)

    def _write(self, request_id: str, stop: int) -> None:
        """Write a fresh number to each new slot, as an executor writes keys and values."""
        self.rows[request_id] = self._row(request_id)
        values = self.wrote[request_id]
        for slot in self.cache.slots(request_id, len(values), stop).tolist():
            self.counter += 1
            for sign, tensor in self._storage():
                tensor[slot // self.page_size, slot % self.page_size] = sign * self.counter
            values.append(float(self.counter))

    def _refused(self, error: type[Exception], call: Callable[[], object]) -> None:
        before = state(self.cache, self.wrote)
        with pytest.raises(error):
            call()
        assert state(self.cache, self.wrote) == before, (
            "a call that raises must not change the allocator's state"
        )


def state(cache: KvAllocator, request_ids: Iterable[str]) -> Any:
    """What an allocator reports about some requests."""
    of = {r: (cache.num_tokens(r), cache.block_table([r]).tolist()) for r in request_ids}
    return cache.total_pages, cache.free_pages, of


# --- the suite ------------------------------------------------------------------------------------


class KvAllocatorSuite(PluginSuite):
    """Checks one KV allocator against ``create_kv_allocator`` and
    ``tilewright.types.KvAllocator``."""

    kind: ClassVar[str] = "kv_allocator"

    @pytest.fixture
    def make(self, implementation: Implementation) -> Make:
        def make(
            total_pages: int | None = 12,
            *,
            max_sequences: int = 4,
            max_seq_len: int = 40,
            **changed: Any,
        ) -> KvAllocator:
            request = KvAllocatorRequest(
                spec=small_spec(**changed),
                total_pages=total_pages,
                max_sequences=max_sequences,
                max_seq_len=max_seq_len,
                options=implementation.options,
            )
            made: KvAllocator = implementation.call("create_kv_allocator", request=request)
            return made

        return make

    # --- size ------------------------------------------------------------------------------------

    @pytest.mark.parametrize("total_pages", [1, 7, 12])
    def test_it_has_the_requested_number_of_pages(self, make: Make, total_pages: int) -> None:
        page = small_spec().page_bytes
        # memory_limit applies only when total_pages is not given.
        for cache in (make(total_pages), make(total_pages, memory_limit=page)):
            assert cache.total_pages == cache.free_pages == total_pages, (
                f"total_pages and free_pages must be the requested {total_pages}, found "
                f"{cache.total_pages} and {cache.free_pages}"
            )
            assert {t.shape[0] for t in _tensors(cache)} == {total_pages}, (
                f"the storage must have total_pages = {total_pages} pages, found "
                f"{sorted({t.shape[0] for t in _tensors(cache)})}"
            )
            cache.allocate("a", total_pages * PAGE_SIZE)
            assert cache.free_pages == 0, (
                f"free_pages must be 0 when one request holds all pages, found {cache.free_pages}"
            )

    def test_without_total_pages_all_sequences_fit_at_max_seq_len(self, make: Make) -> None:
        cache = make(None, max_sequences=3, max_seq_len=11)
        for i in range(3):
            cache.allocate(str(i), 11)
        cache.check_integrity()

    @pytest.mark.parametrize("pages", [1, 4])
    def test_without_total_pages_it_stays_within_the_memory_limit(
        self, make: Make, pages: int
    ) -> None:
        limit = (pages + 1) * small_spec().page_bytes - 1
        cache = make(None, max_sequences=30, max_seq_len=40, memory_limit=limit)
        assert 1 <= cache.total_pages <= pages, (
            f"a memory limit of {limit} bytes allows 1 to {pages} pages, found {cache.total_pages}"
        )
        found = sum(t.nbytes for t in _tensors(cache))
        assert found <= limit, f"the cache may use {limit} bytes, but uses {found}"

    def test_a_memory_limit_below_one_page_is_refused(self, make: Make) -> None:
        too_small = small_spec().page_bytes - 1
        what = "a memory limit below the size of one page"
        _refused(TilewrightError, what, lambda: make(None, memory_limit=too_small))

    # --- storage ---------------------------------------------------------------------------------

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("row_order", ORDERS)
    def test_layers_match_the_spec(self, make: Make, row_order: str, dtype: Any) -> None:
        cache = make(7, row_order=row_order, dtype=dtype)
        rows = (PAGE_SIZE, 3) if row_order == "NHD" else (3, PAGE_SIZE)
        assert len(cache.layers()) == 2, (
            f"layers() must have one entry per layer: 2, found {len(cache.layers())}"
        )
        for layer in cache.layers():
            for tensor in (layer.key, layer.value):
                found = (tuple(tensor.shape), tensor.dtype, tensor.device.type)
                expected = ((7, *rows, 4), torch_dtype(dtype), "cpu")
                assert found == expected, f"storage must be {expected} by the spec, found {found}"
                assert not tensor.any(), "new storage must hold zeros"

    def test_layers_are_the_same_objects_each_time(self, make: Make) -> None:
        cache = make()
        first = list(cache.layers())
        cache.allocate("a", 7)
        assert all(a is b for a, b in zip(first, cache.layers(), strict=True)), (
            "layers() must return the same objects each time: the executor is bound to them once"
        )

    def test_no_two_tensors_share_memory(self, make: Make) -> None:
        tensors = list(_tensors(make()))
        for i, tensor in enumerate(tensors):
            tensor.fill_(i)
        for i, tensor in enumerate(tensors):
            assert (tensor == i).all(), "two tensors of layers() share memory"

    def test_two_allocators_are_independent(self, make: Make) -> None:
        one, other = make(), make()
        one.allocate("a", 12)
        assert other.free_pages == 12, "a request of one allocator took pages of another"
        _refused(
            KeyError, "num_tokens of another allocator's request", lambda: other.num_tokens("a")
        )
        other.allocate("a", 3)
        assert one.num_tokens("a") == 12, "one allocator changed a request of another"
        for tensor in _tensors(one):
            tensor.fill_(1)
        assert not any(t.any() for t in _tensors(other)), "two allocators share storage"

    def test_an_executors_own_storage_is_passed_on_without_being_read(self, make: Make) -> None:
        asked = []

        def allocate(shape: tuple[int, ...], dtype: torch.dtype) -> object:
            asked.append((tuple(shape), dtype))
            made.append(Handle())
            return made[-1]

        made: list[Handle] = []
        cache = make(8, allocate=allocate, row_order="HND", dtype="bfloat16", device="acme:3")
        assert asked == [((8, 3, PAGE_SIZE, 4), torch.bfloat16)] * 4, (
            "allocate must be called once for each layer's keys and once for its values"
        )
        held = [t for layer in cache.layers() for t in (layer.key, layer.value)]
        assert {id(t) for t in held} == {id(t) for t in made}, (
            "layers() must hold the objects that allocate returned, and no others"
        )
        cache.allocate("a", 7)
        cache.extend("a", 20)
        assert cache.slots("a", 3, 9).shape == (6,)
        cache.allocate("b", 2)
        cache.free("a")
        cache.check_integrity()
        assert cache.free_pages == 7, f"7 of 8 pages must be free, found {cache.free_pages}"

    def test_a_fork_that_would_copy_an_executors_own_storage_is_refused(self, make: Make) -> None:
        cache = make(8, allocate=lambda shape, dtype: Handle())
        cache.allocate("a", 7)
        before = state(cache, ["a"])
        what = "a fork that would have to copy a page of an executor's own storage"
        _refused(ValueError, what, lambda: cache.fork("a", "b"))
        assert state(cache, ["a"]) == before, f"{what} must not change the allocator's state"
        cache.check_integrity()
        cache.allocate("b", 1)

    @pytest.mark.parametrize("row_order", ORDERS)
    def test_only_a_fork_writes_to_storage_and_only_to_its_own_page(
        self, make: Make, row_order: str
    ) -> None:
        cache = make(row_order=row_order)
        _fill(cache)
        before = [t.clone() for t in _tensors(cache)]
        cache.allocate("a", 7)
        cache.allocate("b", 12)
        cache.extend("a", 9)
        cache.free("b")
        cache.allocate("c", 8)
        for old, new in zip(before, _tensors(cache), strict=True):
            assert same_bits(old, new), "allocate, extend and free must not write to storage"
        cache.fork("a", "d")
        page = cache.block_table(["d"])[0, -1]
        for old, new in zip(before, _tensors(cache), strict=True):
            old[page] = new[page]
            assert same_bits(old, new), "fork must write only to the page that it copies to"

    # --- requests --------------------------------------------------------------------------------

    def test_random_calls_agree_with_a_reference_model(self, make: Make) -> None:
        def small(**changed: Any) -> KvAllocator:
            return make(num_kv_heads=2, head_dim=1, **changed)

        run_state_machine_as_test(
            lambda: AllocatorMachine(small),  # type: ignore[arg-type]  # only called
            settings=settings(
                max_examples=60,
                stateful_step_count=30,
                deadline=None,
                database=None,
                derandomize=True,
                print_blob=False,
                phases=(Phase.generate, Phase.shrink),
                suppress_health_check=list(HealthCheck),
            ),
        )

    @pytest.mark.parametrize("page_size", [1, 5, 16])
    def test_pages_for_rounds_up(self, make: Make, page_size: int) -> None:
        cache = make(page_size=page_size)
        for n in (0, 1, page_size - 1, page_size, page_size + 1, 10 * page_size):
            found, expected = cache.pages_for(n), math.ceil(n / page_size)
            assert found == expected, f"pages_for({n}) must be {expected}, found {found}"

    def test_a_request_gets_pages_for_its_tokens(self, make: Make) -> None:
        cache = make()
        for n, name in ((1, ""), (PAGE_SIZE, "b"), (PAGE_SIZE + 1, "c" * 500), (2, "d\n\0")):
            free = cache.free_pages
            cache.allocate(name, n)
            assert cache.num_tokens(name) == n, (
                f"the request must have {n} tokens, found {cache.num_tokens(name)}"
            )
            taken = free - cache.free_pages
            assert taken == math.ceil(n / PAGE_SIZE), (
                f"{n} tokens must take {math.ceil(n / PAGE_SIZE)} pages, found {taken}"
            )

    def test_requests_do_not_share_pages(self, make: Make) -> None:
        cache = make()
        for name, n in (("a", 12), ("b", 6), ("c", 5)):
            cache.allocate(name, n)
        cache.extend("b", 9)
        table = cache.block_table(["a", "b", "c"])
        pages = table[table >= 0].tolist()
        assert len(set(pages)) == len(pages) == 7, f"two requests share a page: {table.tolist()}"
        assert set(pages) <= set(range(12)), f"pages must be 0 to 11, found {sorted(pages)}"

    def test_block_tables_are_int32_and_padded(self, make: Make) -> None:
        cache = make()
        cache.allocate("long", 2 * PAGE_SIZE + 1)
        cache.allocate("short", 1)
        table = cache.block_table(["short", "long"])
        found = (table.dtype, tuple(table.shape))
        assert found == (torch.int32, (2, 3)), (
            "block_table must be int32 with one column per page of the longest request, [2, 3], "
            f"found {found}"
        )
        assert table[0, 1:].tolist() == [-1, -1], "rows must be padded with -1"
        assert (table[1] >= 0).all(), "the row of the longest request must not be padded"
        assert cache.block_table(["short"]).shape == (1, 1), (
            "a table must be only as wide as its longest request"
        )
        assert cache.block_table(["long", "short"]).tolist() == table.flip(0).tolist(), (
            "rows must be in the order of the requests"
        )
        what = "block_table of an unknown request"
        _refused(KeyError, what, lambda: cache.block_table(["short", "unknown"]))

    def test_slots_are_int32_and_follow_the_block_table(self, make: Make) -> None:
        cache = make()
        cache.allocate("a", 2)
        cache.allocate("other", 1)
        cache.extend("a", 2 * PAGE_SIZE)
        row = cache.block_table(["a"])[0].tolist()
        n = 2 * PAGE_SIZE + 2
        expected = [row[p // PAGE_SIZE] * PAGE_SIZE + p % PAGE_SIZE for p in range(n)]
        for start, stop in ((0, n), (PAGE_SIZE - 1, PAGE_SIZE + 1), (n - 1, n), (3, 3)):
            slots = cache.slots("a", start, stop)
            found = (slots.dtype, tuple(slots.shape))
            assert found == (torch.int32, (stop - start,)), (
                f"slots must be int32 {[stop - start]}, found {found}"
            )
            assert slots.tolist() == expected[start:stop], (
                "a slot must be page * page_size + offset, with the position's page in the block "
                "table"
            )

    @pytest.mark.parametrize(("start", "stop"), [(0, 8), (-1, 2), (7, 9), (5, 3)])
    def test_positions_outside_a_request_are_refused(
        self, make: Make, start: int, stop: int
    ) -> None:
        cache = make()
        cache.allocate("a", 7)
        what = f"slots of positions {start} to {stop} of 7"
        _refused(IndexError, what, lambda: cache.slots("a", start, stop))
        _refused(KeyError, "slots of an unknown request", lambda: cache.slots("unknown", 0, 1))

    def test_a_refused_allocate_changes_nothing(self, make: Make) -> None:
        cache = make()
        cache.allocate("a", 12)
        before = state(cache, ["a"])
        for error, name, n in (
            (ValueError, "a", 1),
            (ValueError, "b", 0),
            (ValueError, "b", -1),
            (OutOfPagesError, "b", 9 * PAGE_SIZE + 1),
            (OutOfPagesError, "b", 10**9),
        ):
            what = f"allocate({name!r}, {n})"
            _refused(error, what, partial(cache.allocate, name, n))
            assert state(cache, ["a"]) == before, f"{what} was refused, but changed the state"
            cache.check_integrity()
        _refused(
            KeyError, "num_tokens of a request that was refused", lambda: cache.num_tokens("b")
        )
        cache.allocate("b", 9 * PAGE_SIZE)
        assert cache.free_pages == 0, "free_pages must be 0 when requests hold all pages"

    def test_extend_fills_a_page_before_it_takes_another(self, make: Make) -> None:
        cache = make()
        cache.allocate("a", 3)
        slots = cache.slots("a", 0, 3).tolist()
        cache.extend("a", 2)
        assert (cache.num_tokens("a"), cache.free_pages) == (5, 11), (
            f"5 tokens must take 1 page of 5, found {cache.num_tokens('a')} tokens in "
            f"{12 - cache.free_pages} pages"
        )
        cache.extend("a")
        assert (cache.num_tokens("a"), cache.free_pages) == (6, 10), (
            f"6 tokens must take 2 pages of 5, found {cache.num_tokens('a')} tokens in "
            f"{12 - cache.free_pages} pages"
        )
        assert cache.slots("a", 0, 3).tolist() == slots, (
            "extend must keep the slots of earlier tokens"
        )

    def test_a_refused_extend_changes_nothing(self, make: Make) -> None:
        cache = make()
        cache.allocate("a", 7)
        cache.allocate("b", 9 * PAGE_SIZE)
        before = state(cache, ["a", "b"])
        for error, name, n in (
            (KeyError, "unknown", 1),
            (OutOfPagesError, "a", 3 + PAGE_SIZE + 1),
            (OutOfPagesError, "a", 10**9),
        ):
            what = f"extend({name!r}, {n})"
            _refused(error, what, partial(cache.extend, name, n))
            assert state(cache, ["a", "b"]) == before, f"{what} was refused, but changed the state"
            cache.check_integrity()
        cache.extend("a", 3 + PAGE_SIZE)
        assert cache.free_pages == 0, "free_pages must be 0 when requests hold all pages"

    def test_freed_pages_are_reused(self, make: Make) -> None:
        cache = make(6)
        for turn in range(20):
            cache.allocate("a", 12)
            cache.allocate("b", 2)
            cache.allocate("c", 7)
            for name in ("b", "a", "c") if turn % 2 else ("a", "c", "b"):
                cache.free(name)
            assert cache.free_pages == 6, (
                f"all 6 pages must be free without requests, found {cache.free_pages}"
            )
            cache.check_integrity()
        _refused(KeyError, "free of a request that was freed", lambda: cache.free("a"))
        assert cache.free_pages == 6, "free of a request that was freed must not change the state"

    # --- fork ------------------------------------------------------------------------------------

    def test_a_fork_shares_full_pages_and_copies_the_partial_one(self, make: Make) -> None:
        cache = make()
        cache.allocate("a", 2 * PAGE_SIZE + 2)
        cache.fork("a", "b")
        assert cache.num_tokens("b") == 2 * PAGE_SIZE + 2, (
            "a fork must have its parent's number of tokens"
        )
        ours, theirs = cache.block_table(["a", "b"]).tolist()
        assert ours[:2] == theirs[:2], "full pages must be shared"
        assert ours[2] != theirs[2], "a partial page must not be shared: both requests write to it"
        assert cache.free_pages == 12 - 4, (
            "a fork must take one page, for its copy of the partial one"
        )
        cache.allocate("c", PAGE_SIZE)
        cache.fork("c", "d")
        assert cache.free_pages == 12 - 5, "a fork of full pages must not take a page"

    @pytest.mark.parametrize("row_order", ORDERS)
    @pytest.mark.parametrize("length", [2 * PAGE_SIZE + 2, 2 * PAGE_SIZE])
    def test_a_fork_starts_with_its_parents_contents_and_diverges(
        self, make: Make, length: int, row_order: str
    ) -> None:
        cache = make(row_order=row_order)
        _fill(cache)
        cache.allocate("a", length)
        parents = _contents(cache, "a", row_order)
        cache.fork("a", "b")
        for old, new in zip(parents, _contents(cache, "b", row_order), strict=True):
            assert torch.equal(old, new), (
                "a fork must have its parent's keys and values in all layers"
            )
        cache.extend("a", 4)
        cache.extend("b", 4)
        for name, value in (("a", 1.0), ("b", 2.0)):
            slots = cache.slots(name, length, length + 4)
            for tensor in _tensors(cache):
                by_slot(tensor, row_order)[slots // PAGE_SIZE, slots % PAGE_SIZE] = value
        for name, value in (("a", 1.0), ("b", 2.0)):
            for old, new in zip(parents, _contents(cache, name, row_order), strict=True):
                assert torch.equal(old, new[:length]), "the shared tokens were overwritten"
                assert (new[length:] == value).all(), "parent and fork share a slot after the fork"

    def test_a_fork_outlives_its_parent(self, make: Make) -> None:
        cache = make()
        _fill(cache)
        cache.allocate("a", 12)
        parents = _contents(cache, "a", "NHD")
        cache.fork("a", "b")
        cache.fork("b", "c")
        cache.free("a")
        cache.check_integrity()
        # Take all free pages and write to them.
        cache.allocate("d", cache.free_pages * PAGE_SIZE)
        slots = cache.slots("d", 0, cache.num_tokens("d"))
        for tensor in _tensors(cache):
            tensor[slots // PAGE_SIZE, slots % PAGE_SIZE] = 0
        for name in ("b", "c"):
            for old, new in zip(parents, _contents(cache, name, "NHD"), strict=True):
                assert torch.equal(old, new), "pages were reused while a fork held them"
            cache.free(name)
        cache.free("d")
        assert cache.free_pages == 12, "pages must be free once no request holds them"

    def test_a_refused_fork_changes_nothing(self, make: Make) -> None:
        cache = make(4)
        cache.allocate("a", 7)
        cache.allocate("b", 8)
        before = state(cache, ["a", "b"])
        for error, parent, child in (
            (KeyError, "unknown", "c"),
            (ValueError, "a", "b"),
            (ValueError, "a", "a"),
            (OutOfPagesError, "a", "c"),
        ):
            what = f"fork({parent!r}, {child!r})"
            _refused(error, what, partial(cache.fork, parent, child))
            assert state(cache, ["a", "b"]) == before, f"{what} was refused, but changed the state"
            cache.check_integrity()
        cache.free("b")
        cache.fork("a", "c")
        cache.free("a")
        cache.free("c")
        assert cache.free_pages == 4, (
            f"all 4 pages must be free without requests, found {cache.free_pages}"
        )

    # --- integrity -------------------------------------------------------------------------------

    def test_check_integrity_detects_corruption(self, make: Make) -> None:
        cache = make()
        cache.allocate("a", 12)
        cache.fork("a", "b")
        cache.check_integrity()
        tried = noticed = 0
        for undo in tamperings(cache):
            tried += 1
            try:
                cache.check_integrity()
            except Exception as error:  # damaged state may raise anything
                noticed += isinstance(error, AssertionError)
            undo()
        if not tried:
            pytest.skip("its page lists are not in attributes that the test can reach")
        cache.check_integrity()
        assert noticed, (
            "check_integrity must raise AssertionError when a page is lost or counted twice, but "
            f"did not for any of {tried} corruptions of the allocator's lists"
        )


class Handle:
    """Storage on a device that torch does not know: it can only be passed on."""

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("__"):  # used by isinstance and id
            return super().__getattribute__(name)
        raise AssertionError(
            f"the allocator must not read an executor's own storage, but read its {name!r}"
        )


def tamperings(cache: KvAllocator) -> Iterator[Callable[[], None]]:
    """Corrupt one container of integers after another; the caller undoes each before the next.

    Containers are searched in the allocator's attributes, and in what those hold.
    """
    for container in _containers(cache, set()):
        if isinstance(container, Tensor):
            before = container.clone()
            container.view(-1)[-1] += 1
            yield lambda c=container, b=before: c.copy_(b)  # type: ignore[misc]
        elif isinstance(container, list | deque):
            last = container.pop()
            yield lambda c=container, x=last: c.append(x)  # type: ignore[misc]
        elif isinstance(container, set):
            one = container.pop()
            yield lambda c=container, x=one: c.add(x)  # type: ignore[misc]
        else:
            key, number = container.popitem()
            yield lambda c=container, k=key, n=number: c.update({k: n})  # type: ignore[misc]


def _containers(thing: Any, seen: set[int], depth: int = 3) -> Iterator[Any]:
    """The lists, deques, sets, dictionaries and tensors of integers that an object holds."""
    passed_by = KvCacheSpec | KvLayer | ModuleType | str | int | float | type
    if id(thing) in seen or depth < 0 or isinstance(thing, passed_by) or callable(thing):
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        if thing.numel() and not thing.dtype.is_floating_point and thing.is_contiguous():
            yield thing
        return
    if isinstance(thing, dict):
        values = list(thing.values())
    elif isinstance(thing, list | deque | set | tuple):
        values = list(thing)
    else:
        named = [n for c in type(thing).__mro__ for n in getattr(c, "__slots__", ())]
        values = [getattr(thing, n, None) for n in [*named, *getattr(thing, "__dict__", ())]]
    of_numbers = bool(values) and all(isinstance(v, int) for v in values)
    if of_numbers and not isinstance(thing, tuple):
        yield thing
        return
    for value in values:
        yield from _containers(value, seen, depth - 1)


def _tensors(cache: KvAllocator) -> Iterator[Tensor]:
    for layer in cache.layers():
        yield layer.key
        yield layer.value


def _fill(cache: KvAllocator) -> None:
    generator = torch.Generator().manual_seed(0)
    for tensor in _tensors(cache):
        tensor.copy_(torch.randn(tensor.shape, generator=generator))


def _contents(cache: KvAllocator, request_id: str, row_order: str) -> list[Tensor]:
    """A request's keys and values in each layer, [tokens, num_kv_heads, head_dim]."""
    slots = cache.slots(request_id, 0, cache.num_tokens(request_id))
    where = slots // PAGE_SIZE, slots % PAGE_SIZE
    return [by_slot(t, row_order)[where].clone() for t in _tensors(cache)]


def _refused(error: type[Exception], what: str, call: Callable[[], object]) -> None:
    """Fail unless a call raises an error with a one-line message."""
    try:
        call()
    except error as raised:
        text = str(raised)
        assert len(text.splitlines()) == 1, f"an error's message must be one line, found {text!r}"
    else:
        pytest.fail(f"{what} must raise {error.__name__}, but did not", pytrace=False)
