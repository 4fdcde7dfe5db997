"""The kernels and parameters that the executor binds, by name, and the check of a kernel set.

A set has kernels for single layers, ``prefill_layer``, ``decode_layer`` and ``head``; or programs
for the whole model, ``prefill_model`` and ``decode_model``; or both. Kernels for decode may be left
out: those for prefill then run all steps. A kernel takes those of the parameters that it names.
"""

import re
from collections.abc import Collection, Mapping
from math import prod

from tilewright.errors import ExecutorError, listed, nearest
from tilewright.types import KernelSet, ModelConfig, RowOrder
from tilewright.weights import expected_tensors
from tilewright_kernels import source
from tilewright_kernels.contract import DTYPES, Contract, Parameter
from tilewright_pypto.weight_names import WHOLE, packed_name

ROW_ORDER: RowOrder = "HND"
"""Row order of the KV cache."""

KERNELS = {
    "prefill_layer": "a decoder layer, in any step that decode_layer does not run",
    "decode_layer": "a decoder layer, in steps of one token for each sequence",
    "head": "the final norm and the LM head, after the layers",
    "prefill_model": "the whole model, in any step that decode_model does not run",
    "decode_model": "the whole model, in steps of one token for each sequence",
}
"""The kernels, by name, and what each of them runs."""

STEP = {
    "hidden": "[T, hidden_size] BF16: the tokens' embeddings, or the output of the layer before; "
    "for head, the rows whose logits are wanted",
    "token_ids": "[T] INT32: the tokens, in order of their sequences",
    "positions": "[T] INT32: position of each token in its sequence",
    "context_lens": "[B] INT32: tokens of each sequence in the KV cache once the step has run",
    "query_starts": "[B] INT32: row of the first token of each sequence",
    "query_lens": "[B] INT32: tokens of each sequence in this step",
    "block_table": "[B * max_pages] INT32: pages of each sequence, padded with -1",
    "slot_mapping": "[T] INT32: where each token's key and value go; page * page_size + offset",
    "logits_rows": "[L] INT32: the rows of the T tokens whose logits are wanted",
    "rope_cos": "[max_seq_len, head_dim] FP32: cosines, each half repeated",
    "rope_sin": "[max_seq_len, head_dim] FP32: sines, each half repeated",
    "layer": "[1] INT32: number of the layer; a kernel that takes it gets the weights and caches "
    "of all layers",
    "window": "[1] INT32: the layer's sliding window in tokens, itself included; 0: none",
    "k_cache": "[pages * kv_heads * page_size, head_dim] BF16, inout: keys; a token's key of one "
    "head is row (page * kv_heads + head) * page_size + offset",
    "v_cache": "[pages * kv_heads * page_size, head_dim] BF16, inout: values, in the same rows",
    "out": "[T, hidden_size] BF16, out: the layer's output",
    "logits": "[L, vocab_size] FP32, out: of the rows that are wanted",
}
"""What is not a weight, by name."""

WEIGHTS = {
    "embedding": "[vocab_size, hidden_size] BF16",
    "input_norm": "[1, hidden_size] FP32",
    "wq": "[hidden_size, heads * head_dim] BF16",
    "bq": "[1, heads * head_dim] FP32",
    "wk": "[hidden_size, kv_heads * head_dim] BF16",
    "bk": "[1, kv_heads * head_dim] FP32",
    "wv": "[hidden_size, kv_heads * head_dim] BF16",
    "bv": "[1, kv_heads * head_dim] FP32",
    "q_norm": "[1, head_dim] FP32",
    "k_norm": "[1, head_dim] FP32",
    "wo": "[heads * head_dim, hidden_size] BF16",
    "bo": "[1, hidden_size] FP32",
    "post_norm": "[1, hidden_size] FP32",
    "w_gate": "[hidden_size, intermediate_size] BF16",
    "b_gate": "[1, intermediate_size] FP32",
    "w_up": "[hidden_size, intermediate_size] BF16",
    "b_up": "[1, intermediate_size] FP32",
    "w_down": "[intermediate_size, hidden_size] BF16",
    "b_down": "[1, hidden_size] FP32",
    "final_norm": "[1, hidden_size] FP32",
    "lm_head": "[vocab_size, hidden_size] BF16: the embedding, if the model ties them",
}
"""Weights, by name; matrices are the checkpoint's, transposed, except embedding and lm_head."""

PARAMETERS = STEP | WEIGHTS
"""The texts begin with shape and dtype, which a kernel's signature must match."""

RESULTS = {
    "prefill_layer": {"out": "out", "k_cache": "inout", "v_cache": "inout"},
    "decode_layer": {"out": "out", "k_cache": "inout", "v_cache": "inout"},
    "head": {"logits": "out"},
    "prefill_model": {"logits": "out", "k_cache": "inout", "v_cache": "inout"},
    "decode_model": {"logits": "out", "k_cache": "inout", "v_cache": "inout"},
}
"""The parameters that a kernel writes, and their directions."""

_HEAD = ("embedding", "final_norm", "lm_head")


def passed(kernel: str) -> list[str]:
    """The parameters that the executor passes to a kernel, of a model that has all weights."""
    if kernel == "head":
        return ["hidden", "logits", *_HEAD]
    absent = {
        "layer": ("logits_rows", "logits", *_HEAD),
        "model": ("layer", "window", "out"),
    }[kernel.rpartition("_")[2]]
    return [name for name in PARAMETERS if name not in absent]


def contracts(kernels: KernelSet, config: ModelConfig, who: str) -> dict[str, Contract]:
    """The contracts of a set's kernels, by name.

    who: the set in words. Raises ExecutorError for a set that lacks a kernel, and for a kernel that
    the executor cannot bind, or that would leave out a weight of the model.
    """
    for name in kernels.constants:
        if name not in KERNELS:
            raise ExecutorError(
                f"{who} has a kernel {name!r}, which executor pypto-npu does not run"
                f"{nearest(name, KERNELS)} (kernels: {', '.join(KERNELS)})"
            )
        if name not in kernels.sources:
            raise ExecutorError(
                f"{who} has constants but no source for kernel {name}: add its file"
            )
    layers = {"prefill_layer", "head"} <= set(kernels.constants)
    if not layers and "prefill_model" not in kernels.constants:
        raise ExecutorError(
            f"{who} has kernels {', '.join(kernels.constants) or 'none'}: expected prefill_layer "
            "and head, or prefill_model"
        )
    found = {}
    for name in kernels.constants:
        try:
            found[name] = source.contract(name, kernels)
        except ExecutorError as error:
            raise ExecutorError(f"{who}: {error}") from error
        _check(found[name], config, who)
    stacked = {n: takes_all_layers(c) for n, c in found.items() if n != "head"}
    if len(set(stacked.values())) > 1:
        single = [name for name, all_layers in stacked.items() if not all_layers]
        raise ExecutorError(
            f"{who}: {listed(single)} takes the weights of one layer, and other kernels those of "
            "all layers: give each layer kernel a parameter layer, or none of them"
        )
    for contract in found.values():
        _check_signature(contract, config, who)
    return found


def takes_all_layers(contract: Contract) -> bool:
    """Whether a kernel takes the weights and caches of all layers, one layer after another."""
    named = {p.name for p in contract.parameters}
    return contract.kernel.endswith("_model") or "layer" in named


def _check(contract: Contract, config: ModelConfig, who: str) -> None:
    kernel, directions = contract.kernel, {p.name: p.direction for p in contract.parameters}
    for name in directions:
        if name not in PARAMETERS:
            raise ExecutorError(
                f"{who}: kernel {kernel} has a parameter {name!r}, which executor pypto-npu does "
                f"not bind{nearest(name, PARAMETERS)} (see docs/kernel-parameters.md)"
            )
        if name not in passed(kernel):
            raise ExecutorError(
                f"{who}: kernel {kernel} has a parameter {name!r}, which executor pypto-npu does "
                f"not pass to it (it passes {', '.join(passed(kernel))})"
            )
    results = RESULTS[kernel]
    for name in results | directions:
        expected = results.get(name, "in")
        found = directions.get(name, "nothing")
        if found != expected:
            raise ExecutorError(
                f"{who}: kernel {kernel} must have {name} as {expected}, found {found}"
            )
    if left_out := [w for w in _weights_of(kernel, config) if w not in directions]:
        raise ExecutorError(
            f"{who}: kernel {kernel} does not take {listed(left_out)}, which {config.architecture} "
            "has: its outputs would be wrong"
        )
    if foreign := [w for w in directions if w in WEIGHTS and w not in _weights(config)]:
        raise ExecutorError(
            f"{who}: kernel {kernel} takes {listed(foreign)}, which {config.architecture} does not "
            "have: state in served_models() which models the set serves, or give these a kernel "
            "of their own"
        )
    if "k_cache" in results and contract.kv_row_order != ROW_ORDER:
        raise ExecutorError(
            f"{who}: kernel {kernel} declares KV_ROW_ORDER = {contract.kv_row_order!r}, but "
            f"executor pypto-npu lays out the cache as {ROW_ORDER!r}: change the kernel to that "
            "row order"
        )


def _check_signature(contract: Contract, config: ModelConfig, who: str) -> None:
    """Hold dtypes, and the extents that are known without a step, to what the executor passes.

    An extent that differs between steps must have one symbol wherever it occurs.
    """
    known: dict[str, tuple[int | str, str]] = {}
    for parameter in contract.parameters:
        given = _passed_as(parameter.name, contract, config)
        problem = (
            f"{who}: kernel {contract.kernel} wants {parameter.name} as {parameter}, but executor "
            f"pypto-npu passes {given}"
        )
        if parameter.dtype != given.dtype or len(parameter.shape) != len(given.shape):
            raise ExecutorError(f"{problem}: change the signature")
        for extent, found in zip(parameter.shape, given.shape, strict=True):
            if isinstance(extent, str):
                meaning, where = known.setdefault(extent, (found, parameter.name))
                if meaning != found:
                    raise ExecutorError(
                        f"{problem}; {extent} stands for {meaning} in {where}: use another symbol"
                    )
            elif isinstance(found, int) and extent != found:
                raise ExecutorError(f"{problem}: change the signature, or the set's constants")


def _passed_as(name: str, contract: Contract, config: ModelConfig) -> Parameter:
    """A parameter as the executor passes it; extents that only a step knows are texts."""
    sizes: dict[str, int] = {
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        **{
            field: getattr(config, field)
            for field in ("hidden_size", "intermediate_size", "head_dim", "vocab_size")
        },
    }
    declared = re.match(r"\[(.*?)\] (\w+)", PARAMETERS[name])
    assert declared is not None
    tokens = {"head": "L", "decode_layer": "B", "decode_model": "B"}.get(contract.kernel, "T")
    shape: list[int | str] = []
    for extent in declared[1].split(", "):
        factors = extent.split(" * ")
        if all(factor.isdigit() or factor in sizes for factor in factors):
            shape.append(prod(sizes.get(factor) or int(factor) for factor in factors))
        else:
            shape.append(tokens if extent == "T" else extent)
    if name in WEIGHTS and name not in _HEAD and takes_all_layers(contract):
        assert isinstance(shape[0], int)
        shape[0] *= config.num_layers
    return Parameter(name, DTYPES[declared[2]], tuple(shape), "in")


def _weights_of(kernel: str, config: ModelConfig) -> Collection[str]:
    """The weights that a kernel must take; the embedding may be looked up on the host."""
    of_layers: dict[str, None] = {}
    of_head = {"final_norm": None, "lm_head": None}
    for name in expected_tensors(config):
        if name not in WHOLE:
            of_layers[packed_name(name).rpartition(".")[2]] = None
    needed: Mapping[str, Collection[str]] = {
        "head": of_head,
        "prefill_model": of_layers | of_head,
        "decode_model": of_layers | of_head,
    }
    return needed.get(kernel, of_layers)


def _weights(config: ModelConfig) -> Collection[str]:
    """All weights of a model, by their parameters."""
    return {*_HEAD, *_weights_of("prefill_model", config)}
