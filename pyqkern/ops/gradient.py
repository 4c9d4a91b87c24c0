"""The gradient of a linear's input, from the packed weight: int8_grad_input and grad_input_4bit."""

from typing import Any

import torch
from torch import Tensor

from pyqkern.backends import Kernels, Weight4bit
from pyqkern.ops.checks import check_float
from pyqkern.ops.four_bit import TENSORS, check_packed_4bit, contiguous
from pyqkern.ops.int8 import check_packed
from pyqkern.ops.registry import kernels_of, operator


def _check_grad(grad: Tensor, n: int) -> None:
    check_float("grad", grad.dtype)
    if grad.dim() == 0 or grad.shape[-1] != n:
        raise ValueError(f"grad must be [..., N={n}], got shape {tuple(grad.shape)}")


def _int8_fake(grad: Tensor, packed: Tensor, weight_scale: Tensor, k: int) -> Tensor:
    """Checks everything, and returns an empty result."""
    check_packed(kernels_of(grad.device), packed, weight_scale, k, grad.device)
    _check_grad(grad, weight_scale.shape[0])
    return grad.new_empty((*grad.shape[:-1], k))


@operator("int8_grad_input(Tensor grad, Tensor packed, Tensor weight_scale, int k) -> Tensor", _int8_fake, rowwise=True)
def _int8(kernels: Kernels, grad: Tensor, packed: Tensor, weight_scale: Tensor, k: int) -> Tensor:
    y = _int8_fake(grad, packed, weight_scale, k)
    if grad.numel() == 0 or y.numel() == 0:
        return y.zero_()
    return kernels.int8_grad_input(grad.contiguous(), packed.contiguous(), weight_scale.contiguous(), k)


def _fake_4bit(grad: Tensor, weight: Weight4bit) -> Tensor:
    """Checks everything, and returns an empty result."""
    _check_grad(grad, weight.shape[0])
    check_packed_4bit(weight, grad.device)
    return grad.new_empty((*grad.shape[:-1], weight.shape[1]))


def _arguments_4bit(grad: Tensor, *given: Any) -> tuple[Any, ...]:
    *tensors, quant_type, blocksize, k = given
    shape = (grad.shape[-1] if grad.dim() else 0, k)
    return grad, Weight4bit._make((*tensors, quant_type, blocksize, shape))


@operator(
    f"grad_input_4bit(Tensor grad, {TENSORS}, str quant_type, int blocksize, int k) -> Tensor",
    _fake_4bit,
    arguments=_arguments_4bit,
    rowwise=True,
)
def _4bit(kernels: Kernels, grad: Tensor, weight: Weight4bit) -> Tensor:
    y = _fake_4bit(grad, weight)
    if grad.numel() == 0 or y.numel() == 0:
        return y.zero_()
    return kernels.grad_input_4bit(grad.contiguous(), contiguous(weight))


def grad_input_4bit(grad: Tensor, weight: Weight4bit) -> Tensor:
    """torch.ops.pyqkern.grad_input_4bit."""
    *tensors, quant_type, blocksize, (_, k) = weight
    return torch.ops.pyqkern.grad_input_4bit.default(grad, *tensors, quant_type, blocksize, k)
