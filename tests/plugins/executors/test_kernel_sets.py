"""Kernel sets as plugins: how they are found, what they answer, and what the executor binds."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import plugin_distributions as dists
import pytest
from attrs import evolve
from fake_pypto import failing
from plugin_distributions import Distribution, Install

from tilewright import GenerateConfig, LLMEngine, RuntimeConfig
from tilewright.cli import main
from tilewright.errors import ExecutorError, PluginError, TilewrightError
from tilewright.settings import DEMO_MODEL
from tilewright.types import KernelSet, ModelConfig, RopeConfig
from tilewright_kernels import source
from tilewright_kernels.qwen3_14b.plugin import kernels_of
from tilewright_kernels.qwen3_14b.shape import layer_shape
from tilewright_pypto import rings
from tilewright_pypto.adapter import lower
from tilewright_pypto.binding import KERNELS, PARAMETERS, contracts, passed
from tilewright_pypto.emulated import KernelError, language
from tilewright_pypto.inspection import inspected
from tilewright_pypto.kernels import described, kernel_set, served
from tilewright_testing.kernels import MODELS

CONFIG, LLAMA = MODELS["qk-norm"], MODELS["plain"]
RUNTIME = RuntimeConfig(
    weight_dtype="bfloat16",
    kv_dtype="bfloat16",
    page_size=16,
    max_seq_len=64,
    max_batch_size=4,
    max_batch_tokens=32,
)
WHO = "kernel set 'acme' of acme-kernels 1.0"

SET = """
from attrs import evolve
from tilewright import hookimpl
from tilewright.types import ServedModels
from tilewright_kernels.qwen3_14b.plugin import kernels_of
from tilewright_kernels.qwen3_14b.shape import layer_shape

tilewright_api = 2

def shipped(model_config, runtime_config):
    return kernels_of(layer_shape(model_config, runtime_config))

@hookimpl
def served_models():
    return ServedModels(qk_norm=(True,))

@hookimpl
def kernel_set(model_config, runtime_config):
    return shipped(model_config, runtime_config)
"""
"""The shipped kernels, as the set of somebody else."""


def distribution(name: str, kernels: str, *edits: tuple[str, str]) -> Distribution:
    """A distribution of one set, with text of its module replaced."""
    text = SET
    for old, new in edits:
        assert old in text
        text = text.replace(old, new)
    module = name.replace("-", "_")
    return Distribution(name, {f"{module}.py": text}, {"kernels": {kernels: module}})


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Install]:
    with dists.on_path(tmp_path / "site") as install:
        yield install


def refusal(kind: type[TilewrightError], call: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(kind) as error:
        call(*arguments)
    message = str(error.value)
    assert "\n" not in message
    return message


# --- selection ------------------------------------------------------------------------------------


def test_a_set_is_found_by_its_name_and_by_that_of_its_distribution(site: Install) -> None:
    site(distribution("acme-kernels", "acme"))
    for name in ("acme", "acme-kernels:acme", "Acme_Kernels:acme"):
        assert described(name) == WHO
        assert served(name).qk_norm == (True,)
        assert kernel_set(name, CONFIG, RUNTIME).page_size == 16


def test_a_model_runs_on_the_set_that_the_option_names(site: Install) -> None:
    site(distribution("acme-kernels", "acme", ("shipped(model_config, runtime_config)\n", "1\n")))
    for name, works in (("qwen3", True), ("acme-kernels:acme", False)):
        options = {"executor": {"platform": "emulated", "kernels": name}}
        with LLMEngine.from_plugins(executor="pypto-npu", options=options) as engine:
            runtime = evolve(RUNTIME, page_size=64)
            if works:
                engine.init_model("demo", DEMO_MODEL, runtime)
                assert engine.generate("demo", [5, 6], GenerateConfig(max_new_tokens=1))
                continue
            found = refusal(PluginError, engine.init_model, "demo", DEMO_MODEL, runtime)
            assert found == f"{WHO}: kernel_set() must return a KernelSet, found 1"


def test_two_distributions_may_claim_a_name_of_which_one_is_chosen(site: Install) -> None:
    site(distribution("acme-one", "acme"), distribution("acme-two", "acme"))
    assert refusal(PluginError, kernel_set, "acme", CONFIG, RUNTIME) == (
        "kernel set 'acme' is claimed by acme-one 1.0 and by acme-two 1.0; choose 'acme-one:acme' "
        "or 'acme-two:acme'"
    )
    assert described("acme-two:acme") == "kernel set 'acme' of acme-two 1.0"


def test_a_name_that_no_set_has_is_told_with_those_that_are_there(site: Install) -> None:
    site(distribution("acme-kernels", "acme-qwen3"))
    found = refusal(PluginError, kernel_set, "acme-qwen", CONFIG, RUNTIME)
    assert found.startswith(
        "no kernel set is named 'acme-qwen'; did you mean 'acme-qwen3'? (installed: acme-qwen3, "
    )


@pytest.mark.parametrize("way", ["option", "run file", "environment"])
def test_each_way_of_setting_options_names_the_set(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    command = ["generate", "--executor", "pypto-npu", "--prompt", "x", "-o", "platform=emulated"]
    if way == "option":
        command += ["-o", "kernels=acme"]
    elif way == "environment":
        monkeypatch.setenv("TILEWRIGHT_OPTIONS_EXECUTOR_KERNELS", "acme")
    else:
        file = tmp_path / "run.toml"
        file.write_text(
            '[plugins]\nexecutor = "pypto-npu"\n[options.executor]\n'
            'platform = "emulated"\nkernels = "acme"\n[prompts]\ntext = ["x"]\n'
        )
        command = ["run", str(file)]
    assert main(command) == 2
    assert "no kernel set is named 'acme'" in capsys.readouterr().err


def test_an_error_for_another_family_names_the_sets_that_serve_it(site: Install) -> None:
    site(
        distribution("acme-llama", "acme", ("(True,)", "(False,)")),
        distribution("acme-broken", "broken", ("ServedModels(qk_norm=(True,))", "1 / 0")),
    )
    found = refusal(ExecutorError, kernel_set, "tilewright:qwen3", LLAMA, RUNTIME)
    assert "serves models with a norm for each query and key head, found LlamaForCausalLM" in found
    assert re.search(r": choose (.* or )?kernels=acme-llama:acme( or .*)?$", found)
    biased = evolve(CONFIG, output_bias=True)
    found = refusal(ExecutorError, kernel_set, "acme-llama:acme", biased, RUNTIME)
    assert found.endswith("choose executor torch for this model")


def test_a_model_or_setting_that_a_set_does_not_serve_is_told_what_to_do(site: Install) -> None:
    site(distribution("acme-kernels", "acme"))
    windows = evolve(CONFIG, sliding_windows=(None, 7))
    dynamic = evolve(CONFIG, rope=RopeConfig(kind="dynamic", factor=2.0))
    for config, runtime, message in (
        (
            evolve(CONFIG, qkv_bias=True),
            RUNTIME,
            "serves models without qkv_bias, found qkv_bias =",
        ),
        (windows, RUNTIME, "serves models without sliding windows, found sliding windows in Qwen3"),
        (
            dynamic,
            RUNTIME,
            "serves RoPE default, linear, llama3, yarn, found dynamic RoPE in Qwen3",
        ),
        (CONFIG, evolve(RUNTIME, kv_dtype="float16"), "found kv_dtype = float16: set kv_dtype = "),
        (
            evolve(CONFIG, head_dim=48),
            RUNTIME,
            "head_dim 48 must be a multiple of 32: .*executor to",
        ),
        (
            CONFIG,
            evolve(RUNTIME, page_size=24),
            "set another page_size, or none: the set then chooses",
        ),
    ):
        found = refusal(ExecutorError, kernel_set, "acme", config, runtime)
        assert found.startswith(WHO)
        assert re.search(message, found)


SERVED, MADE = "ServedModels(qk_norm=(True,))", "return shipped(model_config, runtime_config)"
MAKES = "return evolve(shipped(model_config, runtime_config), "


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (SERVED, "1 / 0", "served_models() failed: ZeroDivisionError: division by zero ("),
        (SERVED, "int('x')", "served_models() failed: ValueError: invalid literal"),
        (SERVED, "{'qk_norm': True}", "served_models() must return a ServedModels, found {'qk_n"),
        (
            SERVED,
            "ServedModels(qk_norm=True)",
            "give qk_norm as a tuple of some of False, True, fo",
        ),
        (
            SERVED,
            "ServedModels(mlp_bias=())",
            "give mlp_bias as a tuple of some of False, True, fo",
        ),
        (
            SERVED,
            "ServedModels(rope_kinds=('dynamic',))",
            "must give rope_kinds as a tuple of some of default, linear, llama3, yarn, found ('dyn",
        ),
        (MADE, "raise KeyError('hidden')", "kernel_set() failed: KeyError: 'hidden' ("),
        (MADE, "pass", f"{WHO}: kernel_set() of module acme_kernels returned nothing"),
        (MADE, "return {}", "kernel_set() must return a KernelSet, found {}"),
        (
            MADE,
            f"{MAKES}sources=['a'])",
            "sources as a mapping of module names to paths, found ['a",
        ),
        (MADE, f"{MAKES}constants={{'head': 1}})", "constants as a mapping of kernels to mappings"),
        (
            MADE,
            f"{MAKES}page_size=32)",
            "page_size as the 16 that was asked for, or raise ValueErr",
        ),
        (
            MADE,
            f"{MAKES}max_batch_size=None)",
            "max_batch_size as a whole number of at least 1, fo",
        ),
        (
            MADE,
            f"{MAKES}max_batch_tokens=0)",
            "max_batch_tokens as a whole number of at least 1, f",
        ),
        (MADE, f"{MAKES}tiles=16)", "tiles as Tiles, found 16"),
        (
            "tilewright_api = 2",
            "import nowhere",
            "cannot be imported from acme_kernels: ModuleNotF",
        ),
    ],
)
def test_a_set_that_answers_wrongly_is_a_one_line_error(
    site: Install, old: str, new: str, message: str
) -> None:
    site(distribution("acme-kernels", "acme", (old, new)))
    config = evolve(CONFIG, qk_norm=new != "ServedModels(mlp_bias=())")
    assert message in refusal(PluginError, kernel_set, "acme", config, RUNTIME)


# --- what the executor binds ----------------------------------------------------------------------


@pytest.fixture
def shipped() -> KernelSet:
    return kernels_of(layer_shape(CONFIG, RUNTIME))


def edited(kernels: KernelSet, folder: Path, name: str, *edits: tuple[str, str]) -> KernelSet:
    """A set with text of one of its files replaced."""
    text = kernels.sources[name].read_text()
    for old, new in edits:
        assert old in text
        text = text.replace(old, new)
    (folder / f"{name}.py").write_text(text)
    return evolve(kernels, sources={**kernels.sources, name: folder / f"{name}.py"})


def only(kernels: KernelSet, *names: str) -> KernelSet:
    return evolve(kernels, constants=dict.fromkeys(names, kernels.constants["head"]))


def test_decode_may_be_left_to_the_kernel_for_prompts(shipped: KernelSet) -> None:
    found = contracts(only(shipped, "prefill_layer", "head"), CONFIG, WHO)
    assert list(found) == ["prefill_layer", "head"]


def test_every_kernel_is_passed_only_known_parameters() -> None:
    assert {name for kernel in KERNELS for name in passed(kernel)} == set(PARAMETERS)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "has kernels none: expected prefill_layer and head, or prefill_model"),
        (["head"], "has kernels head: expected prefill_layer and head, or prefill_model"),
        (
            ["prefil_layer"],
            "has a kernel 'prefil_layer', which executor pypto-npu does not run; did you mean "
            "'prefill_layer'? (kernels: prefill_layer, decode_layer, head, prefill_model, "
            "decode_model)",
        ),
        (["prefill_model"], "has constants but no source for kernel prefill_model: add its file"),
    ],
)
def test_a_set_without_the_kernels_that_are_needed_is_refused(
    shipped: KernelSet, names: list[str], message: str
) -> None:
    found = refusal(ExecutorError, contracts, only(shipped, *names), CONFIG, WHO)
    assert found == f"{WHO} {message}"


OUT = "out: pl.Out[pl.Tensor[[T, HIDDEN], pl.BF16]],"


@pytest.mark.parametrize(
    ("kernel", "old", "new", "message"),
    [
        ("head", "final_norm:", "final_nrom:", "'final_nrom', which .* did you mean 'final_norm'"),
        ("head", "final_norm:", "q_norm:", "head has a parameter 'q_norm', which .* does not pass"),
        ("head", "logits: pl.Out", "logits: pl.InOut", "head must have logits as out, found inout"),
        ("prefill_layer", OUT, "", "kernel prefill_layer must have out as out, found nothing"),
        ("prefill_layer", "k_cache: pl.InOut", "k_cache: pl.Out", "k_cache as inout, found out"),
        (
            "prefill_layer",
            "input_norm: pl.Tensor[[1, HIDDEN], pl.FP32]",
            "input_norm: pl.Out[pl.Tensor[[1, HIDDEN], pl.FP32]]",
            "kernel prefill_layer must have input_norm as in, found out",
        ),
        (
            "decode_layer",
            "    k_norm: pl.Tensor[[1, HEAD_DIM], pl.FP32],\n",
            "",
            "decode_layer does not take k_norm, which Qwen3ForCausalLM has: its outputs would be",
        ),
        (
            "decode_layer",
            "q_norm: pl.Tensor[[1, HEAD_DIM], pl.FP32],",
            "q_norm: pl.Tensor[[1, HEAD_DIM], pl.FP32],\n    bq: pl.Tensor[[1, Q_DIM], pl.FP32],",
            "decode_layer takes bq, which Qwen3ForCausalLM does not have: state in served_models",
        ),
        ("decode_layer", '"HND"', '"NHD"', "decode_layer declares KV_ROW_ORDER = 'NHD', but exec"),
        ("decode_layer", "KV_ROW_ORDER =", "ORDER =", "decode_layer declares KV_ROW_ORDER = None"),
        (
            "decode_layer",
            "hidden: pl",
            "layer: pl.Tensor[[1], pl.INT32],\n    hidden: pl",
            "prefill_layer takes the weights of one layer, and other kernels those of all layers",
        ),
        (
            "decode_layer",
            "input_norm: pl.Tensor[[1, HIDDEN], pl.FP32]",
            "input_norm: pl.Tensor[[1, HIDDEN], pl.BF16]",
            r"decode_layer wants input_norm as bfloat16 \[1, 96\], but executor pypto-npu passes "
            r"float32 \[1, 96\]: change the signature$",
        ),
        (
            "decode_layer",
            "wo: pl.Tensor[[Q_DIM, HIDDEN], pl.BF16],",
            "wo: pl.Tensor[[HIDDEN, Q_DIM], pl.BF16],",
            r"wants wo as bfloat16 \[96, (\d+)\], but .* passes bfloat16 \[\1, 96\]: change the s",
        ),
        (
            "head",
            "[[L, HIDDEN], pl.BF16]",
            "[[HIDDEN], pl.BF16]",
            r"passes bfloat16 \[L, 96\]: change",
        ),
        (
            "prefill_layer",
            "slot_mapping: pl.Tensor[[T]",
            "slot_mapping: pl.Tensor[[B]",
            r"slot_mapping as int32 \[B\], but .* int32 \[T\]; B stands for B in context_lens: ",
        ),
        ("head", "def head(", "def header(", "head.py has no function head: name the kernel like"),
        ("head", "[L, HIDDEN]", "[L, WIDTH]", r"head.py:\d+: .*parameter hidden: WIDTH has no val"),
        ("head", "[L, HIDDEN]", "[L, HIDDEN / 2]", "hidden: an extent must be a whole number, fou"),
        ("head", "[L, HIDDEN]", "[L, HIDDEN // 0]", "parameter hidden: integer division or modulo"),
        (
            "head",
            "pl.BF16]",
            "pl.INT4]",
            r"parameter hidden: expected pl.Tensor.* \(dtypes: BF16, ",
        ),
        ("head", "hidden: ", "*, hidden: ", r"head.py:\d+: kernel head must have plain parameters"),
        ("head", "def head(", "def head((", r"head.py:\d+: "),
        (
            "head",
            "@pl.jit\ndef",
            "def",
            r"head.py:\d+: kernel head has no decorator: expected @pl.j",
        ),
        (
            "head",
            "@pl.jit\ndef",
            "@pl.jit.inline\ndef",
            r"head has @pl.jit.inline: expected @pl.jit$",
        ),
    ],
)
def test_a_kernel_that_the_executor_cannot_bind_is_refused(
    shipped: KernelSet, tmp_path: Path, kernel: str, old: str, new: str, message: str
) -> None:
    changed = edited(shipped, tmp_path, kernel, (old, new))
    found = refusal(ExecutorError, contracts, changed, CONFIG, WHO)
    assert found.startswith(f"{WHO}: ")
    assert re.search(message, found)


def test_a_file_that_is_not_in_utf_8_is_named(shipped: KernelSet, tmp_path: Path) -> None:
    (tmp_path / "head.py").write_bytes(b"# caf\xe9\n")
    changed = evolve(shipped, sources={**shipped.sources, "head": tmp_path / "head.py"})
    found = refusal(ExecutorError, contracts, changed, CONFIG, WHO)
    assert "head.py:1: 'utf-8' codec can't decode byte 0xe9" in found


def test_a_row_order_may_have_an_annotation_and_follow_the_kernel(
    shipped: KernelSet, tmp_path: Path
) -> None:
    edits = (
        ('KV_ROW_ORDER = "HND"\n', ""),
        ("return out\n", 'return out\n\nKV_ROW_ORDER: str = "HND"'),
    )
    changed = edited(shipped, tmp_path, "prefill_layer", *edits)
    assert contracts(changed, CONFIG, WHO)["prefill_layer"].kv_row_order == "HND"


# --- what a kernel's module does when it is loaded and run ----------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "HIDDEN, K_TILE",
            "HIDDEN, TILE",
            "cannot import name 'TILE' .*constants come from .const",
        ),
        ("@pl.jit\n", "1 / 0\n\n\n@pl.jit\n", "cannot be loaded: ZeroDivisionError: division by z"),
        ("from .blocks", "from .block", "imports .block, which is not a source .*mean 'blocks'"),
    ],
)
def test_a_module_that_cannot_be_executed_is_named(
    shipped: KernelSet, tmp_path: Path, old: str, new: str, message: str
) -> None:
    changed = edited(shipped, tmp_path, "head", (old, new))
    found = refusal(ExecutorError, source.load, "head", changed, language)
    assert re.search(message, found)
    assert str(tmp_path / "head.py") in found


def test_source_in_a_file_of_another_kind_is_refused(shipped: KernelSet, tmp_path: Path) -> None:
    (tmp_path / "head.txt").write_text(shipped.sources["head"].read_text())
    changed = evolve(shipped, sources={**shipped.sources, "head": tmp_path / "head.txt"})
    found = refusal(ExecutorError, source.load, "head", changed, language)
    assert found.endswith("head.txt must be Python source: expected a name that ends in .py")


def test_an_error_of_python_in_a_kernel_names_the_kernel_and_the_line(
    shipped: KernelSet, tmp_path: Path
) -> None:
    import torch

    edits = ("    rows = pl.tensor.dim(hidden, 0)\n", "    rows = pl.tensor.dim(hidden, 0)[0]\n")
    kernel = source.load("head", edited(shipped, tmp_path, "head", edits), language)
    tensors = {
        "hidden": torch.zeros(1, CONFIG.hidden_size, dtype=torch.bfloat16),
        "final_norm": torch.ones(1, CONFIG.hidden_size),
        "lm_head": torch.zeros(64, CONFIG.hidden_size, dtype=torch.bfloat16),
        "logits": torch.zeros(1, 64),
    }
    with pytest.raises(KernelError, match=r"^kernel head: TypeError: .*head.py, line \d+\)$"):
        kernel(**tensors)


def test_rings_of_a_kernel_that_cannot_be_counted_keep_their_own_sizes(
    shipped: KernelSet, tmp_path: Path
) -> None:
    edits = ("scores[0:ROWS, 0:VOCAB_TILE] = acc", "scores[0:ROWS, 0:VOCAB_TILE] = acc + acc")
    changed = edited(shipped, tmp_path, "head", edits)
    assert rings.needed("head", shipped, 64)["ring_heap"] > 0
    assert set(rings.needed("head", changed, 64).values()) == {0}


# --- PyPTO's front end ----------------------------------------------------------------------------


def test_a_kernel_that_pypto_refuses_is_named(
    shipped: KernelSet, pypto_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(pypto_root / "python")
    lower("decode_layer", shipped)
    monkeypatch.setenv("FAKE_PYPTO", failing(lower_decode_layer="no tile of 7 rows"))
    found = refusal(ExecutorError, lower, "decode_layer", shipped)
    file = shipped.sources["decode_layer"]
    assert found == (f"kernel decode_layer of {file}: PyPTO does not lower it: no tile of 7 rows")
    lower("head", shipped)


# --- plugins show and check -----------------------------------------------------------------------


def test_show_prints_what_a_set_serves_and_its_sources(site: Install, capsys: Any) -> None:
    site(distribution("acme-kernels", "acme", ("(True,)", "(True, False)")))
    assert main(["plugins", "show", "tilewright:qwen3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "  qk_norm: models with a norm for each query and key head" in lines
    assert "  sliding_windows: models without sliding windows" in lines
    assert "  rope_kinds: RoPE default, linear, llama3, yarn" in lines
    assert "kernels: prefill_layer, decode_layer, head" in lines
    sources = kernels_of(layer_shape(CONFIG, RUNTIME)).sources
    assert f"  blocks: {sources['blocks']}" in lines

    assert main(["plugins", "show", "acme-kernels:acme", "--json"]) == 0
    (shown,) = json.loads(capsys.readouterr().out)
    assert shown["serves"]["qk_norm"] == [True, False]
    assert shown["serves"]["mlp_bias"] == [False]
    assert shown["kernels"] == ["prefill_layer", "decode_layer", "head"]
    assert shown["sources"]["head"] == str(sources["head"])


BROKEN = "import pypto.language as pl\n\n\ndef head(:\n"
FILE = "__import__('pathlib').Path(__file__)"
BESIDE = f"{FILE}.with_name"
HEAD = "{**shipped(model_config, runtime_config).sources, 'head': "


@pytest.mark.parametrize(
    ("new", "problem"),
    [
        ("return 1", "kernel_set() must return a KernelSet, found 1"),
        ("raise KeyError('x')", "kernel_set() failed: KeyError: 'x'"),
        (
            f"{MAKES}sources={HEAD}{BESIDE}('none.py')}})",
            "none.py: No such file or directory: expected kernel source",
        ),
        (
            f"{MAKES}sources={HEAD}{BESIDE}('acme_broken.py')}})",
            "acme_broken.py:4: invalid",
        ),
        (f"{MAKES}sources={HEAD}{FILE}}})", "acme_kernels.py has no function head"),
        (
            f"{MAKES}constants={{'head': {{}}}})",
            "has kernels head: expected prefill_layer and head",
        ),
    ],
)
def test_check_says_why_a_set_is_broken(site: Install, capsys: Any, new: str, problem: str) -> None:
    made = distribution("acme-kernels", "acme", (MADE, new))
    site(evolve(made, files={**made.files, "acme_broken.py": BROKEN}))
    assert main(["plugins", "check", "--json"]) == 1
    found = {(r["kind"], r["name"]): r for r in json.loads(capsys.readouterr().out)}
    broken = found["kernels", "acme"]
    assert broken["state"] == "broken"
    assert broken["problem"].startswith(WHO)
    assert problem in broken["problem"]
    assert found["kernels", "qwen3"]["state"] == "ok"


def test_a_set_for_other_sizes_than_those_that_are_tried_is_not_broken(
    site: Install, capsys: Any
) -> None:
    site(distribution("acme-kernels", "acme", (MADE, "raise ValueError('hidden must be 64')")))
    assert main(["plugins", "check", "--json"]) in (0, 1)
    found = {(r["kind"], r["name"]): r for r in json.loads(capsys.readouterr().out)}
    assert found["kernels", "acme"]["state"] == "ok"
    assert main(["plugins", "show", "acme"]) == 0
    shown = capsys.readouterr().out
    assert "refuses: kernel set 'acme' of acme-kernels 1.0: hidden must be 64" in shown


def test_every_family_can_be_inspected() -> None:
    from tilewright import hookimpl
    from tilewright.types import ServedModels

    asked: list[ModelConfig] = []

    class Refusing:
        tilewright_api = 2

        @hookimpl
        def served_models(self) -> ServedModels:
            return ServedModels(
                qk_norm=(True,),
                qkv_bias=(True,),
                output_bias=(True,),
                mlp_bias=(True,),
                sliding_windows=(True,),
                rope_kinds=("yarn",),
            )

        @hookimpl
        def kernel_set(self, model_config: ModelConfig, runtime_config: RuntimeConfig) -> KernelSet:
            asked.append(model_config)
            raise ValueError("no")

    assert inspected(Refusing(), "the set")[0] is None
    assert {config.hidden_size for config in asked} == {256, 5120}
