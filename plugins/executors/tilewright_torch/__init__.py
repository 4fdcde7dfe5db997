"""The reference executor: dense decoder-only models on PyTorch over a paged KV cache."""
