"""PyPTO kernels on Ascend NPUs, on PyPTO's simulator, and emulated."""
