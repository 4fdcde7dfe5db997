"""Tilewright: a plugin-based LLM inference framework.

Names are imported when they are first used, so ``import tilewright`` costs next to nothing.
"""

TYPE_CHECKING = False  # as type checkers know it, without the import of typing

if TYPE_CHECKING:
    from typing import Any

    from tilewright.async_engine import AsyncLLMEngine as AsyncLLMEngine
    from tilewright.chat import Chat as Chat
    from tilewright.engine import LLMEngine as LLMEngine
    from tilewright.errors import TilewrightError as TilewrightError
    from tilewright.hookspecs import hookimpl as hookimpl
    from tilewright.types import GenerateConfig as GenerateConfig
    from tilewright.types import GenerateDelta as GenerateDelta
    from tilewright.types import GenerateResult as GenerateResult
    from tilewright.types import ModelConfig as ModelConfig
    from tilewright.types import RuntimeConfig as RuntimeConfig

__version__ = "0.1.0"

_HOMES = {
    "AsyncLLMEngine": "tilewright.async_engine",
    "Chat": "tilewright.chat",
    "LLMEngine": "tilewright.engine",
    "TilewrightError": "tilewright.errors",
    "hookimpl": "tilewright.hookspecs",
    "GenerateConfig": "tilewright.types",
    "GenerateDelta": "tilewright.types",
    "GenerateResult": "tilewright.types",
    "ModelConfig": "tilewright.types",
    "RuntimeConfig": "tilewright.types",
}

__all__ = [
    "AsyncLLMEngine",
    "Chat",
    "GenerateConfig",
    "GenerateDelta",
    "GenerateResult",
    "LLMEngine",
    "ModelConfig",
    "RuntimeConfig",
    "TilewrightError",
    "__version__",
    "hookimpl",
]


def __getattr__(name: str) -> "Any":
    if name not in _HOMES:
        raise AttributeError(f"module 'tilewright' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
