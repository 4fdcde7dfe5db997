"""The executor on a CUDA device.

Steps of decoding sequences are captured as CUDA graphs, one for each of some batch sizes, and
replayed; all others run operation by operation. Both run the same kernels. A step is submitted
without waiting for the device, samples there, and leaves its tokens on the device, where the next
step finds them.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from importlib.util import find_spec
from math import prod
from threading import Lock
from typing import Any, Protocol
from weakref import WeakSet

import torch
import torch.nn.functional as F
from attrs import define, frozen
from torch import Tensor

from tilewright.errors import (
    ExecutorError,
    ExecutorLostError,
    NonFiniteLogitsError,
    OutOfPagesError,
    quoted,
)
from tilewright.kv_storage import page_shape
from tilewright.layerwise import LayerwiseBase, of_layer
from tilewright.rope import frequencies
from tilewright.types import (
    ExecutorLimits,
    KvCacheSpec,
    KvLayer,
    ModelConfig,
    PendingStep,
    RuntimeConfig,
    SampledToken,
    SamplerRow,
    SamplingParams,
    StepBatch,
    StepOutput,
    Tap,
    TensorSource,
)
from tilewright.weights import expected_tensors, torch_dtype
from tilewright_torch import card_sampling
from tilewright_torch.card_weights import CardLayer, CardModel, load_on_card, projections
from tilewright_torch.rope import angles

MOST_SCORED_ROWS = 256
"""Rows of logits of a step beyond those that are sampled: each takes vocab_size * 4 bytes."""

LEAST_CAPABILITY = (8, 0)
"""The oldest cards whose tensor cores multiply bfloat16."""

WORKSPACE_BYTES = 2**30
"""Memory left for cuBLAS, which keeps 32 MiB for each stream, loaded kernels and CUDA graphs."""

OUT_OF_MEMORY = (
    "lower total_pages, max_seq_len or max_batch_tokens, choose a smaller weight_dtype, or another "
    "card (device = 'cuda:N')"
)


class Event(Protocol):
    def synchronize(self) -> None: ...


class Card(Protocol):
    """A device, as the executor uses it. Work is done in the order in which it is enqueued."""

    @property
    def name(self) -> str: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def kernels(self) -> Any:
        """The functions of ``tilewright_torch.card_kernels``."""
        ...

    @property
    def processors(self) -> int: ...

    def free_memory(self) -> int:
        """Bytes of the device that can still be allocated."""
        ...

    def active(self) -> AbstractContextManager[object]:
        """Within it, kernels run on this device."""
        ...

    def pinned(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Memory of the host that the device copies from and to while the host goes on."""
        ...

    def record(self) -> Event:
        """An event that has happened once all work enqueued so far is done."""
        ...

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """Record what run enqueues; returns a function that enqueues it again, on the same
        tensors."""
        ...

    def release(self) -> None:
        """Give memory that nothing uses back to the device."""
        ...


_capturing = Lock()
"""torch captures one graph at a time in a process, and frees no memory meanwhile."""


@cache
def _capture_stream(index: int) -> Any:
    """The stream on which all models of a device are captured: torch keeps a workspace of cuBLAS
    for each stream that was ever used."""
    return torch.cuda.Stream(index)  # type: ignore[no-untyped-call]


class CudaCard:
    """A ``Card`` by torch.cuda, which uses its default stream. index: the number of the card."""

    def __init__(self, index: int):
        from tilewright_torch import card_kernels

        self.device = torch.device("cuda", index)
        self.name = str(self.device)
        self.kernels = card_kernels
        self.processors = torch.cuda.get_device_properties(index).multi_processor_count
        self._graphs: WeakSet[Any] = WeakSet()
        """Those that are left. They share memory, which torch forgets with the last of them."""

    def free_memory(self) -> int:
        return torch.cuda.mem_get_info(self.device)[0]

    def active(self) -> AbstractContextManager[object]:
        return torch.cuda.device(self.device)

    def pinned(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def record(self) -> Event:
        event: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        graph, sharing = torch.cuda.CUDAGraph(), next(iter(self._graphs), None)
        with (
            _capturing,
            torch.cuda.graph(
                graph,
                pool=sharing.pool() if sharing else None,
                stream=_capture_stream(self.device.index),
                capture_error_mode="thread_local",  # other threads may use the device meanwhile
            ),
        ):
            run()
        self._graphs.add(graph)
        return graph.replay

    def release(self) -> None:
        with _capturing:
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()


def card_number(device: str) -> int:
    """The number of the card that a device ``cuda`` or ``cuda:N`` names.

    Raises ExecutorError when this torch or this machine has no such card.
    """
    index = int(device.partition(":")[2] or 0)
    if not torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]
        raise ExecutorError(
            f"device = {quoted(device)} needs a build of torch with CUDA, found torch "
            f"{torch.__version__}, which was built without: install torch from "
            "https://download.pytorch.org/whl/cu130, or set device = 'cpu'"
        )
    count = torch.cuda.device_count()
    if index >= count:
        found = f"{count} cards, cuda:0 to cuda:{count - 1}" if count > 1 else "one card, cuda:0"
        raise ExecutorError(
            f"device = {quoted(device)} is not on this machine, found "
            f"{found if count else 'no card that torch can use'}: "
            "choose another device, or check the driver (`tilewright doctor`)"
        )
    try:
        _initialise()
        capability = torch.cuda.get_device_capability(index)
    except RuntimeError as error:
        raise ExecutorError(
            f"device = {quoted(device)} cannot be used ({first_line(error)}): check the driver "
            "(`tilewright doctor`), or choose another device"
        ) from error
    if capability < LEAST_CAPABILITY:
        raise ExecutorError(
            f"executor torch needs a card of compute capability "
            f"{dotted(LEAST_CAPABILITY)} or later, found {dotted(capability)} on {device} "
            f"({torch.cuda.get_device_name(index)}): choose another card, or device = 'cpu'"
        )
    if find_spec("triton") is None:
        raise ExecutorError(
            f"device = {quoted(device)} needs Triton, which torch {torch.__version__} does not "
            "find: install it (`pip install triton`), or set device = 'cpu'"
        )
    return index


def _initialise() -> None:
    """torch.cuda.init, which in some releases sets a variable to what CUDA does by itself."""
    name = "CUDA_MODULE_LOADING"
    found = os.environ.get(name)
    torch.cuda.init()  # type: ignore[no-untyped-call]
    if found is None:
        os.environ.pop(name, None)


def dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def create_on_card(
    card: Card,
    config: ModelConfig,
    runtime: RuntimeConfig,
    weights: TensorSource,
    layers: range,
    page_size: int,
) -> "CudaExecutor":
    """Load a model's weights onto a card.

    Raises ExecutorError when they do not fit.
    """
    assert runtime.weight_dtype is not None
    assert runtime.kv_dtype is not None
    dtype = torch_dtype(runtime.weight_dtype)
    max_seq_len = runtime.max_seq_len or config.context_length
    with card.active():
        try:
            model = load_on_card(config, layers, weights, dtype, card.device)
            for group in projections(model):
                card.kernels.tune(group, card.capture)
        except torch.OutOfMemoryError as error:
            card.release()
            size = sum(map(prod, expected_tensors(config, layers).values())) * dtype.itemsize
            raise ExecutorError(
                f"{card.name} has too little memory for weights of {size / 2**30:.1f} GiB in "
                f"{runtime.weight_dtype}: choose a smaller weight_dtype, or another card (device "
                "= 'cuda:N'), or device = 'cpu'"
            ) from error
        card.release()  # what the copies have left
        spec = KvCacheSpec(
            num_layers=len(layers),
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            page_size=page_size,
            dtype=runtime.kv_dtype,
            memory_limit=max(0, card.free_memory() - _step_bytes(config, runtime, dtype)),
        )
        return CudaExecutor(card, model, spec, layers, runtime.max_batch_size, max_seq_len)


def _step_bytes(config: ModelConfig, runtime: RuntimeConfig, dtype: torch.dtype) -> int:
    """About the most memory that steps take beside weights and cache: a layer's tensors, logits
    and what sampling makes of them, the rotary table, graphs and workspaces of libraries."""
    heads = config.num_heads + 2 * config.num_kv_heads
    of_token = 5 * config.hidden_size + 2 * heads * config.head_dim + 3 * config.intermediate_size
    scored = MOST_SCORED_ROWS * 3 * 4
    sampled = runtime.max_batch_size * (dtype.itemsize + 16 * 4)
    return (
        runtime.max_batch_tokens * of_token * dtype.itemsize
        + (scored + sampled) * config.vocab_size
        + (runtime.max_seq_len or config.context_length) * config.head_dim * 4
        + WORKSPACE_BYTES
    )


@frozen(kw_only=True, eq=False)
class _Inputs:
    """A step's inputs on the device: parts of one int32 tensor that is copied there at once.

    Its parts, in this order: the width of the block table; tokens, sources, rows of the rotary
    table and slots, [T] each; starts [B + 1]; lengths [B]; rows of logits [L]; blocks of queries
    [N, 2]; the block table [B * width]. Each begins at a multiple of 16 bytes (``_starts``).
    """

    tokens: Tensor
    sources: Tensor
    rope_rows: Tensor
    slots: Tensor
    rows: Tensor
    context: Any
    cos: Tensor
    sin: Tensor


@define(eq=False)
class _Submitted:
    """A ``PendingStep``."""

    executor: "CudaExecutor"
    sampling: Sequence[SamplerRow | None]
    logits: "Tensor | None"
    """[L, vocab_size] float32 on the device, until the step was waited for."""
    open_logits: "Tensor | None"
    tokens: Tensor
    """[L] int64, pinned."""
    sums: Tensor
    """[L] float32, pinned: the sum of each row of logits."""
    done: Event
    output: StepOutput | None = None

    def wait(self) -> StepOutput:
        if self.output is None:
            with self.executor.errors():
                self.done.synchronize()
                self._check_finite()
            tokens = [
                SampledToken(token_id=token) if row else None
                for row, token in zip(self.sampling, self.tokens.tolist(), strict=True)
            ]
            self.output = StepOutput(tokens=tokens, logits=self.open_logits)
            self.logits = None
        return self.output

    def _check_finite(self) -> None:
        """Raise NonFiniteLogitsError for the first row with such logits.

        A sum with a non-finite term is not finite; a sum of large finite logits may overflow.
        """
        assert self.logits is not None
        suspicious = (~self.sums.isfinite()).nonzero().squeeze(1).tolist()
        for i in suspicious:
            row = self.sampling[i]
            if row is None:
                continue
            bad = (~self.logits[i].isfinite()).nonzero().squeeze(1).tolist()
            if bad:
                raise NonFiniteLogitsError(row.request_id, row.position, bad, self.logits.shape[1])


class _Precise:
    """A context in which products are as the dtype promises: float32 ones not in TF32, and sums of
    16-bit ones in float32.

    These are settings of the whole process. The last thread that leaves restores them.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._inside = 0
        self._kept: tuple[str, bool, bool] = ("highest", False, False)

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                products = torch.backends.cuda.matmul
                self._kept = (
                    torch.get_float32_matmul_precision(),
                    products.allow_bf16_reduced_precision_reduction,
                    products.allow_fp16_reduced_precision_reduction,
                )
                _set_products("highest", False, False)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                _set_products(*self._kept)


def _set_products(float32: str, bfloat16: bool, float16: bool) -> None:
    torch.set_float32_matmul_precision(float32)
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = bfloat16
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = float16


_precise = _Precise()


class CudaExecutor(LayerwiseBase[CardModel, _Inputs]):
    """A ``LayerwiseExecutor`` and ``SamplingExecutor`` (see tilewright.types) on a card."""

    plugin = "torch"
    limits = ExecutorLimits(max_logits_rows=MOST_SCORED_ROWS)

    def __init__(
        self,
        card: Card,
        model: CardModel,
        kv_cache_spec: KvCacheSpec,
        layers: range,
        max_batch_size: int,
        max_seq_len: int,
    ):
        """max_batch_size: the most sequences of a step that is captured. max_seq_len: positions of
        which the rotary table is made; it grows when a step has later ones."""
        super().__init__(model, kv_cache_spec, layers, model.config.num_layers)
        self.device = card.name
        self.use_graphs = True
        """Whether steps of decoding sequences are captured and replayed."""
        self._card, self._kernels = card, card.kernels
        self._sizes = batch_sizes(max_batch_size)
        self._max_seq_len = max_seq_len
        self._kv: list[tuple[Tensor, Tensor]] = []
        """Keys and values by slot, [slots, num_kv_heads, head_dim]; the last page is spare."""
        self._num_pages = 0
        self._graphs: dict[int, Callable[[], None]] = {}
        self._table = self._rotary_table(max_seq_len)
        config, largest = model.config, self._sizes[-1]
        self._sampled = self._zeros(largest + MOST_SCORED_ROWS, dtype=torch.int64)
        """The tokens that the step before has sampled, by row of logits."""
        self._static = self._zeros(_length(largest, largest, self._most_pages()), dtype=torch.int32)
        """The inputs of captured steps."""
        rows = largest if model.head is not None else 0
        self._out = self._zeros(rows, config.vocab_size, dtype=model.dtype)
        """The logits of captured steps, rounded to the weights' dtype."""

    def allocate_kv(self, num_pages: int) -> None:
        spec = self.kv_cache_spec
        shape = ((num_pages + 1) * spec.page_size, *page_shape(spec)[1:])
        dtype = torch_dtype(spec.dtype)
        self._graphs.clear()
        self._kv = []
        try:
            self._kv = [
                (self._zeros(*shape, dtype=dtype), self._zeros(*shape, dtype=dtype))
                for _ in self.layers
            ]
        except torch.OutOfMemoryError as error:
            self._kv = []
            self._card.release()
            size = f"{num_pages * spec.page_bytes / 2**30:.1f} GiB"
            raise OutOfPagesError(
                f"a KV cache of {num_pages} pages takes {size}, which {self.device} has not free: "
                "lower total_pages, max_seq_len or max_batch_size, or choose another card"
            ) from error
        self._num_pages = num_pages

    def close(self) -> None:
        if self._model is None:
            return
        super().close()
        self._graphs.clear()
        self._kv, self._table = [], (torch.empty(0), torch.empty(0))
        self._sampled = self._static = self._out = torch.empty(0)
        try:
            self._card.release()
        except RuntimeError as error:
            if not is_lost(error):  # a lost device was reported by the step that failed
                raise

    # --- steps -----------------------------------------------------------------------------------

    def forward(self, batch: StepBatch, tap: "Tap | None" = None) -> Tensor:
        with self._on_card():
            return super().forward(batch, tap)

    @torch.inference_mode()
    def begin(self, batch: StepBatch) -> _Inputs:
        self._opened()
        with self._on_card():
            return self._sent(batch)

    @torch.inference_mode()
    def embed(self, step: _Inputs, tap: "Tap | None" = None) -> Tensor:
        model = self._opened()
        if model.embedding is None:
            raise ExecutorError("executor torch has no embedding: layer 0 is in another part")
        known = self._sampled.index_select(0, step.sources.clamp(min=0))
        tokens = torch.where(step.sources < 0, step.tokens.long(), known)
        x = F.embedding(tokens, model.embedding)
        if tap:
            tap("embed", x)
        return x

    @torch.inference_mode()
    def run_layer(
        self, step: _Inputs, layer: int, hidden: Tensor, tap: "Tap | None" = None
    ) -> Tensor:
        model, kernels = self._opened(), self._kernels
        at = self.layers.index(layer)
        weights, eps = model.layers[at], model.config.norm_eps
        named = of_layer(tap, layer) if tap else None
        with self._on_card():
            x: Tensor = hidden.to(self._card.device)
            normed = kernels.rms_norm(x, weights.attn_norm, eps)
            x, normed = kernels.add_rms_norm(
                x, self._attention(step, at, normed, named), weights.mlp_norm, eps
            )
            if named:
                named("attn_residual", x)
            x = x + self._mlp(weights, normed, named)
            if named:
                named("output", x)
            return x

    @torch.inference_mode()
    def run_head(self, step: _Inputs, hidden: Tensor, tap: "Tap | None" = None) -> Tensor:
        model = self._opened()
        if model.final_norm is None or model.head is None:
            raise ExecutorError("executor torch has no head: the last layer is in another part")
        with self._on_card():
            hidden = hidden.to(self._card.device)
            x = self._kernels.rms_norm(hidden, model.final_norm, model.config.norm_eps)
            logits = self._product(x, (model.head, None)).float()
            if tap:
                tap("final_norm", x)
                tap("logits", logits)
            return logits

    def serves(self, params: SamplingParams) -> bool:
        return card_sampling.serves(params)

    @torch.inference_mode()
    def submit(self, batch: StepBatch, sampling: Sequence[SamplerRow | None]) -> PendingStep:
        self._opened()
        with self._on_card():
            if self.layers != range(self._num_layers):
                super().forward(batch)  # raises
            rows = len(batch.logits_rows)
            logits = self._logits(batch)
            tokens = card_sampling.choose(logits, sampling, self._send)
            self._keep(tokens)
            open_rows = [i for i, row in enumerate(sampling) if row is None]
            open_logits = None
            if len(open_rows) == rows:
                open_logits = logits
            elif open_rows:
                open_logits = logits.index_select(0, self._send(torch.tensor(open_rows)))
            here = self._card.pinned(rows, dtype=torch.int64)
            sums = self._card.pinned(rows, dtype=torch.float32)
            here.copy_(tokens, non_blocking=True)
            sums.copy_(logits.sum(1), non_blocking=True)
            return _Submitted(self, sampling, logits, open_logits, here, sums, self._card.record())

    def _logits(self, batch: StepBatch) -> Tensor:
        """The wanted logits [L, vocab_size] float32, in memory of their own."""
        model, sequences = self._opened(), len(batch.context_lens)
        size = next((n for n in self._sizes if n >= sequences), None)
        if (
            not self.use_graphs
            or size is None
            or len(batch.token_ids) != sequences
            or model.config.rope.kind == "dynamic"
            or batch.block_table.shape[1] > self._most_pages()
        ):
            step = self._sent(batch)
            hidden = self._hidden(step)
            if len(batch.logits_rows) != len(batch.token_ids):
                hidden = hidden.index_select(0, step.rows)
            return self._head(hidden).float()
        self._replay(batch, size)
        rows = self._out[:sequences]
        if len(batch.logits_rows) != sequences:
            rows = rows.index_select(0, self._send(batch.logits_rows))
        return rows.to(torch.float32, copy=True)

    def _replay(self, batch: StepBatch, size: int) -> None:
        """Run a step of decoding sequences, padded to size, by its graph, into _out."""
        self._room_for(batch)
        packed = self._packed(batch, size - len(batch.context_lens))
        self._static[: len(packed)].copy_(packed, non_blocking=True)
        if size not in self._graphs:
            step = self._views(self._static, size, size, 0, 0, self._most_pages())

            def run() -> None:
                self._head(self._hidden(step), self._out[:size])

            run()  # compiles kernels, and chooses workspaces, which a capture must not do
            self._graphs[size] = self._card.capture(run)
        self._graphs[size]()

    def _hidden(self, step: _Inputs) -> Tensor:
        """The states behind the last layer [T, hidden_size], before the final norm.

        The same as each ``run_layer`` in turn; a layer's last sum and the next norm are one kernel.
        """
        model, kernels = self._opened(), self._kernels
        eps, layers = model.config.norm_eps, model.layers
        x = self.embed(step)
        normed = kernels.rms_norm(x, layers[0].attn_norm, eps)
        for at, layer in enumerate(layers):
            attended = self._attention(step, at, normed)
            x, normed = kernels.add_rms_norm(x, attended, layer.mlp_norm, eps)
            out = self._mlp(layer, normed)
            if at + 1 < len(layers):
                x, normed = kernels.add_rms_norm(x, out, layers[at + 1].attn_norm, eps)
            else:
                x = x + out
        return x

    def _head(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        model = self._opened()
        assert model.final_norm is not None
        assert model.head is not None
        x = self._kernels.rms_norm(hidden, model.final_norm, model.config.norm_eps)
        return self._product(x, (model.head, None), out)

    def _attention(
        self, step: _Inputs, at: int, normed: Tensor, tap: "Tap | None" = None
    ) -> Tensor:
        """The attention block's output [T, hidden_size]; writes the tokens' keys and values.

        at: index of the layer in this part.
        """
        model, kernels = self._opened(), self._kernels
        config, layer = model.config, model.layers[at]
        keys, values = self._kv[at]
        qkv = self._product(normed, layer.qkv)
        q = kernels.rotate_and_cache(
            qkv,
            layer.qk_norm,
            config.norm_eps,
            step.cos,
            step.sin,
            step.rope_rows,
            step.slots,
            keys,
            values,
        )
        window = config.window(self.layers[at])
        attended = kernels.attention(q, keys, values, step.context, window)
        out = self._product(attended, layer.o)
        if tap:
            tap("attn_norm", normed)
            k = _tap_projections(tap, config, layer, qkv)
            tap("q_rope", q)
            tap("k_rope", _rotated(k, step))
            tap("attention", attended)
            tap("o_proj", out)
        return out

    def _mlp(self, layer: CardLayer, normed: Tensor, tap: "Tap | None" = None) -> Tensor:
        gate_up = self._product(normed, layer.gate_up)
        activation = self._kernels.silu_mul(gate_up)
        out = self._product(activation, layer.down)
        if tap:
            gate, up = gate_up.chunk(2, -1)
            tap("mlp_norm", normed)
            tap("gate_proj", gate)
            tap("up_proj", up)
            tap("activation", activation)
            tap("down_proj", out)
        return out

    def _product(
        self, x: Tensor, of: tuple[Tensor, Tensor | None], out: Tensor | None = None
    ) -> Tensor:
        product: Tensor = self._kernels.linear(x, *of, out)
        return product

    # --- a step's inputs -------------------------------------------------------------------------

    def _sent(self, batch: StepBatch) -> _Inputs:
        """A step's inputs, on their way to the device."""
        self._room_for(batch)
        of_sequence = batch.query_starts.diff()
        several = (of_sequence > 1).nonzero().squeeze(1).tolist()
        computed = torch.promote_types(self._opened().dtype, torch_dtype(self.kv_cache_spec.dtype))
        block = self._kernels.QUERY_BLOCK[computed.itemsize]
        blocks = [(i, first) for i in several for first in range(0, int(of_sequence[i]), block)]
        sequences = len(batch.context_lens)
        buffer = self._send(self._packed(batch, 0, batch.logits_rows.tolist(), blocks))
        return self._views(
            buffer,
            len(batch.token_ids),
            sequences,
            len(batch.logits_rows),
            len(blocks),
            batch.block_table.shape[1],
            singles=len(several) < sequences,
            tables=self._dynamic_table(batch) or self._table,
        )

    def _packed(
        self,
        batch: StepBatch,
        added: int = 0,
        rows: Sequence[int] = (),
        blocks: Sequence[tuple[int, int]] = (),
    ) -> Tensor:
        """The inputs in one pinned int32 tensor, in the order of ``_Inputs``.

        added: sequences of one token that pad the step; they attend to one token, in the spare
        page.
        """
        width, spare = batch.block_table.shape[1], self._num_pages
        slot = spare * self.kv_cache_spec.page_size
        rope_rows = batch.positions
        if self._opened().config.rope.kind == "dynamic":
            rope_rows = torch.arange(len(batch.positions), dtype=torch.int32)
        ends = batch.query_starts[-1] + torch.arange(1, added + 1, dtype=torch.int32)
        parts = [
            (torch.tensor([width]),),
            _padded(batch.token_ids, added, 0),
            _padded(batch.token_source, added, -1),
            _padded(rope_rows, added, 0),
            _padded(batch.slot_mapping, added, slot),
            (batch.query_starts, ends),
            _padded(batch.context_lens, added, 1),
            (torch.tensor(rows),),
            (torch.tensor(blocks).flatten(),),
            _padded(batch.block_table.flatten(), added * width, spare),
        ]
        starts = _starts([sum(map(len, part)) for part in parts])
        packed = self._card.pinned(starts[-1], dtype=torch.int32)
        for at, part in zip(starts, parts, strict=False):
            for values in part:
                packed[at : at + len(values)] = values
                at += len(values)
        return packed

    def _views(
        self,
        buffer: Tensor,
        tokens: int,
        sequences: int,
        rows: int,
        blocks: int,
        most_pages: int,
        singles: bool = True,
        tables: tuple[Tensor, Tensor] | None = None,
    ) -> _Inputs:
        """The inputs in a tensor on the device that ``_packed`` has filled.

        most_pages: upper limit of the block table's width. singles: whether a sequence has one
        token in this step.
        """
        sizes = [1, tokens, tokens, tokens, tokens, sequences + 1, sequences, rows, 2 * blocks]
        *places, end = _starts(sizes)
        width, token_ids, sources, rope_rows, slots, starts, lengths, logits_rows, in_blocks = (
            buffer[at : at + size] for at, size in zip(places, sizes, strict=True)
        )
        table = buffer[end : end + sequences * most_pages]
        spec = self.kv_cache_spec
        splits = self._kernels.splits(sequences, spec.num_kv_heads, self._card.processors)
        cos, sin = tables or self._table
        return _Inputs(
            tokens=token_ids,
            sources=sources,
            rope_rows=rope_rows,
            slots=slots,
            rows=logits_rows,
            context=self._kernels.Context(
                table=table,
                width=width,
                lengths=lengths,
                starts=starts,
                blocks=in_blocks.view(-1, 2) if blocks else None,
                page_size=spec.page_size,
                splits=splits if singles else 0,
            ),
            cos=cos,
            sin=sin,
        )

    def _rotary_table(self, positions: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions 0 to positions - 1, [positions, head_dim / 2] float32;
        empty for dynamic RoPE. They are computed on the CPU, as those of the CPU's executor are."""
        config = self._opened().config
        if config.rope.kind == "dynamic":
            return self._zeros(0, dtype=torch.float32), self._zeros(0, dtype=torch.float32)
        frequency, scale = frequencies(config)
        angle = torch.arange(positions).float().unsqueeze(1) * frequency
        device = self._card.device
        return (angle.cos() * scale).to(device), (angle.sin() * scale).to(device)

    def _dynamic_table(self, batch: StepBatch) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines of the step's tokens; None unless RoPE is dynamic."""
        config = self._opened().config
        if config.rope.kind != "dynamic":
            return None
        of_step, _ = angles(config)
        angle = of_step(batch)
        return self._send(angle.cos()), self._send(angle.sin())

    def _room_for(self, batch: StepBatch) -> None:
        """Make the rotary table longer where a step needs it, which graphs then do not know."""
        longest = int(batch.context_lens.max())
        if longest > self._max_seq_len:
            self._max_seq_len = 2 * longest
            self._graphs.clear()
            self._table = self._rotary_table(self._max_seq_len)
            largest = self._sizes[-1]
            length = _length(largest, largest, self._most_pages())
            self._static = self._zeros(length, dtype=torch.int32)

    def _keep(self, tokens: Tensor) -> None:
        """Leave a step's tokens for the next step."""
        if len(tokens) > len(self._sampled):
            self._graphs.clear()
            self._sampled = self._zeros(2 * len(tokens), dtype=torch.int64)
        self._sampled[: len(tokens)].copy_(tokens)

    def _most_pages(self) -> int:
        """Pages of the longest sequence."""
        return -(-self._max_seq_len // self.kv_cache_spec.page_size)

    def _send(self, tensor: Tensor) -> Tensor:
        """A copy on the device, which is made while the host goes on."""
        if not tensor.is_pinned():
            pinned = self._card.pinned(*tensor.shape, dtype=tensor.dtype)
            tensor = pinned.copy_(tensor)
        return tensor.to(self._card.device, non_blocking=True)

    def _zeros(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self._card.device)

    # --- cache and weights -----------------------------------------------------------------------

    def read_kv(self, layer: int, pages: Sequence[int]) -> KvLayer:
        key, value = (cached[list(pages)].cpu() for cached in self._paged(layer))
        return KvLayer(key, value)

    def write_kv(self, layer: int, pages: Sequence[int], cache: KvLayer) -> None:
        device = self._card.device
        for own, given in zip(self._paged(layer), (cache.key, cache.value), strict=True):
            own[list(pages)] = given.to(device)

    def _paged(self, layer: int) -> tuple[Tensor, Tensor]:
        """A layer's keys and values, [pages, page_size, num_kv_heads, head_dim]."""
        keys, values = self._kv[self.layers.index(layer)]
        shape = page_shape(self.kv_cache_spec)
        return keys.view(-1, *shape), values.view(-1, *shape)

    def weight(self, name: str) -> Tensor:
        return self._opened().weights[name].cpu()

    @contextmanager
    def _on_card(self) -> Iterator[None]:
        with self.errors(), self._card.active(), _precise:
            yield

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Raise what the device reports as errors that a user can act on."""
        try:
            yield
        except RuntimeError as error:
            if lacks_memory(error):
                raise ExecutorError(
                    f"{self.device} has no memory left for a step: {OUT_OF_MEMORY}"
                ) from error
            if not is_lost(error):
                raise
            raise ExecutorLostError(
                f"{self.device} failed in a step ({first_line(error)}): load the model again, in "
                "a new process if that fails too"
            ) from error


def batch_sizes(most: int) -> list[int]:
    """The batch sizes that are captured: 1, 2, 4, and multiples of 8 until ``most`` fits."""
    sizes = [1, 2, 4, *range(8, most + 8, 8)]
    return sizes[: next(i for i, size in enumerate(sizes) if size >= most) + 1]


def lacks_memory(error: RuntimeError) -> bool:
    """Whether an error of torch, cuBLAS or Triton says that the device has too little memory."""
    words = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(w in str(error) for w in words)


def is_lost(error: RuntimeError) -> bool:
    """Whether an error is one of the device, after which it does no more work."""
    kind = getattr(torch, "AcceleratorError", ())
    return isinstance(error, kind) or str(error).startswith(("CUDA error", "Triton Error [CUDA]"))


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].strip()


def _starts(sizes: Sequence[int]) -> list[int]:
    """Where parts of some sizes begin in the inputs, and the end of the last one.

    Each is at a multiple of 16 bytes: Triton compiles a kernel again for other alignments.
    """
    starts = [0]
    for size in sizes:
        starts.append(-(-(starts[-1] + size) // 4) * 4)
    return starts


def _length(tokens: int, sequences: int, most_pages: int) -> int:
    """Numbers in the inputs of a step of decoding sequences."""
    of_table = sequences * most_pages
    return _starts([1, *[tokens] * 4, sequences + 1, sequences, 0, 0, of_table])[-1]


def _padded(values: Tensor, count: int, fill: int) -> tuple[Tensor, Tensor]:
    return values, values.new_full((count,), fill)


def _tap_projections(tap: Tap, config: ModelConfig, layer: CardLayer, qkv: Tensor) -> Tensor:
    """Name the tensors that one kernel reads or leaves out; returns the keys before rotation."""
    heads, kv_heads = config.num_heads, config.num_kv_heads
    by_head = qkv.view(len(qkv), -1, config.head_dim)
    q, k, v = torch.split(by_head, [heads, kv_heads, kv_heads], 1)
    tap("q_proj", q)
    tap("k_proj", k)
    tap("v_proj", v)
    if layer.qk_norm:
        q_norm, k_norm = layer.qk_norm
        q = F.rms_norm(q, q.shape[-1:], None, config.norm_eps) * q_norm
        k = F.rms_norm(k, k.shape[-1:], None, config.norm_eps) * k_norm
        tap("q_norm", q)
        tap("k_norm", k)
    return k


def _rotated(x: Tensor, step: _Inputs) -> Tensor:
    """Rotary embedding of heads [T, heads, head_dim], in float32 and then rounded."""
    cos = step.cos.index_select(0, step.rope_rows).unsqueeze(1)
    sin = step.sin.index_select(0, step.rope_rows).unsqueeze(1)
    low, high = x.float().chunk(2, -1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), -1).to(x.dtype)
