"""The torch executor on a CUDA device. ``benchmarks/cuda.py --check`` runs this file without
``conftest.py``, where only pytest is installed."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tilewright import GenerateConfig, LLMEngine, RuntimeConfig
from tilewright.settings import DEMO_MODEL

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

PROMPTS = [
    "We hold these truths to be self-evident,",
    "When in the Course of human events,",
    "We the People of the United States,",
]
SETTINGS = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 5, "top_p": 0.9},
    {"temperature": 0.8, "seed": 6, "top_k": 20, "min_p": 0.02},
    {"temperature": 1.5, "seed": 7},
    {"temperature": 0.0, "repetition_penalty": 1.3, "logprobs": 2},
]


def loaded(device="cuda", dtype="float32"):
    engine = LLMEngine.from_plugins()
    runtime = RuntimeConfig(weight_dtype=dtype, total_pages=64, device=device)
    engine.init_model("demo", DEMO_MODEL, runtime)
    return engine


def texts(engine, **settings):
    config = GenerateConfig(max_new_tokens=24, ignore_eos=True, **settings)
    return [result.token_ids for result in engine.generate_batch("demo", PROMPTS, config)]


def greedy_texts(_=None):
    with loaded() as engine:
        return texts(engine, temperature=0.0)


def test_texts_are_those_of_the_cpu():
    with loaded("cpu") as cpu, loaded() as cuda:
        for settings in SETTINGS:
            assert texts(cuda, **settings) == texts(cpu, **settings), settings


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtypes_of_16_bits_give_texts(dtype):
    with loaded(dtype=dtype) as engine:
        assert [len(found) for found in texts(engine, temperature=0.0)] == [24, 24, 24]


def test_closing_gives_the_memory_back():
    greedy_texts()  # torch keeps workspaces of cuBLAS
    before = torch.cuda.memory_allocated()
    greedy_texts()
    assert torch.cuda.memory_allocated() <= before + 2**20


def test_two_models_capture_and_replay_at_the_same_time():
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(greedy_texts, range(2))
    assert first == second == greedy_texts()


def test_graphs_are_captured_again_after_all_were_dropped():
    with loaded() as engine:
        executor = engine.model("demo").executor
        found = [texts(engine, temperature=0.0)]
        assert executor._graphs
        executor._graphs.clear()
        found.append(texts(engine, temperature=0.0))
        executor.use_graphs = False
        found.append(texts(engine, temperature=0.0))
    assert found[0] == found[1] == found[2]
