"""The C++ kernels, behind the same functions as `pyqkern.backends.reference`.

Everything that C++ is given has been checked by `pyqkern.ops`: dtypes, device, contiguity and shapes. It takes
addresses and sizes, uses torch's own OpenMP pool and releases the GIL.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pyqkern import _C
from pyqkern.backends import ACTIVATIONS, QRANGE, Sizes
from pyqkern.backends.reference.four_bit import CODEBOOKS
from pyqkern.schemes import COMPUTE

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
    return ((n + PANEL - 1) // PANEL, (k + 3) // 4 + 1, 4 * PANEL)


PANEL, STRIP = 16, 64

# "auto" multiplies integers: measured, that is the fastest way for every number of rows on every ISA.
AS_INT8 = ("int8", "auto")

# compute="bf16": up to this many rows keep the weights in fp32, more of them go through torch's bf16 product.
BF16_FROM = 4
_RECORDS = {name: book.record.data_ptr() for name, book in CODEBOOKS.items()}


def in_panels(n: int, k: int, blocksize: int) -> bool:
    """Whether a weight [n, k] is stored in panels, which the integer kernels need: as in_panels in csrc/nf4.cpp."""
    return n >= PANEL and k % blocksize == 0


def packed_sizes(n: int, k: int, blocksize: int) -> tuple[int, int]:
    if not in_panels(n, k, blocksize):
        return (n * k + 1) // 2, -(-n * k // blocksize)
    rows = -(-n // PANEL) * PANEL
    return rows * k // 2, rows * k // blocksize


def pack_4bit(packed: Tensor, n: int, k: int, blocksize: int) -> Tensor:
    if not in_panels(n, k, blocksize):
        return packed.clone()
    lines = torch.empty(packed_sizes(n, k, blocksize)[0], dtype=torch.uint8)
    _C.pack_4bit(packed.data_ptr(), n, k, lines.data_ptr())
    return lines


def unpack_4bit(lines: Tensor, n: int, k: int, blocksize: int) -> Tensor:
    if not in_panels(n, k, blocksize):
        return lines.clone()
    packed = torch.empty(n * k // 2, dtype=torch.uint8)
    _C.unpack_4bit(lines.data_ptr(), n, k, packed.data_ptr())
    return packed


def pack_scales(scales: Tensor, n: int, k: int, blocksize: int) -> Tensor:
    """[n, k / blocksize], flat -> [strip][k / blocksize][panel][16]: csrc/kernels.h."""
    if not in_panels(n, k, blocksize):
        return scales.clone()
    rows = functional.pad(scales.view(n, k // blocksize), (0, 0, 0, -n % PANEL))
    return torch.cat([strip.t().reshape(-1) for strip in rows.split(STRIP)])


def unpack_scales(scales: Tensor, n: int, k: int, blocksize: int) -> Tensor:
    if not in_panels(n, k, blocksize):
        return scales.clone()
    blocks = k // blocksize
    if n % STRIP == 0:
        return scales.view(-1, blocks, STRIP).transpose(1, 2).reshape(-1)
    strips = scales.split(blocks * STRIP)
    return torch.cat([strip.view(blocks, -1).t().reshape(-1) for strip in strips])[: n * blocks]


def quantize_4bit(x: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    numel = x.numel()
    packed = torch.empty((numel + 1) // 2, dtype=torch.uint8)
    absmax = torch.empty(-(-numel // blocksize), dtype=torch.float32)
    _C.quantize_4bit(
        x.data_ptr(), DTYPE_CODES[x.dtype], numel, blocksize, _RECORDS[quant_type], packed.data_ptr(), absmax.data_ptr()
    )
    return packed, absmax


def _nested(nested_absmax: Tensor | None, nested_map: Tensor | None, offset: Tensor | None) -> tuple[int, int, float]:
    if nested_absmax is None or nested_map is None or offset is None:
        return 0, 0, 0.0
    return nested_absmax.data_ptr(), nested_map.data_ptr(), offset.item()


def dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_map: Tensor | None,
    offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    y = torch.empty(tuple(shape), dtype=dtype)
    _C.dequantize_4bit(
        packed.data_ptr(), absmax.data_ptr(), *_nested(nested_absmax, nested_map, offset), blocksize,
        _RECORDS[quant_type], math.prod(shape), y.data_ptr(), DTYPE_CODES[dtype],
    )  # fmt: skip
    return y


def linear_4bit_tensors(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_map: Tensor | None,
    offset: Tensor | None,
    bias: Tensor | None,
    quant_type: str,
    blocksize: int,
    n: int,
    compute: str,
) -> Tensor | None:
    """linear_4bit of plain CPU tensors that C++ itself checks; None where it found something that does not fit."""
    shape = x.shape
    rows = x.numel() // (shape[-1] or 1)
    if (compute == "bf16" and rows > BF16_FROM) or compute not in COMPUTE or quant_type not in CODEBOOKS or n <= 0:
        return None
    y = x.new_empty((*shape[:-1], n))
    written = _C.linear_4bit_tensors(
        x, packed, absmax, nested_absmax, nested_map, offset, bias, y, _RECORDS[quant_type], blocksize,
        compute in AS_INT8,
    )  # fmt: skip
    return y if written else None


def linear_4bit(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_map: Tensor | None,
    offset: Tensor | None,
    bias: Tensor | None,
    quant_type: str,
    blocksize: int,
    n: int,
    compute: str,
) -> Tensor:
    shape = x.shape
    k = shape[-1]
    rows = x.numel() // k
    if compute == "bf16" and rows > BF16_FROM:
        return _linear_bf16(x, packed, absmax, nested_absmax, nested_map, offset, bias, quant_type, blocksize, n)
    y = x.new_empty((*shape[:-1], n))
    bias_at, bias_dtype = (0, 0) if bias is None else (bias.data_ptr(), DTYPE_CODES[bias.dtype])
    _C.linear_4bit(
        x.data_ptr(), DTYPE_CODES[x.dtype], packed.data_ptr(), absmax.data_ptr(),
        *_nested(nested_absmax, nested_map, offset), n, k, blocksize, _RECORDS[quant_type],
        bias_at, bias_dtype, rows, y.data_ptr(), compute in AS_INT8,
    )  # fmt: skip
    return y


def _linear_bf16(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_map: Tensor | None,
    offset: Tensor | None,
    bias: Tensor | None,
    quant_type: str,
    blocksize: int,
    n: int,
) -> Tensor:
    """torch's bf16 product with a dequantized copy of the weight, which lives as long as the call."""
    k = x.shape[-1]
    weight = torch.empty((n, k), dtype=torch.bfloat16)
    _C.weight_4bit(
        packed.data_ptr(), absmax.data_ptr(), *_nested(nested_absmax, nested_map, offset), n, k, blocksize,
        _RECORDS[quant_type], weight.data_ptr(), DTYPE_CODES[weight.dtype],
    )  # fmt: skip
    product = functional.linear(x.to(torch.bfloat16), weight)
    if bias is None and x.dtype is torch.bfloat16:
        return product
    y = x.new_empty(product.shape)
    bias_at, bias_dtype = (0, 0) if bias is None else (bias.data_ptr(), DTYPE_CODES[bias.dtype])
    _C.finish_bf16(product.data_ptr(), bias_at, bias_dtype, y.numel() // n, n, y.data_ptr(), DTYPE_CODES[x.dtype])
    return y
