"""Qwen3 dense models as one program a step, on the layers of qwen3_14b."""
