from pathlib import Path
from typing import Any

import pytest
import torch

from tilewright import plugins
from tilewright_testing import WeightFormatSuite

NAME = "tilewright-my-plugin:my-plugin"


class TestConformance(WeightFormatSuite):
    @pytest.fixture
    def plugin(self) -> str:
        return NAME


def test_the_layout_is_as_documented(tmp_path: Path) -> None:
    plugin: Any = plugins.load(plugins.find("weight_format", NAME))
    plugin.write_weights(tmp_path, {"a": torch.tensor([1.0, -2.0])})
    header = b'{"a": {"dtype": "float32", "shape": [2]}}'
    floats = b"\0\0\x80\x3f\0\0\0\xc0"
    found = (tmp_path / plugin.FILE).read_bytes()
    assert found == len(header).to_bytes(8, "little") + header + floats
