"""The results of a request and of a step."""

from typing import Literal

from attrs import evolve, frozen

from tilewright.errors import TilewrightError
from tilewright.types.sampling import TokenLogprobs

Phase = Literal["prefill", "decode", "mixed"]
FinishReason = Literal["eos", "stop", "length", "aborted", "error"]
"""What ended a text. ``aborted``: its caller did, and the text is what was generated until then;
``error``: in a batch, the prompt was refused or its generation failed."""


@frozen(kw_only=True)
class Timings:
    """Wall-clock seconds, from the point of view of one request."""

    load_seconds: float
    """Loading the model, before this request."""
    prefill_seconds: float
    decode_seconds: float
    prompt_tokens: int
    new_tokens: int
    cached_tokens: int = 0
    """Tokens of the prompt that were found in the KV cache."""

    @property
    def prefill_tokens_per_second(self) -> float:
        """Counts the tokens of the prompt that were computed."""
        computed = self.prompt_tokens - self.cached_tokens
        return computed / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """The first token comes out of prefill, so decode makes new_tokens - 1."""
        return (self.new_tokens - 1) / self.decode_seconds if self.decode_seconds else 0.0


@frozen(kw_only=True)
class GenerateResult:
    """A finished generation."""

    model_id: str
    request_id: str
    text: str
    token_ids: tuple[int, ...]
    """As sampled: a token that ended the text (eos, stop) is the last one."""
    finish_reason: FinishReason
    prompt_token_ids: tuple[int, ...]
    seed: int
    logprobs: tuple[TokenLogprobs, ...] | None
    timings: Timings
    device: str
    """The device that it ran on, as named by the executor."""
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    """For each token of the prompt, given those before it; None for the first one."""
    stop_reason: str | int | None = None
    """What ended the text: for ``stop`` the stop string or the stop token id, for ``eos`` the
    token id, otherwise None. The stop string is the one that begins first in the text and, of
    several that begin there, the shortest."""
    cached_tokens: int = 0
    """Tokens of the prompt whose keys and values were in the KV cache and were not computed."""
    preemptions: int = 0
    """How often the request gave up its pages to others and was computed again."""
    drafted_tokens: int = 0
    """Tokens that were guessed, and checked by steps that compute the next token."""
    accepted_tokens: int = 0
    """How many of these were right, each of which saved a step."""
    sanitized_steps: int = 0
    """Steps whose logits were not finite and were sanitised; do not rely on such text."""
    error: TilewrightError | None = None
    """Why a prompt of a batch was refused, or its generation failed; text and tokens are empty."""


@frozen(kw_only=True)
class GenerateDelta:
    """What a generation has added to the delta before it."""

    request_id: str
    text: str
    """May be empty: text that can still become part of a stop string or of a character waits."""
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None
    """For each of the tokens, if they were asked for."""
    result: GenerateResult | None = None
    """The whole generation, in its last delta."""
    error: BaseException | None = None
    """Why it ended without a result."""

    def joined(self, following: "GenerateDelta") -> "GenerateDelta":
        """This delta and the one that follows it as one."""
        logprobs = self.logprobs
        if logprobs is not None:
            logprobs += following.logprobs or ()
        return evolve(
            following,
            text=self.text + following.text,
            token_ids=self.token_ids + following.token_ids,
            logprobs=logprobs,
        )


@frozen(kw_only=True)
class ModelStats:
    """What a loaded model is doing, and has done since it was loaded."""

    model_id: str
    num_waiting: int
    """Requests that have not started, or that were preempted."""
    num_running: int
    used_pages: int
    """Pages of the KV cache that requests hold."""
    cached_pages: int
    """Pages that no request holds and whose content is known."""
    total_pages: int
    num_steps: int
    num_requests: int
    """Requests that were accepted."""
    num_preemptions: int
    num_prompt_tokens: int
    """Tokens of the prompts of requests that have started."""
    num_cached_tokens: int
    """How many of these were in the KV cache."""
    num_new_tokens: int
    num_drafted_tokens: int = 0
    """Tokens that were guessed, and checked by steps."""
    num_accepted_tokens: int = 0
    """How many of these were right, each of which saved a step."""


@frozen(kw_only=True)
class StepEvent:
    """One executor step, as reported to observers."""

    model_id: str
    step: int
    """Counts the model's steps from 0."""
    request_ids: tuple[str, ...]
    """The requests of the step."""
    num_prompt_tokens: int
    """Tokens of the step that belong to requests without a new token yet."""
    num_decode_tokens: int
    """Tokens of requests that decode: one each, and their drafts."""
    seconds: float
    """From its start, or from the end of the step before if that is later, to its end."""
    num_waiting: int = 0
    """Requests that have not started, after the step."""
    num_running: int = 0
    """Requests that have started and not ended, after the step."""
    used_pages: int = 0
    """Pages of the KV cache that requests hold, after the step."""
    cached_pages: int = 0
    """Pages that no request holds and whose content is known."""
    total_pages: int = 0
    num_drafted_tokens: int = 0
    """How many of the tokens that decode were drafts."""
    num_accepted_tokens: int = 0
    """How many of these were right: tokens that requests got in addition to one each."""

    @property
    def num_tokens(self) -> int:
        return self.num_prompt_tokens + self.num_decode_tokens

    @property
    def phase(self) -> Phase:
        """``mixed`` for a step with tokens of both kinds."""
        if not self.num_decode_tokens:
            return "prefill"
        return "mixed" if self.num_prompt_tokens else "decode"
