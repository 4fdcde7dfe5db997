"""Qwen3 dense decoder layers as PyPTO kernels, for any layer shape that their tiles support."""
