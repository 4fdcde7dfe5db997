"""The results of a request and of a step."""

from typing import Literal

from attrs import frozen

from tilewright.errors import TilewrightError
from tilewright.types.executor import Phase
from tilewright.types.sampling import TokenLogprobs

FinishReason = Literal["eos", "stop", "length", "error"]
"""What ended a text; ``error``: it was not begun, since the prompt was refused."""


@frozen(kw_only=True)
class Timings:
    """Wall-clock seconds, from the point of view of one request."""

    load_seconds: float
    """Loading the model, before this request."""
    prefill_seconds: float
    decode_seconds: float
    prompt_tokens: int
    new_tokens: int

    @property
    def prefill_tokens_per_second(self) -> float:
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

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
    sanitized_steps: int = 0
    """Steps whose logits were not finite and were sanitised; do not rely on such text."""
    error: TilewrightError | None = None
    """Why a prompt of a batch was refused; its text and tokens are empty."""


@frozen(kw_only=True)
class StepEvent:
    """One executor step, as reported to observers."""

    model_id: str
    phase: Phase
    step: int
    """Counts the model's steps from 0."""
    request_ids: tuple[str, ...]
    num_tokens: int
    seconds: float
