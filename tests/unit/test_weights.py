"""Which tensors a model needs, and the error for a source that does not have them."""

from collections.abc import Collection

import pytest
import torch
from attrs import evolve
from reference_models import CONFIGS
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import AutoModelForCausalLM

from tilewright.errors import ModelError
from tilewright.types import (
    GenerateConfig,
    LoadedModel,
    ModelConfig,
    RopeConfig,
    TensorInfo,
    TextAssets,
)
from tilewright.weights import (
    MeteredSource,
    StoredRows,
    check_tensors,
    expected_tensors,
    needed_tensors,
    printable,
)
from tilewright_hf.architecture import model_config
from tilewright_hf.files import JsonObject

CONFIG = ModelConfig(
    architecture="ToyForCausalLM",
    vocab_size=11,
    hidden_size=8,
    intermediate_size=6,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    norm_eps=1e-6,
    rope=RopeConfig(),
    max_position_embeddings=32,
    dtype="float32",
)


class Dictionary:
    """A tensor source over tensors in memory."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float32):
        self.tensors = {name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}

    def names(self) -> Collection[str]:
        return self.tensors.keys()

    def info(self, name: str) -> TensorInfo:
        tensor = self.tensors[name]
        return TensorInfo(
            shape=tuple(tensor.shape),
            dtype=str(tensor.dtype).removeprefix("torch."),
            nbytes=tensor.nbytes,
            location="memory",
        )

    def get(self, name: str) -> Tensor:
        raise AssertionError("checking reads no weights")

    def close(self) -> None:
        pass


def of(shapes: dict[str, tuple[int, ...]]) -> LoadedModel:
    return LoadedModel(
        config=CONFIG,
        weights=Dictionary(shapes),
        text=TextAssets(tokenizer=Tokenizer(WordLevel({}, unk_token="?"))),
        generation_defaults=GenerateConfig(),
        source="/models/toy",
    )


def problem(source: Dictionary, config: ModelConfig = CONFIG) -> str:
    with pytest.raises(ModelError) as error:
        check_tensors(source, config, "/models/toy")
    message = str(error.value)
    assert message.startswith("/models/toy: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", CONFIGS)
def test_the_expected_tensors_match_the_transformers_model(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS[name])
    config, _ = model_config(JsonObject("config.json", CONFIGS[name].to_dict()))
    parameters = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    assert expected_tensors(config) == parameters


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_exactly_the_expected_tensors_pass(dtype: torch.dtype) -> None:
    check_tensors(Dictionary(expected_tensors(CONFIG), dtype), CONFIG, "here")


def test_missing_and_misshapen_tensors_are_named_with_their_shapes() -> None:
    shapes = expected_tensors(CONFIG)
    del shapes["model.layers.1.mlp.up_proj.weight"]
    shapes["model.layers.0.self_attn.k_proj.weight"] = (16, 8)
    shapes["model.layers.2.mlp.up_proj.weight"] = (6, 8)
    message = problem(Dictionary(shapes))
    assert "missing: model.layers.1.mlp.up_proj.weight [6, 8]" in message
    assert "model.layers.0.self_attn.k_proj.weight [8, 8], found [16, 8] in memory" in message
    assert "layers.2" not in message


def test_a_tensor_with_a_wrong_dtype_is_named() -> None:
    source = Dictionary(expected_tensors(CONFIG))
    source.tensors["model.norm.weight"] = torch.zeros(8, dtype=torch.int8)
    assert "model.norm.weight in a floating dtype, found int8 in memory" in problem(source)


def test_a_long_list_of_tensors_is_shortened_in_the_error() -> None:
    message = problem(Dictionary({}), evolve(CONFIG, num_layers=500))
    assert "and 4499 more" in message
    assert len(message) < 1000


def test_a_missing_output_head_suggests_tie_word_embeddings() -> None:
    shapes = expected_tensors(CONFIG)
    del shapes["lm_head.weight"]
    assert "tie_word_embeddings = true" in problem(Dictionary(shapes))
    check_tensors(Dictionary(shapes), evolve(CONFIG, tie_word_embeddings=True), "here")


def test_names_of_tensors_are_escaped_and_shortened() -> None:
    name = "new\nline"
    loaded = needed_tensors(of(expected_tensors(CONFIG) | {name: (1,), "x" * 100_000: (2,)}))
    (warning,) = loaded.warnings
    assert len(warning) < 400
    assert warning.isprintable()
    assert set(loaded.weights.names()) == set(expected_tensors(CONFIG))
    message = problem(Dictionary(expected_tensors(CONFIG) | {f"{name}.up_proj.qweight": (1,)}))
    assert "the weights are quantised" in message
    assert printable("model.norm.weight") == "model.norm.weight"
    assert printable("\ud800").isascii()


def test_a_metered_source_reports_bytes_read_and_total() -> None:
    source = Dictionary({"a": (2, 3), "b": (5,)})
    source.get = lambda name: source.tensors[name]  # type: ignore[method-assign]
    heard: list[tuple[str, int, int]] = []
    metered = MeteredSource(source, lambda *event: heard.append(event))
    assert set(metered.names()) == {"a", "b"}
    assert metered.get("b") is source.tensors["b"]
    assert metered.get("a") is source.tensors["a"]
    assert heard == [("b", 20, 44), ("a", 44, 44)]


def test_rows_of_a_stored_matrix_are_read_alone_where_its_source_can() -> None:
    source = Dictionary({"a": (4, 2)})
    whole = torch.arange(8.0).view(4, 2)
    reads: list[object] = []

    def get(name: str) -> torch.Tensor:
        reads.append(name)
        return whole

    source.get = get  # type: ignore[method-assign]
    rows = StoredRows(source, "a")
    assert rows.shape == (4, 2)
    assert torch.equal(rows[1:3], whole[1:3])
    assert torch.equal(rows[2:9], whole[2:])
    assert reads == ["a"]

    def get_rows(name: str, start: int, stop: int) -> torch.Tensor:
        reads.append((start, stop))
        return whole[start:stop]

    source.get_rows = get_rows  # type: ignore[attr-defined]
    heard: list[tuple[str, int, int]] = []
    metered = MeteredSource(source, lambda *event: heard.append(event))
    rows = StoredRows(metered, "a")
    assert torch.equal(torch.cat((rows[:3], rows[3:])), whole)
    assert reads == ["a", (0, 3), (3, 4)]
    assert heard == [("a", 24, 32), ("a", 32, 32)]
