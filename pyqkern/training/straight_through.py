"""Gradients through quantized layers: what quantizes counts as the identity (Bengio et al., 2013).

The forward pass of a layer in training is that of the quantized layer: its weight is quantized and packed in each call,
by the code that replace_linear has, and multiplied by the same kernels. So what a trained model computes is what it
computes when it is converted, bit for bit. The backward pass multiplies with the dequantized weight and with the input
as the product saw it:

    y = x' @ w'.T + b      grad_x' = grad @ w'      grad_w' = grad.T @ x'      grad_b = sum(grad)

grad_x = grad_x' and grad_w = grad_w', but that they are 0 where a value lies outside of a given range: beyond that of
"int8-static", and where `clip_weights` cuts. A range that is chosen anew in each call covers everything.
"""

import math
from typing import Any

import torch
from torch import Tensor

from pyqkern.backends import qrange
from pyqkern.functional.four_bit import quantize_absmax
from pyqkern.nn.int8 import least_error_scale
from pyqkern.nn.linear import QLinear
from pyqkern.schemes import FP4, NF4, Int4, Int8Static, Scheme

WEIGHT_RANGE = (-127, 127)  # of INT8 codes

# What every layer's buffers are called, in the order in which `TrainedLinear` is given them.
BUFFERS = (
    "packed", "weight_scale", "absmax", "nested_absmax", "nested_map", "nested_offset", "input_scale",
    "input_zero_point",
)  # fmt: skip


class TrainedLinear(torch.autograd.Function):
    """The quantized linear `layer` with the given buffers, on the meta device itself, with gradients to the weight."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, offset: Tensor | None,
        layer: QLinear, *tensors: Tensor | None,
    ) -> Tensor:  # fmt: skip
        ctx.layer, ctx.bias_dtype = layer, None if bias is None else bias.dtype
        ctx.weight_dtype = weight.dtype
        ctx.save_for_backward(x, weight if clips(layer) else None, *tensors)
        return layer._linear(x, bias, dict(zip(BUFFERS, tensors, strict=True)))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *tensors = ctx.saved_tensors
        layer, buffers = ctx.layer, dict(zip(BUFFERS, tensors, strict=True))
        is_static = isinstance(layer.scheme, Int8Static)
        needs_x, needs_weight, needs_bias, *needs_range = ctx.needs_input_grad[:5]
        to_x = to_weight = to_bias = to_scale = to_offset = None
        if needs_x or any(needs_range):
            to_x = (grad @ layer._dequantize(buffers).to(grad.dtype)).to(x.dtype)
            if is_static:
                to_x, to_scale, to_offset = _through_range(to_x, x, layer, buffers)
        if needs_weight:
            seen = layer._seen(x, buffers).to(grad.dtype)
            to_weight = grad.reshape(-1, grad.shape[-1]).t() @ seen.reshape(-1, seen.shape[-1])
            to_weight = to_weight.to(ctx.weight_dtype)
            if weight is not None:
                to_weight = through_clipping(to_weight, weight, buffers["weight_scale"])
        if needs_bias:
            to_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
        return to_x if needs_x else None, to_weight, to_bias, to_scale, to_offset, None, *(None,) * len(tensors)


def clips(layer: QLinear) -> bool:
    """Whether some weights lie outside of their range."""
    return bool(getattr(layer.scheme, "clip_weights", False))


def _through_range(
    to_x: Tensor, x: Tensor, layer: QLinear, buffers: dict[str, Tensor | None]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients to x, and to scale and offset of its range, these times 1 / sqrt(in_features * qmax): as in LSQ,
    their steps are then of the size of those of the weights.
    """
    qmin, qmax = qrange(torch.uint8, layer.scheme.activation_bits)  # type: ignore[attr-defined]
    size = max(1, layer.in_features)
    how = (size, buffers["input_scale"], buffers["input_zero_point"], qmin, qmax)
    to_x, to_scale, to_offset = torch.ops.pyqkern.fake_quantize_backward(to_x, x, *how)
    factor = 1 / math.sqrt(size * qmax)
    return to_x, to_scale * factor, to_offset * factor


def through_clipping(grad: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    """grad of a weight [out_features, in_features], 0 where the weight lies outside of [-127, 127] * scale."""
    if not weight.numel():
        return grad
    result: Tensor = torch.ops.pyqkern.fake_quantize_backward(
        grad.contiguous(), weight, weight.shape[1], scale, None, *WEIGHT_RANGE
    )[0]
    return result


class TrainedTable(torch.autograd.Function):
    """Rows [rows, embedding_dim] of an embedding, or all of its table, quantized and dequantized; gradients pass."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, scheme: Scheme) -> Tensor:
        scale = None
        if getattr(scheme, "clip_weights", False) and rows.numel():
            absmax, _ = torch.ops.pyqkern.choose_qparams_affine(rows, torch.int8, (0,), None, True)
            scale = least_error_scale(rows, absmax)
            ctx.save_for_backward(rows, scale)
        return _dequantized(rows, scale, scheme)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return through_clipping(grad, *ctx.saved_tensors) if ctx.saved_tensors else grad, None


def _dequantized(rows: Tensor, scale: Tensor | None, scheme: Scheme) -> Tensor:
    ops, width = torch.ops.pyqkern, max(1, rows.shape[1])
    if scale is not None:
        return ops.fake_quantize(rows, width, scale, None, *WEIGHT_RANGE)
    if isinstance(scheme, Int4):
        return ops.fake_quantize_rows(rows, scheme.group_size, torch.int8, True, 4)
    if isinstance(scheme, NF4 | FP4):
        packed, absmax = ops.quantize_4bit(rows, scheme.name, scheme.blocksize)
        nested: tuple[Tensor | None, ...] = (None,) * 3
        if scheme.double_quant and absmax.numel():
            absmax, *nested = quantize_absmax(absmax)  # type: ignore[assignment]
        return ops.dequantize_4bit(packed, absmax, *nested, scheme.name, scheme.blocksize, rows.shape, rows.dtype)
    return ops.fake_quantize_rows(rows, width, torch.int8, True)


def is_row_by_row(scheme: Scheme, width: int) -> bool:
    """Whether a row of a table [rows, width] is quantized without a look at others."""
    return not isinstance(scheme, NF4 | FP4) or (width % scheme.blocksize == 0 and not scheme.double_quant)
