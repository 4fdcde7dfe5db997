"""A comparison finds what is wrong where it is wrong, and nothing where nothing is.

Mistakes are planted in an executor that is right without them, and that adds up and rounds in
another order than the reference: planted.py, which run as a program prints what is found of each.
"""

import random
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import planted
import pytest
import torch
import torch.nn.functional as F
import transformers
from attrs import evolve
from planted import MISTAKES, Plant, Way, installed, plants
from reference_models import CONFIGS, prompts, write_model
from transformers import (
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from tilewright import hookimpl
from tilewright.errors import ConfigError
from tilewright.settings import DEMO_MODEL
from tilewright.types import ExecutorLimits, RuntimeConfig
from tilewright_compare import Choice, Comparison, Tolerance, compare
from tilewright_compare.advice import advice
from tilewright_compare.layer import Case, Operations
from tilewright_compare.record import record
from tilewright_compare.report import coverage_lines, missing_lines, perplexity_lines, text

TORCH = Choice(executor="torch")
PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15], [7, 8, 9], [30, 20, 10, 90]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where models are written; ``planted`` is installed meanwhile, and torch has one thread."""
    transformers.logging.disable_progress_bar()
    folder = tmp_path_factory.mktemp("models")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are tiny
    with installed(folder):
        yield folder
    torch.set_num_threads(threads)


def by_mistake() -> dict[str, list[Plant]]:
    """All but those in the bundled model."""
    found = defaultdict(list)
    for model in ("qwen3-square", "qwen3-tied", "qwen2-tied", "llama-llama3", "mistral-slides"):
        for plant in plants(model):
            found[plant.mistake].append(plant)
    return found


ONE_EACH = [p[i % len(p)] for i, p in enumerate(by_mistake().values())]
IN_THE_DEMO = list(plants("demo"))[::16]


def test_every_mistake_is_planted():
    assert {p.mistake for p in ONE_EACH} == set(MISTAKES)


@pytest.mark.parametrize("plant", ONE_EACH + IN_THE_DEMO, ids=str)
def test_a_planted_mistake_is_found_in_its_layer_phase_and_stage_and_named(
    plant: Plant, models: Path
):
    found = plant.compare(models)
    assert not found.equal
    assert found.divergence is not None
    assert plant.located(found), found.sentence
    assert plant.staged(found), found.sentence
    assert found.reason is not None
    assert found.reason.broken == ()
    assert plant.explained(found) == bool(MISTAKES[plant.mistake].cause), found.reason.best[:3]
    wrong = [w.name for w in found.weights if not w.passed]
    packed = MISTAKES[plant.mistake].weight
    if packed and plant.phase == "both":
        assert wrong[0].startswith(f"model.layers.{plant.layer}.")
        assert wrong[0].endswith(packed)
        assert found.sentence.startswith(f"weight {wrong[0]} is packed wrongly: ")
    else:
        assert wrong == []
        place = found.divergence.place
        assert f"in {place.phase} step {place.step}, {place.tensor}" in found.sentence
        if place.stage in ("k_cache", "v_cache"):
            whose = r"\(prompt-\d, token \d+, KV head \d+, slot \d+\)"
            assert re.search(whose, found.sentence), found.sentence


@pytest.mark.slow
def test_all_mistakes_in_all_models(models: Path):
    """The table of ``python tests/support/planted.py`` in figures."""
    from planted import MODELS

    all_plants = [plant for model in MODELS for plant in plants(model)]
    found = [(plant, plant.compare(models)) for plant in all_plants]
    assert [str(p) for p, comparison in found if not p.located(comparison)] == []
    unstaged = [str(p) for p, comparison in found if not p.staged(comparison)]
    assert len(unstaged) <= len(found) // 12, unstaged
    unexplained = [str(p) for p, comparison in found if not p.explained(comparison)]
    assert len(unexplained) <= len(found) // 6, unexplained


def a_model(seed: int) -> PreTrainedConfig:
    """A small model of some family: any grouping of heads, tied or not, wide heads or narrow."""
    choose = random.Random(seed)
    make = choose.choice([Qwen3Config, Qwen2Config, LlamaConfig, MistralConfig])
    kv_heads, group = choose.choice([1, 2, 3]), choose.choice([1, 2, 5])
    heads = kv_heads * group
    head_dim = choose.choice([8, 16, 24])
    more: dict[str, Any] = {} if make is Qwen2Config else {"head_dim": head_dim}
    hidden = heads * choose.choice([4, 8, 12])
    hidden *= -(-32 // hidden)  # wide enough that the errors of a row differ
    if make is MistralConfig:
        more["sliding_window"] = choose.choice([None, 5])
    return make(
        vocab_size=choose.choice([97, 131, 256]),
        hidden_size=hidden,
        intermediate_size=choose.choice([56, 83, 144]),
        num_hidden_layers=choose.choice([1, 2, 3, 4]),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        rms_norm_eps=choose.choice([1e-5, 1e-6]),
        tie_word_embeddings=choose.random() < 0.5,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": choose.choice([1e4, 1e6])},
        bos_token_id=1,
        eos_token_id=2,
        **more,
    )


def compared(
    config: PreTrainedConfig, directory: Path, executor: str, seed: int, **runtime: Any
) -> Comparison:
    choose = random.Random(-seed)
    write_model(config, directory, seed=seed)
    lengths = [choose.randint(1, 14) for _ in range(choose.randint(1, 4))]
    return compare(
        directory,
        TORCH,
        Choice(executor=executor, runtime=RuntimeConfig(**runtime)),
        list(prompts(config, lengths, seed)),
        new_tokens=choose.randint(2, 4),
        chunk=choose.choice([3, 8, 64]),
        isolate=True,
    )


def unfounded(found: Comparison) -> list[str]:
    """What a comparison finds wrong with a correct candidate."""
    assert found.finished
    wrong = [f"{w.name}: {w.why}" for w in found.weights if not w.passed]
    return wrong + [f"{f.place}: {f.why}" for f in found.findings if not f.passed]


DTYPES = ("bfloat16", "float32")


@pytest.mark.parametrize(("seed", "dtype"), [(seed, DTYPES[seed % 2]) for seed in range(8)])
def test_another_order_of_arithmetic_is_no_mistake(seed: int, dtype: str, models: Path):
    page_size = (1, 3, 4, 16)[seed // 2 % 4]
    directory = models / f"right-{seed}-{dtype}"
    found = compared(
        a_model(seed), directory, "planted", seed, weight_dtype=dtype, page_size=page_size
    )
    assert unfounded(found) == []
    assert found.equal


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(8, 225))
def test_another_order_of_arithmetic_in_many_more_models(seed: int, dtype: str, models: Path):
    test_another_order_of_arithmetic_is_no_mistake(seed, dtype, models)


@pytest.mark.parametrize(
    ("name", "layers"), [("qwen3-tied", 40), pytest.param("llama-mha", 80, marks=pytest.mark.slow)]
)
def test_rounding_that_grows_over_many_layers_is_no_mistake(name: str, layers: int, models: Path):
    config = CONFIGS[name]
    deep = type(config)(**config.to_dict() | {"num_hidden_layers": layers, "layer_types": None})
    found = compared(deep, models / f"deep-{layers}", "planted", layers, weight_dtype="bfloat16")
    assert unfounded(found) == []
    outputs = {
        f.place.layer: f.baseline.relative_rms
        for f in found.findings
        if f.place.mode == "chained" and f.place.stage == "output" and f.baseline
    }
    assert outputs[layers - 1] > 2 * outputs[0], "the baseline's own error does not grow"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_an_executor_is_equal_to_itself_in_pages_of_another_size(dtype: str):
    candidate = Choice(executor="torch", runtime=RuntimeConfig(weight_dtype=dtype, page_size=3))
    found = compare(DEMO_MODEL, TORCH, candidate, PROMPTS, new_tokens=4, chunk=8, isolate=True)
    assert unfounded(found) == []
    assert found.dtype == dtype
    assert max(f.excess for f in found.findings) < 1
    assert len(found.weights) > 30


@pytest.mark.parametrize("model", ["demo", "small"])
def test_pypto_npu_emulated_is_equal_to_torch(model: str, models: Path):
    directory = DEMO_MODEL
    if model == "small":
        directory = models / "small"
        config = Qwen3Config(
            vocab_size=131,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=128,
            bos_token_id=1,
            eos_token_id=2,
        )
        write_model(config, directory, dtype="bfloat16")
    candidate = Choice(executor="pypto-npu", options={"platform": "emulated"})
    found = compare(directory, TORCH, candidate, PROMPTS, new_tokens=4, chunk=8, isolate=True)
    assert unfounded(found) == []
    assert found.weights
    assert {f.place.mode for f in found.findings} == {"chained", "isolated", "untapped"}
    stages = {f.place.stage for f in found.findings}
    assert stages == {"embed", "k_cache", "v_cache", "output", "logits"}


def plant(mistake: str, **place: Any) -> Plant:
    where = {"model": "qwen3-tied", "dtype": "float32", "phase": "both", "layer": 1} | place
    return Plant(mistake=mistake, **where)


def test_steps_stay_comparable_after_a_disagreement(models: Path):
    """Both sides get the truth's tokens: what is not wrong itself is right in later steps too."""
    found = plant("head tied by mistake", model="qwen3-square").compare(models)
    assert not all(row.same_argmax for row in found.logits)
    assert {f.place.stage for f in found.findings if not f.passed} == {"logits"}
    assert {f.place.phase for f in found.findings} == {"prefill", "decode", "mixed"}


def test_alone_only_the_layer_that_is_wrong_is_wrong(models: Path):
    found = plant("scale missing", model="qwen3-six-layers", layer=2).compare(models)
    wrong = {f.place.mode: set() for f in found.findings}
    for finding in found.findings:
        if not finding.passed:
            wrong[finding.place.mode].add(finding.place.layer)
    assert wrong["isolated"] == {2}
    assert wrong["chained"] > {2, 3, 4, 5}


def test_logits_of_a_padded_vocabulary_are_of_another_shape(models: Path):
    found = plant("padded vocabulary wins").compare(models)
    assert "its shape is [2, 144], expected [2, 131]" in found.sentence
    assert found.logits == []


def test_what_no_known_bug_explains_is_said_to_be_so(models: Path):
    reason = plant("activation overflows").compare(models).reason
    assert reason is not None
    assert (reason.named, reason.confidence) == ((), "none")
    assert reason.tried > 100


def test_a_plugin_adds_bug_hypotheses(models: Path, monkeypatch):
    def scaled(case: Case) -> Iterator[tuple[str, Operations]]:
        if case.layer is not None:
            yield "the MLP is halved", Operations(activation=lambda g, u: F.silu(g) * u / 2)

    def unable(case: Case) -> Iterator[tuple[str, Operations]]:
        raise RuntimeError("no such case")

    halved = evolve(MISTAKES["gelu for silu"], way=Way(activation=lambda g, u: F.silu(g) * u / 2))
    monkeypatch.setitem(MISTAKES, "gelu for silu", halved)
    reason = plant("gelu for silu").compare(models).reason
    assert reason is not None
    assert reason.named == ()
    monkeypatch.setattr(
        planted, "hypotheses", hookimpl(lambda: [scaled, unable], specname="hypotheses"), False
    )
    reason = plant("gelu for silu").compare(models).reason
    assert reason is not None
    assert [e.bug for e in reason.named] == ["the MLP is halved"]
    assert reason.confidence == "sure"
    (broken,) = reason.broken
    assert broken.startswith("hypothesis unable failed: RuntimeError: no such case")


def test_a_hook_that_fails_is_named_and_loses_nothing(models: Path, monkeypatch):
    def fails() -> None:
        raise RuntimeError("no file")

    monkeypatch.setattr(planted, "hypotheses", hookimpl(fails, specname="hypotheses"), False)
    reason = plant("scale missing").compare(models).reason
    assert reason is not None
    assert reason.broken[0].startswith("hypotheses of executor 'planted' of acme-planted")
    assert "RuntimeError: no file" in reason.broken[0]
    assert [e.bug for e in reason.named] == ["the attention scale is missing"]


def test_a_weight_that_cannot_be_returned_is_wrong(models: Path, monkeypatch):
    def weight(self, name):
        raise KeyError(name)

    monkeypatch.setattr(planted.PlantedExecutor, "weight", weight)
    found = plant("none").compare(models)
    assert "weight() failed: KeyError" in found.weights[0].why
    assert not found.equal


def test_a_reason_that_does_not_hold_in_later_steps_is_not_named(models: Path, monkeypatch):
    def changing(positions):
        return positions * 0 if bool((positions == 0).any()) else positions + 1

    way = Way(angles=planted.at(changing))
    monkeypatch.setitem(MISTAKES, "RoPE missing", evolve(MISTAKES["RoPE missing"], way=way))
    found = plant("RoPE missing").compare(models)
    assert found.reason is not None
    assert found.reason.best[0].bug == "RoPE is missing"
    assert found.reason.refuted[0] == "RoPE is missing"
    assert found.reason.named == ()


def test_no_bug_is_named_where_rounding_explains_the_layer(models: Path):
    directory = plant("none").directory(models)
    choice = Choice(executor="planted", runtime=RuntimeConfig(weight_dtype="bfloat16"))
    strict = [Tolerance("*", "max_abs", 0.0)]
    found = compare(directory, TORCH, choice, PROMPTS, tolerances=strict)
    assert found.divergence is not None
    assert found.reason is not None
    assert found.reason.unexplained < 1
    assert found.reason.named == ()


def tolerated(models: Path, *tolerances: Tolerance) -> Comparison:
    """A comparison of a model whose layer 1 has an RMSNorm with too large an eps."""
    candidate = plant("eps too large")
    options = {"mistake": candidate.mistake, "layer": 1}
    choice = Choice(executor="planted", options=options)
    directory = candidate.directory(models)
    return compare(directory, TORCH, choice, PROMPTS, new_tokens=2, tolerances=tolerances)


def test_a_tolerance_decides_in_place_of_what_rounding_explains(models: Path):
    assert not tolerated(models).equal
    assert tolerated(models, Tolerance("*", "relative_rms", 0.5)).equal
    assert tolerated(models, Tolerance("*", "cosine", 0.5)).equal
    strict = tolerated(models, Tolerance("layers.0.o_proj", "max_abs", 0.0))
    wrong = {f.place.tensor: f for f in strict.findings if not f.passed}
    assert "its max_abs is " in wrong["layers.0.o_proj"].why
    assert "where at most 0 is tolerated" in wrong["layers.0.o_proj"].why
    assert "layers.1.attn_norm" in wrong, "other tensors keep their limits"


def test_the_first_tolerance_that_fits_a_name_counts(models: Path):
    wide = Tolerance("layers.1.*", "relative_rms", 0.9)
    assert tolerated(models, wide, Tolerance("*", "relative_rms", 0.5)).equal
    assert not tolerated(models, Tolerance("*attn_norm", "max_abs", 0.0), wide).equal


def test_a_tolerance_that_matches_nothing_is_an_error(models: Path):
    with pytest.raises(ConfigError, match=r"'layers.*.atention' matches no tensor.*did you mean"):
        tolerated(models, Tolerance("layers.*.atention", "nmse", 1.0))
    with pytest.raises(ConfigError, match="no figure is named 'rms'"):
        Tolerance("*", "rms", 1.0)


def test_an_executor_that_fails_in_a_step_ends_the_comparison_with_what_there_is(
    models: Path, monkeypatch
):
    run_layer = planted.PlantedExecutor.run_layer

    def fails(self, step, layer, hidden, tap=None):
        if layer == 1 and step.phase == "decode":
            raise ValueError("the queue is full")
        return run_layer(self, step, layer, hidden, tap)

    monkeypatch.setattr(planted.PlantedExecutor, "run_layer", fails)
    found = plant("none").compare(models)
    assert not found.finished
    assert not found.equal
    assert found.sentence.startswith(
        "candidate failed in decode, layer 1: ValueError: the queue is"
    )
    assert len(found.findings) > 40
    assert "test_compare.py" in found.failure, "the place in the plugin's code"


def test_a_stage_that_is_tapped_in_some_layers_only_is_wrong(models: Path, monkeypatch):
    run_layer = planted.PlantedExecutor.run_layer

    def uneven(self, step, layer, hidden, tap=None):
        stages = ("attention",) if layer == 0 else ("o_proj",)
        kept = lambda name, x: None if name.endswith(stages) else tap(name, x)  # noqa: E731
        return run_layer(self, step, layer, hidden, tap and kept)

    monkeypatch.setattr(planted.PlantedExecutor, "run_layer", uneven)
    found = plant("none").compare(models)
    wrong = {f.place.tensor: f.why for f in found.findings if not f.passed}
    assert wrong["layers.1.o_proj"] == "the candidate has no such tensor"
    assert "but not everywhere before" in wrong["layers.1.attention"]


def test_a_chunk_of_one_token_is_run_as_decode_and_called_so(models: Path):
    directory = plant("none").directory(models)
    found = compare(directory, TORCH, Choice(executor="planted"), [[5, 6, 7]], chunk=2)
    assert [f.place.phase for f in found.findings if f.place.tensor == "embed"][:3] == [
        "prefill",
        "decode",
        "decode",
    ]


def test_what_is_not_finite_is_said_to_be(models: Path):
    found = plant("activation overflows").compare(models)
    assert found.divergence is not None
    assert "elements are not finite" in found.divergence.why


# --- without taps ---------------------------------------------------------------------------------


@pytest.fixture
def fused(monkeypatch):
    """Plants a path that forward takes without a tap: a function of the executor, the batch and the
    right logits that returns other logits."""

    forward = planted.PlantedExecutor.forward

    def planted_path(path, **limits: Any) -> None:
        def chosen(self, batch, tap=None):
            logits = forward(self, batch, tap)
            return logits if tap else path(self, batch, logits)

        monkeypatch.setattr(planted.PlantedExecutor, "forward", chosen)
        monkeypatch.setattr(planted, "LIMITS", ExecutorLimits(**limits))

    return planted_path


def wrong_logits(self, batch, logits):
    return logits * 1.1


def wrong_values(self, batch, logits):
    """The values of layer 1 are a tenth too large; the logits are right."""
    slots = batch.slot_mapping.long()
    self._kv[1][1][slots] *= 1.1
    return logits


def writes_nothing(self, batch, logits):
    slots = batch.slot_mapping.long()
    for layer in self._kv:
        for cache in layer:
            cache[slots] = 8.0
    return logits


def in_decode(path):
    return lambda self, batch, logits: (
        path(self, batch, logits) if batch.max_query_len == 1 else logits
    )


@pytest.mark.parametrize("tap_exact", [True, False])
@pytest.mark.parametrize(
    ("path", "phase", "tensor"),
    [
        (wrong_logits, "prefill", "logits"),
        (wrong_values, "prefill", "layers.1.v_cache"),
        (in_decode(wrong_logits), "decode", "logits"),
        (in_decode(wrong_values), "decode", "layers.1.v_cache"),
        (writes_nothing, "prefill", "layers.0.k_cache"),
    ],
    ids=["logits", "cache", "logits in decode", "cache in decode", "nothing written"],
)
def test_what_is_wrong_without_taps_only_is_found_and_said_to_be(
    models: Path, fused, path, phase, tensor, tap_exact
):
    fused(path, tap_exact=tap_exact)
    found = plant("none", phase="both").compare(models)
    first = found.divergence
    assert first is not None
    assert (first.place.mode, first.place.phase, first.place.tensor) == ("untapped", phase, tensor)
    assert found.sentence.startswith(f"right with taps, wrong without: diverges first in {phase}")
    assert {f.place.mode for f in found.findings if not f.passed} == {"untapped"}
    assert {f.place.mode for f in found.findings} == {"chained", "untapped"}, (
        "layers by themselves are not at fault"
    )
    assert not found.equal
    if "cache" in tensor:
        assert re.search(r"\(prompt-\d, token \d+, KV head \d+, slot \d+\)", found.sentence)
    assert ("limits.tap_exact" in first.why) == tap_exact


def rounded_otherwise(self, batch, logits):
    """As after a sum in another order: the last bits of logits and keys are others."""
    slots = batch.slot_mapping.long()
    for keys, _ in self._kv:
        keys[slots] *= 1 + 1e-7
    return logits * (1 + 1e-7)


def test_another_rounding_without_taps_passes_unless_the_bits_are_promised(models: Path, fused):
    fused(rounded_otherwise, tap_exact=False)
    right = plant("none").compare(models)
    assert unfounded(right) == []
    assert right.equal
    without = [f for f in right.findings if f.place.mode == "untapped"]
    assert {f.place.stage for f in without} == {"k_cache", "v_cache", "logits"}
    assert all(f.baseline for f in without)


def test_bits_that_are_promised_must_be_the_same(models: Path, fused):
    fused(rounded_otherwise)
    found = plant("none").compare(models)
    assert found.divergence is not None
    assert found.divergence.place.mode == "untapped"
    assert found.divergence.candidate is not None
    assert 0 < found.divergence.candidate.relative_rms < 1e-6
    assert "though the executor's limits.tap_exact says" in found.sentence


def test_a_tolerance_does_not_excuse_other_bits(models: Path, fused):
    fused(wrong_logits)
    assert not tolerated(models, Tolerance("*", "relative_rms", 0.5)).equal
    fused(wrong_logits, tap_exact=False)
    assert tolerated(models, Tolerance("*", "relative_rms", 0.5)).equal


def test_what_is_wrong_with_taps_comes_before_what_is_wrong_without(models: Path, fused):
    fused(wrong_logits)
    found = plant("scale missing", phase="decode").compare(models)
    assert found.divergence is not None
    assert found.divergence.place.mode == "isolated"
    assert found.first_wrong("untapped") is not None
    assert found.sentence.startswith("diverges first in decode")


def test_a_run_without_taps_leaves_the_cache_of_the_run_with_taps(models: Path, fused):
    """Else what is wrong without taps would be found with taps in later steps."""
    fused(writes_nothing)
    found = plant("none").compare(models)
    wrong = [f.place for f in found.findings if not f.passed]
    assert {place.step for place in wrong} == {f.place.step for f in found.findings}
    assert {place.mode for place in wrong} == {"untapped"}


def test_a_failure_without_taps_is_said_to_be_one(models: Path, fused):
    def fails(self, batch, logits):
        raise ValueError("no such kernel")

    fused(fails)
    found = plant("none").compare(models)
    assert found.sentence.startswith(
        "candidate failed in prefill, without taps: ValueError: no such kernel"
    )


# --- executors without layers ---------------------------------------------------------------------


class Whole:
    """An executor that has ``forward`` only, made of one that runs layer by layer."""

    def __init__(self, executor, wrong):
        self._executor = executor
        self._wrong = wrong

    def __getattr__(self, name):
        if name in ("begin", "embed", "run_layer", "run_head", "weight"):
            raise AttributeError(name)
        return getattr(self._executor, name)

    def forward(self, batch, tap=None):
        logits = self._executor.forward(batch, tap)
        return wrong_values(self._executor, batch, logits) if self._wrong else logits


@pytest.mark.parametrize("wrong", [False, True])
def test_the_cache_of_an_executor_without_layers_is_compared(models: Path, monkeypatch, wrong):
    create = planted.create_executor

    @hookimpl(specname="create_executor")
    def whole(model_config, runtime_config, weights, layers, options):
        return Whole(create(model_config, runtime_config, weights, layers, options), wrong)

    monkeypatch.setattr(planted, "create_executor", whole)
    found = plant("none").compare(models)
    assert found.finished
    assert found.equal != wrong
    assert found.weights == []
    assert {f.place.stage for f in found.findings} >= {"k_cache", "v_cache", "output", "logits"}
    assert {f.place.mode for f in found.findings} == {"chained", "untapped"}
    if wrong:
        assert found.divergence is not None
        place = found.divergence.place
        assert (place.mode, place.step, place.tensor) == ("chained", 0, "layers.1.v_cache")


class Fused(Whole):
    """An executor of one program: ``forward`` only, without a tap but for what is named."""

    def __init__(self, executor, change=None, taps=(), most=None):
        super().__init__(executor, False)
        self._change = change
        self._taps = taps
        self.limits = evolve(executor.limits, max_logits_rows=most)

    def forward(self, batch, tap=None):
        kept = lambda name, x: tap(name, x) if name.endswith(self._taps) else None  # noqa: E731
        logits = self._executor.forward(batch, kept if tap and self._taps else None)
        return self._change(self._executor, batch, logits) if self._change else logits


@pytest.fixture
def one_program(monkeypatch):
    """Makes ``planted`` an executor of one program."""
    create = planted.create_executor

    def make(**how: Any) -> None:
        @hookimpl(specname="create_executor")
        def fused(model_config, runtime_config, weights, layers, options):
            executor = create(model_config, runtime_config, weights, layers, options)
            return Fused(executor, **how)

        monkeypatch.setattr(planted, "create_executor", fused)

    return make


@pytest.mark.parametrize("taps", [(), ("logits",)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_program_without_taps_is_judged_by_cache_logits_and_perplexity(
    models: Path, one_program, dtype, taps
):
    one_program(taps=taps)
    found = plant("none", dtype=dtype).compare(models)
    assert unfounded(found) == []
    assert found.equal
    assert found.fused
    assert {f.place.stage for f in found.findings} == {"k_cache", "v_cache", "logits"}
    assert {"output", "attention"} <= set(found.not_compared)
    assert found.perplexity is not None
    assert found.perplexity.candidate == pytest.approx(found.perplexity.truth, rel=1e-2)
    assert "no layer output is tapped: judged by the KV cache, logits and perplexity" in text(
        found, 80, wrapped=False
    )


def test_one_program_has_the_perplexity_of_its_layers(models: Path, one_program):
    apart = plant("none").compare(models).perplexity
    one_program()
    assert apart is not None
    assert plant("none").compare(models).perplexity == apart


def test_a_wrong_layer_of_one_program_is_found_by_its_cache(models: Path, one_program):
    one_program(change=wrong_values)
    found = plant("none").compare(models)
    assert found.divergence is not None
    place = found.divergence.place
    assert (place.mode, place.phase, place.tensor) == ("chained", "prefill", "layers.1.v_cache")
    assert "layer 0 from its attention on may be wrong too: its output is not tapped" in (
        advice(found)
    )


def wrong_between(self, batch, logits):
    """The logits of all rows but a sequence's last are wrong, as only prompts' scores show."""
    last = torch.isin(batch.logits_rows, batch.query_starts[1:].long() - 1)
    return torch.where(last.unsqueeze(1), logits, logits.flip(1))


def test_the_perplexity_of_one_program_is_judged(models: Path, one_program):
    one_program(change=wrong_between)
    found = plant("none", dtype="bfloat16").compare(models)
    assert all(f.passed for f in found.findings)
    assert not found.equal
    assert found.sentence.startswith(
        "diverges in what no compared tensor shows: the candidate's perplexity of the prompts is "
    )
    assert record(found)["verdict"] == "diverged"
    assert any(line.endswith("!") for line in perplexity_lines(found))


def test_prompts_that_cannot_be_scored_are_said_not_to_be(models: Path, one_program):
    one_program(most=0)
    found = plant("none").compare(models)
    assert found.equal
    assert found.perplexity is None
    assert "scored the prompts" in map(str, found.unreached)
    assert any(
        "scored the prompts (by the candidate: limits.max_logits_rows is 0" in line
        for line in coverage_lines(found)
    )
    assert "no layer output is tapped: judged by the KV cache and logits" in missing_lines(found)


@pytest.mark.parametrize("where", ["layers.0.output", "layers.1.output"])
def test_an_output_that_is_tapped_in_some_layers_only_is_wrong(models: Path, one_program, where):
    one_program(taps=(where, "logits"))
    found = plant("none").compare(models)
    wrong = {f.place.tensor for f in found.findings if not f.passed}
    assert wrong == {"layers.1.output"}


# --- mixed steps ----------------------------------------------------------------------------------


def test_a_mistake_in_mixed_steps_only_is_found_there(models: Path, monkeypatch):
    """The decoding sequences of a mixed step see one token too few."""
    run_layer = planted.PlantedExecutor.run_layer

    def wrong(self, step, layer, hidden, tap=None):
        batch, alone = step.batch, step.batch.query_starts.diff() == 1
        if layer == 1 and not alone.all():
            step = evolve(step, batch=evolve(batch, context_lens=batch.context_lens - alone.int()))
        return run_layer(self, step, layer, hidden, tap)

    monkeypatch.setattr(planted.PlantedExecutor, "run_layer", wrong)
    found = plant("none").compare(models)
    assert found.divergence is not None
    place = found.divergence.place
    assert (place.mode, place.phase, place.layer) == ("isolated", "mixed", 1)
    assert {f.place.phase for f in found.findings if not f.passed} == {"mixed"}


@pytest.mark.parametrize(
    ("runtime", "chunk", "why"),
    [({}, 2, "a step of 2 tokens is too small"), ({"total_pages": 3}, 8, "3 pages, too few")],
)
def test_a_mixed_step_that_cannot_be_run_is_said_not_to_be(models: Path, runtime, chunk, why):
    directory = plant("none").directory(models)
    choice = Choice(executor="planted", runtime=RuntimeConfig(page_size=4, **runtime))
    found = compare(directory, TORCH, choice, [[5, 6, 7, 8, 9, 10]], new_tokens=3, chunk=chunk)
    assert found.equal
    assert "mixed" not in {f.place.phase for f in found.findings}
    assert "mixed prompts and decoding in a step" in found.sentence
    (mixed,) = [item for item in found.coverage if "mixed" in item.name]
    assert (mixed.reached, why in mixed.detail) == (False, True)


def test_an_executor_that_does_not_mix_gets_no_mixed_step(models: Path, monkeypatch):
    monkeypatch.setattr(planted, "LIMITS", ExecutorLimits(mixed=False))
    found = plant("none").compare(models)
    assert found.equal
    assert {f.place.phase for f in found.findings} == {"prefill", "decode"}
    assert not any("mixed" in item.name for item in found.coverage)


def test_progress_counts_the_steps_that_are_run(models: Path):
    told: list[tuple[int, int]] = []
    found = compare(
        plant("none").directory(models),
        TORCH,
        Choice(executor="planted"),
        [[5] * 5, [6], [7] * 9],
        new_tokens=3,
        chunk=4,
        progress=lambda result, what, done, total: told.append((done, total)),
    )
    steps = len({f.place.step for f in found.findings})
    assert {total for _, total in told} == {steps}
    assert (told[0][0], told[-1][0]) == (0, steps)


def test_sampling_by_the_executor_is_said_not_to_be_compared(models: Path, monkeypatch):
    for name in ("serves", "submit"):
        monkeypatch.setattr(planted.PlantedExecutor, name, lambda self: None, raising=False)
    found = plant("none").compare(models)
    assert found.equal
    assert found.sentence.startswith("equal, but never ")
    assert "compared the tokens that the candidate samples itself" in map(str, found.unreached)
