"""Quantized models in files: pyqkern's own format and those of other libraries."""
