"""A loader of models with random weights that are made on the device, which cuda.py registers.

A source is the name of a shape in ``SHAPES``. The weights' distribution keeps activations in the
range of a trained model's.
"""

from collections.abc import Collection
from math import prod

import torch
from attrs import define, evolve, field, frozen
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from tilewright import hookimpl
from tilewright.types import (
    GenerateConfig,
    LoadedModel,
    ModelConfig,
    PluginInfo,
    RopeConfig,
    TensorInfo,
    TextAssets,
)
from tilewright.weights import expected_tensors

tilewright_api = 2

_TINY = ModelConfig(
    architecture="Qwen3ForCausalLM",
    vocab_size=512,
    hidden_size=64,
    intermediate_size=160,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    norm_eps=1e-6,
    rope=RopeConfig(theta=1e6),
    max_position_embeddings=40960,
    dtype="bfloat16",
    qk_norm=True,
)

SHAPES = {
    "tiny": _TINY,
    "qwen3-14b": evolve(
        _TINY,
        vocab_size=151936,
        hidden_size=5120,
        intermediate_size=17408,
        num_layers=40,
        num_heads=40,
        num_kv_heads=8,
        head_dim=128,
    ),
}


@frozen
class Options:
    device: str = field(default="cpu", metadata={"help": "where the weights are made"})


@define
class RandomSource:
    """A ``TensorSource`` whose tensors are on a device, though the contract says on the CPU: 28 GB
    then do not pass through the host."""

    config: ModelConfig
    device: str

    def names(self) -> Collection[str]:
        return expected_tensors(self.config).keys()

    def info(self, name: str) -> TensorInfo:
        shape = expected_tensors(self.config)[name]
        return TensorInfo(
            shape=shape, dtype="bfloat16", nbytes=2 * prod(shape), location="random numbers"
        )

    def get(self, name: str) -> Tensor:
        shape = expected_tensors(self.config)[name]
        if "norm" in name:
            return torch.ones(shape, dtype=torch.bfloat16, device=self.device)
        made = torch.empty(shape, dtype=torch.bfloat16, device=self.device)
        return made.normal_(0.0, 1.0 if "embed" in name else shape[-1] ** -0.5)

    def close(self) -> None:
        pass


@hookimpl
def plugin_info() -> PluginInfo:
    return PluginInfo(summary="random weights of some shapes, made on a device", options=Options)


@hookimpl
def can_load(source: str) -> bool:
    return False


@hookimpl
def load_model(source: str, options: Options) -> LoadedModel:
    config = SHAPES[source]
    tokenizer = Tokenizer(models.WordLevel({f" {i}": i for i in range(config.vocab_size)}, " 0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    return LoadedModel(
        config=config,
        weights=RandomSource(config, options.device),
        text=TextAssets(tokenizer=tokenizer),
        generation_defaults=GenerateConfig(),
        source=source,
    )
