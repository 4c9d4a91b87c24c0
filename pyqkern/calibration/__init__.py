"""Ranges of activations, and moving outliers into the weights."""
