"""Device kernels, one package a model. PyPTO source; importing this package needs no PyPTO."""
