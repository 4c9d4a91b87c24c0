# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The arithmetic that several kernels share, as device functions.

Operation for operation it is that of pyqkern.backends.reference.
"""

import triton
import triton.language as tl


@triton.jit
def round_half_even(x):
    """x rounded to the nearest integer, ties to even; |x| <= 2**22. Adding 1.5 * 2**23 leaves no bit for a fraction."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def to_codes(x, inverse_scale, zero_point, QMIN: tl.constexpr, QMAX: tl.constexpr, FUSED: tl.constexpr):
    """clamp(rint(x * inverse_scale + zero_point), QMIN, QMAX) as fp32; NaN gives the zero point.

    The sum is clamped before it is rounded, which gives the same integer, as both bounds are integers.
    """
    t = tl.fma(x, inverse_scale, zero_point) if FUSED else x * inverse_scale + zero_point
    t = tl.where(t == t, t, zero_point)
    return round_half_even(tl.minimum(tl.maximum(t, QMIN), QMAX))


@triton.jit
def row_qparams(lo, hi, finite, SYMMETRIC: tl.constexpr, QMAX: tl.constexpr):
    """Scale and zero point (fp32, of codes in [0, QMAX]) for rows with values in [lo, hi], lo <= 0 <= hi.

    Symmetric rows have zero point 128. Rows that are not finite have scale NaN, and zero point 0 if not symmetric.
    """
    if SYMMETRIC:
        extent = tl.maximum(-lo, hi)
        scale = tl.div_rn(extent, 127.0)
    else:
        extent = hi - lo
        scale = tl.div_rn(extent, QMAX)
        scale = tl.where(extent == float("inf"), tl.div_rn(hi, QMAX) - tl.div_rn(lo, QMAX), scale)
    # never below 2**-126, so that 1/scale is finite
    scale = tl.where(extent == 0.0, 1.0, tl.maximum(scale, 1.1754943508222875e-38))
    if SYMMETRIC:
        zero_point = tl.zeros_like(scale) + 128.0
    else:
        zero_point = tl.where(finite, tl.minimum(round_half_even(tl.div_rn(-lo, scale)), QMAX), 0.0)
    return tl.where(finite, scale, float("nan")), zero_point


@triton.jit
def gelu(x):
    """0.5 * x * (1 + erf(x / sqrt(2)))."""
    return (x * 0.5) * (tl.erf(x * 0.7071067811865476) + 1.0)


@triton.jit
def gelu_tanh(x):
    """0.5 * x * (1 + tanh(u)), u = sqrt(2 / pi) * (x + 0.044715 * x**3), as x / (1 + exp(-2u))."""
    u = x * (0.7978845608028654 + 0.035677408136300125 * x * x)
    return x / (1.0 + tl.exp(u * -2.0))


@triton.jit
def activate(y, ACTIVATION: tl.constexpr):
    """One of pyqkern.backends.reference.ACTIVATIONS, elementwise; NaN stays NaN."""
    if ACTIVATION == "relu":
        return tl.where(y < 0.0, 0.0, y)
    elif ACTIVATION == "gelu":
        return gelu(y)
    elif ACTIVATION == "gelu_tanh":
        return gelu_tanh(y)
    else:
        return y
