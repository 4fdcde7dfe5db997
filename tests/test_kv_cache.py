"""The paged KV cache, against a plain dictionary model and its own integrity check."""

import math

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tilewright.errors import OutOfPagesError
from tilewright.kv_cache import KvCacheManager, budget
from tilewright.types import KvAllocatorRequest, KvCacheSpec


def spec(**changes):
    fields = {
        "num_layers": 2,
        "num_kv_heads": 3,
        "head_dim": 4,
        "page_size": 5,
        "dtype": "float32",
    }
    return KvCacheSpec(**fields | changes)


class KvCacheMachine(RuleBasedStateMachine):
    """Random allocate, extend, fork, write and free; a dictionary holds what each request wrote."""

    def __init__(self):
        super().__init__()
        self.cache = KvCacheManager(spec(num_layers=1, num_kv_heads=1, head_dim=1), total_pages=12)
        self.wrote: dict[str, list[float]] = {}
        self.counter = 0

    def write(self, request_id, start):
        """Write a fresh number to each new slot, as an executor writes keys."""
        values = self.wrote[request_id]
        stop = self.cache.num_tokens(request_id)
        flat = self.cache.layers()[0].key.view(-1)
        for slot in self.cache.slots(request_id, start, stop).tolist():
            self.counter += 1
            flat[slot] = self.counter
            values.append(float(self.counter))

    def pages_of(self, num_tokens):
        return math.ceil(num_tokens / 5)

    @rule(n=st.integers(1, 40))
    def allocate(self, n):
        request_id = f"r{self.counter}-{len(self.wrote)}"
        if request_id in self.wrote:
            return
        free = self.cache.free_pages
        if self.pages_of(n) > free:
            with pytest.raises(
                OutOfPagesError, match=f"needs {self.pages_of(n)} more .* {free} of 12"
            ):
                self.cache.allocate(request_id, n)
            assert self.cache.free_pages == free
        else:
            self.cache.allocate(request_id, n)
            assert self.cache.free_pages == free - self.pages_of(n)
            self.wrote[request_id] = []
            self.write(request_id, 0)

    @precondition(lambda self: self.wrote)
    @rule(data=st.data(), n=st.integers(0, 12))
    def extend(self, data, n):
        request_id = data.draw(st.sampled_from(sorted(self.wrote)))
        length = len(self.wrote[request_id])
        needed = self.pages_of(length + n) - self.pages_of(length)
        if needed > self.cache.free_pages:
            with pytest.raises(OutOfPagesError):
                self.cache.extend(request_id, n)
            assert self.cache.num_tokens(request_id) == length
        else:
            self.cache.extend(request_id, n)
            self.write(request_id, length)

    @precondition(lambda self: self.wrote)
    @rule(data=st.data())
    def fork(self, data):
        parent = data.draw(st.sampled_from(sorted(self.wrote)))
        self.counter += 1
        child = f"{parent}+{self.counter}"[-60:]
        if len(self.wrote[parent]) % 5 and not self.cache.free_pages:
            with pytest.raises(OutOfPagesError):
                self.cache.fork(parent, child)
        else:
            self.cache.fork(parent, child)
            self.wrote[child] = list(self.wrote[parent])

    @precondition(lambda self: self.wrote)
    @rule(data=st.data())
    def free(self, data):
        request_id = data.draw(st.sampled_from(sorted(self.wrote)))
        self.cache.free(request_id)
        del self.wrote[request_id]
        with pytest.raises(KeyError):
            self.cache.num_tokens(request_id)

    @invariant()
    def each_request_reads_what_it_wrote(self):
        self.cache.check_integrity()
        flat = self.cache.layers()[0].key.view(-1)
        for request_id, values in self.wrote.items():
            assert self.cache.num_tokens(request_id) == len(values)
            slots = self.cache.slots(request_id, 0, len(values))
            assert slots.dtype == torch.int32
            assert flat[slots.long()].tolist() == values
        if not self.wrote:
            assert self.cache.free_pages == 12

    @invariant()
    def block_tables_and_slots_agree(self):
        ids = sorted(self.wrote)
        table = self.cache.block_table(ids)
        assert table.dtype == torch.int32
        assert table.shape == (
            len(ids),
            max(map(self.pages_of, map(len, self.wrote.values())), default=0),
        )
        for row, request_id in zip(table.tolist(), ids, strict=True):
            n = len(self.wrote[request_id])
            assert all(page == -1 for page in row[self.pages_of(n) :])
            expected = [row[p // 5] * 5 + p % 5 for p in range(n)]
            assert self.cache.slots(request_id, 0, n).tolist() == expected


TestKvCacheMachine = KvCacheMachine.TestCase
TestKvCacheMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize(("row_order", "shape"), [("NHD", (7, 5, 3, 4)), ("HND", (7, 3, 5, 4))])
def test_layers_have_the_declared_row_order_and_start_as_zeros(row_order, shape):
    layers = KvCacheManager(spec(row_order=row_order, dtype="bfloat16"), total_pages=7).layers()
    assert len(layers) == 2
    for layer in layers:
        for tensor in (layer.key, layer.value):
            assert tensor.shape == shape
            assert tensor.dtype == torch.bfloat16
            assert tensor.is_contiguous()
            assert not tensor.any()
    pointers = {t.data_ptr() for layer in layers for t in (layer.key, layer.value)}
    assert len(pointers) == 4


def test_layers_are_the_same_objects_each_time():
    cache = KvCacheManager(spec(), total_pages=2)
    assert cache.layers() is cache.layers()


@pytest.mark.parametrize("row_order", ["NHD", "HND"])
def test_fork_copies_the_partly_full_page_in_every_layer(row_order):
    cache = KvCacheManager(spec(row_order=row_order), total_pages=6)
    cache.allocate("parent", 7)
    for layer in cache.layers():
        layer.key.normal_()
        layer.value.normal_()
    cache.fork("parent", "child")
    ours, theirs = cache.block_table(["parent", "child"]).tolist()
    assert ours[0] == theirs[0]
    assert ours[1] != theirs[1]
    for layer in cache.layers():
        assert torch.equal(layer.key[ours[1]], layer.key[theirs[1]])
        assert torch.equal(layer.value[ours[1]], layer.value[theirs[1]])


def test_an_executors_own_storage_is_passed_on_untouched():
    made = []

    def allocate(shape, dtype):
        made.append((shape, dtype))
        return object()

    layers = KvCacheManager(spec(allocate=allocate), total_pages=3).layers()
    assert made == [((3, 5, 3, 4), torch.float32)] * 4
    assert len({id(t) for layer in layers for t in (layer.key, layer.value)}) == 4


def test_a_cache_that_is_too_large_says_how_large():
    large = spec(num_kv_heads=2**20, head_dim=2**20, page_size=2**20)
    with pytest.raises(OutOfPagesError, match=r"2 pages takes \d+\.0 GiB, which cannot be had"):
        KvCacheManager(large, total_pages=2)
    for pages in (10**12, 10**25):
        with pytest.raises(OutOfPagesError, match=rf"{pages} pages takes .* which cannot be had"):
            KvCacheManager(spec(), total_pages=pages)


def request(**changes):
    fields = {"total_pages": None, "max_sequences": 3, "max_seq_len": 11, "options": None}
    return KvAllocatorRequest(**{"spec": spec()} | fields | changes)


def test_budget_is_what_was_set_or_what_the_sequences_need_within_the_limit():
    assert budget(request(total_pages=2)) == 2
    assert budget(request()) == 3 * 3
    page = 2 * 2 * 3 * 4 * 5 * 4  # keys and values, layers, heads, head size, tokens, bytes
    assert spec().page_bytes == page
    assert budget(request(spec=spec(memory_limit=4 * page + 1))) == 4
    with pytest.raises(
        OutOfPagesError, match=rf"may take {page - 1} bytes, but one page .* {page}"
    ):
        budget(request(spec=spec(memory_limit=page - 1)))


def test_misuse_is_refused():
    cache = KvCacheManager(spec(), total_pages=3)
    cache.allocate("a", 6)
    with pytest.raises(ValueError, match="already has pages"):
        cache.allocate("a", 1)
    with pytest.raises(ValueError, match="at least 1"):
        cache.allocate("b", 0)
    with pytest.raises(IndexError, match="positions 0 to 6; asked for 2 to 7"):
        cache.slots("a", 2, 7)
    with pytest.raises(ValueError, match="already has pages"):
        cache.fork("a", "a")
    with pytest.raises(KeyError):
        cache.extend("b", 1)
    cache.check_integrity()


def test_the_integrity_check_sees_a_page_with_two_owners():
    cache = KvCacheManager(spec(), total_pages=3)
    cache.allocate("a", 5)
    cache._free.append(cache.block_table(["a"])[0, 0].item())
    with pytest.raises(AssertionError, match="free list differs"):
        cache.check_integrity()
