"""Llama-family decoder layers: the blocks of qwen3_14b, with heads that are rotated unnormed."""
