"""Which tokens run in the next step."""

import random

import pytest
import torch

from tilewright.errors import OutOfPagesError
from tilewright.kv_cache import KvCacheManager
from tilewright.request import Request
from tilewright.scheduler import Scheduler
from tilewright.types import ExecutorLimits, SamplingParams


def make(total_pages=16, page_size=4, max_batch_size=4, max_batch_tokens=10, **limits):
    cache = KvCacheManager(total_pages, page_size)
    return cache, Admitting(cache, max_batch_size, max_batch_tokens, ExecutorLimits(**limits))


class Admitting(Scheduler):
    def schedule(self):
        self.admit()
        return super().schedule()


def request(name, prompt_length, max_new_tokens=4):
    first = 100 * (ord(name) - ord("a") + 1)
    return Request(
        name, tuple(range(first, first + prompt_length)), SamplingParams(), max_new_tokens
    )


def slots(cache, name, start, stop):
    pages = cache.pages(name)
    return [
        pages[p // cache.page_size] * cache.page_size + p % cache.page_size
        for p in range(start, stop)
    ]


def finish(scheduler, step, token=7):
    """What an engine does with a step that has run."""
    for r in step.sampled:
        r.output_token_ids.append(token)
    scheduler.done(step)


def test_prompts_share_a_step_and_long_ones_are_chunked():
    cache, scheduler = make(mixed=False)
    a, b = request("a", 3), request("b", 12)
    scheduler.add(a)
    scheduler.add(b)
    step = scheduler.schedule()
    assert (step.requests, step.sampled) == ((a, b), (a,))
    assert step.batch.token_ids.tolist() == [100, 101, 102, *range(200, 207)]
    assert step.batch.positions.tolist() == [0, 1, 2, *range(7)]
    assert step.batch.query_starts.tolist() == [0, 3, 10]
    assert step.batch.context_lens.tolist() == [3, 7]
    assert step.batch.logits_rows.tolist() == [2]
    finish(scheduler, step)

    step = scheduler.schedule()  # prompts and decoding take turns
    assert (step.requests, step.batch.token_ids.tolist()) == ((a,), [7])
    finish(scheduler, step)

    step = scheduler.schedule()
    assert (step.requests, step.sampled) == ((b,), (b,))
    assert step.batch.positions.tolist() == list(range(7, 12))
    assert step.batch.context_lens.tolist() == [12]
    assert step.batch.max_query_len == 5
    assert step.batch.slot_mapping.tolist() == slots(cache, "b", 7, 12)
    finish(scheduler, step)

    step = scheduler.schedule()
    assert step.sampled == (a, b)
    assert step.batch.token_ids.tolist() == [7, 7]
    assert step.batch.positions.tolist() == [4, 12]
    assert step.batch.context_lens.tolist() == [5, 13]
    assert step.batch.max_query_len == 1
    table = [[*cache.pages("a"), -1, -1], [*cache.pages("b")]]
    assert step.batch.block_table.tolist() == table
    assert step.batch.slot_mapping.tolist() == slots(cache, "a", 4, 5) + slots(cache, "b", 12, 13)


def test_requests_that_decode_come_first_and_prompts_share_what_is_left_of_a_step():
    _, scheduler = make(total_pages=32)
    a, b, c = request("a", 3), request("b", 12), request("c", 5)
    for r in (a, b, c):
        scheduler.add(r)
    finish(scheduler, scheduler.schedule())
    step = scheduler.schedule()
    assert step.requests == (a, b, c)
    assert step.batch.token_ids.tolist() == [7, *range(207, 212), *range(300, 304)]
    assert step.batch.query_starts.tolist() == [0, 1, 6, 10]
    assert step.sampled == (a, b)
    assert [part.decoding for part in step.parts] == [True, False, False]
    assert step.batch.request_ids == ("a", "b", "c")
    finish(scheduler, step)
    assert [len(r.output_token_ids) for r in (a, b, c)] == [2, 1, 0]


@pytest.mark.parametrize("mixed", [True, False])
def test_a_running_request_waits_at_most_one_step_while_a_long_prompt_arrives(mixed):
    _, scheduler = make(total_pages=800, max_batch_size=9, max_batch_tokens=64, mixed=mixed)
    running = [request(name, 4, max_new_tokens=99) for name in "abcdefgh"]
    for r in running:
        scheduler.add(r)
    finish(scheduler, scheduler.schedule())
    long = request("i", 2000)
    scheduler.add(long)
    waited = 0
    while not long.output_token_ids:
        step = scheduler.schedule()
        assert len(step.batch.token_ids) <= 64
        waited = 0 if running[0] in step.requests else waited + 1
        assert waited <= (0 if mixed else 1)
        finish(scheduler, step)


def test_the_executor_is_told_of_requests_that_ended():
    _, scheduler = make()
    a, b = request("a", 3), request("b", 3)
    scheduler.add(a)
    scheduler.add(b)
    step = scheduler.schedule()
    assert step.batch.ended_request_ids == ()
    finish(scheduler, step)
    scheduler.remove(a)
    told = scheduler.schedule()
    assert told.batch.ended_request_ids == ("a",)
    scheduler.undone(told)  # it failed: they are told again
    told = scheduler.schedule()
    assert told.batch.ended_request_ids == ("a",)
    finish(scheduler, told)
    assert scheduler.schedule().batch.ended_request_ids == ()


def test_drafts_are_checked_in_one_step_and_wrong_ones_are_taken_back():
    cache = KvCacheManager(16, 4)
    scheduler = Admitting(cache, 4, 10, draft=lambda request, most: [5, 6, 7, 8][:most])
    a = request("a", 3, max_new_tokens=9)
    scheduler.add(a)
    finish(scheduler, scheduler.schedule(), token=4)
    step = scheduler.schedule()
    assert step.batch.token_ids.tolist() == [4, 5, 6, 7, 8]
    assert step.batch.num_drafts.tolist() == [4]
    assert step.batch.logits_rows.tolist() == [0, 1, 2, 3, 4]
    assert step.batch.context_lens.tolist() == [8]
    assert step.parts[0].sampled == range(5)
    assert len(cache.pages("a")) == 2
    a.output_token_ids += [5, 9]  # the first draft was right, and 9 follows it
    scheduler.done(step)
    assert a.num_computed == 5
    step = scheduler.schedule()
    assert step.batch.token_ids.tolist() == [9, 5, 6, 7, 8]
    assert step.batch.positions.tolist() == [5, 6, 7, 8, 9]
    a.output_token_ids += [1]
    scheduler.done(step)
    assert len(cache.pages("a")) == 2, "the page of the wrong drafts is released"
    step = scheduler.schedule()
    a.output_token_ids += [5, 6, 7, 8]
    scheduler.done(step)
    assert len(scheduler.schedule().batch.token_ids) == 1, "drafts end with max_new_tokens"
    cache.check_integrity()


def test_batch_tensors_have_the_dtypes_of_the_contract():
    _, scheduler = make()
    scheduler.add(request("a", 3))
    batch = scheduler.schedule().batch
    assert batch.token_ids.dtype == batch.logits_rows.dtype == torch.int64
    for tensor in (
        batch.positions,
        batch.slot_mapping,
        batch.block_table,
        batch.context_lens,
        batch.query_starts,
    ):
        assert tensor.dtype == torch.int32


def test_decode_steps_advance_position_and_slot_across_pages():
    cache, scheduler = make()
    a = request("a", 3, max_new_tokens=6)
    scheduler.add(a)
    finish(scheduler, scheduler.schedule(), token=11)
    seen = []
    for token in (12, 13, 14, 15, 16):
        step = scheduler.schedule()
        seen.append((step.batch.token_ids.item(), step.batch.positions.item()))
        position = step.batch.positions.item()
        assert step.batch.slot_mapping.tolist() == slots(cache, "a", position, position + 1)
        finish(scheduler, step, token)
    assert seen == [(11, 3), (12, 4), (13, 5), (14, 6), (15, 7)]
    assert a.num_computed == a.max_cached_tokens == 8


def test_a_step_that_was_not_committed_is_scheduled_again():
    _, scheduler = make()
    scheduler.add(request("a", 3))
    first, again = scheduler.schedule(), scheduler.schedule()
    for field in ("token_ids", "positions", "slot_mapping", "block_table", "context_lens"):
        assert torch.equal(getattr(first.batch, field), getattr(again.batch, field))
    finish(scheduler, first)
    first, again = scheduler.schedule(), scheduler.schedule()
    assert first.batch.slot_mapping.tolist() == again.batch.slot_mapping.tolist()


def test_a_token_added_before_its_step_was_committed_is_kept():
    _, scheduler = make()
    a = request("a", 3)
    scheduler.add(a)
    scheduler.schedule()
    a.output_token_ids.append(7)  # and then an interrupt, before done()
    step = scheduler.schedule()
    assert (step.batch.token_ids.tolist(), step.sampled) == ([100, 101, 102, 7], (a,))
    finish(scheduler, step, token=8)
    step = scheduler.schedule()
    assert (step.batch.token_ids.tolist(), step.sampled) == ([8], (a,))


def test_a_request_waits_until_the_cache_can_hold_all_of_its_tokens():
    cache, scheduler = make(total_pages=4)
    a, b = request("a", 5, max_new_tokens=4), request("b", 5, max_new_tokens=5)
    scheduler.add(a)  # 8 tokens in the cache at the end: 2 pages
    scheduler.add(b)  # 9: 3 pages
    assert scheduler.schedule().requests == (a,)
    assert cache.free_pages == 2
    scheduler.remove(a)
    assert scheduler.schedule().requests == (b,)
    scheduler.remove(b)
    assert scheduler.schedule() is None
    assert cache.free_pages == 4


def test_a_request_that_can_never_fit_is_refused_at_once():
    _, scheduler = make(total_pages=3)
    with pytest.raises(
        OutOfPagesError, match=r"needs 4 KV cache pages .* 9 prompt .* has 3 \(3 free\)"
    ):
        scheduler.add(request("a", 9, max_new_tokens=5))


def test_running_requests_never_exceed_the_size_of_a_decode_step():
    _, scheduler = make(max_batch_size=8, max_batch_tokens=2)
    for name in "abc":
        scheduler.add(request(name, 1))
    finish(scheduler, scheduler.schedule())
    assert len(scheduler.schedule().requests) == 2


@pytest.mark.parametrize("seed", range(20))
def test_random_requests_run_each_token_once_in_order_and_free_all_pages(seed):
    rng = random.Random(seed)
    cache, scheduler = make(
        total_pages=rng.randint(8, 30),
        page_size=rng.choice([1, 3, 16]),
        max_batch_size=rng.randint(1, 5),
        max_batch_tokens=rng.randint(1, 20),
    )
    longest = cache.total_pages * cache.page_size
    waiting = []
    for name in "abcdefghij":
        prompt = rng.randint(1, max(1, longest - 8))
        waiting.append(request(name, prompt, rng.randint(1, min(8, longest - prompt + 1))))
    ran = {r.request_id: [] for r in waiting}
    everything = list(waiting)
    while True:
        if waiting and rng.random() < 0.3:
            scheduler.add(waiting.pop())
        step = scheduler.schedule()
        if step is None:
            if not waiting:
                break
            continue
        starts = step.batch.query_starts.tolist()
        assert len(step.requests) <= 5
        for i, r in enumerate(step.requests):
            ran[r.request_id] += step.batch.token_ids[starts[i] : starts[i + 1]].tolist()
        finish(scheduler, step, token=rng.randint(0, 99))
        cache.check_integrity()
        for r in step.sampled:
            if len(r.output_token_ids) == r.max_new_tokens:
                scheduler.remove(r)
    for r in everything:
        assert ran[r.request_id] == [*r.prompt_token_ids, *r.output_token_ids[:-1]]
    assert cache.free_pages == cache.total_pages
