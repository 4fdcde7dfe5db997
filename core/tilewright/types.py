"""What passes between the engine and its plugins: plain, frozen data and small protocols.

``ModelConfig`` is what a model's files say; ``RuntimeConfig`` is how this machine runs it. Neither
holds a field of the other. Nothing here imports torch at run time.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, get_args

from attrs import field, fields, frozen, validators
from attrs.converters import optional

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from torch import Tensor

DType = Literal["float32", "bfloat16", "float16"]
RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn"]
RowOrder = Literal["NHD", "HND"]
FinishReason = Literal["eos", "stop", "length"]
Phase = Literal["prefill", "decode"]

DTYPES: tuple[DType, ...] = get_args(DType)

Tap: TypeAlias = "Callable[[str, Tensor], None]"
"""Called by an executor with a tensor's name and the tensor; see docs/tensors.md for the names."""

Report: TypeAlias = Callable[[str, int, int], None]
"""Called with what is being got ready, how much of it is done, and how much there is."""

Hypothesis: TypeAlias = Callable[..., Iterable[tuple[str, Any]]]
"""Yields mistakes that a wrong layer may have: a name, and the operations that make the mistake.

Called with a ``tilewright.compare.layer.Case``; the operations are its module's ``Operations``.
"""


def described(help: str, default: Any = None, **kwargs: Any) -> Any:
    """A keyword field with a line of help, which the command line and the docs show."""
    return field(default=default, metadata={"help": help}, kw_only=True, **kwargs)


def _optional(*checks: Any) -> Any:
    return validators.optional(list(checks))


# --- the model ------------------------------------------------------------------------------------


@frozen(kw_only=True)
class RopeConfig:
    """Rotary position embedding: base frequency and how it is scaled to long contexts.

    The scaling kinds are those of Hugging Face configurations. Fields that a kind does not use
    keep their defaults.
    """

    theta: float = 10000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    original_max_position: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@frozen(kw_only=True)
class ModelConfig:
    """A dense decoder-only transformer, described by data rather than by a class per family.

    Weights carry Hugging Face names (``model.layers.0.self_attn.q_proj.weight``, ...);
    ``tilewright.weights.expected_tensors`` lists them with their shapes.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    dtype: DType
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    sliding_windows: tuple[int | None, ...] = ()
    """Per layer: how many positions back attention reaches, itself included; None: all."""
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def window(self, layer: int) -> int | None:
        """The sliding window of a layer in tokens, or None for full attention."""
        return self.sliding_windows[layer] if self.sliding_windows else None


@frozen(kw_only=True)
class TensorInfo:
    """What is known of a tensor before a byte of it is read: how ``TensorSource.get`` gives it.

    That is how it is stored, unless a source converts it, say from a quantised form.
    """

    shape: tuple[int, ...]
    dtype: str
    """The name torch gives it without ``torch.``: ``bfloat16``, ``float32``, ``int8``, ..."""
    nbytes: int
    location: str
    """The file it stands in, for error messages."""


class TensorSource(Protocol):
    """Named tensors, read when they are asked for and not before. Any thread may read them."""

    def names(self) -> Collection[str]: ...

    def info(self, name: str) -> TensorInfo:
        """Raises KeyError for an unknown name."""
        ...

    def get(self, name: str) -> "Tensor":
        """The whole tensor on the CPU; it may share memory with the file: do not write.

        Raises KeyError for an unknown name, and ModelError when the file cannot be read.
        """
        ...

    def close(self) -> None:
        """Let go of the files. Tensors that were handed out stay valid; no more is read."""
        ...


@frozen(kw_only=True)
class TextAssets:
    """What turns text into token ids and back."""

    tokenizer: "Tokenizer"
    chat_template: str | None = None
    """Jinja2 source, or None for a model that has none."""
    special_tokens: Mapping[str, str] = field(factory=dict)
    """``bos_token``, ``eos_token``, ... as chat templates name them."""


@frozen(kw_only=True)
class Packing:
    """For whom weights were packed: an executor reads its own layout and no other."""

    executor: str
    """``distribution:name`` of the plugin."""
    version: int
    """Of that executor's layout; 0: the checkpoint's names and shapes, in ``weight_dtype``."""
    weight_dtype: DType


@frozen(kw_only=True, eq=False)
class PackedTensor:
    """A weight as an executor wants it: known before it is read."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """As in ``TensorInfo``."""
    read: "Callable[[], Tensor]"
    """Makes it, on the CPU; called once, when its turn comes. Raises ModelError."""


@frozen(kw_only=True)
class PackedWeights:
    """All weights of a model as an executor wants them."""

    version: int
    """From 1; raised whenever tensors are laid out in another way than before."""
    tensors: Iterable[PackedTensor]
    """In the order in which the executor reads them."""


@frozen(kw_only=True)
class LoadedModel:
    """What a loader returns. No weight has been read yet."""

    config: ModelConfig
    weights: TensorSource
    text: TextAssets
    generation_defaults: "GenerateConfig"
    """Settings that the model's files recommend; the user's settings win over them."""
    source: str
    warnings: tuple[str, ...] = ()
    packing: Packing | None = None
    """None: the weights have the names and shapes of ``expected_tensors``."""


# --- how this machine runs it ---------------------------------------------------------------------


@frozen
class RuntimeConfig:
    """How this machine runs a model. None means: decided when the model is loaded."""

    device: str | int | None = described(
        "device that computes, as the executor names it: cpu, the number of a card; default: the "
        "executor's choice",
        converter=optional(str),
    )
    """Text, in the end."""
    weight_dtype: DType | None = described(
        "float32, bfloat16 or float16; default: as the checkpoint has it",
        validator=_optional(validators.in_(DTYPES)),
    )
    kv_dtype: DType | None = described(
        "dtype of the KV cache; default: the weights' dtype",
        validator=_optional(validators.in_(DTYPES)),
    )
    page_size: int | None = described(
        "tokens in a KV cache page; default: the executor's choice",
        validator=_optional(validators.ge(1)),
    )
    total_pages: int | None = described(
        "pages in the KV cache; default: enough for max_batch_size sequences of max_seq_len, "
        "within half of the free memory",
        validator=_optional(validators.ge(1)),
    )
    max_seq_len: int | None = described(
        "longest prompt plus continuation in tokens; default: the model's own limit",
        validator=_optional(validators.ge(2)),
    )
    max_batch_size: int = described("sequences in a step at most", 16, validator=validators.ge(1))
    max_batch_tokens: int = described(
        "tokens in a prefill step at most; longer prompts go in chunks",
        2048,
        validator=validators.ge(1),
    )


@frozen(kw_only=True)
class KvCacheSpec:
    """The KV cache that an executor needs. Declared by the executor, built by the allocator.

    row_order: ``NHD`` has layers of shape [pages, page_size, num_kv_heads, head_dim]; ``HND`` has
        [pages, num_kv_heads, page_size, head_dim]. The two cannot be told apart by shape when
        page_size == num_kv_heads, so the order is declared and never inferred. A slot is
        page * page_size + offset in both.
    memory_limit: bytes that the cache may take at most when total_pages is not given.
    allocate: makes the storage of one tensor from (shape, dtype); None: ``torch.zeros`` on
        ``device``. An executor whose cache lives on a device that torch does not know returns its
        own handles here; the allocator passes them on and does not look inside, and cannot copy.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    dtype: DType
    device: str = "cpu"
    row_order: RowOrder = "NHD"
    memory_limit: int | None = None
    allocate: "Callable[[tuple[int, ...], torch.dtype], Any] | None" = None

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all layers, keys and values."""
        itemsize = 4 if self.dtype == "float32" else 2
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.page_size * itemsize


@frozen
class KvLayer:
    """One layer's keys and values, each shaped as the spec's row order says."""

    key: "Tensor"
    value: "Tensor"


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
    """What one step may hold; None: no limit but memory."""

    max_batch_size: int | None = None
    max_batch_tokens: int | None = None
    max_seq_len: int | None = None


class Executor(Protocol):
    """Runs a model's forward pass over a paged KV cache."""

    @property
    def device(self) -> str:
        """What computes, as results name it: ``cpu``, ``a2a3 card 3``, ``emulated``."""
        ...

    @property
    def limits(self) -> ExecutorLimits: ...

    @property
    def kv_cache_spec(self) -> KvCacheSpec: ...

    def bind_kv_cache(self, layers: Sequence[KvLayer]) -> None:
        """Called once, before the first step, with the storage that kv_cache_spec asked for."""
        ...

    def prefill(self, batch: StepBatch, tap: "Tap | None" = None) -> "Tensor":
        """Run any number of tokens a sequence, with or without context before them.

        Writes the tokens' keys and values to their slots and to no other. Returns the wanted
        logits, [L, vocab_size] float32 on the CPU.
        """
        ...

    def decode(self, batch: StepBatch, tap: "Tap | None" = None) -> "Tensor":
        """As prefill, with exactly one token a sequence (T == B)."""
        ...

    def close(self) -> None:
        """Free weights and device. A closed executor is not used again; closing twice is fine."""
        ...


class LayerwiseExecutor(Executor, Protocol):
    """An executor whose layers can be run one at a time, on whatever input: one layer of it can so
    be held against the same layer of another executor.

    A step is embed, run_layer of each layer in turn, and run_head of the wanted rows: prefill and
    decode compute just that. Hidden states are CPU tensors.
    """

    def embed(self, batch: StepBatch, tap: "Tap | None" = None) -> "Tensor":
        """The tokens' embeddings, [T, hidden_size]."""
        ...

    def run_layer(
        self, layer: int, hidden: "Tensor", batch: StepBatch, tap: "Tap | None" = None
    ) -> "Tensor":
        """One layer on hidden [T, hidden_size]; writes the tokens' keys and values as a step does.

        The phase is decode where each sequence has one token and prefill elsewhere.
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
        """A weight as the checkpoint names and shapes it, made from what the executor works with.

        Raises KeyError for a name that the model does not have.
        """
        ...


class KvAllocator(Protocol):
    """Owns the KV cache: which request holds which page, and the storage behind the pages.

    A page belongs to the requests that hold it and is free when none does. Only the executor writes
    to the storage, and only to slots of a request's own unshared pages; but for fork, which copies.
    """

    @property
    def total_pages(self) -> int: ...

    @property
    def free_pages(self) -> int: ...

    def pages_for(self, num_tokens: int) -> int:
        """How many pages hold num_tokens tokens."""
        ...

    def allocate(self, request_id: str, num_tokens: int) -> None:
        """Give a new request pages for its first num_tokens tokens.

        Raises OutOfPagesError and changes nothing when too few pages are free; ValueError when the
        request already has pages or num_tokens < 1.
        """
        ...

    def extend(self, request_id: str, num_tokens: int = 1) -> None:
        """Make room for num_tokens more. Raises OutOfPagesError and changes nothing; KeyError."""
        ...

    def num_tokens(self, request_id: str) -> int:
        """Tokens that the request has room for. Raises KeyError."""
        ...

    def slots(self, request_id: str, start: int, stop: int) -> "Tensor":
        """Slots of positions start to stop, [stop - start] int32. Raises KeyError, IndexError."""
        ...

    def block_table(self, request_ids: Sequence[str]) -> "Tensor":
        """[B, max_pages] int32: each request's pages in order of position, padded with -1.

        max_pages is that of the longest of them. Raises KeyError.
        """
        ...

    def fork(self, parent_id: str, child_id: str) -> None:
        """Give a new request the parent's tokens: full pages shared, the partly full one copied.

        Raises OutOfPagesError and changes nothing; KeyError for an unknown parent; ValueError when
        the child already has pages, and when a page of an executor's own storage
        (KvCacheSpec.allocate) would have to be copied.
        """
        ...

    def free(self, request_id: str) -> None:
        """Take all pages from a request. Raises KeyError."""
        ...

    def layers(self) -> Sequence[KvLayer]:
        """The storage, one entry a layer, in the spec's row order; the same objects each time."""
        ...

    def check_integrity(self) -> None:
        """Raise AssertionError unless each page is free or held, exactly once counted."""
        ...


# --- requests and results -------------------------------------------------------------------------


@frozen
class SamplingParams:
    """How one request's next token is chosen: all values known. What a sampler is given.

    What they mean stands at the fields of GenerateConfig. They apply in this order: repetition
    penalty; presence and frequency penalty; logit bias; at temperature 0 the likeliest token, else
    temperature, top_k, top_p and min_p, each to what the one before it leaves.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(factory=dict)
    seed: int = 0
    logprobs: int | None = None


@frozen
class GenerateConfig:
    """What a user asks of one generation. None: as the model's files recommend, else as said."""

    max_new_tokens: int | None = described(
        "tokens to generate at most (128)", validator=_optional(validators.ge(1))
    )
    temperature: float | None = described(
        "0 takes the likeliest token; higher is more random (0)",
        validator=_optional(validators.ge(0.0), validators.lt(float("inf"))),
    )
    top_k: int | None = described(
        "sample among the k likeliest tokens; 0: all (0)", validator=_optional(validators.ge(0))
    )
    top_p: float | None = described(
        "sample among the fewest tokens whose probabilities reach p (1)",
        validator=_optional(validators.gt(0.0), validators.le(1.0)),
    )
    min_p: float | None = described(
        "drop tokens less likely than min_p times the likeliest (0)",
        validator=_optional(validators.ge(0.0), validators.le(1.0)),
    )
    repetition_penalty: float | None = described(
        "divide (or multiply, below 0) logits of tokens seen in prompt or output (1)",
        validator=_optional(validators.gt(0.0), validators.lt(float("inf"))),
    )
    presence_penalty: float | None = described(
        "subtract once from logits of tokens in the output (0)",
        validator=_optional(validators.gt(float("-inf")), validators.lt(float("inf"))),
    )
    frequency_penalty: float | None = described(
        "subtract for each occurrence in the output (0)",
        validator=_optional(validators.gt(float("-inf")), validators.lt(float("inf"))),
    )
    logit_bias: Mapping[int, float] | None = described(
        "token id -> added to its logit; -inf forbids the token",
        validator=_optional(validators.deep_mapping(validators.ge(0), validators.lt(float("inf")))),
    )
    seed: int | None = described(
        "same seed, same tokens, whatever else is in the batch; of many prompts, number i from 0 "
        "has seed + i (drawn anew)",
        validator=_optional(validators.ge(0), validators.lt(2**63)),
    )
    logprobs: int | None = described(
        "return log-probabilities: of the chosen token (0) and of the n likeliest (n)",
        validator=_optional(validators.ge(0)),
    )
    stop: tuple[str, ...] | None = described(
        "end before any of these strings, cut from the text",
        # A string is a sequence of strings too: each of its characters would end the text.
        validator=_optional(validators.instance_of((tuple, list))),
    )
    stop_token_ids: tuple[int, ...] | None = described("end at any of these token ids")
    ignore_eos: bool | None = described("go on after an end-of-sequence token (false)")
    stream: bool | None = described("generate() yields text as it comes (false)")

    def over(self, defaults: "GenerateConfig") -> "GenerateConfig":
        """This configuration, with what it leaves open taken from defaults."""
        names = [a.name for a in fields(GenerateConfig)]
        mine = {n: v for n in names if (v := getattr(self, n)) is not None}
        return GenerateConfig(**{n: getattr(defaults, n) for n in names} | mine)


BUILTIN_GENERATE = GenerateConfig(
    max_new_tokens=128,
    temperature=0.0,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    repetition_penalty=1.0,
    presence_penalty=0.0,
    frequency_penalty=0.0,
    logit_bias={},
    stop=(),
    stop_token_ids=(),
    ignore_eos=False,
    stream=False,
)
"""What is in force where neither the user nor the model's files say anything."""


@frozen(kw_only=True, eq=False)
class SamplerRow:
    """One request's part of a sampling step."""

    request_id: str
    params: SamplingParams
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]
    """Generated so far; its length is the step."""


@frozen(kw_only=True)
class TokenLogprobs:
    """Natural-log probabilities at one step, of the distribution before temperature and filters."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """(token id, log-probability), likeliest first."""


@frozen(kw_only=True)
class SampledToken:
    token_id: int
    logprobs: TokenLogprobs | None = None
    sanitized: int = 0
    """How many non-finite logits were replaced; always 0 unless sanitising was asked for."""


class Sampler(Protocol):
    """Chooses each request's next token."""

    def sample(self, logits: "Tensor", rows: Sequence[SamplerRow]) -> list[SampledToken]:
        """From logits [B, vocab_size] float32 on the CPU, one row a request, to B tokens.

        A row's result depends on that row alone. Ties go to the smallest id. The logits are not
        changed. Raises NonFiniteLogitsError for NaN or infinity (-inf included).
        """
        ...


@frozen(kw_only=True)
class Timings:
    """Seconds by the wall clock, from the point of view of one request."""

    load_seconds: float
    """Loading the model, before this request."""
    prefill_seconds: float
    decode_seconds: float
    prompt_tokens: int
    new_tokens: int

    @property
    def prefill_tokens_per_second(self) -> float:
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """The first token comes out of prefill, so decode makes new_tokens - 1."""
        return (self.new_tokens - 1) / self.decode_seconds if self.decode_seconds else 0.0


@frozen(kw_only=True)
class GenerateResult:
    """A finished generation."""

    model_id: str
    request_id: str
    text: str
    token_ids: tuple[int, ...]
    """As sampled: a token that ended the text (eos, stop) is the last one."""
    finish_reason: FinishReason
    prompt_token_ids: tuple[int, ...]
    seed: int
    logprobs: tuple[TokenLogprobs, ...] | None
    timings: Timings
    device: str
    """What computed it, as the executor says."""
    sanitized_steps: int = 0
    """Steps whose logits were not finite and were sanitised; such text proves nothing."""


@frozen(kw_only=True)
class StepEvent:
    """What an observer is told of one executor step."""

    model_id: str
    phase: Phase
    step: int
    """Counts the model's steps from 0."""
    request_ids: tuple[str, ...]
    num_tokens: int
    seconds: float


# --- what plugins are asked for -------------------------------------------------------------------


@frozen(kw_only=True)
class PluginInfo:
    """How a plugin presents itself to ``tilewright plugins show`` and to the options' reader."""

    summary: str
    options: type | None = None
    """An attrs class; each field's ``metadata["help"]`` is its line of help. None: no options."""
    limits: Mapping[str, str] = field(factory=dict)
    """What it can and cannot do, by topic, in words.

    Of samplers, the conformance suite reads two topics: ``no effect`` names the SamplingParams
    that the sampler does not heed, separated by commas; ``distribution`` says what it draws from
    where that is not the softmax of what the settings leave.
    """


CheckStatus = Literal["ok", "warning", "failed"]


@frozen(kw_only=True)
class Check:
    """One finding of ``tilewright doctor``."""

    name: str
    status: CheckStatus
    found: str
    advice: str = ""
    """What to do about it; empty when there is nothing to do."""


class WeightFormats(Protocol):
    """The installed weight formats, as a loader sees them."""

    def open(self, directory: Path, name: str | None = None) -> TensorSource:
        """Open a directory's weights with the named format, or with the one that finds its files.

        Raises ModelError when none or more than one does; PluginError for an unknown name.
        """
        ...


@frozen(kw_only=True)
class LoadRequest:
    """What a loader is asked for."""

    source: str
    """As the user wrote it: a directory, a file, a hub id."""
    options: Any
    """An instance of the plugin's options class (None if it has none); so in all requests."""
    weight_format: str | None
    formats: WeightFormats
    report: "Report" = lambda what, done, total: None
    """Tells observers what is being got ready (on_prepare), such as a download."""


@frozen(kw_only=True)
class ExecutorRequest:
    """What an executor is made from.

    The runtime's dtypes and max_seq_len are filled in; where its device and page_size are None, the
    executor chooses.
    """

    model_config: ModelConfig
    runtime_config: RuntimeConfig
    weights: TensorSource
    """Checked: every expected tensor is there with its expected shape."""
    options: Any
    packed: bool = False
    """Whether the weights are those of the executor's own ``pack_weights``."""
    report: "Report" = lambda what, done, total: None
    """Tells observers what is being got ready (on_prepare)."""


@frozen(kw_only=True)
class KvAllocatorRequest:
    spec: KvCacheSpec
    total_pages: int | None
    """As the user set it; None: from max_sequences, max_seq_len and the spec's memory limit."""
    max_sequences: int
    max_seq_len: int
    options: Any


@frozen(kw_only=True)
class SamplerRequest:
    options: Any
