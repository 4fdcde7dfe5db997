"""Which tensors a model needs, and whether a source has them."""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING

from attrs import evolve

from tilewright.errors import ModelError, listed
from tilewright.types import (
    DTYPES,
    LoadedModel,
    ModelConfig,
    PackedTensor,
    Packing,
    QuantisedTensor,
    TensorInfo,
    TensorSource,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

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
        expected[EMBEDDING] = (config.vocab_size, hidden)
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
        expected[HEAD] = (config.vocab_size, hidden)
    return expected


_FLOATS = (*DTYPES, "float64")
"""Dtypes of weights; each is converted to the weight dtype when it is read."""

_SCHEMES = {
    r"lora_\w+(\..+)?|base_layer\..+|modules_to_save\..+": "a LoRA adapter that is not merged",
    r"qweight|qzeros|g_idx": "GPTQ or AWQ",
    r"weight_scale_inv|weight_scale": "FP8, INT8 or FP4",
    r"weight_(packed|shape|zero_point|g_idx|global_scale|scale_2)": "compressed-tensors",
    r"SCB|weight_format|weight\.(absmax|quant_map|quant_state\..+|nested_\w+)": "bitsandbytes",
    r"scales|biases|zeros": "MLX",
}
"""What stores a projection in several tensors, by the end of the names of those beside it."""


def scheme(name: str, info: TensorInfo | None = None) -> str | None:
    """How a projection that this tensor is a part of was changed from plain weights: the name of a
    quantisation, or of an adapter; None for plain weights, as far as name and dtype tell.
    """
    part = re.search(r"\.\w+_(?:proj|head|tokens)\.(.+)", f".{name}")
    for pattern, what in _SCHEMES.items():
        if part and re.fullmatch(pattern, part[1]):
            return what
    if info and info.dtype.startswith("float8"):
        return f"FP8, {info.dtype}"
    return None


def needed_tensors(loaded: LoadedModel) -> LoadedModel:
    """The model without the tensors that its configuration does not need, and a warning of them.

    Parts of quantised weights and of adapters stay, for ``check_tensors`` to refuse.
    """
    if loaded.packing is not None:  # only the executor knows its tensors
        return loaded
    expected = expected_tensors(loaded.config)
    return without(
        loaded, [n for n in loaded.weights.names() if n not in expected and scheme(n) is None]
    )


def without(loaded: LoadedModel, extra: Collection[str]) -> LoadedModel:
    """The model without some of its tensors, and a warning of them."""
    if not extra:
        return loaded
    some = listed([printable(name) for name in sorted(extra)], 3)
    bias = "; transformers ignores lm_head.bias too" if "lm_head.bias" in extra else ""
    warning = (
        f"{loaded.source}: tensors that the configuration does not need are ignored "
        f"({len(extra)} in all): {some}{bias}"
    )
    kept = {name: name for name in set(loaded.weights.names()).difference(extra)}
    return evolve(
        loaded,
        weights=NamedSource(loaded.weights, kept),
        warnings=(*loaded.warnings, warning),
    )


def check_tensors(source: TensorSource, config: ModelConfig, where: str) -> None:
    """Raise ModelError unless a source has the expected tensors as plain numbers.

    Other tensors are ignored. Reads headers only.
    """
    expected = expected_tensors(config)
    names = set(source.names())
    missing = [n for n in expected if n not in names]
    found = {name: source.info(name) for name in expected if name in names}
    _check_plain(source, found, where)
    wrong = []
    for name, info in found.items():
        if info.shape != expected[name]:
            shapes = f"{list(expected[name])}, found {list(info.shape)}"
            wrong.append(f"{name} {shapes} in {info.location}")
        elif info.dtype not in _FLOATS:
            wrong.append(f"{name} in a floating dtype, found {info.dtype} in {info.location}")
    problems = [
        f"{title}: {listed(tensors, 4)}"
        for title, tensors in (
            ("missing", [f"{n} {list(expected[n])}" for n in missing]),
            ("wrong, expected", wrong),
        )
        if tensors
    ]
    if missing == [HEAD]:
        problems.append("without it, the configuration needs tie_word_embeddings = true")
    if problems:
        raise ModelError(
            f"{where}: the weights do not fit the configuration ({config.architecture}): "
            f"{'; '.join(problems)}"
        )


def _check_plain(source: TensorSource, found: Mapping[str, TensorInfo], where: str) -> None:
    """Raise ModelError for parts of quantised weights, and for an adapter's."""
    changed = [(n, s) for n in sorted(source.names()) if (s := scheme(n, found.get(n)))]
    if not changed:
        return
    name, how = changed[0]
    first = f"{len(changed)} tensors such as {printable(name)}"
    if "LoRA" in how:
        raise ModelError(
            f"{where}: the weights hold {how} ({first}): merge it into the model (merge_and_unload "
            "of peft) and save that"
        )
    raise ModelError(
        f"{where}: the weights are quantised ({how}; {first}), which cannot be read: take the "
        "model's checkpoint in bfloat16 or float16, or a GGUF file of it"
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


def check_packed(source: TensorSource, expected: Iterable[PackedTensor], where: str) -> list[str]:
    """Raise ModelError unless a source has these tensors. Reads headers only.

    Returns the names of others.
    """
    wanted = {t.name: (t.shape, t.dtype) for t in expected}
    names = set(source.names())
    found = {
        name: (i.shape, i.dtype) for name in names & wanted.keys() for i in (source.info(name),)
    }
    problems = [
        f"{name} {list(shape)} {dtype}, found "
        + (f"{list(found[name][0])} {found[name][1]}" if name in found else "none")
        for name, (shape, dtype) in wanted.items()
        if found.get(name) != (shape, dtype)
    ]
    if problems:
        raise ModelError(
            f"{where}: the packed weights do not match the executor's layout: expected "
            f"{listed(problems)}; convert the model again from its source"
        )
    return sorted(names - wanted.keys())


def printable(name: str) -> str:
    """A name from a file, fit for a one-line message."""
    if len(name) > 120:
        name = f"{name[:117]}..."
    return name if name.isprintable() else ascii(name)


def get_quantised(source: TensorSource, name: str) -> QuantisedTensor | None:
    """A matrix as its file stores it in 4 bits, from a ``QuantisedSource``; None from others.

    Raises what ``TensorSource.get`` raises.
    """
    get = getattr(source, "get_quantised", None)
    found: QuantisedTensor | None = get(name) if get else None
    return found


def get_rows(source: TensorSource, name: str, start: int, stop: int) -> "Tensor | None":
    """Rows ``start`` up to ``stop`` of a matrix, from a ``RowSource``; None from others.

    Raises what ``TensorSource.get`` raises.
    """
    get = getattr(source, "get_rows", None)
    rows: Tensor | None = get(name, start, stop) if get else None
    return rows


class StoredRows:
    """A matrix of a source. Rows are read each time they are sliced, or all rows the first time
    where the source cannot read a part."""

    def __init__(self, source: TensorSource, name: str):
        self.shape = source.info(name).shape
        self._source = source
        self._name = name
        self._whole: Tensor | None = None

    def __getitem__(self, rows: slice) -> "Tensor":
        """Raises what ``TensorSource.get`` raises."""
        if self._whole is None:
            start, stop, _ = rows.indices(self.shape[0])
            part = get_rows(self._source, self._name, start, stop)
            if part is not None:
                return part
            self._whole = self._source.get(self._name)
        return self._whole[rows]


class NamedSource:
    """A tensor source with other names, or with fewer of them."""

    def __init__(self, source: TensorSource, stored: Mapping[str, str]):
        """stored: maps this source's names to those of the other one."""
        self._source = source
        self._stored = stored

    def names(self) -> Collection[str]:
        return self._stored.keys()

    def info(self, name: str) -> TensorInfo:
        return self._source.info(self._stored[name])

    def get(self, name: str) -> "Tensor":
        return self._source.get(self._stored[name])

    def get_quantised(self, name: str) -> QuantisedTensor | None:
        return get_quantised(self._source, self._stored[name])

    def get_rows(self, name: str, start: int, stop: int) -> "Tensor | None":
        return get_rows(self._source, self._stored[name], start, stop)

    def close(self) -> None:
        self._source.close()


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
        self._count(name, self._source.info(name).nbytes)
        return tensor

    def get_rows(self, name: str, start: int, stop: int) -> "Tensor | None":
        part = get_rows(self._source, name, start, stop)
        if part is not None:
            info = self._source.info(name)
            row_bytes = info.nbytes // info.shape[0]
            self._count(name, row_bytes * (stop - start))
        return part

    def get_quantised(self, name: str) -> QuantisedTensor | None:
        found = get_quantised(self._source, name)
        if found:
            self._count(name, self._source.info(name).nbytes)
        return found

    def _count(self, name: str, nbytes: int) -> None:
        self._read += nbytes
        self._on_read(name, self._read, self._total)

    def close(self) -> None:
        self._source.close()
