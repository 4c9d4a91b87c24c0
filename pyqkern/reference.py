"""Every kernel in plain torch: the specification, the oracle of the tests, and what runs on a device without kernels.

The functions here, in `pyqkern.cpu` (C++) and in `pyqkern.kernels` (Triton) have the same arguments and the same
results: integers equal, and the float results of the linear equal bit for bit where no GELU is fused. One line of
arithmetic below is one rounding to fp32; nothing is fused except where `fma` is written.

`sizes = (outer, channels, inner)` is how a contiguous tensor of any shape is seen: channel c has scale[c] and
zero_point[c]. Per tensor is (1, 1, numel), per channel on axis 0 of [N, K] is (1, N, K), on axis 1 (N, K, 1).
"""

import torch
from torch import Tensor
from torch.nn import functional

Sizes = tuple[int, int, int]

# The range of each quantized type, [qmin, qmax].
QRANGE = {torch.int8: (-128, 127), torch.uint8: (0, 255)}


def qrange(dtype: torch.dtype, bits: int = 8) -> tuple[int, int]:
    """[qmin, qmax] of codes of 8 or 4 bits, which are kept one to an element of dtype."""
    qmin, qmax = QRANGE[dtype]
    return (qmin, qmax) if bits == 8 else (qmin // 16, qmax // 16)


# The activations that the linear's tail can apply; the position is the code that C++ takes.
ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh")

# The largest in_features for which 255 * 127 * K < 2**31: beyond it an int32 sum could wrap.
INT8_LINEAR_MAX_K = 66311

# The largest K for which 128 * 128 * K (int8) or 255 * 128 * K (uint8) is below 2**31.
INT8_MATMUL_MAX_K = {torch.int8: 131071, torch.uint8: 65793}

FLT_MIN = 2.0**-126
PANEL = 16


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c of fp32 tensors, rounded once.

    The product of two fp32 numbers is exact in fp64. The sum is rounded to odd there, so that the second rounding, to
    fp32, sees on which side of a tie it lies (Boldo, Melquiond, "Emulation of FMA and correctly rounded sums", 2008).
    """
    product, c = a.double() * b.double(), c.double()
    total = product + c
    rest = total - product
    error = (product - (total - rest)) + (c - rest)
    even = total.contiguous().view(torch.int64) % 2 == 0
    step_off = even & (error != 0) & error.isfinite()
    return torch.where(step_off, torch.nextafter(total, error * torch.inf), total).float()


def min_max(x: Tensor, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """The least and the greatest of each channel, fp32 [channels]; NaN in both where an element is NaN or infinite.

    A channel without elements gives +inf and -inf.
    """
    outer, channels, inner = sizes
    x = x.reshape(sizes).float().transpose(0, 1).reshape(channels, outer * inner)
    if x.numel() == 0:
        return x.new_full((channels,), torch.inf), x.new_full((channels,), -torch.inf)
    bad = torch.where(x.isfinite().all(1), 0.0, torch.nan)
    return x.amin(1) + bad, x.amax(1) + bad


def qparams_from_range(
    lo: Tensor, hi: Tensor, dtype: torch.dtype, symmetric: bool, bits: int = 8
) -> tuple[Tensor, Tensor]:
    """Scale (fp32) and zero point (int32) that cover [lo, hi] and zero; NaN in the range gives scale NaN.

    A range of zero has scale 1. The scale is never below 2**-126, so that its reciprocal is finite.
    """
    qmin, qmax = qrange(dtype, bits)
    lo, hi = lo.clamp(max=0), hi.clamp(min=0)
    if symmetric:
        extent, levels = torch.maximum(-lo, hi), lo.new_tensor((qmax - qmin) // 2)
        scale = extent / levels
    else:
        extent, levels = hi - lo, lo.new_tensor(qmax - qmin)
        scale = torch.where(extent.isinf(), hi / levels - lo / levels, extent / levels)
    scale = torch.where(extent == 0, 1.0, scale.clamp(min=FLT_MIN))
    if symmetric:
        return scale, torch.full_like(scale, 0 if qmin < 0 else (qmax + 1) // 2, dtype=torch.int32)
    zero_point = (qmin - torch.round(lo / scale)).clamp(qmin, qmax).nan_to_num(qmin)
    return scale, zero_point.to(torch.int32)


def quantize(
    x: Tensor, sizes: Sizes, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype, fused: bool, bits: int = 8
) -> Tensor:
    """q = clamp(rint(x * (1/scale) + zero_point), qmin, qmax), ties to even; NaN gives the zero point.

    fused: multiply and add are one fma, as in torch.quantize_per_tensor; otherwise they are two roundings, as in
    torch.quantize_per_channel. With zero_point 0 there is no difference.
    """
    qmin, qmax = qrange(dtype, bits)
    inverse = (1.0 / scale).view(1, -1, 1)
    zero = torch.zeros_like(inverse) if zero_point is None else zero_point.view(1, -1, 1).float()
    value = x.reshape(sizes).float()
    value = fma(value, inverse, zero) if fused else value * inverse + zero
    return torch.where(value.isnan(), zero, value.round().clamp(qmin, qmax)).to(dtype).view(x.shape)


def dequantize(q: Tensor, sizes: Sizes, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype) -> Tensor:
    """scale * (q - zero_point) in fp32, rounded once more to dtype."""
    value = q.reshape(sizes).int()
    if zero_point is not None:
        value = value - zero_point.view(1, -1, 1)
    return (scale.view(1, -1, 1) * value.float()).to(dtype).view(q.shape)


def int8_matmul(a: Tensor, w: Tensor) -> Tensor:
    """a [M, K] int8 or uint8, w [N, K] int8 -> a @ w.T, int32 [M, N]; exact, since fp64 holds integers to 2**53."""
    return (a.double() @ w.double().T).to(torch.int32)


def int8_quantize_rows(x: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """x [M, K] -> codes uint8 [M, K], scale fp32 [M], zero_point int32 [M] (128 if symmetric): each row its own.

    The same numbers as choose_qparams_affine and quantize_affine with dtype=torch.uint8, axis=0, except that a row with
    NaN or an infinity has scale NaN.
    """
    sizes = (1, x.shape[0], x.shape[1])
    scale, zero_point = qparams_from_range(*min_max(x, sizes), torch.uint8, symmetric)
    return quantize(x, sizes, scale, zero_point, torch.uint8, fused=False), scale, zero_point


def activate(y: Tensor, activation: str) -> Tensor:
    """One of ACTIVATIONS, elementwise; NaN stays NaN."""
    if activation == "none":
        return y
    if activation == "relu":
        return functional.relu(y)
    return functional.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")


def int8_linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, activation: str, symmetric: bool
) -> Tensor:
    """x [..., K] fp32/bf16/fp16, weight int8 [N, K], weight_scale fp32 [N], bias [N] or None -> [..., N] of x's dtype.

    y[m, n] = activation((sx[m] * sw[n]) * (sum_k q[m,k] * w[n,k] - z[m] * sum_k w[n,k]) + bias[n])
    """
    q, scale, zero_point = int8_quantize_rows(x.reshape(-1, x.shape[-1]), symmetric)
    product = (q.double() - zero_point.unsqueeze(1)) @ weight.double().T
    y = (scale.unsqueeze(1) * weight_scale) * product.float()
    if bias is not None:
        y = y + bias.float()
    return activate(y, activation).to(x.dtype).view(*x.shape[:-1], weight.shape[0])


def int8_linear_static(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    input_scale: Tensor,
    input_zero_point: Tensor,
) -> Tensor:
    """int8_linear with one given scale and zero point for all of x; a row with NaN or an infinity is NaN here too."""
    x2 = x.reshape(-1, x.shape[-1])
    sizes = (x2.shape[0], 1, x2.shape[1])
    q = quantize(x2, sizes, input_scale.view(1), input_zero_point.view(1), torch.uint8, fused=False)
    product = (q.double() - input_zero_point.view(1)) @ weight.double().T
    y = (input_scale.view(1) * weight_scale) * product.float()
    y = torch.where(x2.isfinite().all(1, keepdim=True), y, torch.nan)
    if bias is not None:
        y = y + bias.float()
    return activate(y, activation).to(x.dtype).view(*x.shape[:-1], weight.shape[0])


def int8_pack(weight: Tensor) -> Tensor:
    """The form of an int8 weight [N, K] that this module's `int8_linear` takes: a contiguous copy."""
    return weight.clone(memory_format=torch.contiguous_format)


def int8_unpack(packed: Tensor, n: int, k: int) -> Tensor:
    """The weight [n, k] out of `int8_pack`."""
    return packed.clone()


def packed_shape(n: int, k: int) -> tuple[int, ...]:
    """The shape of `int8_pack`'s result."""
    return (n, k)


def panels(weight: Tensor) -> Tensor:
    """int8 [N, K] -> int8 [ceil(N/16), ceil(K/4) + 2, 64], the form that the C++ kernels take, on every ISA.

    packed[p, k // 4, 4 * j + k % 4] = weight[16 * p + j, k], zero outside of [N, K]; the last 128 bytes of a panel
    are, as int32 in the machine's byte order, its 16 sums over k and its 16 sums over i of
    weight[n, 2 * i] * weight[n, 2 * i + 1].
    """
    n, k = weight.shape
    padded = functional.pad(weight, (0, -k % 4, 0, -n % PANEL))
    count, quads = padded.shape[0] // PANEL, padded.shape[1] // 4
    lines = padded.view(count, PANEL, quads, 4).transpose(1, 2).reshape(count, quads, 4 * PANEL)
    sums = padded.sum(1, dtype=torch.int32).view(count, 1, PANEL).view(torch.int8)
    wide = padded.to(torch.int32)
    pairs = (wide[:, ::2] * wide[:, 1::2]).sum(1, dtype=torch.int32).view(count, 1, PANEL).view(torch.int8)
    return torch.cat([lines, sums, pairs], 1)
