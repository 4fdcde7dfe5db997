import json
import sys
from pathlib import Path

from pypto import events
from tilewright_pypto.emulated.language import NAMES, inline
from tilewright_pypto.emulated.language import jit as emulated

globals().update(NAMES)


BACKENDS = {"a2a3": "Ascend910B", "a5": "Ascend950"}
backend = None


def set_backend(wanted):
    global backend
    if backend not in (None, wanted):
        raise ValueError(f"Backend type already set to {backend}, cannot change to {wanted}")
    backend = wanted


class JITFunction:
    def __init__(self, function):
        self._kernel = emulated(function)
        # A kernel's module is in a package with the module of its constants.
        package = function.__module__.rpartition(".")[0]
        constants = vars(sys.modules[f"{package}.constants"])
        self._constants = {n: v for n, v in constants.items() if isinstance(v, int | float)}

    def lower(self, *, config):
        events.at(f"lower {self._kernel.contract.kernel}")

    def compile(self, *args, **kwargs):
        from pypto.ir import META, CompiledProgram

        config = kwargs.pop("config")
        if args or kwargs:
            raise TypeError("the fake compiles from signatures only")
        name = self._kernel.contract.kernel
        home = Path(config.save_kernels_dir)
        print(f"fake pypto compiles {name}")
        set_backend(BACKENDS[config.platform.removesuffix("sim")])
        (home / "kernels").mkdir()
        events.at(f"compile {name}")
        meta = {"kernel": name, "platform": config.platform, "constants": self._constants}
        (home / META).write_text(json.dumps(meta))
        return CompiledProgram.from_dir(home, platform=config.platform)


class _Jit:
    inline = staticmethod(inline)

    def __call__(self, function):
        return JITFunction(function)


jit = _Jit()
