"""The executor for a card passes the suite of executors, on a stand-in for the card."""

import card_on_cpu
import pytest

from tilewright_testing import ExecutorSuite
from tilewright_testing.executor import MODELS

PLUGIN = card_on_cpu.Plugin()


class TestCard(ExecutorSuite):
    @pytest.fixture
    def plugin(self):
        return PLUGIN

    @pytest.fixture
    def models(self):
        names = ("all-biases", "qk-norm-tied-gqa-5", "sliding-window", "dynamic-rope")
        return {name: MODELS[name] for name in names}
