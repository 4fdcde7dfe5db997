"""Single layers of dense models: inputs for the kernels, and the torch executor's results.

Every buffer of a kernel lies between guards, and the KV cache is NaN in every unwritten slot. The
reference is the torch executor itself on a model of that one layer, whose embedding table is the
layer's input.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from attrs import define, field, frozen
from torch import Tensor

from tilewright.types import (
    KvCacheSpec,
    KvLayer,
    ModelConfig,
    RopeConfig,
    StepBatch,
    TensorInfo,
)
from tilewright.weights import expected_tensors
from tilewright_kernels.qwen3_14b.shape import LayerShape
from tilewright_pypto.packing import pack
from tilewright_pypto.weight_names import packed_name
from tilewright_torch.model import TorchExecutor
from tilewright_torch.rope import rotary
from tilewright_torch.weights import load

GUARD = 64
"""Elements before and after each buffer."""


@frozen
class Weights:
    """Named tensors in memory; implements the part of TensorSource that ``load`` uses."""

    tensors: Mapping[str, Tensor]

    def names(self) -> Collection[str]:
        return self.tensors

    def info(self, name: str) -> TensorInfo:
        tensor = self.tensors[name]
        dtype = str(tensor.dtype).removeprefix("torch.")
        return TensorInfo(
            shape=tuple(tensor.shape), dtype=dtype, nbytes=tensor.nbytes, location="memory"
        )

    def get(self, name: str) -> Tensor:
        return self.tensors[name]


def random_weights(config: ModelConfig, seed: int = 0) -> Weights:
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in expected_tensors(config).items():
        mean, spread = (1.0, 0.3) if "norm" in name else (0.0, shape[-1] ** -0.5)
        if "q_proj" in name or "k_proj" in name:
            spread *= 2
        tensors[name] = (mean + spread * torch.randn(shape, generator=random)).bfloat16()
    return Weights(tensors)


def config_of(shape: LayerShape, vocab: int = 67, qk_norm: bool = True) -> ModelConfig:
    """The configuration of a one-layer model of a shape: Qwen3's, or Llama's without qk_norm."""
    return ModelConfig(
        architecture="qwen3" if qk_norm else "llama",
        vocab_size=vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_layers=1,
        num_heads=shape.heads,
        num_kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        norm_eps=shape.norm_eps,
        max_position_embeddings=4096,
        rope=RopeConfig(theta=1e6),
        dtype="bfloat16",
        qk_norm=qk_norm,
        tie_word_embeddings=False,
    )


def kernel_weights(source: Any, layer: int = 0) -> dict[str, Tensor]:
    """A layer's weights by the names of the kernels' parameters."""
    prefix = f"model.layers.{layer}."
    return {
        packed_name(name).rpartition(".")[2]: pack(source, name)
        for name in source.names()
        if name.startswith(prefix)
    }


@define
class Cache:
    """One layer's keys and values, [pages, page_size, KV heads, head_dim] BF16, and their owners.

    Pages are assigned in random order; unwritten slots are NaN.
    """

    shape: LayerShape
    pages: int
    key: Tensor = field(init=False)
    value: Tensor = field(init=False)
    owned: list[list[int]] = field(factory=list)
    lengths: list[int] = field(factory=list)
    _free: list[int] = field(init=False)

    def __attrs_post_init__(self) -> None:
        s = self.shape
        size = (self.pages, s.page_size, s.kv_heads, s.head_dim)
        self.key = torch.full(size, float("nan"), dtype=torch.bfloat16)
        self.value = self.key.clone()
        random = torch.Generator().manual_seed(self.pages)
        self._free = torch.randperm(self.pages, generator=random).tolist()

    def add(self, *histories: int) -> None:
        """Add sequences whose caches already hold the given numbers of random tokens."""
        for history in histories:
            self.owned.append([])
            self.lengths.append(0)
            sequence = len(self.lengths) - 1
            slots = self._extend(sequence, history)
            random = torch.Generator().manual_seed(sequence)
            for tensor in (self.key, self.value):
                new = torch.randn(history, *tensor.shape[2:], generator=random)
                tensor.flatten(0, 1)[slots] = new.bfloat16()

    def step(self, news: Sequence[int], sequences: "Sequence[int] | None" = None) -> StepBatch:
        """A step with the given numbers of new tokens for each sequence; token i is row i."""
        chosen = range(len(self.lengths)) if sequences is None else sequences
        before = [self.lengths[s] for s in chosen]
        slots = [self._extend(s, new) for s, new in zip(chosen, news, strict=True)]
        lengths = [self.lengths[s] for s in chosen]
        width = max(len(self.owned[s]) for s in chosen) + 1
        table = torch.full((len(lengths), width), -1, dtype=torch.int32)
        for i, s in enumerate(chosen):
            table[i, : len(self.owned[s])] = torch.tensor(self.owned[s], dtype=torch.int32)
        positions = [torch.arange(b, n) for b, n in zip(before, lengths, strict=True)]
        starts = torch.tensor([0, *news]).cumsum(0)
        return StepBatch(
            token_ids=torch.arange(int(starts[-1])),
            positions=torch.cat(positions).int(),
            slot_mapping=torch.cat(slots).int(),
            block_table=table,
            context_lens=torch.tensor(lengths, dtype=torch.int32),
            query_starts=starts.int(),
            logits_rows=torch.arange(int(starts[-1])),
        )

    def _extend(self, sequence: int, new: int) -> Tensor:
        page_size = self.shape.page_size
        start = self.lengths[sequence]
        self.lengths[sequence] = stop = start + new
        pages = self.owned[sequence]
        while len(pages) * page_size < stop:
            pages.append(self._free.pop())
        positions = torch.arange(start, stop)
        of = torch.tensor(pages, dtype=torch.long)
        return of[positions // page_size] * page_size + positions % page_size


def rows_of(cache: Tensor) -> Tensor:
    """Flat rows in the kernels' order, HND: (page * KV heads + head) * page_size + offset."""
    return cache.transpose(1, 2).reshape(-1, cache.shape[-1])


def pages_of(rows: Tensor, like: Tensor) -> Tensor:
    pages, page_size, kv_heads, head_dim = like.shape
    return rows.view(pages, kv_heads, page_size, head_dim).transpose(1, 2)


def rope_tables(config: ModelConfig, positions: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [positions, head_dim] FP32, each half repeated."""
    batch = StepBatch(
        token_ids=torch.zeros(positions, dtype=torch.long),
        positions=torch.arange(positions).int(),
        slot_mapping=torch.zeros(positions).int(),
        block_table=torch.zeros(1, 1).int(),
        context_lens=torch.tensor([positions]).int(),
        query_starts=torch.tensor([0, positions]).int(),
        logits_rows=torch.tensor([0]),
    )
    cos, sin = (t.reshape(positions, -1) for t in rotary(config)(batch))
    half = config.head_dim // 2
    return cos.float(), torch.cat((sin[:, half:], sin[:, half:]), -1).float()


def layer_inputs(
    kernel: str,
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    hidden: Tensor,
    batch: StepBatch,
    cache: Cache,
) -> dict[str, Tensor]:
    """All parameters of a layer kernel by name; the caches are copies, out is NaN."""
    cos, sin = rope_tables(config, int(batch.context_lens.max()))
    inputs = {
        "hidden": hidden,
        "context_lens": batch.context_lens,
        "block_table": batch.block_table.flatten(),
        "slot_mapping": batch.slot_mapping,
        "rope_cos": cos,
        "rope_sin": sin,
        **weights,
        "k_cache": rows_of(cache.key),
        "v_cache": rows_of(cache.value),
        "out": torch.full_like(hidden, float("nan")),
    }
    if kernel == "prefill_layer":
        inputs["query_starts"] = batch.query_starts[:-1]
        inputs["query_lens"] = batch.query_starts.diff()
    return inputs


def reference(
    config: ModelConfig,
    source: Any,
    layer: int,
    hidden: Tensor,
    batch: StepBatch,
    cache: Cache,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The layer's output and its keys and values after the step, by the torch executor."""
    layers = range(layer, layer + 1)
    model = load(config, layers, source, dtype)
    spec = KvCacheSpec(
        num_layers=1,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        page_size=cache.shape.page_size,
        dtype="float32" if dtype == torch.float32 else "bfloat16",
    )
    executor = TorchExecutor(model, spec, layers)
    executor.allocate_kv(cache.pages)
    pages = range(cache.pages)
    executor.write_kv(layer, pages, KvLayer(cache.key.to(dtype), cache.value.to(dtype)))
    output = executor.run_layer(executor.begin(batch), layer, hidden.to(dtype))
    after = executor.read_kv(layer, pages)
    return output, after.key, after.value


def relative_rms(found: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference, relative to that of ``expected``."""
    difference = found.double() - expected.double()
    return float(difference.pow(2).mean().sqrt() / expected.double().pow(2).mean().sqrt())


@define
class Guarded:
    """Copies of tensors, each between guards in memory of its own."""

    tensors: dict[str, Tensor] = field(factory=dict)
    _memory: dict[str, tuple[Tensor, Tensor]] = field(factory=dict)

    def add(self, name: str, tensor: Tensor) -> None:
        poison = float("nan") if tensor.is_floating_point() else 2**30
        memory = torch.full((tensor.numel() + 2 * GUARD,), poison, dtype=tensor.dtype)
        inner = memory[GUARD:-GUARD].view(tensor.shape)
        inner.copy_(tensor)
        self.tensors[name] = inner
        self._memory[name] = (memory, memory.clone())

    def changed(self) -> set[str]:
        """Names of the tensors whose values differ in any bit from those given."""
        return {n for n, (now, was) in self._memory.items() if not _same(now, was)}

    def broken(self) -> set[str]:
        """Names of the tensors whose guards were written to."""
        return {
            name
            for name, (now, was) in self._memory.items()
            if not (_same(now[:GUARD], was[:GUARD]) and _same(now[-GUARD:], was[-GUARD:]))
        }


def _same(a: Tensor, b: Tensor) -> bool:
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))


Run = Callable[[dict[str, Tensor]], None]
"""Runs a kernel on its parameters by name, in place."""


@frozen
class Compared:
    """The differences between a kernel and the torch executor on one step of one layer."""

    out: Tensor
    to_bf16: float
    """Relative RMS distance to the torch executor in BF16."""
    to_fp32: float
    """And in FP32, which is taken as the truth."""
    bf16_to_fp32: float
    """What the torch executor's own rounding costs."""

    def check(self) -> None:
        assert self.to_bf16 <= 1e-2, self
        assert self.to_fp32 <= 1.5 * self.bf16_to_fp32, self


def compare_layer(
    run: Run,
    kernel: str,
    config: ModelConfig,
    source: Any,
    layer: int,
    hidden: Tensor,
    batch: StepBatch,
    cache: Cache,
) -> Compared:
    """Run a kernel and the reference on one step; the cache is left as the kernel wrote it.

    Checks the guards, that nothing but out and the caches changed, and the caches slot by slot:
    this step's within the rounding of the reference, all others bit by bit.
    """
    inputs = layer_inputs(kernel, config, kernel_weights(source, layer), hidden, batch, cache)
    guarded = Guarded()
    for name, tensor in inputs.items():
        guarded.add(name, tensor)
    run(guarded.tensors)
    assert not guarded.broken()
    assert guarded.changed() <= {"k_cache", "v_cache", "out"}
    given = (config, source, layer, hidden, batch, cache)
    expected, key, value = reference(*given, torch.bfloat16)
    truth, true_key, true_value = reference(*given, torch.float32)

    written = batch.slot_mapping.long()
    for name, was, near, true in (
        ("k_cache", cache.key, key, true_key),
        ("v_cache", cache.value, value, true_value),
    ):
        now = pages_of(guarded.tensors[name], was).contiguous()
        others = torch.ones(was.shape[0] * was.shape[1], dtype=torch.bool)
        others[written] = False
        assert _same(now.flatten(0, 1)[others], was.flatten(0, 1)[others]), name
        new, near, true = (t.flatten(0, 1)[written] for t in (now, near, true))
        assert relative_rms(new, near) <= 1e-2, name
        assert relative_rms(new, true) <= 1.5 * relative_rms(near, true), name
        # The mean hides a slot that holds another token's values.
        assert (new.float() - true).abs().max() <= 0.05 * true.abs().max(), name
        was.copy_(now)
    out = guarded.tensors["out"]
    return Compared(
        out.clone(),
        relative_rms(out, expected),
        relative_rms(out, truth),
        relative_rms(expected, truth),
    )
