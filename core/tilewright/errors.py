"""Errors that a user can act on.

Each message is one line: what was expected, what was found, where, and what to do next. The
command line prints it without a traceback and exits with code 2.
"""

from collections.abc import Iterable, Sequence
from typing import TypeVar

E = TypeVar("E", bound=BaseException)


class TilewrightError(Exception):
    """Base of every error that tilewright raises on purpose."""


class ConfigError(TilewrightError):
    """A run file, flag, environment variable or option is wrong."""


class PluginError(TilewrightError):
    """A plugin is unknown, ambiguous, broken, or written for another API version."""


class ModelError(TilewrightError):
    """A model's files are missing, damaged, unsupported, or disagree with each other."""


class RequestError(TilewrightError):
    """A prompt or its settings cannot be served by this model as it is set up."""


class OutOfPagesError(TilewrightError):
    """The KV cache has too few free pages for the request."""


class ExecutorError(TilewrightError):
    """An executor cannot run the model as it is set up, or failed while it ran it."""


class ExecutorLostError(ExecutorError):
    """The executor's device is gone: no step can run until the model is loaded again."""


class NonFiniteLogitsError(TilewrightError):
    """Logits held NaN or infinity.

    Attributes:
        request_id: the request whose logits they are.
        step: the index of the token that was sampled, in the request's output. It is negative for
            logits that score a token of the prompt: -1 is the prompt's last one.
        token_ids: the vocabulary ids whose logits are not finite, ascending.
        first_tensor: the first tapped tensor of the step with a non-finite element of this request;
            None when it was not searched for, as in a sampler, and empty when the step was run
            again with taps and no tensor had one.
    """

    def __init__(
        self,
        request_id: str,
        step: int,
        token_ids: Sequence[int],
        vocab_size: int,
        first_tensor: str | None = None,
    ):
        self.request_id = request_id
        self.step = step
        self.token_ids = tuple(token_ids)
        self.vocab_size = vocab_size
        self.first_tensor = first_tensor
        first = ", ".join(str(i) for i in self.token_ids[:8])
        more = ", ..." if len(self.token_ids) > 8 else ""
        first_bad = f"; the first non-finite tensor is {first_tensor}" if first_tensor else ""
        if first_tensor == "":
            first_bad = "; run again with taps, the step has only finite tensors: the path without "
            first_bad += "taps is wrong"
        super().__init__(
            f"request {request_id!r}, step {step}: {len(self.token_ids)} of {vocab_size} logits "
            f"are not finite (token ids {first}{more}){first_bad}; --trace-nonfinite also checks "
            "all earlier steps; for a smoke test only, set the sampler option "
            "on_nonfinite='sanitize'"
        )


class PluginWarning(RuntimeWarning):
    """A plugin failed, and no generation was ended by it."""


def copied(error: E) -> E:
    """A copy to raise of an error that other threads may raise or keep.

    Raising an exception adds the caller's frames to it, and all that they refer to. An exception
    that cannot be copied is returned as it is.
    """
    from copy import copy

    try:
        made = copy(error)
    except Exception:
        return error
    made.__cause__, made.__suppress_context__ = error.__cause__, error.__suppress_context__
    return made.with_traceback(error.__traceback__)


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint such as ``"; did you mean 'top-p'?"``, or ``""`` when nothing is close."""
    from difflib import get_close_matches

    matches = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {quoted(matches[0])}?" if matches else ""


def must_be(name: str, expected: str, found: str) -> str:
    """``"'top_k' must be an integer, found 2.5"``, for a value of a wrong type or out of range."""
    return f"{name[:60]!r} must be {expected}, found {found}"


def shortened(text: str, most: int = 60) -> str:
    """Text of at most so many characters, which ends in ``...`` if it was longer."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def on_one_line(text: str) -> str:
    """Text of others without line breaks, and with its control characters and the like escaped."""
    text = " ".join(text.split())
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def quoted(name: object, most: int = 60) -> str:
    """A name or a path that a user wrote, in quotation marks, shortened for a line."""
    return shortened(repr(name), most)


def listed(items: Sequence[str], limit: int = 6) -> str:
    """``"a, b, c (and 4 more)"``: a list short enough for one line."""
    shown = ", ".join(items[:limit])
    return shown if len(items) <= limit else f"{shown} (and {len(items) - limit} more)"
