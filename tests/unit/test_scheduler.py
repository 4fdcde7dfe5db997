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


def launch(scheduler):
    """Put the next step in flight."""
    step = scheduler.schedule()
    scheduler.launched(step)
    return step


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


def test_with_reserved_pages_a_request_waits_until_the_cache_can_hold_all_of_its_tokens():
    cache = KvCacheManager(4, 4)
    scheduler = Admitting(cache, 4, 10, admission="reserve")
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


@pytest.mark.parametrize("admission", ["preempt", "reserve"])
@pytest.mark.parametrize("seed", range(20))
def test_random_requests_run_each_token_in_order_and_free_all_pages(seed, admission):
    """Each token runs once, or again from the first one after a preemption."""
    rng = random.Random(seed)
    cache = KvCacheManager(rng.randint(8, 30), rng.choice([1, 3, 16]))
    scheduler = Admitting(cache, rng.randint(1, 5), rng.randint(1, 20), admission=admission)
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
            known, start = ran[r.request_id], step.parts[i].start
            assert start == len(known) or r.preemptions
            known[start:] = step.batch.token_ids[starts[i] : starts[i + 1]].tolist()
        finish(scheduler, step, token=rng.randint(0, 99))
        cache.check_integrity()
        for r in step.sampled:
            if len(r.output_token_ids) == r.max_new_tokens:
                scheduler.remove(r)
    for r in everything:
        assert ran[r.request_id] == [*r.prompt_token_ids, *r.output_token_ids[:-1]]
        assert admission == "preempt" or not r.preemptions
    assert cache.free_pages + cache.evictable_pages == cache.total_pages


def run(scheduler, requests, token=7):
    """Run all requests to their ends; returns the steps."""
    steps = []
    for r in requests:
        scheduler.add(r)
    while step := scheduler.schedule():
        steps.append(step)
        finish(scheduler, step, token)
        for r in step.sampled:
            if len(r.output_token_ids) == r.max_new_tokens:
                scheduler.remove(r)
    return steps


def computed(steps, name):
    """Positions of a request's tokens, in the order in which they ran."""
    return [
        position
        for step in steps
        for part in step.parts
        if part.request.request_id == name
        for position in range(part.start, part.stop)
    ]


@pytest.mark.parametrize("mixed", [True, False])
def test_the_second_of_two_prompts_computes_only_what_they_have_not_in_common(mixed):
    common = tuple(range(1000))
    cache, scheduler = make(400, 4, max_batch_tokens=64, mixed=mixed)
    a = Request("a", (*common, 1, 2, 3), SamplingParams(), 4)
    b = Request("b", (*common, 4, 5, 6), SamplingParams(), 4)
    run(scheduler, [a])
    steps = run(scheduler, [b])
    assert (a.cached_tokens, b.cached_tokens) == (0, 1000)
    assert computed(steps, "b") == list(range(1000, 1006))
    cache.check_integrity()


def test_the_next_turn_of_a_conversation_reuses_the_answer_too():
    cache, scheduler = make(64, 4)
    a = Request("a", tuple(range(10, 20)), SamplingParams(), 7)
    run(scheduler, [a])
    turn = (*a.prompt_token_ids, *a.output_token_ids, 30, 31)
    b = Request("b", turn, SamplingParams(), 1)
    run(scheduler, [b])
    assert b.cached_tokens == 16  # the last token of the answer has not run
    cache.check_integrity()


def test_equal_prompts_at_once_compute_their_full_pages_once():
    cache, scheduler = make(64, 4, max_batch_tokens=100)
    prompt = tuple(range(50, 64))
    four = [Request(name, prompt, SamplingParams(), 3) for name in "abcd"]
    steps = run(scheduler, four)
    assert computed(steps[:1], "a") == list(range(14))
    assert [r.cached_tokens for r in four] == [0, 12, 12, 12]
    assert all(computed(steps, name) == [12, 13, 14, 15] for name in "bcd")
    cache.check_integrity()


def test_a_younger_request_may_pass_one_that_awaits_a_page_of_an_older_one():
    _, scheduler = make(64, 4, max_batch_tokens=8)
    prompt = tuple(range(50, 70))
    a, b, c = (
        Request(n, p, SamplingParams(), 3) for n, p in (("a", prompt), ("b", prompt), ("c", (1, 2)))
    )
    for r in (a, b, c):
        scheduler.add(r)
    assert [r.request_id for r in scheduler.admit()] == ["a", "c"]


def test_a_prompt_in_full_pages_that_are_all_known_still_computes_its_last_token():
    cache, scheduler = make(16, 4)
    for name in "ab":
        r = Request(name, tuple(range(8)), SamplingParams(), 2)
        steps = run(scheduler, [r])
    assert r.cached_tokens == 4
    assert computed(steps, "b") == [4, 5, 6, 7, 8]
    cache.check_integrity()


@pytest.mark.parametrize("off", [{"prefix_cache": False}, {"shares_pages": False}])
def test_without_a_prefix_cache_nothing_is_reused_or_kept(off):
    cache = KvCacheManager(16, 4)
    limits = ExecutorLimits(shares_pages=off.get("shares_pages", True))
    on = off.get("prefix_cache", True)
    scheduler = Admitting(cache, 4, 10, limits, prefix_cache=on)
    for name in "ab":
        r = Request(name, tuple(range(9)), SamplingParams(), 2)
        run(scheduler, [r])
        assert r.cached_tokens == 0
        assert cache.free_pages == 16


def test_short_prompts_with_many_new_tokens_run_at_once_and_the_youngest_give_way():
    cache, scheduler = make(32, 16, max_batch_tokens=64)
    four = [request(name, 8, max_new_tokens=400) for name in "abcd"]
    steps = run(scheduler, four)
    assert steps[0].requests == tuple(four)
    assert four[0].preemptions == 0
    assert all(r.preemptions for r in four[1:])
    assert len(steps) < 4 * 400 - 200, "they hardly ran together"
    for r in four:
        assert len(r.output_token_ids) == 400
        ran = set(computed(steps, r.request_id))
        assert ran == set(range(r.max_cached_tokens))
    assert cache.free_pages + cache.evictable_pages == 32
    cache.check_integrity()


def test_a_preempted_request_finds_its_own_pages_and_does_not_count_them_as_cached():
    cache, scheduler = make(5, 4, max_batch_tokens=16)
    a, b = request("a", 8, max_new_tokens=9), request("b", 4, max_new_tokens=9)
    steps = run(scheduler, [a, b])
    assert b.preemptions == 1
    assert (a.cached_tokens, b.cached_tokens) == (0, 0)
    resumed = next(
        part
        for step in steps
        for part in step.parts
        if part.request is b and part.start >= 4 and not part.decoding
    )
    assert resumed.start % 4 == 0
    cache.check_integrity()


def test_a_request_that_gives_way_while_its_step_is_in_flight_keeps_that_step():
    """Its pages return when the step ends, and the token that it sampled counts."""
    cache, scheduler = make(4, 2, max_batch_tokens=16)
    a, b = request("a", 3, max_new_tokens=5), request("b", 2, max_new_tokens=5)
    for r in (a, b):
        scheduler.add(r)
        r.sampled_by_executor = True
    first, second = launch(scheduler), launch(scheduler)
    assert second.requests == (a, b)
    finish(scheduler, first)
    third = scheduler.schedule()  # a needs a third page, and b is in flight
    assert third is None
    assert scheduler.preempted() == [b]
    assert len(cache.pages("b")) == 2
    finish(scheduler, second)
    assert (len(b.output_token_ids), b.num_computed) == (2, 0)
    with pytest.raises(KeyError):
        cache.pages("b")
    step = scheduler.schedule()
    assert step.requests == (a,)
    assert step.batch.ended_request_ids == ("b",)
    cache.check_integrity()


def test_a_preempted_request_that_is_removed_does_not_come_back():
    cache, scheduler = make(4, 2, max_batch_tokens=16)
    a, b = request("a", 3, max_new_tokens=5), request("b", 2, max_new_tokens=5)
    for r in (a, b):
        scheduler.add(r)
    finish(scheduler, scheduler.schedule())
    finish(scheduler, scheduler.schedule())
    assert scheduler.schedule().requests == (a,)
    assert (scheduler.preempted(), scheduler.num_waiting) == ([b], 1)
    scheduler.remove(b)
    scheduler.remove(a)
    assert scheduler.schedule() is None
    assert cache.free_pages + cache.evictable_pages == 4


def test_a_prompt_that_is_scored_is_computed_from_its_first_unscored_token():
    _, scheduler = make(16, 4)
    run(scheduler, [request("a", 9, max_new_tokens=1)])
    again = Request("b", tuple(range(100, 109)), SamplingParams(), 1, num_prompt_logprobs=0)
    scheduler.add(again)
    step = scheduler.schedule()
    assert (again.cached_tokens, step.parts[0].start) == (0, 0)
    assert step.parts[0].scored == range(8)


def test_nothing_waits_for_ever_while_short_requests_keep_arriving():
    _, scheduler = make(16, 4, max_batch_size=3, max_batch_tokens=6)
    long = request("z", 40, max_new_tokens=4)
    arriving = iter(range(10_000))
    scheduler.add(request("a", 3))
    scheduler.add(long)
    for _ in range(60):
        name = f"a{next(arriving)}"
        scheduler.add(Request(name, (next(arriving), 1, 2), SamplingParams(), 3))
        step = scheduler.schedule()
        finish(scheduler, step)
        for r in step.sampled:
            if len(r.output_token_ids) == r.max_new_tokens:
                scheduler.remove(r)
        if len(long.output_token_ids) == 4:
            return
    raise AssertionError("the long prompt is still waiting")


class Private(KvCacheManager):
    """An allocator that does not share pages."""

    def allocate(self, request_id, token_ids, *, max_cached, salt=b""):
        return super().allocate(request_id, token_ids, max_cached=0, salt=salt)

    def commit(self, request_id, token_ids):
        pass


def test_equal_prompts_wait_for_each_other_only_if_the_allocator_shares_pages():
    steps = []
    for allocator in (Private, KvCacheManager):
        cache = allocator(400, 4)
        scheduler = Admitting(cache, 8, 256)
        four = [Request(name, tuple(range(65)), SamplingParams(), 1) for name in "abcd"]
        steps.append(len(run(scheduler, four)))
        again = [Request(name, tuple(range(200, 265)), SamplingParams(), 1) for name in "efgh"]
        steps.append(len(run(scheduler, again)))
        cache.check_integrity()
    # The first step finds out. Three prompts of 65 tokens fit into one step, four ends of them too.
    assert steps == [2, 2, 2, 2]


def test_pages_of_a_request_that_ended_stay_while_the_step_behind_is_in_flight():
    cache, scheduler = make(16, 2, max_batch_tokens=16)
    a = request("a", 3, max_new_tokens=9)
    scheduler.add(a)
    a.sampled_by_executor = True
    first, second = launch(scheduler), launch(scheduler)
    second_page = second.batch.block_table[0, 1].item()
    a.finish_reason = "aborted"  # in the middle of the first step: its token is not taken
    scheduler.done(first)
    assert second_page in cache.pages("a")
    scheduler.remove(a)
    assert second_page in cache.pages("a")
    scheduler.done(second)
    assert cache.free_pages + cache.evictable_pages == 16
