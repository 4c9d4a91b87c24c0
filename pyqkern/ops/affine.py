"""The operators of affine quantization: choose_qparams_affine, quantize_affine and dequantize_affine."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyqkern.backends import QRANGE, Kernels, qrange, reference
from pyqkern.ops.checks import check_float, check_qtype, cut, from_channels, to_channels
from pyqkern.ops.registry import operator


def _check_qparams(scale: Tensor, zero_point: Tensor | None, shape: Sequence[int], device: torch.device) -> None:
    """What can be said of scale and zero_point without looking at their values."""
    if not scale.dtype.is_floating_point:
        raise TypeError(f"scale must be a floating dtype, got {scale.dtype}")
    _check_qparam("scale", scale, shape, device)
    if zero_point is not None:
        if zero_point.dtype.is_floating_point or zero_point.dtype.is_complex:
            raise TypeError(f"zero_point must be an integer dtype, got {zero_point.dtype}")
        _check_qparam("zero_point", zero_point, shape, device)


def _check_qparam(name: str, tensor: Tensor, shape: Sequence[int], device: torch.device) -> None:
    if tensor.shape != shape:
        raise ValueError(
            f"{name} must have shape {tuple(shape)} for this axis and group_size, got {tuple(tensor.shape)}"
        )
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}, where the data is, got {tensor.device}")


def _valid_qparams(scale: Tensor, zero_point: Tensor | None, qrange: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
    """Both as the kernels take them, contiguous fp32 and int32, their values checked."""
    if scale.dtype is not torch.float32:
        scale = scale.float()
    least, greatest = _least_and_greatest(scale)
    if not 0 < least <= greatest < math.inf:
        wrong = greatest if least > 0 else least
        raise ValueError(f"scale must be finite and > 0 in fp32, got {wrong}; choose_qparams_affine makes such scales")
    if zero_point is None:
        return scale.contiguous(), None
    least, greatest = _least_and_greatest(zero_point)
    if least < qrange[0] or greatest > qrange[1]:
        wrong = least if least < qrange[0] else greatest
        raise ValueError(f"zero_point must be within [{qrange[0]}, {qrange[1]}], the range of the dtype, got {wrong}")
    if zero_point.dtype is not torch.int32:
        zero_point = zero_point.int()
    return scale.contiguous(), zero_point.contiguous()


def _least_and_greatest(tensor: Tensor) -> tuple[float, float]:
    """Of a CPU tensor. On CUDA, reading values would stop the stream: there 1 and 1, which pass every check."""
    if tensor.is_cuda or not tensor.numel():
        return 1, 1
    if tensor.numel() == 1:
        return (value := tensor.item()), value
    least, greatest = tensor.aminmax()
    return least.item(), greatest.item()


def _qparams_shape(view: Sequence[int], kept: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(view[d] for d in kept)


def _choose_qparams_fake(
    x: Tensor, dtype: torch.dtype, axis: Sequence[int] | None, group_size: int | None, symmetric: bool, bits: int = 8
) -> tuple[Tensor, Tensor]:
    check_float("x", x.dtype)
    check_qtype("dtype", dtype, bits)
    shape = _qparams_shape(*cut(x.shape, axis, group_size))
    return x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.int32)


@operator(
    "choose_qparams_affine(Tensor x, ScalarType dtype, int[]? axis, int? group_size, bool symmetric, int bits=8)"
    " -> (Tensor, Tensor)",
    _choose_qparams_fake,
)
def _choose_qparams(
    kernels: Kernels,
    x: Tensor,
    dtype: torch.dtype,
    axis: Sequence[int] | None,
    group_size: int | None,
    symmetric: bool,
    bits: int = 8,
) -> tuple[Tensor, Tensor]:
    check_float("x", x.dtype)
    check_qtype("dtype", dtype, bits)
    view, kept = cut(x.shape, axis, group_size)
    flat, sizes, _ = to_channels(x, view, kept)
    lo, hi = kernels.min_max(flat, sizes) if x.numel() else reference.min_max(x, (0, sizes[1], 0))
    scale, zero_point = reference.qparams_from_range(lo, hi, dtype, symmetric, bits)
    if scale.isnan().any():
        raise ValueError("x must be finite to have a range, got NaN or an infinity in it; clamp or repair x first")
    shape = _qparams_shape(view, kept)
    return scale.view(shape), zero_point.view(shape)


def _quantize_fake(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    axis: Sequence[int] | None,
    group_size: int | None,
    dtype: torch.dtype,
    bits: int = 8,
) -> Tensor:
    check_float("x", x.dtype)
    check_qtype("dtype", dtype, bits)
    _check_qparams(scale, zero_point, _qparams_shape(*cut(x.shape, axis, group_size)), x.device)
    return x.new_empty(x.shape, dtype=dtype)


@operator(
    "quantize_affine(Tensor x, Tensor scale, Tensor? zero_point, int[]? axis, int? group_size, ScalarType dtype, "
    "int bits=8) -> Tensor",
    _quantize_fake,
)
def _quantize(
    kernels: Kernels,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    axis: Sequence[int] | None,
    group_size: int | None,
    dtype: torch.dtype,
    bits: int = 8,
) -> Tensor:
    check_float("x", x.dtype)
    check_qtype("dtype", dtype, bits)
    view, kept = cut(x.shape, axis, group_size)
    _check_qparams(scale, zero_point, _qparams_shape(view, kept), x.device)
    scale, zero_point = _valid_qparams(scale, zero_point, qrange(dtype, bits))
    if x.numel() == 0:
        return x.new_empty(x.shape, dtype=dtype)
    flat, sizes, order = to_channels(x, view, kept)
    return from_channels(kernels.quantize(flat, sizes, scale, zero_point, dtype, not kept, bits), x.shape, order)


def _dequantize_fake(
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    axis: Sequence[int] | None,
    group_size: int | None,
    dtype: torch.dtype,
) -> Tensor:
    check_qtype("q", q.dtype)
    check_float("dtype", dtype)
    _check_qparams(scale, zero_point, _qparams_shape(*cut(q.shape, axis, group_size)), q.device)
    return q.new_empty(q.shape, dtype=dtype)


@operator(
    "dequantize_affine(Tensor q, Tensor scale, Tensor? zero_point, int[]? axis, int? group_size, ScalarType dtype)"
    " -> Tensor",
    _dequantize_fake,
)
def _dequantize(
    kernels: Kernels,
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    axis: Sequence[int] | None,
    group_size: int | None,
    dtype: torch.dtype,
) -> Tensor:
    check_qtype("q", q.dtype)
    check_float("dtype", dtype)
    view, kept = cut(q.shape, axis, group_size)
    _check_qparams(scale, zero_point, _qparams_shape(view, kept), q.device)
    scale, zero_point = _valid_qparams(scale, zero_point, QRANGE[q.dtype])
    if q.numel() == 0:
        return q.new_empty(q.shape, dtype=dtype)
    flat, sizes, order = to_channels(q, view, kept)
    return from_channels(kernels.dequantize(flat, sizes, scale, zero_point, dtype), q.shape, order)
