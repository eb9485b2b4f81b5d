"""Lowerings: from an abstract operation to calls of the kernels of `kernels/`."""
