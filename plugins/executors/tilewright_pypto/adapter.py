"""The adapter to PyPTO's API: no other module of this package uses it."""

import inspect
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stdout, suppress
from functools import reduce
from math import prod
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from tilewright.errors import ExecutorError, ExecutorLostError, OutOfPagesError
from tilewright.machine import available_memory
from tilewright.paths import path_of
from tilewright.types import KernelSet
from tilewright_kernels import source
from tilewright_pypto import build_cache, failures, rings
from tilewright_pypto.crash import CrashNote
from tilewright_pypto.device import Kernel
from tilewright_pypto.installation import Installation, find, identity, require

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from tilewright.types import Report
    from tilewright_pypto.options import Options

NEEDED = "hw-native-sys/pypto of 2026-08-21 (e2d0f78) or newer"
RING_OPTIONS = ("ring_task_window", "ring_heap", "ring_dep_pool")
SURFACE: dict[str, tuple[str, ...]] = {
    "LogLevel.ERROR": (),
    "set_log_level": (),
    "language.JITFunction.compile": (),
    "ir.CompiledProgram.from_dir": ("output_dir", "platform"),
    "ir.CompiledProgram.load": (),
    "ir.CompiledProgram.param_names": (),
    "runtime.configure_log": ("level",),
    "runtime.RunConfig": ("platform", "device_id", "save_kernels_dir", *RING_OPTIONS),
    "runtime.ChipWorker": ("config",),
    "runtime.ChipWorker.alloc_tensor": ("shape", "dtype", "init"),
    "runtime.ChipWorker.copy_to": ("dst_dev_ptr", "src_host_ptr", "nbytes"),
    "runtime.ChipWorker.copy_from": ("dst_host_ptr", "src_dev_ptr", "nbytes"),
    "runtime.ChipWorker.register": ("compiled",),
    "runtime.ChipWorker.close": (),
    "runtime.RegistrationHandle.__call__": ("args", "config"),
    "runtime.DeviceTensor": ("data_ptr", "shape", "dtype"),
}
"""All names of PyPTO that this module uses, with the parameters that it passes, in order.

``pypto.runtime.device_runner.ThreadPoolExecutor`` is used too: its import needs PyPTO's runtime."""
CODEGEN_WORKERS = "PYPTO_CODEGEN_MAX_WORKERS"
CARD_KV_BYTES = 16 << 30
"""PyPTO does not report how much memory a card has free. On a card of 64 GiB this leaves enough
for Qwen3-14B's weights, 28 GiB in BF16, and for the runtime; total_pages overrides it."""

_compiling = Lock()
_architecture: str | None = None
"""Architecture that this process's PyPTO compiles for. It is fixed once PyPTO has compiled."""


def open_device(options: "Options", card: int | None, report: "Report") -> "PyptoDevice":
    """Open a card, or a simulator, for which ``card`` is None.

    Raises ExecutorError when no usable PyPTO is found, it is too old or cannot be imported, this
    process uses another PyPTO or architecture, the platform lacks something, or the card cannot be
    opened.
    """
    global _architecture
    installation = find(options.pypto_root)
    architecture = options.platform.removesuffix("sim")
    if _architecture not in (None, architecture):
        raise ExecutorError(
            f"this process has used PyPTO for {_architecture}, but {options.platform} is "
            f"requested: {failures.ONE_ARCHITECTURE}"
        )
    pypto = _import(installation)
    require(options.platform, installation, card)
    key = identity(installation, options.platform)
    device = PyptoDevice(pypto, options, card, key, report)
    _architecture = architecture
    return device


def lower(kernel: str, kernels: KernelSet) -> None:
    """Run the passes of the installed PyPTO's compiler on a kernel, for a2a3; needs no device.

    Raises ExecutorError when no usable PyPTO is found, and for a kernel that it refuses.
    """
    pypto = _import(find(None))
    function = source.load(kernel, kernels, pypto.language)
    try:
        function.lower(config=pypto.runtime.RunConfig(platform="a2a3"))
    except Exception as error:
        raise ExecutorError(
            f"kernel {kernel} of {kernels.sources[kernel]}: PyPTO does not lower it: "
            f"{failures.cause(error)}"
        ) from error


def _import(installation: Installation) -> Any:
    """Import PyPTO and silence it. Raises ExecutorError if it is another one, too old or broken."""
    _refuse_another(installation)
    added = [p for p in map(str, installation.search_path) if p not in sys.path]
    sys.path[:0] = added
    try:
        # Keeps output of the imports out of the output of tilewright's commands.
        with redirect_stdout(sys.stderr):
            import pypto
            import pypto.ir
            import pypto.language
            import pypto.runtime
        _refuse_another(installation)
        _refuse_old(pypto, installation)
        pypto.set_log_level(pypto.LogLevel.ERROR)
    except BaseException as error:
        for path in added:
            sys.path.remove(path)
        if isinstance(error, (ExecutorError, KeyboardInterrupt)):
            raise
        raise ExecutorError(
            f"{installation} cannot be imported ({type(error).__name__}: "
            f"{failures.cause(error)}): build it again, for this Python and with its dependencies"
        ) from error
    if "PYPTO_RUNTIME_LOG" not in os.environ:
        # Its exceptions carry what matters; a lost card logs one traceback per tensor.
        logging.getLogger("pypto").setLevel(logging.CRITICAL)
        with suppress(Exception):  # the runtime, if there is one, has its own log
            pypto.runtime.configure_log("error")
    return pypto


def _refuse_another(installation: Installation) -> None:
    """Refuse another PyPTO, even one whose import failed halfway and left some of its modules."""
    ours = [folder.resolve() for folder in installation.folders]
    for name, module in list(sys.modules.items()):
        origin = getattr(module, "__file__", None)
        if name.partition(".")[0] != "pypto" or (origin is None and name != "pypto"):
            continue  # submodules of a binary module have no file
        if origin and any(folder in Path(origin).resolve().parents for folder in ours):
            continue
        where = Path(origin).parent if origin else "an unknown folder"
        raise ExecutorError(
            f"this process has imported the pypto of {where}, but {installation.folders[0]} is "
            "requested: use only one of them in a process"
        )


def _refuse_old(pypto: Any, installation: Installation) -> None:
    lacking = []
    for path, wanted in SURFACE.items():
        try:
            found = reduce(getattr, path.split("."), pypto)
            known = inspect.signature(found).parameters if wanted else {}
        except AttributeError:
            lacking.append(path)
        else:
            lacking += [f"{path}({name})" for name in wanted if name not in known]
    if lacking:
        raise ExecutorError(
            f"executor pypto-npu needs {NEEDED}, found {installation}, which has no "
            f"{' and no '.join(lacking)}: update it, or use e2d0f78 if it is newer; pypto_root "
            "selects a checkout"
        )


class PyptoDevice:
    """A ``Device`` (see tilewright_pypto.device) on PyPTO; ``open_device`` creates it."""

    def __init__(
        self,
        pypto: Any,
        options: "Options",
        card: int | None,
        key: Mapping[str, str],
        report: "Report",
    ):
        """key: everything besides the kernel that compiled code depends on."""
        self.name = options.platform if card is None else f"{options.platform} card {card}"
        self.place = ""
        self._pypto = pypto
        self._platform = options.platform
        self._card = card
        self._jobs = options.compile_jobs
        folder = path_of(options.build_dir) if options.build_dir else build_cache.default_folder()
        self._folder = folder.absolute()
        self._report = report
        self._key = key
        self.artifacts: dict[str, Path] = {}
        """Folders of the compiled kernels, keyed by kernel."""
        self._taken = 0
        self._options = options
        self._settings = {"device_id": card or 0} | {
            name: size for name in RING_OPTIONS if (size := getattr(options, name)) is not None
        }
        try:
            self._crash = CrashNote()
        except OSError as error:
            raise ExecutorError(f"{self.name} cannot be opened: {error}") from error
        try:
            with redirect_stdout(sys.stderr):
                # The rings' sizes are taken from the configuration of each call, not the worker's.
                config = self._run_config(**self._settings)
                self._configs: dict[tuple[tuple[str, int], ...], Any] = {(): config}
                with self._crashing(f"opening {self.name}"):
                    self._worker: Any = pypto.runtime.ChipWorker(config=config)
        except BaseException as error:
            self._crash.close()
            if not isinstance(error, Exception):
                raise
            raise ExecutorError(
                f"{self.name} cannot be opened: {failures.cause(error)}; {self._advice(error)}"
            ) from error

    @property
    def memory_limit(self) -> int:
        return available_memory() // 2 if self._card is None else CARD_KV_BYTES

    def keep(self, tensor: "Tensor") -> Any:
        """Raises ExecutorError when the device is out of memory."""
        worker = self._opened()
        try:
            with self._crashing(f"copying {_mib(tensor.nbytes)} to {self.name}"):
                kept = worker.alloc_tensor(tuple(tensor.shape), tensor.dtype, init=tensor)
        except Exception as error:
            refused = self._refused(f"cannot upload a tensor of {_mib(tensor.nbytes)}", error)
            if failures.symptom(error) is failures.MEMORY:
                refused = ExecutorError(f"{refused}; weights_on_device=false uses less memory")
            raise refused from error
        self._taken += tensor.nbytes
        return kept

    def allocate(self, shape: "tuple[int, ...]", dtype: "torch.dtype") -> Any:
        """Uninitialised rows [prod(shape[:-1]), shape[-1]] on the device.

        Kernels read only rows that a kernel has written, so rows are not cleared. Raises
        OutOfPagesError when the device is out of memory.
        """
        worker = self._opened()
        rows, size = prod(shape[:-1]), prod(shape) * dtype.itemsize
        try:
            with self._crashing(f"allocating {_mib(size)} on {self.name}"):
                kept = worker.alloc_tensor((rows, shape[-1]), dtype)
        except Exception as error:
            refused = self._refused(f"cannot allocate {_mib(size)} of KV cache", error)
            if failures.symptom(error) is failures.MEMORY:
                raise OutOfPagesError(str(refused)) from error
            raise refused from error
        self._taken += size
        return kept

    def read(self, kept: Any) -> "Tensor":
        import torch

        if isinstance(kept, torch.Tensor):  # a weight that stays on the host
            return kept
        tensor = torch.empty(kept.shape, dtype=kept.dtype)
        try:
            self._opened().copy_from(tensor.data_ptr(), kept.data_ptr, tensor.nbytes)
        except Exception as error:
            raise self._refused(f"cannot copy {_mib(tensor.nbytes)} to the host", error) from error
        return tensor

    def write(self, kept: Any, tensor: "Tensor") -> None:
        new = tensor.contiguous()
        try:
            self._opened().copy_to(kept.data_ptr, new.data_ptr(), new.nbytes)
        except Exception as error:
            raise self._refused(f"cannot copy {_mib(new.nbytes)} from the host", error) from error

    def load(self, names: Sequence[str], kernels: KernelSet) -> Mapping[str, Kernel]:
        """Raises ExecutorError for a kernel that PyPTO does not compile, or not as written."""
        loaded, saved, started, compiled = {}, 0.0, time.perf_counter(), 0
        for done, kernel in enumerate(names):

            def say(what: str, done: int = done) -> None:
                self._report(f"{what} for {self._platform}", done, len(names))

            began = time.perf_counter()
            loaded[kernel], once = self._load(kernel, kernels, say)
            if once is None:
                compiled += 1
            else:
                saved += max(0.0, once - (time.perf_counter() - began))
        cached = len(names) - compiled
        parts = []
        if compiled:
            parts.append(f"{_counted(compiled)} compiled in {time.perf_counter() - started:.0f} s")
        if cached:
            parts.append(f"{_counted(cached)} from the cache, {saved:.0f} s saved")
        self._report("; ".join(parts), len(names), len(names))
        return loaded

    def close(self) -> None:
        worker, self._worker = self._worker, None
        if worker is None:
            return
        try:
            worker.close()
        except Exception:
            # It keeps what it could not free for a second try, which fails on a lost card too.
            with suppress(Exception):
                worker.close()
        finally:
            self._crash.close()

    def _run_config(self, **settings: Any) -> Any:
        return self._pypto.runtime.RunConfig(platform=self._platform, **settings)

    def _call_config(self, kernel: str, kernels: KernelSet, tensors: Mapping[str, Any]) -> Any:
        """With rings large enough for the longest sequence of the call."""
        lengths = tensors.get("context_lens")
        positions = 1 if lengths is None else int(lengths.max())
        sizes = tuple(rings.larger(self._options, kernel, kernels, positions).items())
        if sizes not in self._configs:
            self._configs[sizes] = self._run_config(**self._settings | dict(sizes))
        return self._configs[sizes]

    def _opened(self) -> Any:
        if self._worker is None:
            raise ExecutorError(f"{self.name} is closed: load the model again")
        return self._worker

    def _load(
        self, kernel: str, kernels: KernelSet, say: Callable[[str], None]
    ) -> tuple[Kernel, float | None]:
        worker = self._opened()
        key = {
            **self._key,
            **{
                f"source of {name}": kernels.sources[name].read_text(encoding="utf-8")
                for name in source.modules(kernel, kernels)
            },
            "constants": json.dumps(dict(kernels.constants[kernel])),
        }

        def compile(home: Path) -> Any:
            self.artifacts[kernel] = home
            quiet = redirect_stdout(sys.stderr)
            failing = self._failing(kernel, "compiling", " did not compile")
            with failing, _compilers(self._jobs), quiet:
                function = source.load(kernel, kernels, self._pypto.language)
                program = function.compile(config=self._run_config(save_kernels_dir=str(home)))
                program.load()
            return program

        load_again = self._pypto.ir.CompiledProgram.from_dir

        def reload(home: Path) -> Any:
            self.artifacts[kernel] = home
            quiet = redirect_stdout(sys.stderr)
            with self._crashing_kernel(kernel, "loading"), _compilers(self._jobs), quiet:
                program = load_again(str(home), platform=self._platform)
                program.load()
            return program

        program, seconds = build_cache.cached(self._folder, kernel, key, compile, reload, say)
        contract = source.contract(kernel, kernels)
        ours, names = [p.name for p in contract.parameters], list(program.param_names)
        if sorted(names) != sorted(ours):
            raise ExecutorError(
                f"kernel {kernel} on {self.name}: PyPTO compiled the parameters "
                f"{', '.join(names)}, but the source has {', '.join(ours)}; artifacts in "
                f"{self.artifacts[kernel]}; report this, with PyPTO's version"
            )
        with self._failing(kernel, "loading", " did not load"):
            handle = worker.register(program)

        def call(**tensors: Any) -> None:
            self._opened()
            bound = dict(zip(ours, contract.bind(tensors), strict=True))
            with self._failing(kernel, "running", ""):
                config = self._call_config(kernel, kernels, tensors)
                handle(*(bound[name] for name in names), config=config)

        return call, seconds

    @contextmanager
    def _failing(self, kernel: str, doing: str, what: str) -> Iterator[None]:
        """Turn PyPTO's errors into errors of a kernel."""
        try:
            with self._crashing_kernel(kernel, doing):
                yield
        except Exception as error:
            raise self._kind(error)(
                f"kernel {kernel} on {self.name}{what}: {failures.cause(error)}; "
                f"artifacts in {self.artifacts[kernel]}; {self._advice(error)}"
            ) from error

    def _crashing_kernel(self, kernel: str, doing: str) -> AbstractContextManager[None]:
        place = f"{self.place}: " if self.place and doing == "running" else ""
        return self._crashing(
            f"{doing} kernel {kernel} on {self.name}; artifacts in {self.artifacts[kernel]}; "
            f"{failures.OTHERWISE.advice}",
            place,
        )

    def _crashing(self, doing: str, place: str = "") -> AbstractContextManager[None]:
        """Print a line that says what was running, if the process dies meanwhile."""
        return self._crash.noting(f"{place}the process died {doing}")

    def _refused(self, what: str, error: Exception) -> ExecutorError:
        if isinstance(error, ExecutorError):
            return error
        return self._kind(error)(
            f"{self.name} {what} ({_mib(self._taken)} are in use): {failures.cause(error)}; "
            f"{self._advice(error)}"
        )

    def _advice(self, error: Exception) -> str:
        card = "this machine" if self._card is None else f"card {self._card}"
        return self._symptom(error).advice.format(card=card)

    def _kind(self, error: Exception) -> type[ExecutorError]:
        return ExecutorLostError if self._symptom(error) is failures.LOST else ExecutorError

    def _symptom(self, error: Exception) -> failures.Symptom:
        symptom = failures.symptom(error)
        lost_without_card = symptom is failures.LOST and self._card is None
        return failures.OTHERWISE if lost_without_card else symptom


@contextmanager
def _compilers(jobs: int | None) -> Iterator[None]:
    """Limit how many assemblers and compilers run at a time; None: one per CPU.

    PyPTO reads the number of assemblers from the environment. It starts a compiler for each task of
    a kernel, up to 64 at once, in a pool whose size cannot be set, so the pool is replaced. Both
    are process-wide, so only one thread compiles at a time.
    """
    from pypto.runtime import device_runner

    most = jobs or len(os.sched_getaffinity(0))
    with _compiling:
        before, pool = os.environ.get(CODEGEN_WORKERS), device_runner.ThreadPoolExecutor

        def bounded(max_workers: int | None = None, *args: Any, **kwargs: Any) -> Any:
            return pool(min(max_workers or most, most), *args, **kwargs)

        os.environ[CODEGEN_WORKERS] = str(most)
        device_runner.ThreadPoolExecutor = bounded
        try:
            yield
        finally:
            device_runner.ThreadPoolExecutor = pool
            if before is None:
                del os.environ[CODEGEN_WORKERS]
            else:
                os.environ[CODEGEN_WORKERS] = before


def _mib(size: int) -> str:
    return f"{size / (1 << 20):.1f} MiB"


def _counted(kernels: int) -> str:
    return f"{kernels} kernel{'s' if kernels > 1 else ''}"
