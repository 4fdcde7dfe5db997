"""Loads Hugging Face model directories: loader ``hf-local``, weight format ``safetensors``."""
