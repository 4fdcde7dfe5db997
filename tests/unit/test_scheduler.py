"""Which tokens run in the next step."""

import random

import pytest
import torch

from tilewright.errors import OutOfPagesError
from tilewright.kv_cache import KvCacheManager
from tilewright.request import Request
from tilewright.scheduler import Scheduler
from tilewright.types import KvCacheSpec, SamplingParams


def make(total_pages=16, page_size=4, max_batch_size=4, max_batch_tokens=10):
    spec = KvCacheSpec(
        num_layers=1, num_kv_heads=1, head_dim=1, page_size=page_size, dtype="float32"
    )
    cache = KvCacheManager(spec, total_pages)
    return cache, Scheduler(cache, max_batch_size, max_batch_tokens)


def request(name, prompt_length, max_new_tokens=4):
    first = 100 * (ord(name) - ord("a") + 1)
    return Request(
        name, tuple(range(first, first + prompt_length)), SamplingParams(), max_new_tokens
    )


def finish(scheduler, step, token=7):
    """What an engine does with a step that has run."""
    for r in step.sampled:
        r.output_token_ids.append(token)
    scheduler.done(step)


def test_prompts_share_a_prefill_step_and_long_ones_are_chunked():
    cache, scheduler = make()
    a, b = request("a", 3), request("b", 12)
    scheduler.add(a)
    scheduler.add(b)
    step = scheduler.schedule()
    assert (step.phase, step.requests, step.sampled) == ("prefill", (a, b), (a,))
    assert step.batch.token_ids.tolist() == [100, 101, 102, *range(200, 207)]
    assert step.batch.positions.tolist() == [0, 1, 2, *range(7)]
    assert step.batch.query_starts.tolist() == [0, 3, 10]
    assert step.batch.context_lens.tolist() == [3, 7]
    assert step.batch.logits_rows.tolist() == [2]
    finish(scheduler, step)

    step = scheduler.schedule()
    assert (step.phase, step.requests, step.sampled) == ("prefill", (b,), (b,))
    assert step.batch.positions.tolist() == list(range(7, 12))
    assert step.batch.context_lens.tolist() == [12]
    assert step.batch.slot_mapping.tolist() == cache.slots("b", 7, 12).tolist()
    finish(scheduler, step)

    step = scheduler.schedule()
    assert (step.phase, step.sampled) == ("decode", (a, b))
    assert step.batch.token_ids.tolist() == [7, 7]
    assert step.batch.positions.tolist() == [3, 12]
    assert step.batch.context_lens.tolist() == [4, 13]
    assert step.batch.block_table.tolist() == cache.block_table(["a", "b"]).tolist()


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
        assert step.batch.slot_mapping.tolist() == cache.slots("a", position, position + 1).tolist()
        finish(scheduler, step, token)
    assert seen == [(11, 3), (12, 4), (13, 5), (14, 6), (15, 7)]
    assert cache.num_tokens("a") == a.max_cached_tokens == 8


def test_a_step_that_was_not_committed_is_scheduled_again():
    _, scheduler = make()
    scheduler.add(request("a", 3))
    first, again = scheduler.schedule(), scheduler.schedule()
    for field in ("token_ids", "positions", "slot_mapping", "block_table", "context_lens"):
        assert torch.equal(getattr(first.batch, field), getattr(again.batch, field))
    finish(scheduler, first)
    first, again = scheduler.schedule(), scheduler.schedule()
    assert first.batch.slot_mapping.tolist() == again.batch.slot_mapping.tolist()


def test_a_token_added_before_its_step_was_committed_costs_one_more_step():
    _, scheduler = make()
    a = request("a", 3)
    scheduler.add(a)
    scheduler.schedule()
    a.output_token_ids.append(7)  # and then an interrupt, before done()
    step = scheduler.schedule()
    assert step.phase == "prefill"
    assert step.sampled == ()
    finish(scheduler, step)
    step = scheduler.schedule()
    assert (step.batch.token_ids.tolist(), step.sampled) == ([7], (a,))


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
    longest = cache.total_pages * cache.spec.page_size
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
