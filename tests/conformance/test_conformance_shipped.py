"""What is shipped passes its suite, and so do the plugins that the documentation shows."""

import re
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from shutil import which
from typing import Any

import pytest
from attrs import evolve
from checkout import ROOT

from tilewright import plugins
from tilewright.types import DType, ModelConfig
from tilewright_testing import (
    CommandSuite,
    ExecutorSuite,
    KernelsSuite,
    KvAllocatorSuite,
    LoaderSuite,
    LogitsProcessorSuite,
    ObserverSuite,
    SamplerSuite,
    WeightFormatSuite,
)
from tilewright_testing.executor import MODELS
from tilewright_testing.kernels import MODELS as KERNEL_MODELS
from tilewright_testing.models import Model, make_model, write_hf_directory
from tilewright_torch.native import COMPILERS

CHOSEN: dict[str, ModelConfig] = MODELS | {
    "biases-and-windows": evolve(MODELS["all-biases"], num_layers=3, sliding_windows=(None, 7, 3)),
    # With a layer between the first and the last.
    "in-16s": evolve(MODELS["in-16s"], num_layers=3),
}
"""Few models that differ in what an executor can do wrong with a batch or with its pages."""


class TestHfLocal(LoaderSuite):
    @pytest.fixture
    def plugin(self) -> str:
        return "hf-local"

    @pytest.fixture
    def expected(self) -> Model:
        return make_model("qk-norm-tied-gqa-5", dtype="bfloat16")

    @pytest.fixture
    def source(self, expected: Model, tmp_path: Path) -> Path:
        return write_hf_directory(expected, tmp_path / "model")


class TestLoaders(LoaderSuite):
    @pytest.fixture(params=["gguf", "packed"])
    def plugin(self, request: pytest.FixtureRequest) -> Any:
        return request.param


class TestWeightFormats(WeightFormatSuite):
    @pytest.fixture(params=["safetensors", "pytorch-bin"])
    def plugin(self, request: pytest.FixtureRequest) -> Any:
        return request.param


class TestTorch(ExecutorSuite):
    @pytest.fixture
    def plugin(self) -> str:
        return "torch"

    @pytest.fixture
    def models(self) -> dict[str, ModelConfig]:
        """Some, since results are compared with those of the same executor: its own tests compare
        all of them with transformers."""
        names = ("grouped", "biases-and-windows", "qk-norm-tied-gqa-5", "dynamic-rope")
        return {name: CHOSEN[name] for name in names}


class TestTorchInOtherWays(ExecutorSuite):
    """In bfloat16 alone, and with layers that are converted each time they run."""

    @pytest.fixture
    def plugin(self) -> str:
        return "torch"

    @pytest.fixture
    def options(self) -> dict[str, Any]:
        return {"stream_weights": True}

    @pytest.fixture
    def models(self) -> dict[str, ModelConfig]:
        return {"biases-and-windows": CHOSEN["biases-and-windows"]}

    @pytest.fixture
    def dtypes(self) -> list[DType]:
        return ["bfloat16"]


@pytest.mark.skipif(not any(map(which, COMPILERS)), reason="no C++ compiler is on the PATH")
class TestTorchCompiled(ExecutorSuite):
    """In float32, where a step with a tap and one without differ only in the order of sums."""

    @pytest.fixture
    def plugin(self) -> str:
        return "torch"

    @pytest.fixture
    def options(self) -> dict[str, Any]:
        return {"compile": True}

    @pytest.fixture
    def models(self) -> dict[str, ModelConfig]:
        return {"biases-and-windows": CHOSEN["biases-and-windows"]}

    @pytest.fixture
    def dtypes(self) -> list[DType]:
        return ["float32"]


class TestPyptoNpu(ExecutorSuite):
    @pytest.fixture
    def plugin(self) -> str:
        return "pypto-npu"

    @pytest.fixture
    def options(self) -> dict[str, Any]:
        return {"platform": "emulated"}

    @pytest.fixture
    def models(self) -> dict[str, ModelConfig]:
        """TestKernelSets runs more."""
        return {name: CHOSEN[name] for name in ("in-16s", "dynamic-rope")}


class TestKernelSets(KernelsSuite):
    """All but qwen3: TestPyptoNpu runs it, and `plugins verify` a copy of it, in another test."""

    @pytest.fixture(params=["tilewright:llama", "tilewright:qwen3-fused"])
    def plugin(self, request: pytest.FixtureRequest) -> Any:
        return request.param

    @pytest.fixture
    def models(self) -> dict[str, ModelConfig]:
        """Two of each family, since kernels run slowly on the CPU; plugins verify runs all."""
        names = ("qk-norm-tied-gqa-5", "qk-norm-wide", "llama3-rope", "plain-wide")
        return {name: KERNEL_MODELS[name] for name in names}


class TestPaged(KvAllocatorSuite):
    @pytest.fixture
    def plugin(self) -> str:
        return "paged"


class TestSamplers(SamplerSuite):
    @pytest.fixture(params=["greedy", "top-p"])
    def plugin(self, request: pytest.FixtureRequest) -> Any:
        return request.param


class TestChoice(LogitsProcessorSuite):
    @pytest.fixture
    def plugin(self) -> str:
        return "choice"

    @pytest.fixture
    def wrong_arguments(self) -> Sequence[Any]:
        return [[], "", "yes,", '["yes"', "[1]", ["yes", ""], ["yes", 1], {"yes": "no"}, 3, None]


class TestChoiceOfBytes(TestChoice):
    """Choices whose tokens are parts of characters, of which some begin others."""

    @pytest.fixture
    def argument(self) -> list[str]:
        return ["hello", "hell", "h", "數学", "数", "数学"]


class TestStructuredOutput(LogitsProcessorSuite):
    @pytest.fixture
    def plugin(self) -> str:
        return "structured-output"

    @pytest.fixture
    def wrong_arguments(self) -> Sequence[Any]:
        return [
            *({}, {"regex": "a", "choice": ["b"]}, {"xml": "a"}, "{", [{"regex": "a"}]),
            *({"json": "{"}, {"json": 3}, {"json": {"type": "objekt"}}, {"json_object": False}),
            *({"regex": "["}, {"regex": "a\\"}, {"choice": []}, {"grammar": "start: other"}),
        ]


class TestCommands(CommandSuite):
    @pytest.fixture(params=[plugin.name for plugin in plugins.installed("command")])
    def plugin(self, request: pytest.FixtureRequest) -> Any:
        return request.param


def documented(page: str, module: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module that a page shows whole."""
    text = (ROOT / page).read_text()
    found = re.search(rf"```python\n# {module}\.py\n(.*?)```", text, re.DOTALL)
    assert found, f"{page} shows no {module}.py"
    (folder / f"{module}.py").write_text(found[1])
    monkeypatch.syspath_prepend(folder)
    return import_module(module)


class TestTheDocumentedSampler(SamplerSuite):
    @pytest.fixture
    def plugin(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
        return documented("docs/writing-plugins.md", "acme_top_a", tmp_path, monkeypatch)

    @pytest.fixture
    def options(self) -> dict[str, Any]:
        return {"a": "0.3"}


class TestTheDocumentedObserver(ObserverSuite):
    @pytest.fixture
    def plugin(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
        return documented("README.md", "acme_step_times", tmp_path, monkeypatch)
