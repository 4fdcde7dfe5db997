"""Compares two executors on a model: weights, then every tensor of every step."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from attrs import define, evolve, field, frozen
from torch import Tensor

from tilewright.compare.judge import (
    Finding,
    LogitsAgreement,
    Mode,
    Noise,
    Place,
    judge,
    logits_agreement,
)
from tilewright.compare.metrics import difference
from tilewright.compare.packing import explain
from tilewright.compare.sides import Choice, Side, Tensors, copy_kv, logical, open_side
from tilewright.errors import ExecutorError
from tilewright.scheduler import Step
from tilewright.types import DType
from tilewright.weights import expected_tensors, torch_dtype

BEFORE_CACHE = ("attn_norm", "q_proj", "k_proj", "v_proj", "q_norm", "k_norm", "q_rope", "k_rope")
"""Stages of a layer that come before its keys and values are cached."""

Progress = Callable[["Comparison", str, int, int], None]
"""Called with the comparison so far, what was compared last, and how many steps of how many are
done: when all sides are loaded, after each layer, and after each step."""


@frozen(kw_only=True)
class WeightFinding:
    """A weight that the candidate works with, against the checkpoint's in the candidate's dtype."""

    name: str
    passed: bool
    why: str


@define(kw_only=True)
class Comparison:
    """What two executors' runs of one model differ in."""

    model: str
    reference: str
    candidate: str
    dtype: str
    """The candidate's; the baseline is the reference in it, the truth the reference in float32."""
    weights: list[WeightFinding] = field(factory=list)
    findings: list[Finding] = field(factory=list)
    """In the order in which the tensors were computed: chained, then isolated."""
    logits: list[LogitsAgreement] = field(factory=list)
    not_compared: list[str] = field(factory=list)
    """Stages that the reference taps and the candidate has no tensor for."""
    perplexity: tuple[float, float] | None = None
    """Of the prompts, by the truth and by the candidate."""
    finished: bool = False

    @property
    def equal(self) -> bool:
        return self.finished and self.divergence is None and all(w.passed for w in self.weights)

    @property
    def divergence(self) -> Finding | None:
        """The first tensor that is wrong by itself, else the first that is wrong at all."""
        failed = [f for f in self.findings if not f.passed]
        alone = [f for f in failed if f.place.mode == "isolated"]
        return next(iter(alone or failed), None)

    @property
    def sentence(self) -> str:
        wrong = [w for w in self.weights if not w.passed]
        if wrong:
            more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            return f"weight {wrong[0].name} is packed wrongly: {wrong[0].why}{more}"
        first = self.divergence
        if first is None and not self.finished:
            return f"not finished: no difference in {len(self.findings)} tensors so far"
        if first is None:
            return "equal: every tensor is as near to the truth as rounding allows"
        place = first.place
        where = f"{place.phase} step {place.step}, {place.tensor}"
        alone = "" if place.mode == "chained" else " (given the reference's own input)"
        worst = ""
        if first.candidate is not None:
            d = first.candidate
            at = f"{list(d.worst)} ({first.where})" if first.where else f"{list(d.worst)}"
            worst = (
                f"; worst at {at}: {d.candidate_at_worst:.6g}, expected {d.reference_at_worst:.6g}"
            )
        return f"diverges first in {where}{alone}: {first.why}{worst}"


def compare(
    model_dir: str | Path,
    reference: Choice,
    candidate: Choice,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int = 8,
    chunk: int = 512,
    isolate: bool = False,
    progress: Progress = lambda result, what, done, total: None,
) -> Comparison:
    """Run prompts, then new_tokens - 1 decode steps with the truth's greedy tokens on all sides.

    chunk: tokens in a prefill step at most. isolate: run each layer alone even if the whole runs
    are equal; that finds errors that are lost in the rounding of the layers before. Raises what
    LLMEngine raises, and ExecutorError when the two have nothing to compare.
    """
    with ExitStack() as opened:

        def side(name: str, choice: Choice) -> Side:
            made = open_side(name, choice, str(model_dir), prompts, new_tokens, chunk)
            opened.callback(made.close)
            return made

        tried = side("candidate", candidate)
        runtime = tried.model.runtime
        assert runtime.weight_dtype is not None
        assert runtime.kv_dtype is not None
        near = side("baseline", _in(reference, runtime.weight_dtype, runtime.kv_dtype))
        try:
            truth = side("truth", _in(reference, "float32", "float32"))
        except ExecutorError as error:
            raise ExecutorError(
                f"the reference must run in float32, as the truth: {error}"
            ) from error
        result = Comparison(
            model=str(model_dir),
            reference=reference.executor,
            candidate=candidate.executor,
            dtype=runtime.weight_dtype,
        )
        sides = _Sides(tried, near, truth)
        steps = -(-sum(map(len, prompts)) // chunk) + new_tokens - 1
        progress(result, "weights", 0, steps)
        result.weights = list(sides.weights())
        tokens: list[list[int]] = []
        for what, done in sides.chained(result, tokens):
            progress(result, f"chained, {what}", done, steps)
        if (isolate or result.divergence) and sides.layerwise:
            for what, done in sides.isolated(result, tokens):
                progress(result, f"isolated, {what}", done, steps)
        if truth.perplexity is not None and tried.perplexity is not None:
            result.perplexity = (truth.perplexity, tried.perplexity)
        result.finished = True
        return result


def _in(choice: Choice, weight_dtype: DType, kv_dtype: DType) -> Choice:
    runtime = evolve(choice.runtime, weight_dtype=weight_dtype, kv_dtype=kv_dtype)
    return evolve(choice, runtime=runtime)


@frozen(eq=False)
class _Sides:
    candidate: Side
    baseline: Side
    truth: Side
    noise: dict[tuple[Mode, str], Noise] = field(factory=lambda: defaultdict(Noise))
    """By mode and tensor."""

    @property
    def all(self) -> tuple[Side, Side, Side]:
        return self.candidate, self.baseline, self.truth

    @property
    def layerwise(self) -> bool:
        return all(side.layerwise for side in self.all)

    def weights(self) -> Iterator[WeightFinding]:
        """Each weight that both can give back."""
        if not all(hasattr(s.executor, "weight") for s in (self.candidate, self.baseline)):
            return
        config = self.candidate.model.loaded.config
        dtype = self.candidate.model.runtime.weight_dtype
        assert dtype is not None
        shapes = expected_tensors(config)
        for name, shape in shapes.items():
            source = self.baseline.executor.weight(name)
            packed = self.candidate.executor.weight(name)
            why = ""
            if tuple(packed.shape) != shape:
                why = f"its shape is {list(packed.shape)}, expected {list(shape)}"
            elif not torch.equal(packed.to(torch_dtype(dtype)), source):
                d = difference(packed, source)
                others = (
                    (other, self.baseline.executor.weight(other))
                    for other in shapes
                    if other != name and shapes[other] == shape
                )
                why = explain(packed.to(source.dtype), source, others) or (
                    f"relative error {d.relative_rms:.2g}, worst at {list(d.worst)}: "
                    f"{d.candidate_at_worst:.6g}, expected {d.reference_at_worst:.6g}"
                )
            yield WeightFinding(name=name, passed=not why, why=why)

    def chained(self, result: Comparison, tokens: list[list[int]]) -> Iterator[tuple[str, int]]:
        """Each side on its own outputs; the truth's tokens go to tokens, a list a step.

        Yields what was compared, and how many steps are done.
        """
        self.candidate.spoil()
        number = 0
        while (steps := self._next()) is not None:
            step = steps[0]
            compared = 0
            parts = [side.parts(s) for side, s in zip(self.all, steps, strict=True)]
            for layer, (ours, near, true) in enumerate(zip(*parts, strict=True), start=-1):
                found = self._judge(result, "chained", step, number, ours, near, true)
                compared += len(ours)
                if 0 <= layer < self.candidate.executor.kv_cache_spec.num_layers:
                    cached = self._judge_kv("chained", steps, number, layer)
                    result.findings += _in_order(found, cached)
                    yield f"{step.phase}, layer {layer}", number
                else:
                    result.findings += found
            if not compared:
                raise ExecutorError(
                    f"executors {result.candidate} and {result.reference} have no tensor in "
                    "common to compare: a candidate's tap must get at least logits"
                )
            chosen = true["logits"].argmax(-1).tolist() if step.sampled else []
            if step.sampled:
                ids = [int(r.request_id.rpartition("-")[2]) for r in step.sampled]
                if "logits" in ours and ours["logits"].shape == true["logits"].shape:
                    result.logits += logits_agreement(
                        number, ids, ours["logits"], near["logits"], true["logits"]
                    )
            tokens.append(chosen)
            for side, own in zip(self.all, steps, strict=True):
                side.done(own, chosen)
            number += 1
            yield step.phase, number

    def isolated(self, result: Comparison, tokens: list[list[int]]) -> Iterator[tuple[str, int]]:
        """Each layer of candidate and truth on the baseline's input and cache."""
        for side in self.all:
            side.restart()
        for number, chosen in enumerate(tokens):
            steps = self._next()
            assert steps is not None
            ours, near, true = steps
            taps: list[Tensors] = [{}, {}, {}]
            record = [_recorder(seen) for seen in taps]
            hidden = self.baseline.executor.embed(near.batch)
            for layer in range(self.candidate.executor.kv_cache_spec.num_layers):
                for target in (self.candidate, self.truth):
                    copy_kv(self.baseline, target, layer, near)
                self.candidate.executor.run_layer(layer, hidden, ours.batch, record[0])
                self.truth.executor.run_layer(layer, hidden.float(), true.batch, record[2])
                hidden = self.baseline.executor.run_layer(layer, hidden, near.batch, record[1])
                found = self._judge(result, "isolated", ours, number, *taps)
                cached = self._judge_kv("isolated", steps, number, layer)
                result.findings += _in_order(found, cached)
                for seen in taps:
                    seen.clear()
                yield f"{ours.phase}, layer {layer}", number
            rows = hidden[near.batch.logits_rows]
            if len(rows):
                self.candidate.executor.run_head(rows, record[0])
                self.truth.executor.run_head(rows.float(), record[2])
                self.baseline.executor.run_head(rows, record[1])
                result.findings += self._judge(result, "isolated", ours, number, *taps)
            for side, own in zip(self.all, steps, strict=True):
                side.done(own, chosen)
            yield ours.phase, number + 1

    def _next(self) -> tuple[Step, Step, Step] | None:
        """The same step on each side."""
        ours, near, true = (side.next_step() for side in self.all)
        if ours is None or near is None or true is None:
            return None
        return ours, near, true

    def _judge(
        self,
        result: Comparison,
        mode: Mode,
        step: Step,
        number: int,
        ours: Tensors,
        near: Tensors,
        true: Tensors,
    ) -> list[Finding]:
        """Judges what the candidate taps, and what it must: outputs of layers, and logits."""
        names = [n for n in true if n in ours or n.endswith((".output", "logits"))]
        for name in ours:
            if name not in true:
                raise ExecutorError(
                    f"executor {result.candidate} taps {name!r}, which {result.reference} does "
                    "not: names must be those of docs/tensors.md"
                )
        for stage in (n.rpartition(".")[2] for n in true if n not in names):
            if stage not in result.not_compared:
                result.not_compared.append(stage)
        found = []
        for name in names:
            if not true[name].numel():
                continue
            place = Place(mode=mode, phase=step.phase, step=number, tensor=name)
            noise = self.noise[mode, name]
            found.append(judge(place, ours.get(name), near[name], true[name], noise))
        return found

    def _judge_kv(
        self, mode: Mode, steps: Sequence[Step], number: int, layer: int
    ) -> list[Finding]:
        """What the step's requests have in the cache, from their first token to the step's last."""
        step = steps[0]
        stops = dict(zip((r.request_id for r in step.requests), step.computed, strict=True))
        caches = []
        for side in self.all:
            of = [
                logical(side, layer, r, stops[r.request_id])
                for r in side.requests
                if r.request_id in stops
            ]
            caches.append((torch.cat([c.key for c in of]), torch.cat([c.value for c in of])))
        found = []
        for index, name in enumerate((f"layers.{layer}.k_cache", f"layers.{layer}.v_cache")):
            ours, near, true = (cache[index] for cache in caches)
            place = Place(mode=mode, phase=step.phase, step=number, tensor=name)
            finding = judge(place, ours, near, true, self.noise[mode, name])
            found.append(evolve(finding, where=self._cached_at(finding, stops)))
        return found

    def _cached_at(self, finding: Finding, stops: Mapping[str, int]) -> str:
        """Whose slot the worst element of joined caches [tokens, KV heads, head_dim] is in."""
        if finding.candidate is None:
            return ""
        token, head, _ = finding.candidate.worst
        for request in self.candidate.requests:
            stop = stops.get(request.request_id, 0)
            if token < stop:
                slot = int(self.candidate.slots(request, stop)[token])
                return f"{request.request_id}, token {token}, KV head {head}, slot {slot}"
            token -= stop
        raise AssertionError("the caches hold the tokens of these requests")


def _in_order(tapped: list[Finding], cached: list[Finding]) -> list[Finding]:
    """A layer's findings in the order of computation: the cache is written, then attended to."""
    before = [f for f in tapped if f.place.stage in BEFORE_CACHE]
    return [*before, *cached, *(f for f in tapped if f.place.stage not in BEFORE_CACHE)]


def _recorder(seen: Tensors) -> Callable[[str, Tensor], None]:
    def tap(name: str, tensor: Tensor) -> None:
        seen[name] = tensor.clone()

    return tap
