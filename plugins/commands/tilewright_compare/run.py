"""Compares two executors on a model: weights, then every tensor of every step."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
from attrs import evolve, field, frozen
from torch import Tensor

from tilewright.errors import ConfigError, ExecutorError, nearest
from tilewright.scheduler import Step
from tilewright.types import KvLayer, SamplingExecutor, TensorSource
from tilewright.weights import torch_dtype
from tilewright_compare.against import Earlier, changes, check_runtime
from tilewright_compare.caches import cached_slots, copy_kv, joined, rows_of, written
from tilewright_compare.comparison import Comparison
from tilewright_compare.coverage import SCORED, Coverage, Item, declared_tiles
from tilewright_compare.diagnosis import Diagnosis
from tilewright_compare.drift import Drift, drift
from tilewright_compare.hypotheses import unexplained
from tilewright_compare.judge import (
    FLOOR,
    Finding,
    Mode,
    Noise,
    Phase,
    Place,
    Tolerance,
    judge,
    judge_bits,
    judge_perplexity,
    logits_agreement,
    perplexity,
)
from tilewright_compare.layer import Case
from tilewright_compare.packing import compared_weights
from tilewright_compare.patterns import pattern
from tilewright_compare.quantisation import ExecutorWeights, Quantisation
from tilewright_compare.sides import (
    Choice,
    Side,
    StepError,
    Tensors,
    late_request,
    open_side,
    recorder,
    unmixed_because,
)
from tilewright_compare.slots import cleared

BEFORE_CACHE = ("attn_norm", "q_proj", "k_proj", "v_proj", "q_norm", "k_norm", "q_rope", "k_rope")
"""Stages of a layer before its keys and values are cached."""

Progress = Callable[[Comparison, str, int, int], None]
"""Called with the comparison so far, what was compared last, the number of finished steps, and
their total: when all sides are loaded, after each layer, and after each step."""


def compare(
    model_dir: str | Path,
    reference: Choice,
    candidate: Choice,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int = 8,
    chunk: int = 512,
    isolate: bool = False,
    tolerances: Sequence[Tolerance] = (),
    against: Earlier | None = None,
    progress: Progress = lambda result, what, done, total: None,
) -> Comparison:
    """Run prompts, then new_tokens - 1 decode steps with the truth's greedy tokens on all sides,
    and a mixed step, in which one prompt decodes another token while a further one is run.

    Each step runs twice on the candidate: with taps, and without, as an engine runs it.

    chunk: maximum number of tokens in a prefill step. isolate: run each layer alone even if the
    whole runs are equal; that finds errors that are lost in the rounding of earlier layers.
    tolerances: the first one with a pattern that matches a tensor's name decides whether it passes.
    against: an earlier report; an error that grew since then makes the two unequal.
    An executor that fails in a step ends the comparison, and ``failure`` says why.

    Raises what LLMEngine raises; ExecutorError when the two have nothing to compare; ConfigError
    for a tolerance that matches no tensor, and for an earlier report in other dtypes.
    """
    opened = partial(open_side, model_dir=str(model_dir), prompts=prompts, new_tokens=new_tokens)
    with _opened_sides(candidate, reference, tolerances, opened, len(prompts), chunk) as sides:
        chunk = sides.candidate.model.runtime.max_batch_tokens
        result = Comparison(
            model=str(model_dir),
            reference=reference.executor,
            candidate=candidate.executor,
            dtype=sides.candidate.weight_dtype,
            runtime=sides.candidate.model.runtime,
        )
        if against:
            check_runtime(against, result.dtype, sides.candidate.model.runtime)
        result.quantisation = Quantisation() if sides.plain else None
        late = late_request(prompts, chunk)
        why = unmixed_because(sides.all, late, chunk)
        coverage = _coverage(candidate, sides.candidate, unmixed=why)
        result.tiles_declared = coverage.tiles is not None
        for side in sides.opened:
            if not why:
                side.mix(evolve(late))
            side.start()
        steps = sides.count_steps()
        progress(result, "weights", 0, steps)
        result.quantised = sides.candidate.quantised
        if sides.plain or not result.quantised:
            stored = sides.plain or sides.baseline
            result.weights = list(compared_weights(sides.candidate, stored))
        tokens: list[list[int]] = []
        try:
            for what, done in sides.chained(result, tokens, coverage):
                progress(result, f"chained, {what}", done, steps)
            if (isolate or result.first_wrong("chained")) and sides.layerwise:
                for what, done in sides.isolated(result, tokens):
                    progress(result, f"isolated, {what}", done, steps)
        except StepError as error:
            result.failure = str(error)
            return result
        finally:
            result.coverage, result.over = coverage.items(), coverage.over
        sides.judge_perplexity(result)
        if against:
            result.against = changes(against, result.findings, result.runtime)
        result.finished = True
        return result


def _coverage(choice: Choice, side: Side, unmixed: str) -> Coverage:
    """unmixed: why there is no mixed step; else empty."""
    config, page_size = side.model.loaded.config, side.model.runtime.page_size
    return Coverage(
        tiles=declared_tiles(choice, config, evolve(choice.runtime, page_size=page_size)),
        page_size=page_size,
        limits=side.executor.limits,
        kv_heads=config.num_kv_heads,
        hidden_size=config.hidden_size,
        unmixed=unmixed,
        samples=isinstance(side.executor, SamplingExecutor),
    )


@contextmanager
def _opened_sides(
    candidate: Choice,
    reference: Choice,
    tolerances: Sequence[Tolerance],
    opened: Callable[..., Side],
    batch: int,
    chunk: int,
) -> "Iterator[_Sides]":
    """The sides with the same steps: of at most so many sequences, and two for a mixed step.

    Baseline and truth have the weights of a candidate that quantises its own; a fourth side then
    has the model's, unless its files have none but the quantised ones.
    """
    with ExitStack() as stack:

        def side(
            name: str,
            choice: Choice,
            batch: int,
            chunk: int,
            weights: TensorSource | None = None,
        ) -> Side:
            side = opened(name, choice, batch=batch, chunk=chunk, weights=weights)
            return stack.enter_context(closing(side))

        ours = side("candidate", candidate, max(batch, 2), chunk)
        runtime = ours.model.runtime
        size = runtime.max_batch_size, runtime.max_batch_tokens
        weights = ExecutorWeights(ours) if ours.quantised else None
        near = side("baseline", _in(reference, ours.dtype, runtime.kv_dtype), *size, weights)
        wide, plain = _in(reference, "float32", "float32"), None
        try:
            truth = side("truth", wide, *size, weights)
            if weights and not ours.model.loaded.packing:
                plain = side("unquantised model", wide, *size)
        except ExecutorError as error:
            raise ExecutorError(
                f"the reference must run in float32, as the truth: {error}"
            ) from error
        for other in (near, truth):
            found = other.model.runtime.max_batch_size, other.model.runtime.max_batch_tokens
            if found != size:
                raise ConfigError(
                    f"the reference runs at most {found[0]} sequences and {found[1]} tokens in a "
                    f"step, and the candidate {size[0]} and {size[1]}: give fewer prompts, or a "
                    "smaller chunk"
                )
        yield _Sides(ours, near, truth, plain, tolerances=tolerances)


def _in(choice: Choice, weight_dtype: str, kv_dtype: str) -> Choice:
    runtime = evolve(choice.runtime, weight_dtype=weight_dtype, kv_dtype=kv_dtype)
    return evolve(choice, runtime=runtime)


@frozen(eq=False)
class _Sides:
    candidate: Side
    baseline: Side
    truth: Side
    plain: Side | None = None
    """The reference in float32 with the model's own weights, where the candidate's are quantised
    and the others have those."""
    tolerances: Sequence[Tolerance] = ()
    noise: dict[tuple[Mode, str], Noise] = field(factory=lambda: defaultdict(Noise))
    """Noise, keyed by mode and tensor."""
    tapped: dict[str, bool] = field(factory=dict)
    """Whether the candidate taps a stage, decided where the stage first occurs."""

    @property
    def all(self) -> tuple[Side, Side, Side]:
        return self.candidate, self.baseline, self.truth

    @property
    def opened(self) -> tuple[Side, ...]:
        return (*self.all, self.plain) if self.plain else self.all

    @property
    def layerwise(self) -> bool:
        return all(side.layerwise for side in self.all)

    def count_steps(self) -> int:
        """The number of steps of a run, which are scheduled and not run."""
        side = self.baseline
        steps = 0
        while (step := side.next_step()) is not None:
            side.done(step, [0] * len(step.sampled))
            steps += 1
        side.start()
        return steps

    def chained(
        self, result: Comparison, tokens: list[list[int]], coverage: Coverage
    ) -> Iterator[tuple[str, int]]:
        """Runs each side on its own outputs; adds the truth's tokens to tokens, one list per step,
        and what the steps reach to coverage.

        Yields what was compared, and the number of finished steps.
        """
        self.candidate.mark_unwritten()
        number = 0
        while (steps := self._next()) is not None:
            step = steps[0]
            phase = self.candidate.phase(step)
            compared = 0
            run = [*zip(self.all, steps, strict=True)]
            if self.plain and (own := self.plain.next_step()):
                run.append((self.plain, own))
            parts = [side.parts(s) for side, s in run]
            for layer, (ours, near, true, *plain) in enumerate(zip(*parts, strict=True), start=-1):
                if result.quantisation:
                    result.quantisation.add_layer(layer, true, *plain)
                place = Place(mode="chained", phase=phase, step=number, tensor="")
                found = self._judge(result, place, step, ours, near, true)
                compared += len(ours)
                if layer < 0:
                    embedded = near.get("embed")
                if 0 <= layer < self.candidate.executor.kv_cache_spec.num_layers:
                    kv = self._joined(steps, layer)
                    cached = self._judge_kv(place, layer, step, kv)
                    if (number, layer) == (0, 0) and embedded is not None:
                        result.drift = self._drift(step, embedded, ours, kv[0])
                    result.findings += _in_order(found, cached)
                    self._cover_heads(coverage, phase, layer, true, found)
                    yield f"{phase}, layer {layer}", number
                else:
                    result.findings += found
            if not compared:
                raise ExecutorError(
                    f"executors {result.candidate} and {result.reference} have no tensor in "
                    "common to compare: a candidate's tap must get at least logits"
                )
            if not number:
                self._check_tolerances(result)
            result.findings += self._untapped(place, steps, ours, near, true)
            chosen = true["logits"].argmax(-1).tolist() if step.sampled else []
            if step.sampled:
                ids = [int(r.request_id.rpartition("-")[2]) for r in step.sampled]
                if "logits" in ours and ours["logits"].shape == true["logits"].shape:
                    result.logits += logits_agreement(
                        number, ids, ours["logits"], near["logits"], true["logits"]
                    )
                if result.quantisation:
                    unquantised = plain[0]["logits"]
                    result.quantisation.add_logits(number, ids, true["logits"], unquantised)
            tokens.append(chosen)
            for side, own in run:
                side.done(own, chosen)
            coverage.add(number, step, phase)
            number += 1
            yield phase, number

    def _cover_heads(
        self,
        coverage: Coverage,
        phase: Phase,
        layer: int,
        true: Tensors,
        found: Sequence[Finding],
    ) -> None:
        """Where the truth taps attention and returns its weights."""
        attention, output = (true.get(f"layers.{layer}.{s}") for s in ("attention", "output"))
        limit = next((f.limit for f in found if f.place.stage == "output"), None)
        if attention is None or output is None or limit is None:
            return
        if coverage.wants_heads(phase, layer) and hasattr(self.truth.executor, "weight"):
            weight = self.truth.executor.weight(f"model.layers.{layer}.self_attn.o_proj.weight")
            coverage.add_heads(phase, layer, attention, weight, output, limit)

    def isolated(self, result: Comparison, tokens: list[list[int]]) -> Iterator[tuple[str, int]]:
        """Runs each layer of candidate and truth on the baseline's input and cache; yields as
        chained does."""
        diagnosis = None
        if hasattr(self.truth.executor, "weight"):
            diagnosis = Diagnosis.of_plugins(result.candidate, result.reference)
        for side in self.all:
            side.start()
        for number, chosen in enumerate(tokens):
            steps = self._next()
            assert steps is not None
            phase = self.candidate.phase(steps[0])
            place = Place(mode="isolated", phase=phase, step=number, tensor="")
            for what in self._isolated_step(result, place, steps, diagnosis):
                yield f"{phase}, {what}", number
            for side, own in zip(self.all, steps, strict=True):
                side.done(own, chosen)
            yield phase, number + 1

    def _isolated_step(
        self,
        result: Comparison,
        place: Place,
        steps: tuple[Step, Step, Step],
        diagnosis: Diagnosis | None,
    ) -> Iterator[str]:
        """Yields what was compared. diagnosis: None if the truth cannot return weights."""
        ours, near, true = steps
        taps: list[Tensors] = [{}, {}, {}]
        record = [recorder(seen) for seen in taps]
        begun = [side.begin(step) for side, step in zip(self.all, steps, strict=True)]
        hidden = self.baseline.embed(begun[1], near)
        for layer in range(self.candidate.executor.kv_cache_spec.num_layers):
            for target in (self.candidate, self.truth):
                copy_kv(self.baseline, target, layer, near)
            before = None
            if diagnosis and diagnosis.wants(layer):
                before = self.candidate.kv(layer)
            self.candidate.run_layer(begun[0], layer, hidden, ours, record[0])
            self.truth.run_layer(begun[2], layer, hidden.float(), true, record[2])
            output = self.baseline.run_layer(begun[1], layer, hidden, near, record[1])
            found = self._judge(result, place, ours, *taps)
            kv = self._joined(steps, layer)
            found = _in_order(found, self._judge_kv(place, layer, ours, kv))
            result.findings += found
            if diagnosis and before and not all(f.passed for f in found):
                taps[0] |= {
                    f"layers.{layer}.k_cache": kv[0].key,
                    f"layers.{layer}.v_cache": kv[0].value,
                }
                case = self._case(ours, layer, hidden, before, taps[0], found)
                if not case.finite:
                    case = self._with_finite_slots(case, begun[0], ours, near)
                yield from _diagnose(result, diagnosis, case, f"layer {layer}")
            hidden = output
            for seen in taps:
                seen.clear()
            yield f"layer {layer}"
        rows = hidden[near.batch.logits_rows]
        if len(rows):
            self.candidate.run_head(begun[0], rows, ours, record[0])
            self.truth.run_head(begun[2], rows.float(), true, record[2])
            self.baseline.run_head(begun[1], rows, near, record[1])
            found = self._judge(result, place, ours, *taps)
            result.findings += found
            if diagnosis and diagnosis.wants(None) and not all(f.passed for f in found):
                case = self._case(ours, None, rows, None, taps[0], found)
                yield from _diagnose(result, diagnosis, case, "head")

    def _with_finite_slots(self, case: Case, begun: Any, ours: Step, near: Step) -> Case:
        """The case, run again with random numbers in the slots that nobody wrote: if NaN is read
        there, it hides from which slots, and all else. The case itself if the layer is then right.
        """
        layer = case.layer
        assert layer is not None
        copy_kv(self.baseline, self.candidate, layer, near, random=True)
        before = self.candidate.kv(layer)
        seen: Tensors = {}
        self.candidate.run_layer(begun, layer, case.hidden, ours, recorder(seen))
        cache = joined(self.candidate, layer, ours)
        found = {name.rpartition(".")[2]: tensor for name, tensor in seen.items()}
        found |= {"k_cache": cache.key, "v_cache": cache.value}
        again = evolve(case, before=before, found=found)
        return again if unexplained(again) > 1 else case

    def _next(self) -> tuple[Step, Step, Step] | None:
        """The same step on each side."""
        ours, near, true = (side.next_step() for side in self.all)
        if ours is None or near is None or true is None:
            return None
        return ours, near, true

    def _case(
        self,
        step: Step,
        layer: int | None,
        hidden: Tensor,
        before: KvLayer | None,
        tapped: Tensors,
        found: Sequence[Finding],
    ) -> Case:
        return Case(
            config=self.candidate.model.loaded.config,
            layer=layer,
            dtype=torch_dtype(self.candidate.dtype),
            hidden=hidden,
            batch=step.batch,
            spec=self.candidate.executor.kv_cache_spec,
            before=before,
            cached=cached_slots(self.candidate, step),
            found={name.rpartition(".")[2]: tensor for name, tensor in tapped.items()},
            limits={f.place.stage: f.limits for f in found if f.limits},
            tolerances={f.place.stage: f.tolerance for f in found if f.tolerance},
            weight=self.truth.executor.weight,
            quantised=self.candidate.quantised,
        )

    def _drift(self, step: Step, hidden: Tensor, tapped: Tensors, cached: KvLayer) -> Drift | None:
        """Looks for sums in 16 bits in layer 0, in a step whose sequences begin in it, so that the
        cache has one row for each row of hidden."""
        if not hasattr(self.truth.executor, "weight") or len(cached.value) != len(hidden):
            return None
        tapped = tapped | {"layers.0.v_cache": cached.value}
        case = self._case(step, 0, hidden, None, tapped, [])
        tolerated = {
            name.rpartition(".")[2]: t
            for name in tapped
            for t in self.tolerances
            if fnmatchcase(name, t.pattern)
        }
        return drift(evolve(case, tolerances=tolerated))

    def _judge(
        self, result: Comparison, at: Place, step: Step, ours: Tensors, near: Tensors, true: Tensors
    ) -> list[Finding]:
        """Judges what the candidate taps. A stage that it taps once, it must tap everywhere."""
        for name in ours:
            if name not in true:
                raise ExecutorError(
                    f"executor {result.candidate} taps {name!r}, which {result.reference} does "
                    "not, so it cannot be judged: both use names of docs/tensors.md"
                )
        found = []
        for name, expected in true.items():
            place = evolve(at, tensor=name)
            tensor = ours.get(name)
            known = self.tapped.setdefault(place.stage, tensor is not None)
            if tensor is None and not known and name != "logits":
                if place.stage not in result.not_compared:
                    result.not_compared.append(place.stage)
                continue
            if not known and tensor is not None and place.stage in result.not_compared:
                result.not_compared.remove(place.stage)
                why = "the candidate taps this tensor here, but not everywhere before"
                found.append(Finding(place=place, passed=False, why=why))
            elif expected.numel():
                found.append(self._finding(place, step, tensor, near[name], expected))
        return found

    def _untapped(
        self,
        at: Place,
        steps: tuple[Step, Step, Step],
        ours: Tensors,
        near: Tensors,
        true: Tensors,
    ) -> list[Finding]:
        """Runs the candidate's step again without taps, and holds cache and logits to the run with
        taps where the two have the same bits, else to the truth.

        The cache is then that of the run with taps, so that each step is judged by itself.
        """
        step, place = steps[0], evolve(at, mode="untapped")
        exact = self.candidate.executor.limits.tap_exact
        layers = range(self.candidate.executor.kv_cache_spec.num_layers)
        tapped = [joined(self.candidate, i, step) if exact else None for i in layers]
        found = []
        with cleared(self.candidate.executor, step.batch, self.candidate.unwritten):
            logits = self.candidate.forward(step)
            for layer, cache in enumerate(tapped):
                found += self._judge_kv(place, layer, step, self._joined(steps, layer), cache)
        place = evolve(place, tensor="logits")
        if not step.sampled:
            return found
        if exact and "logits" in ours:
            return [*found, judge_bits(place, logits, ours["logits"])]
        return [*found, self._finding(place, step, logits, near["logits"], true["logits"])]

    def _finding(
        self, place: Place, step: Step, tensor: "Tensor | None", near: Tensor, true: Tensor
    ) -> Finding:
        noise = self.noise[place.mode, place.tensor]
        tolerance = next((t for t in self.tolerances if fnmatchcase(place.tensor, t.pattern)), None)
        finding = judge(place, tensor, near, true, noise, tolerance)
        if finding.passed or finding.limits is None or tensor is None:
            return finding
        if tensor.shape != true.shape:
            return finding
        rows = rows_of(self.candidate, step, place.stage)
        head = "query head" if place.stage.startswith("q_") else "KV head"
        return evolve(finding, pattern=pattern(tensor, true, finding.limit, rows, head))

    def judge_perplexity(self, result: Comparison) -> None:
        for side in self.all:
            if side.unscored:
                detail = f"by the {side.name}: {side.unscored}"
                result.coverage.append(Item(name=SCORED, detail=detail))
                return
        floor = FLOOR.get(torch_dtype(self.candidate.dtype), FLOOR[torch.float32])
        result.perplexity = judge_perplexity(
            self.candidate.nll,
            self.baseline.nll,
            self.truth.nll,
            noise=[row.noise for row in result.logits],
            floor=floor,
            judged=not any(fnmatchcase("logits", t.pattern) for t in self.tolerances),
        )
        if result.quantisation and self.plain:
            result.quantisation.perplexity = perplexity(self.plain.nll)

    def _check_tolerances(self, result: Comparison) -> None:
        names = [f.place.tensor for f in result.findings]
        for tolerance in self.tolerances:
            if not any(fnmatchcase(name, tolerance.pattern) for name in names):
                raise ConfigError(
                    f"tolerance {tolerance.pattern!r} matches no tensor that is compared"
                    f"{nearest(tolerance.pattern, names)} (such as {', '.join(names[:3])})"
                )

    def _joined(self, steps: Sequence[Step], layer: int) -> tuple[KvLayer, KvLayer, KvLayer]:
        ours, near, true = (
            joined(side, layer, step) for side, step in zip(self.all, steps, strict=True)
        )
        return ours, near, true

    def _judge_kv(
        self,
        at: Place,
        layer: int,
        step: Step,
        caches: tuple[KvLayer, KvLayer, KvLayer],
        tapped: KvLayer | None = None,
    ) -> list[Finding]:
        """Judges the cache of the step's requests, from their first token to the step's last.

        tapped: what it must equal bit for bit, if given.
        """
        found = []
        for name in ("key", "value"):
            ours, near, true = (getattr(cache, name) for cache in caches)
            place = evolve(at, tensor=f"layers.{layer}.{name[0]}_cache")
            if tapped:
                finding = judge_bits(place, ours, getattr(tapped, name))
            else:
                finding = self._finding(place, step, ours, near, true)
            found.append(evolve(finding, where=self._cached_at(finding, step)))
        return found

    def _cached_at(self, finding: Finding, step: Step) -> str:
        """Request and slot of the worst element of joined caches [tokens, KV heads, head_dim]."""
        if finding.candidate is None:
            return ""
        token, head, _ = finding.candidate.worst
        for request, stop in written(self.candidate, step):
            if token < stop:
                slot = int(self.candidate.slots(request, stop)[token])
                return f"{request.request_id}, token {token}, KV head {head}, slot {slot}"
            token -= stop
        raise AssertionError("the caches hold the tokens of these requests")


def _diagnose(result: Comparison, diagnosis: Diagnosis, case: Case, where: str) -> Iterator[str]:
    for tried in diagnosis.examine(case):
        yield f"{where}, trying bug hypothesis {tried + 1}"
    result.reason = diagnosis.reason


def _in_order(tapped: list[Finding], cached: list[Finding]) -> list[Finding]:
    """A layer's findings in the order of computation: the cache comes before attention."""
    before = [f for f in tapped if f.place.stage in BEFORE_CACHE]
    return [*before, *cached, *(f for f in tapped if f.place.stage not in BEFORE_CACHE)]
