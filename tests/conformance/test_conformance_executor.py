"""The suite of executors finds each of these broken ones, by the test that is meant for it."""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from asked import Asked
from attrs import asdict, evolve, frozen
from conformance import Fault, full_name, missed, own_tests, run
from planted import MISTAKES, PlantedExecutor
from planted import Options as Planted
from torch import Tensor

from tilewright import hookimpl
from tilewright.errors import ExecutorError
from tilewright.types import (
    ExecutorLimits,
    KvCacheSpec,
    KvLayer,
    ModelConfig,
    PackedTensor,
    PackedWeights,
    PluginInfo,
    Report,
    RuntimeConfig,
    SampledToken,
    SamplerRow,
    SamplingParams,
    StepBatch,
    StepOutput,
    Tap,
    TensorSource,
)
from tilewright.weights import expected_tensors, typed_tensors
from tilewright_testing import ExecutorSuite
from tilewright_testing.executor import MODELS
from tilewright_testing.models import MemorySource
from tilewright_torch import plugin as shipped
from tilewright_torch.model import TorchExecutor, _Step
from tilewright_torch.weights import Model


class Executors:
    """A plugin that makes executors in some way."""

    tilewright_api = 2

    def __init__(self, make: Callable[[Asked], Any], **info: Any):
        """info: fields of the plugin's PluginInfo."""
        self.make = make
        self.info = PluginInfo(summary="computes on the CPU", **info)

    @hookimpl
    def plugin_info(self) -> PluginInfo:
        return self.info

    @hookimpl
    def create_executor(
        self,
        model_config: ModelConfig,
        runtime_config: RuntimeConfig,
        weights: TensorSource,
        packed: bool,
        layers: range,
        report: Report,
    ) -> Any:
        asked = Asked(
            model_config=model_config,
            runtime_config=runtime_config,
            weights=weights,
            layers=layers,
            packed=packed,
            report=report,
        )
        return self.make(asked)


def of(cls: type[TorchExecutor], **changed: Any) -> Executors:
    """A plugin of executors of a class, with fields of their kv_cache_spec changed."""

    def make(asked: Asked) -> Any:
        made = asked.of(shipped)
        return cls(made._opened(), evolve(made.kv_cache_spec, **changed), asked.layers)

    return Executors(make)


def planted(mistake: str, layer: int = 0, phase: str = "both") -> Executors:
    """A plugin of executors that compute one thing wrongly."""

    def make(asked: Asked) -> Any:
        made = asked.of(shipped)
        options = Planted(mistake, layer, phase)
        return PlantedExecutor(made._opened(), made.kv_cache_spec, asked.layers, options)

    return Executors(make)


Logits = Callable[[Tensor, StepBatch], Tensor]


def with_logits(change: Logits) -> type[TorchExecutor]:
    """Executors whose steps return something else."""

    class Changed(TorchExecutor):
        def forward(self, batch: StepBatch, tap: "Tap | None" = None) -> Tensor:
            return change(super().forward(batch, tap), batch)

    return Changed


def with_batch(change: Callable[[StepBatch, KvCacheSpec], StepBatch]) -> type[TorchExecutor]:
    """Executors that run another step than they are given."""

    class Changed(TorchExecutor):
        def forward(self, batch: StepBatch, tap: "Tap | None" = None) -> Tensor:
            return super().forward(change(batch, self.kv_cache_spec), tap)

    return Changed


# --- rows, chunks, pages --------------------------------------------------------------------------


def last_rows(batch: StepBatch, spec: KvCacheSpec) -> StepBatch:
    count = len(batch.logits_rows)
    return evolve(batch, logits_rows=torch.arange(len(batch.token_ids))[-count:][:count])


def some_row(batch: StepBatch, spec: KvCacheSpec) -> StepBatch:
    return batch if len(batch.logits_rows) else evolve(batch, logits_rows=torch.tensor([0]))


def pages_in_a_row(batch: StepBatch, spec: KvCacheSpec) -> StepBatch:
    """As if a sequence's pages followed each other in memory."""
    first = batch.block_table[:, :1]
    table = first + torch.arange(batch.block_table.shape[1], dtype=torch.int32)
    return evolve(batch, block_table=table % 40)


def of_equal_lengths(batch: StepBatch, spec: KvCacheSpec) -> StepBatch:
    """As if all sequences were padded to the longest one."""
    longest = batch.context_lens.max().expand(len(batch.context_lens)).clone()
    pages = -(-longest // spec.page_size)
    held = (batch.block_table >= 0).sum(1)
    return evolve(batch, context_lens=torch.where(held >= pages, longest, batch.context_lens))


def chunk_alone(batch: StepBatch, spec: KvCacheSpec) -> StepBatch:
    """As if nothing came before a chunk."""
    new = batch.query_starts.diff()
    if (new == 1).all():
        return batch
    start = (batch.context_lens - new) // spec.page_size
    table = batch.block_table.clone()
    for row, first in enumerate(start.tolist()):
        table[row] = table[row].roll(-first)
    return evolve(
        batch, context_lens=batch.context_lens - start * spec.page_size, block_table=table
    )


def rotated_for_each_step(batch: StepBatch, spec: KvCacheSpec) -> StepBatch:
    """As if a prompt ended with the step."""
    return evolve(batch, prompt_lens=batch.context_lens)


def wraps_at(limit: int) -> Any:
    def change(batch: StepBatch, spec: KvCacheSpec) -> StepBatch:
        return evolve(batch, positions=batch.positions % limit)

    return change


def turned_from(row: int) -> type[TorchExecutor]:
    """Executors that compute a step of one token each with buffers for fewer sequences."""

    def change(logits: Tensor, batch: StepBatch) -> Tensor:
        late = batch.logits_rows >= row
        return logits.where(~late.unsqueeze(1) | (batch.max_query_len > 1), logits.roll(1, 1))

    return with_logits(change)


def tokens_up_to(most: int) -> Any:
    """As if the tokens of a step after the first few had the position before theirs."""

    def change(batch: StepBatch, spec: KvCacheSpec) -> StepBatch:
        late = torch.arange(len(batch.token_ids)) >= most
        many = len(batch.context_lens) > 1
        return evolve(batch, positions=batch.positions - (late & many).int())

    return change


def one_table_for_a_first_page(batch: StepBatch, spec: KvCacheSpec) -> StepBatch:
    """As if prompts that begin with the same page were in the same pages altogether."""
    if batch.max_query_len == 1:
        return batch
    like = batch.block_table[:, :1] == batch.block_table[:, 0]
    first = like.int().argmax(1)
    longest = (batch.block_table[first] >= 0).sum(1) >= (batch.block_table >= 0).sum(1)
    table = torch.where(longest.unsqueeze(1), batch.block_table[first], batch.block_table)
    return evolve(batch, block_table=table)


def drafts_in_one_place(batch: StepBatch, spec: KvCacheSpec) -> StepBatch:
    """As if the guesses were alternatives for one position."""
    firsts = (batch.query_starts[:-1] + 1).repeat_interleave(batch.query_starts.diff())
    drafts = batch.num_drafts.repeat_interleave(batch.query_starts.diff()) > 0
    rows = torch.arange(len(batch.token_ids)).minimum(firsts.long())
    return evolve(
        batch, positions=batch.positions[torch.where(drafts, rows, torch.arange(len(rows)))]
    )


@frozen(kw_only=True, eq=False)
class OwnStep(_Step):
    shown: Tensor
    """Slots of the pages, where keys and values are shown."""


class OwnCache(TorchExecutor):
    """Keeps the keys and values of each sequence in one piece, and shows them in the pages too."""

    MOST = 64
    """Pages of a sequence."""

    def key(self, batch: StepBatch, row: int) -> Any:
        """What tells one sequence from another."""
        return batch.request_ids[row]

    def ended(self, batch: StepBatch) -> None:
        for request in batch.ended_request_ids:
            self._free.append(self._places.pop(request))

    def allocate_kv(self, num_pages: int) -> None:
        super().allocate_kv(num_pages)
        slots = self.MOST * num_pages * self.kv_cache_spec.page_size
        self._own = [
            tuple(torch.zeros(slots, *t.shape[1:], dtype=t.dtype) for t in kv) for kv in self._kv
        ]
        self._places: dict[Any, int] = {}
        self._free = list(range(num_pages))[::-1]

    def begin(self, batch: StepBatch) -> _Step:
        self.ended(batch)
        size, starts, width = self.kv_cache_spec.page_size, [], batch.block_table.shape[1]
        for row in range(len(batch.context_lens)):
            key = self.key(batch, row)
            if key not in self._places:
                self._places[key] = self._free.pop()
            starts.append(self._places[key] * self.MOST)
        first = torch.tensor(starts, dtype=torch.int32).unsqueeze(1)
        table = first + torch.arange(width, dtype=torch.int32)
        slots = (first * size).flatten().repeat_interleave(batch.query_starts.diff())
        own = evolve(batch, block_table=table, slot_mapping=slots + batch.positions)
        given = asdict(super().begin(own), recurse=False)
        return OwnStep(shown=batch.slot_mapping.long(), **given)

    def run_layer(
        self, step: _Step, layer: int, hidden: Tensor, tap: "Tap | None" = None
    ) -> Tensor:
        assert isinstance(step, OwnStep)
        pages, self._kv = self._kv, self._own
        try:
            out = super().run_layer(step, layer, hidden, tap)
        finally:
            self._kv = pages
        at = self.layers.index(layer)
        for shown, own in zip(self._kv[at], self._own[at], strict=True):
            shown[step.shown] = own[step.slots]
        return out


class OwnCacheByPage(OwnCache):
    """Tells sequences apart by their first page."""

    def key(self, batch: StepBatch, row: int) -> Any:
        return int(batch.block_table[row, 0])

    def ended(self, batch: StepBatch) -> None:
        pass


class OwnCacheUnshared(OwnCache):
    limits = ExecutorLimits(shares_pages=False)


class AppendsForever(OwnCacheUnshared):
    """Goes on where a request ended."""

    def ended(self, batch: StepBatch) -> None:
        self._lengths = getattr(self, "_lengths", {})

    def begin(self, batch: StepBatch) -> _Step:
        self.ended(batch)
        for row, request in enumerate(batch.request_ids):
            start = int(batch.positions[batch.query_starts[row]])
            if start == 0 and self._lengths.get(request):
                batch = evolve(batch, positions=batch.positions + 1)
        for request, length in zip(batch.request_ids, batch.context_lens.tolist(), strict=True):
            self._lengths[request] = length
        return super().begin(batch)


class Samples(TorchExecutor):
    """Takes the most likely token itself."""

    _last: Sequence[SampledToken | None] = ()

    def serves(self, params: SamplingParams) -> bool:
        return params.temperature == 0

    def submit(self, batch: StepBatch, sampling: Sequence[SamplerRow | None]) -> "Done":
        logits = self.forward(self.named(batch))
        tokens = [
            row and SampledToken(token_id=int(scores.argmax()))
            for row, scores in zip(sampling, logits, strict=True)
        ]
        self._last = tokens
        left = torch.tensor([row is None for row in sampling])
        return Done(StepOutput(tokens=tokens, logits=self.left(logits, left)))

    def named(self, batch: StepBatch) -> StepBatch:
        """The batch with the tokens that it names."""
        ids = batch.token_ids.clone()
        for at, source in enumerate(batch.token_source.tolist()):
            if source >= 0:
                ids[at] = self._last[source].token_id  # type: ignore[union-attr]
        return evolve(batch, token_ids=ids)

    def left(self, logits: Tensor, left: Tensor) -> Tensor | None:
        return logits[left] if left.any() else None


@frozen
class Done:
    output: StepOutput

    def wait(self) -> StepOutput:
        return self.output


class IgnoresNames(Samples):
    def named(self, batch: StepBatch) -> StepBatch:
        return batch


class GivesAllLogits(Samples):
    def left(self, logits: Tensor, left: Tensor) -> Tensor | None:
        return logits


class RemembersPages(TorchExecutor):
    """Writes to a slot once, and takes what is there for written after that."""

    def __init__(self, model: Model, spec: KvCacheSpec, layers: range):
        super().__init__(model, spec, layers)
        self._written: set[int] = set()
        self._kept: dict[int, list[Tensor]] = {}

    def forward(self, batch: StepBatch, tap: "Tap | None" = None) -> Tensor:
        slots = batch.slot_mapping.tolist()
        logits = super().forward(batch, tap)
        for slot in slots:
            now = [t[slot] for layer in self._kv for t in layer]
            if slot in self._kept:
                for tensor, old in zip(now, self._kept[slot], strict=True):
                    tensor.copy_(old)
            else:
                self._kept[slot] = [t.clone() for t in now]
        return logits


class DecodesByItself(TorchExecutor):
    """It has another way to compute steps of one token each, which rounds coarsely."""

    def forward(self, batch: StepBatch, tap: "Tap | None" = None) -> Tensor:
        return super().forward(batch, tap) * (1.01 if batch.max_query_len == 1 else 1.0)


class TakesOneTokenForADecode(TorchExecutor):
    """Attends to what was before a sequence of one token, also where nothing was."""

    def forward(self, batch: StepBatch, tap: "Tap | None" = None) -> Tensor:
        if batch.max_query_len == 1 and int(batch.positions.max()) == 0:
            batch = evolve(batch, positions=batch.positions + 1)
        return super().forward(batch, tap)


# --- what it states of itself ---------------------------------------------------------------------


class RunsFewer(TorchExecutor):
    limits = ExecutorLimits(max_batch_size=64)

    def forward(self, batch: StepBatch, tap: "Tap | None" = None) -> Tensor:
        if len(batch.context_lens) > 5:
            raise ExecutorError("at most 5 sequences")
        return super().forward(batch, tap)


class GivesFewerRows(TorchExecutor):
    limits = ExecutorLimits(max_logits_rows=8)

    def forward(self, batch: StepBatch, tap: "Tap | None" = None) -> Tensor:
        beyond = ~torch.isin(batch.logits_rows, batch.query_starts[1:] - 1)
        if int(beyond.sum()) > 3 and not batch.num_drafts.any():
            raise ExecutorError("at most 3 rows beyond those that are sampled")
        return super().forward(batch, tap)


class GivesThreeRows(GivesFewerRows):
    limits = ExecutorLimits(max_logits_rows=3)


def mixes(batch: StepBatch) -> bool:
    new = batch.query_starts.diff()
    decodes = (batch.context_lens > new) & (new == batch.num_drafts + 1)
    return bool(decodes.any() and not decodes.all())


class MixesWrongly(TorchExecutor):
    """Takes all sequences of a step for prompts as soon as one is."""

    def forward(self, batch: StepBatch, tap: "Tap | None" = None) -> Tensor:
        if mixes(batch):
            table = batch.block_table.roll(1, 0).where(batch.block_table >= 0, batch.block_table)
            batch = evolve(batch, block_table=table.where(table >= 0, batch.block_table))
        return super().forward(batch, tap)


class DoesNotMix(TorchExecutor):
    limits = ExecutorLimits(mixed=False, max_batch_tokens=40)
    _cut = ""
    """The request whose prompt may go on in the next step, perhaps with one token."""

    def forward(self, batch: StepBatch, tap: "Tap | None" = None) -> Tensor:
        if mixes(batch) and self._cut not in batch.request_ids:
            raise ExecutorError("prompts and decoding sequences in one step")
        self._cut = batch.request_ids[-1] if len(batch.token_ids) == 40 else ""
        return super().forward(batch, tap)


class PerhapsMixes(TorchExecutor):
    limits = ExecutorLimits(mixed=1)  # type: ignore[arg-type]


class NoLimit(TorchExecutor):
    limits = ExecutorLimits(max_batch_size=0)


class NoDevice(TorchExecutor):
    device = ""


class OtherSpecEachTime(TorchExecutor):
    @property
    def kv_cache_spec(self) -> KvCacheSpec:
        self._memory = getattr(self, "_memory", 10**9) - 1
        return evolve(self._spec, memory_limit=self._memory)

    @kv_cache_spec.setter
    def kv_cache_spec(self, spec: KvCacheSpec) -> None:
        self._spec = spec


class Turned(TorchExecutor):
    """Says HND, and lays rows out as NHD."""

    def allocate_kv(self, num_pages: int) -> None:
        super().allocate_kv(num_pages)
        spec = self.kv_cache_spec
        page = (-1, spec.page_size, spec.num_kv_heads, spec.head_dim)
        self._kv = [
            (layer.key.view(page).flatten(0, 1), layer.value.view(page).flatten(0, 1))
            for layer in self._cache
        ]


# --- side effects ---------------------------------------------------------------------------------


class WritesOnePast(TorchExecutor):
    """Writes in blocks of two tokens."""

    def forward(self, batch: StepBatch, tap: "Tap | None" = None) -> Tensor:
        logits = super().forward(batch, tap)
        past = int(batch.slot_mapping[-1]) + 1
        for keys, values in self._kv:
            keys[past] = values[past] = 0
        return logits


class WritesTheFirstSlot(TorchExecutor):
    """Sends the padding of its block table to slot 0."""

    def forward(self, batch: StepBatch, tap: "Tap | None" = None) -> Tensor:
        logits = super().forward(batch, tap)
        if (batch.block_table < 0).any():
            for keys, values in self._kv:
                keys[0] = values[0] = 0
        return logits


class LeavesOutTheLastValue(TorchExecutor):
    def forward(self, batch: StepBatch, tap: "Tap | None" = None) -> Tensor:
        _, values = self._kv[-1]
        before = values[int(batch.slot_mapping[-1])].clone()
        logits = super().forward(batch, tap)
        values[int(batch.slot_mapping[-1])] = before
        return logits


class MultipliesStaleValues(TorchExecutor):
    """Weights of 0 for all that is in the cache: NaN times 0 is NaN."""

    def forward(self, batch: StepBatch, tap: "Tap | None" = None) -> Tensor:
        pages = batch.block_table[batch.block_table >= 0].long()
        size = self.kv_cache_spec.page_size
        slots = (pages.unsqueeze(1) * size + torch.arange(size)).flatten()
        logits = super().forward(batch, tap)
        return logits + 0 * self._kv[0][1][slots].float().sum()


class WritesToTheBatch(TorchExecutor):
    def forward(self, batch: StepBatch, tap: "Tap | None" = None) -> Tensor:
        batch.block_table.clamp_(min=0)
        return super().forward(batch, tap)


class ScalesWeights(TorchExecutor):
    def __init__(self, model: Model, spec: KvCacheSpec, layers: range):
        super().__init__(model, spec, layers)
        for name, tensor in model.weights.items():
            if name.endswith("q_proj.weight"):
                tensor.mul_(2).div_(2).add_(1e-3)


def read_late(asked: Asked) -> Any:
    """Its weights are read when they are used first."""

    class Late(TorchExecutor):
        def _opened(self) -> Model:
            asked.weights.get("model.norm.weight")
            return super()._opened()

    made = asked.of(shipped)
    return Late(made._opened(), made.kv_cache_spec, asked.layers)


def changing(change: Callable[[], object]) -> Executors:
    """One that changes something in its process when it is made."""

    def make(asked: Asked) -> Any:
        made = asked.of(shipped)
        change()
        return made

    return Executors(make)


class TurnsGradientsOff(TorchExecutor):
    def forward(self, batch: StepBatch, tap: "Tap | None" = None) -> Tensor:
        torch.set_grad_enabled(False)
        return super().forward(batch, tap)


# --- taps -----------------------------------------------------------------------------------------


def with_tap(change: Callable[[str, Tensor, Tap], None]) -> type[TorchExecutor]:
    """Executors that hand something else to their taps."""

    class Changed(TorchExecutor):
        def forward(self, batch: StepBatch, tap: "Tap | None" = None) -> Tensor:
            return super().forward(batch, tap and (lambda name, x: change(name, x, tap)))

    return Changed


class RemembersTheTap(TorchExecutor):
    _last: "Tap | None" = None

    def forward(self, batch: StepBatch, tap: "Tap | None" = None) -> Tensor:
        self._last = tap or self._last
        return super().forward(batch, self._last)


class ComputesOtherwiseForTaps(TorchExecutor):
    def forward(self, batch: StepBatch, tap: "Tap | None" = None) -> Tensor:
        logits = super().forward(batch, tap)
        return logits.bfloat16().float() if tap else logits


class FasterWithoutTaps(TorchExecutor):
    """Without a tap, it computes in another order."""

    limits = ExecutorLimits(tap_exact=False)
    factor = 1 + 2e-7

    def forward(self, batch: StepBatch, tap: "Tap | None" = None) -> Tensor:
        logits = super().forward(batch, tap)
        return logits if tap else logits * self.factor


class Limited(DoesNotMix, GivesThreeRows, FasterWithoutTaps, OwnCacheUnshared):
    """Right within the limits that it states, which are those of all of these."""

    limits = ExecutorLimits(
        mixed=False, max_batch_tokens=40, max_logits_rows=3, tap_exact=False, shares_pages=False
    )


class WrongWithoutTaps(FasterWithoutTaps):
    factor = 1.01


class CachesWronglyWithoutTaps(FasterWithoutTaps):
    def forward(self, batch: StepBatch, tap: "Tap | None" = None) -> Tensor:
        logits = super().forward(batch, tap)
        if not tap:
            self._kv[-1][1][batch.slot_mapping.long()] *= 1.01
        return logits


# --- repetition, and several executors -----------------------------------------------------------


class Noisy(TorchExecutor):
    """Adds up in another order each time."""

    def __init__(self, model: Model, spec: KvCacheSpec, layers: range):
        super().__init__(model, spec, layers)
        self._random = torch.Generator().manual_seed(0)

    def run_head(self, step: Any, hidden: Tensor, tap: "Tap | None" = None) -> Tensor:
        logits = super().run_head(step, hidden, tap)
        return logits * (1 + 1e-7 * torch.randn(logits.shape, generator=self._random))


class Averages(TorchExecutor):
    """Carries something on from step to step."""

    mean = 0.0

    def run_head(self, step: Any, hidden: Tensor, tap: "Tap | None" = None) -> Tensor:
        logits = super().run_head(step, hidden + 1e-6 * self.mean, tap)
        self.mean = 0.5 * self.mean + float(hidden.float().mean() if len(hidden) else 0)
        return logits


class OneForAll(TorchExecutor):
    """Its cache is that of the executor that allocated one last."""

    shared: ClassVar[list[Any]] = []

    def allocate_kv(self, num_pages: int) -> None:
        super().allocate_kv(num_pages)
        OneForAll.shared[:] = self._kv

    def forward(self, batch: StepBatch, tap: "Tap | None" = None) -> Tensor:
        self._kv = list(OneForAll.shared)
        return super().forward(batch, tap)


class ClosesAll(TorchExecutor):
    """Frees what another one of its class works with."""

    made: ClassVar[list["ClosesAll"]] = []

    def __init__(self, model: Model, spec: KvCacheSpec, layers: range):
        super().__init__(model, spec, layers)
        ClosesAll.made.append(self)

    def close(self) -> None:
        for one in ClosesAll.made:
            TorchExecutor.close(one)
        ClosesAll.made.clear()


class ClosesOnce(TorchExecutor):
    def close(self) -> None:
        self._opened()
        super().close()


class StaysOpen(TorchExecutor):
    def close(self) -> None:
        pass


class Crashes(TorchExecutor):
    def _opened(self) -> Model:
        assert self._model is not None, "the model is gone"
        return self._model


CONVERTED: dict[str, Tensor] = {}


def cached_by_name(asked: Asked) -> Any:
    """Keeps converted weights for all models, by their names."""
    made = asked.of(shipped)
    model = made._opened()
    key = f"{model.final_norm.shape}{model.dtype}"
    norm = CONVERTED.setdefault(key, model.final_norm.clone())
    return TorchExecutor(evolve(model, final_norm=norm), made.kv_cache_spec, asked.layers)


# --- invalid requests -----------------------------------------------------------------------------


def any_device(asked: Asked) -> Any:
    return evolve(asked, runtime_config=evolve(asked.runtime_config, device=None)).of(shipped)


def refuses_late(asked: Asked) -> Any:
    for name in asked.weights.names():
        asked.weights.get(name)
    return asked.of(shipped)


def refuses_with(error: Callable[[ExecutorError], Exception]) -> Executors:
    def make(asked: Asked) -> Any:
        try:
            return asked.of(shipped)
        except ExecutorError as refused:
            raise error(refused) from refused

    return Executors(make)


def reads_before_it_refuses_biases(asked: Asked) -> Any:
    made = asked.of(shipped)
    if asked.model_config.mlp_bias:
        raise ExecutorError("no biases")
    return made


def runs_any_heads(asked: Asked) -> Any:
    config = asked.model_config
    if config.num_heads % config.num_kv_heads:
        config = evolve(config, num_kv_heads=1)
    return evolve(asked, model_config=config).of(shipped)


def counts_down(asked: Asked) -> Any:
    asked.report("kernels", 3, 2)
    return asked.of(shipped)


def ignores_page_size(asked: Asked) -> Any:
    runtime = evolve(asked.runtime_config, page_size=8)
    return evolve(asked, runtime_config=runtime).of(shipped)


def no_page_size(asked: Asked) -> Any:
    made = asked.of(shipped)
    if asked.runtime_config.page_size is None:
        made.kv_cache_spec = evolve(made.kv_cache_spec, page_size=0)
    return made


# --- packed weights -------------------------------------------------------------------------------


class Packing(Executors):
    """Packs weights under names of its own, those of the checkpoint behind ``packed.``."""

    version = 1

    def __init__(self) -> None:
        super().__init__(self.unpacked)

    def unpacked(self, asked: Asked) -> Any:
        if asked.packed:
            names = (f"packed.{name}" for name in expected_tensors(asked.model_config))
            tensors = {n.removeprefix("packed."): asked.weights.get(n) for n in names}
            asked = evolve(asked, weights=MemorySource(tensors), packed=False)
        return asked.of(shipped)

    @hookimpl
    def pack_weights(
        self, model_config: ModelConfig, runtime_config: RuntimeConfig, weights: TensorSource
    ) -> PackedWeights:
        return PackedWeights(
            version=self.version,
            tensors=map(
                self.change,
                self.typed(model_config, runtime_config, weights),
            ),
        )

    @staticmethod
    def typed(
        config: ModelConfig, runtime: RuntimeConfig, weights: TensorSource
    ) -> Iterator[PackedTensor]:
        assert runtime.weight_dtype is not None
        return typed_tensors(config, weights, runtime.weight_dtype)

    def change(self, tensor: PackedTensor) -> PackedTensor:
        return evolve(tensor, name=f"packed.{tensor.name}")


class PacksFlat(Packing):
    def change(self, tensor: PackedTensor) -> PackedTensor:
        return evolve(super().change(tensor), read=lambda: tensor.read().flatten())


class PacksOther(Packing):
    def change(self, tensor: PackedTensor) -> PackedTensor:
        return evolve(super().change(tensor), read=lambda: tensor.read() + 1e-3)


class PacksAtOnce(Packing):
    def change(self, tensor: PackedTensor) -> PackedTensor:
        made = tensor.read()
        return evolve(super().change(tensor), read=lambda: made)


class PacksBackwards(Packing):
    @hookimpl
    def pack_weights(
        self, model_config: ModelConfig, runtime_config: RuntimeConfig, weights: TensorSource
    ) -> PackedWeights:
        tensors = list(
            map(
                self.change,
                self.typed(model_config, runtime_config, weights),
            )
        )
        return PackedWeights(version=self.version, tensors=tensors[::-1])


class PacksUnversioned(Packing):
    version = 0


class CoarseCache(TorchExecutor):
    """Writes keys and values of any dtype in bfloat16."""

    def forward(self, batch: StepBatch, tap: "Tap | None" = None) -> Tensor:
        slots, logits = batch.slot_mapping.long(), super().forward(batch, tap)
        for keys, values in self._kv if self._kv[0][0].dtype == torch.float16 else ():
            for rows in (keys, values):
                rows[slots] = rows[slots].bfloat16().half()
        return logits


# --- layer by layer -------------------------------------------------------------------------------


class NormsInPlace(TorchExecutor):
    def run_layer(self, step: Any, layer: int, hidden: Tensor, tap: "Tap | None" = None) -> Tensor:
        return hidden.copy_(super().run_layer(step, layer, hidden, tap))


class OwnLayers(TorchExecutor):
    """Its layers alone are not those of its steps."""

    in_step = False

    def forward(self, batch: StepBatch, tap: "Tap | None" = None) -> Tensor:
        self.in_step = True
        try:
            return super().forward(batch, tap)
        finally:
            self.in_step = False

    def run_layer(self, step: Any, layer: int, hidden: Tensor, tap: "Tap | None" = None) -> Tensor:
        out = super().run_layer(step, layer, hidden, tap)
        return out if self.in_step else out * (1 + 2e-7)


class ReadsValuesAsKeys(TorchExecutor):
    """Its steps write keys where it reads values, so that only steps show it."""

    def read_kv(self, layer: int, pages: Sequence[int]) -> KvLayer:
        cache = super().read_kv(layer, pages)
        return KvLayer(cache.value, cache.key)

    def write_kv(self, layer: int, pages: Sequence[int], cache: KvLayer) -> None:
        super().write_kv(layer, pages, KvLayer(cache.value, cache.key))


class WritesNoCache(TorchExecutor):
    def write_kv(self, layer: int, pages: Sequence[int], cache: KvLayer) -> None:
        pass


class WritesTheFirstLayersCache(TorchExecutor):
    def write_kv(self, layer: int, pages: Sequence[int], cache: KvLayer) -> None:
        super().write_kv(0, pages, cache)
        super().write_kv(layer, pages, cache)


class SortsPages(TorchExecutor):
    def read_kv(self, layer: int, pages: Sequence[int]) -> KvLayer:
        return super().read_kv(layer, sorted(pages))

    def write_kv(self, layer: int, pages: Sequence[int], cache: KvLayer) -> None:
        super().write_kv(layer, sorted(pages), cache)


class ReadsAView(TorchExecutor):
    """Hands out the cache itself where the pages follow each other."""

    def read_kv(self, layer: int, pages: Sequence[int]) -> KvLayer:
        first, cache = pages[0], self._cache[self.layers.index(layer)]
        if list(pages) == list(range(first, first + len(pages))):
            part = slice(first, first + len(pages))
            return KvLayer(cache.key[part], cache.value[part])
        return super().read_kv(layer, pages)


class WritesAllPagesBetween(TorchExecutor):
    def write_kv(self, layer: int, pages: Sequence[int], cache: KvLayer) -> None:
        for page in range(min(pages), max(pages) + 1):
            super().write_kv(layer, [page], KvLayer(cache.key[:1], cache.value[:1]))
        super().write_kv(layer, pages, cache)


class AsPacked(TorchExecutor):
    def weight(self, name: str) -> Tensor:
        found = super().weight(name)
        return found.T.reshape(found.shape) if name.endswith("o_proj.weight") else found


class AnyWeight(TorchExecutor):
    def weight(self, name: str) -> Tensor:
        return self._opened().weights.get(name, torch.zeros(1))


# --- parts of the layers --------------------------------------------------------------------------


class PartOfLayers(TorchExecutor):
    @property
    def part(self) -> bool:
        return len(self.layers) < self._num_layers


class OtherLayersInParts(PartOfLayers):
    def run_layer(self, step: Any, layer: int, hidden: Tensor, tap: "Tap | None" = None) -> Tensor:
        out = super().run_layer(step, layer, hidden, tap)
        return out * (1 + 2e-7) if self.part else out


class OtherCacheInParts(PartOfLayers):
    def run_layer(self, step: Any, layer: int, hidden: Tensor, tap: "Tap | None" = None) -> Tensor:
        out = super().run_layer(step, layer, hidden, tap)
        if self.part:
            self._kv[0][1][step.slots] *= 1 + 2e-7
        return out


class OtherHeadInParts(PartOfLayers):
    def run_head(self, step: Any, hidden: Tensor, tap: "Tap | None" = None) -> Tensor:
        return super().run_head(step, hidden, tap) * (1 + 2e-7 * self.part)


class CountsLayersFromZero(TorchExecutor):
    def __init__(self, model: Model, spec: KvCacheSpec, layers: range):
        super().__init__(model, spec, layers)
        self.layers = range(len(layers))


class RunsParts(TorchExecutor):
    """Its steps run the layers that it has."""

    def forward(self, batch: StepBatch, tap: "Tap | None" = None) -> Tensor:
        model = self._opened()
        if model.embedding is not None and model.head is not None:
            return super().forward(batch, tap)
        return torch.zeros(len(batch.logits_rows), model.config.vocab_size)


class EmbedsInAllParts(TorchExecutor):
    def embed(self, step: Any, tap: "Tap | None" = None) -> Tensor:
        model = self._opened()
        if model.embedding is None:
            return torch.zeros(len(step.token_ids), model.config.hidden_size)
        return super().embed(step, tap)


class HasAHeadInAllParts(TorchExecutor):
    def run_head(self, step: Any, hidden: Tensor, tap: "Tap | None" = None) -> Tensor:
        model = self._opened()
        if model.head is None:
            return torch.zeros(len(hidden), model.config.vocab_size)
        return super().run_head(step, hidden, tap)


class ShowsWeightsOfOtherParts(TorchExecutor):
    def weight(self, name: str) -> Tensor:
        shapes = expected_tensors(self._opened().config)
        if name in shapes and name not in self._opened().weights:
            return torch.zeros(shapes[name])
        return super().weight(name)


def reads_all(asked: Asked) -> Any:
    for name in asked.weights.names():
        asked.weights.get(name)
    return asked.of(shipped)


def caches_all_layers(asked: Asked) -> Any:
    made = asked.of(shipped)
    count = asked.model_config.num_layers
    made.kv_cache_spec = evolve(made.kv_cache_spec, num_layers=count)
    return made


# --- quantised weights ----------------------------------------------------------------------------

Packed = tuple[Tensor, Tensor]
"""Weights in int8, [out, in], and the scale of each row, [out, 1]."""


def packed(weight: Tensor) -> Packed:
    scale = weight.float().abs().amax(1, keepdim=True) / 127
    return (weight.float() / scale).round().to(torch.int8), scale


class Int8Source:
    """A checkpoint as int8 shows it: matrices of the layers are rounded."""

    def __init__(self, weights: TensorSource, change: Callable[[str, Tensor], Tensor]):
        self.weights, self.change = weights, change
        self.names, self.info, self.close = weights.names, weights.info, weights.close

    def get(self, name: str) -> Tensor:
        weight = self.weights.get(name)
        if "_proj.weight" not in name:
            return weight
        values, scale = packed(self.change(name, weight))
        return values * scale


def int8(
    change: Callable[[str, Tensor], Tensor] = lambda name, weight: weight,
    rescale: float = 1.0,
    kv_dtypes: tuple[str, ...] = ("float32", "bfloat16"),
) -> Executors:
    """A plugin of executors that multiply with weights in int8, and scale each row of the result.

    change: of a weight, before it is packed. rescale: factor on the scales that the kernel uses.
    """

    def product(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
        values, scale = packed(weight)
        rows = (scale * rescale).T

        def multiply(x: Tensor) -> Tensor:
            out = (x.float() @ values.float().T) * rows
            return (out if bias is None else out + bias.float()).to(x.dtype)

        return multiply

    def make(asked: Asked) -> Any:
        runtime = asked.runtime_config
        if runtime.weight_dtype != "int8":
            raise ExecutorError(f"weights in int8 only, found {runtime.weight_dtype}")
        source: Any = Int8Source(asked.weights, change)
        dtype = asked.model_config.dtype
        given = evolve(runtime, weight_dtype=dtype)
        made = evolve(asked, weights=source, runtime_config=given).of(shipped)
        model = made._opened()
        layers = []
        for number, layer in zip(asked.layers, model.layers, strict=True):
            linears = {}
            for block, names in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down"))):
                for name in names:
                    of = f"model.layers.{number}.{block}.{name}_proj"
                    linears[name] = product(
                        change(f"{of}.weight", asked.weights.get(f"{of}.weight")),
                        model.weights.get(f"{of}.bias"),
                    )
            layers.append(evolve(layer, **linears))
        # What weight() shows is in float32: a bfloat16 would be rounded once more.
        return Int8(evolve(model, layers=layers), made.kv_cache_spec, asked.layers, source)

    return Executors(make, weight_dtypes=("int8",), kv_dtypes=kv_dtypes)


class Int8(TorchExecutor):
    def __init__(self, model: Model, spec: KvCacheSpec, layers: range, shown: Int8Source):
        super().__init__(model, spec, layers)
        self._shown = {name: shown.get(name).float() for name in model.weights}

    def weight(self, name: str) -> Tensor:
        self._opened()
        return self._shown[name]


def turned(name: str, weight: Tensor) -> Tensor:
    return weight.T if name.endswith("q_proj.weight") else weight


def swapped(name: str, weight: Tensor) -> Tensor:
    """Two rows in each other's place."""
    return weight[[1, 0, *range(2, len(weight))]] if name.endswith("k_proj.weight") else weight


class Int8WithoutLayers:
    """Runs whole steps only, so that nothing shows its weights."""

    def __init__(self, made: Any):
        for name in ("device", "limits", "kv_cache_spec", "allocate_kv", "read_kv", "write_kv"):
            setattr(self, name, getattr(made, name))
        self.forward, self.close = made.forward, made.close


def without_layers(plugin: Executors) -> Executors:
    return Executors(
        lambda asked: Int8WithoutLayers(plugin.make(asked)),
        weight_dtypes=plugin.info.weight_dtypes,
        kv_dtypes=plugin.info.kv_dtypes,
    )


# --- models and dtypes ----------------------------------------------------------------------------


def only(accepts: Callable[[Asked], bool]) -> Callable[[Asked], Any]:
    def make(asked: Asked) -> Any:
        if not accepts(asked):
            raise ExecutorError(f"a model of {asked.model_config.num_heads} heads is too much")
        return asked.of(shipped)

    return make


def is_grouped(asked: Asked) -> bool:
    return asked.model_config.num_heads == 6 and not asked.model_config.qkv_bias


def rewrite(name: str, x: Tensor, tap: Tap) -> None:
    """Flattens heads."""
    tap(name, x.flatten(1))


def rename(name: str, x: Tensor, tap: Tap) -> None:
    tap(name.replace("q_proj", "query"), x)


def twice(name: str, x: Tensor, tap: Tap) -> None:
    tap(name, x)
    if name == "embed":
        tap(name, x)


def unrotated(name: str, x: Tensor, tap: Tap) -> None:
    """Gives the name of one tensor to another."""
    tap(name, x.flip(0) if name.endswith("k_rope") else x)


def with_graph(logits: Tensor, batch: StepBatch) -> Tensor:
    return logits.clone().requires_grad_()


ALL = "prompts_that_end_near_a_page_boundary_are_correct"
ROWS = "logits_are_float32_and_of_the_requested_rows"
REFUSED = "an_unknown_device_is_refused"
PROCESS = "the_process_is_left_unchanged"
SHARED = "sequences_may_share_pages"
MANY = "batches_of_many_sequences_are_correct"
DYNAMIC = "dynamic_rope_is_that_of_the_whole_prompt"
NAMED = "a_step_may_name_tokens_that_the_step_before_samples"
PARTS = "parts_of_the_layers_give_the_results_of_the_whole"
TAPLESS = "a_tap_does_not_change_the_results"


# name, plugin or class of its executors, test that fails, words of the failure
class OfItsThread(TorchExecutor):
    """Keeps a buffer for each thread, and makes it once."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self._local = threading.local()
        self._local.buffer = torch.zeros(1)

    def forward(self, batch: StepBatch, tap: "Tap | None" = None) -> Tensor:
        return super().forward(batch, tap) + self._local.buffer


class ScalesInItsThread(TorchExecutor):
    """Has a setting of the thread that creates it."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self._creator = threading.get_ident()

    def forward(self, batch: StepBatch, tap: "Tap | None" = None) -> Tensor:
        logits = super().forward(batch, tap)
        return logits if threading.get_ident() == self._creator else 2 * logits


_FAULTS: list[tuple[str, Any, str, str]] = [
    # of itself
    (
        "ignores the page size",
        Executors(ignores_page_size),
        "it_uses_the_requested_page_size",
        "requested 4, found 8",
    ),
    (
        "ignores the KV dtype",
        of(TorchExecutor, dtype="float16"),
        "kv_cache_spec_matches_the_model_and_the",
        "kv_cache_spec",
    ),
    (
        "another spec each time",
        OtherSpecEachTime,
        "kv_cache_spec_matches_the_model_and_the",
        "must not change",
    ),
    (
        "a buffer of the thread that creates it",
        of(OfItsThread),
        "steps_may_run_in_another_thread",
        "found AttributeError: .*buffer",
    ),
    (
        "a setting of the thread that creates it",
        of(ScalesInItsThread),
        "steps_may_run_in_another_thread",
        "the same logits",
    ),
    ("names no device", NoDevice, "it_names_its_device", "device"),
    ("chooses no page size", Executors(no_page_size), "it_names_its_device", "page_size"),
    ("a limit of 0", NoLimit, "limits_are_positive", "max_batch_size must be"),
    (
        "runs fewer sequences than it says",
        RunsFewer,
        "batches_may_be_as_large_as_its_limits",
        "at most 5",
    ),
    (
        "reports 3 of 2",
        Executors(counts_down),
        "progress_reports_stay_within_their_total",
        "3, 2. must have",
    ),
    (
        "says neither yes nor no",
        PerhapsMixes,
        "limits_are_positive",
        "mixed must be True or False",
    ),
    (
        "gives fewer rows than it says",
        GivesFewerRows,
        ROWS,
        "at most 3 rows",
    ),
    (
        "refuses a model with biases that it states",
        Executors(only(is_grouped), serves=lambda config: True),
        "it_runs_the_models_that_it_states",
        "all-biases.*6 heads is too much",
    ),
    (
        "refuses a weight dtype",
        Executors(only(lambda asked: asked.runtime_config.weight_dtype == "float32")),
        "it_runs_the_dtypes_that_it_declares",
        "weight_dtypes declares bfloat16",
    ),
    (
        "refuses a KV dtype",
        Executors(only(lambda asked: asked.runtime_config.kv_dtype == "float32")),
        "it_runs_the_dtypes_that_it_declares",
        "kv_dtypes declares bfloat16",
    ),
    # results
    ("keeps a cache by first page", OwnCacheByPage, SHARED, "rounding explains"),
    ("keeps a cache by request", OwnCache, SHARED, "rounding explains"),
    (
        "takes prompts for equal that begin with the same page",
        with_batch(one_table_for_a_first_page),
        SHARED,
        "rounding explains",
    ),
    ("goes on where a request ended", AppendsForever, "ended_requests_are_forgotten", "k_cache"),
    ("turns logits from row 9 on", turned_from(8), MANY, "rounding explains"),
    ("turns logits from row 16 on", turned_from(15), MANY, "rounding explains"),
    ("turns logits from row 17 on", turned_from(16), MANY, "rounding explains"),
    ("runs 32 tokens of several sequences", with_batch(tokens_up_to(32)), MANY, "k_cache"),
    (
        "mixes wrongly",
        MixesWrongly,
        "prompts_chunks_and_decodes_may_share",
        "rounding explains|finite",
    ),
    (
        "ignores which tokens are named",
        IgnoresNames,
        NAMED,
        "must sample the tokens",
    ),
    ("gives the logits of rows that it samples", GivesAllLogits, NAMED, "and of no others"),
    (
        "takes drafts for alternatives",
        with_batch(drafts_in_one_place),
        "drafts_get_the_logits_of_plain_decoding",
        "rounding explains",
    ),
    (
        "pages in a row",
        with_batch(pages_in_a_row),
        "pages_may_be_in_any_order",
        "rounding explains|finite",
    ),
    (
        "forgets what came before a chunk",
        with_batch(chunk_alone),
        "chunks_give_the_logits_of_the_whole_prompt",
        "rounding explains",
    ),
    ("takes pages for written", RemembersPages, "freed_pages_may_be_reused_by_another", "k_cache"),
    ("decodes more loudly", DecodesByItself, "a_single_sequence_is_correct", "decode .* logits"),
    (
        "takes prompts of one token for decodes",
        TakesOneTokenForADecode,
        "prompts_of_one_token_are_correct",
        "k_cache",
    ),
    (
        "wraps positions at 255",
        with_batch(wraps_at(255)),
        "a_sequence_may_be_as_long_as_its_limit",
        "decode",
    ),
    (
        "wraps positions at 16",
        with_batch(wraps_at(16)),
        "batches_may_be_as_large_as_its_limits",
        "k_cache",
    ),
    (
        "rotates a prompt for the length of its chunks",
        with_batch(rotated_for_each_step),
        DYNAMIC,
        "k_cache",
    ),
    ("says HND, does NHD", of(Turned, row_order="HND"), ALL, "cache"),
    ("gives the last rows", with_batch(last_rows), ROWS, "rounding explains"),
    ("gives a row when none is wanted", with_batch(some_row), ROWS, "the shape .0, 131"),
    ("gives rows backwards", with_logits(lambda x, batch: x.flip(0)), ROWS, "rounding explains"),
    ("gives float64", with_logits(lambda x, batch: x.double()), ROWS, "float64"),
    ("gives a gradient's graph", with_logits(with_graph), ROWS, "require gradients"),
    ("rounds keys to another dtype", CoarseCache, "the_kv_cache_may_have_another_dtype", "k_cache"),
    # packed weights
    ("packs other shapes", PacksFlat(), "packed_weights_match_their_declaration", "as declared"),
    (
        "packs at once",
        PacksAtOnce(),
        "packed_weights_match_their_declaration",
        "must not read weights",
    ),
    (
        "packs in version 0",
        PacksUnversioned(),
        "packed_weights_match_their_declaration",
        "at least 1",
    ),
    (
        "packs other weights",
        PacksOther(),
        "packed_weights_give_identical_logits",
        "must give the same logits",
    ),
    ("packs backwards", PacksBackwards(), "packed_weights_give_identical_logits", "in the order"),
    # side effects
    (
        "writes one slot past its own",
        WritesOnePast,
        "a_step_writes_only_to_its_own_slots",
        "only to the slots of its step",
    ),
    (
        "writes padding to slot 0",
        WritesTheFirstSlot,
        "a_step_writes_only_to_its_own_slots",
        "only to the slots of its step",
    ),
    (
        "leaves out the last value",
        LeavesOutTheLastValue,
        "a_step_writes_only_to_its_own_slots",
        "did not write a value",
    ),
    (
        "multiplies stale values by 0",
        MultipliesStaleValues,
        "the_content_of_other_slots_does_not_matter",
        "NaN",
    ),
    ("writes to the batch", WritesToTheBatch, "the_batch_is_not_changed", "batch.block_table"),
    ("scales the source's weights", ScalesWeights, "weights_are_not_changed", "q_proj"),
    (
        "reads weights late",
        Executors(read_late),
        "weights_may_be_closed_once_the_executor",
        "closed",
    ),
    (
        "sets the default dtype",
        changing(lambda: torch.set_default_dtype(torch.bfloat16)),
        PROCESS,
        "default dtype",
    ),
    ("seeds torch", changing(lambda: torch.manual_seed(1)), PROCESS, "random state"),
    (
        "sets an environment variable",
        changing(lambda: os.environ.update(ACME_DEVICE="1")),
        PROCESS,
        "ACME_DEVICE",
    ),
    ("turns gradients off", TurnsGradientsOff, PROCESS, "gradient mode"),
    # taps
    (
        "taps by names of its own",
        with_tap(rename),
        "taps_match_the_documentation",
        "layers.0.query",
    ),
    ("taps flat heads", with_tap(rewrite), "taps_match_the_documentation", "q_proj"),
    (
        "taps a name twice",
        with_tap(twice),
        "taps_match_the_documentation",
        "called twice for a name",
    ),
    ("taps another tensor", with_tap(unrotated), "taps_hold_the_tensors_that_they_name", "k_rope"),
    (
        "computes otherwise for taps",
        ComputesOtherwiseForTaps,
        "a_tap_does_not_change_the_results",
        "must not change the logits",
    ),
    (
        "remembers the tap",
        RemembersTheTap,
        "a_tap_is_called_only_in_its_own_step",
        "step without a tap",
    ),
    ("is wrong without a tap", WrongWithoutTaps, TAPLESS, "times as large|rounding explains"),
    (
        "caches wrongly without a tap",
        CachesWronglyWithoutTaps,
        TAPLESS,
        "v_cache: it is 1.01|rounding explains",
    ),
    # repetition, and several executors
    (
        "differs each time",
        Noisy,
        "a_repeated_step_gives_identical_results",
        "must give identical logits",
    ),
    ("carries a mean on", Averages, "no_state_is_kept_between_steps", "repeated after other steps"),
    ("one cache for all", OneForAll, "two_executors_are_independent", "rounding explains"),
    (
        "one set of weights for all",
        Executors(cached_by_name),
        "two_executors_are_independent",
        "rounding explains",
    ),
    ("closes all of them", ClosesAll, "two_executors_are_independent", "is closed"),
    ("closes once", ClosesOnce, "it_may_be_closed_twice_and_created_again", "is closed"),
    ("stays open", StaysOpen, "a_closed_executor_raises_executor_error", "ExecutorError"),
    (
        "crashes when it is closed",
        Crashes,
        "a_closed_executor_raises_executor_error",
        "the model is gone",
    ),
    # invalid requests
    ("takes any device", Executors(any_device), REFUSED, "no-such-device"),
    ("refuses with ValueError", refuses_with(lambda e: ValueError(str(e))), REFUSED, "ValueError"),
    (
        "refuses in two lines",
        refuses_with(lambda e: ExecutorError(f"no:\n{e}")),
        REFUSED,
        "one line",
    ),
    ("refuses when all is read", Executors(refuses_late), REFUSED, "before weights are read"),
    (
        "takes any number of heads",
        Executors(runs_any_heads),
        "an_invalid_model_shape_is_refused",
        "num_kv_heads",
    ),
    (
        "refuses biases late",
        Executors(reads_before_it_refuses_biases),
        "unsupported_models_are_refused_before",
        "were read",
    ),
    # layer by layer
    (
        "writes to its input",
        NormsInPlace,
        "embedding_layers_and_head_give_the",
        "must not change its input",
    ),
    (
        "has layers of its own",
        OwnLayers,
        "embedding_layers_and_head_give_the",
        "logits of the whole step",
    ),
    (
        "reads values as keys",
        ReadsValuesAsKeys,
        ALL,
        "k_cache",
    ),
    (
        "sorts the pages that it writes and reads",
        SortsPages,
        "a_layers_cache_can_be_read_and_replaced",
        "in the order given",
    ),
    (
        "hands out the cache itself",
        ReadsAView,
        "a_layers_cache_can_be_read_and_replaced",
        "must return copies",
    ),
    (
        "replaces all pages between two",
        WritesAllPagesBetween,
        "a_layers_cache_can_be_read_and_replaced",
        "the given pages only",
    ),
    (
        "replaces nothing",
        WritesNoCache,
        "a_layers_cache_can_be_read_and_replaced",
        "must return the keys",
    ),
    (
        "replaces two layers",
        WritesTheFirstLayersCache,
        "a_layers_cache_can_be_read_and_replaced",
        "to its layer only",
    ),
    ("has other layers in parts", OtherLayersInParts, PARTS, "the hidden states of the whole"),
    ("has another cache in parts", OtherCacheInParts, PARTS, "keys and values of the whole"),
    ("has another head in parts", OtherHeadInParts, PARTS, "the logits of the whole"),
    ("counts a part's layers from 0", CountsLayersFromZero, PARTS, "must have layers = range.1, 2"),
    ("reads all weights for a part", Executors(reads_all), PARTS, "must read only their weights"),
    ("caches all layers", Executors(caches_all_layers), PARTS, "num_layers = 1, found 3"),
    ("runs a part as a whole", RunsParts, PARTS, "forward of an executor with the layers .0."),
    ("embeds in all parts", EmbedsInAllParts, PARTS, "embed of an executor with the layers .1."),
    ("has a head in all parts", HasAHeadInAllParts, PARTS, "run_head of an executor"),
    ("shows weights of other parts", ShowsWeightsOfOtherParts, PARTS, "must raise KeyError"),
    # quantised weights
    ("int8 with other scales than it shows", int8(rescale=127 / 128), ALL, "rounding explains"),
    ("int8 of a transposed weight", int8(turned), "weights_match_the_checkpoint", "q_proj"),
    ("int8 of swapped rows", int8(swapped), "weights_match_the_checkpoint", "k_proj"),
    (
        "int8 scaled by two",
        int8(lambda name, weight: weight * 2),
        "weights_match_the_checkpoint",
        "found 1",
    ),
    ("int8 that nobody can see", without_layers(int8()), ALL, "must be a LayerwiseExecutor"),
    ("shows weights as packed", AsPacked, "weights_match_the_checkpoint", "o_proj"),
    ("shows a weight of any name", AnyWeight, "weights_match_the_checkpoint", "KeyError"),
]

_TESTS = own_tests(ExecutorSuite)
_SMALL = {"models": {"grouped": MODELS["grouped"]}, "dtypes": ["float32"]}
_BIASED = {"models": {n: MODELS[n] for n in ("grouped", "all-biases")}, "dtypes": ["float32"]}


def _fixtures(name: str) -> dict[str, Any]:
    found = dict(_BIASED if "biases" in name else _SMALL)
    if "length of its chunks" in name:
        found["models"] = {"dynamic-rope": MODELS["dynamic-rope"]}
    if "int8" in name or "weight dtype" in name:
        del found["dtypes"]
    return found


OF_CONTRACTS = [
    Fault(
        name,
        of(plugin) if isinstance(plugin, type) else plugin,
        next(name for name in _TESTS if name.startswith(f"test_{test}")),
        _fixtures(name),
        why,
    )
    for name, plugin, test, why in _FAULTS
]


def arithmetic() -> Iterator[Fault]:
    """Each mistake of planted.py, in a model in which it can show, in its second layer."""
    for name, mistake in MISTAKES.items():
        model, dtype = next(
            (model, dtype)
            for dtype in ("float32", "bfloat16")
            for model, config in MODELS.items()
            if config.num_layers > 1 and mistake.shows(config, dtype)
        )
        phase = "both" if "both" in mistake.phases else mistake.phases[0]
        alone = not mistake.head and phase == "both"
        yield Fault(
            name,
            planted(name, 1, phase),
            "test_layers_run_alone_are_correct" if alone else f"test_{ALL}",
            {"models": {model: MODELS[model]}, "dtypes": [dtype]},
            "rounding explains|finite|shape|times as large",
        )


OF_ARITHMETIC = list(arithmetic())
FAULTS = OF_CONTRACTS + OF_ARITHMETIC
SUITE = ExecutorSuite


def test_the_suite_fails_each_breach_of_a_contract() -> None:
    assert not missed(SUITE, OF_CONTRACTS)


def test_the_suite_fails_each_mistake_in_what_is_computed() -> None:
    assert not missed(SUITE, OF_ARITHMETIC)


SOME = {
    "models": {name: MODELS[name] for name in ("qk-norm", "sliding-window")},
    "dtypes": ["float32", "bfloat16"],
}


def outcomes(plugin: Executors, **fixtures: Any) -> tuple[list[str], set[str]]:
    """The tests that fail, with their reasons, and those that are skipped, without those of packing
    and of dynamic RoPE."""
    found = run(SUITE, plugin, own_tests(SUITE), **fixtures)
    skipped = {name.removeprefix("test_") for name, end in found.found.items() if end == "skipped"}
    reasons = [f"{name}: {found.why[name]}" for name in found.failed]
    return reasons, {name for name in skipped - {DYNAMIC} if "packed_weights" not in name}


def test_the_suite_passes_another_way_to_compute() -> None:
    failed, skipped = outcomes(planted("none"), **SOME)
    # It taps norm and rotation of the queries, then those of the keys.
    (why,) = failed
    assert why.startswith("test_taps_match_the_documentation")
    assert "in the order of" in why
    assert skipped == {NAMED}


def test_the_suite_passes_weights_in_a_layout_of_the_executors_own() -> None:
    right = run(SUITE, Packing(), own_tests(SUITE), **_SMALL)
    assert not right.failed, right.why
    skipped = {name for name, end in right.found.items() if end == "skipped"}
    assert skipped == {f"test_{NAMED}", f"test_{DYNAMIC}"}


def test_the_suite_passes_correct_executors_within_what_they_state() -> None:
    mixed = "prompts_chunks_and_decodes_may_share_a_step"
    assert outcomes(of(Limited), **_SMALL) == ([], {SHARED, mixed, NAMED})
    assert outcomes(of(Samples), **_SMALL) == ([], set())


class OneProgram:
    """An executor that has ``forward`` only, and taps nothing."""

    def __init__(self, inner: Any):
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        if name in ("begin", "embed", "run_layer", "run_head", "weight"):
            raise AttributeError(name)
        return getattr(self._inner, name)

    def forward(self, batch: StepBatch, tap: "Tap | None" = None) -> Tensor:
        logits: Tensor = self._inner.forward(batch)
        return logits


def test_the_suite_passes_an_executor_of_one_program_that_taps_nothing() -> None:
    tests = [name for name in own_tests(SUITE) if "tap" in name or "layers" in name]
    found = run(SUITE, Executors(lambda asked: OneProgram(asked.of(shipped))), tests, **_SMALL)
    assert found.failed == []
    assert found.found["test_layers_run_alone_are_correct"] == "skipped"


def test_the_suite_passes_quantised_weights() -> None:
    assert outcomes(int8(), models=SOME["models"]) == ([], {NAMED})
    only_bfloat16 = int8(kv_dtypes=("bfloat16",))
    other_kv = "the_kv_cache_may_have_another_dtype"
    assert outcomes(only_bfloat16, models=_SMALL["models"]) == ([], {NAMED, other_kv})


def test_an_executor_may_refuse_models_that_it_does_not_state() -> None:
    stating = Executors(only(is_grouped), serves=lambda config: not config.qkv_bias)
    assert outcomes(Executors(only(is_grouped)), **_BIASED) == ([], {NAMED})
    states = full_name(SUITE, "it_runs_the_models_that_it_states")
    assert run(SUITE, stating, [states], **_BIASED).found == {states: "passed"}


class OneAtATime:
    """One sequence and five tokens in a step, and no layers alone."""

    limits = ExecutorLimits(max_batch_size=1, max_batch_tokens=5, max_seq_len=60)
    device = "acme card 0"

    def __init__(self, asked: Asked):
        self._made: Any = asked.of(shipped)
        self.kv_cache_spec = self._made.kv_cache_spec
        self.allocate_kv = self._made.allocate_kv
        self.read_kv, self.write_kv = self._made.read_kv, self._made.write_kv
        self.close = self._made.close

    def forward(self, batch: StepBatch, tap: "Tap | None" = None) -> Tensor:
        if len(batch.context_lens) > 1 or len(batch.token_ids) > 5 or batch.context_lens[0] > 60:
            raise ExecutorError("too much for a step")
        logits: Tensor = self._made.forward(batch)
        return logits


def test_the_suite_keeps_to_an_executors_limits() -> None:
    outcome = run(SUITE, Executors(OneAtATime), own_tests(SUITE), **_SMALL)
    assert not outcome.failed, outcome.why
    assert {name for name, found in outcome.found.items() if found == "skipped"} == {
        "test_embedding_layers_and_head_give_the_logits_of_a_step",
        "test_layers_run_alone_are_correct",
        f"test_{NAMED}",
        f"test_{DYNAMIC}",
        "test_packed_weights_match_their_declaration",
        "test_parts_of_the_layers_give_the_results_of_the_whole",
        "test_packed_weights_give_identical_logits",
        "test_weights_match_the_checkpoint",
    }


def test_an_executor_that_refuses_all_is_told_so() -> None:
    def refuse(asked: Asked) -> Any:
        raise ExecutorError("no card")

    outcome = run(SUITE, Executors(refuse), [f"test_{ALL}"])
    assert "refused all of" in outcome.why[f"test_{ALL}"]
    assert "no card" in outcome.why[f"test_{ALL}"]
