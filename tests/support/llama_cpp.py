"""llama.cpp itself as an oracle, through xllamacpp's wheel. Importing this skips without it."""

import json
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from attrs import frozen

xllamacpp = pytest.importorskip("xllamacpp")


@frozen
class Step:
    """A greedy token, and the log-probabilities of the likeliest ones by token id."""

    token_id: int
    top: dict[int, float]


class LlamaCpp:
    """A model in llama.cpp: one sequence, no flash attention, keys and values in float32."""

    def __init__(self, path: Path | str, threads: int = 1):
        settings = xllamacpp.CommonParams()
        settings.model.path = str(path)
        settings.n_ctx = 512
        settings.n_parallel = 1
        settings.cpuparams.n_threads = threads
        settings.warmup = False
        settings.verbosity = -1
        settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        self._server = xllamacpp.Server(settings)

    def greedy(self, token_ids: Sequence[int], count: int, top: int) -> list[Step]:
        request = {
            "prompt": list(token_ids),
            "n_predict": count,
            "temperature": 0,
            "n_probs": top,
            "cache_prompt": False,
        }
        answer = self._server.handle_completions(request)
        return [
            Step(token["id"], {t["id"]: t["logprob"] for t in token["top_logprobs"]})
            for token in answer["choices"][0]["logprobs"]["content"]
        ]

    def ends_with(self, token_id: int) -> bool:
        """Whether a text ends at a token, which is made the likeliest one."""
        request = {
            "prompt": [5],
            "n_predict": 2,
            "temperature": 0,
            "logit_bias": [[token_id, 1e6]],
            "cache_prompt": False,
        }
        answer = self._server.handle_completions(request)
        found: bool = answer["choices"][0]["finish_reason"] == "stop"
        return found

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a prompt, including BOS; special tokens are parsed from their text."""
        content = {"content": text, "add_special": True, "parse_special": True}
        request = urllib.request.Request(
            f"{self._server.listening_address}/tokenize",
            json.dumps(content).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            tokens: dict[str, Any] = json.load(answer)
        found: list[int] = tokens["tokens"]
        return found
