"""What both generating endpoints share: settings of a text, its end, and what it used."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from attrs import evolve, frozen

from tilewright.async_engine import AsyncGeneration
from tilewright.errors import ConfigError
from tilewright.request import later_seed
from tilewright.types import GenerateConfig, GenerateDelta, GenerateResult
from tilewright_serve.errors import ApiError
from tilewright_serve.fields import ChatCompletion, Generation
from tilewright_serve.server import Model, TextRequest

STRUCTURED_OUTPUT = "structured-output"
"""The logits processor that holds a text to a grammar."""


_MOST_DIGITS = 20
"""Digits that a token id may not reach."""


class Answer(Protocol):
    """The texts that one request asks for, and how they are told to its client."""

    kind: str
    """What its id begins with."""
    object: str
    chunk_object: str

    @property
    def model(self) -> Model: ...

    @property
    def texts(self) -> Sequence[TextRequest]:
        """In the order of their numbers, those of a prompt next to each other."""
        ...

    @property
    def texts_per_prompt(self) -> int: ...

    def begun(self, number: int, generation: AsyncGeneration) -> dict[str, Any] | None:
        """The choice that begins a text in a stream, before its tokens; None if there is none."""
        ...

    def added(self, number: int, delta: GenerateDelta) -> list[dict[str, Any]]:
        """The choices that tell a text's next tokens in a stream: a chunk for each."""
        ...

    def whole(self, results: Sequence[GenerateResult]) -> list[dict[str, Any]]:
        """The choices of an answer in one piece."""
        ...

    def usage(self, results: Sequence[GenerateResult]) -> "Usage":
        """What was computed for these texts."""
        ...


@frozen
class Usage:
    prompt_tokens: int
    """Each prompt counts once, however many texts continue it."""
    completion_tokens: int
    cached_tokens: int

    @classmethod
    def of(
        cls, results: Sequence[GenerateResult], texts_per_prompt: int, nothing: bool = False
    ) -> "Usage":
        """nothing: the generated token is not part of the answer."""
        firsts = results[::texts_per_prompt]
        return cls(
            sum(len(result.prompt_token_ids) for result in firsts),
            0 if nothing else sum(len(result.token_ids) for result in results),
            sum(result.cached_tokens for result in firsts),
        )

    @property
    def body(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


def generate_config(
    model: Model,
    body: Generation,
    prompts: Sequence[Sequence[int]],
    max_tokens: int | None,
    usual_max_tokens: int | None,
    logprobs: int | None,
) -> GenerateConfig:
    """The settings of all texts of a body.

    What a body leaves out is as the model's files recommend, or else as in OpenAI's API: a
    temperature of 1. max_tokens: the body's; usual_max_tokens: if it has none; None: all that fit.
    Raises ApiError.
    """
    chat = body if isinstance(body, ChatCompletion) else None
    limit = model.loaded.runtime.max_seq_len
    room = limit - max(map(len, prompts))
    if room < 1:
        raise ApiError(
            400,
            f"the prompt has {limit - room} tokens, and model {model.name!r} takes at most {limit} "
            "of prompt and answer: shorten it",
            "messages" if chat else "prompt",
            "context_length_exceeded",
        )
    if (max_tokens or 0) > room:
        newer = chat and chat.max_completion_tokens is not None
        name = "max_completion_tokens" if newer else "max_tokens"
        raise ApiError(
            400,
            f"{name!r} = {max_tokens} and a prompt of {limit - room} tokens are more than the "
            f"{limit} tokens that model {model.name!r} takes: ask for at most {room}",
            name,
            "context_length_exceeded",
        )
    most = min(usual_max_tokens or room, room) if max_tokens is None else max(max_tokens, 1)
    if body.min_tokens and body.min_tokens > most:
        raise ApiError(
            400, f"'min_tokens' must be at most {most}, found {body.min_tokens}", "min_tokens"
        )
    recommended = model.loaded.loaded.generation_defaults
    temperature = body.temperature
    if temperature is None and recommended.temperature is None:
        temperature = 1.0
    try:
        return GenerateConfig(
            max_new_tokens=most,
            min_new_tokens=body.min_tokens,
            temperature=temperature,
            top_k=body.top_k,
            top_p=body.top_p,
            min_p=body.min_p,
            repetition_penalty=body.repetition_penalty,
            presence_penalty=body.presence_penalty,
            frequency_penalty=body.frequency_penalty,
            logit_bias=_logit_bias(body),
            seed=later_seed(body.seed, 0),  # a negative one, too, becomes one of 63 bits
            n=1,
            logprobs=logprobs,
            logits_processors=structured(body),
            stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
            include_stop_str=bool(body.include_stop_str_in_output),
            stop_token_ids=tuple(body.stop_token_ids or ()),
            ignore_eos=bool(body.ignore_eos),
        )
    except ConfigError as error:
        raise ApiError(400, str(error)) from error


def structured(body: Generation) -> dict[str, Any] | None:
    """The logits processor that a body asks for, with its argument."""
    format = body.response_format
    if body.structured_outputs is not None:
        return {STRUCTURED_OUTPUT: body.structured_outputs.asked}
    if format is None or format.type == "text":
        return None
    if format.type == "json_object":
        return {STRUCTURED_OUTPUT: {"json_object": True}}
    assert format.json_schema is not None
    return {STRUCTURED_OUTPUT: {"json": format.json_schema.json_schema}}


def _logit_bias(body: Generation) -> dict[int, float] | None:
    if body.logit_bias is None:
        return None
    for name in body.logit_bias:
        if not (name.isascii() and name.isdigit() and len(name) < _MOST_DIGITS):
            raise ApiError(
                400, f"'logit_bias' must have token ids as keys, found {name!r:.60}", "logit_bias"
            )
    return {int(name): value for name, value in body.logit_bias.items()}


def later_seeds(config: GenerateConfig, count: int) -> Iterator[GenerateConfig]:
    """The settings of each text: with a seed, text i is sampled with seed + i."""
    for i in range(count):
        yield evolve(config, seed=later_seed(config.seed, i))


def finish_reason(result: GenerateResult) -> str:
    """In OpenAI's words."""
    return "stop" if result.finish_reason == "eos" else result.finish_reason


def stop_reason(model: Model, result: GenerateResult) -> str | int | None:
    """The stop string or token id that a request named and that ended the text, as vLLM says it."""
    if (
        result.finish_reason != "stop"
        or result.stop_reason in model.loaded.text.assets.turn_end_ids
    ):
        return None
    return result.stop_reason


def mean_logprob(result: GenerateResult) -> float:
    """How likely a text is for each of its tokens: OpenAI's measure for ``best_of``."""
    found = result.logprobs or ()
    return sum(one.logprob for one in found) / max(len(found), 1)
