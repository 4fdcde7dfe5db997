"""A stand-in for a CUDA device on the CPU, so that the executor for a card runs without one.

The kernels are those operations in plain torch. A captured step is recorded operation by operation,
with the tensors that each one read and wrote; replaying it runs the same operations on the same
tensors. As in a CUDA graph, nothing that Python computes is computed again, and what needs a value
of the device while it is recorded is an error.
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from attrs import evolve
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tilewright import hookimpl
from tilewright.types import DTYPES
from tilewright_torch import plugin
from tilewright_torch.card import create_on_card

QUERY_BLOCK = {2: 4, 4: 4}
"""Small, so that short prompts fill several blocks."""


class Kernels:
    """The functions of ``tilewright_torch.card_kernels`` in plain torch."""

    QUERY_BLOCK = QUERY_BLOCK

    class Context:
        def __init__(self, **fields):
            self.__dict__.update(fields)

    @staticmethod
    def tune(weights, capture):
        pass

    @staticmethod
    def splits(sequences, kv_heads, processors):
        return 2

    @staticmethod
    def rms_norm(x, weight, eps):
        return F.rms_norm(x, x.shape[-1:], None, eps) * weight

    @staticmethod
    def add_rms_norm(x, delta, weight, eps):
        total = x + delta
        return total, Kernels.rms_norm(total, weight, eps)

    @staticmethod
    def silu_mul(gate_up):
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up

    @staticmethod
    def linear(x, weight, bias, out=None):
        made = F.linear(x, weight, bias)
        return made if out is None else out.copy_(made)

    @staticmethod
    def rotate_and_cache(qkv, norms, eps, cos, sin, rope_rows, slots, keys, values):
        kv_heads, head_dim = keys.shape[1:]
        states = qkv.view(len(qkv), -1, head_dim)
        q, k, v = states.split([states.shape[1] - 2 * kv_heads, kv_heads, kv_heads], 1)
        if norms:
            q, k = Kernels.rms_norm(q, norms[0], eps), Kernels.rms_norm(k, norms[1], eps)
        c = cos.index_select(0, rope_rows).unsqueeze(1)
        s = sin.index_select(0, rope_rows).unsqueeze(1)

        def rotated(x):
            low, high = x.float().chunk(2, -1)
            return torch.cat((low * c - high * s, high * c + low * s), -1).to(x.dtype)

        keys.index_copy_(0, slots.long(), rotated(k).to(keys.dtype))
        values.index_copy_(0, slots.long(), v.to(values.dtype))
        return rotated(q)

    @staticmethod
    def attention(q, keys, values, at, window):
        """Each row alone, over all pages that a sequence may have."""
        rows, heads, head_dim = q.shape
        kv_heads, size = keys.shape[1], at.page_size
        row = torch.arange(rows)
        sequence = torch.searchsorted(at.starts.long(), row, right=True) - 1
        queries = at.starts.long().diff()
        length = at.lengths.long()[sequence]
        position = length - queries[sequence] + row - at.starts.long()[sequence]
        seen = torch.arange(len(at.table) // len(at.lengths) * size)
        page_at = sequence.unsqueeze(1) * at.width.long() + seen // size
        page = at.table.long()[page_at.clamp(max=len(at.table) - 1)]
        inside = seen <= position.unsqueeze(1)
        if window is not None:
            inside = inside & (seen > position.unsqueeze(1) - window)
        slots = torch.where(inside, page * size + seen % size, 0)
        compute = torch.promote_types(q.dtype, keys.dtype)
        readable = inside[:, :, None, None]
        k = torch.where(readable, keys[slots].to(compute).float(), 0.0)
        v = torch.where(readable, values[slots].to(compute).float(), 0.0)
        grouped = q.view(rows, kv_heads, heads // kv_heads, head_dim).to(compute).float()
        scores = torch.einsum("tkgd,tnkd->tkgn", grouped, k) * head_dim**-0.5
        weights = scores.masked_fill(~inside[:, None, None, :], float("-inf")).softmax(-1)
        out = torch.einsum("tkgn,tnkd->tkgd", weights, v)
        return out.reshape(rows, heads * head_dim).to(q.dtype)


class _Recorder(TorchDispatchMode):
    """Runs operations and keeps them."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, (
            "a value of the device was read while a step was captured"
        )
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result


class Card:
    """A ``tilewright_torch.card.Card`` without a device."""

    name = "cuda:0"
    device = torch.device("cpu")
    kernels = Kernels
    processors = 4

    def __init__(self):
        self.captured = 0
        self.replayed = 0
        self.waited = 0

    def free_memory(self):
        return 2**32

    def active(self):
        return nullcontext()

    def pinned(self, *shape, dtype):
        return torch.empty(shape, dtype=dtype)

    def record(self):
        return self

    def synchronize(self):
        self.waited += 1

    def capture(self, run):
        self.captured += 1
        with _Recorder() as recorder:
            run()

        def replay():
            self.replayed += 1
            for func, args, kwargs, result in recorder.calls:
                again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    if torch.is_tensor(old) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)

        return replay

    def release(self):
        pass


class Plugin:
    """The executor ``torch`` with a card of this module; ``cards`` has those that were made."""

    tilewright_api = 2

    def __init__(self, use_graphs=True):
        self.use_graphs = use_graphs
        self.cards = []

    @hookimpl
    def plugin_info(self):
        return evolve(plugin.plugin_info(), options=None, weight_dtypes=DTYPES)

    @hookimpl
    def tiles(self, runtime_config):
        return plugin.tiles(runtime_config)

    @hookimpl
    def create_executor(self, model_config, runtime_config, weights, layers):
        runtime = runtime_config
        if runtime.device is None:
            runtime = evolve(runtime, device="cuda")
        plugin._check(model_config, runtime, plugin.Options())
        self.cards.append(Card())
        page_size = runtime.page_size or plugin.PAGE_SIZE
        made = create_on_card(self.cards[-1], model_config, runtime, weights, layers, page_size)
        made.use_graphs = self.use_graphs
        return made


PLUGIN = Plugin()
"""For entry points."""
