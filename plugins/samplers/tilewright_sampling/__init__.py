"""Samplers ``greedy`` and ``top-p``."""
