"""The suite of loaders finds each of these broken ones, by the test that is meant for it."""

from pathlib import Path
from typing import Any

import conformance_loaders as loaders
import pytest
from attrs import evolve
from conformance import Fault, full_name, missed, run
from conformance_loaders import Configured, Through

from tilewright.types import RopeConfig
from tilewright_testing import LoaderSuite
from tilewright_testing.models import make_model

# name, plugin, test that fails, words of the failure
_FAULTS: list[tuple[str, Any, str, str]] = [
    (
        "leaves a mark",
        loaders.LEAVES_A_MARK,
        "can_load_is_cheap_and_has_no_side_effects",
        r"side effect.*\.seen",
    ),
    (
        "imports torch",
        loaders.IMPORTS_TORCH,
        "can_load_is_cheap_and_has_no_side_effects",
        "must not import torch",
    ),
    (
        "reads the weights",
        loaders.READS_THE_WEIGHTS,
        "can_load_is_cheap_and_has_no_side_effects",
        "must not read weights",
    ),
    (
        "stumbles over names",
        loaders.STUMBLES_OVER_NAMES,
        "can_load_is_cheap_and_has_no_side_effects",
        "NotADirectory",
    ),
    (
        "asks the network",
        loaders.ASKS_THE_NETWORK,
        "can_load_is_cheap_and_has_no_side_effects",
        "socket.connect",
    ),
    (
        "takes any directory",
        loaders.LoadsAnyDirectory(),
        "can_load_is_false_for_other_sources",
        "empty directory",
    ),
    (
        "takes plain names only",
        loaders.LoadsPlainNames(),
        "can_load_is_true_for_its_source",
        "found False",
    ),
    (
        "answers with a name",
        loaders.AnswersWithAName(),
        "can_load_is_true_for_its_source",
        "acme.json",
    ),
    ("reads all", Through(loaders.ReadsAll), "weights_are_not_read_before_get", "21 of 21"),
    (
        "reads the embedding",
        Through(loaders.ReadsTheEmbedding),
        "weights_are_not_read_before_get",
        "embed_tokens",
    ),
    ("stays open", Through(loaders.StaysOpen), "closing_closes_the_files", "acme.json stayed open"),
    (
        "shortens names",
        Through(loaders.ShortNames),
        "the_weights_have_the_names",
        "missing: model.embed_tokens",
    ),
    ("transposes", Through(loaders.Transposes), "the_weights_have_the_names", "wrong, expected"),
    (
        "keeps the name in an attribute",
        Through(loaders.KeepsTheName),
        "a_read_that_another_thread_interrupts",
        "returned other values",
    ),
    (
        "transposes square matrices",
        Through(loaders.TransposesSquares),
        "the_weights_have_the_values",
        "o_proj.weight must have the stated values .*: it looks transposed",
    ),
    (
        "swaps q and k",
        Through(loaders.SwapsQAndK),
        "the_weights_have_the_values",
        "q_proj.weight must have .*: it looks taken from model.layers.0.self_attn.k_proj.weight",
    ),
    (
        "scales square matrices along the other axis",
        loaders.Quantised(loaders.ScalesColumnsWhereTheyFit),
        "the_weights_have_the_values",
        "q_proj.weight must have .*: it looks scaled along the other axis",
    ),
    (
        "forgets the scale",
        loaders.Quantised(loaders.ForgetsTheScale),
        "the_weights_have_the_values",
        "must have the stated values within 0.0039",
    ),
    (
        "scales each matrix alike",
        loaders.Quantised(loaders.ScalesEachMatrixAlike),
        "the_weights_have_the_values",
        "must have the stated values within 0.0039",
    ),
    (
        "states a large error",
        loaders.StatesALargeError(),
        "the_samples_values_would_show",
        "within its tolerance of 0.9 these",
    ),
    (
        "writes ones",
        loaders.WritesOnes(),
        "the_samples_values_would_show",
        "such as model.embed_tokens.weight taken from lm_head.weight: write random weights",
    ),
    (
        "states some tensors",
        loaders.Stating(
            lambda sample: evolve(sample, tensors=dict(list(sample.tensors.items())[:3]))
        ),
        "the_weights_have_the_values",
        "must name the tensors",
    ),
    (
        "states a directory",
        loaders.Stating(lambda sample: sample.source),
        "can_load_is_true",
        "must return a tilewright.types.Sample",
    ),
    ("widens", Through(loaders.Widens), "info_matches_the_tensors_that_get_returns", "float64"),
    (
        "writes an index",
        Through(loaders.WritesAnIndex),
        "opening_and_reading_do_not_change_files",
        "index.json",
    ),
    (
        "answers an unknown name with nothing",
        Through(loaders.AnswersWithNothing),
        "an_unknown_name_raises_key_error",
        "must raise KeyError",
    ),
    (
        "gives a table",
        loaders.GivesATable(),
        "it_returns_a_loaded_model_with_fields_of",
        "must return a LoadedModel",
    ),
    (
        "warns at length",
        loaders.WarnsAtLength(),
        "it_returns_a_loaded_model_with_fields_of",
        "must be one line",
    ),
    ("has no heads", Configured(num_kv_heads=0), "the_configuration_is_consistent", "num_kv_heads"),
    (
        "groups heads unevenly",
        Configured(num_kv_heads=3),
        "the_configuration_is_consistent",
        "multiple of num_kv_heads",
    ),
    (
        "counts layers wrong",
        Configured(num_layers=3),
        "the_weights_have_the_names",
        r"missing: model\.layers\.2",
    ),
    ("knows one eos id", Configured(eos_token_ids=2), "token_ids_are_within", "must be a tuple"),
    ("ends past the end", Configured(eos_token_ids=(131,)), "token_ids_are_within", "0 to 130"),
    (
        "ends a turn past the end",
        loaders.EndsATurnPastTheEnd(),
        "token_ids_are_within",
        "turn_end_ids must be from 0 to 130",
    ),
    (
        "adds a token past the end",
        loaders.AddsATokenPastTheEnd(),
        "token_ids_are_within",
        "below vocab_size = 131, found 131",
    ),
    (
        "cuts prompts",
        loaders.Cuts(),
        "the_tokenizer_does_not_truncate_or_pad",
        "truncation must be off",
    ),
    (
        "has a broken template",
        loaders.HasABrokenTemplate(),
        "the_chat_template_is_valid_jinja",
        "must be valid Jinja",
    ),
    (
        "sets the default dtype",
        loaders.SetsTheDefaultDtype(),
        "loading_leaves_the_process_unchanged",
        "default dtype",
    ),
    (
        "changes directory",
        loaders.GoesThere(),
        "loading_leaves_the_process_unchanged",
        "the working directory",
    ),
    (
        "remembers models",
        loaders.Remembers(),
        "loading_twice_gives_equal_models",
        "its own weights",
    ),
    (
        "finds the format itself",
        loaders.FindsTheFormatItself(),
        "a_named_weight_format_opens_the_weights",
        "must be passed",
    ),
    (
        "wants one format",
        loaders.WantsOneFormat(),
        "a_named_weight_format_opens_the_weights",
        "without a name, found",
    ),
    (
        "fails as Python does",
        loaders.FailsAsPythonDoes(),
        "a_truncated_file_raises_model_error[to half its size]",
        "not JSONDecodeError",
    ),
    (
        "fails for what is not there",
        loaders.FailsAsPythonDoes(),
        "an_invalid_source_raises_model_error",
        "not FileNotFoundError",
    ),
    (
        "says it at length",
        loaders.SaysItAtLength(),
        "an_invalid_source_raises_model_error",
        "one line",
    ),
    (
        "loads nothing too",
        loaders.LoadsNothingToo(),
        "an_invalid_source_raises_model_error",
        "must raise Model",
    ),
]

FAULTS = [
    Fault(name, plugin, full_name(LoaderSuite, test), why=why)
    for name, plugin, test, why in _FAULTS
]
SUITE = LoaderSuite


def test_each_broken_loader_is_found() -> None:
    assert missed(SUITE, FAULTS) == []


def test_a_right_loader_passes(tmp_path: Path) -> None:
    model = make_model("qkv-biases", dtype="bfloat16")
    loaders.write(model, tmp_path)
    found = run(SUITE, loaders.RIGHT, source=tmp_path, expected=model).found
    # The model has no chat template.
    assert [name for name, outcome in found.items() if outcome != "passed"] == [
        "test_the_chat_template_is_valid_jinja"
    ]


def test_a_loader_that_reads_its_files_wrong_is_found(tmp_path: Path) -> None:
    model = make_model("grouped", rope=RopeConfig(theta=5e5))
    loaders.write(model, tmp_path)
    given = {"source": tmp_path, "expected": model}
    test = full_name(SUITE, "the_loaded_model_matches_the_expected_one")
    faults = [
        Fault("loses the RoPE", loaders.LosesTheRope(), test, given, "configuration"),
        Fault("has another epsilon", Configured(norm_eps=1e-6), test, given, "configuration"),
        Fault("widens", Through(loaders.Widens), test, given, "must equal that of"),
    ]
    assert missed(SUITE, faults) == []


def test_a_right_loader_of_quantised_weights_passes() -> None:
    found = run(SUITE, loaders.QUANTISED).found
    assert {name: outcome for name, outcome in found.items() if outcome != "passed"} == {
        "test_the_chat_template_is_valid_jinja": "skipped",  # the model has none
        "test_the_loaded_model_matches_the_expected_one": "skipped",  # not given
    }


@pytest.mark.parametrize(
    ("plugin", "skipped"),
    [
        (loaders.Stating(lambda sample: evolve(sample, tensors=None)), ["values", "mistake"]),
        (loaders.WritesWithoutSquares(), ["mistake"]),
    ],
    ids=["no tensors", "no square matrix"],
)
def test_what_a_sample_does_not_show_is_not_tested(plugin: Any, skipped: list[str]) -> None:
    tests = {
        "values": full_name(SUITE, "the_weights_have_the_values"),
        "mistake": full_name(SUITE, "the_samples_values_would_show"),
    }
    found = run(SUITE, plugin, [*tests.values()]).found
    assert found == {
        test: "skipped" if what in skipped else "passed" for what, test in tests.items()
    }


def test_a_loader_without_a_sample_is_hardly_tested() -> None:
    class Bare(loaders.Loader):
        write_sample = None  # type: ignore[assignment]

    test = full_name(SUITE, "can_load_is_true_for_its_source")
    assert run(SUITE, Bare(), [test]).found == {test: "skipped"}
