"""Loads GGUF files: loader ``gguf``."""
