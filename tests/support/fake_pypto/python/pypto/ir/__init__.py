import json
from pathlib import Path
from types import SimpleNamespace

from pypto import events
from pypto.runtime import device_runner
from tilewright_kernels import source
from tilewright_kernels.qwen3_14b.plugin import SOURCES
from tilewright_pypto.emulated.language import language

META = "compiled_meta.json"


class CompiledProgram:
    def __init__(self, output_dir, platform, meta):
        self.output_dir = Path(output_dir)
        self.platform = platform
        self.name = meta["kernel"]
        self._constants = meta["constants"]
        self._loaded = None

    @classmethod
    def from_dir(cls, output_dir, *, platform=None):
        meta = json.loads((Path(output_dir) / META).read_text())
        return cls(output_dir, platform or meta["platform"], meta)

    def load(self):
        if self._loaded is None:
            print(f"fake pypto loads {self.name}")
            events.at(f"load {self.name}")
            device_runner.compile_and_assemble(self.name)
            kernels = SimpleNamespace(sources=SOURCES, constants={self.name: self._constants})
            self._loaded = source.load(self.name, kernels, language)

    @property
    def kernel(self):
        self.load()
        return self._loaded

    @property
    def param_names(self):
        """In another order than the signature, so that no caller relies on the order."""
        return [p.name for p in reversed(self.kernel.contract.parameters)]
