# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Fake quantization of rows and its backward pass: the numbers of pyqkern.backends.reference.fake_quantize.

The launchers take x, contiguous, as rows of `size` elements, with a scale and a zero point for each row or one for all.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import check_device, launch
from .numerics import round_half_even, to_codes

BLOCK = 4096  # elements of a program
SUMS = tl.constexpr(16)


@triton.jit
def _qparams(scale_ptr, zero_point_ptr, row, rows, PER_ROW: tl.constexpr):
    """1/scale, scale and zero point of these rows, [rows, 1]."""
    at = row if PER_ROW else row * 0
    scale = tl.load(scale_ptr + at, mask=row < rows, other=1.0)
    zero = tl.zeros_like(scale)
    if zero_point_ptr is not None:
        zero = tl.load(zero_point_ptr + at, mask=row < rows, other=0).to(tl.float32)
    return tl.div_rn(1.0, scale)[:, None], scale[:, None], zero[:, None]


@triton.jit
def fake_quantize_kernel(
    x_ptr, y_ptr, scale_ptr, zero_point_ptr,
    rows, size, qmin, qmax,
    PER_ROW: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(size, BLOCK_C)
    row = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    inverse, scale, zero = _qparams(scale_ptr, zero_point_ptr, row, rows, PER_ROW)
    at = row[:, None] * size + column[None, :]
    mask = (row < rows)[:, None] & (column < size)[None, :]
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    y = scale * (to_codes(x, inverse, zero, qmin, qmax, False) - zero)
    tl.store(y_ptr + at, tl.where(x == x, y, x).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _halves(x, BLOCK_R: tl.constexpr, HALF: tl.constexpr):
    """[rows, 2 * HALF] -> the sum of both halves, [rows, HALF]."""
    first, second = tl.split(tl.permute(tl.reshape(x, (BLOCK_R, 2, HALF)), (0, 2, 1)))
    return first + second


@triton.jit
def _row_sum(x, BLOCK_R: tl.constexpr):
    return _halves(_halves(_halves(_halves(x, BLOCK_R, 8), BLOCK_R, 4), BLOCK_R, 2), BLOCK_R, 1)


@triton.jit
def fake_quantize_backward_kernel(
    grad_ptr, x_ptr, by_x_ptr, by_scale_ptr, by_offset_ptr, scale_ptr, zero_point_ptr,
    rows, size, qmin, qmax,
    PER_ROW: tl.constexpr, BLOCK_R: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    inverse, _, zero = _qparams(scale_ptr, zero_point_ptr, row, rows, PER_ROW)
    of_scale = tl.zeros((BLOCK_R, SUMS), tl.float32)
    of_offset = tl.zeros((BLOCK_R, SUMS), tl.float32)
    for begin in range(0, size, SUMS):
        column = begin + tl.arange(0, SUMS)
        at = row[:, None] * size + column[None, :]
        mask = (row < rows)[:, None] & (column < size)[None, :]
        grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        v = x * inverse + zero
        v = tl.where(v == v, v, zero)
        code = round_half_even(tl.minimum(tl.maximum(v, qmin - 1.0), qmax + 1.0))
        inside = (code >= qmin) & (code <= qmax)
        clamped = tl.minimum(tl.maximum(code, qmin * 1.0), qmax * 1.0)
        of_scale += grad * tl.where(inside, code - v, clamped)
        of_offset += tl.where(inside, 0.0, grad)
        tl.store(by_x_ptr + at, tl.where(inside, grad, 0.0).to(by_x_ptr.dtype.element_ty), mask=mask)
    out = row[:, None] + tl.zeros((1, 1), tl.int32)
    tl.store(by_scale_ptr + out, _row_sum(of_scale, BLOCK_R), mask=out < rows)
    tl.store(by_offset_ptr + out, _row_sum(of_offset, BLOCK_R), mask=out < rows)


def fake_quantize(x: Tensor, size: int, scale: Tensor, zero_point: Tensor | None, qmin: int, qmax: int) -> Tensor:
    """x fp32/bf16/fp16 as rows of `size`, scale fp32 [rows] or [1], zero_point int32 of its shape or None (0).

    Returns scale * (q - zero_point) for codes q in [qmin, qmax], in x's shape and dtype.
    """
    device, rows = check_device(x=x, scale=scale, zero_point=zero_point), x.numel() // size
    block_c = min(triton.next_power_of_2(size), BLOCK)
    block_r, y = BLOCK // block_c, torch.empty_like(x)
    launch(
        fake_quantize_kernel, triton.cdiv(rows, block_r) * triton.cdiv(size, block_c), device,
        x, y, scale, zero_point, rows, size, float(qmin), float(qmax),
        PER_ROW=scale.numel() != 1, BLOCK_R=block_r, BLOCK_C=block_c,
    )  # fmt: skip
    return y


def fake_quantize_backward(
    grad: Tensor, x: Tensor, size: int, scale: Tensor, zero_point: Tensor | None, qmin: int, qmax: int
) -> tuple[Tensor, Tensor, Tensor]:
    """grad of x's dtype; the rest as for fake_quantize. Returns the gradients to x, of its dtype, and those to the
    scale and to the offset, scale * -zero_point, for each row, fp32 [rows].
    """
    device, rows = check_device(x=x, grad=grad, scale=scale, zero_point=zero_point), x.numel() // size
    by_x, sums = torch.empty_like(x), [x.new_empty(rows, dtype=torch.float32) for _ in range(2)]
    block_r = min(16, triton.next_power_of_2(rows))
    launch(
        fake_quantize_backward_kernel, triton.cdiv(rows, block_r), device,
        grad, x, by_x, sums[0], sums[1], scale, zero_point, rows, size, float(qmin), float(qmax),
        PER_ROW=scale.numel() != 1, BLOCK_R=block_r, SUMS=SUMS.value, num_warps=1,  # 8 elements to a thread
    )  # fmt: skip
    return by_x, sums[0], sums[1]
