"""The OpenAPI document, generated from the bodies' fields."""

from typing import Any


def document() -> dict[str, Any]:
    return {}
