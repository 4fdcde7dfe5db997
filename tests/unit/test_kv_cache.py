"""The paged KV cache: errors and behaviour beyond the contract of every KV allocator."""

import time

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from tilewright.errors import OutOfPagesError
from tilewright.kv_cache import KvCacheManager
from tilewright_testing.kv_allocator import AllocatorMachine, compute, hold, text


def test_random_calls_agree_with_a_reference_model():
    def make(num_pages=12, page_size=4):
        return KvCacheManager(num_pages, page_size)

    run_state_machine_as_test(
        lambda: AllocatorMachine(make, sharing=True),
        settings=settings(max_examples=200, stateful_step_count=50, deadline=None),
    )


def test_too_few_pages_are_an_error_that_gives_the_numbers():
    cache = KvCacheManager(total_pages=12, page_size=5)
    hold(cache, "a", text(41))
    compute(cache, "freed", text(5))
    cache.free("freed")
    cache.allocate("b", text(20), max_cached=0)
    with pytest.raises(
        OutOfPagesError, match=r"'b' needs 4 more .* hold 20 tokens; 3 of 12 can be taken and 2"
    ):
        cache.extend("b", 20)


def test_misuse_is_an_error_that_gives_the_numbers():
    cache = KvCacheManager(total_pages=3, page_size=4)
    compute(cache, "a", text(6))
    with pytest.raises(ValueError, match="'a' exists already: free it"):
        cache.allocate("a", [1], max_cached=0)
    with pytest.raises(ValueError, match="'b' needs at least one token, found none"):
        cache.allocate("b", [], max_cached=0)
    with pytest.raises(ValueError, match=r"'a' has committed 4 tokens and cannot .* to 3"):
        cache.truncate("a", 3)
    with pytest.raises(ValueError, match="'a' has pages for 8 tokens and cannot commit 9"):
        cache.commit("a", text(9))
    for sizes in ((0, 4), (3, 0)):
        with pytest.raises(ValueError, match=f"at least 1, found {sizes[0]} and {sizes[1]}"):
            KvCacheManager(*sizes)
    cache.check_integrity()


def test_pages_freed_last_are_handed_out_first():
    cache = KvCacheManager(total_pages=8, page_size=4)
    hold(cache, "a", text(8))
    hold(cache, "b", text(8))
    cache.free("a")
    hold(cache, "c", text(12))
    assert list(cache.pages("c")) == [0, 1, 4]


def seconds_a_page(num_pages):
    """CPU time that it takes to take one of many known pages, each for itself."""
    cache = KvCacheManager(num_pages, page_size=1)
    compute(cache, "known", text(num_pages))
    cache.free("known")
    cache.allocate("a", [0], max_cached=0)
    began = time.process_time()
    for to_tokens in range(1, num_pages + 1):
        cache.extend("a", to_tokens)
    return (time.process_time() - began) / num_pages


def test_taking_known_pages_one_by_one_does_not_look_at_those_taken_before():
    few = min(seconds_a_page(2**10) for _ in range(5))
    many = min(seconds_a_page(2**16) for _ in range(2))
    assert many < 5 * few  # a dictionary's first key is found in 20 times the time


def test_a_content_is_forgotten_with_its_last_page():
    cache = KvCacheManager(total_pages=4, page_size=2)
    for turn in range(20):
        compute(cache, "a", text(8, 100 * turn))
        cache.free("a")
    assert len(cache._known) == len(cache._content) == 4


def hold_a_page_twice(cache):
    page = cache.pages("a")[2]
    cache._held["b"].pages.append(page)
    cache._references[page] += 1


def forget_the_first_page(cache):
    content = cache._content.pop(0)
    content.pages.remove(0)
    del cache._known[content.key]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: c._free.append(c.pages("a")[0]), "free and evictable pages differ"),
        (lambda c: c._free.pop(), "free and evictable pages differ"),
        (lambda c: c._free.append(c._free[0]), "free or evictable twice"),
        (lambda c: c._evictable.popitem(), "free and evictable pages differ"),
        (lambda c: c._held["a"].pages.pop(), "reference counts differ"),
        (lambda c: c._held["a"].pages.append(c.pages("a")[0]), "holds a page twice"),
        (hold_a_page_twice, "page 2 is not committed, and is held by more than one"),
        (lambda c: setattr(c._held["a"], "committed", 9), "committed that no request holds"),
        (lambda c: c._content.popitem(), "evictable page is not known|content that it does not"),
        (lambda c: c._known.popitem(), "content that it does not have"),
        (lambda c: c._content[0].pages.clear(), "content that it does not have"),
        (forget_the_first_page, r"pages \[1\] are known, but no page with the tokens before"),
    ],
)
def test_the_integrity_check_says_what_is_damaged(damage, message):
    cache = KvCacheManager(total_pages=8, page_size=4)
    compute(cache, "a", text(9))
    compute(cache, "b", text(9))
    compute(cache, "c", text(4, 100))
    cache.free("c")
    cache.check_integrity()
    damage(cache)
    with pytest.raises(AssertionError, match=message):
        cache.check_integrity()
