"""Loader ``gguf`` against the models that were written, transformers and llama.cpp."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch
from checkout import ROOT
from conformance import run
from gguf_files import (
    Kind,
    bpe_text,
    header_of,
    load,
    load_checked,
    logits,
    stored,
    tensors_of,
    word_text,
    write,
    write_file,
)
from reference_models import CONFIGS, prompts, random_model
from texts import CHOSEN, random_texts
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.integrations.gguf import dequant

import tilewright_gguf.loader
from tilewright import plugins
from tilewright.cli import main
from tilewright.errors import ModelError
from tilewright.types import LoadedModel, RopeConfig
from tilewright.weights import StoredRows
from tilewright_gguf.loader import can_load
from tilewright_gguf.tokenizer import ENDS, SPLITTINGS
from tilewright_gguf.weights import QUANTISED
from tilewright_testing import LoaderSuite
from tilewright_testing.samples import write_gguf

TOLERANCE = 1e-4


# --- configuration and weights --------------------------------------------------------------------

NOT_IN_GGUF = {
    "qwen3-some-layers-slide": "a window for some layers",
    "llama-yarn-mscale": "mscale",
    "qwen3-dynamic-past-the-end": "dynamic RoPE",
    "qwen2-dynamic-past-the-end": "dynamic RoPE",
    "llama-dynamic-within": "dynamic RoPE",
}
"""What the converter has no key for."""

NOT_IN_LLAMA_CPP = {
    "qwen3-mqa-biases": "refuses biases of Qwen3",
    "qwen2-slides": "computes these architectures without a window",
    "mistral-slides": "likewise",
    "mistral-window-of-three": "likewise",
    "qwen2-yarn-factor": "does not read YaRN's betas and attention factor of these architectures",
}

WRITTEN = [name for name in CONFIGS if name not in NOT_IN_GGUF]


@pytest.mark.parametrize("name", WRITTEN)
def test_a_written_model_is_read_back_and_has_the_logits_of_transformers(
    name: str, tmp_path: Path
) -> None:
    model = random_model(CONFIGS[name]).float()  # a model that was saved in 16 bits changes CONFIGS
    loaded = load_checked(write(model, tmp_path / "model.gguf"))
    expected = model.state_dict()
    for tensor in loaded.weights.names():
        assert torch.equal(loaded.weights.get(tensor), expected[tensor]), tensor
    (prompt,) = prompts(model.config, [41])
    with torch.inference_mode():
        of_transformers = model(torch.tensor([prompt])).logits[0]
    torch.testing.assert_close(logits(loaded, prompt), of_transformers, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", [name for name in WRITTEN if name not in NOT_IN_LLAMA_CPP])
def test_logits_match_llama_cpp(name: str, tmp_path: Path) -> None:
    from llama_cpp import LlamaCpp

    path = write(random_model(CONFIGS[name]), tmp_path / "model.gguf")
    (prompt,) = prompts(CONFIGS[name], [41])
    (step,) = LlamaCpp(path).greedy(prompt, 1, CONFIGS[name].vocab_size)
    ours = logits(load(path), prompt)[-1].log_softmax(-1)
    assert len(step.top) == CONFIGS[name].vocab_size
    for token, logprob in step.top.items():
        assert abs(ours[token].item() - logprob) < TOLERANCE


def small(make: type[PreTrainedConfig], **more: Any) -> PreTrainedConfig:
    """A shape that transformers reads from GGUF, with rows of whole blocks."""
    return make(
        vocab_size=80,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        **more,
    )


FAMILIES = {
    "llama": small(LlamaConfig, rms_norm_eps=1e-5),
    "qwen2": small(Qwen2Config, tie_word_embeddings=True),
    "qwen3": small(Qwen3Config, head_dim=128),
}
WRITABLE = [Kind.F32, Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0]


@pytest.mark.parametrize("kind", WRITABLE, ids=lambda kind: kind.name)
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_and_logits_match_transformers_on_the_same_file(
    family: str, kind: Kind, tmp_path: Path
) -> None:
    path = write(random_model(FAMILIES[family]), tmp_path / "model.gguf", kind)
    loaded = load_checked(path)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    )
    expected = theirs.state_dict()
    for name in loaded.weights.names():
        info, tensor = loaded.weights.info(name), loaded.weights.get(name)
        assert info.shape == tuple(tensor.shape)
        assert info.dtype == str(tensor.dtype).removeprefix("torch.")
        assert info.nbytes == tensor.nbytes
        assert torch.equal(tensor.float(), expected[name].float()), name
    (prompt,) = prompts(theirs.config, [30])
    with torch.inference_mode():
        of_transformers = theirs(torch.tensor([prompt])).logits[0]
    torch.testing.assert_close(logits(loaded, prompt), of_transformers, rtol=0, atol=TOLERANCE)


FIVE_BITS = ("Q5_0", "Q5_1")
IN_TRANSFORMERS = [k for k in QUANTISED if k.value in dequant._DEQUANT or k.name in FIVE_BITS]


@pytest.mark.parametrize("kind", IN_TRANSFORMERS, ids=lambda kind: kind.name)
def test_random_blocks_are_dequantised_correctly(kind: Kind, tmp_path: Path) -> None:
    columns, rows = 512, 24
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(0).integers(0, 256, (rows, columns // block * block_bytes), "u1")
    if kind.name in FIVE_BITS:
        expected = five_bits(raw, kind, columns)
    else:
        expected = dequant.dequantize(torch.from_numpy(raw), kind.value).view(rows, columns)
    config = small(LlamaConfig)
    config.intermediate_size, config.hidden_size, config.head_dim = columns, rows, 16
    model = random_model(config)
    path = tmp_path / "model.gguf"
    tensors = {name: stored(values) for name, values in tensors_of(model).items()}
    tensors["blk.0.ffn_down.weight"] = (raw, kind)
    write_file(path, header_of(model) | word_text(80), tensors)
    found = load_checked(path).weights.get("model.layers.0.mlp.down_proj.weight")
    # A scale may be any bit pattern, so some are not finite.
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-30, equal_nan=True)
    assert found.isfinite().float().mean() > 0.5
    rows = StoredRows(load(path).weights, "model.layers.0.mlp.down_proj.weight")
    assert torch.equal(rows[3:20].nan_to_num(), found[3:20].nan_to_num())
    interleaved = StoredRows(load(path).weights, "model.layers.0.self_attn.q_proj.weight")
    whole = load(path).weights.get("model.layers.0.self_attn.q_proj.weight")
    assert torch.equal(interleaved[1:9], whole[1:9])


def five_bits(raw: npt.NDArray[np.uint8], kind: Kind, columns: int) -> torch.Tensor:
    """A block holds the scale, the minimum (Q5_1 only), 32 high bits, and 16 bytes of low nibbles:
    those of elements 0 to 15, then those of 16 to 31."""
    values = []
    for block in raw.reshape(-1, 22 if kind is Kind.Q5_0 else 24):
        *head, scale_end = [2] if kind is Kind.Q5_0 else [2, 4]
        scale = np.float32(block[:2].view(np.float16)[0])
        least = np.float32(block[2:4].view(np.float16)[0]) if head else None
        high = int(block[scale_end : scale_end + 4].view("<u4")[0])
        low = block[scale_end + 4 :]
        for i in range(32):
            nibble = int(low[i % 16]) >> (4 * (i // 16)) & 15
            number = np.float32(nibble | (high >> i & 1) << 4)
            with np.errstate(all="ignore"):
                values.append(scale * (number - 16) if least is None else scale * number + least)
    return torch.from_numpy(np.array(values, np.float32).reshape(-1, columns))


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(Kind.F16, "float16"), (Kind.BF16, "bfloat16"), (Kind.F32, "float32"), (Kind.Q8_0, "float32")],
    ids=lambda value: getattr(value, "name", value),
)
def test_unquantised_tensors_keep_their_dtype(kind: Kind, dtype: str, tmp_path: Path) -> None:
    loaded = load_checked(write(random_model(FAMILIES["llama"]), tmp_path / "model.gguf", kind))
    assert loaded.config.dtype == dtype
    assert loaded.weights.info("lm_head.weight").dtype == dtype
    assert loaded.weights.info("model.norm.weight").dtype == "float32"


def test_tensors_are_read_only_on_request(tmp_path: Path) -> None:
    path = write(random_model(FAMILIES["llama"]), tmp_path / "model.gguf", Kind.Q8_0)
    loaded = load_checked(path)
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size // 2)
        file.write(bytes(size - size // 2))
    last = max(gguf.GGUFReader(path).tensors, key=lambda tensor: tensor.data_offset)
    assert last.name == "output.weight"
    assert not loaded.weights.get("lm_head.weight").any()


def test_tensors_outlive_their_source(tmp_path: Path) -> None:
    path = write(random_model(FAMILIES["llama"]), tmp_path / "model.gguf")
    loaded = load_checked(path)
    tensor = loaded.weights.get("lm_head.weight")
    before = tensor.clone()
    loaded.weights.close()
    loaded.weights.close()
    with pytest.raises(ModelError, match="closed"):
        loaded.weights.get("lm_head.weight")
    assert torch.equal(tensor, before)
    tensor.zero_()  # the file stays as it is
    assert torch.equal(load(path).weights.get("lm_head.weight"), before)


@pytest.mark.parametrize("shards", [2, 5])
def test_shards_are_found_beside_the_first(shards: int, tmp_path: Path) -> None:
    model = random_model(FAMILIES["qwen3"])
    first = write(model, tmp_path / "model.gguf", Kind.Q4_0, shards=shards)
    whole = load_checked(write(model, tmp_path / "whole.gguf", Kind.Q4_0))
    loaded = load_checked(first)
    assert loaded.config == whole.config
    for name in whole.weights.names():
        assert torch.equal(loaded.weights.get(name), whole.weights.get(name))
    second = next(tmp_path.glob(f"model-00002-of-0000{shards}.gguf"))
    with pytest.raises(ModelError, match=f"shard 2 of {shards}; load the first one, {first.name}"):
        load(second)
    second.unlink()
    with pytest.raises(ModelError, match=f"1 of its {shards} shards .*{second.name}"):
        load(first)
    first.rename(second)
    os.link(second, first)
    with pytest.raises(ModelError, match=r"expected shard 2 of \d by its name"):
        load(first)


def test_shards_of_different_models_are_refused(tmp_path: Path) -> None:
    first = write(random_model(FAMILIES["qwen3"]), tmp_path / "model.gguf", shards=2)
    other = tmp_path / "other"
    other.mkdir()
    write(random_model(FAMILIES["llama"]), other / "model.gguf", shards=2)
    second = first.name.replace("00001-of", "00002-of")
    os.replace(other / second, tmp_path / second)
    with pytest.raises(ModelError, match="model-0000"):
        load_checked(first)


# --- RoPE -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("original", "factor", "low", "high", "theta", "head_dim"),
    [
        (8192, 8.0, 1.0, 4.0, 500000.0, 128),
        (8192, 32.0, 1.0, 4.0, 500000.0, 64),
        (4096, 4.0, 1.0, 4.0, 10000.0, 128),
        (1000, 3.0, 0.5, 7.0, 10000.0, 64),
        (32, 8.0, 1.0, 4.0, 500000.0, 16),
        (100, 2.0, 1.0, 1.5, 10000.0, 4),
    ],
)
def test_llama3_scaling_is_recovered_from_its_factors(
    original: int, factor: float, low: float, high: float, theta: float, head_dim: int,
    tmp_path: Path,
) -> None:  # fmt: skip
    rope = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
    config = small(LlamaConfig, rope_parameters=rope, head_dim=head_dim)
    model = random_model(config)
    loaded = load_checked(write(model, tmp_path / "model.gguf"))
    from tilewright.rope import frequencies

    found, scale = frequencies(loaded.config)
    torch.testing.assert_close(found, model.model.rotary_emb.inv_freq, rtol=1e-5, atol=0)
    assert scale == 1.0
    if original == 8192:
        assert loaded.config.rope == RopeConfig(
            theta=theta,
            kind="llama3",
            factor=factor,
            low_freq_factor=low,
            high_freq_factor=high,
            original_max_position=original,
        )


@pytest.mark.parametrize(
    ("factors", "kind"), [([1.0] * 8, "default"), ([2.5] * 8, "linear")], ids=["ones", "equal"]
)
def test_equal_rope_factors_are_read_as_default_or_linear_scaling(
    factors: list[float], kind: str, tmp_path: Path
) -> None:
    loaded = load(with_factors(tmp_path, factors))
    assert loaded.config.rope.kind == kind
    assert loaded.config.rope.factor == factors[0]


@pytest.mark.parametrize(
    "factors",
    [
        [1.0, 2.0, 1.0, 4.0, 8.0, 8.0, 8.0, 8.0],
        [1.0, 1.0, 1.5, 1.6, 1.61, 1.62, 8.0, 8.0],
        [0.0] * 8,
        [float("nan")] * 8,
        [float("inf")] * 8,
        [-1.0] * 8,
        [1.0] * 7,
    ],
    ids=["not monotone", "not a line", "zero", "nan", "infinite", "negative", "too few"],
)
def test_rope_factors_of_an_unknown_scaling_are_refused(
    factors: list[float], tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=r"model\.gguf: rope_freqs\.weight: expected"):
        load(with_factors(tmp_path, factors))


def with_factors(directory: Path, factors: list[float]) -> Path:
    model = random_model(FAMILIES["llama"])
    tensors = tensors_of(model) | {"rope_freqs.weight": np.array(factors, np.float32)}
    path = directory / "model.gguf"
    header = header_of(model) | word_text(80)
    write_file(path, header, {name: stored(values) for name, values in tensors.items()})
    return path


def test_float32_header_values_are_read_as_the_decimals_they_came_from(tmp_path: Path) -> None:
    config = small(
        LlamaConfig,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "linear", "rope_theta": 1e6, "factor": 1.1},
    )
    loaded = load(write(random_model(config), tmp_path / "model.gguf"))
    assert loaded.config.norm_eps == 1e-6
    assert loaded.config.rope == RopeConfig(theta=1e6, kind="linear", factor=1.1)


# --- the tokenizer --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    """Trained on text with few splits, so that a different pre-tokenizer gives different tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_lines(), trainer)
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return tokenizer


def training_lines() -> list[str]:
    prose = (ROOT / "docs/design.md").read_text() + (ROOT / "tests/support/texts.py").read_text()
    return [*prose.splitlines(), *random_texts(50, seed=1), *CHOSEN * 3]


def with_tokenizer(directory: Path, text: dict[str, Any]) -> Path:
    config = LlamaConfig(
        vocab_size=len(text["tokenizer.ggml.tokens"]),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    return write(random_model(config), directory / "model.gguf", text=text)


TEXTS = [*CHOSEN, *random_texts(200)]
WITHOUT_MARKS = [text for text in TEXTS if "\u0301" not in text]


@pytest.mark.parametrize("pre", SPLITTINGS)
def test_token_ids_match_llama_cpp(pre: str, byte_level: Tokenizer, tmp_path: Path) -> None:
    from llama_cpp import LlamaCpp

    text = bpe_text(byte_level.to_str(), pre, bos_token_id=1, eos_token_id=2)
    path = with_tokenizer(tmp_path, text)
    tokenizer, theirs = load(path).text.tokenizer, LlamaCpp(path)
    # llama.cpp does not compose marks, as the tokenizer of Qwen2 does, and does not count them as
    # letters, as that of Mistral does.
    for text in WITHOUT_MARKS if pre in ("qwen2", "tekken") else TEXTS:
        assert tokenizer.encode(text).ids == theirs.tokenize(text), text


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "tekken", "deepseek-r1-qwen", "gpt-2"])
def test_token_ids_match_transformers(pre: str, byte_level: Tokenizer, tmp_path: Path) -> None:
    text = bpe_text(byte_level.to_str(), pre, bos_token_id=1, eos_token_id=2)
    path = with_tokenizer(tmp_path, text)
    ours = load(path).text.tokenizer
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    for text in WITHOUT_MARKS if pre == "qwen2" else TEXTS:
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == theirs.encode(text, add_special_tokens=False), text
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)


def test_the_qwen2_tokenizer_composes_marks(byte_level: Tokenizer, tmp_path: Path) -> None:
    path = with_tokenizer(tmp_path, bpe_text(byte_level.to_str(), "qwen2"))
    tokenizer = load(path).text.tokenizer
    assert tokenizer.encode("e\u0301").ids == tokenizer.encode("\u00e9").ids


@pytest.fixture(scope="module")
def sentence_piece() -> dict[str, Any]:
    """The keys of a SentencePiece BPE tokenizer: scores give the order of merges."""
    tokenizer = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=900, show_progress=False, max_token_length=16)
    lines = ["▁" + line.replace(" ", "▁") for line in training_lines() if line]
    tokenizer.train_from_iterator(lines, trainer)
    saved = json.loads(tokenizer.to_str())["model"]
    merged = list(dict.fromkeys(left + right for left, right in saved["merges"]))
    pieces = merged + [token for token in saved["vocab"] if token not in set(merged)]
    values = {
        "model": "llama",
        "tokens": ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *pieces],
        "token_type": [2, 3, 3, *[6] * 256, *[1] * len(pieces)],
        "scores": [0.0] * 259 + [-float(i) for i in range(len(pieces))],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        "add_bos_token": True,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()}


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_token_ids_match_llama_cpp(
    prefix: bool, sentence_piece: dict[str, Any], tmp_path: Path
) -> None:
    from llama_cpp import LlamaCpp

    text = sentence_piece | {"tokenizer.ggml.add_space_prefix": prefix}
    path = with_tokenizer(tmp_path, text)
    tokenizer, theirs = load(path).text.tokenizer, LlamaCpp(path)
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        assert ids == theirs.tokenize(text), text
        if "<" not in text:
            assert tokenizer.decode(ids) == text


def test_special_and_added_tokens_are_read_and_unused_ones_dropped(
    byte_level: Tokenizer, tmp_path: Path
) -> None:
    text = bpe_text(byte_level.to_str(), "qwen2", bos_token_id=0, eos_token_id=2)
    unused = len(text["tokenizer.ggml.tokens"])
    text["tokenizer.ggml.tokens"] += ["[PAD1]", "[PAD2]"]
    text["tokenizer.ggml.token_type"] += [5, 5]
    text["tokenizer.chat_template"] = "{{ bos_token }}{{ messages[0].content }}"
    text["tokenizer.chat_template.tool_use"] = "{{ tools }}"
    loaded = load(with_tokenizer(tmp_path, text))
    tokenizer = loaded.text.tokenizer
    think = tokenizer.token_to_id("<think>")
    assert tokenizer.encode("<|im_end|><think>").ids == [2, think]
    assert tokenizer.decode([2, think]) == "<think>"
    assert tokenizer.token_to_id("[PAD1]") is None
    assert tokenizer.decode([unused]) == ""
    assert loaded.config.vocab_size == unused + 2
    assert loaded.text.chat_template == "{{ bos_token }}{{ messages[0].content }}"
    assert loaded.text.tool_chat_template == "{{ tools }}"
    assert loaded.text.special_tokens == {
        "bos_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
    }


QWEN_CODE, STAR_CODE = {"<|fim_pad|>", "<|repo_name|>"}, {"<fim_pad>", "<reponame>"}


@pytest.mark.parametrize("absent", [QWEN_CODE, STAR_CODE], ids=["star", "qwen"])
def test_texts_end_at_the_tokens_at_which_they_end_in_llama_cpp(
    absent: set[str], byte_level: Tokenizer, tmp_path: Path
) -> None:
    from llama_cpp import LlamaCpp

    tokenizer = Tokenizer.from_str(byte_level.to_str())
    names = [*sorted(ENDS - absent), "<|tool_call|>", "<|im_sep|>", "<file_sep>", "</s>"]
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in names])
    path = with_tokenizer(tmp_path, bpe_text(tokenizer.to_str(), "qwen2", eos_token_id=2))
    ends, theirs = load(path).config.eos_token_ids, LlamaCpp(path)
    ids = {name: tokenizer.token_to_id(name) for name in names}
    assert {n for n, i in ids.items() if i in ends} == {
        n for n, i in ids.items() if theirs.ends_with(i)
    }


def test_all_end_tokens_are_found(byte_level: Tokenizer, tmp_path: Path) -> None:
    def ends(**ids: int) -> tuple[int, ...]:
        path = with_tokenizer(tmp_path, bpe_text(byte_level.to_str(), "qwen2", **ids))
        return load(path).config.eos_token_ids

    assert ends(eos_token_id=2) == (2, 0)  # <|endoftext|> by its name
    assert ends() == (0, 2)
    assert ends(eos_token_id=9, eot_token_id=8, eom_token_id=9) == (9, 8, 0, 2)


@pytest.mark.parametrize(
    ("settings", "around"),
    [
        ({}, ([], [])),
        ({"add_bos_token": True}, ([1], [])),
        ({"add_eos_token": True}, ([], [2])),
        ({"add_bos_token": True, "add_eos_token": True}, ([1], [2])),
        ({"pre": "llama-bpe"}, ([1], [])),
        ({"pre": "llama-bpe", "add_bos_token": False}, ([], [])),
    ],
)
def test_bos_and_eos_are_added_to_a_prompt_as_the_file_says(
    settings: dict[str, Any],
    around: tuple[list[int], list[int]],
    byte_level: Tokenizer,
    tmp_path: Path,
) -> None:
    text = bpe_text(
        byte_level.to_str(), **({"pre": "qwen2", "bos_token_id": 1, "eos_token_id": 2} | settings)
    )
    tokenizer = load(with_tokenizer(tmp_path, text)).text.tokenizer
    plain = tokenizer.encode("some text", add_special_tokens=False).ids
    assert tokenizer.encode("some text").ids == [*around[0], *plain, *around[1]]


def test_missing_parts_of_a_tokenizer_are_a_warning(byte_level: Tokenizer, tmp_path: Path) -> None:
    text = bpe_text(byte_level.to_str(), "qwen2")
    assert load(with_tokenizer(tmp_path, text)).warnings == ()
    text["tokenizer.ggml.pre"] = None
    (warning,) = load(with_tokenizer(tmp_path, text)).warnings
    assert "tokenizer.ggml.pre is missing" in warning
    (warning,) = load(with_tokenizer(tmp_path, word_text(80))).warnings
    assert "has no tokens for 254 of 256 bytes" in warning


def test_recommended_sampling_settings_are_read(tmp_path: Path) -> None:
    model = random_model(FAMILIES["llama"])
    sampling = {"temp": 0.6, "top_k": 20, "top_p": 0.95}
    changed = {f"general.sampling.{key}": value for key, value in sampling.items()}
    given = load(write(model, tmp_path / "given.gguf", changed=changed)).generation_defaults
    assert (given.temperature, given.top_k, given.top_p) == (0.6, 20, 0.95)
    assert load(write(model, tmp_path / "none.gguf")).generation_defaults.temperature is None


# --- the loader plugin ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("gguf")
    return write(random_model(FAMILIES["llama"]), directory / "model.gguf", Kind.Q8_0)


def test_the_loader_is_installed_and_lists_its_tensor_types() -> None:
    plugin = plugins.load(plugins.find("loader", "gguf"))
    info = plugins.call(plugin, "plugin_info")
    assert "Q6_K" in info.limits["tensor types"]


def test_can_load_checks_the_name_or_the_first_four_bytes(file: Path, tmp_path: Path) -> None:
    unnamed = tmp_path / "blob"
    unnamed.write_bytes(b"GGUF")
    other = tmp_path / "model.bin"
    other.write_bytes(b"PK")
    empty = tmp_path / "empty"
    empty.touch()
    pipe = tmp_path / "pipe.gguf"
    os.mkfifo(pipe)
    assert can_load(str(file))
    assert can_load(str(unnamed))
    for source in (other, empty, pipe, tmp_path, tmp_path / "absent.gguf", "nul\0byte", ""):
        assert not can_load(str(source)), source


def test_a_home_directory_is_expanded(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(file.parent))
    assert can_load("~/model.gguf")
    assert load("~/model.gguf").source == str(file)


def test_sources_that_are_not_a_gguf_file_are_refused(file: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "weights.bin").write_bytes(b"PK\3\4 and more")
    (tmp_path / "pointer.gguf").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "empty.gguf").touch()
    (tmp_path / "link.gguf").symlink_to("blobs/1")
    os.mkfifo(tmp_path / "pipe.gguf")
    sources = {
        str(tmp_path / "absent.gguf"): "No such file",
        str(tmp_path / "link.gguf"): "No such file",
        str(tmp_path / "pipe.gguf"): "expected a file, found a device",
        "Qwen/Qwen3-0.6B-GGUF": "local .gguf file",
        "nul\0byte": "null byte",
        str(tmp_path): "give one of the files in it: 'empty.gguf', 'link.gguf', ",
        str(tmp_path / "empty"): "found none in it",
        str(tmp_path / "weights.bin"): "expected a GGUF file",
        str(tmp_path / "pointer.gguf"): "git lfs pull",
        str(tmp_path / "empty.gguf"): "an empty file",
    }
    for source, why in sources.items():
        with pytest.raises(ModelError) as error:
            load(source)
        assert why in str(error.value)
        assert "\n" not in str(error.value)


def test_a_weight_format_is_refused(file: Path) -> None:
    with pytest.raises(
        ModelError, match="takes no weight format, found 'safetensors'; leave it out"
    ):
        load(file, weight_format="safetensors")


def test_hf_local_refuses_a_gguf_file_and_names_the_loader(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "--loader", "hf-local", "--model", str(file), "Hi"]) == 2
    assert "--loader gguf" in capsys.readouterr().err


def test_the_command_line_generates_and_refuses_a_truncated_file(
    byte_level: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = bpe_text(byte_level.to_str(), "qwen2", eos_token_id=2)
    path = with_tokenizer(tmp_path, text)
    command = ["generate", "--loader", "gguf", "--model", str(path), "--max-new-tokens", "5"]
    assert main([*command, "--temperature", "0", "--ignore-eos", "--json", "Hello"]) == 0
    result = json.loads(capsys.readouterr().out)
    loaded: LoadedModel = load(path)
    ids = loaded.text.tokenizer.encode("Hello").ids
    for token in result["token_ids"]:
        assert token == logits(loaded, ids)[-1].argmax().item()
        ids.append(token)
    piped = subprocess.run(
        [sys.executable, "-m", "tilewright", *command, "--temperature", "0", "--ignore-eos", "-"],
        input=b"Hello",
        capture_output=True,
        check=True,
    )
    # Compared as bytes, since the tokens may contain a carriage return.
    assert piped.stdout.decode().rstrip("\n") == result["text"].rstrip("\n")
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(path.read_bytes()[:5000])
    assert main([*command[:-3], str(broken), "Hello"]) == 2
    message = capsys.readouterr().err
    assert "truncated" in message
    assert len(message.strip().splitlines()) == 1


def test_the_loader_passes_the_conformance_suite(tmp_path: Path) -> None:
    path = write(
        random_model(FAMILIES["llama"]),
        tmp_path / "model.gguf",
        Kind.Q5_1,
        changed={"tokenizer.chat_template": "{{ messages[0].content }}"},
    )
    found = run(LoaderSuite, tilewright_gguf.loader, source=path).found
    assert {name: outcome for name, outcome in found.items() if outcome != "passed"} == {
        "test_the_loaded_model_matches_the_expected_one": "skipped",  # tested above
        "test_a_named_weight_format_opens_the_weights": "skipped",  # takes none
    }


def test_the_sample_of_the_suite_loads_and_runs(tmp_path: Path) -> None:
    loaded = load_checked(str(write_gguf(tmp_path).source))
    assert logits(loaded, loaded.text.tokenizer.encode("hello world").ids).isfinite().all()


def test_importing_the_loader_imports_no_heavy_library() -> None:
    code = "import sys, tilewright_gguf.loader; print(sorted(HEAVY & {*sys.modules}))"
    code = code.replace("HEAVY", "{'torch', 'numpy', 'gguf', 'tokenizers'}")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- files as they are found ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["TQ1_0", "TQ2_0", "MXFP4"])
def test_ternary_and_mxfp4_matrices_are_dequantised_as_the_gguf_library_quantised_them(
    kind: str, tmp_path: Path
) -> None:
    config = small(LlamaConfig)
    config.intermediate_size = 256  # a whole block
    model = random_model(config)
    path = write(model, tmp_path / "model.gguf", Kind[kind])
    ours = load_checked(path).weights.get("model.layers.0.mlp.down_proj.weight")
    theirs = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.0.ffn_down.weight")
    assert theirs.tensor_type.name == kind
    expected = gguf.quants.dequantize(theirs.data, theirs.tensor_type)
    assert torch.equal(ours, torch.from_numpy(expected))


LOW_BITS = ["Q2_K", "Q3_K", "IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"]
LOW_BITS += ["IQ4_NL", "IQ4_XS", "MXFP4", "TQ1_0", "TQ2_0"]


@pytest.mark.parametrize("name", LOW_BITS)
def test_logits_of_low_bit_matrices_match_llama_cpp(name: str, tmp_path: Path) -> None:
    """The bytes of the blocks are random, their scales are small."""
    from llama_cpp import LlamaCpp

    kind, config = Kind[name], small(LlamaConfig)
    config.intermediate_size = 256
    model = random_model(config)
    tensors = {name: stored(values) for name, values in tensors_of(model).items()}
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    rows = tensors["blk.0.ffn_down.weight"][0].shape[0]
    raw = np.random.default_rng(0).integers(0, 256, (rows * 256 // block, block_bytes), "u1")
    scale = np.array([0.01], np.float16).view("u1")
    match name:
        case "MXFP4":
            raw[:, 0] = 120  # a power of two, as its biased exponent
        case "Q2_K":
            raw[:, -4:-2] = raw[:, -2:] = scale
        case "Q3_K" | "TQ1_0" | "TQ2_0":
            raw[:, -2:] = scale
        case _:
            raw[:, :2] = scale
    tensors["blk.0.ffn_down.weight"] = (raw.reshape(rows, -1), kind)
    path = tmp_path / "model.gguf"
    write_file(path, header_of(model) | word_text(80), tensors)
    (prompt,) = prompts(config, [41])
    (step,) = LlamaCpp(path).greedy(prompt, 1, 80)
    ours = logits(load_checked(path), prompt)[-1].log_softmax(-1)
    for token, logprob in step.top.items():
        assert abs(ours[token].item() - logprob) < 0.15  # llama.cpp quantises the activations too
    tensors["blk.0.ffn_down.weight"] = (np.zeros_like(raw).reshape(rows, -1), kind)
    write_file(path, header_of(model) | word_text(80), tensors)
    without = logits(load_checked(path), prompt)[-1].log_softmax(-1)
    assert (without - ours).abs().max() > 0.5, "the matrix makes too little difference"


@pytest.mark.parametrize("name", ["NVFP4", "Q8_K", "F64", "I8"])
def test_a_type_that_cannot_be_dequantised_is_named(name: str, tmp_path: Path) -> None:
    kind, model = Kind[name], random_model(small(LlamaConfig))
    tensors = {name: stored(values) for name, values in tensors_of(model).items()}
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    plain = {"F64": np.float64, "I8": np.int8}
    values = np.zeros((4, 256 // block * block_bytes), np.uint8)
    if name in plain:
        values = np.zeros((4, 256), plain[name])
    tensors["blk.0.ffn_up.weight"] = values, kind
    write_file(tmp_path / "model.gguf", header_of(model) | word_text(80), tensors)
    with pytest.raises(ModelError, match=rf"1 of \d+ tensors .* {name} \(first blk.0.ffn_up"):
        load(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("family", "name", "size", "said"),
    [
        ("qwen2", "output.bias", 80, "has output.bias, a bias of the head"),
        ("llama", "blk.1.ffn_up.bias", 96, "missing: model.layers.0.mlp.gate_proj.bias"),
        ("llama", "blk.1.attn_k.bias", 32, "missing: model.layers.0.self_attn.q_proj.bias"),
    ],
)
def test_a_bias_that_llama_cpp_adds_is_not_left_out(
    family: str, name: str, size: int, said: str, tmp_path: Path
) -> None:
    from llama_cpp import LlamaCpp

    model, path = random_model(FAMILIES[family]), tmp_path / "model.gguf"
    tensors = {name: stored(values) for name, values in tensors_of(model).items()}
    write_file(path, header_of(model) | word_text(80), tensors)
    (without,) = LlamaCpp(path).greedy([5, 6, 7], 1, 80)
    tensors[name] = stored(np.linspace(-3, 3, size).astype(np.float32))
    write_file(path, header_of(model) | word_text(80), tensors)
    (biased,) = LlamaCpp(path).greedy([5, 6, 7], 1, 80)
    assert max(abs(biased.top[token] - p) for token, p in without.top.items()) > 1e-3
    with pytest.raises(ModelError, match=said):
        load_checked(path)


def test_scales_beside_the_weights_are_refused(tmp_path: Path) -> None:
    model = random_model(small(LlamaConfig))
    tensors = {name: stored(values) for name, values in tensors_of(model).items()}
    tensors["blk.0.ffn_up.scale"] = stored(np.ones(1, np.float32))
    write_file(tmp_path / "model.gguf", header_of(model) | word_text(80), tensors)
    with pytest.raises(ModelError, match=r"1 tensors are scales .* \(first blk.0.ffn_up.scale\)"):
        load(tmp_path / "model.gguf")


@pytest.mark.parametrize("name", ["bos", "eos", "padding", "unknown", "seperator", "eot"])
@pytest.mark.parametrize("value", [80, -1, np.uint32(2**32 - 1), np.uint64(2**64 - 1)])
def test_special_ids_outside_the_vocabulary_are_a_warning(
    name: str, value: Any, tmp_path: Path
) -> None:
    key = f"tokenizer.ggml.{name}_token_id"
    path = write(random_model(FAMILIES["qwen2"]), tmp_path / "m.gguf", changed={key: value})
    loaded = load_checked(path)
    found = [w for w in loaded.warnings if key in w]
    assert found == [
        f"{path}: {key!r} is {int(value)}; the vocabulary has ids 0 to 79, and it is ignored"
    ]
    assert loaded.config.bos_token_id == (None if name == "bos" else 1)
    assert loaded.config.eos_token_ids == (() if name == "eos" else (2,))


@pytest.mark.parametrize("bos", [None, 300, 99_999, np.uint32(2**32 - 1)], ids=str)
def test_a_sentencepiece_vocabulary_without_a_bos_id_begins_as_in_llama_cpp(
    bos: int | None, sentence_piece: dict[str, Any], tmp_path: Path
) -> None:
    from llama_cpp import LlamaCpp

    text = sentence_piece | {"tokenizer.ggml.bos_token_id": bos}
    count = len(text["tokenizer.ggml.tokens"])
    config = small(LlamaConfig)
    config.vocab_size = count
    path = write(random_model(config), tmp_path / "model.gguf", text=text)
    loaded = load_checked(path)
    assert loaded.text.tokenizer.encode("the quick").ids == LlamaCpp(path).tokenize("the quick")
    warned = [w for w in loaded.warnings if "bos_token_id" in w]
    assert len(warned) == (bos is not None and bos >= count)


def test_recommended_sampling_settings_that_are_off_or_unsupported_are_a_warning(
    tmp_path: Path,
) -> None:
    sampling = {"temp": 0.5, "top_k": -1, "mirostat": 2, "xtc_probability": 0.0}
    changed = {f"general.sampling.{key}": value for key, value in sampling.items()}
    loaded = load(write(random_model(FAMILIES["qwen2"]), tmp_path / "m.gguf", changed=changed))
    assert loaded.generation_defaults.temperature == 0.5
    assert loaded.generation_defaults.top_k == 0
    assert any("general.sampling.mirostat" in w for w in loaded.warnings)
    assert not any("xtc" in w for w in loaded.warnings)


def test_the_rows_of_the_embedding_count_where_the_header_has_another_number(
    tmp_path: Path,
) -> None:
    model = random_model(FAMILIES["llama"])
    path = write(model, tmp_path / "m.gguf", changed={"llama.vocab_size": 88})
    loaded = load_checked(path)
    assert loaded.config.vocab_size == 80
    assert any("'llama.vocab_size' is 88; 80 is used" in w for w in loaded.warnings)


def test_a_tied_matrix_may_be_stored_as_the_head(tmp_path: Path) -> None:
    model = random_model(FAMILIES["qwen2"])
    assert model.config.tie_word_embeddings
    tensors = {name: stored(values) for name, values in tensors_of(model).items()}
    tensors["output.weight"] = tensors.pop("token_embd.weight")
    write_file(tmp_path / "head.gguf", header_of(model) | word_text(80), tensors)
    (prompt,) = prompts(model.config, [30])
    with torch.inference_mode():
        of_transformers = model.float()(torch.tensor([prompt])).logits[0]
    loaded = load_checked(tmp_path / "head.gguf")
    assert any("output.weight is used for both" in w for w in loaded.warnings)
    ours = logits(loaded, prompt)
    torch.testing.assert_close(ours, of_transformers, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({"general.type": "adapter"}, "merge this adapter into its model"),
        ({"general.type": "mmproj", "general.architecture": "clip"}, "encoder of images"),
        ({"general.type": "imatrix"}, "statistics for quantisation"),
        ({}, "no token_embd.weight; a file of the vocabulary alone"),
    ],
    ids=["adapter", "mmproj", "imatrix", "vocabulary"],
)
def test_files_that_are_not_a_model_are_named(
    header: dict[str, Any], said: str, tmp_path: Path
) -> None:
    model = random_model(FAMILIES["llama"])
    values = header_of(model) | word_text(80) | header
    write_file(tmp_path / "m.gguf", values, {"x": stored(np.zeros((4, 4), np.float32))})
    with pytest.raises(ModelError, match=said):
        load(tmp_path / "m.gguf")


@pytest.mark.parametrize("magic", [b"lmgg", b"fmgg", b"tjgg"])
def test_formats_before_gguf_are_named(magic: bytes, tmp_path: Path) -> None:
    (tmp_path / "ggml-model.bin").write_bytes(magic + bytes(100))
    assert can_load(str(tmp_path / "ggml-model.bin"))
    with pytest.raises(ModelError, match="a GGML file, which is older: convert the model again"):
        load(tmp_path / "ggml-model.bin")
