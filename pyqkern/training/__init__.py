"""What trains a model: `prepare` and `convert` for quantization-aware training, and `pyqkern.optim`."""

from pyqkern.training.distillation import distillation_loss
from pyqkern.training.qat import Schedule, convert, freeze_ranges, prepare
from pyqkern.training.twins import QATEmbedding, QATEmbeddingBag, QATLinear, QATRecurrent

__all__ = [
    "QATEmbedding",
    "QATEmbeddingBag",
    "QATLinear",
    "QATRecurrent",
    "Schedule",
    "convert",
    "distillation_loss",
    "freeze_ranges",
    "prepare",
]
