"""A GGUF file with the weights of a model that the engine can load, for llama.cpp's side.

Matrices are stored as llama.cpp's own ``llama-quantize`` stores them. Tokens have made-up texts, so
prompts are token ids.
"""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
from gguf.quants import quantize

from tilewright import LLMEngine
from tilewright.types import ModelConfig
from tilewright.weights import EMBEDDING, HEAD
from tilewright_testing.samples import add_sizes

Kind = gguf.GGMLQuantizationType
KINDS = {"float32": "F32", "bfloat16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}
"""What llama.cpp has for each weight dtype."""

ARCHITECTURES = {
    "LlamaForCausalLM": gguf.MODEL_ARCH.LLAMA,
    "Qwen2ForCausalLM": gguf.MODEL_ARCH.QWEN2,
    "Qwen3ForCausalLM": gguf.MODEL_ARCH.QWEN3,
}
Q6_K_BLOCK = 256
BLOCKS_AT_ONCE = 1 << 14


def write_gguf(model: Path, path: Path, kind: str) -> int:
    """Write a model's weights as ``kind``; returns the bytes of them that a decode step reads.

    Vectors stay float32. In a Q4_0 or Q4_1 file the matrix of the logits is Q6_K, or Q8_0 where its
    rows are not whole blocks of 256, as llama-quantize has it. Raises ValueError for an
    architecture or a RoPE scaling that is not written here.
    """
    with LLMEngine.from_plugins() as engine:
        loaded = engine.load(model)
    config = loaded.config
    if config.architecture not in ARCHITECTURES or config.rope.kind != "default":
        raise ValueError(
            f"{model}: {config.architecture} with {config.rope.kind} RoPE cannot be written as "
            f"GGUF; expected default RoPE and one of {', '.join(ARCHITECTURES)}: leave llama.cpp "
            "out with --without llama.cpp"
        )
    arch = ARCHITECTURES[config.architecture]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    write_header(writer, config)
    names = gguf.get_tensor_name_map(arch, config.num_layers)
    logits = EMBEDDING if config.tie_word_embeddings else HEAD
    size = 0
    for name in loaded.weights.names():
        values = loaded.weights.get(name).to(torch.float32).numpy()
        if arch == gguf.MODEL_ARCH.LLAMA and (".q_proj." in name or ".k_proj." in name):
            of_q = ".q_proj." in name
            values = interleaved(values, config.num_heads if of_q else config.num_kv_heads)
        stored, stored_kind = in_kind(values, Kind[kind], of_logits=name == logits)
        if config.tie_word_embeddings or name != EMBEDDING:  # otherwise a step reads a row of it
            size += stored.nbytes
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), stored, raw_dtype=stored_kind)
    loaded.weights.close()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return size


def write_header(writer: Any, config: ModelConfig) -> None:
    add_sizes(writer, config)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(["a", "b", "ab", *(f"t{i}" for i in range(3, config.vocab_size))])
    writer.add_token_types([gguf.TokenType.NORMAL] * config.vocab_size)
    writer.add_token_merges(["a b"])  # the gguf library cannot write an empty list


def in_kind(
    values: npt.NDArray[np.float32], kind: Any, of_logits: bool
) -> tuple[npt.NDArray[Any], Any]:
    if values.ndim == 1:
        return values, Kind.F32
    if kind in (Kind.Q4_0, Kind.Q4_1) and of_logits:
        kind = Kind.Q8_0 if values.shape[1] % Q6_K_BLOCK else Kind.Q6_K
    return (q6_k(values) if kind == Kind.Q6_K else quantize(values, kind)), kind


def interleaved(values: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Rows reordered as GGUF's llama has them: the two of each RoPE pair are adjacent."""
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))


def q6_k(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """float32 [rows, columns] as Q6_K, uint8 [rows, columns / 256 * 210]; rounded to nearest.

    The layout is that of ggml's block_q6_K; the gguf library reads it and does not write it.
    """
    blocks = values.reshape(-1, Q6_K_BLOCK)
    stored = [
        q6_k_blocks(blocks[at : at + BLOCKS_AT_ONCE])
        for at in range(0, len(blocks), BLOCKS_AT_ONCE)
    ]
    return np.concatenate(stored).reshape(values.shape[0], -1)


def q6_k_blocks(blocks: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """float32 [n, 256] to uint8 [n, 210]: low bits 128, high bits 64, scales 16, their scale 2."""
    parts = blocks.reshape(-1, 16, 16)
    steps = np.abs(parts).max(axis=2) / 31  # float32 [n, 16]
    step = (steps.max(axis=1, keepdims=True) / 127).astype(np.float16)
    scales = np.rint(_ratio(steps, step.astype(np.float32))).clip(0, 127).astype(np.int8)
    unit = step.astype(np.float32) * scales
    rounded = np.rint(_ratio(parts, unit[..., None])).clip(-32, 31) + 32
    # Two halves of 128 values, each of four quarters of 32.
    codes = rounded.astype(np.uint8).reshape(-1, 2, 4, 32)
    low, high = codes & 15, codes >> 4
    low = low[:, :, :2] | low[:, :, 2:] << 4
    high = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
    columns = (low, high, scales.view(np.uint8), step.view(np.uint8))
    return np.concatenate([c.reshape(len(blocks), -1) for c in columns], axis=1)


def _ratio(values: npt.NDArray[np.float32], by: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """values / by; 0 where ``by`` is 0."""
    return np.divide(values, by, out=np.zeros_like(values), where=by != 0)
