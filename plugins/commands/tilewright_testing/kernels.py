"""The conformance suite of kernel sets, for executor ``pypto-npu``.

The kernels' source is run on the CPU by the executor's emulation, on all models of the suite that
the set serves, and judged as executors are. What needs PyPTO is run where PyPTO can be imported.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import pytest
from attrs import evolve, fields, frozen

from tilewright import plugins
from tilewright.errors import ExecutorError, PluginError
from tilewright.types import (
    KernelSet,
    ModelConfig,
    PluginInfo,
    RopeConfig,
    RuntimeConfig,
    ServedModels,
)
from tilewright_kernels import source
from tilewright_kernels.contract import parsed
from tilewright_kernels.names import check_file
from tilewright_pypto import plugin as executor
from tilewright_pypto.adapter import lower
from tilewright_pypto.binding import contracts
from tilewright_pypto.emulated import language
from tilewright_pypto.installation import find
from tilewright_pypto.kernels import made, serves, stated
from tilewright_pypto.options import Options
from tilewright_testing.executor import (
    MAX_SEQ_LEN,
    Case,
    ExecutorSuite,
    Make,
    Running,
    Tried,
    Trio,
    _references,
)
from tilewright_testing.executor import MODELS as _MODELS
from tilewright_testing.suite import Implementation, in_fresh_process, target_of

_SMALL: dict[str, Any] = {"head_dim": 32, "hidden_size": 96, "intermediate_size": 160}
_WIDE: dict[str, Any] = {
    "head_dim": 128,
    "hidden_size": 256,
    "intermediate_size": 512,
    "vocab_size": 256,
}
_PLAIN = _MODELS["in-64s"]

MODELS: dict[str, ModelConfig] = {
    "qk-norm": _MODELS["in-16s"],
    "qk-norm-tied-gqa-5": _MODELS["in-16s-tied-gqa-5"],
    "qk-norm-yarn": evolve(_MODELS["yarn-rope"], **_SMALL),
    "qk-norm-wide": evolve(_MODELS["qk-norm"], **_WIDE),
    "plain": _PLAIN,
    "plain-wide": evolve(_MODELS["wide-heads"], **_WIDE),
    "linear-rope": evolve(_PLAIN, rope=RopeConfig(kind="linear", factor=4.0)),
    "llama3-rope": evolve(_PLAIN, rope=_MODELS["llama3-rope"].rope),
    "sliding-window": evolve(_PLAIN, sliding_windows=(None, 7, 3)),
    "qkv-biases": evolve(_MODELS["qkv-biases"], **_SMALL),
    "all-biases": evolve(_MODELS["all-biases"], **_SMALL),
}
"""Models of each family that a set may state, in sizes that suit tiled kernels."""

MOST_SEQUENCES, MOST_TOKENS = 64, 512
"""Steps at a set's limits are run up to these sizes."""


class KernelsSuite(ExecutorSuite):
    """Checks one kernel set against ``served_models``, ``kernel_set`` and the executor's binding.

    It runs the tests of ``ExecutorSuite`` that depend on kernels, with executor ``pypto-npu`` on
    platform ``emulated``. A fixture that may be given: ``models``, of which the set must serve at
    least one.
    """

    kind: ClassVar[str] = "kernels"

    @pytest.fixture
    def models(self) -> Mapping[str, ModelConfig]:
        """Models by name, with random weights; those that the set refuses are left out."""
        return MODELS

    @pytest.fixture
    def info(self) -> PluginInfo:
        """That of the executor, which computes in the dtypes that its kernels have."""
        return evolve(plugins.info(executor), serves=None)

    @pytest.fixture
    def create(self, implementation: Implementation) -> Make:
        options = Options(platform="emulated")

        def create(case: Case, **changed: Any) -> Any:
            arguments = case.arguments(options, **changed)
            kernels = _made(implementation, arguments["model_config"], arguments["runtime_config"])
            try:
                return executor.create(kernels, implementation.who, **arguments)
            except ExecutorError as error:  # not a refusal: the set has said that it serves this
                pytest.fail(f"{case}: {error}", pytrace=False)

        return create

    @pytest.fixture
    def served(
        self, implementation: Implementation, models: Mapping[str, ModelConfig]
    ) -> "list[Served]":
        """The models that the set serves, and its kernels for them."""
        found, why = [], ""
        for name, config in models.items():
            try:
                kernels = _made(implementation, config, _runtime())
            except ExecutorError as refused:
                why = why or str(refused)
            else:
                found.append(Served(name, config, kernels))
        if not found:
            pytest.fail(
                f"the set refused all of {len(models)} models of the suite, the first with: {why}; "
                "give the suite a fixture 'models' with models that the set serves",
                pytrace=False,
            )
        return found

    # --- the hooks -------------------------------------------------------------------------------

    def test_importing_it_does_not_import_torch(
        self, plugin: Any, implementation: Implementation
    ) -> None:
        target = target_of(plugin, implementation)
        module = target.partition(":")[0]
        found = in_fresh_process("imported_by", module, "torch", "pypto")
        assert not found, (
            f"importing {module} must be quick, since `plugins check` and errors import all sets, "
            f"but it imports {' and '.join(found)}: import that in functions, or not at all"
        )

    def test_it_serves_the_families_that_it_states(
        self, implementation: Implementation, models: Mapping[str, ModelConfig], tried: Tried
    ) -> None:
        served = {case.name for case in tried.cases}
        refused = {name: why for (name, _), why in tried.refused.items()}
        states = _stated(implementation)
        within = {name: config for name, config in models.items() if serves(states, config)}
        for field in fields(ServedModels):
            for value in getattr(states, field.name):
                such = [n for n, c in within.items() if _of_family(c)[field.name] == value]
                assert not such or served.intersection(such), (
                    f"served_models() states {field.name} = {value}, but kernel_set() refused "
                    f"{', '.join(such)}, the first with: {refused[such[0]]}"
                )

    def test_what_it_does_not_serve_is_refused_with_value_error(
        self, implementation: Implementation, served: "list[Served]"
    ) -> None:
        config = served[0].config
        shapes: list[dict[str, Any]] = [
            {"head_dim": 7},
            {"hidden_size": 50},
            {"intermediate_size": 83},
            {"num_kv_heads": config.num_heads + 1},
        ]
        sizes: list[dict[str, Any]] = [
            {"page_size": 1},
            {"page_size": 24},
            {"page_size": 1 << 20},
            {"max_batch_size": 1},
            {"max_batch_tokens": 10**12},
        ]
        odd = [(shape, evolve(config, **shape), _runtime()) for shape in shapes]
        odd += [(size, config, evolve(_runtime(), **size)) for size in sizes]
        for changed, model, runtime in odd:
            what = ", ".join(f"{name} = {size}" for name, size in changed.items())
            arguments = {"model_config": model, "runtime_config": runtime}
            try:
                found = implementation.call("kernel_set", **arguments)
            except ValueError as refused:
                why = str(refused)
            except Exception as error:
                pytest.fail(
                    f"kernel_set() must serve {what} or refuse it with ValueError, found "
                    f"{plugins.cause(error)}",
                    pytrace=False,
                )
            else:
                assert isinstance(found, KernelSet), (
                    f"kernel_set() must return a KernelSet, found {type(found).__name__} for {what}"
                )
                continue
            assert len(why.splitlines()) == 1, (
                f"kernel_set() must say in one line why it refuses {what}, found {why!r}"
            )

    # --- the sources -----------------------------------------------------------------------------

    def test_its_sources_can_be_read_and_hold_what_they_import(
        self, served: "list[Served]"
    ) -> None:
        for one in served:
            for file in one.kernels.sources.values():
                _must(parsed, file)
            for kernel in one.kernels.constants:
                if kernel in one.kernels.sources:
                    _must(source.modules, kernel, one.kernels)

    def test_no_variable_has_a_name_that_pypto_confuses(self, served: "list[Served]") -> None:
        for file in {file for one in served for file in one.kernels.sources.values()}:
            _must(check_file, file)

    def test_its_kernels_have_the_parameters_that_the_executor_binds(
        self, implementation: Implementation, served: "list[Served]"
    ) -> None:
        for one in served:
            _must(contracts, one.kernels, one.config, f"{implementation.who}, for {one.name}")

    def test_its_kernels_are_in_the_emulated_language(self, served: "list[Served]") -> None:
        for one in served:
            for kernel in one.kernels.constants:
                _must(source.load, kernel, one.kernels, language)

    def test_pypto_lowers_its_kernels(self, served: "list[Served]") -> None:
        try:
            find(None)
        except ExecutorError as absent:
            pytest.skip(f"PyPTO is not importable: not proved on PyPTO ({absent})")
        for one in served:
            for kernel in one.kernels.constants:
                _must(lower, kernel, one.kernels)

    # --- sizes -----------------------------------------------------------------------------------

    def test_its_own_page_size_and_others_give_correct_results(
        self, create: Make, trio: Any, case: Case
    ) -> None:
        for asked in (None, 24):
            try:
                one = create(case, runtime_config=evolve(case.runtime, page_size=asked))
            except ExecutorError as refused:
                if asked is None:
                    pytest.fail(
                        f"kernel_set() must choose a page size if none is asked: {refused}",
                        pytrace=False,
                    )
                continue
            size = one.kv_cache_spec.page_size
            one.close()
            if size == case.page_size:
                continue
            other = evolve(case, runtime=evolve(case.runtime, page_size=size))
            longest = min(size, MAX_SEQ_LEN - 3)
            prompts = case.tokens(longest - 1, longest + 1, 3)
            with trio(other, shuffled=True) as three:
                three.run(dict(zip("abc", prompts, strict=True)))
                three.run({"a": [5], "b": [6], "c": [7]})
                three.run({"a": [8], "b": [9], "c": [10]})

    def test_steps_may_be_as_large_as_the_set_states(self, create: Make, case: Case) -> None:
        """At other limits than those of the other tests: max_batch_size sequences with
        max_batch_tokens tokens, then one token of each."""
        asked = evolve(case.runtime, max_batch_size=5, max_batch_tokens=37)
        candidate = create(case, runtime_config=asked)
        executors = [candidate]
        sequences = min(candidate.limits.max_batch_size, MOST_SEQUENCES)
        tokens = min(candidate.limits.max_batch_tokens, MOST_TOKENS)
        large = evolve(asked, max_batch_size=sequences, max_batch_tokens=max(tokens, sequences))
        at = evolve(case, runtime=large)
        try:
            executors += _references(at, candidate)
            ours, near, true = (Running(e, at) for e in executors)
            three = Trio(at, ours, near, true, at.sequences())
            length, more = divmod(tokens, sequences)
            lengths = [length] * (sequences - 1) + [length + more]
            prompts = at.tokens(*(n for n in lengths if n))
            three.run({str(i): prompt for i, prompt in enumerate(prompts)})
            three.run({str(i): [3 + i] for i in range(len(prompts))})
        finally:
            for one in executors:
                one.close()

    # Not of kernels: ExecutorSuite proves these of executor pypto-npu.
    test_a_closed_executor_raises_executor_error: Any = None
    test_a_layers_cache_can_be_read_and_replaced: Any = None
    test_a_step_may_name_tokens_that_the_step_before_samples: Any = None
    test_a_tap_is_called_only_in_its_own_step: Any = None
    test_an_unknown_device_is_refused: Any = None
    test_dynamic_rope_is_that_of_the_whole_prompt: Any = None
    test_embedding_layers_and_head_give_the_logits_of_a_step: Any = None
    test_ended_requests_are_forgotten: Any = None
    test_it_may_be_closed_twice_and_created_again: Any = None
    test_it_names_its_device_and_chooses_a_page_size: Any = None
    test_it_runs_the_dtypes_that_it_declares: Any = None
    test_kv_cache_spec_matches_the_model_and_the_settings: Any = None
    test_limits_are_positive_or_none: Any = None
    test_packed_weights_give_identical_logits: Any = None
    test_packed_weights_match_their_declaration: Any = None
    test_parts_of_the_layers_give_the_results_of_the_whole: Any = None
    test_progress_reports_stay_within_their_total: Any = None
    test_steps_may_run_in_another_thread_than_the_one_that_created_it: Any = None
    test_taps_match_the_documentation: Any = None
    test_the_batch_is_not_changed: Any = None
    test_the_kv_cache_may_have_another_dtype: Any = None
    test_the_process_is_left_unchanged: Any = None
    test_two_executors_are_independent: Any = None
    test_weights_are_not_changed: Any = None
    test_weights_match_the_checkpoint: Any = None
    test_weights_may_be_closed_once_the_executor_is_created: Any = None


@frozen
class Served:
    """A model of the suite that the set serves, and its kernels for that model."""

    name: str
    config: ModelConfig
    kernels: KernelSet


def _runtime() -> RuntimeConfig:
    return RuntimeConfig(
        weight_dtype="bfloat16",
        kv_dtype="bfloat16",
        max_seq_len=MAX_SEQ_LEN,
        max_batch_size=16,
        max_batch_tokens=128,
    )


def _made(implementation: Implementation, config: ModelConfig, runtime: RuntimeConfig) -> KernelSet:
    """The set's kernels. Raises ExecutorError for what it does not serve; any other error fails
    the test."""
    try:
        return made(implementation.plugin, implementation.who, config, runtime)
    except PluginError as error:
        pytest.fail(str(error), pytrace=False)


def _stated(implementation: Implementation) -> ServedModels:
    try:
        return stated(implementation.plugin, implementation.who)
    except PluginError as error:
        pytest.fail(str(error), pytrace=False)


def _of_family(config: ModelConfig) -> dict[str, Any]:
    """A model's family, in the fields of ServedModels."""
    biases = {name: getattr(config, name) for name in ("qkv_bias", "output_bias", "mlp_bias")}
    return biases | {
        "qk_norm": config.qk_norm,
        "sliding_windows": any(window is not None for window in config.sliding_windows),
        "rope_kinds": config.rope.kind,
    }


def _must(check: Callable[..., Any], *arguments: Any) -> None:
    """Fail with the message of an ExecutorError that a check raises."""
    try:
        check(*arguments)
    except ExecutorError as error:
        pytest.fail(str(error), pytrace=False)
