from typing import Any

import pytest

from tilewright import GenerateConfig, LLMEngine, RuntimeConfig, plugins
from tilewright.settings import DEMO_MODEL
from tilewright_testing import KvAllocatorSuite

NAME = "tilewright-my-plugin:my-plugin"


class TestConformance(KvAllocatorSuite):
    @pytest.fixture
    def plugin(self) -> str:
        return NAME


def test_the_lowest_free_pages_are_handed_out_first() -> None:
    plugin: Any = plugins.load(plugins.find("kv_allocator", NAME))
    cache = plugin.create_kv_allocator(num_pages=8, page_size=4)
    for name, num_tokens in (("a", 8), ("b", 8), ("c", 12)):
        cache.allocate(name, [1], max_cached=0)
        cache.extend(name, num_tokens)
        if name == "b":
            cache.free("a")
    assert [list(cache.pages(name)) for name in "bc"] == [[2, 3], [0, 1, 4]]


def test_texts_are_those_of_the_shipped_cache() -> None:
    prompts = ["We the People", "When in the Course of human events", "Congress"]
    said = []
    for allocator in ("paged", NAME):
        with LLMEngine.from_plugins(kv_allocator=allocator) as engine:
            engine.init_model("m", DEMO_MODEL, RuntimeConfig(page_size=4))
            results = engine.generate_batch("m", prompts, GenerateConfig(max_new_tokens=12))
            said.append([result.text for result in results])
    assert said[0] == said[1]
