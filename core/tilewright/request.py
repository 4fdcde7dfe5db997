"""One request: its prompt and settings, its state, and its result."""

import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import inf
from typing import TYPE_CHECKING, Any

from attrs import Factory, define, evolve, field, fields

from tilewright.chat import Chat
from tilewright.errors import RequestError, TilewrightError
from tilewright.logits_processing import Processing
from tilewright.text import TextStream
from tilewright.types import (
    FinishReason,
    GenerateConfig,
    GenerateDelta,
    GenerateResult,
    SampledToken,
    SamplerRow,
    SamplingParams,
    Timings,
    TokenLogprobs,
)
from tilewright.values import converted, shown

if TYPE_CHECKING:
    from tilewright.loading import ServedModel


@define(eq=False)
class Request:
    """A request and its state. It is over once it has a result or an error."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    max_new_tokens: int
    min_new_tokens: int = 0
    early_params: SamplingParams = field(default=Factory(lambda self: self.params, takes_self=True))
    """In place of ``params`` for the first ``min_new_tokens`` tokens."""
    eos_ids: frozenset[int] = frozenset()
    stop_ids: frozenset[int] = frozenset()
    stream: TextStream | None = None
    """Turns the output into text and finds stop strings; None: the text is not needed."""
    started: float = field(factory=time.perf_counter)
    prefilled: float = 0.0
    """Time of the first token, on time.perf_counter's clock, as is ``started``."""

    arrival: int = -1
    """How many requests were queued before it; -1: it was not queued yet."""
    num_computed: int = 0
    """Number of leading tokens with keys and values in the KV cache."""
    sampled_by_executor: bool = False
    """The token after one that is sampled in flight can then be run before that one is known."""
    cached_tokens: int = 0
    preemptions: int = 0
    takes_drafts: bool = True
    """False after a step with drafts of the request has failed."""
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    ngrams: dict[tuple[int, ...], int] = field(factory=dict)
    """The position of the token that followed an n-gram most recently."""
    num_indexed: int = 0
    """Number of leading tokens that ``ngrams`` knows."""
    output_token_ids: list[int] = field(factory=list)
    logprobs: list[TokenLogprobs] = field(factory=list)
    logits_processors: Mapping[str, Any] = field(factory=dict)
    """The argument of each logits processor, by the plugin's name."""
    processing: list[Processing] = field(factory=list)
    """The logits processors at work, once the request is queued."""
    num_prompt_logprobs: int | None = None
    """How many of the most likely tokens are reported for each token of the prompt."""
    prompt_logprobs: list[TokenLogprobs] = field(factory=list)
    """From the prompt's second token."""
    sanitized_steps: int = 0
    pieces: list[str] = field(factory=list)
    """The text so far."""
    taken: tuple[int, int] = (0, 0)
    """How many pieces and tokens ``take`` has returned."""
    on_news: "Callable[[Request], None] | None" = None
    """Called by a ``SteppingThread`` after a step that added tokens to the request or ended it."""
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    result: GenerateResult | None = None
    error: BaseException | None = None

    @property
    def over(self) -> bool:
        return self.result is not None or self.error is not None

    @property
    def num_known(self) -> int:
        """Tokens of prompt and output."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def is_scoring(self) -> bool:
        """Whether log-probabilities of the prompt are wanted that are not known yet."""
        wanted = self.num_prompt_logprobs is not None
        return wanted and len(self.prompt_logprobs) < len(self.prompt_token_ids) - 1

    @property
    def max_cached_tokens(self) -> int:
        """Tokens in the KV cache at the end: all but the last one generated, which is not run."""
        return len(self.prompt_token_ids) + self.max_new_tokens - 1

    def tokens(self, start: int, stop: int) -> list[int]:
        """The token ids of positions start to stop."""
        n = len(self.prompt_token_ids)
        prompt = self.prompt_token_ids[start : min(stop, n)]
        return [*prompt, *self.output_token_ids[max(start - n, 0) : max(stop - n, 0)]]

    def sampler_row(self, position: int, drafts: Sequence[int] = ()) -> SamplerRow:
        """How the token at a position of the output is chosen, after the known tokens and some
        drafts."""
        return SamplerRow(
            request_id=self.request_id,
            params=self.early_params if position < self.min_new_tokens else self.params,
            prompt_token_ids=self.prompt_token_ids,
            output_token_ids=(
                [*self.output_token_ids, *drafts] if drafts else self.output_token_ids
            ),
            position=position,
        )

    def accept(self, sampled: SampledToken) -> None:
        """Add the next token; sets finish_reason when it is the last one."""
        if self.finish_reason:
            return
        token = sampled.token_id
        for processing in self.processing:
            processing.call("accept", processing.state, token)
        if not self.output_token_ids:
            self.prefilled = time.perf_counter()
        self.output_token_ids.append(token)
        if sampled.logprobs is not None:
            self.logprobs.append(sampled.logprobs)
        self.sanitized_steps += sampled.sanitized > 0
        stream = self.stream
        if token in self.eos_ids:
            self.finish_reason, self.stop_reason = "eos", token
        elif token in self.stop_ids:
            self.finish_reason, self.stop_reason = "stop", token
        else:
            self._emit(stream.push(token) if stream else "")
            if stream and stream.stopped:
                self.finish_reason = "stop"
            elif len(self.output_token_ids) == self.max_new_tokens:
                self.finish_reason = "length"
        if self.finish_reason and stream:
            self._emit(stream.finish())
            # Text that was held back may complete a stop string only now.
            if stream.stopped:
                self.finish_reason, self.stop_reason = "stop", stream.stop_string

    def _emit(self, piece: str) -> None:
        if piece:
            self.pieces.append(piece)

    def take(self) -> GenerateDelta:
        """What was generated since the last call."""
        (pieces, tokens), logprobs = self.taken, None
        if self.params.logprobs is not None:
            logprobs = tuple(self.logprobs[tokens:])
        self.taken = len(self.pieces), len(self.output_token_ids)
        return GenerateDelta(
            request_id=self.request_id,
            text="".join(self.pieces[pieces:]),
            token_ids=tuple(self.output_token_ids[tokens:]),
            logprobs=logprobs,
            result=self.result,
            error=self.error,
        )

    def finish(self, model: "ServedModel") -> GenerateResult:
        """Make the result of a request that has a finish reason; the model is the one it ran on."""
        assert self.finish_reason is not None
        now = time.perf_counter()
        self.result = GenerateResult(
            model_id=model.model_id,
            request_id=self.request_id,
            text="".join(self.pieces),
            token_ids=tuple(self.output_token_ids),
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            prompt_token_ids=self.prompt_token_ids,
            seed=self.params.seed,
            logprobs=tuple(self.logprobs) if self.params.logprobs is not None else None,
            prompt_logprobs=(
                None if self.num_prompt_logprobs is None else (None, *self.prompt_logprobs)
            ),
            cached_tokens=self.cached_tokens,
            preemptions=self.preemptions,
            drafted_tokens=self.drafted_tokens,
            accepted_tokens=self.accepted_tokens,
            timings=Timings(
                load_seconds=model.load_seconds,
                prefill_seconds=(self.prefilled or now) - self.started,
                decode_seconds=now - (self.prefilled or now),
                prompt_tokens=len(self.prompt_token_ids),
                new_tokens=len(self.output_token_ids),
                cached_tokens=self.cached_tokens,
            ),
            device=model.runtime.device,
            sanitized_steps=self.sanitized_steps,
        )
        return self.result


_SEED_BITS = 53
"""Bits of a seed that is drawn: JavaScript and jq read larger integers as other numbers."""


def drawn_seed() -> int:
    """A random seed, for a generation that has none."""
    return secrets.randbits(_SEED_BITS)


def later_seed(seed: int | None, by: int) -> int | None:
    """The seed of a later result. Seeds have 63 bits, and 0 follows the largest."""
    return None if seed is None else (seed + by) % 2**63


def new_request(
    request_id: str,
    model: "ServedModel",
    prompt: str | Sequence[int] | Chat,
    settings: GenerateConfig,
) -> Request:
    """A request for a model. settings: every field but the optional ones is filled.

    The answer to a ``Chat`` also ends at the tokens that end one in a chat
    (``TextAssets.turn_end_ids``), unless ``ignore_eos`` is set.
    Raises RequestError for a prompt that the model cannot serve.
    """
    if isinstance(prompt, Chat):
        ids = tuple(model.text.encode_chat(prompt))
        if not settings.ignore_eos:
            ends = (*(settings.stop_token_ids or ()), *model.text.assets.turn_end_ids)
            settings = evolve(settings, stop_token_ids=ends)
    else:
        ids = tuple(model.text.encode(prompt)) if isinstance(prompt, str) else _token_ids(prompt)
    _check_prompt(model, ids)
    assert settings.max_new_tokens is not None
    seed = drawn_seed() if settings.seed is None else settings.seed
    params = evolve(_sampling_params(settings), seed=seed)
    least = settings.min_new_tokens or 0
    eos_ids, stop_ids = _ending_ids(model, settings)
    early = {**params.logit_bias, **dict.fromkeys(eos_ids | stop_ids, -inf)}
    return Request(
        request_id=request_id,
        prompt_token_ids=ids,
        params=params,
        max_new_tokens=min(settings.max_new_tokens, model.runtime.max_seq_len - len(ids)),
        min_new_tokens=least,
        early_params=evolve(params, logit_bias=early) if least else params,
        eos_ids=eos_ids,
        stop_ids=stop_ids,
        stream=TextStream(
            model.text, settings.stop or (), least, include_stop=bool(settings.include_stop_str)
        ),
        num_prompt_logprobs=settings.prompt_logprobs,
        logits_processors=settings.logits_processors or {},
    )


def check_settings(model: "ServedModel", settings: GenerateConfig) -> None:
    """Raise RequestError for settings that the model cannot serve, whatever the prompt."""
    _check_ids(model, settings.logit_bias or {}, "logit_bias")
    _check_ids(model, settings.stop_token_ids or (), "stop_token_ids")
    _check_some_allowed(model, settings)
    if settings.prompt_logprobs is not None and model.executor.limits.max_logits_rows == 0:
        raise RequestError(
            f"prompt_logprobs = {settings.prompt_logprobs} needs logits of prompt tokens, which "
            f"the executor of model {model.model_id!r} does not return: leave it unset, or choose "
            "another executor"
        )


def refused(
    request_id: str, model: "ServedModel", settings: GenerateConfig, error: TilewrightError
) -> GenerateResult:
    """The result of a prompt that was refused, or whose generation failed."""
    return GenerateResult(
        model_id=model.model_id,
        request_id=request_id,
        text="",
        token_ids=(),
        finish_reason="error",
        prompt_token_ids=(),
        seed=settings.seed or 0,
        logprobs=None,
        timings=Timings(
            load_seconds=model.load_seconds,
            prefill_seconds=0.0,
            decode_seconds=0.0,
            prompt_tokens=0,
            new_tokens=0,
        ),
        device=model.runtime.device,
        error=error,
    )


def _token_ids(prompt: Sequence[int]) -> tuple[int, ...]:
    try:
        if isinstance(prompt, (bytes, bytearray)):
            raise TypeError("its integers are characters, not tokens")
        return tuple(converted(token_id, int) for token_id in prompt)
    except Exception as error:
        raise RequestError(
            f"a prompt must be text or a list of token ids, found {shown(prompt)}; a conversation "
            "is given as Chat(messages)"
        ) from error


def _check_prompt(model: "ServedModel", ids: tuple[int, ...]) -> None:
    limit = model.runtime.max_seq_len
    if not ids:
        raise RequestError("the prompt is empty: expected at least one token")
    if len(ids) >= limit:
        longest = model.loaded.config.context_length
        longest = min(longest, model.executor.limits.max_seq_len or longest)
        also = f", or raise max_seq_len, to at most {longest}" if limit < longest else ""
        raise RequestError(
            f"the prompt has {len(ids)} tokens, which leaves no room for a new token within "
            f"max_seq_len = {limit} of model {model.model_id!r}: shorten it{also}"
        )
    _check_ids(model, ids, "the prompt")


def _check_some_allowed(model: "ServedModel", settings: GenerateConfig) -> None:
    vocab_size = model.loaded.config.vocab_size
    forbidden = {i for i, bias in (settings.logit_bias or {}).items() if bias == -inf}
    if len(forbidden) == vocab_size:
        raise RequestError("logit_bias forbids every token: allow at least one")
    if settings.min_new_tokens:
        ending = frozenset().union(*_ending_ids(model, settings))
        if len(forbidden | ending) == vocab_size:
            raise RequestError(
                f"logit_bias allows only tokens that end the text, and min_new_tokens = "
                f"{settings.min_new_tokens} forbids these at first: allow another token, or set "
                "min_new_tokens to 0"
            )


def _ending_ids(
    model: "ServedModel", settings: GenerateConfig
) -> tuple[frozenset[int], frozenset[int]]:
    """The end-of-sequence tokens and the stop token ids that end a text."""
    eos_ids = () if settings.ignore_eos else model.loaded.config.eos_token_ids
    return frozenset(eos_ids), frozenset(settings.stop_token_ids or ())


def _check_ids(model: "ServedModel", ids: Iterable[int], where: str) -> None:
    vocab_size = model.loaded.config.vocab_size
    bad = next((i for i in ids if not 0 <= i < vocab_size), None)
    if bad is None:
        return
    token = model.text.token(bad)
    named = "" if token is None else f" ({token!r:.80})"
    cure = "" if token is None else "; leave this token out: the model has no embedding for it"
    raise RequestError(
        f"token id {bad}{named} in {where} is outside the vocabulary of model "
        f"{model.model_id!r} (0 to {vocab_size - 1}){cure}"
    )


def _sampling_params(settings: GenerateConfig) -> SamplingParams:
    return SamplingParams(**{a.name: getattr(settings, a.name) for a in fields(SamplingParams)})
