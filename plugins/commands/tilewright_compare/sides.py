"""The sides of a comparison: each an executor with its own engine, KV cache and page tables."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from attrs import define, evolve, field, frozen
from torch import Tensor

from tilewright import plugins
from tilewright.engine import LLMEngine
from tilewright.errors import ConfigError, ExecutorError, TilewrightError
from tilewright.loading import ServedModel
from tilewright.request import Request
from tilewright.scheduler import Scheduler, Step
from tilewright.types import ExecutorLimits, KvLayer, RuntimeConfig, SamplingParams, Tap
from tilewright_compare.judge import Phase

MODEL_ID = "compared"

UNWRITTEN = 8.0
"""Value of unwritten cache slots: finite, and unlike any key or value."""

Tensors = dict[str, Tensor]
"""Tensors, keyed by the names of docs/tensors.md."""


class StepError(ExecutorError):
    """An executor could not run a step, or a part of it."""


def recorder(seen: Tensors) -> Tap:
    """A tap that copies tensors to seen, since the executor may reuse their memory."""

    def tap(name: str, tensor: Tensor) -> None:
        seen[name] = tensor.clone()

    return tap


@frozen(kw_only=True)
class Choice:
    """An executor, and how it runs the model."""

    executor: str
    options: Mapping[str, Any] = {}
    """Options of the executor."""
    runtime: RuntimeConfig = RuntimeConfig()
    loader: str | None = None
    model_format: str | None = None
    kv_allocator: str = "paged"
    other_options: Mapping[str, Mapping[str, Any]] = {}
    """Options of the other plugins, as LLMEngine.from_plugins takes them."""
    observers: Sequence[str | object] = ()


@define(eq=False)
class Side:
    """One executor of a comparison; all sides have the same requests."""

    name: str
    engine: LLMEngine
    scheduler: Scheduler
    requests: Sequence[Request]
    nll: Tensor = field(factory=lambda: torch.zeros(2, dtype=torch.float64))
    """Negative log-likelihood of the prompt tokens in nats, and their number; [2], float64."""

    def next_step(self) -> Step | None:
        self.scheduler.admit()
        return self.scheduler.schedule()

    def done(self, step: Step, tokens: Sequence[int]) -> None:
        """Commits a step that has run, with the next tokens of its sampled requests."""
        for request, token in zip(step.sampled, tokens, strict=True):
            request.output_token_ids.append(token)
        self.scheduler.done(step)
        for request in step.sampled:
            if len(request.output_token_ids) == request.max_new_tokens:
                self.scheduler.remove(request)

    def restart(self) -> None:
        """Restarts the same requests; the cache keeps its contents."""
        for request in self.requests:
            self.scheduler.remove(request)
        self.requests = [
            evolve(r, output_token_ids=[], num_computed=0, finish_reason=None)
            for r in self.requests
        ]
        for request in self.requests:
            self.scheduler.add(request)

    def poison(self) -> None:
        """Fill the cache: if it were zero, reads of another sequence's slots would go unnoticed."""
        pages = range(self.model.runtime.total_pages)
        for i in range(self.executor.kv_cache_spec.num_layers):
            cache = self.executor.read_kv(i, pages)
            poisoned = (torch.full_like(t, UNWRITTEN) for t in (cache.key, cache.value))
            self.executor.write_kv(i, pages, KvLayer(*poisoned))

    @property
    def model(self) -> ServedModel:
        return self.engine.model(MODEL_ID)

    @property
    def executor(self) -> Any:
        return self.model.executor

    @property
    def weight_dtype(self) -> str:
        return self.model.runtime.weight_dtype

    @property
    def layerwise(self) -> bool:
        return hasattr(self.executor, "run_layer")

    @staticmethod
    def phase(step: Step) -> Phase:
        return "decode" if step.batch.max_query_len == 1 else "prefill"

    @contextmanager
    def running(self, step: Step, what: str) -> Iterator[None]:
        """Raises StepError, with the cause, for any exception of the executor in the block."""
        try:
            yield
        except Exception as error:
            why = str(error) if isinstance(error, TilewrightError) else plugins.cause(error)
            raise StepError(f"{self.name} failed in {self.phase(step)}, {what}: {why}") from error

    def begin(self, step: Step) -> Any:
        with self.running(step, "before the first layer"):
            return self.executor.begin(step.batch)

    def embed(self, begun: Any, step: Step, tap: "Tap | None" = None) -> Tensor:
        with self.running(step, "embedding"):
            hidden: Tensor = self.executor.embed(begun, tap)
            return hidden

    def run_layer(self, begun: Any, layer: int, hidden: Tensor, step: Step, tap: Tap) -> Tensor:
        with self.running(step, f"layer {layer}"):
            output: Tensor = self.executor.run_layer(begun, layer, hidden, tap)
            return output

    def run_head(self, begun: Any, hidden: Tensor, step: Step, tap: "Tap | None" = None) -> Tensor:
        with self.running(step, "head"):
            logits: Tensor = self.executor.run_head(begun, hidden, tap)
            return logits

    def parts(self, step: Step) -> Iterator[Tensors]:
        """Run a step; yields its taps before, in each layer, and after."""
        seen: Tensors = {}
        tap = recorder(seen)
        executor, batch = self.executor, step.batch
        layers = executor.kv_cache_spec.num_layers
        if not self.layerwise:
            with self.running(step, "all layers"):
                executor.forward(batch, tap)
            yield {n: t for n, t in seen.items() if n == "embed"}
            for i in range(layers):
                yield {n: t for n, t in seen.items() if n.startswith(f"layers.{i}.")}
            yield {n: t for n, t in seen.items() if n in ("final_norm", "logits")}
            return
        begun = self.begin(step)
        hidden = self.embed(begun, step, tap)
        for i in range(layers):
            yield seen.copy()
            seen.clear()
            hidden = self.run_layer(begun, i, hidden, step, tap)
        yield seen.copy()
        seen.clear()
        self.run_head(begun, hidden[batch.logits_rows], step, tap)
        if not all(part.decoding for part in step.parts):
            self.nll += self._nll(step, self.run_head(begun, hidden, step))
        yield seen

    def _nll(self, step: Step, logits: Tensor) -> Tensor:
        """As ``nll``, of the prompt tokens that follow a chunk's tokens."""
        starts = step.batch.query_starts.tolist()
        nll = torch.zeros(2, dtype=torch.float64)
        for request, start, stop in zip(step.requests, starts, starts[1:], strict=False):
            first = request.num_computed + 1
            following = torch.tensor(request.prompt_token_ids[first : first + stop - start])
            rows = logits[start : start + len(following)].double().log_softmax(-1)
            nll[0] -= rows.gather(1, following.unsqueeze(1)).sum() if len(following) else 0.0
            nll[1] += len(following)
        return nll

    @property
    def perplexity(self) -> float | None:
        """Perplexity of all prompts together; None if layers cannot be run alone, or if no prompt
        has a second token."""
        nats, tokens = self.nll.tolist()
        return math.exp(nats / tokens) if tokens else None

    def kv(self, layer: int) -> KvLayer:
        """A copy of a layer's cache."""
        pages = range(self.model.runtime.total_pages)
        return self.executor.read_kv(layer, pages)  # type: ignore[no-any-return]

    def slots(self, request: Request, stop: int) -> Tensor:
        """Slots of the request's first tokens, [stop] int64."""
        size = self.model.runtime.page_size
        pages = torch.tensor(self.model.allocator.pages(request.request_id))
        positions = torch.arange(stop)
        return pages[positions // size] * size + positions % size

    def close(self) -> None:
        self.engine.close()


def open_side(
    name: str,
    choice: Choice,
    model_dir: str,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    chunk: int,
) -> Side:
    """Raises what LLMEngine raises, and ConfigError for prompts that do not fit."""
    engine = LLMEngine.from_plugins(
        loader=choice.loader,
        executor=choice.executor,
        kv_allocator=choice.kv_allocator,
        observers=choice.observers,
        options={**choice.other_options, "executor": choice.options},
    )
    try:
        runtime = evolve(
            choice.runtime,
            max_seq_len=max(map(len, prompts)) + new_tokens,
            max_batch_size=len(prompts),
            max_batch_tokens=chunk,
        )
        engine.init_model(MODEL_ID, model_dir, runtime, choice.model_format)
        model = engine.model(MODEL_ID)
        if model.runtime.max_batch_size < len(prompts) or model.runtime.max_batch_tokens < chunk:
            raise ConfigError(
                f"{name} runs at most {model.runtime.max_batch_size} sequences and "
                f"{model.runtime.max_batch_tokens} tokens in a step, and {len(prompts)} and "
                f"{chunk} are asked for: give fewer prompts, or a smaller chunk"
            )
        requests = [
            Request(f"prompt-{i}", tuple(ids), SamplingParams(), new_tokens)
            for i, ids in enumerate(prompts)
        ]
        unmixed = ExecutorLimits(mixed=False)  # so that prefill and decode are judged apart
        scheduler = Scheduler(model.allocator, len(prompts), chunk, unmixed)
        for request in requests:
            scheduler.add(request)
        return Side(name, engine, scheduler, requests)
    except BaseException:
        engine.close()
        raise


def written(side: Side, step: Step) -> list[tuple[Request, int]]:
    """The step's requests, each with the number of its tokens in the cache after the step."""
    stops = {part.request.request_id: part.stop for part in step.parts}
    return [(r, stops[r.request_id]) for r in side.requests if r.request_id in stops]


def cached_slots(side: Side, step: Step) -> Tensor:
    """Slots of all cached tokens of the step's requests, in order; int64."""
    return torch.cat([side.slots(request, stop) for request, stop in written(side, step)])


def joined(side: Side, layer: int, step: Step) -> KvLayer:
    """Keys and values at ``cached_slots``, [tokens, KV heads, head_dim], from any layout."""
    return _at(side, layer, cached_slots(side, step))


def _at(side: Side, layer: int, slots: Tensor) -> KvLayer:
    spec = side.executor.kv_cache_spec
    pages, page = (slots // spec.page_size).unique(return_inverse=True)
    cache = side.executor.read_kv(layer, pages.tolist())
    local = page * spec.page_size + slots % spec.page_size
    return KvLayer(*(Slots(t, spec.row_order)[local] for t in (cache.key, cache.value)))


def copy_kv(source: Side, target: Side, layer: int, step: Step) -> None:
    """Copy to target's layer what source's holds of the tokens before a step, and clear the rest.

    Otherwise a slot that is read before it is written would hold the right key of an earlier run.
    """
    spec, cache = target.executor.kv_cache_spec, target.kv(layer)
    new = KvLayer(*(torch.full_like(t, UNWRITTEN) for t in (cache.key, cache.value)))
    for theirs, ours in zip(source.requests, target.requests, strict=True):
        before = theirs.num_computed
        if not before or theirs.request_id not in {r.request_id for r in step.requests}:
            continue
        known, slots = _at(source, layer, source.slots(theirs, before)), target.slots(ours, before)
        for tensor, values in ((new.key, known.key), (new.value, known.value)):
            Slots(tensor, spec.row_order)[slots] = values.to(tensor.dtype)
    target.executor.write_kv(layer, range(target.model.runtime.total_pages), new)


@frozen(eq=False)
class Slots:
    """A cache tensor indexed by slot: [slots, KV heads, head_dim]."""

    cache: Tensor
    row_order: str

    @property
    def count(self) -> int:
        return self.cache.shape[0] * self._page_size

    @property
    def _page_size(self) -> int:
        return self.cache.shape[1 if self.row_order == "NHD" else 2]

    def _index(self, slots: Tensor) -> tuple[Any, ...]:
        page, offset = slots // self._page_size, slots % self._page_size
        return (page, offset) if self.row_order == "NHD" else (page, slice(None), offset)

    def __getitem__(self, slots: Tensor) -> Tensor:
        return self.cache[self._index(slots)]

    def __setitem__(self, slots: Tensor, values: Tensor) -> None:
        self.cache[self._index(slots)] = values
