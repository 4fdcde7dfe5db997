"""A model that is split by layers over two processes."""

import pytest
import torch
from split_model import PAGE_SIZE, Process, Split, make_part

from tilewright import GenerateConfig, LLMEngine, RuntimeConfig, hookimpl
from tilewright.errors import ExecutorError
from tilewright.settings import DEMO_MODEL
from tilewright_testing.models import make_model
from tilewright_testing.paged import Sequences
from tilewright_torch import plugin as torch_plugin

SPLITS = [(range(1), range(1, 3)), (range(2), range(2, 3))]


@pytest.fixture(scope="module")
def processes():
    made = [Process(), Process()]
    yield made
    for process in made:
        process.end()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("parts", SPLITS)
def test_two_parts_give_the_bits_of_the_whole(processes, parts, tied, dtype):
    model = {"config": "grouped", "dtype": dtype, "seed": 4, "tie_word_embeddings": tied}
    config = make_model(**model).config
    whole = make_part(model, dtype, range(3))
    split = Split(config, processes, parts, model, dtype)
    for executor in (whole, split):
        executor.allocate_kv(8)
    sequences = Sequences(PAGE_SIZE, total_pages=8, shuffled=True)
    for tokens, rows in (
        ({"a": [5, 6, 7, 8, 9, 10], "b": [11, 12]}, [0, 5, 7]),
        ({"a": [13], "b": [14, 15, 16, 17]}, None),
        ({"a": [18], "b": [19]}, [0, 1]),
        ({"b": [20]}, []),
    ):
        batch = sequences.batch(tokens, rows)
        assert torch.equal(split.forward(batch), whole.forward(batch))
    for layer in range(3):
        for side in ("key", "value"):
            caches = [getattr(e.read_kv(layer, range(8)), side) for e in (whole, split)]
            assert torch.equal(*caches)
    split.write_kv(2, [3], whole.read_kv(0, [5]))
    assert torch.equal(split.read_kv(2, [3]).key, whole.read_kv(0, [5]).key)


def test_a_part_has_the_weights_of_its_layers_and_what_lies_at_its_ends(processes):
    first, last = (make_part({"config": "grouped"}, "float32", part) for part in SPLITS[0])
    batch = Sequences(PAGE_SIZE, total_pages=1).batch({"a": [5, 6]})
    with pytest.raises(ExecutorError, match="has no embedding: layer 0 is in another part"):
        last.embed(last.begin(batch))
    with pytest.raises(ExecutorError, match="has no head: the last layer is in another part"):
        first.run_head(first.begin(batch), torch.zeros(2, 48))
    for part in (first, last):
        with pytest.raises(ExecutorError, match="run it layer by layer"):
            part.forward(batch)
    assert first.weight("model.embed_tokens.weight").shape == (131, 48)
    for part, name in (
        (first, "lm_head.weight"),
        (first, "model.norm.weight"),
        (last, "model.embed_tokens.weight"),
        (last, "model.layers.0.input_layernorm.weight"),
    ):
        with pytest.raises(KeyError):
            part.weight(name)


@pytest.mark.parametrize("parts", SPLITS)
def test_the_engine_generates_with_a_split_model(processes, monkeypatch, parts):
    @hookimpl
    def create_executor(model_config, runtime_config):
        return Split(model_config, processes, parts, None, runtime_config.weight_dtype)

    prompts = ["We hold these truths", "When in the Course of human events,", "He"]
    config = GenerateConfig(max_new_tokens=10, logprobs=2, temperature=1.0, seed=3)
    runtime = RuntimeConfig(page_size=PAGE_SIZE, total_pages=64, max_batch_tokens=9)
    results = []
    for _ in range(2):
        with LLMEngine.from_plugins() as engine:
            engine.init_model("demo", DEMO_MODEL, runtime)
            results.append(engine.generate_batch("demo", prompts, config))
            devices = engine.model("demo").runtime.device
        monkeypatch.setattr(torch_plugin, "create_executor", create_executor)
    assert devices == "two processes"
    for whole, split in zip(*results, strict=True):
        assert split.token_ids == whole.token_ids
        assert split.logprobs == whole.logprobs
