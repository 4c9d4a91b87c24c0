"""Triton kernels for CUDA, imported as pyqkern.kernels by pyqkern.ops when a tensor is on a GPU."""
