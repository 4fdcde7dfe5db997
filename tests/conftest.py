"""What many tests share: engines over the bundled model."""

from collections.abc import Iterator

import pytest
import torch

from tilewright import LLMEngine, RuntimeConfig
from tilewright.config import DEMO_MODEL


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    # Small tensors: more threads than this only wait for each other.
    torch.set_num_threads(2)


@pytest.fixture
def engine() -> Iterator[LLMEngine]:
    """The bundled model as ``demo``, in float32, with pages shorter than any prompt."""
    with LLMEngine.from_plugins() as engine:
        runtime = RuntimeConfig(
            weight_dtype="float32",
            page_size=8,
            total_pages=64,
            max_batch_size=4,
            max_batch_tokens=32,
            max_seq_len=256,
        )
        engine.init_model("demo", DEMO_MODEL, runtime)
        yield engine
        if not engine._closed:
            allocator = engine.model("demo").allocator
            allocator.check_integrity()
            assert allocator.free_pages == 64, "a test left pages behind"
