"""All of PyPTO's API that tilewright uses: nothing else here knows it."""

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from math import prod
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from attrs import frozen

from tilewright.errors import ExecutorError, OutOfPagesError
from tilewright.machine import available_memory
from tilewright_kernels.contract import Contract, read_contract
from tilewright_kernels.qwen3_14b import source
from tilewright_kernels.qwen3_14b.shape import LayerShape
from tilewright_pypto import build_cache
from tilewright_pypto.build_cache import Report
from tilewright_pypto.device import Kernel
from tilewright_pypto.installation import HARDWARE, Installation, identity, require

if TYPE_CHECKING:
    import torch
    from torch import Tensor

NEEDED = "hw-native-sys/pypto of 2026-08-21 (e2d0f78) or newer"
CARD_KV_BYTES = 16 << 30
"""PyPTO does not tell how much memory a card has free. On a card of 64 GiB this leaves enough for
Qwen3-14B's weights, 28 GiB in BF16, and for the runtime; total_pages asks for more or less."""


@frozen
class _Api:
    language: ModuleType
    run_config: Any
    worker: Any
    program: Any


def open_device(
    installation: Installation,
    platform: str,
    card: int | None,
    rings: Mapping[str, int] | None = None,
    jobs: int | None = None,
    build_dir: Path | None = None,
    report: Report | None = None,
) -> "PyptoDevice":
    """Open a card, or a simulator, for which ``card`` says nothing.

    rings: sizes by name, ring_task_window, ring_heap, ring_dep_pool; PyPTO's choice where none is.
    jobs: kernels' parts that are assembled at a time; None: PyPTO's choice.
    build_dir: where compiled kernels are kept; None: build_cache.default_folder().

    Raises ExecutorError: the build folder takes no files, another pypto is imported already, this
    one is too old or cannot be imported, the platform lacks something, the card cannot be opened.
    """
    folder = (build_dir or build_cache.default_folder()).expanduser().absolute()
    build_cache.prepare(folder)
    api = _import(installation)
    require(platform, installation, card)
    key = identity(installation) | {"platform": platform}
    return PyptoDevice(api, platform, card, rings or {}, jobs, folder, key, report)


def _import(installation: Installation) -> _Api:
    """PyPTO itself, quiet. Raises ExecutorError for another one, an old one, a broken one."""
    _refuse_another(installation)
    added = [p for p in map(str, installation.search_path) if p not in sys.path]
    sys.path[:0] = added
    try:
        # Whoever prints does not get into what our commands print.
        with redirect_stdout(sys.stderr):
            import pypto
            import pypto.ir
            import pypto.language
            import pypto.runtime
        _refuse_another(installation)
        _refuse_old(pypto, installation)
    except BaseException as error:
        for path in added:
            sys.path.remove(path)
        if isinstance(error, ExecutorError) or not isinstance(error, Exception):
            raise
        raise ExecutorError(
            f"{installation} cannot be imported ({type(error).__name__}: {_cause(error)}): build "
            "it again, for this Python and with what it needs"
        ) from error
    pypto.set_log_level(pypto.LogLevel.ERROR)
    if "PYPTO_RUNTIME_LOG" not in os.environ:
        with suppress(RuntimeError):  # the runtime has a log of its own, where there is a runtime
            pypto.runtime.configure_log("error")
    return _Api(
        pypto.language, pypto.runtime.RunConfig, pypto.runtime.ChipWorker, pypto.ir.CompiledProgram
    )


def _refuse_another(installation: Installation) -> None:
    module = sys.modules.get("pypto")
    origin = getattr(module, "__file__", None)
    if module is None or (
        origin and Path(origin).resolve().parent == installation.folders[0].resolve()
    ):
        return
    where = Path(origin).parent if origin else "a place that it does not tell"
    raise ExecutorError(
        f"this process has imported the pypto of {where}, and {installation.folders[0]} is wanted: "
        "use one of them in a process"
    )


def _refuse_old(pypto: ModuleType, installation: Installation) -> None:
    wanted = {
        "JITFunction.compile": (pypto.language, "JITFunction", "compile"),
        "runtime.ChipWorker": (pypto, "runtime", "ChipWorker"),
        "CompiledProgram.from_dir": (pypto.ir, "CompiledProgram", "from_dir"),
    }
    lacking = [
        name
        for name, (module, attribute, member) in wanted.items()
        if not hasattr(getattr(module, attribute, None), member)
    ]
    if lacking:
        raise ExecutorError(
            f"executor pypto-npu needs {NEEDED}, found {installation}, which has no "
            f"{' and no '.join(lacking)}: update it, and set pypto_root if it is a checkout"
        )


class PyptoDevice:
    """A ``Device`` (see tilewright_pypto.device) that is PyPTO's; ``open_device`` makes it."""

    def __init__(
        self,
        api: _Api,
        platform: str,
        card: int | None,
        rings: Mapping[str, int],
        jobs: int | None,
        folder: Path,
        key: Mapping[str, str],
        report: Report | None,
    ):
        self.name = f"{platform} card {card}" if platform in HARDWARE else platform
        self._api = api
        self._platform = platform
        self._card = card
        self._jobs = jobs
        self._folder = folder
        self._report = report or (lambda what, done, total: None)
        self._key = key
        self.artifacts: dict[str, Path] = {}
        """What each kernel was compiled to."""
        self._taken = 0
        # PyPTO takes the rings' sizes from the configuration of each call, not from its worker's.
        self._config = api.run_config(platform=platform, device_id=card or 0, **rings)
        try:
            with redirect_stdout(sys.stderr):
                self._worker: Any = api.worker(config=self._config)
        except Exception as error:
            raise ExecutorError(
                f"{self.name} cannot be opened: {_cause(error)}; {self._advice(error)}"
            ) from error

    @property
    def memory_limit(self) -> int:
        return CARD_KV_BYTES if self._platform in HARDWARE else available_memory() // 2

    def keep(self, tensor: "Tensor") -> Any:
        """Raises ExecutorError when the device has no memory left."""
        try:
            kept = self._opened().alloc_tensor(tuple(tensor.shape), tensor.dtype, init=tensor)
        except Exception as error:
            refused = self._refused(f"cannot keep a tensor of {_mib(tensor.nbytes)}", error)
            if _symptom(error) is MEMORY:
                refused = ExecutorError(f"{refused}; weights_on_device=false keeps less there")
            raise refused from error
        self._taken += tensor.nbytes
        return kept

    def allocate(self, shape: "tuple[int, ...]", dtype: "torch.dtype") -> Any:
        """Rows [prod(shape[:-1]), shape[-1]], as the device's memory happens to be.

        No kernel reads a row that none has written, so nobody clears it. Raises OutOfPagesError
        when the device has no memory left.
        """
        rows, size = prod(shape[:-1]), prod(shape) * dtype.itemsize
        try:
            kept = self._opened().alloc_tensor((rows, shape[-1]), dtype)
        except Exception as error:
            refused = self._refused(f"cannot keep {_mib(size)} of KV cache", error)
            if _symptom(error) is MEMORY:
                raise OutOfPagesError(str(refused)) from error
            raise refused from error
        self._taken += size
        return kept

    def read(self, kept: Any) -> "Tensor":
        import torch

        tensor = torch.empty(kept.shape, dtype=kept.dtype)
        try:
            self._opened().copy_from(tensor.data_ptr(), kept.data_ptr, tensor.nbytes)
        except Exception as error:
            raise self._refused(f"cannot give back {_mib(tensor.nbytes)}", error) from error
        return tensor

    def load(self, kernels: Sequence[str], shape: LayerShape) -> Mapping[str, Kernel]:
        """Raises ExecutorError for one that PyPTO does not compile, or not as it is written."""
        loaded, saved, started, compiled = {}, 0.0, time.perf_counter(), 0
        for done, kernel in enumerate(kernels):

            def say(what: str, done: int = done) -> None:
                self._report(f"{what} for {self._platform}", done, len(kernels))

            began = time.perf_counter()
            loaded[kernel], once = self._load(kernel, shape, say)
            if once is None:
                compiled += 1
            else:
                saved += max(0.0, once - (time.perf_counter() - began))
        parts = []
        if compiled:
            parts.append(f"{_counted(compiled)} compiled in {time.perf_counter() - started:.0f} s")
        if len(kernels) > compiled:
            cached = _counted(len(kernels) - compiled)
            parts.append(f"{cached} from the cache, {saved:.0f} s saved")
        self._report("; ".join(parts), len(kernels), len(kernels))
        return loaded

    def close(self) -> None:
        worker, self._worker = self._worker, None
        if worker is None:
            return
        try:
            worker.close()
        except Exception:
            # It keeps what it could not free for a second try; a lost card fails that too.
            with suppress(Exception):
                worker.close()

    def _opened(self) -> Any:
        if self._worker is None:
            raise ExecutorError(f"{self.name} is closed: load the model again")
        return self._worker

    def _load(
        self, kernel: str, shape: LayerShape, say: Callable[[str], None]
    ) -> tuple[Kernel, float | None]:
        worker = self._opened()
        constants = shape.constants(kernel)
        key = {
            **self._key,
            "source": source.path(kernel).read_text(),
            "blocks": source.path("blocks").read_text(),
            "constants": json.dumps(constants),
        }

        def compile(home: Path) -> Any:
            self.artifacts[kernel] = home
            config = self._api.run_config(platform=self._platform, save_kernels_dir=str(home))
            try:
                with _codegen_workers(self._jobs), redirect_stdout(sys.stderr):
                    function = source.load(kernel, shape, self._api.language)
                    program = function.compile(config=config)
                    program.load()
            except Exception as error:
                raise self._failure(kernel, "did not compile: ", error) from error
            return program

        def reload(home: Path) -> Any:
            self.artifacts[kernel] = home
            with redirect_stdout(sys.stderr):
                program = self._api.program.from_dir(str(home), platform=self._platform)
                program.load()
            return program

        program, seconds = build_cache.cached(self._folder, kernel, key, compile, reload, say)
        contract = read_contract(source.path(kernel), kernel, constants)
        names = list(program.param_names)
        if sorted(names) != sorted(p.name for p in contract.parameters):
            raise ExecutorError(
                f"kernel {kernel} on {self.name}: PyPTO compiled the parameters "
                f"{', '.join(names)}, and the source has "
                f"{', '.join(p.name for p in contract.parameters)}; artifacts in "
                f"{self.artifacts[kernel]}; report it, with PyPTO's version"
            )
        try:
            handle = worker.register(program)
        except Exception as error:
            raise self._failure(kernel, "did not load: ", error) from error
        return self._callable(contract, names, handle), seconds

    def _callable(self, contract: Contract, names: Sequence[str], handle: Any) -> Kernel:
        ours = [p.name for p in contract.parameters]

        def call(**tensors: Any) -> None:
            self._opened()
            bound = dict(zip(ours, contract.bind(tensors), strict=True))
            try:
                handle(*(bound[name] for name in names), config=self._config)
            except Exception as error:
                raise self._failure(contract.kernel, "", error) from error

        return call

    def _failure(self, kernel: str, what: str, error: Exception) -> ExecutorError:
        return ExecutorError(
            f"kernel {kernel} on {self.name}{' ' if what else ': '}{what}{_cause(error)}; "
            f"artifacts in {self.artifacts[kernel]}; {self._advice(error)}"
        )

    def _refused(self, what: str, error: Exception) -> ExecutorError:
        if isinstance(error, ExecutorError):
            return error
        return ExecutorError(
            f"{self.name} {what} ({_mib(self._taken)} are kept there): {_cause(error)}; "
            f"{self._advice(error)}"
        )

    def _advice(self, error: Exception) -> str:
        symptom, hardware = _symptom(error), self._platform in HARDWARE
        if symptom is LOST and not hardware:
            symptom = OTHERWISE
        return symptom.advice.format(card=f"card {self._card}" if hardware else "this machine")


# --- what failed, in PyPTO's words ----------------------------------------------------------------


@frozen
class _Symptom:
    pattern: str
    advice: str


MEMORY = _Symptom(
    r"malloc failed|out of memory|bad_alloc|cannot allocate|memoryerror|code 207001",
    "free memory of {card}: set total_pages or max_batch_tokens lower, or end what else runs there",
)
LOST = _Symptom(
    r"device.*(lost|offline|unavailable|not found|reset)|lost.*device|heartbeat|"
    r"simpler_init failed|ensure_acl_ready|\b(507\d{3}|107\d{3})\b",
    "see `npu-smi info` whether {card} is there, healthy and free, then load the model again",
)
SYMPTOMS = (
    _Symptom(
        r"ptoas.*timed out",
        "too many may run at a time: set option compile_jobs lower, and try again",
    ),
    _Symptom(
        r"no module named|undefined symbol|importerror",
        "PyPTO is not whole: `tilewright doctor` says what it lacks",
    ),
    # The runtime's own error numbers, negated, are all that a failed run has in its exception.
    _Symptom(
        r"run failed with code -3\b|scope.deadlock|flow.control.deadlock|task.(ring|window)",
        "the window of tasks is full: raise option ring_task_window (131072 has served), then "
        "ring_dep_pool and ring_heap",
    ),
    _Symptom(
        r"run failed with code -2\b|heap.(ring|exhausted)|ring.heap",
        "the heap between tasks is full: raise option ring_heap (4294967296 has served), then "
        "ring_task_window and ring_dep_pool",
    ),
    _Symptom(
        r"run failed with code -4\b|dep.?pool|dependency pool",
        "the pool of dependencies is full: raise option ring_dep_pool (131072 has served), then "
        "ring_task_window and ring_heap",
    ),
    _Symptom(
        r"run failed with code -1\b",  # also for failures that have no number of their own
        "PyPTO's log above may say more; if a scope's tasks filled the window, raise option "
        "ring_task_window (131072 has served)",
    ),
    _Symptom(
        r"\bring\b|deadlock",
        "a ring is full: raise options ring_task_window and ring_dep_pool (131072 have served) and "
        "ring_heap (4294967296)",
    ),
    MEMORY,
    _Symptom(
        r"run failed with code -(8|100)\b|timed? ?out|time-out|5070(14|17|34)\b",
        "it made no progress: see PyPTO's log above (PYPTO_RUNTIME_LOG=info says more), and raise "
        "PTO2_SCHEDULER_TIMEOUT_MS to tell slow from stuck",
    ),
    LOST,
    _Symptom(r"no space left", "free space there, or set option build_dir to another folder"),
    _Symptom(
        r"ptoas|kernel_config",
        "see that ptoas is of the version that PyPTO pins (toolchain/versions.env in its source)",
    ),
)
OTHERWISE = _Symptom("", "try platform=emulated, which tells mistakes of a kernel from a device's")


def _symptom(error: BaseException) -> _Symptom:
    said = f"{type(error).__name__}: {error}".lower()
    return next((s for s in SYMPTOMS if re.search(s.pattern, said)), OTHERWISE)


def _cause(error: BaseException) -> str:
    """The first line that says something, of messages that go on for pages."""
    text = str(error).partition("C++ Traceback")[0]
    lines = [" ".join(line.split()) for line in text.splitlines()]
    # Rules and frames around what is said, and the heads of tables of it, say nothing.
    lines = [x for x in lines if x.strip("-=+|^~ ") and not re.fullmatch(r"Function *\| *Error", x)]
    if not lines:
        return type(error).__name__
    said = lines[0]
    if said.endswith(":") and len(lines) > 1:
        cells = [x for x in lines[1:] if "|" in x]
        said += " " + (" ".join(x.replace("|", "").strip() for x in cells) or lines[1])
    said = " ".join(said.split())
    match getattr(error, "span", None):
        case {"filename": str() as file, "line": int() as line}:
            said += f" ({file}, line {line})"
    return said if len(said) <= 400 else f"{said[:400]}..."


@contextmanager
def _codegen_workers(jobs: int | None) -> Iterator[None]:
    """PyPTO reads how many assemblers it may run from the environment."""
    name = "PYPTO_CODEGEN_MAX_WORKERS"
    before = os.environ.get(name)
    if jobs is not None:
        os.environ[name] = str(jobs)
    try:
        yield
    finally:
        if before is not None:
            os.environ[name] = before
        elif jobs is not None:
            del os.environ[name]


def _mib(size: int) -> str:
    return f"{size / (1 << 20):.1f} MiB"


def _counted(kernels: int) -> str:
    return f"{kernels} kernel{'s' if kernels > 1 else ''}"
