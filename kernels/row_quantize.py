# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Per-token dynamic quantization, alone and fused with what comes before it: GELU, or residual and LayerNorm.

    per row   lo = min(0, min x), hi = max(0, max x)
              asymmetric: scale = (hi - lo) / 255, zero_point = rint(-lo / scale)
              symmetric:  scale = max(-lo, hi) / 127, zero_point = 128
              u = clamp(rint(x * (1/scale) + zero_point), 0, 255)
    of 7 bits, which are asymmetric, 127 takes the place of 255

The codes u are those of pyqkern.backends.reference.int8_quantize_rows. What is stored is q = u - 128, int8, because
tensor cores multiply int8 by int8, and zero_point - 128 (nothing at all if symmetric, where it is 0). A row's scale is
NaN if it holds NaN or an infinity. Rows of q are ceil16(K) bytes apart, so that they load in 16-byte pieces.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from .device import check_device, launch
from .numerics import gelu, gelu_tanh, row_qparams

MAX_BLOCK = 16384  # the longest row that a program keeps in registers


@triton.jit
def _row_range(x):
    """Per row: least, greatest, and 0, or NaN where an element is not finite. Minimum and maximum pass over NaN."""
    return tl.min(x, 1), tl.max(x, 1), tl.sum(x * 0.0, 1)


@triton.jit
def _store_codes(x, scale, zero_point, q_ptr, row, column, M, stride_q, QMAX: tl.constexpr, NAN_IS_ZERO: tl.constexpr):
    """The kernels' speed is decided by the operations per element.

    NAN_IS_ZERO: rows with a NaN scale have zero point 0, which is the code that the maximum gives for NaN.
    """
    t = x * tl.div_rn(1.0, scale)[:, None] + zero_point[:, None]
    if not NAN_IS_ZERO:
        t = tl.where(t == t, t, zero_point[:, None])
    t = tl.minimum(tl.maximum(t, 0.0), QMAX)
    # As in round_half_even, but that the integer, less 128, is taken from the lowest byte of the sum.
    q = (t + 12582784.0).to(tl.int32, bitcast=True).to(tl.int8)
    mask = (row < M)[:, None] & (column < stride_q)[None, :]
    tl.store(q_ptr + row.to(tl.int64)[:, None] * stride_q + column[None, :], q, mask=mask)


@triton.jit
def _store_qparams(scale, zero_point, scale_ptr, zero_point_ptr, row, M):
    tl.store(scale_ptr + row, scale, mask=row < M)
    if zero_point_ptr is not None:
        tl.store(zero_point_ptr + row, zero_point.to(tl.int32) - 128, mask=row < M)


@triton.jit
def _load(x_ptr, row, column, M, K, ACTIVATION: tl.constexpr):
    """x as fp32, after the activation; rounded to x's dtype between the two, as if it had been stored."""
    mask = (row < M)[:, None] & (column < K)[None, :]
    x = tl.load(x_ptr + row.to(tl.int64)[:, None] * K + column[None, :], mask=mask, other=0.0).to(tl.float32)
    if ACTIVATION == "gelu":
        x = gelu(x).to(x_ptr.dtype.element_ty).to(tl.float32)
    elif ACTIVATION == "gelu_tanh":
        x = gelu_tanh(x).to(x_ptr.dtype.element_ty).to(tl.float32)
    return x


@triton.jit(do_not_specialize=["M"])
def quantize_rows_kernel(
    x_ptr, given_scale_ptr, given_zero_point_ptr, q_ptr, scale_ptr, zero_point_ptr,
    M, K, stride_q,
    ACTIVATION: tl.constexpr, SYMMETRIC: tl.constexpr, QMAX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_K)
    x = _load(x_ptr, row, column, M, K, ACTIVATION)
    lo, hi, zero = _row_range(x)
    if not ONE_BLOCK:
        for k in range(BLOCK_K, K, BLOCK_K):
            x = _load(x_ptr, row, k + column, M, K, ACTIVATION)
            more_lo, more_hi, more_zero = _row_range(x)
            lo, hi, zero = tl.minimum(lo, more_lo), tl.maximum(hi, more_hi), zero + more_zero
    finite = zero == 0.0
    if given_scale_ptr is None:
        scale, zero_point = row_qparams(tl.minimum(lo, 0.0), tl.maximum(hi, 0.0), finite, SYMMETRIC, QMAX)
    else:
        scale = tl.where(finite, tl.load(given_scale_ptr), float("nan"))
        zero_point = tl.zeros_like(scale) + tl.load(given_zero_point_ptr).to(tl.float32)
    _store_qparams(scale, zero_point, scale_ptr, zero_point_ptr, row, M)
    nan_is_zero: tl.constexpr = given_scale_ptr is None and not SYMMETRIC
    if ONE_BLOCK:
        _store_codes(x, scale, zero_point, q_ptr, row, column, M, stride_q, QMAX, nan_is_zero)
    else:
        for k in range(0, stride_q, BLOCK_K):
            x = _load(x_ptr, row, k + column, M, K, ACTIVATION)
            _store_codes(x, scale, zero_point, q_ptr, row, k + column, M, stride_q, QMAX, nan_is_zero)


@triton.jit(do_not_specialize=["M"])
def layer_norm_quantize_rows_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, q_ptr, scale_ptr, zero_point_ptr,
    M, K, stride_q, eps,
    SYMMETRIC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_K)
    inside = (column < K)[None, :]
    x = _load(x_ptr, row, column, M, K, "none")
    if residual_ptr is not None:
        x = (x + _load(residual_ptr, row, column, M, K, "none")).to(x_ptr.dtype.element_ty).to(tl.float32)
    mean = tl.div_rn(tl.sum(x, 1), K * 1.0)
    centered = tl.where(inside, x - mean[:, None], 0.0)
    variance = tl.div_rn(tl.sum(centered * centered, 1), K * 1.0)
    y = centered * tl.div_rn(1.0, tl.sqrt_rn(variance + eps))[:, None]
    y *= tl.load(weight_ptr + column, mask=column < K, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + column, mask=column < K, other=0.0).to(tl.float32)[None, :]
    y = y.to(y_ptr.dtype.element_ty)
    mask = (row < M)[:, None] & inside
    tl.store(y_ptr + row.to(tl.int64)[:, None] * K + column[None, :], y, mask=mask)
    y = y.to(tl.float32)
    lo, hi, zero = _row_range(y)
    scale, zero_point = row_qparams(tl.minimum(lo, 0.0), tl.maximum(hi, 0.0), zero == 0.0, SYMMETRIC, 255.0)
    _store_qparams(scale, zero_point, scale_ptr, zero_point_ptr, row, M)
    _store_codes(y, scale, zero_point, q_ptr, row, column, M, stride_q, 255.0, not SYMMETRIC)


Rows = tuple[Tensor, Tensor, Tensor | None]


def _empty_rows(x: Tensor, symmetric: bool) -> Rows:
    m, k = x.shape
    q = torch.empty((m, -(-k // 16) * 16), dtype=torch.int8, device=x.device)
    scale = torch.empty(m, dtype=torch.float32, device=x.device)
    zero_point = None if symmetric else torch.empty(m, dtype=torch.int32, device=x.device)
    return q[:, :k], scale, zero_point


def _blocks(m: int, k: int) -> dict[str, int]:
    """Tile and warps: one row to a program, and to a warp where it is short, so that no warp waits for another."""
    block_k = min(triton.next_power_of_2(-(-k // 16) * 16), MAX_BLOCK)
    return {"BLOCK_M": 1, "BLOCK_K": block_k, "num_warps": min(16, max(1, block_k // 2048))}


def _quantize_rows(
    x: Tensor,
    activation: str,
    symmetric: bool,
    bits: int = 8,
    given: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Rows:
    device = check_device(x=x, input_scale=given[0], input_zero_point=given[1])
    (m, k), rows = x.shape, _empty_rows(x, symmetric)
    q, scale, zero_point = rows
    blocks = _blocks(m, k)
    launch(
        quantize_rows_kernel, triton.cdiv(m, blocks["BLOCK_M"]), device,
        x, *given, q, scale, zero_point, m, k, q.stride(0),
        ACTIVATION=activation, SYMMETRIC=symmetric, QMAX=2.0**bits - 1, ONE_BLOCK=k <= blocks["BLOCK_K"], **blocks,
    )  # fmt: skip
    return rows


def quantize_rows(x: Tensor, symmetric: bool, bits: int = 8) -> Rows:
    """x [M, K] contiguous, fp32/bf16/fp16 -> (q int8 [M, K], scale fp32 [M], zero_point int32 [M] or None).

    x is about scale[m] * (q[m, k] - zero_point[m]). q's rows are ceil16(K) apart. bits: 8, or 7 if not symmetric.
    """
    return _quantize_rows(x, "none", symmetric, bits)


def quantize_rows_static(x: Tensor, input_scale: Tensor, input_zero_point: Tensor, bits: int = 8) -> Rows:
    """quantize_rows with one given scale fp32 [] and zero point int32 [], in the range of the codes: [0, 2**bits - 1].

    A row with NaN or an infinity has scale NaN here too.
    """
    return _quantize_rows(x, "none", False, bits, (input_scale, input_zero_point))


def gelu_quantize_rows(x: Tensor, symmetric: bool, approximate: str = "none") -> Rows:
    """quantize_rows(gelu(x)) in one pass over memory; approximate: "none" or "tanh", as in torch's gelu."""
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate must be 'none' or 'tanh', got {approximate!r}")
    return _quantize_rows(x, "gelu" if approximate == "none" else "gelu_tanh", symmetric)


def layer_norm_quantize_rows(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, symmetric: bool, residual: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """y = layer_norm(x + residual) and quantize_rows(y), in one pass over memory: BERT needs both.

    x and residual [M, K], weight and bias [K] -> (y [M, K] of x's dtype, q, scale, zero_point).
    """
    device = check_device(x=x, weight=weight, bias=bias, residual=residual)
    m, k = x.shape
    if k > MAX_BLOCK:
        y = functional.layer_norm(x if residual is None else x + residual, (k,), weight, bias, eps)
        return y, *quantize_rows(y, symmetric)
    y, (q, scale, zero_point), blocks = torch.empty_like(x), _empty_rows(x, symmetric), _blocks(m, k)
    launch(
        layer_norm_quantize_rows_kernel, triton.cdiv(m, blocks["BLOCK_M"]), device,
        x, residual, weight, bias, y, q, scale, zero_point, m, k, q.stride(0), eps,
        SYMMETRIC=symmetric, **blocks,
    )  # fmt: skip
    return y, q, scale, zero_point
