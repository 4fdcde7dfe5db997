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
"""Row order of the KV cache, which ``read_kv`` and ``bind_kv_cache`` assume."""


@frozen(kw_only=True)
class Model:
    """Arguments of the kernels that are the same in every step. Device tensors are handles."""

    config: ModelConfig
    kernels: Mapping[str, Kernel]
    embedding: Tensor
    """[vocab_size, hidden_size] BF16, on the host."""
    rope: dict[str, Any]
    """``rope_cos`` and ``rope_sin``, [max_seq_len, head_dim] FP32."""
    layers: Sequence[dict[str, Any]]
    head: dict[str, Any]


def load(
    config: ModelConfig,
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
    embedding = read("embedding")
    layers = [
        {name: keep(read(f"layers.{i}.{name}")) for name in READ_ORDER}
        for i in range(config.num_layers)
    ]
    head = {
        "final_norm": keep(read("final_norm")),
        "lm_head": keep(embedding if config.tie_word_embeddings else read("lm_head")),
    }
    model = Model(
        config=config,
        kernels=kernels,
        embedding=embedding,
        rope={name: device.keep(table) for name, table in rope_tables(config, positions).items()},
        layers=layers,
        head=head,
    )
    spec = KvCacheSpec(
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        page_size=shape.page_size,
        dtype="bfloat16",
        row_order=ROW_ORDER,
        memory_limit=device.memory_limit,
        allocate=device.allocate,
    )
    limits = ExecutorLimits(
        max_batch_size=shape.max_batch,
        max_batch_tokens=shape.max_tokens,
        max_seq_len=positions,
    )
    return PyptoExecutor(model, device, spec, limits)


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

    kernel: str
    """Kernel of the layers: decode_layer where each sequence has one token, else prefill_layer."""
    tensors: dict[str, Tensor]
    """Parameters of the kernel that are the same in all layers."""


class PyptoExecutor(LayerwiseBase[Model, _Step]):
    """A ``LayerwiseExecutor`` (see tilewright.types) over tilewright_kernels.qwen3_14b."""

    plugin = "pypto-npu"

    def __init__(
        self, model: Model, device: Device, kv_cache_spec: KvCacheSpec, limits: ExecutorLimits
    ):
        super().__init__(model, kv_cache_spec)
        self.limits = limits
        self.device = device.name
        self._device = device
        self._kv: list[tuple[Any, Any]] = []
        self._num_steps = 0

    def bind_kv_cache(self, layers: Sequence[KvLayer]) -> None:
        """Raises ExecutorError for storage that does not match kv_cache_spec."""
        spec = self.kv_cache_spec
        if len(layers) != spec.num_layers:
            raise ExecutorError(
                f"executor pypto-npu needs a KV cache of {spec.num_layers} layers, found "
                f"{len(layers)}: the KV allocator does not follow kv_cache_spec"
            )
        self._kv = [(self._rows(layer.key), self._rows(layer.value)) for layer in layers]

    def close(self) -> None:
        super().close()
        self._kv = []
        self._device.close()

    def _rows(self, storage: Any) -> Any:
        """Rows of head_dim, in the kernels' order. A device's own storage has them already."""
        spec = self.kv_cache_spec
        if not isinstance(storage, Tensor):
            return storage
        page = (spec.num_kv_heads, spec.page_size, spec.head_dim)
        if tuple(storage.shape[1:]) != page or storage.dtype != torch.bfloat16:
            raise ExecutorError(
                f"executor pypto-npu needs KV cache pages of {list(page)} bfloat16, found "
                f"{list(storage.shape[1:])} {storage.dtype}: the KV allocator does not follow "
                "kv_cache_spec"
            )
        return storage.view(-1, spec.head_dim)

    def embed(self, batch: StepBatch, tap: "Tap | None" = None) -> Tensor:
        hidden = F.embedding(batch.token_ids, self._opened().embedding)
        if tap:
            tap("embed", hidden)
        return hidden

    def run_layer(
        self, layer: int, hidden: Tensor, batch: StepBatch, tap: "Tap | None" = None
    ) -> Tensor:
        model, step = self._opened(), self._step(batch)
        keys, values = self._kv[layer]
        out = torch.empty_like(hidden)
        tensors = step.tensors | model.rope | model.layers[layer]
        tensors |= {"k_cache": keys, "v_cache": values, "hidden": hidden, "out": out}
        self._call(step.kernel, f"layer {layer}", tensors)
        if tap:
            tap(f"layers.{layer}.output", out)
        return out

    def run_head(self, hidden: Tensor, tap: "Tap | None" = None) -> Tensor:
        model = self._opened()
        logits = torch.empty(hidden.shape[0], model.config.vocab_size)
        if len(hidden):
            self._call("head", "the head", model.head | {"hidden": hidden, "logits": logits})
        if tap:
            tap("logits", logits)
        return logits

    def read_kv(self, layer: int) -> KvLayer:
        spec = self.kv_cache_spec
        pages = (-1, spec.num_kv_heads, spec.page_size, spec.head_dim)
        return KvLayer(*(self._device.read(rows).view(pages) for rows in self._kv[layer]))

    def write_kv(self, layer: int, cache: KvLayer) -> None:
        for rows, new in zip(self._kv[layer], (cache.key, cache.value), strict=True):
            self._device.write(rows, new.reshape(-1, new.shape[-1]))

    def weight(self, name: str) -> Tensor:
        model = self._opened()
        if name not in expected_tensors(model.config):
            raise KeyError(name)
        if name == "model.embed_tokens.weight":
            return model.embedding
        return unpack(name, model.layers, model.head, self._device.read)

    def _begin(self, batch: StepBatch) -> _Step:
        self._check(batch)
        self._num_steps += 1
        tensors = {
            "context_lens": batch.context_lens,
            "block_table": batch.block_table.flatten(),
            "slot_mapping": batch.slot_mapping,
        }
        if len(batch.token_ids) == len(batch.context_lens):
            return _Step("decode_layer", tensors)
        starts = batch.query_starts
        tensors |= {"query_starts": starts[:-1].contiguous(), "query_lens": starts.diff()}
        return _Step("prefill_layer", tensors)

    def _call(self, kernel: str, where: str, tensors: Mapping[str, Any]) -> None:
        self._device.place = f"step {self._num_steps - 1}, {where}"
        try:
            with torch.inference_mode():
                self._opened().kernels[kernel](**tensors)
        except ExecutorError as error:
            raise ExecutorError(f"{self._device.place}: {error}") from error

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
