"""The compiled path: step.cpp, built on this machine, runs steps of few tokens on the CPU.

Weights are read where they are, in the layout of the checkpoint. One call runs all layers of a
step, so that a decode step costs little more than reading the weights once.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from attrs import frozen
from torch import Tensor

from tilewright.errors import ExecutorError, PluginWarning, quoted
from tilewright.paths import cache_folder
from tilewright.types import KvLayer, ModelConfig, StepBatch
from tilewright_torch.linear import Dense, Linear
from tilewright_torch.openmp import openmp_libraries
from tilewright_torch.quantised import Int4, Int8
from tilewright_torch.weights import Layer, Model

SOURCE = Path(__file__).with_name("step.cpp")

COMPILERS = ("g++", "c++")

FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Numbers of the dtypes in step.cpp."""

_Pointer, _Int = ctypes.c_void_p, ctypes.c_int64


class _Matrix(ctypes.Structure):
    _fields_ = (
        ("weight", _Pointer),
        ("scales", _Pointer),
        ("bias", _Pointer),
        ("rows", _Int),
        ("columns", _Int),
        ("tile", _Int),
    )


_PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")


class _Layer(ctypes.Structure):
    _fields_ = (
        ("attn_norm", _Pointer),
        ("mlp_norm", _Pointer),
        ("q_norm", _Pointer),
        ("k_norm", _Pointer),
        *((name, _Matrix) for name in _PROJECTIONS),
        ("keys", _Pointer),
        ("values", _Pointer),
        ("window", _Int),
    )


class _Model(ctypes.Structure):
    _fields_ = (
        ("hidden", _Int),
        ("heads", _Int),
        ("kv_heads", _Int),
        ("head_dim", _Int),
        ("inner", _Int),
        ("page_size", _Int),
        ("threads", _Int),
        ("eps", ctypes.c_float),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        ("tokens", _Int),
        ("sequences", _Int),
        ("max_pages", _Int),
        ("angles", _Pointer),
        ("slots", _Pointer),
        ("query_starts", _Pointer),
        ("lengths", _Pointer),
        ("block_table", _Pointer),
        ("scale", ctypes.c_float),
    )


@frozen(eq=False)
class Step:
    """A step as step.cpp reads it, and the tensors that it points to."""

    pointers: _Step
    scratch: Tensor
    kept: tuple[Tensor, ...]


class Native:
    """A model's layers and head in step.cpp."""

    def __init__(self, model: Model, layers: range, kv: Sequence[KvLayer], page_size: int):
        """layers: those of the model's layers that it has, whose cache ``kv`` is.

        Raises ExecutorError when step.cpp cannot be compiled.
        """
        config = model.config
        self._library = library(
            model.dtype, kv[0].key.dtype, isinstance(model.layers[0].q, Int4 | Int8)
        )
        self.max_tokens: int = self._library.max_tokens()
        """Tokens of a step, or rows of the head, that it takes: oneDNN is faster with more."""
        self._dtype = model.dtype
        self._kept = model, kv
        self._model = _Model(
            hidden=config.hidden_size,
            heads=config.num_heads,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            inner=config.intermediate_size,
            page_size=page_size,
            eps=config.norm_eps,
        )
        self._layers = (_Layer * len(layers))(
            *(
                _layer(config, weights, cache, config.window(i))
                for i, weights, cache in zip(layers, model.layers, kv, strict=True)
            )
        )
        self._head = None if model.head is None else _matrix(model.head)

    def step(self, batch: StepBatch, angles: Tensor, scale: float, slots: Tensor) -> Step:
        """Prepare a step of at most ``max_tokens`` tokens.

        angles, scale: as ``rope.tables`` takes them. slots: [T] int64.
        """
        read = (angles, slots, batch.query_starts, batch.context_lens, batch.block_table)
        kept = tuple(tensor.contiguous() for tensor in read)
        pointers = _Step(
            len(slots),
            len(batch.context_lens),
            batch.block_table.shape[1],
            *(tensor.data_ptr() for tensor in kept),
            scale,
        )
        self._model.threads = torch.get_num_threads()
        size = self._library.scratch_bytes(ctypes.byref(self._model), ctypes.byref(pointers))
        return Step(pointers, torch.empty(size, dtype=torch.uint8), kept)

    def run_layers(self, step: Step, first: int, count: int, hidden: Tensor) -> Tensor:
        """Run some layers in turn, numbered among those that it has, on hidden [T, hidden_size]."""
        hidden = hidden.to(self._dtype, copy=True, memory_format=torch.contiguous_format)
        self._library.run_layers(
            ctypes.byref(self._model),
            ctypes.byref(self._layers[first]),
            count,
            ctypes.byref(step.pointers),
            hidden.data_ptr(),
            step.scratch.data_ptr(),
        )
        return hidden

    def run_head(self, hidden: Tensor, final_norm: Tensor) -> Tensor | None:
        """Logits [L, vocab_size] float32 of hidden [L, hidden_size]; None if it does not take so
        many rows."""
        tokens = len(hidden)
        if tokens > self.max_tokens:
            return None
        assert self._head is not None
        hidden = hidden.to(self._dtype).contiguous()
        logits = torch.empty(tokens, self._head.rows)
        self._model.threads = torch.get_num_threads()
        self._library.run_head(
            ctypes.byref(self._model),
            final_norm.data_ptr(),
            ctypes.byref(self._head),
            tokens,
            hidden.data_ptr(),
            logits.data_ptr(),
        )
        return logits


def _layer(config: ModelConfig, weights: Layer, kv: KvLayer, window: int | None) -> _Layer:
    q_norm = k_norm = None
    if weights.qk_norm is not None:
        q_norm, k_norm = (weights.qk_norm[i].data_ptr() for i in (0, config.num_heads))
    return _Layer(
        attn_norm=weights.attn_norm.data_ptr(),
        mlp_norm=weights.mlp_norm.data_ptr(),
        q_norm=q_norm,
        k_norm=k_norm,
        keys=kv.key.data_ptr(),
        values=kv.value.data_ptr(),
        window=window or 0,
        **{name: _matrix(getattr(weights, name)) for name in _PROJECTIONS},
    )


def _matrix(product: Linear) -> _Matrix:
    assert isinstance(product, Dense | Int8 | Int4)
    bias = None if product.bias is None else product.bias.data_ptr()
    if isinstance(product, Dense):
        return _Matrix(product.weight.data_ptr(), None, bias, *product.weight.shape, 1)
    at = product.values.data_ptr(), product.scales.data_ptr(), bias
    if isinstance(product, Int8):
        return _Matrix(*at, *product.values.shape, 1)
    return _Matrix(*at, product.out, product.values.shape[1], product.tile)


@cache
def library(
    weight_dtype: torch.dtype, kv_dtype: torch.dtype, quantised: bool = False
) -> ctypes.CDLL:
    """step.cpp, compiled for these dtypes on this machine; from the disk if it was before.

    The folder is ``tilewright/torch`` in the user's cache.

    Raises ExecutorError without a compiler, with what the compiler said when it failed, and when
    the folder cannot be written or libraries cannot be loaded from it.
    """
    command = compiler()
    flags = [
        *FLAGS,
        f"-DWEIGHT_DTYPE={_DTYPES[weight_dtype]}",
        f"-DKV_DTYPE={_DTYPES[kv_dtype]}",
        f"-DQUANTISED={int(quantised)}",
    ]
    openmp = openmp_libraries()  # so that both share its threads
    key = (SOURCE.read_text(), *command, *flags, *openmp, _cpu())
    digest = hashlib.sha256("\n".join(key).encode()).hexdigest()
    folder, note = cache_folder("tilewright", "torch")
    if note:
        warnings.warn(f"{note} for the compiled step", PluginWarning, stacklevel=2)
    built = folder / f"step-{digest[:16]}.so"
    if not _is_whole(built):
        _build(command, flags, openmp, built)
    try:
        loaded = ctypes.CDLL(str(built))
    except OSError as error:
        raise ExecutorError(
            f"the compiled step cannot be loaded ({error}): set XDG_CACHE_HOME to a folder that is "
            "not mounted noexec or CXX to another C++ compiler, or leave option compile out"
        ) from error
    loaded.max_tokens.restype = loaded.scratch_bytes.restype = _Int
    loaded.scratch_bytes.argtypes = (_Pointer, _Pointer)
    loaded.run_layers.restype = loaded.run_head.restype = None
    loaded.run_layers.argtypes = (_Pointer, _Pointer, _Int, _Pointer, _Pointer, _Pointer)
    loaded.run_head.argtypes = (_Pointer, _Pointer, _Pointer, _Int, _Pointer, _Pointer)
    return loaded


def compiler() -> list[str]:
    """The command of the C++ compiler: $CXX, or the first of COMPILERS that is installed."""
    try:
        asked = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise ExecutorError(
            f"CXX must be the command of a C++ compiler, found {quoted(os.environ['CXX'])} "
            f"({error}): mend or unset it, or leave option compile out"
        ) from error
    for command in [asked] if asked else [[name] for name in COMPILERS]:
        if found := shutil.which(command[0]):
            return [found, *command[1:]]
    expected = f"CXX = {' '.join(asked)}" if asked else f"one of {', '.join(COMPILERS)}"
    raise ExecutorError(
        f"option compile needs a C++ compiler, and {expected} is not on the PATH: install one "
        "(Debian: apt install g++), or leave the option out"
    )


def _is_whole(built: Path) -> bool:
    """Whether a library is as ``_build`` left it: the loader would crash on one that was cut off
    when a disk was full or a machine went down."""
    try:
        content = built.read_bytes()
    except OSError:
        return False
    size = hashlib.sha256().digest_size
    return content[-size:] == _digest(content[:-size])


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def _build(compiler: list[str], flags: list[str], libraries: list[str], built: Path) -> None:
    """Compile step.cpp, and append the digest of the library, which ``_is_whole`` checks."""
    try:
        built.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=built.parent) as folder:
            made = Path(folder, built.name)
            output = ["-o", str(made), "-Wl,--as-needed", *libraries]
            why = _failure([*compiler, *flags, str(SOURCE), *output])
            if not why and not made.exists():
                why = "it wrote no file"
            if why:
                raise ExecutorError(
                    f"{shlex.join(compiler)} could not compile {SOURCE} ({why}): set CXX to "
                    "another C++ compiler (GCC 12 is known to work), or leave option compile out"
                )
            content = made.read_bytes()
            made.write_bytes(content + _digest(content))
            os.replace(made, built)
    except OSError as error:
        raise ExecutorError(
            f"the compiled step cannot be written to {built.parent} ({error.strerror}): make it "
            "writable, set XDG_CACHE_HOME, or leave option compile out"
        ) from error


def _failure(command: list[str]) -> str:
    """Run a compiler. Returns why it failed, in one line; empty if it did not."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            env={**os.environ, "LC_ALL": "C"},
        )
    except OSError as error:
        return f"it cannot be run: {error.strerror}"
    if not done.returncode:
        return ""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith("collect2:")]  # after the linker's own
    lines = [line for line in lines if "error" in line] or lines[-1:]
    return lines[0][:200] if lines else f"no message, exit status {done.returncode}"


def _cpu() -> str:
    """What -march=native depends on; homes are shared between machines."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = ("model name", "flags", "Features")
    return "\n".join([platform.machine(), *sorted({x for x in lines if x.startswith(names)})])
