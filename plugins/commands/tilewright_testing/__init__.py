"""Conformance suites for plugins: the contracts as tests that any plugin can run.

A suite is a pytest class. Subclass the one for your plugin's kind and name the plugin::

    import acme_top_a
    import pytest
    from tilewright_testing import SamplerSuite

    class TestTopA(SamplerSuite):
        @pytest.fixture
        def plugin(self):
            return acme_top_a  # the entry point's object, or an installed plugin's name

        @pytest.fixture
        def options(self):  # only where the defaults do not suffice
            return {"a": 0.3}

``tilewright plugins verify NAME`` runs the same suites on installed plugins. They need
``pip install 'tilewright[testing]'``; ``tilewright_testing.models``, which makes small models, does
not.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tilewright_testing.command import CommandSuite as CommandSuite
    from tilewright_testing.executor import ExecutorSuite as ExecutorSuite
    from tilewright_testing.kernels import KernelsSuite as KernelsSuite
    from tilewright_testing.kv_allocator import KvAllocatorSuite as KvAllocatorSuite
    from tilewright_testing.loader import LoaderSuite as LoaderSuite
    from tilewright_testing.logits_processor import LogitsProcessorSuite as LogitsProcessorSuite
    from tilewright_testing.observer import ObserverSuite as ObserverSuite
    from tilewright_testing.sampler import SamplerSuite as SamplerSuite
    from tilewright_testing.suite import PluginSuite as PluginSuite
    from tilewright_testing.weight_format import WeightFormatSuite as WeightFormatSuite

_MODULES = {
    "CommandSuite": "command",
    "ExecutorSuite": "executor",
    "KernelsSuite": "kernels",
    "KvAllocatorSuite": "kv_allocator",
    "LoaderSuite": "loader",
    "LogitsProcessorSuite": "logits_processor",
    "ObserverSuite": "observer",
    "PluginSuite": "suite",
    "SamplerSuite": "sampler",
    "WeightFormatSuite": "weight_format",
}

__all__ = sorted(_MODULES)

if "pytest" in sys.modules:
    # Failed assertions show the compared values, as in a test's own file.
    sys.modules["pytest"].register_assert_rewrite(
        *(f"{__name__}.{module}" for module in _MODULES.values())
    )


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
