"""The C++ kernels, behind the functions of `pyqkern.backends.Kernels`.

Everything that C++ is given has been checked by `pyqkern.ops`: dtypes, device, contiguity and shapes. It takes
addresses and sizes, uses torch's own OpenMP pool and releases the GIL. The functions of SHORT_WAY are the exception:
C++ checks what they are given.

Memory is asked for by `new_empty`, or by name of the device: torch's default device may be another.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pyqkern import _C
from pyqkern.backends import ACTIVATIONS, GATES, PANEL, QRANGE, Shape, Sizes, Weight4bit, Weight8bit
from pyqkern.backends.reference.four_bit import CODEBOOKS, block_scales, nested_scales, plain
from pyqkern.schemes import COMPUTE

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
QTYPE_CODES = {dtype: code for code, dtype in enumerate(QRANGE)}
ACTIVATION_CODES = {name: code for code, name in enumerate(ACTIVATIONS)}


def min_max(x: Tensor, sizes: Sizes) -> tuple[Tensor, Tensor]:
    channels = sizes[1]
    lo, hi = x.new_empty((2, channels), dtype=torch.float32).unbind()
    _C.min_max(x.data_ptr(), DTYPE_CODES[x.dtype], *sizes, lo.data_ptr(), hi.data_ptr())
    return lo, hi


def quantize(
    x: Tensor, sizes: Sizes, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype, fused: bool, bits: int
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
    y = a.new_empty((m, n), dtype=torch.int32)
    _C.int8_matmul(a.data_ptr(), a.dtype is torch.uint8, w.data_ptr(), m, n, k, y.data_ptr())
    return y


# ---- INT8


def packed_shape(n: int, k: int) -> Shape:
    """[panel][k / 4][16 channels of 4 k]; the last lines of a panel hold what `reference.panels` says."""
    quads = (k + 3) // 4
    return ((n + PANEL - 1) // PANEL, quads + 2 + (quads // 2 + 511) // 512, 4 * PANEL)


def int8_pack(weight: Tensor) -> Tensor:
    n, k = weight.shape
    packed = weight.new_empty(packed_shape(n, k))
    _C.pack_int8(weight.data_ptr(), n, k, packed.data_ptr())
    return packed


def int8_unpack(packed: Tensor, n: int, k: int) -> Tensor:
    weight = packed.new_empty((n, k))
    _C.unpack_int8(packed.data_ptr(), n, k, weight.data_ptr())
    return weight


def int8_rows(packed: Tensor, n: int, k: int, rows: Tensor) -> Tensor:
    codes = packed.new_empty((rows.numel(), k))
    _C.int8_gather(packed.data_ptr(), k, rows.data_ptr(), rows.numel(), codes.data_ptr())
    return codes


def _bias(bias: Tensor | None) -> tuple[int, int]:
    """Address and type; zeros where there is none."""
    return (0, 0) if bias is None else (bias.data_ptr(), DTYPE_CODES[bias.dtype])


def int8_linear(
    x: Tensor, packed: Tensor, weight_scale: Tensor, bias: Tensor | None, activation: str, symmetric: bool, bits: int
) -> Tensor:
    n, k = weight_scale.shape[0], x.shape[-1]
    y = x.new_empty((*x.shape[:-1], n))
    _C.int8_linear(
        x.data_ptr(), DTYPE_CODES[x.dtype], packed.data_ptr(), weight_scale.data_ptr(), *_bias(bias),
        x.numel() // k, n, k, y.data_ptr(), ACTIVATION_CODES[activation], symmetric, bits,
    )  # fmt: skip
    return y


def int8_linear_static(
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    input_scale: Tensor,
    input_zero_point: Tensor,
    bits: int,
) -> Tensor:
    n, k = weight_scale.shape[0], x.shape[-1]
    y = x.new_empty((*x.shape[:-1], n))
    _C.int8_linear_static(
        x.data_ptr(), DTYPE_CODES[x.dtype], packed.data_ptr(), weight_scale.data_ptr(), *_bias(bias),
        x.numel() // k, n, k, y.data_ptr(), ACTIVATION_CODES[activation], bits,
        input_scale.data_ptr(), input_zero_point.data_ptr(),
    )  # fmt: skip
    return y


# ---- 4 bits

STRIP = 64  # channels, of which each k / blocksize has its scales beside each other: csrc's kernels.h

# "auto" multiplies integers: measured, that is the fastest way for every number of rows on every ISA.
AS_INT8 = ("int8", "auto")

# compute="bf16": up to this many rows keep the weights in fp32, more of them go through torch's bf16 product.
BF16_FROM = 4
_RECORDS = {name: book.record.data_ptr() for name, book in CODEBOOKS.items()}


def in_panels(n: int, k: int, blocksize: int) -> bool:
    """Whether a weight [n, k] is stored in panels, which the integer kernels need: in_panels of the C++."""
    return n >= PANEL and k % blocksize == 0


def packed_shapes_4bit(n: int, k: int, blocksize: int) -> tuple[Shape, Shape]:
    """Flat ones have one dimension; those in panels, whose last rows are filled up, have two."""
    if not in_panels(n, k, blocksize):
        return ((n * k + 1) // 2,), (-(-n * k // blocksize),)
    panels = -(-n // PANEL)
    return (panels, PANEL * k // 2), (panels, PANEL * k // blocksize)


def pack_4bit(packed: Tensor, n: int, k: int, blocksize: int) -> Tensor:
    if not in_panels(n, k, blocksize):
        return packed.clone()
    panels = packed.new_empty(packed_shapes_4bit(n, k, blocksize)[0])
    _C.pack_4bit(packed.data_ptr(), n, k, panels.data_ptr())
    return panels


def unpack_4bit(packed: Tensor, n: int, k: int, blocksize: int) -> Tensor:
    if not in_panels(n, k, blocksize):
        return packed.clone()
    flat = packed.new_empty(n * k // 2)
    _C.unpack_4bit(packed.data_ptr(), n, k, flat.data_ptr())
    return flat


def pack_scales(absmax: Tensor, n: int, k: int, blocksize: int) -> Tensor:
    """[n, k / blocksize], flat -> [strip][k / blocksize][panel][16]: csrc's kernels.h."""
    if not in_panels(n, k, blocksize):
        return absmax.clone()
    rows = functional.pad(absmax.view(n, k // blocksize), (0, 0, 0, -n % PANEL))
    strips = torch.cat([strip.t().reshape(-1) for strip in rows.split(STRIP)])
    return strips.view(packed_shapes_4bit(n, k, blocksize)[1])


def unpack_scales(absmax: Tensor, n: int, k: int, blocksize: int) -> Tensor:
    if not in_panels(n, k, blocksize):
        return absmax.clone()
    blocks = k // blocksize
    if n % STRIP == 0:
        return absmax.view(n // STRIP, blocks, STRIP).transpose(1, 2).reshape(-1)
    strips = absmax.view(-1).split(blocks * STRIP)
    return torch.cat([strip.view(blocks, -1).t().reshape(-1) for strip in strips])[: n * blocks]


def quantize_4bit(x: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    numel = x.numel()
    packed = x.new_empty((numel + 1) // 2, dtype=torch.uint8)
    absmax = x.new_empty(-(-numel // blocksize), dtype=torch.float32)
    _C.quantize_4bit(
        x.data_ptr(), DTYPE_CODES[x.dtype], numel, blocksize, _RECORDS[quant_type], packed.data_ptr(), absmax.data_ptr()
    )
    return packed, absmax


def _scales(weight: Weight4bit) -> tuple[int, int, int, float]:
    """Addresses of absmax, nested_absmax and nested_map, and nested_offset."""
    absmax, nested, values, offset = weight[1:5]
    if nested is None or values is None or offset is None:
        return absmax.data_ptr(), 0, 0, 0.0
    return absmax.data_ptr(), nested.data_ptr(), values.data_ptr(), offset.item()


def dequantize_4bit(weight: Weight4bit, dtype: torch.dtype) -> Tensor:
    y = weight.packed.new_empty(tuple(weight.shape), dtype=dtype)
    _C.dequantize_4bit(
        weight.packed.data_ptr(), *_scales(weight), weight.blocksize, _RECORDS[weight.quant_type], y.numel(),
        y.data_ptr(), DTYPE_CODES[dtype],
    )  # fmt: skip
    return y


def linear_4bit(x: Tensor, weight: Weight4bit, bias: Tensor | None, compute: str) -> Tensor:
    n, k = weight.shape
    rows = x.numel() // k
    if compute == "bf16" and rows > BF16_FROM:
        return _linear_bf16(x, weight, bias)
    y = x.new_empty((*x.shape[:-1], n))
    _C.linear_4bit(
        x.data_ptr(), DTYPE_CODES[x.dtype], weight.packed.data_ptr(), *_scales(weight), n, k, weight.blocksize,
        _RECORDS[weight.quant_type], *_bias(bias), rows, y.data_ptr(), compute in AS_INT8,
    )  # fmt: skip
    return y


def _linear_bf16(x: Tensor, weight: Weight4bit, bias: Tensor | None) -> Tensor:
    """torch's bf16 product with a dequantized copy of the weight, which lives as long as the call."""
    n, k = weight.shape
    values = x.new_empty((n, k), dtype=torch.bfloat16)
    _C.weight_4bit(
        weight.packed.data_ptr(), *_scales(weight), n, k, weight.blocksize, _RECORDS[weight.quant_type],
        values.data_ptr(), DTYPE_CODES[values.dtype],
    )  # fmt: skip
    product = functional.linear(x.to(torch.bfloat16), values)
    if bias is None and x.dtype is torch.bfloat16:
        return product
    y = x.new_empty(product.shape)
    _C.finish_bf16(product.data_ptr(), *_bias(bias), y.numel() // n, n, y.data_ptr(), DTYPE_CODES[x.dtype])
    return y


def rows_4bit(weight: Weight4bit, rows: Tensor, dtype: torch.dtype) -> Tensor:
    n, k = weight.shape
    if in_panels(n, k, weight.blocksize):
        return dequantize_4bit(_gather_panels(weight, rows), dtype)
    y = weight.packed.new_empty((rows.numel(), k), dtype=dtype)
    scales = block_scales(weight)
    _C.dequantize_rows_4bit(
        weight.packed.data_ptr(), scales.data_ptr(), k, weight.blocksize, _RECORDS[weight.quant_type], rows.data_ptr(),
        rows.numel(), y.data_ptr(), DTYPE_CODES[dtype],
    )  # fmt: skip
    return y


def _gather_panels(weight: Weight4bit, rows: Tensor) -> Weight4bit:
    """weight[rows], flat."""
    (n, k), m = weight.shape, rows.numel()
    each = k // weight.blocksize
    codes = weight.packed.new_empty(m * k // 2)
    scales = weight.absmax.new_empty((m, each))
    _C.gather_4bit(
        weight.packed.data_ptr(), weight.absmax.data_ptr(), scales.element_size(), n, k, weight.blocksize,
        rows.data_ptr(), m, codes.data_ptr(), scales.data_ptr(),
    )  # fmt: skip
    if weight.nested_absmax is not None:
        blocks = rows.unsqueeze(1) * each + torch.arange(each, device=rows.device)
        scales = nested_scales(scales, blocks, weight)
    return plain(codes, scales.view(-1), weight, (m, k))


# ---- linears as the encoder layer and recurrent layers take them; the encoder layer, which no other backend has


def encoder_linear(packed: Tensor, scale: Tensor, bias: Tensor | None, n: int, k: int) -> tuple[int, ...]:
    """An INT8 linear as C++ takes it: addresses, so that it must not outlive the tensors."""
    return packed.data_ptr(), scale.data_ptr(), *_bias(bias), n, k, 0, 0, 0, 0, 0


def encoder_linear_4bit(weight: Weight4bit, bias: Tensor | None) -> tuple[int, ...]:
    """The same of a weight in panels."""
    nested = (0 if tensor is None else tensor.data_ptr() for tensor in weight[2:5])
    ends = weight.blocksize, _RECORDS[weight.quant_type]
    return weight.packed.data_ptr(), weight.absmax.data_ptr(), *_bias(bias), *weight.shape, *nested, *ends


def encoder_layer(
    x: Tensor,
    mask: tuple[int, ...],
    position_bias: tuple[int, ...],
    linears: Sequence[tuple[int, ...]],
    norms: Sequence[int],
    norm_dtype: int,
    eps: Sequence[float],
    heads: int,
    head_size: int,
    scaling: float,
    activation: str,
    symmetric: bool,
    bits: int,
    factors: Sequence[int],
) -> Tensor:
    """mask, position_bias: address, or 0, whether bool, heads, strides in elements of batch, head and query.

    factors: addresses, or 0, of what the inputs of query, key and value, and of up, are multiplied by.
    """
    y = torch.empty_like(x)
    _C.encoder_layer(
        x.data_ptr(), DTYPE_CODES[x.dtype], x.shape[0], x.shape[1], mask, position_bias, linears, norms, norm_dtype,
        *eps, heads, head_size, scaling, ACTIVATION_CODES[activation], symmetric, bits, *factors,
        y.data_ptr(),
    )  # fmt: skip
    return y


# ---- recurrent layers

CELL_CODES = {name: code for code, name in enumerate(GATES)}
_NO_LINEAR = (0,) * 11


def recurrent(
    x: Tensor,
    batch_sizes: Tensor,
    weights: Sequence[Weight8bit | Weight4bit],
    biases: Sequence[Tensor],
    h: Tensor,
    c: Tensor | None,
    cell: str,
    reverse: bool,
    symmetric: bool,
    bits: int,
    compute: str,
) -> tuple[Tensor, Tensor, Tensor | None]:
    widths = (x.shape[-1], h.shape[-1], h.shape[-1] if c is None else c.shape[-1])
    linears = []
    for i, (weight, k) in enumerate(zip(weights, widths, strict=False)):
        bias = biases[i] if i < len(biases) else None
        if isinstance(weight, Weight4bit):
            linears.append(encoder_linear_4bit(weight, bias))
        else:
            linears.append(encoder_linear(weight.packed, weight.scale, bias, weight.scale.shape[0], k))
    y = x.new_empty((x.shape[0], h.shape[-1]))
    h, c = h.clone(), None if c is None else c.clone()
    _C.recurrent(
        x.data_ptr(), batch_sizes.data_ptr(), batch_sizes.numel(), (*linears, *[_NO_LINEAR] * (3 - len(linears))),
        CELL_CODES[cell], reverse, symmetric or isinstance(weights[0], Weight4bit), bits, compute in AS_INT8,
        h.data_ptr(), 0 if c is None else c.data_ptr(), y.data_ptr(),
    )  # fmt: skip
    return y, h, c


# ---- the short way: plain CPU tensors that C++ itself checks; None where it found something that does not fit

_exchange: Any = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)  # torch >= 2.10
_HAS_EXCHANGE: bool = _exchange is not None and _C.use_exchange(_exchange, Tensor, torch.nn.Parameter)


def _short_int8(
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    symmetric: bool,
    bits: int = 8,
) -> Tensor | None:
    if not x.dim() or not weight_scale.dim():
        return None
    y = x.new_empty((*x.shape[:-1], weight_scale.shape[0]))
    code = ACTIVATION_CODES.get(activation, -1)
    return y if _C.int8_linear_tensors(x, packed, weight_scale, bias, y, code, symmetric, bits) else None


def _short_int8_static(
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    input_scale: Tensor,
    input_zero_point: Tensor,
    bits: int = 8,
) -> Tensor | None:
    if not x.dim() or not weight_scale.dim():
        return None
    y = x.new_empty((*x.shape[:-1], weight_scale.shape[0]))
    code = ACTIVATION_CODES.get(activation, -1)
    written = _C.int8_linear_tensors(x, packed, weight_scale, bias, y, code, False, bits, input_scale, input_zero_point)
    return y if written else None


def _short_4bit(x: Tensor, weight: Weight4bit, bias: Tensor | None, compute: str) -> Tensor | None:
    packed, absmax, nested_absmax, nested_map, nested_offset, quant_type, blocksize, (n, k) = weight
    shape = x.shape
    if not shape or shape[-1] != k or n <= 0 or compute not in COMPUTE or quant_type not in _RECORDS:
        return None
    if compute == "bf16" and x.numel() > BF16_FROM * k:
        return None
    y = x.new_empty((*shape[:-1], n))
    written = _C.linear_4bit_tensors(
        x, packed, absmax, nested_absmax, nested_map, nested_offset, bias, y, _RECORDS[quant_type], blocksize,
        compute in AS_INT8,
    )  # fmt: skip
    return y if written else None


SHORT_WAY: dict[str, Callable[..., Tensor | None]] = (
    {"int8_linear": _short_int8, "int8_linear_static": _short_int8_static, "linear_4bit": _short_4bit}
    if _HAS_EXCHANGE
    else {}
)
