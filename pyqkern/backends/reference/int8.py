"""The INT8 product and linear in plain torch. See `pyqkern.backends.reference`."""

import torch
from torch import Tensor
from torch.nn import functional

from pyqkern.backends import PANEL, Shape
from pyqkern.backends.reference.affine import chain, min_max, qparams_from_range, quantize


def int8_matmul(a: Tensor, w: Tensor) -> Tensor:
    """a [M, K] int8 or uint8, w [N, K] int8 -> a @ w.T, int32 [M, N]; exact, since fp64 holds integers to 2**53."""
    return (a.double() @ w.double().T).to(torch.int32)


def int8_quantize_rows(x: Tensor, symmetric: bool, bits: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """x [M, K] -> codes uint8 [M, K], scale fp32 [M], zero_point int32 [M] (128 if symmetric): each row its own.

    The same numbers as choose_qparams_affine and quantize_affine with dtype=torch.uint8, axis=0, except that a row with
    NaN or an infinity has scale NaN. bits: 8, or 7, which are never symmetric: codes and zero points in [0, 127].
    """
    sizes = (1, x.shape[0], x.shape[1])
    scale, zero_point = qparams_from_range(*min_max(x, sizes), torch.uint8, symmetric, bits)
    return quantize(x, sizes, scale, zero_point, torch.uint8, fused=False, bits=bits), scale, zero_point


def activate(y: Tensor, activation: str) -> Tensor:
    """One of ACTIVATIONS, elementwise; NaN stays NaN."""
    if activation == "none":
        return y
    if activation == "relu":
        return functional.relu(y)
    return functional.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")


def int8_linear(
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    symmetric: bool,
    bits: int = 8,
) -> Tensor:
    """x [..., K] fp32/bf16/fp16, packed int8 [N, K], the weight itself, weight_scale fp32 [N], bias [N] or
    None -> [..., N] of x's dtype.

    y[m, n] = activation((sx[m] * sw[n]) * (sum_k q[m,k] * w[n,k] - z[m] * sum_k w[n,k]) + bias[n])
    """
    q, scale, zero_point = int8_quantize_rows(x.reshape(-1, x.shape[-1]), symmetric, bits)
    product = (q.double() - zero_point.unsqueeze(1)) @ packed.double().T
    y = (scale.unsqueeze(1) * weight_scale) * product.float()
    if bias is not None:
        y = y + bias.float()
    return activate(y, activation).to(x.dtype).view(*x.shape[:-1], packed.shape[0])


def int8_linear_static(
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    input_scale: Tensor,
    input_zero_point: Tensor,
    bits: int = 8,
) -> Tensor:
    """int8_linear with one given scale and zero point for all of x; a row with NaN or an infinity is NaN here too."""
    x2 = x.reshape(-1, x.shape[-1])
    sizes = (x2.shape[0], 1, x2.shape[1])
    q = quantize(x2, sizes, input_scale.view(1), input_zero_point.view(1), torch.uint8, fused=False, bits=bits)
    product = (q.double() - input_zero_point.view(1)) @ packed.double().T
    y = (input_scale.view(1) * weight_scale) * product.float()
    y = torch.where(x2.isfinite().all(1, keepdim=True), y, torch.nan)
    if bias is not None:
        y = y + bias.float()
    return activate(y, activation).to(x.dtype).view(*x.shape[:-1], packed.shape[0])


def splits() -> bool:
    return False


def int8_linear_weight_only(x: Tensor, packed: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., K] fp32/bf16/fp16, packed int8 [N, K], the weight itself, weight_scale fp32 [N], bias [N] or
    None -> [..., N] of x's dtype.

    y[m, n] = (sum_k x[m,k] * w[n,k]) * sw[n] + bias[n], the sum in fp32 as `affine.chain` adds it.
    """
    y = chain(x.reshape(-1, x.shape[-1]).float(), packed.float()) * weight_scale
    y = y if bias is None else y + bias.float()
    return y.to(x.dtype).view(*x.shape[:-1], packed.shape[0])


def int8_grad_input(grad: Tensor, packed: Tensor, weight_scale: Tensor, k: int) -> Tensor:
    """grad [..., N] fp32/bf16/fp16, packed int8 [N, k], the weight itself, weight_scale fp32 [N] -> [..., k] of grad's
    dtype.

    y[m, k] = sum_n grad[m,n] * (w[n,k] * sw[n]) in fp32, the product in brackets rounded, the sum as `affine.chain`.
    """
    weight = packed.float() * weight_scale[:, None]
    return chain(grad.reshape(-1, grad.shape[-1]).float(), weight.T).to(grad.dtype).view(*grad.shape[:-1], k)


def int8_pack(weight: Tensor, split: bool = False) -> Tensor:
    """The form of an int8 weight [N, K] that this module's `int8_linear` takes: a contiguous copy."""
    return weight.clone(memory_format=torch.contiguous_format)


def int8_unpack(packed: Tensor, n: int, k: int) -> Tensor:
    """The weight [n, k] out of `int8_pack`."""
    return packed.clone()


def int8_rows(packed: Tensor, n: int, k: int, rows: Tensor) -> Tensor:
    """weight[rows]."""
    return packed.index_select(0, rows)


def int8_slice(packed: Tensor, n: int, k: int, begin: int, end: int) -> Tensor:
    """`int8_pack` of weight[begin:end]."""
    return packed[begin:end]


def packed_shape(n: int, k: int, split: bool = False) -> Shape:
    """The shape of `int8_pack`'s result."""
    return (n, k)


def panels(weight: Tensor) -> Tensor:
    """int8 [N, K] -> int8 [ceil(N/16), Q + 2 + ceil(Q/1024), 64], Q = ceil(K/4): what the C++ takes, on every ISA.

    packed[p, k // 4, 4 * j + k % 4] = weight[16 * p + j, k], zero outside of [N, K]. Behind these Q lines a panel has,
    as int32 in the machine's byte order, its 16 sums over k and its 16 sums over i of weight[n, 2 * i] *
    weight[n, 2 * i + 1]; then bits, the lowest of a byte first, that mark each two lines whose products with codes of
    7 bits may not be added in int16: the positive or the negative ones of four weights sum to more than 258.
    """
    n, k = weight.shape
    padded = functional.pad(weight, (0, -k % 4, 0, -n % PANEL))
    count, quads = padded.shape[0] // PANEL, padded.shape[1] // 4
    lines = padded.view(count, PANEL, quads, 4).transpose(1, 2).reshape(count, quads, 4 * PANEL)
    sums = padded.sum(1, dtype=torch.int32).view(count, 1, PANEL).view(torch.int8)
    wide = padded.to(torch.int32)
    pairs = (wide[:, ::2] * wide[:, 1::2]).sum(1, dtype=torch.int32).view(count, 1, PANEL).view(torch.int8)
    return torch.cat([lines, sums, pairs, _marks(lines)], 1)


def _marks(lines: Tensor) -> Tensor:
    """lines [panels, Q, 64] -> int8 [panels, ceil(Q/1024), 64]. 127 * 258 is the last multiple of 127 in int16."""
    panels, pairs = lines.shape[0], lines.shape[1] // 2
    fours = lines[:, : 2 * pairs].to(torch.int32).view(panels, pairs, 2, PANEL, 2, 2)
    positive, negative = (part.sum((2, 5)) for part in (fours.clamp(min=0), -fours.clamp(max=0)))
    marked = (torch.maximum(positive, negative) > 258).flatten(2).any(2)
    bits = functional.pad(marked.to(torch.int32), (0, -pairs % 512)).unflatten(1, ((pairs + 511) // 512, 64, 8))
    return (bits << torch.arange(8, device=bits.device)).sum(3).to(torch.uint8).view(torch.int8)
