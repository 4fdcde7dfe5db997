"""Qwen3 dense decoder layers as PyPTO kernels, for any layer shape; Qwen3-14B's is the default."""
