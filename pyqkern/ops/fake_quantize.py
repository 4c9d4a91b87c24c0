"""The operators of fake quantization: fake_quantize, fake_quantize_rows and fake_quantize_backward.

Each takes x of any shape as rows of `size` elements: of a token's features, of a weight's channel or of a group.
"""

import torch
from torch import Tensor

from pyqkern.backends import Kernels, qrange, reference
from pyqkern.ops.checks import check_float, check_qtype
from pyqkern.ops.registry import operator


def _check_rows(x: Tensor, size: int) -> None:
    check_float("x", x.dtype)
    if size < 1 or x.numel() % size:
        raise ValueError(f"size must divide the elements of x, got {size} for shape {tuple(x.shape)}")


def _check(x: Tensor, size: int, scale: Tensor, zero_point: Tensor | None, qmin: int, qmax: int) -> None:
    _check_rows(x, size)
    if not (0 < qmax <= 255 if qmin == 0 else 0 < qmax <= 127 and qmin in (-qmax, -qmax - 1)):
        raise ValueError(
            f"qmin and qmax must be 0 and up to 255, or -qmax or -qmax - 1 and up to 127, got {qmin} and {qmax}"
        )
    for name, tensor, dtype in (("scale", scale, torch.float32), ("zero_point", zero_point, torch.int32)):
        if tensor is None:
            continue
        if tensor.dtype is not dtype:
            raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")
        if tensor.numel() not in (1, x.numel() // size) or tensor.numel() != scale.numel():
            raise ValueError(f"{name} must have 1 or {x.numel() // size} elements, got {list(tensor.shape)}")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on {x.device}, where x is, got {tensor.device}")


def _fake(x: Tensor, size: int, scale: Tensor, zero_point: Tensor | None, qmin: int, qmax: int) -> Tensor:
    _check(x, size, scale, zero_point, qmin, qmax)
    return x.new_empty(x.shape)


@operator("fake_quantize(Tensor x, int size, Tensor scale, Tensor? zero_point, int qmin, int qmax) -> Tensor", _fake)
def _fake_quantize(
    kernels: Kernels, x: Tensor, size: int, scale: Tensor, zero_point: Tensor | None, qmin: int, qmax: int
) -> Tensor:
    y = _fake(x, size, scale, zero_point, qmin, qmax)
    if not x.numel():
        return y
    zero_point = None if zero_point is None else zero_point.contiguous()
    return kernels.fake_quantize(x.contiguous(), size, scale.contiguous(), zero_point, qmin, qmax)


def _rows_fake(x: Tensor, size: int, dtype: torch.dtype, symmetric: bool, bits: int = 8) -> Tensor:
    _check_rows(x, size)
    check_qtype("dtype", dtype, 8 if bits == 7 else bits)
    return x.new_empty(x.shape)


@operator("fake_quantize_rows(Tensor x, int size, ScalarType dtype, bool symmetric, int bits=8) -> Tensor", _rows_fake)
def _fake_quantize_rows(
    kernels: Kernels, x: Tensor, size: int, dtype: torch.dtype, symmetric: bool, bits: int = 8
) -> Tensor:
    """Each row with the scale and zero point that cover it, as choose_qparams_affine has them; a row with NaN or an
    infinity becomes NaN.
    """
    y = _rows_fake(x, size, dtype, symmetric, bits)
    if not x.numel():
        return y
    x = x.contiguous()
    lo, hi = kernels.min_max(x, (1, x.numel() // size, size))
    scale, zero_point = reference.qparams_from_range(lo, hi, dtype, symmetric, bits)
    return kernels.fake_quantize(x, size, scale, zero_point, *qrange(dtype, bits))


def _backward_fake(
    grad: Tensor, x: Tensor, size: int, scale: Tensor, zero_point: Tensor | None, qmin: int, qmax: int
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, size, scale, zero_point, qmin, qmax)
    if grad.shape != x.shape or grad.dtype is not x.dtype or grad.device != x.device:
        raise ValueError(
            f"grad must be like x, {x.dtype} {list(x.shape)} on {x.device}, got {grad.dtype} {list(grad.shape)} on "
            f"{grad.device}"
        )
    return x.new_empty(x.shape), torch.empty_like(scale), torch.empty_like(scale)


@operator(
    "fake_quantize_backward(Tensor grad, Tensor x, int size, Tensor scale, Tensor? zero_point, int qmin, int qmax)"
    " -> (Tensor, Tensor, Tensor)",
    _backward_fake,
)
def _fake_quantize_backward(
    kernels: Kernels,
    grad: Tensor,
    x: Tensor,
    size: int,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients to x, to scale and to offset = scale * -zero_point: `reference.fake_quantize_backward`.

    Where one scale is for all rows, their gradients to it are summed in fp64.
    """
    by_x, by_scale, by_offset = _backward_fake(grad, x, size, scale, zero_point, qmin, qmax)
    if not x.numel():
        return by_x, by_scale.zero_(), by_offset.zero_()
    zero_point = None if zero_point is None else zero_point.contiguous()
    given = (grad.contiguous(), x.contiguous(), size, scale.contiguous(), zero_point, qmin, qmax)
    by_x, *sums = kernels.fake_quantize_backward(*given)
    if scale.numel() == 1:
        sums = [each.double().sum().float() for each in sums]
    by_scale, by_offset = (each.reshape(scale.shape) for each in sums)
    return by_x, by_scale, by_offset
