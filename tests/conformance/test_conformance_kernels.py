"""The suite of kernel sets finds each of these broken ones, by the test that is meant for it."""

import atexit
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from attrs import evolve
from conformance import Fault, missed, run

from tilewright import hookimpl
from tilewright.types import KernelSet, ModelConfig, PluginInfo, RuntimeConfig, ServedModels
from tilewright_kernels.qwen3_14b import plugin as shipped
from tilewright_testing import ExecutorSuite, KernelsSuite
from tilewright_testing.kernels import MODELS

SUITE = KernelsSuite
Change = Callable[[KernelSet], Any]

_folder = TemporaryDirectory()
atexit.register(_folder.cleanup)


def shipped_set(config: ModelConfig, runtime: RuntimeConfig) -> KernelSet:
    made: KernelSet = shipped.kernel_set(config, runtime)
    return made


class Kernels:
    """A plugin of the shipped kernels, changed in some way."""

    tilewright_api = 2

    def __init__(
        self,
        change: Change = lambda made: made,
        make: Callable[[ModelConfig, RuntimeConfig], KernelSet] = shipped_set,
        **served: Any,
    ):
        self.change, self.make = change, make
        self.served: Any = ServedModels(**{"qk_norm": (True,)} | served)

    @hookimpl
    def plugin_info(self) -> PluginInfo:
        return PluginInfo(summary="dense Qwen3")

    @hookimpl
    def served_models(self) -> ServedModels:
        return self.served

    @hookimpl
    def kernel_set(self, model_config: ModelConfig, runtime_config: RuntimeConfig) -> Any:
        return self.change(self.make(model_config, runtime_config))


def written(name: str, text: str | bytes) -> Path:
    """A file of a set, in a folder of its own."""
    folder = Path(_folder.name) / str(len(list(Path(_folder.name).iterdir())))
    folder.mkdir()
    (folder / f"{name}.py").write_bytes(text.encode() if isinstance(text, str) else text)
    return folder / f"{name}.py"


def edited(name: str, old: str, new: str) -> Kernels:
    """The shipped set, with all matches of a pattern replaced in one of its files."""
    text = shipped.SOURCES[name].read_text()
    changed = re.sub(old, new, text)
    assert changed != text, f"{name}.py does not hold {old}"
    return with_file(name, written(name, changed))


def with_file(name: str, file: Path) -> Kernels:
    return Kernels(lambda made: evolve(made, sources={**made.sources, name: file}))


def constants(change: Callable[[dict[str, Any]], Mapping[str, Any]], *kernels: str) -> Change:
    """Constants changed in some kernels, or in all."""

    def changed(made: KernelSet) -> KernelSet:
        new = {
            kernel: change(dict(values)) if not kernels or kernel in kernels else values
            for kernel, values in made.constants.items()
        }
        return evolve(made, constants=new)

    return changed


def without(name: str) -> Callable[[dict[str, Any]], Mapping[str, Any]]:
    return lambda values: {n: v for n, v in values.items() if n != name}


def raises_key_error(config: ModelConfig, runtime: RuntimeConfig) -> KernelSet:
    try:
        return shipped_set(config, runtime)
    except ValueError as error:
        raise KeyError("head_dim") from error


def qwen3_only(config: ModelConfig, runtime: RuntimeConfig) -> KernelSet:
    if not config.qk_norm:
        raise ValueError("these kernels norm queries and keys")
    return shipped_set(config, runtime)


def own_page_size(config: ModelConfig, runtime: RuntimeConfig) -> KernelSet:
    return shipped_set(config, evolve(runtime, page_size=64))


def no_page_size(config: ModelConfig, runtime: RuntimeConfig) -> KernelSet:
    if runtime.page_size is None:
        raise ValueError("page_size must be given")
    return shipped_set(config, runtime)


def listed(served: ServedModels) -> Kernels:
    plugin = Kernels()
    plugin.served = served
    return plugin


IMPORTED_WITH_TORCH = Kernels()
"""This module, which a fresh process can import by name, imports torch."""

ONE = {"models": {"qk-norm": MODELS["qk-norm"]}}
TWO = {"models": {"qk-norm": MODELS["qk-norm"], "plain": MODELS["plain"]}}

BINDS = "test_its_kernels_have_the_parameters_that_the_executor_binds"
READ = "test_its_sources_can_be_read_and_hold_what_they_import"
LOADS = "test_its_kernels_are_in_the_emulated_language"
RUNS = "test_it_runs_the_models_that_it_states"
SINGLE = "test_a_single_sequence_is_correct"
REFUSES = "test_what_it_does_not_serve_is_refused_with_value_error"
PAGES = "test_its_own_page_size_and_others_give_correct_results"
LIMITS = "test_steps_may_be_as_large_as_the_set_states"

FAULTS = [
    # --- hooks
    Fault(
        "it imports torch when it is imported",
        IMPORTED_WITH_TORCH,
        "test_importing_it_does_not_import_torch",
        ONE,
        "but it imports torch: import that in functions",
    ),
    Fault(
        "it serves no model of the suite",
        Kernels(qkv_bias=(True,)),
        RUNS,
        {},
        r"refused all of \d+ models in bfloat16, the first with: .*without qkv_bias|with qkv_bias",
    ),
    Fault(
        "it states a family that it refuses",
        Kernels(make=qwen3_only, qk_norm=(True, False)),
        "test_it_serves_the_families_that_it_states",
        TWO,
        r"states qk_norm = False, but kernel_set\(\) refused plain, .* these kernels norm queries",
    ),
    Fault(
        "it states a family without the weights that its kernels take",
        Kernels(qk_norm=(True, False)),
        BINDS,
        TWO,
        "for plain: kernel prefill_layer takes q_norm, k_norm, which LlamaForCausalLM does not",
    ),
    Fault(
        "it states a list in place of a tuple",
        listed(ServedModels(qk_norm=[True])),  # type: ignore[arg-type]
        RUNS,
        ONE,
        r"must give qk_norm as a tuple of some of False, True, found \[True\]",
    ),
    Fault(
        "kernel_set() returns a dict",
        Kernels(lambda made: {"sources": made.sources}),
        RUNS,
        ONE,
        r"kernel_set\(\) must return a KernelSet, found \{'sources'",
    ),
    Fault(
        "kernel_set() raises KeyError for a shape that it does not serve",
        Kernels(make=raises_key_error),
        REFUSES,
        ONE,
        "must serve head_dim = 7 or refuse it with ValueError, found KeyError: 'head_dim'",
    ),
    Fault(
        "kernel_set() gives sources as text",
        Kernels(lambda made: evolve(made, sources={n: str(p) for n, p in made.sources.items()})),
        READ,
        ONE,
        r"kernel_set\(\) must give sources as a mapping of module names to paths",
    ),
    # --- sources
    Fault(
        "a source file is missing",
        with_file("blocks", Path("/nonexistent/blocks.py")),
        READ,
        ONE,
        "/nonexistent/blocks.py: No such file or directory: expected kernel source",
    ),
    Fault(
        "a module is not among the sources",
        Kernels(lambda made: evolve(made, sources={n: made.sources[n] for n in made.constants})),
        READ,
        ONE,
        r"prefill_layer.py imports .blocks, which is not a source of the kernel set",
    ),
    Fault(
        "a source file has a syntax error",
        with_file("head", written("head", "import pypto.language as pl\ndef head(:\n")),
        READ,
        ONE,
        "head.py:2: invalid syntax",
    ),
    Fault(
        "a source file is not in UTF-8",
        with_file("head", written("head", b"# caf\xe9\n")),
        READ,
        ONE,
        "head.py:1: 'utf-8' codec can't decode byte 0xe9",
    ),
    Fault(
        "a loop's variable has the name of PyPTO's temporaries",
        edited("prefill_layer", r"\bi\b", "t"),
        "test_no_variable_has_a_name_that_pypto_confuses",
        ONE,
        r"prefill_layer.py:\d+: prefill_tokens: rename t: PyPTO calls its temporaries t",
    ),
    Fault(
        "a parameter is misspelt",
        edited("decode_layer", "context_lens", "context_len"),
        BINDS,
        ONE,
        "decode_layer has a parameter 'context_len', which .* did you mean 'context_lens'",
    ),
    Fault(
        "an output is not declared as one",
        edited("prefill_layer", r"pl.Out\[(.*)\],\n\)", r"\1,\n)"),
        BINDS,
        ONE,
        "kernel prefill_layer must have out as out, found in",
    ),
    Fault(
        "a kernel has another row order of the KV cache",
        edited("decode_layer", '"HND"', '"NHD"'),
        BINDS,
        ONE,
        "decode_layer declares KV_ROW_ORDER = 'NHD', but executor pypto-npu lays out the cache as",
    ),
    Fault(
        "a kernel takes what another one is passed",
        edited(
            "head", r"    final_norm: ", "    rope_cos: pl.Tensor[[L], pl.FP32],\n    final_norm: "
        ),
        BINDS,
        ONE,
        "kernel head has a parameter 'rope_cos', which executor pypto-npu does not pass to it",
    ),
    Fault(
        "a kernel has another name than its module",
        edited("head", "def head", "def lm_head"),
        BINDS,
        ONE,
        "head.py has no function head: name the kernel like its module",
    ),
    Fault(
        "a constant in a signature has no value",
        Kernels(constants(without("HIDDEN"), "head")),
        BINDS,
        ONE,
        r"head.py:\d+: kernel head, parameter hidden: HIDDEN has no value",
    ),
    Fault(
        "a constant in a kernel has no value",
        Kernels(constants(without("KV_TILE"), "decode_layer")),
        LOADS,
        ONE,
        "decode_layer.py:13: kernel decode_layer|cannot import name 'KV_TILE'",
    ),
    Fault(
        "a kernel uses what the language does not have",
        edited("head", r"pl.min\(", "pl.smallest("),
        LOADS,
        ONE,
        r"head.py:\d+: score_rows has pl.smallest, which PyPTO .* does not have",
    ),
    # --- numbers
    Fault(
        "attention is not scaled",
        Kernels(constants(lambda values: {**values, "SCALE": 1.0})),
        SINGLE,
        ONE,
        "model 'qk-norm' in bfloat16, prefill step 0, tensor",
    ),
    Fault(
        "attention of decode is scaled twice",
        Kernels(constants(lambda v: {**v, "SCALE": v["SCALE"] ** 2}, "decode_layer")),
        SINGLE,
        ONE,
        "model 'qk-norm' in bfloat16, decode step 1, tensor",
    ),
    Fault(
        "pages have another size than was asked for",
        Kernels(make=own_page_size),
        "test_it_uses_the_requested_page_size",
        ONE,
        r"kernel_set\(\) must give page_size as the 4 that was asked for, .*, found 64",
    ),
    Fault(
        "it chooses no page size",
        Kernels(make=no_page_size),
        PAGES,
        ONE,
        "must choose a page size if none is asked: .*page_size must be given",
    ),
    Fault(
        "the kernels are right for pages of one size",
        Kernels(constants(lambda values: {**values, "PAGE": 16})),
        PAGES,
        ONE,
        "model 'qk-norm' in bfloat16, prefill step 0, tensor layers.0.k_cache",
    ),
    Fault(
        "it states twice as many sequences as it has scratch memory for",
        Kernels(lambda made: evolve(made, max_batch_size=2 * made.max_batch_size)),
        LIMITS,
        ONE,
        r"kernel prefill_layer, blocks.py:\d+: scratch\[.* reaches outside its shape",
    ),
    Fault(
        "it states twice as many tokens as it has scratch memory for",
        Kernels(lambda made: evolve(made, max_batch_tokens=8 * made.max_batch_tokens)),
        LIMITS,
        ONE,
        r"kernel prefill_layer, blocks.py:\d+: scratch\[.* reaches outside its shape",
    ),
]


def test_the_suite_finds_every_mistake() -> None:
    assert missed(SUITE, FAULTS) == []


def test_a_set_of_no_served_model_passes_no_test_of_its_kernels() -> None:
    outcome = run(SUITE, Kernels(rope_kinds=("llama3",)), [SINGLE, BINDS, RUNS], **ONE)
    assert set(outcome.failed) == {SINGLE, BINDS, RUNS}
    assert all("refused all of 1 models" in why for why in outcome.why.values())


def test_a_set_need_not_be_installed() -> None:
    outcome = run(SUITE, Kernels(), [SINGLE, BINDS, LOADS], **ONE)
    assert not outcome.failed, outcome.why


def test_tests_that_are_left_out_are_those_of_executors() -> None:
    left_out = {name for name, test in vars(SUITE).items() if test is None}
    assert left_out
    assert left_out <= {name for name in vars(ExecutorSuite) if name.startswith("test_")}
