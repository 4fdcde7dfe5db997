"""A Qwen3 model composed from single-layer kernels: embeddings on the host, one kernel call per
layer, then the head kernel.

Activations pass from layer to layer through host memory, so every layer's output can be observed.
The KV cache stays on the device, and so do the weights, unless option ``weights_on_device`` is
false: then they stay in host memory and are copied to the device for each call.
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
    KvCacheSpec,
    KvLayer,
    ModelConfig,
    RowOrder,
    StepBatch,
    Tap,
    TensorSource,
)
from tilewright.weights import expected_tensors
from tilewright_kernels.contract import read_contract
from tilewright_kernels.qwen3_14b import source
from tilewright_kernels.qwen3_14b.shape import LayerShape
from tilewright_pypto.device import Device, Kernel
from tilewright_pypto.packing import READ_ORDER, packed_tensors, unpack

ROW_ORDER: RowOrder = "HND"
"""Row order of the KV cache."""


@frozen(kw_only=True)
class Model:
    """Arguments of the kernels that are the same in every step. Device tensors are handles."""

    config: ModelConfig
    kernels: Mapping[str, Kernel]
    embedding: Tensor | None
    """[vocab_size, hidden_size] BF16, on the host; None in a part without layer 0."""
    rope: dict[str, Any]
    """``rope_cos`` and ``rope_sin``, [max_seq_len, head_dim] FP32."""
    layers: Sequence[dict[str, Any]]
    """The layers of this part, the first of them first."""
    head: dict[str, Any]
    """Empty in a part without the last layer."""


def load(
    config: ModelConfig,
    layers: range,
    weights: TensorSource,
    packed: bool,
    positions: int,
    shape: LayerShape,
    device: Device,
    weights_on_device: bool,
) -> "PyptoExecutor":
    """Compile the kernels, then read and upload the weights, layer by layer.

    Weights that are not packed yet are packed on the way. positions: those of the RoPE tables.
    """
    check_row_order(shape)
    kernels = device.load(source.KERNELS, shape)
    keep = device.keep if weights_on_device else _stay
    read = weights.get if packed else _packing(config, weights)
    last = config.num_layers - 1 in layers
    embedding = read("embedding") if 0 in layers else None
    kept = [{name: keep(read(f"layers.{i}.{name}")) for name in READ_ORDER} for i in layers]
    head = {}
    if last:
        head["final_norm"] = keep(read("final_norm"))
        if not config.tie_word_embeddings:
            head["lm_head"] = keep(read("lm_head"))
        else:
            head["lm_head"] = keep(read("embedding") if embedding is None else embedding)
    model = Model(
        config=config,
        kernels=kernels,
        embedding=embedding,
        rope={name: device.keep(table) for name, table in rope_tables(config, positions).items()},
        layers=kept,
        head=head,
    )
    spec = KvCacheSpec(
        num_layers=len(layers),
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        page_size=shape.page_size,
        dtype="bfloat16",
        row_order=ROW_ORDER,
        memory_limit=device.memory_limit,
    )
    limits = ExecutorLimits(
        max_batch_size=shape.max_batch,
        max_batch_tokens=shape.max_tokens,
        max_seq_len=positions,
        mixed=False,
    )
    return PyptoExecutor(model, device, spec, limits, layers)


def _packing(config: ModelConfig, weights: TensorSource) -> Callable[[str], Tensor]:
    packed = {t.name: t for t in packed_tensors(config, weights)}
    return lambda name: packed[name].read()


def _stay(tensor: Tensor) -> Tensor:
    return tensor


def check_row_order(shape: LayerShape) -> None:
    """Raises ExecutorError for layer kernels that declare another row order than ROW_ORDER."""
    for kernel in ("prefill_layer", "decode_layer"):
        constants = shape.constants(kernel)
        declared = read_contract(source.path(kernel), kernel, constants).kv_row_order
        if declared != ROW_ORDER:
            raise ExecutorError(
                f"kernel {kernel} declares KV_ROW_ORDER = {declared!r}, but executor pypto-npu "
                f"lays out the cache as {ROW_ORDER!r}: change the kernel to that row order"
            )


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
    """What all layers of a step share."""

    token_ids: Tensor
    kernel: str
    """Kernel of the layers: decode_layer where each sequence has one token, else prefill_layer."""
    tensors: dict[str, Tensor]
    """Parameters of the kernel that are the same in all layers."""
    number: int
    """Counts the executor's steps from 0."""


class PyptoExecutor(LayerwiseBase[Model, _Step]):
    """A ``LayerwiseExecutor`` (see tilewright.types) over tilewright_kernels.qwen3_14b."""

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
        """Rows of head_dim of the keys and values, in the kernels' order."""
        self._num_steps = 0

    def allocate_kv(self, num_pages: int) -> None:
        shape, allocate = (num_pages, *page_shape(self.kv_cache_spec)), self._device.allocate
        self._kv = [
            (allocate(shape, torch.bfloat16), allocate(shape, torch.bfloat16)) for _ in self.layers
        ]

    def close(self) -> None:
        super().close()
        self._kv = []
        self._device.close()

    def begin(self, batch: StepBatch) -> _Step:
        self._opened()
        self._check(batch)
        tensors = {
            "context_lens": batch.context_lens,
            "block_table": batch.block_table.flatten(),
            "slot_mapping": batch.slot_mapping,
        }
        kernel = "decode_layer"
        if batch.max_query_len > 1:
            kernel, starts = "prefill_layer", batch.query_starts
            tensors |= {"query_starts": starts[:-1].contiguous(), "query_lens": starts.diff()}
        self._num_steps += 1
        return _Step(batch.token_ids, kernel, tensors, self._num_steps - 1)

    def embed(self, step: _Step, tap: "Tap | None" = None) -> Tensor:
        embedding = self._opened().embedding
        if embedding is None:
            raise ExecutorError("executor pypto-npu has no embedding: layer 0 is in another part")
        hidden = F.embedding(step.token_ids, embedding)
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
        self._call(step, step.kernel, f"layer {layer}", tensors)
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
        rows = self._kv[self.layers.index(layer)]
        return KvLayer(*(self._pages(kept)[list(pages)] for kept in rows))

    def write_kv(self, layer: int, pages: Sequence[int], cache: KvLayer) -> None:
        rows = self._kv[self.layers.index(layer)]
        for kept, new in zip(rows, (cache.key, cache.value), strict=True):
            whole = self._pages(kept)
            whole[list(pages)] = new
            self._device.write(kept, whole.flatten(0, -2))

    def _pages(self, kept: Any) -> Tensor:
        return self._device.read(kept).view(-1, *page_shape(self.kv_cache_spec))

    def weight(self, name: str) -> Tensor:
        model = self._opened()
        if name not in expected_tensors(model.config, self.layers):
            raise KeyError(name)
        if name == "model.embed_tokens.weight":
            embedding = model.head.get("lm_head") if model.embedding is None else model.embedding
            return self._device.read(embedding)
        layers = dict(zip(self.layers, model.layers, strict=True))
        return unpack(name, layers, model.head, self._device.read)

    def _call(self, step: _Step, kernel: str, where: str, tensors: Mapping[str, Any]) -> None:
        self._device.place = f"step {step.number}, {where}"
        try:
            with torch.inference_mode():
                self._opened().kernels[kernel](**tensors)
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
