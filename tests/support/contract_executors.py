"""Executors that use what the contract allows and nothing shipped does, and runners for them.

A device that samples and works on steps in flight (``Device``), one that keeps keys and values of
its own for each request (``OwnPages``), and one whose logits are a hash of the context
(``Hashing``), so that two runs differ exactly if their tokens do.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from attrs import define, evolve, field
from torch import Tensor

from tilewright import GenerateConfig, LLMEngine, RuntimeConfig, plugins
from tilewright.errors import ExecutorLostError
from tilewright.kv_cache import KvCacheManager
from tilewright.loading import ServedModel
from tilewright.plugins import Observers
from tilewright.request import Request, new_request
from tilewright.runner import Runner
from tilewright.settings import DEMO_MODEL
from tilewright.types import (
    ExecutorLimits,
    KvCacheSpec,
    SampledToken,
    SamplerRow,
    SamplingExecutor,
    SamplingParams,
    StepBatch,
    StepOutput,
)
from tilewright_sampling.sampler import LogitsSampler, Options


class Hashing:
    """An ``Executor`` whose logits are a hash of all tokens up to the row's, as its cache has
    them."""

    device = "hash"

    def __init__(self, vocab_size, page_size=4, **limits):
        self.vocab_size = vocab_size
        self.limits = ExecutorLimits(**limits)
        self.kv_cache_spec = KvCacheSpec(
            num_layers=1, num_kv_heads=1, head_dim=1, page_size=page_size, dtype="float32"
        )
        self.batches: list[StepBatch] = []

    def allocate_kv(self, num_pages):
        self.slots = torch.full((num_pages * self.kv_cache_spec.page_size,), -1)

    def forward(self, batch, tap=None):
        assert (batch.token_source == -1).all(), "the step names tokens that only a device has"
        self.batches.append(batch)
        size = self.kv_cache_spec.page_size
        self.slots[batch.slot_mapping.long()] = batch.token_ids
        of_row = torch.arange(len(batch.context_lens)).repeat_interleave(batch.query_starts.diff())
        logits = torch.empty(len(batch.logits_rows), self.vocab_size)
        for at, row in enumerate(batch.logits_rows.tolist()):
            before = torch.arange(int(batch.positions[row]) + 1)
            pages = batch.block_table[of_row[row], before // size].long()
            seen = self.slots[pages * size + before % size].tolist()
            generator = torch.Generator().manual_seed(hash(tuple(seen)) & (2**63 - 1))
            logits[at] = 10 * torch.rand(self.vocab_size, generator=generator)
        if tap:
            tap("logits", logits)
        return logits

    def read_kv(self, layer, pages):
        raise NotImplementedError

    def write_kv(self, layer, pages, cache):
        raise NotImplementedError

    def close(self):
        self.slots = None


def arg_max_only(params):
    """Whether a request needs only the most likely token."""
    return params.temperature == 0 and params == SamplingParams(seed=params.seed)


@define(eq=False)
class Submitted:
    """A ``PendingStep`` of a ``Device``."""

    device: "Device"
    number: int
    batch: StepBatch
    sampling: Sequence[SamplerRow | None]
    before: "Submitted | None"
    ends: float
    """When the device is done with it, on the device's clock."""
    output: StepOutput | None = None
    waited: bool = False
    """Whether wait has returned or failed."""

    def wait(self):
        return self.device.wait(self)


class Device:
    """A ``SamplingExecutor`` around another executor, which runs a step when it is waited for.

    It checks how the engine calls it. Its clock is virtual: a step takes the device one second, and
    what the engine does after each step takes the engine one second.

    serves: for which parameters it samples. in_submit, in_wait: what is called with the number of a
    step, counted from 0, before it is taken or run; what it raises is raised.
    """

    def __init__(
        self,
        inner,
        serves: Callable[[SamplingParams], bool] = arg_max_only,
        in_submit: Callable[[int], object] = lambda number: None,
        in_wait: Callable[[int], object] = lambda number: None,
    ):
        self.inner = inner
        self.serves = serves
        self.in_submit, self.in_wait = in_submit, in_wait
        self.events: list[tuple[str, int]] = []
        self.steps: list[Submitted] = []
        self.now = 0.0
        self.lost: ExecutorLostError | None = None
        self.closed = False
        self.sampler = LogitsSampler(Options(), greedy=False)
        assert isinstance(self, SamplingExecutor)

    def __getattr__(self, name):
        return getattr(self.inner, name)

    @property
    def in_flight(self):
        return [step for step in self.steps if not step.waited]

    def forward(self, batch, tap=None):
        assert not self.in_flight, "forward while steps are in flight"
        return self.inner.forward(batch, tap)

    def close(self):
        self.closed = True
        self.inner.close()

    def submit(self, batch, sampling):
        number = len(self.steps)
        if self.lost:
            raise self.lost
        self.in_submit(number)
        assert len(self.in_flight) < 2, "more than two steps in flight"
        assert len(sampling) == len(batch.logits_rows)
        assert all(row is None or self.serves(row.params) for row in sampling)
        self._check_pages(batch)
        before = self.steps[-1] if self.steps else None
        asked = batch.token_source[batch.token_source >= 0].tolist()
        assert not asked or before in self.in_flight, "tokens of a step that is known"
        assert all(before.sampling[row] for row in asked), "tokens that the device does not sample"
        started = max(self.now, before.ends if before else 0.0)
        self.events.append(("submit", number))
        self.steps.append(Submitted(self, number, batch, sampling, before, started + 1.0))
        return self.steps[-1]

    def _check_pages(self, batch):
        """What a step writes belongs to none of the other requests in flight."""
        written = {int(slot) // self.kv_cache_spec.page_size for slot in batch.slot_mapping}
        for step in self.in_flight:
            for name, pages in zip(step.batch.request_ids, step.batch.block_table, strict=True):
                if name not in batch.request_ids:
                    assert not written & set(pages.tolist()), "pages of a request in flight"

    def wait(self, step):
        if step.output is None:
            assert not step.waited, "waited for a step again after it had failed"
            assert step is self.in_flight[0], "waited for a step before the one before it"
            try:
                self.in_wait(step.number)
                if self.lost:
                    raise self.lost
                step.output = self._run(step)
            except Exception as error:
                step.waited = True
                if isinstance(error, ExecutorLostError):
                    self.lost = error
                raise
            step.waited = True
            self.events.append(("wait", step.number))
            self.now = max(self.now, step.ends) + 1.0
        return step.output

    def _run(self, step):
        batch, source = step.batch, step.batch.token_source
        ids = batch.token_ids.clone()
        for at in (source >= 0).nonzero().flatten().tolist():
            assert ids[at] == 0
            output = step.before.output
            if output is not None:  # else the one before has failed, and this one is void
                ids[at] = output.tokens[int(source[at])].token_id
        known = evolve(batch, token_ids=ids, token_source=torch.full_like(source, -1))
        logits = self.inner.forward(known)
        own = [i for i, row in enumerate(step.sampling) if row]
        tokens: list[SampledToken | None] = [None] * len(step.sampling)
        chosen = self.sampler.sample(logits[own], [step.sampling[i] for i in own])
        for i, token in zip(own, chosen, strict=True):
            tokens[i] = token
        others = [i for i, row in enumerate(step.sampling) if not row]
        return StepOutput(tokens=tokens, logits=logits[others] if others else None)


class OwnPages:
    """An ``Executor`` around another one that keeps pages of its own for each request and ignores
    the engine's."""

    def __init__(self, inner):
        self.inner = inner
        self.limits = evolve(inner.limits, shares_pages=False)
        self.kept: dict[str, list[int]] = {}
        """The pages of each request."""
        self.fails = False

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def allocate_kv(self, num_pages):
        self.free = list(range(4 * num_pages))
        self.inner.allocate_kv(len(self.free))

    def forward(self, batch: StepBatch, tap=None) -> Tensor:
        size = self.kv_cache_spec.page_size
        for name in batch.ended_request_ids:
            self.free += self.kept.pop(name, [])
        table = torch.full((len(batch.request_ids), int(batch.context_lens.max())), -1)
        for i, name in enumerate(batch.request_ids):
            pages = self.kept.setdefault(name, [])
            while len(pages) * size < batch.context_lens[i]:
                pages.append(self.free.pop())
            table[i, : len(pages)] = torch.tensor(pages)
        if self.fails:
            raise self.fails
        of_row = torch.arange(len(table)).repeat_interleave(batch.query_starts.diff())
        at = batch.positions.long()
        slots = table[of_row, at // size] * size + at % size
        own = evolve(batch, block_table=table.int(), slot_mapping=slots.int())
        return self.inner.forward(own, tap)


def make_runner(
    model,
    executor,
    draft=None,
    observers=(),
    total_pages=64,
    allocator=None,
    processors=None,
    **runtime,
) -> Runner:
    """A runner of a loaded model's requests on an executor, with an empty cache.

    allocator: default: a KvCacheManager of the executor's page size. processors: the logits
    processor of a name. runtime: fields of ResolvedRuntime that differ from the model's.
    """
    executor.allocate_kv(total_pages)
    manager = plugins.new_manager()
    for observer in observers:
        manager.register(observer)
    spec = executor.kv_cache_spec
    served = evolve(
        model,
        executor=executor,
        allocator=allocator or KvCacheManager(total_pages, spec.page_size),
        runtime=evolve(model.runtime, page_size=spec.page_size, total_pages=total_pages, **runtime),
    )
    sampler = LogitsSampler(Options(), greedy=False)
    return Runner(
        served,
        sampler,
        Observers(manager),
        "executor",
        "sampler",
        processors=processors,
        draft=draft,
    )


def demo_model() -> Iterator[ServedModel]:
    """The bundled model, on the torch executor in float32 with pages of 8 tokens."""
    with LLMEngine.from_plugins() as engine:
        runtime = RuntimeConfig(weight_dtype="float32", page_size=8, max_batch_tokens=32)
        engine.init_model("demo", DEMO_MODEL, runtime)
        yield engine.model("demo")


def requests(model, prompts, **settings) -> list[Request]:
    """A request for each prompt, or for each pair of a prompt and settings of its own."""
    made = []
    for i, prompt in enumerate(prompts):
        prompt, own = prompt if isinstance(prompt, tuple) else (prompt, {})
        config = GenerateConfig(**({"max_new_tokens": 12} | settings | own))
        config = config.over(model.generation_defaults)
        made.append(new_request(f"r{i}", model, prompt, config))
    return made


def outcomes(model, executor, prompts, **settings):
    """The outcomes of requests that run together, with pages enough for all of them."""
    made = requests(model, prompts, **settings)
    runner = make_runner(model, executor)
    run(runner, made)
    assert all_free(runner)
    return [outcome(request) for request in made]


def run(runner: Runner, requests: Iterable[Request] = ()) -> None:
    """Add requests and run until all are over; checks the pages after each step."""
    for request in requests:
        runner.add(request)
    while runner.requests:
        runner.step()
        runner.model.allocator.check_integrity()


def outcome(request: Request) -> tuple[object, ...]:
    """What a request's caller sees, apart from times; log-probabilities are rounded."""
    result = request.result
    assert result is not None, request.error
    return (
        result.text,
        result.token_ids,
        result.finish_reason,
        result.logprobs and [_rounded(entry) for entry in result.logprobs],
        result.prompt_logprobs and [e and _rounded(e) for e in result.prompt_logprobs],
    )


def _rounded(entry):
    top = [(token, round(logprob, 3)) for token, logprob in entry.top]
    return entry.token_id, round(entry.logprob, 3), top


def all_free(runner: Runner) -> bool:
    """Whether no request holds a page."""
    allocator = runner.model.allocator
    allocator.check_integrity()
    return allocator.free_pages + allocator.evictable_pages == allocator.total_pages


@define
class Once:
    """Raises an error the first time it is called with a number."""

    number: int
    error: BaseException
    raised: bool = field(default=False)

    def __call__(self, number: int) -> None:
        if number == self.number and not self.raised:
            self.raised = True
            raise self.error
