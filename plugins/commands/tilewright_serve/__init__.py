"""An OpenAI-compatible HTTP server over AsyncLLMEngine, as an ASGI application: ``create_app``."""

TYPE_CHECKING = False

if TYPE_CHECKING:
    from typing import Any

    from tilewright_serve.app import create_app as create_app
    from tilewright_serve.settings import ServeSettings as ServeSettings

__all__ = ["ServeSettings", "create_app"]

_HOMES = {"ServeSettings": "tilewright_serve.settings", "create_app": "tilewright_serve.app"}


def __getattr__(name: str) -> "Any":
    if name not in _HOMES:
        raise AttributeError(f"module 'tilewright_serve' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
