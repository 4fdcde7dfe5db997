"""The place of device kernels, one package a model. None is shipped yet."""
