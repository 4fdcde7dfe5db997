"""The conformance suite of executors.

Results are judged against the executor ``torch``: in float32 it is the truth, and in the
candidate's dtype it shows the error of rounding (``tilewright_compare.judge``). A candidate whose
weights are quantised is judged against references with the weights that its ``weight`` shows, and
these against the checkpoint's.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from functools import cache
from typing import Any, ClassVar

import pytest
import torch
from attrs import define, evolve, field, frozen
from torch import Tensor

from tilewright import plugins
from tilewright.errors import ExecutorError
from tilewright.types import (
    DTYPES,
    ExecutorLimits,
    KvLayer,
    ModelConfig,
    PackedWeights,
    PluginInfo,
    RopeConfig,
    RuntimeConfig,
    SamplerRow,
    SamplingExecutor,
    SamplingParams,
    StepBatch,
    Tap,
    TensorSource,
)
from tilewright.weights import expected_tensors, torch_dtype
from tilewright_compare.judge import Mode, Noise, Phase, Place, judge
from tilewright_compare.packing import QUANTISED_ERROR, worst_row_error
from tilewright_testing.models import (
    CONFIGS,
    MemorySource,
    Model,
    dtype_name,
    make_model,
    same_bits,
)
from tilewright_testing.paged import Sequences, Tokens, by_slot, copied, tensors
from tilewright_testing.reporting import FOUND, SUMMARY
from tilewright_testing.state import differences, global_state, left_alone
from tilewright_testing.suite import Implementation, PluginSuite, no_report

MODELS: dict[str, ModelConfig] = {
    **{
        name: CONFIGS[name]
        for name in (
            "grouped",
            "qk-norm",
            "all-biases",
            "one-kv-head",
            "wide-heads",
            "tied",
            "qkv-biases",
            "qk-norm-tied-gqa-5",
        )
    },
    "sliding-window": evolve(CONFIGS["grouped"], sliding_windows=(None, 7, 3)),
    "linear-rope": evolve(CONFIGS["tied"], rope=RopeConfig(kind="linear", factor=4.0)),
    "llama3-rope": evolve(
        CONFIGS["wide-heads"],
        rope=RopeConfig(theta=5e5, kind="llama3", factor=8.0, original_max_position=32),
    ),
    "yarn-rope": evolve(
        CONFIGS["qk-norm"],
        rope=RopeConfig(theta=1e6, kind="yarn", factor=4.0, original_max_position=64),
    ),
    "dynamic-rope": evolve(
        CONFIGS["plain"],
        rope=RopeConfig(kind="dynamic", factor=16.0),
        max_position_embeddings=16,
    ),
    # Sizes for tiled kernels: some executors run no others.
    "in-16s": evolve(CONFIGS["qk-norm"], head_dim=32, hidden_size=96, intermediate_size=160),
    "in-16s-tied-gqa-5": evolve(
        CONFIGS["qk-norm-tied-gqa-5"], head_dim=32, hidden_size=64, intermediate_size=96
    ),
    "in-64s": evolve(
        CONFIGS["grouped"],
        num_heads=4,
        head_dim=64,
        hidden_size=128,
        intermediate_size=256,
        vocab_size=256,
    ),
}
"""Shapes that differ where executors go wrong. Shapes that an executor refuses are left out."""

PAGE_SIZES = (4, 16, 32, 64, 128, None)
"""The first size that an executor accepts is tested; None: the executor chooses."""

MAX_SEQ_LEN = 256
MAX_BATCH_SIZE = 20
"""More than the 16 that an engine runs by default, and than kernels take at once."""

NAN = float("nan")


# --- cases ----------------------------------------------------------------------------------------


@frozen(kw_only=True, eq=False)
class Case:
    """A model that the executor runs, and its settings."""

    name: str
    model: Model = field(repr=False)
    runtime: RuntimeConfig

    def __str__(self) -> str:
        return f"model {self.name!r} in {self.runtime.weight_dtype}"

    @property
    def page_size(self) -> int:
        assert self.runtime.page_size
        return self.runtime.page_size

    @property
    def quantised(self) -> bool:
        """Whether the weight dtype is none that torch computes in."""
        return self.runtime.weight_dtype not in DTYPES

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the hidden states: the checkpoint's, which is the weights' if that is a float
        dtype."""
        return torch_dtype(self.model.config.dtype)

    @property
    def total_pages(self) -> int:
        """Enough for one sequence of MAX_SEQ_LEN and for short ones."""
        return MAX_SEQ_LEN // self.page_size + 4 * MAX_BATCH_SIZE

    def sequences(self, shuffled: bool = False) -> Sequences:
        return Sequences(self.page_size, self.total_pages, shuffled)

    def arguments(self, options: Any, **changed: Any) -> dict[str, Any]:
        """Arguments of the hook create_executor, some of them changed."""
        return {
            "model_config": self.model.config,
            "runtime_config": self.runtime,
            "weights": self.model.source(),
            "packed": False,
            "options": options,
            "layers": range(self.model.config.num_layers),
            "report": no_report,
        } | changed

    def tokens(self, *lengths: int) -> list[list[int]]:
        """Random tokens, the same each time."""
        random = torch.Generator().manual_seed(sum(lengths))
        vocab = self.model.config.vocab_size
        return [torch.randint(3, vocab, (n,), generator=random).tolist() for n in lengths]


class ReadTo(MemorySource):
    """A source that records which tensors were read."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        super().__init__(tensors)
        self.read: list[str] = []

    def get(self, name: str) -> Tensor:
        self.read.append(name)
        return super().get(name)


@define(eq=False)
class Running:
    """An executor with a KV cache."""

    executor: Any
    case: Case
    layers: range = field()
    """Those that it runs, by their number in the model."""

    @layers.default
    def _all_layers(self) -> range:
        return range(self.case.model.config.num_layers)

    def __attrs_post_init__(self) -> None:
        self.executor.allocate_kv(self.case.total_pages)

    @property
    def limits(self) -> ExecutorLimits:
        """The executor's limits, and those of the settings that it was made with."""
        limits: ExecutorLimits = self.executor.limits
        runtime = self.case.runtime
        return evolve(
            limits,
            max_batch_size=min(limits.max_batch_size or MAX_BATCH_SIZE, runtime.max_batch_size),
            max_batch_tokens=min(
                limits.max_batch_tokens or runtime.max_batch_tokens, runtime.max_batch_tokens
            ),
            max_seq_len=min(limits.max_seq_len or MAX_SEQ_LEN, MAX_SEQ_LEN),
        )

    def cached(self, layer: int, pages: Sequence[int] | None = None) -> Iterator[Tensor]:
        """A layer's keys, then its values, of some pages or of all: [pages, page_size,
        num_kv_heads, head_dim]."""
        of = self.executor.read_kv(layer, range(self.case.total_pages) if pages is None else pages)
        for storage in (of.key, of.value):
            yield by_slot(storage, self.executor.kv_cache_spec.row_order)

    def snapshot(self) -> list[Tensor]:
        """Copies of keys and values of all layers."""
        return [t for i in self.layers for t in self.cached(i)]

    def fill(self, value: float) -> None:
        pages = range(self.case.total_pages)
        for i in self.layers:
            now = self.executor.read_kv(i, pages)
            full = (torch.full_like(t, value) for t in (now.key, now.value))
            self.executor.write_kv(i, pages, KvLayer(*full))

    def steps(
        self, sequences: Sequences, *several: Tokens, drafting: bool = False
    ) -> Iterator[tuple[Phase, StepBatch]]:
        """The steps that run new tokens, one group after another, within the executor's limits.

        drafting: see ``Sequences.batch``.
        """
        for tokens in several:
            for step in sequences.within(tokens, self.limits):
                batch = sequences.batch(step, drafting)
                rows = batch.logits_rows if drafting else self.wanted(batch, batch.logits_rows)
                yield (
                    "decode" if batch.max_query_len == 1 else "prefill",
                    evolve(batch, logits_rows=rows),
                )

    def wanted(self, batch: StepBatch, rows: Tensor) -> Tensor:
        """Those of a step's rows whose logits the executor's limits allow together."""
        most = self.limits.max_logits_rows
        if most is None:
            return rows
        beyond = ~torch.isin(rows, batch.query_starts[1:] - 1)
        return rows[~beyond | (beyond.cumsum(0) <= most)]

    def run(self, batch: StepBatch, tap: "Tap | None" = None) -> Tensor:
        """The step's logits, on the CPU."""
        logits: Tensor = self.executor.forward(copied(batch), tap)
        return logits.cpu()


Seen = dict[str, Tensor]


def recorder(seen: Seen) -> Tap:
    """A tap that keeps copies."""

    def tap(name: str, tensor: Tensor) -> None:
        seen[name] = tensor.clone().cpu()

    return tap


@define(eq=False)
class Trio:
    """A candidate, and two references that run the same steps: near in its dtype, true in
    float32."""

    case: Case
    candidate: Running
    near: Running
    true: Running
    sequences: Sequences
    mode: Mode = "chained"
    step_number: int = 0
    noise: defaultdict[str, Noise] = field(factory=lambda: defaultdict(Noise))

    def run(self, tokens: Tokens) -> None:
        """Run new tokens, in as many steps as the candidate's limits require, and judge them."""
        __tracebackhide__ = True
        for phase, batch in self.candidate.steps(self.sequences, tokens):
            self.step(phase, batch)

    def step(self, phase: Phase, batch: StepBatch, taps: bool = False) -> Tensor:
        """Run a step, and judge its new keys and values and its logits; returns the candidate's
        logits.

        taps: also judge what is tapped.
        """
        __tracebackhide__ = True
        seen: list[Seen] = [{}, {}, {}]
        logits = [
            running.run(batch, recorder(kept) if taps else None)
            for running, kept in zip((self.candidate, self.near, self.true), seen, strict=True)
        ]
        for name in (n for n in seen[2] if n in seen[0] and n != "logits"):
            self.judge(phase, name, *(kept[name] for kept in seen))
        self.judge_cache(phase, batch)
        self.judge(phase, "logits", *logits)
        self.step_number += 1
        return logits[0]

    def judge_cache(self, phase: Phase, batch: StepBatch) -> None:
        """Judge the keys and values of a step's tokens."""
        __tracebackhide__ = True
        slots, size = batch.slot_mapping.long(), self.case.page_size
        pages, page_of = torch.unique(slots // size, return_inverse=True)
        for layer in self.candidate.layers:
            caches = (
                r.cached(layer, pages.tolist()) for r in (self.candidate, self.near, self.true)
            )
            of = zip(("k_cache", "v_cache"), zip(*caches, strict=True), strict=True)
            for name, storages in of:
                rows = [s[page_of, slots % size] for s in storages]
                self.judge(phase, f"layers.{layer}.{name}", *rows)

    def judge(self, phase: Phase, name: str, ours: Tensor, near: Tensor, true: Tensor) -> None:
        __tracebackhide__ = True
        assert ours.shape == true.shape, (
            f"{self.case}, {phase} step {self.step_number}: {name} must have the shape "
            f"{list(true.shape)}, found {list(ours.shape)}"
        )
        if not true.numel() or same_bits(ours, near):
            return
        place = Place(mode=self.mode, phase=phase, step=self.step_number, tensor=name)
        found = judge(place, ours, near, true, self.noise[name])
        assert found.passed, (
            f"{self.case}, {phase} step {self.step_number}, tensor {name}: {found.why}"
        )


Make = Callable[..., Any]
"""Makes an executor of a case, with arguments of create_executor changed."""


@frozen
class Tried:
    """Result of making an executor of each model, once per plugin."""

    cases: list[Case]
    refused: dict[tuple[str, str], str]
    """The reason for each model and weight dtype that was refused."""
    changed: list[str]
    """Process state that this changed; recorded since some changes happen only the first time."""


_TRIED = pytest.StashKey[dict[str, Tried]]()


class ExecutorSuite(PluginSuite):
    """Checks one executor against ``create_executor`` and ``tilewright.types.Executor``.

    It is tested with the models that it accepts, in each of the dtypes that its ``PluginInfo``
    declares. Fixtures that may be given: ``models``, of which the executor must run at least one,
    ``dtypes``, and ``unsupported_device``.
    """

    kind: ClassVar[str] = "executor"

    @pytest.fixture(autouse=True)
    def _one_thread(self) -> Iterator[None]:
        # The tensors are tiny: more threads would spend their time waiting for each other.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)

    @pytest.fixture
    def models(self) -> Mapping[str, ModelConfig]:
        """Models by name, with random weights; those that the executor refuses are left out."""
        return MODELS

    @pytest.fixture
    def info(self, implementation: Implementation) -> PluginInfo:
        return plugins.info(implementation.plugin)

    @pytest.fixture
    def dtypes(self, info: PluginInfo) -> Sequence[str]:
        """Dtypes of the weights: by default, those that the plugin declares."""
        return info.weight_dtypes

    @pytest.fixture
    def unsupported_device(self) -> str | None:
        """A device that the executor must refuse; None when it accepts any name."""
        return "no-such-device"

    @pytest.fixture
    def create(self, implementation: Implementation) -> Make:
        def create(case: Case, **changed: Any) -> Any:
            arguments = case.arguments(implementation.options, **changed)
            return implementation.call("create_executor", **arguments)

        return create

    @pytest.fixture
    def tried(
        self,
        request: pytest.FixtureRequest,
        implementation: Implementation,
        create: Make,
        info: PluginInfo,
        models: Mapping[str, ModelConfig],
        dtypes: Sequence[str],
    ) -> Tried:
        tried: dict[str, Tried] = request.node.parent.stash.setdefault(_TRIED, {})
        subject = f"{id(implementation.plugin)} {implementation.options} {dtypes} {models}"
        if subject not in tried:
            before = global_state()
            cases, refused = _accepted(create, models, dtypes, info.kv_dtypes)
            tried[subject] = Tried(cases, refused, differences(before, global_state()))
        if not tried[subject].cases:
            why = next(iter(tried[subject].refused.values()), "no error")
            pytest.fail(
                f"the executor refused all of {len(models)} models in {', '.join(dtypes)}, the "
                f"first with: {why}; give the suite a fixture 'models' with models that it runs",
                pytrace=False,
            )
        return tried[subject]

    @pytest.fixture
    def cases(self, tried: Tried) -> list[Case]:
        """Cases that the executor runs: all models in the first dtype that it accepts, two in
        others."""
        return tried.cases

    @pytest.fixture
    def case(self, cases: list[Case]) -> Case:
        """The first case, for tests that need only one."""
        return cases[0]

    @pytest.fixture
    def running(self, create: Make) -> Iterator[Callable[..., Running]]:
        """Makes an executor of a case with a cache; all are closed at the end."""
        made: list[Running] = []

        def running(case: Case, **changed: Any) -> Running:
            layers = {"layers": changed["layers"]} if "layers" in changed else {}
            made.append(Running(create(case, **changed), case, **layers))
            return made[-1]

        yield running
        for one in made:
            one.executor.close()

    @pytest.fixture
    def trio(self, create: Make) -> Callable[..., Any]:
        @contextmanager
        def trio(case: Case, shuffled: bool = False) -> Iterator[Trio]:
            executors = [create(case)]
            try:
                executors += _references(case, executors[0])
                candidate, near, true = (Running(e, case) for e in executors)
                sequences = case.sequences(shuffled)
                yield Trio(case, candidate, near, true, sequences)
            finally:
                for executor in executors:
                    executor.close()

        return trio

    # --- what it declares ------------------------------------------------------------------------

    def test_kv_cache_spec_matches_the_model_and_the_settings(
        self, create: Make, cases: list[Case]
    ) -> None:
        for case in cases:
            executor = create(case)
            spec, config = executor.kv_cache_spec, case.model.config
            found = (spec.num_layers, spec.num_kv_heads, spec.head_dim, spec.page_size, spec.dtype)
            assert found == (
                config.num_layers,
                config.num_kv_heads,
                config.head_dim,
                case.page_size,
                case.runtime.kv_dtype,
            ), (
                f"{case}: kv_cache_spec must match the model's shape and the runtime settings, "
                f"found {spec}"
            )
            assert spec.row_order in ("NHD", "HND"), (
                f"row_order must be 'NHD' or 'HND', found {spec.row_order!r}"
            )
            limit = spec.memory_limit
            assert limit is None or limit >= 0, (
                f"memory_limit must be None or at least 0, found {limit}"
            )
            assert executor.kv_cache_spec == spec, "kv_cache_spec must not change"
            executor.close()

    def test_it_runs_the_models_that_it_states(
        self,
        info: PluginInfo,
        tried: Tried,
        models: Mapping[str, ModelConfig],
        record_property: Callable[[str, str], None],
    ) -> None:
        ran = {case.name for case in tried.cases}
        summary = f"ran {len(ran)} of {len(models)} models"
        record_property(SUMMARY, summary)
        refused = [name for name in models if name not in ran]
        if refused:
            why = next(why for (name, _), why in tried.refused.items() if name == refused[0])
            record_property(
                FOUND,
                f"{summary}; it refused {', '.join(refused)}, the first of these with: {why}",
            )
        if info.serves is None:
            return
        for (name, dtype), why in tried.refused.items():
            config = evolve(models[name], dtype=dtype if dtype in DTYPES else models[name].dtype)
            assert not info.serves(config), (
                f"PluginInfo.serves states that the executor runs model {name!r}, but in {dtype} "
                f"it refused it: {why}"
            )

    def test_it_runs_the_dtypes_that_it_declares(
        self, create: Make, info: PluginInfo, dtypes: Sequence[str], tried: Tried
    ) -> None:
        for dtype in dtypes:
            why = next((w for (_, refused), w in tried.refused.items() if refused == dtype), "")
            assert any(case.runtime.weight_dtype == dtype for case in tried.cases), (
                f"PluginInfo.weight_dtypes declares {dtype}, but the executor refused all models "
                f"in it, the first with: {why}"
            )
        for dtype in info.kv_dtypes:
            refusals = []
            for case in _one_a_dtype(tried.cases):
                try:
                    create(_with_kv(case, dtype)).close()
                    break
                except ExecutorError as refused:
                    refusals.append(str(refused))
            else:
                pytest.fail(
                    f"PluginInfo.kv_dtypes declares {dtype}, but the executor refused it with "
                    f"weights in {', '.join(dtypes)}, first with: {refusals[0]}",
                    pytrace=False,
                )

    def test_it_uses_the_requested_page_size(self, create: Make, case: Case) -> None:
        for size in filter(None, PAGE_SIZES):
            try:
                executor = create(case, runtime_config=evolve(case.runtime, page_size=size))
            except ExecutorError:
                continue
            found = executor.kv_cache_spec.page_size
            executor.close()
            assert found == size, f"page_size must be the requested {size}, found {found}"

    def test_it_names_its_device_and_chooses_a_page_size(self, create: Make, case: Case) -> None:
        executor = create(case, runtime_config=evolve(case.runtime, page_size=None))
        device, page_size = executor.device, executor.kv_cache_spec.page_size
        executor.close()
        assert isinstance(device, str), f"device must be a string, found {device!r}"
        assert device.strip(), "device must name the device that computes: results show it"
        assert type(page_size) is int, f"page_size must be an int, found {page_size!r}"
        assert page_size >= 1, f"page_size must be at least 1, found {page_size}"

    def test_limits_are_positive_or_none(self, create: Make, case: Case) -> None:
        executor = create(case)
        limits = executor.limits
        for name in ("max_batch_size", "max_batch_tokens", "max_seq_len", "max_logits_rows"):
            limit = getattr(limits, name)
            assert limit is None or (type(limit) is int and limit >= 1), (
                f"limits.{name} must be None or a positive int, found {limit!r}"
            )
        for name in ("mixed", "shares_pages", "tap_exact"):
            assert type(getattr(limits, name)) is bool, (
                f"limits.{name} must be True or False, found {getattr(limits, name)!r}"
            )
        executor.close()

    def test_progress_reports_stay_within_their_total(self, create: Make, case: Case) -> None:
        said: list[tuple[str, int, int]] = []
        create(case, report=lambda what, done, total: said.append((what, done, total))).close()
        for what, done, total in said:
            assert isinstance(what, str), f"report() must be given a description, found {what!r}"
            assert 0 <= done <= total, (
                f"report({what!r}, {done}, {total}) must have 0 <= done <= total"
            )

    # --- results ---------------------------------------------------------------------------------

    def test_prompts_that_end_near_a_page_boundary_are_correct(
        self, trio: Any, cases: list[Case]
    ) -> None:
        for case in cases:
            size = case.page_size
            prompts = case.tokens(size - 1, size, size + 1, 1, 2 * size + 3)
            with trio(case) as three:
                three.run({str(i): p for i, p in enumerate(prompts)})
                for step in range(2):
                    three.run({str(i): [9 + step + i] for i in range(len(prompts))})

    def test_a_single_sequence_is_correct(self, trio: Any, cases: list[Case]) -> None:
        for case in cases:
            (prompt,) = case.tokens(case.page_size + 2)
            with trio(case) as three:
                three.run({"a": prompt})
                for token in range(3, 3 + min(case.page_size, 16)):
                    three.run({"a": [token]})

    def test_a_prompt_in_chunks_is_correct(self, trio: Any, cases: list[Case]) -> None:
        for case in cases:
            size = case.page_size
            (prompt,) = case.tokens(2 * size + 5)
            with trio(case) as three:
                for start, stop in ((0, 3), (3, 4), (4, size + 1), (size + 1, None)):
                    three.run({"a": prompt[start:stop]})
                three.run({"a": [7]})

    def test_chunks_give_the_logits_of_the_whole_prompt(
        self, running: Callable[..., Running], trio: Any, case: Case
    ) -> None:
        (prompt,) = case.tokens(3 * case.page_size + 1)
        one, two = case.page_size - 1, case.page_size + 2
        chunked, sequences = running(case), case.sequences()
        chunks: list[Tokens] = [{"a": prompt[:one]}, {"a": prompt[one:two]}, {"a": prompt[two:]}]
        batches = [batch for _, batch in chunked.steps(sequences, *chunks)]
        ours = torch.cat([chunked.run(batch) for batch in batches])
        rows = torch.cat([batch.positions[batch.logits_rows] for batch in batches])
        with trio(case) as three:
            batch = three.sequences.batch({"a": prompt})
            near, true = (r.run(batch)[rows] for r in (three.near, three.true))
            three.judge("prefill", "logits", ours, near, true)

    def test_dynamic_rope_is_that_of_the_whole_prompt(self, trio: Any, cases: list[Case]) -> None:
        """Prompts longer than max_position_embeddings, in chunks, beside a shorter one: each token
        of a prompt is rotated for ``StepBatch.prompt_lens``, and each later one for the length up
        to itself."""
        dynamic = [case for case in cases if case.model.config.rope.kind == "dynamic"]
        if not dynamic:
            pytest.skip("it runs no model with dynamic RoPE")
        for case in dynamic:
            limit = case.model.config.max_position_embeddings
            long, longer, short = case.tokens(limit + 3, 2 * limit + 1, 3)
            with trio(case) as three:
                three.sequences.prompts |= {"a": len(long), "b": len(longer)}
                three.run({"a": long[:5], "b": longer[: limit + 1]})
                three.run({"a": long[5:], "b": longer[limit + 1 :], "c": short})
                for token in (5, 6):
                    three.run({"b": [token], "c": [token], "a": [token]})

    def test_prompts_chunks_and_decodes_may_share_a_step(
        self, trio: Any, cases: list[Case], running: Callable[..., Running]
    ) -> None:
        if not running(cases[0]).limits.mixed:
            pytest.skip("limits.mixed is False: prompts and decodes run in steps of their own")
        for case in cases:
            size = case.page_size
            a, b, c = case.tokens(size + 2, size, 3)
            with trio(case) as three:
                three.run({"a": a[:-1], "b": b[:2]})
                three.run({"c": c, "a": a[-1:], "b": b[2:]})
                three.run({"b": [5], "c": [6], "a": [7]})
                three.run({"a": [8]})
                three.run({"c": [9], "b": [10]})

    def test_pages_may_be_in_any_order(self, trio: Any, cases: list[Case]) -> None:
        for case in cases:
            prompts = case.tokens(2 * case.page_size + 1, case.page_size + 3)
            with trio(case, shuffled=True) as three:
                three.run({"a": prompts[0], "b": prompts[1]})
                three.run({"b": [5], "a": [6]})
                three.run({"b": prompts[0][:3]})

    def test_freed_pages_may_be_reused_by_another_sequence(
        self, trio: Any, cases: list[Case]
    ) -> None:
        for case in cases:
            size = case.page_size
            stays, goes, comes = case.tokens(size + 1, 2 * size + 3, size + 2)
            with trio(case) as three:
                three.run({"stays": stays, "goes": goes})
                three.sequences.free("goes")
                three.run({"stays": [4]})
                three.run({"comes": comes})
                three.run({"stays": [5], "comes": [6]})

    def test_sequences_may_share_pages(self, trio: Any, cases: list[Case]) -> None:
        """Sequences begin in one step behind pages that another one wrote, and decode with them,
        also when that one has ended. Full pages only, as a ``KvAllocator`` shares them."""
        for case in cases:
            size = case.page_size
            shared, a, b, c, d, e = case.tokens(max(1, 8 // size) * size, 3, 5, 1, 2, size + 2)
            begin = (("b", b), ("c", c), ("e", e))
            with trio(case) as three:
                if not three.candidate.limits.shares_pages:
                    pytest.skip("limits.shares_pages is False: each sequence has pages of its own")
                sequences = three.sequences
                three.run({"a": shared + a})
                sequences.commit("a", shared)
                three.run({name: sequences.begin(name, shared + new) for name, new in begin})
                three.run({"b": [6], "a": [7], "c": [8], "e": [6]})
                sequences.free("a")
                three.run({"d": sequences.begin("d", shared + d)})
                three.run({"b": [9], "c": [10], "d": [11]})

    def test_ended_requests_are_forgotten(self, trio: Any, case: Case) -> None:
        """A request may have the name of one that ended before it."""
        a, b, c = case.tokens(case.page_size + 2, 3, case.page_size + 1)
        with trio(case) as three:
            three.run({"a": a, "b": b})
            three.sequences.free("a")
            three.run({"a": c})
            three.run({"b": [5], "a": [6]})
            three.sequences.free("a")
            three.run({"b": [7]})
            three.run({"a": b})

    def test_drafts_get_the_logits_of_plain_decoding(self, trio: Any, case: Case) -> None:
        """A step that checks guesses, and goes on from some of them."""
        prompts = case.tokens(case.page_size - 1, 5, 2)
        drafts = {"a": [7, 8, 9], "b": [10], "c": [11, 12]}
        with trio(case) as three:
            three.run(dict(zip("abc", prompts, strict=True)))
            for tokens in (drafts, {"a": [13], "b": [14, 15, 16], "c": [17]}):
                single, steps = (
                    deepcopy(three.sequences),
                    list(three.candidate.steps(three.sequences, tokens, drafting=True)),
                )
                checked = [three.candidate.run(batch) for _, batch in steps]
                near, true = (
                    _one_by_one(running, deepcopy(single), [batch for _, batch in steps])
                    for running in (three.near, three.true)
                )
                for batch_logits in zip(steps, checked, near, true, strict=True):
                    (_, batch), *logits = batch_logits
                    three.judge_cache("decode", batch)
                    three.judge("decode", "logits", *logits)
                # One guess of each was right, if it had any.
                for name, new in tokens.items():
                    length = three.sequences.lengths[name] - max(len(new) - 2, 0)
                    three.sequences.truncate(name, length)
            three.run({"c": [5], "a": [6]})

    def test_a_step_may_name_tokens_that_the_step_before_samples(
        self, running: Callable[..., Running], case: Case
    ) -> None:
        """For an executor that samples: two steps in flight, one row of the first left to the
        engine."""
        one, plain = running(case), running(case)
        greedy = SamplingParams()
        if not isinstance(one.executor, SamplingExecutor) or not one.executor.serves(greedy):
            pytest.skip("the executor is not a SamplingExecutor that serves temperature 0")
        a, b, c = case.tokens(3, 2, 4)
        prompts = {"a": a, "b": b, "c": c}
        sequences = case.sequences()
        batches = [batch for _, batch in one.steps(sequences, prompts)]
        if len(batches) > 1:
            pytest.skip("the executor's limits do not allow three prompts in a step")
        first = evolve(batches[0], logits_rows=batches[0].query_starts[1:].long() - 1)
        second = sequences.batch({"c": [0], "a": [0]})
        second.token_source.copy_(torch.tensor([2, 0]))

        rows = [
            SamplerRow(
                request_id=name,
                params=greedy,
                prompt_token_ids=prompts[name],
                output_token_ids=(),
                position=position,
            )
            for position, name in ((0, "a"), (0, "c"), (1, "c"), (1, "a"))
        ]
        pending = [
            one.executor.submit(copied(first), [rows[0], None, rows[1]]),
            one.executor.submit(copied(second), rows[2:]),
        ]
        outputs = [step.wait() for step in pending]
        found = [[t and t.token_id for t in output.tokens] for output in outputs]

        logits = plain.run(first)
        after = logits.argmax(1)[[2, 0]]
        unnamed = torch.full_like(second.token_source, -1)
        last = plain.run(evolve(second, token_ids=after, token_source=unnamed)).argmax(1)
        expected = [[int(after[1]), None, int(after[0])], last.tolist()]
        assert found == expected, (
            f"submit() must sample the tokens {expected} of two steps, where None is a row that it "
            f"was told not to sample, found {found}"
        )
        given = outputs[0].logits
        assert given is not None, "wait() must return the logits of rows that it does not sample"
        assert same_bits(given.cpu(), logits[1:2]), (
            "wait() must return the logits of the rows that it does not sample, and of no others"
        )

    def test_prompts_of_one_token_are_correct(self, trio: Any, case: Case) -> None:
        with trio(case) as three:
            three.run({"a": [5], "b": [6]})
            three.run({"a": [7], "b": [8], "c": [9]})

    def test_batches_of_many_sequences_are_correct(self, trio: Any, cases: list[Case]) -> None:
        """Prompts of different lengths, and decodes: more than engines and kernels take at once."""
        for case in _one_a_dtype(cases):
            with trio(case, shuffled=True) as three:
                names = [str(i) for i in range(MAX_BATCH_SIZE)]
                prompts = case.tokens(*(1 + 3 * i % 5 for i in range(len(names))))
                three.run(dict(zip(names, prompts, strict=True)))
                three.run({name: [3 + i] for i, name in enumerate(names)})
                three.run({name: [30 + i] for i, name in enumerate(reversed(names))})

    def test_batches_may_be_as_large_as_its_limits(self, trio: Any, case: Case) -> None:
        with trio(case) as three:
            limits = three.candidate.limits
            assert limits.max_batch_tokens
            assert limits.max_batch_size
            assert limits.max_seq_len
            (prompt,) = case.tokens(min(limits.max_batch_tokens, limits.max_seq_len - 1))
            ((_, batch),) = three.candidate.steps(three.sequences, {"0": prompt})
            three.step("prefill", batch)
            three.run({str(i): case.tokens(1 + i % 7)[0] for i in range(1, limits.max_batch_size)})
            tokens = {
                str(i): [3 + i] for i in range(min(limits.max_batch_size, limits.max_batch_tokens))
            }
            ((_, batch),) = three.candidate.steps(three.sequences, tokens)
            three.step("decode", batch)

    def test_a_sequence_may_be_as_long_as_its_limit(self, trio: Any, case: Case) -> None:
        with trio(case) as three:
            longest = three.candidate.limits.max_seq_len
            (tokens,) = case.tokens(longest)
            chunk = min(case.runtime.max_batch_tokens, 48)
            for start in range(0, longest - 1, chunk):
                three.run({"a": tokens[start : min(start + chunk, longest - 1)]})
            three.run({"a": tokens[-1:]})

    def test_layers_run_alone_are_correct(self, trio: Any, cases: list[Case]) -> None:
        """Layers that run alone show errors that a run of all layers would hide."""
        for case in cases:
            with trio(case) as three:
                _layerwise(three.candidate)
                three.mode = "isolated"
                prompts = case.tokens(case.page_size + 9, 3)
                tokens = {"a": prompts[0], "b": prompts[1]}
                _, batch = next(three.candidate.steps(three.sequences, tokens))
                executors = [r.executor for r in (three.candidate, three.near, three.true)]
                begun = [executor.begin(batch) for executor in executors]
                hidden = executors[1].embed(begun[1])
                for layer in executors[0].layers:
                    seen: list[Seen] = [{}, {}, {}]
                    inputs = (hidden.to(case.dtype), hidden, hidden.float())
                    outputs = [
                        executor.run_layer(step, layer, x, recorder(taps)).cpu()
                        for executor, step, x, taps in zip(
                            executors, begun, inputs, seen, strict=True
                        )
                    ]
                    for name in (n for n in seen[2] if n in seen[0]):
                        three.judge("prefill", name, *(s[name] for s in seen))
                    three.judge("prefill", f"layers.{layer}.output", *outputs)
                    hidden = outputs[1]
                three.judge_cache("prefill", batch)

    def test_logits_are_float32_and_of_the_requested_rows(
        self, trio: Any, cases: list[Case]
    ) -> None:
        for case in _one_a_dtype(cases):
            a, b = case.tokens(5, 4)
            with trio(case) as three:
                steps = three.candidate.steps(
                    three.sequences, {"a": a, "b": b}, {"a": b, "b": a}, {"a": [5], "b": [6]}
                )
                for phase, batch in steps:
                    count = len(batch.token_ids)
                    for asked in ([count - 1], [0], range(0, count, 2), range(count), []):
                        rows = three.candidate.wanted(batch, torch.tensor(list(asked)).long())
                        logits = three.step(phase, evolve(batch, logits_rows=rows))
                        found = (tuple(logits.shape), logits.dtype)
                        vocab = case.model.config.vocab_size
                        expected = ((len(rows), vocab), torch.float32)
                        assert found == expected, (
                            f"{phase}: logits of rows {rows.tolist()} must be {expected}, found "
                            f"{found}"
                        )
                        assert not logits.requires_grad, "logits must not require gradients"

    def test_the_kv_cache_may_have_another_dtype(
        self, trio: Any, create: Make, info: PluginInfo, case: Case
    ) -> None:
        tried = 0
        for dtype in (dtype for dtype in info.kv_dtypes if dtype in DTYPES):
            mixed = _with_kv(case, dtype)
            try:
                create(mixed).close()
            except ExecutorError:
                continue
            tried += dtype != case.runtime.kv_dtype
            a, b = case.tokens(case.page_size + 1, 3)
            with trio(mixed) as three:
                for tokens in ({"a": a, "b": b}, {"a": [5], "b": [6]}):
                    three.run(tokens)
        if not tried:
            pytest.skip(
                "the executor supports a KV cache only in the dtype of the weights, or in one that "
                "torch does not compute in"
            )

    # --- packed weights --------------------------------------------------------------------------

    def test_packed_weights_match_their_declaration(
        self, implementation: Implementation, cases: list[Case]
    ) -> None:
        for case in _with_layout(implementation, cases):
            source = ReadTo(case.model.tensors)
            first, again = (_packing(implementation, case, weights=source) for _ in range(2))
            assert type(first.version) is int, (
                f"PackedWeights.version must be an int, found {first.version!r}"
            )
            assert first.version >= 1, (
                f"PackedWeights.version must be at least 1, found {first.version}"
            )
            announced = [[(t.name, t.shape, t.dtype) for t in p.tensors] for p in (first, again)]
            assert announced[0] == announced[1], (
                "pack_weights must declare the same tensors each time"
            )
            names = [name for name, _, _ in announced[0]]
            assert len(set(names)) == len(names), f"a packed weight is declared twice: {names}"
            assert not source.read, (
                "pack_weights must not read weights before a tensor's read() is called"
            )
            for tensor in _packing(implementation, case).tensors:
                made = tensor.read()
                found = (tuple(made.shape), dtype_name(made), made.device.type)
                expected = (tuple(tensor.shape), tensor.dtype, "cpu")
                assert found == expected, (
                    f"packed weight {tensor.name} must be {expected}, as declared, found {found}"
                )

    def test_packed_weights_give_identical_logits(
        self, implementation: Implementation, running: Callable[..., Running], cases: list[Case]
    ) -> None:
        for case in _with_layout(implementation, cases):
            tensors = {t.name: t.read() for t in _packing(implementation, case).tensors}
            source = ReadTo(tensors)
            steps: list[Tokens] = [{"a": case.tokens(case.page_size + 2)[0]}, {"a": [3]}]
            found = []
            for changed in ({}, {"weights": source, "packed": True}):
                one = running(case, **changed)
                found.append(_logits(one, case.sequences(), *steps))
            assert all(map(same_bits, *found)), (
                "packed weights must give the same logits, bit for bit, as the original weights"
            )
            assert list(dict.fromkeys(source.read)) == list(tensors), (
                "packed weights must be read in the order in which they are declared"
            )

    # --- side effects ----------------------------------------------------------------------------

    def test_a_step_writes_only_to_its_own_slots(
        self, running: Callable[..., Running], cases: list[Case]
    ) -> None:
        for case in _one_a_dtype(cases):
            one, sequences = running(case), case.sequences(shuffled=True)
            one.fill(NAN)
            size = case.page_size
            a, b = case.tokens(size + 2, 3)
            steps: list[Tokens] = [
                {"a": a, "b": b},
                {"a": [5], "b": [6]},
                {"b": a},
                {"a": b, "c": [3]},
            ]
            for phase, batch in one.steps(sequences, *steps):
                before = one.snapshot()
                one.run(batch)
                own = torch.zeros(case.total_pages * size, dtype=torch.bool)
                own[batch.slot_mapping.long()] = True
                for i, (old, new) in enumerate(zip(before, one.snapshot(), strict=True)):
                    what = f"{'value' if i % 2 else 'key'} of layer {i // 2}"
                    changed = _bits_differ(old, new).flatten(0, 1).flatten(1).any(1)
                    foreign = (changed & ~own).nonzero().flatten().tolist()
                    assert not foreign, (
                        f"{phase} must write only to the slots of its step, but wrote a {what} to "
                        f"slots {foreign[:9]}"
                    )
                    filled = new.flatten(0, 1)[own].isfinite().all()
                    assert filled, (
                        f"{phase} must write to all slots of its step, but did not write a {what}"
                    )

    def test_the_content_of_other_slots_does_not_matter(
        self, running: Callable[..., Running], cases: list[Case]
    ) -> None:
        for case in _one_a_dtype(cases):
            a, b = case.tokens(2 * case.page_size + 1, 3)
            found = []
            for value in (0.0, 1e4, NAN):
                one, sequences = running(case), case.sequences()
                one.fill(value)
                found.append(
                    _logits(one, sequences, {"a": a, "b": b}, {"b": [5], "a": [6]}, {"b": a})
                )
            for what, logits in zip(("10000", "NaN"), found[1:], strict=True):
                assert all(map(torch.equal, found[0], logits)), (
                    f"{case}: the logits change when slots of other sequences hold {what} instead "
                    "of 0: a step must read only keys and values of its own sequences"
                )

    def test_the_batch_is_not_changed(self, running: Callable[..., Running], case: Case) -> None:
        one, sequences = running(case), case.sequences()
        a, b = case.tokens(case.page_size + 1, 3)
        for phase, batch in one.steps(sequences, {"a": a, "b": b}, {"a": [5], "b": [6]}):
            kept = copied(batch)
            one.executor.forward(batch)
            for name, tensor in tensors(kept).items():
                assert same_bits(tensor, getattr(batch, name)), (
                    f"{phase} must not change its batch, but changed batch.{name}"
                )

    def test_weights_are_not_changed(self, create: Make, case: Case) -> None:
        kept = {name: tensor.clone() for name, tensor in case.model.tensors.items()}
        one, sequences = (
            Running(create(case), case),
            case.sequences(),
        )
        _logits(one, sequences, {"a": case.tokens(5)[0]}, {"a": [3]})
        one.executor.close()
        changed = [n for n, t in case.model.tensors.items() if not same_bits(t, kept[n])]
        assert not changed, (
            f"an executor must not write to the source's weights, but changed {changed}"
        )

    def test_weights_may_be_closed_once_the_executor_is_created(
        self, running: Callable[..., Running], case: Case
    ) -> None:
        source = case.model.source()
        one, sequences = running(case, weights=source), case.sequences()
        source.close()
        logits = _logits(one, sequences, {"a": case.tokens(5)[0]}, {"a": [3]})
        assert all(t.isfinite().all() for t in logits), (
            "logits must stay finite after the weights' source is closed"
        )

    def test_the_process_is_left_unchanged(self, tried: Tried, create: Make, case: Case) -> None:
        changed = "; ".join(tried.changed)
        assert not changed, (
            f"creating and closing an executor must not change the process's state, but changed "
            f"{changed}"
        )
        sequences = case.sequences()
        with left_alone("an executor"):
            executor = create(case)
        one = Running(executor, case)
        with left_alone("a step"):
            _logits(one, sequences, {"a": case.tokens(5)[0]}, {"a": [3]})
        with left_alone("close()"):
            executor.close()

    # --- taps ------------------------------------------------------------------------------------

    def test_taps_hold_the_tensors_that_they_name(self, trio: Any, cases: list[Case]) -> None:
        for case in cases:
            a, b = case.tokens(9, 4)
            with trio(case) as three:
                steps = [{"a": a, "b": b}, {"a": [3], "b": [4]}]
                for phase, batch in three.candidate.steps(three.sequences, *steps):
                    three.step(phase, batch, taps=True)

    def test_taps_match_the_documentation(self, trio: Any, cases: list[Case]) -> None:
        for case in cases:
            a, b = case.tokens(5, 4)
            with trio(case) as three:
                steps = [{"a": a, "b": b}, {"a": [3], "b": [4]}]
                for phase, whole in three.candidate.steps(three.sequences, *steps):
                    batch = evolve(whole, logits_rows=whole.logits_rows[-1:])
                    ours, theirs = (_tapped(r, batch) for r in (three.candidate, three.near))
                    names = [name for name, _ in ours]
                    assert len(set(names)) == len(names), (
                        f"{phase}: the tap was called twice for a name: {names}"
                    )
                    known = dict(theirs)
                    unknown = [n for n in names if n not in known]
                    assert not unknown, (
                        f"{phase}: tap names must be those of docs/tensors.md, found {unknown}"
                    )
                    for name, (shape, dtype) in ours:
                        assert (shape, dtype) == known[name], (
                            f"{phase}: tap {name!r} must be {known[name]}, as docs/tensors.md "
                            f"says, found {(shape, dtype)}"
                        )
                    order = [n for n in known if n in names]
                    assert names == order, (
                        f"{phase}: taps must come in the order of docs/tensors.md"
                    )

    def test_a_tap_does_not_change_the_results(
        self, running: Callable[..., Running], trio: Any, cases: list[Case]
    ) -> None:
        """Bit for bit, or within rounding for an executor whose limits.tap_exact is False."""
        for case in _one_a_dtype(cases):
            plain, tapped = running(case), running(case)
            a, b = case.tokens(case.page_size + 1, 3)
            steps: list[Tokens] = [{"a": a, "b": b}, {"a": [5], "b": [6]}]
            if not plain.limits.tap_exact:
                for taps in (False, True):
                    with trio(case) as three:
                        for phase, batch in three.candidate.steps(three.sequences, *steps):
                            three.step(phase, batch, taps)
                continue
            seen: Seen = {}
            logits = []
            for one, tap in ((plain, None), (tapped, recorder(seen))):
                sequences = case.sequences()
                logits.append(_logits(one, sequences, *steps, tap=tap))
            assert all(map(same_bits, *logits)), (
                "a tap must not change the logits: if another path computes steps without a tap, "
                "set limits.tap_exact to False"
            )
            assert all(map(same_bits, plain.snapshot(), tapped.snapshot())), (
                "a tap must not change the keys and values that are written"
            )
            if "logits" in seen:
                assert same_bits(seen["logits"], logits[1][-1]), (
                    "tap 'logits' must hold the logits that the step returns"
                )

    def test_a_tap_is_called_only_in_its_own_step(
        self, running: Callable[..., Running], case: Case
    ) -> None:
        one, sequences = running(case), case.sequences()
        seen: Seen = {}
        _logits(one, sequences, {"a": case.tokens(5)[0]}, {"a": [3]}, tap=recorder(seen))
        seen.clear()
        _logits(one, sequences, {"a": [4]}, {"a": case.tokens(4)[0]})
        assert not seen, (
            f"a step without a tap must not call the tap of an earlier step, but called it for "
            f"{sorted(seen)}"
        )

    # --- repetition, and several executors -------------------------------------------------------

    def test_a_repeated_step_gives_identical_results(
        self, running: Callable[..., Running], cases: list[Case]
    ) -> None:
        for case in _one_a_dtype(cases):
            one, sequences = running(case), case.sequences(shuffled=True)
            a, b = case.tokens(case.page_size + 2, 3)
            steps: list[Tokens] = [{"a": a, "b": b}, {"a": [5], "b": [6]}, {"b": a}]
            for phase, batch in one.steps(sequences, *steps):
                first, cache = one.run(batch).clone(), one.snapshot()
                again = one.run(batch)
                assert same_bits(first, again), (
                    f"{phase}: a repeated step must give identical logits"
                )
                assert all(map(same_bits, cache, one.snapshot())), (
                    f"{phase}: a repeated step must write identical keys and values"
                )

    def test_no_state_is_kept_between_steps(
        self, running: Callable[..., Running], case: Case
    ) -> None:
        one, sequences = running(case), case.sequences()
        a, b, c = case.tokens(case.page_size + 2, 3, 2 * case.page_size)
        _, first = next(one.steps(sequences, {"a": a}))
        expected = one.run(first).clone()
        _logits(one, sequences, {"b": b, "c": c}, {"c": [3], "b": [4]})
        assert same_bits(one.run(first), expected), (
            "a step must give the same logits when it is repeated after other steps"
        )

    def test_two_executors_are_independent(
        self, running: Callable[..., Running], trio: Any, case: Case
    ) -> None:
        steps: list[Tokens] = [{"a": case.tokens(case.page_size + 2)[0]}, {"a": [3]}, {"a": [4, 5]}]
        other = evolve(case, model=make_model(case.model.config, seed=1))
        alone = [_logits(running(one), case.sequences(), *steps) for one in (case, other)]
        with trio(case) as mine, trio(other) as theirs:
            found: list[list[Tensor]] = [[], []]
            for tokens in steps:
                for logits, three in zip(found, (mine, theirs), strict=True):
                    made = three.candidate.steps(three.sequences, tokens)
                    logits += [three.step(phase, batch).clone() for phase, batch in made]
            for before, after in zip(alone, found, strict=True):
                assert all(map(same_bits, before, after)), (
                    "another executor in the same process must not change the logits"
                )
            theirs.candidate.executor.close()
            mine.run({"a": [6]})

    def test_steps_may_run_in_another_thread_than_the_one_that_created_it(
        self, create: Make, case: Case
    ) -> None:
        def run(one: Running) -> list[Tensor]:
            found = _logits(one, case.sequences(), {"a": prompt}, {"a": [3]})
            one.executor.close()
            return found

        prompt = case.tokens(case.page_size + 2)[0]
        expected = run(Running(create(case), case))
        one = Running(create(case), case)
        try:
            with ThreadPoolExecutor(1) as pool:
                found = pool.submit(run, one).result()
        except Exception as error:
            one.executor.close()
            pytest.fail(
                "a thread other than the one that created the executor must be able to run its "
                f"steps and close it, found {type(error).__name__}: {error}",
                pytrace=False,
            )
        assert all(map(same_bits, expected, found)), (
            "steps in another thread than the one that created the executor must give the same "
            "logits"
        )

    def test_it_may_be_closed_twice_and_created_again(
        self, running: Callable[..., Running], case: Case
    ) -> None:
        steps: list[Tokens] = [{"a": case.tokens(case.page_size + 2)[0]}, {"a": [3]}]
        found = []
        for _ in range(2):
            one = running(case)
            found.append(_logits(one, case.sequences(), *steps))
            one.executor.close()
            one.executor.close()
        assert all(map(same_bits, *found)), (
            "an executor that is created again must give identical logits"
        )

    def test_a_closed_executor_raises_executor_error(
        self, running: Callable[..., Running], case: Case
    ) -> None:
        one, sequences = running(case), case.sequences()
        _logits(one, sequences, {"a": case.tokens(5)[0]})
        one.executor.close()
        for tokens in ([3], [4, 5]):
            batch = sequences.batch({"a": tokens})
            try:
                one.run(batch)
            except ExecutorError as refused:
                _check_message(refused)
            else:
                pytest.fail("forward of a closed executor must raise ExecutorError", pytrace=False)

    # --- invalid requests ------------------------------------------------------------------------

    def test_an_unknown_device_is_refused(
        self, create: Make, case: Case, unsupported_device: str | None
    ) -> None:
        if unsupported_device is None:
            pytest.skip("the executor accepts any device name")
        runtime = evolve(case.runtime, device=unsupported_device)
        _check_refused(create, case, f"device {unsupported_device!r}", runtime_config=runtime)

    def test_an_invalid_model_shape_is_refused(self, create: Make, case: Case) -> None:
        for changed in ({"num_heads": 4, "num_kv_heads": 3}, {"head_dim": 7}):
            model = make_model(case.model.config, **changed)
            odd = evolve(case, model=model)
            _check_refused(create, odd, f"a model with {changed}", model_config=model.config)

    def test_unsupported_models_are_refused_before_weights_are_read(
        self,
        create: Make,
        cases: list[Case],
        info: PluginInfo,
        models: Mapping[str, ModelConfig],
        dtypes: Sequence[str],
    ) -> None:
        runs = {(c.name, c.runtime.weight_dtype) for c in cases}
        for dtype in dtypes:
            for name, config in models.items():
                if (name, dtype) in runs:
                    continue
                case = _case(name, config, dtype, info.kv_dtypes, cases[0].page_size)
                source = ReadTo(case.model.tensors)
                try:
                    create(case, weights=source).close()
                except ExecutorError as refused:
                    _check_message(refused)
                    assert not source.read, (
                        f"{case} must be refused before weights are read, but {len(source.read)} "
                        "were read"
                    )

    # --- layer by layer --------------------------------------------------------------------------

    def test_embedding_layers_and_head_give_the_logits_of_a_step(
        self, running: Callable[..., Running], cases: list[Case]
    ) -> None:
        for case in _one_a_dtype(cases):
            whole, parts = running(case), running(case)
            _layerwise(parts)
            sequences = case.sequences()
            a, b = case.tokens(case.page_size + 2, 3)
            steps: list[Tokens] = [{"a": a, "b": b}, {"a": [5], "b": [6]}]
            for phase, all_rows in whole.steps(sequences, *steps):
                batch = evolve(all_rows, logits_rows=all_rows.logits_rows[1::3])
                # Without a tap, the whole step may take another path, which rounds otherwise.
                tap = None if whole.limits.tap_exact else recorder({})
                logits = whole.run(batch, tap)
                executor = parts.executor
                step = executor.begin(batch)
                hidden = executor.embed(step, tap)
                for layer in executor.layers:
                    kept = hidden.clone()
                    out = executor.run_layer(step, layer, hidden, tap)
                    assert same_bits(hidden, kept), "run_layer must not change its input"
                    hidden = out
                expected = (len(batch.token_ids), case.model.config.hidden_size)
                assert tuple(hidden.shape) == expected, (
                    f"{phase}: hidden states must have the shape {list(expected)}, found "
                    f"{list(hidden.shape)}"
                )
                wanted = hidden[batch.logits_rows]
                assert same_bits(executor.run_head(step, wanted, tap).cpu(), logits), (
                    f"{phase}: embed, run_layer of each layer and run_head must give the logits of "
                    "the whole step"
                )
                assert all(map(same_bits, whole.snapshot(), parts.snapshot())), (
                    f"{phase}: run_layer must write the keys and values of the whole step"
                )

    def test_parts_of_the_layers_give_the_results_of_the_whole(
        self, running: Callable[..., Running], cases: list[Case]
    ) -> None:
        for case in (case for case in cases if case.model.config.num_layers > 1):
            whole, config = running(case), case.model.config
            _layerwise(whole)
            parts = []
            for layers in _split(config.num_layers):
                source = ReadTo(case.model.tensors)
                parts.append(running(case, layers=layers, weights=source))
                _check_part(case, parts[-1], source)
            sequences = case.sequences()
            a, b = case.tokens(case.page_size + 2, 3)
            for phase, batch in whole.steps(sequences, {"a": a, "b": b}, {"a": [5], "b": [6]}):
                begun = [one.executor.begin(copied(batch)) for one in (whole, *parts)]
                expected = whole.executor.embed(begun[0])
                found = parts[0].executor.embed(begun[1])
                for part, step in zip(parts, begun[1:], strict=True):
                    for layer in part.layers:
                        expected = whole.executor.run_layer(begun[0], layer, expected)
                        found = part.executor.run_layer(step, layer, found)
                        assert same_bits(found.cpu(), expected.cpu()), (
                            f"{case}, {phase}: layer {layer} of a part with the layers "
                            f"{list(part.layers)} must give the hidden states of the whole model"
                        )
                        assert all(map(same_bits, part.cached(layer), whole.cached(layer))), (
                            f"{case}, {phase}: layer {layer} of a part with the layers "
                            f"{list(part.layers)} must write the keys and values of the whole model"
                        )
                rows = batch.logits_rows
                logits = parts[-1].executor.run_head(begun[-1], found[rows]).cpu()
                assert same_bits(logits, whole.executor.run_head(begun[0], expected[rows]).cpu()), (
                    f"{case}, {phase}: the head of a part must give the logits of the whole model"
                )
            for part in parts:
                _check_refuses_other_parts(part, copied(batch))

    def test_a_layers_cache_can_be_read_and_replaced(
        self, running: Callable[..., Running], case: Case
    ) -> None:
        one, sequences = running(case), case.sequences()
        one.fill(0.0)
        last, some = one.layers[-1], [3, 0, 2]
        now = one.executor.read_kv(last, some)
        random = torch.Generator().manual_seed(0)
        new = KvLayer(
            *(torch.randn(t.shape, generator=random).to(t.dtype) for t in (now.key, now.value))
        )
        one.executor.write_kv(last, some, new)
        found = one.executor.read_kv(last, some)
        assert same_bits(found.key, new.key), "read_kv must return the keys that write_kv wrote"
        assert same_bits(found.value, new.value), (
            "read_kv must return the values that write_kv wrote"
        )
        for place, page in enumerate(some):
            alone = one.executor.read_kv(last, [page])
            assert same_bits(alone.key[0], new.key[place]), (
                "read_kv and write_kv must take the pages in the order given"
            )
        for pages in (some, range(4)):
            one.executor.read_kv(last, pages).key.fill_(7.0)
            assert same_bits(one.executor.read_kv(last, some).key, new.key), (
                "read_kv must return copies, not the cache itself"
            )
        assert not one.executor.read_kv(last, [1]).key.any(), (
            "write_kv must write to the given pages only"
        )
        if last:
            assert not one.executor.read_kv(0, some).key.any(), (
                "write_kv must write to its layer only"
            )
        # read_kv must show the keys that a step writes.
        before = next(one.cached(last)).clone()
        batch = sequences.batch({"a": case.tokens(3)[0]})
        one.run(batch)
        shown = next(one.cached(last)).flatten(0, 1)
        changed = _bits_differ(before.flatten(0, 1), shown).flatten(1).any(1)
        assert changed.nonzero().flatten().tolist() == sorted(batch.slot_mapping.tolist()), (
            "read_kv must show a step's keys in the step's slots, and nothing else changed"
        )

    def test_weights_match_the_checkpoint(
        self, running: Callable[..., Running], cases: list[Case]
    ) -> None:
        for case in cases:
            one = running(case)
            _layerwise(one)
            for name, stored in case.model.tensors.items():
                found = one.executor.weight(name).cpu()
                assert tuple(found.shape) == tuple(stored.shape), (
                    f"{case}: weight({name!r}) must have the shape {list(stored.shape)}, found "
                    f"{list(found.shape)}"
                )
                if case.quantised:
                    error = worst_row_error(found, stored)
                    assert error <= QUANTISED_ERROR, (
                        f"{case}: each row of weight({name!r}) must be within {QUANTISED_ERROR:g} "
                        f"of its norm from the checkpoint's, found {error:.2g}: check how it is "
                        "quantised and packed"
                    )
                    continue
                assert torch.equal(found.to(case.dtype), stored.to(case.dtype)), (
                    f"{case}: weight({name!r}) must equal the checkpoint's weight: check how it is "
                    "packed"
                )
            absent = ["no.such.weight", "model.layers.99.self_attn.q_proj.weight"]
            absent += ["lm_head.weight"] if case.model.config.tie_word_embeddings else []
            for name in absent:
                try:
                    one.executor.weight(name)
                except KeyError:
                    continue
                pytest.fail(
                    f"weight({name!r}) must raise KeyError: the model does not have this weight"
                )


# --- shared functions -----------------------------------------------------------------------------


def _accepted(
    create: Make,
    models: Mapping[str, ModelConfig],
    dtypes: Sequence[str],
    kv_dtypes: Sequence[str],
) -> tuple[list[Case], dict[tuple[str, str], str]]:
    """Cases that the executor runs, and why it refuses others, by model and weight dtype."""
    cases: list[Case] = []
    refused: dict[tuple[str, str], str] = {}
    for dtype in dtypes:
        most = 2 if cases else len(models)
        accepted = 0
        for name, config in models.items():
            if accepted == most:
                break
            # The last of the sizes is the executor's choice: what is refused then is the model.
            for size in [cases[0].page_size] if cases else PAGE_SIZES:
                case = _case(name, config, dtype, kv_dtypes, size)
                try:
                    executor = create(case)
                except ExecutorError as error:
                    refused[name, dtype] = str(error)
                    continue
                page_size = executor.kv_cache_spec.page_size
                executor.close()
                refused.pop((name, dtype), None)
                cases.append(_case(name, config, dtype, kv_dtypes, page_size))
                accepted += 1
                break
    return cases, refused


def _case(
    name: str, config: ModelConfig, dtype: str, kv_dtypes: Sequence[str], page_size: int | None
) -> Case:
    """kv_dtypes: those that the executor declares; the weights' is taken if it is one of them, else
    the first that torch computes in."""
    computed = [kv_dtype for kv_dtype in kv_dtypes if kv_dtype in DTYPES]
    if not computed:
        pytest.fail(
            f"PluginInfo.kv_dtypes declares {', '.join(kv_dtypes)}, but the suite can judge only a "
            f"KV cache in one of {', '.join(DTYPES)}",
            pytrace=False,
        )
    kv_dtype = dtype if dtype in computed else computed[0]
    runtime = RuntimeConfig(
        weight_dtype=dtype,
        kv_dtype=kv_dtype,
        page_size=page_size,
        max_seq_len=MAX_SEQ_LEN,
        max_batch_size=MAX_BATCH_SIZE,
        max_batch_tokens=max(6 * (page_size or 16) + 8, 3 * MAX_BATCH_SIZE + 4),
    )
    model = make_model(config, dtype=dtype if dtype in DTYPES else kv_dtype)
    return Case(name=name, model=model, runtime=runtime)


def _with_kv(case: Case, dtype: str) -> Case:
    return evolve(case, runtime=evolve(case.runtime, kv_dtype=dtype))


@cache
def _torch_hooks() -> Any:
    """The hooks of the executor ``torch``: made once, which takes longer than a call."""
    manager = plugins.new_manager()
    manager.register(plugins.load(plugins.find("executor", "torch")))
    return manager.hook


def _references(case: Case, candidate: Any) -> list[Any]:
    """The executor ``torch`` in the case's dtype, and in float32.

    They have the checkpoint's weights, or those of a candidate that quantises its own.
    """
    weights: TensorSource = case.model.source()
    if case.quantised:
        if not hasattr(candidate, "weight"):
            pytest.fail(
                f"{case}: an executor that quantises weights is judged with its own: it must be a "
                "LayerwiseExecutor, whose weight(name) shows them",
                pytrace=False,
            )
        weights = MemorySource({n: candidate.weight(n).float().cpu() for n in weights.names()})
    runtime = evolve(case.runtime, weight_dtype=case.model.config.dtype)
    wide = evolve(case.runtime, weight_dtype="float32", kv_dtype="float32")
    return [
        _torch_hooks().create_executor(
            **case.arguments(None, runtime_config=runtime, weights=weights)
        )
        for runtime in (runtime, wide)
    ]


def _one_a_dtype(cases: Sequence[Case]) -> list[Case]:
    return list({case.runtime.weight_dtype: case for case in reversed(cases)}.values())


def _packing(implementation: Implementation, case: Case, **changed: Any) -> PackedWeights:
    arguments = case.arguments(implementation.options, **changed)
    packed: PackedWeights = implementation.call("pack_weights", **arguments)
    return packed


def _with_layout(implementation: Implementation, cases: Sequence[Case]) -> list[Case]:
    """A case of each weight dtype for which the executor has a layout of its own."""
    if not implementation.implements("pack_weights"):
        pytest.skip("the plugin does not implement pack_weights")
    packed = [case for case in _one_a_dtype(cases) if _packing(implementation, case) is not None]
    if not packed:
        pytest.skip("pack_weights returns None for all weight dtypes")
    return packed


def _logits(
    one: Running, sequences: Sequences, *steps: Tokens, tap: "Tap | None" = None
) -> list[Tensor]:
    """Copies of the logits of some steps, within the executor's limits."""
    return [one.run(batch, tap).clone() for phase, batch in one.steps(sequences, *steps)]


def _one_by_one(
    running: Running, sequences: Sequences, batches: Sequence[StepBatch]
) -> list[Tensor]:
    """The logits of each step's tokens when each runs in a step of its own."""
    logits = []
    for batch in batches:
        starts = batch.query_starts.tolist()
        parts = []
        for i, name in enumerate(batch.request_ids):
            for token in batch.token_ids[starts[i] : starts[i + 1]].tolist():
                parts.append(running.run(sequences.batch({name: [token]})))
        logits.append(torch.cat(parts))
    return logits


def _split(num_layers: int) -> list[range]:
    """The first layer, those in the middle, if any, and the last one."""
    last = num_layers - 1
    return [range(1), *([range(1, last)] if last > 1 else []), range(last, num_layers)]


def _check_part(case: Case, part: Running, source: ReadTo) -> None:
    """Fail unless an executor of some layers is what was asked for."""
    spec, layers = part.executor.kv_cache_spec, part.layers
    what = f"{case}: an executor with the layers {list(layers)}"
    assert part.executor.layers == layers, (
        f"{what} must have layers = {layers}, found {part.executor.layers}"
    )
    assert spec.num_layers == len(layers), (
        f"{what} must have a kv_cache_spec with num_layers = {len(layers)}, found {spec.num_layers}"
    )
    needed = expected_tensors(case.model.config, layers)
    foreign = [name for name in source.read if name not in needed]
    assert not foreign, f"{what} must read only their weights, but read {', '.join(foreign)}"
    for name in case.model.tensors:
        if name in needed:
            part.executor.weight(name)
            continue
        try:
            part.executor.weight(name)
        except KeyError:
            continue
        pytest.fail(f"{what} must raise KeyError for weight({name!r})", pytrace=False)


def _check_refuses_other_parts(part: Running, batch: StepBatch) -> None:
    """Fail unless an executor of some layers raises ExecutorError for what it has not."""
    executor, config = part.executor, part.case.model.config
    hidden = torch.zeros(len(batch.token_ids), config.hidden_size, dtype=part.case.dtype)
    calls: dict[str, Callable[[], object]] = {"forward": lambda: executor.forward(batch)}
    if 0 not in part.layers:
        calls["embed"] = lambda: executor.embed(executor.begin(batch))
    if config.num_layers - 1 not in part.layers:
        calls["run_head"] = lambda: executor.run_head(executor.begin(batch), hidden)
    for name, call in calls.items():
        try:
            call()
        except ExecutorError as refused:
            _check_message(refused)
        else:
            pytest.fail(
                f"{part.case}: {name} of an executor with the layers {list(part.layers)} must "
                "raise ExecutorError",
                pytrace=False,
            )


def _tapped(
    running: Running, batch: StepBatch
) -> list[tuple[str, tuple[tuple[int, ...], torch.dtype]]]:
    """Name, shape and dtype of each call of a tap."""
    seen: list[tuple[str, tuple[tuple[int, ...], torch.dtype]]] = []
    running.run(batch, lambda name, t: seen.append((name, (tuple(t.shape), t.dtype))))
    return seen


def _check_refused(create: Make, case: Case, what: str, **changed: Any) -> None:
    source = ReadTo(case.model.tensors)
    try:
        create(case, weights=source, **changed)
    except ExecutorError as refused:
        _check_message(refused)
    else:
        pytest.fail(f"{what} must be refused with ExecutorError, but was accepted", pytrace=False)
    assert not source.read, (
        f"{what} must be refused before weights are read, but {len(source.read)} were read"
    )


def _check_message(error: BaseException) -> None:
    """Fail unless an error's message is one line."""
    text = str(error)
    assert len(text.splitlines()) == 1, f"an error's message must be one line, found {text!r}"


def _layerwise(one: Running) -> None:
    if not hasattr(one.executor, "run_layer"):
        pytest.skip("the executor is not a LayerwiseExecutor: its layers cannot be run alone")


def _bits_differ(a: Tensor, b: Tensor) -> Tensor:
    """Whether elements differ, one by one; NaN equals itself."""
    as_integers = {4: torch.int32, 2: torch.int16, 1: torch.int8}[a.dtype.itemsize]
    return a.contiguous().view(as_integers) != b.contiguous().view(as_integers)
