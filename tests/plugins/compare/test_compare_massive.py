"""Models with a massive activation: one element has nearly all of a tensor's norm, so that its
rounding error, one number, is that of the whole tensor."""

from collections.abc import Iterator
from pathlib import Path

import planted
import pytest
import torch
from attrs import evolve
from planted import MISTAKES, Way, changed, installed
from reference_models import prompts, write_model
from transformers import LlamaConfig

from tilewright.types import RuntimeConfig
from tilewright_compare import Choice, Comparison, compare
from tilewright_compare.judge import participation, usual_error

CONFIG = LlamaConfig(
    vocab_size=131,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
)
FIRST = 3
"""Token that has the activation where a prompt begins with it."""
COLUMN, TO = 7, 20
"""The element of ``activation`` in layer 1, and the column of the residual that it is added to."""
PROMPTS = [[FIRST, *p] for p in prompts(CONFIG, [20, 8, 5])]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model in BF16 whose activation is 36 * silu(36) for the first token, while ``planted`` is
    installed."""
    folder = tmp_path_factory.mktemp("massive")
    made = write_model(CONFIG, folder / "model", seed=2)
    mlp = made.model.layers[1].mlp
    inputs: list[torch.Tensor] = []
    mlp.register_forward_pre_hook(lambda module, given: inputs.append(given[0][0, -1]))
    with torch.no_grad():
        made(torch.tensor([[FIRST]]))
        row = 36 * inputs[0] / inputs[0].square().sum()
        mlp.gate_proj.weight[COLUMN] = mlp.up_proj.weight[COLUMN] = row
        mlp.down_proj.weight[:, COLUMN] = 0
        mlp.down_proj.weight[TO, COLUMN] = 1
    made.to(torch.bfloat16).save_pretrained(folder / "model")
    with installed(folder):
        yield folder / "model"


def compared(model: Path, candidate: Choice) -> Comparison:
    reference = Choice(executor="torch")
    return compare(model, reference, candidate, PROMPTS, new_tokens=2, chunk=16, isolate=True)


@pytest.mark.parametrize(
    ("executor", "dtype"), [("planted", "bfloat16"), ("torch", "int8"), ("torch", "int4")]
)
def test_rounding_of_a_massive_activation_is_no_mistake(model, executor, dtype):
    runtime = RuntimeConfig(weight_dtype=dtype)
    found = compared(model, Choice(executor=executor, runtime=runtime))
    assert found.equal, found.sentence


def test_a_scale_of_the_layer_with_a_massive_activation_is_found(model, monkeypatch):
    way = Way(weights=changed("down_proj", lambda weight: 0.98 * weight))
    name = "down in another order"
    monkeypatch.setitem(planted.MISTAKES, name, evolve(MISTAKES[name], way=way, weight=None))
    candidate = Choice(
        executor="planted",
        options={"mistake": name, "layer": 1},
        runtime=RuntimeConfig(weight_dtype="bfloat16"),
    )
    found = compared(model, candidate)
    assert found.divergence is not None
    assert found.divergence.place.layer == 1
    assert found.divergence.place.stage in ("down_proj", "output")


def test_participation_is_the_number_of_equal_squares():
    assert participation(torch.full((7,), 1e300, dtype=torch.float64)) == pytest.approx(7)
    assert participation(torch.tensor([1e6, 1.0, 1.0, 1.0])) == pytest.approx(1, rel=1e-5)
    assert participation(torch.zeros(5)) == 5


def test_the_usual_error_is_the_error_of_normal_numbers_and_no_element_decides_it():
    seed = torch.Generator().manual_seed(0)
    truth = torch.randn(5, 4000, generator=seed)
    baseline = truth + 0.01 * torch.randn(5, 4000, generator=seed)
    whole, worst = usual_error(baseline, truth)
    assert whole == pytest.approx(0.01, rel=0.05)
    assert worst == pytest.approx(0.01, rel=0.1)
    truth[2, 9] = baseline[2, 9] = 1e5
    assert usual_error(baseline, truth)[0] == pytest.approx(0.01, rel=0.1)
