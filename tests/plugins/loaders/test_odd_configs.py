"""Odd but valid settings, drawn at random: the tokens of transformers, or a refusal that is listed.

A case is a small random model of one family with the settings of several ``Odd`` in its config.json
and generation_config.json. More of them, from another seed, with a list of those that are refused:

    PYTHONPATH=tests/support python tests/plugins/loaders/test_odd_configs.py --seed 7 --count 2000
"""

import argparse
import json
import random
import re
import tempfile
from collections.abc import Iterator
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import field, frozen
from model_directories import change_json, load
from reference_models import prompts, random_model, write_model
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from tilewright import GenerateConfig, LLMEngine
from tilewright.errors import TilewrightError

SEED, COUNT = 0, 170
TOLERANCE = 1e-4
PROMPT, NEW = 24, 5
VOCAB = 97

GEOMETRIES: dict[str, dict[str, Any]] = {
    "grouped": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "tied": {
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "hidden_size": 48,
        "tie_word_embeddings": True,
    },
}
FAMILIES: dict[str, type[PreTrainedConfig]] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}
BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
MORE: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {"use_sliding_window": False, "head_dim": 12},
}

ABSENT = "<absent>"
"""Removes a key."""


@frozen(kw_only=True)
class Odd:
    """Settings as they are found in files.

    meaning: the same settings as transformers reads them; default: as they are. warns: what one of
    the warnings contains. refused: a regular expression of the expected error; perhaps: it need not
    be refused.
    """

    config: dict[str, Any] = field(factory=dict)
    generation: dict[str, Any] = field(factory=dict)
    meaning: dict[str, Any] | None = None
    families: tuple[str, ...] = tuple(FAMILIES)
    geometry: str | None = None
    warns: str = ""
    refused: str = ""
    perhaps: bool = False

    def fits(self, family: str, geometry: str) -> bool:
        return family in self.families and self.geometry in (None, geometry)


def odd(meaning: Any = None, warns: bool = False, refused: str = "", **config: Any) -> Odd:
    """One key with an odd value, and the value that it means: the same one by default."""
    (key,) = config
    return Odd(
        config=config,
        meaning=None if meaning is None else {key: meaning},
        warns=repr(key) if warns else "",
        refused=refused,
    )


def rope(
    meaning: dict[str, Any] | None = None,
    positions: int = 16,
    warns: str = "",
    refused: str = "",
    **scaling: Any,
) -> Odd:
    """Old-style rope_scaling with positions below the prompt's length."""
    length = {"max_position_embeddings": positions}
    return Odd(
        config={"rope_scaling": scaling} | length,
        meaning={"rope_scaling": scaling | (meaning or {})} | length,
        warns=warns,
        refused=refused,
    )


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
SLIDING = ("qwen2", "qwen3")
KINDS = ["sliding_attention", "full_attention"]

AXES: dict[str, list[Odd]] = {
    "end": [
        odd(eos_token_id=[2, 7, 9]),
        odd(eos_token_id=151645, warns=True),
        odd(eos_token_id=-1, warns=True),
        odd(eos_token_id=[2, 151645], warns=True),
        odd(eos_token_id="2", meaning=2),
        odd(eos_token_id=2.0, meaning=2),
        odd(eos_token_id=None),
        odd(eos_token_id="</s>", refused="'eos_token_id' must be a token id"),
        Odd(generation={"eos_token_id": [2, 151643]}, warns="'eos_token_id'"),
        Odd(generation={"eos_token_id": [9, 7, 9]}),
        Odd(generation={"eos_token_id": None}),
    ],
    "beginning": [
        odd(bos_token_id=151643, warns=True),
        odd(bos_token_id=-1, warns=True),
        odd(bos_token_id=[1], meaning=1, warns=True),
        odd(bos_token_id=None),
        odd(bos_token_id=[1, 2], refused="'bos_token_id' must be a token id"),
    ],
    "padding": [odd(pad_token_id=None), odd(pad_token_id=0)],
    "rope": [
        odd(rope_theta=1000000),
        odd(rope_theta="5e3", meaning=5000.0, warns=True),
        Odd(config={"rope_theta": None}, meaning={"rope_theta": ABSENT}),
        odd(rope_scaling=None),
        odd(rope_scaling={}),
        odd(rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
        rope(type="linear", factor=8),
        rope(type="linear", rope_type="linear", factor=2.5),
        rope(rope_type="linear", factor="4.0", meaning={"factor": 4.0}, warns="'factor'"),
        rope(rope_type="linear", factor=1.0, positions=64),
        rope(type="dynamic", factor=2.0),
        rope(type="dynamic", factor=4, original_max_position_embeddings=8, warns="original_max"),
        rope(rope_type="dynamic", factor=3.0, alpha=1.0, warns="'alpha'"),
        rope(type="yarn", factor=4.0),
        rope(type="yarn", factor=4, original_max_position_embeddings=16, finetuned=True),
        rope(type="yarn", factor=4.0, original_max_position_embeddings=16.0, warns="'original_max"),
        rope(type="yarn", factor=None, original_max_position_embeddings=16, positions=64),
        rope(type="yarn", factor=4.0, beta_fast="8", meaning={"beta_fast": 8.0}, warns="'beta_f"),
        rope(type="yarn", factor=4.0, attn_factor=0.9, warns="'attn_factor'"),
        rope(type="yarn", factor=4.0, attention_factor=1.2, truncate=False),
        rope(type="yarn", factor=4.0, mscale=1.0, mscale_all_dim=0),
        rope(type="yarn", factor=4.0, mscale=0.7, mscale_all_dim=1.0),
        rope(rope_type="llama3", factor=8.0, **LLAMA3, positions=64),
        rope(rope_type="default", factor=2.0, positions=64, warns="'factor'"),
        rope(rope_type="default", rope_theta=500.0, positions=64),
        Odd(
            config={
                "rope_scaling": {"type": "yarn", "factor": 4.0},
                "original_max_position_embeddings": 16,
            }
        ),
        rope(type="mrope", mrope_section=[2, 3, 3], refused="'type' must be one of default"),
        rope(type=None, factor=2.0, refused="has 'factor' but no 'rope_type'"),
        rope(
            rope_type="longrope",
            factor=4.0,
            short_factor=[1.0] * 4,
            long_factor=[2.0] * 4,
            refused="'rope_type' must be one of",
        ),
        odd(partial_rotary_factor=0.5, refused="'partial_rotary_factor' must be 1"),
    ],
    "window": [
        Odd(config={"sliding_window": 7}, families=("mistral",)),
        Odd(config={"sliding_window": 7}, families=("llama",), warns="'sliding_window' has no eff"),
        Odd(config={"sliding_window": "7"}, meaning={"sliding_window": 7}, families=("mistral",)),
        Odd(config={"sliding_window": ABSENT}, families=("mistral",)),
        Odd(config={"sliding_window": 7, "max_window_layers": 1}, families=SLIDING),
        Odd(
            config={"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
            families=SLIDING,
        ),
        Odd(
            config={"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 28},
            families=SLIDING,
        ),
        Odd(
            config={"use_sliding_window": True, "sliding_window": 7, "layer_types": KINDS},
            families=SLIDING,
        ),
        Odd(
            config={"use_sliding_window": None, "sliding_window": 0, "max_window_layers": None},
            meaning={"use_sliding_window": False},
            families=SLIDING,
            warns="'use_sliding_window'",
        ),
        Odd(
            config={"layer_types": KINDS},
            families=SLIDING,
            refused="the window is not set",
        ),
        Odd(
            config={"use_sliding_window": True, "layer_types": KINDS[:1]},
            families=SLIDING,
            refused="'layer_types' must have 2 entries",
        ),
    ],
    "activation": [
        odd(hidden_act="swish"),
        odd(hidden_act=ABSENT),
        odd(hidden_act=None, meaning="silu", warns=True),
        odd(hidden_act="gelu", refused="'hidden_act' must be silu"),
    ],
    "epsilon": [
        odd(rms_norm_eps="1e-06", meaning=1e-6, warns=True),
        odd(rms_norm_eps=1, meaning=1.0),
        odd(rms_norm_eps=ABSENT),
        odd(rms_norm_eps=None, meaning=ABSENT, warns=True),
        odd(rms_norm_eps="small", refused="'rms_norm_eps' must be a finite number"),
    ],
    "dtype": [
        odd(torch_dtype="torch.float32"),
        odd(torch_dtype="float"),
        odd(torch_dtype="auto"),
        odd(torch_dtype=None),
        odd(torch_dtype=ABSENT),
        odd(torch_dtype="float64", warns=True),
        odd(dtype="float32"),
        odd(torch_dtype="int8", refused="'torch_dtype' must be one of"),
    ],
    "flags": [
        Odd(config={"attention_bias": None}, meaning={}, families=("llama",), warns="'attention_b"),
        Odd(config={"attention_bias": 0}, meaning={}, families=("llama", "qwen3"), warns="'atten"),
        Odd(config={"mlp_bias": "false"}, meaning={}, families=("llama",), warns="'mlp_bias'"),
        Odd(config={"mlp_bias": None}, meaning={}, families=("llama",), warns="'mlp_bias'"),
        odd(qkv_bias=True),
        odd(attention_dropout=0.1),
        odd(use_cache=False),
        odd(is_encoder_decoder=False),
        odd(use_mrope=False),
    ],
    "tying": [
        Odd(
            config={"tie_word_embeddings": None},
            meaning={"tie_word_embeddings": False},
            geometry="grouped",
            warns="'tie_word_embeddings'",
        ),
        Odd(config={"tie_word_embeddings": ABSENT}, geometry="grouped"),
        Odd(
            config={"tie_word_embeddings": "true"},
            meaning={"tie_word_embeddings": True},
            geometry="tied",
            warns="'tie_word_embeddings'",
        ),
        Odd(
            config={"tie_word_embeddings": 1},
            meaning={"tie_word_embeddings": True},
            geometry="tied",
            warns="'tie_word_embeddings'",
        ),
        Odd(config={"tie_word_embeddings": False}, geometry="tied", refused="lm_head.weight"),
    ],
    "experts": [
        odd(num_experts=0),
        odd(num_local_experts=1, warns=True),
        odd(num_experts_per_tok=2),
        odd(moe_intermediate_size=768, warns=True),
        odd(num_local_experts=8, refused="mixtures of experts are not supported"),
        odd(n_routed_experts=8, refused="mixtures of experts are not supported"),
    ],
    "sizes": [
        odd(num_hidden_layers=2.0, meaning=2, warns=True),
        odd(vocab_size=str(VOCAB), meaning=VOCAB, warns=True),
        odd(max_position_embeddings=64.0, meaning=64, warns=True),
        odd(max_position_embeddings=None, meaning=ABSENT, warns=True),
        Odd(
            config={"num_key_value_heads": None},
            meaning={"num_key_value_heads": 3},
            geometry="tied",
            families=("llama", "mistral"),
        ),
        Odd(config={"head_dim": None}, families=("llama", "mistral")),
        Odd(config={"head_dim": ABSENT}, families=("llama", "mistral", "qwen2")),
        odd(pretraining_tp=2),
        odd(num_hidden_layers="two", refused="'num_hidden_layers' must be an integer"),
        odd(hidden_size=0, refused="'hidden_size' must be an integer"),
    ],
    "names": [
        odd(architectures=ABSENT),
        odd(architectures=None),
        odd(auto_map={"AutoModelForCausalLM": "modeling_x.X"}),
        odd(_name_or_path="/somewhere/else"),
        odd(transformers_version="4.31.0"),
        Odd(config={"architectures": ["LlamaForCausalLM", "Other"]}, families=("llama",)),
        Odd(config={"architectures": ["LLaMAForCausalLM"]}, families=("llama",)),
        Odd(
            config={"architectures": ["LlamaForCausalLM"]},
            families=("mistral", "qwen3"),
            warns="'architectures'",
        ),
        Odd(
            config={"architectures": ["LlamaForSequenceClassification"]},
            families=("llama",),
            refused="architecture",
        ),
        odd(model_type="gemma3", refused='model_type "gemma3" is not supported'),
    ],
    "parts": [
        odd(quantization_config=None),
        odd(
            quantization_config={"quant_method": "gptq", "bits": 4},
            refused="the weights are quantised",
        ),
        odd(vision_config=None),
        odd(vision_config={"depth": 2}, refused="images are not supported"),
    ],
    "sampling": [
        Odd(generation={"do_sample": True, "top_k": -1, "temperature": 0.6}, warns="'top_k'"),
        Odd(generation={"do_sample": True, "top_p": 0, "temperature": 0.6}, warns="'top_p'"),
        Odd(generation={"do_sample": False, "top_p": 0, "top_k": -1, "temperature": 0}),
        Odd(generation={"do_sample": "true", "top_k": 5.0}, warns="'do_sample'"),
        Odd(generation={"do_sample": None, "temperature": None, "top_p": None}),
        Odd(generation={"do_sample": True, "temperature": "0.7"}, warns="'temperature'"),
        Odd(generation={"repetition_penalty": 1, "max_length": 4096, "cache_config": None}),
        Odd(generation={"max_new_tokens": None, "bos_token_id": -1, "pad_token_id": -1}),
        Odd(generation={"repetition_penalty": 0}, refused="'repetition_penalty' must be"),
        Odd(generation={"do_sample": True, "top_p": 1.5}, refused="'top_p' must be"),
    ],
}


@frozen
class Case:
    """A model and odd settings, at most one of them from each axis."""

    family: str
    geometry: str
    odds: tuple[Odd, ...]

    def __str__(self) -> str:
        settings = [odd.config or {"generation": odd.generation} for odd in self.odds]
        text = " ".join(json.dumps(setting) for setting in settings)
        return f"{self.family} {self.geometry} {text}"

    @property
    def refusals(self) -> list[str]:
        return [odd.refused for odd in self.odds if odd.refused]


def cases(seed: int, count: int) -> Iterator[Case]:
    """Different cases. Each begins with the next ``Odd`` in turn, and adds up to three that are not
    refused, at random."""
    draw = random.Random(seed)
    turns = cycle((axis, odd) for axis, odds in AXES.items() for odd in odds)
    seen: set[str] = set()
    while len(seen) < count:
        first_axis, first = next(turns)
        family = draw.choice(first.families)
        geometry = first.geometry or draw.choice(list(GEOMETRIES))
        odds, keys = [first], {*first.config, *first.generation}
        others = [axis for axis in AXES if axis != first_axis]
        for axis in draw.sample(others, draw.choice([0, 1, 2, 3])):
            fitting = [o for o in AXES[axis] if o.fits(family, geometry) and not o.refused]
            chosen = draw.choice(fitting) if fitting else first
            if not keys & {*chosen.config, *chosen.generation}:
                odds.append(chosen)
                keys |= {*chosen.config, *chosen.generation}
        case = Case(family, geometry, tuple(odds))
        if str(case) not in seen:
            seen.add(str(case))
            yield case


# --- both sides -----------------------------------------------------------------------------------


def changed(values: dict[str, Any], *changes: dict[str, Any]) -> dict[str, Any]:
    for change in changes:
        values = values | change
    return {key: value for key, value in values.items() if value != ABSENT}


def base(family: str, geometry: str) -> dict[str, Any]:
    architecture = FAMILIES[family].__name__.replace("Config", "ForCausalLM")
    names = {"model_type": family, "architectures": [architecture]}
    return names | BASE | MORE[family] | GEOMETRIES[geometry]


@cache
def weights(family: str, geometry: str) -> dict[str, torch.Tensor]:
    made = random_model(FAMILIES[family].from_dict(base(family, geometry)), seed=3)
    return made.state_dict()


def oracle(case: Case) -> PreTrainedModel:
    """transformers' model, from the settings as it reads them."""
    meant = [o.config if o.meaning is None else o.meaning for o in case.odds]
    values = changed(base(case.family, case.geometry), *meant)
    values.pop("torch_dtype", None)
    config = FAMILIES[case.family].from_dict(values)
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    )
    model.load_state_dict(weights(case.family, case.geometry))
    return model.eval()


@torch.inference_mode()
def greedy(model: PreTrainedModel, prompt: list[int]) -> tuple[list[int], list[float]]:
    """transformers' tokens and their log-probabilities, decoded with a cache."""
    past, run = DynamicCache(), prompt  # with the config, a Llama's cache would slide too
    tokens, logprobs = [], []
    for _ in range(NEW):
        logits = model(torch.tensor([run]), past_key_values=past).logits[0, -1]
        found = logits.float().log_softmax(-1)
        run = [int(found.argmax())]
        tokens += run
        logprobs.append(float(found.max()))
    return tokens, logprobs


def end_ids(case: Case, model: PreTrainedModel) -> set[int]:
    """The end-of-sequence tokens by transformers' precedence, without those that no text has."""
    ids = model.config.eos_token_id
    for o in case.odds:
        ids = o.generation.get("eos_token_id") or ids
    return set(ids if isinstance(ids, list) else [ids]) & {*range(VOCAB)}


def write(case: Case, directory: Path) -> None:
    """The case's files beside the weights and the tokenizer in a directory."""
    values = changed(base(case.family, case.geometry), *(o.config for o in case.odds))
    (directory / "config.json").write_text(json.dumps(values))
    settings = changed({}, *(o.generation for o in case.odds))
    (directory / "generation_config.json").write_text(json.dumps(settings))


def check(case: Case, engine: LLMEngine, directories: Path) -> str:
    """Compare a case with transformers. Returns the message of a refusal that was expected, else
    an empty string."""
    directory = directories / case.family / case.geometry
    write(case, directory)
    message = ""
    try:
        engine.init_model("odd", directory)
    except TilewrightError as error:
        message = str(error)
    if message:
        expected = case.refusals or ["no refusal"]
        assert any(re.search(refusal, message) for refusal in expected), f"{expected}: {message}"
        assert message.isprintable()
        return message
    try:
        assert all(o.perhaps for o in case.odds if o.refused), f"expected {case.refusals}"
        compare(case, engine)
    finally:
        engine.unload("odd")
    return ""


def compare(case: Case, engine: LLMEngine) -> None:
    loaded = engine.model("odd").loaded
    assert all(warning.isprintable() for warning in loaded.warnings)
    for o in case.odds:
        assert any(o.warns in w for w in ("", *loaded.warnings)), (o.warns, loaded.warnings)
    model = oracle(case)
    (prompt,) = prompts(model.config, [PROMPT])
    settings = GenerateConfig(max_new_tokens=NEW, temperature=0, ignore_eos=True, logprobs=0)
    found = engine.generate_result("odd", prompt, settings)
    tokens, logprobs = greedy(model, prompt)
    assert list(found.token_ids) == tokens
    ours = [token.logprob for token in found.logprobs or ()]
    assert ours == pytest.approx(logprobs, abs=TOLERANCE)
    assert set(loaded.config.eos_token_ids) == end_ids(case, model)


def write_models(directories: Path) -> Path:
    for family, make in FAMILIES.items():
        for geometry in GEOMETRIES:
            config = make.from_dict(base(family, geometry))
            write_model(config, directories / family / geometry, seed=3)
    return directories


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("odd"))


@pytest.fixture(scope="module")
def engine() -> Iterator[LLMEngine]:
    with LLMEngine.from_plugins(loader="hf-local") as engine:
        yield engine


@pytest.mark.parametrize("case", list(cases(SEED, COUNT)), ids=str)
def test_odd_settings_give_the_tokens_of_transformers_or_the_expected_refusal(
    case: Case, engine: LLMEngine, directories: Path
) -> None:
    check(case, engine, directories)


def test_the_drawn_cases_cover_the_settings() -> None:
    drawn = list(cases(SEED, COUNT))
    assert all(any(o in c.odds for c in drawn) for odds in AXES.values() for o in odds)
    assert {(case.family, case.geometry) for case in drawn} == {
        (family, geometry) for family in FAMILIES for geometry in GEOMETRIES
    }


BESIDE = ("tokenizer.json", "special_tokens_map.json", "chat_template.jinja")


def test_a_byte_order_mark_and_a_repeated_key_are_a_warning(tmp_path: Path) -> None:
    write_model("llama-linear", tmp_path)
    expected = load(tmp_path).config
    for name in ("config.json", "tokenizer_config.json"):
        text = (tmp_path / name).read_text().rstrip().removesuffix("}")
        (tmp_path / name).write_text(f'{text}, "use_cache": 1, "use_cache": 2}}', "utf-8-sig")
    change_json(tmp_path / "special_tokens_map.json")
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    for name in BESIDE:
        (tmp_path / name).write_text((tmp_path / name).read_text(), "utf-8-sig")
    loaded = load(tmp_path)
    assert loaded.config == expected
    for name in BESIDE:
        said = f"{tmp_path / name}: starts with a byte order mark, which is ignored"
        assert said in loaded.warnings
    for name in ("config.json", "tokenizer_config.json"):
        of_file = [w for w in loaded.warnings if w.startswith(f"{tmp_path / name}: ")]
        assert "starts with a byte order mark, which is ignored" in of_file[0]
        assert 'the key "use_cache" is repeated' in of_file[1]
        assert of_file[1].endswith("its last value is used, 2")


def test_sampling_settings_have_the_meaning_that_other_engines_give_them(tmp_path: Path) -> None:
    write_model("llama-linear", tmp_path)
    path = tmp_path / "generation_config.json"
    for given, expected in (
        ({"top_k": -1}, {"top_k": 0}),
        ({"top_p": 0}, {"top_k": 1, "top_p": 1.0}),
        ({"top_p": 0, "top_k": -1, "temperature": "0.5"}, {"top_k": 1, "temperature": 0.5}),
    ):
        path.write_text(json.dumps({"do_sample": True} | given))
        found = load(tmp_path).generation_defaults
        assert {key: getattr(found, key) for key in expected} == expected
    path.write_text(json.dumps({"do_sample": False, "top_p": 7, "top_k": "many"}))
    assert load(tmp_path).generation_defaults == GenerateConfig(temperature=0.0)


# --- by hand --------------------------------------------------------------------------------------


def main() -> int:
    """Check cases of another seed; says which were refused, and which failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=SEED + 1)
    parser.add_argument("--count", type=int, default=1000)
    asked = parser.parse_args()
    failed = refused = 0
    with tempfile.TemporaryDirectory() as made, LLMEngine.from_plugins(loader="hf-local") as engine:
        directories = write_models(Path(made))
        for case in cases(asked.seed, asked.count):
            try:
                message = check(case, engine, directories)
            except Exception as error:
                failed += 1
                print(f"FAILED {case}\n    {type(error).__name__}: {error}")
                continue
            if message:
                refused += 1
                print(f"refused {case}\n    {message}")
    print(f"{asked.count} cases: {refused} refused as expected, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
