"""Operators for a chain of INT8 linears: what comes before them quantizes their input, once for all that read it.

    q, scale, zero_point = torch.ops.pyqkern.int8_quantize_rows(x, False)                     # for query, key and value
    h = torch.ops.pyqkern.int8_linear_rows(q, scale, zero_point, weight, weight_scale, bias, "none", torch.bfloat16)
    q, scale, zero_point = torch.ops.pyqkern.gelu_quantize_rows(h, "none", False)             # a feed-forward
    y, q, scale, zero_point = torch.ops.pyqkern.layer_norm_quantize_rows(h, residual, gamma, beta, 1e-12, False)

x is [M, K]; q int8 [M, K], scale fp32 [M], zero_point int32 [M], so that x is about scale * (q - zero_point). Codes and
scales are those of int8_linear, less 128: `int8_linear_rows` after `int8_quantize_rows` has the bits of int8_linear.
CUDA has kernels for all of it, which read and write each tensor once; elsewhere it is plain torch.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pyqkern import cuda, reference
from pyqkern.affine import check_float
from pyqkern.ops import _check_packed, _kernels_of, _operator
from pyqkern.reference import ACTIVATIONS, INT8_LINEAR_MAX_K

Rows = tuple[Tensor, Tensor, Tensor]


def _check_rows(x: Tensor, **same_device: Tensor | None) -> None:
    check_float("x", x.dtype)
    if x.dim() != 2:
        raise ValueError(f"x must be [M, K], got shape {tuple(x.shape)}; flatten it with .view(-1, K)")
    if x.shape[1] > INT8_LINEAR_MAX_K:
        raise ValueError(f"K must be at most {INT8_LINEAR_MAX_K} (255 * 127 * K < 2**31), got {x.shape[1]}")
    for name, tensor in same_device.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} must be on {x.device}, where x is, got {tensor.device}")


def _empty_rows(x: Tensor) -> Rows:
    """Results of the right shapes; on CUDA rows of q are a multiple of 16 bytes apart, as the kernels read them."""
    m, k = x.shape
    row = -(-k // 16) * 16 if x.device.type == "cuda" else k
    q = x.new_empty_strided((m, k), (row, 1), dtype=torch.int8)
    return q, x.new_empty(m, dtype=torch.float32), x.new_empty(m, dtype=torch.int32)


def _quantized(kernels: Any, function: str, x: Tensor, symmetric: bool, *arguments: object) -> Rows:
    q, scale, zero_point = getattr(kernels.kernels("row_quantize"), function)(x.contiguous(), symmetric, *arguments)
    return q, scale, torch.zeros_like(scale, dtype=torch.int32) if zero_point is None else zero_point


def _plain(x: Tensor, symmetric: bool) -> Rows:
    codes, scale, zero_point = reference.int8_quantize_rows(x, symmetric)
    return (codes.int() - 128).to(torch.int8), scale, zero_point - 128


def _quantize_rows_fake(x: Tensor, symmetric: bool) -> Rows:
    _check_rows(x)
    return _empty_rows(x)


@_operator("int8_quantize_rows(Tensor x, bool symmetric) -> (Tensor, Tensor, Tensor)", _quantize_rows_fake)
def _quantize_rows(kernels: Any, x: Tensor, symmetric: bool) -> Rows:
    _check_rows(x)
    if x.numel() == 0:
        return _plain_of_nothing(x)
    return _quantized(kernels, "quantize_rows", x, symmetric) if kernels is cuda else _plain(x, symmetric)


def _plain_of_nothing(x: Tensor) -> Rows:
    q, scale, zero_point = _empty_rows(x)
    return q, scale.fill_(1), zero_point.zero_()


def _check_approximate(approximate: str) -> None:
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate must be 'none' or 'tanh', got {approximate!r}")


def _gelu_fake(x: Tensor, approximate: str, symmetric: bool) -> Rows:
    _check_rows(x)
    _check_approximate(approximate)
    return _empty_rows(x)


@_operator("gelu_quantize_rows(Tensor x, str approximate, bool symmetric) -> (Tensor, Tensor, Tensor)", _gelu_fake)
def _gelu(kernels: Any, x: Tensor, approximate: str, symmetric: bool) -> Rows:
    _check_rows(x)
    _check_approximate(approximate)
    if x.numel() == 0:
        return _plain_of_nothing(x)
    if kernels is cuda:
        return _quantized(kernels, "gelu_quantize_rows", x, symmetric, approximate)
    return _plain(functional.gelu(x, approximate=approximate), symmetric)


def _check_layer_norm(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None) -> None:
    _check_rows(x, residual=residual, weight=weight, bias=bias)
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"residual must be {x.dtype} {tuple(x.shape)} as x, got {residual.dtype} {tuple(residual.shape)}"
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            check_float(name, tensor.dtype)
            if tensor.shape != x.shape[1:]:
                raise ValueError(f"{name} must have shape ({x.shape[1]},), got {tuple(tensor.shape)}")


def _layer_norm_fake(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_layer_norm(x, residual, weight, bias)
    return x.new_empty(x.shape), *_empty_rows(x)


@_operator(
    "layer_norm_quantize_rows(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, float eps, bool symmetric)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _layer_norm_fake,
)
def _layer_norm(
    kernels: Any,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    symmetric: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_layer_norm(x, residual, weight, bias)
    if x.numel() == 0:
        return x.new_empty(x.shape), *_plain_of_nothing(x)
    x, weight = x.contiguous(), weight.contiguous()
    residual = None if residual is None else residual.contiguous()
    bias = None if bias is None else bias.contiguous()
    if kernels is cuda:
        function = kernels.kernels("row_quantize").layer_norm_quantize_rows
        y, q, scale, zero_point = function(x, weight, bias, eps, symmetric, residual)
        return y, q, scale, torch.zeros_like(scale, dtype=torch.int32) if zero_point is None else zero_point
    total = x if residual is None else x + residual
    shift = None if bias is None else bias.float()
    y = functional.layer_norm(total.float(), (x.shape[1],), weight.float(), shift, eps).to(x.dtype)
    return y, *_plain(y, symmetric)


def _check_linear(
    kernels: Any,
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    dtype: torch.dtype,
) -> None:
    check_float("dtype", dtype)
    if q.dtype is not torch.int8 or q.dim() != 2:
        raise ValueError(f"q must be int8 [M, K], got {q.dtype} {tuple(q.shape)}")
    there = {"scale": scale, "zero_point": zero_point, "weight": weight, "weight_scale": weight_scale, "bias": bias}
    for name, one in there.items():
        if one is not None and one.device != q.device:
            raise ValueError(f"{name} must be on {q.device}, where q is, got {one.device}")
    n = weight_scale.numel()
    expected = {"scale": (scale, torch.float32, q.shape[0]), "zero_point": (zero_point, torch.int32, q.shape[0])}
    for name, (tensor, wanted, size) in (expected | {"weight_scale": (weight_scale, torch.float32, n)}).items():
        if tensor.dtype is not wanted or tensor.shape != (size,):
            raise ValueError(f"{name} must be {wanted} ({size},), got {tensor.dtype} {tuple(tensor.shape)}")
    _check_packed(kernels, weight, n, q.shape[1])
    if bias is not None:
        check_float("bias", bias.dtype)
        if bias.shape != (n,):
            raise ValueError(f"bias must have shape ({n},), got {tuple(bias.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")


def _linear_fake(
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    arguments = (scale, zero_point, weight, weight_scale, bias, activation, dtype)
    _check_linear(_kernels_of(q.device), q, *arguments)
    return q.new_empty((q.shape[0], weight_scale.shape[0]), dtype=dtype)


@_operator(
    "int8_linear_rows(Tensor q, Tensor scale, Tensor zero_point, Tensor weight, Tensor weight_scale, Tensor? bias,"
    " str activation, ScalarType dtype) -> Tensor",
    _linear_fake,
)
def _linear(
    kernels: Any,
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    """The linear for rows that are quantized already; weight from int8_pack."""
    _check_linear(kernels, q, scale, zero_point, weight, weight_scale, bias, activation, dtype)
    (m, k), n = q.shape, weight_scale.shape[0]
    if m * n and k and kernels is cuda:
        scale, zero_point = scale.contiguous(), zero_point.contiguous()
        weight, weight_scale = weight.contiguous(), weight_scale.contiguous()
        bias = None if bias is None else bias.contiguous()
        function = kernels.kernels("int8").int8_scaled_matmul
        return function(q, scale, zero_point, weight, weight_scale, bias, activation, dtype)
    codes = kernels.int8_unpack(weight.contiguous(), n, k) if k * n else q.new_zeros((n, k))
    product = (q.double() - zero_point.unsqueeze(1)) @ codes.double().T
    y = (scale.unsqueeze(1) * weight_scale) * product.float()
    return reference.activate(y if bias is None else y + bias.float(), activation).to(dtype)
