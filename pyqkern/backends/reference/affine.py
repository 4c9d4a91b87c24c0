"""Affine quantization in plain torch. See `pyqkern.backends.reference`."""

import torch
from torch import Tensor

from pyqkern.backends import FLT_MIN, Sizes, qrange


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c of fp32 tensors, rounded once.

    The product of two fp32 numbers is exact in fp64. The sum is rounded to odd there, so that the second rounding, to
    fp32, sees on which side of a tie it lies (Boldo, Melquiond, "Emulation of FMA and correctly rounded sums", 2008).
    """
    product, c = a.double() * b.double(), c.double()
    total = product + c
    rest = total - product
    error = (product - (total - rest)) + (c - rest)
    even = total.contiguous().view(torch.int64) % 2 == 0
    step_off = even & (error != 0) & error.isfinite()
    return torch.where(step_off, torch.nextafter(total, error * torch.inf), total).float()


def adds_in_order(x: Tensor) -> bool:
    """Whether fp32 sums are added in the order of the C++: on the CPU. Elsewhere the K calls of it would take long."""
    return x.is_cpu


def chain(x: Tensor, w: Tensor) -> Tensor:
    """x [M, K], w [N, K], fp32 -> x @ w.T, fp32 [M, N]: one chain of fma for each element, from 0, k ascending.

    Where `adds_in_order` says no: torch's product.
    """
    if not adds_in_order(x):
        return x @ w.T
    total = torch.zeros(x.shape[0], w.shape[0], dtype=torch.float32, device=x.device)
    for of_x, of_w in zip(x.unbind(1), w.unbind(1), strict=True):
        total = fma(of_x.unsqueeze(1), of_w, total)
    return total


def min_max(x: Tensor, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """The least and the greatest of each channel, fp32 [channels]; NaN in both where an element is NaN or infinite.

    A channel without elements gives +inf and -inf.
    """
    outer, channels, inner = sizes
    x = x.reshape(sizes).float().transpose(0, 1).reshape(channels, outer * inner)
    if x.numel() == 0:
        return x.new_full((channels,), torch.inf), x.new_full((channels,), -torch.inf)
    bad = torch.where(x.isfinite().all(1), 0.0, torch.nan)
    return x.amin(1) + bad, x.amax(1) + bad


def qparams_from_range(
    lo: Tensor, hi: Tensor, dtype: torch.dtype, symmetric: bool, bits: int = 8
) -> tuple[Tensor, Tensor]:
    """Scale (fp32) and zero point (int32) that cover [lo, hi] and zero; NaN in the range gives scale NaN.

    A range of zero has scale 1. The scale is never below 2**-126, so that its reciprocal is finite.
    """
    qmin, qmax = qrange(dtype, bits)
    lo, hi = lo.clamp(max=0), hi.clamp(min=0)
    if symmetric:
        extent, levels = torch.maximum(-lo, hi), lo.new_tensor((qmax - qmin) // 2)
        scale = extent / levels
    else:
        extent, levels = hi - lo, lo.new_tensor(qmax - qmin)
        scale = torch.where(extent.isinf(), hi / levels - lo / levels, extent / levels)
    scale = torch.where(extent == 0, 1.0, scale.clamp(min=FLT_MIN))
    if symmetric:
        return scale, torch.full_like(scale, 0 if qmin < 0 else (qmax + 1) // 2, dtype=torch.int32)
    zero_point = (qmin - torch.round(lo / scale)).clamp(qmin, qmax).nan_to_num(qmin)
    return scale, zero_point.to(torch.int32)


def quantize(
    x: Tensor, sizes: Sizes, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype, fused: bool, bits: int = 8
) -> Tensor:
    """q = clamp(rint(x * (1/scale) + zero_point), qmin, qmax), ties to even; NaN gives the zero point.

    fused: multiply and add are one fma, as in torch.quantize_per_tensor; otherwise they are two roundings, as in
    torch.quantize_per_channel. With zero_point 0 there is no difference.
    """
    qmin, qmax = qrange(dtype, bits)
    inverse = (1.0 / scale).view(1, -1, 1)
    zero = torch.zeros_like(inverse) if zero_point is None else zero_point.view(1, -1, 1).float()
    value = x.reshape(sizes).float()
    value = fma(value, inverse, zero) if fused else value * inverse + zero
    return torch.where(value.isnan(), zero, value.round().clamp(qmin, qmax)).to(dtype).view(x.shape)


def dequantize(q: Tensor, sizes: Sizes, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype) -> Tensor:
    """scale * (q - zero_point) in fp32, rounded once more to dtype."""
    value = q.reshape(sizes).int()
    if zero_point is not None:
        value = value - zero_point.view(1, -1, 1)
    return (scale.view(1, -1, 1) * value.float()).to(dtype).view(q.shape)
