"""What trains a model: `pyqkern.optim`."""
