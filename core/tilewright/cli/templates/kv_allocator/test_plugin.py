from typing import Any

import pytest

from tilewright import registry
from tilewright.testing import KvAllocatorSuite
from tilewright.types import KvAllocatorRequest, KvCacheSpec

NAME = "tilewright-my-plugin:my-plugin"


class TestConformance(KvAllocatorSuite):
    @pytest.fixture
    def plugin(self) -> str:
        return NAME


def test_the_lowest_free_pages_are_handed_out_first() -> None:
    plugin: Any = registry.load(registry.find("kv_allocator", NAME))
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
