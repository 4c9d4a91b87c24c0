"""Every kernel in plain torch: the specification, the oracle of the tests, and what runs on a device without kernels.

The functions here and those of `pyqkern.backends.cpu` and `pyqkern.backends.cuda` have the same arguments
(`pyqkern.backends.Kernels`) and the same results: integers equal, and the float results of the linear equal bit for bit
where no GELU is fused. One line of arithmetic is one rounding to fp32; nothing is fused except where `fma` is written.
"""

from pyqkern.backends.reference.affine import dequantize, fma, min_max, qparams_from_range, quantize
from pyqkern.backends.reference.fake_quantize import fake_quantize, fake_quantize_backward
from pyqkern.backends.reference.four_bit import (
    block_scales,
    dequantize_4bit,
    grad_input_4bit,
    linear_4bit,
    pack,
    pack_4bit,
    pack_scales,
    packed_shapes_4bit,
    quantize_4bit,
    rows_4bit,
    slice_4bit,
    unpack_4bit,
    unpack_scales,
)
from pyqkern.backends.reference.gate import gate
from pyqkern.backends.reference.int8 import (
    activate,
    int8_grad_input,
    int8_linear,
    int8_linear_static,
    int8_linear_weight_only,
    int8_matmul,
    int8_pack,
    int8_quantize_rows,
    int8_rows,
    int8_slice,
    int8_unpack,
    packed_shape,
    panels,
    splits,
)
from pyqkern.backends.reference.optimizer import optimizer_step, square_sum
from pyqkern.backends.reference.recurrent import recurrent

__all__ = [
    "activate",
    "block_scales",
    "dequantize",
    "dequantize_4bit",
    "fake_quantize",
    "fake_quantize_backward",
    "fma",
    "gate",
    "grad_input_4bit",
    "int8_grad_input",
    "int8_linear",
    "int8_linear_static",
    "int8_linear_weight_only",
    "int8_matmul",
    "int8_pack",
    "int8_quantize_rows",
    "int8_rows",
    "int8_slice",
    "int8_unpack",
    "linear_4bit",
    "min_max",
    "optimizer_step",
    "pack",
    "pack_4bit",
    "pack_scales",
    "packed_shape",
    "packed_shapes_4bit",
    "panels",
    "qparams_from_range",
    "quantize",
    "quantize_4bit",
    "recurrent",
    "rows_4bit",
    "slice_4bit",
    "splits",
    "square_sum",
    "unpack_4bit",
    "unpack_scales",
]
