"""What an executor runs, step by step, and within which limits."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, runtime_checkable

from attrs import field, frozen, validators
from attrs.converters import optional

from tilewright.types.fields import checked, described, if_set
from tilewright.types.kv_cache import KvCacheSpec, KvLayer
from tilewright.types.model import MAX_POSITIONS
from tilewright.types.sampling import SampledToken, SamplerRow, SamplingParams

if TYPE_CHECKING:
    from torch import Tensor

Tap: TypeAlias = "Callable[[str, Tensor], None]"
"""Called by an executor with a tensor's name and the tensor; see docs/tensors.md for the names."""

Admission = Literal["preempt", "reserve"]
"""Which requests start; see RuntimeConfig."""

Speculation = Literal["ngram"]
"""How tokens are guessed; see RuntimeConfig."""

_MOST_PAGES = 2**24
"""The most pages that a user may ask for: an allocator keeps a few bytes for each."""


@frozen(field_transformer=checked)
class RuntimeConfig:
    """How a user wants this machine to run a model. None: left to the engine and the executor."""

    device: str | int | None = described(
        "device to run on, as the executor names it, such as cpu or the number of a card; "
        "default: the executor's choice",
        converter=optional(str),
    )
    """Always stored as a string."""
    weight_dtype: str | None = described(
        "dtype of the weights, one that the executor supports, such as float32, bfloat16, float16 "
        "or int8; default: the checkpoint's dtype"
    )
    kv_dtype: str | None = described(
        "dtype of the KV cache, one that the executor supports; default: the weights' dtype, or "
        "the model's where the weights are quantised"
    )
    page_size: int | None = described(
        "tokens per KV cache page; default: the executor's choice",
        validator=if_set(validators.ge(1), validators.le(MAX_POSITIONS)),
    )
    total_pages: int | None = described(
        "pages in the KV cache; default: enough for max_batch_size sequences of max_seq_len "
        "tokens, within the memory that the executor finds free for it",
        validator=if_set(validators.ge(1), validators.le(_MOST_PAGES)),
    )
    max_seq_len: int | None = described(
        "maximum tokens per sequence, prompt and output together; default: the model's limit",
        validator=if_set(validators.ge(2), validators.le(MAX_POSITIONS)),
    )
    max_batch_size: int = described("maximum sequences per step", 16, validator=validators.ge(1))
    max_batch_tokens: int = described(
        "maximum tokens per step; longer prompts are split into chunks",
        2048,
        validator=validators.ge(1),
    )
    prefix_cache: bool | None = described(
        "keep the pages of requests that ended, and reuse them for prompts that begin with the "
        "same tokens; default: on if the executor can share pages"
    )
    admission: Admission = described(
        "which requests start: preempt, those whose tokens so far fit into the KV cache (when it "
        "is full, the youngest gives its pages back and is computed again); reserve, those whose "
        "last token is sure to fit, so that none is interrupted",
        "preempt",
    )
    speculation: Speculation | None = described(
        "guess several tokens, and check them in one step: ngram, what followed the last tokens "
        "when they occurred before in prompt or output; pays off for text that repeats itself; "
        "default: no guesses"
    )


@frozen(kw_only=True)
class ResolvedRuntime:
    """How this machine runs a loaded model: every field of RuntimeConfig, decided."""

    device: str
    """As the executor names it."""
    weight_dtype: str
    kv_dtype: str
    page_size: int
    total_pages: int
    max_seq_len: int
    max_batch_size: int
    max_batch_tokens: int
    prefix_cache: bool = True
    admission: Admission = "preempt"
    speculation: Speculation | None = None


@frozen(kw_only=True, eq=False)
class StepBatch:
    """One step over B sequences and T tokens, the same for every executor.

    Tensors are on the CPU, and a batch can be pickled. The tokens of sequence i are rows
    query_starts[i] to query_starts[i + 1]. They are the last ones of its context: position =
    context_lens[i] - (query_starts[i + 1] - row). The fields with a default are for steps that
    check drafts or follow a step in flight, for dynamic RoPE, and for executors that keep something
    per request.
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
    max_query_len: int = field()
    """Tokens of the sequence that has most of them in this step."""
    num_drafts: "Tensor" = field()
    """[B] int32: how many of a sequence's tokens, its last ones, are guesses that this step checks.
    A sequence with one token and its drafts is decoding, though it has more than one row."""
    token_source: "Tensor" = field()
    """[T] int32: -1, or the row of the L of the step before whose sampled token stands here; the
    token id is 0 then. Only for executors that sample (``SamplingExecutor``)."""
    prompt_lens: "Tensor" = field()
    """[B] int32: tokens of each sequence's whole prompt, however many of them run in this step.
    Only dynamic RoPE needs it (``tilewright.rope.dynamic_lengths``). Default: context_lens, as for
    prompts that end in this step."""
    request_ids: tuple[str, ...] = ()
    """The B requests that the sequences belong to."""
    ended_request_ids: tuple[str, ...] = ()
    """Requests that ended, or gave their pages back, since the step before: what is kept for them
    must be dropped before this step, which may begin one of them again at its first token. Some may
    have been in no step, and they are named again after a step that failed."""

    @max_query_len.default
    def _longest(self) -> int:
        return int(self.query_starts.diff().max())

    @num_drafts.default
    def _no_drafts(self) -> "Tensor":
        return self.context_lens.new_zeros(len(self.context_lens))

    @token_source.default
    def _all_known(self) -> "Tensor":
        return self.slot_mapping.new_full((len(self.slot_mapping),), -1)

    @prompt_lens.default
    def _prompts_end_here(self) -> "Tensor":
        return self.context_lens


@frozen(kw_only=True)
class ExecutorLimits:
    """What steps an executor takes; None: limited only by memory."""

    max_batch_size: int | None = None
    """Sequences of a step."""
    max_batch_tokens: int | None = None
    """Tokens of a step."""
    max_seq_len: int | None = None
    max_logits_rows: int | None = None
    """Rows of logits of a step, beyond those that are sampled. 0: prompts are not scored."""
    mixed: bool = True
    """Whether prompts and decoding sequences may be in one step. If not, and both wait, they take
    turns."""
    shares_pages: bool = True
    """Whether sequences may hold pages together. False for an executor that keeps keys and values
    of its own for each request."""
    tap_exact: bool = True
    """Whether a step with a tap computes the same bits as one without."""


@frozen(kw_only=True)
class Tiles:
    """The sizes at which an executor's code takes another path, so that a test can reach each path
    with short prompts."""

    page_size: int | None = None
    """The runtime's page size; where that is None, a small one that the executor serves and with
    which short prompts reach all of its code. None: any page size will do."""
    prefill_rows: int | None = None
    """Tokens of a sequence that prefill computes together. None: not tiled; so in all of these."""
    decode_rows: int | None = None
    """Sequences that a decode step computes together."""
    kv_rows: int | None = None
    """Keys in one step of attention, with pages of page_size."""
    columns: int | None = None
    """Columns of the widest tile of a norm or a product: a model whose hidden size is no larger
    never runs the second one."""


class Executor(Protocol):
    """Runs a model's forward pass over a paged KV cache, which it owns."""

    @property
    def device(self) -> str:
        """The device it runs on, as results name it: ``cpu``, ``a2a3 card 3``, ``emulated``."""
        ...

    @property
    def limits(self) -> ExecutorLimits: ...

    @property
    def kv_cache_spec(self) -> KvCacheSpec: ...

    def allocate_kv(self, num_pages: int) -> None:
        """Allocate the KV cache. Called once, before the first step.

        Raises OutOfPagesError when the device cannot hold so many pages.
        """
        ...

    def forward(self, batch: StepBatch, tap: "Tap | None" = None) -> "Tensor":
        """Run a step: any number of tokens per sequence, with or without context before them.

        Writes the tokens' keys and values to their slots only. Returns the wanted logits,
        [L, vocab_size] float32, on the device that computes them. Raises ExecutorError for a step
        that failed, and ExecutorLostError when no further step can run.
        """
        ...

    def read_kv(self, layer: int, pages: Sequence[int]) -> KvLayer:
        """Copies of some pages of a layer's cache, as CPU tensors in the spec's row order."""
        ...

    def write_kv(self, layer: int, pages: Sequence[int], cache: KvLayer) -> None:
        """Replace some pages of a layer's cache by CPU tensors, as ``read_kv`` returns them."""
        ...

    def close(self) -> None:
        """Free weights, cache and device; closing again does nothing. It cannot be used
        afterwards. Steps are in flight only if Ctrl-C interrupted the wait for them."""
        ...


class LayerwiseExecutor(Executor, Protocol):
    """An executor that can run one layer at a time, on any input, so that the layer can be compared
    with the same layer of another executor, and so that a model can be split by layers.

    A step is begin, embed, run_layer of each layer in turn, and run_head of the wanted rows:
    ``forward`` with a tap computes exactly what they do with one, and without one as well if
    ``limits.tap_exact``. Hidden states stay on the executor's device; inputs from elsewhere are
    moved there.
    """

    @property
    def layers(self) -> range:
        """The layers that it runs, by their number in the model. Only the part with layer 0 can
        embed, and only the part with the last layer can run the head."""
        ...

    def begin(self, batch: StepBatch) -> Any:
        """Prepare what the layers of a step share. The result is passed to the methods below."""
        ...

    def embed(self, step: Any, tap: "Tap | None" = None) -> "Tensor":
        """The tokens' embeddings, [T, hidden_size]."""
        ...

    def run_layer(
        self, step: Any, layer: int, hidden: "Tensor", tap: "Tap | None" = None
    ) -> "Tensor":
        """One layer on hidden [T, hidden_size]; writes the tokens' keys and values as a step does.

        Does not change its input.
        """
        ...

    def run_head(self, step: Any, hidden: "Tensor", tap: "Tap | None" = None) -> "Tensor":
        """Final norm and LM head: hidden [L, hidden_size], any rows, to logits [L, vocab_size]
        float32."""
        ...

    def weight(self, name: str) -> "Tensor":
        """A weight in the checkpoint's name and shape, rebuilt from the executor's own copy.

        Raises KeyError for a name that the model, or the executor's part of it, does not have.
        """
        ...


@frozen(kw_only=True, eq=False)
class StepOutput:
    """What an executor that samples made of a step."""

    tokens: Sequence[SampledToken | None]
    """For each of the step's L rows of logits; None where the engine samples."""
    logits: "Tensor | None" = None
    """[number of None, vocab_size] float32: the rows that the engine samples, in order."""


class PendingStep(Protocol):
    """A step that was submitted."""

    def wait(self) -> StepOutput:
        """Wait until the step is done. Called in the order of submission, and again if Ctrl-C
        interrupted it or what the engine did next: it returns the same then.

        Raises what ``Executor.forward`` and ``Sampler.sample`` raise. It is called for all later
        steps in flight too, whose results are void.
        """
        ...


@runtime_checkable
class SamplingExecutor(Executor, Protocol):
    """An executor that samples where the logits are. Up to two of its steps are in flight.

    Optional: for other executors, and for all steps with a tap, the engine calls ``forward`` and
    the sampler.
    """

    def serves(self, params: SamplingParams) -> bool:
        """Whether it samples for a request with these parameters itself."""
        ...

    def submit(self, batch: StepBatch, sampling: Sequence[SamplerRow | None]) -> PendingStep:
        """Start a step, and return without waiting for it.

        sampling: for each of the L rows of logits, how its token is chosen; None for rows whose
        logits are wanted, and sampled by the engine. The batch may name tokens of the step before
        by ``token_source``. Steps run in the order of submission.

        Raises what ``Executor.forward`` raises: the step does not run then. One that was
        interrupted, by Ctrl-C, may run; nobody waits for it, and the next one may be the same.
        """
        ...
