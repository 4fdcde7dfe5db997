"""Added and special tokens of a Hugging Face directory have the ids that transformers gives."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import write
from model_directories import change_json, load, write_directory
from reference_models import random_model
from small_tokenizers import byte_level, llama_2
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from tilewright import GenerateConfig, LLMEngine, RuntimeConfig
from tilewright.errors import ModelError, RequestError
from tilewright.text import Text
from tilewright.types import ModelConfig, RopeConfig, TextAssets
from tilewright_guidance.vocabulary import read_vocabulary
from tilewright_hf.architecture import FAMILIES
from tilewright_hf.tokenizer import QWEN2_WORDS, load_text

NEXT = 407
"""The first id that the tokenizer below does not have."""

FLAGS = ("lstrip", "rstrip", "normalized", "single_word")


def token(content: str, **flags: bool) -> dict[str, Any]:
    return {"content": content, **dict.fromkeys(FLAGS, False), **flags}


def typed(content: str, **flags: bool) -> dict[str, Any]:
    """As tokenizer_config.json writes a token."""
    return {"__type": "AddedToken", **token(content, **flags)}


def declared(**tokens: Any) -> dict[str, Any]:
    return {"added_tokens_decoder": {i.strip("_"): t for i, t in tokens.items()}}


X, Y, Z = "<|x|>", "<|y|>", "<|z|>"
BOTH = ("additional_special_tokens", "extra_special_tokens")

ADDED, CONFIG, MAP = "added_tokens.json", "tokenizer_config.json", "special_tokens_map.json"
WAYS: dict[str, dict[str, Any]] = {
    "none": {CONFIG: {}},
    "no file but tokenizer.json": {},
    "added_tokens.json": {ADDED: {X: NEXT}, CONFIG: {}},
    "added_tokens.json alone": {ADDED: {X: NEXT}},
    "added_tokens.json, not sorted": {ADDED: {Y: NEXT + 1, X: NEXT}, CONFIG: {}},
    "added_tokens.json, pad_token": {ADDED: {X: NEXT}, CONFIG: {"pad_token": X}},
    "added_tokens.json, special list": {ADDED: {X: NEXT}, CONFIG: {BOTH[0]: [X]}},
    "added_tokens.json, map": {ADDED: {X: NEXT}, MAP: {"pad_token": token(X, rstrip=True)}},
    "added_tokens.json, decoder": {ADDED: {X: NEXT}, CONFIG: declared(_407=token(Y, special=True))},
    "added_tokens.json, empty decoder": {ADDED: {X: NEXT}, CONFIG: {"added_tokens_decoder": {}}},
    "added_tokens.json, a known id": {ADDED: {X: 0}, CONFIG: {}},
    "map alone": {MAP: {"eos_token": X}},
    "map with null": {MAP: {"eos_token": None}, CONFIG: {"eos_token": X}},
    "map overrides": {MAP: {"eos_token": Y}, CONFIG: {"eos_token": X}},
    "map is ignored": {MAP: {"eos_token": Y}, CONFIG: {"eos_token": X, "added_tokens_decoder": {}}},
    "map with another name": {MAP: {"eot_token": token(X), "a_token": Y}, CONFIG: {}},
    "map with content only": {MAP: {"pad_token": {"content": X}}, CONFIG: {}},
    "config with content only": {CONFIG: {"pad_token": {"__type": "AddedToken", "content": X}}},
    "both lists": {CONFIG: {BOTH[0]: [X], BOTH[1]: [Y]}},
    "both lists, one empty": {CONFIG: {BOTH[0]: [X], BOTH[1]: []}},
    "lists in both files": {CONFIG: {BOTH[0]: [X]}, MAP: {BOTH[1]: [Y]}},
    "lists in both files, crosswise": {CONFIG: {BOTH[1]: [X]}, MAP: {BOTH[0]: [Y]}},
    "dict in the map": {CONFIG: {}, MAP: {BOTH[1]: {"image_token": X}}},
    "order of names": {CONFIG: {"mask_token": X, "image_token": Z, "pad_token": Y}},
    "a vocabulary entry is special": {CONFIG: {BOTH[0]: ["qu"]}},
    "decoder, not sorted": {CONFIG: declared(_408=token(Y), _407=token(X, special=True))},
    "decoder unsets special": {CONFIG: declared(_0=token("<s>", special=False))},
    "decoder with content only": {CONFIG: declared(_407={"content": X})},
    "empty strings": {CONFIG: {"pad_token": "", BOTH[0]: [""]}},
    "nulls": {CONFIG: {"pad_token": None, "eos_token": None}},
    "a name for a known token": {CONFIG: {"pad_token": "<think>"}},
    "a name for a known token, decoder": {
        CONFIG: {"pad_token": "<think>", "added_tokens_decoder": {}}
    },
    "other flags than tokenizer.json": {ADDED: {"<think>": 404}, CONFIG: {}},
    "add_bos_token": {CONFIG: {"bos_token": "<s>", "add_bos_token": True, "add_eos_token": True}},
    "settings of other classes": {
        CONFIG: {"add_prefix_space": True, "legacy": True, "clean_up_tokenization_spaces": True}
    },
}
for list_key in BOTH:
    WAYS |= {
        f"{list_key}: strings": {CONFIG: {list_key: [X, Y]}},
        f"{list_key}: tokens": {CONFIG: {list_key: [typed(X, lstrip=True, rstrip=True)]}},
        f"{list_key}: words": {CONFIG: {list_key: [typed(X, normalized=True, single_word=True)]}},
        f"{list_key}: dict": {CONFIG: {list_key: {"image_token": X}}},
        f"{list_key}: empty": {CONFIG: {list_key: []}},
        f"{list_key}: null": {CONFIG: {list_key: None}},
        f"{list_key}: map": {CONFIG: {}, MAP: {list_key: [X]}},
        f"{list_key}: both files": {CONFIG: {list_key: [X]}, MAP: {list_key: [Y]}},
    }
for flag in FLAGS:
    set_ = {flag: True}
    WAYS |= {
        f"{flag}: new in config": {CONFIG: {"pad_token": typed(X, **set_)}},
        f"{flag}: known in config": {CONFIG: {"eos_token": typed("</s>", **set_)}},
        f"{flag}: new in map": {CONFIG: {}, MAP: {"pad_token": token(X, **set_)}},
        f"{flag}: known in map": {CONFIG: {}, MAP: {"eos_token": token("</s>", **set_)}},
        f"{flag}: known in decoder": {CONFIG: declared(_1=token("</s>", special=True, **set_))},
        f"{flag}: new in decoder": {CONFIG: declared(_407=token(X, special=True, **set_))},
        f"{flag}: decoder and name": {
            CONFIG: declared(_407=token(X, special=False, **set_)) | {"pad_token": typed(X)}
        },
    }

OTHER_IDS: dict[str, dict[str, Any]] = {
    "added_tokens.json leaves a gap": {ADDED: {X: NEXT + 3}, CONFIG: {}},
    "added_tokens.json has a vocabulary entry": {ADDED: {"qu": NEXT}, CONFIG: {}},
    "added_tokens.json takes an id": {ADDED: {X: 5}, CONFIG: {}},
    "decoder leaves a gap": {CONFIG: declared(_410=token(X, special=True))},
    "decoder takes an id": {CONFIG: declared(_7=token(X, special=True))},
    "decoder names another token": {CONFIG: declared(_1=token("<s>", special=True))},
}
"""Files that declare ids which a tokenizer cannot give."""

SAMPLES = [
    f"{X}",
    f"a{X}b",
    f"  {X}  fox",
    f"{Y}é {Z}x",
    "the fox foxes quick",
    "<s>inside</s> the </s>  <|im_end|>",
    "<think> two words </think>",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokens")
    byte_level().save(str(directory / "tokenizer.json"))
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 500}))
    return directory


def write_beside(directory: Path, files: dict[str, Any]) -> None:
    """Write the files beside tokenizer.json, and remove those of an earlier test."""
    for name in (ADDED, CONFIG, MAP):
        (directory / name).unlink(missing_ok=True)
    for name, values in files.items():
        (directory / name).write_text(json.dumps(values))


def loaded_text(
    directory: Path, vocab_size: int = 500, family: str = "llama"
) -> tuple[TextAssets, tuple[str, ...]]:
    config = ModelConfig(
        architecture=FAMILIES[family].architecture,
        vocab_size=vocab_size,
        hidden_size=8,
        intermediate_size=8,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        norm_eps=1e-5,
        rope=RopeConfig(),
        max_position_embeddings=8,
        dtype="float32",
    )
    return load_text(directory, config)


@pytest.mark.parametrize("way", [*WAYS, *OTHER_IDS])
def test_tokens_are_those_of_transformers(way: str, place: Path) -> None:
    write_beside(place, (WAYS | OTHER_IDS)[way])
    text, warnings = loaded_text(place)
    oracle = AutoTokenizer.from_pretrained(place)
    for sample in SAMPLES:
        ids = text.tokenizer.encode(sample).ids
        assert ids == oracle.encode(sample), sample
        for skip in (True, False):
            ours = text.tokenizer.decode(ids, skip_special_tokens=skip)
            assert ours == oracle.decode(ids, skip_special_tokens=skip), (sample, skip)
    assert text.special_tokens == oracle.special_tokens_map
    assert len(warnings) == (way in OTHER_IDS)
    assert all("its ids are not those of the tokenizer" in warning for warning in warnings)


# --- classes of transformers ----------------------------------------------------------------------

SPLIT = [" it's  Größe 12", "<s>fox\n\n x_y, </s> the", "fox", "the  fox e\u0301"]
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
LLAMA = {"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<s>"}


def qwen2() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(QWEN2_WORDS), behavior="isolated")
    characters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, characters])
    return tokenizer


@pytest.mark.parametrize(
    ("make", "family", "settings", "differ"),
    [
        (llama_2, "llama", {}, False),
        (llama_2, "llama", LLAMA, True),
        (llama_2, "llama", LLAMA | {"legacy": True}, True),
        (llama_2, "llama", LLAMA | {"add_prefix_space": True}, True),
        (llama_2, "llama", LLAMA | {"add_prefix_space": False}, False),
        (llama_2, "llama", {"tokenizer_class": "PreTrainedTokenizerFast"}, False),
        (llama_2, "mistral", LLAMA | {"add_prefix_space": False}, False),
        (byte_level, "llama", LLAMA, False),
        (byte_level, "llama", {"tokenizer_class": "GPT2Tokenizer"}, False),
        (byte_level, "llama", {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}, True),
        (byte_level, "llama", {"tokenizer_class": "Qwen2Tokenizer"}, True),
        (byte_level, "mistral", {"tokenizer_class": "Qwen2Tokenizer"}, False),
        (byte_level, "qwen2", {"tokenizer_class": "PreTrainedTokenizerFast"}, True),
        (byte_level, "qwen3", {"tokenizer_class": "PreTrainedTokenizerFast"}, False),
        (qwen2, "qwen2", {"tokenizer_class": "Qwen2Tokenizer"}, False),
        (qwen2, "qwen2", {"eos_token": typed("</s>", rstrip=True)}, False),
        (qwen2, "qwen3", {}, False),
        (qwen2, "qwen3", {"tokenizer_class": "Qwen2TokenizerFast", BOTH[0]: ["<think>"]}, False),
    ],
)
def test_ids_differ_from_those_of_a_class_of_transformers_only_with_a_warning(
    make: Callable[[], Tokenizer],
    family: str,
    settings: dict[str, Any],
    differ: bool,
    tmp_path: Path,
) -> None:
    make().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    write_beside(tmp_path, {CONFIG: settings})
    oracle = AutoTokenizer.from_pretrained(tmp_path)
    text, warnings = loaded_text(tmp_path, family=family)
    encoded = [text.tokenizer.encode(sample).ids for sample in SPLIT]
    expected = [oracle.encode(sample) for sample in SPLIT]
    assert (encoded != expected) == differ
    assert [w for w in warnings if "transformers 5 splits some texts" in w] == list(warnings)
    assert len(warnings) == differ
    for ids in expected:
        ours = text.tokenizer.decode(ids, skip_special_tokens=True)
        assert ours == oracle.decode(ids, skip_special_tokens=True)
    if differ:  # what the warning suggests
        oracle.save_pretrained(tmp_path)
        text, _ = loaded_text(tmp_path, family=family)
        assert [text.tokenizer.encode(sample).ids for sample in SPLIT] == expected


def test_the_ids_of_tokenizer_json_are_those_of_llama_cpp(tmp_path: Path) -> None:
    """Also where transformers 5 gives others."""
    from llama_cpp import LlamaCpp

    llama_2().save(str(tmp_path / "tokenizer.json"))
    write_beside(tmp_path, {CONFIG: LLAMA})
    text, (warning,) = loaded_text(tmp_path)
    assert "transformers 5 splits some texts by the rules of its class LlamaTokenizer" in warning
    saved, ids = json.loads(llama_2().to_str()), llama_2().get_vocab()
    tokens = sorted(ids, key=ids.__getitem__)
    ranks = {"".join(merge): i for i, merge in enumerate(saved["model"]["merges"])}
    added = {t["content"]: 3 if t["special"] else 4 for t in saved["added_tokens"]}
    kinds = {t: 6 for t in tokens if t.startswith("<0x")} | added | {"<unk>": 2}
    values = {
        "model": "llama",
        "tokens": tokens,
        "token_type": [kinds.get(token, 1) for token in tokens],
        "scores": [-float(ranks.get(token, 1000)) for token in tokens],
        "bos_token_id": ids["<s>"],
        "eos_token_id": ids["</s>"],
        "unknown_token_id": 0,
        "add_bos_token": False,
    }
    path = write(
        random_model(LlamaConfig(vocab_size=len(tokens), **SMALL)),
        tmp_path / "model.gguf",
        text={f"tokenizer.ggml.{key}": value for key, value in values.items()},
    )
    theirs = LlamaCpp(path)
    for sample in (*SPLIT, "数 12 fox</s>a"):
        assert text.tokenizer.encode(sample).ids == theirs.tokenize(sample), sample


def test_a_class_declares_special_tokens(tmp_path: Path) -> None:
    llama_2().save(str(tmp_path / "tokenizer.json"))
    write_beside(tmp_path, {CONFIG: {"tokenizer_class": "LlamaTokenizer", "unk_token": None}})
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    text, _ = loaded_text(tmp_path)
    assert text.special_tokens == AutoTokenizer.from_pretrained(tmp_path).special_tokens_map
    assert text.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}


def test_special_tokens_that_are_to_be_split_are_a_warning(place: Path) -> None:
    write_beside(place, {CONFIG: {"split_special_tokens": True}})
    text, (warning,) = loaded_text(place)
    assert "split_special_tokens is ignored" in warning
    assert text.tokenizer.encode("</s>").ids == [1]


# --- ids beyond the vocabulary, and embeddings without a token ------------------------------------


def write_words(directory: Path, count: int, added: tuple[str, ...] = ()) -> Path:
    """A model of 131 embeddings, and a tokenizer of count words and of added tokens."""
    write_directory(directory)
    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(count)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_tokens([AddedToken(t, special=t == "<pad>", normalized=False) for t in added])
    tokenizer.save(str(directory / "tokenizer.json"))
    change_json(directory / "generation_config.json", "eos_token_id", do_sample=False)
    return directory


@pytest.fixture(scope="module")
def beyond(tmp_path_factory: pytest.TempPathFactory) -> Path:
    added = ("<pad>", "<fim_prefix>", "<fim_suffix>")
    directory = write_words(tmp_path_factory.mktemp("models") / "beyond", 131, added)
    change_json(directory / "tokenizer_config.json", pad_token="<pad>", eos_token="<fim_suffix>")
    return directory


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_words(tmp_path_factory.mktemp("models") / "padded", 100)


@pytest.fixture(scope="module")
def engine(beyond: Path, padded: Path) -> Any:
    with LLMEngine.from_plugins() as engine:
        for source in (beyond, padded):
            engine.init_model(source.name, str(source), RuntimeConfig(weight_dtype="float32"))
        yield engine


def test_added_tokens_beyond_the_vocabulary_are_one_warning(beyond: Path) -> None:
    loaded = load(beyond)
    (warning,) = loaded.warnings
    assert "3 added tokens with ids from 131" in warning
    assert '"<pad>" (131), "<fim_prefix>" (132), "<fim_suffix>" (133)' in warning
    assert "pad_token" not in loaded.text.special_tokens
    assert "eos_token" not in loaded.text.special_tokens
    assert loaded.text.turn_end_ids == ()


def test_a_new_special_token_beyond_the_vocabulary_is_a_warning(place: Path) -> None:
    write_beside(place, {CONFIG: {"pad_token": "[PAD]"}})
    text, (warning,) = loaded_text(place, vocab_size=NEXT)
    assert '"[PAD]" (407)' in warning
    assert text.special_tokens == {}


def test_a_tokenizer_whose_own_vocabulary_is_larger_is_refused(place: Path) -> None:
    with pytest.raises(ModelError, match=r"ids up to 403, but vocab_size in config\.json is 403"):
        loaded_text(place, vocab_size=403)


@pytest.mark.parametrize("prompt", ["t5 <fim_prefix> t7", [5, 132, 7]])
def test_only_a_prompt_with_a_token_beyond_the_vocabulary_is_refused(
    prompt: str | list[int], engine: LLMEngine
) -> None:
    with pytest.raises(RequestError, match=r"132 \('<fim_prefix>'\) in the prompt is outside"):
        engine.generate("beyond", prompt)
    assert engine.generate_result("beyond", "t5 t7", GenerateConfig(max_new_tokens=1)).token_ids


@pytest.mark.parametrize(
    "settings",
    [{"stop_token_ids": [131]}, {"logit_bias": {131: 1.0}}],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_with_a_token_beyond_the_vocabulary_are_refused(
    settings: dict[str, Any], engine: LLMEngine
) -> None:
    with pytest.raises(
        RequestError, match=rf"131 \('<pad>'\) in {next(iter(settings))} is outside"
    ):
        engine.generate("beyond", [5], GenerateConfig(**settings))


def test_embeddings_without_a_token_run_as_in_transformers(padded: Path, engine: LLMEngine) -> None:
    prompt = [5, 100, 130, 7]
    oracle = AutoModelForCausalLM.from_pretrained(padded, dtype=torch.float32)
    expected = oracle.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)
    settings = GenerateConfig(max_new_tokens=8, temperature=0)
    found = engine.generate_result("padded", prompt, settings)
    assert list(found.token_ids) == expected[0, len(prompt) :].tolist()


def test_an_embedding_without_a_token_has_no_text_and_can_be_biased_and_end_a_text(
    engine: LLMEngine,
) -> None:
    settings = GenerateConfig(max_new_tokens=3, temperature=0, logit_bias={120: 1000.0})
    found = engine.generate_result("padded", [5], settings)
    assert (found.token_ids, found.text) == ((120, 120, 120), "")
    stopped = engine.generate_result(
        "padded", [5], GenerateConfig(stop_token_ids=(120,)).over(settings)
    )
    assert (stopped.token_ids, stopped.finish_reason) == ((120,), "stop")


@pytest.mark.parametrize("vocab_size", [NEXT - 1, 500])
def test_a_choice_is_spelled_with_tokens_that_have_embeddings(vocab_size: int, place: Path) -> None:
    write_beside(place, {})
    text = Text(loaded_text(place, vocab_size)[0])
    found = read_vocabulary(text, vocab_size, ()).later
    assert max(found.bytes_of) == min(vocab_size, NEXT) - 1
    assert ("数学".encode() in found.ids) == (vocab_size == 500)  # the last token
