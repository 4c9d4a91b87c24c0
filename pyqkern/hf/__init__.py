"""Quantized models in transformers and peft. Its modules import them; `register` alone does not."""
