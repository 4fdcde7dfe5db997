"""Device kernels, one package per model: source for PyPTO, and the constants it needs."""
