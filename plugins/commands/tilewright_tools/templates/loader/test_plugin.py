from pathlib import Path
from typing import Any

import pytest

from tilewright import GenerateConfig, LLMEngine, plugins
from tilewright_testing import LoaderSuite
from tilewright_testing.models import Model, make_model

NAME = "tilewright-my-plugin:my-plugin"


class TestConformance(LoaderSuite):
    @pytest.fixture
    def plugin(self) -> str:
        return NAME

    @pytest.fixture
    def expected(self) -> Model:
        """What write_sample writes."""
        return make_model()


def test_an_engine_runs_what_it_loads(tmp_path: Path) -> None:
    plugin: Any = plugins.load(plugins.find("loader", NAME))
    source = plugin.write_sample(tmp_path).source
    with LLMEngine.from_plugins(loader=NAME) as engine:
        engine.init_model("m", source)
        (result,) = engine.generate_batch("m", ["t5 t6"], GenerateConfig(max_new_tokens=3))
    assert result.prompt_token_ids == (5, 6)
    assert len(result.token_ids) == 3
