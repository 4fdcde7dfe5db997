"""A model as its files describe it: sizes, tensors, text assets."""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Literal, Protocol, get_args

from attrs import field, frozen

from tilewright.types.sampling import GenerateConfig

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor

DType = Literal["float32", "bfloat16", "float16"]
RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn"]
DTYPES: tuple[DType, ...] = get_args(DType)

MAX_POSITIONS = 2**31 - 1
"""Positions are int32."""


@frozen(kw_only=True)
class RopeConfig:
    """Rotary position embedding: base frequency and scaling to long contexts.

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

    @property
    def context_length(self) -> int:
        """The most tokens of a sequence, prompt and output together, that the files allow.

        At least max_position_embeddings. Linear and dynamic scaling multiply that by the factor,
        and YaRN multiplies the original length; Llama 3's files state the scaled length.
        """
        rope, positions = self.rope, self.max_position_embeddings
        if rope.kind in ("linear", "dynamic"):
            scaled = positions * rope.factor
        elif rope.kind == "yarn":
            scaled = (rope.original_max_position or positions) * rope.factor
        else:
            return positions
        return max(positions, int(min(scaled, MAX_POSITIONS)))

    def window(self, layer: int) -> int | None:
        """The sliding window of a layer in tokens, or None for full attention."""
        return self.sliding_windows[layer] if self.sliding_windows else None


@frozen(kw_only=True)
class TensorInfo:
    """Metadata of a tensor as ``TensorSource.get`` returns it, known before any of it is read.

    It is as stored, unless the source converts it, for example from a quantised form.
    """

    shape: tuple[int, ...]
    dtype: str
    """The name of the torch dtype without ``torch.``: ``bfloat16``, ``float32``, ``int8``, ..."""
    nbytes: int
    location: str
    """The file that holds the tensor, for error messages."""


class TensorSource(Protocol):
    """Named tensors, read on demand. Any thread may read them."""

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
        """Close the files. Tensors that were returned stay valid; no more is read."""
        ...


@frozen(kw_only=True, eq=False)
class QuantisedTensor:
    """A matrix as its file stores it in 4 bits: values * scales + offsets."""

    values: "Tensor"
    """[out, in] uint8, 0 to 15."""
    scales: "Tensor"
    """[out, in / group] float32."""
    offsets: "Tensor"
    """[out, in / group] float32."""
    group: int
    """Weights of a row that share a scale and an offset."""


class QuantisedSource(TensorSource, Protocol):
    """A source whose files may hold matrices in 4 bits. Optional: see
    ``tilewright.weights.get_quantised``."""

    def get_quantised(self, name: str) -> QuantisedTensor | None:
        """The matrix that ``get`` returns as floats; None where it is stored otherwise.

        Raises what ``get`` raises.
        """
        ...


class RowSource(TensorSource, Protocol):
    """A source that can read some rows of a matrix. Optional: see
    ``tilewright.weights.StoredRows``."""

    def get_rows(self, name: str, start: int, stop: int) -> "Tensor | None":
        """Rows ``start`` up to ``stop`` of what ``get`` returns; None if that must be read whole.

        Raises what ``get`` raises.
        """
        ...


@frozen(kw_only=True)
class TextAssets:
    """Tokenizer and templates, for text to token ids and back."""

    tokenizer: "Tokenizer"
    chat_template: str | None = None
    """Jinja2 source, or None if the model has no template."""
    tool_chat_template: str | None = None
    """Jinja2 source for chats with tools; None: ``chat_template`` is for these too."""
    special_tokens: Mapping[str, str] = field(factory=dict)
    """``bos_token``, ``eos_token``, ... as chat templates name them."""
    turn_end_ids: tuple[int, ...] = ()
    """Ids that also end an answer in a chat: the tokenizer's ``eos_token`` and ``eot_token`` where
    the model's ``eos_token_ids`` lack them."""


@frozen(kw_only=True)
class Packing:
    """The layout that weights were packed in: an executor reads only its own."""

    executor: str
    """``distribution:name`` of the plugin."""
    version: int
    """Version of the executor's layout; 0: checkpoint names and shapes, in ``weight_dtype``."""
    weight_dtype: str


@frozen(kw_only=True, eq=False)
class PackedTensor:
    """A weight in an executor's layout, described before it is read."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """The dtype's name, as in ``TensorInfo``."""
    read: "Callable[[], Tensor]"
    """Builds the tensor on the CPU; called once, in order. Raises ModelError."""


@frozen(kw_only=True)
class PackedWeights:
    """All weights of a model in an executor's layout."""

    version: int
    """Version of the layout, from 1; raised whenever the layout changes."""
    tensors: Iterable[PackedTensor]
    """The tensors, in the order in which the executor reads them."""


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


@frozen(kw_only=True, eq=False)
class Sample:
    """A small model that a loader wrote into files, and the weights that it must load from them."""

    source: str
    """Names the model, as a user would."""
    tensors: "Mapping[str, Tensor] | None" = None
    """Every tensor of ``LoadedModel.weights`` by name, as it was before it was quantised or
    converted for the files; compared in float32. None: not known, so values are not checked."""
    tolerance: float = 0.0
    """Largest error of a loaded value that the files' format causes, as a fraction of the largest
    magnitude in its tensor; 0.0 if it keeps every value."""
