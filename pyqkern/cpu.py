"""The C++ kernels, behind the same functions as `pyqkern.reference`.

Everything that C++ is given has been checked by `pyqkern.ops`: dtypes, device, contiguity and shapes. It takes
addresses and sizes, uses torch's own OpenMP pool and releases the GIL.
"""

from typing import Any

import torch
from torch import Tensor

from pyqkern import _C
from pyqkern.reference import ACTIVATIONS, PANEL, QRANGE, Sizes

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
QTYPE_CODES = {dtype: code for code, dtype in enumerate(QRANGE)}
ACTIVATION_CODES = {name: code for code, name in enumerate(ACTIVATIONS)}


def min_max(x: Tensor, sizes: Sizes) -> tuple[Tensor, Tensor]:
    channels = sizes[1]
    lo, hi = torch.empty((2, channels), dtype=torch.float32).unbind()
    _C.min_max(x.data_ptr(), DTYPE_CODES[x.dtype], *sizes, lo.data_ptr(), hi.data_ptr())
    return lo, hi


def quantize(
    x: Tensor, sizes: Sizes, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype, fused: bool, bits: int = 8
) -> Tensor:
    q = torch.empty_like(x, dtype=dtype)
    zero = 0 if zero_point is None else zero_point.data_ptr()
    _C.quantize(
        x.data_ptr(), DTYPE_CODES[x.dtype], scale.data_ptr(), zero, *sizes, fused, q.data_ptr(),
        QTYPE_CODES[dtype] + (2 if bits == 4 else 0),
    )  # fmt: skip
    return q


def dequantize(q: Tensor, sizes: Sizes, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype) -> Tensor:
    y = torch.empty_like(q, dtype=dtype)
    zero = 0 if zero_point is None else zero_point.data_ptr()
    _C.dequantize(q.data_ptr(), QTYPE_CODES[q.dtype], scale.data_ptr(), zero, *sizes, y.data_ptr(), DTYPE_CODES[dtype])
    return y


def int8_matmul(a: Tensor, w: Tensor) -> Tensor:
    (m, k), n = a.shape, w.shape[0]
    y = torch.empty((m, n), dtype=torch.int32)
    _C.int8_matmul(a.data_ptr(), a.dtype is torch.uint8, w.data_ptr(), m, n, k, y.data_ptr())
    return y


_exchange: Any = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)  # torch >= 2.10
HAS_EXCHANGE: bool = _exchange is not None and _C.use_exchange(_exchange)


def int8_linear_tensors(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, activation: str, symmetric: bool
) -> Tensor | None:
    """int8_linear of plain CPU tensors that C++ itself checks; None where it found something that does not fit."""
    y = x.new_empty((*x.shape[:-1], weight_scale.shape[0]))
    written = _C.int8_linear_tensors(x, weight, weight_scale, bias, y, ACTIVATION_CODES.get(activation, -1), symmetric)
    return y if written else None


def int8_linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, activation: str, symmetric: bool
) -> Tensor:
    *rows, k = x.shape
    n = weight_scale.shape[0]
    y = x.new_empty((*rows, n))
    dtype = DTYPE_CODES[x.dtype]
    bias_at, bias_dtype = (0, 0) if bias is None else (bias.data_ptr(), DTYPE_CODES[bias.dtype])
    _C.int8_linear(
        x.data_ptr(), dtype, weight.data_ptr(), weight_scale.data_ptr(), bias_at, bias_dtype,
        x.numel() // k, n, k, y.data_ptr(), ACTIVATION_CODES[activation], symmetric,
    )  # fmt: skip
    return y


def int8_linear_static_tensors(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    input_scale: Tensor,
    input_zero_point: Tensor,
) -> Tensor | None:
    """int8_linear_static by the way of int8_linear_tensors."""
    y = x.new_empty((*x.shape[:-1], weight_scale.shape[0]))
    code = ACTIVATION_CODES.get(activation, -1)
    written = _C.int8_linear_tensors(x, weight, weight_scale, bias, y, code, False, input_scale, input_zero_point)
    return y if written else None


def int8_linear_static(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    input_scale: Tensor,
    input_zero_point: Tensor,
) -> Tensor:
    *rows, k = x.shape
    n = weight_scale.shape[0]
    y = x.new_empty((*rows, n))
    bias_at, bias_dtype = (0, 0) if bias is None else (bias.data_ptr(), DTYPE_CODES[bias.dtype])
    _C.int8_linear_static(
        x.data_ptr(), DTYPE_CODES[x.dtype], weight.data_ptr(), weight_scale.data_ptr(), bias_at, bias_dtype,
        x.numel() // k, n, k, y.data_ptr(), ACTIVATION_CODES[activation],
        input_scale.data_ptr(), input_zero_point.data_ptr(),
    )  # fmt: skip
    return y


def int8_pack(weight: Tensor) -> Tensor:
    n, k = weight.shape
    packed = torch.empty(packed_shape(n, k), dtype=torch.int8)
    _C.pack_int8(weight.data_ptr(), n, k, packed.data_ptr())
    return packed


def int8_unpack(packed: Tensor, n: int, k: int) -> Tensor:
    weight = torch.empty((n, k), dtype=torch.int8)
    _C.unpack_int8(packed.data_ptr(), n, k, weight.data_ptr())
    return weight


def packed_shape(n: int, k: int) -> tuple[int, ...]:
    return ((n + PANEL - 1) // PANEL, (k + 3) // 4 + 2, 4 * PANEL)
