"""A model whose layers are split over processes, one torch executor in each.

A part gets a step as it is pickled and the hidden states of the part before it, and sends its own
on: what an executor for several machines does.
"""

import multiprocessing
import pickle
from collections.abc import Sequence

import torch

from tilewright import LLMEngine
from tilewright.settings import DEMO_MODEL
from tilewright.types import ExecutorLimits, KvCacheSpec, ModelConfig, RuntimeConfig
from tilewright_testing.models import make_model
from tilewright_torch.plugin import create_executor

PAGE_SIZE = 4


def make_part(model, dtype, layers):
    """A torch executor of some layers. model: arguments of make_model, or None for the bundled
    model."""
    if model is None:
        with LLMEngine.from_plugins() as engine:
            loaded = engine.load(DEMO_MODEL)
        config, weights = loaded.config, loaded.weights
    else:
        made = make_model(**model)
        config, weights = made.config, made.source()
    runtime = RuntimeConfig(weight_dtype=dtype, kv_dtype=dtype, page_size=PAGE_SIZE)
    return create_executor(config, runtime, weights, layers, None)


def run_part(executor, batch, hidden, is_last):
    """Hidden states after the layers of a part; of the last part the logits."""
    step = executor.begin(batch)
    if hidden is None:
        hidden = executor.embed(step)
    for layer in executor.layers:
        hidden = executor.run_layer(step, layer, hidden)
    return executor.run_head(step, hidden[batch.logits_rows]) if is_last else hidden


def serve(pipe, threads):
    """Answer calls, one at a time, until the pipe is closed."""
    torch.set_num_threads(threads)
    executor = None
    while True:
        try:
            name, arguments = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        if name == "make_part":
            executor, answer = make_part(*arguments), None
        elif name == "run_part":
            answer = run_part(executor, *arguments)
        else:
            answer = getattr(executor, name)(*arguments)
        pipe.send_bytes(pickle.dumps(answer))


class Process:
    """A process with a part of a model."""

    def __init__(self):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        # The bits of a matrix product depend on the number of threads.
        arguments = (theirs, torch.get_num_threads())
        self.process = context.Process(target=serve, args=arguments, daemon=True)
        self.process.start()
        theirs.close()

    def call(self, name, *arguments):
        self.pipe.send_bytes(pickle.dumps((name, arguments)))
        return pickle.loads(self.pipe.recv_bytes())

    def end(self):
        self.pipe.close()
        self.process.join(10)


class Split:
    """An ``Executor`` of a whole model over processes that have its parts."""

    device = "two processes"
    limits = ExecutorLimits()

    def __init__(
        self,
        config: ModelConfig,
        processes: Sequence[Process],
        parts: Sequence[range],
        model,
        dtype,
    ):
        self.processes, self.parts = processes, parts
        self.kv_cache_spec = KvCacheSpec(
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            page_size=PAGE_SIZE,
            dtype=dtype,
        )
        for process, layers in zip(processes, parts, strict=True):
            process.call("make_part", model, dtype, layers)

    def allocate_kv(self, num_pages):
        for process in self.processes:
            process.call("allocate_kv", num_pages)

    def forward(self, batch, tap=None):
        hidden = None
        for process in self.processes:
            hidden = process.call("run_part", batch, hidden, process is self.processes[-1])
        return hidden

    def read_kv(self, layer, pages):
        return self._with(layer).call("read_kv", layer, pages)

    def write_kv(self, layer, pages, cache):
        self._with(layer).call("write_kv", layer, pages, cache)

    def _with(self, layer):
        return next(p for p, own in zip(self.processes, self.parts, strict=True) if layer in own)

    def close(self):
        for process in self.processes:
            process.call("close")
