"""Small models in the files of the shipped loaders, which import nothing of this package."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from attrs import evolve

from tilewright.types import (
    GenerateConfig,
    LoadedModel,
    ModelConfig,
    Packing,
    TextAssets,
)
from tilewright.weights import typed_tensors
from tilewright_testing.models import Model, make_model, write_hf_directory


class Written(NamedTuple):
    """A source, as a user would name it to a loader, and the model that its files were made of."""

    source: Path
    model: Model


def write_hf(directory: Path) -> Written:
    """A directory as Hugging Face writes them, for loader hf-local."""
    model = make_model()
    return Written(write_hf_directory(model, directory), model)


def write_packed(directory: Path) -> Written:
    """A model that is packed for executor torch."""
    from tilewright_packed.writer import convert, plan

    model = make_model()
    loaded = LoadedModel(
        config=model.config,
        weights=model.source(),
        text=model.text,
        generation_defaults=GenerateConfig(),
        source="sample",
    )
    dtype = model.config.dtype
    packing = Packing(executor="tilewright:torch", version=0, weight_dtype=dtype)
    tensors = list(typed_tensors(model.config, loaded.weights, dtype))
    convert(plan(loaded, packing, tensors, 2**15), directory / "packed")
    return Written(directory / "packed", model)


_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_MERGES = ("h e", "l l", "he ll", "hell o", "Ġ w")


def write_gguf(directory: Path) -> Written:
    """A Qwen3 model in a GGUF file, with a tokenizer of bytes and a few merges."""
    from gguf import MODEL_ARCH, GGUFWriter, get_tensor_name_map
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokens = [*_SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [merge.replace(" ", "") for merge in _MERGES]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = [(left, right) for left, right in map(str.split, _MERGES)]
    model = make_model(
        "qk-norm",
        vocab_size=len(tokens),
        num_heads=3,  # so that q_proj and o_proj are square
        num_kv_heads=1,
        bos_token_id=0,
        eos_token_ids=(2, 0),
    )
    text = TextAssets(tokenizer=Tokenizer(models.BPE(vocabulary, merges)))
    model, config = evolve(model, text=text), model.config
    names = get_tensor_name_map(MODEL_ARCH.QWEN3, config.num_layers)
    path = directory / "sample.gguf"
    writer = GGUFWriter(path, "qwen3")
    add_sizes(writer, config)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(_SPECIAL) + [1] * (len(tokens) - len(_SPECIAL)))
    writer.add_token_merges(list(_MERGES))
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    for name, tensor in model.tensors.items():
        writer.add_tensor(names.get_name(name, (".weight",)), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Written(path, model)


def add_sizes(writer: Any, config: ModelConfig) -> None:
    """Tell a ``gguf.GGUFWriter`` the sizes of a model with default RoPE."""
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_layers)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope.theta)


WRITERS: dict[str, Callable[[Path], Written]] = {
    "tilewright_hf.loader": write_hf,
    "tilewright_gguf.loader": write_gguf,
    "tilewright_packed.loader": write_packed,
}
"""By the module of a shipped loader. A third party's loader has the hook ``write_sample``."""
