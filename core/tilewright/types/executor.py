"""What an executor runs, step by step, and within which limits."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

from attrs import frozen, validators
from attrs.converters import optional

from tilewright.types.fields import checked, described, if_set
from tilewright.types.kv_cache import KvCacheSpec, KvLayer
from tilewright.types.model import DTYPES, DType

if TYPE_CHECKING:
    from torch import Tensor

Phase = Literal["prefill", "decode"]
Tap: TypeAlias = "Callable[[str, Tensor], None]"
"""Called by an executor with a tensor's name and the tensor; see docs/tensors.md for the names."""


@frozen(field_transformer=checked)
class RuntimeConfig:
    """How this machine runs a model. None means: decided when the model is loaded."""

    device: str | int | None = described(
        "device to run on, as the executor names it, such as cpu or the number of a card; "
        "default: the executor's choice",
        converter=optional(str),
    )
    """Always stored as a string."""
    weight_dtype: DType | None = described(
        "dtype of the weights: float32, bfloat16 or float16; default: the checkpoint's dtype",
        validator=if_set(validators.in_(DTYPES)),
    )
    kv_dtype: DType | None = described(
        "dtype of the KV cache; default: the weights' dtype",
        validator=if_set(validators.in_(DTYPES)),
    )
    page_size: int | None = described(
        "tokens per KV cache page; default: the executor's choice",
        validator=if_set(validators.ge(1)),
    )
    total_pages: int | None = described(
        "pages in the KV cache; default: enough for max_batch_size sequences of max_seq_len "
        "tokens, within half of the free memory",
        validator=if_set(validators.ge(1)),
    )
    max_seq_len: int | None = described(
        "maximum tokens per sequence, prompt and output together; default: the model's limit",
        validator=if_set(validators.ge(2)),
    )
    max_batch_size: int = described("maximum sequences per step", 16, validator=validators.ge(1))
    max_batch_tokens: int = described(
        "maximum tokens per prefill step; longer prompts are split into chunks",
        2048,
        validator=validators.ge(1),
    )


@frozen(kw_only=True, eq=False)
class StepBatch:
    """One step over B sequences and T tokens, the same for every executor. CPU tensors.

    The tokens of sequence i are rows query_starts[i] to query_starts[i + 1]. They are the last
    ones of its context: position = context_lens[i] - (query_starts[i + 1] - row).
    """

    token_ids: "Tensor"
    """[T] int64"""
    positions: "Tensor"
    """[T] int32"""
    slot_mapping: "Tensor"
    """[T] int32: where each token's key and value go; page * page_size + offset"""
    block_table: "Tensor"
    """[B, max_pages] int32, padded with -1"""
    context_lens: "Tensor"
    """[B] int32: tokens in the KV cache once this step has run"""
    query_starts: "Tensor"
    """[B + 1] int32"""
    logits_rows: "Tensor"
    """[L] int64: the rows of the T tokens whose logits are wanted, ascending"""


@frozen(kw_only=True)
class ExecutorLimits:
    """Limits of one step; None: limited only by memory."""

    max_batch_size: int | None = None
    max_batch_tokens: int | None = None
    max_seq_len: int | None = None


class Executor(Protocol):
    """Runs a model's forward pass over a paged KV cache."""

    @property
    def device(self) -> str:
        """The device it runs on, as results name it: ``cpu``, ``a2a3 card 3``, ``emulated``."""
        ...

    @property
    def limits(self) -> ExecutorLimits: ...

    @property
    def kv_cache_spec(self) -> KvCacheSpec: ...

    def bind_kv_cache(self, layers: Sequence[KvLayer]) -> None:
        """Called once, before the first step, with the storage that kv_cache_spec asked for."""
        ...

    def prefill(self, batch: StepBatch, tap: "Tap | None" = None) -> "Tensor":
        """Run any number of tokens per sequence, with or without context before them.

        Writes the tokens' keys and values to their slots only. Returns the wanted
        logits, [L, vocab_size] float32 on the CPU.
        """
        ...

    def decode(self, batch: StepBatch, tap: "Tap | None" = None) -> "Tensor":
        """Like prefill, with exactly one token per sequence (T == B)."""
        ...

    def close(self) -> None:
        """Free weights and device; closing again does nothing. It cannot be used afterwards."""
        ...


class LayerwiseExecutor(Executor, Protocol):
    """An executor that can run one layer at a time, on any input, so that the layer can be compared
    with the same layer of another executor.

    A step is embed, run_layer of each layer in turn, and run_head of the wanted rows: prefill and
    decode compute exactly that. Hidden states are CPU tensors.
    """

    def embed(self, batch: StepBatch, tap: "Tap | None" = None) -> "Tensor":
        """The tokens' embeddings, [T, hidden_size]."""
        ...

    def run_layer(
        self, layer: int, hidden: "Tensor", batch: StepBatch, tap: "Tap | None" = None
    ) -> "Tensor":
        """One layer on hidden [T, hidden_size]; writes the tokens' keys and values as a step does.

        The phase is decode if each sequence has one token, else prefill.
        """
        ...

    def run_head(self, hidden: "Tensor", tap: "Tap | None" = None) -> "Tensor":
        """Final norm and LM head: hidden [L, hidden_size] to logits [L, vocab_size] float32."""
        ...

    def read_kv(self, layer: int) -> KvLayer:
        """A layer's cache as CPU tensors in the spec's row order; they may be the cache itself."""
        ...

    def write_kv(self, layer: int, cache: KvLayer) -> None:
        """Replace a layer's cache by CPU tensors of the same shape."""
        ...

    def weight(self, name: str) -> "Tensor":
        """A weight in the checkpoint's name and shape, rebuilt from the executor's own copy.

        Raises KeyError for a name that the model does not have.
        """
        ...
