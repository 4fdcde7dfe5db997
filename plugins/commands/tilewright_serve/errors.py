"""Errors as OpenAI's API words them, and which of them an error of the engine becomes."""

import re
from typing import TYPE_CHECKING, Any

from attrs import frozen
from pydantic import ValidationError

from tilewright.errors import (
    ConfigError,
    OutOfPagesError,
    PluginError,
    RequestError,
    TilewrightError,
    nearest,
    on_one_line,
    shortened,
)
from tilewright.logits_processing import LogitsProcessorError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    500: "server_error",
    503: "overloaded_error",
}
"""The ``type`` of an error by its status."""

TIMEOUT = "timeout"
"""The ``code`` of an answer that took too long."""

RETRY_AFTER = 1
"""Seconds, for clients that were refused since the server had too much to do."""


@frozen
class ApiError(Exception):
    """An answer that is an error. The client reads the message."""

    status: int
    message: str
    param: str | None = None
    """The field of the body that it is about."""
    code: str | None = None

    @property
    def body(self) -> dict[str, Any]:
        """The error object of OpenAI's API reference."""
        return {
            "error": {
                "message": self.message,
                "type": KINDS[self.status],
                "param": self.param,
                "code": self.code,
            }
        }

    @property
    def headers(self) -> dict[str, str]:
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        if self.code == TIMEOUT:
            return {"x-should-retry": "false"}  # OpenAI's clients would ask for as much again
        return {"Retry-After": str(RETRY_AFTER)} if self.status == 503 else {}


def refusal(error: Exception, structured: bool = False) -> ApiError:
    """What a client gets for a request that an engine did not accept.

    structured: it asks for structured output.
    """
    if isinstance(error, (RequestError, ConfigError, OutOfPagesError)):
        return ApiError(400, str(error))
    missing = isinstance(error, PluginError) and not isinstance(error, LogitsProcessorError)
    if structured and missing:
        return ApiError(400, f"structured output cannot be served: {error}")
    return failure(error)


def failure(error: Exception) -> ApiError:
    """What a client gets for a request that was accepted and has failed."""
    if isinstance(error, RequestError):  # the model was unloaded, or the engine closed
        return ApiError(503, str(error))
    if isinstance(error, TilewrightError):
        return ApiError(500, str(error))
    what = on_one_line(shortened(str(error), 300))
    return ApiError(500, f"the model failed: {type(error).__name__}: {what}")


def unknown_model(name: str, known: list[str]) -> ApiError:
    served = ", ".join(map(repr, known))
    return ApiError(
        404,
        f"no model is named {shortened(name)!r}{nearest(name[:100], known)} (served: {served})",
        "model",
        "model_not_found",
    )


def invalid(error: ValidationError) -> ApiError:
    """The first thing that is wrong with a body, in words, with its place and what was found."""
    errors = error.errors(include_url=False)
    first = errors[0]["loc"][:1]
    # A value that may have several types has errors for each: the one that fits best counts.
    found = max((one for one in errors if one["loc"][:1] == first), key=_how_far)
    if found["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {found['ctx']['error']}")
    place = [part for part in found["loc"] if not _names_alternative(part)]
    where = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in place).lstrip(".")
    param = str(place[0]) if place else None
    if found["type"] == "missing":
        return ApiError(400, f"'{where}' is missing: it is required", param)
    value = on_one_line(shortened(repr(found["input"])))
    why = re.sub(r"^(Value error,|Input|String|List|Dictionary) ", "", found["msg"])
    why = re.sub(r" after validation, not \d+$", "", why)
    subject = f"'{where}'" if where else "the body"
    return ApiError(400, f"{subject} {why}, found {value}", param)


def _how_far(error: "ErrorDetails") -> tuple[int, int, bool]:
    """How deep in a value an error is, how late in its last list, and whether its type is right."""
    place = [part for part in error["loc"] if not _names_alternative(part)]
    late = place[-1] if place and isinstance(place[-1], int) else 0
    return len(place), late, not error["type"].endswith("_type")


def _names_alternative(part: int | str) -> bool:
    """Whether a part of a place is pydantic's name for one type of a union."""
    return isinstance(part, str) and (
        part in ("str", "int", "bool") or part[:1].isupper() or not part.isidentifier()
    )
