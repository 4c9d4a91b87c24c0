"""Recurrent layers in plain torch: the specification of csrc/recurrent.cpp and csrc/kernels/recurrent.inl.

Every line of arithmetic is one rounding to fp32, and `fma` is one for both, so that all backends have the same bits.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from pyqkern.backends import GATES, Weight4bit, Weight8bit
from pyqkern.backends.reference.affine import fma
from pyqkern.backends.reference.four_bit import linear_4bit
from pyqkern.backends.reference.int8 import int8_linear


def _fma(a: Tensor, b: Tensor | float, c: Tensor | float) -> Tensor:
    return fma(
        a, torch.as_tensor(b, dtype=a.dtype, device=a.device), torch.as_tensor(c, dtype=a.dtype, device=a.device)
    )


def _exp_rest(x: Tensor) -> tuple[Tensor, Tensor]:
    """n = rint(x / ln 2), int32, and e**(x - n * ln 2) - 1."""
    n = torch.round(x * x.new_tensor(1.44269504))
    r = _fma(n, -0.693145752, x)
    r = _fma(n, -1.42860677e-6, r)
    p = _fma(r, 0.0013950557, 0.0083689289)
    for coefficient in (0.041666205, 0.16666519, 0.5):
        p = _fma(p, r, coefficient)
    return n.nan_to_num().to(torch.int32), fma(p, r * r, r)


def _power(n: Tensor) -> Tensor:
    return ((n + 127) << 23).view(torch.float32)


def exp(x: Tensor) -> Tensor:
    """e**x, <= 1 ulp, of x limited to [-87.3, 88.7]; NaN gives NaN."""
    n, p = _exp_rest(x.clamp(x.new_tensor(-87.33654), x.new_tensor(88.72283)))
    half = n >> 1
    return (p + 1) * _power(half) * _power(n - half)


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + e**-x), fp32; <= 3 ulp where x >= -87.3, and below 2**-126 from there on."""
    return 1 / (exp(-x) + 1)


def tanh(x: Tensor) -> Tensor:
    """t / (t + 2) for t = e**(2 |x|) - 1, with the sign of x, fp32; <= 3 ulp."""
    a = x.abs()
    n, p = _exp_rest((a + a).clamp(max=20))
    power = _power(n)
    t = fma(power, p, power - 1)
    return torch.copysign(t / (t + 2), x)


def step(cell: str, x: Tensor, product: Tensor, h: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The new states, h before its projection; x, product [rows, gates * n], of the input and of h, with biases."""
    gates = GATES[cell]
    of_x, of_h = x.chunk(gates, -1), product.chunk(gates, -1)
    if cell == "lstm":
        assert c is not None
        i, f, o = (sigmoid(of_x[k] + of_h[k]) for k in (0, 1, 3))
        c = fma(f, c, i * tanh(of_x[2] + of_h[2]))
        return o * tanh(c), c
    if cell == "gru":
        r, z = (sigmoid(of_x[k] + of_h[k]) for k in (0, 1))
        fresh = tanh(fma(r, of_h[2], of_x[2]))
        return fma(z, h - fresh, fresh), None
    total = x + product
    return (tanh(total) if cell == "rnn_tanh" else total.relu()), None


def run(
    int8_linear: Callable[..., Tensor],
    linear_4bit: Callable[..., Tensor],
    x: Tensor,
    batch_sizes: Tensor,
    weights: Sequence[Weight8bit | Weight4bit],
    biases: Sequence[Tensor],
    h: Tensor,
    c: Tensor | None,
    cell: str,
    reverse: bool,
    symmetric: bool,
    bits: int,
    compute: str,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`Kernels.recurrent` by the linears of any backend."""

    def linear(i: int, rows: Tensor) -> Tensor:
        weight, bias = weights[i], biases[i] if i < len(biases) else None
        if isinstance(weight, Weight4bit):
            return linear_4bit(rows, weight, bias, compute)
        return int8_linear(rows, weight.packed, weight.scale, bias, "none", symmetric, bits)

    h, c = h.clone(), None if c is None else c.clone()
    sizes = batch_sizes.tolist()
    products = linear(0, x).split(sizes)
    outputs: list[Tensor] = list(products)
    order = range(len(sizes))
    for t in reversed(order) if reverse else order:
        rows = sizes[t]
        state, cells = step(cell, products[t], linear(1, h[:rows].clone()), h[:rows], None if c is None else c[:rows])
        if c is not None and cells is not None:
            c[:rows] = cells
        outputs[t] = linear(2, state) if len(weights) == 3 else state
        h[:rows] = outputs[t]
    return torch.cat(outputs), h, c


recurrent = partial(run, int8_linear, linear_4bit)
