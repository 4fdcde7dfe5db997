"""The paged KV cache: errors and behaviour beyond the contract of every KV allocator."""

import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from tilewright.errors import OutOfPagesError
from tilewright.kv_cache import KvCacheManager, budget
from tilewright.types import KvAllocatorRequest
from tilewright_testing.kv_allocator import AllocatorMachine
from tilewright_testing.kv_allocator import small_spec as spec


def test_random_calls_agree_with_a_reference_model():
    def make(total_pages, **changes):
        changes = {"num_kv_heads": 2, "head_dim": 1} | changes
        return KvCacheManager(spec(**changes), total_pages)

    run_state_machine_as_test(
        lambda: AllocatorMachine(make),
        settings=settings(max_examples=150, stateful_step_count=40, deadline=None),
    )


def test_too_few_free_pages_are_an_error_that_gives_the_numbers():
    cache = KvCacheManager(spec(), total_pages=12)
    cache.allocate("a", 46)
    with pytest.raises(OutOfPagesError, match=r"'b' needs 3 more .* 2 of 12 are free"):
        cache.allocate("b", 11)


@pytest.mark.parametrize(("row_order", "shape"), [("NHD", (7, 5, 3, 4)), ("HND", (7, 3, 5, 4))])
def test_layers_have_the_declared_row_order_and_are_zero_initialised(row_order, shape):
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


def test_storage_that_an_executor_allocates_is_passed_on_unchanged():
    made = []

    def allocate(shape, dtype):
        made.append((shape, dtype))
        return object()

    layers = KvCacheManager(spec(allocate=allocate), total_pages=3).layers()
    assert made == [((3, 5, 3, 4), torch.float32)] * 4
    assert len({id(t) for layer in layers for t in (layer.key, layer.value)}) == 4


def test_a_cache_too_large_to_allocate_is_an_error_that_gives_its_size():
    large = spec(num_kv_heads=2**20, head_dim=2**20, page_size=2**20)
    with pytest.raises(
        OutOfPagesError, match=r"2 pages takes \d+\.0 GiB, which could not be allocated"
    ):
        KvCacheManager(large, total_pages=2)
    for pages in (10**12, 10**25):
        with pytest.raises(
            OutOfPagesError, match=rf"{pages} pages takes .* which could not be allocated"
        ):
            KvCacheManager(spec(), total_pages=pages)


def request(**changes):
    fields = {"total_pages": None, "max_sequences": 3, "max_seq_len": 11, "options": None}
    return KvAllocatorRequest(**{"spec": spec()} | fields | changes)


def test_the_page_budget_is_as_set_or_as_the_sequences_need_within_the_memory_limit():
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
    with pytest.raises(ValueError, match="num_tokens must be at least 0, found -1"):
        cache.extend("a", -1)
    cache.check_integrity()


def test_a_fork_that_would_copy_a_page_in_executor_storage_is_refused():
    cache = KvCacheManager(spec(allocate=lambda shape, dtype: object()), total_pages=4)
    cache.allocate("a", 7)
    with pytest.raises(ValueError, match="'a' cannot be forked at 7 tokens: its partly full page"):
        cache.fork("a", "b")
    assert cache.free_pages == 2
    cache.extend("a", 3)
    cache.fork("a", "b")
    assert cache.block_table(["a"]).tolist() == cache.block_table(["b"]).tolist()
    cache.check_integrity()


def test_the_integrity_check_detects_a_page_with_two_owners():
    cache = KvCacheManager(spec(), total_pages=3)
    cache.allocate("a", 5)
    cache._free.append(cache.block_table(["a"])[0, 0].item())
    with pytest.raises(AssertionError, match="free list differs"):
        cache.check_integrity()
