"""The Triton kernels, behind the same functions as `pyqkern.backends.reference`.

What they are given has been checked by `pyqkern.ops`. Triton is imported with the first CUDA tensor: pyqkern works
without it.
"""

import importlib
from typing import Any

import torch
from torch import Tensor

from pyqkern.backends import Sizes


def kernels(name: str) -> Any:
    """The module pyqkern.kernels.`name`. Raises RuntimeError where triton is not installed."""
    try:
        return importlib.import_module(f"pyqkern.kernels.{name}")
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("triton"):
            raise
        raise RuntimeError('CUDA tensors need triton, which is not installed: pip install "pyqkern[cuda]"') from error


def min_max(x: Tensor, sizes: Sizes) -> tuple[Tensor, Tensor]:
    return kernels("affine").min_max(x.view(sizes))


def quantize(
    x: Tensor, sizes: Sizes, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype, fused: bool
) -> Tensor:
    return kernels("affine").quantize(x.view(sizes), scale, zero_point, dtype, fused).view(x.shape)


def dequantize(q: Tensor, sizes: Sizes, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype) -> Tensor:
    return kernels("affine").dequantize(q.view(sizes), scale, zero_point, dtype).view(q.shape)


def int8_matmul(a: Tensor, w: Tensor) -> Tensor:
    return kernels("int8").int8_matmul(a, w)


def int8_linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, activation: str, symmetric: bool
) -> Tensor:
    y = kernels("int8").int8_linear(x.view(-1, x.shape[-1]), weight, weight_scale, bias, activation, symmetric)
    return y.view(*x.shape[:-1], weight_scale.shape[0])


def int8_linear_static(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    input_scale: Tensor,
    input_zero_point: Tensor,
) -> Tensor:
    y = kernels("int8").int8_linear_static(
        x.view(-1, x.shape[-1]), weight, weight_scale, bias, activation, input_scale, input_zero_point
    )
    return y.view(*x.shape[:-1], weight_scale.shape[0])


def int8_pack(weight: Tensor) -> Tensor:
    return kernels("int8").int8_pack(weight)


def int8_unpack(packed: Tensor, n: int, k: int) -> Tensor:
    return kernels("int8").int8_unpack(packed, n, k)


def packed_shape(n: int, k: int) -> tuple[int, ...]:
    """Rows of K rounded up to 16, and behind them rows that hold the N column sums as int32. Needs no triton."""
    row = max(16, -(-k // 16) * 16)
    return (n - (-4 * n // row), row)
