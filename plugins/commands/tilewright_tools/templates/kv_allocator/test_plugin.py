from typing import Any

import pytest

from tilewright import GenerateConfig, LLMEngine, RuntimeConfig, plugins
from tilewright.settings import DEMO_MODEL
from tilewright.types import KvAllocatorRequest, KvCacheSpec
from tilewright_testing import KvAllocatorSuite

NAME = "tilewright-my-plugin:my-plugin"


class TestConformance(KvAllocatorSuite):
    @pytest.fixture
    def plugin(self) -> str:
        return NAME


def test_the_lowest_free_pages_are_handed_out_first() -> None:
    plugin: Any = plugins.load(plugins.find("kv_allocator", NAME))
    spec = KvCacheSpec(num_layers=1, num_kv_heads=1, head_dim=2, page_size=4, dtype="float32")
    request = KvAllocatorRequest(
        spec=spec, total_pages=8, max_sequences=2, max_seq_len=16, options=None
    )
    cache = plugin.create_kv_allocator(request)
    cache.allocate("a", 8)
    cache.allocate("b", 8)
    cache.free("a")
    cache.allocate("c", 12)
    assert cache.block_table(["b", "c"]).tolist() == [[2, 3, -1], [0, 1, 4]]


def test_texts_are_those_of_the_shipped_cache() -> None:
    prompts = ["We the People", "When in the Course of human events", "Congress"]
    said = []
    for allocator in ("paged", NAME):
        with LLMEngine.from_plugins(kv_allocator=allocator) as engine:
            engine.init_model("m", DEMO_MODEL, RuntimeConfig(page_size=4))
            results = engine.generate_batch("m", prompts, GenerateConfig(max_new_tokens=12))
            said.append([result.text for result in results])
    assert said[0] == said[1]
