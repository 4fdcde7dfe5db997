"""The sides of a comparison: each an executor with its own engine, KV cache and page tables."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from attrs import define, evolve, field, frozen
from torch import Tensor

from tilewright import plugins
from tilewright.engine import LLMEngine
from tilewright.errors import ExecutorError, TilewrightError
from tilewright.loading import ServedModel
from tilewright.request import Request
from tilewright.scheduler import Scheduler, Step
from tilewright.types import (
    DTYPES,
    KvAllocator,
    KvLayer,
    LoadedModel,
    RuntimeConfig,
    SamplingParams,
    Tap,
    TensorSource,
)
from tilewright_compare.judge import Phase
from tilewright_compare.slots import cleared

MODEL_ID = "compared"

UNWRITTEN = float("nan")
"""Value of the cache's slots until they are written: what reads one shows it."""

Tensors = dict[str, Tensor]
"""Tensors, keyed by the names of docs/tensors.md."""


class StepError(ExecutorError):
    """An executor could not run a step, or a part of it."""


def recorder(seen: Tensors) -> Tap:
    """A tap that copies tensors to seen, since the executor may reuse their memory; on the CPU."""

    def tap(name: str, tensor: Tensor) -> None:
        seen[name] = tensor.to("cpu", copy=True)

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
    """One per prompt; with a mixed step, one more, the last, which joins for that step."""
    mixes: bool = False
    """Whether the last step is a mixed one. See ``mix``."""
    unwritten: float = UNWRITTEN
    """Value of the slots that nobody wrote: the executor's own, if it has one."""
    nll: Tensor = field(factory=lambda: torch.zeros(2, dtype=torch.float64))
    """Negative log-likelihood of the prompt tokens in nats, and their number; [2], float64."""
    unscored: str = ""
    """Why the prompt tokens have no likelihood, in words; else empty."""

    def mix(self, late: Request) -> None:
        """Add a mixed step at the end: the last request decodes one more token, while the prompt of
        the late request runs. Both must fit into a step and into the cache."""
        *_, last = self.requests
        last.max_new_tokens += 1
        self.requests = [*self.requests, late]
        self.mixes = True

    def next_step(self) -> Step | None:
        if self.mixes and not self.scheduler.mixed:
            *_, last, late = self.requests
            alone = (self.scheduler.num_running, self.scheduler.num_waiting) == (1, 0)
            if alone and len(last.output_token_ids) == last.max_new_tokens - 1:
                self.scheduler.mixed = True
                self.scheduler.add(late)
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

    def start(self) -> None:
        """Starts the requests, or restarts them; the cache keeps its contents."""
        for request in self.requests:
            self.scheduler.remove(request)
        self.requests = [
            evolve(r, output_token_ids=[], num_computed=0, finish_reason=None)
            for r in self.requests
        ]
        self.scheduler.mixed = False  # so that prefill and decode are judged apart
        for request in self.requests[:-1] if self.mixes else self.requests:
            self.scheduler.add(request)

    def mark_unwritten(self) -> None:
        """Fill a new cache with NaN, so that reads of slots that nobody wrote show. What its
        executor has put there itself stays: one value all over, or values that are not finite."""
        pages = range(self.model.runtime.total_pages)
        for i in range(self.executor.kv_cache_spec.num_layers):
            cache = self.executor.read_kv(i, pages)
            first = cache.key.flatten()[0]
            if first and bool((cache.key == first).all()):
                self.unwritten = float(first)
                continue
            filled = (t.masked_fill(t.isfinite(), UNWRITTEN) for t in (cache.key, cache.value))
            self.executor.write_kv(i, pages, KvLayer(*filled))

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
    def quantised(self) -> bool:
        """Whether the weights are in a dtype that torch does not compute in."""
        return self.weight_dtype not in DTYPES

    @property
    def dtype(self) -> str:
        """Dtype of the hidden states: the weights', or the model's where they are quantised."""
        return self.model.loaded.config.dtype if self.quantised else self.weight_dtype

    @property
    def layerwise(self) -> bool:
        return hasattr(self.executor, "run_layer")

    @staticmethod
    def phase(step: Step) -> Phase:
        """A prompt's chunk of one token is run as decode, and called so."""
        if {part.decoding for part in step.parts} == {True, False}:
            return "mixed"
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

    def forward(self, step: Step) -> Tensor:
        """The logits of a step that is run as an engine does, without taps: [L, vocab_size]."""
        with self.running(step, "without taps"):
            logits: Tensor = self.executor.forward(step.batch).cpu()
            return logits

    def parts(self, step: Step) -> Iterator[Tensors]:
        """Run a step; yields its taps before, in each layer, and after."""
        seen: Tensors = {}
        tap = recorder(seen)
        executor, batch = self.executor, step.batch
        layers = executor.kv_cache_spec.num_layers
        if not self.layerwise:
            with self.running(step, "all layers"):
                logits = executor.forward(batch, tap)
            if "logits" not in seen:
                tap("logits", logits)
            yield {n: t for n, t in seen.items() if n == "embed"}
            for i in range(layers):
                yield {n: t for n, t in seen.items() if n.startswith(f"layers.{i}.")}
            yield {n: t for n, t in seen.items() if n in ("final_norm", "logits")}
            self._score(step)
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
        if not any(part.decoding for part in step.parts):
            self.nll += self._nll(step, self.run_head(begun, hidden, step).cpu())
        yield seen

    def _score(self, step: Step) -> None:
        """Adds the likelihood of the step's prompt tokens, by one more run that wants the logits of
        all rows; the cache is then as before."""
        batch, most = step.batch, self.executor.limits.max_logits_rows
        if any(part.decoding for part in step.parts):
            return
        rows = len(batch.token_ids) - len(step.sampled)
        if most is not None and rows > most:
            self.unscored = f"limits.max_logits_rows is {most}, and a step has {rows} rows to score"
            return
        with (
            cleared(self.executor, batch, self.unwritten),
            self.running(step, "with the logits of all rows"),
        ):
            all_rows = evolve(batch, logits_rows=torch.arange(len(batch.token_ids)))
            self.nll += self._nll(step, self.executor.forward(all_rows).cpu())

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


class _Engine(LLMEngine):
    """An engine whose models have other weights than their files, if it is given some."""

    weights: TensorSource | None = None

    def _load(self, *arguments: Any) -> LoadedModel:
        loaded = super()._load(*arguments)
        if self.weights is None:
            return loaded
        loaded.weights.close()
        return evolve(loaded, weights=self.weights, packing=None)


def open_side(
    name: str,
    choice: Choice,
    model_dir: str,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    chunk: int,
    batch: int,
    weights: TensorSource | None = None,
) -> Side:
    """chunk and batch: the most tokens and sequences of a step, or fewer where the executor allows
    no more. weights: takes the place of the model's.

    Raises what LLMEngine raises, and ConfigError for prompts that do not fit.
    """
    engine = _Engine.from_plugins(
        loader=choice.loader,
        executor=choice.executor,
        kv_allocator=choice.kv_allocator,
        observers=choice.observers,
        options={**choice.other_options, "executor": choice.options},
    )
    assert isinstance(engine, _Engine)
    engine.weights = weights
    try:
        runtime = evolve(
            choice.runtime,
            max_seq_len=max(map(len, prompts)) + new_tokens,
            max_batch_size=batch,
            max_batch_tokens=chunk,
        )
        engine.init_model(MODEL_ID, model_dir, runtime, choice.model_format)
        model = engine.model(MODEL_ID)
        scatter_pages(model.allocator)
        requests = [
            Request(f"prompt-{i}", tuple(ids), SamplingParams(), new_tokens)
            for i, ids in enumerate(prompts)
        ]
        size, chunk = model.runtime.max_batch_size, model.runtime.max_batch_tokens
        scheduler = Scheduler(model.allocator, size, chunk, admission="reserve", prefix_cache=False)
        return Side(name, engine, scheduler, requests)
    except BaseException:
        engine.close()
        raise


def scatter_pages(allocator: KvAllocator) -> None:
    """Take all pages and free them in another order, so that the pages of a sequence do not follow
    each other: reading them as if they did would go unnoticed."""
    names = [f"page-{i}" for i in range(allocator.total_pages)]
    for name in names:
        allocator.allocate(name, [0], max_cached=0)
        allocator.extend(name, 1)
    for name in (*names[::2], *names[1::2]):
        allocator.free(name)


def late_request(prompts: Sequence[Sequence[int]], chunk: int) -> Request:
    """A request of at least two prompt tokens, and at most so many that one more fits the step."""
    longest = max(prompts, key=len)
    ids = (*longest, *longest)[: max(len(longest), 2)]
    return Request(f"prompt-{len(prompts)}", ids[: chunk - 1], SamplingParams(), 1)


def unmixed_because(sides: Sequence[Side], late: Request, chunk: int) -> str:
    """Why no mixed step can be run on all sides; empty if it can."""
    if chunk < 3:
        return f"a step of {chunk} tokens is too small"
    for side in sides:
        runtime, last = side.model.runtime, side.requests[-1]
        if not side.executor.limits.mixed:
            return f"{side.name} runs none (limits.mixed)"
        if runtime.max_batch_size < 2:
            return f"{side.name} runs one sequence at a time"
        held = (len(last.prompt_token_ids) + last.max_new_tokens, len(late.prompt_token_ids))
        if sum(-(-tokens // runtime.page_size) for tokens in held) > runtime.total_pages:
            return f"{side.name} has {runtime.total_pages} pages, too few for two sequences"
    return ""
