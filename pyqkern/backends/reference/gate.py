"""The gate of experts in plain torch: the specification of csrc/gate.cpp. See `pyqkern.backends.reference`."""

from torch import Tensor

from pyqkern.backends.reference.int8 import activate
from pyqkern.backends.reference.recurrent import exp


def gate(h: Tensor, activation: str) -> Tensor:
    """h fp32 [M, 2 * N] -> activation(h[:, :N]) * h[:, N:], fp32 [M, N].

    SiLU is x / (e**-x + 1), each operation rounded; <= 3 ulp where x >= -87.3, and below 3e-39 * |x| from there on.
    Of both GELUs the C++ has polynomials of its own, and other bits.
    """
    first, second = h.chunk(2, 1)
    return (first / (exp(-first) + 1) if activation == "silu" else activate(first, activation)) * second
