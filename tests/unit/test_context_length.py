"""RoPE scaling lengthens the context: by how much, and what is computed beyond the original length.

The oracle of tokens and log-probabilities is transformers' ``generate``, which runs a prompt at
once and then decodes with a cache.
"""

from pathlib import Path
from typing import Any

import gguf_files
import pytest
import torch
from model_directories import change_json, load
from reference_models import CONFIGS, prompts, write_model
from transformers import LlamaConfig, PreTrainedModel

from tilewright import GenerateConfig, LLMEngine, RuntimeConfig
from tilewright.errors import ConfigError, RequestError
from tilewright.types import GenerateResult, ModelConfig

POSITIONS, FACTOR, NEW = 32, 4.0, 24
LENGTHS = (20, 31, 40, 60, 100)
"""Prompts in tokens: some pass the original length while decoding, some begin beyond it."""
TOLERANCE = 1e-4
KINDS: dict[str, dict[str, Any]] = {
    "linear": {},
    "dynamic": {},
    "yarn": {"original_max_position_embeddings": POSITIONS},
}


class Scaled:
    """A small model with one kind of scaling, in a directory and in transformers."""

    def __init__(self, kind: str, directory: Path):
        self.kind, self.directory = kind, directory
        scaling = {"rope_type": kind, "rope_theta": 1e4, "factor": FACTOR} | KINDS[kind]
        config = LlamaConfig(
            **CONFIGS["llama-linear"].to_dict()
            | {"max_position_embeddings": POSITIONS, "rope_parameters": scaling}
        )
        self.theirs: PreTrainedModel = write_model(config, directory)
        self.prompts = list(prompts(config, list(LENGTHS)))
        self.expected = [self.alone(prompt) for prompt in self.prompts]

    @torch.inference_mode()
    def alone(self, prompt: list[int]) -> tuple[list[int], list[float]]:
        """transformers' greedy tokens, and their log-probabilities."""
        self.theirs(torch.tensor([[5]]), use_cache=False)  # a short sequence resets dynamic RoPE
        out = self.theirs.generate(
            torch.tensor([prompt]),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        tokens = out.sequences[0, len(prompt) :].tolist()
        logprobs = [float(x[0].log_softmax(0)[t]) for x, t in zip(out.logits, tokens, strict=True)]
        return tokens, logprobs

    def generate(self, asked: list[list[int]], **runtime: Any) -> list[GenerateResult]:
        settings = GenerateConfig(max_new_tokens=NEW, ignore_eos=True, logprobs=0)
        with LLMEngine.from_plugins() as engine:
            engine.init_model("m", self.directory, RuntimeConfig(page_size=4, **runtime))
            return engine.generate_batch("m", asked, settings)

    def check(self, found: list[GenerateResult]) -> None:
        for result, (tokens, logprobs) in zip(found, self.expected, strict=True):
            assert list(result.token_ids) == tokens
            ours = [token.logprob for token in result.logprobs or ()]
            assert ours == pytest.approx(logprobs, abs=TOLERANCE)


@pytest.fixture(scope="module", params=KINDS)
def scaled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Scaled:
    return Scaled(request.param, tmp_path_factory.mktemp("scaled") / request.param)


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory: pytest.TempPathFactory) -> Scaled:
    return Scaled("dynamic", tmp_path_factory.mktemp("dynamic") / "model")


def test_prompts_beyond_the_original_length_give_the_tokens_of_transformers(
    scaled: Scaled,
) -> None:
    scaled.check(scaled.generate(scaled.prompts))


@pytest.mark.parametrize(
    "runtime",
    [
        {"max_batch_tokens": 16},
        {"total_pages": 40, "prefix_cache": False},
        {"speculation": "ngram"},
    ],
    ids=["chunks", "preemption", "drafts"],
)
def test_dynamic_scaling_does_not_depend_on_the_division_into_steps(
    dynamic: Scaled, runtime: dict[str, Any]
) -> None:
    found = dynamic.generate(dynamic.prompts, **runtime)
    dynamic.check(found)
    assert any(result.preemptions for result in found) == ("total_pages" in runtime)


def test_dynamic_prompts_share_pages_only_if_their_keys_are_the_same(dynamic: Scaled) -> None:
    longest = dynamic.prompts[-1]
    asked = [longest, longest[:60], longest, longest[:30], longest[:20], longest[:60]]
    settings = GenerateConfig(max_new_tokens=NEW, ignore_eos=True, logprobs=0)
    with LLMEngine.from_plugins() as engine:
        engine.init_model("m", dynamic.directory, RuntimeConfig(page_size=4))
        found = [engine.generate_result("m", prompt, settings) for prompt in asked]
        together = engine.generate_batch("m", asked, settings)
    cached = [result.cached_tokens for result in found]
    # 100 again; 20 begins like 30: both are within max_position_embeddings; 60 again.
    assert cached == [0, 0, 96, 0, 16, 56]
    for results in (found, together):
        for prompt, result in zip(asked, results, strict=True):
            assert list(result.token_ids) == dynamic.alone(prompt)[0]


# --- the limit ------------------------------------------------------------------------------------


def test_the_scaled_length_is_the_default_limit_and_the_largest(scaled: Scaled) -> None:
    with LLMEngine.from_plugins() as engine:
        engine.init_model("m", scaled.directory)
        assert engine.model("m").runtime.max_seq_len == POSITIONS * FACTOR
        with pytest.raises(RequestError, match=r"the prompt has 128 tokens.*shorten it$"):
            engine.generate("m", [3] * 128)
        engine.init_model("short", scaled.directory, RuntimeConfig(max_seq_len=40))
        with pytest.raises(RequestError, match="or raise max_seq_len, to at most 128"):
            engine.generate("short", [3] * 40)
        with pytest.raises(ConfigError) as error:
            engine.init_model("long", scaled.directory, RuntimeConfig(max_seq_len=129))
    original = "original_" if scaled.kind == "yarn" else ""
    assert str(error.value).endswith(
        f", 128 tokens ({original}max_position_embeddings = 32, and {scaled.kind} RoPE with factor "
        "4): lower it"
    )


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_a_gguf_file_allows_the_same_length(kind: str, tmp_path: Path) -> None:
    scaled = Scaled(kind, tmp_path / "model")
    scaled.directory = gguf_files.write(scaled.theirs, tmp_path / "model.gguf")
    assert gguf_files.load(scaled.directory).config.context_length == POSITIONS * FACTOR
    scaled.check(scaled.generate(scaled.prompts))


@pytest.mark.parametrize(
    ("values", "length"),
    [
        ({"rope_type": "default"}, 64),
        ({"rope_type": "linear", "factor": 2.5}, 160),
        ({"rope_type": "linear", "factor": 0.5}, 64),
        ({"rope_type": "dynamic", "factor": 2.0}, 128),
        ({"rope_type": "yarn", "factor": 4.0}, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 64),
        ({"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16}, 128),
        ({"rope_type": "yarn", "factor": 1.0, "original_max_position_embeddings": 16}, 64),
        ({"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 24}, 64),
        ({"rope_type": "linear", "factor": 1e300}, 2**31 - 1),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
            64,
        ),
    ],
    ids=str,
)
def test_the_length_that_a_config_allows(
    values: dict[str, Any], length: int, scaled_once: Path
) -> None:
    change_json(
        scaled_once / "config.json",
        max_position_embeddings=64,
        rope_parameters={"rope_theta": 1e4} | values,
    )
    config: ModelConfig = load(scaled_once).config
    assert config.context_length == length
    assert config.max_position_embeddings == 64


@pytest.fixture(scope="module")
def scaled_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("lengths") / "model"
    write_model("llama-linear", directory)
    return directory
