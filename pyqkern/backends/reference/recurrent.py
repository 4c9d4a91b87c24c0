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
    return fma(a, *(v if isinstance(v, Tensor) else a.new_tensor(v) for v in (b, c)))


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


def linears(
    int8_linear: Callable[..., Tensor],
    linear_4bit: Callable[..., Tensor],
    weights: Sequence[Weight8bit | Weight4bit],
    biases: Sequence[Tensor],
    symmetric: bool,
    bits: int,
    compute: str,
) -> Callable[[int, Tensor], Tensor]:
    """i (0: of the input, 1: of the hidden state, 2: the projection) and x [rows, K] -> [rows, N], fp32."""

    def linear(i: int, rows: Tensor) -> Tensor:
        weight, bias = weights[i], biases[i] if i < len(biases) else None
        if isinstance(weight, Weight4bit):
            return linear_4bit(rows, weight, bias, compute)
        return int8_linear(rows, weight.packed, weight.scale, bias, "none", symmetric, bits)

    return linear


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

    linear = linears(int8_linear, linear_4bit, weights, biases, symmetric, bits, compute)
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


def _before(y: Tensor, sizes: Sequence[int], h: Tensor, reverse: bool) -> list[Tensor]:
    """The hidden states that each step started from, out of the outputs y [rows, P] and the first states."""
    outputs = y.split(list(sizes))
    if reverse:
        outputs = (*outputs[1:], h[:0])
        return [torch.cat([after, h[len(after) : rows]]) for after, rows in zip(outputs, sizes, strict=True)]
    return [h[: sizes[0]], *(out[:rows] for out, rows in zip(outputs, sizes[1:], strict=False))]


def backward(
    grads: tuple[Tensor, Tensor, Tensor | None],
    linear: Callable[[int, Tensor], Tensor],
    values: Sequence[Tensor],
    x: Tensor,
    y: Tensor,
    batch_sizes: Tensor,
    h: Tensor,
    c: Tensor | None,
    cell: str,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, list[Tensor]]:
    """The gradients to x, h, c and the two biases, of those to y and to h and c in the end: straight through.

    Quantizations count as the identity: states and gates are those of the quantized layer, and what goes back through
    a product is multiplied by the dequantized weight, `values` in the order of weights, fp32.

    Last, what the gradients to the weights are made of: the gradients to the products of x and of h and the hidden
    states that were multiplied, [rows, ..]; and where an LSTM projects, those to the projection and what it projects.
    """
    sizes = batch_sizes.tolist()
    before = _before(y, sizes, h, reverse)
    of_x = [part.chunk(GATES[cell], 1) for part in linear(0, x).split(sizes)]
    of_h = [part.chunk(GATES[cell], 1) for part in linear(1, torch.cat(before)).split(sizes)]
    order = list(reversed(range(len(sizes)))) if reverse else list(range(len(sizes)))
    cells: dict[int, tuple[Tensor, Tensor]] = {}
    running = None if c is None else c.clone()
    for t in order:
        if running is None:
            break
        i, f, o = ((of_x[t][k] + of_h[t][k]).sigmoid() for k in (0, 1, 3))
        old = running[: sizes[t]].clone()
        running[: sizes[t]] = f * old + i * (of_x[t][2] + of_h[t][2]).tanh()
        cells[t] = (old, running[: sizes[t]].clone())
    to_y, to_h, to_c = grads[0].split(sizes), grads[1].clone(), None if grads[2] is None else grads[2].clone()
    to_gates: list[tuple[Tensor, Tensor]] = [(x, x)] * len(sizes)
    to_projection: list[tuple[Tensor, Tensor]] = [(x, x)] * (len(sizes) if len(values) == 3 else 0)
    for t in reversed(order):
        rows = sizes[t]
        to_state = to_y[t] + to_h[:rows]
        rest: Tensor | float = 0.0
        if cell == "lstm":
            assert to_c is not None
            i, f, o = ((of_x[t][k] + of_h[t][k]).sigmoid() for k in (0, 1, 3))
            g, (old, new) = (of_x[t][2] + of_h[t][2]).tanh(), cells[t]
            if len(values) == 3:
                to_projection[t] = to_state, o * new.tanh()
                to_state = to_state @ values[2]
            to_cell = to_c[:rows] + to_state * o * (1 - new.tanh() ** 2)
            to_c[:rows] = to_cell * f
            through = (i * (1 - i) * g, f * (1 - f) * old, (1 - g**2) * i)
            of_gates = [to_cell * factor for factor in through] + [to_state * new.tanh() * o * (1 - o)]
            to_gates[t] = (torch.cat(of_gates, 1),) * 2
        elif cell == "gru":
            r, z = ((of_x[t][k] + of_h[t][k]).sigmoid() for k in (0, 1))
            fresh = (of_x[t][2] + r * of_h[t][2]).tanh()
            to_fresh = to_state * (1 - z) * (1 - fresh**2)
            both = [to_fresh * of_h[t][2] * r * (1 - r), to_state * (before[t] - fresh) * z * (1 - z)]
            to_gates[t] = (torch.cat([*both, to_fresh], 1), torch.cat([*both, to_fresh * r], 1))
            rest = to_state * z
        else:
            total = of_x[t][0] + of_h[t][0]
            to_gates[t] = (to_state * (1 - total.tanh() ** 2 if cell == "rnn_tanh" else (total > 0).to(x.dtype)),) * 2
        to_h[:rows] = to_gates[t][1] @ values[1] + rest
    to_x_gates, to_h_gates = (torch.cat([both[k] for both in to_gates]) for k in (0, 1))
    of_weights = [to_x_gates, to_h_gates, torch.cat(before)]
    of_weights += [torch.cat(parts) for parts in zip(*to_projection, strict=True)]
    return to_x_gates @ values[0], to_h, to_c, to_x_gates.sum(0), to_h_gates.sum(0), of_weights
