"""POST /v1/completions: from a body to texts to generate, and from these to the answer."""

import asyncio
from collections.abc import Sequence
from typing import Any

from attrs import evolve, frozen

from tilewright.async_engine import AsyncGeneration
from tilewright.types import GenerateDelta, GenerateResult, TokenLogprobs
from tilewright_serve.errors import ApiError
from tilewright_serve.fields import Completion
from tilewright_serve.generation import (
    Usage,
    finish_reason,
    generate_config,
    later_seeds,
    mean_logprob,
    stop_reason,
)
from tilewright_serve.logprobs import CompletionLogprobs
from tilewright_serve.server import Model, TextRequest

USUAL_MAX_TOKENS = 16
"""OpenAI's default."""


async def prepared(model: Model, body: Completion) -> "CompletionAnswer":
    """What is to be generated. Raises ApiError for a body that cannot be served."""
    if body.max_tokens == 0 and not body.echo:
        raise ApiError(
            400, "'max_tokens' = 0 needs echo = true, or nothing is returned", "max_tokens"
        )
    n = body.n or 1
    most = max(n, body.best_of or n)
    if body.best_of is not None and body.best_of < n:
        raise ApiError(400, f"'best_of' must be at least n = {n}, found {body.best_of}", "best_of")
    if most > n and body.stream:
        raise ApiError(400, "'best_of' above n cannot be streamed: set stream to false", "best_of")
    text = model.loaded.text
    given = body.prompt
    prompts: Sequence[Any] = [given]
    if not isinstance(given, str) and not isinstance(given[0], int):
        prompts = given
    special = body.add_special_tokens is not False

    def encoded() -> list[Sequence[int]]:
        return [text.encode(p, special) if isinstance(p, str) else p for p in prompts]

    ids = await asyncio.to_thread(encoded)
    config = generate_config(model, body, ids, body.max_tokens, USUAL_MAX_TOKENS, body.logprobs)
    if most > n and config.logprobs is None:
        config = evolve(config, logprobs=0)
    if body.echo and body.logprobs is not None:
        config = evolve(config, prompt_logprobs=body.logprobs)
    texts = [(ids[i // most], one) for i, one in enumerate(later_seeds(config, most * len(ids)))]
    return CompletionAnswer(
        model=model,
        body=body,
        texts=texts,
        prompts=prompts,
        num_each=n,
        texts_per_prompt=most,
        offsets=[CompletionLogprobs(text) for _ in texts],
    )


@frozen(kw_only=True, eq=False)
class CompletionAnswer:
    """An ``Answer`` (see generation)."""

    model: Model
    body: Completion
    texts: list[TextRequest]
    prompts: Sequence[str | list[int]]
    """For echo."""
    num_each: int
    """How many texts of a prompt are returned."""
    texts_per_prompt: int
    """How many are generated, of which the likeliest are returned."""
    offsets: list[CompletionLogprobs]

    kind = "cmpl"
    object = "text_completion"
    chunk_object = "text_completion"

    def begun(self, number: int, generation: AsyncGeneration) -> dict[str, Any] | None:
        """The prompt, as far as it is asked for."""
        if not self.body.echo and not self._with_ids:
            return None
        choice = self._choice(number, self._prompt(number) if self.body.echo else "")
        if self.body.echo and self.body.logprobs is not None:
            choice["logprobs"] = self.offsets[number].of(
                zip(self.texts[number][0], generation.prompt_logprobs, strict=True)
            )
        if self._with_ids:
            choice |= {"token_ids": [], "prompt_token_ids": list(self.texts[number][0])}
        return choice

    def added(self, number: int, delta: GenerateDelta) -> list[dict[str, Any]]:
        result = delta.result
        nothing = self.body.max_tokens == 0
        shown = not nothing and (
            delta.text or (delta.token_ids and (self.body.logprobs is not None or self._with_ids))
        )
        if not (shown or result):
            return []
        choice = self._choice(number, "" if nothing else delta.text)
        if shown and self.body.logprobs is not None:
            choice["logprobs"] = self._logprobs(number, delta.token_ids, delta.logprobs)
        if self._with_ids:
            choice["token_ids"] = [] if nothing else list(delta.token_ids)
        if result:
            choice |= self._end(result)
        return [choice]

    def whole(self, results: Sequence[GenerateResult]) -> list[dict[str, Any]]:
        choices = []
        for i in range(0, len(results), self.texts_per_prompt):
            group = list(range(i, i + self.texts_per_prompt))
            if self.texts_per_prompt > self.num_each:
                group.sort(key=lambda j: mean_logprob(results[j]), reverse=True)
            choices += [self._whole(j, results[j]) for j in group[: self.num_each]]
        return [choice | {"index": i} for i, choice in enumerate(choices)]

    def usage(self, results: Sequence[GenerateResult]) -> Usage:
        return Usage.of(results, self.texts_per_prompt, nothing=self.body.max_tokens == 0)

    def _whole(self, number: int, result: GenerateResult) -> dict[str, Any]:
        nothing = self.body.max_tokens == 0
        text = "" if nothing else result.text
        tokens, logprobs = ((), ()) if nothing else (result.token_ids, result.logprobs)
        choice = self._choice(number, text)
        if self.body.echo:
            choice["text"] = self._prompt(number) + text
        if self.body.logprobs is not None:
            found = list(zip(tokens, logprobs or (), strict=False))
            if self.body.echo:
                ids = result.prompt_token_ids
                found = [*zip(ids, result.prompt_logprobs or (), strict=True), *found]  # type: ignore[list-item]
            choice["logprobs"] = self.offsets[number].of(found)
        if self._with_ids:
            choice["token_ids"] = list(tokens)
            choice["prompt_token_ids"] = list(result.prompt_token_ids)
        return choice | self._end(result)

    def _prompt(self, number: int) -> str:
        given = self.prompts[number // self.texts_per_prompt]
        return given if isinstance(given, str) else self.model.loaded.text.decode(given)

    @property
    def _with_ids(self) -> bool:
        return bool(self.body.return_token_ids)

    def _logprobs(
        self, number: int, ids: Sequence[int], logprobs: Sequence[TokenLogprobs] | None
    ) -> dict[str, Any]:
        return self.offsets[number].of(zip(ids, logprobs or (), strict=True))

    def _choice(self, number: int, text: str) -> dict[str, Any]:
        return {"index": number, "text": text, "logprobs": None, "finish_reason": None}

    def _end(self, result: GenerateResult) -> dict[str, Any]:
        return {
            "finish_reason": finish_reason(result),
            "stop_reason": stop_reason(self.model, result),
        }
