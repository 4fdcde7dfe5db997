import ctypes
import json
import logging
import os
from dataclasses import dataclass

import torch

from pypto import events

log = logging.getLogger("pypto.runtime.runtime_base")

PLATFORMS = ("a2a3", "a2a3sim", "a5", "a5sim")


def configure_log(level, *, sync_pypto=False):
    events.note(f"runtime log {level}")


@dataclass
class RunConfig:
    platform: str = "a2a3sim"
    device_id: int = 0
    save_kernels_dir: str | None = None
    ring_task_window: int | None = None
    ring_heap: int | None = None
    ring_dep_pool: int | None = None

    def __post_init__(self):
        if self.platform not in PLATFORMS:
            raise ValueError(f"Invalid platform {self.platform!r}")
        for name, least in (("ring_task_window", 4), ("ring_heap", 1024)):
            size = getattr(self, name)
            if size is not None and (size < least or size & (size - 1)):
                raise ValueError(f"{name} must be a power of 2 >= {least}")
        if self.ring_dep_pool is not None and not 4 <= self.ring_dep_pool < 1 << 31:
            raise ValueError("ring_dep_pool must be in [4, INT32_MAX]")


class DeviceTensor:
    """A handle to memory that only the worker can access."""

    def __init__(self, data_ptr, shape, dtype):
        self.data_ptr = data_ptr
        self.shape = shape
        self.dtype = dtype


class ChipWorker:
    def __init__(self, config=None):
        events.at("open")
        self._config = config
        self._memory = {}
        self._open = True
        self._next = 0x1000

    def _require_open(self):
        if not self._open:
            raise RuntimeError("ChipWorker is not initialized")

    def alloc_tensor(self, shape, dtype, *, init=None, worker_id=0):
        self._require_open()
        events.at("malloc")
        size = dtype.itemsize
        for extent in shape:
            if extent <= 0:
                raise ValueError("shape must contain only positive dimensions")
            size *= extent
        used = sum(t.nbytes for t in self._memory.values())
        if used + size > int(os.environ.get("FAKE_PYPTO_MEMORY", 1 << 40)):
            raise RuntimeError("malloc failed")
        if init is None:
            tensor = torch.full(tuple(shape), float("nan")).to(dtype)
        else:
            if init.dtype != dtype or init.shape != tuple(shape) or not init.is_contiguous():
                raise ValueError("init must have the shape and dtype")
            tensor = init.clone()
        self._next += 0x100
        self._memory[self._next] = tensor
        return DeviceTensor(self._next, tuple(shape), dtype)

    def copy_from(self, dst_host_ptr, src_dev_ptr, nbytes, *, worker_id=0):
        self._require_open()
        tensor = self._memory[src_dev_ptr]
        if nbytes > tensor.nbytes:
            raise ValueError("copy_from leaves the buffer")
        ctypes.memmove(dst_host_ptr, tensor.data_ptr(), nbytes)

    def copy_to(self, dst_dev_ptr, src_host_ptr, nbytes, *, worker_id=0):
        self._require_open()
        tensor = self._memory[dst_dev_ptr]
        if nbytes > tensor.nbytes:
            raise ValueError("copy_to leaves the buffer")
        ctypes.memmove(tensor.data_ptr(), src_host_ptr, nbytes)

    def register(self, compiled):
        self._require_open()
        events.at(f"register {compiled.name}")
        if compiled.platform != self._config.platform:
            raise ValueError("CompiledProgram.platform does not match")
        return RegistrationHandle(self, compiled)

    def close(self):
        for ptr in self._memory if self._open else ():
            try:
                events.at("free")
            except RuntimeError:
                log.warning("free(ptr=0x%x) failed; leaking", ptr, exc_info=True)
        self._memory.clear()
        self._open = False
        events.at("close")


class RegistrationHandle:
    def __init__(self, worker, compiled):
        self._worker = worker
        self._compiled = compiled

    def __call__(self, *args, config=None):
        worker, compiled = self._worker, self._compiled
        worker._require_open()
        names = compiled.param_names
        if len(args) != len(names):
            raise TypeError(f"expects {len(names)} arguments, got {len(args)}")
        if config.platform != worker._config.platform:
            raise ValueError("a configuration for another platform")
        rings = {n: v for n, v in vars(config).items() if n.startswith("ring_")}
        events.note(f"call {compiled.name} on {config.device_id} with {json.dumps(rings)}")
        events.at(f"run {compiled.name}")
        tensors, copies = {}, []
        for name, given in zip(names, args, strict=True):
            if isinstance(given, DeviceTensor):
                tensors[name] = worker._memory[given.data_ptr]
            elif not given.is_contiguous():
                raise ValueError(f"{name} is not contiguous")
            else:
                tensors[name] = given.clone()
                copies.append((name, given))
        compiled.kernel(**tensors)
        # Only tensors that the kernel declares as written come back to the host.
        written = {p.name for p in compiled.kernel.contract.parameters if p.direction != "in"}
        for name, host in copies:
            if name in written:
                host.copy_(tensors[name])
