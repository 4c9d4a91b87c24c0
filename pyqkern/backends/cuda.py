"""The Triton kernels, behind the functions of `pyqkern.backends.Kernels`.

What they are given has been checked by `pyqkern.ops`. Triton is imported with the first CUDA tensor: pyqkern works
without it.
"""

import functools
import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pyqkern.backends import Shape, Sizes, StepNumbers, Weight4bit
from pyqkern.backends.reference.four_bit import (
    pack_4bit,
    pack_scales,
    packed_shapes_4bit,
    rows_of_flat,
    slice_4bit,
    unpack_4bit,
    unpack_scales,
)
from pyqkern.backends.reference.gate import gate
from pyqkern.backends.reference.optimizer import map_lines
from pyqkern.backends.reference.recurrent import run

# The reference's; 4-bit weights are flat here too.
__all__ = ["gate", "pack_4bit", "pack_scales", "packed_shapes_4bit", "slice_4bit", "unpack_4bit", "unpack_scales"]


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
    x: Tensor, sizes: Sizes, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype, fused: bool, bits: int
) -> Tensor:
    return kernels("affine").quantize(x.view(sizes), scale, zero_point, dtype, fused, bits).view(x.shape)


def dequantize(q: Tensor, sizes: Sizes, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype) -> Tensor:
    return kernels("affine").dequantize(q.view(sizes), scale, zero_point, dtype).view(q.shape)


def int8_matmul(a: Tensor, w: Tensor) -> Tensor:
    return kernels("int8").int8_matmul(a, w)


def int8_linear(
    x: Tensor, packed: Tensor, weight_scale: Tensor, bias: Tensor | None, activation: str, symmetric: bool, bits: int
) -> Tensor:
    y = kernels("int8").int8_linear(x.view(-1, x.shape[-1]), packed, weight_scale, bias, activation, symmetric, bits)
    return y.view(*x.shape[:-1], weight_scale.shape[0])


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
    y = kernels("int8").int8_linear_static(
        x.view(-1, x.shape[-1]), packed, weight_scale, bias, activation, input_scale, input_zero_point, bits
    )
    return y.view(*x.shape[:-1], weight_scale.shape[0])


def int8_linear_weight_only(x: Tensor, packed: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """torch's own product, in x's dtype, with a dequantized copy of the weight."""
    n, k = weight_scale.shape[0], x.shape[-1]
    weight = dequantize(int8_unpack(packed, n, k), (1, n, k), weight_scale, None, x.dtype)
    return functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


def int8_grad_input(grad: Tensor, packed: Tensor, weight_scale: Tensor, k: int) -> Tensor:
    """torch's own product, in grad's dtype, with a dequantized copy of the weight."""
    n = weight_scale.shape[0]
    return grad @ dequantize(int8_unpack(packed, n, k), (1, n, k), weight_scale, None, grad.dtype)


def splits() -> bool:
    return False


def packed_shape(n: int, k: int, split: bool = False) -> Shape:
    """Rows of K rounded up to 16, and behind them rows that hold the N column sums as int32."""
    row = max(16, -(-k // 16) * 16)
    return (n - (-4 * n // row), row)


def int8_pack(weight: Tensor, split: bool = False) -> Tensor:
    return kernels("int8").int8_pack(weight)


def int8_unpack(packed: Tensor, n: int, k: int) -> Tensor:
    return packed[:n, :k].contiguous()


def int8_rows(packed: Tensor, n: int, k: int, rows: Tensor) -> Tensor:
    return packed.index_select(0, rows)[:, :k].contiguous()


def int8_slice(packed: Tensor, n: int, k: int, begin: int, end: int) -> Tensor:
    """Packed anew: the column sums lie behind all rows."""
    return int8_pack(packed[begin:end, :k].contiguous())


def quantize_4bit(x: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    return kernels("four_bit").quantize_4bit(x, quant_type, blocksize)


def dequantize_4bit(weight: Weight4bit, dtype: torch.dtype) -> Tensor:
    return kernels("four_bit").dequantize_4bit(*weight, dtype)


def linear_4bit(x: Tensor, weight: Weight4bit, bias: Tensor | None, compute: str) -> Tensor:
    *tensors, quant_type, blocksize, shape = weight
    return kernels("four_bit").linear_4bit(x, *tensors, bias, quant_type, blocksize, shape[0], compute)


def grad_input_4bit(grad: Tensor, weight: Weight4bit) -> Tensor:
    """torch's own product, in grad's dtype, with a dequantized copy of the weight."""
    return grad @ dequantize_4bit(weight, grad.dtype)


def rows_4bit(weight: Weight4bit, rows: Tensor, dtype: torch.dtype) -> Tensor:
    return rows_of_flat(dequantize_4bit, weight, rows, dtype)


def fake_quantize(x: Tensor, *how: Any) -> Tensor:
    return kernels("fake_quantize").fake_quantize(x, *how)


def fake_quantize_backward(grad: Tensor, x: Tensor, *how: Any) -> tuple[Tensor, Tensor, Tensor]:
    return kernels("fake_quantize").fake_quantize_backward(grad, x, *how)


def recurrent(*arguments: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    return run(int8_linear, linear_4bit, *arguments)


def square_sum(tensors: Sequence[Tensor], scale: float) -> Tensor:
    return kernels("optimizer").square_sum(tensors, scale)


@functools.cache
def _maps(device: torch.device) -> Tensor:
    return torch.stack([map_lines(True), map_lines(False)]).to(device)


def optimizer_step(
    optimizer: str,
    numbers: StepNumbers,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    state1: Sequence[Tensor],
    state2: Sequence[Tensor],
    absmax1: Sequence[Tensor],
    absmax2: Sequence[Tensor],
) -> None:
    for i, (p, g, first) in enumerate(zip(params, grads, state1, strict=True)):
        states = (t[i] if t else None for t in (state2, absmax1, absmax2))
        kernels("optimizer").optimizer_step(optimizer, numbers, _maps(p.device), p, g, first, *states)
