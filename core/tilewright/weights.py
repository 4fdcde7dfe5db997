"""Which tensors a model needs, and whether a source has them."""

from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from tilewright.errors import ModelError, listed
from tilewright.types import (
    DTYPES,
    ModelConfig,
    PackedTensor,
    Packing,
    TensorInfo,
    TensorSource,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor


SAFETENSORS_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
}
"""Names in ``TensorInfo`` of the dtypes in the headers of safetensors files."""


def torch_dtype(name: str) -> "torch.dtype":
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype


def expected_tensors(
    config: ModelConfig, layers: range | None = None
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all weights of a model, in the order in which they are used.

    layers: only the weights of these layers, with the embedding if layer 0 is among them, and the
    final norm and the head if the last one is. The names are those of Hugging Face checkpoints.
    Projections are stored [out, in].
    """
    layers = range(config.num_layers) if layers is None else layers
    first, last = 0 in layers, config.num_layers - 1 in layers
    hidden, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    q_rows, kv_rows = config.num_heads * head, config.num_kv_heads * head
    expected: dict[str, tuple[int, ...]] = {}
    if first or (last and config.tie_word_embeddings):
        expected["model.embed_tokens.weight"] = (config.vocab_size, hidden)
    for i in layers:
        layer = f"model.layers.{i}"
        attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
        expected[f"{layer}.input_layernorm.weight"] = (hidden,)
        for name, rows in (("q", q_rows), ("k", kv_rows), ("v", kv_rows)):
            expected[f"{attention}.{name}_proj.weight"] = (rows, hidden)
            if config.qkv_bias:
                expected[f"{attention}.{name}_proj.bias"] = (rows,)
        if config.qk_norm:
            expected[f"{attention}.q_norm.weight"] = (head,)
            expected[f"{attention}.k_norm.weight"] = (head,)
        expected[f"{attention}.o_proj.weight"] = (hidden, q_rows)
        if config.output_bias:
            expected[f"{attention}.o_proj.bias"] = (hidden,)
        expected[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
        for name, rows, columns in (
            ("gate", inner, hidden),
            ("up", inner, hidden),
            ("down", hidden, inner),
        ):
            expected[f"{mlp}.{name}_proj.weight"] = (rows, columns)
            if config.mlp_bias:
                expected[f"{mlp}.{name}_proj.bias"] = (rows,)
    if last:
        expected["model.norm.weight"] = (hidden,)
    if last and not config.tie_word_embeddings:
        expected["lm_head.weight"] = (config.vocab_size, hidden)
    return expected


def check_tensors(source: TensorSource, config: ModelConfig, where: str) -> None:
    """Raise ModelError unless a source has exactly the expected tensors. Reads headers only."""
    expected = expected_tensors(config)
    names = set(source.names())
    missing = [n for n in expected if n not in names]
    unexpected = sorted(names - expected.keys())
    wrong = []
    for name, shape in expected.items():
        if name not in names:
            continue
        info = source.info(name)
        if info.shape != shape:
            wrong.append(f"{name} {list(shape)}, found {list(info.shape)} in {info.location}")
        elif info.dtype not in DTYPES:
            wrong.append(f"{name} in a floating dtype, found {info.dtype} in {info.location}")
    problems = [
        f"{title}: {listed(tensors)}"
        for title, tensors in (
            ("missing", [f"{n} {list(expected[n])}" for n in missing]),
            ("wrong, expected", wrong),
            (
                "unexpected",
                [f"{printable(n)} {list(source.info(n).shape)}" for n in unexpected],
            ),
        )
        if tensors
    ]
    if missing == ["lm_head.weight"]:
        problems.append("without it, the configuration needs tie_word_embeddings = true")
    if problems:
        raise ModelError(
            f"{where}: the weights do not fit the configuration ({config.architecture}): "
            f"{'; '.join(problems)}"
        )


def typed_tensors(config: ModelConfig, weights: TensorSource, dtype: str) -> Iterator[PackedTensor]:
    """A checkpoint's weights in the weight dtype, under their own names and in their shapes."""
    for name, shape in expected_tensors(config).items():
        read = partial(_typed, weights, name, dtype)
        yield PackedTensor(name=name, shape=shape, dtype=dtype, read=read)


def _typed(source: TensorSource, name: str, dtype: str) -> "Tensor":
    return source.get(name).to(torch_dtype(dtype))


def check_packing(found: Packing, expected: Packing, where: str) -> None:
    """Raise ModelError unless weights were packed for this executor, dtype and layout version."""
    again = f"convert the model for {expected.executor} (`tilewright convert`) from its source"
    if found.executor != expected.executor:
        raise ModelError(
            f"{where}: packed for executor {found.executor}, which {expected.executor} cannot "
            f"read: choose executor {found.executor}, or {again}"
        )
    if found.weight_dtype != expected.weight_dtype:
        raise ModelError(
            f"{where}: packed in {found.weight_dtype}, found the setting weight_dtype = "
            f"{expected.weight_dtype}: remove it, or {again} in that dtype"
        )
    if found.version != expected.version:
        upgrade = "upgrade that plugin, or " if found.version > expected.version else ""
        raise ModelError(
            f"{where}: packed in version {found.version} of the layout of {found.executor}, which "
            f"reads version {expected.version}: {upgrade}{again}"
        )


def check_packed(source: TensorSource, expected: Iterable[PackedTensor], where: str) -> None:
    """Raise ModelError unless a source has exactly these tensors. Reads headers only."""
    wanted = {t.name: (t.shape, t.dtype) for t in expected}
    names = set(source.names())
    found = {name: (i.shape, i.dtype) for name in names for i in (source.info(name),)}
    problems = [
        f"{name} {list(shape)} {dtype}, found "
        + (f"{list(found[name][0])} {found[name][1]}" if name in found else "none")
        for name, (shape, dtype) in wanted.items()
        if found.get(name) != (shape, dtype)
    ]
    problems += [f"no {printable(name)}" for name in sorted(names - wanted.keys())]
    if problems:
        raise ModelError(
            f"{where}: the packed weights do not match the executor's layout: expected "
            f"{listed(problems)}; convert the model again from its source"
        )


def printable(name: str) -> str:
    """A name from a file, fit for a one-line message."""
    if len(name) > 120:
        name = f"{name[:117]}..."
    return name if name.isprintable() else ascii(name)


class MeteredSource:
    """A tensor source that notifies a listener of each tensor that is read."""

    def __init__(self, source: TensorSource, on_read: Callable[[str, int, int], None]):
        """on_read is called with a tensor's name, the bytes read so far, and all bytes."""
        self._source = source
        self._on_read = on_read
        self._read = 0
        self._total = sum(source.info(name).nbytes for name in source.names())

    def names(self) -> Collection[str]:
        return self._source.names()

    def info(self, name: str) -> TensorInfo:
        return self._source.info(name)

    def get(self, name: str) -> "Tensor":
        tensor = self._source.get(name)
        self._read += self._source.info(name).nbytes
        self._on_read(name, self._read, self._total)
        return tensor

    def close(self) -> None:
        self._source.close()
