"""The operators torch.ops.pyqkern.*: what each takes and refuses, and which device runs it."""

from pyqkern.ops import (
    affine,
    decoder,
    embedding,
    encoder,
    experts,
    fake_quantize,
    four_bit,
    gradient,
    int8,
    optimizer,
    recurrent,
)

__all__ = [
    "affine",
    "decoder",
    "embedding",
    "encoder",
    "experts",
    "fake_quantize",
    "four_bit",
    "gradient",
    "int8",
    "optimizer",
    "recurrent",
]
