"""Device kernels, one package a model: source for PyPTO, and what it needs to be told."""
