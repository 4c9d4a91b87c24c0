# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Affine quantize and dequantize, per tensor, per channel and per group: the numbers of pyqkern.backends.reference.

    q = clamp(rint(x * (1/scale) + zero_point), qmin, qmax)        y = scale * (q - zero_point)

The launchers take a contiguous tensor of any shape as [outer, channels, inner]; channel c has scale[c] and
zero_point[c]. The kernels see a matrix: [outer * channels, inner], or [outer, channels] where inner is 1.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import check_device, launch
from .numerics import to_codes

BLOCK = 4096  # elements of a program: 32 to a thread, so that each has several 16-byte loads in flight


@triton.jit
def _tile(rows, columns, channels, PER_COLUMN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """This program's elements: their offsets, channels and which of them exist."""
    blocks = tl.cdiv(columns, BLOCK_C)
    row = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    column = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    channel = column if PER_COLUMN else row % channels
    return row * columns + column, channel, (row < rows) & (column < columns)


@triton.jit
def quantize_kernel(
    x_ptr, q_ptr, scale_ptr, zero_point_ptr,
    rows, columns, channels,
    PER_COLUMN: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr, FUSED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    offset, channel, mask = _tile(rows, columns, channels, PER_COLUMN, BLOCK_R, BLOCK_C)
    channel_mask = channel < channels
    x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    inverse = tl.div_rn(1.0, tl.load(scale_ptr + channel, mask=channel_mask, other=1.0))
    zero = tl.zeros_like(inverse)
    if zero_point_ptr is not None:
        zero = tl.load(zero_point_ptr + channel, mask=channel_mask, other=0).to(tl.float32)
    q = to_codes(x, inverse, zero, QMIN, QMAX, FUSED)
    tl.store(q_ptr + offset, q.to(tl.int32).to(q_ptr.dtype.element_ty), mask=mask)


@triton.jit
def dequantize_kernel(
    q_ptr, y_ptr, scale_ptr, zero_point_ptr,
    rows, columns, channels,
    PER_COLUMN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    offset, channel, mask = _tile(rows, columns, channels, PER_COLUMN, BLOCK_R, BLOCK_C)
    channel_mask = channel < channels
    value = tl.load(q_ptr + offset, mask=mask, other=0).to(tl.int32)
    if zero_point_ptr is not None:
        value -= tl.load(zero_point_ptr + channel, mask=channel_mask, other=0)
    y = tl.load(scale_ptr + channel, mask=channel_mask, other=1.0) * value.to(tl.float32)
    tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=mask)


def _launch(kernel, x: Tensor, y: Tensor, scale: Tensor, zero_point: Tensor | None, **constants) -> Tensor:
    device = check_device(x=x, scale=scale, zero_point=zero_point)
    outer, channels, inner = x.shape
    per_column = inner == 1 and channels > 1
    rows, columns = (outer, channels) if per_column else (outer * channels, inner)
    block_c = min(triton.next_power_of_2(columns), BLOCK)
    block_r = BLOCK // block_c
    launch(
        kernel, triton.cdiv(rows, block_r) * triton.cdiv(columns, block_c), device,
        x, y, scale, zero_point, rows, columns, channels,
        PER_COLUMN=per_column, BLOCK_R=block_r, BLOCK_C=block_c, **constants,
    )  # fmt: skip
    return y


def quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype, fused: bool, bits: int = 8
) -> Tensor:
    """x [outer, channels, inner] fp32/bf16/fp16, scale fp32 [channels], zero_point int32 [channels] or None (0).

    Returns q of `dtype` (int8 or uint8) in x's shape. fused: multiply and add are one fma. bits: 8, or 4, one
    code to an element.
    """
    qmin, qmax = (end >> (8 - bits) for end in (torch.iinfo(dtype).min, torch.iinfo(dtype).max))
    q = torch.empty_like(x, dtype=dtype)
    return _launch(quantize_kernel, x, q, scale, zero_point, QMIN=qmin, QMAX=qmax, FUSED=fused)


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype) -> Tensor:
    """q [outer, channels, inner] int8 or uint8 -> scale * (q - zero_point), rounded once to `dtype`."""
    return _launch(dequantize_kernel, q, torch.empty_like(q, dtype=dtype), scale, zero_point)


def min_max(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [outer, channels, inner] -> the least and greatest of each channel, fp32 [channels].

    NaN in both where an element is NaN or infinite. torch's own reductions: no kernel here would be faster.
    """
    check_device(x=x)
    lo, hi = x.amin((0, 2)).float(), x.amax((0, 2)).float()
    bad = torch.where(lo.isfinite() & hi.isfinite(), 0.0, torch.nan)
    return lo + bad, hi + bad
