"""Compares two executors on a model: weights, then every tensor of every step."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from attrs import define, evolve, field, frozen
from torch import Tensor

from tilewright import plugins
from tilewright.errors import ConfigError, ExecutorError, nearest
from tilewright.scheduler import Step
from tilewright.types import DType, Hypothesis, KvLayer
from tilewright.weights import expected_tensors, torch_dtype
from tilewright_compare.hypotheses import Reason, explain, hold
from tilewright_compare.judge import (
    Finding,
    LogitsAgreement,
    Mode,
    Noise,
    Place,
    Tolerance,
    judge,
    logits_agreement,
)
from tilewright_compare.layer import Case
from tilewright_compare.metrics import difference
from tilewright_compare.mistakes import HYPOTHESES
from tilewright_compare.packing import how_packed
from tilewright_compare.sides import (
    Choice,
    Side,
    StepError,
    Tensors,
    cached_slots,
    copy_kv,
    joined,
    open_side,
    written,
)

BEFORE_CACHE = ("attn_norm", "q_proj", "k_proj", "v_proj", "q_norm", "k_norm", "q_rope", "k_rope")
"""Stages of a layer before its keys and values are cached."""

Progress = Callable[["Comparison", str, int, int], None]
"""Called with the comparison so far, what was compared last, the number of finished steps, and
their total: when all sides are loaded, after each layer, and after each step."""


@frozen(kw_only=True)
class WeightFinding:
    """A weight of the candidate, against the checkpoint's in the candidate's dtype."""

    name: str
    passed: bool
    why: str


@define(kw_only=True)
class Comparison:
    """Differences between two executors' runs of one model."""

    model: str
    reference: str
    candidate: str
    dtype: str
    """The candidate's dtype; the baseline is the reference in it, the truth is in float32."""
    weights: list[WeightFinding] = field(factory=list)
    findings: list[Finding] = field(factory=list)
    """In the order in which the tensors were computed: chained, then isolated."""
    reason: Reason | None = None
    """Diagnosis of the first layer that is wrong by itself."""
    logits: list[LogitsAgreement] = field(factory=list)
    not_compared: list[str] = field(factory=list)
    """Stages that the reference taps and the candidate does not."""
    perplexity: tuple[float, float] | None = None
    """Perplexity of the prompts, by the truth and by the candidate."""
    finished: bool = False
    failure: str = ""
    """Why an executor could not continue; else empty."""

    @property
    def equal(self) -> bool:
        return self.finished and self.divergence is None and not self.wrong_weights

    @property
    def wrong_weights(self) -> list[WeightFinding]:
        return [w for w in self.weights if not w.passed]

    @property
    def divergence(self) -> Finding | None:
        """The first tensor that is wrong by itself, else the first that is wrong at all."""
        failed = [f for f in self.findings if not f.passed]
        alone = [f for f in failed if f.place.mode == "isolated"]
        return next(iter(alone or failed), None)

    @property
    def sentence(self) -> str:
        if wrong := self.wrong_weights:
            more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            return f"weight {wrong[0].name} is packed wrongly: {wrong[0].why}{more}"
        first = self.divergence
        if first is None and not self.finished:
            so_far = f"no difference in {len(self.findings)} tensors so far"
            return f"{self.failure}; {so_far}" if self.failure else f"not finished: {so_far}"
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
    tolerances: Sequence[Tolerance] = (),
    progress: Progress = lambda result, what, done, total: None,
) -> Comparison:
    """Run prompts, then new_tokens - 1 decode steps with the truth's greedy tokens on all sides.

    chunk: maximum number of tokens in a prefill step. isolate: run each layer alone even if the
    whole runs are equal; that finds errors that are lost in the rounding of earlier layers.
    tolerances: the first one with a pattern that matches a tensor's name decides whether it passes.
    An executor that fails in a step ends the comparison, and ``failure`` says why.

    Raises what LLMEngine raises; ExecutorError when the two have nothing to compare; ConfigError
    for a tolerance that matches no tensor.
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
        sides = _Sides(tried, near, truth, tolerances=tolerances)
        steps = -(-sum(map(len, prompts)) // chunk) + new_tokens - 1
        progress(result, "weights", 0, steps)
        result.weights = list(sides.weights())
        tokens: list[list[int]] = []
        try:
            for what, done in sides.chained(result, tokens):
                progress(result, f"chained, {what}", done, steps)
            if (isolate or result.divergence) and sides.layerwise:
                for what, done in sides.isolated(result, tokens):
                    progress(result, f"isolated, {what}", done, steps)
        except StepError as error:
            result.failure = str(error)
            return result
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
    tolerances: Sequence[Tolerance] = ()
    noise: dict[tuple[Mode, str], Noise] = field(factory=lambda: defaultdict(Noise))
    """Noise, keyed by mode and tensor."""
    tapped: dict[str, bool] = field(factory=dict)
    """Whether the candidate taps a stage, decided where the stage first occurs."""

    @property
    def all(self) -> tuple[Side, Side, Side]:
        return self.candidate, self.baseline, self.truth

    @property
    def layerwise(self) -> bool:
        return all(side.layerwise for side in self.all)

    def weights(self) -> Iterator[WeightFinding]:
        """Compares each weight, if both executors can return weights."""
        if not all(hasattr(s.executor, "weight") for s in (self.candidate, self.baseline)):
            return
        config = self.candidate.model.loaded.config
        dtype = self.candidate.model.runtime.weight_dtype
        assert dtype is not None
        shapes = expected_tensors(config)
        for name, shape in shapes.items():
            source = self.baseline.executor.weight(name)
            try:
                packed = self.candidate.executor.weight(name)
            except Exception as error:
                why = f"weight() failed: {plugins.cause(error)}"
                yield WeightFinding(name=name, passed=False, why=why)
                continue
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
                why = how_packed(packed.to(source.dtype), source, others) or (
                    f"relative error {d.relative_rms:.2g}, worst at {list(d.worst)}: "
                    f"{d.candidate_at_worst:.6g}, expected {d.reference_at_worst:.6g}"
                )
            yield WeightFinding(name=name, passed=not why, why=why)

    def chained(self, result: Comparison, tokens: list[list[int]]) -> Iterator[tuple[str, int]]:
        """Runs each side on its own outputs; adds the truth's tokens to tokens, one list per step.

        Yields what was compared, and the number of finished steps.
        """
        self.candidate.spoil()
        number = 0
        while (steps := self._next()) is not None:
            step = steps[0]
            phase = self.candidate.phase(step)
            compared = 0
            parts = [side.parts(s) for side, s in zip(self.all, steps, strict=True)]
            for layer, (ours, near, true) in enumerate(zip(*parts, strict=True), start=-1):
                place = Place(mode="chained", phase=phase, step=number, tensor="")
                found = self._judge(result, place, ours, near, true)
                compared += len(ours)
                if 0 <= layer < self.candidate.executor.kv_cache_spec.num_layers:
                    cached = self._judge_kv(place, layer, step, self._joined(steps, layer))
                    result.findings += _in_order(found, cached)
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
            yield phase, number

    def isolated(self, result: Comparison, tokens: list[list[int]]) -> Iterator[tuple[str, int]]:
        """Runs each layer of candidate and truth on the baseline's input and cache."""
        why = _Why.of_plugins(result.candidate, result.reference)
        why.able = hasattr(self.truth.executor, "weight")
        for side in self.all:
            side.restart()
        for number, chosen in enumerate(tokens):
            steps = self._next()
            assert steps is not None
            ours, near, true = steps
            phase = self.candidate.phase(ours)
            place = Place(mode="isolated", phase=phase, step=number, tensor="")
            taps: list[Tensors] = [{}, {}, {}]
            record = [_recorder(seen) for seen in taps]
            hidden = self.baseline.executor.embed(near.batch)
            for layer in range(self.candidate.executor.kv_cache_spec.num_layers):
                for target in (self.candidate, self.truth):
                    copy_kv(self.baseline, target, layer, near)
                before = None
                if why.wants(result, layer):
                    cache = self.candidate.kv(layer)
                    before = KvLayer(cache.key.clone(), cache.value.clone())
                self.candidate.run_layer(layer, hidden, ours, record[0])
                self.truth.run_layer(layer, hidden.float(), true, record[2])
                output = self.baseline.run_layer(layer, hidden, near, record[1])
                found = self._judge(result, place, *taps)
                kv = self._joined(steps, layer)
                found = _in_order(found, self._judge_kv(place, layer, ours, kv))
                result.findings += found
                if before and not all(f.passed for f in found):
                    taps[0] |= {
                        f"layers.{layer}.k_cache": kv[0].key,
                        f"layers.{layer}.v_cache": kv[0].value,
                    }
                    case = self._case(ours, layer, hidden, before, taps[0], found)
                    yield from why.of(case, result, f"{phase}, layer {layer}", number)
                hidden = output
                for seen in taps:
                    seen.clear()
                yield f"{phase}, layer {layer}", number
            rows = hidden[near.batch.logits_rows]
            if len(rows):
                self.candidate.run_head(rows, ours, record[0])
                self.truth.run_head(rows.float(), true, record[2])
                self.baseline.run_head(rows, near, record[1])
                found = self._judge(result, place, *taps)
                result.findings += found
                if why.wants(result, None) and not all(f.passed for f in found):
                    case = self._case(ours, None, rows, None, taps[0], found)
                    yield from why.of(case, result, f"{phase}, head", number)
            for side, own in zip(self.all, steps, strict=True):
                side.done(own, chosen)
            yield phase, number + 1

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
        model = self.candidate.model
        assert model.runtime.weight_dtype is not None
        return Case(
            config=model.loaded.config,
            layer=layer,
            dtype=torch_dtype(model.runtime.weight_dtype),
            hidden=hidden,
            batch=step.batch,
            spec=self.candidate.executor.kv_cache_spec,
            before=before,
            cached=cached_slots(self.candidate, step),
            found={name.rpartition(".")[2]: tensor for name, tensor in tapped.items()},
            limits={f.place.stage: f.limits for f in found if f.limits},
            tolerances={f.place.stage: f.tolerance for f in found if f.tolerance},
            weight=self.truth.executor.weight,
        )

    def _judge(
        self, result: Comparison, at: Place, ours: Tensors, near: Tensors, true: Tensors
    ) -> list[Finding]:
        """Judges what the candidate taps, and what it must tap: layer outputs and logits."""
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
            if tensor is None and not known and not name.endswith((".output", "logits")):
                if place.stage not in result.not_compared:
                    result.not_compared.append(place.stage)
                continue
            if not known and tensor is not None and place.stage in result.not_compared:
                result.not_compared.remove(place.stage)
                why = "the candidate has this tensor here, but has not had it everywhere before"
                found.append(Finding(place=place, passed=False, why=why))
            elif expected.numel():
                found.append(self._finding(place, tensor, near[name], expected))
        return found

    def _finding(
        self, place: Place, tensor: "Tensor | None", near: Tensor, true: Tensor
    ) -> Finding:
        noise = self.noise[place.mode, place.tensor]
        tolerance = next((t for t in self.tolerances if fnmatchcase(place.tensor, t.pattern)), None)
        return judge(place, tensor, near, true, noise, tolerance)

    def _check_tolerances(self, result: Comparison) -> None:
        names = [f.place.tensor for f in result.findings]
        for tolerance in self.tolerances:
            if not any(fnmatchcase(name, tolerance.pattern) for name in names):
                raise ConfigError(
                    f"tolerance {tolerance.pattern!r} is for no tensor that is compared"
                    f"{nearest(tolerance.pattern, names)} (such as {', '.join(names[:3])})"
                )

    def _joined(self, steps: Sequence[Step], layer: int) -> tuple[KvLayer, KvLayer, KvLayer]:
        ours, near, true = (
            joined(side, layer, step) for side, step in zip(self.all, steps, strict=True)
        )
        return ours, near, true

    def _judge_kv(
        self, at: Place, layer: int, step: Step, caches: tuple[KvLayer, KvLayer, KvLayer]
    ) -> list[Finding]:
        """Judges the cache of the step's requests, from their first token to the step's last."""
        found = []
        for name in ("key", "value"):
            ours, near, true = (getattr(cache, name) for cache in caches)
            place = evolve(at, tensor=f"layers.{layer}.{name[0]}_cache")
            finding = self._finding(place, ours, near, true)
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


HELD_AGAINST = 2
"""Number of later steps in which a reason is tested again."""


@define(eq=False)
class _Why:
    """Diagnoses the first layer that is wrong by itself."""

    hypotheses: Sequence[Hypothesis]
    broken: tuple[str, ...]
    able: bool = True
    """Whether right weights are available."""
    layer: "int | None" = None
    steps: int = 0
    """Number of steps in which a reason was searched or tested."""

    @classmethod
    def of_plugins(cls, *executors: str) -> "_Why":
        """With the known mistakes, and those that the executors' plugins add."""
        found, broken = list(HYPOTHESES), []
        for name in dict.fromkeys(executors):
            plugin = plugins.find("executor", name)
            try:
                found += plugins.call(plugins.load(plugin), "hypotheses") or ()
            except Exception as error:
                broken.append(f"hypotheses of {plugin} failed: {plugins.cause(error)}")
        return cls(found, tuple(broken))

    def wants(self, result: Comparison, layer: "int | None") -> bool:
        """Whether the layer is to be explained if it is wrong. None: the head."""
        held = result.reason is None or (layer == self.layer and self.steps <= HELD_AGAINST)
        return self.able and held

    def of(
        self, case: Case, result: Comparison, where: str, number: int
    ) -> Iterator[tuple[str, int]]:
        """Explain the case, or test the reason on it; yields as isolated does."""
        self.steps += 1
        if result.reason is not None:
            result.reason = hold(result.reason, case, self.hypotheses)
            return
        self.layer = case.layer
        trying = explain(case, self.hypotheses)
        while True:
            try:
                tried = next(trying)
            except StopIteration as end:
                reason: Reason = end.value
                result.reason = evolve(reason, broken=(*self.broken, *reason.broken))
                return
            yield f"{where}, trying known mistake {tried + 1}", number


def _in_order(tapped: list[Finding], cached: list[Finding]) -> list[Finding]:
    """A layer's findings in the order of computation: the cache comes before attention."""
    before = [f for f in tapped if f.place.stage in BEFORE_CACHE]
    return [*before, *cached, *(f for f in tapped if f.place.stage not in BEFORE_CACHE)]


def _recorder(seen: Tensors) -> Callable[[str, Tensor], None]:
    def tap(name: str, tensor: Tensor) -> None:
        seen[name] = tensor.clone()

    return tap
