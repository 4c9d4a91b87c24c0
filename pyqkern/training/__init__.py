"""What trains a model: `pyqkern.optim`, and `prepare_for_training` for adapters on quantized layers."""

from pyqkern.training.adapters import prepare_for_training as prepare_for_training
