"""The suite of KV allocators finds each of these broken ones, by the test that is
meant for it."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from attrs import evolve
from conformance import Fault, missed, own_tests, run
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from torch import Tensor

from tilewright import hookimpl
from tilewright.errors import OutOfPagesError
from tilewright.kv_cache import KvCacheManager, budget
from tilewright.types import KvAllocatorRequest, KvLayer, PluginInfo
from tilewright_testing import KvAllocatorSuite
from tilewright_testing.kv_allocator import AllocatorMachine, small_spec


class Allocators:
    """A plugin that makes allocators in some way."""

    tilewright_api = 1

    def __init__(self, make: Callable[[KvAllocatorRequest], Any]):
        self.make = make

    @hookimpl
    def plugin_info(self) -> PluginInfo:
        return PluginInfo(summary="fixed-size pages")

    @hookimpl
    def create_kv_allocator(self, request: KvAllocatorRequest) -> Any:
        return self.make(request)


def of(cls: type[KvCacheManager]) -> Allocators:
    return Allocators(lambda request: cls(request.spec, budget(request)))


class LeaksWhenRefused(KvCacheManager):
    def allocate(self, request_id: str, num_tokens: int) -> None:
        if num_tokens > self.free_pages * self.spec.page_size and request_id not in self._held:
            self._take("half", self.free_pages, num_tokens)
        super().allocate(request_id, num_tokens)


class GrowsWhenRefused(KvCacheManager):
    def extend(self, request_id: str, num_tokens: int = 1) -> None:
        held = self._held[request_id]
        try:
            super().extend(request_id, num_tokens)
        except OutOfPagesError:
            held.num_tokens += num_tokens
            raise


class TakesAPageForEachExtension(KvCacheManager):
    def extend(self, request_id: str, num_tokens: int = 1) -> None:
        held = self._held[request_id]
        held.pages += self._take(request_id, self.pages_for(num_tokens), num_tokens)
        held.num_tokens += num_tokens

    def check_integrity(self) -> None:
        pass


class MovesWhenExtended(KvCacheManager):
    def extend(self, request_id: str, num_tokens: int = 1) -> None:
        super().extend(request_id, num_tokens)
        self._held[request_id].pages.reverse()


class ForgetsPages(KvCacheManager):
    def free(self, request_id: str) -> None:
        super().free(request_id)
        if self.free_pages > 2:
            self._references[self._free.pop()] = 1

    def check_integrity(self) -> None:
        pass


class FreesSharedPages(KvCacheManager):
    def free(self, request_id: str) -> None:
        for page in self._held.pop(request_id).pages:
            self._references[page] = 0
            if page not in self._free:
                self._free.append(page)

    def check_integrity(self) -> None:
        pass


class FreesTwice(KvCacheManager):
    def free(self, request_id: str) -> None:
        if request_id in self._held:
            super().free(request_id)


class ReplacesARequest(KvCacheManager):
    def allocate(self, request_id: str, num_tokens: int) -> None:
        if request_id in self._held:
            self.free(request_id)
        super().allocate(request_id, num_tokens)


class SharesThePartlyFullPage(KvCacheManager):
    def fork(self, parent_id: str, child_id: str) -> None:
        if child_id in self._held:
            raise ValueError(child_id)
        parent = self._held[parent_id]
        for page in parent.pages:
            self._references[page] += 1
        self._held[child_id] = evolve(parent, pages=list(parent.pages))

    def check_integrity(self) -> None:
        pass


class CopiesEveryPage(KvCacheManager):
    def fork(self, parent_id: str, child_id: str) -> None:
        self.allocate(child_id, self._held[parent_id].num_tokens)
        pages = (self._held[parent_id].pages, self._held[child_id].pages)
        for layer in self._layers:
            for source, target in zip(*pages, strict=True):
                layer.key[target] = layer.key[source]
                layer.value[target] = layer.value[source]


class CopiesNothing(KvCacheManager):
    def fork(self, parent_id: str, child_id: str) -> None:
        layers, self._layers = self._layers, []
        try:
            super().fork(parent_id, child_id)
        finally:
            self._layers = layers


class CopiesKeysAlone(KvCacheManager):
    def fork(self, parent_id: str, child_id: str) -> None:
        values = [layer.value.clone() for layer in self._layers]
        super().fork(parent_id, child_id)
        for layer, value in zip(self._layers, values, strict=True):
            layer.value.copy_(value)


class CopiesTheFirstLayer(KvCacheManager):
    def fork(self, parent_id: str, child_id: str) -> None:
        layers, self._layers = self._layers, self._layers[:1]
        try:
            super().fork(parent_id, child_id)
        finally:
            self._layers = layers


class SharesBeforeItIsRefused(KvCacheManager):
    def fork(self, parent_id: str, child_id: str) -> None:
        try:
            super().fork(parent_id, child_id)
        except OutOfPagesError:
            self._held[child_id] = evolve(self._held[parent_id])
            raise


class PadsWithZero(KvCacheManager):
    def block_table(self, request_ids: Sequence[str]) -> Tensor:
        return super().block_table(request_ids).clamp(min=0)


class PadsToAFixedWidth(KvCacheManager):
    def block_table(self, request_ids: Sequence[str]) -> Tensor:
        table = super().block_table(request_ids)
        missing = self.total_pages - table.shape[1]
        return torch.nn.functional.pad(table, (0, missing), value=-1)


class LongTables(KvCacheManager):
    def block_table(self, request_ids: Sequence[str]) -> Tensor:
        return super().block_table(request_ids).long()


class LongSlots(KvCacheManager):
    def slots(self, request_id: str, start: int, stop: int) -> Tensor:
        return super().slots(request_id, start, stop).long()


class SlotsInARow(KvCacheManager):
    def slots(self, request_id: str, start: int, stop: int) -> Tensor:
        first = super().slots(request_id, 0, stop)[:1]
        return first + torch.arange(start, stop, dtype=torch.int32)


class AnySlots(KvCacheManager):
    def slots(self, request_id: str, start: int, stop: int) -> Tensor:
        held, size = self._held[request_id], self.spec.page_size
        found = [held.pages[p // size] * size + p % size for p in range(start, stop)]
        return torch.tensor(found, dtype=torch.int32)


class NewLayersEachTime(KvCacheManager):
    def layers(self) -> Sequence[KvLayer]:
        return [KvLayer(layer.key, layer.value) for layer in self._layers]


class OneTensorForKeysAndValues(KvCacheManager):
    def __init__(self, spec: Any, total_pages: int):
        super().__init__(spec, total_pages)
        self._layers = [KvLayer(layer.key, layer.key) for layer in self._layers]


class Uninitialised(KvCacheManager):
    def __init__(self, spec: Any, total_pages: int):
        super().__init__(spec, total_pages)
        for layer in self._layers if spec.allocate is None else ():
            layer.key.fill_(7)


class ClearsPages(KvCacheManager):
    def allocate(self, request_id: str, num_tokens: int) -> None:
        super().allocate(request_id, num_tokens)
        for layer in self._layers if self.spec.allocate is None else ():
            layer.key[self._held[request_id].pages] = 0


class LooksIntoStorage(KvCacheManager):
    def __init__(self, spec: Any, total_pages: int):
        super().__init__(spec, total_pages)
        self.nbytes = sum(layer.key.nbytes for layer in self._layers)


class ChecksNothing(KvCacheManager):
    def check_integrity(self) -> None:
        pass


class DislikesForks(KvCacheManager):
    def check_integrity(self) -> None:
        super().check_integrity()
        assert max(self._references) <= 1, "a page has two holders"


class SaysItInALongText(KvCacheManager):
    def allocate(self, request_id: str, num_tokens: int) -> None:
        try:
            super().allocate(request_id, num_tokens)
        except OutOfPagesError as error:
            raise OutOfPagesError(f"out of pages:\n{error}") from error


SHARED: dict[str, Any] = {}


class Global(KvCacheManager):
    """Its requests are those of all allocators."""

    def __init__(self, spec: Any, total_pages: int):
        super().__init__(spec, total_pages)
        SHARED.clear()
        self._held = SHARED


def ignoring(**fields: Any) -> Allocators:
    """One that makes its cache of a request with some fields changed."""

    def make(request: KvAllocatorRequest) -> KvCacheManager:
        of_spec = {k: v for k, v in fields.items() if hasattr(request.spec, k)}
        own = {k: v for k, v in fields.items() if k not in of_spec}
        spec = evolve(request.spec, **of_spec)
        return KvCacheManager(spec, budget(evolve(request, spec=spec, **own)))

    return Allocators(make)


def rounded_up(request: KvAllocatorRequest) -> KvCacheManager:
    return KvCacheManager(request.spec, -(-budget(request) // 8) * 8)


def for_one_sequence(request: KvAllocatorRequest) -> KvCacheManager:
    return KvCacheManager(request.spec, budget(evolve(request, max_sequences=1)))


def limited_always(request: KvAllocatorRequest) -> KvCacheManager:
    pages = budget(request)
    if request.spec.memory_limit is not None:
        pages = min(pages, request.spec.memory_limit // request.spec.page_bytes)
    return KvCacheManager(request.spec, pages)


def at_least_one_page(request: KvAllocatorRequest) -> KvCacheManager:
    try:
        return KvCacheManager(request.spec, budget(request))
    except OutOfPagesError:
        return KvCacheManager(request.spec, 1)


MODEL = "test_random_calls_agree_with_a_reference_model"

FAULTS = [
    Fault(name, plugin if isinstance(plugin, Allocators) else of(plugin), test, why=why)
    for name, plugin, test, why in (
        (
            "rounds the number of pages up",
            Allocators(rounded_up),
            "test_it_has_the_requested_number_of_pages",
            "requested 1, found 8 and 8",
        ),
        (
            "limits a number that was set",
            Allocators(limited_always),
            "test_it_has_the_requested_number_of_pages",
            "requested 7, found 1 and 1",
        ),
        (
            "has room for one sequence",
            Allocators(for_one_sequence),
            "test_without_total_pages_all_sequences_fit_at_max_seq_len",
            "OutOfPagesError",
        ),
        (
            "ignores the memory limit",
            ignoring(memory_limit=None),
            "test_without_total_pages_it_stays_within_the_memory_limit",
            "allows 1 to 1 pages, found 240",
        ),
        (
            "takes a page in spite of the limit",
            Allocators(at_least_one_page),
            "test_a_memory_limit_below_one_page_is_refused",
            "must raise TilewrightError",
        ),
        (
            "ignores the order of rows",
            ignoring(row_order="NHD"),
            "test_layers_match_the_spec",
            "by the spec",
        ),
        (
            "ignores the dtype",
            ignoring(dtype="float32"),
            "test_layers_match_the_spec",
            "bfloat16.* by the spec",
        ),
        (
            "leaves storage uninitialised",
            Uninitialised,
            "test_layers_match_the_spec",
            "must hold zeros",
        ),
        (
            "makes new layers each time",
            NewLayersEachTime,
            "test_layers_are_the_same_objects_each_time",
            "the same objects",
        ),
        (
            "has one tensor for keys and values",
            OneTensorForKeysAndValues,
            "test_no_two_tensors_share_memory",
            "share memory",
        ),
        (
            "keeps requests in a global",
            Global,
            "test_two_allocators_are_independent",
            "another allocator's request",
        ),
        (
            "makes storage itself",
            ignoring(allocate=None, device="cpu"),
            "test_an_executors_own_storage_is_passed_on_without_being_read",
            "allocate must be called once",
        ),
        (
            "looks into an executor's storage",
            LooksIntoStorage,
            "test_an_executors_own_storage_is_passed_on_without_being_read",
            "read its 'nbytes'",
        ),
        (
            "clears pages",
            ClearsPages,
            "test_only_a_fork_writes_to_storage_and_only_to_its_own_page",
            "must not write to storage",
        ),
        (
            "loses pages when it refuses",
            LeaksWhenRefused,
            "test_a_refused_allocate_changes_nothing",
            "'b', 46.* changed the state",
        ),
        (
            "replaces a request",
            ReplacesARequest,
            "test_a_refused_allocate_changes_nothing",
            "'a', 1.* must raise ValueError",
        ),
        (
            "errors of two lines",
            SaysItInALongText,
            "test_a_refused_allocate_changes_nothing",
            "must be one line",
        ),
        (
            "grows when it refuses",
            GrowsWhenRefused,
            "test_a_refused_extend_changes_nothing",
            "changed the state",
        ),
        (
            "takes a page for each extension",
            TakesAPageForEachExtension,
            "test_extend_fills_a_page_before_it_takes_another",
            "5 tokens must take 1 page",
        ),
        ("moves pages when it extends", MovesWhenExtended, MODEL, "must keep the pages"),
        (
            "forgets freed pages",
            ForgetsPages,
            "test_freed_pages_are_reused",
            "all 6 pages must be free",
        ),
        (
            "frees what is not there",
            FreesTwice,
            "test_freed_pages_are_reused",
            "must raise KeyError",
        ),
        (
            "frees shared pages",
            FreesSharedPages,
            "test_a_fork_outlives_its_parent",
            "reused while a fork held them",
        ),
        (
            "shares the partly full page",
            SharesThePartlyFullPage,
            "test_a_fork_shares_full_pages_and_copies_the_partial_one",
            "both requests write to it",
        ),
        (
            "copies every page",
            CopiesEveryPage,
            "test_a_fork_shares_full_pages_and_copies_the_partial_one",
            "full pages must be shared",
        ),
        (
            "copies nothing",
            CopiesNothing,
            "test_a_fork_starts_with_its_parents_contents_and_diverges",
            "its parent's keys and values",
        ),
        (
            "copies keys alone",
            CopiesKeysAlone,
            "test_a_fork_starts_with_its_parents_contents_and_diverges",
            "its parent's keys and values",
        ),
        (
            "copies the first layer",
            CopiesTheFirstLayer,
            "test_a_fork_starts_with_its_parents_contents_and_diverges",
            "its parent's keys and values",
        ),
        (
            "keeps a fork that it refused",
            SharesBeforeItIsRefused,
            "test_a_refused_fork_changes_nothing",
            "reference counts differ",
        ),
        ("pads with 0", PadsWithZero, "test_block_tables_are_int32_and_padded", "padded with -1"),
        (
            "pads to a fixed width",
            PadsToAFixedWidth,
            "test_block_tables_are_int32_and_padded",
            "one column per page of the longest",
        ),
        ("block tables in int64", LongTables, "test_block_tables_are_int32_and_padded", "int64"),
        ("slots in int64", LongSlots, "test_slots_are_int32_and_follow_the_block_table", "int64"),
        (
            "slots in a row",
            SlotsInARow,
            "test_slots_are_int32_and_follow_the_block_table",
            "with the position's page",
        ),
        (
            "any slots",
            AnySlots,
            "test_positions_outside_a_request_are_refused",
            "must raise IndexError",
        ),
        (
            "checks nothing",
            ChecksNothing,
            "test_check_integrity_detects_corruption",
            "did not for any of 2",
        ),
        ("takes forks for damage", DislikesForks, "test_a_fork_outlives_its_parent", "two holders"),
    )
]

SUITE = KvAllocatorSuite


def test_the_suite_fails_each_broken_allocator() -> None:
    assert not missed(KvAllocatorSuite, FAULTS)


@pytest.mark.parametrize(
    "broken", [SharesThePartlyFullPage, FreesSharedPages, CopiesKeysAlone, ForgetsPages]
)
def test_the_model_finds_what_shows_in_what_requests_read(broken: type[KvCacheManager]) -> None:
    def make(total_pages: int, **changed: Any) -> KvCacheManager:
        return broken(small_spec(**changed), total_pages)

    with pytest.raises((AssertionError, pytest.fail.Exception)):
        run_state_machine_as_test(
            lambda: AllocatorMachine(make),
            settings=settings(
                deadline=None, database=None, derandomize=True, phases=[Phase.generate]
            ),
        )


def test_the_suite_passes_what_is_right_though_it_is_another() -> None:
    outcome = run(KvAllocatorSuite, Allocators(Highest), own_tests(KvAllocatorSuite))
    assert not outcome.failed, outcome.why
    assert len(outcome.found) > 25


class Highest:
    """Pages in sets, the highest first, and tensors that are allocated as one."""

    def __init__(self, request: KvAllocatorRequest):
        spec = self.spec = request.spec
        pages = budget(request)
        whole = KvCacheManager(spec, pages).layers()
        self._layers = tuple(whole)
        self._unheld = set(range(pages))
        self._of: dict[str, tuple[int, tuple[int, ...]]] = {}
        self.total_pages = pages

    @property
    def free_pages(self) -> int:
        return len(self._unheld)

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.spec.page_size)

    def allocate(self, request_id: str, num_tokens: int) -> None:
        if request_id in self._of or num_tokens < 1:
            raise ValueError(f"cannot allocate {num_tokens} tokens for {request_id!r}")
        self._of[request_id] = (num_tokens, self._take(self.pages_for(num_tokens)))

    def extend(self, request_id: str, num_tokens: int = 1) -> None:
        length, pages = self._of[request_id]
        more = self.pages_for(length + num_tokens) - len(pages)
        self._of[request_id] = (length + num_tokens, pages + self._take(more))

    def num_tokens(self, request_id: str) -> int:
        return self._of[request_id][0]

    def slots(self, request_id: str, start: int, stop: int) -> Tensor:
        length, pages = self._of[request_id]
        if not 0 <= start <= stop <= length:
            raise IndexError(f"{start} to {stop} of {length}")
        size = self.spec.page_size
        position = torch.arange(start, stop)
        page = torch.tensor(pages)[position // size]
        return (page * size + position % size).int()

    def block_table(self, request_ids: Sequence[str]) -> Tensor:
        rows = [torch.tensor(self._of[r][1]).int() for r in request_ids]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)

    def fork(self, parent_id: str, child_id: str) -> None:
        if child_id in self._of:
            raise ValueError(f"{child_id!r} is there")
        length, pages = self._of[parent_id]
        full = length // self.spec.page_size
        if pages[full:] and self.spec.allocate:
            raise ValueError("this storage cannot be copied")
        own = self._take(len(pages) - full)
        for layer in self._layers if own else ():
            layer.key[own[0]] = layer.key[pages[full]]
            layer.value[own[0]] = layer.value[pages[full]]
        self._of[child_id] = (length, pages[:full] + own)

    def free(self, request_id: str) -> None:
        _, pages = self._of.pop(request_id)
        held = {page for _, others in self._of.values() for page in others}
        self._unheld |= set(pages) - held

    def layers(self) -> Sequence[KvLayer]:
        return self._layers

    def check_integrity(self) -> None:
        held = {page for _, pages in self._of.values() for page in pages}
        assert not held & self._unheld
        assert held | self._unheld == set(range(self.total_pages))

    def _take(self, count: int) -> tuple[int, ...]:
        if count > len(self._unheld):
            raise OutOfPagesError(f"{count} pages are needed, {len(self._unheld)} are free")
        taken = sorted(self._unheld, reverse=True)[:count]
        self._unheld -= set(taken)
        return tuple(taken)
