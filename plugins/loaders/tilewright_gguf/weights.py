"""Tensors of GGUF files by their Hugging Face names, dequantised on request."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from attrs import evolve, frozen
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from tilewright.errors import ModelError, listed
from tilewright.types import DType, ModelConfig, QuantisedTensor, TensorInfo
from tilewright.weights import EMBEDDING, HEAD, printable
from tilewright_gguf.header import GgufFile, StoredTensor
from tilewright_hf.mapped import drop_pages, mapped_tensor
from tilewright_hf.shards import Opened, ShardedSource

if TYPE_CHECKING:
    from torch import Tensor

ROPE_FACTORS = "rope_freqs.weight"

_STORED_AS: dict[GGMLQuantizationType, DType] = {
    GGMLQuantizationType.F32: "float32",
    GGMLQuantizationType.F16: "float16",
    GGMLQuantizationType.BF16: "bfloat16",
}

QUANTISED = (
    GGMLQuantizationType.Q4_0,
    GGMLQuantizationType.Q4_1,
    GGMLQuantizationType.Q5_0,
    GGMLQuantizationType.Q5_1,
    GGMLQuantizationType.Q8_0,
    GGMLQuantizationType.Q2_K,
    GGMLQuantizationType.Q3_K,
    GGMLQuantizationType.Q4_K,
    GGMLQuantizationType.Q5_K,
    GGMLQuantizationType.Q6_K,
    GGMLQuantizationType.IQ1_S,
    GGMLQuantizationType.IQ1_M,
    GGMLQuantizationType.IQ2_XXS,
    GGMLQuantizationType.IQ2_XS,
    GGMLQuantizationType.IQ2_S,
    GGMLQuantizationType.IQ3_XXS,
    GGMLQuantizationType.IQ3_S,
    GGMLQuantizationType.IQ4_NL,
    GGMLQuantizationType.IQ4_XS,
    GGMLQuantizationType.TQ1_0,
    GGMLQuantizationType.TQ2_0,
    GGMLQuantizationType.MXFP4,
)
"""What the gguf library dequantises. NVFP4 also needs scales that are tensors of their own."""

SUPPORTED = (*_STORED_AS, *QUANTISED)

_TOP = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_OF_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER = re.compile(r"blk\.(0|[1-9]\d{0,8})\.(\w+)\.(weight|bias)")

_SLAB = 2**18
"""Elements dequantised at a time. The library's temporaries take several times as much memory."""


def hf_name(name: str) -> str:
    """The Hugging Face name of a GGUF tensor, or its own name if there is none."""
    if found := _LAYER.fullmatch(name):
        layer, part, ending = found.groups()
        return f"model.layers.{layer}.{_OF_LAYER[part]}.{ending}" if part in _OF_LAYER else name
    part, _, ending = name.rpartition(".")
    return f"{_TOP[part]}.weight" if ending == "weight" and part in _TOP else name


@frozen(kw_only=True)
class _Shard:
    """One open file, without ``rope_freqs.weight``; tensors are keyed by Hugging Face name."""

    file: GgufFile
    stored: Mapping[str, StoredTensor]
    tensors: Mapping[str, TensorInfo]
    heads: Mapping[str, int]
    """Number of heads of each query or key projection with interleaved rows."""

    @property
    def path(self) -> Path:
        return self.file.path

    def read(self, name: str) -> "Tensor":
        values = read(self.file, self.stored[name])
        self._drop(name)
        return self._in_order(name, values)

    def read_rows(self, name: str, start: int, stop: int) -> "Tensor | None":
        if name in self.heads:
            return None
        rows = read(self.file, _rows(self.stored[name], start, stop))
        self._drop(name)
        return rows

    def read_quantised(self, name: str) -> QuantisedTensor | None:
        stored = read_quantised(self.file, self.stored[name])
        if stored is None:
            return None
        self._drop(name)
        return QuantisedTensor(
            values=self._in_order(name, stored.values),
            scales=self._in_order(name, stored.scales),
            offsets=self._in_order(name, stored.offsets),
            group=stored.group,
        )

    def _drop(self, name: str) -> None:
        stored = self.stored[name]
        drop_pages(self.file.memory, stored.start, stored.nbytes)

    def _in_order(self, name: str, rows: "Tensor") -> "Tensor":
        return _split_pairs(rows, self.heads[name]) if name in self.heads else rows


class GgufSource(ShardedSource):
    """A ``QuantisedSource`` of GGUF files."""

    def get_quantised(self, name: str) -> QuantisedTensor | None:
        found: QuantisedTensor | None = self._read(name, lambda s: s.read_quantised(name))
        return found


def gguf_source(files: Sequence[GgufFile], config: ModelConfig, interleaved: bool) -> GgufSource:
    """The weights in one or more files, without ``rope_freqs.weight``.

    F32, F16 and BF16 tensors are returned as stored and share the file's memory; quantised tensors
    are returned as float32.

    interleaved: whether query and key rows alternate between the two halves of a head.
    """
    home: dict[str, Path] = {}
    shards = []
    for file in files:
        stored: dict[str, StoredTensor] = {}
        for tensor in file.tensors.values():
            name = hf_name(tensor.name)
            if name == ROPE_FACTORS:
                continue
            if name == HEAD and config.tie_word_embeddings:
                name = EMBEDDING  # one matrix, stored as the head
            if name in home:
                raise ModelError(
                    f"{file.path}: tensor {printable(tensor.name)} is also in {home[name]}; "
                    "the files belong to different models"
                )
            home[name] = file.path
            stored[name] = tensor
        shards.append(
            _Shard(
                file=file,
                stored=stored,
                tensors={name: _info(file, tensor) for name, tensor in stored.items()},
                heads=_interleaved_heads(stored, config) if interleaved else {},
            )
        )
    return GgufSource(Opened(shards=shards))


def check_kinds(files: Sequence[GgufFile]) -> None:
    """Raise ModelError for tensors of unsupported types, and for those that would change the
    computation beside the weights: scales, and a bias of the head."""
    for file in files:
        odd = [t for t in file.tensors.values() if t.kind not in SUPPORTED]
        if odd:
            kinds = sorted({t.kind.name for t in odd})
            raise ModelError(
                f"{file.path}: {len(odd)} of {len(file.tensors)} tensors have a type that cannot "
                f"be dequantised: {listed(kinds)} (first {printable(odd[0].name)}); use another "
                "file of the model, such as Q8_0, Q6_K or Q4_K_M"
            )
        if "output.bias" in file.tensors:
            raise ModelError(
                f"{file.path}: has output.bias, a bias of the head, which is not supported: "
                "expected output.weight alone; use a file of another model"
            )
        scales = [name for name in file.tensors if name.endswith(".scale")]
        if scales:
            raise ModelError(
                f"{file.path}: {len(scales)} tensors are scales of quantised weights (first "
                f"{printable(scales[0])}), which are not supported; use another file of the model, "
                "such as Q8_0, Q6_K or Q4_K_M"
            )


def compute_dtype(files: Sequence[GgufFile]) -> DType:
    """The dtype that all matrices are stored in, or float32."""
    kinds = {t.kind for file in files for t in file.tensors.values() if len(t.shape) > 1}
    return _STORED_AS.get(kinds.pop(), "float32") if len(kinds) == 1 else "float32"


def read(file: GgufFile, stored: StoredTensor) -> "Tensor":
    """A tensor in the dtype that its info states, rows in the file's order."""
    import torch

    dtype: torch.dtype = getattr(torch, _STORED_AS.get(stored.kind, "float32"))
    if stored.kind in _STORED_AS:
        return mapped_tensor(file.memory, dtype, stored.shape, stored.start)
    from gguf.quants import dequantize

    columns = stored.shape[-1]
    raw = np.frombuffer(file.memory, np.uint8, stored.nbytes, stored.start)
    raw = raw.reshape(-1, stored.nbytes // (_size(stored) // columns))
    values = torch.empty(stored.shape, dtype=dtype)
    rows = values.view(-1, columns).numpy()
    step = max(1, _SLAB // columns)
    with np.errstate(all="ignore"):  # the executor reports scales that are not finite
        for first in range(0, len(rows), step):
            rows[first : first + step] = dequantize(raw[first : first + step], stored.kind)
    return values


def _rows(stored: StoredTensor, start: int, stop: int) -> StoredTensor:
    """Some rows of a tensor as a tensor of their own."""
    rows, *inner = stored.shape
    row_bytes = stored.nbytes // rows
    return evolve(
        stored,
        shape=(stop - start, *inner),
        start=stored.start + start * row_bytes,
        nbytes=(stop - start) * row_bytes,
    )


_GROUP = 32
"""Weights with a scale of their own in the types of 4 bits that are returned quantised."""


def read_quantised(file: GgufFile, stored: StoredTensor) -> QuantisedTensor | None:
    """A matrix of type Q4_0, Q4_1 or Q4_K as stored, rows in the file's order; None for others.

    The layouts of the blocks are those of ggml-common.h in llama.cpp.
    """
    import torch

    blocks_of = _OF_BLOCKS.get(stored.kind)
    if blocks_of is None or len(stored.shape) != 2:
        return None
    rows, columns = stored.shape
    block_size, block_bytes = GGML_QUANT_SIZES[stored.kind]
    raw = np.frombuffer(file.memory, np.uint8, stored.nbytes, stored.start)
    blocks = raw.reshape(rows, columns // block_size, block_bytes)
    values = torch.empty(rows, columns, dtype=torch.uint8)
    scales, offsets = (torch.empty(rows, columns // _GROUP) for _ in range(2))
    step = max(1, _SLAB // columns)
    for first in range(0, rows, step):
        part = slice(first, first + step)
        whole, scale, offset = blocks_of(blocks[part].reshape(-1, block_bytes))
        values[part] = torch.from_numpy(whole).view(-1, columns)
        scales[part] = torch.from_numpy(scale).view(-1, columns // _GROUP)
        offsets[part] = torch.from_numpy(offset).view(-1, columns // _GROUP)
    return QuantisedTensor(values=values, scales=scales, offsets=offsets, group=_GROUP)


Bytes: TypeAlias = "np.ndarray[Any, np.dtype[np.uint8]]"
Floats: TypeAlias = "np.ndarray[Any, np.dtype[np.float32]]"


def _q4_0(blocks: Bytes) -> tuple[Bytes, Floats, Floats]:
    """Values, scales and offsets of blocks of 32: a scale, and 16 bytes of two values each."""
    scale = _halves(blocks[:, :2])
    return _nibbles(blocks[:, 2:]), scale, -8 * scale


def _q4_1(blocks: Bytes) -> tuple[Bytes, Floats, Floats]:
    """As ``_q4_0``, with the least value after the scale."""
    return _nibbles(blocks[:, 4:]), _halves(blocks[:, :2]), _halves(blocks[:, 2:4])


def _q4_k(blocks: Bytes) -> tuple[Bytes, Floats, Floats]:
    """Blocks of 256: two scales, 12 bytes with the 6-bit scales and minima of eight groups, and
    four times 32 bytes of two groups each."""
    packed = blocks[:, 4:16]
    low, high = packed[:, :8], packed[:, 8:]
    first, second = low[:, :4], low[:, 4:]
    scales = np.concatenate((first & 63, (high & 15) | (first >> 6 << 4)), 1)
    minima = np.concatenate((second & 63, (high >> 4) | (second >> 6 << 4)), 1)
    values = _nibbles(blocks[:, 16:].reshape(-1, 32))
    return values, scales * _halves(blocks[:, :2]), -(minima * _halves(blocks[:, 2:4]))


_OF_BLOCKS: Mapping[GGMLQuantizationType, Callable[[Bytes], tuple[Bytes, Floats, Floats]]] = {
    GGMLQuantizationType.Q4_0: _q4_0,
    GGMLQuantizationType.Q4_1: _q4_1,
    GGMLQuantizationType.Q4_K: _q4_k,
}


def _halves(pairs: Bytes) -> Floats:
    """[n, 2] bytes as [n, 1] float32."""
    return np.ascontiguousarray(pairs).view("<f2").astype(np.float32)


def _nibbles(packed: Bytes) -> Bytes:
    """The low halves of each row's bytes, and then the high ones."""
    return np.concatenate((packed & 15, packed >> 4), 1)


def _info(file: GgufFile, stored: StoredTensor) -> TensorInfo:
    """Info on the result of ``get``, which is larger than in the file if that is quantised."""
    dtype = _STORED_AS.get(stored.kind, "float32")
    return TensorInfo(
        shape=stored.shape,
        dtype=dtype,
        nbytes=_size(stored) * (4 if dtype == "float32" else 2),
        location=str(file.path),
    )


def _size(stored: StoredTensor) -> int:
    return math.prod(stored.shape)


def _interleaved_heads(stored: Mapping[str, StoredTensor], config: ModelConfig) -> dict[str, int]:
    return {
        name: heads
        for part, heads in (("q_proj", config.num_heads), ("k_proj", config.num_kv_heads))
        for name, tensor in stored.items()
        # The check of all shapes reports any other number of rows.
        if f".self_attn.{part}." in name and tensor.shape[0] == heads * config.head_dim
    }


def _split_pairs(values: "Tensor", heads: int) -> "Tensor":
    """Reorder rows [heads * head_dim, ...] from adjacent pairs to the Hugging Face order.

    GGUF's llama stores the two rows that RoPE rotates together side by side; Hugging Face stores
    the first rows of all pairs of a head, and then the second ones.
    """
    pairs = values.view(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
    return pairs.transpose(1, 2).reshape(values.shape)
