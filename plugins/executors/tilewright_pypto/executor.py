"""A Qwen3 model composed from single-layer kernels: embeddings on the host, then a kernel a layer,
then the head's.

Activations pass from layer to layer through host memory, so that every layer's output can be seen;
weights and KV cache stay on the device.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from attrs import frozen
from torch import Tensor

from tilewright.errors import ExecutorError
from tilewright.rope import frequencies
from tilewright.types import (
    ExecutorLimits,
    ExecutorRequest,
    KvCacheSpec,
    KvLayer,
    ModelConfig,
    RowOrder,
    StepBatch,
    Tap,
)
from tilewright_kernels.contract import read_contract
from tilewright_kernels.qwen3_14b import source
from tilewright_kernels.qwen3_14b.shape import LayerShape
from tilewright_pypto.device import Device, Kernel
from tilewright_pypto.packing import pack_head, pack_layer, read_embedding


@frozen(kw_only=True)
class Model:
    """What the kernels are called with in every step. Tensors on the device are handles of its."""

    config: ModelConfig
    kernels: Mapping[str, Kernel]
    embedding: Tensor
    """[vocab_size, hidden_size] BF16, on the host."""
    rope: Mapping[str, Any]
    """``rope_cos`` and ``rope_sin``, [max_seq_len, head_dim] FP32."""
    layers: Sequence[Mapping[str, Any]]
    head: Mapping[str, Any]


def load(
    request: ExecutorRequest, shape: LayerShape, device: Device, weights_on_device: bool
) -> "PyptoExecutor":
    """Compile the kernels, then read, pack and hand over the weights, a layer at a time."""
    config, runtime, weights = request.model_config, request.runtime_config, request.weights
    kernels = device.load(source.KERNELS, shape)
    keep = device.keep if weights_on_device else _stay
    positions = runtime.max_seq_len
    assert positions is not None
    embedding = read_embedding(weights)
    layers = [
        {name: keep(tensor) for name, tensor in pack_layer(weights, i)}
        for i in range(config.num_layers)
    ]
    tied = embedding if config.tie_word_embeddings else None
    head = {name: keep(tensor) for name, tensor in pack_head(weights, tied)}
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
        row_order=row_order(shape),
        memory_limit=device.memory_limit,
        allocate=device.allocate,
    )
    limits = ExecutorLimits(
        max_batch_size=shape.max_batch,
        max_batch_tokens=shape.max_tokens,
        max_seq_len=positions,
    )
    return PyptoExecutor(model, device, spec, limits)


def _stay(tensor: Tensor) -> Tensor:
    return tensor


def row_order(shape: LayerShape) -> RowOrder:
    """The order of the KV cache's rows that the layer kernels declare."""
    declared = {
        read_contract(source.path(kernel), kernel, shape.constants(kernel)).kv_row_order
        for kernel in ("prefill_layer", "decode_layer")
    }
    match declared.pop() if len(declared) == 1 else declared:
        case "HND" | "NHD" as order:
            return order
    raise ExecutorError(f"the layer kernels must declare one KV_ROW_ORDER, found {declared}")


def rope_tables(config: ModelConfig, positions: int) -> dict[str, Tensor]:
    """Cosines and sines of each position, [positions, head_dim] FP32, each half repeated."""
    frequency, scale = frequencies(config)
    angle = torch.arange(positions).float().unsqueeze(1) * frequency
    return {
        "rope_cos": torch.cat((angle.cos(), angle.cos()), -1) * scale,
        "rope_sin": torch.cat((angle.sin(), angle.sin()), -1) * scale,
    }


class PyptoExecutor:
    """An ``Executor`` (see tilewright.types) over the kernels of tilewright_kernels.qwen3_14b."""

    def __init__(
        self, model: Model, device: Device, kv_cache_spec: KvCacheSpec, limits: ExecutorLimits
    ):
        self.kv_cache_spec = kv_cache_spec
        self.limits = limits
        self.device = device.name
        self._device = device
        self._model: Model | None = model
        self._kv: list[tuple[Any, Any]] = []
        self._steps = 0

    def bind_kv_cache(self, layers: Sequence[KvLayer]) -> None:
        """Raises ExecutorError for storage that is not as kv_cache_spec says."""
        spec = self.kv_cache_spec
        if len(layers) != spec.num_layers:
            raise ExecutorError(
                f"executor pypto-npu needs a KV cache of {spec.num_layers} layers, and was given "
                f"{len(layers)}: the KV allocator does not follow kv_cache_spec"
            )
        self._kv = [(self._rows(layer.key), self._rows(layer.value)) for layer in layers]

    def prefill(self, batch: StepBatch, tap: "Tap | None" = None) -> Tensor:
        starts = batch.query_starts
        chunks = {"query_starts": starts[:-1].contiguous(), "query_lens": starts.diff()}
        return self._run("prefill_layer", batch, chunks, tap)

    def decode(self, batch: StepBatch, tap: "Tap | None" = None) -> Tensor:
        return self._run("decode_layer", batch, {}, tap)

    def close(self) -> None:
        self._model = None
        self._kv = []
        self._device.close()

    def _rows(self, storage: Any) -> Any:
        """Rows of head_dim, in the kernels' order. A device's own storage comes as rows."""
        spec = self.kv_cache_spec
        if not isinstance(storage, Tensor):
            return storage
        page = (spec.num_kv_heads, spec.page_size, spec.head_dim)
        if tuple(storage.shape[1:]) != page or storage.dtype != torch.bfloat16:
            raise ExecutorError(
                f"executor pypto-npu needs KV cache pages of {list(page)} bfloat16, and was given "
                f"{list(storage.shape[1:])} {storage.dtype}: the KV allocator does not follow "
                "kv_cache_spec"
            )
        return storage.view(-1, spec.head_dim)

    @torch.inference_mode()
    def _run(
        self, kernel: str, batch: StepBatch, chunks: Mapping[str, Tensor], tap: "Tap | None"
    ) -> Tensor:
        model = self._model
        if model is None:
            raise ExecutorError("executor pypto-npu is closed: load the model again")
        self._check(batch)
        self._steps += 1
        step = {
            "context_lens": batch.context_lens,
            "block_table": batch.block_table.flatten(),
            "slot_mapping": batch.slot_mapping,
            **chunks,
            **model.rope,
        }
        hidden = F.embedding(batch.token_ids, model.embedding)
        if tap:
            tap("embed", hidden)
        for i, (weights, (keys, values)) in enumerate(zip(model.layers, self._kv, strict=True)):
            out = torch.empty_like(hidden)
            where = f"layer {i}"
            cache = {"k_cache": keys, "v_cache": values}
            self._call(model, kernel, where, **step, **weights, **cache, hidden=hidden, out=out)
            hidden = out
            if tap:
                self._tap_cache(tap, i, batch, keys, values)
                tap(f"layers.{i}.output", hidden)
        wanted = hidden[batch.logits_rows]
        logits = torch.empty(wanted.shape[0], model.config.vocab_size)
        if len(wanted):
            self._call(model, "head", "the head", **model.head, hidden=wanted, logits=logits)
        if tap:
            tap("logits", logits)
        return logits

    def _call(self, model: Model, kernel: str, where: str, **tensors: Any) -> None:
        try:
            model.kernels[kernel](**tensors)
        except ExecutorError as error:
            raise ExecutorError(f"step {self._steps}, {where}: {error}") from error

    def _tap_cache(self, tap: Tap, layer: int, batch: StepBatch, keys: Any, values: Any) -> None:
        """What the step's tokens have in the KV cache: values as projected, keys rotated."""
        spec = self.kv_cache_spec
        slots = batch.slot_mapping.long()
        page, offset = slots // spec.page_size, slots % spec.page_size
        for name, cache in (("v_proj", values), ("k_rope", keys)):
            rows = self._device.read(cache)
            pages = rows.view(-1, spec.num_kv_heads, spec.page_size, spec.head_dim)
            tap(f"layers.{layer}.{name}", pages[page, :, offset])

    def _check(self, batch: StepBatch) -> None:
        """What the kernels are compiled for is not to be passed: they would leave their buffers."""
        for what, found, most in (
            ("sequences", len(batch.context_lens), self.limits.max_batch_size),
            ("tokens", len(batch.token_ids), self.limits.max_batch_tokens),
            ("tokens of a sequence", int(batch.context_lens.max()), self.limits.max_seq_len),
        ):
            if most is not None and found > most:
                raise ExecutorError(
                    f"the kernels are compiled for steps of at most {most} {what}, found {found}: "
                    "keep to the executor's limits"
                )
