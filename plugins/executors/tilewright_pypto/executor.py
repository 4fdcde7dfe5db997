"""A model composed from the kernels of a set: embeddings on the host, then one kernel call per
layer and one for the head, or one call of a program for the whole model.

Layer by layer, activations pass through host memory, so every layer's output can be observed. The
KV cache stays on the device, and so do the weights, unless option ``weights_on_device`` is false:
then they stay in host memory and are copied to the device for each call.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from attrs import frozen
from torch import Tensor

from tilewright.errors import ExecutorError
from tilewright.kv_storage import page_shape
from tilewright.layerwise import LayerwiseBase
from tilewright.rope import frequencies
from tilewright.types import (
    ExecutorLimits,
    KernelSet,
    KvCacheSpec,
    KvLayer,
    ModelConfig,
    StepBatch,
    Tap,
    TensorSource,
)
from tilewright.weights import expected_tensors
from tilewright_kernels.contract import Contract
from tilewright_pypto.binding import ROW_ORDER, contracts, takes_all_layers
from tilewright_pypto.device import Device, Kernel
from tilewright_pypto.packing import packed_tensors, unpack
from tilewright_pypto.weight_names import WHOLE, packed_name


@frozen(kw_only=True)
class Model:
    """Arguments of the kernels that are the same in every step. Device tensors are handles."""

    config: ModelConfig
    kernels: Mapping[str, Kernel]
    parameters: Mapping[str, frozenset[str]]
    """Names of each kernel's parameters."""
    embedding: Tensor | None
    """[vocab_size, hidden_size] BF16, on the host; None in a part without layer 0."""
    rope: dict[str, Any]
    """``rope_cos`` and ``rope_sin``, [max_seq_len, head_dim] FP32."""
    layers: Sequence[dict[str, Any]]
    """Arguments that differ between layers, for each layer of this part."""
    all_layers: bool
    """Whether the weights in ``layers`` and the caches hold all layers, one after another."""
    head: dict[str, Any]
    """Empty in a part without the last layer."""


def load(
    config: ModelConfig,
    layers: range,
    weights: TensorSource,
    packed: bool,
    positions: int,
    kernels: KernelSet,
    device: Device,
    weights_on_device: bool,
    who: str = "the kernel set",
) -> "PyptoExecutor | FusedExecutor":
    """Compile the kernels, then read and upload the weights, layer by layer.

    Weights that are not packed yet are packed on the way. positions: those of the RoPE tables. who:
    the kernel set in words. Raises ExecutorError.
    """
    found = contracts(kernels, config, who)
    all_layers = any(map(takes_all_layers, found.values()))
    whole = layers == range(config.num_layers)
    if all_layers and not whole:
        raise ExecutorError(
            f"{who} has kernels for all layers together: it cannot run layers {layers.start} to "
            f"{layers.stop - 1} of {config.num_layers} alone"
        )
    compiled = device.load(list(found), kernels)
    keep = device.keep if weights_on_device else _stay
    read = weights.get if packed else _packing(config, weights)
    embedding = read("embedding") if 0 in layers else None
    model = Model(
        config=config,
        kernels=compiled,
        parameters={n: frozenset(p.name for p in c.parameters) for n, c in found.items()},
        embedding=embedding,
        layers=_layers(config, layers, read, keep, all_layers),
        all_layers=all_layers,
        head=_head(config, layers, read, keep, embedding, found),
        rope={name: device.keep(table) for name, table in rope_tables(config, positions).items()},
    )
    spec = KvCacheSpec(
        num_layers=len(layers),
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        page_size=kernels.page_size,
        dtype="bfloat16",
        row_order=ROW_ORDER,
        memory_limit=device.memory_limit,
    )
    layerwise = "prefill_layer" in found
    limits = ExecutorLimits(
        max_batch_size=kernels.max_batch_size,
        max_batch_tokens=kernels.max_batch_tokens,
        max_seq_len=positions,
        mixed=kernels.mixed,
        tap_exact=kernels.fused_exact or not layerwise or "prefill_model" not in found,
    )
    executor = PyptoExecutor(model, device, spec, limits, layers)
    return executor if layerwise else FusedExecutor(executor)


def _layers(
    config: ModelConfig,
    layers: range,
    read: Callable[[str], Tensor],
    keep: Callable[[Tensor], Any],
    all_layers: bool,
) -> list[dict[str, Any]]:
    """The weights of each layer, read in the order of the packed files, and its number and window.

    all_layers: each dict has the weights of all layers, as one tensor.
    """
    numbers = [
        {
            "layer": torch.tensor([i], dtype=torch.int32),
            "window": torch.tensor([config.window(i) or 0], dtype=torch.int32),
        }
        for i in layers
    ]
    names = [packed_name(n) for n in expected_tensors(config, layers) if n not in WHOLE]
    if not all_layers:
        kept: list[dict[str, Any]] = [{} for _ in layers]
        for name in names:
            _, layer, parameter = name.split(".")
            kept[layers.index(int(layer))][parameter] = keep(read(name))
        return [weights | number for weights, number in zip(kept, numbers, strict=True)]
    parameters = dict.fromkeys(name.split(".")[2] for name in names)
    joined = {p: keep(torch.cat([read(f"layers.{i}.{p}") for i in layers])) for p in parameters}
    return [joined | number for number in numbers]


def _head(
    config: ModelConfig,
    layers: range,
    read: Callable[[str], Tensor],
    keep: Callable[[Tensor], Any],
    embedding: Tensor | None,
    found: Mapping[str, Contract],
) -> dict[str, Any]:
    if config.num_layers - 1 not in layers:
        return {}
    head = {"final_norm": keep(read("final_norm"))}
    tied = config.tie_word_embeddings
    if tied or any(p.name == "embedding" for c in found.values() for p in c.parameters):
        head["embedding"] = keep(read("embedding") if embedding is None else embedding)
    head["lm_head"] = head["embedding"] if tied else keep(read("lm_head"))
    return head


def _packing(config: ModelConfig, weights: TensorSource) -> Callable[[str], Tensor]:
    packed = {t.name: t for t in packed_tensors(config, weights)}
    return lambda name: packed[name].read()


def _stay(tensor: Tensor) -> Tensor:
    return tensor


def rope_tables(config: ModelConfig, positions: int) -> dict[str, Tensor]:
    """Cosines and sines of each position, [positions, head_dim] FP32, each half repeated."""
    frequency, scale = frequencies(config)
    angle = torch.arange(positions).float().unsqueeze(1) * frequency
    return {
        "rope_cos": torch.cat((angle.cos(), angle.cos()), -1) * scale,
        "rope_sin": torch.cat((angle.sin(), angle.sin()), -1) * scale,
    }


@frozen(eq=False)
class _Step:
    """What all kernels of a step share."""

    batch: StepBatch
    phase: str
    """``decode`` where each sequence has one token and the set has a kernel for that; else
    ``prefill``."""
    tensors: dict[str, Tensor]
    """Arguments that are the same in all layers."""
    number: int
    """Counts the executor's steps from 0."""


class PyptoExecutor(LayerwiseBase[Model, _Step]):
    """A ``LayerwiseExecutor`` (see tilewright.types) over a kernel set.

    Without a tap, a step runs the set's program for the whole model, if it has one.
    """

    plugin = "pypto-npu"

    def __init__(
        self,
        model: Model,
        device: Device,
        kv_cache_spec: KvCacheSpec,
        limits: ExecutorLimits,
        layers: range,
    ):
        super().__init__(model, kv_cache_spec, layers, model.config.num_layers)
        self.limits = limits
        self.device = device.name
        self._device = device
        self._kv: list[tuple[Any, Any]] = []
        """Rows of head_dim of the keys and values, in the kernels' order, for each layer."""
        self._num_steps = 0

    def allocate_kv(self, num_pages: int) -> None:
        allocate, count = self._device.allocate, len(self.layers)
        shape = (num_pages, *page_shape(self.kv_cache_spec))
        if self._opened().all_layers:
            shape = (count * num_pages, *shape[1:])
            self._kv = [(allocate(shape, torch.bfloat16), allocate(shape, torch.bfloat16))] * count
            return
        self._kv = [
            (allocate(shape, torch.bfloat16), allocate(shape, torch.bfloat16)) for _ in self.layers
        ]

    def close(self) -> None:
        super().close()
        self._kv = []
        self._device.close()

    def forward(self, batch: StepBatch, tap: "Tap | None" = None) -> Tensor:
        kernels = self._opened().kernels
        if tap is None and "prefill_model" in kernels:
            return self.run_program(batch)
        return super().forward(batch, tap)

    def run_program(self, batch: StepBatch) -> Tensor:
        """The step's wanted logits, [L, vocab_size] FP32, by the program for the whole model."""
        step = self._begin(batch, "model")
        model, kernel = self._opened(), f"{step.phase}_model"
        # A tensor has at least one row, also in a step whose logits nobody wants.
        rows = batch.logits_rows if len(batch.logits_rows) else batch.logits_rows.new_zeros(1)
        logits = torch.empty(len(rows), model.config.vocab_size)
        keys, values = self._kv[0]
        tensors = step.tensors | model.rope | model.layers[0] | model.head
        tensors |= {"logits_rows": rows.int(), "logits": logits, "k_cache": keys, "v_cache": values}
        if "hidden" in model.parameters[kernel]:
            tensors["hidden"] = self.embed(step)
        self._call(step, kernel, "the whole model", tensors)
        return logits[: len(batch.logits_rows)]

    def begin(self, batch: StepBatch) -> _Step:
        return self._begin(batch, "layer")

    def _begin(self, batch: StepBatch, what: str) -> _Step:
        """what: ``layer`` or ``model``: which kernels run the step."""
        kernels = self._opened().kernels
        self._check(batch)
        starts = batch.query_starts
        tensors = {
            "token_ids": batch.token_ids.int(),
            "positions": batch.positions,
            "context_lens": batch.context_lens,
            "query_starts": starts[:-1].contiguous(),
            "query_lens": starts.diff(),
            "block_table": batch.block_table.flatten(),
            "slot_mapping": batch.slot_mapping,
        }
        single = batch.max_query_len == 1 and f"decode_{what}" in kernels
        self._num_steps += 1
        return _Step(batch, "decode" if single else "prefill", tensors, self._num_steps - 1)

    def embed(self, step: _Step, tap: "Tap | None" = None) -> Tensor:
        embedding = self._opened().embedding
        if embedding is None:
            raise ExecutorError("executor pypto-npu has no embedding: layer 0 is in another part")
        hidden = F.embedding(step.batch.token_ids, embedding)
        if tap:
            tap("embed", hidden)
        return hidden

    def run_layer(
        self, step: _Step, layer: int, hidden: Tensor, tap: "Tap | None" = None
    ) -> Tensor:
        model, at = self._opened(), self.layers.index(layer)
        keys, values = self._kv[at]
        out = torch.empty_like(hidden)
        tensors = step.tensors | model.rope | model.layers[at]
        tensors |= {"k_cache": keys, "v_cache": values, "hidden": hidden, "out": out}
        self._call(step, f"{step.phase}_layer", f"layer {layer}", tensors)
        if tap:
            tap(f"layers.{layer}.output", out)
        return out

    def run_head(self, step: _Step, hidden: Tensor, tap: "Tap | None" = None) -> Tensor:
        model = self._opened()
        if not model.head:
            raise ExecutorError("executor pypto-npu has no head: the last layer is in another part")
        logits = torch.empty(hidden.shape[0], model.config.vocab_size)
        if len(hidden):
            tensors = model.head | {"hidden": hidden, "logits": logits}
            self._call(step, "head", "the head", tensors)
        if tap:
            tap("logits", logits)
        return logits

    def read_kv(self, layer: int, pages: Sequence[int]) -> KvLayer:
        return KvLayer(*(self._pages(kept, layer)[1][list(pages)] for kept in self._kept(layer)))

    def write_kv(self, layer: int, pages: Sequence[int], cache: KvLayer) -> None:
        for kept, new in zip(self._kept(layer), (cache.key, cache.value), strict=True):
            rows, paged = self._pages(kept, layer)
            paged[list(pages)] = new
            self._device.write(kept, rows)

    def _kept(self, layer: int) -> tuple[Any, Any]:
        return self._kv[self.layers.index(layer)]

    def _pages(self, kept: Any, layer: int) -> tuple[Tensor, Tensor]:
        """All rows of a cache tensor on the CPU, and a view of them as the layer's pages."""
        rows = self._device.read(kept)
        pages = rows.view(-1, *page_shape(self.kv_cache_spec))
        if self._opened().all_layers:
            pages = pages.chunk(len(self.layers))[self.layers.index(layer)]
        return rows, pages

    def weight(self, name: str) -> Tensor:
        model = self._opened()
        if name not in expected_tensors(model.config, self.layers):
            raise KeyError(name)
        if name == "model.embed_tokens.weight":
            embedding = model.head.get("lm_head") if model.embedding is None else model.embedding
            return self._device.read(embedding)
        if name in WHOLE:
            return unpack(name, self._device.read(model.head[WHOLE[name]]))
        _, layer, parameter = packed_name(name).split(".")
        at = self.layers.index(int(layer))
        packed = self._device.read(model.layers[at][parameter])
        if model.all_layers:
            packed = packed.chunk(len(self.layers))[at]
        return unpack(name, packed)

    def _call(self, step: _Step, kernel: str, where: str, tensors: Mapping[str, Any]) -> None:
        model, self._device.place = self._opened(), f"step {step.number}, {where}"
        named = {name: tensors[name] for name in model.parameters[kernel] if name in tensors}
        try:
            with torch.inference_mode():
                model.kernels[kernel](**named)
        except ExecutorError as error:
            raise type(error)(f"{self._device.place}: {error}") from error

    def _check(self, batch: StepBatch) -> None:
        """Refuse a step beyond the compiled limits: the kernels would overrun their buffers."""
        for what, found, most in (
            ("sequences", len(batch.context_lens), self.limits.max_batch_size),
            ("tokens", len(batch.token_ids), self.limits.max_batch_tokens),
            ("tokens of a sequence", int(batch.context_lens.max()), self.limits.max_seq_len),
        ):
            if most is not None and found > most:
                raise ExecutorError(
                    f"the kernels are compiled for steps of at most {most} {what}, found {found}: "
                    "stay within the executor's limits"
                )


class FusedExecutor:
    """An ``Executor`` over a kernel set that has no kernels for single layers."""

    def __init__(self, programs: PyptoExecutor):
        self._programs = programs
        self.device, self.limits = programs.device, programs.limits
        self.kv_cache_spec = programs.kv_cache_spec
        self.allocate_kv, self.close = programs.allocate_kv, programs.close
        self.read_kv, self.write_kv = programs.read_kv, programs.write_kv
        self.weight = programs.weight

    def forward(self, batch: StepBatch, tap: "Tap | None" = None) -> Tensor:
        logits = self._programs.run_program(batch)
        if tap:
            tap("logits", logits)
        return logits
